//! `ring3 passt` with real QEMU guests: addresses by DHCP and router advertisements, data both ways, forwarded ports, and
//! how it ends; and with a guest of a few bytes ([`asks`]), how it starts.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::thread;

use rustix::process::Signal;
use support::process::{PATIENCE, RING3, Running, as_other_user, finish, privileged, ring3};
use support::qemu::guests;
use support::{Noise, skip, temp_dir};

/// Bytes that are sent each way, a number that no buffer's length divides.
const BYTES: usize = (6 << 20) + 5;

fn noise(seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; BYTES.next_multiple_of(8)];
    Noise(seed).fill(&mut bytes);
    bytes.truncate(BYTES);
    bytes
}

/// A port that was free just now.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}

/// `ring3 passt` in the foreground with these options, when somebody listens on its socket.
fn passt(socket: &Path, options: &[&str]) -> Running {
    let mut command = ring3();
    command.args(["passt", "-f", "-s"]).arg(socket).args(options);
    let running = Running::start_quiet(command);
    running.wait_until(|| is_listened_on(socket));
    assert!(is_listened_on(socket), "passt ended early: {:?}", running.finish(PATIENCE));
    running
}

/// Whether connections to a socket of this name are taken: it has the name a little before that. To connect would be
/// to be passt's client.
fn is_listened_on(socket: &Path) -> bool {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    // Flags, with __SO_ACCEPTCON (1 << 16), stand fourth, and the name at the end.
    sockets.lines().any(|line| {
        let flags = line.split_whitespace().nth(3);
        flags == Some("00010000") && line.ends_with(&format!(" {}", socket.display()))
    })
}

/// The loopback of IPv6, or of IPv4 where there is no other.
fn loopback_v6() -> IpAddr {
    if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok() {
        return Ipv6Addr::LOCALHOST.into();
    }
    skip("IPv6: the host has none");
    Ipv4Addr::LOCALHOST.into()
}

/// Sends `data`, ends that direction, and returns what comes until the other one ends.
fn exchange(mut stream: TcpStream, data: Vec<u8>) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let writer = thread::spawn(move || {
        writer.write_all(&data).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    stream.read_to_end(&mut back).unwrap();
    writer.join().unwrap();
    back
}

/// What the guests are told.
const NETWORK: [&str; 8] =
    ["-a", "192.0.2.77/24", "-g", "192.0.2.1", "-a", "2001:db8::77", "-g", "2001:db8::1"];

/// A guest gets its IPv4 address and finds its gateway.
const BY_DHCP: &str = "udhcpc -i eth0 -n -q -s /lease
gateway=$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')";

/// A guest's kernel has got its IPv6 address, and knows that nobody else has it.
const BY_ADVERTISEMENT: &str =
    "until ip -6 address show dev eth0 | grep 'scope global' | grep -vq tentative; do :; done
ip -6 route | grep -q '^default via fe80' && echo LEASE
gateway=2001:db8::1";

/// A guest's script: takes what the host's `port` sends and gives it back, then echoes what comes to its own port 7.
fn script(configure: &str, port: u16) -> String {
    format!(
        "{configure}
nc $gateway {port} </dev/null >/tmp/data
nc $gateway {port} </tmp/data >/dev/null
nc -l -p 7 -e cat &
while ! netstat -ltn | grep -q :7; do :; done
echo LISTENING
wait
echo DONE"
    )
}

/// Boots a guest with this network device, and moves data in all the ways there are, over one family.
fn talk(network: &[&str], loopback: IpAddr, forward: u16) {
    let guests = guests().unwrap();
    let dir = temp_dir();
    let listener = TcpListener::bind((loopback, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let configure = if loopback.is_ipv4() { BY_DHCP } else { BY_ADVERTISEMENT };
    let mut qemu = guests.command(dir.path(), &script(configure, port));
    qemu.args(network);
    let (down, echoed) = (noise(1), noise(2));
    let server = {
        let down = down.clone();
        thread::spawn(move || {
            let sent = exchange(listener.accept().unwrap().0, down);
            assert_eq!(sent, b"", "the guest's first connection only takes");
            let mut given_back = Vec::new();
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.read_to_end(&mut given_back).unwrap();
            given_back
        })
    };
    let (running, mut output) = Running::boot_with_output(qemu);
    let said = output.wait_for("LISTENING");
    assert!(said.contains("LEASE"), "{said}");
    assert!(server.join().unwrap() == down, "what the guest gave back is not what it was sent");
    let stream = TcpStream::connect((loopback, forward)).unwrap();
    assert!(exchange(stream, echoed.clone()) == echoed, "the guest's echo differs");
    output.wait_for("DONE");
    running.finish(PATIENCE).expect(0);
}

#[test]
fn guests_of_qemu_one_after_the_other() {
    if guests().is_none() {
        return;
    }
    let dir = temp_dir();
    let socket = dir.path().join("socket");
    let forward = free_port();
    let passt = passt(&socket, &[&NETWORK[..], &["-t", &format!("{forward}:7")]].concat());
    let netdev = format!("stream,id=n,server=off,addr.type=unix,addr.path={}", socket.display());
    let network = ["-netdev", &netdev, "-device", "virtio-net-pci,netdev=n,romfile="];
    talk(&network, Ipv4Addr::LOCALHOST.into(), forward);
    // The same process serves the next one.
    talk(&network, loopback_v6(), forward);
    passt.signal(Signal::TERM);
    let end = passt.finish(PATIENCE);
    end.expect(0);
    assert!(!socket.exists(), "the socket is left behind");
}

#[test]
fn guests_by_vhost_user() {
    if guests().is_none() {
        return;
    }
    let dir = temp_dir();
    let socket = dir.path().join("socket");
    let forward = free_port();
    let passt = passt(&socket, &["--vhost-user", "--threads", "2", "-t", &format!("{forward}:7")]);
    let chardev = format!("socket,id=c,path={}", socket.display());
    // QEMU 7.2 crashes when it is to unmask a vector of vhost's without KVM: no vectors.
    let memory = ["-object", "memory-backend-memfd,id=m,size=256M,share=on", "-numa", "node,memdev=m"];
    let link = ["-chardev", &chardev, "-netdev"];
    let one = ["vhost-user,id=n,chardev=c", "-device", "virtio-net-pci,netdev=n,vectors=0,romfile="];
    let two = [
        "vhost-user,id=n,chardev=c,queues=2",
        "-smp",
        "2",
        "-device",
        "virtio-net-pci,netdev=n,mq=on,vectors=0,romfile=",
    ];
    talk(&[&memory[..], &link, &one].concat(), Ipv4Addr::LOCALHOST.into(), forward);
    // The same process serves the next one, by two pairs of queues.
    talk(&[&memory[..], &link, &two].concat(), Ipv4Addr::LOCALHOST.into(), forward);
    passt.signal(Signal::TERM);
    passt.finish(PATIENCE).expect(0);
    assert!(!socket.exists(), "the socket is left behind");
}

/// A guest that knows ARP: asks who the gateway is, until it is told.
fn asks(mut stream: &UnixStream) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    const OWN: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
    let mut request = [[0xff; 6], OWN].concat();
    request.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    request.extend([&OWN[..], &[192, 0, 2, 77], &[0; 6], &[192, 0, 2, 1]].concat());
    stream.write_all(&(request.len() as u32).to_be_bytes()).unwrap();
    stream.write_all(&request).unwrap();
    loop {
        let mut length = [0; 4];
        stream.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut frame).unwrap();
        if frame[12..14] == [0x08, 0x06] {
            assert_eq!(
                (&frame[..6], &frame[20..22], &frame[28..32]),
                (&OWN[..], &[0, 2][..], &[192, 0, 2, 1][..])
            );
            return;
        }
    }
}

#[test]
fn a_socket_may_come_connected() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    // Descriptor 3 of the program that the shell becomes.
    let mut command = Command::new("sh");
    command.args(["-c", "exec \"$@\" 3<&0 </dev/null", "sh", RING3, "passt", "-f", "-F", "3"]).args(NETWORK);
    as_other_user(&mut command);
    command.stdin(OwnedFd::from(theirs)).current_dir("/");
    let passt = Running::start_quiet(command);
    asks(&ours);
    drop(ours);
    passt.finish(PATIENCE).expect(0);
}

#[test]
fn it_ends_with_its_first_guest_if_told_so() {
    let dir = temp_dir();
    let socket = dir.path().join("socket");
    // The fallback is for hosts whose root cannot be replaced, and does no harm on others.
    let passt = passt(&socket, &[&NETWORK[..], &["--one-off", "--chroot-fallback"]].concat());
    let guest = UnixStream::connect(&socket).unwrap();
    asks(&guest);
    drop(guest);
    passt.finish(PATIENCE).expect(0);
    assert!(!socket.exists(), "the socket is left behind");
}

/// The first of the numbers after `field` in /proc/PID/status.
fn status(passt: &Running, field: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{}/status", passt.pid().as_raw_nonzero())).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':')).unwrap();
    line.split_whitespace().next().unwrap().to_owned()
}

#[test]
fn root_becomes_whom_it_is_told_to_be() {
    if !rustix::process::geteuid().is_root() {
        return skip("only root can become another user");
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let passt_as = |who: &str| {
        let mut command = privileged();
        command.args(["passt", "-f", "-1", "-s"]).arg(&socket).args(NETWORK).args(["--runas", who]);
        command
    };
    for (who, uid, gid) in [("1234:5678", "1234", "5678"), ("nobody", "65534", "65534")] {
        let passt = Running::start_quiet(passt_as(who));
        let guest = connected(&passt, &socket);
        asks(&guest);
        assert_eq!((status(&passt, "Uid"), status(&passt, "Gid")), (uid.to_owned(), gid.to_owned()));
        drop(guest);
        passt.finish(PATIENCE).expect(0);
        assert!(!socket.exists(), "the socket is left behind");
    }
    let refused = finish(passt_as("0"), PATIENCE);
    refused.expect(1);
    assert!(refused.stderr.contains("root's rights"), "{}", refused.stderr);
    assert!(!socket.exists(), "the socket is left behind");
}

/// A connection as soon as there can be one: the socket has its name a little before anybody listens.
fn connected(passt: &Running, socket: &Path) -> UnixStream {
    let stream = std::cell::RefCell::new(None);
    passt.wait_until(|| {
        *stream.borrow_mut() = UnixStream::connect(socket).ok();
        stream.borrow().is_some()
    });
    stream.into_inner().expect("it ended early")
}

/// Who is root in a user namespace alone has nobody's rights outside, and may stay that.
#[test]
fn root_of_a_user_namespace_may_stay_that() {
    let dir = temp_dir();
    let socket = dir.path().join("socket");
    let mut command = Command::new("unshare");
    command
        .args(["--user", "--map-root-user", RING3, "passt", "-f", "-1", "--runas", "0", "-s"])
        .arg(&socket);
    command.args(NETWORK).current_dir("/");
    as_other_user(&mut command);
    let mut possible = Command::new("unshare");
    as_other_user(possible.args(["--user", "--map-root-user", "true"]));
    if !possible.status().is_ok_and(|status| status.success()) {
        return skip("users may not make user namespaces here");
    }
    let passt = Running::start_quiet(command);
    asks(&connected(&passt, &socket));
    passt.finish(PATIENCE).expect(0);
    assert!(!socket.exists(), "the socket is left behind");
}

/// Where the root is an initramfs, as it is in a guest, pivot_root(2) cannot replace it.
#[test]
fn an_initramfs_can_be_left_if_told_so() {
    let Some(guests) = guests() else { return };
    let dir = temp_dir();
    let script =
        "passt=\"ring3 passt -4 -a 192.0.2.77/24 -g 192.0.2.1 --runas 1234:5678 -P /tmp/pid -s /tmp/socket\"
$passt 2>&1
echo REFUSED $?
$passt --chroot-fallback
echo SERVES $? and sees $(ls /proc/$(cat /tmp/pid)/root/ | wc -l) files";
    let qemu = guests.command_with(dir.path(), script, &[Path::new(RING3)]);
    let (running, mut output) = Running::boot_with_output(qemu);
    let said = output.wait_for("files");
    assert!(said.contains("--chroot-fallback does with less") && said.contains("REFUSED 1"), "{said}");
    assert!(said.contains("SERVES 0 and sees 0 files"), "{said}");
    running.finish(PATIENCE).expect(0);
}
