//! Descriptors: each flow of the guest's takes one, and so does each port that is forwarded.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors that are kept for connections where `all` ports would take the last one.
const KEPT: usize = 1024;

/// Allows this process as many descriptors as it may allow itself. A command that was started before has what it had:
/// some programs take a high limit for something to count to.
pub(super) fn raise_limit() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::debug!("the limit of open files stays at {current:?}: {error}");
    }
}

/// Forwards as many of `wanted` as can be had. When descriptors run out, some of the ports are given up for connections.
///
/// # Errors
/// Not a single one can be had: the last one's error.
pub(super) fn forward_what_can_be_had<F: Clone>(
    wanted: impl IntoIterator<Item = F>,
    mut add: impl FnMut(F) -> io::Result<()>,
    mut remove: impl FnMut(F),
) -> io::Result<()> {
    let (mut had, mut refused) = (Vec::new(), None);
    for forward in wanted {
        match add(forward.clone()) {
            Ok(()) => had.push(forward),
            Err(error) => {
                let exhausted = error.kind() == io::ErrorKind::QuotaExceeded;
                refused = Some(error);
                if exhausted {
                    break;
                }
            }
        }
    }
    match refused {
        Some(error) if had.is_empty() => return Err(error),
        Some(error) if error.kind() == io::ErrorKind::QuotaExceeded => {
            let rest = had.split_off(had.len() - KEPT.min(had.len() / 2));
            tracing::warn!(
                "not all ports are forwarded, but {}: {error}; {} descriptors are kept for connections",
                had.len(),
                rest.len()
            );
            rest.into_iter().for_each(&mut remove);
        }
        _ => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    /// What is had of `wanted` ports if there are descriptors for `most`, and each third is taken.
    fn had(wanted: u32, most: usize) -> io::Result<Vec<u32>> {
        let had = RefCell::new(Vec::new());
        let add = |port: u32| match port {
            _ if had.borrow().len() == most => Err(io::ErrorKind::QuotaExceeded.into()),
            port if port.is_multiple_of(3) => Err(io::ErrorKind::AddrInUse.into()),
            port => {
                had.borrow_mut().push(port);
                Ok(())
            }
        };
        forward_what_can_be_had(1..=wanted, add, |port| had.borrow_mut().retain(|other| *other != port))?;
        Ok(had.into_inner())
    }

    #[test]
    fn what_is_taken_is_left_out() {
        assert_eq!(had(7, 100).unwrap(), [1, 2, 4, 5, 7]);
        let none = forward_what_can_be_had([3], |_| Err(io::ErrorKind::AddrInUse.into()), |_| {});
        assert_eq!(none.unwrap_err().kind(), io::ErrorKind::AddrInUse);
        assert!(forward_what_can_be_had([(); 0], |()| Ok(()), |()| {}).is_ok());
    }

    #[test]
    fn connections_need_descriptors_too() {
        assert_eq!(had(30_000, 10_000).unwrap().len(), 10_000 - KEPT);
        // However few there are, ports have the other half.
        assert_eq!(had(100, 10).unwrap(), [1, 2, 4, 5, 7]);
        assert_eq!(had(100, 0).unwrap_err().kind(), io::ErrorKind::QuotaExceeded);
    }
}
