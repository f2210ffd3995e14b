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
        assert!(!end.stderr.to_lowercase().contains("pvm"), "{}", end.stderr);
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

#[test]
fn a_hostile_guest_is_the_end_of_nobody_else() {
    let dir = temp_dir();
    let path = guest_file(dir.path());
    let said = |deed: &str| boot_alone(&path, &["--cpus", "2", "--append", &format!("hostile={deed}")]);
    let list = said("list");
    list.expect(0);
    let text = list.text();
    // Between the line that says how it was entered and the verdict.
    let deeds: Vec<_> = text.lines().filter(|line| !line.starts_with("pvm-guest: ")).collect();
    assert!(deeds.len() > 20, "{text}");
    for deed in deeds {
        let end = said(deed);
        let begun = format!("pvm-guest: hostile {deed}");
        assert!(end.text().lines().any(|line| line == begun), "{deed}: {}", end.text());
        assert!(!end.stderr.contains("panicked at"), "{deed}: ring3 panicked:\n{}", end.stderr);
        if end.code != Some(0) {
            end.expect_error("shut down (triple fault) at RIP 0x");
        }
    }
}
