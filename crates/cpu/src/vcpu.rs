//! One virtual processor: state, TLB, and its connections to RAM, platform and other threads.

use std::sync::Arc;

use iced_x86::Code;
use mmu::{Gva, PageWalk, PagingFeatures, PagingState};

use crate::attention::Attention;
use crate::cpuid::Cpuid;
use crate::exit::{Answer, Exit, Platform};
use crate::flags;
use crate::group::{Membership, Protect};
use crate::native::Native;
use crate::pvm_mode::PvmPaging;
use crate::ram::Ram;
use crate::state::{CodeMode, CpuState, Segment, cr0, cr4, efer, seg, slow};
use crate::stats::VcpuStats;
use crate::tlb::Tlb;

/// What a vCPU is told when it is made.
#[derive(Clone, Debug)]
pub struct VcpuConfig {
    /// What CPUID answers, and with it which features exist.
    pub cpuid: Cpuid,
    /// For a guest of the PVM ABI: once the vCPU is in 64-bit supervisor mode it enters PVM mode.
    pub pvm: Option<pvm::Config>,
}

/// One virtual processor.
pub struct Vcpu {
    /// The architectural state. After changing what modes depend on (CS, CPL, control registers, EFER,
    /// RFLAGS system bits, DR7) from outside, call [`Vcpu::refresh`].
    pub state: CpuState,
    /// What it counted.
    pub stats: VcpuStats,
    pub(crate) tlb: Tlb,
    pub(crate) walk: PageWalk,
    pub(crate) ram: Arc<Ram>,
    pub(crate) platform: Box<dyn Platform>,
    pub(crate) attention: Arc<Attention>,
    pub(crate) membership: Membership,
    pub(crate) cpuid: Cpuid,
    pub(crate) native: Native,
    /// The PVM ABI, for a guest that may use it. Absent while it is at work on the rest of the vCPU.
    pub(crate) pvm: Option<Box<pvm::Pvm>>,
    pub(crate) pvm_paging: PvmPaging,
}

impl std::fmt::Debug for Vcpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpu").field("state", &self.state).field("stats", &self.stats).finish_non_exhaustive()
    }
}

impl Vcpu {
    /// A vCPU in its reset state.
    ///
    /// # Errors
    /// When the host refuses the executable memory that vector instructions run in.
    pub fn new(
        config: VcpuConfig,
        ram: Arc<Ram>,
        platform: Box<dyn Platform>,
        attention: Arc<Attention>,
    ) -> std::io::Result<Self> {
        let membership = Membership::new(&ram, Arc::clone(&attention));
        let mut vcpu = Self {
            state: CpuState::default(),
            stats: VcpuStats::default(),
            tlb: Tlb::new(),
            walk: PageWalk::new(&PagingState::default()),
            ram,
            platform,
            attention,
            membership,
            cpuid: config.cpuid,
            native: Native::new()?,
            pvm_paging: PvmPaging::default(),
            pvm: config.pvm.map(|config| Box::new(pvm::Pvm::new(config))),
        };
        vcpu.refresh();
        Ok(vcpu)
    }

    /// The attention word.
    pub fn attention(&self) -> &Arc<Attention> {
        &self.attention
    }

    /// Guest RAM.
    pub fn ram(&self) -> &Arc<Ram> {
        &self.ram
    }

    /// The platform, for the machine that made it.
    pub fn platform(&mut self) -> &mut dyn Platform {
        &mut *self.platform
    }

    /// Sends an exit to the platform and counts it.
    #[inline(never)]
    pub fn exit(&mut self, exit: Exit<'_>) -> Answer {
        let count = &mut self.stats.exits;
        *match exit {
            Exit::PortIn { .. } => &mut count.port_in,
            Exit::PortOut { .. } => &mut count.port_out,
            Exit::MmioRead { .. } => &mut count.mmio_read,
            Exit::MmioWrite { .. } => &mut count.mmio_write,
            Exit::ReadMsr { .. } => &mut count.msr_read,
            Exit::WriteMsr { .. } => &mut count.msr_write,
            Exit::ReadCr8 { .. } | Exit::WriteCr8 { .. } => &mut count.cr8,
            Exit::Hypercall { .. } => &mut count.hypercall,
        } += 1;
        // What the platform computes must not show in the guest's MXCSR.
        self.sync_mxcsr();
        self.outside(|vcpu| vcpu.platform.exit(exit))
    }

    // ---- registers ----

    /// General register `n` (0 to 15; see [`crate::state::REG_ZERO`] for the others), all 64 bits.
    #[inline(always)]
    pub fn reg(&self, n: u8) -> u64 {
        self.state.regs[usize::from(n & 31)]
    }

    /// Sets all 64 bits of general register `n`.
    #[inline(always)]
    pub fn set_reg(&mut self, n: u8, value: u64) {
        self.state.regs[usize::from(n & 31)] = value;
    }

    /// Register operand `n` as a `T`; for bytes 16 to 19 are AH, CH, DH and BH.
    #[inline(always)]
    pub fn get<T: crate::Data>(&self, n: u8) -> T {
        if T::SIZE == 1 && n >= 16 {
            return T::truncate(self.state.regs[usize::from(n & 3)] >> 8);
        }
        T::truncate(self.state.regs[usize::from(n & 31)])
    }

    /// Sets register operand `n`: 32-bit writes clear the upper half, smaller ones keep the rest.
    #[inline(always)]
    pub fn set<T: crate::Data>(&mut self, n: u8, value: T) {
        let value = value.widen();
        if T::SIZE == 1 && n >= 16 {
            let r = &mut self.state.regs[usize::from(n & 3)];
            *r = *r & !0xff00 | value << 8;
            return;
        }
        let r = &mut self.state.regs[usize::from(n & 31)];
        *r = match T::SIZE {
            1 => *r & !0xff | value,
            2 => *r & !0xffff | value,
            _ => value,
        };
    }

    /// Checks a branch target, truncated to the operand's size.
    ///
    /// # Errors
    /// #GP(0) if it is not canonical, or outside the code segment.
    #[inline(always)]
    pub fn check_target(&self, target: u64) -> crate::Exec {
        let valid = if self.state.code_mode == CodeMode::Bits64 {
            self.walk.canonical(Gva(target))
        } else {
            target <= u64::from(self.state.segments[usize::from(seg::CS)].limit)
        };
        if valid { Ok(()) } else { crate::fault::fault(crate::Fault::gp(0)) }
    }

    /// Sets RIP to a branch target, truncated to the operand's size.
    ///
    /// # Errors
    /// As [`Self::check_target`].
    #[inline(always)]
    pub fn jump(&mut self, target: u64) -> crate::Exec {
        self.check_target(target)?;
        self.state.set_rip(target);
        Ok(())
    }

    // ---- what is derived from the state ----

    /// Recomputes everything derived from the architectural state and flushes the TLB.
    pub fn refresh(&mut self) {
        self.refresh_paging();
        self.tlb.flush_all();
        self.refresh_mode();
    }

    /// Recomputes the code mode, the stack width, the single-step reason and the TLB table. To be called
    /// after a change of CS, SS, CPL, CR0.PE, AM, MP, EM or TS, CR4.OSFXSR or OSXSAVE, XCR0, EFER, DR7, or
    /// RFLAGS.VM, TF, RF or AC.
    pub fn refresh_mode(&mut self) {
        let state = &mut self.state;
        let cs = &state.segments[usize::from(seg::CS)];
        state.code_mode = if state.efer & efer::LMA != 0 && cs.has(Segment::LONG) {
            CodeMode::Bits64
        } else if state.cr0 & cr0::PE != 0
            && state.flags.system() & flags::VM == 0
            && cs.has(Segment::DEFAULT_BIG)
        {
            CodeMode::Bits32
        } else {
            CodeMode::Bits16
        };
        state.stack_mask = if state.code_mode == CodeMode::Bits64 {
            u64::MAX
        } else if state.segments[usize::from(seg::SS)].has(Segment::DEFAULT_BIG)
            && state.flags.system() & flags::VM == 0
        {
            0xffff_ffff
        } else {
            0xffff
        };
        state.fpu_ok = crate::fpu::allowed(state);
        state.slow &= !(slow::SINGLE_STEP | slow::BREAKPOINTS | slow::RESUME);
        if state.flags.system() & flags::RF != 0 {
            state.slow |= slow::RESUME;
        }
        if state.flags.system() & flags::TF != 0 {
            state.slow |= slow::SINGLE_STEP;
        }
        if state.dr7 & 0xff != 0 {
            state.slow |= slow::BREAKPOINTS;
        }
        self.refresh_table();
        if self.pvm.is_some() && !self.state.deprivileged {
            self.watch_for_pvm_mode();
        }
    }

    /// Rebuilds the page walker, without flushing the TLB. To be called after a change of CR0, CR3, CR4, EFER,
    /// the PDPTEs, PKRU or IA32_PKRS.
    pub fn refresh_paging(&mut self) {
        if self.state.deprivileged {
            return self.refresh_pvm_paging();
        }
        let state = &self.state;
        self.walk = PageWalk::new(&PagingState {
            cr0: state.cr0,
            cr3: state.cr3,
            cr4: state.cr4,
            efer: state.efer,
            pkru: state.pkru,
            pkrs: state.msrs.pkrs,
            maxphyaddr: self.cpuid.maxphyaddr(),
            pdptrs: state.pdptrs,
            features: PagingFeatures::all(),
        });
        // PCID 0xfff shares a tag with 0xffe (no tag may be all ones): MOV to CR3 flushes between them.
        self.state.tlb_tag = if state.cr4 & cr4::PCIDE != 0 { (state.cr3 & 0xfff).min(0xffe) } else { 0 };
    }

    /// Replaces RFLAGS bits under `mask` (any bits) and refreshes what depends on them.
    pub fn set_rflags(&mut self, mask: u64, bits: u64) {
        let old = self.state.flags.bits();
        let new = old & !mask | bits & mask;
        self.state.flags.set_bits(new);
        if (old ^ new) & (flags::TF | flags::VM | flags::AC | flags::RF) != 0 {
            self.refresh_mode();
            // A single-step trap follows the *next* instruction: the running block must not go on.
            self.end_block();
        }
        if new & !old & flags::IF != 0 {
            // A pending interrupt is taken before the next instruction.
            self.end_block();
        }
    }

    /// Ends the running block after the present instruction, so that attention, modes and code are looked
    /// at afresh.
    #[inline(always)]
    pub fn end_block(&mut self) {
        self.state.block_end = 0;
    }

    /// Whether a data breakpoint is armed, which sends all data accesses through the slow path.
    pub(crate) fn data_breakpoints_armed(&self) -> bool {
        self.state.slow & slow::BREAKPOINTS != 0 && {
            let dr7 = self.state.dr7;
            (0..4).any(|n| dr7 >> (n * 2) & 3 != 0 && dr7 >> (16 + n * 4) & 1 != 0)
        }
    }

    /// Notes that the instruction `code` is not implemented.
    #[cold]
    pub(crate) fn note_unimplemented(&mut self, code: Code) {
        *self.stats.unimplemented.entry(format!("{code:?}")).or_default() += 1;
    }

    /// Begins to run guest code: waits while another vCPU is alone, and serves what others asked for meanwhile.
    pub(crate) fn enter(&mut self) {
        let tlb = &mut self.tlb;
        self.membership.enter(self.ram.group(), |what| match what {
            Protect::Page(host) => tlb.write_protect(host),
            Protect::All => tlb.write_protect_all(),
        });
    }

    /// Ends to run guest code: other vCPUs do not wait for this one.
    pub(crate) fn leave(&self) {
        self.membership.leave();
    }

    /// Calls `f` with other vCPUs not waiting for this one. Pages may become watched meanwhile: a right to write
    /// that was found before the call is void after it.
    pub(crate) fn outside<R>(&mut self, f: impl FnOnce(&mut Self) -> R) -> R {
        let inside = self.membership.is_inside();
        if inside {
            self.leave();
        }
        let result = f(self);
        if inside {
            self.enter();
        }
        result
    }
}
