//! PVM mode: how a vCPU comes into it and leaves it; debugging, NMIs, sleep and wake-ups in it; where the shared
//! structure may lie.

use cpu::state::{CodeMode, cr0, cr4, efer, reg, seg};
use cpu::{Outcome, attention, flags};
use iced_x86::code_asm::*;
use pvm::Mode;
use pvm::abi::{GENERATION_1, control, event_flags, hypercall as call};

use crate::harness::*;

const MSR_EFER: u32 = 0xc000_0080;
const MSR_STAR: u32 = 0xc000_0081;
/// DR6's fixed bits, and BS.
const FIXED: u64 = 0xffff_0ff0;
const BS: u64 = 1 << 14;

/// Where the parts of [`start_up`] are: the page of a start-up IPI, 32-bit code, 64-bit code.
const REAL: u64 = 0x9000;
const P32: u64 = 0xa000;
const P64: u64 = 0xb000;

/// Puts a program at [`REAL`] that goes from real mode through protected mode and 32-bit code in long mode to 64-bit
/// code at [`P64`]. R13 is CS in long mode's 32-bit code.
fn start_up(g: &mut Guest) {
    g.poke(TABLES, TABLES + 0x1007);
    g.poke(TABLES + 0x1000, TABLES + 0x2007);
    g.poke(TABLES + 0x2000, 0x87u64);
    g.poke::<u16>(DATA, sel::LAST + 7);
    g.poke::<u32>(DATA + 2, GDT as u32);
    g.code_at(REAL, 16, |a| {
        a.mov(ax, (DATA >> 4) as i32)?;
        a.mov(ds, ax)?;
        a.lgdt(ptr(0))?;
        a.mov(eax, cr0)?;
        a.or(eax, 1)?;
        a.mov(cr0, eax)?;
        a.db(&[0x66, 0xea])?;
        a.dd(&[P32 as u32])?;
        a.dw(&[sel::CODE32])
    });
    g.code_at(P32, 32, |a| {
        a.mov(eax, u32::from(sel::DATA))?;
        a.mov(ds, ax)?;
        a.mov(es, ax)?;
        a.mov(ss, ax)?;
        a.mov(esp, STACK as u32)?;
        a.mov(eax, cr4::PAE as u32)?;
        a.mov(cr4, eax)?;
        a.mov(eax, TABLES as u32)?;
        a.mov(cr3, eax)?;
        a.mov(ecx, MSR_EFER)?;
        a.mov(eax, (efer::LME | efer::NXE) as u32)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(eax, (cr0::PG | cr0::PE | cr0::CD | cr0::NW) as u32)?;
        a.mov(cr0, eax)?;
        // Long mode, but 32-bit code: still a plain processor.
        a.mov(ebp, cs)?;
        a.pushfd()?;
        a.pop(edi)?;
        a.db(&[0xea])?;
        a.dd(&[P64 as u32])?;
        a.dw(&[sel::CODE64])
    });
    g.code_at(P64, 64, |a| {
        a.mov(r8d, cs)?;
        a.mov(r9d, ss)?;
        a.pushfq()?;
        a.pop(r10)?;
        a.mov(r11, cr0)?;
        a.mov(r12, cr4)?;
        a.mov(ecx, MSR_EFER)?;
        a.rdmsr()?;
        a.mov(r13d, eax)?;
        a.mov(ecx, MSR_STAR)?;
        a.rdmsr()?;
        a.mov(r14d, edx)?;
        a.mov(eax, pvm::abi::cpuid::VENDOR_FEATURES)?;
        a.db(&pvm::abi::cpuid::SYNTHETIC)
    });
}

/// Checks what [`start_up`] has found.
#[track_caller]
fn check_started(g: &Guest) {
    assert_eq!(g.vcpu.pvm_mode(), Mode::Supervisor);
    assert_eq!((g.reg(reg::RBP), g.reg(reg::RDI) & flags::IF), (sel::CODE32.into(), 0), "before");
    assert_eq!((g.reg(8), g.reg(9)), (0x33, 0x2b), "an unprivileged program");
    assert_eq!(g.reg(10), flags::IF | 2 | g.reg(10) & flags::ARITHMETIC);
    assert_eq!(g.reg(11) & (control::CR0_ONE | control::CR0_ZERO), control::CR0_ONE);
    assert_eq!(g.reg(12) & (control::CR4_ONE | control::CR4_ZERO), control::CR4_ONE);
    assert_eq!(g.reg(13), control::EFER_ONE | efer::NXE);
    assert_eq!(g.reg(14), 0x0023_0008, "STAR's upper half");
    assert_eq!(g.reg(reg::RBX), u64::from(pvm::abi::cpuid::PVM));
}

#[test]
fn from_real_mode_to_pvm_mode() {
    let mut g = Guest::real_before_pvm();
    start_up(&mut g);
    assert_eq!(g.vcpu.pvm_mode(), Mode::NonPvm);
    g.vcpu.state.set_rip(REAL);
    g.finish_pvm();
    check_started(&g);
}

#[test]
fn init_leads_back_to_a_plain_processor_and_sipi_starts_it_again() {
    for mode in MODES {
        let mut g = Guest::pvm_in(mode, |a| a.nop());
        start_up(&mut g);
        let narrow = pvm::AddressRanges::new(402..403, Some(402..403)).unwrap();
        let wide = g.vcpu.read_msr(MSR_RANGE).unwrap();
        g.vcpu.write_msr(MSR_RANGE, narrow.msr()).unwrap();
        g.attention.raise(attention::INIT);
        assert_eq!(g.run(), Outcome::Halted);
        assert_eq!((g.vcpu.pvm_mode(), g.vcpu.state.cpl), (Mode::NonPvm, 0));
        assert_eq!(g.vcpu.wake_mask() & (attention::SIPI | attention::INTERRUPT), attention::SIPI);
        for index in MSR_VCPU_STRUCT..=MSR_SWITCH_CR3 {
            assert_eq!(g.vcpu.read_msr(index).unwrap(), 0, "{index:#x}");
        }
        assert_eq!(g.vcpu.read_msr(MSR_RANGE).unwrap(), wide);
        g.attention.raise_sipi((REAL >> 12) as u8);
        g.engine.step(&mut g.vcpu);
        assert_eq!((g.vcpu.state.code_mode, g.vcpu.pvm_mode()), (CodeMode::Bits16, Mode::NonPvm));
        assert_eq!(g.vcpu.state.segments[usize::from(seg::CS)].selector, (REAL >> 4) as u16);
        g.finish_pvm();
        check_started(&g);
    }
}

#[test]
fn a_plain_processor_until_then_has_its_idt() {
    let mut g = Guest::real_before_pvm();
    for vector in 0..256 {
        g.poke::<u32>(vector * 4, (HANDLERS + vector * 16) as u32);
    }
    g.code(|a| a.int(0x21));
    assert_eq!(g.fault(0x21).rip, CODE + 2);
    // The MSRs are there from the start.
    assert_eq!(g.vcpu.read_msr(MSR_EVENT_ENTRY).unwrap(), 0);
    g.vcpu.write_msr(MSR_EVENT_ENTRY, ENTRY).unwrap();
    assert_eq!(g.vcpu.read_msr(MSR_EVENT_ENTRY).unwrap(), ENTRY);
}

#[test]
fn a_vcpu_without_the_abi_stays_plain() {
    let mut g = Guest::long();
    g.code(|a| {
        a.mov(eax, cs)?;
        a.mov(ecx, MSR_EVENT_ENTRY)?;
        a.rdmsr()
    });
    assert_eq!(g.fault(13).error_code, Some(0));
    assert_eq!(g.reg(reg::RAX), u64::from(sel::CODE64));
    assert!(g.vcpu.pvm_stats().is_none());
}

// ---- debugging ----

#[test]
fn breakpoints_work_in_both_modes() {
    for mode in MODES {
        // Data.
        let mut g = Guest::pvm_in(mode, |a| a.mov(dword_ptr(DATA), eax));
        g.vcpu.state.dr[0] = DATA;
        g.vcpu.state.dr7 = 0x400 | 1 | 0xd << 16;
        g.vcpu.refresh();
        let event = g.pvm_fault(1);
        assert_eq!((event.from, g.vcpu.state.dr6), (mode, FIXED | 1));
        assert!(event.rip > CODE && event.rflags & flags::RF == 0, "a trap");
        // Code: a fault, RF is the handler's to set.
        let mut g = Guest::pvm_in(mode, |a| {
            a.nop()?;
            a.nop()
        });
        g.vcpu.state.dr[2] = CODE + 1;
        g.vcpu.state.dr7 = 0x400 | 1 << 4;
        g.vcpu.refresh();
        let event = g.pvm_fault(1);
        assert_eq!((event.from, event.rip, event.rflags & flags::RF), (mode, CODE + 1, 0));
        assert_eq!(g.vcpu.state.dr6, FIXED | 4);
        // With RF set in what is returned to, execution goes on.
        let p = &GENERATION_1.pvcs;
        if mode == Mode::User {
            g.set_pvcs(p.eflags, g.pvcs(p.eflags) | flags::RF);
            g.resume_at(RETU);
        } else {
            let at = g.reg(reg::RSP) + 24;
            g.poke(at, g.peek::<u64>(at) | flags::RF);
            g.resume_at(RETS);
        }
        g.finish_pvm();
    }
}

#[test]
fn breakpoints_outside_the_ranges_are_not_armed() {
    // In slot 402 of the PML4 table, which is in the range, and in 300, which is not.
    for (slot, armed) in [(402u64, true), (300, false)] {
        for mode in MODES {
            let address = 0xffff << 48 | slot << 39 | DATA;
            let mut g = Guest::pvm_in(mode, |a| a.jmp(rdi));
            g.poke(TABLES + slot * 8, TABLES + 0x1007);
            g.vcpu.set_reg(reg::RDI, address);
            g.vcpu.state.dr[3] = address;
            g.vcpu.state.dr7 = 0x400 | 1 << 6;
            g.vcpu.refresh();
            let event = g.pvm_fault(if armed { 1 } else { 14 });
            assert_eq!((event.from, event.rip), (mode, address));
            // What the guest reads is what it wrote.
            assert_eq!((g.vcpu.state.dr[3], g.vcpu.state.dr7), (address, 0x400 | 1 << 6));
        }
    }
}

#[test]
fn frames_and_the_shared_structure_meet_no_breakpoints() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| a.ud2());
    g.vcpu.state.dr = [STACK - 64, STACK - 8, PVCS + 96, PVCS];
    g.vcpu.state.dr7 = 0x400 | 0x55 | 0xffff_0000;
    g.vcpu.refresh();
    assert_eq!(g.pvm_fault(6).rip, CODE);
    g.resume_at(RETS);
    assert_eq!(g.pvm_fault(6).rip, CODE);
    g.code_at(CODE, 64, |a| a.ud2());
    g.pvm_user(CODE, STACK, 0);
    assert_eq!(g.pvm_fault(6).from, Mode::User);
    assert_eq!(g.vcpu.state.dr6, FIXED);
}

/// A guest in `mode` in front of a load of SS from a watched address, at which `program` follows.
fn watched_mov_ss(
    mode: Mode,
    program: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Guest {
    let mut g = Guest::pvm_in(mode, |a| {
        a.mov(ss, word_ptr(DATA))?;
        program(a)
    });
    g.poke(DATA, 0x2bu16);
    g.vcpu.state.dr[0] = DATA;
    g.vcpu.state.dr7 = 0x400 | 1 | 3 << 16;
    g.vcpu.refresh();
    g
}

#[test]
fn a_watched_mov_ss_traps_one_instruction_later() {
    for mode in MODES {
        let mut g = watched_mov_ss(mode, |a| {
            a.inc(ebp)?;
            a.inc(r12d)
        });
        let event = g.pvm_fault(1);
        assert_eq!((event.from, g.reg(reg::RBP), g.reg(12)), (mode, 1, 0));
        assert_eq!(g.vcpu.state.dr6, FIXED | 1);
    }
}

#[test]
fn a_debug_trap_that_would_come_in_the_hypervisor_is_dropped() {
    let gone = |g: &Guest| assert_eq!((g.vcpu.state.dr6, g.vcpu.state.pending_dr6), (FIXED, 0));
    // A user's program ends in a system call.
    let mut g = watched_mov_ss(Mode::User, |_| Ok(()));
    g.finish_pvm();
    gone(&g);
    for from in MODES {
        for vector in [3, 6, 0x80] {
            let mut g = watched_mov_ss(from, |a| match vector {
                3 => a.int3(),
                6 => a.ud2(),
                _ => a.int(0x80),
            });
            assert_eq!(g.pvm_fault(vector).from, from);
            gone(&g);
        }
    }
    let mut g = watched_mov_ss(Mode::Supervisor, |a| {
        a.syscall()?;
        a.nop()
    });
    g.vcpu.set_reg(reg::RAX, call::TLB_FLUSH);
    g.finish_pvm();
    assert_eq!(g.reg(reg::RAX), 0);
    gone(&g);
}

#[test]
fn single_step_does_not_follow_a_user_into_the_supervisor() {
    let p = &GENERATION_1.pvcs;
    type Program = fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>;
    let cases: [(Program, Option<u8>, u64); 5] = [
        (|a| a.syscall(), None, 2),
        (|a| a.int(0x80), Some(0x80), 2),
        (|a| a.int3(), Some(3), 1),
        (|a| a.int1(), Some(1), 1),
        (|a| a.ud2(), Some(6), 0),
    ];
    for (program, vector, len) in cases {
        let mut g = Guest::pvm();
        g.code_at(CODE, 64, |a| {
            program(a)?;
            a.nop()?;
            a.nop()
        });
        g.pvm_user(CODE, STACK, flags::TF);
        let event = g.run_pvm();
        assert_eq!(event.map(|e| e.vector), vector);
        assert_eq!(g.pvcs(p.rip), CODE + len);
        assert_eq!(g.pvcs(p.eflags) & flags::TF, flags::TF, "saved");
        assert_eq!(g.vcpu.state.flags.bits() & flags::TF, 0);
        assert_eq!(g.vcpu.state.dr6 & BS, 0);
        if len > 0 {
            // ERETU loads TF: the trap comes behind the first instruction.
            g.resume_at(RETU);
            let event = g.pvm_fault(1);
            assert_eq!((event.from, event.rip), (Mode::User, CODE + len + 1));
            assert_eq!(g.vcpu.state.dr6, FIXED | BS);
        }
    }
}

#[test]
fn single_step_of_a_supervisor_does_not_follow_it_to_its_user() {
    let mut g = Guest::pvm();
    g.code_at(CODE, 64, |a| a.ud2());
    let p = &GENERATION_1.pvcs;
    for (field, value) in [(p.user_cs, 0x33), (p.user_ss, 0x2b), (p.rip, CODE), (p.rsp, STACK)] {
        g.set_pvcs(field, value);
    }
    g.resume_at(RETU);
    g.vcpu.set_rflags(flags::TF, flags::TF);
    assert_eq!(g.pvm_fault(6).from, Mode::User);
    assert_eq!(g.vcpu.state.dr6, FIXED);
}

#[test]
fn a_supervisor_steps_through_hypercalls_and_returns() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        hypercall(a, call::TLB_FLUSH, [0; 3])?;
        a.nop()
    });
    // Up to the SYSCALL, then a step over it.
    let syscall = (CODE..).find(|at| g.peek::<u16>(*at) == 0x050f).unwrap();
    while g.vcpu.state.rip() != syscall {
        g.engine.step(&mut g.vcpu);
    }
    g.vcpu.set_rflags(flags::TF, flags::TF);
    let event = g.pvm_fault(1);
    assert_eq!((event.from, event.rip), (Mode::Supervisor, syscall + 2));
    assert_eq!(event.rflags & flags::TF, flags::TF);
    // ERETS loads TF: one more instruction.
    g.resume_at(RETS);
    let event = g.pvm_fault(1);
    assert_eq!((event.rip, g.reg(reg::RSP)), (syscall + 3, STACK - 64));
}

// ---- NMIs ----

#[test]
fn an_nmi_masks_others_until_a_synthetic_return() {
    for mode in MODES {
        for erets in [true, false] {
            let mut g = Guest::pvm_in(mode, |a| a.nop());
            g.attention.raise(attention::NMI);
            let event = g.pvm_fault(2);
            assert_eq!((event.from, event.rip), (mode, CODE));
            assert_eq!(g.vcpu.wake_mask() & attention::NMI, 0);
            // The next one waits, whatever is executed but a synthetic return.
            g.attention.raise(attention::NMI);
            g.code_at(CODE + 0x100, 64, |a| {
                a.mov(rax, rsp)?;
                a.push(0x10)?;
                a.push(rax)?;
                a.push(2)?;
                a.push(0x08)?;
                a.push((CODE + 0x200) as i32)?;
                a.iretq()
            });
            g.code_at(CODE + 0x200, 64, |a| hypercall(a, call::IRQ_WIN, [0; 3]));
            g.resume_at(CODE + 0x100);
            assert_eq!(g.run_pvm(), None);
            if erets {
                let frame = pvm::Frame { rip: CODE + 0x300, rsp: STACK, ..Default::default() };
                for (n, word) in frame.words().into_iter().enumerate() {
                    g.poke(DATA + n as u64 * 8, word);
                }
                g.code_at(CODE + 0x300, 64, |a| a.nop());
                g.vcpu.set_reg(reg::RSP, DATA);
                g.resume_at(RETS);
                let event = g.pvm_fault(2);
                assert_eq!((event.from, event.rip), (Mode::Supervisor, CODE + 0x300));
            } else {
                g.code_at(CODE + 0x300, 64, |a| a.nop());
                g.pvm_user(CODE + 0x300, STACK, 0);
                let event = g.pvm_fault(2);
                assert_eq!((event.from, event.rip), (Mode::User, CODE + 0x300));
            }
        }
    }
}

#[test]
fn an_nmi_does_not_look_at_the_interrupt_flag_and_clears_it() {
    for flag in [0, event_flags::IF] {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| a.nop());
        g.set_pvcs(GENERATION_1.pvcs.event_flags, flag);
        g.attention.raise(attention::NMI);
        assert_eq!(g.pvm_fault(2).rflags & flags::IF, flag);
        assert_eq!(g.pvcs(GENERATION_1.pvcs.event_flags), 0);
    }
}

// ---- interrupts and sleep ----

#[test]
fn interrupts_are_always_open_in_user_mode() {
    let field = GENERATION_1.pvcs.event_flags;
    for flag in [0, event_flags::IF] {
        let mut g = Guest::pvm_in(Mode::User, |a| a.nop());
        g.set_pvcs(field, flag);
        g.set_pvcs(GENERATION_1.pvcs.event_errcode, 0x55);
        g.interrupt(0x99);
        let event = g.pvm_fault(0x99);
        assert_eq!((event.from, event.rip), (Mode::User, CODE));
        assert_eq!(g.pvcs(field), flag, "unchanged by a change of modes");
        assert_eq!(g.pvcs(GENERATION_1.pvcs.event_errcode), 0x55, "not written");
    }
}

#[test]
fn an_interrupt_in_supervisor_mode_leaves_its_state_in_the_shared_structure() {
    let p = &GENERATION_1.pvcs;
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| a.nop());
    g.vcpu.write_msr(MSR_REDZONE, 128).unwrap();
    g.set_pvcs(p.event_flags, event_flags::IF);
    g.set_pvcs(p.user_cs, 0x1234);
    let registers = [(reg::RSP, STACK - 5), (reg::RCX, 0x11), (11, 0x22)];
    for (n, value) in registers {
        g.vcpu.set_reg(n, value);
    }
    g.interrupt(0x20);
    let event = g.pvm_fault(0x20);
    assert_eq!((event.rip, event.rsp, event.rflags & flags::IF), (CODE, STACK - 5, flags::IF));
    assert_eq!((g.pvcs(p.rcx), g.pvcs(p.r11), g.pvcs(p.user_cs)), (0x11, 0x22, 0x1234));
    let entry = ENTRY + 512;
    assert_eq!((g.reg(reg::RCX), g.reg(11), g.reg(reg::RSP)), (entry, 0x202, (STACK - 5 - 128) & !15));
    assert_eq!(g.pvcs(p.event_flags), 0);
}

#[test]
fn every_synthetic_return_clears_the_pending_flag() {
    let p = &GENERATION_1.pvcs;
    let mut g = Guest::pvm();
    g.code_at(CODE, 64, |a| a.nop());
    g.set_pvcs(p.event_flags, event_flags::IP);
    let frame = pvm::Frame { rip: CODE, rsp: STACK, ..Default::default() };
    for (n, word) in frame.words().into_iter().enumerate() {
        g.poke(DATA + n as u64 * 8, word);
    }
    g.vcpu.set_reg(reg::RSP, DATA);
    g.resume_at(RETS);
    g.finish_pvm();
    assert_eq!((g.pvcs(p.event_flags), g.reg(reg::RSP)), (0, STACK));
    g.set_pvcs(p.event_flags, event_flags::IP | event_flags::IF);
    g.pvm_user(CODE, STACK, 0);
    assert_eq!(g.pvcs(p.event_flags), event_flags::IF);
}

#[test]
fn sleep_with_interrupts_closed_ends_by_an_nmi() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.hlt()?;
        a.nop()
    });
    g.finish_pvm();
    assert_eq!(g.vcpu.wake_mask() & (attention::INTERRUPT | attention::NMI), attention::NMI);
    g.interrupt(0x40);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.vcpu.state.rip(), CODE + 1);
    assert_eq!(g.pvcs(GENERATION_1.pvcs.event_flags), event_flags::IP, "the guest is told");
    g.attention.raise(attention::NMI);
    assert_eq!(g.pvm_fault(2).rip, CODE + 1);
}

#[test]
fn irq_halt_opens_interrupts_and_sleeps() {
    let p = &GENERATION_1.pvcs;
    for early in [false, true] {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| hypercall(a, call::IRQ_HALT, [0; 3]));
        g.set_pvcs(p.event_flags, event_flags::IP);
        if early {
            g.interrupt(0x40);
        } else {
            assert_eq!(g.run_pvm(), None);
            assert_eq!(g.pvcs(p.event_flags), event_flags::IF);
            assert_eq!(g.vcpu.wake_mask() & attention::INTERRUPT, attention::INTERRUPT);
            g.interrupt(0x40);
        }
        let event = g.pvm_fault(0x40);
        assert_eq!(g.peek::<u16>(event.rip - 2), 0x050f, "behind the hypercall");
        assert_eq!((event.from, event.rflags & flags::IF), (Mode::Supervisor, flags::IF));
    }
}

#[test]
fn a_sleeper_can_be_woken_without_an_interrupt() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        hypercall(a, call::IRQ_HALT, [0; 3])?;
        a.mov(ebp, 5)
    });
    assert_eq!(g.run_pvm(), None);
    assert_ne!(g.reg(reg::RBP), 5);
    g.attention.raise(attention::UNHALT);
    assert_eq!(g.run_pvm(), None);
    assert_eq!(g.reg(reg::RBP), 5);
}

#[test]
fn there_is_no_interrupt_shadow() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.sti()?;
        a.nop()?;
        a.nop()
    });
    g.interrupt(0x40);
    assert_eq!(g.pvm_fault(0x40).rip, CODE + 1);
}

// ---- returns and entries ----

#[test]
fn eretu_makes_its_values_good() {
    let p = &GENERATION_1.pvcs;
    let mut g = Guest::pvm();
    g.vcpu.write_msr(0xc000_0102, DATA).unwrap();
    g.code_at(CODE, 64, |a| {
        a.rdgsbase(r8)?;
        a.pushfq()?;
        a.pop(r9)?;
        a.mov(r12, rcx)?;
        a.mov(r13, r11)?;
        a.syscall()
    });
    g.set_pvcs(p.user_gsbase, 0x1234_8000_0000_0000);
    for (field, value) in [(p.rcx, 0x77), (p.r11, 0x88)] {
        g.set_pvcs(field, value);
    }
    let everything = u64::from(u32::MAX) & !(flags::TF | flags::AC | flags::RF);
    g.vcpu.set_reg(reg::RSP, STACK - 0x100);
    g.pvm_user(CODE, STACK, everything);
    g.finish_pvm();
    assert_eq!(g.reg(8), 0xffff_8000_0000_0000, "the base, made canonical");
    let good = flags::ARITHMETIC | flags::DF | flags::NT | flags::ID | flags::IF | 2;
    assert_eq!(g.reg(9), good);
    assert_eq!((g.reg(12), g.reg(13)), (0x77, 0x88));
    assert_eq!(g.pvcs(p.user_gsbase), 0xffff_8000_0000_0000);
    // On entry the supervisor finds its stack and its base.
    assert_eq!((g.reg(reg::RSP), g.vcpu.state.seg_base[usize::from(seg::GS)]), (STACK - 0x100, DATA));
    assert_eq!(g.vcpu.read_msr(MSR_SUPERVISOR_RSP).unwrap(), STACK - 0x100);
}

#[test]
fn alignment_checks_are_for_users() {
    let mut g = Guest::pvm();
    g.code_at(CODE, 64, |a| a.mov(eax, dword_ptr(DATA + 1)));
    g.pvm_user(CODE, STACK, flags::AC);
    assert_eq!(g.pvm_fault(17).error_code, Some(0));
    // The handler may do so.
    g.resume_at(CODE);
    g.finish_pvm();
}

#[test]
fn kvms_hypercalls_take_their_second_argument_from_r10() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.mov(esi, 4)?;
        hypercall(a, 11, [1, 2, 3])
    });
    g.answer(&[99]);
    g.finish_pvm();
    assert_eq!(g.seen(), [Seen::Hypercall { number: 11, args: [1, 2, 3, 4], long_mode: true, cpl: 0 }]);
    assert_eq!(g.reg(reg::RAX), 99);
}

#[test]
fn msrs_by_hypercall() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        hypercall(a, call::WRMSR, [MSR_RETS_RIP.into(), 0x1234, 0])?;
        a.mov(r12, rax)?;
        hypercall(a, call::RDMSR, [MSR_RETS_RIP.into(), 0, 0])?;
        a.mov(r13, rax)?;
        hypercall(a, call::WRMSR, [0x1234_5678, 1, 0])?;
        a.mov(r14, rax)?;
        hypercall(a, call::RDMSR, [0x1234_5678, 0, 0])
    });
    g.finish_pvm();
    assert_eq!((g.reg(12), g.reg(13), g.reg(14), g.reg(reg::RAX)), (0, 0x1234, call::EINVAL, 0));
}

// ---- where the shared structure lies ----

#[test]
fn the_shared_structure_among_code() {
    // The user's loop and the supervisor's handler lie in the structure's page, which every system call writes.
    let mut g = Guest::pvm();
    let (user, handler) = (PVCS + 0x800, PVCS + 0x900);
    g.vcpu.write_msr(0xc000_0082, handler).unwrap();
    g.code_at(user, 64, |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.inc(r12d)?;
        a.syscall()?;
        a.dec(r14d)?;
        a.jne(top)?;
        a.ud2()
    });
    g.code_at(handler, 64, |a| {
        a.inc(r13d)?;
        a.jmp(RETU)
    });
    g.vcpu.set_reg(14, 100);
    g.pvm_user(user, STACK, 0);
    assert_eq!(g.pvm_fault(6).from, Mode::User);
    assert_eq!((g.reg(12), g.reg(13), g.reg(14)), (100, 100, 0));
}

#[test]
fn code_inside_the_shared_structure_is_never_stale() {
    // The user's RSP, as the hypervisor saves it, is MOV EAX, n; RET, which the supervisor calls.
    const ROUNDS: u32 = 50;
    let mut g = Guest::pvm();
    let saved_rsp = PVCS + u64::from(GENERATION_1.pvcs.rsp.offset);
    g.code_at(LSTAR, 64, |a| {
        a.call(saved_rsp)?;
        a.add(r13d, eax)?;
        a.jmp(RETU)
    });
    g.code_at(CODE, 64, |a| {
        let mut top = a.create_label();
        a.mov(rbx, 0x9090_c300_0000_00b8u64)?;
        a.set_label(&mut top)?;
        a.mov(edx, r14d)?;
        a.shl(rdx, 8)?;
        a.lea(rsp, ptr(rbx + rdx))?;
        a.syscall()?;
        a.dec(r14d)?;
        a.jne(top)?;
        a.ud2()
    });
    g.vcpu.set_reg(14, ROUNDS.into());
    g.pvm_user(CODE, STACK, 0);
    assert_eq!(g.pvm_fault(6).from, Mode::User);
    assert_eq!(g.reg(13), u64::from(ROUNDS * (ROUNDS + 1) / 2));
}

#[test]
fn the_shared_structure_in_the_stacks_page() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.mov(rsp, PVCS + 0x1000)?;
        a.push(7)?;
        a.ud2()?;
        a.pop(rbp)
    });
    g.pvm_skip(2);
    g.finish_pvm();
    assert_eq!((g.reg(reg::RBP), g.reg(15), g.reg(reg::RSP)), (7, 1, PVCS + 0x1000));
}

#[test]
fn a_frame_in_a_page_of_code_replaces_it() {
    // A function in the stack's page, where the frame of the second UD2 comes to lie.
    let at = STACK - 0x40;
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.call(at)?;
        a.mov(r12d, eax)?;
        a.ud2()?;
        a.call(at)
    });
    g.code_at(at, 64, |a| {
        a.mov(eax, 1)?;
        a.ret()
    });
    g.code_at(ENTRY + 256, 64, |a| {
        a.add(qword_ptr(rsp + 8), 2)?;
        // MOV EAX, 2; RET, in place of error code and vector.
        a.mov(rax, 0x9090_c300_0000_02b8u64)?;
        a.mov(qword_ptr(rsp), rax)?;
        a.jmp(RETS)
    });
    g.finish_pvm();
    assert_eq!((g.reg(12), g.reg(reg::RAX)), (1, 2));
}
