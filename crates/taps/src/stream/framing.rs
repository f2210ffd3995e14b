//! Frames in a stream of bytes: each is preceded by its length, four bytes, big-endian.

use std::fmt;

use usernet::tap::LONGEST_FRAME;

/// Bytes of a frame's length.
pub(super) const PREFIX: usize = 4;

/// Bytes that are received at once, several of the longest frames.
const INBOX: usize = 4 * (PREFIX + LONGEST_FRAME);

/// What a frame is preceded by.
///
/// Frames that the engine sends are never longer than [`LONGEST_FRAME`].
pub(super) fn prefix(length: usize) -> [u8; PREFIX] {
    u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes()
}

/// A length that no frame has: where the next frame begins is not known any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BadLength(pub u32);

impl fmt::Display for BadLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a frame of {} bytes, of which there can be 1 to {LONGEST_FRAME}", self.0)
    }
}

impl std::error::Error for BadLength {}

/// Bytes that were received, and not yet taken as frames.
pub(super) struct Inbox {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Inbox {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; INBOX].into(), start: 0, end: 0 }
    }

    /// Where the next bytes go. There is room for some as long as no frame is left in here.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if INBOX - self.end < PREFIX + LONGEST_FRAME {
            // Less than one frame is moved, once for several of them.
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        self.bytes.get_mut(self.end..).unwrap_or_default()
    }

    /// `count` bytes were put into [`Self::room`].
    pub(super) fn received(&mut self, count: usize) {
        self.end = self.end.saturating_add(count).min(INBOX);
    }

    /// Takes the next frame, if it has come as a whole.
    pub(super) fn take(&mut self) -> Result<Option<&[u8]>, BadLength> {
        let bytes = self.bytes.get(self.start..self.end).unwrap_or_default();
        let Some((&prefix, rest)) = bytes.split_first_chunk() else { return Ok(None) };
        let bad = BadLength(u32::from_be_bytes(prefix));
        let length = usize::try_from(bad.0).map_err(|_| bad)?;
        if length == 0 || length > LONGEST_FRAME {
            return Err(bad);
        }
        let Some(frame) = rest.get(..length) else { return Ok(None) };
        self.start += PREFIX + length;
        Ok(Some(frame))
    }
}

/// Bytes to send: whole frames, the first of which may have been sent in part.
#[derive(Default)]
pub(super) struct Outbox {
    bytes: Vec<u8>,
    sent: usize,
}

impl Outbox {
    /// The bytes that are left to send.
    pub(super) fn left(&self) -> &[u8] {
        self.bytes.get(self.sent..).unwrap_or_default()
    }

    /// Adds bytes at the end.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The first `count` bytes of [`Self::left`] were sent.
    pub(super) fn sent(&mut self, count: usize) {
        self.sent = self.sent.saturating_add(count);
        if self.sent >= self.bytes.len() {
            self.bytes.clear();
            self.sent = 0;
        }
    }
}
