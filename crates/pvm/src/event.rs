//! Event delivery (specification, "Vector events in user mode" and "Vector events in supervisor mode").
//!
//! # Theory of operation
//! There is no IDT. An event from user mode leaves the interrupted state in the shared structure and enters supervisor
//! mode at the event entry. In supervisor mode an exception, which can come at any time, is framed on the stack
//! below a red zone and enters 256 bytes further on; an interrupt, which the guest lets in when it pleases, goes through
//! the shared structure again and enters 512 bytes further on.
//!
//! What cannot be delivered, because there is no shared structure or the stack cannot be written, is a triple
//! fault; there is no double fault.

use crate::abi::{event_flags, rflags};
use crate::processor::{Context, Processor, Register, SharedStruct};
use crate::vcpu::{Mode, Pvm, TripleFault};

/// The vector of the NMI.
const NMI: u8 = 2;
/// The vector of #PF.
const PAGE_FAULT: u8 = 14;
/// Vectors from here on are interrupts.
const FIRST_INTERRUPT: u8 = 32;

/// An exception, an interrupt or an NMI.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// The vector.
    pub vector: u8,
    /// The error code, if the event has one.
    pub error_code: Option<u32>,
    /// Bits to set in the saved RFLAGS: RF, where the processor would.
    pub flags: u64,
}

impl Event {
    /// An interrupt, or an exception without an error code.
    pub const fn new(vector: u8) -> Self {
        Self { vector, error_code: None, flags: 0 }
    }

    /// An exception with an error code.
    pub const fn with_code(vector: u8, error_code: u32) -> Self {
        Self { vector, error_code: Some(error_code), flags: 0 }
    }

    /// The non-maskable interrupt.
    pub const fn nmi() -> Self {
        Self::new(NMI)
    }
}

/// What the frame of an exception in supervisor mode holds, from its lowest address on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "the names are the specification's")]
pub struct Frame {
    /// The vector in the upper half, the error code in the lower.
    pub errcode: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub rcx: u64,
    pub r11: u64,
}

impl Frame {
    /// The frame's size in bytes.
    pub const SIZE: u64 = 64;

    /// As it lies in memory.
    pub const fn words(&self) -> [u64; 8] {
        [self.errcode, self.rip, self.cs, self.rflags, self.rsp, self.ss, self.rcx, self.r11]
    }

    /// From memory.
    pub const fn from_words([errcode, rip, cs, rflags, rsp, ss, rcx, r11]: [u64; 8]) -> Self {
        Self { errcode, rip, cs, rflags, rsp, ss, rcx, r11 }
    }
}

impl Pvm {
    /// Delivers `event`, in either PVM mode. The processor's RIP is where the guest is to resume, and CR2 is set.
    ///
    /// # Errors
    /// If it cannot be delivered.
    pub fn deliver<P: Processor>(&mut self, cpu: &mut P, event: Event) -> Result<(), TripleFault> {
        let delivered = if self.mode == Mode::User {
            self.stats.user_events += 1;
            self.leave_user(
                cpu,
                self.event_entry.wrapping_add(self.config.generation.entries.user),
                Some(event),
            )
        } else if event.vector < FIRST_INTERRUPT {
            self.stats.supervisor_exceptions += 1;
            self.supervisor_exception(cpu, event)
        } else {
            self.stats.supervisor_interrupts += 1;
            self.supervisor_interrupt(cpu, event)
        };
        self.nmi_masked |= event.vector == NMI && delivered.is_ok();
        delivered
    }

    /// From user to supervisor mode: by an event, or (`None`) by SYSCALL.
    #[inline]
    pub(crate) fn leave_user<P: Processor>(
        &mut self,
        cpu: &mut P,
        entry: u64,
        event: Option<Event>,
    ) -> Result<(), TripleFault> {
        let layout = &self.config.generation.pvcs;
        let selectors = cpu.selectors();
        let flags = cpu.register(Register::Rflags) | event.map_or(0, |e| e.flags);
        let (rip, rsp) = (cpu.register(Register::Rip), cpu.register(Register::Rsp));
        let (rcx, r11) = (cpu.register(Register::Rcx), cpu.register(Register::R11));
        let (gs_base, pkru) = (cpu.register(Register::GsBase), cpu.register(Register::Pkru));
        let cr2 = cpu.register(Register::Cr2);
        let Some(mut pvcs) = self.pvcs(cpu) else { return Err(TripleFault) };
        pvcs.store(layout.user_cs, selectors.cs.into());
        pvcs.store(layout.user_ss, selectors.ss.into());
        pvcs.store(layout.user_gsbase, gs_base);
        pvcs.store(layout.eflags, flags);
        pvcs.store(layout.pkru, pkru);
        pvcs.store(layout.rip, rip);
        pvcs.store(layout.rsp, rsp);
        pvcs.store(layout.rcx, rcx);
        pvcs.store(layout.r11, r11);
        if let Some(event) = event {
            pvcs.store(layout.event_vector, event.vector.into());
            if let Some(code) = event.error_code {
                pvcs.store(layout.event_errcode, code.into());
            }
            if event.vector == PAGE_FAULT {
                pvcs.store(layout.cr2, cr2);
            }
        }
        drop(pvcs);
        self.mode = Mode::Supervisor;
        let context = Context { cr3: self.switch_cr3, pkru: self.supervisor_pkru(cpu) };
        self.switch_cr3 = cpu.register(Register::Cr3);
        cpu.enter_supervisor(context);
        let gs_base = cpu.register(Register::KernelGsBase);
        cpu.set_register(Register::GsBase, gs_base);
        cpu.set_register(Register::Rsp, self.supervisor_rsp);
        standard_entry(cpu, entry);
        Ok(())
    }

    fn supervisor_exception<P: Processor>(&mut self, cpu: &mut P, event: Event) -> Result<(), TripleFault> {
        let rsp = cpu.register(Register::Rsp);
        let frame = Frame {
            errcode: u64::from(event.vector) << 32 | u64::from(event.error_code.unwrap_or(0)),
            rip: cpu.register(Register::Rip),
            cs: self.supervisor_cs.into(),
            rflags: self.guest_flags(cpu) | event.flags,
            rsp,
            ss: self.supervisor_ss().into(),
            rcx: cpu.register(Register::Rcx),
            r11: cpu.register(Register::R11),
        };
        let stack = self.below_redzone(rsp).wrapping_sub(Frame::SIZE);
        if !cpu.write_frame(stack, &frame.words()) {
            return Err(TripleFault);
        }
        if event.vector == PAGE_FAULT {
            let cr2 = cpu.register(Register::Cr2);
            let Some(mut pvcs) = self.pvcs(cpu) else { return Err(TripleFault) };
            pvcs.store(self.config.generation.pvcs.cr2, cr2);
        }
        self.enter_handler(cpu, stack, self.config.generation.entries.supervisor_exception);
        Ok(())
    }

    fn supervisor_interrupt<P: Processor>(&mut self, cpu: &mut P, event: Event) -> Result<(), TripleFault> {
        let layout = &self.config.generation.pvcs;
        let flags = self.guest_flags(cpu) | event.flags;
        let [rip, rsp, rcx, r11] =
            [Register::Rip, Register::Rsp, Register::Rcx, Register::R11].map(|r| cpu.register(r));
        let Some(mut pvcs) = self.pvcs(cpu) else { return Err(TripleFault) };
        pvcs.store(layout.eflags, flags);
        pvcs.store(layout.rip, rip);
        pvcs.store(layout.rsp, rsp);
        pvcs.store(layout.rcx, rcx);
        pvcs.store(layout.r11, r11);
        pvcs.store(layout.event_vector, event.vector.into());
        if let Some(code) = event.error_code {
            pvcs.store(layout.event_errcode, code.into());
        }
        drop(pvcs);
        self.enter_handler(cpu, self.below_redzone(rsp), self.config.generation.entries.supervisor_interrupt);
        Ok(())
    }

    /// The stack below the red zone, aligned.
    const fn below_redzone(&self, rsp: u64) -> u64 {
        rsp.wrapping_sub(self.supervisor_redzone) & !15
    }

    fn enter_handler<P: Processor>(&self, cpu: &mut P, stack: u64, offset: u64) {
        cpu.set_register(Register::Rsp, stack);
        standard_entry(cpu, self.event_entry.wrapping_add(offset));
        self.set_event_flags(cpu, 0, event_flags::IF);
    }

    /// RFLAGS of supervisor mode as the guest means them: IF is the shared structure's.
    pub(crate) fn guest_flags<P: Processor>(&self, cpu: &mut P) -> u64 {
        const _: () = assert!(event_flags::IF == rflags::IF);
        cpu.register(Register::Rflags) & !rflags::IF | self.event_flags(cpu) & event_flags::IF
    }
}

/// How every event enters: the registers that SYSRET would load are consistent, so that a hypervisor could use
/// it.
fn standard_entry<P: Processor>(cpu: &mut P, entry: u64) {
    cpu.set_register(Register::Rip, entry);
    cpu.set_register(Register::Rcx, entry);
    cpu.set_register(Register::R11, rflags::IF | rflags::FIXED);
    cpu.set_register(Register::Rflags, rflags::IF | rflags::FIXED);
}
