//! Virtual functions: devices that come and go with a number that is written (`sriov_numvfs`).

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use super::{Registration, System, SystemError, Token};
use crate::{Errno, Result, eventfd::lock};

/// Makes the virtual function of a number, at a PCI address (segment, bus, device and function).
type Make = Box<dyn Fn(u16, (u16, u8, u8)) -> Option<Registration> + Send + Sync>;

/// The virtual functions of one physical function.
pub struct VirtualFunctions {
    system: Arc<System>,
    physical: (u16, u8, u8),
    total: u16,
    offset: u16,
    stride: u16,
    token: Token,
    make: Make,
    /// The devices that there are.
    devices: Mutex<Vec<u32>>,
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
        physical: (u16, u8, u8),
        (total, offset, stride): (u16, u16, u16),
        token: Token,
        make: impl Fn(u16, (u16, u8, u8)) -> Option<Registration> + Send + Sync + 'static,
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

    /// How many there are (`sriov_numvfs`).
    #[must_use]
    pub fn count(&self) -> u16 {
        lock(&self.devices).len() as u16
    }

    /// The numbers of the devices, in order (`virtfn0` and so on).
    #[must_use]
    pub fn devices(&self) -> Vec<u32> {
        lock(&self.devices).clone()
    }

    /// The PCI address of one: its routing ID is the physical function's, and so many steps.
    #[must_use]
    pub fn address(&self, number: u16) -> (u16, u8, u8) {
        let (segment, bus, devfn) = self.physical;
        let id = u16::from_be_bytes([bus, devfn]);
        let id = id.wrapping_add(self.offset).wrapping_add(self.stride.wrapping_mul(number));
        let [bus, devfn] = id.to_be_bytes();
        (segment, bus, devfn)
    }

    /// Makes as many as `count`, or takes all away: what a write to `sriov_numvfs` does.
    ///
    /// # Errors
    /// ERANGE for more than there can be, EBUSY when there are some already, ENOMEM when one cannot be made.
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
        for device in devices.drain(..) {
            self.system.remove(device);
        }
        for number in 0..count {
            if let Err(errno) = self.add(number).map(|device| devices.push(device)) {
                for device in devices.drain(..) {
                    self.system.remove(device);
                }
                return Err(errno);
            }
        }
        Ok(())
    }

    fn add(&self, number: u16) -> Result<u32> {
        let made = (self.make)(number, self.address(number)).ok_or(Errno::NOMEM)?;
        let made = Registration { token: self.token.of_virtual(), ..made };
        self.system.add(made).map_err(|error| match error {
            SystemError::Name(_) => Errno::EXIST,
            SystemError::NoIommu(_) => Errno::NODEV,
        })
    }
}
