//! Decoded code that changes, or crosses pages, as the loop runs it.

use super::{DATA, DATA_END, peek, put_bytes, vcpu};
use crate::state::CodeMode::Bits64;
use crate::state::reg::*;
use crate::{Interpreter, Outcome};

/// Runs from `rip` until HLT.
fn run(vcpu: &mut crate::Vcpu, rip: u64) {
    vcpu.state.set_rip(rip);
    assert_eq!(Interpreter::new().run(vcpu), Outcome::Halted);
}

#[test]
fn code_that_changes_itself_runs_as_changed() {
    let mut vcpu = vcpu(Bits64);
    let code = [
        0xb8, 1, 0, 0, 0, // mov eax, 1
        0x01, 0xc2, // add edx, eax
        0xff, 0x43, 0x01, // inc dword [rbx+1]: the immediate of the first
        0xff, 0xc9, // dec ecx
        0x75, 0xf2, // jnz to the start
        0xf4, // hlt
    ];
    // Once inside a page, once with the immediate in another page.
    for start in [DATA, DATA + 0x1000 - 3] {
        put_bytes(&vcpu, start, &code);
        vcpu.set_reg(RBX, start);
        vcpu.set_reg(RCX, 100);
        vcpu.set_reg(RDX, 0);
        run(&mut vcpu, start);
        vcpu.state.slow = 0;
        assert_eq!(vcpu.reg(RDX), (1..=100).sum::<u64>());
    }
}

#[test]
fn a_store_into_the_running_block_takes_effect_at_once() {
    let mut vcpu = vcpu(Bits64);
    // mov byte [rbx+4], 0x41 turns the INC EAX (ff c0) after it into 41 c0, then is followed by hlt.
    let code = [0xc6, 0x43, 0x05, 0xc8, 0xff, 0xc0, 0xf4];
    put_bytes(&vcpu, DATA, &code);
    vcpu.set_reg(RBX, DATA);
    vcpu.set_reg(RAX, 10);
    run(&mut vcpu, DATA);
    // ff c8 is DEC EAX.
    assert_eq!(vcpu.reg(RAX), 9);
}

#[test]
fn a_crossing_instruction_follows_its_second_page() {
    let mut vcpu = vcpu(Bits64);
    let start = DATA + 0x1000 - 2;
    // mov eax, imm32 ; hlt, of which the last three bytes are in the second page
    put_bytes(&vcpu, start, &[0xb8, 0x11, 0x22, 0x33, 0x44, 0xf4]);
    let mut interpreter = Interpreter::new();
    for second in [0x44, 0x55] {
        vcpu.state.set_rip(start);
        assert_eq!(interpreter.run(&mut vcpu), Outcome::Halted);
        assert_eq!(vcpu.reg(RAX), second << 24 | 0x33_2211);
        vcpu.state.slow = 0;
        // Map another page behind the first.
        put_bytes(&vcpu, 0x7_0000, &[0x22, 0x33, 0x55, 0xf4]);
        super::put(&vcpu, super::PML4 + 0x3000 + ((DATA + 0x1000) >> 12) * 8, 0x7_0003);
        vcpu.refresh();
    }
    assert_eq!(peek(&vcpu, start) & 0xffff, 0x11b8);
}

#[test]
fn an_instruction_that_ends_in_the_page_needs_no_other() {
    let mut vcpu = vcpu(Bits64);
    // A HLT is the last byte before the page that is not mapped.
    put_bytes(&vcpu, DATA_END - 1, &[0xf4]);
    run(&mut vcpu, DATA_END - 1);
    assert_eq!(vcpu.state.rip(), DATA_END);
}
