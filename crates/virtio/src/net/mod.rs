//! The network device (virtio 1.2, section 5.1) in front of `usernet`'s engine.
//!
//! # Theory of operation
//!
//! The device has pairs of queues: the guest's frames leave by the one with the odd number and arrive by the one with the
//! even number. Each pair is a [`QueueTap`], one link of an engine's, and has no thread of its own: the engine's
//! thread takes frames out of the driver's buffers and puts frames into them.
//!
//! ```text
//! vCPU threads:      driver ── doorbell ──► kick eventfds ──┐ one epoll descriptor: the tap's readiness
//!                    activate, reset ─────► "changed" ──────┘               │
//!                          │                                                ▼
//!                          ▼                               engine: receive, send, flush
//!                    Mutex<Option<Rings>>  ◄────────────────────────────────┘
//! ```
//!
//! **States.** A tap lives as long as its engine, and is made before the machine is: ports are listened to before the
//! guest boots. Without a driver the link gives no frames and is full, so that what comes for the guest waits.
//! DRIVER_OK puts the rings in, a reset takes them out; the mutex is held for one frame at a time, and once a
//! reset has had it, no other thread is in guest memory.
//!
//! **To the guest.** A frame takes as many of the driver's chains as it needs (VIRTIO_NET_F_MRG_RXBUF), or one that is long
//! enough. Chains taken for a frame that still does not fit are kept for the next try; then the driver is asked to
//! kick when there are more, and the engine is told that the link is full. The chains of one frame go back to the
//! driver at once, for it must never see a part. Interrupts are sent when the engine has put in all that it had
//! ([`Tap::flush`](usernet::tap::Tap::flush)).
//!
//! **From the guest.** A frame is copied out of its chain, which goes back at once. What is left to do (checksum,
//! segmentation) is taken from the header; where it says something impossible the frame becomes an empty one, which
//! the engine counts and drops.
//!
//! **Bounds.** A chain for a frame has as many descriptors as the queue has entries at most, in indirect tables too; one that
//! has more breaks the queue, as any other that is against the rules.
//!
//! **The end.** When the guest powers off, what it has put into its queues is still taken: a command that has sent its
//! last bytes and ended has been told that they are on their way.

mod control;
mod header;
mod tap;

use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use crate::device::{ActivateError, Activation, GuestMem, VirtioDevice, feature, read_config_bytes};
use crate::worker::Worker;
use tap::Link;

pub use tap::QueueTap;

/// Entries of a queue for frames, and descriptors of a chain for one. A longest frame takes 17 pages.
const QUEUE_SIZE: u16 = 256;
/// Entries of the control queue. The driver waits for one command before the next.
const CONTROL_SIZE: u16 = 16;
/// Most queue pairs: with vectors for all, they still fit into the transport.
const MOST_PAIRS: u16 = 16;

/// Features of every device.
const FEATURES: u64 = feature(VIRTIO_NET_F_CSUM)
    | feature(VIRTIO_NET_F_GUEST_CSUM)
    | feature(VIRTIO_NET_F_MAC)
    | feature(VIRTIO_NET_F_MTU)
    | feature(VIRTIO_NET_F_GUEST_TSO4)
    | feature(VIRTIO_NET_F_GUEST_TSO6)
    | feature(VIRTIO_NET_F_HOST_TSO4)
    | feature(VIRTIO_NET_F_HOST_TSO6)
    | feature(VIRTIO_NET_F_MRG_RXBUF)
    | feature(VIRTIO_NET_F_STATUS);
/// Features of one with several pairs.
const SEVERAL: u64 = feature(VIRTIO_NET_F_CTRL_VQ) | feature(VIRTIO_NET_F_MQ);

/// What the guest is told about its network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NetConfig {
    /// Its Ethernet address.
    pub mac: [u8; 6],
    /// The longest packet in bytes, without the Ethernet header: 68 at least (RFC 791).
    pub mtu: u16,
    /// Pairs of queues: 1 to 16. With one, there is no control queue.
    pub pairs: u16,
}

/// The network device.
pub struct Net<M: GuestMem> {
    config: NetConfig,
    queue_sizes: Vec<u16>,
    links: Vec<Arc<Link<M>>>,
    control: Option<Worker<()>>,
}

impl<M: GuestMem> std::fmt::Debug for Net<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net").field("config", &self.config).finish_non_exhaustive()
    }
}

impl<M: GuestMem> Net<M> {
    /// A device at rest, and a tap for each pair of its queues.
    ///
    /// # Errors
    /// The host is out of descriptors, or `InvalidInput` for a number of pairs or an MTU that cannot be.
    pub fn new(config: NetConfig) -> std::io::Result<(Self, Vec<QueueTap<M>>)> {
        if !(1..=MOST_PAIRS).contains(&config.pairs) || config.mtu < 68 {
            return Err(std::io::ErrorKind::InvalidInput.into());
        }
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * usize::from(config.pairs)];
        if config.pairs > 1 {
            queue_sizes.push(CONTROL_SIZE);
        }
        let links = (0..config.pairs).map(|_| Link::new(config.mtu).map(Arc::new));
        let links = links.collect::<std::io::Result<Vec<_>>>()?;
        let taps = links.iter().cloned().map(QueueTap::new).collect();
        Ok((Net { config, queue_sizes, links, control: None }, taps))
    }
}

impl<M: GuestMem> VirtioDevice<M> for Net<M> {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_NET as u16
    }

    fn pci_class(&self) -> u32 {
        // Network controller, Ethernet.
        0x02_00_00
    }

    fn name(&self) -> &str {
        "virtio-net"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        if self.links.len() > 1 { FEATURES | SEVERAL } else { FEATURES }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // `struct virtio_net_config` up to the MTU (virtio 1.2, section 5.1.4).
        let NetConfig { mac, mtu, pairs } = self.config;
        let mut config = [0; 12];
        let status = VIRTIO_NET_S_LINK_UP as u16;
        let fields = [status, pairs, mtu].map(u16::to_le_bytes);
        for (to, from) in config.iter_mut().zip(mac.iter().chain(fields.as_flattened())) {
            *to = *from;
        }
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, mut activation: Activation<M>) -> Result<(), ActivateError> {
        let (multiqueue, mergeable) =
            (activation.has_feature(VIRTIO_NET_F_MQ), activation.has_feature(VIRTIO_NET_F_MRG_RXBUF));
        let control = activation.take_queue(2 * self.links.len());
        if let Some(queue) = control {
            let most = if multiqueue { self.links.len() } else { 1 };
            self.control = Some(control::serve(queue, activation.mem.clone(), self.links.clone(), most)?);
        }
        for (number, link) in self.links.iter().enumerate() {
            // A driver may leave out the pairs that it does not use.
            let (receive, transmit) =
                (activation.take_queue(2 * number), activation.take_queue(2 * number + 1));
            let (receive, transmit) = match (receive, transmit) {
                (Some(receive), Some(transmit)) => (receive, transmit),
                (None, _) if number == 0 => return Err(ActivateError::MissingQueue(0)),
                (_, None) if number == 0 => return Err(ActivateError::MissingQueue(1)),
                _ => continue,
            };
            let (mut receive, mut transmit) = (receive, transmit);
            for queue in [&mut receive, &mut transmit] {
                queue.limit_chains(QUEUE_SIZE);
            }
            let rings = tap::Rings::new(
                receive,
                transmit,
                activation.mem.clone(),
                Arc::clone(&activation.interrupts),
                mergeable,
            );
            let checksum = activation.has_feature(VIRTIO_NET_F_GUEST_CSUM);
            let segmentation = [VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6]
                // Segments are cut with checksums yet to be made (5.1.3.1).
                .map(|bit| checksum && activation.has_feature(bit));
            // Until the driver says how many pairs it uses, it uses the first (5.1.6.5.5).
            link.attach(rings, checksum, segmentation, number == 0)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.control = None;
        for link in &self.links {
            link.detach();
        }
    }

    fn shut_down(&mut self) {
        for link in &self.links {
            link.drain();
        }
        self.reset();
    }
}
