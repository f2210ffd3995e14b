//! Protection keys in the guest: Linux finds them, gives them to programs, and keeps PKRU for each thread and in
//! signal frames. The host need not have them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::ffi::c_void;
use std::fs;
use std::ptr;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering::SeqCst};

use libc::{MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_EXEC, PROT_READ, PROT_WRITE};
use support::kernels::kernels;
use support::process::{boot, run_the_guests_side};

/// `si_code` of a SIGSEGV that a protection key is the reason of.
const SEGV_PKUERR: i32 = 4;
/// Where `si_pkey` lies in a `siginfo_t`.
const SI_PKEY: usize = 32;
/// Where XSTATE_BV lies in an XSAVE area.
const XSTATE_BV: usize = 512;
/// PKRU's state component.
const PKRU_COMPONENT: u32 = 9;
/// Rights in PKRU: access disable and write disable.
const NO_ACCESS: u32 = 1;
const NO_WRITE: u32 = 2;
const PAGE: usize = 4096;

#[test]
fn programs_have_protection_keys() {
    let Some(kernels) = kernels() else { return };
    for (kernel, cpus) in [(kernels.older(), "1"), (kernels.newer(), "2")] {
        boot(run_the_guests_side(kernel, &["--cpus", cpus])).expect(0);
    }
}

#[test]
#[ignore = "runs in the guest of another test"]
fn the_guests_side() {
    linux_has_found_them();
    // SAFETY: needed to see SIGSEGV; the handler is a C function of three arguments that only uses atomics and
    // its own frame.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_fault as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()), 0);
    }
    let key = allocate();
    let page = keyed_page(key);
    forbidden_accesses_raise_sigsegv(key, page);
    the_kernel_obeys_them_too(key, page);
    threads_have_rights_of_their_own(key, page);
    memory_can_be_for_execution_only();
}

fn linux_has_found_them() {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap();
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap();
    for flag in ["pku", "ospke"] {
        assert!(flags.split_whitespace().any(|f| f == flag), "no {flag} in {flags}");
    }
}

// ---- keys and PKRU ----

fn allocate() -> u32 {
    // SAFETY: needed for a system call that libc does not wrap everywhere; it touches no memory.
    let key = unsafe { libc::syscall(libc::SYS_pkey_alloc, 0, 0) };
    assert!((1..16).contains(&key), "{key}: {}", std::io::Error::last_os_error());
    key as u32
}

/// A page to read and write that has `key`.
fn keyed_page(key: u32) -> *mut u64 {
    // SAFETY: needed for memory that nothing else uses, never freed.
    unsafe {
        let page = map(PROT_READ | PROT_WRITE);
        let result = libc::syscall(libc::SYS_pkey_mprotect, page, PAGE, PROT_READ | PROT_WRITE, key);
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        page.cast()
    }
}

fn map(protection: i32) -> *mut c_void {
    // SAFETY: needed for memory of its own; the kernel chooses the address.
    let page = unsafe { libc::mmap(ptr::null_mut(), PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) };
    assert_ne!(page, MAP_FAILED);
    page
}

fn rdpkru() -> u32 {
    let value: u32;
    // SAFETY: needed to read PKRU; Linux has turned it on.
    unsafe { asm!("rdpkru", in("ecx") 0, out("eax") value, out("edx") _, options(nomem, nostack)) };
    value
}

/// Sets what this thread may not do to pages with `key`.
fn set_rights(key: u32, rights: u32) {
    let value = rdpkru() & !(3 << (2 * key)) | rights << (2 * key);
    // SAFETY: needed to write PKRU; `key` is not the one of the program's own memory. A barrier for the compiler.
    unsafe { asm!("wrpkru", in("eax") value, in("ecx") 0, in("edx") 0, options(nostack)) };
}

fn rights(key: u32) -> u32 {
    rdpkru() >> (2 * key) & 3
}

// ---- the signal handler ----

static FAULTS: AtomicU32 = AtomicU32::new(0);
static CODE: AtomicI32 = AtomicI32::new(0);
static KEY: AtomicU32 = AtomicU32::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static RIGHTS_IN_HANDLER: AtomicU32 = AtomicU32::new(0);

/// Notes the fault, and gives all rights for its key to the interrupted program, so that the access succeeds.
unsafe extern "C" fn on_fault(_: i32, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: needed to read what the kernel passed; SIGSEGV with this code has an address and a key, and the
    // frame holds an XSAVE area in the standard format, with PKRU where CPUID says.
    unsafe {
        let key = info.byte_add(SI_PKEY).cast::<u32>().read();
        if FAULTS.fetch_add(1, SeqCst) > 100 || (*info).si_code != SEGV_PKUERR || key > 15 {
            libc::abort();
        }
        CODE.store((*info).si_code, SeqCst);
        KEY.store(key, SeqCst);
        ADDRESS.store((*info).si_addr() as u64, SeqCst);
        RIGHTS_IN_HANDLER.store(rights(key), SeqCst);
        let area = (*context.cast::<libc::ucontext_t>()).uc_mcontext.fpregs.cast::<u8>();
        let offset = __cpuid_count(0xd, PKRU_COMPONENT).ebx as usize;
        *area.add(offset).cast::<u32>() &= !(3 << (2 * key));
        *area.add(XSTATE_BV).cast::<u64>() |= 1 << PKRU_COMPONENT;
    }
}

/// How many faults `access` raises; each must be for `key` at `address`.
fn faults(key: u32, address: *const u64, access: impl FnOnce()) -> u32 {
    let before = FAULTS.load(SeqCst);
    access();
    let count = FAULTS.load(SeqCst) - before;
    if count > 0 {
        assert_eq!(CODE.load(SeqCst), SEGV_PKUERR);
        assert_eq!((KEY.load(SeqCst), ADDRESS.load(SeqCst)), (key, address as u64));
    }
    count
}

// ---- what is tested ----

fn forbidden_accesses_raise_sigsegv(key: u32, page: *mut u64) {
    // SAFETY: needed for accesses that the compiler does not look into; `page` is mapped and nobody else's.
    let (read, write) = (|| unsafe { page.read_volatile() }, |value| unsafe { page.write_volatile(value) });
    for round in 1..20_u64 {
        set_rights(key, 0);
        assert_eq!(faults(key, page, || write(round)), 0);
        set_rights(key, NO_WRITE);
        assert_eq!(faults(key, page, || assert_eq!(read(), round)), 0);
        assert_eq!(faults(key, page, || write(round + 1)), 1);
        // The handler ran with the rights of a new program, and gave rights through the signal frame.
        assert_eq!((RIGHTS_IN_HANDLER.load(SeqCst), rights(key)), (NO_ACCESS, 0));
        set_rights(key, NO_ACCESS);
        assert_eq!(faults(key, page, || assert_eq!(read(), round + 1)), 1);
    }
}

fn the_kernel_obeys_them_too(key: u32, page: *mut u64) {
    let (_reader, writer) = std::io::pipe().unwrap();
    let fd = std::os::fd::AsRawFd::as_raw_fd(&writer);
    for (right, expected) in [(NO_ACCESS, -1), (NO_WRITE, 8)] {
        set_rights(key, right);
        // SAFETY: needed to hand the kernel an address that it cannot read; nothing is written to it.
        let written = unsafe { libc::write(fd, page.cast(), 8) };
        let error = std::io::Error::last_os_error().raw_os_error();
        assert_eq!(written, expected);
        assert!(written == 8 || error == Some(libc::EFAULT), "{error:?}");
    }
}

fn threads_have_rights_of_their_own(key: u32, page: *mut u64) {
    let address = page as usize;
    std::thread::scope(|scope| {
        for own in [NO_WRITE, 0, NO_WRITE | NO_ACCESS, NO_ACCESS] {
            scope.spawn(move || {
                set_rights(key, own);
                for _ in 0..300 {
                    std::thread::yield_now();
                    assert_eq!(rights(key), own);
                    if own & NO_ACCESS == 0 {
                        // SAFETY: needed for an access that must not fault; all threads only read.
                        unsafe { (address as *const u64).read_volatile() };
                    }
                }
            });
        }
    });
}

/// Linux makes such memory with a key of its own.
fn memory_can_be_for_execution_only() {
    const RET: u8 = 0xc3;
    let page = map(PROT_READ | PROT_WRITE);
    // SAFETY: needed to run code in memory of this test; it is one RET, which a C function may be.
    unsafe {
        page.cast::<u8>().write_volatile(RET);
        assert_eq!(libc::mprotect(page, PAGE, PROT_EXEC), 0);
        std::mem::transmute::<*mut c_void, extern "C" fn()>(page)();
    }
    let before = FAULTS.load(SeqCst);
    // SAFETY: needed for a read that faults, and succeeds after the handler has given the right.
    assert_eq!(unsafe { page.cast::<u8>().read_volatile() }, RET);
    assert_eq!(FAULTS.load(SeqCst), before + 1);
    assert_eq!((CODE.load(SeqCst), ADDRESS.load(SeqCst)), (SEGV_PKUERR, page as u64));
}
