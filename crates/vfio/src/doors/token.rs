//! Tokens: what keeps the user of a physical function and those of its virtual functions from each other unless they have
//! agreed (`VFIO_DEVICE_FEATURE_PCI_VF_TOKEN`).
//!
//! A physical function has a token, which nobody knows at first. Its user sets it; who opens a virtual function must give
//! it. While virtual functions are open, the physical one is only given to who knows it, too.

use std::sync::{Arc, Mutex};

use crate::{Errno, Result, eventfd::lock};

/// A UUID.
pub(super) type Uuid = [u8; 16];

/// A physical function's side of it.
#[derive(Debug, Default)]
struct Physical {
    /// None: nobody knows it.
    token: Option<Uuid>,
    /// How many virtual functions are open.
    users: u32,
}

/// What a device has to do with tokens.
#[derive(Clone, Debug, Default)]
pub struct Token(Role);

#[derive(Clone, Debug, Default)]
enum Role {
    #[default]
    None,
    Physical(Arc<Mutex<Physical>>),
    Virtual(Arc<Mutex<Physical>>),
}

impl Token {
    /// For a function without virtual functions.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// For a physical function.
    #[must_use]
    pub fn physical() -> Self {
        Self(Role::Physical(Arc::default()))
    }

    /// For a virtual function of the physical one that has this token.
    #[must_use]
    pub fn of_virtual(&self) -> Self {
        match &self.0 {
            Role::Physical(of) | Role::Virtual(of) => Self(Role::Virtual(Arc::clone(of))),
            Role::None => Self::none(),
        }
    }

    /// Whether it is one of a physical function.
    #[must_use]
    pub fn is_physical(&self) -> bool {
        matches!(self.0, Role::Physical(_))
    }

    /// Sets a physical function's token. ENOTTY for others.
    pub(super) fn set(&self, token: Uuid) -> Result<()> {
        let Role::Physical(of) = &self.0 else { return Err(Errno::NOTTY) };
        lock(of).token = Some(token);
        Ok(())
    }

    /// The device is opened with a token or without.
    ///
    /// EINVAL for a token where there is none, EACCES for one that does not fit, or that is missing.
    pub(super) fn open(&self, given: Option<Uuid>) -> Result<()> {
        match &self.0 {
            Role::None => given.map_or(Ok(()), |_| Err(Errno::INVAL)),
            Role::Physical(of) => {
                let mut of = lock(of);
                if of.users > 0 && (given.is_none() || given != of.token) {
                    return Err(Errno::ACCESS);
                }
                if given.is_some() {
                    of.token = given;
                }
                Ok(())
            }
            Role::Virtual(of) => {
                let mut of = lock(of);
                if given.is_none() || given != of.token {
                    return Err(Errno::ACCESS);
                }
                of.users += 1;
                Ok(())
            }
        }
    }

    /// The device is closed.
    pub(super) fn close(&self) {
        if let Role::Virtual(of) = &self.0 {
            let mut of = lock(of);
            of.users = of.users.saturating_sub(1);
        }
    }
}

/// Reads `8-4-4-4-12` hexadecimal digits. EINVAL.
#[cfg(feature = "group")]
pub(super) fn parse(text: &str) -> Result<Uuid> {
    let mut uuid = Uuid::default();
    let bytes = text.as_bytes();
    if bytes.len() != 36 || [8, 13, 18, 23].iter().any(|at| bytes.get(*at) != Some(&b'-')) {
        return Err(Errno::INVAL);
    }
    let digits: Vec<u32> = bytes
        .iter()
        .filter(|byte| **byte != b'-')
        .map(|byte| char::from(*byte).to_digit(16))
        .collect::<Option<_>>()
        .ok_or(Errno::INVAL)?;
    if digits.len() != 32 {
        return Err(Errno::INVAL);
    }
    for (byte, pair) in uuid.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = pair.iter().fold(0, |byte, digit| byte << 4 | *digit as u8);
    }
    Ok(uuid)
}

#[cfg(all(test, feature = "group"))]
mod tests {
    use super::*;

    #[test]
    fn uuids() {
        let uuid = parse("52ac9bff-3a88-4fbd-901a-0d767c3b6c97").unwrap();
        assert_eq!(uuid[..4], [0x52, 0xac, 0x9b, 0xff]);
        assert_eq!(uuid[15], 0x97);
        for bad in [
            "",
            "zz",
            "52ac9bff-3a88-4fbd-901a-0d767c3b6c9",
            "52ac9bff-3a88-4fbd-901a-0d767c3b6c9g",
            "52ac9bff03a88-4fbd-901a-0d767c3b6c97",
            "52ac9bff--a88-4fbd-901a-0d767c3b6c97",
        ] {
            assert_eq!(parse(bad), Err(Errno::INVAL), "{bad}");
        }
    }

    #[test]
    fn a_virtual_function_needs_the_token() {
        let pf = Token::physical();
        let vf = pf.of_virtual();
        let (one, two) = ([1; 16], [2; 16]);
        assert_eq!(vf.open(Some(one)), Err(Errno::ACCESS), "nobody has set it");
        assert_eq!(vf.open(None), Err(Errno::ACCESS));
        assert_eq!(pf.open(Some(one)), Ok(()));
        assert_eq!(vf.open(Some(two)), Err(Errno::ACCESS));
        pf.close();
        assert_eq!(vf.open(Some(one)), Ok(()), "it stays when the physical function is closed");
        assert_eq!(pf.open(None), Err(Errno::ACCESS));
        assert_eq!(pf.open(Some(two)), Err(Errno::ACCESS));
        assert_eq!(pf.open(Some(one)), Ok(()));
        pf.set(two).unwrap();
        vf.close();
        assert_eq!(vf.open(Some(one)), Err(Errno::ACCESS));
        assert_eq!(vf.open(Some(two)), Ok(()));
        assert_eq!(vf.set(one), Err(Errno::NOTTY));
        assert_eq!(Token::none().open(Some(one)), Err(Errno::INVAL));
        assert_eq!(Token::none().open(None), Ok(()));
    }
}
