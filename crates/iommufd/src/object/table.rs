//! The objects of a context by their ids.
//!
//! # Theory of operation
//!
//! An id is reserved first, and gets its object when nothing can fail any more: until then nobody finds it, and a
//! [`Reservation`] that is dropped leaves nothing behind. Ids are given out upwards and begin again at 1 after the last
//! one, so that an id whose object is gone does not soon mean another object.
//!
//! There are two ways of holding an object:
//!
//! - [`Use`] is what one object has on another one, for as long as it depends on it. An object that is in use cannot
//!   be destroyed: EBUSY.
//! - [`Short`] is what a call has while it runs. [`Table::destroy`] takes the object out of the table, so that no new
//!   call finds it, and waits for the calls that are running: when it returns the object is gone, not about to go. A call
//!   that turned its hold into a use meanwhile wins, and the object comes back.
//!
//! A vDEVICE whose device is gone leaves its id behind for ever (a tombstone: [`Table::entomb`]): a monitor that
//! destroys it later must not hit another object.
//!
//! The lock of the table is taken last: no other lock is taken, and no object dropped, while it is held. Objects refer
//! to others by [`Use`], which refers to the table; [`Table::clear`] at the end of the context breaks that circle.

use core::{fmt, mem, ops::Deref};
use std::{
    collections::BTreeMap,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use super::Object;
use crate::{Errno, Result};

/// The last id: the kernel's interface leaves the top bit alone.
const LAST_ID: u32 = i32::MAX as u32;

/// A kind of object: how to find it in an [`Object`].
pub(crate) trait Kind: Send + Sync + 'static {
    /// The object when it is of this kind.
    fn of(object: &Object) -> Option<&Arc<Self>>;

    /// It as an [`Object`].
    fn wrap(this: Arc<Self>) -> Object;
}

/// What an id stands for.
enum Slot {
    /// Nothing yet, or nothing any more: a reservation or a tombstone.
    Reserved,
    /// An object.
    Object {
        object: Object,
        /// How many [`Use`]s it has.
        users: u32,
        /// How many [`Short`]s it has.
        calls: u32,
        /// Somebody is destroying it: it is not found.
        dying: bool,
    },
}

#[derive(Default)]
struct Slots {
    slots: BTreeMap<u32, Slot>,
    /// The id that was given out last.
    last: u32,
}

/// The table.
pub(crate) struct Table {
    slots: Mutex<Slots>,
    /// Told when a call ends whose object somebody wants to destroy.
    call_ended: Condvar,
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.lock().slots.keys()).finish()
    }
}

impl Table {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { slots: Mutex::default(), call_ended: Condvar::new() })
    }

    /// Only whole steps happen under the lock: what a panicking thread leaves is in order.
    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether no id is in use.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().slots.is_empty()
    }

    /// An id for an object that is being made. ENOSPC when all are in use.
    pub(crate) fn reserve(self: &Arc<Self>) -> Result<Reservation> {
        let mut slots = self.lock();
        if slots.slots.len() >= LAST_ID as usize {
            return Err(Errno::NOSPC);
        }
        let mut id = slots.last;
        loop {
            id = if id == LAST_ID { 1 } else { id + 1 };
            if !slots.slots.contains_key(&id) {
                break;
            }
        }
        slots.last = id;
        slots.slots.insert(id, Slot::Reserved);
        Ok(Reservation { table: self.clone(), id, kept: false })
    }

    /// The object `id` for the length of a call. ENOENT when there is none, or one of another kind.
    pub(crate) fn get<T: Kind>(self: &Arc<Self>, id: u32) -> Result<Short<T>> {
        let object = self.count_call(id, |object| T::of(object).cloned())?;
        Ok(Short { object, call: Call { table: self.clone(), id } })
    }

    /// The object `id` of any kind for the length of a call, for calls that take several. ENOENT when there is none.
    pub(crate) fn get_any(self: &Arc<Self>, id: u32) -> Result<ShortAny> {
        let object = self.count_call(id, |object| Some(object.clone()))?;
        Ok(ShortAny { object, call: Call { table: self.clone(), id } })
    }

    fn count_call<T>(&self, id: u32, pick: impl FnOnce(&Object) -> Option<T>) -> Result<T> {
        match self.lock().slots.get_mut(&id) {
            Some(Slot::Object { object, calls, dying: false, .. }) => {
                let picked = pick(object).ok_or(Errno::NOENT)?;
                *calls += 1;
                Ok(picked)
            }
            _ => Err(Errno::NOENT),
        }
    }

    /// A use of `object`, which has or had the id `id`; none when it is gone, or going.
    pub(crate) fn find<T: Kind>(self: &Arc<Self>, id: u32, object: &Arc<T>) -> Option<Use<T>> {
        match self.lock().slots.get_mut(&id) {
            Some(Slot::Object { object: found, users, dying: false, .. })
                if T::of(found).is_some_and(|found| Arc::ptr_eq(found, object)) =>
            {
                *users = users.saturating_add(1);
            }
            _ => return None,
        }
        Some(Use { object: object.clone(), usage: Usage { table: self.clone(), id } })
    }

    /// Every object of a kind.
    pub(crate) fn all<T: Kind>(self: &Arc<Self>) -> Vec<Short<T>> {
        let mut slots = self.lock();
        let found = slots.slots.iter_mut().filter_map(|(&id, slot)| match slot {
            Slot::Object { object, calls, dying: false, .. } => {
                let object = T::of(object)?.clone();
                *calls += 1;
                Some(Short { object, call: Call { table: self.clone(), id } })
            }
            _ => None,
        });
        found.collect()
    }

    /// Destroys the object `id`. ENOENT when there is none, EBUSY while it is in use.
    pub(crate) fn destroy(&self, id: u32) -> Result<()> {
        let mut slots = self.lock();
        match slots.slots.get_mut(&id) {
            Some(Slot::Object { users: 1.., dying: false, .. }) => return Err(Errno::BUSY),
            Some(Slot::Object { dying: dying @ false, .. }) => *dying = true,
            _ => return Err(Errno::NOENT),
        }
        slots = self.await_calls(slots, id);
        match slots.slots.get_mut(&id) {
            Some(Slot::Object { users: 1.., dying, .. }) => {
                *dying = false;
                return Err(Errno::BUSY);
            }
            Some(Slot::Object { .. }) => {}
            // Its owner has destroyed it meanwhile.
            _ => return Err(Errno::NOENT),
        }
        let slot = slots.slots.remove(&id);
        drop(slots);
        drop(slot);
        Ok(())
    }

    /// Destroys the object of the last `usage` of it, however it came to be: its owner's way, which cannot fail.
    pub(crate) fn destroy_owned<T: Kind>(&self, usage: Use<T>) {
        let slot = self.take_out(usage.id(), None);
        drop(usage);
        drop(slot);
    }

    /// Destroys the object `id` whoever uses it, and leaves its id behind as a tombstone.
    pub(crate) fn entomb(&self, id: u32) {
        drop(self.take_out(id, Some(Slot::Reserved)));
    }

    /// Waits for the calls on `id`, and takes it out of the table, or puts `instead` there.
    fn take_out(&self, id: u32, instead: Option<Slot>) -> Option<Slot> {
        let mut slots = self.lock();
        if let Some(Slot::Object { dying, .. }) = slots.slots.get_mut(&id) {
            *dying = true;
        }
        slots = self.await_calls(slots, id);
        match (slots.slots.get(&id), instead) {
            (Some(Slot::Object { .. }), Some(slot)) => slots.slots.insert(id, slot),
            (Some(Slot::Object { .. }), None) => slots.slots.remove(&id),
            // The user has destroyed it meanwhile.
            _ => None,
        }
    }

    fn await_calls<'a>(&self, slots: MutexGuard<'a, Slots>, id: u32) -> MutexGuard<'a, Slots> {
        let running =
            |slots: &mut Slots| matches!(slots.slots.get(&id), Some(Slot::Object { calls: 1.., .. }));
        self.call_ended.wait_while(slots, running).unwrap_or_else(PoisonError::into_inner)
    }

    /// Destroys everything, what nothing depends on first.
    pub(crate) fn clear(&self) {
        loop {
            let mut slots = self.lock();
            let free = |slot: &Slot| !matches!(slot, Slot::Object { users: 1.., .. });
            let next = slots.slots.iter().rev().find(|(_, slot)| free(slot)).map(|(&id, _)| id);
            match next {
                Some(id) => {
                    let slot = slots.slots.remove(&id);
                    drop(slots);
                    drop(slot);
                }
                // What is left is used by what does not belong to the context; it lives as long as that.
                None => {
                    let rest = mem::take(&mut slots.slots);
                    drop(slots);
                    drop(rest);
                    return;
                }
            }
        }
    }

    fn end_call(&self, id: u32) {
        if let Some(Slot::Object { calls, dying, .. }) = self.lock().slots.get_mut(&id) {
            *calls = calls.saturating_sub(1);
            if *dying && *calls == 0 {
                self.call_ended.notify_all();
            }
        }
    }

    fn add_user(&self, id: u32) {
        if let Some(Slot::Object { users, .. }) = self.lock().slots.get_mut(&id) {
            *users = users.saturating_add(1);
        }
    }

    fn remove_user(&self, id: u32) {
        if let Some(Slot::Object { users, .. }) = self.lock().slots.get_mut(&id) {
            *users = users.saturating_sub(1);
        }
    }
}

/// An id without an object. Dropping it gives the id back.
#[derive(Debug)]
pub(crate) struct Reservation {
    table: Arc<Table>,
    id: u32,
    kept: bool,
}

impl Reservation {
    pub(crate) fn id(&self) -> u32 {
        self.id
    }

    /// From now on `object` is found by the id.
    pub(crate) fn finish(self, object: Object) {
        self.insert(object, 0);
    }

    /// As [`Self::finish`], and the caller uses the object.
    pub(crate) fn finish_used<T: Kind>(self, object: Arc<T>) -> Use<T> {
        let (table, id) = (self.table.clone(), self.id);
        self.insert(T::wrap(object.clone()), 1);
        Use { object, usage: Usage { table, id } }
    }

    fn insert(mut self, object: Object, users: u32) {
        self.kept = true;
        self.table.lock().slots.insert(self.id, Slot::Object { object, users, calls: 0, dying: false });
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.kept {
            self.table.lock().slots.remove(&self.id);
        }
    }
}

/// One call on an object.
#[derive(Debug)]
struct Call {
    table: Arc<Table>,
    id: u32,
}

impl Drop for Call {
    fn drop(&mut self) {
        self.table.end_call(self.id);
    }
}

/// An object for the length of a call.
#[derive(Debug)]
pub(crate) struct Short<T: ?Sized> {
    // Dropped first: whoever waits for the end of the call has the last hold on the object.
    object: Arc<T>,
    call: Call,
}

impl<T> Short<T> {
    /// A use beyond this call.
    pub(crate) fn hold(&self) -> Use<T> {
        let Call { table, id } = &self.call;
        table.add_user(*id);
        Use { object: self.object.clone(), usage: Usage { table: table.clone(), id: *id } }
    }

    /// The object itself, for what must not keep it from being destroyed.
    pub(crate) fn as_arc(&self) -> &Arc<T> {
        &self.object
    }
}

impl<T: ?Sized> Deref for Short<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.object
    }
}

/// An object of some kind for the length of a call.
#[derive(Debug)]
pub(crate) struct ShortAny {
    object: Object,
    call: Call,
}

impl ShortAny {
    /// It, when it is of kind `T`; itself back otherwise.
    pub(crate) fn downcast<T: Kind>(self) -> core::result::Result<Short<T>, Self> {
        match T::of(&self.object).cloned() {
            Some(object) => Ok(Short { object, call: self.call }),
            None => Err(self),
        }
    }
}

/// One use of an object.
struct Usage {
    table: Arc<Table>,
    id: u32,
}

impl Drop for Usage {
    fn drop(&mut self) {
        self.table.remove_user(self.id);
    }
}

/// An object for as long as something depends on it.
pub(crate) struct Use<T: ?Sized> {
    // Dropped first, as in `Short`.
    object: Arc<T>,
    usage: Usage,
}

impl<T: ?Sized> Use<T> {
    pub(crate) fn id(&self) -> u32 {
        self.usage.id
    }

    /// The object itself, for what must not keep it from being destroyed.
    pub(crate) fn as_arc(&self) -> &Arc<T> {
        &self.object
    }

    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.object, &other.object)
    }
}

impl<T: ?Sized> fmt::Debug for Use<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "object {}", self.id())
    }
}

impl<T: ?Sized> Clone for Use<T> {
    fn clone(&self) -> Self {
        let Usage { table, id } = &self.usage;
        table.add_user(*id);
        Self { object: self.object.clone(), usage: Usage { table: table.clone(), id: *id } }
    }
}

impl<T: ?Sized> Deref for Use<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.object
    }
}
