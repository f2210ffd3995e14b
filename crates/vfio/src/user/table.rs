//! The table of commands in `docs/vfio-user.md`.

use std::fmt::Write as _;
use std::path::Path;

use super::wire::{COMMANDS, Sender};

fn table() -> String {
    let mut table = String::from("| command | number | from | support |\n|---|---|---|---|\n");
    for row in COMMANDS {
        let sender = match row.sender {
            Sender::Client => "client",
            Sender::Server => "server",
        };
        // Writing to a string cannot fail.
        let _ = writeln!(table, "| `{}` | {} | {sender} | {} |", row.name, row.command as u16, row.support);
    }
    table
}

#[test]
fn the_documentation_is_up_to_date() {
    const MARKS: [&str; 2] =
        ["<!-- generated: RING3_REGENERATE=1 cargo test -p vfio user::table -->\n", "<!-- end -->"];
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/vfio-user.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(MARKS[0]).expect("the mark before the table");
    let (_, after) = rest.split_once(MARKS[1]).expect("the mark behind the table");
    let wanted = format!("{before}{}{}{}{after}", MARKS[0], table(), MARKS[1]);
    if std::env::var_os("RING3_REGENERATE").is_some() {
        std::fs::write(&path, wanted).unwrap();
    } else {
        assert!(text == wanted, "docs/vfio-user.md is old: run this test with RING3_REGENERATE=1");
    }
}
