//! Pinning and copying, for those who have no page table.
//!
//! [`Ioas::pin`] and the end of [`Pinned`] are the only pair of functions that pins and unpins a range of addresses,
//! whoever asks: a software device, or a hardware queue that owns its memory.

use std::sync::{Arc, atomic::Ordering};

use vm_memory::AtomicAccess;

use super::{
    Ioas,
    area::{Area, Part},
};
use crate::{
    Errno, Result,
    domain::Prot,
    hostmem::HostRun,
    inject,
    iova::{Iova, IovaRange, PAGE_SIZE},
    pages::Pages,
};

impl Ioas {
    /// Pins the pages of `length` bytes at `iova`, which may be in several areas without a hole between them. Serves
    /// accesses and hardware queues alike: a queue is an `owner`, whose areas cannot be unmapped.
    ///
    /// - EINVAL: `length` is 0; or the range does not begin at the start of a page, or leaves an area or enters one within a
    ///   page; or an area is just being unmapped.
    /// - EOVERFLOW: it goes past the last address.
    /// - EPERM: it is for `write` and an area is read-only (or the other way round).
    /// - ENOENT: a part of it is not mapped.
    /// - ENOMEM, EFAULT: pages cannot be pinned.
    ///
    /// What is wrong first counts, in the order of the addresses. Nothing stays pinned when it fails.
    pub fn pin(&self, iova: Iova, length: u64, write: bool, owner: bool) -> Result<Pinned> {
        let range = IovaRange::with_length(iova, length)?;
        inject::check()?;
        let needed = if write { Prot::WRITE } else { Prot::READ };
        let (parts, complete) = self.busy_parts(range, |part| {
            let page = |byte: u64| part.area.pages.in_page(byte);
            let aligned = page(part.offset) == 0 && (!part.to_end || page(part.offset + part.length) == 0);
            if part.area.is_closing() || !aligned {
                return Err(Errno::INVAL);
            }
            if part.area.prot.contains(needed) { Ok(()) } else { Err(Errno::PERM) }
        });
        let mut pinned = Pinned { parts: Vec::with_capacity(parts.len()), length, write, owner };
        for part in &parts {
            if let Err(errno) = part.area.pages.pin(part.offset, part.length) {
                self.end_parts(&parts);
                return Err(errno);
            }
            part.area.add_pin(owner);
            pinned.parts.push(PinnedPart {
                area: part.area.clone(),
                offset: part.offset,
                length: part.length,
            });
        }
        self.end_parts(&parts);
        complete.map(|()| pinned)
    }

    /// Copies from the memory behind `iova`, any number of bytes across any number of areas.
    ///
    /// - EINVAL: no bytes.
    /// - EOVERFLOW: past the last address.
    /// - ENOENT: a part is not mapped.
    /// - EPERM: an area is not readable.
    /// - EBUSY: an area is just being unmapped.
    /// - EFAULT: the memory is gone.
    ///
    /// What comes before the place of an error is copied.
    pub fn read(&self, iova: Iova, to: &mut [u8]) -> Result<()> {
        let mut rest = to;
        self.copy(iova, rest.len() as u64, Prot::READ, |part| {
            let length = usize::try_from(part.length).map_err(|_| Errno::FAULT)?;
            let (here, after) =
                core::mem::take(&mut rest).split_at_mut_checked(length).ok_or(Errno::FAULT)?;
            rest = after;
            part.area.pages.copy_to(part.offset, here)
        })
    }

    /// Copies to it. As [`Self::read`], and EPERM where an area is not writable.
    pub fn write(&self, iova: Iova, from: &[u8]) -> Result<()> {
        let mut rest = from;
        self.copy(iova, rest.len() as u64, Prot::WRITE, |part| {
            let length = usize::try_from(part.length).map_err(|_| Errno::FAULT)?;
            let (here, after) = rest.split_at_checked(length).ok_or(Errno::FAULT)?;
            rest = after;
            part.area.pages.copy_from(part.offset, here)
        })
    }

    fn copy(
        &self,
        iova: Iova,
        length: u64,
        needed: Prot,
        mut each: impl FnMut(&Part) -> Result<()>,
    ) -> Result<()> {
        let range = IovaRange::with_length(iova, length)?;
        inject::check()?;
        let (parts, complete) = self.busy_parts(range, |part| {
            if part.area.is_closing() {
                return Err(Errno::BUSY);
            }
            if part.area.prot.contains(needed) { Ok(()) } else { Err(Errno::PERM) }
        });
        let copied = parts.iter().try_for_each(&mut each);
        self.end_parts(&parts);
        copied.and(complete)
    }

    /// The parts of `range` that `check` lets pass, up to the first that it does not or that is not mapped. Their areas are
    /// not unmapped before [`Self::end_parts`], although no lock is held.
    fn busy_parts(&self, range: IovaRange, check: impl Fn(&Part) -> Result<()>) -> (Vec<Part>, Result<()>) {
        let mut parts = Vec::with_capacity(1);
        let complete = self.read_areas().walk(range, |part| {
            check(&part)?;
            part.area.begin_busy();
            parts.push(part);
            Ok(())
        });
        (parts, complete)
    }

    fn end_parts(&self, parts: &[Part]) {
        parts.iter().for_each(|part| self.end_busy(&part.area));
    }
}

/// Pages that are pinned until this is dropped.
#[derive(Debug)]
pub struct Pinned {
    parts: Vec<PinnedPart>,
    length: u64,
    write: bool,
    owner: bool,
}

#[derive(Debug)]
struct PinnedPart {
    area: Arc<Area>,
    offset: u64,
    length: u64,
}

impl Pinned {
    /// How many bytes are pinned.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Where the pages are now, in order; neighbours that lie together are one run. A hardware queue that cannot translate
    /// wants one.
    ///
    /// They are good until the program unmaps the addresses of its pages. Who keeps them longer uses [`Self::read`] and
    /// [`Self::write`], which find the pages wherever they are.
    pub fn runs(&self) -> Vec<HostRun> {
        let mut runs: Vec<HostRun> = Vec::new();
        for run in self.parts.iter().flat_map(|part| part.area.pages.runs(part.offset, part.length)) {
            match runs.last_mut() {
                Some(before) if before.start.0 + before.pages * PAGE_SIZE == run.start.0 => {
                    before.pages += run.pages;
                }
                _ => runs.push(run),
            }
        }
        runs
    }

    /// Copies from byte `offset` of the range on. EINVAL when it goes past the end.
    pub fn read(&self, offset: u64, to: &mut [u8]) -> Result<()> {
        let mut rest = to;
        self.each(offset, rest.len(), |pages, offset, length| {
            let (here, after) =
                core::mem::take(&mut rest).split_at_mut_checked(length).ok_or(Errno::INVAL)?;
            rest = after;
            pages.copy_to(offset, here)
        })
    }

    /// Copies to it. EINVAL as in [`Self::read`]; EPERM when it was not pinned for writing.
    pub fn write(&self, offset: u64, from: &[u8]) -> Result<()> {
        if !self.write {
            return Err(Errno::PERM);
        }
        let mut rest = from;
        self.each(offset, from.len(), |pages, offset, length| {
            let (here, after) = rest.split_at_checked(length).ok_or(Errno::INVAL)?;
            rest = after;
            pages.copy_from(offset, here)
        })
    }

    /// Loads a value at once, as another processor would: an index that a guest writes. EINVAL when it goes past the end or is
    /// not aligned in memory.
    pub fn load<T: AtomicAccess>(&self, offset: u64, order: Ordering) -> Result<T> {
        let mut value = Err(Errno::INVAL);
        self.each(offset, size_of::<T>(), |pages, offset, length| {
            if length == size_of::<T>() {
                value = pages.load(offset, order);
            }
            Ok(())
        })?;
        value
    }

    /// Stores it. As [`Self::load`]; EPERM when it was not pinned for writing.
    pub fn store<T: AtomicAccess>(&self, offset: u64, value: T, order: Ordering) -> Result<()> {
        if !self.write {
            return Err(Errno::PERM);
        }
        let mut done = Err(Errno::INVAL);
        self.each(offset, size_of::<T>(), |pages, offset, length| {
            if length == size_of::<T>() {
                done = pages.store(offset, value, order);
            }
            Ok(())
        })?;
        done
    }

    /// Gives the parts of `length` bytes from `offset` on, in order: the store, from which of its bytes on, and how many.
    fn each(
        &self,
        offset: u64,
        length: usize,
        mut each: impl FnMut(&Pages, u64, usize) -> Result<()>,
    ) -> Result<()> {
        let end = offset.checked_add(length as u64).filter(|end| *end <= self.length).ok_or(Errno::INVAL)?;
        let mut start = 0;
        for part in &self.parts {
            let (from, to) = (offset.max(start), end.min(start + part.length));
            if from < to {
                let bytes = usize::try_from(to - from).map_err(|_| Errno::INVAL)?;
                each(&part.area.pages, part.offset + (from - start), bytes)?;
            }
            start += part.length;
        }
        Ok(())
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for part in &self.parts {
            part.area.pages.unpin(part.offset, part.length);
            part.area.remove_pin(self.owner);
        }
    }
}
