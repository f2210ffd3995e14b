//! Boots a kernel with its console on standard output: the smallest use of the `machine` crate.
//!
//! `cargo run --release -p machine --example boot -- KERNEL [INITRAMFS [CMDLINE [CPUS]]]`

use std::path::Path;

use machine::loader::{BootProtocol, KernelImage};
use machine::{GuestAbi, Machine, MachineConfig};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let kernel = args.first().ok_or("usage: boot KERNEL [INITRAMFS [CMDLINE [CPUS]]]")?;
    let kernel = KernelImage::open(Path::new(kernel))?;
    let initramfs = args.get(1).map(std::fs::read).transpose()?;
    let cmdline = args.get(2).map_or("console=ttyS0 panic=-1", String::as_str);
    let cpus = args.get(3).map_or(Ok(1), |n| n.parse())?;
    let guest_abi = if kernel.is_pvm_guest() { GuestAbi::Pvm } else { GuestAbi::X86 };
    let serial = Box::new(std::io::stdout());
    let mut machine =
        Machine::new(MachineConfig { memory: 512 << 20, cpus, serial, guest_abi, iommu: None })?;
    machine.load(&kernel, BootProtocol::Linux64, initramfs.as_deref(), cmdline)?;
    let handle = machine.handle();
    std::thread::spawn(move || {
        // Enter ends the run: the RIPs then tell where the guest was.
        let _ = std::io::stdin().read_line(&mut String::new());
        handle.stop();
    });
    let (ended, stats) = machine.run()?;
    eprintln!("{ended:?}");
    for (vcpu, (stats, state)) in stats.vcpus.iter().zip(&stats.states).enumerate() {
        eprintln!("vcpu {vcpu}: RIP {:#x} CR2 {:#x} {stats:#?}", state.rip(), state.cr2);
    }
    Ok(())
}
