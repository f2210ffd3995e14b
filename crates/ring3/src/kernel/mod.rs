//! Which kernel a run boots, and where its modules are.
//!
//! In order: the file that the user names; the newest in ring3's cache ([`store`]); the newest readable one in
//! `/boot` whose modules are there; the distribution's kernel for virtual machines, fetched ([`apt`]) into the
//! cache.

pub mod apt;
pub mod deb;
pub mod depmod;
pub mod image;
pub mod progress;
pub mod store;
pub mod version;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::initramfs::{ModuleError, ModuleTree};
use apt::AptError;
use deb::DebError;
use image::ImageError;
use progress::Progress;
use store::{Store, StoreError, Writer};

/// Where a kernel comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// ring3's cache.
    Cache,
    /// The host's own `/boot`.
    Boot,
    /// The user named the file.
    File,
}

/// A kernel that can be booted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// Its release (`uname -r`); empty when the file does not tell.
    pub release: String,
    /// The kernel file: bzImage or ELF.
    pub image: PathBuf,
    /// Its modules: what `/lib/modules/RELEASE` holds.
    pub modules: Option<PathBuf>,
    /// Where it was found.
    pub source: Source,
}

/// Why there is no kernel.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A kernel file is bad.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The cache is not usable.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Fetching failed.
    #[error("no kernel in the cache or in /boot, and none can be fetched")]
    CannotFetch(#[source] AptError),
    /// The package that was asked for cannot be had.
    #[error(transparent)]
    Apt(#[from] AptError),
    /// A package is damaged.
    #[error(transparent)]
    Deb(#[from] DebError),
    /// A module tree is bad.
    #[error(transparent)]
    Modules(#[from] ModuleError),
    /// The package lacks the kernel that its name promises.
    #[error("the package of kernel {release} holds no kernel")]
    EmptyPackage {
        /// The release.
        release: String,
    },
    /// A kernel file without a release, to be kept under its release.
    #[error("{} does not tell its version: it cannot be kept; use it by --kernel", path.display())]
    NoRelease {
        /// The file.
        path: PathBuf,
    },
    /// Copying into the cache failed.
    #[error("cannot copy {}", path.display())]
    Copy {
        /// What was copied.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

/// Chooses the kernel of a run: see the module's head. `named` is the user's file.
///
/// # Errors
/// A [`KernelError`] that says what would work.
pub fn choose(named: Option<&Path>) -> Result<Kernel, KernelError> {
    let kernel = find(named)?;
    if let (Some(modules), Ok(store)) = (&kernel.modules, Store::of_user())
        && modules.starts_with(store.dir())
        && !depmod::is_indexed(modules)
    {
        // Put there before ring3 wrote all index files. Only `modprobe` in the guest would miss them.
        let indexed = store.lock().map_err(KernelError::from).and_then(|_writer| depmod::index(modules));
        if let Err(error) = indexed {
            tracing::warn!("modprobe may not find the guest's modules: {error}");
        }
    }
    Ok(kernel)
}

fn find(named: Option<&Path>) -> Result<Kernel, KernelError> {
    if let Some(path) = named {
        let bytes = image::read(path)?;
        let release = image::identify(path, &bytes)?.release.unwrap_or_default();
        let modules = modules_beside(path, &release);
        return Ok(Kernel { release, image: path.to_owned(), modules, source: Source::File });
    }
    match installed() {
        Ok(Some(kernel)) => Ok(kernel),
        Ok(None) => fetch_if_none().map_err(|error| match error {
            KernelError::Apt(error) => KernelError::CannotFetch(error),
            other => other,
        }),
        Err(error) => Err(error),
    }
}

/// The kernel that a run would boot without fetching anything.
///
/// # Errors
/// A [`KernelError`] when the cache cannot be read and `/boot` has nothing.
pub fn installed() -> Result<Option<Kernel>, KernelError> {
    let cached = Store::of_user().and_then(|store| {
        store.sweep();
        store.list()
    });
    if let Ok(Some(kernel)) = cached.as_ref().map(|kernels| kernels.last()) {
        return Ok(Some(kernel.clone()));
    }
    match in_boot().pop() {
        Some(kernel) => Ok(Some(kernel)),
        None => cached.map(|_| None).map_err(KernelError::Store),
    }
}

/// The kernels in `/boot` that can be read and have modules with what a guest needs, oldest first.
#[must_use]
pub fn in_boot() -> Vec<Kernel> {
    boot_kernels(Path::new("/boot"), Path::new("/lib/modules"))
}

fn boot_kernels(boot: &Path, modules: &Path) -> Vec<Kernel> {
    let entries = fs::read_dir(boot).into_iter().flatten().flatten();
    let mut kernels: Vec<_> = entries
        .filter_map(|entry| {
            let release = entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned();
            let tree = modules.join(&release);
            // Some distributions let only root read it.
            fs::File::open(entry.path()).ok()?;
            ModuleTree::open(&tree).ok().filter(|tree| tree.has("virtio_pci") && tree.has("virtiofs"))?;
            Some(Kernel { release, image: entry.path(), modules: Some(tree), source: Source::Boot })
        })
        .collect();
    kernels.sort_by(|a, b| version::compare(&a.release, &b.release));
    kernels
}

/// The modules of a kernel that stands alone: beside it, where the system or an unpacked package has them, or in
/// the cache.
fn modules_beside(image: &Path, release: &str) -> Option<PathBuf> {
    let dir = image.parent()?;
    let mut places = vec![dir.join("modules")];
    if !release.is_empty() {
        places.push(dir.join("lib/modules").join(release));
        places.extend(dir.parent().map(|above| above.join("lib/modules").join(release)));
        places.push(Path::new("/lib/modules").join(release));
        places.extend(Store::of_user().ok().and_then(|store| store.get(release)).and_then(|k| k.modules));
    }
    places.into_iter().find(|place| place.join("kernel").is_dir() || place.join("modules.builtin").is_file())
}

/// Fetches a kernel into the cache: `wanted` is a release or the start of one, by default the distribution's
/// current kernel for virtual machines.
///
/// # Errors
/// A [`KernelError`]. The cache is then as it was.
pub fn fetch(wanted: Option<&str>) -> Result<Kernel, KernelError> {
    let store = Store::of_user()?;
    let writer = store.lock()?;
    fetch_into(&writer, wanted)
}

/// Fetches the default kernel, unless another ring3 did while this one waited for the cache's lock.
fn fetch_if_none() -> Result<Kernel, KernelError> {
    let store = Store::of_user()?;
    let writer = store.lock()?;
    match store.list()?.pop() {
        Some(kernel) => Ok(kernel),
        None => fetch_into(&writer, None),
    }
}

fn fetch_into(writer: &Writer<'_>, wanted: Option<&str>) -> Result<Kernel, KernelError> {
    let progress = Progress::on_stderr();
    let scratch = writer.stage()?;
    let downloaded = apt::download(wanted, scratch.path(), &progress)?;
    progress.stage("unpacking the kernel");
    let staged = writer.stage()?;
    for package in &downloaded.packages {
        deb::unpack(package, &downloaded.release, staged.path())?;
    }
    if !staged.path().join(store::IMAGE).is_file() {
        return Err(KernelError::EmptyPackage { release: downloaded.release });
    }
    depmod::index(&staged.path().join(store::MODULES))?;
    Ok(writer.commit(staged, &downloaded.release)?)
}

/// Copies a kernel file, and its modules from `modules` or from where [`choose`] would find them, into the cache.
///
/// # Errors
/// A [`KernelError`]. The cache is then as it was.
pub fn add(image: &Path, modules: Option<&Path>) -> Result<Kernel, KernelError> {
    let bytes = image::read(image)?;
    let release = image::identify(image, &bytes)?.release;
    let release = release.ok_or_else(|| KernelError::NoRelease { path: image.to_owned() })?;
    let modules = modules.map(Path::to_owned).or_else(|| modules_beside(image, &release));
    let store = Store::of_user()?;
    let writer = store.lock()?;
    let staged = writer.stage()?;
    let copy = |path: &Path, result: io::Result<()>| {
        result.map_err(|source| KernelError::Copy { path: path.to_owned(), source })
    };
    copy(image, fs::write(staged.path().join(store::IMAGE), bytes))?;
    if let Some(modules) = modules {
        let to = staged.path().join(store::MODULES);
        copy(&modules, copy_tree(&modules, &to, 0))?;
        depmod::index(&to)?;
    }
    Ok(writer.commit(staged, &release)?)
}

/// Copies regular files and directories; links lead out of the tree (`build`, `source`) and are left out.
fn copy_tree(from: &Path, to: &Path, depth: usize) -> io::Result<()> {
    const DEEPEST: usize = 32;
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        let target = to.join(entry.file_name());
        if kind.is_dir() && depth < DEEPEST {
            copy_tree(&entry.path(), &target, depth + 1)?;
        } else if kind.is_file() {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(path: &Path, content: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    #[test]
    fn only_boot_kernels_with_their_modules_count() {
        let dir = tempfile::tempdir().unwrap();
        let (boot, modules) = (dir.path().join("boot"), dir.path().join("modules"));
        let builtin = "kernel/drivers/virtio/virtio_pci.ko\nkernel/fs/fuse/virtiofs.ko\n";
        for release in ["6.1.0-9-amd64", "6.1.0-10-amd64", "6.9-nomodules", "6.10-novirtio"] {
            put(&boot.join(format!("vmlinuz-{release}")), "kernel");
        }
        put(&boot.join("initrd.img-6.11"), "");
        for release in ["6.1.0-9-amd64", "6.1.0-10-amd64"] {
            put(&modules.join(release).join("modules.builtin"), builtin);
        }
        put(&modules.join("6.10-novirtio/modules.builtin"), "kernel/fs/ext4/ext4.ko\n");
        let releases: Vec<_> =
            boot_kernels(&boot, &modules).into_iter().map(|kernel| kernel.release).collect();
        assert_eq!(releases, ["6.1.0-9-amd64", "6.1.0-10-amd64"]);
        assert_eq!(boot_kernels(&dir.path().join("none"), &modules), []);
    }

    #[test]
    fn modules_are_found_beside_a_kernel() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("boot/vmlinuz");
        put(&image, "");
        assert_eq!(modules_beside(&image, "0.0-none"), None);
        put(&dir.path().join("lib/modules/0.0-none/modules.builtin"), "");
        assert_eq!(modules_beside(&image, "0.0-none"), Some(dir.path().join("lib/modules/0.0-none")));
        put(&dir.path().join("boot/modules/kernel/x.ko"), "");
        assert_eq!(modules_beside(&image, "0.0-none"), Some(dir.path().join("boot/modules")));
    }

    #[test]
    fn a_bad_kernel_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("k");
        assert!(matches!(choose(Some(&path)), Err(KernelError::Image(ImageError::Read { .. }))));
        put(&path, "#!/bin/sh");
        assert!(matches!(choose(Some(&path)), Err(KernelError::Image(ImageError::NotAKernel { .. }))));
        assert!(choose(Some(dir.path())).is_err());
    }
}
