//! TLB tags for roots.
//!
//! PVM tags translations by their root table (specification, "TLB"). TLB tags here have twelve bits, and a
//! translation also depends on the protection keys: each pair of root and keys in use has a tag of its own, and the
//! one that was used longest ago loses it, with its translations, when there are too many.

use mmu::Gpa;

/// How many pairs have tags at a time. Two for each process, and the search is linear.
const TAGS: usize = 64;

/// What a translation depends on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Context {
    /// The root table.
    pub(super) root: Gpa,
    /// The protection keys in force, 0 where everything is allowed.
    pub(super) keys: u32,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    context: Context,
    tag: u64,
}

/// The pairs that have tags, the most recently used first.
#[derive(Clone, Debug, Default)]
pub(super) struct RootTags {
    entries: Vec<Entry>,
}

impl RootTags {
    /// The tag of `context`. If another one has to lose its tag, `evict` is called with it.
    #[inline]
    pub(super) fn tag(&mut self, context: Context, evict: impl FnOnce(u64)) -> u64 {
        // User and supervisor mode take turns: one of the first two.
        match self.entries.as_mut_slice() {
            [first, ..] if first.context == context => first.tag,
            [first, second, ..] if second.context == context => {
                std::mem::swap(first, second);
                first.tag
            }
            _ => self.find(context, evict),
        }
    }

    #[cold]
    fn find(&mut self, context: Context, evict: impl FnOnce(u64)) -> u64 {
        let entry = match self.entries.iter().position(|e| e.context == context) {
            Some(at) => self.entries.remove(at),
            None if self.entries.len() < TAGS => Entry { context, tag: self.entries.len() as u64 },
            None => {
                let tag = self.entries.pop().map_or(0, |e| e.tag);
                evict(tag);
                Entry { context, tag }
            }
        };
        self.entries.insert(0, entry);
        entry.tag
    }

    /// The tags of translations under `root`.
    pub(super) fn of_root(&self, root: Gpa) -> impl Iterator<Item = u64> {
        self.entries.iter().filter(move |e| e.context.root == root).map(|e| e.tag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(n: u64) -> Context {
        Context { root: Gpa(n << 12), keys: (n % 3) as u32 }
    }

    #[test]
    fn tags_are_kept_and_differ() {
        let mut tags = RootTags::default();
        let first: Vec<u64> =
            (0..TAGS as u64).map(|n| tags.tag(context(n), |_| panic!("room is left"))).collect();
        for n in (0..TAGS as u64).rev() {
            assert_eq!(tags.tag(context(n), |_| panic!("known")), first[n as usize]);
        }
        let mut sorted = first.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), TAGS);
    }

    #[test]
    fn the_one_not_used_for_longest_gives_way() {
        let mut tags = RootTags::default();
        for n in 0..TAGS as u64 {
            tags.tag(context(n), |_| ());
        }
        let zero = tags.tag(context(0), |_| panic!("known"));
        let mut evicted = None;
        let new = tags.tag(context(1000), |tag| evicted = Some(tag));
        assert_eq!(evicted, Some(new));
        assert_ne!(new, zero);
        assert_eq!(tags.of_root(context(1).root).count(), 0, "number 1 was the oldest");
        assert_eq!(tags.tag(context(0), |_| panic!("known")), zero);
    }

    #[test]
    fn a_root_has_a_tag_for_each_set_of_keys() {
        let mut tags = RootTags::default();
        let root = Gpa(0x5000);
        let a = tags.tag(Context { root, keys: 0 }, |_| ());
        let b = tags.tag(Context { root, keys: 4 }, |_| ());
        tags.tag(Context { root: Gpa(0x6000), keys: 0 }, |_| ());
        let mut found: Vec<u64> = tags.of_root(root).collect();
        found.sort_unstable();
        assert_eq!(found, [a, b]);
    }
}
