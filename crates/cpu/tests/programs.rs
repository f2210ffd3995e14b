//! Small guest programs for privileged state.
#![allow(clippy::unwrap_used, reason = "in tests a panic is the report")]

mod harness;

mod programs {
    mod control;
    mod debug;
    mod events;
    mod keys;
    mod modes;
    mod paging;
    mod ports;
    mod pvm_events;
    mod pvm_hostile;
    mod pvm_instructions;
    mod pvm_modes;
    mod pvm_paging;
    mod pvm_segments;
    mod segments;
    mod sharing;
}
