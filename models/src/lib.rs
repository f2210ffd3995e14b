//! Lock-free parts of ring3 under a model checker.
//!
//! loom runs small programs in every order in which their threads can go on, and lets each load return every value that the
//! language's memory model allows. What runs are the files of the crates themselves, compiled once more with loom's
//! atomics and locks in place of the standard library's.
//!
//!     cargo test --manifest-path models/Cargo.toml
//!
//! takes some seconds when loom is compiled. A model is believed when it finds what was broken on purpose: without any one of
//! the fences of `epoch.rs`, with readers' stores or waiters' looks ordered less, without the gate around a wake or the look
//! after one, a program here fails.

#![cfg(test)]

mod epoch;
