//! Tests that need more than this process has to give: a network of their own, or limits.

use std::io::Write as _;
use std::process::Command;

/// Set in the process that runs a test in its own surroundings.
const INSIDE: &str = "USERNET_TEST_INSIDE";

/// Says that a test, or a part of it, is skipped and why, past the test harness, which hides what passing tests print.
pub(crate) fn skip(why: &str) {
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED {name}: {why}");
}

/// Whether the host has IPv6 on its loopback; says so if not.
pub(crate) fn has_ipv6() -> bool {
    let bound = std::net::UdpSocket::bind("[::1]:0");
    if let Err(error) = &bound {
        skip(&format!("no IPv6 on the loopback: {error}"));
    }
    bound.is_ok()
}

/// Runs the present test again, in a new network namespace whose root it is, with its loopback up and nothing else.
/// Whether this is already it; the caller is to return if not.
///
/// # Panics
/// If it fails there.
pub(crate) fn in_namespace() -> bool {
    let unshare = || {
        let mut command = Command::new("unshare");
        command.args(["--user", "--map-root-user", "--net", "--"]);
        command
    };
    run_again(unshare, &["sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""])
}

/// Runs the present test again, in a process that may have `descriptors` open at most. Whether this is already it.
///
/// # Panics
/// If it fails there.
pub(crate) fn with_descriptors(descriptors: u32) -> bool {
    let limit = format!("ulimit -n {descriptors} && exec \"$0\" \"$@\"");
    run_again(|| Command::new("env"), &["sh", "-c", &limit])
}

fn run_again(surroundings: impl Fn() -> Command, shell: &[&str]) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let tried = surroundings().args(shell).arg("true").output();
    match tried {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            skip(&format!(
                "it cannot have its surroundings: {}",
                String::from_utf8_lossy(&output.stderr).trim()
            ));
            return false;
        }
        Err(error) => {
            skip(&format!("it cannot have its surroundings: {error}"));
            return false;
        }
    }
    let name = std::thread::current().name().unwrap().to_owned();
    let test = std::env::current_exe().unwrap();
    let output = surroundings()
        .args(shell)
        .arg(test)
        .args(["--exact", &name, "--nocapture", "--test-threads=1"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let told = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "in its own surroundings it failed:\n{}\n{}", told[0], told[1]);
    assert!(told[0].contains("1 passed"), "the test was not found there: {}", told[0]);
    for line in told[1].lines().filter(|line| line.starts_with("SKIPPED")) {
        skip(line.split_once(": ").map_or(line, |(_, why)| why));
    }
    false
}

/// Runs `ip` with these words.
///
/// # Panics
/// If it fails.
pub(crate) fn ip(words: &str) {
    let output = Command::new("ip").args(words.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {words}: {}", String::from_utf8_lossy(&output.stderr));
}
