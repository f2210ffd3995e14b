//! What is measured: back ends between a guest's namespace and the host's, and the two limits that none can beat.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::Guarded;
use crate::world::{GATEWAY_V4, GATEWAY_V6, HOST_V4, HOST_V6, Namespace, World};
use crate::{Failure, Options};

/// The guest's service, which the host reaches by forwarding.
pub(crate) const PORT_IN: u16 = 5201;
/// The host's service, which the guest reaches.
pub(crate) const PORT_OUT: u16 = 5301;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Subject {
    Ring3,
    PastaNewest,
    PastaStable,
    Slirp,
    /// A pair of virtual Ethernet interfaces: the kernel's own way between two namespaces.
    Veth,
    /// Both ends in the host's namespace.
    Loopback,
}

impl Subject {
    pub(crate) const ALL: [Self; 6] =
        [Self::Ring3, Self::PastaNewest, Self::PastaStable, Self::Slirp, Self::Veth, Self::Loopback];

    /// The name in tables and for `--only`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ring3 => "ring3",
            Self::PastaNewest => "pasta",
            Self::PastaStable => "pasta-2025",
            Self::Slirp => "slirp4netns",
            Self::Veth => "veth",
            Self::Loopback => "loopback",
        }
    }

    /// Whether it is a program to compare with, not a limit.
    pub(crate) fn is_peer(self) -> bool {
        matches!(self, Self::PastaNewest | Self::PastaStable | Self::Slirp)
    }
}

/// The way a load goes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Way {
    /// The host connects to the guest.
    Into,
    /// The guest connects to the host.
    Out,
}

/// A subject at work.
pub(crate) struct Link<'a> {
    subject: Subject,
    world: &'a World,
    guest: Option<Namespace>,
    engine: Option<Guarded>,
}

impl<'a> Link<'a> {
    /// Starts it, on this processor alone if one is given, and waits until the guest has its network.
    pub(crate) fn start(
        options: &Options,
        world: &'a World,
        subject: Subject,
        mtu: u32,
        pin: Option<u32>,
    ) -> Result<Self, Failure> {
        let mut link = Self { subject, world, guest: None, engine: None };
        if subject == Subject::Loopback {
            return Ok(link);
        }
        let guest = link.guest.insert(world.guest()?);
        if subject == Subject::Veth {
            connect_directly(world, guest, mtu)?;
            return Ok(link);
        }

        let socket = std::env::temp_dir().join(format!("bench-net-{}.socket", std::process::id()));
        let program: Vec<String> = match subject {
            Subject::Ring3 => {
                let ring3 = options.ring3.as_ref().ok_or("there is no ring3 to measure")?;
                vec![ring3.display().to_string(), "pasta".into()]
            }
            Subject::PastaNewest => foreign(&options.newest, "pasta", "passt.avx2")?,
            Subject::PastaStable => foreign(&options.stable, "pasta", "passt.avx2")?,
            _ => foreign(&options.newest, "slirp4netns", "slirp4netns")?,
        };
        let arguments = match subject {
            Subject::Slirp => format!(
                "--configure --enable-ipv6 --mtu={mtu} --netns-type=path --api-socket={} {} tap0",
                socket.display(),
                guest.path()
            ),
            // The namespaces are in the user namespace where we are root already.
            _ => format!(
                "--foreground --quiet --config-net --netns-only --mtu {mtu} --tcp-ports {PORT_IN} \
                 --udp-ports {PORT_IN} --tcp-ns none --udp-ns none --netns {}",
                guest.path()
            ),
        };
        let pinned = pin.map(|cpu| ["taskset".to_owned(), "--cpu-list".to_owned(), cpu.to_string()]);
        let mut words = pinned.into_iter().flatten().chain(program);
        let mut command = world.host.command(words.next().unwrap_or_default());
        command.args(words).args(arguments.split_whitespace());
        let log = std::env::temp_dir().join(format!("bench-net-{}.log", std::process::id()));
        let mut engine = Guarded::logged(&mut command, &log)?;
        let ready = guest.wait_for_routes(true).map_err(|error| engine.check().err().unwrap_or(error));
        let said = fs::read_to_string(&log).unwrap_or_default();
        // It stays open where it is written to.
        let _ = fs::remove_file(&log);
        ready.map_err(|error| format!("{error}: {}", said.trim()))?;
        if subject == Subject::Slirp {
            forward(&socket, "tcp")?;
            forward(&socket, "udp")?;
            // It has been opened, and the next one has the same name.
            let _ = fs::remove_file(&socket);
        } else {
            world.host.wait_for_listener(PORT_IN)?;
        }
        link.engine = Some(engine);
        Ok(link)
    }

    /// The namespaces of the client and of the server.
    pub(crate) fn ends(&self, way: Way) -> (&Namespace, &Namespace) {
        let (host, guest) = (&self.world.host, self.guest.as_ref().unwrap_or(&self.world.host));
        match way {
            Way::Into => (host, guest),
            Way::Out => (guest, host),
        }
    }

    /// Where a client finds the server of the other end, if it can.
    pub(crate) fn target(&self, way: Way, ipv6: bool) -> Option<(IpAddr, u16)> {
        let addresses: (IpAddr, IpAddr) = match (self.subject, way) {
            (Subject::Loopback, _) => (Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()),
            (Subject::Veth, Way::Into) => (VETH_V4[1].into(), VETH_V6[1].into()),
            (Subject::Veth, Way::Out) => (VETH_V4[0].into(), VETH_V6[0].into()),
            // It forwards no IPv6.
            (Subject::Slirp, Way::Into) if ipv6 => return None,
            (_, Way::Into) => (HOST_V4.into(), HOST_V6.into()),
            (Subject::Slirp, Way::Out) => (SLIRP_V4.into(), SLIRP_V6.into()),
            (_, Way::Out) => (GATEWAY_V4.into(), GATEWAY_V6.into()),
        };
        let port = match way {
            Way::Into => PORT_IN,
            Way::Out => PORT_OUT,
        };
        Some((if ipv6 { addresses.1 } else { addresses.0 }, port))
    }

    /// Whether connections to the host's loopback reach the guest without Ethernet frames, or are the limit of that.
    pub(crate) fn splices(&self) -> bool {
        !matches!(self.subject, Subject::Slirp | Subject::Veth)
    }

    /// The process that does the work, if one does.
    pub(crate) fn engine(&self) -> Option<u32> {
        self.engine.as_ref().map(Guarded::id)
    }
}

/// The host's and the guest's address on a direct link.
const VETH_V4: [Ipv4Addr; 2] = [Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::new(198, 51, 100, 2)];
const VETH_V6: [Ipv6Addr; 2] =
    [Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 1), Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 2)];
/// What slirp4netns calls the host.
const SLIRP_V4: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
const SLIRP_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);

fn connect_directly(world: &World, guest: &Namespace, mtu: u32) -> Result<(), Failure> {
    // The last one went with its guest's namespace, which the kernel takes down in its own time.
    let _ = world.host.ip("link delete guest");
    world.host.connect(guest, "guest")?;
    for (end, (v4, v6)) in [&world.host, guest].into_iter().zip(VETH_V4.into_iter().zip(VETH_V6)) {
        end.ip(&format!("link set guest mtu {mtu}"))?;
        end.address("guest", v4, v6)?;
    }
    Ok(())
}

/// The words that start a program of another root file system under this name, with the libraries that it was built
/// for.
pub(crate) fn foreign(root: &Path, name: &str, file: &str) -> Result<Vec<String>, Failure> {
    let program = root.join("usr/bin").join(file);
    let loader = root.join("usr/lib64/ld-linux-x86-64.so.2");
    if !program.exists() {
        return Err(format!("there is no {}", program.display()).into());
    }
    let words: [PathBuf; 6] = [
        loader,
        "--argv0".into(),
        name.into(),
        "--library-path".into(),
        root.join("usr/lib/x86_64-linux-gnu"),
        program,
    ];
    Ok(words.iter().map(|word| word.display().to_string()).collect())
}

/// A command that runs such a program in a namespace.
pub(crate) fn foreign_command(namespace: &Namespace, root: &Path, name: &str) -> Result<Command, Failure> {
    let mut words = foreign(root, name, name)?.into_iter();
    let mut command = namespace.command(words.next().unwrap_or_default());
    command.args(words);
    Ok(command)
}

/// Asks slirp4netns to forward a port.
fn forward(socket: &Path, protocol: &str) -> Result<(), Failure> {
    let mut stream = UnixStream::connect(socket)?;
    write!(
        stream,
        r#"{{"execute":"add_hostfwd","arguments":{{"proto":"{protocol}","host_addr":"0.0.0.0","host_port":{PORT_IN},"guest_port":{PORT_IN}}}}}"#
    )?;
    stream.shutdown(std::net::Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    if answer.contains("error") {
        return Err(format!("slirp4netns does not forward: {answer}").into());
    }
    Ok(())
}
