//! The numbers of the ABI: what a guest and a hypervisor must agree on.
//!
//! A [`Generation`] is a value: its MSRs, the layout of its shared structure and its entry points are tables that
//! the state machine reads. The generations do not interoperate; the one here, [`GENERATION_1`], is that
//! of the RFC series "KVM: x86/PVM: Introduce a new hypervisor" of February 2024.

/// One generation of the ABI.
#[derive(Clone, Copy, Debug)]
pub struct Generation {
    /// For messages.
    pub name: &'static str,
    /// The MSRs of its own, sorted by number.
    pub msrs: &'static [(u32, PvmMsr)],
    /// The layout of the shared structure.
    pub pvcs: PvcsLayout,
    /// Where events enter, relative to [`PvmMsr::EventEntry`].
    pub entries: Entries,
}

impl Generation {
    /// The MSR with the number `index`, if it is one of this generation.
    pub fn msr(&self, index: u32) -> Option<PvmMsr> {
        self.msrs.iter().find(|(n, _)| *n == index).map(|(_, msr)| *msr)
    }

    /// The number of `msr`, if this generation has it.
    pub fn msr_index(&self, msr: PvmMsr) -> Option<u32> {
        self.msrs.iter().find(|(_, m)| *m == msr).map(|(n, _)| *n)
    }
}

/// The MSRs that PVM adds (specification, "PVM MSRs").
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PvmMsr {
    /// MSR_PVM_LINEAR_ADDRESS_RANGE: which upper-half addresses the guest may use.
    LinearAddressRange,
    /// MSR_PVM_VCPU_STRUCT, in places called VCPU_CTRL_STRUCT: guest-physical address of the PVCS, 0 for none.
    VcpuStruct,
    /// MSR_PVM_SUPERVISOR_RSP, in places called KERNEL_RSP: RSP on entry from user mode.
    SupervisorRsp,
    /// MSR_PVM_SUPERVISOR_REDZONE: bytes below RSP that an event in supervisor mode leaves alone.
    SupervisorRedzone,
    /// MSR_PVM_EVENT_ENTRY: where events enter.
    EventEntry,
    /// MSR_PVM_RETU_RIP: the SYSCALL at this address is ERETU.
    RetuRip,
    /// MSR_PVM_RETS_RIP: the SYSCALL at this address is ERETS.
    RetsRip,
    /// MSR_PVM_SWITCH_CR3: the CR3 of the other mode.
    SwitchCr3,
}

/// A field of the shared structure.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Field {
    /// Offset in bytes, a multiple of `size`.
    pub offset: u16,
    /// Size in bytes: 2, 4 or 8.
    pub size: u8,
}

const fn field(offset: u16, size: u8) -> Field {
    Field { offset, size }
}

/// Where the fields of the PVCS, the PVM vCPU structure, lie (specification, "MSR_PVM_VCPU_CTRL_STRUCT").
#[derive(Clone, Copy, Debug)]
#[expect(missing_docs, reason = "the names are the specification's")]
pub struct PvcsLayout {
    pub event_flags: Field,
    pub event_errcode: Field,
    pub event_vector: Field,
    pub cr2: Field,
    pub user_cs: Field,
    pub user_ss: Field,
    pub user_gsbase: Field,
    pub eflags: Field,
    pub pkru: Field,
    pub rip: Field,
    pub rsp: Field,
    pub rcx: Field,
    pub r11: Field,
    /// The structure's size in bytes. It starts at the start of a page.
    pub size: u16,
}

/// Where events enter, relative to the event entry address.
#[derive(Clone, Copy, Debug)]
pub struct Entries {
    /// Vector events from user mode.
    pub user: u64,
    /// Vectors below 32 from supervisor mode.
    pub supervisor_exception: u64,
    /// Vectors from 32 on from supervisor mode.
    pub supervisor_interrupt: u64,
}

/// Generation 1: the RFC series of February 2024.
pub static GENERATION_1: Generation = Generation {
    name: "1 (RFC v1, 2024-02)",
    msrs: &[
        (0x4b56_4df0, PvmMsr::LinearAddressRange),
        (0x4b56_4df1, PvmMsr::VcpuStruct),
        (0x4b56_4df2, PvmMsr::SupervisorRsp),
        (0x4b56_4df3, PvmMsr::SupervisorRedzone),
        (0x4b56_4df4, PvmMsr::EventEntry),
        (0x4b56_4df5, PvmMsr::RetuRip),
        (0x4b56_4df6, PvmMsr::RetsRip),
        (0x4b56_4df7, PvmMsr::SwitchCr3),
    ],
    pvcs: PvcsLayout {
        event_flags: field(0, 8),
        event_errcode: field(8, 4),
        event_vector: field(12, 4),
        cr2: field(16, 8),
        user_cs: field(64, 2),
        user_ss: field(66, 2),
        user_gsbase: field(80, 8),
        eflags: field(88, 4),
        pkru: field(92, 4),
        rip: field(96, 8),
        rsp: field(104, 8),
        rcx: field(112, 8),
        r11: field(120, 8),
        size: 128,
    },
    entries: Entries { user: 0, supervisor_exception: 256, supervisor_interrupt: 512 },
};

/// Bits of `PVCS::event_flags`.
pub mod event_flags {
    /// A maskable interrupt waits; the guest is to make the hypercall IRQ_WIN once it has set IF.
    pub const IP: u64 = 1 << 8;
    /// Maskable interrupts are open in supervisor mode.
    pub const IF: u64 = 1 << 9;
}

/// Bits of RFLAGS that the ABI names (Intel SDM vol. 1, 3.4.3).
pub mod rflags {
    /// Always one.
    pub const FIXED: u64 = 1 << 1;
    /// Single step.
    pub const TF: u64 = 1 << 8;
    /// Interrupts enabled.
    pub const IF: u64 = 1 << 9;
    /// I/O privilege level.
    pub const IOPL: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume: no instruction breakpoint on the next instruction.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check.
    pub const AC: u64 = 1 << 18;
    /// Virtual interrupt flag.
    pub const VIF: u64 = 1 << 19;
    /// Virtual interrupt pending.
    pub const VIP: u64 = 1 << 20;
    /// CPUID can be used.
    pub const ID: u64 = 1 << 21;
    /// What the guest may choose: status and control flags, TF, NT, RF, AC, ID.
    pub const CHOICE: u64 = 0xcd5 | TF | NT | RF | AC | ID;

    /// RFLAGS of the underlying processor for a guest that asked for `value`: IOPL, VM, VIF and VIP clear, IF
    /// and the fixed bit set.
    pub const fn underlying(value: u64) -> u64 {
        value & CHOICE | IF | FIXED
    }
}

/// Selectors of the hypervisor's GDT that a guest can use; Linux's numbers.
pub mod selector {
    /// __USER32_CS.
    pub const USER32_CS: u16 = 0x23;
    /// __USER_DS.
    pub const USER_DS: u16 = 0x2b;
    /// __USER_CS.
    pub const USER_CS: u16 = 0x33;
    /// The index of the first of the three TLS descriptors.
    pub const TLS_INDEX: u16 = 12;
    /// How many TLS descriptors there are.
    pub const TLS_ENTRIES: usize = 3;
    /// The data segment whose limit is the number of the CPU.
    pub const CPUNODE: u16 = 0x7b;
}

/// Hypercall numbers (specification, "Hypercall event in supervisor mode").
pub mod hypercall {
    /// LOAD_PGTBL(flags, supervisor_pgd, user_pgd).
    pub const LOAD_PGTBL: u64 = 0x1708_8200;
    /// IRQ_WIN().
    pub const IRQ_WIN: u64 = LOAD_PGTBL + 1;
    /// IRQ_HALT(), in the specification IRQ_HLT.
    pub const IRQ_HALT: u64 = LOAD_PGTBL + 2;
    /// TLB_FLUSH().
    pub const TLB_FLUSH: u64 = LOAD_PGTBL + 3;
    /// TLB_FLUSH_CURRENT().
    pub const TLB_FLUSH_CURRENT: u64 = LOAD_PGTBL + 4;
    /// TLB_INVLPG(addr).
    pub const TLB_INVLPG: u64 = LOAD_PGTBL + 5;
    /// LOAD_GS(selector).
    pub const LOAD_GS: u64 = LOAD_PGTBL + 6;
    /// RDMSR(index).
    pub const RDMSR: u64 = LOAD_PGTBL + 7;
    /// WRMSR(index, value).
    pub const WRMSR: u64 = LOAD_PGTBL + 8;
    /// LOAD_TLS(entry0, entry1, entry2).
    pub const LOAD_TLS: u64 = LOAD_PGTBL + 9;
    /// How many there are.
    pub const COUNT: usize = NAMES.len();
    /// Their names, in the order of their numbers.
    pub const NAMES: [&str; 10] = [
        "LOAD_PGTBL",
        "IRQ_WIN",
        "IRQ_HALT",
        "TLB_FLUSH",
        "TLB_FLUSH_CURRENT",
        "TLB_INVLPG",
        "LOAD_GS",
        "RDMSR",
        "WRMSR",
        "LOAD_TLS",
    ];
    /// LOAD_PGTBL's flag: flush the translations of both new roots.
    pub const LOAD_PGTBL_FLUSH: u64 = 1 << 0;
    /// LOAD_PGTBL's flag: 5-level page tables.
    pub const LOAD_PGTBL_LA57: u64 = 1 << 1;
    /// The result -EINVAL.
    pub const EINVAL: u64 = -22i64 as u64;
    /// KVM's result for a hypercall that it does not know, -KVM_ENOSYS.
    pub const KVM_ENOSYS: u64 = -1000i64 as u64;
}

/// CPUID (specification, "CPUID leaf" and "PVM Synthetic Instructions").
pub mod cpuid {
    /// The bytes of the synthetic CPUID instruction: INVLPG of 0xffffffffff4d5650, then CPUID.
    pub const SYNTHETIC: [u8; 10] = [0x0f, 0x01, 0x3c, 0x25, 0x50, 0x56, 0x4d, 0xff, 0x0f, 0xa2];
    /// The operand of its INVLPG.
    pub const SYNTHETIC_ADDRESS: u64 = 0xffff_ffff_ff4d_5650;
    /// "KVMKVMKVM" in EBX, ECX, EDX; EAX is at least [`VENDOR_FEATURES`].
    pub const SIGNATURE: u32 = 0x4000_0000;
    /// EAX: features of PVM (none is defined); EBX: [`PVM`].
    pub const VENDOR_FEATURES: u32 = 0x4000_0002;
    /// "PVM" in the header's spelling; the specification's text has it in lower case, guests test this.
    pub const PVM: u32 = 0x4d_5650;
}

/// x86 MSRs for which PVM has rules.
pub mod x86_msr {
    /// IA32_STAR.
    pub const STAR: u32 = 0xc000_0081;
    /// IA32_LSTAR: where SYSCALL enters from user mode.
    pub const LSTAR: u32 = 0xc000_0082;
    /// IA32_CSTAR: stored, without effect.
    pub const CSTAR: u32 = 0xc000_0083;
    /// IA32_FMASK, in the specification SYSCALL_MASK: stored, without effect.
    pub const SYSCALL_MASK: u32 = 0xc000_0084;
    /// IA32_GS_BASE.
    pub const GS_BASE: u32 = 0xc000_0101;
    /// IA32_KERNEL_GS_BASE.
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    /// IA32_PKRS.
    pub const PKRS: u32 = 0x6e1;
}

/// Control registers in PVM modes (specification, "States or registers on PVM modes").
pub mod control {
    /// CR0 bits that are always one: PE, MP, ET, NE, WP, AM, PG.
    pub const CR0_ONE: u64 = 1 << 0 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 18 | 1 << 31;
    /// CR0 bits that are always zero: EM, TS, NW, CD.
    pub const CR0_ZERO: u64 = 1 << 2 | 1 << 3 | 1 << 29 | 1 << 30;
    /// CR4 bits that are always one: PAE, FSGSBASE.
    pub const CR4_ONE: u64 = 1 << 5 | 1 << 16;
    /// CR4 bits that are always zero: VME, PVI, SMEP, SMAP.
    pub const CR4_ZERO: u64 = 1 << 0 | 1 << 1 | 1 << 20 | 1 << 21;
    /// CR4.PKE: protection keys in user mode.
    pub const CR4_PKE: u64 = 1 << 22;
    /// CR4.PKS: protection keys in supervisor mode.
    pub const CR4_PKS: u64 = 1 << 24;
    /// EFER bits that are always one: SCE, LME, LMA.
    pub const EFER_ONE: u64 = 1 << 0 | 1 << 8 | 1 << 10;

    /// Whether `cr4` may be written as far as keys go. The supervisor's are those of the underlying PKRU: CR4.PKS cannot
    /// be set without CR4.PKE.
    pub const fn keys_are_possible(cr4: u64) -> bool {
        cr4 & CR4_PKS == 0 || cr4 & CR4_PKE != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn msr_map_is_sorted_and_reversible() {
        assert!(GENERATION_1.msrs.is_sorted_by_key(|(n, _)| *n));
        for (index, msr) in GENERATION_1.msrs {
            assert_eq!(GENERATION_1.msr(*index), Some(*msr));
            assert_eq!(GENERATION_1.msr_index(*msr), Some(*index));
        }
        assert_eq!(GENERATION_1.msr(0x4b56_4df8), None);
    }

    #[test]
    fn pvcs_fields_are_aligned_and_disjoint() {
        let p = &GENERATION_1.pvcs;
        let fields = [
            p.event_flags,
            p.event_errcode,
            p.event_vector,
            p.cr2,
            p.user_cs,
            p.user_ss,
            p.user_gsbase,
            p.eflags,
            p.pkru,
            p.rip,
            p.rsp,
            p.rcx,
            p.r11,
        ];
        for (n, f) in fields.iter().enumerate() {
            assert_eq!(f.offset % u16::from(f.size), 0, "{f:?}");
            assert!(f.offset + u16::from(f.size) <= p.size);
            for g in fields.iter().skip(n + 1) {
                assert!(f.offset + u16::from(f.size) <= g.offset, "{f:?} {g:?}");
            }
        }
    }
}
