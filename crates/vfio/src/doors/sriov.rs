//! Virtual functions: devices that come and go with a number that is written (`sriov_numvfs`).

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use super::{Registration, System, SystemError, Token};
use crate::{Errno, Result, eventfd::lock, pci::address::Address};

/// Makes the virtual function of a number, at a PCI address.
type Make = Box<dyn Fn(u16, Address) -> Option<Registration> + Send + Sync>;

/// The virtual functions of one physical function.
///
/// As with the kernel's vfio-pci, each belongs to VFIO as soon as it is there, until it is taken away or
/// [given up](Self::unbind).
pub struct VirtualFunctions {
    system: Arc<System>,
    physical: Address,
    total: u16,
    offset: u16,
    stride: u16,
    token: Token,
    make: Make,
    /// Those that there are: the number of each one's device, or none for one that VFIO does not have.
    devices: Mutex<Vec<Option<u32>>>,
}

impl fmt::Debug for VirtualFunctions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtualFunctions").field("devices", &self.devices).finish_non_exhaustive()
    }
}

impl VirtualFunctions {
    /// None at first. `offset` and `stride` are those of the SR-IOV capability, `token` is the physical function's.
    pub fn new(
        system: &Arc<System>,
        physical: Address,
        (total, offset, stride): (u16, u16, u16),
        token: Token,
        make: impl Fn(u16, Address) -> Option<Registration> + Send + Sync + 'static,
    ) -> Self {
        let system = Arc::clone(system);
        Self {
            system,
            physical,
            total,
            offset,
            stride,
            token,
            make: Box::new(make),
            devices: Mutex::default(),
        }
    }

    /// How many there can be (`sriov_totalvfs`).
    #[must_use]
    pub fn total(&self) -> u16 {
        self.total
    }

    /// The first one's routing ID, counted from the physical function's (`sriov_offset`).
    #[must_use]
    pub fn offset(&self) -> u16 {
        self.offset
    }

    /// From one's routing ID to the next (`sriov_stride`).
    #[must_use]
    pub fn stride(&self) -> u16 {
        self.stride
    }

    /// How many there are (`sriov_numvfs`).
    #[must_use]
    pub fn count(&self) -> u16 {
        lock(&self.devices).len() as u16
    }

    /// The numbers of the devices, in order (`virtfn0` and so on); none for one that VFIO does not have.
    #[must_use]
    pub fn devices(&self) -> Vec<Option<u32>> {
        lock(&self.devices).clone()
    }

    /// The PCI address of one: its routing ID is the physical function's, and so many steps.
    #[must_use]
    pub fn address(&self, number: u16) -> Address {
        self.physical.plus(self.offset.wrapping_add(self.stride.wrapping_mul(number)))
    }

    /// Makes as many as `count`, or takes all away: what a write to `sriov_numvfs` does.
    ///
    /// # Errors
    /// ERANGE for more than there can be, EBUSY when there are some already, ENOMEM when one cannot be made, EEXIST when
    /// another device is at its address.
    pub fn set(&self, count: u16) -> Result<()> {
        if count > self.total {
            return Err(Errno::RANGE);
        }
        let mut devices = lock(&self.devices);
        if devices.len() == usize::from(count) {
            return Ok(());
        }
        if count > 0 && !devices.is_empty() {
            return Err(Errno::BUSY);
        }
        self.clear(&mut devices);
        for number in 0..count {
            match self.add(number) {
                Ok(device) => devices.push(Some(device)),
                Err(errno) => {
                    self.clear(&mut devices);
                    return Err(errno);
                }
            }
        }
        Ok(())
    }

    fn clear(&self, devices: &mut Vec<Option<u32>>) {
        for device in devices.drain(..).flatten() {
            self.system.remove(device);
        }
    }

    /// VFIO gives one up: it stays a function of the bus, without a driver.
    ///
    /// # Errors
    /// ENODEV when there is no such function, or VFIO does not have it.
    pub fn unbind(&self, number: u16) -> Result<()> {
        let mut devices = lock(&self.devices);
        let device = devices.get_mut(usize::from(number)).and_then(Option::take).ok_or(Errno::NODEV)?;
        self.system.remove(device);
        Ok(())
    }

    /// VFIO takes one again, as it is after a reset.
    ///
    /// # Errors
    /// ENODEV when there is no such function, EBUSY when VFIO has it; and as [`set`](Self::set).
    pub fn bind(&self, number: u16) -> Result<()> {
        let mut devices = lock(&self.devices);
        let device = devices.get_mut(usize::from(number)).ok_or(Errno::NODEV)?;
        if device.is_some() {
            return Err(Errno::BUSY);
        }
        *device = Some(self.add(number)?);
        Ok(())
    }

    fn add(&self, number: u16) -> Result<u32> {
        let made = (self.make)(number, self.address(number)).ok_or(Errno::NOMEM)?;
        let made = Registration { token: self.token.of_virtual(), ..made };
        self.system.add(made).map_err(|error| match error {
            SystemError::Name(_) | SystemError::Number(_) => Errno::EXIST,
            SystemError::NoIommu(_) => Errno::NODEV,
        })
    }
}
