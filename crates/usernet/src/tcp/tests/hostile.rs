//! Guests that do not mean well.

use crate::claims::Claims;
use std::time::Duration;

use etherparse::{IpNumber, Ipv4Header, TcpHeader};

use super::super::{Limits, Tcp};
use super::sim::{Dice, Setup, Sim, Talk, accept, listener, view};

pub(super) const SYN: u8 = 2;

/// An IPv4 packet of the guest's. Its checksums are not looked at here.
#[expect(clippy::too_many_arguments, reason = "these are the header's fields")]
pub(super) fn packet(
    to: [u8; 4],
    source_port: u16,
    port: u16,
    seq: u32,
    ack: u32,
    control: u8,
    options: &[u8],
    payload: &[u8],
) -> Vec<u8> {
    let mut tcp = TcpHeader::new(source_port, port, seq, 0xffff);
    tcp.acknowledgment_number = ack;
    tcp.fin = control & 1 != 0;
    tcp.syn = control & 2 != 0;
    tcp.rst = control & 4 != 0;
    tcp.psh = control & 8 != 0;
    tcp.ack = control & 16 != 0;
    tcp.set_options_raw(options).unwrap();
    let length = (tcp.header_len() + payload.len()) as u16;
    let ip = Ipv4Header::new(length, 64, IpNumber::TCP, [10, 0, 2, 15], to).unwrap();
    [&ip.to_bytes()[..], &tcp.to_bytes(), payload].concat()
}

/// That a connection works still.
fn works(sim: &mut Sim) {
    let (listener, port) = listener(false);
    let handle = sim.connect(port, false, 10_000);
    let (mut guest, mut world) = (Talk::new(b"still".to_vec()), Talk::new(b"here".to_vec()));
    let mut stream = None;
    sim.run(|sim| {
        stream = stream.take().or_else(|| accept(&listener));
        let mut active = guest.guest(sim.guest(handle));
        if let Some(stream) = &mut stream {
            active |= world.world(stream);
        }
        (guest.finished() && world.finished(), active)
    });
    assert_eq!((&guest.heard[..], &world.heard[..]), (&b"here"[..], &b"still"[..]));
}

#[test]
fn any_segments_at_all() {
    let mut sim = Sim::new(Setup::default());
    let (listener, port) = listener(false);
    let mut dice = Dice::new(11);
    let mut streams = Vec::new();
    let bytes = dice.bytes(1500);
    // Numbers near those that are in use, so that some segments are acceptable.
    let mut base = [0u32; 4];
    for step in 0..60_000u32 {
        let source_port = dice.below(4) as u16 + 1;
        let base = &mut base[usize::from(source_port - 1)];
        let control = match dice.below(10) {
            0 => SYN,
            1..=6 => 16,
            _ => dice.roll() as u8,
        };
        let near = |dice: &mut Dice| (dice.below(5000) as u32).wrapping_sub(500);
        let seq = if dice.below(4) == 0 { dice.roll() as u32 } else { base.wrapping_add(near(&mut dice)) };
        if control == SYN {
            *base = seq;
        }
        let length = dice.below(11) as usize * 4;
        let mut options = dice.bytes(length);
        if let [kind, size, ..] = &mut options[..]
            && dice.below(2) == 0
        {
            // SACK of a plausible length.
            (*kind, *size) = (5, (dice.below(5) * 8 + 2) as u8);
        }
        let payload = &bytes[..dice.below(1500) as usize];
        let packet =
            packet([10, 0, 2, 2], source_port, port, seq, dice.roll() as u32, control, &options, payload);
        let view = view(&packet).unwrap();
        sim.engine(|tcp, cx| tcp.segment(cx, &view));
        if step % 50 == 0 {
            sim.pass(Duration::from_millis(dice.below(500)));
            streams.extend(accept(&listener));
            if streams.len() > 8 {
                streams.remove(0);
            }
        }
        assert!(sim.tcp.flows() <= 4);
    }
    works(&mut sim);
}

/// A guest that acknowledges properly and then sends what it likes.
#[test]
fn segments_of_a_connection_that_stands() {
    let mut dice = Dice::new(12);
    let bytes = dice.bytes(1400);
    for round in 0..200u32 {
        let mut sim = Sim::new(Setup { seed: u64::from(round) + 1, ..Setup::default() });
        let (listener, port) = listener(false);
        let syn_options = [2, 4, 5, 180, 4, 2, 1, 3, 3, 7, 1, 1];
        let syn = packet([10, 0, 2, 2], 9, port, 1000, 0, SYN, &syn_options, &[]);
        let syn_view = view(&syn).unwrap();
        sim.engine(|tcp, cx| tcp.segment(cx, &syn_view));
        let mut stream = None;
        sim.run(|_| {
            stream = stream.take().or_else(|| accept(&listener));
            (stream.is_some(), false)
        });
        for _ in 0..100 {
            let flow = sim.tcp.table.find(&super::super::Ends {
                guest: [10, 0, 2, 15].into(),
                peer: [10, 0, 2, 2].into(),
                guest_port: 9,
                peer_port: port,
            });
            let Some(flow) = flow.and_then(|number| sim.tcp.table.get(number)) else { break };
            let (next, una) = flow.positions();
            let seq = next.wrapping_add(dice.below(3000) as u32).wrapping_sub(1000);
            let ack = una.wrapping_add(dice.below(3) as u32);
            let control = if dice.below(8) == 0 { dice.roll() as u8 } else { 16 };
            let payload = &bytes[..dice.below(1400) as usize];
            let packet = packet([10, 0, 2, 2], 9, port, seq, ack, control, &[], payload);
            let view = view(&packet).unwrap();
            sim.engine(|tcp, cx| tcp.segment(cx, &view));
            sim.engine(|tcp, cx| tcp.timers(cx));
        }
        assert!(sim.tcp.shared.budget.used <= 1 << 20);
    }
}

#[test]
fn flood_of_syns_is_bounded_and_passes() {
    let mut sim = Sim::new(Setup::default());
    sim.tcp = Tcp::with_limits(Limits { flows: 100, half_open: 20, memory: 1 << 20 }, Claims::alone(), false);
    let (_listener, port) = listener(false);
    for n in 0..5000u16 {
        let packet = packet([10, 0, 2, 2], n, port, 5, 0, SYN, &[], &[]);
        let view = view(&packet).unwrap();
        sim.engine(|tcp, cx| tcp.segment(cx, &view));
        if n % 7 == 0 {
            sim.engine(|tcp, cx| tcp.timers(cx));
        }
        assert!(sim.tcp.flows() <= 20);
    }
    works(&mut sim);
}

/// A table full of open flows: new ones are refused, and taken again when there is room.
#[test]
fn full_table_refuses_and_recovers() {
    let mut sim = Sim::new(Setup::default());
    sim.tcp = Tcp::with_limits(Limits { flows: 3, half_open: 3, memory: 1 << 20 }, Claims::alone(), false);
    let (listener, port) = listener(false);
    let mut streams = Vec::new();
    let handles: Vec<_> = (0..3).map(|_| sim.connect(port, false, 1000)).collect();
    sim.run(|sim| {
        streams.extend(accept(&listener));
        let open = handles.iter().all(|h| sim.sockets.get::<smoltcp::socket::tcp::Socket<'_>>(*h).may_send());
        (open && streams.len() == 3, false)
    });
    sim.pass(Duration::from_millis(1));
    let refused = sim.connect(port, false, 1000);
    sim.run(|sim| (!sim.guest(refused).is_open(), false));
    assert_eq!(sim.tcp.flows(), 3);
    sim.guest(handles[0]).abort();
    sim.run(|sim| (sim.tcp.flows() == 2, false));
    works(&mut sim);
}

/// A table full of open flows, all of them idle: the one that was idle longest makes room.
#[test]
fn full_table_gives_up_what_is_idle_longest() {
    let mut sim = Sim::new(Setup::default());
    sim.tcp = Tcp::with_limits(Limits { flows: 3, half_open: 3, memory: 1 << 20 }, Claims::alone(), false);
    let (listener, port) = listener(false);
    let mut streams = Vec::new();
    let handles: Vec<_> = (0..3).map(|_| sim.connect(port, false, 1000)).collect();
    sim.run(|sim| {
        streams.extend(accept(&listener));
        let open = handles.iter().all(|h| sim.guest(*h).may_send());
        (open && streams.len() == 3, false)
    });
    sim.pass(Duration::from_secs(20));
    // Who is who does not matter: two speak now, and a probe's answer is none.
    for handle in &handles[1..] {
        sim.guest(*handle).send_slice(b"still here").unwrap();
    }
    sim.run(|sim| (handles[1..].iter().all(|h| sim.guest(*h).send_queue() == 0), false));
    sim.pass(Duration::from_secs(15));
    let more = sim.connect(port, false, 1000);
    sim.run(|sim| (sim.guest(more).may_send() && !sim.guest(handles[0]).is_open(), false));
    assert!(handles[1..].iter().all(|h| sim.guest(*h).is_open()), "those that spoke go on");
    assert_eq!((sim.tcp.flows(), sim.evicted()), (3, 1));
}
