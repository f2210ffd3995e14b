//! Messages on the control queues of a multiport console (virtio 1.2, section 5.3.6.2).

/// Events. Kernel header `linux/virtio_console.h`.
mod event {
    pub(super) const DEVICE_READY: u16 = 0;
    pub(super) const DEVICE_ADD: u16 = 1;
    pub(super) const PORT_READY: u16 = 3;
    pub(super) const CONSOLE_PORT: u16 = 4;
    pub(super) const RESIZE: u16 = 5;
    pub(super) const PORT_OPEN: u16 = 6;
    pub(super) const PORT_NAME: u16 = 7;
}

/// Bytes of a message without its tail: port, event, value.
pub(super) const HEADER_SIZE: usize = 8;

/// What the driver says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FromDriver {
    /// The driver is set up, or failed to be.
    DeviceReady { ok: bool },
    /// A port is set up, or failed to be.
    PortReady { port: u32, ok: bool },
    /// A program in the guest opened or closed a port.
    PortOpen { port: u32, open: bool },
}

impl FromDriver {
    /// Decodes a message; `None` for what a driver has no business to say.
    pub(super) fn decode(bytes: [u8; HEADER_SIZE]) -> Option<Self> {
        let [p0, p1, p2, p3, e0, e1, v0, v1] = bytes;
        let port = u32::from_le_bytes([p0, p1, p2, p3]);
        let set = u16::from_le_bytes([v0, v1]) != 0;
        match u16::from_le_bytes([e0, e1]) {
            event::DEVICE_READY => Some(FromDriver::DeviceReady { ok: set }),
            event::PORT_READY => Some(FromDriver::PortReady { port, ok: set }),
            event::PORT_OPEN => Some(FromDriver::PortOpen { port, open: set }),
            _ => None,
        }
    }
}

/// What the device says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum FromDevice {
    /// There is a port.
    DeviceAdd { port: u32 },
    /// A port is a console: the driver makes a terminal of it.
    ConsolePort { port: u32 },
    /// The size of a console port's terminal.
    Resize { port: u32, cols: u16, rows: u16 },
    /// The host's end of a port was opened or closed.
    PortOpen { port: u32, open: bool },
    /// The name of a port, for `/dev/virtio-ports`.
    PortName { port: u32, name: String },
}

impl FromDevice {
    /// The bytes to put in the driver's buffer.
    pub(super) fn encode(&self) -> Vec<u8> {
        let (port, event, value, tail) = match self {
            FromDevice::DeviceAdd { port } => (port, event::DEVICE_ADD, 1, Vec::new()),
            FromDevice::ConsolePort { port } => (port, event::CONSOLE_PORT, 1, Vec::new()),
            FromDevice::Resize { port, cols, rows } => {
                // The order of the specification. Drivers before 2025 took the first for the rows; those of
                // Debian's 6.1.192 and 6.12.117 do not.
                (port, event::RESIZE, 0, [cols.to_le_bytes(), rows.to_le_bytes()].concat())
            }
            FromDevice::PortOpen { port, open } => (port, event::PORT_OPEN, u16::from(*open), Vec::new()),
            FromDevice::PortName { port, name } => (port, event::PORT_NAME, 1, name.clone().into_bytes()),
        };
        let mut bytes = Vec::with_capacity(HEADER_SIZE + tail.len());
        bytes.extend_from_slice(&port.to_le_bytes());
        bytes.extend_from_slice(&event.to_le_bytes());
        bytes.extend_from_slice(&value.to_le_bytes());
        bytes.extend_from_slice(&tail);
        bytes
    }
}
