//! The test device's registers: words of 32 bits at these offsets of BAR 0.

/// Reads as [`ID_VALUE`].
pub const ID: u64 = 0x00;
/// "R3TD".
pub const ID_VALUE: u32 = 0x4454_3352;
/// Keeps what is written.
pub const SCRATCH: u64 = 0x04;
/// Keeps the complement of what is written.
pub const INVERTED: u64 = 0x08;
/// Signals the message of the number that is written.
pub const RAISE: u64 = 0x10;
/// The level of INTx.
pub const INTX: u64 = 0x14;
/// Signals ERR or REQ.
pub const NOTIFY: u64 = 0x18;
/// To [`NOTIFY`]: the device has failed.
pub const NOTIFY_ERROR: u32 = 1;
/// To [`NOTIFY`]: the user is asked to let go.
pub const NOTIFY_REQUEST: u32 = 2;
/// Where a command reads: an I/O virtual address, or an offset of BAR 2.
pub const SOURCE: u64 = 0x20;
/// Its upper half.
pub const SOURCE_HIGH: u64 = 0x24;
/// Where a command writes.
pub const TARGET: u64 = 0x28;
/// Its upper half.
pub const TARGET_HIGH: u64 = 0x2c;
/// How many bytes.
pub const LENGTH: u64 = 0x30;
/// The process address space that a command uses; 0 for none.
pub const PASID: u64 = 0x34;
/// Does something, at once.
pub const COMMAND: u64 = 0x38;
/// From memory to memory.
pub const COMMAND_COPY: u32 = 1;
/// From memory to BAR 2.
pub const COMMAND_LOAD: u32 = 2;
/// From BAR 2 to memory.
pub const COMMAND_STORE: u32 = 3;
/// How the last command ended.
pub const STATUS: u64 = 0x3c;
/// Well.
pub const STATUS_DONE: u32 = 1;
/// Not all of the memory could be accessed.
pub const STATUS_FAULT: u32 = 2;
/// The device is being migrated.
pub const STATUS_REFUSED: u32 = 3;
/// At which address it could not.
pub const FAULT: u64 = 0x40;
/// Its upper half.
pub const FAULT_HIGH: u64 = 0x44;
/// How many commands there have been.
pub const COMMANDS: u64 = 0x48;
/// Where the registers begin in BAR 4.
pub const BAR4: u64 = 0x2000;
