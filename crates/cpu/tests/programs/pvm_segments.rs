//! PVM mode: selectors. The table behind them is the hypervisor's, whatever LGDT says.

use cpu::state::{CodeMode, reg, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use pvm::Mode;
use pvm::abi::hypercall;

use crate::harness::*;

/// Where loops over all selectors leave their results.
const RESULTS: u64 = 0x20_0000;
/// A segment of 4 GiB at 0x1234_0000 and one of 0x56 bytes, both 32-bit data: the second expands down and is
/// read-only. Between them one that is code, and does not count.
const TLS: [u64; 3] = [0x12cf_f334_0000_ffff, 0x00cf_fb00_0000_ffff, 0x0040_f400_0000_0055];

/// What an index of the table holds for a program, written down from the specification: attributes as LAR shows them,
/// limit, base, and whether it can be written.
struct Visible {
    lar: u64,
    limit: u64,
    base: u64,
    writable: bool,
}

fn visible(selector: u16) -> Option<Visible> {
    let v = |lar, limit, base, writable| Some(Visible { lar, limit, base, writable });
    match selector & !3 {
        0x20 => v(0x00cf_fb00, 0xffff_ffff, 0, false),
        0x28 => v(0x00cf_f300, 0xffff_ffff, 0, true),
        0x30 => v(0x00af_fb00, 0xffff_ffff, 0, false),
        0x60 => v(0x00cf_f300, 0xffff_ffff, 0x1234_0000, true),
        // Accessed is set.
        0x70 => v(0x0040_f500, 0x55, 0, false),
        // CPU number 3.
        0x78 => v(0x0040_f100, 3, 0, false),
        _ => None,
    }
}

/// A guest with TLS entries, in `mode`, in front of `program`.
fn guest(mode: Mode, program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Guest {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| hypercall(a, hypercall::LOAD_TLS, TLS));
    g.finish_pvm();
    assert_eq!(g.reg(reg::RAX), 12);
    g.pvm_program(mode, program);
    g
}

#[test]
fn lar_lsl_verr_and_verw_of_every_selector() {
    for mode in MODES {
        let mut g = guest(mode, |a| {
            a.mov(rdi, RESULTS)?;
            a.xor(ecx, ecx)?;
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.mov(eax, 0xdead)?;
            a.mov(edx, 0xbeef)?;
            a.lar(eax, ecx)?;
            a.sete(byte_ptr(rdi + 8))?;
            a.lsl(edx, ecx)?;
            a.sete(byte_ptr(rdi + 9))?;
            a.verr(cx)?;
            a.sete(byte_ptr(rdi + 10))?;
            a.verw(cx)?;
            a.sete(byte_ptr(rdi + 11))?;
            a.mov(dword_ptr(rdi), eax)?;
            a.mov(dword_ptr(rdi + 4), edx)?;
            a.add(rdi, 16)?;
            a.inc(ecx)?;
            a.cmp(ecx, 0x1_0000)?;
            a.jne(top)
        });
        g.finish_pvm();
        for selector in 0..=u16::MAX {
            let at = RESULTS + u64::from(selector) * 16;
            let got = (g.peek::<u32>(at), g.peek::<u32>(at + 4), g.peek::<[u8; 4]>(at + 8));
            let want = match visible(selector) {
                Some(v) => (v.lar as u32, v.limit as u32, [1, 1, 1, v.writable.into()]),
                None => (0xdead, 0xbeef, [0; 4]),
            };
            assert_eq!(got, want, "{selector:#x} in {mode:?}");
        }
    }
}

/// Loads every selector into `register`, which holds 0x2b before, in `mode`. `model` says what becomes of it: `None`
/// for #GP with the selector, else what the register holds then.
fn load_every_selector(mode: Mode, register: u8, model: impl Fn(u16) -> Option<u16>) {
    // MOV Sreg, ECX; 2 bytes.
    let load: &[u8] = &[0x8e, 0xc1 | register << 3];
    let mut g = guest(mode, |a| {
        a.mov(rdi, RESULTS)?;
        a.xor(ecx, ecx)?;
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.mov(eax, 0x2b)?;
        a.db(&[0x8e, 0xc0 | register << 3])?;
        a.mov(r14, -1i64)?;
        a.db(load)?;
        a.db(&[0x8c, 0xc2 | register << 3])?; // MOV EDX, Sreg
        a.mov(qword_ptr(rdi), r14)?;
        a.mov(dword_ptr(rdi + 8), edx)?;
        a.add(rdi, 16)?;
        a.inc(ecx)?;
        a.cmp(ecx, 0x1_0000)?;
        a.jne(top)
    });
    g.pvm_skip(2);
    g.finish_pvm();
    let mut faults = 0;
    for selector in 0..=u16::MAX {
        let at = RESULTS + u64::from(selector) * 16;
        let got = (g.peek::<u64>(at), g.peek::<u32>(at + 8) as u16);
        let want = match model(selector) {
            Some(held) => (u64::MAX, held),
            None => {
                faults += 1;
                (13 << 32 | u64::from(selector & !3), 0x2b)
            }
        };
        assert_eq!(got, want, "{selector:#x} into {register} in {mode:?}");
    }
    assert_eq!(g.reg(15), faults);
}

#[test]
fn data_segments_take_null_and_what_a_program_may_read() {
    let program = |s: u16| (s & !3 == 0 || visible(s).is_some()).then_some(s);
    for register in [seg::DS, seg::ES, seg::FS, seg::GS] {
        load_every_selector(Mode::User, register, program);
        // What a supervisor has in its own GDT is loaded for it, and leaves the register null.
        load_every_selector(Mode::Supervisor, register, |s| {
            program(s).or(matches!(s, 0x08 | 0x10 | 0x18 | 0x48 | 0x50 | 0x80).then_some(0))
        });
    }
}

#[test]
fn stack_segments_take_writable_data_of_the_lowest_privilege() {
    let writable = |s: u16| s & 3 == 3 && visible(s).is_some_and(|v| v.writable);
    load_every_selector(Mode::User, seg::SS, |s| writable(s).then_some(s));
    // A supervisor may name its own, null or writable data in its GDT, for which SS stays.
    load_every_selector(Mode::Supervisor, seg::SS, |s| match s {
        0 | 0x10 | 0x50 => Some(0x2b),
        s => writable(s).then_some(s),
    });
}

#[test]
fn a_tls_segment_has_its_base() {
    for mode in MODES {
        let mut g = guest(mode, |a| {
            a.mov(eax, 0x63)?;
            a.mov(fs, eax)?;
            a.rdfsbase(r8)?;
            a.push(0x63)?;
            a.pop(gs)?;
            a.rdgsbase(r9)?;
            a.xor(eax, eax)?;
            a.mov(fs, eax)?;
            a.rdfsbase(r10)
        });
        g.finish_pvm();
        let base = visible(0x63).unwrap().base;
        assert_eq!((g.reg(8), g.reg(9), g.reg(10)), (base, base, 0), "{mode:?}");
    }
}

#[test]
fn load_gs_answers_the_base_and_falls_back_to_null() {
    for (selector, held, base) in [
        (0x63, 0x63, 0x1234_0000),
        (0x2b, 0x2b, 0),
        (0x10, 0, 0),
        (0x6b, 0, 0),
        (0x60, 0x60, 0x1234_0000),
        (0x67, 0, 0),
    ] {
        let mut g = guest(Mode::Supervisor, |a| {
            a.mov(rax, DATA)?;
            a.wrgsbase(rax)?;
            hypercall(a, hypercall::LOAD_GS, [selector, 0, 0])?;
            a.rdgsbase(r8)?;
            a.mov(r9d, gs)
        });
        g.finish_pvm();
        assert_eq!((g.reg(reg::RAX), g.reg(9)), (base, held), "{selector:#x}");
        assert_eq!(g.reg(8), DATA, "the supervisor's base stays in force");
    }
}

/// Far transfers to `selector` that end at `target`.
fn far_transfers(selector: u16, stack: u16, target: u64) -> [(&'static str, Vec<u8>); 4] {
    let code = |program: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>| {
        let mut a = CodeAssembler::new(64).unwrap();
        program(&mut a).unwrap();
        a.assemble(CODE).unwrap()
    };
    let push = |a: &mut CodeAssembler, value: u64| {
        a.mov(rax, value)?;
        a.push(rax)
    };
    [
        (
            "IRETQ",
            code(&|a| {
                push(a, stack.into())?;
                push(a, STACK - 64)?;
                push(a, 0x3002)?;
                push(a, selector.into())?;
                push(a, target)?;
                a.iretq()
            }),
        ),
        (
            "LRETQ",
            code(&|a| {
                push(a, selector.into())?;
                push(a, target)?;
                a.db(&[0x48, 0xcb])
            }),
        ),
        (
            "JMP FAR",
            code(&|a| {
                push(a, selector.into())?;
                push(a, target)?;
                a.db(&[0x48, 0xff, 0x2c, 0x24])
            }),
        ),
        (
            "CALL FAR",
            code(&|a| {
                push(a, selector.into())?;
                push(a, target)?;
                a.db(&[0x48, 0xff, 0x1c, 0x24])
            }),
        ),
    ]
}

impl Guest {
    /// Puts `bytes` in front of the vCPU, in `mode`, with fresh stacks.
    fn again(&mut self, mode: Mode, bytes: &[u8]) {
        self.vcpu.set_reg(reg::RSP, STACK);
        self.pvm_program(mode, |a| {
            a.mov(eax, 0x2b)?;
            a.mov(ss, eax)?;
            a.db(bytes)
        });
    }
}

/// Where far transfers go.
const TARGET: u64 = 0x9000;

#[test]
fn supervisors_go_to_64_bit_code_or_their_own() {
    let mut g = guest(Mode::Supervisor, |a| a.nop());
    for selector in 0..0x100u16 {
        // The last two are 64-bit code in its own GDT.
        let good = matches!(selector, 0x33 | 0x08 | 0x80);
        for (name, bytes) in far_transfers(selector, 0x2b, TARGET) {
            // JMP and CALL check only that the selector's RPL is not above 3.
            let good = good || matches!(name, "JMP FAR" | "CALL FAR") && matches!(selector, 0x30..=0x33);
            g.again(Mode::Supervisor, &bytes);
            // Still privileged there.
            g.code_at(TARGET, 64, |a| {
                a.mov(rbx, cr3)?;
                a.mov(r8d, cs)?;
                a.mov(r9d, ss)
            });
            let event = g.run_pvm();
            if good {
                assert_eq!(event, None, "{name} to {selector:#x}");
                assert_eq!(
                    (g.reg(8), g.reg(9), g.reg(reg::RBX)),
                    (0x33, 0x2b, TABLES),
                    "{name} to {selector:#x}"
                );
                assert_eq!(g.vcpu.state.cpl, 0);
            } else {
                let code = Some(u32::from(selector) & !3);
                let event = event.unwrap_or_else(|| panic!("{name} to {selector:#x} went"));
                assert_eq!(
                    (event.from, event.vector, event.error_code),
                    (Mode::Supervisor, 13, code),
                    "{name} to {selector:#x}"
                );
            }
        }
    }
}

#[test]
fn a_far_transfer_that_fails_leaves_the_supervisors_cs() {
    const OTHER: u16 = 0x80;
    for n in 0..4 {
        let mut g = guest(Mode::Supervisor, |a| a.nop());
        let before = g.vcpu.state.segments[usize::from(seg::CS)].selector;
        for (target, vector, known) in [(1 << 63, 13, sel::CODE64), (TARGET, 6, OTHER)] {
            let (name, bytes) = &far_transfers(OTHER, 0x2b, target)[n];
            g.again(Mode::Supervisor, bytes);
            g.code_at(TARGET, 64, |a| a.ud2());
            g.pvm_fault(vector);
            assert_eq!(g.pvm_frame().cs, u64::from(known), "{name} to {target:#x}");
            assert_eq!(g.vcpu.state.segments[usize::from(seg::CS)].selector, before);
        }
    }
}

#[test]
fn iretq_takes_the_supervisors_stack_segments() {
    let mut g = guest(Mode::Supervisor, |a| a.nop());
    for stack in 0..0x100u16 {
        let [(_, iretq), ..] = far_transfers(0x08, stack, TARGET);
        g.again(Mode::Supervisor, &iretq);
        g.code_at(TARGET, 64, |a| {
            a.mov(r9d, ss)?;
            a.pushfq()?;
            a.pop(r8)
        });
        let event = g.run_pvm();
        if matches!(stack, 0 | 0x10 | 0x50 | 0x2b | 0x63) {
            let held = if stack == 0x63 { 0x63 } else { 0x2b };
            assert_eq!((event, g.reg(9), g.reg(reg::RSP)), (None, held, STACK - 64), "{stack:#x}");
            assert_eq!(g.reg(8), 0x202, "no IOPL, and IF");
        } else {
            assert_eq!(
                event.map(|e| (e.vector, e.error_code)),
                Some((13, Some(u32::from(stack) & !3))),
                "{stack:#x}"
            );
        }
    }
}

#[test]
fn users_go_to_both_kinds_of_user_code() {
    let mut g = guest(Mode::Supervisor, |a| a.nop());
    for selector in 0..0x100u16 {
        for (name, bytes) in far_transfers(selector, 0x2b, TARGET) {
            let jump = matches!(name, "JMP FAR" | "CALL FAR");
            let long = selector == 0x33 || jump && matches!(selector, 0x30..=0x33);
            let short = selector == 0x23 || jump && matches!(selector, 0x20..=0x23);
            g.again(Mode::User, &bytes);
            // INC EAX in 32-bit code, a prefix of the NOP in 64-bit code; then an instruction for supervisors.
            g.code_at(TARGET, 64, |a| {
                a.db(&[0x31, 0xc0, 0x40, 0x90, 0x8c, 0xd3])?;
                a.hlt()
            });
            let event = g.run_pvm().unwrap();
            if long || short {
                assert_eq!((event.vector, event.error_code, event.rip), (13, Some(0), TARGET + 6));
                assert_eq!(
                    (g.reg(reg::RAX), g.reg(reg::RBX)),
                    (short.into(), 0x2b),
                    "{name} to {selector:#x}"
                );
                let saved = g.pvcs(pvm::abi::GENERATION_1.pvcs.user_cs);
                assert_eq!(saved, if long { 0x33 } else { 0x23 });
            } else {
                let code = Some(u32::from(selector) & !3);
                assert_eq!((event.vector, event.error_code), (13, code), "{name} to {selector:#x}");
            }
            assert_eq!(event.from, Mode::User);
            assert_eq!(g.vcpu.state.code_mode, CodeMode::Bits64);
        }
    }
}

#[test]
fn iretq_refuses_users_other_stacks() {
    for stack in [0, 1, 2, 3, 0x10, 0x13, 0x28, 0x2a, 0x33, 0x7b, 0x2f] {
        let [(_, iretq), ..] = far_transfers(0x33, stack, TARGET);
        let mut g = guest(Mode::User, |a| a.db(&iretq));
        let event = g.pvm_fault(13);
        assert_eq!((event.from, event.error_code), (Mode::User, Some(u32::from(stack) & !3)), "{stack:#x}");
    }
}

#[test]
fn users_change_between_32_and_64_bits_by_themselves() {
    let mut g = Guest::pvm();
    g.code_at(CODE, 32, |a| {
        a.db(&[0x40])?; // INC EAX
        a.db(&[0xea])?;
        a.dd(&[TARGET as u32])?;
        a.dw(&[0x33])
    });
    g.code_at(TARGET, 64, |a| {
        a.mov(r12, 0x1234_5678_9abc_def0u64)?;
        a.push(0x23)?;
        a.push((TARGET + 0x100) as i32)?;
        a.db(&[0x48, 0xcb])
    });
    g.code_at(TARGET + 0x100, 32, |a| {
        a.db(&[0x40])?;
        a.int(0x80)
    });
    g.vcpu.set_reg(reg::RAX, 0);
    g.pvm_user32(CODE, STACK, 0);
    let event = g.pvm_fault(0x80);
    assert_eq!((event.from, event.rip), (Mode::User, TARGET + 0x100 + 3));
    assert_eq!((g.reg(reg::RAX), g.reg(12)), (2, 0x1234_5678_9abc_def0));
    // SYSCALL is not for 32-bit code on Intel's processors.
    g.code_at(CODE, 32, |a| a.syscall());
    g.pvm_user32(CODE, STACK, 0);
    assert_eq!(g.pvm_fault(6).rip, CODE);
}
