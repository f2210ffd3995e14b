//! The console device: a terminal and named byte streams between guest and host (virtio 1.2, section 5.3).
//!
//! # Theory of operation
//!
//! A console has ports. Port 0 is the terminal (`/dev/hvc0`), the others are streams with a name
//! (`/dev/virtio-ports/NAME`). Each has two queues, and the two control queues carry what happens to ports:
//! the driver says that a port is ready and when a program opens or closes it, the device says what the port
//! is and whether anybody is there on the host.
//!
//! One thread serves all ports. It moves bytes while it can, without blocking anywhere, and then sleeps in
//! epoll until the driver kicks a queue, a descriptor of the host becomes ready, or the window size changes:
//!
//! - **Host to guest.** Input is read only when a program has the port open and the driver has given a buffer;
//!   it is read straight into that buffer. So nothing is lost that comes early, and a guest that does not read
//!   makes the pipe full, which stops the writer on the host. At the end of file the device closes the port;
//!   the program gets what is queued and then reads 0 bytes. Only a port without output is closed: virtio
//!   knows no half-close, and a program could no longer write.
//! - **Guest to host.** A buffer goes back to the driver when all of it is written. When the host's pipe is
//!   full the buffer waits, the ring fills, and the writer in the guest sleeps. When the host's reader is gone
//!   the port is closed, and what the guest still sends is dropped.
//!
//! The host's descriptors belong to the device, not to the driver: they outlive a reset, so a driver that is
//! loaded again goes on where the stream is.

mod control;
mod host_fd;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use crate::device::{ActivateError, Activation, GuestMem, VirtioDevice, feature, read_config_bytes};
use crate::event::Event;
use crate::worker::{Stop, Worker};
use host_fd::{Direction, HostFd};
use worker::HostPort;

/// Feature bits (`linux/virtio_console.h`).
const F_SIZE: u32 = 0;
const F_MULTIPORT: u32 = 1;

/// Entries of a data queue and of a control queue.
const DATA_QUEUE_SIZE: u16 = 128;
const CONTROL_QUEUE_SIZE: u16 = 64;
/// Most ports: each has two vectors of the function's 128.
const MAX_PORTS: usize = 31;

/// Where a port leads on the host.
#[derive(Debug)]
pub enum PortEnd {
    /// Descriptors to read from and write to, each optional. They may be anything: pipes, terminals, sockets,
    /// files, `/dev/null`. Their flags are not changed. Without an output, what the guest writes is dropped.
    /// The process must ignore SIGPIPE, as Rust programs do, to learn that nobody reads any more.
    Fd {
        /// Bytes for the guest.
        input: Option<OwnedFd>,
        /// Bytes from the guest.
        output: Option<OwnedFd>,
    },
}

/// One port.
#[derive(Debug)]
pub struct PortConfig {
    /// Name in `/dev/virtio-ports` of the guest. Port 0, the console, has none.
    pub name: Option<String>,
    /// The host's end.
    pub end: PortEnd,
}

/// A console cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// No port, or too many.
    #[error("{0} console ports, from 1 to {MAX_PORTS} are possible")]
    Ports(usize),
    /// A descriptor is not usable, or the host is out of them.
    #[error("cannot use the host's end of port {port}")]
    Host {
        /// Number of the port.
        port: usize,
        /// Why not.
        source: io::Error,
    },
    /// No eventfd to be had.
    #[error("cannot create an eventfd")]
    EventFd(#[from] io::Error),
}

/// The window size, shared by the device, its thread and the handle.
#[derive(Debug)]
struct Window {
    /// Columns in the low half, rows in the high half.
    size: AtomicU32,
    changed: AtomicBool,
    event: Event,
}

impl Window {
    fn size(&self) -> (u16, u16) {
        let [c0, c1, r0, r1] = self.size.load(Ordering::SeqCst).to_le_bytes();
        (u16::from_le_bytes([c0, c1]), u16::from_le_bytes([r0, r1]))
    }
}

/// The end of the machine, shared by the device, its thread and the handle.
#[derive(Debug, Clone)]
struct Farewell {
    /// The device goes, not just its driver: what the driver left is to be written out.
    last: Arc<AtomicBool>,
    /// Not even that.
    abandon: Stop,
}

/// Tells a console about the world outside.
#[derive(Debug, Clone)]
pub struct ConsoleHandle {
    window: Arc<Window>,
    farewell: Farewell,
}

impl ConsoleHandle {
    /// What the guest left when the console is shut down need not be written: nobody is to wait for it.
    pub fn abandon(&self) {
        self.farewell.abandon.request();
    }

    /// The terminal has this size now, in characters. The guest's terminal takes it over, and programs there
    /// get SIGWINCH.
    pub fn resize(&self, cols: u16, rows: u16) {
        let size = u32::from(cols) | u32::from(rows) << 16;
        if self.window.size.swap(size, Ordering::SeqCst) != size {
            self.window.changed.store(true, Ordering::SeqCst);
            self.window.event.signal();
        }
    }
}

#[derive(Debug)]
enum Ports {
    Idle(Vec<HostPort>),
    Running(Worker<Vec<HostPort>>),
}

/// The console device. When it is shut down it first writes out what is in the transmit queues, for as long as
/// the host's ends take, unless [`ConsoleHandle::abandon`] ends that.
#[derive(Debug)]
pub struct Console {
    ports: Ports,
    farewell: Farewell,
    port_count: u32,
    queue_sizes: Vec<u16>,
    window: Arc<Window>,
}

impl Console {
    /// A console with these ports. Port 0 is the terminal.
    ///
    /// # Errors
    /// [`ConsoleError`].
    pub fn new(ports: Vec<PortConfig>) -> Result<(Self, ConsoleHandle), ConsoleError> {
        let count = ports.len();
        if count == 0 || count > MAX_PORTS {
            return Err(ConsoleError::Ports(count));
        }
        let mut host_ports = Vec::with_capacity(count);
        for (port, config) in ports.into_iter().enumerate() {
            let PortEnd::Fd { input, output } = config.end;
            let take = |fd: Option<OwnedFd>, direction| {
                fd.map(|fd| HostFd::new(fd, direction))
                    .transpose()
                    .map_err(|source| ConsoleError::Host { port, source })
            };
            host_ports.push(HostPort {
                name: config.name,
                input: take(input, Direction::Input)?,
                output: take(output, Direction::Output)?,
                connected: true,
            });
        }
        // Port 0, control, then the other ports.
        let mut queue_sizes = vec![DATA_QUEUE_SIZE, DATA_QUEUE_SIZE, CONTROL_QUEUE_SIZE, CONTROL_QUEUE_SIZE];
        queue_sizes.resize(2 * (count + 1), DATA_QUEUE_SIZE);
        let window = Arc::new(Window {
            size: AtomicU32::new(0),
            changed: AtomicBool::new(false),
            event: Event::new()?,
        });
        let farewell = Farewell { last: Arc::default(), abandon: Stop::new()? };
        let handle = ConsoleHandle { window: Arc::clone(&window), farewell: farewell.clone() };
        let port_count = u32::try_from(count).unwrap_or(u32::MAX);
        Ok((Console { ports: Ports::Idle(host_ports), farewell, port_count, queue_sizes, window }, handle))
    }
}

impl<M: GuestMem> VirtioDevice<M> for Console {
    fn device_id(&self) -> u16 {
        VIRTIO_ID_CONSOLE as u16
    }

    fn pci_class(&self) -> u32 {
        // Simple communication controller, other.
        0x07_80_00
    }

    fn name(&self) -> &str {
        "virtio-console"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        feature(F_SIZE) | feature(F_MULTIPORT)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_console_config: cols, rows, max_nr_ports, emerg_wr.
        let mut config = [0; 12];
        let (cols, rows) = self.window.size();
        config[..2].copy_from_slice(&cols.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4..8].copy_from_slice(&self.port_count.to_le_bytes());
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation<M>) -> Result<(), ActivateError> {
        let Ports::Idle(ports) = &mut self.ports else { return Ok(()) };
        let service = worker::Service::new(activation, Arc::clone(&self.window))?;
        let service = service.attach(std::mem::take(ports));
        let farewell = self.farewell.clone();
        let run = move |stop: Stop| service.run(&stop, &farewell);
        self.ports = Ports::Running(Worker::spawn("virtio-console", run)?);
        Ok(())
    }

    fn reset(&mut self) {
        let ports = std::mem::replace(&mut self.ports, Ports::Idle(Vec::new()));
        self.ports = Ports::Idle(match ports {
            Ports::Idle(ports) => ports,
            Ports::Running(worker) => worker.join().unwrap_or_default(),
        });
    }

    fn shut_down(&mut self) {
        self.farewell.last.store(true, Ordering::SeqCst);
        VirtioDevice::<M>::reset(self);
    }
}
