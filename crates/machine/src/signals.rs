//! How interrupt controllers reach vCPU threads: attention words, and one thread that waits for timers.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use cpu::Attention;
use cpu::attention;

use crate::apic::{ApicBus, VcpuSignals};
use crate::clock::{HostDeadline, monotonic_ns};

const NEVER: u64 = u64::MAX;

/// The deadlines of the vCPUs' local timers, for the timer thread.
#[derive(Debug)]
pub(crate) struct Timers {
    state: Mutex<TimerState>,
    changed: Condvar,
}

#[derive(Debug)]
struct TimerState {
    /// By vCPU, in nanoseconds of CLOCK_MONOTONIC.
    deadlines: Vec<u64>,
    /// What the timer thread waits for at most.
    waiting_for: u64,
    stop: bool,
}

impl Timers {
    fn new(vcpus: usize) -> Self {
        Self {
            state: Mutex::new(TimerState { deadlines: vec![NEVER; vcpus], waiting_for: NEVER, stop: false }),
            changed: Condvar::new(),
        }
    }

    fn set(&self, vcpu: usize, deadline: Option<HostDeadline>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let deadline = deadline.map_or(NEVER, |d| d.0);
        if let Some(slot) = state.deadlines.get_mut(vcpu) {
            *slot = deadline;
        }
        // A later deadline needs no wake-up: the thread finds nothing due and waits again.
        if deadline < state.waiting_for {
            state.waiting_for = deadline;
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Fires due timers until [`Self::stop`] is called.
    pub(crate) fn serve(&self, bus: &ApicBus) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.stop {
            let now = monotonic_ns();
            let mut due = Vec::new();
            for (vcpu, deadline) in state.deadlines.iter_mut().enumerate() {
                if *deadline <= now {
                    *deadline = NEVER;
                    due.push(vcpu);
                }
            }
            if !due.is_empty() {
                // Firing calls `set`: not with the lock held.
                drop(state);
                for local in due.iter().filter_map(|&vcpu| bus.local(vcpu)) {
                    local.fire_timer_if_due();
                }
                state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                // The vCPU may have set another deadline meanwhile. It publishes that before it calls `set`, so
                // what is read here, under the lock, is at least as new as what the last `set` stored.
                for &vcpu in &due {
                    let next = bus.local(vcpu).and_then(|local| local.next_deadline());
                    if let Some(slot) = state.deadlines.get_mut(vcpu) {
                        *slot = next.map_or(NEVER, |deadline| deadline.0);
                    }
                }
                continue;
            }
            let next = state.deadlines.iter().copied().min().unwrap_or(NEVER);
            state.waiting_for = next;
            state = if next == NEVER {
                self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
            } else {
                let wait = Duration::from_nanos(next.saturating_sub(now));
                self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0
            };
        }
    }

    /// Ends [`Self::serve`].
    pub(crate) fn stop(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        self.changed.notify_all();
    }
}

/// The attention words of all vCPUs, as the interrupt controllers know them.
#[derive(Debug)]
pub(crate) struct Signals {
    attentions: Vec<Arc<Attention>>,
    pub(crate) timers: Timers,
}

impl Signals {
    pub(crate) fn new(vcpus: usize) -> Arc<Self> {
        Arc::new(Self {
            attentions: (0..vcpus).map(|_| Arc::new(Attention::new())).collect(),
            timers: Timers::new(vcpus),
        })
    }

    /// The attention words by vCPU.
    pub(crate) fn attentions(&self) -> &[Arc<Attention>] {
        &self.attentions
    }

    /// Sets `bits` in every word.
    pub(crate) fn raise_all(&self, bits: u32) {
        self.attentions.iter().for_each(|a| a.raise(bits));
    }

    fn raise(&self, vcpu: usize, bits: u32) {
        if let Some(attention) = self.attentions.get(vcpu) {
            attention.raise(bits);
        }
    }
}

impl VcpuSignals for Signals {
    fn interrupt(&self, vcpu: usize) {
        self.raise(vcpu, attention::INTERRUPT);
    }

    fn nmi(&self, vcpu: usize) {
        self.raise(vcpu, attention::NMI);
    }

    fn init(&self, vcpu: usize) {
        self.raise(vcpu, attention::INIT);
    }

    fn sipi(&self, vcpu: usize, vector: u8) {
        if let Some(attention) = self.attentions.get(vcpu) {
            attention.raise_sipi(vector);
        }
    }

    fn timer_changed(&self, vcpu: usize, deadline: Option<HostDeadline>) {
        self.timers.set(vcpu, deadline);
    }

    fn unhalt(&self, vcpu: usize) {
        self.raise(vcpu, attention::UNHALT);
    }
}
