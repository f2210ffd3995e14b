//! Registers that a program has mapped: an access that was caught, made a call of the device's file.
//!
//! Who serves [`Mapping::Registers`](super::Mapping::Registers) maps nothing there, and gets a signal for each access.
//! What the program wanted is in the instruction: this does it, and leaves the program's registers as the
//! instruction would have. It knows the instructions that compilers make of a volatile access: moves between memory and a
//! general register, with or without extension, and of constants to memory.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};

use super::DeviceFile;

/// The registers of the program that was interrupted.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Registers {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: in the order of their numbers.
    pub general: [u64; 16],
    /// Where the instruction is; behind it afterwards.
    pub rip: u64,
}

/// An instruction that is not known here. Nothing has been done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the instruction is none that accesses registers in a way that is known")]
pub struct Unknown;

/// Does the instruction that accesses `offset` of a device's file: its bytes are `code` (and what follows it).
///
/// A device that does not answer is as on a bus: all ones are read, and what is written is lost.
///
/// # Errors
/// [`Unknown`].
pub fn access(file: &DeviceFile, offset: u64, code: &[u8], registers: &mut Registers) -> Result<(), Unknown> {
    let mut decoder = Decoder::with_ip(64, code, registers.rip, DecoderOptions::NONE);
    let instruction = decoder.decode();
    let width = instruction.memory_size().size();
    if instruction.code() == Code::INVALID || instruction.op_count() != 2 || !matches!(width, 1 | 2 | 4 | 8) {
        return Err(Unknown);
    }
    match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Memory, _) => write(file, offset, width, &instruction, registers)?,
        (OpKind::Register, OpKind::Memory) => read(file, offset, width, &instruction, registers)?,
        _ => return Err(Unknown),
    }
    registers.rip = instruction.next_ip();
    Ok(())
}

fn write(
    file: &DeviceFile,
    offset: u64,
    width: usize,
    instruction: &Instruction,
    registers: &Registers,
) -> Result<(), Unknown> {
    if instruction.mnemonic() != Mnemonic::Mov {
        return Err(Unknown);
    }
    let value = match instruction.op1_kind() {
        OpKind::Register => {
            let (number, shift) = place(instruction.op1_register())?;
            registers.general.get(number).ok_or(Unknown)? >> shift
        }
        OpKind::Immediate8 | OpKind::Immediate16 | OpKind::Immediate32 | OpKind::Immediate32to64 => {
            instruction.immediate(1)
        }
        _ => return Err(Unknown),
    };
    let bytes = value.to_le_bytes();
    let _ = file.write_at(offset, bytes.get(..width).ok_or(Unknown)?);
    Ok(())
}

fn read(
    file: &DeviceFile,
    offset: u64,
    width: usize,
    instruction: &Instruction,
    registers: &mut Registers,
) -> Result<(), Unknown> {
    let signed = match instruction.mnemonic() {
        Mnemonic::Mov | Mnemonic::Movzx => false,
        Mnemonic::Movsx | Mnemonic::Movsxd => true,
        _ => return Err(Unknown),
    };
    let target = instruction.op0_register();
    let (number, shift) = place(target)?;
    let mut bytes = [0; 8];
    let part = bytes.get_mut(..width).ok_or(Unknown)?;
    if file.read_at(offset, part) != Ok(width) {
        part.fill(0xff);
    }
    let mut value = u64::from_le_bytes(bytes);
    if signed {
        let unused = 64 - 8 * width as u32;
        value = ((value << unused) as i64 >> unused) as u64;
    }
    let register = registers.general.get_mut(number).ok_or(Unknown)?;
    *register = match target.size() {
        1 => *register & !(0xff << shift) | (value & 0xff) << shift,
        2 => *register & !0xffff | value & 0xffff,
        // The upper half becomes zero.
        4 => value & 0xffff_ffff,
        _ => value,
    };
    Ok(())
}

/// The number of a general register, and at which bit of it this part of it begins.
fn place(register: Register) -> Result<(usize, u32), Unknown> {
    let full = register.full_register();
    if !full.is_gpr64() {
        return Err(Unknown);
    }
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    Ok((full.number(), if high { 8 } else { 0 }))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uapi::vfio::{VFIO_DEVICE_BIND_IOMMUFD, vfio_device_bind_iommufd};

    use super::*;
    use crate::{
        devices::test::{self, registers as reg},
        doors::{
            System,
            testing::{Program, registration},
        },
    };

    fn open() -> (Arc<System>, Arc<DeviceFile>) {
        let (system, program) = (System::new(true), Program::default());
        let number = system.add(registration("a", 1, Arc::new(test::function().unwrap()))).unwrap();
        let fd = program.device(&system, number).unwrap();
        let mut bind =
            vfio_device_bind_iommufd { argsz: 24, iommufd: program.iommufd(), ..Default::default() };
        program.ioctl(fd, VFIO_DEVICE_BIND_IOMMUFD, &mut bind).unwrap();
        (system, program.file(fd))
    }

    const BEFORE: u64 = 0x1111_2222_3333_4444;

    /// RAX after an instruction that reads the ID register; its length is checked.
    fn rax(file: &DeviceFile, offset: u64, code: &[u8]) -> u64 {
        let mut registers = Registers { rip: 0x1000, ..Registers::default() };
        registers.general.fill(BEFORE);
        let mut bytes = code.to_vec();
        bytes.extend([0x90; 8]);
        access(file, offset, &bytes, &mut registers).unwrap();
        assert_eq!(registers.rip, 0x1000 + code.len() as u64);
        assert!(registers.general[1..].iter().all(|register| *register == BEFORE));
        registers.general[0]
    }

    #[test]
    fn reads_fill_registers_as_the_processor_does() {
        let (_system, file) = open();
        file.write_at(reg::SCRATCH, &0x8899_aaf0u32.to_le_bytes()).unwrap();
        let at = reg::SCRATCH;
        assert_eq!(rax(&file, at, &[0x8b, 0x03]), 0x8899_aaf0, "mov eax, [rbx]");
        assert_eq!(rax(&file, at, &[0x66, 0x8b, 0x03]), BEFORE & !0xffff | 0xaaf0, "mov ax, [rbx]");
        assert_eq!(rax(&file, at, &[0x8a, 0x03]), BEFORE & !0xff | 0xf0, "mov al, [rbx]");
        assert_eq!(rax(&file, at, &[0x8a, 0x23]), BEFORE & !0xff00 | 0xf000, "mov ah, [rbx]");
        assert_eq!(rax(&file, at, &[0x0f, 0xb6, 0x03]), 0xf0, "movzx eax, byte [rbx]");
        assert_eq!(rax(&file, at, &[0x0f, 0xb7, 0x03]), 0xaaf0, "movzx eax, word [rbx]");
        assert_eq!(rax(&file, at, &[0x0f, 0xbe, 0x03]), 0xffff_fff0, "movsx eax, byte [rbx]");
        assert_eq!(rax(&file, at, &[0x48, 0x63, 0x03]), 0xffff_ffff_8899_aaf0, "movsxd rax, dword [rbx]");
        assert_eq!(
            rax(&file, reg::ID, &[0x48, 0x8b, 0x43, 0x08]),
            0x8899_aaf0_0000_0000 | u64::from(reg::ID_VALUE)
        );
        // Nothing answers there.
        assert_eq!(rax(&file, 0x1000, &[0x8b, 0x03]), 0xffff_ffff);
    }

    #[test]
    fn writes_reach_the_device() {
        let (_system, file) = open();
        let scratch = || {
            let mut bytes = [0; 4];
            file.read_at(reg::SCRATCH, &mut bytes).unwrap();
            u32::from_le_bytes(bytes)
        };
        assert_eq!(rax(&file, reg::SCRATCH, &[0x89, 0x0b]), BEFORE, "mov [rbx], ecx");
        assert_eq!(scratch(), BEFORE as u32);
        rax(&file, reg::SCRATCH, &[0xc7, 0x03, 4, 3, 2, 1]);
        assert_eq!(scratch(), 0x0102_0304, "mov dword [rbx], imm");
        rax(&file, reg::SCRATCH, &[0x88, 0x2b]);
        assert_eq!(scratch(), 0x44, "mov [rbx], ch: the second byte");
        rax(&file, 0x1000, &[0x89, 0x0b]);
    }

    #[test]
    fn other_instructions_do_nothing() {
        let (_system, file) = open();
        for code in [
            &[0x01u8, 0x03] as &[u8],
            &[0x0f, 0x10, 0x03],
            &[0x89, 0xc3],
            &[0xa4],
            &[0x8e, 0x1b],
            &[0x0f, 0x0b],
            &[0x8b],
            &[],
        ] {
            let mut registers = Registers { rip: 0x1000, ..Registers::default() };
            assert_eq!(access(&file, reg::SCRATCH, code, &mut registers), Err(Unknown), "{code:x?}");
            assert_eq!(registers, Registers { rip: 0x1000, ..Registers::default() });
        }
    }
}
