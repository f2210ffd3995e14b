//! Tests of the integer instructions: short programs in each mode, run instruction by instruction.

mod blocks;
mod control;
mod data;
mod speed;
mod strings;

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Decoder, DecoderOptions, IcedError};
use vm_memory::GuestAddress;

use crate::attention::Attention;
use crate::exit::{Answer, Exit, Platform};
use crate::fault::{Exec, Fault, Stop};
use crate::insn::Insn;
use crate::state::{CodeMode, Segment, cr0, cr4, efer, reg, seg};
use crate::{Cpuid, GuestRam, Ram, Vcpu, VcpuConfig};

const RAM_SIZE: usize = 1 << 20;
/// Where programs are.
const CODE: u64 = 0x1_0000;
/// Where data is: two pages that are mapped, then one that is not.
const DATA: u64 = 0x2_0000;
/// The first address past the mapped data.
const DATA_END: u64 = DATA + 0x2000;
/// The initial stack pointer: fits a 16-bit stack.
const STACK: u64 = 0x8000;
const PML4: u64 = 0x4_0000;

/// A platform without devices.
struct Nothing;

impl Platform for Nothing {
    fn exit(&mut self, _: Exit<'_>) -> Answer {
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

/// A vCPU with 1 MiB of RAM: in 64-bit mode identity-mapped but for the page at [`DATA_END`], in the others
/// unpaged with flat segments.
fn vcpu(mode: CodeMode) -> Vcpu {
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).unwrap();
    let config = VcpuConfig { cpuid: Cpuid::default(), pvm: None };
    let mut vcpu =
        Vcpu::new(config, Arc::new(Ram::new(memory)), Box::new(Nothing), Arc::new(Attention::new())).unwrap();
    let state = &mut vcpu.state;
    for n in 0..6 {
        state.seg_base[n] = 0;
        state.segments[n].limit = 0xffff_ffff;
        if mode == CodeMode::Bits32 {
            state.segments[n].attributes |= Segment::DEFAULT_BIG;
        }
    }
    state.segments[usize::from(seg::CS)].attributes |= Segment::WRITABLE;
    state.cr0 |= cr0::PE;
    if mode == CodeMode::Bits64 {
        state.segments[usize::from(seg::CS)].attributes |= Segment::LONG;
        state.efer = efer::LME | efer::LMA | efer::NXE;
        state.cr4 = cr4::PAE;
        state.cr3 = PML4;
        state.cr0 |= cr0::PG | cr0::WP;
    }
    if mode == CodeMode::Bits64 {
        // One table each; the last maps the first 2 MiB page by page.
        put(&vcpu, PML4, PML4 + 0x1003);
        put(&vcpu, PML4 + 0x1000, PML4 + 0x2003);
        put(&vcpu, PML4 + 0x2000, PML4 + 0x3003);
        for page in 0..512u64 {
            let entry = if page << 12 == DATA_END { 0 } else { page << 12 | 3 };
            put(&vcpu, PML4 + 0x3000 + page * 8, entry);
        }
    }
    vcpu.set_reg(reg::RSP, STACK);
    vcpu.refresh();
    assert_eq!(vcpu.state.code_mode, mode);
    vcpu
}

fn put(vcpu: &Vcpu, gpa: u64, value: u64) {
    use vm_memory::Bytes as _;
    vcpu.ram().memory().write_obj(value, GuestAddress(gpa)).unwrap();
}

/// Writes `bytes` at guest-physical (here also linear) address `gpa`.
fn put_bytes(vcpu: &Vcpu, gpa: u64, bytes: &[u8]) {
    use vm_memory::Bytes as _;
    vcpu.ram().memory().write_slice(bytes, GuestAddress(gpa)).unwrap();
}

fn peek(vcpu: &Vcpu, gpa: u64) -> u64 {
    use vm_memory::Bytes as _;
    vcpu.ram().memory().read_obj(GuestAddress(gpa)).unwrap()
}

fn peek_bytes(vcpu: &Vcpu, gpa: u64, len: usize) -> Vec<u8> {
    use vm_memory::Bytes as _;
    let mut bytes = vec![0; len];
    vcpu.ram().memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

/// Executes the instruction in `bytes` as if it were at RIP, as the loop would.
fn execute(vcpu: &mut Vcpu, bytes: &[u8]) -> Exec {
    let mode = vcpu.state.code_mode;
    let rip = vcpu.state.rip();
    let i = Decoder::with_ip(mode.bitness(), bytes, rip, DecoderOptions::NONE).decode();
    let insn = Insn::lower(vcpu, &i, mode);
    vcpu.state.set_rip(rip.wrapping_add(u64::from(insn.len)));
    (insn.run)(vcpu, &insn).inspect_err(|_| vcpu.state.set_rip(rip))
}

/// Runs the bytes of straight-line code from [`CODE`].
fn run_bytes(vcpu: &mut Vcpu, code: &[u8]) -> Result<(), Fault> {
    vcpu.state.set_rip(CODE);
    while let Some(rest) =
        code.get(vcpu.state.rip().wrapping_sub(CODE) as usize..).filter(|rest| !rest.is_empty())
    {
        if let Err(stop) = execute(vcpu, rest) {
            match *stop {
                Stop::Fault(fault) => return Err(fault),
                stop => panic!("{stop:?}"),
            }
        }
    }
    Ok(())
}

/// Assembles a program for [`CODE`] and runs it until it leaves its own bytes.
fn run(
    vcpu: &mut Vcpu,
    program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<(), Fault> {
    let mut assembler = CodeAssembler::new(vcpu.state.code_mode.bitness()).unwrap();
    program(&mut assembler).unwrap();
    let code = assembler.assemble(CODE).unwrap();
    run_bytes(vcpu, &code)
}
