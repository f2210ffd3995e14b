//! What a command in the guest gives back: output, status, streams; and what signals and times do to it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::io::Write;
use std::process::Stdio;

use rustix::process::Signal;
use support::Noise;
use support::kernels::{kernels, release};
use support::process::{Running, boot, ring3, run};

const MAIN_JOB: [&str; 3] = ["sh", "-c", "uname -r; nproc; exit 7"];

#[test]
fn the_newest_cached_kernel_boots_without_options() {
    let Some(kernels) = kernels() else { return };
    let mut command = ring3();
    command.env("XDG_CACHE_HOME", &kernels.cache).args(["run", "--"]).args(MAIN_JOB);
    let end = boot(command);
    end.expect(7);
    assert_eq!(end.text(), format!("{}\n1\n", release(kernels.newer())));
    assert_eq!(end.stderr, "", "nothing but the command's own words belongs on standard error");
}

#[test]
fn the_console_is_shown_on_request_and_has_the_users_words() {
    let Some(kernels) = kernels() else { return };
    let job = ["sh", "-c", "cat /proc/cmdline; uname -r; nproc; exit 7"];
    let end = boot(run(kernels.newer(), &["-v", "--append", "my.word=1", "--cpus", "2"], &job));
    end.expect(7);
    let text = end.text();
    let (line, rest) = text.split_once('\n').unwrap();
    assert!(line.contains(" my.word=1"), "{line}");
    assert_eq!(rest, format!("{}\n2\n", release(kernels.newer())));
    assert!(end.stderr.contains("engine: interpret"), "{}", end.stderr);
    assert!(end.stderr.contains("Linux version 6.12"), "{}", end.stderr);
}

#[test]
fn the_old_kernel_on_one_processor_with_env_and_workdir() {
    let Some(kernels) = kernels() else { return };
    let job = ["sh", "-c", "echo \"$A|$B|$HOME|$PWD|$#|$1\"; uname -r; nproc; exit 7", "x", "a  b"];
    let mut command = run(
        kernels.older(),
        &["--workdir", "/usr", "--env", "A=1 2", "--env", "B", "--env", "C=unused"],
        &job,
    );
    command.env("B", "from outside").env("SECRET", "not passed on");
    let end = boot(command);
    end.expect(7);
    assert_eq!(end.text(), format!("1 2|from outside|/root|/usr|1|a  b\n{}\n1\n", release(kernels.older())));
    assert_eq!(end.stderr, "");
}

#[test]
fn the_old_kernel_on_two_processors_with_statistics() {
    let Some(kernels) = kernels() else { return };
    let end = boot(run(kernels.older(), &["--cpus", "2", "--memory", "256M", "--stats"], &MAIN_JOB));
    end.expect(7);
    assert_eq!(end.text(), format!("{}\n2\n", release(kernels.older())));
    let field = |name: &str| {
        let line = end.stderr.lines().find_map(|line| line.strip_prefix(name));
        line.unwrap_or_else(|| panic!("no {name:?} in:\n{}", end.stderr)).trim().to_owned()
    };
    assert_eq!((field("engine"), field("vcpus")), ("interpret".into(), "2".into()));
    assert_eq!(field("guest memory  "), "256 MiB");
    for name in ["guest instructions", "TLB misses", "exits: port write", "HLT"] {
        assert!(field(name).parse::<u64>().unwrap() > 0, "{name}");
    }
    for name in ["time to build", "time in the guest"] {
        assert!(field(name).strip_suffix(" s").unwrap().parse::<f64>().unwrap() > 0.0, "{name}");
    }
}

/// 100 MB in and out again, standard error beside it.
#[test]
fn streams_are_separate_and_unchanged() {
    const SIZE: usize = 100_000_000;
    const SEED: u64 = 0x5eed;
    let Some(kernels) = kernels() else { return };
    let mut command =
        run(kernels.newer(), &["--cpus", "2"], &["sh", "-c", "echo aside >&2; cat; echo end >&2"]);
    command.stdin(Stdio::piped());
    let (mut running, mut output) = Running::boot_with_output(command);
    let mut stdin = running.stdin().unwrap();
    let writer = std::thread::spawn(move || {
        let mut noise = Noise(SEED);
        let mut buffer = [0; 8000];
        for _ in 0..SIZE / buffer.len() {
            noise.fill(&mut buffer);
            stdin.write_all(&buffer).unwrap();
        }
    });
    let mut noise = Noise(SEED);
    let (mut expected, mut got) = ([0; 8000], [0; 8000]);
    for chunk in 0..SIZE / expected.len() {
        noise.fill(&mut expected);
        output.read_exact(&mut got);
        assert!(expected == got, "difference in bytes {} and following", chunk * expected.len());
    }
    writer.join().unwrap();
    let rest = output.rest();
    assert!(rest.is_empty(), "{} bytes too many", rest.len());
    let end = running.finish(support::process::PATIENCE);
    end.expect(0);
    assert_eq!(end.stderr, "aside\nend\n");
}

#[test]
fn a_command_that_is_not_there_is_127() {
    let Some(kernels) = kernels() else { return };
    let end = boot(run(kernels.newer(), &[], &["no-such-command"]));
    end.expect(127);
    assert_eq!(end.stderr, "ring3: no-such-command: command not found\n");
}

#[test]
fn a_command_that_cannot_be_executed_is_126() {
    let Some(kernels) = kernels() else { return };
    let end = boot(run(kernels.older(), &[], &["/etc/passwd"]));
    end.expect(126);
    assert!(end.stderr.starts_with("ring3: /etc/passwd: "), "{}", end.stderr);
}

#[test]
fn a_command_killed_by_a_signal_is_128_and_its_number() {
    let Some(kernels) = kernels() else { return };
    let end = boot(run(kernels.newer(), &[], &["sh", "-c", "kill -SEGV $$"]));
    end.expect(128 + 11);
    assert_eq!(end.stderr, "");
}

#[test]
fn the_first_signal_is_the_commands_the_second_ends_the_machine() {
    let Some(kernels) = kernels() else { return };
    let job = "trap 'echo usr1' USR1; trap 'echo term' TERM; echo ready; while :; do sleep 0.1; done";
    let (running, mut output) = Running::boot_with_output(run(kernels.newer(), &[], &["sh", "-c", job]));
    output.wait_for("ready\n");
    running.signal(Signal::USR1);
    output.wait_for("usr1\n");
    running.signal(Signal::TERM);
    output.wait_for("term\n");
    running.signal(Signal::INT);
    running.finish(support::process::PATIENCE).expect(128 + 2);
}

#[test]
fn an_interrupt_ends_a_command_that_does_not_care() {
    let Some(kernels) = kernels() else { return };
    let job = ["sh", "-c", "echo ready; exec sleep 1000"];
    let (running, mut output) = Running::boot_with_output(run(kernels.older(), &[], &job));
    output.wait_for("ready\n");
    running.signal(Signal::INT);
    running.finish(support::process::PATIENCE).expect(128 + 2);
}

#[test]
fn a_timeout_asks_the_command_to_end() {
    let Some(kernels) = kernels() else { return };
    // Whether the time is over during the boot or after it depends on the machine that runs the tests.
    let job = "trap 'echo asked; exit 3' TERM; echo ready; while :; do sleep 0.1; done";
    let end = boot(run(kernels.newer(), &["--timeout", "20"], &["sh", "-c", job]));
    end.expect(124);
    assert!(["", "ready\nasked\n"].contains(&end.text().as_str()), "{}", end.text());
    assert!(end.took.as_secs() >= 19, "{:?}", end.took);
}

#[test]
fn a_timeout_ends_a_boot() {
    let Some(kernels) = kernels() else { return };
    let end = boot(run(kernels.newer(), &["--timeout", "0.5s"], &["true"]));
    end.expect(124);
    assert!(end.took.as_secs() < 20, "{:?}", end.took);
}

#[test]
fn a_panic_of_the_guests_kernel_is_an_error_with_its_last_words() {
    let Some(kernels) = kernels() else { return };
    let end = boot(run(kernels.newer(), &[], &["sh", "-c", "echo c >/proc/sysrq-trigger; sleep 1000"]));
    end.expect_error("the guest's kernel panicked");
    assert!(end.stderr.contains("Kernel panic - not syncing: sysrq triggered crash"), "{}", end.stderr);
}

#[test]
fn a_command_that_powers_off_has_no_status() {
    let Some(kernels) = kernels() else { return };
    let end = boot(run(kernels.older(), &[], &["sh", "-c", "echo o >/proc/sysrq-trigger; sleep 1000"]));
    end.expect_error("the guest powered off before the command's end");
}

#[test]
fn a_command_that_reboots_has_no_status() {
    let Some(kernels) = kernels() else { return };
    let end = boot(run(kernels.newer(), &[], &["sh", "-c", "echo b >/proc/sysrq-trigger; sleep 1000"]));
    end.expect_error("the guest reset itself before the command's end");
}
