//! The PVM guest ABI on the command line: which kernels are offered it, and the selftest.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Parser;
use ring3::cli::{Cli, PvmTask, SelftestArgs, Task};
use ring3::pvm_guest::{PVM_GUEST, selftest};
use support::kernels::kernels;
use support::process::{Finished, boot, finish, ring3, run};
use support::standin::{Ending, kernel};
use support::{temp_dir, write};

/// Room for what starts no machine.
const SOON: Duration = Duration::from_secs(60);

/// The value of a line of `--stats`.
#[track_caller]
fn figure(end: &Finished, name: &str) -> String {
    let line = end.stderr.lines().find(|line| line.get(..28).is_some_and(|head| head.trim_end() == name));
    let line = line.unwrap_or_else(|| panic!("no {name:?} in:\n{}", end.stderr));
    line.get(29..).unwrap_or_default().to_owned()
}

/// Boots a kernel that is all its own.
fn boot_alone(kernel: &Path, options: &[&str]) -> Finished {
    boot(run(kernel, &[&["--initramfs", "none", "--timeout", "120"], options].concat(), &[]))
}

#[test]
fn help_and_manual_tell_of_it() {
    for (words, wanted) in [
        (&["run", "--help"][..], &["--guest-abi <ABI>", "auto", "[default: auto]", "FILE|none"][..]),
        (&["pvm", "--help"], &["selftest", "guest", "Examples:"]),
        (&["pvm", "selftest", "--help"], &["--cpus", "--boot", "--list", "Exit status:"]),
        (&["man", "run"], &["\\-\\-guest\\-abi"]),
        (&["man", "pvm"], &["ring3\\-pvm\\-selftest(1)"]),
        (&["man", "pvm", "selftest"], &["ring3\\-pvm\\-selftest", "\\-\\-timeout"]),
    ] {
        let mut command = ring3();
        command.args(words);
        let end = finish(command, SOON);
        end.expect(0);
        for word in wanted {
            assert!(end.text().contains(word), "{word:?} is not in {words:?}:\n{}", end.text());
        }
    }
    let mut command = ring3();
    command.arg("pvm");
    let end = finish(command, SOON);
    end.expect(125);
    assert!(
        end.stderr.starts_with("The PVM guest ABI: ") && end.stderr.contains("Usage: "),
        "{}",
        end.stderr
    );
    let mut command = ring3();
    command.args(["man", "pvm", "nonsense"]);
    finish(command, SOON).expect_error("no subcommand pvm nonsense");
}

#[test]
fn an_ordinary_kernel_is_offered_plain_x86() {
    let Some(kernels) = kernels() else { return };
    for options in [&["--stats"][..], &["--stats", "--guest-abi", "off"]] {
        let end = boot(run(kernels.newer(), options, &["sh", "-c", "exit 7"]));
        end.expect(7);
        assert_eq!(figure(&end, "guest ABI"), "x86");
        let told = |line: &str| line.starts_with("PVM ") || line.contains("guest ABI: pvm");
        assert!(!end.stderr.lines().any(told), "{}", end.stderr);
    }
}

#[test]
fn an_ordinary_kernel_is_not_entered_by_pvm() {
    let Some(kernels) = kernels() else { return };
    let end = boot(run(kernels.older(), &["--guest-abi", "pvm"], &["true"]));
    end.expect_error("is no PVM guest");
    assert!(end.stderr.contains(kernels.older().to_str().unwrap()), "{}", end.stderr);
    assert!(end.stderr.contains("--guest-abi off"), "{}", end.stderr);
}

#[test]
fn a_kernel_alone_has_the_serial_port_on_the_standard_streams() {
    let dir = temp_dir();
    let path = write(dir.path(), "kernel", &kernel("alone\n", Ending::PowerOff, false));
    for boot in ["linux", "pvh"] {
        let end = boot_alone(&path, &["--boot", boot]);
        end.expect(0);
        assert_eq!((end.text().as_str(), end.stderr.as_str()), ("alone\n", ""), "{boot}");
    }
    let path = write(dir.path(), "kernel", &kernel("again\n", Ending::Reset, false));
    boot_alone(&path, &[]).expect(0);
}

#[test]
fn the_kernel_decides_unless_the_user_does() {
    let dir = temp_dir();
    let guest = write(dir.path(), "guest", &kernel("x\n", Ending::PowerOff, true));
    let plain = write(dir.path(), "plain", &kernel("x\n", Ending::PowerOff, false));
    const NOTE: &str = "ring3: guest ABI: pvm, generation 1 (RFC v1, 2024-02): the kernel contains its synthetic CPUID; \
                        --guest-abi off offers plain x86\n";
    for (kernel, asked, said, counted) in [
        (&guest, "auto", true, "pvm, generation 1"),
        (&guest, "pvm", false, "pvm, generation 1"),
        (&guest, "off", false, "x86"),
        (&plain, "auto", false, "x86"),
    ] {
        let end = boot_alone(kernel, &["--stats", "--guest-abi", asked]);
        end.expect(0);
        assert_eq!(end.text(), "x\n", "{asked}");
        assert_eq!(end.stderr.contains(NOTE), said, "{asked}: {}", end.stderr);
        assert!(figure(&end, "guest ABI").starts_with(counted), "{asked}: {}", end.stderr);
    }
    let end = boot_alone(&plain, &["--guest-abi", "pvm"]);
    end.expect_error("is no PVM guest");
}

/// Runs the selftest with another guest in this process.
fn selftest_with(guest: &[u8], options: &[&str]) -> (u8, String) {
    let args: SelftestArgs = match Cli::parse_from(["ring3", "pvm", "selftest"].iter().chain(options)).command
    {
        Task::Pvm { task: PvmTask::Selftest(args) } => args,
        other => panic!("{other:?}"),
    };
    let mut out = Vec::new();
    let status = selftest::run(&args, guest, &mut out).unwrap();
    (status, String::from_utf8(out).unwrap())
}

#[test]
fn the_selftest_believes_a_whole_report_and_nothing_less() {
    let good = "1..2\nok 1 a/b\nok 2 c # skip no reason\npvm-guest: PASS 2 checks, 1 skipped\n";
    let (status, text) = selftest_with(&kernel(good, Ending::PowerOff, true), &[]);
    assert_eq!(status, 0, "{text}");
    for line in ["linux, 1 vCPU: 1 passed, 1 skipped", "pvh, 2 vCPUs: 1 passed", "all passed"] {
        assert!(text.contains(line), "{line:?} is not in:\n{text}");
    }

    let bad = "1..2\nok 1 a\nnot ok 2 b/c : saw 3\npvm-guest: FAIL 1 of 2 checks, 0 skipped\n";
    let (status, text) = selftest_with(&kernel(bad, Ending::PowerOff, true), &["--boot", "linux"]);
    assert_eq!(status, 1, "{text}");
    for line in
        ["  not ok 2 b/c: saw 3", "linux, 2 vCPUs: 1 passed, 0 skipped; FAILED", "2 of 2 boots FAILED"]
    {
        assert!(text.contains(line), "{line:?} is not in:\n{text}");
    }

    let (status, text) = selftest_with(&kernel(good, Ending::Reset, true), &["--boot=pvh", "--cpus=1"]);
    assert!(status == 1 && text.contains("ended by reset (ACPI reset register)"), "{text}");
    let (status, text) = selftest_with(&kernel(good, Ending::Fault, true), &["--boot=linux", "--cpus=1"]);
    assert!(status == 1 && text.contains("triple fault (at RIP 0x"), "{text}");
    let options = ["--boot=pvh", "--cpus=1", "--timeout=0.3"];
    let (status, text) = selftest_with(&kernel("1..2\nok 1 a\n", Ending::Hang, true), &options);
    assert!(status == 1 && text.contains("within 0.3 s"), "{text}");
    assert!(text.contains("reported 1 of 2 checks") && text.contains("\n  | ok 1 a\n"), "{text}");
}

#[test]
fn the_selftest_lists_and_shows() {
    let guest =
        kernel("hello\n1..1\nok 1 a/b\npvm-guest: PASS 1 checks, 0 skipped\n", Ending::PowerOff, true);
    assert_eq!(selftest_with(&guest, &["--list"]), (0, "a/b\n".into()));
    let (status, text) = selftest_with(&guest, &["-v", "--boot=pvh", "--cpus=1"]);
    assert_eq!(status, 0, "{text}");
    assert!(text.starts_with("# pvh, 1 vCPU\nhello\n1..1\nok 1 a/b\npvm-guest: PASS"), "{text}");
}

#[test]
fn a_prefix_that_names_no_check_is_an_error() {
    for options in [&[][..], &["--list"]] {
        let mut command = ring3();
        command.args(["pvm", "selftest", "--only", "nonsense"]).args(options);
        finish(command, SOON).expect_error("no check's name begins with nonsense");
    }
}

#[test]
fn the_selftest_passes() {
    let mut command = ring3();
    command.args(["pvm", "selftest"]);
    let end = boot(command);
    end.expect(0);
    for boot in ["linux, 1 vCPU: ", "linux, 2 vCPUs: ", "pvh, 1 vCPU: ", "pvh, 2 vCPUs: "] {
        assert!(end.text().contains(boot), "{boot:?} is not in:\n{}", end.text());
    }
    assert_eq!(end.stderr, "");
}

/// Writes the guest to a file, with the program's own means.
fn guest_file(dir: &Path) -> PathBuf {
    let path = dir.join("guest.elf");
    let mut command = ring3();
    command.args(["pvm", "guest", "--output"]).arg(&path);
    finish(command, SOON).expect(0);
    path
}

#[test]
fn the_guest_runs_alone_and_is_counted() {
    let dir = temp_dir();
    let path = guest_file(dir.path());
    assert!(fs::read(&path).unwrap() == PVM_GUEST, "the file is not the guest");

    let end = boot_alone(&path, &["--boot", "pvh", "--cpus", "2", "--stats"]);
    end.expect(0);
    assert!(end.text().contains("pvm-guest: PASS"), "{}", end.text());
    assert!(figure(&end, "guest ABI").starts_with("pvm, generation 1"), "{}", end.stderr);
    for name in [
        "PVM events: user",
        "PVM events: exceptions",
        "PVM events: interrupts",
        "PVM system calls",
        "PVM direct switches",
        "PVM interrupt windows",
        "PVM call: LOAD_PGTBL",
        "PVM call: IRQ_WIN",
    ] {
        assert!(figure(&end, name).parse::<u64>().unwrap() > 0, "{name}");
    }
    let mut command = ring3();
    command.args(["pvm", "guest", "--output", "/no/such/dir/guest.elf"]);
    finish(command, SOON).expect_error("cannot write /no/such/dir/guest.elf");
}

/// How a hostile deed of the guest ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Deed {
    /// Refused: the guest goes on, and says so.
    Refused,
    /// The guest's own kernel gets an exception that it did not expect.
    Caught,
    /// The processor shuts down.
    ShutDown,
}

#[test]
fn hostile_guests_hurt_nobody_but_themselves() {
    use Deed::{Caught, Refused, ShutDown};
    const DEEDS: [(&str, Deed); 28] = [
        ("pvcs-outside-memory", Refused),
        ("pvcs-on-mmio", Refused),
        ("pvcs-on-page-table", Refused),
        ("pvcs-on-code", Refused),
        ("entry-non-canonical", Refused),
        ("entry-unmapped", ShutDown),
        ("entry-in-user-memory", ShutDown),
        ("syscall-entry-unmapped", Caught),
        ("red-zone-wraps", ShutDown),
        ("stack-unmapped", ShutDown),
        ("stack-read-only", ShutDown),
        ("supervisor-rsp-wild", Refused),
        ("retu-in-user-memory", Refused),
        ("rets-on-bad-stack", ShutDown),
        ("roots-refused", Refused),
        ("root-outside-memory", ShutDown),
        ("root-on-mmio", ShutDown),
        ("root-of-garbage", ShutDown),
        ("user-root-outside-memory", Refused),
        ("user-root-on-mmio", Refused),
        ("selectors", Refused),
        ("tls", Refused),
        ("hypercall-numbers", Refused),
        ("msrs-by-hypercall", Refused),
        ("msrs-from-user-mode", Refused),
        ("control-registers", Refused),
        ("step-everything", Refused),
        ("storm", Refused),
    ];
    let dir = temp_dir();
    let path = write(dir.path(), "guest", PVM_GUEST);
    let list = boot_alone(&path, &["--append", "hostile=list"]);
    let known: Vec<String> = DEEDS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let listed: Vec<String> =
        list.text().lines().map(|l| l.trim_end().to_owned()).filter(|l| known.contains(l)).collect();
    assert_eq!(listed, known, "the guest lists:\n{}", list.text());
    for (name, deed) in DEEDS {
        let end = boot_alone(&path, &["--append", &format!("hostile={name}")]);
        match deed {
            Refused | Caught => end.expect(0),
            ShutDown => end.expect_error("shut down (triple fault) at RIP 0x"),
        };
        let verdict = end.text().trim_end().lines().last().map(str::to_owned);
        let wanted = match deed {
            Refused => Some("pvm-guest: PASS"),
            Caught => Some("pvm-guest: FAIL"),
            ShutDown => None,
        };
        assert!(wanted.is_none_or(|wanted| verdict.as_deref() == Some(wanted)), "{name}: {}", end.text());
    }
}

/// The guest with each `from` in its file made `to`.
fn changed(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    let mut guest = PVM_GUEST.to_vec();
    let places: Vec<_> = (0..guest.len()).filter(|at| guest[*at..].starts_with(&from)).collect();
    assert!(!places.is_empty(), "{from:x?} is not in the guest");
    for at in places {
        guest[at..at + 4].copy_from_slice(&to);
    }
    guest
}

#[test]
fn the_guest_says_what_is_not_its_hypervisor() {
    // One that expects another MSR, or another name, sees in ring3 what it would see in another generation.
    let other_msr = changed(0x4b56_4df7_u32.to_le_bytes(), 0x4b56_4dfe_u32.to_le_bytes());
    let no_range = changed(0x4b56_4df0_u32.to_le_bytes(), 0x4b56_4dfe_u32.to_le_bytes());
    let other_name = changed(*b"PVM\0", *b"PVX\0");
    let dir = temp_dir();
    for (guest, abi, why) in [
        (PVM_GUEST, "off", "CPL 0 and IF 0 in supervisor mode; CPUID "),
        (&other_msr, "pvm", "PVM of another generation: MSR 0x4b564dfe is not SwitchCr3"),
        (&no_range, "pvm", "PVM of another generation: MSR 0x4b564dfe is not LinearAddressRange"),
        (&other_name, "pvm", "entered like PVM's guests, but without PVM's name in leaf 0x40000002:"),
    ] {
        let path = write(dir.path(), "guest", guest);
        for boot in ["linux", "pvh"] {
            let end = boot_alone(&path, &["--guest-abi", abi, "--boot", boot]);
            end.expect(0);
            let text = end.text();
            let said = format!("not a PVM hypervisor of generation 1: {why}");
            assert!(
                text.contains(&said) && text.trim_end().ends_with("pvm-guest: FAIL"),
                "{said:?} is not in:\n{text}"
            );
        }
    }
}
