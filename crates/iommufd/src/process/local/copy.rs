//! Copies from and to addresses of this process that may be bad: the kernel copies, and says EFAULT.

use std::{
    fs::File,
    io::{IoSlice, IoSliceMut},
    os::unix::fs::FileExt,
};

use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv, process_vm_writev},
    unistd::Pid,
};

use super::maps;
use crate::{Errno, Result, domain::HostAddr, iova::PAGE_SIZE};

/// EFAULT when not every byte can be read.
pub(crate) fn read(from: HostAddr, to: &mut [u8]) -> Result<()> {
    let mut done = 0;
    while let Some(rest) = to.get_mut(done..).filter(|rest| !rest.is_empty()) {
        let at = from.0.checked_add(done as u64).ok_or(Errno::FAULT)?;
        let remote = RemoteIoVec { base: at as usize, len: rest.len() };
        done += match process_vm_readv(Pid::this(), &mut [IoSliceMut::new(rest)], &[remote]) {
            Ok(n @ 1..) => n,
            Err(nix::Error::ENOSYS | nix::Error::EPERM) => some(own_memory(false)?.read_at(rest, at))?,
            _ => return Err(Errno::FAULT),
        };
    }
    Ok(())
}

/// EFAULT when not every byte can be written; some may have been.
pub(crate) fn write(to: HostAddr, from: &[u8]) -> Result<()> {
    let mut done = 0;
    while let Some(rest) = from.get(done..).filter(|rest| !rest.is_empty()) {
        let at = to.0.checked_add(done as u64).ok_or(Errno::FAULT)?;
        let remote = RemoteIoVec { base: at as usize, len: rest.len() };
        done += match process_vm_writev(Pid::this(), &[IoSlice::new(rest)], &[remote]) {
            Ok(n @ 1..) => n,
            Err(nix::Error::ENOSYS | nix::Error::EPERM) => {
                // This file writes to read-only memory too.
                let end = at.checked_add(rest.len() as u64).ok_or(Errno::FAULT)?;
                if !maps::mappings(HostAddr(at), end)?.iter().all(maps::Mapping::writable) {
                    return Err(Errno::FAULT);
                }
                some(own_memory(true)?.write_at(rest, at))?
            }
            _ => return Err(Errno::FAULT),
        };
    }
    Ok(())
}

/// Makes private pages up to `end` the process's own though it must not write to them, by writing to each what it holds, as a
/// debugger may. A kernel that forbids even that leaves them as they are.
pub(super) fn unshare(start: HostAddr, end: u64) -> Result<()> {
    let Ok(memory) = own_memory(true) else { return Ok(()) };
    let mut at = start.0;
    while at < end {
        let mut byte = [0];
        memory.read_exact_at(&mut byte, at).map_err(|_| Errno::FAULT)?;
        if memory.write_all_at(&byte, at).is_err() {
            return Ok(());
        }
        at += PAGE_SIZE;
    }
    Ok(())
}

/// The way of sandboxes that forbid the system calls.
fn own_memory(write: bool) -> Result<File> {
    File::options().read(true).write(write).open("/proc/self/mem").map_err(|_| Errno::FAULT)
}

fn some(done: std::io::Result<usize>) -> Result<usize> {
    done.ok().filter(|n| *n > 0).ok_or(Errno::FAULT)
}
