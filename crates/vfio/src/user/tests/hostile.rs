//! Peers that break the protocol: whatever they say, the other side answers with an errno or ends the connection.

use std::fs::File;
use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;

use iommufd::iova::Iova;
use proptest::prelude::*;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zerocopy::{FromBytes, IntoBytes};

use super::{LONG, Served, plain, serve};
use crate::device::Device;
use crate::dma::DmaFault;
use crate::user::Errno;
use crate::user::client::{self, RemoteDevice};
use crate::user::connection::Patience;
use crate::user::server::{self, Server};
use crate::user::testing::{self, COPY, IRQ, MEMORY, Model, REGISTERS, SHORT};
use crate::user::transport::Broken;
use crate::user::version::{self, Capabilities, MAX_FDS, MAX_MESSAGE};
use crate::user::wire::{self, COMMANDS, Command, Flags, Header};

/// A client by hand.
struct Raw(UnixStream);

impl Raw {
    /// One that has been greeted by a server that waits for it as long as `patience` says.
    fn new(capabilities: Capabilities, patience: Patience) -> (Served, Self) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let served = serve(theirs, Capabilities::OURS, patience);
        let mut raw = Raw(ours);
        let payload = version::encode(wire::Version { major: 0, minor: 0 }, capabilities);
        raw.send(Header::command(9, Command::Version, payload.len(), false), &payload, &[]);
        let (header, payload) = raw.receive();
        assert_eq!((header.id, header.command, header.flags), (9, 1, 1));
        assert_eq!(version::decode(&payload).unwrap().0, wire::Version { major: 0, minor: 0 });
        (served, raw)
    }

    /// One that may be slow: the tests run on machines that have other work.
    fn plain() -> (Served, Self) {
        Self::new(Capabilities::DEFAULT, LONG)
    }

    /// One that makes the server wait in vain.
    fn silent() -> (Served, Self) {
        Self::new(Capabilities::DEFAULT, SHORT)
    }

    fn send(&mut self, header: Header, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(payload)];
        // A server that has ended the connection is found out when it does not answer.
        let _ = sendmsg(&self.0, &parts, &mut control, SendFlags::NOSIGNAL);
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        let mut header = [0; Header::SIZE];
        self.0.read_exact(&mut header).unwrap();
        let header = Header::read_from_bytes(&header).unwrap();
        let mut payload = vec![0; header.size as usize - Header::SIZE];
        self.0.read_exact(&mut payload).unwrap();
        (header, payload)
    }

    /// Sends a command: the errno of its reply, or its payload.
    fn ask(&mut self, command: Command, payload: &[u8]) -> Result<Vec<u8>, Errno> {
        self.send(Header::command(3, command, payload.len(), false), payload, &[]);
        let (header, reply) = self.receive();
        assert_eq!((header.id, header.command), (3, command as u16));
        match header.failure() {
            Some(errno) => {
                assert!(reply.is_empty());
                Err(errno)
            }
            None => Ok(reply),
        }
    }
}

#[test]
fn commands_that_are_wrong_are_refused_and_do_no_harm() {
    let (served, mut raw) = Raw::plain();
    let access = |region: u32, offset: u64, count: u32| wire::RegionAccess { offset, region, count };
    for row in COMMANDS {
        for length in 0..row.request {
            let answer = raw.ask(row.command, &vec![0; length]);
            assert_eq!(answer, Err(Errno::INVAL), "{} with {length} bytes", row.name);
        }
        if row.sender == wire::Sender::Server {
            assert_eq!(raw.ask(row.command, &[0; 64]), Err(Errno::INVAL), "{}", row.name);
        }
    }
    let nine = wire::SingleWrite { access: access(REGISTERS, 0, 9), data: [0; 8] };
    let nine = [1u64.as_bytes(), nine.as_bytes()].concat();
    for (what, command, payload) in [
        ("reads too much", Command::RegionRead, access(REGISTERS, 0, u32::MAX).as_bytes()),
        ("reads 1 MiB and a byte", Command::RegionRead, access(REGISTERS, 0, (1 << 20) + 1).as_bytes()),
        (
            "writes less than it says",
            Command::RegionWrite,
            &[access(REGISTERS, 0, 5).as_bytes(), &[0; 4]].concat(),
        ),
        (
            "writes more than it says",
            Command::RegionWrite,
            &[access(REGISTERS, 0, 3).as_bytes(), &[0; 4]].concat(),
        ),
        ("writes many that are not there", Command::RegionWriteMulti, &u64::MAX.to_ne_bytes()),
        ("writes nine bytes", Command::RegionWriteMulti, &nine),
        ("a feature with unknown flags", Command::DeviceFeature, [64u32, 1 << 20].as_bytes()),
        ("greets twice", Command::Version, &[0, 0, 1, 0]),
    ] {
        assert_eq!(raw.ask(command, payload), Err(Errno::INVAL), "{what}");
    }
    assert_eq!(raw.ask(Command::DeviceFeature, [64u32, 1 << 16 | 3].as_bytes()), Err(Errno::NOTTY));
    let all = wire::DmaUnmap { argsz: 24, flags: wire::DMA_UNMAP_ALL, address: 0, size: 0 };
    raw.ask(Command::DmaUnmap, all.as_bytes()).unwrap();
    assert_eq!(raw.ask(Command::DmaUnmap, wire::DmaUnmap { flags: 1, ..all }.as_bytes()), Err(Errno::NOTSUP));
    let unknown = Header { id: 8, command: 14, size: 16, flags: 0, error: 0 };
    raw.send(unknown, &[], &[]);
    assert_eq!(raw.receive().0, unknown.failed(Errno::NOTSUP));
    // Nobody is told of what nobody waits for.
    let quiet = Header { flags: Flags::NO_REPLY.bits(), ..unknown };
    raw.send(quiet, &[], &[]);
    let info =
        raw.ask(Command::DeviceGetInfo, wire::DeviceInfo { argsz: 16, ..Default::default() }.as_bytes());
    assert_eq!(wire::DeviceInfo::read_from_bytes(&info.unwrap()).unwrap().num_regions, 9);
    drop(raw);
    assert_eq!(served.thread.join().unwrap(), Broken::Closed);
    assert_eq!(served.model.calls(), [""; 0]);
}

#[test]
fn answers_are_as_long_as_the_client_has_room() {
    let (_served, mut raw) = Raw::plain();
    use uapi::vfio::vfio_region_info;
    let ask = |raw: &mut Raw, argsz| {
        let asked = vfio_region_info { argsz, index: MEMORY, ..Default::default() };
        let reply = raw.ask(Command::DeviceGetRegionInfo, asked.as_bytes()).unwrap();
        let (info, chain) = vfio_region_info::read_from_prefix(&reply).unwrap();
        (info, chain.len())
    };
    let (info, chain) = ask(&mut raw, 32);
    assert_eq!((info.flags, info.cap_offset, chain), (15, 32, 0));
    // Headers, two areas, the type.
    let full = 32 + (8 + 8 + 32) + (8 + 8) + 8;
    assert_eq!(info.argsz, full);
    let (info, chain) = ask(&mut raw, full);
    assert_eq!((info.argsz, info.cap_offset, chain), (full, 32, full as usize - 32));
    let short = vfio_region_info { argsz: 31, ..Default::default() };
    assert_eq!(raw.ask(Command::DeviceGetRegionInfo, short.as_bytes()), Err(Errno::INVAL));
}

#[test]
fn eventfds_for_writes() {
    let (served, mut raw) = Raw::new(Capabilities { max_fds: 2, ..Capabilities::DEFAULT }, LONG);
    let mut ask = |argsz, index| {
        raw.ask(
            Command::DeviceGetRegionIoFds,
            wire::RegionIoFds { argsz, index, ..Default::default() }.as_bytes(),
        )
    };
    let (info, rest) =
        wire::split::<wire::RegionIoFds>(&ask(16, REGISTERS).unwrap()).map(|(i, r)| (i, r.len())).unwrap();
    assert_eq!((info.argsz, info.count, rest), (16 + 2 * 40, 2, 0));
    assert_eq!(served.model.calls(), [""; 0]);
    let reply = ask(200, REGISTERS).unwrap();
    let second = wire::SubRegion::read_from_bytes(&reply[56..]).unwrap();
    let expected =
        wire::SubRegion { offset: 16, size: 4, fd_index: 1, flags: 1, datamatch: 1, ..Default::default() };
    assert_eq!(second, expected);
    assert_eq!(served.model.calls(), ["ioeventfd 0 0x0 4 0 true", "ioeventfd 0 0x10 4 1 true"]);
    assert_eq!(ask(200, 99), Err(Errno::INVAL));
}

#[test]
fn descriptors_that_nobody_wants_are_closed() {
    let (served, mut raw) = Raw::plain();
    let (mut reader, writer) = std::io::pipe().unwrap();
    {
        let many = vec![writer.as_fd(); 3];
        // Where none may come, where one may, and in a reply that nobody asked for.
        let header = |command| Header::command(1, command, 0, false);
        raw.send(header(Command::DeviceReset), &[], &many);
        assert_eq!(raw.receive().0.failure(), Some(Errno::INVAL));
        let map = wire::DmaMap { argsz: 32, flags: 3, size: 0x1000, ..Default::default() };
        raw.send(Header::command(1, Command::DmaMap, 32, false), map.as_bytes(), &many);
        assert_eq!(raw.receive().0.failure(), Some(Errno::INVAL));
        let irqs = wire::IrqSet { argsz: 20, flags: 4 | 32, index: IRQ, start: 0, count: 2 };
        raw.send(Header::command(1, Command::DeviceSetIrqs, 20, false), irqs.as_bytes(), &many);
        assert_eq!(raw.receive().0.failure(), Some(Errno::INVAL));
        // These are taken, and closed when the client goes.
        let irqs = wire::IrqSet { count: 3, ..irqs };
        raw.send(Header::command(1, Command::DeviceSetIrqs, 20, false), irqs.as_bytes(), &many);
        assert_eq!(raw.receive().0.failure(), None);
        let reply = header(Command::DeviceReset).reply(0);
        raw.send(reply, &[], &many);
    }
    assert_eq!(served.thread.join().unwrap(), Broken::Protocol("a reply that nobody waits for"));
    drop((raw, writer));
    let mut nothing = Vec::new();
    reader.read_to_end(&mut nothing).unwrap();
}

#[test]
fn messages_that_cannot_be_ends_the_connection() {
    let header = |size, flags| Header { id: 1, command: 4, size, flags, error: 0 };
    for (what, header, expected) in [
        ("shorter than a header", header(15, 0), "a message is shorter than its header"),
        ("size 0", header(0, 0), "a message is shorter than its header"),
        ("too long", header(MAX_MESSAGE as u32 + 1, 0), "a message is too long"),
        ("2 GiB", header(u32::MAX, 0), "a message is too long"),
        ("a type that is none", header(16, 2), "a message is neither command nor reply"),
        ("a reply", header(16, 1), "a reply that nobody waits for"),
    ] {
        let (served, mut raw) = Raw::plain();
        raw.send(header, &[], &[]);
        assert_eq!(served.thread.join().unwrap(), Broken::Protocol(expected), "{what}");
    }
    let (served, mut raw) = Raw::plain();
    let null = File::open("/dev/null").unwrap();
    raw.send(header(16, 0), &[], &[null.as_fd(); MAX_FDS + 1]);
    assert_eq!(served.thread.join().unwrap(), Broken::Protocol("too many descriptors"));
}

#[test]
fn a_client_that_goes_or_stops_in_the_middle() {
    for length in [1, 15, 16, 20, 47] {
        let message = [Header::command(1, Command::DmaMap, 32, false).as_bytes(), &[0; 32]].concat();
        let (served, mut raw) = Raw::plain();
        raw.0.write_all(&message[..length]).unwrap();
        drop(raw);
        assert_eq!(served.thread.join().unwrap(), Broken::Closed, "{length} bytes, gone");
        let (served, mut raw) = Raw::silent();
        raw.0.write_all(&message[..length]).unwrap();
        assert_eq!(served.thread.join().unwrap(), Broken::TimedOut, "{length} bytes, silent");
    }
    // One that does not take what it is sent.
    let (served, mut raw) = Raw::silent();
    let access = wire::RegionAccess { offset: 0, region: REGISTERS, count: 1 << 20 };
    raw.send(Header::command(1, Command::RegionRead, 16, false), access.as_bytes(), &[]);
    assert_eq!(served.thread.join().unwrap(), Broken::TimedOut);
    // One that does not answer the device.
    let (served, mut raw) = Raw::silent();
    let map = wire::DmaMap { argsz: 32, flags: 3, size: 1 << 30, ..Default::default() };
    raw.ask(Command::DmaMap, map.as_bytes()).unwrap();
    let mut write = access.as_bytes().to_vec();
    wire::RegionAccess { offset: COPY, region: REGISTERS, count: 8 }.write_to_prefix(&mut write).unwrap();
    write.extend_from_slice(&[0; 8]);
    raw.send(Header::command(1, Command::RegionWrite, 24, false), &write, &[]);
    assert_eq!(served.thread.join().unwrap(), Broken::TimedOut);
    let expected = format!("copy {:?}", Err::<(), _>(DmaFault::Remote(Errno::TIMEDOUT)));
    assert_eq!(served.model.calls(), [expected]);
}

#[test]
fn a_client_that_sends_too_much_at_a_time() {
    let (served, mut raw) = Raw::plain();
    let map = wire::DmaMap { argsz: 32, flags: 3, size: 1 << 30, ..Default::default() };
    raw.ask(Command::DmaMap, map.as_bytes()).unwrap();
    let access = wire::RegionAccess { offset: COPY, region: REGISTERS, count: 8 };
    let write = [access.as_bytes(), &[0; 8]].concat();
    raw.send(Header::command(1, Command::RegionWrite, 24, false), &write, &[]);
    // The device waits for memory; meanwhile commands come, and not the reply.
    for _ in 0..2000 {
        raw.send(Header::command(1, Command::DeviceReset, 0, true), &[], &[]);
    }
    assert_eq!(served.thread.join().unwrap(), Broken::Protocol("too many commands at a time"));
}

#[test]
fn versions_that_are_not_served() {
    let long = [&[0, 0, 1, 0][..], &[b' '; 20_000], b"{}\0"].concat();
    for (what, command, payload) in [
        ("another major version", Command::Version, &[1, 0, 0, 0][..]),
        ("no version", Command::Version, &[0, 0]),
        ("no JSON", Command::Version, b"\0\0\x01\0nonsense\0"),
        ("JSON without its end", Command::Version, b"\0\0\x01\0{}"),
        ("much JSON", Command::Version, &long),
        ("another command", Command::DeviceReset, &[]),
    ] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let served = serve(theirs, Capabilities::OURS, LONG);
        let mut raw = Raw(ours);
        assert_eq!(raw.ask(command, payload), Err(Errno::INVAL), "{what}");
        assert!(matches!(served.thread.join().unwrap(), Broken::Protocol(_)), "{what}");
    }
}

#[test]
fn the_device_serves_one_client_after_the_other() {
    let model = Arc::new(Model::new());
    let mut server = Server::new(Arc::clone(&model) as Arc<dyn Device>, server::Options::default());
    for round in 0..3u8 {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let client = thread::spawn(move || {
            let device = RemoteDevice::connect(ours.into(), client::Options::default()).unwrap();
            let mut byte = [9];
            device.read(REGISTERS, 0, &mut byte).unwrap();
            assert_eq!(byte, [round], "the device's state stays");
            device.write(REGISTERS, 0, &[round + 1]).unwrap();
            device.read(REGISTERS, 0, &mut byte).unwrap();
        });
        assert_eq!(server.serve(theirs.into()), Broken::Closed);
        client.join().unwrap();
        assert_eq!(model.dma().read(Iova(0), &mut [0]), Err(DmaFault::Unmapped(Iova(0))));
    }
}

/// A server that answers VERSION, and then as `answer` says: nothing, or the bytes of the whole reply.
fn with_server(answer: impl Fn(Header) -> Option<Vec<u8>> + Send + 'static) -> Errno {
    with_server_for(LONG, answer)
}

fn with_server_for(patience: Patience, answer: impl Fn(Header) -> Option<Vec<u8>> + Send + 'static) -> Errno {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || {
        let mut raw = Raw(theirs);
        let mut header = [0; Header::SIZE];
        while raw.0.read_exact(&mut header).is_ok() {
            let header = Header::read_from_bytes(&header).unwrap();
            raw.0.read_exact(&mut vec![0; header.size as usize - Header::SIZE]).unwrap();
            if let Some(bytes) = answer(header) {
                let _ = raw.0.write_all(&bytes);
            }
        }
    });
    let options = client::Options { patience, ..Default::default() };
    let errno = RemoteDevice::connect(ours.into(), options).unwrap_err();
    server.join().unwrap();
    errno
}

#[test]
fn servers_that_lie_or_hang() {
    let answer =
        |header: Header, payload: &[u8]| Some([header.reply(payload.len()).as_bytes(), payload].concat());
    let greeting = move |header: Header| {
        let payload = version::encode(wire::Version { major: 0, minor: 1 }, Capabilities::DEFAULT);
        answer(header, &payload)
    };
    let greets = move |header: Header| header.command == Command::Version as u16;
    assert_eq!(with_server_for(SHORT, |_| None), Errno::TIMEDOUT);
    let hangs = move |header| greets(header).then(|| greeting(header)).flatten();
    assert_eq!(with_server_for(SHORT, hangs), Errno::TIMEDOUT);
    assert_eq!(
        with_server(move |header| answer(header, &[1, 0, 0, 0])),
        Errno::PROTO,
        "another major version"
    );
    assert_eq!(
        with_server(move |header| answer(header, &[0, 0, 9, 0])),
        Errno::PROTO,
        "a newer minor version"
    );
    assert_eq!(with_server(move |header| answer(header, &[0, 0])), Errno::PROTO, "a short reply");
    assert_eq!(with_server(|header| Some(header.failed(Errno::PERM).as_bytes().to_vec())), Errno::PERM);
    let twin = br#"....{"capabilities":{"twin_socket":{"supported":true,"fd_index":0}}}."#;
    let mut twin = twin.to_vec();
    twin[..4].fill(0);
    *twin.last_mut().unwrap() = 0;
    assert_eq!(with_server(move |header| answer(header, &twin)), Errno::PROTO, "a socket that did not come");
    let other_id = move |header: Header| answer(Header { id: header.id.wrapping_add(1), ..header }, &[0; 64]);
    assert_eq!(with_server(other_id), Errno::PROTO, "a reply to something else");
    let other_command = move |header: Header| answer(Header { command: 13, ..header }, &[0; 64]);
    assert_eq!(with_server(other_command), Errno::PROTO, "a reply of another command");
    // Numbers of regions that nobody has.
    let many = wire::DeviceInfo { argsz: 16, flags: 2, num_regions: u32::MAX, num_irqs: 5 };
    let lies =
        move |header: Header| if greets(header) { greeting(header) } else { answer(header, many.as_bytes()) };
    assert_eq!(with_server(lies), Errno::PROTO);
    // Chains of capabilities that lead astray.
    use uapi::vfio::{vfio_info_cap_header, vfio_region_info};
    for (what, cap_offset, next) in [("itself", 32, 32), ("outside", 32, 1000), ("far outside", u32::MAX, 0)]
    {
        let info = vfio_region_info { argsz: 64, flags: 8, index: 0, cap_offset, size: 0, offset: 0 };
        let cap = vfio_info_cap_header { id: 77, version: 1, next };
        let region = [info.as_bytes(), cap.as_bytes(), &[0; 24]].concat();
        let one = wire::DeviceInfo { num_regions: 1, ..many };
        let lies = move |header: Header| match header.command {
            1 => greeting(header),
            4 => answer(header, one.as_bytes()),
            _ => answer(header, &region),
        };
        assert_eq!(with_server(lies), Errno::PROTO, "a chain that leads to {what}");
    }
}

#[test]
fn a_connection_that_ended_fails_at_once() {
    let (served, device) = plain();
    served.model.dma();
    // The server is told to end by whoever holds a duplicate of its socket; here the device's end does it.
    drop(device);
    assert_eq!(served.thread.join().unwrap(), Broken::Closed);

    let (ours, theirs) = UnixStream::pair().unwrap();
    let theirs_too = theirs.try_clone().unwrap();
    let served = serve(theirs, Capabilities::OURS, LONG);
    let device =
        RemoteDevice::connect(ours.into(), client::Options { patience: LONG, ..Default::default() }).unwrap();
    theirs_too.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(served.thread.join().unwrap(), Broken::Closed);
    assert_eq!(device.read(REGISTERS, 0, &mut [0]), Err(Errno::NODEV));
    assert_eq!(device.reset(), Err(Errno::NODEV));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_bytes_from_a_client(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        testing::serve_anything(&bytes);
    }

    /// Messages that are whole, with payloads of any bytes.
    #[test]
    fn any_messages_from_a_client(
        twin in any::<bool>(),
        messages in prop::collection::vec((0usize..20, any::<bool>(), prop::collection::vec(any::<u8>(), 0..80)), 0..40),
    ) {
        let mut bytes = vec![u8::from(twin) * 2];
        for (command, small, mut payload) in messages {
            if small {
                // Small numbers mean something more often.
                payload.iter_mut().enumerate().filter(|(at, _)| at % 4 != 0).for_each(|(_, byte)| *byte = 0);
            }
            let command = COMMANDS.get(command).map_or(command as u16, |row| row.command as u16);
            let size = (payload.len() + Header::SIZE) as u32;
            bytes.extend_from_slice(Header { id: 0, command, size, flags: 0, error: 0 }.as_bytes());
            bytes.extend_from_slice(&payload);
        }
        testing::serve_anything(&bytes);
    }

    #[test]
    fn any_answers_of_a_server(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        testing::connect_to_anything(&bytes);
    }

    #[test]
    fn headers_survive(id: u16, number in 0usize..17, payload in 0usize..(1 << 20), no_reply: bool) {
        let command = COMMANDS[number].command;
        prop_assert_eq!(Command::from_number(command as u16), Ok(command));
        let header = Header::command(id, command, payload, no_reply);
        let back = Header::read_from_bytes(header.as_bytes()).unwrap();
        prop_assert_eq!(back, header);
        prop_assert_eq!(back.is_reply(), Ok(false));
        prop_assert_eq!(back.no_reply(), no_reply);
        prop_assert_eq!(back.size as usize, payload + 16);
        let failed = back.failed(Errno::NOENT);
        prop_assert_eq!((failed.is_reply(), failed.failure(), failed.size), (Ok(true), Some(Errno::NOENT), 16));
    }
}
