//! Events: the one place where exceptions and interrupts are delivered to the guest.
//!
//! # Theory of operation
//! [`Vcpu::deliver`] takes an event after the instruction that it belongs to: RIP is where the guest is to resume.
//! Delivery finds the handler (real mode: vector table; else: a gate in the IDT), the stack (the present one, one
//! from the TSS, or an IST entry), pushes the frame, and only then changes registers: a fault on the way
//! leaves the state as it was, and becomes the event to deliver next, by the rules of Intel SDM vol. 3,
//! table 6-5: serially, as a double fault, or not at all (shutdown).
//!
//! Software interrupts are delivered from inside their instruction by `Vcpu::software_interrupt`, so that a fault
//! during their delivery is an ordinary fault of the instruction.

use mmu::{Gva, Privilege};

use crate::fault::{Exec, Fault, Stop, fault, vector};
use crate::flags;
use crate::frame::Frame;
use crate::segment::{Descriptor, is_null, selector_code, system_type};
use crate::state::{REG_RIP, Segment, reg, seg, slow};
use crate::task::TaskSwitch;
use crate::vcpu::Vcpu;

/// How many exceptions in a row may each come of the delivery of the one before it.
///
/// Benign ones never make a double fault, so that a guest can set up a handler, such as one of #AC at CPL 3 on
/// a misaligned stack, whose invocation raises the same exception for ever. Hardware then hangs; here, the vCPU shuts
/// down. No chain that ends is as long.
const MOST_NESTED: u32 = 16;

/// Something to deliver to the guest.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Event {
    /// An exception.
    Fault(Fault),
    /// An external interrupt.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// INT n, INT3 or INTO: checked against the gate's DPL.
    Software(u8),
}

impl Event {
    /// The vector.
    pub const fn vector(&self) -> u8 {
        match self {
            Self::Fault(f) => f.vector,
            Self::Interrupt(vector) | Self::Software(vector) => *vector,
            Self::Nmi => vector::NMI,
        }
    }
}

/// An event on its way through the IDT.
#[derive(Clone, Copy, Debug)]
struct Delivery {
    vector: u8,
    error_code: Option<u32>,
    /// Raised by INT n, INT3 or INTO: the gate's DPL counts, and EXT stays clear.
    software: bool,
    /// RF is set in the pushed image, so that the restarted instruction does not hit its breakpoint again.
    resume: bool,
    class: Class,
}

/// How an event combines with an exception during its delivery (Intel SDM vol. 3, table 6-4).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

impl Class {
    fn of_exception(exception: u8) -> Self {
        match exception {
            vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Self::Contributory,
            vector::PF => Self::PageFault,
            vector::DF => Self::DoubleFault,
            _ => Self::Benign,
        }
    }

    /// Whether `second`, raised while `self` is delivered, makes a double fault.
    fn doubles(self, second: Self) -> bool {
        match self {
            Self::Benign => false,
            Self::Contributory => second == Self::Contributory,
            Self::PageFault | Self::DoubleFault => matches!(second, Self::Contributory | Self::PageFault),
        }
    }
}

impl Delivery {
    fn new(event: Event) -> Self {
        let benign =
            Self { vector: 0, error_code: None, software: false, resume: false, class: Class::Benign };
        match event {
            Event::Interrupt(vector) => Self { vector, ..benign },
            Event::Nmi => Self { vector: vector::NMI, ..benign },
            Event::Software(vector) => Self { vector, software: true, ..benign },
            Event::Fault(f) => Self {
                vector: f.vector,
                error_code: f.error_code,
                // An instruction breakpoint leaves it to the handler to set RF (SDM vol. 3, 18.3.1.1).
                resume: !f.trap && f.vector != vector::DF && (f.vector != vector::DB || f.dr6 & !15 != 0),
                class: Class::of_exception(f.vector),
                ..benign
            },
        }
    }

    /// The EXT bit of error codes that concern the delivery.
    fn ext(&self) -> u32 {
        !self.software as u32
    }

    /// The error code that names this event's gate.
    fn gate_code(&self) -> u32 {
        u32::from(self.vector) << 3 | 2 | self.ext()
    }
}

impl Vcpu {
    /// Delivers `event` through the IDT (or the real-mode vector table). RIP is where the guest is to
    /// resume: the faulting instruction for a fault, the next one for a trap or interrupt.
    ///
    /// A fault during delivery becomes a double fault, and then, or if there is no end of benign ones,
    ///
    /// # Errors
    /// [`crate::Stop::TripleFault`].
    pub fn deliver(&mut self, event: Event) -> Exec {
        if self.state.deprivileged {
            return self.deliver_pvm(event);
        }
        let mut event = event;
        let mut delivery = Delivery::new(event);
        for _ in 0..MOST_NESTED {
            if let Event::Fault(f) = event {
                self.note_exception(&f);
            }
            let second = match self.deliver_once(&delivery) {
                Ok(()) => return Ok(()),
                Err(stop) => match *stop {
                    Stop::Fault(f) => f,
                    other => return Err(Box::new(other)),
                },
            };
            self.stats.exceptions += 1;
            let class = Class::of_exception(second.vector);
            event = Event::Fault(if !delivery.class.doubles(class) {
                second
            } else if delivery.class == Class::DoubleFault {
                return Err(Box::new(Stop::TripleFault));
            } else {
                if second.vector == vector::PF {
                    self.note_exception(&second);
                }
                Fault::with_code(vector::DF, 0)
            });
            delivery = Delivery::new(event);
        }
        Err(Box::new(Stop::TripleFault))
    }

    /// INT n, INT3 or INTO, from inside the instruction.
    ///
    /// # Errors
    /// What is wrong with the gate, as the instruction's own fault.
    pub(crate) fn software_interrupt(&mut self, vector: u8) -> Exec {
        if self.state.deprivileged {
            return self.software_interrupt_pvm(vector);
        }
        self.deliver_once(&Delivery::new(Event::Software(vector)))?;
        self.state.slow |= slow::NO_STEP_TRAP;
        self.end_block();
        Ok(())
    }

    /// INT1: a #DB that no debug register reports, from inside the instruction.
    ///
    /// # Errors
    /// As [`Self::software_interrupt`].
    pub(crate) fn debug_interrupt(&mut self) -> Exec {
        self.state.slow |= slow::NO_STEP_TRAP;
        if self.state.deprivileged {
            return self.deliver_pvm(Event::Fault(Fault::db(0, true)));
        }
        self.deliver_once(&Delivery::new(Event::Fault(Fault::db(0, true))))?;
        self.end_block();
        Ok(())
    }

    /// What an exception leaves in registers before its delivery: CR2, or DR6 and DR7.
    pub(crate) fn note_exception(&mut self, f: &Fault) {
        match f.vector {
            vector::PF => self.state.cr2 = f.address.0,
            vector::DB => self.note_debug_exception(f.dr6),
            _ => {}
        }
    }

    fn deliver_once(&mut self, delivery: &Delivery) -> Exec {
        if !self.state.protected() {
            self.deliver_real(delivery)
        } else if self.state.long_mode() {
            self.deliver_long(delivery)
        } else {
            self.deliver_protected(delivery)
        }
    }

    /// RFLAGS as the frame holds them.
    fn flags_image(&self, delivery: &Delivery) -> u64 {
        self.state.flags.bits() | if delivery.resume { flags::RF } else { 0 }
    }

    /// Real mode: four bytes per vector at the IDTR's base.
    fn deliver_real(&mut self, delivery: &Delivery) -> Exec {
        let offset = u64::from(delivery.vector) * 4;
        if offset + 3 > u64::from(self.state.idtr.limit) {
            return fault(Fault::gp(0));
        }
        let entry: u32 =
            self.read_as(self.table_address(self.state.idtr.base, offset), Privilege::Implicit)?;
        let mut frame = Frame::current(self, 0);
        let cs = self.state.segments[usize::from(seg::CS)].selector;
        let image = self.flags_image(delivery);
        for value in [image, u64::from(cs), self.state.rip()] {
            frame.push(self, 2, value)?;
        }
        frame.install_pointer(self);
        self.load_real_segment(seg::CS, (entry >> 16) as u16);
        self.state.set_rip(u64::from(entry & 0xffff));
        self.set_rflags(flags::IF | flags::TF | flags::AC | flags::RF, 0);
        self.refresh_mode();
        Ok(())
    }

    /// The checks that legacy and long mode share, on the gate and on the code segment that it names: the
    /// code segment's descriptor and the privilege level at which its handler runs.
    fn gate_target(&mut self, delivery: &Delivery, gate: Descriptor) -> Exec<(Descriptor, u8)> {
        let ext = delivery.ext();
        let selector = gate.gate_selector();
        if is_null(selector) {
            return fault(Fault::gp(ext));
        }
        let code = selector_code(selector) | ext;
        let cs = self.read_descriptor(selector, vector::GP, ext)?;
        if !cs.is_code() || cs.dpl() > self.state.cpl {
            return fault(Fault::gp(code));
        }
        if self.state.long_mode() && (!cs.has(Segment::LONG) || cs.has(Segment::DEFAULT_BIG)) {
            return fault(Fault::gp(code));
        }
        if !cs.present() {
            return fault(Fault::with_code(vector::NP, code));
        }
        Ok((cs, if cs.is_conforming() { self.state.cpl } else { cs.dpl() }))
    }

    /// Checks the gate's DPL, for software interrupts, and its presence.
    fn check_gate(&self, delivery: &Delivery, gate: Descriptor) -> Exec {
        if delivery.software && gate.dpl() < self.state.cpl {
            return fault(Fault::gp(delivery.gate_code()));
        }
        if !gate.present() {
            return fault(Fault::with_code(vector::NP, delivery.gate_code()));
        }
        Ok(())
    }

    /// Long mode: 16-byte gates, 64-bit handlers, SS and RSP always pushed.
    fn deliver_long(&mut self, delivery: &Delivery) -> Exec {
        let ext = delivery.ext();
        let offset = u64::from(delivery.vector) * 16;
        if offset + 15 > u64::from(self.state.idtr.limit) {
            return fault(Fault::gp(delivery.gate_code()));
        }
        let address = self.state.idtr.base.wrapping_add(offset);
        let gate = Descriptor(self.read_as(address, Privilege::Implicit)?);
        let upper: u64 = self.read_as(address.wrapping_add(8), Privilege::Implicit)?;
        let kind = gate.kind();
        if !gate.is_system() || !matches!(kind, system_type::INTERRUPT_GATE | system_type::TRAP_GATE) {
            return fault(Fault::gp(delivery.gate_code()));
        }
        self.check_gate(delivery, gate)?;
        let (cs, cpl) = self.gate_target(delivery, gate)?;
        let handler = gate.gate_offset() | upper << 32;

        let ist = gate.0 >> 32 & 7;
        let switch = cpl < self.state.cpl;
        let pointer = if ist != 0 {
            self.long_stack_pointer(28 + ist * 8, ext)?
        } else if switch {
            self.long_stack_pointer(4 + u64::from(cpl) * 8, ext)?
        } else {
            self.reg(reg::RSP)
        };
        if !self.walk.canonical(Gva(handler)) {
            return fault(Fault::gp(ext));
        }
        let state = &self.state;
        let values = [
            u64::from(state.segments[usize::from(seg::SS)].selector),
            state.regs[usize::from(reg::RSP)],
            self.flags_image(delivery),
            u64::from(state.segments[usize::from(seg::CS)].selector),
            state.regs[usize::from(REG_RIP)],
        ];
        let mut frame = Frame::long(pointer & !15, cpl, ext);
        for value in values.into_iter().chain(delivery.error_code.map(u64::from)) {
            frame.push(self, 8, value)?;
        }
        self.mark_accessed(gate.gate_selector(), cs)?;

        if switch {
            frame.install(self);
        } else {
            frame.install_pointer(self);
        }
        self.put_code_segment(cs.segment(gate.gate_selector()), cs.base(), cpl);
        self.state.set_rip(handler);
        self.clear_flags_for_handler(kind == system_type::INTERRUPT_GATE);
        Ok(())
    }

    /// Protected and virtual-8086 mode: 8-byte gates of 16 or 32 bits, and task gates.
    fn deliver_protected(&mut self, delivery: &Delivery) -> Exec {
        let ext = delivery.ext();
        let offset = u64::from(delivery.vector) * 8;
        if offset + 7 > u64::from(self.state.idtr.limit) {
            return fault(Fault::gp(delivery.gate_code()));
        }
        let address = self.table_address(self.state.idtr.base, offset);
        let gate = Descriptor(self.read_as(address, Privilege::Implicit)?);
        let kind = gate.kind();
        let known = matches!(
            kind,
            system_type::TASK_GATE
                | system_type::INTERRUPT_GATE16
                | system_type::TRAP_GATE16
                | system_type::INTERRUPT_GATE
                | system_type::TRAP_GATE
        );
        if !gate.is_system() || !known {
            return fault(Fault::gp(delivery.gate_code()));
        }
        self.check_gate(delivery, gate)?;
        if kind == system_type::TASK_GATE {
            return self.switch_task(TaskSwitch::event(
                gate.gate_selector(),
                ext,
                delivery.error_code,
                delivery.resume,
            ));
        }
        let (cs, cpl) = self.gate_target(delivery, gate)?;
        let virtual_8086 = self.state.virtual_8086();
        let switch = cpl < self.state.cpl;
        if virtual_8086 && cpl != 0 {
            return fault(Fault::gp(selector_code(gate.gate_selector()) | ext));
        }
        let wide = kind & 8 != 0;
        let size = if wide { 4 } else { 2 };
        let handler = if wide { gate.gate_offset() } else { gate.gate_offset() & 0xffff };

        let mut frame = if switch { self.inner_stack(cpl, ext)? } else { Frame::current(self, ext) };
        let selector = |s: u8| u64::from(self.state.segments[usize::from(s)].selector);
        let mut values = Vec::with_capacity(10);
        if virtual_8086 {
            values.extend([selector(seg::GS), selector(seg::FS), selector(seg::DS), selector(seg::ES)]);
        }
        if switch {
            values.extend([selector(seg::SS), self.reg(reg::RSP)]);
        }
        values.extend([self.flags_image(delivery), selector(seg::CS), self.state.rip()]);
        values.extend(delivery.error_code.map(u64::from));
        let segment = cs.segment(gate.gate_selector());
        self.check_code_offset(&segment, handler, ext)?;
        for value in values {
            frame.push(self, size, value)?;
        }
        self.mark_accessed(gate.gate_selector(), cs)?;

        if switch {
            frame.install(self);
        } else {
            frame.install_pointer(self);
        }
        if virtual_8086 {
            for s in [seg::ES, seg::DS, seg::FS, seg::GS] {
                self.state.segments[usize::from(s)] = Segment::default();
                self.state.seg_base[usize::from(s)] = 0;
            }
        }
        self.put_code_segment(segment, cs.base(), cpl);
        self.state.set_rip(handler);
        self.clear_flags_for_handler(kind & 1 == 0);
        Ok(())
    }

    fn clear_flags_for_handler(&mut self, interrupt_gate: bool) {
        let interrupts = if interrupt_gate { flags::IF } else { 0 };
        self.state.flags.set_system(flags::TF | flags::NT | flags::RF | flags::VM | interrupts, 0);
        self.refresh_mode();
    }
}
