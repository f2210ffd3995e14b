//! A device's interrupts as VFIO sees them: what there are, and what a user asks of them.

use std::os::fd::OwnedFd;

use uapi::vfio::{
    VFIO_IRQ_INFO_AUTOMASKED, VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_MASKABLE, VFIO_IRQ_INFO_NORESIZE,
    VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_ACTION_UNMASK,
};

bitflags::bitflags! {
    /// What one kind of interrupt can do (`VFIO_IRQ_INFO_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct IrqFlags: u32 {
        /// An eventfd can be signalled for it.
        const EVENTFD = VFIO_IRQ_INFO_EVENTFD;
        /// It can be masked and unmasked.
        const MASKABLE = VFIO_IRQ_INFO_MASKABLE;
        /// It masks itself when it is signalled.
        const AUTOMASKED = VFIO_IRQ_INFO_AUTOMASKED;
        /// All of its vectors must be enabled at once.
        const NORESIZE = VFIO_IRQ_INFO_NORESIZE;
    }
}

/// One kind of interrupt of a device (`struct vfio_irq_info`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct IrqInfo {
    /// What it can do.
    pub flags: IrqFlags,
    /// How many vectors it has; 0 when the device has none of this kind.
    pub count: u32,
}

/// What is asked of vectors (`VFIO_IRQ_SET_ACTION_*`).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum IrqAction {
    /// Mask them.
    Mask = VFIO_IRQ_SET_ACTION_MASK,
    /// Unmask them.
    Unmask = VFIO_IRQ_SET_ACTION_UNMASK,
    /// Signal them, or say what is signalled from now on.
    Trigger = VFIO_IRQ_SET_ACTION_TRIGGER,
}

/// How it is asked (`VFIO_IRQ_SET_DATA_*`).
#[derive(Debug)]
pub enum IrqData {
    /// For all the vectors of the call, now. With no vectors and [`IrqAction::Trigger`]: disable the whole kind.
    None,
    /// For each vector whether it is meant. As long as the call has vectors.
    Bool(Vec<bool>),
    /// For each vector the eventfd whose signal is the action ([`IrqAction::Mask`], [`IrqAction::Unmask`]) or which is
    /// signalled ([`IrqAction::Trigger`]); none takes the present one away. As long as the call has vectors.
    EventFd(Vec<Option<OwnedFd>>),
}

/// A call of `VFIO_DEVICE_SET_IRQS`, checked as far as it can be without the device: `start + count` does not wrap and
/// the data is as long as it must be.
#[derive(Debug)]
pub struct IrqSet {
    /// Which kind (`VFIO_PCI_*_IRQ_INDEX`).
    pub index: u32,
    /// The first vector.
    pub start: u32,
    /// How many vectors.
    pub count: u32,
    /// What is to be done.
    pub action: IrqAction,
    /// How.
    pub data: IrqData,
}
