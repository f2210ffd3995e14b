//! `ring3 pasta`: the network of a namespace.
//!
//! # Theory of operation
//! The engine's sockets are the host's, its link is a tap device in the namespace. So the process stays in the host's
//! network namespace, and what has to be done in the other one is done by threads that enter it, before the
//! process isolates itself.
//!
//! 1. The host's network is read, and becomes the guest's ([`usernet::Config`]).
//! 2. The process makes a user namespace, and starts the command in further namespaces, where it waits.
//! 3. A thread enters the network namespace, makes the tap device there and configures it.
//! 4. The engine opens its ports; the command is let go; the engine runs until the command ends.

mod command;
mod link;
mod namespace;
mod netlink;

use std::ffi::OsString;
use std::thread;

use rustix::process::Signal;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use usernet::{Config, Engine};

use super::{Because, NetError, isolation};
use command::Command;
use link::Link;
use namespace::NetNamespace;

/// What to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// Whether the namespace's addresses, routes and links are configured.
    pub configure: bool,
    /// The command and its arguments; a shell if there are none.
    pub command: Vec<OsString>,
}

/// Runs a command in a namespace of its own, and returns its exit status.
///
/// # Errors
/// What could not be done. The command has then not run.
pub fn run(plan: &Plan) -> Result<u8, NetError> {
    let config = Config::from_host().because(|| "cannot read the host's network".into())?;
    isolation::user::own_namespace()?;
    let mut command = Command::start(&plan.command)?;
    let namespace = NetNamespace::open(&command.network_namespace())?;
    let link = Link { name: "tap0".into(), mac: None, configure: plan.configure };
    let tun = namespace.inside(|| link.make(&config))??;
    let engine = Engine::new(config, Box::new(tun)).because(|| "cannot start the network".into())?;
    let mut signals = Signals::new([SIGCHLD, SIGTERM, SIGHUP, SIGINT, SIGQUIT])
        .because(|| "cannot wait for signals".into())?;
    let handle = engine.handle();
    let engine = thread::Builder::new()
        .name("engine".into())
        .spawn(|| engine.run())
        .because(|| "cannot start a thread".into())?;
    command.go()?;
    let status = wait(&command, &mut signals)?;
    handle.stop();
    match engine.join() {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!("the network ended early: {error}"),
        Err(panic) => std::panic::resume_unwind(panic),
    }
    Ok(status)
}

/// Waits for the command's end, passing signals on to it.
fn wait(command: &Command, signals: &mut Signals) -> Result<u8, NetError> {
    for signal in signals.forever() {
        match signal {
            SIGCHLD => {
                if let Some(status) = command.status().because(|| "cannot wait for the command".into())? {
                    return Ok(status);
                }
            }
            // What a terminal sends, it sends to the command too.
            SIGINT | SIGQUIT => {}
            SIGHUP => command.signal(Signal::HUP),
            _ => command.signal(Signal::TERM),
        }
    }
    Ok(0)
}
