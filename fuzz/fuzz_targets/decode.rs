//! Random bytes as guest code, in any mode and state.
#![no_main]

use std::cell::RefCell;

use cpu::testing::Subject;
use libfuzzer_sys::fuzz_target;
use mmu::testing::Choices;

thread_local! {
    static SUBJECT: RefCell<Subject> = RefCell::new(Subject::new().unwrap());
}

fuzz_target!(|data: &[u8]| {
    SUBJECT.with_borrow_mut(|subject| subject.execute_anything(&mut Choices::from_bytes(data)));
});
