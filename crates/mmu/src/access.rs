//! What an access is: its kind, with whose privilege, and whether EFLAGS.AC lifts SMAP.

/// What is done with the bytes at the address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum AccessKind {
    /// A data read.
    Read = 0,
    /// A data write, or a read-modify-write.
    Write = 1,
    /// An instruction fetch.
    Fetch = 2,
}

/// With whose privilege an access is made (SDM vol. 3, 4.6.1: explicit and implicit accesses).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Privilege {
    /// A user-mode access: CPL is 3.
    User,
    /// An explicit supervisor-mode access: an instruction's own operand, at a CPL below 3.
    Supervisor,
    /// A supervisor-mode access that the processor makes by itself at any CPL, such as to a descriptor
    /// table or a TSS. SMAP applies to it whatever EFLAGS.AC is.
    Implicit,
}

/// An access to a linear address, as far as paging looks at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Access {
    /// What is done with the bytes.
    pub kind: AccessKind,
    /// With whose privilege.
    pub privilege: Privilege,
    /// EFLAGS.AC at the time. Only explicit supervisor-mode data accesses look at it.
    pub ac: bool,
}

impl Access {
    /// How many different values [`Access::index`] has.
    pub(crate) const INDEXES: usize = 16;

    /// An access with EFLAGS.AC clear.
    #[inline(always)]
    pub const fn new(kind: AccessKind, privilege: Privilege) -> Self {
        Self { kind, privilege, ac: false }
    }

    /// Whether it is a write.
    #[inline(always)]
    pub const fn is_write(self) -> bool {
        matches!(self.kind, AccessKind::Write)
    }

    /// Whether it is an instruction fetch.
    #[inline(always)]
    pub const fn is_fetch(self) -> bool {
        matches!(self.kind, AccessKind::Fetch)
    }

    /// Whether it is a user-mode access.
    #[inline(always)]
    pub const fn is_user(self) -> bool {
        matches!(self.privilege, Privilege::User)
    }

    /// The row of a permission bitmap: bits 1:0 the kind, bit 2 user mode, bit 3 AC where it counts.
    #[inline(always)]
    pub(crate) const fn index(self) -> usize {
        let user = matches!(self.privilege, Privilege::User) as usize;
        let lifted = (self.ac & matches!(self.privilege, Privilege::Supervisor)) as usize;
        self.kind as usize | user << 2 | lifted << 3
    }
}
