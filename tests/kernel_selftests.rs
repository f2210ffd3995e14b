//! The kernel's own selftests of iommufd and VFIO, unmodified, and questions that the real kernel has answered, under
//! `ring3 shim`.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::path::Path;
use std::process::Command;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use support::process::{Finished, as_other_user, finish, other_user};
use support::selftests::{
    Answers, Expectations, HugePages, Kernel, Outcome, Report, as_root, behind, kernel, lift_memory_limit,
    say, shim,
};

const PATIENCE: Duration = Duration::from_secs(240);

/// The device for the programs that want one, and its address. Their driver for it is the reason for its kind.
const CARD: &str = "--device=ioat,addr=0000:00:05.0";
const ADDRESS: &str = "0000:00:05.0";

/// The kernel's harness gives a case 30 seconds. Failing each allocation in turn takes half of that where nothing else runs,
/// so this program has the machine to itself; all others share it.
const LONG: &str = "iommufd_fail_nth";
static MACHINE: RwLock<()> = RwLock::new(());

/// Runs `command`, which is or asks `program`.
fn run(program: &str, command: Command) -> Finished {
    let alone = (program == LONG).then(|| MACHINE.write().unwrap_or_else(PoisonError::into_inner));
    let _shared = alone.is_none().then(|| MACHINE.read().unwrap_or_else(PoisonError::into_inner));
    finish(command, PATIENCE)
}

#[track_caller]
fn assert_none_wrong(wrong: &[String]) {
    assert!(wrong.is_empty(), "{} answers are wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// Whether the shim serves the device; if not, says so.
fn has_card() -> bool {
    let card = format!("/sys/bus/pci/devices/{ADDRESS}/vendor");
    let there = finish(shim(&[CARD], Path::new("/bin/cat"), &[&card]), PATIENCE).code == Some(0);
    if !there {
        support::skip("ring3 shim serves no such device");
    }
    there
}

/// Runs a program of the selftests as root, with as much locked memory as it likes where we may allow that.
#[track_caller]
fn selftest(program: &str, options: &[&str], arguments: &[&str]) {
    let Some(kernel) = kernel() else { return };
    if options.contains(&CARD) && !has_card() {
        return;
    }
    lift_memory_limit();
    if let Some(command) = as_root(shim(options, &kernel.program(program), arguments)) {
        judge(kernel, program, command);
    }
}

/// Runs a command and compares what it reports with what is expected of the program of this name.
#[track_caller]
fn judge(kernel: &Kernel, program: &str, command: Command) {
    let huge_pages = HugePages::reserve();
    if !huge_pages.enough {
        support::skip(&format!("{program}: there are no huge pages: the cases that need them"));
    }
    let done = run(program, command);
    let report = Report::parse(&done.text());
    let mut wrong = Expectations::read().compare(program, &report, huge_pages.enough);
    if let Some(signal) = done.signal {
        wrong.push(format!("{program} was ended by signal {signal}:\n{}", done.stderr));
    }
    if !kernel.as_expected && !wrong.is_empty() {
        return support::skip(&format!(
            "the expectations are for another kernel: not judged:\n{}",
            wrong.join("\n")
        ));
    }
    assert_none_wrong(&wrong);
}

/// As an ordinary user has it: without privileges, and with Debian's limit of locked memory, 8 MiB.
#[test]
fn iommufd_as_a_user() {
    let Some(kernel) = kernel() else { return };
    if rustix::process::geteuid().is_root() && other_user().is_none() {
        return;
    }
    let program = shim(&["--mock-iommu"], &kernel.program("iommufd"), &[]);
    let mut command = behind("prlimit", &["--memlock=8388608:8388608"], &program);
    command.current_dir("/").env("HOME", "/nonexistent");
    as_other_user(&mut command);
    judge(kernel, "iommufd@user", command);
}

/// Runs a probe and compares what it prints with what it printed on the real kernel.
#[track_caller]
fn probe(name: &str, options: &[&str], arguments: &[&str], answers: &[&str]) {
    let Some(kernel) = kernel() else { return };
    if options.contains(&CARD) && !has_card() {
        return;
    }
    lift_memory_limit();
    let dir = tempfile::tempdir().unwrap();
    let program = kernel.probe(name, dir.path());
    let Some(command) = as_root(shim(options, &program, arguments)) else { return };
    let done = run(name, command);
    let mut wrong = Answers::read(answers).compare(name, Answers::parse(&done.text()), answers.len() > 1);
    if done.code != Some(0) {
        wrong.push(format!(
            "the probe ended with status {:?}, signal {:?}:\n{}",
            done.code, done.signal, done.stderr
        ));
    }
    assert_none_wrong(&wrong);
}

macro_rules! selftests {
    ($($name:ident: $program:expr, $options:expr, $arguments:expr;)*) => {
        $(
            #[test]
            fn $name() {
                selftest($program, $options, $arguments);
            }
        )*
    };
}

selftests! {
    iommufd: "iommufd", &["--mock-iommu"], &[];
    iommufd_fail_nth: LONG, &["--mock-iommu"], &[];
    vfio_iommufd_setup: "vfio_iommufd_setup_test", &[CARD], &[ADDRESS];
    vfio_dma_mapping: "vfio_dma_mapping_test", &[CARD], &[ADDRESS];
    vfio_dma_mapping_mmio: "vfio_dma_mapping_mmio_test", &[CARD], &[ADDRESS];
    vfio_pci_device: "vfio_pci_device_test", &[CARD], &[ADDRESS];
    vfio_pci_driver: "vfio_pci_driver_test", &[CARD], &[ADDRESS];
    vfio_pci_sriov_uapi: "vfio_pci_sriov_uapi_test", &[CARD], &[ADDRESS];
}

macro_rules! probes {
    ($($name:ident: $probe:literal, $options:expr, $arguments:expr, $answers:expr;)*) => {
        $(
            #[test]
            fn $name() {
                probe($probe, $options, $arguments, $answers);
            }
        )*
    };
}

probes! {
    answers_to_every_command: "commands", &["--mock-iommu"], &[], &["commands"];
    answers_about_address_spaces: "ioas", &["--mock-iommu"], &[], &["ioas"];
    answers_about_page_tables: "hwpt", &["--mock-iommu"], &[], &["hwpt"];
    answers_about_virtual_iommus_and_queues: "objects", &["--mock-iommu"], &[], &["objects"];
    answers_about_files_processes_and_limits: "process", &["--mock-iommu"], &[], &["process"];
    answers_to_container_calls: "compat", &["--mock-iommu"], &[], &["compat"];
    answers_about_pins: "access", &["--mock-iommu"], &[], &["access"];
    answers_at_the_doors: "vfio_doors", &[CARD], &[ADDRESS], &["vfio_doors.edu", "vfio_doors.igb"];
    answers_of_sysfs: "vfio_sysfs", &[CARD], &[ADDRESS], &["vfio_sysfs.igb"];
    answers_of_a_device: "vfio_device", &[CARD], &[ADDRESS], &["vfio_device.edu", "vfio_device.igb"];
}

/// The first programs of docs/vfio.md, as they stand there, and the third that it describes.
#[test]
fn documented_programs_do_what_is_said() {
    let Some(kernel) = kernel() else { return };
    let text = include_str!("../docs/vfio.md");
    let says = text.split("-- ./by-node\n").nth(1).unwrap().lines().next().unwrap().trim();
    let blocks = text.split("```c\n").skip(1).map(|rest| rest.split("```").next().unwrap().to_owned());
    let mut programs: Vec<String> = blocks.collect();
    assert_eq!(programs.len(), 2);
    let third = programs[1].replace("/dev/vfio/vfio", "/dev/iommu");
    let (before, rest) = third.split_once("    if (ioctl(container, VFIO_SET_IOMMU").unwrap();
    let (_, after) = rest.split_once("\"IOMMU\");\n").unwrap();
    programs.extend([format!("{before}{after}"), third.clone()]);
    let dir = tempfile::tempdir().unwrap();
    for (number, program) in programs.iter().enumerate() {
        let source = support::write(dir.path(), &format!("program{number}.c"), program.as_bytes());
        let command = shim(&["--device=test"], &kernel.compiled(&source, dir.path()), &[]);
        let done = finish(command, PATIENCE);
        assert_eq!((done.text().trim(), done.code), (says, Some(0)), "{program}\n{}", done.stderr);
    }
}

#[test]
fn reports_are_read_as_the_kernels_harness_writes_them() {
    let text = "TAP version 13\n1..4\n# Starting 4 tests from 1 test cases.\n#  RUN           a.b ...\n\
                #            OK  a.b\nok 1 a.b\n#  RUN           a.c ...\n# x.c:1:c:Expected 1\nnot ok 2 a.c\n\
                ok 3 a.d # SKIP no such thing\n";
    let report = Report::parse(text);
    assert_eq!(report.planned, 4);
    let [(b, Outcome::Passed), (c, Outcome::Failed(said)), (d, Outcome::Skipped(why))] = &report.cases[..]
    else {
        panic!("{report:?}");
    };
    assert_eq!((b.as_str(), c.as_str(), d.as_str(), why.as_str()), ("a.b", "a.c", "a.d", "no such thing"));
    assert!(said.contains("Expected 1") && !said.contains("OK"), "{said}");
    // One case is missing, and one failed; nothing of it is listed.
    let wrong = Expectations::read().compare("an unlisted program", &report, true);
    assert_eq!(wrong.len(), 3, "{wrong:?}");
    say("(the line above is of a made-up program)");
}
