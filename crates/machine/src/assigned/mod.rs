//! A device that something else than ring3's virtio is: any [`vfio::device::Device`] as a function on the guest's bus.
//!
//! # Theory of operation
//!
//! The device, which may be software here, the other end of a vfio-user socket or a real one, has regions and interrupts
//! with the numbers of a PCI function. The guest must not see all of it as it is:
//!
//! - **Configuration space** (`space`) is the device's, except for what decides where it answers and how it
//!   interrupts: BARs and the command register are the guest's here, and capabilities that need something of the
//!   machine that is not there are left out.
//! - **BARs** are the device's regions, except for MSI-X's table and pending bits, which are kept here.
//! - **Interrupts** (`interrupts`): MSI-X, MSI or INTx, whichever the guest turns on, is set up with the device then. A
//!   thread waits for the device's eventfds and sends the guest's messages, or drives the function's wire.
//! - **Memory** (`memory`): the guest's RAM, its physical addresses as I/O virtual ones, or what the guest maps when the
//!   device is behind its IOMMU. A device that accesses it by
//!   itself, in another process or in hardware, writes unseen by the vCPUs, which keep decoded code: so whatever tells the
//!   guest that data has come (an interrupt, or a register that it reads) first notes what it may have written to
//!   (`crate::writes`). Data that the guest finds by polling memory alone may be code that a vCPU has in an older version:
//!   say so where such devices are offered.
//!
//! A device that does not answer reads as all ones, as a real one that has gone does.

mod interrupts;
mod memory;
mod space;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

use std::sync::Arc;

use pci::config::ConfigError;
use pci::msix::MsiSink;
use uapi::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vfio::Errno;
use vfio::device::{Device, DeviceFlags};

use crate::dma::DeviceMemory;
use crate::pci::intx::Wires;
use crate::pci::{BarInfo, PciFunction};
use crate::writes::Exposed;
use interrupts::Interrupts;
pub use memory::GuestDma;
use space::Space;

/// Why a device cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum AssignError {
    /// It is something else.
    #[error("the device is no PCI function")]
    NotPci,
    /// It accesses memory by itself, and the guest's IOMMU is in charge of all devices.
    #[error(
        "it reaches memory by itself, and cannot be behind an IOMMU of the guest's: there is --iommu none"
    )]
    Outside,
    /// The host does not translate for it as the guest's IOMMU would have to.
    #[error(
        "the host's IOMMU does not take the guest's memory, of which all is mapped at first: `ulimit -l` must allow to lock as \
         much as --memory says"
    )]
    Behind(#[source] Errno),
    /// The device failed.
    #[error("the device does not answer: {what}")]
    Device {
        /// What it was asked.
        what: &'static str,
        /// Its answer.
        #[source]
        source: Errno,
    },
    /// Its configuration space says what cannot be.
    #[error("the device's configuration space makes no sense: {0}")]
    Space(&'static str),
    /// A BAR that PCI does not know.
    #[error("the device's BARs make no sense")]
    Bar(#[from] ConfigError),
    /// The host is out of descriptors or threads.
    #[error("cannot wait for the device's interrupts")]
    Interrupts(#[source] std::io::Error),
}

/// Who writes to guest RAM when the device does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// This process, by [`GuestDma`].
    Called,
    /// The device, or another process that has the memory mapped.
    Direct,
}

/// What the machine has for a device.
pub(crate) struct Seat {
    /// What of guest RAM the device reaches when it asks.
    pub(crate) reached: DeviceMemory,
    /// What of it the device writes to without asking, if it does.
    pub(crate) exposed: Option<Arc<Exposed>>,
    /// Takes its messages.
    pub(crate) msi: Arc<dyn MsiSink>,
    /// Where its wire is.
    pub(crate) wires: Arc<Wires>,
    /// The slot that the guest will find it in.
    pub(crate) slot: usize,
}

/// An assigned device as a function on the bus.
pub(crate) struct AssignedFunction {
    device: Opened,
    space: Space,
    interrupts: Interrupts,
    exposed: Option<Arc<Exposed>>,
}

impl AssignedFunction {
    /// Opens the device for the guest.
    ///
    /// # Errors
    /// It is no PCI function, or makes no sense, or fails.
    pub(crate) fn new(device: Arc<dyn Device>, seat: Seat) -> Result<Self, AssignError> {
        let failed = |what| move |source| AssignError::Device { what, source };
        if !device.info().map_err(failed("what it is"))?.flags.contains(DeviceFlags::PCI) {
            return Err(AssignError::NotPci);
        }
        device.open(Arc::new(GuestDma::new(seat.reached))).map_err(failed("to open"))?;
        let device = Opened(device);
        let space = Space::new(&*device.0)?;
        let wire = space.intx().map(|pin| seat.wires.wire(seat.slot, pin));
        let interrupts = Interrupts::start(
            Arc::clone(&device.0),
            space.interrupts(),
            seat.msi,
            wire.as_ref().map(|wire| Box::new(wire.clone()) as _),
            seat.exposed.clone(),
        )
        .map_err(AssignError::Interrupts)?;
        if let Some(wire) = wire {
            wire.listen(Arc::downgrade(&interrupts.served()));
        }
        interrupts.set_control(space.control());
        Ok(Self { device, space, interrupts, exposed: seat.exposed })
    }

    /// Before the guest learns that data has come.
    fn note_writes(&self) {
        if let Some(exposed) = &self.exposed {
            exposed.note_writes();
        }
    }
}

/// A device that is open, and closed when this is dropped.
struct Opened(Arc<dyn Device>);

impl Drop for Opened {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl PciFunction for AssignedFunction {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.space.read(&*self.device.0, offset, data);
        for (at, byte) in (offset..).zip(data) {
            // The header is in the list.
            if let Some(within @ 2..) = self.space.msi_part(at) {
                self.interrupts.msi_read(within, std::slice::from_mut(byte));
            }
        }
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.space.write(&*self.device.0, offset, data);
        if let Some(within) = self.space.msi_part(offset) {
            self.interrupts.msi_write(within, data);
        }
        self.interrupts.set_control(self.space.control());
    }

    fn bars(&self) -> Vec<BarInfo> {
        self.space.bars().map(BarInfo::from).collect()
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        match self.space.msix_part(bar, offset) {
            Some(part) => self.interrupts.read(part, data),
            None => {
                if self.device.0.read(bar as u32, offset, data) != Ok(data.len()) {
                    data.fill(0xff);
                }
                self.note_writes();
            }
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        match self.space.msix_part(bar, offset) {
            Some(part) => self.interrupts.write(part, data),
            None => {
                if let Err(errno) = self.device.0.write(bar as u32, offset, data) {
                    tracing::debug!(bar, offset, %errno, "the assigned device does not take a write");
                }
            }
        }
    }
}

/// Reads configuration space as the device has it: all ones when it does not answer.
fn device_config(device: &dyn Device, offset: u16, data: &mut [u8]) {
    if device.read(VFIO_PCI_CONFIG_REGION_INDEX, offset.into(), data) != Ok(data.len()) {
        data.fill(0xff);
    }
}

#[cfg(test)]
mod tests;
