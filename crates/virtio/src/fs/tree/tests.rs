use super::*;
use crate::fs::nodes::ROOT;
use std::path::PathBuf;

/// A directory that goes away with the test.
struct TempDir(PathBuf);

impl TempDir {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ring3-tree-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir(&path).unwrap();
        TempDir(path)
    }

    fn tree(&self, max_fds: usize) -> Tree {
        let root = std::fs::File::open(&self.0).unwrap();
        Tree::new(root.into(), Duration::from_secs(1), max_fds).unwrap()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn error<T>(result: io::Result<T>) -> Errno {
    Errno::from_io_error(&result.err().unwrap()).unwrap()
}

fn context() -> Context {
    Context::default()
}

fn lookup(tree: &Tree, parent: u64, name: &CStr) -> Entry {
    tree.lookup(&context(), parent, name).unwrap()
}

#[test]
fn descriptors_are_bounded_however_much_the_guest_looks_at() {
    let dir = TempDir::new("bounded");
    for number in 0..60 {
        std::fs::create_dir_all(dir.0.join(format!("{number}/deep"))).unwrap();
        std::fs::write(dir.0.join(format!("{number}/deep/file")), b"x").unwrap();
    }
    let tree = dir.tree(16);
    let mut files = Vec::new();
    for number in 0..60 {
        let name = std::ffi::CString::new(number.to_string()).unwrap();
        let outer = lookup(&tree, ROOT, &name).inode;
        let deep = lookup(&tree, outer, c"deep").inode;
        files.push(lookup(&tree, deep, c"file").inode);
        assert!(tree.open_counts().1 <= 8);
    }
    // Every node is still good, through its place.
    let mut open = Vec::new();
    for file in files {
        assert_eq!(tree.getattr(&context(), file, None).unwrap().0.st_size, 1);
        match tree.open(&context(), file, 0, 0) {
            Ok((handle, _, _)) => open.push((file, handle.unwrap())),
            Err(error) => assert_eq!(Errno::from_io_error(&error), Some(Errno::NFILE)),
        }
    }
    assert_eq!(open.len(), 8);
    for (file, handle) in open {
        tree.release(&context(), file, 0, handle, false, false, None).unwrap();
    }
    assert_eq!(tree.open_counts().2, 0);
    tree.destroy();
    assert_eq!(tree.open_counts(), (1, 0, 0));
}

#[test]
fn what_the_host_replaces_is_stale_and_found_again() {
    let dir = TempDir::new("stale");
    std::fs::write(dir.0.join("a"), b"old").unwrap();
    std::fs::write(dir.0.join("b"), b"newer").unwrap();
    let tree = dir.tree(64);
    let old = lookup(&tree, ROOT, c"a").inode;
    std::fs::rename(dir.0.join("b"), dir.0.join("a")).unwrap();
    assert_eq!(error(tree.getattr(&context(), old, None)), Errno::STALE);
    assert_eq!(error(tree.open(&context(), old, 0, 0)), Errno::STALE);
    let new = lookup(&tree, ROOT, c"a");
    assert_ne!(new.inode, old);
    assert_eq!(new.attr.st_size, 5);
    // An open file lives on.
    tree.open(&context(), new.inode, 0, 0).unwrap();
    std::fs::remove_file(dir.0.join("a")).unwrap();
    assert_eq!(tree.getattr(&context(), new.inode, None).unwrap().0.st_size, 5);
    assert_eq!(lookup(&tree, ROOT, c"a").inode, 0);
}

#[test]
fn names_and_links_lead_nowhere_else() {
    let dir = TempDir::new("names");
    std::fs::create_dir(dir.0.join("sub")).unwrap();
    std::os::unix::fs::symlink("/etc", dir.0.join("out")).unwrap();
    let tree = dir.tree(64);
    let sub = lookup(&tree, ROOT, c"sub").inode;
    for parent in [ROOT, sub] {
        for name in [c"..", c".", c"", c"/etc", c"../..", c"sub/x"] {
            assert_eq!(error(tree.lookup(&context(), parent, name)), Errno::INVAL, "{name:?}");
        }
    }
    let out = lookup(&tree, ROOT, c"out");
    assert_eq!(tree.readlink(&context(), out.inode).unwrap(), b"/etc");
    assert_eq!(error(tree.lookup(&context(), out.inode, c"passwd")), Errno::NOTDIR);
    assert_eq!(error(tree.open(&context(), out.inode, 0, 0)), Errno::ACCESS);
    assert_eq!(error(tree.opendir(&context(), out.inode, 0)), Errno::NOTDIR);
    // A directory that becomes a link after the guest saw it.
    let tree = dir.tree(64);
    let sub = lookup(&tree, ROOT, c"sub").inode;
    std::fs::remove_dir(dir.0.join("sub")).unwrap();
    std::os::unix::fs::symlink("/etc", dir.0.join("sub")).unwrap();
    assert_eq!(error(tree.lookup(&context(), sub, c"passwd")), Errno::STALE);
}

#[test]
fn special_files_are_not_opened() {
    let dir = TempDir::new("special");
    let fifo = dir.0.join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();
    let tree = dir.tree(64);
    let fifo = lookup(&tree, ROOT, c"fifo");
    assert_eq!(FileType::from_raw_mode(fifo.attr.st_mode), FileType::Fifo);
    assert_eq!(error(tree.open(&context(), fifo.inode, 0, 0)), Errno::ACCESS);
}

#[test]
fn the_host_says_who_may_read() {
    let dir = TempDir::new("rights");
    let path = dir.0.join("secret");
    std::fs::write(&path, b"x").unwrap();
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o0)).unwrap();
    let host = std::fs::File::open(&path).err().map(|error| Errno::from_io_error(&error).unwrap());
    let tree = dir.tree(64);
    let secret = lookup(&tree, ROOT, c"secret").inode;
    let guest = tree.open(&context(), secret, 0, 0).err();
    assert_eq!(guest.map(|error| Errno::from_io_error(&error).unwrap()), host);
}

#[test]
fn windows_into_the_kernel_look_empty() {
    let root = std::fs::File::open("/").unwrap();
    let tree = Tree::new(root.into(), Duration::from_secs(1), 64).unwrap();
    let proc = lookup(&tree, ROOT, c"proc");
    assert_eq!(FileType::from_raw_mode(proc.attr.st_mode), FileType::Directory);
    assert_eq!(lookup(&tree, proc.inode, c"self").inode, 0);
    assert_eq!(lookup(&tree, proc.inode, c"version").inode, 0);
    let (handle, _) = tree.opendir(&context(), proc.inode, 0).unwrap();
    tree.readdir(&context(), proc.inode, handle.unwrap(), 4096, 0, &mut |_| {
        panic!("there is nothing in it");
    })
    .unwrap();
    // A shared root that is itself one of them.
    let root = std::fs::File::open("/proc").unwrap();
    let tree = Tree::new(root.into(), Duration::from_secs(1), 64).unwrap();
    assert_eq!(lookup(&tree, ROOT, c"self").inode, 0);
}
