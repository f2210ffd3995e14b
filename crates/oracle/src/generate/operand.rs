//! Operands: registers at random, memory operands that reach the data window.

use iced_x86::{Code, Instruction, OpCodeOperandKind as K, OpKind, Register};

use crate::case::{CODE, CODE_SIZE, DATA, DATA_SIZE, DATA_WRITABLE, GS_BASE, Mode};
use crate::random::Random;

/// How the address of a memory operand is made to come out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    /// The linear address.
    pub(super) target: u64,
    /// The size of the access.
    pub(super) size: u64,
    base: Register,
    index: Register,
    scale: u64,
    displacement: u64,
    segment_base: u64,
}

/// A linear address for an access of `size` bytes: mostly inside the data window.
pub(super) fn linear(random: &mut Random, size: u64, in_line: bool) -> u64 {
    let size = size.max(1);
    if in_line {
        // Locked: inside a cache line, because hosts may trap or throttle locks that split one.
        // In the read-only page only now and then.
        let pages = if random.chance(19, 20) { DATA_WRITABLE } else { DATA_SIZE };
        let line = DATA + random.below(pages / 64) * 64;
        let room = 64 - size.min(64);
        let offset = random.below(room + 1);
        return line + if random.chance(7, 8) { offset & !(size.next_power_of_two() - 1) } else { offset };
    }
    match random.below(100) {
        0..=66 => DATA + random.below(DATA_WRITABLE / 64 - 16) * 64 + 512,
        67..=80 => DATA + 512 + random.below(DATA_WRITABLE - 1024),
        81..=86 => DATA + 0x1000 - random.below(size),
        87..=90 => DATA + DATA_WRITABLE - random.below(size + 1),
        91..=92 => DATA + DATA_WRITABLE + random.below(0x1000 - size),
        93..=94 => DATA + DATA_SIZE - random.below(size + 1),
        95 => DATA - random.below(size + 64),
        96 => DATA + DATA_SIZE + random.below(64),
        97 => 0x8000_0000_0000u64.wrapping_sub(random.below(2 * size)),
        98 => 0xffff_8000_0000_0000u64.wrapping_sub(random.below(2 * size)),
        _ => random.pick(&[0, u64::MAX - 7, u64::MAX]).wrapping_sub(random.below(size)),
    }
}

/// Somewhere to branch to: mostly in the code window, clear of the instruction at `rip`.
pub(super) fn branch_target(random: &mut Random, rip: u64) -> u64 {
    match random.below(24) {
        0 => DATA + random.below(DATA_SIZE),
        1 => CODE + CODE_SIZE + random.below(0x1000),
        2 => random.pick(&[0x7fff_ffff_f123, 0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 0]),
        _ => loop {
            let target = CODE + random.below(CODE_SIZE);
            if target.wrapping_sub(rip.wrapping_sub(16)) > 48 {
                break target;
            }
        },
    }
}

fn register(random: &mut Random, first: Register, count: u64) -> Register {
    let n = random.below(count) as u32;
    Register::try_from(first as usize + n as usize).unwrap_or(first)
}

const ADDRESS64: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

impl Plan {
    fn new(random: &mut Random, target: u64, size: u64) -> Self {
        Self {
            target,
            size,
            base: Register::None,
            index: Register::None,
            scale: 1 << random.below(4),
            displacement: 0,
            segment_base: 0,
        }
    }

    /// Gives the base register, or failing that the index, the value that makes the address `target`.
    pub(super) fn solve(&self, gpr: &mut [u64; 16], random: &mut Random) {
        let narrow = [self.base, self.index].iter().any(|r| r.is_gpr32());
        let slot = |r: Register| ADDRESS64.iter().position(|&a| a == r.full_register());
        let mut wanted = self.target.wrapping_sub(self.segment_base).wrapping_sub(self.displacement);
        let (base, index) = (slot(self.base), slot(self.index));
        let mut set = |n: usize, value: u64, gpr: &mut [u64; 16]| {
            // The upper half does not take part in a 32-bit address.
            let junk = if narrow && random.chance(1, 2) { random.next() & !0xffff_ffff } else { 0 };
            gpr[n] = if narrow { value & 0xffff_ffff | junk } else { value };
        };
        match (base, index) {
            (Some(b), Some(i)) if b == i => {
                // base * (1 + scale): a power of two plus one has no solution in general; near is enough.
                let value = wanted / (1 + self.scale);
                set(b, value, gpr);
            }
            (Some(b), Some(i)) => {
                wanted = wanted.wrapping_sub(gpr[i].wrapping_mul(self.scale));
                set(b, wanted, gpr);
            }
            (Some(b), None) => set(b, wanted, gpr),
            (None, Some(i)) => set(i, wanted / self.scale, gpr),
            (None, None) => {}
        }
    }
}

/// Fills in operand `n` of `instruction`, whose kind is `kind`. Memory operands and branches are for an
/// instruction at `rip`. `None` if the kind is not one that is tested.
pub(super) fn fill(
    instruction: &mut Instruction,
    n: u32,
    kind: K,
    mode: Mode,
    rip: u64,
    random: &mut Random,
) -> Option<Option<Plan>> {
    use Register as R;
    let registers = if mode == Mode::Bits64 { 16 } else { 8 };
    let bytes = |random: &mut Random| {
        // AL to R15L, AH to BH.
        register(random, R::AL, if mode == Mode::Bits64 { 20 } else { 8 })
    };
    let op = match kind {
        K::r8_or_mem
        | K::r16_or_mem
        | K::r32_or_mem
        | K::r64_or_mem
        | K::mm_or_mem
        | K::xmm_or_mem
        | K::ymm_or_mem
            if random.chance(1, 2) =>
        {
            return memory(instruction, n, mode, rip, random).map(Some);
        }
        K::mem | K::mem_offs | K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
            return match kind {
                K::mem => memory(instruction, n, mode, rip, random),
                K::mem_offs => Some(absolute(instruction, n, mode, random)),
                K::mem_vsib32x | K::mem_vsib64x => Some(vsib(instruction, n, mode, R::XMM0, random)),
                _ => Some(vsib(instruction, n, mode, R::YMM0, random)),
            }
            .map(Some);
        }
        K::r8_or_mem | K::r8_reg | K::r8_opcode => bytes(random),
        K::r16_or_mem | K::r16_reg | K::r16_reg_mem | K::r16_rm | K::r16_opcode => {
            register(random, R::AX, registers)
        }
        K::r32_or_mem | K::r32_reg | K::r32_reg_mem | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
            register(random, R::EAX, registers)
        }
        K::r64_or_mem | K::r64_reg | K::r64_reg_mem | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
            register(random, R::RAX, registers)
        }
        K::mm_or_mem | K::mm_reg | K::mm_rm => register(random, R::MM0, 8),
        K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
            register(random, R::XMM0, registers)
        }
        K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
            register(random, R::YMM0, registers)
        }
        K::seg_reg => register(random, R::ES, 6),
        K::es => R::ES,
        K::cs => R::CS,
        K::ss => R::SS,
        K::ds => R::DS,
        K::fs => R::FS,
        K::gs => R::GS,
        K::al => R::AL,
        K::cl => R::CL,
        K::ax => R::AX,
        K::dx => R::DX,
        K::eax => R::EAX,
        K::rax => R::RAX,
        K::st0 => R::ST0,
        K::sti_opcode => register(random, R::ST0, 8),
        _ => return other(instruction, n, kind, mode, rip, random),
    };
    instruction.set_op_kind(n, OpKind::Register);
    instruction.set_op_register(n, op);
    Some(None)
}

/// Immediates, branches and implicit memory operands.
fn other(
    instruction: &mut Instruction,
    n: u32,
    kind: K,
    mode: Mode,
    rip: u64,
    random: &mut Random,
) -> Option<Option<Plan>> {
    let value = super::values::integer(random);
    let second = (0..n).any(|m| matches!(instruction.op_kind(m), OpKind::Immediate8 | OpKind::Immediate16));
    match kind {
        K::imm8 if second => {
            instruction.set_op_kind(n, OpKind::Immediate8_2nd);
            instruction.set_immediate8_2nd(if random.chance(3, 4) { value as u8 & 31 } else { value as u8 });
        }
        K::imm8 => {
            instruction.set_op_kind(n, OpKind::Immediate8);
            instruction.set_immediate8(value as u8);
        }
        K::imm8_const_1 => {
            instruction.set_op_kind(n, OpKind::Immediate8);
            instruction.set_immediate8(1);
        }
        K::imm4_m2z => return None,
        K::imm8sex16 => {
            instruction.set_op_kind(n, OpKind::Immediate8to16);
            instruction.set_immediate8to16(i16::from(value as i8));
        }
        K::imm8sex32 => {
            instruction.set_op_kind(n, OpKind::Immediate8to32);
            instruction.set_immediate8to32(i32::from(value as i8));
        }
        K::imm8sex64 => {
            instruction.set_op_kind(n, OpKind::Immediate8to64);
            instruction.set_immediate8to64(i64::from(value as i8));
        }
        K::imm16 => {
            // ENTER and RET n should stay in the window.
            let small = matches!(
                instruction.code(),
                Code::Enterw_imm16_imm8 | Code::Enterd_imm16_imm8 | Code::Enterq_imm16_imm8
            ) || instruction.mnemonic() == iced_x86::Mnemonic::Ret;
            instruction.set_op_kind(n, OpKind::Immediate16);
            instruction.set_immediate16(if small && random.chance(7, 8) {
                value as u16 & 0xff
            } else {
                value as u16
            });
        }
        K::imm32 => {
            instruction.set_op_kind(n, OpKind::Immediate32);
            instruction.set_immediate32(value as u32);
        }
        K::imm32sex64 => {
            instruction.set_op_kind(n, OpKind::Immediate32to64);
            instruction.set_immediate32to64(i64::from(value as i32));
        }
        K::imm64 => {
            instruction.set_op_kind(n, OpKind::Immediate64);
            instruction.set_immediate64(value);
        }
        K::br64_1 | K::br32_1 => {
            let near = loop {
                let near = rip.wrapping_add(random.next() as i8 as i64 as u64);
                if near.wrapping_sub(rip.wrapping_sub(1)) > 17 {
                    break near;
                }
            };
            branch(instruction, n, mode, near);
        }
        K::br64_4 | K::br32_4 => {
            let target = branch_target(random, rip);
            let fits = i32::try_from(target.wrapping_sub(rip) as i64).is_ok();
            branch(instruction, n, mode, if fits { target } else { rip.wrapping_add(0x123) });
        }
        K::seg_rSI => {
            let op = match instruction.op_kind(0) {
                OpKind::MemoryESRDI if n > 0 => OpKind::MemorySegRSI,
                OpKind::MemoryESEDI if n > 0 => OpKind::MemorySegESI,
                OpKind::MemoryESDI if n > 0 => OpKind::MemorySegSI,
                _ => {
                    string_size(mode, random)(OpKind::MemorySegSI, OpKind::MemorySegESI, OpKind::MemorySegRSI)
                }
            };
            instruction.set_op_kind(n, op);
        }
        K::es_rDI => {
            // The second operand of a pair takes the address size of the first.
            let op = match instruction.op_kind(0) {
                OpKind::MemorySegRSI if n > 0 => OpKind::MemoryESRDI,
                OpKind::MemorySegESI if n > 0 => OpKind::MemoryESEDI,
                OpKind::MemorySegSI if n > 0 => OpKind::MemoryESDI,
                _ => string_size(mode, random)(OpKind::MemoryESDI, OpKind::MemoryESEDI, OpKind::MemoryESRDI),
            };
            instruction.set_op_kind(n, op);
        }
        K::seg_rDI => {
            let wide = string_size(mode, random);
            instruction.set_op_kind(n, wide(OpKind::MemorySegDI, OpKind::MemorySegEDI, OpKind::MemorySegRDI));
        }
        K::seg_rBX_al => {
            instruction.set_op_kind(n, OpKind::Memory);
            let narrow = mode == Mode::Bits32 || random.chance(1, 8);
            instruction.set_memory_base(if narrow { Register::EBX } else { Register::RBX });
            instruction.set_memory_index(Register::AL);
        }
        _ => return None,
    }
    Some(None)
}

type Pick = fn(OpKind, OpKind, OpKind) -> OpKind;

/// Which of the 16-, 32- and 64-bit forms of a string operand.
fn string_size(mode: Mode, random: &mut Random) -> Pick {
    let odd = random.chance(1, 8);
    match (mode, odd) {
        (Mode::Bits64, false) => |_, _, wide| wide,
        (Mode::Bits32, true) => |narrow, _, _| narrow,
        _ => |_, middle, _| middle,
    }
}

fn branch(instruction: &mut Instruction, n: u32, mode: Mode, target: u64) {
    if mode == Mode::Bits64 {
        instruction.set_op_kind(n, OpKind::NearBranch64);
        instruction.set_near_branch64(target);
    } else {
        instruction.set_op_kind(n, OpKind::NearBranch32);
        instruction.set_near_branch32(target as u32);
    }
}

fn access_size(instruction: &Instruction) -> u64 {
    let size = instruction.code().op_code().memory_size().size() as u64;
    if (1..=64).contains(&size) { size } else { 8 }
}

/// A memory operand with base, index and displacement.
fn memory(instruction: &mut Instruction, n: u32, mode: Mode, rip: u64, random: &mut Random) -> Option<Plan> {
    instruction.set_op_kind(n, OpKind::Memory);
    let op = instruction.code().op_code();
    let size = access_size(instruction);
    let locked =
        op.can_use_lock_prefix() && random.chance(1, 4) || instruction.mnemonic() == iced_x86::Mnemonic::Xchg;
    if locked && op.can_use_lock_prefix() {
        instruction.set_has_lock_prefix(true);
    }
    let target = linear(random, size, locked);
    let mut plan = Plan::new(random, target, size);
    let narrow = mode == Mode::Bits32 || random.chance(1, 12);
    let (first, count) = match (mode, narrow) {
        (Mode::Bits32, _) => (Register::EAX, 8),
        (_, true) => (Register::EAX, 16),
        _ => (Register::RAX, 16),
    };
    let form = random.below(10);
    if form == 0 && mode == Mode::Bits64 {
        // RIP-relative.
        if i32::try_from(plan.target.wrapping_sub(rip + 15) as i64).is_err() {
            plan.target = linear(random, size, true);
        }
        instruction.set_memory_base(if narrow { Register::EIP } else { Register::RIP });
        instruction.set_memory_displacement64(plan.target);
        instruction.set_memory_displ_size(if narrow { 4 } else { 8 });
        return Some(plan);
    }
    if form == 1 {
        // A displacement alone.
        if plan.target >= 0x8000_0000 {
            plan.target = linear(random, size, true);
        }
        instruction.set_memory_displacement64(plan.target);
        instruction.set_memory_displ_size(if narrow { 4 } else { 8 });
        return Some(plan);
    }
    if random.chance(1, 16) {
        instruction.set_segment_prefix(Register::GS);
        plan.segment_base = GS_BASE;
    }
    if form > 2 {
        plan.base = register(random, first, count);
    }
    if form == 2 || random.chance(1, 3) {
        plan.index = loop {
            let r = register(random, first, count);
            if !matches!(r, Register::ESP | Register::RSP) {
                break r;
            }
        };
    }
    let displ_size = random.below(3);
    plan.displacement = match displ_size {
        0 if plan.base != Register::None => 0,
        1 if plan.base != Register::None => random.next() as i8 as i64 as u64,
        _ => (random.next() as i32 >> random.below(32)) as i64 as u64,
    };
    instruction.set_memory_base(plan.base);
    instruction.set_memory_index(plan.index);
    if plan.index == Register::None {
        plan.scale = 1;
    }
    instruction.set_memory_index_scale(plan.scale as u32);
    instruction.set_memory_displacement64(if narrow {
        plan.displacement & 0xffff_ffff
    } else {
        plan.displacement
    });
    instruction.set_memory_displ_size(match displ_size {
        0 if plan.base != Register::None => 0,
        1 if plan.base != Register::None => 1,
        _ if narrow => 4,
        _ => 8,
    });
    Some(plan)
}

/// MOV between the accumulator and an absolute address.
fn absolute(instruction: &mut Instruction, n: u32, mode: Mode, random: &mut Random) -> Plan {
    instruction.set_op_kind(n, OpKind::Memory);
    let size = access_size(instruction);
    let target = linear(random, size, false);
    let mut plan = Plan::new(random, target, size);
    let narrow = mode == Mode::Bits32 || random.chance(1, 6);
    if narrow {
        plan.target &= 0xffff_ffff;
    }
    instruction.set_memory_displacement64(plan.target);
    instruction.set_memory_displ_size(if narrow { 4 } else { 8 });
    plan
}

/// A gather's operand: the base in the middle of the window, the index a vector.
fn vsib(instruction: &mut Instruction, n: u32, mode: Mode, indexes: Register, random: &mut Random) -> Plan {
    instruction.set_op_kind(n, OpKind::Memory);
    let size = access_size(instruction);
    let target = linear(random, size, false);
    let mut plan = Plan::new(random, target, size);
    let (first, count) = if mode == Mode::Bits64 { (Register::RAX, 16) } else { (Register::EAX, 8) };
    plan.base = register(random, first, count);
    instruction.set_memory_base(plan.base);
    instruction.set_memory_index(register(random, indexes, count));
    instruction.set_memory_index_scale(plan.scale as u32);
    plan.displacement = random.next() as i8 as i64 as u64;
    let mask = if mode == Mode::Bits64 { u64::MAX } else { 0xffff_ffff };
    instruction.set_memory_displacement64(plan.displacement & mask);
    instruction.set_memory_displ_size(1);
    plan
}
