//! Dead letters decoded again: each row once, whatever is killed on the way.

use std::collections::BTreeMap;
use std::fs;
#[cfg(feature = "faults")]
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rdkafka::producer::{BaseRecord, Producer};
use tidemill::pipeline::report::{Event, Report, Unheard};
use tidemill::pipeline::requeue::{self, Requeued};
use tidemill::pipeline::survey;
use tidemill::stop::{Reason, Stop};

use super::start_table::{options, yes};
use super::{BEGIN_MS, MINUTE_MS, Small};

/// The job as it was when the letters were written, and its brake let go.
const STRICT: [&str; 2] = ["decode.unknown_fields=dead_letter", "sink.iceberg.dead_letters.max_ratio=1.0"];
const LETTERS: u64 = 1_000;
/// Those that the mended job decodes: members that no column reads are passed over.
const DECODE: u64 = 600;
/// Those of them that repeat a key: half of the main table, half of one another.
const REPEATS: u64 = 100;

impl Small {
    /// 50 events that are written, and 1,000 that are refused: 600 for a member that nobody knows, 400 that are no JSON.
    fn with_letters() -> Self {
        let job = Small::new("window = \"1 hour\"");
        let event = |id: &str, more: &str| format!(r#"{{"event_id":"{id}","ts":{BEGIN_MS}{more}}}"#);
        let mut payloads: Vec<String> = (0..50).map(|number| event(&format!("known-{number}"), "")).collect();
        for number in 0..LETTERS {
            payloads.push(match number % 5 {
                0 | 1 => format!("not JSON {number}"),
                _ => {
                    let ordinal = number / 5 * 3 + number % 5 - 2;
                    let id = match ordinal {
                        0..50 => format!("known-{ordinal}"),
                        50..150 => format!("twice-{}", ordinal / 2),
                        _ => format!("new-{ordinal}"),
                    };
                    event(&id, r#","surprise":1"#)
                }
            });
        }
        for payload in &payloads {
            job.producer.send(BaseRecord::<(), _>::to("events").payload(payload)).unwrap();
        }
        job.producer.flush(std::time::Duration::from_secs(30)).unwrap();
        let counts = job.run_noting(&STRICT).0.unwrap().counts;
        assert_eq!((counts.written, counts.dead_letter), (50, LETTERS));
        job
    }

    fn requeue(&self, sets: &[&str]) -> Result<Requeued, Stop> {
        let loaded = self.load(sets);
        self.runtime.block_on(requeue::requeue(&loaded, &options(), None, &yes, &mut Unheard))
    }

    /// By reason: letters that wait, and those that were requeued.
    fn letters(&self) -> BTreeMap<String, (u64, u64)> {
        let tallies = self.runtime.block_on(requeue::list(&self.load(&[]))).unwrap();
        tallies.into_iter().map(|tally| (tally.reason, (tally.waiting, tally.requeued))).collect()
    }

    fn assert_requeued(&self) {
        let keys = self.main_keys();
        assert_eq!(keys.len() as u64, 50 + DECODE - REPEATS);
        assert!(keys.values().all(|copies| *copies == 1));
        let letters = self.letters();
        assert_eq!(letters["unknown_field"], (0, DECODE));
        assert_eq!(letters["invalid_json"], (LETTERS - DECODE, 0));
    }
}

#[test]
fn of_a_thousand_letters_those_that_decode_with_the_mended_job_come_in_once() {
    let job = Small::with_letters();
    assert_eq!(job.letters(), [("invalid_json", (400, 0)), ("unknown_field", (600, 0))].map(own).into());
    let found = job.runtime.block_on(requeue::look(&job.load(&[]), None)).unwrap();
    assert_eq!((found.waiting, found.rows), (LETTERS, DECODE));
    assert_eq!(found.refused, [("invalid_json".to_owned(), 400)].into());
    let before = job.record();

    let done = job.requeue(&[]).unwrap();
    assert_eq!((done.waiting, done.counts.consumed), (LETTERS, LETTERS));
    assert_eq!((done.counts.written, done.counts.duplicate), (DECODE - REPEATS, REPEATS));
    assert_eq!(done.counts.dead_letter_known, LETTERS - DECODE);
    job.assert_requeued();
    let after = job.record();
    assert_eq!((after.requeue.as_ref(), after.released), (None, true));
    let ends = |record: &tidemill::commit::ledger::LedgerRecord| record.cursor("events", 0).map(|at| at.end);
    assert_eq!(ends(&after), ends(&before), "no offset moves");

    // Once more: those that came in do not wait any more, and the rest is refused as before.
    let again = job.requeue(&[]).unwrap();
    assert_eq!((again.waiting, again.counts.written, again.counts.duplicate), (400, 0, 0));
    // Topics are read on, and a repeat of a requeued row is dropped, also after a rebuild.
    job.lose_state();
    let (written, duplicate, _) = job.take(&[("new-599", 0), ("new-1000", 1), ("known-1", 0)], &[]);
    assert_eq!((written, duplicate), (1, 2));
}

#[test]
fn only_letters_of_the_reason_that_is_named_are_taken_in_as_many_microbatches_as_it_needs() {
    let job = Small::with_letters();
    let loaded = job.load(&["microbatch.max_records=70"]);
    let (options, report, reason) = (options(), &mut Unheard, Some("unknown_field"));
    let asked = requeue::requeue(&loaded, &options, reason, &yes, report);
    let done = job.runtime.block_on(asked).unwrap();
    assert_eq!((done.waiting, done.batches), (DECODE, 9));
    job.assert_requeued();
}

/// Three letters, the second of which is late behind the first.
fn with_a_late_letter() -> Small {
    let job = Small::new("window = \"1 hour\"");
    for (id, minute) in [("a", 10), ("b", 5), ("c", 11)] {
        let payload = format!(r#"{{"event_id":"{id}","ts":{},"x":1}}"#, BEGIN_MS + minute * MINUTE_MS);
        job.producer.send(BaseRecord::<(), _>::to("events").payload(&payload)).unwrap();
    }
    job.producer.flush(std::time::Duration::from_secs(30)).unwrap();
    assert_eq!(job.run_noting(&STRICT).0.unwrap().counts.dead_letter, 3);
    job
}

/// Does something when the first microbatch has landed.
struct AfterFirst<F: FnMut()>(F);

impl<F: FnMut()> Report for AfterFirst<F> {
    fn event(&mut self, event: &Event) {
        if matches!(event, Event::Commit { .. }) {
            (self.0)();
        }
    }
}

#[test]
fn a_requeue_that_is_interrupted_says_how_it_goes_on_and_judges_the_rest_as_if_it_never_stopped() {
    let job = with_a_late_letter();
    let sets = ["microbatch.max_records=1", "event_time.late=side"];
    let (loaded, options) = (job.load(&sets), options());
    let interrupt = Arc::clone(&options.interrupt);
    let mut report = AfterFirst(|| interrupt.store(true, Ordering::Relaxed));
    let asked = requeue::requeue(&loaded, &options, None, &yes, &mut report);
    let stop = job.runtime.block_on(asked).unwrap_err();
    assert_eq!(stop.reason, Reason::Interrupted);
    assert!(stop.way_out.contains("tidemill dead-letters requeue"), "{}", stop.way_out);
    assert_eq!(job.main_keys().len(), 1);
    let done = job.requeue(&sets).unwrap();
    assert_eq!((done.waiting, done.counts.written, done.counts.late_side), (2, 1, 1));
}

#[test]
fn a_letter_whose_row_is_dropped_for_being_late_waits_on() {
    let job = with_a_late_letter();
    let done = job.requeue(&["event_time.late=drop"]).unwrap();
    assert_eq!((done.counts.written, done.counts.late_dropped), (2, 1));
    assert_eq!(job.letters()["unknown_field"], (1, 2));
    let again = job.requeue(&[]).unwrap();
    assert_eq!((again.waiting, again.counts.written), (1, 1));
}

#[test]
fn letters_of_a_microbatch_that_did_not_land_are_not_passed_over() {
    let job = Small::with_letters();
    let folder = survey::state_folder(&job.load(&[]).job);
    let aside = folder.with_extension("aside");
    let sets = ["microbatch.max_records=300"];
    let (loaded, options, mut landed) = (job.load(&sets), options(), 0);
    let mut report = AfterFirst(|| {
        landed += 1;
        // The next generation can not be written: what stands there is no folder.
        fs::rename(&folder, &aside).unwrap();
        fs::write(&folder, "").unwrap();
    });
    let asked = requeue::requeue(&loaded, &options, None, &yes, &mut report);
    let stop = job.runtime.block_on(asked).unwrap_err();
    assert_eq!((stop.reason, landed), (Reason::StorageFailed, 1), "{stop:?}");
    fs::remove_file(&folder).unwrap();
    fs::rename(&aside, &folder).unwrap();
    let record = job.record();
    assert!(record.released && record.requeue.is_some_and(|lane| lane.after.2 < 50 + 300));
    assert_eq!(job.requeue(&[]).unwrap().waiting, LETTERS - 300);
    job.assert_requeued();
}

#[test]
fn a_microbatch_of_letters_closes_when_its_time_is_up() {
    let job = Small::new("window = \"1 hour\"");
    // More than are decoded together.
    let letters = 4_200;
    for number in 0..letters {
        let payload = format!(r#"{{"event_id":"{number}","ts":{BEGIN_MS},"x":1}}"#);
        job.producer.send(BaseRecord::<(), _>::to("events").payload(&payload)).unwrap();
    }
    job.producer.flush(std::time::Duration::from_secs(30)).unwrap();
    job.run_noting(&STRICT).0.unwrap();
    let done = job.requeue(&["microbatch.max_interval=1ms"]).unwrap();
    assert!(done.batches > 1, "{done:?}");
    assert_eq!(done.counts.written, letters);
}

#[test]
fn the_first_letters_by_their_places_are_shown() {
    let job = Small::with_letters();
    let show = |reason, most| {
        let loaded = job.load(&[]);
        let shown = requeue::show(&loaded, reason, None, most);
        let shown = job.runtime.block_on(shown).unwrap();
        shown.into_iter().map(|letter| (letter.place.offset, letter.payload.is_some())).collect::<Vec<_>>()
    };
    assert_eq!(show(Some("invalid_json"), 3), [(50, true), (51, true), (55, true)]);
    assert_eq!(show(None, 4), [(50, true), (51, true), (52, true), (53, true)]);
    assert_eq!(show(None, 0), []);
    assert_eq!(show(None, 2_000).len() as u64, LETTERS);
}

#[test]
fn requeued_letters_are_judged_by_time_like_any_other() {
    let job = with_a_late_letter();
    let done = job.requeue(&["event_time.late=side"]).unwrap();
    assert_eq!((done.counts.written, done.counts.late_side), (2, 1));
    assert_eq!(job.main_keys().len(), 2);
}

#[cfg(feature = "faults")]
#[test]
fn a_requeue_that_is_killed_at_any_durable_step_goes_on_and_each_row_stands_once() {
    use std::os::unix::process::ExitStatusExt;
    let points = ["marks_written:2", "main_sent:3", "main_landed:2", "sides_sent:2", "sides_landed:2"];
    for point in points {
        let job = Small::with_letters();
        let killed = Command::new(env!("CARGO_BIN_EXE_tidemill"))
            .args(["dead-letters", "requeue", "--yes", "--set", "microbatch.max_records=300"])
            .arg(job.folder.path().join("job.toml"))
            .env("TIDEMILL_CRASH_AT", point)
            .output()
            .unwrap();
        assert_eq!(killed.status.signal(), Some(9), "{point}: {killed:?}");
        if point == "sides_landed:2" {
            let lane = job.record().requeue;
            assert!(lane.is_some_and(|lane| lane.after.2 > 0), "the cursor stands in the ledger");
        }
        if point == "main_landed:2" {
            // A run in between pays the debt, and leaves the lane as it is.
            let (written, ..) = job.take(&[("between", 0)], &[]);
            assert_eq!(written, 1);
            let waiting: u64 = job.letters().values().map(|(waiting, _)| waiting).sum();
            assert!(waiting < LETTERS, "marks that were owed stand");
            job.requeue(&[]).unwrap();
            let keys = job.main_keys();
            assert!(keys.len() as u64 == 51 + DECODE - REPEATS && keys.values().all(|copies| *copies == 1));
            continue;
        }
        job.requeue(&[]).unwrap();
        job.assert_requeued();
    }
}

fn own(pair: (&str, (u64, u64))) -> (String, (u64, u64)) {
    (pair.0.to_owned(), pair.1)
}
