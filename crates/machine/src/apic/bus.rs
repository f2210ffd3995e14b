//! The bus of interrupt messages: who gets what (SDM vol. 3, 12.6.2 and 12.12.9).

use super::io::IoApic;
use super::local::LocalApic;
use super::message::{DeliveryMode, Destination, Message, TriggerMode};
use super::msi;
use super::registers::{ApicMode, Identity};
use crate::clock::{Clock, HostDeadline};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock, Weak};

/// How interrupt controllers get a vCPU thread's attention.
///
/// Each call means "look", from any thread, at any time, also from the vCPU's own thread in the middle of
/// a register access. It must not block, nor call the [`IoApic`] (whose lock may be held).
pub trait VcpuSignals: Send + Sync {
    /// [`LocalApic::pending_vector`] has become, or is about to be seen as, something new. A halted vCPU
    /// wakes up.
    fn interrupt(&self, vcpu: usize);
    /// An NMI is pending.
    fn nmi(&self, vcpu: usize);
    /// INIT: the vCPU calls [`LocalApic::init`] and waits for SIPI.
    fn init(&self, vcpu: usize);
    /// Start-up IPI: real mode at `vector << 12`, if the vCPU waits for it; else ignored.
    fn sipi(&self, vcpu: usize, vector: u8);
    /// The timer's deadline is another one; `None`: none. Where calls from several threads race, the truth
    /// is [`LocalApic::next_deadline`].
    fn timer_changed(&self, vcpu: usize, deadline: Option<HostDeadline>);
    /// KVM_HC_KICK_CPU: a halted vCPU goes on after its HLT with no interrupt; otherwise its next HLT ends
    /// at once.
    fn unhalt(&self, vcpu: usize);
}

/// What [`ApicBus::new`] needs to know.
#[derive(Clone, Debug)]
pub struct ApicBusConfig {
    /// The x2APIC id of each vCPU, by index; vCPU 0 is the bootstrap processor. No two the same.
    pub ids: Vec<u32>,
    /// MAXPHYADDR.
    pub physical_bits: u8,
    /// MSIs and I/O APIC entries carry 15-bit destinations (KVM_FEATURE_MSI_EXT_DEST_ID).
    pub extended_ids: bool,
}

/// Messages that went nowhere, since the start.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct BusCounters {
    /// MSIs and commands with a reserved encoding.
    pub malformed: u64,
    /// SMI and ExtINT: this machine has neither SMM nor an 8259.
    pub unsupported: u64,
    /// No APIC named by the destination took it.
    pub undeliverable: u64,
}

#[derive(Default)]
struct Counters {
    malformed: AtomicU64,
    unsupported: AtomicU64,
    undeliverable: AtomicU64,
}

/// All local APICs, and the way to them.
pub struct ApicBus {
    locals: Vec<Arc<LocalApic>>,
    signals: Arc<dyn VcpuSignals>,
    extended_ids: bool,
    io_apics: RwLock<Vec<Weak<IoApic>>>,
    /// Where the search for the lowest priority starts, so that equals take turns.
    turn: AtomicUsize,
    counters: Counters,
}

impl ApicBus {
    /// Makes the local APICs of all vCPUs, as after RESET.
    pub fn new(config: &ApicBusConfig, clock: &Arc<Clock>, signals: Arc<dyn VcpuSignals>) -> Arc<Self> {
        Arc::new_cyclic(|bus| {
            let local = |(vcpu, &id): (usize, &u32)| {
                let (clock, signals) = (clock.clone(), signals.clone());
                Arc::new(LocalApic::new(vcpu, id, config.physical_bits, clock, signals, bus.clone()))
            };
            Self {
                locals: config.ids.iter().enumerate().map(local).collect(),
                signals: signals.clone(),
                extended_ids: config.extended_ids,
                io_apics: RwLock::default(),
                turn: AtomicUsize::new(0),
                counters: Counters::default(),
            }
        })
    }

    /// The local APIC of a vCPU, by index.
    pub fn local(&self, vcpu: usize) -> Option<&Arc<LocalApic>> {
        self.locals.get(vcpu)
    }

    /// The local APICs of all vCPUs, by index.
    pub fn locals(&self) -> &[Arc<LocalApic>] {
        &self.locals
    }

    /// The vCPU with an x2APIC id.
    pub fn vcpu_with_id(&self, id: u32) -> Option<usize> {
        self.locals.iter().position(|local| local.id() == id)
    }

    /// Where to call for a vCPU's attention.
    pub fn signals(&self) -> &Arc<dyn VcpuSignals> {
        &self.signals
    }

    /// Whether destinations of MSIs and I/O APIC entries have 15 bits.
    pub fn extended_ids(&self) -> bool {
        self.extended_ids
    }

    /// Messages that went nowhere.
    pub fn counters(&self) -> BusCounters {
        let Counters { malformed, unsupported, undeliverable } = &self.counters;
        BusCounters {
            malformed: malformed.load(Ordering::Relaxed),
            unsupported: unsupported.load(Ordering::Relaxed),
            undeliverable: undeliverable.load(Ordering::Relaxed),
        }
    }

    /// A device writes `data` to `address` as an MSI. Nonsense is counted and dropped. Returns how many
    /// vCPUs took it.
    pub fn deliver_msi(&self, address: u64, data: u32) -> usize {
        match msi::decode(address, data, self.extended_ids) {
            Some(message) => self.deliver(&message),
            None => {
                self.counters.malformed.fetch_add(1, Ordering::Relaxed);
                0
            }
        }
    }

    /// Gives a message to those it names. Returns how many took it.
    pub fn deliver(&self, message: &Message) -> usize {
        if matches!(message.mode, DeliveryMode::Smi | DeliveryMode::ExtInt) {
            self.counters.unsupported.fetch_add(1, Ordering::Relaxed);
            return 0;
        }
        let taken = match message.mode {
            DeliveryMode::LowestPriority => usize::from(self.deliver_to_lowest(message)),
            _ => self.named(message.destination).filter(|local| self.deliver_to(local, message)).count(),
        };
        if taken == 0 {
            self.counters.undeliverable.fetch_add(1, Ordering::Relaxed);
        }
        taken
    }

    fn deliver_to(&self, local: &LocalApic, message: &Message) -> bool {
        let vcpu = local.vcpu();
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                return local.inject(message.vector, message.trigger);
            }
            DeliveryMode::Nmi => self.signals.nmi(vcpu),
            DeliveryMode::Init => self.signals.init(vcpu),
            DeliveryMode::StartUp => self.signals.sipi(vcpu, message.vector),
            DeliveryMode::Smi | DeliveryMode::ExtInt => return false,
        }
        true
    }

    /// SDM vol. 3, 12.6.2.4: the APIC with the lowest processor priority; equals take turns.
    fn deliver_to_lowest(&self, message: &Message) -> bool {
        let count = self.locals.len().max(1);
        let start = self.turn.fetch_add(1, Ordering::Relaxed) % count;
        self.named(message.destination)
            .filter(|local| local.identity().enabled)
            .min_by_key(|local| (local.processor_priority() >> 4, (local.vcpu() + count - start) % count))
            .is_some_and(|local| self.deliver_to(local, message))
    }

    fn named(&self, destination: Destination) -> impl Iterator<Item = &LocalApic> {
        self.locals.iter().map(Arc::as_ref).filter(move |local| self.names(destination, local))
    }

    fn names(&self, destination: Destination, local: &LocalApic) -> bool {
        let identity = local.identity();
        if identity.mode == ApicMode::Disabled {
            return false;
        }
        let x2apic = identity.mode == ApicMode::X2Apic;
        match destination {
            Destination::All => true,
            Destination::AllBut(vcpu) => local.vcpu() != vcpu,
            Destination::Vcpu(vcpu) => local.vcpu() == vcpu,
            // With 15-bit destinations 0xff is an id like others, for those that can have it.
            Destination::Physical(0xff) => {
                if x2apic && self.extended_ids {
                    local.id() == 0xff
                } else {
                    true
                }
            }
            // An xAPIC cannot have id 0xff, nor more than 8 bits.
            Destination::Physical(id) => local.id() == u32::from(id) && (x2apic || id < 0xff),
            Destination::Logical(0xff) => true,
            Destination::Logical(set) => matches_logical(identity, set.into()),
            Destination::Physical32(u32::MAX) | Destination::Logical32(u32::MAX) => true,
            Destination::Physical32(id) => local.id() == id,
            Destination::Logical32(set) => matches_logical(identity, set),
        }
    }

    /// A command from an ICR (SDM vol. 3, 12.6.1).
    pub(crate) fn send_ipi(&self, from: &LocalApic, icr: u64) {
        match decode_icr(icr, from.vcpu(), from.mode() == ApicMode::X2Apic) {
            Command::Send(message) => {
                self.deliver(&message);
            }
            Command::Deassert => {}
            Command::Malformed => {
                self.counters.malformed.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// EOI of a level-triggered vector in some local APIC.
    pub(crate) fn broadcast_eoi(&self, vector: u8) {
        let io_apics = self.io_apics.read().unwrap_or_else(PoisonError::into_inner);
        io_apics.iter().filter_map(Weak::upgrade).for_each(|io_apic| io_apic.eoi(vector));
    }

    /// Makes `io_apic` hear EOIs.
    pub(crate) fn attach(&self, io_apic: Weak<IoApic>) {
        self.io_apics.write().unwrap_or_else(PoisonError::into_inner).push(io_apic);
    }
}

/// Logical destination match: x2APIC clusters (SDM vol. 3, 12.12.10.2), xAPIC flat or cluster model
/// (12.6.2.2).
fn matches_logical(identity: Identity, set: u32) -> bool {
    let own = identity.logical;
    match identity.mode {
        ApicMode::Disabled => false,
        ApicMode::X2Apic => own >> 16 == set >> 16 && own & set & 0xffff != 0,
        ApicMode::XApic if set > 0xff => false,
        ApicMode::XApic if identity.cluster => own >> 4 == set >> 4 && own & set & 0xf != 0,
        ApicMode::XApic => own & set != 0,
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Command {
    Send(Message),
    /// INIT level de-assert: resets arbitration ids, which nothing has had since the Pentium 4.
    Deassert,
    Malformed,
}

fn decode_icr(icr: u64, from: usize, x2apic: bool) -> Command {
    let Some(mode) = DeliveryMode::from_bits((icr >> 8) as u32) else { return Command::Malformed };
    let (asserted, level) = (icr & 1 << 14 != 0, icr & 1 << 15 != 0);
    if mode == DeliveryMode::Init && level && !asserted {
        return Command::Deassert;
    }
    let logical = icr & 1 << 11 != 0;
    let field = (icr >> 32) as u32;
    let destination = match (icr >> 18 & 3, x2apic, logical) {
        (1, ..) => Destination::Vcpu(from),
        (2, ..) => Destination::All,
        (3, ..) => Destination::AllBut(from),
        (_, true, false) => Destination::Physical32(field),
        (_, true, true) => Destination::Logical32(field),
        (_, false, false) => Destination::Physical((field >> 24) as u16),
        (_, false, true) => Destination::Logical((field >> 24) as u16),
    };
    // SDM vol. 3, table 12-3: no processor resets itself; no command is an ExtINT.
    let includes_self = matches!(destination, Destination::Vcpu(_) | Destination::All);
    let resets = matches!(mode, DeliveryMode::Init | DeliveryMode::StartUp);
    if mode == DeliveryMode::ExtInt || (includes_self && resets) {
        return Command::Malformed;
    }
    Command::Send(Message { destination, mode, vector: icr as u8, trigger: TriggerMode::Edge })
}

#[cfg(test)]
mod tests;
