//! The driver's side of a virtio PCI function, as small as the tests need it.
#![allow(dead_code, unreachable_pub, reason = "each test program uses a part")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use pci::msix::MsiSink;
use virtio::device::VirtioDevice;
use virtio::pci::VirtioPci;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest memory as the machine has it: with a dirty bitmap.
pub type Mem = GuestMemoryMmap<vm_memory::bitmap::AtomicBitmap>;

pub const MEM_SIZE: usize = 32 << 20;
const RINGS: u64 = 0x10_0000;
const BUFFERS: u64 = 0x40_0000;

pub const REGISTERS: u64 = 0x80_0000_0000;
pub const MSIX: u64 = 0x80_0010_0000;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

pub const VERSION_1: u64 = 1 << 32;
pub const EVENT_IDX: u64 = 1 << 29;
pub const INDIRECT_DESC: u64 = 1 << 28;

/// Collects messages by vector; the data of a vector's message is its number.
#[derive(Default)]
pub struct Irqs {
    lenient: std::sync::atomic::AtomicBool,
    counts: Mutex<Vec<u64>>,
    arrived: Condvar,
}

impl MsiSink for Irqs {
    fn signal(&self, address: u64, data: u32) {
        if self.lenient.load(Ordering::SeqCst) {
            return;
        }
        assert_eq!(address, 0xfee0_0000);
        let mut counts = self.counts.lock().unwrap();
        let vector = data as usize;
        if counts.len() <= vector {
            counts.resize(vector + 1, 0);
        }
        counts[vector] += 1;
        self.arrived.notify_all();
    }
}

impl Irqs {
    pub fn count(&self, vector: usize) -> u64 {
        self.counts.lock().unwrap().get(vector).copied().unwrap_or(0)
    }

    /// Waits until more than `seen` messages of this vector came.
    pub fn wait(&self, vector: usize, seen: u64) {
        let counts = self.counts.lock().unwrap();
        let missing = |counts: &mut Vec<u64>| counts.get(vector).copied().unwrap_or(0) <= seen;
        let (_counts, timeout) =
            self.arrived.wait_timeout_while(counts, Duration::from_secs(20), missing).unwrap();
        assert!(!timeout.timed_out(), "no interrupt of vector {vector}");
    }
}

struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    free: Vec<u16>,
    chains: Vec<Vec<u16>>,
    avail_idx: u16,
    used_idx: u16,
}

/// A driver, its memory and its device.
pub struct Guest {
    pub pci: VirtioPci<Arc<Mem>>,
    pub mem: Arc<Mem>,
    pub irqs: Arc<Irqs>,
    rings: Vec<Option<Ring>>,
    next_ring: u64,
    next_buffer: u64,
}

impl Guest {
    /// The function with addresses, memory decoding and bus mastering; MSI-X on, vector n sends n.
    pub fn new(device: impl VirtioDevice<Arc<Mem>> + 'static) -> Guest {
        let mem = Arc::new(Mem::from_ranges(&[(GuestAddress(0), MEM_SIZE)]).unwrap());
        let irqs = Arc::new(Irqs::default());
        let mut pci = VirtioPci::new(Box::new(device), Arc::clone(&mem), irqs.clone(), None).unwrap();
        pci.set_bar_address(0, REGISTERS);
        pci.set_bar_address(2, MSIX);
        let mut guest = Guest { pci, mem, irqs, rings: Vec::new(), next_ring: RINGS, next_buffer: BUFFERS };
        guest.pci.config_write(4, &6u16.to_le_bytes());
        let msix = guest.capability(0x11, |_| true).unwrap();
        guest.pci.config_write(msix + 2, &0x8000u16.to_le_bytes());
        let mut control = [0; 2];
        guest.pci.config_read(msix + 2, &mut control);
        for vector in 0..u64::from(u16::from_le_bytes(control) & 0x7ff) + 1 {
            let mut entry = [0; 16];
            entry[..4].copy_from_slice(&0xfee0_0000u32.to_le_bytes());
            entry[8] = vector as u8;
            guest.pci.bar_write(2, vector * 16, &entry);
        }
        guest
    }

    /// Like [`Guest::new`], for tests that send interrupts anywhere.
    pub fn sink(device: impl VirtioDevice<Arc<Mem>> + 'static) -> Guest {
        let guest = Guest::new(device);
        guest.irqs.lenient.store(true, Ordering::SeqCst);
        guest
    }

    /// Gives the memory of all rings and buffers back.
    pub fn rewind(&mut self) {
        self.next_ring = RINGS;
        self.next_buffer = BUFFERS;
    }

    /// Offset of the first capability with this ID that `accept` likes (it gets the offset).
    pub fn capability(&mut self, id: u8, accept: impl Fn(&[u8; 16]) -> bool) -> Option<u16> {
        let mut pointer = [0; 1];
        self.pci.config_read(0x34, &mut pointer);
        let mut at = u16::from(pointer[0]);
        while at != 0 {
            let mut cap = [0; 16];
            self.pci.config_read(at, &mut cap);
            if cap[0] == id && accept(&cap) {
                return Some(at);
            }
            at = u16::from(cap[1]);
        }
        None
    }

    pub fn read<const N: usize>(&mut self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.pci.bar_read(0, offset, &mut data);
        data
    }

    pub fn read16(&mut self, offset: u64) -> u16 {
        u16::from_le_bytes(self.read(offset))
    }

    pub fn read32(&mut self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read(offset))
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) {
        self.pci.bar_write(0, offset, data);
    }

    pub fn status(&mut self) -> u8 {
        self.read::<1>(20)[0]
    }

    pub fn set_status(&mut self, status: u8) {
        self.write(20, &[status]);
    }

    pub fn offered(&mut self) -> u64 {
        self.write(0, &0u32.to_le_bytes());
        let low = self.read32(4);
        self.write(0, &1u32.to_le_bytes());
        u64::from(low) | u64::from(self.read32(4)) << 32
    }

    /// Up to FEATURES_OK, with these features of those offered.
    pub fn negotiate(&mut self, wanted: u64) -> u64 {
        self.set_status(0);
        assert_eq!(self.status(), 0);
        self.rings.clear();
        self.set_status(1);
        self.set_status(3);
        let features = self.offered() & wanted;
        self.write(8, &0u32.to_le_bytes());
        self.write(12, &(features as u32).to_le_bytes());
        self.write(8, &1u32.to_le_bytes());
        self.write(12, &((features >> 32) as u32).to_le_bytes());
        self.set_status(11);
        assert_eq!(self.status(), 11, "FEATURES_OK");
        features
    }

    /// All queues, at their full size, and DRIVER_OK.
    pub fn start(&mut self) {
        self.write(16, &0u16.to_le_bytes());
        for index in 0..self.read16(18) {
            self.setup_queue(index, None);
        }
        self.set_status(15);
    }

    /// The whole way to a running device.
    pub fn run(&mut self, wanted: u64) -> u64 {
        let features = self.negotiate(wanted);
        self.start();
        assert_eq!(self.status(), 15, "DRIVER_OK");
        features
    }

    pub fn setup_queue(&mut self, index: u16, size: Option<u16>) {
        self.write(22, &index.to_le_bytes());
        if let Some(size) = size {
            self.write(24, &size.to_le_bytes());
        }
        let size = self.read16(24);
        assert!(size > 0);
        let desc = self.next_ring;
        let avail = desc + 16 * u64::from(size);
        let used = (avail + 6 + 2 * u64::from(size) + 3) & !3;
        self.next_ring = (used + 6 + 8 * u64::from(size) + 15) & !15;
        assert!(self.next_ring <= BUFFERS);
        self.mem.write_slice(&vec![0; (self.next_ring - desc) as usize], GuestAddress(desc)).unwrap();
        self.write(26, &(index + 1).to_le_bytes());
        for (field, address) in [(32, desc), (40, avail), (48, used)] {
            self.write(field, &address.to_le_bytes());
        }
        self.write(28, &1u16.to_le_bytes());
        let free = (0..size).rev().collect();
        let chains = vec![Vec::new(); size.into()];
        let ring = Ring { size, desc, avail, used, free, chains, avail_idx: 0, used_idx: 0 };
        let index = usize::from(index);
        if self.rings.len() <= index {
            self.rings.resize_with(index + 1, || None);
        }
        self.rings[index] = Some(ring);
    }

    fn ring(&mut self, queue: usize) -> &mut Ring {
        self.rings[queue].as_mut().unwrap()
    }

    /// Address of the queue's descriptor table, available ring and used ring.
    pub fn ring_addresses(&mut self, queue: usize) -> (u64, u64, u64) {
        let ring = self.ring(queue);
        (ring.desc, ring.avail, ring.used)
    }

    /// Guest memory for a buffer; never given back.
    pub fn alloc(&mut self, len: usize) -> u64 {
        let address = self.next_buffer;
        self.next_buffer += (len as u64 + 15) & !15;
        assert!(self.next_buffer <= MEM_SIZE as u64, "test memory used up");
        address
    }

    pub fn put(&mut self, data: &[u8]) -> u64 {
        let address = self.alloc(data.len());
        self.mem.write_slice(data, GuestAddress(address)).unwrap();
        address
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.mem.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    /// Descriptors of the queue that no chain uses.
    pub fn free(&mut self, queue: usize) -> usize {
        self.ring(queue).free.len()
    }

    /// Makes a chain available of buffers (address, length, flags); NEXT is added. Returns its head.
    pub fn offer(&mut self, queue: usize, buffers: &[(u64, u32, u16)]) -> u16 {
        let mem = Arc::clone(&self.mem);
        let ring = self.ring(queue);
        let ids: Vec<u16> = buffers.iter().map(|_| ring.free.pop().expect("free descriptors")).collect();
        for (i, (address, len, flags)) in buffers.iter().enumerate() {
            let next = ids.get(i + 1).copied();
            let flags = flags | if next.is_some() { NEXT } else { 0 };
            let at = ring.desc + 16 * u64::from(ids[i]);
            mem.write_obj(*address, GuestAddress(at)).unwrap();
            mem.write_obj(*len, GuestAddress(at + 8)).unwrap();
            mem.write_obj(flags, GuestAddress(at + 12)).unwrap();
            mem.write_obj(next.unwrap_or(0), GuestAddress(at + 14)).unwrap();
        }
        let head = ids[0];
        ring.chains[usize::from(head)] = ids;
        let slot = ring.avail + 4 + 2 * u64::from(ring.avail_idx % ring.size);
        mem.write_obj(head, GuestAddress(slot)).unwrap();
        ring.avail_idx = ring.avail_idx.wrapping_add(1);
        fence(Ordering::SeqCst);
        mem.store(ring.avail_idx, GuestAddress(ring.avail + 2), Ordering::SeqCst).unwrap();
        head
    }

    pub fn kick(&mut self, queue: usize) {
        self.write(0x3000 + 4 * queue as u64, &(queue as u16).to_le_bytes());
    }

    /// The next used chain: head and length.
    pub fn poll_used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let mem = Arc::clone(&self.mem);
        let ring = self.ring(queue);
        let idx: u16 = mem.load(GuestAddress(ring.used + 2), Ordering::SeqCst).unwrap();
        if idx == ring.used_idx {
            return None;
        }
        let slot = ring.used + 4 + 8 * u64::from(ring.used_idx % ring.size);
        let head: u32 = mem.read_obj(GuestAddress(slot)).unwrap();
        let len: u32 = mem.read_obj(GuestAddress(slot + 4)).unwrap();
        ring.used_idx = ring.used_idx.wrapping_add(1);
        let ids = std::mem::take(&mut ring.chains[head as usize]);
        assert!(!ids.is_empty(), "used twice");
        ring.free.extend(ids);
        Some((head as u16, len))
    }

    /// Waits, by interrupt, for the next used chain.
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        loop {
            let seen = self.irqs.count(queue + 1);
            let mem = Arc::clone(&self.mem);
            let ring = self.ring(queue);
            // used_event: interrupt at the next one.
            let event = ring.avail + 4 + 2 * u64::from(ring.size);
            mem.store(ring.used_idx, GuestAddress(event), Ordering::SeqCst).unwrap();
            fence(Ordering::SeqCst);
            if let Some(used) = self.poll_used(queue) {
                return used;
            }
            self.irqs.wait(queue + 1, seen);
        }
    }

    /// One request: what the device reads, and how much it may write. Returns what it wrote.
    pub fn request(&mut self, queue: usize, readable: &[&[u8]], writable: usize) -> Vec<u8> {
        let reset = self.next_buffer;
        let mut buffers = Vec::new();
        for data in readable {
            buffers.push((self.put(data), data.len() as u32, 0));
        }
        let answer = self.alloc(writable);
        if writable > 0 {
            buffers.push((answer, writable as u32, WRITE));
        }
        self.offer(queue, &buffers);
        self.kick(queue);
        let (_, len) = self.wait_used(queue);
        self.next_buffer = reset;
        self.get(answer, len as usize)
    }

    /// Waits for the device to give up, and checks that it lives again after a reset.
    pub fn expect_needs_reset(&mut self) {
        self.irqs.wait(0, 0);
        assert_eq!(self.status() & 0x40, 0x40);
        self.set_status(0);
        assert_eq!(self.status(), 0);
    }
}

/// Xorshift: the tests' random numbers.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
