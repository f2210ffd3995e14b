//! The serial port: a 16550 at COM1's ports.
//!
//! The UART itself is `vm-superio`'s. Here are its place on the bus, its interrupt line, and a buffer
//! for its output: the UART hands over and flushes every byte, and a system call for each would make
//! the console the slowest part of a boot. Output goes on at a line's end, when [`Serial::flush`] is
//! called (the machine does so when a vCPU idles, so that a prompt without a newline appears), when
//! the buffer is full, and at the end.

use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;

use crate::bus::PortDevice;

/// Ports of the UART.
pub const PORTS: u16 = 8;
/// Output bytes held back at most.
const BUFFER: usize = 4096;

/// An interrupt line, edge-triggered: one call, one interrupt.
pub trait InterruptLine: Send {
    /// Requests an interrupt.
    fn trigger(&self);
}

impl<F: Fn() + Send> InterruptLine for F {
    fn trigger(&self) {
        self();
    }
}

/// [`InterruptLine`] as the UART wants it.
struct Line(Box<dyn InterruptLine>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.trigger();
        Ok(())
    }
}

/// Holds output back until there is a reason to write it; a `flush` by the UART is none.
struct Output {
    sink: Box<dyn Write + Send>,
    held: Vec<u8>,
}

impl Output {
    fn write_held(&mut self) {
        // Nobody to tell: a guest cannot be made to wait for a reader that went away.
        if let Err(error) = self.sink.write_all(&self.held).and_then(|()| self.sink.flush()) {
            tracing::debug!(%error, "serial output lost");
        }
        self.held.clear();
    }
}

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.held.extend_from_slice(data);
        if data.contains(&b'\n') || self.held.len() >= BUFFER {
            self.write_held();
        }
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        self.write_held();
    }
}

struct Uart {
    device: vm_superio::Serial<Line, vm_superio::serial::NoEvents, Output>,
    /// Input that found the receive FIFO full.
    waiting: std::collections::VecDeque<u8>,
}

impl Uart {
    /// Moves waiting input into the FIFO, as far as there is room.
    fn refill(&mut self) {
        while !self.waiting.is_empty() && self.device.fifo_capacity() > 0 {
            let (bytes, _) = self.waiting.as_slices();
            match self.device.enqueue_raw_bytes(bytes) {
                // Zero: the UART is in loopback and its input is cut off.
                Ok(0) | Err(_) => break,
                Ok(n) => drop(self.waiting.drain(..n)),
            }
        }
    }
}

/// A 16550 UART as a port device of [`PORTS`] ports.
pub struct Serial(Mutex<Uart>);

impl Serial {
    /// A serial port that interrupts through `line` and sends its output to `sink`.
    ///
    /// `line` is triggered with the port's lock held: it must not use this serial port.
    pub fn new(line: Box<dyn InterruptLine>, sink: Box<dyn Write + Send>) -> Self {
        let output = Output { sink, held: Vec::with_capacity(BUFFER) };
        Self(Mutex::new(Uart {
            device: vm_superio::Serial::new(Line(line), output),
            waiting: std::collections::VecDeque::new(),
        }))
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest input. What the UART's FIFO cannot take waits and follows as the guest reads.
    pub fn input(&self, bytes: &[u8]) {
        let mut uart = self.uart();
        uart.waiting.extend(bytes);
        uart.refill();
    }

    /// Bytes of input that the guest has not read and that wait outside the UART: a caller that
    /// reads from an endless source stops reading while this is large.
    pub fn waiting(&self) -> usize {
        self.uart().waiting.len()
    }

    /// Writes held-back output to the sink.
    pub fn flush(&self) {
        let mut uart = self.uart();
        let output = uart.device.writer_mut();
        if !output.held.is_empty() {
            output.write_held();
        }
    }
}

impl PortDevice for Serial {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let mut uart = self.uart();
        for (register, byte) in (offset..).zip(data) {
            *byte = uart.device.read(register as u8);
            if register == 0 {
                uart.refill();
            }
        }
    }

    fn write(&self, offset: u16, data: &[u8]) {
        let mut uart = self.uart();
        for (register, &byte) in (offset..).zip(data) {
            // The sink never fails and neither does the line.
            let _ = uart.device.write(register as u8, byte);
        }
        uart.refill();
    }
}

impl std::fmt::Debug for Serial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Serial").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    /// A sink that counts how often it is written to.
    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<(Vec<u8>, u32)>>);

    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            let mut inner = self.0.lock().unwrap();
            inner.0.extend_from_slice(data);
            inner.1 += 1;
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn serial() -> (Serial, Sink, Arc<AtomicU32>) {
        let sink = Sink::default();
        let interrupts = Arc::new(AtomicU32::new(0));
        let count = interrupts.clone();
        let line = move || {
            count.fetch_add(1, Ordering::Relaxed);
        };
        (Serial::new(Box::new(line), Box::new(sink.clone())), sink, interrupts)
    }

    #[test]
    fn output_is_written_by_lines() {
        let (serial, sink, _) = serial();
        for &b in b"one\ntwo\n# " {
            serial.write(0, &[b]);
        }
        assert_eq!(*sink.0.lock().unwrap(), (b"one\ntwo\n".to_vec(), 2));
        serial.flush();
        serial.flush();
        assert_eq!(*sink.0.lock().unwrap(), (b"one\ntwo\n# ".to_vec(), 3));
        serial.write(0, b"x");
        drop(serial);
        assert_eq!(sink.0.lock().unwrap().0, b"one\ntwo\n# x");
    }

    #[test]
    fn long_lines_do_not_grow_the_buffer() {
        let (serial, sink, _) = serial();
        for _ in 0..BUFFER * 3 {
            serial.write(0, b"x");
        }
        assert_eq!(sink.0.lock().unwrap().0.len(), BUFFER * 3);
    }

    #[test]
    fn input_waits_for_room_and_interrupts() {
        let (serial, _, interrupts) = serial();
        serial.write(1, &[1]); // received-data interrupt on
        let text: Vec<u8> = (0..200).collect();
        serial.input(&text);
        assert_eq!(interrupts.load(Ordering::Relaxed), 1);
        assert!(serial.waiting() > 0);
        let mut got = Vec::new();
        let mut byte = [0];
        loop {
            serial.read(5, &mut byte);
            if byte[0] & 1 == 0 {
                break;
            }
            serial.read(0, &mut byte);
            got.push(byte[0]);
        }
        assert_eq!(got, text);
        assert_eq!(serial.waiting(), 0);
    }

    #[test]
    fn a_sink_that_fails_does_not_stop_the_guest() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let serial = Serial::new(Box::new(|| ()), Box::new(Broken));
        serial.write(0, b"a");
        serial.write(0, b"\n");
        let mut lsr = [0];
        serial.read(5, &mut lsr);
        assert_ne!(lsr[0] & 0x20, 0, "transmitter empty");
    }
}
