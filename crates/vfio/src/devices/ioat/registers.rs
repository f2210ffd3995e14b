//! Offsets and bits, with the names of the kernel's header.

/// How many channels there are.
pub(super) const CHANCNT: u64 = 0x00;
/// log2 of how many bytes one descriptor may copy.
pub(super) const XFERCAP: u64 = 0x01;
pub(super) const GENCTRL: u64 = 0x02;
pub(super) const INTRCTRL: u64 = 0x03;
pub(super) const INTRCTRL_MASTER_INT_EN: u8 = 0x01;
pub(super) const INTRCTRL_INT_STATUS: u8 = 0x02;
pub(super) const INTRCTRL_INT: u8 = 0x04;
pub(super) const INTRCTRL_MSIX_VECTOR_CONTROL: u8 = 0x08;
/// Which channels have interrupted; reading clears it.
pub(super) const ATTNSTATUS: u64 = 0x04;
pub(super) const VER: u64 = 0x08;
/// Where the channel's own registers begin.
pub(super) const CHANNEL: u64 = 0x80;

/// The channel's registers, counted from there.
pub(super) const CHANCTRL: u64 = 0x00;
pub(super) const CHANCTRL_INT_REARM: u16 = 0x0001;
pub(super) const CHANCTRL_ERR_COMPLETION_EN: u16 = 0x0004;
pub(super) const CHANCTRL_ANY_ERR_ABORT_EN: u16 = 0x0008;
pub(super) const CHANCTRL_ERR_INT_EN: u16 = 0x0010;
pub(super) const DMA_COMP: u64 = 0x02;
pub(super) const DMA_COMP_V2: u16 = 0x0002;
pub(super) const CHANCMD: u64 = 0x04;
pub(super) const CHANCMD_RESET: u8 = 0x20;
pub(super) const CHANCMD_ABORT: u8 = 0x08;
pub(super) const CHANCMD_SUSPEND: u8 = 0x04;
pub(super) const DMACOUNT: u64 = 0x06;
pub(super) const CHANSTS: u64 = 0x08;
pub(super) const CHAINADDR: u64 = 0x10;
pub(super) const CHANCMP: u64 = 0x18;
pub(super) const CDAR: u64 = 0x20;
pub(super) const CHANERR: u64 = 0x28;
pub(super) const CHANERR_MASK: u64 = 0x2c;
/// Where they end.
pub(super) const CHANNEL_END: u64 = 0x30;

/// What CHANERR says.
pub(super) const ERR_SRC_ADDR: u32 = 0x0001;
pub(super) const ERR_DEST_ADDR: u32 = 0x0002;
pub(super) const ERR_NEXT_ADDR: u32 = 0x0004;
pub(super) const ERR_NEXT_DESC_ALIGN: u32 = 0x0008;
pub(super) const ERR_CONTROL: u32 = 0x0400;
pub(super) const ERR_LENGTH: u32 = 0x0800;
pub(super) const ERR_COMPLETION_ADDR: u32 = 0x1000;

/// The version: 3.3.
pub(super) const VERSION: u8 = 0x33;
/// 32 KiB in one descriptor.
pub(super) const TRANSFER_SHIFT: u8 = 15;

/// A descriptor: its length, and where its parts are.
pub(super) const DESCRIPTOR: usize = 64;
pub(super) const CONTROL_INT_EN: u32 = 1;
pub(super) const CONTROL_COMPLETION_WRITE: u32 = 1 << 3;
pub(super) const CONTROL_NULL: u32 = 1 << 5;
/// The operation, in the uppermost byte; 0 copies.
pub(super) const CONTROL_OPERATION_SHIFT: u32 = 24;
