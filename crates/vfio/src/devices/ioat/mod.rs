//! A DMA engine: one channel of Intel's I/OAT as Skylake-SP has it, as far as copying goes.
//!
//! # Theory of operation
//!
//! The engine works through a chain of descriptors in memory. Software writes where the chain begins (CHAINADDR) and
//! how many descriptors are to be done (DMACOUNT); the engine's thread reads each descriptor, copies, signals an
//! interrupt where the descriptor asks for one, and follows its link. The channel's status (CHANSTS) is ACTIVE
//! meanwhile, then DONE; SUSPENDED or HALTED when software stops it, and HALTED when something fails, with the reason in
//! CHANERR. Nothing of what a descriptor says is trusted: lengths are bounded, and every address goes by the
//! function's DMA.
//!
//! Registers and descriptors: the kernel's `drivers/dma/ioat/registers.h` and `hw.h`.

mod channel;
mod registers;

use std::sync::Arc;

use pci::config::{BarKind, PciIds};

pub use channel::Ioat;

use crate::{
    device::Mappable,
    pci::{
        function::{Function, FunctionError},
        interrupts::Kinds,
        layout::{BarLayout, Layout, MsixLayout, SriovLayout},
    },
};

/// Its device ID (Intel's): I/OAT of Skylake-SP.
const DEVICE: u16 = 0x2021;
/// Of a virtual function: an ID of our own, since the real one has none.
const VIRTUAL_DEVICE: u16 = 0x2f2f;
/// How many virtual functions the physical one has.
pub const TOTAL_VFS: u16 = 7;
/// Where the first is, and how far the next from it, as routing IDs.
pub const VF_OFFSET: u16 = 0x80;
/// See [`VF_OFFSET`].
pub const VF_STRIDE: u16 = 2;

fn layout(device: u16) -> Layout {
    Layout {
        bars: vec![BarLayout {
            index: 0,
            kind: BarKind::Memory64 { prefetchable: false },
            size: 0x4000,
            memory: Mappable::No,
        }],
        interrupts: Kinds { intx: true, msi: 1, msix: 1 },
        msix: Some(MsixLayout { bar: 0, table: 0x2000, pba: 0x3000 }),
        express: true,
        power_management: true,
        dma_logging: true,
        // A system peripheral of no particular kind.
        ..Layout::new(PciIds { vendor: 0x8086, device, revision: 4, class: 0x08_80_00, ..PciIds::default() })
    }
}

/// The engine as a physical function, with SR-IOV.
///
/// # Errors
/// [`FunctionError`].
pub fn physical() -> Result<Function<Ioat>, FunctionError> {
    let sriov =
        SriovLayout { total: TOTAL_VFS, offset: VF_OFFSET, stride: VF_STRIDE, device: VIRTUAL_DEVICE };
    Function::new(Layout { sriov: Some(sriov), ..layout(DEVICE) }, Ioat::new)
}

/// The engine as one of its virtual functions: the same without INTx.
///
/// # Errors
/// [`FunctionError`].
pub fn virtual_function() -> Result<Arc<Function<Ioat>>, FunctionError> {
    let mut layout = layout(VIRTUAL_DEVICE);
    layout.interrupts.intx = false;
    Function::new(layout, Ioat::new).map(Arc::new)
}

#[cfg(test)]
mod tests;
