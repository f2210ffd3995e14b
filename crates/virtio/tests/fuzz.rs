//! A second of nonsense from a fixed seed for every device: random register accesses, random rings, chains
//! that are almost right. The devices must stay inside guest memory, answer every access, and come back to
//! work after a reset.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs::File;
use std::time::{Duration, Instant};

use common::{Guest, INDIRECT, MEM_SIZE, NEXT, Rng, WRITE};
use virtio::block::Block;
use virtio::console::{Console, PortConfig, PortEnd};
use virtio::fs::{Fs, FsConfig};
use virtio::net::{Net, NetConfig};
use vm_memory::{Bytes, GuestAddress};

/// For each of the devices.
const BUDGET: Duration = Duration::from_millis(250);

fn random_bytes(rng: &mut Rng, len: usize) -> Vec<u8> {
    (0..len).map(|_| rng.next() as u8).collect()
}

/// Offsets near registers more often than far from them.
fn random_offset(rng: &mut Rng) -> u64 {
    match rng.below(8) {
        0..4 => rng.below(64),
        4 => 0x1000 * rng.below(4) + rng.below(16),
        5 => 0x3000 + rng.below(64),
        6 => rng.below(0x4000),
        _ => rng.next(),
    }
}

fn random_accesses(guest: &mut Guest, rng: &mut Rng) {
    for _ in 0..40 {
        let len = 1 + rng.below(8) as usize;
        let mut data = random_bytes(rng, len);
        if rng.below(3) == 0 {
            data.fill(0xff * rng.below(2) as u8);
        }
        match rng.below(8) {
            0 => {
                // Keep the command register and MSI-X alive most of the time.
                let offset =
                    if rng.below(20) == 0 { rng.next() as u16 } else { 0x40 + rng.below(0xc0) as u16 };
                guest.pci.config_write(offset, &data);
            }
            1 => guest.pci.config_read(rng.next() as u16 & 0x1ff, &mut data),
            2 => guest.pci.bar_read(rng.below(7) as usize, random_offset(rng), &mut data),
            3 if rng.below(4) == 0 => guest.pci.bar_write(2, rng.below(0x1000), &data),
            _ => guest.pci.bar_write(0, random_offset(rng), &data),
        }
    }
}

/// Buffers that are sometimes nowhere, empty, huge, or of the wrong kind.
fn random_chain(guest: &mut Guest, rng: &mut Rng, queue: usize, requests: &[Vec<u8>]) {
    let mut buffers = Vec::new();
    let request = &requests[rng.below(requests.len() as u64) as usize];
    let mut bytes = request.clone();
    for _ in 0..rng.below(3) {
        if !bytes.is_empty() {
            let at = rng.below(bytes.len() as u64) as usize;
            bytes[at] = rng.next() as u8;
        }
    }
    let base = 0x100_0000 + rng.below(1 << 20);
    guest.mem.write_slice(&bytes, GuestAddress(base)).unwrap();
    buffers.push((base, bytes.len() as u32, 0));
    for _ in 0..rng.below(4) {
        let (address, len) = match rng.below(40) {
            0 => (rng.next(), rng.next() as u32),
            1 => (MEM_SIZE as u64 - 8, 16),
            2 => (base, 0),
            3 => (base, 12 << 20),
            _ => (0x120_0000 + rng.below(1 << 20), 1 + rng.below(9000) as u32),
        };
        let flags = match rng.below(60) {
            0 => rng.next() as u16 & (NEXT | WRITE | INDIRECT),
            1 => 0,
            _ => WRITE,
        };
        buffers.push((address, len, flags));
    }
    if guest.free(queue) >= buffers.len() {
        guest.offer(queue, &buffers);
    }
}

/// Rings of noise, or a valid ring with noise in some place.
fn random_ring_damage(guest: &mut Guest, rng: &mut Rng, queue: usize) {
    let (desc, avail, used) = guest.ring_addresses(queue);
    let base = [desc, avail, used][rng.below(3) as usize];
    let len = 1 + rng.below(48) as usize;
    let noise = random_bytes(rng, len);
    guest.mem.write_slice(&noise, GuestAddress(base + rng.below(64))).unwrap();
}

fn restore(guest: &mut Guest) {
    guest.pci.config_write(4, &6u16.to_le_bytes());
    guest.set_status(0);
}

fn fuzz(mut guest: Guest, seed: u64, requests: &[Vec<u8>]) {
    let mut rng = Rng(seed);
    let end = Instant::now() + BUDGET;
    let mut rounds = 0;
    while Instant::now() < end {
        rounds += 1;
        restore(&mut guest);
        guest.negotiate(u64::MAX);
        guest.rewind();
        guest.start();
        let queues = guest.read16(18);
        for _ in 0..1 + rng.below(12) {
            let queue = rng.below(queues.into()) as usize;
            for _ in 0..1 + rng.below(6) {
                random_chain(&mut guest, &mut rng, queue, requests);
            }
            if rng.below(4) == 0 {
                random_ring_damage(&mut guest, &mut rng, queue);
            }
            guest.kick(queue);
        }
        if rng.below(2) == 0 {
            random_accesses(&mut guest, &mut rng);
        }
    }
    // It still works: status, features, queues.
    restore(&mut guest);
    guest.rewind();
    guest.run(u64::MAX);
    guest.pci.reset();
    assert!(rounds > 10, "{rounds} rounds");
}

#[test]
fn block() {
    let fd = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(1 << 20).unwrap();
    let requests: Vec<_> = [0u32, 1, 4, 8, 11, 13]
        .iter()
        .map(|kind| [&kind.to_le_bytes()[..], &[0; 12], &[0; 512]].concat())
        .collect();
    fuzz(Guest::sink(Block::new(file, false, "fuzz").unwrap()), 1, &requests);
}

#[test]
fn rng() {
    fuzz(Guest::sink(virtio::rng::Rng::new()), 2, &[vec![], vec![1, 2, 3]]);
}

#[test]
fn console() {
    let zero = || Some(File::open("/dev/zero").unwrap().into());
    let null = || Some(File::options().write(true).open("/dev/null").unwrap().into());
    let (pipe_out, pipe_in) = std::io::pipe().unwrap();
    let port = |name: &str, input, output| PortConfig {
        name: Some(name.to_owned()),
        end: PortEnd::Fd { input, output },
    };
    let (console, handle) = Console::new(vec![
        port("", zero(), null()),
        port("in", zero(), None),
        port("out", None, Some(pipe_in.into())),
        port("none", None, None),
    ])
    .unwrap();
    handle.resize(80, 24);
    let mut requests = vec![vec![0x55; 3000], vec![]];
    for event in [0u8, 3, 6] {
        requests.push(vec![0, 0, 0, 0, event, 0, 1, 0]);
        requests.push(vec![1, 0, 0, 0, event, 0, 1, 0]);
    }
    fuzz(Guest::sink(console), 3, &requests);
    drop(pipe_out);
}

#[test]
fn fs() {
    let dir = std::env::temp_dir().join(format!("ring3-fuzz-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(dir.join("a/b")).unwrap();
    std::fs::write(dir.join("a/file"), [7; 10_000]).unwrap();
    let config = FsConfig { tag: "fuzz".to_owned(), root: dir.clone(), timeout: Duration::from_secs(1) };
    let mut requests = Vec::new();
    for opcode in 1..=48u32 {
        for (node, body) in [(1u64, &b"a\0file\0"[..]), (2, b"file\0b\0"), (2, &[1, 0, 0, 0, 0, 0, 0, 0])] {
            let mut body = body.to_vec();
            body.resize(64, 0);
            let mut request = (40 + body.len() as u32).to_le_bytes().to_vec();
            request.extend_from_slice(&opcode.to_le_bytes());
            request.extend_from_slice(&1u64.to_le_bytes());
            request.extend_from_slice(&node.to_le_bytes());
            request.extend_from_slice(&[0; 16]);
            request.extend_from_slice(&body);
            requests.push(request);
        }
    }
    fuzz(Guest::sink(Fs::new(&config).unwrap()), 4, &requests);
    let names: Vec<_> = std::fs::read_dir(dir.join("a")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2);
    assert_eq!(std::fs::read(dir.join("a/file")).unwrap(), [7; 10_000]);
    std::fs::remove_dir_all(&dir).unwrap();
}

/// The queues have a real engine at their other end, which opens no sockets.
#[test]
fn net() {
    let (net, taps) = Net::new(NetConfig { mac: usernet::testing::GUEST_MAC, mtu: 1500, pairs: 2 }).unwrap();
    let engines: Vec<_> = taps
        .into_iter()
        .map(|tap| {
            let mut config = usernet::testing::config();
            (config.services.tcp, config.services.udp, config.services.icmp) = (false, false, false);
            let engine = usernet::Engine::new(config, Box::new(tap)).unwrap();
            let handle = engine.handle();
            (handle, std::thread::spawn(move || engine.run()))
        })
        .collect();
    let arp = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1];
    let requests = [
        vec![4, 0, 2, 0],
        [&[0; 12][..], &arp, &[0; 20]].concat(),
        [&[1, 1, 54, 0, 100, 0, 34, 0, 16, 0, 0, 0][..], &arp[..12], &[8, 0, 0x45], &[6; 600]].concat(),
    ];
    fuzz(Guest::sink(net), 5, &requests);
    for (handle, thread) in engines {
        handle.stop();
        thread.join().unwrap().unwrap();
    }
}
