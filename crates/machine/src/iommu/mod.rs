//! The guest's own IOMMU: either [Intel's](vtd), or virtio's, whose requests mean this in terms of crate `iommufd`.
//!
//! Each PCI function behind it is a device that is bound to one context. Each domain of the guest's is an IOAS
//! over guest RAM (`ram`), which the device is attached to: the HWPT is made, and goes, with that. A domain that does
//! not translate, and "no domain" while the guest allows it, is one IOAS in which RAM lies at its physical addresses.
//!
//! Most devices are software here, and go through ports of the software IOMMU. Those of the host (`host`) go through the host's
//! IOMMU, into which their HWPTs are carried over, request by request: what the host refuses to map is refused to the guest.
//! They write to memory unseen, so it is kept which of it the guest lets them write to (`writes`).

#[cfg(test)]
mod fake;
mod host;
mod ram;
pub mod vtd;

use std::collections::BTreeMap;
use std::sync::Arc;

use cpu::GuestRam;
use iommufd::account::Accounting;
use iommufd::domain::Prot;
use iommufd::iova::{Iova, IovaRange, PAGE_SIZE};
use iommufd::process::{Process, UserAddr};
use iommufd::soft::{Access, Fault, FaultReason, Port, SoftDevice};
use iommufd::{BoundDevice, Context, Errno};
use virtio::iommu::{FaultRecord, Faults, MapFlags, Refusal, Reserved, Translator};

use crate::dma::{self, Place, Remapper};
use crate::layout;
use crate::writes::{Exposed, Run, What};
pub(crate) use host::HostEndpoint;
use ram::GuestProcess;

/// The sizes that mappings are made of, one bit each: any multiple of 4 KiB can be mapped, so all sizes from there.
pub(crate) const PAGE_SIZES: u64 = !(PAGE_SIZE - 1);
/// Bits of an address that is translated: as many as the software IOMMU has.
const ADDRESS_BITS: u32 = 48;
/// Ranges that an endpoint is said not to have: what a PROBE has room for.
const MOST_RESERVED: usize = 10;

/// What a guest's IOMMU counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IommuStats {
    /// Translations of devices' addresses.
    pub translations: u64,
    /// Accesses that were not translated.
    pub faults: u64,
    /// What was done for that.
    pub work: Work,
}

/// What it took to have translations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The guest asks for each mapping, as of a virtio IOMMU.
    Requests {
        /// Mappings that the guest made.
        maps: u64,
        /// Mappings that it removed.
        unmaps: u64,
    },
    /// The guest has page tables in its memory, as for VT-d.
    Tables {
        /// How often a device was attached to one.
        attached: u64,
    },
}

/// How a device is translated: the port that it goes through, and what looks after that.
pub type Endpoint = (Arc<Port>, Arc<dyn Remapper>);

/// Where faults of an endpoint of a virtio IOMMU go.
#[derive(Debug)]
struct Reporter {
    endpoint: u32,
    faults: Arc<Faults>,
}

impl Remapper for Reporter {
    fn report(&self, fault: Fault) {
        self.faults.report(FaultRecord {
            endpoint: self.endpoint,
            address: fault.iova.0,
            write: fault.access == Access::Write,
            mapped_domain: fault.reason != FaultReason::Detached,
        });
    }
}

/// The IOMMU's side that does the work.
#[derive(Debug)]
pub struct GuestIommu {
    ram: Arc<GuestRam>,
    context: Arc<Context>,
    process: Arc<dyn Process>,
    places: Vec<Place>,
    /// The IOAS in which RAM lies at its physical addresses.
    whole: u32,
    bypass: bool,
    endpoints: BTreeMap<u32, Attached>,
    domains: BTreeMap<u32, Domain>,
    faults: Arc<Faults>,
    maps: u64,
    unmaps: u64,
}

#[derive(Debug)]
struct Attached {
    device: BoundDevice,
    kind: Kind,
    domain: Option<u32>,
    /// The IOAS that it is attached to.
    attached: Option<u32>,
}

/// Whose device it is.
#[derive(Debug)]
enum Kind {
    /// One in software, which asks for each translation.
    Soft(Arc<Port>),
    /// One of the host's.
    Host {
        /// What it can have translated, in order.
        usable: Vec<IovaRange>,
        /// What it may write to.
        exposed: Arc<Exposed>,
    },
}

#[derive(Debug)]
struct Domain {
    /// None when it does not translate.
    ioas: Option<u32>,
    /// What is mapped, by the first address.
    mappings: BTreeMap<u64, Mapping>,
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    last: u64,
    /// Where it is in guest memory, if devices may write there.
    writable: Option<Run>,
}

/// What devices in a domain may write to: all, where nothing is translated.
fn exposed_by(domain: Option<&Domain>, bypass: bool) -> What {
    let runs = |domain: &Domain| {
        domain.mappings.iter().filter_map(|(at, mapping)| Some((*at, mapping.writable?))).collect()
    };
    match domain {
        Some(domain) if domain.ioas.is_none() => What::All,
        None if bypass => What::All,
        domain => What::Runs(domain.map(runs).unwrap_or_default()),
    }
}

fn refusal(errno: Errno) -> Refusal {
    match errno {
        // The latter of a container of the host's that has as many mappings as it takes.
        Errno::NOMEM | Errno::NOSPC => Refusal::NoMemory,
        Errno::EXIST | Errno::ADDRINUSE => Refusal::Invalid,
        Errno::INVAL | Errno::OVERFLOW | Errno::FAULT => Refusal::Range,
        _ => Refusal::Device,
    }
}

impl GuestIommu {
    /// One without endpoints, whose faults go to `faults`.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn new(ram: &Arc<GuestRam>, faults: Arc<Faults>) -> Result<Self, Errno> {
        let context = Context::new();
        context.set_accounting(Accounting::None)?;
        let process: Arc<dyn Process> = Arc::new(GuestProcess::new(Arc::clone(ram)));
        let places = dma::places(ram);
        let whole = context.ioas_alloc()?;
        for place in &places {
            let (at, from) = (Some(Iova(place.physical)), UserAddr(place.host));
            context.ioas_map(whole, &process, from, place.len, at, Prot::READ | Prot::WRITE)?;
        }
        Ok(Self {
            ram: Arc::clone(ram),
            context,
            process,
            places,
            whole,
            bypass: false,
            endpoints: BTreeMap::new(),
            domains: BTreeMap::new(),
            faults,
            maps: 0,
            unmaps: 0,
        })
    }

    /// Adds an endpoint: what its DMA goes through.
    ///
    /// # Errors
    /// ENOMEM.
    pub fn add_endpoint(&mut self, endpoint: u32) -> Result<Endpoint, Errno> {
        let device = SoftDevice::new(GROUPS | u64::from(endpoint), vec![interrupts()?]);
        let port = device.port(None);
        self.add(endpoint, self.context.bind(device)?, Kind::Soft(Arc::clone(&port)))?;
        Ok((port, Arc::new(Reporter { endpoint, faults: Arc::clone(&self.faults) })))
    }

    /// Adds an endpoint that is a device of the host's: what the guest's processors have to know that it writes to.
    ///
    /// # Errors
    /// What the host says, when it does not map guest memory.
    pub(crate) fn add_host_endpoint(
        &mut self,
        endpoint: u32,
        device: HostEndpoint,
    ) -> Result<Arc<Exposed>, Errno> {
        let (device, usable) = device.bind(&self.context)?;
        let exposed = Exposed::new(&self.ram, What::Runs(BTreeMap::new()));
        self.add(endpoint, device, Kind::Host { usable, exposed: Arc::clone(&exposed) })?;
        Ok(exposed)
    }

    fn add(&mut self, endpoint: u32, device: BoundDevice, kind: Kind) -> Result<(), Errno> {
        self.endpoints.insert(endpoint, Attached { device, kind, domain: None, attached: None });
        let attached = self.attach_to_wanted(endpoint);
        if attached.is_err() {
            self.endpoints.remove(&endpoint);
        }
        attached
    }

    /// What it counted until now. (Translations that a device only tries, to see what it may do, are not among the faults.)
    pub fn stats(&self) -> IommuStats {
        let translations = |it: &Attached| match &it.kind {
            Kind::Soft(port) => port.counters().translations,
            Kind::Host { .. } => 0,
        };
        let translations = self.endpoints.values().map(translations).sum();
        let work = Work::Requests { maps: self.maps, unmaps: self.unmaps };
        IommuStats { translations, faults: self.faults.count(), work }
    }

    /// Attaches an endpoint to what it is to be attached to now.
    fn apply(&mut self, endpoint: u32) -> Result<(), Refusal> {
        self.attach_to_wanted(endpoint).map_err(refusal)
    }

    fn attach_to_wanted(&mut self, endpoint: u32) -> Result<(), Errno> {
        let it = self.endpoints.get_mut(&endpoint).ok_or(Errno::NOENT)?;
        let domain = it.domain.and_then(|domain| self.domains.get(&domain));
        let target = match domain {
            Some(domain) => Some(domain.ioas.unwrap_or(self.whole)),
            None => self.bypass.then_some(self.whole),
        };
        if it.attached == target {
            return Ok(());
        }
        match (it.attached, target) {
            (None, Some(to)) => it.device.attach(None, to)?,
            (Some(_), Some(to)) => it.device.replace(None, to)?,
            (_, None) => {
                it.device.detach(None);
                0
            }
        };
        it.attached = target;
        if let Kind::Host { exposed, .. } = &it.kind {
            exposed.change(exposed_by(domain, self.bypass));
        }
        Ok(())
    }

    /// What the host's devices in a domain may write to.
    fn exposed(&self, domain: u32) -> impl Iterator<Item = &Arc<Exposed>> {
        self.endpoints.values().filter_map(move |it| match &it.kind {
            Kind::Host { exposed, .. } if it.domain == Some(domain) => Some(exposed),
            _ => None,
        })
    }

    /// Ends a domain that no endpoint is attached to.
    fn collect(&mut self, domain: u32) {
        if self.endpoints.values().any(|endpoint| endpoint.domain == Some(domain)) {
            return;
        }
        if let Some(ioas) = self.domains.remove(&domain).and_then(|domain| domain.ioas)
            && let Err(errno) = self.context.destroy(ioas)
        {
            tracing::warn!(%errno, domain, "an address space of the guest's is still in use");
        }
    }

    /// Where the guest-physical range is in this process, if it is RAM as a whole.
    fn host(&self, physical: u64, length: u64) -> Option<UserAddr> {
        self.places.iter().find_map(|place| place.host(physical, length)).map(UserAddr)
    }

    /// A domain that translates: its IOAS and mappings.
    fn translating(&mut self, domain: u32) -> Result<(u32, &mut BTreeMap<u64, Mapping>), Refusal> {
        let domain = self.domains.get_mut(&domain).ok_or(Refusal::NoEntry)?;
        Ok((domain.ioas.ok_or(Refusal::Invalid)?, &mut domain.mappings))
    }
}

impl Translator for GuestIommu {
    /// What all endpoints can have translated: the host's IOMMU may have fewer bits.
    fn input_range(&self) -> (u64, u64) {
        let ends = self.endpoints.values().filter_map(|it| match &it.kind {
            Kind::Host { usable, .. } => usable.first().zip(usable.last()),
            Kind::Soft(_) => None,
        });
        ends.fold((0, (1 << ADDRESS_BITS) - 1), |(start, end), (first, last)| {
            (start.max(first.start().0), end.min(last.last().0))
        })
    }

    fn attach(&mut self, domain: u32, endpoint: u32, bypass: bool) -> Result<(), Refusal> {
        let before = self.endpoints.get(&endpoint).ok_or(Refusal::NoEntry)?.domain;
        match self.domains.get(&domain) {
            Some(known) if known.ioas.is_none() != bypass => return Err(Refusal::Invalid),
            Some(_) => {}
            None => {
                let ioas = if bypass { None } else { Some(self.context.ioas_alloc().map_err(refusal)?) };
                self.domains.insert(domain, Domain { ioas, mappings: BTreeMap::new() });
            }
        }
        if let Some(it) = self.endpoints.get_mut(&endpoint) {
            it.domain = Some(domain);
        }
        let result = self.apply(endpoint);
        if result.is_err()
            && let Some(it) = self.endpoints.get_mut(&endpoint)
        {
            it.domain = before;
        }
        let left = if result.is_ok() { before } else { Some(domain) };
        if let Some(left) = left {
            self.collect(left);
        }
        result
    }

    fn detach(&mut self, domain: u32, endpoint: u32) -> Result<(), Refusal> {
        let it = self.endpoints.get_mut(&endpoint).ok_or(Refusal::NoEntry)?;
        if it.domain != Some(domain) {
            return Err(Refusal::Invalid);
        }
        it.domain = None;
        let result = self.apply(endpoint);
        self.collect(domain);
        result
    }

    fn map(&mut self, domain: u32, start: u64, last: u64, to: u64, flags: MapFlags) -> Result<(), Refusal> {
        let process = Arc::clone(&self.process);
        let length = last.checked_sub(start).and_then(|rest| rest.checked_add(1)).ok_or(Refusal::Range)?;
        if !(start | length | to).is_multiple_of(PAGE_SIZE) {
            return Err(Refusal::Range);
        }
        let from = self.host(to, length);
        let context = Arc::clone(&self.context);
        let (ioas, mappings) = self.translating(domain)?;
        let from = from.ok_or(Refusal::Range)?;
        let range = IovaRange::new(Iova(start), Iova(last)).map_err(refusal)?;
        if interrupts().map_err(refusal)?.intersection(range).is_some() {
            return Err(Refusal::Invalid);
        }
        let mut prot = Prot::empty();
        prot.set(Prot::READ, flags.read);
        prot.set(Prot::WRITE, flags.write);
        context.ioas_map(ioas, &process, from, length, Some(Iova(start)), prot).map_err(refusal)?;
        let writable = flags.write.then_some(Run { physical: to, length });
        mappings.insert(start, Mapping { last, writable });
        if let Some(run) = writable {
            self.exposed(domain).for_each(|exposed| exposed.add(start, run));
        }
        self.maps += 1;
        Ok(())
    }

    fn unmap(&mut self, domain: u32, start: u64, last: u64) -> Result<(), Refusal> {
        let context = Arc::clone(&self.context);
        let (ioas, mappings) = self.translating(domain)?;
        if let Some((_, before)) = mappings.range(..start).next_back()
            && before.last >= start
        {
            return Err(Refusal::Range);
        }
        let inside: Vec<(u64, u64)> =
            mappings.range(start..=last).map(|(from, to)| (*from, to.last)).collect();
        let Some((_, end)) = inside.last() else { return Ok(()) };
        if *end > last {
            return Err(Refusal::Range);
        }
        let range = IovaRange::new(Iova(start), Iova(last)).map_err(refusal)?;
        context.ioas_unmap(ioas, range).map_err(refusal)?;
        for (from, _) in &inside {
            mappings.remove(from);
        }
        for exposed in self.exposed(domain) {
            inside.iter().for_each(|(from, _)| exposed.remove(*from));
        }
        self.unmaps += inside.len() as u64;
        Ok(())
    }

    fn reserved(&self, endpoint: u32) -> Result<Vec<Reserved>, Refusal> {
        let endpoint = self.endpoints.get(&endpoint).ok_or(Refusal::NoEntry)?;
        let messages = interrupts().map_err(refusal)?;
        let gaps = match &endpoint.kind {
            Kind::Soft(_) => Vec::new(),
            Kind::Host { usable, .. } => IovaRange::gaps(usable),
        };
        let region = |range: IovaRange, msi| Reserved { start: range.start().0, last: range.last().0, msi };
        let mut regions = vec![region(messages, true)];
        for gap in gaps.into_iter().flat_map(|gap| without(gap, messages)) {
            match regions.get_mut(MOST_RESERVED - 1) {
                // Where there is no room for more, what lies between two is given up.
                Some(last) => last.last = gap.last().0,
                None => regions.push(region(gap, false)),
            }
        }
        Ok(regions)
    }

    fn set_bypass(&mut self, bypass: bool) {
        self.bypass = bypass;
        let endpoints: Vec<u32> = self.endpoints.keys().copied().collect();
        for endpoint in endpoints {
            if let Err(refusal) = self.apply(endpoint) {
                tracing::warn!(endpoint, ?refusal, "an endpoint cannot be attached to guest memory");
            }
        }
    }

    fn reset(&mut self) {
        let attached: Vec<(u32, u32)> =
            self.endpoints.iter().filter_map(|(id, it)| Some((*id, it.domain?))).collect();
        for (endpoint, domain) in attached {
            // It is attached there, so it can only fail to be attached to guest memory, which the guest finds out.
            let _ = self.detach(domain, endpoint);
        }
    }
}

/// Groups of devices in software; the host's have numbers of 32 bits.
const GROUPS: u64 = 1 << 32;

/// What of `range` is not in `other`.
fn without(range: IovaRange, other: IovaRange) -> impl Iterator<Item = IovaRange> {
    let part = |start: Option<u64>, last: Option<u64>| {
        IovaRange::new(Iova(start?), Iova(last?)).ok()?.intersection(range)
    };
    let before = part(Some(0), other.start().0.checked_sub(1));
    let after = part(other.last().0.checked_add(1), Some(u64::MAX));
    [before, after].into_iter().flatten()
}

/// Where message-signalled interrupts are written to: nothing is mapped there.
fn interrupts() -> Result<IovaRange, Errno> {
    IovaRange::with_length(Iova(layout::LOCAL_APIC.0), layout::LOCAL_APIC_SIZE)
}

#[cfg(test)]
mod tests;
