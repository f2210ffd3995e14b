//! Debian's cloud kernels, fetched once by `ring3 kernel fetch` into a cache that all tests share.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};

use super::process;

/// Room for a slow mirror.
const FETCH: Duration = Duration::from_secs(600);

/// The kernels of the tests.
#[derive(Debug, Clone)]
pub struct Kernels {
    /// Value of `XDG_CACHE_HOME` to find them by.
    pub cache: PathBuf,
    /// Kernel files: a 6.1 and a 6.12 one.
    pub images: [PathBuf; 2],
}

impl Kernels {
    /// Debian 12's own kernel, 6.1.
    pub fn older(&self) -> &Path {
        &self.images[0]
    }

    /// The newer one, 6.12.
    pub fn newer(&self) -> &Path {
        &self.images[1]
    }
}

/// The release of a kernel in the cache.
pub fn release(image: &Path) -> String {
    image.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned()
}

/// The kernels, or none after having said aloud why.
pub fn kernels() -> Option<Kernels> {
    static KERNELS: OnceLock<Result<Kernels, String>> = OnceLock::new();
    match KERNELS.get_or_init(get) {
        Ok(kernels) => Some(kernels.clone()),
        Err(why) if std::env::var_os("RING3_TEST_REQUIRE_KERNELS").is_some() => {
            panic!("no kernel to test with: {why}")
        }
        Err(why) => {
            super::skip(why);
            None
        }
    }
}

fn get() -> Result<Kernels, String> {
    let cache = match std::env::var_os("RING3_TEST_CACHE") {
        Some(cache) => PathBuf::from(cache),
        None => super::scratch().join("cache"),
    };
    if let Some(kernels) = look(&cache) {
        return Ok(kernels);
    }
    std::fs::create_dir_all(&cache).map_err(|e| format!("cannot create {}: {e}", cache.display()))?;
    // Several test programs may come here at once, and ring3's own lock is what one of them would wait for
    // without knowing that it need not fetch again.
    let lock = std::fs::File::create(cache.join("tests.lock")).map_err(|e| e.to_string())?;
    flock(&lock, FlockOperation::LockExclusive).map_err(|e| e.to_string())?;
    for (version, start) in [(None, "6.1."), (Some("6.12"), "6.12.")] {
        if find(&cache, start).is_some() {
            continue;
        }
        let mut fetch = process::privileged();
        fetch.env("XDG_CACHE_HOME", &cache).args(["kernel", "fetch"]).args(version);
        let end = process::finish(fetch, FETCH);
        if end.code != Some(0) {
            return Err(format!("`ring3 kernel fetch` failed: {}", end.stderr.trim()));
        }
    }
    look(&cache).ok_or_else(|| "the distribution's kernels are not 6.1 and 6.12".into())
}

fn look(cache: &Path) -> Option<Kernels> {
    let images = [find(cache, "6.1.")?, find(cache, "6.12.")?];
    Some(Kernels { cache: cache.to_owned(), images })
}

fn find(cache: &Path, start: &str) -> Option<PathBuf> {
    let entries = std::fs::read_dir(cache.join("ring3/kernels")).ok()?;
    let mut names: Vec<_> = entries.flatten().filter_map(|e| e.file_name().into_string().ok()).collect();
    names.sort();
    let name = names.into_iter().rfind(|name| name.starts_with(start))?;
    Some(cache.join("ring3/kernels").join(name).join("vmlinuz"))
}
