//! How fast instructions execute: `cargo test --release -p cpu --lib -- --ignored speed --nocapture`.

use std::sync::Arc;
use std::time::Duration;

use iced_x86::code_asm::*;

use super::{CODE, DATA, put_bytes, vcpu};
use crate::Interpreter;
use crate::attention::KICK;
use crate::state::CodeMode;

fn measure(name: &str, program: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) {
    let mut assembler = CodeAssembler::new(64).unwrap();
    program(&mut assembler).unwrap();
    measure_bytes(name, CODE, &assembler.assemble(CODE).unwrap());
}

/// What this thread has had of the host's processors, so that others on them do not count.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split_whitespace().next().unwrap().parse::<f64>().unwrap() / 1e9
}

fn measure_bytes(name: &str, at: u64, code: &[u8]) {
    let mut vcpu = vcpu(CodeMode::Bits64);
    put_bytes(&vcpu, at, code);
    vcpu.state.set_rip(at);
    vcpu.set_reg(3, DATA);
    let attention = Arc::clone(vcpu.attention());
    let timer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        attention.raise(KICK);
    });
    let start = cpu_seconds();
    Interpreter::new().run(&mut vcpu);
    let seconds = cpu_seconds() - start;
    timer.join().unwrap();
    println!("{name}: {:.0} M instructions/s", vcpu.stats.instructions as f64 / seconds / 1e6);
}

/// A quarter of a MiB of blocks of five instructions and 32 bytes, each followed by another far away.
fn scattered() -> Vec<u8> {
    const BLOCKS: u64 = 8192;
    let mut code = Vec::new();
    for n in 0..BLOCKS {
        // add eax, ebx; mov rcx, [rbx+8]; test rcx, rcx; lea edx, [rcx+rax]; jmp
        code.extend([0x01, 0xd8, 0x48, 0x8b, 0x4b, 0x08, 0x48, 0x85, 0xc9, 0x8d, 0x14, 0x01, 0xe9]);
        // A full cycle through all blocks: the increment of a linear congruential generator is odd, its
        // multiplier one more than a multiple of four.
        let next = (n * 2053 + 4099) % BLOCKS;
        code.extend(((next as i32 - n as i32) * 32 - 17).to_le_bytes());
        code.extend([0x90; 15]);
    }
    code
}

#[test]
#[ignore = "a measurement"]
fn speed() {
    measure("registers", |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.add(rax, rbx)?;
        a.xor(rcx, rax)?;
        a.shr(rdx, 3)?;
        a.lea(rsi, rsi + rdi * 2)?;
        a.dec(r8)?;
        a.jnz(top)?;
        a.jmp(top)
    });
    measure("memory", |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.mov(rax, qword_ptr(rbx + 8))?;
        a.add(eax, 7)?;
        a.mov(dword_ptr(rbx + 16), eax)?;
        a.cmp(byte_ptr(rbx), 3)?;
        a.movzx(edx, word_ptr(rbx + 32))?;
        a.add(qword_ptr(rbx + 40), rdx)?;
        a.test(rdx, rdx)?;
        a.jz(top)?;
        a.jmp(top)
    });
    measure("calls", |a| {
        let mut top = a.create_label();
        let mut function = a.create_label();
        a.set_label(&mut top)?;
        a.mov(edi, 3)?;
        a.call(function)?;
        a.test(eax, eax)?;
        a.jnz(top)?;
        a.jmp(top)?;
        a.set_label(&mut function)?;
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.mov(eax, edi)?;
        a.cmp(eax, 4)?;
        a.cmove(eax, edx)?;
        a.pop(rbp)?;
        a.ret()
    });
    // The same registers, but the fourth instruction crosses a page.
    let crossing = [
        0x48, 0x01, 0xd8, 0x48, 0x31, 0xc1, 0x48, 0xc1, 0xea, 0x03, 0x48, 0x8d, 0x34, 0x7e, 0x49, 0xff, 0xc8,
        0xeb, 0xed,
    ];
    measure_bytes("crossing", 0x8_0000 - 12, &crossing);
    measure_bytes("scattered", 0x8_0000, &scattered());
}
