//! PVM mode: instructions that do not do what they do on a processor of one's own, in supervisor and in user mode.

use cpu::flags;
use cpu::state::{cr0, cr4, efer, reg, seg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use pvm::Mode;
use pvm::abi::{GENERATION_1, control, cpuid, event_flags};

use crate::harness::*;

/// Executes `bytes` in `mode`; the event it met.
fn outcome(mode: Mode, bytes: &[u8]) -> Option<PvmEvent> {
    Guest::pvm_in(mode, |a| a.db(bytes)).run_pvm()
}

/// Vector and error code, where the event is a fault at the program's first instruction.
#[track_caller]
fn fault_at_start(mode: Mode, bytes: &[u8]) -> (u8, Option<u32>) {
    let event = outcome(mode, bytes).unwrap_or_else(|| panic!("{bytes:x?} in {mode:?} ran"));
    assert_eq!((event.from, event.rip), (mode, CODE), "{bytes:x?}");
    assert_eq!(event.rflags & flags::RF, flags::RF, "{bytes:x?}: a fault");
    (event.vector, event.error_code)
}

const GP: (u8, Option<u32>) = (13, Some(0));
const UD: (u8, Option<u32>) = (6, None);

#[test]
fn cpuid_answers_plain_and_synthetic() {
    for mode in MODES {
        let mut g = Guest::pvm_in(mode, |a| {
            a.mov(eax, cpuid::VENDOR_FEATURES)?;
            a.cpuid()?;
            a.mov(r12, rbx)?;
            a.mov(eax, cpuid::VENDOR_FEATURES)?;
            a.db(&cpuid::SYNTHETIC)
        });
        g.finish_pvm();
        assert_eq!((g.reg(12), g.reg(reg::RBX)), (cpuid::PVM.into(), cpuid::PVM.into()), "{mode:?}");
        assert_eq!(
            (g.reg(reg::RCX) as u32, g.reg(reg::RDX)),
            (if mode == Mode::User { LSTAR as u32 } else { 0 }, 0)
        );
    }
}

#[test]
fn synthetic_cpuid_is_one_instruction() {
    let mut g = Guest::pvm_in(Mode::User, |a| {
        a.db(&cpuid::SYNTHETIC)?;
        a.nop()
    });
    g.engine.step(&mut g.vcpu);
    assert_eq!(g.vcpu.state.rip(), CODE + cpuid::SYNTHETIC.len() as u64);
    // With a single step there is one trap, behind all of it.
    let mut g = Guest::pvm();
    g.code_at(CODE, 64, |a| a.db(&cpuid::SYNTHETIC));
    g.pvm_user(CODE, STACK, flags::TF);
    assert_eq!(g.pvm_fault(1).rip, CODE + cpuid::SYNTHETIC.len() as u64);
}

#[test]
fn its_first_half_alone_is_invlpg() {
    let half = &cpuid::SYNTHETIC[..8];
    assert_eq!(outcome(Mode::Supervisor, half), None);
    assert_eq!(fault_at_start(Mode::User, half), GP);
    // Also where the page ends and nothing is mapped behind it.
    let mut g = Guest::pvm();
    let at = DATA + 0x1000 - half.len() as u64;
    g.poke::<u64>(at, u64::from_le_bytes(half.try_into().unwrap()));
    g.poke::<u64>(PT + (DATA >> 12) * 8 + 8, 0);
    g.pvm_user(at, STACK, 0);
    let event = g.pvm_fault(13);
    assert_eq!((event.error_code, event.rip), (Some(0), at));
}

#[test]
fn features_that_need_supervisor_pages_are_not_offered() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.mov(eax, 7)?;
        a.xor(ecx, ecx)?;
        a.cpuid()?;
        a.mov(r12, rbx)?;
        a.mov(eax, 0xd)?;
        a.mov(ecx, 1)?;
        a.cpuid()
    });
    g.finish_pvm();
    assert_eq!(g.reg(12) & (1 << 7 | 1 << 20), 0, "SMEP, SMAP");
    assert_eq!(g.reg(reg::RAX) & 1 << 3, 0, "XSAVES");
}

#[test]
fn descriptor_table_registers_read_what_was_written_and_have_no_effect() {
    let mut g = Guest::pvm();
    g.poke::<u16>(DATA, 0x123);
    g.poke::<u64>(DATA + 2, 0xffff_c900_0000_4560);
    g.poke::<u16>(DATA + 16, 0x7);
    g.poke::<u64>(DATA + 18, 0x55_0000);
    g.pvm_program(Mode::Supervisor, |a| {
        a.lgdt(ptr(DATA))?;
        a.lidt(ptr(DATA + 16))?;
        a.mov(eax, 0x1238)?;
        a.lldt(ax)?;
        a.mov(eax, 0x4568)?;
        a.ltr(ax)?;
        a.sgdt(ptr(DATA + 32))?;
        a.sidt(ptr(DATA + 48))?;
        a.sldt(r8w)?;
        a.str(r9w)?;
        a.smsw(r10)?;
        // Neither the table nor the LDT takes part in this.
        a.mov(eax, 0x2b)?;
        a.mov(ds, eax)?;
        a.mov(es, eax)?;
        a.ud2()
    });
    let event = g.pvm_fault(6);
    assert_eq!(event.from, Mode::Supervisor);
    for n in [0, 16] {
        let pseudo = |at: u64| (g.peek::<u16>(at), g.peek::<u64>(at + 2));
        assert_eq!(pseudo(DATA + n), pseudo(DATA + 32 + n));
    }
    assert_eq!((g.reg(8) & 0xffff, g.reg(9) & 0xffff), (0x1238, 0x4568));
    assert_eq!(g.reg(10), g.vcpu.state.cr0);
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.mov(eax, 0x14)?;
        a.lldt(ax)?;
        a.mov(ds, eax)
    });
    assert_eq!(g.pvm_fault(13).error_code, Some(0x14), "no LDT");
}

/// SGDT, SIDT, SLDT, STR, SMSW of or to a register or `[rsp - 16]`.
const TABLE_STORES: [&[u8]; 5] = [
    &[0x0f, 0x01, 0x44, 0x24, 0xf0],
    &[0x0f, 0x01, 0x4c, 0x24, 0xf0],
    &[0x0f, 0x00, 0xc0],
    &[0x0f, 0x00, 0xc8],
    &[0x0f, 0x01, 0xe0],
];

#[test]
fn users_are_kept_from_the_table_registers() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.mov(rax, cr4)?;
        a.and(eax, !(cr4::UMIP as i32))?;
        a.mov(cr4, rax)?;
        a.mov(rbx, cr4)
    });
    g.finish_pvm();
    assert_eq!(g.reg(reg::RBX) & cr4::UMIP, cr4::UMIP, "the hypervisor has it on");
    for store in TABLE_STORES {
        assert_eq!(fault_at_start(Mode::User, store), GP, "{store:x?}");
        assert_eq!(outcome(Mode::Supervisor, store), None, "{store:x?}");
    }
}

#[test]
fn forbidden_instructions() {
    let swapgs: &[u8] = &[0x0f, 0x01, 0xf8];
    let sysret: &[u8] = &[0x48, 0x0f, 0x07];
    let sysret32: &[u8] = &[0x0f, 0x07];
    let sysenter: &[u8] = &[0x0f, 0x34];
    let sysexit: &[u8] = &[0x0f, 0x35];
    let (clac, stac): (&[u8], &[u8]) = (&[0x0f, 0x01, 0xca], &[0x0f, 0x01, 0xcb]);
    let (vmcall, vmmcall): (&[u8], &[u8]) = (&[0x0f, 0x01, 0xc1], &[0x0f, 0x01, 0xd9]);
    for mode in MODES {
        for bytes in [swapgs, sysret, sysret32, sysenter, sysexit] {
            assert_eq!(fault_at_start(mode, bytes), GP, "{bytes:x?} in {mode:?}");
        }
        for bytes in [clac, stac, vmcall, vmmcall] {
            assert_eq!(fault_at_start(mode, bytes), UD, "{bytes:x?} in {mode:?}");
        }
    }
}

#[test]
fn sysenter_is_refused_however_its_msrs_are_set() {
    for mode in MODES {
        let mut g = Guest::pvm_in(mode, |a| a.sysenter());
        for (index, value) in [(0x174, 0x08), (0x175, STACK), (0x176, 0x9000)] {
            g.vcpu.write_msr(index, value).unwrap();
            assert_eq!(g.vcpu.read_msr(index).unwrap(), value, "stored, without effect");
        }
        assert_eq!(g.pvm_fault(13).error_code, Some(0));
    }
}

#[test]
fn int_n_knows_three_vectors() {
    for mode in MODES {
        for vector in 0..=255u8 {
            let bytes = [0xcd, vector];
            if matches!(vector, 3 | 4 | 0x80) {
                let event = outcome(mode, &bytes).unwrap();
                assert_eq!((event.from, event.vector, event.rip), (mode, vector, CODE + 2));
                assert_eq!(event.rflags & flags::RF, 0, "a trap");
            } else {
                let code = u32::from(vector) * 8 + 2;
                assert_eq!(fault_at_start(mode, &bytes), (13, Some(code)), "INT {vector} in {mode:?}");
            }
        }
    }
}

#[test]
fn int3_and_int1_trap() {
    for mode in MODES {
        for (byte, vector) in [(0xcc, 3), (0xf1, 1)] {
            let event = outcome(mode, &[byte]).unwrap();
            assert_eq!((event.from, event.vector, event.rip), (mode, vector, CODE + 1));
        }
    }
}

#[test]
fn into_in_32_bit_user_code() {
    for overflow in [false, true] {
        let mut g = Guest::pvm();
        g.code_at(CODE, 32, |a| {
            a.db(&[0xce])?;
            a.ud2()
        });
        let flag = if overflow { flags::OF } else { 0 };
        g.pvm_user32(CODE, STACK, flag);
        let event = g.pvm_fault(if overflow { 4 } else { 6 });
        assert_eq!((event.from, event.rip), (Mode::User, CODE + 1));
        assert_eq!(g.pvcs(GENERATION_1.pvcs.user_cs), 0x23);
    }
}

#[test]
fn popf_does_not_reach_if_and_iopl() {
    for mode in MODES {
        let mut g = Guest::pvm_in(mode, |a| {
            let all = !(flags::TF | flags::AC) as i32;
            for value in [0, all] {
                a.push(value)?;
                a.popfq()?;
                a.pushfq()?;
                a.pop(r8)?;
                a.xchg(r8, r9)?;
            }
            a.push(0)?;
            a.popfq()?;
            a.mov(eax, -1)?;
            a.db(&[0x66, 0x50])?; // PUSH AX
            a.db(&[0x66, 0x9d])?; // POPFW
            a.pushfq()?;
            a.pop(r10)?;
            a.push(0)?;
            a.popfq()
        });
        // The 16-bit image also sets TF: one trap behind the instruction after POPF.
        g.pvm_skip(0);
        g.finish_pvm();
        let zero = g.reg(8);
        let ones = g.reg(9);
        assert_eq!(zero, flags::IF | 2, "{mode:?}");
        let fixed = flags::IOPL | flags::VM | flags::VIF | flags::VIP | flags::RF;
        assert_eq!(ones & fixed, 0, "{mode:?}: {ones:x}");
        assert_eq!(ones & (flags::IF | flags::ID | flags::NT), flags::IF | flags::ID | flags::NT);
        assert_eq!(g.reg(10) & (flags::IF | flags::IOPL), flags::IF, "{mode:?}");
    }
}

#[test]
fn cli_and_sti_are_the_shared_structures_flag() {
    let event_flags_field = GENERATION_1.pvcs.event_flags;
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.sti()?;
        a.mov(r8, qword_ptr(PVCS))?;
        a.pushfq()?;
        a.cli()?;
        a.mov(r9, qword_ptr(PVCS))?;
        a.pushfq()?;
        a.pop(r11)?;
        a.pop(r10)
    });
    g.finish_pvm();
    assert_eq!((g.reg(8), g.reg(9)), (event_flags::IF, 0));
    // To PUSHF interrupts are open all the time.
    assert_eq!((g.reg(10) & flags::IF, g.reg(11) & flags::IF), (flags::IF, flags::IF));
    // Other bits stay.
    g.set_pvcs(event_flags_field, 1 << 40);
    g.pvm_program(Mode::Supervisor, |a| a.sti());
    g.finish_pvm();
    assert_eq!(g.pvcs(event_flags_field), 1 << 40 | event_flags::IF);
    // Without the structure they do nothing, and interrupts are closed.
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.sti()?;
        a.cli()?;
        a.sti()
    });
    g.vcpu.write_msr(MSR_VCPU_STRUCT, 0).unwrap();
    g.interrupt(0x40);
    g.finish_pvm();
    assert_eq!(g.pvcs(event_flags_field), 0);
    for bytes in [&[0xfa], &[0xfb]] {
        assert_eq!(fault_at_start(Mode::User, bytes), GP, "{bytes:x?}");
    }
}

#[test]
fn privileged_instructions_execute_in_supervisor_mode_alone() {
    // RAX, RCX, RDX, RSI and RDI are made good for all of them; the addresses are `DATA`.
    let programs: Vec<(&str, Vec<u8>)> = vec![
        ("HLT", vec![0xf4]),
        ("RDMSR", vec![0x0f, 0x32]),
        ("WRMSR", vec![0x0f, 0x30]),
        ("MOV RBX, CR0", vec![0x0f, 0x20, 0xc3]),
        ("MOV RBX, CR2", vec![0x0f, 0x20, 0xd3]),
        ("MOV RBX, CR3", vec![0x0f, 0x20, 0xdb]),
        ("MOV RBX, CR4", vec![0x0f, 0x20, 0xe3]),
        ("MOV RBX, CR8", vec![0x44, 0x0f, 0x20, 0xc3]),
        ("MOV CR0, RDX", vec![0x0f, 0x22, 0xc2]),
        ("MOV CR2, RDX", vec![0x0f, 0x22, 0xd2]),
        ("MOV CR3, RSI", vec![0x0f, 0x22, 0xde]),
        ("MOV CR4, RDX", vec![0x0f, 0x22, 0xe2]),
        ("MOV CR8, RDX", vec![0x44, 0x0f, 0x22, 0xc2]),
        ("MOV RBX, DR7", vec![0x0f, 0x21, 0xfb]),
        ("MOV DR0, RDX", vec![0x0f, 0x23, 0xc2]),
        ("CLTS", vec![0x0f, 0x06]),
        ("LMSW DX", vec![0x0f, 0x01, 0xf2]),
        ("INVLPG", vec![0x0f, 0x01, 0x3c, 0x25, 0, 0, 2, 0]),
        ("INVPCID RDX", vec![0x66, 0x0f, 0x38, 0x82, 0x14, 0x25, 0, 0, 2, 0]),
        ("INVD", vec![0x0f, 0x08]),
        ("WBINVD", vec![0x0f, 0x09]),
        ("LGDT", vec![0x0f, 0x01, 0x14, 0x25, 0, 0, 2, 0]),
        ("LIDT", vec![0x0f, 0x01, 0x1c, 0x25, 0, 0, 2, 0]),
        ("LLDT DX", vec![0x0f, 0x00, 0xd2]),
        ("LTR DX", vec![0x0f, 0x00, 0xda]),
        ("IN AL, 80h", vec![0xe4, 0x80]),
        ("IN EAX, DX", vec![0xed]),
        ("OUT 80h, AL", vec![0xe6, 0x80]),
        ("OUT DX, AL", vec![0xee]),
        ("OUTSB", vec![0x6e]),
        ("INSB", vec![0x6c]),
        ("CLI", vec![0xfa]),
        ("STI", vec![0xfb]),
    ];
    for (name, bytes) in &programs {
        for mode in MODES {
            let mut g = Guest::pvm_in(mode, |a| a.db(bytes));
            for (register, value) in [
                (reg::RAX, 0),
                (reg::RCX, u64::from(MSR_RETS_RIP)),
                (reg::RDX, 0),
                (reg::RSI, TABLES),
                (reg::RDI, DATA),
            ] {
                g.vcpu.set_reg(register, value);
            }
            let event = g.run_pvm();
            if mode == Mode::Supervisor {
                assert_eq!(event, None, "{name}");
            } else {
                let event = event.unwrap_or_else(|| panic!("{name} ran"));
                assert_eq!((event.vector, event.error_code, event.rip), (13, Some(0), CODE), "{name}");
                assert!(g.seen().is_empty(), "{name}");
            }
        }
    }
}

#[test]
fn without_keys_their_register_is_not_there() {
    for mode in MODES {
        for bytes in [&[0x0f, 0x01, 0xee], &[0x0f, 0x01, 0xef]] {
            assert_eq!(fault_at_start(mode, bytes), UD, "{bytes:x?} in {mode:?}");
        }
    }
}

#[test]
fn xsetbv_and_rdpmc() {
    for mode in MODES {
        assert_eq!(fault_at_start(mode, &[0x0f, 0x33]), GP, "RDPMC: there are no counters");
        let mut g = Guest::pvm_in(mode, |a| {
            a.mov(eax, 3)?;
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            a.xsetbv()
        });
        let event = g.run_pvm();
        match mode {
            Mode::User => assert_eq!(event.map(|e| (e.vector, e.error_code)), Some((13, Some(0)))),
            _ => assert_eq!((event, g.vcpu.state.xcr0), (None, 3)),
        }
    }
}

/// Writes CR0 in supervisor mode with `write`, reads it back into R8, and checks that TS, EM and the cache bits are
/// not there and the rest is.
fn check_cr0(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        write(a)?;
        a.mov(r8, cr0)
    });
    g.finish_pvm();
    assert_eq!(g.reg(8) & (control::CR0_ONE | control::CR0_ZERO), control::CR0_ONE);
}

#[test]
fn control_registers_keep_their_forced_bits() {
    check_cr0(|a| a.nop());
    check_cr0(|a| {
        a.xor(eax, eax)?;
        a.mov(cr0, rax)
    });
    check_cr0(|a| {
        a.mov(eax, -1)?;
        a.mov(cr0, rax)
    });
    check_cr0(|a| {
        a.mov(eax, (cr0::TS | cr0::EM) as u32)?;
        a.lmsw(ax)
    });
    check_cr0(|a| a.clts());
    // Still #GP: bits that do not exist.
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.mov(rax, 1u64 << 32)?;
        a.mov(cr0, rax)
    });
    assert_eq!(g.pvm_fault(13).error_code, Some(0));

    let bad = control::CR4_ZERO | control::CR4_ONE;
    for value in [0, control::CR4_ZERO] {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
            a.mov(rax, value)?;
            a.mov(cr4, rax)?;
            a.mov(r8, cr4)?;
            // FSGSBASE is on, and so are the instructions of vector code.
            a.rdfsbase(rax)?;
            a.xorps(xmm0, xmm0)
        });
        g.finish_pvm();
        assert_eq!(g.reg(8) & bad, control::CR4_ONE, "{value:x}");
    }
    // CR4.LA57 changes by LOAD_PGTBL alone; bit 63 does not exist.
    for bit in [cr4::LA57, 1 << 63] {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
            a.mov(rax, cr4)?;
            a.mov(rbx, bit)?;
            a.or(rax, rbx)?;
            a.mov(cr4, rax)
        });
        assert_eq!(g.pvm_fault(13).error_code, Some(0), "{bit:x}");
    }

    for value in [0, efer::NXE] {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
            write_msr(a, 0xc000_0080, value)?;
            a.rdmsr()
        });
        g.finish_pvm();
        assert_eq!(g.reg(reg::RAX), control::EFER_ONE | value);
    }
}

#[test]
fn star_takes_the_hypervisors_selectors_alone() {
    let star = |user: u64, kernel: u64| user << 48 | kernel << 32;
    for (value, good) in [
        (star(0x23, 0x08), true),
        (star(0x20, 0x08), true),
        (star(0x23, 0x08) | 0x1234, true),
        (star(0x2b, 0x08), false),
        (star(0x1b, 0x08), false),
        (star(0x23, 0x10), false),
        (star(0x23, 0x0b), false),
        (star(0x23, 0x33), false),
        (0, false),
    ] {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
            write_msr(a, 0xc000_0081, value)?;
            a.rdmsr()
        });
        let event = g.run_pvm();
        assert_eq!(event.is_none(), good, "{value:x}: {event:x?}");
        assert_eq!(g.vcpu.read_msr(0xc000_0081).unwrap(), if good { value } else { star(0x23, 0x08) });
    }
}

#[test]
fn fs_and_gs_bases_are_anyones() {
    for mode in MODES {
        let mut g = Guest::pvm_in(mode, |a| {
            a.mov(rax, DATA)?;
            a.wrfsbase(rax)?;
            a.add(rax, 0x100)?;
            a.wrgsbase(rax)?;
            a.rdfsbase(r8)?;
            a.rdgsbase(r9)
        });
        g.finish_pvm();
        assert_eq!((g.reg(8), g.reg(9)), (DATA, DATA + 0x100), "{mode:?}");
        // A system call has saved the one and loaded the other.
        if mode == Mode::User {
            assert_eq!(g.pvcs(GENERATION_1.pvcs.user_gsbase), DATA + 0x100);
            assert_eq!(g.vcpu.state.seg_base[usize::from(seg::GS)], 0);
            assert_eq!(g.vcpu.state.seg_base[usize::from(seg::FS)], DATA);
        }
    }
}

#[test]
fn hlt_in_supervisor_mode_sleeps_until_an_event() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.sti()?;
        a.hlt()?;
        a.nop()
    });
    g.finish_pvm();
    g.interrupt(0x77);
    let event = g.pvm_fault(0x77);
    assert_eq!((event.from, g.peek::<u8>(event.rip - 1)), (Mode::Supervisor, 0xf4));
}
