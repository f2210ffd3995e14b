//! The host's end of a port: reading and writing a descriptor of any kind without ever blocking.
//!
//! # Theory of operation
//!
//! The descriptors given to a console are often ones that other processes have too: standard input, output
//! and error. Setting `O_NONBLOCK` on them would change them for those processes, beyond ring3's life. So:
//!
//! - A pipe or a terminal is opened again through `/proc/self/fd`. That gives a new open file with its own
//!   flags onto the same pipe or terminal, and that one is non-blocking.
//! - Where that is refused (a pipe of another user, a socket, a pty master), each read or write first asks
//!   `poll`, and a write is no longer than `PIPE_BUF`, for which a writable pipe has room.
//! - A regular file, a block device or `/dev/null` is always ready, and epoll does not take it. It is used as
//!   it is, with its shared offset, so that `>>` and `{ a; b; } > file` work.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use fuse_backend_rs::file_buf::FileVolatileSlice;
use fuse_backend_rs::file_traits::FileReadWriteVolatile;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::queue::mark_dirty;

/// Bytes that a pipe takes without blocking once it is writable (`PIPE_BUF` of Linux).
const PIPE_BUF: usize = 4096;
/// Most pieces of one vectored read or write (`IOV_MAX` of Linux).
const IOV_MAX: usize = 1024;
/// Major number and minor number of `/dev/ptmx`: opening it again makes another pty.
const PTMX: (u32, u32) = (5, 2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Has `O_NONBLOCK`.
    NonBlocking,
    /// May block, so ask first.
    PollFirst,
    /// Never blocks for long, and epoll refuses it.
    AlwaysReady,
}

/// Which way a descriptor is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Direction {
    /// The host's bytes go to the guest.
    Input,
    /// The guest's bytes go to the host.
    Output,
}

/// One descriptor of the host, used in one direction.
#[derive(Debug)]
pub(super) struct HostFd {
    file: File,
    kind: Kind,
    direction: Direction,
}

impl HostFd {
    /// Takes over a descriptor.
    pub(super) fn new(fd: OwnedFd, direction: Direction) -> io::Result<Self> {
        let stat = fstat(&fd)?;
        let device = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
        let (fd, kind) = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile | FileType::BlockDevice | FileType::Directory => (fd, Kind::AlwaysReady),
            FileType::Fifo => reopen(fd, direction),
            FileType::CharacterDevice if rustix::termios::isatty(&fd) && device != PTMX => {
                reopen(fd, direction)
            }
            FileType::CharacterDevice if !epoll_takes(&fd)? => (fd, Kind::AlwaysReady),
            _ => (fd, Kind::PollFirst),
        };
        Ok(HostFd { file: File::from(fd), kind, direction })
    }

    /// Epoll can tell when the descriptor is ready; otherwise it always is.
    pub(super) fn pollable(&self) -> bool {
        self.kind != Kind::AlwaysReady
    }

    /// Reads into guest memory. `Ok(0)` is end of file.
    pub(super) fn read<B: BitmapSlice>(&mut self, slices: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
        self.ask()?;
        let parts = parts(slices, usize::MAX);
        let len = retry(|| self.file.read_vectored_volatile(&parts))?;
        mark_dirty(slices, len);
        Ok(len)
    }

    /// Writes from guest memory; maybe less than all.
    pub(super) fn write<B: BitmapSlice>(&mut self, slices: &[VolatileSlice<'_, B>]) -> io::Result<usize> {
        self.ask()?;
        let limit = if self.kind == Kind::PollFirst { PIPE_BUF } else { usize::MAX };
        let parts = parts(slices, limit);
        retry(|| self.file.write_vectored_volatile(&parts))
    }

    /// Fails with `WouldBlock` where a read or write might block.
    fn ask(&self) -> io::Result<()> {
        if self.kind != Kind::PollFirst {
            return Ok(());
        }
        let flags = match self.direction {
            Direction::Input => PollFlags::IN,
            Direction::Output => PollFlags::OUT,
        };
        let mut fds = [PollFd::new(&self.file, flags)];
        match poll(&mut fds, Some(&Timespec::default()))? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        }
    }
}

impl AsFd for HostFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A non-blocking open file onto the same pipe or terminal, or the old one to be polled.
fn reopen(fd: OwnedFd, direction: Direction) -> (OwnedFd, Kind) {
    let access = match direction {
        Direction::Input => OFlags::RDONLY,
        Direction::Output => OFlags::WRONLY,
    };
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    match open(format!("/proc/self/fd/{}", fd.as_raw_fd()), flags, Mode::empty()) {
        Ok(new) => (new, Kind::NonBlocking),
        Err(_) => (fd, Kind::PollFirst),
    }
}

fn epoll_takes(fd: &OwnedFd) -> io::Result<bool> {
    use rustix::event::epoll;
    let probe = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let added = epoll::add(&probe, fd, epoll::EventData::new_u64(0), epoll::EventFlags::empty());
    Ok(added != Err(rustix::io::Errno::PERM))
}

fn parts<'a, B: BitmapSlice>(slices: &[VolatileSlice<'a, B>], limit: usize) -> Vec<FileVolatileSlice<'a>> {
    let mut left = limit;
    let mut parts = Vec::with_capacity(slices.len().min(IOV_MAX));
    for slice in slices.iter().take(IOV_MAX) {
        let take = slice.len().min(left);
        let Ok(part) = slice.subslice(0, take) else { break };
        if take > 0 {
            parts.push(FileVolatileSlice::from_volatile_slice(&part));
        }
        left -= take;
    }
    parts
}

fn retry(mut io: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match io() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn nonblocking(fd: impl AsFd) -> bool {
        rustix::fs::fcntl_getfl(fd).unwrap().contains(OFlags::NONBLOCK)
    }

    #[test]
    fn a_pipe_is_nonblocking_here_and_unchanged_elsewhere() {
        let (reader, mut writer) = io::pipe().unwrap();
        let shared = reader.try_clone().unwrap();
        let mut input = HostFd::new(reader.into(), Direction::Input).unwrap();
        assert_eq!(input.kind, Kind::NonBlocking);
        assert!(nonblocking(&input));
        assert!(!nonblocking(&shared));
        let mut buffer = [0; 8];
        let slice = VolatileSlice::from(&mut buffer[..]);
        assert_eq!(input.read(&[slice]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        writer.write_all(b"abc").unwrap();
        assert_eq!(input.read(&[slice]).unwrap(), 3);
        drop(writer);
        assert_eq!(input.read(&[slice]).unwrap(), 0);
    }

    #[test]
    fn a_full_pipe_would_block_and_a_broken_one_says_so() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut output = HostFd::new(writer.into(), Direction::Output).unwrap();
        let mut data = vec![7; 1 << 20];
        let slice = VolatileSlice::from(&mut data[..]);
        let first = output.write(&[slice]).unwrap();
        assert!(first > 0 && first < 1 << 20);
        assert_eq!(output.write(&[slice]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut drained = vec![0; first];
        reader.read_exact(&mut drained).unwrap();
        drop(reader);
        assert_eq!(output.write(&[slice]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_socket_is_polled_first() {
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let mut input = HostFd::new(ours.try_clone().unwrap().into(), Direction::Input).unwrap();
        let mut output = HostFd::new(ours.into(), Direction::Output).unwrap();
        assert_eq!(input.kind, Kind::PollFirst);
        let mut buffer = vec![1; 1 << 16];
        let slice = VolatileSlice::from(&mut buffer[..]);
        assert_eq!(input.read(&[slice]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let written = loop_until_blocked(&mut output, &slice);
        assert!(written > PIPE_BUF);
        theirs.write_all(b"x").unwrap();
        assert_eq!(input.read(&[slice]).unwrap(), 1);
    }

    fn loop_until_blocked(output: &mut HostFd, slice: &VolatileSlice<'_, ()>) -> usize {
        let mut written = 0;
        loop {
            match output.write(&[*slice]) {
                Ok(len) => written += len,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    return written;
                }
            }
        }
    }

    #[test]
    fn a_terminal_is_opened_again_and_its_master_is_not() {
        use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY;
        let master = openpt(flags).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let terminal = ioctl_tiocgptpeer(&master, flags).unwrap();
        let shared = terminal.try_clone().unwrap();
        let mut input = HostFd::new(terminal, Direction::Input).unwrap();
        assert_eq!(input.kind, Kind::NonBlocking);
        assert!(!nonblocking(&shared));
        let mut buffer = [0; 8];
        let slice = VolatileSlice::from(&mut buffer[..]);
        assert_eq!(input.read(&[slice]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        rustix::io::write(&master, b"line\n").unwrap();
        assert_eq!(input.read(&[slice]).unwrap(), 5);
        let mut output = HostFd::new(shared, Direction::Output).unwrap();
        assert_eq!(output.write(&[slice]).unwrap(), 8);
        let mut master = HostFd::new(master, Direction::Input).unwrap();
        assert_eq!(master.kind, Kind::PollFirst);
        assert!(master.read(&[slice]).unwrap() > 0);
    }

    #[test]
    fn files_and_dev_null_are_always_ready() {
        let null = File::options().write(true).open("/dev/null").unwrap();
        assert!(!HostFd::new(null.into(), Direction::Output).unwrap().pollable());
        let file = File::open("/proc/self/exe").unwrap();
        assert!(!HostFd::new(file.into(), Direction::Input).unwrap().pollable());
    }
}
