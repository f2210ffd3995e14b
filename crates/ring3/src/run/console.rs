//! The guest's serial console on the host: shown with `-v`, and its last lines kept for when things go wrong.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Lines kept.
const KEPT: usize = 24;
/// A longer line is cut: the guest chooses its length.
const LONGEST: usize = 512;

/// How a kernel says why it gives up.
const PANIC: &str = "Kernel panic - not syncing";

/// The last lines of a console.
#[derive(Debug, Default)]
pub struct Tail {
    lines: VecDeque<String>,
    /// The first line with [`PANIC`], once it is no longer among the last: a trace has pushed it out.
    panic: Option<String>,
    partial: Vec<u8>,
}

impl Tail {
    /// Takes the next bytes. Control characters are dropped: the lines are shown on the user's terminal.
    pub fn push(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&self.partial);
                let line: String = line.chars().filter(|c| !c.is_control()).collect();
                self.partial.clear();
                if self.lines.len() == KEPT
                    && let Some(oldest) = self.lines.pop_front()
                    && self.panic.is_none()
                    && oldest.contains(PANIC)
                {
                    self.panic = Some(oldest);
                }
                self.lines.push_back(line);
            } else if self.partial.len() < LONGEST {
                self.partial.push(byte);
            }
        }
    }

    /// The lines kept, oldest first, an unfinished one last; before them the reason of a panic.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        let partial = String::from_utf8_lossy(&self.partial);
        let partial: String = partial.chars().filter(|c| !c.is_control()).collect();
        self.panic
            .iter()
            .chain(&self.lines)
            .cloned()
            .chain((!partial.is_empty()).then_some(partial))
            .collect()
    }
}

/// The host end of the serial port.
#[derive(Debug)]
pub struct Console {
    tail: Arc<Mutex<Tail>>,
    reader: JoinHandle<()>,
}

impl Console {
    /// Starts to read a console; returns also the descriptor that the machine writes to.
    ///
    /// # Errors
    /// When no pipe or thread can be made.
    pub fn start(shown: bool) -> io::Result<(Self, OwnedFd)> {
        let (reader, writer) = io::pipe()?;
        let tail = Arc::new(Mutex::new(Tail::default()));
        let kept = Arc::clone(&tail);
        let reader = std::thread::Builder::new()
            .name("console".into())
            .spawn(move || read(File::from(OwnedFd::from(reader)), shown, &kept))?;
        Ok((Self { tail, reader }, writer.into()))
    }

    /// The last lines. With `ended`, the machine has closed its end, and everything it wrote is waited for.
    #[must_use]
    pub fn lines(self, ended: bool) -> Vec<String> {
        if ended {
            // It ends at end of file and does not panic.
            let _ = self.reader.join();
        }
        self.tail.lock().unwrap_or_else(PoisonError::into_inner).lines()
    }
}

fn read(mut pipe: File, shown: bool, tail: &Mutex<Tail>) {
    let mut buffer = [0; 4096];
    loop {
        let bytes = match pipe.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => buffer.get(..count).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        tail.lock().unwrap_or_else(PoisonError::into_inner).push(bytes);
        if shown {
            // A closed standard error must not stop the guest.
            let _ = io::stderr().lock().write_all(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_clean() {
        let mut tail = Tail::default();
        for i in 0..100 {
            tail.push(format!("line\x1b[31m {i}\r\n").as_bytes());
        }
        tail.push(&[b'x'; 10_000]);
        let lines = tail.lines();
        assert_eq!(lines.len(), KEPT + 1);
        assert_eq!(lines[0], "line[31m 76");
        assert_eq!(lines[KEPT].len(), LONGEST);
    }

    #[test]
    fn the_reason_of_a_panic_is_not_lost_in_its_trace() {
        let mut tail = Tail::default();
        tail.push(b"[1.0] Kernel panic - not syncing: tired\n");
        for i in 0..100 {
            tail.push(format!("frame {i}\n").as_bytes());
        }
        let lines = tail.lines();
        assert_eq!((lines.len(), lines[0].as_str()), (KEPT + 1, "[1.0] Kernel panic - not syncing: tired"));
        assert_eq!(lines[1], "frame 76");
    }

    #[test]
    fn everything_written_is_there_at_the_end() {
        let (console, writer) = Console::start(false).unwrap();
        File::from(writer).write_all(b"one\ntwo").unwrap();
        assert_eq!(console.lines(true), ["one", "two"]);
    }
}
