//! The software IOMMU as [`Hardware`]: what a software device is bound with, and the door its DMA goes through.
//!
//! A [`SoftDevice`] has one [`Port`] for its plain DMA and one for each PASID. A port knows the domain that it is attached to
//! now. Attaching is rare and translating is not, so a [`PortReader`] keeps a reader of that domain and looks at a
//! generation number only. The port has an [`Epoch`] of its own: [`Hardware::attach`] returns when no section is
//! open that began with the domain before.

use core::{
    any::Any,
    borrow::BorrowMut,
    sync::atomic::{AtomicU64, Ordering},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::{
    Errno, Result,
    caller::Caller,
    domain::Domain,
    hardware::{Attachment, Capabilities, DomainOptions, Hardware, UserData},
    iova::{Iova, IovaRange},
};

use super::{
    counters::{CounterSet, Counters, Tally},
    domain::SoftDomain,
    epoch::{Epoch, Member},
    table::{Access, Fault, FaultReason, Reader, Section, Translation},
};

/// `enum iommu_hw_info_type`: none. It is also what is asked for by default.
const INFO_NONE: u32 = 0;
/// log2 of the PASIDs that a PCI device can have (PCI Express 6.0, section 7.8.9).
const MAX_PASID_LOG2: u8 = 20;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A device behind the software IOMMU.
#[derive(Debug)]
pub struct SoftDevice {
    group: u64,
    reserved: Vec<IovaRange>,
    plain: Arc<Port>,
    pasids: Mutex<BTreeMap<u32, Arc<Port>>>,
}

impl SoftDevice {
    /// A device in a group of its own number, for which nothing may be mapped in `reserved`.
    #[must_use]
    pub fn new(group: u64, reserved: Vec<IovaRange>) -> Arc<Self> {
        Arc::new(Self { group, reserved, plain: Port::new(), pasids: Mutex::default() })
    }

    /// The port of its DMA without a PASID, or of one PASID.
    #[must_use]
    pub fn port(&self, pasid: Option<u32>) -> Arc<Port> {
        match pasid {
            None => Arc::clone(&self.plain),
            Some(pasid) => Arc::clone(lock(&self.pasids).entry(pasid).or_insert_with(Port::new)),
        }
    }
}

impl Hardware for SoftDevice {
    fn group(&self) -> u64 {
        self.group
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::DIRTY_TRACKING | Capabilities::CACHE_COHERENCY
    }

    fn reserved(&self) -> Vec<IovaRange> {
        self.reserved.clone()
    }

    fn max_pasid_log2(&self) -> u8 {
        MAX_PASID_LOG2
    }

    /// EOPNOTSUPP for a parent of nested domains, and for a driver's own data: it has neither.
    fn alloc_paging(
        &self,
        _caller: Option<&dyn Caller>,
        options: DomainOptions,
        data: UserData,
    ) -> Result<Arc<dyn Domain>> {
        if options.nest_parent || data.kind != INFO_NONE {
            return Err(Errno::OPNOTSUPP);
        }
        Ok(Arc::new(SoftDomain::new()))
    }

    /// EINVAL for a domain that is not of this IOMMU's making.
    fn attach(&self, pasid: Option<u32>, to: Option<&Attachment>) -> Result<()> {
        let domain = match to {
            None => None,
            Some(Attachment::Paging(domain)) => {
                let domain: &dyn Any = &**domain;
                Some(domain.downcast_ref::<SoftDomain>().ok_or(Errno::INVAL)?.clone())
            }
            Some(Attachment::Nested(_)) => return Err(Errno::INVAL),
        };
        if pasid.is_some_and(|pasid| pasid >> MAX_PASID_LOG2 != 0) {
            return Err(Errno::INVAL);
        }
        self.port(pasid).attach(domain);
        Ok(())
    }

    fn info(&self, kind: u32) -> Result<(u32, Vec<u8>)> {
        if kind == INFO_NONE { Ok((INFO_NONE, Vec::new())) } else { Err(Errno::OPNOTSUPP) }
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        self
    }
}

/// What DMA of one device, or of one PASID of it, goes through.
#[derive(Debug)]
pub struct Port {
    /// Which of all attachments it has now.
    generation: AtomicU64,
    domain: Mutex<Option<SoftDomain>>,
    epoch: Arc<Epoch>,
    counters: CounterSet,
}

impl Port {
    /// One that is attached to nothing.
    fn new() -> Arc<Self> {
        Arc::new(Self {
            generation: AtomicU64::new(0),
            domain: Mutex::default(),
            epoch: Epoch::new(),
            counters: CounterSet::default(),
        })
    }

    /// Attaches it to another domain: after this returns nothing is accessed by the domain before.
    fn attach(&self, domain: Option<SoftDomain>) {
        let before = {
            let mut current = lock(&self.domain);
            self.generation.fetch_add(1, Ordering::Release);
            core::mem::replace(&mut *current, domain)
        };
        // A section that began with nothing accesses nothing. So who has only such ones open may attach.
        if before.is_some() {
            self.epoch.synchronize();
        }
    }

    /// The domain that it is attached to.
    #[must_use]
    pub fn domain(&self) -> Option<SoftDomain> {
        lock(&self.domain).clone()
    }

    /// What was done through it until now, whatever it was attached to.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.counters.sum()
    }

    /// A new reader. Each thread that does DMA has one of its own.
    #[must_use]
    pub fn reader(self: &Arc<Self>) -> PortReader {
        let mut reader = PortReader {
            member: self.epoch.join(),
            tally: self.counters.join(),
            port: Arc::clone(self),
            generation: 0,
            reader: None,
        };
        reader.follow();
        reader
    }
}

/// The right to translate through a port, for one thread at a time.
#[derive(Debug)]
pub struct PortReader {
    member: Member,
    tally: Tally,
    port: Arc<Port>,
    generation: u64,
    /// None while the port is attached to nothing.
    reader: Option<Reader>,
}

impl Drop for PortReader {
    fn drop(&mut self) {
        self.port.counters.leave(&self.tally);
    }
}

impl PortReader {
    /// Takes over the port's present attachment.
    #[cold]
    fn follow(&mut self) {
        let domain = lock(&self.port.domain);
        // It changes under the mutex only.
        self.generation = self.port.generation.load(Ordering::Acquire);
        self.reader = domain.as_ref().map(SoftDomain::reader);
    }

    /// Opens a section.
    #[inline]
    pub fn section(&mut self) -> PortSection<&mut Self> {
        PortSection::open(self)
    }

    /// Opens a section that takes the reader along; [`PortSection::close`] gives it back.
    #[must_use]
    pub fn into_section(self) -> PortSection<Self> {
        PortSection::open(self)
    }
}

/// As [`Section`], of whatever the port is attached to. While it is open the port is not attached to anything else.
#[derive(Debug)]
pub struct PortSection<P: BorrowMut<PortReader>> {
    /// None after [`Self::close`].
    port: Option<P>,
    /// None while the port is attached to nothing.
    section: Option<Section<Reader>>,
}

impl<P: BorrowMut<PortReader>> PortSection<P> {
    #[inline]
    fn open(mut port: P) -> Self {
        let reader: &mut PortReader = port.borrow_mut();
        reader.member.enter();
        if reader.port.generation.load(Ordering::Acquire) != reader.generation {
            reader.follow();
        }
        let section = reader.reader.take().map(Reader::into_section);
        Self { port: Some(port), section }
    }

    #[inline]
    fn end(&mut self) -> Option<P> {
        let mut port = self.port.take()?;
        let reader: &mut PortReader = port.borrow_mut();
        if let Some(section) = self.section.take() {
            reader.tally.add(section.counters());
            reader.reader = section.close();
        }
        reader.member.leave();
        Some(port)
    }

    /// Ends it: the reader.
    pub fn close(mut self) -> Option<P> {
        self.end()
    }

    /// Where `iova` is, if it may be accessed so.
    ///
    /// # Errors
    /// As [`Section::translate`], and [`FaultReason::Detached`].
    #[inline]
    pub fn translate(&self, iova: Iova, access: Access) -> core::result::Result<Translation, Fault> {
        match &self.section {
            Some(section) => section.translate(iova, access),
            None => Err(Fault { iova, access, reason: FaultReason::Detached }),
        }
    }
}

impl<P: BorrowMut<PortReader>> Drop for PortSection<P> {
    fn drop(&mut self) {
        self.end();
    }
}
