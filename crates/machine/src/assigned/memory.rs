//! Guest RAM as an assigned device reaches it.

use std::sync::Arc;

use cpu::GuestRam;
use iommufd::domain::Prot;
use iommufd::iova::{Iova, IovaRange};
use vfio::dma::{Dma, DmaFault};
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};

/// All of guest RAM, readable and writable, its physical addresses as I/O virtual ones.
#[derive(Clone, Debug)]
pub struct GuestDma(Arc<GuestRam>);

impl GuestDma {
    /// This memory.
    pub fn new(memory: Arc<GuestRam>) -> Self {
        Self(memory)
    }

    fn check(&self, iova: Iova, length: usize) -> Result<GuestAddress, DmaFault> {
        let at = GuestAddress(iova.0);
        if self.0.check_range(at, length) { Ok(at) } else { Err(DmaFault::Unmapped(iova)) }
    }
}

impl Dma for GuestDma {
    fn read(&self, iova: Iova, to: &mut [u8]) -> Result<(), DmaFault> {
        let at = self.check(iova, to.len())?;
        self.0.read_slice(to, at).map_err(|_| DmaFault::Unmapped(iova))
    }

    fn write(&self, iova: Iova, from: &[u8]) -> Result<(), DmaFault> {
        let at = self.check(iova, from.len())?;
        self.0.write_slice(from, at).map_err(|_| DmaFault::Unmapped(iova))
    }

    fn translate(&self, range: IovaRange, _access: Prot) -> Result<(), DmaFault> {
        let length = range.length().and_then(|length| usize::try_from(length).ok());
        let length = length.ok_or(DmaFault::Overflow(range.start()))?;
        self.check(range.start(), length).map(drop)
    }
}

/// Somebody else may have written anywhere: vCPUs decode again what they execute.
pub(super) fn written_elsewhere(memory: &GuestRam) {
    for region in memory.iter() {
        region.bitmap().mark_dirty(0, region.len() as usize);
    }
}
