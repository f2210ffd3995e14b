//! Recording a link's frames in a file, in the classic pcap format (draft-ietf-opsawg-pcap).
//!
//! A [`Capture`] writes down every frame that crosses an [`Observed`](crate::observed::Observed) tap. The queues of one link
//! share it. Frames are kept in memory until the engine has done a turn ([`Observer::flush`]) or there
//! are `BUFFERED` bytes of them, so the file is never more than a turn behind.
//!
//! Frames are recorded as the engine handles them: those to be cut into segments by the receiver are longer than the
//! link's MTU, and their checksums may be left to be filled in.
//!
//! A disk that is full or fails does not end the network: it is said so in the log, now and then, and frames are left out of the
//! file, always whole ones.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use usernet::tap::Sent;

use crate::observed::Observer;

/// Microseconds in time stamps, and the byte order of the rest.
const MAGIC: u32 = 0xa1b2_c3d4;
const VERSION: [u16; 2] = [2, 4];
/// No frame is cut: more than [`usernet::tap::LONGEST_FRAME`].
const SNAP_LENGTH: u32 = 262_144;
const LINKTYPE_ETHERNET: u32 = 1;

/// Bytes that are kept in memory before they are written.
const BUFFERED: usize = 256 << 10;
/// Bytes that are kept at most while the file takes none.
const MOST_BUFFERED: usize = 1 << 20;
/// How often a failing disk is complained about.
const PERIOD: Duration = Duration::from_secs(10);

/// A pcap file that is being written.
#[derive(Debug)]
pub struct Capture<W: Write = File> {
    state: Mutex<State<W>>,
}

#[derive(Debug)]
struct State<W> {
    file: W,
    /// What is not in the file yet.
    buffer: VecDeque<u8>,
    /// Frames left out because there was no room.
    left_out: u64,
    complained: Option<Instant>,
}

impl Capture {
    /// Makes the file, or empties it. Nobody but its owner may read a file that is new.
    ///
    /// # Errors
    /// It cannot be made or written.
    pub fn create(path: &Path) -> io::Result<Arc<Self>> {
        Self::new(OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?)
    }
}

impl<W: Write> Capture<W> {
    /// Records to anything that can be written.
    ///
    /// # Errors
    /// The file's header cannot be written.
    pub fn new(mut file: W) -> io::Result<Arc<Self>> {
        let mut header = Vec::with_capacity(24);
        header.extend(MAGIC.to_ne_bytes());
        header.extend(VERSION.iter().flat_map(|number| number.to_ne_bytes()));
        // The time zone and the accuracy of time stamps, which nobody uses.
        header.extend([0; 8]);
        header.extend(SNAP_LENGTH.to_ne_bytes());
        header.extend(LINKTYPE_ETHERNET.to_ne_bytes());
        file.write_all(&header)?;
        let state = State { file, buffer: VecDeque::new(), left_out: 0, complained: None };
        Ok(Arc::new(Self { state: Mutex::new(state) }))
    }

    fn state(&self) -> MutexGuard<'_, State<W>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records a frame, the bytes of `header` and then of `payload`, as of now.
    pub fn record(&self, header: &[u8], payload: &[u8]) {
        // syscalls: clock_gettime
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let length = header.len() + payload.len();
        let mut state = self.state();
        if state.buffer.len() + 16 + length > MOST_BUFFERED {
            state.left_out += 1;
            return;
        }
        // The format's seconds end in 2106.
        let seconds = u32::try_from(now.as_secs()).unwrap_or(u32::MAX);
        let length = u32::try_from(length).unwrap_or(u32::MAX);
        for number in [seconds, now.subsec_micros(), length, length] {
            state.buffer.extend(number.to_ne_bytes());
        }
        state.buffer.extend(header);
        state.buffer.extend(payload);
        if state.buffer.len() >= BUFFERED {
            state.write();
        }
    }

    /// Writes what is kept in memory.
    pub fn flush(&self) {
        self.state().write();
    }
}

impl<W: Write> State<W> {
    fn write(&mut self) {
        while !self.buffer.is_empty() {
            // syscalls: write
            match self.file.write(self.buffer.as_slices().0) {
                Ok(0) => return self.complain(&io::ErrorKind::WriteZero.into()),
                Ok(written) => drop(self.buffer.drain(..written.min(self.buffer.len()))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return self.complain(&error),
            }
        }
    }

    fn complain(&mut self, error: &io::Error) {
        if self.complained.is_some_and(|at| at.elapsed() < PERIOD) {
            return;
        }
        self.complained = Some(Instant::now());
        let left_out = self.left_out;
        tracing::warn!("cannot write the captured frames: {error}; {left_out} of them are left out so far");
    }
}

impl<W: Write> Drop for Capture<W> {
    fn drop(&mut self) {
        self.flush();
    }
}

impl<W: Write + Send> Observer for Arc<Capture<W>> {
    fn received(&self, frame: &[u8]) {
        self.record(frame, &[]);
    }

    fn sent(&self, header: &[u8], payload: &[u8], sent: Sent) {
        if sent == Sent::Yes {
            self.record(header, payload);
        }
    }

    fn flush(&self) {
        Capture::flush(self);
    }
}

#[cfg(test)]
mod tests {
    use usernet::tap::{Offload, Tap};
    use usernet::testing;

    use super::*;
    use crate::observed::Observed;

    /// A file that takes `room` bytes, in small pieces.
    #[derive(Debug, Default)]
    struct Disk {
        content: Vec<u8>,
        room: usize,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.room).min(1000);
            if taken == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.room -= taken;
            self.content.extend(&bytes[..taken]);
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// The frames of a file, which must be well-formed.
    fn frames(mut file: &[u8]) -> Vec<Vec<u8>> {
        fn take<'a>(file: &mut &'a [u8], length: usize) -> &'a [u8] {
            let (taken, rest) = file.split_at(length);
            *file = rest;
            taken
        }
        fn word(file: &mut &[u8]) -> u32 {
            u32::from_ne_bytes(take(file, 4).try_into().unwrap())
        }
        assert_eq!(word(&mut file), 0xa1b2_c3d4);
        assert_eq!(take(&mut file, 4), [2u16.to_ne_bytes(), 4u16.to_ne_bytes()].concat());
        take(&mut file, 8);
        assert_eq!((word(&mut file), word(&mut file)), (262_144, 1));
        let mut frames = Vec::new();
        while !file.is_empty() {
            let (seconds, micros) = (word(&mut file), word(&mut file));
            assert!(seconds > 1_600_000_000 && micros < 1_000_000);
            let (kept, length) = (word(&mut file), word(&mut file));
            assert_eq!(kept, length);
            frames.push(take(&mut file, length as usize).to_vec());
        }
        frames
    }

    #[test]
    fn both_directions_are_in_the_file() {
        let path = std::env::temp_dir().join(format!("taps-pcap-{}", std::process::id()));
        let (tap, guest) = testing::tap(testing::PLAIN, 16).unwrap();
        let mut recorded = Observed::new(Box::new(tap), Capture::create(&path).unwrap());
        guest.send([1; 60]);
        let mut buffer = vec![0; usernet::tap::LONGEST_FRAME];
        recorded.acknowledge();
        assert_eq!(recorded.receive(&mut buffer).unwrap(), Some((60, Offload::default())));
        assert_eq!(recorded.send(&[2; 14], &[3; 65535], Offload::default()).unwrap(), Sent::Yes);
        recorded.flush().unwrap();
        let file = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let expected = [vec![1; 60], [vec![2; 14], vec![3; 65535]].concat()];
        assert!(frames(&file) == expected);
    }

    #[test]
    fn a_full_disk_leaves_out_whole_frames() {
        let capture = Capture::new(Disk { room: 24, ..Disk::default() }).unwrap();
        for _ in 0..2 * MOST_BUFFERED / 1016 {
            capture.record(&[0; 1000], &[]);
        }
        capture.flush();
        assert!(capture.state().left_out > 0);
        assert!(capture.state().buffer.len() <= MOST_BUFFERED);
        // Half of a frame's bytes fit, then there is room again.
        capture.state().file.room = 500;
        capture.flush();
        capture.state().file.room = usize::MAX;
        capture.flush();
        capture.record(&[7; 50], &[8; 50]);
        capture.flush();
        let frames = frames(&capture.state().file.content);
        assert_eq!(frames.last().unwrap(), &[[7; 50], [8; 50]].concat());
        assert!(frames.iter().rev().skip(1).all(|frame| *frame == [0; 1000]));
    }
}
