//! The requests to a tap device (Linux, Documentation/networking/tuntap.rst; linux/if_tun.h), as safe functions.
//!
//! `rustix` and `libc` know the numbers, and cannot know that each goes with the type that is given here.

use std::ffi::c_int;
use std::os::fd::AsFd;

use rustix::io::Result;
use rustix::ioctl::{IntegerSetter, Opcode, Setter, Updater, ioctl};

const SET_INTERFACE: Opcode = libc::TUNSETIFF as Opcode;
const GET_INTERFACE: Opcode = libc::TUNGETIFF as Opcode;
const SET_OFFLOAD: Opcode = libc::TUNSETOFFLOAD as Opcode;
const SET_HEADER_SIZE: Opcode = libc::TUNSETVNETHDRSZ as Opcode;

/// An interface's name and flags: `struct ifreq`, whose other members the requests here leave alone.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Interface {
    /// Ends with a zero byte.
    pub(super) name: [u8; libc::IFNAMSIZ],
    pub(super) flags: u16,
    rest: [u8; size_of::<libc::ifreq>() - libc::IFNAMSIZ - size_of::<u16>()],
}

impl Interface {
    pub(super) fn new(name: [u8; libc::IFNAMSIZ], flags: u16) -> Self {
        Self { name, flags, rest: [0; _] }
    }
}

/// Makes the interface, or attaches to it (`TUNSETIFF`). What it is called then is in `interface`.
#[allow(unsafe_code, reason = "an ioctl")]
pub(super) fn set_interface(tun: impl AsFd, interface: &mut Interface) -> Result<()> {
    // Declared as taking an int; the kernel copies an ifreq in and out (drivers/net/tun.c).
    // SAFETY: `Interface` has an ifreq's size and layout, and any bytes are one.
    unsafe { ioctl(tun, Updater::<SET_INTERFACE, Interface>::new(interface)) }
}

/// Which interface it is (`TUNGETIFF`).
#[allow(unsafe_code, reason = "an ioctl")]
pub(super) fn interface(tun: impl AsFd) -> Result<Interface> {
    let mut interface = Interface::new([0; _], 0);
    // SAFETY: the kernel writes an ifreq, whose size and layout `Interface` has.
    unsafe { ioctl(tun, Updater::<GET_INTERFACE, Interface>::new(&mut interface))? };
    Ok(interface)
}

/// What the frames that are read may leave to the reader (`TUNSETOFFLOAD`).
#[allow(unsafe_code, reason = "an ioctl")]
pub(super) fn set_offload(tun: impl AsFd, flags: u32) -> Result<()> {
    // SAFETY: the argument is a number, not a pointer.
    unsafe { ioctl(tun, IntegerSetter::<SET_OFFLOAD>::new_usize(flags as usize)) }
}

/// How long the header before each frame is (`TUNSETVNETHDRSZ`).
#[allow(unsafe_code, reason = "an ioctl")]
pub(super) fn set_header_size(tun: impl AsFd, bytes: c_int) -> Result<()> {
    // SAFETY: the kernel reads an int.
    unsafe { ioctl(tun, Setter::<SET_HEADER_SIZE, c_int>::new(bytes)) }
}

const _: () = assert!(size_of::<Interface>() == size_of::<libc::ifreq>());
