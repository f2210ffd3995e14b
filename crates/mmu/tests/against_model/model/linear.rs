//! Linear addresses: SDM volume 3, chapter 4, "Paging".

use mmu::{Access, AccessKind, PagingFeatures, PagingState, Privilege};

use super::{Memory, Page, Stop};

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const XD: u64 = 1 << 63;

struct Controls {
    wp: bool,
    pse: bool,
    pae: bool,
    pge: bool,
    la57: bool,
    smep: bool,
    smap: bool,
    pke: bool,
    pks: bool,
    nxe: bool,
    lma: bool,
    width: u32,
}

fn controls(state: &PagingState) -> Controls {
    Controls {
        wp: state.cr0 >> 16 & 1 == 1,
        pse: state.cr4 >> 4 & 1 == 1,
        pae: state.cr4 >> 5 & 1 == 1,
        pge: state.cr4 >> 7 & 1 == 1,
        la57: state.cr4 >> 12 & 1 == 1,
        smep: state.cr4 >> 20 & 1 == 1,
        smap: state.cr4 >> 21 & 1 == 1,
        pke: state.cr4 >> 22 & 1 == 1,
        pks: state.cr4 >> 24 & 1 == 1,
        nxe: state.efer >> 11 & 1 == 1,
        lma: state.efer >> 10 & 1 == 1,
        width: u32::from(state.maxphyaddr),
    }
}

/// What all entries so far say together.
#[derive(Clone, Copy)]
struct Sum {
    user: bool,
    writable: bool,
    no_execute: bool,
}

impl Sum {
    fn add(&mut self, entry: u64) {
        if entry & US == 0 {
            self.user = false;
        }
        if entry & RW == 0 {
            self.writable = false;
        }
        if entry & XD != 0 {
            self.no_execute = true;
        }
    }
}

/// The error-code bits that say what the access is (4.7).
fn what(c: &Controls, access: Access) -> u32 {
    let mut code = 0;
    if access.kind == AccessKind::Write {
        code |= 2;
    }
    if access.privilege == Privilege::User {
        code |= 4;
    }
    if access.kind == AccessKind::Fetch && (c.smep || (c.pae && c.nxe)) {
        code |= 16;
    }
    code
}

fn not_present(c: &Controls, access: Access) -> Stop {
    Stop::PageFault(what(c, access))
}

fn reserved(c: &Controls, access: Access) -> Stop {
    Stop::PageFault(what(c, access) | 1 | 8)
}

/// Access rights (4.6.1) and protection keys (4.6.2).
fn check(state: &PagingState, c: &Controls, access: Access, sum: Sum, key: u8) -> Result<(), Stop> {
    let mut fault = false;
    if access.privilege == Privilege::User {
        if !sum.user {
            fault = true;
        }
        if access.kind == AccessKind::Write && !sum.writable {
            fault = true;
        }
        if access.kind == AccessKind::Fetch && sum.no_execute {
            fault = true;
        }
    } else if access.kind == AccessKind::Fetch {
        if sum.no_execute {
            fault = true;
        }
        if sum.user && c.smep {
            fault = true;
        }
    } else {
        if sum.user && c.smap {
            let allowed = access.ac && access.privilege == Privilege::Supervisor;
            if !allowed {
                fault = true;
            }
        }
        if access.kind == AccessKind::Write && c.wp && !sum.writable {
            fault = true;
        }
    }

    let mut key_fault = false;
    if c.lma && access.kind != AccessKind::Fetch {
        let register = if sum.user && c.pke {
            state.pkru
        } else if !sum.user && c.pks {
            state.pkrs
        } else {
            0
        };
        let access_disable = register >> (key * 2) & 1 == 1;
        let write_disable = register >> (key * 2 + 1) & 1 == 1;
        if access_disable {
            key_fault = true;
        }
        if write_disable && access.kind == AccessKind::Write && (access.privilege == Privilege::User || c.wp)
        {
            key_fault = true;
        }
    }

    if key_fault {
        return Err(Stop::PageFault(what(c, access) | 1 | 32));
    }
    if fault {
        return Err(Stop::PageFault(what(c, access) | 1));
    }
    Ok(())
}

/// An entry that maps a page: rights, then the page, then A and D.
struct Leaf {
    at: u64,
    bytes: u64,
    entry: u64,
    gpa: u64,
    size: u64,
    level: u8,
    key: u8,
}

fn finish(
    state: &PagingState,
    c: &Controls,
    memory: &mut impl Memory,
    access: Access,
    sum: Sum,
    leaf: Leaf,
) -> Result<(Page, Option<Page>), Stop> {
    check(state, c, access, sum, leaf.key)?;
    let host = memory.page(leaf.gpa, access, sum.user)?;
    let mut entry = leaf.entry | A;
    if access.kind == AccessKind::Write {
        entry |= D;
    }
    if entry != leaf.entry {
        memory.write(leaf.at, leaf.bytes, entry)?;
    }
    let page = Page {
        gpa: leaf.gpa,
        size: leaf.size,
        level: leaf.level,
        global: c.pge && entry & G != 0,
        readable: true,
        writable: sum.writable,
        user: sum.user,
        executable: !sum.no_execute,
        pkey: leaf.key,
        dirty: entry & D != 0,
        accessed: entry & A != 0,
    };
    Ok((page, host))
}

fn use_table(memory: &mut impl Memory, at: u64, bytes: u64, entry: u64) -> Result<(), Stop> {
    if entry & A == 0 {
        memory.write(at, bytes, entry | A)?;
    }
    Ok(())
}

/// Translates `gva`; the second page is the host's, if `memory` has one.
pub(crate) fn translate(
    state: &PagingState,
    memory: &mut impl Memory,
    gva: u64,
    access: Access,
) -> Result<(Page, Option<Page>), Stop> {
    let c = controls(state);
    if state.cr0 >> 31 & 1 == 0 {
        let gpa = gva & 0xffff_ffff;
        let page = Page {
            gpa,
            size: 0x1000,
            level: 0,
            global: false,
            readable: true,
            writable: true,
            user: true,
            executable: true,
            pkey: 0,
            dirty: true,
            accessed: true,
        };
        return Ok((page, memory.page(gpa, access, true)?));
    }
    if !c.pae {
        bits32(state, &c, memory, gva, access)
    } else if !c.lma {
        pae(state, &c, memory, gva, access)
    } else {
        long(state, &c, memory, gva, access)
    }
}

/// 4.3, 32-bit paging.
fn bits32(
    state: &PagingState,
    c: &Controls,
    memory: &mut impl Memory,
    gva: u64,
    access: Access,
) -> Result<(Page, Option<Page>), Stop> {
    let mut sum = Sum { user: true, writable: true, no_execute: false };
    let at = (state.cr3 & 0xffff_f000) + (gva >> 22 & 0x3ff) * 4;
    let pde = memory.read(at, 4)?;
    if pde & P == 0 {
        return Err(not_present(c, access));
    }
    if c.pse && pde & PS != 0 {
        let mut high = 0;
        if state.features.contains(PagingFeatures::PSE36) {
            // "M is the minimum of 40 and MAXPHYADDR": bits 39:32 come from bits 20:13.
            let m = if c.width < 40 { c.width } else { 40 };
            for bit in 13..=21 {
                if pde >> bit & 1 == 1 {
                    if bit + 19 >= m {
                        return Err(reserved(c, access));
                    }
                    high |= 1 << (bit + 19);
                }
            }
        } else if pde & 0x003f_e000 != 0 {
            return Err(reserved(c, access));
        }
        sum.add(pde);
        let gpa = high | pde & 0xffc0_0000 | gva & 0x003f_ffff;
        let leaf = Leaf { at, bytes: 4, entry: pde, gpa, size: 4 << 20, level: 2, key: 0 };
        return finish(state, c, memory, access, sum, leaf);
    }
    sum.add(pde);
    use_table(memory, at, 4, pde)?;

    let at = (pde & 0xffff_f000) + (gva >> 12 & 0x3ff) * 4;
    let pte = memory.read(at, 4)?;
    if pte & P == 0 {
        return Err(not_present(c, access));
    }
    sum.add(pte);
    let gpa = pte & 0xffff_f000 | gva & 0xfff;
    let leaf = Leaf { at, bytes: 4, entry: pte, gpa, size: 4 << 10, level: 1, key: 0 };
    finish(state, c, memory, access, sum, leaf)
}

/// 4.4, PAE paging. The entries of level 3 are registers.
fn pae(
    state: &PagingState,
    c: &Controls,
    memory: &mut impl Memory,
    gva: u64,
    access: Access,
) -> Result<(Page, Option<Page>), Stop> {
    let mut sum = Sum { user: true, writable: true, no_execute: false };
    let is_reserved = |entry: u64| (entry & !XD) >> c.width != 0 || (entry & XD != 0 && !c.nxe);
    let pdpte = state.pdptrs[(gva >> 30 & 3) as usize];
    if pdpte & P == 0 {
        return Err(not_present(c, access));
    }

    let at = (pdpte & 0x000f_ffff_ffff_f000) + (gva >> 21 & 0x1ff) * 8;
    let pde = memory.read(at, 8)?;
    if pde & P == 0 {
        return Err(not_present(c, access));
    }
    if is_reserved(pde) {
        return Err(reserved(c, access));
    }
    if pde & PS != 0 {
        if pde & 0x001f_e000 != 0 {
            return Err(reserved(c, access));
        }
        sum.add(pde);
        let gpa = pde & 0x000f_ffff_ffe0_0000 | gva & 0x001f_ffff;
        let leaf = Leaf { at, bytes: 8, entry: pde, gpa, size: 2 << 20, level: 2, key: 0 };
        return finish(state, c, memory, access, sum, leaf);
    }
    sum.add(pde);
    use_table(memory, at, 8, pde)?;

    let at = (pde & 0x000f_ffff_ffff_f000) + (gva >> 12 & 0x1ff) * 8;
    let pte = memory.read(at, 8)?;
    if pte & P == 0 {
        return Err(not_present(c, access));
    }
    if is_reserved(pte) {
        return Err(reserved(c, access));
    }
    sum.add(pte);
    let gpa = pte & 0x000f_ffff_ffff_f000 | gva & 0xfff;
    let leaf = Leaf { at, bytes: 8, entry: pte, gpa, size: 4 << 10, level: 1, key: 0 };
    finish(state, c, memory, access, sum, leaf)
}

/// 4.5, 4-level and 5-level paging.
fn long(
    state: &PagingState,
    c: &Controls,
    memory: &mut impl Memory,
    gva: u64,
    access: Access,
) -> Result<(Page, Option<Page>), Stop> {
    let mut sum = Sum { user: true, writable: true, no_execute: false };
    let is_reserved =
        |entry: u64| (entry & 0x000f_ffff_ffff_ffff) >> c.width != 0 || (entry & XD != 0 && !c.nxe);
    let mut table = state.cr3 & 0x000f_ffff_ffff_f000;

    if c.la57 {
        let at = table + (gva >> 48 & 0x1ff) * 8;
        let pml5e = memory.read(at, 8)?;
        if pml5e & P == 0 {
            return Err(not_present(c, access));
        }
        if is_reserved(pml5e) || pml5e & PS != 0 {
            return Err(reserved(c, access));
        }
        sum.add(pml5e);
        use_table(memory, at, 8, pml5e)?;
        table = pml5e & 0x000f_ffff_ffff_f000;
    }

    let at = table + (gva >> 39 & 0x1ff) * 8;
    let pml4e = memory.read(at, 8)?;
    if pml4e & P == 0 {
        return Err(not_present(c, access));
    }
    if is_reserved(pml4e) || pml4e & PS != 0 {
        return Err(reserved(c, access));
    }
    sum.add(pml4e);
    use_table(memory, at, 8, pml4e)?;

    let at = (pml4e & 0x000f_ffff_ffff_f000) + (gva >> 30 & 0x1ff) * 8;
    let pdpte = memory.read(at, 8)?;
    if pdpte & P == 0 {
        return Err(not_present(c, access));
    }
    if is_reserved(pdpte) {
        return Err(reserved(c, access));
    }
    if pdpte & PS != 0 {
        if !state.features.contains(PagingFeatures::GIB_PAGES) || pdpte & 0x3fff_e000 != 0 {
            return Err(reserved(c, access));
        }
        sum.add(pdpte);
        let gpa = pdpte & 0x000f_ffff_c000_0000 | gva & 0x3fff_ffff;
        let key = (pdpte >> 59 & 15) as u8;
        let leaf = Leaf { at, bytes: 8, entry: pdpte, gpa, size: 1 << 30, level: 3, key };
        return finish(state, c, memory, access, sum, leaf);
    }
    sum.add(pdpte);
    use_table(memory, at, 8, pdpte)?;

    let at = (pdpte & 0x000f_ffff_ffff_f000) + (gva >> 21 & 0x1ff) * 8;
    let pde = memory.read(at, 8)?;
    if pde & P == 0 {
        return Err(not_present(c, access));
    }
    if is_reserved(pde) {
        return Err(reserved(c, access));
    }
    if pde & PS != 0 {
        if pde & 0x001f_e000 != 0 {
            return Err(reserved(c, access));
        }
        sum.add(pde);
        let gpa = pde & 0x000f_ffff_ffe0_0000 | gva & 0x001f_ffff;
        let key = (pde >> 59 & 15) as u8;
        let leaf = Leaf { at, bytes: 8, entry: pde, gpa, size: 2 << 20, level: 2, key };
        return finish(state, c, memory, access, sum, leaf);
    }
    sum.add(pde);
    use_table(memory, at, 8, pde)?;

    let at = (pde & 0x000f_ffff_ffff_f000) + (gva >> 12 & 0x1ff) * 8;
    let pte = memory.read(at, 8)?;
    if pte & P == 0 {
        return Err(not_present(c, access));
    }
    if is_reserved(pte) {
        return Err(reserved(c, access));
    }
    sum.add(pte);
    let gpa = pte & 0x000f_ffff_ffff_f000 | gva & 0xfff;
    let key = (pte >> 59 & 15) as u8;
    let leaf = Leaf { at, bytes: 8, entry: pte, gpa, size: 4 << 10, level: 1, key };
    finish(state, c, memory, access, sum, leaf)
}
