//! Random bytes as guest code: the body of the `decode` fuzz target, and of a second of it in the tests.
//!
//! Nothing is compared: whatever the bytes are, in whatever mode and state, each step has to end, with an
//! instruction executed, an event delivered or a typed exit, and must stay inside guest RAM.
//!
//! A second processor offers the PVM ABI, and executes its cases in PVM's two modes, with decoded blocks: what the
//! bytes write may be code, the shared structure, page tables or the stack. Behind each case its state has to be one
//! that PVM mode can have.

use std::sync::Arc;

use mmu::testing::Choices;
use vm_memory::{Bytes, GuestAddress};

use crate::attention;
use crate::flags;
use crate::state::{CodeMode, CpuState, Segment, cr0, cr4, efer, reg, seg};
use crate::{
    Answer, Attention, Cpuid, Exit, GuestRam, Interpreter, Outcome, Platform, Ram, Vcpu, VcpuConfig,
};

const RAM_SIZE: u64 = 1 << 20;
const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STACK: u64 = 0x8000;
const TABLES: u64 = 0x4_0000;
/// Instructions of one case.
const STEPS: usize = 40;
/// PVM: blocks of one case, the shared structure, the event entries, ERETU and ERETS.
const TURNS: usize = 60;
const PVCS: u64 = 0x3_0000;
const ENTRY: u64 = CODE + 0x20;
const RETU: u64 = 0x3_1000;
const RETS: u64 = 0x3_1010;

/// Exits of one case before it is kicked: a repeated instruction is one step, and can be billions of exits.
const EXITS: u32 = 4096;

/// A platform that answers everything, with ones, and loses its patience.
struct Anything {
    attention: Arc<Attention>,
    exits: u32,
    interrupt: Option<u8>,
}

impl Platform for Anything {
    fn exit(&mut self, exit: Exit<'_>) -> Answer {
        self.exits += 1;
        if self.exits >= EXITS {
            self.attention.raise(attention::KICK);
            self.exits = 0;
        }
        match exit {
            Exit::PortIn { data, .. } | Exit::MmioRead { data, .. } => data.fill(0xff),
            Exit::ReadMsr { .. } | Exit::WriteMsr { .. } => return Answer::Refused,
            _ => {}
        }
        Answer::Done
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.interrupt
    }

    fn interrupt_pending(&mut self) -> bool {
        false
    }

    fn tsc(&self) -> u64 {
        0
    }

    fn init(&mut self) {}
}

/// Two processors, one of which offers the PVM ABI, each with 1 MiB of RAM, for any number of cases.
#[derive(Debug)]
pub struct Subject {
    plain: Vcpu,
    pvm: Vcpu,
}

impl Subject {
    /// A new one.
    ///
    /// # Errors
    /// When the host refuses memory.
    pub fn new() -> std::io::Result<Self> {
        let ranges = pvm::AddressRanges::new(402..434, Some(402..434));
        let ranges = ranges.ok_or_else(|| std::io::Error::other("no such ranges"))?;
        let generation = &pvm::abi::GENERATION_1;
        Ok(Self { plain: vcpu(None)?, pvm: vcpu(Some(pvm::Config { generation, ranges, cpu: 0 }))? })
    }

    /// One case: a mode, a state and code, all from `choices`. Returns the instructions executed.
    pub fn execute_anything(&mut self, choices: &mut Choices<'_>) -> u64 {
        if choices.once_in(3) {
            return self.execute_in_pvm_mode(choices);
        }
        let vcpu = &mut self.plain;
        let before = vcpu.stats.instructions;
        vcpu.attention().take(attention::KICK);
        prepare(vcpu, choices);
        let mut engine = Interpreter::new();
        for _ in 0..STEPS {
            if engine.step(vcpu).is_some() {
                break;
            }
        }
        vcpu.stats.unimplemented.clear();
        vcpu.stats.instructions - before
    }

    /// One case in PVM mode.
    pub fn execute_in_pvm_mode(&mut self, choices: &mut Choices<'_>) -> u64 {
        let vcpu = &mut self.pvm;
        let before = vcpu.stats.instructions;
        vcpu.attention().take(u32::MAX);
        let mut engine = Interpreter::new();
        prepare_pvm(vcpu, &mut engine, choices);
        if engine.run_turns(vcpu, TURNS) != Some(Outcome::TripleFault) {
            check_pvm(vcpu);
        }
        vcpu.stats.unimplemented.clear();
        vcpu.stats.instructions - before
    }

    /// What the cases in PVM mode have come to.
    pub fn pvm_stats(&self) -> pvm::Stats {
        self.pvm.pvm_stats().unwrap_or_default()
    }
}

fn vcpu(pvm: Option<pvm::Config>) -> std::io::Result<Vcpu> {
    let memory =
        GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE as usize)]).map_err(std::io::Error::other)?;
    let interrupt = pvm.map(|_| 0x41);
    let mut cpuid = Cpuid::new(0, 1, 40, 2_000_000);
    if pvm.is_some() {
        cpuid.offer_pvm();
    }
    let config = VcpuConfig { cpuid, pvm };
    let attention = Arc::new(Attention::new());
    let platform = Box::new(Anything { attention: Arc::clone(&attention), exits: 0, interrupt });
    Vcpu::new(config, Arc::new(Ram::new(memory)), platform, attention)
}

/// A state in real, protected or 64-bit mode, and code.
fn prepare(vcpu: &mut Vcpu, choices: &mut Choices<'_>) {
    prepare_state(vcpu, choices.below(4), choices);
    put_code(vcpu, CODE, 16, choices);
    vcpu.refresh();
}

/// Registers and page tables: `mode` 0 is real mode, 1 protected mode, the others are 64-bit mode.
fn prepare_state(vcpu: &mut Vcpu, mode: u64, choices: &mut Choices<'_>) {
    let mut state = CpuState::default();
    for n in 0..6 {
        state.seg_base[n] = 0;
        state.segments[n].limit = 0xffff_ffff;
        if mode == 1 || mode == 2 && choices.once_in(2) {
            state.segments[n].attributes |= Segment::DEFAULT_BIG;
        }
    }
    state.segments[usize::from(seg::CS)].attributes |= Segment::WRITABLE;
    state.cr0 |= choices.word() & (cr0::MP | cr0::EM | cr0::TS | cr0::NE);
    state.cr4 |= choices.word() & (0x7_0fff | cr4::PKE | cr4::PKS) & !(cr4::PAE | cr4::LA57);
    if mode >= 1 {
        state.cr0 |= cr0::PE;
    }
    if mode >= 2 {
        state.segments[usize::from(seg::CS)].attributes |= Segment::LONG;
        state.segments[usize::from(seg::CS)].attributes &= !Segment::DEFAULT_BIG;
        state.efer = efer::LME | efer::LMA | efer::NXE;
        state.cr4 |= cr4::PAE;
        state.cr3 = TABLES;
        state.cr0 |= cr0::PG | cr0::WP;
    }
    vcpu.state = state;
    put_tables(vcpu, 0);
    for n in 0..16 {
        let word = choices.word();
        let value = match choices.below(4) {
            0 => word,
            1 => word & 0xff,
            _ => DATA + (word & 0xfff),
        };
        vcpu.set_reg(n, value);
    }
    vcpu.set_reg(reg::RSP, STACK);
    vcpu.set_rflags(0xcd5, choices.word());
    vcpu.state.set_rip(CODE);
}

/// Page tables that map the first 2 MiB; every set bit of `user` makes each 64th page the user's.
fn put_tables(vcpu: &Vcpu, user: u64) {
    for level in 0..3 {
        put(
            vcpu,
            TABLES + level * 0x1000,
            (TABLES + (level + 1) * 0x1000) | 3 | if user == 0 { 0 } else { 4 },
        );
    }
    for page in 0..512 {
        // Half of what is mapped is not RAM.
        put(vcpu, TABLES + 0x3000 + page * 8, page << 12 | 3 | (user >> (page & 63) & 1) << 2);
    }
}

/// Puts `words` times 8 bytes of code at `at`.
fn put_code(vcpu: &Vcpu, at: u64, words: u64, choices: &mut Choices<'_>) {
    for n in 0..words {
        let mut bytes = choices.word().to_le_bytes();
        // Prefixes and escapes are where the instructions are.
        const STARTS: [&[u8]; 14] = [
            &[0x0f],
            &[0x66, 0x0f],
            &[0xf3, 0x0f],
            &[0xf2, 0x0f],
            &[0x48],
            &[0xc5],
            &[0xc4, 0xe2],
            &[0xf0],
            &[0x0f, 0x38],
            &[0x66, 0x0f, 0x3a],
            &[0xd9],
            &[0x67],
            &[0x0f, 0x05],
            &[0x0f, 0x01, 0x3c, 0x25, 0x50, 0x56, 0x4d, 0xff],
        ];
        if choices.once_in(2) {
            let start = choices.one_of(&STARTS);
            for (to, from) in bytes.iter_mut().zip(start) {
                *to = *from;
            }
        }
        put(vcpu, at + n * 8, u64::from_le_bytes(bytes));
    }
}

/// Puts `code` and a jump to `back` at `at`.
fn put_handler(vcpu: &Vcpu, at: u64, code: &[u8], back: u64) {
    let jump = at + code.len() as u64;
    let distance = back.wrapping_sub(jump + 5) as u32;
    let bytes = [code, &[0xe9], &distance.to_le_bytes()].concat();
    let _ = vcpu.ram().memory().write_slice(&bytes, GuestAddress(at));
}

fn put(vcpu: &Vcpu, gpa: u64, value: u64) {
    // All of them are in RAM.
    let _ = vcpu.ram().memory().write_obj(value, GuestAddress(gpa));
}

// ---- PVM mode ----

/// A state in PVM's supervisor or user mode, and code there and at the entries.
fn prepare_pvm(vcpu: &mut Vcpu, engine: &mut Interpreter, choices: &mut Choices<'_>) {
    use pvm::abi::{GENERATION_1, PvmMsr, hypercall, x86_msr};
    const R10: u8 = 10;
    vcpu.leave_pvm_mode();
    prepare_state(vcpu, 2, choices);
    // Code, stack and data are among the user's pages more often than not.
    put_tables(vcpu, choices.mostly(u64::MAX, 8) | 1 << 63);
    vcpu.refresh();
    vcpu.enter_pvm_mode();

    put(vcpu, RETU, 0x050f);
    put(vcpu, RETS, 0x050f);
    let page = if choices.once_in(4) { choices.one_of(&[TABLES, CODE, STACK - 0x1000, DATA]) } else { PVCS };
    let entry = if choices.once_in(8) { choices.word() } else { ENTRY };
    for (msr, good) in [
        (PvmMsr::VcpuStruct, page),
        (PvmMsr::SupervisorRsp, STACK),
        (PvmMsr::SupervisorRedzone, 128),
        (PvmMsr::EventEntry, entry),
        (PvmMsr::RetuRip, RETU),
        (PvmMsr::RetsRip, RETS),
        (PvmMsr::SwitchCr3, TABLES),
    ] {
        let value = if choices.once_in(16) { choices.word() } else { good };
        if let Some(index) = GENERATION_1.msr_index(msr) {
            // A wild value may be refused.
            let _ = vcpu.write_msr(index, value);
        }
    }
    let _ = vcpu.write_msr(x86_msr::LSTAR, CODE + 0x40 + choices.below(8) * 8);
    let p = &GENERATION_1.pvcs;
    for n in 0..u64::from(p.size / 8) {
        put(vcpu, PVCS + n * 8, choices.word());
    }
    let code = if choices.once_in(4) { 0x2b_0023 } else { 0x2b_0033 };
    put(vcpu, PVCS + u64::from(p.user_cs.offset), if choices.once_in(16) { choices.word() } else { code });
    put(vcpu, PVCS + u64::from(p.eflags.offset), choices.word() & 0xcd5);
    put(vcpu, PVCS + u64::from(p.rip.offset), CODE + choices.below(8) * 8);
    put(vcpu, PVCS + u64::from(p.rsp.offset), STACK - 0x800);

    put_code(vcpu, CODE, 16, choices);
    for n in 0..16 {
        if choices.once_in(4) {
            put(vcpu, CODE + n * 8, choices.word() & !0xffff | 0x050f);
        }
    }
    let skip_user = [0x48, 0x83, 0x04, 0x25, 0x60, 0x00, 0x03, 0x00, 2];
    let skip_supervisor = [0x48, 0x83, 0x44, 0x24, 8, 2];
    for (at, skip, back) in [
        // ADD [PVCS.rip], 2, or of the frame; then a jump back.
        (ENTRY, &skip_user[..], RETU),
        (ENTRY + 256, &skip_supervisor, RETS),
        (ENTRY + 512, &[], RETU),
        (CODE + 0x78, &[], RETU),
    ] {
        if choices.once_in(4) {
            put_code(vcpu, at, 2, choices);
        } else {
            put_handler(vcpu, at, skip, back);
        }
    }
    if choices.once_in(2) {
        vcpu.set_reg(reg::RAX, hypercall::LOAD_PGTBL + choices.below(hypercall::COUNT as u64 + 1));
        let msr = 0x4b56_4df0 + choices.below(8);
        vcpu.set_reg(reg::RBX, choices.one_of(&[0, 1, 2, TABLES, msr, 0x63]));
        vcpu.set_reg(reg::RDX, choices.one_of(&[0, TABLES, u64::MAX]));
        vcpu.set_reg(R10, choices.one_of(&[0, TABLES, PVCS, u64::MAX]));
    }
    if choices.once_in(2) {
        vcpu.state.set_rip(RETU);
        engine.run_turns(vcpu, 1);
    }
    for bit in [attention::NMI, attention::INTERRUPT] {
        if choices.once_in(4) {
            vcpu.attention().raise(bit);
        }
    }
    if choices.once_in(32) {
        vcpu.attention().raise(attention::INIT);
        vcpu.attention().raise_sipi((CODE >> 12) as u8);
    }
}

/// What is true of the state between any two instructions in PVM mode.
fn check_pvm(vcpu: &Vcpu) {
    use pvm::Mode;
    use pvm::abi::{control, selector};
    let (state, mode) = (&vcpu.state, vcpu.pvm_mode());
    assert_eq!(state.deprivileged, mode != Mode::NonPvm);
    if mode == Mode::NonPvm {
        return;
    }
    let user = mode == Mode::User;
    assert_eq!(state.cpl, if user { 3 } else { 0 });
    let code_mode = match state.segments[usize::from(seg::CS)].selector {
        selector::USER_CS => CodeMode::Bits64,
        selector::USER32_CS if user => CodeMode::Bits32,
        other => panic!("CS is {other:#x}"),
    };
    assert_eq!(state.code_mode, code_mode);
    let never = flags::IOPL | flags::VM | flags::VIF | flags::VIP;
    assert_eq!(state.flags.bits() & (never | flags::IF | 2), flags::IF | 2);
    assert_eq!(state.cr0 & (control::CR0_ONE | control::CR0_ZERO), control::CR0_ONE);
    assert_eq!(state.cr4 & (control::CR4_ONE | control::CR4_ZERO), control::CR4_ONE);
    assert_eq!(state.efer & control::EFER_ONE, control::EFER_ONE);
}
