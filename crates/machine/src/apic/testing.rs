//! What the tests of this module share: vCPUs that only take notes, and random numbers.

use super::{ApicBus, ApicBusConfig, VcpuSignals};
use crate::clock::{Clock, HostDeadline};
use std::sync::{Arc, Mutex};

/// A call of [`VcpuSignals`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Signal {
    Interrupt(usize),
    Nmi(usize),
    Init(usize),
    Sipi(usize, u8),
    Timer(usize, Option<HostDeadline>),
    Unhalt(usize),
}

#[derive(Default)]
pub(crate) struct Recorder(Mutex<Vec<Signal>>);

impl Recorder {
    fn note(&self, signal: Signal) {
        self.0.lock().unwrap().push(signal);
    }

    /// All calls since the last `take`.
    pub(crate) fn take(&self) -> Vec<Signal> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl VcpuSignals for Recorder {
    fn interrupt(&self, vcpu: usize) {
        self.note(Signal::Interrupt(vcpu));
    }
    fn nmi(&self, vcpu: usize) {
        self.note(Signal::Nmi(vcpu));
    }
    fn init(&self, vcpu: usize) {
        self.note(Signal::Init(vcpu));
    }
    fn sipi(&self, vcpu: usize, vector: u8) {
        self.note(Signal::Sipi(vcpu, vector));
    }
    fn timer_changed(&self, vcpu: usize, deadline: Option<HostDeadline>) {
        self.note(Signal::Timer(vcpu, deadline));
    }
    fn unhalt(&self, vcpu: usize) {
        self.note(Signal::Unhalt(vcpu));
    }
}

/// Local APICs with the given ids, on a clock of 2 GHz that stands still, all software-enabled in xAPIC
/// mode.
pub(crate) struct Rig {
    pub(crate) bus: Arc<ApicBus>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) signals: Arc<Recorder>,
}

impl Rig {
    pub(crate) fn new(ids: &[u32], extended_ids: bool) -> Self {
        let (clock, signals) = (Arc::new(Clock::manual(2_000_000)), Arc::new(Recorder::default()));
        let config = ApicBusConfig { ids: ids.to_vec(), physical_bits: 40, extended_ids };
        let bus = ApicBus::new(&config, &clock, signals.clone());
        let rig = Self { bus, clock, signals };
        for local in rig.bus.locals() {
            local.mmio_write(0xf0, 0x1ff);
        }
        rig
    }

    /// Puts some vCPUs into x2APIC mode.
    pub(crate) fn x2apic(self, vcpus: impl IntoIterator<Item = usize>) -> Self {
        for vcpu in vcpus {
            let local = self.bus.local(vcpu).unwrap();
            local.msr_write(0x1b, local.msr_read(0x1b).unwrap() | 1 << 10).unwrap();
        }
        self
    }

    /// Takes and ends all interrupts: (vCPU, vector), by vCPU, highest vector first.
    pub(crate) fn drain(&self) -> Vec<(usize, u8)> {
        let mut all = Vec::new();
        for local in self.bus.locals() {
            while let Some(vector) = local.acknowledge() {
                all.push((local.vcpu(), vector));
                local.eoi();
            }
        }
        all
    }
}

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}
