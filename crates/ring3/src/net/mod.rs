//! User-mode networking at the command line: `ring3 pasta`, `ring3 passt` and `ring3 net`.
//!
//! The engine is crate `usernet`, the links to a guest are crate `taps`; here they are put together.

pub mod attendants;
mod changes;
pub mod command;
pub mod control;
mod descriptors;
pub mod isolation;
pub mod local;
pub mod log;
pub mod options;
pub mod passt;
pub mod pasta;
pub mod stats;

use std::io;

use usernet::Handle;
use usernet::config::Forward;

use descriptors::forward_what_can_be_had;
use options::settings::Forwards;

/// What could not be done, and the kernel's word on it.
#[derive(Debug, thiserror::Error)]
#[error("{what}")]
pub struct NetError {
    what: String,
    source: io::Error,
}

/// Says what an error of the kernel's came in the way of.
trait Because<T> {
    /// `what` begins with "cannot".
    fn because(self, what: impl FnOnce() -> String) -> Result<T, NetError>;
}

impl<T, E: Into<io::Error>> Because<T> for Result<T, E> {
    fn because(self, what: impl FnOnce() -> String) -> Result<T, NetError> {
        self.map_err(|error| NetError { what: what(), source: error.into() })
    }
}

/// Forwards as many of the ports as can be had; none at all is an error.
fn add_best_effort(handle: &Handle, forwards: &Forwards) -> Result<(), NetError> {
    let add = |forward: Forward| handle.add_forward(forward).map(drop);
    // It can fail only if the engine has ended.
    let remove = |forward| drop(handle.remove_forward(forward));
    forward_what_can_be_had(forwards.best_effort.iter().cloned(), add, remove)
        .because(|| "cannot forward a single one of the ports".into())
}
