//! The serial port COM1, polled: where the report goes.

use core::fmt;

use crate::insn::{port_in8, port_out8};

const DATA: u16 = 0x3f8;
const LINE_CONTROL: u16 = 0x3fb;
const LINE_STATUS: u16 = 0x3fd;
/// The transmitter's holding register is empty.
const READY: u8 = 1 << 5;

/// The port. Only the first processor writes.
#[derive(Debug)]
pub struct Serial;

impl Serial {
    /// 8 data bits, no parity, 115200 baud, no interrupts.
    pub fn set_up() {
        for (port, value) in [
            (LINE_CONTROL, 0x80),
            (DATA, 1),
            (DATA + 1, 0),
            (LINE_CONTROL, 0x03),
            (DATA + 1, 0),
            (DATA + 2, 0x07),
            (DATA + 4, 0x03),
        ] {
            port_out8(port, value);
        }
    }

    fn put(byte: u8) {
        // A machine without the port reads as all ones, which is ready.
        while port_in8(LINE_STATUS) & READY == 0 {
            core::hint::spin_loop();
        }
        port_out8(DATA, byte);
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                Self::put(b'\r');
            }
            Self::put(byte);
        }
        Ok(())
    }
}

/// Writes a line to the serial port.
#[macro_export]
macro_rules! say {
    ($($arg:tt)*) => {{
        use core::fmt::Write as _;
        // Writing to the port cannot fail.
        let _ = writeln!($crate::serial::Serial, $($arg)*);
    }};
}
