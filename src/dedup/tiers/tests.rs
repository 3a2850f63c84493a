//! Merges beside the batches, against a plain set, and against whatever ends them early.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::*;
use crate::dedup::filter::FilterEffort;
use crate::dedup::merge::merge;
use crate::dedup::{Key, Store, Verdict, verify};
use crate::event_time::EventTimeMs;
use crate::fingerprint::Fingerprint;
use crate::job::Repeats;

const HOUR_MS: i64 = 3_600_000;
const EPOCH: u64 = 4;

fn spec() -> StoreSpec {
    StoreSpec {
        job_id: Uuid::from_u128(7),
        key_spec_hash: "0123456789abcdef".into(),
        seed: 42,
        shards: 256,
        bucket_width_ms: HOUR_MS,
        repeats: Repeats::AnyTime,
    }
}

fn fingerprint(number: u64) -> Fingerprint {
    Fingerprint::from_value(xxh3_128(&number.to_le_bytes()) >> 40)
}

/// Keys `[begin, end)` of the hours from `hour` on, three of them.
fn keys_from(hour: i64, begin: u64, end: u64) -> Vec<Key> {
    let time = |number: u64| EventTimeMs((hour + (number % 3) as i64) * HOUR_MS);
    (begin..end).map(|number| Key { fingerprint: fingerprint(number), event_time: time(number) }).collect()
}

fn keys(begin: u64, end: u64) -> Vec<Key> {
    keys_from(1_000, begin, end)
}

fn name(batch: u64) -> GenerationName {
    GenerationName::new(EPOCH, batch, Uuid::new_v4())
}

fn files(folder: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).collect()
}

fn bytes_on_disk(folder: &Path) -> u64 {
    files(folder).iter().map(|file| fs::metadata(folder.join(file)).unwrap().len()).sum()
}

fn count_new(verdicts: &[Verdict]) -> u64 {
    verdicts.iter().filter(|verdict| **verdict == Verdict::New).count() as u64
}

/// A store that commits batches of the same number of new keys.
struct Run {
    folder: TempDir,
    store: Store,
    batch_keys: u64,
    committed: Vec<GenerationRef>,
}

impl Run {
    fn new(batch_keys: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), spec(), None, 0).unwrap();
        Self { folder, store, batch_keys, committed: Vec::new() }
    }

    /// A run after so many batches, with no merge that ended.
    fn held(batch_keys: u64, batches: u64) -> Self {
        let mut run = Self::new(batch_keys);
        run.store.hold_merges();
        (0..batches).for_each(|_| run.commit());
        run
    }

    fn keys(&self) -> u64 {
        self.committed.len() as u64 * self.batch_keys
    }

    fn probe_batch(&mut self) {
        let (begin, end) = (self.keys(), self.keys() + self.batch_keys);
        assert_eq!(count_new(&self.store.probe(&keys(begin, end)).unwrap()), self.batch_keys);
    }

    fn commit(&mut self) {
        self.probe_batch();
        let reference = self.store.prepare(name(self.committed.len() as u64)).unwrap();
        self.store.publish();
        self.committed.push(reference);
    }

    fn last(&self) -> &GenerationRef {
        self.committed.last().unwrap()
    }

    fn reopen(&mut self) {
        // The store before is dropped before the next one begins.
        self.store = Store::open(self.folder.path(), spec(), None, 0).unwrap();
        self.store = Store::open(self.folder.path(), spec(), self.committed.last(), 0).unwrap();
    }

    /// Nothing is lost, nothing is counted twice, and the last generation is whole.
    fn check(&mut self) {
        let all = self.keys();
        assert_eq!(self.store.stats().keys, all);
        assert_eq!(count_new(&self.store.probe(&keys(0, all)).unwrap()), 0);
        assert_eq!(verify(self.folder.path(), self.last()).unwrap().keys, all);
    }

    fn path(&self, file: impl ToString) -> PathBuf {
        self.folder.path().join(file.to_string())
    }
}

/// Files of a folder that hold the outputs of merges.
fn outputs(folder: &Path) -> BTreeSet<String> {
    files(folder)
        .into_iter()
        .filter(|file| file.ends_with(".segment") && !file.ends_with("-000.segment"))
        .collect()
}

#[test]
fn a_merge_appears_with_the_generation_after_its_end() {
    let mut run = Run::held(50, 9);
    assert_eq!(run.store.stats().segments, 9, "the merge of the first eight did not end");
    run.store.finish_merges();
    assert_eq!(run.store.stats().segments, 9);
    run.commit();
    assert_eq!(run.store.stats().segments, 3, "one merged, two of batches");
    assert_eq!((run.store.stats().merges, run.store.stats().merge_waits), (1, 0));
    run.check();
    run.reopen();
    run.check();
}

#[test]
fn a_tier_never_holds_more_than_fifteen_segments_and_a_batch_waits_only_for_that() {
    let mut run = Run::new(3);
    run.store.hold_merges();
    for batch in 0..300u64 {
        run.commit();
        let manifest = Manifest::read(run.folder.path(), run.last()).unwrap();
        let mut tiers: BTreeMap<u32, usize> = BTreeMap::new();
        manifest.segments.iter().for_each(|segment| *tiers.entry(segment.tier).or_default() += 1);
        assert!(tiers.values().all(|segments| *segments <= 15), "{tiers:?} after batch {batch}");
    }
    let stats = run.store.stats();
    // Every eighth batch from the 16th on waits for a merge of tier 0, and of these every eighth from the 16th on for
    // one of tier 1 too.
    assert_eq!((stats.merges, stats.merge_waits), (36 + 3, 36 + 3), "{stats:?}");
    run.check();
}

#[test]
fn processes_that_live_for_one_batch_keep_the_bound() {
    let mut run = Run::new(3);
    for _ in 0..40 {
        run.commit();
        // Nothing that runs outlives this.
        run.store.hold_merges();
        run.reopen();
        run.store.hold_merges();
        assert!(run.store.stats().segments <= 15 + 4, "{:?}", run.store.stats());
    }
    run.check();
}

#[test]
fn what_was_merged_is_good_for_the_next_generation_if_the_one_that_took_it_is_abandoned() {
    let mut run = Run::held(50, 8);
    run.store.finish_merges();
    for _ in 0..3 {
        run.probe_batch();
        run.store.prepare(name(8)).unwrap();
        assert_eq!(run.store.stats().segments, 2);
        let probed = keys(0, run.keys());
        assert_eq!(count_new(&run.store.probe(&probed).unwrap()), 0);
        run.store.abandon();
        assert_eq!(run.store.stats().segments, 8);
    }
    let written = run.store.stats().merge_bytes_written;
    run.commit();
    assert_eq!(run.store.stats().segments, 2);
    assert_eq!((run.store.stats().merges, run.store.stats().merge_bytes_written), (1, written));
    run.check();
}

#[test]
fn a_merge_that_began_with_an_abandoned_batch_is_thrown_away() {
    let mut run = Run::held(50, 7);
    run.probe_batch();
    run.store.prepare(name(7)).unwrap();
    assert_eq!(outputs(run.folder.path()).len(), 1, "the eighth segment began a merge");
    run.store.abandon();
    run.commit();
    // It has gone, and the one of the eight that stand has begun.
    assert_eq!(outputs(run.folder.path()).len(), 1);
    run.store.finish_merges();
    run.commit();
    assert_eq!(run.store.stats().segments, 2);
    run.check();
}

#[test]
fn a_store_that_is_dropped_leaves_no_file_that_nobody_names() {
    for ends_first in [false, true] {
        let mut run = Run::held(50, 8);
        assert_eq!(outputs(run.folder.path()).len(), 1);
        if ends_first {
            run.store.finish_merges();
        }
        run.reopen();
        run.store.hold_merges();
        // The full tier is merged again at once.
        assert_eq!(outputs(run.folder.path()).len(), 1);
        run.store.finish_merges();
        run.commit();
        assert_eq!(run.store.stats().segments, 2);
        run.check();
    }
}

#[test]
fn an_output_that_a_generation_of_unknown_outcome_names_outlives_its_store() {
    let mut run = Run::held(50, 8);
    run.store.finish_merges();
    run.probe_batch();
    let prepared = run.store.prepare(name(8)).unwrap();
    // The process ends before it knows whether its commit landed: it did.
    run.committed.push(prepared);
    run.reopen();
    assert_eq!(run.store.stats().segments, 2);
    run.check();
}

#[test]
fn what_a_crash_left_is_in_nobodys_way_and_is_swept() {
    let mut run = Run::held(50, 8);
    let output = outputs(run.folder.path()).pop_first().unwrap();
    let torn = fs::read(run.path(format!("{}-000.segment", run.last().name))).unwrap();
    run.store = Store::open(run.folder.path(), spec(), None, 0).unwrap();
    assert!(!files(run.folder.path()).contains(&output));
    fs::write(run.path(&output), &torn[..torn.len() / 2]).unwrap();

    run.reopen();
    run.store.hold_merges();
    let running = format!("{}-002.segment", run.last().name);
    assert!(files(run.folder.path()).contains(&running), "the next free number is taken");
    let keep = [run.last().clone()];
    run.store.sweep(&keep, EPOCH + 1).unwrap();
    let left = files(run.folder.path());
    assert!(!left.contains(&output) && left.contains(&running), "{left:?}");
    run.store.finish_merges();
    run.commit();
    assert_eq!(run.store.stats().segments, 2);
    run.check();
}

#[test]
fn a_sweep_of_the_own_epoch_spares_merges_that_run_or_ended() {
    for ends_first in [false, true] {
        let mut run = Run::held(50, 8);
        if ends_first {
            run.store.finish_merges();
        }
        let keep = [run.last().clone()];
        let report = run.store.sweep(&keep, EPOCH + 1).unwrap();
        assert_eq!(report.files, 7, "the manifests before the last");
        run.store.finish_merges();
        run.commit();
        assert_eq!(run.store.stats().segments, 2);
        run.check();
    }
}

#[test]
fn a_page_that_a_merge_finds_corrupt_is_the_outcome_of_the_next_prepare() {
    let mut run = Run::held(2_000, 8);
    let file = format!("{}-000.segment", run.committed[2].name);
    let good = fs::read(run.path(&file)).unwrap();
    let mut bad = good.clone();
    let page_byte = bad.len() / 2;
    bad[page_byte] ^= 1;
    fs::write(run.path(&file), &bad).unwrap();
    run.store.finish_merges();
    match run.store.prepare(name(8)) {
        Err(StoreError::Corrupt { file: named, .. }) => assert_eq!(named, file),
        other => panic!("{other:?}"),
    }
    assert!(outputs(run.folder.path()).is_empty(), "a failed merge leaves no file");
    run.store.abandon();
    fs::write(run.path(&file), &good).unwrap();
    run.commit();
    run.store.finish_merges();
    run.commit();
    assert_eq!(run.store.stats().merges, 1);
    run.check();
}

#[test]
fn a_full_disk_does_not_hurt_batches_until_a_tier_is_at_its_bound() {
    let mut run = Run::new(20);
    run.store.set_disk_full(true);
    for _ in 0..15 {
        run.commit();
        run.store.finish_merges();
    }
    let failed = run.store.stats().merges_failed;
    assert!((1..=2).contains(&failed), "{failed} failures: each is tried again only some batches later");
    assert!(outputs(run.folder.path()).is_empty());
    run.probe_batch();
    let at_bound = run.store.prepare(name(15));
    assert!(matches!(at_bound, Err(StoreError::Io { .. })), "{at_bound:?}");
    run.store.abandon();
    run.check();
    run.store.abandon();
    run.store.set_disk_full(false);
    run.commit();
    assert_eq!(run.store.stats().segments, 1 + 8);
    run.check();
}

/// Writes what `last` names again, without its first bucket.
fn without_first_bucket(folder: &Path, last: &GenerationRef) -> (GenerationRef, BucketTally) {
    let mut manifest = Manifest::read(folder, last).unwrap();
    let dead = manifest.buckets.remove(0);
    manifest.complete_since = dead.to;
    (manifest.write(folder, name(99)).unwrap(), dead)
}

#[test]
fn a_segment_that_is_mostly_dead_is_written_again_and_one_that_is_all_dead_goes() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(folder.path(), spec(), None, 0).unwrap();
    let hour = |hour: i64, begin: u64, end: u64| -> Vec<Key> {
        let event_time = EventTimeMs(hour * HOUR_MS);
        (begin..end).map(|number| Key { fingerprint: fingerprint(number), event_time }).collect()
    };
    let batches = [
        vec![hour(1_000, 0, 100)],
        vec![hour(1_000, 100, 300), hour(1_001, 300, 400)],
        vec![hour(1_000, 400, 450), hour(1_001, 450, 600)],
    ];
    let mut last = None;
    for (batch, keys) in batches.iter().enumerate() {
        store.probe(&keys.concat()).unwrap();
        last = Some(store.prepare(name(batch as u64)).unwrap());
        store.publish();
    }
    assert_eq!(store.stats().dead_bytes, 0);
    let (last, _) = without_first_bucket(folder.path(), &last.unwrap());
    let mut store = Store::open(folder.path(), spec(), Some(&last), 0).unwrap();
    let dead_bytes = store.stats().dead_bytes;
    assert!(dead_bytes > 0);
    store.finish_merges();
    let next = store.prepare(name(100)).unwrap();
    store.publish();
    let manifest = Manifest::read(folder.path(), &next).unwrap();
    let segments: Vec<(u32, u64)> =
        manifest.segments.iter().map(|segment| (segment.tier, segment.keys)).collect();
    // The first has gone, the second lost its 200 dead keys, the third is dead by a quarter and stays.
    assert_eq!(segments, [(0, 100), (0, 200)]);
    assert!(store.stats().dead_bytes < dead_bytes / 2);
    assert_eq!(verify(folder.path(), &next).unwrap().keys, 250);
    assert_eq!(count_new(&store.probe(&hour(1_001, 300, 400)).unwrap()), 0);
    assert_eq!(count_new(&store.probe(&hour(1_001, 450, 610)).unwrap()), 10);
}

#[test]
fn an_output_that_lacks_a_bucket_does_not_enter_a_generation_that_has_it_again() {
    let run = Run::held(50, 8);
    let folder = run.folder.path();
    let files =
        SegmentFiles { folder: folder.to_owned(), spec: spec(), limits: Limits::of(0), state_keys: 0 };
    let open = |reference: &GenerationRef| {
        let manifest = Manifest::read(folder, reference).unwrap();
        let open = |entry| Arc::new(Segment::open(folder, entry, &spec()).unwrap());
        let segments: Vec<Arc<Segment>> = manifest.segments.iter().map(open).collect();
        Generation::new(manifest, segments, Some(reference.name)).unwrap()
    };
    let (without, _) = without_first_bucket(folder, run.last());
    for (reference, segments) in [(&without, 1), (run.last(), 8)] {
        let mut merges = Merges::new(files.clone());
        merges.start_due(&open(&without));
        merges.finish();
        let generation = open(reference);
        let mut draft = Draft { manifest: generation.manifest, segments: generation.segments };
        merges.settle(&mut draft, name(9)).unwrap();
        assert_eq!(draft.segments.len(), segments);
        Generation::new(draft.manifest, draft.segments, None).unwrap();
    }
}

#[test]
fn copies_of_a_key_in_a_bucket_collapse_and_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let files =
        SegmentFiles { folder: folder.path().to_owned(), spec: spec(), limits: Limits::of(0), state_keys: 0 };
    let bucket = Bucket { from: EventTimeMs(0), to: EventTimeMs(HOUR_MS) };
    let write = |number: u32, numbers: std::ops::Range<u64>| {
        let name = SegmentName { generation: name(1), number };
        let mut writer = files.begin(name, FilterEffort::Quick).unwrap();
        let mut values: Vec<u128> = numbers.map(|number| fingerprint(number).value()).collect();
        values.sort_unstable();
        let mut section = writer.section(bucket, (EventTimeMs(0), EventTimeMs(1)), values.len() as u64);
        section.push_all(&values).unwrap();
        section.finish().unwrap();
        Arc::new(files.end(name, writer, 0).unwrap())
    };
    let inputs = [write(0, 0..5_000), write(1, 3_000..9_000), write(2, 4_500..5_500)];
    let expected = write(3, 0..9_000);
    let name = SegmentName { generation: name(2), number: 9 };
    let mut writer = files.begin(name, FilterEffort::Quick).unwrap();
    let merged = merge(&inputs, None, &mut writer, 4096, &mut |_| ControlFlow::Continue(()));
    let merged = merged.unwrap().unwrap();
    let output = files.end(name, writer, 1).unwrap();
    assert_eq!(merged.kept[&bucket], expected.sections[0].tally);
    assert_eq!(merged.collapsed[&bucket].keys, 3_000);
    assert_eq!(output.sections[0].tally, expected.sections[0].tally);
    output.check_section(&output.sections[0], 4096).unwrap();
}

#[test]
fn disk_stays_within_three_times_the_live_segments_while_an_owner_runs_and_sweeps() {
    let mut run = Run::new(2_000);
    for batch in 0..150 {
        run.commit();
        let keep = &run.committed[run.committed.len().saturating_sub(3)..];
        if run.store.retired_files() >= 8 {
            run.store.sweep(keep, EPOCH + 1).unwrap();
        }
        let on_disk = bytes_on_disk(run.folder.path());
        let live = run.store.stats().segment_bytes;
        // Manifests are large against batches of so few keys.
        let manifests = 16 * 20_000;
        assert!(on_disk <= 3 * live + manifests, "{on_disk} on disk, {live} live after batch {batch}");
    }
    let stats = run.store.stats();
    assert!(stats.segment_bytes_written > 0 && stats.merge_bytes_written > 0, "{stats:?}");
    run.check();
}

/// What a caller and its merges may do, in any order.
#[derive(Debug, Clone)]
enum Step {
    Probe(Vec<u64>),
    Commit,
    PrepareAndAbandon,
    FinishMerges,
    Sweep,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => prop::collection::vec(0u64..400, 1..20).prop_map(Step::Probe),
        8 => Just(Step::Commit),
        1 => Just(Step::PrepareAndAbandon),
        3 => Just(Step::FinishMerges),
        2 => Just(Step::Sweep),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..150)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// Goal: whatever merges do beside the batches, the state says what a plain set would say, and no file is lost or
    /// left.
    /// Method: merges end only when a step says so; many tiny commits, abandoned ones among them.
    #[test]
    fn dedup_with_merges_beside_it_agrees_with_a_plain_set(steps in steps()) {
        let folder = tempfile::tempdir().unwrap();
        let open = |reference: Option<&GenerationRef>| {
            let mut store = Store::open(folder.path(), spec(), reference, 0).unwrap();
            store.hold_merges();
            store
        };
        let mut store = open(None);
        let (mut committed, mut pending) = (HashSet::new(), HashSet::new());
        let mut last: Vec<GenerationRef> = Vec::new();
        for (number, step) in steps.into_iter().enumerate() {
            let batch = number as u64;
            match step {
                Step::Probe(numbers) => {
                    let batch: Vec<Key> = numbers.iter().flat_map(|number| keys(*number, number + 1)).collect();
                    let is_new = |number: &u64| !committed.contains(number) && pending.insert(*number);
                    let expected: Vec<bool> = numbers.iter().map(is_new).collect();
                    let found: Vec<bool> =
                        store.probe(&batch).unwrap().iter().map(|verdict| *verdict == Verdict::New).collect();
                    prop_assert_eq!(found, expected);
                }
                Step::Commit => {
                    last.push(store.prepare(name(batch)).unwrap());
                    store.publish();
                    committed.extend(pending.drain());
                }
                Step::PrepareAndAbandon => {
                    store.prepare(name(batch)).unwrap();
                    store.abandon();
                    pending.clear();
                }
                Step::FinishMerges => store.finish_merges(),
                Step::Sweep => {
                    store.sweep(&last[last.len().saturating_sub(2)..], EPOCH + 1).unwrap();
                }
                Step::Reopen => {
                    drop(store);
                    store = open(last.last());
                    pending.clear();
                }
            }
            prop_assert_eq!(store.stats().keys, committed.len() as u64);
            prop_assert!(store.stats().segments <= 15 * 3);
        }
        let Some(last) = last.pop() else { return Ok(()) };
        store.sweep(std::slice::from_ref(&last), EPOCH + 1).unwrap();
        drop(store);
        prop_assert_eq!(verify(folder.path(), &last).unwrap().keys, committed.len() as u64);
        let manifest = Manifest::read(folder.path(), &last).unwrap();
        let mut named: BTreeSet<String> =
            manifest.segments.iter().map(|segment| segment.name.to_string()).collect();
        named.insert(last.name.manifest_file());
        // An output that an abandoned generation named outlives its store: the next owner's sweep takes it.
        crate::dedup::sweep(folder.path(), &[last], EPOCH + 1).unwrap();
        prop_assert_eq!(files(folder.path()), named);
    }
}
