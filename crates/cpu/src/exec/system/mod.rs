//! Privileged, mode-changing and otherwise system-level instructions.
//!
//! [`select`] is the table of contents: each instruction with its handler and, where it comes in several sizes, its
//! operand size in bytes.

mod call;
mod control;
mod debug;
mod far;
mod flag;
mod identity;
mod interrupt;
mod io;
mod operand;
mod paging;
mod segments;
mod tables;

use iced_x86::{Code, Instruction, OpKind};

use crate::fault::{Exec, Fault, fault};
use crate::flags;
use crate::insn::{Handler, Insn};
use crate::state::{CodeMode, seg};
use crate::vcpu::Vcpu;

impl Vcpu {
    /// #GP(0) unless the CPL is 0.
    pub(crate) fn require_cpl0(&self) -> Exec {
        if self.state.cpl == 0 { Ok(()) } else { fault(Fault::gp(0)) }
    }

    /// #GP(0) unless IOPL allows what CLI and STI do.
    pub(crate) fn require_iopl(&self) -> Exec {
        if self.state.cpl <= self.iopl() { Ok(()) } else { fault(Fault::gp(0)) }
    }
}

/// Chooses the handler of a system instruction.
pub(super) fn select(i: &Instruction, _mode: CodeMode, insn: &mut Insn) -> Option<Handler> {
    let (handler, size) = handler(i.code())?;
    let memory = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
    operand::describe(insn, size, memory);
    if i.has_lock_prefix() {
        // None of them can be locked.
        return Some(lock_prefix);
    }
    Some(handler)
}

/// A LOCK prefix where none may be.
fn lock_prefix(_vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    fault(Fault::ud())
}

/// An instruction of an extension that CPUID does not offer: known, so not counted as unimplemented.
pub(super) fn not_offered(_vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    fault(Fault::ud())
}

/// Nothing to do: SERIALIZE.
fn nothing(_vcpu: &mut Vcpu, _i: &Insn) -> Exec {
    Ok(())
}

/// The table.
fn handler(code: Code) -> Option<(Handler, u8)> {
    use Code as C;
    let entry: (Handler, u8) = match code {
        // Flags, halt.
        C::Cli => (flag::cli, 0),
        C::Sti => (flag::sti, 0),
        C::Clac => (flag::set_ac::<0>, 0),
        C::Stac => (flag::set_ac::<{ flags::AC }>, 0),
        C::Pushfw => (flag::pushf, 2),
        C::Pushfd => (flag::pushf, 4),
        C::Pushfq => (flag::pushf, 8),
        C::Popfw => (flag::popf, 2),
        C::Popfd => (flag::popf, 4),
        C::Popfq => (flag::popf, 8),
        C::Hlt => (flag::hlt, 0),

        // Interrupts.
        C::Int_imm8 => (interrupt::int, 0),
        C::Int3 => (interrupt::int3, 0),
        C::Int1 => (interrupt::int1, 0),
        C::Into => (interrupt::into, 0),
        C::Iretw => (interrupt::iret, 2),
        C::Iretd => (interrupt::iret, 4),
        C::Iretq => (interrupt::iret, 8),

        // Fast system calls, FS and GS.
        C::Syscall => (call::syscall, 0),
        C::Sysretd => (call::sysret, 4),
        C::Sysretq => (call::sysret, 8),
        C::Sysenter => (call::sysenter, 0),
        C::Sysexitd => (call::sysexit, 4),
        C::Sysexitq => (call::sysexit, 8),
        C::Swapgs => (call::swapgs, 0),
        C::Rdfsbase_r32 => (call::read_base::<{ seg::FS }>, 4),
        C::Rdfsbase_r64 => (call::read_base::<{ seg::FS }>, 8),
        C::Rdgsbase_r32 => (call::read_base::<{ seg::GS }>, 4),
        C::Rdgsbase_r64 => (call::read_base::<{ seg::GS }>, 8),
        C::Wrfsbase_r32 => (call::write_base::<{ seg::FS }>, 4),
        C::Wrfsbase_r64 => (call::write_base::<{ seg::FS }>, 8),
        C::Wrgsbase_r32 => (call::write_base::<{ seg::GS }>, 4),
        C::Wrgsbase_r64 => (call::write_base::<{ seg::GS }>, 8),

        // Far transfers.
        C::Call_ptr1616 => (far::direct::<true>, 2),
        C::Call_ptr1632 => (far::direct::<true>, 4),
        C::Jmp_ptr1616 => (far::direct::<false>, 2),
        C::Jmp_ptr1632 => (far::direct::<false>, 4),
        C::Call_m1616 => (far::indirect::<true>, 2),
        C::Call_m1632 => (far::indirect::<true>, 4),
        C::Call_m1664 => (far::indirect::<true>, 8),
        C::Jmp_m1616 => (far::indirect::<false>, 2),
        C::Jmp_m1632 => (far::indirect::<false>, 4),
        C::Jmp_m1664 => (far::indirect::<false>, 8),
        C::Retfw | C::Retfw_imm16 => (far::ret, 2),
        C::Retfd | C::Retfd_imm16 => (far::ret, 4),
        C::Retfq | C::Retfq_imm16 => (far::ret, 8),

        // Segment registers.
        C::Mov_Sreg_rm16 | C::Mov_Sreg_r32m16 | C::Mov_Sreg_r64m16 => (segments::mov_to_sreg, 2),
        C::Mov_rm16_Sreg => (segments::mov_from_sreg, 2),
        C::Mov_r32m16_Sreg => (segments::mov_from_sreg, 4),
        C::Mov_r64m16_Sreg => (segments::mov_from_sreg, 8),
        C::Pushw_ES | C::Pushw_CS | C::Pushw_SS | C::Pushw_DS | C::Pushw_FS | C::Pushw_GS => {
            (segments::push, 2)
        }
        C::Pushd_ES | C::Pushd_CS | C::Pushd_SS | C::Pushd_DS | C::Pushd_FS | C::Pushd_GS => {
            (segments::push, 4)
        }
        C::Pushq_FS | C::Pushq_GS => (segments::push, 8),
        C::Popw_ES | C::Popw_SS | C::Popw_DS | C::Popw_FS | C::Popw_GS => (segments::pop, 2),
        C::Popd_ES | C::Popd_SS | C::Popd_DS | C::Popd_FS | C::Popd_GS => (segments::pop, 4),
        C::Popq_FS | C::Popq_GS => (segments::pop, 8),
        C::Les_r16_m1616 => (segments::load_far_pointer::<{ seg::ES }>, 2),
        C::Les_r32_m1632 => (segments::load_far_pointer::<{ seg::ES }>, 4),
        C::Lds_r16_m1616 => (segments::load_far_pointer::<{ seg::DS }>, 2),
        C::Lds_r32_m1632 => (segments::load_far_pointer::<{ seg::DS }>, 4),
        C::Lss_r16_m1616 => (segments::load_far_pointer::<{ seg::SS }>, 2),
        C::Lss_r32_m1632 => (segments::load_far_pointer::<{ seg::SS }>, 4),
        C::Lss_r64_m1664 => (segments::load_far_pointer::<{ seg::SS }>, 8),
        C::Lfs_r16_m1616 => (segments::load_far_pointer::<{ seg::FS }>, 2),
        C::Lfs_r32_m1632 => (segments::load_far_pointer::<{ seg::FS }>, 4),
        C::Lfs_r64_m1664 => (segments::load_far_pointer::<{ seg::FS }>, 8),
        C::Lgs_r16_m1616 => (segments::load_far_pointer::<{ seg::GS }>, 2),
        C::Lgs_r32_m1632 => (segments::load_far_pointer::<{ seg::GS }>, 4),
        C::Lgs_r64_m1664 => (segments::load_far_pointer::<{ seg::GS }>, 8),

        // Descriptor tables.
        C::Lgdt_m1632_16 => (tables::load_table::<false>, 2),
        C::Lgdt_m1632 | C::Lgdt_m1664 => (tables::load_table::<false>, 4),
        C::Lidt_m1632_16 => (tables::load_table::<true>, 2),
        C::Lidt_m1632 | C::Lidt_m1664 => (tables::load_table::<true>, 4),
        C::Sgdt_m1632_16 | C::Sgdt_m1632 | C::Sgdt_m1664 => (tables::store_table::<false>, 0),
        C::Sidt_m1632_16 | C::Sidt_m1632 | C::Sidt_m1664 => (tables::store_table::<true>, 0),
        C::Lldt_rm16 | C::Lldt_r32m16 | C::Lldt_r64m16 => (tables::lldt, 0),
        C::Ltr_rm16 | C::Ltr_r32m16 | C::Ltr_r64m16 => (tables::ltr, 0),
        C::Sldt_rm16 => (tables::sldt, 2),
        C::Sldt_r32m16 => (tables::sldt, 4),
        C::Sldt_r64m16 => (tables::sldt, 8),
        C::Str_rm16 => (tables::str_, 2),
        C::Str_r32m16 => (tables::str_, 4),
        C::Str_r64m16 => (tables::str_, 8),
        C::Lar_r16_rm16 => (tables::lar, 2),
        C::Lar_r32_r32m16 => (tables::lar, 4),
        C::Lar_r64_r64m16 => (tables::lar, 8),
        C::Lsl_r16_rm16 => (tables::lsl, 2),
        C::Lsl_r32_r32m16 => (tables::lsl, 4),
        C::Lsl_r64_r64m16 => (tables::lsl, 8),
        C::Verr_rm16 | C::Verr_r32m16 | C::Verr_r64m16 => (tables::verify::<false>, 0),
        C::Verw_rm16 | C::Verw_r32m16 | C::Verw_r64m16 => (tables::verify::<true>, 0),
        C::Arpl_rm16_r16 | C::Arpl_r32m16_r32 => (tables::arpl, 2),

        // Control and debug registers.
        C::Mov_r32_cr => (control::mov_from_cr, 4),
        C::Mov_r64_cr => (control::mov_from_cr, 8),
        C::Mov_cr_r32 => (control::mov_to_cr, 4),
        C::Mov_cr_r64 => (control::mov_to_cr, 8),
        C::Mov_r32_dr => (debug::mov_from_dr, 4),
        C::Mov_r64_dr => (debug::mov_from_dr, 8),
        C::Mov_dr_r32 => (debug::mov_to_dr, 4),
        C::Mov_dr_r64 => (debug::mov_to_dr, 8),
        C::Clts => (control::clts, 0),
        C::Lmsw_rm16 | C::Lmsw_r32m16 | C::Lmsw_r64m16 => (control::lmsw, 2),
        C::Smsw_rm16 => (control::smsw, 2),
        C::Smsw_r32m16 => (control::smsw, 4),
        C::Smsw_r64m16 => (control::smsw, 8),
        C::Xgetbv => (control::xgetbv, 0),
        C::Xsetbv => (control::xsetbv, 0),
        C::Rdpkru => (control::rdpkru, 0),
        C::Wrpkru => (control::wrpkru, 0),

        // Paging and caches.
        C::Invlpg_m => (paging::invlpg, 0),
        C::Invpcid_r32_m128 | C::Invpcid_r64_m128 => (paging::invpcid, 0),
        C::Invd | C::Wbinvd | C::Wbnoinvd => (paging::cache, 0),
        C::Serialize => (nothing, 0),

        // Identity, time, hypercalls.
        C::Cpuid => (identity::cpuid, 0),
        C::Rdmsr => (identity::rdmsr, 0),
        C::Wrmsr => (identity::wrmsr, 0),
        C::Rdtsc => (identity::rdtsc, 0),
        C::Rdtscp => (identity::rdtscp, 0),
        C::Rdpid_r32 => (identity::rdpid, 4),
        C::Rdpid_r64 => (identity::rdpid, 8),
        C::Rdpmc => (identity::rdpmc, 0),
        C::Vmcall | C::Vmmcall => (identity::hypercall, 0),

        // MONITOR, virtualization, SGX, TDX, SMM.
        C::Monitorw | C::Monitord | C::Monitorq | C::Mwait => (not_offered, 0),
        C::Vmlaunch | C::Vmresume | C::Vmxoff | C::Vmxon_m64 | C::Vmfunc => (not_offered, 0),
        C::Vmrunw | C::Vmrund | C::Vmrunq | C::Skinit | C::Stgi | C::Clgi => (not_offered, 0),
        C::Encls | C::Enclu | C::Enclv | C::Tdcall | C::Seamcall | C::Rsm => (not_offered, 0),

        // Ports.
        C::In_AL_imm8 => (io::port_in::<true>, 1),
        C::In_AX_imm8 => (io::port_in::<true>, 2),
        C::In_EAX_imm8 => (io::port_in::<true>, 4),
        C::In_AL_DX => (io::port_in::<false>, 1),
        C::In_AX_DX => (io::port_in::<false>, 2),
        C::In_EAX_DX => (io::port_in::<false>, 4),
        C::Out_imm8_AL => (io::port_out::<true>, 1),
        C::Out_imm8_AX => (io::port_out::<true>, 2),
        C::Out_imm8_EAX => (io::port_out::<true>, 4),
        C::Out_DX_AL => (io::port_out::<false>, 1),
        C::Out_DX_AX => (io::port_out::<false>, 2),
        C::Out_DX_EAX => (io::port_out::<false>, 4),
        C::Insb_m8_DX => (io::ins, 1),
        C::Insw_m16_DX => (io::ins, 2),
        C::Insd_m32_DX => (io::ins, 4),
        C::Outsb_DX_m8 => (io::outs, 1),
        C::Outsw_DX_m16 => (io::outs, 2),
        C::Outsd_DX_m32 => (io::outs, 4),
        _ => return None,
    };
    Some(entry)
}
