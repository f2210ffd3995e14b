//! What a machine is told, and how a run can end.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use machine::power::Shutdown;

use super::devices::Connected;
use super::isolation::Confined;
use super::network::Network;
use super::spinner::Notes;
use crate::cli::{Boot, Engine, GuestAbi, Iommu};

/// Everything that the machine needs. All descriptors are blocking and close-on-exec; dropping the spec's
/// descriptors is how the machine says that it is done with them.
#[derive(Debug)]
pub struct VmSpec {
    /// The kernel file's path, for messages.
    pub kernel_path: PathBuf,
    /// The kernel file's bytes: ELF or bzImage.
    pub kernel: Vec<u8>,
    /// The initramfs, to be handed to the kernel as it is; `None`: the kernel is to do without.
    pub initramfs: Option<Vec<u8>>,
    /// The kernel's command line.
    pub command_line: String,
    /// Guest memory in bytes: a multiple of 1 MiB.
    pub memory: u64,
    /// Number of processors, at least 1.
    pub cpus: u32,
    /// The directory to share read-only by virtio-fs, tag [`guest_init::spec::ROOT_TAG`].
    pub shared_root: Option<PathBuf>,
    /// Disks in the order in which the guest is to see them.
    pub disks: Vec<OpenDisk>,
    /// Devices from elsewhere, in the order of their slots.
    pub devices: Vec<Connected>,
    /// The network card and what serves it; `None`: no such device.
    pub network: Option<Network>,
    /// The first serial port (0x3f8), the kernel's console.
    pub serial: Serial,
    /// The virtio console's ports; `None`: no such device.
    pub ports: Option<Ports>,
    /// How the kernel is entered.
    pub boot: Boot,
    /// What the user wants the kernel to be offered.
    pub guest_abi: GuestAbi,
    /// Which IOMMU the devices are behind.
    pub iommu: Iommu,
    /// How the processor is run.
    pub engine: Engine,
    /// The process's first step of confinement, for the machine to take the second before the guest runs; `None`
    /// when the user wants none.
    pub isolation: Option<Confined>,
    /// Say on standard error what the host allowed, and which ABI the kernel gets.
    pub verbose: bool,
    /// Where to say it.
    pub notes: Notes,
    /// `/proc/self/status`, which cannot be opened any more.
    pub status: Option<File>,
    /// Where to leave the text for `--stats`; `None` when nobody asked.
    pub stats: Option<Arc<Mutex<String>>>,
    /// Set when the guest has ended: what `launch` still does then is writing out what the guest left.
    pub off: Arc<AtomicBool>,
    /// An eventfd that becomes readable when the run is to end now: the machine stops its processors wherever
    /// they are and returns [`Outcome::Interrupted`].
    pub stop: OwnedFd,
}

/// A disk, open: its path may be out of reach once the process is confined.
#[derive(Debug)]
pub struct OpenDisk {
    /// Where it is, for messages.
    pub path: PathBuf,
    /// The guest cannot write it, and the file is open for reading only.
    pub readonly: bool,
    /// The image or block device.
    pub file: File,
}

/// The serial port's ends.
#[derive(Debug)]
pub struct Serial {
    /// What the guest receives; `None`: nothing, ever.
    pub input: Option<OwnedFd>,
    /// Where the guest's bytes go. The reader keeps up; a failed write is to be ignored.
    pub output: OwnedFd,
}

/// The host ends of the virtio console's ports, in the order of their numbers: port 0 is the terminal
/// (`/dev/hvc0`, a console port), 1 to 3 the streams, 4 the control port, named as in
/// [`guest_init::spec::ports`].
///
/// What the guest relies on:
/// - every port below is announced with its name and then opened (`VIRTIO_CONSOLE_PORT_OPEN` 1), in the order
///   of the numbers; the control port comes last;
/// - at end of file on an input, the port is closed (`PORT_OPEN` 0) after the guest opened it and all data has
///   been put into its receive queue;
/// - when an output cannot be written any more (`EPIPE`), the port is closed at once and later data dropped;
/// - what is in the transmit queues when the guest powers off is still written out before `launch` returns.
#[derive(Debug)]
pub struct Ports {
    /// The terminal: a pipe with what is typed, and the terminal itself to write to; `None` when the command has none (the port exists all the same).
    pub terminal: Option<Duplex>,
    /// Bytes for the command's standard input; `None`: the guest does not use the port.
    pub stdin: Option<OwnedFd>,
    /// Takes the command's standard output; `None` as above.
    pub stdout: Option<OwnedFd>,
    /// Takes the command's standard error; `None` as above.
    pub stderr: Option<OwnedFd>,
    /// A stream socket that carries the control lines both ways.
    pub control: OwnedFd,
}

/// Two ends of one terminal.
#[derive(Debug)]
pub struct Duplex {
    /// Read for the guest.
    pub input: OwnedFd,
    /// Written by the guest.
    pub output: OwnedFd,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's kernel panicked.
    Panic {
        /// The last lines of its console; may be left empty by the machine, `run` fills them in.
        console: Vec<String>,
    },
    /// A processor shut down after a triple fault; and where.
    TripleFault(Option<Shutdown>),
    /// The run's time was over. Made by `run` from [`Outcome::Interrupted`].
    TimedOut,
    /// [`VmSpec::stop`] was raised.
    Interrupted,
}
