//! What the guest reports, line by line.
//!
//! The form is that of the Test Anything Protocol, with a last line of its own:
//!
//! ```text
//! 1..3
//! ok 1 msr/range-narrows
//! ok 2 paging/five-levels # skip no LA57
//! not ok 3 event/nmi-masked : NMIs taken is 0x2, should be 0x1
//! pvm-guest: FAIL 1 of 3 checks, 1 skipped
//! ```
//!
//! The last line is `pvm-guest: PASS 3 checks, 1 skipped` when all is well; the guest powers off behind it. Other lines
//! are remarks. The guest is not trusted to keep to this: a report counts as good only if the plan, the checks and the last
//! line agree.

use crate::run::console::Tail;

/// Who speaks in the last line.
const NAME: &str = "pvm-guest: ";
/// A longer line is cut.
const LONGEST_LINE: usize = 512;
/// Last lines that are shown of a guest that did not get to its end.
const SHOWN: usize = 16;
/// More checks than any guest of ours has. The rest is not kept.
const MOST_CHECKS: usize = 10_000;

/// One check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Check {
    /// From 1 on, in the order of the plan.
    pub number: u32,
    /// What is checked: `group/rule`.
    pub name: String,
    /// How it came out.
    pub outcome: Outcome,
}

/// How a check came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The rule holds.
    Passed,
    /// The machine does not offer what the rule is about; and why the guest thinks so.
    Skipped(String),
    /// The rule does not hold; and what the guest saw.
    Failed(String),
}

impl Check {
    /// Reads a line, if it is about a check.
    fn parse(line: &str) -> Option<Self> {
        let (passed, rest) = match line.strip_prefix("not ok ") {
            Some(rest) => (false, rest),
            None => (true, line.strip_prefix("ok ")?),
        };
        let (number, rest) = rest.split_once(' ')?;
        let number = number.parse().ok()?;
        let (name, outcome) = match (passed, rest.split_once(" # skip"), rest.split_once(": ")) {
            (true, Some((name, why)), _) => (name, Outcome::Skipped(why.trim().to_owned())),
            (true, None, _) => (rest, Outcome::Passed),
            (false, _, Some((name, why))) => (name.trim_end(), Outcome::Failed(why.to_owned())),
            (false, _, None) => (rest, Outcome::Failed(String::new())),
        };
        Some(Self { number, name: name.to_owned(), outcome })
    }
}

/// A report as it comes in.
#[derive(Debug, Default)]
pub struct Report {
    partial: Vec<u8>,
    /// How many checks were announced.
    plan: Option<u32>,
    checks: Vec<Check>,
    /// What the last line said behind [`NAME`].
    verdict: Option<String>,
    /// The last lines, for a guest that did not get to its end.
    tail: Tail,
}

impl Report {
    /// Takes the next bytes; returns the lines that they complete, without what could command a terminal.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        self.tail.push(bytes);
        let mut lines = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                let line = String::from_utf8_lossy(&self.partial);
                let line: String = line.chars().filter(|c| !c.is_control()).collect();
                self.partial.clear();
                self.take(&line);
                lines.push(line);
            } else if self.partial.len() < LONGEST_LINE {
                self.partial.push(byte);
            }
        }
        lines
    }

    fn take(&mut self, line: &str) {
        if let Some(check) = Check::parse(line) {
            if self.checks.len() < MOST_CHECKS {
                self.checks.push(check);
            }
        } else if let Some(count) = line.strip_prefix("1..").and_then(|n| n.parse().ok()) {
            self.plan = Some(count);
        } else if let Some(words) = line.strip_prefix(NAME)
            && (words.starts_with("PASS") || words.starts_with("FAIL"))
        {
            self.verdict = Some(words.to_owned());
        }
    }

    /// The checks so far.
    #[must_use]
    pub fn checks(&self) -> &[Check] {
        &self.checks
    }

    /// Whether the guest announced that it checks nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.plan == Some(0)
    }

    /// Whether every check of the plan has been reported, in order.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        let in_order = self.checks.iter().zip(1..).all(|(check, number)| check.number == number);
        in_order && self.plan.is_some_and(|plan| plan as usize == self.checks.len() && plan > 0)
    }

    /// How many checks passed, and how many were skipped.
    #[must_use]
    pub fn counts(&self) -> (usize, usize) {
        let count = |skipped: bool| {
            let counted = self.checks.iter().filter(|check| match check.outcome {
                Outcome::Passed => !skipped,
                Outcome::Skipped(_) => skipped,
                Outcome::Failed(_) => false,
            });
            counted.count()
        };
        (count(false), count(true))
    }

    /// What is wrong, in lines for the user; nothing if the guest is content and its report whole.
    #[must_use]
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for check in &self.checks {
            if let Outcome::Failed(why) = &check.outcome {
                problems.push(format!("not ok {} {}: {why}", check.number, check.name));
            }
        }
        let count = self.checks.len();
        match (self.plan, self.is_complete()) {
            (_, true) => {}
            (None, _) => problems.push(format!("the guest gave no plan; it reported {count} checks")),
            (Some(plan), _) if plan as usize != count => {
                problems.push(format!("the guest reported {count} of {plan} checks"));
            }
            (Some(_), _) => problems.push("the guest's checks are out of order".to_owned()),
        }
        let (_, skipped) = self.counts();
        match &self.verdict {
            Some(words) if *words == format!("PASS {count} checks, {skipped} skipped") => {}
            Some(words) => problems.push(format!("the guest's verdict: {words}")),
            None => problems.push("the guest gave no verdict".to_owned()),
        }
        if self.verdict.is_none() || !self.is_complete() {
            let said = self.tail.lines();
            problems.push("the guest's last lines (-v shows all):".to_owned());
            problems.extend(said.iter().rev().take(SHOWN).rev().map(|line| format!("| {line}")));
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Report {
        let mut report = Report::default();
        report.push(text.as_bytes());
        report
    }

    #[test]
    fn a_whole_report_is_good() {
        let report = read(
            "pvm-guest: by PVH\r\n1..3\r\nok 1 a/b\r\nok 2 c # skip no LA57\r\n# why\r\nok 3 d: e\r\npvm-guest: PASS 3 checks, 1 skipped\r\n",
        );
        assert_eq!(report.problems(), [""; 0]);
        assert_eq!(report.counts(), (2, 1));
        assert_eq!(
            report.checks()[1],
            Check { number: 2, name: "c".into(), outcome: Outcome::Skipped("no LA57".into()) }
        );
        assert_eq!(report.checks()[2].name, "d: e");
    }

    #[test]
    fn whatever_is_missing_is_told() {
        for (text, words) in [
            ("", "no plan"),
            ("", "no verdict"),
            ("1..2\nok 1 a\npvm-guest: PASS 1 checks, 0 skipped\n", "reported 1 of 2 checks"),
            ("1..1\nok 1 a\nok 2 b\npvm-guest: PASS 2 checks, 0 skipped\n", "reported 2 of 1 checks"),
            ("1..2\nok 2 a\nok 1 b\npvm-guest: PASS 2 checks, 0 skipped\n", "out of order"),
            ("1..0\npvm-guest: PASS 0 checks, 0 skipped\n", "out of order"),
            ("1..1\nok 1 a\noops", "no verdict"),
            ("1..1\nok 1 a\npvm-guest: PASS 1 che", "| pvm-guest: PASS 1 che"),
            ("1..1\nok 1 a\npvm-guest: PASS 2 checks, 0 skipped\n", "verdict: PASS 2"),
            ("1..1\nnot ok 1 a : saw 3\npvm-guest: FAIL 1 of 1 checks, 0 skipped\n", "not ok 1 a: saw 3"),
            ("1..1\nok 1 a # skip b\npvm-guest: PASS 1 checks, 0 skipped\n", "verdict: PASS 1"),
            ("1..1\nnot ok 1 a: saw 3\npvm-guest: FAIL 1 of 1 checks\n", "verdict: FAIL"),
            ("1..1\nnot ok 1 a\npvm-guest: PASS 1 checks, 0 skipped\n", "not ok 1 a: "),
            ("pvm-guest: this machine is not a PVM hypervisor\n", "| pvm-guest: this machine is"),
        ] {
            let problems = read(text).problems();
            assert!(problems.iter().any(|line| line.contains(words)), "{words:?} in {problems:?}");
        }
    }

    #[test]
    fn nonsense_is_kept_small_and_clean() {
        let mut report = Report::default();
        assert!(report.push(&[b'x'; 100_000]).is_empty());
        let lines = report.push(b"\x1b[2J\xff\nok\nok x y\nnot ok 1\n1..x\n");
        assert_eq!(lines[0].len(), LONGEST_LINE);
        assert!(report.checks().is_empty());
        assert_eq!(report.push(b"\x1b[2Ja\xff\n"), ["[2Ja\u{fffd}"]);
        for _ in 0..MOST_CHECKS + 10 {
            report.push(b"ok 1 a\n");
        }
        assert_eq!(report.checks().len(), MOST_CHECKS);
    }
}
