//! A vhost back end in this process, for tests and fuzz targets: it takes its configuration as the kernel's does, in the
//! same order and with the same refusals, and leaves what is done with the rings to whoever holds it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use usernet::tap::{Abilities, Offload, Sent, Tap};
use vhost::net::VhostNet;
use vhost::{
    Error, Result, VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// All that the kernel's vhost-net offers and the tap may take.
pub(crate) const EVERYTHING: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_RING_F_EVENT_IDX;

/// A tap device that is none: it has a descriptor and abilities.
pub(crate) struct Dummy(OwnedFd);

impl Dummy {
    pub(crate) fn new() -> Self {
        Self(eventfd(0, EventfdFlags::NONBLOCK).expect("a descriptor"))
    }
}

impl AsFd for Dummy {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Tap for Dummy {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn acknowledge(&mut self) {}

    fn abilities(&self) -> Abilities {
        Abilities { checksum: true, segmentation: [true, false], datagrams: false, mtu: 9000 }
    }

    fn receive(&mut self, _: &mut [u8]) -> io::Result<Option<(usize, Offload)>> {
        unreachable!("vhost-net does that")
    }

    fn send(&mut self, _: &[u8], _: &[u8], _: Offload) -> io::Result<Sent> {
        unreachable!("vhost-net does that")
    }
}

/// What is known about one queue.
#[derive(Default)]
pub(crate) struct Vring {
    pub(crate) size: u16,
    pub(crate) addresses: Option<VringConfigData>,
    pub(crate) kick: Option<EventFd>,
    pub(crate) call: Option<EventFd>,
    pub(crate) error: Option<EventFd>,
    pub(crate) running: bool,
}

/// What is known about the device.
#[derive(Default)]
pub(crate) struct State {
    pub(crate) offered: u64,
    pub(crate) features: Option<u64>,
    pub(crate) owned: bool,
    pub(crate) table: Option<(u64, u64)>,
    pub(crate) memory: Option<Arc<GuestMemoryMmap>>,
    pub(crate) vrings: [Vring; 2],
    /// The request that is refused.
    pub(crate) refuse: &'static str,
}

/// The device, which both its driver and the test hold.
#[derive(Clone)]
pub(crate) struct Software(Arc<Mutex<State>>);

impl Software {
    pub(crate) fn new(offered: u64) -> Self {
        Self(Arc::new(Mutex::new(State { offered, ..State::default() })))
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As `Net::new` does it.
    pub(crate) fn open(&self, memory: Arc<GuestMemoryMmap>) -> Result<Self> {
        self.request("open", |state| {
            state.memory = Some(memory);
            Some(())
        })?;
        Ok(self.clone())
    }

    /// The driver's memory.
    pub(crate) fn memory(&self) -> Option<Arc<GuestMemoryMmap>> {
        self.state().memory.clone()
    }

    /// Notifies the driver of what was used in a queue.
    #[cfg(test)]
    pub(crate) fn call(&self, queue: usize) {
        if let Some(call) = self.state().vrings.get(queue).and_then(|vring| vring.call.as_ref()) {
            let _ = call.write(1);
        }
    }

    /// Complains about a queue.
    pub(crate) fn complain(&self, queue: usize) {
        if let Some(error) = self.state().vrings.get(queue).and_then(|vring| vring.error.as_ref()) {
            let _ = error.write(1);
        }
    }

    /// How often the driver has kicked since it was last asked.
    #[cfg(test)]
    pub(crate) fn kicks(&self, queue: usize) -> u64 {
        let state = self.state();
        state.vrings.get(queue).and_then(|vring| vring.kick.as_ref()?.read().ok()).unwrap_or(0)
    }

    /// Writes anything to a queue's used ring, from its flags on.
    pub(crate) fn write_used(&self, queue: usize, offset: u64, bytes: &[u8]) {
        let state = self.state();
        let address = state.vrings.get(queue).and_then(|vring| vring.addresses).map(|a| a.used_ring_addr);
        if let (Some(memory), Some(address)) = (&state.memory, address) {
            // What would lie beyond the memory is not written.
            let _ = memory.write(bytes, GuestAddress(address.wrapping_add(offset)));
        }
    }

    /// Does `change` if the request named `name` is not to be refused.
    fn request<T>(&self, name: &str, change: impl FnOnce(&mut State) -> Option<T>) -> Result<T> {
        let mut state = self.state();
        if state.refuse == name {
            return Err(Error::IoctlError(io::Error::from_raw_os_error(libc::EBUSY)));
        }
        change(&mut state).ok_or_else(|| Error::IoctlError(io::Error::from_raw_os_error(libc::EINVAL)))
    }

    /// The same for a queue, which nobody may configure while it runs.
    fn vring(&self, name: &str, queue: usize, change: impl FnOnce(&mut Vring) -> Option<()>) -> Result<()> {
        self.request(name, |state| {
            let owned = state.owned;
            change(state.vrings.get_mut(queue).filter(|vring| owned && !vring.running)?)
        })
    }
}

impl VhostBackend for Software {
    fn get_features(&self) -> Result<u64> {
        self.request("get_features", |state| Some(state.offered))
    }

    fn set_features(&self, features: u64) -> Result<()> {
        self.request("set_features", |state| {
            state.features = (features & !state.offered == 0).then_some(features);
            state.features.map(|_| ())
        })
    }

    fn set_owner(&self) -> Result<()> {
        self.request("set_owner", |state| (!std::mem::replace(&mut state.owned, true)).then_some(()))
    }

    fn reset_owner(&self) -> Result<()> {
        Err(Error::InvalidOperation)
    }

    fn set_mem_table(&self, regions: &[VhostUserMemoryRegionInfo]) -> Result<()> {
        self.request("set_mem_table", |state| {
            let [region] = regions else { return None };
            state.table = state.owned.then_some((region.guest_phys_addr, region.memory_size));
            state.table.map(|_| ())
        })
    }

    fn set_log_base(&self, _: u64, _: Option<VhostUserDirtyLogRegion>) -> Result<()> {
        Err(Error::InvalidOperation)
    }

    fn set_log_fd(&self, _: RawFd) -> Result<()> {
        Err(Error::InvalidOperation)
    }

    fn set_vring_num(&self, queue: usize, size: u16) -> Result<()> {
        self.vring("set_vring_num", queue, |vring| {
            vring.size = size;
            size.is_power_of_two().then_some(())
        })
    }

    fn set_vring_addr(&self, queue: usize, addresses: &VringConfigData) -> Result<()> {
        self.vring("set_vring_addr", queue, |vring| {
            vring.addresses = Some(*addresses);
            (vring.size == addresses.queue_size).then_some(())
        })
    }

    fn set_vring_base(&self, queue: usize, base: u16) -> Result<()> {
        self.vring("set_vring_base", queue, |_| (base == 0).then_some(()))
    }

    fn get_vring_base(&self, _: usize) -> Result<u32> {
        Ok(0)
    }

    fn set_vring_call(&self, queue: usize, fd: &EventFd) -> Result<()> {
        self.vring("set_vring_call", queue, |vring| {
            vring.call = fd.try_clone().ok();
            Some(())
        })
    }

    fn set_vring_kick(&self, queue: usize, fd: &EventFd) -> Result<()> {
        self.vring("set_vring_kick", queue, |vring| {
            vring.kick = fd.try_clone().ok();
            Some(())
        })
    }

    fn set_vring_err(&self, queue: usize, fd: &EventFd) -> Result<()> {
        self.vring("set_vring_err", queue, |vring| {
            vring.error = fd.try_clone().ok();
            Some(())
        })
    }
}

impl VhostNet for Software {
    fn set_backend(&self, queue: usize, fd: Option<&File>) -> Result<()> {
        // The second queue's, so that the first one runs already.
        let name = if queue == 1 && fd.is_some() { "set_backend" } else { "" };
        let name = if name.is_empty() { "stop" } else { name };
        self.request(name, |state| {
            let complete = state.features.is_some() && state.table.is_some();
            let vring = state.vrings.get_mut(queue)?;
            vring.running = fd.is_some();
            (complete && vring.addresses.is_some() && vring.kick.is_some()).then_some(())
        })
    }
}
