//! What CPUID answers.
//!
//! # Theory of operation
//! A [`Cpuid`] is a table of leaves. [`Cpuid::host_supported`] builds it: the features that ring3 implements itself,
//! and of those that it executes on the host CPU the ones that the host has. The machine adds its own leaves
//! (hypervisor signature, clocks) and the vCPU's place in the topology. What depends on the vCPU's present state
//! (OSXSAVE, OSPKE, sizes of XSAVE areas) is filled in when a leaf is asked for.
//!
//! The numbers are those of Intel SDM vol. 2, CPUID.

use crate::fpu::layout;
use crate::state::{CpuState, cr4};

/// What CPUID returns for a leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say all")]
pub struct CpuidLeaf {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// One of the four registers that CPUID returns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say all")]
pub enum CpuidRegister {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl From<[u32; 4]> for CpuidLeaf {
    /// From EAX, EBX, ECX, EDX.
    fn from([eax, ebx, ecx, edx]: [u32; 4]) -> Self {
        Self { eax, ebx, ecx, edx }
    }
}

impl CpuidLeaf {
    fn register(&mut self, register: CpuidRegister) -> &mut u32 {
        match register {
            CpuidRegister::Eax => &mut self.eax,
            CpuidRegister::Ebx => &mut self.ebx,
            CpuidRegister::Ecx => &mut self.ecx,
            CpuidRegister::Edx => &mut self.edx,
        }
    }
}

/// A feature bit of CPUID.
#[derive(Clone, Copy, Debug)]
pub struct Feature {
    /// The name, as Intel's manual has it.
    pub name: &'static str,
    leaf: u32,
    subleaf: u32,
    register: CpuidRegister,
    bit: u32,
    /// Whether the host CPU must have it, as it executes the instructions; and whether it does.
    host: Option<fn() -> bool>,
}

macro_rules! features {
    ($(($leaf:literal, $subleaf:literal) $register:ident: $($bit:literal $name:literal $(= $host:tt)?),+;)+) => {
        /// Every feature that can be offered.
        pub const FEATURES: &[Feature] = &[$($(Feature {
            name: $name,
            leaf: $leaf,
            subleaf: $subleaf,
            register: CpuidRegister::$register,
            bit: $bit,
            host: features!(@host $($host)?),
        }),+),+];
    };
    (@host) => { None };
    (@host $host:tt) => { Some(|| std::arch::is_x86_feature_detected!($host)) };
}

// Bit and name; behind the equals sign, the host's feature that must be there.
features! {
    (0x1, 0) Ecx:
        0 "SSE3" = "sse3", 1 "PCLMULQDQ" = "pclmulqdq", 9 "SSSE3" = "ssse3", 12 "FMA" = "fma", 13 "CMPXCHG16B",
        17 "PCID", 19 "SSE4.1" = "sse4.1", 20 "SSE4.2" = "sse4.2", 21 "x2APIC", 22 "MOVBE", 23 "POPCNT",
        24 "TSC-Deadline", 25 "AES" = "aes", 26 "XSAVE", 28 "AVX" = "avx", 29 "F16C" = "f16c", 30 "RDRAND",
        31 "Hypervisor";
    (0x1, 0) Edx:
        0 "FPU", 2 "DE", 3 "PSE", 4 "TSC", 5 "MSR", 6 "PAE", 7 "MCE", 8 "CX8", 9 "APIC", 11 "SEP", 12 "MTRR",
        13 "PGE", 14 "MCA", 15 "CMOV", 16 "PAT", 17 "PSE-36", 19 "CLFSH", 23 "MMX", 24 "FXSR", 25 "SSE",
        26 "SSE2", 27 "SS";
    (0x6, 0) Eax: 2 "ARAT";
    (0x7, 0) Ebx:
        0 "FSGSBASE", 1 "TSC_ADJUST", 3 "BMI1", 5 "AVX2" = "avx2", 7 "SMEP", 8 "BMI2", 9 "ERMS", 10 "INVPCID",
        18 "RDSEED", 19 "ADX", 20 "SMAP", 23 "CLFLUSHOPT", 24 "CLWB", 29 "SHA" = "sha";
    (0x7, 0) Ecx:
        2 "UMIP", 3 "PKU", 8 "GFNI" = "gfni", 9 "VAES" = "vaes", 10 "VPCLMULQDQ" = "vpclmulqdq", 16 "LA57",
        22 "RDPID", 27 "MOVDIRI", 31 "PKS";
    (0x7, 0) Edx: 4 "FSRM", 14 "SERIALIZE", 26 "IBRS_IBPB", 29 "ARCH_CAPABILITIES";
    (0x7, 1) Eax: 4 "AVX-VNNI" = "avxvnni", 10 "FZRM", 11 "FSRS";
    (0x7, 2) Edx: 4 "BHI_CTRL";
    (0xd, 1) Eax: 0 "XSAVEOPT", 1 "XSAVEC", 2 "XGETBV1";
    (0x8000_0001, 0) Ecx: 0 "LAHF", 5 "LZCNT", 8 "PREFETCHW";
    (0x8000_0001, 0) Edx: 11 "SYSCALL", 20 "NX", 26 "PDPE1GB", 27 "RDTSCP", 29 "LM";
    (0x8000_0007, 0) Edx: 8 "Invariant TSC";
    (0x8000_0008, 0) Ebx: 9 "WBNOINVD";
}

/// An XSAVE state component beyond x87 and SSE.
struct Component {
    number: u32,
    /// The feature that it comes and goes with: operating systems take one to imply the other.
    feature: &'static str,
    size: usize,
    /// Where it lies in the standard format.
    offset: usize,
}

const COMPONENTS: [Component; 2] = [
    Component { number: 2, feature: "AVX", size: layout::AVX_SIZE, offset: layout::AVX },
    Component { number: 9, feature: "PKU", size: layout::PKRU_SIZE, offset: layout::PKRU },
];

/// Family 6, model 0x8f, stepping 8: a server processor that is at home on x86-64-v3 and newer.
const SIGNATURE: u32 = 0x0008_06f8;
const VENDOR: [&[u8; 4]; 3] = [b"Genu", b"ineI", b"ntel"];
const BRAND: &[u8; 48] = b"ring3 virtual CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// The leaves whose answer depends on ECX.
const INDEXED: [u32; 4] = [0x4, 0x7, 0xb, 0xd];

#[derive(Clone, Copy, Debug)]
struct Entry {
    leaf: u32,
    subleaf: u32,
    value: CpuidLeaf,
}

/// The CPUID table of a vCPU.
#[derive(Clone, Debug)]
pub struct Cpuid {
    /// Sorted by leaf and subleaf.
    entries: Vec<Entry>,
    apic_id: u32,
    maxphyaddr: u8,
    cr4_bits: u64,
}

impl Default for Cpuid {
    fn default() -> Self {
        Self::host_supported()
    }
}

impl Cpuid {
    /// The table of vCPU `index` of `cpus`, with physical addresses of `maxphyaddr` bits and a TSC of `tsc_khz`:
    /// [`Self::host_supported`] with what these decide. The APIC identifier is `index`.
    pub fn new(index: u32, cpus: u32, maxphyaddr: u8, tsc_khz: u32) -> Self {
        let mut cpuid = Self { maxphyaddr: maxphyaddr.clamp(36, 52), ..Self::host_supported() };
        cpuid.set_topology(index, cpus);
        cpuid.set_widths();
        // Base, maximum and bus frequency in MHz. No leaf 0x15: it would also fix the APIC timer's clock.
        let mhz = (tsc_khz + 500) / 1000;
        cpuid.set_leaf(0x16, 0, [mhz & 0xffff, mhz & 0xffff, 100, 0]);
        cpuid
    }

    /// Everything that ring3 implements and, for what it executes on the host CPU, the host has.
    pub fn host_supported() -> Self {
        let mut cpuid = Self { entries: Vec::new(), apic_id: 0, maxphyaddr: 46, cr4_bits: 0 };
        let leaf = |eax, ebx, ecx, edx| CpuidLeaf { eax, ebx, ecx, edx };
        let [ebx, edx, ecx] = VENDOR.map(|part| u32::from_le_bytes(*part));
        // The highest leaves are filled in when asked for.
        cpuid.set_leaf(0x0, 0, leaf(0, ebx, ecx, edx));
        // EBX: cache lines of 64 bytes for CLFLUSH.
        cpuid.set_leaf(0x1, 0, leaf(SIGNATURE, 8 << 8, 0, 0));
        // Cache descriptors: see leaf 4 (0xff); no TLB descriptors.
        cpuid.set_leaf(0x2, 0, leaf(0x00ff_0001, 0, 0, 0));
        // Type, level, ways, sets; lines of 64 bytes.
        for (subleaf, kind, level, ways, sets) in
            [(0, 1, 1, 12, 64), (1, 2, 1, 8, 64), (2, 3, 2, 16, 2048), (3, 3, 3, 16, 16384)]
        {
            let eax = kind | level << 5 | 1 << 8;
            cpuid.set_leaf(0x4, subleaf, leaf(eax, (ways - 1) << 22 | 63, sets - 1, 0));
        }
        cpuid.set_leaf(0x5, 0, leaf(0, 0, 0, 0));
        cpuid.set_leaf(0x6, 0, leaf(0, 0, 0, 0));
        // EAX: the highest subleaf.
        cpuid.set_leaf(0x7, 0, leaf(2, 0, 0, 0));
        cpuid.set_leaf(0x7, 1, leaf(0, 0, 0, 0));
        // No performance counters.
        cpuid.set_leaf(0xa, 0, leaf(0, 0, 0, 0));
        cpuid.set_leaf(0xd, 1, leaf(0, 0, 0, 0));
        cpuid.set_leaf(0x8000_0000, 0, leaf(0, 0, 0, 0));
        cpuid.set_leaf(0x8000_0001, 0, leaf(0, 0, 0, 0));
        for (n, part) in (0..).zip(BRAND.chunks_exact(16)) {
            let word = |at: usize| {
                part.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
            };
            cpuid.set_leaf(0x8000_0002 + n, 0, leaf(word(0), word(4), word(8), word(12)));
        }
        cpuid.set_leaf(0x8000_0005, 0, leaf(0, 0, 0, 0));
        // L2: 2 MiB, 16 ways, lines of 64 bytes.
        cpuid.set_leaf(0x8000_0006, 0, leaf(0, 0, 2048 << 16 | 8 << 12 | 64, 0));
        cpuid.set_leaf(0x8000_0007, 0, leaf(0, 0, 0, 0));
        cpuid.set_leaf(0x8000_0008, 0, leaf(0, 0, 0, 0));

        for feature in FEATURES {
            cpuid.set_feature(feature, feature.host.is_none_or(|detected| detected()));
        }
        cpuid.set_components();
        cpuid.set_topology(0, 1);
        cpuid.set_widths();
        cpuid
    }

    /// Sets what CPUID answers for `leaf` and, where the leaf has subleaves, `subleaf`.
    ///
    /// The highest basic and extended leaf follow from the leaves that there are; EAX of leaf 0x4000_0000 is the
    /// caller's.
    pub fn set_leaf(&mut self, leaf: u32, subleaf: u32, value: impl Into<CpuidLeaf>) {
        let value = value.into();
        match self.position(leaf, subleaf) {
            Ok(at) => self.entries[at].value = value,
            Err(at) => self.entries.insert(at, Entry { leaf, subleaf, value }),
        }
        self.cr4_bits = self.compute_cr4_bits();
    }

    /// The static part of what CPUID answers for `leaf` and `subleaf`, if the table has it.
    pub fn leaf(&self, leaf: u32, subleaf: u32) -> Option<CpuidLeaf> {
        self.position(leaf, subleaf).ok().map(|at| self.entries[at].value)
    }

    /// Places the vCPU: its APIC identifier, and the number of vCPUs, all of them cores of one package.
    pub fn set_topology(&mut self, apic_id: u32, count: u32) {
        self.apic_id = apic_id;
        let shift = count.max(1).next_power_of_two().trailing_zeros();
        let mut one = self.leaf(0x1, 0).unwrap_or_default();
        one.ebx = one.ebx & 0xffff | (count.min(255) << 16) | apic_id << 24;
        // HTT: the package may hold more than one logical processor.
        one.edx = one.edx & !(1 << 28) | ((count > 1) as u32) << 28;
        self.set_leaf(0x1, 0, one);
        for subleaf in 0..4 {
            let mut cache = self.leaf(0x4, subleaf).unwrap_or_default();
            let cores = (1u32 << shift).min(64) - 1;
            let sharing = if subleaf == 3 { (1u32 << shift).min(4096) - 1 } else { 0 };
            cache.eax = cache.eax & 0x3fff | sharing << 14 | cores << 26;
            self.set_leaf(0x4, subleaf, cache);
        }
        // One thread in each core; then the cores.
        self.set_leaf(0xb, 0, CpuidLeaf { eax: 0, ebx: 1, ecx: 1 << 8, edx: apic_id });
        self.set_leaf(0xb, 1, CpuidLeaf { eax: shift, ebx: count & 0xffff, ecx: 2 << 8 | 1, edx: apic_id });
    }

    /// Takes the feature named `name` (see [`FEATURES`]) away; says whether there is one of that name.
    pub fn disable(&mut self, name: &str) -> bool {
        match FEATURES.iter().find(|f| f.name == name) {
            Some(feature) => {
                self.set_feature(feature, false);
                self.set_components();
                self.set_widths();
                true
            }
            None => false,
        }
    }

    /// Makes the answers those of a PVM hypervisor: the vendor leaf, and no feature that would need to tell user
    /// from supervisor pages. EAX of leaf 0x4000_0000 stays the caller's, and must be at least 0x4000_0002.
    pub fn offer_pvm(&mut self) {
        for name in ["SMEP", "SMAP"] {
            self.disable(name);
        }
        self.set_leaf(pvm::abi::cpuid::VENDOR_FEATURES, 0, [0, pvm::abi::cpuid::PVM, 0, 0]);
    }

    /// Whether the feature named `name` (see [`FEATURES`]) is offered.
    pub fn has(&self, name: &str) -> bool {
        FEATURES.iter().find(|f| f.name == name).is_some_and(|f| {
            self.leaf(f.leaf, f.subleaf).is_some_and(|mut leaf| *leaf.register(f.register) >> f.bit & 1 != 0)
        })
    }

    /// The width of guest-physical addresses in bits.
    pub fn maxphyaddr(&self) -> u8 {
        self.maxphyaddr
    }

    /// The CR4 bits that may be set.
    pub(crate) fn cr4_bits(&self) -> u64 {
        self.cr4_bits
    }

    /// The XCR0 bits that may be set.
    pub(crate) fn xcr0_bits(&self) -> u64 {
        self.leaf(0xd, 0).map_or(1, |leaf| u64::from(leaf.edx) << 32 | u64::from(leaf.eax))
    }

    /// What CPUID answers a vCPU in the state `state`.
    pub fn query(&self, leaf: u32, subleaf: u32, state: &CpuState) -> CpuidLeaf {
        let (mut leaf, mut subleaf) = (leaf, subleaf);
        let known = |leaf| self.entries.iter().any(|e| e.leaf == leaf);
        let highest = |range: std::ops::RangeInclusive<u32>| {
            self.entries.iter().map(|e| e.leaf).filter(|l| range.contains(l)).max().unwrap_or(0)
        };
        let highest_basic = highest(0..=0x3fff_ffff);
        let highest_extended = highest(0x8000_0000..=0x8fff_ffff);
        let in_range = match leaf {
            0..=0x3fff_ffff => leaf <= highest_basic,
            0x4000_0000..=0x4fff_ffff => known(0x4000_0000),
            0x8000_0000..=0x8fff_ffff => leaf <= highest_extended,
            _ => false,
        };
        if !in_range {
            // Intel: out of range means the highest basic leaf.
            leaf = highest_basic;
        }
        if !INDEXED.contains(&leaf) && self.leaf(leaf, subleaf).is_none() {
            subleaf = 0;
        }
        let mut value = self.leaf(leaf, subleaf).unwrap_or_default();
        match (leaf, subleaf) {
            (0x0, _) => value.eax = highest_basic,
            (0x8000_0000, _) => value.eax = highest_extended,
            (0x1, _) => {
                value.ecx = value.ecx & !(1 << 27) | ((state.cr4 & cr4::OSXSAVE != 0) as u32) << 27;
            }
            (0x7, 0) => value.ecx = value.ecx & !(1 << 4) | ((state.cr4 & cr4::PKE != 0) as u32) << 4,
            (0xb, 2..) => {
                value.ecx = subleaf & 0xff;
                value.edx = self.apic_id;
            }
            (0xd, 0) => {
                value.ebx = self.xsave_size(state.xcr0, false);
                value.ecx = self.xsave_size(self.xcr0_bits(), false);
            }
            (0xd, 1) => value.ebx = self.xsave_size(state.xcr0, true),
            _ => {}
        }
        value
    }

    /// The size in bytes of an XSAVE area with the components `components`.
    fn xsave_size(&self, components: u64, compacted: bool) -> u32 {
        // Legacy area and header.
        let mut size = 576u32;
        for n in (2..63).filter(|n| components >> n & 1 != 0) {
            let component = self.leaf(0xd, n).unwrap_or_default();
            if compacted {
                let aligned = if component.ecx & 2 != 0 { size.next_multiple_of(64) } else { size };
                size = aligned + component.eax;
            } else {
                size = size.max(component.ebx + component.eax);
            }
        }
        size
    }

    fn position(&self, leaf: u32, subleaf: u32) -> Result<usize, usize> {
        self.entries.binary_search_by_key(&(leaf, subleaf), |e| (e.leaf, e.subleaf))
    }

    fn set_feature(&mut self, feature: &Feature, on: bool) {
        let mut leaf = self.leaf(feature.leaf, feature.subleaf).unwrap_or_default();
        let register = leaf.register(feature.register);
        *register = *register & !(1 << feature.bit) | u32::from(on) << feature.bit;
        self.set_leaf(feature.leaf, feature.subleaf, leaf);
    }

    /// Leaf 0xd: the state components of the features that there are. Sizes of areas are filled in when asked for.
    fn set_components(&mut self) {
        let mut components = 0b11;
        for Component { number, feature, size, offset } in COMPONENTS {
            let mut leaf = CpuidLeaf::default();
            if self.has(feature) {
                components |= 1 << number;
                leaf = [size as u32, offset as u32, 0, 0].into();
            }
            self.set_leaf(0xd, number, leaf);
        }
        self.set_leaf(0xd, 0, [components, 0, 0, 0]);
    }

    /// Leaf 0x8000_0008: physical and linear address widths.
    fn set_widths(&mut self) {
        let linear = if self.has("LA57") { 57 } else { 48 };
        let mut leaf = self.leaf(0x8000_0008, 0).unwrap_or_default();
        leaf.eax = linear << 8 | u32::from(self.maxphyaddr);
        self.set_leaf(0x8000_0008, 0, leaf);
    }

    fn compute_cr4_bits(&self) -> u64 {
        let always =
            cr4::TSD | cr4::PCE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE;
        let optional = [
            ("PGE", cr4::PGE),
            ("UMIP", cr4::UMIP),
            ("LA57", cr4::LA57),
            ("FSGSBASE", cr4::FSGSBASE),
            ("PCID", cr4::PCIDE),
            ("XSAVE", cr4::OSXSAVE),
            ("SMEP", cr4::SMEP),
            ("SMAP", cr4::SMAP),
            ("PKU", cr4::PKE),
            ("PKS", cr4::PKS),
        ];
        optional.iter().filter(|(name, _)| self.has(name)).fold(always, |bits, (_, bit)| bits | bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_feature_has_its_own_bit() {
        for (n, a) in FEATURES.iter().enumerate() {
            for b in &FEATURES[n + 1..] {
                assert_ne!(a.name, b.name);
                let place = |f: &Feature| (f.leaf, f.subleaf, f.register as u8, f.bit);
                assert_ne!(place(a), place(b), "{} and {}", a.name, b.name);
            }
        }
    }

    #[test]
    fn disabling_takes_the_bit_and_its_cr4_bit() {
        let mut cpuid = Cpuid::host_supported();
        assert!(cpuid.has("SMAP") && cpuid.cr4_bits() & cr4::SMAP != 0);
        assert!(cpuid.disable("SMAP"));
        assert!(!cpuid.has("SMAP") && cpuid.cr4_bits() & cr4::SMAP == 0);
        assert!(!cpuid.disable("no such feature"));
    }

    #[test]
    fn a_state_component_comes_and_goes_with_its_feature() {
        let mut cpuid = Cpuid::host_supported();
        let state = CpuState { xcr0: 1 << 9 | 3, ..CpuState::default() };
        assert_eq!(cpuid.query(0xd, 9, &state), [8, 832, 0, 0].into());
        assert_ne!(cpuid.xcr0_bits() & 1 << 9, 0);
        // The standard format has its place fixed, the compacted one packs.
        assert_eq!((cpuid.query(0xd, 0, &state).ebx, cpuid.query(0xd, 1, &state).ebx), (840, 584));
        assert!(cpuid.disable("PKU"));
        assert_eq!(cpuid.query(0xd, 9, &state), CpuidLeaf::default());
        assert_eq!((cpuid.xcr0_bits() & 1 << 9, cpuid.cr4_bits() & cr4::PKE), (0, 0));
        assert!(cpuid.has("PKS") && cpuid.disable("PKS"));
        assert_eq!(cpuid.cr4_bits() & cr4::PKS, 0);
    }

    #[test]
    fn leaves_out_of_range_are_the_highest_basic_leaf() {
        let (cpuid, state) = (Cpuid::host_supported(), CpuState::default());
        let highest = cpuid.query(0, 0, &state).eax;
        assert_eq!(cpuid.query(0x3fff_0000, 0, &state), cpuid.query(highest, 0, &state));
        assert_eq!(cpuid.query(0x8fff_0000, 0, &state), cpuid.query(highest, 0, &state));
    }

    #[test]
    fn state_shows_in_the_dynamic_leaves() {
        let cpuid = Cpuid::host_supported();
        let mut state = CpuState::default();
        assert_eq!(cpuid.query(1, 0, &state).ecx >> 27 & 1, 0);
        assert_eq!(cpuid.query(0xd, 0, &state).ebx, 576);
        state.cr4 |= cr4::OSXSAVE;
        state.xcr0 = cpuid.xcr0_bits();
        assert_eq!(cpuid.query(1, 0, &state).ecx >> 27 & 1, 1);
        let all = cpuid.query(0xd, 0, &state);
        assert_eq!(all.ebx, all.ecx);
        assert_eq!(cpuid.query(0xb, 1, &state).ebx, 1);
        assert_eq!(cpuid.query(0xb, 7, &state), CpuidLeaf { ecx: 7, ..CpuidLeaf::default() });
    }
}
