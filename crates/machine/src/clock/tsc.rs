//! The host's time stamp counter.
#![allow(unsafe_code, reason = "the only place that reads the time-stamp counter")]

/// Reads the host's TSC.
#[inline(always)]
pub(super) fn read() -> u64 {
    // SAFETY: RDTSC has no safe wrapper in core::arch. It exists on every x86-64 processor, touches no
    // memory and changes only EDX:EAX, which the intrinsic declares. Where the kernel forbids it to a
    // process (PR_SET_TSC) it ends in SIGSEGV, not in undefined behaviour.
    unsafe { core::arch::x86_64::_rdtsc() }
}
