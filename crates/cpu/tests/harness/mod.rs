//! Small guest programs on a vCPU with flat RAM.
//!
//! A [`Guest`] is one vCPU in real, protected or long mode with a GDT, an IDT, a TSS and page tables at fixed places,
//! 16 MiB of RAM, and a platform that records exits and gives scripted answers. Every vector's handler is a HLT at
//! an address of its own, so that a program that faults simply stops, and [`Guest::trap`] tells with which frame.

#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test program uses a part of it")]

mod pvm_guest;

#[allow(unused_imports, reason = "each test program uses a part of it")]
pub use pvm_guest::*;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use cpu::state::{CodeMode, Segment, SystemSegment, TableRegister, cr0, cr4, efer, reg, seg, slow};
use cpu::{Answer, Attention, Cpuid, Exit, GuestRam, Interpreter, Outcome, Platform, Ram, Vcpu, VcpuConfig};
use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use mmu::Gpa;
use vm_memory::{Bytes as _, GuestAddress};

/// Size of RAM, from address 0.
pub const RAM: usize = 16 << 20;
/// The GDT.
pub const GDT: u64 = 0x1000;
/// The IDT.
pub const IDT: u64 = 0x2000;
/// The TSS that TR points to.
pub const TSS: u64 = 0x3800;
/// The handlers: a HLT each, 16 bytes apart.
pub const HANDLERS: u64 = 0x4000;
/// Where programs start.
pub const CODE: u64 = 0x8000;
/// The page tables of long mode: PML4, PDPT, PD, and the PT of the first 2 MiB.
pub const TABLES: u64 = 0x1_0000;
/// The page table entries of the first 2 MiB.
pub const PT: u64 = TABLES + 0x3000;
/// What [`Guest::wrapping`] has below 4 GiB.
pub const LAST_PAGE: u64 = 0x5_0000;
/// Scratch memory.
pub const DATA: u64 = 0x2_0000;
/// The initial stack pointer.
pub const STACK: u64 = 0x3_0000;
/// RSP0 of the TSS.
pub const STACK0: u64 = 0x3_8000;
/// IST1 of the TSS, on purpose not aligned.
pub const IST1: u64 = 0x3_c008;
/// PVM: the shared structure.
pub const PVCS: u64 = 0x4_0000;
/// PVM: where events enter.
pub const ENTRY: u64 = 0x4_1000;
/// PVM: where system calls enter.
pub const LSTAR: u64 = 0x4_2000;
/// PVM: the SYSCALL that returns to user mode.
pub const RETU: u64 = 0x4_2100;
/// PVM: the SYSCALL that returns to supervisor mode.
pub const RETS: u64 = 0x4_2200;
/// A guest-physical address without RAM, mapped in long mode.
pub const MMIO: u64 = 0xd000_0000;

/// Selectors of the GDT.
pub mod sel {
    pub const CODE64: u16 = 0x08;
    pub const DATA: u16 = 0x10;
    pub const CODE32: u16 = 0x18;
    pub const USER_CODE32: u16 = 0x23;
    pub const USER_DATA: u16 = 0x2b;
    pub const USER_CODE64: u16 = 0x33;
    /// 16 bytes.
    pub const TSS: u16 = 0x38;
    pub const CODE16: u16 = 0x48;
    pub const DATA16: u16 = 0x50;
    pub const ABSENT: u16 = 0x58;
    pub const READ_ONLY: u16 = 0x60;
    /// Free for tests: 16 bytes.
    pub const SPARE: u16 = 0x68;
    /// Free for tests.
    pub const SPARE2: u16 = 0x78;
    pub const CONFORMING64: u16 = 0x80;
    pub const LAST: u16 = 0x80;
}

/// An exit that the platform saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    In { port: u16, size: usize },
    Out { port: u16, data: Vec<u8> },
    Read { gpa: Gpa, size: usize },
    Write { gpa: Gpa, data: Vec<u8> },
    ReadMsr(u32),
    WriteMsr(u32, u64),
    ReadCr8,
    WriteCr8(u64),
    Hypercall { number: u64, args: [u64; 4], long_mode: bool, cpl: u8 },
    TscAdjusted(u64),
}

/// What the platform saw, and what it is to answer.
#[derive(Debug, Default)]
pub struct Script {
    pub seen: Vec<Seen>,
    /// Values for IN, MMIO reads, RDMSR, CR8 and hypercalls, in order; zero when it runs out.
    pub answers: VecDeque<u64>,
    /// MSRs that exist.
    pub msrs: Vec<u32>,
    /// Interrupts to deliver.
    pub interrupts: VecDeque<u8>,
    /// An interrupt that arrives with the next exit.
    pub interrupt_at_exit: Option<u8>,
    /// The machine's time-stamp counter, which stands still.
    pub tsc: u64,
}

/// A [`Script`] as a platform and a test share it.
pub type SharedScript = Arc<Mutex<Script>>;

struct TestPlatform(SharedScript, Arc<Attention>);

impl TestPlatform {
    fn boxed(script: SharedScript, attention: Arc<Attention>) -> Box<dyn Platform> {
        Box::new(Self(script, attention))
    }
}

impl Platform for TestPlatform {
    fn exit(&mut self, exit: Exit<'_>) -> Answer {
        let mut script = self.0.lock().unwrap();
        if let Some(vector) = script.interrupt_at_exit.take() {
            script.interrupts.push_back(vector);
            self.1.raise(cpu::attention::INTERRUPT);
        }
        let mut answer = || script.answers.pop_front().unwrap_or(0);
        let seen = match exit {
            Exit::PortIn { port, data } => {
                let size = data.len();
                data.copy_from_slice(&answer().to_le_bytes()[..size]);
                Seen::In { port, size }
            }
            Exit::PortOut { port, data } => Seen::Out { port, data: data.to_vec() },
            Exit::MmioRead { gpa, data } => {
                for chunk in data.chunks_mut(8) {
                    let size = chunk.len();
                    chunk.copy_from_slice(&answer().to_le_bytes()[..size]);
                }
                Seen::Read { gpa, size: data.len() }
            }
            Exit::MmioWrite { gpa, data } => Seen::Write { gpa, data: data.to_vec() },
            Exit::ReadMsr { index, value } => {
                if !script.msrs.contains(&index) {
                    return Answer::Refused;
                }
                *value = script.answers.pop_front().unwrap_or(0);
                Seen::ReadMsr(index)
            }
            Exit::WriteMsr { index, value } => {
                if !script.msrs.contains(&index) {
                    return Answer::Refused;
                }
                Seen::WriteMsr(index, value)
            }
            Exit::ReadCr8 { value } => {
                *value = answer();
                Seen::ReadCr8
            }
            Exit::WriteCr8 { value } => Seen::WriteCr8(value),
            Exit::Hypercall { number, args, long_mode, cpl, result } => {
                *result = answer();
                Seen::Hypercall { number, args, long_mode, cpl }
            }
        };
        script.seen.push(seen);
        Answer::Done
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.0.lock().unwrap().interrupts.pop_front()
    }

    fn interrupt_pending(&mut self) -> bool {
        !self.0.lock().unwrap().interrupts.is_empty()
    }

    fn tsc(&self) -> u64 {
        self.0.lock().unwrap().tsc
    }

    fn tsc_adjusted(&mut self, adjust: u64) {
        self.0.lock().unwrap().seen.push(Seen::TscAdjusted(adjust));
    }
}

/// An event frame as it lies on the stack of the handler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trap {
    pub vector: u8,
    pub error_code: Option<u64>,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    /// Only in long mode, or if the handler has a stack of its own.
    pub rsp: u64,
    pub ss: u64,
}

/// A vCPU and what it is connected to.
pub struct Guest {
    pub vcpu: Vcpu,
    pub engine: Interpreter,
    pub script: SharedScript,
    pub attention: Arc<Attention>,
    pub ram: Arc<Ram>,
}

/// A segment or gate descriptor's 8 bytes for a segment: base, limit in its units, attributes as in
/// [`Segment`].
pub const fn descriptor(base: u32, limit: u32, attributes: u32) -> u64 {
    let low = limit as u64 & 0xffff | (base as u64 & 0xff_ffff) << 16;
    let high = attributes as u64 | limit as u64 & 0xf_0000 | base as u64 & 0xff00_0000;
    low | high << 32
}

/// A gate: selector, offset (32 bits of it), and the second byte of attributes (P, DPL, type).
pub const fn gate(selector: u16, offset: u64, kind: u8) -> u64 {
    offset & 0xffff | (selector as u64) << 16 | (kind as u64) << 40 | (offset & 0xffff_0000) << 32
}

/// Type and attribute bits of flat 4 GiB segments.
pub const FLAT_DATA: u32 = 0x00c0_9300;
pub const FLAT_CODE32: u32 = 0x00c0_9b00;
pub const FLAT_CODE64: u32 = 0x00a0_9b00;
pub const DPL3: u32 = 3 << 13;

fn new_ram() -> Arc<Ram> {
    Arc::new(Ram::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM)]).unwrap()))
}

/// What a guest's processor has.
#[derive(Clone, Copy, Default)]
struct Offer {
    /// The PVM ABI.
    pvm: Option<pvm::Config>,
    /// A feature that it lacks.
    hidden: Option<&'static str>,
}

/// The PVM ABI as the guests here have it.
fn abi() -> Offer {
    let ranges = pvm::AddressRanges::new(402..434, Some(402..434)).unwrap();
    let config = pvm::Config { generation: &pvm::abi::GENERATION_1, ranges, cpu: 3 };
    Offer { pvm: Some(config), hidden: None }
}

impl Guest {
    /// After reset, with CS:IP at `CODE` in the first 64 KiB.
    pub fn real() -> Self {
        Self::real_with(Offer::default())
    }

    /// As [`Self::real`], for a guest that may use the PVM ABI.
    pub fn real_before_pvm() -> Self {
        Self::real_with(abi())
    }

    fn real_with(offer: Offer) -> Self {
        let mut guest = Self::with(new_ram(), offer, TestPlatform::boxed);
        let state = &mut guest.vcpu.state;
        state.set_real_mode_cs(0);
        state.set_rip(CODE);
        state.set_rsp(0x7000);
        state.idtr = TableRegister { base: 0, limit: 0x3ff };
        for vector in 0..256 {
            guest.poke::<u32>(vector * 4, (HANDLERS + vector * 16) as u32);
        }
        guest.vcpu.refresh();
        guest
    }

    /// 32-bit protected mode without paging.
    pub fn protected() -> Self {
        let mut guest = Self::on(new_ram());
        for vector in 0..256 {
            guest.set_gate(vector, sel::CODE32, HANDLERS + vector * 16, 0x8e);
        }
        guest.poke::<u32>(TSS + 4, STACK0 as u32);
        guest.poke::<u32>(TSS + 8, u32::from(sel::DATA));
        guest.poke::<u64>(GDT + u64::from(sel::TSS), descriptor(TSS as u32, 0x67, 0x8b00));
        guest.vcpu.state.cr0 |= cr0::PE;
        guest.flat(sel::CODE32, FLAT_CODE32, sel::DATA);
        guest
    }

    /// 32-bit protected mode with 32-bit page tables: the last page below 4 GiB is at [`LAST_PAGE`], the rest is
    /// identity-mapped. DS starts 64 KiB below 4 GiB.
    pub fn wrapping() -> Self {
        let mut guest = Self::protected();
        for large in 0..1023u32 {
            guest.poke::<u32>(TABLES + u64::from(large) * 4, large << 22 | 0x87);
        }
        guest.poke::<u32>(TABLES + 1023 * 4, PT as u32 | 7);
        guest.poke::<u32>(PT + 1023 * 4, LAST_PAGE as u32 | 7);
        let state = &mut guest.vcpu.state;
        state.cr3 = TABLES;
        state.cr4 |= cr4::PSE;
        state.cr0 |= cr0::PG;
        let data = Segment { selector: sel::DATA, limit: 0xffff_ffff, attributes: FLAT_DATA };
        guest.vcpu.set_segment(seg::DS, data, 0xffff_0000);
        guest.vcpu.refresh();
        guest
    }

    /// 64-bit mode; the first 16 MiB and 3 to 4 GiB are identity-mapped for everyone.
    pub fn long() -> Self {
        Self::long_on(new_ram())
    }

    /// As [`Self::long`], on RAM that another vCPU has already.
    pub fn long_on(ram: Arc<Ram>) -> Self {
        Self::long_with(ram, TestPlatform::boxed)
    }

    /// 64-bit supervisor mode of a guest that may use the PVM ABI, before its first instruction: it enters PVM
    /// mode with that. Nothing of the ABI is set up; see [`Self::pvm`].
    pub fn long_before_pvm() -> Self {
        Self::pvm_on_before(new_ram())
    }

    fn pvm_on_before(ram: Arc<Ram>) -> Self {
        Self::long_with_offer(ram, abi(), TestPlatform::boxed)
    }

    /// PVM supervisor mode, set up: the shared structure at [`PVCS`], events entering at [`ENTRY`] (each of
    /// the three entries is a HLT), system calls at [`LSTAR`] (a HLT), ERETU at [`RETU`], ERETS at [`RETS`],
    /// one root for both modes.
    pub fn pvm() -> Self {
        Self::pvm_on(new_ram())
    }

    /// As [`Self::pvm`], on RAM that another vCPU has already.
    pub fn pvm_on(ram: Arc<Ram>) -> Self {
        Self::pvm_on_before(ram).set_up()
    }

    /// As [`Self::pvm`], on a processor that lacks the feature `name`.
    pub fn pvm_without(name: &'static str) -> Self {
        let offer = Offer { hidden: Some(name), ..abi() };
        Self::long_with_offer(new_ram(), offer, TestPlatform::boxed).set_up()
    }

    /// Brings a guest of [`Self::long_before_pvm`] to where [`Self::pvm`] is.
    fn set_up(mut self) -> Self {
        use pvm::abi::{GENERATION_1, PvmMsr, x86_msr};
        let guest = &mut self;
        // The first instruction, a NOP, enters PVM mode.
        guest.code(|a| a.nop());
        guest.engine.step(&mut guest.vcpu);
        for entry in [ENTRY, ENTRY + 256, ENTRY + 512, LSTAR] {
            guest.poke::<u8>(entry, 0xf4);
        }
        for ret in [RETU, RETS] {
            guest.poke::<u16>(ret, 0x050f);
        }
        let own = [
            (PvmMsr::VcpuStruct, PVCS),
            (PvmMsr::EventEntry, ENTRY),
            (PvmMsr::RetuRip, RETU),
            (PvmMsr::RetsRip, RETS),
            (PvmMsr::SwitchCr3, TABLES),
        ]
        .map(|(msr, value)| (GENERATION_1.msr_index(msr).unwrap(), value));
        for (index, value) in own.into_iter().chain([(x86_msr::LSTAR, LSTAR)]) {
            guest.vcpu.write_msr(index, value).unwrap();
        }
        guest.vcpu.state.set_rip(CODE);
        self
    }

    /// A field of the shared structure.
    pub fn pvcs(&self, field: pvm::abi::Field) -> u64 {
        let bytes: u64 = self.peek(PVCS + u64::from(field.offset));
        if field.size == 8 { bytes } else { bytes & ((1 << (field.size * 8)) - 1) }
    }

    /// Sets a field of the shared structure.
    pub fn set_pvcs(&mut self, field: pvm::abi::Field, value: u64) {
        let at = PVCS + u64::from(field.offset);
        match field.size {
            2 => self.poke(at, value as u16),
            4 => self.poke(at, value as u32),
            _ => self.poke(at, value),
        }
    }

    /// Goes to user mode as a PVM supervisor does, to `rip` with `rsp` and `eflags`, by executing ERETU.
    pub fn pvm_user(&mut self, rip: u64, rsp: u64, eflags: u64) {
        let p = &pvm::abi::GENERATION_1.pvcs;
        let fields = [(p.user_cs, 0x33), (p.user_ss, 0x2b), (p.eflags, eflags), (p.rip, rip), (p.rsp, rsp)];
        for (field, value) in fields {
            self.set_pvcs(field, value);
        }
        self.resume_at(RETU);
        self.engine.step(&mut self.vcpu);
    }

    /// As [`Self::long_on`], with a platform of its own.
    pub fn long_with(
        ram: Arc<Ram>,
        platform: impl FnOnce(SharedScript, Arc<Attention>) -> Box<dyn Platform>,
    ) -> Self {
        Self::long_with_offer(ram, Offer::default(), platform)
    }

    fn long_with_offer(
        ram: Arc<Ram>,
        offer: Offer,
        platform: impl FnOnce(SharedScript, Arc<Attention>) -> Box<dyn Platform>,
    ) -> Self {
        let mut guest = Self::with(ram, offer, platform);
        for vector in 0..256 {
            guest.set_gate(vector, sel::CODE64, HANDLERS + vector * 16, 0x8e);
        }
        guest.poke::<u64>(TSS + 4, STACK0);
        guest.poke::<u64>(TSS + 36, IST1);
        guest.poke::<u64>(GDT + u64::from(sel::TSS), descriptor(TSS as u32, 0x67, 0x8b00));
        guest.poke::<u64>(GDT + u64::from(sel::TSS) + 8, 0);
        guest.poke::<u64>(TABLES, TABLES + 0x1007);
        guest.poke::<u64>(TABLES + 0x1000, TABLES + 0x2007);
        guest.poke::<u64>(TABLES + 0x1018, 0xc000_0087);
        guest.poke::<u64>(TABLES + 0x2000, PT | 7);
        for large in 1..8 {
            guest.poke::<u64>(TABLES + 0x2000 + large * 8, large << 21 | 0x87);
        }
        for page in 0..512u64 {
            guest.poke::<u64>(PT + page * 8, page << 12 | 7);
        }
        let state = &mut guest.vcpu.state;
        state.cr0 |= cr0::PE | cr0::PG | cr0::WP | cr0::NE;
        state.cr3 = TABLES;
        state.cr4 = cr4::PAE | cr4::PGE;
        state.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
        guest.flat(sel::CODE64, FLAT_CODE64, sel::DATA);
        guest
    }

    fn on(ram: Arc<Ram>) -> Self {
        Self::with(ram, Offer::default(), TestPlatform::boxed)
    }

    fn with(
        ram: Arc<Ram>,
        offer: Offer,
        platform: impl FnOnce(SharedScript, Arc<Attention>) -> Box<dyn Platform>,
    ) -> Self {
        let script = SharedScript::default();
        let attention = Arc::new(Attention::new());
        let mut cpuid = Cpuid::default();
        if let Some(name) = offer.hidden {
            assert!(cpuid.disable(name), "{name}");
        }
        if offer.pvm.is_some() {
            cpuid.offer_pvm();
            cpuid.set_leaf(0x4000_0000, 0, [0x4000_0002, 0, 0, 0]);
        }
        let config = VcpuConfig { cpuid, pvm: offer.pvm };
        let platform = platform(Arc::clone(&script), Arc::clone(&attention));
        let vcpu = Vcpu::new(config, Arc::clone(&ram), platform, Arc::clone(&attention)).unwrap();
        let guest = Self { vcpu, engine: Interpreter::new(), script, attention, ram };
        let table: [(u16, u64); 11] = [
            (sel::CODE64, descriptor(0, 0xf_ffff, FLAT_CODE64)),
            (sel::DATA, descriptor(0, 0xf_ffff, FLAT_DATA)),
            (sel::CODE32, descriptor(0, 0xf_ffff, FLAT_CODE32)),
            (sel::USER_CODE32, descriptor(0, 0xf_ffff, FLAT_CODE32 | DPL3)),
            (sel::USER_DATA, descriptor(0, 0xf_ffff, FLAT_DATA | DPL3)),
            (sel::USER_CODE64, descriptor(0, 0xf_ffff, FLAT_CODE64 | DPL3)),
            (sel::CODE16, descriptor(0, 0xffff, 0x9b00)),
            (sel::DATA16, descriptor(0, 0xffff, 0x9300)),
            (sel::ABSENT, descriptor(0, 0xf_ffff, FLAT_DATA & !Segment::PRESENT)),
            (sel::READ_ONLY, descriptor(0, 0xf_ffff, FLAT_DATA & !Segment::WRITABLE)),
            (sel::CONFORMING64, descriptor(0, 0xf_ffff, FLAT_CODE64 | 1 << 10)),
        ];
        for (selector, value) in table {
            guest.poke(GDT + u64::from(selector & !7), value);
        }
        for vector in 0..256 {
            guest.poke::<u8>(HANDLERS + vector * 16, 0xf4);
        }
        guest
    }

    /// Flat segments, table registers, stack and instruction pointer.
    fn flat(&mut self, cs: u16, cs_attributes: u32, data: u16) {
        let state = &mut self.vcpu.state;
        state.gdtr = TableRegister { base: GDT, limit: sel::LAST + 7 };
        state.idtr = TableRegister { base: IDT, limit: 0xfff };
        let tr = Segment { selector: sel::TSS, limit: 0x67, attributes: 0x8b00 };
        state.tr = SystemSegment { segment: tr, base: TSS };
        state.set_rip(CODE);
        state.set_rsp(STACK);
        let flat = |selector, attributes| Segment { selector, limit: 0xffff_ffff, attributes };
        for register in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            self.vcpu.set_segment(register, flat(data, FLAT_DATA), 0);
        }
        self.vcpu.set_segment(seg::CS, flat(cs, cs_attributes), 0);
        self.vcpu.refresh();
    }

    /// Goes to user mode: 64-bit, or 32-bit code in either mode.
    pub fn user(&mut self, code: u16) {
        let attributes = if code == sel::USER_CODE64 { FLAT_CODE64 } else { FLAT_CODE32 };
        let flat = |selector, attributes| Segment { selector, limit: 0xffff_ffff, attributes };
        for register in [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS] {
            self.vcpu.set_segment(register, flat(sel::USER_DATA, FLAT_DATA | DPL3), 0);
        }
        self.vcpu.state.cpl = 3;
        self.vcpu.set_segment(seg::CS, flat(code, attributes | DPL3), 0);
        self.vcpu.refresh();
    }

    /// Sets IDT entry `vector` in the format of the present mode.
    pub fn set_gate(&mut self, vector: u64, selector: u16, offset: u64, kind: u8) {
        if self.vcpu.state.protected() && !self.vcpu.state.long_mode() || selector == sel::CODE32 {
            self.poke(IDT + vector * 8, gate(selector, offset, kind));
        } else {
            self.poke(IDT + vector * 16, gate(selector, offset, kind));
            self.poke(IDT + vector * 16 + 8, offset >> 32);
        }
    }

    /// Assembles `program` for the present code mode at `CODE`; a HLT follows it.
    pub fn code(&mut self, program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> &mut Self {
        let bitness = self.vcpu.state.code_mode.bitness();
        self.code_at(CODE, bitness, program);
        self
    }

    /// Assembles `program` at `address`, with a HLT behind; returns its length without that.
    pub fn code_at(
        &mut self,
        address: u64,
        bitness: u32,
        program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> u64 {
        let mut assembler = CodeAssembler::new(bitness).unwrap();
        program(&mut assembler).unwrap();
        let mut bytes = assembler.assemble(address).unwrap();
        let len = bytes.len() as u64;
        bytes.push(0xf4);
        self.ram.memory().write_slice(&bytes, GuestAddress(address)).unwrap();
        len
    }

    /// Puts raw bytes at `CODE`, with a HLT behind.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.ram.memory().write_slice(&[bytes, &[0xf4]].concat(), GuestAddress(CODE)).unwrap();
        self
    }

    /// Runs until HLT (or shutdown, or a kick).
    pub fn run(&mut self) -> Outcome {
        self.engine.run(&mut self.vcpu)
    }

    /// Runs until HLT, which must not be that of a handler.
    #[track_caller]
    pub fn finish(&mut self) {
        assert_eq!(self.run(), Outcome::Halted);
        assert_eq!(self.trap(), None);
    }

    /// Runs until a handler of `vector` is entered, and returns its frame.
    #[track_caller]
    pub fn fault(&mut self, vector: u8) -> Trap {
        assert_eq!(self.run(), Outcome::Halted);
        let trap = self.trap().unwrap_or_else(|| panic!("no trap; stopped at {:#x}", self.vcpu.state.rip()));
        assert_eq!(trap.vector, vector, "{trap:x?}");
        trap
    }

    /// The frame of the handler whose HLT was executed last, if it was a handler's.
    pub fn trap(&self) -> Option<Trap> {
        let offset = self.vcpu.state.rip().checked_sub(HANDLERS + 1)?;
        if offset >= 256 * 16 || offset % 16 != 0 {
            return None;
        }
        let vector = (offset / 16) as u8;
        let size = match self.vcpu.state.code_mode {
            CodeMode::Bits64 => 8,
            CodeMode::Bits32 => 4,
            CodeMode::Bits16 => 2,
        };
        let has_code = self.vcpu.state.protected() && matches!(vector, 8 | 10..=14 | 17);
        let mut at = self.vcpu.state.regs[usize::from(reg::RSP)];
        let mut next = || {
            let value = match size {
                8 => self.peek::<u64>(at),
                4 => u64::from(self.peek::<u32>(at)),
                _ => u64::from(self.peek::<u16>(at)),
            };
            at += size;
            value
        };
        let error_code = has_code.then(&mut next);
        let (rip, cs, rflags) = (next(), next(), next());
        Some(Trap { vector, error_code, rip, cs, rflags, rsp: next(), ss: next() })
    }

    /// Wakes the vCPU from its HLT and sends it to `rip`.
    pub fn resume_at(&mut self, rip: u64) {
        self.vcpu.state.slow &= !slow::HALTED;
        self.vcpu.state.set_rip(rip);
    }

    /// Reads guest-physical memory.
    pub fn peek<T: vm_memory::ByteValued>(&self, address: u64) -> T {
        self.ram.memory().read_obj(GuestAddress(address)).unwrap()
    }

    /// Writes guest-physical memory.
    pub fn poke<T: vm_memory::ByteValued>(&self, address: u64, value: T) {
        self.ram.memory().write_obj(value, GuestAddress(address)).unwrap();
    }

    /// General register `n`.
    pub fn reg(&self, n: u8) -> u64 {
        self.vcpu.reg(n)
    }

    /// What the platform has seen so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.script.lock().unwrap().seen.clone()
    }

    /// Answers to give to coming exits.
    pub fn answer(&mut self, values: &[u64]) -> &mut Self {
        self.script.lock().unwrap().answers.extend(values);
        self
    }

    /// Makes an interrupt pending.
    pub fn interrupt(&mut self, vector: u8) {
        self.script.lock().unwrap().interrupts.push_back(vector);
        self.attention.raise(cpu::attention::INTERRUPT);
    }
}

/// Setting RSP from outside.
trait StackPointer {
    fn set_rsp(&mut self, value: u64);
}

impl StackPointer for cpu::CpuState {
    fn set_rsp(&mut self, value: u64) {
        self.regs[usize::from(reg::RSP)] = value;
    }
}
