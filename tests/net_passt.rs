//! `ring3 passt` with real QEMU guests: an address by DHCP, data both ways, forwarded ports, and how it ends.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::thread;

use rustix::process::Signal;
use support::process::{PATIENCE, Running, ring3};
use support::qemu::guests;
use support::{Noise, temp_dir};

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

/// `ring3 passt` in the foreground with these options, when its socket is there.
fn passt(socket: &Path, options: &[&str]) -> Running {
    let mut command = ring3();
    command.args(["passt", "-f", "-s"]).arg(socket).args(options);
    let running = Running::start_quiet(command);
    running.wait_until(|| socket.exists());
    assert!(socket.exists(), "passt ended early: {:?}", running.finish(PATIENCE));
    running
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

/// A guest's script: takes what the host's `port` sends and gives it back, then echoes what comes to its own port 7.
fn script(port: u16) -> String {
    format!(
        "udhcpc -i eth0 -n -q -s /lease
gateway=$(ip route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p')
nc $gateway {port} </dev/null >/tmp/data
nc $gateway {port} </tmp/data >/dev/null
nc -l -p 7 -e cat &
while ! netstat -ltn | grep -q :7; do :; done
echo LISTENING
wait
echo DONE"
    )
}

/// Boots a guest with this network device, and moves data in all the ways there are.
fn talk(network: &[&str], forward: u16) {
    let guests = guests().unwrap();
    let dir = temp_dir();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut qemu = guests.command(dir.path(), &script(port));
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
    let stream = TcpStream::connect((Ipv4Addr::LOCALHOST, forward)).unwrap();
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
    let passt = passt(&socket, &["-t", &format!("{forward}:7")]);
    let netdev = format!("stream,id=n,server=off,addr.type=unix,addr.path={}", socket.display());
    let network = ["-netdev", &netdev, "-device", "virtio-net-pci,netdev=n,romfile="];
    talk(&network, forward);
    // The same process serves the next one.
    talk(&network, forward);
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
    let memory = ["-object", "memory-backend-memfd,id=m,size=256M,share=on", "-numa", "node,memdev=m"];
    let link = ["-chardev", &chardev, "-netdev"];
    let one = ["vhost-user,id=n,chardev=c", "-device", "virtio-net-pci,netdev=n,romfile="];
    let two = [
        "vhost-user,id=n,chardev=c,queues=2",
        "-smp",
        "2",
        "-device",
        "virtio-net-pci,netdev=n,mq=on,romfile=",
    ];
    talk(&[&memory[..], &link, &one].concat(), forward);
    // The same process serves the next one, by two pairs of queues.
    talk(&[&memory[..], &link, &two].concat(), forward);
    passt.signal(Signal::TERM);
    passt.finish(PATIENCE).expect(0);
    assert!(!socket.exists(), "the socket is left behind");
}
