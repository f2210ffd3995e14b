//! Bytes, both ways, over links good and bad.

use std::net::TcpStream;

use super::sim::{Dice, Harm, Setup, Sim, Talk, accept, listener};
use crate::tests::has_ipv6;

/// Carries so many bytes each way at once, and checks them.
fn exchange(sim: &mut Sim, ipv6: bool, out: usize, into: usize, buffers: usize) {
    if ipv6 && !has_ipv6() {
        return;
    }
    let (listener, port) = listener(ipv6);
    let mut dice = Dice::new(99);
    let (out, into) = (dice.bytes(out), dice.bytes(into));
    let handle = sim.connect(port, ipv6, buffers);
    let mut world: Option<TcpStream> = None;
    let (mut guest_talk, mut world_talk) = (Talk::new(out.clone()), Talk::new(into.clone()));
    sim.run(|sim| {
        let mut active = guest_talk.guest(sim.guest(handle));
        if world.is_none() {
            world = accept(&listener);
        }
        if let Some(stream) = &mut world {
            active |= world_talk.world(stream);
        }
        (guest_talk.finished() && world_talk.finished(), active)
    });
    assert!(world_talk.heard == out, "{} of {}", world_talk.heard.len(), out.len());
    assert!(guest_talk.heard == into, "{} of {}", guest_talk.heard.len(), into.len());
    // Both ends over, nothing stays.
    let mut done = false;
    sim.pass(std::time::Duration::from_secs(60));
    sim.run(|sim| (std::mem::replace(&mut done, true) && sim.tcp.flows() == 0, false));
}

#[test]
fn plain() {
    for ipv6 in [false, true] {
        for (mtu, offload) in [(1500, false), (1500, true), (65520, false), (65520, true)] {
            let mut sim = Sim::new(Setup { mtu, offload, ..Setup::default() });
            exchange(&mut sim, ipv6, 5_000_000, 5_000_000, 500_000);
            assert_eq!(sim.payload_from_guest, 5_000_000, "the guest had to send nothing twice");
        }
    }
}

#[test]
fn nothing_at_all() {
    exchange(&mut Sim::new(Setup::default()), false, 0, 0, 1000);
    exchange(&mut Sim::new(Setup::default()), true, 1, 0, 1000);
    exchange(&mut Sim::new(Setup::default()), false, 0, 1, 1000);
}

#[test]
fn small_buffers_in_the_guest() {
    exchange(&mut Sim::new(Setup::default()), false, 300_000, 300_000, 2000);
    exchange(&mut Sim::new(Setup { offload: true, ..Setup::default() }), true, 100_000, 100_000, 700);
}

#[test]
fn lossy_both_ways() {
    for seed in 1..=8 {
        let harm = Harm { lost: 5, twice: 3, swapped: 10 };
        let mut sim = Sim::new(Setup { seed, to_guest: harm, from_guest: harm, ..Setup::default() });
        exchange(&mut sim, seed % 2 == 0, 1_000_000, 1_000_000, 200_000);
    }
}

#[test]
fn very_lossy() {
    for seed in 20..24 {
        let harm = Harm { lost: 25, twice: 10, swapped: 30 };
        let offload = seed % 2 == 0;
        let mut sim = Sim::new(Setup { seed, to_guest: harm, from_guest: harm, offload, ..Setup::default() });
        exchange(&mut sim, false, 100_000, 200_000, 60_000);
    }
}

#[test]
fn without_the_kernels_peek_offset() {
    let harm = Harm { lost: 2, twice: 2, swapped: 5 };
    for to_guest in [Harm::default(), harm] {
        let mut sim = Sim::new(Setup { to_guest, ..Setup::default() });
        sim.tcp.forget_peek_offset();
        exchange(&mut sim, false, 10_000, 2_000_000, 500_000);
    }
}

#[test]
fn link_that_is_full_most_of_the_time() {
    for room in [1, 3] {
        let mut sim = Sim::new(Setup { room, ..Setup::default() });
        exchange(&mut sim, false, 500_000, 1_000_000, 200_000);
        let harm = Harm { lost: 3, twice: 0, swapped: 3 };
        let mut sim = Sim::new(Setup { room, to_guest: harm, offload: true, ..Setup::default() });
        exchange(&mut sim, true, 500_000, 1_000_000, 200_000);
    }
}

/// The world does not read: the guest is told to wait, and nothing of what it was allowed to send is lost.
#[test]
fn world_that_does_not_read() {
    for mtu in [1500, 65520] {
        let mut sim = Sim::new(Setup { mtu, ..Setup::default() });
        let (listener, port) = listener(false);
        let out = Dice::new(3).bytes(24_000_000);
        let handle = sim.connect(port, false, 8_000_000);
        let (mut guest, mut world) = (Talk::new(out.clone()), Talk::new(Vec::new()));
        world.sip = 0;
        let mut stream: Option<TcpStream> = None;
        let mut quiet = 0;
        sim.run(|sim| {
            let active = guest.guest(sim.guest(handle));
            stream = stream.take().or_else(|| accept(&listener));
            quiet = if active { 0 } else { quiet + 1 };
            (quiet > 200, active)
        });
        assert!(sim.guest(handle).send_queue() > 0, "the guest is held back");
        let taken = sim.payload_from_guest;
        world.sip = 1 << 16;
        let stream = stream.as_mut().unwrap();
        sim.run(|sim| {
            let active = guest.guest(sim.guest(handle)) | world.world(stream);
            (guest.finished() && world.finished(), active)
        });
        assert!(world.heard == out);
        // A probe of a closed window may bring a byte twice.
        assert!(sim.payload_from_guest <= 24_000_000 + 100, "{taken} {}", sim.payload_from_guest);
    }
}

/// The guest does not read: the world is held back, and its bytes come when the guest does.
#[test]
fn guest_that_does_not_read() {
    let mut sim = Sim::new(Setup::default());
    let (listener, port) = listener(false);
    let into = Dice::new(4).bytes(12_000_000);
    let handle = sim.connect(port, false, 100_000);
    let (mut guest, mut world) = (Talk::new(Vec::new()), Talk::new(into.clone()));
    guest.sip = 0;
    let mut stream: Option<TcpStream> = None;
    let mut quiet = 0;
    sim.run(|sim| {
        let mut active = guest.guest(sim.guest(handle));
        stream = stream.take().or_else(|| accept(&listener));
        if let Some(stream) = &mut stream {
            active |= world.world(stream);
        }
        quiet = if active { 0 } else { quiet + 1 };
        (quiet > 200, active)
    });
    assert!(!world.finished());
    assert_eq!(sim.guest(handle).recv_queue(), 100_000, "the window was used to the last byte");
    // Hours later.
    sim.pass(std::time::Duration::from_secs(7200));
    guest.sip = 10_000;
    let stream = stream.as_mut().unwrap();
    sim.run(|sim| {
        let active = guest.guest(sim.guest(handle)) | world.world(stream);
        (guest.finished() && world.finished(), active)
    });
    assert!(guest.heard == into);
}
