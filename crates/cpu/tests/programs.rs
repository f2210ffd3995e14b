//! Small guest programs for privileged state.

mod harness;

mod programs {
    mod control;
    mod debug;
    mod events;
    mod modes;
    mod paging;
    mod ports;
    mod segments;
    mod sharing;
}
