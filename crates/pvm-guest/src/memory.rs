//! Physical memory: frames to build page tables from, and access to any byte below 4 GiB.
//!
//! # Theory of operation
//! The kernel knows two places of itself: where it is loaded, which is the physical address, and where it runs. Until it
//! has moved, both are the same and memory is mapped one to one; afterwards the first 4 GiB are mapped at
//! [`place::DIRECT`] behind the start of the range that PVM gives, and the image above them. Two offsets say where we are.
//! They are written once, by the first processor, before there is another.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// Where things are behind the first address of the PVM range: all in one PML4 slot.
pub mod place {
    /// The first 4 GiB of physical memory.
    pub const DIRECT: u64 = 0;
    /// The image, at its physical address behind this.
    pub const IMAGE: u64 = 4 << 30;
    /// For the checks to map what they like.
    pub const TEST: u64 = 8 << 30;
    /// For the checks to find nothing mapped.
    pub const NOWHERE: u64 = 16 << 30;
}

/// A physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Physical(pub u64);

/// Linear address of physical address 0.
static DIRECT: AtomicU64 = AtomicU64::new(0);
/// Linear address of the image minus its physical one.
static IMAGE: AtomicU64 = AtomicU64::new(0);

/// The image has moved: everything is behind `base` from now on.
pub fn moved_to(base: u64) {
    DIRECT.store(base + place::DIRECT, Ordering::Relaxed);
    IMAGE.store(base + place::IMAGE, Ordering::Relaxed);
}

/// The first address of the range the kernel runs in. Zero before it has moved.
pub fn base() -> u64 {
    DIRECT.load(Ordering::Relaxed) - place::DIRECT
}

/// Where something of the image is in physical memory.
pub fn physical<T>(of: *const T) -> Physical {
    Physical((of as u64).wrapping_sub(IMAGE.load(Ordering::Relaxed)))
}

/// The linear address of physical memory.
pub fn linear(address: Physical) -> u64 {
    address.0 + DIRECT.load(Ordering::Relaxed)
}

/// Reads physical memory below 4 GiB. Past that there is nothing, as on an empty bus: ones.
pub fn read<T: Plain>(address: Physical) -> T {
    if address.0 >= (4 << 30) - size_of::<T>() as u64 {
        return T::ONES;
    }
    // SAFETY: needed as nothing here is a Rust object. The first 4 GiB are mapped (before the move one to one), `Plain`
    // types have no invalid values, and an unaligned address is fine for this read. That others write it meanwhile
    // is why it is copied out.
    unsafe { core::ptr::read_unaligned(core::hint::black_box(linear(address) as *const T)) }
}

/// Writes physical memory below 4 GiB.
///
/// # Safety
/// No Rust object is there, or one that can be written any time (a [`PageFrame`]).
pub unsafe fn write<T: Plain>(address: Physical, value: T) {
    // SAFETY: mapped, see `read`; the rest is the caller's.
    unsafe { core::ptr::write_volatile(linear(address) as *mut T, value) }
}

/// Integers: types for which any bytes are a value.
///
/// # Safety
/// As the first sentence says.
pub unsafe trait Plain: Copy {
    /// What an empty bus reads as.
    const ONES: Self;
}
// SAFETY: integers.
unsafe impl Plain for u8 {
    const ONES: Self = !0;
}
// SAFETY: integers.
unsafe impl Plain for u32 {
    const ONES: Self = !0;
}
// SAFETY: integers.
unsafe impl Plain for u64 {
    const ONES: Self = !0;
}

const FRAMES: usize = 256;

#[repr(C, align(4096))]
struct Pool(UnsafeCell<[[u64; 512]; FRAMES]>);

// SAFETY: reached only through physical addresses, never by reference.
unsafe impl Sync for Pool {}

static POOL: Pool = Pool(UnsafeCell::new([[0; 512]; FRAMES]));
static USED: AtomicUsize = AtomicUsize::new(0);

/// A page of memory that is ours for good: zero, and reached only by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFrame(Physical);

impl PageFrame {
    /// The next page. There are enough for every check; without one the kernel panics.
    pub fn new() -> Self {
        let n = USED.fetch_add(1, Ordering::Relaxed);
        assert!(n < FRAMES, "out of page frames");
        Self(Physical(physical(POOL.0.get()).0 + n as u64 * PAGE))
    }

    /// The page of a page table that is at `address`: one of ours, or one of the boot tables.
    pub(crate) fn at_address(address: Physical) -> Self {
        Self(address)
    }

    /// Its address.
    pub fn address(self) -> Physical {
        self.0
    }

    /// Word `n` of its 512.
    pub fn word(self, n: u64) -> u64 {
        read(self.at(n))
    }

    /// Sets word `n` of its 512.
    pub fn set_word(self, n: u64, value: u64) {
        // SAFETY: a frame.
        unsafe { write(self.at(n), value) }
    }

    fn at(self, n: u64) -> Physical {
        Physical(self.0.0 + n % 512 * 8)
    }
}

impl Default for PageFrame {
    fn default() -> Self {
        Self::new()
    }
}
