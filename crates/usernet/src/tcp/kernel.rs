//! What is asked of a host socket that no safe interface offers: three socket options.
#![allow(unsafe_code, reason = "SO_PEEK_OFF, SO_MEMINFO and IP_BIND_ADDRESS_NO_PORT are not in rustix")]

use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;

/// include/uapi/asm-generic/socket.h: not in `libc`, and different on mips, parisc and sparc alone.
const SO_PEEK_OFF: libc::c_int = 42;
/// As above.
const SO_MEMINFO: libc::c_int = 55;

/// Makes the next `recv` with `MSG_PEEK` begin `offset` bytes into the receive queue (SO_PEEK_OFF in socket(7)).
/// The kernel moves the offset by itself: on by what is peeked, back by what is taken.
///
/// # Errors
/// `EOPNOTSUPP` before Linux 6.9 for TCP.
pub(super) fn set_peek_offset(socket: impl AsFd, offset: u32) -> io::Result<()> {
    let offset = libc::c_int::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok(set_option(socket, libc::SOL_SOCKET, SO_PEEK_OFF, offset)?)
}

/// Has the port chosen by connecting, not by binding to an address without one (`IP_BIND_ADDRESS_NO_PORT` in ip(7)):
/// one port then serves connections to several peers.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 4.2.
pub(super) fn set_bind_address_no_port(socket: impl AsFd) -> Result<(), Errno> {
    set_option(socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

fn set_option(
    socket: impl AsFd,
    level: libc::c_int,
    option: libc::c_int,
    value: libc::c_int,
) -> Result<(), Errno> {
    let length = mem::size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: needed for the system call. The pointer and the length describe `value`, which outlives the call, and
    // the kernel only reads it.
    let result = unsafe {
        // syscalls: setsockopt
        libc::setsockopt(socket.as_fd().as_raw_fd(), level, option, (&raw const value).cast(), length)
    };
    if result == 0 {
        Ok(())
    } else {
        Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL))
    }
}

/// How full a socket's send buffer is, in the kernel's accounting: bytes with their overhead.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct SendBuffer {
    /// How much may be queued.
    pub(super) size: u32,
    /// How much is.
    pub(super) queued: u32,
}

impl SendBuffer {
    /// What there is room for.
    pub(super) fn free(self) -> u32 {
        self.size.saturating_sub(self.queued)
    }

    /// Whether the kernel calls the socket writable (a third is free): only then no event is to come.
    pub(super) fn is_writable(self) -> bool {
        self.free() >= self.queued / 2
    }
}

/// Reads a socket's `SO_MEMINFO` (Linux 4.12).
///
/// # Errors
/// When the kernel does not have it.
pub(super) fn send_buffer(socket: impl AsFd) -> io::Result<SendBuffer> {
    const WORDS: usize = libc::SK_MEMINFO_DROPS as usize + 1;
    let mut words = [0u32; WORDS];
    let mut length = mem::size_of_val(&words) as libc::socklen_t;
    // SAFETY: needed for the system call. The pointer and the length describe `words`, which outlives the call and is
    // borrowed by nothing else; the kernel writes at most `length` bytes, and any bytes are valid words.
    let result = unsafe {
        // syscalls: getsockopt
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            SO_MEMINFO,
            (&raw mut words).cast(),
            &raw mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(SendBuffer {
        size: words[libc::SK_MEMINFO_SNDBUF as usize],
        queued: words[libc::SK_MEMINFO_WMEM_QUEUED as usize],
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use rustix::net::{RecvFlags, recv};

    use super::*;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (near, listener.accept().unwrap().0)
    }

    /// What the engine relies on and the manual does not promise: peeking moves the offset on, taking moves it back
    /// and never below nothing.
    #[test]
    fn peek_offset_follows_the_queue() {
        let (mut far, mut near) = pair();
        if set_peek_offset(&near, 0).is_err() {
            crate::tests::skip("this kernel has no SO_PEEK_OFF for TCP");
            return;
        }
        far.write_all(b"abcdefgh").unwrap();
        let mut buffer = [0; 3];
        let mut peek = |near: &TcpStream| {
            let (_, n) = recv(near, &mut buffer[..], RecvFlags::PEEK).unwrap();
            buffer[..n].to_vec()
        };
        assert_eq!(peek(&near), b"abc");
        assert_eq!(peek(&near), b"def");
        // Taken without a copy.
        let mut nowhere = [b'?'; 2];
        let (_, n) = recv(&near, &mut nowhere[..], RecvFlags::TRUNC).unwrap();
        assert_eq!((n, nowhere), (2, [b'?'; 2]));
        assert_eq!(peek(&near), b"gh");
        set_peek_offset(&near, 1).unwrap();
        assert_eq!(peek(&near), b"def");
        let mut rest = [0; 6];
        near.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"cdefgh");
    }

    #[test]
    fn send_buffer_fills() {
        let (near, _far) = pair();
        near.set_nonblocking(true).unwrap();
        let empty = send_buffer(&near).unwrap();
        assert!(empty.size > 0 && empty.is_writable());
        let block = [0; 65536];
        while (&near).write(&block).is_ok() {}
        let full = send_buffer(&near).unwrap();
        assert!(!full.is_writable());
        assert!(full.queued > 0);
    }
}
