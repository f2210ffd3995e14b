//! Any registers over any bytes: there is always an answer.

use mmu::testing::{Choices, FlatMemory, any_access, any_state, translate_anything};
use mmu::{Gpa, Gva, PageFormat, PageTableMemory, PageWalk};

/// The body of the fuzz target, about a second of it: from seeds, and from short inputs as a fuzzer starts with.
#[test]
fn a_second_of_fuzzing() {
    for seed in 0..800_000 {
        translate_anything(&mut Choices::seeded(seed));
    }
    let mut bytes = Vec::new();
    let mut choices = Choices::seeded(1);
    for _ in 0..100_000 {
        if bytes.len() > 400 {
            bytes.clear();
        }
        // Extreme words are likelier to matter than random ones.
        let word = [0, u64::MAX, 1 << 63, 0x80, choices.word()];
        bytes.extend_from_slice(&choices.one_of(&word).to_le_bytes());
        translate_anything(&mut Choices::from_bytes(&bytes));
    }
}

/// Memory that holds the same everywhere, however far.
struct Everywhere(u64);

impl PageTableMemory for Everywhere {
    fn read_u32(&self, _: Gpa) -> Option<u32> {
        Some(self.0 as u32)
    }

    fn read_u64(&self, _: Gpa) -> Option<u64> {
        Some(self.0)
    }

    fn compare_exchange_u32(&self, _: Gpa, _: u32, _: u32) -> Option<bool> {
        Some(true)
    }

    fn compare_exchange_u64(&self, _: Gpa, _: u64, _: u64) -> Option<bool> {
        Some(true)
    }
}

/// Whatever entry memory is full of, a walk ends, inside the physical address width.
#[test]
fn addresses_stay_within_the_physical_width() {
    let mut choices = Choices::seeded(3);
    for _ in 0..100_000 {
        let state = any_state(&mut choices);
        let entry = choices.word() | 1;
        // Half of them with nothing reserved in the address.
        let entry = if choices.once_in(2) { entry & 0x8000_000f_ffff_f07f } else { entry };
        let walk = PageWalk::new(&state);
        let (gva, access) = (Gva(choices.word()), any_access(&mut choices));
        if let Ok(found) = walk.translate(&Everywhere(entry), gva, access) {
            // In 32-bit paging and without paging, addresses of 32 bits are always there.
            let width = u32::from(state.maxphyaddr).clamp(32, 52);
            assert_eq!(found.gpa.0 >> width, 0, "{found:x?} {state:x?}");
            let mask = found.page_size.bytes() - 1;
            assert_eq!(found.gpa.0 & mask, gva.0 & mask, "{found:x?}");
        }
    }
}

/// Where nothing answers, entries read as all ones: malformed, in every format that has reserved bits.
#[test]
fn no_memory_reads_as_all_ones() {
    let nothing = FlatMemory::new(0);
    let ones = Everywhere(u64::MAX);
    let mut choices = Choices::seeded(4);
    for _ in 0..20_000 {
        let mut state = any_state(&mut choices);
        state.cr3 &= !0xfff;
        let walk = PageWalk::new(&state);
        let (gva, access) = (Gva(choices.word()), any_access(&mut choices));
        assert_eq!(walk.translate(&nothing, gva, access), walk.translate(&ones, gva, access));
        if walk.format().levels() >= 4 {
            let fault = walk.translate(&nothing, gva, access).unwrap_err();
            assert_eq!(fault.error_code & 9, 9, "reserved bits");
        }
    }
    assert!(mmu::load_pdptrs(&nothing, 0, 52).is_err());
}

/// Readers of entries have an answer for any entry at any level.
#[test]
fn any_entry_can_be_read() {
    let mut choices = Choices::seeded(5);
    for _ in 0..20_000 {
        let format = PageFormat::new(&any_state(&mut choices));
        let entry = choices.word();
        for level in 0..=u8::MAX {
            let _ = format.is_malformed(entry, level);
            let _ = (format.frame(entry, level), format.index(entry, level), format.page_size(level));
        }
        let _ = (format.rights(entry), format.flags(entry), format.pkey(entry));
    }
}
