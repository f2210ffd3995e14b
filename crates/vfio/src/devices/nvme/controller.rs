//! Registers, and what enabling and disabling do (sections 3.1 and 7.3).

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

use disk::Disk;
use iommufd::iova::Iova;
use zerocopy::FromBytes;

use super::admin::State;
use super::queue::{CompletionQueue, SubmissionQueue};
use super::spec::{MAX_ENTRIES, PAGE, cc, csts, register};
use super::worker::{self, Signal};
use super::{Options, lock};
use crate::pci::function::Link;
use crate::pci::interrupts::Enabled;
use crate::pci::model::Model;

/// CAP: 1024 entries, contiguous queues, ten seconds to become ready, the NVM command set, pages of 4 KiB.
const CAPABILITIES: u64 = (MAX_ENTRIES as u64 - 1) | 1 << 16 | 20 << 24 | 1 << 37;
/// VS: 1.4.
pub(super) const VERSION: u32 = 0x0001_0400;

/// What the driver has written.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Registers {
    pub(super) configuration: u32,
    pub(super) status: u32,
    /// Interrupts that are masked, for INTx.
    mask: u32,
    admin_sizes: u32,
    admin_submission: u64,
    admin_completion: u64,
}

/// The queues that exist, by number. Number 0 is the admin queue.
#[derive(Debug, Default)]
pub(super) struct Tables {
    pub(super) submission: Vec<Option<Arc<SubmissionQueue>>>,
    pub(super) completion: Vec<Option<Arc<CompletionQueue>>>,
}

/// What the controller counts for its health log.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) blocks_read: AtomicU64,
    pub(super) blocks_written: AtomicU64,
}

/// What registers and workers share.
pub(super) struct Shared {
    pub(super) link: Arc<Link>,
    pub(super) disk: Disk,
    pub(super) serial: String,
    /// Pairs of I/O queues.
    pub(super) queues: u16,
    pub(super) registers: Mutex<Registers>,
    /// Whether commands are carried out. Held for reading while some are.
    pub(super) running: RwLock<bool>,
    pub(super) tables: Mutex<Tables>,
    pub(super) state: Mutex<State>,
    /// Writes wait for the medium only when the driver flushes.
    pub(super) write_cache: AtomicBool,
    pub(super) counters: Counters,
    /// One for each worker.
    pub(super) signals: Vec<Signal>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("disk", &self.disk).finish_non_exhaustive()
    }
}

/// The registers of the controller, and its threads.
#[derive(Debug)]
pub struct Nvme {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Nvme {
    pub(super) fn new(link: Arc<Link>, disk: Disk, options: &Options) -> Self {
        let serial: String =
            options.serial.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(20).collect();
        let shared = Shared {
            link,
            disk,
            serial,
            queues: options.queues,
            registers: Mutex::default(),
            running: RwLock::new(false),
            tables: Mutex::default(),
            state: Mutex::default(),
            write_cache: AtomicBool::new(true),
            counters: Counters::default(),
            signals: (0..options.workers.max(1)).map(|_| Signal::default()).collect(),
        };
        Self { shared: Arc::new(shared), threads: Vec::new() }
    }

    /// Starts the workers.
    pub(super) fn start(&mut self, workers: usize) -> std::io::Result<()> {
        for number in 0..workers {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new()
                .name(format!("nvme-{number}"))
                .spawn(move || worker::run(&shared, number))?;
            self.threads.push(thread);
        }
        Ok(())
    }
}

impl Drop for Nvme {
    fn drop(&mut self) {
        self.shared.stop(true);
        for signal in &self.shared.signals {
            signal.end();
        }
        for thread in self.threads.drain(..) {
            // A panic there has been reported.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Wakes the worker of a submission queue.
    pub(super) fn wake(&self, queue: u16) {
        let worker = usize::from(queue) % self.signals.len().max(1);
        if let Some(signal) = self.signals.get(worker) {
            signal.set();
        }
    }

    fn wake_all(&self) {
        self.signals.iter().for_each(Signal::set);
    }

    /// The controller cannot go on until it is reset.
    pub(super) fn fail(&self, why: &dyn fmt::Display) {
        tracing::warn!("the NVMe controller stops: {why}");
        lock(&self.registers).status |= csts::FATAL;
    }

    /// Stops everything; with `all` also what a controller reset leaves. No worker touches memory after it.
    fn stop(&self, all: bool) {
        *self.running.write().unwrap_or_else(PoisonError::into_inner) = false;
        let tables = std::mem::take(&mut *lock(&self.tables));
        drop(tables);
        *lock(&self.state) = State::default();
        self.write_cache.store(true, Ordering::SeqCst);
        {
            let mut registers = lock(&self.registers);
            let old = *registers;
            *registers = Registers::default();
            if !all {
                registers.admin_sizes = old.admin_sizes;
                registers.admin_submission = old.admin_submission;
                registers.admin_completion = old.admin_completion;
            }
        }
        self.link.interrupts().set_intx(false);
    }

    /// Begins to carry out commands, if the configuration can be.
    fn start(&self, configuration: u32) {
        let registers = *lock(&self.registers);
        let (submission, completion) = (registers.admin_sizes & 0xfff, registers.admin_sizes >> 16 & 0xfff);
        let possible = configuration & (cc::COMMAND_SET | cc::PAGE_SIZE | cc::ARBITRATION) == 0
            && [submission, completion].iter().all(|size| (1..MAX_ENTRIES).contains(size))
            && registers.admin_submission.is_multiple_of(PAGE)
            && registers.admin_completion.is_multiple_of(PAGE);
        if !possible {
            lock(&self.registers).configuration = configuration;
            self.fail(&"it was enabled with a configuration that it does not have");
            return;
        }
        let queues = usize::from(self.queues) + 1;
        let completions =
            Arc::new(CompletionQueue::new(Iova(registers.admin_completion), completion + 1, Some(0)));
        let base = Iova(registers.admin_submission);
        let commands = SubmissionQueue::new(0, base, submission + 1, Arc::clone(&completions));
        {
            let mut tables = lock(&self.tables);
            tables.submission.push(Some(Arc::new(commands)));
            tables.submission.resize_with(queues, || None);
            tables.completion.push(Some(completions));
            tables.completion.resize_with(queues, || None);
        }
        *self.running.write().unwrap_or_else(PoisonError::into_inner) = true;
        let mut registers = lock(&self.registers);
        registers.configuration = configuration;
        registers.status = csts::READY;
    }

    fn configure(&self, value: u32) {
        let value = value & cc::WRITABLE;
        let old = lock(&self.registers).configuration;
        match (old & cc::ENABLE != 0, value & cc::ENABLE != 0) {
            (false, true) => self.start(value),
            (true, false) => {
                self.stop(false);
                lock(&self.registers).configuration = value;
            }
            _ => lock(&self.registers).configuration = value,
        }
        let shutting_down = value & cc::SHUTDOWN != 0;
        if shutting_down && lock(&self.registers).status & csts::SHUTDOWN == 0 {
            if let Err(error) = self.disk.flush() {
                tracing::warn!(%error, "what was written is not on the medium");
            }
            lock(&self.registers).status |= csts::SHUTDOWN_COMPLETE;
        }
    }

    /// Signals the interrupt of a completion queue.
    pub(super) fn signal(&self, queue: &CompletionQueue) {
        if let Some(vector) = queue.vector
            && !self.link.interrupts().message(vector.into())
        {
            self.update_intx();
        }
    }

    /// Drives INTx: it is high while there are completions that the driver has not seen.
    fn update_intx(&self) {
        let masked = lock(&self.registers).mask & 1 != 0;
        let tables = lock(&self.tables);
        let due = |queue: &Arc<CompletionQueue>| queue.vector.is_some() && queue.pending();
        let level = !masked && tables.completion.iter().flatten().any(due);
        self.link.interrupts().set_intx(level);
    }

    fn uses_messages(&self) -> bool {
        matches!(self.link.interrupts().enabled(), Enabled::Msi(_) | Enabled::Msix)
    }

    fn doorbell(&self, offset: u64, value: u32) {
        let index = (offset - register::DOORBELLS) / 4;
        // The BAR has a page of doorbells.
        let queue = u16::try_from(index / 2).unwrap_or(u16::MAX);
        let completion = index % 2 == 1;
        let valid = {
            let tables = lock(&self.tables);
            if completion {
                let found = tables.completion.get(usize::from(queue)).cloned().flatten();
                drop(tables);
                found.map(|found| {
                    let fits = value < found.size;
                    if fits {
                        found.head.ring(value);
                        if found.take_stalled() {
                            self.wake_all();
                        }
                        if !self.uses_messages() {
                            self.update_intx();
                        }
                    }
                    fits
                })
            } else {
                let found = tables.submission.get(usize::from(queue)).cloned().flatten();
                drop(tables);
                found.map(|found| {
                    let fits = value < found.size;
                    if fits {
                        found.tail.ring(value);
                        self.wake(queue);
                    }
                    fits
                })
            }
        };
        match valid {
            Some(true) => {}
            // Section 5.2, figure 147: what the driver did to a doorbell.
            Some(false) => self.report_error(1),
            None => self.report_error(0),
        }
    }

    /// An asynchronous event of type "error".
    fn report_error(&self, information: u8) {
        if *self.running.read().unwrap_or_else(PoisonError::into_inner) {
            lock(&self.state).event(0, information, super::spec::log::ERRORS);
            self.wake(0);
        }
    }

    fn read32(&self, offset: u64) -> u32 {
        let registers = *lock(&self.registers);
        let high = |value: u64| (value >> 32) as u32;
        match offset {
            register::CAP => CAPABILITIES as u32,
            0x04 => high(CAPABILITIES),
            register::VS => VERSION,
            register::INTMS | register::INTMC => registers.mask,
            register::CC => registers.configuration,
            register::CSTS => registers.status,
            register::AQA => registers.admin_sizes,
            register::ASQ => registers.admin_submission as u32,
            0x2c => high(registers.admin_submission),
            register::ACQ => registers.admin_completion as u32,
            0x34 => high(registers.admin_completion),
            _ => 0,
        }
    }

    fn write32(&self, offset: u64, value: u32) {
        const DWORD: u64 = 0xffff_ffff;
        let low = |old: u64| old & !DWORD | u64::from(value & !0xfff);
        let high = |old: u64| old & DWORD | u64::from(value) << 32;
        match offset {
            register::INTMS | register::INTMC => {
                {
                    let mut registers = lock(&self.registers);
                    let set = offset == register::INTMS;
                    registers.mask = if set { registers.mask | value } else { registers.mask & !value };
                }
                self.update_intx();
            }
            register::CC => self.configure(value),
            register::AQA | register::ASQ | 0x2c | register::ACQ | 0x34 => {
                let mut registers = lock(&self.registers);
                match offset {
                    register::AQA => registers.admin_sizes = value & 0x0fff_0fff,
                    register::ASQ => registers.admin_submission = low(registers.admin_submission),
                    0x2c => registers.admin_submission = high(registers.admin_submission),
                    register::ACQ => registers.admin_completion = low(registers.admin_completion),
                    _ => registers.admin_completion = high(registers.admin_completion),
                }
            }
            _ if offset >= register::DOORBELLS => self.doorbell(offset, value),
            _ => {}
        }
    }
}

impl Model for Nvme {
    fn read(&self, _bar: u8, offset: u64, to: &mut [u8]) {
        for (at, byte) in (offset..).zip(to) {
            let word = if at < register::END { self.shared.read32(at & !3) } else { 0 };
            *byte = (word >> (8 * (at & 3))).to_le_bytes()[0];
        }
    }

    /// Only whole dwords mean something (section 3.1).
    fn write(&self, _bar: u8, offset: u64, from: &[u8]) {
        for (at, word) in (offset..).step_by(4).zip(from.chunks_exact(4)) {
            if let Ok(value) = u32::read_from_bytes(word) {
                self.shared.write32(at, value);
            }
        }
    }

    fn reset(&self) {
        self.shared.stop(true);
    }
}
