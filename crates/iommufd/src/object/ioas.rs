//! IOAS: the address space as an object.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::{Pending, hwpt::PagingHwpt};
use crate::{Context, Result, inject, ioas::Ioas};

/// An IOAS.
#[derive(Debug)]
pub(crate) struct IoasObject {
    pub(crate) space: Arc<Ioas>,
    /// The HWPTs that it has, those made automatically among them: so that devices that are attached to the IOAS share
    /// one where they can. Held while one is looked for, so that two devices do not make two.
    hwpts: Mutex<Vec<Weak<PagingHwpt>>>,
}

impl IoasObject {
    /// The HWPTs, and nobody adds another one meanwhile.
    pub(crate) fn lock_hwpts(&self) -> MutexGuard<'_, Vec<Weak<PagingHwpt>>> {
        let mut hwpts = self.hwpts.lock().unwrap_or_else(PoisonError::into_inner);
        hwpts.retain(|hwpt| hwpt.strong_count() > 0);
        hwpts
    }

    /// The HWPTs.
    pub(crate) fn hwpts(&self) -> Vec<Arc<PagingHwpt>> {
        self.lock_hwpts().iter().filter_map(Weak::upgrade).collect()
    }
}

impl Context {
    pub(crate) fn prepare_ioas(&self) -> Result<Pending<IoasObject>> {
        inject::check()?;
        let reservation = self.table().reserve()?;
        Ok(Pending::new(reservation, IoasObject { space: Ioas::new(), hwpts: Mutex::default() }))
    }
}
