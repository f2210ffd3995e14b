//! Any paging state, any tables, any access.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mmu::testing::{Choices, translate_anything};

fuzz_target!(|data: &[u8]| translate_anything(&mut Choices::from_bytes(data)));
