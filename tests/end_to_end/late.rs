//! Late rows: to the late table, dropped, or set aside as unproven; and what of them counts as seen.

use std::collections::BTreeMap;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{Int64Type, TimestampMicrosecondType};
use futures::TryStreamExt;
use tidemill::commit::side::Role;
use tidemill::sink::{scan, schema};
use tidemill::stop::Reason;
use tidemill::{catalog, pipeline};

use tidemill::pipeline::commands;
use tidemill::pipeline::report::Unheard;

use super::start_table::{options, yes};
use super::{BEGIN_MS, MINUTE_MS, Small};

pub(super) const SIDE: &str = "event_time.late=side";
const DROP: &str = "event_time.late=drop";
const UNPROVEN: &str = "dedup.beyond_window=side";

/// A row of the late table: key, minutes of its watermark, whether it is unproven, batch.
type LateRow = (String, Option<i64>, bool, i64);

impl Small {
    /// Rows of the late table, sorted; none if there is no such table.
    pub(super) fn late_rows(&self) -> Vec<LateRow> {
        let job = self.load(&[]).job;
        let columns =
            ["event_id", "_tidemill_watermark", "_tidemill_unproven", "_tidemill_batch"].map(str::to_owned);
        let batches: Vec<RecordBatch> = self.runtime.block_on(async {
            let catalog = catalog::connect(&job.sink.catalog).await.unwrap();
            let ident = schema::table_ident(&job.sink.late.table).unwrap();
            let Some(table) = catalog::load(&*catalog, &ident).await.unwrap() else { return Vec::new() };
            scan::scan_keys(&table, None, &columns, None).await.unwrap().try_collect().await.unwrap()
        });
        let mut rows = Vec::new();
        for batch in &batches {
            let watermarks = batch.column(1).as_primitive::<TimestampMicrosecondType>();
            let batches = batch.column(3).as_primitive::<Int64Type>();
            for row in 0..batch.num_rows() {
                let watermark =
                    watermarks.is_valid(row).then(|| (watermarks.value(row) / 1_000 - BEGIN_MS) / MINUTE_MS);
                rows.push((
                    batch.column(0).as_string::<i32>().value(row).to_owned(),
                    watermark,
                    batch.column(2).as_boolean().value(row),
                    batches.value(row),
                ));
            }
        }
        rows.sort();
        rows
    }

    /// Takes events; gives those written, repeats, late rows put aside and dropped.
    fn outcomes(&self, events: &[(&str, i64)], sets: &[&str]) -> [u64; 4] {
        let counts = self.take(events, sets).2.counts;
        assert!(counts.conserved());
        [counts.written, counts.duplicate, counts.late_side, counts.late_dropped]
    }

    /// Copies of each key in main.
    pub(super) fn main_keys(&self) -> BTreeMap<String, u64> {
        self.runtime.block_on(pipeline::history::count_by(&self.load(&[]), "event_id")).unwrap()
    }
}

fn row(key: &str, watermark: Option<i64>, unproven: bool, batch: i64) -> LateRow {
    (key.to_owned(), watermark, unproven, batch)
}

#[test]
fn late_rows_go_to_their_table_and_main_and_late_hold_each_key_once_through_a_rebuild() {
    let job = Small::new("window = \"1 hour\"");
    let first = job.outcomes(&[("a", 10), ("b", 5), ("b", 5), ("c", 10), ("a", 3)], &[SIDE]);
    assert_eq!(first, [2, 2, 1, 0]);
    assert_eq!(job.late_rows(), [row("b", Some(10), false, 1)]);
    // A key that was written late counts as seen, in time and late.
    assert_eq!(job.outcomes(&[("b", 12), ("b", 5), ("d", 11)], &[SIDE]), [0, 2, 1, 0]);
    job.lose_state();
    let (summary, notes) = {
        job.send(&[("a", 12), ("b", 12), ("c", 1), ("d", 12), ("e", 12)]);
        let (summary, notes) = job.run_noting(&[SIDE]);
        (summary.unwrap(), notes)
    };
    assert!(notes.iter().any(|note| note.starts_with("rebuilt the dedup state: 4 keys")), "{notes:?}");
    assert_eq!((summary.counts.written, summary.counts.duplicate, summary.counts.late_side), (1, 4, 0));
    assert_eq!(job.late_rows(), [row("b", Some(10), false, 1), row("d", Some(12), false, 2)]);
    assert_eq!(job.main_keys(), ["a", "c", "e"].map(|key| (key.to_owned(), 1)).into());
}

#[test]
fn the_late_table_goes_back_to_a_savepoint_with_main_and_to_nothing_if_it_joined_the_job_later() {
    let job = Small::new("window = \"1 hour\"");
    let create = |name: &str, sets: &[&str]| {
        let loaded = job.load(sets);
        job.runtime.block_on(commands::create_savepoint(&loaded, &options(), name, &mut Unheard)).unwrap()
    };
    let restore = |name: &str| {
        let loaded = job.load(&[SIDE]);
        job.runtime.block_on(commands::restore_savepoint(&loaded, &options(), name, &yes)).unwrap();
    };
    assert_eq!(job.outcomes(&[("a", 10)], &[]), [1, 0, 0, 0]);
    create("without", &[]);
    assert_eq!(job.outcomes(&[("b", 5), ("c", 12)], &[SIDE]), [1, 0, 1, 0]);
    let then = (job.late_rows(), job.main_keys());
    assert_eq!(create("with", &[SIDE]).tables.len(), 3);
    let later = [("d", 4), ("b", 13), ("e", 13), ("c", 3)];
    assert_eq!(job.outcomes(&later, &[SIDE]), [1, 2, 1, 0]);
    let end = (job.late_rows(), job.main_keys());
    restore("with");
    assert_eq!((job.late_rows(), job.main_keys()), then);
    assert_eq!(job.outcomes(&[], &[SIDE]), [1, 2, 1, 0], "what came after is read again");
    assert_eq!((job.late_rows(), job.main_keys()), end);
    restore("without");
    assert_eq!((job.late_rows(), job.main_keys()), (Vec::new(), [("a".to_owned(), 1)].into()));
    job.lose_state();
    assert_eq!(job.outcomes(&[], &[SIDE]), [2, 2, 2, 0]);
    let keys = |rows: Vec<LateRow>| rows.into_iter().map(|row| row.0).collect::<Vec<_>>();
    assert_eq!((keys(job.late_rows()), job.main_keys()), (keys(end.0), end.1));
}

#[test]
fn a_lateness_that_is_allowed_is_not_late_whatever_the_batches_are() {
    let allowed = "event_time.allowed_lateness=\"5 minutes\"";
    let events = [("a", 10), ("b", 5), ("c", 4), ("d", 9), ("e", 20), ("f", 14), ("g", 15)];
    for batch in ["microbatch.max_records=1", "microbatch.max_records=3", "microbatch.max_records=100"] {
        let job = Small::new("window = \"1 hour\"");
        assert_eq!(job.outcomes(&events, &[SIDE, allowed, batch]), [5, 0, 2, 0]);
        let late: Vec<String> = job.late_rows().into_iter().map(|row| row.0).collect();
        assert_eq!(late, ["c", "f"], "{batch}");
    }
}

#[test]
fn a_late_row_that_is_dropped_is_counted_and_its_key_stays_unseen() {
    let job = Small::new("window = \"1 hour\"");
    assert_eq!(job.outcomes(&[("a", 10), ("b", 5), ("a", 5)], &[DROP]), [1, 0, 0, 2]);
    assert_eq!(job.late_rows(), []);
    // Sent again in time, and, on another day, with another policy.
    assert_eq!(job.outcomes(&[("b", 10), ("c", 5)], &[DROP]), [1, 0, 0, 1]);
    assert_eq!(job.outcomes(&[("c", 5)], &[SIDE]), [0, 0, 1, 0]);
    let record = job.record();
    assert!(record.sides.contains_key(Role::Late.name()));
}

#[test]
fn an_event_beyond_the_window_is_set_aside_unproven_and_its_key_is_not_in_the_state() {
    let job = Small::new("window = \"1 hour\"");
    assert_eq!(job.outcomes(&[("a", 5), ("b", 200)], &[UNPROVEN]), [2, 0, 0, 0]);
    assert_ne!(job.record().dedup.complete_since, None);
    // A repeat and a new event of a bucket that is gone: nobody looks, so both are kept, as often as they come.
    assert_eq!(job.outcomes(&[("a", 5), ("z", 5), ("z", 5), ("b", 200)], &[UNPROVEN]), [0, 1, 3, 0]);
    let unproven = |key| row(key, Some(200), true, 2);
    assert_eq!(job.late_rows(), [unproven("a"), unproven("z"), unproven("z")]);
    // The first proven copy is written, also after a rebuild, which reads the late table without its unproven rows.
    job.lose_state();
    assert_eq!(job.outcomes(&[("z", 200), ("b", 200)], &[UNPROVEN]), [1, 1, 0, 0]);
    // Beyond the window nothing is looked up either if late rows are put aside; live ones are proven.
    assert_eq!(job.outcomes(&[("y", 5), ("x", 199), ("x", 200)], &[UNPROVEN, SIDE]), [0, 1, 2, 0]);
    let late: Vec<LateRow> = job.late_rows().into_iter().filter(|row| row.3 == 4).collect();
    assert_eq!(late, [row("x", Some(200), false, 4), row("y", Some(200), true, 4)]);
    // A wider window loads the buckets that were gone, without the keys of rows that nobody proved.
    let wide = "dedup.window=\"10 hours\"";
    assert_eq!(job.outcomes(&[("y", 5), ("a", 5)], &[UNPROVEN, wide]), [1, 1, 0, 0]);
}

#[test]
fn a_bucket_that_is_read_again_is_read_from_both_tables() {
    let job = Small::new("window = \"1 hour\"");
    assert_eq!(job.outcomes(&[("a", 10), ("b", 5)], &[SIDE]), [1, 0, 1, 0]);
    let (_, _, expired) = job.take(&[("c", 200)], &[SIDE]);
    assert_ne!(expired.complete_since, None);
    // An event beyond the window is late, and proven by what both tables hold.
    let (written, duplicate, lent) = job.take(&[("b", 5), ("a", 10), ("d", 5)], &[SIDE]);
    assert_eq!((written, duplicate, lent.counts.late_side), (0, 2, 1));
    assert!(lent.buckets_lent > 0);
    // A window that is widened has the keys of both.
    let wide = "dedup.window=\"10 hours\"";
    assert_eq!(job.outcomes(&[("b", 6), ("d", 200), ("c", 3)], &[SIDE, wide]), [0, 3, 0, 0]);
}

#[test]
fn a_policy_that_changes_keeps_the_late_table_among_what_makes_the_state() {
    let job = Small::new("window = \"1 hour\"");
    assert_eq!(job.outcomes(&[("a", 10), ("b", 5)], &[]), [2, 0, 0, 0]);
    assert!(
        !job.record().sides.contains_key(Role::Late.name()),
        "a job that keeps late rows has no late table"
    );
    assert_eq!(job.outcomes(&[("c", 5), ("b", 5)], &[SIDE]), [0, 1, 1, 0]);
    job.lose_state();
    assert_eq!(job.outcomes(&[("c", 5), ("b", 5), ("d", 5)], &[]), [1, 2, 0, 0]);
    let other = "sink.iceberg.late.table=other.late";
    let stop = job.run_noting(&[SIDE, other]).0.unwrap_err();
    assert_eq!(stop.reason, Reason::TableReplaced);
    assert!(stop.what.contains("set sink.iceberg.late.table back"), "{}", stop.what);
}

#[test]
fn a_late_table_with_rows_that_the_ledger_does_not_know_is_refused() {
    let (one, other) = (Small::new("window = \"1 hour\""), Small::new("window = \"1 hour\""));
    assert_eq!(one.outcomes(&[("a", 10), ("b", 5)], &[SIDE]), [1, 0, 1, 0]);
    // Another job on the same late table.
    let catalog = format!("sink.iceberg.catalog.uri=sqlite:{}/catalog.db", one.folder.path().display());
    let late = "sink.iceberg.late.table=demo.small_late";
    let named = [SIDE, late, &catalog, "sink.iceberg.table=demo.m"];
    other.send(&[("a", 10), ("b", 5)]);
    let stop = other.run_noting(&named).0.unwrap_err();
    assert_eq!(stop.reason, Reason::OtherJob, "{stop:?}");
    assert!(stop.way_out.contains("--set sink.iceberg.late.table=demo.small_late_2"), "{}", stop.way_out);
    // Its own job knows them still.
    assert_eq!(one.outcomes(&[("b", 5)], &[SIDE]), [0, 1, 0, 0]);
}

#[test]
fn a_column_that_joins_the_job_joins_the_late_table_too() {
    let job = Small::new("window = \"1 hour\"");
    assert_eq!(job.outcomes(&[("a", 10), ("b", 5)], &[SIDE]), [1, 0, 1, 0]);
    let column = "decode.columns.channel={ type = \"string\" }";
    assert_eq!(job.outcomes(&[("c", 5), ("b", 5)], &[SIDE, column]), [0, 1, 1, 0]);
    let loaded = job.load(&[SIDE, column]);
    let differs = job.runtime.block_on(async {
        let catalog = catalog::connect(&loaded.job.sink.catalog).await.unwrap();
        let ident = schema::table_ident(&loaded.job.sink.late.table).unwrap();
        let table = catalog::load(&*catalog, &ident).await.unwrap().unwrap();
        schema::compare_late(&table, &loaded.job).unwrap()
    });
    assert!(differs.additions.is_empty() && differs.refusals.is_empty(), "{differs:?}");
    assert_eq!(job.late_rows().len(), 2);
}

#[test]
fn rekeying_and_adopting_read_the_late_table_too() {
    let job = Small::new("window = \"1 hour\"");
    assert_eq!(job.outcomes(&[("a", 10), ("b", 5)], &[SIDE]), [1, 0, 1, 0]);
    let keyed = "dedup.key=[\"event_id\", \"event_time\"]";
    let loaded = job.load(&[SIDE, keyed]);
    let done = job
        .runtime
        .block_on(pipeline::commands::rekey_state(&loaded, &options(), &yes, &mut Unheard))
        .unwrap();
    assert_eq!(done.state.keys, 2);
    assert_eq!(job.outcomes(&[("b", 5), ("b", 6), ("a", 10)], &[SIDE, keyed]), [0, 2, 1, 0]);
}
