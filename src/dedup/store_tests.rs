//! The dedup state as its caller sees it, against a plain set, and against broken files.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use tempfile::TempDir;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::generation::Manifest;
use super::page::PAGE_BYTES;
use super::segment::prelude;
use super::*;

const HOUR_MS: i64 = 3_600_000;
const JOB: Uuid = Uuid::from_u128(0x7469_6465);
/// Everything is read from the file, page by page.
pub(super) const NOTHING_PINNED: Limits = Limits {
    pinned_bytes_max: 0,
    read_buffer_bytes: 0,
    recent_keys_max: 0,
    merge_read_bytes_max: PAGE_BYTES,
    write_bytes_max: PAGE_BYTES,
    merged_keys_max: 64,
};

fn spec(repeats: Repeats) -> StoreSpec {
    StoreSpec {
        job_id: JOB,
        key_spec_hash: "0123456789abcdef".into(),
        seed: 42,
        shards: 256,
        bucket_width_ms: HOUR_MS,
        repeats,
    }
}

fn key(number: u64, event_time_ms: i64) -> Key {
    let fingerprint = Fingerprint::from_value(xxh3_128(&number.to_le_bytes()) >> 40);
    Key { fingerprint, event_time: EventTimeMs(event_time_ms) }
}

/// Keys `[begin, end)`, spread over three hours.
fn keys(begin: u64, end: u64) -> Vec<Key> {
    (begin..end).map(|number| key(number, 1_000 * HOUR_MS + (number % 3) as i64 * HOUR_MS)).collect()
}

fn name(epoch: u64, batch: u64) -> GenerationName {
    GenerationName::new(epoch, batch, Uuid::new_v4())
}

fn commit(store: &mut Store, epoch: u64, batch: u64) -> GenerationRef {
    let reference = store.prepare(name(epoch, batch)).unwrap();
    store.publish();
    reference
}

fn count_new(verdicts: &[Verdict]) -> usize {
    verdicts.iter().filter(|verdict| **verdict == Verdict::New).count()
}

fn open(folder: &Path, generation: Option<&GenerationRef>) -> Store {
    Store::open(folder, spec(Repeats::AnyTime), generation, 0).unwrap()
}

/// A folder whose generation holds `keys(0, count)`.
fn folder_with(count: u64) -> (TempDir, GenerationRef) {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path(), None);
    store.probe(&keys(0, count)).unwrap();
    let reference = commit(&mut store, 1, 1);
    (folder, reference)
}

fn files(folder: &Path) -> BTreeSet<String> {
    let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).collect()
}

fn file_ending(folder: &Path, suffix: &str) -> PathBuf {
    let found: Vec<String> = files(folder).into_iter().filter(|file| file.ends_with(suffix)).collect();
    assert_eq!(found.len(), 1, "{found:?}");
    folder.join(&found[0])
}

#[test]
fn a_repeat_inside_one_probe_batch_is_dropped_and_the_first_one_wins() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path(), None);
    let batch = [key(1, 0), key(2, 0), key(1, HOUR_MS), key(2, 0), key(3, 0)];
    let expected = [Verdict::New, Verdict::New, Verdict::Duplicate, Verdict::Duplicate, Verdict::New];
    assert_eq!(store.probe(&batch).unwrap(), expected);
    assert_eq!(store.stats().pending_keys, 3);
    // The winner of key 1 came first, so it counts in the bucket of its own event time.
    commit(&mut store, 1, 1);
    assert_eq!(store.buckets().iter().map(|bucket| bucket.keys).collect::<Vec<_>>(), [3]);
}

#[test]
fn a_repeat_in_a_later_probe_batch_of_the_same_microbatch_is_dropped() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path(), None);
    for begin in 0..20 {
        let verdicts = store.probe(&keys(begin * 50, begin * 50 + 100)).unwrap();
        assert_eq!(count_new(&verdicts), if begin == 0 { 100 } else { 50 });
    }
    assert!(store.pending_bytes() >= 1_050 * 16);
}

#[test]
fn an_abandoned_attempt_leaves_nothing_seen() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path(), None);
    let (a, b, c) = (key(1, 0), key(2, 0), key(3, 0));
    assert_eq!(store.probe(&[a, b, c]).unwrap(), [Verdict::New; 3]);
    store.prepare(name(1, 7)).unwrap();
    store.abandon();
    assert_eq!(store.probe(&[a, b]).unwrap(), [Verdict::New; 2]);
    let reference = commit(&mut store, 1, 7);
    assert_eq!(store.probe(&[a, b, c]).unwrap(), [Verdict::Duplicate, Verdict::Duplicate, Verdict::New]);
    let mut reopened = open(folder.path(), Some(&reference));
    assert_eq!(reopened.probe(&[c]).unwrap(), [Verdict::New]);
}

#[test]
fn the_next_microbatch_may_be_probed_while_one_is_committed_and_falls_with_it() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path(), None);
    store.probe(&keys(0, 10)).unwrap();
    store.prepare(name(1, 1)).unwrap();
    assert_eq!(count_new(&store.probe(&keys(5, 15)).unwrap()), 5);
    store.publish();
    assert_eq!(count_new(&store.probe(&keys(0, 20)).unwrap()), 5);
    store.prepare(name(1, 2)).unwrap();
    assert_eq!(count_new(&store.probe(&keys(15, 25)).unwrap()), 5);
    store.abandon();
    assert_eq!(count_new(&store.probe(&keys(0, 25)).unwrap()), 15);
}

#[test]
fn any_time_finds_a_repeat_with_another_event_time_and_same_time_does_not() {
    for (repeats, expected) in [(Repeats::AnyTime, Verdict::Duplicate), (Repeats::SameTime, Verdict::New)] {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), spec(repeats), None, 0).unwrap();
        store.probe(&[key(1, 0)]).unwrap();
        assert_eq!(store.probe(&[key(1, HOUR_MS)]).unwrap(), [expected], "pending");
        commit(&mut store, 1, 1);
        assert_eq!(store.probe(&[key(1, 2 * HOUR_MS)]).unwrap(), [expected], "on disk");
        assert_eq!(store.probe(&[key(1, HOUR_MS - 1)]).unwrap(), [Verdict::Duplicate], "same bucket");
    }
}

#[test]
fn garbage_event_times_share_the_open_first_bucket() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path(), None);
    let mut batch = vec![key(0, 100 * HOUR_MS)];
    batch.extend((1..500).map(|number| key(number, -1_000_000_000 * number as i64)));
    batch.push(key(500, i64::MIN));
    store.probe(&batch).unwrap();
    let reference = commit(&mut store, 1, 1);
    assert_eq!(store.floor(), Some(EventTimeMs(36 * HOUR_MS)));
    assert_eq!(store.stats().buckets, 2);
    let mut reopened = open(folder.path(), Some(&reference));
    assert_eq!(reopened.floor(), store.floor());
    assert_eq!(count_new(&reopened.probe(&batch).unwrap()), 0);
}

#[test]
fn a_batch_without_new_keys_writes_a_manifest_alone() {
    let (folder, reference) = folder_with(10);
    let mut store = open(folder.path(), Some(&reference));
    assert_eq!(count_new(&store.probe(&keys(0, 10)).unwrap()), 0);
    let before = files(folder.path());
    let next = commit(&mut store, 1, 2);
    let added: Vec<String> = files(folder.path()).difference(&before).cloned().collect();
    assert_eq!(added, [format!("{}.manifest", next.name)]);
    assert_eq!(count_new(&open(folder.path(), Some(&next)).probe(&keys(0, 11)).unwrap()), 1);
}

#[test]
fn an_empty_state_can_be_committed_and_opened() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path(), None);
    assert_eq!(store.probe(&[]).unwrap(), []);
    let reference = commit(&mut store, 1, 1);
    let mut store = open(folder.path(), Some(&reference));
    assert_eq!(count_new(&store.probe(&keys(0, 3)).unwrap()), 3);
}

#[test]
fn merges_keep_the_set_and_the_digests() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open_within(folder.path(), spec(Repeats::AnyTime), None, NOTHING_PINNED).unwrap();
    let batches = 73;
    let mut last = None;
    for batch in 0..batches {
        store.probe(&keys(batch * 100, batch * 100 + 130)).unwrap();
        last = Some(commit(&mut store, 1, batch));
        store.finish_merges();
        assert!(store.stats().segments <= 8 * 3, "{:?}", store.stats());
    }
    // 73 segments in base 8 are 1, 1 and 1.
    assert_eq!(store.stats().segments, 3);
    let all = batches * 100 + 30;
    assert_eq!(store.stats().keys, all);

    let (_, direct) = {
        let other = tempfile::tempdir().unwrap();
        let mut direct = open(other.path(), None);
        direct.probe(&keys(0, all)).unwrap();
        commit(&mut direct, 1, 1);
        (other, direct.buckets().to_vec())
    };
    assert_eq!(store.buckets(), direct);
    let last = last.unwrap();
    assert_eq!(verify(folder.path(), &last).unwrap().keys, all);
    let mut reopened = open(folder.path(), Some(&last));
    assert_eq!(count_new(&reopened.probe(&keys(0, all)).unwrap()), 0);
    assert_eq!(count_new(&reopened.probe(&keys(all, all + 1_000)).unwrap()), 1_000);
}

#[test]
fn a_builder_with_tiny_memory_makes_the_state_that_the_store_made() {
    for repeats in [Repeats::AnyTime, Repeats::SameTime] {
        let folder = tempfile::tempdir().unwrap();
        let mut store = Store::open(folder.path(), spec(repeats), None, 0).unwrap();
        for batch in 0..5 {
            store.probe(&keys(batch * 20_000, batch * 20_000 + 25_000)).unwrap();
            commit(&mut store, 1, batch);
        }
        let rebuilt = tempfile::tempdir().unwrap();
        let mut builder =
            Builder::create(rebuilt.path(), spec(repeats), STORE_MEMORY_BYTES_MIN, store.floor()).unwrap();
        // Backwards, in pieces, and a part of them twice: as a table with repeats gives them.
        let mut rows = keys(0, 105_000);
        rows.extend(keys(60_000, 70_000));
        rows.reverse();
        for piece in rows.chunks(999) {
            builder.add(piece).unwrap();
        }
        let (reference, report) = builder.finish(name(2, 5)).unwrap();
        assert_eq!((report.keys, report.repeats), (105_000, 10_000));
        assert_eq!(report.buckets, store.buckets());
        assert_eq!(verify(rebuilt.path(), &reference).unwrap().keys, 105_000);
        assert_eq!(files(rebuilt.path()).len(), 2, "runs leave no files");
        let mut reopened = Store::open(rebuilt.path(), spec(repeats), Some(&reference), 0).unwrap();
        assert_eq!(count_new(&reopened.probe(&keys(0, 105_100)).unwrap()), 100);
    }
}

#[test]
fn a_builder_says_on_the_way_what_came_so_far() {
    let folder = tempfile::tempdir().unwrap();
    let floor = Some(EventTimeMs(1_000 * HOUR_MS));
    let created = |path: &Path| Builder::create(path, spec(Repeats::AnyTime), STORE_MEMORY_BYTES_MIN, floor);
    let alone = |rows: &[Key]| {
        let folder = tempfile::tempdir().unwrap();
        let mut builder = created(folder.path()).unwrap();
        builder.add(rows).unwrap();
        builder.finish(name(2, 5)).unwrap().1
    };
    let (mut first, later, all) = (keys(0, 105_000), keys(90_000, 120_000), keys(0, 120_000));
    first.extend(keys(0, 1_000));
    for pieces in [first.chunks(999), first.chunks(200_000)] {
        let mut builder = created(folder.path()).unwrap();
        assert_eq!(builder.settle().unwrap().keys, 0);
        pieces.for_each(|piece| builder.add(piece).unwrap());
        assert_eq!(builder.settle().unwrap(), alone(&first));
        later.chunks(777).for_each(|piece| builder.add(piece).unwrap());
        let (reference, report) = builder.finish(name(2, 5)).unwrap();
        assert_eq!((report.keys, report.repeats), (120_000, 16_000));
        assert_eq!(report.buckets, alone(&all).buckets);
        assert_eq!(verify(folder.path(), &reference).unwrap().keys, 120_000);
    }
}

#[test]
fn a_rebuild_of_empty_tables_is_an_empty_state() {
    let folder = tempfile::tempdir().unwrap();
    let builder = Builder::create(folder.path(), spec(Repeats::AnyTime), 0, None).unwrap();
    let (reference, report) = builder.finish(name(1, 0)).unwrap();
    assert_eq!((report.keys, report.repeats, report.buckets.len()), (0, 0, 0));
    assert_eq!(open(folder.path(), Some(&reference)).stats().keys, 0);
}

#[test]
fn no_flipped_byte_of_a_segment_lets_a_seen_key_pass() {
    let (folder, reference) = folder_with(60);
    let path = file_ending(folder.path(), ".segment");
    let good = fs::read(&path).unwrap();
    let seen = keys(0, 60);
    let mut refused_at_open = 0;
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        let error = verify(folder.path(), &reference).expect_err("every byte of a small segment matters");
        assert!(error.is_rebuildable(), "byte {at}: {error}");
        for limits in [NOTHING_PINNED, Limits::of(0)] {
            match Store::open_within(folder.path(), spec(Repeats::AnyTime), Some(&reference), limits) {
                Err(error) => {
                    assert!(error.is_rebuildable(), "byte {at}: {error}");
                    refused_at_open += 1;
                }
                Ok(mut store) => match store.probe(&seen) {
                    Err(error) => assert!(error.is_rebuildable(), "byte {at}: {error}"),
                    Ok(verdicts) => assert_eq!(count_new(&verdicts), 0, "byte {at}"),
                },
            }
        }
    }
    assert!(refused_at_open >= 2 * (136 + 3 * 104 + 56), "frames are checked when they are opened");
}

#[test]
fn no_flipped_byte_of_a_manifest_is_believed() {
    let (folder, reference) = folder_with(20);
    let path = file_ending(folder.path(), ".manifest");
    let good = fs::read(&path).unwrap();
    for at in 0..good.len() {
        for bit in [0, 5] {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            fs::write(&path, &bad).unwrap();
            let opened = Store::open(folder.path(), spec(Repeats::AnyTime), Some(&reference), 0);
            assert!(matches!(opened, Err(StoreError::Corrupt { .. })), "byte {at} bit {bit}: {opened:?}");
        }
    }
}

#[test]
fn files_cut_short_or_gone_are_named() {
    for suffix in [".segment", ".manifest"] {
        let (folder, reference) = folder_with(60);
        let path = file_ending(folder.path(), suffix);
        let file_name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let good = fs::read(&path).unwrap();
        let try_open =
            || Store::open(folder.path(), spec(Repeats::AnyTime), Some(&reference), 0).unwrap_err();
        for length in (0..good.len()).step_by(7).chain([good.len() - 1]) {
            fs::write(&path, &good[..length]).unwrap();
            match try_open() {
                StoreError::Corrupt { file, .. } => assert_eq!(file, file_name, "{length} bytes"),
                other => panic!("{length} bytes: {other}"),
            }
        }
        fs::write(&path, [good.as_slice(), b"x"].concat()).unwrap();
        assert!(matches!(try_open(), StoreError::Corrupt { .. }));
        fs::remove_file(&path).unwrap();
        match try_open() {
            StoreError::Missing { file } => assert_eq!(file, file_name),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_page_that_breaks_after_opening_is_an_error_and_the_batch_can_be_probed_again() {
    let (folder, reference) = folder_with(5_000);
    let limits = NOTHING_PINNED;
    let mut store =
        Store::open_within(folder.path(), spec(Repeats::AnyTime), Some(&reference), limits).unwrap();
    let path = file_ending(folder.path(), ".segment");
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[good.len() / 2] ^= 1;
    fs::write(&path, &bad).unwrap();
    assert!(matches!(store.probe(&keys(0, 5_000)), Err(StoreError::Corrupt { .. })));
    assert_eq!(store.stats().pending_keys, 0);
    fs::write(&path, &good).unwrap();
    assert_eq!(count_new(&store.probe(&keys(0, 5_001)).unwrap()), 1);
}

#[test]
fn a_segment_of_another_generation_under_the_right_name_is_corrupt() {
    let (folder, reference) = folder_with(30);
    let (other, _) = folder_with(30);
    fs::copy(file_ending(other.path(), ".segment"), file_ending(folder.path(), ".segment")).unwrap();
    let opened = Store::open(folder.path(), spec(Repeats::AnyTime), Some(&reference), 0);
    assert!(matches!(opened, Err(StoreError::Corrupt { .. })), "{opened:?}");
}

#[test]
fn a_manifest_of_another_content_than_the_ledger_names_is_corrupt() {
    let (folder, reference) = folder_with(5);
    let other = GenerationRef { checksum: "0".repeat(32), ..reference };
    let opened = Store::open(folder.path(), spec(Repeats::AnyTime), Some(&other), 0);
    assert!(matches!(opened, Err(StoreError::Corrupt { .. })), "{opened:?}");
}

#[test]
fn files_of_a_newer_program_are_refused_by_name() {
    let (folder, reference) = folder_with(5);
    let segment = file_ending(folder.path(), ".segment");
    let good = fs::read(&segment).unwrap();
    let mut newer = good.clone();
    newer[..16].copy_from_slice(&prelude(4));
    fs::write(&segment, &newer).unwrap();
    let opened = Store::open(folder.path(), spec(Repeats::AnyTime), Some(&reference), 0);
    assert!(matches!(opened, Err(StoreError::NewerFormat { found: 4, known: 3, .. })), "{opened:?}");
    fs::write(&segment, &good).unwrap();

    let manifest = file_ending(folder.path(), ".manifest");
    let body = "3\n{ \"of\": \"another form\" }\n";
    let checksum = format!("{:032x}", xxh3_128(body.as_bytes()));
    let json = body.strip_prefix("3\n").unwrap();
    fs::write(&manifest, format!("tidemill dedup generation 3 {checksum}\n{json}")).unwrap();
    let newer = GenerationRef { checksum, ..reference };
    let opened = Store::open(folder.path(), spec(Repeats::AnyTime), Some(&newer), 0);
    assert!(matches!(opened, Err(StoreError::NewerFormat { found: 3, known: 2, .. })), "{opened:?}");
    assert!(matches!(list_generations(folder.path(), Some(JOB)), Err(StoreError::NewerFormat { .. })));
    assert!(matches!(sweep(folder.path(), &[newer], 9), Err(StoreError::NewerFormat { .. })));
    assert_eq!(files(folder.path()).len(), 2, "nothing is removed");
}

#[test]
fn a_state_of_another_spec_is_refused_with_both_values() {
    let (folder, reference) = folder_with(5);
    let good = spec(Repeats::AnyTime);
    let others = [
        ("job id", StoreSpec { job_id: Uuid::nil(), ..good.clone() }),
        ("key spec hash", StoreSpec { key_spec_hash: "other".into(), ..good.clone() }),
        ("seed", StoreSpec { seed: 1, ..good.clone() }),
        ("shards", StoreSpec { shards: 128, ..good.clone() }),
        ("repeats", StoreSpec { repeats: Repeats::SameTime, ..good.clone() }),
    ];
    for (differs, other) in others {
        match Store::open(folder.path(), other, Some(&reference), 0).unwrap_err() {
            StoreError::SpecDiffers { fact, expected, found, .. } => {
                assert_eq!(fact, differs);
                assert_ne!(expected, found);
            }
            other => panic!("{differs}: {other}"),
        }
    }
    let wider = StoreSpec { bucket_width_ms: 2 * HOUR_MS, ..good.clone() };
    let mut store = Store::open(folder.path(), wider, Some(&reference), 0).unwrap();
    assert_eq!(
        count_new(&store.probe(&keys(0, 5)).unwrap()),
        0,
        "the width of the manifest rules for buckets that hold keys"
    );

    for impossible in [
        StoreSpec { shards: 3, ..good.clone() },
        StoreSpec { bucket_width_ms: 0, ..good.clone() },
        StoreSpec { key_spec_hash: "x".repeat(65), ..good },
    ] {
        let opened = Store::open(folder.path(), impossible, None, 0);
        assert!(matches!(opened, Err(StoreError::SpecInvalid { .. })), "{opened:?}");
    }
}

#[test]
fn keys_before_the_time_that_the_state_is_complete_from_are_refused_and_dead_buckets_are_not_probed() {
    let (folder, reference) = folder_with(30);
    let mut manifest = Manifest::read(folder.path(), &reference).unwrap();
    let dead = manifest.buckets.remove(0);
    manifest.complete_since = dead.to;
    let later = manifest.write(folder.path(), name(1, 2)).unwrap();
    let mut store = open(folder.path(), Some(&later));
    assert_eq!(store.complete_since(), dead.to);
    let early = store.probe(&keys(0, 30));
    assert!(matches!(early, Err(StoreError::BeforeComplete { .. })), "{early:?}");
    let moved: Vec<Key> = keys(0, 30).iter().map(|key| Key { event_time: dead.to, ..*key }).collect();
    assert_eq!(count_new(&store.probe(&moved).unwrap()), 10, "the keys of the dead bucket are new again");
    let next = commit(&mut store, 1, 3);
    assert_eq!(verify(folder.path(), &next).unwrap().keys, 30);
}

#[test]
fn a_name_is_taken_once() {
    let (folder, reference) = folder_with(5);
    let mut store = open(folder.path(), Some(&reference));
    store.probe(&keys(5, 6)).unwrap();
    assert!(matches!(store.prepare(reference.name), Err(StoreError::NameTaken { .. })));
    // What was pending is not known any more, so nothing may be said until the batch is abandoned.
    assert!(matches!(store.probe(&keys(5, 6)), Err(StoreError::Broken)));
    assert!(matches!(store.prepare(name(1, 2)), Err(StoreError::Broken)));
    store.abandon();
    assert_eq!(store.probe(&keys(0, 6)).unwrap()[4..], [Verdict::Duplicate, Verdict::New]);
    commit(&mut store, 1, 2);
}

#[test]
fn names_that_lead_elsewhere_are_no_names() {
    let good = name(3, 12);
    assert_eq!(good.to_string().parse(), Ok(good));
    let json = serde_json::to_string(&good).unwrap();
    assert_eq!(serde_json::from_str::<GenerationName>(&json).unwrap(), good);
    for bad in
        ["", "e1-b1-", "../e0000000001-b0000000001", &good.to_string().to_uppercase(), &format!("{good}/x")]
    {
        assert!(bad.parse::<GenerationName>().is_err(), "{bad}");
    }
}

#[test]
fn sweep_removes_what_no_kept_generation_names_and_only_of_earlier_epochs() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path(), None);
    let mut references = Vec::new();
    for batch in 0..9 {
        store.probe(&keys(batch * 10, batch * 10 + 10)).unwrap();
        references.push(commit(&mut store, 1, batch));
        store.finish_merges();
    }
    // Aborted attempts: of the epoch that is swept, and of the one that is at work.
    store.probe(&keys(500, 510)).unwrap();
    store.prepare(name(1, 9)).unwrap();
    store.abandon();
    store.probe(&keys(500, 510)).unwrap();
    let current = store.prepare(name(2, 9)).unwrap();
    fs::write(folder.path().join("notes.txt"), "not ours").unwrap();
    fs::write(folder.path().join("e1.segment"), "not ours").unwrap();

    let keep = [references[6].clone(), references[8].clone()];
    let report = sweep(folder.path(), &keep, 2).unwrap();
    // Manifests 0 to 5 and 7 go, what the abandoned attempt left, and segment 7, which only generation 7 named.
    assert_eq!(report.files, 10, "{:?}", files(folder.path()));
    assert!(report.bytes > 0);
    let left = files(folder.path());
    assert!(left.contains("notes.txt") && left.contains("e1.segment"));
    assert!(left.contains(&format!("{}.manifest", current.name)));
    for reference in keep.iter().chain([&current]) {
        verify(folder.path(), reference).unwrap();
    }
    assert_eq!(sweep(folder.path(), &keep, 2).unwrap(), SweepReport::default());
    assert_eq!(
        sweep(folder.path(), &[], 9).unwrap(),
        SweepReport::default(),
        "who keeps nothing is mistaken"
    );
    let gone = sweep(folder.path(), &[references[0].clone()], 9).unwrap_err();
    assert!(matches!(gone, StoreError::Missing { .. }));

    let report = sweep(folder.path(), &keep[1..], 2).unwrap();
    assert_eq!(report.files, 8, "the manifest of generation 6 and the seven segments that only it names");
    verify(folder.path(), &keep[1]).unwrap();
}

#[test]
fn an_owner_that_runs_for_long_sweeps_its_own_merged_segments() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path(), None);
    let mut last = Vec::new();
    for batch in 0..20 {
        store.probe(&keys(batch * 10, batch * 10 + 10)).unwrap();
        last.push(commit(&mut store, 4, batch));
        let keep = &last[last.len().saturating_sub(2)..];
        store.sweep(keep, 4 + 1).unwrap();
        let on_disk = files(folder.path()).len() as u64;
        // The generation before, and what went into a merge since.
        assert!(on_disk <= store.stats().files + 1 + 8, "{on_disk} files after batch {batch}");
        store.finish_merges();
        assert_eq!(count_new(&store.probe(&keys(0, batch * 10 + 10)).unwrap()), 0);
    }
    assert_eq!(verify(folder.path(), &last[19]).unwrap().keys, 200);
}

#[test]
fn a_store_can_be_moved_to_the_thread_that_works_with_it() {
    fn is_send<T: Send>() {}
    is_send::<Store>();
    is_send::<Builder>();
    is_send::<StoreError>();
}

#[test]
fn sweep_leaves_the_files_of_another_job_alone() {
    let (folder, reference) = folder_with(5);
    let other = StoreSpec { job_id: Uuid::nil(), ..spec(Repeats::AnyTime) };
    let mut store = Store::open(folder.path(), other, None, 0).unwrap();
    store.probe(&keys(0, 5)).unwrap();
    let others = commit(&mut store, 1, 1);
    assert_eq!(sweep(folder.path(), &[reference], 9).unwrap(), SweepReport::default());
    verify(folder.path(), &others).unwrap();
    assert_eq!(list_generations(folder.path(), Some(JOB)).unwrap().len(), 1);
}

#[test]
fn generations_are_listed_and_a_torn_manifest_is_none() {
    let (folder, first) = folder_with(10);
    let mut store = open(folder.path(), Some(&first));
    store.probe(&keys(10, 15)).unwrap();
    let second = commit(&mut store, 1, 2);
    fs::write(folder.path().join(format!("{}.manifest", name(1, 3))), "tidemill dedup gen").unwrap();
    let found = list_generations(folder.path(), Some(JOB)).unwrap();
    let references: Vec<_> = found.iter().map(|found| found.reference.clone()).collect();
    assert_eq!(references, [first, second]);
    assert_eq!(found.iter().map(|found| found.keys).collect::<Vec<_>>(), [10, 15]);
    assert_eq!(list_generations(Path::new("/nowhere/at/all"), Some(JOB)).unwrap(), []);
}

#[test]
fn whatever_a_crash_leaves_of_a_prepared_generation_the_one_before_is_whole() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = open(folder.path(), None);
    let mut before = None;
    for batch in 0..7 {
        store.probe(&keys(batch * 10, batch * 10 + 10)).unwrap();
        before = Some(commit(&mut store, 1, batch));
    }
    let before = before.unwrap();
    let named = files(folder.path());
    // The eighth batch also begins a merge, whose file goes with the store.
    store.probe(&keys(70, 80)).unwrap();
    store.prepare(name(1, 7)).unwrap();
    drop(store);
    let unnamed: Vec<String> = files(folder.path()).difference(&named).cloned().collect();
    assert_eq!(unnamed.len(), 2, "{unnamed:?}");
    for file in &unnamed {
        let path = folder.path().join(file);
        let whole = fs::read(&path).unwrap();
        for length in (0..whole.len()).step_by(31) {
            fs::write(&path, &whole[..length]).unwrap();
            let mut store = open(folder.path(), Some(&before));
            assert_eq!(count_new(&store.probe(&keys(0, 80)).unwrap()), 10);
            assert!(list_generations(folder.path(), Some(JOB)).unwrap().len() >= 7);
        }
        fs::remove_file(&path).unwrap();
    }
    let mut store = open(folder.path(), Some(&before));
    store.probe(&keys(70, 80)).unwrap();
    let next = commit(&mut store, 2, 7);
    assert_eq!(verify(folder.path(), &next).unwrap().keys, 80);
}

#[test]
fn files_belong_to_their_owner_alone() {
    let parent = tempfile::tempdir().unwrap();
    let folder = parent.path().join("state").join("dedup");
    let mut store = open(&folder, None);
    store.probe(&keys(0, 3)).unwrap();
    commit(&mut store, 1, 1);
    assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
    for file in files(&folder) {
        assert_eq!(fs::metadata(folder.join(file)).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

/// A million keys, most of them in one segment of many strides, with memory for none of its filters.
#[test]
fn a_million_keys_take_less_than_13_bytes_each_and_are_found_with_little_memory() {
    const KEYS: u64 = 1_000_000;
    let folder = tempfile::tempdir().unwrap();
    let memory_bytes = 1 << 20;
    let mut store = Store::open(folder.path(), spec(Repeats::AnyTime), None, memory_bytes).unwrap();
    let mut reference = None;
    for batch in 0..10 {
        let verdicts = store.probe(&keys(batch * KEYS / 10, (batch + 1) * KEYS / 10)).unwrap();
        assert_eq!(count_new(&verdicts) as u64, KEYS / 10);
        let batch_reference = commit(&mut store, 1, batch);
        let bytes = store.stats().segment_bytes as f64 / store.stats().keys as f64;
        assert!(bytes <= 13.0, "{bytes} bytes per key after batch {batch}");
        reference = Some(batch_reference);
    }
    let reference = reference.unwrap();
    let mut store =
        Store::open(folder.path(), spec(Repeats::AnyTime), Some(&reference), memory_bytes).unwrap();
    assert_eq!(count_new(&store.probe(&keys(0, KEYS)).unwrap()), 0);
    store.abandon();
    assert_eq!(count_new(&store.probe(&keys(KEYS, 2 * KEYS)).unwrap()) as u64, KEYS);
    store.abandon();
    // Few keys: windows and pages are read sparsely.
    let sparse: Vec<Key> = keys(0, 2 * KEYS).into_iter().step_by(9_973).collect();
    let expected = sparse.len() - keys(0, KEYS).into_iter().step_by(9_973).count();
    assert_eq!(count_new(&store.probe(&sparse).unwrap()), expected);
    let pinned = store.stats().pinned_bytes;
    assert!(pinned > 0 && pinned <= memory_bytes, "{pinned} bytes pinned");
    assert_eq!(verify(folder.path(), &reference).unwrap().keys, KEYS);
}

/// What a caller may do, in any order.
#[derive(Debug, Clone)]
enum Step {
    /// Keys (number, hour) of one probe batch.
    Probe(Vec<(u64, i64)>),
    Commit,
    /// Probes the next microbatch while this one is committed.
    CommitBehind(Vec<(u64, i64)>),
    Abandon,
    PrepareAndAbandon,
    Reopen,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let batch = || prop::collection::vec((0u64..150, 0i64..4), 0..40);
    let step = prop_oneof![
        6 => batch().prop_map(Step::Probe),
        6 => Just(Step::Commit),
        1 => batch().prop_map(Step::CommitBehind),
        1 => Just(Step::Abandon),
        1 => Just(Step::PrepareAndAbandon),
        1 => Just(Step::Reopen),
    ];
    prop::collection::vec(step, 1..60)
}

/// The state that a plain set would be.
struct Model {
    repeats: Repeats,
    committed: HashSet<(u64, i64)>,
    pending: HashSet<(u64, i64)>,
}

impl Model {
    fn probe(&mut self, batch: &[(u64, i64)]) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        for (number, hour) in batch {
            let scope = if self.repeats == Repeats::SameTime { *hour } else { 0 };
            let seen = self.committed.contains(&(*number, scope)) || !self.pending.insert((*number, scope));
            verdicts.push(if seen { Verdict::Duplicate } else { Verdict::New });
        }
        verdicts
    }
}

fn keys_of(batch: &[(u64, i64)]) -> Vec<Key> {
    batch.iter().map(|(number, hour)| key(*number, (1_000 + hour) * HOUR_MS + *number as i64)).collect()
}

fn agree(steps: Vec<Step>, repeats: Repeats, limits: Limits) -> Result<(), TestCaseError> {
    let folder = tempfile::tempdir().unwrap();
    let open = |reference: Option<&GenerationRef>| {
        Store::open_within(folder.path(), spec(repeats), reference, limits).unwrap()
    };
    let mut store = open(None);
    let mut model = Model { repeats, committed: HashSet::new(), pending: HashSet::new() };
    let mut last: Option<GenerationRef> = None;
    for (number, step) in steps.into_iter().enumerate() {
        let batch = number as u64;
        match step {
            Step::Probe(keys) => prop_assert_eq!(store.probe(&keys_of(&keys)).unwrap(), model.probe(&keys)),
            Step::Commit => {
                last = Some(commit(&mut store, 1, batch));
                model.committed.extend(model.pending.drain());
            }
            Step::CommitBehind(keys) => {
                last = Some(store.prepare(name(1, batch)).unwrap());
                model.committed.extend(model.pending.drain());
                prop_assert_eq!(store.probe(&keys_of(&keys)).unwrap(), model.probe(&keys));
                store.publish();
            }
            Step::Abandon => {
                store.abandon();
                model.pending.clear();
            }
            Step::PrepareAndAbandon => {
                store.prepare(name(1, batch)).unwrap();
                store.abandon();
                model.pending.clear();
            }
            Step::Reopen => {
                store = open(last.as_ref());
                model.pending.clear();
            }
        }
        prop_assert_eq!(store.stats().keys, model.committed.len() as u64);
        prop_assert_eq!(store.stats().pending_keys, model.pending.len() as u64);
    }
    if let Some(last) = last {
        prop_assert_eq!(verify(folder.path(), &last).unwrap().keys, model.committed.len() as u64);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Goal: disk-backed dedup says exactly what a plain set would say.
    /// Method: few distinct keys force repeats; many small commits force merges; nothing stays in memory, or all.
    #[test]
    fn dedup_agrees_with_an_in_memory_set(
        steps in steps(),
        repeats in prop_oneof![Just(Repeats::AnyTime), Just(Repeats::SameTime)],
        pinned in any::<bool>(),
    ) {
        agree(steps, repeats, if pinned { Limits::of(0) } else { NOTHING_PINNED })?;
    }

    /// Goal: a rebuild makes the same buckets from the same keys in any order.
    #[test]
    fn a_rebuild_does_not_depend_on_the_order_of_rows(
        rows in prop::collection::vec((0u64..200, -3i64..4), 1..300),
        order in any::<prop::sample::Index>(),
    ) {
        let build = |rows: &[(u64, i64)]| {
            let folder = tempfile::tempdir().unwrap();
            let floor = Some(EventTimeMs(999 * HOUR_MS));
            let mut builder = Builder::create(folder.path(), spec(Repeats::AnyTime), 0, floor).unwrap();
            for piece in rows.chunks(7) {
                builder.add(&keys_of(piece)).unwrap();
            }
            builder.finish(name(1, 1)).unwrap().1
        };
        let mut turned = rows.clone();
        turned.rotate_left(order.index(rows.len()));
        let report = build(&rows);
        prop_assert_eq!(&build(&turned), &report);
        let mut expected: BTreeMap<i64, HashSet<u64>> = BTreeMap::new();
        for (number, hour) in &rows {
            expected.entry((*hour).max(-2)).or_default().insert(*number);
        }
        let keys: Vec<u64> = report.buckets.iter().map(|bucket| bucket.keys).collect();
        let expected: Vec<u64> = expected.values().map(|keys| keys.len() as u64).collect();
        prop_assert_eq!(keys, expected);
    }
}
