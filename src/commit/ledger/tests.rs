//! What both forms of a record keep, and that every released form is read.

use super::*;

/// A record at batch 4, with one topic partition read to offset 100.
pub(crate) fn record() -> LedgerRecord {
    let cursor = Cursor {
        start: NextOffset::at(50),
        end: NextOffset::at(100),
        tail: Some(Tail { offset: 99, hash: 7 }),
        max_event_time: Some(EventTimeMs(1_700_000_000_000)),
    };
    let behind = Cursor { max_event_time: Some(EventTimeMs(1_699_999_000_000)), ..cursor };
    let empty = Cursor { max_event_time: None, tail: None, ..cursor };
    let partitions = BTreeMap::from([(0, cursor), (1, behind), (2, empty)]);
    let lane = Lane {
        watermark: Some(EventTimeMs(1_699_999_400_000)),
        topics: BTreeMap::from([("sent".to_owned(), partitions)]),
        backfill: None,
    };
    LedgerRecord {
        format: FORMAT_VERSION,
        job_id: Uuid::from_u128(1),
        job_name: "n".into(),
        epoch: 3,
        owner: Uuid::from_u128(2),
        lease_until_ms: 1_700_000_900_000,
        released: true,
        kind: Kind::Data,
        sequence: 11,
        attempt: Uuid::from_u128(3),
        batch: 4,
        last_batch_with_rows: 4,
        cut_time_ms: 1_700_000_000_500,
        cluster_id: Some("c1".into()),
        schema_id: 0,
        spec_id: 0,
        job_hash: "hash".into(),
        sides_back_to: None,
        restored_from: None,
        timelines: Vec::new(),
        dedup: DedupRecord {
            generation: Some("g".into()),
            checksum: Some("c".into()),
            seed: u64::MAX,
            key_spec_hash: "spec".into(),
            shards: 256,
            bucket_width_ms: 75_600_000,
            eras: Vec::new(),
            repeats: Repeats::AnyTime,
            floor: Some(EventTimeMs(1_600_000_000_000)),
            complete_since: None,
            keys: 50,
            digest: "0f".into(),
        },
        topics: BTreeMap::from([("sent".to_owned(), Some(TopicId(Uuid::from_u128(4))))]),
        lanes: BTreeMap::from([(LIVE_LANE.to_owned(), lane)]),
        batch_lane: None,
        counts: Counts { consumed: 50, written: 50, ..Counts::default() },
        sides: BTreeMap::new(),
        buckets: vec![BucketRecord { from: 0, to: 1, count: 50, digest: "00".into() }],
        jumps: Vec::new(),
        others: None,
        suppressed: None,
        batch_generation: None,
        change: None,
        requeue: None,
    }
}

#[test]
fn the_full_form_comes_back_as_it_was() {
    let record = record();
    assert_eq!(LedgerRecord::from_property(&record.to_property()).unwrap(), record);
}

#[test]
fn both_forms_carry_the_widths_of_earlier_buckets_and_from_when_the_state_is_complete() {
    let mut record = record();
    assert!(!record.pack().contains("eras"), "a width that never changed takes no room");
    record.dedup.eras = vec![EraRecord { until: EventTimeMs(1_650_000_000_000), bucket_width_ms: 3_600_000 }];
    record.dedup.complete_since = Some(EventTimeMs(1_640_000_000_000));
    let full = LedgerRecord::from_property(&record.to_property()).unwrap();
    let packed = LedgerRecord::from_packed(&record.pack(), 1).unwrap();
    assert_eq!((&full.dedup, &packed.dedup), (&record.dedup, &record.dedup));
}

#[test]
fn the_packed_form_is_enough_to_resume() {
    let record = record();
    let summary = record.to_summary();
    let unpacked = LedgerRecord::from_packed(&summary[SUMMARY_PACKED], 1).unwrap();
    let mut expected = record.clone();
    for cursor in expected.lanes.get_mut(LIVE_LANE).unwrap().topics.get_mut("sent").unwrap().values_mut() {
        (cursor.start, cursor.tail) = (cursor.end, None);
    }
    (expected.counts, expected.buckets) = (Counts::default(), Vec::new());
    assert_eq!(record.without_what_packing_leaves_out(), expected);
    assert_eq!(unpacked, expected);
}

#[test]
fn a_property_that_was_edited_by_hand_is_not_the_full_form_of_its_commit() {
    let record = record();
    let packed = LedgerRecord::from_packed(&record.pack(), 1).unwrap();
    assert!(is_full_form_of(&record, &packed));
    let mut edited = record;
    let cursors = edited.lanes.get_mut(LIVE_LANE).unwrap().topics.get_mut("sent").unwrap();
    cursors.get_mut(&0).unwrap().end = NextOffset::at(150);
    assert!(!is_full_form_of(&edited, &packed));
}

#[test]
fn the_packed_form_keeps_to_its_size() {
    let mut record = record();
    record.dedup.generation = Some("e0000000012-b0000003456-0199aaaa-bbbb-7ccc-8ddd-eeeeffff0000".into());
    (record.dedup.checksum, record.dedup.key_spec_hash) = (Some("0".repeat(32)), "1".repeat(32));
    (record.job_hash, record.dedup.digest) = ("2".repeat(32), "3".repeat(32));
    (record.job_name, record.cluster_id) = ("notifications".into(), Some("4L6g3nShT-eMCtK--X86sw".into()));
    let partitions = &mut record.lanes.get_mut(LIVE_LANE).unwrap().topics;
    let cursor = Cursor {
        start: NextOffset::at(0),
        end: NextOffset::at(999_999_999_999),
        tail: None,
        max_event_time: Some(EventTimeMs(1_700_000_000_000)),
    };
    let trailing = Cursor { max_event_time: Some(EventTimeMs(1_699_900_000_000)), ..cursor };
    partitions.clear();
    partitions.insert("sent".into(), (0..100).map(|p| (p, if p == 0 { cursor } else { trailing })).collect());
    let hundred = record.to_summary()[SUMMARY_PACKED].len();
    assert!(hundred < 4096, "{hundred} bytes for 100 topic partitions");
    let most =
        (0..TIMELINES_MAX as u64).map(|number| Timeline { number: 100 + number, begin: 1_000_000 + number });
    let restored = LedgerRecord { timelines: most.collect(), ..record.clone() };
    let restored = restored.to_summary()[SUMMARY_PACKED].len();
    assert!(restored < 4096, "{restored} bytes for 100 topic partitions, {hundred} without timelines");
    let partitions = &mut record.lanes.get_mut(LIVE_LANE).unwrap().topics;
    partitions.insert("sent".into(), (0..200).map(|p| (p, if p == 0 { cursor } else { trailing })).collect());
    let two_hundred = record.to_summary()[SUMMARY_PACKED].len();
    let each = (two_hundred - hundred) as f64 / 100.0;
    assert!(each <= 28.0, "{each} bytes for each further topic partition with offsets near 1e12");
}

#[test]
fn a_newer_record_is_refused_by_name_before_anything_is_read_from_it() {
    let error = LedgerRecord::from_property(r#"{"format": 5, "everything": "else"}"#).unwrap_err();
    assert_eq!(error.to_string(), "ledger format 5 is newer than 4, the newest that this program reads");
}

#[test]
fn a_broken_record_says_where_it_stands() {
    let huge = record().to_property().replace("\"epoch\":3", "\"epoch\":18446744073709551615");
    for text in ["", "[]", "{}", r#"{"format":1}"#, huge.as_str()] {
        let error = LedgerRecord::from_property(text).unwrap_err();
        assert!(error.to_string().starts_with("ledger record in table property tidemill.ledger"), "{error}");
    }
}

#[test]
fn the_golden_record_of_format_1_is_read() {
    let text = include_str!("../../../fixtures/ledger-1.json");
    assert_eq!(LedgerRecord::from_property(text).unwrap(), LedgerRecord { format: 1, ..record() });
}

/// What version 2 added.
fn changed_record() -> LedgerRecord {
    let bucket = BucketRecord { from: 0, to: 1, count: 7, digest: "07".into() };
    LedgerRecord {
        kind: Kind::Change,
        others: Some(Others { batch_max: 2, adopted: true, buckets: vec![bucket] }),
        suppressed: Some(Suppressed { table: "e.n_suppressed".into(), uuid: Uuid::from_u128(9), rows: 3 }),
        batch_generation: Some("f".into()),
        change: Some(Change { by: "state adopt-rows".into(), what: "7 keys".into() }),
        ..record()
    }
}

#[test]
fn the_golden_record_of_format_2_is_read() {
    let text = include_str!("../../../fixtures/ledger-2.json");
    assert_eq!(LedgerRecord::from_property(text).unwrap(), LedgerRecord { format: 2, ..changed_record() });
}

/// What version 3 added: a backfill that is being read, whose microbatch this is, and one that is done.
fn backfilling_record() -> LedgerRecord {
    let cursor = |end, time| Cursor {
        start: NextOffset::at(10),
        end: NextOffset::at(end),
        tail: Some(Tail { offset: end - 1, hash: 8 }),
        max_event_time: Some(EventTimeMs(time)),
    };
    let partitions = BTreeMap::from([(0, cursor(20, 1_690_000_000_000)), (1, cursor(40, 1_690_000_000_500))]);
    let ends = BTreeMap::from([(0, NextOffset::at(90)), (1, NextOffset::at(40))]);
    let backfill = Backfill {
        from_ms: 1_689_000_000_000,
        to_ms: Some(1_690_000_000_000),
        state: LaneState::Active,
        ends: BTreeMap::from([("sent".to_owned(), ends)]),
        counts: Counts { consumed: 40, written: 30, outside_range: 10, ..Counts::default() },
        letters_ratio_max: Some(0.5),
    };
    let lane = Lane {
        watermark: Some(EventTimeMs(1_689_999_000_000)),
        topics: BTreeMap::from([("sent".to_owned(), partitions)]),
        backfill: Some(backfill.clone()),
    };
    let done = Backfill { to_ms: None, state: LaneState::Done, ends: BTreeMap::new(), ..backfill };
    let done = Lane { watermark: None, topics: BTreeMap::new(), backfill: Some(done) };
    let mut record = LedgerRecord { batch_lane: Some("last-week".into()), ..record() };
    record.lanes.insert("last-week".into(), lane);
    record.lanes.insert("june".into(), done);
    record
}

#[test]
fn the_golden_record_of_format_3_is_read() {
    let text = include_str!("../../../fixtures/ledger-3.json");
    // written before a backfill could have a ratio of its own
    let mut record = LedgerRecord { format: 3, ..backfilling_record() };
    record
        .lanes
        .values_mut()
        .filter_map(|lane| lane.backfill.as_mut())
        .for_each(|lane| lane.letters_ratio_max = None);
    assert_eq!(LedgerRecord::from_property(text).unwrap(), record);
}

/// What version 4 added: a ledger that went back to batch 2, and later to batch 3.
fn restored_record() -> LedgerRecord {
    let first = LedgerRecord { timelines: record().timelines_from(2), ..record() };
    LedgerRecord { timelines: first.timelines_from(3), ..record() }
}

#[test]
fn the_golden_record_of_format_4_is_read() {
    let text = include_str!("../../../fixtures/ledger-4.json");
    assert_eq!(LedgerRecord::from_property(text).unwrap(), restored_record());
    let packed = LedgerRecord::from_packed(&restored_record().pack(), 1).unwrap();
    assert_eq!(packed.timelines, restored_record().timelines);
}

#[test]
fn what_the_ledger_went_behind_is_known_however_often_it_went_back() {
    let at =
        |batch, timelines: &[Timeline]| LedgerRecord { batch, timelines: timelines.to_vec(), ..record() };
    let ninth = at(9, &[]);
    let fourth = at(4, &ninth.timelines_from(4));
    let later = at(30, &fourth.timelines);
    assert!(fourth.left_behind(&ninth) && later.left_behind(&ninth) && later.left_behind(&at(5, &[])));
    // Batch 4 and what is older are of both.
    assert!(!later.left_behind(&at(4, &[])) && !later.left_behind(&fourth));
    let again = at(20, &later.timelines_from(20));
    assert!(
        again.left_behind(&later)
            && again.left_behind(&ninth)
            && !again.left_behind(&at(18, &later.timelines))
    );
    // Going behind all of it leaves one line, which says as much.
    let behind = at(2, &again.timelines_from(2));
    assert_eq!(behind.timelines, [Timeline { number: 3, begin: 2 }]);
    assert!([&ninth, &fourth, &later, &again].iter().all(|older| behind.left_behind(older)));
    assert!(!behind.left_behind(&at(2, &[])));
    // Restores to later and later batches: the oldest grow together, and still say so.
    let long = (1..=100).fold(record(), |record, batch| at(1_000 + batch, &record.timelines_from(batch)));
    assert_eq!(long.timelines.len(), TIMELINES_MAX);
    assert!((2..=1_000).all(|batch| long.left_behind(&at(batch, &[]))) && !long.left_behind(&at(1, &[])));
    let huge = record().to_property().replacen(
        '{',
        r#"{"timelines":[{"number":18446744073709551615,"begin":1}],"#,
        1,
    );
    assert!(LedgerRecord::from_property(&huge).unwrap_err().to_string().contains("2^53"));
}

#[test]
fn the_packed_form_keeps_what_a_backfill_reads_and_how_far_it_is() {
    let record = backfilling_record();
    let packed = LedgerRecord::from_packed(&record.to_summary()[SUMMARY_PACKED], 1).unwrap();
    assert!(is_full_form_of(&record, &packed));
    let lane = &packed.lanes["last-week"];
    assert_eq!((lane.offsets_left(), &lane.backfill), (70, &record.lanes["last-week"].backfill));
    assert_eq!(packed.active_backfills().collect::<Vec<_>>(), ["last-week"]);
}

#[test]
fn a_job_without_backfills_says_nothing_of_them() {
    let text = record().to_property() + &record().pack();
    assert!(!text.contains("backfill") && !text.contains("batch_lane"), "{text}");
}

#[test]
fn a_backfill_holds_timestamps_from_its_begin_up_to_its_end_and_no_record_without_one() {
    let backfill = Backfill {
        from_ms: 10,
        to_ms: Some(20),
        ..backfilling_record().lanes["june"].backfill.clone().unwrap()
    };
    let held: Vec<bool> = [9, 10, 19, 20].map(|time| backfill.holds(Some(time))).to_vec();
    assert_eq!((held, backfill.holds(None)), (vec![false, true, true, false], false));
    assert!(Backfill { to_ms: None, ..backfill }.holds(Some(i64::MAX)));
}

#[test]
fn a_backfill_that_is_done_loses_its_cursors_and_only_the_last_few_are_told_of() {
    let mut record = backfilling_record();
    let done = record.lanes["june"].clone();
    for number in 0..9 {
        record.lanes.insert(format!("done-{number}"), done.clone());
    }
    record.lanes.get_mut("last-week").unwrap().backfill.as_mut().unwrap().state = LaneState::Done;
    record.tidy_lanes();
    assert_eq!(record.lanes.len(), 1 + LANES_DONE_MAX);
    assert_eq!(record.live(), self::record().live());
    assert!(record.backfills().all(|(_, lane, backfill)| lane.topics.is_empty() && backfill.ends.is_empty()));
}

#[test]
fn the_packed_form_keeps_which_rows_are_not_ours() {
    let packed = LedgerRecord::from_packed(&changed_record().pack(), 1).unwrap();
    assert_eq!(packed.others, Some(Others { batch_max: 2, adopted: true, buckets: Vec::new() }));
    assert_eq!((packed.batch_generation(), &packed.change), (Some("f"), &None));
    assert!(is_full_form_of(&changed_record(), &packed));
    assert_eq!(record().batch_generation(), Some("g"));
}

/// A table with these snapshots, each with its parent and the record that it carries; numbers count up with the ids.
fn table_of(snapshots: &[(i64, Option<i64>, &LedgerRecord)], current: i64) -> TableMetadata {
    let creation = iceberg::TableCreation::builder()
        .name("n".to_owned())
        .location("memory://n".to_owned())
        .schema(iceberg::spec::Schema::builder().build().unwrap())
        .build();
    let table = iceberg::spec::TableMetadataBuilder::from_table_creation(creation).unwrap().build().unwrap();
    let mut text = serde_json::to_value(table.metadata).unwrap();
    let now_ms = text["last-updated-ms"].as_i64().unwrap();
    let snapshot = |&(id, parent, record): &(i64, Option<i64>, &LedgerRecord)| {
        let mut summary = serde_json::json!({ "operation": "append" });
        record.to_summary().into_iter().for_each(|(name, value)| summary[name] = value.into());
        serde_json::json!({
            "snapshot-id": id, "parent-snapshot-id": parent, "sequence-number": id, "timestamp-ms": now_ms,
            "manifest-list": "memory://list", "summary": summary, "schema-id": 0,
        })
    };
    text["snapshots"] = snapshots.iter().map(snapshot).collect();
    text["last-sequence-number"] = snapshots.iter().map(|(id, ..)| *id).max().into();
    text["current-snapshot-id"] = current.into();
    text["refs"] = serde_json::json!({ "main": { "snapshot-id": current, "type": "branch" } });
    text["snapshot-log"] = serde_json::json!([{ "snapshot-id": current, "timestamp-ms": now_ms }]);
    serde_json::from_value(text).unwrap()
}

/// A record of this batch and place in its ledger's order.
fn at(batch: u64, sequence: u64) -> LedgerRecord {
    let attempt = Uuid::from_u128(u128::from(batch) << 64 | u128::from(sequence));
    LedgerRecord { batch, sequence, attempt, ..record() }
}

/// Batches of the record on the ancestry and of the one that was rolled back, and whether that went back on purpose.
fn rolled_back_by(metadata: &TableMetadata) -> Option<(Option<u64>, u64, bool)> {
    match inspect(metadata).unwrap() {
        Found::RolledBack { older, newer, is_undone } => {
            Some((older.map(|older| older.batch), newer.batch, is_undone))
        }
        Found::Record(_) | Found::Nothing => None,
        Found::CutOff(record) => panic!("history is cut off at batch {}", record.batch),
    }
}

#[test]
fn a_rollback_is_told_by_the_snapshots_that_came_after_and_are_of_the_same_ledger() {
    let (first, second) = (at(1, 2), at(2, 3));
    let table = table_of(&[(1, None, &first), (2, Some(1), &second)], 1);
    assert_eq!(rolled_back_by(&table), Some((Some(1), 2, false)));
    // One that was made again counts from 1: what a tag keeps of the ledger before it came before.
    let tagged = table_of(&[(1, None, &at(40, 50)), (2, None, &at(0, 1)), (3, Some(2), &first)], 3);
    assert_eq!(rolled_back_by(&tagged), None);
    let of_another_job = LedgerRecord { job_id: Uuid::from_u128(77), ..second.clone() };
    assert_eq!(rolled_back_by(&table_of(&[(1, None, &first), (2, Some(1), &of_another_job)], 1)), None);
    // Side by side with the ancestry: of an attempt that another took the place of.
    assert_eq!(rolled_back_by(&table_of(&[(1, None, &second), (2, None, &first)], 1)), None);
}

#[test]
fn a_restore_or_replay_that_a_rollback_undoes_is_no_plain_rollback() {
    let mut all = [at(4, 5), at(9, 10), at(4, 11), at(5, 12), at(10, 13)];
    let timelines = all[1].timelines_from(4);
    all[2..].iter_mut().for_each(|record| record.timelines.clone_from(&timelines));
    let snapshots: Vec<(i64, Option<i64>, &LedgerRecord)> =
        all.iter().zip(1..).map(|(record, id)| (id, (id > 1).then_some(id - 1), record)).collect();
    // Batches 4 and 9, back to 4, then 5 and 10.
    assert_eq!(rolled_back_by(&table_of(&snapshots[..3], 2)), Some((Some(9), 4, true)));
    assert_eq!(rolled_back_by(&table_of(&snapshots, 2)), Some((Some(9), 10, true)));
    assert_eq!(rolled_back_by(&table_of(&snapshots, 3)), Some((Some(4), 10, false)));
    assert_eq!(rolled_back_by(&table_of(&snapshots, 5)), None);
}
