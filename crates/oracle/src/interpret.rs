//! The interpreter as an engine.

use cpu::Interpreter;

use crate::case::{Case, Engine, EngineError, Outcome};
use crate::guest::Guest;

/// A guest and the interpreter that runs it.
#[derive(Debug)]
pub struct Interpret {
    guest: Guest,
    interpreter: Interpreter,
}

impl Interpret {
    /// Makes them.
    ///
    /// # Errors
    /// When the host refuses memory.
    pub fn new() -> Result<Self, EngineError> {
        Ok(Self { guest: Guest::new()?, interpreter: Interpreter::new() })
    }

    /// The instructions that the interpreter lacks and came across, with how often.
    pub fn unimplemented(&self) -> impl Iterator<Item = (&str, u64)> {
        self.guest.vcpu.stats.unimplemented.iter().map(|(name, n)| (name.as_str(), *n))
    }
}

impl Engine for Interpret {
    fn run(&mut self, case: &Case) -> Result<Outcome, EngineError> {
        self.guest.load(case)?;
        match self.interpreter.run(&mut self.guest.vcpu) {
            cpu::Outcome::Halted => self.guest.outcome(case),
            cpu::Outcome::TripleFault => Err(EngineError::TripleFault { rip: self.guest.vcpu.state.rip() }),
            cpu::Outcome::Kicked => Err(EngineError::Stopped {
                rip: self.guest.vcpu.state.rip(),
                what: "kicked by nobody".to_owned(),
            }),
        }
    }
}
