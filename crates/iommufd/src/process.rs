//! The memory that user addresses refer to.

use core::fmt;
use std::{os::fd::OwnedFd, sync::Arc};

use crate::{Result, domain::HostAddr};

/// An address in the memory of the process that called.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct UserAddr(pub u64);

impl fmt::Debug for UserAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "user {:#x}", self.0)
    }
}

/// What makes two pages the same page: "the physical page" in the kernel's words.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum PageId {
    /// A page of a file or of shared memory, wherever it is mapped.
    File {
        /// The device of the file system.
        dev: u64,
        /// The inode.
        ino: u64,
        /// Which page of the file.
        index: u64,
    },
    /// A private page of one address space; the number is the provider's.
    Private(u64),
}

/// A run of pinned pages that lie one after the other in this process's memory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HostRun {
    /// Where the run begins; a multiple of the page size.
    pub start: HostAddr,
    /// How many pages it has.
    pub pages: u64,
}

/// Pages that a [`Process`] keeps in place. Dropping it unpins them.
///
/// The host addresses may only change between [`PinObserver::moving`] and [`PinObserver::moved`].
pub trait PinnedUser: Send + Sync + fmt::Debug {
    /// Where the pages are now, in order.
    fn runs(&self) -> Vec<HostRun>;
}

/// Who has entered pinned pages somewhere and must know when a provider has to move them (because the program unmaps the
/// addresses that they were found at).
pub trait PinObserver: Send + Sync {
    /// The pages (`first` is the index in the pin) are about to move: after this returns nothing may access them by
    /// their old addresses.
    fn moving(&self, first: u64, pages: u64);
    /// The pages have moved: [`PinnedUser::runs`] has the new addresses.
    fn moved(&self, first: u64, pages: u64);
}

/// An address space: the process that calls, or another one.
pub trait Process: Send + Sync + fmt::Debug {
    /// Copies out of user memory. EFAULT when any byte cannot be read.
    fn read(&self, from: UserAddr, to: &mut [u8]) -> Result<()>;

    /// Copies into user memory. EFAULT when any byte cannot be written.
    fn write(&self, to: UserAddr, from: &[u8]) -> Result<()>;

    /// Makes `pages` pages at `start` (a multiple of the page size) present and keeps them, also when the program unmaps
    /// these addresses, until the result is dropped. EFAULT when a page does not exist or forbids the access
    /// (`writable`: it must take writes; a private page of a file becomes the process's own first).
    fn pin(
        &self,
        start: UserAddr,
        pages: u64,
        writable: bool,
        observer: std::sync::Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedUser>>;

    /// Which page is at `at`. EFAULT when there is none.
    fn page_id(&self, at: UserAddr) -> Result<PageId>;

    /// Which page is at an address of a [`HostRun`].
    fn host_page_id(&self, at: HostAddr) -> Result<PageId>;

    /// How often the page at `at` is pinned now.
    fn pin_count(&self, at: UserAddr) -> Result<u64>;

    /// Tells the process's accounting that `pages` more (or fewer) of its pages are pinned (`VmPin` in its status).
    fn account(&self, pages: i64);

    /// How many pages the process may have locked or pinned (RLIMIT_MEMLOCK); none without a limit.
    fn locked_limit(&self) -> Option<u64>;

    /// The user whose pages are counted together in the mode `IOMMU_OPTION_RLIMIT_MODE` 0.
    fn user(&self) -> u32;

    /// Whether it is the same address space as `other`.
    fn is(&self, other: &Arc<dyn Process>) -> bool;

    /// A descriptor of its own for the file behind descriptor `fd` of the process. EBADF when there is none.
    fn file(&self, fd: i32) -> Result<OwnedFd>;
}
