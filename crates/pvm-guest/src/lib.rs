//! A small kernel that proves the PVM guest ABI.
#![no_std]

pub mod abi;
pub mod acpi;
pub mod bench;
pub mod boot;
pub mod checks;
pub mod cpu;
pub mod entry;
pub mod hostile;
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
