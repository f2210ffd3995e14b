//! A log file of bounded size, which loses its oldest entries first.
//!
//! When an entry does not fit any more the newest part of the file is moved to its beginning, from a whole line on, and the
//! file is cut behind it. A quarter is freed each time, so that this is rare.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Bytes that are moved at a time.
const PIECE: usize = 64 << 10;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct BoundedFile {
    file: File,
    length: u64,
    most: u64,
}

impl BoundedFile {
    /// Makes the file, or empties it; it will not be longer than `most` bytes.
    pub(super) fn create(path: &Path, most: u64) -> io::Result<Self> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
        Ok(Self { file, length: 0, most })
    }

    /// Adds an entry, of which a file that is shorter takes the beginning.
    pub(super) fn append(&mut self, entry: &[u8]) -> io::Result<()> {
        let most = usize::try_from(self.most).unwrap_or(usize::MAX);
        let entry = entry.get(..most).unwrap_or(entry);
        let length = entry.len() as u64;
        if self.length + length > self.most {
            let room = self.most - length;
            self.keep(room.min(self.most - self.most / 4))?;
        }
        // syscalls: pwrite64
        self.file.write_all_at(entry, self.length)?;
        self.length += length;
        Ok(())
    }

    /// Cuts the file to whole lines, its newest, of `newest` bytes at most.
    fn keep(&mut self, newest: u64) -> io::Result<()> {
        let mut piece = vec![0; PIECE];
        let mut from = self.length.saturating_sub(newest);
        let mut to = 0;
        // The line that the cut is in goes, too; that before the cut may just have ended.
        let mut in_line = from > 0;
        from = from.saturating_sub(1);
        while from < self.length {
            // syscalls: pread64
            let read = self.file.read_at(&mut piece, from)?;
            if read == 0 {
                break;
            }
            from += read as u64;
            let mut rest = piece.get(..read).unwrap_or_default();
            if in_line {
                let Some(end) = rest.iter().position(|byte| *byte == b'\n') else { continue };
                rest = rest.get(end + 1..).unwrap_or_default();
                in_line = false;
            }
            self.file.write_all_at(rest, to)?;
            to += rest.len() as u64;
        }
        // syscalls: ftruncate
        self.file.set_len(to)?;
        self.length = to;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(name: &str, most: u64, entries: impl Iterator<Item = String>) -> Vec<String> {
        let path = std::env::temp_dir().join(format!("ring3-bounded-{}-{name}", std::process::id()));
        let mut file = BoundedFile::create(&path, most).unwrap();
        for entry in entries {
            file.append(entry.as_bytes()).unwrap();
            let length = std::fs::metadata(&path).unwrap().len();
            assert!(length <= most && length == file.length);
        }
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(path).unwrap();
        text.lines().map(str::to_owned).collect()
    }

    #[test]
    fn the_newest_entries_stay_whole() {
        for most in [200, 1000, 3 * PIECE as u64 + 17] {
            let count = most as usize;
            let lines = filled("newest", most, (0..count).map(|n| format!("entry {n}\n")));
            let first = count - lines.len();
            let expected: Vec<String> = (first..count).map(|n| format!("entry {n}")).collect();
            assert_eq!(lines, expected, "{most}");
            // Something of three quarters is always left.
            let length: usize = lines.iter().map(|line| line.len() + 1).sum();
            assert!(length as u64 > most / 2, "{length} of {most}");
        }
    }

    #[test]
    fn an_entry_that_is_too_long_is_cut() {
        let lines = filled("long", 64, [format!("{}\n", "x".repeat(100))].into_iter());
        assert_eq!(lines, ["x".repeat(64)]);
        let lines =
            filled("long-later", 64, ["a\n".to_owned(), "y".repeat(64), "b\n".to_owned()].into_iter());
        assert_eq!(lines, ["b"]);
    }
}
