//! Backfills beside the live lane, against what a consumer of its own reads from the log.
//!
//! The in-process broker can not tell the first offset of a time, so every topic partition is read from its earliest one
//! (`--scan-all`); the acceptance tests ask a real broker.

use std::collections::BTreeSet;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rdkafka::Message;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tidemill::commit::ledger::{LIVE_LANE, LaneState};
use tidemill::commit::request::{Ask, NewLane, PREFIX};
use tidemill::offset::NextOffset;
use tidemill::pipeline::backfill::{self, Asked, Plan};
use tidemill::pipeline::profile::Stage;
use tidemill::pipeline::report::Unheard;
use tidemill::pipeline::{Wish, requests};
use tidemill::source::STALL_AFTER_DEFAULT;

use super::*;
use crate::wait::{self, WAIT_MAX};

const PARTITIONS: u32 = 4;
/// Begin and end of the range, in minutes.
const FROM: i64 = 1_000;
const TO: i64 = 2_000;
/// A record as an independent consumer found it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Logged {
    id: String,
    partition: i32,
    timestamp_ms: i64,
}

impl Logged {
    fn is_in_range(&self) -> bool {
        (at(FROM)..at(TO)).contains(&self.timestamp_ms)
    }
}

fn at(minute: i64) -> i64 {
    BEGIN_MS + minute * MINUTE_MS
}

impl Small {
    /// Sends events (id, minute of event time and Kafka timestamp) to one topic partition.
    fn send_to(&self, partition: i32, events: impl IntoIterator<Item = (String, i64)>) {
        for (id, minute) in events {
            let payload = format!(r#"{{"event_id":"{id}","ts":{}}}"#, at(minute));
            let record = BaseRecord::<(), _>::to("events")
                .partition(partition)
                .timestamp(at(minute))
                .payload(&payload);
            self.producer.send(record).unwrap();
            self.producer.poll(Duration::ZERO);
        }
        self.producer.flush(Duration::from_secs(30)).unwrap();
    }

    /// Shuffled timestamps in two topic partitions, only old ones in the third, nothing in the fourth.
    fn send_shuffled(&self, prefix: &str, records: i64) {
        for partition in 0..2 {
            // Steps of a prime through the minutes visit them out of order.
            let shuffled =
                |n: i64| (format!("{prefix}-{partition}-{n}"), (n * 7_919 + partition as i64) % 3_000);
            self.send_to(partition, (0..records).map(shuffled));
        }
        self.send_to(2, (0..records / 10).map(|n| (format!("{prefix}-2-{n}"), n % FROM)));
    }

    /// 1,500 records in one topic partition, every other one damaged.
    fn send_half_bad(&self) {
        for number in 0..1_500 {
            let event = format!(r#"{{"event_id":"old-{number}","ts":{}}}"#, at(FROM));
            let payload = if number % 2 == 0 { event } else { format!("no JSON {number}") };
            let record = BaseRecord::<(), _>::to("events").partition(0).timestamp(at(FROM)).payload(&payload);
            self.producer.send(record).unwrap();
        }
        self.producer.flush(Duration::from_secs(30)).unwrap();
    }

    /// A job that begins after a log of which each second record is no event.
    fn half_bad() -> Self {
        let job = Self::partitioned("window = \"30 days\"", PARTITIONS);
        job.send_half_bad();
        job.run_noting(&[LATEST]).0.unwrap();
        job
    }

    /// Everything in the log, by a plain consumer.
    fn log(&self) -> Vec<Logged> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.broker.bootstrap())
            .set("group.id", "truth")
            .set("enable.partition.eof", "true")
            .create()
            .unwrap();
        let mut list = TopicPartitionList::new();
        for partition in 0..PARTITIONS as i32 {
            list.add_partition_offset("events", partition, Offset::Beginning).unwrap();
        }
        consumer.assign(&list).unwrap();
        let (mut log, mut ended) = (Vec::new(), 0);
        while ended < PARTITIONS {
            match consumer.poll(Duration::from_secs(30)).expect("the broker answers") {
                Ok(record) => {
                    let payload: serde_json::Value =
                        serde_json::from_slice(record.payload().unwrap()).unwrap();
                    log.push(Logged {
                        id: payload["event_id"].as_str().unwrap().to_owned(),
                        partition: record.partition(),
                        timestamp_ms: record.timestamp().to_millis().unwrap(),
                    });
                }
                Err(rdkafka::error::KafkaError::PartitionEOF(_)) => ended += 1,
                Err(error) => panic!("{error}"),
            }
        }
        log
    }

    fn asked(&self, lane: &str) -> Asked {
        Asked { lane: lane.to_owned(), from_ms: at(FROM), to_ms: Some(at(TO)), scan_all: true }
    }

    fn resolve(&self, lane: &str) -> Plan {
        self.runtime.block_on(backfill::resolve(&self.load(&[]), &self.asked(lane))).unwrap()
    }

    fn read(&self, wish: Wish, sets: &[&str], batches_max: Option<u64>) -> Result<Summary, Stop> {
        let job_shown = "job.toml".to_owned();
        let options = RunOptions { job_shown, backfill: Some(wish), batches_max, ..RunOptions::default() };
        let loaded = self.load(sets);
        let done = self.runtime.block_on(backfill::run(&loaded, &options, &mut Notes::default()));
        done.map(|summary| summary.expect("nobody else owns the table"))
    }

    fn begin(&self, lane: &str, sets: &[&str], batches_max: Option<u64>) -> Summary {
        let register = Some(self.resolve(lane).new_lane);
        self.read(Wish { lane: lane.into(), register }, sets, batches_max).unwrap()
    }

    fn resume(&self, lane: &str, sets: &[&str]) -> Result<Summary, Stop> {
        self.read(Wish { lane: lane.into(), register: None }, sets, None)
    }

    fn ask(&self, ask: Ask) -> Result<String, Stop> {
        let options = RunOptions::default();
        self.runtime.block_on(requests::ask(&self.load(&[]), &options, &ask, &mut Notes::default()))
    }

    /// Starts a command of the program.
    fn start(&self, arguments: &[&str], environment: &[(&str, &str)]) -> Child {
        Command::new(env!("CARGO_BIN_EXE_tidemill"))
            .args(&arguments[..1])
            .arg(self.folder.path().join("job.toml"))
            .args(&arguments[1..])
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn kill_at(&self, point: &str, arguments: &[&str]) {
        use std::os::unix::process::ExitStatusExt;
        let status = deaths::ended(self.start(arguments, &[("TIDEMILL_CRASH_AT", point)]));
        assert_eq!(status.signal(), Some(9), "the command ended with {status} and not at {point}");
    }

    /// Waits until the table has such a property.
    fn await_property(&self, prefix: &str) {
        let is_set = || self.table().metadata().properties().keys().any(|name| name.starts_with(prefix));
        wait::until(is_set, || format!("nobody set {prefix}"));
    }

    /// Waits until the ledger says so.
    fn await_record(&self, holds: impl Fn(&LedgerRecord) -> bool) {
        wait::until(|| holds(&self.record()), || format!("{:?}", self.record()));
    }

    fn table(&self) -> iceberg::table::Table {
        let job = self.load(&[]).job;
        self.runtime.block_on(async {
            let catalog = catalog::connect(&job.sink.catalog).await.unwrap();
            let ident = schema::table_ident(&job.sink.table).unwrap();
            catalog::load(&*catalog, &ident).await.unwrap().unwrap()
        })
    }

    fn rows(&self) -> BTreeMap<String, u64> {
        self.runtime.block_on(history::count_by(&self.load(&[]), "event_id")).unwrap()
    }

    /// The table holds these ids, each once.
    fn assert_holds(&self, expected: &BTreeSet<String>) {
        let rows = self.rows();
        assert!(rows.values().all(|count| *count == 1), "a key stands twice");
        let found: BTreeSet<String> = rows.into_keys().collect();
        let (missing, surplus) = (expected - &found, &found - expected);
        assert!(missing.is_empty() && surplus.is_empty(), "missing {missing:?} surplus {surplus:?}");
    }
}

fn ids<'l>(log: impl IntoIterator<Item = &'l Logged>) -> BTreeSet<String> {
    log.into_iter().map(|logged| logged.id.clone()).collect()
}

const LATEST: &str = "source.kafka.start=latest";
const SMALL_BATCHES: &str = "microbatch.max_records=300";

/// A job that reads what comes, with a backfill of `events` older ones that has written its first microbatch.
fn begun(prefix: &str, events: i64) -> Small {
    let job = Small::partitioned("window = \"30 days\"", PARTITIONS);
    job.send_shuffled(prefix, events);
    job.run_noting(&[LATEST]).0.unwrap();
    job.begin("june", &[SMALL_BATCHES], Some(1));
    job
}

#[test]
fn a_backfill_takes_exactly_the_records_of_its_range_and_moves_no_live_offset() {
    let job = Small::partitioned("window = \"30 days\"", PARTITIONS);
    job.send_shuffled("a", 900);
    assert_eq!(job.run_noting(&[LATEST]).0.unwrap().counts.consumed, 0);
    let before = job.log();
    // Live takes some events that are new and some that are repeats of what it never read.
    job.send_to(0, (0..200).map(|n| (format!("a-0-{n}"), 2_999)));
    job.run_noting(&[]).0.unwrap();
    let live =
        job.log().split_off(0).into_iter().filter(|logged| !before.contains(logged)).collect::<Vec<_>>();
    assert_eq!(live.len(), 200);
    let (log, record) = (job.log(), job.record());

    let plan = job.resolve("june");
    assert_eq!(plan.records_at_most, log.len() as u64);
    assert_eq!(
        plan.topic_partitions.iter().map(|planned| planned.end).collect::<Vec<_>>(),
        [1_100, 900, 90, 0]
    );
    assert_eq!(job.record(), record, "a plan changes nothing");
    let summary = job.begin("june", &[SMALL_BATCHES], None);

    let in_range: Vec<&Logged> = log.iter().filter(|logged| logged.is_in_range()).collect();
    let taken = &summary.lanes[0].counts;
    assert_eq!(taken.consumed, log.len() as u64);
    assert_eq!(taken.outside_range, (log.len() - in_range.len()) as u64);
    let new = &ids(in_range.iter().copied()) - &ids(&live);
    assert_eq!((taken.written, taken.duplicate), (new.len() as u64, (in_range.len() - new.len()) as u64));
    job.assert_holds(&(&ids(in_range.iter().copied()) | &ids(&live)));
    let after = job.record();
    assert_eq!(after.live(), record.live());
    assert_eq!(summary.lanes[0].state, LaneState::Done.name());
    assert_eq!((after.batch, after.batch_lane.as_deref()), (record.batch + summary.batches, Some("june")));
    assert!(summary.batches > 5 && after.released);

    // Once more: everything is a repeat.
    let again = job.begin("june-again", &[], None);
    assert_eq!((again.counts.written, again.counts.duplicate), (0, in_range.len() as u64));
}

#[test]
fn a_drain_gives_a_backfill_a_turn_and_live_is_read_first() {
    let job = Small::partitioned("window = \"30 days\"", PARTITIONS);
    job.send_shuffled("a", 900);
    job.run_noting(&[LATEST]).0.unwrap();
    let first = job.begin("june", &[SMALL_BATCHES], Some(1));
    assert_eq!((first.batches, first.lanes[0].state), (1, "active"));
    job.send_to(3, (0..10).map(|n| (format!("new-{n}"), 2_999)));
    let drain = job.run_noting(&[SMALL_BATCHES]).0.unwrap();
    assert_eq!((drain.batches, drain.counts.consumed - drain.counts.outside_range > 10), (2, true));
    let record = job.record();
    assert_eq!(record.cursor("events", 3).unwrap().end.get(), 10);
    assert_eq!(record.batch_lane.as_deref(), Some("june"), "live goes first");
    assert_eq!(job.resume("june", &[]).unwrap().lanes[0].left, 0);
    let expected: Vec<Logged> =
        job.log().into_iter().filter(|logged| logged.is_in_range() || logged.id.starts_with("new")).collect();
    job.assert_holds(&ids(&expected));
}

#[test]
fn a_backfill_that_is_killed_anywhere_goes_on_where_it_was() {
    for point in [
        "backfill_to_register",
        "backfill_registered",
        "rows_decoded:3",
        "data_files_closed:2",
        "state_prepared:2",
        "main_sent:5",
        "main_landed:5",
        "published:2",
    ] {
        let job = Small::partitioned("window = \"30 days\"", PARTITIONS);
        job.send_shuffled("a", 400);
        job.run_noting(&[LATEST]).0.unwrap();
        let range = [
            "--from",
            &tidemill::event_time::EventTimeMs(at(FROM)).to_string(),
            "--to",
            &tidemill::event_time::EventTimeMs(at(TO)).to_string(),
        ]
        .map(str::to_owned);
        let mut arguments = vec!["backfill", "--name", "june", "--scan-all", "--yes", "--set", SMALL_BATCHES];
        arguments.extend(range.iter().map(String::as_str));
        job.kill_at(point, &arguments);
        let live = job.record().live().clone();
        match job.record().lanes.contains_key("june") {
            true => drop(job.resume("june", &[SMALL_BATCHES]).unwrap()),
            false => drop(job.begin("june", &[SMALL_BATCHES], None)),
        }
        let log = job.log();
        job.assert_holds(&ids(log.iter().filter(|logged| logged.is_in_range())));
        let record = job.record();
        let (_, _, lane) = record.backfills().next().unwrap();
        assert_eq!(lane.counts.consumed, log.len() as u64, "{point}");
        assert_eq!(record.live(), &live, "{point}");
    }
}

#[test]
fn a_running_owner_takes_a_request_up_and_the_command_takes_over_when_it_ends() {
    let job = Small::partitioned("window = \"30 days\"", PARTITIONS);
    job.send_shuffled("a", 400);
    job.run_noting(&[LATEST]).0.unwrap();
    job.send_to(3, (0..50).map(|n| (format!("new-{n}"), 2_999)));
    // The owner sleeps in the middle of its first microbatch.
    let owner = job.start(&["run", "--set", SMALL_BATCHES], &[("TIDEMILL_STOP_AT", "state_prepared")]);
    deaths::stopped(&owner);
    let from = tidemill::event_time::EventTimeMs(at(FROM)).to_string();
    let command = job.start(
        &["backfill", "--name", "june", "--scan-all", "--yes", "--from", &from, "--set", SMALL_BATCHES],
        &[],
    );
    job.await_property(PREFIX);
    assert!(!job.record().lanes.contains_key("june"), "who is no owner writes no record");
    deaths::wake(&owner);
    assert!(deaths::ended(owner).success());
    let record = job.record();
    assert_eq!(record.cursor("events", 3).unwrap().end.get(), 50);
    assert!(record.lanes.contains_key("june"), "the owner took the request up");
    assert!(deaths::ended(command).success());
    assert!(!job.table().metadata().properties().keys().any(|name| name.starts_with(PREFIX)));
    let record = job.record();
    assert_eq!(record.backfills().next().unwrap().2.state, LaneState::Done);
    let log = job.log();
    let expected = log.iter().filter(|logged| logged.timestamp_ms >= at(FROM));
    job.assert_holds(&ids(expected));
}

#[test]
fn a_continuous_run_reads_a_backfill_beside_live() {
    let job = Small::partitioned("window = \"30 days\"", PARTITIONS);
    job.send_shuffled("a", 400);
    job.run_noting(&[LATEST]).0.unwrap();
    let interval = "microbatch.max_interval=1 second";
    let owner = job.start(&["run", "--continuous", "--set", SMALL_BATCHES, "--set", interval], &[]);
    job.await_record(|record| !record.released);
    let from = tidemill::event_time::EventTimeMs(at(FROM)).to_string();
    let command = job.start(
        &["backfill", "--name", "june", "--scan-all", "--yes", "--from", &from, "--set", SMALL_BATCHES],
        &[],
    );
    job.await_property(PREFIX);
    // What live commits shows its owner what was asked meanwhile.
    job.send_to(3, (0..50).map(|n| (format!("new-{n}"), 2_999)));
    assert!(deaths::ended(command).success());
    job.send_to(3, [("last".to_owned(), 2_999)]);
    job.await_record(|record| record.cursor("events", 3).unwrap().end.get() == 51);
    let record = job.record();
    assert_eq!(record.backfills().next().unwrap().2.state, LaneState::Done);
    deaths::terminate(&owner);
    deaths::ended(owner);
    assert!(job.record().released);
    job.assert_holds(&ids(job.log().iter().filter(|logged| logged.timestamp_ms >= at(FROM))));
}

#[test]
fn a_backfill_that_is_asked_for_while_live_is_read_ahead_gets_its_turns_and_nothing_is_lost() {
    let job = Small::partitioned("window = \"30 days\"", PARTITIONS);
    job.send_shuffled("old", 400);
    job.run_noting(&[LATEST]).0.unwrap();
    let register = Ask::Backfill(job.resolve("june").new_lane);
    job.send_shuffled("new", 1_500);
    let log = job.log();
    let sets = ["microbatch.max_records=100", "threads=2", continuous::SOON];
    let options = RunOptions::default();
    let profile = Arc::clone(&options.profile);
    let (_, ended) = continuous::follow(&job.load(&sets), options, |running| {
        running.await_consumed(100);
        job.ask(register).unwrap();
        job.await_record(|record| {
            let ends = record.live().topics.values().flatten().map(|(_, cursor)| cursor.end.get());
            let mut backfills = record.backfills();
            ends.sum::<i64>() == log.len() as i64
                && backfills.any(|(_, _, backfill)| backfill.state == LaneState::Done)
        });
    });
    assert_eq!(ended.unwrap_err().reason, Reason::Interrupted);
    assert!(ahead::beside(&profile.report(true), Stage::Fetch) > 0.0, "nothing was read ahead");
    job.assert_holds(&ids(log.iter().filter(|logged| logged.is_in_range() || logged.id.starts_with("new"))));
}

#[test]
fn a_request_that_its_owner_did_not_live_to_answer_is_taken_up_by_the_next() {
    let job = begun("a", 400);
    job.send_to(3, [("new".to_owned(), 2_999)]);
    let owner = job.start(&["run"], &[("TIDEMILL_STOP_AT", "state_prepared")]);
    deaths::stopped(&owner);
    let mut command = job.start(&["lane", "pause"], &[]);
    // `lane pause JOB NAME`: the job stands in the middle.
    command.kill().ok();
    command.wait().unwrap();
    let path = job.folder.path().join("job.toml");
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"))
        .args(["lane", "pause"])
        .arg(&path)
        .arg("june")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    job.await_property(PREFIX);
    command.kill().unwrap();
    command.wait().unwrap();
    let mut owner = owner;
    owner.kill().unwrap();
    owner.wait().unwrap();
    // Nothing but the request and a record of live are left; the next owner sees to both.
    let drain = job.run_noting(&[]).0.unwrap();
    assert_eq!((drain.counts.consumed, drain.lanes[0].state), (1, "paused"));
    assert!(!job.table().metadata().properties().keys().any(|name| name.starts_with(PREFIX)));
    assert_eq!(job.run_noting(&[]).0.unwrap().batches, 0, "a paused backfill gets no turn");
}

#[test]
fn lanes_are_paused_resumed_and_dropped_and_what_they_wrote_stays() {
    let job = Small::partitioned("window = \"30 days\"", PARTITIONS);
    job.send_shuffled("a", 900);
    job.run_noting(&[LATEST]).0.unwrap();
    job.begin("june", &[SMALL_BATCHES], Some(2));
    let lane = || "june".to_owned();
    assert_eq!(job.ask(Ask::PauseLane { lane: lane() }).unwrap(), "backfill june is paused");
    let paused = job.record();
    assert_eq!(job.run_noting(&[]).0.unwrap().batches, 0);
    assert_eq!(job.record(), paused, "a run with nothing to read commits nothing");
    job.ask(Ask::ResumeLane { lane: lane(), letters_ratio_max: None }).unwrap();
    assert_eq!(job.run_noting(&[SMALL_BATCHES]).0.unwrap().batches, 1);
    let rows = job.rows();
    assert_eq!(
        job.ask(Ask::DropLane { lane: lane() }).unwrap(),
        "backfill june is dropped; rows that it wrote stay"
    );
    assert_eq!(
        (job.rows(), job.record().lanes.into_keys().collect::<Vec<_>>()),
        (rows, vec![LIVE_LANE.to_owned()])
    );
    let stop = job.ask(Ask::DropLane { lane: lane() }).unwrap_err();
    assert_eq!((stop.reason, stop.what.as_str()), (Reason::Usage, "there is no backfill june"));
    assert_eq!(job.resume("june", &[]).unwrap_err().reason, Reason::Usage);
}

#[test]
fn the_packed_record_is_enough_to_go_on_with_a_backfill() {
    let job = Small::partitioned("window = \"30 days\"", PARTITIONS);
    job.send_shuffled("a", 900);
    job.run_noting(&[LATEST]).0.unwrap();
    job.begin("june", &[SMALL_BATCHES], Some(2));
    job.runtime.block_on(set_ledger_property(&job.load(&[]), None));
    job.lose_state();
    job.resume("june", &[]).unwrap();
    job.assert_holds(&ids(job.log().iter().filter(|logged| logged.is_in_range())));
}

#[test]
fn a_backfill_whose_topic_left_the_job_is_paused_by_name_and_live_goes_on() {
    let job = begun("a", 900);
    job.broker.create_topics(&["others".to_owned()], 1).unwrap();
    let (result, notes) = job.run_noting(&["source.kafka.topics=[\"others\"]"]);
    assert_eq!(result.unwrap().lanes[0].state, "paused");
    assert!(
        notes.concat().contains("backfill june is paused: the job does not read events any more"),
        "{notes:?}"
    );
    let stop =
        job.read(Wish { lane: "june".into(), register: None }, &["source.kafka.topics=[\"others\"]"], None);
    assert_eq!(stop.unwrap_err().reason, Reason::Usage);
}

/// As after an election that cut a log below the end that a backfill froze: one topic partition never gives its last records.
fn cut_below_its_end(plan: Plan, partition: i32) -> NewLane {
    let mut lane = plan.new_lane;
    let span = lane.spans.get_mut("events").unwrap().get_mut(&partition).unwrap();
    span.end = NextOffset::at(span.end.get() + 20);
    lane
}

/// Gives up on a silent topic partition soon; on a slow machine too soon, so whoever uses it tries again.
fn impatient() -> RunOptions {
    let stall_after = Some(Duration::from_secs(2));
    RunOptions { job_shown: "job.toml".to_owned(), stall_after, ..RunOptions::default() }
}

#[test]
fn a_backfill_that_gives_nothing_commits_what_it_read_and_does_not_keep_live_from_being_read() {
    let job = Small::partitioned("window = \"30 days\"", PARTITIONS);
    job.send_to(0, (0..50).map(|n| (format!("old-{n}"), FROM + n)));
    job.run_noting(&[LATEST]).0.unwrap();
    let mut register = Some(cut_below_its_end(job.resolve("june"), 2));
    let taken = || job.record().backfills().next().map_or(0, |(_, _, lane)| lane.counts.consumed);
    let begun = Instant::now();
    loop {
        let backfill = Some(Wish { lane: "june".into(), register: register.take() });
        let (loaded, options) = (job.load(&[]), RunOptions { backfill, ..impatient() });
        let stop = job.runtime.block_on(backfill::run(&loaded, &options, &mut Unheard)).unwrap_err();
        assert_eq!(stop.reason, Reason::SourceAway, "{stop:?}");
        assert!(stop.what.contains("events[2]"), "{}", stop.what);
        if taken() == 50 {
            break;
        }
        assert!(begun.elapsed() < WAIT_MAX, "{:?}", job.record());
    }
    let record = job.record();
    assert_eq!(record.backfills().next().unwrap().2.state, LaneState::Active);
    assert!(record.released);

    // A drain leaves it to the next one, and says so.
    job.send_to(3, (0..10).map(|n| (format!("new-{n}"), 2_999)));
    let (mut notes, loaded) = (Notes::default(), job.load(&[]));
    while job.runtime.block_on(pipeline::run(&loaded, &impatient(), &mut notes)).is_err() {
        assert!(begun.elapsed() < WAIT_MAX, "{notes:?}", notes = notes.0);
    }
    assert_eq!(job.record().cursor("events", 3).unwrap().end.get(), 10);
    assert!(
        notes.0.concat().contains("backfill june has to wait, the other lanes go on: events[2]"),
        "{:?}",
        notes.0
    );

    // A run without end reads live beside it, again and again.
    let (_, ended) = continuous::follow(&job.load(&[continuous::SOON]), impatient(), |running| {
        for wave in 1..=2 {
            job.send_to(3, (0..10).map(|n| (format!("new-{wave}-{n}"), 2_999)));
            assert_eq!(running.await_consumed(10).written, 10);
        }
    });
    assert_eq!(ended.unwrap_err().reason, Reason::Interrupted);
    assert_eq!(job.record().backfills().next().unwrap().2.state, LaneState::Active);
}

#[test]
fn a_backfill_that_trips_the_brake_is_paused_by_name_and_live_goes_on() {
    let job = Small::half_bad();
    // A batch so small that it says little.
    job.begin("june", &[SMALL_BATCHES], Some(1));
    job.send_to(3, (0..10).map(|n| (format!("new-{n}"), 2_999)));
    let (result, notes) = job.run_noting(&[]);
    let summary = result.unwrap();
    assert_eq!((summary.counts.consumed, summary.lanes[0].state), (10, "paused"));
    let said = notes.concat();
    assert!(
        said.contains("backfill june is paused: 600 of 1200 rows of backfill june are dead letters"),
        "{said}"
    );
    let record = job.record();
    assert!(record.released && record.cursor("events", 3).unwrap().end.get() == 10);
    assert_eq!(job.run_noting(&[]).0.unwrap().batches, 0, "the next run does not try again");

    let stop = job.resume("june", &[]).unwrap_err();
    assert_eq!(stop.reason, Reason::Brake);
    let command = "tidemill backfill job.toml --resume june --set sink.iceberg.dead_letters.max_ratio=1.0";
    assert!(stop.way_out.contains(command), "{}", stop.way_out);
    let done = job.resume("june", &["sink.iceberg.dead_letters.max_ratio=1.0"]).unwrap();
    assert_eq!((done.lanes[0].state, done.lanes[0].counts.written), ("done", 750));
}

#[test]
fn a_backfill_that_tripped_the_brake_of_a_run_without_end_goes_on_by_the_command_that_was_named() {
    let job = Small::half_bad();
    job.begin("june", &[SMALL_BATCHES], Some(1));
    let owner = job.start(&["run", "--continuous", "--set", "microbatch.max_interval=1 second"], &[]);
    let state = |record: &LedgerRecord| record.backfills().next().map(|(_, _, backfill)| backfill.state);
    job.await_record(|record| state(record) == Some(LaneState::Paused));
    let through = "sink.iceberg.dead_letters.max_ratio=1.0";
    let command = job.start(&["backfill", "--resume", "june", "--set", through], &[]);
    job.await_property(PREFIX);
    // What live commits shows its owner what was asked meanwhile.
    job.send_to(3, (0..50).map(|n| (format!("new-{n}"), 2_999)));
    assert!(deaths::ended(command).success());
    deaths::terminate(&owner);
    deaths::ended(owner);
    let record = job.record();
    let backfill = record.backfills().next().unwrap().2;
    assert_eq!((backfill.state, backfill.counts.written), (LaneState::Done, 750));
}

#[test]
fn a_backfill_whose_last_record_does_not_come_is_waited_for_no_longer_than_for_its_next() {
    let job = begun("old", 400);
    job.broker.refuse_fetches(true);
    let (mut notes, loaded) = (Notes::default(), job.load(&[]));
    job.runtime.block_on(pipeline::run(&loaded, &impatient(), &mut notes)).unwrap();
    let said = notes.0.concat();
    let (_, waited) = said.split_once(" gave nothing for ").unwrap_or_else(|| panic!("{said}"));
    let seconds: u64 = waited.split(' ').next().unwrap().parse().unwrap();
    assert!(seconds < STALL_AFTER_DEFAULT.as_secs(), "{said}");
}

/// Thirty days, or as many as `TIDEMILL_BACKFILL_DAYS` says, far beyond a window of seven.
#[test]
fn days_beyond_the_window_are_backfilled_exactly_and_buckets_are_kept_while_they_are_of_use() {
    let days: i64 = std::env::var("TIDEMILL_BACKFILL_DAYS").map_or(12, |days| days.parse().unwrap());
    let per_day: i64 = std::env::var("TIDEMILL_BACKFILL_EVENTS").map_or(60, |events| events.parse().unwrap());
    const DAY: i64 = 24 * 60;
    let job = Small::partitioned("window = \"7 days\"\nrepeats = \"same_time\"", PARTITIONS);
    let event = |day: i64, n: i64| (format!("d{day}-{n}"), day * DAY + n * DAY / per_day);
    let every = |day: i64| (0..per_day).map(move |n| event(day, n));
    // What live never reads: every event twice, within a day once forwards and once backwards.
    let backwards = |day: i64| every(day).collect::<Vec<_>>().into_iter().rev();
    job.send_to(1, (0..days).flat_map(|day| every(day).chain(backwards(day))));
    job.run_noting(&[LATEST]).0.unwrap();
    // A third of it is in the table, and then the watermark moves far beyond all of it.
    job.send_to(0, (0..days).flat_map(every).filter(|(_, minute)| minute % 3 == 0));
    // A day at a time: the open first bucket ends before the first of them.
    let a_day = format!("microbatch.max_records={}", per_day / 3);
    job.run_noting(&[&a_day]).0.unwrap();
    job.send_to(0, [("now".to_owned(), (days + 30) * DAY)]);
    job.run_noting(&[]).0.unwrap();
    let (before, rows) = (job.record(), job.rows().len() as u64);
    assert_eq!(before.dedup.keys, 1, "every bucket of the range has left the state");

    let asked = Asked { lane: "old".into(), from_ms: at(0), to_ms: Some(at(days * DAY)), scan_all: true };
    let plan = job.runtime.block_on(backfill::resolve(&job.load(&[]), &asked)).unwrap();
    // Each bucket is touched by several microbatches, and the lane's watermark passes it when its day is over.
    let sets = [&format!("microbatch.max_records={per_day}"), "event_time.watermark_delay=1 day"];
    let summary = job.read(Wish { lane: "old".into(), register: Some(plan.new_lane) }, &sets, None).unwrap();
    let events = (days * per_day) as u64;
    assert_eq!(summary.counts.written, events + 1 - rows);
    assert_eq!(summary.counts.written + summary.counts.duplicate + 1, summary.counts.consumed);
    let expected = (0..days).flat_map(every).map(|(id, _)| id).chain(["now".into()]).collect();
    job.assert_holds(&expected);
    let after = job.record();
    assert_eq!((after.live(), &after.dedup.complete_since), (before.live(), &before.dedup.complete_since));
    println!(
        "{days} days of {per_day} events each: {} microbatches, {} bucket loads, {} bytes of data files read for them",
        summary.batches, summary.buckets_lent, summary.bytes_lent
    );
    let bucket_ms = before.dedup.bucket_width_ms;
    let buckets = (days * DAY * MINUTE_MS).div_euclid(bucket_ms) as u64 + 2;
    // Two topic partitions come to the same bucket at different times, and only so many loans are kept between.
    assert!(summary.buckets_lent <= 2 * buckets, "{} loads of {buckets} buckets", summary.buckets_lent);
    assert!(summary.bytes_lent > 0 && summary.batches > 2 * days as u64);
}
