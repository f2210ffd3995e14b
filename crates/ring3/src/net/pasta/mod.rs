//! `ring3 pasta`: the network of a namespace.
//!
//! # Theory of operation
//! The engine's sockets are the host's, its link is a tap device in the namespace. So the process stays in the host's
//! network namespace, and what has to be done in the other one is done by threads that enter it.
//!
//! 1. **While the process has its rights and sees the host**: the host's network is read ([`usernet::HostNetwork`]),
//!    what the options name is opened, the namespaces are found (`namespace`).
//! 2. Root becomes an ordinary user; the process moves to the user namespace; a command is started in further namespaces,
//!    where it waits (`command`).
//! 3. Without a command the process goes to the background, unless it is to stay.
//! 4. A thread enters the network namespace, makes the tap device there and configures it (`link`).
//! 5. The process leaves the host's files behind ([`super::isolation`]), starts its threads (`serve`), and gives up all
//!    that it no longer needs.
//! 6. Everything is ready: the command is let go, or whoever waits for the background process.
//! 7. The process waits for the command's end, for the namespace's (`watch`), or for a signal.
//!
//! Whatever goes wrong before 6 is an error, and neither has a command run nor anybody been told that there is a network.

mod auto;
mod bound;
mod command;
mod link;
mod namespace;
mod netlink;
mod opener;
mod serve;
mod watch;

use std::io;

use taps::vhost_net::{self, Device};
use usernet::HostNetwork;
use usernet::tap::Tap;

use super::attendants::Prepared;
use super::changes::Changes;
use super::descriptors;
use super::isolation::{self, Mode, background, user};
use super::options::settings::{Splice, Target};
use super::options::{PastaSettings, Vhost};
use super::{Because, NetError};
use bound::Bound;
use command::Command;
use link::Link;
use namespace::Found;
use opener::Opener;
use serve::{Serving, Tables};
use watch::Watch;

/// The tap device's name where the host has no interface to name it after.
const IFNAME: &str = "tap0";

/// Serves a namespace until its end, and returns the exit status: the command's if there is one.
///
/// # Errors
/// What could not be done. A command has then not run.
pub fn run(settings: &PastaSettings) -> Result<u8, NetError> {
    let common = &settings.common;
    // Without forwards: which are there, and who serves them, is decided by `serve`.
    let changes = Changes::open(&common.network)?;
    let config = changes.config()?;
    let ifname = settings.ifname.clone().unwrap_or_else(|| name_after(changes.host()));
    let mut pid_file = background::pid_file(common.pid_file.as_deref())?;
    let prepared = Prepared::open(common)?;
    let found = Found::find(&settings.target)?;
    let watch = watched(settings)?;
    let taps = settings.splice != Splice::Only;
    let opener = (taps && user::is_root()).then(Opener::start).transpose()?;
    let mode = if taps { settings.vhost } else { Vhost::Off };
    let devices = (0..common.threads).map(|_| Device::open(vhost_mode(mode)));
    let devices: Vec<Device> = devices
        .collect::<Result<_, _>>()
        .map_err(io::Error::other)
        .because(|| "cannot use vhost-net".into())?;

    // Whoever makes no user namespace needs root's rights over the network namespace a while longer.
    let keep = !matches!(settings.target, Target::Command { netns_only: false, .. });
    user::leave_root(common.runas, keep)?;
    let (namespace, mut command) = found.settle()?;
    descriptors::raise_limit();
    let background = (!common.foreground).then(|| background::split(pid_file.take())).transpose()?;

    let link = Link {
        name: &ifname,
        mac: settings.ns_mac,
        queues: common.threads,
        configure: settings.configure,
        host: changes.host(),
        config: &config,
    };
    let files = opener.map(|opener| opener.open(&namespace, link.queues)).transpose();
    let files = link::no_device(files)?;
    let (queues, guest) = namespace.inside(|| {
        let queues = if taps { link.make(files)? } else { link.make_none()? };
        Ok((queues, open_tables()?))
    })?;
    let tables = Tables { host: open_tables()?, guest };
    let links = queues.into_iter().zip(devices).map(|(queue, device)| device.serve(queue));
    let links: Vec<Box<dyn Tap>> = links
        .collect::<Result<_, _>>()
        .map_err(io::Error::other)
        .because(|| "cannot use vhost-net".into())?;
    isolation::enclose(common.chroot_fallback)?;
    let serving = Serving::start(settings, config, links, namespace, tables, watch, prepared)?;
    let _following = serving.engine().map(|engine| changes.follow(engine)).transpose()?;
    isolation::seal(Mode::Pasta, command.as_ref().map(Command::pid))?;

    background::write_pid(pid_file, std::process::id().cast_signed())
        .because(|| "cannot write the PID file".into())?;
    background.map(background::Background::ready).transpose()?;
    command.as_mut().map(Command::go).transpose()?;
    serving.attend(command.as_ref())
}

fn open_tables() -> Result<Bound, NetError> {
    Bound::open().because(|| "cannot read which ports are bound".into())
}

/// The name of the interface that the host itself has.
fn name_after(host: &HostNetwork) -> String {
    let interface = host.ipv4.as_ref().or(host.ipv6.as_ref());
    interface.map_or_else(|| IFNAME.to_owned(), |interface| interface.name.clone())
}

fn vhost_mode(vhost: Vhost) -> vhost_net::Mode {
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
