//! What the front end says: vhost-user's messages for one connection.
//!
//! The crate `vhost` takes messages apart and checks their form; what they mean for the queues is here. A message that
//! cannot be obeyed is answered as such where an answer is agreed on, and ends the connection otherwise.

use std::fs::File;
use std::io;
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_queue::QueueT;

use super::features::Features;
use super::memory::Shared;
use super::pair::{Pair, Which};
use super::ring::UserAddresses;
use super::{Device, Slot};

/// The state of one connection.
pub(super) struct Handler {
    device: Arc<Device>,
    features: Features,
    shared: Option<Arc<Shared>>,
}

impl Handler {
    pub(super) fn new(device: Arc<Device>) -> Self {
        Self { device, features: Features::default(), shared: None }
    }

    /// The pair and the ring that an index of the protocol's means: frames to the guest are the even ones.
    fn slot(&self, index: u32) -> Result<(&Slot, Which)> {
        let which = if index.is_multiple_of(2) { Which::ToGuest } else { Which::FromGuest };
        let pair = usize::try_from(index / 2).map_err(|_| Error::InvalidParam)?;
        Ok((self.device.slots.get(pair).ok_or(Error::InvalidParam)?, which))
    }

    /// Finds a ring's addresses in the present memory, if both are known.
    fn place(&self, pair: &mut Pair, which: Which) -> Result<()> {
        let ring = pair.ring(which);
        ring.placed = false;
        let (Some(shared), Some(addresses)) = (&self.shared, ring.addresses) else { return Ok(()) };
        let find = |address| shared.guest_address(address).ok_or(Error::InvalidParam);
        let UserAddresses { descriptors, available, used } = addresses;
        ring.place(&shared.memory, find(descriptors)?, find(available)?, find(used)?).map_err(|error| {
            tracing::warn!("a ring is not where the front end says: {error}");
            Error::InvalidParam
        })
    }
}

/// What was not offered and is asked for all the same.
fn not_offered<T>() -> Result<T> {
    Err(Error::InvalidOperation("it was not offered"))
}

fn failed(error: impl Into<io::Error>) -> Error {
    Error::ReqHandlerError(error.into())
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.device.stop();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(Features::offered(self.device.slots.len()).0)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !Features::offered(self.device.slots.len()).0 != 0 {
            return Err(Error::InvalidParam);
        }
        self.features = Features(features);
        for slot in &self.device.slots {
            slot.pair().set_features(self.features);
            slot.wake();
        }
        Ok(())
    }

    fn set_mem_table(&mut self, regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<()> {
        let shared = Arc::new(Shared::map(regions, files).map_err(failed)?);
        self.shared = Some(shared.clone());
        for slot in &self.device.slots {
            let mut pair = slot.pair();
            // They point into the old memory, and are found again in the new one.
            for which in [Which::ToGuest, Which::FromGuest] {
                pair.rewind(which);
                pair.ring(which).placed = false;
            }
            pair.shared = Some(shared.clone());
            for which in [Which::ToGuest, Which::FromGuest] {
                self.place(&mut pair, which)?;
            }
            drop(pair);
            slot.wake();
        }
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, entries: u32) -> Result<()> {
        let (slot, which) = self.slot(index)?;
        let entries = u16::try_from(entries).map_err(|_| Error::InvalidParam)?;
        let mut pair = slot.pair();
        if pair.ring(which).kick.is_some() {
            return Err(Error::InvalidOperation("the ring runs"));
        }
        pair.ring(which).queue.try_set_size(entries).map_err(|_| Error::InvalidParam)?;
        self.place(&mut pair, which)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let (slot, which) = self.slot(index)?;
        let mut pair = slot.pair();
        pair.rewind(which);
        pair.ring(which).addresses = Some(UserAddresses { descriptors, available, used });
        self.place(&mut pair, which)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let (slot, which) = self.slot(index)?;
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        let mut pair = slot.pair();
        pair.rewind(which);
        pair.ring(which).queue.set_next_avail(base);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let (slot, which) = self.slot(index)?;
        let base = slot.pair().stop(which, &slot.epoll);
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (slot, which) = self.slot(index.into())?;
        let Some(file) = file else { return Err(Error::InvalidOperation("rings are not polled")) };
        // syscalls(vhost-user): ioctl
        rustix::io::ioctl_fionbio(&file, true).map_err(failed)?;
        let mut pair = slot.pair();
        let ring = pair.ring(which);
        if let Some(old) = ring.kick.take() {
            let _ = epoll::delete(&slot.epoll, &old);
        }
        // Edge-triggered, so that nobody has to read from a descriptor that the front end chose.
        let flags = EventFlags::IN | EventFlags::ET;
        epoll::add(&slot.epoll, &file, EventData::new_u64(0), flags).map_err(failed)?;
        ring.kick = Some(file);
        ring.broken = false;
        if !self.features.has(Features::PROTOCOL) {
            ring.enabled = true;
        }
        drop(pair);
        // The driver may have filled it before.
        slot.wake();
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let (slot, which) = self.slot(index.into())?;
        if let Some(file) = &file {
            rustix::io::ioctl_fionbio(file, true).map_err(failed)?;
        }
        slot.pair().ring(which).call = file;
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, _file: Option<File>) -> Result<()> {
        self.slot(index.into()).map(|_| ())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        // Of a network card, the pairs are counted.
        Ok(self.device.slots.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let (slot, which) = self.slot(index)?;
        slot.pair().ring(which).enabled = enable;
        slot.wake();
        Ok(())
    }

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        not_offered()
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        not_offered()
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        not_offered()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        not_offered()
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        not_offered()
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        not_offered()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        not_offered()
    }

    fn add_mem_region(&mut self, _: &VhostUserSingleMemoryRegion, _: File) -> Result<()> {
        not_offered()
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        not_offered()
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        not_offered()
    }

    fn check_device_state(&mut self) -> Result<()> {
        not_offered()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        not_offered()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        not_offered()
    }
}
