//! What a kernel file says about itself: its release name, and, for an ELF file, which drivers it has.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use machine::loader::{KernelImage, MAX_FILE};

/// A kernel file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be read.
    #[error("cannot read kernel {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Neither bzImage nor ELF.
    #[error("cannot boot {}", path.display())]
    NotAKernel {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        source: Option<machine::loader::ImageError>,
    },
}

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The release, as `uname -r` will print it, when the file tells it.
    pub release: Option<String>,
    /// Whether the file is an uncompressed ELF kernel, in which built-in drivers can be looked for.
    pub elf: bool,
}

/// Reads a kernel file.
///
/// # Errors
/// [`ImageError::Read`], naming the file.
pub fn read(path: &Path) -> Result<Vec<u8>, ImageError> {
    let failed = |source| ImageError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    // Some files have no end.
    fs::File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(failed(std::io::ErrorKind::FileTooLarge.into()));
    }
    Ok(bytes)
}

/// Looks into a kernel file.
///
/// # Errors
/// [`ImageError::NotAKernel`] when it has neither format's signature, or is for another machine.
pub fn identify(path: &Path, bytes: &[u8]) -> Result<Identity, ImageError> {
    // Linux/x86 boot protocol: "HdrS" at 0x202, pointer to the version string (minus 0x200) at 0x20e.
    if bytes.get(0x202..0x206) == Some(b"HdrS") {
        let pointer = bytes.get(0x20e..0x210).and_then(|b| b.try_into().ok()).map(u16::from_le_bytes);
        let release = pointer
            .filter(|&p| p != 0)
            .and_then(|p| bytes.get(usize::from(p) + 0x200..))
            .and_then(first_word);
        return Ok(Identity { release, elf: false });
    }
    if bytes.starts_with(b"\x7fELF") && !is_foreign(bytes) {
        let banner = b"Linux version ";
        let release = find(bytes, banner).and_then(|at| bytes.get(at + banner.len()..)).and_then(first_word);
        return Ok(Identity { release, elf: true });
    }
    let source = KernelImage::from_bytes(bytes.to_vec()).err();
    Err(ImageError::NotAKernel { path: path.to_owned(), source })
}

/// Whether an ELF header names another machine than x86-64 (System V ABI: `EI_VERSION`, `e_machine`).
fn is_foreign(elf: &[u8]) -> bool {
    const EM_X86_64: [u8; 2] = [62, 0];
    elf.get(6) == Some(&1) && elf.get(18..20).is_some_and(|machine| machine != EM_X86_64)
}

/// Whether an ELF kernel holds the text `driver`, as every kernel with that driver built in does.
#[must_use]
pub fn mentions(bytes: &[u8], driver: &str) -> bool {
    find(bytes, driver.as_bytes()).is_some()
}

/// A word of printable ASCII at the start of `bytes`.
fn first_word(bytes: &[u8]) -> Option<String> {
    const LONGEST: usize = 128;
    let word: Vec<u8> = bytes.iter().copied().take(LONGEST).take_while(u8::is_ascii_graphic).collect();
    (!word.is_empty() && !word.contains(&b'/')).then(|| String::from_utf8_lossy(&word).into_owned())
}

/// Substring search by the first byte; kernels are tens of megabytes and this is done at most a few times.
fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    let first = *what.first()?;
    let mut from = 0;
    while let Some(at) = bytes.get(from..)?.iter().position(|&b| b == first) {
        if bytes.get(from + at..)?.starts_with(what) {
            return Some(from + at);
        }
        from += at + 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(release: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 0x400];
        bytes[0x202..0x206].copy_from_slice(b"HdrS");
        bytes[0x20e..0x210].copy_from_slice(&0x100_u16.to_le_bytes());
        bytes[0x300..0x300 + release.len()].copy_from_slice(release);
        bytes
    }

    fn release(bytes: &[u8]) -> Option<String> {
        identify(Path::new("k"), bytes).unwrap().release
    }

    #[test]
    fn the_release_is_the_first_word_of_the_version() {
        assert_eq!(release(&bzimage(b"6.1.0-56-cloud-amd64 (a@b) #1 SMP")).unwrap(), "6.1.0-56-cloud-amd64");
        let elf = b"\x7fELF.....LLLinux version 6.12.1 (x) ....virtiofs";
        assert_eq!(release(elf).unwrap(), "6.12.1");
        assert!(mentions(elf, "virtiofs") && !mentions(elf, "overlay"));
    }

    #[test]
    fn damaged_headers_give_no_release() {
        assert_eq!(release(&bzimage(b"")), None);
        assert_eq!(release(&bzimage(b"../../etc")), None);
        for end in 0x206..0x320 {
            let _ = identify(Path::new("k"), &bzimage(b"6.1.0 x")[..end]).unwrap();
        }
        assert!(matches!(identify(Path::new("k"), b"hello"), Err(ImageError::NotAKernel { .. })));
        assert!(matches!(identify(Path::new("k"), b""), Err(ImageError::NotAKernel { .. })));
    }
}
