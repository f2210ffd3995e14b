//! A virtual processor: its PVCS, its MSRs, and running code on it in either mode.
//!
//! # Theory of operation
//! The checks are straight code in supervisor mode. [`Cpu::run`] runs a piece of supervisor code with given registers
//! and says which fault ended it; [`Cpu::enter`] runs a user program and comes back with the event or system call that
//! ended it, and the PVCS as that left it. What happens to supervisor mode meanwhile, interrupts and exceptions
//! that are resumed from, is in a log ([`Cpu::events`]).

use core::cell::{Cell, UnsafeCell};
use core::mem::offset_of;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};

use crate::abi::{Pvcs, PvmMsr, event_flags, hypercall, msr, rflags, selector, x86_msr};
use crate::entry::{self, Code, Trap};
use crate::insn;
use crate::memory::{Physical, physical};
use crate::paging::Tree;

/// How many processors the kernel uses at most.
pub const MAX: usize = 2;
/// Bytes below RSP that events in supervisor mode leave alone: those that Rust's code uses.
pub const REDZONE: u64 = 128;

/// General registers, RIP and RFLAGS, as `entry.s` loads and stores them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[expect(missing_docs, reason = "the names are the registers'")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rbp: u64,
    pub rsp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
    /// RSP at the ERETU that entered user mode.
    pub exit_rsp: u64,
}

/// An event in supervisor mode.
#[derive(Clone, Copy, Debug, Default)]
pub struct Event {
    /// It came by the entry for vectors from 32 on.
    pub interrupt: bool,
    /// The vector.
    pub vector: u32,
    /// What is in the error code's place.
    pub error: u32,
    /// PVCS::cr2.
    pub cr2: u64,
    /// PVCS::event_flags at entry.
    pub event_flags: u64,
    /// RSP at entry.
    pub entry_rsp: u64,
    /// RCX at entry.
    pub entry_rcx: u64,
    /// R11 at entry.
    pub entry_r11: u64,
    /// RFLAGS at entry.
    pub entry_rflags: u64,
    /// The interrupted state, from the stack or (interrupts) from the PVCS.
    pub frame: crate::abi::Frame,
    /// DR6, for #DB.
    pub dr6: u64,
}

/// The events of one run, the first few of them.
#[derive(Clone, Copy, Debug)]
pub struct Events {
    count: usize,
    first: [Event; Log::SIZE],
}

impl Events {
    /// How many there were.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Number `n`, from 0; an empty one if there was none.
    pub fn get(&self, n: usize) -> Event {
        self.first.get(n).copied().filter(|_| n < self.count).unwrap_or_default()
    }

    /// The vectors, up to four of them, one byte each from the lowest byte on; 0xff in the byte behind the last.
    pub fn vectors(&self) -> u64 {
        (0..4.min(self.count))
            .fold(!0 << (8 * 4.min(self.count)), |sum, n| sum | u64::from(self.get(n).vector) << (8 * n))
            & 0xff_ffff_ffff
    }
}

#[derive(Debug)]
struct Log {
    count: AtomicUsize,
    events: [Cell<Event>; Log::SIZE],
}

impl Log {
    const SIZE: usize = 8;
}

/// What a check does in the event handler, instead of the usual. Returns whether the trap was its own.
pub type Hook = fn(&Cpu, &mut Trap) -> bool;

/// What the processor finds at its GS base in supervisor mode. The first fields are `entry.s`'s.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Local {
    /// Where [`entry::run_supervisor`]'s caller keeps its registers.
    pub(crate) registers: Cell<u64>,
    /// RSP to go on with when the code is given up.
    pub(crate) resume_rsp: Cell<u64>,
    pub(crate) target: Cell<u64>,
    pub(crate) entry_rcx: Cell<u64>,
    pub(crate) entry_r11: Cell<u64>,
    pub(crate) entry_flags: Cell<u64>,
    pub(crate) pvcs: Cell<u64>,
    /// A fault ends the run instead of the kernel.
    pub(crate) armed: Cell<bool>,
    hook: Cell<Option<Hook>>,
    note: Cell<u64>,
    log: Log,
    cpu: Cpu,
}

#[repr(C, align(4096))]
struct PvcsPage(UnsafeCell<Pvcs>);

/// A processor.
#[derive(Debug)]
pub struct Cpu {
    number: usize,
    /// Its CR3 and the other, as it was set up.
    roots: [AtomicU64; 2],
}

// SAFETY: each element belongs to the processor of its number. The cells are touched by that processor only (on it the
// event handler and what it interrupts take turns); roots are atomic; the PVCS is reached by volatile accesses.
unsafe impl Sync for Local {}
// SAFETY: as above.
unsafe impl Sync for PvcsPage {}

static PVCS: [PvcsPage; 2 * MAX] = [const { PvcsPage(UnsafeCell::new(EMPTY)) }; 2 * MAX];
const EMPTY: Pvcs = Pvcs {
    event_flags: 0,
    event_errcode: 0,
    event_vector: 0,
    cr2: 0,
    reserved0: [0; 5],
    user_cs: 0,
    user_ss: 0,
    reserved1: 0,
    reserved2: 0,
    user_gsbase: 0,
    eflags: 0,
    pkru: 0,
    rip: 0,
    rsp: 0,
    rcx: 0,
    r11: 0,
};

static LOCAL: [Local; MAX] = [local(0), local(1)];

const fn local(number: usize) -> Local {
    const NO_EVENT: Event = Event {
        interrupt: false,
        vector: 0,
        error: 0,
        cr2: 0,
        event_flags: 0,
        entry_rsp: 0,
        entry_rcx: 0,
        entry_r11: 0,
        entry_rflags: 0,
        frame: crate::abi::Frame {
            errcode: 0,
            vector: 0,
            rip: 0,
            cs: 0,
            rflags: 0,
            rsp: 0,
            ss: 0,
            rcx: 0,
            r11: 0,
        },
        dr6: 0,
    };
    Local {
        registers: Cell::new(0),
        resume_rsp: Cell::new(0),
        target: Cell::new(0),
        entry_rcx: Cell::new(0),
        entry_r11: Cell::new(0),
        entry_flags: Cell::new(0),
        pvcs: Cell::new(0),
        armed: Cell::new(false),
        hook: Cell::new(None),
        note: Cell::new(0),
        log: Log { count: AtomicUsize::new(0), events: [const { Cell::new(NO_EVENT) }; Log::SIZE] },
        cpu: Cpu { number, roots: [AtomicU64::new(0), AtomicU64::new(0)] },
    }
}

/// Offsets for `entry.s`.
pub(crate) const L_REGISTERS: usize = offset_of!(Local, registers);
pub(crate) const L_RESUME_RSP: usize = offset_of!(Local, resume_rsp);
pub(crate) const L_TARGET: usize = offset_of!(Local, target);
pub(crate) const L_ENTRY_RCX: usize = offset_of!(Local, entry_rcx);
pub(crate) const L_ENTRY_R11: usize = offset_of!(Local, entry_r11);
pub(crate) const L_ENTRY_FLAGS: usize = offset_of!(Local, entry_flags);
pub(crate) const L_PVCS: usize = offset_of!(Local, pvcs);

/// Where a user program is, and its stack: everything in user space lies below 1 GiB.
pub mod user_space {
    /// The user programs.
    pub const CODE: u64 = 0x40_0000;
    /// Pages for data; the stack is the first of them.
    pub const DATA: u64 = 0x50_0000;
    /// How many.
    pub const DATA_PAGES: u64 = 4;
    /// Top of the stack.
    pub const STACK_TOP: u64 = DATA + 0x1000;
    /// Nothing is here until a check maps it.
    pub const TEST: u64 = 0x60_0000;
}

/// A user program about to run.
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are the registers'")]
pub struct User {
    pub registers: Registers,
    pub cs: u16,
    pub ss: u16,
    pub gs_base: u64,
    pub pkru: u32,
    pub eflags: u32,
}

impl User {
    /// `code`, of `user.s`, with zero registers and a stack.
    pub fn at(code: Code) -> Self {
        let registers =
            Registers { rip: user_address(code), rsp: user_space::STACK_TOP, ..Registers::default() };
        let flags = rflags::IF as u32 | rflags::FIXED as u32;
        Self { registers, cs: selector::USER_CS, ss: selector::USER_DS, gs_base: 0, pkru: 0, eflags: flags }
    }

    /// The same in 32-bit mode.
    pub fn compat(code: Code) -> Self {
        Self { cs: selector::USER32_CS, ..Self::at(code) }
    }
}

/// Where a label of `user.s` is in user space.
pub fn user_address(code: Code) -> u64 {
    physical(code as *const u8).0 - crate::paging::user_programs().start + user_space::CODE
}

/// Where a label of the kernel is.
pub fn address(code: Code) -> u64 {
    code as usize as u64
}

/// How a user program ended.
#[derive(Clone, Copy, Debug)]
pub struct Exit {
    /// By SYSCALL; else by an event.
    pub syscall: bool,
    /// General registers as user mode left them; RSP, RCX, R11, RIP and RFLAGS as supervisor mode was entered with.
    pub registers: Registers,
    /// The PVCS.
    pub pvcs: Pvcs,
}

impl Exit {
    /// The vector; [`Self::SYSCALL`] for a system call.
    pub fn vector(&self) -> u32 {
        if self.syscall { Self::SYSCALL } else { self.pvcs.event_vector }
    }

    /// For comparing with [`Self::vector`].
    pub const SYSCALL: u32 = 0x100;
}

impl Cpu {
    /// Processor `number`.
    pub fn by_number(number: usize) -> &'static Self {
        &LOCAL[number].cpu
    }

    /// The one that runs this.
    pub fn current() -> &'static Self {
        let base = insn::gs_base();
        let second = base == &raw const LOCAL[1] as u64;
        &LOCAL[usize::from(second)].cpu
    }

    /// Its number, from 0.
    pub fn number(&self) -> usize {
        self.number
    }

    fn local(&self) -> &'static Local {
        &LOCAL[self.number]
    }

    /// What its GS base is in supervisor mode.
    pub fn gs_base(&self) -> u64 {
        self.local() as *const Local as u64
    }

    /// The guest-physical address of its PVCS.
    pub fn pvcs_address(&self) -> Physical {
        physical(PVCS[self.number].0.get())
    }

    /// Another page that it may use as its PVCS.
    pub fn spare_pvcs_address(&self) -> Physical {
        physical(PVCS[self.number + MAX].0.get())
    }

    /// Reads the other page.
    pub fn spare_pvcs(&self) -> Pvcs {
        // SAFETY: as in `pvcs`.
        unsafe { PVCS[self.number + MAX].0.get().read_volatile() }
    }

    /// Reads the PVCS.
    pub fn pvcs(&self) -> Pvcs {
        // SAFETY: needed as the hypervisor writes it; it does so only while this processor does not run. All fields are
        // integers. The pointer is to a static.
        unsafe { PVCS[self.number].0.get().read_volatile() }
    }

    /// Writes the PVCS.
    pub fn set_pvcs(&self, value: Pvcs) {
        // SAFETY: as above.
        unsafe { PVCS[self.number].0.get().write_volatile(value) }
    }

    /// Changes the PVCS.
    pub fn change_pvcs(&self, change: impl FnOnce(&mut Pvcs)) {
        let mut pvcs = self.pvcs();
        change(&mut pvcs);
        self.set_pvcs(pvcs);
    }

    /// PVCS::event_flags.
    pub fn event_flags(&self) -> u64 {
        self.pvcs().event_flags
    }

    /// Opens or closes interrupts in supervisor mode, without telling the hypervisor.
    pub fn set_interrupt_flag(&self, open: bool) {
        self.change_pvcs(|p| {
            p.event_flags = p.event_flags & !event_flags::IF | if open { event_flags::IF } else { 0 };
        });
    }

    /// Tells the hypervisor about the PVCS, the entry points and the roots. The caller runs on this processor, in the
    /// range, with `kernel`'s root in CR3.
    pub fn set_up(&self, kernel: Tree, user: Tree) {
        self.roots[0].store(kernel.root(), Ordering::Relaxed);
        self.roots[1].store(user.root(), Ordering::Relaxed);
        let local = self.local();
        local.pvcs.set(PVCS[self.number].0.get() as u64);
        let pvcs = self.pvcs_address().0;
        for (index, value) in [
            (x86_msr::GS_BASE, self.gs_base()),
            (x86_msr::KERNEL_GS_BASE, self.gs_base()),
            (msr(PvmMsr::VcpuStruct), pvcs),
            (msr(PvmMsr::EventEntry), address(entry::event_entry)),
            (msr(PvmMsr::SupervisorRedzone), REDZONE),
            (msr(PvmMsr::RetuRip), address(entry::retu)),
            (msr(PvmMsr::RetsRip), address(entry::rets)),
            (msr(PvmMsr::SwitchCr3), user.root()),
            (x86_msr::LSTAR, address(entry::syscall_entry)),
        ] {
            let answer = insn::hypercall(hypercall::WRMSR, [index.into(), value, 0, 0]);
            assert!(answer == 0, "the hypervisor refuses {value:#x} for MSR {index:#x}: {answer:#x}");
        }
    }

    /// Its kernel root and its user root.
    pub fn roots(&self) -> [u64; 2] {
        [self.roots[0].load(Ordering::Relaxed), self.roots[1].load(Ordering::Relaxed)]
    }

    // ---- running code ----

    /// Runs supervisor code: the fault that ended it, or `None` if it came to its end. `registers` are then as it
    /// left them.
    pub fn run(&self, code: Code, registers: &mut Registers) -> Option<Event> {
        let local = self.local();
        self.clear_events();
        registers.rip = address(code);
        local.armed.set(true);
        let abandoned = entry::run_supervisor(registers);
        local.armed.set(false);
        let last = self.events().count().min(Log::SIZE).wrapping_sub(1);
        abandoned.then(|| local.log.events.get(last).map(Cell::get).unwrap_or_default())
    }

    /// [`Self::run`] with a hook in the event handler.
    pub fn run_with(&self, hook: Hook, code: Code, registers: &mut Registers) -> Option<Event> {
        self.set_hook(Some(hook));
        let fault = self.run(code, registers);
        self.set_hook(None);
        fault
    }

    /// Sets the hook in the event handler.
    pub fn set_hook(&self, hook: Option<Hook>) {
        self.local().hook.set(hook);
        // What follows may be interrupted.
        fence(Ordering::SeqCst);
    }

    /// Leaves word from a hook for the check.
    pub fn set_note(&self, note: u64) {
        self.local().note.set(note);
        fence(Ordering::SeqCst);
    }

    /// What a hook has left.
    pub fn note(&self) -> u64 {
        fence(Ordering::SeqCst);
        self.local().note.get()
    }

    /// Runs a user program to its first event or system call.
    pub fn enter(&self, user: &User) -> Exit {
        let r = &user.registers;
        self.change_pvcs(|p| {
            p.user_cs = user.cs;
            p.user_ss = user.ss;
            p.user_gsbase = user.gs_base;
            p.eflags = user.eflags;
            p.pkru = user.pkru;
            p.rip = r.rip;
            p.rsp = r.rsp;
            p.rcx = r.rcx;
            p.r11 = r.r11;
        });
        let mut registers = *r;
        let syscall = entry::run_user(&mut registers);
        Exit { syscall, registers, pvcs: self.pvcs() }
    }

    /// The events since the last [`Self::clear_events`].
    pub fn events(&self) -> Events {
        let log = &self.local().log;
        // The handler has written the log on this processor.
        fence(Ordering::Acquire);
        let mut first = [Event::default(); Log::SIZE];
        for (copy, event) in first.iter_mut().zip(&log.events) {
            *copy = event.get();
        }
        Events { count: log.count.load(Ordering::Relaxed), first }
    }

    /// Forgets the events.
    pub fn clear_events(&self) {
        self.local().log.count.store(0, Ordering::Release);
    }

    /// Waits until there have been `count` events, for so long that an interrupt cannot still be on its way.
    pub fn wait_for_events(&self, count: usize) -> bool {
        wait_until(|| self.local().log.count.load(Ordering::Acquire) >= count)
    }

    /// The event handler's part: writes the event down, and asks the hook.
    pub(crate) fn record(&self, trap: &mut Trap) -> bool {
        let local = self.local();
        let n = local.log.count.load(Ordering::Relaxed);
        if let Some(place) = local.log.events.get(n) {
            place.set(trap.event(&self.pvcs()));
        }
        local.log.count.store(n + 1, Ordering::Release);
        local.hook.get().is_some_and(|hook| hook(self, trap))
    }

    /// Whether a fault may be given up, and the registers' place and RSP for it.
    pub(crate) fn resumption(&self) -> Option<(u64, u64)> {
        let local = self.local();
        local.armed.get().then(|| (local.registers.get(), local.resume_rsp.get()))
    }
}

/// Time-stamp ticks after which waiting is in vain: seconds on any machine.
const PATIENCE: u64 = 1 << 34;

/// Waits for something; whether it came.
pub fn wait_until(mut done: impl FnMut() -> bool) -> bool {
    let start = insn::time_stamp();
    while !done() {
        if insn::time_stamp().wrapping_sub(start) > PATIENCE {
            return false;
        }
        core::hint::spin_loop();
    }
    true
}
