//! The kernel's iommufd and VFIO devices for unmodified programs.

#![deny(unsafe_code)]

mod caller;
mod calls;
mod configuration;
mod errno;
mod inside;
#[cfg(not(test))]
mod interpose;
mod mapped;
mod moving;
mod node;
mod nodes;
mod paths;
mod process;
mod real;
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
