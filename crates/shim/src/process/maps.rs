//! What is mapped where in this process: `/proc/self/maps`.

use std::fs;

use iommufd::{Errno, Result, iova::PAGE_SIZE, process::PageId};

/// One mapping.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Mapped {
    /// The first address.
    pub start: u64,
    /// The first address past it.
    pub end: u64,
    /// Whether the program may read it.
    pub readable: bool,
    /// Whether the program may write to it.
    pub writable: bool,
    /// Whether writes are seen through other mappings of the same file.
    pub shared: bool,
    /// The device and the inode of its file, and where in it the mapping begins; none for memory without a file.
    pub file: Option<(u64, u64, u64)>,
}

impl Mapped {
    /// Where in the file the mapping begins, when it is a shared one of that file.
    pub(crate) fn shared_file(&self, device: u64, inode: u64) -> Option<u64> {
        let (dev, ino, offset) = self.file?;
        (self.shared && (dev, ino) == (device, inode)).then_some(offset)
    }

    /// What the page at `at`, which is in it, is.
    pub(crate) fn page(&self, at: u64) -> PageId {
        match self.file {
            Some((dev, ino, offset)) if self.shared => {
                PageId::File { dev, ino, index: (offset + (at - self.start)) / PAGE_SIZE }
            }
            _ => PageId::Private(at / PAGE_SIZE),
        }
    }

    /// Where it has `page`.
    pub(crate) fn find(&self, page: PageId) -> Option<u64> {
        let at = match page {
            PageId::Private(number) => {
                number.checked_mul(PAGE_SIZE).filter(|_| self.file.is_none() || !self.shared)?
            }
            PageId::File { dev, ino, index } => {
                let offset = self.shared_file(dev, ino)?;
                self.start.checked_add(index.checked_mul(PAGE_SIZE)?.checked_sub(offset)?)?
            }
        };
        (self.start..self.end).contains(&at).then_some(at)
    }
}

/// All mappings, in the order of their addresses.
pub(crate) fn all() -> Result<Vec<Mapped>> {
    read("/proc/self/maps")
}

/// Those of another process.
pub(crate) fn of(pid: i32) -> Result<Vec<Mapped>> {
    read(&format!("/proc/{pid}/maps"))
}

fn read(path: &str) -> Result<Vec<Mapped>> {
    let text = fs::read(path).map_err(|_| Errno::FAULT)?;
    Ok(text.split(|&byte| byte == b'\n').filter_map(|line| parse(core::str::from_utf8(line).ok()?)).collect())
}

/// The mapping that `at` is in.
pub(crate) fn at(at: u64) -> Result<Mapped> {
    all()?.into_iter().find(|mapped| (mapped.start..mapped.end).contains(&at)).ok_or(Errno::FAULT)
}

/// One line, as proc(5) describes it: `start-end rwxp offset major:minor inode path`.
fn parse(line: &str) -> Option<Mapped> {
    let hexadecimal = |text| u64::from_str_radix(text, 16).ok();
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let rights = words.next()?.as_bytes();
    let offset = hexadecimal(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let inode = words.next()?.parse().ok()?;
    let device = (hexadecimal(major)? << 32) | hexadecimal(minor)?;
    Some(Mapped {
        start: hexadecimal(start)?,
        end: hexadecimal(end)?,
        readable: rights.first() == Some(&b'r'),
        writable: rights.get(1) == Some(&b'w'),
        shared: rights.get(3) == Some(&b's'),
        file: (inode != 0).then_some((device, inode, offset)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_a_file() {
        let mapped = parse("7f10c000-7f10e000 rw-s 00003000 00:01 1027  /memfd:buffer (deleted)").unwrap();
        assert_eq!((mapped.start, mapped.end), (0x7f10_c000, 0x7f10_e000));
        assert!(mapped.readable && mapped.writable && mapped.shared);
        assert_eq!(mapped.file, Some((1, 1027, 0x3000)));
    }

    #[test]
    fn a_line_without_a_file() {
        let mapped = parse("7ffc1000-7ffc3000 r--p 00000000 00:00 0  [vvar]").unwrap();
        assert!(mapped.readable && !mapped.writable && !mapped.shared);
        assert_eq!(mapped.file, None);
    }

    #[test]
    fn this_test_is_somewhere() {
        let local = 0_u8;
        let mapped = at(&raw const local as u64).unwrap();
        assert!(mapped.writable && !mapped.shared);
    }
}
