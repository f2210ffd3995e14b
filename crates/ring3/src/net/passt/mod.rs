//! `ring3 passt`: the network of a virtual machine, by a socket.
//!
//! # Theory of operation
//! 1. **While the process has its rights and sees the host**: the host's network is read, the socket listens ([`super::local`]),
//!    the engine opens its ports. A process that does nothing else is left to remove the socket at the end.
//! 2. Root becomes an ordinary user; the process moves to a user namespace, goes to the background unless it is to stay,
//!    and leaves the host's files behind ([`super::isolation`]).
//! 3. It starts its threads, gives up all that it no longer needs, and lets the user know that everything is ready.
//! 4. The process waits for a signal, or for the link's end: that of a socket which came connected, or that of the first
//!    guest with `--one-off`. Otherwise one guest after the other is served by the same engine, so that flows and
//!    forwarded ports outlive a virtual machine monitor that connects again.
//!
//! Whatever goes wrong before 4 is an error, and nobody has been told that there is a network.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use signal_hook::consts::{SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use taps::stream::{Clients, Stream};
use taps::vhost_user::{self, Control, Source};
use usernet::tap::Tap;
use usernet::{Config, Network};

use super::attendants::Prepared;
use super::changes::Changes;
use super::descriptors;
use super::isolation::{self, Mode, background, user};
use super::local::{self, Access, Keeper};
use super::options::PasstSettings;
use super::options::settings::GuestSocket;
use super::{Because, NetError, add_best_effort};

/// The longest packet to a guest whose MTU is not said.
const MTU: u16 = 65520;

/// Something that happened.
enum Event {
    /// The network ended.
    Network(io::Result<()>),
    /// This process got a signal.
    Signal,
}

/// Serves guests, and returns the exit status.
///
/// # Errors
/// What could not be done.
pub fn run(settings: &PasstSettings) -> Result<u8, NetError> {
    let common = &settings.common;
    let changes = Changes::open(&common.network)?;
    let forwards = common.forwards();
    let config = Config { forwards: forwards.required.clone(), ..changes.config()? };
    let mut pid_file = background::pid_file(common.pid_file.as_deref())?;
    let (socket, keeper) = open(&settings.socket)?;
    descriptors::raise_limit();
    let mtu = if config.mtu == 0 { MTU } else { config.mtu };
    let (taps, control) =
        links(settings, socket, mtu).because(|| "cannot make a link to the guest".into())?;
    let prepared = Prepared::open(common)?;
    let taps = taps.into_iter().map(|tap| prepared.tap(tap)).collect();
    let network = Network::new(config, taps).because(|| "cannot start the network".into())?;
    let handle = network.handle();
    if let Some(keeper) = &keeper {
        tell(keeper.path(), settings.vhost_user);
    }

    user::leave_root(common.runas, false)?;
    user::own_namespace()?;
    let background = (!common.foreground).then(|| background::split(pid_file.take())).transpose()?;
    isolation::enclose(common.chroot_fallback)?;
    isolation::drop_capabilities(false)?;
    let (sender, events) = channel();
    start_threads(network, control, sender)?;
    let attendants = prepared.attend(&handle)?;
    add_best_effort(&handle, &forwards)?;
    let following = changes.follow(handle.clone())?;
    isolation::seal(if settings.vhost_user { Mode::VhostUser } else { Mode::Passt }, None)?;

    background::write_pid(pid_file, std::process::id() as i32)
        .because(|| "cannot write the PID file".into())?;
    background.map(background::Background::ready).transpose()?;
    let result = attend(&events);
    handle.stop();
    drop((attendants, following));
    result
}

/// A socket, as it comes.
enum Socket {
    Listening(OwnedFd),
    Connected(OwnedFd),
}

/// Opens the socket, and has its name kept.
fn open(wanted: &GuestSocket) -> Result<(Socket, Option<Keeper>), NetError> {
    let (listener, name) = match wanted {
        GuestSocket::Descriptor(number) => {
            let socket = inherited(*number).because(|| format!("cannot use descriptor {number}"))?;
            return Ok((Socket::Connected(socket), None));
        }
        GuestSocket::Path(path) => {
            let socket = local::listen(path, Access::Umask);
            socket.because(|| format!("cannot listen at {}", path.display()))?
        }
        GuestSocket::FirstFree => {
            let result = local::listen_first(GuestSocket::defaults(), Access::Umask);
            result.because(|| "cannot listen at any of passt's own paths; --socket names another".into())?
        }
    };
    let keeper = Keeper::start(name).because(|| "cannot start a process to remove the socket".into())?;
    Ok((Socket::Listening(listener), Some(keeper)))
}

/// A descriptor that the process was started with.
fn inherited(number: i32) -> io::Result<OwnedFd> {
    // A copy: what the number stands for is nobody's here, and is not closed.
    let this = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(this, number, PidfdGetfdFlags::empty())?)
}

/// The links to guests, and who listens to what their front ends say.
type Links = (Vec<Box<dyn Tap>>, Option<Control>);

/// Makes the links to guests.
fn links(settings: &PasstSettings, socket: Socket, mtu: u16) -> io::Result<Links> {
    let clients = if settings.one_off { Clients::One } else { Clients::OneAfterTheOther };
    if settings.vhost_user {
        let source = match socket {
            Socket::Listening(listener) => Source::Listener(listener.into(), clients),
            Socket::Connected(socket) => Source::Connected(socket.into()),
        };
        let (pairs, control) = vhost_user::links(source, settings.common.threads.into(), mtu)?;
        let boxed = |pair| Box::new(pair) as Box<dyn Tap>;
        return Ok((pairs.into_iter().map(boxed).collect(), Some(control)));
    }
    if settings.common.threads > 1 {
        let what = "QEMU's stream socket has one queue, for one thread: --threads needs --vhost-user";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let stream = match socket {
        Socket::Listening(listener) => Stream::listening(listener, clients, mtu)?,
        Socket::Connected(socket) => Stream::connected(socket, mtu)?,
    };
    Ok((vec![Box::new(stream)], None))
}

/// Says how a guest gets there.
fn tell(path: &Path, vhost_user: bool) {
    let path = path.display();
    tracing::info!("the guest's socket is {path}");
    if vhost_user {
        tracing::info!(
            "QEMU connects by: -chardev socket,id=c,path={path} -netdev vhost-user,id=n,chardev=c \
             -device virtio-net-pci,netdev=n, with shared memory: -object memory-backend-memfd,id=m,share=on,size=SIZE \
             -numa node,memdev=m"
        );
    } else {
        tracing::info!(
            "QEMU connects by: -netdev stream,id=n,server=off,addr.type=unix,addr.path={path} \
             -device virtio-net-pci,netdev=n"
        );
    }
}

/// Starts what runs beside the waiting thread.
fn start_threads(network: Network, control: Option<Control>, events: Sender<Event>) -> Result<(), NetError> {
    let start = |name: &str, body: Box<dyn FnOnce() + Send>| {
        thread::Builder::new().name(name.into()).spawn(body).because(|| "cannot start a thread".into())
    };
    if let Some(control) = control {
        start("vhost-user", Box::new(|| control.run()))?;
    }
    let sender = events.clone();
    // Whoever waits may have stopped.
    start("net", Box::new(move || drop(sender.send(Event::Network(network.run())))))?;
    let mut signals =
        Signals::new([SIGTERM, SIGINT, SIGQUIT]).because(|| "cannot wait for signals".into())?;
    let wait = move || {
        if signals.forever().next().is_some() {
            drop(events.send(Event::Signal));
        }
    };
    start("signals", Box::new(wait))?;
    Ok(())
}

/// Waits for the end, and returns the exit status.
fn attend(events: &Receiver<Event>) -> Result<u8, NetError> {
    match events.recv() {
        Ok(Event::Network(Err(error))) if !is_goodbye(&error) => {
            Err(error).because(|| "the network ended".into())
        }
        Ok(Event::Network(Err(error))) => {
            tracing::info!("{error}");
            Ok(0)
        }
        Ok(Event::Network(Ok(())) | Event::Signal) | Err(_) => Ok(0),
    }
}

/// Whether a link ended because the other side wanted it to.
fn is_goodbye(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}
