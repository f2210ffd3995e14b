//! VFIO's structures in a caller's memory: each begins with `argsz`, how long the caller has made it.

use iommufd::process::{Process, UserAddr};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::{Errno, Result};

/// Reads a structure of which `minimum` bytes must be given. What lies past what the caller gave is zero.
///
/// EFAULT where there is no memory, EINVAL when `argsz` is too small.
pub(super) fn get<T: FromBytes + FromZeros + IntoBytes + Immutable>(
    process: &dyn Process,
    at: UserAddr,
    minimum: usize,
) -> Result<T> {
    let mut value = T::new_zeroed();
    let bytes = value.as_mut_bytes();
    process.read(at, bytes.get_mut(..minimum).ok_or(Errno::INVAL)?)?;
    let argsz = bytes.first_chunk().map_or(0, |argsz| u32::from_ne_bytes(*argsz)) as usize;
    if argsz < minimum {
        return Err(Errno::INVAL);
    }
    let given = argsz.min(bytes.len());
    if let Some(rest) = bytes.get_mut(minimum..given)
        && !rest.is_empty()
    {
        process.read(plus(at, minimum)?, rest)?;
    }
    Ok(value)
}

/// Writes a structure back, as much of it as the caller has given.
pub(super) fn put<T: IntoBytes + Immutable>(
    process: &dyn Process,
    at: UserAddr,
    value: &T,
    given: u32,
) -> Result<()> {
    let bytes = value.as_bytes();
    process.write(at, bytes.get(..given as usize).unwrap_or(bytes))
}

/// The address `offset` bytes after `at`. EFAULT past the last one.
pub(super) fn plus(at: UserAddr, offset: usize) -> Result<UserAddr> {
    at.0.checked_add(offset as u64).map(UserAddr).ok_or(Errno::FAULT)
}
