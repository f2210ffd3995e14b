//! What is mapped where in this process: proc_pid_maps(5).
//!
//! The kernel writes the file by the page and lets go of the address space in between. When a mapping grows meanwhile,
//! because it is joined with what lies behind it, it comes again as a whole. So of each line only what lies behind the
//! lines before it counts ([`disjoint`]): who moves memory by this list must not come to an address twice. What is mapped all
//! the time is never left out.

use std::fs;

use super::{PageId, pins};
use crate::{Errno, Result, domain::HostAddr, iova::PAGE_SIZE};

/// One line of `/proc/self/maps`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    /// The first address behind it.
    pub(crate) end: u64,
    readable: bool,
    writable: bool,
    private: bool,
    /// Which byte of the file is at `start`.
    offset: u64,
    dev: u64,
    ino: u64,
}

impl Mapping {
    pub(crate) fn readable(&self) -> bool {
        self.readable
    }

    pub(crate) fn writable(&self) -> bool {
        self.writable
    }

    pub(crate) fn private(&self) -> bool {
        self.private
    }

    /// `start-end perms offset major:minor inode path`, all but the inode in hexadecimal.
    fn parse(line: &str) -> Option<Self> {
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let mut fields = line.split_ascii_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let perms = fields.next()?.as_bytes();
        let offset = fields.next()?;
        let (major, minor) = fields.next()?.split_once(':')?;
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            readable: *perms.first()? == b'r',
            writable: *perms.get(1)? == b'w',
            private: *perms.get(3)? == b'p',
            offset: hex(offset)?,
            dev: (hex(major)? << 32) | hex(minor)?,
            ino: fields.next()?.parse().ok()?,
        })
    }

    /// Which page is at `at`, which is in it.
    pub(crate) fn page(&self, at: u64) -> PageId {
        if self.private {
            return PageId::Private(at / PAGE_SIZE);
        }
        PageId::File { dev: self.dev, ino: self.ino, index: (self.offset + (at - self.start)) / PAGE_SIZE }
    }

    /// Whether it is of the file with this device, as stat(2) has it, and inode.
    pub(crate) fn is_of(&self, device: u64, inode: u64) -> bool {
        let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
        (self.dev, self.ino) == (u64::from(major) << 32 | u64::from(minor), inode)
    }

    /// Which byte of the file is at `at`, which is in it.
    pub(crate) fn offset_of(&self, at: u64) -> u64 {
        self.offset + (at - self.start)
    }

    /// Where it has `page`.
    pub(crate) fn find(&self, page: PageId) -> Option<u64> {
        let at = match page {
            PageId::Private(number) => self.private.then_some(number * PAGE_SIZE)?,
            PageId::File { dev, ino, index } => {
                let same = !self.private && (dev, ino) == (self.dev, self.ino);
                let into = same.then(|| (index * PAGE_SIZE).checked_sub(self.offset)).flatten()?;
                self.start.checked_add(into)?
            }
        };
        (self.start <= at && at < self.end).then_some(at)
    }
}

/// All of this process, in order.
pub(crate) fn all() -> Result<Vec<Mapping>> {
    read("/proc/self/maps")
}

/// All of another process.
pub(crate) fn of(pid: i32) -> Result<Vec<Mapping>> {
    read(&format!("/proc/{pid}/maps"))
}

fn read(path: &str) -> Result<Vec<Mapping>> {
    let text = fs::read(path).map_err(|_| Errno::FAULT)?;
    // Paths may be anything.
    Ok(disjoint(String::from_utf8_lossy(&text).lines().filter_map(Mapping::parse)))
}

/// The mappings in order, each without what lies in those before it.
fn disjoint(mappings: impl Iterator<Item = Mapping>) -> Vec<Mapping> {
    let mut end = 0;
    let rest = |mapping: Mapping| {
        let start = mapping.start.max(end);
        end = end.max(mapping.end);
        let offset = mapping.offset.wrapping_add(start - mapping.start);
        (start < mapping.end).then_some(Mapping { start, offset, ..mapping })
    };
    mappings.filter_map(rest).collect()
}

/// The mappings that have a part of `start..end`, in order.
pub(crate) fn mappings(start: HostAddr, end: u64) -> Result<Vec<Mapping>> {
    let mut mappings = all()?;
    mappings.retain(|mapping| mapping.start < end && start.0 < mapping.end);
    Ok(mappings)
}

/// Which page is at `at`. EFAULT when there is none.
pub(crate) fn page_id(at: HostAddr) -> Result<PageId> {
    let mapping = mappings(at, at.0.saturating_add(1))?.into_iter().next();
    mapping.map(|mapping| mapping.page(at.0)).ok_or(Errno::FAULT)
}

/// How often the page at `at` is pinned, wherever it was found. EFAULT when there is none.
pub(crate) fn pin_count(at: HostAddr) -> Result<u64> {
    pin_count_of(page_id(at)?)
}

/// How often `page` is pinned, wherever it is mapped.
pub(crate) fn pin_count_of(page: PageId) -> Result<u64> {
    Ok(all()?.iter().filter_map(|mapping| mapping.find(page)).map(|at| pins::count(HostAddr(at))).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_maps_is_taken_apart() {
        let line =
            "7f0000001000-7f0000003000 rw-s 00002000 00:01 1234                       /memfd:a b (deleted)";
        let mapping = Mapping::parse(line).unwrap();
        assert_eq!(
            (mapping.start, mapping.end, mapping.writable()),
            (0x7f00_0000_1000, 0x7f00_0000_3000, true)
        );
        let page = mapping.page(0x7f00_0000_2fff);
        assert_eq!(page, PageId::File { dev: 1, ino: 1234, index: 3 });
        assert_eq!(mapping.find(page), Some(0x7f00_0000_2000));
        assert_eq!(mapping.find(PageId::File { dev: 1, ino: 1234, index: 4 }), None);
        assert_eq!(mapping.find(PageId::File { dev: 1, ino: 1234, index: 1 }), None);
        assert_eq!(mapping.find(PageId::Private(0x7_f000_0002)), None);
    }

    /// As the kernel writes it when `2000-3000` and what is behind it are joined between two pages of the file.
    #[test]
    fn a_mapping_that_grew_while_it_was_read_is_not_there_twice() {
        let lines = [
            "1000-2000 r--s 00000000 fe:01 77 /a",
            "2000-3000 rw-s 00005000 fe:01 78 /b",
            "2000-6000 rw-s 00005000 fe:01 78 /b",
            "4000-5000 rw-s 00007000 fe:01 78 /b",
            "6000-7000 r--s 00000000 fe:01 77 /a",
        ];
        let mappings = disjoint(lines.into_iter().filter_map(Mapping::parse));
        let ranges: Vec<_> = mappings.iter().map(|mapping| (mapping.start, mapping.end)).collect();
        assert_eq!(ranges, [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x6000), (0x6000, 0x7000)]);
        let page = PageId::File { dev: 0xfe_0000_0001, ino: 78, index: 6 };
        assert_eq!(mappings.iter().filter_map(|mapping| mapping.find(page)).collect::<Vec<_>>(), [0x3000]);
        assert_eq!(mappings[2].page(0x3000), page);
    }

    #[test]
    fn private_pages_are_known_by_their_address() {
        let mapping = Mapping::parse("1000-3000 r--p 00000000 fe:01 77 /bin/true").unwrap();
        assert_eq!(mapping.page(0x2abc), PageId::Private(2));
        assert_eq!(mapping.find(PageId::Private(2)), Some(0x2000));
        assert_eq!(mapping.find(PageId::Private(3)), None);
    }
}
