//! What a guest has for files: the host's under an overlay, another root, disks, kernel modules, programs of
//! 32 bits.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use iced_x86::code_asm::*;
use support::kernels::kernels;
use support::process::{boot, run};
use support::{give, skip, temp_dir, write};

/// Everything about a directory that a writer could change, but for access times.
fn snapshot(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let about = fs::symlink_metadata(&path).unwrap();
        let content = match (about.is_dir(), about.is_symlink()) {
            (true, _) => {
                left.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
                String::new()
            }
            (_, true) => fs::read_link(&path).unwrap().display().to_string(),
            _ => String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned(),
        };
        let (mode, owner, modified) = (about.mode(), about.uid(), about.modified().unwrap());
        found.push(format!("{} {mode:o} {owner} {modified:?} {content}", path.display()));
    }
    found.sort();
    found
}

/// The programs are the host's: without them on the host a test has nothing to run.
fn lacking(programs: &[&str]) -> bool {
    let missing: Vec<_> = programs
        .iter()
        .filter(|name| {
            !["/sbin", "/usr/sbin", "/bin", "/usr/bin"].iter().any(|dir| Path::new(dir).join(name).exists())
        })
        .collect();
    if !missing.is_empty() {
        skip(&format!("the host has no {missing:?}"));
    }
    !missing.is_empty()
}

#[test]
fn what_the_command_does_to_files_stays_in_the_guest() {
    let Some(kernels) = kernels() else { return };
    let dir = temp_dir();
    write(dir.path(), "keep", b"kept\n");
    write(dir.path(), "gone", b"gone\n");
    write(dir.path(), "renamed", b"renamed\n");
    fs::create_dir(dir.path().join("sub")).unwrap();
    give(&dir.path().join("sub"));
    write(&dir.path().join("sub"), "deep", b"deep\n");
    std::os::unix::fs::symlink("keep", dir.path().join("link")).unwrap();
    let before = snapshot(dir.path());
    let job = "
        set -e
        cat keep link
        echo more >>keep; rm gone; mv renamed new; rm -r sub; mkdir sub; echo fresh >sub/fresh
        chmod 700 link; ln -sf new link; touch -d 2001-01-01 keep
        dd if=/dev/zero of=big bs=1M count=20 2>/dev/null
        echo nonsense >/etc/passwd; rm /bin/true; mkdir /made-by-the-guest
        ls; cat keep link sub/fresh; stat -c %s big
        test ! -e /bin/true; test -d /made-by-the-guest
        echo note >/run/note; echo note >/dev/shm/note
        test \"$(id -u)\" = 0; hostname";
    let end = boot(run(kernels.newer(), &["--workdir", dir.path().to_str().unwrap()], &["sh", "-c", job]));
    end.expect(0);
    let expected = "kept\nkept\nbig\nkeep\nlink\nnew\nsub\nkept\nmore\nrenamed\nfresh\n20971520\nring3\n";
    assert_eq!(end.text(), expected);
    assert_eq!(end.stderr, "");
    assert_eq!(snapshot(dir.path()), before);
    assert!(!Path::new("/made-by-the-guest").exists() && Path::new("/bin/true").exists());
    assert!(!Path::new("/run/note").exists() && !Path::new("/dev/shm/note").exists());
}

#[test]
fn a_disk_is_formatted_written_and_checked_by_the_guest() {
    let Some(kernels) = kernels() else { return };
    if lacking(&["mkfs.ext4", "fsck.ext4", "debugfs"]) {
        return;
    }
    let dir = temp_dir();
    let disk = write(dir.path(), "disk", b"");
    fs::File::options().write(true).open(&disk).unwrap().set_len(64 << 20).unwrap();
    let fixed = write(dir.path(), "fixed", &[b'x'; 4096]);
    let job = "
        set -e
        mkfs.ext4 -q /dev/vda
        mount /dev/vda /mnt; echo from the guest >/mnt/note
        dd if=/dev/zero bs=1M count=16 2>/dev/null | tr '\\0' y >/mnt/big
        umount /mnt
        fsck.ext4 -fn /dev/vda >/dev/null
        mount -o ro /dev/vda /mnt; cat /mnt/note; tr -d y </mnt/big | wc -c; umount /mnt
        cat /sys/block/vda/ro /sys/block/vdb/ro
        head -c 4 /dev/vdb; echo
        if echo nonsense 2>/dev/null >/dev/vdb; then echo written; else echo read-only; fi";
    let options = ["--disk", disk.to_str().unwrap(), "--disk", &format!("{}:ro", fixed.display())];
    let end = boot(run(kernels.older(), &options, &["sh", "-c", job]));
    end.expect(0);
    assert_eq!(end.text(), "from the guest\n0\n0\n1\nxxxx\nread-only\n", "{}", end.stderr);
    assert_eq!(fs::read(&fixed).unwrap(), [b'x'; 4096]);
    let host = |program: &str, args: &[&str]| {
        let output =
            Command::new(program).args(args).arg(&disk).env("PATH", "/usr/sbin:/sbin").output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    host("fsck.ext4", &["-fn"]);
    assert_eq!(host("debugfs", &["-R", "cat note"]), "from the guest\n");
}

/// Without `modprobe`, which not every host has: the system call, made by this program in the guest.
#[test]
fn modules_can_be_loaded() {
    let Some(kernels) = kernels() else { return };
    let this = std::env::current_exe().unwrap();
    for (kernel, cpus) in [(kernels.older(), "1"), (kernels.newer(), "2")] {
        let file = kernel.parent().unwrap().join("modules/kernel/drivers/net/dummy.ko");
        let dir = temp_dir();
        let module = dir.path().join("dummy.ko");
        match fs::read(&file) {
            Ok(bytes) => fs::write(&module, bytes).unwrap(),
            Err(_) => {
                let packed = fs::File::open(file.with_extension("ko.xz")).unwrap();
                let mut to = fs::File::create(&module).unwrap();
                std::io::copy(&mut liblzma::read::XzDecoder::new(packed), &mut to).unwrap();
            }
        }
        let variable = format!("MODULE={}", module.display());
        let side = [this.to_str().unwrap(), "--ignored", "--exact", "the_guests_side_loads_a_module"];
        boot(run(kernel, &["--cpus", cpus, "--env", &variable], &side)).expect(0);
    }
}

#[test]
#[ignore = "runs in the guest of another test"]
fn the_guests_side_loads_a_module() {
    let interface = Path::new("/sys/class/net/dummy0");
    assert!(!interface.exists());
    let module = fs::File::open(std::env::var_os("MODULE").unwrap()).unwrap();
    rustix::system::finit_module(&module, c"", 0).unwrap();
    assert!(interface.exists());
}

/// The module tree is where `modprobe` looks for it.
#[test]
fn modprobe_finds_the_modules() {
    let Some(kernels) = kernels() else { return };
    if lacking(&["modprobe"]) {
        return;
    }
    // systemd configures the module to make no interface by itself.
    let job = "modprobe dummy numdummies=1 && grep -c '^dummy ' /proc/modules && cat /sys/class/net/dummy0/operstate && \
               modprobe -r dummy && ! grep '^dummy ' /proc/modules";
    let end = boot(run(kernels.newer(), &[], &["sh", "-c", job]));
    end.expect(0);
    assert_eq!(end.text(), "1\ndown\n");
}

/// A directory with nothing but a program of 32 bits in it, which makes its system calls by `int 0x80` and by the
/// way that the kernel prefers (`AT_SYSINFO`: SYSENTER or SYSCALL).
#[test]
fn another_root_and_a_32_bit_program() {
    let Some(kernels) = kernels() else { return };
    let dir = temp_dir();
    let program = write(dir.path(), "program", &program32());
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    for kernel in [kernels.older(), kernels.newer()] {
        let end = boot(run(kernel, &["--root", dir.path().to_str().unwrap()], &["/program"]));
        end.expect(32);
        assert_eq!(end.text(), "by interrupt\nby the vDSO\n");
        assert_eq!(end.stderr, "");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "mount points were made on the host");
}

/// A static i386 executable: one segment, no sections.
fn program32() -> Vec<u8> {
    const BASE: u32 = 0x0804_8000;
    const HEADERS: u32 = 52 + 32;
    const TEXTS: [&[u8]; 2] = [b"by interrupt\n", b"by the vDSO\n"];
    const AT_SYSINFO: i32 = 32;
    let first = BASE + HEADERS;
    let second = first + TEXTS[0].len() as u32;
    let code = second + TEXTS[1].len() as u32;
    let mut a = CodeAssembler::new(32).unwrap();
    let (mut environment, mut auxiliary, mut found) = (a.create_label(), a.create_label(), a.create_label());
    let mut build = || -> Result<Vec<u8>, iced_x86::IcedError> {
        let write = |a: &mut CodeAssembler, at: u32, text: &[u8]| -> Result<(), iced_x86::IcedError> {
            a.mov(eax, 4)?;
            a.mov(ebx, 1)?;
            a.mov(ecx, at)?;
            a.mov(edx, text.len() as u32)
        };
        write(&mut a, first, TEXTS[0])?;
        a.int(0x80)?;
        // The stack: argc, arguments, 0, environment, 0, auxiliary vector.
        a.mov(eax, ptr(esp))?;
        a.lea(esi, ptr(esp + eax * 4 + 8))?;
        a.set_label(&mut environment)?;
        a.lodsd()?;
        a.test(eax, eax)?;
        a.jne(environment)?;
        a.set_label(&mut auxiliary)?;
        a.lodsd()?;
        a.mov(edi, ptr(esi))?;
        a.add(esi, 4)?;
        a.cmp(eax, AT_SYSINFO)?;
        a.je(found)?;
        a.test(eax, eax)?;
        a.jne(auxiliary)?;
        a.hlt()?;
        a.set_label(&mut found)?;
        write(&mut a, second, TEXTS[1])?;
        a.call(edi)?;
        a.mov(eax, 1)?;
        a.mov(ebx, 32)?;
        a.call(edi)?;
        a.hlt()?;
        a.assemble(code.into())
    };
    let code_bytes = build().unwrap();
    let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x03\0".to_vec();
    let size = HEADERS + (TEXTS[0].len() + TEXTS[1].len() + code_bytes.len()) as u32;
    for word in [1, code, 52, 0, 0, 52 | 32 << 16, 1, 0, 1, 0, BASE, BASE, size, size, 5, 0x1000] {
        file.extend(word.to_le_bytes());
    }
    assert_eq!(file.len() as u32, HEADERS);
    file.extend(TEXTS.concat());
    file.extend(code_bytes);
    file
}
