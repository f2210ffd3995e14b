//! Accessed and dirty bits, INVLPG, PCID and INVPCID, SMEP and SMAP, self-modifying code.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use cpu::state::{cr4, efer, reg};
use cpu::{GuestRam, Outcome, Ram};
use iced_x86::code_asm::*;
use vm_memory::{FileOffset, GuestAddress, GuestMemory as _, MmapRegion};

use crate::harness::*;

/// The page table entry of `address`.
fn entry(address: u64) -> u64 {
    PT + (address >> 12) * 8
}

#[test]
fn reads_set_accessed_and_writes_set_dirty() {
    let mut g = Guest::long();
    g.code(|a| {
        a.mov(eax, dword_ptr(DATA))?;
        a.mov(dword_ptr(DATA + 0x1000), eax)
    });
    g.finish();
    assert_eq!(g.peek::<u64>(entry(DATA)) & 0x60, 0x20);
    assert_eq!(g.peek::<u64>(entry(DATA + 0x1000)) & 0x60, 0x60);
    assert_eq!(g.peek::<u64>(entry(DATA + 0x2000)) & 0x60, 0);
    assert_eq!(g.peek::<u64>(TABLES) & 0x20, 0x20);
}

#[test]
fn a_clean_page_that_was_read_becomes_dirty_when_written() {
    let mut g = Guest::long();
    g.code(|a| {
        a.mov(eax, dword_ptr(DATA))?;
        a.mov(dword_ptr(DATA), eax)
    });
    g.finish();
    assert_eq!(g.peek::<u64>(entry(DATA)) & 0x60, 0x60);
}

#[test]
fn invlpg_makes_a_changed_entry_seen() {
    for flush in [false, true] {
        let mut g = Guest::long();
        g.poke::<u32>(DATA, 1);
        g.poke::<u32>(DATA + 0x1000, 2);
        g.code(|a| {
            a.mov(ebx, dword_ptr(DATA))?;
            a.mov(rax, DATA + 0x1007)?;
            a.mov(qword_ptr(entry(DATA)), rax)?;
            if flush {
                a.invlpg(ptr(DATA))?;
            }
            a.mov(ecx, dword_ptr(DATA))
        });
        g.finish();
        assert_eq!((g.reg(reg::RBX), g.reg(reg::RCX)), (1, if flush { 2 } else { 1 }));
    }
}

/// Turns PCIDs on, reads `DATA` under PCID 1, changes its entry, goes through `between`, and reads again under
/// PCID 1.
fn with_pcid(
    global: bool,
    first: u64,
    between: impl Fn(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>,
) -> u64 {
    let mut g = Guest::long();
    g.poke::<u32>(DATA, 1);
    g.poke::<u32>(DATA + 0x1000, 2);
    let bits = if global { 0x107 } else { 7 };
    g.poke::<u64>(entry(DATA), DATA | bits);
    g.code(|a| {
        a.mov(eax, (cr4::PAE | cr4::PGE | cr4::PCIDE) as u32)?;
        a.mov(cr4, rax)?;
        a.mov(rax, TABLES | first)?;
        a.mov(cr3, rax)?;
        a.mov(ebx, dword_ptr(DATA))?;
        a.mov(rax, (DATA + 0x1000) | bits)?;
        a.mov(qword_ptr(entry(DATA)), rax)?;
        between(a)?;
        a.mov(ecx, dword_ptr(DATA))
    });
    g.finish();
    assert_eq!(g.reg(reg::RBX), 1);
    g.reg(reg::RCX)
}

const NO_FLUSH: u64 = 1 << 63;

fn load_cr3(a: &mut CodeAssembler, value: u64) -> Result<(), iced_x86::IcedError> {
    a.mov(rax, value)?;
    a.mov(cr3, rax)
}

fn invpcid_of(a: &mut CodeAssembler, kind: u64, pcid: u64, address: u64) -> Result<(), iced_x86::IcedError> {
    a.mov(rax, pcid)?;
    a.mov(qword_ptr(DATA + 0x2000), rax)?;
    a.mov(rax, address)?;
    a.mov(qword_ptr(DATA + 0x2008), rax)?;
    a.mov(rax, kind)?;
    a.invpcid(rax, xmmword_ptr(DATA + 0x2000))
}

#[test]
fn translations_are_kept_by_pcid() {
    // Away and back without a flush: what PCID 1 had is still there.
    let stale = with_pcid(false, 1, |a| {
        load_cr3(a, TABLES | 2)?;
        load_cr3(a, TABLES | 1 | NO_FLUSH)
    });
    assert_eq!(stale, 1);
    // With a flush it is gone.
    assert_eq!(with_pcid(false, 1, |a| load_cr3(a, TABLES | 1)), 2);
    // Another PCID does not see it.
    assert_eq!(with_pcid(false, 1, |a| load_cr3(a, TABLES | 2 | NO_FLUSH)), 2);
    // A global page stays through it all.
    assert_eq!(with_pcid(true, 1, |a| load_cr3(a, TABLES | 2)), 1);
}

#[test]
fn the_last_two_pcids_do_not_see_each_other() {
    let other = with_pcid(false, 0xffe, |a| {
        load_cr3(a, TABLES | 5 | NO_FLUSH)?;
        load_cr3(a, TABLES | 0xfff | NO_FLUSH)
    });
    assert_eq!(other, 2);
}

#[test]
fn invpcid_of_each_type() {
    // One address of this PCID, and of another (which may flush more than it must).
    assert_eq!(with_pcid(false, 1, |a| invpcid_of(a, 0, 1, DATA)), 2);
    // All of one PCID.
    assert_eq!(with_pcid(false, 1, |a| invpcid_of(a, 1, 1, 0)), 2);
    assert_eq!(with_pcid(false, 1, |a| invpcid_of(a, 1, 7, 0)), 1);
    assert_eq!(with_pcid(true, 1, |a| invpcid_of(a, 1, 1, 0)), 1);
    // Everything; everything but global pages.
    assert_eq!(with_pcid(true, 1, |a| invpcid_of(a, 2, 0, 0)), 2);
    assert_eq!(with_pcid(true, 1, |a| invpcid_of(a, 3, 0, 0)), 1);
    assert_eq!(with_pcid(false, 1, |a| invpcid_of(a, 3, 0, 0)), 2);
}

#[test]
fn invpcid_refuses_bad_descriptors() {
    for (kind, pcid, address) in [(4, 0, 0), (0, 0x1000, 0), (1, 5, 0), (0, 0, 1 << 63)] {
        let mut g = Guest::long();
        g.code(|a| invpcid_of(a, kind, pcid, address));
        assert_eq!(g.fault(13).error_code, Some(0));
    }
}

#[test]
fn smap_and_stac() {
    let mut g = Guest::long();
    // Code and stack become supervisor pages; DATA stays the user's.
    for page in 0..32 {
        g.poke::<u64>(PT + page * 8, page << 12 | 3);
    }
    g.poke::<u64>(entry(STACK - 8), (STACK - 0x1000) | 3);
    g.vcpu.state.cr4 |= cr4::SMAP;
    g.vcpu.refresh();
    g.code(|a| {
        a.stac()?;
        a.mov(eax, dword_ptr(DATA))?;
        a.clac()?;
        a.mov(ebx, dword_ptr(DATA))
    });
    let t = g.fault(14);
    assert_eq!((t.error_code, g.vcpu.state.cr2), (Some(1), DATA));
}

#[test]
fn smep_forbids_fetches_from_user_pages() {
    let mut g = Guest::long();
    for page in 0..32 {
        g.poke::<u64>(PT + page * 8, page << 12 | 3);
    }
    g.poke::<u64>(entry(STACK - 8), (STACK - 0x1000) | 3);
    g.vcpu.state.cr4 |= cr4::SMEP;
    g.vcpu.refresh();
    g.code(|a| {
        a.mov(eax, DATA as u32)?;
        a.jmp(rax)
    });
    let t = g.fault(14);
    assert_eq!((t.error_code, t.rip, g.vcpu.state.cr2), (Some(0x11), DATA, DATA));
}

#[test]
fn no_execute_follows_efer() {
    let mut g = Guest::long();
    g.poke::<u64>(entry(DATA), DATA | 7 | 1 << 63);
    g.code(|a| {
        a.mov(eax, DATA as u32)?;
        a.jmp(rax)
    });
    assert_eq!(g.fault(14).error_code, Some(0x11));
    // Without NXE the bit is reserved.
    let mut g = Guest::long();
    g.poke::<u64>(entry(DATA), DATA | 7 | 1 << 63);
    g.vcpu.write_msr(0xc000_0080, g.vcpu.state.efer & !efer::NXE).unwrap();
    g.code(|a| a.mov(eax, dword_ptr(DATA)));
    assert_eq!(g.fault(14).error_code, Some(9));
}

#[test]
fn code_that_changes_itself_runs_as_changed() {
    let mut g = Guest::long();
    // Changes the immediate of the next instruction but one, in its own block and in a loop.
    g.code(|a| {
        let mut again = a.create_label();
        let mut patched = a.create_label();
        a.xor(ecx, ecx)?;
        a.set_label(&mut again)?;
        a.lea(rdi, ptr(patched))?;
        a.mov(dword_ptr(rdi + 1), ecx)?;
        a.set_label(&mut patched)?;
        a.mov(eax, -1i32 as u32)?;
        a.add(ebx, eax)?;
        a.inc(ecx)?;
        a.cmp(ecx, 10)?;
        a.jne(again)
    });
    g.finish();
    assert_eq!(g.reg(reg::RBX), 45);
}

#[test]
fn a_write_by_a_device_invalidates_decoded_code() {
    let mut g = Guest::long();
    g.code(|a| a.mov(eax, 1));
    g.finish();
    g.code(|a| a.mov(eax, 2));
    g.resume_at(CODE);
    g.finish();
    assert_eq!(g.reg(reg::RAX), 2);
}

#[test]
fn code_beside_data_is_not_decoded_again() {
    const ROUNDS: u32 = 1000;
    const COUNTER: u64 = CODE + 0xf00;
    let mut g = Guest::long();
    // A function that crosses into the next page, called between stores to the page where it begins.
    g.code_at(CODE + 0xffd, 64, |a| {
        a.add(ebx, 0x100)?;
        a.ret()
    });
    g.code(|a| {
        let mut again = a.create_label();
        a.mov(ecx, ROUNDS)?;
        a.set_label(&mut again)?;
        a.inc(qword_ptr(COUNTER))?;
        a.mov(rdx, CODE + 0xffd)?;
        a.call(rdx)?;
        a.dec(ecx)?;
        a.jne(again)
    });
    g.finish();
    assert_eq!(g.peek::<u64>(COUNTER), u64::from(ROUNDS));
    assert_eq!(g.reg(reg::RBX), u64::from(ROUNDS) * 0x100);
    let stats = &g.vcpu.stats;
    assert!(stats.blocks_decoded < 10, "{} decoded", stats.blocks_decoded);
    assert!(stats.blocks_kept >= u64::from(ROUNDS), "{} kept", stats.blocks_kept);
}

#[test]
fn a_block_that_was_changed_back_is_what_it_was() {
    let mut g = Guest::long();
    for (value, decoded) in [(1_u32, 1), (2, 2), (1, 3), (1, 3)] {
        // As a device writes it: HLT follows at once, and is a part of the block.
        g.code(|a| a.mov(eax, value));
        g.resume_at(CODE);
        g.finish();
        assert_eq!(g.reg(reg::RAX), u64::from(value));
        assert_eq!(g.vcpu.stats.blocks_decoded, decoded);
    }
    assert_eq!(g.vcpu.stats.blocks_kept, 1);
}

#[test]
fn code_that_was_written_to_unseen_runs_as_changed_when_it_is_suspected() {
    let file = File::from(rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(RAM as u64).unwrap();
    let unseen = file.try_clone().unwrap();
    let region = (GuestAddress(0), RAM, Some(FileOffset::new(file, 0)));
    let memory = GuestRam::from_ranges_with_files([region]).unwrap();
    let mut g = Guest::long_on(Arc::new(Ram::new(memory.clone())));
    let suspect = |at: u64, length| {
        let (region, at) = memory.to_region_addr(GuestAddress(at)).unwrap();
        MmapRegion::bitmap(region).suspect(at.0 as usize, length);
    };
    g.code(|a| a.mov(eax, 1));
    g.finish();
    // The immediate operand.
    for (value, kept) in [(1_u32, 1), (2, 1), (2, 2)] {
        unseen.write_all_at(&value.to_le_bytes(), CODE + 1).unwrap();
        suspect(CODE & !0xfff, 0x1000);
        g.resume_at(CODE);
        g.finish();
        assert_eq!(g.reg(reg::RAX), u64::from(value));
        assert_eq!(g.vcpu.stats.blocks_kept, kept);
    }
    suspect(CODE + 0x1000, 0x1000);
    g.resume_at(CODE);
    g.finish();
    assert_eq!(g.vcpu.stats.blocks_kept, 2, "another page was suspected");
}

/// Goes from protected mode to 32-bit or PAE paging with the tables at `TABLES`.
fn turn_on(g: &mut Guest, cr4_value: u64) {
    g.code(|a| {
        a.mov(eax, cr4_value as u32)?;
        a.mov(cr4, eax)?;
        a.mov(eax, TABLES as u32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, 0x8001_0001u32)?;
        a.mov(cr0, eax)?;
        a.mov(ebx, dword_ptr(0x0060_0000))?;
        a.mov(dword_ptr(0x0060_0004), ebx)
    });
}

#[test]
fn paging_with_32_bit_entries() {
    let mut g = Guest::protected();
    // 4 MiB pages: the first one to itself, the second to the same place.
    g.poke::<u32>(TABLES, 0x83);
    g.poke::<u32>(TABLES + 4, 0x83);
    g.poke::<u32>(0x20_0000, 77);
    turn_on(&mut g, cr4::PSE);
    g.finish();
    assert_eq!((g.reg(reg::RBX), g.peek::<u32>(0x20_0004)), (77, 77));
    assert_eq!(g.peek::<u32>(TABLES + 4), 0xe3);
}

#[test]
fn paging_with_page_directory_pointers() {
    let mut g = Guest::protected();
    g.poke::<u64>(TABLES, TABLES + 0x1001);
    g.poke::<u64>(TABLES + 0x1000, 0x83);
    g.poke::<u64>(TABLES + 0x1018, 0x20_0083);
    g.poke::<u32>(0x20_0000, 77);
    turn_on(&mut g, cr4::PAE);
    g.finish();
    assert_eq!((g.reg(reg::RBX), g.peek::<u32>(0x20_0004)), (77, 77));

    // A reserved bit in one of the four is found when they are loaded.
    let mut g = Guest::protected();
    g.poke::<u64>(TABLES, TABLES + 0x1001);
    g.poke::<u64>(TABLES + 0x18, 3);
    turn_on(&mut g, cr4::PAE);
    assert_eq!(g.fault(13).error_code, Some(0));
    assert_eq!(g.vcpu.state.cr0 >> 31, 0);
}

#[test]
fn a_32_bit_instruction_and_its_data_wrap_around_at_4_gib() {
    let mut g = Guest::wrapping();
    // mov eax, [0xfffe], and hlt: two bytes of the first lie before the end, and two of its operand.
    g.poke::<u16>(LAST_PAGE + 0xffe, 0xfea1);
    g.poke::<u32>(0, 0xf400_00ff);
    for stepped in [false, true] {
        g.vcpu.state.set_rip(0xffff_fffe);
        if stepped {
            g.engine.step(&mut g.vcpu);
            g.engine.step(&mut g.vcpu);
        } else {
            assert_eq!(g.run(), Outcome::Halted);
            g.resume_at(0);
        }
        // The operand is the instruction itself.
        assert_eq!((g.reg(reg::RAX), g.vcpu.state.rip()), (0x00ff_fea1, if stepped { 4 } else { 0 }));
        g.vcpu.set_reg(reg::RAX, 0);
    }
}
