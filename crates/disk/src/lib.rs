//! A regular file or a block device of the host as the place where a disk keeps its sectors.
//!
//! What devices have in common that show a disk to a guest: how large it is, flushing, discarding, making zeroes. How data
//! moves between the file and a guest's memory is each device's own matter, by [`Disk::file`].

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{FallocateFlags, FileType, fallocate, fstat};

/// Bytes of a sector, the unit of a disk's size whatever its block size.
pub const SECTOR: u64 = 512;
/// Bytes that are written at once where a file has no fallocate.
static ZEROES: [u8; 1 << 16] = [0; 1 << 16];

/// A disk cannot be made of a file.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Not a regular file or block device.
    #[error("a disk must be a regular file or a block device")]
    Kind,
    /// Less than one sector.
    #[error("{0} bytes are too few for a disk")]
    Size(u64),
    /// The host refused.
    #[error("cannot find out the size of the disk")]
    Host(#[from] io::Error),
}

/// How a range is emptied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Clear {
    /// Its contents are not needed any more: a hint.
    Discard,
    /// It reads as zeroes.
    Zero,
    /// It reads as zeroes, and should take no room.
    ZeroAndUnmap,
}

/// The file behind a disk.
#[derive(Debug)]
pub struct Disk {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Disk {
    /// A disk of the whole sectors of `file`, which is open for reading, and for writing unless `read_only`.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn new(file: File, read_only: bool) -> Result<Self, DiskError> {
        let stat = fstat(&file).map_err(io::Error::from)?;
        if !matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::BlockDevice) {
            return Err(DiskError::Kind);
        }
        // The end by seeking, since the metadata of a block device does not tell it.
        let size = (&file).seek(SeekFrom::End(0))?;
        let sectors = size / SECTOR;
        if sectors == 0 { Err(DiskError::Size(size)) } else { Ok(Self { file, sectors, read_only }) }
    }

    /// The same disk for another thread.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, sectors: self.sectors, read_only: self.read_only })
    }

    /// How many sectors it has.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether it must not be written to.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The file, whose first byte is the disk's.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file, for interfaces that want it mutable.
    pub fn file_mut(&mut self) -> &mut File {
        &mut self.file
    }

    /// Waits until what was written is on the medium.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Empties `bytes` bytes at `place`, which lie on the disk. Zeroes are written where the file has no other way.
    ///
    /// # Errors
    /// The host's; none for [`Clear::Discard`].
    pub fn clear(&self, place: u64, bytes: u64, how: Clear) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let flags = match how {
            Clear::Discard | Clear::ZeroAndUnmap => FallocateFlags::PUNCH_HOLE,
            Clear::Zero => FallocateFlags::ZERO_RANGE,
        };
        match fallocate(self.file.as_fd(), flags | FallocateFlags::KEEP_SIZE, place, bytes) {
            Ok(()) => Ok(()),
            Err(_) if how == Clear::Discard => Ok(()),
            Err(_) => self.write_zeroes(place, bytes),
        }
    }

    fn write_zeroes(&self, place: u64, bytes: u64) -> io::Result<()> {
        let end = place.saturating_add(bytes);
        let mut at = place;
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(ZEROES.len());
            self.file.write_all_at(ZEROES.get(..len).unwrap_or(&[]), at)?;
            at += len as u64;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(bytes: &[u8]) -> Disk {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(bytes, 0).unwrap();
        Disk::new(file, false).unwrap()
    }

    #[test]
    fn whole_sectors_count() {
        assert_eq!(disk(&[0; 1535]).sectors(), 2);
        assert!(matches!(Disk::new(tempfile::tempfile().unwrap(), false), Err(DiskError::Size(0))));
        let null = File::open("/dev/null").unwrap();
        assert!(matches!(Disk::new(null, true), Err(DiskError::Kind)));
    }

    #[test]
    fn what_is_cleared_is_zero_and_nothing_else() {
        for how in [Clear::Discard, Clear::Zero, Clear::ZeroAndUnmap] {
            let disk = disk(&[7; 1 << 18]);
            disk.clear(4096 + 512, 100_352, how).unwrap();
            disk.clear(0, 0, how).unwrap();
            let mut back = vec![0; 1 << 18];
            disk.file().read_exact_at(&mut back, 0).unwrap();
            let (before, rest) = back.split_at(4608);
            let (cleared, after) = rest.split_at(100_352);
            assert!(before.iter().chain(after).all(|byte| *byte == 7), "{how:?}");
            assert!(cleared.iter().all(|byte| *byte == 0), "{how:?}");
        }
    }

    #[test]
    fn zeroes_are_written_where_there_is_no_fallocate() {
        let disk = disk(&[7; 1 << 18]);
        disk.write_zeroes(1, 200_000).unwrap();
        let mut back = vec![0; 1 << 18];
        disk.file().read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back.iter().filter(|byte| **byte == 0).count(), 200_000);
        assert_eq!((back[0], back[1], back[200_001]), (7, 0, 7));
    }
}
