//! What the state machine decides about instructions: which SYSCALL is what, the GDT behind segment instructions,
//! the interrupt flag behind CLI and STI, and the numbers behind CPUID.

use iced_x86::{Code, Decoder, DecoderOptions, Register};
use pvm::abi::{control, cpuid};
use pvm::{Event, Mode, Next};

use crate::rig::*;

#[test]
fn the_synthetic_cpuid_is_an_invlpg_and_a_cpuid() {
    let bytes = [0x0f, 0x01, 0x3c, 0x25, 0x50, 0x56, 0x4d, 0xff, 0x0f, 0xa2];
    assert_eq!(cpuid::SYNTHETIC, bytes);
    let mut decoder = Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE);
    let invlpg = decoder.decode();
    assert_eq!(invlpg.code(), Code::Invlpg_m);
    assert_eq!((invlpg.memory_base(), invlpg.memory_index()), (Register::None, Register::None));
    assert_eq!(invlpg.memory_displacement64(), 0xffff_ffff_ff4d_5650);
    assert_eq!(cpuid::SYNTHETIC_ADDRESS, 0xffff_ffff_ff4d_5650);
    assert_eq!(decoder.decode().code(), Code::Cpuid);
    assert!(!decoder.can_decode());
    // Outside every range that a guest can have: INVLPG of it drops nothing.
    let widest = pvm::AddressRanges::new(256..510, Some(256..510)).unwrap();
    assert!(!widest.allows(cpuid::SYNTHETIC_ADDRESS));
}

#[test]
fn the_signature_is_the_headers() {
    assert_eq!((cpuid::SIGNATURE, cpuid::VENDOR_FEATURES), (0x4000_0000, 0x4000_0002));
    assert_eq!(cpuid::PVM, 0x4d5650);
    assert_eq!(cpuid::PVM.to_le_bytes(), *b"PVM\0");
}

#[test]
fn syscall_is_a_return_where_the_msrs_say() {
    let mut v = Vcpu::supervisor();
    v.put_u16(at::USER_CS, 0x33);
    v.put_u16(at::USER_SS, 0x2b);
    // The instruction has two bytes; its neighbours are hypercalls.
    for address in [RETU_RIP - 1, RETU_RIP + 1, RETU_RIP + 2, RETS_RIP - 1, RETS_RIP + 2] {
        let mut v = v.clone();
        v.cpu.registers.rax = 0;
        assert_eq!(v.syscall_at(address), Ok(Next::Run));
        assert_eq!(v.pvm.stats().kvm_hypercalls, 1, "{address:#x}");
    }
    let mut eretu = v.clone();
    assert_eq!(eretu.syscall_at(RETU_RIP), Ok(Next::Run));
    assert_eq!(eretu.pvm.stats().user_returns, 1);
    assert_eq!(eretu.pvm.mode(), Mode::User);
    let mut erets = v.clone();
    assert_eq!(erets.syscall_at(RETS_RIP), Ok(Next::Run));
    assert_eq!(erets.pvm.stats().supervisor_returns, 1);
    assert_eq!(erets.pvm.mode(), Mode::Supervisor);
    // One address for both returns to the user. At the end of the address space it is an address like another.
    v.set(msr::RETS_RIP, u64::MAX - 1);
    v.set(msr::RETU_RIP, u64::MAX - 1);
    assert_eq!(v.syscall_at(u64::MAX - 1), Ok(Next::Run));
    assert_eq!(v.pvm.mode(), Mode::User);
}

#[test]
fn in_user_mode_every_syscall_is_a_system_call() {
    for address in [RETU_RIP, RETS_RIP, 0x40_0000] {
        let mut v = Vcpu::user();
        v.cpu.registers.rax = 0x1708_8203;
        assert_eq!(v.syscall_at(address), Ok(Next::Run));
        assert_eq!(v.cpu.registers.rip, LSTAR);
        assert_eq!(v.cpu.registers.rax, 0x1708_8203);
        assert_eq!(v.pvm.stats().pvm_hypercalls(), 0);
    }
}

#[test]
fn segment_instructions_see_the_hypervisors_table() {
    let gdt = *Vcpu::bare().pvm.gdt();
    // __USER32_CS, __USER_DS, __USER_CS: flat, DPL 3. The limit of CPUNODE is the number of the CPU.
    let expected = [
        (0x23, 0x00cf_fb00_0000_ffff),
        (0x2b, 0x00cf_f300_0000_ffff),
        (0x33, 0x00af_fb00_0000_ffff),
        (0x7b, 0x0040_f100_0000_0003),
    ];
    for (selector, descriptor) in expected {
        for rpl in 0..4 {
            assert_eq!(gdt.descriptor(selector & !3 | rpl), Some(descriptor), "{selector:#x}");
        }
    }
    // Nothing else: not the null selector, not the supervisor's own, not the LDT.
    for index in 0..0x2000 {
        let selector = index << 3 | 3;
        let known = expected.iter().any(|(s, _)| *s == selector);
        assert_eq!(gdt.descriptor(selector).is_some(), known, "{selector:#x}");
        assert_eq!(gdt.descriptor(selector | 4), None, "{selector:#x}");
    }
}

#[test]
fn cli_and_sti_act_on_the_structure() {
    for (flags, open, left) in [
        (0, true, IF),
        (IP, true, IF),
        (IF | IP, false, IP),
        (IF, false, 0),
        (!0, true, !IP),
        (!0, false, !IF),
    ] {
        let mut v = Vcpu::supervisor();
        v.put_u64(at::EVENT_FLAGS, flags);
        let mut expected = v.clone();
        expected.put_u64(at::EVENT_FLAGS, left);
        v.pvm.set_interrupt_flag(&mut v.cpu, open);
        // The underlying flag stays one.
        v.assert_is(&mut expected);
        assert_eq!(v.pvm.interrupts_open(&mut v.cpu), open);
    }
    let mut v = Vcpu::bare();
    let mut expected = v.clone();
    v.pvm.set_interrupt_flag(&mut v.cpu, true);
    v.assert_is(&mut expected);
}

#[test]
fn pushed_flags_differ_from_framed_ones() {
    // What PUSHF would show is the underlying register: IF is one. In a frame it is the structure's.
    let mut v = Vcpu::supervisor();
    assert_eq!(v.cpu.registers.rflags & IF, IF);
    assert_eq!(v.deliver(Event::new(6)), Ok(()));
    assert_eq!(v.cpu.bytes(v.cpu.registers.rsp + 24), 0x46u64.to_le_bytes());
}

#[test]
fn control_registers_have_fixed_bits() {
    // CR0: PG AM WP NE ET MP PE; CD NW TS EM. CR4: FSGSBASE PAE; SMAP SMEP PVI VME. EFER: LMA LME SCE.
    assert_eq!((control::CR0_ONE, control::CR0_ZERO), (0x8005_0033, 0x6000_000c));
    assert_eq!((control::CR4_ONE, control::CR4_ZERO), (0x0001_0020, 0x0030_0003));
    assert_eq!(control::EFER_ONE, 0x501);
    assert_eq!((control::CR4_PKE, control::CR4_PKS), (1 << 22, 1 << 24));
    let possible = [0, 1 << 22, 1 << 24, 1 << 22 | 1 << 24].map(control::keys_are_possible);
    assert_eq!(possible, [true, true, false, true]);
}
