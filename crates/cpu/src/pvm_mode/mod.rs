//! PVM mode: a guest kernel that runs without privileges and knows it.
//!
//! # Theory of operation
//! The ABI (what is saved where, which MSR does what) is crate `pvm`'s; here is what it means for this processor. In PVM
//! mode ([`CpuState::deprivileged`](crate::CpuState)) the state holds two views at once:
//! - CPL, the control registers and the MSRs are the guest's: in supervisor mode the CPL is 0, and privileged
//!   instructions execute at once. On hardware they would trap and be emulated, with the same effect.
//! - CS, SS and RFLAGS.IF are those of the unprivileged program that the guest is: selectors of DPL 3 from the
//!   hypervisor's GDT, and IF always set. Instructions that do not trap on hardware (MOV from CS, PUSHF, POPF, LAR, far
//!   jumps) see these; [`Vcpu::segment_cpl`] is the privilege that segments are checked with.
//!
//! Translations are tagged by root and protection keys ([`roots`]), so that a change of mode, which changes both,
//! flushes nothing.

mod processor;
mod roots;

use mmu::{Access, AccessKind, Gva, PageWalk, PagingFeatures, PagingState, Privilege};
use pvm::{AddressRanges, Mode, Next, Pvm};

use crate::event::Event;
use crate::fault::{Exec, Fault, Stop, fault, vector};
use crate::flags;
use crate::segment::{Descriptor, is_null, rpl};
use crate::state::{CodeMode, Segment, cr4, efer, seg, slow};
use crate::vcpu::Vcpu;

use roots::{Context, RootTags};

/// How addresses are translated in PVM mode, beside what the state says.
#[derive(Clone, Debug, Default)]
pub(crate) struct PvmPaging {
    roots: RootTags,
    /// The upper-half addresses that may be used.
    ranges: Option<AddressRanges>,
    /// The protection keys that the page walk holds now.
    keys: u32,
}

impl Vcpu {
    /// What the vCPU counted of the PVM ABI; `None` for a vCPU that does not offer it.
    pub fn pvm_stats(&self) -> Option<pvm::Stats> {
        self.pvm.as_ref().map(|pvm| *pvm.stats())
    }

    /// Runs `f` on the ABI's state machine, with the rest of the vCPU as its processor.
    #[inline(always)]
    pub(crate) fn with_pvm<R>(&mut self, f: impl FnOnce(&mut Pvm, &mut Self) -> R) -> Option<R> {
        let mut pvm = self.pvm.take()?;
        let result = f(&mut pvm, self);
        self.pvm = Some(pvm);
        Some(result)
    }

    // ---- entering and leaving ----

    /// Arranges to enter PVM mode if the vCPU, in plain x86 mode, has come to 64-bit supervisor mode.
    pub(crate) fn watch_for_pvm_mode(&mut self) {
        let there = self.state.code_mode == CodeMode::Bits64 && self.state.cpl == 0;
        self.state.slow &= !slow::ENTER_PVM;
        if there {
            self.state.slow |= slow::ENTER_PVM;
        }
    }

    /// Enters PVM mode, between two instructions.
    pub(crate) fn enter_pvm_mode(&mut self) {
        use pvm::abi::control;
        self.state.slow &= !(slow::ENTER_PVM | slow::STI_SHADOW | slow::SS_SHADOW | slow::NMI_BLOCKED);
        self.state.deprivileged = true;
        let cs = self.state.segments[usize::from(seg::CS)].selector;
        self.state.cr0 = self.state.cr0 & !control::CR0_ZERO | control::CR0_ONE;
        self.state.cr4 = self.pvm_cr4(self.state.cr4);
        if !control::keys_are_possible(self.state.cr4) {
            self.state.cr4 &= !control::CR4_PKS;
        }
        self.state.efer |= control::EFER_ONE;
        self.tlb.flush_all();
        self.refresh_pvm_paging();
        self.with_pvm(|pvm, vcpu| pvm.enter(vcpu, cs));
        self.refresh_mode();
    }

    /// INIT: back to plain x86 mode.
    pub(crate) fn leave_pvm_mode(&mut self) {
        self.state.deprivileged = false;
        if let Some(pvm) = &mut self.pvm {
            pvm.reset();
        }
    }

    /// CR4 as PVM mode has it when the guest writes `value`: what an operating system switches on for all its
    /// programs is on, and what needs privileges is off.
    pub(crate) fn pvm_cr4(&self, value: u64) -> u64 {
        use pvm::abi::control::{CR4_ONE, CR4_ZERO};
        let system = cr4::UMIP | cr4::OSXSAVE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        value & !CR4_ZERO | CR4_ONE | system & self.cpuid.cr4_bits()
    }

    /// #GP(0) in PVM mode, for instructions that its kernels may not use.
    pub(crate) fn forbid_in_pvm_mode(&self) -> Exec {
        if self.state.deprivileged { fault(Fault::gp(0)) } else { Ok(()) }
    }

    // ---- events ----

    /// Delivers `event` by the ABI.
    ///
    /// # Errors
    /// [`Stop::TripleFault`].
    #[inline(never)]
    pub(crate) fn deliver_pvm(&mut self, event: Event) -> Exec {
        let event = match event {
            Event::Interrupt(vector) | Event::Software(vector) => pvm::Event::new(vector),
            Event::Nmi => pvm::Event::nmi(),
            Event::Fault(f) => {
                self.note_exception(&f);
                // An instruction breakpoint leaves it to the handler to set RF (SDM vol. 3, 18.3.1.1).
                let resume = !f.trap && (f.vector != vector::DB || f.dr6 & !15 != 0);
                pvm::Event {
                    vector: f.vector,
                    error_code: f.error_code,
                    flags: if resume { flags::RF } else { 0 },
                }
            }
        };
        self.drop_debug_trap();
        let delivered = self.with_pvm(|pvm, vcpu| pvm.deliver(vcpu, event));
        self.end_block();
        match delivered {
            Some(Ok(())) => Ok(()),
            _ => Err(Box::new(Stop::TripleFault)),
        }
    }

    /// INT n, INT3 or INTO. Like a gate's DPL, the hypervisor lets a program use three of them.
    pub(crate) fn software_interrupt_pvm(&mut self, vector: u8) -> Exec {
        const SYSTEM_CALL: u8 = 0x80;
        if !matches!(vector, vector::BP | vector::OF | SYSTEM_CALL) {
            return fault(Fault::gp(u32::from(vector) << 3 | 2));
        }
        self.state.slow |= slow::NO_STEP_TRAP;
        self.deliver_pvm(Event::Software(vector))
    }

    /// Drops a debug trap that still waits, because the instruction before this one loaded SS: this one enters the
    /// hypervisor, where the trap would come, and which does not pass it on.
    #[inline]
    fn drop_debug_trap(&mut self) {
        self.state.slow &= !slow::DEBUG_TRAP;
        self.state.pending_dr6 = 0;
    }

    /// SYSCALL: a system call, a return or a hypercall.
    #[inline]
    pub(crate) fn syscall_pvm(&mut self) -> Exec {
        let stepped = self.state.flags.system() & flags::TF;
        self.drop_debug_trap();
        let next = self.with_pvm(|pvm, vcpu| pvm.syscall(vcpu));
        self.end_block();
        if stepped & !self.state.flags.system() != 0 {
            self.state.slow |= slow::NO_STEP_TRAP;
        }
        match next {
            Some(Ok(Next::Run)) => Ok(()),
            Some(Ok(Next::Halt)) => Err(Box::new(Stop::Halt)),
            Some(Err(pvm::TripleFault)) | None => Err(Box::new(Stop::TripleFault)),
        }
    }

    // ---- interrupts ----

    /// Whether a maskable interrupt can be delivered now.
    #[inline]
    pub(crate) fn interrupts_open(&mut self) -> bool {
        if self.state.deprivileged {
            self.with_pvm(|pvm, vcpu| pvm.interrupts_open(vcpu)).unwrap_or(false)
        } else {
            self.state.flags.system() & flags::IF != 0
        }
    }

    /// Whether an NMI can be delivered now.
    #[inline]
    pub(crate) fn nmi_open(&self) -> bool {
        match &self.pvm {
            Some(pvm) if self.state.deprivileged => pvm.nmi_open(),
            _ => self.state.slow & slow::NMI_BLOCKED == 0,
        }
    }

    /// A maskable interrupt waits until the guest lets it in.
    pub(crate) fn note_waiting_interrupt(&mut self) {
        if self.state.deprivileged {
            self.with_pvm(|pvm, vcpu| pvm.interrupt_waits(vcpu));
        }
    }

    /// CLI or STI in supervisor mode.
    pub(crate) fn set_pvm_interrupt_flag(&mut self, open: bool) -> Exec {
        self.with_pvm(|pvm, vcpu| pvm.set_interrupt_flag(vcpu, open));
        self.end_block();
        Ok(())
    }

    // ---- segments ----

    /// The privilege level that segments and unprivileged flags are checked with: in PVM mode that of a program.
    #[inline]
    pub(crate) fn segment_cpl(&self) -> u8 {
        if self.state.deprivileged { 3 } else { self.state.cpl }
    }

    /// The descriptor of `selector` in the hypervisor's GDT, as far as the guest may see it.
    pub(crate) fn pvm_descriptor(&self, selector: u16) -> Option<Descriptor> {
        self.pvm.as_ref()?.gdt().descriptor(selector).map(Descriptor)
    }

    /// The descriptor of `selector` in the guest's own GDT, if a 64-bit supervisor could load it: present, of DPL 0
    /// and RPL 0. That table has no effect, but kernels that start up load their selectors from it, which traps,
    /// and a hypervisor that emulates the load looks there.
    fn supervisor_descriptor(&mut self, selector: u16) -> Option<Descriptor> {
        if self.state.cpl != 0 || rpl(selector) != 0 || is_null(selector) || selector & 4 != 0 {
            return None;
        }
        let address = self.descriptor_address(selector, 8)?;
        let d = Descriptor(self.read_as(address, Privilege::Implicit).ok()?);
        (!d.is_system() && d.dpl() == 0 && d.present()).then_some(d)
    }

    /// Where a far transfer to `selector` goes. In supervisor mode a code segment of its own, the load of which would
    /// trap and be emulated, is to the processor below what is loaded anyway; see [`Self::accept_pvm_code`].
    pub(crate) fn pvm_code_selector(&mut self, selector: u16) -> u16 {
        if !self.state.deprivileged {
            return selector;
        }
        let own = self.pvm.as_ref().map(|pvm| pvm.supervisor_cs());
        let in_supervisor = self.state.cpl == 0;
        if in_supervisor && own == Some(selector) {
            return pvm::abi::selector::USER_CS;
        }
        match self.supervisor_descriptor(selector) {
            Some(d) if d.is_code() && d.has(Segment::LONG) && !d.has(Segment::DEFAULT_BIG) => {
                pvm::abi::selector::USER_CS
            }
            _ => selector,
        }
    }

    /// The far transfer to `selector` has been made, for which [`Self::pvm_code_selector`] said `loaded`: a supervisor's
    /// own code segment becomes what the guest knows as its CS.
    pub(crate) fn accept_pvm_code(&mut self, selector: u16, loaded: u16) {
        if selector != loaded
            && let Some(pvm) = &mut self.pvm
        {
            pvm.set_supervisor_cs(selector);
        }
    }

    /// The same for the stack segment that IRET or RETF loads, for which 64-bit supervisors also use a null selector.
    pub(crate) fn pvm_return_stack_selector(&mut self, selector: u16) -> u16 {
        if self.pvm_supervisor_load(seg::SS, selector).is_some() {
            pvm::abi::selector::USER_DS
        } else {
            selector
        }
    }

    /// What a load of a data segment register by the supervisor comes to, where it would trap and be emulated: SS
    /// stays what it is, the others become null with the base of the guest's descriptor.
    pub(crate) fn pvm_supervisor_load(&mut self, register: u8, selector: u16) -> Option<(Segment, u64)> {
        if !self.state.deprivileged || self.state.cpl != 0 {
            return None;
        }
        if register == seg::SS {
            let own = self.pvm.as_ref().map(|pvm| pvm.supervisor_cs().wrapping_add(8));
            let good = selector == 0
                || own == Some(selector)
                || self.supervisor_descriptor(selector).is_some_and(Descriptor::is_writable_data);
            return good.then(|| (self.state.segments[usize::from(seg::SS)], 0));
        }
        if self.pvm_descriptor(selector).is_some() {
            // The processor below can do it by itself.
            return None;
        }
        let d = self.supervisor_descriptor(selector).filter(|d| d.is_readable())?;
        Some((Segment { selector: 0, limit: 0, attributes: 0 }, d.base()))
    }

    /// Whether a far transfer to the code segment `d` is possible: supervisor mode is 64-bit.
    pub(crate) fn pvm_mode_keeps(&self, d: Descriptor) -> bool {
        !self.state.deprivileged || self.state.cpl != 0 || d.has(Segment::LONG)
    }

    // ---- paging ----

    /// #PF for an address that the guest may not use: nothing is mapped there, whatever its tables say.
    pub(crate) fn check_pvm_address(&self, gva: Gva, access: Access) -> Exec {
        const WRITE: u32 = 1 << 1;
        const USER: u32 = 1 << 2;
        const FETCH: u32 = 1 << 4;
        if self.pvm_paging.ranges.is_none_or(|ranges| ranges.allows(gva.0)) {
            return Ok(());
        }
        let user = if access.privilege == Privilege::User { USER } else { 0 };
        let kind = match access.kind {
            AccessKind::Write => WRITE,
            AccessKind::Fetch if self.state.efer & efer::NXE != 0 => FETCH,
            _ => 0,
        };
        fault(Fault::pf(gva, user | kind))
    }

    /// Whether a breakpoint at `base` may be armed: it must not watch what is not the guest's.
    pub(crate) fn breakpoint_is_allowed(&self, base: u64) -> bool {
        /// The longest that a breakpoint reaches.
        const REACH: u64 = 7;
        let ranges = if self.state.deprivileged { self.pvm_paging.ranges } else { None };
        ranges.is_none_or(|r| r.allows(base) && r.allows(base.wrapping_add(REACH)))
    }

    /// Rebuilds the page walk and finds the tag, as [`Vcpu::refresh_paging`] does in x86 mode.
    pub(crate) fn refresh_pvm_paging(&mut self) {
        let state = &self.state;
        // To the processor below there are only user pages, so that PKRU protects them all. Whether it does
        // differs between the modes; without, the keys allow everything.
        let keys = if state.cr4 & cr4::PKE != 0 { cr4::PKS } else { 0 };
        self.walk = PageWalk::new(&PagingState {
            cr0: state.cr0,
            cr3: state.cr3,
            cr4: state.cr4 & !cr4::PKS | keys,
            efer: state.efer,
            pkru: 0,
            pkrs: 0,
            maxphyaddr: self.cpuid.maxphyaddr(),
            pdptrs: state.pdptrs,
            features: PagingFeatures::all(),
        });
        self.pvm_paging.keys = 0;
        self.refresh_pvm_keys();
    }

    /// Takes the present PKRU and mode into the page walk and the tag.
    #[inline]
    pub(crate) fn refresh_pvm_keys(&mut self) {
        let enable = if self.state.cpl == 3 { cr4::PKE } else { cr4::PKS };
        let keys = if self.state.cr4 & enable != 0 { self.state.pkru } else { 0 };
        if keys != self.pvm_paging.keys {
            self.pvm_paging.keys = keys;
            self.walk.set_keys(keys, keys);
        }
        let context = Context { root: self.walk.root(), keys };
        self.state.tlb_tag = self.pvm_paging.roots.tag(context, |evicted| self.tlb.flush_pcid(evicted));
    }

    /// Loads CR3; translations under its root are dropped if `flush`.
    pub(crate) fn load_pvm_root(&mut self, cr3: u64, flush: bool) {
        self.state.cr3 = cr3;
        self.walk.set_cr3(cr3);
        if flush {
            self.flush_pvm_root(cr3);
        }
        self.refresh_pvm_keys();
    }

    /// Drops the translations under the root of `cr3`, with whatever keys.
    fn flush_pvm_root(&mut self, cr3: u64) {
        let mut walk = self.walk;
        walk.set_cr3(cr3);
        for tag in self.pvm_paging.roots.of_root(walk.root()) {
            self.tlb.flush_pcid(tag);
        }
    }

    /// The mode, for the processor's own use; [`Mode::NonPvm`] for a vCPU that does not offer the ABI.
    pub fn pvm_mode(&self) -> Mode {
        self.pvm.as_ref().map_or(Mode::NonPvm, |pvm| pvm.mode())
    }
}
