//! Samples, medians, ratios, and their table in Markdown.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::measure::Row;
use crate::subject::Subject;

/// Every figure measured.
pub(crate) struct Samples {
    columns: Vec<Subject>,
    values: BTreeMap<(Row, Subject), Vec<f64>>,
}

impl Samples {
    pub(crate) fn new(columns: &[Subject]) -> Self {
        Self { columns: columns.to_vec(), values: BTreeMap::new() }
    }

    pub(crate) fn add(&mut self, subject: Subject, row: Row, value: f64) {
        self.values.entry((row, subject)).or_default().push(value);
    }

    fn median(&self, row: Row, subject: Subject) -> Option<f64> {
        median(self.values.get(&(row, subject))?.clone())
    }

    /// The table: a column for each subject, and ring3 relative to the best of the peers.
    pub(crate) fn render(&self, runs: usize) -> String {
        let names: Vec<&str> = self.columns.iter().map(|subject| subject.name()).collect();
        let mut text = String::new();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "| median of {runs} | {} | ring3 / best peer |", names.join(" | "));
        let _ = writeln!(text, "|---|{}---:|", "---:|".repeat(names.len()));
        let mut rows: Vec<Row> = self.values.keys().map(|(row, _)| *row).collect();
        rows.dedup();
        for row in rows {
            let of = |subject: &Subject| self.median(row, *subject);
            let peers = self.columns.iter().filter(|subject| subject.is_peer()).filter_map(of);
            let best = peers.reduce(if row.more_is_better() { f64::max } else { f64::min });
            let ratio = match (of(&Subject::Ring3), best) {
                (Some(ours), Some(best)) if best > 0.0 => format!("{:.2}", ours / best),
                _ => "-".into(),
            };
            let cells = self.columns.iter().map(|subject| of(subject).map_or("-".into(), figure));
            let _ = writeln!(text, "| {row} | {} | {ratio} |", cells.collect::<Vec<String>>().join(" | "));
        }
        text
    }
}

/// The middle value, or the mean of the two in the middle. `None` if there is none.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get(values.len().checked_sub(1)? / 2)?;
    Some((lower + upper) / 2.0)
}

/// With the decimals that make three or four figures.
fn figure(value: f64) -> String {
    let decimals = match value {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subject::Way;

    #[test]
    fn medians_of_odd_even_and_no_values() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn ring3_is_set_against_the_best_peer_and_not_against_the_limits() {
        let mut samples = Samples::new(&Subject::ALL);
        let (rate, time) = (Row::Spliced, Row::RoundTrip { ipv6: false, way: Way::Out });
        for (subject, gigabits, micros) in [
            (Subject::Ring3, 30.0, 25.0),
            (Subject::PastaNewest, 15.0, 33.0),
            (Subject::Slirp, 10.0, 50.0),
            (Subject::Veth, 60.0, 12.5),
        ] {
            samples.add(subject, rate, gigabits);
            samples.add(subject, time, micros);
        }
        let text = samples.render(1);
        assert!(text.contains("| 30.0 | 15.0 | - | 10.0 | 60.0 | - | 2.00 |"), "{text}");
        assert!(text.contains("| 25.0 | 33.0 | - | 50.0 | 12.5 | - | 0.76 |"), "{text}");
    }
}
