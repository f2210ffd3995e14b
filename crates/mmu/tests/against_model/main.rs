//! The crate against a second, deliberately plain model of the architecture: every combination of what an entry,
//! an access and the control registers can say, level by level, and random tables.

mod enumerate;
mod enumerate_host;
mod model;
mod random;
