//! The radix table, and reading it without a lock.
//!
//! # Theory of operation
//!
//! Four levels of 512 entries, as x86's page tables, but of this process's pointers. An entry is nothing, a node of the
//! level below, or a leaf: a host address with flags in its low bits. A leaf's host address need only be aligned to
//! 4 KiB, whatever the leaf's size: nobody concatenates addresses here.
//!
//! Changes are made under the mutex of [`Table`], whose guard also has the nodes that were taken out. Readers follow
//! entries with acquire loads, which pair with the release stores that put a node in after it was filled. A node that is taken
//! out stays whole until a grace period has passed.
//!
//! The one change that readers make is the dirty bit of a leaf, by compare-exchange on the whole entry: so a leaf that was
//! taken out meanwhile stays out, and the reader looks again.
//!
//! A table can be a cache of something else: [`Table::generation`] is read before the something is, and [`Table::cache`] enters
//! what was found only if [`Table::invalidate`] was not called since. So what was read before an invalidation is never
//! entered after it.
//!
//! Memory that moves is taken out as any other, but its place is remembered ([`Table::suspend`]) until it is mapped again:
//! who finds nothing there is told to wait rather than that nothing is mapped.
//!
//! # `unsafe`
//!
//! An entry is a pointer that the borrow checker cannot follow. The rules that make it sound are in this file and in `section`:
//! a node in the table is a leaked box, and becomes a box again in two places: after
//! [`Epoch::synchronize`](super::epoch::Epoch::synchronize) since it was taken out, and in the table's own drop. Nodes are
//! followed under the mutex, or inside a [`Section`](super::Section), which a [`Reader`] of the same table enters and leaves.
//!
//! A leaf with [`flag::MEMORY`] is memory that may be accessed by its address inside a section. Only
//! [`Table::map_memory`] and [`Table::cache`] set it, which are `unsafe` for that.

#![allow(unsafe_code, reason = "the entries of a table that is read without locks are raw pointers")]

use core::{
    fmt, ptr,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU16, AtomicU64, AtomicUsize, Ordering},
};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::{
    Errno, Result,
    domain::{DirtySink, HostAddr, Prot},
    iova::{Iova, IovaRange},
};

use super::{
    access::{Access, FaultReason, Translation},
    counters::{CounterSet, Counters, Tally},
    epoch::Epoch,
    section::Reader,
};

const PAGE_SHIFT: u32 = 12;
/// log2 of the entries of a node.
const NODE_SHIFT: u32 = 9;
const ENTRIES: usize = 1 << NODE_SHIFT;
/// The root's level; leaves of single pages are in nodes of level 0.
const TOP: u32 = 3;
/// The highest level that has leaves: 1 GiB.
const TOP_LEAF: u32 = 2;

/// How many bits of an address are translated.
pub(super) const ADDRESS_BITS: u32 = PAGE_SHIFT + NODE_SHIFT * (TOP + 1);
/// The last address that is translated.
pub(super) const LAST_ADDRESS: u64 = (1 << ADDRESS_BITS) - 1;
/// The sizes of leaves, one bit each.
pub(super) const LEAF_SIZES: u64 = span(0) | span(1) | span(TOP_LEAF);

/// How many taken-out nodes are kept before somebody must wait for readers: 16 MiB of them.
const GARBAGE_LIMIT: usize = 4096;

/// How many bytes an entry of a level translates.
const fn span(level: u32) -> u64 {
    1 << (PAGE_SHIFT + NODE_SHIFT * level)
}

/// Which entry of a node of `level` translates `iova`.
#[inline]
fn index(iova: u64, level: u32) -> usize {
    (iova >> (PAGE_SHIFT + NODE_SHIFT * level)) as usize % ENTRIES
}

/// The flags of a leaf. The first three are those of [`Prot`].
mod flag {
    use crate::domain::Prot;

    pub(super) const READ: usize = Prot::READ.bits() as usize;
    pub(super) const WRITE: usize = Prot::WRITE.bits() as usize;
    pub(super) const PROT: usize = Prot::all().bits() as usize;
    /// It is a leaf. A pointer to a node has this bit clear by its alignment.
    pub(super) const LEAF: usize = 8;
    /// It was written to while writes were tracked.
    pub(super) const DIRTY: usize = 16;
    /// It is memory of this process, which stays while it may be found here.
    pub(super) const MEMORY: usize = 32;
    /// Everything that is not the host's address.
    pub(super) const ALL: usize = 0xfff;
}

/// A value of an entry.
#[derive(Clone, Copy)]
enum Entry {
    Nothing,
    Leaf(Leaf),
    Node(*const Node),
}

#[derive(Clone, Copy)]
struct Leaf(usize);

impl Leaf {
    fn new(host: u64, flags: usize) -> Self {
        Self(host as usize | flags | flag::LEAF)
    }

    fn host(self) -> u64 {
        (self.0 & !flag::ALL) as u64
    }

    fn has(self, flags: usize) -> bool {
        self.0 & flags == flags
    }

    fn raw(self) -> *mut Node {
        ptr::without_provenance_mut(self.0)
    }

    /// The leaf of the page `offset` bytes into this one.
    fn part(self, offset: u64) -> Self {
        Self(self.0 + offset as usize)
    }
}

impl Entry {
    #[inline]
    fn of(raw: *mut Node) -> Self {
        if raw.is_null() {
            Self::Nothing
        } else if raw.addr() & flag::LEAF != 0 {
            Self::Leaf(Leaf(raw.addr()))
        } else {
            Self::Node(raw)
        }
    }
}

/// The alignment keeps the low bits of a node's address clear.
#[repr(align(64))]
struct Node {
    entries: [AtomicPtr<Node>; ENTRIES],
    /// How many entries are something. Only used under the mutex.
    live: AtomicU16,
}

impl Node {
    fn new() -> Box<Self> {
        Box::new(Self {
            entries: [const { AtomicPtr::new(ptr::null_mut()) }; ENTRIES],
            live: AtomicU16::new(0),
        })
    }

    #[inline]
    fn entry(&self, at: usize) -> &AtomicPtr<Node> {
        // It is below ENTRIES everywhere; the remainder costs nothing and spares the check.
        &self.entries[at % ENTRIES]
    }

    #[inline]
    fn get(&self, at: usize) -> Entry {
        Entry::of(self.entry(at).load(Ordering::Acquire))
    }

    /// Puts something where nothing was.
    fn fill(&self, at: usize, raw: *mut Node) {
        self.entry(at).store(raw, Ordering::Release);
        self.live.store(self.live.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// Takes out what is there: true when nothing is left.
    fn clear(&self, at: usize) -> bool {
        self.entry(at).store(ptr::null_mut(), Ordering::Release);
        let live = self.live.load(Ordering::Relaxed) - 1;
        self.live.store(live, Ordering::Relaxed);
        live == 0
    }
}

/// What is mapped by one call, as far as it is not entered yet.
struct Rest {
    iova: u64,
    host: u64,
    length: u64,
    /// Those of its leaves.
    flags: usize,
}

/// A node that was taken out of the table and may still be read. Dropping it leaks the memory: see [`Self::free`].
struct Removed(*mut Node);

// SAFETY: it owns the node, whose fields are atomics. A raw pointer alone is not Send.
unsafe impl Send for Removed {}

impl Removed {
    /// Frees the node and all below it: how many.
    ///
    /// # Safety
    /// No reader has a pointer to it or gets one.
    unsafe fn free(self) -> usize {
        // SAFETY: nodes in entries come from `Box::into_raw`. Each is in one entry or in one `Removed`, which ends here.
        let node = unsafe { Box::from_raw(self.0) };
        let mut freed = 1;
        for entry in &node.entries {
            if let Entry::Node(_) = Entry::of(entry.load(Ordering::Acquire)) {
                // SAFETY: who could reach it came through this node, and nobody does.
                freed += unsafe { Self(entry.load(Ordering::Relaxed)).free() };
            }
        }
        freed
    }
}

/// What the mutex guards, beside the right to change entries.
#[derive(Default)]
struct Writer {
    /// Nodes that were taken out since the last grace period.
    garbage: Vec<Removed>,
    /// First and last addresses of what moves now. They do not overlap.
    moving: Vec<(u64, u64)>,
}

impl Writer {
    /// Nothing between `start` and `last` moves any more: whether anything did.
    fn arrived(&mut self, start: u64, last: u64) -> bool {
        let touched = |&(from, to): &(u64, u64)| from <= last && to >= start;
        if !self.moving.iter().any(touched) {
            return false;
        }
        let before = core::mem::take(&mut self.moving);
        for range @ (from, to) in before {
            if !touched(&range) {
                self.moving.push(range);
                continue;
            }
            if from < start {
                self.moving.push((from, start - 1));
            }
            if to > last {
                self.moving.push((last + 1, to));
            }
        }
        true
    }
}

/// What became of something that was to be cached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cached {
    /// It is entered.
    Entered,
    /// It was invalidated meanwhile.
    Stale,
    /// There is no room for it.
    Full,
}

/// A table that translates for readers that take no lock.
pub(super) struct Table {
    root: Box<Node>,
    writer: Mutex<Writer>,
    /// Signalled, with the mutex, when something that moved has arrived.
    settled: Condvar,
    /// How often something began to move. Changed under the mutex.
    moves: AtomicU64,
    /// How often [`Self::invalidate`] was called. Changed under the mutex.
    generation: AtomicU64,
    /// How many nodes there are, with those that were taken out. Changed under the mutex, and when nodes are freed.
    nodes: AtomicUsize,
    epoch: Arc<Epoch>,
    /// Whether translations for writing set dirty bits.
    tracking: AtomicBool,
    counters: CounterSet,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("tracking", &self.tracking).finish_non_exhaustive()
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        let removed =
            core::mem::take(&mut self.writer.get_mut().unwrap_or_else(PoisonError::into_inner).garbage);
        let top = self.root.entries.iter().filter_map(|entry| {
            let raw = entry.load(Ordering::Acquire);
            matches!(Entry::of(raw), Entry::Node(_)).then_some(Removed(raw))
        });
        for node in removed.into_iter().chain(top) {
            // SAFETY: readers hold the table by an Arc, so there are none. The root is freed after this without
            // looking at its entries.
            unsafe { node.free() };
        }
    }
}

impl Table {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            root: Node::new(),
            writer: Mutex::default(),
            settled: Condvar::new(),
            moves: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            nodes: AtomicUsize::new(1),
            epoch: Epoch::new(),
            tracking: AtomicBool::new(false),
            counters: CounterSet::default(),
        })
    }

    fn write(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The node behind an entry.
    ///
    /// # Safety
    /// The mutex must be held, or a section of this table's reader be open, for as long as the result is used.
    #[inline]
    unsafe fn node(&self, raw: *const Node) -> &Node {
        // SAFETY: it came from an entry of this table, whose nodes live until a grace period after they were taken out, and
        // that has not passed by what the caller guarantees.
        unsafe { &*raw }
    }

    /// Enters a mapping. EEXIST when something is mapped there already; nothing is entered then. The caller has checked
    /// that the range can be translated and that everything is aligned to pages.
    pub(super) fn map(&self, iova: Iova, host: HostAddr, length: u64, prot: Prot) -> Result<()> {
        self.enter(&mut self.write(), iova, host, length, usize::from(prot.bits()))
    }

    /// As [`Self::map`], of memory that may be accessed by its address.
    ///
    /// # Safety
    /// The `length` bytes at `host` are memory of this process as [`bytes`](crate::hostmem::bytes) wants it, writable if `prot` says so,
    /// until the range has been unmapped or suspended and the table synchronized after that.
    pub(super) unsafe fn map_memory(
        &self,
        iova: Iova,
        host: HostAddr,
        length: u64,
        prot: Prot,
    ) -> Result<()> {
        self.enter(&mut self.write(), iova, host, length, usize::from(prot.bits()) | flag::MEMORY)
    }

    fn enter(
        &self,
        writer: &mut Writer,
        iova: Iova,
        host: HostAddr,
        length: u64,
        flags: usize,
    ) -> Result<()> {
        let mut rest = Rest { iova: iova.0, host: host.0, length, flags };
        let result = self.fill(&self.root, TOP, &mut rest);
        if result.is_err() {
            // What was entered so far lies before the place where something else was. No node was made beyond it: a node is
            // made where nothing is, so the rest fits into it.
            if let Ok(entered) = IovaRange::with_length(iova, length - rest.length) {
                self.clear(writer, &self.root, TOP, entered.start().0, entered.last().0);
            }
        } else if !writer.moving.is_empty() && writer.arrived(iova.0, iova.0 + (length - 1)) {
            self.settled.notify_all();
        }
        result
    }

    /// Which state of what it caches the table has: see [`Self::cache`].
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Enters a mapping that was found elsewhere since [`Self::generation`] was `generation`, instead of what is cached
    /// there, unless it was invalidated meanwhile or the table has `limit` nodes. It never waits for readers, so one may call
    /// it. The caller has checked as for [`Self::map`].
    ///
    /// # Safety
    /// As for [`Self::map_memory`], if it is `memory` and is entered; invalidating the range stands for unmapping it.
    #[allow(clippy::too_many_arguments, reason = "a mapping has so many parts")]
    pub(super) unsafe fn cache(
        &self,
        generation: u64,
        limit: usize,
        iova: Iova,
        host: HostAddr,
        length: u64,
        prot: Prot,
        memory: bool,
    ) -> Cached {
        let mut writer = self.write();
        if self.generation.load(Ordering::Relaxed) != generation {
            return Cached::Stale;
        }
        if self.nodes.load(Ordering::Relaxed) >= limit {
            return Cached::Full;
        }
        self.clear(&mut writer, &self.root, TOP, iova.0, iova.0 + (length - 1));
        let flags = usize::from(prot.bits()) | if memory { flag::MEMORY } else { 0 };
        // Nothing is there now.
        match self.enter(&mut writer, iova, host, length, flags) {
            Ok(()) => Cached::Entered,
            Err(_) => Cached::Stale,
        }
    }

    /// Takes out what is cached between `start` and `last`, with all of a leaf that is partly there, as a processor forgets a large
    /// page by any address in it; and keeps out what was read until now. Readers may use it until [`Self::sync`] has returned,
    /// which the caller calls next.
    pub(super) fn invalidate(&self, start: u64, last: u64) {
        let mut writer = self.write();
        // SAFETY: the mutex is held.
        let within = |iova| unsafe { self.find(iova) }.map_or(0, |(_, level, _)| span(level) - 1);
        let (start, last) = (start & !within(start), last | within(last));
        self.generation.fetch_add(1, Ordering::Release);
        self.clear(&mut writer, &self.root, TOP, start, last);
    }

    /// As [`Self::unmap`] and [`Self::sync`]; but until it is mapped again, or unmapped, [`FaultReason::Moving`] is found.
    pub(super) fn suspend(&self, start: u64, last: u64) {
        {
            let mut writer = self.write();
            writer.arrived(start, last);
            writer.moving.push((start, last));
            // Before the entries, so that who finds them gone sees it.
            self.moves.fetch_add(1, Ordering::Release);
            self.clear(&mut writer, &self.root, TOP, start, last);
        }
        self.sync();
    }

    /// Waits until nothing moves. Must not be called in a section of this table.
    pub(super) fn settle(&self) {
        let mut writer = self.write();
        while !writer.moving.is_empty() {
            writer = self.settled.wait(writer).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Why nothing was found at `iova`: none when something is there by now.
    #[cold]
    fn missing(&self, iova: u64) -> Option<FaultReason> {
        if self.moves.load(Ordering::Acquire) == 0 {
            return Some(FaultReason::Unmapped);
        }
        let writer = self.write();
        if writer.moving.iter().any(|&(start, last)| (start..=last).contains(&iova)) {
            return Some(FaultReason::Moving);
        }
        // SAFETY: the mutex is held.
        let found = unsafe { self.find(iova) };
        found.is_none().then_some(FaultReason::Unmapped)
    }

    fn new_node(&self) -> Box<Node> {
        self.nodes.fetch_add(1, Ordering::Relaxed);
        Node::new()
    }

    /// Enters as much of `rest` as lies in `node`. The mutex is held.
    fn fill(&self, node: &Node, level: u32, rest: &mut Rest) -> Result<()> {
        for at in index(rest.iova, level)..ENTRIES {
            let leaf =
                level <= TOP_LEAF && rest.iova.is_multiple_of(span(level)) && rest.length >= span(level);
            match node.get(at) {
                Entry::Nothing if leaf => {
                    node.fill(at, Leaf::new(rest.host, rest.flags).raw());
                    rest.iova += span(level);
                    rest.host += span(level);
                    rest.length -= span(level);
                }
                Entry::Nothing => {
                    // It is filled before readers can see it.
                    let below = self.new_node();
                    // Nothing is in it, so this cannot fail.
                    self.fill(&below, level - 1, rest)?;
                    node.fill(at, Box::into_raw(below));
                }
                Entry::Node(below) if !leaf => {
                    // SAFETY: the mutex is held.
                    self.fill(unsafe { self.node(below) }, level - 1, rest)?;
                }
                Entry::Node(_) | Entry::Leaf(_) => return Err(Errno::EXIST),
            }
            if rest.length == 0 {
                break;
            }
        }
        Ok(())
    }

    /// Takes out everything between `start` and `last`. Readers may use it until [`Self::sync`] has returned.
    pub(super) fn unmap(&self, start: u64, last: u64) {
        let mut writer = self.write();
        self.clear(&mut writer, &self.root, TOP, start, last);
        if !writer.moving.is_empty() && writer.arrived(start, last) {
            self.settled.notify_all();
        }
        if writer.garbage.len() >= GARBAGE_LIMIT {
            drop(writer);
            self.sync();
        }
    }

    /// As [`Self::unmap`], within a node: true when nothing is left in it. The mutex is held.
    fn clear(&self, writer: &mut Writer, node: &Node, level: u32, start: u64, last: u64) -> bool {
        let mut empty = false;
        for at in index(start, level)..=index(last, level) {
            // The part of the range that this entry translates.
            let base = (start & !(span(level) * ENTRIES as u64 - 1)) + at as u64 * span(level);
            let (from, to) = (start.max(base), last.min(base + (span(level) - 1)));
            let whole = to - from == span(level) - 1;
            let below = match node.get(at) {
                Entry::Nothing => continue,
                Entry::Leaf(_) if whole => {
                    empty = node.clear(at);
                    continue;
                }
                Entry::Leaf(_) => self.split(node, at, level),
                Entry::Node(below) => below,
            };
            // SAFETY: the mutex is held.
            if whole || self.clear(writer, unsafe { self.node(below) }, level - 1, from, to) {
                writer.garbage.push(Removed(below.cast_mut()));
                empty = node.clear(at);
            }
        }
        empty
    }

    /// Replaces a leaf by a node with the same translations: the node. The mutex is held.
    fn split(&self, node: &Node, at: usize, level: u32) -> *const Node {
        let below = Box::into_raw(self.new_node());
        loop {
            let raw = node.entry(at).load(Ordering::Acquire);
            // SAFETY: it was made here, and no reader sees it yet.
            let inner = unsafe { self.node(below) };
            for (part, offset) in inner.entries.iter().zip((0..).step_by(span(level - 1) as usize)) {
                part.store(Leaf(raw.addr()).part(offset).raw(), Ordering::Relaxed);
            }
            inner.live.store(ENTRIES as u16, Ordering::Relaxed);
            // Only a reader may have changed it meanwhile, by setting the dirty bit.
            if node.entry(at).compare_exchange(raw, below, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                return below;
            }
        }
    }

    /// Waits for the sections that are open now, and frees what was taken out before.
    pub(super) fn sync(&self) {
        let removed = core::mem::take(&mut self.write().garbage);
        self.epoch.synchronize();
        // SAFETY: a grace period has passed.
        unsafe { self.free(removed) };
    }

    /// Frees what was taken out before, if no section is open now. Who is in one may call it.
    pub(super) fn try_sync(&self) {
        let mut writer = self.write();
        if self.epoch.is_quiet() {
            let removed = core::mem::take(&mut writer.garbage);
            drop(writer);
            // SAFETY: a grace period has passed, without waiting.
            unsafe { self.free(removed) };
        }
    }

    /// # Safety
    /// A grace period must have passed since the nodes were taken out.
    unsafe fn free(&self, removed: Vec<Removed>) {
        for node in removed {
            // SAFETY: it was out of the table before the grace period began: a section that is open now never found it,
            // and who changes the table under the mutex only follows entries that are in it.
            let freed = unsafe { node.free() };
            self.nodes.fetch_sub(freed, Ordering::Relaxed);
        }
    }

    /// The leaf that translates `iova`, and its level.
    ///
    /// # Safety
    /// As for [`Self::node`], for the time of the call.
    #[inline]
    unsafe fn find(&self, iova: u64) -> Option<(Leaf, u32, &AtomicPtr<Node>)> {
        if iova >> ADDRESS_BITS != 0 {
            return None;
        }
        let mut node = &*self.root;
        let mut level = TOP;
        loop {
            let at = index(iova, level);
            match node.get(at) {
                Entry::Nothing => return None,
                Entry::Leaf(leaf) => return Some((leaf, level, node.entry(at))),
                // SAFETY: the caller's promise.
                Entry::Node(below) => node = unsafe { self.node(below) },
            }
            level = level.checked_sub(1)?;
        }
    }

    /// The translation, and whether it is memory that may be accessed by its address.
    ///
    /// # Safety
    /// As for [`Self::node`], for the time of the call.
    #[inline]
    pub(super) unsafe fn translate(
        &self,
        iova: Iova,
        access: Access,
    ) -> core::result::Result<(Translation, bool), FaultReason> {
        loop {
            // SAFETY: the caller's promise.
            let Some((leaf, level, entry)) = (unsafe { self.find(iova.0) }) else {
                match self.missing(iova.0) {
                    Some(reason) => return Err(reason),
                    None => continue,
                }
            };
            let needed = match access {
                Access::Read => flag::READ,
                Access::Write => flag::WRITE,
            };
            if !leaf.has(needed) {
                return Err(FaultReason::Permission);
            }
            if access == Access::Write
                && !leaf.has(flag::DIRTY)
                && self.tracking.load(Ordering::Acquire)
                && entry
                    .compare_exchange(
                        leaf.raw(),
                        Leaf(leaf.0 | flag::DIRTY).raw(),
                        Ordering::AcqRel,
                        Ordering::Relaxed,
                    )
                    .is_err()
            {
                // Unmapped, split, or marked by another meanwhile.
                continue;
            }
            let offset = iova.0 % span(level);
            let found = Translation {
                host: HostAddr(leaf.host() + offset),
                length: span(level) - offset,
                prot: Prot::from_bits_truncate((leaf.0 & flag::PROT) as u8),
            };
            return Ok((found, leaf.has(flag::MEMORY)));
        }
    }

    /// Where `iova` is mapped to.
    pub(super) fn lookup(&self, iova: Iova) -> Option<HostAddr> {
        let _writer = self.write();
        // SAFETY: the mutex is held.
        let (leaf, level, _) = unsafe { self.find(iova.0) }?;
        Some(HostAddr(leaf.host() + iova.0 % span(level)))
    }

    /// Starts with nothing dirty, or stops.
    pub(super) fn set_tracking(&self, enable: bool) {
        {
            let _writer = self.write();
            if enable && !self.tracking.load(Ordering::Relaxed) {
                self.visit_dirty(&self.root, TOP, 0, (1 << ADDRESS_BITS) - 1, &mut |entry, _, _| {
                    undirty(entry)
                });
            }
            self.tracking.store(enable, Ordering::Release);
        }
        // From now on nobody writes by a translation that was made before.
        self.sync();
    }

    /// Whether writes are noted.
    pub(super) fn tracks(&self) -> bool {
        self.tracking.load(Ordering::Acquire)
    }

    /// Reports what is dirty between `start` and `last`, and forgets it unless `keep`.
    pub(super) fn read_dirty(&self, start: u64, last: u64, keep: bool, sink: &mut dyn DirtySink) {
        {
            let _writer = self.write();
            self.visit_dirty(&self.root, TOP, start, last, &mut |entry, iova, length| {
                sink.dirty(Iova(iova), length);
                if !keep {
                    undirty(entry);
                }
            });
        }
        if !keep {
            // Who found a bit set that is clear now writes no more; the next one sets it.
            self.sync();
        }
    }

    /// Visits each leaf that is dirty and reaches into the range: its entry, and the part in the range. The mutex is held.
    fn visit_dirty(
        &self,
        node: &Node,
        level: u32,
        start: u64,
        last: u64,
        visit: &mut dyn FnMut(&AtomicPtr<Node>, u64, u64),
    ) {
        for at in index(start, level)..=index(last, level) {
            let base = (start & !(span(level) * ENTRIES as u64 - 1)) + at as u64 * span(level);
            let (from, to) = (start.max(base), last.min(base + (span(level) - 1)));
            match node.get(at) {
                Entry::Leaf(leaf) if leaf.has(flag::DIRTY) => visit(node.entry(at), from, to - from + 1),
                Entry::Nothing | Entry::Leaf(_) => {}
                Entry::Node(below) => {
                    // SAFETY: the mutex is held.
                    let below = unsafe { self.node(below) };
                    self.visit_dirty(below, level - 1, from, to, visit);
                }
            }
        }
    }

    /// A new reader.
    pub(super) fn reader(self: &Arc<Self>) -> Reader {
        Reader::new(self, self.epoch.join(), self.counters.join())
    }

    /// A reader that did so much is gone.
    pub(super) fn left(&self, tally: &Tally) {
        self.counters.leave(tally);
    }

    /// What all readers did; what one does in a section is counted when it ends.
    pub(super) fn count(&self) -> Counters {
        self.counters.sum()
    }

    #[cfg(test)]
    pub(super) fn nodes(&self) -> usize {
        fn below(table: &Table, node: &Node) -> usize {
            let inner = node.entries.iter().map(|entry| match Entry::of(entry.load(Ordering::Acquire)) {
                // SAFETY: the caller holds the mutex.
                Entry::Node(raw) => below(table, unsafe { table.node(raw) }),
                _ => 0,
            });
            1 + inner.sum::<usize>()
        }
        let _writer = self.write();
        below(self, &self.root)
    }
}

fn undirty(entry: &AtomicPtr<Node>) {
    entry.fetch_and(!flag::DIRTY, Ordering::AcqRel);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_before_an_invalidation_is_not_cached_after_it() {
        let (table, page) = (Table::new(), span(0));
        let cache = |generation, limit, host| {
            // SAFETY: it is not entered as memory.
            unsafe { table.cache(generation, limit, Iova(page), HostAddr(host), page, Prot::READ, false) }
        };
        let before = table.generation();
        assert_eq!(cache(before, usize::MAX, page), Cached::Entered);
        // Another walk that began as early is as good, and the later one counts.
        assert_eq!(cache(before, usize::MAX, 2 * page), Cached::Entered);
        assert_eq!(table.lookup(Iova(page)), Some(HostAddr(2 * page)));
        // Wherever the invalidation was: which pages a walk depends on is not known.
        table.invalidate(8 * page, 9 * page - 1);
        assert_eq!(table.lookup(Iova(page)), Some(HostAddr(2 * page)));
        assert_eq!(cache(before, usize::MAX, 3 * page), Cached::Stale);
        table.invalidate(0, LAST_ADDRESS);
        assert_eq!(table.lookup(Iova(page)), None);
        let now = table.generation();
        assert_eq!(cache(before, usize::MAX, page), Cached::Stale);
        assert_eq!(cache(now, 4, page), Cached::Full, "the nodes are there until readers were waited for");
        table.sync();
        assert_eq!(cache(now, 4, page), Cached::Entered);
    }

    #[test]
    fn what_moves_is_neither_there_nor_gone() {
        let (table, page) = (Table::new(), span(0));
        let at = |iova| {
            let mut reader = table.reader();
            let section = reader.section();
            section
                .translate(Iova(iova), Access::Read)
                .map(|found| found.host.0)
                .map_err(|fault| fault.reason)
        };
        table.map(Iova(0), HostAddr(page), 4 * page, Prot::READ).unwrap();
        table.suspend(0, 4 * page - 1);
        assert_eq!((at(0), at(4 * page)), (Err(FaultReason::Moving), Err(FaultReason::Unmapped)));
        // It comes back in pieces; one of them was unmapped.
        table.map(Iova(page), HostAddr(9 * page), page, Prot::READ).unwrap();
        assert_eq!((at(0), at(page)), (Err(FaultReason::Moving), Ok(9 * page)));
        table.unmap(2 * page, 3 * page - 1);
        assert_eq!((at(2 * page), at(3 * page)), (Err(FaultReason::Unmapped), Err(FaultReason::Moving)));
        table.unmap(0, page - 1);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| table.settle());
            table.map(Iova(3 * page), HostAddr(page), page, Prot::READ).unwrap();
            waiter.join().unwrap();
        });
        assert_eq!(at(3 * page), Ok(page));
    }
}
