//! Which ABI a machine's processors offer to the guest's kernel.
//!
//! The choice is made once for each machine, before its vCPUs exist: a kernel that does not know PVM's ABI breaks
//! when it is entered by it. Whether a kernel knows it shows in its file
//! ([`KernelImage::is_pvm_guest`](crate::loader::KernelImage::is_pvm_guest)); who builds the machine decides.

use std::fmt;

use cpu::Cpuid;
use pvm::AddressRanges;

/// The guest ABI of a machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuestAbi {
    /// x86 as the manuals have it.
    #[default]
    X86,
    /// PVM: from its 64-bit supervisor mode on, the kernel runs at privilege level 3 and knows it. Until then it finds
    /// plain x86, so that both boot protocols are as ever.
    Pvm,
}

impl GuestAbi {
    /// The generation of the PVM ABI that is offered, if one is.
    pub fn pvm(self) -> Option<&'static pvm::abi::Generation> {
        match self {
            Self::X86 => None,
            Self::Pvm => Some(&pvm::abi::GENERATION_1),
        }
    }

    /// What the vCPU with the number `cpu`, whose CPUID is `cpuid`, is told about PVM.
    pub(crate) fn vcpu_config(self, cpu: u16, cpuid: &Cpuid) -> Option<pvm::Config> {
        let generation = self.pvm()?;
        Some(pvm::Config { generation, ranges: AddressRanges::usual(cpuid.has("LA57")), cpu })
    }
}

impl fmt::Display for GuestAbi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pvm() {
            None => f.write_str("x86"),
            Some(generation) => write!(f, "pvm, generation {}", generation.name),
        }
    }
}
