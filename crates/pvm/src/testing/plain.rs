//! A processor that is registers, MSRs and a few pages of memory, and that writes down what it is asked to do.
//!
//! Linear addresses are physical addresses, so that a page is at the same place for the stack and for the
//! shared structure. Nothing is executed.

use std::collections::BTreeMap;

use crate::abi::{Field, control, hypercall, rflags, selector, x86_msr};
use crate::processor::{Context, Flush, Processor, Register, Roots, Selectors, SharedStruct};
use crate::range::AddressRanges;

/// The size of a page in bytes.
pub const PAGE_SIZE: u64 = 4096;
/// CR4.LA57: linear addresses have 57 bits.
const LA57: u64 = 1 << 12;
/// Bits of a physical address.
const PHYSICAL_BITS: u32 = 46;

/// The registers, fields named as in [`Register`]. IA32_KERNEL_GS_BASE and IA32_LSTAR are among the MSRs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[expect(missing_docs, reason = "the names are the manuals'")]
pub struct Registers {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rsp: u64,
    pub r10: u64,
    pub r11: u64,
    pub rip: u64,
    pub rflags: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub gs_base: u64,
    pub pkru: u64,
}

/// What a page can be used for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Use {
    /// RAM.
    Ram,
    /// RAM or ROM that cannot be written.
    ReadOnly,
    /// A device's registers.
    Mmio,
}

/// A page of guest memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    /// What it can be used for.
    pub usable: Use,
    /// What it holds.
    pub bytes: [u8; PAGE_SIZE as usize],
}

/// Something that the processor was asked to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the methods of `Processor` say it")]
pub enum Call {
    EnterSupervisor(Context),
    EnterUser(Selectors, Context),
    WriteFrame(u64),
    LoadRoots(Roots),
    Flush(Flush),
    Confine(AddressRanges),
    LoadGs(u16, Option<u64>),
    KvmHypercall(u64, [u64; 4]),
}

/// The processor.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plain {
    /// Its registers.
    pub registers: Registers,
    /// CS and SS.
    pub selectors: Selectors,
    /// GS.
    pub gs: u16,
    /// The MSRs that it has; no others can be accessed.
    pub msrs: BTreeMap<u32, u64>,
    /// Its memory: pages by the address of their first byte.
    pub pages: BTreeMap<u64, Page>,
    /// Whether CR4.LA57 can be set.
    pub five_level: bool,
    /// What it was asked to do, in order.
    pub calls: Vec<Call>,
}

impl Plain {
    /// In 64-bit mode with the registers that the ABI fixes in place, without memory.
    pub fn new() -> Self {
        use x86_msr::{CSTAR, KERNEL_GS_BASE, LSTAR, STAR, SYSCALL_MASK};
        const SYSENTER: [u32; 3] = [0x174, 0x175, 0x176];
        const TSC: u32 = 0x10;
        let msrs = [STAR, LSTAR, CSTAR, SYSCALL_MASK, KERNEL_GS_BASE, TSC].into_iter().chain(SYSENTER);
        Self {
            registers: Registers { rflags: rflags::FIXED, cr4: control::CR4_ONE, ..Default::default() },
            selectors: Selectors::default(),
            gs: 0,
            msrs: msrs.map(|index| (index, 0)).collect(),
            pages: BTreeMap::new(),
            five_level: false,
            calls: Vec::new(),
        }
    }

    /// Puts a page of zeros at `address`.
    pub fn map(&mut self, address: u64, usable: Use) {
        assert_eq!(address % PAGE_SIZE, 0, "a page starts at a multiple of its size");
        self.pages.insert(address, Page { usable, bytes: [0; PAGE_SIZE as usize] });
    }

    /// The `N` bytes of memory at `address`, whatever it is used for; they may cross pages.
    ///
    /// # Panics
    /// If there is no page.
    pub fn bytes<const N: usize>(&self, address: u64) -> [u8; N] {
        std::array::from_fn(|n| {
            let (page, offset) = split(address.wrapping_add(n as u64));
            self.pages.get(&page).expect("a page").bytes[offset]
        })
    }

    /// Writes memory as the guest's own stores would, whatever it is used for; where there is no page, nothing.
    pub fn poke(&mut self, address: u64, bytes: &[u8]) {
        for (n, byte) in bytes.iter().enumerate() {
            let (page, offset) = split(address.wrapping_add(n as u64));
            if let Some(page) = self.pages.get_mut(&page) {
                page.bytes[offset] = *byte;
            }
        }
    }

    /// What was asked since the last call of this.
    pub fn take_calls(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.calls)
    }

    fn canonical_bits(&self) -> u32 {
        if self.registers.cr4 & LA57 != 0 { 57 } else { 48 }
    }

    /// Whether every byte of a frame at `address` is in a page for which `good` holds.
    fn frame_is(&self, address: u64, good: impl Fn(Use) -> bool) -> bool {
        (0..64).all(|n| {
            let byte = address.wrapping_add(n);
            self.is_canonical(byte) && self.pages.get(&split(byte).0).is_some_and(|p| good(p.usable))
        })
    }
}

impl Default for Plain {
    fn default() -> Self {
        Self::new()
    }
}

/// The page of an address, and the offset in it.
const fn split(address: u64) -> (u64, usize) {
    (address & !(PAGE_SIZE - 1), (address % PAGE_SIZE) as usize)
}

/// A page as the shared structure.
#[derive(Debug)]
pub struct Shared<'a>(&'a mut [u8; PAGE_SIZE as usize]);

impl SharedStruct for Shared<'_> {
    fn load(&self, field: Field) -> u64 {
        let (at, size) = (usize::from(field.offset), usize::from(field.size));
        let mut value = [0; 8];
        value[..size].copy_from_slice(&self.0[at..at + size]);
        u64::from_le_bytes(value)
    }

    fn store(&mut self, field: Field, value: u64) {
        let (at, size) = (usize::from(field.offset), usize::from(field.size));
        self.0[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
}

impl Processor for Plain {
    type Shared<'a> = Shared<'a>;

    fn register(&self, register: Register) -> u64 {
        let r = &self.registers;
        match register {
            Register::Rax => r.rax,
            Register::Rbx => r.rbx,
            Register::Rcx => r.rcx,
            Register::Rdx => r.rdx,
            Register::Rsi => r.rsi,
            Register::Rsp => r.rsp,
            Register::R10 => r.r10,
            Register::R11 => r.r11,
            Register::Rip => r.rip,
            Register::Rflags => r.rflags,
            Register::Cr2 => r.cr2,
            Register::Cr3 => r.cr3,
            Register::Cr4 => r.cr4,
            Register::GsBase => r.gs_base,
            Register::KernelGsBase => self.msrs[&x86_msr::KERNEL_GS_BASE],
            Register::Lstar => self.msrs[&x86_msr::LSTAR],
            Register::Pkru => r.pkru,
        }
    }

    fn set_register(&mut self, register: Register, value: u64) {
        let r = &mut self.registers;
        *match register {
            Register::Rax => &mut r.rax,
            Register::Rbx => &mut r.rbx,
            Register::Rcx => &mut r.rcx,
            Register::Rdx => &mut r.rdx,
            Register::Rsi => &mut r.rsi,
            Register::Rsp => &mut r.rsp,
            Register::R10 => &mut r.r10,
            Register::R11 => &mut r.r11,
            Register::Rip => &mut r.rip,
            Register::Rflags => &mut r.rflags,
            Register::Cr2 => &mut r.cr2,
            Register::GsBase => &mut r.gs_base,
            Register::Pkru => &mut r.pkru,
            Register::Cr3 | Register::Cr4 | Register::KernelGsBase | Register::Lstar => {
                panic!("{register:?} is only read")
            }
        } = value;
    }

    fn selectors(&self) -> Selectors {
        self.selectors
    }

    fn enter_supervisor(&mut self, context: Context) {
        self.calls.push(Call::EnterSupervisor(context));
        self.selectors = Selectors { cs: selector::USER_CS, ss: selector::USER_DS };
        self.registers.cr3 = context.cr3;
        self.registers.pkru = context.pkru.into();
    }

    fn enter_user(&mut self, selectors: Selectors, context: Context) -> Result<(), u16> {
        self.calls.push(Call::EnterUser(selectors, context));
        self.selectors = selectors;
        self.registers.cr3 = context.cr3;
        self.registers.pkru = context.pkru.into();
        if ![selector::USER_CS, selector::USER32_CS].contains(&selectors.cs) {
            Err(selectors.cs)
        } else if selectors.ss != selector::USER_DS {
            Err(selectors.ss)
        } else {
            Ok(())
        }
    }

    fn shared(&mut self, page: u64) -> Option<Shared<'_>> {
        let page = self.pages.get_mut(&page).filter(|p| p.usable == Use::Ram)?;
        Some(Shared(&mut page.bytes))
    }

    fn write_frame(&mut self, address: u64, frame: &[u64; 8]) -> bool {
        self.calls.push(Call::WriteFrame(address));
        let writable = self.frame_is(address, |usable| usable == Use::Ram);
        if writable {
            self.poke(address, frame.map(u64::to_le_bytes).as_flattened());
        }
        writable
    }

    fn read_frame(&mut self, address: u64) -> Option<[u64; 8]> {
        let readable = self.frame_is(address, |usable| usable != Use::Mmio);
        readable.then(|| {
            std::array::from_fn(|n| u64::from_le_bytes(self.bytes(address.wrapping_add(8 * n as u64))))
        })
    }

    fn read_msr(&mut self, index: u32) -> Option<u64> {
        match index {
            x86_msr::GS_BASE => Some(self.registers.gs_base),
            _ => self.msrs.get(&index).copied(),
        }
    }

    fn write_msr(&mut self, index: u32, value: u64) -> bool {
        let address = [x86_msr::GS_BASE, x86_msr::KERNEL_GS_BASE, x86_msr::LSTAR].contains(&index);
        if address && !self.is_canonical(value) {
            return false;
        }
        if index == x86_msr::GS_BASE {
            self.registers.gs_base = value;
            return true;
        }
        self.msrs.get_mut(&index).map(|msr| *msr = value).is_some()
    }

    fn is_canonical(&self, address: u64) -> bool {
        let shift = 64 - self.canonical_bits();
        (address << shift) as i64 >> shift == address as i64
    }

    fn linear_address_bits(&self) -> u32 {
        self.canonical_bits()
    }

    fn is_root(&self, value: u64) -> bool {
        value >> PHYSICAL_BITS == 0
    }

    fn load_roots(&mut self, roots: Roots) {
        self.calls.push(Call::LoadRoots(roots));
        self.registers.cr3 = roots.supervisor;
        self.registers.cr4 &= !LA57;
        if roots.five_level && self.five_level {
            self.registers.cr4 |= LA57;
        }
    }

    fn flush(&mut self, what: Flush) {
        self.calls.push(Call::Flush(what));
    }

    fn confine(&mut self, ranges: AddressRanges) {
        self.calls.push(Call::Confine(ranges));
    }

    fn load_gs(&mut self, selector: u16, descriptor: Option<u64>) -> u64 {
        self.calls.push(Call::LoadGs(selector, descriptor));
        self.gs = selector;
        // Bits 39 to 16 and 63 to 56.
        descriptor.map_or(0, |d| d >> 16 & 0xff_ffff | d >> 56 << 24)
    }

    fn kvm_hypercall(&mut self, number: u64, args: [u64; 4]) -> u64 {
        const VAPIC_POLL_IRQ: u64 = 1;
        self.calls.push(Call::KvmHypercall(number, args));
        if number == VAPIC_POLL_IRQ { 0 } else { hypercall::KVM_ENOSYS }
    }
}
