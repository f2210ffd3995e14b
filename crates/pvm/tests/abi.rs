//! The ABI row by row: what each MSR, hypercall, instruction, field and event does, in bytes and registers.
//!
//! Numbers and offsets are written out, as the specification has them, instead of taken from the crate.
#![allow(clippy::unwrap_used, reason = "in tests a panic is the report")]

mod rig;

mod abi {
    mod events;
    mod hypercalls;
    mod instructions;
    mod msrs;
    mod pvcs;
    mod returns;
    mod shutdown;
}
