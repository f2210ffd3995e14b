//! A tap device: the kernel's end of the link is a network interface, ours is a descriptor.
//!
//! Each read is a frame that left the interface, each write one that arrives at it, with [`vnet`]'s header before it.
//! So large frames and open checksums go both ways: the kernel's TCP hands over segments of up to 64 kB whatever the
//! interface's MTU is, and takes them.
//!
//! **A write never waits and never finds the device full.** The kernel takes the frame through its protocols within the
//! call, up to the receiver's socket, whose TCP window or buffer is the limit there is. So [`Sent::Full`] does not
//! occur. A frame that the kernel does not want is lost, as on a wire: the interface is down (EIO), memory is short,
//! or the frame is no good (EINVAL).
//!
//! **In the other direction there is a queue**, the interface's `txqueuelen` in frames. The kernel drops what does not
//! fit; it does not tell the sender. Whoever makes the interface had better make the queue long.
//!
//! **The device belongs to the network namespace in which it was opened**, wherever the descriptor is taken then. It is
//! gone, with EBADFD, when the interface is deleted or its namespace ends.

mod ioctl;

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use usernet::tap::{Abilities, Offload, Sent, Tap};

use crate::vnet;

/// Where tap devices come from.
pub const DEVICE: &str = "/dev/net/tun";

/// What the kernel's end may leave to us: the engine computes no checksums of what it reads, and takes TCP segments of
/// any length. Congestion notification needs no care here, as segments are not cut again.
const OFFLOAD: u32 = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;

/// Likewise, several UDP datagrams in one frame (since Linux 6.2). A kernel that has these takes such frames, too.
const DATAGRAMS: u32 = libc::TUN_F_USO4 | libc::TUN_F_USO6;

/// One queue of a tap device.
#[derive(Debug)]
pub struct Tun {
    file: OwnedFd,
    abilities: Abilities,
}

/// Opens [`DEVICE`] in the present thread's network namespace.
///
/// # Errors
/// As open(2): above all that the device is not there or may not be opened.
pub fn open() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?)
}

/// What a tap device is to be like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Options<'a> {
    /// The interface's name, of at most 15 bytes. With `%d` in it, the kernel chooses the first number that is free.
    pub name: &'a str,
    /// Whether it can be attached to several times, for a queue each.
    pub multi_queue: bool,
    /// The MTU that frames to the interface keep to, without the Ethernet header.
    pub mtu: u16,
}

impl Tun {
    /// Makes `file`, fresh from [`open`], a queue of the interface, which is made if it does not exist.
    ///
    /// # Errors
    /// `InvalidInput` if the name is too long; EPERM without `CAP_NET_ADMIN` over the namespace; EBUSY if the
    /// interface has somebody else's queue, or EINVAL if it is of another kind.
    pub fn attach(file: OwnedFd, options: Options<'_>) -> io::Result<Self> {
        let mut name = [0; libc::IFNAMSIZ];
        let bytes = options.name.as_bytes();
        // The last byte stays zero.
        if bytes.len() >= name.len() {
            let message = format!("an interface's name has at most 15 bytes: {}", options.name);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        name[..bytes.len()].copy_from_slice(bytes);
        let queues = if options.multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
        ioctl::set_interface(&file, &mut ioctl::Interface::new(name, flags as u16))?;
        ioctl::set_header_size(&file, vnet::HEADER as i32)?;
        let datagrams = ioctl::set_offload(&file, OFFLOAD | DATAGRAMS).is_ok();
        if !datagrams {
            ioctl::set_offload(&file, OFFLOAD)?;
        }
        let abilities = Abilities { checksum: true, segmentation: [true; 2], datagrams, mtu: options.mtu };
        Ok(Self { file, abilities })
    }

    /// The interface's name.
    ///
    /// # Errors
    /// EBADFD when the interface is gone.
    pub fn name(&self) -> io::Result<String> {
        let name = ioctl::interface(&self.file)?.name;
        let end = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
        Ok(String::from_utf8_lossy(&name[..end]).into_owned())
    }
}

impl AsFd for Tun {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Tap for Tun {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn acknowledge(&mut self) {}

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    // syscalls(pasta): readv
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<(usize, Offload)>> {
        let mut header = [0; vnet::HEADER];
        loop {
            let mut parts = [IoSliceMut::new(&mut header), IoSliceMut::new(buffer)];
            return match rustix::io::readv(&self.file, &mut parts) {
                Ok(length) => {
                    Ok(length.checked_sub(vnet::HEADER).map(|length| (length, vnet::decode(&header))))
                }
                Err(Errno::AGAIN) => Ok(None),
                Err(Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
        }
    }

    // syscalls(pasta): writev
    fn send(&mut self, header: &[u8], payload: &[u8], offload: Offload) -> io::Result<Sent> {
        let vnet = vnet::encode(header, offload);
        let parts = [IoSlice::new(&vnet), IoSlice::new(header), IoSlice::new(payload)];
        match rustix::io::writev(&self.file, &parts) {
            Ok(_) | Err(Errno::IO | Errno::NOMEM | Errno::NOBUFS | Errno::AGAIN | Errno::INTR) => {
                Ok(Sent::Yes)
            }
            Err(Errno::INVAL) => {
                tracing::debug!("the tap device refused a frame of {} bytes", header.len() + payload.len());
                Ok(Sent::Yes)
            }
            Err(error) => Err(error.into()),
        }
    }
}
