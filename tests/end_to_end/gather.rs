//! Keys of many chunks that are looked up together, while their rows wait on local disk, change when things are done and which
//! of two copies stands, and nothing else.

use tidemill::pipeline::profile::Stage;

use super::ahead::{CUTS, EVENTS, PADDING_BYTES, compressing_producer, large_events, run, stage_seconds};
use super::continuous::{SOON, follow};
use super::late::SIDE;
use super::*;

/// All that the memory holds.
const TOGETHER: &str = "dedup.max_probe_records=1000000";

#[test]
fn microbatches_are_cut_where_they_are_without_gathering_and_hold_the_same_rows() {
    for (cut, consumed) in CUTS {
        // two threads and one; and a lookup in the middle of a microbatch
        for (together, threads) in [(TOGETHER, 2), (TOGETHER, 1), ("dedup.max_probe_records=600", 2)] {
            let job = large_events();
            let ran = run(&job, &[cut, together, &format!("threads={threads}")], RunOptions::default());
            let sizes: Vec<u64> = ran.commits.iter().map(|counts| counts.consumed).collect();
            assert_eq!(sizes, consumed, "{cut} {together}");
            assert!(stage_seconds(&ran.profile, Stage::Aside) > 0.0, "{cut} {together}: no row waited");
            let counts = ran.ended.unwrap().counts;
            assert_eq!((counts.written, counts.duplicate), (EVENTS / 2, EVENTS / 2), "{cut} {together}");
            let rows = job.runtime.block_on(history::count_by(&job.load(&[]), "event_id")).unwrap();
            assert!(rows.len() as u64 == EVENTS / 2 && rows.values().all(|copies| *copies == 1), "{cut}");
            let waiting = fs::read_dir(job.folder.path().join("state")).unwrap();
            let left: Vec<_> = waiting.map(|entry| entry.unwrap().file_name()).collect();
            assert!(left.iter().all(|name| !name.to_string_lossy().contains("waiting")), "{left:?}");
        }
    }
    let job = large_events();
    let ran = run(&job, &[], RunOptions::default());
    assert_eq!(
        stage_seconds(&ran.profile, Stage::Aside),
        0.0,
        "a state that fits in memory needs no disk for rows"
    );
}

#[test]
fn of_two_copies_in_two_chunks_that_are_looked_up_together_the_one_at_the_lowest_place_is_written() {
    let keys: u64 = 1_000;
    let padding = "x".repeat(PADDING_BYTES);
    let mut first_rows = Vec::new();
    for together in [None, Some(TOGETHER)] {
        let job = Small::new("window = \"1 hour\"");
        let topics = ["first".to_owned(), "second".to_owned()];
        job.broker.create_topics(&topics, 1).unwrap();
        let producer = compressing_producer(&job);
        for number in 0..keys {
            // in opposite orders: of the keys in the first chunk of one topic the copies are in the last of the other
            for (topic, key) in [("first", number), ("second", keys - 1 - number)] {
                let payload = format!(r#"{{"event_id":"{key}","ts":{BEGIN_MS},"padding":"{padding}"}}"#);
                producer.send(BaseRecord::<(), _>::to(topic).payload(&payload)).unwrap();
                producer.poll(std::time::Duration::ZERO);
            }
        }
        producer.flush(std::time::Duration::from_secs(60)).unwrap();
        let mut sets = vec!["source.kafka.topics=[\"first\", \"second\"]"];
        sets.extend(together);
        let summary = job.run_noting(&sets).0.unwrap();
        assert_eq!((summary.batches, summary.counts.written, summary.counts.duplicate), (1, keys, keys));
        let rows = job.runtime.block_on(history::count_by(&job.load(&[]), "_kafka_topic")).unwrap();
        first_rows.push(rows.get("first").copied().unwrap_or(0));
    }
    assert!(first_rows[0] < keys, "one chunk after the other the first one read wins: {first_rows:?}");
    assert_eq!(first_rows[1], keys);
}

#[test]
fn late_rows_and_letters_among_rows_that_wait_go_where_they_go_without_waiting() {
    let padding = "x".repeat(PADDING_BYTES);
    let mut told = Vec::new();
    for sets in [vec![SIDE], vec![SIDE, TOGETHER]] {
        let job = Small::new("window = \"1 hour\"");
        let producer = compressing_producer(&job);
        for number in 0..1_500_i64 {
            let minute = if number % 50 == 7 { 0 } else { 10 };
            let payload = match number % 90 {
                11 => "{".to_owned(),
                _ => {
                    let (id, ts) = (number % 1_000, BEGIN_MS + minute * MINUTE_MS);
                    format!(r#"{{"event_id":"{id}","ts":{ts},"padding":"{padding}"}}"#)
                }
            };
            producer.send(BaseRecord::<(), _>::to("events").payload(&payload)).unwrap();
            producer.poll(std::time::Duration::ZERO);
        }
        producer.flush(std::time::Duration::from_secs(60)).unwrap();
        let all: Vec<&str> =
            sets.iter().copied().chain(["sink.iceberg.dead_letters.max_ratio=1.0"]).collect();
        let counts = job.run_noting(&all).0.unwrap().counts;
        assert!(counts.late_side > 10 && counts.dead_letter > 10 && counts.duplicate > 100, "{counts:?}");
        let main = job.runtime.block_on(history::count_by(&job.load(&sets), "event_id")).unwrap();
        told.push((counts, main, job.late_rows()));
    }
    assert_eq!(told[0], told[1]);
}

#[test]
fn rows_that_wait_for_their_verdict_are_committed_when_their_time_is_up_though_nothing_else_comes() {
    let job = large_events();
    let loaded = job.load(&[SOON, TOGETHER]);
    let (counts, ended) = follow(&loaded, RunOptions::default(), |running| running.await_consumed(EVENTS));
    assert_eq!(ended.unwrap_err().reason, Reason::Interrupted);
    assert_eq!((counts.written, counts.duplicate), (EVENTS / 2, EVENTS / 2));
}
