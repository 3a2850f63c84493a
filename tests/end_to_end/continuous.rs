//! Runs without end: records that come over time, rest, signals, brokers that go away, owners that take over.

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender as EventSender, channel};
use std::thread;
use std::time::Duration;

use tidemill::commit::ledger::Kind;

use super::*;
use crate::wait;

/// Longest wait for an event that must come.
const EVENT_TIME_MAX: Duration = Duration::from_secs(120);

struct Told(EventSender<Event>);

impl Report for Told {
    fn event(&mut self, event: &Event) {
        // Whoever listened may have heard enough.
        let _ = self.0.send(event.clone());
    }
}

/// A continuous run in a thread of its own, as one who stands beside it sees it. Asked to end when it is dropped.
pub(super) struct Running {
    events: Receiver<Event>,
    interrupt: Arc<AtomicBool>,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.interrupt.store(true, Ordering::Relaxed);
    }
}

impl Running {
    /// Waits for an event that passes; gives what it is about.
    fn await_event<T>(&self, what: &str, passes: impl Fn(&Event) -> Option<T>) -> T {
        let mut seen = Vec::new();
        loop {
            let event = self.events.recv_timeout(EVENT_TIME_MAX);
            let event = event.unwrap_or_else(|error| panic!("no {what} ({error}) after {seen:#?}"));
            if let Some(found) = passes(&event) {
                return found;
            }
            seen.push(event);
        }
    }

    /// Waits for commits until so many rows were taken; gives their outcomes.
    pub(super) fn await_consumed(&self, consumed: u64) -> Counts {
        let mut counts = Counts::default();
        while counts.consumed < consumed {
            counts.add(&self.await_event("commit", |event| match event {
                Event::Commit { counts, .. } => Some(*counts),
                _ => None,
            }));
        }
        counts
    }

    fn await_progress(&self, rows: u64) {
        self.await_event("probe batch", |event| {
            matches!(event, Event::Progress { consumed, .. } if *consumed >= rows).then_some(())
        });
    }
}

/// Follows a job's topics while the story is told, asks the run to end, and gives how it ended.
pub(super) fn follow<T>(
    loaded: &LoadedJob,
    options: RunOptions,
    story: impl FnOnce(&Running) -> T,
) -> (T, Result<Summary, Stop>) {
    let (sender, events) = channel();
    let running = Running { events, interrupt: Arc::clone(&options.interrupt) };
    let options = RunOptions { job_shown: "job.toml".into(), continuous: true, ..options };
    thread::scope(|scope| {
        let run = scope.spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            runtime.block_on(pipeline::run(loaded, &options, &mut Told(sender)))
        });
        let told = story(&running);
        drop(running);
        (told, run.join().unwrap())
    })
}

/// Closes batches soon after their first record.
pub(super) const SOON: &str = "microbatch.max_interval=\"200ms\"";

fn heartbeats_of(millis: u64) -> RunOptions {
    RunOptions { lease: Some(Duration::from_millis(3 * millis)), ..RunOptions::default() }
}

#[test]
fn records_that_come_over_time_are_committed_as_they_come_and_a_signal_gives_the_table_back() {
    let mut bench = Bench::with_some_bad(40);
    let loaded = bench.load(&[SOON]);
    let (_, ended) = follow(&loaded, RunOptions::default(), |running| {
        for _ in 0..3 {
            bench.send_wave();
            running.await_consumed(WAVE_EVENTS);
        }
    });
    assert_eq!(ended.unwrap_err().reason, Reason::Interrupted);
    assert!(bench.record().released);
    bench.assert_exact();
    assert_eq!(bench.run(&[]).batches, 0, "nothing was left");
}

#[test]
fn a_batch_closes_at_its_records_long_before_its_time() {
    let mut bench = Bench::with_some_bad(41);
    let loaded = bench.load(&["microbatch.max_interval=\"1 hour\"", "microbatch.max_records=1000"]);
    let (_, ended) = follow(&loaded, RunOptions::default(), |running| {
        bench.send_wave();
        running.await_consumed(WAVE_EVENTS - WAVE_EVENTS % 1000);
    });
    assert_eq!(ended.unwrap_err().reason, Reason::Interrupted);
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn what_was_read_before_records_that_are_gone_is_committed_and_the_stop_names_these_alone() {
    let job = Small::new("window = \"1 hour\"");
    let (taken, ended) = follow(&job.load(&[SOON]), RunOptions::default(), |running| {
        job.send(&[("a", 0), ("b", 1)]);
        running.await_consumed(2);
        // Repeats alone keep a batch open.
        job.send(&[("a", 0), ("b", 1)]);
        running.await_progress(4);
        // More than the log of a topic partition holds, while nothing is given.
        job.broker.refuse_fetches(true);
        let padding = "x".repeat(100_000);
        for number in 0..80 {
            let payload = format!(r#"{{"event_id":"gone-{number}","ts":{BEGIN_MS},"padding":"{padding}"}}"#);
            job.producer.send(BaseRecord::<(), _>::to("events").payload(&payload)).unwrap();
            job.producer.flush(Duration::from_secs(30)).unwrap();
        }
        job.broker.refuse_fetches(false);
        2 + running.await_consumed(2).consumed
    });
    let (stop, record) = (ended.unwrap_err(), job.record());
    assert_eq!(stop.reason, Reason::OffsetsLost, "{stop:?}");
    assert!(record.released && record.cursor("events", 0).unwrap().end.get() == taken as i64);
    let lost = format!("events[0] [{taken}, ");
    assert!(stop.what.contains(&lost), "{}", stop.what);
    let again = job.run_noting(&[]).0.unwrap_err();
    assert!(again.reason == Reason::OffsetsLost && again.what.contains(&lost), "{again:?}");
}

#[test]
fn repeats_alone_keep_a_batch_open_and_it_is_committed_when_the_run_is_asked_to_end() {
    let job = Small::new("window = \"1 hour\"");
    let (_, ended) = follow(&job.load(&[SOON]), RunOptions::default(), |running| {
        job.send(&[("a", 0), ("b", 1)]);
        assert_eq!(running.await_consumed(2).written, 2);
        job.send(&[("a", 0), ("b", 1), ("a", 0)]);
        running.await_progress(5);
        assert_eq!(job.record().batch, 1, "a batch without rows is not committed at its time");
    });
    assert_eq!(ended.unwrap_err().reason, Reason::Interrupted);
    let record = job.record();
    assert_eq!((record.batch, record.counts.duplicate, record.last_batch_with_rows), (2, 3, 1));
    assert_eq!(record.cursor("events", 0).unwrap().end.get(), 5);
}

#[test]
fn repeats_alone_are_committed_in_the_place_of_a_heartbeat() {
    let job = Small::new("window = \"1 hour\"");
    let (_, ended) = follow(&job.load(&[SOON]), heartbeats_of(2_000), |running| {
        job.send(&[("a", 0), ("a", 0)]);
        running.await_consumed(2);
        job.send(&[("a", 0)]);
        let counts = running.await_consumed(1);
        assert_eq!((counts.written, counts.duplicate), (0, 1));
    });
    ended.unwrap_err();
}

#[test]
fn a_topic_at_rest_renews_the_lease_and_nothing_else() {
    let job = Small::new("window = \"1 hour\"");
    let (before, ended) = follow(&job.load(&[SOON]), heartbeats_of(1_000), |running| {
        job.send(&[("a", 0)]);
        running.await_consumed(1);
        let before = job.record();
        // The table itself shows when the second heartbeat has come.
        wait::until(|| job.record().sequence >= before.sequence + 2, || format!("{:?}", job.record()));
        let now = job.record();
        assert_eq!((now.kind, now.batch, now.epoch), (Kind::Renewal, before.batch, before.epoch));
        assert!(now.lease_until_ms > before.lease_until_ms && !now.released);
        assert_eq!(now.live(), before.live());
        before
    });
    assert_eq!(ended.unwrap_err().reason, Reason::Interrupted);
    let record = job.record();
    assert_eq!((record.kind, record.released, record.batch), (Kind::Release, true, before.batch));
}

#[test]
fn a_broker_that_goes_away_is_said_once_and_the_run_goes_on_when_it_is_back() {
    let job = Small::new("window = \"1 hour\"");
    let sets = [
        SOON,
        "source.kafka.properties.\"topic.metadata.refresh.interval.ms\"=\"200\"",
        "source.kafka.properties.\"socket.connection.setup.timeout.ms\"=\"1000\"",
        "source.kafka.properties.\"reconnect.backoff.max.ms\"=\"500\"",
    ];
    let (_, ended) = follow(&job.load(&sets), heartbeats_of(3_000), |running| {
        job.send(&[("a", 0)]);
        running.await_consumed(1);
        job.broker.set_away(true).unwrap();
        let reason = running.await_event("outage", |event| match event {
            Event::Away { reason, .. } => Some(*reason),
            _ => None,
        });
        assert_eq!(reason, "SOURCE_AWAY");
        let epoch = job.record().epoch;
        let sequence = job.record().sequence;
        // Until a heartbeat: the owner keeps its table while the broker is away.
        wait::until(|| job.record().sequence != sequence, || format!("{:?}", job.record()));
        job.broker.set_away(false).unwrap();
        let again = running.await_event("return", |event| match event {
            Event::Away { .. } => Some(true),
            Event::Back { .. } => Some(false),
            _ => None,
        });
        assert!(!again, "an outage is said once");
        job.send(&[("a", 0), ("b", 1)]);
        let counts = running.await_consumed(2);
        assert_eq!((counts.written, counts.duplicate), (1, 1));
        assert_eq!(job.record().epoch, epoch, "the life went on");
    });
    assert_eq!(ended.unwrap_err().reason, Reason::Interrupted);
}

#[test]
fn an_owner_at_rest_that_was_taken_over_is_fenced_at_its_next_heartbeat() {
    let job = Small::new("window = \"1 hour\"");
    let (_, ended) = follow(&job.load(&[SOON]), heartbeats_of(1_000), |running| {
        job.send(&[("a", 0)]);
        running.await_consumed(1);
        let elsewhere = format!("state_dir={}", job.folder.path().join("elsewhere").display());
        let options = RunOptions { takeover: true, job_shown: "job.toml".into(), ..RunOptions::default() };
        job.send(&[("b", 1)]);
        // A start that meets a commit of the first owner between its look and its fence tries again.
        let loaded = job.load(&[&elsewhere]);
        let take_over = || job.runtime.block_on(pipeline::run(&loaded, &options, &mut Notes::default()));
        while let Err(stop) = take_over() {
            assert!((10..20).contains(&stop.reason.exit_code()), "{stop:?}");
        }
        while running.events.recv_timeout(EVENT_TIME_MAX).is_ok() {}
    });
    assert_eq!(ended.unwrap_err().reason, Reason::Fenced);
    job.run_noting(&[]).0.unwrap();
    assert_eq!((job.copies("a"), job.copies("b")), (1, 1));
}

#[test]
fn a_topic_made_again_under_a_run_stops_it_as_the_start_table_says() {
    let job = Small::new("window = \"1 hour\"");
    let again = Small::new("window = \"1 hour\"");
    let sets = [SOON, "source.kafka.properties.\"topic.metadata.refresh.interval.ms\"=\"200\""];
    let (_, ended) = follow(&job.load(&sets), RunOptions::default(), |running| {
        job.send(&[("a", 0)]);
        running.await_consumed(1);
    });
    ended.unwrap_err();
    let bootstrap = format!("source.kafka.properties.\"bootstrap.servers\"={}", again.broker.bootstrap());
    let (_, ended) = follow(&job.load(&[SOON, &bootstrap]), RunOptions::default(), |running| {
        while running.events.recv_timeout(EVENT_TIME_MAX).is_ok() {}
    });
    let stop = ended.unwrap_err();
    assert!(matches!(stop.reason, Reason::ClusterChanged | Reason::TopicChanged), "{stop:?}");
}

#[test]
fn a_run_with_a_time_or_a_number_of_batches_ends_well_and_leaves_the_rest_to_the_next() {
    let mut bench = Bench::with_some_bad(42);
    bench.send_wave();
    let few = RunOptions { batches_max: Some(2), ..RunOptions::default() };
    let (summary, _) = bench.run_noting(&["microbatch.max_records=1000"], few);
    assert_eq!(summary.unwrap().batches, 2);
    assert!(bench.record().released);

    let few = RunOptions { batches_max: Some(3), ..RunOptions::default() };
    let (_, ended) = follow(&bench.load(&["microbatch.max_records=1000"]), few, |running| {
        while running.events.recv_timeout(EVENT_TIME_MAX).is_ok() {}
    });
    assert_eq!(ended.unwrap().batches, 3);

    let over = RunOptions { end_by: Some(std::time::Instant::now()), ..RunOptions::default() };
    let (summary, _) = bench.run_noting(&[], over);
    assert_eq!(summary.unwrap().batches, 0, "its time was over before it read");
    assert!(bench.record().released);

    let soon = RunOptions {
        end_by: Some(std::time::Instant::now() + Duration::from_secs(3)),
        ..RunOptions::default()
    };
    let (_, ended) =
        follow(
            &bench.load(&[SOON]),
            soon,
            |running| {
                while running.events.recv_timeout(EVENT_TIME_MAX).is_ok() {}
            },
        );
    ended.unwrap();
    bench.run(&[]);
    bench.assert_exact();
}
