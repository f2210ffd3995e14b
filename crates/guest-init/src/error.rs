//! The one error type of the first process: every variant ends in a line for the host.

use std::path::{Path, PathBuf};

/// Shorthand for this crate's results.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Why the guest could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A system call on a file or mount point failed.
    #[error("{what} {}", path.display())]
    Io { what: &'static str, path: PathBuf, source: std::io::Error },
    /// The host's job description cannot be read.
    #[error("bad job description")]
    Spec(#[source] guest_init::spec::SpecError),
    /// The kernel shows no console port of that name.
    #[error(
        "no virtio console port {0}: the machine has none, or the kernel lacks virtio_pci or virtio_console"
    )]
    NoPort(&'static str),
    /// The relay of the standard streams failed.
    #[error("{0}")]
    Relay(&'static str, #[source] std::io::Error),
}

impl Error {
    /// For `map_err` on standard library calls.
    pub(crate) fn io(what: &'static str, path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { what, path: path.as_ref().to_owned(), source }
    }

    /// For `map_err` on `rustix` calls.
    pub(crate) fn errno(
        what: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |source| Self::Io { what, path: path.as_ref().to_owned(), source: source.into() }
    }

    /// The error and its causes in one line.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}
