//! Medians, ratios, and their table in Markdown.

use std::fmt::Write as _;

use crate::machine::{Machine, Sample};

/// A row: its name, the figure, and whether more is better.
type Row = (&'static str, fn(&Sample) -> Option<f64>, bool);

const ROWS: [Row; 8] = [
    ("first user-space line, s", |s| Some(s.first_line), false),
    ("integer loop, M instr/s", |s| Some(s.integer), true),
    ("500 x fork+exec, s", |s| Some(s.spawn), false),
    ("64 MB page-fault sweep, s", |s| Some(s.sweep), false),
    ("whole run, s", |s| Some(s.total), false),
    ("processor time of the whole run, s", |s| Some(s.processor), false),
    ("host memory at peak, MiB", |s| Some(s.peak), false),
    ("host memory beyond what the guest touched, MiB", |s| s.touched.map(|touched| s.peak - touched), false),
];

/// One run's figures.
pub(crate) fn one_line(s: &Sample) -> String {
    format!(
        "first line {:.3} s, integer {:.1} M/s, spawn {:.3} s, sweep {:.3} s, total {:.3} s, processor {:.3} s, \
         peak {:.1} MiB",
        s.first_line, s.integer, s.spawn, s.sweep, s.total, s.processor, s.peak
    )
}

/// The middle value, or the mean of the two in the middle. `None` if there is none.
fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = *values.get(values.len().checked_sub(1)? / 2)?;
    Some((lower + upper) / 2.0)
}

/// The table: a column for each machine, and ring3 (the first) relative to the best of the others.
pub(crate) fn render(columns: &[(Machine, Vec<Sample>)]) -> String {
    let mut text = String::new();
    let runs = columns.first().map_or(0, |(_, samples)| samples.len());
    let names: Vec<&str> = columns.iter().map(|(machine, _)| machine.name).collect();
    // Writing to a String cannot fail.
    let _ = writeln!(text, "| median of {runs} | {} | ring3 / best TCG |", names.join(" | "));
    let _ = writeln!(text, "|---|{}---:|", "---:|".repeat(names.len()));
    for (name, figure, more_is_better) in ROWS {
        let of_column = |runs: &[Sample]| runs.iter().map(figure).collect::<Option<_>>().and_then(median);
        let medians: Vec<_> = columns.iter().map(|(_, samples)| of_column(samples)).collect();
        let best = medians.iter().skip(1).flatten().copied().reduce(if more_is_better {
            f64::max
        } else {
            f64::min
        });
        let ratio = match (medians.first(), best) {
            (Some(Some(ours)), Some(best)) => format!("{:.2}", ours / best),
            _ => "-".into(),
        };
        let cells = medians.iter().map(|m| m.map_or("-".into(), |m| format!("{:.*}", digits(m), m)));
        let _ = writeln!(text, "| {name} | {} | {ratio} |", cells.collect::<Vec<String>>().join(" | "));
    }
    text
}

/// Decimals that make three or four figures.
fn digits(value: f64) -> usize {
    match value {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_odd_even_and_no_values() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![4.0, 1.0, 2.0, 3.0]), Some(2.5));
        assert_eq!(median(vec![]), None);
    }

    #[test]
    fn ring3_is_set_against_the_best_peer() {
        let sample = |first_line, integer| Sample { first_line, integer, ..Sample::default() };
        let column = |name, first_line, integer| (Machine::named(name), vec![sample(first_line, integer)]);
        let text = render(&[column("ring3", 6.0, 100.0), column("a", 4.0, 900.0), column("b", 2.0, 1000.0)]);
        assert!(text.contains("| first user-space line, s | 6.00 | 4.00 | 2.00 | 3.00 |"), "{text}");
        assert!(text.contains("| integer loop, M instr/s | 100 | 900 | 1000 | 0.10 |"), "{text}");
    }
}
