//! What goes along with an engine, whichever the front end: the record of frames, statistics, control at run time.
//!
//! Files and sockets are opened ([`Prepared::open`]) while the process sees the host's files; threads are started
//! ([`Prepared::attend`]) when there is an engine.

use std::sync::Arc;
use std::time::Duration;

use taps::observed::Observed;
use taps::pcap::Capture;
use taps::trace::PacketLog;
use usernet::Handle;
use usernet::tap::Tap;

use super::control::{ControlSocket, Controlled, Server};
use super::options::ports::{PortRange, ephemeral_ports};
use super::options::settings::{Common, Level};
use super::stats::Printer;
use super::{Because, NetError};

/// What is open, and waits for an engine.
#[derive(Debug)]
pub struct Prepared {
    capture: Option<Arc<Capture>>,
    control: Option<ControlSocket>,
    stats: Option<Duration>,
    /// Whether single packets are logged.
    traced: bool,
    v6: bool,
    ephemeral: PortRange,
}

/// What attends an engine, until this is dropped: not before the engine has ended or been told to.
#[derive(Debug)]
pub struct Attendants {
    _printer: Option<Printer>,
    _server: Option<Server>,
}

impl Prepared {
    /// Opens what the settings ask for.
    ///
    /// # Errors
    /// The file or socket cannot be made.
    pub fn open(common: &Common) -> Result<Self, NetError> {
        let capture = common.pcap.as_ref().map(|path| {
            Capture::create(path).because(|| format!("cannot record frames in {}", path.display()))
        });
        Ok(Self {
            capture: capture.transpose()?,
            control: common.control.as_deref().map(ControlSocket::bind_kept).transpose()?,
            stats: common.stats,
            traced: common.log.level == Level::Trace,
            v6: common.network.families[1],
            ephemeral: ephemeral_ports(),
        })
    }

    /// The tap for the engine: one that is logged and recorded, if asked for.
    #[must_use]
    pub fn tap(&self, tap: Box<dyn Tap>) -> Box<dyn Tap> {
        let tap = if self.traced { Box::new(Observed::new(tap, PacketLog)) } else { tap };
        match &self.capture {
            Some(capture) => Box::new(Observed::new(tap, Arc::clone(capture))),
            None => tap,
        }
    }

    /// Starts the threads beside an engine.
    ///
    /// # Errors
    /// The host is out of threads or descriptors.
    pub fn attend(self, handle: &Handle) -> Result<Attendants, NetError> {
        let printer = self.stats.map(|delay| Printer::start(handle.clone(), delay));
        let printer = printer.transpose().because(|| "cannot start the thread for statistics".into())?;
        let controlled = Controlled { handle: handle.clone(), v6: self.v6, ephemeral: self.ephemeral };
        let server = self.control.map(|socket| socket.serve(controlled));
        let server = server.transpose().because(|| "cannot serve the control socket".into())?;
        Ok(Attendants { _printer: printer, _server: server })
    }
}
