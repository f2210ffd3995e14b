//! The options of `ring3 vfio`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use vfio::kernel::{HostDeviceName, NoHostDeviceName};

use super::Isolation;

const EXAMPLES: &str = "\
Examples:
  truncate -s 8G disk.img
  ring3 vfio serve nvme --file disk.img --socket nvme.sock
  ring3 vfio serve nvme --file base.img --read-only --socket base.sock --once
  ring3 vfio info vfio-user=nvme.sock
  ring3 vfio info vfio-pci=0000:00:04.0

QEMU (10.1 or newer) as the client, with memory that it shares:
  qemu-system-x86_64 -m 1G -object memory-backend-memfd,id=m,size=1G \\
    -machine q35,memory-backend=m \\
    -device '{\"driver\":\"vfio-user-pci\",\"socket\":{\"type\":\"unix\",\"path\":\"nvme.sock\"}}' ...";

/// The subcommands of `ring3 vfio`.
#[derive(Debug, Subcommand)]
pub enum VfioTask {
    /// Give a device to virtual machines, by vfio-user
    ///
    /// Listens on a UNIX socket for a vfio-user client, such as QEMU or another virtual machine monitor, and serves one
    /// after the other until it is told to end (Ctrl-C, SIGTERM). The socket is removed at the end.
    #[command(after_long_help = EXAMPLES)]
    Serve {
        /// Which device.
        #[command(subcommand)]
        device: ServedDevice,
    },
    /// Print what a device is: one of a vfio-user server, or one of the host's
    ///
    /// Its regions, interrupts and features, and what the server can do.
    Info {
        /// The device: vfio-user=SOCKET, or vfio-pci=ADDRESS of a PCI device of the host that its vfio-pci has
        /// (vfio-pci=0000:00:04.0; `,door=cdev` or `,door=group` behind it says which of VFIO's doors)
        #[arg(value_name = "DEVICE", value_parser = parse_named, required_unless_present = "socket")]
        device: Option<NamedDevice>,
        /// Socket of a server: the same as vfio-user=PATH
        #[arg(long, visible_alias = "socket-path", value_name = "PATH", conflicts_with = "device")]
        socket: Option<PathBuf>,
    },
}

/// A device from elsewhere: what `ring3 vfio info` describes, and `ring3 run --device` gives to a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NamedDevice {
    /// That of a vfio-user server, by its socket.
    VfioUser(PathBuf),
    /// One of the host's.
    VfioPci(HostDeviceName),
}

/// Parses one.
pub(super) fn parse_named(text: &str) -> Result<NamedDevice, String> {
    match text.split_once('=') {
        Some(("vfio-user", path)) if !path.is_empty() => Ok(NamedDevice::VfioUser(path.into())),
        Some(("vfio-pci", name)) => {
            name.parse().map(NamedDevice::VfioPci).map_err(|error: NoHostDeviceName| error.to_string())
        }
        _ => Err(format!(
            "`{text}` is no device: write vfio-user=SOCKET or vfio-pci=ADDRESS[,door=cdev|group]"
        )),
    }
}

/// The devices of `ring3 vfio serve`.
#[derive(Debug, Subcommand)]
pub enum ServedDevice {
    /// An NVMe controller with a file or block device as its one namespace
    Nvme(NvmeArgs),
    /// A PCI device to test clients with: every kind of BAR and interrupt, DMA, migration
    ///
    /// Its registers are described in crate `vfio`, `devices::test`.
    Test(ServeArgs),
}

/// The options of `ring3 vfio serve nvme`.
#[derive(Debug, Args)]
pub struct NvmeArgs {
    /// Raw disk image, or a block device
    #[arg(long, value_name = "FILE")]
    pub file: PathBuf,
    /// The guest cannot write it
    #[arg(long)]
    pub read_only: bool,
    /// Serial number that the guest sees: up to 20 printable characters [default: the file's name]
    #[arg(long, value_name = "TEXT")]
    pub serial: Option<String>,
    /// Pairs of I/O queues that the guest may use
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub queues: u16,
    /// Threads that carry out the guest's commands
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub workers: u16,
    /// How it is served.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What all devices have.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Socket to listen on
    ///
    /// Only the user may connect. A socket that was left behind there is taken over.
    #[arg(long, visible_alias = "socket-path", value_name = "PATH")]
    pub socket: PathBuf,
    /// End when the first client has gone
    #[arg(long)]
    pub once: bool,
    /// Whether ring3 gives up all rights that serving does not need before the first client
    #[arg(long, value_enum, default_value_t = Isolation::On)]
    pub isolation: Isolation,
    /// Say which clients come and go, and which rights were given up
    #[arg(short, long)]
    pub verbose: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_described_is_named_as_for_run() {
        assert_eq!(parse_named("vfio-user=a=b"), Ok(NamedDevice::VfioUser("a=b".into())));
        assert_eq!(
            parse_named("vfio-pci=00:04.0,door=group"),
            Ok(NamedDevice::VfioPci("0000:00:04.0,door=group".parse().unwrap()))
        );
        for (wrong, says) in [
            ("nvme.sock", "vfio-pci=ADDRESS"),
            ("", "vfio-user=SOCKET"),
            ("vfio-user", "vfio-user=SOCKET"),
            ("vfio-user=", "vfio-user=SOCKET"),
            ("vfio-pci", "vfio-pci=ADDRESS"),
            ("vfio-pci=", "no PCI address"),
            ("vfio-pci=00:04.0,door=back", "`door=back` is no option"),
            ("vfio-pci=00:04.0,", "`` is no option"),
            ("vfio-pci=4", "no PCI address"),
        ] {
            assert!(parse_named(wrong).unwrap_err().contains(says), "{wrong}");
        }
    }
}
