//! What a vCPU counts.

use crate::abi::hypercall;

/// Counters of one vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Vector events from user mode.
    pub user_events: u64,
    /// Events with vectors below 32 from supervisor mode.
    pub supervisor_exceptions: u64,
    /// Events with vectors from 32 on from supervisor mode.
    pub supervisor_interrupts: u64,
    /// User SYSCALLs.
    pub syscalls: u64,
    /// ERETU: returns to user mode.
    pub user_returns: u64,
    /// ERETS: returns to supervisor mode.
    pub supervisor_returns: u64,
    /// PVM's hypercalls, from LOAD_PGTBL on.
    pub hypercalls: [u64; hypercall::COUNT],
    /// Hypercalls passed on to KVM's interface.
    pub kvm_hypercalls: u64,
    /// Times that the interrupt-pending flag was set.
    pub interrupt_windows: u64,
}

impl Stats {
    /// All events that were delivered, SYSCALLs excepted.
    pub const fn events(&self) -> u64 {
        self.user_events + self.supervisor_exceptions + self.supervisor_interrupts
    }

    /// All of PVM's own hypercalls.
    pub fn pvm_hypercalls(&self) -> u64 {
        self.hypercalls.iter().sum()
    }

    /// Switches between user and supervisor mode, either way.
    pub const fn switches(&self) -> u64 {
        self.user_events + self.syscalls + self.user_returns
    }

    /// Adds another vCPU's counters.
    pub fn add(&mut self, other: &Self) {
        self.user_events += other.user_events;
        self.supervisor_exceptions += other.supervisor_exceptions;
        self.supervisor_interrupts += other.supervisor_interrupts;
        self.syscalls += other.syscalls;
        self.user_returns += other.user_returns;
        self.supervisor_returns += other.supervisor_returns;
        for (sum, n) in self.hypercalls.iter_mut().zip(other.hypercalls) {
            *sum += n;
        }
        self.kvm_hypercalls += other.kvm_hypercalls;
        self.interrupt_windows += other.interrupt_windows;
    }
}
