//! The vCPU as crate `pvm` sees it: registers, MSRs, memory.

use mmu::{AccessKind, Gpa, Gva, Privilege};
use pvm::abi::{Field, selector};
use pvm::processor::{Context, Flush, Roots, Selectors, SharedStruct};
use pvm::{AddressRanges, Processor, Register};

use crate::exit::{Answer, Exit};
use crate::flags;
use crate::ram::RamPage;
use crate::segment::Descriptor;
use crate::state::{CodeMode, REG_RIP, Segment, cr4, reg, seg};
use crate::vcpu::Vcpu;

/// Bit 63 of a CR3 value with PCIDs: keep translations.
const CR3_NO_FLUSH: u64 = 1 << 63;
/// R10, whose place among the registers is its number.
const R10: u8 = 10;

/// The flat segments of an unprivileged program: 64-bit code, 32-bit code, data.
const CODE64: u32 = FLAT | Segment::CODE | Segment::LONG;
const CODE32: u32 = FLAT | Segment::CODE | Segment::DEFAULT_BIG;
const DATA: u32 = FLAT | Segment::DEFAULT_BIG;
const FLAT: u32 = Segment::PRESENT
    | Segment::NON_SYSTEM
    | Segment::GRANULARITY
    | Segment::ACCESSED
    | Segment::WRITABLE
    | 3 << 13;

impl SharedStruct for RamPage<'_> {
    #[inline]
    fn load(&self, field: Field) -> u64 {
        match field.size {
            2 => self.load_at::<u16>(field.offset).into(),
            4 => self.load_at::<u32>(field.offset).into(),
            _ => self.load_at::<u64>(field.offset),
        }
    }

    #[inline]
    fn store(&mut self, field: Field, value: u64) {
        match field.size {
            2 => self.store_at(field.offset, value as u16),
            4 => self.store_at(field.offset, value as u32),
            _ => self.store_at(field.offset, value),
        }
    }
}

impl Vcpu {
    /// Loads CS and SS with flat segments.
    fn load_program_segments(&mut self, selectors: Selectors, code: u32) {
        let flat = |selector, attributes| Segment { selector, limit: u32::MAX, attributes };
        self.state.segments[usize::from(seg::CS)] = flat(selectors.cs, code);
        self.state.segments[usize::from(seg::SS)] = flat(selectors.ss, DATA);
        self.state.seg_base[usize::from(seg::CS)] = 0;
        self.state.seg_base[usize::from(seg::SS)] = 0;
    }

    /// Replaces RFLAGS. The running block ends anyway.
    #[inline(always)]
    fn load_rflags(&mut self, value: u64) {
        const MODES: u64 = flags::TF | flags::VM | flags::AC | flags::RF;
        let old = self.state.flags.system();
        self.state.flags.set_bits(value);
        if (old ^ value) & MODES != 0 {
            self.refresh_mode();
        }
    }

    /// The part of a mode switch that both directions share. The CPL is the new one already.
    #[inline]
    fn switch_context(&mut self, context: Context, mode: CodeMode) {
        self.state.cr3 = context.cr3 & !CR3_NO_FLUSH;
        self.walk.set_cr3(self.state.cr3);
        self.state.pkru = context.pkru;
        self.refresh_pvm_keys();
        if self.state.code_mode == mode {
            self.refresh_table();
        } else {
            self.refresh_mode();
        }
    }

    /// Whether the `size` bytes at `gva` can be accessed as `kind` by a supervisor, and are RAM.
    fn is_supervisor_ram(&mut self, gva: u64, size: u64, kind: AccessKind) -> bool {
        [gva, gva.wrapping_add(size - 1)].into_iter().all(|address| {
            self.walk.canonical(Gva(address))
                && matches!(self.translate(Gva(address), kind, Privilege::Supervisor), Ok((_, Some(_))))
        })
    }
}

impl Processor for Vcpu {
    type Shared<'a> = RamPage<'a>;

    #[inline(always)]
    fn register(&self, register: Register) -> u64 {
        match register {
            Register::Rax => self.reg(reg::RAX),
            Register::Rbx => self.reg(reg::RBX),
            Register::Rcx => self.reg(reg::RCX),
            Register::Rdx => self.reg(reg::RDX),
            Register::Rsi => self.reg(reg::RSI),
            Register::Rsp => self.reg(reg::RSP),
            Register::R10 => self.reg(R10),
            Register::R11 => self.reg(reg::R11),
            Register::Rip => self.reg(REG_RIP),
            Register::Rflags => self.state.flags.bits(),
            Register::Cr2 => self.state.cr2,
            Register::Cr3 => self.state.cr3,
            Register::Cr4 => self.state.cr4,
            Register::GsBase => self.state.seg_base[usize::from(seg::GS)],
            Register::KernelGsBase => self.state.msrs.kernel_gs_base,
            Register::Lstar => self.state.msrs.lstar,
            Register::Pkru => self.state.pkru.into(),
        }
    }

    #[inline(always)]
    fn set_register(&mut self, register: Register, value: u64) {
        match register {
            Register::Rax => self.set_reg(reg::RAX, value),
            Register::Rbx => self.set_reg(reg::RBX, value),
            Register::Rcx => self.set_reg(reg::RCX, value),
            Register::Rdx => self.set_reg(reg::RDX, value),
            Register::Rsi => self.set_reg(reg::RSI, value),
            Register::Rsp => self.set_reg(reg::RSP, value),
            Register::R10 => self.set_reg(R10, value),
            Register::R11 => self.set_reg(reg::R11, value),
            Register::Rip => self.set_reg(REG_RIP, value),
            Register::Rflags => self.load_rflags(value),
            Register::GsBase => self.state.seg_base[usize::from(seg::GS)] = value,
            Register::Pkru => self.load_pkru(value as u32),
            Register::Cr2 => self.state.cr2 = value,
            // Only read by the ABI.
            Register::Cr3 | Register::Cr4 | Register::KernelGsBase | Register::Lstar => {}
        }
    }

    #[inline]
    fn selectors(&self) -> Selectors {
        let selector = |s: u8| self.state.segments[usize::from(s)].selector;
        Selectors { cs: selector(seg::CS), ss: selector(seg::SS) }
    }

    #[inline]
    fn enter_supervisor(&mut self, context: Context) {
        self.state.cpl = 0;
        self.load_program_segments(Selectors { cs: selector::USER_CS, ss: selector::USER_DS }, CODE64);
        self.switch_context(context, CodeMode::Bits64);
    }

    #[inline]
    fn enter_user(&mut self, selectors: Selectors, context: Context) -> Result<(), u16> {
        self.state.cpl = 3;
        let (code, mode) = match selectors.cs {
            selector::USER32_CS => (CODE32, CodeMode::Bits32),
            _ => (CODE64, CodeMode::Bits64),
        };
        self.load_program_segments(selectors, code);
        self.switch_context(context, mode);
        if !matches!(selectors.cs, selector::USER_CS | selector::USER32_CS) {
            Err(selectors.cs)
        } else if selectors.ss != selector::USER_DS {
            Err(selectors.ss)
        } else {
            Ok(())
        }
    }

    #[inline]
    fn shared(&mut self, page: u64) -> Option<RamPage<'_>> {
        let page = self.ram.page(Gpa(page))?;
        // As for any store: whoever is about to decode code from the page waits until this vCPU answers.
        if page.is_watched() {
            page.note_write();
            self.state.block_end = 0;
        }
        Some(page)
    }

    fn write_frame(&mut self, address: u64, frame: &[u64; 8]) -> bool {
        let mut bytes = [0; 64];
        for (to, word) in bytes.chunks_exact_mut(8).zip(frame) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        // A hypervisor writes it: no breakpoint of the guest's sees that.
        let (pending, slow) = (self.state.pending_dr6, self.state.slow);
        let written = self.is_supervisor_ram(address, 64, AccessKind::Write)
            && self.write_bytes_as(address, &bytes, Privilege::Supervisor).is_ok();
        (self.state.pending_dr6, self.state.slow) = (pending, slow);
        written
    }

    fn read_frame(&mut self, address: u64) -> Option<[u64; 8]> {
        let mut bytes = [0; 64];
        let (pending, slow) = (self.state.pending_dr6, self.state.slow);
        let read = self.is_supervisor_ram(address, 64, AccessKind::Read)
            && self.read_bytes_as(address, &mut bytes, Privilege::Supervisor).is_ok();
        (self.state.pending_dr6, self.state.slow) = (pending, slow);
        let (words, _) = bytes.as_chunks::<8>();
        let mut frame = [0; 8];
        for (to, word) in frame.iter_mut().zip(words) {
            *to = u64::from_le_bytes(*word);
        }
        read.then_some(frame)
    }

    fn read_msr(&mut self, index: u32) -> Option<u64> {
        Vcpu::read_msr(self, index).ok()
    }

    fn write_msr(&mut self, index: u32, value: u64) -> bool {
        Vcpu::write_msr(self, index, value).is_ok()
    }

    #[inline]
    fn is_canonical(&self, address: u64) -> bool {
        self.walk.canonical(Gva(address))
    }

    #[inline]
    fn linear_address_bits(&self) -> u32 {
        if self.state.cr4 & cr4::LA57 != 0 { 57 } else { 48 }
    }

    fn is_root(&self, value: u64) -> bool {
        let keep = if self.state.cr4 & cr4::PCIDE != 0 { CR3_NO_FLUSH } else { 0 };
        (value & !keep) >> self.cpuid.maxphyaddr() == 0
    }

    fn load_roots(&mut self, roots: Roots) {
        let levels = if roots.five_level { cr4::LA57 & self.cpuid.cr4_bits() } else { 0 };
        let changed = (self.state.cr4 ^ levels) & cr4::LA57 != 0;
        let supervisor = roots.supervisor & !CR3_NO_FLUSH;
        self.state.cr4 = self.state.cr4 & !cr4::LA57 | levels;
        if changed {
            self.state.cr3 = supervisor;
            self.tlb.flush_all();
            self.refresh_pvm_paging();
        } else {
            if roots.flush {
                self.flush_pvm_root(roots.user & !CR3_NO_FLUSH);
            }
            self.load_pvm_root(supervisor, roots.flush);
        }
    }

    fn flush(&mut self, what: Flush) {
        match what {
            Flush::All => self.tlb.flush_all(),
            Flush::Roots { switch_cr3 } => {
                self.flush_pvm_root(self.state.cr3);
                self.flush_pvm_root(switch_cr3 & !CR3_NO_FLUSH);
            }
            Flush::Page(address) => self.tlb.flush_page(Gva(address)),
        }
    }

    fn confine(&mut self, ranges: AddressRanges) {
        self.pvm_paging.ranges = Some(ranges);
    }

    fn load_gs(&mut self, selector: u16, descriptor: Option<u64>) -> u64 {
        let (segment, base) = match descriptor.map(Descriptor) {
            Some(d) => (d.segment(selector), d.base()),
            None => (Segment { selector: 0, limit: 0, attributes: 0 }, 0),
        };
        self.state.segments[usize::from(seg::GS)] = segment;
        base
    }

    fn kvm_hypercall(&mut self, number: u64, args: [u64; 4]) -> u64 {
        let mut result = pvm::abi::hypercall::KVM_ENOSYS;
        match self.exit(Exit::Hypercall { number, args, cpl: 0, long_mode: true, result: &mut result }) {
            Answer::Done => result,
            Answer::Refused => pvm::abi::hypercall::KVM_ENOSYS,
        }
    }
}
