//! A kernel file, told by its content and decompressed once.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::decompress::{Compression, DecompressError, MAX_KERNEL, decompress};
use super::elf::{Elf, ElfError, needed_length};

/// Largest kernel file, in bytes, that is read.
pub const MAX_FILE: u64 = MAX_KERNEL;
/// How much of a file is looked at to tell how much of it to read.
const HEAD: u64 = 64 << 10;

// The setup header of a bzImage (Documentation/arch/x86/boot.rst, "The real-mode kernel header").
/// First byte of the header: `setup_sects`.
pub(super) const SETUP_HEADER: usize = 0x1f1;
/// `syssize`: what follows the setup sectors, in units of 16 bytes.
const SYSSIZE: usize = 0x1f4;
const BOOT_FLAG: usize = 0x1fe;
/// The second byte of a jump over the header, thus where it ends, counted from 0x202.
const JUMP_OFFSET: usize = 0x201;
const HEADER_MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const KERNEL_VERSION: usize = 0x20e;
const INITRD_ADDR_MAX: usize = 0x22c;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const INIT_SIZE: usize = 0x260;
/// End of the fields that this loader knows.
const HEADER_END: usize = 0x26c;
/// `xloadflags`: the kernel has a 64-bit entry point.
const XLF_KERNEL_64: u16 = 1 << 0;

/// What a vmlinux says nothing about: a bzImage's value of `initrd_addr_max` for Linux on x86.
const DEFAULT_INITRD_ADDR_MAX: u32 = 0x7fff_ffff;
/// Likewise of `cmdline_size`: 2048 bytes with the NUL.
const DEFAULT_CMDLINE_SIZE: u32 = 2047;

/// Why a file is not a kernel for this machine.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The file cannot be read.
    #[error("cannot read kernel {}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is larger than any kernel.
    #[error("the kernel file is larger than {limit} bytes, which no kernel is")]
    TooBig {
        /// The limit.
        limit: u64,
    },
    /// The file has no bytes.
    #[error("the kernel file is empty")]
    Empty,
    /// The content is of some other kind.
    #[error("not a kernel: the file is {what}; an x86-64 bzImage (vmlinuz) or an ELF vmlinux is wanted")]
    NotAKernel {
        /// What it looks like.
        what: String,
    },
    /// A kernel of another architecture.
    #[error("the kernel is for {0}; the machine is x86-64 and needs an x86-64 kernel")]
    OtherArchitecture(&'static str),
    /// The boot protocol has no payload fields.
    #[error(
        "the bzImage has boot protocol {}.{:02}, older than 2.08 (Linux 2.6.24): take a newer kernel, or its vmlinux",
        .0 >> 8, .0 & 0xff
    )]
    OldProtocol(u16),
    /// The file ends before something that its header names.
    #[error("the bzImage is truncated: {what} ends at byte {end}, the file at {length}")]
    Truncated {
        /// What is cut off.
        what: &'static str,
        /// Where it would end.
        end: u64,
        /// Bytes in the file.
        length: usize,
    },
    /// The compressed kernel in the bzImage is broken.
    #[error("the kernel inside the bzImage is unusable")]
    Payload(#[from] DecompressError),
    /// The ELF file, or the one in the bzImage, is not usable.
    #[error("cannot use the kernel's ELF image")]
    Elf(#[from] ElfError),
}

/// A kernel, decompressed and checked, ready to be loaded into any number of machines.
#[derive(Clone)]
pub struct KernelImage {
    /// The ELF file, without what follows its last segment.
    pub(super) vmlinux: Vec<u8>,
    pub(super) elf: Elf,
    /// The bzImage's setup header, from [`SETUP_HEADER`] on.
    pub(super) setup_header: Option<Vec<u8>>,
    /// Highest address that the initramfs may have a byte at.
    pub(super) initrd_addr_max: u32,
    /// Bytes of command line at most, without NUL.
    pub(super) cmdline_size: u32,
    /// Bytes from the kernel's start that it uses before it looks at the memory map; zero if unknown.
    pub(super) init_size: u32,
    compression: Compression,
    version: Option<String>,
}

impl std::fmt::Debug for KernelImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KernelImage")
            .field("version", &self.version)
            .field("compression", &self.compression)
            .field("bytes", &self.vmlinux.len())
            .field("elf", &self.elf)
            .finish_non_exhaustive()
    }
}

impl KernelImage {
    /// Reads a kernel from a file.
    ///
    /// # Errors
    /// When the file cannot be read or is not a kernel for this machine; the message says what it
    /// is instead.
    pub fn open(path: &Path) -> Result<Self, ImageError> {
        let failed = |source| ImageError::Read { path: path.to_owned(), source };
        let mut file = File::open(path).map_err(failed)?;
        let mut bytes = Vec::new();
        (&mut file).take(HEAD).read_to_end(&mut bytes).map_err(failed)?;
        // A vmlinux with debug information is mostly debug information.
        let wanted = needed_length(&bytes).unwrap_or(u64::MAX);
        if wanted > HEAD {
            let limit = wanted.min(MAX_FILE.saturating_add(1));
            file.take(limit.saturating_sub(bytes.len() as u64)).read_to_end(&mut bytes).map_err(failed)?;
        }
        Self::from_bytes(bytes)
    }

    /// Takes a kernel file's content.
    ///
    /// # Errors
    /// When it is not a kernel for this machine.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, ImageError> {
        if bytes.len() as u64 > MAX_FILE {
            return Err(ImageError::TooBig { limit: MAX_FILE });
        }
        if bytes.is_empty() {
            return Err(ImageError::Empty);
        }
        if bytes.starts_with(b"\x7fELF") {
            return Self::from_elf(bytes);
        }
        if u16_at(&bytes, BOOT_FLAG) == Some(0xaa55)
            && bytes.get(HEADER_MAGIC..HEADER_MAGIC + 4) == Some(b"HdrS")
        {
            return Self::from_bzimage(&bytes);
        }
        Err(describe(&bytes))
    }

    fn from_elf(mut vmlinux: Vec<u8>) -> Result<Self, ImageError> {
        let elf = Elf::parse(&vmlinux)?;
        if let Some(needed) = needed_length(&vmlinux).and_then(|n| usize::try_from(n).ok()) {
            vmlinux.truncate(needed);
            vmlinux.shrink_to_fit();
        }
        let version = find_banner(&vmlinux);
        Ok(Self {
            vmlinux,
            elf,
            setup_header: None,
            initrd_addr_max: DEFAULT_INITRD_ADDR_MAX,
            cmdline_size: DEFAULT_CMDLINE_SIZE,
            init_size: 0,
            compression: Compression::None,
            version,
        })
    }

    fn from_bzimage(file: &[u8]) -> Result<Self, ImageError> {
        let truncated = |what, end: u64| ImageError::Truncated { what, end, length: file.len() };
        let protocol = u16_at(file, VERSION).ok_or(truncated("the header", VERSION as u64 + 2))?;
        if protocol < 0x208 {
            return Err(ImageError::OldProtocol(protocol));
        }
        let header_end = file.get(JUMP_OFFSET).map_or(0, |&n| HEADER_MAGIC + usize::from(n)).min(HEADER_END);
        let header = match file.get(SETUP_HEADER..header_end) {
            Some(header) if header_end >= PAYLOAD_LENGTH + 4 => header.to_vec(),
            _ => return Err(truncated("the header", header_end.max(PAYLOAD_LENGTH + 4) as u64)),
        };
        let word = |at| u32_at(file, at).ok_or(truncated("the header", at as u64 + 4));
        if protocol >= 0x20c && u16_at(file, XLOADFLAGS).is_some_and(|f| f & XLF_KERNEL_64 == 0) {
            return Err(ImageError::OtherArchitecture("i386 (32-bit x86): it has no 64-bit entry point"));
        }
        // Zero means four, from when there was no such field.
        let sectors = match file.get(SETUP_HEADER) {
            Some(0) | None => 4,
            Some(&n) => u64::from(n),
        };
        let setup = (sectors + 1) * 512;
        // The part behind the compressed kernel is not used here; without it the file is damaged all the same.
        // The size counts paragraphs of 16 bytes, the last of which need not be whole.
        let end = setup + 16 * u64::from(word(SYSSIZE)?);
        if end >= file.len() as u64 + 16 {
            return Err(truncated("the kernel", end));
        }
        let start = setup + u64::from(word(PAYLOAD_OFFSET)?);
        let end = start + u64::from(word(PAYLOAD_LENGTH)?);
        let payload = usize::try_from(start)
            .ok()
            .zip(usize::try_from(end).ok())
            .and_then(|(start, end)| file.get(start..end))
            .ok_or(truncated("the compressed kernel", end))?;
        let (compression, vmlinux) = decompress(payload)?;
        let image = Self::from_elf(vmlinux)?;
        Ok(Self {
            initrd_addr_max: word(INITRD_ADDR_MAX)?,
            cmdline_size: word(CMDLINE_SIZE)?,
            init_size: if protocol >= 0x20a { word(INIT_SIZE)? } else { 0 },
            setup_header: Some(header),
            compression,
            version: setup_version(file).or(image.version),
            ..image
        })
    }

    /// The kernel's release, as `uname -r` prints it, if the file tells.
    pub fn version(&self) -> Option<&str> {
        self.version.as_deref()
    }

    /// How the kernel was compressed.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// Bytes of the decompressed kernel.
    pub fn size(&self) -> usize {
        self.vmlinux.len()
    }

    /// Whether the kernel can be entered by PVH.
    pub fn has_pvh_entry(&self) -> bool {
        self.elf.pvh_entry.is_some()
    }

    /// Whether the kernel has PVM guest support: the synthetic CPUID instruction, by which it would ask for a PVM
    /// hypervisor. Only such a kernel can be booted with [`GuestAbi::Pvm`](crate::GuestAbi::Pvm).
    pub fn is_pvm_guest(&self) -> bool {
        pvm::image::is_guest(&self.vmlinux)
    }

    /// Whether some bytes occur in the decompressed kernel: a symbol, a message, a driver's name. For
    /// early hints ("this kernel has no virtio"), not for proof.
    pub fn contains(&self, bytes: &[u8]) -> bool {
        memchr::memmem::find(&self.vmlinux, bytes).is_some()
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|b| u16::from_le_bytes(*b))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_le_bytes(*b))
}

/// The first word of a text, if it looks like a release: short and printable.
fn first_word(text: &[u8]) -> Option<String> {
    let end = text.iter().take(256).position(|&b| b == 0 || b == b' ')?;
    let word = text.get(..end)?;
    let printable = !word.is_empty() && word.iter().all(u8::is_ascii_graphic);
    printable.then(|| String::from_utf8_lossy(word).into_owned())
}

/// The version string that a bzImage's setup header points to.
fn setup_version(file: &[u8]) -> Option<String> {
    match u16_at(file, KERNEL_VERSION)? {
        0 => None,
        offset => first_word(file.get(usize::from(offset) + 0x200..)?),
    }
}

/// The release from the banner that a kernel prints first.
fn find_banner(vmlinux: &[u8]) -> Option<String> {
    const BANNER: &[u8] = b"Linux version ";
    memchr::memmem::find_iter(vmlinux, BANNER).find_map(|at| {
        // Format strings have the words too.
        first_word(vmlinux.get(at + BANNER.len()..)?).filter(|v| v.starts_with(|c: char| c.is_ascii_digit()))
    })
}

/// Says what a file is that is no kernel for this machine.
fn describe(bytes: &[u8]) -> ImageError {
    let magic_at = |at: usize, magic: &[u8]| bytes.get(at..).is_some_and(|b| b.starts_with(magic));
    // Documentation/arch/arm64/booting.rst and Documentation/arch/riscv/boot-image-header.rst.
    if magic_at(0x38, b"ARM\x64") {
        return ImageError::OtherArchitecture("aarch64 (an arm64 Image)");
    }
    if magic_at(0x38, b"RSC\x05") || magic_at(0x30, b"RISCV\0\0\0") {
        return ImageError::OtherArchitecture("RISC-V");
    }
    if magic_at(0x24, &0x016f_2818_u32.to_le_bytes()) {
        return ImageError::OtherArchitecture("32-bit ARM (a zImage)");
    }
    if magic_at(4, b"zimg") {
        return ImageError::OtherArchitecture("another architecture than x86 (an EFI zboot image)");
    }
    const KINDS: [(&[u8], &str); 10] = [
        (b"MZ", "an EFI or Windows program"),
        (b"\x1f\x8b", "compressed with gzip as a whole (an arm64 Image.gz?): decompress it first"),
        (b"\xfd7zXZ\0", "compressed with xz as a whole: decompress it first"),
        (b"\x28\xb5\x2f\xfd", "compressed with zstd as a whole: decompress it first"),
        (b"070701", "a cpio archive (an initramfs?)"),
        (b"!<arch>", "an ar archive (a .deb package?)"),
        (b"\x27\x05\x19\x56", "a U-Boot image"),
        (b"#!", "a script"),
        (b"\xd0\x0d\xfe\xed", "a device tree"),
        (b"QFI\xfb", "a qcow2 disk image"),
    ];
    let known = KINDS.iter().find(|(magic, _)| bytes.starts_with(magic));
    let what = match known {
        Some((_, what)) => (*what).to_owned(),
        None if bytes.iter().take(512).all(|&b| b == 0) => "all zeros at its start".to_owned(),
        None => format!(
            "of unknown kind, {} bytes that start with {:02x?}",
            bytes.len(),
            bytes.get(..8).unwrap_or(bytes)
        ),
    };
    ImageError::NotAKernel { what }
}
