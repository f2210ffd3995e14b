//! SYSCALL: a system call, a return, or a hypercall (specification, "User SYSCALL event", "PVM Synthetic
//! Instructions", "Hypercall event in supervisor mode").
//!
//! # Theory of operation
//! In user mode SYSCALL is an event. In supervisor mode it depends on where it is: at MSR_PVM_RETU_RIP it
//! returns to user mode from the shared structure (ERETU), at MSR_PVM_RETS_RIP to supervisor mode from the stack
//! (ERETS), and anywhere else it is a hypercall.

use crate::abi::{event_flags, hypercall, rflags};
use crate::event::{Event, Frame};
use crate::processor::{Context, Flush, Processor, Register, Roots, Selectors, SharedStruct};
use crate::vcpu::{Mode, Pvm, TripleFault};

/// The length of SYSCALL in bytes.
const SYSCALL_LENGTH: u64 = 2;
/// The vector of #GP.
const GENERAL_PROTECTION: u8 = 13;

/// How a vCPU goes on after SYSCALL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Next {
    /// With the next instruction. Whether an interrupt can be delivered may have changed.
    Run,
    /// It sleeps until an interrupt, as after HLT.
    Halt,
}

impl Pvm {
    /// SYSCALL in 64-bit code. RIP is the address behind the instruction; RCX and R11 are not changed yet.
    ///
    /// # Errors
    /// If the shared structure, or the stack for ERETS, is not there.
    #[inline]
    pub fn syscall<P: Processor>(&mut self, cpu: &mut P) -> Result<Next, TripleFault> {
        let rip = cpu.register(Register::Rip);
        let address = rip.wrapping_sub(SYSCALL_LENGTH);
        if self.mode == Mode::Supervisor && address == self.retu_rip {
            return self.return_user(cpu);
        }
        let before = cpu.register(Register::Rflags);
        let flags = before & !rflags::RF;
        if flags != before {
            cpu.set_register(Register::Rflags, flags);
        }
        cpu.set_register(Register::Rcx, rip);
        cpu.set_register(Register::R11, flags);
        if self.mode == Mode::User {
            self.stats.syscalls += 1;
            let entry = cpu.register(Register::Lstar);
            self.leave_user(cpu, entry, None)?;
            Ok(Next::Run)
        } else if address == self.rets_rip {
            self.return_supervisor(cpu)
        } else {
            Ok(self.hypercall(cpu))
        }
    }

    /// ERETU.
    fn return_user<P: Processor>(&mut self, cpu: &mut P) -> Result<Next, TripleFault> {
        let layout = &self.config.generation.pvcs;
        let Some(mut pvcs) = self.pvcs(cpu) else { return Err(TripleFault) };
        let selectors =
            Selectors { cs: pvcs.load(layout.user_cs) as u16 | 3, ss: pvcs.load(layout.user_ss) as u16 | 3 };
        let flags = pvcs.load(layout.event_flags);
        if flags & event_flags::IP != 0 {
            pvcs.store(layout.event_flags, flags & !event_flags::IP);
        }
        let (gs_base, pkru) = (pvcs.load(layout.user_gsbase), pvcs.load(layout.pkru));
        let (rip, rsp, eflags) = (pvcs.load(layout.rip), pvcs.load(layout.rsp), pvcs.load(layout.eflags));
        let (rcx, r11) = (pvcs.load(layout.rcx), pvcs.load(layout.r11));
        drop(pvcs);
        self.stats.user_returns += 1;
        self.nmi_masked = false;
        self.supervisor_rsp = cpu.register(Register::Rsp);
        self.mode = Mode::User;
        let context = Context { cr3: self.switch_cr3, pkru: pkru as u32 };
        self.switch_cr3 = cpu.register(Register::Cr3);
        let loaded = cpu.enter_user(selectors, context);
        let shift = 64 - cpu.linear_address_bits();
        cpu.set_register(Register::GsBase, ((gs_base << shift) as i64 >> shift) as u64);
        cpu.set_register(Register::Rflags, rflags::underlying(eflags));
        cpu.set_register(Register::Rip, rip);
        cpu.set_register(Register::Rsp, rsp);
        cpu.set_register(Register::Rcx, rcx);
        cpu.set_register(Register::R11, r11);
        if let Err(selector) = loaded {
            // The processor refuses to enter user mode so: the user's first instruction is a #GP.
            let code = u32::from(selector & !3);
            self.deliver(cpu, Event::with_code(GENERAL_PROTECTION, code))?;
        }
        Ok(Next::Run)
    }

    /// ERETS.
    fn return_supervisor<P: Processor>(&mut self, cpu: &mut P) -> Result<Next, TripleFault> {
        let Some(words) = cpu.read_frame(cpu.register(Register::Rsp)) else { return Err(TripleFault) };
        let frame = Frame::from_words(words);
        self.stats.supervisor_returns += 1;
        self.nmi_masked = false;
        cpu.set_register(Register::Rflags, rflags::underlying(frame.rflags));
        cpu.set_register(Register::Rip, frame.rip);
        cpu.set_register(Register::Rsp, frame.rsp);
        cpu.set_register(Register::Rcx, frame.rcx);
        cpu.set_register(Register::R11, frame.r11);
        let interrupts = frame.rflags & rflags::IF;
        self.set_event_flags(cpu, interrupts, event_flags::IP | event_flags::IF & !interrupts);
        Ok(Next::Run)
    }

    fn hypercall<P: Processor>(&mut self, cpu: &mut P) -> Next {
        let number = cpu.register(Register::Rax);
        let args @ [a, b, c, _] =
            [Register::Rbx, Register::R10, Register::Rdx, Register::Rsi].map(|r| cpu.register(r));
        let own = number.checked_sub(hypercall::LOAD_PGTBL).and_then(|n| usize::try_from(n).ok());
        match own.and_then(|n| self.stats.hypercalls.get_mut(n)) {
            Some(count) => *count += 1,
            None => self.stats.kvm_hypercalls += 1,
        }
        let mut next = Next::Run;
        let result = match number {
            hypercall::LOAD_PGTBL => self.load_roots(cpu, a, b, c),
            hypercall::IRQ_WIN => {
                self.set_event_flags(cpu, 0, event_flags::IP);
                0
            }
            hypercall::IRQ_HALT => {
                self.set_interrupt_flag(cpu, true);
                next = Next::Halt;
                0
            }
            hypercall::TLB_FLUSH => {
                cpu.flush(Flush::All);
                0
            }
            hypercall::TLB_FLUSH_CURRENT => {
                cpu.flush(Flush::Roots { switch_cr3: self.switch_cr3 });
                0
            }
            hypercall::TLB_INVLPG => {
                cpu.flush(Flush::Page(a));
                0
            }
            hypercall::LOAD_GS => {
                let selector = a as u16;
                let descriptor = self.gdt.descriptor(selector);
                cpu.load_gs(if descriptor.is_some() { selector } else { 0 }, descriptor)
            }
            hypercall::RDMSR => self.read_any_msr(cpu, a as u32).unwrap_or(0),
            hypercall::WRMSR => {
                if self.write_any_msr(cpu, a as u32, b) {
                    0
                } else {
                    hypercall::EINVAL
                }
            }
            hypercall::LOAD_TLS => {
                self.gdt.set_tls([a, b, c]);
                crate::abi::selector::TLS_INDEX.into()
            }
            _ => cpu.kvm_hypercall(number, args),
        };
        cpu.set_register(Register::Rax, result);
        next
    }

    fn load_roots<P: Processor>(&mut self, cpu: &mut P, flags: u64, supervisor: u64, user: u64) -> u64 {
        let known = hypercall::LOAD_PGTBL_FLUSH | hypercall::LOAD_PGTBL_LA57;
        if flags & !known != 0 || !cpu.is_root(supervisor) || !cpu.is_root(user) {
            return hypercall::EINVAL;
        }
        let five_level = flags & hypercall::LOAD_PGTBL_LA57 != 0;
        let flush = flags & hypercall::LOAD_PGTBL_FLUSH != 0;
        cpu.load_roots(Roots { supervisor, user, five_level, flush });
        self.switch_cr3 = user;
        0
    }
}
