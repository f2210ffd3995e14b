//! How many pages are pinned, on whose behalf, and how many may be: RLIMIT_MEMLOCK.

use std::{
    collections::HashMap,
    sync::{
        Arc, LazyLock, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{Errno, Result, process::Process};

/// Whose pinned pages are counted together against RLIMIT_MEMLOCK.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Accounting {
    /// Nobody's: the caller may pin what it likes (CAP_IPC_LOCK).
    None,
    /// The user's, all its processes together (`IOMMU_OPTION_RLIMIT_MODE` 0).
    #[default]
    User,
    /// The process's (`IOMMU_OPTION_RLIMIT_MODE` 1).
    Process,
}

/// What one process has pinned, in pages.
#[derive(Debug, Default)]
pub struct Usage {
    pinned: AtomicU64,
    locked: AtomicU64,
}

impl Usage {
    /// Pages that are pinned on its behalf, however they are counted: what `VmPin` in its status shows.
    pub fn pinned(&self) -> u64 {
        self.pinned.load(Ordering::Relaxed)
    }

    /// Those that are counted against its own limit ([`Accounting::Process`]): they add to `VmLck`.
    pub fn locked(&self) -> u64 {
        self.locked.load(Ordering::Relaxed)
    }
}

/// Pages that are pinned for all processes of a user in the mode [`Accounting::User`].
static USERS: LazyLock<Mutex<HashMap<u32, Weak<AtomicU64>>>> = LazyLock::new(Mutex::default);

/// The counter of `user`. It lives for as long as anything is counted there.
fn user_counter(user: u32) -> Arc<AtomicU64> {
    let mut users = USERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(counter) = users.get(&user).and_then(Weak::upgrade) {
        return counter;
    }
    users.retain(|_, counter| counter.strong_count() > 0);
    let counter = Arc::new(AtomicU64::new(0));
    users.insert(user, Arc::downgrade(&counter));
    counter
}

/// Where the pages of one backing store are counted, and how many of them are.
#[derive(Debug)]
pub(crate) struct Account {
    process: Arc<dyn Process>,
    accounting: Accounting,
    user: Option<Arc<AtomicU64>>,
    pages: u64,
}

impl Account {
    pub(crate) fn new(process: Arc<dyn Process>, accounting: Accounting) -> Self {
        let user = (accounting == Accounting::User).then(|| user_counter(process.user()));
        Self { process, accounting, user, pages: 0 }
    }

    pub(crate) fn process(&self) -> &Arc<dyn Process> {
        &self.process
    }

    /// Counts `pages` more. ENOMEM when they would go past the limit; nothing is counted then.
    pub(crate) fn charge(&mut self, pages: u64) -> Result<()> {
        // Asking for the limit is a system call.
        let limit = if self.accounting == Accounting::None { None } else { self.process.locked_limit() };
        self.count(pages, limit)
    }

    fn count(&mut self, pages: u64, limit: Option<u64>) -> Result<()> {
        let usage = self.process.usage();
        let limited = match self.accounting {
            Accounting::None => None,
            Accounting::User => self.user.as_deref(),
            Accounting::Process => Some(&usage.locked),
        };
        if let Some(counter) = limited {
            let limit = limit.unwrap_or(u64::MAX);
            counter
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                    now.checked_add(pages).filter(|sum| *sum <= limit)
                })
                .map_err(|_| Errno::NOMEM)?;
        }
        usage.pinned.fetch_add(pages, Ordering::Relaxed);
        self.pages += pages;
        Ok(())
    }

    /// Counts `pages` fewer, which were charged.
    pub(crate) fn uncharge(&mut self, pages: u64) {
        let usage = self.process.usage();
        match self.accounting {
            Accounting::None => {}
            Accounting::User => {
                if let Some(user) = &self.user {
                    user.fetch_sub(pages, Ordering::Relaxed);
                }
            }
            Accounting::Process => {
                usage.locked.fetch_sub(pages, Ordering::Relaxed);
            }
        }
        usage.pinned.fetch_sub(pages, Ordering::Relaxed);
        self.pages -= pages;
    }

    /// The same pages counted with `process`; `self` still counts them too. ENOMEM when they go past its limit, if `limited`.
    /// None when they are nobody's: then they stay where they are shown.
    pub(crate) fn moved_to(&self, process: Arc<dyn Process>, limited: bool) -> Result<Option<Self>> {
        let mut account = Self::new(process, self.accounting);
        let same_counter = match self.accounting {
            Accounting::None => return Ok(None),
            Accounting::User => account.process.user() == self.process.user(),
            Accounting::Process => account.process.is(&self.process),
        };
        let limit = account.process.locked_limit().filter(|_| limited && !same_counter);
        account.count(self.pages, limit)?;
        Ok(Some(account))
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        self.uncharge(self.pages);
    }
}
