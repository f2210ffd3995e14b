//! The software TLB.
//!
//! # Theory of operation
//! A direct-mapped table of 4 KiB pages for each kind of privilege that data accesses can have: user,
//! supervisor with SMAP in force, supervisor with SMAP lifted. An entry holds one tag for reads, one
//! for writes and one for fetches, so that a hit is one comparison and needs no permission check: a right
//! that the page does not give, or that needs care (MMIO, a clean page whose dirty bit must be set first, a
//! page with decoded code), simply has a tag that never matches. A fourth table stays empty: while
//! data breakpoints or alignment checks are on, accesses are sent through it and so take the slow path.
//!
//! What a protection key forbids counts among these rights. Programs change PKRU often, so such a change must
//! not cost the whole table: pages with a key other than 0 are few, are noted in a bitmap, and
//! [`Tlb::deny_keys`] drops those whose key lost a right. A right that a key gains needs nothing: what was
//! forbidden misses. So an entry never allows what the present registers forbid, whichever PCID it is of.
//!
//! A tag is the page's address with the PCID in its low 12 bits. A global page is stored under the PCID that
//! was current; another PCID that misses on it takes the entry over without a walk.
//!
//! The comparison is made for the page of an access's *last* byte while the entry is chosen by its first,
//! so that an access that crosses a page never hits.
//!
//! The TLB is the security boundary: [`Tlb::fill`] is the only place where a host address enters it, and
//! its caller passes pages of guest RAM only. It holds while the host speculates, too: the address of a miss is 0 by
//! computation, not by a branch that a guest could train ([`hostmem::address_if_equal`]).

use mmu::{Gpa, Gva};

use crate::hostmem;

/// Pages in each table.
const SIZE: usize = 1024;
const TABLES: usize = 4;
const MASK: usize = SIZE * TABLES - 1;
/// Matches nothing: PCID 0xfff is never used in a tag.
const NEVER: u64 = u64::MAX;

/// Which table an access goes through.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Table {
    /// CPL 3.
    User = 0,
    /// CPL 0 to 2 with SMAP in force, and implicit accesses at any CPL.
    Supervisor = 1,
    /// CPL 0 to 2 with EFLAGS.AC lifting SMAP.
    SupervisorAc = 2,
    /// Always empty.
    Slow = 3,
}

impl Table {
    /// Where the table starts.
    pub(crate) const fn base(self) -> u64 {
        self as u64 * SIZE as u64
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Entry {
    read: u64,
    write: u64,
    exec: u64,
    /// Host address minus guest-virtual address.
    delta: usize,
}

const EMPTY: Entry = Entry { read: NEVER, write: NEVER, exec: NEVER, delta: 0 };

/// What the fast path does not look at.
#[derive(Clone, Copy, Default)]
struct Meta {
    gpa: u64,
    global: bool,
    key: PageKey,
}

/// A page's protection key, and the register that judges it.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub(crate) struct PageKey {
    /// The key, 0 to 15.
    pub(crate) key: u8,
    /// Whether the page is a user-mode page, thus PKRU's; else it is IA32_PKRS's.
    pub(crate) user: bool,
}

/// What [`Tlb::fill`] stores.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fill {
    /// Host address of the page of guest RAM.
    pub(crate) host: usize,
    /// Its guest-physical address.
    pub(crate) gpa: Gpa,
    /// Reads hit.
    pub(crate) read: bool,
    /// Writes hit.
    pub(crate) write: bool,
    /// Fetches hit.
    pub(crate) exec: bool,
    /// The page is global.
    pub(crate) global: bool,
    /// The page is part of a page larger than 4 KiB.
    pub(crate) large: bool,
    /// Its protection key.
    pub(crate) key: PageKey,
}

/// The software TLB of one vCPU.
pub(crate) struct Tlb {
    entries: Box<[Entry; SIZE * TABLES]>,
    meta: Box<[Meta; SIZE * TABLES]>,
    /// A bit for each entry, set if its page has a protection key other than 0.
    keyed: [u64; SIZE * TABLES / 64],
    /// A bit for each 1 GiB of address space (modulo 64) in which fragments of large pages are held.
    large: u64,
    /// Whether anything was filled since the last full flush.
    used: bool,
}

impl Tlb {
    pub(crate) fn new() -> Self {
        Self {
            entries: boxed(EMPTY),
            meta: boxed(Meta::default()),
            keyed: [0; SIZE * TABLES / 64],
            large: 0,
            used: false,
        }
    }

    #[inline(always)]
    fn index(base: u64, gva: u64) -> usize {
        (base as usize + ((gva >> 12) as usize & (SIZE - 1))) & MASK
    }

    /// The host address of `size` bytes at `gva` if a read of them hits.
    #[inline(always)]
    pub(crate) fn read(&self, base: u64, tag: u64, gva: u64, size: u64) -> Option<usize> {
        let entry = &self.entries[Self::index(base, gva)];
        let last = gva.wrapping_add(size - 1);
        hit(entry.read, last & !0xfff | tag, entry.delta.wrapping_add(gva as usize))
    }

    /// The host address of `size` bytes at `gva` if a write of them hits.
    #[inline(always)]
    pub(crate) fn write(&self, base: u64, tag: u64, gva: u64, size: u64) -> Option<usize> {
        let entry = &self.entries[Self::index(base, gva)];
        let last = gva.wrapping_add(size - 1);
        hit(entry.write, last & !0xfff | tag, entry.delta.wrapping_add(gva as usize))
    }

    /// The guest-physical address behind `gva` if a fetch from its page hits.
    #[inline(always)]
    pub(crate) fn fetch(&self, base: u64, tag: u64, gva: u64) -> Option<Gpa> {
        let index = Self::index(base, gva);
        (self.entries[index].exec == (gva & !0xfff | tag)).then(|| Gpa(self.meta[index].gpa | gva & 0xfff))
    }

    /// Puts the page of `gva` into the table at `base`.
    pub(crate) fn fill(&mut self, base: u64, tag: u64, gva: Gva, fill: Fill) {
        let index = Self::index(base, gva.0);
        let page = gva.page().0;
        let key = page | tag;
        let pick = |allowed| if allowed { key } else { NEVER };
        self.entries[index] = Entry {
            read: pick(fill.read),
            write: pick(fill.write),
            exec: pick(fill.exec),
            delta: fill.host.wrapping_sub(page as usize),
        };
        self.meta[index] = Meta { gpa: fill.gpa.page().0, global: fill.global, key: fill.key };
        let (word, bit) = (&mut self.keyed[index / 64], 1 << (index % 64));
        *word = if fill.key.key == 0 { *word & !bit } else { *word | bit };
        self.used = true;
        if fill.large {
            self.large |= 1 << (page >> 30 & 63);
        }
    }

    /// If the entry for `gva` is a global page held under another PCID, moves it to `tag`; says whether
    /// it did.
    pub(crate) fn adopt_global(&mut self, base: u64, tag: u64, gva: Gva) -> bool {
        let index = Self::index(base, gva.0);
        let page = gva.page().0;
        if !self.meta[index].global {
            return false;
        }
        let entry = &mut self.entries[index];
        let mut adopted = false;
        for field in [&mut entry.read, &mut entry.write, &mut entry.exec] {
            if *field != NEVER && *field & !0xfff == page && *field & 0xfff != tag {
                *field = page | tag;
                adopted = true;
            }
        }
        adopted
    }

    /// Drops everything.
    pub(crate) fn flush_all(&mut self) {
        if self.used {
            self.entries.fill(EMPTY);
            self.keyed.fill(0);
            self.used = false;
            self.large = 0;
        }
    }

    /// Drops what is not global, of every PCID.
    pub(crate) fn flush_non_global(&mut self) {
        self.flush_where(|_, meta| !meta.global);
    }

    /// Drops what is not global of the PCID whose tag is `tag`.
    pub(crate) fn flush_pcid(&mut self, tag: u64) {
        self.flush_where(|entry, meta| !meta.global && entry.has_tag(tag));
    }

    /// Drops the user-mode and supervisor-mode translations of one page, global or not, of every PCID: more
    /// than INVLPG must.
    pub(crate) fn flush_page(&mut self, gva: Gva) {
        if self.large & 1 << (gva.0 >> 30 & 63) != 0 {
            // The page may be a fragment of a large one, whose other fragments go with it. Their size is
            // not known here, so all of the address range that shares the bit goes.
            let gib = gva.0 >> 30;
            self.flush_where(|entry, _| entry.in_gib(gib));
            return;
        }
        let page = gva.page().0;
        for table in [Table::User, Table::Supervisor, Table::SupervisorAc] {
            let entry = &mut self.entries[Self::index(table.base(), gva.0)];
            if entry.is_page(page) {
                *entry = EMPTY;
            }
        }
    }

    /// Drops what the protection keys in `denied` allowed, of every PCID: of user-mode pages if `user`, else of
    /// supervisor-mode pages. `denied` has the bits, as PKRU has them, that have become set.
    pub(crate) fn deny_keys(&mut self, user: bool, denied: u32) {
        if denied & 0b11 != 0 {
            // Almost every page has key 0.
            self.flush_all();
        } else if denied != 0 {
            for (n, word) in self.keyed.iter_mut().enumerate() {
                let mut left = *word;
                while left != 0 {
                    let bit = left.trailing_zeros();
                    left &= left - 1;
                    let index = n * 64 + bit as usize;
                    let key = self.meta[index].key;
                    if key.user == user && denied >> (2 * key.key) & 0b11 != 0 {
                        self.entries[index] = EMPTY;
                        *word &= !(1 << bit);
                    }
                }
            }
        }
    }

    /// Takes the right to write from every entry for the page at host address `host`.
    pub(crate) fn write_protect(&mut self, host: usize) {
        for entry in self.entries.iter_mut() {
            if entry.write != NEVER && entry.delta.wrapping_add((entry.write & !0xfff) as usize) == host {
                entry.write = NEVER;
            }
        }
    }

    /// Takes the right to write from every entry.
    pub(crate) fn write_protect_all(&mut self) {
        self.entries.iter_mut().for_each(|entry| entry.write = NEVER);
    }

    fn flush_where(&mut self, drop: impl Fn(&Entry, &Meta) -> bool) {
        for (entry, meta) in self.entries.iter_mut().zip(self.meta.iter()) {
            if drop(entry, meta) {
                *entry = EMPTY;
            }
        }
    }
}

/// The host address `address` if an entry's tag `tag` is the one looked for, `wanted`. Guest RAM is nowhere at 0.
#[inline(always)]
fn hit(tag: u64, wanted: u64, address: usize) -> Option<usize> {
    let address = hostmem::address_if_equal(tag, wanted, address);
    (address != 0).then_some(address)
}

impl Entry {
    fn tags(&self) -> impl Iterator<Item = u64> {
        [self.read, self.write, self.exec].into_iter().filter(|t| *t != NEVER)
    }

    fn has_tag(&self, tag: u64) -> bool {
        self.tags().any(|t| t & 0xfff == tag)
    }

    fn is_page(&self, page: u64) -> bool {
        self.tags().any(|t| t & !0xfff == page)
    }

    fn in_gib(&self, gib: u64) -> bool {
        self.tags().any(|t| t >> 30 == gib)
    }
}

fn boxed<T: Copy>(value: T) -> Box<[T; SIZE * TABLES]> {
    match vec![value; SIZE * TABLES].into_boxed_slice().try_into() {
        Ok(array) => array,
        Err(_) => unreachable!("the vector has exactly the array's length"),
    }
}
