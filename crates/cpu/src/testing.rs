//! Random bytes as guest code: the body of the `decode` fuzz target, and of a second of it in the tests.
//!
//! Nothing is compared: whatever the bytes are, in whatever mode and state, each step has to end, with an
//! instruction executed, an event delivered or a typed exit, and must stay inside guest RAM.

use std::sync::Arc;

use mmu::testing::Choices;
use vm_memory::{Bytes, GuestAddress};

use crate::attention;
use crate::state::{CpuState, Segment, cr0, cr4, efer, reg, seg};
use crate::{Answer, Attention, Cpuid, Exit, GuestRam, Interpreter, Platform, Ram, Vcpu, VcpuConfig};

const RAM_SIZE: u64 = 1 << 20;
const CODE: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STACK: u64 = 0x8000;
const TABLES: u64 = 0x4_0000;
/// Instructions of one case.
const STEPS: usize = 40;

/// Exits of one case before it is kicked: a repeated instruction is one step, and can be billions of exits.
const EXITS: u32 = 4096;

/// A platform that answers everything, with ones, and loses its patience.
struct Anything {
    attention: Arc<Attention>,
    exits: u32,
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
        None
    }

    fn interrupt_pending(&mut self) -> bool {
        false
    }

    fn init(&mut self) {}
}

/// A processor with 1 MiB of RAM for any number of cases.
#[derive(Debug)]
pub struct Subject {
    vcpu: Vcpu,
}

impl Subject {
    /// A new one.
    ///
    /// # Errors
    /// When the host refuses memory.
    pub fn new() -> std::io::Result<Self> {
        let memory =
            GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE as usize)]).map_err(std::io::Error::other)?;
        let config = VcpuConfig { cpuid: Cpuid::new(0, 1, 40, 2_000_000), tsc_offset: 0, pvm: None };
        let attention = Arc::new(Attention::new());
        let platform = Box::new(Anything { attention: Arc::clone(&attention), exits: 0 });
        Ok(Self { vcpu: Vcpu::new(config, Arc::new(Ram::new(memory)), platform, attention)? })
    }

    /// One case: a mode, a state and code, all from `choices`. Returns the instructions executed.
    pub fn execute_anything(&mut self, choices: &mut Choices<'_>) -> u64 {
        let before = self.vcpu.stats.instructions;
        self.vcpu.attention().take(attention::KICK);
        self.prepare(choices);
        let mut engine = Interpreter::new();
        for _ in 0..STEPS {
            if engine.step(&mut self.vcpu).is_some() {
                break;
            }
        }
        self.vcpu.stats.unimplemented.clear();
        self.vcpu.stats.instructions - before
    }

    fn prepare(&mut self, choices: &mut Choices<'_>) {
        let mode = choices.below(4);
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
        // 0 is real mode, 1 protected mode, the others are 64-bit mode.
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
        self.vcpu.state = state;
        self.put(TABLES, TABLES + 0x1003);
        self.put(TABLES + 0x1000, TABLES + 0x2003);
        self.put(TABLES + 0x2000, TABLES + 0x3003);
        for page in 0..512 {
            // Half of what is mapped is not RAM.
            self.put(TABLES + 0x3000 + page * 8, page << 12 | 3);
        }
        for n in 0..16 {
            let word = choices.word();
            let value = match choices.below(4) {
                0 => word,
                1 => word & 0xff,
                _ => DATA + (word & 0xfff),
            };
            self.vcpu.set_reg(n, value);
        }
        self.vcpu.set_reg(reg::RSP, STACK);
        self.vcpu.set_rflags(0xcd5, choices.word());
        self.vcpu.state.set_rip(CODE);
        let mut at = CODE;
        for _ in 0..16 {
            let mut bytes = choices.word().to_le_bytes();
            // Prefixes and escapes are where the instructions are.
            const STARTS: [&[u8]; 12] = [
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
            ];
            if choices.once_in(2) {
                let start = choices.one_of(&STARTS);
                for (to, from) in bytes.iter_mut().zip(start) {
                    *to = *from;
                }
            }
            self.put(at, u64::from_le_bytes(bytes));
            at += 8;
        }
        self.vcpu.refresh();
    }

    fn put(&self, gpa: u64, value: u64) {
        // All of them are in RAM.
        let _ = self.vcpu.ram().memory().write_obj(value, GuestAddress(gpa));
    }
}
