//! The job description of a guest: one file in the initramfs, written by the host, read by the first process.
//!
//! Records are `key=value` ended by a NUL byte: arguments and environment may hold any other byte. Order
//! matters only among records of one key. An unknown key is an error: both sides are built together.

use std::ffi::{OsStr, OsString};
use std::net::IpAddr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

/// Where the spec lies in the initramfs.
pub const SPEC_PATH: &str = "/ring3.spec";
/// The directory of the initramfs that holds the kernel modules, named in [`Spec::modules`].
pub const MODULE_DIR: &str = "/modules";
/// The virtio-fs tag of the guest's root directory.
pub const ROOT_TAG: &str = "ring3root";

/// Names of the virtio console ports (`/sys/class/virtio-ports/*/name`).
///
/// [`ports::CONTROL`] must be the highest-numbered port. The driver handles the device's control messages in
/// order, so when its name is seen, the host's "open" of every other port has been seen too; from then on, a
/// port whose host side is closed has been closed by the host.
pub mod ports {
    /// Bytes for the command's standard input.
    pub const STDIN: &str = "ring3.stdin";
    /// The command's standard output.
    pub const STDOUT: &str = "ring3.stdout";
    /// The command's standard error.
    pub const STDERR: &str = "ring3.stderr";
    /// Lines in both directions: [`crate::control`].
    pub const CONTROL: &str = "ring3.control";
}

/// What the guest's `/` is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Root {
    /// The host's directory, virtio-fs tag [`ROOT_TAG`], read-only under a tmpfs overlay.
    #[default]
    Virtiofs,
    /// The initramfs itself: for tests of machines without virtio-fs.
    Initramfs,
}

/// What one of the command's standard streams is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Stream {
    /// A pipe, relayed to the stream's own port.
    #[default]
    Port,
    /// The guest's terminal, `/dev/hvc0`.
    Terminal,
    /// `/dev/null`.
    Null,
    /// The same open file as standard output (standard error only), so that the order of writes is kept.
    Stdout,
}

/// The guest's network card, and all that a DHCP client would find out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Network {
    /// The card's Ethernet address, by which it is found.
    pub mac: [u8; 6],
    /// The longest packet in bytes.
    pub mtu: u16,
    /// Its addresses, with the lengths of their networks' prefixes in bits.
    pub addresses: Vec<(IpAddr, u8)>,
    /// Where everything else is reached: one for each family of `addresses`.
    pub gateways: Vec<IpAddr>,
    /// Resolvers for `/etc/resolv.conf`. Without any the file stays as it is.
    pub resolvers: Vec<IpAddr>,
    /// Search domains, likewise.
    pub search: Vec<String>,
}

/// Everything that the first process is told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Spec {
    /// The command: file (looked up in `PATH` when without a slash) and arguments.
    pub argv: Vec<OsString>,
    /// The command's whole environment.
    pub env: Vec<(OsString, OsString)>,
    /// Directory to start in.
    pub workdir: PathBuf,
    /// A missing [`Spec::workdir`] is an error; otherwise the command starts in `/`.
    pub workdir_required: bool,
    /// Standard input, output and error.
    pub streams: [Stream; 3],
    /// Rows and columns of the terminal, if there is one.
    pub winsize: Option<(u16, u16)>,
    /// Host name of the guest; empty: left alone.
    pub hostname: OsString,
    /// The network card, if there is one.
    pub network: Option<Network>,
    /// What `/` is.
    pub root: Root,
    /// Kernel modules, as file names below [`MODULE_DIR`], in loading order.
    pub modules: Vec<String>,
    /// Directory (as the guest sees it) with all modules of the running kernel; the first process links
    /// `/lib/modules/VERSION` to it if that is missing.
    pub module_tree: Option<PathBuf>,
}

/// A spec that cannot be read.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// A record without `=`.
    #[error("record {0:?} has no '='")]
    NoKey(OsString),
    /// A key that this version does not know, or a value that the key does not allow.
    #[error("bad record {0:?}")]
    BadRecord(OsString),
    /// The last record lacks its NUL.
    #[error("the spec is cut off")]
    Truncated,
    /// A NUL byte in something that is to be written.
    #[error("{0:?} contains a NUL byte")]
    Nul(OsString),
}

impl Spec {
    /// The spec as the bytes of [`SPEC_PATH`].
    ///
    /// # Errors
    /// [`SpecError::Nul`] when a string holds a NUL byte.
    pub fn to_bytes(&self) -> Result<Vec<u8>, SpecError> {
        let mut out = Vec::new();
        let mut put = |key: &str, value: &OsStr| {
            if value.as_bytes().contains(&0) {
                return Err(SpecError::Nul(value.to_owned()));
            }
            out.extend_from_slice(key.as_bytes());
            out.push(b'=');
            out.extend_from_slice(value.as_bytes());
            out.push(0);
            Ok(())
        };
        for arg in &self.argv {
            put("arg", arg)?;
        }
        for (name, value) in &self.env {
            let mut pair = name.clone();
            pair.push("=");
            pair.push(value);
            put("env", &pair)?;
        }
        put("workdir", self.workdir.as_os_str())?;
        put("workdir-required", OsStr::new(if self.workdir_required { "1" } else { "0" }))?;
        for stream in self.streams {
            put("stream", OsStr::new(stream.name()))?;
        }
        if let Some((rows, columns)) = self.winsize {
            put("winsize", OsStr::new(&format!("{rows} {columns}")))?;
        }
        put("hostname", &self.hostname)?;
        if let Some(network) = &self.network {
            for (key, value) in network.records() {
                put(key, OsStr::new(&value))?;
            }
        }
        put("root", OsStr::new(self.root.name()))?;
        for module in &self.modules {
            put("module", OsStr::new(module))?;
        }
        if let Some(tree) = &self.module_tree {
            put("module-tree", tree.as_os_str())?;
        }
        Ok(out)
    }

    /// Reads what [`Spec::to_bytes`] wrote.
    ///
    /// # Errors
    /// A [`SpecError`] naming the record.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SpecError> {
        let mut spec = Self::default();
        let mut streams = 0;
        let Some(body) = bytes.strip_suffix(&[0]) else {
            return if bytes.is_empty() { Ok(spec) } else { Err(SpecError::Truncated) };
        };
        for record in body.split(|&b| b == 0) {
            let owned = || OsString::from_vec(record.to_vec());
            let (key, value) = split_at_equals(record).ok_or_else(|| SpecError::NoKey(owned()))?;
            let bad = || SpecError::BadRecord(owned());
            let text = || std::str::from_utf8(value).map_err(|_| bad());
            let os = OsStr::from_bytes(value);
            match key {
                b"arg" => spec.argv.push(os.to_owned()),
                b"env" => {
                    let (name, value) = split_at_equals(value).ok_or_else(bad)?;
                    spec.env.push((OsStr::from_bytes(name).into(), OsStr::from_bytes(value).into()));
                }
                b"workdir" => spec.workdir = os.into(),
                b"workdir-required" => spec.workdir_required = value == b"1",
                b"stream" => {
                    let slot = spec.streams.get_mut(streams).ok_or_else(bad)?;
                    *slot = Stream::from_name(text()?).ok_or_else(bad)?;
                    streams += 1;
                }
                b"winsize" => {
                    let (rows, columns) = text()?.split_once(' ').ok_or_else(bad)?;
                    spec.winsize =
                        Some((rows.parse().map_err(|_| bad())?, columns.parse().map_err(|_| bad())?));
                }
                b"hostname" => spec.hostname = os.to_owned(),
                _ if key.starts_with(b"net-") => {
                    let network = spec.network.get_or_insert_default();
                    network.read(key, text()?).ok_or_else(bad)?;
                }
                b"root" => spec.root = Root::from_name(text()?).ok_or_else(bad)?,
                b"module" => spec.modules.push(text()?.to_owned()),
                b"module-tree" => spec.module_tree = Some(os.into()),
                _ => return Err(bad()),
            }
        }
        Ok(spec)
    }
}

impl Network {
    /// Keys and values; the Ethernet address is there whatever else is.
    fn records(&self) -> Vec<(&'static str, String)> {
        let mac: Vec<String> = self.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut records = vec![("net-mac", mac.join(":")), ("net-mtu", self.mtu.to_string())];
        let pairs = self.addresses.iter().map(|(address, prefix)| format!("{address}/{prefix}"));
        records.extend(pairs.map(|pair| ("net-address", pair)));
        records.extend(self.gateways.iter().map(|gateway| ("net-gateway", gateway.to_string())));
        records.extend(self.resolvers.iter().map(|resolver| ("net-resolver", resolver.to_string())));
        records.extend(self.search.iter().map(|domain| ("net-search", domain.clone())));
        records
    }

    /// Takes one record; `None` if it makes no sense.
    fn read(&mut self, key: &[u8], value: &str) -> Option<()> {
        match key {
            b"net-mac" => {
                let mut bytes = value.split(':').map(|byte| u8::from_str_radix(byte, 16).ok());
                for byte in &mut self.mac {
                    *byte = bytes.next()??;
                }
                bytes.next().is_none().then_some(())?;
            }
            b"net-mtu" => self.mtu = value.parse().ok()?,
            b"net-address" => {
                let (address, prefix) = value.split_once('/')?;
                self.addresses.push((address.parse().ok()?, prefix.parse().ok()?));
            }
            b"net-gateway" => self.gateways.push(value.parse().ok()?),
            b"net-resolver" => self.resolvers.push(value.parse().ok()?),
            b"net-search" => self.search.push(value.to_owned()),
            _ => return None,
        }
        Some(())
    }
}

fn split_at_equals(record: &[u8]) -> Option<(&[u8], &[u8])> {
    let at = record.iter().position(|&b| b == b'=')?;
    Some((record.get(..at)?, record.get(at + 1..)?))
}

impl Root {
    fn name(self) -> &'static str {
        match self {
            Self::Virtiofs => "virtiofs",
            Self::Initramfs => "initramfs",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Virtiofs, Self::Initramfs].into_iter().find(|r| r.name() == name)
    }
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Port => "port",
            Self::Terminal => "terminal",
            Self::Null => "null",
            Self::Stdout => "stdout",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        [Self::Port, Self::Terminal, Self::Null, Self::Stdout].into_iter().find(|s| s.name() == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> Spec {
        Spec {
            argv: vec!["sh".into(), "-c".into(), "a\nb=c".into(), "".into(), OsString::from_vec(vec![0xff])],
            env: vec![("A".into(), "x=y\n".into()), ("B".into(), "".into())],
            workdir: "/tmp/a b".into(),
            workdir_required: true,
            streams: [Stream::Null, Stream::Terminal, Stream::Stdout],
            winsize: Some((24, 80)),
            hostname: "ring3".into(),
            network: Some(Network {
                mac: [0x52, 0x54, 0, 0xab, 1, 0xff],
                mtu: 65520,
                addresses: vec![("192.0.2.7".parse().unwrap(), 24), ("2001:db8::7".parse().unwrap(), 64)],
                gateways: vec!["192.0.2.1".parse().unwrap(), "fe80::1".parse().unwrap()],
                resolvers: vec!["192.0.2.53".parse().unwrap()],
                search: vec!["example.org".into(), "example.net".into()],
            }),
            root: Root::Initramfs,
            modules: vec!["virtio.ko".into(), "virtio_ring.ko".into()],
            module_tree: Some("/lib/modules/x".into()),
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        for spec in [full(), Spec::default(), Spec { network: Some(Network::default()), ..full() }] {
            assert_eq!(Spec::from_bytes(&spec.to_bytes().unwrap()), Ok(spec));
        }
    }

    #[test]
    fn nul_cannot_be_written() {
        let spec = Spec { argv: vec!["a\0b".into()], ..Spec::default() };
        assert_eq!(spec.to_bytes(), Err(SpecError::Nul("a\0b".into())));
    }

    #[test]
    fn bad_records_are_named() {
        assert_eq!(Spec::from_bytes(b"arg=a"), Err(SpecError::Truncated));
        assert_eq!(Spec::from_bytes(b"arg\0"), Err(SpecError::NoKey("arg".into())));
        assert_eq!(Spec::from_bytes(b"what=1\0"), Err(SpecError::BadRecord("what=1".into())));
        assert_eq!(Spec::from_bytes(b"root=nfs\0"), Err(SpecError::BadRecord("root=nfs".into())));
        for record in [
            "net-mac=1:2:3:4:5",
            "net-mac=1:2:3:4:5:6:7",
            "net-mtu=65536",
            "net-address=192.0.2.1",
            "net-gateway=x",
            "net-what=1",
        ] {
            let bytes = [record.as_bytes(), &[0]].concat();
            assert_eq!(Spec::from_bytes(&bytes), Err(SpecError::BadRecord(record.into())));
        }
        let four = b"stream=port\0stream=port\0stream=port\0stream=port\0";
        assert_eq!(Spec::from_bytes(four), Err(SpecError::BadRecord("stream=port".into())));
    }

    #[test]
    fn cut_anywhere_never_panics() {
        let bytes = full().to_bytes().unwrap();
        for end in 0..bytes.len() {
            let _ = Spec::from_bytes(&bytes[..end]);
        }
    }
}
