//! The options of `ring3 vfio`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::Isolation;

const EXAMPLES: &str = "\
Examples:
  truncate -s 8G disk.img
  ring3 vfio serve nvme --file disk.img --socket nvme.sock
  ring3 vfio serve nvme --file base.img --read-only --socket base.sock --once
  ring3 vfio info --socket nvme.sock

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
    /// Print what the device at the other end of a vfio-user socket is
    ///
    /// Its regions, interrupts and features, and what the server can do.
    Info {
        /// Socket of the server
        #[arg(long, visible_alias = "socket-path", value_name = "PATH")]
        socket: PathBuf,
    },
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
