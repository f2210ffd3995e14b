//! Any file as a kernel.
#![no_main]

use libfuzzer_sys::fuzz_target;
use machine::loader::load_anything;
use vm_memory::{GuestAddress, GuestMemoryMmap};

const RAM: usize = 32 << 20;

fuzz_target!(|data: &[u8]| {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
    let _ = load_anything(data.to_vec(), &memory, RAM as u64);
});
