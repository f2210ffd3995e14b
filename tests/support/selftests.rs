//! The kernel's own selftests of iommufd and VFIO, and the probes that the real kernel has answered, under `ring3 shim`.
//!
//! Environment:
//! - `RING3_TEST_SELFTESTS`: a directory that `tests/selftests/fetch-kernel.sh` has filled (default: one in the target
//!   directory, filled when it is first needed);
//! - `RING3_TEST_SHIM`: a `libring3_shim.so` to preload, instead of what `ring3 shim` carries.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::process::{Resource, Rlimit, setrlimit};

use super::process::{self, RING3, finish};

/// What fetching and compiling may take.
const PATIENCE: Duration = Duration::from_secs(600);
/// The source that the expectations were written for.
const EXPECTATIONS_FOR: &str = "linux-source-7.3";

/// The directory of the expectations and the probes.
pub fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/selftests")
}

/// What was compiled from the kernel's source.
pub struct Kernel {
    dir: PathBuf,
    /// Whether it is the source that the expectations were written for.
    pub as_expected: bool,
}

/// What was compiled from the kernel's source, or none after having said aloud why.
pub fn kernel() -> Option<&'static Kernel> {
    static KERNEL: OnceLock<Result<Kernel, String>> = OnceLock::new();
    let kernel = KERNEL.get_or_init(|| {
        let shim = match std::env::var_os("RING3_TEST_SHIM") {
            Some(_) => true,
            None => finish(with_arguments(RING3, &["shim", "--help"]), PATIENCE).code == Some(0),
        };
        if !shim {
            return Err("this ring3 has no shim".into());
        }
        let dir = match std::env::var_os("RING3_TEST_SELFTESTS") {
            Some(dir) => PathBuf::from(dir),
            None => super::scratch().join("kernel-selftests"),
        };
        let mut fetch = Command::new(here().join("fetch-kernel.sh"));
        fetch.arg(&dir);
        let done = finish(fetch, PATIENCE);
        if done.code != Some(0) {
            return Err(format!("no selftests of the kernel: {}", done.stderr.trim()));
        }
        let version = std::fs::read_to_string(dir.join("version")).unwrap_or_default();
        say(&format!("the selftests are those of {}", version.trim().replace('\t', " ")));
        let as_expected = version.split('\t').next() == Some(EXPECTATIONS_FOR);
        Ok(Kernel { dir, as_expected })
    });
    match kernel {
        Ok(kernel) => Some(kernel),
        Err(why) => {
            super::skip(why);
            None
        }
    }
}

/// Says something past the test harness, which hides what passing tests print.
pub fn say(what: &str) {
    use std::io::Write as _;
    let _ = writeln!(std::io::stderr(), "{what}");
}

fn with_arguments(program: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments).stdin(std::process::Stdio::null());
    command
}

impl Kernel {
    /// A program of the selftests.
    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join("bin").join(name)
    }

    /// A probe, compiled with the kernel's headers.
    pub fn probe(&self, name: &str, into: &Path) -> PathBuf {
        self.compiled(&here().join("probes").join(name).with_extension("c"), into)
    }

    /// A program in C, compiled with the kernel's headers.
    pub fn compiled(&self, source: &Path, into: &Path) -> PathBuf {
        let program = into.join(source.file_stem().unwrap());
        let mut compiler = Command::new("cc");
        compiler.args(["-O1", "-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"]);
        compiler.arg("-I").arg(self.dir.join("include")).arg("-I").arg(&self.dir);
        compiler.arg(source).arg("-o").arg(&program);
        finish(compiler, PATIENCE).expect(0);
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        program
    }
}

/// A program under the shim, as ourselves.
pub fn shim(options: &[&str], program: &Path, arguments: &[&str]) -> Command {
    let mut command = match std::env::var_os("RING3_TEST_SHIM") {
        None => {
            let mut command = process::privileged();
            command.arg("shim").args(options).arg("--").arg(program);
            command
        }
        Some(library) => {
            let items: Vec<_> = options.iter().map(|option| option.trim_start_matches("--")).collect();
            let mut command = with_arguments(program.to_str().unwrap(), &[]);
            command.env("LD_PRELOAD", library).env("RING3_SHIM", items.join("\n"));
            command
        }
    };
    command.args(arguments);
    command
}

/// A command with the privileges of root: of our own, or of a user namespace's; or none after having said aloud why. What
/// programs may ask of the shim depends on privileges as it does with the kernel.
pub fn as_root(command: Command) -> Option<Command> {
    let own = rustix::process::geteuid().is_root()
        && rustix::thread::capabilities(None)
            .is_ok_and(|ours| ours.effective.contains(rustix::thread::CapabilitySet::SYS_RESOURCE));
    if own {
        return Some(command);
    }
    const NAMESPACE: [&str; 3] = ["--user", "--map-root-user", "--"];
    let probe = finish(with_arguments("unshare", &[&NAMESPACE[..], &["true"]].concat()), PATIENCE);
    if probe.code != Some(0) {
        super::skip(&format!("no root, and no user namespace: {}", probe.stderr.trim()));
        return None;
    }
    Some(behind("unshare", &NAMESPACE, &command))
}

/// The command as the last arguments of another program.
pub fn behind(program: &str, arguments: &[&str], command: &Command) -> Command {
    let mut outer = with_arguments(program, arguments);
    outer.arg(command.get_program()).args(command.get_args());
    outer.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    outer
}

/// Huge pages for as long as this lives, for one test at a time.
pub struct HugePages {
    before: String,
    /// Whether there are as many as the selftests need.
    pub enough: bool,
    _lock: File,
}

const POOL: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    /// As many as the largest test maps at once: 128 MiB; or none, where we may not.
    pub fn reserve() -> Self {
        let lock = File::create(super::scratch().join("hugepages.lock")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let before = std::fs::read_to_string(POOL).unwrap_or_default();
        let written = std::fs::write(POOL, "64").is_ok();
        let now = std::fs::read_to_string(POOL).unwrap_or_default();
        HugePages {
            before,
            enough: written && now.trim().parse::<u32>().is_ok_and(|now| now >= 64),
            _lock: lock,
        }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(POOL, self.before.trim());
    }
}

/// Lifts the limit of locked memory for what we start, where we may.
pub fn lift_memory_limit() {
    let _ = setrlimit(Resource::Memlock, Rlimit { current: None, maximum: None });
}

/// How a case of a program ended.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// As it should.
    Passed,
    /// The program itself saw no way to try.
    Skipped(String),
    /// What the program said about it.
    Failed(String),
}

/// What a program printed in the Test Anything Protocol, as the kernel's harness writes it.
#[derive(Debug, Default)]
pub struct Report {
    /// How many cases the program said it had.
    pub planned: usize,
    /// The cases and how they ended.
    pub cases: Vec<(String, Outcome)>,
}

impl Report {
    /// Reads it.
    pub fn parse(text: &str) -> Self {
        let mut report = Report::default();
        let mut said = String::new();
        for line in text.lines() {
            if let Some(plan) = line.strip_prefix("1..") {
                report.planned = plan.parse().unwrap_or(0);
            }
            let Some((failed, result)) = line
                .strip_prefix("ok ")
                .map(|rest| (false, rest))
                .or_else(|| line.strip_prefix("not ok ").map(|rest| (true, rest)))
            else {
                let _ = writeln!(said, "    {line}");
                continue;
            };
            let result = result.trim_start_matches(|digit: char| digit.is_ascii_digit()).trim_start();
            let (name, remark) = result.split_once(" # ").unwrap_or((result, ""));
            let said = std::mem::take(&mut said);
            let outcome = match (failed, remark.strip_prefix("SKIP")) {
                (true, _) => Outcome::Failed(said),
                (false, Some(why)) => Outcome::Skipped(why.trim().to_owned()),
                (false, None) => Outcome::Passed,
            };
            report.cases.push((name.to_owned(), outcome));
        }
        report
    }
}

/// What is expected of a case that does not simply pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// The real kernel skips it as well, or the machine cannot offer what it needs.
    Skip,
    /// ring3 does not pass it.
    Fail,
    /// It passes where there are huge pages, and is skipped where there are none.
    HugePages,
}

/// `expected.txt`: what is expected of the cases that do not simply pass, by program and case.
pub struct Expectations(BTreeMap<String, Vec<(String, Expected)>>);

impl Expectations {
    /// Reads the file.
    pub fn read() -> Self {
        let text = std::fs::read_to_string(here().join("expected.txt")).unwrap();
        let mut all: BTreeMap<String, Vec<_>> = BTreeMap::new();
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let mut words = line.split_whitespace();
            let (Some(program), Some(case), Some(verdict), Some(_reason)) =
                (words.next(), words.next(), words.next(), words.next())
            else {
                panic!("expected.txt: a line is PROGRAM CASE VERDICT REASON: {line}");
            };
            let verdict = match verdict {
                "skip" => Expected::Skip,
                "fail" => Expected::Fail,
                "hugepages" => Expected::HugePages,
                _ => panic!("expected.txt: no such verdict: {line}"),
            };
            all.entry(program.to_owned()).or_default().push((case.to_owned(), verdict));
        }
        Expectations(all)
    }

    /// Compares a program's report with what is expected. What is said is the counts; what is returned is what is wrong.
    pub fn compare(&self, program: &str, report: &Report, huge_pages: bool) -> Vec<String> {
        let listed = self.0.get(program).map_or(&[][..], Vec::as_slice);
        let mut used = vec![false; listed.len()];
        let mut wrong = Vec::new();
        let (mut passed, mut skipped, mut expected_failures) = (0, 0, 0);
        // A program that gives up before its first case has one, which it failed.
        let gave_up = [("start".to_owned(), Outcome::Failed("it planned nothing".into()))];
        let none = report.planned == 0 && report.cases.is_empty();
        let cases = if none { &gave_up[..] } else { &report.cases };
        let planned = if none { 1 } else { report.planned };
        for (case, outcome) in cases {
            let entry = listed.iter().position(|(pattern, _)| matches(pattern, case));
            if let Some(entry) = entry {
                used[entry] = true;
            }
            match (entry.map(|entry| listed[entry].1), outcome) {
                (None | Some(Expected::HugePages), Outcome::Passed) => passed += 1,
                (Some(Expected::HugePages), _) if !huge_pages => skipped += 1,
                (Some(Expected::Skip), Outcome::Skipped(_)) => skipped += 1,
                (Some(Expected::Fail), Outcome::Failed(_)) => expected_failures += 1,
                (Some(expected), Outcome::Passed) => {
                    wrong.push(format!("{case} passes, but is listed as {expected:?} in expected.txt"));
                }
                (_, Outcome::Skipped(why)) => wrong.push(format!("{case} was skipped: {why}")),
                (_, Outcome::Failed(said)) => wrong.push(format!("{case} failed:\n{said}")),
            }
        }
        for ((pattern, _), _) in listed.iter().zip(&used).filter(|(_, used)| !**used) {
            wrong.push(format!("expected.txt lists {pattern}, which {program} does not have"));
        }
        if cases.len() != planned {
            wrong.push(format!("{program} planned {planned} cases and reported {}", cases.len()));
        }
        let failed = planned.saturating_sub(passed + skipped + expected_failures);
        say(&format!(
            "{program}: {planned} cases: {passed} passed, {skipped} skipped, {expected_failures} expected failures, {failed} wrong"
        ));
        wrong
    }
}

/// Whether a case is meant by a pattern, which may contain one `*`.
fn matches(pattern: &str, case: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == case,
        Some((before, after)) => {
            case.len() >= before.len() + after.len() && case.starts_with(before) && case.ends_with(after)
        }
    }
}

/// Where ring3's answer to a probe is not the kernel's, on purpose: `differences.txt`.
struct Difference {
    probe: String,
    question: String,
    answer: String,
}

fn differences(probe: &str) -> Vec<Difference> {
    let text = std::fs::read_to_string(here().join("differences.txt")).unwrap();
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let all = lines.map(|line| {
        let parts: Vec<_> = line.split(" | ").map(str::trim).collect();
        let [probe, question, answer, _reason] = parts[..] else {
            panic!("differences.txt: a line is PROBE | QUESTION | ANSWER | REASON: {line}");
        };
        Difference { probe: probe.into(), question: question.into(), answer: answer.into() }
    });
    all.filter(|difference| difference.probe == probe).collect()
}

/// The real kernel's answers, in the order in which it was asked.
///
/// About devices, several cards were asked: what all of them answered alike is the kernel's own answer, and stays. What
/// else they answered is a matter of the card.
pub struct Answers(Vec<(String, String)>);

impl Answers {
    /// Reads `answers/NAME.txt` for each name.
    pub fn read(names: &[&str]) -> Self {
        let mut all = names.iter().map(|name| {
            let text = std::fs::read_to_string(here().join("answers").join(format!("{name}.txt"))).unwrap();
            Self::parse(&text).0
        });
        let mut common = all.next().unwrap();
        for other in all {
            let mut other = by_question(other);
            common.retain(|(question, answer)| {
                other.get_mut(question).and_then(VecDeque::pop_front).is_some_and(|theirs| theirs == *answer)
            });
        }
        Answers(common)
    }

    /// What a probe printed.
    pub fn parse(text: &str) -> Self {
        let split = |line: &str| match line.rsplit_once(": ") {
            Some((question, answer)) => (question.to_owned(), answer.to_owned()),
            None => (line.to_owned(), String::new()),
        };
        Answers(text.lines().map(split).collect())
    }

    /// Compares another's answers with these. What is said is the counts; what is returned is what is wrong.
    pub fn compare(self, probe: &str, others: Answers, card: bool) -> Vec<String> {
        let differences = differences(probe);
        let mut used = vec![false; differences.len()];
        let mut wrong = Vec::new();
        let (mut same, mut listed) = (0, 0);
        let total = self.0.len();
        let mut others = by_question(others.0);
        for (question, expected) in self.0 {
            let answer = others.get_mut(&question).and_then(VecDeque::pop_front);
            let answer = answer.as_deref().unwrap_or("no answer");
            let difference = differences.iter().position(|difference| {
                matches(&difference.question, &question) && difference.answer == answer
            });
            if answer == expected {
                same += 1;
            } else if let Some(difference) = difference {
                used[difference] = true;
                listed += 1;
            } else {
                wrong.push(format!("{question}: {answer}, but the kernel says {expected}"));
            }
        }
        // A card has questions of its own.
        for (question, answers) in others.iter().filter(|(_, answers)| !card && !answers.is_empty()) {
            wrong.push(format!("{question}: {answers:?}, which the kernel was not asked"));
        }
        for (difference, _) in differences.iter().zip(&used).filter(|(_, used)| !**used) {
            let Difference { question, answer, .. } = difference;
            wrong.push(format!("differences.txt lists {question}: {answer}, which is not a difference"));
        }
        let count = wrong.len();
        say(&format!(
            "probe {probe}: {total} answers: {same} as the kernel's, {listed} listed differences, {count} wrong"
        ));
        wrong
    }
}

/// Questions repeat within a section: the second one is compared with the second.
fn by_question(answers: Vec<(String, String)>) -> BTreeMap<String, VecDeque<String>> {
    let mut by_question: BTreeMap<String, VecDeque<String>> = BTreeMap::new();
    for (question, answer) in answers {
        by_question.entry(question).or_default().push_back(answer);
    }
    by_question
}
