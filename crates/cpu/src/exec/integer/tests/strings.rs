//! String instructions.

use super::{CODE, DATA, DATA_END, execute, peek, peek_bytes, put, put_bytes, run_bytes, vcpu};
use crate::attention::INTERRUPT;
use crate::fault::{Stop, vector};
use crate::flags::{CF, DF, OF, ZF};
use crate::state::CodeMode::{Bits16, Bits64};
use crate::state::{reg::*, seg, slow};

const REP_MOVSB: &[u8] = &[0xf3, 0xa4];

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 7 + n / 256) as u8).collect()
}

#[test]
fn copies_in_both_directions() {
    let mut vcpu = vcpu(Bits64);
    let bytes = pattern(0x300);
    put_bytes(&vcpu, DATA + 0xf00, &bytes);
    // Forward across a page boundary, in runs.
    for (n, value) in [(RSI, DATA + 0xf00), (RDI, DATA + 0x1300), (RCX, 0x300)] {
        vcpu.set_reg(n, value);
    }
    run_bytes(&mut vcpu, REP_MOVSB).unwrap();
    assert_eq!(peek_bytes(&vcpu, DATA + 0x1300, 0x300), bytes);
    assert_eq!((vcpu.reg(RSI), vcpu.reg(RDI), vcpu.reg(RCX)), (DATA + 0x1200, DATA + 0x1600, 0));
    // Backward, eight bytes each.
    vcpu.state.flags.set_bits(DF);
    for (n, value) in [(RSI, DATA + 0xf00 + 0x2f8), (RDI, DATA + 0x1300), (RCX, 0x60)] {
        vcpu.set_reg(n, value);
    }
    run_bytes(&mut vcpu, &[0xf3, 0x48, 0xa5]).unwrap();
    assert_eq!(peek_bytes(&vcpu, DATA + 0x1300 - 0x2f8, 0x300), bytes);
    assert_eq!(vcpu.reg(RSI), DATA + 0xf00 - 8);
}

#[test]
fn an_overlapping_copy_repeats_its_beginning() {
    let mut vcpu = vcpu(Bits64);
    put_bytes(&vcpu, DATA, b"abc");
    for (n, value) in [(RSI, DATA), (RDI, DATA + 3), (RCX, 300)] {
        vcpu.set_reg(n, value);
    }
    run_bytes(&mut vcpu, REP_MOVSB).unwrap();
    assert_eq!(peek_bytes(&vcpu, DATA, 303), b"abc".repeat(101));
}

#[test]
fn elements_may_straddle_pages() {
    let mut vcpu = vcpu(Bits64);
    for (n, value) in [(RDI, DATA + 0xffa), (RCX, 3), (RAX, 0x1122_3344_5566_7788)] {
        vcpu.set_reg(n, value);
    }
    // Warm both pages first, so that runs are possible.
    run_bytes(&mut vcpu, &[0xaa]).unwrap();
    vcpu.set_reg(RDI, DATA + 0xffa);
    run_bytes(&mut vcpu, &[0xf3, 0x48, 0xab]).unwrap();
    assert_eq!(vcpu.reg(RDI), DATA + 0xffa + 24);
    for n in 0..3 {
        assert_eq!(peek(&vcpu, DATA + 0xffa + n * 8), 0x1122_3344_5566_7788);
    }
}

#[test]
fn a_fault_leaves_the_registers_at_the_failing_element() {
    let mut vcpu = vcpu(Bits64);
    for (n, value) in [(RDI, DATA_END - 0x13), (RCX, 0x20), (RAX, 0x5a)] {
        vcpu.set_reg(n, value);
    }
    let fault = run_bytes(&mut vcpu, &[0xf3, 0xab]).unwrap_err();
    // The element that straddles the end is not written in part.
    assert_eq!((fault.vector, fault.address.0), (vector::PF, DATA_END));
    assert_eq!((vcpu.reg(RDI), vcpu.reg(RCX), vcpu.state.rip()), (DATA_END - 3, 0x1c, CODE));
    assert_eq!(peek_bytes(&vcpu, DATA_END - 4, 4), [0, 0, 0, 0]);
    assert_eq!(peek_bytes(&vcpu, DATA_END - 0x13, 4), [0x5a, 0, 0, 0]);
}

#[test]
fn comparisons_stop_where_they_differ() {
    let mut vcpu = vcpu(Bits64);
    put_bytes(&vcpu, DATA, b"hello, world");
    put_bytes(&vcpu, DATA + 0x100, b"hello, there");
    for (n, value) in [(RSI, DATA), (RDI, DATA + 0x100), (RCX, 12)] {
        vcpu.set_reg(n, value);
    }
    run_bytes(&mut vcpu, &[0xf3, 0xa6]).unwrap();
    assert_eq!((vcpu.reg(RCX), vcpu.reg(RSI), vcpu.reg(RDI)), (4, DATA + 8, DATA + 0x108));
    // 'w' - 't': above.
    assert!(!vcpu.state.flags.zf() && !vcpu.state.flags.cf());
    // repne scasb finds the comma.
    for (n, value) in [(RDI, DATA), (RCX, u64::MAX), (RAX, u64::from(b','))] {
        vcpu.set_reg(n, value);
    }
    run_bytes(&mut vcpu, &[0xf2, 0xae]).unwrap();
    assert_eq!((vcpu.reg(RDI), vcpu.reg(RCX)), (DATA + 6, u64::MAX - 6));
    // A count of zero does nothing, flags included.
    vcpu.set_reg(RCX, 0);
    vcpu.state.flags.set_bits(CF);
    run_bytes(&mut vcpu, &[0xf3, 0xa6]).unwrap();
    assert!(vcpu.state.flags.cf() && !vcpu.state.flags.zf());
    // lodsw, then rep lodsb ends with the last byte.
    vcpu.set_reg(RSI, DATA);
    run_bytes(&mut vcpu, &[0x66, 0xad]).unwrap();
    assert_eq!(vcpu.reg(RAX), u64::from(u16::from_le_bytes(*b"he")));
    vcpu.set_reg(RCX, 3);
    run_bytes(&mut vcpu, &[0xf3, 0xac]).unwrap();
    assert_eq!((vcpu.reg(RAX) as u8, vcpu.reg(RSI)), (b'o', DATA + 5));
}

#[test]
fn address_sizes_and_segments() {
    // 32-bit addresses in 64-bit mode: pointers and counter are truncated and cleared above.
    let mut vcpu = vcpu(Bits64);
    put(&vcpu, DATA, 0x77);
    vcpu.state.seg_base[usize::from(seg::GS)] = DATA;
    for (n, value) in [(RSI, 7 << 32), (RDI, 1 << 32 | (DATA + 8)), (RCX, 1 << 40 | 1)] {
        vcpu.set_reg(n, value);
    }
    // gs rep movsb with an address-size prefix
    run_bytes(&mut vcpu, &[0x65, 0x67, 0xf3, 0xa4]).unwrap();
    assert_eq!(peek(&vcpu, DATA + 8), 0x77);
    assert_eq!((vcpu.reg(RSI), vcpu.reg(RDI), vcpu.reg(RCX)), (1, DATA + 9, 0));
    // 16-bit: pointers wrap and keep their upper halves; the destination is in ES.
    let mut vcpu = super::vcpu(Bits16);
    vcpu.state.seg_base[usize::from(seg::ES)] = 0x3_0000;
    for (n, value) in [(RDI, 0x9_ffff), (RCX, 0x5_0002), (RAX, 0x42)] {
        vcpu.set_reg(n, value);
    }
    run_bytes(&mut vcpu, &[0xf3, 0xaa]).unwrap();
    assert_eq!((vcpu.reg(RDI), vcpu.reg(RCX)), (0x9_0001, 0x5_0000));
    assert_eq!((peek_bytes(&vcpu, 0x3_ffff, 1), peek_bytes(&vcpu, 0x3_0000, 1)), (vec![0x42], vec![0x42]));
}

#[test]
fn a_fault_in_a_repeated_comparison_restores_the_flags() {
    let mut vcpu = vcpu(Bits64);
    vcpu.state.flags.set_bits(CF | ZF | OF);
    let before = vcpu.state.flags.bits();
    for (n, value) in [(RDI, DATA_END - 2), (RCX, 8), (RAX, 5)] {
        vcpu.set_reg(n, value);
    }
    // repne scasb: two elements compare below AL, the third faults.
    let stop = *execute(&mut vcpu, &[0xf2, 0xae]).unwrap_err();
    assert!(matches!(stop, Stop::Fault(f) if f.address.0 == DATA_END));
    assert_eq!((vcpu.reg(RDI), vcpu.reg(RCX)), (DATA_END, 6));
    assert_eq!(vcpu.state.flags.bits(), before);
}

#[test]
fn attention_and_single_step_interrupt_a_repetition() {
    let mut vcpu = vcpu(Bits64);
    let start = |vcpu: &mut crate::Vcpu| {
        for (n, value) in [(RSI, DATA), (RDI, DATA), (RCX, 1 << 20)] {
            vcpu.set_reg(n, value);
        }
        vcpu.state.set_rip(CODE);
    };
    start(&mut vcpu);
    // rep lodsb over a megabyte, with an interrupt waiting: it gives way after a bounded number.
    vcpu.attention().raise(INTERRUPT);
    assert_eq!(*execute(&mut vcpu, &[0xf3, 0xac]).unwrap_err(), Stop::Restart);
    let done = vcpu.reg(RSI) - DATA;
    assert!((1..=0x2000).contains(&done));
    assert_eq!((vcpu.state.rip(), vcpu.reg(RCX)), (CODE, (1 << 20) - done));
    // Nothing waits: it goes on to the fault at the end of the mapping.
    vcpu.attention().take(INTERRUPT);
    let stop = *execute(&mut vcpu, &[0xf3, 0xac]).unwrap_err();
    assert!(matches!(stop, Stop::Fault(f) if f.address.0 == DATA_END));
    assert_eq!(vcpu.reg(RCX), (1 << 20) - (DATA_END - DATA));
    // Single-step: one element each, and RIP moves on with the last.
    start(&mut vcpu);
    vcpu.set_reg(RCX, 2);
    vcpu.state.slow |= slow::SINGLE_STEP;
    assert_eq!(*execute(&mut vcpu, &[0xf3, 0xaa]).unwrap_err(), Stop::Restart);
    assert_eq!((vcpu.reg(RCX), vcpu.state.rip()), (1, CODE));
    execute(&mut vcpu, &[0xf3, 0xaa]).unwrap();
    assert_eq!((vcpu.reg(RCX), vcpu.state.rip()), (0, CODE + 2));
}
