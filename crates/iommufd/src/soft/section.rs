//! Reading a [`Table`], section by section.

#![allow(unsafe_code, reason = "what a table has may be looked at, and accessed, in a section only")]

use core::{borrow::BorrowMut, cell::Cell, fmt, marker::PhantomData, sync::atomic::Ordering};
use std::sync::Arc;

use vm_memory::{AtomicAccess, Bytes, VolatileSlice};

use crate::{hostmem, iova::Iova};

use super::{
    access::{Access, Fault, FaultReason, Translation},
    counters::{Counters, Tally},
    epoch::Member,
    table::Table,
};

/// At most `most` bytes of what [`Section::look`] found. None for what is not memory of this process.
///
/// # Safety
/// `found` was found in a section that is open for as long as the slice lives, or by a walk within it, and the slice is
/// written through only if it was found for writing.
#[inline]
pub(super) unsafe fn memory<'a>(found: (Translation, bool), most: usize) -> Option<VolatileSlice<'a>> {
    let (found, true) = found else { return None };
    let length = usize::try_from(found.length).map_or(most, |length| length.min(most));
    // SAFETY: needed because memory of devices' users has no owner in Rust. Sound because who entered the leaf has promised
    // that it is memory until it is taken out and readers were waited for, and the section has not ended, by the caller's word.
    Some(unsafe { hostmem::bytes(found.host, length) })
}

/// The right to read a table, for one thread or device at a time.
pub struct Reader {
    member: Member,
    table: Arc<Table>,
    tally: Tally,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("tally", &self.tally).finish_non_exhaustive()
    }
}

impl Reader {
    /// `member` is of the epoch of `table`.
    pub(super) fn new(table: &Arc<Table>, member: Member, tally: Tally) -> Self {
        Self { member, table: Arc::clone(table), tally }
    }

    /// Waits until nothing moves in the table.
    pub fn settle(&self) {
        self.table.settle();
    }

    /// Opens a section.
    #[inline]
    pub fn section(&mut self) -> Section<&mut Self> {
        Section::open(self)
    }

    /// Opens a section that takes the reader along; [`Section::close`] gives it back.
    pub fn into_section(self) -> Section<Self> {
        Section::open(self)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.table.left(&self.tally);
    }
}

/// While it is open, what it translated stays where it is. It belongs to one thread, and must not be open for long:
/// [`Domain::sync`](crate::domain::Domain::sync) waits for it. A thread that has one open must not unmap and sync.
pub struct Section<R: BorrowMut<Reader>> {
    /// None after [`Self::close`].
    reader: Option<R>,
    done: Cell<Counters>,
    /// A section in two threads would need counters for two.
    _one_thread: PhantomData<Cell<()>>,
}

impl<R: BorrowMut<Reader>> fmt::Debug for Section<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Section").field("done", &self.done).finish_non_exhaustive()
    }
}

impl<R: BorrowMut<Reader>> Section<R> {
    fn open(mut reader: R) -> Self {
        reader.borrow_mut().member.enter();
        Self { reader: Some(reader), done: Cell::default(), _one_thread: PhantomData }
    }

    fn end(&mut self) -> Option<R> {
        let mut reader = self.reader.take()?;
        let inner: &mut Reader = reader.borrow_mut();
        inner.member.leave();
        inner.tally.add(self.done.get());
        Some(reader)
    }

    /// What was done in it until now.
    #[must_use]
    pub fn counters(&self) -> Counters {
        self.done.get()
    }

    /// Ends it: the reader.
    pub fn close(mut self) -> Option<R> {
        self.end()
    }

    /// Where `iova` is, if it may be accessed so.
    ///
    /// # Errors
    /// [`FaultReason::Unmapped`], [`FaultReason::Permission`] and [`FaultReason::Moving`].
    #[inline]
    pub fn translate(&self, iova: Iova, access: Access) -> core::result::Result<Translation, Fault> {
        Ok(self.look(iova, access)?.0)
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

    /// Loads a value at once, which does not cross a page.
    ///
    /// # Errors
    /// As [`Self::read`], and [`FaultReason::Foreign`] for what is not aligned.
    pub fn load<T: AtomicAccess>(&self, iova: Iova, order: Ordering) -> core::result::Result<T, Fault> {
        let access = Access::Read;
        let memory = self.memory(iova, size_of::<T>(), access)?;
        memory.load(0, order).map_err(|_| Fault { iova, access, reason: FaultReason::Foreign })
    }

    /// Stores it. As [`Self::load`].
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn store<T: AtomicAccess>(
        &self,
        iova: Iova,
        value: T,
        order: Ordering,
    ) -> core::result::Result<(), Fault> {
        let access = Access::Write;
        let memory = self.memory(iova, size_of::<T>(), access)?;
        memory.store(value, 0, order).map_err(|_| Fault { iova, access, reason: FaultReason::Foreign })
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
        // SAFETY: the slice does not live longer than the section, nor leave this module.
        unsafe { memory(found, most) }.ok_or(Fault { iova, access, reason: FaultReason::Foreign })
    }

    /// Whether the section's table has `iova` as memory that may be accessed by its address, and where.
    #[inline]
    pub(super) fn look(
        &self,
        iova: Iova,
        access: Access,
    ) -> core::result::Result<(Translation, bool), Fault> {
        let result = match &self.reader {
            Some(reader) => {
                let reader: &Reader = reader.borrow();
                // SAFETY: between `open` and `end` the reader, which is a member of this table's epoch, is inside.
                unsafe { reader.table.translate(iova, access) }
            }
            None => Err(FaultReason::Unmapped),
        };
        let mut done = self.done.get();
        match result {
            Ok(_) => done.translations += 1,
            Err(_) => done.faults += 1,
        }
        self.done.set(done);
        result.map_err(|reason| Fault { iova, access, reason })
    }
}

impl<R: BorrowMut<Reader>> Drop for Section<R> {
    fn drop(&mut self) {
        self.end();
    }
}
