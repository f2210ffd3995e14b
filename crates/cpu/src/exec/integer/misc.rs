//! Flag bits, no-operations, fences, cache hints, random numbers, BOUND and the undefined instructions.

use std::sync::atomic::{Ordering, fence};

use iced_x86::{Instruction, Mnemonic as M};

use super::form::{Form, form, size, wide};
use crate::data::Data;
use crate::fault::{Exec, Fault, fault, vector};
use crate::flags::{CF, DF};
use crate::insn::{Handler, Insn};
use crate::vcpu::Vcpu;

/// Chooses the handler of what belongs nowhere else.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    match i.mnemonic() {
        M::Clc => Some(clc),
        M::Stc => Some(stc),
        M::Cmc => Some(cmc),
        M::Cld => Some(cld),
        M::Std => Some(std_),
        // RDSSP is a no-operation while shadow stacks are off.
        M::Nop
        | M::Reservednop
        | M::Endbr32
        | M::Endbr64
        | M::Rdsspd
        | M::Rdsspq
        | M::Prefetch
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Cldemote => Some(nop),
        M::Pause => Some(pause),
        M::Lfence | M::Mfence | M::Sfence | M::Serialize => Some(memory_fence),
        M::Clflush | M::Clflushopt | M::Clwb => Some(touch),
        M::Ud0 | M::Ud1 | M::Ud2 => Some(undefined),
        M::Rdrand | M::Rdseed => wide!(size(i, 0) => random::<_>),
        M::Rdpid => Some(rdpid),
        M::Bound if form(i) == Form::RegMem => match size(i, 0) {
            2 => Some(bound::<u16>),
            4 => Some(bound::<u32>),
            _ => None,
        },
        _ => None,
    }
}

fn clc(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    vcpu.state.flags.set_cf(false);
    Ok(())
}

fn stc(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    vcpu.state.flags.set_cf(true);
    Ok(())
}

fn cmc(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    let cf = vcpu.state.flags.cf();
    vcpu.state.flags.set_cf(!cf);
    Ok(())
}

fn cld(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    vcpu.state.flags.set_system(DF, 0);
    Ok(())
}

fn std_(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    vcpu.state.flags.set_system(DF, DF);
    Ok(())
}

fn nop(_: &mut Vcpu, _: &Insn) -> Exec {
    Ok(())
}

fn pause(_: &mut Vcpu, _: &Insn) -> Exec {
    std::hint::spin_loop();
    Ok(())
}

/// All fences order as MFENCE does.
fn memory_fence(_: &mut Vcpu, _: &Insn) -> Exec {
    fence(Ordering::SeqCst);
    Ok(())
}

/// Cache line write-back and invalidation check the address as a byte read does.
fn touch(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.load::<u8>(i).map(drop)
}

/// UD0, UD1 and UD2: undefined on purpose, so not counted as unimplemented.
fn undefined(_: &mut Vcpu, _: &Insn) -> Exec {
    fault(Fault::ud())
}

/// RDRAND and RDSEED, from the host kernel's generator. CF says whether there is a number; the other
/// arithmetic flags are cleared.
fn random<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let number = getrandom::u64().ok();
    vcpu.set(i.dst, T::truncate(number.unwrap_or(0)));
    vcpu.state.flags.set_arithmetic(if number.is_some() { CF } else { 0 });
    Ok(())
}

fn rdpid(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    vcpu.set_reg(i.dst, vcpu.state.msrs.tsc_aux & 0xffff_ffff);
    Ok(())
}

/// BOUND: the register, signed, against the lower and upper bound that follow each other in memory.
fn bound<T: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    let lower: T = vcpu.load(i)?;
    let upper: T = vcpu.load(&i.displaced(T::SIZE))?;
    let signed = |value: T| value.sign_extend() as i64;
    let index = signed(vcpu.get(i.dst));
    if index < signed(lower) || index > signed(upper) {
        return fault(Fault::new(vector::BR));
    }
    Ok(())
}
