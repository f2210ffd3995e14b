//! Copies from and to the memory of a backing store.
#![allow(unsafe_code, reason = "pinned memory is reached by its address")]

use std::sync::atomic::Ordering;

use vm_memory::{AtomicAccess, Bytes, VolatileSlice};

use super::{Pages, State};
use crate::{Errno, Result, domain::HostAddr, hostmem, iova::PAGE_SIZE};

/// A stretch of memory of a store.
enum Stretch<'a> {
    /// It is pinned.
    Pinned(VolatileSlice<'a>),
    /// It is not; so many bytes.
    Unpinned(usize),
}

impl Pages {
    /// Copies from byte `offset` on; the range is in the store. Pages need not be pinned. EFAULT when they are gone,
    /// ENODEV when they were revoked.
    pub(crate) fn copy_to(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        let mut done = 0;
        self.stretches(offset, to.len(), |at, stretch| {
            let n = match stretch {
                Stretch::Pinned(memory) => {
                    let n = memory.len();
                    let part = to.get_mut(done..done + n).ok_or(Errno::FAULT)?;
                    memory.copy_to(part);
                    n
                }
                Stretch::Unpinned(n) => {
                    let part = to.get_mut(done..done + n).ok_or(Errno::FAULT)?;
                    self.memory.read(at, part)?;
                    n
                }
            };
            done += n;
            Ok(())
        })
    }

    /// Copies to it. As [`Self::copy_to`], and EPERM when it is read-only.
    pub(crate) fn copy_from(&self, offset: u64, from: &[u8]) -> Result<()> {
        if !self.may_write() {
            return Err(Errno::PERM);
        }
        let mut rest = from;
        self.stretches(offset, from.len(), |at, stretch| {
            let n = match &stretch {
                Stretch::Pinned(memory) => memory.len(),
                Stretch::Unpinned(n) => *n,
            };
            let (part, after) = rest.split_at_checked(n).ok_or(Errno::FAULT)?;
            rest = after;
            match stretch {
                Stretch::Pinned(memory) => memory.copy_from(part),
                Stretch::Unpinned(_) => self.memory.write(at, part)?,
            }
            Ok(())
        })
    }

    /// Loads a value of pinned memory at once. EINVAL when it is not aligned.
    pub(crate) fn load<T: AtomicAccess>(&self, offset: u64, order: Ordering) -> Result<T> {
        let mut value = None;
        self.stretches(offset, size_of::<T>(), |_, stretch| {
            let Stretch::Pinned(memory) = stretch else { return Err(Errno::FAULT) };
            value = Some(memory.load(0, order).map_err(|_| Errno::INVAL)?);
            Ok(())
        })?;
        value.ok_or(Errno::FAULT)
    }

    /// Stores it. EINVAL when it is not aligned, EPERM when the store is read-only.
    pub(crate) fn store<T: AtomicAccess>(&self, offset: u64, value: T, order: Ordering) -> Result<()> {
        if !self.may_write() {
            return Err(Errno::PERM);
        }
        self.stretches(offset, size_of::<T>(), |_, stretch| {
            let Stretch::Pinned(memory) = stretch else { return Err(Errno::FAULT) };
            memory.store(value, 0, order).map_err(|_| Errno::INVAL)
        })
    }

    fn may_write(&self) -> bool {
        self.writable && self.memory.may_write()
    }

    /// Gives the memory of `length` bytes from `offset` on, piece by piece, each with the byte of the memory (from its first
    /// page on) that it begins at. Pinned pages do not move meanwhile.
    fn stretches(
        &self,
        offset: u64,
        length: usize,
        mut each: impl FnMut(u64, Stretch<'_>) -> Result<()>,
    ) -> Result<()> {
        if length == 0 {
            return Ok(());
        }
        let span = self.span(offset, length as u64);
        let state = self.settled_read(span);
        if state.revoked {
            return Err(Errno::NODEV);
        }
        let first = self.lead + offset;
        if state.users.gaps(span) == [span] {
            // Nobody keeps the lock while user memory that is not pinned faults in.
            drop(state);
            return each(first, Stretch::Unpinned(length));
        }
        let mut done = 0;
        while done < length {
            let at = first + done as u64;
            let stretch = state.stretch(at, length - done);
            done += match &stretch {
                Stretch::Pinned(memory) => memory.len(),
                Stretch::Unpinned(n) => *n,
            };
            each(at, stretch)?;
        }
        Ok(())
    }
}

impl State {
    /// The memory from byte `at` on, at most `most` bytes, at least one.
    fn stretch(&self, at: u64, most: usize) -> Stretch<'_> {
        let (page, in_page) = (at / PAGE_SIZE, at % PAGE_SIZE);
        let bounded = |bytes: u64| usize::try_from(bytes).map_or(most, |bytes| bytes.min(most));
        let Some(run) = self.held.run(page) else {
            let next = self.held.next(page).map(|next| next * PAGE_SIZE - at);
            return Stretch::Unpinned(next.map_or(most, bounded));
        };
        let length = bounded(run.pages * PAGE_SIZE - in_page);
        // SAFETY: needed because pinned memory has no owner in Rust. Sound because the bytes are in a run of a pin that
        // `self` keeps; neither is it dropped while `self` is borrowed, nor do its pages move, because the store's
        // `moving`, which a move waits for, needs the lock around `self` for itself. A store writes only if its
        // memory may be written to, and pins its pages so then.
        Stretch::Pinned(unsafe { hostmem::bytes(HostAddr(run.start.0 + in_page), length) })
    }
}
