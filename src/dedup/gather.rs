//! A probe batch that is gathered part by part and looked up at once.
//!
//! The larger a batch, the cheaper its lookup where the state is larger than memory: filters that are not in memory are read
//! once for all of it, and pages that lie near each other become one read. So keys are gathered beyond what rows fit in memory.
//!
//! Flow: [`Store::gather`](super::Store::gather) -> probes in the order of their parts -> sorted where they lie -> marked by a
//! lookup -> verdicts, and the new ones become pending entries where they lie
//!
//! Bounds: [`ProbeBatch::bytes`]; nothing else until the verdicts, a byte each.

use rayon::slice::ParallelSliceMut;

use super::lookup::Probe;
use super::pending::Entry;
use super::{Key, Verdict};
use crate::job::Repeats;
use crate::mutant;

/// Bytes of a key that is gathered: its probe, which becomes its pending entry, and the ordinal of its bucket.
const GATHERED_KEY_BYTES: u64 = (size_of::<Probe>() + size_of::<u32>()) as u64;

/// Keys that are to be looked up together.
#[derive(Debug, Default)]
pub struct ProbeBatch {
    probes: Vec<Probe>,
    /// By place, the ordinal of the key's bucket.
    ordinals: Vec<u32>,
    /// Place of the first key of each run of one rank, and the rank; ascending by place.
    ranks: Vec<(u32, u32)>,
}

impl ProbeBatch {
    /// Keys in it.
    pub fn len(&self) -> usize {
        self.probes.len()
    }

    /// Bytes that its keys take: 20 each (probe 16, ordinal of the bucket 4), and 8 for each run of one rank.
    pub fn bytes(&self) -> u64 {
        self.len() as u64 * GATHERED_KEY_BYTES + size_of_val(self.ranks.as_slice()) as u64
    }

    /// Whether it holds no key.
    pub fn is_empty(&self) -> bool {
        self.probes.is_empty()
    }

    /// # Panics
    /// If the batch holds 2^32 keys or more.
    pub(super) fn push(&mut self, rank: u32, keys: &[Key], ordinals: &[u32]) {
        let begin = self.probes.len();
        let place = |index: usize| u32::try_from(index).expect("a probe batch holds fewer than 2^32 keys");
        if self.ranks.last().is_none_or(|(_, last)| *last != rank) {
            self.ranks.push((place(begin), rank));
        }
        let probe = |(index, key): (usize, &Key)| Probe::new(key.fingerprint.value(), place(begin + index));
        self.probes.extend(keys.iter().enumerate().map(probe));
        self.ordinals.extend_from_slice(ordinals);
    }

    /// Probes that are looked for in the same place, sorted, with the ordinal of their bucket, or 0 where they are looked for in
    /// all. All copies of a key but the one that wins are marked.
    pub(super) fn groups(&mut self, repeats: Repeats) -> Vec<(u32, &mut [Probe])> {
        let Self { probes, ordinals, ranks } = self;
        let ordinal = |probe: &Probe| match repeats {
            Repeats::AnyTime => 0,
            Repeats::SameTime => ordinals[probe.index()],
        };
        match repeats {
            Repeats::AnyTime => probes.par_sort_unstable(),
            Repeats::SameTime => probes.par_sort_unstable_by_key(|probe| (ordinal(probe), *probe)),
        }
        let mut groups = Vec::new();
        for group in probes.chunk_by_mut(|one, other| ordinal(one) == ordinal(other)) {
            let rank = |place| mutant!("winner-by-arrival-across-chunks", 0 => rank_of(ranks, place));
            mark_losers(group, |probe| (rank(probe.index()), probe.index()));
            groups.push((ordinal(&group[0]), group));
        }
        groups
    }

    /// A verdict for each place, and the keys that are new as entries: sorted as the probes are, in the memory of the probes.
    pub(super) fn into_verdicts(self) -> (Vec<Verdict>, Vec<Entry>) {
        let Self { probes, ordinals, .. } = self;
        let mut verdicts = vec![Verdict::Duplicate; probes.len()];
        let new = probes.into_iter().filter(|probe| !probe.is_found()).map(|probe| {
            verdicts[probe.index()] = Verdict::New;
            Entry::new(probe.value(), ordinals[probe.index()])
        });
        let mut entries: Vec<Entry> = new.collect();
        // The memory of repeats is not kept with them: nobody counts it.
        entries.shrink_to_fit();
        (verdicts, entries)
    }
}

/// The rank of the key at a place.
fn rank_of(ranks: &[(u32, u32)], place: usize) -> u32 {
    let after = ranks.partition_point(|(begin, _)| *begin as usize <= place);
    ranks[after - 1].1
}

/// Marks every copy of a key but the one of the lowest rank. Probes are sorted by fingerprint.
fn mark_losers<R: Ord>(probes: &mut [Probe], rank: impl Fn(&Probe) -> R) {
    for copies in probes.chunk_by_mut(|one, other| one.value() == other.value()) {
        if copies.len() == 1 {
            continue;
        }
        let winner = copies.iter().map(&rank).min();
        for copy in copies {
            if mutant!("later-copies-pass", false => Some(rank(copy)) != winner) {
                copy.mark_found();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event_time::EventTimeMs;
    use crate::fingerprint::Fingerprint;

    fn keys(values: &[u128]) -> Vec<Key> {
        let key =
            |value: &u128| Key { fingerprint: Fingerprint::from_value(*value), event_time: EventTimeMs(0) };
        values.iter().map(key).collect()
    }

    fn gathered(parts: &[(u32, &[u128], &[u32])]) -> ProbeBatch {
        let mut batch = ProbeBatch::default();
        parts.iter().for_each(|(rank, values, ordinals)| batch.push(*rank, &keys(values), ordinals));
        batch
    }

    fn new_places(verdicts: &[Verdict]) -> Vec<usize> {
        (0..verdicts.len()).filter(|place| verdicts[*place] == Verdict::New).collect()
    }

    #[test]
    fn of_equal_keys_the_lowest_rank_wins_and_then_the_first() {
        // two parts of two topic partitions each: 7 stands in both, the lower one's comes later; 9 twice in one
        let parts: [(u32, &[u128], &[u32]); 4] =
            [(0, &[1, 9], &[0, 0]), (5, &[7, 2], &[0, 0]), (0, &[9, 7], &[0, 0]), (5, &[3, 7], &[0, 0])];
        let mut batch = gathered(&parts);
        assert_eq!(batch.groups(Repeats::AnyTime).len(), 1);
        let (verdicts, entries) = batch.into_verdicts();
        assert_eq!(new_places(&verdicts), [0, 1, 3, 5, 6]);
        assert_eq!(entries.iter().map(|entry| entry.value()).collect::<Vec<_>>(), [1, 2, 3, 7, 9]);
    }

    #[test]
    fn equal_keys_of_two_buckets_are_both_new_where_each_bucket_is_looked_in_alone() {
        let parts: [(u32, &[u128], &[u32]); 2] = [(0, &[4, 4, 1], &[2, 0, 2]), (1, &[4], &[2])];
        let mut batch = gathered(&parts);
        let groups = batch.groups(Repeats::SameTime);
        let shown: Vec<(u32, usize)> =
            groups.iter().map(|(ordinal, probes)| (*ordinal, probes.len())).collect();
        assert_eq!(shown, [(0, 1), (2, 3)]);
        let (verdicts, entries) = batch.into_verdicts();
        assert_eq!(new_places(&verdicts), [0, 1, 2]);
        let entries: Vec<_> = entries.iter().map(|entry| (entry.bucket(), entry.value())).collect();
        assert_eq!(entries, [(0, 4), (2, 1), (2, 4)]);
        let mut batch = gathered(&parts);
        assert_eq!(batch.groups(Repeats::AnyTime).len(), 1);
        assert_eq!(new_places(&batch.into_verdicts().0), [0, 2]);
    }

    #[test]
    fn entries_take_the_memory_of_their_probes() {
        let mut batch = gathered(&[(0, &[5, 3, 5, 8], &[0; 4])]);
        batch.groups(Repeats::AnyTime);
        let probes_at = batch.probes.as_ptr().addr();
        let (_, entries) = batch.into_verdicts();
        assert_eq!((entries.as_ptr().addr(), entries.len()), (probes_at, 3));
    }

    #[test]
    fn repeats_leave_no_memory_behind() {
        let values: Vec<u128> = (0..1_000).collect();
        let mut batch = gathered(&[(0, &values, &[0; 1_000])]);
        for group in batch.groups(Repeats::AnyTime) {
            group.1.iter_mut().skip(1).for_each(Probe::mark_found);
        }
        let (_, entries) = batch.into_verdicts();
        assert_eq!((entries.len(), entries.capacity()), (1, 1));
    }
}
