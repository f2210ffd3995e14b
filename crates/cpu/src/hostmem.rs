//! Loads, stores and atomic operations on guest RAM at host addresses.
//!
//! Guest RAM is shared with other vCPUs, device threads and possibly other processes, so it is never a
//! Rust reference. Each access is one instruction in inline assembly: the compiler can neither tear,
//! repeat nor remove it, unaligned addresses behave as on hardware, and the host's memory ordering (x86
//! TSO) is the guest's. Guest atomics are host atomics with a LOCK prefix, which callers do not let cross a
//! cache line.
//!
//! This module is one of the few with `unsafe`. All its functions have one contract: `address` to
//! `address + size` lies in mapped guest RAM. The TLB is what establishes it.

use std::arch::asm;
use std::arch::x86_64::__m128i;

use crate::data::Data;

/// `address` if `a` equals `b`, otherwise 0, found without a branch.
///
/// A branch can be mispredicted, and a guest can train it to be. Whoever then goes on with an address from here, for as
/// long as the host speculates, goes on with 0, where nothing is mapped, instead of an address that the guest chose.
#[inline(always)]
pub(crate) fn address_if_equal(a: u64, b: u64, address: usize) -> usize {
    let mut address = address;
    // SAFETY: needed because the compiler would make a branch of it; sound because it computes with registers only.
    unsafe {
        asm!("cmp {a}, {b}", "cmovne {address}, {zero}", a = in(reg) a, b = in(reg) b, zero = in(reg) 0usize,
             address = inout(reg) address, options(pure, nomem, nostack));
    }
    address
}

/// Loads a `T`.
///
/// # Safety
/// `address .. address + T::SIZE` must be mapped guest RAM.
#[inline(always)]
pub(crate) unsafe fn load<T: Data>(address: usize) -> T {
    let value: u64;
    // SAFETY: needed because guest RAM may change under us, which no safe read allows; sound because the
    // caller vouches for the address and the instructions only read it.
    unsafe {
        match T::SIZE {
            1 => asm!("movzx {v:e}, byte ptr [{a}]", a = in(reg) address, v = lateout(reg) value,
                      options(nostack, preserves_flags, readonly)),
            2 => asm!("movzx {v:e}, word ptr [{a}]", a = in(reg) address, v = lateout(reg) value,
                      options(nostack, preserves_flags, readonly)),
            4 => asm!("mov {v:e}, dword ptr [{a}]", a = in(reg) address, v = lateout(reg) value,
                      options(nostack, preserves_flags, readonly)),
            _ => asm!("mov {v}, qword ptr [{a}]", a = in(reg) address, v = lateout(reg) value,
                      options(nostack, preserves_flags, readonly)),
        }
    }
    T::truncate(value)
}

/// Stores a `T`.
///
/// # Safety
/// `address .. address + T::SIZE` must be mapped guest RAM.
#[inline(always)]
pub(crate) unsafe fn store<T: Data>(address: usize, value: T) {
    let value = value.widen();
    // SAFETY: needed because others may read guest RAM meanwhile; sound because the caller vouches for
    // the address, and no Rust reference to guest RAM exists.
    unsafe {
        match T::SIZE {
            1 => asm!("mov byte ptr [{a}], {v}", a = in(reg) address, v = in(reg_byte) value as u8,
                      options(nostack, preserves_flags)),
            2 => asm!("mov word ptr [{a}], {v:x}", a = in(reg) address, v = in(reg) value,
                      options(nostack, preserves_flags)),
            4 => asm!("mov dword ptr [{a}], {v:e}", a = in(reg) address, v = in(reg) value,
                      options(nostack, preserves_flags)),
            _ => asm!("mov qword ptr [{a}], {v}", a = in(reg) address, v = in(reg) value,
                      options(nostack, preserves_flags)),
        }
    }
}

/// Loads 16 bytes in one access, at any alignment.
///
/// # Safety
/// `address .. address + 16` must be mapped guest RAM.
#[inline(always)]
pub(crate) unsafe fn load_16(address: usize) -> [u8; 16] {
    let value: __m128i;
    // SAFETY: needed and sound as for `load`; both types are 16 bytes without invalid values.
    unsafe {
        asm!("movdqu {v}, xmmword ptr [{a}]", a = in(reg) address, v = lateout(xmm_reg) value,
             options(nostack, preserves_flags, readonly));
        std::mem::transmute(value)
    }
}

/// Stores 16 bytes in one access, at any alignment.
///
/// # Safety
/// `address .. address + 16` must be mapped, writable guest RAM.
#[inline(always)]
pub(crate) unsafe fn store_16(address: usize, value: [u8; 16]) {
    // SAFETY: needed and sound as for `store`; both types are 16 bytes without invalid values.
    unsafe {
        let value: __m128i = std::mem::transmute(value);
        asm!("movdqu xmmword ptr [{a}], {v}", a = in(reg) address, v = in(xmm_reg) value,
             options(nostack, preserves_flags));
    }
}

/// Replaces `old` by `new` if it is there still; returns what was there.
///
/// # Safety
/// `address .. address + T::SIZE` must be mapped, writable guest RAM.
#[inline(always)]
pub(crate) unsafe fn compare_exchange<T: Data>(address: usize, old: T, new: T) -> T {
    let mut seen = old.widen();
    let new = new.widen();
    // SAFETY: needed for an atomic operation that tolerates any alignment; sound because the caller
    // vouches for the address.
    unsafe {
        match T::SIZE {
            1 => asm!("lock cmpxchg byte ptr [{a}], {n}", a = in(reg) address, n = in(reg_byte) new as u8,
                      inout("rax") seen, options(nostack)),
            2 => asm!("lock cmpxchg word ptr [{a}], {n:x}", a = in(reg) address, n = in(reg) new,
                      inout("rax") seen, options(nostack)),
            4 => asm!("lock cmpxchg dword ptr [{a}], {n:e}", a = in(reg) address, n = in(reg) new,
                      inout("rax") seen, options(nostack)),
            _ => asm!("lock cmpxchg qword ptr [{a}], {n}", a = in(reg) address, n = in(reg) new,
                      inout("rax") seen, options(nostack)),
        }
    }
    T::truncate(seen)
}

/// Exchanges a `T` atomically; returns what was there.
///
/// # Safety
/// `address .. address + T::SIZE` must be mapped, writable guest RAM.
#[inline(always)]
pub(crate) unsafe fn exchange<T: Data>(address: usize, value: T) -> T {
    let mut value = value.widen();
    // SAFETY: as for `compare_exchange`; XCHG with memory is locked without a prefix.
    unsafe {
        match T::SIZE {
            1 => {
                let mut byte = value as u8;
                asm!("xchg byte ptr [{a}], {v}", a = in(reg) address, v = inout(reg_byte) byte,
                     options(nostack, preserves_flags));
                value = u64::from(byte);
            }
            2 => asm!("xchg word ptr [{a}], {v:x}", a = in(reg) address, v = inout(reg) value,
                      options(nostack, preserves_flags)),
            4 => asm!("xchg dword ptr [{a}], {v:e}", a = in(reg) address, v = inout(reg) value,
                      options(nostack, preserves_flags)),
            _ => asm!("xchg qword ptr [{a}], {v}", a = in(reg) address, v = inout(reg) value,
                      options(nostack, preserves_flags)),
        }
    }
    T::truncate(value)
}

/// CMPXCHG16B: replaces `old` by `new` if it is there still; returns what was there.
///
/// # Safety
/// `address .. address + 16` must be mapped, writable guest RAM and `address` 16-byte aligned.
pub(crate) unsafe fn compare_exchange_16(address: usize, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: needed because no safe 128-bit atomic exists; sound because the caller vouches for address
    // and alignment. RBX is the compiler's, so it is swapped in and out by hand; the address has a register of
    // its own, since the compiler may give any other operand RBX, which holds guest data at the access.
    unsafe {
        asm!("xchg {n}, rbx", "lock cmpxchg16b [rdi]", "mov rbx, {n}",
             n = inout(reg) new as u64 => _, in("rdi") address,
             inout("rax") low, inout("rdx") high, in("rcx") (new >> 64) as u64, options(nostack));
    }
    u128::from(low) | u128::from(high) << 64
}

/// Copies bytes out of guest RAM.
///
/// # Safety
/// `address .. address + buffer.len()` must be mapped guest RAM.
#[inline]
pub(crate) unsafe fn copy_from(address: usize, buffer: &mut [u8]) {
    // SAFETY: needed because guest RAM has no Rust reference; sound because the caller vouches for the
    // source, `buffer` is our own memory, and REP MOVSB is opaque to the compiler.
    unsafe {
        asm!("rep movsb", inout("rcx") buffer.len() => _, inout("rsi") address => _,
             inout("rdi") buffer.as_mut_ptr() => _, options(nostack, preserves_flags));
    }
}

/// Copies bytes into guest RAM.
///
/// # Safety
/// `address .. address + buffer.len()` must be mapped, writable guest RAM.
#[inline]
pub(crate) unsafe fn copy_to(address: usize, buffer: &[u8]) {
    // SAFETY: as for `copy_from`, with the roles exchanged.
    unsafe {
        asm!("rep movsb", inout("rcx") buffer.len() => _, inout("rsi") buffer.as_ptr() => _,
             inout("rdi") address => _, options(nostack, preserves_flags));
    }
}

/// Copies `length` bytes inside guest RAM, in ascending order byte by byte as REP MOVSB does.
///
/// # Safety
/// Both ranges must be mapped guest RAM, the destination writable.
pub(crate) unsafe fn copy_within(source: usize, destination: usize, length: usize) {
    // SAFETY: needed and sound as for `copy_from`.
    unsafe {
        asm!("rep movsb", inout("rcx") length => _, inout("rsi") source => _, inout("rdi") destination => _,
             options(nostack, preserves_flags));
    }
}

/// Fills `count` units of `T` with `value`, as REP STOS does.
///
/// # Safety
/// `address .. address + count * T::SIZE` must be mapped, writable guest RAM.
pub(crate) unsafe fn fill<T: Data>(address: usize, value: T, count: usize) {
    let value = value.widen();
    // SAFETY: needed and sound as for `copy_to`.
    unsafe {
        match T::SIZE {
            1 => asm!("rep stosb", inout("rcx") count => _, inout("rdi") address => _, in("rax") value,
                      options(nostack, preserves_flags)),
            2 => asm!("rep stosw", inout("rcx") count => _, inout("rdi") address => _, in("rax") value,
                      options(nostack, preserves_flags)),
            4 => asm!("rep stosd", inout("rcx") count => _, inout("rdi") address => _, in("rax") value,
                      options(nostack, preserves_flags)),
            _ => asm!("rep stosq", inout("rcx") count => _, inout("rdi") address => _, in("rax") value,
                      options(nostack, preserves_flags)),
        }
    }
}
