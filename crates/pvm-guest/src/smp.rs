//! The second processor: how it is started, and how it is given work.
//!
//! # Theory of operation
//! INIT and start-up IPIs send it through a trampoline below 1 MiB, in real mode: PVM calls what it runs then non-PVM
//! mode, which is plain x86 until it is in 64-bit supervisor mode. It then waits for jobs in a mailbox, spinning; each job
//! is a function and gets an argument. The first processor posts one and, when it wants, waits until it is done.

use core::cell::UnsafeCell;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::abi::hypercall;
use crate::cpu::{Cpu, wait_until};
use crate::insn;
use crate::lapic::{self, command};
use crate::memory::{self, Physical, physical};
use crate::paging::{self, Tree};

/// A free page below 1 MiB that no loader keeps anything in that is still needed by now.
const TRAMPOLINE: u64 = 0x1_0000;
const STACK: usize = 64 << 10;

#[repr(C, align(16))]
struct Stack(UnsafeCell<[u8; STACK]>);
// SAFETY: only the second processor uses it, as its stack.
unsafe impl Sync for Stack {}
static AP_STACK: Stack = Stack(UnsafeCell::new([0; STACK]));

unsafe extern "C" {
    static trampoline: u8;
    static trampoline_32: u8;
    static trampoline_end: u8;
    static trampoline_gdtr: u8;
    static trampoline_jump: u8;
    static trampoline_root: u8;
    static trampoline_protected: u8;
    static trampoline_base: u8;
    static protected_mode: u8;
    static boot_gdt: u8;
    static mut ap_stack: u64;
    static mut ap_entry: u64;
}

/// A job for the second processor.
pub type Job = fn(&Cpu, u64) -> u64;

/// The roots that it is to use.
static KERNEL_ROOT: AtomicU64 = AtomicU64::new(0);
static USER_ROOT: AtomicU64 = AtomicU64::new(0);

/// The mailbox: a job's number, its address, its argument; and the number of the last job done, with its result.
static POSTED: AtomicU64 = AtomicU64::new(0);
static JOB: AtomicU64 = AtomicU64::new(0);
static ARGUMENT: AtomicU64 = AtomicU64::new(0);
static RESULT: AtomicU64 = AtomicU64::new(0);
static DONE: AtomicU64 = AtomicU64::new(0);

/// What `DONE` says as soon as the processor is up.
const UP: u64 = 1;

/// Starts the processor with this identifier; whether it came up.
pub fn start(id: u32, kernel: Tree, user: Tree) -> bool {
    KERNEL_ROOT.store(kernel.root(), Ordering::Relaxed);
    USER_ROOT.store(user.root(), Ordering::Relaxed);
    POSTED.store(UP, Ordering::Relaxed);
    let code = physical(&raw const trampoline).0..physical(&raw const trampoline_end).0;
    let offset = |label: *const u8| physical(label).0 - code.start;
    // SAFETY: the page is free memory; the two words are the trampoline's, and no other processor runs yet.
    unsafe {
        for (n, byte) in (0..).zip(code.clone()) {
            memory::write(Physical(TRAMPOLINE + n), memory::read::<u8>(Physical(byte)));
        }
        let set = |label: *const u8, value: u64| {
            memory::write(Physical(TRAMPOLINE + offset(label)), value as u32);
        };
        set(&raw const trampoline_base, TRAMPOLINE);
        set((&raw const trampoline_gdtr).wrapping_add(2), physical(&raw const boot_gdt).0);
        set(&raw const trampoline_jump, TRAMPOLINE + offset(&raw const trampoline_32));
        set(&raw const trampoline_root, paging::boot_root());
        set(&raw const trampoline_protected, physical(&raw const protected_mode).0);
        ap_stack = AP_STACK.0.get() as u64 + STACK as u64;
        ap_entry = second_main as *const () as u64;
    }
    // (Intel SDM vol. 3, 9.4.4.1. The waits of real hardware are the hypervisor's business.)
    lapic::send(id, command::INIT);
    lapic::send(id, command::STARTUP | (TRAMPOLINE >> 12) as u32);
    wait_until(|| DONE.load(Ordering::Acquire) == UP)
}

/// The second processor's kernel: at home in the range, but under the boot root and with nothing set up.
extern "C" fn second_main() -> ! {
    let (kernel, user) = (KERNEL_ROOT.load(Ordering::Relaxed), USER_ROOT.load(Ordering::Relaxed));
    insn::hypercall(hypercall::LOAD_PGTBL, [hypercall::LOAD_PGTBL_FLUSH, kernel, user, 0]);
    let cpu = Cpu::by_number(1);
    cpu.set_up(Tree::of_root(kernel), Tree::of_root(user));
    lapic::set_up();
    let mut done = UP;
    DONE.store(done, Ordering::Release);
    loop {
        if POSTED.load(Ordering::Acquire) == done {
            core::hint::spin_loop();
            continue;
        }
        done += 1;
        let job = JOB.load(Ordering::Relaxed);
        // SAFETY: `post` stored a `Job` there, before it raised the number.
        let job = unsafe { core::mem::transmute::<usize, Job>(job as usize) };
        RESULT.store(job(cpu, ARGUMENT.load(Ordering::Relaxed)), Ordering::Relaxed);
        DONE.store(done, Ordering::Release);
    }
}

/// Gives the second processor a job. The one before must be done.
pub fn post(job: Job, argument: u64) {
    JOB.store(job as usize as u64, Ordering::Relaxed);
    ARGUMENT.store(argument, Ordering::Relaxed);
    POSTED.fetch_add(1, Ordering::Release);
}

/// Waits for the job; its result, or `None` if it does not end.
pub fn wait() -> Option<u64> {
    let posted = POSTED.load(Ordering::Relaxed);
    wait_until(|| DONE.load(Ordering::Acquire) == posted).then(|| RESULT.load(Ordering::Relaxed))
}
