//! What the driver and the device agreed on.

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Feature bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Features(pub(super) u64);

impl Features {
    pub(super) const VERSION_1: u32 = VIRTIO_F_VERSION_1;
    pub(super) const EVENT_IDX: u32 = VIRTIO_RING_F_EVENT_IDX;
    pub(super) const INDIRECT: u32 = VIRTIO_RING_F_INDIRECT_DESC;
    pub(super) const MRG_RXBUF: u32 = VIRTIO_NET_F_MRG_RXBUF;
    pub(super) const GUEST_CSUM: u32 = VIRTIO_NET_F_GUEST_CSUM;
    pub(super) const GUEST_TSO4: u32 = VIRTIO_NET_F_GUEST_TSO4;
    pub(super) const GUEST_TSO6: u32 = VIRTIO_NET_F_GUEST_TSO6;
    /// vhost-user's own: the front end speaks of protocol features.
    pub(super) const PROTOCOL: u32 = 30;

    /// What the device offers, with this many pairs of queues.
    pub(super) fn offered(pairs: usize) -> Self {
        let mut bits = vec![
            Self::VERSION_1,
            Self::EVENT_IDX,
            Self::INDIRECT,
            Self::MRG_RXBUF,
            Self::GUEST_CSUM,
            Self::GUEST_TSO4,
            Self::GUEST_TSO6,
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            Self::PROTOCOL,
        ];
        if pairs > 1 {
            bits.push(VIRTIO_NET_F_MQ);
        }
        Self(bits.into_iter().fold(0, |features, bit| features | 1 << bit))
    }

    pub(super) fn has(self, bit: u32) -> bool {
        self.0 & 1 << bit != 0
    }
}
