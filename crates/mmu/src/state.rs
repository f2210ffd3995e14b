//! The part of a processor's state that decides how it translates addresses.

use bitflags::bitflags;

/// The bits of CR0 that paging looks at (SDM vol. 3, 2.5).
pub mod cr0 {
    /// Supervisor-mode writes honour read-only pages.
    pub const WP: u64 = 1 << 16;
    /// Paging is on.
    pub const PG: u64 = 1 << 31;
}

/// The bits of CR4 that paging looks at (SDM vol. 3, 2.5).
pub mod cr4 {
    /// 4 MiB pages in 32-bit paging.
    pub const PSE: u64 = 1 << 4;
    /// 64-bit entries.
    pub const PAE: u64 = 1 << 5;
    /// Global pages.
    pub const PGE: u64 = 1 << 7;
    /// 57-bit linear addresses: 5-level paging.
    pub const LA57: u64 = 1 << 12;
    /// No supervisor-mode fetches from user-mode pages.
    pub const SMEP: u64 = 1 << 20;
    /// No supervisor-mode data accesses to user-mode pages unless EFLAGS.AC allows them.
    pub const SMAP: u64 = 1 << 21;
    /// Protection keys for user-mode pages.
    pub const PKE: u64 = 1 << 22;
    /// Protection keys for supervisor-mode pages.
    pub const PKS: u64 = 1 << 24;
}

/// The bits of IA32_EFER that paging looks at (SDM vol. 3, 2.2.1).
pub mod efer {
    /// Long mode is active.
    pub const LMA: u64 = 1 << 10;
    /// Bit 63 of an entry forbids instruction fetches.
    pub const NXE: u64 = 1 << 11;
}

bitflags! {
    /// What CPUID says about page formats.
    ///
    /// Only what no control register decides is here: a feature with a bit in CR4 or EFER is in use when
    /// that bit is set, and refusing to set the bit where CPUID lacks the feature is up to the processor.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct PagingFeatures: u32 {
        /// 1 GiB pages: CPUID.80000001H:EDX.Page1GB\[26\].
        const GIB_PAGES = 1 << 0;
        /// 4 MiB pages above 4 GiB in 32-bit paging: CPUID.01H:EDX.PSE-36\[17\].
        const PSE36 = 1 << 1;
    }
}

/// The registers and CPUID facts that decide how linear addresses are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct PagingState {
    /// CR0; see [`cr0`].
    pub cr0: u64,
    /// CR3. The PCID and the cache bits are not looked at.
    pub cr3: u64,
    /// CR4; see [`cr4`].
    pub cr4: u64,
    /// IA32_EFER; see [`efer`].
    pub efer: u64,
    /// PKRU: two bits for each key of user-mode pages, access disable and write disable.
    pub pkru: u32,
    /// IA32_PKRS: the same for supervisor-mode pages.
    pub pkrs: u32,
    /// The width of physical addresses in bits, CPUID.80000008H:EAX\[7:0\]. Taken as 32 below and as 52 above.
    pub maxphyaddr: u8,
    /// The page-directory-pointer entries of PAE paging, which the processor keeps in registers from one
    /// MOV to CR3 to the next; see [`load_pdptrs`](crate::load_pdptrs). Other modes ignore them.
    pub pdptrs: [u64; 4],
    /// What CPUID says.
    pub features: PagingFeatures,
}

impl PagingState {
    /// Whether the bits `mask` of CR0 are set.
    #[inline(always)]
    pub(crate) const fn cr0(&self, mask: u64) -> bool {
        self.cr0 & mask == mask
    }

    /// Whether the bits `mask` of CR4 are set.
    #[inline(always)]
    pub(crate) const fn cr4(&self, mask: u64) -> bool {
        self.cr4 & mask == mask
    }

    /// Whether the bits `mask` of EFER are set.
    #[inline(always)]
    pub(crate) const fn efer(&self, mask: u64) -> bool {
        self.efer & mask == mask
    }
}
