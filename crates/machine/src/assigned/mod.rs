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
//! - **Interrupts** (`interrupts`): all vectors of MSI-X are set up with the device once, before the guest runs. A
//!   thread waits for their eventfds and sends the guest's messages. There is no INTx, and no MSI: drivers of devices that
//!   have MSI-X use that.
//! - **Memory** (`memory`): the guest's RAM, its physical addresses as I/O virtual ones. A device that accesses it by
//!   itself, in another process or in hardware, writes unseen by the vCPUs, which keep decoded code: so whatever tells the
//!   guest that data has come (an interrupt, or a register that it reads) first makes them look at their code again.
//!   Data that the guest finds by polling memory alone may be code that a vCPU has in an older version: say so
//!   where such devices are offered.
//!
//! A device that does not answer reads as all ones, as a real one that has gone does.

mod interrupts;
mod memory;
mod space;

use std::sync::Arc;

use cpu::GuestRam;
use pci::config::ConfigError;
use pci::msix::MsiSink;
use uapi::vfio::VFIO_PCI_CONFIG_REGION_INDEX;
use vfio::Errno;
use vfio::device::{Device, DeviceFlags};
use vfio::irq::{IrqAction, IrqData, IrqSet};

use crate::pci::{BarInfo, PciFunction};
use interrupts::Interrupts;
pub use memory::GuestDma;
use space::Space;

/// Why a device cannot be given to the guest.
#[derive(Debug, thiserror::Error)]
pub enum AssignError {
    /// It is something else.
    #[error("the device is no PCI function")]
    NotPci,
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

/// An assigned device as a function on the bus.
pub(crate) struct AssignedFunction {
    device: Opened,
    space: Space,
    interrupts: Option<Interrupts>,
    memory: Arc<GuestRam>,
    reach: Reach,
}

impl AssignedFunction {
    /// Opens the device for the guest.
    ///
    /// # Errors
    /// It is no PCI function, or makes no sense, or fails.
    pub(crate) fn new(
        device: Arc<dyn Device>,
        memory: Arc<GuestRam>,
        reach: Reach,
        sink: Arc<dyn MsiSink>,
    ) -> Result<Self, AssignError> {
        let failed = |what| move |source| AssignError::Device { what, source };
        if !device.info().map_err(failed("what it is"))?.flags.contains(DeviceFlags::PCI) {
            return Err(AssignError::NotPci);
        }
        device.open(Arc::new(GuestDma::new(Arc::clone(&memory)))).map_err(failed("to open"))?;
        let device = Opened(device);
        let space = Space::new(&*device.0)?;
        let interrupts = space.msix().map(|layout| {
            let memory = (reach == Reach::Direct).then(|| Arc::clone(&memory));
            Interrupts::start(layout.vectors, sink, memory).map_err(AssignError::Interrupts)
        });
        let interrupts = interrupts.transpose()?;
        if let Some(interrupts) = &interrupts {
            let eventfds = interrupts.eventfds().map_err(AssignError::Interrupts)?;
            let set = IrqSet {
                index: uapi::vfio::VFIO_PCI_MSIX_IRQ_INDEX,
                start: 0,
                count: eventfds.len() as u32,
                action: IrqAction::Trigger,
                data: IrqData::EventFd(eventfds.into_iter().map(Some).collect()),
            };
            device.0.set_irqs(set).map_err(failed("for its interrupts"))?;
        }
        Ok(Self { device, space, interrupts, memory, reach })
    }

    /// Before the guest learns that data has come.
    fn look_at_code_again(&self) {
        if self.reach == Reach::Direct {
            memory::written_elsewhere(&self.memory);
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
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.space.write(&*self.device.0, offset, data);
        if let Some(interrupts) = &self.interrupts {
            interrupts.set_state(self.space.msix_control(), self.space.bus_master());
        }
    }

    fn bars(&self) -> Vec<BarInfo> {
        self.space.bars().map(BarInfo::from).collect()
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        match (self.space.msix_part(bar, offset), &self.interrupts) {
            (Some(part), Some(interrupts)) => interrupts.read(part, data),
            _ => {
                if self.device.0.read(bar as u32, offset, data) != Ok(data.len()) {
                    data.fill(0xff);
                }
                self.look_at_code_again();
            }
        }
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        match (self.space.msix_part(bar, offset), &self.interrupts) {
            (Some(part), Some(interrupts)) => interrupts.write(part, data),
            _ => {
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
