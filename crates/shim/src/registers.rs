//! Registers of a device that a program has mapped: nothing is mapped there, and each access is caught.
//!
//! The kernel says where it faulted by SIGSEGV. The instruction is done on the device's file instead (`vfio::doors::registers`), and
//! the program goes on behind it. It was in its own code, so no lock of ours or of its allocator's is held by this thread.
//! What is not ours goes to the program's handler ([`wanted`]), whether it was there before or came later: `sigaction` and
//! `signal` tell it to us instead of the kernel from then on.

#![allow(unsafe_code, reason = "a signal handler: what it is told are pointers")]

use core::{
    ffi::{c_int, c_void},
    mem::MaybeUninit,
    slice,
};
use std::sync::Arc;

use iommufd::process::UserAddr;
use vfio::doors::{DeviceFile, registers};

use crate::{errno, inside, mapped, real};

mod stack;
pub(crate) mod wanted;

/// What a mapping of registers holds.
#[derive(Debug)]
pub(crate) struct Mapped {
    /// Whose they are.
    pub device: Arc<DeviceFile>,
    /// Where the mapping begins in the device's file.
    pub offset: u64,
    /// Where it begins in memory.
    pub base: usize,
}

/// The order of the general registers' numbers, as they are named in a signal's context.
const GENERAL: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// The longest instruction.
const LONGEST: usize = 15;
const PAGE: usize = 4096;

/// Catches accesses from now on.
pub(crate) fn catch() {
    wanted::catch(install);
}

/// Puts our handler in its place: what was there before.
fn install() -> Option<wanted::Action> {
    let mut before = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: needed because accesses of what is not there are only told by a signal. Both structures are whole (of zeroes, but
    // for the fields that are set), and the handler is a function of this library, which is never unloaded.
    unsafe {
        let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = fault;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        let done = real::sigaction()(libc::SIGSEGV, &raw const action, before.as_mut_ptr());
        (done == 0).then(|| wanted::Action::from(&before.assume_init()))
    }
}

/// Whether all of `length` bytes at `at` are mapped registers.
pub(crate) fn are(at: UserAddr, length: u64) -> bool {
    let (Ok(mut from), Some(past)) = (usize::try_from(at.0), at.0.checked_add(length)) else { return false };
    while (from as u64) < past {
        match mapped::at(from) {
            Some((end, held)) if held.is::<Mapped>() => from = end,
            _ => return false,
        }
    }
    true
}

extern "C" fn fault(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives both, and they are this handler's until it returns.
    let (address, sent) = unsafe { ((*info).si_addr() as usize, (*info).si_code <= 0) };
    // Not while this thread is in the library, which accesses no registers, and may hold a lock that would be asked for.
    let ours = !sent && !inside::is();
    let access = || {
        let (_, held) = mapped::at(address)?;
        let mapping = held.downcast_ref::<Mapped>()?;
        let offset = mapping.offset.checked_add((address - mapping.base) as u64)?;
        // SAFETY: as above.
        let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
        inside::run(|| instead(mapping, offset, registers))
    };
    let done = if ours { errno::preserved(|| stack::on_another(access)) } else { None };
    if done.is_none() {
        pass_on(signal, info, context.cast(), sent);
    }
}

/// Does the instruction that faulted.
fn instead(mapping: &Mapped, offset: u64, gregs: &mut [i64; 23]) -> Option<()> {
    let rip = *gregs.get(libc::REG_RIP as usize)? as u64;
    let mut program = registers::Registers { rip, ..Default::default() };
    for (value, index) in program.general.iter_mut().zip(GENERAL) {
        *value = *gregs.get(index as usize)? as u64;
    }
    // What follows the instruction may be on a page that is not there; the instruction itself is.
    let to_page = PAGE - rip as usize % PAGE;
    let tried = [to_page.min(LONGEST), LONGEST].into_iter().any(|length| {
        // SAFETY: needed to see what the program wanted; the processor has read the instruction, and what is read here is on its
        // first page, or the instruction goes on on the next, when it is none with what is on the first.
        let code = unsafe { slice::from_raw_parts(rip as *const u8, length) };
        registers::access(&mapping.device, offset, code, &mut program).is_ok()
    });
    if !tried {
        return None;
    }
    for (value, index) in program.general.iter().zip(GENERAL) {
        *gregs.get_mut(index as usize)? = *value as i64;
    }
    *gregs.get_mut(libc::REG_RIP as usize)? = program.rip as i64;
    Some(())
}

/// What is not ours is the program's: it has what it asked for, and without a handler the end that the signal is by itself.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut libc::ucontext_t, sent: bool) {
    let action = wanted::now();
    if matches!(action.handler, libc::SIG_DFL | libc::SIG_IGN) {
        if sent && action.handler == libc::SIG_IGN {
            return;
        }
        end(signal, sent);
        return;
    }
    if action.flags & libc::SA_RESETHAND != 0 {
        wanted::exchange(Some(wanted::Action { handler: libc::SIG_DFL, ..action }));
    }
    let itself = if action.flags & libc::SA_NODEFER == 0 { wanted::bit(signal) } else { 0 };
    block(action.mask | itself);
    // SAFETY: needed because the program had a handler; it is called with what the kernel gave, as it asked for, and with the
    // signals blocked that it named. Returning from our own handler gives the thread its mask again.
    unsafe {
        if action.flags & libc::SA_SIGINFO != 0 {
            let handler = core::mem::transmute::<
                usize,
                extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void),
            >(action.handler);
            handler(signal, info, context.cast());
        } else {
            core::mem::transmute::<usize, extern "C" fn(c_int)>(action.handler)(signal);
        }
    }
}

/// Blocks the signals of a mask of the kernel's.
fn block(mask: u64) {
    for signal in (1..=64).filter(|signal| mask & wanted::bit(*signal) != 0) {
        let mut set = MaybeUninit::<libc::sigset_t>::zeroed();
        // SAFETY: needed because masks are C structures. The set is whole, of zeroes, which the first call makes an empty set.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), signal);
            libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), core::ptr::null_mut());
        }
    }
}

/// What the signal does by itself: the access is made again without a handler, or the signal is sent once more.
fn end(signal: c_int, sent: bool) {
    // SAFETY: needed so that a mistake of the program ends it as ever. The structure is whole: zeroes are the default action.
    unsafe {
        let action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
        real::sigaction()(signal, &raw const action, core::ptr::null_mut());
        if sent {
            libc::raise(signal);
        }
    }
}
