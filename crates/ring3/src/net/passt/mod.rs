//! `ring3 passt`: the network of a virtual machine, by a socket.
//!
//! # Theory of operation
//! 1. The host's network is read, and becomes the guest's ([`usernet::Config`]).
//! 2. The socket listens, the engine opens its ports: whatever can go wrong has, before the user is told that all is ready.
//! 3. The process goes to the background and gives up what it does not need any more.
//! 4. The engine runs on a thread of its own until a signal comes, or until the link has ended: that of a socket which came
//!    connected, and that of the first client with `--one-off`. Otherwise one client after the other is served by the
//!    same engine, so that forwarded ports are never closed in between.

mod socket;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::thread;

use rustix::process::{PidfdFlags, PidfdGetfdFlags, getpid, pidfd_getfd, pidfd_open};
use signal_hook::consts::{SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use taps::stream::{Clients, Stream};
use usernet::tap::Tap;
use usernet::{Config, Engine};

use super::background::{self, Place};
use super::options::settings::GuestSocket;
use super::{Because, NetError};
use socket::Name;

/// The longest packet to a guest whose MTU is not said.
const MTU: u16 = 65520;

/// What to do.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The guest's network.
    pub config: Config,
    /// Where guests come from.
    pub socket: GuestSocket,
    /// Whether it ends with its first guest.
    pub one_off: bool,
    /// Whether the process stays in the foreground.
    pub foreground: bool,
    /// Where the process's id is written when everything is ready.
    pub pid_file: Option<PathBuf>,
}

/// Serves guests, and returns the status to exit with.
///
/// # Errors
/// What could not be done.
pub fn run(plan: &Plan) -> Result<u8, NetError> {
    let here = match background::enter(plan.foreground)? {
        Place::Here(here) => here,
        Place::Elsewhere(status) => return Ok(status),
    };
    let (tap, name) = link(plan)?;
    let engine = Engine::new(plan.config.clone(), tap).because(|| "cannot start the network".into())?;
    // Before any other thread, which would not have the signals blocked.
    let mut signals =
        Signals::new([SIGTERM, SIGINT, SIGQUIT]).because(|| "cannot wait for signals".into())?;
    if let Some(name) = &name {
        tell(name.path());
    }
    here.ready(plan.pid_file.as_deref())?;
    serve(engine, &mut signals)
}

/// The link to the guest, and the name of its socket.
fn link(plan: &Plan) -> Result<(Box<dyn Tap>, Option<Name>), NetError> {
    let mtu = if plan.config.mtu == 0 { MTU } else { plan.config.mtu };
    let (listener, name) = match &plan.socket {
        GuestSocket::Descriptor(number) => {
            let socket = inherited(*number).because(|| format!("cannot use descriptor {number}"))?;
            let stream = Stream::connected(socket, mtu)
                .because(|| format!("cannot use descriptor {number} as the guest's socket"))?;
            return Ok((Box::new(stream), None));
        }
        GuestSocket::Path(path) => {
            socket::listen(path).because(|| format!("cannot listen at {}", path.display()))?
        }
        GuestSocket::FirstFree => socket::listen_first(GuestSocket::defaults())
            .because(|| "cannot listen at any of /tmp/passt_1.socket to /tmp/passt_64.socket; --socket names another".into())?,
    };
    let clients = if plan.one_off { Clients::One } else { Clients::OneAfterTheOther };
    let stream = Stream::listening(listener, clients, mtu).because(|| "cannot wait for guests".into())?;
    Ok((Box::new(stream), Some(name)))
}

/// A descriptor that the process was started with.
fn inherited(number: i32) -> io::Result<OwnedFd> {
    // A copy: what the number stands for is nobody's here, and is not closed.
    let this = pidfd_open(getpid(), PidfdFlags::empty())?;
    Ok(pidfd_getfd(this, number, PidfdGetfdFlags::empty())?)
}

/// Says how a guest gets there.
fn tell(path: &Path) {
    let path = path.display();
    tracing::info!("the guest's socket is {path}");
    tracing::info!(
        "QEMU connects by: -device virtio-net-pci,netdev=n \
         -netdev stream,id=n,server=off,addr.type=unix,addr.path={path}"
    );
}

/// Runs the engine until it ends or a signal comes.
fn serve(engine: Engine, signals: &mut Signals) -> Result<u8, NetError> {
    let handle = engine.handle();
    let done = signals.handle();
    let engine = thread::Builder::new()
        .name("engine".into())
        .spawn(move || {
            let result = engine.run();
            done.close();
            result
        })
        .because(|| "cannot start a thread".into())?;
    if let Some(signal) = signals.forever().next() {
        tracing::debug!("ended by signal {signal}");
        handle.stop();
    }
    match engine.join() {
        Ok(Ok(())) => Ok(0),
        Ok(Err(error)) if is_goodbye(&error) => {
            tracing::info!("{error}");
            Ok(0)
        }
        Ok(result) => result.map(|()| 0).because(|| "cannot go on".into()),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

/// Whether a link ended because the other side wanted it to.
fn is_goodbye(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}
