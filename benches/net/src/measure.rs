//! The rows of the table, and how each is measured.

use std::fmt;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::IpAddr;
use std::process::Stdio;

use crate::process::{Guarded, output, processor_seconds, resident_bytes};
use crate::subject::{Link, Subject, Way, foreign_command};
use crate::world::{World, socket_address};
use crate::{Failure, Options, iperf};

/// The MTUs of the guest: the largest that an IPv4 packet allows with whole words, and Ethernet's.
const MTUS: [u32; 2] = [65520, 1500];
/// Connections that are open while memory is read.
const HELD: usize = 1000;
/// Offered rates of UDP, Mbit/s.
const UDP_RATES: [u32; 9] = [200, 400, 600, 800, 1000, 1200, 1600, 2000, 2500];
/// How often a rate may fail.
const TRIES: u32 = 2;
/// Where all of a pinned load runs: both ends and the back end. On several processors, most of a round trip would be the
/// time to wake an idle one, which in a virtual machine is hundreds of microseconds.
const CPU: u32 = 0;

/// Rows that are measured together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Group {
    Tcp,
    Streams,
    Ipv6,
    Latency,
    Udp,
    Spliced,
    Memory,
}

impl Group {
    pub(crate) const ALL: [Self; 7] =
        [Self::Tcp, Self::Streams, Self::Ipv6, Self::Latency, Self::Udp, Self::Spliced, Self::Memory];

    /// The name for `--rows`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Streams => "streams",
            Self::Ipv6 => "ipv6",
            Self::Latency => "latency",
            Self::Udp => "udp",
            Self::Spliced => "spliced",
            Self::Memory => "memory",
        }
    }
}

/// A figure.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Row {
    Tcp { ipv6: bool, mtu: u32, way: Way, streams: u32 },
    ProcessorPerGigabyte { mtu: u32, way: Way },
    RoundTrip { ipv6: bool, way: Way },
    Connections { way: Way },
    Udp { way: Way },
    Spliced,
    Memory,
}

impl Row {
    pub(crate) fn more_is_better(self) -> bool {
        !matches!(self, Self::ProcessorPerGigabyte { .. } | Self::RoundTrip { .. } | Self::Memory)
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let way = |way: &Way| match way {
            Way::Into => "into",
            Way::Out => "out",
        };
        let family = |ipv6: &bool| if *ipv6 { "IPv6" } else { "IPv4" };
        match self {
            Self::Tcp { ipv6, mtu, way: to, streams } => {
                let plural = if *streams == 1 { "" } else { "s" };
                write!(f, "TCP {}, MTU {mtu}, {streams} stream{plural}, {}, Gbit/s", way(to), family(ipv6))
            }
            Self::ProcessorPerGigabyte { mtu, way: to } => {
                write!(f, "processor time {}, MTU {mtu}, s/GB", way(to))
            }
            Self::RoundTrip { ipv6, way: to } => write!(f, "round trip {}, {}, µs", way(to), family(ipv6)),
            Self::Connections { way: to } => write!(f, "connect, request, close {}, thousand/s", way(to)),
            Self::Udp { way: to } => write!(f, "UDP {} below 1% loss, Gbit/s", way(to)),
            Self::Spliced => write!(f, "TCP by the host's loopback, Gbit/s"),
            Self::Memory => write!(f, "resident, {HELD} connections open, MB"),
        }
    }
}

/// Measures one subject once; every figure is reported as soon as it is known.
pub(crate) fn all(
    options: &Options,
    world: &World,
    subject: Subject,
    mut report: impl FnMut(Row, f64),
) -> Result<(), Failure> {
    let asked = |group| options.groups.contains(&group);
    let mut tried = Tried { first: None };
    if [Group::Tcp, Group::Streams, Group::Ipv6].into_iter().any(asked) {
        for mtu in MTUS {
            // The loopback interface has an MTU of its own, so once is enough.
            if subject == Subject::Loopback && mtu != MTUS[0] {
                continue;
            }
            let link = Link::start(options, world, subject, mtu, None)?;
            for way in [Way::Into, Way::Out] {
                for (group, streams, ipv6) in
                    [(Group::Tcp, 1, false), (Group::Streams, 4, false), (Group::Ipv6, 1, true)]
                {
                    if asked(group) {
                        tried.keep(tcp(options, &link, mtu, way, streams, ipv6, &mut report));
                    }
                }
            }
        }
    }
    if asked(Group::Spliced) || asked(Group::Udp) || asked(Group::Memory) {
        let link = Link::start(options, world, subject, MTUS[0], None)?;
        if asked(Group::Spliced) && link.splices() {
            tried.keep(spliced(options, &link, &mut report));
        }
        for way in [Way::Into, Way::Out] {
            if asked(Group::Udp) {
                tried.keep(udp(options, &link, way, &mut report));
            }
        }
        // Last: what the loads before left behind counts.
        if asked(Group::Memory) {
            tried.keep(memory(&link, &mut report));
        }
    }
    if asked(Group::Latency) {
        let link = Link::start(options, world, subject, MTUS[0], Some(CPU))?;
        for way in [Way::Into, Way::Out] {
            for (kind, ipv6) in [("ping", false), ("ping", true), ("connect", false)] {
                tried.keep(latency(options, &link, kind, way, ipv6, &mut report));
            }
        }
    }
    tried.first.map_or(Ok(()), Err)
}

/// A row that fails does not keep the next one from being measured.
struct Tried {
    first: Option<Failure>,
}

impl Tried {
    fn keep(&mut self, result: Result<(), Failure>) {
        if let Err(error) = result {
            self.first.get_or_insert(error);
        }
    }
}

fn transfer(
    options: &Options,
    link: &Link<'_>,
    way: Way,
    (address, port): (IpAddr, u16),
    seconds: u32,
    words: &[&str],
) -> Result<iperf::Report, Failure> {
    let (client, server) = link.ends(way);
    let _server = iperf::server(&mut foreign_command(server, &options.newest, "iperf3")?, port)?;
    server.wait_for_listener(port)?;
    iperf::client(&mut foreign_command(client, &options.newest, "iperf3")?, (address, port), seconds, words)
        .map_err(|error| {
            format!("{way:?} {} {}: {error}", socket_address(address, port), words.join(" ")).into()
        })
}

fn tcp(
    options: &Options,
    link: &Link<'_>,
    mtu: u32,
    way: Way,
    streams: u32,
    ipv6: bool,
    report: &mut impl FnMut(Row, f64),
) -> Result<(), Failure> {
    let Some(target) = link.target(way, ipv6) else { return Ok(()) };
    let before = link.engine().map(processor_seconds);
    let moved = transfer(options, link, way, target, options.seconds, &["--parallel", &streams.to_string()])?;
    report(Row::Tcp { ipv6, mtu, way, streams }, moved.rate / 1e9);
    if let (Some(engine), Some(before), 1, false) = (link.engine(), before, streams, ipv6) {
        let gigabytes = moved.bytes / 1e9;
        report(Row::ProcessorPerGigabyte { mtu, way }, (processor_seconds(engine) - before) / gigabytes);
    }
    Ok(())
}

fn spliced(options: &Options, link: &Link<'_>, report: &mut impl FnMut(Row, f64)) -> Result<(), Failure> {
    let Some((_, port)) = link.target(Way::Into, false) else { return Ok(()) };
    let loopback = std::net::Ipv4Addr::LOCALHOST.into();
    let moved = transfer(options, link, Way::Into, (loopback, port), options.seconds, &[])?;
    report(Row::Spliced, moved.rate / 1e9);
    Ok(())
}

/// Raises the offered rate until more than one percent is lost, twice, or the sender cannot. (One second in which the machine
/// did something else would say nothing about the way.)
fn udp(
    options: &Options,
    link: &Link<'_>,
    way: Way,
    report: &mut impl FnMut(Row, f64),
) -> Result<(), Failure> {
    let Some(target) = link.target(way, false) else { return Ok(()) };
    let mut best = 0.0_f64;
    for rate in UDP_RATES {
        let bitrate = format!("{rate}M");
        let words = ["--udp", "--length", "1400", "--bitrate", &bitrate];
        let mut kept = None;
        for _ in 0..TRIES {
            let moved = transfer(options, link, way, target, 1, &words)?;
            if moved.lost.ok_or("iperf3 reports no loss")? < 1.0 {
                kept = Some(moved);
                break;
            }
        }
        let Some(moved) = kept else { break };
        best = best.max(moved.rate);
        if moved.rate < f64::from(rate) * 1e6 * 0.9 {
            break;
        }
    }
    report(Row::Udp { way }, best / 1e9);
    Ok(())
}

fn latency(
    options: &Options,
    link: &Link<'_>,
    kind: &str,
    way: Way,
    ipv6: bool,
    report: &mut impl FnMut(Row, f64),
) -> Result<(), Failure> {
    let Some((address, port)) = link.target(way, ipv6) else { return Ok(()) };
    let (client, server) = link.ends(way);
    let this = std::env::current_exe()?;
    let pinned = |namespace: &crate::world::Namespace| {
        let mut command = namespace.command("taskset");
        command.args(["--cpu-list", &CPU.to_string()]).arg(&this);
        command
    };
    let _server = Guarded::quiet(pinned(server).args(["serve", &port.to_string()]))?;
    server.wait_for_listener(port)?;
    let to = socket_address(address, port);
    let text = output(pinned(client).args([kind, &to, &options.seconds.to_string()]))
        .map_err(|error| format!("{kind} {way:?} {to}: {error}"))?;
    let value: f64 = text.trim().parse()?;
    match kind {
        "ping" => report(Row::RoundTrip { ipv6, way }, value),
        _ => report(Row::Connections { way }, value / 1e3),
    }
    Ok(())
}

/// Half of the connections come from either end.
fn memory(link: &Link<'_>, report: &mut impl FnMut(Row, f64)) -> Result<(), Failure> {
    let Some(engine) = link.engine() else { return Ok(()) };
    let this = std::env::current_exe()?;
    let mut held = Vec::new();
    for way in [Way::Into, Way::Out] {
        let Some((address, port)) = link.target(way, false) else { return Ok(()) };
        let (client, server) = link.ends(way);
        let server_process = Guarded::quiet(server.command(&this).args(["serve", &port.to_string()]))?;
        server.wait_for_listener(port)?;
        let mut command = client.command(&this);
        command.args(["hold", &socket_address(address, port), &(HELD / 2).to_string()]);
        let mut client = Guarded(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?);
        let mut line = String::new();
        let stdout = client.0.stdout.take().ok_or("no output")?;
        BufReader::new(stdout).read_line(&mut line)?;
        if line.trim() != (HELD / 2).to_string() {
            return Err(format!("{way:?}: the connections were not made").into());
        }
        held.push((server_process, client));
    }
    report(Row::Memory, resident_bytes(engine) / 1e6);
    for (_, client) in &mut held {
        // Its end is what it waits for; if it has gone, that is as good.
        let _ = client.0.stdin.take().map(|mut input| input.flush());
    }
    Ok(())
}
