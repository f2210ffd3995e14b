//! Guests that mean harm, or nothing at all. Each is a "kernel" of a few instructions made here, so that no kernel
//! has to be fetched. Whatever a guest does, `ring3` ends with a status and a message, in time, and never panics.
//!
//! Most of them are [`Script`]s: lists of register accesses that one small loop in the guest carries out.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use support::process::{Finished, boot, run};
use support::{Noise, temp_dir, write};

/// Where the program is loaded and entered.
const BASE: u64 = 0x20_0000;
/// Where its script starts.
const SCRIPT: u64 = BASE + 0x1000;
/// Where its rings are, past any script.
const RINGS: u64 = 0x80_0000;

/// The ECAM and the local APIC of the machine, and where its 32-bit PCI window starts.
const ECAM: u64 = 0xe000_0000;
const LOCAL_APIC: u64 = 0xfee0_0000;
const IO_APIC: u64 = 0xfec0_0000;
const WINDOW: u64 = 0xc000_0000;
/// Slots that have a device: console, file system, disk, entropy; and one without.
const SLOTS: u64 = 6;

/// An executable with this code, and nothing or more behind it. It names drivers, so that it passes for a kernel
/// with everything built in and gets every device.
fn program(code: &[u8], more: &[(u64, Vec<u8>)]) -> Vec<u8> {
    const HEADERS: usize = 64 + 56;
    let mut content = code.to_vec();
    content.extend(b"\0Linux version 0.0-hostile x\0virtio-pci virtio_console virtiofs overlay virtio_blk\0");
    for (at, bytes) in more {
        let at = (at - BASE) as usize;
        assert!(at >= content.len(), "parts overlap");
        content.resize(at, 0);
        content.extend(bytes);
    }
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0".to_vec();
    for word in [BASE, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    for half in [0, 0, 64, 56, 1, 0, 0, 0_u16] {
        file.extend(half.to_le_bytes());
    }
    file.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    let size = content.len() as u64;
    for word in [HEADERS as u64, BASE, BASE, size, size, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    assert_eq!(file.len(), HEADERS);
    file.extend(content);
    file
}

fn assemble(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    a.assemble(BASE).unwrap()
}

/// Runs a program as the kernel, with a disk.
fn play(file: &[u8], options: &[&str]) -> Finished {
    let dir = temp_dir();
    let kernel = write(dir.path(), "kernel", file);
    let disk = write(dir.path(), "disk", &vec![0x11; 1 << 20]);
    let mut all = vec!["--memory", "64M", "--disk", disk.to_str().unwrap()];
    all.extend(options);
    let end = boot(run(&kernel, &all, &["true"]));
    assert!(!end.stderr.contains("panicked at"), "ring3 panicked:\n{}", end.stderr);
    assert!(end.signal.is_none(), "{end:?}");
    assert!(end.took.as_secs() < 60, "{end:?}");
    end
}

#[test]
fn a_triple_fault_is_named() {
    let code = assemble(|a| {
        a.push(0)?;
        a.push(0)?;
        a.lidt(ptr(rsp))?;
        a.ud2()
    });
    let end = play(&program(&code, &[]), &["--stats"]);
    end.expect_error("shut down (triple fault) at RIP 0x");
    end.expect_error(", CS 0x10, on vCPU 0, delivering vector 6");
    for words in ["triple fault                 at RIP 0x", ", CR3 0x", ", EFER 0x"] {
        assert!(end.stderr.contains(words), "{words:?} is not in:\n{}", end.stderr);
    }
}

#[test]
fn guests_that_do_nothing_are_ended_by_the_timeout() {
    let halt = assemble(|a| {
        a.cli()?;
        a.hlt()
    });
    play(&program(&halt, &[]), &["--timeout", "1"]).expect(124);
    for cpus in ["1", "2"] {
        let spin = assemble(|a| {
            let mut again = a.create_label();
            a.cli()?;
            a.set_label(&mut again)?;
            a.jmp(again)
        });
        play(&program(&spin, &[]), &["--timeout", "1", "--cpus", cpus]).expect(124);
    }
    // Nor does a guest get away with its own initramfs.
    let dir = temp_dir();
    let initramfs = write(dir.path(), "initramfs", b"nothing");
    let kernel = write(dir.path(), "kernel", &program(&halt, &[]));
    let options = ["--timeout", "1", "--initramfs", initramfs.to_str().unwrap()];
    boot(run(&kernel, &options, &[])).expect(124);
}

/// What a script does at one place.
#[derive(Clone, Copy)]
enum Op {
    /// Stores of 1, 2, 4 and 8 bytes.
    Store8 = 1,
    Store16,
    Store32,
    Store64,
    /// Loads of 4 and 8 bytes.
    Load32,
    Load64,
    /// Port accesses.
    Out8,
    Out16,
    Out32,
    In32,
    /// MSR accesses.
    ReadMsr,
    WriteMsr,
}

/// A list of accesses, after which the guest powers off: it shows that the machine still listens.
#[derive(Default)]
struct Script {
    entries: Vec<u8>,
}

impl Script {
    fn push(&mut self, op: Op, at: u64, value: u64) {
        for word in [op as u64, at, value] {
            self.entries.extend(word.to_le_bytes());
        }
    }

    /// The program that carries it out, with more data behind it.
    fn program(mut self, rings: Vec<u8>) -> Vec<u8> {
        // The sleep control register: SLP_EN, and SLP_TYP of S5.
        self.push(Op::Out8, 0x600, 1 << 5 | 5 << 2);
        self.entries.extend([0; 24]);
        assert!(SCRIPT + (self.entries.len() as u64) < RINGS);
        let (code, handler) = interpreter();
        // General protection, vector 13, is skipped; anything else is a triple fault.
        let mut idt = vec![0; 13 * 16];
        let gate = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler & 0xffff_0000) << 32;
        idt.extend(gate.to_le_bytes());
        idt.extend((handler >> 32).to_le_bytes());
        program(&code, &[(IDT, idt), (SCRIPT, self.entries), (RINGS, rings)])
    }
}

const IDT: u64 = BASE + 0x800;

/// The loop, and the address of its handler of general protection faults.
fn interpreter() -> (Vec<u8>, u64) {
    let mut a = CodeAssembler::new(64).unwrap();
    let mut handler = a.create_label();
    let mut build = || -> Result<_, IcedError> {
        let (mut next, mut end, mut done) = (a.create_label(), a.create_label(), a.create_label());
        a.cli()?;
        a.push(0)?;
        a.mov(rax, (IDT << 16) | (14 * 16 - 1))?;
        a.push(rax)?;
        a.lidt(ptr(rsp))?;
        a.mov(rsi, SCRIPT)?;
        a.set_label(&mut next)?;
        a.mov(rbp, qword_ptr(rsi))?;
        a.mov(rdi, qword_ptr(rsi + 8))?;
        a.mov(rbx, qword_ptr(rsi + 16))?;
        a.add(rsi, 24)?;
        a.test(rbp, rbp)?;
        a.je(end)?;
        let case = |a: &mut CodeAssembler,
                    op: Op,
                    body: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>|
         -> Result<(), IcedError> {
            let mut other = a.create_label();
            a.cmp(rbp, op as i32)?;
            a.jne(other)?;
            body(a)?;
            a.jmp(done)?;
            a.set_label(&mut other)?;
            // An instruction can have one label.
            a.nop()
        };
        case(&mut a, Op::Store8, &|a| a.mov(byte_ptr(rdi), bl))?;
        case(&mut a, Op::Store16, &|a| a.mov(word_ptr(rdi), bx))?;
        case(&mut a, Op::Store32, &|a| a.mov(dword_ptr(rdi), ebx))?;
        case(&mut a, Op::Store64, &|a| a.mov(qword_ptr(rdi), rbx))?;
        case(&mut a, Op::Load32, &|a| a.mov(eax, dword_ptr(rdi)))?;
        case(&mut a, Op::Load64, &|a| a.mov(rax, qword_ptr(rdi)))?;
        let port = |a: &mut CodeAssembler| {
            a.mov(edx, edi)?;
            a.mov(eax, ebx)
        };
        case(&mut a, Op::Out8, &|a| port(a).and_then(|()| a.out(dx, al)))?;
        case(&mut a, Op::Out16, &|a| port(a).and_then(|()| a.out(dx, ax)))?;
        case(&mut a, Op::Out32, &|a| port(a).and_then(|()| a.out(dx, eax)))?;
        case(&mut a, Op::In32, &|a| port(a).and_then(|()| a.in_(eax, dx)))?;
        let msr = |a: &mut CodeAssembler| {
            a.mov(ecx, edi)?;
            a.mov(eax, ebx)?;
            a.mov(rdx, rbx)?;
            a.shr(rdx, 32)
        };
        case(&mut a, Op::ReadMsr, &|a| msr(a).and_then(|()| a.rdmsr()))?;
        case(&mut a, Op::WriteMsr, &|a| msr(a).and_then(|()| a.wrmsr()))?;
        a.set_label(&mut done)?;
        a.jmp(next)?;
        a.set_label(&mut end)?;
        a.hlt()?;
        // Over the instruction, which has two bytes: RDMSR or WRMSR.
        a.set_label(&mut handler)?;
        a.add(rsp, 8)?;
        a.add(qword_ptr(rsp), 2)?;
        a.iretq()
    };
    build().unwrap();
    let result =
        a.assemble_options(BASE, iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS).unwrap();
    let address = result.label_ip(&handler).unwrap();
    (result.inner.code_buffer, address)
}

fn function(slot: u64) -> u64 {
    ECAM + (slot << 15)
}

/// Where [`place`] puts the BARs of a slot.
fn registers(slot: u64) -> u64 {
    WINDOW + (slot << 20)
}

/// Gives a device its registers, at [`registers`], and its MSI-X table a page after them.
fn place(script: &mut Script, slot: u64) {
    let config = function(slot);
    script.push(Op::Store16, config + 4, 0);
    for (bar, address) in [(0, registers(slot)), (1, 0), (2, registers(slot) + 0x1_0000), (3, 0)] {
        script.push(Op::Store32, config + 0x10 + 4 * bar, address);
    }
    script.push(Op::Store16, config + 4, 6);
}

/// Takes a device through the status register up to its queues.
fn negotiate(script: &mut Script, slot: u64) {
    let at = registers(slot);
    script.push(Op::Store8, at + 20, 0);
    script.push(Op::Store8, at + 20, 1);
    script.push(Op::Store8, at + 20, 3);
    // Indirect descriptors, of the console (the first device) several ports, and VERSION_1.
    script.push(Op::Store32, at + 8, 0);
    script.push(Op::Store32, at + 12, if slot == 1 { 0x1000_0002 } else { 0x1000_0000 });
    script.push(Op::Store32, at + 8, 1);
    script.push(Op::Store32, at + 12, 1);
    script.push(Op::Store8, at + 20, 11);
}

/// Sets up every queue of a device on the same rings, starts it and rings every bell.
fn start(script: &mut Script, slot: u64, size: u64, [desc, avail, used]: [u64; 3]) {
    const QUEUES: u64 = 12;
    let at = registers(slot);
    negotiate(script, slot);
    for queue in 0..QUEUES {
        script.push(Op::Store16, at + 22, queue);
        script.push(Op::Store16, at + 24, size);
        script.push(Op::Store16, at + 26, 0);
        for (offset, address) in [(32, desc), (40, avail), (48, used)] {
            script.push(Op::Store64, at + offset, address);
        }
        script.push(Op::Store16, at + 28, 1);
    }
    script.push(Op::Store8, at + 20, 15);
    for _ in 0..50 {
        for queue in 0..QUEUES {
            script.push(Op::Store32, at + 0x3000 + 4 * queue, queue);
        }
        script.push(Op::Load32, at + 20, 0);
    }
}

/// The guest came to its end and the machine with it.
fn expect_end(file: &[u8]) {
    play(file, &["--timeout", "50"]).expect_error("powered off");
}

#[test]
fn bars_anywhere() {
    let mut script = Script::default();
    let places =
        [0, 0x1000, 0x20_0000, WINDOW, ECAM, IO_APIC, LOCAL_APIC, 0xffff_f000, 0xffff_ffff, 0xdfff_f000];
    for slot in 0..SLOTS {
        for low in places {
            for high in [0, 1, 0xff, 0xffff_ffff] {
                let config = function(slot);
                for bar in 0..6 {
                    let value = if bar % 2 == 0 { low } else { high };
                    script.push(Op::Store32, config + 0x10 + 4 * bar, value);
                }
                script.push(Op::Store32, config + 0x30, low | 1);
                script.push(Op::Store16, config + 4, 0xffff);
                script.push(Op::Load32, low & 0xffff_f000, 0);
                script.push(Op::Store32, WINDOW + 20, 0xffff_ffff);
                script.push(Op::Load64, WINDOW + 0x14, 0);
                script.push(Op::Store16, config + 4, 0);
            }
        }
    }
    expect_end(&script.program(Vec::new()));
}

#[test]
fn queues_that_are_nowhere() {
    let mut script = Script::default();
    for slot in 1..SLOTS {
        place(&mut script, slot);
        for bad in [!0xfff, 64 << 20, (64 << 20) - 0x1000, 0xa_0000, ECAM, 1 << 63, 1, registers(slot)] {
            for which in 0..3 {
                let mut places = [RINGS, RINGS + 0x1000, RINGS + 0x2000];
                places[which] = bad;
                start(&mut script, slot, 128, places);
            }
        }
        for size in [0, 3, 0x8000, 0xffff] {
            start(&mut script, slot, size, [RINGS, RINGS + 0x1000, RINGS + 0x2000]);
        }
    }
    expect_end(&script.program(vec![0; 0x3000]));
}

/// Rings as a bad driver leaves them: `size` descriptors, and what the available ring says.
fn rings(descriptors: &[(u64, u32, u16, u16)], available: &[u16], index: u16) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (address, length, flags, next) in descriptors {
        bytes.extend(address.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
    }
    bytes.resize(0x1000, 0);
    bytes.extend(0_u16.to_le_bytes());
    bytes.extend(index.to_le_bytes());
    for head in available {
        bytes.extend(head.to_le_bytes());
    }
    bytes.resize(0x3000, 0);
    // An indirect table that leads to itself.
    bytes.extend((RINGS + 0x3000).to_le_bytes());
    bytes.extend([0, 0x10, 0, 0, 4 | 1, 0, 0, 0]);
    bytes.resize(0x4000, 0);
    bytes
}

#[test]
fn rings_of_nonsense() {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    let table = RINGS + 0x3000;
    let all = [
        // Chains that loop, at once and later; that lead out of the table; that are overlong.
        rings(&[(RINGS, 16, NEXT, 0)], &[0, 0, 0], 3),
        rings(&[(RINGS, 16, NEXT, 1), (RINGS, 16, NEXT | WRITE, 0)], &[0, 1], 2),
        rings(&[(RINGS, 16, NEXT, 0xffff)], &[0], 1),
        rings(
            &(1..129).map(|n| (RINGS, u32::MAX, NEXT | WRITE, n % 128)).collect::<Vec<_>>(),
            &[0; 128],
            128,
        ),
        // Buffers outside of memory, or beyond its end.
        rings(&[(u64::MAX, u32::MAX, WRITE, 0)], &[0], 1),
        rings(&[((64 << 20) - 8, 4096, WRITE, 0)], &[0], 1),
        rings(&[(ECAM, 4096, 0, 0)], &[0], 1),
        // Indirect tables: in one another, odd, empty, outside.
        rings(&[(table, 16, INDIRECT, 0)], &[0], 1),
        rings(&[(table, 17, INDIRECT, 0)], &[0], 1),
        rings(&[(table, 0, INDIRECT, 0)], &[0], 1),
        rings(&[(table, 16, INDIRECT | NEXT | WRITE, 0)], &[0], 1),
        rings(&[(1 << 50, 0xffff_fff0, INDIRECT, 0)], &[0], 1),
        // Heads that are none, and an index far ahead.
        rings(&[(RINGS, 16, 0, 0)], &[0xffff, 128, 0], 3),
        rings(&[(RINGS, 16, WRITE, 0)], &[0; 128], 60_000),
    ];
    for (number, rings) in all.into_iter().enumerate() {
        let mut script = Script::default();
        for slot in 1..SLOTS {
            place(&mut script, slot);
            start(&mut script, slot, 128, [RINGS, RINGS + 0x1000, RINGS + 0x2000]);
        }
        let end = play(&script.program(rings), &["--timeout", "50"]);
        assert!(end.code == Some(125) && end.stderr.contains("powered off"), "case {number}: {end:?}");
    }
}

#[test]
fn interrupts_to_nowhere() {
    let mut script = Script::default();
    for slot in 1..SLOTS {
        place(&mut script, slot);
        for (low, high) in [
            (LOCAL_APIC | 0xff << 12, 0),
            (LOCAL_APIC | 0xff << 12 | 0xc, u64::from(u32::MAX)),
            (LOCAL_APIC - 4, 0),
            (0x1234_5678, 0),
            (RINGS, 0),
            (0xffff_fffc, 0xffff_ffff),
        ] {
            for data in [0, 0xffff_ffff, 0x700, 0x500] {
                for vector in 0..4 {
                    let entry = registers(slot) + 0x1_0000 + 16 * vector;
                    for (offset, value) in [(0, low), (4, high), (8, data), (12, 0)] {
                        script.push(Op::Store32, entry + offset, value);
                    }
                }
                // Wherever MSI-X's control register is: on, all vectors open.
                for offset in (0x40..0xd0).step_by(4) {
                    script.push(Op::Store16, function(slot) + offset + 2, 0x8000);
                }
                start(&mut script, slot, 128, [RINGS, RINGS + 0x1000, RINGS + 0x2000]);
            }
        }
    }
    // Buffers that the devices give back, which is when they interrupt. INIT or start-up messages may well end
    // the guest: it asked for them.
    let rings = rings(&[(RINGS + 0x2800, 16, 2, 0)], &[0; 100], 100);
    let end = play(&script.program(rings), &["--timeout", "20"]);
    assert!([Some(124), Some(125)].contains(&end.code), "{end:?}");
}

/// Pokes at everything there is, from a fixed seed.
#[test]
fn random_pokes() {
    for seed in 1..=4 {
        let mut noise = Noise(seed);
        let mut script = Script::default();
        for slot in 1..SLOTS {
            place(&mut script, slot);
        }
        for _ in 0..60_000 {
            let (what, value) = (noise.next(), noise.next());
            let offset = noise.next();
            let small = if what & 1 << 20 == 0 { offset & 0xff } else { offset & 0xfff };
            let slot = offset >> 32 & 7;
            let place = match what % 8 {
                0 => function(slot) + small,
                1..4 => registers(slot) + (offset >> 40 & 3) * 0x1000 + small,
                4 => registers(slot) + 0x1_0000 + small,
                5 => LOCAL_APIC + small,
                6 => IO_APIC + small,
                _ => WINDOW + (offset & 0x3fff_ffff),
            };
            let port = match offset >> 50 & 3 {
                0 => offset & 0xff,
                1 => 0x3f8 + (offset & 7),
                2 => 0xcf8 + (offset & 4),
                _ => offset & 0xffff,
            };
            // The ports that would end it too soon, and accesses that reach up to them.
            let port = match port {
                0x61..=0x64 | 0x502..=0x505 | 0x5fd..=0x602 | 0xcf6 | 0xcf7 | 0xcf9 => 0x80,
                _ => port,
            };
            let value = match value >> 60 {
                0..8 => value & 0xff,
                8..12 => value & 0xffff_ffff,
                12 => u64::MAX,
                _ => value,
            };
            let msr = match offset >> 54 & 3 {
                0 => 0x800 + (offset & 0x3f),
                1 => 0xc000_0080 + (offset & 7),
                2 => 0x4b56_4d00 + (offset & 7),
                _ => offset & 0xfff,
            };
            match what >> 32 & 31 {
                0..6 => script.push(Op::Store8, place, value),
                6..10 => script.push(Op::Store16, place & !1, value),
                10..18 => script.push(Op::Store32, place & !3, value),
                18 => script.push(Op::Store64, place & !7, value),
                19..23 => script.push(Op::Load32, place, 0),
                23 => script.push(Op::Load64, place, 0),
                24 => script.push(Op::Out8, port, value),
                25 => script.push(Op::Out16, if port == 0xcf8 { 0x80 } else { port }, value),
                26 => script.push(Op::Out32, port, value),
                27 => script.push(Op::In32, port, 0),
                28..30 => script.push(Op::ReadMsr, msr, 0),
                _ if what & 0xf00 == 0 => script.push(Op::WriteMsr, msr, value),
                _ => script.push(Op::ReadMsr, msr, 0),
            }
        }
        let cpus = if seed % 2 == 0 { "2" } else { "1" };
        let end = play(&script.program(vec![0; 0x3000]), &["--timeout", "10", "--cpus", cpus]);
        assert!([Some(124), Some(125)].contains(&end.code), "seed {seed}: {end:?}");
    }
}

/// What the other tests rely on.
#[test]
fn a_script_runs_to_its_end() {
    expect_end(&Script::default().program(Vec::new()));
}
