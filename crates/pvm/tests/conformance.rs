//! `src/conformance.md` names a test for each row: are they there?

use std::fs;
use std::path::{Path, PathBuf};

const TABLES: &str = include_str!("../src/conformance.md");

/// The rows of all tables, without their heads: the cells of each.
fn rows() -> Vec<Vec<&'static str>> {
    let cells = |line: &'static str| -> Vec<_> {
        let line = line.strip_prefix('|').and_then(|l| l.trim_end().strip_suffix('|'));
        line.expect("a row of a table").split('|').map(str::trim).collect()
    };
    let lines: Vec<_> = TABLES.lines().collect();
    let mut rows = Vec::new();
    for (n, line) in lines.iter().enumerate() {
        let next = lines.get(n + 1).unwrap_or(&"");
        let head = line.starts_with("|---") || next.starts_with("|---");
        if line.starts_with('|') && !head {
            rows.push(cells(line));
        }
    }
    rows
}

/// The names between backquotes.
fn names(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// A file of the workspace, or of this crate alone if that is all there is.
fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn has(path: &Path, what: &str) -> bool {
    fs::read_to_string(path).is_ok_and(|text| text.contains(what))
}

/// Whether `name` is the name of a test or a check. Those of other crates count as there if the crate is not.
fn exists(name: &str) -> bool {
    if let Some((group, check)) = name.split_once('/') {
        let checks = source("pvm-guest/src/checks");
        return !checks.exists() || has(&checks.join(format!("{group}.rs")), &format!("check(\"{check}\","));
    }
    let mut parts = name.rsplit("::");
    let (Some(function), Some(file)) = (parts.next(), parts.next()) else { return false };
    let test = format!("#[test]\nfn {function}() {{");
    if parts.next() == Some("cpu") {
        return !source("cpu").exists() || has(&source(&format!("cpu/tests/programs/{file}.rs")), &test);
    }
    let unit = format!("    #[test]\n    fn {function}() {{");
    ["pvm/tests/abi", "pvm/tests"].iter().any(|folder| has(&source(&format!("{folder}/{file}.rs")), &test))
        || has(&source(&format!("pvm/src/{file}.rs")), &unit)
}

#[test]
fn every_row_names_tests_that_are_there() {
    let rows = rows();
    assert!(rows.len() > 80, "{} rows", rows.len());
    let mut missing = Vec::new();
    for row in rows {
        let names = row.last().map(|cell| names(cell)).unwrap_or_default();
        assert!(!names.is_empty(), "no test in the row of {row:?}");
        missing.extend(names.into_iter().filter(|name| !exists(name)));
    }
    assert!(missing.is_empty(), "no such test or check: {missing:#?}");
}

#[test]
fn every_row_fits_its_table() {
    let mut columns = 0;
    for line in TABLES.lines() {
        let count = line.matches('|').count();
        if line.starts_with("|---") {
            columns = count;
        } else if line.starts_with('|') && columns != 0 {
            assert_eq!(count, columns, "{line}");
        } else if line.is_empty() {
            columns = 0;
        }
    }
}

#[test]
fn a_name_that_is_not_there_is_missed() {
    assert!(exists("msrs::numbers") && exists("range::borders"));
    assert!(!exists("msrs::numbers_"));
    assert!(!exists("msrs::number"));
    assert!(!exists("numbers"));
    // A function that is no test.
    assert!(!exists("events::frame_bytes"));
}
