//! The index files that `modprobe` reads, for module trees that come out of a package.
//!
//! A package ships modules and two lists; `depmod` makes the rest when the package is installed, and nothing
//! installs it here. The guest's `modprobe` (kmod) reads only the binary files, busybox's reads the text:
//!
//! | file | from | to |
//! |---|---|---|
//! | `modules.dep`, `.bin` | a module's name | its file and those of what it needs |
//! | `modules.alias`, `.bin` | what a device or the kernel asks for (`pci:v00001AF4d*`, `fs-xfs`) | a module's name |
//! | `modules.builtin.bin` | the name of a built-in driver | nothing |
//! | `modules.builtin.alias.bin` | as `modules.alias` | the name of a built-in driver |
//! | `modules.softdep` | | what to load before and after a module, as text |
//!
//! `modules.symbols` and `modules.devname` are not written: nothing that a ring3 guest runs asks for them.
//!
//! # The binary form
//! A trie over the bytes of the keys, all numbers big-endian: magic, version, and the reference of the root. A
//! reference is the node's offset in the file with three flags in its top bits, which say what the node consists of,
//! in this order: a prefix (NUL-terminated, shared by all keys below), children (first byte, last byte, a reference
//! for each byte between them or 0), values (their number, and for each its priority and its NUL-terminated text).
//! (Observed in the files of Debian's kmod 30; modules.dep.bin(5) leaves the format open, and it has not changed
//! since 2008.)

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::{fs, io};

use super::KernelError;
use crate::initramfs::{ModuleTree, module_name};

const MAGIC: u32 = 0xb007_f457;
const VERSION: u32 = 0x0002_0001;
const PREFIX: u32 = 0x8000_0000;
const VALUES: u32 = 0x4000_0000;
const CHILDREN: u32 = 0x2000_0000;

/// The last of the files to be written: where it is, all are.
const LAST: &str = "modules.alias.bin";

/// Whether the tree in `dir` has the index files.
#[must_use]
pub fn is_indexed(dir: &Path) -> bool {
    dir.join(LAST).exists()
}

/// Writes the index files of the tree in `dir`. Those that are there already, `depmod` made: they stay.
///
/// # Errors
/// A [`KernelError`] when a module cannot be read or a file not written.
pub fn index(dir: &Path) -> Result<(), KernelError> {
    if !dir.is_dir() || is_indexed(dir) {
        return Ok(());
    }
    let mut tree = ModuleTree::open(dir)?;
    let information = tree.examine()?;
    let order = read_or_empty(&dir.join("modules.order"))?;
    let order: BTreeMap<&str, u32> = (0..).zip(order.lines()).map(|(place, line)| (line, place)).collect();
    // The order's files are named as they were before compression.
    let place = |path: &str| {
        let plain = path.rfind(".ko").map_or(path, |at| path.get(..at + 3).unwrap_or(path));
        order.get(plain).copied().unwrap_or(u32::try_from(order.len()).unwrap_or(u32::MAX))
    };

    let dependencies = tree.dependency_file()?;
    // Each module's line, its name and its priority.
    let modules: Vec<(&str, String, u32)> = dependencies
        .lines()
        .map(|line| {
            let file = line.split_once(':').map_or(line, |(file, _)| file);
            (line, module_name(file), place(file))
        })
        .collect();
    let mut index = Index::default();
    for (line, name, priority) in &modules {
        index.insert(name, line, *priority);
    }
    put(dir, "modules.dep", dependencies.as_bytes())?;
    put(dir, "modules.dep.bin", &index.to_bytes())?;

    let builtin = read_or_empty(&dir.join("modules.builtin"))?;
    let mut index = Index::default();
    for line in builtin.lines() {
        index.insert(&module_name(line), "", 0);
    }
    put(dir, "modules.builtin.bin", &index.to_bytes())?;

    // `NAME.alias=PATTERN`, each ended by NUL.
    let records = read_or_empty(&dir.join("modules.builtin.modinfo"))?;
    let mut index = Index::default();
    for record in records.split('\0') {
        if let Some((name, alias)) = record.split_once(".alias=") {
            index.insert(&normalised(alias), name, 0);
        }
    }
    put(dir, "modules.builtin.alias.bin", &index.to_bytes())?;

    let (mut aliases, mut soft) = (String::new(), String::new());
    let mut index = Index::default();
    for (_, name, priority) in &modules {
        for (key, value) in information.get(name).into_iter().flatten() {
            match &**key {
                "alias" => {
                    aliases.push_str(&format!("alias {value} {name}\n"));
                    index.insert(&normalised(value), name, *priority);
                }
                "softdep" => soft.push_str(&format!("softdep {name} {value}\n")),
                _ => {}
            }
        }
    }
    put(dir, "modules.softdep", soft.as_bytes())?;
    put(dir, "modules.alias", aliases.as_bytes())?;
    put(dir, LAST, &index.to_bytes())
}

/// Writes a file, whole or not at all, unless it is there.
fn put(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), KernelError> {
    let path = dir.join(name);
    if path.exists() {
        return Ok(());
    }
    let write = || -> io::Result<()> {
        let mut file = tempfile::NamedTempFile::new_in(dir)?;
        io::Write::write_all(&mut file, bytes)?;
        // As the modules are, which every user of the guest may read.
        fs::set_permissions(file.path(), std::os::unix::fs::PermissionsExt::from_mode(0o644))?;
        file.persist(&path)?;
        Ok(())
    };
    write().map_err(|source| KernelError::Copy { path: path.clone(), source })
}

fn read_or_empty(path: &Path) -> Result<String, KernelError> {
    match fs::read(path) {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(source) => Err(KernelError::Copy { path: path.to_owned(), source }),
    }
}

/// A pattern with underscores for dashes, but for those in brackets, where they mean ranges.
fn normalised(alias: &str) -> String {
    let mut inside = false;
    let one = |c: char| {
        inside = if inside { c != ']' } else { c == '[' };
        if c == '-' && !inside { '_' } else { c }
    };
    alias.chars().map(one).collect()
}

/// What becomes one binary index: keys, and the values of each by priority.
#[derive(Debug, Default)]
struct Index {
    keys: BTreeMap<Vec<u8>, BTreeSet<(u32, String)>>,
}

impl Index {
    fn insert(&mut self, key: &str, value: &str, priority: u32) {
        // NUL ends strings in the file.
        let one = |text: &str| text.split('\0').next().unwrap_or_default().to_owned();
        let values = self.keys.entry(one(key).into_bytes()).or_default();
        let value = one(value);
        if !values.iter().any(|(_, other)| *other == value) {
            values.insert((priority, value));
        }
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC.to_be_bytes());
        bytes.extend(VERSION.to_be_bytes());
        let root = bytes.len();
        bytes.extend([0; 4]);
        let entries: Vec<Entry<'_>> = self.keys.iter().map(|(key, values)| (&**key, values)).collect();
        let reference = write_node(&mut bytes, &entries, true);
        bytes.splice(root..root + 4, reference.to_be_bytes());
        bytes
    }
}

/// What is left of a key below a node, and its values.
type Entry<'a> = (&'a [u8], &'a BTreeSet<(u32, String)>);

/// Appends the nodes of sorted, distinct `entries`, children first, and gives the reference of the topmost.
/// The root has no prefix.
fn write_node(bytes: &mut Vec<u8>, entries: &[Entry<'_>], is_root: bool) -> u32 {
    let (Some((first, _)), Some((last, _))) = (entries.first(), entries.last()) else { return 0 };
    // What the first and the last of sorted keys share, all share.
    let shared = if is_root { 0 } else { first.iter().zip(*last).take_while(|(a, b)| a == b).count() };
    let prefix = first.get(..shared).unwrap_or_default();
    let mut values = None;
    let mut groups: BTreeMap<u8, Vec<Entry<'_>>> = BTreeMap::new();
    for (key, of_key) in entries {
        match key.get(shared..).unwrap_or_default() {
            [] => values = Some(*of_key),
            [byte, rest @ ..] => groups.entry(*byte).or_default().push((rest, *of_key)),
        }
    }
    let children: BTreeMap<u8, u32> =
        groups.iter().map(|(&byte, group)| (byte, write_node(bytes, group, false))).collect();

    let mut reference = u32::try_from(bytes.len()).unwrap_or(0);
    if !prefix.is_empty() {
        reference |= PREFIX;
        bytes.extend(prefix);
        bytes.push(0);
    }
    if let (Some((&low, _)), Some((&high, _))) = (children.first_key_value(), children.last_key_value()) {
        reference |= CHILDREN;
        bytes.extend([low, high]);
        for byte in low..=high {
            bytes.extend(children.get(&byte).copied().unwrap_or(0).to_be_bytes());
        }
    }
    if let Some(values) = values {
        reference |= VALUES;
        bytes.extend(u32::try_from(values.len()).unwrap_or(0).to_be_bytes());
        for (priority, value) in values {
            bytes.extend(priority.to_be_bytes());
            bytes.extend(value.as_bytes());
            bytes.push(0);
        }
    }
    reference
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Follows a key through the file as a reader would.
    fn lookup(bytes: &[u8], key: &str) -> Vec<(u32, String)> {
        let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap());
        let text = |at: usize| bytes[at..].split(|&byte| byte == 0).next().unwrap();
        assert_eq!((number(0), number(4)), (MAGIC, VERSION));
        let (mut key, mut reference) = (key.as_bytes(), number(8));
        loop {
            if reference == 0 {
                return Vec::new();
            }
            let mut at = (reference & 0x0fff_ffff) as usize;
            if reference & PREFIX != 0 {
                let Some(rest) = key.strip_prefix(text(at)) else { return Vec::new() };
                at += key.len() - rest.len() + 1;
                key = rest;
            }
            let mut child = 0;
            if reference & CHILDREN != 0 {
                let (low, high) = (bytes[at], bytes[at + 1]);
                if let Some(&byte) = key.first().filter(|byte| (low..=high).contains(byte)) {
                    child = number(at + 2 + 4 * usize::from(byte - low));
                }
                at += 2 + 4 * (usize::from(high - low) + 1);
            }
            if key.is_empty() {
                let count = if reference & VALUES != 0 { number(at) } else { 0 };
                at += 4;
                let mut values = Vec::new();
                for _ in 0..count {
                    let value = text(at + 4);
                    values.push((number(at), String::from_utf8(value.to_vec()).unwrap()));
                    at += 4 + value.len() + 1;
                }
                return values;
            }
            (key, reference) = (&key[1..], child);
        }
    }

    #[test]
    fn every_key_is_found_and_no_other() {
        let mut index = Index::default();
        let keys = ["virtio", "virtio_ring", "virtio_pci", "v", "xfs", "a\u{ff}z", ""];
        for (priority, key) in (0..).zip(keys) {
            index.insert(key, &format!("<{key}>"), priority);
        }
        index.insert("xfs", "earlier", 1);
        index.insert("xfs", "earlier", 9);
        let bytes = index.to_bytes();
        for (priority, key) in (0..).zip(keys).filter(|(_, key)| *key != "xfs") {
            assert_eq!(lookup(&bytes, key), [(priority, format!("<{key}>"))], "{key}");
        }
        assert_eq!(lookup(&bytes, "xfs"), [(1, "earlier".into()), (4, "<xfs>".into())]);
        for key in ["virti", "virtio_", "virtio_rin", "virtio_rings", "w", "z", "x"] {
            assert_eq!(lookup(&bytes, key), [], "{key}");
        }
        assert_eq!(lookup(&Index::default().to_bytes(), "x"), []);
    }

    #[test]
    fn dashes_are_underscores_but_for_ranges() {
        assert_eq!(normalised("net-pf-16-proto-9"), "net_pf_16_proto_9");
        assert_eq!(normalised("usb:v0-[1-9a-f]d-*"), "usb:v0_[1-9a-f]d_*");
    }

    /// kmod's own `depmod`, where the host has it, and a cached kernel to run it on.
    #[test]
    fn the_files_are_those_that_depmod_writes() {
        let skip = |why: &str| eprintln!("SKIPPED the_files_are_those_that_depmod_writes: {why}");
        let Some(modules) = super::super::installed().ok().flatten().and_then(|kernel| kernel.modules) else {
            return skip("no kernel is in the cache");
        };
        let dir = tempfile::tempdir().unwrap();
        let (theirs, ours) = (dir.path().join("lib/modules/1.0.0"), dir.path().join("ours"));
        for copy in [&theirs, &ours] {
            super::super::copy_tree(&modules, copy, 0).unwrap();
            for made in
                ["dep", "dep.bin", "alias", "alias.bin", "builtin.bin", "builtin.alias.bin", "softdep"]
            {
                let _ = fs::remove_file(copy.join(format!("modules.{made}")));
            }
        }
        match std::process::Command::new("depmod").arg("-b").arg(dir.path()).arg("1.0.0").status() {
            Ok(status) => assert!(status.success()),
            Err(_) => return skip("there is no depmod here (package kmod)"),
        }
        index(&ours).unwrap();
        let both = |name: &str| (fs::read(theirs.join(name)).unwrap(), fs::read(ours.join(name)).unwrap());
        for name in ["modules.alias.bin", "modules.builtin.bin", "modules.builtin.alias.bin"] {
            let (theirs, ours) = both(name);
            let at = theirs.iter().zip(&ours).position(|(a, b)| a != b);
            assert!(theirs == ours, "{name}: {} and {} bytes, differ at {at:?}", theirs.len(), ours.len());
        }
        // Needs that do not need each other stand in any order.
        let (theirs, ours) = both("modules.dep.bin");
        assert_eq!(theirs.len(), ours.len());
        let tree = ModuleTree::open(&modules).unwrap();
        for line in tree.dependency_file().unwrap().lines() {
            let name = module_name(line.split_once(':').unwrap().0);
            let sorted = |bytes: &[u8]| {
                let (priority, value) = lookup(bytes, &name).remove(0);
                let (file, needs) = value.split_once(':').unwrap();
                let needs: BTreeSet<String> = needs.split_whitespace().map(str::to_owned).collect();
                (priority, file.to_owned(), needs)
            };
            assert_eq!(sorted(&theirs), sorted(&ours), "{name}");
        }
    }
}
