//! What the state machine needs of the processor that it is part of.

use crate::abi::Field;
use crate::range::AddressRanges;

/// The registers that the ABI touches.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Register {
    /// RAX.
    Rax,
    /// RBX.
    Rbx,
    /// RCX.
    Rcx,
    /// RDX.
    Rdx,
    /// RSI.
    Rsi,
    /// RSP.
    Rsp,
    /// R10.
    R10,
    /// R11.
    R11,
    /// RIP: at a SYSCALL the address behind it, at an event where the guest is to resume.
    Rip,
    /// RFLAGS of the underlying processor: IF is always one.
    Rflags,
    /// CR2, which the processor has set before it delivers a #PF.
    Cr2,
    /// CR3. Only read: it changes by [`Context`] and [`Roots`].
    Cr3,
    /// CR4. Only read.
    Cr4,
    /// The base of GS, IA32_GS_BASE.
    GsBase,
    /// IA32_KERNEL_GS_BASE. Only read.
    KernelGsBase,
    /// IA32_LSTAR. Only read.
    Lstar,
    /// PKRU of the underlying processor.
    Pkru,
}

/// CS and SS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Selectors {
    /// CS.
    pub cs: u16,
    /// SS.
    pub ss: u16,
}

/// What a switch of modes changes together.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Context {
    /// The new CR3. Nothing is flushed: translations are tagged by their root.
    pub cr3: u64,
    /// The new PKRU.
    pub pkru: u32,
}

/// What a flush drops.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Flush {
    /// All translations.
    All,
    /// Those of the present CR3 and of this other root.
    Roots {
        /// The value of MSR_PVM_SWITCH_CR3.
        switch_cr3: u64,
    },
    /// Those of one page, under every root.
    Page(u64),
}

/// New roots for LOAD_PGTBL.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Roots {
    /// For CR3.
    pub supervisor: u64,
    /// For MSR_PVM_SWITCH_CR3.
    pub user: u64,
    /// CR4.LA57, if the processor has 5-level paging.
    pub five_level: bool,
    /// Drop the translations that are tagged with either.
    pub flush: bool,
}

/// The structure that guest and hypervisor share, in guest memory.
pub trait SharedStruct {
    /// Reads a field.
    fn load(&self, field: Field) -> u64;

    /// Writes a field; bits above its size are dropped.
    fn store(&mut self, field: Field, value: u64);
}

/// The processor around a [`crate::Pvm`]: registers, MSRs, guest memory.
///
/// It runs supervisor mode with the paging rights of a supervisor, but everything else of it as an unprivileged
/// program: that is what "underlying" means in this crate's documentation.
pub trait Processor {
    /// The shared structure, borrowed.
    type Shared<'a>: SharedStruct
    where
        Self: 'a;

    /// Reads a register.
    fn register(&self, register: Register) -> u64;

    /// Writes a register.
    fn set_register(&mut self, register: Register, value: u64);

    /// The selectors in CS and SS.
    fn selectors(&self) -> Selectors;

    /// Goes to supervisor mode, or stays in it: loads the flat 64-bit user selectors (underneath, nothing
    /// tells the modes apart) and the context.
    fn enter_supervisor(&mut self, context: Context);

    /// Goes to user mode with these selectors and the context.
    ///
    /// # Errors
    /// The selector that cannot be loaded. The mode has changed nevertheless, and [`Self::selectors`] are those
    /// that were asked for: the #GP that follows reports them.
    fn enter_user(&mut self, selectors: Selectors, context: Context) -> Result<(), u16>;

    /// The shared structure at guest-physical address `page`, the start of a page; `None` if there is no RAM
    /// that can be written.
    fn shared(&mut self, page: u64) -> Option<Self::Shared<'_>>;

    /// Writes a frame to the stack, as a supervisor; whether all of it could be written.
    fn write_frame(&mut self, address: u64, frame: &[u64; 8]) -> bool;

    /// Reads a frame from the stack, as a supervisor.
    fn read_frame(&mut self, address: u64) -> Option<[u64; 8]>;

    /// Reads an MSR that this crate does not keep; `None` for #GP.
    fn read_msr(&mut self, index: u32) -> Option<u64>;

    /// Writes an MSR that this crate does not keep; `false` for #GP.
    fn write_msr(&mut self, index: u32, value: u64) -> bool;

    /// Whether `address` is canonical now.
    fn is_canonical(&self, address: u64) -> bool;

    /// How many bits linear addresses have: 48 or 57.
    fn linear_address_bits(&self) -> u32;

    /// Whether `value` could be a CR3: no bit above the physical address width.
    fn is_root(&self, value: u64) -> bool;

    /// Loads new roots, both valid.
    fn load_roots(&mut self, roots: Roots);

    /// Drops translations.
    fn flush(&mut self, what: Flush);

    /// From now on translates only addresses in `ranges`.
    fn confine(&mut self, ranges: AddressRanges);

    /// Loads GS with `selector`, whose descriptor is `descriptor`, or (`None`) with the null selector, and returns
    /// the base that came of it. The base that is in force stays.
    fn load_gs(&mut self, selector: u16, descriptor: Option<u64>) -> u64;

    /// One of KVM's own hypercalls.
    fn kvm_hypercall(&mut self, number: u64, args: [u64; 4]) -> u64;
}
