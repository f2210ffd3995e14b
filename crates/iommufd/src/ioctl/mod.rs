//! The ioctls of `/dev/iommu`: from a command and an address to a call of [`Context`].
//!
//! Every structure of iommufd's begins with its size as the program knows it (Documentation/userspace-api/iommufd.rst). So
//! old programs give shorter structures, whose missing fields are zero, and new ones longer ones, which must be zero past
//! what is known here. [`table`] says for each command what is known of it, and what must be given.

pub(crate) mod device;
pub(crate) mod fault;
pub(crate) mod hwpt;
pub(crate) mod ioas;
pub(crate) mod option;
mod table;
pub(crate) mod viommu;

use std::sync::Arc;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(crate) use table::Handler;
pub use table::support_table;

use crate::{
    Context, Errno, Result,
    caller::Caller,
    inject,
    process::{Process, UserAddr},
    user_data,
};

/// Room for the longest structure that there is.
const WORDS: usize = 9;

/// A structure as it came, zero where the program gave nothing.
pub(crate) type Words = [u64; WORDS];

/// One ioctl.
pub(crate) struct Call<'a> {
    pub(crate) context: &'a Arc<Context>,
    pub(crate) caller: &'a dyn Caller,
    /// The third argument: an address, or a number.
    pub(crate) arg: UserAddr,
    /// How long the structure is that the program gave.
    size: usize,
}

impl Call<'_> {
    pub(crate) fn process(&self) -> &dyn Process {
        &**self.caller.process()
    }

    /// Gives the program its structure back, as much of it as it gave. EFAULT.
    pub(crate) fn respond<T: IntoBytes + Immutable>(&self, value: &T) -> Result<()> {
        let bytes = value.as_bytes();
        self.process().write(self.arg, bytes.get(..self.size).unwrap_or(bytes))
    }
}

/// The structure as one of type `T`, which is no longer than it.
pub(crate) fn view<T: FromBytes + IntoBytes + KnownLayout>(words: &mut Words) -> Result<&mut T> {
    T::mut_from_prefix(words.as_mut_bytes()).map(|(value, _)| value).map_err(|_| Errno::INVAL)
}

/// EOPNOTSUPP unless `bits` are all among `known`: flags that this version does not know.
pub(crate) fn known_flags(bits: u32, known: u32) -> Result<()> {
    if bits & !known == 0 { Ok(()) } else { Err(Errno::OPNOTSUPP) }
}

impl Context {
    /// `ioctl` on the context's descriptor: what it returns. `arg` is the third argument.
    ///
    /// - ENOTTY: there is no such command.
    /// - EFAULT: `arg` is not the address of a structure.
    /// - EINVAL: the structure is too short.
    /// - E2BIG: it is longer than what is known here, and not zero there.
    /// - EOPNOTSUPP: a flag or a type is not known here.
    /// - ENOENT: there is no object of an id, or it is of another kind.
    ///
    /// And what the command documents.
    pub fn ioctl(self: &Arc<Self>, caller: &dyn Caller, cmd: u32, arg: UserAddr) -> Result<i32> {
        let Some(ioctl) = table::find(cmd) else {
            if table::has_structure(cmd) {
                // As for every command whose structure begins with a size: that must be there, whatever the command is.
                caller.process().read(arg, &mut [0; 4])?;
            }
            let extended = self.extension().and_then(|extension| extension.ioctl(self, caller, cmd, arg));
            return extended.unwrap_or(Err(Errno::NOTTY));
        };
        let mut call = Call { context: self, caller, arg, size: 0 };
        match ioctl.handler {
            Handler::Plain(run) => run(&call),
            Handler::Sized { size, minimum, run } => {
                let mut words = Words::default();
                call.size = copy_in(call.process(), arg, size, minimum, &mut words)?;
                run(&call, &mut words).map(|()| 0)
            }
        }
    }
}

/// Copies a structure of which `known` bytes are known and `minimum` must be given: how long it is.
pub(crate) fn copy_in(
    process: &dyn Process,
    arg: UserAddr,
    known: usize,
    minimum: usize,
    words: &mut Words,
) -> Result<usize> {
    inject::check()?;
    let bytes = words.as_mut_bytes().get_mut(..known).ok_or(Errno::INVAL)?;
    // Nearly always the program gives exactly what is known: one copy gets all of it. When that fails the structure may
    // be shorter, and end where memory does.
    let whole = process.read(arg, bytes).is_ok();
    if !whole {
        bytes.fill(0);
        process.read(arg, bytes.get_mut(..4).ok_or(Errno::INVAL)?)?;
    }
    let size = bytes.first_chunk().map_or(0, |size| u32::from_ne_bytes(*size)) as usize;
    if size < minimum {
        return Err(Errno::INVAL);
    }
    match bytes.get_mut(size..) {
        Some(missing) => missing.fill(0),
        None => user_data::check_zero(process, arg, known, size)?,
    }
    if !whole {
        let given = bytes.get_mut(..size.min(known)).ok_or(Errno::INVAL)?;
        process.read(arg, given)?;
    }
    Ok(size)
}
