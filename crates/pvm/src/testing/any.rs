//! The body of the fuzz target: any sequence of steps that a guest and its surroundings can bring about.

use super::plain::{Call, PAGE_SIZE, Plain, Use};
use crate::abi::{GENERATION_1, hypercall, rflags, x86_msr};
use crate::event::{Event, Frame};
use crate::msr::Access;
use crate::range::AddressRanges;
use crate::stats::Stats;
use crate::vcpu::{Config, Mode, Pvm, TripleFault};

/// Pages that exist in the beginning. The first and the last are neighbours: a stack can wrap from one to the other.
const PAGES: [u64; 5] = [0, 0x1000, 0x2000, 0xffff_c900_0000_0000, 0xffff_ffff_ffff_f000];
/// Values that are likelier to matter than random ones.
const WORDS: [u64; 16] = [
    0,
    1,
    0x28,
    0x1000,
    0x1040,
    0x2000,
    0x3000,
    0xfff,
    0x7fff_ffff_ffff,
    0x8000_0000_0000,
    0xffff_c900_0000_0800,
    0xffff_7fff_ffff_ff00,
    0xffff_ffff_ffff_ffd0,
    u64::MAX,
    0x0023_0010_0000_0000,
    0xffff_ffff_ffb1_ff93,
];

/// A fuzzer's bytes, one choice after the other.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn word(&mut self) -> Option<u64> {
        let choice = self.byte()?;
        if choice & 1 == 0 {
            return Some(WORDS[usize::from(choice >> 1) % WORDS.len()]);
        }
        let (word, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*word))
    }
}

/// Lets `bytes` be a sequence of events, SYSCALLs, MSR accesses and changes of memory, and runs it on [`Plain`].
/// Returns what was counted on the way.
///
/// # Panics
/// If after a step something is not as it has to be after each: see the assertions.
pub fn deliver_anything(bytes: &[u8]) -> Stats {
    let mut bytes = Bytes(bytes);
    let mut cpu = Plain::new();
    for page in PAGES {
        cpu.map(page, Use::Ram);
    }
    let ranges = AddressRanges::new(402..434, None).expect("valid");
    let mut pvm = Pvm::new(Config { generation: &GENERATION_1, ranges, cpu: 1 });
    pvm.enter(&mut cpu, 0x10);
    cpu.take_calls();
    while let Some(choice) = bytes.byte() {
        let (before, pvcs, narrowest) = (cpu.clone(), pvm.vcpu_struct(), *pvm.ranges());
        let outcome = match choice % 4 {
            0 => {
                let Some(()) = surroundings(&mut bytes, &mut cpu) else { break };
                continue;
            }
            1 => event(&mut bytes, &mut cpu, &mut pvm),
            2 => syscall(&mut bytes, &mut cpu, &mut pvm),
            _ => msr(&mut bytes, &mut cpu, &mut pvm),
        };
        let Some(outcome) = outcome else { break };
        only_abi_memory_changed(&before, &cpu, pvcs);
        assert_ne!(pvm.mode(), Mode::NonPvm, "there is no way back");
        assert_eq!(
            narrowest.narrowed(pvm.ranges().msr()),
            Some(*pvm.ranges()),
            "ranges only become narrower"
        );
        if outcome.is_err() {
            assert!(!cpu.calls.iter().any(|c| matches!(c, Call::EnterSupervisor(_))), "half an event");
            pvm.reset();
            pvm.enter(&mut cpu, 0x10);
        }
        let flags = cpu.registers.rflags;
        assert_eq!(rflags::underlying(flags), flags, "RFLAGS of the underlying processor");
        cpu.take_calls();
    }
    *pvm.stats()
}

/// What the guest's own instructions do to registers and memory, and what the monitor does to memory.
fn surroundings(bytes: &mut Bytes<'_>, cpu: &mut Plain) -> Option<()> {
    let (which, value) = (bytes.byte()?, bytes.word()?);
    let r = &mut cpu.registers;
    match which % 16 {
        0 => r.rsp = value,
        1 => r.rbx = value,
        2 => r.r10 = value,
        3 => r.rdx = value,
        4 => r.rflags = rflags::underlying(value),
        5 => r.gs_base = value,
        6 => r.pkru = value & u64::from(u32::MAX),
        7 => r.cr2 = value,
        8 => r.cr4 ^= crate::abi::control::CR4_PKS,
        9 => cpu.five_level = value & 1 != 0,
        10 => drop(cpu.pages.remove(&(value & !(PAGE_SIZE - 1)))),
        11 => cpu.map(value & !(PAGE_SIZE - 1), Use::Ram),
        12 => cpu.map(value & !(PAGE_SIZE - 1), Use::ReadOnly),
        13 => {
            // Selectors that can be returned to, wherever the structure is.
            let selectors = if value & 1 != 0 { [0x33, 0, 0x2b, 0] } else { [0x23, 0, 0x2b, 0] };
            PAGES.into_iter().for_each(|page| cpu.poke(page + 64, &selectors));
        }
        _ => {
            let page = PAGES[usize::from(which >> 4) % PAGES.len()];
            let offset = u64::from(bytes.byte()? & 0x7f);
            cpu.poke(page + offset, &value.to_le_bytes());
        }
    }
    Some(())
}

fn event(bytes: &mut Bytes<'_>, cpu: &mut Plain, pvm: &mut Pvm) -> Option<Result<(), TripleFault>> {
    let (kind, vector) = (bytes.byte()?, bytes.byte()?);
    let code = bytes.word()? as u32;
    Some(match kind % 6 {
        0 | 1 => pvm.deliver(cpu, Event::new(vector)),
        2 => pvm.deliver(cpu, Event::with_code(vector, code)),
        3 if pvm.nmi_open() => pvm.deliver(cpu, Event::nmi()),
        4 if pvm.interrupts_open(cpu) => pvm.deliver(cpu, Event::new(vector.max(32))),
        3 | 4 => {
            pvm.interrupt_waits(cpu);
            Ok(())
        }
        _ => {
            if pvm.mode() == Mode::Supervisor {
                pvm.set_interrupt_flag(cpu, vector & 1 != 0);
            }
            Ok(())
        }
    })
}

fn syscall(bytes: &mut Bytes<'_>, cpu: &mut Plain, pvm: &mut Pvm) -> Option<Result<(), TripleFault>> {
    let (place, number) = (bytes.byte()?, bytes.byte()?);
    let address = match place % 4 {
        0 => pvm.retu_rip,
        1 => pvm.rets_rip,
        _ => bytes.word()?,
    };
    cpu.registers.rip = address.wrapping_add(2);
    cpu.registers.rax = hypercall::LOAD_PGTBL.wrapping_add(number.into());
    Some(pvm.syscall(cpu).map(drop))
}

fn msr(bytes: &mut Bytes<'_>, cpu: &mut Plain, pvm: &mut Pvm) -> Option<Result<(), TripleFault>> {
    const X86: [u32; 8] = [
        x86_msr::STAR,
        x86_msr::LSTAR,
        x86_msr::CSTAR,
        x86_msr::SYSCALL_MASK,
        x86_msr::GS_BASE,
        x86_msr::KERNEL_GS_BASE,
        x86_msr::PKRS,
        0x174,
    ];
    let (which, value) = (bytes.byte()?, bytes.word()?);
    let index = match which % 16 {
        n @ 0..8 => GENERATION_1.msrs[usize::from(n)].0,
        n => X86[usize::from(n - 8)],
    };
    let before = pvm.read_msr(index);
    match pvm.write_msr(cpu, index, value) {
        Access::Done(()) => assert_eq!(pvm.read_msr(index), Access::Done(value), "MSR {index:#x}"),
        Access::Fault => assert_eq!(pvm.read_msr(index), before, "MSR {index:#x}"),
        Access::Pass => drop(crate::Processor::write_msr(cpu, index, value)),
    }
    Some(Ok(()))
}

/// Whatever a step wrote is in the shared structure's named fields or in a frame that it wrote.
fn only_abi_memory_changed(before: &Plain, after: &Plain, pvcs: u64) {
    const RESERVED: [std::ops::Range<u64>; 2] = [24..64, 68..80];
    let frames: Vec<u64> = after
        .calls
        .iter()
        .filter_map(|c| if let Call::WriteFrame(address) = c { Some(*address) } else { None })
        .collect();
    for (address, page) in &after.pages {
        let old = &before.pages[address];
        assert_eq!(old.usable, page.usable);
        if old.bytes == page.bytes {
            continue;
        }
        for (n, (a, b)) in old.bytes.iter().zip(&page.bytes).enumerate() {
            let byte = address + n as u64;
            let field = pvcs != 0
                && byte.wrapping_sub(pvcs) < GENERATION_1.pvcs.size.into()
                && !RESERVED.iter().any(|r| r.contains(&(byte - pvcs)));
            let frame = frames.iter().any(|f| byte.wrapping_sub(*f) < Frame::SIZE);
            assert!(a == b || field || frame, "byte {byte:#x} is not the ABI's to write");
        }
    }
}
