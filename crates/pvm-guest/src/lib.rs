//! A small kernel that proves the PVM guest ABI.
//!
//! It is written against the specification, generation 1 ("[RFC PATCH 01/73] KVM: Documentation: Add the specification for
//! PVM"), and not against a hypervisor: the same file runs on ring3, and is meant to run on a host whose `/dev/kvm` is KVM's
//! PVM vendor module. Where the specification leaves something open, a check accepts all that it allows.
//!
//! # Theory of operation
//! [`boot`] is entered by PVH or by the 64-bit Linux boot protocol, finds out whether this is a PVM hypervisor of
//! generation 1 ([`identify`]), and if not says so and turns the machine off. If it is, the kernel moves itself into the
//! range that the hypervisor allows.
//! [`kernel_main`] then sets up page tables ([`paging`], [`space`]), the PVCS and the entry points ([`cpu`], [`entry`]), starts
//! the second processor, if there is one ([`smp`]), and runs the [`checks`]: straight code in supervisor mode, which runs
//! pieces of assembly (`supervisor.s`, `user.s`) in either mode and looks at what came of them. [`report`] writes to the
//! serial port, [`acpi`] turns the machine off.
//!
//! The command line chooses: `only=GROUP` or `only=GROUP/NAME` runs the checks that begin so, `bench=NAME count=N` is
//! for measuring ([`mod@bench`]), `hostile=NAME` does one thing that no kernel should ([`hostile`]). The last line on the serial
//! port is `pvm-guest: PASS ...` or `pvm-guest: FAIL ...`.
//!
//! # Unsafe code
//! A kernel is made of what Rust cannot see. All of it is in `boot`, `bench` (their assembly), `cpu` (the PVCS and what
//! belongs to one processor), `entry` (events and running code), `insn` (single instructions), `memory` (physical memory),
//! `paging` (the image's own places), `lapic` and `smp`. The checks have none.
//!
//! # What is checked where
//!
//! | MSR | checks |
//! |---|---|
//! | LINEAR_ADDRESS_RANGE | `msr/range-is-well-formed`, `msr/range-refuses-malformed`, `msr/range-narrows`, `paging/outside-range`, `paging/outside-range-user`, `insn/breakpoint-outside-range` |
//! | VCPU_STRUCT | `msr/vcpu-struct`, `msr/vcpu-struct-moves`, `msr/vcpu-struct-none`, `smp/own-pvcs` |
//! | SUPERVISOR_RSP | `msr/supervisor-rsp`, `user/supervisor-rsp` |
//! | SUPERVISOR_REDZONE | `msr/supervisor-redzone`, `event/red-zone`, `event/frame-alignment`, `irq/supervisor-stack` |
//! | EVENT_ENTRY | `msr/event-entry`; the three entries: `user/event-entry-state`, `event/entry-state`, `irq/supervisor-entry-state` |
//! | RETU_RIP, RETS_RIP | `msr/retu-rip`, `msr/rets-rip`; ERETU and ERETS below |
//! | SWITCH_CR3 | `msr/switch-cr3`, `user/roots-switch`, `hypercall/load-pgtbl-user-root` |
//! | LSTAR | `msr/lstar`, `user/syscall-entry-state` |
//! | STAR | `msr/star` |
//! | GS_BASE | `msr/gs-base`, `user/gs-base`, `user/gs-base-semi-canonical` |
//! | KERNEL_GS_BASE | `msr/kernel-gs-base`, `user/kernel-gs-base` |
//! | SYSCALL_MASK, CSTAR, SYSENTER_* | `msr/without-effect` |
//! | PKRS | `msr/pkrs`, `keys/pkrs-is-pkru`, `keys/supervisor-access-denied` |
//! | TSC | `msr/tsc` |
//! | others | `msr/unknown` |
//!
//! | hypercall | checks |
//! |---|---|
//! | all | `hypercall/registers`, `hypercall/kvm-from-user` |
//! | LOAD_PGTBL | `hypercall/load-pgtbl`, `hypercall/load-pgtbl-user-root`, `hypercall/load-pgtbl-5-level`, `paging/tlb-load-pgtbl`, `paging/tagged-by-root` |
//! | IRQ_WIN | `hypercall/irq-win-idle`, `irq/irq-win-delivers`, `irq/irq-win-without-if` |
//! | IRQ_HALT | `irq/irq-halt`, `irq/irq-halt-pending`, `smp/ipi-wakes` |
//! | TLB_FLUSH | `paging/tlb-flush`, `paging/user-page-flushed-from-supervisor` |
//! | TLB_FLUSH_CURRENT | `paging/tlb-flush-current`, `paging/user-page-flushed-from-supervisor` |
//! | TLB_INVLPG | `paging/tlb-invlpg`, `smp/tlb-shootdown` |
//! | LOAD_GS | `hypercall/load-gs`, `hypercall/load-gs-bad` |
//! | RDMSR, WRMSR | `hypercall/rdmsr`, `hypercall/wrmsr`, and each check of `msr` |
//! | LOAD_TLS | `hypercall/load-tls`, `hypercall/load-tls-64-bit`, `hypercall/load-tls-sanitised` |
//! | KVM's | `hypercall/kvm-vapic-poll-irq`, `hypercall/kvm-unknown`, `smp/kvm-send-ipi` |
//!
//! | instruction | checks |
//! |---|---|
//! | synthetic CPUID | `detect/hypervisor-name`, `detect/pvm-signature`, `detect/synthetic-cpuid-registers`, `detect/synthetic-cpuid-user` |
//! | ERETU | each check of `user`; `user/registers-in-and-out`, `user/rcx-and-r11`, `user/flags-are-standard`, `user/bad-selectors` |
//! | ERETS | `event/erets-restores`, `event/erets-ignores`, `event/erets-sets-interrupt-flag`, `event/erets-flags`, `irq/erets-delivers` |
//! | CPUID | `detect/plain-cpuid`, `detect/hidden-features` |
//! | SGDT, SIDT, SLDT, STR, SMSW | `insn/table-registers-store`, `insn/smsw` |
//! | LGDT, LIDT, LLDT | `insn/table-registers-load` |
//! | LAR, LSL, VERR, VERW | `insn/lar-and-lsl`, `insn/verr-and-verw` |
//! | STAC, CLAC, SWAPGS, SYSEXIT, SYSRET | not defined in supervisor mode, not executed there; SWAPGS from user mode: `user/privileged` |
//! | SYSENTER | `insn/sysenter`, `user/compat-sysenter` |
//! | INT n | `event/breakpoint`, `event/int-4`, `insn/int-other`, `user/breakpoint`, `user/int-80`, `user/int-4`, `user/int-other`, `user/compat-int-80` |
//! | POPF, CLI, STI, PUSHF | `insn/pushf-shows-if`, `insn/popf-keeps-if`, `insn/cli-and-sti`, `irq/sti-delivers`, `user/popf-keeps-if`, `user/privileged` |
//! | RDPKRU, WRPKRU | `keys/*` |
//! | HLT, IN, OUT, RDMSR, WRMSR, MOV CR, INVLPG, WBINVD, CLTS | `irq/hlt`, `insn/in-and-out`, `msr/*`, `insn/cr0`, `insn/cr2`, `insn/cr3`, `insn/cr4`, `insn/wbinvd`, `paging/plain-invlpg`, `paging/plain-mov-cr3` |
//! | MOV DR | `insn/breakpoint-registers`, `insn/breakpoint-data`, `insn/breakpoint-user-code` |
//! | MOV from CS, SS; to DS | `insn/underlying-selectors`, `user/selectors`, `insn/data-segments` |
//!
//! | PVCS | checks |
//! |---|---|
//! | event_flags.IF | `event/interrupt-flag-open`, `event/interrupt-flag-closed`, `user/syscall-keeps-if`, `irq/user-keeps-if`, `irq/supervisor` |
//! | event_flags.IP | `irq/held-sets-ip`, `irq/irq-win-delivers`, `irq/irq-halt-pending`, `irq/erets-delivers`, `irq/eretu-delivers` |
//! | event_errcode, event_vector | `user/page-fault-*`, `user/syscall-leaves-vector`, `event/vector-and-code-not-in-pvcs`, `irq/every-vector` |
//! | cr2 | `event/page-fault-*`, `user/page-fault-*` |
//! | user_cs, user_ss | `user/syscall`, `user/selectors`, `user/bad-selectors`, `user/compat-int-80` |
//! | user_gsbase | `user/gs-base`, `user/gs-base-semi-canonical` |
//! | eflags | `user/event-entry-state`, `user/flags-are-standard` |
//! | pkru | `keys/user-value-in-and-out` |
//! | rip, rsp, rcx, r11 | `user/registers-in-and-out`, `user/rcx-and-r11`, `irq/supervisor-stack` |
//!
//! | rule | checks |
//! |---|---|
//! | vector from user mode | `user/event-entry-state`, `user/undefined-opcode`, `user/divide`, `user/single-step`, `user/x87-error`, `user/simd-error`, `irq/user` |
//! | SYSCALL from user mode | `user/syscall`, `user/syscall-entry-state` |
//! | vector below 32 from supervisor mode | `event/*` |
//! | vector from 32 on from supervisor mode | `irq/supervisor`, `irq/supervisor-entry-state`, `irq/supervisor-stack`, `irq/every-vector` |
//! | 32-bit user mode | `user/compat-*`, `irq/user-compat`, `hypercall/load-tls` |
//! | what user mode keeps and may not do | `user/fs-base-stays`, `user/vector-units`, `user/privileged`, `user/msr-writes` |
//! | interrupts in user mode | `irq/user`, `irq/user-compat`, `irq/eretu-delivers`, `smp/ipi-into-user-mode` |
//! | NMI | `nmi/*`, `smp/nmi-there` |
//! | no double fault | `event/nested`; hostile `entry-unmapped`, `stack-unmapped` |
//! | PVCS absent, stack unwritable | `msr/vcpu-struct-none`; hostile `stack-unmapped`, `stack-read-only` |
//! | paging | `paging/*`, `user/roots-switch`, `user/page-fault-kernel-address` |
//! | control registers | `detect/control-registers`, `insn/cr0`, `insn/cr4` |
//! | bootstrap in non-PVM mode | that the kernel comes up by PVH; `smp/second-processor-starts` |
//! | detection | `detect/cpl-3-and-if` and the kernel's own start, in `identify` |
//! | several processors | `smp/*` |

#![no_std]

pub mod abi;
pub mod acpi;
pub mod bench;
pub mod boot;
pub mod checks;
pub mod cpu;
pub mod entry;
pub mod hostile;
pub mod identify;
pub mod insn;
pub mod lapic;
pub mod memory;
pub mod paging;
pub mod report;
pub mod serial;
pub mod smp;
pub mod space;

use cpu::Cpu;
use paging::Tree;
use report::Machine;
use space::Space;

/// The kernel, in its place, under the boot root: sets the ABI up and runs the checks.
pub fn kernel_main(kernel: Tree) -> ! {
    let space = Space::new(kernel);
    let cpu = Cpu::by_number(0);
    insn::hypercall(
        abi::hypercall::LOAD_PGTBL,
        [abi::hypercall::LOAD_PGTBL_FLUSH, kernel.root(), space.user.root(), 0],
    );
    cpu.set_up(kernel, space.user);
    lapic::set_up();
    let loader = boot::loader();
    say!(
        "pvm-guest: by {}, moved to {:#x}",
        if loader.pvh { "PVH" } else { "the 64-bit Linux protocol" },
        memory::base()
    );
    let second = second_processor(&space, loader.rsdp);
    let machine = Machine { cpu, space, second };
    match (boot::option("bench"), boot::option("hostile")) {
        (Some(name), _) => {
            let rounds = boot::option("count").and_then(|n| n.parse().ok()).unwrap_or(100_000);
            verdict(bench::run(name, rounds, &machine));
        }
        (None, Some(name)) => verdict(hostile::run(name, &machine)),
        (None, None) => report::run(checks::GROUPS, &machine, boot::option("only").unwrap_or("")),
    }
    acpi::power_off(loader.rsdp)
}

/// The last line, where there are no checks to count.
fn verdict(good: bool) {
    say!("pvm-guest: {}", if good { "PASS" } else { "FAIL" });
}

/// Starts the second processor, if there is one.
fn second_processor(space: &Space, rsdp: u64) -> Option<u32> {
    let mut ids = [0; 16];
    let count = acpi::processors(rsdp, &mut ids);
    let own = lapic::id();
    let other = ids.iter().take(count).find(|id| **id != own)?;
    if smp::start(*other, space.kernel, space.user) {
        return Some(*other);
    }
    say!("pvm-guest: processor {other} does not start");
    None
}

/// The end of a kernel that cannot go on.
pub fn die(info: &core::panic::PanicInfo<'_>) -> ! {
    say!("pvm-guest: {info}");
    say!("pvm-guest: FAIL");
    acpi::power_off(boot::loader().rsdp)
}
