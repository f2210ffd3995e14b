//! Numbers and layouts of the NVM Express Base Specification 1.4, of which sections are named.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Registers of the controller (section 3.1).
pub(super) mod register {
    /// What the controller can do.
    pub(crate) const CAP: u64 = 0x00;
    /// The version of the specification.
    pub(crate) const VS: u64 = 0x08;
    /// Sets bits of the interrupt mask.
    pub(crate) const INTMS: u64 = 0x0c;
    /// Clears bits of the interrupt mask.
    pub(crate) const INTMC: u64 = 0x10;
    /// Configuration.
    pub(crate) const CC: u64 = 0x14;
    /// Status.
    pub(crate) const CSTS: u64 = 0x1c;
    /// Sizes of the admin queues.
    pub(crate) const AQA: u64 = 0x24;
    /// Where the admin submission queue is.
    pub(crate) const ASQ: u64 = 0x28;
    /// Where the admin completion queue is.
    pub(crate) const ACQ: u64 = 0x30;
    /// The end of the registers that are implemented.
    pub(crate) const END: u64 = 0x38;
    /// The first doorbell.
    pub(crate) const DOORBELLS: u64 = 0x1000;
}

/// Fields of CC (section 3.1.5).
pub(super) mod cc {
    pub(crate) const ENABLE: u32 = 1;
    pub(crate) const COMMAND_SET: u32 = 7 << 4;
    pub(crate) const PAGE_SIZE: u32 = 0xf << 7;
    pub(crate) const ARBITRATION: u32 = 7 << 11;
    pub(crate) const SHUTDOWN: u32 = 3 << 14;
    pub(crate) const SQ_ENTRY_SHIFT: u32 = 16;
    pub(crate) const CQ_ENTRY_SHIFT: u32 = 20;
    pub(crate) const WRITABLE: u32 = 0x00ff_fff1;
}

/// Fields of CSTS (section 3.1.6).
pub(super) mod csts {
    pub(crate) const READY: u32 = 1;
    pub(crate) const FATAL: u32 = 1 << 1;
    pub(crate) const SHUTDOWN: u32 = 3 << 2;
    pub(crate) const SHUTDOWN_COMPLETE: u32 = 2 << 2;
}

/// Opcodes of admin commands (section 5).
pub(super) mod admin {
    pub(crate) const DELETE_SQ: u8 = 0x00;
    pub(crate) const CREATE_SQ: u8 = 0x01;
    pub(crate) const GET_LOG_PAGE: u8 = 0x02;
    pub(crate) const DELETE_CQ: u8 = 0x04;
    pub(crate) const CREATE_CQ: u8 = 0x05;
    pub(crate) const IDENTIFY: u8 = 0x06;
    pub(crate) const ABORT: u8 = 0x08;
    pub(crate) const SET_FEATURES: u8 = 0x09;
    pub(crate) const GET_FEATURES: u8 = 0x0a;
    pub(crate) const ASYNC_EVENT: u8 = 0x0c;
}

/// Opcodes of I/O commands (section 6).
pub(super) mod io {
    pub(crate) const FLUSH: u8 = 0x00;
    pub(crate) const WRITE: u8 = 0x01;
    pub(crate) const READ: u8 = 0x02;
    pub(crate) const COMPARE: u8 = 0x05;
    pub(crate) const WRITE_ZEROES: u8 = 0x08;
    pub(crate) const DATASET_MANAGEMENT: u8 = 0x09;
    pub(crate) const VERIFY: u8 = 0x0c;
}

/// Features (section 5.21.1).
pub(super) mod feature {
    pub(crate) const ARBITRATION: u8 = 0x01;
    pub(crate) const POWER_MANAGEMENT: u8 = 0x02;
    pub(crate) const TEMPERATURE: u8 = 0x04;
    pub(crate) const ERROR_RECOVERY: u8 = 0x05;
    pub(crate) const WRITE_CACHE: u8 = 0x06;
    pub(crate) const QUEUES: u8 = 0x07;
    pub(crate) const COALESCING: u8 = 0x08;
    pub(crate) const VECTOR: u8 = 0x09;
    pub(crate) const ATOMICITY: u8 = 0x0a;
    pub(crate) const ASYNC_EVENTS: u8 = 0x0b;
}

/// Log pages (section 5.14.1).
pub(super) mod log {
    pub(crate) const ERRORS: u8 = 0x01;
    pub(crate) const HEALTH: u8 = 0x02;
    pub(crate) const FIRMWARE: u8 = 0x03;
    pub(crate) const EFFECTS: u8 = 0x05;
}

/// How a command ended: status code type and status code, and whether repeating it is in vain (section 4.6.1). As in bits
/// 1 to 15 of the completion's last word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Status(pub(super) u16);

impl Status {
    /// The bit "do not retry".
    const DNR: u16 = 1 << 14;

    const fn generic(code: u16) -> Self {
        Self(code | Self::DNR)
    }

    const fn specific(code: u16) -> Self {
        Self(1 << 8 | code | Self::DNR)
    }

    pub(super) const SUCCESS: Self = Self(0);
    pub(super) const INVALID_OPCODE: Self = Self::generic(0x01);
    pub(super) const INVALID_FIELD: Self = Self::generic(0x02);
    pub(super) const DATA_TRANSFER: Self = Self(0x04);
    pub(super) const INVALID_NAMESPACE: Self = Self::generic(0x0b);
    pub(super) const INVALID_PRP: Self = Self::generic(0x13);
    pub(super) const WRITE_PROTECTED: Self = Self::generic(0x20);
    pub(super) const OUT_OF_RANGE: Self = Self::generic(0x80);
    pub(super) const CQ_INVALID: Self = Self::specific(0x00);
    pub(super) const INVALID_QUEUE: Self = Self::specific(0x01);
    pub(super) const INVALID_QUEUE_SIZE: Self = Self::specific(0x02);
    pub(super) const TOO_MANY_EVENTS: Self = Self::specific(0x05);
    pub(super) const INVALID_VECTOR: Self = Self::specific(0x08);
    pub(super) const INVALID_LOG_PAGE: Self = Self::specific(0x09);
    pub(super) const INVALID_DELETION: Self = Self::specific(0x0c);
    pub(super) const NOT_SAVEABLE: Self = Self::specific(0x0d);
    pub(super) const NOT_CHANGEABLE: Self = Self::specific(0x0e);
    pub(super) const WRITE_FAULT: Self = Self(2 << 8 | 0x80);
    pub(super) const READ_ERROR: Self = Self(2 << 8 | 0x81);
    pub(super) const COMPARE_FAILURE: Self = Self(2 << 8 | 0x85 | Self::DNR);
}

/// A command (section 4.2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct Command {
    pub(super) opcode: u8,
    /// Fused operation (bits 0 and 1), and PRP or SGL (bits 6 and 7).
    pub(super) flags: u8,
    pub(super) id: u16,
    pub(super) namespace: u32,
    pub(super) cdw2: u32,
    pub(super) cdw3: u32,
    pub(super) metadata: u64,
    pub(super) prp1: u64,
    pub(super) prp2: u64,
    pub(super) cdw10: u32,
    pub(super) cdw11: u32,
    pub(super) cdw12: u32,
    pub(super) cdw13: u32,
    pub(super) cdw14: u32,
    pub(super) cdw15: u32,
}

/// A completion (section 4.6).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct Completion {
    pub(super) result: u32,
    pub(super) reserved: u32,
    pub(super) sq_head: u16,
    pub(super) sq_id: u16,
    pub(super) command_id: u16,
    /// The phase in bit 0, and the status.
    pub(super) status: u16,
}

/// One range of a dataset management command (section 6.7.1).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(super) struct DatasetRange {
    pub(super) attributes: u32,
    pub(super) blocks: u32,
    pub(super) start: u64,
}

/// Bytes of an entry of a submission queue, as a power of two.
pub(super) const SQ_ENTRY_BITS: u32 = 6;
/// Bytes of an entry of a completion queue, as a power of two.
pub(super) const CQ_ENTRY_BITS: u32 = 4;
/// Bytes of a page of memory: the only size that is offered.
pub(super) const PAGE: u64 = 4096;
/// Bytes of a logical block: the only format.
pub(super) const BLOCK: u64 = 512;
/// The one namespace.
pub(super) const NAMESPACE: u32 = 1;
/// "All namespaces".
pub(super) const ALL_NAMESPACES: u32 = u32::MAX;
/// Entries that a queue may have.
pub(super) const MAX_ENTRIES: u32 = 1024;
/// Pages that one command may move, as a power of two (MDTS): 1 MiB.
pub(super) const MAX_TRANSFER_BITS: u8 = 8;
/// Bytes that one command may move.
pub(super) const MAX_TRANSFER: u64 = PAGE << MAX_TRANSFER_BITS;

const _: () = assert!(size_of::<Command>() == 1 << SQ_ENTRY_BITS);
const _: () = assert!(size_of::<Completion>() == 1 << CQ_ENTRY_BITS);
