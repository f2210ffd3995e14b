//! The interpreter's loop.
//!
//! # Theory of operation
//! Before each block the loop looks at two words: the attention word, which other threads set, and
//! `CpuState::slow`, which holds the vCPU's own reasons to go slowly (single-step, interrupt shadows,
//! breakpoints, HLT). If both are zero it finds the block for the present physical address, decoding it if
//! need be, and runs its instructions one after the other. An instruction that cannot simply complete
//! returns a [`Stop`]; faults are delivered here and nowhere else.
//!
//! When there is a reason to go slowly, one instruction is run as a block of its own, and what must happen
//! between instructions happens in `service`.

use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl, Instruction};
use mmu::{AccessKind, Gpa, Gva, Privilege};

use crate::attention;
use crate::block::{BLOCK_LENGTH, BlockCache, Crossing};
use crate::debug::dr6;
use crate::event::Event;
use crate::exit::Exit;
use crate::fault::{Exec, Fault, Stop, fault};
use crate::flags;
use crate::insn::{INSTRUCTION_LENGTH, Insn};
use crate::ram::RamPage;
use crate::state::{CodeMode, Segment, seg, slow};
use crate::vcpu::Vcpu;

/// Why [`Interpreter::run`] returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The vCPU sleeps: call again when its attention word is set.
    Halted,
    /// [`attention::KICK`] was raised (it is cleared).
    Kicked,
    /// A triple fault: the vCPU has shut down.
    TripleFault,
}

/// The engine *interpret*: decodes, caches and executes. It serves one vCPU for life: what it has decoded
/// refers to native code that the vCPU holds.
pub struct Interpreter {
    blocks: BlockCache,
}

impl std::fmt::Debug for Interpreter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interpreter")
    }
}

impl Default for Interpreter {
    fn default() -> Self {
        Self::new()
    }
}

/// What `service` decided.
enum Next {
    /// Run a block.
    Run,
    /// Run one instruction.
    Step,
    /// Leave the loop.
    Leave(Outcome),
}

impl Interpreter {
    /// An engine without decoded code.
    pub fn new() -> Self {
        Self { blocks: BlockCache::new() }
    }

    /// Runs `vcpu` until something needs its caller.
    pub fn run(&mut self, vcpu: &mut Vcpu) -> Outcome {
        vcpu.enter();
        let outcome = self.run_inside(vcpu);
        vcpu.sync_mxcsr();
        vcpu.leave();
        outcome
    }

    /// Executes exactly one instruction (or delivers one event), as debuggers and tests want it. `None` if
    /// the vCPU goes on.
    pub fn step(&mut self, vcpu: &mut Vcpu) -> Option<Outcome> {
        vcpu.enter();
        let outcome = match service(vcpu) {
            Next::Leave(outcome) => Some(outcome),
            Next::Run | Next::Step => self.step_inside(vcpu),
        };
        vcpu.sync_mxcsr();
        vcpu.leave();
        outcome
    }

    fn run_inside(&mut self, vcpu: &mut Vcpu) -> Outcome {
        loop {
            if let Some(outcome) = self.turn(vcpu) {
                return outcome;
            }
        }
    }

    /// As [`Self::run`], for no more than `turns` blocks; `None` if the vCPU goes on.
    #[cfg(feature = "testing")]
    pub fn run_turns(&mut self, vcpu: &mut Vcpu, turns: usize) -> Option<Outcome> {
        vcpu.enter();
        let outcome = (0..turns).find_map(|_| self.turn(vcpu));
        vcpu.sync_mxcsr();
        vcpu.leave();
        outcome
    }

    /// One turn of the loop: a block, or one instruction.
    #[inline(always)]
    fn turn(&mut self, vcpu: &mut Vcpu) -> Option<Outcome> {
        if vcpu.attention.peek() | vcpu.state.slow != 0 {
            match service(vcpu) {
                Next::Run => {}
                Next::Step => return self.step_inside(vcpu),
                Next::Leave(outcome) => return Some(outcome),
            }
        }
        let result = match self.block(vcpu) {
            Ok(Some(insns)) => execute(vcpu, insns),
            Ok(None) => self.uncached(vcpu, false),
            Err(stop) => Err(stop),
        };
        match result {
            Ok(()) => None,
            Err(stop) => stopped(vcpu, *stop),
        }
    }

    /// One instruction outside the cache, with what belongs to single-stepping around it.
    fn step_inside(&mut self, vcpu: &mut Vcpu) -> Option<Outcome> {
        let shadows = slow::STI_SHADOW | slow::SS_SHADOW;
        let before = vcpu.state.slow & shadows;
        let trap = vcpu.state.slow & slow::SINGLE_STEP != 0;
        let pending = vcpu.state.pending_dr6;
        // A shadow lasts for one instruction; the instruction may begin one of its own.
        vcpu.state.slow &= !(shadows | slow::NO_STEP_TRAP);
        let result = self.uncached(vcpu, before & slow::SS_SHADOW != 0);
        if before & slow::SS_SHADOW != 0 {
            // Two loads of SS in a row do not shadow for ever.
            vcpu.state.slow &= !slow::SS_SHADOW;
        }
        let faulted = match &result {
            Ok(()) => false,
            Err(stop) => matches!(**stop, Stop::Fault(Fault { trap: false, .. })),
        };
        if faulted {
            // It will run again, and meet its breakpoints then.
            vcpu.state.pending_dr6 = pending;
            if pending == 0 {
                vcpu.state.slow &= !slow::DEBUG_TRAP;
            }
        } else if trap && vcpu.state.slow & slow::NO_STEP_TRAP == 0 {
            // Also after an iteration of a repeated string instruction, which ends in `Restart`.
            vcpu.state.pending_dr6 |= dr6::BS;
            vcpu.state.slow |= slow::DEBUG_TRAP;
        }
        vcpu.state.slow &= !slow::NO_STEP_TRAP;
        match result {
            Ok(()) => None,
            Err(stop) => stopped(vcpu, *stop),
        }
    }

    /// The instructions at the present RIP: from the cache, or decoded now. `None` if they cannot be cached.
    fn block(&mut self, vcpu: &mut Vcpu) -> Exec<Option<&[Insn]>> {
        let gva = code_address(vcpu)?;
        let gpa = fetch(vcpu, gva)?;
        let mode = vcpu.state.code_mode;
        let Some(stamp) = vcpu.ram.page(gpa).map(|p| p.stamp()) else { return Ok(None) };
        if let Some(place) = self.blocks.find(gpa, mode, stamp) {
            return Ok(Some(self.blocks.insns(place)));
        }
        self.decode(vcpu, gva, gpa)
    }

    #[cold]
    #[inline(never)]
    fn decode(&mut self, vcpu: &mut Vcpu, gva: Gva, gpa: Gpa) -> Exec<Option<&[Insn]>> {
        self.make_room(vcpu);
        let mode = vcpu.state.code_mode;
        let ram = std::sync::Arc::clone(&vcpu.ram);
        let Some(page) = ram.page(gpa) else { return Ok(None) };
        let left = 0x1000 - gpa.page_offset() as usize;
        if left < INSTRUCTION_LENGTH && self.blocks.crossing(gpa, mode, page.stamp()).is_some() {
            return self.crossing(vcpu, gva, gpa);
        }
        let Some(stamp) = watch(vcpu, page) else { return Ok(None) };
        let offset = gpa.page_offset() as usize;
        // What the longest block can take, or the rest of the page.
        let mut bytes = [0; BLOCK_LENGTH * INSTRUCTION_LENGTH];
        let len = bytes.len().min(0x1000 - offset);
        let bytes = &mut bytes[..len];
        if !ram.copy_from(gpa, bytes) {
            return Ok(None);
        }
        if let Some(place) = self.blocks.find_again(gpa, mode, stamp, bytes) {
            vcpu.stats.blocks_kept += 1;
            // A later write has given the page a later stamp, by which the block is not found.
            return Ok((page.stamp() == stamp).then(|| self.blocks.insns(place)));
        }
        // Relative to the page, so that nothing in a block depends on where the page is mapped.
        let mut decoder = Decoder::with_ip(mode.bitness(), bytes, offset as u64, DecoderOptions::NONE);
        let insns = self.blocks.arena();
        let start = insns.len();
        let mut i = Instruction::default();
        while insns.len() < start + BLOCK_LENGTH && decoder.can_decode() {
            let left = len - decoder.position();
            decoder.decode_out(&mut i);
            if decoder.last_error() == DecoderError::NoMoreBytes && left < INSTRUCTION_LENGTH {
                // It goes on in the next page, which may be anywhere.
                break;
            }
            let at = len - left;
            insns.push(lower(vcpu, &i, mode, &bytes[at..]));
            if ends_block(&i) {
                break;
            }
        }
        if insns.len() == start {
            return self.crossing(vcpu, gva, gpa);
        }
        vcpu.stats.blocks_decoded += 1;
        if page.stamp() != stamp {
            // Written while it was decoded: run what is there now, once.
            return Ok(None);
        }
        // What an instruction is may depend on bytes behind it, if they make it too long.
        let seen = &bytes[..len.min(decoder.position() + INSTRUCTION_LENGTH)];
        Ok(Some(self.blocks.keep(gpa, mode, stamp, start, seen)))
    }

    /// The instruction at `gpa`, which goes on in the next page.
    fn crossing(&mut self, vcpu: &mut Vcpu, gva: Gva, gpa: Gpa) -> Exec<Option<&[Insn]>> {
        let mode = vcpu.state.code_mode;
        let ram = std::sync::Arc::clone(&vcpu.ram);
        let first_len = 0x1000 - gpa.page_offset() as usize;
        let second = fetch(vcpu, vcpu.wrapped(gva.wrapping_add(first_len as u64)))?;
        let (Some(page), Some(second_page)) = (ram.page(gpa), ram.page(second)) else { return Ok(None) };
        let known = self.blocks.crossing(gpa, mode, page.stamp());
        if known.is_some_and(|c| c.second == second && c.second_stamp == second_page.stamp()) {
            let known = self.blocks.crossing(gpa, mode, page.stamp());
            return Ok(known.map(|c| std::slice::from_ref(&c.insn)));
        }
        let (Some(stamp), Some(second_stamp)) = (watch(vcpu, page), watch(vcpu, second_page)) else {
            return Ok(None);
        };
        let mut bytes = [0; INSTRUCTION_LENGTH];
        let (head, tail) = bytes.split_at_mut(first_len.min(INSTRUCTION_LENGTH));
        if !ram.copy_from(gpa, head) || !ram.copy_from(second, tail) {
            return Ok(None);
        }
        let insn = if let Some(insn) = self.blocks.crossing_again(gpa, mode, &bytes) {
            vcpu.stats.blocks_kept += 1;
            insn
        } else {
            let mut i = Instruction::default();
            Decoder::with_ip(mode.bitness(), &bytes, gpa.page_offset(), DecoderOptions::NONE)
                .decode_out(&mut i);
            vcpu.stats.blocks_decoded += 1;
            lower(vcpu, &i, mode, &bytes)
        };
        if page.stamp() != stamp || second_page.stamp() != second_stamp {
            return Ok(None);
        }
        let crossing = Crossing { gpa, mode, stamp, second, second_stamp, bytes, insn };
        Ok(Some(std::slice::from_ref(self.blocks.keep_crossing(crossing))))
    }

    /// Decodes and executes one instruction without the cache: one that lies outside RAM, or is stepped.
    /// `shadowed` if the instruction before it loaded SS: its breakpoint is then not met.
    #[cold]
    #[inline(never)]
    fn uncached(&mut self, vcpu: &mut Vcpu, shadowed: bool) -> Exec {
        let gva = code_address(vcpu)?;
        let breakpoints = vcpu.instruction_breakpoint(gva.0);
        if breakpoints != 0 && !shadowed {
            return fault(Fault::db(breakpoints, false));
        }
        let mut bytes = [0; INSTRUCTION_LENGTH];
        let mut len = (0x1000 - gva.page_offset() as usize).min(INSTRUCTION_LENGTH);
        read_code(vcpu, gva, &mut bytes[..len])?;
        let mode = vcpu.state.code_mode;
        let mut i = Instruction::default();
        let mut decoder = Decoder::with_ip(mode.bitness(), &bytes[..len], gva.0, DecoderOptions::NONE);
        decoder.decode_out(&mut i);
        if decoder.last_error() == DecoderError::NoMoreBytes && len < INSTRUCTION_LENGTH {
            let next = vcpu.wrapped(gva.wrapping_add(len as u64));
            read_code(vcpu, next, &mut bytes[len..])?;
            len = INSTRUCTION_LENGTH;
            Decoder::with_ip(mode.bitness(), &bytes[..len], gva.0, DecoderOptions::NONE).decode_out(&mut i);
        }
        self.make_room(vcpu);
        let insn = lower(vcpu, &i, mode, &bytes[..len]);
        // RF has done its work. A fault sets it in its frame again, see `event`.
        if vcpu.state.slow & slow::RESUME != 0 {
            vcpu.set_rflags(flags::RF, 0);
        }
        execute(vcpu, std::slice::from_ref(&insn))
    }

    /// Makes sure that there is room for the native code of one more block. Blocks refer to that code, so
    /// they are forgotten with it.
    fn make_room(&mut self, vcpu: &mut Vcpu) {
        if vcpu.native.is_nearly_full() {
            self.blocks.clear();
            vcpu.native.reset();
        }
    }
}

/// Makes `page` watched and returns its stamp: what is decoded from the page from now on is valid until the
/// stamp changes. `None` if the page was written meanwhile.
fn watch(vcpu: &mut Vcpu, page: RamPage<'_>) -> Option<u32> {
    if page.ready().is_none() {
        vcpu.tlb.write_protect(page.host);
        vcpu.outside(|vcpu| vcpu.ram.group().watch(&vcpu.membership, page));
    }
    page.ready()
}

/// Lowers `i`, which was decoded from the start of `bytes`.
fn lower(vcpu: &mut Vcpu, i: &Instruction, mode: CodeMode, bytes: &[u8]) -> Insn {
    let mut insn = Insn::lower(vcpu, i, mode);
    if i.is_invalid()
        && let Some(longest) = bytes.get(..INSTRUCTION_LENGTH)
    {
        // Invalid for another reason than its length, such as LOCK, it can be decoded so.
        let mut decoder = Decoder::new(mode.bitness(), longest, DecoderOptions::NO_INVALID_CHECK);
        if decoder.decode().is_invalid() && decoder.position() == INSTRUCTION_LENGTH {
            insn.run = too_long;
        }
    }
    insn
}

/// The handler of an instruction of more than 15 bytes: #GP (Intel SDM vol. 3, 6.15).
fn too_long(_: &mut Vcpu, _: &Insn) -> Exec {
    fault(Fault::gp(0))
}

/// Runs the instructions of a block.
#[inline(always)]
fn execute(vcpu: &mut Vcpu, insns: &[Insn]) -> Exec {
    vcpu.state.block_end = insns.len() as u32;
    let mut done = 0;
    for insn in insns {
        let rip = vcpu.state.rip();
        vcpu.state.set_rip(rip.wrapping_add(u64::from(insn.len)));
        done += 1;
        if let Err(stop) = (insn.run)(vcpu, insn) {
            vcpu.stats.instructions += done;
            if matches!(*stop, Stop::Restart | Stop::Fault(Fault { trap: false, .. })) {
                vcpu.stats.instructions -= 1;
                vcpu.state.set_rip(rip);
            }
            return Err(stop);
        }
        if done >= u64::from(vcpu.state.block_end) {
            break;
        }
    }
    vcpu.stats.instructions += done;
    Ok(())
}

/// Acts on an instruction that did not simply complete.
#[cold]
fn stopped(vcpu: &mut Vcpu, stop: Stop) -> Option<Outcome> {
    match stop {
        Stop::Restart => {
            // A repeated string instruction between two iterations: an interrupt's frame has RF set, and its
            // breakpoint is not met again.
            vcpu.set_rflags(flags::RF, flags::RF);
            None
        }
        Stop::Halt => {
            vcpu.stats.halts += 1;
            vcpu.state.slow |= slow::HALTED;
            None
        }
        Stop::TripleFault => Some(Outcome::TripleFault),
        Stop::Fault(f) => {
            vcpu.stats.exceptions += 1;
            deliver(vcpu, Event::Fault(f))
        }
    }
}

fn deliver(vcpu: &mut Vcpu, event: Event) -> Option<Outcome> {
    match vcpu.deliver(event) {
        Ok(()) => None,
        Err(_) => {
            vcpu.stats.undelivered = Some(event.vector());
            Some(Outcome::TripleFault)
        }
    }
}

/// What must happen between two instructions, in the order of Intel SDM vol. 3, table 6-2.
#[cold]
#[inline(never)]
fn service(vcpu: &mut Vcpu) -> Next {
    vcpu.sync_mxcsr();
    let word = vcpu.attention.peek();
    if word & (attention::WATCH | attention::STOP) != 0 {
        vcpu.leave();
        vcpu.enter();
    }
    if word & attention::FLUSH_TLB != 0 && vcpu.attention.take(attention::FLUSH_TLB) != 0 {
        vcpu.tlb.flush_all();
    }
    if word & attention::KICK != 0 && vcpu.attention.take(attention::KICK) != 0 {
        return Next::Leave(Outcome::Kicked);
    }
    if vcpu.state.slow & slow::ENTER_PVM != 0 {
        vcpu.enter_pvm_mode();
    }
    if word & attention::INIT != 0 && vcpu.attention.take(attention::INIT) != 0 {
        vcpu.wait_for_sipi();
    }
    if vcpu.state.slow & slow::WAIT_FOR_SIPI != 0 {
        if vcpu.attention.take(attention::SIPI) == 0 {
            return Next::Leave(Outcome::Halted);
        }
        let vector = vcpu.attention.take_sipi();
        vcpu.state.slow &= !slow::WAIT_FOR_SIPI;
        vcpu.state.set_real_mode_cs(u16::from(vector) << 8);
        vcpu.state.seg_base[usize::from(seg::CS)] = u64::from(vector) << 12;
        vcpu.state.set_rip(0);
        vcpu.refresh();
    } else if word & attention::SIPI != 0 {
        // Not waiting for it: ignored.
        vcpu.attention.take(attention::SIPI);
    }
    let state = &mut vcpu.state;
    if state.slow & slow::DEBUG_TRAP != 0 && state.slow & slow::SS_SHADOW == 0 {
        state.slow &= !(slow::DEBUG_TRAP | slow::HALTED);
        let dr6 = std::mem::take(&mut state.pending_dr6);
        vcpu.stats.exceptions += 1;
        if let Some(outcome) = deliver(vcpu, Event::Fault(Fault::db(dr6, true))) {
            return Next::Leave(outcome);
        }
        return Next::Step;
    }
    if vcpu.attention.take(attention::NMI) != 0 {
        vcpu.state.slow |= slow::NMI_PENDING;
    }
    let shadow = vcpu.state.slow & (slow::STI_SHADOW | slow::SS_SHADOW) != 0;
    if vcpu.state.slow & slow::NMI_PENDING != 0 && !shadow && vcpu.nmi_open() {
        vcpu.state.slow &= !(slow::NMI_PENDING | slow::HALTED);
        if !vcpu.state.deprivileged {
            vcpu.state.slow |= slow::NMI_BLOCKED;
        }
        vcpu.stats.interrupts += 1;
        if let Some(outcome) = deliver(vcpu, Event::Nmi) {
            return Next::Leave(outcome);
        }
    } else if word & attention::INTERRUPT != 0 && !vcpu.interrupts_open() {
        vcpu.note_waiting_interrupt();
    } else if word & attention::INTERRUPT != 0 && !shadow {
        // Cleared before the controller is asked, so that an interrupt that arrives now raises it again.
        vcpu.attention.take(attention::INTERRUPT);
        if let Some(vector) = vcpu.platform.acknowledge_interrupt() {
            if vcpu.platform.interrupt_pending() {
                vcpu.attention.raise(attention::INTERRUPT);
            }
            vcpu.state.slow &= !slow::HALTED;
            vcpu.stats.interrupts += 1;
            if let Some(outcome) = deliver(vcpu, Event::Interrupt(vector)) {
                return Next::Leave(outcome);
            }
        }
    }
    if word & attention::UNHALT != 0 && vcpu.attention.take(attention::UNHALT) != 0 {
        vcpu.state.unhalted = true;
    }
    if vcpu.state.slow & slow::HALTED != 0 && std::mem::take(&mut vcpu.state.unhalted) {
        vcpu.state.slow &= !slow::HALTED;
    }
    if vcpu.state.slow & slow::HALTED != 0 {
        return Next::Leave(Outcome::Halted);
    }
    // NMI_BLOCKED and a latched NMI behind it are no reason to step.
    let step = slow::SINGLE_STEP
        | slow::STI_SHADOW
        | slow::SS_SHADOW
        | slow::BREAKPOINTS
        | slow::DEBUG_TRAP
        | slow::RESUME;
    if vcpu.state.slow & step != 0 { Next::Step } else { Next::Run }
}

impl Vcpu {
    /// Puts the vCPU into the state after INIT: it waits for a start-up IPI.
    pub fn wait_for_sipi(&mut self) {
        self.leave_pvm_mode();
        self.state.init();
        self.state.slow |= slow::WAIT_FOR_SIPI;
        self.platform.init();
        self.refresh();
    }

    /// The attention bits that end the sleep of a vCPU that [`Outcome::Halted`] was returned for.
    pub fn wake_mask(&mut self) -> u32 {
        // WATCH and FLUSH_TLB can wait until the vCPU runs again.
        let always = attention::KICK | attention::INIT;
        if self.state.slow & slow::WAIT_FOR_SIPI != 0 {
            return always | attention::SIPI;
        }
        let interrupt = if self.interrupts_open() { attention::INTERRUPT } else { 0 };
        let nmi = if self.nmi_open() { attention::NMI } else { 0 };
        always | attention::UNHALT | interrupt | nmi
    }
}

/// The linear address of the present RIP.
#[inline(always)]
fn code_address(vcpu: &mut Vcpu) -> Exec<Gva> {
    if vcpu.state.code_mode == CodeMode::Bits64 {
        return Ok(Gva(vcpu.state.rip()));
    }
    code_address_segmented(vcpu)
}

#[cold]
fn code_address_segmented(vcpu: &mut Vcpu) -> Exec<Gva> {
    let cs = &vcpu.state.segments[usize::from(seg::CS)];
    let mask = if vcpu.state.code_mode == CodeMode::Bits16 && !cs.has(Segment::DEFAULT_BIG) {
        // IP wraps at 64 KiB unless the limit says that it is wider.
        if cs.limit > 0xffff { 0xffff_ffff } else { 0xffff }
    } else {
        0xffff_ffff
    };
    let ip = vcpu.state.rip() & mask;
    let limit = u64::from(cs.limit);
    vcpu.state.set_rip(ip);
    if ip > limit {
        return fault(Fault::gp(0));
    }
    Ok(Gva(vcpu.state.seg_base[usize::from(seg::CS)].wrapping_add(ip) & 0xffff_ffff))
}

/// Translates the address of an instruction.
#[inline(always)]
fn fetch(vcpu: &mut Vcpu, gva: Gva) -> Exec<Gpa> {
    // Fetches do not depend on SMAP: one table for each privilege serves.
    let base = if vcpu.state.cpl == 3 { 0 } else { crate::tlb::Table::Supervisor.base() };
    match vcpu.tlb.fetch(base, vcpu.state.tlb_tag, gva.0) {
        Some(gpa) => Ok(gpa),
        None => fetch_slow(vcpu, gva, base),
    }
}

#[cold]
#[inline(never)]
fn fetch_slow(vcpu: &mut Vcpu, gva: Gva, base: u64) -> Exec<Gpa> {
    if vcpu.state.code_mode == CodeMode::Bits64 && !vcpu.walk.canonical(gva) {
        return fault(Fault::gp(0));
    }
    if vcpu.tlb.adopt_global(base, vcpu.state.tlb_tag, gva)
        && let Some(gpa) = vcpu.tlb.fetch(base, vcpu.state.tlb_tag, gva.0)
    {
        return Ok(gpa);
    }
    // `Implicit` fills the table with SMAP in force, where `fetch` looks; for fetches it means the same.
    let privilege = if vcpu.state.cpl == 3 { Privilege::User } else { Privilege::Implicit };
    Ok(vcpu.translate(gva, AccessKind::Fetch, privilege)?.0)
}

/// Reads instruction bytes that lie in one page.
fn read_code(vcpu: &mut Vcpu, gva: Gva, bytes: &mut [u8]) -> Exec {
    let gpa = fetch(vcpu, gva)?;
    if !vcpu.ram.copy_from(gpa, bytes) {
        // Devices know accesses of up to 8 bytes.
        for (n, chunk) in bytes.chunks_mut(8).enumerate() {
            vcpu.exit(Exit::MmioRead { gpa: gpa.wrapping_add(n as u64 * 8), data: chunk });
        }
    }
    Ok(())
}

/// Whether nothing may follow `i` in its block: it branches, or what follows may have to be decoded, or
/// interrupted, differently.
fn ends_block(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    i.flow_control() != FlowControl::Next && i.flow_control() != FlowControl::XbeginXabortXend
        || matches!(
            i.mnemonic(),
            M::Sti
                | M::Popf
                | M::Popfd
                | M::Popfq
                | M::Hlt
                | M::Wrmsr
                | M::Lmsw
                | M::Xsetbv
                | M::Invlpg
                | M::Invpcid
                | M::Mwait
                | M::Cpuid
                | M::Out
                | M::In
                | M::Outsb
                | M::Outsw
                | M::Outsd
        )
        || matches!(i.op0_register(), iced_x86::Register::SS)
        || i.op0_register().is_cr()
        || i.op0_register().is_dr()
}
