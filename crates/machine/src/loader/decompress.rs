//! The compressed part of a bzImage, taken apart on the host.
//!
//! The payload is a stream of one of the kernel's compressors followed by the size of what is in it, 32 bits
//! little-endian. (For gzip that is the stream's own last field.) The size is what the kernel's
//! own decompressor trusts; here it is a claim to be checked: more output than declared, or less,
//! is corruption, and no more is ever produced than declared or than [`MAX_KERNEL`].

use std::fmt;
use std::io::{self, Read};

/// Largest kernel, in bytes, once decompressed: ten times what distributions ship.
pub const MAX_KERNEL: u64 = 512 << 20;

/// Most memory, in KiB, for a stream's dictionary or window. The kernel's build uses up to 128 MiB.
const MAX_WINDOW_KIB: u32 = 160 << 10;

/// Output of one chunk in the legacy lz4 format at most.
const LZ4_CHUNK: usize = 8 << 20;

/// How the kernel in a bzImage is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// gzip (RFC 1952).
    Gzip,
    /// xz, usually with the x86 branch filter.
    Xz,
    /// The older `.lzma` format.
    Lzma,
    /// bzip2.
    Bzip2,
    /// lz4 in its legacy frame format, as `lz4 -l` writes it.
    Lz4,
    /// Zstandard (RFC 8878).
    Zstd,
}

impl Compression {
    /// The compressor of a stream, by its first bytes.
    fn detect(stream: &[u8]) -> Option<Self> {
        const MAGICS: [(&[u8], Compression); 7] = [
            (b"\x7fELF", Compression::None),
            (b"\x1f\x8b", Compression::Gzip),
            (b"\xfd7zXZ\0", Compression::Xz),
            (b"\x5d\0\0", Compression::Lzma),
            (b"BZh", Compression::Bzip2),
            (b"\x02\x21\x4c\x18", Compression::Lz4),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
        ];
        MAGICS.iter().find(|(magic, _)| stream.starts_with(magic)).map(|&(_, c)| c)
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "uncompressed",
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Lzma => "lzma",
            Self::Bzip2 => "bzip2",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

/// Why the payload of a bzImage could not be decompressed.
#[derive(Debug, thiserror::Error)]
pub enum DecompressError {
    /// The payload is shorter than the size field at its end.
    #[error("it is {0} bytes long, too short to hold a kernel")]
    TooShort(usize),
    /// The first bytes are of no compressor that kernels use.
    #[error("it starts with {0:02x?}, which is none of gzip, xz, lzma, bzip2, lz4 and zstd")]
    UnknownFormat(Vec<u8>),
    /// LZO, which has no maintained decompressor to use.
    #[error(
        "it is compressed with lzo, which is not supported: build the kernel with another compressor, or give its vmlinux"
    )]
    Lzo,
    /// The declared size is larger than any kernel.
    #[error("it claims to be {declared} bytes when decompressed, more than the limit of {limit}")]
    TooBig {
        /// The claim.
        declared: u64,
        /// The limit.
        limit: u64,
    },
    /// The stream is broken.
    #[error("its {compression} stream is corrupt")]
    Corrupt {
        /// The stream's format.
        compression: Compression,
        /// What the decompressor says.
        source: io::Error,
    },
    /// The stream holds more or less than declared.
    #[error("it claims {declared} bytes, its {compression} stream holds {}", at_least(*.actual, *.declared))]
    WrongSize {
        /// The stream's format.
        compression: Compression,
        /// The claim.
        declared: u64,
        /// What came out; one more than declared when it was stopped there.
        actual: u64,
    },
}

/// Words for an output that was stopped one byte after the declared size.
fn at_least(actual: u64, declared: u64) -> String {
    if actual > declared { format!("more than {declared}") } else { actual.to_string() }
}

/// Decompresses a bzImage's payload.
pub(super) fn decompress(payload: &[u8]) -> Result<(Compression, Vec<u8>), DecompressError> {
    let too_short = DecompressError::TooShort(payload.len());
    let Some((stream, size)) = payload.split_last_chunk::<4>() else {
        return Err(too_short);
    };
    let declared = u64::from(u32::from_le_bytes(*size));
    if payload.starts_with(b"\x89LZO") {
        return Err(DecompressError::Lzo);
    }
    let Some(compression) = Compression::detect(payload) else {
        return Err(DecompressError::UnknownFormat(payload.iter().take(6).copied().collect()));
    };
    if compression == Compression::None {
        return match payload.len() as u64 {
            size if size > MAX_KERNEL => Err(DecompressError::TooBig { declared: size, limit: MAX_KERNEL }),
            _ => Ok((compression, payload.to_vec())),
        };
    }
    if declared > MAX_KERNEL {
        return Err(DecompressError::TooBig { declared, limit: MAX_KERNEL });
    }
    let mut out = Vec::new();
    let result = match compression {
        Compression::None => Ok(()),
        Compression::Gzip => drain(flate2::read::GzDecoder::new(payload), declared, &mut out),
        Compression::Xz => {
            let reader = lzma_rust2::XzReader::new_mem_limit(stream, false, MAX_WINDOW_KIB);
            drain(reader, declared, &mut out)
        }
        Compression::Lzma => lzma_rust2::LzmaReader::new_mem_limit(stream, MAX_WINDOW_KIB, None)
            .and_then(|reader| drain(reader, declared, &mut out)),
        Compression::Bzip2 => drain(bzip2::read::BzDecoder::new(stream), declared, &mut out),
        Compression::Lz4 => lz4_legacy(stream, declared, &mut out),
        Compression::Zstd => zstd(stream, declared, &mut out),
    };
    result.map_err(|source| DecompressError::Corrupt { compression, source })?;
    let actual = out.len() as u64;
    if actual != declared {
        return Err(DecompressError::WrongSize { compression, declared, actual });
    }
    Ok((compression, out))
}

/// Reads to the end, or to one byte more than `declared`. The buffer grows with what really comes.
fn drain(reader: impl Read, declared: u64, out: &mut Vec<u8>) -> io::Result<()> {
    reader.take(declared.saturating_add(1)).read_to_end(out).map(drop)
}

fn zstd(stream: &[u8], declared: u64, out: &mut Vec<u8>) -> io::Result<()> {
    let window = u64::from(MAX_WINDOW_KIB) << 10;
    let mut reader = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(stream, window)
        .map_err(io::Error::other)?;
    drain(&mut reader, declared, out)?;
    if out.len() as u64 != declared {
        // Not all was read, or too little was there: a checksum says nothing then.
        return Ok(());
    }
    let frame = reader.into_frame_decoder();
    match (frame.get_checksum_from_data(), frame.get_calculated_checksum()) {
        (Some(stored), Some(computed)) if stored != computed => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("checksum is {computed:#x}, should be {stored:#x}"),
        )),
        _ => Ok(()),
    }
}

/// The legacy lz4 format: a magic number, then chunks of up to 8 MiB, each after its compressed
/// size. Streams may follow one another.
fn lz4_legacy(mut stream: &[u8], declared: u64, out: &mut Vec<u8>) -> io::Result<()> {
    const MAGIC: [u8; 4] = 0x184c_2102_u32.to_le_bytes();
    let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidData, text);
    let mut chunk = vec![0; LZ4_CHUNK];
    while let Some((word, rest)) = stream.split_first_chunk::<4>() {
        stream = rest;
        if *word == MAGIC {
            continue;
        }
        let size = u32::from_le_bytes(*word) as usize;
        let Some((input, rest)) = stream.split_at_checked(size) else {
            return Err(invalid(format!("a chunk of {size} bytes with {} left", stream.len())));
        };
        stream = rest;
        let produced = lz4_flex::block::decompress_into(input, &mut chunk).map_err(io::Error::other)?;
        out.extend_from_slice(chunk.get(..produced).unwrap_or_default());
        if out.len() as u64 > declared {
            return Ok(());
        }
    }
    if stream.is_empty() {
        Ok(())
    } else {
        Err(invalid(format!("{} bytes after the last chunk", stream.len())))
    }
}
