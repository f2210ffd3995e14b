//! The register file (VT-d specification, chapter 10): values in, actions out.
//!
//! Registers are dwords; a quadword is its two halves, the lower one first, so that the half that has the "go" bit comes last. What
//! a write asks for is returned as [`Action`]s, which the unit carries out without holding the registers, and reports as
//! done. Until then the guest sees it as not done: that is what it polls for.

use iommufd::soft::vtd::{ContextScope, IotlbScope, MAX_MASK};
use pci::msix::Message;

use super::engine::Ring;
use super::event::Event;
use super::faults::{FaultLog, RECORDS};

/// Bytes of the register file, one page.
pub const SIZE: u64 = 0x1000;
/// Version 1.0.
const VERSION: u32 = 0x10;

/// Offsets (VT-d 10.4).
pub(super) mod at {
    pub(in super::super) const VERSION: u64 = 0x00;
    pub(in super::super) const CAPABILITY: u64 = 0x08;
    pub(in super::super) const EXTENDED: u64 = 0x10;
    pub(in super::super) const COMMAND: u64 = 0x18;
    pub(in super::super) const STATUS: u64 = 0x1c;
    pub(in super::super) const ROOT: u64 = 0x20;
    pub(in super::super) const CONTEXT: u64 = 0x28;
    pub(in super::super) const FAULT_STATUS: u64 = 0x34;
    pub(in super::super) const FAULT_EVENT: u64 = 0x38;
    pub(in super::super) const QUEUE_HEAD: u64 = 0x80;
    pub(in super::super) const QUEUE_TAIL: u64 = 0x88;
    pub(in super::super) const QUEUE_BASE: u64 = 0x90;
    pub(in super::super) const COMPLETION: u64 = 0x9c;
    pub(in super::super) const COMPLETION_EVENT: u64 = 0xa0;
    /// Where the capabilities say that these are.
    pub(in super::super) const IOTLB_ADDRESS: u64 = 0x200;
    pub(in super::super) const IOTLB: u64 = 0x208;
    pub(in super::super) const RECORDS: u64 = 0x220;
}

/// Bits of a guest address that are translated: by tables of four levels, or 39 by three.
pub(super) const WIDTH: u32 = 48;

/// Bits that tables of three levels translate.
pub(super) const NARROW: u32 = 39;

/// What a unit with devices of the host behind it says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Hosts {
    /// There is one: the guest is to say also what becomes present (CM).
    pub(super) caching: bool,
    /// One has fewer than [`WIDTH`] bits of address: [`NARROW`].
    pub(super) narrow: bool,
}

/// The capability register (VT-d 10.4.2). Not offered: write-buffer flushing, protected memory regions, advanced fault logging,
/// posted interrupts; caching of what is not present (CM) only where there are devices of the host.
const fn capability(hosts: Hosts) -> u64 {
    // 64 Ki domains.
    let domains = 6;
    // Tables of three and four levels; superpages of 2 MiB and 1 GiB.
    let (table_widths, width) = if hosts.narrow { (0b0010, NARROW) } else { (0b0110, WIDTH) };
    let superpages = 0b0011;
    let caching_mode = if hosts.caching { 1 << 7 } else { 0 };
    let pages_selective = 1 << 39;
    let zero_length_reads = 1 << 22;
    let draining = 1 << 54 | 1 << 55;
    domains
        | caching_mode
        | table_widths << 8
        | (width as u64 - 1) << 16
        | zero_length_reads
        | (at::RECORDS / 16) << 24
        | superpages << 34
        | pages_selective
        | (RECORDS as u64 - 1) << 40
        | MAX_MASK << 48
        | draining
}

/// The extended capability register (VT-d 10.4.3). Not offered: interrupt remapping, device TLBs, scalable mode.
const fn extended() -> u64 {
    let (coherent, queued, pass_through, snoop) = (1, 1 << 1, 1 << 6, 1 << 7);
    coherent | queued | pass_through | snoop | (at::IOTLB_ADDRESS / 16) << 8
}

bitflags::bitflags! {
    /// The global command and status registers (VT-d 10.4.4, 10.4.5): what the unit has of them.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct Global: u32 {
        /// Devices' requests are translated.
        const TRANSLATE = 1 << 31;
        /// The root table is that of the register.
        const ROOT = 1 << 30;
        /// Invalidations come by the queue.
        const QUEUE = 1 << 26;
    }
}

/// Go, in the upper half of the context command register: cleared when it is done (VT-d 10.4.7).
const CONTEXT_GO: u32 = 1 << 31;
/// Go, in the upper half of the IOTLB register (VT-d 10.4.8.1).
const IOTLB_GO: u32 = 1 << 31;
/// The completion status (VT-d 10.4.23): a wait descriptor that wanted an interrupt has completed.
const WAIT_COMPLETED: u32 = 1;
/// Bits of the queue's tail that exist.
const TAIL_BITS: u32 = 0x7_fff0;
/// Bits of the queue's base that exist: address and size.
const BASE_BITS: u64 = !0xff8;

/// What is to be done about a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// Send an interrupt.
    Send(Message),
    /// Take the root table of this register. Then [`Registers::done`] with [`Global::ROOT`].
    Root(u64),
    /// Translate, or stop to. Then [`Registers::done`] with [`Global::TRANSLATE`].
    Translate(bool),
    /// Serve this queue from its first descriptor on, or none. Then [`Registers::done`] with [`Global::QUEUE`].
    Queue(Option<Ring>),
    /// There are descriptors in the queue up to this offset.
    Tail(u32),
    /// The queue's error has been cleared.
    Resume,
    /// Look at context entries again. Then [`Registers::context_done`].
    Context(ContextScope),
    /// Forget translations. Then [`Registers::iotlb_done`].
    Iotlb(IotlbScope),
}

/// The registers.
#[derive(Debug)]
pub(super) struct Registers {
    status: Global,
    root: u64,
    context: u64,
    iotlb_address: u64,
    iotlb: u64,
    queue_base: u64,
    queue_tail: u32,
    completion: u32,
    completion_event: Event,
    pub(super) hosts: Hosts,
    pub(super) faults: FaultLog,
}

/// Half of a quadword.
fn half(value: u64, upper: bool) -> u32 {
    (value >> if upper { 32 } else { 0 }) as u32
}

/// Replaces half of a quadword.
fn set_half(value: &mut u64, upper: bool, to: u32) {
    let shift = if upper { 32 } else { 0 };
    *value = *value & !(0xffff_ffff << shift) | u64::from(to) << shift;
}

impl Registers {
    /// As after reset.
    pub(super) fn new() -> Self {
        Self {
            status: Global::empty(),
            root: 0,
            context: 0,
            iotlb_address: 0,
            iotlb: 0,
            queue_base: 0,
            queue_tail: 0,
            completion: 0,
            completion_event: Event::RESET,
            hosts: Hosts::default(),
            faults: FaultLog::new(),
        }
    }

    /// The dword at an offset that is a multiple of 4. `head` is how far the queue has been served.
    pub(super) fn read(&mut self, offset: u64, head: u64) -> u32 {
        let upper = offset & 4 != 0;
        match offset {
            at::VERSION => VERSION,
            at::STATUS => self.status.bits(),
            at::FAULT_STATUS => self.faults.status(),
            0x38..0x48 => self.faults.event().read(offset - at::FAULT_EVENT),
            at::COMPLETION => self.completion,
            0xa0..0xb0 => self.completion_event.read(offset - at::COMPLETION_EVENT),
            at::QUEUE_TAIL => self.queue_tail,
            at::RECORDS..0x2a0 => self.faults.read_record(((offset - at::RECORDS) / 4) as usize),
            _ => {
                let value = match offset & !7 {
                    at::CAPABILITY => capability(self.hosts),
                    at::EXTENDED => extended(),
                    at::ROOT => self.root,
                    at::CONTEXT => self.context,
                    at::QUEUE_HEAD => head,
                    at::QUEUE_BASE => self.queue_base,
                    at::IOTLB => self.iotlb,
                    _ => 0,
                };
                half(value, upper)
            }
        }
    }

    /// Writes the dword at an offset that is a multiple of 4.
    pub(super) fn write(&mut self, offset: u64, value: u32) -> Vec<Action> {
        let upper = offset & 4 != 0;
        let action = match offset {
            at::COMMAND => return self.command(value),
            at::FAULT_STATUS => {
                let stopped = self.faults.queue_has_failed();
                self.faults.clear(value);
                (stopped && !self.faults.queue_has_failed()).then_some(Action::Resume)
            }
            0x38..0x48 => self.faults.event().write(offset - at::FAULT_EVENT, value).map(Action::Send),
            at::COMPLETION => {
                self.completion &= !(value & WAIT_COMPLETED);
                if self.completion == 0 {
                    self.completion_event.settle();
                }
                None
            }
            0xa0..0xb0 => self.completion_event.write(offset - at::COMPLETION_EVENT, value).map(Action::Send),
            at::QUEUE_TAIL => {
                self.queue_tail = value & TAIL_BITS;
                self.status.contains(Global::QUEUE).then_some(Action::Tail(self.queue_tail))
            }
            at::RECORDS..0x2a0 => {
                self.faults.write_record(((offset - at::RECORDS) / 4) as usize, value);
                None
            }
            _ => match offset & !7 {
                at::ROOT => {
                    set_half(&mut self.root, upper, value);
                    None
                }
                at::QUEUE_BASE => {
                    set_half(&mut self.queue_base, upper, value);
                    self.queue_base &= BASE_BITS;
                    None
                }
                at::IOTLB_ADDRESS => {
                    set_half(&mut self.iotlb_address, upper, value);
                    None
                }
                at::CONTEXT => {
                    set_half(&mut self.context, upper, value);
                    if upper && value & CONTEXT_GO != 0 { self.start_context() } else { None }
                }
                at::IOTLB => {
                    set_half(&mut self.iotlb, upper, value);
                    if upper && value & IOTLB_GO != 0 { self.start_iotlb() } else { None }
                }
                _ => None,
            },
        };
        action.into_iter().collect()
    }

    /// The global command: some bits are states, the root table's is an order.
    fn command(&mut self, value: u32) -> Vec<Action> {
        let command = Global::from_bits_truncate(value);
        let mut actions = Vec::new();
        if command.contains(Global::ROOT) {
            self.status.remove(Global::ROOT);
            actions.push(Action::Root(self.root));
        }
        let changed = command ^ self.status;
        if changed.contains(Global::QUEUE) {
            let enable = command.contains(Global::QUEUE);
            actions.push(Action::Queue(enable.then(|| Ring::new(self.queue_base))));
            if enable && self.queue_tail != 0 {
                actions.push(Action::Tail(self.queue_tail));
            }
        }
        if changed.contains(Global::TRANSLATE) {
            actions.push(Action::Translate(command.contains(Global::TRANSLATE)));
        }
        actions
    }

    /// The state that a command asked for has been reached.
    pub(super) fn done(&mut self, what: Global, state: bool) {
        self.status.set(what, state);
    }

    fn start_context(&mut self) -> Option<Action> {
        let fields = self.context;
        let domain = fields as u16;
        let scope = match fields >> 61 & 3 {
            1 => Some(ContextScope::Global),
            2 => Some(ContextScope::Domain(domain)),
            3 => {
                let mask = [0, 0b100, 0b110, 0b111][(fields >> 32 & 3) as usize];
                Some(ContextScope::Device { domain, source: (fields >> 16) as u16, mask })
            }
            _ => None,
        };
        if scope.is_none() {
            self.context_done(false);
        }
        scope.map(Action::Context)
    }

    /// The context command is done: what was asked for, or nothing.
    pub(super) fn context_done(&mut self, as_asked: bool) {
        let done = if as_asked { self.context >> 61 & 3 } else { 0 };
        self.context = self.context & !(1 << 63 | 3 << 59) | done << 59;
    }

    fn start_iotlb(&mut self) -> Option<Action> {
        let (fields, address) = (self.iotlb, self.iotlb_address);
        let (domain, mask) = ((fields >> 32) as u16, address & 0x3f);
        let scope = match fields >> 60 & 3 {
            1 => Some(IotlbScope::Global),
            2 => Some(IotlbScope::Domain(domain)),
            3 if mask <= MAX_MASK => {
                let within = (0x1000 << mask) - 1;
                Some(IotlbScope::Pages { domain, first: address & !within, last: address | within })
            }
            _ => None,
        };
        if scope.is_none() {
            self.iotlb_done(false);
        }
        scope.map(Action::Iotlb)
    }

    /// The IOTLB's invalidation is done: what was asked for, or nothing.
    pub(super) fn iotlb_done(&mut self, as_asked: bool) {
        let done = if as_asked { self.iotlb >> 60 & 3 } else { 0 };
        self.iotlb = self.iotlb & !(1 << 63 | 3 << 57) | done << 57;
    }

    /// A wait descriptor that wants an interrupt has completed: the interrupt to send.
    pub(super) fn wait_completed(&mut self) -> Option<Message> {
        let told = self.completion & WAIT_COMPLETED != 0;
        self.completion |= WAIT_COMPLETED;
        if told { None } else { self.completion_event.raise() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read64(registers: &mut Registers, offset: u64) -> u64 {
        u64::from(registers.read(offset, 0)) | u64::from(registers.read(offset + 4, 0)) << 32
    }

    fn write64(registers: &mut Registers, offset: u64, value: u64) -> Vec<Action> {
        let mut actions = registers.write(offset, value as u32);
        actions.extend(registers.write(offset + 4, (value >> 32) as u32));
        actions
    }

    #[test]
    fn capabilities_say_where_registers_are() {
        let mut registers = Registers::new();
        assert_eq!(registers.read(at::VERSION, 0), 0x10);
        let (capability, extended) =
            (read64(&mut registers, at::CAPABILITY), read64(&mut registers, at::EXTENDED));
        assert_eq!((capability >> 24 & 0x3ff) * 16, at::RECORDS);
        assert_eq!((extended >> 8 & 0x3ff) * 16, at::IOTLB_ADDRESS);
        assert_eq!(capability >> 40 & 0xff, 7);
        assert_eq!(capability >> 16 & 0x3f, 47);
        assert_eq!(capability >> 8 & 0x1f, 0b110);
        assert_eq!(capability >> 7 & 1, 0, "nothing is cached that is not present");
        assert_eq!(extended & 0b1011, 0b0011, "coherent, queued invalidation, no interrupt remapping");
        // Whatever is written there.
        for offset in (at::VERSION..at::COMMAND).step_by(4).chain(0x58..0x80) {
            assert_eq!(registers.write(offset & !3, u32::MAX), []);
        }
        assert_eq!(read64(&mut registers, at::CAPABILITY), capability);
        assert_eq!(registers.read(0x64, 0), 0, "no protected memory");
    }

    #[test]
    fn commands_show_when_they_are_done() {
        let mut registers = Registers::new();
        write64(&mut registers, at::ROOT, 0x1_2345_6000);
        assert_eq!(registers.write(at::COMMAND, 1 << 30), [Action::Root(0x1_2345_6000)]);
        assert_eq!(registers.read(at::STATUS, 0), 0);
        registers.done(Global::ROOT, true);
        assert_eq!(registers.read(at::STATUS, 0), 1 << 30);
        assert_eq!(registers.write(at::COMMAND, 1 << 31), [Action::Translate(true)]);
        registers.done(Global::TRANSLATE, true);
        // What is on stays so, what is not offered is not done.
        assert_eq!(registers.write(at::COMMAND, 1 << 31 | 0x2b80_0000), []);
        assert_eq!(registers.read(at::STATUS, 0), 0b11 << 30);
        assert_eq!(registers.write(at::COMMAND, 0), [Action::Translate(false)]);
    }

    #[test]
    fn the_queue_has_a_base_and_a_size() {
        let mut registers = Registers::new();
        write64(&mut registers, at::QUEUE_BASE, 0x7000 | 0xffa);
        assert_eq!(read64(&mut registers, at::QUEUE_BASE), 0x7002);
        assert_eq!(write64(&mut registers, at::QUEUE_TAIL, u64::MAX), []);
        assert_eq!(registers.read(at::QUEUE_TAIL, 0), 0x7_fff0);
        registers.write(at::QUEUE_TAIL, 0x20);
        let ring = Ring::new(0x7002);
        assert_eq!(registers.write(at::COMMAND, 1 << 26), [Action::Queue(Some(ring)), Action::Tail(0x20)]);
        registers.done(Global::QUEUE, true);
        assert_eq!(registers.write(at::QUEUE_TAIL, 0x30), [Action::Tail(0x30)]);
        assert_eq!(registers.read(at::QUEUE_HEAD, 0x10), 0x10);
        assert_eq!(registers.write(at::COMMAND, 0), [Action::Queue(None)]);
    }

    #[test]
    fn invalidations_by_register_say_what_was_done() {
        let mut registers = Registers::new();
        let device = 1 << 63 | 3 << 61 | 1 << 32 | 0x0018 << 16 | 5;
        let scope = ContextScope::Device { domain: 5, source: 0x18, mask: 4 };
        assert_eq!(write64(&mut registers, at::CONTEXT, device), [Action::Context(scope)]);
        assert_eq!(read64(&mut registers, at::CONTEXT) >> 63, 1);
        registers.context_done(true);
        assert_eq!(read64(&mut registers, at::CONTEXT) >> 59, 0b1111);
        // Granularity 0 does nothing, and says so.
        assert_eq!(write64(&mut registers, at::CONTEXT, 1 << 63), []);
        assert_eq!(read64(&mut registers, at::CONTEXT), 0);

        write64(&mut registers, at::IOTLB_ADDRESS, 0x1234_5000 | 2);
        let pages = IotlbScope::Pages { domain: 9, first: 0x1234_4000, last: 0x1234_7fff };
        assert_eq!(write64(&mut registers, at::IOTLB, 1 << 63 | 3 << 60 | 9 << 32), [Action::Iotlb(pages)]);
        registers.iotlb_done(true);
        assert_eq!(read64(&mut registers, at::IOTLB) >> 57, 0b001_1011);
        write64(&mut registers, at::IOTLB_ADDRESS, 63);
        assert_eq!(write64(&mut registers, at::IOTLB, 1 << 63 | 3 << 60), []);
        assert_eq!(read64(&mut registers, at::IOTLB) >> 57 & 0b100_0011, 0);
    }

    #[test]
    fn completions_interrupt_once_until_they_are_cleared() {
        let mut registers = Registers::new();
        registers.write(at::COMPLETION_EVENT + 4, 0x40);
        registers.write(at::COMPLETION_EVENT + 8, 0xfee0_0000);
        assert_eq!(registers.wait_completed(), None);
        let message = Message { address: 0xfee0_0000, data: 0x40 };
        assert_eq!(registers.write(at::COMPLETION_EVENT, 0), [Action::Send(message)]);
        assert_eq!(registers.wait_completed(), None);
        assert_eq!(registers.read(at::COMPLETION, 0), 1);
        registers.write(at::COMPLETION, 1);
        assert_eq!(registers.wait_completed(), Some(message));
    }

    #[test]
    fn every_dword_can_be_read_and_written() {
        for value in [0, u32::MAX, 0x8000_0000, 0x5555_5555] {
            let mut registers = Registers::new();
            for offset in (0..SIZE).step_by(4) {
                registers.write(offset, value);
                registers.read(offset, u64::MAX);
            }
        }
    }
}
