//! `hostile=NAME`: one thing that no kernel should do, for tests of the hypervisor: it may refuse, deliver a fault, or end
//! this guest by a triple fault, but nothing else may come of it. What came is said on the serial port, if the guest
//! lives to say it; `hostile=list` names them all.

use crate::abi::{PvmMsr, hypercall as hc, msr, rflags, vector, x86_msr};
use crate::cpu::{Registers, User, user_address, user_space};
use crate::entry::{self, Trap, supervisor as s, user as u};
use crate::lapic::{self, command};
use crate::memory::{PAGE, PageFrame, physical};
use crate::paging::rights;
use crate::report::Machine;
use crate::space::{rdmsr, wrmsr};
use crate::{cpu::Cpu, insn, say};

/// One of them.
#[derive(Clone, Copy, Debug)]
pub struct Deed {
    name: &'static str,
    run: fn(&Machine),
}

const fn deed(name: &'static str, run: fn(&Machine)) -> Deed {
    Deed { name, run }
}

/// All of them.
pub static DEEDS: &[Deed] = &[
    deed("pvcs-outside-memory", |m| pvcs(m, &[1 << 38, 1 << 51, 1 << 52, u64::MAX << 12])),
    deed("pvcs-on-mmio", |m| pvcs(m, &[0xfee0_0000, 0xfec0_0000, 0xe000_0000])),
    deed("pvcs-on-page-table", |m| pvcs(m, &[m.space.kernel.root()])),
    deed("pvcs-on-code", |m| pvcs(m, &[physical(entry::event_entry as *const u8).0 & !0xfff])),
    deed("entry-non-canonical", entry_non_canonical),
    deed("entry-unmapped", entry_unmapped),
    deed("entry-in-user-memory", entry_in_user_memory),
    deed("syscall-entry-unmapped", syscall_entry_unmapped),
    deed("red-zone-wraps", red_zone_wraps),
    deed("stack-unmapped", stack_unmapped),
    deed("stack-read-only", stack_read_only),
    deed("supervisor-rsp-wild", supervisor_rsp_wild),
    deed("retu-in-user-memory", retu_in_user_memory),
    deed("rets-on-bad-stack", rets_on_bad_stack),
    deed("roots-refused", roots_refused),
    deed("root-outside-memory", |m| root(m, 1 << 38)),
    deed("root-on-mmio", |m| root(m, 0xfee0_0000)),
    deed("root-of-garbage", |m| root(m, physical(entry::event_entry as *const u8).0 & !0xfff)),
    deed("user-root-outside-memory", |m| user_root(m, 1 << 38)),
    deed("user-root-on-mmio", |m| user_root(m, 0xfee0_0000)),
    deed("selectors", selectors),
    deed("tls", tls),
    deed("hypercall-numbers", hypercall_numbers),
    deed("msrs-by-hypercall", msrs_by_hypercall),
    deed("msrs-from-user-mode", msrs_from_user_mode),
    deed("control-registers", control_registers),
    deed("step-everything", step_everything),
    deed("storm", storm),
];

/// Does the deed with this name; whether there is one, if the guest lives to say so.
pub fn run(name: &str, machine: &Machine) -> bool {
    if name == "list" {
        for deed in DEEDS {
            say!("{}", deed.name);
        }
        return true;
    }
    let Some(deed) = DEEDS.iter().find(|d| d.name == name) else {
        say!("pvm-guest: no deed {name}");
        return false;
    };
    say!("pvm-guest: hostile {name}");
    (deed.run)(machine);
    say!("pvm-guest: hostile {name}: survived");
    true
}

/// A PVCS where none can be, or where it does harm; then events of every kind, through it.
fn pvcs(m: &Machine, places: &[u64]) {
    // The kernel goes on with its own structure, of which the hypervisor then sees nothing.
    let index = msr(PvmMsr::VcpuStruct);
    for place in places {
        let answer = wrmsr(index, *place);
        say!("a PVCS at {place:#x}: {answer:#x}");
        if answer != 0 {
            continue;
        }
        let fault = m.cpu.run(s::s_load, &mut Registers { rdi: m.space.nowhere(), ..Registers::default() });
        say!("a page fault: {:?}", fault.map(|f| f.vector));
        let exit = m.cpu.enter(&User::at(u::u_syscall));
        say!("user mode, from what is there: a system call is {}", exit.syscall);
        wrmsr(index, m.cpu.pvcs_address().0);
    }
}

fn entry_non_canonical(m: &Machine) {
    let hole = 1 << 56;
    for index in [msr(PvmMsr::EventEntry), x86_msr::LSTAR, x86_msr::GS_BASE, x86_msr::KERNEL_GS_BASE] {
        say!("{index:#x}: {:#x}", wrmsr(index, hole));
    }
    for index in [PvmMsr::RetuRip, PvmMsr::RetsRip, PvmMsr::SupervisorRsp, PvmMsr::SwitchCr3].map(msr) {
        let old = rdmsr(index);
        say!("{index:#x}: {:#x}", wrmsr(index, hole));
        wrmsr(index, old);
    }
    let fault = m.cpu.run(s::s_ud2, &mut Registers::default());
    say!("then #UD: {:?}", fault.map(|f| f.vector));
}

/// The handler's first fetch is a fault, whose handler's is, and so on down a stack of one page.
fn entry_unmapped(m: &Machine) {
    enter_at(m, m.space.nowhere());
}

/// The same with an entry that user mode can write and nobody can execute.
fn entry_in_user_memory(m: &Machine) {
    enter_at(m, user_space::DATA);
}

fn enter_at(m: &Machine, entry: u64) {
    let stack = m.space.test();
    m.space.map_kernel(stack, PageFrame::new(), rights::DATA);
    wrmsr(msr(PvmMsr::EventEntry), entry);
    let _ = m.cpu.run(s::s_int3, &mut Registers { rsp: stack + PAGE, ..Registers::default() });
}

fn syscall_entry_unmapped(m: &Machine) {
    wrmsr(x86_msr::LSTAR, m.space.nowhere());
    let _ = m.cpu.enter(&User::at(u::u_syscall));
}

/// Zones that bring RSP to the other end of the address space: a little above where it was, which is mapped, then to where
/// nothing can be.
fn red_zone_wraps(m: &Machine) {
    let at = m.space.test();
    for n in 0..8 {
        m.space.map_kernel(at + n * PAGE, PageFrame::new(), rights::DATA);
    }
    for zone in [u64::MAX, u64::MAX - 63, 1 << 63, 1 << 47, at] {
        say!("a red zone of {zone:#x}: {:#x}", wrmsr(msr(PvmMsr::SupervisorRedzone), zone));
        // The handler's stack is where the frame is: below it is room for that.
        let fault = m.cpu.run(s::s_ud2, &mut Registers { rsp: at + 0x7e00, ..Registers::default() });
        say!("#UD: {:?}", fault.map(|f| f.vector));
    }
}

fn stack_unmapped(m: &Machine) {
    let _ = m.cpu.run(s::s_ud2, &mut Registers { rsp: m.space.nowhere(), ..Registers::default() });
}

fn stack_read_only(m: &Machine) {
    let at = m.space.test();
    m.space.map_kernel(at, PageFrame::new(), rights::CONSTANT);
    let _ = m.cpu.run(s::s_ud2, &mut Registers { rsp: at + 0x800, ..Registers::default() });
}

/// ERETU overwrites it, so that user mode is left with the good one.
fn supervisor_rsp_wild(m: &Machine) {
    for wild in [0, 1 << 63, u64::MAX, 7] {
        wrmsr(msr(PvmMsr::SupervisorRsp), wild);
        let exit = m.cpu.enter(&User::at(u::u_syscall));
        say!("user mode with {wild:#x}: {:#x}", exit.vector());
    }
}

/// In user mode the SYSCALL there is a system call like any other.
fn retu_in_user_memory(m: &Machine) {
    let own = rdmsr(msr(PvmMsr::RetuRip));
    for index in [msr(PvmMsr::RetsRip), msr(PvmMsr::RetuRip)] {
        let old = rdmsr(index);
        // Set from user mode it cannot be; so RETU itself has to be the good one until user mode is entered.
        if old != own {
            wrmsr(index, user_address(u::u_syscall));
            let exit = m.cpu.enter(&User::at(u::u_syscall));
            say!("SYSCALL in user mode at RETS_RIP: {:#x}", exit.vector());
            wrmsr(index, old);
        }
    }
    // Supervisor mode returns to user mode by the program's own SYSCALL, which then is one.
    wrmsr(msr(PvmMsr::RetuRip), user_address(u::u_syscall));
    let rip = user_address(u::u_syscall);
    m.cpu.change_pvcs(|p| {
        let user = User::at(u::u_ud2);
        (p.user_cs, p.user_ss, p.rip, p.rsp) = (user.cs, user.ss, rip, user.registers.rsp);
        p.eflags = user.eflags;
    });
    let _ = m.cpu.run(s::s_call, &mut Registers { rdi: rip, ..Registers::default() });
}

/// ERETS from frames that are not there, in part or at all, and that return to nowhere.
fn rets_on_bad_stack(m: &Machine) {
    fn hook(cpu: &Cpu, trap: &mut Trap) -> bool {
        if trap.frame.vector == vector::BP {
            trap.frame.rip = 1 << 63;
            trap.frame.rflags = !rflags::IF;
        } else if let Some((registers, resume_rsp)) = cpu.resumption() {
            trap.abandon(registers, resume_rsp);
            return true;
        }
        true
    }
    let fault = m.cpu.run_with(hook, s::s_int3, &mut Registers::default());
    say!("a return to a non-canonical address: {:?}", fault.map(|f| f.vector));
    let at = m.space.test();
    m.space.map_kernel(at, PageFrame::new(), rights::DATA);
    let _ = m.cpu.run(entry::rets, &mut Registers { rsp: at + 0xfe0, ..Registers::default() });
}

fn roots_refused(m: &Machine) {
    let good = [m.space.kernel.root(), m.space.user.root()];
    for flags in [0, 1, 2, 3, 4, 1 << 63, u64::MAX] {
        for wild in [1 << 63, 1 << 52, u64::MAX] {
            for roots in [[wild, good[1]], [good[0], wild]] {
                let answer = insn::hypercall(hc::LOAD_PGTBL, [flags, roots[0], roots[1], 0]);
                say!("LOAD_PGTBL({flags:#x}, {:#x}, {:#x}): {answer:#x}", roots[0], roots[1]);
            }
        }
    }
    say!("CR3 is {:#x} of {:#x}", insn::cr3(), good[0]);
}

fn root(m: &Machine, wild: u64) {
    let answer = insn::hypercall(hc::LOAD_PGTBL, [1, wild, m.space.user.root(), 0]);
    say!("LOAD_PGTBL({wild:#x}): {answer:#x}");
}

/// User mode has nothing mapped there, or garbage: its first fetch is a fault that supervisor mode can handle.
fn user_root(m: &Machine, wild: u64) {
    let answer = insn::hypercall(hc::LOAD_PGTBL, [1, m.space.kernel.root(), wild, 0]);
    say!("LOAD_PGTBL(user {wild:#x}): {answer:#x}");
    let exit = m.cpu.enter(&User::at(u::u_syscall));
    say!("user mode: {:#x}, code {:#x}", exit.vector(), exit.pvcs.event_errcode);
}

/// Every selector there is: in GS and DS, asked about, and as CS and SS of user mode.
fn selectors(m: &Machine) {
    let (mut gs, mut ds, mut lar, mut cs, mut ss) = (0, 0, 0, 0, 0);
    let base = m.cpu.gs_base();
    for selector in 0..=0xffffu64 {
        let mut r = Registers { rax: hc::LOAD_GS, rbx: selector, r12: base, ..Registers::default() };
        gs += u32::from(m.cpu.run(s::s_load_gs, &mut r).is_none() && r.r9 > 3);
        let mut r = Registers { rax: selector, ..Registers::default() };
        ds += u32::from(m.cpu.run(s::s_load_ds, &mut r).is_none());
        let mut r = Registers { rax: selector, ..Registers::default() };
        lar += u32::from(m.cpu.run(s::s_lar, &mut r).is_none() && r.rdx == 1);
        // A few of them for each of the indexes, as each takes two changes of mode.
        if selector & 7 == 3 || selector < 0x100 {
            let selector = selector as u16;
            cs += u32::from(m.cpu.enter(&User { cs: selector, ..User::at(u::u_syscall) }).syscall);
            ss += u32::from(m.cpu.enter(&User { ss: selector, ..User::at(u::u_syscall) }).syscall);
        }
    }
    say!(
        "selectors that load: GS {gs}, DS {ds}; LAR says yes to {lar}; user mode runs with CS {cs}, SS {ss}"
    );
}

/// Descriptors of every type and privilege, in every form, and what LAR makes of them.
fn tls(m: &Machine) {
    let mut visible = 0;
    for kind in 0..=0xffu64 {
        for size in 0..16u64 {
            let entry = kind << 40 | size << 52 | 0xf_0000_0000_ffff;
            let index = insn::hypercall(hc::LOAD_TLS, [entry, !entry, entry.rotate_left(32), 0]);
            for n in 0..3 {
                let mut r = Registers { rax: (index + n) << 3 | 3, ..Registers::default() };
                let fault = m.cpu.run(s::s_lar, &mut r);
                let harmless = r.rcx >> 12 & 1 == 1 && r.rcx >> 13 & 3 == 3 && r.rcx >> 11 & 1 == 0;
                if fault.is_none() && r.rdx == 1 {
                    visible += 1;
                    if !harmless {
                        say!("a descriptor that does harm: {entry:#x} gives {:#x}", r.rcx);
                    }
                }
            }
        }
    }
    insn::hypercall(hc::LOAD_TLS, [0; 4]);
    say!("descriptors that are data segments: {visible}");
}

/// A sequence of numbers that looks random and is the same each time (a multiplicative congruence).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.0 ^ self.0 >> 29
    }
}

/// Numbers near PVM's and KVM's, with arguments that mean nothing; but for those that mean the end of the guest, or of
/// this loop.
fn hypercall_numbers(_: &Machine) {
    let mut numbers = Numbers(1);
    for round in 0..20_000u64 {
        let number = match round % 4 {
            0 => hc::LOAD_PGTBL + numbers.next() % 32,
            1 => numbers.next() % 64,
            2 => numbers.next(),
            _ => numbers.next() as u32 as u64,
        };
        let args = [(); 4].map(|()| numbers.next());
        if !matches!(number, hc::LOAD_PGTBL | hc::WRMSR | hc::IRQ_HALT) {
            insn::hypercall(number, args);
        }
    }
    say!("20000 hypercalls made");
}

/// Wild values for every MSR that has a rule, and for others; PVM's own are put back.
fn msrs_by_hypercall(_: &Machine) {
    let mut numbers = Numbers(2);
    let own = msr(PvmMsr::LinearAddressRange)..=msr(PvmMsr::SwitchCr3);
    let x86 = [x86_msr::STAR, x86_msr::LSTAR, x86_msr::CSTAR, x86_msr::SYSCALL_MASK, x86_msr::KERNEL_GS_BASE];
    let mut taken = 0;
    for _ in 0..2_000 {
        for index in own.clone().chain(x86) {
            let old = rdmsr(index);
            let value = numbers.next() >> (numbers.next() % 64);
            // The PVCS and the range stay: without the one events end the guest, the other only narrows.
            if index != msr(PvmMsr::VcpuStruct) && index != msr(PvmMsr::LinearAddressRange) {
                taken += u32::from(wrmsr(index, value) == 0);
                wrmsr(index, old);
            }
        }
        let _ = rdmsr(numbers.next() as u32);
    }
    say!("values taken: {taken}");
}

fn msrs_from_user_mode(m: &Machine) {
    let mut refused = 0;
    let pages = [0..0x900, 0x4b56_4d00..0x4b56_4e00, 0xc000_0080..0xc000_0110u64];
    for index in pages.into_iter().flatten() {
        for code in [u::u_wrmsr as entry::Code, u::u_rdmsr] {
            let mut program = User::at(code);
            program.registers.rcx = index;
            refused += u32::from(m.cpu.enter(&program).vector() == vector::GP);
        }
    }
    say!("accesses refused: {refused} of {}", 2 * (0x900 + 0x100 + 0x90));
}

/// Single bits of CR0 and CR4 the other way round, each put back.
fn control_registers(m: &Machine) {
    for (get, set) in
        [(s::s_get_cr0 as entry::Code, s::s_set_cr0 as entry::Code), (s::s_get_cr4, s::s_set_cr4)]
    {
        for bit in 0..64 {
            let mut r = Registers::default();
            let _ = m.cpu.run(get, &mut r);
            let old = r.rax;
            r.rax ^= 1 << bit;
            let fault = m.cpu.run(set, &mut r);
            let _ = m.cpu.run(get, &mut r);
            say!("bit {bit}: {:?}, changed {:#x}", fault.map(|f| f.vector), r.rax ^ old);
            r.rax = old;
            let _ = m.cpu.run(set, &mut r);
        }
    }
}

/// TF on through hypercalls, returns and user mode.
fn step_everything(m: &Machine) {
    fn hook(_: &Cpu, trap: &mut Trap) -> bool {
        // Keeps stepping.
        trap.frame.vector == vector::DB
    }
    let mut r = Registers { rax: rflags::TF | rflags::FIXED, ..Registers::default() };
    let fault = m.cpu.run_with(hook, s::s_int3_then_flags, &mut r);
    say!("INT3 stepped: {:?}, {} events", fault.map(|f| f.vector), m.cpu.events().count());
    for code in [u::u_syscall as entry::Code, u::u_int3, u::u_int80, u::u_ud2] {
        let mut program = User::at(code);
        program.eflags |= rflags::TF as u32;
        for _ in 0..4 {
            let exit = m.cpu.enter(&program);
            say!("user mode stepped: {:#x} at {:#x}", exit.vector(), exit.pvcs.rip);
            program.registers.rip = exit.pvcs.rip;
        }
    }
}

/// Interrupts as fast as the timer can, NMIs, exceptions and mode changes, all at once.
fn storm(m: &Machine) {
    const ROUNDS: u64 = 2_000;
    lapic::timer_periodic(0x40, 20_000);
    m.cpu.clear_events();
    m.cpu.set_interrupt_flag(true);
    let (mut events, mut interrupted) = (0, 0);
    for round in 0..ROUNDS {
        let mut r = Registers { rdi: m.space.nowhere(), ..Registers::default() };
        let _ = m.cpu.run(if round % 2 == 0 { s::s_load } else { s::s_int3 }, &mut r);
        events += m.cpu.events().count() as u64;
        if round % 8 == 0 {
            lapic::send(lapic::id(), command::NMI);
        }
        // The PVCS is the interrupts' while they are open.
        m.cpu.set_interrupt_flag(false);
        if m.cpu.enter(&User::at(u::u_int3)).vector() != vector::BP {
            lapic::end_of_interrupt();
            interrupted += 1;
        }
        m.cpu.set_interrupt_flag(true);
    }
    lapic::timer_off();
    m.cpu.set_interrupt_flag(false);
    say!("{events} events in supervisor mode, user mode interrupted {interrupted} times of {ROUNDS}");
}
