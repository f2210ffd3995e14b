//! PVM mode: guests that mean harm. Each ends in the architectural fault, the documented error, or a triple fault of
//! its own.

use std::sync::Arc;
use std::thread;

use cpu::state::{CodeMode, reg, seg};
use cpu::{Outcome, attention, flags};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use pvm::abi::hypercall as call;
use pvm::abi::{GENERATION_1, event_flags};
use pvm::{Frame, Mode};

use crate::harness::*;

/// The entry of `address`, below 2 MiB.
fn entry(address: u64) -> u64 {
    PT + (address >> 12) * 8
}

/// An upper-half address outside the ranges.
const FORBIDDEN: u64 = 0xffff_8000_0000_0000;
/// Neither half's.
const NON_CANONICAL: u64 = 0x8000_0000_0000;

fn put_frame(g: &mut Guest, at: u64, frame: Frame) {
    for (n, word) in frame.words().into_iter().enumerate() {
        g.poke(at + n as u64 * 8, word);
    }
}

// ---- the shared structure ----

#[test]
fn a_shared_structure_outside_memory_is_refused() {
    for value in [RAM as u64, MMIO, 1, PVCS + 8, PVCS + 0xfff, !0xfff, 1 << 52, 1 << 63, u64::MAX] {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
            hypercall(a, call::WRMSR, [MSR_VCPU_STRUCT.into(), value, 0])?;
            a.mov(r12, rax)?;
            write_msr(a, MSR_VCPU_STRUCT, value)
        });
        assert_eq!(g.pvm_fault(13).error_code, Some(0), "{value:#x}");
        assert_eq!(g.reg(12), call::EINVAL);
        assert_eq!(g.vcpu.read_msr(MSR_VCPU_STRUCT).unwrap(), PVCS, "the old one stays");
    }
    // The last page, and none.
    for value in [RAM as u64 - 0x1000, 0] {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| write_msr(a, MSR_VCPU_STRUCT, value));
        g.finish_pvm();
    }
}

#[test]
fn a_shared_structure_on_other_tables_is_the_guests_own_affair() {
    // On the root table, the page table, the code of the entries, the stack.
    for page in [TABLES, PT, ENTRY, CODE, STACK - 0x1000] {
        let mut g = Guest::pvm();
        g.vcpu.write_msr(MSR_VCPU_STRUCT, page).unwrap();
        g.code_at(CODE + 0x200, 64, |a| {
            a.syscall()?;
            a.ud2()
        });
        let p = &GENERATION_1.pvcs;
        for (field, value) in
            [(p.user_cs, 0x33u16), (p.user_ss, 0x2b)].map(|(f, v)| (page + u64::from(f.offset), v))
        {
            g.poke(field, value);
        }
        g.poke(page + u64::from(p.rip.offset), CODE + 0x200);
        g.poke(page + u64::from(p.rsp.offset), STACK);
        g.poke(page + u64::from(p.eflags.offset), 0u32);
        g.resume_at(RETU);
        // Twice into user mode if the guest has not overwritten itself.
        for _ in 0..2 {
            let outcome = g.run();
            assert!(matches!(outcome, Outcome::Halted | Outcome::TripleFault), "{outcome:?}");
            g.resume_at(RETU);
        }
    }
}

#[test]
fn what_needs_the_shared_structure_shuts_down_without_it() {
    type Program = fn(&mut CodeAssembler) -> Result<(), IcedError>;
    let without = |mode, program: Program| {
        let mut g = Guest::pvm_in(mode, program);
        g.vcpu.write_msr(MSR_VCPU_STRUCT, 0).unwrap();
        (g.run(), g)
    };
    let fatal: [(Mode, Program); 8] = [
        (Mode::User, |a| a.syscall()),
        (Mode::User, |a| a.ud2()),
        (Mode::User, |a| a.int(0x80)),
        (Mode::User, |a| a.hlt()),
        (Mode::User, |a| a.mov(eax, dword_ptr(0x4000_0000))),
        // CR2 has no other place.
        (Mode::Supervisor, |a| a.mov(eax, dword_ptr(0x4000_0000))),
        (Mode::Supervisor, |a| a.int(0x80)),
        (Mode::Supervisor, |a| a.jmp(RETU)),
    ];
    for (n, (mode, program)) in fatal.into_iter().enumerate() {
        assert_eq!(without(mode, program).0, Outcome::TripleFault, "case {n}");
    }
    // Other exceptions of supervisor mode need the stack alone.
    let (outcome, mut g) = without(Mode::Supervisor, |a| a.ud2());
    assert_eq!((outcome, g.pvm_event().map(|e| e.vector)), (Outcome::Halted, Some(6)));
    // Interrupts are closed, and hypercalls about them change nothing.
    g.interrupt(0x40);
    g.pvm_program(Mode::Supervisor, |a| {
        hypercall(a, call::IRQ_WIN, [0; 3])?;
        a.sti()?;
        a.nop()
    });
    g.finish_pvm();
    // A user without it is interrupted into the triple fault.
    let mut g = Guest::pvm_in(Mode::User, |a| a.nop());
    g.vcpu.write_msr(MSR_VCPU_STRUCT, 0).unwrap();
    g.interrupt(0x40);
    assert_eq!(g.run(), Outcome::TripleFault);
}

// ---- entries ----

#[test]
fn entries_must_be_canonical() {
    for (index, value) in [
        (MSR_EVENT_ENTRY, NON_CANONICAL),
        (MSR_EVENT_ENTRY, NON_CANONICAL - 1),
        (MSR_EVENT_ENTRY, NON_CANONICAL - 512),
        (MSR_EVENT_ENTRY, 0xffff_7fff_ffff_ffff),
        (0xc000_0082, NON_CANONICAL),
        (0xc000_0102, NON_CANONICAL),
    ] {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
            hypercall(a, call::WRMSR, [index.into(), value, 0])?;
            a.mov(r12, rax)?;
            write_msr(a, index, value)
        });
        assert_eq!(g.pvm_fault(13).error_code, Some(0), "{index:#x} {value:#x}");
        assert_eq!(g.reg(12), call::EINVAL);
    }
}

#[test]
fn an_entry_in_the_users_pages_runs_as_supervisor() {
    let mut g = Guest::pvm_in(Mode::User, |a| a.syscall());
    g.code_at(DATA, 64, |a| a.mov(rbx, cr3));
    g.vcpu.write_msr(0xc000_0082, DATA).unwrap();
    g.finish_pvm();
    assert_eq!(g.reg(reg::RBX), TABLES);
}

#[test]
fn entries_that_fault_end_with_the_stack() {
    // Not mapped, forbidden, and not executable: each delivery faults again, 64 bytes further down.
    for at in [0x4000_0000, FORBIDDEN, DATA] {
        for mode in MODES {
            let mut g = Guest::pvm_in(mode, |a| a.ud2());
            g.poke(entry(DATA), DATA | 7 | 1 << 63);
            // One page of stack.
            g.poke(entry(STACK - 0x2000), 0u64);
            g.vcpu.write_msr(MSR_EVENT_ENTRY, at).unwrap();
            let before = g.vcpu.stats.exceptions;
            assert_eq!(g.run(), Outcome::TripleFault);
            // The first of a user is not on the stack; the last finds none.
            let frames = 0x1000 / 64 + 1 + u64::from(mode == Mode::User);
            assert_eq!(g.vcpu.stats.exceptions - before, frames, "{at:#x} in {mode:?}");
        }
    }
}

#[test]
fn a_guest_that_faults_for_ever_can_be_kicked() {
    // The red zone takes the stack pointer up by the size of a frame, so that the stack never ends.
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| a.ud2());
    g.vcpu.write_msr(MSR_EVENT_ENTRY, 0x4000_0000).unwrap();
    g.vcpu.write_msr(MSR_REDZONE, 0u64.wrapping_sub(Frame::SIZE)).unwrap();
    let (attention, ram) = (Arc::clone(&g.attention), Arc::clone(&g.ram));
    let outcome = thread::scope(|scope| {
        scope.spawn(move || {
            // Until the frame of the second fault is there.
            let rip = vm_memory::GuestAddress(STACK + 8);
            while vm_memory::Bytes::read_obj::<u64>(ram.memory(), rip).unwrap() != 0x4000_0100 {
                thread::yield_now();
            }
            attention.raise(attention::KICK);
        });
        g.run()
    });
    assert_eq!(outcome, Outcome::Kicked);
    assert_eq!((g.vcpu.state.rip(), g.reg(reg::RSP)), (0x4000_0100, STACK));
    // It goes on like that.
    g.attention.raise(attention::INIT);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!(g.vcpu.pvm_mode(), Mode::NonPvm);
}

// ---- stacks ----

#[test]
fn a_frame_that_cannot_be_written_is_a_triple_fault() {
    // Writable, read-only, writable, not there, writable.
    const PAGES: u64 = 0x5_0000;
    const END: u64 = PAGES + 0x5000;
    for (stack, what) in [
        (PAGES + 0x2000, "read-only"),
        (PAGES + 0x4000, "not mapped"),
        (PAGES + 0x1020, "upper half read-only"),
        (PAGES + 0x2020, "lower half read-only"),
        (PAGES + 0x3020, "upper half not mapped"),
        (PAGES + 0x4020, "lower half not mapped"),
        (MMIO + 0x100, "MMIO"),
        (NON_CANONICAL + 0x1000, "not canonical"),
        (NON_CANONICAL + 16, "across the end of the lower half"),
        (FORBIDDEN + 0x1000, "forbidden"),
        (0, "at the end of all addresses"),
        (16, "across it"),
    ] {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| a.ud2());
        g.poke(entry(PAGES + 0x1000), (PAGES + 0x1000) | 5);
        g.poke(entry(PAGES + 0x3000), (PAGES + 0x3000) | 6);
        g.vcpu.set_reg(reg::RSP, stack);
        assert_eq!(g.run(), Outcome::TripleFault, "{what}");
        assert!(g.seen().is_empty(), "{what}: {:?}", g.seen());
        let written = (PAGES..END).step_by(8).find(|at| g.peek::<u64>(*at) != 0);
        assert_eq!(written, None, "{what}: nothing is written by halves");
    }
}

#[test]
fn a_page_fault_of_the_stack_itself_is_a_triple_fault() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.mov(rsp, 0x4000_0000u64)?;
        a.push(rax)
    });
    assert_eq!(g.run(), Outcome::TripleFault);
    // From user mode it is the user's fault, on the supervisor's stack pointer.
    let mut g = Guest::pvm_in(Mode::User, |a| {
        a.mov(rsp, 0x4000_0000u64)?;
        a.push(rax)
    });
    let event = g.pvm_fault(14);
    assert_eq!((event.error_code, event.rsp), (Some(6), 0x4000_0000));
    // A supervisor stack pointer that is no address is found by the first push.
    let mut g = Guest::pvm_in(Mode::User, |a| a.syscall());
    g.code_at(LSTAR, 64, |a| a.push(rax));
    g.vcpu.write_msr(MSR_SUPERVISOR_RSP, NON_CANONICAL).unwrap();
    assert_eq!(g.run(), Outcome::TripleFault);
}

#[test]
fn a_frame_may_cross_pages_that_are_apart() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| a.ud2());
    // The page below the stack's is elsewhere.
    let (upper, lower) = (STACK - 0x1000, STACK - 0x2000);
    g.poke(entry(lower), 0x5_0000u64 | 7);
    g.vcpu.set_reg(reg::RSP, upper + 32);
    g.vcpu.set_reg(reg::RCX, 0x1234);
    g.vcpu.set_reg(11, 0x5678);
    assert_eq!(g.run(), Outcome::Halted);
    assert_eq!((g.vcpu.state.rip(), g.reg(reg::RSP)), (ENTRY + 257, upper - 32));
    let low: [u64; 4] = std::array::from_fn(|n| g.peek(0x5_0fe0 + n as u64 * 8));
    let high: [u64; 4] = std::array::from_fn(|n| g.peek(upper + n as u64 * 8));
    assert_eq!((low[0], low[1], low[2]), (6 << 32, CODE, 0x08));
    assert_eq!(high, [upper + 32, 0x10, 0x1234, 0x5678]);
    // And back across them.
    g.code_at(CODE, 64, |a| a.nop());
    g.resume_at(RETS);
    g.finish_pvm();
    assert_eq!((g.reg(reg::RSP), g.reg(reg::RCX), g.reg(11)), (upper + 32, 0x1234, 0x5678));
}

#[test]
fn red_zones_wrap() {
    for (redzone, frame) in [
        (0, Some(STACK - 64)),
        (1, Some(STACK - 80)),
        (STACK, None),
        (STACK - 64, Some(0)),
        (STACK - 63, None),
        (1 << 63, None),
        (u64::MAX, Some(STACK - 64)),
        (u64::MAX - 0xfff, Some(STACK + 0x1000 - 64)),
        (u64::MAX - 0xff_ffff_ffff, None),
        (1 << 47, None),
    ] {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| a.ud2());
        g.vcpu.write_msr(MSR_REDZONE, redzone).unwrap();
        let outcome = g.run();
        match frame {
            Some(at) => {
                assert_eq!((outcome, g.reg(reg::RSP)), (Outcome::Halted, at), "{redzone:#x}");
                assert_eq!(g.pvm_event().map(|e| (e.vector, e.rsp)), Some((6, STACK)));
            }
            None => assert_eq!(outcome, Outcome::TripleFault, "{redzone:#x}"),
        }
    }
}

// ---- returns ----

#[test]
fn erets_from_a_hostile_frame() {
    let run = |frame: Frame| {
        let mut g = Guest::pvm();
        g.code_at(CODE, 64, |a| a.nop());
        put_frame(&mut g, DATA, frame);
        g.vcpu.set_reg(reg::RSP, DATA);
        g.resume_at(RETS);
        g
    };
    let good = Frame { rip: CODE, rsp: STACK, ..Default::default() };
    // Selectors and error code do not matter.
    let mut g = run(Frame { cs: u64::MAX, ss: u64::MAX, errcode: u64::MAX, ..good });
    g.finish_pvm();
    assert_eq!(g.vcpu.state.segments[usize::from(seg::CS)].selector, 0x33);
    // Flags are made good.
    let mut g = run(Frame { rflags: !(flags::TF | flags::AC | flags::RF), ..good });
    g.finish_pvm();
    let bits = g.vcpu.state.flags.bits();
    assert_eq!(bits & (flags::IOPL | flags::VM | flags::VIF | flags::VIP), 0);
    assert_eq!(g.pvcs(GENERATION_1.pvcs.event_flags), event_flags::IF);
    // The target is checked by the first fetch.
    for (rip, code) in
        [(NON_CANONICAL, (13, Some(0))), (FORBIDDEN, (14, Some(0x10))), (0x4000_0000, (14, Some(0x10)))]
    {
        let mut g = run(Frame { rip, ..good });
        let event = g.run_pvm().unwrap();
        assert_eq!(((event.vector, event.error_code), event.rip), (code, rip));
    }
    assert_eq!(run(Frame { rip: NON_CANONICAL, rsp: NON_CANONICAL, ..good }).run(), Outcome::TripleFault);
    // A stack that cannot be read.
    for stack in [0x4000_0000, MMIO, NON_CANONICAL, NON_CANONICAL - 8, FORBIDDEN, u64::MAX - 15] {
        let mut g = run(good);
        g.vcpu.set_reg(reg::RSP, stack);
        assert_eq!(g.run(), Outcome::TripleFault, "{stack:#x}");
        assert!(g.seen().is_empty());
    }
}

/// Executes ERETU with these selectors; the event of the user's first instruction.
fn eretu_with(g: &mut Guest, selectors: (u16, u16)) -> Option<PvmEvent> {
    let p = &GENERATION_1.pvcs;
    let fields = [
        (p.user_cs, selectors.0.into()),
        (p.user_ss, selectors.1.into()),
        (p.rip, CODE),
        (p.rsp, STACK),
        (p.eflags, 2),
        (p.event_vector, 0),
    ];
    for (field, value) in fields {
        g.set_pvcs(field, value);
    }
    g.resume_at(RETU);
    g.engine.step(&mut g.vcpu);
    if g.vcpu.pvm_mode() == Mode::User {
        return None;
    }
    assert_eq!(g.vcpu.state.rip(), ENTRY);
    Some(PvmEvent {
        from: Mode::User,
        vector: g.pvcs(p.event_vector) as u8,
        error_code: Some(g.pvcs(p.event_errcode) as u32),
        rip: g.pvcs(p.rip),
        rsp: g.pvcs(p.rsp),
        rflags: g.pvcs(p.eflags),
    })
}

#[test]
fn eretu_with_selectors_of_every_kind() {
    let mut g = Guest::pvm();
    let p = &GENERATION_1.pvcs;
    // SYSCALL in 64-bit code; in 32-bit code it is an invalid opcode: back to the supervisor either way.
    g.code_at(CODE, 64, |a| a.syscall());
    for other in 0..=u16::MAX {
        for (code, stack) in [(other, 0x2b), (0x33, other)] {
            let event = eretu_with(&mut g, (code, stack));
            // The privilege level is what it is, whatever the lowest bits say.
            let (code, stack) = (code | 3, stack | 3);
            let what = format!("{code:#x} {stack:#x}");
            if matches!(code, 0x33 | 0x23) && stack == 0x2b {
                assert_eq!(event, None, "{what}");
                let mode = if code == 0x23 { CodeMode::Bits32 } else { CodeMode::Bits64 };
                assert_eq!((g.vcpu.state.code_mode, g.vcpu.state.cpl), (mode, 3), "{what}");
                g.engine.step(&mut g.vcpu);
                assert_eq!(g.vcpu.pvm_mode(), Mode::Supervisor);
                assert_eq!(g.vcpu.state.code_mode, CodeMode::Bits64);
            } else {
                let bad = if matches!(code, 0x33 | 0x23) { stack } else { code };
                let event = event.unwrap_or_else(|| panic!("{what} went"));
                let error_code = Some(u32::from(bad & !3));
                assert_eq!((event.vector, event.error_code, event.rip), (13, error_code, CODE), "{what}");
                assert_eq!((g.pvcs(p.user_cs), g.pvcs(p.user_ss)), (code.into(), stack.into()), "{what}");
            }
        }
    }
}

#[test]
fn eretu_to_addresses_that_are_none() {
    for (rip, expected) in [
        (NON_CANONICAL, (13, Some(0))),
        (u64::MAX, (14, Some(0x14))),
        (FORBIDDEN, (14, Some(0x14))),
        (0x4000_0000, (14, Some(0x14))),
    ] {
        let mut g = Guest::pvm();
        g.pvm_user(rip, NON_CANONICAL, 0);
        let event = g.run_pvm().unwrap();
        assert_eq!((event.from, event.rip, event.rsp), (Mode::User, rip, NON_CANONICAL));
        assert_eq!((event.vector, event.error_code), expected, "{rip:#x}");
    }
    // 32-bit code is found below 4 GiB.
    let mut g = Guest::pvm();
    g.code_at(CODE, 32, |a| a.int3());
    g.pvm_user32(0xffff_ffff_0000_0000 | CODE, STACK, 0);
    assert_eq!(g.pvm_fault(3).rip, CODE + 1);
}

#[test]
fn the_address_of_eretu_means_something_to_supervisors_alone() {
    // In the user's page, and reached by the user: a system call.
    let mut g = Guest::pvm();
    g.code_at(CODE, 64, |a| a.syscall());
    g.vcpu.write_msr(MSR_RETU_RIP, CODE).unwrap();
    g.vcpu.write_msr(MSR_RETS_RIP, CODE).unwrap();
    let p = &GENERATION_1.pvcs;
    for (field, value) in [(p.user_cs, 0x33), (p.user_ss, 0x2b), (p.rip, CODE), (p.rsp, STACK), (p.eflags, 2)]
    {
        g.set_pvcs(field, value);
    }
    // As supervisor it is ERETU, to itself, and then a system call. Of the two returns ERETU goes first.
    g.resume_at(CODE);
    assert_eq!(g.run_pvm(), None);
    assert_eq!(g.vcpu.state.rip(), LSTAR + 1);
    let stats = g.vcpu.pvm_stats().unwrap();
    assert_eq!((stats.user_returns, stats.syscalls, stats.supervisor_returns), (1, 1, 0));
    // What was ERETU is a hypercall now.
    g.vcpu.set_reg(reg::RAX, call::RDMSR);
    g.vcpu.set_reg(reg::RBX, MSR_RETU_RIP.into());
    g.resume_at(RETU);
    g.engine.step(&mut g.vcpu);
    assert_eq!((g.reg(reg::RAX), g.vcpu.state.rip()), (CODE, RETU + 2));
}

#[test]
fn users_make_no_hypercalls() {
    for number in call::LOAD_PGTBL..call::LOAD_PGTBL + 12 {
        let mut g = Guest::pvm_in(Mode::User, |a| hypercall(a, number, [MSR_RETS_RIP.into(), 0x66, 0]));
        assert_eq!(g.run_pvm(), None);
        assert_eq!((g.vcpu.state.rip(), g.reg(reg::RAX)), (LSTAR + 1, number));
        assert_eq!(g.vcpu.read_msr(MSR_RETS_RIP).unwrap(), RETS);
        assert_eq!(g.vcpu.pvm_stats().unwrap().hypercalls, [0; call::COUNT]);
    }
}

// ---- roots ----

#[test]
fn roots_above_the_physical_addresses_are_refused() {
    let width = cpu::Cpuid::default().maxphyaddr();
    for bit in u32::from(width)..64 {
        for (supervisor, user) in [(TABLES | 1 << bit, TABLES), (TABLES, TABLES | 1 << bit)] {
            let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
                hypercall(a, call::LOAD_PGTBL, [1, supervisor, user])?;
                a.mov(rsi, cr3)
            });
            g.finish_pvm();
            assert_eq!((g.reg(reg::RAX), g.reg(reg::RSI)), (call::EINVAL, TABLES), "bit {bit}");
            assert_eq!(g.vcpu.read_msr(MSR_SWITCH_CR3).unwrap(), TABLES);
        }
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| write_msr(a, MSR_SWITCH_CR3, 1 << bit));
        assert_eq!(g.pvm_fault(13).error_code, Some(0), "bit {bit}");
    }
}

#[test]
fn roots_without_tables_behind_them() {
    // Beyond RAM, on MMIO, in a page of zeroes, in a page of ones.
    for root in [0xff_0000_0000, MMIO, 0x6_0000, 0x7_0000] {
        let wild = |g: &mut Guest| {
            for n in 0..512 {
                g.poke(0x7_0000 + n * 8, u64::MAX);
            }
        };
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| hypercall(a, call::LOAD_PGTBL, [1, root, TABLES]));
        wild(&mut g);
        assert_eq!(g.run(), Outcome::TripleFault, "{root:#x}");
        assert!(g.seen().is_empty());
        // The user's: its first fetch faults, and the supervisor survives.
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| hypercall(a, call::LOAD_PGTBL, [1, TABLES, root]));
        wild(&mut g);
        g.finish_pvm();
        g.pvm_user(CODE, STACK, 0);
        let event = g.pvm_fault(14);
        assert_eq!((event.from, event.rip, g.pvcs(GENERATION_1.pvcs.cr2)), (Mode::User, CODE, CODE));
        assert!(g.seen().is_empty());
    }
}

#[test]
fn a_root_that_maps_itself() {
    // Every level is the root table; whatever is read is one of its entries.
    let root = 0x7_0000u64;
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| hypercall(a, call::LOAD_PGTBL, [1, TABLES, root]));
    for n in 0..512 {
        g.poke(root + n * 8, root | 7);
    }
    g.finish_pvm();
    g.pvm_user(CODE, STACK, 0);
    // JG, over and over: the code is the entry's bytes.
    g.attention.raise(attention::KICK);
    assert_eq!(g.run(), Outcome::Kicked);
    for _ in 0..1000 {
        g.engine.step(&mut g.vcpu);
    }
}

// ---- two vCPUs ----

#[test]
fn two_vcpus_on_one_shared_structure() {
    const ROUNDS: u64 = 150;
    let mut first = Guest::pvm();
    let mut second = Guest::pvm_on(Arc::clone(&first.ram));
    // Code and handler lie in the structure's page, so that each system call of one takes the other's decoded code
    // away. The stacks are not used, and what one finds in the structure is right for the other.
    let (user, handler) = (PVCS + 0x800, PVCS + 0x900);
    first.code_at(user, 64, |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.syscall()?;
        a.dec(r14d)?;
        a.jne(top)?;
        a.ud2()
    });
    first.code_at(handler, 64, |a| {
        a.inc(r13d)?;
        a.jmp(RETU)
    });
    for g in [&mut first, &mut second] {
        g.vcpu.write_msr(0xc000_0082, handler).unwrap();
        g.vcpu.set_reg(14, ROUNDS);
        g.pvm_user(user, STACK, 0);
    }
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(first.run(), Outcome::Halted));
        assert_eq!(second.run(), Outcome::Halted);
    });
    for g in [&first, &second] {
        assert_eq!(g.vcpu.state.rip(), ENTRY + 1);
        assert!(g.reg(13) >= 1 && g.reg(13) <= ROUNDS);
        assert_eq!(g.vcpu.pvm_mode(), Mode::Supervisor);
    }
    // The one that met UD2 first had done all its rounds.
    assert_eq!(first.reg(13).max(second.reg(13)), ROUNDS);
}
