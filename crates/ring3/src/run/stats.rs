//! The text of `--stats`.

use std::fmt::Write as _;
use std::fs::File;
use std::time::Duration;

use cpu::state::reg;
use cpu::{Exits, GuestRam, VcpuStats};
use machine::iommu::{IommuStats, Work};
use machine::{GuestAbi, MachineStats};
use pvm::abi::hypercall;
use vm_memory::{GuestMemory, GuestMemoryRegion};

use super::isolation::Measures;

/// What there is to report of one run.
pub(super) struct Run<'a> {
    /// The engine's name.
    pub(super) engine: &'a str,
    /// What the process gave up.
    pub(super) isolation: &'a Measures,
    /// From the start until the first instruction could run.
    pub(super) built: Duration,
    /// From the start until the machine ended.
    pub(super) total: Duration,
    /// Guest memory, in bytes.
    pub(super) memory: u64,
    /// How much of it the host had to give, in bytes.
    pub(super) touched: Option<u64>,
    /// The most memory that the process ever had in use, in bytes.
    pub(super) peak: Option<u64>,
    /// What the machine counted.
    pub(super) counted: &'a MachineStats,
    /// What the guest's network counted, if an engine served it.
    pub(super) network: Option<usernet::stats::Stats>,
}

/// Bytes of guest memory that the host has given.
pub(super) fn touched(memory: &GuestRam) -> Option<u64> {
    let region = memory.iter().next()?;
    let file = region.file_offset()?.file();
    // Blocks of a memfd are counted in units of 512 bytes.
    rustix::fs::fstat(file).ok().map(|stat| stat.st_blocks as u64 * 512)
}

/// The most memory that a process ever had in use, in bytes, by its `/proc/PID/status`.
pub(super) fn peak(mut status: File) -> Option<u64> {
    let status = std::io::read_to_string(&mut status).ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib << 10)
}

/// Formats the report: one line for a figure, the same on every run, easy to grep.
pub(super) fn report(run: &Run<'_>) -> String {
    let mut text = String::new();
    let mut total = VcpuStats::default();
    let seconds = (run.total - run.built).as_secs_f64();
    for vcpu in &run.counted.vcpus {
        total += vcpu;
    }
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    // Writing to a String cannot fail.
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:<28} {value}");
    };
    line("engine", run.engine.to_owned());
    line("isolation", run.isolation.to_string());
    line("guest ABI", run.counted.guest_abi.to_string());
    line("vcpus", run.counted.vcpus.len().to_string());
    line("time to build", format!("{:.3} s", run.built.as_secs_f64()));
    line("time in the guest", format!("{seconds:.3} s"));
    line("guest instructions", total.instructions.to_string());
    line("instructions per second", format!("{:.1} M", total.instructions as f64 / seconds / 1e6));
    line("blocks decoded", total.blocks_decoded.to_string());
    line("blocks found unchanged", total.blocks_kept.to_string());
    line("stores to decoded code", total.code_writes.to_string());
    line("TLB misses", total.tlb_misses.to_string());
    line("exceptions", total.exceptions.to_string());
    line("interrupts", total.interrupts.to_string());
    line("HLT", total.halts.to_string());
    let Exits { port_in, port_out, mmio_read, mmio_write, msr_read, msr_write, cr8, hypercall } = total.exits;
    for (name, count) in [
        ("exits: port read", port_in),
        ("exits: port write", port_out),
        ("exits: MMIO read", mmio_read),
        ("exits: MMIO write", mmio_write),
        ("exits: RDMSR", msr_read),
        ("exits: WRMSR", msr_write),
        ("exits: CR8", cr8),
        ("exits: hypercall", hypercall),
    ] {
        line(name, count.to_string());
    }
    if let Some(IommuStats { translations, faults, work }) = run.counted.iommu {
        let work = match work {
            Work::Requests { maps, unmaps } => {
                vec![("IOMMU: mappings made", maps), ("IOMMU: mappings removed", unmaps)]
            }
            Work::Tables { attached } => vec![("IOMMU: attachments to the guest's tables", attached)],
        };
        let common = [("IOMMU: translations", translations), ("IOMMU: faults", faults)];
        for (name, count) in common.into_iter().chain(work) {
            line(name, count.to_string());
        }
    }
    if let Some(network) = &run.network {
        for (name, count) in [
            ("network: frames out", network.frames_in),
            ("network: bytes out", network.bytes_in),
            ("network: frames in", network.frames_out),
            ("network: bytes in", network.bytes_out),
        ] {
            line(name, count.to_string());
        }
    }
    for shutdown in &run.counted.shutdowns {
        line("triple fault", shutdown.to_string());
        if let Some(state) = run.counted.states.get(shutdown.vcpu) {
            let registers = [
                ("RSP", state.regs[usize::from(reg::RSP)]),
                ("RFLAGS", state.flags.bits()),
                ("CR0", state.cr0),
                ("CR2", state.cr2),
                ("CR3", state.cr3),
                ("CR4", state.cr4),
                ("EFER", state.efer),
            ];
            let registers: Vec<_> =
                registers.iter().map(|(name, value)| format!("{name} {value:#x}")).collect();
            line("", registers.join(", "));
        }
    }
    if run.counted.guest_abi == GuestAbi::Pvm {
        pvm_lines(&run.counted.pvm, &mut line);
    }
    let (ports, mmio) = (run.counted.unclaimed_ports, run.counted.unclaimed_mmio);
    line("unclaimed ports", format!("{} reads, {} writes", ports.reads, ports.writes));
    line("unclaimed MMIO", format!("{} reads, {} writes", mmio.reads, mmio.writes));
    line("guest memory", format!("{:.0} MiB", mib(run.memory)));
    if let Some(touched) = run.touched {
        line("guest memory in use", format!("{:.1} MiB", mib(touched)));
    }
    if let Some(peak) = run.peak {
        line("host memory at peak", format!("{:.1} MiB", mib(peak)));
    }
    for (name, count) in &total.unimplemented {
        line("not implemented", format!("{name}: {count}"));
    }
    text
}

/// The lines about PVM. A hypercall that the guest never made has none.
fn pvm_lines(vcpus: &[pvm::Stats], line: &mut impl FnMut(&str, String)) {
    let mut total = pvm::Stats::default();
    for vcpu in vcpus {
        total.add(vcpu);
    }
    for (name, count) in [
        ("PVM events", total.events()),
        ("PVM events: user", total.user_events),
        ("PVM events: exceptions", total.supervisor_exceptions),
        ("PVM events: interrupts", total.supervisor_interrupts),
        ("PVM system calls", total.syscalls),
        ("PVM returns: user", total.user_returns),
        ("PVM returns: supervisor", total.supervisor_returns),
        ("PVM direct switches", total.switches()),
        ("PVM interrupt windows", total.interrupt_windows),
        ("PVM hypercalls", total.pvm_hypercalls()),
    ] {
        line(name, count.to_string());
    }
    let own = hypercall::NAMES.iter().zip(total.hypercalls);
    for (name, count) in own.map(|(name, count)| (*name, count)).chain([("KVM's", total.kvm_hypercalls)]) {
        if count > 0 {
            line(&format!("PVM call: {name}"), count.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(counted: &MachineStats) -> String {
        report(&Run {
            engine: "interpret",
            isolation: &Measures::off(),
            peak: None,
            built: Duration::from_millis(10),
            total: Duration::from_millis(1010),
            memory: 64 << 20,
            touched: Some(1 << 20),
            counted,
            network: None,
        })
    }

    #[test]
    fn sums_all_vcpus_and_names_what_is_missing() {
        let mut vcpu = VcpuStats { instructions: 10, ..VcpuStats::default() };
        vcpu.exits.mmio_read = 2;
        vcpu.unimplemented.insert("Vmlaunch".into(), 1);
        let text = text(&MachineStats { vcpus: vec![vcpu.clone(), vcpu], ..MachineStats::default() });
        for want in
            ["guest instructions           20", "exits: MMIO read             4", "Vmlaunch: 2", "1.0 MiB"]
        {
            assert!(text.contains(want), "{want:?} in\n{text}");
        }
        assert!(text.contains("guest ABI                    x86\n") && !text.contains("PVM"), "{text}");
    }

    #[test]
    fn pvm_counts_are_sums_and_only_the_calls_made() {
        let mut vcpu = pvm::Stats { user_events: 1, syscalls: 3, user_returns: 5, ..pvm::Stats::default() };
        vcpu.hypercalls[4] = 7;
        let counted =
            MachineStats { guest_abi: GuestAbi::Pvm, pvm: vec![vcpu, vcpu], ..MachineStats::default() };
        let text = text(&counted);
        for want in [
            "guest ABI                    pvm, generation 1",
            "PVM events                   2\n",
            "PVM direct switches          18\n",
            "PVM hypercalls               14\n",
            "PVM call: TLB_FLUSH_CURRENT  14\n",
        ] {
            assert!(text.contains(want), "{want:?} in\n{text}");
        }
        assert!(!text.contains("IRQ_WIN") && !text.contains("KVM's"), "{text}");
    }
}
