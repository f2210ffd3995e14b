//! The guest that checks the PVM guest ABI: a small kernel that ring3 brings along.
//!
//! [`selftest`] boots it and judges what it says on its serial port, of which [`report`] knows the form.
//! [`write()`] gives it away, for other hypervisors.

pub mod report;
pub mod selftest;

use std::fs;
use std::io::{self, Write};
use std::path::Path;

/// The guest: an ELF kernel with a PVH entry and a 64-bit Linux entry, built by this crate's build script.
pub static PVM_GUEST: &[u8] = include_bytes!(env!("RING3_PVM_GUEST"));

/// The guest could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {to}")]
pub struct WriteError {
    to: String,
    source: io::Error,
}

/// Writes the guest to a file, or to standard output if `path` is `-`.
///
/// # Errors
/// [`WriteError`], naming the file.
pub fn write(path: &Path) -> Result<(), WriteError> {
    let (to, written) = if path.as_os_str() == "-" {
        let mut out = io::stdout().lock();
        ("to standard output".to_owned(), out.write_all(PVM_GUEST).and_then(|()| out.flush()))
    } else {
        (path.display().to_string(), fs::write(path, PVM_GUEST))
    };
    written.map_err(|source| WriteError { to, source })
}
