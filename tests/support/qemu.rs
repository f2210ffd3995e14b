//! QEMU guests, translated by TCG: Debian's kernel, busybox, and a script.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use ring3::initramfs::cpio::Archive;
use ring3::initramfs::modules::ModuleTree;

use super::kernels::kernels;
use super::process;

/// Room for a slow mirror.
const FETCH: Duration = Duration::from_secs(600);

/// What the guests are made of.
pub struct Guests {
    kernel: PathBuf,
    busybox: Vec<u8>,
    modules: Vec<(String, Vec<u8>)>,
    /// More of the kernel's command line.
    words: &'static str,
}

/// What the guests are made of, or none after having said aloud why.
pub fn guests() -> Option<&'static Guests> {
    static GUESTS: OnceLock<Result<Guests, String>> = OnceLock::new();
    let kernels = kernels()?;
    match GUESTS.get_or_init(|| Guests::of(kernels.older(), &["virtio_pci", "virtio_net"], "")) {
        Ok(guests) => Some(guests),
        Err(why) => {
            super::skip(why);
            None
        }
    }
}

/// A program without what is for debuggers, and the libraries that ldd(1) finds for it: names in the guest, files here.
fn stripped(dir: &Path, program: &Path) -> Vec<(String, PathBuf)> {
    let small = dir.join("stripped");
    let made = Command::new("strip").arg("-o").arg(&small).arg(program).status();
    let file = if made.is_ok_and(|status| status.success()) { small } else { program.to_owned() };
    let listed = Command::new("ldd").arg(program).output().unwrap();
    let libraries = String::from_utf8(listed.stdout).unwrap();
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    let libraries = libraries.map(|path| (path.to_owned(), path.into()));
    let name = format!("/bin/{}", program.file_name().unwrap().display());
    libraries.chain([(name, file)]).collect()
}

/// A QEMU of Debian's next release, which is unpacked beside the tests; or none after having said aloud why.
pub fn next() -> Option<Command> {
    static ROOT: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    let root = ROOT.get_or_init(|| {
        let root = super::scratch().join("qemu-next");
        let mut fetch = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../benches/peers/fetch.sh"));
        fetch.arg(&root).args(["forky", "qemu-system-x86"]);
        let done = process::finish(fetch, FETCH);
        if done.code == Some(0) { Ok(root) } else { Err(format!("no newer QEMU: {}", done.stderr.trim())) }
    });
    match root {
        Ok(root) => {
            // Its libraries are newer than the system's: it runs by its own loader.
            let mut qemu = Command::new(root.join("usr/lib64/ld-linux-x86-64.so.2"));
            let libraries = root.join("usr/lib/x86_64-linux-gnu");
            qemu.arg("--library-path").arg(&libraries).arg(root.join("usr/bin/qemu-system-x86_64"));
            for data in ["qemu", "seabios"] {
                qemu.arg("-L").arg(root.join("usr/share").join(data));
            }
            Some(qemu)
        }
        Err(why) => {
            super::skip(why);
            None
        }
    }
}

/// What every guest's script begins with.
const BEGINNING: &str = "#!/bin/busybox sh
busybox mkdir -p /proc /sys /dev /tmp /etc
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
busybox mkdir -p /sbin /usr/bin /usr/sbin
busybox --install -s
for module in $(cat /modules/order); do insmod /modules/$module; done
ip link set lo up
ip link set eth0 up
";

/// What udhcpc calls.
const LEASE: &str = "#!/bin/busybox sh
[ \"$1\" = bound ] || exit 0
ip link set eth0 mtu ${mtu:-1500}
ip address add $ip/$mask dev eth0
ip route add default via $router dev eth0
echo \"LEASE $ip/$mask via $router mtu $mtu dns $dns\"
";

impl Guests {
    /// Guests with a kernel that has these drivers, and more words on its command line. A kernel that lies alone has no
    /// modules.
    pub fn of(kernel: &Path, modules: &[&str], words: &'static str) -> Result<Self, String> {
        let mut version = Command::new("qemu-system-x86_64");
        version.arg("--version").stdout(std::process::Stdio::null());
        version.status().map_err(|error| format!("no qemu-system-x86_64: {error}"))?;
        let busybox =
            ["/bin/busybox", "/usr/bin/busybox"].into_iter().find_map(|path| std::fs::read(path).ok());
        let busybox = busybox.ok_or("no busybox")?;
        // An interpreter is named near the beginning of a program that is not linked statically.
        if busybox
            .iter()
            .take(4096)
            .copied()
            .collect::<Vec<_>>()
            .windows(9)
            .any(|bytes| bytes == b"/ld-linux")
        {
            return Err("busybox is not a static one (package busybox-static)".into());
        }
        let tree = kernel.parent().ok_or("a kernel in no directory")?.join("modules");
        let modules = if modules.is_empty() {
            Vec::new()
        } else {
            let found = ModuleTree::open(&tree).and_then(|tree| tree.load(modules, &[]));
            found.map_err(|error| error.to_string())?
        };
        let modules = modules.into_iter().map(|module| (module.file_name(), module.bytes)).collect();
        Ok(Self { kernel: kernel.to_owned(), busybox, modules, words })
    }

    /// A guest that runs a script (of busybox's shell) with its network card, `eth0`, up; `udhcpc -s /lease` configures it.
    /// What the script prints is the command's standard output. The initramfs goes into `dir`.
    pub fn command(&self, dir: &Path, script: &str) -> Command {
        self.command_with(dir, script, &[])
    }

    /// The same, with programs of the host's and the libraries that they need, where these are on the host.
    pub fn command_with(&self, dir: &Path, script: &str, programs: &[&Path]) -> Command {
        self.command_with_files(dir, script, programs, &[])
    }

    /// The same, with other files of the host's as well: their names in the guest, and where they are.
    pub fn command_with_files(
        &self,
        dir: &Path,
        script: &str,
        programs: &[&Path],
        files: &[(String, PathBuf)],
    ) -> Command {
        self.booted_by(Command::new("qemu-system-x86_64"), dir, script, programs, files)
    }

    /// The same under another QEMU.
    pub fn command_of(&self, qemu: Command, dir: &Path, script: &str) -> Command {
        self.booted_by(qemu, dir, script, &[], &[])
    }

    fn booted_by(
        &self,
        mut qemu: Command,
        dir: &Path,
        script: &str,
        programs: &[&Path],
        files: &[(String, PathBuf)],
    ) -> Command {
        let mut archive = Archive::new();
        for file in programs.iter().flat_map(|program| stripped(dir, program)) {
            let (name, path) = file;
            archive.file(name, 0o755, &std::fs::read(path).unwrap());
        }
        for (name, path) in files {
            archive.file(name, 0o644, &std::fs::read(path).unwrap());
        }
        archive.character_device("/dev/console", 0o600, 5, 1);
        archive.file("/bin/busybox", 0o755, &self.busybox);
        let init = format!("{BEGINNING}{script}\npoweroff -f\n");
        archive.file("/init", 0o755, init.as_bytes());
        archive.file("/lease", 0o755, LEASE.as_bytes());
        let mut order = String::new();
        for (name, bytes) in &self.modules {
            archive.file(format!("/modules/{name}"), 0o644, bytes);
            order = format!("{order} {name}");
        }
        archive.file("/modules/order", 0o644, order.as_bytes());
        let initramfs = super::write(dir, "initramfs", &archive.finish());
        qemu.args(["-accel", "tcg", "-cpu", "max", "-m", "256M", "-nodefaults", "-no-user-config"])
            .args(["-display", "none", "-serial", "stdio", "-no-reboot", "-kernel"])
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(initramfs)
            .arg("-append")
            .arg(format!("console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on {}", self.words));
        qemu.stdin(std::process::Stdio::null());
        process::as_other_user(&mut qemu);
        qemu
    }
}
