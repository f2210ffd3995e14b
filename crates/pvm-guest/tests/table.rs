//! The table of checks in the crate's documentation and the checks themselves name each other. (The kernel itself
//! cannot run here: `ring3 pvm selftest` boots it.)

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The texts between `open` and the next `close`.
fn between<'a>(text: &'a str, open: &'a str, close: char) -> impl Iterator<Item = &'a str> {
    text.split(open).skip(1).filter_map(move |rest| rest.split_once(close).map(|(inside, _)| inside))
}

/// `group/name` of each check in the sources.
fn checks(source: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for file in fs::read_dir(source.join("checks")).unwrap() {
        let text = fs::read_to_string(file.unwrap().path()).unwrap();
        let Some((_, list)) = text.split_once("= group(") else { continue };
        let group = list.split('"').nth(1).unwrap();
        for name in between(list, "check(\"", '"') {
            assert!(found.insert(format!("{group}/{name}")), "{group}/{name} is there twice");
        }
    }
    found
}

#[test]
fn documentation_names_every_check_and_no_other() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let checks = checks(&source);
    assert!(checks.len() > 150, "{}", checks.len());
    let text = fs::read_to_string(source.join("lib.rs")).unwrap();
    let tables: String = text.lines().filter(|line| line.starts_with("//! |")).collect();
    let named: BTreeSet<&str> = tables.split('`').skip(1).step_by(2).filter(|n| n.contains('/')).collect();
    for name in &named {
        let prefix = name.strip_suffix('*').unwrap_or(name);
        let found = checks.iter().any(|check| check == name || prefix != *name && check.starts_with(prefix));
        assert!(found, "there is no check {name}");
    }
    for check in &checks {
        let covers =
            |name: &&&str| name.strip_suffix('*').map_or(**name == check, |prefix| check.starts_with(prefix));
        assert!(named.iter().any(|name| covers(&name)), "{check} is in no row of the documentation's tables");
    }
}
