//! The kernel's iommufd and VFIO devices for unmodified programs: a library that is loaded before libc (`LD_PRELOAD`).
//!
//! # Theory of operation
//!
//! The library exports the functions by which a program opens, uses and closes files (`interpose`). Each asks whether the path
//! (`paths`) or the descriptor (`table`) is one that is served here, and if not calls the function of the same name in
//! the next library (`real`), with the same arguments. Most calls of most programs end there, so asking is cheap, takes no
//! lock, and is safe in signal handlers.
//!
//! What is served are nodes (`node::Node`, made by `configuration` from the environment), which opening makes files of
//! (`node::ServedFile`). A real descriptor of the machine's kernel stands for each. `calls` turns a C function's
//! arguments into a call of such a file, `caller` is who calls, and `process` and `user` are its memory.
//!
//! Three things need more than that:
//!
//! - Memory that the program gives up while devices use it is moved away first (`moving`), and mappings of served files hold
//!   what they are of until they are unmapped (`mapped`).
//! - A child after a fork uses its parent's files by a socket (`share`).
//! - Files in sysfs and debugfs are real files elsewhere (`tree`).
//!
//! `unsafe` is in what touches C: `interpose`, `real`, `errno`, `user`, `start`, `registers`, the page of `owner`, and the signal mask
//! in `share`.

#![deny(unsafe_code)]
#![cfg_attr(
    test,
    allow(dead_code, reason = "the exported functions, which use the rest, are left out of a test")
)]

mod caller;
mod calls;
mod configuration;
mod errno;
mod inside;
#[cfg(not(test))]
mod interpose;
mod kept;
mod listing;
mod mapped;
mod moving;
mod node;
mod nodes;
mod owner;
mod paths;
mod process;
mod real;
mod registers;
mod served;
mod share;
mod start;
mod table;
mod tree;
mod user;

/// Tells the user what this library cannot do, on the program's standard error: it has no other place.
fn complain(what: &str) {
    let _ = rustix::io::write(rustix::stdio::stderr(), format!("ring3 shim: {what}\n").as_bytes());
}
