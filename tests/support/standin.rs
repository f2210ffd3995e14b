//! Kernels made up for tests: they print a text on the serial port and end.

/// How a stand-in ends.
#[derive(Clone, Copy)]
pub enum Ending {
    /// By the ACPI sleep control register.
    PowerOff,
    /// By the ACPI reset register.
    Reset,
    /// Never.
    Hang,
    /// By a triple fault.
    Fault,
}

/// Where it is loaded, and entered by both boot protocols.
const AT: u32 = 0x20_0000;
/// Where its text is, from there.
const TEXT: u32 = 0x100;

/// The code, which means the same in 32-bit and in 64-bit mode.
fn code(ending: Ending) -> Vec<u8> {
    let mut code = vec![0xbe]; // mov esi, text
    code.extend((AT + TEXT).to_le_bytes());
    code.extend([0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    code.extend([0xac, 0x84, 0xc0, 0x74, 0x03]); // next: lodsb; test al, al; jz end
    code.extend([0xee, 0xeb, 0xf8]); // out dx, al; jmp next
    let (port, value) = match ending {
        Ending::PowerOff => (0x600_u16, 0x34),
        Ending::Reset => (0x602, 1),
        Ending::Hang | Ending::Fault => (0x80, 0),
    };
    code.extend([0x66, 0xba]); // end: mov dx, port
    code.extend(port.to_le_bytes());
    code.extend([0xb0, value, 0xee]); // mov al, value; out dx, al
    code.extend(match ending {
        Ending::Fault => [0x0f, 0x0b], // ud2: there is no handler
        _ => [0xeb, 0xfe],             // jmp $
    });
    code
}

/// A PVH note that names the entry.
fn note() -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4_u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(AT.to_le_bytes());
    note
}

/// An ELF kernel that prints `text`; with `knows_pvm` it contains the synthetic CPUID instruction, in no path of its
/// own.
pub fn kernel(text: &str, ending: Ending, knows_pvm: bool) -> Vec<u8> {
    let mut content = code(ending);
    if knows_pvm {
        content.extend(pvm::abi::cpuid::SYNTHETIC);
    }
    content.resize(TEXT as usize, 0);
    content.extend(text.as_bytes());
    content.push(0);

    let parts = [(1_u32, content), (4, note())];
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2_u16, 62, 1, 0] {
        file.extend(half.to_le_bytes());
    }
    for word in [u64::from(AT), 64, 0] {
        file.extend(word.to_le_bytes());
    }
    for half in [0_u16, 0, 64, 56, parts.len() as u16, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = (64 + 56 * parts.len()) as u64;
    for (kind, content) in &parts {
        let size = content.len() as u64;
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for word in [offset, AT.into(), AT.into(), size, size, 4] {
            file.extend(word.to_le_bytes());
        }
        offset += size;
    }
    for (_, content) in &parts {
        file.extend(content);
    }
    file
}
