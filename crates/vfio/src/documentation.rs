//! Tables in the documentation that are made of tables in the code.

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
