//! Reading an ELF kernel: 64-bit, little-endian, x86-64, at fixed physical addresses.
//!
//! Only program headers matter: what to put where (`PT_LOAD`) and notes (`PT_NOTE`), of which the one
//! with the PVH entry point is looked for. Everything is checked against the file's length here,
//! and against guest memory when it is loaded.

use std::ops::Range;

use mmu::Gpa;

const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_X86_64: u16 = 62;
/// The Xen note whose value is the 32-bit entry point of PVH (Xen's `elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// Why an ELF file is not a kernel that can be loaded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ElfError {
    /// The file ends before something that its headers name.
    #[error("the ELF file is truncated: {what} ends at byte {end}, the file at {length}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Bytes in the file.
        length: usize,
    },
    /// Not 64-bit little-endian x86-64.
    #[error("the ELF file is for {0}; the machine is x86-64 and needs an x86-64 kernel")]
    OtherArchitecture(String),
    /// A relocatable object, shared object or core file.
    #[error("the ELF file is {0}, not an executable kernel: a vmlinux is wanted")]
    NotExecutable(String),
    /// A header field that contradicts the format or another field.
    #[error("the ELF file is corrupt: {what} is {value:#x}")]
    BadField {
        /// The field.
        what: &'static str,
        /// What it holds.
        value: u64,
    },
    /// The entry point is in no segment.
    #[error(
        "the entry point {0:#x} is in no segment of the ELF file, so there is no 64-bit entry to start at"
    )]
    NoEntry(u64),
}

/// Bytes of the file that belong at a physical address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// Where in the file.
    pub(super) file: Range<usize>,
    /// Physical address.
    pub(super) address: Gpa,
    /// Bytes in memory; those that the file does not have are zero.
    pub(super) memory_size: u64,
    /// Virtual address.
    virtual_address: u64,
}

impl Segment {
    /// The address after the last byte. Does not overflow: checked when parsed.
    pub(super) fn end(&self) -> u64 {
        self.address.0.saturating_add(self.memory_size)
    }
}

/// What there is to know of a kernel's ELF file.
#[derive(Clone, Debug)]
pub(super) struct Elf {
    /// Physical address of the 64-bit entry point.
    pub(super) entry: Gpa,
    /// The PVH entry point, physical, if a note has one.
    pub(super) pvh_entry: Option<u32>,
    /// Not empty.
    pub(super) segments: Vec<Segment>,
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    field(bytes, at).map_or(0, u16::from_le_bytes)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    field(bytes, at).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    field(bytes, at).map_or(0, u64::from_le_bytes)
}

/// A range of the file, as long as the file has it.
fn in_file(what: &'static str, offset: u64, size: u64, length: usize) -> Result<Range<usize>, ElfError> {
    let end = offset.saturating_add(size);
    if end > length as u64 {
        return Err(ElfError::Truncated { what, end, length });
    }
    // Both fit: they are not more than a length in memory.
    Ok(offset as usize..end as usize)
}

/// A name for an ELF machine number (`elf.h`, `EM_*`).
fn machine_name(machine: u16, big_endian: bool) -> String {
    let name = match machine {
        3 => "i386 (32-bit x86)",
        8 => "MIPS",
        20 => "PowerPC",
        21 => "PowerPC64",
        22 => "s390x",
        40 => "32-bit ARM",
        43 => "SPARC64",
        EM_X86_64 if big_endian => "big-endian x86-64",
        EM_X86_64 => "x32 (x86-64 with 32-bit addresses)",
        183 => "aarch64",
        243 => "RISC-V",
        258 => "LoongArch",
        _ => return format!("ELF machine {machine}"),
    };
    name.to_owned()
}

/// The program headers' place in the file, after the checks that tell other files apart.
fn program_headers(file: &[u8]) -> Result<(u64, u64), ElfError> {
    in_file("the ELF header", 0, HEADER_SIZE as u64, file.len())?;
    let (class, data) = (file.get(4), file.get(5));
    let big_endian = data == Some(&2);
    let machine = match field(file, 18) {
        Some(raw) if big_endian => u16::from_be_bytes(raw),
        raw => raw.map_or(0, u16::from_le_bytes),
    };
    if machine != EM_X86_64 || class != Some(&2) || big_endian {
        return Err(ElfError::OtherArchitecture(machine_name(machine, big_endian)));
    }
    match u16_at(file, 16) {
        // Linkers give a kernel that can move itself the type of a shared object: see `Elf::parse`.
        ET_EXEC | ET_DYN => {}
        1 => return Err(ElfError::NotExecutable("a relocatable object (a module?)".into())),
        4 => return Err(ElfError::NotExecutable("a core dump".into())),
        other => return Err(ElfError::NotExecutable(format!("of type {other}"))),
    }
    let (size, count) = (u16_at(file, 54), u16_at(file, 56));
    if usize::from(size) != PROGRAM_HEADER_SIZE {
        return Err(ElfError::BadField { what: "the program header size", value: size.into() });
    }
    // A vmlinux has five or so; 0xffff means "see elsewhere".
    if count == 0 || count > 128 {
        return Err(ElfError::BadField { what: "the number of program headers", value: count.into() });
    }
    Ok((u64_at(file, 32), u64::from(count) * PROGRAM_HEADER_SIZE as u64))
}

/// How much of a file, given its start, is needed to load it: debug information after the segments is
/// not. `None` when that does not show in `start`.
pub(super) fn needed_length(start: &[u8]) -> Option<u64> {
    let (offset, size) = program_headers(start).ok()?;
    let table = start.get(in_file("", offset, size, start.len()).ok()?)?;
    let ends = table.chunks_exact(PROGRAM_HEADER_SIZE).map(|h| match u32_at(h, 0) {
        PT_LOAD | PT_NOTE => u64_at(h, 8).saturating_add(u64_at(h, 32)),
        _ => 0,
    });
    Some(ends.max()?.max(offset.saturating_add(size)))
}

impl Elf {
    /// Reads the headers of a kernel.
    pub(super) fn parse(file: &[u8]) -> Result<Self, ElfError> {
        let (offset, size) = program_headers(file)?;
        let table = in_file("the program header table", offset, size, file.len())?;
        let mut segments = Vec::new();
        let mut pvh_entry = None;
        for header in file.get(table).unwrap_or_default().chunks_exact(PROGRAM_HEADER_SIZE) {
            let (file_offset, file_size) = (u64_at(header, 8), u64_at(header, 32));
            match u32_at(header, 0) {
                PT_LOAD => {
                    let segment = Segment {
                        file: in_file("a segment", file_offset, file_size, file.len())?,
                        address: Gpa(u64_at(header, 24)),
                        memory_size: u64_at(header, 40),
                        virtual_address: u64_at(header, 16),
                    };
                    if segment.memory_size < file_size
                        || segment.address.checked_add(segment.memory_size).is_none()
                    {
                        let value = segment.memory_size;
                        return Err(ElfError::BadField { what: "a segment's size in memory", value });
                    }
                    if segment.memory_size != 0 {
                        segments.push(segment);
                    }
                }
                PT_NOTE => {
                    let notes = in_file("a note", file_offset, file_size, file.len())?;
                    let align = if u64_at(header, 48) == 8 { 8 } else { 4 };
                    let notes = file.get(notes).unwrap_or_default();
                    pvh_entry = pvh_entry.or_else(|| find_pvh_entry(notes, align));
                }
                _ => {}
            }
        }
        if u16_at(file, 16) == ET_DYN && pvh_entry.is_none() {
            // Only the note tells a position-independent kernel, which is loaded where its headers say, from a program.
            let what = "a shared object or position-independent program".into();
            return Err(ElfError::NotExecutable(what));
        }
        let e_entry = u64_at(file, 24);
        let entry = find_entry(&segments, e_entry).ok_or(ElfError::NoEntry(e_entry))?;
        Ok(Self { entry, pvh_entry, segments })
    }
}

/// The physical entry point. Linux's `e_entry` is physical; a virtual one is understood too.
fn find_entry(segments: &[Segment], e_entry: u64) -> Option<Gpa> {
    let inside = |start: u64, size: u64| e_entry.checked_sub(start).filter(|&offset| offset < size);
    let physical = segments.iter().find_map(|s| inside(s.address.0, s.memory_size).map(|o| (s, o)));
    let (segment, offset) = physical
        .or_else(|| segments.iter().find_map(|s| inside(s.virtual_address, s.memory_size).map(|o| (s, o))))?;
    segment.address.checked_add(offset)
}

/// Looks for the PVH entry point in a block of ELF notes.
fn find_pvh_entry(mut notes: &[u8], align: usize) -> Option<u32> {
    loop {
        let (header, rest) = notes.split_first_chunk::<12>()?;
        let name_size = u32_at(header, 0) as usize;
        let value_size = u32_at(header, 4) as usize;
        let name = rest.get(..name_size)?;
        let rest = rest.get(name_size.checked_next_multiple_of(align)?..)?;
        let value = rest.get(..value_size)?;
        if u32_at(header, 8) == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return match value_size {
                4 => Some(u32_at(value, 0)),
                8 => u32::try_from(u64_at(value, 0)).ok(),
                _ => None,
            };
        }
        notes = rest.get(value_size.checked_next_multiple_of(align)?..)?;
    }
}
