//! The archive format of an initramfs: "newc" cpio, as the kernel's `Documentation/driver-api/early-userspace/
//! buffer-format.rst` gives it. Uncompressed: the guest would spend instructions on unpacking it.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_CHARACTER: u32 = 0o020_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_SYMLINK: u32 = 0o120_000;

/// An archive under construction. Files belong to root and carry no times, so equal input gives equal bytes.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<PathBuf>,
    once: BTreeSet<PathBuf>,
}

impl Archive {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a directory, unless it is there already.
    pub fn directory(&mut self, path: impl AsRef<Path>, mode: u32) {
        let path = path.as_ref();
        if self.directories.insert(path.to_owned()) {
            self.entry(path, TYPE_DIRECTORY | mode, (0, 0), &[]);
        }
    }

    /// Adds a regular file.
    pub fn file(&mut self, path: impl AsRef<Path>, mode: u32, content: &[u8]) {
        self.entry(path.as_ref(), TYPE_FILE | mode, (0, 0), content);
    }

    /// Adds a regular file unless one of that path came in by this method before.
    pub fn file_once(&mut self, path: impl AsRef<Path>, mode: u32, content: impl FnOnce() -> Vec<u8>) {
        if self.once.insert(path.as_ref().to_owned()) {
            self.file(path, mode, &content());
        }
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: impl AsRef<Path>, target: impl AsRef<Path>) {
        self.entry(path.as_ref(), TYPE_SYMLINK | 0o777, (0, 0), target.as_ref().as_os_str().as_bytes());
    }

    /// Adds a character device node.
    pub fn character_device(&mut self, path: impl AsRef<Path>, mode: u32, major: u32, minor: u32) {
        self.entry(path.as_ref(), TYPE_CHARACTER | mode, (major, minor), &[]);
    }

    /// Ends the archive and returns its bytes.
    ///
    /// The format's fields hold 32 bits; what goes in here is far smaller, and a longer file is cut to nothing
    /// rather than written with a wrong size.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(Path::new("TRAILER!!!"), 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, path: &Path, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        if let Some(parent) = path.parent().filter(|p| p.parent().is_some()) {
            self.directory(parent, 0o755);
        }
        let name = path.strip_prefix("/").unwrap_or(path).as_os_str().as_bytes();
        let (content, size) = match u32::try_from(content.len()) {
            Ok(size) => (content, size),
            Err(_) => (&[][..], 0),
        };
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        self.entries += 1;
        let links = if mode & TYPE_DIRECTORY != 0 { 2 } else { 1 };
        // inode, mode, uid, gid, links, mtime, size, device, device of the node, name size, checksum
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, major, minor, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name);
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A second, plain reader: (name, mode, content) of each entry before the trailer.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        let start = bytes.len();
        loop {
            assert_eq!(&bytes[..6], b"070701");
            let field = |i: usize| {
                u32::from_str_radix(std::str::from_utf8(&bytes[6 + 8 * i..14 + 8 * i]).unwrap(), 16)
            };
            let (mode, size, name_size) =
                (field(1).unwrap(), field(6).unwrap() as usize, field(11).unwrap() as usize);
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let data = (110 + name_size).next_multiple_of(4);
            let content = bytes[data..data + size].to_vec();
            bytes = &bytes[(data + size).next_multiple_of(4)..];
            assert_eq!((start - bytes.len()) % 4, 0);
            if name == "TRAILER!!!" {
                assert!(bytes.is_empty());
                return found;
            }
            found.push((name, mode, content));
        }
    }

    #[test]
    fn entries_are_read_back_with_their_parents() {
        let mut archive = Archive::new();
        archive.file("/init", 0o755, b"#!");
        archive.file("/a/b/c", 0o600, b"12345");
        archive.symlink("/a/link", "b/c");
        archive.directory("/a", 0o700);
        let entries = read(&archive.finish());
        let names: Vec<_> = entries.iter().map(|(name, mode, _)| (name.as_str(), *mode)).collect();
        assert_eq!(
            names,
            [
                ("init", 0o100_755),
                ("a", 0o40_755),
                ("a/b", 0o40_755),
                ("a/b/c", 0o100_600),
                ("a/link", 0o120_777)
            ]
        );
        assert_eq!(entries[3].2, b"12345");
        assert_eq!(entries[4].2, b"b/c");
    }

    #[test]
    fn an_empty_archive_is_a_trailer() {
        assert_eq!(read(&Archive::new().finish()), []);
    }
}
