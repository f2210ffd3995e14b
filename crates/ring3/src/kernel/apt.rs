//! The distribution's kernel package, by `apt-get download`: no root, no change to the system.
//!
//! The package lists of the system are used as they are. Where they are missing, know no such package, or are
//! so old that the package is gone from the mirror, fresh lists are fetched into a scratch directory from the
//! system's own sources, with the system's own keys, and apt is run on those.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use super::{progress::Progress, version};

/// Why no package could be had.
#[derive(Debug, thiserror::Error)]
pub enum AptError {
    /// This is not Debian or a relative.
    #[error(
        "there is no apt-get on this system to fetch a kernel with: give one by --kernel FILE, or keep one by \
         `ring3 kernel add FILE --modules DIR`"
    )]
    NoApt,
    /// apt failed.
    #[error("{command} failed ({status}): {message}")]
    Failed {
        /// The command, for people.
        command: String,
        /// Its status.
        status: std::process::ExitStatus,
        /// The last line it said.
        message: String,
    },
    /// It cannot be run, or a file cannot be handled.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: String,
        /// Why it failed.
        source: io::Error,
    },
    /// No package matches.
    #[error(
        "the package sources of this system have no kernel {wanted}{hint}; other ways: --kernel FILE, `ring3 \
         kernel add FILE --modules DIR`"
    )]
    NoPackage {
        /// What was asked for.
        wanted: String,
        /// What there is instead.
        hint: String,
    },
}

/// Package files of one kernel.
#[derive(Debug)]
pub struct Downloaded {
    /// The kernel's release.
    pub release: String,
    /// The files: kernel and, where packaged apart, modules.
    pub packages: Vec<PathBuf>,
}

/// Downloads the kernel that `wanted` (a release or the start of one) names, by default the distribution's
/// current one for virtual machines, into `dir`.
///
/// # Errors
/// An [`AptError`].
pub fn download(wanted: Option<&str>, dir: &Path, progress: &Progress) -> Result<Downloaded, AptError> {
    let system = Apt { options: Vec::new() };
    match system.try_download(wanted, dir, progress) {
        Err(AptError::NoPackage { .. } | AptError::Failed { .. }) => {}
        other => return other,
    }
    let fresh = Apt::with_own_lists(&dir.join("apt"))?;
    progress.stage("refreshing the package lists (in a scratch directory)");
    fresh.run("apt-get", &["update"])?;
    fresh.try_download(wanted, dir, progress)
}

/// apt, with options that say which lists it uses.
struct Apt {
    options: Vec<OsString>,
}

impl Apt {
    fn with_own_lists(scratch: &Path) -> Result<Self, AptError> {
        let (state, cache) = (scratch.join("state"), scratch.join("cache"));
        for dir in [state.join("lists/partial"), cache.join("archives/partial")] {
            fs::create_dir_all(&dir)
                .map_err(|source| AptError::Io { what: format!("create {}", dir.display()), source })?;
        }
        let option = |name: &str, value: &Path| {
            let mut option = OsString::from(format!("{name}="));
            option.push(value);
            option
        };
        let mut options = vec![
            option("Dir::State", &state),
            option("Dir::State::lists", &state.join("lists")),
            option("Dir::State::status", Path::new("/var/lib/dpkg/status")),
            option("Dir::Cache", &cache),
            // Descriptions in every language, contents and sources are of no use here.
            "Acquire::Languages=none".into(),
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false".into(),
            "Acquire::IndexTargets::deb-src::Sources::DefaultEnabled=false".into(),
        ];
        // apt's unprivileged download user cannot enter a directory of ours.
        if rustix::process::geteuid().is_root() {
            options.push("APT::Sandbox::User=root".into());
        }
        Ok(Self { options })
    }

    fn try_download(
        &self,
        wanted: Option<&str>,
        dir: &Path,
        progress: &Progress,
    ) -> Result<Downloaded, AptError> {
        progress.stage("looking for the kernel package");
        let names = self.package_names()?;
        let image = match wanted {
            None => self.default_image(&names)?,
            Some(wanted) => named_image(wanted, &names)?,
        };
        let release = image.strip_prefix(IMAGE).unwrap_or(&image).to_owned();
        let mut packages = vec![image];
        // Ubuntu packages the modules apart.
        let modules = format!("linux-modules-{release}");
        if self.depends(packages.first().map_or("", String::as_str))?.contains(&modules) {
            packages.push(modules);
        }
        let mut sizes = 0;
        for package in &packages {
            sizes += self.size(package)?;
        }
        progress.download(&format!("fetching {}", packages.join(" and ")), sizes);
        let mut command = self.command("apt-get");
        command.args(["-q", "download"]).args(&packages).current_dir(dir);
        run_watched(command, "apt-get download", || progress.at(total_size(dir)))?;
        let mut files: Vec<_> = fs::read_dir(dir)
            .map_err(|source| AptError::Io { what: format!("read {}", dir.display()), source })?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|end| end == "deb"))
            .collect();
        files.sort();
        Ok(Downloaded { release, packages: files })
    }

    /// All packages whose names begin with [`IMAGE`].
    fn package_names(&self) -> Result<Vec<String>, AptError> {
        let text = self.run("apt-cache", &["pkgnames", IMAGE])?;
        Ok(text.lines().map(str::to_owned).collect())
    }

    /// The kernel that the distribution's metapackage for virtual machines stands for.
    fn default_image(&self, names: &[String]) -> Result<String, AptError> {
        let metapackages = ["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"];
        for package in metapackages.iter().filter(|package| names.iter().any(|name| name == *package)) {
            if let Some(image) = self.depends(package)?.into_iter().find(|name| is_image(name)) {
                return Ok(image);
            }
        }
        Err(AptError::NoPackage { wanted: "for virtual machines".into(), hint: String::new() })
    }

    fn depends(&self, package: &str) -> Result<Vec<String>, AptError> {
        let text = self.run("apt-cache", &["depends", "--important", package])?;
        Ok(text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .map(|name| name.trim().to_owned())
            .collect())
    }

    /// Bytes to download; 0 when apt does not say.
    fn size(&self, package: &str) -> Result<u64, AptError> {
        // Lines of: 'URI' FILE SIZE HASH
        let text = self.run("apt-get", &["download", "--print-uris", package])?;
        Ok(text.lines().filter_map(|line| line.split(' ').nth(2)?.parse::<u64>().ok()).sum())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for option in &self.options {
            command.arg("-o").arg(option);
        }
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Result<String, AptError> {
        let mut command = self.command(program);
        command.args(arguments);
        run_watched(command, &format!("{program} {}", arguments.join(" ")), || ())
    }
}

const IMAGE: &str = "linux-image-";

/// A real kernel's package, not a metapackage, its debug symbols or its unsigned twin.
fn is_image(name: &str) -> bool {
    let Some(release) = name.strip_prefix(IMAGE) else { return false };
    release.starts_with(|c: char| c.is_ascii_digit())
        && release.split('-').next().is_some_and(|number| number.matches('.').count() >= 2)
        && !release.ends_with("-dbg")
        && !release.ends_with("-unsigned")
}

/// The newest package whose release `wanted` selects, cloud kernels first.
fn named_image(wanted: &str, names: &[String]) -> Result<String, AptError> {
    let release = |name: &String| name.strip_prefix(IMAGE).map(str::to_owned).unwrap_or_default();
    let mut images: Vec<_> = names.iter().filter(|name| is_image(name)).map(release).collect();
    images.sort_by(|a, b| version::compare(a, b));
    let cloud = |release: &&String| release.contains("-cloud-") || release.ends_with("-virtual");
    let selected = || images.iter().filter(|release| version::selects(wanted, release));
    if let Some(release) = selected()
        .find(|r| *r == wanted)
        .or_else(|| selected().rfind(cloud))
        .or_else(|| selected().next_back())
    {
        return Ok(format!("{IMAGE}{release}"));
    }
    let shown: Vec<_> = images.iter().rev().filter(cloud).take(4).map(String::as_str).collect();
    let hint =
        if shown.is_empty() { String::new() } else { format!(" (they have {}, …)", shown.join(", ")) };
    Err(AptError::NoPackage { wanted: wanted.into(), hint })
}

/// Runs a command to its end, calling `tick` a few times a second; returns what it wrote.
fn run_watched(mut command: Command, shown: &str, mut tick: impl FnMut()) -> Result<String, AptError> {
    let io = |source: io::Error| {
        if source.kind() == io::ErrorKind::NotFound {
            AptError::NoApt
        } else {
            AptError::Io { what: format!("run {shown}"), source }
        }
    };
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().map_err(io)?;
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let output = loop {
        match receiver.recv_timeout(Duration::from_millis(100)) {
            Ok(output) => break output.map_err(io)?,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => tick(),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => {
                return Err(io(io::Error::other("its watcher ended")));
            }
        }
    };
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    // apt's errors begin with "E: "; the first one is the cause.
    let message = said.lines().find_map(|line| line.strip_prefix("E: ")).or_else(|| said.lines().last());
    Err(AptError::Failed {
        command: shown.into(),
        status: output.status,
        message: message.unwrap_or("it said nothing").into(),
    })
}

fn total_size(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).filter(fs::Metadata::is_file).map(|m| m.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Vec<String> {
        [
            "linux-image-cloud-amd64",
            "linux-image-6.12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64",
            "linux-image-6.12.117+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.99+deb12-cloud-amd64",
            "linux-image-6.12.120+deb12-amd64",
            "linux-image-6.1.0-56-cloud-amd64",
            "linux-image-6.1.0-56-cloud-amd64-dbg",
            "linux-image-6.1.0-9-cloud-amd64",
            "linux-image-5.10.0-1-amd64",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    #[test]
    fn a_version_selects_the_newest_cloud_kernel() {
        for (wanted, package) in [
            ("6.12", "linux-image-6.12.117+deb12-cloud-amd64"),
            ("6.1", "linux-image-6.1.0-56-cloud-amd64"),
            ("6.1.0-9", "linux-image-6.1.0-9-cloud-amd64"),
            ("6.12.120+deb12-amd64", "linux-image-6.12.120+deb12-amd64"),
            ("5.10", "linux-image-5.10.0-1-amd64"),
            ("6", "linux-image-6.12.117+deb12-cloud-amd64"),
        ] {
            assert_eq!(named_image(wanted, &names()).unwrap(), package, "{wanted}");
        }
    }

    #[test]
    fn an_unknown_version_names_the_others() {
        let error = named_image("7.0", &names()).unwrap_err().to_string();
        assert!(error.contains("7.0") && error.contains("6.12.117+deb12-cloud-amd64"), "{error}");
        assert!(named_image("7.0", &[]).is_err());
    }

    #[test]
    fn a_failed_command_says_why() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo one >&2; echo 'E: no such package' >&2; exit 100"]);
        let error = run_watched(command, "apt-get x", || ()).unwrap_err().to_string();
        assert_eq!(error, "apt-get x failed (exit status: 100): no such package");
        let error = run_watched(Command::new("/nonexistent/apt-get"), "apt-get x", || ()).unwrap_err();
        assert!(matches!(error, AptError::NoApt));
    }
}
