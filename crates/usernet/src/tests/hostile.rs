//! What no guest in its right mind sends.

use std::net::{IpAddr, SocketAddr};

use etherparse::{IpFragOffset, IpNumber, Ipv4Header, Ipv6FragmentHeader, PacketBuilder};
use proptest::prelude::*;

use super::{as_icmp, guest_v4, guest_v6, udp_frame};
use crate::packet::{Packet, Refused, parse};
use crate::tap::Offload;
use crate::testing::{
    GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_MAC, GUEST_V4, GUEST_V6, Net, any_dhcp, any_dhcpv6,
    any_frames, any_ndp, config,
};

const CHECKED: Offload = Offload { needs_checksum: false, segment: None };
const UNCHECKED: Offload = Offload { needs_checksum: true, segment: None };

fn refused(frame: &[u8]) -> Option<Refused> {
    parse(frame, CHECKED).err()
}

#[test]
fn cut_short_anywhere_a_frame_is_malformed_or_wrong() {
    for frame in [
        udp_frame(guest_v4(1), (GATEWAY_V4, 2).into(), b"payload"),
        udp_frame(guest_v6(1), (GATEWAY_V6, 2).into(), b"payload"),
    ] {
        assert!(
            matches!(parse(&frame, CHECKED).unwrap().packet, Packet::Udp(d) if d.payload.bytes == b"payload")
        );
        for length in 0..frame.len() {
            assert_eq!(refused(&frame[..length]), Some(Refused::Malformed), "{length} bytes");
        }
        let padded = [frame.as_slice(), &[0xaa; 40]].concat();
        assert!(
            matches!(parse(&padded, CHECKED).unwrap().packet, Packet::Udp(d) if d.payload.bytes == b"payload")
        );
    }
}

#[test]
fn every_bit_is_under_a_checksum() {
    let frame = udp_frame(guest_v4(1), (GATEWAY_V4, 2).into(), b"payload");
    for bit in 14 * 8..frame.len() * 8 {
        let mut wrong = frame.clone();
        wrong[bit / 8] ^= 0x80 >> (bit % 8);
        assert!(refused(&wrong).is_some(), "bit {bit}");
    }
}

#[test]
fn checksums_that_are_left_to_do_are_not_looked_at() {
    for mut frame in [
        udp_frame(guest_v4(1), (GATEWAY_V4, 2).into(), b"payload"),
        udp_frame(guest_v6(1), (GATEWAY_V6, 2).into(), b"payload"),
    ] {
        let at = frame.len() - 7 - 2;
        frame[at] ^= 0x55;
        assert_eq!(refused(&frame), Some(Refused::Checksum));
        assert!(parse(&frame, UNCHECKED).is_ok());
    }
}

#[test]
fn udp_without_checksum_is_ipv4s_alone() {
    for (mut frame, result) in [
        (udp_frame(guest_v4(1), (GATEWAY_V4, 2).into(), b"payload"), None),
        (udp_frame(guest_v6(1), (GATEWAY_V6, 2).into(), b"payload"), Some(Refused::Checksum)),
    ] {
        let at = frame.len() - 7 - 2;
        frame[at..at + 2].fill(0);
        assert_eq!(refused(&frame), result);
    }
}

#[test]
fn addresses_that_mean_the_host_itself_are_refused() {
    let v4 = ["127.0.0.1", "127.9.9.9", "0.0.0.0"];
    let v6 = ["::1", "::", "::ffff:127.0.0.1", "::ffff:192.0.2.1", "::ffff:0.0.0.0"];
    for address in v4.into_iter().chain(v6) {
        let destination = SocketAddr::new(address.parse().unwrap(), 80);
        let source = if destination.is_ipv4() { guest_v4(1) } else { guest_v6(1) };
        assert_eq!(refused(&udp_frame(source, destination, b"")), Some(Refused::Address), "to {address}");
    }
    let v4 = ["127.0.0.1", "224.0.0.1", "255.255.255.255"];
    let v6 = ["::1", "ff02::1", "::ffff:127.0.0.1"];
    for address in v4.into_iter().chain(v6) {
        let source = SocketAddr::new(address.parse().unwrap(), 80);
        let destination: IpAddr = if source.is_ipv4() { GATEWAY_V4.into() } else { GATEWAY_V6.into() };
        let frame = udp_frame(source, SocketAddr::new(destination, 1), b"");
        assert_eq!(refused(&frame), Some(Refused::Address), "from {address}");
    }
}

#[test]
fn fragments_are_refused_and_the_first_is_answered_for() {
    let check = |frame: Vec<u8>, offset: u16| {
        let mut net = Net::new(config());
        net.guest.send(frame.clone());
        net.settle();
        let told: Vec<_> = net.frames().iter().filter_map(|f| as_icmp(f)).filter(|m| m.kind != 134).collect();
        assert_eq!(net.stats().dropped.fragment, 1);
        if offset > 0 {
            assert_eq!(refused(&frame), Some(Refused::Fragment));
            assert_eq!(told, []);
            return;
        }
        let v6 = frame[12] == 0x86;
        assert_eq!((told[0].kind, told[0].code), if v6 { (3, 1) } else { (11, 1) });
        assert_eq!(told[0].body[4..], frame[14..], "the packet that it is about");
    };

    for (offset, more) in [(0, true), (8, true), (8, false)] {
        let mut header =
            Ipv4Header::new(8, 64, IpNumber::UDP, GUEST_V4.octets(), GATEWAY_V4.octets()).unwrap();
        header.dont_fragment = false;
        header.more_fragments = more;
        header.fragment_offset = IpFragOffset::try_new(offset).unwrap();
        header.header_checksum = header.calc_header_checksum();
        let ethernet = [&GATEWAY_MAC[..], &GUEST_MAC, &[8, 0]].concat();
        let frame = [&ethernet, &header.to_bytes()[..], &[0; 8]].concat();
        check(frame, offset);

        let extension =
            Ipv6FragmentHeader::new(IpNumber::UDP, IpFragOffset::try_new(offset).unwrap(), more, 1)
                .to_bytes();
        let ethernet = [&GATEWAY_MAC[..], &GUEST_MAC, &[0x86, 0xdd]].concat();
        let ip = [&[0x60, 0, 0, 0, 0, 16, 44, 64][..], &GUEST_V6.octets(), &GATEWAY_V6.octets()].concat();
        check([&ethernet[..], &ip, &extension, &[0; 8]].concat(), offset);
    }
}

#[test]
fn options_and_extension_headers_are_passed_over() {
    // Record route, padded; and a hop-by-hop header and destination options of padding.
    let mut frame = Vec::new();
    let mut header = Ipv4Header::new(0, 64, IpNumber::UDP, GUEST_V4.octets(), GATEWAY_V4.octets()).unwrap();
    header.options = [7, 7, 4, 0, 0, 0, 0, 0].into();
    PacketBuilder::ethernet2(GUEST_MAC, GATEWAY_MAC)
        .ip(etherparse::IpHeaders::Ipv4(header, Default::default()))
        .udp(1, 2)
        .write(&mut frame, b"payload")
        .unwrap();
    assert!(
        matches!(parse(&frame, CHECKED).unwrap().packet, Packet::Udp(d) if d.payload.bytes == b"payload")
    );

    let plain = udp_frame(guest_v6(1), (GATEWAY_V6, 2).into(), b"payload");
    let mut frame = plain[..14 + 40].to_vec();
    frame[19] += 16;
    frame[20] = 0;
    frame.extend([60, 0, 1, 4, 0, 0, 0, 0]);
    frame.extend([17, 0, 1, 4, 0, 0, 0, 0]);
    frame.extend(&plain[54..]);
    assert!(
        matches!(parse(&frame, CHECKED).unwrap().packet, Packet::Udp(d) if d.payload.bytes == b"payload")
    );
}

#[test]
fn a_dead_packet_is_refused() {
    let mut frame = udp_frame(guest_v6(1), (GATEWAY_V6, 2).into(), b"");
    frame[21] = 0;
    assert_eq!(refused(&frame), Some(Refused::Address));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_a_frame_or_not(bytes in proptest::collection::vec(any::<u8>(), 0..200), left in any::<bool>()) {
        let _ = parse(&bytes, Offload { needs_checksum: left, segment: None });
    }

    /// A right frame with some bytes wrong comes deeper.
    #[test]
    fn any_bytes_of_a_frame_may_be_wrong(
        v6 in any::<bool>(),
        wrong in proptest::collection::vec((12usize..90, any::<u8>()), 1..4),
    ) {
        let (guest, gateway) = if v6 { (guest_v6(1), (GATEWAY_V6, 2).into()) } else { (guest_v4(1), (GATEWAY_V4, 2).into()) };
        let mut frame = udp_frame(guest, gateway, &[0; 40]);
        for (at, value) in wrong {
            if let Some(byte) = frame.get_mut(at) {
                *byte = value;
            }
        }
        let _ = parse(&frame, UNCHECKED);
    }
}

/// About a second of each fuzz target, from a fixed seed.
fn fuzz(cases: u32, longest: usize, target: fn(&[u8])) {
    use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let config = Config { cases, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, rng);
    runner
        .run(&proptest::collection::vec(any::<u8>(), 0..longest), |data| {
            target(&data);
            Ok(())
        })
        .unwrap();
}

#[test]
fn any_frames_do_no_harm() {
    fuzz(2000, 4000, any_frames);
}

#[test]
fn any_requests_do_no_harm() {
    fuzz(2000, 400, any_dhcp);
    fuzz(2000, 400, any_dhcpv6);
    fuzz(2000, 400, any_ndp);
}
