//! The first process in a ring3 guest.

fn main() {}
