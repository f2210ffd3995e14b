//! Giving vhost-net its memory, its rings and its tap device (Linux, uapi/linux/vhost.h).

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::sys::epoll::{EpollEvent, EpollFlags, EpollOp, epoll_ctl};
use rustix::event::epoll::{self, CreateFlags};
use thiserror::Error;
use vhost::net::VhostNet;
use vhost::vhost_kern::vhost_binding::VHOST_NET_F_VIRTIO_NET_HDR;
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{Address, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{LONGEST, Queue};
use crate::ring::{Direction, Fault, Ring, Shape};

/// Where the device believes the memory to begin. Not 0, which would look like no address.
pub const MEMORY: GuestAddress = GuestAddress(0x1_0000);

/// What a ring is like, either way: 4 MB, so 56 frames of 64 kB or 512 short ones.
pub(super) const SHAPE: Shape = Shape { size: 512, buffer: 8192 };

/// Queues of a device, from its side (drivers/vhost/net.c): it receives from the tap device by the first.
pub(super) const RECEIVE: usize = 0;
pub(super) const SEND: usize = 1;

/// Features that there is no way round.
pub(super) const REQUIRED: u64 = 1 << VIRTIO_F_VERSION_1;
/// Features that are used if they are there.
pub(super) const WELCOME: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_RING_F_EVENT_IDX;
// The device would make and take away headers itself, without offloads: the tap device does.
const _: () = assert!((REQUIRED | WELCOME) & (1 << VHOST_NET_F_VIRTIO_NET_HDR) == 0);

/// What an event of the readiness is about.
const CALL: u64 = 0;
pub(super) const ERROR: u64 = 1;

/// Why vhost-net cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// The device cannot be opened.
    #[error("/dev/vhost-net: {0}{way_out}", way_out = way_out(.0))]
    Open(vhost::Error),
    /// The kernel's vhost-net lacks something.
    #[error("vhost-net lacks features {missing:#x}: it offers {offered:#x}")]
    Features {
        /// Features that are required and not there.
        missing: u64,
        /// Features that are there.
        offered: u64,
    },
    /// The device refused a part of its configuration.
    #[error("vhost-net refuses {what}: {source}")]
    Refused {
        /// The part.
        what: &'static str,
        /// How.
        source: vhost::Error,
    },
    /// There is no memory for the rings, or no descriptors.
    #[error("no room for vhost-net's rings: {0}")]
    Host(#[from] io::Error),
    /// The rings are wrong: a bug.
    #[error(transparent)]
    Ring(#[from] Fault),
}

/// What the user can do about a device that cannot be opened.
fn way_out(error: &vhost::Error) -> &'static str {
    let vhost::Error::VhostOpen(error) = error else { return "" };
    match error.kind() {
        io::ErrorKind::NotFound => " (the kernel has it after `modprobe vhost_net`)",
        io::ErrorKind::PermissionDenied => " (on most systems it is for the members of group kvm)",
        _ => "",
    }
}

/// A device with everything that it needs.
pub(super) struct Attached<B> {
    pub(super) backend: B,
    pub(super) receive: Queue,
    pub(super) send: Queue,
    pub(super) readiness: OwnedFd,
    pub(super) errors: EventFd,
    pub(super) tap: File,
    pub(super) mergeable: bool,
}

/// Puts the tap device `tap` behind the device that `open` makes for a memory.
pub(super) fn attach<B: VhostNet>(
    tap: BorrowedFd<'_>,
    open: impl FnOnce(Arc<GuestMemoryMmap>) -> vhost::Result<B>,
) -> Result<Attached<B>, Error> {
    let region = memory()?;
    let memory = GuestMemoryMmap::from_arc_regions(vec![region.clone()]).map_err(io::Error::other)?;
    let backend = open(Arc::new(memory)).map_err(Error::Open)?;
    let refuses = |what| move |source| Error::Refused { what, source };
    backend.set_owner().map_err(refuses("an owner"))?;

    let offered = backend.get_features().map_err(refuses("to tell its features"))?;
    let missing = REQUIRED & !offered;
    if missing != 0 {
        return Err(Error::Features { missing, offered });
    }
    let features = offered & (REQUIRED | WELCOME);
    let has = |feature: u32| features & 1 << feature != 0;
    let mergeable = has(VIRTIO_NET_F_MRG_RXBUF);
    backend.set_features(features).map_err(refuses("its own features"))?;
    let table = VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        mmap_offset: 0,
        mmap_handle: -1,
    };
    backend.set_mem_table(&[table]).map_err(refuses("its memory"))?;

    let ring = |index: usize, direction| {
        Ring::new(region.clone(), index * SHAPE.bytes(), SHAPE, direction, has(VIRTIO_RING_F_EVENT_IDX))
    };
    let mut receive = queue(ring(RECEIVE, Direction::FromDevice)?)?;
    let send = queue(ring(SEND, Direction::ToDevice)?)?;
    let errors = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    for (index, queue) in [(RECEIVE, &receive), (SEND, &send)] {
        configure(&backend, index, queue, &errors)?;
    }
    let readiness = watch([&receive, &send], &errors)?;
    let chain = if mergeable { 1 } else { LONGEST };
    while receive.ring.offer(chain)? {}
    receive.publish()?;

    let tap = File::from(tap.try_clone_to_owned()?);
    for index in [RECEIVE, SEND] {
        if let Err(source) = backend.set_backend(index, Some(&tap)) {
            stop(&backend);
            return Err(Error::Refused { what: "the tap device", source });
        }
    }
    Ok(Attached { backend, receive, send, readiness, errors, tap, mergeable })
}

/// Takes the tap device away from the device, which touches neither it nor the memory after that.
pub(super) fn stop(backend: &impl VhostNet) {
    for index in [RECEIVE, SEND] {
        if let Err(error) = backend.set_backend(index, None) {
            tracing::debug!("vhost-net does not stop: {error}");
        }
    }
}

/// Zeroes for both rings.
fn memory() -> io::Result<Arc<GuestRegionMmap>> {
    let region = MmapRegion::new(2 * SHAPE.bytes()).map_err(io::Error::other)?;
    let region = GuestRegionMmap::new(region, MEMORY);
    Ok(Arc::new(region.ok_or_else(|| io::Error::other("the memory is too long"))?))
}

fn queue(ring: Ring) -> io::Result<Queue> {
    let flags = EFD_NONBLOCK | EFD_CLOEXEC;
    Ok(Queue { ring, kick: EventFd::new(flags)?, call: EventFd::new(flags)? })
}

/// Tells the device about a ring.
fn configure<B: VhostNet>(backend: &B, index: usize, queue: &Queue, errors: &EventFd) -> Result<(), Error> {
    let shape = queue.ring.shape();
    let addresses = queue.ring.addresses();
    let data = VringConfigData {
        queue_max_size: shape.size,
        queue_size: shape.size,
        flags: 0,
        desc_table_addr: addresses.descriptors.raw_value(),
        used_ring_addr: addresses.used.raw_value(),
        avail_ring_addr: addresses.available.raw_value(),
        log_addr: None,
    };
    backend
        .set_vring_num(index, shape.size)
        .and_then(|()| backend.set_vring_base(index, 0))
        .and_then(|()| backend.set_vring_addr(index, &data))
        .and_then(|()| backend.set_vring_kick(index, &queue.kick))
        .and_then(|()| backend.set_vring_call(index, &queue.call))
        .and_then(|()| backend.set_vring_err(index, errors))
        .map_err(|source| Error::Refused { what: "a ring", source })
}

/// A descriptor that is readable when something is to be looked at.
fn watch(queues: [&Queue; 2], errors: &EventFd) -> io::Result<OwnedFd> {
    let epoll = epoll::create(CreateFlags::CLOEXEC)?;
    let add = |fd: RawFd, what, flags| {
        let mut event = EpollEvent::new(flags, what);
        epoll_ctl(epoll.as_raw_fd(), EpollOp::EpollCtlAdd, fd, &mut event)
    };
    for queue in queues {
        // By edge: each signal is one event, and the counter need not be read.
        add(queue.call.as_raw_fd(), CALL, EpollFlags::EPOLLIN | EpollFlags::EPOLLET)?;
    }
    add(errors.as_raw_fd(), ERROR, EpollFlags::EPOLLIN)?;
    Ok(epoll)
}
