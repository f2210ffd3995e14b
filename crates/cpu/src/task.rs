//! Hardware task switches (Intel SDM vol. 3, chapter 8), in legacy protected mode only.
//!
//! # Theory of operation
//! Everything up to the commit point can fail in the old task: the new TSS is checked and both TSSs are probed for
//! the writes to come. Then the old task is saved, the busy bits, the link and TR change, and the new
//! task's registers are loaded. From there on faults belong to the new task; they are marked as traps, so that
//! RIP stays the new task's.

use mmu::Privilege;

use crate::debug::dr6;
use crate::fault::{Exec, Fault, Stop, fault, vector};
use crate::flags;
use crate::frame::Frame;
use crate::segment::{Descriptor, is_null, rpl, selector_code, system_type, virtual_8086_segment};
use crate::state::{Segment, SystemSegment, cr0, seg, slow};
use crate::vcpu::Vcpu;

/// What starts a task switch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Jump,
    Call,
    Return,
    Event,
}

/// A task switch to be made.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TaskSwitch {
    /// Selector of the new TSS.
    selector: u16,
    source: Source,
    /// EXT bit of error codes.
    ext: u32,
    /// Pushed on the new task's stack.
    error_code: Option<u32>,
    /// RF is set in the old task's saved flags.
    resume: bool,
}

impl TaskSwitch {
    /// JMP to a TSS or task gate.
    pub(crate) fn jump(selector: u16) -> Self {
        Self { selector, source: Source::Jump, ext: 0, error_code: None, resume: false }
    }

    /// CALL to a TSS or task gate.
    pub(crate) fn call(selector: u16) -> Self {
        Self { source: Source::Call, ..Self::jump(selector) }
    }

    /// IRET from a nested task.
    pub(crate) fn iret(selector: u16) -> Self {
        Self { source: Source::Return, ..Self::jump(selector) }
    }

    /// An exception or interrupt through a task gate.
    pub(crate) fn event(selector: u16, ext: u32, error_code: Option<u32>, resume: bool) -> Self {
        Self { selector, source: Source::Event, ext, error_code, resume }
    }
}

/// Where things are in a TSS.
struct Layout {
    /// Size of a register's slot.
    slot: u64,
    /// IP, FLAGS, the eight general registers and the segment selectors follow from here.
    ip: u64,
    /// How many segment selectors there are: ES CS SS DS (FS GS).
    segments: u64,
    /// The lowest permitted limit.
    limit: u32,
}

const LAYOUT16: Layout = Layout { slot: 2, ip: 14, segments: 4, limit: 0x2b };
const LAYOUT32: Layout = Layout { slot: 4, ip: 32, segments: 6, limit: 0x67 };

impl Layout {
    fn of(wide: bool) -> &'static Self {
        if wide { &LAYOUT32 } else { &LAYOUT16 }
    }

    fn flags(&self) -> u64 {
        self.ip + self.slot
    }

    fn registers(&self) -> u64 {
        self.ip + 2 * self.slot
    }

    fn selectors(&self) -> u64 {
        self.ip + 10 * self.slot
    }

    fn ldt(&self) -> u64 {
        self.selectors() + self.segments * self.slot
    }
}

/// A task's registers as its TSS holds them.
#[derive(Default)]
struct Task {
    cr3: u64,
    ip: u64,
    flags: u64,
    registers: [u64; 8],
    selectors: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Vcpu {
    /// Switches tasks.
    ///
    /// # Errors
    /// #GP, #NP, #TS, #PF in the old task; #TS, #NP, #SS, #GP in the new one.
    pub(crate) fn switch_task(&mut self, switch: TaskSwitch) -> Exec {
        let (new, d) = self.new_task_state_segment(&switch)?;
        let wide = d.kind() & 8 != 0;
        let old = self.state.tr;
        let old_layout = Layout::of(self.tss_is_wide());
        let layout = Layout::of(wide);

        // Nothing has changed yet; after these, nothing below can fault before the commit point.
        let save_size = old_layout.ldt() - old_layout.ip;
        self.probe_write_as(self.table_address(old.base, old_layout.ip), save_size, Privilege::Implicit)?;
        let mut task = self.read_task(d.base(), layout)?;
        let nested = matches!(switch.source, Source::Call | Source::Event);
        if nested {
            self.probe_write_as(self.table_address(d.base(), 0), 2, Privilege::Implicit)?;
        }
        let busy_address = |vcpu: &Self, selector| {
            vcpu.descriptor_address(selector, 8).map(|address| vcpu.table_address(address, 5))
        };
        for selector in [old.segment.selector, switch.selector] {
            if let Some(address) = busy_address(self, selector) {
                self.probe_write_as(address, 1, Privilege::Implicit)?;
            }
        }

        let mut image = self.state.flags.bits() | if switch.resume { flags::RF } else { 0 };
        if switch.source == Source::Return {
            image &= !flags::NT;
        }
        self.save_task(old.base, old_layout, image)?;
        if !nested && let Some(address) = busy_address(self, old.segment.selector) {
            self.modify_as::<u8>(address, Privilege::Implicit, |kind| kind & !2)?;
        }
        if nested {
            self.write_as(self.table_address(d.base(), 0), old.segment.selector, Privilege::Implicit)?;
            task.flags |= flags::NT;
        }
        if switch.source != Source::Return
            && let Some(address) = busy_address(self, switch.selector)
        {
            self.modify_as::<u8>(address, Privilege::Implicit, |kind| kind | 2)?;
        }
        self.state.tr = SystemSegment { segment: new, base: d.base() };
        self.state.cr0 |= cr0::TS;
        self.state.slow |= slow::NO_STEP_TRAP;
        self.end_block();

        let result = self.load_task(&task, wide, switch.ext);
        self.refresh_mode();
        let result = result.and_then(|()| self.finish_task_switch(&switch, &task, wide));
        result.map_err(|stop| match *stop {
            Stop::Fault(f) => Fault { trap: true, ..f }.into(),
            other => Box::new(other),
        })
    }

    /// Checks the new TSS: its segment as TR will hold it, and its descriptor.
    fn new_task_state_segment(&mut self, switch: &TaskSwitch) -> Exec<(Segment, Descriptor)> {
        let returning = switch.source == Source::Return;
        let code = selector_code(switch.selector) | switch.ext;
        let bad_selector = if returning { vector::TS } else { vector::GP };
        if is_null(switch.selector) || switch.selector & 4 != 0 {
            return fault(Fault::with_code(bad_selector, code));
        }
        let d = self.read_descriptor(switch.selector, bad_selector, switch.ext)?;
        let wanted = if returning {
            [system_type::TSS16_BUSY, system_type::TSS_BUSY]
        } else {
            [system_type::TSS16, system_type::TSS]
        };
        if !d.is_system() || !wanted.contains(&d.kind()) {
            return fault(Fault::with_code(bad_selector, code));
        }
        if !d.present() {
            return fault(Fault::with_code(vector::NP, code));
        }
        if d.limit() < Layout::of(d.kind() & 8 != 0).limit {
            return fault(Fault::with_code(vector::TS, code));
        }
        let mut segment = d.segment(switch.selector);
        segment.attributes |= 2 << 8;
        Ok((segment, d))
    }

    fn read_task(&mut self, base: u64, layout: &Layout) -> Exec<Task> {
        let wide = layout.slot == 4;
        let read = |vcpu: &mut Self, offset: u64| -> Exec<u64> {
            let address = vcpu.table_address(base, offset);
            if wide {
                Ok(u64::from(vcpu.read_as::<u32>(address, Privilege::Implicit)?))
            } else {
                Ok(u64::from(vcpu.read_as::<u16>(address, Privilege::Implicit)?))
            }
        };
        let mut task = Task {
            ip: read(self, layout.ip)?,
            flags: read(self, layout.flags())?,
            ldt: read(self, layout.ldt())? as u16,
            ..Task::default()
        };
        for (n, register) in (0..).zip(&mut task.registers) {
            *register = read(self, layout.registers() + n * layout.slot)?;
        }
        for (n, selector) in (0..layout.segments).zip(&mut task.selectors) {
            *selector = read(self, layout.selectors() + n * layout.slot)? as u16;
        }
        if wide {
            task.cr3 = read(self, 28)?;
            task.trap = read(self, 100)? & 1 != 0;
        }
        Ok(task)
    }

    fn save_task(&mut self, base: u64, layout: &Layout, image: u64) -> Exec {
        let mut values = vec![self.state.rip(), image];
        values.extend_from_slice(&self.state.regs[..8]);
        let selectors = self.state.segments.iter().map(|s| u64::from(s.selector));
        values.extend(selectors.take(layout.segments as usize));
        for (n, value) in (0..).zip(values) {
            let address = self.table_address(base, layout.ip + n * layout.slot);
            if layout.slot == 4 {
                self.write_as(address, value as u32, Privilege::Implicit)?;
            } else {
                self.write_as(address, value as u16, Privilege::Implicit)?;
            }
        }
        Ok(())
    }

    /// Loads the new task's registers. The selectors are all in place before the first descriptor is looked at.
    fn load_task(&mut self, task: &Task, wide: bool, ext: u32) -> Exec {
        if wide && self.state.cr0 & cr0::PG != 0 && self.load_cr3(task.cr3).is_err() {
            return fault(Fault::with_code(vector::TS, selector_code(self.state.tr.segment.selector) | ext));
        }
        self.state.set_rip(task.ip);
        // A 16-bit task has no upper half of EFLAGS and registers.
        self.state.flags.set_bits(task.flags);
        for (n, &value) in (0..).zip(&task.registers) {
            let value = if wide { value } else { 0xffff_0000 | value };
            self.set_reg(n, value);
        }
        for (s, &selector) in (0..).zip(&task.selectors) {
            self.state.segments[usize::from(s as u8)] = Segment { selector, limit: 0, attributes: 0 };
        }
        self.state.ldtr =
            SystemSegment { segment: Segment { selector: task.ldt, limit: 0, attributes: 0 }, base: 0 };
        self.state.dr7 &= !0x155;
        if !is_null(task.ldt) {
            self.load_task_ldt(task.ldt, ext)?;
        }
        if self.state.virtual_8086() {
            self.state.cpl = 3;
            for (s, &selector) in (0u8..).zip(&task.selectors) {
                self.state.segments[usize::from(s)] = virtual_8086_segment(selector);
                self.state.seg_base[usize::from(s)] = u64::from(selector) << 4;
            }
            return Ok(());
        }
        let [es, cs, ss, ds, fs, gs] = task.selectors;
        let cpl = rpl(cs);
        self.state.cpl = cpl;
        self.load_task_stack(ss, cpl, ext)?;
        for (s, selector) in [(seg::ES, es), (seg::DS, ds), (seg::FS, fs), (seg::GS, gs)] {
            self.load_task_data(s, selector, cpl, ext)?;
        }
        self.load_task_code(cs, cpl, ext)
    }

    fn load_task_ldt(&mut self, selector: u16, ext: u32) -> Exec {
        let bad = || fault(Fault::with_code(vector::TS, selector_code(selector) | ext));
        if selector & 4 != 0 {
            return bad();
        }
        let d = self.read_descriptor(selector, vector::TS, ext)?;
        if !d.is_system() || d.kind() != system_type::LDT || !d.present() {
            return bad();
        }
        self.state.ldtr = SystemSegment { segment: d.segment(selector), base: d.base() };
        Ok(())
    }

    fn load_task_code(&mut self, selector: u16, cpl: u8, ext: u32) -> Exec {
        let code = selector_code(selector) | ext;
        if is_null(selector) {
            return fault(Fault::with_code(vector::TS, ext));
        }
        let d = self.read_descriptor(selector, vector::TS, ext)?;
        let level_fits = if d.is_conforming() { d.dpl() <= cpl } else { d.dpl() == cpl };
        if !d.is_code() || !level_fits {
            return fault(Fault::with_code(vector::TS, code));
        }
        if !d.present() {
            return fault(Fault::with_code(vector::NP, code));
        }
        self.mark_accessed(selector, d)?;
        self.put_code_segment(d.segment(selector), d.base(), cpl);
        Ok(())
    }

    fn load_task_stack(&mut self, selector: u16, cpl: u8, ext: u32) -> Exec {
        let code = selector_code(selector) | ext;
        if is_null(selector) {
            return fault(Fault::with_code(vector::TS, ext));
        }
        let d = self.read_descriptor(selector, vector::TS, ext)?;
        if !d.is_writable_data() || d.dpl() != cpl || rpl(selector) != cpl {
            return fault(Fault::with_code(vector::TS, code));
        }
        if !d.present() {
            return fault(Fault::with_code(vector::SS, code));
        }
        self.mark_accessed(selector, d)?;
        self.put_segment(seg::SS, (d.segment(selector), d.base()));
        Ok(())
    }

    fn load_task_data(&mut self, register: u8, selector: u16, cpl: u8, ext: u32) -> Exec {
        if is_null(selector) {
            return Ok(());
        }
        let code = selector_code(selector) | ext;
        let d = self.read_descriptor(selector, vector::TS, ext)?;
        let any_level = d.is_code() && d.is_conforming();
        if !d.is_readable() || (!any_level && d.dpl() < cpl.max(rpl(selector))) {
            return fault(Fault::with_code(vector::TS, code));
        }
        if !d.present() {
            return fault(Fault::with_code(vector::NP, code));
        }
        self.mark_accessed(selector, d)?;
        self.put_segment(register, (d.segment(selector), d.base()));
        Ok(())
    }

    /// What happens in the new task before its first instruction.
    fn finish_task_switch(&mut self, switch: &TaskSwitch, task: &Task, wide: bool) -> Exec {
        if let Some(error_code) = switch.error_code {
            let mut frame = Frame::current(self, switch.ext);
            frame.push(self, if wide { 4 } else { 2 }, u64::from(error_code))?;
            frame.install_pointer(self);
        }
        let cs = self.state.segments[usize::from(seg::CS)];
        self.check_code_offset(&cs, self.state.rip(), switch.ext)?;
        if task.trap {
            self.state.pending_dr6 |= dr6::BT;
            self.state.slow |= slow::DEBUG_TRAP;
        }
        Ok(())
    }

    /// IRET with NT set: back to the task that the present TSS links to.
    ///
    /// # Errors
    /// As [`Self::switch_task`].
    pub(crate) fn return_from_task(&mut self) -> Exec {
        let link: u16 = self.read_as(self.state.tr.base, Privilege::Implicit)?;
        self.switch_task(TaskSwitch::iret(link))
    }
}
