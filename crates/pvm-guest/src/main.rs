//! The PVM guest as a kernel: the library is all of it but what only a program can have.

#![no_std]
#![no_main]

use core::panic::PanicInfo;

// For its entry points, which the linker script names.
use pvm_guest as _;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    pvm_guest::die(info)
}
