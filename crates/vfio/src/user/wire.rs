//! What goes over the socket: headers and payloads, as the vfio-user specification lays them out.
//!
//! All numbers are in the byte order of the host, which client and server share. A payload begins with a fixed structure;
//! what is variable (data, capability chains, bitmaps) follows it. Structures that the specification takes from
//! `<linux/vfio.h>` unchanged (region and interrupt information) are those of crate `uapi`.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Errno, Result};

bitflags::bitflags! {
    /// Flags of a [`Header`]. The low four bits are the type of the message.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct Flags: u32 {
        /// Type 1: a reply. Type 0 is a command.
        const REPLY = 1;
        /// The sender of this command wants no reply.
        const NO_REPLY = 0x10;
        /// In a reply: the command failed, and the header's `error` says why.
        const ERROR = 0x20;
    }
}

/// The bits of [`Header::flags`] that are the type.
const TYPE_MASK: u32 = 0xf;

/// What every message begins with.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Header {
    /// Chosen by who sends a command; its reply has the same.
    pub id: u16,
    /// A [`Command`].
    pub command: u16,
    /// Bytes of the whole message.
    pub size: u32,
    /// [`Flags`].
    pub flags: u32,
    /// An errno, in a reply with [`Flags::ERROR`].
    pub error: u32,
}

impl Header {
    /// Bytes that it has.
    pub const SIZE: usize = size_of::<Self>();

    /// Whether it is a reply, or a command. EINVAL for what is neither.
    pub fn is_reply(&self) -> Result<bool> {
        match self.flags & TYPE_MASK {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Errno::INVAL),
        }
    }

    /// Whether the sender of this command waits for no reply.
    pub fn no_reply(&self) -> bool {
        self.flags & Flags::NO_REPLY.bits() != 0
    }

    /// The errno of a reply that says that its command failed. Zero, and numbers that are none, become EIO.
    pub fn failure(&self) -> Option<Errno> {
        if self.flags & Flags::ERROR.bits() == 0 {
            return None;
        }
        let errno = i32::try_from(self.error).ok().filter(|errno| (1..4096).contains(errno));
        Some(errno.map_or(Errno::IO, Errno::from_raw_os_error))
    }

    /// The header of the reply to this command, with `payload` bytes behind it.
    pub fn reply(&self, payload: usize) -> Self {
        Self { size: message_size(payload), flags: Flags::REPLY.bits(), error: 0, ..*self }
    }

    /// The header of the reply that says that this command failed. It has no payload.
    pub fn failed(&self, error: Errno) -> Self {
        let flags = Flags::REPLY | Flags::ERROR;
        Self {
            size: message_size(0),
            flags: flags.bits(),
            error: error.raw_os_error().unsigned_abs(),
            ..*self
        }
    }

    /// The header of a command.
    pub fn command(id: u16, command: Command, payload: usize, no_reply: bool) -> Self {
        let flags = if no_reply { Flags::NO_REPLY } else { Flags::empty() };
        Self { id, command: command as u16, size: message_size(payload), flags: flags.bits(), error: 0 }
    }
}

/// The size in the header of a message with `payload` bytes. Senders keep payloads below the limits of [`super::version`].
fn message_size(payload: usize) -> u32 {
    u32::try_from(payload.saturating_add(Header::SIZE)).unwrap_or(u32::MAX)
}

/// Who sends a command.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sender {
    /// The monitor.
    Client,
    /// The device.
    Server,
}

/// One row of the table of commands.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// The command.
    pub command: Command,
    /// Its name, without `VFIO_USER_`.
    pub name: &'static str,
    /// Who sends it.
    pub sender: Sender,
    /// Bytes that the payload of the command has at least.
    pub request: usize,
    /// Bytes that the payload of its reply has at least.
    pub reply: usize,
    /// What client and server here do with it.
    pub support: &'static str,
}

macro_rules! commands {
    ($($(#[$doc:meta])* $variant:ident = $number:literal, $name:literal, $sender:ident, $request:expr, $reply:expr,
        $support:literal;)*) => {
        /// What a message asks for.
        #[repr(u16)]
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
        pub enum Command {
            $($(#[$doc])* $variant = $number,)*
        }

        /// Every command of the specification.
        pub const COMMANDS: &[Row] = &[
            $(Row {
                command: Command::$variant,
                name: $name,
                sender: Sender::$sender,
                request: $request,
                reply: $reply,
                support: $support,
            },)*
        ];

        impl Command {
            /// The command with this number. ENOTSUP when there is none.
            pub fn from_number(number: u16) -> Result<Self> {
                match number {
                    $($number => Ok(Self::$variant),)*
                    _ => Err(Errno::NOTSUP),
                }
            }

            /// Its row in [`COMMANDS`].
            pub const fn row(self) -> &'static Row {
                match self {
                    $(Self::$variant => &Row {
                        command: Self::$variant,
                        name: $name,
                        sender: Sender::$sender,
                        request: $request,
                        reply: $reply,
                        support: $support,
                    },)*
                }
            }
        }
    };
}

commands! {
    /// The first message of a client: versions and capabilities.
    Version = 1, "VERSION", Client, size_of::<Version>(), size_of::<Version>(),
        "full: every capability of the specification, version 0.1";
    /// Memory that the device may access from now on.
    DmaMap = 2, "DMA_MAP", Client, size_of::<DmaMap>(), 0,
        "partial: with a descriptor (mapped), or without (DMA_READ, DMA_WRITE); the flags \
          MMAP and FILE_IO, which are proposed for the specification, are refused: EINVAL";
    /// Memory that the device may not access any more.
    DmaUnmap = 3, "DMA_UNMAP", Client, size_of::<DmaUnmap>(), size_of::<DmaUnmap>(),
        "full: answered when no access of the device is under way; the older ALL; the older GET_DIRTY is refused: ENOTSUP";
    /// How many regions and interrupts there are.
    DeviceGetInfo = 4, "DEVICE_GET_INFO", Client, size_of::<DeviceInfo>(), size_of::<DeviceInfo>(), "full";
    /// Size, access and capabilities of a region.
    DeviceGetRegionInfo = 5, "DEVICE_GET_REGION_INFO", Client, size_of::<uapi::vfio::vfio_region_info>(),
        size_of::<uapi::vfio::vfio_region_info>(), "full: with the descriptor of what can be mapped";
    /// Descriptors that stand for writes to parts of a region.
    DeviceGetRegionIoFds = 6, "DEVICE_GET_REGION_IO_FDS", Client, size_of::<RegionIoFds>(), size_of::<RegionIoFds>(),
        "partial: ioeventfds, where the device offers some; ioregionfds are in no kernel, and are not offered";
    /// How many interrupts of a kind there are, and what can be done with them.
    DeviceGetIrqInfo = 7, "DEVICE_GET_IRQ_INFO", Client, size_of::<uapi::vfio::vfio_irq_info>(),
        size_of::<uapi::vfio::vfio_irq_info>(), "full";
    /// What an interrupt does.
    DeviceSetIrqs = 8, "DEVICE_SET_IRQS", Client, size_of::<IrqSet>(), 0, "full";
    /// Reads a region.
    RegionRead = 9, "REGION_READ", Client, size_of::<RegionAccess>(), size_of::<RegionAccess>(), "full";
    /// Writes a region.
    RegionWrite = 10, "REGION_WRITE", Client, size_of::<RegionAccess>(), size_of::<RegionAccess>(),
        "full: posted writes too";
    /// Reads memory of the client.
    DmaRead = 11, "DMA_READ", Server, size_of::<DmaAccess>(), size_of::<DmaAccess>(), "full";
    /// Writes memory of the client.
    DmaWrite = 12, "DMA_WRITE", Server, size_of::<DmaAccess>(), DMA_WRITE_REPLY, "full";
    /// Resets the device.
    DeviceReset = 13, "DEVICE_RESET", Client, 0, 0, "full";
    /// Several small writes to regions.
    RegionWriteMulti = 15, "REGION_WRITE_MULTI", Client, size_of::<WriteMulti>(), size_of::<WriteMulti>(), "full";
    /// Asks for, reads or sets a feature.
    DeviceFeature = 16, "DEVICE_FEATURE", Client, size_of::<Feature>(), size_of::<Feature>(),
        "full: migration (and MIG_DATA_SIZE) for devices that have it; DMA logging for all; others are refused with ENOTTY";
    /// Reads the state of a device that is saved.
    MigDataRead = 17, "MIG_DATA_READ", Client, size_of::<MigData>(), size_of::<MigData>(), "full";
    /// Writes the state of a device that is restored.
    MigDataWrite = 18, "MIG_DATA_WRITE", Client, size_of::<MigData>(), 0, "full";
}

/// The shortest reply to DMA_WRITE: the specification's table gives `count` four bytes there, and eight in the request.
const DMA_WRITE_REPLY: usize = 12;

/// VERSION; the JSON text and a NUL follow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Version {
    /// Changes with incompatible changes of the protocol.
    pub major: u16,
    /// Changes with compatible ones.
    pub minor: u16,
}

bitflags::bitflags! {
    /// What a device may do with memory: flags of [`DmaMap`].
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub struct DmaFlags: u32 {
        /// It may read it.
        const READ = 1;
        /// It may write it.
        const WRITE = 2;
    }
}

/// DMA_MAP.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DmaMap {
    /// Bytes of this structure.
    pub argsz: u32,
    /// [`DmaFlags`].
    pub flags: u32,
    /// Where in the file the memory begins.
    pub offset: u64,
    /// The first I/O virtual address.
    pub address: u64,
    /// Bytes.
    pub size: u64,
}

/// Flag of [`DmaUnmap`], from before the specification's present form: everything, with address and size zero.
pub const DMA_UNMAP_ALL: u32 = 2;

/// DMA_UNMAP, and its reply.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DmaUnmap {
    /// Bytes that the reply may have.
    pub argsz: u32,
    /// Zero, or [`DMA_UNMAP_ALL`].
    pub flags: u32,
    /// As in the [`DmaMap`] that made it.
    pub address: u64,
    /// As in the [`DmaMap`] that made it.
    pub size: u64,
}

/// DEVICE_GET_INFO, and its reply: the first fields of `struct vfio_device_info`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DeviceInfo {
    /// In the command: bytes that the reply may have; in the reply: bytes that it needs.
    pub argsz: u32,
    /// `VFIO_DEVICE_FLAGS_*`.
    pub flags: u32,
    /// How many regions the device has.
    pub num_regions: u32,
    /// How many kinds of interrupt it has.
    pub num_irqs: u32,
}

/// DEVICE_GET_REGION_IO_FDS, and its reply, where `count` [`SubRegion`]s follow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RegionIoFds {
    /// In the command: bytes that the reply may have; in the reply: bytes that it needs.
    pub argsz: u32,
    /// Zero.
    pub flags: u32,
    /// The region.
    pub index: u32,
    /// How many sub-regions follow.
    pub count: u32,
}

/// [`SubRegion::kind`]: the descriptor is an eventfd that stands for a write.
pub const IO_FD_TYPE_IOEVENTFD: u32 = 0;

/// A part of a region where a descriptor stands for writes.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SubRegion {
    /// Where it begins in the region.
    pub offset: u64,
    /// Bytes; zero when accesses of any size count.
    pub size: u64,
    /// Which of the descriptors that came with the reply.
    pub fd_index: u32,
    /// [`IO_FD_TYPE_IOEVENTFD`].
    pub kind: u32,
    /// `KVM_IOEVENTFD_FLAG_*`.
    pub flags: u32,
    /// Zero.
    pub padding: u32,
    /// The value that is to be written, with `KVM_IOEVENTFD_FLAG_DATAMATCH`.
    pub datamatch: u64,
}

/// DEVICE_SET_IRQS: `struct vfio_irq_set`; booleans may follow, and eventfds come as descriptors.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct IrqSet {
    /// Bytes of the payload.
    pub argsz: u32,
    /// `VFIO_IRQ_SET_*`.
    pub flags: u32,
    /// The kind of interrupt.
    pub index: u32,
    /// The first one.
    pub start: u32,
    /// How many.
    pub count: u32,
}

/// REGION_READ, REGION_WRITE (data follows), and their replies (data follows that of a read).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct RegionAccess {
    /// Where in the region.
    pub offset: u64,
    /// Which region.
    pub region: u32,
    /// Bytes.
    pub count: u32,
}

/// DMA_READ, DMA_WRITE (data follows), and their replies (data follows that of a read).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct DmaAccess {
    /// The I/O virtual address.
    pub address: u64,
    /// Bytes.
    pub count: u64,
}

/// REGION_WRITE_MULTI, where [`SingleWrite`]s follow, and its reply.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct WriteMulti {
    /// How many writes follow, or have been made.
    pub count: u64,
}

/// One write of a REGION_WRITE_MULTI.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SingleWrite {
    /// Where, and how many bytes, at most eight.
    pub access: RegionAccess,
    /// The bytes.
    pub data: [u8; 8],
}

/// DEVICE_FEATURE: `struct vfio_device_feature`; the feature's own data follows.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Feature {
    /// Bytes that the reply may have, or has.
    pub argsz: u32,
    /// The index of the feature, and `VFIO_DEVICE_FEATURE_GET`, `_SET`, `_PROBE`.
    pub flags: u32,
}

/// What DEVICE_FEATURE has for `VFIO_DEVICE_FEATURE_DMA_LOGGING_START`; the ranges follow.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LoggingControl {
    /// The size of page to note writes for; in the reply the one that it is.
    pub page_size: u64,
    /// How many `vfio_device_feature_dma_logging_range`s follow; zero stands for all addresses.
    pub num_ranges: u32,
    /// Zero.
    pub reserved: u32,
}

/// What DEVICE_FEATURE has for `VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT`; the bitmap follows in the reply.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LoggingReport {
    /// The first address.
    pub iova: u64,
    /// Bytes.
    pub length: u64,
    /// Bytes that one bit stands for.
    pub page_size: u64,
}

/// MIG_DATA_READ, its reply (data follows), and MIG_DATA_WRITE (data follows).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MigData {
    /// Bytes that the reply may have, or has.
    pub argsz: u32,
    /// Bytes of data.
    pub size: u32,
}

/// The structure that a payload begins with, and what follows it. EINVAL when the payload is shorter.
pub fn split<T: FromBytes + KnownLayout + Immutable>(payload: &[u8]) -> Result<(T, &[u8])> {
    T::read_from_prefix(payload).map_err(|_| Errno::INVAL)
}
