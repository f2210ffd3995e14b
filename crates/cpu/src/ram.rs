//! Guest RAM as the processor sees it, and the watch on pages that hold decoded code.
//!
//! # Theory of operation
//! Decoded blocks are valid as long as the bytes they came from. Each 4 KiB page of RAM has a *stamp*:
//! bit 0 says that the page is watched, because some vCPU decodes code from it, bit 1 that every vCPU knows
//! it, and the other bits count how often the page was written while watched. A block is made only from a page
//! with both bits set; it remembers the stamp, and when they differ its bytes are looked at again.
//!
//! Writers are made to notice: a vCPU never has a writable TLB entry for a watched page, so that its
//! stores to it take the slow path, which notes the write; devices write through
//! `vm-memory`, whose dirty-bitmap hook does the same. When a page becomes watched, other vCPUs may still
//! hold writable TLB entries for it; `group` makes them drop these before the page is decoded.
//!
//! Who writes past both, as hardware does, has [`PageStamps::suspect`] called before the guest can know. That counts as a
//! write, but the page stays watched: the vCPUs have no writable entries for it still, and it is most likely code still.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use mmu::Gpa;
use vm_memory::bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryMmap, GuestMemoryRegion};

use crate::data::Data;
use crate::group::VcpuGroup;
use crate::hostmem;

/// Guest memory: `vm-memory` with [`PageStamps`] as its dirty-bitmap hook.
pub type GuestRam = GuestMemoryMmap<PageStamps>;

const WATCHED: u32 = 1 << 0;
/// The hand-shake of [`VcpuGroup`] is over: no vCPU has a writable TLB entry for the page.
const READY: u32 = 1 << 1;
/// One write.
const COUNT: u32 = 1 << 2;
const PAGE: usize = 4096;

/// The stamps of the pages of one memory region.
#[derive(Clone, Default)]
pub struct PageStamps {
    stamps: Arc<[AtomicU32]>,
}

impl fmt::Debug for PageStamps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageStamps({} pages)", self.stamps.len())
    }
}

impl PageStamps {
    /// The stamps of the pages that `len` bytes at `offset` are in, as far as the region goes.
    fn of_bytes(&self, offset: usize, len: usize) -> &[AtomicU32] {
        let end = offset.saturating_add(len).div_ceil(PAGE).min(self.stamps.len());
        let first = if len == 0 { end } else { offset / PAGE };
        self.stamps.get(first..end).unwrap_or_default()
    }

    /// Notes that `len` bytes at `offset` of the region may have been written to unseen, before this: what was decoded from
    /// their pages is compared with what is there before it runs again.
    pub fn suspect(&self, offset: usize, len: usize) {
        // As in `mark_dirty`.
        fence(Ordering::SeqCst);
        for stamp in self.of_bytes(offset, len) {
            // The count wraps around into nothing.
            if stamp.load(Ordering::Acquire) & WATCHED != 0 {
                stamp.fetch_add(COUNT, Ordering::AcqRel);
            }
        }
    }
}

#[inline]
fn note_write(stamp: &AtomicU32) {
    let seen = stamp.load(Ordering::Acquire);
    if seen & WATCHED != 0 {
        // Clears the marks and counts one write.
        let written = |s: u32| (s & WATCHED != 0).then(|| (s & !(WATCHED | READY)).wrapping_add(COUNT));
        // An error means that another writer has done it.
        let _ = stamp.fetch_update(Ordering::AcqRel, Ordering::Acquire, written);
    }
}

impl<'a> WithBitmapSlice<'a> for PageStamps {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for PageStamps {
    fn mark_dirty(&self, offset: usize, len: usize) {
        // The bytes, written before this, must be visible before the stamp is read: a vCPU that marks
        // the page later than that then decodes the new bytes. (vCPUs need no fence: they take part in
        // the hand-shake.)
        fence(Ordering::SeqCst);
        self.of_bytes(offset, len).iter().for_each(note_write);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.stamps.get(offset / PAGE).is_some_and(|s| s.load(Ordering::Acquire) & WATCHED == 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl NewBitmap for PageStamps {
    fn with_len(len: usize) -> Self {
        Self { stamps: (0..len.div_ceil(PAGE)).map(|_| AtomicU32::new(0)).collect() }
    }
}

/// One page of guest RAM.
#[derive(Clone, Copy)]
pub struct RamPage<'a> {
    /// Where the page starts in the host's address space.
    pub(crate) host: usize,
    stamp: &'a AtomicU32,
}

impl RamPage<'_> {
    /// The page's stamp.
    #[inline(always)]
    pub(crate) fn stamp(&self) -> u32 {
        self.stamp.load(Ordering::Acquire)
    }

    /// Whether code was decoded from the page.
    pub(crate) fn is_watched(&self) -> bool {
        self.stamp() & WATCHED != 0
    }

    /// Notes that the page was written: decoded code from it is invalid from now on.
    pub(crate) fn note_write(&self) {
        note_write(self.stamp);
    }

    /// Reads a `T` at the naturally aligned `offset`.
    #[inline]
    pub(crate) fn load_at<T: Data>(&self, offset: u16) -> T {
        // SAFETY: needed to read RAM that others write; the page is mapped as long as the borrowed `Ram` lives,
        // and an aligned `T` does not leave it.
        unsafe { hostmem::load(self.host + (usize::from(offset) & (PAGE - T::SIZE as usize))) }
    }

    /// Writes a `T` at the naturally aligned `offset`. The caller sees to it that the page is not watched.
    #[inline]
    pub(crate) fn store_at<T: Data>(&self, offset: u16, value: T) {
        // SAFETY: as in `load_at`.
        unsafe { hostmem::store(self.host + (usize::from(offset) & (PAGE - T::SIZE as usize)), value) };
    }

    /// The stamp, if blocks may be made from the page.
    pub(crate) fn ready(&self) -> Option<u32> {
        let stamp = self.stamp();
        (stamp & (WATCHED | READY) == WATCHED | READY).then_some(stamp)
    }

    /// Marks the page watched; returns the stamp, by which the hand-shake that follows is known.
    pub(crate) fn watch(&self) -> u32 {
        self.stamp.fetch_or(WATCHED, Ordering::AcqRel) | WATCHED
    }

    /// The hand-shake that began at `stamp` is over. It counts only if the page was not written meanwhile: then
    /// it was not watched for a while, and if it is again, that is for another hand-shake, which vCPUs that
    /// answered this one need not have answered.
    pub(crate) fn set_ready(&self, stamp: u32) {
        let (from, to) = (stamp & !READY, stamp | READY);
        let _ = self.stamp.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire);
    }
}

struct Region {
    start: u64,
    len: u64,
    host: usize,
    stamps: PageStamps,
}

/// Guest RAM with the tables that the processor's fast paths need.
pub struct Ram {
    regions: Vec<Region>,
    /// Keeps the mappings behind `Region::host` alive.
    memory: GuestRam,
    group: VcpuGroup,
}

impl fmt::Debug for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ram").field("memory", &self.memory).finish_non_exhaustive()
    }
}

impl Ram {
    /// Takes `memory`, whose regions start and end on 4 KiB boundaries (a ragged end is left out).
    pub fn new(memory: GuestRam) -> Self {
        let regions = memory
            .iter()
            .map(|r| Region {
                start: r.start_addr().0,
                len: r.len() & !(PAGE as u64 - 1),
                host: r.as_ptr() as usize,
                stamps: vm_memory::MmapRegion::bitmap(r).clone(),
            })
            .collect();
        Self { regions, memory, group: VcpuGroup::default() }
    }

    /// The memory, for whoever accesses it as devices do.
    pub fn memory(&self) -> &GuestRam {
        &self.memory
    }

    /// The vCPUs that share this RAM.
    pub(crate) fn group(&self) -> &VcpuGroup {
        &self.group
    }

    /// The page that holds `gpa`, if it is RAM.
    #[inline]
    pub(crate) fn page(&self, gpa: Gpa) -> Option<RamPage<'_>> {
        for region in &self.regions {
            let offset = gpa.0.wrapping_sub(region.start);
            if offset < region.len {
                let page = (offset as usize) / PAGE;
                return Some(RamPage {
                    host: region.host + page * PAGE,
                    stamp: region.stamps.stamps.get(page)?,
                });
            }
        }
        None
    }

    /// Reads a naturally aligned `T`, or `None` where there is no RAM.
    #[inline]
    pub(crate) fn read<T: Data>(&self, gpa: Gpa) -> Option<T> {
        let page = self.page(gpa)?;
        debug_assert!(gpa.0.is_multiple_of(T::SIZE));
        // SAFETY: needed to read RAM that others write; `page` is mapped as long as `memory` lives, and an
        // aligned `T` does not leave the page.
        Some(unsafe { hostmem::load(page.host + (gpa.page_offset() & !(T::SIZE - 1)) as usize) })
    }

    /// Replaces a naturally aligned `T` if it is `old` still; says whether it was.
    pub(crate) fn compare_exchange<T: Data>(&self, gpa: Gpa, old: T, new: T) -> Option<bool> {
        let page = self.page(gpa)?;
        let address = page.host + (gpa.page_offset() & !(T::SIZE - 1)) as usize;
        // SAFETY: as in `read`.
        let seen = unsafe { hostmem::compare_exchange(address, old, new) };
        page.note_write();
        Some(seen == old)
    }

    /// Copies from RAM; `false`, with `buffer` partly filled, where the range leaves RAM.
    pub fn copy_from(&self, gpa: Gpa, buffer: &mut [u8]) -> bool {
        use vm_memory::Bytes as _;
        self.memory.read_slice(buffer, GuestAddress(gpa.0)).is_ok()
    }
}

impl mmu::PageTableMemory for Ram {
    #[inline]
    fn read_u32(&self, gpa: Gpa) -> Option<u32> {
        self.read(gpa)
    }

    #[inline]
    fn read_u64(&self, gpa: Gpa) -> Option<u64> {
        self.read(gpa)
    }

    fn compare_exchange_u32(&self, gpa: Gpa, old: u32, new: u32) -> Option<bool> {
        self.compare_exchange(gpa, old, new)
    }

    fn compare_exchange_u64(&self, gpa: Gpa, old: u64, new: u64) -> Option<bool> {
        self.compare_exchange(gpa, old, new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGES: usize = 200;

    fn ram() -> Ram {
        Ram::new(GuestRam::from_ranges(&[(GuestAddress(0), PAGES * PAGE)]).unwrap())
    }

    #[test]
    fn a_hand_shake_does_not_count_for_the_next_one() {
        let ram = ram();
        let page = ram.page(Gpa(0)).unwrap();
        let first = page.watch();
        page.note_write();
        let second = page.watch();
        page.set_ready(first);
        assert_eq!(page.ready(), None, "watched by the second, which is not over");
        page.set_ready(second);
        assert_eq!(page.ready(), Some(second | READY));
    }

    #[test]
    fn a_suspected_page_stays_watched_and_has_another_stamp() {
        let ram = ram();
        let stamps = ram.regions[0].stamps.clone();
        let [before, page, after] = [1, 2, 3].map(|n| ram.page(Gpa(n * PAGE as u64)).unwrap());
        for page in [before, page, after] {
            page.set_ready(page.watch());
        }
        let stamp = page.ready().unwrap();
        stamps.suspect(2 * PAGE + 17, PAGE - 17);
        assert!(page.ready().is_some_and(|now| now != stamp));
        assert_eq!((before.ready(), after.ready()), (Some(stamp), Some(stamp)));
        // What is past the end is nobody's, and what nobody watches has nothing to lose.
        stamps.suspect((PAGES - 1) * PAGE, usize::MAX);
        stamps.suspect(PAGES * PAGE, 1);
        stamps.suspect(0, 0);
        assert_eq!(ram.page(Gpa(((PAGES - 1) * PAGE) as u64)).unwrap().stamp(), 0);
        // A hand-shake that it comes into does not count.
        page.note_write();
        let stamp = page.watch();
        stamps.suspect(2 * PAGE, 1);
        page.set_ready(stamp);
        assert_eq!(page.ready(), None);
    }
}
