//! Any sequence of events, SYSCALLs, MSR writes and changes of memory.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pvm::testing::deliver_anything;

fuzz_target!(|data: &[u8]| {
    deliver_anything(data);
});
