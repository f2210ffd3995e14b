//! Masked and gathering memory accesses, element by element.
//!
//! Elements whose mask bit is clear do not touch memory and cannot fault. A gather that faults has loaded
//! the elements before and cleared their mask bits, so that it goes on where it stopped; a masked load or
//! store that faults has changed nothing.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::run::{check, refused};
use crate::data::Data;
use crate::fault::Exec;
use crate::fpu::ok;
use crate::insn::{Handler, Insn};
use crate::mem::stack_fault;
use crate::state::reg;
use crate::vcpu::Vcpu;

/// Chooses the handler of a masked move or gather.
pub(super) fn select(i: &Instruction, insn: &mut Insn) -> Option<Handler> {
    use Mnemonic as M;
    if i.encoding() == EncodingKind::Legacy {
        return Some(match i.mnemonic() {
            M::Maskmovdqu => mask_bytes::<false>,
            M::Maskmovq => mask_bytes_mmx,
            _ => return None,
        });
    }
    let ymm = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Register && i.op_register(n).is_ymm());
    macro_rules! masked {
        ($element:ty) => {
            match (i.op0_kind() == OpKind::Memory, ymm) {
                (false, false) => load::<$element, 16>,
                (false, true) => load::<$element, 32>,
                (true, false) => store::<$element, 16>,
                (true, true) => store::<$element, 32>,
            }
        };
    }
    macro_rules! gather {
        ($element:ty, $index:ty) => {{
            let index = i.memory_index();
            // Two of destination, index and mask must not be the same register.
            let (destination, mask) = (i.op0_register(), i.op2_register());
            let numbers = [destination, index, mask].map(Register::number);
            if numbers[0] == numbers[1] || numbers[1] == numbers[2] || numbers[0] == numbers[2] {
                return None;
            }
            // How many elements: as many as fit both the index and the destination register.
            let count = (index.size() / size_of::<$index>()).min(destination.size() / size_of::<$element>());
            insn.imm = index.number() as u64 | (count as u64) << 8;
            gather::<$element, $index>
        }};
    }
    Some(match i.mnemonic() {
        M::Vmaskmovdqu => mask_bytes::<true>,
        M::Vmaskmovps | M::Vpmaskmovd => masked!(u32),
        M::Vmaskmovpd | M::Vpmaskmovq => masked!(u64),
        M::Vgatherdps | M::Vpgatherdd => gather!(u32, u32),
        M::Vgatherdpd | M::Vpgatherdq => gather!(u64, u32),
        M::Vgatherqps | M::Vpgatherqd => gather!(u32, u64),
        M::Vgatherqpd | M::Vpgatherqq => gather!(u64, u64),
        _ => return None,
    })
}

/// Element `n` of vector register `r`, as if it went on with zeros.
fn element<T: Data>(vcpu: &Vcpu, r: u8, n: usize) -> T {
    let size = T::SIZE as usize;
    let mut bytes = [0; 8];
    if let Some(piece) = vcpu.state.fpu.ymm[usize::from(r & 15)].get(n * size..(n + 1) * size) {
        bytes[..size].copy_from_slice(piece);
    }
    T::truncate(u64::from_le_bytes(bytes))
}

fn set_element<T: Data>(register: &mut [u8; 32], n: usize, value: T) {
    let size = T::SIZE as usize;
    if let Some(piece) = register.get_mut(n * size..(n + 1) * size) {
        piece.copy_from_slice(&value.widen().to_le_bytes()[..size]);
    }
}

/// Whether the top bit, which is what masks go by, is set.
fn chosen<T: Data>(mask: T) -> bool {
    mask.widen() >> (T::BITS - 1) != 0
}

/// The linear address of byte `at` of the memory operand, for `size` bytes. Only where the operand starts is
/// truncated to the address size.
fn address(vcpu: &Vcpu, i: &Insn, at: u64, size: u64, write: bool) -> Exec<u64> {
    let offset = vcpu.effective_address(i).wrapping_add(at);
    vcpu.segmented(i.seg, offset, size, write)
}

fn address_mask(i: &Insn) -> u64 {
    match i.address_size {
        8 => u64::MAX,
        4 => 0xffff_ffff,
        _ => 0xffff,
    }
}

/// VMASKMOV and VPMASKMOV from memory: operands destination, mask, memory.
fn load<T: Data, const N: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<true>(vcpu)?;
    let mut result = [0; 32];
    for n in 0..N / T::SIZE as usize {
        if chosen(element::<T>(vcpu, i.src, n)) {
            let gva = address(vcpu, i, n as u64 * T::SIZE, T::SIZE, false)?;
            set_element(&mut result, n, vcpu.read::<T>(gva).map_err(|e| stack_fault(i, e))?);
        }
    }
    vcpu.state.fpu.ymm[usize::from(i.dst & 15)] = result;
    Ok(())
}

/// VMASKMOV and VPMASKMOV to memory: operands memory, mask, source.
fn store<T: Data, const N: usize>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<true>(vcpu)?;
    // All are checked before the first is written.
    for write in [false, true] {
        for n in 0..N / T::SIZE as usize {
            if chosen(element::<T>(vcpu, i.src, n)) {
                let gva = address(vcpu, i, n as u64 * T::SIZE, T::SIZE, true)?;
                if write {
                    vcpu.write(gva, element::<T>(vcpu, i.src2, n))?;
                } else {
                    vcpu.probe_write(gva, T::SIZE).map_err(|e| stack_fault(i, e))?;
                }
            }
        }
    }
    Ok(())
}

/// VGATHER and VPGATHER: elements of type T, indices of type I; operands destination, memory, mask.
fn gather<T: Data, I: Data>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<true>(vcpu)?;
    let (index, count) = (i.imm as u8, (i.imm >> 8) as usize & 15);
    for n in 0..count {
        if chosen(element::<T>(vcpu, i.src2, n)) {
            let offset = vcpu.offset(i).wrapping_add(element::<I>(vcpu, index, n).sign_extend() << i.shift)
                & address_mask(i);
            let gva = vcpu.segmented(i.seg, offset, T::SIZE, false)?;
            let value = vcpu.read::<T>(gva).map_err(|e| stack_fault(i, e))?;
            set_element(&mut vcpu.state.fpu.ymm[usize::from(i.dst & 15)], n, value);
        }
        set_element(&mut vcpu.state.fpu.ymm[usize::from(i.src2 & 15)], n, T::truncate(0));
    }
    let end = count * T::SIZE as usize;
    vcpu.state.fpu.ymm[usize::from(i.dst & 15)][end..].fill(0);
    vcpu.state.fpu.ymm[usize::from(i.src2 & 15)] = [0; 32];
    Ok(())
}

/// MASKMOVDQU and MASKMOVQ: the bytes of `source` whose mask byte has its top bit set, to [rDI].
fn store_bytes(vcpu: &mut Vcpu, i: &Insn, source: &[u8], mask: &[u8]) -> Exec {
    let start = vcpu.reg(reg::RDI) & address_mask(i);
    for write in [false, true] {
        for (n, (byte, mask)) in source.iter().zip(mask).enumerate() {
            if mask >> 7 != 0 {
                let offset = start.wrapping_add(n as u64);
                let gva = vcpu.segmented(i.seg, offset, 1, true)?;
                if write {
                    vcpu.write(gva, *byte)?;
                } else {
                    vcpu.probe_write(gva, 1)?;
                }
            }
        }
    }
    Ok(())
}

/// MASKMOVDQU: operands memory, source, mask.
fn mask_bytes<const VEX: bool>(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    check::<VEX>(vcpu)?;
    let source = vcpu.state.fpu.xmm(i.src).to_le_bytes();
    let mask = vcpu.state.fpu.xmm(i.src2).to_le_bytes();
    store_bytes(vcpu, i, &source, &mask)
}

/// MASKMOVQ: the same with MMX registers.
fn mask_bytes_mmx(vcpu: &mut Vcpu, i: &Insn) -> Exec {
    if vcpu.state.fpu_ok & ok::MMX == 0 {
        return refused(vcpu, ok::MMX);
    }
    super::x87::check_pending(vcpu)?;
    // MM(n) is physical register n.
    let top = vcpu.state.fpu.top();
    let register = |n: u8| vcpu.state.fpu.st(usize::from(n).wrapping_sub(top) & 7);
    let (source, mask) = (register(i.src), register(i.src2));
    store_bytes(vcpu, i, &source[..8], &mask[..8])?;
    vcpu.state.fpu.enter_mmx();
    Ok(())
}
