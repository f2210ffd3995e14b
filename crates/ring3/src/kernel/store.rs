//! The cache of kernels: `$XDG_CACHE_HOME/ring3/kernels/RELEASE/{vmlinuz,config,modules/}`.
//!
//! A directory with a release's name is always whole: it is filled under another name and then renamed. Who
//! writes holds an exclusive lock on `kernels/.lock`; so whoever gets the lock and finds a half-filled directory
//! knows that its writer is dead, and removes it. Readers take no lock.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{Kernel, Source, version};

/// Name of the kernel file in a kernel's directory.
pub const IMAGE: &str = "vmlinuz";
/// Name of the directory of modules in a kernel's directory.
pub const MODULES: &str = "modules";
const LOCK: &str = ".lock";
const UNFINISHED: &str = ".unfinished-";

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No directory to use.
    #[error(
        "no cache directory for kernels: neither XDG_CACHE_HOME nor HOME names an absolute path; set one of them, \
         or give a kernel by --kernel FILE"
    )]
    NoHome,
    /// A file operation failed.
    #[error("cannot {what} {} (XDG_CACHE_HOME chooses another cache directory)", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// No such kernel.
    #[error("no kernel {release} in {}: `ring3 kernel list` shows what is there", dir.display())]
    NoKernel {
        /// What was asked for.
        release: String,
        /// The cache.
        dir: PathBuf,
    },
    /// A release that cannot be a directory's name.
    #[error("{release:?} cannot be the name of a kernel")]
    BadRelease {
        /// The release.
        release: String,
    },
}

/// The cache.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// The user's cache, by the XDG Base Directory Specification. Nothing is created yet.
    ///
    /// # Errors
    /// [`StoreError::NoHome`].
    pub fn of_user() -> Result<Self, StoreError> {
        Self::from_environment(env::var_os("XDG_CACHE_HOME").as_deref(), env::var_os("HOME").as_deref())
    }

    fn from_environment(cache: Option<&OsStr>, home: Option<&OsStr>) -> Result<Self, StoreError> {
        // The specification has relative paths ignored.
        let absolute = |path: Option<&OsStr>| path.map(PathBuf::from).filter(|path| path.is_absolute());
        let base =
            absolute(cache).or_else(|| Some(absolute(home)?.join(".cache"))).ok_or(StoreError::NoHome)?;
        Ok(Self { dir: base.join("ring3/kernels") })
    }

    /// A cache in a given directory.
    #[must_use]
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Where the cache is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The kernels in the cache, oldest first. A cache that does not exist yet is empty.
    ///
    /// # Errors
    /// [`StoreError::Io`] when the directory cannot be read.
    pub fn list(&self) -> Result<Vec<Kernel>, StoreError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(self.io("read", &self.dir, source)),
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let mut kernels: Vec<_> = names.filter_map(|name| self.get(&name)).collect();
        kernels.sort_by(|a, b| version::compare(&a.release, &b.release));
        Ok(kernels)
    }

    /// The cached kernel of that release.
    #[must_use]
    pub fn get(&self, release: &str) -> Option<Kernel> {
        let dir = self.path_of(release).ok()?;
        let image = dir.join(IMAGE);
        let modules = Some(dir.join(MODULES)).filter(|modules| modules.is_dir());
        image.is_file().then(|| Kernel { release: release.into(), image, modules, source: Source::Cache })
    }

    /// Takes the writers' lock, making the cache if needed, and removes what dead writers left.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn lock(&self) -> Result<Writer<'_>, StoreError> {
        fs::create_dir_all(&self.dir).map_err(|e| self.io("create", &self.dir, e))?;
        let path = self.dir.join(LOCK);
        let lock = File::options().create(true).truncate(false).write(true).open(&path);
        let lock = lock.map_err(|e| self.io("open", &path, e))?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive) == Err(Errno::WOULDBLOCK) {
            eprintln!("ring3: waiting for another ring3 that is changing {}", self.dir.display());
        }
        flock(&lock, FlockOperation::LockExclusive).map_err(|e| self.io("lock", &path, e.into()))?;
        let writer = Writer { store: self, _lock: lock };
        writer.remove_unfinished()?;
        Ok(writer)
    }

    /// Removes what dead writers left, unless a live one is at work. Failing at it is no reason not to run.
    pub fn sweep(&self) {
        let Ok(lock) = File::options().write(true).open(self.dir.join(LOCK)) else { return };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = Writer { store: self, _lock: lock }.remove_unfinished();
        }
    }

    fn path_of(&self, release: &str) -> Result<PathBuf, StoreError> {
        if release.is_empty() || release.starts_with('.') || release.contains(['/', '\0']) {
            return Err(StoreError::BadRelease { release: release.into() });
        }
        Ok(self.dir.join(release))
    }

    fn io(&self, what: &'static str, path: &Path, source: std::io::Error) -> StoreError {
        StoreError::Io { what, path: path.to_owned(), source }
    }
}

/// The right to change the cache: one process at a time has it.
#[derive(Debug)]
pub struct Writer<'a> {
    store: &'a Store,
    _lock: File,
}

impl Writer<'_> {
    /// A new directory, to be filled with [`IMAGE`] and [`MODULES`] and then given to [`Writer::commit`].
    /// Dropped, it is removed.
    ///
    /// # Errors
    /// [`StoreError::Io`].
    pub fn stage(&self) -> Result<tempfile::TempDir, StoreError> {
        tempfile::Builder::new()
            .prefix(UNFINISHED)
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .tempdir_in(&self.store.dir)
            .map_err(|e| self.store.io("create a directory in", &self.store.dir, e))
    }

    /// Makes a filled directory the kernel `release`, in place of any earlier one.
    ///
    /// # Errors
    /// [`StoreError::BadRelease`], [`StoreError::Io`].
    pub fn commit(&self, staged: tempfile::TempDir, release: &str) -> Result<Kernel, StoreError> {
        let target = self.store.path_of(release)?;
        let io = |what, e| self.store.io(what, &target, e);
        // The new name must not be on disk before the content is.
        if let Ok(dir) = File::open(staged.path()) {
            rustix::fs::syncfs(&dir).map_err(|e| io("write", e.into()))?;
        }
        if target.exists() {
            let old = self.stage()?;
            fs::rename(&target, old.path().join("old")).map_err(|e| io("replace", e))?;
        }
        fs::rename(staged.path(), &target).map_err(|e| io("create", e))?;
        // Its name is gone: nothing is left for the guard to remove.
        let _ = staged.keep();
        self.store
            .get(release)
            .ok_or_else(|| StoreError::NoKernel { release: release.into(), dir: self.store.dir.clone() })
    }

    /// Removes a kernel.
    ///
    /// # Errors
    /// [`StoreError::NoKernel`], [`StoreError::Io`].
    pub fn remove(&self, release: &str) -> Result<(), StoreError> {
        let path = self.store.path_of(release)?;
        if self.store.get(release).is_none() {
            return Err(StoreError::NoKernel { release: release.into(), dir: self.store.dir.clone() });
        }
        let grave = self.stage()?;
        fs::rename(&path, grave.path().join("old")).map_err(|e| self.store.io("remove", &path, e))?;
        grave.close().map_err(|e| self.store.io("remove", &path, e))
    }

    fn remove_unfinished(&self) -> Result<(), StoreError> {
        let dir = &self.store.dir;
        for entry in fs::read_dir(dir).map_err(|e| self.store.io("read", dir, e))?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                let path = entry.path();
                fs::remove_dir_all(&path).map_err(|e| self.store.io("remove", &path, e))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(writer: &Writer<'_>, content: &str) -> tempfile::TempDir {
        let staged = writer.stage().unwrap();
        fs::write(staged.path().join(IMAGE), content).unwrap();
        fs::create_dir(staged.path().join(MODULES)).unwrap();
        staged
    }

    fn releases(store: &Store) -> Vec<String> {
        store.list().unwrap().into_iter().map(|kernel| kernel.release).collect()
    }

    #[test]
    fn a_kernel_appears_whole_is_replaced_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path().join("a/kernels"));
        assert_eq!(releases(&store), [""; 0]);
        let writer = store.lock().unwrap();
        let staged = fill(&writer, "one");
        assert_eq!(releases(&store), [""; 0]);
        writer.commit(staged, "6.12.9").unwrap();
        writer.commit(fill(&writer, "two"), "6.1.0-10").unwrap();
        let kernel = writer.commit(fill(&writer, "three"), "6.12.9").unwrap();
        assert_eq!(releases(&store), ["6.1.0-10", "6.12.9"]);
        assert_eq!(fs::read_to_string(kernel.image).unwrap(), "three");
        writer.remove("6.12.9").unwrap();
        assert!(matches!(writer.remove("6.12.9"), Err(StoreError::NoKernel { .. })));
        assert_eq!(releases(&store), ["6.1.0-10"]);
        // Besides the kernel, only the lock is left.
        assert_eq!(fs::read_dir(store.dir()).unwrap().count(), 2);
    }

    #[test]
    fn what_a_dead_writer_left_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        let left = {
            let writer = store.lock().unwrap();
            fill(&writer, "half").keep()
        };
        assert!(left.exists());
        drop(store.lock().unwrap());
        assert!(!left.exists());

        let writer = store.lock().unwrap();
        let alive = fill(&writer, "half").keep();
        store.sweep();
        assert!(alive.exists());
        drop(writer);
        store.sweep();
        assert!(!alive.exists());
    }

    #[test]
    fn names_that_leave_the_cache_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::at(dir.path());
        let writer = store.lock().unwrap();
        for name in ["", "..", ".lock", "a/b", "/etc"] {
            assert!(matches!(writer.remove(name), Err(StoreError::BadRelease { .. })), "{name:?}");
            assert!(writer.commit(fill(&writer, ""), name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn the_place_follows_the_environment() {
        let place = |cache: Option<&str>, home: Option<&str>| {
            Store::from_environment(cache.map(OsStr::new), home.map(OsStr::new)).map(|store| store.dir)
        };
        assert_eq!(place(Some("/c"), Some("/h")).unwrap(), Path::new("/c/ring3/kernels"));
        assert_eq!(place(Some("rel"), Some("/h")).unwrap(), Path::new("/h/.cache/ring3/kernels"));
        assert_eq!(place(Some(""), Some("/h")).unwrap(), Path::new("/h/.cache/ring3/kernels"));
        assert!(matches!(place(None, Some("")), Err(StoreError::NoHome)));
        assert!(matches!(place(None, None), Err(StoreError::NoHome)));
    }
}
