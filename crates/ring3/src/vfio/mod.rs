//! `ring3 vfio`: devices given to other monitors, by vfio-user; and what devices are.

mod info;
mod serve;

use std::io;
use std::path::PathBuf;

use ::vfio::devices::nvme::NvmeError;
use ::vfio::kernel::{KernelError, PciAddress};
use ::vfio::pci::function::FunctionError;
use disk::DiskError;

use crate::cli::{NamedDevice, VfioTask};

/// Why `ring3 vfio` fails.
#[derive(Debug, thiserror::Error)]
pub enum VfioError {
    /// The file cannot be opened.
    #[error("cannot open {0}")]
    Open(PathBuf, #[source] io::Error),
    /// The file cannot be a disk.
    #[error("{0} cannot be a disk")]
    Disk(PathBuf, #[source] DiskError),
    /// The device cannot be made.
    #[error("cannot make the NVMe controller")]
    Nvme(#[from] NvmeError),
    /// The device cannot be made.
    #[error("cannot make the test device")]
    Test(#[source] FunctionError),
    /// Nobody can be listened to.
    #[error("cannot listen on {0}")]
    Listen(PathBuf, #[source] io::Error),
    /// The server cannot be reached.
    #[error("cannot connect to {0}")]
    Connect(PathBuf, #[source] io::Error),
    /// The server is none, or fails.
    #[error("the server at {0} does not answer as a vfio-user server does")]
    Server(PathBuf, #[source] io::Error),
    /// A device of the host cannot be had.
    #[error("cannot use a device of the host")]
    OfHost(#[from] KernelError),
    /// A device of the host does not say what it is.
    #[error("{0} does not say what it is")]
    Silent(PciAddress, #[source] io::Error),
    /// The host fails.
    #[error("cannot {0}")]
    Host(&'static str, #[source] io::Error),
}

/// Does what a subcommand says.
///
/// # Errors
/// [`VfioError`].
pub fn run(task: VfioTask) -> Result<(), VfioError> {
    match task {
        VfioTask::Serve { device } => serve::serve(&device),
        VfioTask::Info { device: Some(NamedDevice::VfioPci(name)), .. } => info::of_the_host(name),
        VfioTask::Info { device: Some(NamedDevice::VfioUser(socket)), .. }
        | VfioTask::Info { socket: Some(socket), .. } => info::of_a_server(&socket),
        // The command line has one of them.
        VfioTask::Info { device: None, socket: None } => Ok(()),
    }
}
