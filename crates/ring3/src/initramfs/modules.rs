//! A kernel's modules: where they are, what each needs, and their bytes.
//!
//! The order and closure come from `modules.dep`. Packages do not ship that file (`depmod` writes it at
//! installation), so where it is missing the same is read from each module's `.modinfo` section.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

/// A module that the guest is to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The ELF file, decompressed.
    pub bytes: Vec<u8>,
}

impl Module {
    /// The name of its file in the initramfs.
    #[must_use]
    pub fn file_name(&self) -> String {
        format!("{}.ko", self.name)
    }
}

impl Module {
    /// Removes the signature appended to the file (kernel: `Documentation/admin-guide/module-signing.rst`).
    ///
    /// The kernel spends ten million instructions on checking one, and the files come from the host, which the
    /// guest trusts anyway. An unsigned module taints the guest's kernel (E) where signatures are expected.
    pub fn strip_signature(&mut self) {
        const MARKER: &[u8] = b"~Module signature appended~\n";
        // `struct module_signature`: eight bytes, then the length of what stands before it, big-endian.
        const INFO: usize = 12;
        let Some(signed) = self.bytes.strip_suffix(MARKER) else { return };
        let Some((body, info)) = signed.len().checked_sub(INFO).and_then(|at| signed.split_at_checked(at))
        else {
            return;
        };
        let length = info.last_chunk::<4>().map(|&bytes| u32::from_be_bytes(bytes));
        let end = length.and_then(|length| body.len().checked_sub(usize::try_from(length).ok()?));
        if let Some(end) = end {
            self.bytes.truncate(end);
        }
    }
}

/// Why modules cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel has the driver neither built in nor as a module.
    #[error("the kernel whose modules are in {} lacks {name}, which every ring3 guest needs: choose another kernel \
             (`ring3 kernel list`, `ring3 kernel fetch`)", dir.display())]
    Missing {
        /// The driver's module name.
        name: String,
        /// The kernel's module directory.
        dir: PathBuf,
    },
    /// A module says that it needs another one that is not there.
    #[error("module {name} in {} needs {needs}, which is not there", dir.display())]
    BrokenDependency {
        /// The module.
        name: String,
        /// What it needs.
        needs: String,
        /// The kernel's module directory.
        dir: PathBuf,
    },
    /// Not an ELF file with a `.modinfo` section.
    #[error("{} is not a kernel module", path.display())]
    NotAModule {
        /// The file.
        path: PathBuf,
    },
}

/// The modules of one kernel.
#[derive(Debug)]
pub struct ModuleTree {
    dir: PathBuf,
    /// Name to path below `dir`.
    files: HashMap<String, PathBuf>,
    /// Name to direct needs; `None` without `modules.dep`.
    needs: Option<HashMap<String, Vec<String>>>,
    builtin: HashSet<String>,
}

impl ModuleTree {
    /// Reads the tree in `dir`: what `/lib/modules/VERSION` holds.
    ///
    /// # Errors
    /// [`ModuleError::Read`] when the directory or its index cannot be read.
    pub fn open(dir: &Path) -> Result<Self, ModuleError> {
        let builtin = read_optional(&dir.join("modules.builtin"))?.unwrap_or_default();
        let builtin = builtin.lines().map(module_name).collect();
        let mut tree = Self { dir: dir.to_owned(), files: HashMap::new(), needs: None, builtin };
        match read_optional(&dir.join("modules.dep"))? {
            Some(text) => {
                let mut needs = HashMap::new();
                for (file, others) in text.lines().filter_map(|line| line.split_once(':')) {
                    tree.files.insert(module_name(file), file.into());
                    needs.insert(module_name(file), others.split_whitespace().map(module_name).collect());
                }
                tree.needs = Some(needs);
            }
            None => tree.walk(Path::new(""), 0)?,
        }
        Ok(tree)
    }

    /// Whether the kernel has this driver, as a module or built in.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.files.contains_key(name) || self.builtin.contains(name)
    }

    /// Whether the tree says anything about built-in drivers: without that, a missing module proves nothing.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        !self.builtin.is_empty()
    }

    /// The modules for the `required` and those of the `optional` drivers that exist, with all they need, in
    /// loading order. Built-in drivers need none.
    ///
    /// # Errors
    /// [`ModuleError::Missing`] for a required driver that the kernel lacks; other variants for damaged trees.
    pub fn load(&self, required: &[&str], optional: &[&str]) -> Result<Vec<Module>, ModuleError> {
        let mut order = Vec::new();
        let mut seen = BTreeSet::new();
        for &name in required {
            if !self.has(name) && self.is_complete() {
                return Err(ModuleError::Missing { name: name.into(), dir: self.dir.clone() });
            }
        }
        for &name in required.iter().chain(optional) {
            if self.files.contains_key(name) {
                self.visit(name, &mut seen, &mut order)?;
            }
        }
        order.into_iter().map(|name| Ok(Module { bytes: self.read(&name)?, name })).collect()
    }

    /// Writes what `depmod` would put into `modules.dep`, for a tree that lacks it.
    ///
    /// # Errors
    /// A [`ModuleError`] when a module cannot be read.
    pub fn dependency_file(&self) -> Result<String, ModuleError> {
        let mut names: Vec<_> = self.files.iter().collect();
        names.sort_by_key(|&(_, path)| path);
        let mut text = String::new();
        for (name, path) in names {
            let mut order = Vec::new();
            self.visit(name, &mut BTreeSet::new(), &mut order)?;
            order.pop();
            text.push_str(&format!("{}:", path.display()));
            // depmod lists the nearest need first.
            for other in order.iter().rev().filter_map(|name| self.files.get(name)) {
                text.push_str(&format!(" {}", other.display()));
            }
            text.push('\n');
        }
        Ok(text)
    }

    /// Depth first; a cycle, which no real tree has, ends at the module already seen.
    fn visit(
        &self,
        name: &str,
        seen: &mut BTreeSet<String>,
        order: &mut Vec<String>,
    ) -> Result<(), ModuleError> {
        if !seen.insert(name.to_owned()) {
            return Ok(());
        }
        for other in self.needs_of(name)? {
            if self.files.contains_key(&other) {
                self.visit(&other, seen, order)?;
            } else if !self.builtin.contains(&other) && self.is_complete() {
                return Err(ModuleError::BrokenDependency {
                    name: name.into(),
                    needs: other,
                    dir: self.dir.clone(),
                });
            }
        }
        order.push(name.to_owned());
        Ok(())
    }

    fn needs_of(&self, name: &str) -> Result<Vec<String>, ModuleError> {
        if let Some(needs) = &self.needs {
            let mut all = needs.get(name).cloned().unwrap_or_default();
            // The nearest need stands first in modules.dep; the farthest is to be loaded first.
            all.reverse();
            return Ok(all);
        }
        Ok(needs_by(&self.information(name)?))
    }

    /// Reads every module once: what each says about itself, by name. The tree knows then what each needs.
    ///
    /// # Errors
    /// A [`ModuleError`] when a module cannot be read or is none.
    pub fn examine(&mut self) -> Result<HashMap<String, Vec<(String, String)>>, ModuleError> {
        let told = |name: &String| Ok((name.clone(), self.information(name)?));
        let all: HashMap<_, _> = self.files.keys().map(told).collect::<Result<_, ModuleError>>()?;
        self.needs.get_or_insert_with(|| {
            // As in modules.dep: the nearest need first.
            let needs = |information| needs_by(information).into_iter().rev().collect();
            all.iter().map(|(name, information)| (name.clone(), needs(information))).collect()
        });
        Ok(all)
    }

    /// What a module says about itself in its `.modinfo` section: keys and values, in order.
    ///
    /// # Errors
    /// A [`ModuleError`] when the module cannot be read or is none.
    fn information(&self, name: &str) -> Result<Vec<(String, String)>, ModuleError> {
        let bytes = self.read(name)?;
        let not = || ModuleError::NotAModule { path: self.path(name) };
        let file = object::File::parse(&*bytes).map_err(|_| not())?;
        let section = file.section_by_name(".modinfo").ok_or_else(not)?;
        let records = String::from_utf8_lossy(section.data().map_err(|_| not())?).into_owned();
        let pair = |record: &str| record.split_once('=').map(|(key, value)| (key.into(), value.into()));
        Ok(records.split('\0').filter_map(pair).collect())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(self.files.get(name).map_or_else(|| Path::new(name), PathBuf::as_path))
    }

    /// The module's bytes, decompressed by the ending of its file name.
    fn read(&self, name: &str) -> Result<Vec<u8>, ModuleError> {
        let path = self.path(name);
        let fail = |source| ModuleError::Read { path: path.clone(), source };
        let raw = fs::read(&path).map_err(fail)?;
        let mut bytes = Vec::new();
        match path.extension().and_then(|e| e.to_str()) {
            Some("xz") => liblzma::read::XzDecoder::new(&*raw).read_to_end(&mut bytes).map_err(fail)?,
            Some("gz") => flate2::read::GzDecoder::new(&*raw).read_to_end(&mut bytes).map_err(fail)?,
            Some("zst") => ruzstd::decoding::StreamingDecoder::new(&*raw)
                .map_err(|e| fail(std::io::Error::other(e)))?
                .read_to_end(&mut bytes)
                .map_err(fail)?,
            _ => return Ok(raw),
        };
        Ok(bytes)
    }

    /// Finds the modules below `dir/below`. Links to other directories (`build`, `source`) are not followed.
    fn walk(&mut self, below: &Path, depth: usize) -> Result<(), ModuleError> {
        // A real tree is seven deep.
        const DEEPEST: usize = 32;
        let here = self.dir.join(below);
        let entries =
            fs::read_dir(&here).map_err(|source| ModuleError::Read { path: here.clone(), source })?;
        for entry in entries.flatten() {
            let path = below.join(entry.file_name());
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && depth < DEEPEST => self.walk(&path, depth + 1)?,
                Ok(kind) if kind.is_file() && is_module(&path) => {
                    self.files.insert(module_name(&path.to_string_lossy()), path);
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// The direct needs, in the order in which the module names them.
fn needs_by(information: &[(String, String)]) -> Vec<String> {
    let depends = information.iter().find(|(key, _)| key == "depends").map_or("", |(_, value)| value);
    depends.split(',').filter(|n| !n.is_empty()).map(module_name).collect()
}

fn is_module(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    [".ko", ".ko.xz", ".ko.zst", ".ko.gz"].iter().any(|end| name.ends_with(end))
}

/// The name of the module in a path or a dependency: no directories, no endings, underscores.
#[must_use]
pub fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

fn read_optional(path: &Path) -> Result<Option<String>, ModuleError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ModuleError::Read { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A module as far as this file looks: an ELF object with a `.modinfo` section.
    fn module(depends: &str) -> Vec<u8> {
        let info = format!("license=GPL\0depends={depends}\0name=x\0").into_bytes();
        let names = b"\0.modinfo\0.shstrtab\0";
        let (info_at, names_at) = (64, 64 + info.len());
        let table_at = (names_at + names.len()).next_multiple_of(8);
        let header = |name: u32, kind: u32, at: usize, size: usize| {
            // name, type, flags, address, offset, size, link and info, alignment, entry size (ELF-64, figure 3)
            let mut bytes = [name.to_le_bytes(), kind.to_le_bytes()].concat();
            for field in [0, 0, at as u64, size as u64, 0, 1, 0] {
                bytes.extend(field.to_le_bytes());
            }
            bytes
        };
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        for field in [1_u16, 62] {
            elf.extend(field.to_le_bytes());
        }
        elf.extend(1_u32.to_le_bytes());
        for field in [0, 0, table_at as u64] {
            elf.extend(field.to_le_bytes());
        }
        elf.extend(0_u32.to_le_bytes());
        for field in [64_u16, 0, 0, 64, 3, 2] {
            elf.extend(field.to_le_bytes());
        }
        assert_eq!(elf.len(), info_at);
        elf.extend(&info);
        elf.extend(names);
        elf.resize(table_at, 0);
        elf.extend(header(0, 0, 0, 0));
        elf.extend(header(1, 1, info_at, info.len()));
        elf.extend(header(10, 3, names_at, names.len()));
        elf
    }

    fn tree(with_index: bool) -> (tempfile::TempDir, ModuleTree) {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str, bytes: &[u8]| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        let xz = {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
            std::io::Write::write_all(&mut encoder, &module("virtio,virtio-ring")).unwrap();
            encoder.finish().unwrap()
        };
        put("kernel/v/virtio_pci.ko.xz", &xz);
        put("kernel/v/virtio.ko", &module(""));
        put("kernel/v/virtio_ring.ko", &module("virtio"));
        put("kernel/f/virtiofs.ko", &module("fuse,virtio-ring"));
        put("kernel/f/broken.ko", &module("nosuch"));
        put("kernel/f/garbage.ko", b"not an ELF file");
        put("modules.builtin", b"kernel/fs/fuse/fuse.ko\nkernel/fs/overlayfs/overlay.ko\n");
        if with_index {
            put(
                "modules.dep",
                b"kernel/v/virtio_pci.ko.xz: kernel/v/virtio_ring.ko kernel/v/virtio.ko\n\
                  kernel/v/virtio_ring.ko: kernel/v/virtio.ko\n\
                  kernel/v/virtio.ko:\nkernel/f/virtiofs.ko: kernel/v/virtio_ring.ko kernel/v/virtio.ko\n",
            );
        }
        let tree = ModuleTree::open(dir.path()).unwrap();
        (dir, tree)
    }

    #[test]
    fn needs_come_first_with_and_without_an_index() {
        for with_index in [true, false] {
            let (_dir, tree) = tree(with_index);
            let modules = tree.load(&["virtio_pci", "virtiofs", "overlay"], &["virtio_rng"]).unwrap();
            let names: Vec<_> = modules.iter().map(Module::file_name).collect();
            assert_eq!(names, ["virtio.ko", "virtio_ring.ko", "virtio_pci.ko", "virtiofs.ko"]);
            assert_eq!(modules[2].bytes, module("virtio,virtio-ring"));
        }
    }

    #[test]
    fn a_missing_driver_is_named() {
        let (_dir, tree) = tree(false);
        let error = tree.load(&["virtio_blk"], &[]).unwrap_err();
        assert!(matches!(&error, ModuleError::Missing { name, .. } if name == "virtio_blk"), "{error}");
        let error = tree.load(&["broken"], &[]).unwrap_err();
        assert!(
            matches!(&error, ModuleError::BrokenDependency { needs, .. } if needs == "nosuch"),
            "{error}"
        );
        assert!(matches!(tree.load(&["garbage"], &[]), Err(ModuleError::NotAModule { .. })));
    }

    #[test]
    fn the_index_that_is_written_is_depmods() {
        let (dir, _) = tree(false);
        for name in ["broken", "garbage"] {
            fs::remove_file(dir.path().join(format!("kernel/f/{name}.ko"))).unwrap();
        }
        let text = ModuleTree::open(dir.path()).unwrap().dependency_file().unwrap();
        let line = "kernel/v/virtio_pci.ko.xz: kernel/v/virtio_ring.ko kernel/v/virtio.ko\n";
        assert!(text.contains(line), "{text}");
        fs::write(dir.path().join("modules.dep"), &text).unwrap();
        let modules = ModuleTree::open(dir.path()).unwrap().load(&["virtio_pci"], &[]).unwrap();
        assert_eq!(modules.len(), 3);
    }

    #[test]
    fn signatures_go_and_damaged_ones_stay() {
        let signed = |length: u32| {
            let mut bytes = b"ELF".to_vec();
            bytes.extend([7; 20]);
            bytes.extend([0; 8]);
            bytes.extend(length.to_be_bytes());
            bytes.extend(b"~Module signature appended~\n");
            Module { name: "x".into(), bytes }
        };
        let mut module = signed(20);
        module.strip_signature();
        assert_eq!(module.bytes, b"ELF");
        module.strip_signature();
        assert_eq!(module.bytes, b"ELF");
        for length in [24, u32::MAX] {
            let mut module = signed(length);
            module.strip_signature();
            assert_eq!(module, signed(length));
        }
        let mut module = Module { name: "x".into(), bytes: b"~Module signature appended~\n".to_vec() };
        module.strip_signature();
        assert_eq!(module.bytes.len(), 28);
    }
}
