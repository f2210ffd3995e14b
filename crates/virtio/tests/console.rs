//! The console from the driver's side and from the host's side.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Seek, Write};
use std::os::fd::OwnedFd;

use common::{EVENT_IDX, Guest, INDIRECT_DESC, Rng, VERSION_1, WRITE};
use virtio::console::{Console, ConsoleHandle, PortConfig, PortEnd};

const MULTIPORT: u64 = 1 << 1;
const SIZE: u64 = 1 << 0;
const RINGS: u64 = VERSION_1 | EVENT_IDX | INDIRECT_DESC;

/// Queue numbers.
const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;
const fn rx(port: usize) -> usize {
    if port == 0 { 0 } else { 2 * port + 2 }
}
const fn tx(port: usize) -> usize {
    rx(port) + 1
}

fn port(name: Option<&str>, input: Option<OwnedFd>, output: Option<OwnedFd>) -> PortConfig {
    PortConfig { name: name.map(str::to_owned), end: PortEnd::Fd { input, output } }
}

/// A console with a terminal on pipes, an input port 1 and an output port 2.
struct Setup {
    guest: Guest,
    handle: ConsoleHandle,
    terminal_out: PipeReader,
    stdin: Option<PipeWriter>,
    stdout: Option<PipeReader>,
}

fn setup() -> Setup {
    let (terminal_out, out) = io::pipe().unwrap();
    let (stdin_guest, stdin) = io::pipe().unwrap();
    let (stdout, stdout_guest) = io::pipe().unwrap();
    let (console, handle) = Console::new(vec![
        port(None, None, Some(out.into())),
        port(Some("ring3.stdin"), Some(stdin_guest.into()), None),
        port(Some("ring3.stdout"), None, Some(stdout_guest.into())),
    ])
    .unwrap();
    Setup { guest: Guest::new(console), handle, terminal_out, stdin: Some(stdin), stdout: Some(stdout) }
}

fn message(port: u32, event: u16, value: u16) -> Vec<u8> {
    let mut bytes = port.to_le_bytes().to_vec();
    bytes.extend_from_slice(&event.to_le_bytes());
    bytes.extend_from_slice(&value.to_le_bytes());
    bytes
}

fn say(guest: &mut Guest, port: u32, event: u16, value: u16) {
    guest.request(CONTROL_TX, &[&message(port, event, value)], 0);
}

/// Offers a receive buffer and waits until the device fills it.
fn hear(guest: &mut Guest, queue: usize) -> Vec<u8> {
    guest.request(queue, &[], 64)
}

/// Takes the device through the handshake of all ports, and opens them if asked.
fn handshake(guest: &mut Guest, open: bool) {
    guest.run(RINGS | MULTIPORT | SIZE);
    say(guest, u32::MAX, 0, 1);
    for number in 0..3 {
        assert_eq!(hear(guest, CONTROL_RX), message(number, 1, 1), "DEVICE_ADD");
    }
    for number in 0..3 {
        say(guest, number, 3, 1);
        let first = match number {
            0 => message(0, 4, 1),
            1 => [message(1, 7, 1), b"ring3.stdin".to_vec()].concat(),
            _ => [message(2, 7, 1), b"ring3.stdout".to_vec()].concat(),
        };
        assert_eq!(hear(guest, CONTROL_RX), first);
        assert_eq!(hear(guest, CONTROL_RX), message(number, 6, 1), "PORT_OPEN");
        if open {
            say(guest, number, 6, 1);
        }
    }
}

#[test]
fn config_space_and_features() {
    let mut setup = setup();
    assert_eq!(setup.guest.read32(0x2004), 3, "max_nr_ports");
    setup.handle.resize(80, 25);
    assert_eq!(setup.guest.read32(0x2000), 80 | 25 << 16);
    assert_eq!(setup.guest.offered() & (MULTIPORT | SIZE), MULTIPORT | SIZE);
    assert_eq!(setup.guest.read16(18), 8, "queues");
}

#[test]
fn terminal_output_and_window_size() {
    let mut setup = setup();
    handshake(&mut setup.guest, true);
    setup.guest.request(tx(0), &[b"hello ", b"world"], 0);
    let mut text = [0; 11];
    setup.terminal_out.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"hello world");
    setup.handle.resize(132, 43);
    let resize = [message(0, 5, 0), vec![132, 0, 43, 0]].concat();
    assert_eq!(hear(&mut setup.guest, CONTROL_RX), resize);
}

#[test]
fn nothing_is_read_before_the_guest_opens_the_port() {
    let mut setup = setup();
    let mut stdin = setup.stdin.take().unwrap();
    stdin.write_all(b"early").unwrap();
    drop(stdin);
    handshake(&mut setup.guest, false);
    let guest = &mut setup.guest;
    let buffer = guest.alloc(64);
    guest.offer(rx(1), &[(buffer, 64, WRITE)]);
    guest.kick(rx(1));
    // A full turn of the device's thread: it answers on another queue.
    guest.request(tx(0), &[b"x"], 0);
    assert_eq!(guest.poll_used(rx(1)), None);
    say(guest, 1, 6, 1);
    assert_eq!(guest.wait_used(rx(1)).1, 5);
    assert_eq!(guest.get(buffer, 5), b"early");
    // The end of file comes after the data, when there is a buffer to find it with.
    guest.offer(rx(1), &[(buffer, 64, WRITE)]);
    guest.kick(rx(1));
    assert_eq!(hear(guest, CONTROL_RX), message(1, 6, 0), "PORT_OPEN 0");
    assert_eq!(guest.poll_used(rx(1)), None);
}

#[test]
fn a_reader_that_goes_away_closes_the_port() {
    let mut setup = setup();
    handshake(&mut setup.guest, true);
    drop(setup.stdout.take());
    setup.guest.request(tx(2), &[b"nobody"], 0);
    assert_eq!(hear(&mut setup.guest, CONTROL_RX), message(2, 6, 0));
    setup.guest.request(tx(2), &[b"still nobody"], 0);
}

#[test]
fn a_writer_that_goes_away_ends_the_stream_of_a_waiting_reader() {
    let mut setup = setup();
    handshake(&mut setup.guest, true);
    let guest = &mut setup.guest;
    let mut stdin = setup.stdin.take().unwrap();
    stdin.write_all(b"first").unwrap();
    assert_eq!(hear(guest, rx(1)), b"first");
    // This buffer waits; another port's answer says that the device knows of it.
    let buffer = guest.alloc(64);
    guest.offer(rx(1), &[(buffer, 64, WRITE)]);
    guest.kick(rx(1));
    guest.request(tx(0), &[b"x"], 0);
    drop(stdin);
    assert_eq!(hear(guest, CONTROL_RX), message(1, 6, 0));
    assert_eq!(guest.poll_used(rx(1)), None);
}

/// A reader that leaves while the guest waits for it.
#[test]
fn a_full_pipe_that_breaks_gives_the_buffer_back() {
    let mut setup = setup();
    handshake(&mut setup.guest, true);
    let guest = &mut setup.guest;
    let address = guest.alloc(300_000);
    guest.offer(tx(2), &[(address, 300_000, 0)]);
    guest.kick(tx(2));
    guest.request(tx(0), &[b"x"], 0);
    drop(setup.stdout.take());
    guest.wait_used(tx(2));
    assert_eq!(hear(guest, CONTROL_RX), message(2, 6, 0));
}

#[test]
fn a_full_pipe_holds_the_buffer_until_it_is_read() {
    let mut setup = setup();
    handshake(&mut setup.guest, true);
    let guest = &mut setup.guest;
    let big: Vec<u8> = (0..300_000u32).map(|i| (i / 7) as u8).collect();
    let address = guest.put(&big);
    guest.offer(tx(2), &[(address, big.len() as u32, 0)]);
    guest.kick(tx(2));
    guest.request(tx(0), &[b"x"], 0);
    assert_eq!(guest.poll_used(tx(2)), None, "a pipe holds less");
    let mut read = vec![0; big.len()];
    setup.stdout.as_mut().unwrap().read_exact(&mut read).unwrap();
    assert!(read == big);
    guest.wait_used(tx(2));
}

/// A guest that powers off has not waited for the reader of its output.
#[test]
fn what_the_driver_left_is_written_when_the_device_goes() {
    let mut setup = setup();
    handshake(&mut setup.guest, true);
    let guest = &mut setup.guest;
    let chunks: Vec<Vec<u8>> = (0..8u32).map(|n| vec![n as u8; 50_000]).collect();
    for chunk in &chunks {
        let address = guest.put(chunk);
        guest.offer(tx(2), &[(address, chunk.len() as u32, 0)]);
    }
    guest.kick(tx(2));
    let (guest, mut stdout) = (setup.guest, setup.stdout.take().unwrap());
    let going = std::thread::spawn(move || drop(guest));
    let mut read = Vec::new();
    stdout.read_to_end(&mut read).unwrap();
    assert!(read == chunks.concat());
    going.join().unwrap();
}

#[test]
fn nobody_waits_for_a_reader_when_told_so() {
    let mut setup = setup();
    handshake(&mut setup.guest, true);
    let guest = &mut setup.guest;
    let address = guest.alloc(300_000);
    guest.offer(tx(2), &[(address, 300_000, 0)]);
    guest.kick(tx(2));
    setup.handle.abandon();
    drop(setup.guest);
}

/// Megabytes both ways at once, through chains of several buffers, against slow and fast ends.
#[test]
fn bytes_arrive_unchanged_in_bulk() {
    const TOTAL: usize = 24 << 20;
    const CHAIN: usize = 3 * 4096;
    let mut setup = setup();
    handshake(&mut setup.guest, true);
    let guest = &mut setup.guest;
    let byte = |i: usize| (i.wrapping_mul(0x9e37_79b9) >> 13) as u8;

    let mut stdin = setup.stdin.take().unwrap();
    let writer = std::thread::spawn(move || {
        let mut at = 0;
        let mut rng = Rng(7);
        while at < TOTAL {
            let len = (1 + rng.below(100_000) as usize).min(TOTAL - at);
            let data: Vec<u8> = (at..at + len).map(byte).collect();
            stdin.write_all(&data).unwrap();
            at += len;
        }
    });
    let mut stdout = setup.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut data = vec![0; 1 << 16];
        let mut at = 0;
        while at < TOTAL {
            let len = stdout.read(&mut data).unwrap();
            assert!(len > 0);
            assert!(data[..len].iter().enumerate().all(|(i, b)| *b == byte(at + i)));
            at += len;
        }
    });

    // An echo: what comes in on port 1 goes out on port 2 from the same buffers.
    let mut idle: Vec<u64> = (0..16).map(|_| guest.alloc(CHAIN)).collect();
    let buffers = |address: u64, len: usize, flags| {
        let parts = (0..len).step_by(4096);
        parts.map(|at| (address + at as u64, (len - at).min(4096) as u32, flags)).collect::<Vec<_>>()
    };
    let mut receiving = std::collections::HashMap::new();
    let mut sending = std::collections::HashMap::new();
    let mut received = 0;
    while received < TOTAL {
        for address in idle.drain(..) {
            receiving.insert(guest.offer(rx(1), &buffers(address, CHAIN, WRITE)), address);
        }
        guest.kick(rx(1));
        let mut used = Some(guest.wait_used(rx(1)));
        while let Some((head, len)) = used {
            let address = receiving.remove(&head).unwrap();
            received += len as usize;
            sending.insert(guest.offer(tx(2), &buffers(address, len as usize, 0)), address);
            used = guest.poll_used(rx(1));
        }
        guest.kick(tx(2));
        if receiving.is_empty() {
            let (head, _) = guest.wait_used(tx(2));
            idle.push(sending.remove(&head).unwrap());
        }
        while let Some((head, _)) = guest.poll_used(tx(2)) {
            idle.push(sending.remove(&head).unwrap());
        }
    }
    writer.join().unwrap();
    reader.join().unwrap();
}

#[test]
fn files_are_host_ends_too() {
    let mut file = tempfile();
    file.write_all(b"contents").unwrap();
    file.rewind().unwrap();
    let mut out = tempfile();
    out.write_all(b"before ").unwrap();
    let null = File::options().read(true).write(true).open("/dev/null").unwrap();
    let (console, _) = Console::new(vec![
        port(None, Some(null.try_clone().unwrap().into()), Some(null.into())),
        port(Some("ring3.stdin"), Some(file.into()), None),
        port(Some("ring3.stdout"), None, Some(out.try_clone().unwrap().into())),
    ])
    .unwrap();
    let mut guest = Guest::new(console);
    handshake(&mut guest, true);
    assert_eq!(hear(&mut guest, rx(1)), b"contents");
    guest.request(tx(2), &[b"and after"], 0);
    guest.request(tx(0), &[b"gone"], 0);
    drop(guest);
    out.rewind().unwrap();
    let mut text = String::new();
    out.read_to_string(&mut text).unwrap();
    assert_eq!(text, "before and after");
}

fn tempfile() -> File {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    File::from(fd)
}

#[test]
fn host_ends_outlive_a_reset() {
    let mut setup = setup();
    handshake(&mut setup.guest, true);
    let guest = &mut setup.guest;
    let stdin = setup.stdin.as_mut().unwrap();
    stdin.write_all(b"one").unwrap();
    assert_eq!(hear(guest, rx(1)), b"one");
    let buffer = guest.alloc(64);
    guest.offer(rx(1), &[(buffer, 64, WRITE)]);
    guest.kick(rx(1));
    handshake(guest, true);
    stdin.write_all(b"two").unwrap();
    assert_eq!(hear(guest, rx(1)), b"two");
    guest.pci.reset();
}

#[test]
fn without_multiport_there_is_just_the_terminal() {
    let mut setup = setup();
    setup.guest.run(RINGS | SIZE);
    setup.guest.request(tx(0), &[b"plain"], 0);
    let mut text = [0; 5];
    setup.terminal_out.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"plain");
    let seen = setup.guest.irqs.count(0);
    setup.handle.resize(100, 30);
    setup.guest.irqs.wait(0, seen);
}

#[test]
fn nonsense_on_the_control_queue_is_survived() {
    let mut setup = setup();
    handshake(&mut setup.guest, true);
    let guest = &mut setup.guest;
    for (number, event, value) in [(99, 3, 1), (u32::MAX, 6, 1), (0, 77, 1), (1, 3, 0), (2, 1, 1)] {
        say(guest, number, event, value);
    }
    guest.request(CONTROL_TX, &[b"abc"], 0);
    // A driver that says "ready" without end, and takes no answers, is not listened to for ever.
    let ready = guest.put(&message(0, 0, 1));
    for _ in 0..60 {
        guest.offer(CONTROL_TX, &[(ready, 8, 0)]);
    }
    guest.kick(CONTROL_TX);
    // Three answers each, until 128 wait.
    for _ in 0..43 {
        guest.wait_used(CONTROL_TX);
    }
    guest.request(tx(0), &[b"still here"], 0);
    assert_eq!(guest.poll_used(CONTROL_TX), None);
}
