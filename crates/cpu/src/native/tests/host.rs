//! Every instruction that runs natively, with random operands, against the host CPU running it as it is:
//! with its own registers, and its memory operand in place.

use iced_x86::code_asm::*;
use iced_x86::{Code, Encoder, Instruction, Mnemonic, OpCodeOperandKind as Kind, OpKind, Register};

use super::super::arena::Arena;
use super::super::class::{self, Class};
use super::super::verify::Verified;
use super::*;
use crate::fpu::Fpu;
use crate::state::{CpuState, reg};

/// The general registers that operands may be: all but the two that hold addresses, and RSP.
const GENERAL: [Register; 13] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RBP,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

/// An instruction of `code` with random operands; its memory operand is [RSI]. `None` if it is not of the
/// kind under test.
fn generate(code: Code, random: &mut Random) -> Option<Instruction> {
    let info = code.op_code();
    if !info.mode64() || !info.is_instruction() {
        return None;
    }
    let mut i = Instruction::default();
    i.set_code(code);
    for n in 0..info.op_count() {
        let vector = |base: Register, random: &mut Random| base + random.below(16) as u32;
        let general = |base: Register, random: &mut Random| {
            let r = GENERAL[random.below(GENERAL.len() as u64) as usize];
            base + r.number() as u32
        };
        let memory = random.below(2) == 0;
        let register = match info.op_kind(n) {
            Kind::mem => None,
            Kind::mem_vsib32x | Kind::mem_vsib64x => {
                i.set_memory_index(vector(Register::XMM0, random));
                None
            }
            Kind::mem_vsib32y | Kind::mem_vsib64y => {
                i.set_memory_index(vector(Register::YMM0, random));
                None
            }
            Kind::mm_or_mem | Kind::xmm_or_mem | Kind::ymm_or_mem if memory => None,
            Kind::r32_or_mem | Kind::r64_or_mem if memory => None,
            Kind::mm_or_mem | Kind::mm_reg | Kind::mm_rm => Some(Register::MM0 + random.below(8) as u32),
            Kind::xmm_or_mem | Kind::xmm_reg | Kind::xmm_rm | Kind::xmm_vvvv | Kind::xmm_is4 => {
                Some(vector(Register::XMM0, random))
            }
            Kind::ymm_or_mem | Kind::ymm_reg | Kind::ymm_rm | Kind::ymm_vvvv | Kind::ymm_is4 => {
                Some(vector(Register::YMM0, random))
            }
            Kind::r32_or_mem | Kind::r32_reg | Kind::r32_rm => Some(general(Register::EAX, random)),
            Kind::r64_or_mem | Kind::r64_reg | Kind::r64_rm => Some(general(Register::RAX, random)),
            Kind::st0 => Some(Register::ST0),
            Kind::sti_opcode => Some(Register::ST0 + random.below(8) as u32),
            Kind::imm8 => {
                i.set_op_kind(n, OpKind::Immediate8);
                i.set_immediate8(random.next() as u8);
                continue;
            }
            _ => return None,
        };
        match register {
            Some(register) => {
                i.set_op_kind(n, OpKind::Register);
                i.set_op_register(n, register);
            }
            None => {
                i.set_op_kind(n, OpKind::Memory);
                i.set_memory_base(Register::RSI);
                i.set_memory_index_scale(1 << random.below(4));
                i.set_memory_displ_size(0);
            }
        }
    }
    let masked = matches!(
        i.mnemonic(),
        Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq
    );
    if i.is_vsib() && !is_valid_gather(&i) {
        return None;
    }
    (class::computes(&i) || (masked || i.is_vsib()) && class::on_host(&i)).then_some(i)
}

/// Whether the three registers of a VEX gather differ.
fn is_valid_gather(i: &Instruction) -> bool {
    let numbers = [i.op0_register(), i.memory_index(), i.op2_register()].map(Register::number);
    Class::of(i) == Some(Class::Avx)
        && numbers[0] != numbers[1]
        && numbers[1] != numbers[2]
        && numbers[0] != numbers[2]
}

/// Code that runs `bytes` on the state that RDI points to, with RSI at its scratch buffer.
fn native_code(bytes: &[u8], x87: bool) -> Vec<u8> {
    let fpu = std::mem::offset_of!(CpuState, fpu) as i32;
    let ymm = fpu + std::mem::offset_of!(Fpu, ymm) as i32;
    let legacy = fpu + std::mem::offset_of!(Fpu, legacy) as i32;
    let scratch = fpu + std::mem::offset_of!(Fpu, scratch) as i32;
    let flags = fpu + std::mem::offset_of!(Fpu, native_flags) as i32;
    let general = [rax, rcx, rdx, rbx, rbp, r8, r9, r10, r11, r12, r13, r14, r15].into_iter().zip(GENERAL);
    let vectors = (0..16u32).map(|n| (get_ymm(Register::YMM0 + n).unwrap(), ymm + n as i32 * 32));
    let saved = [rbx, rbp, r12, r13, r14, r15];
    let mut a = CodeAssembler::new(64).unwrap();
    let mut build = || -> Result<(), iced_x86::IcedError> {
        saved.iter().try_for_each(|&r| a.push(r))?;
        if x87 {
            a.fxrstor64(ptr(rdi + legacy))?;
        }
        vectors.clone().try_for_each(|(r, at)| a.vmovdqu(r, ymmword_ptr(rdi + at)))?;
        a.mov(eax, dword_ptr(rdi + flags))?;
        a.push(rax)?;
        a.popfq()?;
        general.clone().try_for_each(|(r, n)| a.mov(r, qword_ptr(rdi + n.number() as i32 * 8)))?;
        a.lea(rsi, ptr(rdi + scratch))?;
        a.db(bytes)?;
        general.clone().try_for_each(|(r, n)| a.mov(qword_ptr(rdi + n.number() as i32 * 8), r))?;
        a.pushfq()?;
        a.pop(rax)?;
        a.mov(dword_ptr(rdi + flags), eax)?;
        vectors.clone().try_for_each(|(r, at)| a.vmovdqu(ymmword_ptr(rdi + at), r))?;
        if x87 {
            a.fxsave64(ptr(rdi + legacy))?;
            a.fninit()?;
        }
        a.vzeroupper()?;
        saved.iter().rev().try_for_each(|&r| a.pop(r))?;
        a.ret()
    };
    build().unwrap();
    a.assemble(0).unwrap()
}

fn get_ymm(register: Register) -> Option<AsmRegisterYmm> {
    iced_x86::code_asm::get_ymm(register)
}

/// Random x87 registers, some empty, all exceptions masked.
fn fill_x87(v: &mut Vcpu, random: &mut Random) {
    let fpu = &mut v.state.fpu;
    fpu.set_fcw(0x37f ^ (random.below(4) as u16) << 10);
    fpu.set_fsw((random.below(8) as u16) << 11 | (random.below(16) as u16 & 7) << 8);
    fpu.set_tags(random.next() as u8 | random.next() as u8);
    for n in 0..8 {
        let exponent = match random.below(8) {
            0 => 0,
            1 => 0x7fff,
            _ => 0x3fff - 20 + random.below(40),
        };
        let sign = random.below(2) << 15;
        let mantissa = match random.below(8) {
            0 => 0,
            1 => random.next() >> 1,
            _ => random.next() | 1 << 63,
        };
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
        bytes[8..].copy_from_slice(&((exponent | sign) as u16).to_le_bytes());
        fpu.set_st(n, bytes);
    }
}

/// A vCPU and the host, to run the same instruction from the same random state.
struct Pair {
    random: Random,
    v: Vcpu,
    arena: Arena,
}

impl Pair {
    fn new(seed: u64) -> Self {
        Self { random: Random(seed), v: vcpu(), arena: Arena::new(1 << 16).unwrap() }
    }

    /// Runs `bytes` on both and compares all that they can change. `index` is a register that holds the
    /// indices of a gather, `element` their size.
    fn compare(&mut self, bytes: &[u8], x87: bool, name: &str, index: Option<(usize, usize)>) {
        let (random, v) = (&mut self.random, &mut self.v);
        random.fill_vectors(v);
        if let Some((register, size)) = index {
            for chunk in v.state.fpu.ymm[register].chunks_mut(size) {
                chunk.fill(0);
                chunk[0] = random.below(8) as u8;
            }
        }
        for register in GENERAL {
            v.set_reg(register.number() as u8, random.next() >> random.below(64));
        }
        v.set_reg(reg::RSI, DATA);
        let flags = random.next() & crate::flags::ARITHMETIC;
        v.state.flags.set_arithmetic(flags);
        fill_x87(v, random);
        // Mostly the default, else any rounding, FTZ, DAZ and flags; all masked.
        let odd = random.below(4) == 0;
        let mxcsr = 0x1f80 | if odd { random.next() as u32 & 0xe07f } else { 0 };
        v.state.fpu.mxcsr = mxcsr;
        v.state.fpu.legacy[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        let memory: [u8; 64] = {
            let source = v.state.fpu.ymm[random.below(16) as usize];
            std::array::from_fn(|n| source[n & 31].wrapping_add((n >> 5) as u8))
        };
        v.write_bytes(DATA, &memory).unwrap();

        let mut expected = v.state.clone();
        expected.fpu.scratch.0 = memory;
        expected.fpu.native_flags = flags as u32;
        self.arena.reset();
        let id = self.arena.add(&Verified::trusted(native_code(bytes, x87))).unwrap();
        let after = self.arena.call_with_mxcsr(id, &mut expected, mxcsr).unwrap();

        let name = format!("{name} {bytes:02x?} mxcsr {mxcsr:#x}");
        if let Err(stop) = run_bytes(v, bytes) {
            panic!("{name}: {stop:?}, {:?}", v.stats.unimplemented);
        }
        for n in 0..16 {
            assert_eq!(v.state.fpu.ymm[n], expected.fpu.ymm[n], "{name}: vector register {n}");
        }
        for register in GENERAL {
            let n = register.number();
            assert_eq!(v.state.regs[n], expected.regs[n], "{name}: {register:?}");
        }
        let seen_flags = u64::from(expected.fpu.native_flags) & crate::flags::ARITHMETIC;
        assert_eq!(v.state.flags.arithmetic(), seen_flags, "{name}: flags");
        assert_eq!(v.state.fpu.mxcsr, after, "{name}: MXCSR");
        let mut seen = [0; 64];
        v.read_bytes(DATA, &mut seen).unwrap();
        assert_eq!(seen, expected.fpu.scratch.0, "{name}: memory");
        if x87 {
            let (a, b) = (&v.state.fpu, &expected.fpu);
            let words = |f: &Fpu| format!("{:04x} {:04x} {:02x}", f.fcw(), f.fsw(), f.tags());
            assert_eq!(words(a), words(b), "{name}: x87 words");
            for n in 0..8 {
                assert_eq!(a.st(n), b.st(n), "{name}: ST{n}");
            }
        }
    }
}

fn host_is_able() -> bool {
    let able = std::arch::is_x86_feature_detected!("avx2");
    if !able {
        eprintln!("skipped: the comparison is written with AVX2");
    }
    able
}

#[test]
fn every_instruction_does_what_the_host_does() {
    if !host_is_able() {
        return;
    }
    const ROUNDS: usize = 6;
    let mut pair = Pair::new(0x5eed_0001);
    let mut compared = 0;
    let mut codes = 0;
    for code in Code::values() {
        let mut seen = false;
        for _ in 0..ROUNDS {
            let Some(i) = generate(code, &mut pair.random) else { continue };
            let mut encoder = Encoder::new(64);
            if encoder.encode(&i, 0x1000).is_err() {
                continue;
            }
            let bytes = encoder.take_buffer();
            let x87 = matches!(Class::of(&i), Some(Class::X87 | Class::Mmx));
            let index = i.is_vsib().then(|| (i.memory_index().number(), if i.is_vsib32() { 4 } else { 8 }));
            pair.compare(&bytes, x87, &format!("{i} {code:?}"), index);
            compared += 1;
            seen = true;
        }
        codes += usize::from(seen);
    }
    println!("{compared} instructions of {codes} codes compared");
    assert!(codes > 1100, "only {codes} codes were reached");
}

#[test]
fn x87_control_does_what_the_host_does() {
    if !host_is_able() {
        return;
    }
    let mut pair = Pair::new(0x5eed_0002);
    // The pointers and selectors of a stored environment are cleared: processors differ in those.
    let environment: Vec<u8> = [0xd9, 0x36]
        .into_iter()
        .chain([12, 16, 20, 24].into_iter().flat_map(|at| [0xc7, 0x46, at, 0, 0, 0, 0]))
        .collect();
    let cases: [(&str, &[u8]); 10] = [
        ("fnstenv [rsi]", &environment),
        ("fnstcw [rsi]", &[0xd9, 0x3e]),
        ("fnstsw [rsi]", &[0xdd, 0x3e]),
        ("fnstsw ax", &[0xdf, 0xe0]),
        ("fldcw [rsi]", &[0xd9, 0x2e]),
        ("fnclex", &[0xdb, 0xe2]),
        ("fninit", &[0xdb, 0xe3]),
        ("emms", &[0x0f, 0x77]),
        ("fldenv [rsi]", &[0xd9, 0x26]),
        ("fldenv [rsi], 16 bits", &[0x66, 0xd9, 0x26]),
    ];
    for (name, bytes) in cases {
        for _ in 0..200 {
            pair.compare(bytes, true, name, None);
        }
    }
}
