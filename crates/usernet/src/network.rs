//! A guest's network on several threads.
//!
//! A link that has several queues (virtio-net's queue pairs, a tap device with `IFF_MULTI_QUEUE`) is served by as
//! many engines, one a thread, which share nothing that is used for each frame. A flow stays with the engine that
//! first saw it: what that sends goes by its own queue, and a guest that steers as virtio 1.2, 5.1.6.5.6 and Linux's
//! tap device do sends its answers by the same one. What comes by another queue is handed over. Forwarded ports are
//! listened to by all of them, and the kernel spreads the peers (`SO_REUSEPORT`).

use std::io;
use std::thread;

use crate::config::Config;
use crate::engine::{Engine, Handle};
use crate::group;
use crate::splice::Bypass;
use crate::tap::Tap;

/// The engines of one guest.
pub struct Network {
    first: Engine,
    others: Vec<Engine>,
}

impl Network {
    /// An engine for each of `taps`, which are the queues of one link, with the guest's forwarded ports open.
    ///
    /// # Errors
    /// `InvalidInput` if there is no queue or there are more than 64; else as [`Engine::new`].
    pub fn new(config: Config, taps: Vec<Box<dyn Tap>>) -> io::Result<Self> {
        if !(1..=group::MOST).contains(&taps.len()) {
            let most = group::MOST;
            let text = format!("a link has 1 to {most} queues, not {}", taps.len());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut others = Engine::several(config, taps)?;
        let first = others.remove(0);
        Ok(Self { first, others })
    }

    /// A way to talk to the engines from elsewhere.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.first.handle()
    }

    /// Has what comes from the host's loopback to forwarded ports go by `bypass`, without frames.
    pub fn set_bypass(&mut self, bypass: &Bypass) {
        for engine in std::iter::once(&mut self.first).chain(&mut self.others) {
            engine.set_bypass(bypass.clone());
        }
    }

    /// Serves the guest, on this thread and one for each further queue, until [`Handle::stop`].
    ///
    /// # Errors
    /// When the link to the guest is gone, the host's epoll fails, or there is no thread to be had.
    pub fn run(self) -> io::Result<()> {
        let handle = self.handle();
        thread::scope(|scope| {
            let mut threads = Vec::new();
            for (number, engine) in (1..).zip(self.others) {
                let others = handle.clone();
                let serve = move || {
                    let result = engine.run();
                    // One queue alone is no link.
                    others.stop();
                    result
                };
                let thread = thread::Builder::new().name(format!("net-{number}")).spawn_scoped(scope, serve);
                match thread {
                    Ok(thread) => threads.push(thread),
                    Err(error) => {
                        handle.stop();
                        return Err(error);
                    }
                }
            }
            let mut result = self.first.run();
            handle.stop();
            for thread in threads {
                let ended =
                    thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread of the network died")));
                result = result.and(ended);
            }
            result
        })
    }
}
