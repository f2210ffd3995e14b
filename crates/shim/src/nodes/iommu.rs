//! `/dev/iommu`.

use std::{any::Any, os::fd::BorrowedFd, sync::Arc};

use iommufd::{Context, Errno, Result, caller::File, process::UserAddr};
use rustix::mm::{MapFlags, ProtFlags};

use vfio::doors::{Caller, Opened as VfioOpened};

use crate::node::{Mappable, Mapping, Metadata, Node, Opened, ServedFile};

/// A character device of the miscellaneous ones, as the kernel numbers it.
const METADATA: Metadata = Metadata { mode: libc::S_IFCHR | 0o600, rdev: (10, 124) };

/// The node: each open gives a context of its own.
pub(crate) struct IommuNode {
    /// Makes a context.
    pub context: fn() -> Arc<Context>,
}

impl Node for IommuNode {
    fn open(&self, _flags: i32) -> Result<Opened> {
        iommufd::inject::check()?;
        Ok(open(self.context))
    }

    fn metadata(&self) -> Metadata {
        METADATA
    }
}

fn open(make: fn() -> Arc<Context>) -> Opened {
    Opened::Served(Arc::new(IommuFile { context: make(), make }))
}

struct IommuFile {
    context: Arc<Context>,
    /// For who opens it again by its descriptor.
    make: fn() -> Arc<Context>,
}

impl ServedFile for IommuFile {
    fn ioctl(&self, caller: &dyn Caller, request: u32, argument: UserAddr) -> Result<i32> {
        self.context.ioctl(caller, request, argument)
    }

    fn read_at(&self, _offset: u64, _to: &mut [u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }

    fn write_at(&self, _offset: u64, _from: &[u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }

    fn mmap(&self, offset: u64, length: u64, prot: i32, shared: bool) -> Result<Mappable> {
        let prot = ProtFlags::from_bits_truncate(prot.cast_unsigned());
        let flags = if shared { MapFlags::SHARED } else { MapFlags::PRIVATE };
        let mapping = self.context.mmap(offset, length, prot, flags)?;
        let fd = mapping.file().try_clone_to_owned().map_err(|_| Errno::NFILE)?;
        Ok(Mappable::Pages(Mapping { fd, offset: mapping.offset(), guard: Arc::new(mapping) }))
    }

    fn metadata(&self) -> Option<Metadata> {
        Some(METADATA)
    }

    fn given(&self) -> Option<Arc<dyn File>> {
        Some(Arc::new(Given(Arc::clone(&self.context))))
    }

    fn opened(&self) -> VfioOpened {
        VfioOpened::Iommufd(Arc::clone(&self.context))
    }

    fn reopen(&self) -> Option<Result<Opened>> {
        Some(Ok(open(self.make)))
    }
}

/// A context that VFIO takes back by its descriptor.
struct Given(Arc<Context>);

impl File for Given {
    fn read(&self, _to: &mut [u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }

    fn write(&self, _from: &[u8]) -> Result<usize> {
        Err(Errno::INVAL)
    }

    fn readiness(&self) -> BorrowedFd<'_> {
        // Nobody installs it: it has a descriptor already. Always ready is what a context is.
        rustix::stdio::stdin()
    }

    fn as_any(self: Arc<Self>) -> Arc<dyn Any + Send + Sync> {
        Arc::clone(&self.0) as _
    }
}
