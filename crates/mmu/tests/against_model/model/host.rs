//! The host's tables: EPT (SDM volume 3, "The Extended Page Table Mechanism") and nested page tables (APM
//! volume 2, 15.25), and guest memory behind them.

use mmu::testing::Host;
use mmu::{Access, AccessKind, EptFeatures, PagingFeatures, PagingState};

use super::{Exit, Memory, Page, Ram};

/// Guest-physical memory: everything through the host's tables in RAM.
pub(crate) struct Guest<'a> {
    pub(crate) ram: Ram<'a>,
    pub(crate) host: Host,
    /// Whether a linear address is being translated.
    pub(crate) linear: bool,
}

/// What the host's tables are asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Request {
    ReadEntry,
    UpdateEntry,
    Final { kind: AccessKind, user_page: bool },
}

impl Guest<'_> {
    fn translate(&mut self, gpa: u64, request: Request) -> Result<Page, Exit> {
        match self.host {
            Host::Ept { eptp, features, maxphyaddr } => {
                let width = u32::from(maxphyaddr);
                ept(&mut self.ram, eptp, features, width, self.linear, gpa, request)
            }
            Host::Npt(state) => npt(&mut self.ram, &state, gpa, request),
        }
    }
}

impl Memory for Guest<'_> {
    fn read(&mut self, address: u64, bytes: u64) -> Result<u64, Exit> {
        let page = self.translate(address, Request::ReadEntry)?;
        self.ram.read(page.gpa, bytes)
    }

    fn write(&mut self, address: u64, bytes: u64, value: u64) -> Result<(), Exit> {
        if self.ram.frozen {
            return Ok(());
        }
        let page = self.translate(address, Request::UpdateEntry)?;
        self.ram.write(page.gpa, bytes, value)
    }

    fn page(&mut self, address: u64, access: Access, user_page: bool) -> Result<Option<Page>, Exit> {
        let request = Request::Final { kind: access.kind, user_page };
        Ok(Some(self.translate(address, request)?))
    }
}

/// Reads and writes of RAM never exit.
fn read(ram: &mut Ram<'_>, at: u64) -> u64 {
    ram.read(at, 8).unwrap_or(0)
}

fn write(ram: &mut Ram<'_>, at: u64, value: u64) {
    let _ = ram.write(at, 8, value);
}

fn ept(
    ram: &mut Ram<'_>,
    eptp: u64,
    features: EptFeatures,
    width: u32,
    linear: bool,
    gpa: u64,
    request: Request,
) -> Result<Page, Exit> {
    let five = eptp >> 3 & 7 == 4;
    let ad = eptp >> 6 & 1 == 1;
    let mbec = features.contains(EptFeatures::MODE_BASED_EXECUTE);

    // Which accesses this is, as bits 2:0 of the exit qualification.
    let wants = match request {
        Request::ReadEntry | Request::UpdateEntry if ad => 0b011,
        Request::ReadEntry => 0b001,
        Request::UpdateEntry => 0b010,
        Request::Final { kind: AccessKind::Read, .. } => 0b001,
        Request::Final { kind: AccessKind::Write, .. } => 0b010,
        Request::Final { kind: AccessKind::Fetch, .. } => 0b100,
    };
    let violation = |allowed: u64| {
        let mut qualification = wants;
        qualification |= (allowed & 7) << 3;
        if mbec && allowed >> 10 & 1 == 1 {
            qualification |= 1 << 6;
        }
        if linear {
            qualification |= 1 << 7;
            if matches!(request, Request::Final { .. }) {
                qualification |= 1 << 8;
            }
        }
        Exit::EptViolation { gpa, qualification }
    };
    let misconfiguration = Exit::EptMisconfiguration { gpa };

    if gpa >> if five { 57 } else { 48 } != 0 {
        return Err(violation(0));
    }
    let mut allowed = 7 | 1 << 10;
    let mut table = eptp & 0x000f_ffff_ffff_f000;
    let mut level = if five { 5 } else { 4 };
    loop {
        let at = table + (gpa >> (12 + 9 * (level - 1)) & 0x1ff) * 8;
        let entry = read(ram, at);
        let r = entry & 1 == 1;
        let w = entry >> 1 & 1 == 1;
        let x = entry >> 2 & 1 == 1;
        let xu = mbec && entry >> 10 & 1 == 1;
        allowed &= entry;
        if !r && !w && !x && !xu {
            return Err(violation(allowed));
        }
        if !r && w {
            return Err(misconfiguration);
        }
        if !r && (x || xu) && !features.contains(EptFeatures::EXECUTE_ONLY) {
            return Err(misconfiguration);
        }
        if (entry & 0x000f_ffff_ffff_ffff) >> width != 0 {
            return Err(misconfiguration);
        }
        let large = entry >> 7 & 1 == 1;
        let leaf = match level {
            5 | 4 => {
                if entry & 0xf8 != 0 {
                    return Err(misconfiguration);
                }
                false
            }
            3 if large => {
                if !features.contains(EptFeatures::GIB_PAGES) || entry & 0x3fff_f000 != 0 {
                    return Err(misconfiguration);
                }
                true
            }
            2 if large => {
                if !features.contains(EptFeatures::MIB2_PAGES) || entry & 0x001f_f000 != 0 {
                    return Err(misconfiguration);
                }
                true
            }
            3 | 2 => {
                if entry & 0x78 != 0 {
                    return Err(misconfiguration);
                }
                false
            }
            _ => true,
        };
        if !leaf {
            if ad && entry >> 8 & 1 == 0 {
                write(ram, at, entry | 1 << 8);
            }
            table = entry & 0x000f_ffff_ffff_f000;
            level -= 1;
            continue;
        }
        let memory_type = entry >> 3 & 7;
        if memory_type == 2 || memory_type == 3 || memory_type == 7 {
            return Err(misconfiguration);
        }
        let executable_by_user = if mbec { allowed >> 10 & 1 == 1 } else { allowed >> 2 & 1 == 1 };
        let good = match request {
            Request::ReadEntry if !ad => allowed & 1 == 1,
            Request::ReadEntry | Request::UpdateEntry => allowed >> 1 & 1 == 1,
            Request::Final { kind: AccessKind::Read, .. } => allowed & 1 == 1,
            Request::Final { kind: AccessKind::Write, .. } => allowed >> 1 & 1 == 1,
            Request::Final { kind: AccessKind::Fetch, user_page: true } => executable_by_user,
            Request::Final { kind: AccessKind::Fetch, user_page: false } => allowed >> 2 & 1 == 1,
        };
        if !good {
            return Err(violation(allowed));
        }
        let mut used = entry;
        if ad {
            used |= 1 << 8;
            if wants & 0b010 != 0 {
                used |= 1 << 9;
            }
        }
        if used != entry {
            write(ram, at, used);
        }
        let size = 1_u64 << (12 + 9 * (level - 1));
        return Ok(Page {
            gpa: entry & 0x000f_ffff_ffff_f000 & !(size - 1) | gpa & (size - 1),
            size,
            level,
            global: false,
            readable: allowed & 1 == 1,
            writable: allowed >> 1 & 1 == 1,
            user: executable_by_user,
            executable: allowed >> 2 & 1 == 1,
            pkey: 0,
            dirty: !ad || used >> 9 & 1 == 1,
            accessed: true,
        });
    }
}

fn npt(ram: &mut Ram<'_>, host: &PagingState, gpa: u64, request: Request) -> Result<Page, Exit> {
    let five = host.cr4 >> 12 & 1 == 1;
    let nxe = host.efer >> 11 & 1 == 1;
    let width = u32::from(host.maxphyaddr);
    let kind = match request {
        Request::ReadEntry | Request::UpdateEntry => AccessKind::Write,
        Request::Final { kind, .. } => kind,
    };
    let fault = |cause: u64| {
        let mut info = cause | 4;
        if kind == AccessKind::Write {
            info |= 2;
        }
        if kind == AccessKind::Fetch && nxe {
            info |= 16;
        }
        info |= if matches!(request, Request::Final { .. }) { 1 << 32 } else { 1 << 33 };
        Exit::NestedPageFault { gpa, info }
    };

    if gpa >> if five { 57 } else { 48 } != 0 {
        return Err(fault(0));
    }
    let mut user = true;
    let mut writable = true;
    let mut executable = true;
    let mut table = host.cr3 & 0x000f_ffff_ffff_f000;
    let mut level = if five { 5 } else { 4 };
    loop {
        let at = table + (gpa >> (12 + 9 * (level - 1)) & 0x1ff) * 8;
        let entry = read(ram, at);
        if entry & 1 == 0 {
            return Err(fault(0));
        }
        if (entry & 0x000f_ffff_ffff_ffff) >> width != 0 {
            return Err(fault(1 | 8));
        }
        if entry >> 63 == 1 && !nxe {
            return Err(fault(1 | 8));
        }
        let large = entry >> 7 & 1 == 1;
        if large && level >= 4 {
            return Err(fault(1 | 8));
        }
        if large && level == 3 && !host.features.contains(PagingFeatures::GIB_PAGES) {
            return Err(fault(1 | 8));
        }
        if large && level == 3 && entry & 0x3fff_e000 != 0 {
            return Err(fault(1 | 8));
        }
        if large && level == 2 && entry & 0x001f_e000 != 0 {
            return Err(fault(1 | 8));
        }
        user &= entry >> 2 & 1 == 1;
        writable &= entry >> 1 & 1 == 1;
        executable &= entry >> 63 == 0;
        if level > 1 && !large {
            if entry >> 5 & 1 == 0 {
                write(ram, at, entry | 1 << 5);
            }
            table = entry & 0x000f_ffff_ffff_f000;
            level -= 1;
            continue;
        }
        if !user || (kind == AccessKind::Write && !writable) || (kind == AccessKind::Fetch && !executable) {
            return Err(fault(1));
        }
        let mut used = entry | 1 << 5;
        if kind == AccessKind::Write {
            used |= 1 << 6;
        }
        if used != entry {
            write(ram, at, used);
        }
        let size = 1_u64 << (12 + 9 * (level - 1));
        return Ok(Page {
            gpa: entry & 0x000f_ffff_ffff_f000 & !(size - 1) | gpa & (size - 1),
            size,
            level,
            global: false,
            readable: true,
            writable,
            user,
            executable,
            pkey: 0,
            dirty: used >> 6 & 1 == 1,
            accessed: true,
        });
    }
}
