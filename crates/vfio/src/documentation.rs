//! What the documentation has of the code: tables that are made of tables there, and the first programs.

use std::path::Path;

/// Where a table ends in the documentation.
const END: &str = "<!-- end -->";

/// Checks that `docs/FILE` has `table` between its marks, or puts it there when `RING3_REGENERATE` is set. `command` is the
/// one that regenerates it, which the first mark names.
pub(crate) fn check(file: &str, command: &str, table: &str) {
    let begin = format!("<!-- generated: RING3_REGENERATE=1 {command} -->\n");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs").join(file);
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(&begin).expect("the mark before the table");
    let (_, after) = rest.split_once(END).expect("the mark behind the table");
    let wanted = [before, &begin, table, END, after].concat();
    if std::env::var_os("RING3_REGENERATE").is_some() {
        std::fs::write(&path, wanted).unwrap();
    } else {
        assert!(text == wanted, "docs/{file} is old: run this test with RING3_REGENERATE=1");
    }
}

#[test]
fn first_programs_are_examples() {
    let examples = [include_str!("../examples/first_program.rs"), include_str!("../examples/host_device.rs")];
    let lines = |text: &str| text.lines().map(|line| format!("{}\n", line.trim())).collect::<String>();
    let examples = examples.map(lines);
    let programs: Vec<_> = include_str!("../../../docs/vfio.md").split("```rust\n").skip(1).collect();
    assert_eq!(programs.len(), examples.len());
    for (program, example) in programs.iter().zip(examples) {
        let (program, _) = program.split_once("```").unwrap();
        assert!(example.contains(&lines(program)), "no example has:\n{program}");
    }
}
