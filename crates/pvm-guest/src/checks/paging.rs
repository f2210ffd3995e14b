//! Address spaces and the TLB (specification, "Paging", "TLB", "Exclusive address ranges").

use super::prelude::*;
use crate::abi::pf;
use crate::memory::PageFrame;
use crate::paging::{Tree, rights};

pub(super) static GROUP: Group = group(
    "paging",
    &[
        check("supervisor-reads-user-page", supervisor_reads_user_page),
        check("supervisor-executes-user-page", supervisor_executes_user_page),
        check("write-protect", write_protect),
        check("no-execute-user-page", no_execute_user_page),
        check("outside-range", outside_range),
        check("outside-range-user", outside_range_user),
        check("non-canonical", non_canonical),
        check("tlb-invlpg", tlb_invlpg),
        check("tlb-flush", tlb_flush),
        check("tlb-flush-current", tlb_flush_current),
        check("tlb-load-pgtbl", tlb_load_pgtbl),
        check("plain-invlpg", plain_invlpg),
        check("plain-mov-cr3", plain_mov_cr3),
        check("user-page-flushed-from-supervisor", user_page_flushed),
        check("tagged-by-root", tagged_by_root),
        check("accessed-and-dirty", accessed_and_dirty),
    ],
);

fn load(m: &Machine, at: u64) -> Result<u64, Stop> {
    let mut r = Registers { rdi: at, ..Registers::default() };
    no_fault(m.cpu.run(s::s_load, &mut r))?;
    Ok(r.rax)
}

/// There is no SMAP.
fn supervisor_reads_user_page(m: &Machine) -> Verdict {
    m.space.data[3].set_word(0, 0x6162_6364);
    equal("the word", load(m, user_space::DATA + 0x3000)?, 0x6162_6364u64)
}

/// There is no SMEP.
fn supervisor_executes_user_page(m: &Machine) -> Verdict {
    let mut r = Registers { rdi: user_address(u::u_return), ..Registers::default() };
    no_fault(m.cpu.run(s::s_call, &mut r))?;
    equal("RAX", r.rax, 0x600du64)
}

/// CR0.WP is on: user pages that are read-only are so for the supervisor.
fn write_protect(m: &Machine) -> Verdict {
    m.space.map_user(user_space::TEST, PageFrame::new(), rights::USER_CONSTANT);
    let event = m.cpu.run(s::s_store, &mut Registers { rdi: user_space::TEST, ..marked() });
    fault(event, vector::PF, pf::PRESENT | pf::WRITE).map(drop)
}

/// The guest's replacement for SMEP.
fn no_execute_user_page(m: &Machine) -> Verdict {
    let at = user_space::DATA + 0x1000;
    let event = m.cpu.run(s::s_call, &mut Registers { rdi: at, ..marked() });
    fault(event, vector::PF, pf::PRESENT | pf::FETCH).map(drop)
}

/// An upper-half address that the range does not have: the last PML4 slot never is in it.
const OUTSIDE: u64 = 0xffff_ffff_8000_0000;

/// Page tables may map it; it does not count.
fn outside_range(m: &Machine) -> Verdict {
    m.space.map_kernel(OUTSIDE, PageFrame::new(), rights::DATA);
    let [start, end] = [0, 16].map(|shift| rdmsr(msr(PvmMsr::LinearAddressRange)) >> shift & 0x1ff);
    let mut outside = [OUTSIDE; 3];
    if start > 256 {
        outside[1] = 0xffff << 48 | 256 << 39;
        m.space.map_kernel(outside[1], PageFrame::new(), rights::DATA);
    }
    if end < 511 {
        outside[2] = 0xffff << 48 | end << 39;
        m.space.map_kernel(outside[2], PageFrame::new(), rights::DATA);
    }
    for at in outside {
        let event = m.cpu.run(s::s_load, &mut Registers { rdi: at, ..marked() });
        let event = fault(event, vector::PF, 0)?;
        equal("cr2", event.cr2, at)?;
        let event = m.cpu.run(s::s_store, &mut Registers { rdi: at, ..marked() });
        fault(event, vector::PF, pf::WRITE)?;
    }
    Ok(())
}

fn outside_range_user(m: &Machine) -> Verdict {
    m.space.user.map(OUTSIDE, PageFrame::new().address(), rights::USER_DATA);
    crate::space::flush();
    let mut program = User::at(u::u_store);
    program.registers.rdi = OUTSIDE;
    let exit = m.cpu.enter(&program);
    ended_by(&exit, vector::PF)?;
    // Underneath it may be the host's page, which is present and not for users.
    one_of(
        "the error code but for PRESENT",
        exit.pvcs.event_errcode & !pf::PRESENT,
        &[(pf::USER | pf::WRITE).into()],
    )?;
    equal("cr2", exit.pvcs.cr2, OUTSIDE)
}

fn non_canonical(m: &Machine) -> Verdict {
    let event = m.cpu.run(s::s_load, &mut Registers { rdi: 1 << 63, ..marked() });
    fault(event, vector::GP, 0)?;
    let mut program = User::at(u::u_load);
    program.registers.rdi = 1 << 62;
    ended_by_fault(&m.cpu.enter(&program), vector::GP, 0)
}

/// Maps a page, reads it, maps another there, has `drop_translation` do its work, and reads again: the new one.
fn observe(m: &Machine, drop_translation: impl FnOnce(u64) -> Verdict) -> Verdict {
    let (old, new) = (PageFrame::new(), PageFrame::new());
    old.set_word(0, 0x6f6c64);
    new.set_word(0, 0x6e6577);
    let at = m.space.test() + 0x20_0000;
    m.space.map_kernel(at, old, rights::DATA);
    equal("the word before", load(m, at)?, old.word(0))?;
    m.space.kernel.map(at, new.address(), rights::DATA);
    drop_translation(at)?;
    equal("the word afterwards", load(m, at)?, new.word(0))
}

fn tlb_invlpg(m: &Machine) -> Verdict {
    observe(m, |at| equal("the answer", insn::hypercall(hc::TLB_INVLPG, [at, 0, 0, 0]), 0u64))
}

fn tlb_flush(m: &Machine) -> Verdict {
    observe(m, |_| equal("the answer", insn::hypercall(hc::TLB_FLUSH, [0; 4]), 0u64))
}

fn tlb_flush_current(m: &Machine) -> Verdict {
    observe(m, |_| equal("the answer", insn::hypercall(hc::TLB_FLUSH_CURRENT, [0; 4]), 0u64))
}

fn tlb_load_pgtbl(m: &Machine) -> Verdict {
    let roots = [hc::LOAD_PGTBL_FLUSH, m.space.kernel.root(), m.space.user.root(), 0];
    observe(m, |_| equal("the answer", insn::hypercall(hc::LOAD_PGTBL, roots), 0u64))
}

/// For a guest that makes no hypercalls.
fn plain_invlpg(m: &Machine) -> Verdict {
    observe(m, |at| no_fault(m.cpu.run(s::s_invlpg, &mut Registers { rdi: at, ..Registers::default() })))
}

fn plain_mov_cr3(m: &Machine) -> Verdict {
    let root = m.space.kernel.root();
    observe(m, |_| no_fault(m.cpu.run(s::s_set_cr3, &mut Registers { rax: root, ..Registers::default() })))
}

/// TLB_FLUSH_CURRENT is for both current roots.
fn user_page_flushed(m: &Machine) -> Verdict {
    for number in [hc::TLB_FLUSH_CURRENT, hc::TLB_FLUSH] {
        let (old, new) = (PageFrame::new(), PageFrame::new());
        old.set_word(0, 1);
        new.set_word(0, 2);
        m.space.map_user(user_space::TEST, old, rights::USER_DATA);
        let mut program = User::at(u::u_load);
        program.registers.rdi = user_space::TEST;
        equal("the word before", m.cpu.enter(&program).registers.rax, 1u64)?;
        m.space.user.map(user_space::TEST, new.address(), rights::USER_DATA);
        insn::hypercall(number, [0; 4]);
        equal("the word afterwards", m.cpu.enter(&program).registers.rax, 2u64)?;
    }
    Ok(())
}

/// Translations belong to a root: changing it needs no flush to be seen.
fn tagged_by_root(m: &Machine) -> Verdict {
    let at = 5 << 39;
    let trees = [m.space.kernel, Tree::new()];
    for n in 256..512 {
        trees[1].root_frame().set_word(n, m.space.kernel.root_frame().word(n));
    }
    for (n, tree) in (1u64..).zip(trees) {
        let frame = PageFrame::new();
        frame.set_word(0, n);
        tree.map(at, frame.address(), rights::DATA);
    }
    crate::space::flush();
    for _ in 0..3 {
        for (n, tree) in (1u64..).zip(trees) {
            insn::hypercall(hc::LOAD_PGTBL, [0, tree.root(), m.space.user.root(), 0]);
            equal("the word", load(m, at)?, n)?;
        }
    }
    Ok(())
}

/// The hypervisor sets them as the processor would.
fn accessed_and_dirty(m: &Machine) -> Verdict {
    const ACCESSED: u64 = 1 << 5;
    const DIRTY: u64 = 1 << 6;
    let at = m.space.test() + 0x30_0000;
    let frame = PageFrame::new();
    m.space.map_kernel(at, frame, rights::DATA);
    let bits = || m.space.kernel.map(at, frame.address(), rights::DATA) & (ACCESSED | DIRTY);
    let _ = bits();
    crate::space::flush();
    load(m, at)?;
    equal("after a load", bits(), ACCESSED)?;
    crate::space::flush();
    no_fault(m.cpu.run(s::s_store, &mut Registers { rdi: at, ..marked() }))?;
    equal("after a store", bits(), ACCESSED | DIRTY)
}
