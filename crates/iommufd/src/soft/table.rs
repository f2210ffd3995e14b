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
//! # `unsafe`
//!
//! An entry is a pointer that the borrow checker cannot follow. The rules that make it sound are in this file alone:
//! a node in the table is a leaked box, and becomes a box again in two places: after
//! [`Epoch::synchronize`](super::epoch::Epoch::synchronize) since it was taken out, and in the table's own drop. Nodes are
//! followed under the mutex, or inside a [`Section`], which a [`Reader`] of the same table enters and leaves.

#![allow(unsafe_code, reason = "the entries of a table that is read without locks are raw pointers")]

use core::{
    borrow::BorrowMut,
    cell::Cell,
    fmt,
    marker::PhantomData,
    ptr,
    sync::atomic::{AtomicBool, AtomicPtr, AtomicU16, Ordering},
};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::{
    Errno, Result,
    domain::{DirtySink, HostAddr, Prot},
    iova::{Iova, IovaRange},
};

use super::{
    counters::{CounterSet, Counters, Tally},
    epoch::{Epoch, Member},
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
    fn new(host: u64, prot: Prot) -> Self {
        Self(host as usize | usize::from(prot.bits()) | flag::LEAF)
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
    prot: Prot,
}

/// A node that was taken out of the table and may still be read. Dropping it leaks the memory: see [`Self::free`].
struct Removed(*mut Node);

// SAFETY: it owns the node, whose fields are atomics. A raw pointer alone is not Send.
unsafe impl Send for Removed {}

impl Removed {
    /// Frees the node and all below it.
    ///
    /// # Safety
    /// No reader has a pointer to it or gets one.
    unsafe fn free(self) {
        // SAFETY: nodes in entries come from `Box::into_raw`. Each is in one entry or in one `Removed`, which ends here.
        let node = unsafe { Box::from_raw(self.0) };
        for entry in &node.entries {
            if let Entry::Node(_) = Entry::of(entry.load(Ordering::Acquire)) {
                // SAFETY: who could reach it came through this node, and nobody does.
                unsafe { Self(entry.load(Ordering::Relaxed)).free() };
            }
        }
    }
}

/// What the mutex guards, beside the right to change entries: nodes that were taken out since the last grace period.
#[derive(Default)]
struct Garbage(Vec<Removed>);

/// A table that translates for readers that take no lock.
pub(super) struct Table {
    root: Box<Node>,
    writer: Mutex<Garbage>,
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
        let removed = core::mem::take(&mut self.writer.get_mut().unwrap_or_else(PoisonError::into_inner).0);
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
            epoch: Epoch::new(),
            tracking: AtomicBool::new(false),
            counters: CounterSet::default(),
        })
    }

    fn write(&self) -> MutexGuard<'_, Garbage> {
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
        let mut writer = self.write();
        let mut rest = Rest { iova: iova.0, host: host.0, length, prot };
        let result = self.fill(&self.root, TOP, &mut rest);
        if result.is_err() {
            // What was entered so far lies before the place where something else was. No node was made beyond it: a node is
            // made where nothing is, so the rest fits into it.
            if let Ok(entered) = IovaRange::with_length(iova, length - rest.length) {
                self.clear(&mut writer, &self.root, TOP, entered.start().0, entered.last().0);
            }
        }
        result
    }

    /// Enters as much of `rest` as lies in `node`. The mutex is held.
    fn fill(&self, node: &Node, level: u32, rest: &mut Rest) -> Result<()> {
        for at in index(rest.iova, level)..ENTRIES {
            let leaf =
                level <= TOP_LEAF && rest.iova.is_multiple_of(span(level)) && rest.length >= span(level);
            match node.get(at) {
                Entry::Nothing if leaf => {
                    node.fill(at, Leaf::new(rest.host, rest.prot).raw());
                    rest.iova += span(level);
                    rest.host += span(level);
                    rest.length -= span(level);
                }
                Entry::Nothing => {
                    // It is filled before readers can see it.
                    let below = Node::new();
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
        if writer.0.len() >= GARBAGE_LIMIT {
            drop(writer);
            self.sync();
        }
    }

    /// As [`Self::unmap`], within a node: true when nothing is left in it. The mutex is held.
    fn clear(&self, writer: &mut Garbage, node: &Node, level: u32, start: u64, last: u64) -> bool {
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
                writer.0.push(Removed(below.cast_mut()));
                empty = node.clear(at);
            }
        }
        empty
    }

    /// Replaces a leaf by a node with the same translations: the node. The mutex is held.
    fn split(&self, node: &Node, at: usize, level: u32) -> *const Node {
        let below = Box::into_raw(Node::new());
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
        let removed = core::mem::take(&mut self.write().0);
        self.epoch.synchronize();
        for node in removed {
            // SAFETY: it was out of the table before the grace period began: a section that is open now never found it,
            // and who changes the table under the mutex only follows entries that are in it.
            unsafe { node.free() };
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
        Reader { member: self.epoch.join(), table: Arc::clone(self), tally: self.counters.join() }
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

/// What a device wants to do with memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Read it.
    Read,
    /// Write it, or change it atomically.
    Write,
}

/// Why a translation failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum FaultReason {
    /// Nothing is mapped there.
    #[error("nothing is mapped")]
    Unmapped,
    /// What is mapped there does not allow the access.
    #[error("the mapping does not allow it")]
    Permission,
    /// The device is attached to nothing.
    #[error("the device is attached to no address space")]
    Detached,
}

/// An access of a device that could not be translated.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{access:?} at {iova:?}: {reason}")]
pub struct Fault {
    /// Where.
    pub iova: Iova,
    /// What it wanted.
    pub access: Access,
    /// Why it got nothing.
    pub reason: FaultReason,
}

/// Where an address is mapped to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Translation {
    /// The address in this process. Memory (or registers) to be accessed as such as long as the section is open.
    pub host: HostAddr,
    /// How many bytes from there on belong to the same leaf; at least one.
    pub length: u64,
    /// What may be done with them.
    pub prot: Prot,
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
        self.table.counters.leave(&self.tally);
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
    /// [`FaultReason::Unmapped`] and [`FaultReason::Permission`].
    #[inline]
    pub fn translate(&self, iova: Iova, access: Access) -> core::result::Result<Translation, Fault> {
        let result = match &self.reader {
            Some(reader) => {
                let reader: &Reader = reader.borrow();
                // SAFETY: between `open` and `end` the reader, which is a member of this table's epoch, is inside.
                unsafe { translate(&reader.table, iova, access) }
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

/// # Safety
/// As for [`Table::node`], for the time of the call.
#[inline]
unsafe fn translate(
    table: &Table,
    iova: Iova,
    access: Access,
) -> core::result::Result<Translation, FaultReason> {
    loop {
        // SAFETY: the caller's promise.
        let (leaf, level, entry) = unsafe { table.find(iova.0) }.ok_or(FaultReason::Unmapped)?;
        let needed = match access {
            Access::Read => flag::READ,
            Access::Write => flag::WRITE,
        };
        if !leaf.has(needed) {
            return Err(FaultReason::Permission);
        }
        if access == Access::Write
            && !leaf.has(flag::DIRTY)
            && table.tracking.load(Ordering::Acquire)
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
        return Ok(Translation {
            host: HostAddr(leaf.host() + offset),
            length: span(level) - offset,
            prot: Prot::from_bits_truncate((leaf.0 & flag::PROT) as u8),
        });
    }
}

impl<R: BorrowMut<Reader>> Drop for Section<R> {
    fn drop(&mut self) {
        self.end();
    }
}
