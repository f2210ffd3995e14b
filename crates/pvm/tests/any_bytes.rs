//! Whatever a guest does, the state machine ends in the architectural fault, the documented error or a triple fault.

use std::cell::RefCell;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use pvm::Stats;
use pvm::testing::deliver_anything;

/// The body of the fuzz target, about a second of it.
#[test]
fn a_second_of_fuzzing() {
    let config = Config { cases: 4000, failure_persistence: None, ..Config::default() };
    let seed = TestRng::from_seed(RngAlgorithm::ChaCha, &[0x3a; 32]);
    let all = RefCell::new(Stats::default());
    TestRunner::new_with_rng(config, seed)
        .run(&vec(any::<u8>(), 0..800), |bytes| {
            all.borrow_mut().add(&deliver_anything(&bytes));
            Ok(())
        })
        .unwrap_or_else(|e| panic!("{e}"));
    // It gets everywhere.
    let all = all.into_inner();
    let [user, exceptions, interrupts] =
        [all.user_events, all.supervisor_exceptions, all.supervisor_interrupts];
    let counters = [user, exceptions, interrupts, all.syscalls, all.user_returns, all.supervisor_returns];
    assert!(counters.iter().all(|n| *n > 50), "{all:?}");
}
