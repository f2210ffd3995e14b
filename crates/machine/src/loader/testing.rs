//! Kernels made up for tests: ELF files and bzImages around them.

use std::io::Write;

use super::Compression;

/// A program header of a made-up ELF file.
pub(crate) struct Part {
    pub(crate) kind: u32,
    pub(crate) address: u64,
    pub(crate) content: Vec<u8>,
    pub(crate) memory_size: u64,
}

/// Where the made-up kernel is loaded and entered.
pub(super) const KERNEL_AT: u64 = 0x20_0000;
/// Its PVH entry point.
pub(super) const PVH_AT: u32 = 0x20_0040;
/// Its release.
pub(super) const RELEASE: &str = "6.99.0-made-up";

/// An x86-64 executable with these parts.
pub(crate) fn elf(entry: u64, parts: &[Part]) -> Vec<u8> {
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    file.extend(entry.to_le_bytes());
    file.extend(64u64.to_le_bytes());
    file.extend(0u64.to_le_bytes());
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, parts.len() as u16, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let mut offset = 64 + 56 * parts.len() as u64;
    for part in parts {
        file.extend(part.kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        let size = part.content.len() as u64;
        let virtual_address = 0xffff_0000_0000_0000 + part.address;
        for word in [offset, virtual_address, part.address, size, part.memory_size, 4] {
            file.extend(word.to_le_bytes());
        }
        offset += size;
    }
    for part in parts {
        file.extend(&part.content);
    }
    file
}

/// A kernel: two segments, the second mostly `.bss`, and a note with a PVH entry after one of another kind.
pub(super) fn vmlinux() -> Vec<u8> {
    let mut text: Vec<u8> = (0..12_000u32).flat_map(|i| (i.wrapping_mul(i) >> 7).to_le_bytes()).collect();
    let banner = format!("\0Linux version %s (%s)\0Linux version {RELEASE} (somebody@somewhere) #1\n\0");
    text.extend(banner.as_bytes());
    text.extend(vec![0x90; 20_000]);
    let mut notes = Vec::new();
    for (name, kind, value) in
        [(&b"GNU\0"[..], 3u32, &b"\x01\x02\x03"[..]), (b"Xen\0", 18, &PVH_AT.to_le_bytes())]
    {
        notes.extend((name.len() as u32).to_le_bytes());
        notes.extend((value.len() as u32).to_le_bytes());
        notes.extend(kind.to_le_bytes());
        notes.extend(name);
        notes.extend(value);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
    let size = text.len() as u64;
    elf(
        KERNEL_AT,
        &[
            Part { kind: 1, address: KERNEL_AT, memory_size: size, content: text },
            Part { kind: 1, address: 0x40_0000, memory_size: 0x10_0000, content: b"data".to_vec() },
            Part { kind: 4, address: 0, memory_size: notes.len() as u64, content: notes },
        ],
    )
}

/// Compresses as the kernel's build does and adds the size where the format does not end with it.
pub(super) fn payload(compression: Compression, content: &[u8]) -> Vec<u8> {
    let mut out = match compression {
        Compression::None => return content.to_vec(),
        Compression::Gzip => {
            let mut writer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            writer.write_all(content).unwrap();
            return writer.finish().unwrap();
        }
        Compression::Xz => {
            let mut options = lzma_rust2::XzOptions::with_preset(1);
            options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
            options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
            let mut writer = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
            writer.write_all(content).unwrap();
            writer.finish().unwrap()
        }
        Compression::Lzma => {
            let options = lzma_rust2::LzmaOptions::with_preset(1);
            let mut writer = lzma_rust2::LzmaWriter::new_use_header(Vec::new(), &options, None).unwrap();
            writer.write_all(content).unwrap();
            writer.finish().unwrap()
        }
        Compression::Bzip2 => {
            let mut writer = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
            writer.write_all(content).unwrap();
            writer.finish().unwrap()
        }
        Compression::Lz4 => {
            let mut out = 0x184c_2102_u32.to_le_bytes().to_vec();
            // Small chunks, so that there is more than one.
            for chunk in content.chunks(20_000) {
                let block = lz4_flex::block::compress(chunk);
                out.extend((block.len() as u32).to_le_bytes());
                out.extend(block);
            }
            out
        }
        Compression::Zstd => {
            ruzstd::encoding::compress_to_vec(content, ruzstd::encoding::CompressionLevel::Fastest)
        }
    };
    out.extend((content.len() as u32).to_le_bytes());
    out
}

/// A bzImage of protocol 2.15 around a payload.
pub(super) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let version = b"6.99.0-made-up (somebody@somewhere) #1 SMP\0";
    let mut file = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x20e, &0x0100u16.to_le_bytes());
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &0x40u32.to_le_bytes());
    put(0x24c, &(payload.len() as u32).to_le_bytes());
    put(0x300, version);
    file.resize(1024 + 0x40, 0xcc);
    file.extend(payload);
    file.extend([0xee; 300]);
    file
}

/// All that a payload can be compressed with.
pub(super) const COMPRESSIONS: [Compression; 7] = [
    Compression::None,
    Compression::Gzip,
    Compression::Xz,
    Compression::Lzma,
    Compression::Bzip2,
    Compression::Lz4,
    Compression::Zstd,
];
