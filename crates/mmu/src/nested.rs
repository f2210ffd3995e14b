//! Nested walks: a guest's page tables whose addresses are themselves translated by EPT or NPT.
//!
//! # Theory of operation
//!
//! Two [`PageWalk`]s, one inside the other. The guest's walk goes down as always, but every entry that it reads
//! or updates, and in the end the page's own address, first goes through the host's walk. A failure of the
//! guest's walk is a page fault in the guest; a failure of the host's is a [`HostFault`], an exit to the
//! hypervisor that made the host's tables. The host's walk of the page comes after the guest's permissions were
//! found good and before the guest's accessed and dirty bits are set in the page's entry, so that an exit leaves
//! those as they were.
//!
//! As which access an entry of the guest's tables counts for the host's:
//!
//! | host's tables             | reading an entry            | setting accessed or dirty |
//! |---------------------------|-----------------------------|---------------------------|
//! | EPT                       | data read                   | data write                |
//! | EPT, accessed/dirty on    | data read and write at once | the same                  |
//! | NPT                       | user-mode write             | the same                  |
//!
//! (SDM vol. 3, "Accessed and Dirty Flags for EPT"; APM vol. 2, 15.25.5.) The last two set the host's dirty bit
//! when an entry is merely read, as the processors do.
//!
//! With mode-based execution control, a fetch needs the permission for user-mode or for supervisor-mode linear
//! addresses by what the guest's tables say of the page, not by the privilege of the access; without paging in
//! the guest all addresses are user-mode ones.

use crate::fault::{Cause, Refusal};
use crate::format::bits;
use crate::permission::PageRights;
use crate::walk::{Direct, Stop, Tables, read_entry, update_entry};
use crate::{
    Access, AccessKind, Gpa, Gva, PageSize, PageTableMemory, PageWalk, PagingMode, Privilege, ReservedBits,
    Translation, WalkFault, check_pdptrs,
};

/// What the host's walk was for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostStage {
    /// An entry of the guest's page tables, or its page-directory-pointer registers.
    TableWalk,
    /// The page that the guest's tables led to.
    FinalPage,
}

/// How the processor reports a failure of the host's walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum HostFaultKind {
    /// An EPT violation.
    EptViolation {
        /// The exit qualification (SDM vol. 3, table "Exit Qualification for EPT Violations"), bits 8:0. The
        /// bits for NMI unblocking and advanced information are left 0.
        qualification: u64,
    },
    /// An EPT misconfiguration. It has no exit qualification.
    EptMisconfiguration,
    /// A nested page fault.
    NestedPageFault {
        /// EXITINFO1 (APM vol. 2, 15.25.6): an error code as of #PF, and bit 32 for the final page or bit 33
        /// for the guest's tables.
        exit_info: u64,
    },
}

/// A failure of the host's walk: an exit to the hypervisor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no access to {gpa} in the host's tables ({stage:?}): {kind:?}")]
pub struct HostFault {
    /// The guest-physical address that was to be translated.
    pub gpa: Gpa,
    /// The linear address that the guest's walk was for. `None` if there was none.
    pub gva: Option<Gva>,
    /// What the host's walk was for.
    pub stage: HostStage,
    /// How it is reported.
    pub kind: HostFaultKind,
}

/// Why a nested walk failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NestedFault {
    /// The guest's own tables do not allow the access.
    #[error(transparent)]
    Guest(#[from] WalkFault),
    /// The host's tables do not.
    #[error(transparent)]
    Host(#[from] HostFault),
}

/// Why page-directory-pointer registers cannot be loaded in a nested guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NestedPdptrFault {
    /// #GP(0) in the guest.
    #[error(transparent)]
    Guest(#[from] ReservedBits),
    /// An exit to the hypervisor.
    #[error(transparent)]
    Host(#[from] HostFault),
}

/// What a nested walk found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedTranslation {
    /// The address of the byte behind both walks.
    pub gpa: Gpa,
    /// The smaller of the two pages' sizes: as far as the translation reaches.
    pub page_size: PageSize,
    /// The guest's half. Its `gpa` is the address that went into the host's walk.
    pub guest: Translation,
    /// The host's half.
    pub host: Translation,
}

impl NestedTranslation {
    /// Whether both pages' dirty bits are set: only then may a TLB let writes pass.
    #[inline]
    pub const fn dirty(&self) -> bool {
        self.guest.dirty && self.host.dirty
    }
}

/// A guest's walk inside a host's, which is of EPT or NPT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NestedWalk {
    /// From linear to guest-physical addresses.
    pub guest: PageWalk,
    /// From there on.
    pub host: PageWalk,
}

/// The guest's tables as seen through the host's walk.
struct Through<'a, M, const UPDATE: bool> {
    memory: &'a M,
    host: &'a PageWalk,
    gva: Option<Gva>,
}

/// The access that the host's walk checks for a guest's access to a page with `rights`.
#[inline(always)]
const fn host_access(access: Access, rights: PageRights) -> Access {
    let user = rights.contains(PageRights::USER);
    Access::new(access.kind, if user { Privilege::User } else { Privilege::Supervisor })
}

impl<M: PageTableMemory, const UPDATE: bool> Through<'_, M, UPDATE> {
    fn translate(&self, gpa: Gpa, access: Access, stage: HostStage) -> Result<Translation, HostFault> {
        match self.host.walk::<_, UPDATE>(&Direct(self.memory), gpa.0, access) {
            Ok((translation, ())) => Ok(translation),
            Err(Stop::Refused(refusal)) => Err(self.fault(gpa, access, stage, refusal)),
            Err(Stop::Unreachable(never)) => match never {},
        }
    }

    /// The host's address of an entry of the guest's tables.
    fn entry(&self, gpa: Gpa, update: bool) -> Result<Gpa, HostFault> {
        let kind = if update || self.entries_are_written() { AccessKind::Write } else { AccessKind::Read };
        let access = Access::new(kind, Privilege::User);
        Ok(self.translate(gpa, access, HostStage::TableWalk)?.gpa)
    }

    /// Whether even reading an entry of the guest's tables counts as a write.
    fn entries_are_written(&self) -> bool {
        self.host.format().mode() == PagingMode::Npt || self.host.format().accessed_bit() != 0
    }

    #[cold]
    fn fault(&self, gpa: Gpa, access: Access, stage: HostStage, refusal: Refusal) -> HostFault {
        let kind = if self.host.format().mode() == PagingMode::Ept {
            if refusal.cause == Cause::Reserved {
                HostFaultKind::EptMisconfiguration
            } else {
                HostFaultKind::EptViolation { qualification: self.qualification(access, stage, refusal) }
            }
        } else {
            let access = Access { privilege: Privilege::User, ..access };
            let error_code = self.host.page_fault(Gva(gpa.0), access, refusal).error_code;
            let place = if stage == HostStage::FinalPage { 1 << 32 } else { 1 << 33 };
            HostFaultKind::NestedPageFault { exit_info: u64::from(error_code) | place }
        };
        HostFault { gpa, gva: self.gva, stage, kind }
    }

    fn qualification(&self, access: Access, stage: HostStage, refusal: Refusal) -> u64 {
        let format = self.host.format();
        let done = match (access.kind, stage) {
            // The write that reading an entry counts as is reported together with the read.
            (AccessKind::Write, HostStage::TableWalk) if self.entries_are_written() => 0b011,
            (AccessKind::Read, _) => 0b001,
            (AccessKind::Write, _) => 0b010,
            (AccessKind::Fetch, _) => 0b100,
        };
        let user_execute = if format.mode_based_execute() { refusal.combined >> 10 & 1 } else { 0 };
        let linear = match (self.gva, stage) {
            (None, _) => 0,
            (Some(_), HostStage::TableWalk) => 1 << 7,
            (Some(_), HostStage::FinalPage) => 1 << 7 | 1 << 8,
        };
        done | (refusal.combined & 0b111) << 3 | user_execute << 6 | linear
    }
}

impl<M: PageTableMemory, const UPDATE: bool> Tables for Through<'_, M, UPDATE> {
    type Fault = HostFault;
    type Page = Translation;

    fn read<const WIDE: bool>(&self, at: Gpa) -> Result<u64, HostFault> {
        Ok(read_entry::<WIDE>(self.memory, self.entry(at, false)?))
    }

    fn update<const WIDE: bool>(&self, at: Gpa, old: u64, new: u64) -> Result<bool, HostFault> {
        Ok(update_entry::<WIDE>(self.memory, self.entry(at, true)?, old, new))
    }

    fn page(&self, gpa: Gpa, access: Access, rights: PageRights) -> Result<Translation, HostFault> {
        self.translate(gpa, host_access(access, rights), HostStage::FinalPage)
    }
}

impl NestedWalk {
    /// Translates `gva` for `access` through both walks, and sets accessed and dirty bits in both.
    ///
    /// # Errors
    /// The guest's page fault, or the exit to the hypervisor.
    pub fn translate(
        &self,
        memory: &impl PageTableMemory,
        gva: Gva,
        access: Access,
    ) -> Result<NestedTranslation, NestedFault> {
        self.run::<_, true>(memory, gva, access)
    }

    /// As [`NestedWalk::translate`], but leaves memory as it is.
    ///
    /// # Errors
    /// As for [`NestedWalk::translate`].
    pub fn probe(
        &self,
        memory: &impl PageTableMemory,
        gva: Gva,
        access: Access,
    ) -> Result<NestedTranslation, NestedFault> {
        self.run::<_, false>(memory, gva, access)
    }

    fn run<M: PageTableMemory, const UPDATE: bool>(
        &self,
        memory: &M,
        gva: Gva,
        access: Access,
    ) -> Result<NestedTranslation, NestedFault> {
        let tables = Through::<M, UPDATE> { memory, host: &self.host, gva: Some(gva) };
        match self.guest.walk::<_, UPDATE>(&tables, gva.0, access) {
            Ok((guest, host)) => Ok(NestedTranslation {
                gpa: host.gpa,
                page_size: guest.page_size.min(host.page_size),
                guest,
                host,
            }),
            Err(Stop::Refused(refusal)) => Err(self.guest.page_fault(gva, access, refusal).into()),
            Err(Stop::Unreachable(fault)) => Err(fault.into()),
        }
    }

    /// Translates a guest-physical address that no linear address led to, such as one that the hypervisor got
    /// from the guest. Only the kind of `access` counts, and for EPT whether it is a user-mode one.
    ///
    /// # Errors
    /// The exit to the hypervisor, with no linear address.
    pub fn translate_gpa(
        &self,
        memory: &impl PageTableMemory,
        gpa: Gpa,
        access: Access,
    ) -> Result<Translation, HostFault> {
        let tables = Through::<_, true> { memory, host: &self.host, gva: None };
        tables.translate(gpa, access, HostStage::FinalPage)
    }

    /// Whether an access to a page found earlier is allowed by both, from the bitmaps alone; see
    /// [`PageWalk::permits`].
    #[inline]
    pub const fn permits(&self, translation: &NestedTranslation, access: Access) -> bool {
        self.guest.permits(&translation.guest, access)
            && self.host.permits(&translation.host, host_access(access, translation.guest.rights))
    }

    /// Reads the guest's page-directory-pointer registers from where `cr3` says, through the host's walk; see
    /// [`load_pdptrs`](crate::load_pdptrs). For EPT these are data reads, whether or not it has accessed and
    /// dirty bits, and the linear address is not valid.
    ///
    /// # Errors
    /// #GP(0) in the guest for reserved bits, or the exit to the hypervisor.
    pub fn load_pdptrs(
        &self,
        memory: &impl PageTableMemory,
        cr3: u64,
        maxphyaddr: u8,
    ) -> Result<[u64; 4], NestedPdptrFault> {
        let tables = Through::<_, true> { memory, host: &self.host, gva: None };
        let npt = self.host.format().mode() == PagingMode::Npt;
        let kind = if npt { AccessKind::Write } else { AccessKind::Read };
        // The table is 32 bytes, aligned to as many, hence in one page.
        let table = Gpa(cr3 & bits(5, 31));
        let at = tables.translate(table, Access::new(kind, Privilege::User), HostStage::TableWalk)?.gpa;
        let mut pdptrs = [0; 4];
        for (offset, register) in (0..).step_by(8).zip(&mut pdptrs) {
            *register = read_entry::<true>(memory, at.wrapping_add(offset));
        }
        check_pdptrs(&pdptrs, maxphyaddr)?;
        Ok(pdptrs)
    }
}
