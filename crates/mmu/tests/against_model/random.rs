//! Random tables from fixed seeds: the crate against the plain model, results and memory.

use crate::model::compare;
use mmu::testing::{Choices, Scene, any_access};
use mmu::{Gva, PagingMode};

const MODES: [PagingMode; 5] =
    [PagingMode::None, PagingMode::Bits32, PagingMode::Pae, PagingMode::Level4, PagingMode::Level5];

#[test]
fn linear_walks_agree_with_the_model() {
    for mode in MODES {
        let mut found = 0;
        for seed in 0..25 {
            let mut choices = Choices::seeded(seed);
            let mut scene = Scene::new(&mut choices, mode);
            let walk = scene.walk();
            let memory = scene.memory.clone();
            assert_eq!(walk.format().mode(), mode);
            for _ in 0..2000 {
                let gva = scene.any_address(&mut choices);
                let access = any_access(&mut choices);
                let t = compare::linear_walk(&walk, &scene.state, &memory, &mut scene.memory, gva, access);
                found += u32::from(t.is_some());
            }
            assert!(memory == scene.memory, "accessed and dirty bits differ: {mode:?}, seed {seed}");
        }
        // Both answers must be well represented, or the tables are no good.
        println!("{mode:?}: {found} of 50000 found");
        assert!(found > 5_000, "{mode:?}: only {found} translations");
        assert!(found < 45_000 || mode == PagingMode::None, "{mode:?}: {found} translations");
    }
}

#[test]
fn nested_walks_agree_with_the_model() {
    for mode in MODES {
        let mut found = 0;
        for seed in 0..120 {
            let mut choices = Choices::seeded(seed);
            let mut scene = Scene::nested(&mut choices, mode);
            let (Some(walk), Some(host)) = (scene.nested_walk(), scene.host) else {
                panic!("a scene without a host");
            };
            let memory = scene.memory.clone();
            for _ in 0..500 {
                let gva = scene.any_address(&mut choices);
                let access = any_access(&mut choices);
                let state = scene.state;
                let good = compare::nested_walk(&walk, &state, host, &memory, &mut scene.memory, gva, access);
                found += u32::from(good);
            }
            assert!(memory == scene.memory, "accessed and dirty bits differ: {mode:?}, seed {seed}");
        }
        println!("{mode:?}: {found} of 60000 found");
        assert!(found > 2_000, "{mode:?}: only {found} translations");
    }
}

#[test]
fn a_probe_finds_the_same_and_writes_nothing() {
    for mode in MODES {
        let mut choices = Choices::seeded(7);
        let scene = Scene::nested(&mut choices, mode);
        let (walk, nested) = (scene.walk(), scene.nested_walk().unwrap());
        let before = scene.memory.clone();
        for _ in 0..2000 {
            let gva = Gva(scene.any_address(&mut choices));
            let access = any_access(&mut choices);

            let probed = walk.probe(&scene.memory, gva, access);
            let nested_probed = nested.probe(&scene.memory, gva, access);
            assert!(scene.memory == before);

            let walked = walk.translate(&scene.memory.clone(), gva, access);
            match (probed, walked) {
                (Ok(p), Ok(w)) => assert_eq!((p.gpa, p.rights, p.level), (w.gpa, w.rights, w.level)),
                (p, w) => assert_eq!(p, w),
            }
            // Updates may be refused by the host, which a probe does not ask for.
            if let Ok(w) = nested.translate(&scene.memory.clone(), gva, access) {
                assert_eq!(nested_probed.map(|p| p.gpa), Ok(w.gpa));
            }
        }
    }
}
