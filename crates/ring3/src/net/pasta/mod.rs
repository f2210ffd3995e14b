//! `ring3 pasta`: the network of a namespace.
//!
//! # Theory of operation
//! The engine's sockets are the host's, its link is a tap device in the namespace. So the process stays in the host's
//! network namespace, and what has to be done in the other one is done by threads that enter it.
//!
//! 1. **While the process has its rights and sees the host**: the host's network is read ([`usernet::HostNetwork`]),
//!    what the options name is opened, the namespaces are found ([`namespace`]).
//! 2. Root becomes an ordinary user; the process moves to the user namespace; a command is started in further namespaces,
//!    where it waits ([`command`]).
//! 3. Without a command the process goes to the background, unless it is to stay.
//! 4. A thread enters the network namespace, makes the tap device there and configures it ([`link`]).
//! 5. The process leaves the host's files behind ([`super::isolation`]), starts its threads, and gives up all that it no
//!    longer needs.
//! 6. Everything is ready: the command is let go, or whoever waits for the background process.
//! 7. The process waits for the command's end, for the namespace's ([`watch`]), or for a signal.
//!
//! Whatever goes wrong before 6 is an error, and neither has a command run nor anybody been told that there is a network.

mod command;
mod link;
mod namespace;
mod netlink;
mod opener;
mod watch;

use std::fs::File;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::process::Signal;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use taps::vhost_net::{self, Device};
use usernet::config::Forward;
use usernet::tap::Tap;
use usernet::{Handle, HostNetwork, Network};

use super::isolation::{self, Mode, background, user};
use super::options::settings::{Forwards, Target};
use super::options::{PastaSettings, Vhost};
use super::{Because, NetError};
use command::Command;
use link::Link;
use namespace::Found;
use opener::Opener;
use watch::Watch;

/// The tap device's name where the host has no interface to name it after.
const IFNAME: &str = "tap0";

/// Something that happened.
enum Event {
    /// The network ended.
    Network(std::io::Result<()>),
    /// The namespace's name has gone.
    Gone,
    /// This process got a signal.
    Signal(i32),
}

/// Serves a namespace until its end, and returns the exit status: the command's if there is one.
///
/// # Errors
/// What could not be done. A command has then not run.
pub fn run(settings: &PastaSettings) -> Result<u8, NetError> {
    let common = &settings.common;
    let host = HostNetwork::of(&common.network.template())
        .because(|| "cannot take after the host's network".into())?;
    let config = common.config().because(|| "cannot make the namespace's network".into())?;
    let ifname = settings.ifname.clone().unwrap_or_else(|| name_after(&host));
    let pid_file = common
        .pid_file
        .as_ref()
        .map(|path| File::create(path).because(|| format!("cannot write the PID file {}", path.display())));
    let mut pid_file = pid_file.transpose()?;
    let found = Found::find(&settings.target)?;
    let watch = watched(settings)?;
    let opener = user::is_root().then(Opener::start).transpose()?;
    let devices = (0..common.threads).map(|_| Device::open(mode_of(settings.vhost)));
    let devices: Vec<Device> = devices
        .collect::<Result<_, _>>()
        .map_err(io::Error::other)
        .because(|| "cannot use vhost-net".into())?;

    // Whoever makes no user namespace needs root's rights over the network namespace a while longer.
    let keep = !matches!(settings.target, Target::Command { netns_only: false, .. });
    user::leave_root(common.runas, keep)?;
    let (namespace, mut command) = found.settle()?;
    let background = (!common.foreground).then(|| background::split(pid_file.take())).transpose()?;

    let link = Link {
        name: &ifname,
        mac: settings.ns_mac,
        queues: common.threads,
        configure: settings.configure,
        host: &host,
        config: &config,
    };
    let file = opener.map(|opener| opener.open(&namespace)).transpose();
    let file = file.because(|| format!("cannot open {}", taps::tun::DEVICE))?;
    let queues = namespace.inside(|| link.make(file))?;
    // It would keep the namespace for longer than the tap device does.
    drop(namespace);

    let taps = queues.into_iter().zip(devices).map(|(queue, device)| device.serve(queue));
    let taps: Vec<Box<dyn Tap>> =
        taps.collect::<Result<_, _>>().map_err(io::Error::other).because(|| "cannot use vhost-net".into())?;
    let network = Network::new(config, taps).because(|| "cannot start the network".into())?;
    let handle = network.handle();
    isolation::enclose(common.chroot_fallback)?;
    isolation::drop_capabilities(false)?;
    let (sender, events) = channel();
    start_threads(network, watch, sender)?;
    add_best_effort(&handle, &common.forwards())?;
    isolation::seal(Mode::Pasta, command.as_ref().map(Command::pid))?;

    background::write_pid(pid_file, std::process::id() as i32)
        .because(|| "cannot write the PID file".into())?;
    background.map(background::Background::ready).transpose()?;
    command.as_mut().map(Command::go).transpose()?;
    let result = attend(command.as_ref(), &events);
    handle.stop();
    result
}

/// The name of the interface that the host itself has.
fn name_after(host: &HostNetwork) -> String {
    let interface = host.ipv4.as_ref().or(host.ipv6.as_ref());
    interface.map_or_else(|| IFNAME.to_owned(), |interface| interface.name.clone())
}

fn mode_of(vhost: Vhost) -> vhost_net::Mode {
    match vhost {
        Vhost::On => vhost_net::Mode::On,
        Vhost::Off => vhost_net::Mode::Off,
        Vhost::Auto => vhost_net::Mode::Auto,
    }
}

/// The watch over the name of the namespace, if its end is the process's.
fn watched(settings: &PastaSettings) -> Result<Option<Watch>, NetError> {
    match &settings.target {
        Target::Join { netns, .. } if !settings.no_netns_quit => {
            let watch = Watch::begin(netns);
            watch.map(Some).because(|| format!("cannot watch {}: see --no-netns-quit", netns.display()))
        }
        _ => Ok(None),
    }
}

/// Starts what runs beside the waiting thread.
fn start_threads(network: Network, watch: Option<Watch>, events: Sender<Event>) -> Result<(), NetError> {
    let start = |name: &str, body: Box<dyn FnOnce() + Send>| {
        thread::Builder::new().name(name.into()).spawn(body).because(|| "cannot start a thread".into())
    };
    let sender = events.clone();
    start("net", Box::new(move || drop(sender.send(Event::Network(network.run())))))?;
    if let Some(watch) = watch {
        let sender = events.clone();
        let wait = move || match watch.wait() {
            Ok(()) => drop(sender.send(Event::Gone)),
            Err(error) => tracing::warn!("the end of the namespace will not be noticed: {error}"),
        };
        start("watch", Box::new(wait))?;
    }
    let mut signals = Signals::new([SIGCHLD, SIGTERM, SIGHUP, SIGINT, SIGQUIT])
        .because(|| "cannot wait for signals".into())?;
    let wait = move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    };
    start("signals", Box::new(wait))?;
    Ok(())
}

/// Forwards as many of the ports as can be had; none at all is an error.
fn add_best_effort(handle: &Handle, forwards: &Forwards) -> Result<(), NetError> {
    let mut refused = None;
    let mut had = forwards.best_effort.is_empty();
    for forward in &forwards.best_effort {
        match handle.add_forward(Forward::clone(forward)) {
            Ok(_) => had = true,
            Err(error) => {
                tracing::debug!("cannot listen on {}: {error}", forward.listen);
                refused = Some(error);
            }
        }
    }
    match refused {
        Some(error) if !had => Err(error).because(|| "cannot forward a single one of the ports".into()),
        _ => Ok(()),
    }
}

/// Waits for the end, and returns the exit status.
fn attend(command: Option<&Command>, events: &Receiver<Event>) -> Result<u8, NetError> {
    for event in events {
        match (event, command) {
            (Event::Network(Err(error)), _) => return Err(error).because(|| "the network ended".into()),
            // Only this thread ends it otherwise.
            (Event::Network(Ok(())) | Event::Gone, _) => return Ok(0),
            (Event::Signal(SIGCHLD), Some(command)) => {
                if let Some(status) = command.status().because(|| "cannot wait for the command".into())? {
                    return Ok(status);
                }
            }
            (Event::Signal(SIGCHLD), None) => {}
            // What a terminal sends, it sends to the command too.
            (Event::Signal(SIGINT | SIGQUIT), Some(_)) => {}
            (Event::Signal(SIGHUP), Some(command)) => command.signal(Signal::HUP),
            (Event::Signal(_), Some(command)) => command.signal(Signal::TERM),
            (Event::Signal(_), None) => return Ok(0),
        }
    }
    Ok(0)
}
