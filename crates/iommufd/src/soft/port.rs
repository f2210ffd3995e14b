//! The door that a software device's DMA goes through.
//!
//! A [`Port`] knows what it is attached to now: a domain of the host's, or a guest's page table. Attaching is rare and
//! translating is not, so a [`PortReader`] keeps a reader of that and looks at a generation number only. The
//! port has an [`Epoch`] of its own: attaching returns when no section is open that began with what was there before.

#![allow(unsafe_code, reason = "what was found in a section may be accessed in it")]

use core::{
    borrow::BorrowMut,
    cell::{Cell, RefCell},
    sync::atomic::{AtomicU64, Ordering},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::VolatileSlice;

use super::{
    access::{Access, Fault, FaultReason, Translation},
    counters::{CounterSet, Counters, Tally},
    domain::SoftDomain,
    epoch::{Epoch, Member},
    section::{Reader, Section, memory},
    vtd::GuestTable,
};
use crate::iova::Iova;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a port is attached to.
#[derive(Clone, Debug)]
pub(super) enum Attached {
    /// A domain of the host's.
    Host(SoftDomain),
    /// A guest's page table.
    Guest {
        table: Arc<GuestTable>,
        /// By what id the guest knows the device.
        source: u16,
    },
}

/// What DMA of one device, or of one PASID of it, goes through.
#[derive(Debug)]
pub struct Port {
    /// Which of all attachments it has now.
    generation: AtomicU64,
    attached: Mutex<Option<Attached>>,
    epoch: Arc<Epoch>,
    counters: CounterSet,
}

impl Port {
    /// One that is attached to nothing.
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            generation: AtomicU64::new(0),
            attached: Mutex::default(),
            epoch: Epoch::new(),
            counters: CounterSet::default(),
        })
    }

    /// Attaches it to something else: after this returns nothing is accessed by what it was attached to before.
    pub(super) fn attach(&self, attached: Option<Attached>) {
        let before = {
            let mut current = lock(&self.attached);
            self.generation.fetch_add(1, Ordering::Release);
            core::mem::replace(&mut *current, attached)
        };
        // A section that began with nothing accesses nothing. So who has only such ones open may attach.
        if before.is_some() {
            self.epoch.synchronize();
        }
    }

    /// Whether it is attached to anything.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        lock(&self.attached).is_some()
    }

    /// A fault was not only looked for, but met: the guest whose page table it was is told.
    pub fn report(&self, fault: &Fault) {
        let attached = lock(&self.attached).clone();
        if let Some(Attached::Guest { table, source }) = attached {
            table.unit().fault(source, fault);
        }
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
            guest: None,
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
    /// The guest's table that it is attached to, and a reader of the parent to walk it with.
    guest: Option<(Arc<GuestTable>, RefCell<Reader>)>,
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
        let attached = lock(&self.port.attached);
        // It changes under the mutex only.
        self.generation = self.port.generation.load(Ordering::Acquire);
        (self.reader, self.guest) = match &*attached {
            None => (None, None),
            Some(Attached::Host(domain)) => (Some(domain.reader()), None),
            Some(Attached::Guest { table, .. }) => {
                let parent = RefCell::new(table.parent_reader());
                (Some(table.reader()), Some((Arc::clone(table), parent)))
            }
        };
    }

    /// Waits until nothing moves: what to do about [`FaultReason::Moving`], outside of sections.
    pub fn settle(&mut self) {
        match (&mut self.guest, &self.reader) {
            (Some((_, parent)), _) => parent.get_mut().settle(),
            (None, Some(reader)) => reader.settle(),
            (None, None) => {}
        }
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
    /// How often a fault of the section was none, because the guest's table had a translation.
    walked: Cell<u64>,
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
        Self { port: Some(port), section, walked: Cell::new(0) }
    }

    #[inline]
    fn end(&mut self) -> Option<P> {
        let mut port = self.port.take()?;
        let reader: &mut PortReader = port.borrow_mut();
        if let Some(section) = self.section.take() {
            let Counters { translations, faults } = section.counters();
            let walked = self.walked.get();
            let done =
                Counters { translations: translations + walked, faults: faults.saturating_sub(walked) };
            reader.tally.add(done);
            reader.reader = section.close();
        }
        reader.member.leave();
        if let Some((table, _)) = &reader.guest {
            table.tidy();
        }
        Some(port)
    }

    /// Ends it: the reader.
    pub fn close(mut self) -> Option<P> {
        self.end()
    }

    /// Where `iova` is, if it may be accessed so. Who finds a fault that way has not met it yet: see [`Port::report`].
    ///
    /// # Errors
    /// As [`Section::translate`], [`FaultReason::Detached`], and what can be wrong with a guest's page table.
    #[inline]
    pub fn translate(&self, iova: Iova, access: Access) -> core::result::Result<Translation, Fault> {
        // What was found is not passed on through memory: it would be written in parts and read back as a whole, which costs
        // as much as finding it.
        match self.cached(iova, access) {
            Ok((found, _)) => Ok(found),
            Err(fault) => self.walk_only(fault),
        }
    }

    /// Copies from the memory at `iova`, as much as lies together: how many bytes, at least one unless `to` is empty.
    ///
    /// # Errors
    /// As [`Self::translate`], and [`FaultReason::Foreign`] for what is not entered as memory of this process.
    pub fn read(&self, iova: Iova, to: &mut [u8]) -> core::result::Result<usize, Fault> {
        Ok(self.memory(iova, to.len(), Access::Read)?.copy_to(to))
    }

    /// Copies to it. As [`Self::read`].
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write(&self, iova: Iova, from: &[u8]) -> core::result::Result<usize, Fault> {
        let memory = self.memory(iova, from.len(), Access::Write)?;
        memory.copy_from(from);
        Ok(memory.len())
    }

    #[inline]
    fn look(&self, iova: Iova, access: Access) -> core::result::Result<(Translation, bool), Fault> {
        match self.cached(iova, access) {
            Err(fault) => self.walk(fault),
            found => found,
        }
    }

    /// What is there without looking into a guest's table.
    #[inline]
    fn cached(&self, iova: Iova, access: Access) -> core::result::Result<(Translation, bool), Fault> {
        match &self.section {
            Some(section) => section.look(iova, access),
            None => Err(Fault { iova, access, reason: FaultReason::Detached }),
        }
    }

    /// What the IOTLB has not, the guest's table may have.
    #[cold]
    fn walk(&self, fault: Fault) -> core::result::Result<(Translation, bool), Fault> {
        let port: Option<&PortReader> = self.port.as_ref().map(|port| port.borrow());
        let guest = port.and_then(|port| port.guest.as_ref());
        let (Some((table, parent)), Some(section)) = (guest, &self.section) else { return Err(fault) };
        let Fault { iova, access, .. } = fault;
        // It is borrowed in this function only, which nothing below calls.
        let found = table.walk(section, &mut parent.borrow_mut(), iova, access);
        if found.is_ok() {
            self.walked.set(self.walked.get() + 1);
        }
        found.map_err(|reason| Fault { iova, access, reason })
    }

    #[cold]
    fn walk_only(&self, fault: Fault) -> core::result::Result<Translation, Fault> {
        Ok(self.walk(fault)?.0)
    }

    /// The memory at `iova`, at most `most` bytes of it, which is only used for `access`.
    #[inline]
    fn memory(
        &self,
        iova: Iova,
        most: usize,
        access: Access,
    ) -> core::result::Result<VolatileSlice<'_>, Fault> {
        let found = self.look(iova, access)?;
        // SAFETY: the slice does not live longer than the open section, nor leave this module.
        unsafe { memory(found, most) }.ok_or(Fault { iova, access, reason: FaultReason::Foreign })
    }
}

impl<P: BorrowMut<PortReader>> Drop for PortSection<P> {
    fn drop(&mut self) {
        self.end();
    }
}
