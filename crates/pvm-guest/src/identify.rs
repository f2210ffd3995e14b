//! What the kernel runs on.
//!
//! # Theory of operation
//! The order is the specification's ("PVM booting sequence"): is IF set, is CPL 3, does the synthetic CPUID instruction
//! say "KVM" and then "PVM"? Only the last of these is executed with the others true, so that nothing is left changed on
//! an ordinary processor.
//!
//! That name does not tell the generations apart: those after the first kept it and gave the MSRs other numbers or none.
//! So the MSRs are asked next, by hypercalls whose numbers all generations share: the range has to be one, and
//! MSR_PVM_SWITCH_CR3, which only generation 1 has under this number, has to take a value. No event can be
//! handled yet, so nothing here may fault on a hypervisor of any generation.

use core::arch::x86_64::CpuidResult;
use core::fmt;

use crate::abi::{PvmMsr, cpuid, hypercall, msr, rflags};
use crate::insn;

/// "KVMKVMKVM", as EBX, ECX and EDX have it.
pub const KVM: [u32; 3] = [u32::from_le_bytes(*b"KVMK"), u32::from_le_bytes(*b"VMKV"), b'M' as u32];

/// "PVMPVMPVM": the name in [`OWN_LEAVES`].
const PVM_IN_OWN_LEAVES: [u32; 3] = [u32::from_le_bytes(*b"PVMP"), u32::from_le_bytes(*b"VMPV"), b'M' as u32];
/// Where an ABI that numbers its versions (`PVM_ABI_VERSION`) has its name; the version is EAX of the next leaf.
const OWN_LEAVES: u32 = 0x4000_0200;

/// Whether this is a PVM hypervisor of generation 1.
#[derive(Clone, Copy, Debug)]
pub enum Host {
    /// It is.
    Generation1 {
        /// MSR_PVM_LINEAR_ADDRESS_RANGE.
        range: u64,
    },
    /// It is not, or does not let the guest know.
    Other(Why),
}

/// What shows that it is not.
#[derive(Clone, Copy, Debug)]
pub enum Why {
    /// Supervisor mode is what it is on a processor, or half so.
    NotEntered {
        /// The underlying CPL.
        cpl: u16,
        /// The underlying RFLAGS.IF.
        interrupt_flag: bool,
        /// By the plain CPUID instruction: there is no reason to have the other one emulated.
        hypervisor: Option<Name>,
    },
    /// Entered as PVM guests are, but by somebody else.
    NotKvm(Name),
    /// KVM, which does not say PVM in leaf 0x40000002. Also when the virtual machine monitor has left the leaf out.
    NotPvm(Name),
    /// PVM that does not have this MSR of generation 1, or has another one under its number.
    NoMsr(PvmMsr),
    /// PVM with leaves of its own, of this version.
    OwnLeaves(u32),
}

/// A hypervisor's name and its last leaf: leaf 0x40000000.
#[derive(Clone, Copy, Debug)]
pub struct Name {
    name: [u32; 3],
    last: u32,
}

impl Name {
    fn of(leaf: CpuidResult) -> Self {
        Self { name: words(leaf), last: leaf.eax }
    }
}

fn words(leaf: CpuidResult) -> [u32; 3] {
    [leaf.ebx, leaf.ecx, leaf.edx]
}

/// Finds out.
pub fn host() -> Host {
    let cpl = insn::cs() & 3;
    let interrupt_flag = insn::flags() & rflags::IF != 0;
    if cpl != 3 || !interrupt_flag {
        let version = version(plain_cpuid);
        return Host::Other(version.map_or_else(
            || Why::NotEntered { cpl, interrupt_flag, hypervisor: hypervisor() },
            Why::OwnLeaves,
        ));
    }
    let name = Name::of(insn::synthetic_cpuid(cpuid::SIGNATURE, 0));
    let says_pvm = name.name == KVM
        && name.last >= cpuid::VENDOR_FEATURES
        && insn::synthetic_cpuid(cpuid::VENDOR_FEATURES, 0).ebx == cpuid::PVM;
    if !says_pvm {
        let version = version(|leaf| insn::synthetic_cpuid(leaf, 0));
        let unnamed = if name.name == KVM { Why::NotPvm(name) } else { Why::NotKvm(name) };
        return Host::Other(version.map_or(unnamed, Why::OwnLeaves));
    }
    match by_msrs() {
        Ok(range) => Host::Generation1 { range },
        Err(missing) => Host::Other(Why::NoMsr(missing)),
    }
}

/// The range, if the MSRs are those of generation 1; else the one that is not.
fn by_msrs() -> Result<u64, PvmMsr> {
    let read = |which| insn::hypercall(hypercall::RDMSR, [msr(which).into(), 0, 0, 0]);
    // What is not there reads as zero or, elsewhere, as an error number.
    let range = read(PvmMsr::LinearAddressRange);
    let (start, end) = (range & 0x1ff, range >> 16 & 0x1ff);
    if !(256 <= start && start < end && end < 511) {
        return Err(PvmMsr::LinearAddressRange);
    }
    // The current root is one that can be there, and is there until the first LOAD_PGTBL. It is read back, as KVM can
    // be told to let writes to unknown MSRs pass (`ignore_msrs`).
    let root = insn::cr3();
    let written = insn::hypercall(hypercall::WRMSR, [msr(PvmMsr::SwitchCr3).into(), root, 0, 0]);
    if written != 0 || read(PvmMsr::SwitchCr3) != root {
        return Err(PvmMsr::SwitchCr3);
    }
    Ok(range)
}

/// The version of PVM's own leaves, if there are any.
fn version(cpuid: impl Fn(u32) -> CpuidResult) -> Option<u32> {
    (words(cpuid(OWN_LEAVES)) == PVM_IN_OWN_LEAVES).then(|| cpuid(OWN_LEAVES + 1).eax)
}

/// What the plain CPUID instruction says about a hypervisor (Intel SDM vol. 2, CPUID: leaf 1, ECX bit 31, is never set by
/// a processor).
fn hypervisor() -> Option<Name> {
    (plain_cpuid(1).ecx >> 31 == 1).then(|| Name::of(plain_cpuid(cpuid::SIGNATURE)))
}

fn plain_cpuid(leaf: u32) -> CpuidResult {
    core::arch::x86_64::__cpuid(leaf)
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CPUID says \"")?;
        for byte in self.name.iter().flat_map(|word| word.to_le_bytes()).filter(|byte| *byte != 0) {
            let character = if byte == b' ' || byte.is_ascii_graphic() { byte.into() } else { '?' };
            fmt::Write::write_char(f, character)?;
        }
        write!(f, "\" and leaves up to {:#x}", self.last)
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotEntered { cpl, interrupt_flag, hypervisor } => {
                write!(f, "CPL {cpl} and IF {} in supervisor mode", u8::from(*interrupt_flag))?;
                match hypervisor {
                    Some(name) => write!(f, "; {name}"),
                    None => f.write_str("; CPUID names no hypervisor"),
                }
            }
            Self::NotKvm(name) => write!(f, "entered like PVM's guests, but {name}"),
            Self::NotPvm(name) => {
                write!(f, "entered like PVM's guests, but without PVM's name in leaf 0x40000002: {name}")
            }
            Self::NoMsr(which) => {
                write!(f, "PVM of another generation: MSR {:#x} is not {which:?}", msr(*which))
            }
            Self::OwnLeaves(version) => {
                write!(f, "PVM of another generation: leaf {OWN_LEAVES:#x}, version {version}")
            }
        }
    }
}
