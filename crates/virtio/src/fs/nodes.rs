//! The nodes that the guest knows: what it has looked up and not yet forgotten.
//!
//! # Theory of operation
//!
//! A node is a file of the host, told apart by device and inode number, plus the place where it was last
//! found: parent node and name. With the place it can be opened again at any time, so an open descriptor is
//! only a cache. That keeps a guest which walks a whole disk from using up the host's descriptors: when too
//! many are cached, those that were not used since the last clean-up are closed.
//!
//! A node stays while the guest holds references to it (lookups less forgets) or children of it are known,
//! since their place is relative to it. Node numbers are never used twice.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;

/// Number of the root node (`FUSE_ROOT_ID`).
pub(super) const ROOT: u64 = 1;
/// Path components that lead from the root to a node at most (`PATH_MAX` / 2).
const MAX_DEPTH: usize = 2048;

/// What makes a file of the host this file. The type is part of it, since a file system may give the inode
/// number of a deleted file to a new one of another kind, and a node must not change its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct FileId {
    pub(super) dev: u64,
    pub(super) ino: u64,
    /// The type bits of the mode.
    pub(super) kind: u32,
}

#[derive(Debug)]
struct Node {
    id: FileId,
    parent: u64,
    name: CString,
    /// Lookups less forgets.
    refs: u64,
    /// Nodes whose parent this is.
    children: u64,
    /// `O_PATH` descriptor, if cached.
    fd: Option<Arc<OwnedFd>>,
    /// The descriptor was used since the last clean-up.
    used: bool,
}

/// Where to open a node: a descriptor and the names to follow from it.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) base: Arc<OwnedFd>,
    pub(super) names: Vec<CString>,
    pub(super) id: FileId,
}

/// All nodes.
#[derive(Debug)]
pub(super) struct Nodes {
    nodes: HashMap<u64, Node>,
    by_id: HashMap<FileId, u64>,
    next: u64,
    cached: usize,
    max_cached: usize,
}

impl Nodes {
    /// Only the root, which is never forgotten. At most `max_cached` descriptors are kept besides.
    pub(super) fn new(root: Arc<OwnedFd>, id: FileId, max_cached: usize) -> Self {
        let node = Node {
            id,
            parent: ROOT,
            name: CString::default(),
            refs: 1,
            children: 0,
            fd: Some(root),
            used: true,
        };
        Nodes {
            nodes: HashMap::from([(ROOT, node)]),
            by_id: HashMap::from([(id, ROOT)]),
            next: ROOT + 1,
            cached: 0,
            max_cached,
        }
    }

    /// The file behind a node.
    pub(super) fn id(&self, node: u64) -> Result<FileId, Errno> {
        self.nodes.get(&node).map(|node| node.id).ok_or(Errno::STALE)
    }

    /// Parent and name of a node.
    pub(super) fn parent(&self, node: u64) -> Result<(u64, CString), Errno> {
        self.nodes.get(&node).map(|node| (node.parent, node.name.clone())).ok_or(Errno::STALE)
    }

    /// The cached descriptor of a node.
    pub(super) fn cached(&mut self, node: u64) -> Option<Arc<OwnedFd>> {
        let node = self.nodes.get_mut(&node)?;
        node.used = true;
        node.fd.clone()
    }

    /// Adds a reference to the node of a file that was found in `parent`; makes the node if it is new.
    pub(super) fn refer(&mut self, id: FileId, parent: u64, name: &CStr) -> Result<u64, Errno> {
        if !self.nodes.contains_key(&parent) {
            return Err(Errno::STALE);
        }
        let Some(&number) = self.by_id.get(&id) else {
            let number = self.next;
            self.next += 1;
            let name = name.to_owned();
            let node = Node { id, parent, name, refs: 1, children: 0, fd: None, used: false };
            self.nodes.insert(number, node);
            self.by_id.insert(id, number);
            self.adopt(parent);
            return Ok(number);
        };
        let mut old_parent = None;
        if let Some(node) = self.nodes.get_mut(&number) {
            node.refs = node.refs.saturating_add(1);
            if number != ROOT && (node.parent != parent || node.name.as_c_str() != name) {
                node.name = name.to_owned();
                old_parent = Some(std::mem::replace(&mut node.parent, parent));
            }
        }
        if let Some(old_parent) = old_parent {
            self.adopt(parent);
            self.orphan(old_parent);
        }
        Ok(number)
    }

    fn adopt(&mut self, parent: u64) {
        if let Some(parent) = self.nodes.get_mut(&parent) {
            parent.children += 1;
        }
    }

    fn orphan(&mut self, parent: u64) {
        if let Some(node) = self.nodes.get_mut(&parent) {
            node.children = node.children.saturating_sub(1);
        }
        self.collect(parent);
    }

    /// Takes `count` references away.
    pub(super) fn forget(&mut self, number: u64, count: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.refs = node.refs.saturating_sub(count);
        }
        self.collect(number);
    }

    /// Removes a node that nothing holds, and then its parent if that was the last hold.
    fn collect(&mut self, mut number: u64) {
        while number != ROOT {
            match self.nodes.get(&number) {
                Some(node) if node.refs == 0 && node.children == 0 => {}
                _ => return,
            }
            let Some(node) = self.nodes.remove(&number) else { return };
            self.by_id.remove(&node.id);
            self.cached -= usize::from(node.fd.is_some());
            number = node.parent;
            if let Some(parent) = self.nodes.get_mut(&number) {
                parent.children = parent.children.saturating_sub(1);
            }
        }
    }

    /// How to open a node that has no descriptor: from the nearest node above it that has one.
    pub(super) fn place(&mut self, number: u64) -> Result<Place, Errno> {
        let id = self.id(number)?;
        let mut names = Vec::new();
        let mut at = number;
        // Directories that the host moves about can make the known places a circle.
        while names.len() < MAX_DEPTH {
            let node = self.nodes.get_mut(&at).ok_or(Errno::STALE)?;
            if let Some(fd) = &node.fd {
                node.used = true;
                names.reverse();
                return Ok(Place { base: Arc::clone(fd), names, id });
            }
            names.push(node.name.clone());
            at = node.parent;
        }
        Err(Errno::STALE)
    }

    /// Keeps a descriptor for a node.
    pub(super) fn cache(&mut self, number: u64, fd: &Arc<OwnedFd>) {
        if self.cached >= self.max_cached {
            self.evict(false);
        }
        if let Some(node) = self.nodes.get_mut(&number) {
            node.used = true;
            if node.fd.is_none() {
                node.fd = Some(Arc::clone(fd));
                self.cached += 1;
            }
        }
    }

    /// Closes cached descriptors: the ones not used lately, or all.
    pub(super) fn evict(&mut self, all: bool) {
        let before = self.cached;
        for (number, node) in &mut self.nodes {
            let keep = *number == ROOT || (node.used && !all);
            node.used = false;
            if !keep && node.fd.take().is_some() {
                self.cached -= 1;
            }
        }
        if !all && self.cached * 4 > before * 3 {
            // Nearly all were in use: the next round takes those not used from here on. Take them now.
            self.evict(true);
        }
    }

    /// Forgets everything but the root.
    pub(super) fn clear(&mut self) {
        self.nodes.retain(|number, _| *number == ROOT);
        self.by_id.retain(|_, number| *number == ROOT);
        self.cached = 0;
        if let Some(root) = self.nodes.get_mut(&ROOT) {
            root.children = 0;
        }
    }

    #[cfg(test)]
    pub(super) fn counts(&self) -> (usize, usize) {
        (self.nodes.len(), self.cached)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fd() -> Arc<OwnedFd> {
        Arc::new(std::fs::File::open("/").unwrap().into())
    }

    fn id(ino: u64) -> FileId {
        FileId { dev: 1, ino, kind: 0 }
    }

    #[test]
    fn a_node_lives_while_it_or_a_child_is_held() {
        let mut nodes = Nodes::new(fd(), id(2), 10);
        let dir = nodes.refer(id(3), ROOT, c"dir").unwrap();
        let file = nodes.refer(id(4), dir, c"file").unwrap();
        assert_eq!(nodes.refer(id(4), dir, c"file").unwrap(), file);
        nodes.forget(dir, 1);
        assert_eq!(nodes.place(file).unwrap().names, [c"dir".to_owned(), c"file".to_owned()]);
        nodes.forget(file, 1);
        assert!(nodes.id(file).is_ok());
        nodes.forget(file, 1);
        assert_eq!(nodes.counts(), (1, 0));
        assert_eq!(nodes.refer(id(5), dir, c"x"), Err(Errno::STALE));
        let again = nodes.refer(id(4), ROOT, c"file").unwrap();
        assert!(again > file, "numbers are not used twice");
        nodes.forget(ROOT, u64::MAX);
        assert!(nodes.id(ROOT).is_ok());
    }

    #[test]
    fn a_moved_file_is_found_at_its_new_place() {
        let mut nodes = Nodes::new(fd(), id(2), 10);
        let a = nodes.refer(id(3), ROOT, c"a").unwrap();
        let b = nodes.refer(id(4), a, c"b").unwrap();
        nodes.refer(id(4), ROOT, c"b").unwrap();
        nodes.forget(a, 1);
        assert!(nodes.id(a).is_err(), "no child any more");
        // A circle: b in c, c in b.
        let c = nodes.refer(id(5), b, c"c").unwrap();
        nodes.refer(id(4), c, c"b").unwrap();
        assert_eq!(nodes.place(b).unwrap_err(), Errno::STALE);
        nodes.clear();
        assert_eq!(nodes.counts(), (1, 0));
    }

    #[test]
    fn cached_descriptors_are_bounded() {
        let mut nodes = Nodes::new(fd(), id(2), 8);
        let fd = fd();
        for ino in 10..200 {
            let node = nodes.refer(id(ino), ROOT, c"x").unwrap();
            nodes.cache(node, &fd);
            assert!(nodes.counts().1 <= 8);
        }
        nodes.evict(true);
        assert_eq!(nodes.counts(), (191, 0));
        assert!(nodes.cached(ROOT).is_some());
    }
}
