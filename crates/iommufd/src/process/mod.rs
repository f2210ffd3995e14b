//! The memory that user addresses refer to.

use core::fmt;
use std::{
    os::fd::OwnedFd,
    sync::{Arc, Weak},
};

pub(crate) mod local;
mod remote;

pub use local::{LocalProcess, carry, forget, pinned, quiet, vacate, vacate_private};
pub use remote::RemoteProcess;

use crate::{Result, account::Usage, domain::HostAddr, hostmem::PinnedPages};

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

/// Who has entered pinned pages somewhere and must know when a provider has to move them (because the program unmaps the
/// addresses that they were found at).
///
/// Both calls name pages by the user address at which [`Process::pin`] found them, which a pin keeps however often its
/// pages move. A provider makes them with no lock held that `pin`, or the end of a pin, takes.
pub trait PinObserver: Send + Sync {
    /// The pages are about to move: after this returns nothing accesses them by their old addresses. Who wants to
    /// access them waits until [`Self::moved`] is called.
    fn moving(&self, from: UserAddr, pages: u64);
    /// The pages have moved: [`PinnedPages::run`] has the new addresses.
    fn moved(&self, from: UserAddr, pages: u64);
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
    ///
    /// It must not wait for a page that it is just moving for `observer`: such a page counts as unmapped already.
    fn pin(
        &self,
        start: UserAddr,
        pages: u64,
        writable: bool,
        observer: Weak<dyn PinObserver>,
    ) -> Result<Box<dyn PinnedPages>>;

    /// Which page is at `at`. EFAULT when there is none.
    fn page_id(&self, at: UserAddr) -> Result<PageId>;

    /// Which page is at an address that pins gave ([`PinnedPages::run`]).
    fn host_page_id(&self, at: HostAddr) -> Result<PageId>;

    /// How often the page at `at` is pinned now.
    fn pin_count(&self, at: UserAddr) -> Result<u64>;

    /// How many pages are pinned on its behalf (`VmPin` and `VmLck` in its status show them).
    fn usage(&self) -> &Usage;

    /// How many pages the process may have locked or pinned (RLIMIT_MEMLOCK); none without a limit.
    fn locked_limit(&self) -> Option<u64>;

    /// The user whose pages are counted together in the mode `IOMMU_OPTION_RLIMIT_MODE` 0.
    fn user(&self) -> u32;

    /// Whether it is the same address space as `other`.
    fn is(&self, other: &Arc<dyn Process>) -> bool;

    /// A descriptor of its own for the file behind descriptor `fd` of the process. EBADF when there is none.
    fn file(&self, fd: i32) -> Result<OwnedFd>;
}
