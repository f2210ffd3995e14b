//! A guest for cases: memory, page tables and descriptor tables that give user code the windows where the
//! host process has them, and handlers that halt.
//!
//! # Theory of operation
//! The windows are user pages with the protection that the host gives them. Everything of the guest's kernel
//! lies in the upper half, out of user code's reach: GDT, TSS, IDT, a stack, and one HLT per vector. A run
//! starts at the instruction with privilege level 3 and ends when an exception has been delivered and its
//! handler halts. Which handler it is tells the vector; the frame on the stack, the rest. So an engine under
//! test only needs to run a vCPU until it sleeps, and event delivery is tested along the way.

use std::sync::Arc;

use cpu::state::{REG_RIP, Segment, cr0, cr4, efer, reg, seg};
use cpu::{Answer, Attention, Cpuid, Exit, GuestRam, Platform, Ram, Vcpu, VcpuConfig};
use vm_memory::{Bytes, GuestAddress};

use crate::case::{
    CODE, CODE_SIZE, Case, DATA, DATA_SIZE, DATA_WRITABLE, EngineError, Exception, FILLER, GS_BASE, Memory,
    Mode, Outcome, Registers, USER_CS, USER_CS32, USER_SS, VectorState,
};

const PAGE: u64 = 0x1000;
/// Where the guest's kernel lives.
const KERNEL: u64 = 0xffff_8000_0000_0000;
const KERNEL_CS: u16 = 0x10;
const TSS: u16 = 0x40;

/// Guest-physical pages, by number.
mod page {
    pub(super) const PML4: u64 = 1;
    pub(super) const LOW: [u64; 3] = [2, 3, 4];
    pub(super) const HIGH: [u64; 3] = [5, 6, 7];
    /// The kernel's pages, mapped one after the other from `KERNEL`: descriptor tables, handlers, stack.
    pub(super) const TABLES: u64 = 8;
    pub(super) const HANDLERS: u64 = 9;
    pub(super) const STACK: u64 = 10;
    pub(super) const DATA: u64 = 11;
    pub(super) const CODE: u64 = 14;
    pub(super) const COUNT: u64 = 16;
}

const GDT_AT: u64 = 0;
const TSS_AT: u64 = 0x100;
const IDT_AT: u64 = 0x200;
const HANDLERS_VA: u64 = KERNEL + PAGE;
const STACK_TOP: u64 = KERNEL + 3 * PAGE;
/// Bytes between handlers.
const HANDLER_STEP: u64 = 16;

/// GDT entries at the selectors that Linux uses.
const GDT: [u64; 8] =
    [0, 0, 0x00af_9b00_0000_ffff, 0, 0x00cf_fb00_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff, 0];

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const NX: u64 = 1 << 63;

/// A vCPU in such a guest.
#[derive(Debug)]
pub struct Guest {
    /// The vCPU, for the engine to run.
    pub vcpu: Vcpu,
    ram: Arc<Ram>,
    placed: (u64, usize),
}

/// Nothing is attached.
struct Nothing;

impl Platform for Nothing {
    fn exit(&mut self, _exit: Exit<'_>) -> Answer {
        Answer::Refused
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }

    fn interrupt_pending(&mut self) -> bool {
        false
    }

    fn tsc(&self) -> u64 {
        0
    }

    fn init(&mut self) {}
}

fn host(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> EngineError {
    EngineError::Host { what: "making a guest", source: std::io::Error::other(source) }
}

impl Guest {
    /// Makes the guest.
    ///
    /// # Errors
    /// When the host refuses memory.
    pub fn new() -> Result<Self, EngineError> {
        let memory =
            GuestRam::from_ranges(&[(GuestAddress(0), (page::COUNT * PAGE) as usize)]).map_err(host)?;
        build(&memory).map_err(host)?;
        let ram = Arc::new(Ram::new(memory));
        let config = VcpuConfig { cpuid: Cpuid::host_supported(), pvm: None };
        let mut vcpu = Vcpu::new(config, Arc::clone(&ram), Box::new(Nothing), Arc::new(Attention::new()))
            .map_err(host)?;
        let state = &mut vcpu.state;
        state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        state.cr3 = page::PML4 * PAGE;
        state.cr4 = cr4::PAE | cr4::PGE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        state.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        state.xcr0 = 7;
        state.gdtr.base = KERNEL + GDT_AT;
        state.gdtr.limit = TSS + 15;
        state.idtr.base = KERNEL + IDT_AT;
        state.idtr.limit = 32 * 16 - 1;
        state.tr.base = KERNEL + TSS_AT;
        state.tr.segment = Segment { selector: TSS, limit: 0x67, attributes: 0x8b00 };
        vcpu.refresh();
        Ok(Self { vcpu, ram, placed: (0, 0) })
    }

    /// Makes the guest ready to run `case`.
    ///
    /// # Errors
    /// When a case does not fit the windows.
    pub fn load(&mut self, case: &Case) -> Result<(), EngineError> {
        let memory = self.ram.memory();
        let code = |rip: u64| GuestAddress(page::CODE * PAGE + rip);
        let (old, len) = self.placed;
        memory.write_slice(&[FILLER; 16][..len.min(16)], code(old)).map_err(host)?;
        let at = case.registers.rip.wrapping_sub(CODE);
        let len = case.bytes.len().min(CODE_SIZE.saturating_sub(at) as usize);
        memory.write_slice(&case.bytes[..len], code(at)).map_err(host)?;
        self.placed = (at, len);
        memory.write_slice(&case.memory[..], GuestAddress(page::DATA * PAGE)).map_err(host)?;

        let state = &mut self.vcpu.state;
        let attributes = |selector: u16| {
            let descriptor = GDT.get(usize::from(selector >> 3)).copied().unwrap_or(0);
            (descriptor >> 32) as u32 & 0x00f0_ff00
        };
        let flat = |selector| Segment { selector, limit: 0xffff_ffff, attributes: attributes(selector) };
        state.segments = [flat(USER_SS); 6];
        state.segments[usize::from(seg::CS)] =
            flat(if case.mode == Mode::Bits64 { USER_CS } else { USER_CS32 });
        state.segments[usize::from(seg::FS)] = Segment::default();
        state.segments[usize::from(seg::GS)] = Segment::default();
        state.seg_base = [0; 8];
        state.seg_base[usize::from(seg::GS)] = GS_BASE;
        state.cpl = 3;
        state.slow = 0;
        state.cr2 = 0;
        state.regs[..16].copy_from_slice(&case.registers.gpr);
        state.regs[usize::from(REG_RIP)] = case.registers.rip;
        state.flags.set_bits(case.registers.rflags);
        let v = &case.registers.vector;
        state.fpu.ymm = v.ymm;
        state.fpu.mxcsr = v.mxcsr;
        state.fpu.set_fcw(v.fcw);
        state.fpu.set_fsw(v.fsw);
        state.fpu.set_tags(v.tags);
        for (n, st) in v.st.iter().enumerate() {
            state.fpu.set_st(n, *st);
        }
        self.vcpu.refresh_mode();
        Ok(())
    }

    /// What has become of `case`, after the vCPU has halted.
    ///
    /// # Errors
    /// When it halted somewhere else than in a handler.
    pub fn outcome(&self, case: &Case) -> Result<Outcome, EngineError> {
        let state = &self.vcpu.state;
        let rip = state.rip();
        let handler = rip.wrapping_sub(HANDLERS_VA);
        let rsp = state.regs[usize::from(reg::RSP)];
        let has_code = match STACK_TOP.wrapping_sub(rsp) {
            40 => false,
            48 => true,
            _ => return Err(stopped(rip, format!("the stack pointer is {rsp:#x}"))),
        };
        if handler >= 32 * HANDLER_STEP || handler % HANDLER_STEP != 1 || state.cpl != 0 {
            return Err(stopped(rip, "not in a handler".to_owned()));
        }
        let mut frame = [0u64; 6];
        for (n, word) in frame.iter_mut().enumerate() {
            let at = (page::STACK + 1) * PAGE - 48 + n as u64 * 8;
            *word = self.ram.memory().read_obj(GuestAddress(at)).map_err(host)?;
        }
        let [error_code, rip, cs, rflags, rsp, ss] = frame;
        let expected = if case.mode == Mode::Bits64 { USER_CS } else { USER_CS32 };
        if cs != u64::from(expected) || ss != u64::from(USER_SS) {
            return Err(stopped(rip, format!("the frame has CS {cs:#x} and SS {ss:#x}")));
        }
        let exception = Exception {
            vector: (handler / HANDLER_STEP) as u8,
            error_code: if has_code { error_code as u32 } else { 0 },
            address: state.cr2,
        };
        let mut registers = Registers { rip, rflags, ..Registers::default() };
        registers.gpr.copy_from_slice(&state.regs[..16]);
        registers.gpr[4] = rsp;
        registers.vector = VectorState {
            fcw: state.fpu.fcw(),
            fsw: state.fpu.fsw(),
            tags: state.fpu.tags(),
            st: std::array::from_fn(|n| state.fpu.st(n)),
            mxcsr: state.fpu.mxcsr,
            ymm: state.fpu.ymm,
        };
        let mut memory: Box<Memory> = Box::new([0; DATA_SIZE as usize]);
        self.ram.memory().read_slice(&mut memory[..], GuestAddress(page::DATA * PAGE)).map_err(host)?;
        Ok(Outcome::from_exception(case, exception, registers, memory))
    }
}

fn stopped(rip: u64, what: String) -> EngineError {
    EngineError::Stopped { rip, what }
}

/// Fills the guest's memory but for the windows.
fn build(memory: &GuestRam) -> Result<(), vm_memory::GuestMemoryError> {
    let put =
        |page: u64, offset: u64, value: u64| memory.write_obj(value, GuestAddress(page * PAGE + offset));
    let frame = |page: u64| page * PAGE;
    let index = |va: u64, level: u64| (va >> (12 + 9 * level) & 511) * 8;
    // PML4, PDPT and PD entries of the two halves.
    for (va, [pdpt, pd, pt]) in [(DATA, page::LOW), (KERNEL, page::HIGH)] {
        put(page::PML4, index(va, 3), frame(pdpt) | P | W | U)?;
        put(pdpt, index(va, 2), frame(pd) | P | W | U)?;
        put(pd, index(va, 1), frame(pt) | P | W | U)?;
    }
    for n in 0..DATA_SIZE / PAGE {
        let writable = if n * PAGE < DATA_WRITABLE { W } else { 0 };
        put(page::LOW[2], index(DATA + n * PAGE, 0), frame(page::DATA + n) | P | U | writable | NX)?;
    }
    for n in 0..CODE_SIZE / PAGE {
        put(page::LOW[2], index(CODE + n * PAGE, 0), frame(page::CODE + n) | P | U)?;
    }
    for n in 0..3 {
        put(page::HIGH[2], index(KERNEL + n * PAGE, 0), frame(page::TABLES + n) | P | W)?;
    }
    for (n, descriptor) in GDT.iter().enumerate() {
        put(page::TABLES, GDT_AT + n as u64 * 8, *descriptor)?;
    }
    let tss = KERNEL + TSS_AT;
    let low = 0x67 | (tss & 0xff_ffff) << 16 | 0x8b << 40 | (tss >> 24 & 0xff) << 56;
    put(page::TABLES, GDT_AT + u64::from(TSS), low)?;
    put(page::TABLES, GDT_AT + u64::from(TSS) + 8, tss >> 32)?;
    // RSP0 lies at offset 4.
    put(page::TABLES, TSS_AT + 4, STACK_TOP)?;
    for vector in 0..32 {
        let handler = HANDLERS_VA + vector * HANDLER_STEP;
        // INT3 checks the gate's privilege level.
        let kind = if vector == 3 { 0xee } else { 0x8e };
        let low = handler & 0xffff | u64::from(KERNEL_CS) << 16 | kind << 40 | (handler >> 16 & 0xffff) << 48;
        put(page::TABLES, IDT_AT + vector * 16, low)?;
        put(page::TABLES, IDT_AT + vector * 16 + 8, handler >> 32)?;
        memory.write_slice(&[0xf4], GuestAddress(page::HANDLERS * PAGE + vector * HANDLER_STEP))?;
    }
    memory.write_slice(&[FILLER; CODE_SIZE as usize], GuestAddress(page::CODE * PAGE))
}
