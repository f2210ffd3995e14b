//! Dispatch of port and memory-mapped I/O to devices.
//!
//! Two maps, one of the 65536 ports and one of the guest-physical address space, say which device
//! answers where. Both are filled before the first vCPU runs and never change afterwards, so a
//! lookup takes no lock: a binary search over sorted ranges. (What moves at run time, PCI BARs,
//! moves inside the windows that [`crate::pci::PciRoot`] registers.)
//!
//! Devices take `&self` and lock what they must themselves, so that two vCPUs at two devices never
//! wait for each other.
//!
//! What nobody answers reads as all ones and ignores writes, as an undriven bus does; both are
//! counted. An access that reaches over a range's end is split into bytes, and each byte is answered
//! for itself.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use mmu::Gpa;

/// A device with I/O ports.
pub trait PortDevice: Send + Sync {
    /// Reads `data.len()` bytes (1, 2 or 4) at `offset` from the start of the registered range. All of
    /// the access lies in the range.
    fn read(&self, offset: u16, data: &mut [u8]);
    /// Writes `data` (1, 2 or 4 bytes) at `offset` from the start of the registered range.
    fn write(&self, offset: u16, data: &[u8]);
}

/// A device with memory-mapped registers.
pub trait MmioDevice: Send + Sync {
    /// Reads `data.len()` bytes (1 to 64) at `offset` from the start of the registered range. All of the
    /// access lies in the range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` from the start of the registered range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device could not be put on the bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// Two devices would answer the same address.
    #[error("{name} wants {start:#x}..{end:#x}, where {other} is already")]
    Overlap {
        /// The device that came second.
        name: &'static str,
        /// First address or port.
        start: u64,
        /// Address or port after the last.
        end: u64,
        /// The device that came first.
        other: &'static str,
    },
    /// The range is empty or ends past the address space.
    #[error("{name} wants {length:#x} addresses at {start:#x}: empty, or past the end of the bus")]
    BadRange {
        /// The device.
        name: &'static str,
        /// First address or port.
        start: u64,
        /// How many.
        length: u64,
    },
}

/// Accesses that no device answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unclaimed {
    /// Reads, answered with all ones.
    pub reads: u64,
    /// Writes, ignored.
    pub writes: u64,
}

/// A sorted map of disjoint ranges to devices.
struct Ranges<D: ?Sized> {
    entries: Vec<Entry<D>>,
    reads: AtomicU64,
    writes: AtomicU64,
}

struct Entry<D: ?Sized> {
    range: Range<u64>,
    name: &'static str,
    device: Arc<D>,
}

impl<D: ?Sized> Default for Ranges<D> {
    fn default() -> Self {
        Self { entries: Vec::new(), reads: AtomicU64::new(0), writes: AtomicU64::new(0) }
    }
}

impl<D: ?Sized> Ranges<D> {
    fn insert(
        &mut self,
        name: &'static str,
        start: u64,
        length: u64,
        limit: u64,
        device: Arc<D>,
    ) -> Result<(), BusError> {
        let end = match start.checked_add(length) {
            Some(end) if length != 0 && end <= limit => end,
            _ => return Err(BusError::BadRange { name, start, length }),
        };
        let at = self.entries.partition_point(|e| e.range.end <= start);
        if let Some(next) = self.entries.get(at)
            && next.range.start < end
        {
            return Err(BusError::Overlap { name, start, end, other: next.name });
        }
        self.entries.insert(at, Entry { range: start..end, name, device });
        Ok(())
    }

    /// Who answers the `length` bytes at `address`.
    #[inline]
    fn lookup(&self, address: u64, length: usize) -> Lookup<'_, D> {
        let at = self.entries.partition_point(|e| e.range.end <= address);
        let length = length as u64;
        match self.entries.get(at) {
            Some(e) if e.range.start <= address => {
                if length <= e.range.end - address {
                    Lookup::Device(&*e.device, address - e.range.start)
                } else {
                    Lookup::Split
                }
            }
            Some(e) if e.range.start - address < length => Lookup::Split,
            _ => Lookup::Nobody,
        }
    }

    fn unclaimed(&self) -> Unclaimed {
        Unclaimed { reads: self.reads.load(Ordering::Relaxed), writes: self.writes.load(Ordering::Relaxed) }
    }
}

/// The answer to an access.
enum Lookup<'a, D: ?Sized> {
    /// One device, all of it, at this offset.
    Device(&'a D, u64),
    /// Part of it is at a device and part is not, or at another one.
    Split,
    /// No device.
    Nobody,
}

/// The ports and the memory-mapped devices of the machine.
#[derive(Default)]
pub struct Bus {
    ports: Ranges<dyn PortDevice>,
    mmio: Ranges<dyn MmioDevice>,
}

impl Bus {
    /// A bus with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at ports `start..start + count`. `name` is for messages.
    ///
    /// # Errors
    /// When another device is there, or the range is empty or passes port 0xffff.
    pub fn add_ports(
        &mut self,
        name: &'static str,
        start: u16,
        count: u16,
        device: Arc<dyn PortDevice>,
    ) -> Result<(), BusError> {
        self.ports.insert(name, start.into(), count.into(), 0x1_0000, device)
    }

    /// Puts a device at guest-physical `start..start + size`. `name` is for messages.
    ///
    /// # Errors
    /// When another device is there, or the range is empty or passes the end of the address space.
    pub fn add_mmio(
        &mut self,
        name: &'static str,
        start: Gpa,
        size: u64,
        device: Arc<dyn MmioDevice>,
    ) -> Result<(), BusError> {
        self.mmio.insert(name, start.0, size, u64::MAX, device)
    }

    /// `IN`: reads 1, 2 or 4 bytes from `port`.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match self.ports.lookup(port.into(), data.len()) {
            Lookup::Device(device, offset) => device.read(offset as u16, data),
            Lookup::Split => {
                for (i, byte) in data.chunks_mut(1).enumerate() {
                    self.port_read(port.wrapping_add(i as u16), byte);
                }
            }
            Lookup::Nobody => {
                self.ports.reads.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
        }
    }

    /// `OUT`: writes 1, 2 or 4 bytes to `port`.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        match self.ports.lookup(port.into(), data.len()) {
            Lookup::Device(device, offset) => device.write(offset as u16, data),
            Lookup::Split => {
                for (i, byte) in data.chunks(1).enumerate() {
                    self.port_write(port.wrapping_add(i as u16), byte);
                }
            }
            Lookup::Nobody => {
                self.ports.writes.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Reads guest-physical memory that is not RAM.
    pub fn mmio_read(&self, address: Gpa, data: &mut [u8]) {
        match self.mmio.lookup(address.0, data.len()) {
            Lookup::Device(device, offset) => device.read(offset, data),
            Lookup::Split => {
                for (i, byte) in data.chunks_mut(1).enumerate() {
                    self.mmio_read(address.wrapping_add(i as u64), byte);
                }
            }
            Lookup::Nobody => {
                self.mmio.reads.fetch_add(1, Ordering::Relaxed);
                data.fill(0xff);
            }
        }
    }

    /// Writes guest-physical memory that is not RAM.
    pub fn mmio_write(&self, address: Gpa, data: &[u8]) {
        match self.mmio.lookup(address.0, data.len()) {
            Lookup::Device(device, offset) => device.write(offset, data),
            Lookup::Split => {
                for (i, byte) in data.chunks(1).enumerate() {
                    self.mmio_write(address.wrapping_add(i as u64), byte);
                }
            }
            Lookup::Nobody => {
                self.mmio.writes.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Port accesses so far that no device answered.
    pub fn unclaimed_ports(&self) -> Unclaimed {
        self.ports.unclaimed()
    }

    /// Memory accesses so far that neither RAM nor a device answered.
    pub fn unclaimed_mmio(&self) -> Unclaimed {
        self.mmio.unclaimed()
    }
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ports = self.ports.entries.iter().map(|e| (e.name, e.range.clone()));
        let mmio = self.mmio.entries.iter().map(|e| (e.name, e.range.clone()));
        f.debug_list().entries(ports).entries(mmio).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Answers each byte with its offset and keeps what was written.
    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl PortDevice for Echo {
        fn read(&self, offset: u16, data: &mut [u8]) {
            MmioDevice::read(self, offset.into(), data);
        }
        fn write(&self, offset: u16, data: &[u8]) {
            MmioDevice::write(self, offset.into(), data);
        }
    }

    impl MmioDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            for (i, b) in data.iter_mut().enumerate() {
                *b = offset as u8 + i as u8;
            }
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn finds_the_device_or_nothing() {
        let echo = Arc::new(Echo::default());
        let mut bus = Bus::new();
        bus.add_ports("b", 0x20, 4, echo.clone()).unwrap();
        bus.add_ports("a", 0x10, 8, echo.clone()).unwrap();
        bus.add_mmio("m", Gpa(0x1000), 0x100, echo.clone()).unwrap();
        let mut four = [0; 4];
        bus.port_read(0x12, &mut four);
        assert_eq!(four, [2, 3, 4, 5]);
        bus.port_read(0x0f, &mut four[..1]);
        assert_eq!(four[0], 0xff);
        bus.port_read(0x30, &mut four);
        assert_eq!((four, bus.unclaimed_ports().reads), ([0xff; 4], 2));
        bus.mmio_write(Gpa(0x10fe), &[7, 8]);
        bus.mmio_write(Gpa(0x1100), &[9]);
        assert_eq!(*echo.0.lock().unwrap(), [(0xfe, vec![7, 8])]);
        assert_eq!(bus.unclaimed_mmio(), Unclaimed { reads: 0, writes: 1 });
    }

    #[test]
    fn accesses_over_an_edge_are_split_into_bytes() {
        let echo = Arc::new(Echo::default());
        let mut bus = Bus::new();
        bus.add_ports("a", 0x10, 2, echo.clone()).unwrap();
        bus.add_ports("b", 0x13, 1, echo.clone()).unwrap();
        bus.add_mmio("last", Gpa(u64::MAX - 0x10), 0x10, echo.clone()).unwrap();
        let mut four = [0; 4];
        bus.port_read(0x10, &mut four);
        assert_eq!(four, [0, 1, 0xff, 0]);
        bus.port_read(0x0e, &mut four);
        assert_eq!(four, [0xff, 0xff, 0, 1]);
        bus.port_read(0xffff, &mut four);
        assert_eq!(four, [0xff; 4]);
        bus.port_write(0x13, &[1, 2]);
        assert_eq!(*echo.0.lock().unwrap(), [(0, vec![1])]);
        bus.mmio_read(Gpa(u64::MAX - 1), &mut four);
        assert_eq!(four, [0xf, 0xff, 0xff, 0xff], "wraps without a panic");
    }

    #[test]
    fn refuses_overlaps_and_bad_ranges() {
        let echo = Arc::new(Echo::default());
        let mut bus = Bus::new();
        bus.add_ports("a", 0x10, 8, echo.clone()).unwrap();
        for (start, count) in [(0x10, 1), (0x0f, 2), (0x17, 1), (0, 0xffff)] {
            assert!(matches!(
                bus.add_ports("b", start, count, echo.clone()),
                Err(BusError::Overlap { other: "a", .. })
            ));
        }
        bus.add_ports("c", 0x18, 1, echo.clone()).unwrap();
        bus.add_ports("d", 0x0f, 1, echo.clone()).unwrap();
        assert!(matches!(bus.add_ports("e", 0xffff, 2, echo.clone()), Err(BusError::BadRange { .. })));
        assert!(matches!(bus.add_mmio("f", Gpa(5), 0, echo), Err(BusError::BadRange { .. })));
    }
}
