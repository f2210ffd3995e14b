//! x87 control: words, environment and the whole state (Intel SDM vol. 1, 8.1).

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::run::refused;
use crate::fault::{Exec, Fault, fault, vector};
use crate::fpu::{Fpu, ok};
use crate::insn::{Handler, Insn};
use crate::state::reg;
use crate::vcpu::Vcpu;

/// Chooses the handler of an x87 control instruction. The handlers are generic over whether the
/// instruction waits, that is takes a pending exception first.
pub(super) fn select(i: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    Some(match i.mnemonic() {
        M::Wait => wait,
        M::Emms => emms,
        M::Fninit => init::<false>,
        M::Finit => init::<true>,
        M::Fnclex => clear_exceptions::<false>,
        M::Fclex => clear_exceptions::<true>,
        M::Fnstcw => store_control::<false>,
        M::Fstcw => store_control::<true>,
        M::Fldcw => load_control,
        M::Fnstsw if i.op0_kind() == OpKind::Memory => store_status::<false>,
        M::Fstsw if i.op0_kind() == OpKind::Memory => store_status::<true>,
        M::Fnstsw => status_to_ax::<false>,
        M::Fstsw => status_to_ax::<true>,
        M::Fnstenv => match i.memory_size().size() {
            14 => store_environment::<false, 2>,
            _ => store_environment::<false, 4>,
        },
        M::Fldenv => match i.memory_size().size() {
            14 => load_environment::<2>,
            _ => load_environment::<4>,
        },
        M::Fnsave => match i.memory_size().size() {
            94 => save::<2>,
            _ => save::<4>,
        },
        M::Frstor => match i.memory_size().size() {
            94 => restore::<2>,
            _ => restore::<4>,
        },
        // 8087 and 80287 leftovers that have done nothing since the 80387.
        M::Fneni | M::Fndisi | M::Fnsetpm => nothing,
        _ => return None,
    })
}

/// Raises the exception that an earlier x87 instruction left pending.
///
/// # Errors
/// #MF. (With CR0.NE clear hardware asserts FERR# instead, which no system has wired to anything for
/// decades.)
pub(super) fn check_pending(vcpu: &Vcpu) -> Exec {
    if vcpu.state.fpu.x87_pending() {
        return fault(Fault::new(vector::MF));
    }
    Ok(())
}

fn check<const WAITS: bool>(vcpu: &Vcpu) -> Exec {
    if vcpu.state.fpu_ok & ok::X87 == 0 {
        return refused(vcpu, ok::X87);
    }
    if WAITS { check_pending(vcpu) } else { Ok(()) }
}

fn wait(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    if vcpu.state.fpu_ok & ok::WAIT == 0 {
        return refused(vcpu, ok::WAIT);
    }
    check_pending(vcpu)
}

fn emms(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    if vcpu.state.fpu_ok & ok::MMX == 0 {
        return refused(vcpu, ok::MMX);
    }
    check_pending(vcpu)?;
    vcpu.state.fpu.set_top_keeping_registers(0);
    vcpu.state.fpu.set_tags(0);
    Ok(())
}

fn nothing(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    check::<false>(vcpu)
}

fn init<const WAITS: bool>(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    check::<WAITS>(vcpu)?;
    vcpu.state.fpu.set_top_keeping_registers(0);
    vcpu.state.fpu.init_x87();
    Ok(())
}

fn clear_exceptions<const WAITS: bool>(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    check::<WAITS>(vcpu)?;
    let fsw = vcpu.state.fpu.fsw();
    vcpu.state.fpu.set_fsw(fsw & 0x7f00);
    Ok(())
}

fn store_control<const WAITS: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<WAITS>(vcpu)?;
    vcpu.store(i, vcpu.state.fpu.fcw())
}

fn load_control(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<true>(vcpu)?;
    let value = vcpu.load::<u16>(i)?;
    vcpu.state.fpu.set_fcw(value);
    vcpu.state.fpu.update_summary();
    Ok(())
}

fn store_status<const WAITS: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<WAITS>(vcpu)?;
    vcpu.store(i, vcpu.state.fpu.fsw())
}

fn status_to_ax<const WAITS: bool>(vcpu: &mut Vcpu, _: &Insn) -> Exec {
    check::<WAITS>(vcpu)?;
    let fsw = vcpu.state.fpu.fsw();
    vcpu.set(reg::RAX, fsw);
    Ok(())
}

// ---- environment ----

/// The bytes of the environment: seven words of N bytes (Intel SDM vol. 1, figures 8-9 to 8-12).
const fn environment_size(n: usize) -> usize {
    7 * n
}

/// The environment as FNSTENV stores it, in the format of the operand size and mode. Upper halves of words
/// are ones. The selectors are zero, as on processors that have deprecated them.
fn environment<const N: usize>(vcpu: &Vcpu) -> [u8; 28] {
    let fpu = &vcpu.state.fpu;
    let (fip, fdp, fop) = (fpu.fip as u32, fpu.fdp as u32, u32::from(fpu.fop & 0x7ff));
    let ones = 0xffff_0000;
    let (fcw, fsw, tags) = (u32::from(fpu.fcw()), u32::from(fpu.fsw()), u32::from(fpu.full_tags()));
    // Real and virtual-8086 mode store 20-bit linear addresses in pieces.
    let pieces = !vcpu.state.protected() || vcpu.state.virtual_8086();
    let words = match (N, pieces) {
        (2, false) => [fcw, fsw, tags, fip, 0, fdp, 0],
        (2, true) => [fcw, fsw, tags, fip, fip >> 4 & 0xf000 | fop, fdp, fdp >> 4 & 0xf000],
        (_, false) => [fcw | ones, fsw | ones, tags | ones, fip, fop << 16, fdp, ones],
        (_, true) => [
            fcw | ones,
            fsw | ones,
            tags | ones,
            fip | ones,
            fip >> 4 & 0x0fff_f000 | fop,
            fdp | ones,
            fdp >> 4 & 0x0fff_f000,
        ],
    };
    let mut bytes = [0; 28];
    for (n, word) in words.iter().enumerate() {
        bytes[n * N..(n + 1) * N].copy_from_slice(&word.to_le_bytes()[..N]);
    }
    bytes
}

/// Takes over what [`environment`] laid out.
fn set_environment<const N: usize>(vcpu: &mut Vcpu, bytes: &[u8]) {
    let word = |n: usize| {
        let mut word = [0; 4];
        if let Some(piece) = bytes.get(n * N..(n + 1) * N) {
            word[..N].copy_from_slice(piece);
        }
        u32::from_le_bytes(word)
    };
    let pieces = !vcpu.state.protected() || vcpu.state.virtual_8086();
    let fpu = &mut vcpu.state.fpu;
    fpu.set_fcw(word(0) as u16);
    // Registers are kept relative to the top: turn them along with it.
    let fsw = word(1) as u16;
    fpu.set_top_keeping_registers(usize::from(fsw >> 11 & 7));
    fpu.set_fsw(fsw);
    fpu.set_full_tags(word(2) as u16);
    fpu.update_summary();
    let (fip, fdp, fop) = match (N, pieces) {
        (2, false) => (word(3), word(5), 0),
        (2, true) => (word(3) | (word(4) & 0xf000) << 4, word(5) | (word(6) & 0xf000) << 4, word(4)),
        (_, false) => (word(3), word(5), word(4) >> 16),
        (_, true) => (
            word(3) & 0xffff | (word(4) & 0x0fff_f000) << 4,
            word(5) & 0xffff | (word(6) & 0x0fff_f000) << 4,
            word(4),
        ),
    };
    (fpu.fip, fpu.fdp, fpu.fop) = (u64::from(fip), u64::from(fdp), fop as u16 & 0x7ff);
}

fn store_environment<const WAITS: bool, const N: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<WAITS>(vcpu)?;
    let bytes = environment::<N>(vcpu);
    vcpu.store_bytes(i, &bytes[..environment_size(N)])?;
    // FNSTENV masks all exceptions afterwards.
    let fcw = vcpu.state.fpu.fcw();
    vcpu.state.fpu.set_fcw(fcw | 0x3f);
    vcpu.state.fpu.update_summary();
    Ok(())
}

fn load_environment<const N: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<true>(vcpu)?;
    let mut bytes = [0; 28];
    vcpu.load_bytes(i, &mut bytes[..environment_size(N)])?;
    set_environment::<N>(vcpu, &bytes);
    Ok(())
}

fn save<const N: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<false>(vcpu)?;
    let mut bytes = [0; 108];
    let start = environment_size(N);
    bytes[..28].copy_from_slice(&environment::<N>(vcpu));
    for n in 0..8 {
        let at = start + n * 10;
        bytes[at..at + 10].copy_from_slice(&vcpu.state.fpu.st(n));
    }
    vcpu.store_bytes(i, &bytes[..start + 80])?;
    vcpu.state.fpu.set_top_keeping_registers(0);
    vcpu.state.fpu.init_x87();
    Ok(())
}

fn restore<const N: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<true>(vcpu)?;
    let mut bytes = [0; 108];
    let start = environment_size(N);
    vcpu.load_bytes(i, &mut bytes[..start + 80])?;
    set_environment::<N>(vcpu, &bytes);
    for n in 0..8 {
        let mut value = [0; 10];
        value.copy_from_slice(&bytes[start + n * 10..start + (n + 1) * 10]);
        vcpu.state.fpu.set_st(n, value);
    }
    Ok(())
}

impl Fpu {
    /// Changes the top of stack without moving values between physical registers.
    fn set_top_keeping_registers(&mut self, top: usize) {
        let old = self.top();
        let values: [[u8; 10]; 8] = std::array::from_fn(|n| self.st(n));
        for n in 0..8 {
            // ST(n) is physical register top + n.
            self.set_st(n, values[(top + n).wrapping_sub(old) & 7]);
        }
        let fsw = self.fsw() & !0x3800;
        self.set_fsw(fsw | (top as u16 & 7) << 11);
    }

    /// What every MMX instruction but EMMS does: top of stack 0, all registers in use.
    pub(super) fn enter_mmx(&mut self) {
        self.set_top_keeping_registers(0);
        self.set_tags(0xff);
    }

    /// The tag word with two bits for each physical register: valid, zero, special, empty.
    fn full_tags(&self) -> u16 {
        let top = self.top();
        (0..8usize).fold(0, |word, n| {
            let tag = if self.tags() >> n & 1 == 0 { 3 } else { tag_of(self.st(n.wrapping_sub(top) & 7)) };
            word | tag << (n * 2)
        })
    }

    /// Takes over a full tag word: only *empty* counts, the rest follows from the values.
    fn set_full_tags(&mut self, word: u16) {
        let used = (0..8).fold(0, |tags, n| tags | u8::from(word >> (n * 2) & 3 != 3) << n);
        self.set_tags(used);
    }
}

/// The tag of a value: 0 valid, 1 zero, 2 special.
fn tag_of(value: [u8; 10]) -> u16 {
    let [m0, m1, m2, m3, m4, m5, m6, m7, e0, e1] = value;
    let mantissa = u64::from_le_bytes([m0, m1, m2, m3, m4, m5, m6, m7]);
    let exponent = u16::from_le_bytes([e0, e1]) & 0x7fff;
    match (exponent, mantissa) {
        (0, 0) => 1,
        (0 | 0x7fff, _) => 2,
        (_, mantissa) if mantissa >> 63 == 0 => 2,
        _ => 0,
    }
}
