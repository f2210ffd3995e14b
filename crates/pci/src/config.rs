//! The configuration space of one PCI function (type 0 header), for any kind of device.
//!
//! # Theory of operation
//!
//! The space is 256 bytes (4096 for a function of PCI Express) with, beside each byte, a mask of the bits that
//! software may change and a mask of the bits that are cleared by writing 1 (PCI Local Bus 3.0, section 6.2). A read copies bytes, a write
//! merges bytes through the masks; every side effect that the specification describes falls out of the
//! masks. Above all BAR sizing: the address bits below a BAR's size are not writable, so writing all ones and
//! reading back gives the size, whichever width the access has. Offsets past the space read as zero and ignore
//! writes.
//!
//! What the bytes mean to the rest of the device (is memory decoding on, where is BAR 2, may the function be
//! a bus master) is asked of this structure by its owner after a write; nothing here calls out.

/// Bytes of the configuration space of conventional PCI.
pub const CONVENTIONAL_SIZE: usize = 256;
/// Bytes of that of PCI Express.
pub const EXPRESS_SIZE: usize = 4096;

/// Offsets of the header's registers (PCI 3.0, figure 6-1).
mod reg {
    pub(super) const VENDOR: usize = 0x00;
    pub(super) const DEVICE: usize = 0x02;
    pub(super) const COMMAND: usize = 0x04;
    pub(super) const STATUS: usize = 0x06;
    pub(super) const REVISION: usize = 0x08;
    pub(super) const CLASS: usize = 0x09;
    pub(super) const CACHE_LINE: usize = 0x0c;
    pub(super) const BAR0: usize = 0x10;
    pub(super) const SUBSYSTEM_VENDOR: usize = 0x2c;
    pub(super) const SUBSYSTEM: usize = 0x2e;
    pub(super) const ROM: usize = 0x30;
    pub(super) const CAPABILITIES: usize = 0x34;
    pub(super) const INTERRUPT_LINE: usize = 0x3c;
    pub(super) const INTERRUPT_PIN: usize = 0x3d;
}

/// First offset that a capability may take.
const CAPABILITIES_START: usize = 0x40;

const COMMAND_IO: u16 = 1 << 0;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_PARITY: u16 = 1 << 6;
const COMMAND_SERR: u16 = 1 << 8;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;

const STATUS_INTERRUPT: u16 = 1 << 3;
const STATUS_CAPABILITIES: u16 = 1 << 4;
/// The error bits of the status register, cleared by writing 1.
const STATUS_ERRORS: u16 = 0xf900;

/// A capability or a BAR that does not fit the configuration space.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// BAR sizes are powers of two and at least 16 bytes (PCI 3.0, section 6.2.5.1).
    #[error("BAR {index}: size {size:#x} is not a power of two of at least 16 bytes")]
    BarSize {
        /// Number of the BAR.
        index: usize,
        /// The size asked for, in bytes.
        size: u64,
    },
    /// There are six BARs, and a 64-bit one takes two.
    #[error("BAR {index} does not exist or is taken")]
    BarIndex {
        /// Number of the BAR.
        index: usize,
    },
    /// The expansion ROM's size is a power of two from 2 KiB to 16 MiB (PCI 3.0, section 6.2.5.2).
    #[error("the ROM's size {0:#x} is not a power of two from 2 KiB to 16 MiB")]
    RomSize(u64),
    /// The bytes for capabilities are used up, or there are none of the extended kind.
    #[error("no room for a capability of {len} bytes at offset {offset:#x}")]
    CapabilitySpace {
        /// Where it would start.
        offset: usize,
        /// Its length in bytes, header included.
        len: usize,
    },
}

/// The constant identification of a function.
#[derive(Debug, Clone, Copy, Default)]
pub struct PciIds {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code: base class in bits 16-23, subclass in 8-15, programming interface in 0-7.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// How a BAR is decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Memory, 32-bit address.
    Memory32,
    /// Memory, 64-bit address: takes this BAR and the next.
    Memory64 {
        /// Reads have no side effects, so a bridge may prefetch.
        prefetchable: bool,
    },
    /// I/O ports.
    Io,
}

/// One BAR as software has it programmed now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Number of the BAR: 0 to 5.
    pub index: usize,
    /// How it is decoded.
    pub kind: BarKind,
    /// Guest-physical address in the register. While software sizes the BAR this is no real address.
    pub address: u64,
    /// Size in bytes, a power of two.
    pub size: u64,
    /// The function answers at this address: memory decoding is on and the range is a possible one.
    pub enabled: bool,
}

/// The configuration space of one function.
#[derive(Debug, Clone)]
pub struct PciConfig {
    bytes: Vec<u8>,
    /// Bits that a write sets.
    writable: Vec<u8>,
    /// Bits that a write of 1 clears.
    clearable: Vec<u8>,
    /// State after reset.
    initial: Vec<u8>,
    bars: [Option<(BarKind, u64)>; 6],
    next_capability: usize,
    last_capability: Option<usize>,
    next_extended: usize,
    last_extended: Option<usize>,
}

impl PciConfig {
    /// A function with these IDs, no BARs and no capabilities.
    #[must_use]
    pub fn new(ids: PciIds) -> Self {
        Self::with_size(ids, CONVENTIONAL_SIZE)
    }

    /// The same, with the extended space of PCI Express.
    #[must_use]
    pub fn express(ids: PciIds) -> Self {
        Self::with_size(ids, EXPRESS_SIZE)
    }

    fn with_size(ids: PciIds, size: usize) -> Self {
        let mut config = PciConfig {
            bytes: vec![0; size],
            writable: vec![0; size],
            clearable: vec![0; size],
            initial: vec![0; size],
            bars: [None; 6],
            next_capability: CAPABILITIES_START,
            last_capability: None,
            next_extended: CONVENTIONAL_SIZE,
            last_extended: None,
        };
        config.define(reg::VENDOR, &ids.vendor.to_le_bytes(), &[]);
        config.define(reg::DEVICE, &ids.device.to_le_bytes(), &[]);
        config.define(reg::REVISION, &[ids.revision], &[]);
        let class = ids.class.to_le_bytes();
        config.define(reg::CLASS, &[class[0], class[1], class[2]], &[]);
        config.define(reg::SUBSYSTEM_VENDOR, &ids.subsystem_vendor.to_le_bytes(), &[]);
        config.define(reg::SUBSYSTEM, &ids.subsystem.to_le_bytes(), &[]);
        let command =
            COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_PARITY | COMMAND_SERR | COMMAND_INTX_DISABLE;
        config.define(reg::COMMAND, &[0, 0], &command.to_le_bytes());
        config.define(reg::CACHE_LINE, &[0], &[0xff]);
        config.define(reg::INTERRUPT_LINE, &[0xff], &[0xff]);
        config.set_clearable(reg::STATUS, &STATUS_ERRORS.to_le_bytes());
        config
    }

    /// How many bytes it has.
    #[must_use]
    pub fn size(&self) -> usize {
        self.bytes.len()
    }

    /// Sets registers and which of their bits are writable (none beyond the end of `writable`).
    fn define(&mut self, offset: usize, value: &[u8], writable: &[u8]) {
        for (i, byte) in value.iter().enumerate() {
            if let (Some(now), Some(initial)) =
                (self.bytes.get_mut(offset + i), self.initial.get_mut(offset + i))
            {
                *now = *byte;
                *initial = *byte;
            }
        }
        for (i, byte) in writable.iter().enumerate() {
            if let Some(mask) = self.writable.get_mut(offset + i) {
                *mask = *byte;
            }
        }
    }

    /// Says which bits of registers a write of 1 clears.
    pub fn set_clearable(&mut self, offset: usize, bits: &[u8]) {
        for (i, byte) in bits.iter().enumerate() {
            if let Some(mask) = self.clearable.get_mut(offset + i) {
                *mask = *byte;
            }
        }
    }

    /// Declares a BAR of `size` bytes.
    ///
    /// # Errors
    /// [`ConfigError::BarSize`] and [`ConfigError::BarIndex`].
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) -> Result<(), ConfigError> {
        let least = if kind == BarKind::Io { 4 } else { 16 };
        if !size.is_power_of_two() || size < least {
            return Err(ConfigError::BarSize { index, size });
        }
        let wide = matches!(kind, BarKind::Memory64 { .. });
        let taken = |i: usize| {
            let by_wide = i > 0 && matches!(self.bars.get(i - 1), Some(Some((BarKind::Memory64 { .. }, _))));
            by_wide || !matches!(self.bars.get(i), Some(None))
        };
        if taken(index) || (wide && taken(index + 1)) {
            return Err(ConfigError::BarIndex { index });
        }
        if !wide && size > 1 << 31 {
            return Err(ConfigError::BarSize { index, size });
        }
        // Bits 0-3 of a memory BAR: space 0, type in bits 1-2 (2 = 64-bit), prefetchable in bit 3. Ports: bit 0.
        let flags: u8 = match kind {
            BarKind::Io => 1,
            BarKind::Memory32 => 0,
            BarKind::Memory64 { prefetchable } => 0b0100 | if prefetchable { 0b1000 } else { 0 },
        };
        let mask = !(size - 1);
        let offset = reg::BAR0 + 4 * index;
        let width = if wide { 8 } else { 4 };
        self.define(offset, &[flags], &mask.to_le_bytes()[..width]);
        if let Some(slot) = self.bars.get_mut(index) {
            *slot = Some((kind, size));
        }
        if kind == BarKind::Io
            && let Some(mask) = self.writable.get_mut(reg::COMMAND)
        {
            *mask |= COMMAND_IO.to_le_bytes()[0];
        }
        Ok(())
    }

    /// Declares an expansion ROM of `size` bytes.
    ///
    /// # Errors
    /// [`ConfigError::RomSize`].
    pub fn add_rom(&mut self, size: u64) -> Result<(), ConfigError> {
        if !size.is_power_of_two() || !(2 << 10..=16 << 20).contains(&size) {
            return Err(ConfigError::RomSize(size));
        }
        // Bit 0 enables it.
        let mask = !(size - 1) | 1;
        self.define(reg::ROM, &[0], &mask.to_le_bytes()[..4]);
        Ok(())
    }

    /// How many bytes the BAR has; none for one that does not exist.
    #[must_use]
    pub fn bar_size(&self, index: usize) -> Option<u64> {
        self.bars.get(index).copied().flatten().map(|(_, size)| size)
    }

    /// Appends a capability: its ID, the body after the two header bytes, and the writable bits of that body.
    /// Returns the offset of the capability's header.
    ///
    /// # Errors
    /// [`ConfigError::CapabilitySpace`].
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, ConfigError> {
        let offset = self.next_capability;
        let len = body.len() + 2;
        let no_room = ConfigError::CapabilitySpace { offset, len };
        if offset + len > CONVENTIONAL_SIZE {
            return Err(no_room);
        }
        let pointer = u8::try_from(offset).map_err(|_| no_room)?;
        self.define(offset, &[id, 0], &[]);
        self.define(offset + 2, body, writable);
        match self.last_capability {
            Some(last) => self.define(last + 1, &[pointer], &[]),
            None => {
                self.define(reg::CAPABILITIES, &[pointer], &[]);
                self.define(reg::STATUS, &STATUS_CAPABILITIES.to_le_bytes(), &[]);
            }
        }
        self.last_capability = Some(offset);
        // Capabilities start on a dword.
        self.next_capability = (offset + len + 3) & !3;
        Ok(pointer)
    }

    /// Appends an extended capability (PCIe 6.0, section 7.6.3): its ID and version, the body after the four header bytes,
    /// and the writable bits of that body. Returns the offset of the capability's header.
    ///
    /// # Errors
    /// [`ConfigError::CapabilitySpace`].
    pub fn add_extended_capability(
        &mut self,
        id: u16,
        version: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, ConfigError> {
        let offset = self.next_extended;
        let len = body.len() + 4;
        let no_room = ConfigError::CapabilitySpace { offset, len };
        if offset + len > self.size() {
            return Err(no_room);
        }
        let pointer = u16::try_from(offset).map_err(|_| no_room)?;
        let header = u32::from(id) | u32::from(version & 0xf) << 16;
        self.define(offset, &header.to_le_bytes(), &[]);
        self.define(offset + 4, body, writable);
        if let Some(last) = self.last_extended {
            let next = (self.u16_at(last + 2) & 0xf) | pointer << 4;
            self.define(last + 2, &next.to_le_bytes(), &[]);
        }
        self.last_extended = Some(offset);
        self.next_extended = (offset + len + 3) & !3;
        Ok(pointer)
    }

    /// Says that the function uses interrupt pin INTA#.
    pub fn set_interrupt_pin_a(&mut self) {
        self.define(reg::INTERRUPT_PIN, &[1], &[]);
    }

    /// Reads `data.len()` bytes at `offset`. Bytes past the registers are zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(usize::from(offset) + i).copied().unwrap_or(0);
        }
    }

    /// Writes `data` at `offset` through the masks.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            let at = usize::from(offset) + i;
            if let (Some(now), Some(set), Some(clear)) =
                (self.bytes.get_mut(at), self.writable.get(at), self.clearable.get(at))
            {
                *now = ((*now & !set) | (byte & set)) & !(byte & clear);
            }
        }
    }

    /// Sets bytes as the device, without regard to the masks.
    pub fn set(&mut self, offset: u16, data: &[u8]) {
        for (i, byte) in data.iter().enumerate() {
            if let Some(now) = self.bytes.get_mut(usize::from(offset) + i) {
                *now = *byte;
            }
        }
    }

    fn u16_at(&self, offset: usize) -> u16 {
        let byte = |i: usize| self.bytes.get(i).copied().unwrap_or(0);
        u16::from_le_bytes([byte(offset), byte(offset + 1)])
    }

    fn u32_at(&self, offset: usize) -> u32 {
        u32::from(self.u16_at(offset)) | u32::from(self.u16_at(offset + 2)) << 16
    }

    /// The command register.
    fn command(&self) -> u16 {
        self.u16_at(reg::COMMAND)
    }

    /// The function answers to accesses of its ports.
    #[must_use]
    pub fn io_enabled(&self) -> bool {
        self.command() & COMMAND_IO != 0
    }

    /// The function answers to memory accesses.
    #[must_use]
    pub fn memory_enabled(&self) -> bool {
        self.command() & COMMAND_MEMORY != 0
    }

    /// The function may start DMA and message-signalled interrupts.
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.command() & COMMAND_BUS_MASTER != 0
    }

    /// The function must not assert INTx.
    #[must_use]
    pub fn intx_disabled(&self) -> bool {
        self.command() & COMMAND_INTX_DISABLE != 0
    }

    /// Shows in the status register that the function has an INTx interrupt pending.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let status = self.u16_at(reg::STATUS);
        let status = if pending { status | STATUS_INTERRUPT } else { status & !STATUS_INTERRUPT };
        self.set(0x06, &status.to_le_bytes());
    }

    /// One BAR as it is programmed now, if the function has it.
    #[must_use]
    pub fn bar(&self, index: usize) -> Option<Bar> {
        let (kind, size) = (*self.bars.get(index)?)?;
        let offset = reg::BAR0 + 4 * index;
        let low = u64::from(self.u32_at(offset) & !if kind == BarKind::Io { 3 } else { 0xf });
        let (address, limit) = match kind {
            BarKind::Io => (low, 1 << 32),
            BarKind::Memory32 => (low, 1 << 32),
            BarKind::Memory64 { .. } => (low | u64::from(self.u32_at(offset + 4)) << 32, u64::MAX),
        };
        // All ones is what sizing leaves, and zero what reset leaves: neither is a place.
        let possible = address != 0 && address.checked_add(size).is_some_and(|end| end < limit);
        let decoding = if kind == BarKind::Io { self.io_enabled() } else { self.memory_enabled() };
        Some(Bar { index, kind, address, size, enabled: possible && decoding })
    }

    /// All BARs of the function.
    pub fn bars(&self) -> impl Iterator<Item = Bar> + '_ {
        (0..self.bars.len()).filter_map(|index| self.bar(index))
    }

    /// Programs a BAR as firmware would. The low bits that the size fixes are dropped.
    pub fn set_bar_address(&mut self, index: usize, address: u64) {
        let Some(Some((kind, _))) = self.bars.get(index) else { return };
        let width = if matches!(kind, BarKind::Memory64 { .. }) { 8 } else { 4 };
        let offset = u16::try_from(reg::BAR0 + 4 * index).unwrap_or(u16::MAX);
        self.write(offset, &address.to_le_bytes()[..width]);
    }

    /// Turns decoding of memory and ports on, as far as the function has them, and bus mastering off: what an operating
    /// system does with a function before a driver has it.
    pub fn enable_decoding(&mut self) {
        let bars = self.bars.iter().flatten();
        let on =
            bars.fold(0, |on, (kind, _)| on | if *kind == BarKind::Io { COMMAND_IO } else { COMMAND_MEMORY });
        let command = self.command() & !(COMMAND_MEMORY | COMMAND_IO | COMMAND_BUS_MASTER);
        self.set(0x04, &(command | on).to_le_bytes());
    }

    /// Turns memory decoding on or off, as firmware would.
    pub fn set_memory_enabled(&mut self, on: bool) {
        let command = self.command() & !(COMMAND_MEMORY | COMMAND_IO);
        let command = if on { command | COMMAND_MEMORY } else { command };
        self.set(0x04, &command.to_le_bytes());
    }

    /// Conventional reset: every register back to its first value. BARs lose their addresses.
    pub fn reset(&mut self) {
        self.bytes.copy_from_slice(&self.initial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> PciConfig {
        let mut config = PciConfig::new(PciIds {
            vendor: 0x1af4,
            device: 0x1043,
            class: 0x07_80_00,
            ..Default::default()
        });
        config.add_bar(0, BarKind::Memory64 { prefetchable: false }, 0x4000).unwrap();
        config.add_bar(2, BarKind::Memory32, 0x1000).unwrap();
        config
    }

    fn read32(config: &PciConfig, offset: u16) -> u32 {
        let mut data = [0; 4];
        config.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn ids_and_class() {
        let config = config();
        assert_eq!(read32(&config, 0), 0x1043_1af4);
        assert_eq!(read32(&config, 8), 0x0780_0000);
    }

    #[test]
    fn sizing_reads_back_the_size_mask() {
        let mut config = config();
        config.write(0x10, &[0xff; 8]);
        assert_eq!(read32(&config, 0x10), 0xffff_c004);
        assert_eq!(read32(&config, 0x14), 0xffff_ffff);
        assert!(!config.bar(0).unwrap().enabled);
        config.write(0x18, &[0xff; 4]);
        assert_eq!(read32(&config, 0x18), 0xffff_f000);
        // Unimplemented BARs read as zero.
        config.write(0x1c, &[0xff; 12]);
        assert_eq!(read32(&config, 0x1c), 0);
    }

    #[test]
    fn bar_is_enabled_by_memory_decoding_only() {
        let mut config = config();
        config.set_bar_address(0, 0x12_3456_7000);
        let bar = config.bar(0).unwrap();
        assert_eq!((bar.address, bar.enabled), (0x12_3456_4000, false));
        config.write(4, &[2]);
        assert!(config.bar(0).unwrap().enabled);
        assert!(!config.bar(2).unwrap().enabled, "address 0");
        // High dword alone, byte by byte.
        config.write(0x14, &[0]);
        assert_eq!(config.bar(0).unwrap().address, 0x3456_4000);
        config.reset();
        assert_eq!(config.bar(0).unwrap().address, 0);
        assert!(!config.memory_enabled());
    }

    #[test]
    fn capabilities_are_chained() {
        let mut config = config();
        let mut data = [0; 2];
        config.read(6, &mut data);
        assert_eq!(data, [0, 0]);
        let a = config.add_capability(9, &[1, 2, 3], &[0, 0xf0]).unwrap();
        let b = config.add_capability(0x11, &[0; 10], &[]).unwrap();
        assert_eq!((a, b), (0x40, 0x48));
        assert_eq!(read32(&config, 0x34) & 0xff, 0x40);
        assert_eq!(read32(&config, 0x40), 0x0201_4809);
        config.write(0x40, &[0xff; 4]);
        assert_eq!(read32(&config, 0x40), 0xf201_4809);
        config.read(6, &mut data);
        assert_eq!(data, [0x10, 0]);
        assert!(config.add_capability(9, &[0; 250], &[]).is_err());
    }

    #[test]
    fn reads_and_writes_anywhere_are_defined() {
        let mut config = config();
        for offset in [0u16, 1, 0x3f, 0xfd, 0xff, 0x100, 0xfff, 0xffff] {
            for len in 0..=8 {
                let mut data = [0xaa; 8];
                config.write(offset, &data[..len]);
                config.read(offset, &mut data[..len]);
            }
        }
        assert_eq!(read32(&config, 0), 0x1043_1af4);
        assert_eq!(read32(&config, 0x400), 0);
    }

    #[test]
    fn ports_and_rom() {
        let mut config = PciConfig::express(PciIds::default());
        config.write(4, &[1]);
        assert!(!config.io_enabled(), "a function without ports");
        config.add_bar(1, BarKind::Io, 32).unwrap();
        config.add_rom(4096).unwrap();
        config.write(0x10, &[0xff; 0x24]);
        assert_eq!(read32(&config, 0x14), 0xffff_ffe1);
        assert_eq!(read32(&config, 0x30), 0xffff_f001);
        config.set_bar_address(1, 0xc020);
        assert_eq!(config.bar(1).unwrap().address, 0xc020);
        assert!(!config.bar(1).unwrap().enabled);
        config.enable_decoding();
        assert!(config.bar(1).unwrap().enabled && !config.memory_enabled() && !config.bus_master());
        assert_eq!(config.add_rom(1024), Err(ConfigError::RomSize(1024)));
        assert_eq!(config.add_bar(2, BarKind::Io, 2), Err(ConfigError::BarSize { index: 2, size: 2 }));
    }

    #[test]
    fn extended_capabilities_are_chained() {
        let mut config = PciConfig::express(PciIds::default());
        assert_eq!(config.add_extended_capability(0x10, 1, &[0; 60], &[0xff]), Ok(0x100));
        assert_eq!(config.add_extended_capability(0x0e, 2, &[7, 0, 0, 0], &[]), Ok(0x140));
        assert_eq!(read32(&config, 0x100), 0x1401_0010);
        assert_eq!(read32(&config, 0x140), 0x0002_000e);
        config.write(0x104, &[0x5a; 4]);
        assert_eq!(read32(&config, 0x104), 0x5a);
        assert!(config.add_extended_capability(1, 1, &[0; 4000], &[]).is_err());
        let mut conventional = self::config();
        assert!(conventional.add_extended_capability(1, 1, &[], &[]).is_err());
    }

    #[test]
    fn bad_bars_are_refused() {
        let mut config = config();
        let mem = BarKind::Memory64 { prefetchable: false };
        assert_eq!(config.add_bar(1, BarKind::Memory32, 0x1000), Err(ConfigError::BarIndex { index: 1 }));
        assert_eq!(config.add_bar(5, mem, 0x1000), Err(ConfigError::BarIndex { index: 5 }));
        assert_eq!(config.add_bar(3, mem, 24), Err(ConfigError::BarSize { index: 3, size: 24 }));
        assert_eq!(config.add_bar(9, mem, 0x1000), Err(ConfigError::BarIndex { index: 9 }));
    }
}
