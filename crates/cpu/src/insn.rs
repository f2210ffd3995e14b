//! A decoded instruction in the form that the interpreter executes.

use iced_x86::{Code, Instruction, OpKind, Register};

use crate::exec;
use crate::fault::Exec;
use crate::state::{CodeMode, REG_RIP, REG_ZERO, reg, seg};
use crate::vcpu::Vcpu;

/// The longest instruction, in bytes.
pub(crate) const INSTRUCTION_LENGTH: usize = 15;

/// What executes an instruction.
///
/// RIP has been advanced past the instruction when it is called. On `Err(Stop::Fault)` without `trap`, and
/// on `Err(Stop::Restart)`, the caller moves RIP back; the handler must not have changed anything else.
pub type Handler = fn(&mut Vcpu, &Insn) -> Exec;

/// Bits of [`Insn::flags`].
pub mod insn_flags {
    /// The address needs the slow path: legacy segmentation, or an address size that is not 64 bits.
    pub const SEGMENTED: u8 = 1 << 0;
    /// LOCK prefix (or XCHG with memory).
    pub const LOCK: u8 = 1 << 1;
    /// REP or REPE prefix.
    pub const REP: u8 = 1 << 2;
    /// REPNE prefix.
    pub const REPNE: u8 = 1 << 3;
    /// The memory operand's default segment is the stack: a non-canonical address is #SS.
    pub const STACK: u8 = 1 << 4;
}

/// A decoded instruction. Operand fields are those of the first memory operand and of the first register
/// operands in order; what `dst`, `src` and `src2` mean is up to the handler's family.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub struct Insn {
    /// What executes it.
    pub run: Handler,
    /// Immediate, sign-extended to 64 bits; or the displacement of a near branch from the next
    /// instruction; or a far pointer (offset, selector << 32); or what the handler's family puts here.
    pub imm: u64,
    /// Displacement of the memory operand, sign-extended; relative to the next RIP if `base` is RIP.
    pub disp: u64,
    /// Base register, [`REG_ZERO`] if none, [`REG_RIP`] if RIP-relative.
    pub base: u8,
    /// Index register, [`REG_ZERO`] if none.
    pub index: u8,
    /// Log2 of the scale.
    pub shift: u8,
    /// Segment of the memory operand: in 64-bit mode FS, GS or [`seg::FLAT`].
    pub seg: u8,
    /// Register number of operand 0 if it is a register, see [`register_number`].
    pub dst: u8,
    /// Register number of operand 1 if it is a register.
    pub src: u8,
    /// Register number of operand 2 if it is a register.
    pub src2: u8,
    /// Length in bytes.
    pub len: u8,
    /// See [`insn_flags`].
    pub flags: u8,
    /// Address size in bytes: 2, 4 or 8.
    pub address_size: u8,
    /// A second small immediate (ENTER's level), or what the handler's family puts here.
    pub imm2: u8,
    /// Padding to keep the layout obvious.
    _pad: u8,
    /// The instruction's identity, an [`iced_x86::Code`], for names and rare decisions.
    pub code: Code,
}

impl Insn {
    /// Whether `flag` of [`insn_flags`] is set.
    #[inline(always)]
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The instruction with its memory operand `by` bytes further up.
    #[inline(always)]
    pub fn displaced(&self, by: u64) -> Self {
        Self { disp: self.disp.wrapping_add(by), ..*self }
    }

    /// Brings a decoded instruction into this form and chooses its handler.
    pub fn lower(vcpu: &mut Vcpu, i: &Instruction, mode: CodeMode) -> Self {
        let mut insn = Self::operands(i, mode);
        insn.run = exec::select(vcpu, i, mode, &mut insn);
        insn
    }

    /// The operand fields of `i`; the handler is that of an undefined instruction.
    pub fn operands(i: &Instruction, mode: CodeMode) -> Self {
        let mut insn = Self {
            run: exec::undefined,
            imm: 0,
            disp: 0,
            base: REG_ZERO,
            index: REG_ZERO,
            shift: 0,
            seg: seg::FLAT,
            dst: 0,
            src: 0,
            src2: 0,
            len: i.len() as u8,
            flags: 0,
            address_size: mode.bitness() as u8 / 8,
            imm2: 0,
            _pad: 0,
            code: i.code(),
        };
        if i.has_lock_prefix() {
            insn.flags |= insn_flags::LOCK;
        }
        if i.has_rep_prefix() {
            insn.flags |= insn_flags::REP;
        }
        if i.has_repne_prefix() {
            insn.flags |= insn_flags::REPNE;
        }
        for n in 0..i.op_count() {
            match i.op_kind(n) {
                OpKind::Register => {
                    let number = register_number(i.op_register(n));
                    match n {
                        0 => insn.dst = number,
                        1 => insn.src = number,
                        2 => insn.src2 = number,
                        _ => insn.imm2 = number,
                    }
                }
                OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                    insn.imm = i.near_branch_target().wrapping_sub(i.next_ip());
                }
                OpKind::FarBranch16 => {
                    insn.imm = u64::from(i.far_branch16()) | u64::from(i.far_branch_selector()) << 32;
                }
                OpKind::FarBranch32 => {
                    insn.imm = u64::from(i.far_branch32()) | u64::from(i.far_branch_selector()) << 32;
                }
                OpKind::Immediate8_2nd => insn.imm2 = i.immediate8_2nd(),
                OpKind::Memory => insn.memory(i, mode),
                OpKind::MemorySegSI
                | OpKind::MemorySegESI
                | OpKind::MemorySegRSI
                | OpKind::MemorySegDI
                | OpKind::MemorySegEDI
                | OpKind::MemorySegRDI
                | OpKind::MemoryESDI
                | OpKind::MemoryESEDI
                | OpKind::MemoryESRDI => insn.string(i, n, mode),
                _ => insn.imm = i.immediate(n),
            }
        }
        insn
    }

    fn memory(&mut self, i: &Instruction, mode: CodeMode) {
        let (base, index) = (i.memory_base(), i.memory_index());
        self.base = register_number_or_zero(base);
        self.index = if index.is_vector_register() { REG_ZERO } else { register_number_or_zero(index) };
        self.shift = i.memory_index_scale().trailing_zeros() as u8;
        self.disp = i.memory_displacement64();
        if base.is_ip() {
            self.base = REG_RIP;
            self.disp = self.disp.wrapping_sub(i.next_ip());
        }
        self.address_size = match (base, index) {
            (Register::None, Register::None) => i.memory_displ_size() as u8,
            (Register::None, r) if r.is_vector_register() => mode.bitness() as u8 / 8,
            (Register::None, r) | (r, _) => r.size() as u8,
        };
        if !matches!(self.address_size, 2 | 4 | 8) {
            // A displacement alone: its encoded size says little; 64-bit mode sign-extends it.
            self.address_size = mode.bitness() as u8 / 8;
        }
        self.segment(i.memory_segment(), mode);
        if mode != CodeMode::Bits64 || self.address_size != 8 {
            self.flags |= insn_flags::SEGMENTED;
        }
    }

    fn string(&mut self, i: &Instruction, operand: u32, mode: CodeMode) {
        self.address_size = match i.op_kind(operand) {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 2,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 4,
            _ => 8,
        };
        if !matches!(i.op_kind(operand), OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI) {
            self.segment(i.memory_segment(), mode);
        }
        if mode != CodeMode::Bits64 || self.address_size != 8 {
            self.flags |= insn_flags::SEGMENTED;
        }
    }

    fn segment(&mut self, segment: Register, mode: CodeMode) {
        let number = register_number(segment);
        if mode == CodeMode::Bits64 && number < seg::FS {
            // Overrides by CS, DS, ES and SS are ignored: the base alone makes it a stack access.
            let stack = [reg::RSP, reg::RBP].contains(&self.base);
            self.flags |= if stack { insn_flags::STACK } else { 0 };
            self.seg = seg::FLAT;
        } else {
            self.flags |= if segment == Register::SS { insn_flags::STACK } else { 0 };
            self.seg = number;
        }
    }
}

/// The number by which handlers know a register: its encoding; for AH, CH, DH and BH 16 to 19.
pub fn register_number(register: Register) -> u8 {
    match register {
        Register::AH | Register::CH | Register::DH | Register::BH => {
            (register as u8 - Register::AH as u8) + 16
        }
        // Iced numbers the byte registers through: AH to BH stand between BL and SPL.
        r if r.is_gpr8() && r as u8 >= Register::SPL as u8 => r.number() as u8 - 4,
        r => r.number() as u8,
    }
}

fn register_number_or_zero(register: Register) -> u8 {
    if register == Register::None { REG_ZERO } else { register_number(register) }
}
