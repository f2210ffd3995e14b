//! Page tables: the roots of the kernel and of its user space.
//!
//! The kernel's root maps the kernel and all of user space; the user's root maps user space only, as PVM recommends: an
//! event changes to the kernel's root before its first instruction.

use crate::memory::{PAGE, PageFrame, Physical, physical, place};

/// Bits of an entry (Intel SDM vol. 3, 4.5).
pub mod bits {
    /// The entry is used.
    pub const PRESENT: u64 = 1 << 0;
    /// Writable.
    pub const WRITE: u64 = 1 << 1;
    /// For user mode; PVM may ignore it.
    pub const USER: u64 = 1 << 2;
    /// A page of 2 MiB.
    pub const LARGE: u64 = 1 << 7;
    /// No fetches.
    pub const NO_EXECUTE: u64 = 1 << 63;
    /// Where the protection key is.
    pub const KEY_SHIFT: u32 = 59;
}
use bits::{LARGE, NO_EXECUTE, PRESENT, USER, WRITE};

/// What a page is for.
pub mod rights {
    use super::bits::{NO_EXECUTE, PRESENT, USER, WRITE};
    /// The kernel's code.
    pub const CODE: u64 = PRESENT;
    /// The kernel's constants.
    pub const CONSTANT: u64 = PRESENT | NO_EXECUTE;
    /// The kernel's data.
    pub const DATA: u64 = PRESENT | WRITE | NO_EXECUTE;
    /// User code.
    pub const USER_CODE: u64 = PRESENT | USER;
    /// User constants.
    pub const USER_CONSTANT: u64 = PRESENT | USER | NO_EXECUTE;
    /// User data.
    pub const USER_DATA: u64 = PRESENT | USER | WRITE | NO_EXECUTE;
}

/// A page-table entry's address part.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A tree of page tables of four levels, or of five.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tree {
    root: PageFrame,
    levels: u32,
}

impl Tree {
    /// An empty tree of four levels.
    pub fn new() -> Self {
        Self { root: PageFrame::new(), levels: 4 }
    }

    /// The four-level tree with this root, which is one of ours.
    pub(crate) fn of_root(root: u64) -> Self {
        Self { root: frame_at(root), levels: 4 }
    }

    /// A tree of five levels over `lower`, which maps the same addresses.
    pub fn five_level(lower: Self) -> Self {
        let root = PageFrame::new();
        let entry = lower.root.address().0 | PRESENT | WRITE | USER;
        root.set_word(0, entry);
        root.set_word(511, entry);
        Self { root, levels: 5 }
    }

    /// For CR3.
    pub fn root(self) -> u64 {
        self.root.address().0
    }

    /// The frame of the root table.
    pub fn root_frame(self) -> PageFrame {
        self.root
    }

    /// Where the entry for a page is: its table and index, with the tables above made if need be.
    fn entry(self, address: u64) -> (PageFrame, u64) {
        let mut table = self.root;
        for level in (1..self.levels).rev() {
            let index = address >> (12 + 9 * level) & 511;
            let entry = table.word(index);
            table = if entry & PRESENT == 0 {
                let next = PageFrame::new();
                table.set_word(index, next.address().0 | PRESENT | WRITE | USER);
                next
            } else {
                frame_at(entry)
            };
        }
        (table, address >> 12 & 511)
    }

    /// Maps a page, and says what was there before. The caller sees to the TLB.
    pub fn map(self, address: u64, to: Physical, rights: u64) -> u64 {
        let (table, index) = self.entry(address);
        let old = table.word(index);
        table.set_word(index, to.0 & ADDRESS | rights);
        old
    }

    /// Takes a page's mapping away.
    pub fn unmap(self, address: u64) {
        let (table, index) = self.entry(address);
        table.set_word(index, 0);
    }

    /// Maps a range of the image, rounded out to pages, for which `start` is where it is and `at` where it goes.
    fn map_image(self, at: u64, pages: core::ops::Range<u64>, rights: u64) {
        for page in (pages.start..pages.end).step_by(PAGE as usize) {
            self.map(at + (page - pages.start), Physical(page), rights);
        }
    }

    /// Lets `self` have `other`'s entry of the root table for `address`.
    pub fn share_slot(self, other: Self, address: u64) {
        let index = address >> (12 + 9 * (self.levels - 1)) & 511;
        self.root.set_word(index, other.root.word(index));
    }
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

/// The frame that an entry points to. Entries that this module follows point to frames of its own.
fn frame_at(entry: u64) -> PageFrame {
    PageFrame::at_address(Physical(entry & ADDRESS))
}

unsafe extern "C" {
    static image_start: u8;
    static user_start: u8;
    static user_end: u8;
    static text_end: u8;
    static rodata_end: u8;
    static image_end: u8;
    static boot_pml4: u8;
    static boot_pdpt: u8;
    static boot_directories: u8;
}

/// The physical range of the user programs.
pub fn user_programs() -> core::ops::Range<u64> {
    physical(&raw const user_start).0..physical(&raw const user_end).0
}

/// Address of the boot root: the identity map of the first 4 GiB, and the kernel's slot once there is one.
pub fn boot_root() -> u64 {
    physical(&raw const boot_pml4).0
}

/// Fills the boot tables: an identity map of 4 GiB. (PVH's 32-bit code has done the same before.)
pub fn make_boot_tables() {
    let frame = |of: *const u8, n: u64| PageFrame::at_address(Physical(physical(of).0 + n * PAGE));
    for n in 0..4 {
        let directory = frame(&raw const boot_directories, n);
        for i in 0..512 {
            directory.set_word(i, (n * 512 + i) << 21 | PRESENT | WRITE | LARGE);
        }
        frame(&raw const boot_pdpt, 0).set_word(n, directory.address().0 | PRESENT | WRITE);
    }
    frame(&raw const boot_pml4, 0).set_word(0, frame(&raw const boot_pdpt, 0).address().0 | PRESENT | WRITE);
}

/// Builds the kernel's root for a kernel that is to run behind `base`, and puts the same slot into the boot root.
pub fn make_kernel_tree(base: u64) -> Tree {
    let tree = Tree::new();
    // The direct map shares the boot tables' directories, without execution.
    let directories = physical(&raw const boot_directories).0;
    let pdpt = PageFrame::new();
    tree.root.set_word(base >> 39 & 511, pdpt.address().0 | PRESENT | WRITE);
    for n in 0..4 {
        let directory = directories + n * PAGE;
        pdpt.set_word((place::DIRECT >> 30) + n, directory | PRESENT | WRITE | NO_EXECUTE);
    }
    let image = |start: *const u8, end: *const u8| physical(start).0..physical(end).0;
    for (pages, rights) in [
        (image(&raw const image_start, &raw const text_end), rights::CODE),
        (image(&raw const text_end, &raw const rodata_end), rights::CONSTANT),
        (image(&raw const rodata_end, &raw const image_end), rights::DATA),
    ] {
        tree.map_image(base + place::IMAGE + pages.start, pages, rights);
    }
    let boot = Tree { root: PageFrame::at_address(Physical(boot_root())), levels: 4 };
    boot.share_slot(tree, base);
    tree
}
