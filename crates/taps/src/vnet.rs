//! The header before each frame that says what its receiver has left to do: `virtio_net_hdr` (virtio 1.2, 5.1.6), which
//! tap devices with `IFF_VNET_HDR` speak too.

use usernet::tap::Offload;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
    VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// Bytes of the header, with the count of buffers that `VIRTIO_F_VERSION_1` always has.
pub const HEADER: usize = 12;

const ETHERNET: usize = 14;
const IPV6: usize = 40;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// The header of a frame that begins with `headers`, from Ethernet to TCP or UDP, in the byte order of the host: what
/// tap devices have, and what virtio has on a little-endian one. It says that the frame is in one buffer.
#[must_use]
pub fn encode(headers: &[u8], offload: Offload) -> [u8; HEADER] {
    let mut header = Fields { buffers: 1, ..Fields::default() };
    if let Some(transport) = Transport::find(headers) {
        if offload.needs_checksum {
            header.flags = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
            header.checksum_start = transport.start;
            header.checksum_offset = if transport.protocol == TCP { 16 } else { 6 };
        }
        if let Some(size) = offload.segment {
            let kind = match (transport.protocol, transport.v6) {
                (UDP, _) => VIRTIO_NET_HDR_GSO_UDP_L4,
                (_, true) => VIRTIO_NET_HDR_GSO_TCPV6,
                (_, false) => VIRTIO_NET_HDR_GSO_TCPV4,
            };
            header.segmentation = kind as u8;
            header.segment = size;
            header.length = transport.end;
        }
    }
    header.bytes()
}

/// What a frame's sender left to do. A kind of segmentation that was not agreed on counts as none: the frame is then
/// what it looks like.
#[must_use]
pub fn decode(header: &[u8; HEADER]) -> Offload {
    let [flags, segmentation, _, _, size_low, size_high, ..] = *header;
    // The highest bit says that congestion notification needs care, which the engine does not send.
    let segmentation = u32::from(segmentation & 0x7f);
    let segmented = matches!(
        segmentation,
        VIRTIO_NET_HDR_GSO_TCPV4 | VIRTIO_NET_HDR_GSO_TCPV6 | VIRTIO_NET_HDR_GSO_UDP_L4
    );
    let size = u16::from_ne_bytes([size_low, size_high]);
    Offload {
        needs_checksum: u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0,
        segment: Some(size).filter(|&size| segmented && size != 0),
    }
}

/// Over how many buffers the frame is spread (`VIRTIO_NET_F_MRG_RXBUF`).
#[must_use]
pub fn buffers(header: &[u8; HEADER]) -> u16 {
    let [.., low, high] = *header;
    u16::from_ne_bytes([low, high])
}

/// The header's fields, in their order.
struct Fields {
    flags: u8,
    segmentation: u8,
    length: u16,
    segment: u16,
    checksum_start: u16,
    checksum_offset: u16,
    buffers: u16,
}

impl Default for Fields {
    fn default() -> Self {
        Self {
            flags: 0,
            segmentation: VIRTIO_NET_HDR_GSO_NONE as u8,
            length: 0,
            segment: 0,
            checksum_start: 0,
            checksum_offset: 0,
            buffers: 0,
        }
    }
}

impl Fields {
    fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = self.flags;
        bytes[1] = self.segmentation;
        let words = [self.length, self.segment, self.checksum_start, self.checksum_offset, self.buffers];
        for (place, word) in bytes[2..].chunks_exact_mut(2).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// Where TCP's or UDP's header is.
struct Transport {
    v6: bool,
    protocol: u8,
    start: u16,
    end: u16,
}

impl Transport {
    /// Looks for it in headers that the engine wrote: without extension headers.
    fn find(headers: &[u8]) -> Option<Self> {
        let (ethernet, packet) = headers.split_at_checked(ETHERNET)?;
        let (v6, protocol, length) = match ethernet.get(12..)? {
            [0x08, 0x00] => (false, *packet.get(9)?, usize::from(packet.first()? & 0xf) * 4),
            [0x86, 0xdd] => (true, *packet.get(6)?, IPV6),
            _ => return None,
        };
        let header = packet.get(length..)?;
        let own = match protocol {
            TCP => usize::from(header.get(12)? >> 4) * 4,
            UDP => 8,
            _ => return None,
        };
        let start = ETHERNET + length;
        Some(Self { v6, protocol, start: start.try_into().ok()?, end: (start + own).try_into().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ethernet, IPv4 with options, TCP with options.
    fn tcp_over_v4() -> Vec<u8> {
        let mut frame = vec![0; 14 + 24 + 32];
        frame[12..14].copy_from_slice(&[8, 0]);
        frame[14] = 0x46;
        frame[14 + 9] = TCP;
        frame[14 + 24 + 12] = 0x80;
        frame
    }

    #[test]
    fn a_long_segment_says_where_its_parts_are() {
        let offload = Offload { needs_checksum: true, segment: Some(1448) };
        let header = encode(&tcp_over_v4(), offload);
        let words: Vec<u16> =
            header[2..].chunks_exact(2).map(|word| u16::from_ne_bytes([word[0], word[1]])).collect();
        assert_eq!(header[..2], [1, 1]);
        assert_eq!(words, [70, 1448, 38, 16, 1]);
        assert_eq!(buffers(&header), 1);
        assert_eq!(decode(&header), offload);
    }

    #[test]
    fn a_datagram_over_v6_has_its_checksum_elsewhere() {
        let mut frame = vec![0; 14 + 40 + 8];
        frame[12..14].copy_from_slice(&[0x86, 0xdd]);
        frame[14 + 6] = UDP;
        let offload = Offload { needs_checksum: true, segment: None };
        let header = encode(&frame, offload);
        assert_eq!(header[..6], [1, 0, 0, 0, 0, 0]);
        assert_eq!(header[6..10], [54u16, 6].map(u16::to_ne_bytes).concat()[..]);
        assert_eq!(decode(&header), offload);
        let several = Offload { segment: Some(1200), ..offload };
        let header = encode(&frame, several);
        assert_eq!(header[..2], [1, 5]);
        assert_eq!(header[2..6], [62u16, 1200].map(u16::to_ne_bytes).concat()[..]);
        assert_eq!(decode(&header), several);
    }

    #[test]
    fn headers_that_end_early_ask_for_nothing() {
        let offload = Offload { needs_checksum: true, segment: Some(1) };
        let whole = tcp_over_v4();
        for length in 0..14 + 24 + 13 {
            assert_eq!(decode(&encode(&whole[..length], offload)), Offload::default(), "{length}");
        }
    }

    #[test]
    fn segmentation_of_other_kinds_is_none() {
        for kind in [2, 3, 0x7f] {
            let mut header = [0; HEADER];
            header[1] = kind;
            header[4..6].copy_from_slice(&1000u16.to_ne_bytes());
            assert_eq!(decode(&header).segment, None);
        }
    }
}
