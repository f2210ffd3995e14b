//! The host's time-stamp counter.

/// Reads the host's TSC, ordered after earlier loads.
#[inline]
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: needed because the intrinsics are unsafe functions; they exist on every x86-64 host and only read the
    // counter.
    unsafe {
        std::arch::x86_64::_mm_lfence();
        std::arch::x86_64::_rdtsc()
    }
}
