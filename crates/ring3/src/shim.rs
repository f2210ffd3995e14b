//! `ring3 shim`: runs a program with a library before libc that serves `/dev/iommu` and VFIO devices (crate `shim`).
//!
//! The library is part of ring3 and has to be a file for the loader, at a path that lasts: the program's children load it too,
//! long after ring3 has become the program. So it is kept in the user's cache, under a name of its contents, and where there is
//! no cache in a directory of the user's own below the one for temporary files. Those of other versions of ring3 go when they have not
//! been used for a month.

mod tree;

use std::convert::Infallible;
use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use object::elf::{EM_X86_64, FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader, ProgramHeader};

use crate::cli::ShimArgs;

/// The library, built by this crate's build script.
pub static LIBRARY: &[u8] = include_bytes!(env!("RING3_SHIM_LIBRARY"));

/// The variable by which the library knows what to serve.
const VARIABLE: &str = "RING3_SHIM";

/// After what time nobody is taken to run with a library any more: programs that run load it for each program that they start.
const UNUSED: Duration = Duration::from_secs(30 * 24 * 3600);

/// The program could not be started with the library.
#[derive(Debug, thiserror::Error)]
pub enum ShimError {
    /// There is no such program.
    #[error("cannot find {}{}", .0.display(), if .0.as_bytes().contains(&b'/') { "" } else { " in PATH" })]
    NotFound(OsString),
    /// It is a program that the loader does not load.
    #[error("{} is {what}: no library can be loaded before it. Run it without ring3 shim", program.display())]
    CannotLoad {
        /// The program.
        program: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The library has no place.
    #[error(
        "cannot keep ring3's library in any of {tried}; set XDG_CACHE_HOME or TMPDIR to a directory that can be written to, without spaces and colons in its name"
    )]
    NoPlace {
        /// The directories.
        tried: String,
        /// Why the last failed.
        source: io::Error,
    },
    /// A device's specification has a line break, which would be another item of the variable.
    #[error("--device {0:?}: a specification is one line")]
    Specification(String),
    /// The kernel did not execute the program.
    #[error("cannot execute {}", program.display())]
    Execute {
        /// The program.
        program: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl ShimError {
    /// The exit status, as shells have it for what they cannot run.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::NotFound(_) => 127,
            Self::CannotLoad { .. } | Self::Execute { .. } => 126,
            Self::NoPlace { .. } | Self::Specification(_) => 125,
        }
    }
}

/// Becomes the program.
///
/// # Errors
/// [`ShimError`]; when there is none, this does not return.
pub fn exec(args: &ShimArgs) -> Result<Infallible, ShimError> {
    let Some((name, arguments)) = args.command.split_first() else {
        return Err(ShimError::NotFound(OsString::new()));
    };
    let mut configuration = configuration(args)?;
    let program = find(name).ok_or_else(|| ShimError::NotFound(name.clone()))?;
    if let Some(what) = obstacle(&program) {
        return Err(ShimError::CannotLoad { program, what });
    }
    let library = keep(&places())?;
    let mut preload = library.into_os_string();
    if let Some(others) = env::var_os("LD_PRELOAD").filter(|others| !others.is_empty()) {
        preload.push(":");
        preload.push(others);
    }
    // Without either there are no such files.
    if args.mock_iommu || !args.devices.is_empty() {
        configuration.push('\n');
        configuration.push_str(&tree());
    }
    let source = Command::new(&program)
        .arg0(name)
        .args(arguments)
        .env("LD_PRELOAD", preload)
        .env(VARIABLE, configuration)
        .exec();
    Err(ShimError::Execute { program, source })
}

/// What the library is told, one item a line.
fn configuration(args: &ShimArgs) -> Result<String, ShimError> {
    let mut lines = Vec::new();
    if args.mock_iommu {
        lines.push("mock-iommu".to_owned());
    }
    for device in &args.devices {
        if device.contains('\n') {
            return Err(ShimError::Specification(device.clone()));
        }
        lines.push(format!("device={device}"));
    }
    Ok(lines.join("\n"))
}

/// Where the library keeps the files of sysfs that it serves, for the program and all that it starts: a new name, in a directory
/// without those that earlier programs have left. The program has our process ID.
fn tree() -> String {
    let above = env::temp_dir();
    let above = above.canonicalize().unwrap_or(above);
    tree::sweep(&above);
    format!("tree={} {}", std::process::id(), above.join(tree::name()).display())
}

/// The program's file: as a shell finds it.
fn find(name: &OsStr) -> Option<PathBuf> {
    if name.as_bytes().contains(&b'/') {
        return Some(PathBuf::from(name)).filter(|file| file.exists());
    }
    let path = env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into());
    env::split_paths(&path).map(|directory| directory.join(name)).find(|file| is_executable(file))
}

fn is_executable(file: &Path) -> bool {
    fs::metadata(file).is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
}

/// Why the loader would not load the library before `program`, if so. What cannot be read is left to the kernel.
fn obstacle(program: &Path) -> Option<&'static str> {
    let about = fs::metadata(program).ok()?;
    let mode = about.permissions().mode();
    let changes_user = mode & 0o4000 != 0 && about.uid() != rustix::process::geteuid().as_raw();
    let changes_group = mode & 0o2000 != 0 && about.gid() != rustix::process::getegid().as_raw();
    if changes_user || changes_group {
        return Some("a setuid or setgid program");
    }
    // Root has them anyway.
    let capabilities = rustix::fs::getxattr(program, "security.capability", &mut [0_u8; 32][..]);
    if capabilities.is_ok() && !rustix::process::geteuid().is_root() {
        return Some("a program with capabilities of its own (setcap)");
    }
    let mut start = Vec::new();
    fs::File::open(program).ok()?.take(64 << 10).read_to_end(&mut start).ok()?;
    if let Some(line) = start.strip_prefix(b"#!") {
        let interpreter = line.split(|byte| *byte == b'\n').next()?.trim_ascii();
        let interpreter = interpreter.split(u8::is_ascii_whitespace).next()?;
        // An interpreter that is a script again is left to the kernel.
        let interpreter = Path::new(OsStr::from_bytes(interpreter));
        let script = fs::read(interpreter).is_ok_and(|text| text.starts_with(b"#!"));
        return if script { None } else { obstacle(interpreter) };
    }
    elf_obstacle(&start)
}

/// The same for the beginning of an ELF file.
fn elf_obstacle(start: &[u8]) -> Option<&'static str> {
    if !start.starts_with(b"\x7fELF") {
        return None;
    }
    let other = Some("a program for another processor");
    let Ok(header) = FileHeader64::<object::LittleEndian>::parse(start) else { return other };
    let endian = object::LittleEndian;
    if header.e_machine(endian) != EM_X86_64 {
        return other;
    }
    let segments = header.program_headers(endian, start).ok()?;
    let Some(loader) = segments.iter().find(|segment| segment.p_type(endian) == PT_INTERP) else {
        return Some("statically linked");
    };
    // The library is one of glibc's world.
    let musl = loader.data(endian, start).is_ok_and(|name| name.windows(8).any(|part| part == b"/ld-musl"));
    musl.then_some("linked with musl, and ring3's library with glibc")
}

/// Where the library may be kept, the best first.
fn places() -> Vec<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    let user = rustix::process::geteuid().as_raw();
    let own = env::temp_dir().join(format!("ring3-{user}"));
    cache.map(|cache| cache.join("ring3")).into_iter().chain([own]).collect()
}

/// Keeps the library in the first of `places` that can have it: its path.
fn keep(places: &[PathBuf]) -> Result<PathBuf, ShimError> {
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for place in places {
        match keep_in(place) {
            Ok(file) => return Ok(file),
            Err(error) => last = error,
        }
    }
    let tried: Vec<_> = places.iter().map(|place| place.display().to_string()).collect();
    Err(ShimError::NoPlace { tried: tried.join(" and "), source: last })
}

fn keep_in(place: &Path) -> io::Result<PathBuf> {
    // The loader takes both for the end of a name.
    if place.as_os_str().as_bytes().iter().any(|byte| b": ".contains(byte)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "there is a space or a colon in its name"));
    }
    fs::DirBuilder::new().recursive(true).mode(0o700).create(place)?;
    let about = fs::symlink_metadata(place)?;
    if !about.is_dir() || about.uid() != rustix::process::geteuid().as_raw() || about.mode() & 0o022 != 0 {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, "others can write to it"));
    }
    let mut hasher = DefaultHasher::new();
    LIBRARY.hash(&mut hasher);
    let file = place.join(format!("shim-{:016x}.so", hasher.finish()));
    if fs::read(&file).is_ok_and(|there| there == LIBRARY) {
        // Whoever cleans up sees that it is used; where that cannot be said, it is made again.
        let _ = fs::File::options()
            .append(true)
            .open(&file)
            .and_then(|file| file.set_modified(SystemTime::now()));
        return Ok(file);
    }
    remove_unused(place);
    let mut new = tempfile::NamedTempFile::new_in(place)?;
    io::Write::write_all(&mut new, LIBRARY)?;
    new.persist(&file).map_err(|error| error.error)?;
    Ok(file)
}

/// Removes libraries that nobody has started a program with lately.
fn remove_unused(place: &Path) {
    for entry in fs::read_dir(place).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let is_library = name.as_bytes().starts_with(b"shim-") && name.as_bytes().ends_with(b".so");
        let used = entry.metadata().and_then(|about| about.modified());
        let unused = used.is_ok_and(|used| used.elapsed().is_ok_and(|since| since > UNUSED));
        if is_library && unused {
            // One that cannot be removed is in nobody's way.
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_kept_once_and_mended() {
        let place = tempfile::tempdir().unwrap();
        let first = keep(&[place.path().to_owned()]).unwrap();
        assert_eq!(fs::read(&first).unwrap(), LIBRARY);
        fs::write(&first, b"something else").unwrap();
        assert_eq!(keep(&[place.path().to_owned()]).unwrap(), first);
        assert_eq!(fs::read(&first).unwrap(), LIBRARY);
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1);
    }

    #[test]
    fn libraries_of_other_versions_go_when_they_are_not_used() {
        let place = tempfile::tempdir().unwrap();
        let old = SystemTime::now() - 2 * UNUSED;
        for (name, used) in [("shim-1.so", old), ("shim-2.so", SystemTime::now()), ("other.so", old)] {
            fs::File::create(place.path().join(name)).unwrap().set_modified(used).unwrap();
        }
        let library = keep(&[place.path().to_owned()]).unwrap();
        let there = |name: &str| place.path().join(name).exists();
        assert_eq!(["shim-1.so", "shim-2.so", "other.so"].map(there), [false, true, true]);
        // Using one says so.
        fs::File::options().append(true).open(&library).unwrap().set_modified(old).unwrap();
        keep(&[place.path().to_owned()]).unwrap();
        assert!(fs::metadata(&library).unwrap().modified().unwrap() > old);
    }

    #[test]
    fn a_place_that_others_can_write_to_is_passed_over() {
        let (open, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::set_permissions(open.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let file = keep(&[open.path().to_owned(), own.path().to_owned()]).unwrap();
        assert!(file.starts_with(own.path()));
        let error = keep(&[open.path().to_owned()]).unwrap_err();
        assert!(matches!(error, ShimError::NoPlace { .. }), "{error}");
    }

    #[test]
    fn a_place_that_the_loader_cannot_name_is_passed_over() {
        let place = tempfile::tempdir().unwrap();
        let spaced = place.path().join("a b");
        assert!(keep(&[spaced]).is_err());
    }

    #[test]
    fn programs_that_no_library_can_be_loaded_before() {
        // As it is when it was read: headers are found where they are aligned.
        let guest_init = crate::initramfs::GUEST_INIT.to_vec();
        assert_eq!(elf_obstacle(&guest_init), Some("statically linked"));
        assert_eq!(elf_obstacle(&fs::read(env::current_exe().unwrap()).unwrap()), None);
        assert_eq!(elf_obstacle(b"\x7fELF\x01\x01\x01"), Some("a program for another processor"));
        assert_eq!(elf_obstacle(b"echo hello"), None);
    }

    #[test]
    fn the_library_is_told_one_thing_a_line() {
        let args = |devices: &[&str]| ShimArgs {
            mock_iommu: true,
            devices: devices.iter().map(|&device| device.to_owned()).collect(),
            command: Vec::new(),
        };
        assert_eq!(
            configuration(&args(&["test", "nvme,file=a"])).unwrap(),
            "mock-iommu\ndevice=test\ndevice=nvme,file=a"
        );
        assert!(configuration(&args(&["a\nb"])).is_err());
    }
}
