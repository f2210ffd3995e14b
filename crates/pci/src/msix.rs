//! MSI-X: the vector table, the pending bits and the masks of one PCI function.
//!
//! # Theory of operation
//!
//! PCI Local Bus 3.0, section 6.8.2. A vector is 16 bytes in the table: message address, message data, and a
//! control dword whose bit 0 masks it. Raising a vector gives a [`Message`] at once when MSI-X is enabled,
//! neither the function nor the vector is masked, and the function may be bus master; otherwise its pending
//! bit is set. When the last obstacle goes away, the pending vectors are given out in one go. Nothing here
//! calls out: messages are returned, and the owner sends them through its [`MsiSink`] without holding locks
//! of this module.

use crate::config::{ConfigError, PciConfig};

/// Capability ID of MSI-X (PCI 3.0, appendix H).
const CAPABILITY_ID: u8 = 0x11;
/// Bytes of one table entry.
pub const ENTRY_SIZE: u64 = 16;
/// The capability's control word: enable, and mask of the whole function.
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

/// Takes message-signalled interrupts; the machine implements it.
///
/// An implementation must not wait for a lock that is held around calls of the function: a reset waits for the
/// device's threads, and they may be just here.
pub trait MsiSink: Send + Sync {
    /// A 32-bit write of `data` to guest-physical `address`, as the function's MSI. Any value may come: the
    /// guest chooses them. Called from any thread.
    fn signal(&self, address: u64, data: u32);
}

/// A level-triggered interrupt wire; the machine implements it, under the same rule as [`MsiSink`].
pub trait IntxLine: Send + Sync {
    /// Drives the wire: `true` is asserted. May be called with the level it has. Called from any thread.
    fn set(&self, level: bool);
}

/// One message to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Guest-physical address of the write.
    pub address: u64,
    /// The dword written.
    pub data: u32,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

impl Entry {
    /// After reset every vector is masked (PCI 3.0, section 6.8.2.9).
    const RESET: Entry = Entry { address: 0, data: 0, masked: true, pending: false };

    fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12] = u8::from(self.masked);
        bytes
    }
}

/// Where a function's MSI-X structures lie.
#[derive(Debug, Clone, Copy)]
pub struct MsixLayout {
    /// Number of vectors, 1 to 2048.
    pub vectors: u16,
    /// The BAR that holds both structures.
    pub bar: u8,
    /// Offset of the vector table in it, a multiple of 8.
    pub table: u32,
    /// Offset of the pending bit array in it, a multiple of 8.
    pub pba: u32,
}

impl MsixLayout {
    /// Adds the capability to a configuration space and returns its offset.
    ///
    /// # Errors
    /// [`ConfigError::CapabilitySpace`].
    pub fn add_capability(&self, config: &mut PciConfig) -> Result<u8, ConfigError> {
        let mut body = Vec::with_capacity(10);
        body.extend_from_slice(&self.vectors.saturating_sub(1).to_le_bytes());
        body.extend_from_slice(&(self.table & !7 | u32::from(self.bar)).to_le_bytes());
        body.extend_from_slice(&(self.pba & !7 | u32::from(self.bar)).to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        config.add_capability(CAPABILITY_ID, &body, &writable)
    }
}

/// MSI-X state of one function.
#[derive(Debug)]
pub struct Msix {
    entries: Vec<Entry>,
    enabled: bool,
    function_masked: bool,
    bus_master: bool,
}

impl Msix {
    /// `vectors` vectors, all masked, MSI-X disabled.
    #[must_use]
    pub fn new(vectors: u16) -> Self {
        Msix {
            entries: vec![Entry::RESET; usize::from(vectors)],
            enabled: false,
            function_masked: false,
            bus_master: false,
        }
    }

    /// Number of vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.entries.len()).unwrap_or(u16::MAX)
    }

    /// Software uses MSI-X, so INTx must stay quiet.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Takes over the control word of the capability; returns messages that became free.
    #[must_use]
    pub fn set_control(&mut self, control: u16) -> Vec<Message> {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.function_masked = control & CONTROL_FUNCTION_MASK != 0;
        self.take_pending()
    }

    /// Takes over the bus master bit of the command register; returns messages that became free.
    #[must_use]
    pub fn set_bus_master(&mut self, on: bool) -> Vec<Message> {
        self.bus_master = on;
        self.take_pending()
    }

    /// Raises a vector: the message to send now, or none while masked or disabled (it is then pending), or for
    /// a vector that does not exist.
    #[must_use]
    pub fn raise(&mut self, vector: u16) -> Option<Message> {
        let open = self.open();
        let entry = self.entries.get_mut(usize::from(vector))?;
        if open && !entry.masked {
            Some(Message { address: entry.address, data: entry.data })
        } else {
            entry.pending = true;
            None
        }
    }

    fn open(&self) -> bool {
        self.enabled && !self.function_masked && self.bus_master
    }

    fn take_pending(&mut self) -> Vec<Message> {
        if !self.open() {
            return Vec::new();
        }
        let free = self.entries.iter_mut().filter(|entry| entry.pending && !entry.masked);
        free.map(|entry| {
            entry.pending = false;
            Message { address: entry.address, data: entry.data }
        })
        .collect()
    }

    /// Reads the vector table; bytes past it are zero.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let at = offset.saturating_add(i as u64);
            let entry = usize::try_from(at / ENTRY_SIZE).ok().and_then(|n| self.entries.get(n));
            let within = usize::try_from(at % ENTRY_SIZE).unwrap_or(0);
            *byte = entry.and_then(|entry| entry.to_bytes().get(within).copied()).unwrap_or(0);
        }
    }

    /// Writes the vector table, any width; returns messages that became free.
    #[must_use]
    pub fn table_write(&mut self, offset: u64, data: &[u8]) -> Vec<Message> {
        for (i, byte) in data.iter().enumerate() {
            let at = offset.saturating_add(i as u64);
            let Some(entry) = usize::try_from(at / ENTRY_SIZE).ok().and_then(|n| self.entries.get_mut(n))
            else {
                continue;
            };
            let within = at % ENTRY_SIZE;
            let replace = |word: u64, at: u64| {
                let shift = 8 * at;
                word & !(0xff << shift) | u64::from(*byte) << shift
            };
            match within {
                // Bits 0-1 of the address are reserved as zero: messages are dword writes.
                0..=7 => entry.address = replace(entry.address, within) & !3,
                8..=11 => {
                    let data = replace(u64::from(entry.data), within - 8);
                    entry.data = u32::try_from(data & 0xffff_ffff).unwrap_or(0);
                }
                12 => entry.masked = byte & 1 != 0,
                _ => {}
            }
        }
        self.take_pending()
    }

    /// Reads the pending bit array; bytes past it are zero.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            let first = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(i).saturating_mul(8);
            let bits = (0..8).filter(|bit| {
                self.entries.get(first.saturating_add(*bit)).is_some_and(|entry| entry.pending)
            });
            *byte = bits.fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    /// Back to the state of [`Msix::new`].
    pub fn reset(&mut self) {
        *self = Msix::new(self.vectors());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENABLE: u16 = CONTROL_ENABLE;

    fn programmed() -> Msix {
        let mut msix = Msix::new(3);
        for vector in 0..3u64 {
            let mut entry = [0; 16];
            entry[..8].copy_from_slice(&(0xfee0_0000 + (vector << 12)).to_le_bytes());
            entry[8] = 0x40 + vector as u8;
            assert!(msix.table_write(vector * 16, &entry).is_empty());
        }
        msix
    }

    fn message(vector: u64) -> Message {
        Message { address: 0xfee0_0000 + (vector << 12), data: 0x40 + vector as u32 }
    }

    #[test]
    fn a_vector_fires_only_when_nothing_masks_it() {
        let mut msix = programmed();
        assert_eq!(msix.raise(1), None, "disabled");
        assert!(msix.set_control(ENABLE).is_empty(), "no bus master");
        assert_eq!(msix.set_bus_master(true), [message(1)]);
        assert_eq!(msix.raise(1), Some(message(1)));
        assert_eq!(msix.raise(3), None, "no such vector");
    }

    #[test]
    fn masks_make_pending_bits_and_unmasking_sends() {
        let mut msix = programmed();
        assert!(msix.set_bus_master(true).is_empty());
        assert!(msix.set_control(ENABLE | CONTROL_FUNCTION_MASK).is_empty());
        assert_eq!(msix.raise(0), None);
        assert_eq!(msix.raise(2), None);
        let mut pba = [0; 8];
        msix.pba_read(0, &mut pba);
        assert_eq!(pba, [0b101, 0, 0, 0, 0, 0, 0, 0]);
        // Vector 2 masked: only 0 goes when the function is unmasked.
        assert!(msix.table_write(2 * 16 + 12, &[1, 0, 0, 0]).is_empty());
        assert_eq!(msix.set_control(ENABLE), [message(0)]);
        msix.pba_read(0, &mut pba);
        assert_eq!(pba[0], 0b100);
        assert_eq!(msix.table_write(2 * 16 + 12, &[0]), [message(2)]);
        msix.pba_read(0, &mut pba);
        assert_eq!(pba[0], 0);
    }

    #[test]
    fn table_takes_any_width_and_offset() {
        let mut msix = programmed();
        let _ = msix.table_write(6, &[1, 2, 3, 4, 5]);
        let mut entry = [0; 16];
        msix.table_read(0, &mut entry);
        assert_eq!(entry, [0, 0, 0xe0, 0xfe, 0, 0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0]);
        let _ = msix.table_write(3 * 16 - 2, &[0xff; 8]);
        let _ = msix.table_write(u64::MAX - 2, &[0xff; 8]);
        let mut data = [0xaa; 8];
        msix.table_read(u64::MAX - 2, &mut data);
        assert_eq!(data, [0; 8]);
        msix.pba_read(u64::MAX - 2, &mut data);
        assert_eq!(data, [0; 8]);
        msix.reset();
        msix.table_read(12, &mut data[..1]);
        assert_eq!(data[0], 1, "masked after reset");
    }
}
