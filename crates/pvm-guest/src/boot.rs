//! From the loader to the kernel's own place.
//!
//! # Theory of operation
//! `boot.s` brings both boot protocols to `boot_main` in 64-bit supervisor mode, where the image is loaded, with
//! relocations applied for that place. Here the kernel finds out what it runs on ([`identify`]), and turns the machine
//! off unless that is a PVM hypervisor of the right generation. If it is, the kernel builds page tables that map it
//! behind the first address of the allowed range, applies its relocations again for that place, goes there, and never
//! comes back.

use core::arch::global_asm;
use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::identify::{self, Host};
use crate::memory::{self, Physical, place};
use crate::paging::{self, Tree};
use crate::{insn, say};

global_asm!(include_str!("boot.s"), boot_main = sym boot_main, options(att_syntax));

unsafe extern "C" {
    fn relocate(delta: u64);
    fn jump_up(function: u64, stack: u64) -> !;
    static boot_stack_top: u8;
}

/// What the loader said.
#[derive(Clone, Copy, Debug)]
pub struct Loader {
    /// By PVH; else by the 64-bit Linux protocol.
    pub pvh: bool,
    /// Where the RSDP is, or zero.
    pub rsdp: u64,
}

static RSDP: AtomicU64 = AtomicU64::new(0);
static PROTOCOL: AtomicU64 = AtomicU64::new(0);
static KERNEL_ROOT: AtomicU64 = AtomicU64::new(0);

const CMDLINE_SIZE: usize = 1024;

struct Cmdline(UnsafeCell<[u8; CMDLINE_SIZE]>);

// SAFETY: written once, before there is a second processor or any reader.
unsafe impl Sync for Cmdline {}

static CMDLINE: Cmdline = Cmdline(UnsafeCell::new([0; CMDLINE_SIZE]));
static CMDLINE_LENGTH: AtomicUsize = AtomicUsize::new(0);

/// What the loader said, as far as it matters later.
pub fn loader() -> Loader {
    Loader { pvh: PROTOCOL.load(Ordering::Relaxed) == 1, rsdp: RSDP.load(Ordering::Relaxed) }
}

/// The value of `key=` on the command line.
pub fn option(key: &str) -> Option<&'static str> {
    // SAFETY: not written after `keep`, which has run before anything else.
    let bytes = unsafe { &*CMDLINE.0.get() };
    let text = core::str::from_utf8(bytes.get(..CMDLINE_LENGTH.load(Ordering::Relaxed))?).ok()?;
    text.split_ascii_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
}

/// Copies what the loader left in memory that will be used for something else.
fn keep(protocol: u64, info: u64) {
    let word = |at: u64| memory::read::<u32>(Physical(at));
    let long = |at: u64| memory::read::<u64>(Physical(at));
    let (cmdline, rsdp) = if protocol == 1 {
        // hvm_start_info: cmdline_paddr, rsdp_paddr (Xen's `start_info.h`).
        (long(info + 24), long(info + 32))
    } else {
        // boot_params: hdr.cmd_line_ptr and ext_cmd_line_ptr, acpi_rsdp_addr (Linux's `bootparam.h`).
        (u64::from(word(info + 0xc8)) << 32 | u64::from(word(info + 0x228)), long(info + 0x70))
    };
    RSDP.store(rsdp, Ordering::Relaxed);
    PROTOCOL.store(protocol, Ordering::Relaxed);
    if cmdline == 0 {
        return;
    }
    // SAFETY: the only reference; nobody reads yet.
    let place = unsafe { &mut *CMDLINE.0.get() };
    let mut length = 0;
    for (n, byte) in (0..).zip(place.iter_mut()) {
        *byte = memory::read(Physical(cmdline + n));
        if *byte == 0 {
            break;
        }
        length += 1;
    }
    CMDLINE_LENGTH.store(length, Ordering::Relaxed);
}

/// The first Rust code.
extern "C" fn boot_main(protocol: u64, info: u64) -> ! {
    crate::serial::Serial::set_up();
    keep(protocol, info);
    let range = match identify::host() {
        Host::Generation1 { range } => range,
        Host::Other(why) => {
            say!("pvm-guest: this machine is not a PVM hypervisor of generation 1: {why}");
            say!("pvm-guest: FAIL");
            crate::acpi::power_off(loader().rsdp);
        }
    };
    move_to(first_address(range))
}

/// The first upper-half address that `range`, MSR_PVM_LINEAR_ADDRESS_RANGE, allows.
fn first_address(range: u64) -> u64 {
    0xffff << 48 | (range & 0x1ff) << 39
}

fn move_to(base: u64) -> ! {
    paging::make_boot_tables();
    let tree = paging::make_kernel_tree(base);
    KERNEL_ROOT.store(tree.root(), Ordering::Relaxed);
    let delta = base + place::IMAGE;
    // SAFETY: needed to be where PVM wants us. The boot root maps the first 4 GiB one to one, as the loader's tables did
    // as far as anything was used, and the kernel behind `base`. Addresses in memory are the new place's from then on,
    // which is mapped too, so that the few instructions until the jump may use either. The stack's top is the image's own.
    unsafe {
        insn::set_cr3(paging::boot_root());
        relocate(delta);
        memory::moved_to(base);
        let up = |address: u64| if address >= base { address } else { address + delta };
        jump_up(up(moved as *const () as u64), up(&raw const boot_stack_top as u64))
    }
}

/// Goes on where the kernel belongs.
extern "C" fn moved() -> ! {
    let tree = Tree::of_root(KERNEL_ROOT.load(Ordering::Relaxed));
    crate::kernel_main(tree)
}
