//! Which table translates a device: the root table, and a context table for each bus (VT-d 9.1 and 9.3, legacy mode).

use std::sync::atomic::Ordering;

use cpu::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::faults::Reason;
use crate::layout;

/// Both tables have 256 entries of 16 bytes.
const ENTRY: u64 = 16;
/// Of the lower half of an entry.
const PRESENT: u64 = 1;
/// Of a context entry: faults are not to be recorded.
const QUIET: u64 = 1 << 1;
/// The address in the lower half of either.
const ADDRESS: u64 = ((1 << layout::PHYS_BITS) - 1) & !0xfff;
/// What of the root table's register says which kind of table it is: 0, the only one here.
const ROOT_MODE: u64 = 3 << 10;

/// What a device's requests are translated by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// Nothing: they are guest-physical addresses.
    Memory,
    /// A table in guest memory.
    Table(Table),
}

/// A table in guest memory, of the format of second-level tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Table {
    /// The domain, by which the guest invalidates.
    pub domain: u16,
    /// The guest-physical address of the top level.
    pub root: u64,
    /// 3 or 4.
    pub levels: u8,
}

/// A context entry that makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Context {
    pub(super) domain: u16,
    pub(super) target: Target,
    /// Faults of the device are not recorded.
    pub(super) quiet: bool,
}

/// Why a device's requests are not translated at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoContext {
    pub(super) reason: Reason,
    /// It is not recorded.
    pub(super) quiet: bool,
}

/// The context entry of a device, by the root table's register.
pub(super) fn find(memory: &GuestRam, register: u64, source: u16) -> Result<Context, NoContext> {
    let fault = |reason| NoContext { reason, quiet: false };
    if register & (ROOT_MODE | !0xfff & !ADDRESS) != 0 {
        return Err(fault(Reason::RootAccess));
    }
    let (bus, function) = (u64::from(source >> 8), u64::from(source & 0xff));
    let (root, upper) = entry(memory, register & ADDRESS, bus).ok_or_else(|| fault(Reason::RootAccess))?;
    if root & PRESENT == 0 {
        return Err(fault(Reason::RootNotPresent));
    }
    if upper != 0 || root & !(ADDRESS | PRESENT) != 0 {
        return Err(fault(Reason::RootReserved));
    }
    let (low, high) = entry(memory, root & ADDRESS, function).ok_or_else(|| fault(Reason::ContextAccess))?;
    let quiet = low & QUIET != 0;
    let fault = |reason| NoContext { reason, quiet };
    if low & PRESENT == 0 {
        return Err(fault(Reason::ContextNotPresent));
    }
    // Bits 3 to 6 of the upper half are software's.
    if low & !(ADDRESS | 0xf) != 0 || high & !0xff_ff7f != 0 {
        return Err(fault(Reason::ContextReserved));
    }
    let levels = match high & 7 {
        1 => 3,
        2 => 4,
        _ => return Err(fault(Reason::ContextInvalid)),
    };
    let domain = (high >> 8) as u16;
    let target = match low >> 2 & 3 {
        0 => Target::Table(Table { domain, root: low & ADDRESS, levels }),
        2 => Target::Memory,
        // With a device TLB, which there is not, and one that is reserved.
        _ => return Err(fault(Reason::ContextInvalid)),
    };
    Ok(Context { domain, target, quiet })
}

/// An entry of a table. The half with the present bit is read first, and written last by a guest.
fn entry(memory: &GuestRam, table: u64, index: u64) -> Option<(u64, u64)> {
    let at = GuestAddress(table + index * ENTRY);
    let low = memory.load(at, Ordering::Acquire).ok()?;
    let high = memory.load(GuestAddress(at.0 + 8), Ordering::Acquire).ok()?;
    Some((low, high))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: u64 = 0x1000;
    const CONTEXTS: u64 = 0x2000;
    const SOURCE: u16 = 0x0118;
    const SIZE: u64 = 0x8000;

    fn memory(root: (u64, u64), context: (u64, u64)) -> GuestRam {
        let memory = GuestRam::from_ranges(&[(GuestAddress(0), SIZE as usize)]).unwrap();
        memory.write_obj([root.0, root.1], GuestAddress(ROOT + 0x10)).unwrap();
        memory.write_obj([context.0, context.1], GuestAddress(CONTEXTS + 0x180)).unwrap();
        memory
    }

    fn reason(root: (u64, u64), context: (u64, u64)) -> Reason {
        find(&memory(root, context), ROOT, SOURCE).unwrap_err().reason
    }

    #[test]
    fn entries_say_what_translates() {
        let table = Table { domain: 0x1234, root: 0x5000, levels: 4 };
        let found = find(&memory((CONTEXTS | 1, 0), (0x5001, 0x12_347a)), ROOT, SOURCE);
        let context = Context { domain: 0x1234, target: Target::Table(table), quiet: false };
        assert_eq!(found, Ok(context));
        let found = find(&memory((CONTEXTS | 1, 0), (0b1011, 0x100 | 1)), ROOT, SOURCE);
        assert_eq!(found, Ok(Context { domain: 1, target: Target::Memory, quiet: true }));
    }

    #[test]
    fn each_kind_of_nonsense_has_its_reason() {
        let good = (CONTEXTS | 1, 0);
        assert_eq!(reason((CONTEXTS, 0), (0, 0)), Reason::RootNotPresent);
        assert_eq!(reason((CONTEXTS | 3, 0), (0, 0)), Reason::RootReserved);
        assert_eq!(reason((CONTEXTS | 1, 1), (0, 0)), Reason::RootReserved);
        assert_eq!(reason((1 << 40 | 1, 0), (0, 0)), Reason::RootReserved);
        assert_eq!(reason((SIZE | 1, 0), (0, 0)), Reason::ContextAccess);
        assert_eq!(reason(good, (0, 2)), Reason::ContextNotPresent);
        assert_eq!(reason(good, (0x5011, 2)), Reason::ContextReserved);
        assert_eq!(reason(good, (1 << 40 | 1, 2)), Reason::ContextReserved);
        assert_eq!(reason(good, (0x5001, 0x82)), Reason::ContextReserved);
        assert_eq!(reason(good, (0x5001, 1 << 24 | 2)), Reason::ContextReserved);
        for width in [0, 3, 4, 7] {
            assert_eq!(reason(good, (0x5001, width)), Reason::ContextInvalid);
        }
        for kind in [1, 3] {
            assert_eq!(reason(good, (0x5001 | kind << 2, 2)), Reason::ContextInvalid);
        }
        let memory = memory(good, (0x5001, 2));
        for register in [SIZE, 0xff_ffff_f000, u64::MAX, ROOT | 1 << 10, ROOT | 1 << 11, ROOT | 1 << 63] {
            assert_eq!(find(&memory, register, SOURCE).unwrap_err().reason, Reason::RootAccess);
        }
        assert!(find(&memory, ROOT, SOURCE).is_ok());
        assert!(find(&memory, ROOT, 0x18).is_err() && find(&memory, ROOT, 0x119).is_err());
        // Who says that faults are not to be recorded is heard even when the entry is not present.
        let quiet = find(&self::memory(good, (2, 0)), ROOT, SOURCE).unwrap_err();
        assert_eq!(quiet, NoContext { reason: Reason::ContextNotPresent, quiet: true });
    }
}
