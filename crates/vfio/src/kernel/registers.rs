//! Registers of a device of the host, mapped: loads and stores reach it without a call.

#![allow(unsafe_code, reason = "a mapping of registers is accessed by address")]

use core::ptr::NonNull;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::{Errno, Result, device::Area};

/// What can be loaded and stored as one access: `u8`, `u16`, `u32`, `u64`.
pub trait Register: Copy + sealed::Sealed {}

mod sealed {
    /// Numbers: every pattern of bits is one.
    pub trait Sealed {}
}

macro_rules! registers {
    ($($number:ty),*) => { $(
        impl sealed::Sealed for $number {}
        impl Register for $number {}
    )* };
}
registers!(u8, u16, u32, u64);

/// An area of a region, mapped into this process.
///
/// While the device's memory is disabled (by its command register, in a low power state, in the middle of a reset) an access
/// ends the process by SIGBUS: who lets somebody else write the configuration space uses
/// [`Device::read`](crate::device::Device::read) and [`write`](crate::device::Device::write) instead, which fail then.
#[derive(Debug)]
pub struct Registers {
    at: NonNull<u8>,
    length: usize,
}

// SAFETY: it is the only owner of the mapping, which is not bound to a thread.
unsafe impl Send for Registers {}
// SAFETY: accesses are volatile, and what a device makes of two at a time is its own affair.
unsafe impl Sync for Registers {}

impl Registers {
    /// Maps `area` of the region that begins at `start` of the device's descriptor.
    pub(super) fn map(device: BorrowedFd<'_>, start: u64, area: Area) -> Result<Self> {
        let length = usize::try_from(area.size).map_err(|_| Errno::OVERFLOW)?;
        let offset = start.checked_add(area.offset).and_then(|offset| i64::try_from(offset).ok());
        let offset = offset.ok_or(Errno::OVERFLOW)?;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping where there is none.
        let at = unsafe {
            libc::mmap(
                core::ptr::null_mut(),
                length,
                protection,
                libc::MAP_SHARED,
                device.as_raw_fd(),
                offset,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO));
        }
        Ok(Self { at: NonNull::new(at.cast()).ok_or(Errno::FAULT)?, length })
    }

    fn place<T: Register>(&self, offset: usize) -> Result<*mut T> {
        let inside = offset.checked_add(size_of::<T>()).is_some_and(|end| end <= self.length);
        if !inside || !offset.is_multiple_of(size_of::<T>()) {
            return Err(Errno::INVAL);
        }
        // SAFETY: it is inside the mapping.
        Ok(unsafe { self.at.as_ptr().add(offset) }.cast())
    }

    /// Loads a register.
    ///
    /// # Errors
    /// EINVAL for one outside the area, or not at a multiple of its size.
    pub fn read<T: Register>(&self, offset: usize) -> Result<T> {
        // SAFETY: it is mapped and aligned, and any value is a `T`.
        self.place::<T>(offset).map(|place| unsafe { place.read_volatile() })
    }

    /// Stores a register.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn write<T: Register>(&self, offset: usize, value: T) -> Result<()> {
        // SAFETY: it is mapped and aligned, and nobody has a reference to it.
        self.place::<T>(offset).map(|place| unsafe { place.write_volatile(value) })
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: the mapping is this one's alone, and nobody uses it any more.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.length) };
    }
}
