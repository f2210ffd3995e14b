//! Nothing is left behind by what is killed, and nothing half-finished is used.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use support::kernels::kernels;
use support::process::{PATIENCE, Running, finish, other_user, ring3, run};
use support::temp_dir;

/// What the user of `ring3` has in the places where programs leave things.
fn belongings(home: &Path) -> BTreeSet<PathBuf> {
    let user = other_user().unwrap_or_else(|| rustix::process::geteuid().as_raw());
    let places = [Path::new("/tmp"), Path::new("/dev/shm"), Path::new("/var/tmp"), Path::new("/run"), home];
    let entries = places.into_iter().filter_map(|place| fs::read_dir(place).ok()).flatten().flatten();
    // Other tests make their own directories meanwhile.
    let ours = entries.filter(|e| e.metadata().is_ok_and(|about| about.uid() == user));
    ours.map(|e| e.path()).filter(|path| !path.to_string_lossy().contains("ring3-e2e-")).collect()
}

#[test]
fn a_killed_run_leaves_no_files() {
    let Some(kernels) = kernels() else { return };
    let home = temp_dir();
    let before = belongings(home.path());
    let mut command = run(kernels.newer(), &[], &["sh", "-c", "echo ready; exec sleep 1000"]);
    command.env("HOME", home.path()).env("TMPDIR", home.path());
    let (running, mut output) = Running::boot_with_output(command);
    output.wait_for("ready\n");
    running.signal(Signal::KILL);
    let end = running.finish(PATIENCE);
    assert_eq!(end.signal, Some(9), "{end:?}");
    assert_eq!(belongings(home.path()), before);
    assert_eq!(fs::read_dir(home.path()).unwrap().count(), 0);
}

/// `ring3 shim` becomes the program, so nobody is there to tidy up when that is killed: who comes next does.
#[test]
fn what_a_killed_program_left_goes_with_the_next() {
    let dir = temp_dir();
    let shim = |script: &str| {
        let mut command = ring3();
        command.env("TMPDIR", dir.path()).args(["shim", "--device", "test", "--", "sh", "-c", script]);
        finish(command, PATIENCE)
    };
    let trees = || {
        let names = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with("ring3-shim-")).count()
    };
    let looks = "cat /sys/bus/pci/devices/0000:00:10.0/vendor";
    let end = shim(&format!("{looks}; kill -KILL $$"));
    assert_eq!((end.text().trim(), end.signal), ("0x1234", Some(9)), "{end:?}");
    assert_eq!(trees(), 1);
    let end = shim(&format!("{looks}; ls -d $TMPDIR/ring3-shim-* | wc -l; exit 3"));
    assert_eq!((&*end.text(), end.code), ("0x1234\n1\n", Some(3)), "{end:?}");
    assert_eq!(trees(), 0);
}

/// Killed at every stage of fetching that leaves a trace, the cache has no kernel, says so, and the next who
/// writes tidies up.
#[test]
fn a_killed_fetch_leaves_nothing_that_is_used() {
    let Some(kernels) = kernels() else { return };
    let cache = temp_dir();
    let store = cache.path().join("ring3/kernels");
    // A writer that died half-way, as it leaves things: a whole kernel but for the end of its name.
    fs::create_dir_all(store.join(".unfinished-dead/modules")).unwrap();
    fs::copy(kernels.older(), store.join(".unfinished-dead/vmlinuz")).unwrap();
    let list = || {
        let mut command = ring3();
        command.env("XDG_CACHE_HOME", cache.path()).args(["kernel", "list"]);
        let end = finish(command, PATIENCE);
        end.expect(0);
        end.text()
    };
    assert!(!list().contains("unfinished"));

    // The user of ring3 has to be able to write what this test, perhaps another user, made.
    let mut left = vec![cache.path().to_owned()];
    while let Some(path) = left.pop() {
        support::give(&path);
        if path.is_dir() {
            left.extend(fs::read_dir(&path).unwrap().flatten().map(|e| e.path()));
        }
    }
    let mut add = ring3();
    add.env("XDG_CACHE_HOME", cache.path()).args(["kernel", "add"]).arg(kernels.older());
    let running = Running::start_quiet(add);
    // As soon as it has begun to write.
    running.wait_until(|| {
        fs::read_dir(&store).unwrap().flatten().any(|e| {
            let name = e.file_name().to_string_lossy().into_owned();
            name.starts_with(".unfinished-") && name != ".unfinished-dead"
        })
    });
    running.signal(Signal::KILL);
    let end = running.finish(PATIENCE);
    // Where the machine is fast, it was done before.
    if end.signal == Some(9) {
        assert!(!list().contains("6.1."), "half a kernel is used");
    }
    let mut add = ring3();
    add.env("XDG_CACHE_HOME", cache.path()).args(["kernel", "add"]).arg(kernels.older());
    finish(add, PATIENCE).expect(0);
    assert!(list().contains("6.1."));
    let names: Vec<_> =
        fs::read_dir(&store).unwrap().flatten().map(|e| e.file_name().into_string().unwrap()).collect();
    assert!(!names.iter().any(|name| name.contains("unfinished")), "{names:?}");
}
