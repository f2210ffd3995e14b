//! What runs when everything is set up: engine, splicer, and who looks after them.
//!
//! Threads: one for each queue of the tap device, the first of them `net`; `splice` for the bypass, and `namespace`, which makes
//! its sockets inside; `auto` for ports that follow listeners; `watch` for the namespace's end; `signals`. The one that
//! started them waits for what they tell ([`Serving::attend`]).

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::process::Signal;
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use usernet::splice::sockets::{self, Here, There};
use usernet::splice::{self, Bypass, Side, Splicer};
use usernet::tap::Tap;
use usernet::{Config, Handle, Network};

use super::auto::{AnyForwarder, Auto, Direction};
use super::bound::Bound;
use super::command::Command;
use super::namespace::NetNamespace;
use super::watch::Watch;
use crate::net::attendants::{Attendants, Prepared};
use crate::net::isolation;
use crate::net::options::PastaSettings;
use crate::net::options::settings::{Ports, Splice};
use crate::net::{Because, NetError};

/// Something that happened.
enum Event {
    /// Engine or splicer ended.
    Network(io::Result<()>),
    /// The namespace's name has gone.
    Gone,
    /// This process got a signal.
    Signal(i32),
}

/// Which ports are bound in both namespaces.
pub(super) struct Tables {
    pub(super) host: Bound,
    pub(super) guest: Bound,
}

/// A namespace that is served.
pub(super) struct Serving {
    events: Receiver<Event>,
    engine: Option<Handle>,
    splicer: Option<splice::Handle>,
    /// Dropped at the end, which ends the thread that follows listeners.
    _auto: Option<Sender<()>>,
    /// Dropped when the engine was told to end.
    _attendants: Option<Attendants>,
}

impl Serving {
    /// Opens all ports, starts all threads, and gives up the capabilities that this took. `taps` are the tap device's queues.
    pub(super) fn start(
        settings: &PastaSettings,
        config: Config,
        taps: Vec<Box<dyn Tap>>,
        namespace: NetNamespace,
        tables: Tables,
        watch: Option<Watch>,
        prepared: Prepared,
    ) -> Result<Self, NetError> {
        let v6 = settings.common.network.families[1];
        let inside = (settings.splice != Splice::Off).then(|| enter(namespace)).transpose()?;
        isolation::drop_capabilities(false)?;
        let network = (!taps.is_empty()).then(|| {
            let taps = taps.into_iter().map(|tap| prepared.tap(tap)).collect();
            Network::new(config, taps).because(|| "cannot start the network".into())
        });
        let mut network = network.transpose()?;
        let splicer = inside.map(|there| {
            let splicer = Splicer::new(splice::Config::default(), Box::new(Here), Box::new(there));
            splicer.because(|| "cannot start the bypass of the loopback".into())
        });
        let splicer = splicer.transpose()?;
        let handles = (network.as_ref().map(Network::handle), splicer.as_ref().map(Splicer::handle));
        let (sender, events) = channel();
        if let (Some(network), Some(splicer)) = (&mut network, &splicer) {
            network.set_bypass(&Bypass::new(splicer.handle(), settings.host_lo_to_ns_lo));
        }
        if let Some(network) = network {
            let sender = sender.clone();
            start("net", move || drop(sender.send(Event::Network(network.run()))))?;
        }
        if let Some(splicer) = splicer {
            let sender = sender.clone();
            start("splice", move || drop(sender.send(Event::Network(splicer.run()))))?;
        }
        if let Some(watch) = watch {
            let sender = sender.clone();
            start("watch", move || match watch.wait() {
                Ok(()) => drop(sender.send(Event::Gone)),
                Err(error) => tracing::warn!("the end of the namespace will not be noticed: {error}"),
            })?;
        }
        start_signals(sender)?;
        let (engine, splicer) = handles;
        let auto = forward(settings, (engine.as_ref(), splicer.as_ref()), tables, v6)?;
        let attendants = engine.as_ref().map(|engine| prepared.attend(engine)).transpose()?;
        Ok(Self { events, engine, splicer, _auto: auto, _attendants: attendants })
    }

    /// The engine behind the tap device, if there is one.
    pub(super) fn engine(&self) -> Option<Handle> {
        self.engine.clone()
    }

    /// Waits for the end, and returns the exit status: the command's, or 0.
    ///
    /// # Errors
    /// The network ended by itself.
    pub(super) fn attend(self, command: Option<&Command>) -> Result<u8, NetError> {
        let result = self.wait(command);
        if let Some(engine) = self.engine {
            engine.stop();
        }
        if let Some(splicer) = self.splicer {
            splicer.stop();
        }
        result
    }

    fn wait(&self, command: Option<&Command>) -> Result<u8, NetError> {
        for event in &self.events {
            match (event, command) {
                (Event::Network(Err(error)), _) => return Err(error).because(|| "the network ended".into()),
                // Only this thread ends it otherwise.
                (Event::Network(Ok(())) | Event::Gone, _) => return Ok(0),
                (Event::Signal(SIGCHLD), Some(command)) => {
                    let status = command.status().because(|| "cannot wait for the command".into())?;
                    if let Some(status) = status {
                        return Ok(status);
                    }
                }
                (Event::Signal(SIGCHLD), None) => {}
                // What a terminal sends, it sends to the command too.
                (Event::Signal(SIGINT), Some(command)) => command.signalled(Signal::INT),
                (Event::Signal(SIGQUIT), Some(command)) => command.signalled(Signal::QUIT),
                (Event::Signal(SIGHUP), Some(command)) => command.signal(Signal::HUP),
                (Event::Signal(_), Some(command)) => command.signal(Signal::TERM),
                (Event::Signal(_), None) => return Ok(0),
            }
        }
        Ok(0)
    }
}

fn start(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), NetError> {
    let thread = thread::Builder::new().name(name.into()).spawn(body);
    thread.map(drop).because(|| "cannot start a thread".into())
}

/// Has a thread enter the namespace and make sockets there. Low ports are a user's right inside, so it keeps that
/// capability.
fn enter(namespace: NetNamespace) -> Result<There, NetError> {
    let (there, server) = sockets::remote();
    let (sender, entered) = channel();
    start("namespace", move || {
        let result = namespace.enter().and_then(|()| isolation::drop_capabilities(true));
        drop(namespace);
        let ready = result.is_ok();
        if sender.send(result).is_ok() && ready {
            server.run();
        }
    })?;
    entered
        .recv()
        .map_err(|_| io::ErrorKind::BrokenPipe)
        .because(|| "cannot enter the namespace".into())??;
    Ok(there)
}

fn start_signals(events: Sender<Event>) -> Result<(), NetError> {
    let mut signals = Signals::new([SIGCHLD, SIGTERM, SIGHUP, SIGINT, SIGQUIT])
        .because(|| "cannot wait for signals".into())?;
    start("signals", move || {
        for signal in signals.forever() {
            if events.send(Event::Signal(signal)).is_err() {
                return;
            }
        }
    })
}

/// Makes the forwards, and has those with `auto` followed until what is returned is dropped.
fn forward(
    settings: &PastaSettings,
    (engine, splicer): (Option<&Handle>, Option<&splice::Handle>),
    tables: Tables,
    v6: bool,
) -> Result<Option<Sender<()>>, NetError> {
    let common = &settings.common;
    let by_splicer = |from| splicer.map(|handle| AnyForwarder::Splicer { splicer: handle.clone(), from, v6 });
    let by_engine = engine.map(|handle| AnyForwarder::Engine { engine: handle.clone(), v6 });
    let direction = |by: Option<AnyForwarder>, tcp: &Ports, udp: &Ports| {
        by.map(|by| Direction::new(by, tcp.clone(), udp.clone()))
    };
    let inwards = direction(by_engine.or_else(|| by_splicer(Side::Host)), &common.tcp, &common.udp);
    let outwards = direction(by_splicer(Side::Guest), &settings.tcp_ns, &settings.udp_ns);
    for direction in [&inwards, &outwards].into_iter().flatten() {
        direction.make_fixed().because(|| "cannot forward all ports that were asked for".into())?;
    }
    let mut auto = Auto { host: tables.host, guest: tables.guest, inwards, outwards };
    if !auto.follows() {
        return Ok(None);
    }
    auto.look().because(|| "cannot find out which ports are bound".into())?;
    let (sender, end) = channel();
    start("auto", move || auto.run(&end))?;
    Ok(Some(sender))
}
