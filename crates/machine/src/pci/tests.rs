use mmu::Gpa;

use super::*;
use crate::power::{PowerEvent, ResetBy};

/// A function with one 64-bit BAR 0 and one 32-bit BAR 2, whose bytes read as the BAR's number and
/// keep what is written.
struct Fake {
    config: [u8; 4096],
    sizes: [(usize, u64, bool); 2],
    writes: Vec<(usize, u64, Vec<u8>)>,
    config_accesses: Vec<(u16, usize)>,
}

impl Fake {
    fn new() -> Self {
        let mut config = [0; 4096];
        config[..4].copy_from_slice(&[0xf4, 0x1a, 0x41, 0x10]);
        config[0xffc..].copy_from_slice(b"last");
        Self {
            config,
            sizes: [(0, 0x4000, true), (2, 0x100, false)],
            writes: vec![],
            config_accesses: vec![],
        }
    }

    fn word(&self, at: usize) -> u64 {
        u32::from_le_bytes(self.config[at..at + 4].try_into().unwrap()).into()
    }
}

impl PciFunction for Fake {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config_accesses.push((offset, data.len()));
        data.copy_from_slice(&self.config[offset.into()..][..data.len()]);
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config_accesses.push((offset, data.len()));
        if offset >= COMMAND {
            self.config[offset.into()..][..data.len()].copy_from_slice(data);
        }
    }
    fn bars(&self) -> Vec<BarInfo> {
        let enabled = self.config[4] & 2 != 0;
        let bar = |&(index, size, wide): &(usize, u64, bool)| {
            let high = if wide { self.word(0x14 + 4 * index) << 32 } else { 0 };
            let address = (self.word(0x10 + 4 * index) | high) & !(size - 1);
            BarInfo { index, address, size, wide, enabled }
        };
        self.sizes.iter().map(bar).collect()
    }
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(bar as u8);
        data[0] = offset as u8;
    }
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        self.writes.push((bar, offset, data.to_vec()));
    }
}

const HIGH: Range<u64> = 0x1_4000_0000..0x2_0000_0000;

struct Machine {
    bus: Bus,
    power: Arc<PowerSignal>,
    fakes: Vec<Arc<Mutex<Fake>>>,
}

impl Machine {
    fn new(devices: usize) -> Self {
        let mut root = PciRoot::new(layout::MMIO32, HIGH);
        let fakes: Vec<_> = (0..devices).map(|_| Arc::new(Mutex::new(Fake::new()))).collect();
        for fake in &fakes {
            root.add_next(fake.clone()).unwrap();
        }
        root.assign_bars().unwrap();
        let mut bus = Bus::new();
        let power = PowerSignal::new(|_| ());
        Arc::new(root).attach(&mut bus, &power).unwrap();
        Self { bus, power, fakes }
    }
    fn config(&self, slot: u64, offset: u64) -> Gpa {
        Gpa(layout::ECAM.0 + (slot << 15) + offset)
    }
    fn write32(&self, slot: u64, offset: u64, value: u32) {
        self.bus.mmio_write(self.config(slot, offset), &value.to_le_bytes());
    }
    fn read32(&self, address: Gpa) -> u32 {
        let mut data = [0; 4];
        self.bus.mmio_read(address, &mut data);
        u32::from_le_bytes(data)
    }
    fn port32(&self, address: u32, port: u16) -> u32 {
        let mut data = [0; 4];
        self.bus.port_write(0xcf8, &address.to_le_bytes());
        self.bus.port_read(port, &mut data);
        u32::from_le_bytes(data)
    }
}

#[test]
fn functions_are_found_by_ecam_and_by_ports() {
    let machine = Machine::new(2);
    for (slot, id) in [(0, 0x0008_1b36), (1, 0x1041_1af4), (2, 0x1041_1af4), (3, u32::MAX), (31, u32::MAX)] {
        assert_eq!(machine.read32(machine.config(slot, 0)), id, "slot {slot}");
        assert_eq!(machine.port32(0x8000_0000 | (slot as u32) << 11, 0xcfc), id, "slot {slot}");
    }
    assert_eq!(machine.read32(machine.config(0, 8)), 0x0600_0000, "host bridge class");
    assert_eq!(machine.read32(Gpa(layout::ECAM.0 + (1 << 15) + (1 << 12))), u32::MAX, "function 1");
    assert_eq!(machine.read32(Gpa(layout::ECAM.0 + (1 << 20))), u32::MAX, "bus 1");
    assert_eq!(machine.read32(machine.config(1, 0xffc)), u32::from_le_bytes(*b"last"));
    assert_eq!(machine.port32(0x0000_0800, 0xcfc), u32::MAX, "not enabled");
    // What a kernel does to see whether the ports work.
    machine.bus.port_write(0xcfb, &[1]);
    assert_eq!(machine.port32(0x8000_0000, 0xcf8), 0x8000_0000);
    let mut two = [0; 2];
    machine.port32(0x8000_0800, 0xcfc);
    machine.bus.port_read(0xcfe, &mut two);
    assert_eq!(two, [0x41, 0x10]);
}

#[test]
fn functions_see_aligned_pieces_only() {
    let machine = Machine::new(1);
    machine.fakes[0].lock().unwrap().config_accesses.clear();
    let mut eight = [0; 8];
    machine.bus.mmio_read(machine.config(1, 0xff9), &mut eight[..7]);
    assert_eq!(&eight[3..7], b"last");
    machine.bus.mmio_write(machine.config(1, 0x40), &eight);
    // Past the end of the function's space: the next function's is not touched.
    machine.bus.mmio_read(machine.config(1, 0xffe), &mut eight[..4]);
    assert_eq!(eight[..4], [b's', b't', 0xff, 0xff]);
    let seen = machine.fakes[0].lock().unwrap().config_accesses.clone();
    assert_eq!(seen, [(0xff9, 1), (0xffa, 2), (0xffc, 4), (0x40, 4), (0x44, 4), (0xffe, 2)]);
}

#[test]
fn bars_are_assigned_and_answer_once_enabled() {
    let machine = Machine::new(3);
    let mut all = Vec::new();
    for (i, fake) in machine.fakes.iter().enumerate() {
        let bars = fake.lock().unwrap().bars();
        assert_eq!(machine.read32(Gpa(bars[0].address)), u32::MAX, "off");
        machine.write32(1 + i as u64, 4, 2);
        for bar in bars {
            assert!(bar.address.is_multiple_of(bar.size));
            let window = if bar.wide { HIGH } else { layout::MMIO32 };
            assert!(window.contains(&bar.address) && bar.address + bar.size <= window.end);
            let fill = bar.index as u32 * 0x0101_0100;
            assert_eq!(machine.read32(Gpa(bar.address + 8)), fill + 8);
            machine.bus.mmio_write(Gpa(bar.address + 16), &[7]);
            assert_eq!(fake.lock().unwrap().writes.pop(), Some((bar.index, 16, vec![7])));
            assert_eq!(machine.read32(Gpa(bar.address + bar.size - 2)), u32::MAX, "over the end");
            all.push(bar.address..bar.address + bar.size);
        }
    }
    all.sort_by_key(|r| r.start);
    assert!(all.windows(2).all(|w| w[0].end <= w[1].start), "{all:x?}");
}

#[test]
fn bars_move_and_never_leave_the_windows() {
    let machine = Machine::new(2);
    machine.write32(1, 4, 2);
    machine.write32(2, 4, 2);
    let place = |slot: u64, at: u64| {
        machine.write32(slot, 0x10, at as u32);
        machine.write32(slot, 0x14, (at >> 32) as u32);
    };
    place(1, 0x1_8000_0000);
    assert_eq!(machine.read32(Gpa(0x1_8000_0004)), 4);
    // Over RAM, over the APICs, over the ECAM, past a window's end, at the end of everything.
    for bad in [0, 0x10_0000, 0xfee0_0000, 0xfec0_0000, 0xe000_0000, HIGH.end, !0x3fff] {
        place(1, bad);
        assert_eq!(machine.read32(Gpa(0x1_8000_0004)), u32::MAX, "moved away to {bad:#x}");
        let before = machine.read32(machine.config(2, 0));
        assert_eq!(
            (machine.read32(Gpa(bad + 4)), before),
            (if bad == 0xe000_0000 { 0 } else { u32::MAX }, 0x1041_1af4)
        );
    }
    // A 64-bit BAR may be in the low window.
    place(1, 0xd000_0000);
    assert_eq!(machine.read32(Gpa(0xd000_0004)), 4);
    // Two at one place: the first slot answers, and the second as soon as the first has gone.
    place(2, 0xd000_0000);
    machine.bus.mmio_write(Gpa(0xd000_0000), &[1]);
    assert_eq!(machine.fakes[0].lock().unwrap().writes.len(), 1);
    assert_eq!(machine.fakes[1].lock().unwrap().writes.len(), 0);
    machine.write32(1, 4, 0);
    machine.bus.mmio_write(Gpa(0xd000_0000), &[1]);
    assert_eq!(machine.fakes[1].lock().unwrap().writes.len(), 1);
}

#[test]
fn impossible_devices_are_refused() {
    let refuse = |sizes| {
        let mut fake = Fake::new();
        fake.sizes = sizes;
        let mut root = PciRoot::new(layout::MMIO32, HIGH);
        root.add(5, Arc::new(Mutex::new(fake))).unwrap();
        root.assign_bars().unwrap_err()
    };
    assert!(matches!(
        refuse([(0, 0x4000, true), (2, 1 << 30, false)]),
        PciError::WindowFull { slot: 5, index: 2, .. }
    ));
    assert!(matches!(refuse([(0, 1 << 63, true), (2, 16, false)]), PciError::WindowFull { index: 0, .. }));
    assert!(matches!(refuse([(5, 0x1000, true), (2, 16, false)]), PciError::BadBar { index: 5, .. }));
    assert!(matches!(refuse([(0, 0x1000, true), (2, 8, false)]), PciError::BadBar { index: 2, .. }));
    let mut root = PciRoot::new(layout::MMIO32, HIGH);
    let fake = || Arc::new(Mutex::new(Fake::new()));
    assert_eq!(root.add(0, fake()), Err(PciError::NoSlot(0)));
    assert_eq!(root.add(32, fake()), Err(PciError::NoSlot(32)));
    for slot in 1..SLOTS {
        assert_eq!(root.add_next(fake()), Ok(slot));
    }
    assert_eq!(root.add_next(fake()), Err(PciError::Full));
}

#[test]
fn port_cf9_resets() {
    let machine = Machine::new(0);
    machine.bus.port_write(0xcf8, &0x8000_0000u32.to_le_bytes());
    machine.bus.port_write(0xcf9, &[2]);
    assert_eq!(machine.power.event(), None);
    machine.bus.port_write(0xcf9, &[6]);
    assert_eq!(machine.power.event(), Some(PowerEvent::Reset(ResetBy::Cf9)));
}

/// Nonsense from a driver, from a fixed seed: any BAR value, any access. Devices are reached in the windows and
/// in configuration space only, in bounds (the fake panics otherwise), and the bus stays consistent.
#[test]
fn nonsense_stays_in_the_windows() {
    let machine = Machine::new(3);
    let mut state = 0x5eed_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 20
    };
    let mut data = [0; 8];
    for _ in 0..200_000 {
        let length = [1, 2, 3, 4, 8][(next() % 5) as usize];
        let value = next().to_le_bytes();
        match next() % 8 {
            0 => machine.bus.mmio_write(machine.config(next() % 5, next() & 0xfff), &value[..length]),
            1 => machine.bus.mmio_write(machine.config(next() % 5, next() % 0x28), &value[..length]),
            2 => machine.write32(next() % 5, [0x10, 0x14, 0x18, 0x04][(next() % 4) as usize], next() as u32),
            3 => machine.bus.port_write((0xcf0 + next() % 24) as u16, &value[..length]),
            4 => machine.bus.port_read((0xcf0 + next() % 24) as u16, &mut data[..length]),
            5 => machine.bus.mmio_read(Gpa(0xbfff_0000 + next() % 0x4100_0000), &mut data[..length]),
            6 => machine
                .bus
                .mmio_write(Gpa(HIGH.start - 16 + next() % (HIGH.end - HIGH.start)), &value[..length]),
            _ => machine.bus.mmio_read(Gpa(next() << 20), &mut data[..length]),
        }
    }
    for (slot, fake) in (1..).zip(&machine.fakes) {
        assert!(fake.lock().unwrap().config_accesses.iter().all(|&(at, n)| at % 4 + n as u16 <= 4));
        assert_eq!(machine.read32(machine.config(slot, 0)), 0x1041_1af4);
    }
}
