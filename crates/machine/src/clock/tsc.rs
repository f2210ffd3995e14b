//! The host's time stamp counter.
#![allow(unsafe_code, reason = "the only place that reads the time-stamp counter")]

/// Reads the host's TSC, ordered after earlier loads: who has seen a value of it in memory reads no smaller one.
#[inline(always)]
pub(super) fn read() -> u64 {
    // SAFETY: RDTSC and LFENCE have no safe wrappers in core::arch. They exist on every x86-64 processor, touch no
    // memory and change only EDX:EAX, which the intrinsic declares. Where the kernel forbids RDTSC to a
    // process (PR_SET_TSC) it ends in SIGSEGV, not in undefined behaviour.
    unsafe {
        core::arch::x86_64::_mm_lfence();
        core::arch::x86_64::_rdtsc()
    }
}
