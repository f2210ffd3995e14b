//! Random sequences of events, returns, hypercalls, MSR writes and changes of memory, on the crate and on a model
//! that was written from the specification's text. After every step everything that a guest can see is the same.
#![allow(clippy::unwrap_used, reason = "in tests a panic is the report")]

#[path = "model/specification.rs"]
mod specification;

use std::cell::RefCell;

use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config as ProptestConfig, RngAlgorithm, TestRng, TestRunner};
use pvm::abi::GENERATION_1;
use pvm::testing::{Call, Plain, Use};
use pvm::{Access, AddressRanges, Config, Event, Mode, Next, Processor, Pvm, Stats, TripleFault};
use specification::{Model, Shutdown};

/// The pages that come and go. The first and the last are neighbours.
const PAGES: [u64; 4] = [0, 0x5000, 0xffff_c900_0001_0000, 0xffff_ffff_ffff_f000];
const PVCS: u64 = PAGES[1];
const STACK: u64 = PAGES[2];
/// MSRs with a meaning, and one that there is not.
const MSRS: [u32; 18] = [
    0x4b56_4df0,
    0x4b56_4df1,
    0x4b56_4df2,
    0x4b56_4df3,
    0x4b56_4df4,
    0x4b56_4df5,
    0x4b56_4df6,
    0x4b56_4df7,
    0x4b56_4df8,
    0x6e1,
    0x174,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0101,
    0xc000_0102,
    0x10,
];
/// What a guest begins with, so that most of what follows has something to do.
const SET_UP: [(u32, u64); 9] = [
    (0x4b56_4df1, PVCS),
    (0x4b56_4df2, STACK + 0xff0),
    (0x4b56_4df3, 16),
    (0x4b56_4df4, 0xffff_c900_0020_0000),
    (0x4b56_4df5, 0xffff_c900_0020_2000),
    (0x4b56_4df6, 0xffff_c900_0020_2010),
    (0x4b56_4df7, 0x7000),
    (0xc000_0082, 0xffff_c900_0020_1000),
    (0xc000_0102, 0xffff_c900_0030_0000),
];

/// Where a SYSCALL is.
#[derive(Clone, Copy, Debug)]
enum Place {
    Retu,
    Rets,
    Address(u64),
}

#[derive(Clone, Debug)]
enum Step {
    /// An exception, or whatever the monitor chooses to deliver.
    Event(u8, Option<u32>),
    /// A maskable interrupt comes: it is delivered, or waits.
    Interrupt(u8),
    /// An NMI comes: it is delivered, or waits.
    Nmi,
    Syscall(Place, [u64; 4]),
    Wrmsr(u32, u64),
    /// CLI and STI in supervisor mode.
    InterruptFlag(bool),
    /// The guest computes: registers get values.
    Compute([u64; 6]),
    /// The guest changes its stack pointer.
    Stack(u64),
    /// CR4.PKS is toggled.
    Keys,
    /// The guest writes to memory: page, offset, value.
    Write(usize, u64, u64),
    /// A page is replaced by nothing, or by zeros of some use.
    Page(usize, Option<Use>),
    /// A user's state that can be returned to is put into the structure.
    Prepare(u16, u64),
}

fn value() -> impl Strategy<Value = u64> {
    let special = vec![
        0,
        1,
        0x10,
        0x28,
        0x200,
        0x300,
        0xfff,
        0x1000,
        PVCS,
        PVCS + 0x80,
        0x5001,
        STACK + 0x800,
        STACK + 0x1000,
        0x7fff_ffff_ffff,
        0x8000_0000_0000,
        0x0000_7fff_ffff_fe80,
        0xffff_8000_0000_0000,
        0x00ff_ffff_ffff_ffff,
        1 << 46,
        0xffff_ffff,
        u64::MAX,
        u64::MAX - 0x1f,
        0x0023_0010_0000_0000,
        0x0020_0010_1234_5678,
        0x0033_0010_0000_0000,
        0x0040_f200_0000_ffff,
        0x1240_f234_5678_ffff,
        0x00cf_f300_0000_ffff,
        0xffff_ffff_ffb2_ff92,
        0xffff_ffff_ffb1_ff93,
        0xff36_ff2c_ffb2_ff92,
        0xff35_ff2d_ffb0_ff94,
        0x2b,
        0x60,
        0x63,
        0x6b,
    ];
    prop_oneof![3 => select(special), 1 => any::<u64>()]
}

fn step() -> impl Strategy<Value = Step> {
    let place = prop_oneof![
        3 => Just(Place::Retu),
        2 => Just(Place::Rets),
        5 => value().prop_map(Place::Address),
    ];
    let number = prop_oneof![
        8 => 0x1708_8200..=0x1708_8209u64,
        1 => 0..16u64,
        1 => value(),
    ];
    // Arguments of RDMSR, WRMSR and LOAD_GS are no better than chance without help.
    let argument = prop_oneof![2 => value(), 2 => select(&MSRS[..]).prop_map(u64::from), 1 => 0..4u64];
    let flags = prop_oneof![Just(0u64), Just(0x200), Just(0x100), Just(0x300), any::<u64>()];
    prop_oneof![
        4 => (any::<u8>(), any::<Option<u32>>()).prop_map(|(v, c)| Step::Event(v, c)),
        1 => any::<Option<u32>>().prop_map(|c| Step::Event(14, c)),
        4 => (32..=255u8).prop_map(Step::Interrupt),
        1 => Just(Step::Nmi),
        10 => (place, number, argument, value(), value())
            .prop_map(|(p, n, a, b, c)| Step::Syscall(p, [n, a, b, c])),
        3 => (select(&MSRS[..]), value()).prop_map(|(n, v)| Step::Wrmsr(n, v)),
        2 => any::<bool>().prop_map(Step::InterruptFlag),
        3 => prop::array::uniform6(value()).prop_map(Step::Compute),
        1 => value().prop_map(Step::Stack),
        2 => (0..0x1100u64).prop_map(|n| Step::Stack(STACK + n)),
        1 => Just(Step::Keys),
        2 => (0..PAGES.len(), 0..136u64, value()).prop_map(|(p, o, v)| Step::Write(p, o, v)),
        1 => (0..PAGES.len(), select(vec![None, Some(Use::ReadOnly), Some(Use::Mmio)]))
            .prop_map(|(p, u)| Step::Page(p, u)),
        2 => (0..PAGES.len()).prop_map(|p| Step::Page(p, Some(Use::Ram))),
        4 => (select(vec![0x33, 0x23, 0x30]), flags).prop_map(|(cs, f)| Step::Prepare(cs, f)),
    ]
}

/// The crate and the model beside each other.
#[derive(Clone)]
struct Pair {
    cpu: Plain,
    pvm: Pvm,
    model: Model,
}

impl Pair {
    fn new(five_level: bool) -> Self {
        let pml5 = five_level.then_some(300..310);
        let ranges = AddressRanges::new(402..434, pml5.clone()).unwrap();
        let mut cpu = Plain::new();
        let mut model = Model::new(402..434, pml5);
        for page in PAGES {
            cpu.map(page, Use::Ram);
            model.map(page, Some(Use::Ram));
        }
        cpu.five_level = five_level;
        cpu.registers.cr3 = 0x6000;
        let mut pvm = Pvm::new(Config { generation: &GENERATION_1, ranges, cpu: 3 });
        pvm.enter(&mut cpu, 0x10);
        cpu.take_calls();
        Self { cpu, pvm, model }
    }

    /// One step on both; whether both shut down.
    fn step(&mut self, step: &Step) -> bool {
        let Self { cpu, pvm, model } = self;
        match *step {
            Step::Event(vector, code) => {
                let ours = pvm.deliver(cpu, Event { vector, error_code: code, flags: 0 });
                return agree(ours, model.event(vector, code));
            }
            Step::Interrupt(vector) => {
                assert_eq!(pvm.interrupts_open(cpu), model.interrupts_open());
                if model.interrupts_open() {
                    return agree(pvm.deliver(cpu, Event::new(vector)), model.event(vector, None));
                }
                pvm.interrupt_waits(cpu);
                model.interrupt_waits();
            }
            Step::Nmi => {
                assert_eq!(pvm.nmi_open(), !model.nmi_masked);
                if !model.nmi_masked {
                    return agree(pvm.deliver(cpu, Event::nmi()), model.event(2, None));
                }
            }
            Step::Syscall(place, [rax, rbx, r10, rdx]) => {
                let address = match place {
                    Place::Retu => model.msrs[&0x4b56_4df5],
                    Place::Rets => model.msrs[&0x4b56_4df6],
                    Place::Address(address) => address,
                };
                for r in [&mut cpu.registers, &mut model.r] {
                    (r.rax, r.rbx, r.r10, r.rdx) = (rax, rbx, r10, rdx);
                    r.rip = address.wrapping_add(2);
                }
                let (ours, theirs) = (pvm.syscall(cpu), model.syscall());
                if let (Ok(next), Ok(halts)) = (ours, theirs) {
                    assert_eq!(next == Next::Halt, halts);
                }
                return agree(ours.map(drop), theirs.map(drop));
            }
            Step::Wrmsr(index, value) => {
                let ours = match pvm.write_msr(cpu, index, value) {
                    Access::Done(()) => true,
                    Access::Fault => false,
                    Access::Pass => cpu.write_msr(index, value),
                };
                assert_eq!(ours, model.wrmsr(index, value));
            }
            Step::InterruptFlag(open) => {
                if !model.user {
                    pvm.set_interrupt_flag(cpu, open);
                    model.cli_or_sti(open);
                }
            }
            Step::Compute([rcx, r11, rsi, rip, flags, cr2]) => {
                for r in [&mut cpu.registers, &mut model.r] {
                    (r.rcx, r.r11, r.rsi, r.rip, r.cr2) = (rcx, r11, rsi, rip, cr2);
                    // What a program can make of RFLAGS: the flags of arithmetic, DF and AC.
                    r.rflags = flags & 0x4_0cd5 | 0x202;
                    if !model.user {
                        continue;
                    }
                    (r.gs_base, r.pkru) = (flags & 0x7fff_ffff_ffff, rcx & 0xffff_ffff);
                }
            }
            Step::Stack(rsp) => (cpu.registers.rsp, model.r.rsp) = (rsp, rsp),
            Step::Keys => {
                cpu.registers.cr4 ^= 1 << 24;
                model.r.cr4 ^= 1 << 24;
            }
            Step::Write(page, offset, value) => {
                cpu.poke(PAGES[page] + offset, &value.to_le_bytes());
                model.poke(PAGES[page] + offset, &value.to_le_bytes());
            }
            Step::Page(page, usable) => {
                match usable {
                    Some(usable) => cpu.map(PAGES[page], usable),
                    None => {
                        cpu.pages.remove(&PAGES[page]);
                    }
                }
                model.map(PAGES[page], usable);
            }
            Step::Prepare(cs, flags) => {
                let at = model.msrs[&0x4b56_4df1];
                for (offset, bytes) in [(64, cs.to_le_bytes()), (66, [0x2b, 0])] {
                    cpu.poke(at + offset, &bytes);
                    model.poke(at + offset, &bytes);
                }
                cpu.poke(at, &flags.to_le_bytes());
                model.poke(at, &flags.to_le_bytes());
            }
        }
        false
    }

    /// Everything that a guest can see, and what was asked of the processor.
    fn compare(&mut self) {
        let Self { cpu, pvm, model } = self;
        assert_eq!(cpu.registers, model.r);
        assert_eq!((cpu.selectors.cs, cpu.selectors.ss, cpu.gs), (model.cs, model.ss, model.gs));
        assert_eq!(cpu.pages.keys().collect::<Vec<_>>(), model.pages.keys().collect::<Vec<_>>());
        for (address, page) in &cpu.pages {
            let (usable, bytes) = &model.pages[address];
            assert_eq!(page.usable, *usable);
            if page.bytes[..] != bytes[..] {
                let offset = page.bytes.iter().zip(bytes).position(|(a, b)| a != b);
                panic!("the page at {address:#x} differs from offset {offset:?} on");
            }
        }
        for index in MSRS {
            let ours = match pvm.read_msr(index) {
                Access::Done(value) => Some(value),
                Access::Fault => None,
                Access::Pass => cpu.read_msr(index),
            };
            assert_eq!(ours, model.rdmsr(index), "MSR {index:#x}");
        }
        assert_eq!(pvm.mode(), if model.user { Mode::User } else { Mode::Supervisor });
        assert_eq!(pvm.nmi_open(), !model.nmi_masked);
        let tls = [12u16, 13, 14].map(|n| pvm.gdt().descriptor(n << 3).unwrap_or(0));
        assert_eq!(tls, model.tls);
        let mut asked = cpu.take_calls();
        asked.retain(|c| !matches!(c, Call::EnterSupervisor(_) | Call::EnterUser(..) | Call::WriteFrame(_)));
        assert_eq!(asked, std::mem::take(&mut model.asked));
    }
}

fn agree(ours: Result<(), TripleFault>, theirs: Result<(), Shutdown>) -> bool {
    assert_eq!(ours.is_err(), theirs.is_err(), "one of them shuts down");
    ours.is_err()
}

#[test]
fn the_crate_does_what_the_specification_says() {
    let config = ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() };
    let seed = TestRng::from_seed(RngAlgorithm::ChaCha, &[0x9e; 32]);
    let mut runner = TestRunner::new_with_rng(config, seed);
    let met = RefCell::new((Stats::default(), 0));
    let sequences = (any::<bool>(), prop::collection::vec(step(), 1..80));
    runner
        .run(&sequences, |(five_level, steps)| {
            let mut pair = Pair::new(five_level);
            let set_up = SET_UP.map(|(index, value)| Step::Wrmsr(index, value));
            for step in set_up.iter().chain(&steps) {
                let before = pair.clone();
                if pair.step(step) {
                    // What a vCPU that has shut down looks like is nobody's business: go on from before.
                    pair = before;
                    met.borrow_mut().1 += 1;
                }
                pair.compare();
            }
            met.borrow_mut().0.add(pair.pvm.stats());
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
    // A sequence that never gets anywhere would find nothing.
    let (met, shutdowns) = met.into_inner();
    let [hypercalls @ .., kvm, windows] = [
        met.user_events,
        met.supervisor_exceptions,
        met.supervisor_interrupts,
        met.syscalls,
        met.user_returns,
        met.supervisor_returns,
        met.kvm_hypercalls,
        met.interrupt_windows,
    ];
    let all = hypercalls.into_iter().chain(met.hypercalls).chain([kvm, windows, shutdowns]);
    for (n, count) in all.enumerate() {
        assert!(count > 300, "counter {n} is {count}: {met:?}");
    }
}
