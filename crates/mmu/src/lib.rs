//! x86 page tables as data: formats, walks, permissions, accessed and dirty bits.
//!
//! This crate translates guest addresses. It knows no processor and does no I/O: it takes the registers that
//! decide about paging as a value, reads entries through a trait, and returns a translation or the exact fault.
//!
//! # Theory of operation
//!
//! Three things are kept apart that are easily tangled:
//!
//! - **What entries look like**: [`PageFormat`], a value worked out from the control registers: levels, reserved
//!   bits, NX, huge pages, protection keys, where accessed and dirty are. Whoever builds tables uses the same
//!   value as whoever walks them.
//! - **What is allowed**: permission bitmaps, into which CR0.WP, SMEP, SMAP and NX are folded once. Deciding about
//!   an access is then a load and a shift.
//! - **Walking**: [`PageWalk`], a root with a format and bitmaps. Walking never builds anything; the only thing
//!   it writes is accessed and dirty bits, by compare-exchange.
//!
//! ```text
//!  PagingState ──► PageWalk { root, PageFormat, Permissions }
//!                     │
//!      Gva, Access ──►├─ translate / probe ──► Translation ──► TLB
//!                     │        │        └────► WalkFault (#PF error code)
//!                     │   PageTableMemory
//!                     └─ permits(Translation, Access)   no memory, bitmaps only
//!
//!  NestedWalk { guest: PageWalk, host: PageWalk }   every guest entry through the host's walk
//! ```
//!
//! A user keeps a `PageWalk` beside the processor's state and makes a new one when CR0, CR4, EFER or CPUID
//! change; CR3, the page-directory-pointer registers and PKRU have cheap setters.
//!
//! # What is where
//! - [`addr`](Gva): address kinds. `access`: [`Access`]. `state`: [`PagingState`].
//! - `format`, `entry`: [`PageFormat`], reading and making entries.
//! - `permission`: [`PageRights`] and the bitmaps.
//! - `walk`: [`PageWalk`]; `pdptr`: PAE's four registers; `fault`: [`WalkFault`].
//! - `ept`, `nested`: [`NestedWalk`], EPT violations and nested page faults.
//! - `memory`: [`PageTableMemory`], the only thing to implement.
//! - `testing`, behind the feature of that name: memory and random tables for tests and fuzz targets.
//!
//! # Limits
//! Not modelled: shadow-stack accesses, linear-address masking (the caller strips the bits), HLAT, and what EPT
//! and NPT have beyond the tables themselves (sub-page permissions, #VE, supervisor shadow-stack control, guest
//! mode execute trap, nested tables in a legacy format). The PAT bit is taken to be supported.
#![forbid(unsafe_code)]

mod access;
mod addr;
mod entry;
mod ept;
mod fault;
mod format;
mod memory;
mod nested;
mod pdptr;
mod permission;
mod state;
#[cfg(feature = "testing")]
pub mod testing;
mod walk;

pub use access::{Access, AccessKind, Privilege};
pub use addr::{Gpa, Gva};
pub use entry::EntryFlags;
pub use ept::{EptFeatures, InvalidEptPointer};
pub use fault::WalkFault;
pub use format::{PageFormat, PageSize, PagingMode};
pub use memory::PageTableMemory;
pub use nested::{
    HostFault, HostFaultKind, HostStage, NestedFault, NestedPdptrFault, NestedTranslation, NestedWalk,
};
pub use pdptr::{ReservedBits, check_pdptrs, load_pdptrs};
pub use permission::PageRights;
pub use state::{PagingFeatures, PagingState, cr0, cr4, efer};
pub use walk::{PageWalk, Translation, is_canonical};
