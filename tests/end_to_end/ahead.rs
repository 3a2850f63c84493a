//! Reading ahead and writing beside change when things are done, and nothing else; and a profile says where the time went.

use rdkafka::config::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use tidemill::counts::Counts;
use tidemill::generate::Broker;
use tidemill::pipeline::profile::{ProfileReport, Stage};
use tidemill::pipeline::report::{Event, Report, Summary};
use tidemill::pipeline::{self, RunOptions};
use tidemill::stop::{Reason, Stop};

use super::{BEGIN_MS, Small};

/// Events of each wave; the second half repeats the ids of the first.
pub(super) const EVENTS: u64 = 2_400;
/// So large that a microbatch in the least memory has several chunks.
pub(super) const PADDING_BYTES: usize = 20_000;

#[derive(Default)]
struct Commits(Vec<Counts>);

impl Report for Commits {
    fn event(&mut self, event: &Event) {
        if let Event::Commit { counts, .. } = event {
            self.0.push(*counts);
        }
    }
}

pub(super) struct Ran {
    pub(super) ended: Result<Summary, Stop>,
    pub(super) commits: Vec<Counts>,
    pub(super) profile: ProfileReport,
}

/// A job whose topic holds a wave of large events.
pub(super) fn large_events() -> Small {
    large_events_from(BEGIN_MS)
}

/// The broker of the tests keeps a few megabytes only.
pub(super) fn compressing_producer(job: &Small) -> BaseProducer {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", job.broker.bootstrap()).set("compression.type", "zstd");
    config.create().unwrap()
}

/// The same, a millisecond of event time after the other.
fn large_events_from(begin_ms: i64) -> Small {
    let job = Small::new("window = \"1 hour\"");
    let producer = compressing_producer(&job);
    let padding = "x".repeat(PADDING_BYTES);
    for number in 0..EVENTS {
        let (id, ts) = (number % (EVENTS / 2), begin_ms + number as i64);
        let payload = format!(r#"{{"event_id":"{id}","ts":{ts},"padding":"{padding}"}}"#);
        producer.send(BaseRecord::<(), _>::to("events").payload(&payload)).unwrap();
        producer.poll(std::time::Duration::ZERO);
    }
    producer.flush(std::time::Duration::from_secs(60)).unwrap();
    job
}

pub(super) fn run(job: &Small, sets: &[&str], options: RunOptions) -> Ran {
    let options = RunOptions { job_shown: "job.toml".into(), ..options };
    let mut commits = Commits::default();
    let ended = job.runtime.block_on(pipeline::run(&job.load(sets), &options, &mut commits));
    Ran { ended, commits: commits.0, profile: options.profile.report(false) }
}

/// Seconds in which the run itself stood in a stage.
pub(super) fn stage_seconds(profile: &ProfileReport, stage: Stage) -> f64 {
    profile.stages.iter().filter(|time| time.stage == stage).map(|time| time.line.seconds()).sum()
}

/// Seconds in which a stage was worked at beside the run.
pub(super) fn beside(profile: &ProfileReport, stage: Stage) -> f64 {
    profile
        .stages
        .iter()
        .filter(|time| time.stage == stage)
        .filter_map(|time| time.beside)
        .map(|time| time.seconds())
        .sum()
}

/// Bounds of a microbatch, and the records that each microbatch of [`large_events`] takes within them.
pub(super) const CUTS: [(&str, &[u64]); 3] = [
    ("microbatch.max_records=1100", &[1100, 1100, 200]),
    ("microbatch.max_bytes=\"24 MiB\"", &[1256, 1144]),
    ("microbatch.max_records=100000", &[2400]),
];

#[test]
fn microbatches_are_cut_where_they_are_without_reading_ahead() {
    for (cut, consumed) in CUTS {
        let (alone, both) = (large_events(), large_events());
        let alone_ran = run(&alone, &[cut, "threads=1"], RunOptions::default());
        let both_ran = run(&both, &[cut, "threads=2"], RunOptions::default());
        let sizes: Vec<u64> = alone_ran.commits.iter().map(|counts| counts.consumed).collect();
        assert_eq!(sizes, consumed, "{cut}");
        assert_eq!(both_ran.commits, alone_ran.commits, "{cut}");
        assert!(beside(&both_ran.profile, Stage::Decode) > 0.0, "{cut}: nothing was read ahead");
        assert_eq!(beside(&alone_ran.profile, Stage::Fetch), 0.0, "{cut}: one thread reads nothing ahead");
        assert!(beside(&both_ran.profile, Stage::Write) > 0.0, "{cut}: nothing was written beside");
        assert_eq!(beside(&alone_ran.profile, Stage::Write), 0.0, "{cut}: one thread writes nothing beside");
        for (job, ran) in [(&alone, &alone_ran), (&both, &both_ran)] {
            let counts = ran.ended.as_ref().unwrap().counts;
            assert_eq!((counts.written, counts.duplicate), (EVENTS / 2, EVENTS / 2), "{cut}");
            assert_eq!(job.record().cursor("events", 0).unwrap().end.get(), EVENTS as i64);
        }
        let rows = both.runtime.block_on(pipeline::history::count_by(&both.load(&[]), "event_id")).unwrap();
        assert!(rows.len() as u64 == EVENTS / 2 && rows.values().all(|copies| *copies == 1), "{cut}");
    }
}

#[test]
fn what_was_read_ahead_and_not_taken_is_read_by_the_next_run() {
    let job = large_events();
    let sets = ["microbatch.max_records=500", "threads=2"];
    for end in [500, 1000] {
        let ran = run(&job, &sets, RunOptions { batches_max: Some(1), ..RunOptions::default() });
        assert_eq!(ran.ended.unwrap().batches, 1);
        assert_eq!(job.record().cursor("events", 0).unwrap().end.get(), end);
    }
    let ran = run(&job, &sets, RunOptions::default());
    assert_eq!(ran.commits.iter().map(|counts| counts.consumed).collect::<Vec<_>>(), [500, 500, 400]);
    let rows = job.runtime.block_on(pipeline::history::count_by(&job.load(&[]), "event_id")).unwrap();
    assert!(rows.len() as u64 == EVENTS / 2 && rows.values().all(|copies| *copies == 1));
}

#[test]
fn a_batch_that_trips_the_brake_while_the_next_is_read_leaves_nothing() {
    // A thousand years ahead: all of them are dead letters.
    let job = large_events_from(BEGIN_MS + 1_000 * 366 * 24 * 3_600_000);
    let sets = ["microbatch.max_records=1200", "threads=2"];
    let ran = run(&job, &sets, RunOptions::default());
    assert_eq!(ran.ended.unwrap_err().reason, Reason::Brake);
    assert!(ran.commits.is_empty());
    assert_eq!(job.record().cursor("events", 0).unwrap().end.get(), 0);
    let ran =
        run(&job, &[sets[0], sets[1], "sink.iceberg.dead_letters.max_ratio=1.0"], RunOptions::default());
    assert_eq!(ran.ended.unwrap().counts.dead_letter, EVENTS);
}

/// Has the broker refuse one request when the first chunk was taken.
struct Refusing<'a>(Option<&'a Broker>);

impl Report for Refusing<'_> {
    fn event(&mut self, event: &Event) {
        if let Event::Progress { .. } = event
            && let Some(broker) = self.0.take()
        {
            broker.forbid_one_fetch();
        }
    }
}

#[test]
fn a_refusal_that_passes_while_the_next_is_read_ends_the_run_as_it_does_without_reading_ahead() {
    for threads in ["threads=1", "threads=2"] {
        let job = large_events();
        let sets = ["microbatch.max_records=500", threads];
        let options = RunOptions { job_shown: "job.toml".into(), ..RunOptions::default() };
        let mut refusing = Refusing(Some(&job.broker));
        let ended = job.runtime.block_on(pipeline::run(&job.load(&sets), &options, &mut refusing));
        assert_eq!(ended.unwrap_err().reason, Reason::NotAuthorized, "{threads}");
        let ended = run(&job, &sets, RunOptions::default()).ended.unwrap();
        assert_eq!(
            job.record().cursor("events", 0).unwrap().end.get(),
            EVENTS as i64,
            "{threads}: {ended:?}"
        );
        let rows = job.runtime.block_on(pipeline::history::count_by(&job.load(&[]), "event_id")).unwrap();
        assert!(rows.len() as u64 == EVENTS / 2 && rows.values().all(|copies| *copies == 1), "{threads}");
    }
}

#[test]
fn the_stages_of_a_profile_add_up_to_the_run_and_its_json_names_them() {
    let job = large_events();
    let ran = run(&job, &["threads=2"], RunOptions::default());
    ran.ended.unwrap();
    let profile = ran.profile;
    let sum: f64 = profile.stages.iter().map(|time| time.line.seconds()).sum();
    assert!(sum <= profile.seconds && sum > 0.9 * profile.seconds, "{sum} of {}", profile.seconds);
    let seconds = |stage| profile.stages.iter().find(|time| time.stage == stage).unwrap().line.seconds();
    for stage in [Stage::Start, Stage::Probe, Stage::Write, Stage::State, Stage::Commit, Stage::End] {
        assert!(seconds(stage) > 0.0, "{stage:?} took no time");
    }
    assert!(seconds(Stage::Decode) + beside(&profile, Stage::Decode) > 0.0);
    assert!(profile.cpu.seconds() > 0.0 && profile.cpu.threads.contains_key("main"));
    assert!(profile.limit_in_words().starts_with("limited by: "));

    let json = serde_json::to_value(Event::Profile(profile)).unwrap();
    let mut keys: Vec<&str> = json.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    assert_eq!(keys, ["cpu", "event", "limited_by", "machine_busy", "processors", "seconds", "stages"]);
    let stages: Vec<&str> =
        json["stages"].as_array().unwrap().iter().map(|time| time["stage"].as_str().unwrap()).collect();
    assert_eq!(
        stages,
        [
            "start",
            "wait_for_records",
            "fetch",
            "decode",
            "read_ahead",
            "probe",
            "aside",
            "write",
            "state",
            "commit",
            "side_tables",
            "maintenance",
            "end",
            "pause",
            "other"
        ]
    );
    assert!(
        json["stages"][0]["working_seconds"].is_number() && json["stages"][0]["waiting_seconds"].is_number()
    );
    assert!(stages.contains(&json["limited_by"]["cause"]["stage"].as_str().unwrap()));
}
