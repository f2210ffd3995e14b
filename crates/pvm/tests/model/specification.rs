//! The specification's text as a program: one sentence, one line; no structure of its own.
//!
//! Where the text is open, the decisions in `docs/pvm.md` are taken. What belongs to the processor (which
//! selectors can be loaded, which addresses are canonical) is as in [`pvm::testing::Plain`].

use std::collections::BTreeMap;
use std::ops::Range;

use pvm::AddressRanges;
use pvm::processor::{Flush, Roots};
use pvm::testing::{Call, Registers, Use};

const RANGE: u32 = 0x4b56_4df0;
const VCPU_STRUCT: u32 = 0x4b56_4df1;
const SUPERVISOR_RSP: u32 = 0x4b56_4df2;
const REDZONE: u32 = 0x4b56_4df3;
const EVENT_ENTRY: u32 = 0x4b56_4df4;
const RETU_RIP: u32 = 0x4b56_4df5;
const RETS_RIP: u32 = 0x4b56_4df6;
const SWITCH_CR3: u32 = 0x4b56_4df7;
const PKRS: u32 = 0x6e1;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// A triple fault.
#[derive(Clone, Copy)]
pub(crate) struct Shutdown;

/// A whole vCPU as the specification sees it.
#[derive(Clone)]
pub(crate) struct Model {
    pub(crate) r: Registers,
    pub(crate) cs: u16,
    pub(crate) ss: u16,
    pub(crate) gs: u16,
    pub(crate) pages: BTreeMap<u64, (Use, Vec<u8>)>,
    pub(crate) msrs: BTreeMap<u32, u64>,
    pub(crate) user: bool,
    pub(crate) nmi_masked: bool,
    pub(crate) tls: [u64; 3],
    pub(crate) asked: Vec<Call>,
    five_level: bool,
}

impl Model {
    pub(crate) fn new(pml4: Range<u16>, pml5: Option<Range<u16>>) -> Self {
        let five_level = pml5.is_some();
        let pml5 = pml5.unwrap_or(0x1ff..0x1ff);
        let bits = |n: u16, shift: u32| (0xfe00 | u64::from(n)) << shift;
        let range = bits(pml4.start, 0) | bits(pml4.end, 16) | bits(pml5.start, 32) | bits(pml5.end, 48);
        let zero = [
            VCPU_STRUCT,
            SUPERVISOR_RSP,
            REDZONE,
            EVENT_ENTRY,
            RETU_RIP,
            RETS_RIP,
            SWITCH_CR3,
            PKRS,
            LSTAR,
            KERNEL_GS_BASE,
            // CSTAR, SYSCALL_MASK, SYSENTER_*, TSC.
            0xc000_0083,
            0xc000_0084,
            0x174,
            0x175,
            0x176,
            0x10,
        ];
        let mut msrs: BTreeMap<u32, u64> = zero.map(|index| (index, 0)).into();
        msrs.insert(RANGE, range);
        msrs.insert(STAR, 0x0023_0010_0000_0000);
        Self {
            r: Registers { rflags: 0x202, cr3: 0x6000, cr4: 0x1_0020, ..Registers::default() },
            cs: 0x33,
            ss: 0x2b,
            gs: 0,
            pages: BTreeMap::new(),
            msrs,
            user: false,
            nmi_masked: false,
            tls: [0; 3],
            asked: Vec::new(),
            five_level,
        }
    }

    // ---- memory ----

    pub(crate) fn map(&mut self, page: u64, usable: Option<Use>) {
        match usable {
            Some(usable) => self.pages.insert(page, (usable, vec![0; 4096])),
            None => self.pages.remove(&page),
        };
    }

    pub(crate) fn poke(&mut self, address: u64, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            let at = address.wrapping_add(n as u64);
            if let Some((_, page)) = self.pages.get_mut(&(at & !0xfff)) {
                page[(at & 0xfff) as usize] = *byte;
            }
        }
    }

    fn peek<const N: usize>(&self, address: u64) -> [u8; N] {
        std::array::from_fn(|n| {
            let at = address.wrapping_add(n as u64);
            self.pages[&(at & !0xfff)].1[(at & 0xfff) as usize]
        })
    }

    fn u64_at(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.peek(address))
    }

    fn u32_at(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.peek(address))
    }

    fn u16_at(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.peek(address))
    }

    /// Whether 64 bytes of stack can be used.
    fn stack(&self, address: u64, write: bool) -> bool {
        (0..64).map(|n| address.wrapping_add(n)).all(|at| {
            self.canonical(at)
                && self.pages.get(&(at & !0xfff)).is_some_and(|(usable, _)| match usable {
                    Use::Ram => true,
                    Use::ReadOnly => !write,
                    Use::Mmio => false,
                })
        })
    }

    /// The structure, "the hypervisor can write it".
    fn pvcs(&self) -> Option<u64> {
        let at = self.msrs[&VCPU_STRUCT];
        let there = self.pages.get(&at).is_some_and(|(usable, _)| *usable == Use::Ram);
        (at != 0 && there).then_some(at)
    }

    fn width(&self) -> u32 {
        if self.r.cr4 & 1 << 12 != 0 { 57 } else { 48 }
    }

    /// Bits 63:N are made equal to bit N-1.
    fn semi_canonical(&self, address: u64) -> u64 {
        let width = self.width();
        let low = address & ((1 << width) - 1);
        if address >> (width - 1) & 1 == 1 { low | !((1 << width) - 1) } else { low }
    }

    fn canonical(&self, address: u64) -> bool {
        self.semi_canonical(address) == address
    }

    // ---- the interrupt flag ----

    fn event_flags(&self) -> u64 {
        self.pvcs().map_or(0, |p| self.u64_at(p))
    }

    fn set_event_flags(&mut self, flags: u64) {
        if let Some(p) = self.pvcs() {
            self.poke(p, &flags.to_le_bytes());
        }
    }

    pub(crate) fn interrupts_open(&self) -> bool {
        // The bit when in supervisor mode; 1 in user mode; 0 in supervisor mode without a structure.
        self.user || self.event_flags() & 0x200 != 0
    }

    pub(crate) fn interrupt_waits(&mut self) {
        // The hypervisor sets IP if it fails to inject because IF is clear in supervisor mode.
        self.set_event_flags(self.event_flags() | 0x100);
    }

    pub(crate) fn cli_or_sti(&mut self, open: bool) {
        let flags = self.event_flags();
        // A trapped STI tells the hypervisor what IRQ_WIN would.
        self.set_event_flags(if open { (flags | 0x200) & !0x100 } else { flags & !0x200 });
    }

    // ---- events ----

    pub(crate) fn event(&mut self, vector: u8, code: Option<u32>) -> Result<(), Shutdown> {
        if self.user {
            self.save_user(Some((vector, code)))?;
            self.load_supervisor(self.msrs[&EVENT_ENTRY]);
        } else if vector < 32 {
            self.exception(vector, code)?;
        } else {
            self.interrupt(vector, code)?;
        }
        // Set when #NMI is delivered.
        if vector == 2 {
            self.nmi_masked = true;
        }
        Ok(())
    }

    fn save_user(&mut self, event: Option<(u8, Option<u32>)>) -> Result<(), Shutdown> {
        let p = self.pvcs().ok_or(Shutdown)?;
        let r = self.r;
        self.poke(p + 66, &self.ss.to_le_bytes());
        self.poke(p + 64, &self.cs.to_le_bytes());
        self.poke(p + 92, &(r.pkru as u32).to_le_bytes());
        self.poke(p + 80, &r.gs_base.to_le_bytes());
        self.poke(p + 104, &r.rsp.to_le_bytes());
        self.poke(p + 88, &(r.rflags as u32).to_le_bytes());
        self.poke(p + 96, &r.rip.to_le_bytes());
        self.poke(p + 112, &r.rcx.to_le_bytes());
        self.poke(p + 120, &r.r11.to_le_bytes());
        if let Some((vector, code)) = event {
            self.poke(p + 12, &u32::from(vector).to_le_bytes());
            if let Some(code) = code {
                self.poke(p + 8, &code.to_le_bytes());
            }
            if vector == 14 {
                self.poke(p + 16, &r.cr2.to_le_bytes());
            }
        }
        Ok(())
    }

    fn load_supervisor(&mut self, entry: u64) {
        self.user = false;
        (self.cs, self.ss) = (0x33, 0x2b);
        self.swap_roots();
        self.r.gs_base = self.msrs[&KERNEL_GS_BASE];
        self.r.rsp = self.msrs[&SUPERVISOR_RSP];
        self.r.pkru = if self.r.cr4 & 1 << 24 != 0 { self.msrs[&PKRS] } else { 0 };
        self.enter(entry);
    }

    fn swap_roots(&mut self) {
        let cr3 = self.r.cr3;
        self.r.cr3 = self.msrs[&SWITCH_CR3];
        self.msrs.insert(SWITCH_CR3, cr3);
    }

    /// RIP, RCX; R11 and the underlying RFLAGS are IF and the fixed bit.
    fn enter(&mut self, entry: u64) {
        (self.r.rip, self.r.rcx) = (entry, entry);
        (self.r.r11, self.r.rflags) = (0x202, 0x202);
    }

    fn exception(&mut self, vector: u8, code: Option<u32>) -> Result<(), Shutdown> {
        let mut rsp = self.r.rsp;
        // IF comes from the structure.
        let rflags = self.r.rflags & !0x200 | self.event_flags() & 0x200;
        rsp = rsp.wrapping_sub(self.msrs[&REDZONE]);
        rsp &= !15;
        let r = self.r;
        if !self.stack(rsp.wrapping_sub(64), true) {
            return Err(Shutdown);
        }
        for word in [r.r11, r.rcx, 0x18, r.rsp, rflags, 0x10, r.rip] {
            rsp = rsp.wrapping_sub(8);
            self.poke(rsp, &word.to_le_bytes());
        }
        rsp = rsp.wrapping_sub(4);
        self.poke(rsp, &u32::from(vector).to_le_bytes());
        rsp = rsp.wrapping_sub(4);
        self.poke(rsp, &code.unwrap_or(0).to_le_bytes());
        if vector == 14 {
            let p = self.pvcs().ok_or(Shutdown)?;
            self.poke(p + 16, &r.cr2.to_le_bytes());
        }
        self.r.rsp = rsp;
        self.set_event_flags(self.event_flags() & !0x200);
        self.enter(self.msrs[&EVENT_ENTRY].wrapping_add(256));
        Ok(())
    }

    fn interrupt(&mut self, vector: u8, code: Option<u32>) -> Result<(), Shutdown> {
        let p = self.pvcs().ok_or(Shutdown)?;
        let r = self.r;
        let rflags = r.rflags & !0x200 | self.event_flags() & 0x200;
        self.poke(p + 120, &r.r11.to_le_bytes());
        self.poke(p + 112, &r.rcx.to_le_bytes());
        self.poke(p + 104, &r.rsp.to_le_bytes());
        self.poke(p + 88, &(rflags as u32).to_le_bytes());
        self.poke(p + 96, &r.rip.to_le_bytes());
        self.poke(p + 12, &u32::from(vector).to_le_bytes());
        if let Some(code) = code {
            self.poke(p + 8, &code.to_le_bytes());
        }
        self.r.rsp = r.rsp.wrapping_sub(self.msrs[&REDZONE]) & !15;
        self.set_event_flags(self.event_flags() & !0x200);
        self.enter(self.msrs[&EVENT_ENTRY].wrapping_add(512));
        Ok(())
    }

    // ---- SYSCALL ----

    /// Whether the vCPU sleeps afterwards.
    pub(crate) fn syscall(&mut self) -> Result<bool, Shutdown> {
        let address = self.r.rip.wrapping_sub(2);
        if !self.user && address == self.msrs[&RETU_RIP] {
            self.event_return_user()?;
            return Ok(false);
        }
        // The underlying instruction. Like every other it ends RF.
        self.r.rflags &= !(1 << 16);
        self.r.rcx = self.r.rip;
        self.r.r11 = self.r.rflags;
        if self.user {
            self.save_user(None)?;
            self.load_supervisor(self.msrs[&LSTAR]);
            Ok(false)
        } else if address == self.msrs[&RETS_RIP] {
            self.event_return_supervisor()?;
            Ok(false)
        } else {
            Ok(self.hypercall())
        }
    }

    fn event_return_user(&mut self) -> Result<(), Shutdown> {
        let p = self.pvcs().ok_or(Shutdown)?;
        // The original RSP is saved.
        self.msrs.insert(SUPERVISOR_RSP, self.r.rsp);
        self.swap_roots();
        self.cs = self.u16_at(p + 64) | 3;
        self.ss = self.u16_at(p + 66) | 3;
        self.r.gs_base = self.semi_canonical(self.u64_at(p + 80));
        self.r.pkru = self.u32_at(p + 92).into();
        self.r.rsp = self.u64_at(p + 104);
        let eflags = u64::from(self.u32_at(p + 88));
        // IOPL, VM, VIF, VIP cleared, with what is reserved; IF and bit 1 set.
        self.r.rflags = eflags & 0x0025_4dd5 | 0x202;
        self.r.rip = self.u64_at(p + 96);
        self.r.rcx = self.u64_at(p + 112);
        self.r.r11 = self.u64_at(p + 120);
        self.set_event_flags(self.event_flags() & !0x100);
        self.nmi_masked = false;
        self.user = true;
        // Selectors that a processor would not load.
        if self.cs != 0x33 && self.cs != 0x23 {
            self.event(13, Some(u32::from(self.cs) & 0xfffc))?;
        } else if self.ss != 0x2b {
            self.event(13, Some(u32::from(self.ss) & 0xfffc))?;
        }
        Ok(())
    }

    fn event_return_supervisor(&mut self) -> Result<(), Shutdown> {
        let rsp = self.r.rsp;
        if !self.stack(rsp, false) {
            return Err(Shutdown);
        }
        let [rip, _cs, rflags, sp, _ss, rcx, r11] =
            std::array::from_fn(|n| self.u64_at(rsp.wrapping_add(8 + 8 * n as u64)));
        (self.r.rip, self.r.rsp, self.r.rcx, self.r.r11) = (rip, sp, rcx, r11);
        self.r.rflags = rflags & 0x0025_4dd5 | 0x202;
        self.set_event_flags(self.event_flags() & !0x300 | rflags & 0x200);
        self.nmi_masked = false;
        Ok(())
    }

    fn hypercall(&mut self) -> bool {
        const EINVAL: u64 = (-22i64) as u64;
        // R10 stands for RCX.
        let (nr, a, b, c) = (self.r.rax, self.r.rbx, self.r.r10, self.r.rdx);
        let mut halts = false;
        self.r.rax = match nr.wrapping_sub(0x1708_8200) {
            0 if a & !3 != 0 || b >> 46 != 0 || c >> 46 != 0 => EINVAL,
            0 => {
                self.asked.push(Call::LoadRoots(Roots {
                    supervisor: b,
                    user: c,
                    five_level: a & 2 != 0,
                    flush: a & 1 != 0,
                }));
                self.r.cr3 = b;
                self.msrs.insert(SWITCH_CR3, c);
                self.r.cr4 &= !(1 << 12);
                if a & 2 != 0 && self.five_level {
                    self.r.cr4 |= 1 << 12;
                }
                0
            }
            1 => {
                self.set_event_flags(self.event_flags() & !0x100);
                0
            }
            2 => {
                self.set_event_flags(self.event_flags() & !0x100 | 0x200);
                halts = true;
                0
            }
            3 => self.ask(Call::Flush(Flush::All)),
            4 => self.ask(Call::Flush(Flush::Roots { switch_cr3: self.msrs[&SWITCH_CR3] })),
            5 => self.ask(Call::Flush(Flush::Page(a))),
            6 => {
                // GS is loaded with the selector, or if that fails with the null selector.
                let descriptor = self.descriptor(a as u16);
                self.gs = if descriptor.is_some() { a as u16 } else { 0 };
                self.ask(Call::LoadGs(self.gs, descriptor));
                let d = descriptor.unwrap_or(0).to_le_bytes();
                u32::from_le_bytes([d[2], d[3], d[4], d[7]]).into()
            }
            7 => self.rdmsr(a as u32).unwrap_or(0),
            8 => {
                if self.wrmsr(a as u32, b) {
                    0
                } else {
                    EINVAL
                }
            }
            9 => {
                self.tls = [a, b, c].map(rectified);
                12
            }
            _ => {
                self.ask(Call::KvmHypercall(nr, [a, b, c, self.r.rsi]));
                if nr == 1 { 0 } else { (-1000i64) as u64 }
            }
        };
        halts
    }

    /// The entries of the underlying GDT with DPL 3; the number of this CPU is 3.
    fn descriptor(&self, selector: u16) -> Option<u64> {
        match selector & !3 {
            0x20 => Some(0x00cf_fb00_0000_ffff),
            0x28 => Some(0x00cf_f300_0000_ffff),
            0x30 => Some(0x00af_fb00_0000_ffff),
            tls @ (0x60 | 0x68 | 0x70) => Some(self.tls[usize::from(tls - 0x60) / 8]).filter(|d| *d != 0),
            0x78 => Some(0x0040_f100_0000_0003),
            _ => None,
        }
    }

    fn ask(&mut self, call: Call) -> u64 {
        self.asked.push(call);
        0
    }

    // ---- MSRs ----

    pub(crate) fn rdmsr(&self, index: u32) -> Option<u64> {
        if index == GS_BASE { Some(self.r.gs_base) } else { self.msrs.get(&index).copied() }
    }

    /// `false` for #GP.
    pub(crate) fn wrmsr(&mut self, index: u32, value: u64) -> bool {
        let good = match index {
            RANGE => self.narrows(value),
            VCPU_STRUCT => {
                let ram = self.pages.get(&value).is_some_and(|(usable, _)| *usable == Use::Ram);
                value == 0 || ram
            }
            EVENT_ENTRY => [0, 256, 512].iter().all(|n| self.canonical(value.wrapping_add(*n))),
            SWITCH_CR3 => value >> 46 == 0,
            STAR => {
                // __USER32_CS is 0x23 whatever its RPL says; __KERNEL_CS is 0x10 with RPL 0, __KERNEL_DS follows.
                (value >> 48) & !3 == 0x20 && value >> 32 & 0xffff == 0x10
            }
            PKRS => value >> 32 == 0,
            LSTAR | GS_BASE | KERNEL_GS_BASE => self.canonical(value),
            _ => self.msrs.contains_key(&index),
        };
        if !good {
            return false;
        }
        match index {
            GS_BASE => self.r.gs_base = value,
            PKRS if !self.user && self.r.cr4 & 1 << 24 != 0 => self.r.pkru = value,
            RANGE => {
                let index = |shift: u32| (value >> shift & 0x1ff) as u16;
                let pml5 = self.five_level.then(|| index(32)..index(48));
                let ranges = AddressRanges::new(index(0)..index(16), pml5).unwrap();
                self.asked.push(Call::Confine(ranges));
                self.asked.push(Call::Flush(Flush::All));
            }
            _ => {}
        }
        if index != GS_BASE {
            self.msrs.insert(index, value);
        }
        true
    }

    /// The constraints of MSR_PVM_LINEAR_ADDRESS_RANGE, and that the new range is in the present one.
    fn narrows(&self, value: u64) -> bool {
        let field = |v: u64, shift: u32| v >> shift & 0xffff;
        let [s4, e4, s5, e5] = [0, 16, 32, 48].map(|shift| field(value, shift));
        let [old_s4, old_e4, old_s5, old_e5] = [0, 16, 32, 48].map(|shift| field(self.msrs[&RANGE], shift));
        // Seven bits above each index are ones, and so is the index's own most significant one.
        let formed = [s4, e4, s5, e5].iter().all(|f| f & 0xff00 == 0xff00);
        let four = old_s4 <= s4 && s4 < e4 && e4 <= old_e4 && e4 & 0x1ff < 511;
        let five = if self.five_level {
            old_s5 <= s5 && s5 < e5 && e5 <= old_e5 && e5 & 0x1ff < 511
        } else {
            s5 == 0xffff && e5 == 0xffff
        };
        formed && four && five
    }
}

/// A descriptor as LOAD_TLS lets it into the GDT: only present 32-bit data, and that with DPL 3.
fn rectified(descriptor: u64) -> u64 {
    let bit = |n: u32| descriptor >> n & 1 == 1;
    if bit(47) && !bit(43) && bit(54) { (descriptor | 1 << 40 | 1 << 44 | 3 << 45) & !(1 << 53) } else { 0 }
}
