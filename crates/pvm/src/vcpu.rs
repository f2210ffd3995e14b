//! The state of one vCPU, and how it comes to be in PVM mode.

use crate::abi::{self, Generation, event_flags, selector};
use crate::gdt::Gdt;
use crate::processor::{Context, Processor, Register, SharedStruct};
use crate::range::AddressRanges;
use crate::stats::Stats;

/// What a vCPU is told when it is made.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// The generation of the ABI.
    pub generation: &'static Generation,
    /// The widest ranges of upper-half addresses that this hypervisor gives.
    pub ranges: AddressRanges,
    /// The number of the CPU, which the guest can see in a segment limit.
    pub cpu: u16,
}

/// Which mode a vCPU is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mode {
    /// Plain x86, on the way to 64-bit supervisor mode.
    NonPvm,
    /// PVM's 64-bit supervisor mode.
    Supervisor,
    /// PVM's 64-bit or 32-bit user mode.
    User,
}

/// Something cannot be delivered, or not be returned from: the vCPU shuts down.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TripleFault;

/// One vCPU's part of the ABI.
#[derive(Clone, Debug)]
pub struct Pvm {
    pub(crate) config: Config,
    pub(crate) mode: Mode,
    /// CS of supervisor mode as the guest believes it to be, RPL 0; SS is the next descriptor.
    pub(crate) supervisor_cs: u16,
    /// MSR_PVM_VCPU_STRUCT.
    pub(crate) vcpu_struct: u64,
    pub(crate) supervisor_rsp: u64,
    pub(crate) supervisor_redzone: u64,
    pub(crate) event_entry: u64,
    pub(crate) retu_rip: u64,
    pub(crate) rets_rip: u64,
    pub(crate) switch_cr3: u64,
    /// IA32_PKRS.
    pub(crate) pkrs: u32,
    pub(crate) ranges: AddressRanges,
    /// Set by the delivery of an NMI, cleared by ERETU and ERETS.
    pub(crate) nmi_masked: bool,
    pub(crate) gdt: Gdt,
    pub(crate) stats: Stats,
}

impl Pvm {
    /// A vCPU after reset: in plain x86 mode.
    pub const fn new(config: Config) -> Self {
        Self {
            config,
            mode: Mode::NonPvm,
            supervisor_cs: 0,
            vcpu_struct: 0,
            supervisor_rsp: 0,
            supervisor_redzone: 0,
            event_entry: 0,
            retu_rip: 0,
            rets_rip: 0,
            switch_cr3: 0,
            pkrs: 0,
            ranges: config.ranges,
            nmi_masked: false,
            gdt: Gdt::new(config.cpu),
            stats: Stats { ..STATS },
        }
    }

    /// INIT or reset: back to plain x86 mode. The counters stay.
    pub fn reset(&mut self) {
        *self = Self { stats: self.stats, ..Self::new(self.config) };
    }

    /// Enters PVM's supervisor mode from 64-bit supervisor mode with CS `cs`. The processor has put its control
    /// registers into the state that [`abi::control`] describes, and its GDT is [`Self::gdt`] from now on.
    pub fn enter<P: Processor>(&mut self, cpu: &mut P, cs: u16) {
        self.mode = Mode::Supervisor;
        self.supervisor_cs = cs & !3;
        let star = u64::from(selector::USER32_CS) << 48 | u64::from(self.supervisor_cs) << 32;
        // Selectors that STAR can hold are valid for it: there is no other rule to break.
        let stored = cpu.write_msr(abi::x86_msr::STAR, star);
        debug_assert!(stored, "STAR takes any value");
        cpu.confine(self.ranges);
        let flags = cpu.register(Register::Rflags);
        cpu.set_register(Register::Rflags, abi::rflags::underlying(flags));
        let cr3 = cpu.register(Register::Cr3);
        cpu.enter_supervisor(Context { cr3, pkru: self.supervisor_pkru(cpu) });
    }

    /// The mode.
    #[inline]
    pub const fn mode(&self) -> Mode {
        self.mode
    }

    /// The GDT of the underlying processor as the guest sees it.
    pub const fn gdt(&self) -> &Gdt {
        &self.gdt
    }

    /// CS of supervisor mode as the guest believes it to be.
    pub const fn supervisor_cs(&self) -> u16 {
        self.supervisor_cs
    }

    /// SS of supervisor mode as the guest believes it to be: the descriptor behind CS.
    pub const fn supervisor_ss(&self) -> u16 {
        self.supervisor_cs.wrapping_add(8)
    }

    /// The supervisor has loaded CS with `cs`, of RPL 0, in a way that trapped and was emulated.
    pub fn set_supervisor_cs(&mut self, cs: u16) {
        self.supervisor_cs = cs & !3;
    }

    /// The addresses that the guest may use.
    pub const fn ranges(&self) -> &AddressRanges {
        &self.ranges
    }

    /// The counters.
    pub const fn stats(&self) -> &Stats {
        &self.stats
    }

    /// MSR_PVM_VCPU_STRUCT; zero for none.
    pub const fn vcpu_struct(&self) -> u64 {
        self.vcpu_struct
    }

    // ---- interrupts ----

    /// Whether a maskable interrupt can be delivered now (for PVM modes): always in user mode, in supervisor
    /// mode if the shared structure's IF says so.
    #[inline]
    pub fn interrupts_open<P: Processor>(&self, cpu: &mut P) -> bool {
        self.mode == Mode::User || self.event_flags(cpu) & event_flags::IF != 0
    }

    /// Whether an NMI can be delivered now.
    pub const fn nmi_open(&self) -> bool {
        !self.nmi_masked
    }

    /// A maskable interrupt waits because the guest has closed them: tells it so, if there is a structure.
    pub fn interrupt_waits<P: Processor>(&mut self, cpu: &mut P) {
        let field = self.config.generation.pvcs.event_flags;
        let Some(mut pvcs) = self.pvcs(cpu) else { return };
        let flags = pvcs.load(field);
        if flags & event_flags::IP == 0 {
            pvcs.store(field, flags | event_flags::IP);
            self.stats.interrupt_windows += 1;
        }
    }

    /// CLI or STI in supervisor mode, emulated: IF in the shared structure, if there is one.
    pub fn set_interrupt_flag<P: Processor>(&mut self, cpu: &mut P, open: bool) {
        if open {
            self.set_event_flags(cpu, event_flags::IF, event_flags::IP);
        } else {
            self.set_event_flags(cpu, 0, event_flags::IF);
        }
    }

    /// `PVCS::event_flags`; zero without a structure.
    pub(crate) fn event_flags<P: Processor>(&self, cpu: &mut P) -> u64 {
        let field = self.config.generation.pvcs.event_flags;
        self.pvcs(cpu).map_or(0, |p| p.load(field))
    }

    /// Sets and clears bits of `PVCS::event_flags`, if there is a structure.
    pub(crate) fn set_event_flags<P: Processor>(&self, cpu: &mut P, set: u64, clear: u64) {
        let field = self.config.generation.pvcs.event_flags;
        if let Some(mut pvcs) = self.pvcs(cpu) {
            let old = pvcs.load(field);
            let new = (old | set) & !clear;
            if new != old {
                pvcs.store(field, new);
            }
        }
    }

    /// The shared structure, if the guest has set one and its page is there.
    #[inline]
    pub(crate) fn pvcs<'a, P: Processor>(&self, cpu: &'a mut P) -> Option<P::Shared<'a>> {
        if self.vcpu_struct == 0 { None } else { cpu.shared(self.vcpu_struct) }
    }

    /// PKRU of supervisor mode on entry: PKRS if supervisor keys are on, else everything is allowed.
    #[inline]
    pub(crate) fn supervisor_pkru<P: Processor>(&self, cpu: &P) -> u32 {
        if cpu.register(Register::Cr4) & abi::control::CR4_PKS != 0 { self.pkrs } else { 0 }
    }
}

/// Zero counters, as a constant.
const STATS: Stats = Stats {
    user_events: 0,
    supervisor_exceptions: 0,
    supervisor_interrupts: 0,
    syscalls: 0,
    user_returns: 0,
    supervisor_returns: 0,
    hypercalls: [0; abi::hypercall::COUNT],
    kvm_hypercalls: 0,
    interrupt_windows: 0,
};
