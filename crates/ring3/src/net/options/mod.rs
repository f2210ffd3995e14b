//! What `pasta` and `passt` are told on the command line.
//!
//! Three layers: [`args`] are the options as `clap` types, whose arguments are typed ([`values`], [`ports`]);
//! [`settings`] is what the front ends consume, checked: options that exclude each other are found here, and
//! each has its error. [`network`] makes the engine's configuration of the host's network and of what was said.

pub mod args;
mod check;
pub mod network;
pub mod ports;
pub mod settings;
pub mod table;
pub mod values;

pub use args::{PasstArgs, PastaArgs, Vhost};
pub use check::{BadOptions, ephemeral_ports};
pub use settings::{Common, PasstSettings, PastaSettings};

#[cfg(test)]
mod tests;
