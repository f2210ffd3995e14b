//! Tests of native execution. The helpers here run single instructions on a bare vCPU in 64-bit mode without
//! paging.

mod control;
mod engine;
mod host;
mod moves;
mod vectors;

use std::sync::Arc;

use iced_x86::code_asm::CodeAssembler;
use iced_x86::{Decoder, DecoderOptions};
use vm_memory::GuestAddress;

use crate::exit::{Answer, Exit, Platform};
use crate::fault::{Exec, Fault, Stop};
use crate::fpu::component;
use crate::insn::Insn;
use crate::state::{CodeMode, Segment, cr0, cr4, efer, seg};
use crate::vcpu::{Vcpu, VcpuConfig};
use crate::{Attention, Cpuid, GuestRam, Ram};

/// Size of guest RAM: what lies above is MMIO.
pub(super) const RAM: u64 = 0x10_0000;
/// Eight bytes before the end of what can be addressed without paging.
pub(super) const EDGE: u64 = 0xffff_fff8;
/// Where tests keep their data.
pub(super) const DATA: u64 = 0x8000;

struct Nothing;

impl Platform for Nothing {
    fn exit(&mut self, exit: Exit<'_>) -> Answer {
        if let Exit::MmioRead { data, .. } = exit {
            data.fill(0xff);
        }
        Answer::Done
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }

    fn tsc(&self) -> u64 {
        0
    }

    fn init(&mut self) {}

    fn interrupt_pending(&mut self) -> bool {
        false
    }
}

/// A vCPU in 64-bit mode, without paging, all vector state enabled.
pub(super) fn vcpu() -> Vcpu {
    let memory = GuestRam::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let config = VcpuConfig { cpuid: Cpuid::default(), pvm: None };
    let ram = Arc::new(Ram::new(memory));
    let mut vcpu = Vcpu::new(config, ram, Box::new(Nothing), Arc::new(Attention::new())).unwrap();
    let state = &mut vcpu.state;
    state.cr0 = cr0::PE | cr0::MP | cr0::NE | cr0::ET;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    state.xcr0 = component::X87 | component::SSE | component::AVX;
    state.efer = efer::LMA | efer::LME;
    state.segments[usize::from(seg::CS)].attributes |= Segment::LONG;
    vcpu.refresh();
    assert_eq!(vcpu.state.code_mode, CodeMode::Bits64);
    vcpu
}

/// Runs instruction bytes in the present mode.
pub(super) fn run_bytes(vcpu: &mut Vcpu, bytes: &[u8]) -> Exec {
    let mode = vcpu.state.code_mode;
    let mut decoder = Decoder::with_ip(mode.bitness(), bytes, 0x1000, DecoderOptions::NONE);
    while decoder.can_decode() {
        let i = decoder.decode();
        assert!(!i.is_invalid(), "{bytes:02x?}");
        let insn = Insn::lower(vcpu, &i, mode);
        vcpu.state.set_rip(i.next_ip());
        (insn.run)(vcpu, &insn)?;
    }
    vcpu.sync_mxcsr();
    Ok(())
}

/// Assembles and runs instructions.
pub(super) fn run(
    vcpu: &mut Vcpu,
    f: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> Exec {
    let mut a = CodeAssembler::new(vcpu.state.code_mode.bitness()).unwrap();
    f(&mut a).unwrap();
    let bytes = a.assemble(0x1000).unwrap();
    run_bytes(vcpu, &bytes)
}

/// The fault that a run ended with.
pub(super) fn fault_of(result: Exec) -> Fault {
    match *result.unwrap_err() {
        Stop::Fault(fault) => fault,
        other => panic!("{other:?}"),
    }
}

/// Everything that an instruction that faults must leave alone.
pub(super) fn snapshot(vcpu: &Vcpu) -> impl PartialEq + std::fmt::Debug + use<> {
    let fpu = &vcpu.state.fpu;
    let mut regs = vcpu.state.regs;
    regs[usize::from(crate::state::REG_RIP)] = 0;
    (fpu.ymm, regs, fpu.mxcsr, fpu.fcw(), fpu.fsw(), fpu.tags(), vcpu.state.flags.bits())
}

/// A small generator with a fixed seed (xorshift64*).
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Fills the vector registers, with a good share of numbers that mean something as floats.
    pub(super) fn fill_vectors(&mut self, vcpu: &mut Vcpu) {
        for register in &mut vcpu.state.fpu.ymm {
            let style = self.below(4);
            for chunk in register.as_chunks_mut::<8>().0 {
                *chunk = match style {
                    0 => self.next().to_le_bytes(),
                    1 => ((self.below(2001) as f64 - 1000.0) / 8.0).to_le_bytes(),
                    2 => {
                        let pair = [0, 1].map(|_| (self.below(2001) as f32 - 1000.0) / 8.0);
                        (u64::from(pair[0].to_bits()) | u64::from(pair[1].to_bits()) << 32).to_le_bytes()
                    }
                    _ => (self.next() & self.next() & self.next()).to_le_bytes(),
                };
            }
        }
    }
}
