//! Eventfds that stand for writes of registers (`VFIO_DEVICE_IOEVENTFD`).

use std::{collections::HashMap, sync::Mutex};

use crate::{
    Errno, Result,
    device::IoEventFd,
    eventfd::{EventFd, WatchId, Watcher, lock},
};

/// How many a device may have, as in the kernel's vfio-pci.
const MOST: usize = 1000;

/// Which write one stands for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    region: u32,
    offset: u64,
    width: u8,
    data: u64,
}

/// The ioeventfds of a device.
#[derive(Debug, Default)]
pub(super) struct IoEventFds {
    watcher: Watcher,
    by_key: Mutex<HashMap<Key, WatchId>>,
}

impl IoEventFds {
    /// Adds one, which does `write` with the bytes of its data, or takes one away.
    pub(super) fn set(&self, ioeventfd: IoEventFd, write: impl Fn(&[u8]) + Send + 'static) -> Result<()> {
        let IoEventFd { region, offset, width, data, eventfd } = ioeventfd;
        let key = Key { region, offset, width, data };
        let mut by_key = lock(&self.by_key);
        let Some(fd) = eventfd else {
            let id = by_key.remove(&key).ok_or(Errno::NODEV)?;
            drop(by_key);
            self.watcher.remove(id);
            return Ok(());
        };
        if by_key.contains_key(&key) {
            return Err(Errno::EXIST);
        }
        if by_key.len() >= MOST {
            return Err(Errno::NOSPC);
        }
        let bytes = data.to_le_bytes();
        let action = move || write(bytes.get(..usize::from(width)).unwrap_or(&bytes));
        by_key.insert(key, self.watcher.add(EventFd::new(fd)?, Box::new(action))?);
        Ok(())
    }

    /// Takes all away. None acts after this returns.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *lock(&self.by_key));
        for id in all.into_values() {
            self.watcher.remove(id);
        }
    }
}
