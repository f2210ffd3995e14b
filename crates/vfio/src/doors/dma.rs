//! The memory of who has opened a device, as the device reaches it.

use std::sync::Arc;

use iommufd::{
    DeviceDma,
    domain::Prot,
    iova::{Iova, IovaRange, PAGE_SIZE},
};

use crate::{
    Errno,
    dma::{Dma, DmaFault},
};

/// Memory by way of an iommufd: what the device is attached to there.
#[derive(Debug)]
pub(super) struct IommuDma(pub(super) DeviceDma);

/// What a device sees of an errno.
fn fault(iova: Iova, errno: Errno) -> DmaFault {
    match errno {
        Errno::NOENT | Errno::FAULT => DmaFault::Unmapped(iova),
        Errno::PERM | Errno::ACCESS => DmaFault::Forbidden(iova),
        Errno::OVERFLOW => DmaFault::Overflow(iova),
        other => DmaFault::Remote(other),
    }
}

impl Dma for IommuDma {
    fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
        self.0.read(iova, to).map_err(|errno| fault(iova, errno))
    }

    fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault> {
        self.0.write(iova, from).map_err(|errno| fault(iova, errno))
    }

    fn translate(&self, range: IovaRange, _access: Prot) -> Result<(), DmaFault> {
        let mut at = range.start();
        loop {
            self.0.translate(at).map_err(|errno| fault(at, errno))?;
            match (at.0 | (PAGE_SIZE - 1)).checked_add(1) {
                Some(next) if next <= range.last().0 => at = Iova(next),
                _ => return Ok(()),
            }
        }
    }

    fn pasid(&self, pasid: u32) -> Option<Arc<dyn Dma>> {
        Some(Arc::new(Self(self.0.pasid(pasid))))
    }
}

/// Memory of a process by its own addresses: what a device without an IOMMU has.
#[cfg(feature = "noiommu")]
#[derive(Debug)]
pub(super) struct ProcessDma(pub(super) Arc<dyn iommufd::process::Process>);

#[cfg(feature = "noiommu")]
impl Dma for ProcessDma {
    fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
        self.0.read(iommufd::process::UserAddr(iova.0), to).map_err(|errno| fault(iova, errno))
    }

    fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault> {
        self.0.write(iommufd::process::UserAddr(iova.0), from).map_err(|errno| fault(iova, errno))
    }

    fn translate(&self, range: IovaRange, _access: Prot) -> Result<(), DmaFault> {
        // A page that cannot be read is not there; nothing tells whether it may be written to but a write.
        self.read(range.start(), &mut [0])?;
        self.read(range.last(), &mut [0])
    }
}
