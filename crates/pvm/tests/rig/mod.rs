//! A vCPU in a known state, every register of it different, so that a value shows where it came from.

use pvm::abi::GENERATION_1;
use pvm::testing::{Plain, Registers, Use};
use pvm::{Access, AddressRanges, Config, Event, Mode, Next, Processor, Pvm, TripleFault};

/// The numbers of the MSRs.
pub(crate) mod msr {
    pub(crate) const LINEAR_ADDRESS_RANGE: u32 = 0x4b56_4df0;
    pub(crate) const VCPU_STRUCT: u32 = 0x4b56_4df1;
    pub(crate) const SUPERVISOR_RSP: u32 = 0x4b56_4df2;
    pub(crate) const SUPERVISOR_REDZONE: u32 = 0x4b56_4df3;
    pub(crate) const EVENT_ENTRY: u32 = 0x4b56_4df4;
    pub(crate) const RETU_RIP: u32 = 0x4b56_4df5;
    pub(crate) const RETS_RIP: u32 = 0x4b56_4df6;
    pub(crate) const SWITCH_CR3: u32 = 0x4b56_4df7;
    pub(crate) const PKRS: u32 = 0x6e1;
    pub(crate) const STAR: u32 = 0xc000_0081;
    pub(crate) const LSTAR: u32 = 0xc000_0082;
    pub(crate) const GS_BASE: u32 = 0xc000_0101;
    pub(crate) const KERNEL_GS_BASE: u32 = 0xc000_0102;
}

/// Offsets in the shared structure.
pub(crate) mod at {
    pub(crate) const EVENT_FLAGS: u64 = 0;
    pub(crate) const EVENT_ERRCODE: u64 = 8;
    pub(crate) const EVENT_VECTOR: u64 = 12;
    pub(crate) const CR2: u64 = 16;
    pub(crate) const USER_CS: u64 = 64;
    pub(crate) const USER_SS: u64 = 66;
    pub(crate) const USER_GSBASE: u64 = 80;
    pub(crate) const EFLAGS: u64 = 88;
    pub(crate) const PKRU: u64 = 92;
    pub(crate) const RIP: u64 = 96;
    pub(crate) const RSP: u64 = 104;
    pub(crate) const RCX: u64 = 112;
    pub(crate) const R11: u64 = 120;
}

/// RFLAGS.IF and the flag of the same name in the shared structure.
pub(crate) const IF: u64 = 0x200;
/// The shared structure's interrupt-pending flag.
pub(crate) const IP: u64 = 0x100;
/// RFLAGS that every event enters with, and R11 too.
pub(crate) const ENTRY_FLAGS: u64 = 0x202;
/// CR4.PKS.
pub(crate) const CR4_PKS: u64 = 1 << 24;
/// CR4.LA57.
pub(crate) const CR4_LA57: u64 = 1 << 12;

/// The page of the shared structure.
pub(crate) const PVCS: u64 = 0x5000;
/// The page of the supervisor's stack, and the pages on both sides of it, which are not there.
pub(crate) const STACK: u64 = 0xffff_c900_0001_0000;
pub(crate) const EVENT_ENTRY: u64 = 0xffff_c900_0020_0000;
pub(crate) const LSTAR: u64 = 0xffff_c900_0020_1000;
pub(crate) const RETU_RIP: u64 = 0xffff_c900_0020_2000;
pub(crate) const RETS_RIP: u64 = 0xffff_c900_0020_2010;
pub(crate) const SUPERVISOR_RSP: u64 = STACK + 0xff0;
pub(crate) const REDZONE: u64 = 0x80;
pub(crate) const SUPERVISOR_ROOT: u64 = 0x6000;
pub(crate) const USER_ROOT: u64 = 0x7000;
pub(crate) const SUPERVISOR_GS: u64 = 0xffff_c900_0030_0000;
/// The supervisor's CS, as the guest had it when it entered 64-bit mode; its SS is 0x18.
pub(crate) const SUPERVISOR_CS: u64 = 0x10;
pub(crate) const SUPERVISOR_SS: u64 = 0x18;

/// A vCPU's ABI with the processor around it.
#[derive(Clone)]
pub(crate) struct Vcpu {
    pub(crate) cpu: Plain,
    pub(crate) pvm: Pvm,
}

impl Vcpu {
    /// Just in supervisor mode: no MSR is set, there is one page for a shared structure and one for a stack.
    pub(crate) fn bare() -> Self {
        Self::with_ranges(AddressRanges::new(402..434, None).unwrap())
    }

    /// The same with other address ranges.
    pub(crate) fn with_ranges(ranges: AddressRanges) -> Self {
        let mut cpu = Plain::new();
        cpu.map(PVCS, Use::Ram);
        cpu.map(STACK, Use::Ram);
        cpu.registers.cr3 = SUPERVISOR_ROOT;
        let mut pvm = Pvm::new(Config { generation: &GENERATION_1, ranges, cpu: 3 });
        pvm.enter(&mut cpu, SUPERVISOR_CS as u16);
        cpu.take_calls();
        Self { cpu, pvm }
    }

    /// In supervisor mode, all MSRs set, in the midst of some code.
    pub(crate) fn supervisor() -> Self {
        let mut v = Self::bare();
        for (index, value) in [
            (msr::VCPU_STRUCT, PVCS),
            (msr::SUPERVISOR_RSP, SUPERVISOR_RSP),
            (msr::SUPERVISOR_REDZONE, REDZONE),
            (msr::EVENT_ENTRY, EVENT_ENTRY),
            (msr::RETU_RIP, RETU_RIP),
            (msr::RETS_RIP, RETS_RIP),
            (msr::SWITCH_CR3, USER_ROOT),
            (msr::LSTAR, LSTAR),
            (msr::KERNEL_GS_BASE, SUPERVISOR_GS),
        ] {
            v.set(index, value);
        }
        // Nothing in the structure is zero, so that a change to anything is seen.
        let filled: Vec<u8> = (0x80..=0xff).collect();
        v.cpu.poke(PVCS, &filled);
        v.put_u64(at::EVENT_FLAGS, 0);
        v.cpu.registers = Registers {
            rax: 0xaaaa_aaaa_0000_0001,
            rbx: 0xbbbb_bbbb_0000_0002,
            rcx: 0xcccc_cccc_0000_0003,
            rdx: 0xdddd_dddd_0000_0004,
            rsi: 0x5151_5151_0000_0005,
            rsp: STACK + 0xe08,
            r10: 0x1010_1010_0000_0006,
            r11: 0x1111_1111_0000_0007,
            rip: 0xffff_c900_0020_3456,
            rflags: 0x246,
            cr2: 0x0000_2222_2222_2000,
            gs_base: SUPERVISOR_GS,
            pkru: 0,
            ..v.cpu.registers
        };
        v.cpu.take_calls();
        v
    }

    /// In user mode, with all MSRs set.
    pub(crate) fn user() -> Self {
        let mut v = Self::supervisor();
        v.put_u16(at::USER_CS, 0x33);
        v.put_u16(at::USER_SS, 0x2b);
        v.put_u64(at::USER_GSBASE, 0x0000_6666_0000_0008);
        v.put_u32(at::EFLAGS, 0x0000_0ad7);
        v.put_u32(at::PKRU, 0x5555_5554);
        v.put_u64(at::RIP, 0x0000_0000_0040_1000);
        v.put_u64(at::RSP, 0x0000_7fff_ffff_e008);
        v.put_u64(at::RCX, 0xc0c0_c0c0_0000_0009);
        v.put_u64(at::R11, 0x1b1b_1b1b_0000_000a);
        v.cpu.registers.rsp = SUPERVISOR_RSP;
        assert_eq!(v.syscall_at(RETU_RIP), Ok(Next::Run));
        assert_eq!(v.pvm.mode(), Mode::User);
        // What was saved must not be mistaken for what was there.
        let filled: Vec<u8> = (0x80..=0xff).collect();
        v.cpu.poke(PVCS, &filled);
        v.put_u64(at::EVENT_FLAGS, 0);
        v.cpu.take_calls();
        v
    }

    pub(crate) fn deliver(&mut self, event: Event) -> Result<(), TripleFault> {
        self.pvm.deliver(&mut self.cpu, event)
    }

    /// SYSCALL at `address`.
    pub(crate) fn syscall_at(&mut self, address: u64) -> Result<Next, TripleFault> {
        self.cpu.registers.rip = address.wrapping_add(2);
        self.pvm.syscall(&mut self.cpu)
    }

    /// A hypercall that goes on with the next instruction; its result.
    pub(crate) fn hypercall(&mut self, number: u64, [rbx, r10, rdx]: [u64; 3]) -> u64 {
        let r = &mut self.cpu.registers;
        (r.rax, r.rbx, r.r10, r.rdx) = (number, rbx, r10, rdx);
        assert_eq!(self.syscall_at(0xffff_c900_0020_4000), Ok(Next::Run));
        self.cpu.registers.rax
    }

    /// WRMSR; whether there was no #GP.
    pub(crate) fn try_set(&mut self, index: u32, value: u64) -> bool {
        match self.pvm.write_msr(&mut self.cpu, index, value) {
            Access::Done(()) => true,
            Access::Fault => false,
            Access::Pass => self.cpu.write_msr(index, value),
        }
    }

    /// WRMSR that must not raise #GP.
    pub(crate) fn set(&mut self, index: u32, value: u64) {
        assert!(self.try_set(index, value), "WRMSR {index:#x} {value:#x}");
    }

    /// RDMSR; `None` for #GP.
    pub(crate) fn get(&mut self, index: u32) -> Option<u64> {
        match self.pvm.read_msr(index) {
            Access::Done(value) => Some(value),
            Access::Fault => None,
            Access::Pass => self.cpu.read_msr(index),
        }
    }

    /// The values of PVM's MSRs and of PKRS.
    pub(crate) fn own_msrs(&mut self) -> [u64; 9] {
        let mut index = msr::LINEAR_ADDRESS_RANGE..=msr::SWITCH_CR3;
        std::array::from_fn(|_| self.get(index.next().unwrap_or(msr::PKRS)).unwrap())
    }

    pub(crate) fn pvcs_u64(&self, offset: u64) -> u64 {
        u64::from_le_bytes(self.cpu.bytes(PVCS + offset))
    }

    pub(crate) fn put_u16(&mut self, offset: u64, value: u16) {
        self.cpu.poke(PVCS + offset, &value.to_le_bytes());
    }

    pub(crate) fn put_u32(&mut self, offset: u64, value: u32) {
        self.cpu.poke(PVCS + offset, &value.to_le_bytes());
    }

    pub(crate) fn put_u64(&mut self, offset: u64, value: u64) {
        self.cpu.poke(PVCS + offset, &value.to_le_bytes());
    }

    /// The rest of the state is as in `expected`: registers, memory, MSRs, mode, NMI mask; not what was asked of the
    /// processor on the way.
    #[track_caller]
    pub(crate) fn assert_is(&mut self, expected: &mut Self) {
        assert_eq!(self.cpu.registers, expected.cpu.registers);
        for (address, page) in &expected.cpu.pages {
            let now = self.cpu.pages.get(address).expect("a page");
            for (n, (now, then)) in now.bytes.iter().zip(&page.bytes).enumerate() {
                assert_eq!(now, then, "memory at {:#x}", address + n as u64);
            }
        }
        assert_eq!(self.own_msrs(), expected.own_msrs());
        assert_eq!(self.pvm.mode(), expected.pvm.mode());
        assert_eq!(self.pvm.nmi_open(), expected.pvm.nmi_open());
        assert_eq!(self.pvm.gdt(), expected.pvm.gdt());
        (self.cpu.calls, expected.cpu.calls) = (Vec::new(), Vec::new());
        assert_eq!(self.cpu, expected.cpu);
    }
}
