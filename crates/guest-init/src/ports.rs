//! The virtio console ports: found by name in sysfs, opened as character devices.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use guest_init::control::FromGuest;
use guest_init::spec::{Spec, Stream, ports};
use rustix::event::{PollFd, PollFlags, poll};

use crate::error::{Error, Result};

/// How long the ports may take to appear. The driver makes them from a work queue after the module is loaded.
const PATIENCE: Duration = Duration::from_secs(60);

/// The ports that this run uses.
pub(crate) struct Ports {
    /// The control port.
    pub(crate) control: Control,
    /// The ports of standard input, output and error, where the spec asks for them.
    pub(crate) streams: [Option<Port>; 3],
}

/// One open port, non-blocking.
pub(crate) struct Port {
    /// The character device.
    pub(crate) file: fs::File,
    /// The device takes one buffer list as one descriptor, however many pages it has: see `relay`.
    pub(crate) indirect: bool,
}

impl Ports {
    /// Waits for the ports and opens them.
    pub(crate) fn open(spec: &Spec) -> Result<Self> {
        let control = Control { file: wait_for(ports::CONTROL)?.file };
        control.send(&FromGuest::Stage("init".into()))?;
        let names = [ports::STDIN, ports::STDOUT, ports::STDERR];
        let mut streams = [None, None, None];
        for ((slot, stream), name) in streams.iter_mut().zip(spec.streams).zip(names) {
            if stream == Stream::Port {
                *slot = Some(wait_for(name)?);
            }
        }
        Ok(Self { control, streams })
    }
}

fn wait_for(name: &'static str) -> Result<Port> {
    let start = Instant::now();
    // Opening as root needs no probing of the device node: devtmpfs makes it before the name shows in sysfs.
    loop {
        if let Some(port) = find(name)? {
            return Ok(port);
        }
        if start.elapsed() > PATIENCE {
            return Err(Error::NoPort(name));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn find(name: &str) -> Result<Option<Port>> {
    let Ok(entries) = fs::read_dir("/sys/class/virtio-ports") else { return Ok(None) };
    for entry in entries.flatten() {
        let Ok(found) = fs::read_to_string(entry.path().join("name")) else { continue };
        if found.trim_end() != name {
            continue;
        }
        let node = Path::new("/dev").join(entry.file_name());
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&node)
            .map_err(Error::io("cannot open console port", &node))?;
        rustix::io::ioctl_fionbio(&file, true).map_err(Error::errno("cannot prepare console port", &node))?;
        // One character per feature bit, bit 0 first; VIRTIO_RING_F_INDIRECT_DESC is 28 (virtio 1.2, 6).
        let features = fs::read(entry.path().join("device/features")).unwrap_or_default();
        return Ok(Some(Port { file, indirect: features.get(28) == Some(&b'1') }));
    }
    Ok(None)
}

/// The control port: lines to and from the host.
pub(crate) struct Control {
    file: fs::File,
}

impl Control {
    /// Sends one message, waiting for room.
    pub(crate) fn send(&self, message: &FromGuest) -> Result<()> {
        let line = format!("{message}\n");
        let mut rest = line.as_bytes();
        while !rest.is_empty() {
            match (&self.file).write(rest) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(&self.file, PollFlags::OUT)];
                    poll(&mut fds, None).map_err(Error::errno("cannot wait for", "the control port"))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("cannot write to", "the control port")(error)),
            }
        }
        Ok(())
    }

    /// Reads what the host has sent; `WouldBlock` when that is nothing.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
