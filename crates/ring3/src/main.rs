//! ring3.
fn main() {}
