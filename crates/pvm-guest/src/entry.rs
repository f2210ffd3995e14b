//! The entry points, in assembly, and the event handler of supervisor mode.

use core::arch::global_asm;
use core::mem::offset_of;

use crate::abi::{Frame, Pvcs, rflags, vector};
use crate::cpu::{self, Cpu, Event, Registers};
use crate::insn;

global_asm!(
    include_str!("entry.s"),
    supervisor_event = sym supervisor_event,
    L_REGISTERS = const cpu::L_REGISTERS,
    L_RESUME_RSP = const cpu::L_RESUME_RSP,
    L_TARGET = const cpu::L_TARGET,
    L_ENTRY_RCX = const cpu::L_ENTRY_RCX,
    L_ENTRY_R11 = const cpu::L_ENTRY_R11,
    L_ENTRY_FLAGS = const cpu::L_ENTRY_FLAGS,
    L_PVCS = const cpu::L_PVCS,
    P_VECTOR = const offset_of!(Pvcs, event_vector),
    P_EFLAGS = const offset_of!(Pvcs, eflags),
    P_RIP = const offset_of!(Pvcs, rip),
    P_RSP = const offset_of!(Pvcs, rsp),
    P_RCX = const offset_of!(Pvcs, rcx),
    P_R11 = const offset_of!(Pvcs, r11),
    R_RAX = const offset_of!(Registers, rax),
    R_RBX = const offset_of!(Registers, rbx),
    R_RCX = const offset_of!(Registers, rcx),
    R_RDX = const offset_of!(Registers, rdx),
    R_RSI = const offset_of!(Registers, rsi),
    R_RDI = const offset_of!(Registers, rdi),
    R_RBP = const offset_of!(Registers, rbp),
    R_RSP = const offset_of!(Registers, rsp),
    R_R8 = const offset_of!(Registers, r8),
    R_R9 = const offset_of!(Registers, r9),
    R_R10 = const offset_of!(Registers, r10),
    R_R11 = const offset_of!(Registers, r11),
    R_R12 = const offset_of!(Registers, r12),
    R_R13 = const offset_of!(Registers, r13),
    R_R14 = const offset_of!(Registers, r14),
    R_R15 = const offset_of!(Registers, r15),
    R_RIP = const offset_of!(Registers, rip),
    R_RFLAGS = const offset_of!(Registers, rflags),
    R_EXIT_RSP = const offset_of!(Registers, exit_rsp),
);
global_asm!(include_str!("bytes.s"));
global_asm!(include_str!("supervisor.s"));
global_asm!(include_str!("user.s"));

/// A label of the assembly files. Not to be called: it is code for [`Cpu::run`] or [`Cpu::enter`], or a place in it.
pub type Code = unsafe extern "C" fn();

/// Declares labels.
macro_rules! labels {
    ($($name:ident)+) => {
        unsafe extern "C" {
            $(pub(crate) fn $name();)+
        }
    };
}

pub(crate) use labels;

labels! { event_entry syscall_entry retu rets snippet_abandoned }

/// The code of `supervisor.s`.
pub(crate) mod supervisor {
    labels! {
        s_nothing s_ud2 s_divide s_load s_store s_store_after s_call s_int3 s_int3_after s_red_zone
        s_int3_then_flags s_int4 s_int21 s_step s_stepped s_noncanonical s_rdmsr s_wrmsr s_synthetic_cpuid
        s_hypercall s_hypercall_after s_load_gs s_pushf s_popf s_cli s_sti s_hlt s_in s_out s_sgdt s_sidt s_sldt
        s_str s_smsw s_lgdt s_lidt s_lldt s_invlpg s_wbinvd s_clts s_get_cr0 s_set_cr0 s_get_cr2 s_set_cr2
        s_get_cr3 s_set_cr3 s_get_cr4 s_set_cr4 s_get_dr7 s_set_dr7 s_get_dr6 s_set_dr6 s_get_dr0 s_set_dr0
        s_lar s_lsl s_verr s_verw s_load_ds s_get_cs s_sysenter s_rdpkru s_wrpkru s_load_with_keys
    }
}

/// The code of `user.s`.
pub(crate) mod user {
    labels! {
        u_syscall u_syscall_after u_int3 u_int3_after u_int4 u_int80 u_int80_after u_int21 u_ud2 u_hlt u_synthetic_cpuid u_cli u_sti
        u_in u_rdmsr u_wrmsr u_get_cr3 u_swapgs u_sysenter u_divide u_load u_store u_jump u_spin u_pushf u_popf
        u_step u_stepped u_gsbase u_set_fsbase u_selectors u_keys u_load_fs u_x87 u_sse u_sum u_return
        u32_int80 u32_int80_after u32_int3 u32_store u32_sysenter u32_load_gs u32_load_fs u32_spin
    }
}

mod raw {
    use super::Registers;
    unsafe extern "C" {
        pub(super) fn run_user(registers: *mut Registers) -> u64;
        pub(super) fn run_supervisor(registers: *mut Registers) -> u64;
    }
}

/// Runs the user program that the PVCS and `registers` describe; whether it ended with a system call.
pub(crate) fn run_user(registers: &mut Registers) -> bool {
    // SAFETY: needed as ERETU leaves for user mode; the C convention is kept, by the stubs and by a hypervisor that gives
    // back RSP as it was. User mode reaches no memory of the kernel's.
    unsafe { raw::run_user(registers) == 1 }
}

/// Runs supervisor code; whether it was given up.
pub(crate) fn run_supervisor(registers: &mut Registers) -> bool {
    // SAFETY: needed to give code any registers, and to take it back from a fault. The stubs keep the C convention;
    // the code is this crate's own (`supervisor.s`) and writes where its registers say, which is what the check wants.
    unsafe { raw::run_supervisor(registers) == 1 }
}

/// What the stubs have pushed, from the lowest address on.
#[repr(C)]
#[derive(Debug)]
#[expect(missing_docs, reason = "the names are the registers'")]
pub struct Trap {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rbp: u64,
    pub rdi: u64,
    pub rsi: u64,
    pub rdx: u64,
    pub rcx: u64,
    pub rbx: u64,
    pub rax: u64,
    /// 1 for the entry of vectors from 32 on.
    pub kind: u64,
    pub entry_rflags: u64,
    /// For ERETS.
    pub frame: Frame,
}

impl Trap {
    /// What is to be kept of it.
    pub(crate) fn event(&self, pvcs: &Pvcs) -> Event {
        let interrupt = self.kind == 1;
        let frame_at = &raw const self.frame as u64;
        Event {
            interrupt,
            vector: self.frame.vector,
            error: self.frame.errcode,
            cr2: pvcs.cr2,
            event_flags: pvcs.event_flags,
            // The frame of an interrupt is the stub's, not the hypervisor's.
            entry_rsp: if interrupt { frame_at + size_of::<Frame>() as u64 } else { frame_at },
            entry_rcx: self.rcx,
            entry_r11: self.r11,
            entry_rflags: self.entry_rflags,
            frame: self.frame,
            dr6: if self.frame.vector == vector::DB { insn::dr6() } else { 0 },
        }
    }

    /// Has ERETS go to where [`run_supervisor`] says that the code was given up.
    pub(crate) fn abandon(&mut self, registers: u64, resume_rsp: u64) {
        let values = Registers {
            rax: self.rax,
            rbx: self.rbx,
            rcx: self.frame.rcx,
            rdx: self.rdx,
            rsi: self.rsi,
            rdi: self.rdi,
            rbp: self.rbp,
            rsp: self.frame.rsp,
            r8: self.r8,
            r9: self.r9,
            r10: self.r10,
            r11: self.frame.r11,
            r12: self.r12,
            r13: self.r13,
            r14: self.r14,
            r15: self.r15,
            rip: self.frame.rip,
            rflags: self.frame.rflags,
            exit_rsp: 0,
        };
        // SAFETY: `registers` is the reference that `run_supervisor` was called with, which is busy until it returns.
        unsafe { (registers as *mut Registers).write(values) };
        self.frame.rip = snippet_abandoned as *const () as u64;
        self.frame.rsp = resume_rsp;
        self.frame.rflags &= rflags::IF | rflags::FIXED;
    }
}

/// Every event in supervisor mode, from `entry.s`, which goes on as `trap` then says.
extern "C" fn supervisor_event(trap: &mut Trap) {
    let cpu = Cpu::current();
    let handled = cpu.record(trap);
    if trap.kind == 1 {
        crate::lapic::end_of_interrupt();
    }
    if handled {
        return;
    }
    match trap.frame.vector {
        // One step is enough, and the next instruction is to be executed though it has a breakpoint.
        vector::DB => trap.frame.rflags = trap.frame.rflags & !rflags::TF | rflags::RF,
        vector::NMI | vector::BP | vector::OF | 32.. => {}
        _ => match cpu.resumption() {
            Some((registers, resume_rsp)) => trap.abandon(registers, resume_rsp),
            None => {
                let cr2 = cpu.pvcs().cr2;
                panic!(
                    "processor {}: unexpected event in supervisor mode: cr2 {cr2:#x} {:#x?}",
                    cpu.number(),
                    trap.frame
                )
            }
        },
    }
}
