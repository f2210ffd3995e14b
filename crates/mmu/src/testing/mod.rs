//! What tests of page walking need: memory, random choices, whole scenes. Behind the feature `testing`.
//!
//! Everything is made from a [`Choices`], which is a seed or a fuzzer's bytes, so that tests, fuzz targets and
//! other crates share one generator.

mod choices;
mod memory;
mod scene;

pub use choices::Choices;
pub use memory::FlatMemory;
pub use scene::{Host, Scene, any_access, any_state};

use crate::{NestedWalk, PageTableMemory, PageWalk};

/// Translates one address with any registers over any memory: the body of a fuzz target. The result is not
/// looked at; the point is that there is one.
pub fn translate_anything(choices: &mut Choices<'_>) {
    let mut memory = FlatMemory::new(8 << 12);
    let state = any_state(choices);
    // The few words that a walk may meet, at places that the choices name.
    for _ in 0..16 {
        memory.set_u64(choices.below(8 << 9) * 8, choices.word());
    }
    let walk = PageWalk::new(&state);
    let gva = crate::Gva(choices.word());
    let access = any_access(choices);
    let _ = crate::load_pdptrs(&memory, state.cr3, state.maxphyaddr);
    let _ = walk.probe(&memory, gva, access);
    if let Ok(translation) = walk.translate(&memory, gva, access) {
        let _ = memory.read_u64(translation.gpa.page());
    }
    let host = Host::any(choices);
    if let Some(host) = host.walk() {
        let nested = NestedWalk { guest: walk, host };
        let _ = nested.load_pdptrs(&memory, state.cr3, state.maxphyaddr);
        let _ = nested.probe(&memory, gva, access);
        let _ = nested.translate(&memory, gva, access);
        let _ = host.translate(&memory, gva, access);
    }
}
