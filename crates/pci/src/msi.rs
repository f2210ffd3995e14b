//! MSI: the capability of one PCI function, as a driver programs it.
//!
//! # Theory of operation
//!
//! PCI Local Bus 3.0, section 6.8.1. One address and one data word serve up to 32 vectors, whose number takes the place of
//! the data's low bits. Which registers there are follows from the control word: whether the address has 64 bits,
//! and whether vectors can be masked one by one. Raising a vector gives a [`Message`] at once when MSI is enabled, the vector is
//! not masked, and the function may be bus master. What is masked becomes pending and is given out when that ends; what
//! is raised while MSI is disabled is lost, as it would be on a wire that nobody looks at.

use crate::msix::Message;

/// Capability ID of MSI (PCI 3.0, appendix H).
pub const CAPABILITY_ID: u8 = 0x05;

/// Offset of the control word in the capability.
const CONTROL: usize = 2;
const CONTROL_ENABLE: u16 = 1 << 0;
/// Binary logarithm of how many vectors the function has, and of how many the driver uses.
const CONTROL_CAPABLE: u16 = 1;
const CONTROL_USED: u16 = 4;
const CONTROL_WIDE: u16 = 1 << 7;
const CONTROL_MASKABLE: u16 = 1 << 8;
/// Offset of the address.
const ADDRESS: usize = 4;
/// Bytes of the longest form.
const LONGEST: usize = 0x18;

/// Which form the capability has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiLayout {
    /// How many vectors: 1, 2, 4, 8, 16 or 32.
    pub vectors: u8,
    /// The address has 64 bits.
    pub wide: bool,
    /// Vectors can be masked one by one.
    pub maskable: bool,
}

impl MsiLayout {
    /// The form that a control word tells. None for a number of vectors that is reserved.
    #[must_use]
    pub fn from_control(control: u16) -> Option<Self> {
        let vectors =
            1u8.checked_shl((control >> CONTROL_CAPABLE & 7).into()).filter(|vectors| *vectors <= 32)?;
        Some(Self { vectors, wide: control & CONTROL_WIDE != 0, maskable: control & CONTROL_MASKABLE != 0 })
    }

    /// Bytes of the capability, its header included.
    #[must_use]
    pub fn size(&self) -> u16 {
        let end = if self.maskable { self.pending() + 4 } else { self.data() + 2 };
        u16::try_from(end).unwrap_or(u16::MAX)
    }

    fn data(&self) -> usize {
        if self.wide { ADDRESS + 8 } else { ADDRESS + 4 }
    }

    fn mask(&self) -> usize {
        self.data() + 4
    }

    fn pending(&self) -> usize {
        self.mask() + 4
    }

    fn control(&self) -> u16 {
        let log = u16::try_from(self.vectors.trailing_zeros()).unwrap_or(0);
        let mut control = log << CONTROL_CAPABLE;
        if self.wide {
            control |= CONTROL_WIDE;
        }
        if self.maskable {
            control |= CONTROL_MASKABLE;
        }
        control
    }
}

/// MSI state of one function.
#[derive(Debug)]
pub struct Msi {
    layout: MsiLayout,
    /// The capability's bytes.
    registers: [u8; LONGEST],
    /// Their bits that software may change.
    writable: [u8; LONGEST],
    pending: u32,
    bus_master: bool,
}

impl Msi {
    /// Disabled.
    #[must_use]
    pub fn new(layout: MsiLayout) -> Self {
        let mut msi =
            Self { layout, registers: [0; LONGEST], writable: [0; LONGEST], pending: 0, bus_master: false };
        put(&mut msi.registers, CONTROL, &layout.control().to_le_bytes());
        put(&mut msi.writable, CONTROL, &(CONTROL_ENABLE | 7 << CONTROL_USED).to_le_bytes());
        // Bits 0-1 of the address are reserved as zero: messages are dword writes.
        put(&mut msi.writable, ADDRESS, &[0xfc, 0xff, 0xff, 0xff]);
        if layout.wide {
            put(&mut msi.writable, ADDRESS + 4, &[0xff; 4]);
        }
        put(&mut msi.writable, layout.data(), &[0xff; 2]);
        if layout.maskable {
            let mask = (1u64 << layout.vectors) - 1;
            put(&mut msi.writable, layout.mask(), &u32::try_from(mask).unwrap_or(u32::MAX).to_le_bytes());
        }
        msi
    }

    /// How many vectors the driver uses; none when MSI is disabled. Enabled, INTx must stay quiet.
    #[must_use]
    pub fn enabled(&self) -> Option<u32> {
        let control = self.word(CONTROL);
        let used = 1u32 << (control >> CONTROL_USED & 7);
        (control & CONTROL_ENABLE != 0).then_some(used.min(self.layout.vectors.into()))
    }

    /// Takes over the bus master bit of the command register; returns messages that became free.
    #[must_use]
    pub fn set_bus_master(&mut self, on: bool) -> Vec<Message> {
        self.bus_master = on;
        self.take_pending()
    }

    /// Reads the capability from `offset`; bytes past it are zero.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let pending = self.pending.to_le_bytes();
        for (at, byte) in (usize::from(offset)..).zip(data) {
            let within = at.checked_sub(self.layout.pending()).filter(|_| self.layout.maskable);
            let pending = within.and_then(|within| pending.get(within));
            *byte = pending.or(self.registers.get(at)).copied().unwrap_or(0);
        }
    }

    /// Writes the capability from `offset`; returns messages that became free.
    #[must_use]
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Vec<Message> {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            if let (Some(register), Some(writable)) = (self.registers.get_mut(at), self.writable.get(at)) {
                *register = *register & !writable | byte & writable;
            }
        }
        if self.enabled().is_none() {
            self.pending = 0;
        }
        self.take_pending()
    }

    /// Raises a vector: the message to send now, or none while it is masked (it is then pending), while MSI is disabled, or
    /// for a vector that the driver does not use.
    #[must_use]
    pub fn raise(&mut self, vector: u32) -> Option<Message> {
        let used = self.enabled().filter(|used| vector < *used)?;
        if self.bus_master && self.masked() & 1 << vector == 0 {
            Some(self.message(vector, used))
        } else {
            self.pending |= 1 << vector;
            None
        }
    }

    fn take_pending(&mut self) -> Vec<Message> {
        let (Some(used), true) = (self.enabled(), self.bus_master) else { return Vec::new() };
        let free = self.pending & !self.masked();
        self.pending &= !free;
        (0..used).filter(|vector| free & 1 << vector != 0).map(|vector| self.message(vector, used)).collect()
    }

    fn message(&self, vector: u32, used: u32) -> Message {
        let low = u64::from(self.dword(ADDRESS));
        let high = if self.layout.wide { u64::from(self.dword(ADDRESS + 4)) } else { 0 };
        let data = u32::from(self.word(self.layout.data()));
        Message { address: high << 32 | low, data: data & !(used - 1) | vector }
    }

    fn masked(&self) -> u32 {
        if self.layout.maskable { self.dword(self.layout.mask()) } else { 0 }
    }

    fn word(&self, at: usize) -> u16 {
        self.dword(at).to_le_bytes().first_chunk().map_or(0, |word| u16::from_le_bytes(*word))
    }

    fn dword(&self, at: usize) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|i| self.registers.get(at + i).copied().unwrap_or(0)))
    }
}

fn put(registers: &mut [u8; LONGEST], at: usize, bytes: &[u8]) {
    for (to, from) in registers.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: MsiLayout = MsiLayout { vectors: 1, wide: false, maskable: false };
    const FULL: MsiLayout = MsiLayout { vectors: 8, wide: true, maskable: true };

    fn read<const N: usize>(msi: &Msi, offset: u16) -> [u8; N] {
        let mut data = [0xaa; N];
        msi.read(offset, &mut data);
        data
    }

    #[test]
    fn the_control_word_tells_the_form() {
        for layout in [PLAIN, FULL] {
            let control = u16::from_le_bytes(read(&Msi::new(layout), 2));
            assert_eq!(MsiLayout::from_control(control), Some(layout));
        }
        assert_eq!(MsiLayout::from_control(6 << 1), None, "reserved");
        let size = |wide, maskable| MsiLayout { vectors: 1, wide, maskable }.size();
        assert_eq!(
            [size(false, false), size(true, false), size(false, true), size(true, true)],
            [10, 14, 20, 24]
        );
    }

    #[test]
    fn only_what_a_driver_programs_can_be_written() {
        let mut msi = Msi::new(FULL);
        assert!(msi.write(0, &[0xff; 0x20]).is_empty());
        assert_eq!(read(&msi, 2), (0x0186u16 | 0x71).to_le_bytes());
        assert_eq!(read(&msi, 4), [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(read(&msi, 12), [0xff, 0xff, 0, 0, 0xff, 0, 0, 0], "data, reserved, 8 masks");
        assert_eq!(read(&msi, 20), [0; 8], "pending, and past the end");
        assert_eq!(msi.enabled(), Some(8), "no more than it has");
    }

    #[test]
    fn the_vector_is_in_the_data() {
        let mut msi = Msi::new(FULL);
        assert_eq!(msi.raise(0), None, "disabled");
        let _ = msi.write(4, &0x12_fee0_1000u64.to_le_bytes());
        let _ = msi.write(12, &0x4143u16.to_le_bytes());
        let _ = msi.write(2, &[0x21, 0]);
        assert!(msi.set_bus_master(true).is_empty(), "what came before it was enabled is lost");
        assert_eq!(msi.enabled(), Some(4));
        assert_eq!(msi.raise(2), Some(Message { address: 0x12_fee0_1000, data: 0x4142 }));
        assert_eq!(msi.raise(4), None, "not used");
    }

    #[test]
    fn a_masked_vector_waits() {
        let mut msi = Msi::new(FULL);
        let _ = msi.write(2, &[0x31, 0]);
        let _ = msi.write(16, &[0b10]);
        assert_eq!((msi.raise(0), msi.raise(1)), (None, None), "no bus master");
        assert_eq!(read(&msi, 20), [0b11]);
        assert_eq!(msi.set_bus_master(true), [Message { address: 0, data: 0 }]);
        assert_eq!(read(&msi, 20), [0b10]);
        assert_eq!(msi.write(16, &[0]), [Message { address: 0, data: 1 }]);
        assert_eq!(read(&msi, 20), [0]);
        let _ = msi.write(16, &[1]);
        assert_eq!(msi.raise(0), None);
        let _ = msi.write(2, &[0]);
        assert_eq!(read(&msi, 20), [0], "disabled");
    }

    #[test]
    fn the_short_form_has_no_upper_half() {
        let mut msi = Msi::new(PLAIN);
        let _ = msi.write(2, &[1, 0, 0, 0x10, 0xe0, 0xfe, 0x41, 0]);
        let _ = msi.set_bus_master(true);
        assert_eq!(msi.raise(0), Some(Message { address: 0xfee0_1000, data: 0x41 }));
    }
}
