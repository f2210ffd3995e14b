//! Structures that host and guest share in guest memory. `kvm-bindings` has none of them, so they are
//! written here byte by byte, after the kernel's documentation of KVM's MSRs.
//!
//! Version protocol: the writer makes the version odd, writes, and makes it even again; the reader reads
//! until it saw the same even version before and after.

use crate::clock::Scale;
use std::sync::atomic::{AtomicU8, Ordering, fence};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryError, VolatileMemory, bitmap::Bitmap};

/// Size of struct pvclock_wall_clock: version, seconds, nanoseconds.
pub(super) const WALL_CLOCK_SIZE: usize = 12;
/// Size of struct pvclock_vcpu_time_info.
pub(super) const SYSTEM_TIME_SIZE: usize = 32;
/// Size of struct kvm_steal_time.
pub(super) const STEAL_TIME_SIZE: usize = 64;
/// Size of struct kvm_clock_pairing.
const CLOCK_PAIRING_SIZE: usize = 64;

/// PVCLOCK_TSC_STABLE_BIT.
const TSC_STABLE: u8 = 1 << 0;

/// KVM_VCPU_PREEMPTED.
const PREEMPTED: u8 = 1 << 0;
/// KVM_VCPU_FLUSH_TLB.
const FLUSH_TLB: u8 = 1 << 1;

const NS_PER_S: u64 = 1_000_000_000;

/// Runs `write` between an odd and an even version at `version_at`, the first odd after `version`.
/// Returns the even one.
fn versioned<M: GuestMemory>(
    memory: &M,
    version_at: GuestAddress,
    version: u32,
    write: impl FnOnce() -> Result<(), GuestMemoryError>,
) -> Result<u32, GuestMemoryError> {
    let odd = version.wrapping_add(1) | 1;
    memory.store(odd, version_at, Ordering::Relaxed)?;
    // What `write` writes must not be seen before the odd version.
    fence(Ordering::SeqCst);
    write()?;
    let even = odd.wrapping_add(1);
    memory.store(even, version_at, Ordering::Release)?;
    Ok(even)
}

/// Content of struct pvclock_vcpu_time_info.
pub(super) struct SystemTime {
    /// The vCPU's TSC at `system_time`.
    pub(super) tsc_timestamp: u64,
    /// Nanoseconds since the machine started.
    pub(super) system_time: u64,
    pub(super) scale: Scale,
    /// No guest-visible TSC differs from the others.
    pub(super) stable: bool,
}

impl SystemTime {
    /// Writes it at `at`, after `version`. Returns the new version.
    pub(super) fn write<M: GuestMemory>(
        &self,
        memory: &M,
        at: GuestAddress,
        version: u32,
    ) -> Result<u32, GuestMemoryError> {
        // All but the version at offset 0.
        let mut bytes = [0u8; SYSTEM_TIME_SIZE - 4];
        bytes[4..12].copy_from_slice(&self.tsc_timestamp.to_le_bytes());
        bytes[12..20].copy_from_slice(&self.system_time.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.scale.mul.to_le_bytes());
        bytes[24..25].copy_from_slice(&self.scale.shift.to_le_bytes());
        bytes[25] = if self.stable { TSC_STABLE } else { 0 };
        versioned(memory, at, version, || memory.write_slice(&bytes, offset(at, 4)?))
    }
}

fn offset(at: GuestAddress, by: u64) -> Result<GuestAddress, GuestMemoryError> {
    at.0.checked_add(by).map(GuestAddress).ok_or(GuestMemoryError::InvalidGuestAddress(at))
}

/// Writes struct pvclock_wall_clock: the time of day at which the machine was 0 ns old.
pub(super) fn write_wall_clock<M: GuestMemory>(
    memory: &M,
    at: GuestAddress,
    realtime_ns: u64,
) -> Result<(), GuestMemoryError> {
    let mut bytes = [0u8; 8];
    // The ABI has 32 bits; they last until 2106.
    bytes[..4].copy_from_slice(&((realtime_ns / NS_PER_S) as u32).to_le_bytes());
    bytes[4..].copy_from_slice(&((realtime_ns % NS_PER_S) as u32).to_le_bytes());
    // No counter of our own: vCPUs share the structure, and the guest may move it.
    let version = memory.load(at, Ordering::Relaxed)?;
    versioned(memory, at, version, || memory.write_slice(&bytes, offset(at, 4)?)).map(drop)
}

/// Writes struct kvm_clock_pairing.
pub(super) fn write_clock_pairing<M: GuestMemory>(
    memory: &M,
    at: GuestAddress,
    realtime_ns: u64,
    tsc: u64,
) -> Result<(), GuestMemoryError> {
    let mut bytes = [0u8; CLOCK_PAIRING_SIZE];
    bytes[..8].copy_from_slice(&(realtime_ns / NS_PER_S).to_le_bytes());
    bytes[8..16].copy_from_slice(&(realtime_ns % NS_PER_S).to_le_bytes());
    bytes[16..24].copy_from_slice(&tsc.to_le_bytes());
    memory.write_slice(&bytes, at)
}

/// A struct kvm_steal_time in guest memory, on 64 bytes: steal (u64), version, flags (u32), preempted (u8).
pub(super) struct StealPage<'a, M> {
    pub(super) memory: &'a M,
    pub(super) at: GuestAddress,
}

impl<M: GuestMemory> StealPage<'_, M> {
    /// Swaps the byte `preempted`: other vCPUs change it by compare-exchange meanwhile.
    fn swap_preempted(&self, value: u8) -> Option<u8> {
        let slice = self.memory.get_slice(offset(self.at, 16).ok()?, 1).ok()?;
        let before = slice.get_atomic_ref::<AtomicU8>(0).ok()?.swap(value, Ordering::SeqCst);
        slice.bitmap().mark_dirty(0, 1);
        Some(before)
    }

    /// The vCPU sleeps.
    pub(super) fn set_preempted(&self) -> Option<u8> {
        self.swap_preempted(PREEMPTED)
    }

    /// The vCPU runs again. Whether it was left a TLB flush.
    pub(super) fn take_preempted(&self) -> Option<bool> {
        self.swap_preempted(0).map(|before| before & FLUSH_TLB != 0)
    }

    /// Adds to the steal time.
    pub(super) fn add_steal(&self, ns: u64) -> Option<()> {
        let version_at = offset(self.at, 8).ok()?;
        let version = self.memory.load(version_at, Ordering::Relaxed).ok()?;
        let steal: u64 = self.memory.load(self.at, Ordering::Relaxed).ok()?;
        versioned(self.memory, version_at, version, || {
            self.memory.store(steal.wrapping_add(ns), self.at, Ordering::Relaxed)
        })
        .ok()
        .map(drop)
    }
}
