//! Single instructions, and the hypercall.
//!
//! # Safety of this module
//! Nearly all that a kernel does to its processor is outside what Rust knows. The functions here are safe to call
//! where the instruction itself touches no memory of Rust's and leaves the calling convention's registers alone; that a
//! wrong value loaded into the right register can end the whole machine is what a kernel is about, and for the checks
//! that is a result.

use core::arch::asm;
use core::arch::x86_64::CpuidResult;

unsafe extern "C" {
    /// See `entry.s`.
    #[link_name = "hypercall"]
    fn raw_hypercall(number: u64, a0: u64, a1: u64, a2: u64, a3: u64) -> u64;
}

/// A hypercall of any number: the answer in RAX.
pub fn hypercall(number: u64, args: [u64; 4]) -> u64 {
    let [a0, a1, a2, a3] = args;
    // SAFETY: needed for SYSCALL; follows the C calling convention. What the hypervisor does with it is in the module's
    // documentation.
    unsafe { raw_hypercall(number, a0, a1, a2, a3) }
}

/// RFLAGS.
pub fn flags() -> u64 {
    let value;
    // SAFETY: reads RFLAGS by way of the stack.
    unsafe { asm!("pushfq", "pop {}", out(reg) value, options(preserves_flags)) };
    value
}

/// CS.
pub fn cs() -> u16 {
    let value: u64;
    // SAFETY: reads a selector.
    unsafe { asm!("mov {:e}, cs", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value as u16
}

/// The synthetic CPUID instruction: INVLPG of an address that tells the hypervisor, then CPUID.
pub fn synthetic_cpuid(leaf: u32, subleaf: u32) -> CpuidResult {
    let (mut eax, mut ecx) = (leaf, subleaf);
    let (ebx, edx): (u64, u32);
    // SAFETY: its INVLPG is of an address that is not ours and in kernel mode of an ordinary machine not even
    // canonical or mapped; CPUID writes four registers, of which RBX, the compiler's, is put back.
    unsafe {
        asm!(
            "mov {saved}, rbx",
            ".byte 0x0f, 0x01, 0x3c, 0x25, 0x50, 0x56, 0x4d, 0xff, 0x0f, 0xa2",
            "xchg {saved}, rbx",
            saved = out(reg) ebx,
            inout("eax") eax,
            inout("ecx") ecx,
            out("edx") edx,
            options(nostack),
        );
    }
    CpuidResult { eax, ebx: ebx as u32, ecx, edx }
}

/// The processor's time stamp.
pub fn time_stamp() -> u64 {
    // SAFETY: RDTSC reads a counter.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// RDMSR of an MSR that exists.
pub fn read_msr(index: u32) -> u64 {
    let (high, low): (u32, u32);
    // SAFETY: reads a register. One that does not exist is a fault, which the event handler reports.
    unsafe { asm!("rdmsr", in("ecx") index, out("eax") low, out("edx") high, options(nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// WRMSR of an MSR that takes the value.
pub fn write_msr(index: u32, value: u64) {
    let (high, low) = ((value >> 32) as u32, value as u32);
    // SAFETY: see the module.
    unsafe { asm!("wrmsr", in("ecx") index, in("eax") low, in("edx") high, options(nostack)) };
}

/// GS's base by RDGSBASE.
pub fn gs_base() -> u64 {
    let value;
    // SAFETY: reads a register; PVM has CR4.FSGSBASE on.
    unsafe { asm!("rdgsbase {}", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// MOV from CR3.
pub fn cr3() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr3", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// MOV from CR4.
pub fn cr4() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, cr4", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// DR6.
pub fn dr6() -> u64 {
    let value;
    // SAFETY: reads a register.
    unsafe { asm!("mov {}, dr6", out(reg) value, options(nomem, nostack, preserves_flags)) };
    value
}

/// MOV to CR3.
///
/// # Safety
/// All that the kernel uses is mapped by the new tables as it is by the old ones.
pub unsafe fn set_cr3(value: u64) {
    // SAFETY: the caller's.
    unsafe { asm!("mov cr3, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// MOV to CR4 of a value that CR4 takes and in which only features for user mode change.
pub fn set_cr4(value: u64) {
    // SAFETY: see the module.
    unsafe { asm!("mov cr4, {}", in(reg) value, options(nostack, preserves_flags)) };
}

/// IN of a byte.
pub fn port_in8(port: u16) -> u8 {
    let value;
    // SAFETY: a device's register; no device here writes memory by being read.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// OUT of a byte.
pub fn port_out8(port: u16, value: u8) {
    // SAFETY: as above.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// IN of two bytes.
pub fn port_in16(port: u16) -> u16 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in ax, dx", in("dx") port, out("ax") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// OUT of two bytes.
pub fn port_out16(port: u16, value: u16) {
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack, preserves_flags)) };
}

/// INT3: a trap that the event handler notes and returns from.
pub fn int3() {
    // SAFETY: the handler changes nothing but its log.
    unsafe { asm!("int3") };
}

/// Stands still for good. HLT may be refused by what is below; then this spins.
pub fn stop() -> ! {
    loop {
        // SAFETY: waits; interrupts do not come.
        unsafe { asm!("hlt", options(nomem, nostack)) };
    }
}

/// Ends the machine the hard way: what cannot be delivered shuts the processor down.
pub fn triple_fault() -> ! {
    // SAFETY: nothing is relied upon afterwards. On PVM the exception has no stack to go to; elsewhere there is
    // no IDT.
    unsafe { asm!("push 0", "push 0", "lidt [rsp]", "xor esp, esp", "ud2", options(noreturn)) }
}
