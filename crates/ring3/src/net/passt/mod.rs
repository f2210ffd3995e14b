//! `ring3 passt`.

use std::io;

use super::options::PasstSettings;
use super::{Because, NetError};

/// Serves as the settings say; returns the exit status.
///
/// # Errors
/// What could not be done.
pub fn run(_settings: &PasstSettings) -> Result<u8, NetError> {
    Err(io::Error::from(io::ErrorKind::Unsupported)).because(|| "cannot serve yet".into())
}
