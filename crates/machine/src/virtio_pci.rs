//! Virtio functions on the machine's PCI bus.

use std::sync::Arc;

use ::pci::msix::MsiSink;
use virtio::pci::VirtioPci;

use crate::apic::ApicBus;
use crate::dma::DeviceMemory;
use crate::pci::{BarInfo, PciFunction};

/// A virtio device as a function on the bus.
pub(crate) struct VirtioFunction(pub(crate) VirtioPci<DeviceMemory>);

impl PciFunction for VirtioFunction {
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.0.config_read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.0.config_write(offset, data);
    }

    fn bars(&self) -> Vec<BarInfo> {
        self.0.bars().map(BarInfo::from).collect()
    }

    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]) {
        self.0.bar_read(bar, offset, data);
    }

    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]) {
        self.0.bar_write(bar, offset, data);
    }
}

/// Message-signalled interrupts of devices.
pub(crate) struct Msi(pub(crate) Arc<ApicBus>);

impl MsiSink for Msi {
    fn signal(&self, address: u64, data: u32) {
        self.0.deliver_msi(address, data);
    }
}
