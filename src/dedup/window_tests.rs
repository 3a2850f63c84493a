//! The window of the dedup state against a plain table of rows: expiry, grace, loans, widening, changed widths.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::generation::Manifest;
use super::*;

const HOUR_MS: i64 = 3_600_000;
/// Where the event times of these tests begin.
const BEGIN_HOUR: i64 = 1_000;

fn spec(repeats: Repeats, window_hours: i64) -> StoreSpec {
    StoreSpec {
        job_id: Uuid::from_u128(0x7469_6465),
        key_spec_hash: "0123456789abcdef".into(),
        seed: 42,
        shards: 256,
        bucket_width_ms: window_hours * HOUR_MS / 8,
        repeats,
    }
}

fn hours(count: i64) -> Duration {
    Duration::from_millis((count * HOUR_MS) as u64)
}

/// An event time, in hours after the begin.
fn at(hour: i64) -> EventTimeMs {
    EventTimeMs((BEGIN_HOUR + hour) * HOUR_MS)
}

fn key(number: u64, event_time: EventTimeMs) -> Key {
    Key { fingerprint: Fingerprint::from_value(xxh3_128(&number.to_le_bytes()) >> 40), event_time }
}

fn name(batch: u64) -> GenerationName {
    GenerationName::new(1, batch, Uuid::new_v4())
}

/// A state of buckets of one hour (a window of eight), and the rows that were written by it.
struct Job {
    folder: TempDir,
    store: Store,
    table: Vec<Key>,
    pending: Vec<Key>,
    last: Option<GenerationRef>,
    batch: u64,
    loads: Vec<Bucket>,
}

impl Job {
    fn new(repeats: Repeats, window_hours: i64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), spec(repeats, window_hours), None, 0).unwrap();
        let (table, pending, loads) = (Vec::new(), Vec::new(), Vec::new());
        Self { folder, store, table, pending, last: None, batch: 0, loads }
    }

    /// Loads what is missing from the table, then probes; what is new will be written to the table.
    fn probe(&mut self, keys: &[Key]) -> Vec<Verdict> {
        let missing = self.store.missing_buckets(keys);
        if !missing.is_empty() {
            let loan = self.load(&missing);
            self.store.borrow(loan);
            self.loads.extend(missing);
        }
        let verdicts = self.store.probe(keys).unwrap();
        let new = keys.iter().zip(&verdicts).filter(|(_, verdict)| **verdict == Verdict::New);
        self.pending.extend(new.map(|(key, _)| *key));
        verdicts
    }

    fn load(&self, slices: &[Bucket]) -> Loan {
        let mut loader = self.store.begin_loan(slices, 0).unwrap();
        for rows in self.table.chunks(7) {
            loader.add(rows).unwrap();
        }
        loader.finish().unwrap()
    }

    fn commit(&mut self, watermark: EventTimeMs, window_hours: i64) {
        self.store.expire_behind(watermark, hours(window_hours));
        self.batch += 1;
        self.last = Some(self.store.prepare(name(self.batch)).unwrap());
        self.store.publish();
        self.table.append(&mut self.pending);
    }

    fn abandon(&mut self) {
        self.store.abandon();
        self.pending.clear();
    }

    /// A new life, in which the job may ask for another window.
    fn restart(&mut self, repeats: Repeats, window_hours: i64, watermark: EventTimeMs) {
        self.pending.clear();
        let spec = spec(repeats, window_hours);
        self.store = Store::open(self.folder.path(), spec, self.last.as_ref(), 0).unwrap();
        let since = self.store.bucket_begin(watermark.minus_ms(window_hours * HOUR_MS));
        if since < self.store.complete_since() {
            let loan = self.load(&self.store.missing_since(since));
            self.store.adopt(loan, since);
        }
    }

    /// The live buckets as the table says they are.
    fn rebuilt(&self, repeats: Repeats) -> Vec<BucketTally> {
        let folder = tempfile::tempdir().unwrap();
        let spec = StoreSpec { bucket_width_ms: self.store.bucket_width_ms(), ..spec(repeats, 8) };
        let mut builder = Builder::create(folder.path(), spec, 0, self.store.floor())
            .and_then(|builder| builder.of_history(self.store.eras(), self.store.complete_since()))
            .unwrap();
        builder.add(&self.table).unwrap();
        let (reference, report) = builder.finish(name(9)).unwrap();
        assert_eq!(verify(folder.path(), &reference).unwrap().keys, report.keys);
        report.buckets
    }
}

use Verdict::{Duplicate, New};

#[test]
fn a_bucket_expires_when_its_end_falls_behind_the_window_and_not_a_millisecond_before() {
    let mut job = Job::new(Repeats::SameTime, 8);
    let (first, last, next) = (key(1, at(0)), key(2, at(1).minus_ms(1)), key(3, at(1)));
    assert_eq!(job.probe(&[first, last, next]), [New; 3]);
    job.commit(at(9).minus_ms(1), 8);
    assert_eq!(job.store.complete_since(), EventTimeMs(i64::MIN));
    job.commit(at(9), 8);
    assert_eq!(job.store.complete_since(), at(1));
    assert_eq!(job.store.buckets().len(), 1, "the bucket that begins where the other ends is live");
    assert_eq!(job.store.grace_buckets().len(), 1);
}

#[test]
fn a_bucket_in_its_grace_answers_from_disk_and_stays_whole() {
    let mut job = Job::new(Repeats::SameTime, 8);
    job.probe(&[key(1, at(0)), key(2, at(5))]);
    job.commit(at(9), 8);
    assert_eq!(job.probe(&[key(1, at(0)), key(7, at(0)), key(7, at(0))]), [Duplicate, New, Duplicate]);
    job.commit(at(9), 8);
    assert_eq!(job.store.grace_buckets()[0].keys, 2, "what is new in it is written to it");
    assert_eq!(job.probe(&[key(7, at(0))]), [Duplicate]);
    assert_eq!(job.loads, [], "nothing was read from the table");
}

#[test]
fn a_bucket_that_is_gone_is_lent_for_one_microbatch_and_never_enters_a_manifest() {
    let mut job = Job::new(Repeats::SameTime, 8);
    job.probe(&[key(1, at(0)), key(2, at(5))]);
    job.commit(at(12), 8);
    assert_eq!(job.store.grace_buckets(), [], "the grace is an eighth of the window: one hour");
    let late = [key(1, at(0)), key(7, at(0)), key(7, at(0)), key(8, at(1).minus_ms(1))];
    let refused = job.store.probe(&late);
    assert!(matches!(refused, Err(StoreError::BeforeComplete { .. })), "{refused:?}");
    assert_eq!(job.probe(&late), [Duplicate, New, Duplicate, New]);
    assert_eq!(job.probe(&late[1..2]), [Duplicate], "within the microbatch it is lent once");
    assert_eq!(job.loads, [Bucket { from: at(0), to: at(1) }]);
    job.commit(at(12), 8);
    assert_eq!(job.store.stats().keys, 1);
    assert_eq!(job.probe(&late), [Duplicate; 4], "the table holds them now");
    assert_eq!(job.loads.len(), 2, "the next microbatch reads the bucket again");
}

#[test]
fn an_abandoned_batch_takes_its_loans_and_its_expiry_with_it() {
    let mut job = Job::new(Repeats::AnyTime, 8);
    job.probe(&[key(1, at(0)), key(2, at(5))]);
    job.commit(at(12), 8);
    assert_eq!(job.probe(&[key(9, at(0))]), [New]);
    job.store.expire_behind(at(30), hours(8));
    job.abandon();
    assert_eq!(job.store.missing_buckets(&[key(9, at(0))]).len(), 1);
    job.store.prepare(name(50)).unwrap();
    assert_eq!(job.store.complete_since(), at(1), "the watermark of the abandoned batch expires nothing");
    job.abandon();
    assert_eq!(job.probe(&[key(9, at(0)), key(2, at(5))]), [New, Duplicate]);
}

#[test]
fn segments_that_hold_only_buckets_that_are_gone_leave_the_manifest_and_the_folder() {
    let mut job = Job::new(Repeats::AnyTime, 8);
    for hour in 0..20 {
        job.probe(&[key(hour as u64, at(hour))]);
        job.commit(at(hour), 8);
    }
    let last = job.last.clone().unwrap();
    assert_eq!(job.store.stats().keys, 9, "eight hours and the one that the watermark stands in");
    assert_eq!(job.store.grace_buckets().len(), 1);
    assert!(job.store.stats().segments <= 11, "{} segments", job.store.stats().segments);
    sweep(job.folder.path(), std::slice::from_ref(&last), 2).unwrap();
    assert_eq!(verify(job.folder.path(), &last).unwrap().keys, 10);
}

#[test]
fn a_widened_window_takes_its_buckets_from_the_grace_and_the_table() {
    let mut job = Job::new(Repeats::AnyTime, 8);
    let rows: Vec<Key> = (0..12).map(|hour| key(hour as u64, at(hour))).collect();
    job.probe(&rows);
    job.commit(at(12), 8);
    assert_eq!((job.store.complete_since(), job.store.grace_buckets().len()), (at(4), 1));
    job.restart(Repeats::AnyTime, 16, at(12));
    let moved: Vec<Key> = (0..12).map(|number| key(number, at(11))).collect();
    assert_eq!(job.probe(&moved), [Duplicate; 12], "found before any generation holds them, at any time");
    job.commit(at(12), 16);
    assert!(job.store.complete_since() <= at(-4));
    assert_eq!((job.store.stats().keys, job.store.grace_buckets().len()), (12, 0));
    assert_eq!(job.store.buckets(), job.rebuilt(Repeats::AnyTime));
    job.restart(Repeats::AnyTime, 16, at(12));
    assert_eq!(job.probe(&moved), [Duplicate; 12]);
    assert_eq!(job.loads, []);
}

#[test]
fn an_abandoned_widening_leaves_the_state_as_it_was() {
    let mut job = Job::new(Repeats::AnyTime, 8);
    let rows: Vec<Key> = (0..12).map(|hour| key(hour as u64, at(hour))).collect();
    job.probe(&rows);
    job.commit(at(12), 8);
    job.restart(Repeats::AnyTime, 16, at(12));
    job.store.prepare(name(60)).unwrap();
    assert_eq!(job.store.stats().keys, 12);
    job.abandon();
    assert_eq!((job.store.complete_since(), job.store.stats().keys), (at(4), 8));
    assert_eq!(job.store.missing_buckets(&rows).len(), 3);
}

#[test]
fn a_new_width_holds_for_buckets_after_the_last_key_and_survives_restarts() {
    let mut job = Job::new(Repeats::SameTime, 8);
    job.probe(&[key(1, at(0)), key(2, at(3))]);
    job.commit(at(3), 8);
    job.restart(Repeats::SameTime, 16, at(3));
    assert_eq!(
        job.probe(&[key(1, at(0)), key(2, at(3)), key(3, at(4)), key(4, at(6))]),
        [Duplicate, Duplicate, New, New]
    );
    job.commit(at(6), 16);
    job.restart(Repeats::SameTime, 16, at(6));
    let ends: Vec<EventTimeMs> = job.store.buckets().iter().map(|bucket| bucket.to).collect();
    assert_eq!(ends, [at(1), at(4), at(6), at(8)]);
    assert_eq!(job.store.eras(), [Era { until: at(4), bucket_width_ms: HOUR_MS }]);
    assert_eq!(job.store.buckets(), job.rebuilt(Repeats::SameTime));
    job.commit(at(40), 16);
    assert_eq!(job.store.eras(), [], "an era is forgotten with its last bucket");
}

#[test]
fn a_width_that_changes_back_at_once_leaves_no_era_and_one_that_changes_too_often_waits() {
    let mut job = Job::new(Repeats::AnyTime, 8);
    job.probe(&[key(1, at(0))]);
    job.commit(at(0), 8);
    for window in [16, 8, 24, 8] {
        job.restart(Repeats::AnyTime, window, at(0));
        job.commit(at(0), 24);
    }
    assert_eq!((job.store.eras(), job.store.bucket_width_ms()), ([].as_slice(), HOUR_MS));
    for hour in 1..=6 {
        job.restart(Repeats::AnyTime, 8 + hour * 8, at(0));
        job.probe(&[key(1 + hour as u64, at(hour * 24))]);
        job.commit(at(0), 80);
    }
    assert_eq!((job.store.eras().len(), job.store.bucket_width_ms()), (ERAS_MAX, 5 * HOUR_MS));
    assert_eq!(job.store.buckets(), job.rebuilt(Repeats::AnyTime));
}

#[test]
fn a_manifest_of_version_2_is_read_and_written_as_it_always_was() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/dedup/manifest-2");
    let reference = GenerationRef {
        name: "e0000000003-b0000000007-018bcfe5-6800-7000-8000-000000000002".parse().unwrap(),
        checksum: GOLDEN_CHECKSUM.into(),
    };
    let manifest = Manifest::read(&folder, &reference).unwrap();
    assert_eq!(manifest.eras, [Era { until: EventTimeMs(1_700_002_800_000), bucket_width_ms: HOUR_MS }]);
    assert_eq!((manifest.expired.len(), manifest.buckets.len(), manifest.segments.len()), (1, 2, 1));
    let again = tempfile::tempdir().unwrap();
    assert_eq!(manifest.write(again.path(), reference.name).unwrap(), reference);
    let file = reference.name.manifest_file();
    assert_eq!(std::fs::read(again.path().join(&file)).unwrap(), std::fs::read(folder.join(&file)).unwrap());
}

const GOLDEN_CHECKSUM: &str = "881a947cf8c289f7e81f324c4bf29b5d";

/// What may happen to a job, in any order.
#[derive(Debug, Clone)]
enum Step {
    /// Keys (number, hour) of one probe batch.
    Probe(Vec<(u64, i64)>),
    /// The watermark moves on by hours.
    Commit(i64),
    Abandon,
    PrepareAndAbandon,
    /// The job is started again with a window of this many hours.
    Restart(i64),
    /// The state is lost and built again from the table.
    Lose,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let batch = || prop::collection::vec((0u64..40, -20i64..60), 0..30);
    let step = prop_oneof![
        6 => batch().prop_map(Step::Probe),
        5 => (0i64..6).prop_map(Step::Commit),
        1 => Just(Step::Abandon),
        1 => Just(Step::PrepareAndAbandon),
        1 => prop_oneof![Just(8i64), Just(16), Just(40)].prop_map(Step::Restart),
        1 => Just(Step::Lose),
    ];
    prop::collection::vec(step, 1..50)
}

/// What the table says of a probe batch: seen for certain, new for certain, or either (with `any_time`, a copy in
/// another bucket that has expired).
fn agrees(
    job: &Job,
    repeats: Repeats,
    keys: &[Key],
    verdicts: &[Verdict],
    rows_before: usize,
) -> Result<(), TestCaseError> {
    let rows: Vec<Key> = job.table.iter().chain(&job.pending).copied().collect();
    let known = |key: &Key, holds: &dyn Fn(&Key) -> bool, rows: &[Key]| {
        rows.iter().any(|row| row.fingerprint == key.fingerprint && holds(row))
    };
    let mut batch_rows = rows_before;
    for (key, verdict) in keys.iter().zip(verdicts) {
        let before = &rows[..batch_rows];
        let bucket = job.store.bucket_begin(key.event_time);
        let same_place = |row: &Key| job.store.bucket_begin(row.event_time) == bucket;
        let live = |row: &Key| row.event_time >= job.store.complete_since();
        let (seen, unseen) = match repeats {
            Repeats::SameTime => (known(key, &same_place, before), !known(key, &same_place, before)),
            Repeats::AnyTime => {
                (known(key, &same_place, before) || known(key, &live, before), !known(key, &|_| true, before))
            }
        };
        prop_assert!(!seen || *verdict == Duplicate, "{key:?} stands in the table and was not found");
        prop_assert!(!unseen || *verdict == New, "{key:?} was never written and is called a repeat");
        batch_rows += usize::from(*verdict == New);
    }
    Ok(())
}

/// Live buckets and those in their grace hold exactly the rows of the table.
fn state_is_the_table(job: &Job) -> Result<(), TestCaseError> {
    let mut expected: BTreeMap<Bucket, BTreeSet<Fingerprint>> = BTreeMap::new();
    let named: Vec<&BucketTally> = job.store.grace_buckets().iter().chain(job.store.buckets()).collect();
    for row in &job.table {
        let bucket = named.iter().map(|bucket| bucket.bucket()).find(|bucket| bucket.holds(row.event_time));
        match bucket {
            Some(bucket) => drop(expected.entry(bucket).or_default().insert(row.fingerprint)),
            None => prop_assert!(row.event_time < job.store.complete_since(), "{row:?} is in no bucket"),
        }
    }
    for bucket in named {
        let mut tally = Tally::default();
        expected.remove(&bucket.bucket()).unwrap_or_default().into_iter().for_each(|key| tally.add(key));
        prop_assert_eq!(bucket.tally(), tally);
    }
    Ok(())
}

fn agree(steps: Vec<Step>, repeats: Repeats) -> Result<(), TestCaseError> {
    let mut window = 8;
    let mut job = Job::new(repeats, window);
    let mut watermark = 0;
    for step in steps {
        match step {
            Step::Probe(batch) => {
                // With `same_time` a key that comes again carries the event time of its first copy, by its promise.
                let keys: Vec<Key> =
                    batch.iter().map(|(number, hour)| key(*number, at(watermark + *hour - 30))).collect();
                let rows_before = job.table.len() + job.pending.len();
                let verdicts = job.probe(&keys);
                agrees(&job, repeats, &keys, &verdicts, rows_before)?;
            }
            Step::Commit(hours) => {
                watermark += hours;
                job.commit(at(watermark), window);
                state_is_the_table(&job)?;
                prop_assert_eq!(job.store.buckets(), job.rebuilt(repeats));
            }
            Step::Abandon => job.abandon(),
            Step::PrepareAndAbandon => {
                job.batch += 1;
                job.store.expire_behind(at(watermark), hours(window));
                job.store.prepare(name(job.batch)).unwrap();
                job.abandon();
            }
            Step::Restart(hours) => {
                window = hours;
                job.restart(repeats, window, at(watermark));
            }
            Step::Lose => {
                let Some(last) = &job.last else { continue };
                let manifest = Manifest::read(job.folder.path(), last).unwrap();
                let spec = StoreSpec { bucket_width_ms: manifest.bucket_width_ms, ..spec(repeats, window) };
                let mut builder = Builder::create(job.folder.path(), spec, 0, manifest.floor)
                    .and_then(|builder| builder.of_history(&manifest.eras, manifest.complete_since))
                    .unwrap();
                builder.add(&job.table).unwrap();
                job.batch += 1;
                let (reference, report) = builder.finish(name(job.batch)).unwrap();
                prop_assert_eq!(report.buckets, manifest.buckets);
                job.last = Some(reference);
                job.restart(repeats, window, at(watermark));
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Goal: whatever expires, is lent, widened, lost or abandoned, verdicts follow from the rows of the table, and the
    /// state is what a rebuild from the table makes.
    /// Method: few keys and many hours; the watermark passes most buckets.
    #[test]
    fn verdicts_and_state_follow_from_the_table(
        steps in steps(),
        repeats in prop_oneof![Just(Repeats::AnyTime), Just(Repeats::SameTime)],
    ) {
        agree(steps, repeats)?;
    }
}
