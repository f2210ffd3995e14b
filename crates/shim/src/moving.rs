//! What becomes of pinned pages when the program gives up the addresses that they are at: see `iommufd::process::vacate`.

use iommufd::{Result, domain::HostAddr, process};

use crate::inside;

fn range(at: usize, length: usize) -> Option<(HostAddr, u64)> {
    (length != 0 && !inside::is()).then_some((HostAddr(at as u64), length as u64))
}

/// The program is about to unmap a range, or to map something else there. ENOMEM or another error when pinned pages cannot
/// be kept: then it must not go on.
pub(crate) fn evacuate(at: usize, length: usize) -> Result<()> {
    let Some((at, length)) = range(at, length) else { return Ok(()) };
    inside::run(|| process::vacate(at, length)).map(|_| ())
}

/// The program is about to discard what private pages hold, and keeps the addresses.
pub(crate) fn evacuate_private(at: usize, length: usize) -> Result<()> {
    let Some((at, length)) = range(at, length) else { return Ok(()) };
    inside::run(|| process::vacate_private(at, length)).map(|_| ())
}

/// The program moves a mapping by `remap`: the new address, if it did.
pub(crate) fn carry(at: usize, length: usize, remap: impl FnOnce() -> Option<usize>) -> Option<usize> {
    let Some((at, length)) = range(at, length) else { return remap() };
    let remap = || remap().map(|there| HostAddr(there as u64));
    let there = inside::run(|| process::carry(at, length, remap))?;
    usize::try_from(there.0).ok()
}

/// The parts of a range that devices use where they are: where each begins and ends.
pub(crate) fn in_use(at: usize, length: usize) -> Vec<(usize, usize)> {
    let Some((at, length)) = range(at, length) else { return Vec::new() };
    let bounds = |(start, length): (HostAddr, u64)| {
        Some((usize::try_from(start.0).ok()?, usize::try_from(start.0 + length).ok()?))
    };
    inside::run(|| process::pinned(at, length).into_iter().filter_map(bounds).collect())
}
