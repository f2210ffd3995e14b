//! Files of sysfs and debugfs that the machine does not have: a directory tree, made when the program first looks.
//!
//! Programs look at these files in every way that there is (`openat` below a directory, `readdir`, `readlink`), so they are real
//! files, in a temporary directory, and only their first, absolute path is redirected. What the tree does not
//! have is looked for where the program asked.

use std::{
    ffi::CString,
    fs, io,
    os::unix::{ffi::OsStrExt, fs::symlink},
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// One entry of the tree.
#[derive(Clone, Debug)]
pub(crate) enum Entry {
    /// A directory; those above any other entry need not be named.
    Directory,
    /// A file with these contents.
    File(Vec<u8>),
    /// A symbolic link.
    Link(String),
}

/// What somebody adds to the tree.
pub(crate) type Entries = fn() -> Vec<(String, Entry)>;

/// Directories that are looked for in the tree, and what is in it.
#[derive(Default, Debug)]
pub(crate) struct Plan {
    /// Paths at or below these are redirected.
    pub tops: Vec<String>,
    /// What is in it, asked when the program first looks.
    pub entries: Vec<Entries>,
}

static PLAN: OnceLock<Plan> = OnceLock::new();
static TREE: OnceLock<Option<Tree>> = OnceLock::new();

/// The tree, and the process that made it.
#[derive(Debug)]
struct Tree {
    root: PathBuf,
    owner: rustix::process::Pid,
}

/// What the tree will have. Later calls change nothing.
pub(crate) fn set(plan: Plan) {
    let _ = PLAN.set(plan);
}

/// Where the file that the program calls `path` is. None for what is not in the tree.
pub(crate) fn find(path: &str) -> Option<CString> {
    let plan = PLAN.get()?;
    let below = |top: &String| {
        path.strip_prefix(top.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if !plan.tops.iter().any(below) {
        return None;
    }
    let tree = TREE.get_or_init(|| make(plan)).as_ref()?;
    let there = tree.root.join(path.trim_start_matches('/'));
    let there = CString::new(there.into_os_string().into_encoded_bytes()).ok()?;
    // The link itself: what it leads to may be elsewhere.
    rustix::fs::lstat(&there).ok()?;
    Some(there)
}

/// The path by which the program knows a file of the tree.
pub(crate) fn outside(path: &[u8]) -> Option<&[u8]> {
    let tree = TREE.get()?.as_ref()?;
    path.strip_prefix(tree.root.as_os_str().as_bytes()).filter(|rest| rest.starts_with(b"/"))
}

fn make(plan: &Plan) -> Option<Tree> {
    let owner = rustix::process::getpid();
    let made = directory(owner.as_raw_nonzero().get()).and_then(|root| {
        let tree = Tree { root, owner };
        let mut entries = plan.entries.iter().flat_map(|entries| entries());
        entries.try_for_each(|(path, entry)| tree.add(&path, &entry))?;
        Ok(tree)
    });
    match made {
        Ok(tree) => Some(tree),
        Err(error) => {
            crate::complain(&format!(
                "the device's files cannot be made below {}: {error}",
                above().display()
            ));
            None
        }
    }
}

fn above() -> PathBuf {
    std::env::temp_dir()
}

/// A new directory that only this user can enter.
fn directory(pid: i32) -> io::Result<PathBuf> {
    use std::os::unix::fs::DirBuilderExt;
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let root = above().join(format!("ring3-shim-{pid}-{:016x}", u64::from_ne_bytes(random)));
    fs::DirBuilder::new().mode(0o700).create(&root)?;
    Ok(root)
}

impl Tree {
    fn add(&self, path: &str, entry: &Entry) -> io::Result<()> {
        let there = self.root.join(path.trim_start_matches('/'));
        fs::create_dir_all(there.parent().unwrap_or(Path::new("/")))?;
        match entry {
            Entry::Directory => fs::create_dir_all(there),
            Entry::File(contents) => fs::write(there, contents),
            Entry::Link(target) => symlink(target, there),
        }
    }
}

/// The process ends: its tree goes with it. Children that share it keep it for as long as the one that made it lives.
pub(crate) extern "C" fn remove() {
    if let Some(Some(tree)) = TREE.get()
        && tree.owner == rustix::process::getpid()
    {
        let _ = fs::remove_dir_all(&tree.root);
    }
}
