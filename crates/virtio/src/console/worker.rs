//! The thread that moves a console's bytes. The theory stands in the parent module.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};

use super::control::{FromDevice, FromDriver, HEADER_SIZE};
use super::host_fd::HostFd;
use super::{F_MULTIPORT, Farewell, Window};
use crate::device::{Activation, GuestMem};
use crate::interrupt::Interrupts;
use crate::queue::{Chain, Virtq};
use crate::worker::Stop;

/// Chains moved per port and direction before the other ports get their turn.
const TURN: usize = 64;
/// Turns that a port gets before a reset: more than a queue of the usual size fills.
const MOST_ROUNDS: usize = 8;
/// Messages that may wait for the driver's buffers. While so many do, the driver is not listened to.
const OUTBOX_LIMIT: usize = 128;

/// Tokens of epoll. Queue `n` has token `n`; port `n` has `INPUT + n` and `OUTPUT + n`.
const INPUT: u64 = 1 << 16;
const OUTPUT: u64 = 2 << 16;
const STOP: u64 = 3 << 16;
const WINDOW: u64 = 4 << 16;

/// A port as far as it belongs to the host: it outlives the driver.
#[derive(Debug)]
pub(super) struct HostPort {
    pub(super) name: Option<String>,
    pub(super) input: Option<HostFd>,
    pub(super) output: Option<HostFd>,
    /// What the driver is told of the host's end. Never true again after false.
    pub(super) connected: bool,
}

/// A port with its queues.
struct Port<M: GuestMem> {
    number: u32,
    host: HostPort,
    rx: Option<Virtq<M>>,
    tx: Option<Virtq<M>>,
    /// The driver has set the port up.
    ready: bool,
    /// A program in the guest has the port open.
    guest_open: bool,
    /// A buffer waiting for input.
    rx_chain: Option<Chain<M>>,
    /// A buffer being written, and how much of it is.
    tx_chain: Option<(Chain<M>, usize)>,
    /// The descriptor has not said "would block" since epoll last called it ready.
    input_ready: bool,
    output_ready: bool,
    input_watched: bool,
    output_watched: bool,
}

impl<M: GuestMem> Port<M> {
    /// Moves input to the guest. `true`: there may be more to do at once.
    fn deliver_input(&mut self, mem: &M::M, outbox: &mut VecDeque<FromDevice>) -> bool {
        let Some(rx) = &mut self.rx else { return false };
        let mut turns = 0;
        while self.guest_open && self.host.connected && self.input_ready && turns < TURN {
            let Some(input) = &mut self.host.input else { break };
            let Some(chain) = self.rx_chain.take().or_else(|| rx.pop()) else {
                if rx.wait_for_kick() {
                    break;
                }
                continue;
            };
            turns += 1;
            let slices = chain.writable.slices(mem, 0, chain.writable.len());
            if slices.is_empty() {
                rx.push(&chain, 0);
                continue;
            }
            match input.read(&slices) {
                Ok(len) if len > 0 => rx.push(&chain, len),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    drop(slices);
                    self.rx_chain = Some(chain);
                    self.input_ready = false;
                }
                end => {
                    if let Err(error) = end {
                        tracing::debug!(port = self.number, %error, "console input ends");
                    }
                    drop(slices);
                    self.rx_chain = Some(chain);
                    self.host.input = None;
                    self.input_watched = false;
                    if self.host.output.is_none() {
                        self.host.connected = false;
                        outbox.push_back(FromDevice::PortOpen { port: self.number, open: false });
                    }
                }
            }
        }
        rx.signal();
        turns == TURN
    }

    /// Moves the guest's bytes to the host. `true`: there may be more to do at once.
    fn take_output(&mut self, mem: &M::M, outbox: &mut VecDeque<FromDevice>) -> bool {
        let Some(tx) = &mut self.tx else { return false };
        let mut turns = 0;
        while turns < TURN {
            let waiting = self.tx_chain.take();
            let Some((chain, offset)) = waiting.or_else(|| tx.pop().map(|chain| (chain, 0))) else {
                if tx.wait_for_kick() {
                    break;
                }
                continue;
            };
            turns += 1;
            let left = chain.readable.len() - offset;
            let output = match &mut self.host.output {
                Some(output) if left > 0 => output,
                _ => {
                    tx.push(&chain, 0);
                    continue;
                }
            };
            if !self.output_ready {
                self.tx_chain = Some((chain, offset));
                break;
            }
            match output.write(&chain.readable.slices(mem, offset, left)) {
                Ok(len) if len == left => tx.push(&chain, 0),
                Ok(len) if len > 0 => self.tx_chain = Some((chain, offset + len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.output_ready = false;
                    self.tx_chain = Some((chain, offset));
                }
                end => {
                    tracing::debug!(port = self.number, ?end, "nobody takes console output any more");
                    tx.push(&chain, 0);
                    self.host.output = None;
                    self.output_watched = false;
                    self.host.connected = false;
                    outbox.push_back(FromDevice::PortOpen { port: self.number, open: false });
                }
            }
        }
        tx.signal();
        turns == TURN
    }
}

/// All that the thread works with.
pub(super) struct Service<M: GuestMem> {
    mem: M,
    interrupts: Arc<Interrupts>,
    window: Arc<Window>,
    epoll: OwnedFd,
    multiport: bool,
    queues: Vec<Option<Virtq<M>>>,
    control_rx: Option<Virtq<M>>,
    control_tx: Option<Virtq<M>>,
    outbox: VecDeque<FromDevice>,
    ports: Vec<Port<M>>,
}

impl<M: GuestMem> Service<M> {
    pub(super) fn new(mut activation: Activation<M>, window: Arc<Window>) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &window.event, EventData::new_u64(WINDOW), EventFlags::IN)?;
        for queue in activation.queues.iter().flatten() {
            epoll::add(&epoll, queue.kick(), EventData::new_u64(queue.index().into()), EventFlags::IN)?;
        }
        Ok(Service {
            multiport: activation.has_feature(F_MULTIPORT),
            control_rx: activation.take_queue(2),
            control_tx: activation.take_queue(3),
            mem: activation.mem,
            interrupts: activation.interrupts,
            queues: activation.queues,
            window,
            epoll,
            outbox: VecDeque::new(),
            ports: Vec::new(),
        })
    }

    /// Joins the host's ends with the driver's queues.
    pub(super) fn attach(mut self, hosts: Vec<HostPort>) -> Self {
        for (number, host) in (0u32..).zip(hosts) {
            // Port 0 has queues 0 and 1, port n from 1 up has 2n + 2 and 2n + 3.
            let first = if number == 0 { 0 } else { 2 * number as usize + 2 };
            let mut take = |index: usize| self.queues.get_mut(index).and_then(Option::take);
            let only_port = !self.multiport && number == 0;
            self.ports.push(Port {
                number,
                host,
                rx: take(first),
                tx: take(first + 1),
                ready: only_port,
                guest_open: only_port,
                rx_chain: None,
                tx_chain: None,
                input_ready: true,
                output_ready: true,
                input_watched: false,
                output_watched: false,
            });
        }
        self
    }

    /// Serves until asked to stop; returns the host's ends.
    pub(super) fn run(mut self, stop: &Stop, farewell: &Farewell) -> Vec<HostPort> {
        let mut end = self.serve(stop);
        if end.is_ok() && farewell.last.load(Ordering::SeqCst) {
            end = self.drain(stop, &farewell.abandon);
        } else if end.is_ok() {
            self.finish();
        }
        if let Err(error) = end {
            tracing::error!(%error, "the console's thread ends");
            self.interrupts.needs_reset(&error);
        }
        self.ports.into_iter().map(|port| port.host).collect()
    }

    fn serve(&mut self, stop: &Stop) -> io::Result<()> {
        epoll::add(&self.epoll, stop.event(), EventData::new_u64(STOP), EventFlags::IN)?;
        let mut events = Vec::with_capacity(64);
        while !stop.requested() {
            let mut more = self.converse();
            self.take_window_size();
            let mem = self.mem.memory();
            for port in &mut self.ports {
                more |= port.deliver_input(&mem, &mut self.outbox);
                more |= port.take_output(&mem, &mut self.outbox);
            }
            // Nobody waits while holding memory.
            drop(mem);
            self.send();
            self.watch()?;
            self.wait(&mut events, more)?;
        }
        Ok(())
    }

    /// Before a reset: writes out what the transmit queues hold, as far as the host's ends take it at once. Kernels
    /// reset their devices when they power off, right behind the last words of their programs.
    fn finish(&mut self) {
        let mem = self.mem.memory();
        for port in &mut self.ports {
            // A driver adds nothing while it waits for the reset, but another of its processors might.
            for _ in 0..MOST_ROUNDS {
                if !port.take_output(&mem, &mut self.outbox) {
                    break;
                }
            }
        }
    }

    /// Writes out what the transmit queues hold, however slowly the host's ends take it.
    fn drain(&mut self, stop: &Stop, abandon: &Stop) -> io::Result<()> {
        // It stays readable.
        epoll::delete(&self.epoll, stop.event())?;
        epoll::add(&self.epoll, abandon.event(), EventData::new_u64(STOP), EventFlags::IN)?;
        let mut events = Vec::with_capacity(64);
        while !abandon.requested() {
            let mem = self.mem.memory();
            let mut more = false;
            for port in &mut self.ports {
                more |= port.take_output(&mem, &mut self.outbox);
            }
            drop(mem);
            if !more && self.ports.iter().all(|port| port.tx_chain.is_none()) {
                break;
            }
            self.watch()?;
            self.wait(&mut events, more)?;
        }
        Ok(())
    }

    /// Waits for something to happen, or only looks if there is `more` to do, and notes it. `events` is room for
    /// what epoll reports.
    fn wait(&mut self, events: &mut Vec<epoll::Event>, more: bool) -> io::Result<()> {
        let timeout = more.then(Timespec::default);
        events.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        for event in events.iter() {
            self.wake(event.data.u64());
        }
        Ok(())
    }

    /// Notes what epoll reported.
    fn wake(&mut self, token: u64) {
        let low = usize::try_from(token & 0xffff).unwrap_or(usize::MAX);
        match token & !0xffff {
            INPUT => {
                if let Some(port) = self.ports.get_mut(low) {
                    port.input_ready = true;
                }
            }
            OUTPUT => {
                if let Some(port) = self.ports.get_mut(low) {
                    port.output_ready = true;
                }
            }
            WINDOW => self.window.event.clear(),
            0 => {
                let data = self.ports.iter().flat_map(|port| [&port.rx, &port.tx]);
                let queues = data.chain([&self.control_rx, &self.control_tx]).flatten();
                if let Some(queue) = queues.into_iter().find(|queue| usize::from(queue.index()) == low) {
                    queue.clear_kick();
                }
            }
            _ => {}
        }
    }

    /// Handles what the driver said. `true`: there may be more at once.
    fn converse(&mut self) -> bool {
        let Some(mut queue) = self.control_tx.take() else { return false };
        let mut more = true;
        let mut turns = 0;
        while turns < TURN && self.outbox.len() < OUTBOX_LIMIT {
            let Some(chain) = queue.pop() else {
                if queue.wait_for_kick() {
                    more = false;
                    break;
                }
                continue;
            };
            turns += 1;
            let mut bytes = [0; HEADER_SIZE];
            let whole = chain.readable.read(&*self.mem.memory(), 0, &mut bytes) == HEADER_SIZE;
            match FromDriver::decode(bytes).filter(|_| whole) {
                Some(message) => self.hear(message),
                None => {
                    self.interrupts.warn(&format_args!("console control message {bytes:?} means nothing"))
                }
            }
            queue.push(&chain, 0);
        }
        queue.signal();
        self.control_tx = Some(queue);
        self.send();
        // With a full outbox, go on when the driver gives buffers for it.
        more && self.outbox.len() < OUTBOX_LIMIT
    }

    fn hear(&mut self, message: FromDriver) {
        let port = match message {
            FromDriver::DeviceReady { ok } => {
                if ok && self.multiport {
                    let ports = self.ports.iter().map(|port| FromDevice::DeviceAdd { port: port.number });
                    self.outbox.extend(ports);
                }
                return;
            }
            FromDriver::PortReady { port, .. } | FromDriver::PortOpen { port, .. } => port,
        };
        let number = usize::try_from(port).unwrap_or(usize::MAX);
        let Some(state) = self.ports.get_mut(number) else {
            self.interrupts.warn(&format_args!("there is no console port {port}"));
            return;
        };
        match message {
            FromDriver::PortReady { ok: true, .. } => {
                state.ready = true;
                if port == 0 {
                    self.outbox.push_back(FromDevice::ConsolePort { port });
                    self.push_window_size();
                } else if let Some(name) = state.host.name.clone() {
                    self.outbox.push_back(FromDevice::PortName { port, name });
                }
                let open = self.ports.get(number).is_some_and(|port| port.host.connected);
                self.outbox.push_back(FromDevice::PortOpen { port, open });
            }
            FromDriver::PortReady { ok: false, .. } => {
                self.interrupts.warn(&format_args!("the driver cannot set up console port {port}"));
            }
            FromDriver::PortOpen { open, .. } => state.guest_open = open,
            FromDriver::DeviceReady { .. } => {}
        }
    }

    fn push_window_size(&mut self) {
        let (cols, rows) = self.window.size();
        if cols != 0 && rows != 0 {
            self.outbox.push_back(FromDevice::Resize { port: 0, cols, rows });
        }
    }

    fn take_window_size(&mut self) {
        if !self.window.changed.swap(false, Ordering::SeqCst) {
            return;
        }
        if !self.multiport {
            self.interrupts.config_changed();
        } else if self.ports.first().is_some_and(|port| port.ready) && self.outbox.len() < OUTBOX_LIMIT {
            self.push_window_size();
        }
    }

    /// Gives the driver what is in the outbox, as far as it has buffers.
    fn send(&mut self) {
        let Some(queue) = &mut self.control_rx else {
            self.outbox.clear();
            return;
        };
        while let Some(message) = self.outbox.front() {
            let Some(chain) = queue.pop() else {
                if queue.wait_for_kick() {
                    break;
                }
                continue;
            };
            let bytes = message.encode();
            let written = chain.writable.write(&*self.mem.memory(), 0, &bytes);
            if written < bytes.len() {
                self.interrupts.warn(&format_args!("console control buffer of {written} bytes is too small"));
            }
            queue.push(&chain, written);
            self.outbox.pop_front();
        }
        queue.signal();
    }

    /// Watches just the descriptors that something waits for. Epoll reports a hung-up pipe whether or not
    /// anybody wants to know, so the others are taken out.
    fn watch(&mut self) -> io::Result<()> {
        for port in &mut self.ports {
            let number = u64::from(port.number);
            let wanted = port.guest_open && port.rx_chain.is_some() && !port.input_ready;
            if let Some(fd) = port.host.input.as_ref().filter(|fd| fd.pollable()) {
                let token = INPUT + number;
                watch_one(&self.epoll, fd.as_fd(), token, EventFlags::IN, wanted, &mut port.input_watched)?;
            }
            let wanted = port.tx_chain.is_some() && !port.output_ready;
            if let Some(fd) = port.host.output.as_ref().filter(|fd| fd.pollable()) {
                let token = OUTPUT + number;
                watch_one(&self.epoll, fd.as_fd(), token, EventFlags::OUT, wanted, &mut port.output_watched)?;
            }
        }
        Ok(())
    }
}

fn watch_one(
    epoll: &OwnedFd,
    fd: BorrowedFd<'_>,
    token: u64,
    flags: EventFlags,
    wanted: bool,
    watched: &mut bool,
) -> io::Result<()> {
    if wanted && !*watched {
        epoll::add(epoll, fd, EventData::new_u64(token), flags)?;
    } else if !wanted && *watched {
        epoll::delete(epoll, fd)?;
    }
    *watched = wanted;
    Ok(())
}
