//! Structures of a driver's own that come with an ioctl.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::{
    Errno, Result,
    process::{Process, UserAddr},
};

/// Data of a driver's own: its type, and where it is in the caller's memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct UserData {
    /// `enum iommu_*_type`.
    pub kind: u32,
    /// Where it is.
    pub addr: UserAddr,
    /// How long the caller says it is.
    pub length: u32,
}

impl UserData {
    /// Copies it. EINVAL when it is shorter than `minimum` or longer than `T`; EFAULT. What the caller does not give is zero.
    pub fn read<T: FromZeros + FromBytes + IntoBytes>(
        &self,
        process: &dyn Process,
        minimum: usize,
    ) -> Result<T> {
        read_struct(process, self.addr, self.length as usize, minimum)
    }

    /// Copies `value` there, as much as the caller has room for. EFAULT.
    pub fn write<T: IntoBytes + Immutable>(&self, process: &dyn Process, value: &T) -> Result<()> {
        let bytes = value.as_bytes();
        process.write(self.addr, bytes.get(..self.length as usize).unwrap_or(bytes))
    }
}

/// An array of a driver's own structures: requests to invalidate something.
#[derive(Clone, Copy, Debug, Default)]
pub struct Entries {
    /// `enum iommu_hwpt_invalidate_data_type`.
    pub kind: u32,
    /// Where it is.
    pub addr: UserAddr,
    /// How long the caller says that one is.
    pub entry_length: u32,
    /// How many there are.
    pub number: u32,
}

impl Entries {
    /// Copies one. EINVAL when entries are shorter than `minimum` or longer than `T`, or there are not so many; EFAULT.
    pub fn read<T: FromZeros + FromBytes + IntoBytes>(
        &self,
        process: &dyn Process,
        index: u32,
        minimum: usize,
    ) -> Result<T> {
        if index >= self.number {
            return Err(Errno::INVAL);
        }
        let offset = u64::from(index) * u64::from(self.entry_length);
        let addr = self.addr.0.checked_add(offset).ok_or(Errno::FAULT)?;
        read_struct(process, UserAddr(addr), self.entry_length as usize, minimum)
    }
}

fn read_struct<T: FromZeros + FromBytes + IntoBytes>(
    process: &dyn Process,
    addr: UserAddr,
    length: usize,
    minimum: usize,
) -> Result<T> {
    let mut value = T::new_zeroed();
    let given = value.as_mut_bytes().get_mut(..length).filter(|_| length >= minimum).ok_or(Errno::INVAL)?;
    process.read(addr, given)?;
    Ok(value)
}

/// E2BIG when bytes `known..length` at `addr` are not all zero: they ask for something that this version does not know.
pub(crate) fn check_zero(process: &dyn Process, addr: UserAddr, known: usize, length: usize) -> Result<()> {
    let mut chunk = [0; 256];
    let mut at = known;
    while at < length {
        let from = addr.0.checked_add(at as u64).ok_or(Errno::FAULT)?;
        let size = chunk.len().min(length - at);
        let Some(bytes) = chunk.get_mut(..size) else { break };
        process.read(UserAddr(from), bytes)?;
        if bytes.iter().any(|byte| *byte != 0) {
            return Err(Errno::TOOBIG);
        }
        at += size;
    }
    Ok(())
}
