//! What a vCPU counts.

use std::collections::BTreeMap;
use std::ops::AddAssign;

/// What a vCPU counted.
#[derive(Clone, Debug, Default)]
pub struct VcpuStats {
    /// Instructions executed.
    pub instructions: u64,
    /// Blocks decoded.
    pub blocks_decoded: u64,
    /// Blocks that were not decoded again though their page was, or may have been, written to: their bytes are the same.
    pub blocks_kept: u64,
    /// TLB misses that walked page tables.
    pub tlb_misses: u64,
    /// Stores that hit pages with decoded code.
    pub code_writes: u64,
    /// Locked accesses that crossed a cache line, or hit no RAM: each stopped the other vCPUs.
    pub split_locks: u64,
    /// External interrupts and NMIs delivered.
    pub interrupts: u64,
    /// Exceptions delivered.
    pub exceptions: u64,
    /// Exits by kind: port reads, port writes, MMIO reads, MMIO writes, MSR reads, MSR writes, hypercalls.
    pub exits: Exits,
    /// HLT executed.
    pub halts: u64,
    /// The vector of the event whose delivery ended in a triple fault.
    pub undelivered: Option<u8>,
    /// Instructions that raised #UD because they are not implemented, by name.
    pub unimplemented: BTreeMap<String, u64>,
}

/// Exits by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say all")]
pub struct Exits {
    pub port_in: u64,
    pub port_out: u64,
    pub mmio_read: u64,
    pub mmio_write: u64,
    pub msr_read: u64,
    pub msr_write: u64,
    pub cr8: u64,
    pub hypercall: u64,
}

impl AddAssign for Exits {
    fn add_assign(&mut self, other: Self) {
        self.port_in += other.port_in;
        self.port_out += other.port_out;
        self.mmio_read += other.mmio_read;
        self.mmio_write += other.mmio_write;
        self.msr_read += other.msr_read;
        self.msr_write += other.msr_write;
        self.cr8 += other.cr8;
        self.hypercall += other.hypercall;
    }
}

impl AddAssign<&VcpuStats> for VcpuStats {
    fn add_assign(&mut self, other: &VcpuStats) {
        self.instructions += other.instructions;
        self.blocks_decoded += other.blocks_decoded;
        self.blocks_kept += other.blocks_kept;
        self.tlb_misses += other.tlb_misses;
        self.code_writes += other.code_writes;
        self.split_locks += other.split_locks;
        self.interrupts += other.interrupts;
        self.exceptions += other.exceptions;
        self.exits += other.exits;
        self.halts += other.halts;
        for (name, count) in &other.unimplemented {
            *self.unimplemented.entry(name.clone()).or_default() += count;
        }
    }
}
