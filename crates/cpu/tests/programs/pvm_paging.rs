//! PVM mode: two roots and their translations, address ranges, rights, protection keys, five levels.

use cpu::state::{cr4, reg};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use pvm::Mode;
use pvm::abi::hypercall as call;
use pvm::abi::{GENERATION_1, PvmMsr};

use crate::harness::*;

/// Page tables of further roots, 16 KiB each, laid out as those at [`TABLES`].
const ROOTS: u64 = 0x40_0000;
/// The page that user programs read; two pages with other contents.
const PAGE: u64 = DATA;
const OLD: u64 = 0x5_0000;
const NEW: u64 = 0x5_1000;

/// Root number `n`.
const fn root(n: u64) -> u64 {
    ROOTS + n * 0x4000
}

/// The entry of `address`, below 2 MiB, in the page tables under `root`.
fn entry(root: u64, address: u64) -> u64 {
    root + 0x3000 + (address >> 12) * 8
}

/// Makes root `n`, which maps what [`TABLES`] does; its first 2 MiB are its own.
fn make_root(g: &mut Guest, n: u64) {
    for (level, bits) in [(0, 7), (1, 7), (2, 7)] {
        for index in 0..512 {
            g.poke::<u64>(root(n) + level * 0x1000 + index * 8, g.peek(TABLES + level * 0x1000 + index * 8));
        }
        g.poke::<u64>(root(n) + level * 0x1000, (root(n) + (level + 1) * 0x1000) | bits);
    }
    for index in 0..512 {
        g.poke::<u64>(root(n) + 0x3000 + index * 8, g.peek(PT + index * 8));
    }
}

/// A guest whose user programs run under root 0, where [`OLD`] is mapped at [`PAGE`].
fn two_roots() -> Guest {
    let mut g = Guest::pvm();
    make_root(&mut g, 0);
    g.poke(OLD, 1u32);
    g.poke(NEW, 2u32);
    g.poke(entry(root(0), PAGE), OLD | 7);
    g.vcpu.write_msr(MSR_SWITCH_CR3, root(0)).unwrap();
    g
}

/// Lets the user read `PAGE`, and then runs `between` in supervisor mode behind a change of the page's entry; what the
/// user reads after that.
fn after(between: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> u64 {
    let mut g = two_roots();
    g.pvm_program(Mode::User, |a| {
        a.mov(r12d, dword_ptr(PAGE))?;
        a.syscall()?;
        a.mov(ebp, dword_ptr(PAGE))
    });
    g.code_at(LSTAR, 64, |a| {
        a.mov(rax, NEW | 7)?;
        a.mov(qword_ptr(entry(root(0), PAGE)), rax)?;
        between(a)
    });
    assert_eq!(g.run_pvm(), None);
    assert_eq!(g.reg(12), 1);
    g.code_at(LSTAR, 64, |a| a.nop());
    g.resume_at(RETU);
    assert_eq!(g.run_pvm(), None);
    g.reg(reg::RBP)
}

/// What is still seen.
const STALE: u64 = 1;
const FRESH: u64 = 2;

fn mov_cr3(a: &mut CodeAssembler, value: u64) -> Result<(), IcedError> {
    a.mov(rax, value)?;
    a.mov(cr3, rax)
}

#[test]
fn a_change_of_modes_flushes_nothing() {
    assert_eq!(after(|_| Ok(())), STALE);
    // Nor does a write of the other mode's root, by instruction or by hypercall, even of another root and back.
    assert_eq!(after(|a| write_msr(a, MSR_SWITCH_CR3, root(0))), STALE);
    let wrmsr = |a: &mut CodeAssembler, value| hypercall(a, call::WRMSR, [MSR_SWITCH_CR3.into(), value, 0]);
    let there_and_back = after(|a| {
        wrmsr(a, TABLES)?;
        wrmsr(a, root(0))
    });
    assert_eq!(there_and_back, STALE);
}

#[test]
fn mov_cr3_flushes_the_root_that_it_loads() {
    assert_eq!(after(|a| mov_cr3(a, TABLES)), STALE);
    let both = after(|a| {
        mov_cr3(a, root(0))?;
        mov_cr3(a, TABLES)
    });
    assert_eq!(both, FRESH);
    // With CR4.PCIDE, bit 63 says not to.
    let kept = after(|a| {
        a.mov(rax, cr4)?;
        a.or(eax, cr4::PCIDE as i32)?;
        a.mov(cr4, rax)?;
        hypercall(a, call::LOAD_PGTBL, [0, TABLES, root(0)])
    });
    assert_eq!(kept, FRESH, "a change of CR4.PCIDE flushes");
}

#[test]
fn bit_63_of_cr3_keeps_translations_with_pcids_alone() {
    for pcids in [false, true] {
        let mut g = two_roots();
        if pcids {
            g.vcpu.state.cr4 |= cr4::PCIDE;
            g.vcpu.refresh();
        }
        g.pvm_program(Mode::Supervisor, |a| {
            a.mov(ebx, dword_ptr(PAGE))?;
            a.mov(rax, NEW | 7)?;
            a.mov(qword_ptr(entry(TABLES, PAGE)), rax)?;
            mov_cr3(a, 1 << 63 | TABLES)?;
            a.mov(ebp, dword_ptr(PAGE))
        });
        g.poke(PAGE, 7u32);
        if pcids {
            g.finish_pvm();
            assert_eq!((g.reg(reg::RBX), g.reg(reg::RBP), g.vcpu.state.cr3), (7, 7, TABLES));
        } else {
            assert_eq!(g.pvm_fault(13).error_code, Some(0));
        }
    }
}

#[test]
fn hypercalls_flush_what_they_say() {
    let make = |number, args| move |a: &mut CodeAssembler| hypercall(a, number, args);
    assert_eq!(after(make(call::TLB_FLUSH, [0; 3])), FRESH);
    assert_eq!(after(make(call::TLB_FLUSH_CURRENT, [0; 3])), FRESH);
    assert_eq!(after(make(call::TLB_INVLPG, [PAGE + 0x123, 0, 0])), FRESH);
    assert_eq!(after(make(call::TLB_INVLPG, [0x4000_0000_0000, 0, 0])), STALE);
    assert_eq!(after(make(call::TLB_INVLPG, [1 << 63, 0, 0])), STALE);
    assert_eq!(after(make(call::LOAD_PGTBL, [0, TABLES, root(0)])), STALE);
    assert_eq!(after(make(call::LOAD_PGTBL, [1, TABLES, root(0)])), FRESH);
    // Refused: nothing happens.
    assert_eq!(after(make(call::LOAD_PGTBL, [1 | 4, TABLES, root(0)])), STALE);
    assert_eq!(after(make(call::LOAD_PGTBL, [1, 1 << 60, root(0)])), STALE);
    // The root that is current must be the one that is meant.
    let other = after(|a| {
        hypercall(a, call::WRMSR, [MSR_SWITCH_CR3.into(), TABLES, 0])?;
        hypercall(a, call::TLB_FLUSH_CURRENT, [0; 3])?;
        hypercall(a, call::WRMSR, [MSR_SWITCH_CR3.into(), root(0), 0])
    });
    assert_eq!(other, STALE);
}

#[test]
fn invlpg_and_invpcid_flush_as_on_any_processor() {
    assert_eq!(after(|a| a.invlpg(ptr(PAGE))), FRESH);
    for kind in [2u64, 3] {
        let fresh = after(|a| {
            a.xor(eax, eax)?;
            a.mov(qword_ptr(DATA + 0x1000), rax)?;
            a.mov(qword_ptr(DATA + 0x1008), rax)?;
            a.mov(rax, kind)?;
            a.invpcid(rax, xmmword_ptr(DATA + 0x1000))
        });
        assert_eq!(fresh, FRESH, "type {kind}");
    }
}

#[test]
fn changes_of_paging_flags_flush() {
    // NXE off and on again.
    let fresh = after(|a| {
        write_msr(a, 0xc000_0080, 0)?;
        write_msr(a, 0xc000_0080, 1 << 11)
    });
    assert_eq!(fresh, FRESH);
}

#[test]
fn global_pages_are_tagged_by_root_too() {
    let mut g = two_roots();
    g.vcpu.state.cr4 |= cr4::PGE;
    g.vcpu.refresh();
    g.poke(entry(root(0), PAGE), OLD | 0x107);
    g.poke(entry(TABLES, PAGE), NEW | 0x107);
    g.pvm_program(Mode::Supervisor, |a| {
        mov_cr3(a, root(0))?;
        a.mov(ebx, dword_ptr(PAGE))?;
        mov_cr3(a, TABLES)?;
        a.mov(ebp, dword_ptr(PAGE))?;
        mov_cr3(a, root(0))?;
        a.mov(esi, dword_ptr(PAGE))
    });
    g.finish_pvm();
    assert_eq!((g.reg(reg::RBX), g.reg(reg::RBP), g.reg(reg::RSI)), (1, 2, 1));
}

#[test]
fn each_mode_sees_its_own_root() {
    let mut g = two_roots();
    g.poke(entry(TABLES, PAGE), NEW | 7);
    // The user adds up what it sees, the supervisor what it sees, 20 times.
    g.pvm_program(Mode::User, |a| {
        let mut top = a.create_label();
        a.set_label(&mut top)?;
        a.add(r12d, dword_ptr(PAGE))?;
        a.syscall()?;
        a.dec(r14d)?;
        a.jne(top)?;
        a.ud2()
    });
    g.code_at(LSTAR, 64, |a| {
        a.add(r13d, dword_ptr(PAGE))?;
        a.mov(rsi, cr3)?;
        a.jmp(RETU)
    });
    g.vcpu.set_reg(14, 20);
    let event = g.pvm_fault(6);
    assert_eq!(event.from, Mode::User);
    assert_eq!((g.reg(12), g.reg(13)), (20, 40));
    assert_eq!((g.reg(reg::RSI), g.vcpu.state.cr3), (TABLES, TABLES));
    assert_eq!(g.vcpu.read_msr(MSR_SWITCH_CR3).unwrap(), root(0));
}

#[test]
fn more_roots_than_tags() {
    const COUNT: u64 = 150;
    let mut g = Guest::pvm();
    for n in 0..COUNT {
        make_root(&mut g, n);
        let page = 0x80_0000 + n * 0x1000;
        g.poke(page, n * n + 1);
        g.poke(entry(root(n), PAGE), page | 7);
    }
    // For each number of roots: reads under root 0, goes through so many others without a flush or a look at the
    // page, and reads under the last of them, which may have come by root 0's tag.
    let load_root = |a: &mut CodeAssembler| {
        a.mov(rax, call::LOAD_PGTBL)?;
        a.xor(ebx, ebx)?;
        a.mov(r10, rbp)?;
        a.mov(rdx, TABLES)?;
        a.syscall()
    };
    // Counts in R12 that the page does not hold ESI squared plus one, and in R13 that it was read.
    let check = |a: &mut CodeAssembler| {
        a.mov(rcx, rsi)?;
        a.imul_2(rcx, rsi)?;
        a.inc(rcx)?;
        a.cmp(rcx, qword_ptr(PAGE))?;
        a.setne(cl)?;
        a.movzx(ecx, cl)?;
        a.add(r12, rcx)?;
        a.inc(r13)
    };
    g.pvm_program(Mode::Supervisor, |a| {
        a.mov(edi, 1)?;
        let mut round = a.create_label();
        let mut next = a.create_label();
        a.set_label(&mut round)?;
        a.mov(rbp, ROOTS)?;
        a.xor(esi, esi)?;
        load_root(a)?;
        check(a)?;
        a.set_label(&mut next)?;
        a.add(rbp, 0x4000)?;
        a.inc(esi)?;
        load_root(a)?;
        a.cmp(esi, edi)?;
        a.jne(next)?;
        check(a)?;
        a.inc(edi)?;
        a.cmp(edi, COUNT as u32)?;
        a.jne(round)
    });
    g.finish_pvm();
    assert_eq!((g.reg(12), g.reg(13)), (0, 2 * (COUNT - 1)), "wrong, read");
}

#[test]
fn load_pgtbl_sets_both_roots() {
    let mut g = two_roots();
    make_root(&mut g, 1);
    g.pvm_program(Mode::Supervisor, |a| {
        hypercall(a, call::LOAD_PGTBL, [0, root(1), root(0)])?;
        a.mov(rsi, cr3)
    });
    g.finish_pvm();
    assert_eq!((g.reg(reg::RAX), g.reg(reg::RSI), g.vcpu.state.cr3), (0, root(1), root(1)));
    assert_eq!(g.vcpu.read_msr(MSR_SWITCH_CR3).unwrap(), root(0));
}

/// The address in PML4 slot `slot`, of the upper half, at which [`map_slots`] maps `DATA`.
const fn in_slot(slot: u64) -> u64 {
    0xffff << 48 | slot << 39 | DATA
}

/// Maps the first 512 GiB again in every slot of the upper half.
fn map_slots(g: &mut Guest) {
    for slot in 256..512 {
        g.poke(TABLES + slot * 8, TABLES + 0x1007);
    }
}

/// Reads, writes or fetches at an address in RDI.
const ACCESSES: [(&str, &[u8], u32); 3] =
    [("read", &[0x8b, 0x07], 0), ("write", &[0x89, 0x07], 2), ("fetch", &[0xff, 0xe7], 0x10)];

#[test]
fn walks_are_confined_to_the_ranges() {
    for mode in MODES {
        let user = if mode == Mode::User { 4 } else { 0 };
        for slot in [256, 401, 402, 403, 433, 434, 510, 511] {
            let address = in_slot(slot);
            for (name, bytes, code) in ACCESSES {
                let mut g = Guest::pvm_in(mode, |a| a.db(bytes));
                map_slots(&mut g);
                // A jump there ends at once.
                g.poke(DATA, 0x0b0fu16);
                g.vcpu.set_reg(reg::RDI, address);
                let event = g.run_pvm();
                if (402..434).contains(&slot) {
                    let vector = event.map(|e| e.vector);
                    assert_eq!(vector, (name == "fetch").then_some(6), "{name} in slot {slot} in {mode:?}");
                } else {
                    let event = event.unwrap_or_else(|| panic!("{name} in slot {slot} in {mode:?} went"));
                    assert_eq!(
                        (event.vector, event.error_code),
                        (14, Some(code | user)),
                        "{name} in slot {slot}"
                    );
                    assert_eq!(event.rip, if name == "fetch" { address } else { CODE });
                    assert_eq!(g.pvcs(GENERATION_1.pvcs.cr2), address);
                }
            }
        }
    }
}

#[test]
fn an_access_across_the_end_of_a_range_faults_behind_it() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| a.mov(rax, qword_ptr(rdi)));
    map_slots(&mut g);
    // The last page of the range, and what would be the page behind it.
    g.poke(TABLES + 0x1000 + 511 * 8, TABLES + 0x2007);
    g.poke(TABLES + 0x2000 + 511 * 8, PT | 7);
    let end = 0xffffu64 << 48 | 434 << 39;
    g.vcpu.set_reg(reg::RDI, end - 4);
    let event = g.pvm_fault(14);
    assert_eq!((event.error_code, g.pvcs(GENERATION_1.pvcs.cr2)), (Some(0), end));
}

#[test]
fn without_nx_a_confined_fetch_is_not_told_apart() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| a.jmp(rdi));
    map_slots(&mut g);
    g.vcpu.write_msr(0xc000_0080, 0).unwrap();
    g.vcpu.set_reg(reg::RDI, in_slot(300));
    assert_eq!(g.pvm_fault(14).error_code, Some(0));
}

#[test]
fn ranges_that_become_narrower_count_at_once() {
    let narrow = pvm::AddressRanges::new(402..405, Some(402..405)).unwrap();
    let index = GENERATION_1.msr_index(PvmMsr::LinearAddressRange).unwrap();
    assert_eq!(index, MSR_RANGE);
    let by_instruction = |a: &mut CodeAssembler, value: u64| write_msr(a, MSR_RANGE, value);
    let by_hypercall =
        |a: &mut CodeAssembler, value: u64| hypercall(a, call::WRMSR, [MSR_RANGE.into(), value, 0]);
    type Write = fn(&mut CodeAssembler, u64) -> Result<(), IcedError>;
    let ways: [Write; 2] = [by_instruction, by_hypercall];
    for write in ways {
        let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
            a.mov(rdi, in_slot(410))?;
            a.mov(eax, dword_ptr(rdi))?;
            write(a, narrow.msr())?;
            a.mov(rsi, in_slot(404))?;
            a.mov(eax, dword_ptr(rsi))?;
            a.mov(eax, dword_ptr(rdi))
        });
        map_slots(&mut g);
        let event = g.pvm_fault(14);
        assert_eq!((event.error_code, g.pvcs(GENERATION_1.pvcs.cr2)), (Some(0), in_slot(410)));
        assert_eq!(g.vcpu.read_msr(MSR_RANGE).unwrap(), narrow.msr());
    }
    // They do not become wider again: #GP, or -EINVAL.
    let wide = pvm::AddressRanges::new(402..406, Some(402..405)).unwrap();
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        write_msr(a, MSR_RANGE, narrow.msr())?;
        hypercall(a, call::WRMSR, [MSR_RANGE.into(), wide.msr(), 0])?;
        a.mov(r12, rax)?;
        write_msr(a, MSR_RANGE, wide.msr())
    });
    assert_eq!(g.pvm_fault(13).error_code, Some(0));
    assert_eq!(g.reg(12), call::EINVAL);
    assert_eq!(g.vcpu.read_msr(MSR_RANGE).unwrap(), narrow.msr());
}

/// A PML5 table, which has the PML4 table [`TABLES`] in some of its slots.
const PML5: u64 = ROOTS + 0x10_0000;

fn five_levels(g: &mut Guest) {
    map_slots(g);
    for slot in [0, 1, 300, 402, 511] {
        g.poke(PML5 + slot * 8, TABLES | 7);
    }
}

#[test]
fn load_pgtbl_changes_the_number_of_levels() {
    if !cpu::Cpuid::default().has("LA57") {
        eprintln!("skipped: no 5-level paging");
        return;
    }
    let mut g = Guest::pvm();
    five_levels(&mut g);
    g.poke(DATA, 77u32);
    g.pvm_program(Mode::Supervisor, |a| {
        hypercall(a, call::LOAD_PGTBL, [2, PML5, PML5])?;
        a.mov(rsi, cr4)?;
        a.mov(rdi, 1 << 48 | DATA)?;
        a.mov(ebp, dword_ptr(rdi))?;
        a.mov(rdi, 0xff92 << 48 | DATA)?; // slot 402 of the PML5 table
        a.add(ebp, dword_ptr(rdi))?;
        a.mov(rdi, in_slot(403))?;
        a.add(ebp, dword_ptr(rdi))?;
        hypercall(a, call::LOAD_PGTBL, [0, TABLES, TABLES])?;
        a.mov(r12, cr4)?;
        a.mov(rdi, 1 << 48 | DATA)?;
        a.mov(ebp, dword_ptr(rdi))
    });
    let event = g.pvm_fault(13);
    assert_eq!(event.error_code, Some(0), "not canonical with four levels");
    assert_eq!(g.reg(reg::RBP), 3 * 77);
    assert_eq!((g.reg(reg::RSI) & cr4::LA57, g.reg(12) & cr4::LA57), (cr4::LA57, 0));
    assert_eq!(g.vcpu.state.cr3, TABLES);
}

#[test]
fn without_five_levels_load_pgtbl_loads_tables_of_four() {
    let mut g = Guest::pvm_without("LA57");
    five_levels(&mut g);
    g.poke(DATA, 77u32);
    g.pvm_program(Mode::Supervisor, |a| {
        hypercall(a, call::LOAD_PGTBL, [3, TABLES, PML5])?;
        a.mov(rsi, cr4)?;
        a.mov(ebp, dword_ptr(DATA))?;
        a.mov(rdi, in_slot(403))?;
        a.add(ebp, dword_ptr(rdi))
    });
    g.finish_pvm();
    assert_eq!((g.reg(reg::RAX), g.reg(reg::RSI) & cr4::LA57, g.reg(reg::RBP)), (0, 0, 2 * 77));
    assert_eq!(g.vcpu.read_msr(MSR_SWITCH_CR3).unwrap(), PML5);
    g.pvm_program(Mode::Supervisor, |a| {
        a.mov(rdi, 1 << 48 | DATA)?;
        a.mov(ebp, dword_ptr(rdi))
    });
    assert_eq!(g.pvm_fault(13).error_code, Some(0), "not canonical");
}

#[test]
fn ranges_of_five_levels() {
    if !cpu::Cpuid::default().has("LA57") {
        eprintln!("skipped: no 5-level paging");
        return;
    }
    for (address, allowed) in [
        (0x00ff_0000_0002_0000, true),
        ((0xfe00 | 402) << 48 | DATA, true),
        ((0xfe00 | 300) << 48 | DATA, false),
        (in_slot(402), true),
        (in_slot(401), false),
    ] {
        let mut g = Guest::pvm();
        five_levels(&mut g);
        g.poke(PML5 + 255 * 8, TABLES | 7);
        g.pvm_program(Mode::Supervisor, |a| {
            hypercall(a, call::LOAD_PGTBL, [2, PML5, PML5])?;
            a.mov(rdi, address)?;
            a.mov(ebp, dword_ptr(rdi))
        });
        let event = g.run_pvm();
        assert_eq!(
            event.map(|e| (e.vector, e.error_code)),
            (!allowed).then_some((14, Some(0))),
            "{address:#x}"
        );
    }
}

#[test]
fn rights_of_pages_by_mode() {
    const NX: u64 = 1 << 63;
    // Bits of the entry; then, for supervisor and user, the error codes of a read, a write and a fetch.
    let cases: [(u64, [[Option<u32>; 3]; 2]); 6] = [
        (7, [[None; 3]; 2]),
        (3, [[None; 3], [Some(5), Some(7), Some(0x15)]]),
        // WP is always on.
        (5, [[None, Some(3), None], [None, Some(7), None]]),
        (1, [[None, Some(3), None], [Some(5), Some(7), Some(0x15)]]),
        (7 | NX, [[None, None, Some(0x11)], [None, None, Some(0x15)]]),
        (0, [[Some(0), Some(2), Some(0x10)], [Some(4), Some(6), Some(0x14)]]),
    ];
    for (bits, expected) in cases {
        for (mode, codes) in MODES.into_iter().zip(expected) {
            for ((name, bytes, _), code) in ACCESSES.into_iter().zip(codes) {
                let mut g = Guest::pvm_in(mode, |a| a.db(bytes));
                g.poke(entry(TABLES, PAGE), PAGE | bits);
                g.poke(PAGE, 0x0b0fu16);
                g.vcpu.set_reg(reg::RDI, PAGE);
                let event = g.run_pvm();
                let what = format!("{name} with {bits:#x} in {mode:?}");
                match code {
                    Some(code) => {
                        let event = event.unwrap_or_else(|| panic!("{what} went"));
                        assert_eq!(
                            (event.from, event.vector, event.error_code),
                            (mode, 14, Some(code)),
                            "{what}"
                        );
                        assert_eq!(g.pvcs(GENERATION_1.pvcs.cr2), PAGE);
                    }
                    None => {
                        let ud2 = (name == "fetch").then_some(6);
                        assert_eq!(event.map(|e| e.vector), ud2, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn clearing_wp_has_no_effect() {
    let mut g = Guest::pvm_in(Mode::Supervisor, |a| {
        a.mov(rax, cr0)?;
        a.btr(rax, 16)?;
        a.mov(cr0, rax)?;
        a.mov(dword_ptr(PAGE), eax)
    });
    g.poke(entry(TABLES, PAGE), PAGE | 5);
    assert_eq!(g.pvm_fault(14).error_code, Some(3));
}

/// A guest with CR4.PKE and, if `pks`, CR4.PKS; `None` where there are no keys.
fn with_keys(pks: bool) -> Option<Guest> {
    let mut g = Guest::pvm();
    let cpuid = cpu::Cpuid::default();
    if !cpuid.has("PKU") || pks && !cpuid.has("PKS") {
        eprintln!("skipped: no protection keys for this mode");
        return None;
    }
    let bits = cr4::PKE | if pks { cr4::PKS } else { 0 };
    g.pvm_program(Mode::Supervisor, |a| {
        a.mov(rax, cr4)?;
        a.mov(rbx, bits)?;
        a.or(rax, rbx)?;
        a.mov(cr4, rax)
    });
    g.finish_pvm();
    // Key 1 for a user page, key 2 for a supervisor page.
    g.poke(entry(TABLES, DATA), DATA | 7 | 1 << 59);
    g.poke(entry(TABLES, DATA + 0x1000), (DATA + 0x1000) | 3 | 2 << 59);
    Some(g)
}

#[test]
fn supervisor_keys_need_user_keys() {
    let Some(mut g) = with_keys(true) else { return };
    let both = g.vcpu.state.cr4;
    // Neither can the other bit be cleared alone.
    for (from, to, refused) in [
        (both, both & !cr4::PKE, true),
        (both & !(cr4::PKE | cr4::PKS), both & !cr4::PKE, true),
        (both & !(cr4::PKE | cr4::PKS), both, false),
        (both, both & !cr4::PKS, false),
        (both, both & !(cr4::PKE | cr4::PKS), false),
    ] {
        g.vcpu.state.cr4 = from;
        g.vcpu.refresh();
        g.pvm_program(Mode::Supervisor, |a| {
            a.mov(rax, to)?;
            a.mov(cr4, rax)
        });
        let event = g.run_pvm().map(|e| (e.vector, e.error_code));
        assert_eq!(event, refused.then_some((13, Some(0))), "{from:x} to {to:x}");
        assert_eq!(g.vcpu.state.cr4, if refused { from } else { to });
    }
    // Who comes into PVM mode so loses it.
    let mut g = Guest::long_before_pvm();
    g.vcpu.state.cr4 |= cr4::PKS;
    g.vcpu.refresh();
    g.code(|a| a.nop());
    g.engine.step(&mut g.vcpu);
    assert_eq!((g.vcpu.pvm_mode(), g.vcpu.state.cr4 & cr4::PKS), (Mode::Supervisor, 0));
}

/// PKRU that denies access by, or only writes to, what has key `key`.
const fn no_access(key: u32) -> u32 {
    1 << (key * 2)
}
const fn no_write(key: u32) -> u32 {
    2 << (key * 2)
}

#[test]
fn keys_of_users_come_from_the_shared_structure() {
    let Some(mut g) = with_keys(false) else { return };
    let p = &GENERATION_1.pvcs;
    for (keys, bytes, code) in [
        (0, &[0x8b, 0x07][..], None),
        (no_access(1), &[0x8b, 0x07], Some(0x25)),
        (no_access(1), &[0x89, 0x07], Some(0x27)),
        (no_write(1), &[0x8b, 0x07], None),
        (no_write(1), &[0x89, 0x07], Some(0x27)),
        (no_access(2) | no_write(3), &[0x89, 0x07], None),
    ] {
        g.set_pvcs(p.pkru, keys.into());
        g.pvm_program(Mode::User, |a| a.db(bytes));
        assert_eq!(g.vcpu.state.pkru, keys);
        g.vcpu.set_reg(reg::RDI, DATA);
        let event = g.run_pvm();
        assert_eq!(event.map(|e| (e.vector, e.error_code)), code.map(|c| (14, Some(c))), "{keys:#x}");
        assert_eq!(g.pvcs(p.pkru), u64::from(keys), "saved");
        assert_eq!(g.vcpu.state.pkru, 0, "supervisors may do everything");
        // Without CR4.PKS they may do so whatever the register says.
        g.pvm_program(Mode::Supervisor, |a| {
            a.mov(eax, -1)?;
            a.xor(ecx, ecx)?;
            a.xor(edx, edx)?;
            a.wrpkru()?;
            a.mov(dword_ptr(DATA), eax)?;
            a.xor(eax, eax)?;
            a.wrpkru()
        });
        g.finish_pvm();
    }
}

#[test]
fn a_users_keys_are_its_own_registers() {
    let Some(mut g) = with_keys(false) else { return };
    g.set_pvcs(GENERATION_1.pvcs.pkru, 0);
    g.pvm_program(Mode::User, |a| {
        a.mov(eax, dword_ptr(DATA))?;
        a.mov(eax, no_access(1))?;
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.wrpkru()?;
        a.rdpkru()?;
        a.mov(r12d, eax)?;
        a.mov(eax, dword_ptr(DATA))
    });
    let event = g.pvm_fault(14);
    assert_eq!((event.error_code, g.reg(12)), (Some(0x25), no_access(1).into()));
    assert_eq!(g.pvcs(GENERATION_1.pvcs.pkru), u64::from(no_access(1)));
}

#[test]
fn keys_of_supervisors_are_pkrs_and_cover_all_pages() {
    const MSR_PKRS: u32 = 0x6e1;
    let Some(mut g) = with_keys(true) else { return };
    for (address, keys, write, code) in [
        (DATA, no_access(1), false, Some(0x21)),
        (DATA, no_write(1), true, Some(0x23)),
        (DATA, no_write(1), false, None),
        (DATA + 0x1000, no_access(2), false, Some(0x21)),
        (DATA + 0x1000, no_write(2), true, Some(0x23)),
        (DATA + 0x1000, no_access(1), true, None),
    ] {
        // By RDMSR and WRMSR, in force at once.
        g.pvm_program(Mode::Supervisor, |a| {
            write_msr(a, MSR_PKRS, keys.into())?;
            a.xor(ecx, ecx)?;
            a.rdpkru()?;
            a.mov(r12d, eax)?;
            if write { a.mov(dword_ptr(address), eax) } else { a.mov(eax, dword_ptr(address)) }
        });
        let event = g.run_pvm();
        assert_eq!(event.map(|e| (e.vector, e.error_code)), code.map(|c| (14, Some(c))), "{keys:#x}");
        assert_eq!(g.reg(12), u64::from(keys), "RDPKRU shows PKRS");
        // Loaded again on entry from user mode.
        g.set_pvcs(GENERATION_1.pvcs.pkru, 0);
        g.pvm_program(Mode::User, |a| a.mov(eax, dword_ptr(DATA)));
        assert_eq!(g.run_pvm(), None);
        assert_eq!(g.vcpu.state.pkru, keys);
    }
}
