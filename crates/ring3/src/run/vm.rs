//! The seam to the machine: one run's [`VmSpec`] in, its [`Outcome`] out.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Instant;

use machine::loader::{BootProtocol, ImageError, KernelImage};
use machine::power::PowerEvent;
use machine::{Ended, GuestAbi, IommuKind, Machine, MachineConfig, MachineError, MachineHandle};
use rustix::event::{PollFd, PollFlags, poll};
use virtio::block::{Block, BlockError};
use virtio::console::{Console, ConsoleError, ConsoleHandle, PortConfig, PortEnd};
use virtio::fs::{DEFAULT_TIMEOUT, Fs, FsConfig, FsError};
use virtio::rng::Rng;

use super::devices::{self, DeviceError};
use super::isolation::{Confined, Measures};
use super::network::{Network, Served};
use super::spec::{OpenDisk, Outcome, Ports, VmSpec};
use super::stats;
use crate::cli::{self, Boot};

/// Why a machine could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// The kernel file is not one.
    #[error("cannot boot {}", path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: ImageError,
    },
    /// A kernel that would not boot by the ABI that the user wants.
    #[error(
        "{} is no PVM guest: it lacks the synthetic CPUID instruction, by which a kernel finds PVM; \
         --guest-abi off boots it as the ordinary kernel that it is", path.display()
    )]
    NoPvmGuest {
        /// The file.
        path: PathBuf,
    },
    /// A disk cannot be used.
    #[error("cannot use {} as a disk", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: BlockError,
    },
    /// The root cannot be shared.
    #[error("cannot share {} with the guest", path.display())]
    Root {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: FsError,
    },
    /// The console's ports cannot be made.
    #[error("cannot connect the guest's console")]
    Console(#[from] ConsoleError),
    /// The machine.
    #[error("cannot run the machine")]
    Machine(#[from] MachineError),
    /// A device from elsewhere.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A thread cannot be started.
    #[error("cannot start a thread")]
    Thread(#[source] std::io::Error),
}

/// Builds the machine, runs it to its end and says how it ended. Called on a thread of its own.
///
/// # Errors
/// A [`VmError`] when the machine cannot be built, or fails by itself rather than by what the guest does.
pub fn launch(spec: VmSpec) -> Result<Outcome, VmError> {
    let begin = Instant::now();
    let image = KernelImage::from_bytes(spec.kernel)
        .map_err(|source| VmError::Kernel { path: spec.kernel_path.clone(), source })?;
    let guest_abi = guest_abi(spec.guest_abi, &image)
        .ok_or_else(|| VmError::NoPvmGuest { path: spec.kernel_path.clone() })?;
    if spec.guest_abi == cli::GuestAbi::Auto && guest_abi == GuestAbi::Pvm {
        let why = "the kernel contains its synthetic CPUID; --guest-abi off offers plain x86";
        spec.notes.say(format_args!("guest ABI: {guest_abi}: {why}"));
    } else if spec.verbose {
        spec.notes.say(format_args!("guest ABI: {guest_abi}"));
    }
    let mut machine = Machine::new(MachineConfig {
        memory: spec.memory,
        cpus: spec.cpus,
        serial: Box::new(File::from(spec.serial.output)),
        guest_abi,
        iommu: match spec.iommu {
            cli::Iommu::None => None,
            cli::Iommu::Virtio => Some(IommuKind::Virtio),
            cli::Iommu::Intel => Some(IommuKind::Intel),
        },
    })?;
    let mut console = None;
    if let Some(ports) = spec.ports {
        let (device, handle) = Console::new(port_configs(ports))?;
        machine.add_virtio(Box::new(device))?;
        console = Some(handle);
    }
    if let Some(root) = spec.shared_root {
        let tag = guest_init::spec::ROOT_TAG.to_owned();
        let fs = Fs::new(&FsConfig { tag, root: root.clone(), timeout: DEFAULT_TIMEOUT })
            .map_err(|source| VmError::Root { path: root, source })?;
        machine.add_virtio(Box::new(fs))?;
    }
    for disk in spec.disks {
        machine.add_virtio(Box::new(block(disk)?))?;
    }
    machine.add_virtio(Box::new(Rng::new()))?;
    let network = match spec.network.map(Network::into_parts) {
        Some((device, host)) => {
            machine.add_virtio(Box::new(device))?;
            Some(host)
        }
        None => None,
    };
    devices::assign(spec.devices, &mut machine)?;
    machine.load(&image, spec.boot.into(), spec.initramfs.as_deref(), &spec.command_line)?;
    drop(image);
    drop(spec.initramfs);

    if let Some(input) = spec.serial.input {
        let serial = std::sync::Arc::clone(machine.serial());
        spawn("serial input", move || {
            let mut input = File::from(input);
            let mut buffer = [0; 256];
            while let Ok(n @ 1..) = input.read(&mut buffer) {
                serial.input(buffer.get(..n).unwrap_or_default());
            }
        })?;
    }
    stop_when_readable(spec.stop, machine.handle(), console)?;
    let (handle, off) = (machine.handle(), spec.off);
    spawn("power", move || {
        handle.wait();
        off.store(true, Ordering::SeqCst);
    })?;

    let isolation = spec.isolation.map_or_else(Measures::off, Confined::seal);
    if spec.verbose {
        spec.notes.say(format_args!("isolation: {isolation}"));
    }

    let served = network.map(|host| host.start(&spec.notes)).transpose().map_err(VmError::Thread)?;
    let memory = std::sync::Arc::clone(machine.memory());
    let built = begin.elapsed();
    // When it returns, the guest's last frames have been taken.
    let (ended, counted) = machine.run()?;
    let network = served.and_then(Served::stop);
    if let Some(text) = &spec.stats {
        let report = stats::report(&stats::Run {
            engine: spec.engine.name(),
            isolation: &isolation,
            built,
            total: begin.elapsed(),
            memory: spec.memory,
            touched: stats::touched(&memory),
            peak: spec.status.and_then(stats::peak),
            counted: &counted,
            network,
        });
        *text.lock().unwrap_or_else(PoisonError::into_inner) = report;
    }
    Ok(match ended {
        Ended::Stopped => Outcome::Interrupted,
        Ended::Guest(PowerEvent::PowerOff) => Outcome::PowerOff,
        Ended::Guest(PowerEvent::Reset(_)) => Outcome::Reset,
        Ended::Guest(PowerEvent::Panic) => Outcome::Panic { console: Vec::new() },
        Ended::Guest(PowerEvent::TripleFault) => Outcome::TripleFault(counted.shutdowns.first().copied()),
    })
}

impl From<Boot> for BootProtocol {
    fn from(boot: Boot) -> Self {
        match boot {
            Boot::Linux => Self::Linux64,
            Boot::Pvh => Self::Pvh,
        }
    }
}

/// What the kernel is offered; `None` when it is to be offered what it would not understand.
fn guest_abi(asked: cli::GuestAbi, image: &KernelImage) -> Option<GuestAbi> {
    match asked {
        cli::GuestAbi::Off => Some(GuestAbi::X86),
        cli::GuestAbi::Auto if !image.is_pvm_guest() => Some(GuestAbi::X86),
        cli::GuestAbi::Auto => Some(GuestAbi::Pvm),
        cli::GuestAbi::Pvm => image.is_pvm_guest().then_some(GuestAbi::Pvm),
    }
}

/// The console's ports in the order of their numbers.
fn port_configs(ports: Ports) -> Vec<PortConfig> {
    let (input, output) = match ports.terminal {
        Some(terminal) => (Some(terminal.input), Some(terminal.output)),
        None => (None, None),
    };
    let control = ports.control.try_clone().ok();
    let named = |name: &str, input, output| PortConfig {
        name: Some(name.to_owned()),
        end: PortEnd::Fd { input, output },
    };
    use guest_init::spec::ports::{CONTROL, STDERR, STDIN, STDOUT};
    vec![
        PortConfig { name: None, end: PortEnd::Fd { input, output } },
        named(STDIN, ports.stdin, None),
        named(STDOUT, None, ports.stdout),
        named(STDERR, None, ports.stderr),
        named(CONTROL, Some(ports.control), control),
    ]
}

fn block(disk: OpenDisk) -> Result<Block, VmError> {
    let id = disk.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Block::new(disk.file, disk.readonly, &id).map_err(|source| VmError::Disk { path: disk.path, source })
}

fn stop_when_readable(
    stop: OwnedFd,
    handle: MachineHandle,
    console: Option<ConsoleHandle>,
) -> Result<(), VmError> {
    spawn("stop", move || {
        let mut fds = [PollFd::new(&stop, PollFlags::IN)];
        while matches!(poll(&mut fds, None), Err(rustix::io::Errno::INTR)) {}
        handle.stop();
        if let Some(console) = console {
            console.abandon();
        }
    })
}

/// Starts a thread that nothing waits for: it ends with the process.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), VmError> {
    thread::Builder::new().name(name.into()).spawn(body).map(drop).map_err(VmError::Thread)
}
