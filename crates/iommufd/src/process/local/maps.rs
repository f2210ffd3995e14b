//! What is mapped where in this process: proc_pid_maps(5).

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
    Ok(String::from_utf8_lossy(&text).lines().filter_map(Mapping::parse).collect())
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

    #[test]
    fn private_pages_are_known_by_their_address() {
        let mapping = Mapping::parse("1000-3000 r--p 00000000 fe:01 77 /bin/true").unwrap();
        assert_eq!(mapping.page(0x2abc), PageId::Private(2));
        assert_eq!(mapping.find(PageId::Private(2)), Some(0x2000));
        assert_eq!(mapping.find(PageId::Private(3)), None);
    }
}
