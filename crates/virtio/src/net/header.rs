//! The header in front of each frame of a queue (virtio 1.2, section 5.1.6; `struct virtio_net_hdr_v1`).

use usernet::tap::Offload;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN,
    VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// Bytes of the header.
pub(super) const SIZE: usize = 12;

/// Bytes of an Ethernet header.
const ETHERNET: u16 = 14;
/// Bytes of an IPv6 header. The engine sends no extension headers in front of TCP or UDP that is not whole.
const IPV6: u16 = 40;

const TCP: u8 = 6;
const UDP: u8 = 17;

/// What the driver leaves to be done, by a header of its; `None` if that is something that the device did not offer.
pub(super) fn parse(header: &[u8; SIZE]) -> Option<Offload> {
    let [flags, gso, _, _, size_low, size_high, ..] = *header;
    let needs_checksum = u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0;
    let segment = match u32::from(gso) & !VIRTIO_NET_HDR_GSO_ECN {
        VIRTIO_NET_HDR_GSO_NONE => None,
        VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_TCPV6 => {
            Some(u16::from_le_bytes([size_low, size_high]))
        }
        _ => return None,
    };
    Some(Offload { needs_checksum, segment })
}

/// The header of a frame for the driver that takes `buffers` chains, and begins with the bytes `frame`: Ethernet, IP and
/// transport header. `checked`: the driver understands that a checksum has been looked at.
pub(super) fn build(frame: &[u8], offload: Offload, checked: bool, buffers: u16) -> [u8; SIZE] {
    let mut header = [0; SIZE];
    let mut put = |at: usize, value: u16| {
        for (to, from) in header.iter_mut().skip(at).zip(value.to_le_bytes()) {
            *to = from;
        }
    };
    put(10, buffers);
    let valid = if checked { VIRTIO_NET_HDR_F_DATA_VALID } else { 0 };
    let Some(transport) = Transport::find(frame) else { return header };
    if offload.needs_checksum {
        put(6, transport.start);
        put(8, transport.checksum);
    }
    if let Some(size) = offload.segment {
        put(2, u16::try_from(frame.len()).unwrap_or(u16::MAX));
        put(4, size);
        let kind = if transport.is_v6 { VIRTIO_NET_HDR_GSO_TCPV6 } else { VIRTIO_NET_HDR_GSO_TCPV4 };
        header[1] = kind as u8;
    }
    header[0] = if offload.needs_checksum { VIRTIO_NET_HDR_F_NEEDS_CSUM as u8 } else { valid as u8 };
    header
}

/// Where a frame's TCP or UDP header is.
struct Transport {
    is_v6: bool,
    /// Its offset in the frame.
    start: u16,
    /// The checksum's offset in it.
    checksum: u16,
}

impl Transport {
    fn find(frame: &[u8]) -> Option<Self> {
        let byte = |at: usize| frame.get(at).copied();
        let (is_v6, start, protocol) = match [byte(12)?, byte(13)?] {
            [0x08, 0x00] => (false, ETHERNET + u16::from(byte(14)? & 0xf) * 4, byte(23)?),
            [0x86, 0xdd] => (true, ETHERNET + IPV6, byte(20)?),
            _ => return None,
        };
        let checksum = match protocol {
            TCP => 16,
            UDP => 6,
            _ => return None,
        };
        Some(Self { is_v6, start, checksum })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(ethertype: [u8; 2], at: usize, value: u8) -> Vec<u8> {
        let mut frame = vec![0; 74];
        frame[12..14].copy_from_slice(&ethertype);
        frame[14] = 0x46;
        frame[at] = value;
        frame
    }

    const CHECKSUM: Offload = Offload { needs_checksum: true, segment: None };

    #[test]
    fn what_is_left_to_do_is_said_where_the_drivers_look() {
        let tcp = frame([0x08, 0], 23, 6);
        // IP options move the transport header.
        assert_eq!(build(&tcp, CHECKSUM, true, 1), [1, 0, 0, 0, 0, 0, 38, 0, 16, 0, 1, 0]);
        let long = Offload { segment: Some(1460), ..CHECKSUM };
        assert_eq!(build(&tcp, long, true, 3), [1, 1, 74, 0, 0xb4, 5, 38, 0, 16, 0, 3, 0]);
        let udp = frame([0x86, 0xdd], 20, 17);
        assert_eq!(build(&udp, CHECKSUM, true, 1), [1, 0, 0, 0, 0, 0, 54, 0, 6, 0, 1, 0]);
        let tcp = frame([0x86, 0xdd], 20, 6);
        assert_eq!(build(&tcp, long, true, 2)[..2], [1, 4]);
    }

    #[test]
    fn a_whole_frame_needs_nothing() {
        let tcp = frame([0x08, 0], 23, 6);
        let whole = Offload::default();
        assert_eq!(build(&tcp, whole, true, 1), [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        assert_eq!(build(&tcp, whole, false, 1), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        // ARP has no checksum to look at, and nonsense none to say anything about.
        for other in [frame([0x08, 0x06], 23, 6), vec![], vec![0; 13], vec![8; 20]] {
            assert_eq!(build(&other, CHECKSUM, true, 1), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
        }
    }

    #[test]
    fn the_drivers_words_are_read() {
        let with = |flags, gso| parse(&[flags, gso, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0]);
        assert_eq!(with(0, 0), Some(Offload::default()));
        assert_eq!(with(1, 0), Some(CHECKSUM));
        for kind in [1, 4, 0x81] {
            assert_eq!(with(1, kind), Some(Offload { needs_checksum: true, segment: Some(1460) }));
        }
        // UDP fragmentation and segmentation are not offered.
        for kind in [3, 5, 2, 0x7f] {
            assert_eq!(with(1, kind), None, "{kind}");
        }
    }
}
