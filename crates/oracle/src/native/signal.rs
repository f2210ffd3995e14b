//! The way back: signals.

use std::arch::naked_asm;
use std::io;
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use libc::{c_int, c_void, sigaction, siginfo_t, sigset_t, stack_t, ucontext_t};

use super::enter::{Context, leave};

/// The signals that exceptions become.
const EXCEPTIONS: [c_int; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP];
/// Enough for a signal frame with all of AVX-512 and AMX.
const STACK: usize = 256 << 10;
/// gregs of general registers by encoding.
const GREGS: [c_int; 16] = [
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

/// The context of the running case, or null.
static RUNNING: AtomicPtr<Context> = AtomicPtr::new(ptr::null_mut());

/// From now until [`expect_none`] an exception belongs to `context`.
pub(super) fn expect(context: &mut Context) {
    RUNNING.store(context, Ordering::SeqCst);
}

/// From now on an exception is the host's own.
pub(super) fn expect_none() {
    RUNNING.store(ptr::null_mut(), Ordering::SeqCst);
}

/// The handlers, the signal stack and the signal mask; dropping restores what was there.
pub(super) struct Signals {
    actions: Vec<(c_int, sigaction)>,
    mask: sigset_t,
    stack: stack_t,
    /// What `sigaltstack` points to.
    memory: Vec<u8>,
}

impl Signals {
    /// Installs them for this process and thread.
    pub(super) fn install() -> io::Result<Self> {
        let memory = vec![0u8; STACK];
        // SAFETY: needed to start from zeros, as the system calls want it; all three are plain data.
        let (mut stack, mut mask, mut blocked): (stack_t, sigset_t, sigset_t) =
            unsafe { (std::mem::zeroed(), std::mem::zeroed(), std::mem::zeroed()) };
        let own = stack_t { ss_sp: memory.as_ptr() as *mut c_void, ss_flags: 0, ss_size: STACK };
        // SAFETY: needed to handle signals while RSP is the case's; `memory` lives until the old stack is
        // set again.
        if unsafe { libc::sigaltstack(&own, &mut stack) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // Another handler would run on the case's stack: those signals wait.
        // SAFETY: needed to know and change the thread's mask and the process's handlers; the pointers are to
        // live objects, and the new handler is an `extern "C"` function that takes three arguments.
        unsafe {
            libc::sigemptyset(&mut blocked);
            for signal in 1..=libc::SIGRTMAX() {
                let mut action: sigaction = std::mem::zeroed();
                if !EXCEPTIONS.contains(&signal)
                    && libc::sigaction(signal, ptr::null(), &mut action) == 0
                    && action.sa_sigaction != libc::SIG_DFL
                    && action.sa_sigaction != libc::SIG_IGN
                {
                    libc::sigaddset(&mut blocked, signal);
                }
            }
            libc::pthread_sigmask(libc::SIG_BLOCK, &blocked, &mut mask);
        }
        let mut signals = Self { actions: Vec::new(), mask, stack, memory };
        for signal in EXCEPTIONS {
            // SAFETY: as above.
            unsafe {
                let mut action: sigaction = std::mem::zeroed();
                let mut old: sigaction = std::mem::zeroed();
                action.sa_sigaction = handler_entry as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigfillset(&mut action.sa_mask);
                if libc::sigaction(signal, &action, &mut old) != 0 {
                    // What is installed so far goes when `signals` is dropped.
                    return Err(io::Error::last_os_error());
                }
                signals.actions.push((signal, old));
            }
        }
        Ok(signals)
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        debug_assert_eq!(self.memory.len(), STACK);
        // SAFETY: needed to restore what `install` replaced; the pointers are to live objects.
        unsafe {
            for (signal, action) in &self.actions {
                libc::sigaction(*signal, action, ptr::null_mut());
            }
            libc::pthread_sigmask(libc::SIG_SETMASK, &self.mask, ptr::null_mut());
            libc::sigaltstack(&self.stack, ptr::null_mut());
        }
    }
}

/// What the kernel calls. A case may have set RFLAGS.AC, with which compiled code faults.
#[unsafe(naked)]
unsafe extern "C" fn handler_entry(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    naked_asm!(
        "pushfq",
        "and dword ptr [rsp], {not_ac}",
        "popfq",
        "jmp {handler}",
        not_ac = const !(1i32 << 18),
        handler = sym handler,
    )
}

/// Takes the case's registers out of the signal frame and puts in those that lead out of `enter`.
unsafe extern "C" fn handler(signal: c_int, _info: *mut siginfo_t, context: *mut c_void) {
    let running = RUNNING.load(Ordering::SeqCst);
    // SAFETY: needed to reach the signal frame, which the kernel made and passed to this handler alone;
    // `running` is null or the context that `enter` is using on this thread, which does nothing else meanwhile.
    unsafe {
        let ucontext = &mut *context.cast::<ucontext_t>();
        let gregs = &mut ucontext.uc_mcontext.gregs;
        if running.is_null() || ucontext.uc_mcontext.fpregs.is_null() {
            // The host's own fault: happen again, with the default action.
            let mut action: sigaction = std::mem::zeroed();
            action.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &action, ptr::null_mut());
            return;
        }
        let running = &mut *running;
        for (value, &greg) in running.gpr.iter_mut().zip(&GREGS) {
            *value = gregs[greg as usize] as u64;
        }
        running.rip = gregs[libc::REG_RIP as usize] as u64;
        running.rflags = gregs[libc::REG_EFL as usize] as u64;
        running.trap_number = gregs[libc::REG_TRAPNO as usize] as u64;
        running.error_code = gregs[libc::REG_ERR as usize] as u64;
        running.address = gregs[libc::REG_CR2 as usize] as u64;
        let frame = ucontext.uc_mcontext.fpregs.cast::<u8>();
        ptr::copy_nonoverlapping(frame, running.xsave.as_mut_ptr(), running.xsave.len());

        // The host's floating-point environment: FCW, FSW, tags, MXCSR.
        frame.cast::<u16>().write(0x37f);
        frame.add(2).cast::<u16>().write(0);
        frame.add(4).write(0);
        frame.add(24).cast::<u32>().write(0x1f80);
        gregs[libc::REG_RIP as usize] = leave as *const () as i64;
        gregs[libc::REG_RSP as usize] = running.host_rsp as i64;
        gregs[libc::REG_EFL as usize] = 0x202;
        // CS in the low word, SS in the high one; GS and FS between them are not restored.
        let selectors = &mut gregs[libc::REG_CSGSFS as usize];
        *selectors = *selectors & 0x0000_ffff_ffff_0000 | 0x33 | 0x2b << 48;
    }
}
