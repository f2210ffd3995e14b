//! Moves and bitwise logic: too frequent, and too simple, for native code.
//!
//! A legacy-encoded instruction writes 16 bytes of its destination and keeps the upper half of the YMM
//! register; a VEX-encoded one writes all 32, zeros above its own size.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::run::check;
use crate::data::Data;
use crate::fault::Exec;
use crate::insn::{Handler, Insn};
use crate::vcpu::Vcpu;

/// Chooses the handler of a move or bitwise operation.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    let vex = i.encoding() == EncodingKind::VEX;
    match i.mnemonic() {
        Mnemonic::Vzeroupper => return Some(zero_upper),
        Mnemonic::Vzeroall => return Some(zero_all),
        _ => {}
    }
    let any = |kind: fn(Register) -> bool| {
        (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && kind(i.op_register(n)))
    };
    if !any(Register::is_vector_register) || any(Register::is_mm) {
        return None;
    }
    if vex { select_vex(i) } else { select_legacy(i) }
}

fn select_legacy(i: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    let to_memory = i.op0_kind() == OpKind::Memory;
    let from_memory = !to_memory && i.op1_kind() == OpKind::Memory;
    Some(match i.mnemonic() {
        M::Movups | M::Movupd | M::Movdqu | M::Lddqu if from_memory => load::<false, 16, false>,
        M::Movups | M::Movupd | M::Movdqu if to_memory => store::<false, 16, false>,
        M::Movaps | M::Movapd | M::Movdqa | M::Movntdqa if from_memory => load::<false, 16, true>,
        M::Movaps | M::Movapd | M::Movdqa | M::Movntps | M::Movntpd | M::Movntdq if to_memory => {
            store::<false, 16, true>
        }
        M::Movups | M::Movupd | M::Movdqu | M::Movaps | M::Movapd | M::Movdqa => copy::<false, 16>,
        M::Movsd | M::Movq if from_memory && i.memory_size().size() == 8 => load_low::<false, u64>,
        M::Movss | M::Movd if from_memory => load_low::<false, u32>,
        M::Movsd | M::Movq | M::Movlps | M::Movlpd if to_memory && i.memory_size().size() == 8 => {
            store_part::<false, u64, 0>
        }
        M::Movss | M::Movd if to_memory => store_part::<false, u32, 0>,
        M::Movhps | M::Movhpd if to_memory => store_part::<false, u64, 8>,
        M::Movhps | M::Movhpd if from_memory => insert::<false, 8>,
        M::Movlps | M::Movlpd if from_memory => insert::<false, 0>,
        M::Movsd => merge::<false, 8>,
        M::Movss => merge::<false, 4>,
        M::Movq | M::Movd => registers::<false>(i)?,
        M::Pxor | M::Xorps | M::Xorpd => logic::<Xor, false, 16>(from_memory),
        M::Pand | M::Andps | M::Andpd => logic::<And, false, 16>(from_memory),
        M::Por | M::Orps | M::Orpd => logic::<Or, false, 16>(from_memory),
        M::Pandn | M::Andnps | M::Andnpd => logic::<AndNot, false, 16>(from_memory),
        _ => return None,
    })
}

fn select_vex(i: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    let to_memory = i.op0_kind() == OpKind::Memory;
    let from_memory = !to_memory && i.op1_kind() == OpKind::Memory;
    let from_memory2 = i.op_count() > 2 && i.op2_kind() == OpKind::Memory;
    let ymm = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_ymm());
    macro_rules! sized {
        ($handler:ident $(, $more:literal)*) => {
            if ymm { $handler::<true, 32 $(, $more)*> } else { $handler::<true, 16 $(, $more)*> }
        };
    }
    macro_rules! logical {
        ($operation:ty) => {
            if ymm {
                logic::<$operation, true, 32>(from_memory2)
            } else {
                logic::<$operation, true, 16>(from_memory2)
            }
        };
    }
    Some(match i.mnemonic() {
        M::Vmovups | M::Vmovupd | M::Vmovdqu | M::Vlddqu if from_memory => sized!(load, false),
        M::Vmovups | M::Vmovupd | M::Vmovdqu if to_memory => sized!(store, false),
        M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntdqa if from_memory => sized!(load, true),
        M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq if to_memory => {
            sized!(store, true)
        }
        M::Vmovups | M::Vmovupd | M::Vmovdqu | M::Vmovaps | M::Vmovapd | M::Vmovdqa => sized!(copy),
        M::Vmovsd | M::Vmovq if from_memory => load_low::<true, u64>,
        M::Vmovss | M::Vmovd if from_memory => load_low::<true, u32>,
        M::Vmovsd | M::Vmovq | M::Vmovlps | M::Vmovlpd if to_memory => store_part::<true, u64, 0>,
        M::Vmovss | M::Vmovd if to_memory => store_part::<true, u32, 0>,
        M::Vmovhps | M::Vmovhpd if to_memory => store_part::<true, u64, 8>,
        M::Vmovhps | M::Vmovhpd if from_memory2 => insert::<true, 8>,
        M::Vmovlps | M::Vmovlpd if from_memory2 => insert::<true, 0>,
        M::Vmovsd if i.op_count() == 3 => merge::<true, 8>,
        M::Vmovss if i.op_count() == 3 => merge::<true, 4>,
        M::Vmovq | M::Vmovd => registers::<true>(i)?,
        M::Vpxor | M::Vxorps | M::Vxorpd => logical!(Xor),
        M::Vpand | M::Vandps | M::Vandpd => logical!(And),
        M::Vpor | M::Vorps | M::Vorpd => logical!(Or),
        M::Vpandn | M::Vandnps | M::Vandnpd => logical!(AndNot),
        _ => return None,
    })
}

/// MOVD and MOVQ between registers.
fn registers<const VEX: bool>(i: &Instruction) -> Option<Handler> {
    let (to, from) = (i.op0_register(), i.op1_register());
    Some(match (to.is_xmm(), from.is_xmm()) {
        (true, true) => copy::<VEX, 8>,
        (true, false) if from.is_gpr64() => from_general::<VEX, u64>,
        (true, false) if from.is_gpr32() => from_general::<VEX, u32>,
        (false, true) if to.is_gpr64() => to_general::<VEX, u64>,
        (false, true) if to.is_gpr32() => to_general::<VEX, u32>,
        _ => return None,
    })
}

/// Sets the low N bytes of register `n` and clears the rest of what the encoding writes.
#[inline(always)]
fn set<const VEX: bool, const N: usize>(vcpu: &mut Vcpu, n: u8, value: [u8; N]) {
    let register = &mut vcpu.state.fpu.ymm[usize::from(n & 15)];
    let end = if VEX { 32 } else { 16 };
    register[..N].copy_from_slice(&value);
    register[N..end].fill(0);
}

/// The low N bytes of register `n`.
#[inline(always)]
fn get<const N: usize>(vcpu: &Vcpu, n: u8) -> [u8; N] {
    let mut value = [0; N];
    value.copy_from_slice(&vcpu.state.fpu.ymm[usize::from(n & 15)][..N]);
    value
}

fn load<const VEX: bool, const N: usize, const ALIGNED: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    vcpu.load_vector::<N, ALIGNED>(i, |state| &mut state.fpu.ymm[usize::from(i.dst & 15)])?;
    if VEX && N == 16 {
        vcpu.state.fpu.ymm[usize::from(i.dst & 15)][16..].fill(0);
    }
    Ok(())
}

fn store<const VEX: bool, const N: usize, const ALIGNED: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    vcpu.store_vector::<N, ALIGNED>(i, get(vcpu, i.src))
}

fn copy<const VEX: bool, const N: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    set::<VEX, N>(vcpu, i.dst, get(vcpu, i.src));
    Ok(())
}

fn load_low<const VEX: bool, T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    let value = vcpu.load::<T>(i)?;
    set::<VEX, 8>(vcpu, i.dst, value.widen().to_le_bytes());
    Ok(())
}

fn store_part<const VEX: bool, T: Data, const AT: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    let value = (vcpu.state.fpu.xmm(i.src) >> (AT * 8)) as u64;
    vcpu.store(i, T::truncate(value))
}

fn from_general<const VEX: bool, T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    let value = vcpu.get::<T>(i.src).widen();
    set::<VEX, 8>(vcpu, i.dst, value.to_le_bytes());
    Ok(())
}

fn to_general<const VEX: bool, T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    let value = vcpu.state.fpu.xmm(i.src) as u64;
    vcpu.set(i.dst, T::truncate(value));
    Ok(())
}

/// The register whose other parts a partial write keeps: the destination, or VEX's first source.
#[inline(always)]
fn rest<const VEX: bool>(vcpu: &Vcpu, i: &Insn) -> [u8; 16] {
    get(vcpu, if VEX { i.src } else { i.dst })
}

/// MOVLPS and MOVHPS from memory: 8 bytes at AT.
fn insert<const VEX: bool, const AT: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    let value = vcpu.load::<u64>(i)?;
    let mut whole = rest::<VEX>(vcpu, i);
    whole[AT..AT + 8].copy_from_slice(&value.to_le_bytes());
    set::<VEX, 16>(vcpu, i.dst, whole);
    Ok(())
}

/// MOVSS and MOVSD between registers: the low N bytes.
fn merge<const VEX: bool, const N: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    let value: [u8; N] = get(vcpu, if VEX { i.src2 } else { i.src });
    let mut whole = rest::<VEX>(vcpu, i);
    whole[..N].copy_from_slice(&value);
    set::<VEX, 16>(vcpu, i.dst, whole);
    Ok(())
}

fn zero_upper(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    check::<true>(vcpu)?;
    for n in 0..accessible(vcpu) {
        vcpu.state.fpu.ymm[n][16..].fill(0);
    }
    Ok(())
}

fn zero_all(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    check::<true>(vcpu)?;
    for n in 0..accessible(vcpu) {
        vcpu.state.fpu.ymm[n] = [0; 32];
    }
    Ok(())
}

/// How many vector registers the present mode has.
pub(super) fn accessible(vcpu: &Vcpu) -> usize {
    if vcpu.state.code_mode == crate::state::CodeMode::Bits64 { 16 } else { 8 }
}

// ---- bitwise logic ----

/// A bitwise operation of two sources.
trait Logic {
    fn apply(a: u128, b: u128) -> u128;
}

macro_rules! logic {
    ($($name:ident $operation:expr;)*) => {$(
        struct $name;
        impl Logic for $name {
            #[inline(always)]
            fn apply(a: u128, b: u128) -> u128 {
                let operation: fn(u128, u128) -> u128 = $operation;
                operation(a, b)
            }
        }
    )*};
}

logic! {
    And |a, b| a & b;
    AndNot |a, b| !a & b;
    Or |a, b| a | b;
    Xor |a, b| a ^ b;
}

fn logic<L: Logic, const VEX: bool, const N: usize>(memory: bool) -> Handler {
    if memory { logic_memory::<L, VEX, N> } else { logic_registers::<L, VEX, N> }
}

#[inline(always)]
fn combine<L: Logic, const N: usize>(mut a: [u8; N], b: [u8; N]) -> [u8; N] {
    for (a, b) in a.as_chunks_mut::<16>().0.iter_mut().zip(b.as_chunks::<16>().0) {
        *a = L::apply(u128::from_le_bytes(*a), u128::from_le_bytes(*b)).to_le_bytes();
    }
    a
}

fn logic_registers<L: Logic, const VEX: bool, const N: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    let (a, b) = if VEX { (i.src, i.src2) } else { (i.dst, i.src) };
    set::<VEX, N>(vcpu, i.dst, combine::<L, N>(get(vcpu, a), get(vcpu, b)));
    Ok(())
}

fn logic_memory<L: Logic, const VEX: bool, const N: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    // Legacy encodings demand alignment, VEX does not.
    if VEX {
        vcpu.load_vector::<N, false>(i, |state| &mut state.fpu.scratch.0)?;
    } else {
        vcpu.load_vector::<N, true>(i, |state| &mut state.fpu.scratch.0)?;
    }
    let mut b = [0; N];
    b.copy_from_slice(&vcpu.state.fpu.scratch.0[..N]);
    let a = get(vcpu, if VEX { i.src } else { i.dst });
    set::<VEX, N>(vcpu, i.dst, combine::<L, N>(a, b));
    Ok(())
}
