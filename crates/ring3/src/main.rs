//! Linux's virtualization stack in user space.

fn main() {}
