//! Where frames come from and go to.

use std::io;
use std::os::fd::BorrowedFd;

/// The longest frame: an Ethernet header and the longest IP packet, which segmentation offload makes use of.
pub const LONGEST_FRAME: usize = 14 + 65535;

/// What is left for the receiver of a frame to do (virtio 1.2, 5.1.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Offload {
    /// The TCP or UDP checksum holds the pseudo-header's part alone.
    pub needs_checksum: bool,
    /// The frame is one TCP segment too long for the wire, or several UDP datagrams of one sender's, to be cut into pieces of
    /// this many bytes of payload.
    pub segment: Option<u16>,
}

/// What a tap can be given and can give.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Abilities {
    /// Frames to the guest may leave the checksum to it.
    pub checksum: bool,
    /// TCP frames to the guest may be longer than the MTU, over IPv4 and IPv6.
    pub segmentation: [bool; 2],
    /// UDP frames to the guest may be several datagrams, over either family.
    pub datagrams: bool,
    /// The link's MTU, without the Ethernet header.
    pub mtu: u16,
}

/// Whether a frame was taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Sent {
    /// It was.
    Yes,
    /// The guest has no room now. [`Tap::readiness`] becomes readable when it may have again.
    Full,
}

/// A link to the guest: frames both ways, never blocking.
pub trait Tap: Send {
    /// Readable when [`Self::receive`] or [`Self::send`] may do more than they did last time.
    fn readiness(&self) -> BorrowedFd<'_>;

    /// Clears the readiness, before frames are looked for.
    fn acknowledge(&mut self);

    /// What the link can do now.
    fn abilities(&self) -> Abilities;

    /// Takes the next frame from the guest into `buffer` (of [`LONGEST_FRAME`] bytes) and returns its length and
    /// what is left to do; `None` if there is none.
    ///
    /// # Errors
    /// When the link is gone.
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<(usize, Offload)>>;

    /// Gives the guest a frame, the bytes of `header` and then of `payload`. The guest need not notice it before
    /// [`Self::flush`].
    ///
    /// # Errors
    /// When the link is gone.
    fn send(&mut self, header: &[u8], payload: &[u8], offload: Offload) -> io::Result<Sent>;

    /// Lets the guest notice the frames that it was given. The engine calls it once for all frames of a turn, before it
    /// waits.
    ///
    /// # Errors
    /// When the link is gone.
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
