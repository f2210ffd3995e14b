//! What the process that serves a guest's network may still do.

pub mod user;
