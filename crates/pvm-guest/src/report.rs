//! The report: one line for each check, in the manner of TAP.

use crate::cpu::Cpu;
use crate::say;
use crate::space::Space;

/// Why a check stops before its end.
#[derive(Clone, Copy, Debug)]
pub enum Stop {
    /// What it needs is not offered.
    Skip(&'static str),
    /// Something is not as the ABI says.
    Wrong {
        /// What.
        what: &'static str,
        /// What it is.
        got: u64,
        /// What it should be, if that is one value.
        want: Option<u64>,
    },
}

/// What a check returns.
pub type Verdict = Result<(), Stop>;

/// `got` is `want`.
pub fn equal(what: &'static str, got: impl Into<u64>, want: impl Into<u64>) -> Verdict {
    let (got, want) = (got.into(), want.into());
    if got == want { Ok(()) } else { Err(Stop::Wrong { what, got, want: Some(want) }) }
}

/// `got` is one of `want`.
pub fn one_of(what: &'static str, got: impl Into<u64>, want: &[u64]) -> Verdict {
    let got = got.into();
    if want.contains(&got) { Ok(()) } else { Err(Stop::Wrong { what, got, want: want.first().copied() }) }
}

/// It is so; `value` is for the reader if not.
pub fn holds(what: &'static str, so: bool, value: u64) -> Verdict {
    if so { Ok(()) } else { Err(Stop::Wrong { what, got: value, want: None }) }
}

/// A check.
#[derive(Clone, Copy, Debug)]
pub struct Check {
    /// Its name, within its group.
    pub name: &'static str,
    /// What it does.
    pub run: fn(&Machine) -> Verdict,
}

/// A group of checks.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Its name.
    pub name: &'static str,
    /// The checks, in the order in which they are run.
    pub checks: &'static [Check],
}

/// What checks work with.
#[derive(Debug)]
pub struct Machine {
    /// The processor that runs them.
    pub cpu: &'static Cpu,
    /// The address space.
    pub space: Space,
    /// The second processor, if it came up: its local APIC's identifier.
    pub second: Option<u32>,
}

/// Runs the checks whose names begin with `only`.
pub fn run(groups: &[&Group], machine: &Machine, only: &str) {
    let chosen = || {
        groups
            .iter()
            .flat_map(|g| g.checks.iter().map(move |c| (g.name, c)))
            .filter(|(group, check)| matches(only, group, check.name))
    };
    say!("1..{}", chosen().count());
    let (mut failed, mut skipped) = (0, 0);
    for (n, (group, check)) in (1..).zip(chosen()) {
        let name = check.name;
        match (check.run)(machine) {
            Ok(()) => say!("ok {n} {group}/{name}"),
            Err(Stop::Skip(why)) => {
                skipped += 1;
                say!("ok {n} {group}/{name} # skip {why}");
            }
            Err(Stop::Wrong { what, got, want: Some(want) }) => {
                failed += 1;
                say!("not ok {n} {group}/{name} : {what} is {got:#x}, should be {want:#x}");
            }
            Err(Stop::Wrong { what, got, want: None }) => {
                failed += 1;
                say!("not ok {n} {group}/{name} : {what} ({got:#x})");
            }
        }
        machine.space.settle(machine.cpu);
    }
    let count = chosen().count();
    if failed == 0 {
        say!("pvm-guest: PASS {count} checks, {skipped} skipped");
    } else {
        say!("pvm-guest: FAIL {failed} of {count} checks, {skipped} skipped");
    }
}

/// Whether `group/name` begins with `only`.
fn matches(only: &str, group: &str, name: &str) -> bool {
    match only.split_once('/') {
        None => group.starts_with(only),
        Some((g, n)) => g == group && name.starts_with(n),
    }
}
