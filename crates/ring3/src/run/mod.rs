//! One `ring3 run`, from the options to the exit status.
//!
//! `run` chooses the kernel, makes the initramfs ([`plan`]), opens the host ends of the machine's ports, and
//! starts the machine ([`vm::launch`]) on a thread of its own. Three more threads turn what happens into
//! events: the guest's control lines, signals, and the machine's end. The session is the one place that
//! acts on them: it forwards signals and sizes, watches the clock, and knows when the run is over.
//!
//! The guest's network ([`network`]) is made before all that, and served by a thread of its own.
//!
//! Before any of these threads starts, the process gives up what the run does not need ([`isolation`]).
//!
//! Nothing is left behind when ring3 is killed: the initramfs and the console are in memory, and no file is
//! made. The terminal is restored on every way out but SIGKILL.

pub mod console;
pub mod devices;
pub mod isolation;
pub mod network;
pub mod plan;
mod session;
pub mod spec;
pub mod spinner;
mod stats;
pub mod terminal;
pub mod vm;

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};

use guest_init::spec::{SpecError, Stream};
use rustix::event::{EventfdFlags, eventfd};

use crate::cli::{self, Isolation, RunArgs};
use crate::initramfs::{self, ModuleError};
use crate::kernel::image::ImageError;
use crate::kernel::{self, KernelError};
use console::Console;
use devices::{Connected, DeviceError};
use isolation::{HostDevices, Inherited, Use, Uses};
use network::{Network, NetworkError};
use session::Session;
use spec::{Duplex, Outcome, Ports, Serial, VmSpec};
use spinner::Spinner;
use vm::VmError;

/// Why a run failed, as opposed to its command.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// No kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The kernel file cannot be read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The kernel lacks a driver.
    #[error(transparent)]
    Modules(#[from] ModuleError),
    /// A kernel without modules lacks a driver.
    #[error(
        "{} has no {driver} built in and no modules were found for it: keep both by `ring3 kernel add FILE \
         --modules DIR`, or choose another kernel", kernel.display()
    )]
    NoModules {
        /// The kernel.
        kernel: PathBuf,
        /// The driver.
        driver: String,
    },
    /// The kernel was configured without what an option needs.
    #[error("{} has no {option}, which {wanted_by} needs: choose another kernel", kernel.display())]
    NotConfigured {
        /// The kernel.
        kernel: PathBuf,
        /// The option of the kernel's configuration.
        option: &'static str,
        /// The option of ours.
        wanted_by: &'static str,
    },
    /// The user's initramfs cannot be read.
    #[error("cannot read initramfs {}", path.display())]
    Initramfs {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A string for the guest holds a NUL byte.
    #[error("the command, its environment or its directory cannot be passed on")]
    Spec(#[from] SpecError),
    /// The root directory cannot be used.
    #[error("cannot use {} as the guest's root (--root)", path.display())]
    BadRoot {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The working directory is not there.
    #[error("--workdir {}: there is no such directory below the guest's root {}", path.display(), root.display())]
    BadWorkdir {
        /// The directory.
        path: PathBuf,
        /// The root.
        root: PathBuf,
    },
    /// The guest's network cannot be made.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// A device cannot be used.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A disk cannot be used.
    #[error("cannot use {} as a disk (--disk)", path.display())]
    BadDisk {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The standard streams cannot be set up.
    #[error("cannot set up the standard streams")]
    Streams(#[source] io::Error),
    /// A pipe, socket, thread or signal handler cannot be made.
    #[error("cannot set up the run")]
    SetUp(#[source] io::Error),
    /// The machine failed.
    #[error("the machine failed")]
    Vm(#[from] VmError),
    /// The guest's first process gave up.
    #[error("the guest could not be set up: {reason}{}", excerpt(console))]
    Guest {
        /// Its words.
        reason: String,
        /// The last lines of the console.
        console: Vec<String>,
    },
    /// The machine of a guest that runs alone did not end as it should.
    #[error("{0}")]
    Ended(String),
    /// The machine ended before the command did.
    #[error("{what}{}", excerpt(console))]
    Died {
        /// How.
        what: String,
        /// The last lines of the console.
        console: Vec<String>,
    },
}

/// The console's last lines for the end of a message.
fn excerpt(console: &[String]) -> String {
    if console.is_empty() {
        return " (the guest's console was silent; -v shows more)".into();
    }
    format!("; the last lines of its console (-v shows all):\n  | {}", console.join("\n  | "))
}

/// Runs what the options say; `launch` is the machine. Returns the exit status.
///
/// With `--isolation on` this confines the calling thread and then the process for good, and closes descriptors
/// that the process was started with.
///
/// # Errors
/// A [`RunError`] for everything that is not the command's own doing.
pub fn run<F>(args: &RunArgs, launch: F) -> Result<u8, RunError>
where
    F: FnOnce(VmSpec) -> Result<Outcome, VmError> + Send + 'static,
{
    // First of all, while every descriptor is one that the parent left.
    let inherited = (args.isolation == Isolation::On).then(Inherited::find);
    let kernel = kernel::choose(args.kernel.as_deref())?;
    let kernel_bytes = kernel::image::read(&kernel.image)?;
    let disks = plan::open_disks(&args.disks)?;
    let devices = devices::connect(&args.devices, args.iommu)?;
    let root = plan::checked_root(&args.root)?;
    let network = network::open(args)?;
    let is_terminal = [io::stdin().is_terminal(), io::stdout().is_terminal(), io::stderr().is_terminal()];
    let streams = plan::streams(is_terminal)?;
    let own_initramfs = args.initramfs.is_none();
    let command_line = plan::command_line(args.verbose || !own_initramfs, args.iommu, args.append.as_deref());
    let initramfs = match &args.initramfs {
        Some(cli::Initramfs::None) => None,
        Some(cli::Initramfs::File(path)) => {
            Some(std::fs::read(path).map_err(|source| RunError::Initramfs { path: path.clone(), source })?)
        }
        None => {
            let network = network.as_ref().map(|network| network.guest().clone());
            let spec = guest_init::spec::Spec { network, ..plan::guest_spec(args, &kernel, streams)? };
            plan::check_iommu(&kernel, args.iommu)?;
            let modules =
                plan::modules(&kernel, &kernel_bytes, &plan::drivers(args, &devices), &command_line)?;
            Some(initramfs::build(&spec, &modules)?.finish())
        }
    };
    if args.verbose || args.stats {
        eprintln!("ring3: engine: {}, kernel: {}", args.engine.name(), kernel.image.display());
    }

    let shared_root = own_initramfs.then_some(root);
    let status = std::fs::File::open("/proc/self/status").ok();
    let uses = Uses {
        network: network.as_ref().map_or(Use::Nothing, Network::needs),
        messages: !devices.iter().all(Connected::is_of_host),
        host_devices: match devices.iter().any(Connected::is_of_host) {
            false => HostDevices::None,
            true if args.iommu == cli::Iommu::None => HostDevices::Mapped,
            true => HostDevices::Mapping,
        },
    };
    let confined = inherited.map(|inherited| isolation::confine(inherited, shared_root.as_deref(), uses));

    // What the machine is connected to.
    let (console, console_end) = Console::start(args.verbose).map_err(RunError::SetUp)?;
    let (control, control_end) = UnixStream::pair().map_err(RunError::SetUp)?;
    let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|e| RunError::SetUp(e.into()))?;
    let (typed_end, typed) = match is_terminal {
        [true, ..] => io::pipe().map(|(r, w)| (Some(r.into()), Some(w.into()))).map_err(RunError::SetUp)?,
        [false, ..] => (None, None),
    };
    let (serial, ports) = if own_initramfs {
        let ports = open_ports(streams, typed_end, control_end.into())?;
        (Serial { input: None, output: console_end }, Some(ports))
    } else {
        // The serial port is the user's: nobody writes to the other ends, and who reads them must see that.
        drop((console_end, control_end));
        let input = typed_end.map_or_else(|| duplicate(io::stdin().as_fd()), Ok)?;
        (Serial { input: Some(input), output: duplicate(io::stdout().as_fd())? }, None)
    };
    let stats = args.stats.then(|| Arc::new(Mutex::new(String::new())));
    let off = Arc::new(AtomicBool::new(false));
    let spinner = Spinner::start(!args.verbose && own_initramfs, &format!("booting {}", kernel.release));
    let vm = VmSpec {
        kernel_path: kernel.image.clone(),
        kernel: kernel_bytes,
        initramfs,
        command_line,
        memory: args.memory,
        cpus: args.cpus,
        shared_root,
        disks,
        devices,
        network,
        serial,
        ports,
        boot: args.boot,
        guest_abi: args.guest_abi,
        iommu: args.iommu,
        engine: args.engine,
        isolation: confined,
        verbose: args.verbose,
        notes: spinner.notes(),
        status,
        stats: stats.clone(),
        off: Arc::clone(&off),
        stop: stop.try_clone().map_err(RunError::SetUp)?,
    };

    let mut session = Session::new(control, stop, off, spinner, args.timeout, typed)?;
    if !own_initramfs {
        session.hand_over_terminal().map_err(RunError::Streams)?;
    }
    session.start(launch, vm).map_err(RunError::SetUp)?;
    // This also gives the terminal back.
    let end = session.watch();
    if let Some(stats) = stats {
        eprint!("{}", stats.lock().unwrap_or_else(PoisonError::into_inner));
    }
    end.status(own_initramfs, console)
}

/// The host ends of the virtio console: our own standard streams, or the terminal, of which `typed` is the input.
fn open_ports(streams: [Stream; 3], typed: Option<OwnedFd>, control: OwnedFd) -> Result<Ports, RunError> {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let port = |index: usize, fd: BorrowedFd<'_>| {
        (streams.get(index) == Some(&Stream::Port)).then(|| duplicate(fd)).transpose()
    };
    // A terminal can be written through any descriptor of it, standard input included.
    let terminal = match typed {
        Some(input) => Some(Duplex { input, output: duplicate(stdin.as_fd())? }),
        None => None,
    };
    Ok(Ports {
        terminal,
        stdin: port(0, stdin.as_fd())?,
        stdout: port(1, stdout.as_fd())?,
        stderr: port(2, stderr.as_fd())?,
        control,
    })
}

fn duplicate(fd: BorrowedFd<'_>) -> Result<OwnedFd, RunError> {
    fd.try_clone_to_owned().map_err(RunError::Streams)
}
