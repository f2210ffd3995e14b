//! How many users each page has.

use std::collections::BTreeMap;

/// A range of pages; both ends belong to it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) last: u64,
}

impl Span {
    pub(super) fn pages(self) -> u64 {
        self.last - self.first + 1
    }

    pub(super) fn overlaps(self, other: Self) -> bool {
        self.first <= other.last && other.first <= self.last
    }
}

/// Pages with users: they have the same number, and their neighbours another one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Used {
    last: u64,
    users: u64,
}

/// A number for each page that is 0 for most: kept as ranges in which it is the same, so that a gigabyte with one user is
/// one entry.
#[derive(Debug, Default)]
pub(super) struct Counts {
    ranges: BTreeMap<u64, Used>,
}

impl Counts {
    /// The parts of `span` that nobody uses, in order.
    pub(super) fn gaps(&self, span: Span) -> Vec<Span> {
        let mut gaps = Vec::new();
        let mut next = span.first;
        let before = self.ranges.range(..=span.first).next_back();
        if let Some((_, used)) = before
            && used.last >= span.first
        {
            if used.last >= span.last {
                return gaps;
            }
            next = used.last + 1;
        }
        for (&first, used) in self.ranges.range(next..=span.last) {
            if first > next {
                gaps.push(Span { first: next, last: first - 1 });
            }
            if used.last >= span.last {
                return gaps;
            }
            next = used.last + 1;
        }
        gaps.push(Span { first: next, last: span.last });
        gaps
    }

    /// One user more for each page of `span`.
    pub(super) fn add(&mut self, span: Span) {
        self.cut(span);
        for gap in self.gaps(span) {
            self.ranges.insert(gap.first, Used { last: gap.last, users: 0 });
        }
        for (_, used) in self.ranges.range_mut(span.first..=span.last) {
            used.users += 1;
        }
        self.join(span);
    }

    /// One user less for each page of `span`, all of which have one. Returns the parts that have none left.
    pub(super) fn remove(&mut self, span: Span) -> Vec<Span> {
        self.cut(span);
        let mut unused = Vec::new();
        for (&first, used) in self.ranges.range_mut(span.first..=span.last) {
            debug_assert!(used.users > 0);
            used.users = used.users.saturating_sub(1);
            if used.users == 0 {
                unused.push(Span { first, last: used.last });
            }
        }
        for part in &unused {
            self.ranges.remove(&part.first);
        }
        self.join(span);
        unused
    }

    /// Makes ranges begin and end where `span` does.
    fn cut(&mut self, span: Span) {
        self.cut_before(span.first);
        if let Some(after) = span.last.checked_add(1) {
            self.cut_before(after);
        }
    }

    fn cut_before(&mut self, page: u64) {
        if let Some((&first, used)) = self.ranges.range_mut(..page).next_back()
            && used.last >= page
        {
            let rest = *used;
            used.last = page - 1;
            debug_assert!(first < page);
            self.ranges.insert(page, rest);
        }
    }

    /// Makes neighbours in and beside `span` one that have the same number of users.
    fn join(&mut self, span: Span) {
        let from = self.ranges.range(..span.first).next_back().map_or(span.first, |(&first, _)| first);
        let to = span.last.saturating_add(1);
        let mut joined: Option<(u64, Used)> = None;
        let mut gone = Vec::new();
        let mut longer = Vec::new();
        for (&first, &used) in self.ranges.range(from..=to) {
            match &mut joined {
                Some((_, so_far))
                    if so_far.last.checked_add(1) == Some(first) && so_far.users == used.users =>
                {
                    so_far.last = used.last;
                    gone.push(first);
                }
                _ => longer.extend(joined.replace((first, used))),
            }
        }
        if gone.is_empty() {
            return;
        }
        for first in gone {
            self.ranges.remove(&first);
        }
        for (first, used) in longer.into_iter().chain(joined) {
            self.ranges.insert(first, used);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 24;

    fn spans() -> impl Strategy<Value = Vec<Span>> {
        prop::collection::vec((0..PAGES, 0..PAGES), 1..40).prop_map(|ends| {
            ends.into_iter().map(|(a, b)| Span { first: a.min(b), last: a.max(b) }).collect()
        })
    }

    fn check(counts: &Counts, model: &[u64]) {
        for (page, &users) in model.iter().enumerate() {
            let page = page as u64;
            let here = counts.ranges.range(..=page).next_back().filter(|(_, used)| used.last >= page);
            assert_eq!(here.map_or(0, |(_, used)| used.users), users, "page {page}");
        }
        let mut before: Option<(u64, u64)> = None;
        for (&first, used) in &counts.ranges {
            assert!(used.users > 0 && first <= used.last);
            if let Some((last, users)) = before {
                assert!(last < first);
                assert!(last + 1 < first || users != used.users, "neighbours are joined");
            }
            before = Some((used.last, used.users));
        }
    }

    fn runs_of_zero(model: &[u64], span: Span) -> Vec<Span> {
        let mut runs: Vec<Span> = Vec::new();
        for page in span.first..=span.last {
            if model[page as usize] > 0 {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.last + 1 == page => run.last = page,
                _ => runs.push(Span { first: page, last: page }),
            }
        }
        runs
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn counts_are_those_of_an_array(spans in spans(), order in prop::collection::vec(any::<prop::sample::Index>(), 40)) {
            let mut counts = Counts::default();
            let mut model = vec![0; PAGES as usize];
            let mut live = Vec::new();
            for span in spans {
                prop_assert_eq!(counts.gaps(span), runs_of_zero(&model, span));
                counts.add(span);
                (span.first..=span.last).for_each(|page| model[page as usize] += 1);
                check(&counts, &model);
                live.push(span);
            }
            for index in order {
                if live.is_empty() {
                    break;
                }
                let span = live.swap_remove(index.index(live.len()));
                let unused = counts.remove(span);
                (span.first..=span.last).for_each(|page| model[page as usize] -= 1);
                check(&counts, &model);
                let pages: u64 = unused.iter().map(|part| part.pages()).sum();
                let zero: u64 = runs_of_zero(&model, span).iter().map(|part| part.pages()).sum();
                prop_assert_eq!(pages, zero);
            }
            prop_assert!(!live.is_empty() || counts.ranges.is_empty());
        }
    }

    #[test]
    fn the_last_page_of_all_can_be_counted() {
        let all = Span { first: 0, last: u64::MAX };
        let mut counts = Counts::default();
        counts.add(all);
        counts.add(Span { first: u64::MAX, last: u64::MAX });
        assert!(counts.gaps(all).is_empty());
        assert_eq!(counts.remove(all), [Span { first: 0, last: u64::MAX - 1 }]);
    }
}
