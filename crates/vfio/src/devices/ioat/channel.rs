//! The channel, and the thread that does its work.

use std::{
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
};

use iommufd::iova::Iova;
use zerocopy::FromBytes;

use super::registers as reg;
use crate::{
    dma::Dma,
    eventfd::lock,
    pci::{function::Link, model::Model},
};

/// What a channel does, by the numbers of CHANSTS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Status {
    Active = 0,
    Done = 1,
    Suspended = 2,
    #[default]
    Halted = 3,
}

#[derive(Debug, Default)]
struct Registers {
    general: u8,
    interrupts: u8,
    attention: u32,
    control: u16,
    count: u16,
    status: Status,
    /// The last descriptor that is done.
    completed: u64,
    chain: u64,
    completion: u64,
    current: u64,
    error: u32,
    error_mask: u32,
    /// An interrupt may be signalled: software has said so since the last one.
    armed: bool,
    /// How many descriptors are still to be done.
    left: u32,
}

#[derive(Debug, Default)]
struct State {
    registers: Registers,
    /// The thread is in the middle of a descriptor.
    busy: bool,
    exit: bool,
}

struct Shared {
    link: Arc<Link>,
    state: Mutex<State>,
    /// Something is to be done, or a descriptor is done.
    changed: Condvar,
}

/// The engine.
pub struct Ioat {
    shared: Arc<Shared>,
    /// Begins with the first work.
    thread: Mutex<Option<thread::JoinHandle<()>>>,
}

impl fmt::Debug for Ioat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ioat").field("state", &self.shared.state).finish_non_exhaustive()
    }
}

/// A descriptor in memory (`struct ioat_dma_descriptor`).
#[repr(C)]
#[derive(FromBytes)]
struct Descriptor {
    size: u32,
    control: u32,
    source: u64,
    destination: u64,
    next: u64,
    _rest: [u64; 4],
}

impl Shared {
    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread.
    fn run(&self) {
        let mut buffer = vec![0; 1 << reg::TRANSFER_SHIFT];
        let mut state = lock(&self.state);
        loop {
            while !state.exit && (state.registers.status != Status::Active || state.registers.left == 0) {
                state = self.wait(state);
            }
            if state.exit {
                return;
            }
            let at = state.registers.current;
            state.busy = true;
            drop(state);
            let result = self.descriptor(at, &mut buffer);
            state = lock(&self.state);
            state.busy = false;
            self.complete(&mut state.registers, at, result);
            self.changed.notify_all();
        }
    }

    /// Does what the descriptor at `at` says: its control word and its link, or the bit of CHANERR.
    fn descriptor(&self, at: u64, buffer: &mut [u8]) -> Result<(u32, u64), u32> {
        if !at.is_multiple_of(reg::DESCRIPTOR as u64) {
            return Err(reg::ERR_NEXT_DESC_ALIGN);
        }
        let mut bytes = [0; reg::DESCRIPTOR];
        self.link.read(Iova(at), &mut bytes).map_err(|_| reg::ERR_NEXT_ADDR)?;
        let descriptor = Descriptor::read_from_bytes(&bytes).map_err(|_| reg::ERR_CONTROL)?;
        let Descriptor { size, control, source, destination, next, .. } = descriptor;
        if control >> reg::CONTROL_OPERATION_SHIFT != 0 {
            return Err(reg::ERR_CONTROL);
        }
        if control & reg::CONTROL_NULL == 0 {
            let data =
                buffer.get_mut(..size as usize).filter(|data| !data.is_empty()).ok_or(reg::ERR_LENGTH)?;
            self.link.read(Iova(source), data).map_err(|_| reg::ERR_SRC_ADDR)?;
            self.link.write(Iova(destination), data).map_err(|_| reg::ERR_DEST_ADDR)?;
        }
        Ok((control, next))
    }

    /// Takes over how a descriptor ended, unless software has stopped the channel meanwhile.
    fn complete(&self, registers: &mut Registers, at: u64, result: Result<(u32, u64), u32>) {
        if registers.left == 0 {
            return;
        }
        let interrupt = match result {
            Ok((control, next)) => {
                registers.left -= 1;
                registers.completed = at;
                registers.current = next;
                if registers.left == 0 && registers.status == Status::Active {
                    registers.status = Status::Done;
                }
                if control & reg::CONTROL_COMPLETION_WRITE != 0
                    && self
                        .link
                        .write(Iova(registers.completion), &registers.status_word().to_le_bytes())
                        .is_err()
                {
                    registers.fail(reg::ERR_COMPLETION_ADDR);
                }
                control & reg::CONTROL_INT_EN != 0
            }
            Err(error) => {
                registers.fail(error);
                registers.control & reg::CHANCTRL_ERR_INT_EN != 0
            }
        };
        if interrupt {
            self.interrupt(registers);
        }
    }

    fn interrupt(&self, registers: &mut Registers) {
        registers.attention |= 1;
        if !std::mem::take(&mut registers.armed) {
            return;
        }
        let interrupts = self.link.interrupts();
        if !interrupts.message(0) {
            interrupts.set_intx(registers.interrupts & reg::INTRCTRL_MASTER_INT_EN != 0);
        }
    }
}

impl Registers {
    fn status_word(&self) -> u64 {
        self.completed & !0x3f | self.status as u64
    }

    fn fail(&mut self, error: u32) {
        self.error |= error;
        self.status = Status::Halted;
        self.left = 0;
    }

    /// The bytes of all registers of the channel.
    fn channel(&self) -> [u8; reg::CHANNEL_END as usize] {
        let mut bytes = [0; reg::CHANNEL_END as usize];
        let mut put = |offset: u64, value: &[u8]| {
            if let Some(place) = bytes.get_mut(offset as usize..offset as usize + value.len()) {
                place.copy_from_slice(value);
            }
        };
        put(reg::CHANCTRL, &self.control.to_le_bytes());
        put(reg::DMA_COMP, &reg::DMA_COMP_V2.to_le_bytes());
        put(reg::DMACOUNT, &self.count.to_le_bytes());
        put(reg::CHANSTS, &self.status_word().to_le_bytes());
        put(reg::CHAINADDR, &self.chain.to_le_bytes());
        put(reg::CHANCMP, &self.completion.to_le_bytes());
        put(reg::CDAR, &self.current.to_le_bytes());
        put(reg::CHANERR, &self.error.to_le_bytes());
        put(reg::CHANERR_MASK, &self.error_mask.to_le_bytes());
        bytes
    }

    /// The bytes of the general registers.
    fn common(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[reg::CHANCNT as usize] = 1;
        bytes[reg::XFERCAP as usize] = reg::TRANSFER_SHIFT;
        bytes[reg::GENCTRL as usize] = self.general;
        let mut interrupts = self.interrupts;
        if self.attention != 0 {
            interrupts |= reg::INTRCTRL_INT_STATUS;
            if interrupts & reg::INTRCTRL_MASTER_INT_EN != 0 {
                interrupts |= reg::INTRCTRL_INT;
            }
        }
        bytes[reg::INTRCTRL as usize] = interrupts;
        bytes[reg::ATTNSTATUS as usize] = self.attention as u8;
        bytes[reg::VER as usize] = reg::VERSION;
        bytes
    }
}

/// Whether an access reaches the register at `at`.
fn touches(offset: u64, length: usize, at: u64) -> bool {
    (offset..offset + length as u64).contains(&at)
}

impl Ioat {
    /// A channel that is halted.
    pub(super) fn new(link: Arc<Link>) -> Self {
        let shared = Shared { link, state: Mutex::default(), changed: Condvar::new() };
        Self { shared: Arc::new(shared), thread: Mutex::default() }
    }

    fn wake(&self) {
        let mut thread = lock(&self.thread);
        if thread.is_none() {
            let shared = Arc::clone(&self.shared);
            // Without a thread the channel stays active for ever, which software takes for a device that hangs.
            *thread = thread::Builder::new().name("ioat".into()).spawn(move || shared.run()).ok();
        }
        self.shared.changed.notify_all();
    }

    fn write_channel(&self, offset: u64, from: &[u8]) {
        let mut state = lock(&self.shared.state);
        let registers = &mut state.registers;
        // What software writes replaces the bytes that it names; what cannot be written is not looked at.
        let mut bytes = registers.channel();
        let before = bytes;
        for (byte, value) in bytes.iter_mut().skip(offset as usize).zip(from) {
            *byte = *value;
        }
        let word = |at: u64, width: usize| {
            let bytes = bytes.get(at as usize..at as usize + width).unwrap_or_default();
            bytes.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte))
        };
        if touches(offset, from.len(), reg::CHANCTRL) {
            registers.control = word(reg::CHANCTRL, 2) as u16
                & (reg::CHANCTRL_ERR_COMPLETION_EN
                    | reg::CHANCTRL_ANY_ERR_ABORT_EN
                    | reg::CHANCTRL_ERR_INT_EN);
            if word(reg::CHANCTRL, 2) as u16 & reg::CHANCTRL_INT_REARM != 0 {
                registers.armed = true;
                self.shared.link.interrupts().set_intx(false);
            }
        }
        registers.completion = word(reg::CHANCMP, 8);
        registers.error_mask = word(reg::CHANERR_MASK, 4) as u32;
        if (reg::CHANERR..reg::CHANERR + 4).any(|at| touches(offset, from.len(), at)) {
            // A one clears, and what was not written is no one.
            let written = (0..4).filter(|at| touches(offset, from.len(), reg::CHANERR + at));
            let mask = written.fold(0u32, |mask, at| mask | 0xff << (8 * at));
            registers.error &= !(word(reg::CHANERR, 4) as u32 & mask);
        }
        if word(reg::CHAINADDR, 8) != registers.chain
            || bytes.get(0x10..0x18) != before.get(0x10..0x18)
            || (reg::CHAINADDR..reg::CHAINADDR + 8).any(|at| touches(offset, from.len(), at))
        {
            registers.chain = word(reg::CHAINADDR, 8);
            registers.current = registers.chain;
        }
        let mut start = false;
        if touches(offset, from.len(), reg::DMACOUNT) {
            registers.count = word(reg::DMACOUNT, 2) as u16;
            if registers.count > 0 && registers.error == 0 {
                registers.left = registers.count.into();
                registers.status = Status::Active;
                start = true;
            }
        }
        let command = if touches(offset, from.len(), reg::CHANCMD) { word(reg::CHANCMD, 1) as u8 } else { 0 };
        drop(state);
        if start {
            self.wake();
        }
        if command & reg::CHANCMD_RESET != 0 {
            self.reset_channel();
        } else if command & reg::CHANCMD_ABORT != 0 {
            self.stop(Status::Halted);
        } else if command & reg::CHANCMD_SUSPEND != 0 {
            self.stop(Status::Suspended);
        }
    }

    /// Stops the channel at the end of the descriptor that it is at, and waits for that.
    fn stop(&self, status: Status) {
        let mut state = lock(&self.shared.state);
        while state.busy {
            state.registers.left = state.registers.left.min(1);
            state = self.shared.wait(state);
        }
        state.registers.left = 0;
        state.registers.status = status;
    }

    fn reset_channel(&self) {
        self.stop(Status::Halted);
        let mut state = lock(&self.shared.state);
        let Registers { general, interrupts, .. } = state.registers;
        state.registers = Registers { general, interrupts, ..Registers::default() };
        self.shared.link.interrupts().set_intx(false);
    }
}

impl Model for Ioat {
    fn read(&self, _bar: u8, offset: u64, to: &mut [u8]) {
        let mut state = lock(&self.shared.state);
        let (bytes, at): (&[u8], u64) = match offset.checked_sub(reg::CHANNEL) {
            Some(at) => (&state.registers.channel(), at),
            None => (&state.registers.common(), offset),
        };
        let value = bytes.get(at as usize..).unwrap_or_default();
        to.fill(0);
        for (to, byte) in to.iter_mut().zip(value) {
            *to = *byte;
        }
        if touches(offset, to.len(), reg::ATTNSTATUS) {
            state.registers.attention = 0;
            self.shared.link.interrupts().set_intx(false);
        }
    }

    fn write(&self, _bar: u8, offset: u64, from: &[u8]) {
        if let Some(at) = offset.checked_sub(reg::CHANNEL) {
            if at < reg::CHANNEL_END {
                self.write_channel(at, from);
            }
            return;
        }
        let byte = |at: u64| at.checked_sub(offset).and_then(|at| from.get(at as usize)).copied();
        let mut state = lock(&self.shared.state);
        if let Some(general) = byte(reg::GENCTRL) {
            state.registers.general = general & 1;
        }
        if let Some(interrupts) = byte(reg::INTRCTRL) {
            state.registers.interrupts =
                interrupts & (reg::INTRCTRL_MASTER_INT_EN | reg::INTRCTRL_MSIX_VECTOR_CONTROL);
        }
    }

    fn reset(&self) {
        self.reset_channel();
        lock(&self.shared.state).registers = Registers::default();
    }
}

impl Drop for Ioat {
    fn drop(&mut self) {
        lock(&self.shared.state).exit = true;
        self.shared.changed.notify_all();
        let thread = self.thread.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}
