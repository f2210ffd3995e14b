//! Backing stores: the pages that areas show.
//!
//! # Theory of operation
//!
//! A [`Pages`] is a row of pages, and every page of it is pinned exactly while it has users: each domain that an area is
//! entered in is one for all the area's pages, each pin of an access one for its own. `Counts` knows how many users a page
//! has, `Held` has the pins. A page that gets its first user is pinned and accounted for, one that loses its last
//! unpinned.
//!
//! The domains' entries are known here too (`entries`), because pinned memory may move: the program unmaps the addresses
//! that it gave, and who provides its memory has to put the pages elsewhere. Then every entry is suspended, and
//! mapped again when the pages have arrived.
//!
//! One lock guards all of it. It is held while pages are pinned, so user memory may fault in under it; that delays
//! only who needs pages of this store. It is read to copy from and to pinned pages, so that they cannot move meanwhile.

mod copy;
mod counts;
mod entries;
mod held;

use std::{
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak},
};

use counts::{Counts, Span};
use entries::Entries;
pub(crate) use entries::Placement;
use held::Held;

use crate::{
    Errno, Result,
    account::{Account, Accounting},
    hostmem::HostRun,
    inject,
    iova::PAGE_SIZE,
    memory::{FileMemory, Memory, UserMemory},
    process::{PinObserver, Process, UserAddr},
};

/// What the pages are of: it decides what may be done with them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    /// A process's memory.
    User,
    /// A file: the process that they are counted with may change.
    File,
    /// Somebody's who may take them back.
    Exported,
}

/// A span of memory that areas show, with the state of its pages. Areas of several address spaces may share it
/// ([`crate::ioas::Ioas::copy_from`]): a page is pinned once however many use it, and unpinned with the last of them.
#[derive(Debug)]
pub struct Pages {
    kind: Kind,
    memory: Box<dyn Memory>,
    /// Where the memory's first page is, as the user knows it: what large pages of IOVA should lie alike to.
    base: u64,
    /// Which byte of the first page is the first one.
    lead: u64,
    length: u64,
    writable: bool,
    state: RwLock<State>,
    /// Who waits for pages to arrive where they move.
    arrivals: Mutex<()>,
    arrived: Condvar,
}

#[derive(Debug)]
struct State {
    /// None for what nobody accounts for.
    account: Option<Account>,
    users: Counts,
    held: Held,
    entries: Entries,
    /// What is just moving.
    moving: Vec<Span>,
    revoked: bool,
}

impl Pages {
    /// `length` bytes of a process's memory at `start`, which need not exist yet. EINVAL when `length` is 0, EOVERFLOW
    /// when it goes past the last address.
    pub fn user(
        process: Arc<dyn Process>,
        start: UserAddr,
        length: u64,
        writable: bool,
        accounting: Accounting,
    ) -> Result<Arc<Self>> {
        let lead = start.0 % PAGE_SIZE;
        check(start.0, length)?;
        let base = start.0 - lead;
        let memory = Box::new(UserMemory::new(process.clone(), UserAddr(base)));
        let account = Account::new(process, accounting);
        Self::new(Kind::User, memory, base, lead, length, writable, Some(account))
    }

    /// `length` bytes of a memory file (memfd, hugetlb) from byte `start` on, counted with `process`. EINVAL when `length`
    /// is 0, EOVERFLOW as in [`Self::user`]. That it is a memory file and has these bytes is looked at when they are pinned:
    /// EINVAL then.
    pub fn file(
        process: Arc<dyn Process>,
        file: &OwnedFd,
        start: u64,
        length: u64,
        writable: bool,
        accounting: Accounting,
    ) -> Result<Arc<Self>> {
        let lead = start % PAGE_SIZE;
        let end = check(start, length)?;
        inject::check()?;
        let memory = Box::new(FileMemory::new(file, (start - lead) / PAGE_SIZE, end, writable)?);
        let account = Account::new(process, accounting);
        Self::new(Kind::File, memory, start - lead, lead, length, writable, Some(account))
    }

    /// `length` bytes of `memory` from byte `start` of its first page on, which nobody accounts for: a dma-buf, a device's
    /// registers. Its owner may [revoke](Self::revoke) it.
    pub fn exported(memory: Box<dyn Memory>, start: u64, length: u64, writable: bool) -> Result<Arc<Self>> {
        check(start, length)?;
        Self::new(Kind::Exported, memory, 0, start, length, writable, None)
    }

    fn new(
        kind: Kind,
        memory: Box<dyn Memory>,
        base: u64,
        lead: u64,
        length: u64,
        writable: bool,
        account: Option<Account>,
    ) -> Result<Arc<Self>> {
        inject::check()?;
        let state = State {
            account,
            users: Counts::default(),
            held: Held::default(),
            entries: Entries::default(),
            moving: Vec::new(),
            revoked: false,
        };
        Ok(Arc::new(Self {
            kind,
            memory,
            base,
            lead,
            length,
            writable,
            state: RwLock::new(state),
            arrivals: Mutex::default(),
            arrived: Condvar::new(),
        }))
    }

    /// Whether it may be written to.
    pub fn writable(&self) -> bool {
        self.writable
    }

    /// How many bytes it has.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// The address, or offset in its file, of byte `offset`.
    pub(crate) fn address(&self, offset: u64) -> u64 {
        self.base.wrapping_add(self.lead).wrapping_add(offset)
    }

    /// Which byte of its page byte `offset` is.
    pub(crate) fn in_page(&self, offset: u64) -> u64 {
        (self.lead + offset) % PAGE_SIZE
    }

    /// The pages that `length` bytes from `offset` on are in. The range is not empty, and in the store.
    fn span(&self, offset: u64, length: u64) -> Span {
        let first = self.lead + offset;
        Span { first: first / PAGE_SIZE, last: (first + (length - 1)) / PAGE_SIZE }
    }

    /// Pins the pages that `length` bytes from `offset` on are in, for one user more. ENODEV when they were revoked.
    pub(crate) fn pin(self: &Arc<Self>, offset: u64, length: u64) -> Result<()> {
        let span = self.span(offset, length);
        let mut state = self.settled(span);
        if state.revoked {
            return Err(Errno::NODEV);
        }
        state.take(self, span)
    }

    /// One user less for them: what [`Self::pin`] pinned.
    pub(crate) fn unpin(&self, offset: u64, length: u64) {
        let span = self.span(offset, length);
        self.settled(span).give_up(span);
    }

    /// Where the pinned pages of `length` bytes from `offset` on are now. Empty when they were revoked.
    pub(crate) fn runs(&self, offset: u64, length: u64) -> Vec<HostRun> {
        let span = self.span(offset, length);
        self.settled(span).runs(span)
    }

    /// Counts its pages with `process` from now on. EINVAL when that is not possible; ENOMEM past the limit of `process`,
    /// if there is to be one. Returns the process before.
    pub(crate) fn change_process(
        &self,
        process: &Arc<dyn Process>,
        limited: bool,
    ) -> Result<Arc<dyn Process>> {
        if self.kind != Kind::File {
            return Err(Errno::INVAL);
        }
        let mut state = self.write();
        let account = state.account.as_mut().ok_or(Errno::INVAL)?;
        let before = account.process().clone();
        if let Some(moved) = account.moved_to(process.clone(), limited)? {
            *account = moved;
        }
        Ok(before)
    }

    /// Whether [`Self::change_process`] is possible.
    pub(crate) fn is_file(&self) -> bool {
        self.kind == Kind::File
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state, once nothing of `span` is moving.
    fn settled(&self, span: Span) -> RwLockWriteGuard<'_, State> {
        loop {
            let state = self.write();
            if !state.is_moving(span) {
                return state;
            }
            drop(state);
            self.await_arrival(span);
        }
    }

    /// The same, to read.
    fn settled_read(&self, span: Span) -> RwLockReadGuard<'_, State> {
        loop {
            let state = self.read();
            if !state.is_moving(span) {
                return state;
            }
            drop(state);
            self.await_arrival(span);
        }
    }

    fn await_arrival(&self, span: Span) {
        let mut arrivals: MutexGuard<'_, ()> = self.arrivals.lock().unwrap_or_else(PoisonError::into_inner);
        // Who ends a move takes this lock before it wakes us, so none ends unnoticed between the look and the wait.
        while self.read().is_moving(span) {
            arrivals = self.arrived.wait(arrivals).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// The end of `length` bytes at `start`. EINVAL when there is none, EOVERFLOW when it is past the last address.
fn check(start: u64, length: u64) -> Result<u64> {
    if length == 0 {
        return Err(Errno::INVAL);
    }
    start.checked_add(length).ok_or(Errno::OVERFLOW)
}

impl State {
    fn is_moving(&self, span: Span) -> bool {
        self.moving.iter().any(|moving| moving.overlaps(span))
    }

    /// One user more for `span`; pins what had none. Nothing has changed when it fails.
    fn take(&mut self, pages: &Arc<Pages>, span: Span) -> Result<()> {
        inject::check()?;
        let gaps = self.users.gaps(span);
        for (index, gap) in gaps.iter().enumerate() {
            if let Err(errno) = self.hold(pages, *gap) {
                gaps.iter().take(index).for_each(|gap| self.let_go(*gap));
                return Err(errno);
            }
        }
        self.users.add(span);
        Ok(())
    }

    /// One user less for `span`; unpins what has none left.
    fn give_up(&mut self, span: Span) {
        for unused in self.users.remove(span) {
            self.let_go(unused);
        }
    }

    fn hold(&mut self, pages: &Arc<Pages>, span: Span) -> Result<()> {
        if let Some(account) = &mut self.account {
            account.charge(span.pages())?;
        }
        let observer: Weak<Pages> = Arc::downgrade(pages);
        let observer: Weak<dyn PinObserver> = observer;
        let pinned = inject::check()
            .and_then(|()| pages.memory.pin(span.first, span.pages(), pages.writable, observer));
        match pinned {
            Ok(pin) => {
                self.held.insert(span.first, pin);
                Ok(())
            }
            Err(errno) => {
                if let Some(account) = &mut self.account {
                    account.uncharge(span.pages());
                }
                Err(errno)
            }
        }
    }

    fn let_go(&mut self, span: Span) {
        if self.revoked {
            return;
        }
        self.held.release(span);
        if let Some(account) = &mut self.account {
            account.uncharge(span.pages());
        }
    }

    /// Where the pages of `span`, all held, are now: runs that lie together are one.
    fn runs(&self, span: Span) -> Vec<HostRun> {
        let mut runs: Vec<HostRun> = Vec::new();
        let mut page = span.first;
        while page <= span.last {
            let Some(run) = self.held.run(page) else { break };
            let pages = run.pages.min(span.last - page + 1);
            match runs.last_mut() {
                Some(before) if before.start.0.checked_add(before.pages * PAGE_SIZE) == Some(run.start.0) => {
                    before.pages += pages;
                }
                _ => runs.push(HostRun { start: run.start, pages }),
            }
            page += pages;
        }
        runs
    }
}
