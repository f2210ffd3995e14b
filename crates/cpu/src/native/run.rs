//! Handlers that run stubs: memory operands, flags, exceptions.

use iced_x86::{Instruction, OpAccess, OpKind};

use super::arena::{self, StubId};
use super::class::{self, Class};
use super::stub;
use crate::exec::undefined;
use crate::fault::{Exec, Fault, fault, vector};
use crate::flags;
use crate::fpu::{MXCSR_DEFAULT, MXCSR_FLAGS, MXCSR_MASK, avx_enabled, ok};
use crate::insn::{Handler, Insn};
use crate::state::{cr0, cr4};
use crate::vcpu::Vcpu;

/// What handlers of this family keep in `Insn::imm`: the stub's number in the low half, and above it:
mod bit {
    /// The arithmetic flags change.
    pub(super) const FLAGS: u64 = 1 << 32;
    /// The memory operand is read.
    pub(super) const LOAD: u64 = 1 << 33;
    /// The memory operand is written.
    pub(super) const STORE: u64 = 1 << 34;
    /// The memory operand must be aligned.
    pub(super) const ALIGNED: u64 = 1 << 35;
    /// The arithmetic flags are read.
    pub(super) const READS_FLAGS: u64 = 1 << 36;
    /// An x87 instruction (else MMX): its address is remembered.
    pub(super) const X87: u64 = 1 << 37;
    /// XMM registers or MXCSR take part in an MMX instruction.
    pub(super) const SSE: u64 = 1 << 38;
}

/// How an instruction is run: what goes into `Insn`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lowered {
    handler: Handler,
    word: u64,
    size: u8,
}

/// Chooses the handler of an instruction that runs natively.
pub(super) fn select(vcpu: &mut Vcpu, i: &Instruction, insn: &mut Insn) -> Option<Handler> {
    if !class::computes(i) {
        return None;
    }
    let class = Class::of(i)?;
    let rewritten = stub::rewrite(i, class)?;
    let key = rewritten.key()?;
    let lowered = match vcpu.native.stubs.get(&key) {
        Some(lowered) => *lowered,
        None => {
            let id = vcpu.native.generate(&rewritten)?;
            let lowered = lower(i, class, id)?;
            vcpu.native.stubs.insert(key, lowered);
            lowered
        }
    };
    (insn.imm, insn.imm2) = (lowered.word, lowered.size);
    Some(lowered.handler)
}

/// How `i` is run with stub `id`.
fn lower(i: &Instruction, class: Class, id: StubId) -> Option<Lowered> {
    let mut word = u64::from(id.0);
    let mut mark = |on: bool, bit: u64| word |= if on { bit } else { 0 };
    let memory = (0..i.op_count()).find(|&n| i.op_kind(n) == OpKind::Memory);
    let (mut load, mut store) = (false, false);
    if let Some(n) = memory {
        let mut factory = iced_x86::InstructionInfoFactory::new();
        let access = factory.info(i).op_access(n);
        load = !matches!(access, OpAccess::Write | OpAccess::CondWrite);
        store = !matches!(access, OpAccess::Read | OpAccess::CondRead);
    }
    let size = if memory.is_some() { i.memory_size().size() } else { 0 };
    let aligned = memory.is_some() && class::must_align(i);
    let flags = class::writes_flags(i);
    mark(load, bit::LOAD);
    mark(store, bit::STORE);
    mark(aligned, bit::ALIGNED);
    mark(flags, bit::FLAGS);
    mark(class::reads_flags(i), bit::READS_FLAGS);
    mark(class == Class::X87, bit::X87);
    mark(class.needs(i) & ok::SSE != 0, bit::SSE);
    let float = class::uses_mxcsr(i);
    // Nothing but memory changes.
    let plain = !float && !flags;
    macro_rules! sized {
        ($vex:literal, $float:literal) => {
            match (load, store, size, aligned) {
                (false, false, ..) => registers::<$vex, $float>,
                (true, false, 1, false) => loads::<$vex, $float, 1, false>,
                (true, false, 2, false) => loads::<$vex, $float, 2, false>,
                (true, false, 4, false) => loads::<$vex, $float, 4, false>,
                (true, false, 8, false) => loads::<$vex, $float, 8, false>,
                (true, false, 16, false) => loads::<$vex, $float, 16, false>,
                (true, false, 16, true) => loads::<$vex, $float, 16, true>,
                (true, false, 32, false) => loads::<$vex, $float, 32, false>,
                (false, true, 4, false) if plain => stores::<$vex, 4>,
                (false, true, 8, false) if plain => stores::<$vex, 8>,
                (false, true, 16, false) if plain => stores::<$vex, 16>,
                _ => general::<$vex, $float>,
            }
        };
    }
    let handler: Handler = match (class, float) {
        (Class::X87 | Class::Mmx, _) => x87,
        (Class::Sse, false) => sized!(false, false),
        (Class::Sse, true) => sized!(false, true),
        (Class::Avx, false) => sized!(true, false),
        (Class::Avx, true) => sized!(true, true),
    };
    Some(Lowered { handler, word, size: u8::try_from(size).ok()? })
}

/// Checks that a vector instruction may execute.
#[inline(always)]
pub(super) fn check<const VEX: bool>(vcpu: &Vcpu) -> Exec {
    if vcpu.state.fpu_ok & (if VEX { ok::AVX } else { ok::SSE }) == 0 {
        return refused(vcpu, if VEX { ok::AVX } else { ok::SSE });
    }
    Ok(())
}

/// Why an instruction that needs `class` may not execute (Intel SDM vol. 2, 2.4 and 2.7): #UD goes
/// before #NM.
#[cold]
#[inline(never)]
pub(super) fn refused(vcpu: &Vcpu, class: u8) -> Exec {
    let state = &vcpu.state;
    let undefined = class & ok::AVX != 0 && !avx_enabled(state)
        || class & ok::SSE != 0 && state.cr4 & cr4::OSFXSR == 0
        || class & (ok::SSE | ok::MMX) != 0 && state.cr0 & cr0::EM != 0;
    fault(if undefined { Fault::ud() } else { Fault::new(vector::NM) })
}

/// Runs the stub of `i` and takes over the flags.
#[inline(always)]
fn call<const FLOAT: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    if FLOAT && !vcpu.native.live {
        return call_wrapped(vcpu, i);
    }
    if !vcpu.native.arena.call(StubId(i.imm as u32), &mut vcpu.state) {
        return undefined(vcpu, i);
    }
    if i.imm & bit::FLAGS != 0 {
        take_flags(vcpu);
    }
    Ok(())
}

/// The arithmetic flags as a stub left them: LAHF in AH, OF in AL.
fn take_flags(vcpu: &mut Vcpu) {
    let word = u64::from(vcpu.state.fpu.native_flags);
    let (of, low) = (word & 1, word >> 8 & (flags::ARITHMETIC & 0xff));
    vcpu.state.flags.set_arithmetic(low | if of != 0 { flags::OF } else { 0 });
}

/// A floating-point instruction while the guest's MXCSR is not live: makes it so, or switches.
#[cold]
#[inline(never)]
fn call_wrapped(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let mxcsr = vcpu.state.fpu.mxcsr & MXCSR_MASK;
    if mxcsr & !MXCSR_FLAGS == MXCSR_DEFAULT {
        arena::load_host_flags(mxcsr);
        vcpu.native.live = true;
        return call::<false>(vcpu, i);
    }
    let masked = mxcsr & MXCSR_DEFAULT == MXCSR_DEFAULT;
    let saved = (!masked).then(|| Box::new((vcpu.state.fpu.ymm, vcpu.state.regs)));
    let id = StubId(i.imm as u32);
    let Some(after) = vcpu.native.arena.call_with_mxcsr(id, &mut vcpu.state, mxcsr & !MXCSR_FLAGS) else {
        return undefined(vcpu, i);
    };
    if let Err(stop) = raise(vcpu, after) {
        if let Some(saved) = saved {
            (vcpu.state.fpu.ymm, vcpu.state.regs) = *saved;
        }
        return Err(stop);
    }
    if i.imm & bit::FLAGS != 0 {
        take_flags(vcpu);
    }
    Ok(())
}

/// Accounts for the exceptions in `after`, the MXCSR with which a stub ended that began with clear flags:
/// sets them in the guest's MXCSR.
///
/// An unmasked exception that is found before the computation (invalid, denormal, divide) hides those found
/// after it. (One difference to hardware remains: an unmasked underflow with an exact result is not seen.)
///
/// # Errors
/// #XM, or #UD if the system does not take #XM, if one is not masked.
fn raise(vcpu: &mut Vcpu, after: u32) -> Exec {
    const BEFORE: u32 = 7;
    let raised = after & MXCSR_FLAGS;
    let mxcsr = &mut vcpu.state.fpu.mxcsr;
    let unmasked = raised & !(*mxcsr >> 7);
    if unmasked & BEFORE != 0 {
        *mxcsr |= raised & BEFORE;
    } else {
        *mxcsr |= raised;
    }
    if unmasked == 0 {
        return Ok(());
    }
    let taken = vcpu.state.cr4 & cr4::OSXMMEXCPT != 0;
    fault(if taken { Fault::new(vector::XM) } else { Fault::ud() })
}

// ---- vector instructions ----

/// Registers only.
fn registers<const VEX: bool, const FLOAT: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    call::<FLOAT>(vcpu, i)
}

/// A memory source of N bytes.
fn loads<const VEX: bool, const FLOAT: bool, const N: usize, const ALIGNED: bool>(
    vcpu: &mut Vcpu,
    i: &Insn,
) -> Exec {
    check::<VEX>(vcpu)?;
    match N {
        1 => vcpu.state.fpu.scratch.0[0] = vcpu.load::<u8>(i)?,
        2 => {
            let value = vcpu.load::<u16>(i)?;
            vcpu.state.fpu.scratch.0[..2].copy_from_slice(&value.to_le_bytes());
        }
        4 => {
            let value = vcpu.load::<u32>(i)?;
            vcpu.state.fpu.scratch.0[..4].copy_from_slice(&value.to_le_bytes());
        }
        8 => {
            let value = vcpu.load::<u64>(i)?;
            vcpu.state.fpu.scratch.0[..8].copy_from_slice(&value.to_le_bytes());
        }
        _ => {
            vcpu.load_vector::<N, ALIGNED>(i, |state| &mut state.fpu.scratch.0)?;
        }
    }
    call::<FLOAT>(vcpu, i)
}

/// A memory destination of N bytes, where nothing else changes.
fn stores<const VEX: bool, const N: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    call::<false>(vcpu, i)?;
    let mut value = [0; 16];
    value.copy_from_slice(&vcpu.state.fpu.scratch.0[..16]);
    let whole = u128::from_le_bytes(value);
    match N {
        4 => vcpu.store(i, whole as u32),
        8 => vcpu.store(i, whole as u64),
        _ => vcpu.store_vector::<16, false>(i, value),
    }
}

/// Any other memory operand.
fn general<const VEX: bool, const FLOAT: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    before(vcpu, i)?;
    call::<FLOAT>(vcpu, i)?;
    after(vcpu, i)
}

/// Checks alignment; reads a memory source into the scratch buffer; makes sure that a memory destination can
/// be written.
fn before(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let size = usize::from(i.imm2).min(64);
    if i.imm & bit::ALIGNED != 0 {
        let gva = vcpu.linear(i, u64::from(i.imm2), i.imm & bit::STORE != 0)?;
        if gva & u64::from(i.imm2.wrapping_sub(1)) != 0 {
            return fault(Fault::gp(0));
        }
    }
    if i.imm & bit::STORE != 0 {
        vcpu.probe_store(i, size as u64)?;
    }
    if i.imm & bit::LOAD != 0 {
        let mut bytes = [0; 64];
        vcpu.load_bytes(i, &mut bytes[..size])?;
        vcpu.state.fpu.scratch.0 = bytes;
    }
    Ok(())
}

/// Writes a memory destination from the scratch buffer.
fn after(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    if i.imm & bit::STORE == 0 {
        return Ok(());
    }
    let size = usize::from(i.imm2).min(64);
    let bytes = vcpu.state.fpu.scratch.0;
    vcpu.store_bytes(i, &bytes[..size])
}

// ---- x87 and MMX ----

/// An x87 or MMX instruction that computes.
fn x87(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let x87 = i.imm & bit::X87 != 0;
    let sse = i.imm & bit::SSE != 0;
    let needs = if x87 { ok::X87 } else { ok::MMX } | if sse { ok::SSE } else { 0 };
    if vcpu.state.fpu_ok & needs != needs {
        return refused(vcpu, needs);
    }
    super::x87::check_pending(vcpu)?;
    before(vcpu, i)?;
    let operand = if i.imm & (bit::LOAD | bit::STORE) != 0 { Some(vcpu.effective_address(i)) } else { None };
    // The stub loads MXCSR with the rest: the guest's rounding for the few MMX instructions that convert,
    // no exceptions.
    vcpu.sync_mxcsr();
    let run = vcpu.state.fpu.mxcsr & MXCSR_MASK & !MXCSR_FLAGS | MXCSR_DEFAULT;
    vcpu.state.fpu.legacy[24..28].copy_from_slice(&run.to_le_bytes());
    if i.imm & bit::READS_FLAGS != 0 {
        vcpu.state.fpu.native_flags = vcpu.state.flags.arithmetic() as u32;
    }
    let saved = sse.then(|| Box::new((vcpu.state.fpu.ymm, vcpu.state.regs, vcpu.state.fpu.legacy)));
    let before_fsw = vcpu.state.fpu.fsw();
    let Some(mxcsr) = vcpu.native.arena.call_with_mxcsr(StubId(i.imm as u32), &mut vcpu.state, run) else {
        return undefined(vcpu, i);
    };
    if let Some(saved) = saved
        && let Err(stop) = raise(vcpu, mxcsr)
    {
        (vcpu.state.fpu.ymm, vcpu.state.regs, vcpu.state.fpu.legacy) = *saved;
        return Err(stop);
    }
    if i.imm & bit::FLAGS != 0 {
        take_flags(vcpu);
    }
    if x87 {
        let fpu = &mut vcpu.state.fpu;
        // RIP is already past the instruction.
        fpu.fip = vcpu.state.regs[usize::from(crate::state::REG_RIP)].wrapping_sub(u64::from(i.len));
        if let Some(operand) = operand {
            fpu.fdp = operand;
        }
        // Invalid, denormal, overflow and underflow, if not masked, leave memory alone.
        const NO_STORE: u16 = 0x1b;
        if fpu.fsw() & !before_fsw & !fpu.fcw() & NO_STORE != 0 {
            return Ok(());
        }
    }
    after(vcpu, i)
}
