//! The GDT of the underlying processor, as far as a guest can see it (specification, "Underlying GDTR").
//!
//! The guest's own GDT has no effect. What segment loads, LAR, LSL, VERR and VERW read is a table of the hypervisor's:
//! the flat user segments, three TLS entries that the guest sets by hypercall, and one whose limit
//! is the number of the CPU.

use crate::abi::selector;

/// Descriptor bits (Intel SDM vol. 3, 3.4.5).
mod bits {
    pub(super) const ACCESSED: u64 = 1 << 40;
    pub(super) const CODE: u64 = 1 << 43;
    pub(super) const NON_SYSTEM: u64 = 1 << 44;
    pub(super) const DPL3: u64 = 3 << 45;
    pub(super) const PRESENT: u64 = 1 << 47;
    pub(super) const LONG: u64 = 1 << 53;
    pub(super) const BIG: u64 = 1 << 54;
}

/// Flat 32-bit code, data, and 64-bit code, all of DPL 3, accessed.
const USER32_CS: u64 = 0x00cf_fb00_0000_ffff;
const USER_DS: u64 = 0x00cf_f300_0000_ffff;
const USER_CS: u64 = 0x00af_fb00_0000_ffff;
/// Expand-up read-only data of DPL 3, with a limit in bytes.
const CPUNODE: u64 = 0x0040_f100_0000_0000;

/// The entries that differ from vCPU to vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gdt {
    tls: [u64; selector::TLS_ENTRIES],
    cpu: u16,
}

impl Gdt {
    /// The table of the vCPU with number `cpu`, without TLS entries.
    pub const fn new(cpu: u16) -> Self {
        Self { tls: [0; selector::TLS_ENTRIES], cpu }
    }

    /// The number of the CPU.
    pub const fn cpu(&self) -> u16 {
        self.cpu
    }

    /// The descriptor for `selector` (whose RPL is ignored); `None` beyond the table, for the LDT (there is none),
    /// and where the hypervisor keeps what is not the guest's.
    pub fn descriptor(&self, selector: u16) -> Option<u64> {
        const TABLE_INDICATOR: u16 = 4;
        const TLS_END: u16 = selector::TLS_INDEX + selector::TLS_ENTRIES as u16;
        if selector & TABLE_INDICATOR != 0 {
            return None;
        }
        match selector >> 3 {
            n if n == selector::USER32_CS >> 3 => Some(USER32_CS),
            n if n == selector::USER_DS >> 3 => Some(USER_DS),
            n if n == selector::USER_CS >> 3 => Some(USER_CS),
            n @ selector::TLS_INDEX..TLS_END => {
                self.tls.get(usize::from(n - selector::TLS_INDEX)).copied().filter(|d| *d != 0)
            }
            n if n == selector::CPUNODE >> 3 => Some(CPUNODE | u64::from(self.cpu)),
            _ => None,
        }
    }

    /// Sets the TLS entries, each made harmless: what is not a present 32-bit data segment becomes empty, and
    /// what is gets DPL 3 (hypercall LOAD_TLS).
    pub fn set_tls(&mut self, entries: [u64; selector::TLS_ENTRIES]) {
        self.tls = entries.map(|d| {
            let good = d & bits::PRESENT != 0 && d & bits::CODE == 0 && d & bits::BIG != 0;
            if good { (d | bits::ACCESSED | bits::NON_SYSTEM | bits::DPL3) & !bits::LONG } else { 0 }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_guests_entries() {
        let gdt = Gdt::new(5);
        let visible: Vec<u16> = (0..=0xffff).step_by(8).filter(|s| gdt.descriptor(*s).is_some()).collect();
        assert_eq!(visible, [0x20, 0x28, 0x30, 0x78]);
        assert_eq!(gdt.descriptor(selector::USER_CS), gdt.descriptor(0x30));
        assert_eq!(gdt.descriptor(0x34), None, "the LDT");
        assert_eq!(gdt.descriptor(selector::CPUNODE).map(|d| d & 0xffff), Some(5));
    }

    #[test]
    fn tls_is_sanitised() {
        let mut gdt = Gdt::new(0);
        // DPL 0 system-looking 32-bit data with L set; not present; code.
        gdt.set_tls([0x0060_8200_0000_ffff, 0x0040_7200_0000_ffff, 0x00cf_fb00_0000_ffff]);
        assert_eq!(gdt.descriptor(0x63), Some(0x0040_f300_0000_ffff));
        assert_eq!(gdt.descriptor(0x6b), None);
        assert_eq!(gdt.descriptor(0x73), None);
    }
}
