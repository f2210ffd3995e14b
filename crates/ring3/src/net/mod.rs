//! User-mode networking at the command line: `ring3 pasta`, `ring3 passt` and `ring3 net`.
//!
//! The engine is crate `usernet`, the links to a guest are crate `taps`; here they are put together.

pub mod command;
pub mod control;
pub mod isolation;
pub mod log;
pub mod options;
pub mod passt;
pub mod pasta;
pub mod stats;

use std::io;

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
