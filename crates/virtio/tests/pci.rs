//! The transport as a driver meets it: capabilities, the status protocol, interrupts, broken queues.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::sync::{Arc, Mutex};

use common::{EVENT_IDX, Guest, INDIRECT, INDIRECT_DESC, Mem, NEXT, VERSION_1, WRITE};
use pci::msix::IntxLine;
use virtio::device::{ActivateError, Activation, VirtioDevice};
use virtio::pci::VirtioPci;
use vm_memory::{Bytes, GuestAddress};

/// A device with two queues and no threads: it keeps what it is given.
#[derive(Default)]
struct Probe {
    running: Arc<Mutex<Option<Activation<Arc<Mem>>>>>,
    refuse: bool,
}

impl VirtioDevice<Arc<Mem>> for Probe {
    fn device_id(&self) -> u16 {
        42
    }
    fn name(&self) -> &str {
        "probe"
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8, 256]
    }
    fn features(&self) -> u64 {
        0b1010
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = (offset as usize + i) as u8;
        }
    }
    fn activate(&mut self, activation: Activation<Arc<Mem>>) -> Result<(), ActivateError> {
        if self.refuse {
            return Err(ActivateError::MissingQueue(1));
        }
        *self.running.lock().unwrap() = Some(activation);
        Ok(())
    }
    fn reset(&mut self) {
        *self.running.lock().unwrap() = None;
    }
}

type Running = Arc<Mutex<Option<Activation<Arc<Mem>>>>>;

fn probe() -> (Guest, Running) {
    let running = Running::default();
    (Guest::new(Probe { running: Arc::clone(&running), refuse: false }), running)
}

const ALL: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC;

#[test]
fn identity_and_capabilities() {
    let (mut guest, _) = probe();
    let mut header = [0; 64];
    guest.pci.config_read(0, &mut header);
    assert_eq!(header[..4], [0xf4, 0x1a, 0x6a, 0x10]);
    assert_eq!(header[8], 1, "revision");
    let places: Vec<_> = [1u8, 2, 3, 4]
        .map(|kind| {
            let at = guest.capability(9, |cap| cap[3] == kind).unwrap();
            let mut cap = [0; 16];
            guest.pci.config_read(at, &mut cap);
            (cap[4], u32::from_le_bytes(cap[8..12].try_into().unwrap()))
        })
        .to_vec();
    assert_eq!(places, [(0, 0), (0, 0x3000), (0, 0x1000), (0, 0x2000)]);
    let bars: Vec<_> = guest.pci.bars().map(|bar| (bar.index, bar.address, bar.size, bar.enabled)).collect();
    assert_eq!(bars, [(0, common::REGISTERS, 0x4000, true), (2, common::MSIX, 0x1000, true)]);
}

#[test]
fn the_window_reaches_the_bars() {
    let (mut guest, _) = probe();
    let window = guest.capability(9, |cap| cap[3] == 5).unwrap();
    let access = |guest: &mut Guest, offset: u32, len: u32| {
        guest.pci.config_write(window + 4, &[0]);
        guest.pci.config_write(window + 8, &offset.to_le_bytes());
        guest.pci.config_write(window + 12, &len.to_le_bytes());
    };
    access(&mut guest, 0x2004, 4);
    let mut data = [0; 4];
    guest.pci.config_read(window + 16, &mut data);
    assert_eq!(data, [4, 5, 6, 7]);
    access(&mut guest, 20, 1);
    guest.pci.config_write(window + 16, &[3]);
    assert_eq!(guest.status(), 3);
    // Impossible accesses do nothing.
    for (offset, len) in [(20, 0), (20, 3), (21, 2), (20, 8), (u32::MAX, 4)] {
        access(&mut guest, offset, len);
        guest.pci.config_write(window + 16, &[0; 4]);
        assert_eq!(guest.status(), 3);
    }
}

#[test]
fn features_are_checked() {
    let (mut guest, running) = probe();
    assert_eq!(guest.offered(), ALL | 0b1010);
    // Without VERSION_1, and with a feature that is not offered.
    for (low, high, ok) in [(0, 0, false), (0b100, 1, false), (0b1000, 1, true)] {
        guest.set_status(0);
        guest.set_status(3);
        for (select, value) in [(0u32, low), (1, high), (2, u32::MAX)] {
            guest.write(8, &select.to_le_bytes());
            guest.write(12, &u32::to_le_bytes(value));
        }
        guest.set_status(11);
        assert_eq!(guest.status() & 8 != 0, ok);
    }
    guest.start();
    assert_eq!(guest.status(), 15);
    // Too late to change.
    guest.write(8, &0u32.to_le_bytes());
    guest.write(12, &2u32.to_le_bytes());
    assert_eq!(running.lock().unwrap().as_ref().unwrap().features, 1 << 32 | 0b1000);
    assert_eq!(guest.read32(12), 0b1000);
    guest.set_status(0);
    assert!(running.lock().unwrap().is_none());
}

#[test]
fn driver_ok_needs_features_ok_and_good_queues() {
    let (mut guest, running) = probe();
    guest.set_status(3);
    guest.set_status(15 & !8);
    assert!(running.lock().unwrap().is_none());
    for (desc, avail, used) in [
        (0x1008, 0x2000, 0x3000),
        (0x1000, 0x2001, 0x3000),
        (0x1000, 0x2000, 0x3002),
        (0x1000, 0x2000, u64::MAX - 3),
        (0x1000, 0, 0x3000),
        (1 << 40, 0x2000, 0x3000),
    ] {
        guest.negotiate(ALL);
        guest.write(22, &0u16.to_le_bytes());
        for (field, address) in [(32, desc), (40, avail), (48, used)] {
            guest.write(field, &u64::to_le_bytes(address));
        }
        guest.write(28, &1u16.to_le_bytes());
        guest.set_status(15);
        assert_eq!(guest.status(), 0x4f, "NEEDS_RESET for {desc:#x} {avail:#x} {used:#x}");
        assert!(running.lock().unwrap().is_none());
    }
    // Rings that end with memory itself are fine.
    guest.negotiate(ALL);
    let end = common::MEM_SIZE as u64;
    guest.write(22, &0u16.to_le_bytes());
    for (field, address) in [(32, 0x1000), (40, 0x2000), (48, (end - (6 + 64)) & !3)] {
        guest.write(field, &u64::to_le_bytes(address));
    }
    guest.write(28, &1u16.to_le_bytes());
    guest.set_status(15);
    assert_eq!(guest.status(), 15);
    let running = running.lock().unwrap();
    let queues = &running.as_ref().unwrap().queues;
    assert!(queues[0].is_some() && queues[1].is_none());
}

#[test]
fn a_device_that_cannot_start_needs_reset() {
    let mut guest = Guest::new(Probe { refuse: true, ..Probe::default() });
    guest.negotiate(ALL);
    guest.start();
    assert_eq!(guest.status(), 0x4f);
    assert_eq!(guest.irqs.count(0), 1, "the driver is told");
}

#[test]
fn queue_registers() {
    let (mut guest, _) = probe();
    guest.negotiate(ALL);
    guest.write(22, &1u16.to_le_bytes());
    assert_eq!((guest.read16(24), guest.read16(30)), (256, 1));
    for size in [0u16, 3, 512, 0x8000] {
        guest.write(24, &size.to_le_bytes());
        assert_eq!(guest.read16(24), 256);
    }
    guest.write(24, &64u16.to_le_bytes());
    assert_eq!(guest.read16(24), 64);
    // Halves and odd widths of the addresses.
    guest.write(32, &0x5000u32.to_le_bytes());
    guest.write(36, &[1, 0]);
    assert_eq!(u64::from_le_bytes(guest.read(32)), 0x1_0000_5000);
    guest.write(26, &2u16.to_le_bytes());
    assert_eq!(guest.read16(26), 2);
    guest.write(26, &3u16.to_le_bytes());
    assert_eq!(guest.read16(26), 0xffff, "no such vector");
    guest.write(28, &1u16.to_le_bytes());
    guest.write(24, &8u16.to_le_bytes());
    assert_eq!((guest.read16(24), guest.read16(28)), (64, 1), "enabled: fixed");
    guest.write(22, &2u16.to_le_bytes());
    assert_eq!((guest.read16(24), guest.read16(28)), (0, 0), "no such queue");
}

#[test]
fn an_available_index_that_goes_back_breaks_the_queue() {
    let (mut guest, running) = probe();
    guest.run(ALL);
    guest.offer(0, &[(0x1000, 4, 0)]);
    let (_, avail, _) = guest.ring_addresses(0);
    let mut running = running.lock().unwrap();
    let queue = running.as_mut().unwrap().queues[0].as_mut().unwrap();
    assert!(!queue.wait_for_kick(), "there is one");
    guest.mem.write_obj(0u16, GuestAddress(avail + 2)).unwrap();
    assert!(queue.pop().is_none());
    assert!(queue.wait_for_kick(), "broken");
    assert_eq!(guest.status() & 0x40, 0x40);
}

#[test]
fn event_index_saves_interrupts() {
    let (mut guest, running) = probe();
    guest.run(ALL);
    let buffer = guest.alloc(16);
    for _ in 0..4 {
        guest.offer(0, &[(buffer, 16, WRITE)]);
    }
    let mut running = running.lock().unwrap();
    let queue = running.as_mut().unwrap().queues[0].as_mut().unwrap();
    let give_back = |queue: &mut virtio::queue::Virtq<Arc<Mem>>| {
        let chain = queue.pop().unwrap();
        queue.push(&chain, 3);
        queue.signal();
    };
    give_back(queue);
    assert_eq!(guest.irqs.count(1), 1);
    give_back(queue);
    assert_eq!(guest.irqs.count(1), 1, "used_event is still 0");
    assert_eq!(guest.poll_used(0).unwrap().1, 3);
    // The driver wants to know of the fourth.
    let (_, avail, _) = guest.ring_addresses(0);
    guest.mem.write_obj(3u16, GuestAddress(avail + 4 + 2 * 8)).unwrap();
    give_back(queue);
    assert_eq!(guest.irqs.count(1), 1);
    give_back(queue);
    assert_eq!(guest.irqs.count(1), 2);
    queue.signal();
    assert_eq!(guest.irqs.count(1), 2, "nothing new");
}

#[test]
fn without_bus_master_there_is_no_dma_and_no_interrupt() {
    let (mut guest, running) = probe();
    guest.run(ALL);
    let buffer = guest.alloc(16);
    guest.offer(0, &[(buffer, 16, WRITE)]);
    guest.pci.config_write(4, &2u16.to_le_bytes());
    {
        let mut running = running.lock().unwrap();
        let running = running.as_mut().unwrap();
        assert!(running.queues[0].as_mut().unwrap().pop().is_none());
        running.interrupts.config_changed();
    }
    assert_eq!(guest.irqs.count(0), 0);
    guest.pci.config_write(4, &6u16.to_le_bytes());
    assert_eq!(guest.irqs.count(0), 1, "pending until then");
    assert!(running.lock().unwrap().as_mut().unwrap().queues[0].as_mut().unwrap().pop().is_some());
}

#[test]
fn broken_rings_and_chains_need_a_reset() {
    type Breakage = (&'static str, fn(&mut Guest));
    let cases: [Breakage; 6] = [
        ("available index too far", |guest| {
            let (_, avail, _) = guest.ring_addresses(0);
            guest.mem.write_obj(9u16, GuestAddress(avail + 2)).unwrap();
        }),
        ("head out of range", |guest| {
            guest.offer(0, &[(0x1000, 4, 0)]);
            let (_, avail, _) = guest.ring_addresses(0);
            guest.mem.write_obj(8u16, GuestAddress(avail + 4)).unwrap();
        }),
        ("loop", |guest| {
            let head = guest.offer(0, &[(0x1000, 4, 0)]);
            let (desc, _, _) = guest.ring_addresses(0);
            let at = desc + 16 * u64::from(head);
            guest.mem.write_obj(NEXT, GuestAddress(at + 12)).unwrap();
            guest.mem.write_obj(head, GuestAddress(at + 14)).unwrap();
        }),
        ("buffer outside memory", |guest| {
            guest.offer(0, &[(1 << 50, 4, 0)]);
        }),
        ("indirect table outside memory", |guest| {
            guest.offer(0, &[(1 << 50, 16, INDIRECT)]);
        }),
        ("readable after writable", |guest| {
            guest.offer(0, &[(0x1000, 4, WRITE), (0x1000, 4, 0)]);
        }),
    ];
    for (what, break_it) in cases {
        let (mut guest, running) = probe();
        guest.run(ALL);
        break_it(&mut guest);
        {
            let mut running = running.lock().unwrap();
            let queue = running.as_mut().unwrap().queues[0].as_mut().unwrap();
            assert!(queue.pop().is_none(), "{what}");
            assert!(queue.pop().is_none(), "{what}");
            assert!(queue.wait_for_kick());
        }
        guest.expect_needs_reset();
        guest.run(ALL);
    }
}

/// The machine calls from any vCPU thread.
#[test]
fn a_function_may_move_between_threads() {
    let (mut guest, _) = probe();
    std::thread::spawn(move || assert_eq!(guest.status(), 0)).join().unwrap();
}

#[test]
fn config_space_of_the_device() {
    let (mut guest, _) = probe();
    assert_eq!(guest.read::<8>(0x2001), [1, 2, 3, 4, 5, 6, 7, 8]);
}

#[derive(Clone, Default)]
struct Wire(Arc<Mutex<bool>>);

impl IntxLine for Wire {
    fn set(&self, level: bool) {
        *self.0.lock().unwrap() = level;
    }
}

#[test]
fn intx_without_msix() {
    let wire = Wire::default();
    let running = Running::default();
    let mem = Arc::new(Mem::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap());
    let device = Box::new(Probe { running: Arc::clone(&running), refuse: false });
    let irqs = Arc::new(common::Irqs::default());
    let mut pci = VirtioPci::new(device, mem, irqs, Some(Box::new(wire.clone()))).unwrap();
    let level = || *wire.0.lock().unwrap();
    pci.config_write(4, &6u16.to_le_bytes());
    pci.bar_write(0, 20, &[3]);
    pci.bar_write(0, 8, &1u32.to_le_bytes());
    pci.bar_write(0, 12, &1u32.to_le_bytes());
    pci.bar_write(0, 20, &[11]);
    pci.bar_write(0, 20, &[15]);
    running.lock().unwrap().as_ref().unwrap().interrupts.queue_used(0);
    assert!(level());
    let mut status = [0; 2];
    pci.config_read(6, &mut status);
    assert_eq!(status[0] & 8, 8);
    // Interrupt disable, and back.
    pci.config_write(4, &0x406u16.to_le_bytes());
    assert!(!level());
    pci.config_write(4, &6u16.to_le_bytes());
    assert!(level());
    let mut isr = [0; 1];
    pci.bar_read(0, 0x1000, &mut isr);
    assert_eq!(isr, [1]);
    assert!(!level());
    pci.bar_read(0, 0x1000, &mut isr);
    assert_eq!(isr, [0]);
    running.lock().unwrap().as_ref().unwrap().interrupts.config_changed();
    pci.bar_read(0, 0x1000, &mut isr);
    assert_eq!(isr, [2]);
}
