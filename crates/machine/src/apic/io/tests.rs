use super::*;
use crate::apic::testing::{Random, Rig, Signal};

struct Io {
    rig: Rig,
    io: Arc<IoApic>,
}

impl Io {
    fn new() -> Self {
        let rig = Rig::new(&[0, 1], false);
        let io = IoApic::new(&rig.bus);
        Self { rig, io }
    }

    fn read(&self, index: u32) -> u32 {
        self.io.mmio_write(0, index);
        self.io.mmio_read(0x10)
    }

    fn write(&self, index: u32, value: u32) {
        self.io.mmio_write(0, index);
        self.io.mmio_write(0x10, value);
    }

    /// Programs a pin for vCPU `id`.
    fn program(&self, pin: u32, id: u32, low: u32) {
        self.write(0x11 + 2 * pin, id << 24);
        self.write(0x10 + 2 * pin, low);
    }

    fn remote_irr(&self, pin: u32) -> bool {
        self.read(0x10 + 2 * pin) & 1 << 14 != 0
    }

    /// vCPU 1 takes an interrupt.
    fn take(&self) -> Option<u8> {
        self.rig.bus.local(1).unwrap().acknowledge()
    }

    fn eoi(&self) {
        self.rig.bus.local(1).unwrap().mmio_write(0xb0, 0);
    }
}

const LEVEL_PIN: u32 = 1 << 15;
const MASK: u32 = 1 << 16;

#[test]
fn registers_after_reset() {
    let io = Io::new();
    assert_eq!((io.read(0), io.read(1), io.read(2)), (0, 0x0017_0020, 0));
    for pin in 0..24 {
        assert_eq!((io.read(0x10 + 2 * pin), io.read(0x11 + 2 * pin)), (MASK, 0));
    }
    for index in (3..0x10).chain(0x40..=0xff) {
        io.write(index, u32::MAX);
        assert_eq!(io.read(index), 0, "index {index:#x}");
    }
    io.write(0, 0xff00_0000);
    assert_eq!((io.read(0), io.read(2)), (0x0f00_0000, 0x0f00_0000));
    io.write(0x3e, u32::MAX);
    io.write(0x3f, u32::MAX);
    assert_eq!((io.read(0x3e), io.read(0x3f)), (0x1_afff, 0xfffe_0000), "read-only and reserved bits");
    io.io.mmio_write(0, 0x1ff);
    assert_eq!(io.io.mmio_read(0), 0xff);
    assert_eq!(io.io.mmio_read(0x40), 0);
    io.io.reset();
    assert_eq!(io.read(0x3e), MASK);
}

#[test]
fn edge_sends_on_the_rising_edge_only() {
    let io = Io::new();
    io.program(4, 1, 0x31);
    io.io.set_irq(4, true);
    assert_eq!(io.take(), Some(0x31));
    io.eoi();
    io.io.set_irq(4, true);
    assert_eq!(io.take(), None, "still up");
    io.io.set_irq(4, false);
    assert_eq!(io.take(), None);
    io.io.pulse(4);
    assert_eq!(io.take(), Some(0x31));
    io.eoi();
    assert!(!io.remote_irr(4));
}

#[test]
fn an_edge_while_masked_is_lost() {
    let io = Io::new();
    io.program(4, 1, MASK | 0x31);
    io.io.set_irq(4, true);
    io.program(4, 1, 0x31);
    assert_eq!(io.take(), None);
}

#[test]
fn level_is_sent_again_after_eoi_while_asserted() {
    let io = Io::new();
    io.program(9, 1, LEVEL_PIN | 0x39);
    io.io.set_irq(9, true);
    assert!(io.remote_irr(9));
    io.io.set_irq(9, true);
    assert_eq!(io.take(), Some(0x39));
    io.eoi();
    assert_eq!(io.take(), Some(0x39), "the device has not been served");
    io.io.set_irq(9, false);
    assert!(io.remote_irr(9));
    io.eoi();
    assert!(!io.remote_irr(9));
    assert_eq!(io.take(), None);
    io.io.set_irq(9, true);
    assert_eq!(io.take(), Some(0x39));
}

#[test]
fn eoi_register_serves_a_guest_that_suppresses_broadcast() {
    let io = Io::new();
    io.rig.bus.local(1).unwrap().mmio_write(0xf0, 0x11ff);
    io.program(9, 1, LEVEL_PIN | 0x39);
    io.io.set_irq(9, true);
    assert_eq!(io.take(), Some(0x39));
    io.eoi();
    assert!(io.remote_irr(9));
    io.io.set_irq(9, false);
    io.io.mmio_write(0x40, 0x38);
    assert!(io.remote_irr(9), "another vector");
    io.io.mmio_write(0x40, 0x39);
    assert!(!io.remote_irr(9));
}

#[test]
fn unmasking_a_level_pin_sends_what_is_asserted() {
    let io = Io::new();
    io.program(9, 1, MASK | LEVEL_PIN | 0x39);
    io.io.set_irq(9, true);
    assert_eq!(io.take(), None);
    io.program(9, 1, LEVEL_PIN | 0x39);
    assert_eq!(io.take(), Some(0x39));
    // Masked while in service, as drivers do: EOI sends nothing, unmasking does.
    io.program(9, 1, MASK | LEVEL_PIN | 0x39);
    io.eoi();
    assert_eq!((io.take(), io.remote_irr(9)), (None, false));
    io.program(9, 1, LEVEL_PIN | 0x39);
    assert_eq!(io.take(), Some(0x39));
}

#[test]
fn switching_to_edge_and_back_ends_the_service() {
    let io = Io::new();
    io.program(9, 1, LEVEL_PIN | 0x39);
    io.io.set_irq(9, true);
    io.io.set_irq(9, false);
    assert!(io.remote_irr(9));
    io.write(0x22, MASK | 0x39);
    io.write(0x22, MASK | LEVEL_PIN | 0x39);
    assert!(!io.remote_irr(9));
}

#[test]
fn a_level_that_nobody_takes_is_not_in_service() {
    let io = Io::new();
    io.program(9, 7, LEVEL_PIN | 0x39);
    io.io.set_irq(9, true);
    assert!(!io.remote_irr(9));
    io.program(9, 1, LEVEL_PIN | 0x39);
    assert_eq!(io.take(), Some(0x39), "sent once it has a destination");
}

#[test]
fn two_pins_may_share_a_vector() {
    let io = Io::new();
    io.program(9, 1, LEVEL_PIN | 0x39);
    io.program(10, 1, LEVEL_PIN | 0x39);
    io.io.set_irq(9, true);
    io.io.set_irq(10, true);
    assert_eq!(io.take(), Some(0x39));
    io.io.set_irq(9, false);
    io.eoi();
    assert_eq!((io.remote_irr(9), io.remote_irr(10)), (false, true));
    assert_eq!(io.take(), Some(0x39));
}

#[test]
fn other_modes_and_pins_that_do_not_exist() {
    let io = Io::new();
    io.program(1, 1, 0x400);
    io.rig.signals.take();
    io.io.pulse(1);
    assert_eq!(io.rig.signals.take(), [Signal::Nmi(1)]);
    for mode in [0x200, 0x300, 0x600, 0x700] {
        io.program(1, 1, mode | 0x40);
        io.io.pulse(1);
    }
    io.io.set_irq(24, true);
    io.io.set_irq(usize::MAX, true);
    assert_eq!((io.rig.signals.take(), io.take()), (vec![], None));
}

#[test]
fn a_listener_may_lower_the_line_before_it_is_looked_at() {
    struct Line(Arc<IoApic>, std::sync::Mutex<Vec<usize>>);

    impl EoiListener for Line {
        fn served(&self, pin: usize) {
            self.1.lock().unwrap().push(pin);
            self.0.set_irq(pin, false);
        }
    }

    let io = Io::new();
    let line = Arc::new(Line(Arc::clone(&io.io), std::sync::Mutex::default()));
    let listener: Arc<dyn EoiListener> = line.clone();
    io.io.set_listener(Arc::downgrade(&listener));
    io.program(17, 1, 0x41 | LEVEL_PIN);
    io.program(3, 1, 0x52);
    io.io.set_irq(17, true);
    io.io.pulse(3);
    assert_eq!(io.take(), Some(0x52));
    io.eoi();
    assert_eq!(io.take(), Some(0x41));
    io.eoi();
    assert_eq!(*line.1.lock().unwrap(), [17], "level pins only");
    assert!(!io.remote_irr(17));
    assert_eq!(io.take(), None);
    drop((line, listener));
    io.io.set_irq(17, true);
    assert_eq!(io.take(), Some(0x41));
    io.eoi();
    assert_eq!(io.take(), Some(0x41), "nobody listens, and the line is up");
}

#[test]
fn extended_destination_is_bits_55_to_49() {
    let rig = Rig::new(&[0, 0x1201], true).x2apic(0..2);
    let io = IoApic::new(&rig.bus);
    for (index, value) in [(0x11, 0x01 << 24 | 0x12 << 17), (0x10, 0x40)] {
        io.mmio_write(0, index);
        io.mmio_write(0x10, value);
    }
    io.pulse(0);
    assert_eq!(rig.drain(), [(1, 0x40)]);
}

/// Random registers and lines: no panic, no deadlock, and remote IRR only on level pins.
#[test]
fn random_accesses_keep_the_invariants() {
    let io = Io::new();
    let mut random = Random(0x82093);
    for _ in 0..200_000 {
        let (a, b) = (random.next(), random.next() as u32);
        match random.below(6) {
            0 => io.io.mmio_write([0, 0x10, 0x40, a & 0xfff][(a >> 32 & 3) as usize], b),
            1 => io.write(0x10 + (a % 48) as u32, b & !MASK),
            2 | 3 => io.io.set_irq((a % 26) as usize, b & 1 != 0),
            4 => drop(io.take()),
            _ => io.eoi(),
        }
        let state = io.io.lock();
        for pin in &state.pins {
            assert!(pin.entry & REMOTE_IRR == 0 || pin.is_level());
            assert_eq!(pin.entry & !(WRITABLE | REMOTE_IRR), 0);
        }
    }
}
