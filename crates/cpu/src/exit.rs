//! What leaves the processor: typed exits, answered by the platform.
//!
//! The processor knows registers, guest RAM and nothing else. Whatever an instruction needs from
//! outside leaves through [`Platform::exit`] as one [`Exit`], and is answered before the instruction
//! goes on.

use mmu::Gpa;

/// A request of the processor to the machine around it.
#[derive(Debug)]
pub enum Exit<'a> {
    /// IN or INS: fill `data` (1, 2 or 4 bytes) from I/O port `port`.
    PortIn {
        /// The port.
        port: u16,
        /// Where the bytes go.
        data: &'a mut [u8],
    },
    /// OUT or OUTS: 1, 2 or 4 bytes to I/O port `port`.
    PortOut {
        /// The port.
        port: u16,
        /// The bytes.
        data: &'a [u8],
    },
    /// A read (1 to 64 bytes) of a guest-physical address that is not RAM.
    MmioRead {
        /// The address of the first byte.
        gpa: Gpa,
        /// Where the bytes go.
        data: &'a mut [u8],
    },
    /// A write (1 to 64 bytes) to a guest-physical address that is not RAM.
    MmioWrite {
        /// The address of the first byte.
        gpa: Gpa,
        /// The bytes.
        data: &'a [u8],
    },
    /// RDMSR of a register that is not the processor's own.
    ReadMsr {
        /// The register (ECX).
        index: u32,
        /// Where the value goes.
        value: &'a mut u64,
    },
    /// WRMSR of a register that is not the processor's own.
    WriteMsr {
        /// The register (ECX).
        index: u32,
        /// The value (EDX:EAX).
        value: u64,
    },
    /// MOV from CR8: the task priority.
    ReadCr8 {
        /// Where the value goes.
        value: &'a mut u64,
    },
    /// MOV to CR8 of a value from 0 to 15.
    WriteCr8 {
        /// The value.
        value: u64,
    },
    /// VMCALL or VMMCALL.
    Hypercall {
        /// RAX.
        number: u64,
        /// RBX, RCX, RDX, RSI (truncated to 32 bits outside 64-bit mode).
        args: [u64; 4],
        /// Called from 64-bit code.
        long_mode: bool,
        /// The privilege level of the caller.
        cpl: u8,
        /// What goes into RAX.
        result: &'a mut u64,
    },
}

/// What the platform says to an [`Exit`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Answer {
    /// Done.
    Done,
    /// There is no such register, or not with such a value: #GP(0). (For ports and MMIO there is no
    /// refusal: absent devices read as all ones.)
    Refused,
}

/// The machine, as one vCPU sees it.
pub trait Platform: Send {
    /// Answers an exit.
    fn exit(&mut self, exit: Exit<'_>) -> Answer;

    /// Takes the highest-priority deliverable interrupt from the interrupt controller, as the
    /// interrupt-acknowledge cycle does. Called only when the processor delivers it at once.
    fn acknowledge_interrupt(&mut self) -> Option<u8>;

    /// Whether [`Self::acknowledge_interrupt`] would return a vector.
    fn interrupt_pending(&mut self) -> bool;

    /// The machine's time-stamp counter, in ticks: what the guest reads while its IA32_TSC_ADJUST is 0 (SDM vol. 3,
    /// 19.17.3). Whoever keeps the guest's clocks and timers, which count these ticks too, answers; a counter of the
    /// processor's own could be another one. It is asked amid guest code, so it neither waits nor computes with
    /// floating point: MXCSR is the guest's.
    fn tsc(&self) -> u64;

    /// The guest moved its TSC, by a write to IA32_TSC or IA32_TSC_ADJUST; `adjust` is what the latter is now. Clocks
    /// and deadlines in terms of this vCPU's TSC move with it.
    fn tsc_adjusted(&mut self, adjust: u64) {
        let _ = adjust;
    }

    /// The processor took INIT: its local interrupt controller, if it has one, does the same.
    fn init(&mut self) {}
}
