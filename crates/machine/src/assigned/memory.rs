//! Guest RAM as an assigned device reaches it.

use iommufd::domain::Prot;
use iommufd::iova::{Iova, IovaRange};
use iommufd::soft::{Access, Fault, FaultReason};
use vfio::dma::{Dma, DmaFault, after};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use crate::dma::{DeviceMemory, View};

/// Bytes that are copied in one section of the IOMMU: the guest's UNMAP waits no longer than for these.
const PIECE: usize = 256 << 10;

/// What of guest RAM the device reaches: all of it at its physical addresses, or what the guest's IOMMU lets it.
#[derive(Clone, Debug)]
pub struct GuestDma(DeviceMemory);

impl GuestDma {
    /// This memory.
    pub fn new(memory: DeviceMemory) -> Self {
        Self(memory)
    }
}

/// What the device is told; the guest is told by the IOMMU.
fn refused(fault: Fault) -> DmaFault {
    match fault.reason {
        FaultReason::Permission => DmaFault::Forbidden(fault.iova),
        _ => DmaFault::Unmapped(fault.iova),
    }
}

fn check(view: &View, iova: Iova, length: usize, access: Access) -> Result<GuestAddress, DmaFault> {
    let at = GuestAddress(iova.0);
    view.check(at, length, access).map(|()| at).map_err(refused)
}

impl Dma for GuestDma {
    fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
        for (n, piece) in to.chunks_mut(PIECE).enumerate() {
            let (iova, view) = (after(iova, (n * PIECE) as u64)?, self.0.memory());
            let at = check(&view, iova, piece.len(), Access::Read)?;
            view.read_slice(piece, at).map_err(|_| DmaFault::Unmapped(iova))?;
        }
        Ok(())
    }

    fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault> {
        for (n, piece) in from.chunks(PIECE).enumerate() {
            let (iova, view) = (after(iova, (n * PIECE) as u64)?, self.0.memory());
            let at = check(&view, iova, piece.len(), Access::Write)?;
            view.write_slice(piece, at).map_err(|_| DmaFault::Unmapped(iova))?;
        }
        Ok(())
    }

    fn translate(&self, range: IovaRange, access: Prot) -> Result<(), DmaFault> {
        let length = range.length().and_then(|length| usize::try_from(length).ok());
        let length = length.ok_or(DmaFault::Overflow(range.start()))?;
        let wanted = [(Prot::READ, Access::Read), (Prot::WRITE, Access::Write)];
        for (_, access) in wanted.into_iter().filter(|(prot, _)| access.contains(*prot)) {
            check(&self.0.memory(), range.start(), length, access)?;
        }
        Ok(())
    }
}
