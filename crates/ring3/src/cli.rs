//! The command line, as `clap` types: the help text, the man page and the completions come from here.

mod network;
mod vfio;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::time::Duration;

use ::vfio::devices::specification::{Kind, Specification, SpecificationError};
use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::net::options::ports::PortSpec;
use crate::net::options::{PasstArgs, PastaArgs};

pub use network::{Link, Publish};
pub use vfio::{NamedDevice, NvmeArgs, ServeArgs, ServedDevice, VfioTask};

const EXIT_STATUS: &str = "\
Exit status:
  The command's own; 128+N when signal N ended it; 124 when --timeout ended the
  run; 125 when ring3 itself failed; 126 when the command could not be executed;
  127 when it was not found.";

const RUN_EXAMPLES: &str = "\
Examples:
  ring3 run -- uname -a              one command in a fresh virtual machine
  ring3 run                          a shell in it
  seq 1000000 | ring3 run -- wc -l   standard streams are separate, binary-safe
  ring3 run --root ~/bookworm --cpus 2 --memory 2G -- make check
  ring3 run --disk disk.img -- mkfs.ext4 /dev/vda
  ring3 run --device vfio-user=/tmp/nvme.sock -- lsblk
  ring3 run --device vfio-pci=0000:04:00.0 -- lspci -k
  ring3 run -p 127.0.0.1:8080:80 -- python3 -m http.server 80
  ring3 run --kernel ./bzImage --append loglevel=7 -v -- true
  ring3 run --guest-abi pvm --kernel ./vmlinux.pvm --stats -- true
  ring3 run --kernel ./unikernel.elf --boot pvh --initramfs none

Kernel, without --kernel: the newest in ring3's cache; else the newest readable
/boot/vmlinuz-* whose modules are in /lib/modules; else, on Debian and its
relatives, the distribution's kernel for virtual machines is fetched into the
cache (`ring3 kernel fetch`).

Root: the host's / (or --root DIR), read-only under an overlay in the guest's
memory. The command runs as the guest's root user, can write everywhere, and
nothing of it reaches the host.

Network: the guest has the host's addresses, resolvers and ways out, by ordinary
sockets of ring3's; no privilege is needed. The gateway's address stands for the
host itself, that is for what listens on 127.0.0.1 or ::1. Nothing reaches the
guest but through -p, and what is added by --net-control.

Streams: the command gets a terminal when ring3's standard input is one. A first
Ctrl-C or SIGTERM to ring3 goes to the command, a second one ends the machine.
On a terminal, Ctrl-] pressed three times within a second ends the machine.

Exit status:
  The command's own; 128+N when signal N ended it; 124 when --timeout ended the
  run; 125 when ring3 itself failed; 126 when the command could not be executed;
  127 when it was not found.";

const PVM_EXAMPLES: &str = "\
Examples:
  ring3 pvm selftest                    every combination of entry and processors
  ring3 pvm selftest --cpus 2 --boot pvh -v
  ring3 pvm selftest --only hypercall   one group of checks
  ring3 pvm guest --output pvm-guest.elf
                                        the same guest, for a host with KVM's PVM

On such a host the guest needs a virtual machine monitor that passes KVM's own
CPUID leaves on to it; QEMU replaces them. A kernel of your own with PVM guest support is booted by `ring3 run --kernel FILE`.";

const NET_EXAMPLES: &str = "\
Examples:
  ring3 pasta --config-net -c /tmp/net -- sleep 1d &
  export RING3_NET_SOCKET=/tmp/net
  ring3 net add 8080:80                 port 8080 of the host leads to port 80
  ring3 net add --udp 127.0.0.1/5353
  ring3 net list
  ring3 net remove 8080                 wherever it leads to
  ring3 run --net-control /tmp/vm &
  ring3 net add -c /tmp/vm 2222:22";

const SHIM_EXAMPLES: &str = "\
Examples:
  ring3 shim -- ./uses-iommufd            with a /dev/iommu
  ring3 shim --mock-iommu -- ./iommufd    the kernel's own tests of iommufd
  ring3 shim --device nvme,file=disk.img,addr=0000:00:05.0 -- ./uses-vfio 0000:00:05.0

The program and its children are loaded with a library that answers what they ask
of these devices in the process itself. It stands in front of libc's functions, so
programs without a loader (statically linked ones), setuid programs, and system
calls that a program makes without libc are out of its reach. A child uses what its
parent opened for as long as the parent lives; exec closes it.

Exit status:
  The program's own; 125 when ring3 itself failed; 126 when the program could not
  be executed with the library; 127 when it was not found.";

const SELFTEST_STATUS: &str = "\
Exit status:
  0 when every check of every boot passed, 1 when one did not, 125 when ring3
  itself failed.";

/// Linux's virtualization stack in user space: virtual machines without virtualization hardware, kernel modules
/// or root.
#[derive(Debug, Parser)]
#[command(name = "ring3", version, after_long_help = EXIT_STATUS, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Task,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Task {
    /// Boot a virtual machine and run a command in it
    ///
    /// Boots a stock Linux kernel in a virtual machine whose processor is software, with the host's files under
    /// an overlay as its root, runs the command there (without one: a shell), and exits with its status.
    #[command(after_long_help = RUN_EXAMPLES)]
    Run(Box<RunArgs>),
    /// List, fetch, add or remove the kernels that `ring3 run` boots
    Kernel {
        /// What to do with them.
        #[command(subcommand)]
        task: KernelTask,
    },
    /// The PVM guest ABI: test it, and get the guest that tests it
    ///
    /// PVM is an ABI for guest kernels that run without the processor's privileges and know it. ring3 offers it to
    /// kernels that have support for it (`ring3 run --guest-abi`).
    #[command(after_long_help = PVM_EXAMPLES)]
    Pvm {
        /// What to do.
        #[command(subcommand)]
        task: PvmTask,
    },
    /// Give a network namespace the host's network
    ///
    /// Runs a command (without one: a shell) in new user and network namespaces, or attaches to existing ones. Inside
    /// is a tap device; outside, each flow is one ordinary socket. There is no address translation: the namespace
    /// has the host's addresses.
    #[command(infer_long_args = true)]
    Pasta(Box<PastaArgs>),
    /// Give a virtual machine the host's network, by a UNIX socket
    ///
    /// Listens on a UNIX socket for QEMU (`-netdev stream`) or, with --vhost-user, for any vhost-user front end. Each of
    /// the guest's flows is one ordinary socket of the host's. There is no address translation: the guest has
    /// the host's addresses.
    #[command(infer_long_args = true)]
    Passt(Box<PasstArgs>),
    /// List, add or remove the forwarded ports of a running network
    ///
    /// The network is that of `ring3 pasta -c PATH`, `ring3 passt -c PATH` or `ring3 run --net-control PATH`.
    #[command(after_long_help = NET_EXAMPLES)]
    Net {
        /// What to do.
        #[command(subcommand)]
        task: NetTask,
    },
    /// Devices for other virtual machine monitors, by vfio-user
    Vfio {
        /// What to do.
        #[command(subcommand)]
        task: VfioTask,
    },
    /// Run a program of the host with /dev/iommu and VFIO devices that ring3 serves
    ///
    /// The program is not changed and needs no privileges, and the machine no IOMMU. Everything but these devices is
    /// the machine's own.
    #[command(after_long_help = SHIM_EXAMPLES)]
    Shim(ShimArgs),
    /// Print a completion script for a shell
    ///
    /// For example: ring3 completions bash > ~/.local/share/bash-completion/completions/ring3
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
    /// Print the manual page (roff), for one subcommand if named
    ///
    /// For example: ring3 man run | man -l -, or ring3 man pvm selftest | man -l -
    Man {
        /// A subcommand, and one of its own.
        subcommand: Vec<String>,
    },
}

/// The options of `ring3 shim`.
#[derive(Debug, Args)]
pub struct ShimArgs {
    /// Let /dev/iommu have the IOMMU of the kernel's selftests, with their ioctls and failure injection
    #[arg(long)]
    pub mock_iommu: bool,
    /// Device to serve in /dev/vfio: `nvme,file=PATH[,ro][,addr=BDF]`, `ioat[,addr=BDF]` or `test[,addr=BDF]`
    ///
    /// `nvme` is an NVMe controller with a file as its disk, `ioat` a DMA engine, `test` a device with every kind of BAR
    /// and interrupt; BDF is the PCI address that the program finds it at, like 0000:00:05.0. Can be repeated.
    #[arg(long = "device", value_name = "SPEC", value_parser = parse_shim_device)]
    pub devices: Vec<String>,
    /// The program and its arguments
    #[arg(last = true, required = true, value_name = "PROGRAM")]
    pub command: Vec<OsString>,
}

/// The options of `ring3 run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// The command and its arguments [default: a shell]
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<OsString>,
    /// Kernel to boot: an ELF vmlinux or a bzImage
    ///
    /// Its modules are looked for beside it (modules/, lib/modules/VERSION, ../lib/modules/VERSION), in
    /// /lib/modules/VERSION and in ring3's cache.
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initramfs to boot instead of ring3's own, or `none`
    ///
    /// The guest is then all its own: no command is run by ring3, and the guest's serial console is on standard
    /// input and output. Exits with 0 when the guest powers off or resets. `none` is for kernels that need no
    /// initramfs, be they Linux or not (a file of that name is ./none).
    #[arg(long, value_name = "FILE|none", value_parser = OsStringValueParser::new().map(parse_initramfs),
          conflicts_with_all = ["command", "env", "workdir"])]
    pub initramfs: Option<Initramfs>,
    /// Text to add to the kernel's command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Directory to be the guest's root, read-only under an overlay
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub root: PathBuf,
    /// Raw disk image for the guest (/dev/vda, then vdb, ...); with :ro the guest cannot write it
    #[arg(long = "disk", value_name = "FILE[:ro]", value_parser = OsStringValueParser::new().map(parse_disk))]
    pub disks: Vec<Disk>,
    /// PCI device from elsewhere: a vfio-user server's (`ring3 vfio serve`), or one of the host's own
    ///
    /// A vfio-user server reaches the guest's memory only by asking ring3. A device of the host, by its PCI address, must be
    /// bound to vfio-pci and be behind the host's IOMMU; it reaches all of the guest's memory, which the host locks (`ulimit
    /// -l`), and is reset before and after. The host's VFIO has two doors to a device, its own node (cdev) and that of its
    /// group; the first that is there is taken. Can be repeated.
    #[arg(long = "device", value_name = "vfio-user=SOCKET|vfio-pci=ADDRESS[,door=cdev|group]",
          value_parser = vfio::parse_named)]
    pub devices: Vec<NamedDevice>,
    /// Kernel module for the guest to load at start, with all that it needs
    ///
    /// Drivers of ring3's own devices, and of NVMe, AHCI and xHCI devices given by --device, are loaded by themselves.
    /// Can be repeated.
    #[arg(long = "module", value_name = "NAME", value_parser = parse_module)]
    pub modules: Vec<String>,
    /// What the guest's network card is connected to: none (there is no card), user or tap=NAME [default: user]
    ///
    /// `user` is a network of ring3's own, by ordinary sockets of the host, with everything set up in the guest.
    /// `tap=NAME` is a tap device of the host that exists and that the user may use; the guest's addresses are then its
    /// own business.
    #[arg(long, value_name = "none|user|tap=NAME", value_parser = network::parse_link)]
    pub net: Option<Link>,
    /// Port of the host that leads into the guest; TCP, or UDP with /udp
    ///
    /// The host listens on all its addresses unless one is given; an IPv6 address stands in brackets. Port 0 of the
    /// host is any that is free, and ring3 says which. Can be repeated.
    #[arg(short, long = "publish", value_name = "[ADDR:]HOST:GUEST[/udp]", value_parser = network::parse_publish)]
    pub publish: Vec<Publish>,
    /// Socket by which `ring3 net` lists, adds and removes ports while the guest runs
    ///
    /// It is made at this path, for the user alone, and removed at the end. ring3 then keeps the right to listen to
    /// ports.
    #[arg(long, value_name = "PATH")]
    pub net_control: Option<PathBuf>,
    /// Environment variable for the command; K alone takes ring3's own value
    ///
    /// By default the command gets PATH, HOME, USER, LOGNAME, SHELL, and from ring3's environment TERM (with a
    /// terminal), TZ, LANG and LC_*.
    #[arg(long, value_name = "K[=V]", value_parser = OsStringValueParser::new().try_map(parse_env))]
    pub env: Vec<EnvVar>,
    /// Directory to start the command in [default: as on the host]
    #[arg(long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,
    /// End the run after this time, boot included: seconds, or a number with s, m, h or d
    ///
    /// The command gets SIGTERM, two seconds later the machine is stopped. The exit status is 124, as with
    /// timeout(1).
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub timeout: Option<Duration>,
    /// Number of processors of the guest
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cpus: u32,
    /// Memory of the guest, with a unit: 512M, 2G
    ///
    /// The host gives a page only when the guest touches it.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub memory: u64,
    /// How the kernel is entered
    #[arg(long, value_enum, default_value_t = Boot::Linux)]
    pub boot: Boot,
    /// Which ABI the kernel is offered: plain x86, or PVM's for kernels that know they are deprivileged
    ///
    /// The choice holds for the whole run and all processors, and is shown by --stats. ring3 says so when `auto`
    /// chooses pvm.
    #[arg(long, value_name = "ABI", value_enum, default_value_t = GuestAbi::Auto)]
    pub guest_abi: GuestAbi,
    /// Which IOMMU the guest's devices are behind
    ///
    /// The guest decides then what of its memory each device may reach, and --stats shows what that took. For `virtio` the
    /// kernel needs the driver virtio_iommu: Debian's have it from 6.12 on. For `intel` it needs CONFIG_INTEL_IOMMU, as all of Debian's
    /// have, and is told `intel_iommu=on iommu.passthrough=0`; what --append says comes later, such as iommu.strict=1. For a
    /// device of the host (--device vfio-pci=) it is carried over to the host's IOMMU.
    #[arg(long, value_name = "KIND", value_enum, default_value_t = Iommu::None)]
    pub iommu: Iommu,
    /// How the guest's processor is run
    #[arg(long, value_enum, default_value_t = Engine::Interpret)]
    pub engine: Engine,
    /// Whether ring3 gives up all rights that the run does not need before the guest starts
    ///
    /// Descriptors, privileges, files outside the root, system calls: see docs/isolation.md. With -v ring3 says
    /// which measures the host allows. `off` is for debuggers and other tools that look into ring3.
    #[arg(long, value_enum, default_value_t = Isolation::On)]
    pub isolation: Isolation,
    /// Show the guest's console on standard error
    #[arg(short, long)]
    pub verbose: bool,
    /// Print, at the end, what the machine did: instructions, exits, TLB misses, times
    #[arg(long)]
    pub stats: bool,
}

/// How the kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Boot {
    /// The 64-bit Linux boot protocol, which every x86-64 Linux kernel has
    Linux,
    /// PVH: in 32-bit protected mode, at the entry that the kernel's ELF note names
    Pvh,
}

/// Which ABI the kernel is offered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GuestAbi {
    /// PVM's when the kernel contains PVM's synthetic CPUID instruction, as every PVM guest does; else plain x86
    Auto,
    /// PVM's, and no kernel without support for it
    Pvm,
    /// Plain x86: PVM is never offered
    Off,
}

/// Which IOMMU the guest's devices are behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Iommu {
    /// None: they reach all of the guest's memory
    None,
    /// The virtio IOMMU, and all devices are behind it
    Virtio,
    /// Intel VT-d, and all devices are behind it
    Intel,
}

/// How the guest's processor is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// Decode and execute in software, one instruction after the other
    Interpret,
}

/// Whether ring3 confines itself while a guest runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Isolation {
    /// As far as the host allows
    On,
    /// Not at all
    Off,
}

impl Engine {
    /// The name that the user gives and reads.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Interpret => "interpret",
        }
    }
}

/// An initramfs in the place of ring3's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Initramfs {
    /// No initramfs at all.
    None,
    /// This file.
    File(PathBuf),
}

/// A disk of the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// A raw image, or a block device.
    pub path: PathBuf,
    /// The guest cannot write it.
    pub readonly: bool,
}

/// An environment variable: `None` takes ring3's own value.
pub type EnvVar = (OsString, Option<OsString>);

/// The subcommands of `ring3 kernel`.
#[derive(Debug, Subcommand)]
pub enum KernelTask {
    /// List the kernels in the cache and in /boot; * marks the one that `ring3 run` boots
    List,
    /// Fetch the distribution's kernel for virtual machines into the cache
    Fetch {
        /// Release, or the start of one: 6.12 fetches the newest 6.12 kernel [default: the distribution's own]
        version: Option<String>,
    },
    /// Copy a kernel and its modules into the cache
    Add {
        /// An ELF vmlinux or a bzImage.
        file: PathBuf,
        /// Its modules: what /lib/modules/VERSION holds [default: looked for as for `ring3 run --kernel`]
        #[arg(long, value_name = "DIR")]
        modules: Option<PathBuf>,
    },
    /// Remove kernels from the cache
    Remove {
        /// Releases, as `ring3 kernel list` shows them.
        #[arg(required = true, value_name = "VERSION")]
        versions: Vec<String>,
    },
}

/// The subcommands of `ring3 net`.
#[derive(Debug, Subcommand)]
pub enum NetTask {
    /// Print the ports that are forwarded, each as it could be added
    List {
        /// Which network.
        #[command(flatten)]
        network: NetworkArgs,
    },
    /// Forward more ports
    Add {
        /// Which ports of which network.
        #[command(flatten)]
        ports: NetPortsArgs,
    },
    /// End the forwarding of ports: connections that came by them go on, UDP flows end
    Remove {
        /// Which ports of which network.
        #[command(flatten)]
        ports: NetPortsArgs,
    },
}

/// A running network.
#[derive(Debug, Args)]
pub struct NetworkArgs {
    /// Control socket of the network [default: $RING3_NET_SOCKET]
    #[arg(short = 'c', long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
}

/// Ports of a running network.
#[derive(Debug, Args)]
pub struct NetPortsArgs {
    /// The network.
    #[command(flatten)]
    pub network: NetworkArgs,
    /// UDP ports, not TCP ports
    #[arg(short, long)]
    pub udp: bool,
    /// Ports of the host and where they lead, as for `pasta -t`: 8080:80, 127.0.0.1/2000-2010, all,~22
    #[arg(value_name = "SPEC", required = true)]
    pub specs: Vec<PortSpec>,
}

/// The subcommands of `ring3 pvm`.
#[derive(Debug, Subcommand)]
pub enum PvmTask {
    /// Boot a guest that checks the PVM guest ABI rule by rule
    ///
    /// The guest is a small kernel that ring3 brings along. It is booted once for each combination of boot protocol
    /// and number of processors, unless the options choose one.
    #[command(after_long_help = SELFTEST_STATUS)]
    Selftest(SelftestArgs),
    /// Write the selftest's guest to a file, to boot it elsewhere
    ///
    /// It is an ELF kernel with a PVH entry and a 64-bit Linux entry. It reports on the first serial port and powers
    /// off. It is written against the ABI, not against ring3: any hypervisor with PVM of generation 1 can run it.
    Guest {
        /// The file to write; - is standard output.
        #[arg(short, long, value_name = "FILE")]
        output: PathBuf,
    },
}

/// The options of `ring3 pvm selftest`.
#[derive(Debug, Args)]
pub struct SelftestArgs {
    /// Number of processors of the guest [default: one boot with 1, one with 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub cpus: Option<u32>,
    /// Memory of the guest, with a unit
    #[arg(long, value_name = "SIZE", default_value = "128M", value_parser = parse_size)]
    pub memory: u64,
    /// How the guest is entered [default: one boot each way]
    #[arg(long, value_enum)]
    pub boot: Option<Boot>,
    /// End each boot after this time, as failed: seconds, or a number with s, m, h or d
    #[arg(long, value_name = "DURATION", default_value = "2m", value_parser = parse_duration)]
    pub timeout: Duration,
    /// Make only the checks whose names begin so: a group, or group/name
    #[arg(long, value_name = "PREFIX", value_parser = parse_prefix)]
    pub only: Option<String>,
    /// Print the names of the checks, which one boot of the guest tells, and no outcome
    #[arg(long, conflicts_with = "verbose")]
    pub list: bool,
    /// Show every line that the guest prints
    #[arg(short, long)]
    pub verbose: bool,
}

const MIB: u64 = 1 << 20;
const SMALLEST_MEMORY: u64 = 64 * MIB;
const LARGEST_MEMORY: u64 = 1 << 40;

fn parse_size(text: &str) -> Result<u64, String> {
    let bad = || format!("not a size: give a whole number and a unit, as in {}M or 2G", 512);
    let split = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
    let (number, unit) = text.split_at(split);
    let unit = match unit.to_ascii_uppercase().as_str() {
        "M" | "MB" | "MIB" => MIB,
        "G" | "GB" | "GIB" => MIB << 10,
        "T" | "TB" | "TIB" => MIB << 20,
        "K" | "KB" | "KIB" => 1 << 10,
        _ => return Err(bad()),
    };
    let size = number.parse::<u64>().map_err(|_| bad())?.checked_mul(unit);
    match size {
        Some(size) if (SMALLEST_MEMORY..=LARGEST_MEMORY).contains(&size) && size % MIB == 0 => Ok(size),
        _ => Err("a guest can have 64M to 1T, in whole MiB".into()),
    }
}

fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad =
        || "not a duration: give seconds, or a number with s, m, h or d, as in 90, 1.5s or 5m".to_owned();
    let (number, unit) = match text.char_indices().next_back() {
        Some((at, unit)) if unit.is_ascii_alphabetic() => (text.get(..at).unwrap_or_default(), unit),
        _ => (text, 's'),
    };
    let seconds = match unit {
        's' => 1.0,
        'm' => 60.0,
        'h' => 3600.0,
        'd' => 86400.0,
        _ => return Err(bad()),
    };
    if !number.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return Err(bad());
    }
    let number: f64 = number.parse().map_err(|_| bad())?;
    match Duration::try_from_secs_f64(number * seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        _ => Err(bad()),
    }
}

fn parse_disk(text: OsString) -> Disk {
    match text.as_bytes().strip_suffix(b":ro") {
        Some(path) => Disk { path: OsStr::from_bytes(path).into(), readonly: true },
        None => Disk { path: text.into(), readonly: false },
    }
}

fn parse_initramfs(text: OsString) -> Initramfs {
    if text == "none" { Initramfs::None } else { Initramfs::File(text.into()) }
}

/// The prefix becomes a word of the guest's command line.
fn parse_prefix(text: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_alphanumeric() || "/-_".contains(c);
    if !text.is_empty() && text.chars().all(good) {
        Ok(text.to_owned())
    } else {
        Err("not the beginning of a name: letters, digits, / - and _".into())
    }
}

/// Looks at what can be known without the library: it makes the device when the program looks for it first.
fn parse_shim_device(text: &str) -> Result<String, String> {
    let specification: Specification = text.parse().map_err(|error: SpecificationError| error.to_string())?;
    let Kind::Nvme { file, read_only } = &specification.kind else { return Ok(text.to_owned()) };
    let of_file = |error: std::io::Error| format!("{}: {error}", file.display());
    std::fs::File::options().read(true).write(!read_only).open(file).map_err(of_file)?;
    // The program may be elsewhere when it looks for the device.
    let there = std::path::absolute(file).map_err(of_file)?;
    let before = format!("file={}", file.display());
    let absolute = text.replacen(&before, &format!("file={}", there.display()), 1);
    let kind = Kind::Nvme { file: there, read_only: *read_only };
    let same = absolute.parse() == Ok(Specification { kind, address: specification.address });
    if same {
        Ok(absolute)
    } else {
        Err(format!("{}: its directory has a comma in its name", file.display()))
    }
}

fn parse_module(text: &str) -> Result<String, String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if text.is_empty() || !text.chars().all(is_name) {
        return Err(format!("`{text}` is no module's name, as `lsmod` shows it"));
    }
    Ok(text.replace('-', "_"))
}

fn parse_env(text: OsString) -> Result<EnvVar, String> {
    let mut parts = text.as_bytes().splitn(2, |&b| b == b'=');
    let name = parts.next().unwrap_or_default();
    if name.is_empty() {
        return Err("a variable needs a name: K=V, or K to take ring3's own value".into());
    }
    Ok((OsStr::from_bytes(name).into(), parts.next().map(|value| OsStr::from_bytes(value).into())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn devices_that_the_library_cannot_make_are_refused() {
        // Where it is does not depend on where the program goes.
        let here = parse_shim_device("nvme,file=Cargo.toml,ro,addr=00:05.0").unwrap();
        let there = std::env::current_dir().unwrap().join("Cargo.toml");
        assert_eq!(here, format!("nvme,file={},ro,addr=00:05.0", there.display()));
        for good in ["ioat", "test", "ioat,addr=0000:00:05.0", "nvme,file=/dev/null,ro"] {
            assert_eq!(parse_shim_device(good).as_deref(), Ok(good));
        }
        for (wrong, words) in [
            ("card", "`card`"),
            ("nvme", "needs a file"),
            ("nvme,file=/nonexistent/disk", "/nonexistent/disk"),
        ] {
            assert!(parse_shim_device(wrong).unwrap_err().contains(words), "{wrong}");
        }
    }

    fn run(args: &[&str]) -> Result<RunArgs, clap::Error> {
        match Cli::try_parse_from(["ring3", "run"].iter().chain(args))?.command {
            Task::Run(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn everything_at_once() {
        let args = run(&[
            "--kernel=k",
            "--append",
            "-x y",
            "--root",
            "/r",
            "--disk",
            "a",
            "--disk",
            "b:ro",
            "--net=user",
            "-p",
            "8080:80",
            "-p[::1]:53:53/udp",
            "--env",
            "A=b=c",
            "--env",
            "HOME",
            "--timeout",
            "5m",
            "--cpus",
            "2",
            "--memory",
            "2G",
            "-v",
            "--stats",
            "--",
            "ls",
            "-l",
        ])
        .unwrap();
        assert_eq!(args.command, ["ls", "-l"]);
        assert_eq!(args.append.as_deref(), Some("-x y"));
        assert_eq!(args.disks[1], Disk { path: "b".into(), readonly: true });
        assert_eq!(args.env, [("A".into(), Some("b=c".into())), ("HOME".into(), None)]);
        assert_eq!((args.timeout, args.cpus, args.memory), (Some(Duration::from_secs(300)), 2, 2 << 30));
        assert!(args.verbose && args.stats);
        assert_eq!(args.net, Some(Link::User));
        let ports: Vec<String> = args.publish.iter().map(Publish::to_string).collect();
        assert_eq!(ports, ["8080:80", "[::1]:53:53/udp"]);
        assert_eq!(args.isolation, Isolation::On);
        let args = run(&[]).unwrap();
        assert_eq!(
            (args.command.len(), args.cpus, args.memory, args.engine),
            (0, 1, 512 << 20, Engine::Interpret)
        );
    }

    #[test]
    fn bad_values_are_named_with_a_way_out() {
        for (args, words) in [
            (&["--memory", "512"][..], "512M or 2G"),
            (&["--memory", "1M"], "64M to 1T"),
            (&["--memory", "99999999999999999999G"], "a whole number"),
            (&["--memory", "-1G"], "-1"),
            (&["--timeout", "soon"], "'soon'"),
            (&["--timeout", "0"], "seconds"),
            (&["--timeout", "inf"], "seconds"),
            (&["--timeout", "1é"], "seconds"),
            (&["--cpus", "0"], "1..=64"),
            (&["--cpus", "65"], "1..=64"),
            (&["--net", "bridge"], "none, user, or tap=NAME"),
            (&["-p", "80"], "8080:80"),
            (&["--env", "=x"], "needs a name"),
            (&["--engine", "magic"], "interpret"),
            (&["--isolation", "some"], "on, off"),
            (&["--guest-abi", "xen"], "auto, pvm, off"),
            (&["--initramfs", "x", "--", "ls"], "cannot be used with"),
            (&["ls"], "'ls'"),
        ] {
            let error = run(args).unwrap_err().to_string();
            assert!(error.contains(words), "{args:?}: {error}");
        }
    }

    #[test]
    fn an_initramfs_is_a_file_or_none() {
        assert_eq!(run(&[]).unwrap().initramfs, None);
        assert_eq!(run(&["--initramfs", "none"]).unwrap().initramfs, Some(Initramfs::None));
        let file = run(&["--initramfs=./none"]).unwrap().initramfs;
        assert_eq!(file, Some(Initramfs::File("./none".into())));
    }

    #[test]
    fn the_guest_abi_is_the_kernels_choice_unless_told() {
        assert_eq!(run(&[]).unwrap().guest_abi, GuestAbi::Auto);
        assert_eq!(run(&["--guest-abi", "pvm"]).unwrap().guest_abi, GuestAbi::Pvm);
        assert_eq!(run(&["--guest-abi=off"]).unwrap().guest_abi, GuestAbi::Off);
    }

    #[test]
    fn the_selftest_covers_everything_unless_told() {
        let parse = |words: &[&str]| match Cli::try_parse_from(["ring3", "pvm"].iter().chain(words)) {
            Ok(Cli { command: Task::Pvm { task: PvmTask::Selftest(args) } }) => args,
            other => panic!("{other:?}"),
        };
        let args = parse(&["selftest"]);
        assert_eq!((args.cpus, args.boot, args.memory, args.list), (None, None, 128 << 20, false));
        let args = parse(&["selftest", "--cpus=4", "--boot", "pvh", "--timeout", "9", "-v"]);
        assert_eq!((args.cpus, args.boot, args.timeout), (Some(4), Some(Boot::Pvh), Duration::from_secs(9)));
        assert!(args.verbose);
        for words in [
            &["selftest", "--cpus", "0"][..],
            &["selftest", "--list", "-v"],
            &["selftest", "--only", "a b"],
            &["guest"],
            &[],
        ] {
            assert!(Cli::try_parse_from(["ring3", "pvm"].iter().chain(words)).is_err(), "{words:?}");
        }
    }

    #[test]
    fn sizes_and_durations() {
        assert_eq!(parse_size("65536K"), Ok(64 << 20));
        assert_eq!(parse_size("1GiB"), Ok(1 << 30));
        assert_eq!(parse_duration("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_duration("2h"), Ok(Duration::from_secs(7200)));
    }
}
