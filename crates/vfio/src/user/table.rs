//! The table of commands in `docs/vfio-user.md`.

use std::fmt::Write as _;

use super::wire::{COMMANDS, Sender};
use crate::documentation;

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
    documentation::check("vfio-user.md", "cargo test -p vfio user::table", &table());
}
