//! A device to test with: every kind of BAR, every kind of interrupt, DMA, migration, and a log of what it writes.
//!
//! Its registers are in BAR 0 (and mirrored in the ports of BAR 1); their offsets are the constants of [`registers`]. A
//! command copies memory at once, in the write that gives it: there is no thread and no time in it.
//!
//! | BAR | kind | what it is |
//! |---|---|---|
//! | 0 | memory, 32-bit, 4 KiB | registers |
//! | 1 | ports, 32 | the first registers again |
//! | 2 | memory, 64-bit, prefetchable, 64 KiB | memory, all of it mappable |
//! | 4 | memory, 64-bit, 64 KiB | MSI-X's table and pending bits, then registers, then memory in a mappable area |
//! | ROM | 2 KiB | a signature and zeros |

pub mod registers;

use std::sync::{Arc, Mutex};

use iommufd::iova::Iova;
use pci::config::{BarKind, PciIds};
use registers as reg;

use crate::{
    Errno, Result,
    device::{Area, Mappable},
    dma::{Dma, DmaFault},
    eventfd::lock,
    migration::{
        Migration,
        engine::{Saved, StateMachine},
    },
    pci::{
        function::{Function, FunctionError, Link},
        interrupts::Kinds,
        layout::{BarLayout, Layout, MsixLayout},
        model::Model,
    },
};

/// QEMU's vendor ID for what nobody sells, and a device ID that QEMU does not use.
const IDS: PciIds = PciIds {
    vendor: 0x1234,
    device: 0x7e57,
    revision: 1,
    class: 0xff_00_00,
    subsystem_vendor: 0,
    subsystem: 0,
};
/// How many bytes BAR 2 has.
pub const MEMORY_SIZE: u64 = 0x1_0000;
/// How many bytes one step of a copy moves.
const STEP: u64 = 0x1_0000;

/// The registers that software sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Registers {
    scratch: u32,
    inverted: u32,
    source: u64,
    target: u64,
    length: u32,
    pasid: u32,
    status: u32,
    fault: u64,
    commands: u32,
}

#[derive(Debug, Default)]
struct State {
    registers: Registers,
    /// Commands are refused: the device is being saved or loaded.
    stopped: bool,
}

/// The device's registers.
#[derive(Debug)]
struct Core {
    link: Arc<Link>,
    state: Mutex<State>,
    /// One command at a time; who stops the device waits for it.
    command: Mutex<()>,
}

/// The test device.
#[derive(Debug)]
pub struct TestDevice {
    core: Arc<Core>,
    migration: StateMachine<Image>,
}

/// The device as it migrates.
#[derive(Debug)]
struct Image(Arc<Core>);

/// Makes one.
///
/// # Errors
/// [`FunctionError`].
pub fn function() -> Result<Function<TestDevice>, FunctionError> {
    let bar = |index, kind, size, memory| BarLayout { index, kind, size, memory };
    let mut rom = vec![0; 2048];
    // The signature of an expansion ROM (PCI 3.0, section 6.3.1.1).
    if let Some(signature) = rom.get_mut(..2) {
        signature.copy_from_slice(&[0x55, 0xaa]);
    }
    let layout = Layout {
        bars: vec![
            bar(0, BarKind::Memory32, 0x1000, Mappable::No),
            bar(1, BarKind::Io, 32, Mappable::No),
            bar(2, BarKind::Memory64 { prefetchable: true }, MEMORY_SIZE, Mappable::All),
            bar(
                4,
                BarKind::Memory64 { prefetchable: false },
                0x1_0000,
                Mappable::Areas(vec![Area { offset: 0x8000, size: 0x8000 }]),
            ),
        ],
        rom,
        interrupts: Kinds { intx: true, msi: 4, msix: 16 },
        msix: Some(MsixLayout { bar: 4, table: 0, pba: 0x1000 }),
        express: true,
        power_management: true,
        atomic_completer: Some(7),
        sriov: None,
        dma_logging: true,
        ids: IDS,
    };
    Function::new(layout, |link| {
        let core = Arc::new(Core { link, state: Mutex::default(), command: Mutex::default() });
        TestDevice { migration: StateMachine::new(Image(Arc::clone(&core))), core }
    })
}

impl Core {
    fn word(&self, offset: u64) -> u32 {
        let Registers { scratch, inverted, source, target, length, pasid, status, fault, commands } =
            lock(&self.state).registers;
        match offset {
            reg::ID => reg::ID_VALUE,
            reg::SCRATCH => scratch,
            reg::INVERTED => inverted,
            reg::INTX => self.link.interrupts().intx().into(),
            reg::SOURCE => source as u32,
            reg::SOURCE_HIGH => (source >> 32) as u32,
            reg::TARGET => target as u32,
            reg::TARGET_HIGH => (target >> 32) as u32,
            reg::LENGTH => length,
            reg::PASID => pasid,
            reg::STATUS => status,
            reg::FAULT => fault as u32,
            reg::FAULT_HIGH => (fault >> 32) as u32,
            reg::COMMANDS => commands,
            _ => 0,
        }
    }

    fn set_word(&self, offset: u64, value: u32) {
        let low = |word: &mut u64| *word = *word & !0xffff_ffff | u64::from(value);
        let high = |word: &mut u64| *word = *word & 0xffff_ffff | u64::from(value) << 32;
        {
            let registers = &mut lock(&self.state).registers;
            match offset {
                reg::SCRATCH => registers.scratch = value,
                reg::INVERTED => registers.inverted = !value,
                reg::SOURCE => low(&mut registers.source),
                reg::SOURCE_HIGH => high(&mut registers.source),
                reg::TARGET => low(&mut registers.target),
                reg::TARGET_HIGH => high(&mut registers.target),
                reg::LENGTH => registers.length = value,
                reg::PASID => registers.pasid = value,
                _ => {}
            }
        }
        let interrupts = self.link.interrupts();
        match offset {
            reg::RAISE => {
                interrupts.message(value);
            }
            reg::INTX => interrupts.set_intx(value & 1 != 0),
            reg::NOTIFY if value == reg::NOTIFY_ERROR => interrupts.error(),
            reg::NOTIFY if value == reg::NOTIFY_REQUEST => interrupts.request(),
            reg::COMMAND => self.command(value),
            _ => {}
        }
    }

    /// Does a command. No lock but the command's is held while memory is accessed.
    fn command(&self, command: u32) {
        let _one = lock(&self.command);
        let registers = {
            let mut state = lock(&self.state);
            if state.stopped {
                state.registers.status = reg::STATUS_REFUSED;
                return;
            }
            state.registers.commands = state.registers.commands.wrapping_add(1);
            state.registers
        };
        let result = self.transfer(command, &registers);
        let done = &mut lock(&self.state).registers;
        done.fault = 0;
        done.status = match result {
            Ok(()) => reg::STATUS_DONE,
            Err(fault) => {
                if let DmaFault::Unmapped(iova) | DmaFault::Forbidden(iova) | DmaFault::Overflow(iova) = fault
                {
                    done.fault = iova.0;
                }
                reg::STATUS_FAULT
            }
        };
    }

    fn transfer(&self, command: u32, registers: &Registers) -> Result<(), DmaFault> {
        let plain: Arc<dyn Dma> = Arc::clone(&self.link) as Arc<dyn Dma>;
        let dma = match registers.pasid {
            0 => plain,
            pasid => plain.pasid(pasid).ok_or(DmaFault::Disabled)?,
        };
        let mut buffer = vec![0; STEP.min(registers.length.into()) as usize];
        let mut done = 0;
        while done < u64::from(registers.length) {
            let count = STEP.min(u64::from(registers.length) - done);
            let part = buffer.get_mut(..count as usize).unwrap_or_default();
            let source = crate::dma::after(Iova(registers.source), done);
            let target = crate::dma::after(Iova(registers.target), done);
            // Of BAR 2 the addresses wrap around.
            let memory = |address: u64| address.wrapping_add(done) % MEMORY_SIZE;
            let bar = self.link.memory(2);
            match command {
                reg::COMMAND_COPY => {
                    dma.read(source?, part)?;
                    dma.write(target?, part)?;
                }
                reg::COMMAND_LOAD => {
                    dma.read(source?, part)?;
                    if let Some(bar) = bar {
                        bar.write(memory(registers.target), part);
                    }
                }
                reg::COMMAND_STORE => {
                    if let Some(bar) = bar {
                        bar.read(memory(registers.source), part);
                    }
                    dma.write(target?, part)?;
                }
                _ => return Err(DmaFault::Disabled),
            }
            done += count;
        }
        Ok(())
    }

    fn reset(&self) {
        // A command that runs now ends first.
        let _one = lock(&self.command);
        *lock(&self.state) = State::default();
    }
}

impl Model for TestDevice {
    fn read(&self, bar: u8, offset: u64, to: &mut [u8]) {
        let registers = if bar == 4 { offset.checked_sub(reg::BAR4) } else { Some(offset) };
        for (at, byte) in to.iter_mut().enumerate() {
            let word = registers.map_or(0, |offset| self.core.word((offset + at as u64) & !3));
            let shift = 8 * ((offset + at as u64) & 3);
            *byte = (word >> shift) as u8;
        }
    }

    /// Registers are written as whole words: of a narrower access the rest is zero.
    fn write(&self, bar: u8, offset: u64, from: &[u8]) {
        let Some(offset) = (if bar == 4 { offset.checked_sub(reg::BAR4) } else { Some(offset) }) else {
            return;
        };
        for (at, bytes) in from.chunks(4).enumerate() {
            let mut word = [0; 4];
            for (to, byte) in word.iter_mut().zip(bytes) {
                *to = *byte;
            }
            self.core.set_word((offset & !3) + 4 * at as u64, u32::from_le_bytes(word));
        }
    }

    fn reset(&self) {
        self.core.reset();
        self.migration.reset();
    }

    fn migration(&self) -> Option<&dyn Migration> {
        Some(&self.migration)
    }
}

impl Saved for Image {
    fn stop(&self) {
        let _one = lock(&self.0.command);
        lock(&self.0.state).stopped = true;
    }

    fn resume(&self) {
        lock(&self.0.state).stopped = false;
    }

    /// BAR 2.
    fn early(&self) -> Vec<u8> {
        self.memory()
    }

    /// BAR 2 as it is now, then the registers.
    fn save(&self) -> Vec<u8> {
        let Registers { scratch, inverted, source, target, length, pasid, status, fault, commands } =
            lock(&self.0.state).registers;
        let mut bytes = self.memory();
        for word in
            [scratch, inverted, length, pasid, status, commands, self.0.link.interrupts().intx().into()]
        {
            bytes.extend(word.to_le_bytes());
        }
        for word in [source, target, fault] {
            bytes.extend(word.to_le_bytes());
        }
        bytes
    }

    fn load(&self, early: &[u8], rest: &[u8]) -> Result<()> {
        let (memory, registers) = rest.split_at_checked(MEMORY_SIZE as usize).ok_or(Errno::INVAL)?;
        let (words, long) = registers.split_at_checked(28).ok_or(Errno::INVAL)?;
        if early.len() != memory.len() || long.len() != 24 {
            return Err(Errno::INVAL);
        }
        let words: Vec<u32> = words
            .chunks_exact(4)
            .filter_map(|word| word.first_chunk())
            .map(|word| u32::from_le_bytes(*word))
            .collect();
        let long: Vec<u64> = long
            .chunks_exact(8)
            .filter_map(|word| word.first_chunk())
            .map(|word| u64::from_le_bytes(*word))
            .collect();
        let (&[scratch, inverted, length, pasid, status, commands, intx], &[source, target, fault]) =
            (words.as_slice(), long.as_slice())
        else {
            return Err(Errno::INVAL);
        };
        if let Some(bar) = self.0.link.memory(2) {
            bar.write(0, memory);
        }
        lock(&self.0.state).registers =
            Registers { scratch, inverted, source, target, length, pasid, status, fault, commands };
        self.0.link.interrupts().set_intx(intx != 0);
        Ok(())
    }
}

impl Image {
    fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; MEMORY_SIZE as usize];
        if let Some(bar) = self.0.link.memory(2) {
            bar.read(0, &mut bytes);
        }
        bytes
    }
}
