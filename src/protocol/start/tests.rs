//! Every row of the start table, each from the facts that lead to it.

use super::*;
use crate::commit::ledger::tests::record;
use crate::commit::ledger::{DedupRecord, Others, SideRecord};
use crate::offset::NextOffset;

fn held(low: i64, end: i64) -> OffsetRange {
    OffsetRange { low: NextOffset::at(low), end: NextOffset::at(end) }
}

struct Case {
    found: Found,
    rows: u64,
    sides: BTreeMap<Role, SideFacts<'static>>,
    local: bool,
    cluster: Option<&'static str>,
    topics: BTreeMap<String, Option<TopicId>>,
    offsets: BTreeMap<TopicPartition, OffsetRange>,
}

impl Case {
    fn dead(&mut self) -> &mut SideFacts<'static> {
        self.sides.get_mut(&Role::DeadLetters).unwrap()
    }
}

fn case(found: Found) -> Case {
    let known = record();
    let offsets = (0..3).map(|partition| (TopicPartition::new("sent", partition), held(0, 1_000))).collect();
    let dead =
        SideFacts { table: "events.n_dead_letters".into(), uuid: None, mark: None, rows: 0, metadata: None };
    let sides = BTreeMap::from([(Role::DeadLetters, dead)]);
    Case { found, rows: 0, sides, local: false, cluster: Some("c1"), topics: known.topics, offsets }
}

fn resumed() -> Case {
    case(Found::Record(Box::new(record())))
}

fn judged(case: &Case, allow: Allow) -> Result<Start, Stop> {
    let facts = Facts {
        job_shown: "jobs/n.toml",
        job_name: "n",
        table: "events.n",
        sides: &case.sides,
        found: &case.found,
        table_rows: case.rows,
        local_generations: case.local,
        cluster_id: case.cluster,
        topic_ids: &case.topics,
        offsets: &case.offsets,
        key_spec_hash: "spec",
    };
    judge(&facts, allow)
}

fn stops_with(case: &Case) -> (Reason, String) {
    let stop = judged(case, Allow::default()).unwrap_err();
    (stop.reason, stop.way_out)
}

#[test]
fn a_record_that_fits_is_resumed() {
    assert!(matches!(judged(&resumed(), Allow::default()), Ok(Start::Resume(_))));
}

#[test]
fn an_empty_table_without_ledger_is_a_first_run() {
    assert!(matches!(judged(&case(Found::Nothing), Allow::default()), Ok(Start::First)));
}

#[test]
fn rows_without_ledger_stop_unless_they_are_ignored_by_name() {
    let mut case = case(Found::Nothing);
    case.rows = 5;
    let (reason, way_out) = stops_with(&case);
    assert_eq!(reason, Reason::TableNotEmpty);
    assert!(way_out.contains("tidemill run jobs/n.toml --ignore-rows"));
    let allow = Allow { ignore_rows: true, ..Allow::default() };
    assert!(matches!(judged(&case, allow), Ok(Start::First)));
}

#[test]
fn local_generations_without_ledger_stop_even_when_rows_are_ignored() {
    let mut case = case(Found::Nothing);
    case.local = true;
    let allow = Allow { ignore_rows: true, ..Allow::default() };
    assert_eq!(judged(&case, allow).unwrap_err().reason, Reason::LedgerLost);
    assert!(stops_with(&case).1.contains("tidemill state discard jobs/n.toml"));
}

fn mark(job_id: Uuid, batch: u64, generation: Option<&str>) -> SideMark {
    let generation = generation.map(str::to_owned);
    let (job_name, main) = ("other".to_owned(), "events.other".to_owned());
    SideMark { format: 1, job_id, job_name, main, role: "dead_letters".into(), epoch: 1, batch, generation }
}

#[test]
fn a_dead_letter_table_of_another_job_or_ahead_of_main_stops() {
    let job_id = record().job_id;
    let mut case = resumed();
    for (found, reason) in [
        (mark(job_id, 4, Some("g")), None),
        (mark(job_id, 3, Some("any")), None),
        (mark(job_id, 5, Some("h")), Some(Reason::TableRolledBack)),
        (mark(job_id, 4, Some("h")), Some(Reason::TableRolledBack)),
        (mark(Uuid::from_u128(77), 1, None), Some(Reason::OtherJob)),
    ] {
        case.dead().mark = Some(found);
        assert_eq!(judged(&case, Allow::default()).err().map(|stop| stop.reason), reason);
    }
}

#[test]
fn a_late_table_is_claimed_with_the_rows_that_a_new_ledger_has_counted_and_with_no_later_ones() {
    let mut begun = record();
    let others = Others { batch_max: begun.batch, adopted: false, buckets: Vec::new() };
    begun.others = Some(others);
    let uuid = Uuid::from_u128(3);
    let known = SideRecord {
        table: "events.n_late".into(),
        uuid,
        files: None,
        schema_id: 0,
        spec_id: 0,
        owed: false,
    };
    begun.sides.insert("late".into(), known);
    let batch = begun.batch;
    let mut case = case(Found::Record(Box::new(begun)));
    for (marked, reason) in [(batch - 1, None), (batch, None), (batch + 1, Some(Reason::TableNotEmpty))] {
        let earlier = SideMark {
            job_name: "n".into(),
            main: "events.n".into(),
            role: "late".into(),
            ..mark(Uuid::from_u128(8), marked, Some("old"))
        };
        let late = SideFacts {
            table: "events.n_late".into(),
            uuid: Some(uuid),
            mark: Some(earlier),
            rows: 5,
            metadata: None,
        };
        case.sides.insert(Role::Late, late);
        assert_eq!(judged(&case, Allow::default()).err().map(|stop| stop.reason), reason, "{marked}");
    }
}

#[test]
fn a_first_run_does_not_take_the_dead_letter_table_of_another_job() {
    let mut case = case(Found::Nothing);
    case.dead().mark = Some(mark(Uuid::from_u128(8), 1, None));
    let (reason, way_out) = stops_with(&case);
    assert_eq!(reason, Reason::OtherJob);
    assert!(way_out.contains("--set sink.iceberg.dead_letters.table=events.n_dead_letters_2"));
    assert!(way_out.contains("name it \"other\" again"), "{way_out}");
}

#[test]
fn a_dead_letter_table_of_this_job_under_an_earlier_id_is_claimed_again() {
    let earlier = SideMark {
        job_name: "n".into(),
        main: "events.n".into(),
        ..mark(Uuid::from_u128(8), 9, Some("old"))
    };
    for found in [Found::Nothing, Found::Record(Box::new(record()))] {
        let mut case = case(found);
        case.dead().mark = Some(earlier.clone());
        assert!(judged(&case, Allow::default()).is_ok());
    }
}

#[test]
fn the_ledger_of_another_job_stops() {
    let mut other = record();
    other.job_name = "m".into();
    let (reason, way_out) = stops_with(&case(Found::Record(Box::new(other))));
    assert_eq!(reason, Reason::OtherJob);
    assert!(way_out.contains("--set sink.iceberg.table=events.n_n"));
}

#[test]
fn a_rollback_stops_with_both_batches() {
    let older = record();
    let newer = LedgerRecord { batch: 9, sequence: older.sequence + 3, ..older.clone() };
    let found = Found::RolledBack { older: Some(Box::new(older)), newer: Box::new(newer), is_undone: false };
    let stop = judged(&case(found), Allow::default()).unwrap_err();
    assert_eq!(stop.reason, Reason::TableRolledBack);
    assert!(stop.what.contains("batch 4") && stop.what.contains("batch 9"));
}

#[test]
fn a_replay_goes_on_from_the_older_batch_above_everything_that_was_rolled_back() {
    let older = record();
    let mut newer = LedgerRecord {
        batch: 9,
        epoch: older.epoch + 2,
        sequence: older.sequence + 7,
        dedup: DedupRecord { generation: Some("h".into()), ..older.dedup.clone() },
        ..older.clone()
    };
    let cursors = newer.lanes.get_mut("live").unwrap().topics.get_mut("sent").unwrap();
    cursors.get_mut(&0).unwrap().end = NextOffset::at(500);
    let both = (Box::new(older.clone()), Box::new(newer.clone()));
    let found = Found::RolledBack { older: Some(both.0), newer: both.1, is_undone: false };
    let mut case = case(found);
    case.dead().mark = Some(mark(older.job_id, 9, Some("h")));
    let allow = Allow { replay: true, ..Allow::default() };
    let Ok(Start::Resume(resumed)) = judged(&case, allow) else { panic!("a replay goes on") };
    assert_eq!((resumed.batch, resumed.attempt, &resumed.dedup), (4, older.attempt, &older.dedup));
    assert_eq!((resumed.epoch, resumed.sequence), (newer.epoch, newer.sequence));
    assert_eq!((resumed.sides_back_to, resumed.jumps.len()), (Some(4), 1));
    assert_eq!(resumed.jumps[0].old_end, Some(NextOffset::at(500)));

    let undone =
        Found::RolledBack { older: Some(Box::new(older)), newer: Box::new(newer.clone()), is_undone: true };
    for found in [undone, Found::RolledBack { older: None, newer: Box::new(newer), is_undone: false }] {
        case.found = found;
        let stop = judged(&case, allow).unwrap_err();
        assert_eq!(stop.reason, Reason::TableRolledBack);
        assert!(!stop.way_out.contains("on_rollback=replay"), "{}", stop.way_out);
    }
}

#[test]
fn a_missing_or_replaced_side_table_stops() {
    let mut with_side = record();
    let side = SideRecord {
        table: "events.n_dead_letters".into(),
        uuid: Uuid::from_u128(5),
        files: None,
        schema_id: 0,
        spec_id: 0,
        owed: false,
    };
    with_side.sides.insert("dead_letters".into(), side);
    let mut case = case(Found::Record(Box::new(with_side)));
    assert_eq!(stops_with(&case).0, Reason::TableReplaced);
    case.dead().uuid = Some(Uuid::from_u128(6));
    assert_eq!(stops_with(&case).0, Reason::TableReplaced);
}

#[test]
fn another_cluster_stops_and_a_rebase_may_go_on() {
    let mut case = resumed();
    case.cluster = Some("c2");
    let (reason, way_out) = stops_with(&case);
    assert_eq!(reason, Reason::ClusterChanged);
    assert!(way_out.contains("tidemill rebase-offsets jobs/n.toml"));
    assert!(judged(&case, Allow { rebase: true, ..Allow::default() }).is_ok());
}

#[test]
fn a_topic_made_again_stops() {
    let mut case = resumed();
    case.topics.insert("sent".into(), Some(TopicId(Uuid::from_u128(99))));
    assert_eq!(stops_with(&case).0, Reason::TopicChanged);
}

#[test]
fn offsets_below_the_log_stop_with_the_exact_range() {
    let mut case = resumed();
    case.offsets.insert(TopicPartition::new("sent", 0), held(150, 1_000));
    let stop = judged(&case, Allow::default()).unwrap_err();
    assert_eq!(stop.reason, Reason::OffsetsLost);
    assert!(stop.what.contains("sent[0] [100, 150)"), "{}", stop.what);
    assert!(judged(&case, Allow { loss: true, ..Allow::default() }).is_ok());
}

#[test]
fn offsets_past_the_end_of_the_log_are_a_changed_topic() {
    let mut case = resumed();
    case.offsets.insert(TopicPartition::new("sent", 0), held(0, 99));
    assert_eq!(stops_with(&case).0, Reason::TopicChanged);
}

#[test]
fn another_key_stops() {
    let mut other = record();
    other.dedup.key_spec_hash = "other".into();
    assert_eq!(stops_with(&case(Found::Record(Box::new(other)))).0, Reason::KeySpecChanged);
}

#[test]
fn a_lease_is_free_when_released_dead_when_its_lock_is_free_and_expired_after_the_grace() {
    let mut held = record();
    held.released = false;
    held.lease_until_ms = 1_000_000;
    assert_eq!(lease(&held, false, 1_000_000), LeaseVerdict::Busy { until_ms: 1_000_000 });
    assert_eq!(lease(&held, false, 1_060_000), LeaseVerdict::Busy { until_ms: 1_000_000 });
    assert_eq!(lease(&held, false, 1_060_001), LeaseVerdict::Expired);
    assert_eq!(lease(&held, true, 0), LeaseVerdict::OwnerDead);
    held.released = true;
    assert_eq!(lease(&held, false, 0), LeaseVerdict::Free);
}

#[test]
fn a_topic_partition_that_the_ledger_does_not_know_is_no_loss() {
    let mut case = resumed();
    case.offsets.insert(TopicPartition::new("sent", 7), held(50, 60));
    assert!(judged(&case, Allow::default()).is_ok());
}
