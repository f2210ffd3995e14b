//! Reading a Debian package: an `ar` archive whose member `data.tar`, compressed one way or another, holds the
//! files (deb(5)). Only what a guest needs is written out; the package's words for paths are not trusted.

use std::fs::{self, File};
use std::io::{self, BufReader, Read};
use std::path::{Component, Path, PathBuf};

use super::store;

/// Why a package cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum DebError {
    /// Reading the package failed: it is damaged, or the disk is.
    #[error("cannot unpack {}", path.display())]
    Read {
        /// The package.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// No `data.tar` member.
    #[error("{} is not a Debian package: it has no data.tar", path.display())]
    NoData {
        /// The package.
        path: PathBuf,
    },
    /// A compression that this program does not know.
    #[error("{} is compressed in an unknown way: {member}", path.display())]
    Compression {
        /// The package.
        path: PathBuf,
        /// The member's name.
        member: String,
    },
}

/// Unpacks the kernel, its configuration and its modules of `release` into `to`, laid out as the cache wants it.
///
/// # Errors
/// A [`DebError`] naming the package. `to` may then hold a part of the files.
pub fn unpack(package: &Path, release: &str, to: &Path) -> Result<(), DebError> {
    let fail = |source| DebError::Read { path: package.to_owned(), source };
    let mut archive = ar::Archive::new(BufReader::new(File::open(package).map_err(fail)?));
    while let Some(member) = archive.next_entry() {
        let mut member = member.map_err(fail)?;
        let name = String::from_utf8_lossy(member.header().identifier()).trim_end_matches('/').to_owned();
        let Some(kind) = name.strip_prefix("data.tar") else { continue };
        match kind {
            "" => unpack_tar(&mut member, release, to).map_err(fail)?,
            ".xz" => unpack_tar(liblzma::read::XzDecoder::new(&mut member), release, to).map_err(fail)?,
            ".gz" => unpack_tar(flate2::read::GzDecoder::new(&mut member), release, to).map_err(fail)?,
            ".zst" => {
                let decoder = ruzstd::decoding::StreamingDecoder::new(&mut member);
                unpack_tar(decoder.map_err(|e| fail(io::Error::other(e)))?, release, to).map_err(fail)?;
            }
            _ => return Err(DebError::Compression { path: package.to_owned(), member: name }),
        }
        return Ok(());
    }
    Err(DebError::NoData { path: package.to_owned() })
}

fn unpack_tar(data: impl Read, release: &str, to: &Path) -> io::Result<()> {
    let mut tar = tar::Archive::new(data);
    for entry in tar.entries()? {
        let mut entry = entry?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let Some(place) = place(&entry.path()?, release) else { continue };
        let target = to.join(place);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        io::copy(&mut entry, &mut File::create(&target)?)?;
    }
    // The end of the compressed stream has its checksum: read up to it.
    io::copy(&mut tar.into_inner(), &mut io::sink())?;
    Ok(())
}

/// Where a file of the package goes below the kernel's directory, if it is wanted.
fn place(path: &Path, release: &str) -> Option<PathBuf> {
    let mut parts = Vec::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str()?),
            Component::CurDir => {}
            Component::RootDir | Component::ParentDir | Component::Prefix(_) => return None,
        }
    }
    let parts = parts.strip_prefix(&["usr"]).unwrap_or(&parts);
    match parts {
        ["boot", file] => match file.strip_suffix(release)? {
            "vmlinuz-" => Some(store::IMAGE.into()),
            "config-" => Some("config".into()),
            _ => None,
        },
        ["lib", "modules", tree, rest @ ..] if *tree == release && !rest.is_empty() => {
            Some(Path::new(store::MODULES).join(rest.iter().collect::<PathBuf>()))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    const RELEASE: &str = "6.1.0-1-cloud-amd64";

    fn tar_of(files: &[(&str, &str)]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, content) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            // Straight into the field: the library refuses to write what an attacker would.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_cksum();
            tar.append(&header, content.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn xz(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn package(dir: &Path, member: &str, data: &[u8]) -> PathBuf {
        let mut ar = ar::Builder::new(Vec::new());
        ar.append(&ar::Header::new(b"debian-binary".to_vec(), 4), &b"2.0\n"[..]).unwrap();
        ar.append(&ar::Header::new(member.as_bytes().to_vec(), data.len() as u64), data).unwrap();
        let path = dir.join("k.deb");
        fs::write(&path, ar.into_inner().unwrap()).unwrap();
        path
    }

    fn files() -> Vec<u8> {
        let name = |dir: &str, file: &str| format!("./{dir}{RELEASE}{file}");
        tar_of(&[
            (&name("boot/vmlinuz-", ""), "kernel"),
            (&name("boot/config-", ""), "CONFIG=y"),
            (&name("boot/System.map-", ""), "map"),
            (&name("lib/modules/", "/kernel/fs/fuse/fuse.ko"), "module"),
            (&name("usr/lib/modules/", "/modules.builtin"), "builtin"),
            ("./lib/modules/other/kernel/x.ko", "other"),
            ("./usr/share/doc/x", "doc"),
            ("../../escape", "no"),
            (&format!("./lib/modules/{RELEASE}/../../../escape"), "no"),
        ])
    }

    #[test]
    fn only_what_a_guest_needs_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("a/b/c/to");
        let gz = {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(&files()).unwrap();
            encoder.finish().unwrap()
        };
        for (member, data) in [("data.tar", files()), ("data.tar.xz", xz(&files())), ("data.tar.gz", gz)] {
            fs::create_dir_all(&to).unwrap();
            unpack(&package(dir.path(), member, &data), RELEASE, &to).unwrap();
            let read = |file: &str| fs::read_to_string(to.join(file)).unwrap();
            assert_eq!(read("vmlinuz"), "kernel");
            assert_eq!(read("config"), "CONFIG=y");
            assert_eq!(read("modules/kernel/fs/fuse/fuse.ko"), "module");
            assert_eq!(read("modules/modules.builtin"), "builtin");
            assert_eq!(fs::read_dir(&to).unwrap().count(), 3);
            assert_eq!(fs::read_dir(dir.path().join("a")).unwrap().count(), 1);
            fs::remove_dir_all(&to).unwrap();
        }
    }

    #[test]
    fn damaged_packages_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("to");
        let compressed = xz(&files());
        for cut in [0, 1, 20, compressed.len() / 2, compressed.len() - 1] {
            let path = package(dir.path(), "data.tar.xz", &compressed[..cut]);
            assert!(matches!(unpack(&path, RELEASE, &to), Err(DebError::Read { .. })), "cut at {cut}");
        }
        let whole = fs::read(package(dir.path(), "data.tar.xz", &compressed)).unwrap();
        let path = dir.path().join("cut.deb");
        for cut in [0, 4, 60, 100, 140, whole.len() - 40] {
            fs::write(&path, &whole[..cut]).unwrap();
            assert!(unpack(&path, RELEASE, &to).is_err(), "cut at {cut}");
        }
        let path = package(dir.path(), "data.tar.arc", b"x");
        assert!(matches!(unpack(&path, RELEASE, &to), Err(DebError::Compression { .. })));
        let path = package(dir.path(), "control.tar", b"x");
        assert!(matches!(unpack(&path, RELEASE, &to), Err(DebError::NoData { .. })));
    }
}
