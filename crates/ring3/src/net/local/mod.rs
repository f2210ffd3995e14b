//! Sockets with a name in a file system: who listens there, and who takes the name away at the end.
//!
//! A name that was left behind by a process that was killed is taken over; one that is in use, or is no socket, is left alone.
//!
//! **At the end** the name goes with its socket. The process that listens may do that itself ([`Name`]'s drop), as long as it sees
//! the host's files and has the rights that it had. One that gives those up leaves another process behind ([`Keeper`]).

mod keeper;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen as start_listening,
    socket_with,
};

pub use keeper::Keeper;

/// Connections that wait to be accepted, as the standard library has it.
const BACKLOG: i32 = 128;

/// Who may connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Access {
    /// Whoever the process's umask lets.
    Umask,
    /// The user who made the socket.
    Owner,
}

/// Where a socket listens. Dropped, it takes the name away, if it is still its own.
#[derive(Debug)]
#[must_use = "dropped, it takes the name away"]
pub struct Name {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

impl Name {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            // Somebody else may have been faster.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|about| (about.dev(), about.ino()))
}

/// What a name that is wanted for a socket is now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Present {
    Nothing,
    /// A socket that nobody listens on.
    Stale,
    /// A socket in use.
    InUse,
    /// Another kind of file.
    NoSocket,
}

fn present(path: &Path) -> io::Result<Present> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Present::Nothing),
        Err(error) => return Err(error),
        Ok(about) if !about.file_type().is_socket() => return Ok(Present::NoSocket),
        Ok(_) => {}
    }
    // To connect would be to be somebody's client, perhaps its only one. A socket of another type is told by the error
    // whether there is a listener, which does not notice (unix(7)).
    let probe = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    match connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED) => Ok(Present::Stale),
        // EPROTOTYPE, or somebody else's that cannot be looked at.
        Ok(()) | Err(_) => Ok(Present::InUse),
    }
}

/// Listens at `path`, where a socket may have been left behind. `SOCK_CLOEXEC`, blocking.
///
/// # Errors
/// `AddrInUse`: somebody listens there. `AlreadyExists`: something that is no socket is there. The kernel's, if the name
/// cannot be made.
pub fn listen(path: &Path, access: Access) -> io::Result<(OwnedFd, Name)> {
    match present(path)? {
        Present::Nothing => {}
        Present::Stale => fs::remove_file(path)?,
        Present::InUse => {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there already"));
        }
        Present::NoSocket => {
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, "a file that is no socket is there"));
        }
    }
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    let name = Name { path: path.to_owned(), identity: identity(path)? };
    if access == Access::Owner {
        // Before anybody can connect.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    }
    start_listening(&listener, BACKLOG)?;
    Ok((listener, name))
}

/// Listens at the first of `paths` where that is possible.
///
/// # Errors
/// There is none: why not the last one.
pub fn listen_first(paths: impl Iterator<Item = PathBuf>, access: Access) -> io::Result<(OwnedFd, Name)> {
    let mut error = io::ErrorKind::AddrNotAvailable.into();
    for path in paths {
        match listen(&path, access) {
            Ok(found) => return Ok(found),
            Err(why) => error = why,
        }
    }
    Err(error)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_name_goes_with_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (listener, name) = listen(&path, Access::Umask).unwrap();
        assert_eq!(name.path(), path);
        UnixStream::connect(&path).unwrap();
        drop(listener);
        drop(name);
        assert!(!path.exists());
    }

    #[test]
    fn who_may_connect_is_settled_before_anybody_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (_listener, _name) = listen(&path, Access::Owner).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn what_was_left_behind_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _bound = listen(&path, Access::Umask).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_is_in_use_is_left_alone_and_does_not_notice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let other = UnixListener::bind(&path).unwrap();
        let error = listen(&path, Access::Umask).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        other.set_nonblocking(true).unwrap();
        assert_eq!(other.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn files_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "precious").unwrap();
        assert_eq!(listen(&path, Access::Umask).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_name_that_became_somebody_elses_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (_listener, name) = listen(&path, Access::Umask).unwrap();
        fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(name);
        assert!(path.exists());
    }

    #[test]
    fn the_first_that_is_free_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let paths: Vec<_> = (1..=3).map(|n| dir.path().join(format!("passt_{n}.socket"))).collect();
        let _other = UnixListener::bind(&paths[0]).unwrap();
        let (_second, name) = listen_first(paths.iter().cloned(), Access::Umask).unwrap();
        assert_eq!(name.path(), paths[1]);
        let (_third, last) = listen_first(paths.iter().cloned(), Access::Umask).unwrap();
        assert_eq!(last.path(), paths[2]);
        assert_eq!(
            listen_first(paths.into_iter(), Access::Umask).unwrap_err().kind(),
            io::ErrorKind::AddrInUse
        );
    }
}
