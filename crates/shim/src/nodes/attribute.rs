//! A file of sysfs that the program opened to write.
//!
//! Reading gives what the file in the tree has, writing is a [`tree::Attribute`]'s business. Unlike a device's, the file has a
//! position, which only reading depends on.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};

use iommufd::{Errno, Result, process::UserAddr};
use vfio::doors::Caller;

use crate::{
    node::{Metadata, Node, Opened, ServedFile},
    tree::{self, Attribute},
};

/// The file at a path of the tree.
pub(crate) struct AttributeNode {
    attribute: Arc<dyn Attribute>,
    file: PathBuf,
}

impl AttributeNode {
    pub(crate) fn new(attribute: Arc<dyn Attribute>, file: PathBuf) -> Self {
        Self { attribute, file }
    }
}

impl Node for AttributeNode {
    fn open(&self, flags: i32) -> Result<Opened> {
        Ok(Opened::Served(Arc::new(AttributeFile {
            attribute: Arc::clone(&self.attribute),
            file: self.file.clone(),
            reads: flags & libc::O_ACCMODE == libc::O_RDWR,
            position: Mutex::new(0),
        })))
    }

    fn metadata(&self) -> Metadata {
        METADATA
    }
}

const METADATA: Metadata = Metadata { mode: libc::S_IFREG | 0o644, rdev: (0, 0) };

struct AttributeFile {
    attribute: Arc<dyn Attribute>,
    file: PathBuf,
    reads: bool,
    position: Mutex<u64>,
}

impl AttributeFile {
    /// Does something at the position, which moves on by what was done.
    fn advance(&self, work: impl FnOnce(u64) -> Result<usize>) -> Result<usize> {
        let mut position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        let done = work(*position)?;
        *position = position.saturating_add(done as u64);
        Ok(done)
    }
}

impl ServedFile for AttributeFile {
    fn ioctl(&self, _caller: &dyn Caller, _request: u32, _argument: UserAddr) -> Result<i32> {
        Err(Errno::NOTTY)
    }

    fn read(&self, to: &mut [u8]) -> Result<usize> {
        self.advance(|position| self.read_at(position, to))
    }

    fn write(&self, from: &[u8]) -> Result<usize> {
        self.advance(|position| self.write_at(position, from))
    }

    fn read_at(&self, offset: u64, to: &mut [u8]) -> Result<usize> {
        if !self.reads {
            return Err(Errno::BADF);
        }
        // A file that was removed says what the kernel says of one whose device is gone.
        let text = fs::read(&self.file).map_err(|_| Errno::NODEV)?;
        let rest = usize::try_from(offset).ok().and_then(|offset| text.get(offset..)).unwrap_or(&[]);
        let done = rest.len().min(to.len());
        to.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
        Ok(done)
    }

    fn write_at(&self, _offset: u64, from: &[u8]) -> Result<usize> {
        if from.is_empty() {
            return Ok(0);
        }
        let tree = tree::lock()?;
        if rustix::fs::lstat(&self.file).is_err() {
            return Err(Errno::NODEV);
        }
        self.attribute.store(&tree, from)?;
        Ok(from.len())
    }

    fn seek(&self, offset: i64, whence: i32) -> Result<u64> {
        let mut position = self.position.lock().unwrap_or_else(PoisonError::into_inner);
        let from = match whence {
            libc::SEEK_SET => 0,
            libc::SEEK_CUR => *position,
            // A size that nobody knows before it is read: a page.
            libc::SEEK_END => 4096,
            _ => return Err(Errno::INVAL),
        };
        *position = from.checked_add_signed(offset).ok_or(Errno::INVAL)?;
        Ok(*position)
    }

    fn is_regular(&self) -> bool {
        true
    }

    fn metadata(&self) -> Option<Metadata> {
        Some(METADATA)
    }
}
