//! The messages between a process that shares served files and the one that serves them.
//!
//! A message is a few words, bytes after them, and at most one descriptor beside them, in one packet of a SOCK_SEQPACKET
//! socket. Both ends are this library, in two processes that were one before a fork: what arrives is checked so that a broken
//! process cannot take the other with it, not against an attacker.

use std::{
    io::{IoSlice, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{BorrowedFd, OwnedFd},
};

use iommufd::{Errno, Result};
use rustix::{
    net::{
        RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
        SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
    },
    process::Pid,
};

/// How many words a message begins with.
pub(super) const WORDS: usize = 8;

/// The most bytes that one message carries; longer transfers are made in part.
pub(super) const MOST: usize = 64 << 10;

const HEADER: usize = WORDS * 8;

/// What a message asks for, or that it answers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub(super) enum Kind {
    /// The result of what was asked.
    Answer = 0,
    // From the process that shares to the one that serves.
    Ioctl = 1,
    Read = 2,
    Write = 3,
    ReadAt = 4,
    WriteAt = 5,
    Mmap = 6,
    /// The last descriptor of a file was closed.
    Close = 7,
    /// There will be another process: a socket for it.
    Fork = 8,
    /// How much is pinned on behalf of a process.
    Usage = 9,
    // The other way, while a call is served.
    /// Gives the program a new descriptor.
    Install = 16,
    /// Takes it back.
    Uninstall = 17,
    /// Which served file a descriptor is.
    Installed = 18,
    /// A descriptor itself.
    File = 19,
}

impl Kind {
    fn from_word(word: u64) -> Option<Self> {
        use Kind::*;
        [
            Answer, Ioctl, Read, Write, ReadAt, WriteAt, Mmap, Close, Fork, Usage, Install, Uninstall,
            Installed, File,
        ]
        .into_iter()
        .find(|kind| *kind as u64 == word)
    }
}

/// One message.
#[derive(Debug)]
pub(super) struct Message {
    pub kind: Kind,
    /// What they mean depends on the kind.
    pub words: [u64; WORDS - 1],
    pub bytes: Vec<u8>,
    pub descriptor: Option<OwnedFd>,
}

impl Message {
    pub(super) fn new<const N: usize>(kind: Kind, first: [u64; N]) -> Self {
        let mut words = [0; WORDS - 1];
        for (word, value) in words.iter_mut().zip(first) {
            *word = value;
        }
        Self { kind, words, bytes: Vec::new(), descriptor: None }
    }

    /// The answer that a call has: its value, or its errno.
    pub(super) fn answer(result: Result<i64>) -> Self {
        match result {
            Ok(value) => Self::new(Kind::Answer, [0, value.cast_unsigned()]),
            Err(error) => Self::new(Kind::Answer, [u64::from(error.raw_os_error().unsigned_abs())]),
        }
    }

    /// The value of an answer.
    pub(super) fn result(&self) -> Result<i64> {
        match (self.kind, self.words[0]) {
            (Kind::Answer, 0) => Ok(self.words[1].cast_signed()),
            (Kind::Answer, error) => Err(i32::try_from(error).map_or(Errno::IO, Errno::from_raw_os_error)),
            _ => Err(Errno::IO),
        }
    }
}

/// Sends `message`. EPIPE when the other process is gone.
pub(super) fn send(socket: BorrowedFd<'_>, message: &Message) -> Result<()> {
    let mut header = [0; HEADER];
    let (slots, _) = header.as_chunks_mut::<8>();
    slots[0] = (message.kind as u64).to_ne_bytes();
    for (slot, word) in slots.iter_mut().skip(1).zip(message.words) {
        *slot = word.to_ne_bytes();
    }
    let parts = [IoSlice::new(&header), IoSlice::new(&message.bytes)];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptor = message.descriptor.as_ref().map(|fd| [std::os::fd::AsFd::as_fd(fd)]);
    if let Some(descriptor) = &descriptor {
        ancillary.push(SendAncillaryMessage::ScmRights(descriptor));
    }
    loop {
        match sendmsg(socket, &parts, &mut ancillary, SendFlags::NOSIGNAL) {
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Receives a message; none at the end. With the process that sent it, if the socket tells.
pub(super) fn receive(socket: BorrowedFd<'_>) -> Result<Option<(Message, Option<Pid>)>> {
    let mut header = [0; HEADER];
    let mut bytes = vec![0; MOST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1), ScmCredentials(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(&mut bytes)];
        match recvmsg(socket, &mut parts, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::CONNRESET) => return Ok(None),
            Err(error) => return Err(error),
        }
    };
    let (mut descriptor, mut process) = (None, None);
    for part in ancillary.drain() {
        match part {
            RecvAncillaryMessage::ScmRights(fds) => descriptor = fds.last(),
            RecvAncillaryMessage::ScmCredentials(from) => process = Some(from.pid),
            _ => {}
        }
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    let (words, _) = header.as_chunks::<8>();
    let mut words = words.iter().map(|word| u64::from_ne_bytes(*word));
    let kind = words.next().and_then(Kind::from_word);
    let complete = received.bytes >= HEADER && !received.flags.contains(ReturnFlags::TRUNC);
    let (Some(kind), true) = (kind, complete) else { return Err(Errno::PROTO) };
    let words = core::array::from_fn(|_| words.next().unwrap_or(0));
    bytes.truncate(received.bytes - HEADER);
    Ok(Some((Message { kind, words, bytes, descriptor }, process)))
}
