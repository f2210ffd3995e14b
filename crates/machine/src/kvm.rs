//! The KVM paravirtual interface, as the guest sees it.
//!
//! Stock kernels look for the signature `KVMKVMKVM` in CPUID and then use what the feature leaf offers
//! without further set-up on our side: a clock that needs no calibration, spinlocks that halt, IPIs to
//! many vCPUs by one call, TLB shootdowns that leave halted vCPUs asleep. The numbers are those of the
//! kernel's user-space headers `asm/kvm_para.h` and `linux/kvm_para.h`, the structures those of the
//! kernel's documentation of KVM's MSRs and hypercalls.
//!
//! # Parts
//!
//! - [`cpuid_leaves`]: signature, features, frequencies.
//! - [`KvmVcpu::msr_read`], [`KvmVcpu::msr_write`]: where in guest memory the shared structures are. A
//!   reserved bit or a place that is not memory is #GP.
//! - [`KvmVcpu::hypercall`]: VMCALL and VMMCALL.
//! - [`KvmVcpu::on_halt`], [`KvmVcpu::on_wake`]: what the vCPU loop calls around the sleep of a HLT.
//!
//! # The clock
//!
//! Nanoseconds and base ticks both start at 0 with the machine, so every vCPU's page says the same: at
//! tick 0 it was time 0, and so many nanoseconds per tick. The guest may then read any vCPU's page on any
//! vCPU (the *stable* flag). Only a guest that gives its vCPUs different TSCs loses that.
//!
//! # Left out
//!
//! Asynchronous page faults: the host's own paging is not the guest's business. Paravirtual EOI: it saves
//! an exit, which costs a software processor nothing, and would cost a look at guest memory for each
//! interrupt.

mod cpuid;
mod hypercall;
mod pages;

pub use cpuid::{CpuidLeaf, Features, cpuid_leaves};
pub use hypercall::Hypercall;

use crate::apic::{ApicBus, GeneralProtection};
use crate::clock::{Clock, TscAdjust};
use pages::{StealPage, SystemTime};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemory};

/// MSR_KVM_WALL_CLOCK, the deprecated number.
pub const MSR_WALL_CLOCK_OLD: u32 = 0x11;
/// MSR_KVM_SYSTEM_TIME, the deprecated number.
pub const MSR_SYSTEM_TIME_OLD: u32 = 0x12;
/// MSR_KVM_WALL_CLOCK_NEW: where to write the time of day at boot, now.
pub const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
/// MSR_KVM_SYSTEM_TIME_NEW: where this vCPU's clock page is; bit 0 enables.
pub const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// MSR_KVM_STEAL_TIME: where this vCPU's steal-time structure is; bit 0 enables.
pub const MSR_STEAL_TIME: u32 = 0x4b56_4d03;
/// MSR_KVM_POLL_CONTROL: whether the host may poll before it sleeps in HLT. Kept, not acted upon.
pub const MSR_POLL_CONTROL: u32 = 0x4b56_4d05;

const ENABLED: u64 = 1;

/// Whether an MSR number is one that KVM defines: [`KvmVcpu::msr_read`] and `msr_write` decide about it.
pub fn is_kvm_msr(index: u32) -> bool {
    matches!(index, MSR_WALL_CLOCK_OLD | MSR_SYSTEM_TIME_OLD | 0x4b56_4d00..=0x4b56_4dff)
}

/// What all vCPUs share of the interface.
pub struct KvmVm {
    clock: Arc<Clock>,
    bus: Arc<ApicBus>,
    features: Features,
    wall_clock: AtomicU64,
    /// Counts changes of any vCPU's TSC against the others: a clock page older than this is out of date.
    tsc_generation: AtomicU32,
}

impl KvmVm {
    /// Offers all features that the machine has.
    pub fn new(clock: Arc<Clock>, bus: Arc<ApicBus>) -> Arc<Self> {
        let features = Features::offered(&bus);
        Arc::new(Self {
            clock,
            bus,
            features,
            wall_clock: AtomicU64::new(0),
            tsc_generation: AtomicU32::new(0),
        })
    }

    /// What CPUID leaf 0x4000_0001 offers.
    pub fn features(&self) -> Features {
        self.features
    }

    /// The leaves to put into the guest's CPUID.
    pub fn cpuid_leaves(&self) -> Vec<CpuidLeaf> {
        cpuid_leaves(self.features, self.clock.tsc_khz())
    }

    /// RESET of the machine.
    pub fn reset(&self) {
        self.wall_clock.store(0, Ordering::Release);
        self.tsc_generation.store(0, Ordering::Release);
    }
}

/// Answer of [`KvmVcpu::on_wake`]: whether the vCPU must drop its whole TLB (every PCID, global entries
/// too) before it runs another guest instruction.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub struct FlushTlb(pub bool);

/// One vCPU's side of the interface. Used by the vCPU's own thread.
pub struct KvmVcpu<A: GuestAddressSpace> {
    vm: Arc<KvmVm>,
    memory: A,
    /// MSR_KVM_SYSTEM_TIME, as written.
    system_time: u64,
    /// Version of the clock page, even.
    clock_version: u32,
    /// [`KvmVm::tsc_generation`] that the clock page was written at.
    clock_generation: u32,
    tsc_adjust: TscAdjust,
    /// MSR_KVM_STEAL_TIME, as written.
    steal_time: u64,
    poll_control: u64,
}

impl<A: GuestAddressSpace> KvmVcpu<A> {
    /// A vCPU after RESET. `memory` is the guest's.
    pub fn new(vm: Arc<KvmVm>, memory: A) -> Self {
        Self {
            vm,
            memory,
            system_time: 0,
            clock_version: 0,
            clock_generation: 0,
            tsc_adjust: TscAdjust::default(),
            steal_time: 0,
            poll_control: ENABLED,
        }
    }

    /// RESET of the processor: nothing is enabled. INIT changes nothing here.
    pub fn reset(&mut self) {
        self.system_time = 0;
        self.tsc_adjust = TscAdjust::default();
        self.steal_time = 0;
        self.poll_control = ENABLED;
    }

    /// RDMSR. What is not offered is #GP.
    pub fn msr_read(&self, index: u32) -> Result<u64, GeneralProtection> {
        match index {
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_OLD => Ok(self.vm.wall_clock.load(Ordering::Acquire)),
            MSR_SYSTEM_TIME | MSR_SYSTEM_TIME_OLD => Ok(self.system_time),
            MSR_STEAL_TIME => Ok(self.steal_time),
            MSR_POLL_CONTROL => Ok(self.poll_control),
            _ => Err(GeneralProtection),
        }
    }

    /// WRMSR. What is not offered, a reserved bit, and an address that is not in memory are #GP.
    pub fn msr_write(&mut self, index: u32, value: u64) -> Result<(), GeneralProtection> {
        match index {
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_OLD => {
                let at = self.place(value, 4, pages::WALL_CLOCK_SIZE)?;
                let boot = self.vm.clock.realtime_at_start_ns();
                pages::write_wall_clock(&*self.memory.memory(), at, boot).map_err(|_| GeneralProtection)?;
                self.vm.wall_clock.store(value, Ordering::Release);
            }
            MSR_SYSTEM_TIME | MSR_SYSTEM_TIME_OLD => {
                if value & ENABLED != 0 {
                    self.place(value & !ENABLED, 4, pages::SYSTEM_TIME_SIZE)?;
                }
                self.system_time = value;
                self.write_clock();
            }
            MSR_STEAL_TIME => {
                if value & ENABLED != 0 {
                    self.place(value & !ENABLED, 64, pages::STEAL_TIME_SIZE)?;
                } else if value & 0x3e != 0 {
                    return Err(GeneralProtection);
                }
                self.steal_time = value;
                // The vCPU that writes this is running: whatever stood there, it is not preempted.
                let _ = self.steal_page(|page| page.take_preempted());
            }
            MSR_POLL_CONTROL if value <= 1 => self.poll_control = value,
            _ => return Err(GeneralProtection),
        }
        Ok(())
    }

    /// Checks where a guest wants a structure: aligned, and in memory.
    fn place(&self, address: u64, align: u64, size: usize) -> Result<GuestAddress, GeneralProtection> {
        let at = GuestAddress(address);
        let good = address.is_multiple_of(align) && self.memory.memory().check_range(at, size);
        if good { Ok(at) } else { Err(GeneralProtection) }
    }

    /// Follows a change of the vCPU's IA32_TSC or IA32_TSC_ADJUST.
    pub fn set_tsc_adjust(&mut self, adjust: TscAdjust) {
        if adjust != self.tsc_adjust {
            self.tsc_adjust = adjust;
            self.vm.tsc_generation.fetch_add(1, Ordering::AcqRel);
            self.write_clock();
        }
    }

    /// Writes the clock page anew, if there is one.
    fn write_clock(&mut self) {
        self.clock_generation = self.vm.tsc_generation.load(Ordering::Acquire);
        if self.system_time & ENABLED == 0 {
            return;
        }
        let content = SystemTime {
            tsc_timestamp: self.tsc_adjust.tsc(0),
            system_time: 0,
            scale: self.vm.clock.scale(),
            // Any vCPU's TSC may be read against any vCPU's page only while no guest has moved one.
            stable: self.clock_generation == 0,
        };
        let at = GuestAddress(self.system_time & !ENABLED);
        // The place was checked when the MSR was written. Should memory have gone since, the guest's clock
        // stands; there is nobody to tell.
        if let Ok(version) = content.write(&*self.memory.memory(), at, self.clock_version) {
            self.clock_version = version;
        }
    }

    /// The vCPU is about to sleep in HLT. From here on other vCPUs may leave it TLB flushes in guest
    /// memory instead of sending IPIs; it must not use its TLB before [`KvmVcpu::on_wake`].
    pub fn on_halt(&mut self) {
        self.steal_page(|page| page.set_preempted());
    }

    /// The vCPU goes on after [`KvmVcpu::on_halt`].
    pub fn on_wake(&mut self) -> FlushTlb {
        if self.clock_generation != self.vm.tsc_generation.load(Ordering::Acquire) {
            self.write_clock();
        }
        FlushTlb(self.steal_page(|page| page.take_preempted()).unwrap_or(false))
    }

    /// Tells the guest that its vCPU was ready but not run for another `ns` nanoseconds.
    pub fn add_steal(&mut self, ns: u64) {
        self.steal_page(|page| page.add_steal(ns));
    }

    /// Runs `f` on the steal-time structure, if there is one.
    fn steal_page<R>(&self, f: impl FnOnce(StealPage<'_, A::M>) -> Option<R>) -> Option<R> {
        if self.steal_time & ENABLED == 0 {
            return None;
        }
        let memory = self.memory.memory();
        f(StealPage { memory: &memory, at: GuestAddress(self.steal_time & !ENABLED) })
    }
}

#[cfg(test)]
mod tests;
