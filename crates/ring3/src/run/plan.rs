//! From the command line and the host to what the guest is told: command, environment, streams, kernel line.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use guest_init::spec::{Root, Spec, Stream};

use super::devices::Connected;
use super::spec::OpenDisk;
use super::{RunError, terminal};
use crate::cli::{Disk, EnvVar, Iommu, Link, RunArgs};
use crate::initramfs::{Module, ModuleTree};
use crate::kernel::{Kernel, image};

const GUEST_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Drivers without which no command runs.
const REQUIRED: [&str; 4] = ["virtio_pci", "virtio_console", "virtiofs", "overlay"];

/// The command line that every kernel gets. In millions of guest instructions for a boot up to the command, as
/// Debian's 6.1 and 6.12 cloud kernels take them under QEMU:
///
/// - `console=ttyS0 panic=-1`: messages on the serial port, reset at once on panic.
/// - `tsc=reliable no_timer_check random.trust_cpu=on mitigations=off`: nothing to calibrate, probe or distrust
///   in a machine made of software.
/// - `cryptomgr.notests`: no self-tests of the kernel's ciphers (880).
/// - `hpet=disable`: none is looked for or timed (150 where there is one).
/// - `init_on_alloc=0`: memory is not cleared a second time at allocation (35, and a cost ever after).
/// - `initcall_blacklist`: what is not done is
///   - `trace_eval_init`: resolving names of constants in the formats of trace events (35; 6.12: 115),
///   - `ftrace_check_for_weak_functions`: finding in advance which traceable functions are weak (75; 95),
///   - `jent_mod_init`: testing the timing-jitter random generator, which the processor's own replaces (6.12: 130).
///
/// Together with modules without signatures (180) that leaves 360 of 1700 for 6.1, not counting the local APIC
/// timer's calibration, which a TSC deadline timer makes unnecessary.
const KERNEL_LINE: &str = "console=ttyS0 panic=-1 tsc=reliable no_timer_check random.trust_cpu=on mitigations=off \
                           cryptomgr.notests hpet=disable init_on_alloc=0 \
                           initcall_blacklist=trace_eval_init,ftrace_check_for_weak_functions,jent_mod_init";

/// The kernel's command line.
#[must_use]
pub fn command_line(verbose: bool, iommu: Iommu, append: Option<&str>) -> String {
    let mut line = KERNEL_LINE.to_owned();
    if iommu == Iommu::Intel {
        // Debian's kernels have the driver, but use it only when they are told to.
        line.push_str(" intel_iommu=on iommu.passthrough=0");
    }
    if !verbose {
        line.push_str(" quiet");
    }
    if let Some(text) = append {
        line.push(' ');
        line.push_str(text);
    }
    line
}

/// What each of the command's streams is to be. A terminal only where ring3's standard input is one: otherwise
/// output to a terminal is plain bytes, which the host's terminal shows as it would any program's.
///
/// # Errors
/// [`RunError::Streams`] when a descriptor cannot be looked at.
pub fn streams(is_terminal: [bool; 3]) -> Result<[Stream; 3], RunError> {
    let [stdin, stdout, stderr] = is_terminal;
    let [in_file, out_file, err_file] = [identity(0)?, identity(1)?, identity(2)?];
    let plain = |file: File| if file.is_null { Stream::Null } else { Stream::Port };
    Ok([
        if stdin { Stream::Terminal } else { plain(in_file) },
        if stdin && stdout { Stream::Terminal } else { plain(out_file) },
        match plain(err_file) {
            _ if stdin && stderr => Stream::Terminal,
            // One open file: what is written through both descriptors must stay in order.
            Stream::Port if !(stdin && stdout) && err_file == out_file => Stream::Stdout,
            stream => stream,
        },
    ])
}

/// Which file a descriptor is.
#[derive(Clone, Copy, PartialEq, Eq)]
struct File {
    device: u64,
    inode: u64,
    is_null: bool,
}

fn identity(fd: u32) -> Result<File, RunError> {
    let about = fs::metadata(format!("/proc/self/fd/{fd}")).map_err(RunError::Streams)?;
    let is_null = about.file_type().is_char_device() && about.rdev() == rustix::fs::makedev(1, 3);
    Ok(File { device: about.dev(), inode: about.ino(), is_null })
}

/// The job description for the guest's first process, without its modules and its network.
///
/// # Errors
/// [`RunError::BadRoot`], [`RunError::BadWorkdir`].
pub fn guest_spec(args: &RunArgs, kernel: &Kernel, streams: [Stream; 3]) -> Result<Spec, RunError> {
    let root = checked_root(&args.root)?;
    let (workdir, workdir_required) = match &args.workdir {
        Some(dir) => (checked_workdir(&root, dir)?, true),
        None => (default_workdir(&root), false),
    };
    let shell = env::var_os("SHELL")
        .filter(|shell| shell.as_bytes().starts_with(b"/") && in_root(&root, Path::new(shell)).exists());
    let shell = shell.unwrap_or_else(|| "/bin/sh".into());
    let argv = if args.command.is_empty() { vec![shell.clone()] } else { args.command.clone() };
    let has_terminal = streams.contains(&Stream::Terminal);
    Ok(Spec {
        argv,
        env: environment(&shell, has_terminal, &args.env, env::vars_os()),
        workdir,
        workdir_required,
        streams,
        winsize: if has_terminal { terminal::size() } else { None },
        hostname: "ring3".into(),
        network: None,
        root: Root::Virtiofs,
        modules: Vec::new(),
        module_tree: kernel.modules.as_deref().and_then(|tree| path_in_guest(&root, tree)),
    })
}

/// The command's environment: a login's variables, what describes the user's terminal and language, and what the
/// user asked for.
fn environment(
    shell: &OsStr,
    has_terminal: bool,
    asked: &[EnvVar],
    ours: impl Iterator<Item = (OsString, OsString)>,
) -> Vec<(OsString, OsString)> {
    let ours: Vec<_> = ours.collect();
    let mut env: Vec<(OsString, OsString)> = Vec::new();
    let mut set = |name: &OsStr, value: &OsStr| match env.iter_mut().find(|(n, _)| n == name) {
        Some((_, old)) => *old = value.to_owned(),
        None => env.push((name.to_owned(), value.to_owned())),
    };
    for (name, value) in [("PATH", GUEST_PATH), ("HOME", "/root"), ("USER", "root"), ("LOGNAME", "root")] {
        set(name.as_ref(), value.as_ref());
    }
    set("SHELL".as_ref(), shell);
    for (name, value) in &ours {
        let bytes = name.as_bytes();
        let wanted = matches!(bytes, b"LANG" | b"LANGUAGE" | b"TZ") || bytes.starts_with(b"LC_");
        if wanted || (has_terminal && matches!(bytes, b"TERM" | b"COLORTERM")) {
            set(name, value);
        }
    }
    for (name, value) in asked {
        let value = value.as_ref().or_else(|| ours.iter().find(|(n, _)| n == name).map(|(_, value)| value));
        if let Some(value) = value {
            set(name, value);
        }
    }
    env
}

/// The canonical form of the root directory, which must be a readable directory.
///
/// # Errors
/// [`RunError::BadRoot`].
pub fn checked_root(root: &Path) -> Result<PathBuf, RunError> {
    let bad = |source| RunError::BadRoot { path: root.to_owned(), source };
    let root = fs::canonicalize(root).map_err(bad)?;
    fs::read_dir(&root).map_err(bad)?;
    Ok(root)
}

/// Where a guest's absolute path lies on the host.
fn in_root(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// How the guest sees a path of the host, if it does.
fn path_in_guest(root: &Path, path: &Path) -> Option<PathBuf> {
    let path = fs::canonicalize(path).ok()?;
    Some(Path::new("/").join(path.strip_prefix(root).ok()?))
}

fn default_workdir(root: &Path) -> PathBuf {
    env::current_dir().ok().and_then(|dir| path_in_guest(root, &dir)).unwrap_or_else(|| "/".into())
}

fn checked_workdir(root: &Path, dir: &Path) -> Result<PathBuf, RunError> {
    let bad = || RunError::BadWorkdir { path: dir.to_owned(), root: root.to_owned() };
    // A link may be absolute, which means another place in the guest than here: only the guest can follow it.
    let absolute = if dir.is_absolute() { dir.to_owned() } else { default_workdir(root).join(dir) };
    let there = fs::symlink_metadata(in_root(root, &absolute)).map_err(|_| bad())?;
    if there.is_dir() || there.is_symlink() { Ok(absolute) } else { Err(bad()) }
}

/// Opens the disks, and checks what can be checked about them before the guest starts.
///
/// # Errors
/// [`RunError::BadDisk`].
pub fn open_disks(disks: &[Disk]) -> Result<Vec<OpenDisk>, RunError> {
    let open = |disk: &Disk| {
        let bad = |source| RunError::BadDisk { path: disk.path.clone(), source };
        let refuse = |why: String| Err(bad(std::io::Error::other(why)));
        let file = fs::File::options().read(true).write(!disk.readonly).open(&disk.path).map_err(bad)?;
        let about = file.metadata().map_err(bad)?;
        if !about.is_file() && !about.file_type().is_block_device() {
            return refuse("it is neither a file nor a block device".into());
        }
        if about.is_file() && (about.len() == 0 || about.len() % 512 != 0) {
            return refuse(format!("its size, {} bytes, is not a multiple of 512 above 0", about.len()));
        }
        Ok(OpenDisk { path: disk.path.clone(), readonly: disk.readonly, file })
    };
    disks.iter().map(open).collect()
}

/// Drivers of devices that not every guest has: those that the guest needs, and those that it is given where the
/// kernel has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Drivers<'a> {
    /// Needed before the others: what they are behind.
    pub first: Vec<&'a str>,
    /// Needed.
    pub required: Vec<&'a str>,
    /// Welcome.
    pub optional: Vec<&'a str>,
}

/// The drivers for what the options ask for. A network that the user did not ask for is given up with a kernel that
/// does not know it.
#[must_use]
pub fn drivers<'a>(args: &'a RunArgs, devices: &[Connected]) -> Drivers<'a> {
    const BLOCK: &str = "virtio_blk";
    const NET: &str = "virtio_net";
    let has_disks = !args.disks.is_empty();
    let (required, optional): (&[_], &[_]) = match (&args.net, args.publish.is_empty()) {
        (Some(Link::None), _) if has_disks => (&[BLOCK], &[]),
        (Some(Link::None), _) => (&[], &[BLOCK]),
        (None, true) if has_disks => (&[BLOCK], &[NET]),
        (None, true) => (&[], &[BLOCK, NET]),
        _ if has_disks => (&[BLOCK, NET], &[]),
        _ => (&[NET], &[BLOCK]),
    };
    let first = match args.iommu {
        Iommu::None | Iommu::Intel => vec![],
        Iommu::Virtio => vec!["virtio_iommu"],
    };
    let named = args.modules.iter().map(String::as_str);
    let needed = devices.iter().filter_map(|device| device.driver()).chain(named);
    Drivers { first, required: required.iter().copied().chain(needed).collect(), optional: optional.to_vec() }
}

/// The modules that the guest's first process is to load.
///
/// # Errors
/// [`RunError::Modules`] when the kernel lacks a driver, [`RunError::NoModules`] when nothing tells that it has
/// them.
pub fn modules(
    kernel: &Kernel,
    bytes: &[u8],
    drivers: &Drivers<'_>,
    command_line: &str,
) -> Result<Vec<Module>, RunError> {
    let required = [&drivers.first[..], &REQUIRED[..], &drivers.required].concat();
    let optional = [&["virtio_rng", "pvpanic_mmio"][..], &drivers.optional].concat();
    if let Some(dir) = &kernel.modules {
        let mut modules = ModuleTree::open(dir)?.load(&required, &optional)?;
        if !wants_signatures(kernel, command_line) {
            modules.iter_mut().for_each(Module::strip_signature);
        }
        return Ok(modules);
    }
    // Without modules the drivers must be built in, which an uncompressed kernel shows by their names.
    let is_elf = image::identify(&kernel.image, bytes).is_ok_and(|identity| identity.elf);
    match required
        .iter()
        .find(|name| is_elf && !image::mentions(bytes, &name.replace("virtio_pci", "virtio-pci")))
    {
        Some(name) => Err(RunError::NoModules { kernel: kernel.image.clone(), driver: (*name).into() }),
        None => Ok(Vec::new()),
    }
}

/// A driver that is never a module is built in, as far as the kernel's configuration is known.
///
/// # Errors
/// [`RunError::NotConfigured`] when it is not.
pub fn check_iommu(kernel: &Kernel, iommu: Iommu) -> Result<(), RunError> {
    const OPTION: &str = "CONFIG_INTEL_IOMMU";
    let config = configuration(kernel);
    let has = config.lines().any(|line| line.strip_prefix(OPTION) == Some("=y"));
    if iommu != Iommu::Intel || config.is_empty() || has {
        return Ok(());
    }
    Err(RunError::NotConfigured { kernel: kernel.image.clone(), option: OPTION, wanted_by: "--iommu intel" })
}

/// The kernel's configuration, if it is kept beside the kernel; else nothing.
fn configuration(kernel: &Kernel) -> String {
    let beside = |name: &str| kernel.image.parent().map(|dir| dir.join(name));
    [beside("config"), beside(&format!("config-{}", kernel.release))]
        .into_iter()
        .flatten()
        .find_map(|path| fs::read_to_string(path).ok())
        .unwrap_or_default()
}

/// Whether this kernel refuses unsigned modules, by its configuration or its command line.
fn wants_signatures(kernel: &Kernel, command_line: &str) -> bool {
    let config = configuration(kernel);
    let forced = ["CONFIG_MODULE_SIG_FORCE=y", "CONFIG_LOCK_DOWN_KERNEL_FORCE_INTEGRITY=y"];
    config.lines().any(|line| forced.contains(&line))
        || command_line.contains("sig_enforce")
        || command_line.contains("lockdown=")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn os(pairs: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
        pairs.iter().map(|(k, v)| (k.into(), v.into())).collect()
    }

    #[test]
    fn the_environment_is_a_logins_plus_what_was_asked_for() {
        let ours =
            os(&[("HOME", "/home/u"), ("LC_ALL", "C"), ("TERM", "xterm"), ("SECRET", "s"), ("X", "1")]);
        let asked = [("X".into(), None), ("HOME".into(), Some("/h".into())), ("GONE".into(), None)];
        let env = environment("/bin/sh".as_ref(), false, &asked, ours.clone().into_iter());
        let get = |env: &[(OsString, OsString)], name: &str| {
            env.iter().find(|(n, _)| n == name).map(|(_, v)| v.to_str().unwrap().to_owned())
        };
        assert_eq!(get(&env, "HOME").unwrap(), "/h");
        assert_eq!(get(&env, "X").unwrap(), "1");
        assert_eq!(get(&env, "LC_ALL").unwrap(), "C");
        assert_eq!(get(&env, "SHELL").unwrap(), "/bin/sh");
        for name in ["SECRET", "TERM", "GONE"] {
            assert_eq!(get(&env, name), None, "{name}");
        }
        let env = environment("/bin/sh".as_ref(), true, &[], ours.into_iter());
        assert_eq!(get(&env, "TERM").unwrap(), "xterm");
        assert_eq!(get(&env, "HOME").unwrap(), "/root");
    }

    #[test]
    fn paths_are_seen_from_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(dir.path()).unwrap();
        fs::create_dir(root.join("sub")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        assert_eq!(path_in_guest(&root, &root.join("sub")), Some("/sub".into()));
        assert_eq!(path_in_guest(&root.join("sub"), &root), None);
        assert_eq!(path_in_guest(Path::new("/"), &root.join("sub")), Some(root.join("sub")));
        assert_eq!(checked_workdir(&root, Path::new("/sub")).unwrap(), Path::new("/sub"));
        assert!(checked_workdir(&root, Path::new("/file")).is_err());
        assert!(checked_workdir(&root, Path::new("/none")).is_err());
        assert!(checked_root(&root.join("file")).is_err());
        assert!(checked_root(&root.join("none")).is_err());
    }

    #[test]
    fn bad_disks_are_found_before_the_guest_starts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let check = |readonly| open_disks(&[Disk { path: path.clone(), readonly }]);
        assert!(check(true).is_err());
        fs::write(&path, [0; 700]).unwrap();
        let error = check(true).unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("700 bytes"));
        fs::write(&path, [0; 1024]).unwrap();
        assert!(check(true).is_ok() && check(false).is_ok());
        assert!(open_disks(&[Disk { path: dir.path().into(), readonly: true }]).is_err());
    }

    #[test]
    fn a_bare_kernel_must_have_its_drivers_built_in() {
        let kernel = Kernel {
            release: String::new(),
            image: "vmlinux".into(),
            modules: None,
            source: crate::kernel::Source::File,
        };
        let plain = Drivers { first: vec![], required: vec![], optional: vec![] };
        let error = modules(&kernel, b"\x7fELF virtio-pci virtio_console", &plain, "").unwrap_err();
        assert!(matches!(error, RunError::NoModules { driver, .. } if driver == "virtiofs"));
        assert!(
            modules(&kernel, b"\x7fELF virtio-pci virtio_console virtiofs overlay", &plain, "")
                .unwrap()
                .is_empty()
        );
        let network = Drivers { first: vec![], required: vec!["virtio_net"], optional: vec![] };
        let error = modules(&kernel, b"\x7fELF virtio-pci virtio_console virtiofs overlay", &network, "")
            .unwrap_err();
        assert!(matches!(error, RunError::NoModules { driver, .. } if driver == "virtio_net"));
    }

    #[test]
    fn a_kernel_must_have_the_driver_of_the_iommu() {
        let dir = tempfile::tempdir().unwrap();
        let kernel = Kernel {
            release: "1".into(),
            image: dir.path().join("vmlinuz"),
            modules: None,
            source: crate::kernel::Source::File,
        };
        let check = |config: &str| {
            fs::write(dir.path().join("config-1"), config).unwrap();
            check_iommu(&kernel, Iommu::Intel)
        };
        assert!(check("CONFIG_INTEL_IOMMU=y\n").is_ok() && check("").is_ok());
        let error = check("# CONFIG_INTEL_IOMMU is not set\nCONFIG_INTEL_IOMMU_SVM=y\n").unwrap_err();
        assert!(error.to_string().contains("vmlinuz has no CONFIG_INTEL_IOMMU"), "{error}");
        assert!(check_iommu(&kernel, Iommu::None).is_ok());
    }

    #[test]
    fn the_users_text_ends_the_kernel_line() {
        assert!(command_line(false, Iommu::Intel, Some("a=b")).ends_with("=0 quiet a=b"));
        assert!(command_line(false, Iommu::None, Some("a=b")).ends_with(" quiet a=b"));
        assert!(!command_line(true, Iommu::None, None).contains("quiet"));
    }
}
