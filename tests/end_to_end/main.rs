//! The whole pipeline against the in-process broker: no service, every commit real.
//!
//! Exactness against readers of other makes is judged by `tests/acceptance`; here it is the generator's truth.

mod ahead;
#[cfg(feature = "faults")]
mod backfill;
mod continuous;
mod copies;
#[cfg(feature = "faults")]
mod deaths;
mod gather;
mod late;
mod requeue;
mod savepoints;
#[cfg(feature = "faults")]
mod sides;
mod start_table;
mod wait;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{Int32Type, Int64Type};
use futures::TryStreamExt;
use iceberg::transaction::{ApplyTransactionAction, Transaction};
use rdkafka::config::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use tempfile::TempDir;
use tidemill::catalog;
use tidemill::commit::ledger::{self, Found, LedgerRecord};
use tidemill::commit::lock::StateLock;
use tidemill::counts::Counts;
use tidemill::generate::config::bad_of_each_kind;
use tidemill::generate::{Broker, Generator, GeneratorConfig, Sender, Topics, demo_job_toml};
use tidemill::job::file::{self, LoadedJob};
use tidemill::letter::ReasonCode;
use tidemill::pipeline::report::{Event, Report, Summary};
use tidemill::pipeline::{self, OffsetCommand, RunOptions, history, survey};
use tidemill::sink::{scan, schema};
use tidemill::stop::{Reason, Stop};

const PARTITIONS: u32 = 3;
const WAVE_EVENTS: u64 = 8_000;

/// A broker, a stream and a job in a folder of their own.
struct Bench {
    folder: TempDir,
    broker: Broker,
    sender: Sender,
    generator: Generator,
    runtime: tokio::runtime::Runtime,
}

#[derive(Default)]
struct Notes(Vec<String>);

impl Report for Notes {
    fn event(&mut self, event: &Event) {
        if let Event::Notice { text } = event {
            self.0.push(text.clone());
        }
    }
}

impl Bench {
    fn new(seed: u64, bad: BTreeMap<ReasonCode, u64>) -> Self {
        let config = GeneratorConfig {
            seed,
            events: WAVE_EVENTS,
            bad,
            topics: Topics::PerType("n".into()),
            partitions_per_topic: PARTITIONS,
            ..GeneratorConfig::default()
        };
        let broker = Broker::start().unwrap();
        broker.create_topics(&config.topics.names(), PARTITIONS).unwrap();
        let folder = TempDir::new().unwrap();
        let text = demo_job_toml(broker.bootstrap(), folder.path(), &config.topics.names());
        fs::write(folder.path().join("job.toml"), text).unwrap();
        Self {
            sender: Sender::connect(broker.bootstrap(), &BTreeMap::new()).unwrap(),
            generator: Generator::new(&config).unwrap(),
            runtime: tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap(),
            folder,
            broker,
        }
    }

    fn with_some_bad(seed: u64) -> Self {
        Self::new(seed, bad_of_each_kind(5))
    }

    fn send(&mut self, events: u64) {
        self.sender.send(self.generator.wave(events), |_| {}).unwrap();
    }

    fn send_wave(&mut self) {
        self.send(WAVE_EVENTS);
    }

    fn job_path(&self) -> PathBuf {
        self.folder.path().join("job.toml")
    }

    fn load(&self, sets: &[&str]) -> LoadedJob {
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        file::read(&self.job_path(), &sets, &|_| None).unwrap()
    }

    fn run_noting(&self, sets: &[&str], options: RunOptions) -> (Result<Summary, Stop>, Vec<String>) {
        let mut notes = Notes::default();
        let loaded = self.load(sets);
        let options = RunOptions { job_shown: "job.toml".into(), ..options };
        let result = self.runtime.block_on(pipeline::run(&loaded, &options, &mut notes));
        (result, notes.0)
    }

    fn run(&self, sets: &[&str]) -> Summary {
        self.run_noting(sets, RunOptions::default()).0.unwrap()
    }

    fn stop(&self, sets: &[&str]) -> Stop {
        self.run_noting(sets, RunOptions::default()).0.unwrap_err()
    }

    fn state_folder(&self) -> PathBuf {
        survey::state_folder(&self.load(&[]).job)
    }

    fn counts(&self) -> Counts {
        let history = self.runtime.block_on(history::read(&self.load(&[]))).unwrap().unwrap();
        history.counts_since(0)
    }

    fn rows_by(&self, column: &str) -> BTreeMap<String, u64> {
        self.runtime.block_on(history::count_by(&self.load(&[]), column)).unwrap()
    }

    fn table(&self) -> iceberg::table::Table {
        let job = self.load(&[]).job;
        self.runtime.block_on(async {
            let catalog = catalog::connect(&job.sink.catalog).await.unwrap();
            self.table_in(&*catalog).await
        })
    }

    async fn table_in(&self, catalog: &dyn iceberg::Catalog) -> iceberg::table::Table {
        let ident = schema::table_ident(&self.load(&[]).job.sink.table).unwrap();
        catalog::load(catalog, &ident).await.unwrap().unwrap()
    }

    fn record(&self) -> LedgerRecord {
        match ledger::inspect(self.table().metadata()).unwrap() {
            Found::Record(record) => *record,
            other => panic!("no ledger record: {other:?}"),
        }
    }

    fn edit_property(&self, value: Option<String>) {
        self.runtime.block_on(set_ledger_property(&self.load(&[]), value));
    }

    /// Places of all dead letters, sorted: topic id, topic partition, offset, index.
    fn letters(&self) -> Vec<(String, i32, i64, i32)> {
        let job = self.load(&[]).job;
        let columns = ["topic_id", "partition", "offset", "index"].map(str::to_owned);
        let batches: Vec<RecordBatch> = self.runtime.block_on(async {
            let catalog = catalog::connect(&job.sink.catalog).await.unwrap();
            let ident = schema::table_ident(&job.sink.dead_letters.table).unwrap();
            let table = catalog::load(&*catalog, &ident).await.unwrap().unwrap();
            scan::scan_keys(&table, None, &columns, None).await.unwrap().try_collect().await.unwrap()
        });
        let mut places = Vec::new();
        for batch in &batches {
            let topic_ids = batch.column(0).as_string::<i32>();
            let partitions = batch.column(1).as_primitive::<Int32Type>().values();
            let offsets = batch.column(2).as_primitive::<Int64Type>().values();
            let indices = batch.column(3).as_primitive::<Int32Type>().values();
            for row in 0..batch.num_rows() {
                places.push((topic_ids.value(row).to_owned(), partitions[row], offsets[row], indices[row]));
            }
        }
        places.sort();
        places
    }

    /// What the tables hold is what the generator sent.
    fn assert_exact(&self) {
        let (truth, counts) = (self.generator.truth(), self.counts());
        assert_eq!(counts.consumed, truth.records);
        assert_eq!(counts.written, truth.distinct);
        assert_eq!(counts.duplicate, truth.repeats.total());
        assert_eq!(counts.dead_letter, truth.bad_total());
        assert_eq!(self.rows_by("event_type"), truth.distinct_by_type);
        assert_eq!(self.rows_by("event_id").len() as u64, truth.distinct);
        let mut letters = self.letters();
        assert_eq!(letters.len() as u64, truth.bad_total());
        letters.dedup();
        assert_eq!(letters.len() as u64, truth.bad_total(), "a letter stands once");
    }
}

/// Sets the ledger's property of a job's table, or removes it, as another engine's user might.
async fn set_ledger_property(loaded: &LoadedJob, value: Option<String>) {
    let catalog = catalog::connect(&loaded.job.sink.catalog).await.unwrap();
    let ident = schema::table_ident(&loaded.job.sink.table).unwrap();
    let table = catalog::load(&*catalog, &ident).await.unwrap().unwrap();
    let transaction = Transaction::new(&table);
    let update = transaction.update_table_properties();
    let update = match value {
        Some(value) => update.set(ledger::PROPERTY.to_owned(), value),
        None => update.remove(ledger::PROPERTY.to_owned()),
    };
    update.apply(transaction).unwrap().commit(&*catalog).await.unwrap();
}

fn segments_in(folder: &Path) -> Vec<PathBuf> {
    let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| path.extension().is_some_and(|extension| extension == "segment")).collect()
}

#[test]
fn waves_with_repeats_and_bad_records_become_exactly_the_truth() {
    let mut bench = Bench::with_some_bad(1);
    for wave in 1..=3 {
        bench.send_wave();
        assert_eq!(bench.run(&[]).batch, wave);
        bench.assert_exact();
    }
    let record = bench.record();
    assert!(record.released, "the last commit of a drain gives the table back");
    assert!(!record.owes_side_files());
}

#[test]
fn a_run_with_nothing_to_read_commits_nothing() {
    let mut bench = Bench::with_some_bad(2);
    bench.send_wave();
    bench.run(&[]);
    let before = bench.table().metadata_location().unwrap().to_owned();
    let summary = bench.run(&[]);
    assert_eq!((summary.batches, summary.batch), (0, 1));
    assert_eq!(bench.table().metadata_location().unwrap(), before);
}

#[test]
fn a_first_run_on_empty_topics_commits_its_start_offsets() {
    let mut bench = Bench::with_some_bad(17);
    assert_eq!(bench.run(&[]).batches, 0);
    let record = bench.record();
    assert_eq!((record.epoch, record.batch, record.released), (1, 0, true));
    assert_eq!(record.live().topics.values().flatten().count(), 4 * PARTITIONS as usize);
    // What came later is read, also where the job's start has become another one.
    bench.send_wave();
    bench.run(&["source.kafka.start=latest"]);
    bench.assert_exact();
}

#[test]
fn where_batches_are_cut_changes_nothing_but_their_number() {
    let mut bench = Bench::with_some_bad(3);
    bench.send_wave();
    let summary = bench.run(&["microbatch.max_records=1234"]);
    assert!(summary.batches >= 6, "{} batches", summary.batches);
    let last = bench.record();
    let taken = |cursor: &ledger::Cursor| cursor.end.get() - cursor.start.get();
    let taken: i64 = last.live().topics.values().flatten().map(|(_, cursor)| taken(cursor)).sum();
    assert_eq!(taken as u64, last.counts.consumed, "a batch begins where the one before it ended");
    bench.send_wave();
    bench.run(&["microbatch.max_bytes=\"300 KiB\"", "decode.max_record=\"200 KiB\""]);
    bench.send_wave();
    bench.run(&["microbatch.max_records=100000"]);
    bench.assert_exact();
    let record = bench.record();
    let end: i64 = record.live().topics.values().flatten().map(|(_, cursor)| cursor.end.get()).sum();
    assert_eq!(
        end as u64,
        bench.generator.truth().records,
        "next offsets reach the end of every topic partition"
    );
}

#[test]
fn a_lost_state_folder_is_rebuilt_from_the_table_and_no_repeat_slips_in() {
    let mut bench = Bench::with_some_bad(4);
    bench.send_wave();
    bench.run(&[]);
    fs::remove_dir_all(bench.state_folder()).unwrap();
    bench.send_wave();
    // The ledger still names the owner of the run before, which released it: no lock file is needed to go on.
    let (result, notes) = bench.run_noting(&[], RunOptions::default());
    result.unwrap();
    assert!(notes.iter().any(|note| note.contains("rebuilding it from table")), "{notes:?}");
    bench.assert_exact();
}

#[test]
fn a_damaged_segment_is_noticed_and_rebuilt() {
    let mut bench = Bench::with_some_bad(5);
    bench.send_wave();
    bench.run(&[]);
    let segment = segments_in(&bench.state_folder()).pop().unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&segment, bytes).unwrap();
    bench.send_wave();
    let (result, notes) = bench.run_noting(&[], RunOptions::default());
    result.unwrap();
    assert!(notes.iter().any(|note| note.contains("corrupt")), "{notes:?}");
    bench.assert_exact();
}

#[test]
fn the_packed_record_is_enough_to_go_on_when_the_property_is_gone() {
    let mut bench = Bench::with_some_bad(6);
    bench.send_wave();
    bench.run(&[]);
    bench.edit_property(None);
    bench.send_wave();
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn a_property_that_was_edited_by_hand_moves_no_offsets() {
    let mut bench = Bench::with_some_bad(13);
    bench.send_wave();
    bench.run(&[]);
    let mut edited = bench.record();
    for (_, cursor) in edited.lanes.get_mut("live").unwrap().topics.values_mut().flatten() {
        cursor.end = tidemill::offset::NextOffset::at(cursor.end.get() + 100);
    }
    bench.edit_property(Some(edited.to_property()));
    bench.send_wave();
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn a_page_that_rots_in_the_middle_is_set_aside_and_the_next_run_rebuilds() {
    let mut bench = Bench::with_some_bad(14);
    bench.send_wave();
    bench.run(&[]);
    let segment = segments_in(&bench.state_folder()).pop().unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    let middle = bytes.len() * 3 / 4;
    bytes[middle..middle + 64].iter_mut().for_each(|byte| *byte ^= 0x5a);
    fs::write(&segment, bytes).unwrap();
    bench.send_wave();
    let (result, notes) = bench.run_noting(&[], RunOptions::default());
    if let Err(stop) = result {
        assert_eq!(stop.reason, Reason::StorageFailed, "{stop:?}");
        assert!(stop.way_out.contains("rebuilt from the table by the next run"), "{}", stop.way_out);
        let (result, notes) = bench.run_noting(&[], RunOptions::default());
        result.unwrap();
        assert!(notes.iter().any(|note| note.contains("is missing")), "{notes:?}");
    } else {
        assert!(notes.iter().any(|note| note.contains("corrupt")), "{notes:?}");
    }
    bench.assert_exact();
}

#[test]
fn letters_of_topics_that_join_the_job_later_all_stand() {
    let mut bench = Bench::with_some_bad(15);
    bench.send_wave();
    bench.run(&["source.kafka.topics=[\"n.generated\"]"]);
    bench.run(&["source.kafka.topics=[\"n.generated\", \"n.sent\"]"]);
    bench.run(&[]);
    bench.assert_exact();
    assert_eq!(bench.counts().dead_letter_known, 0);
}

#[test]
fn two_jobs_never_share_a_dead_letter_table() {
    let mut bench = Bench::new(16, BTreeMap::new());
    bench.send_wave();
    bench.run(&[]);
    let other_state = format!("state_dir={}", bench.folder.path().join("other").display());
    let stop = bench.stop(&["name=second", "sink.iceberg.table=demo.second", &other_state]);
    assert_eq!(stop.reason, Reason::OtherJob);
    assert!(stop.what.contains("demo.notifications_dead_letters"), "{}", stop.what);
}

#[test]
fn too_many_bad_records_trip_the_brake_and_its_own_command_lets_them_through() {
    let mut bench = Bench::new(7, BTreeMap::from([(ReasonCode::WrongType, 900), (ReasonCode::NullKey, 600)]));
    bench.send_wave();
    let stop = bench.stop(&[]);
    assert_eq!(stop.reason, Reason::Brake);
    assert!(
        stop.what.contains("900 x wrong_type, first at n.") && stop.what.contains("600 x null_key"),
        "{}",
        stop.what
    );
    assert_eq!(bench.record().batch, 0, "nothing of the batch was committed");
    assert!(stop.way_out.contains("--set sink.iceberg.dead_letters.max_ratio=1.0"));
    bench.run(&["sink.iceberg.dead_letters.max_ratio=1.0"]);
    bench.assert_exact();
}

#[test]
fn a_new_optional_column_is_added_to_the_table_and_a_changed_one_is_refused() {
    let mut bench = Bench::with_some_bad(8);
    bench.send_wave();
    bench.run(&[]);
    bench.send_wave();
    bench.run(&["decode.columns.attribute_app={ type = \"string\", path = \"$.attributes.app\" }"]);
    let schema = bench.table().metadata().current_schema().clone();
    assert!(schema.field_by_name("attribute_app").is_some_and(|field| !field.required));
    let stop = bench.stop(&["decode.columns.user_id={ type = \"string\" }"]);
    assert_eq!(stop.reason, Reason::SchemaDiffers);
    assert!(stop.what.contains("user_id"), "{}", stop.what);
}

#[test]
fn a_start_beside_a_live_owner_is_busy_and_commits_nothing() {
    let mut bench = Bench::with_some_bad(9);
    bench.send_wave();
    let lock = StateLock::acquire(&bench.state_folder()).unwrap();
    assert_eq!(bench.stop(&[]).reason, Reason::Busy);
    drop(lock);
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn an_interrupted_run_gives_the_table_back_and_loses_nothing() {
    let mut bench = Bench::with_some_bad(10);
    bench.send_wave();
    let interrupt = Arc::new(AtomicBool::new(true));
    let (result, _) = bench.run_noting(&[], RunOptions { interrupt, ..RunOptions::default() });
    assert_eq!(result.unwrap_err().reason, Reason::Interrupted);
    let record = bench.record();
    assert!(record.released && record.batch == 0);
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn topics_made_again_stop_the_run_and_a_rebase_drops_every_repeat() {
    let mut bench = Bench::with_some_bad(11);
    bench.send_wave();
    bench.run(&[]);
    let rows = bench.rows_by("event_type");
    // Another cluster with topics of the same names, shorter than what was read, and the same events.
    let mut again = Bench::with_some_bad(11);
    again.send(WAVE_EVENTS / 4);
    let bootstrap = format!("source.kafka.properties.\"bootstrap.servers\"={}", again.broker.bootstrap());
    let stop = bench.stop(&[&bootstrap]);
    assert!(matches!(stop.reason, Reason::ClusterChanged | Reason::TopicChanged), "{stop:?}");
    assert!(stop.way_out.contains("tidemill rebase-offsets job.toml"));
    let loaded = bench.load(&[&bootstrap]);
    let options = RunOptions::default();
    let moving = pipeline::move_offsets(&loaded, &options, OffsetCommand::Rebase, &|_| Ok(()));
    let jumps = bench.runtime.block_on(moving).unwrap().jumps;
    assert_eq!(jumps.len(), 4 * PARTITIONS as usize);
    let counts = bench.run(&[&bootstrap]).counts;
    assert_eq!((counts.written, counts.duplicate), (0, WAVE_EVENTS / 4));
    assert_eq!(bench.rows_by("event_type"), rows);
    assert_eq!(counts.dead_letter, again.generator.truth().bad_total(), "new places are new letters");
}

#[test]
fn another_job_on_the_table_and_another_key_are_refused_by_name() {
    let mut bench = Bench::with_some_bad(12);
    bench.send_wave();
    bench.run(&[]);
    let other_state = format!("state_dir={}", bench.folder.path().join("other").display());
    let stop = bench.stop(&["name=second", &other_state]);
    assert_eq!(stop.reason, Reason::OtherJob);
    let stop = bench.stop(&["dedup.key=[\"event_id\", \"event_type\"]"]);
    assert_eq!(stop.reason, Reason::KeySpecChanged);
    let stop = bench.stop(&["memory=\"64 MiB\""]);
    assert_eq!(stop.reason, Reason::Usage);
    bench.run(&[]);
    bench.assert_exact();
}

/// Event time zero of the jobs below: a whole hour, long ago.
const BEGIN_MS: i64 = 1_699_999_200_000;
const MINUTE_MS: i64 = 60_000;

/// A topic of one partition whose events a test writes one by one, under a window of an hour.
struct Small {
    folder: TempDir,
    broker: Broker,
    producer: BaseProducer,
    runtime: tokio::runtime::Runtime,
    dedup: &'static str,
}

impl Small {
    fn new(dedup: &'static str) -> Self {
        Self::partitioned(dedup, 1)
    }

    fn partitioned(dedup: &'static str, partitions: u32) -> Self {
        let broker = Broker::start().unwrap();
        broker.create_topics(&["events".to_owned()], partitions).unwrap();
        let producer = ClientConfig::new()
            .set("bootstrap.servers", broker.bootstrap())
            .create::<BaseProducer>()
            .unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        let folder = TempDir::new().unwrap();
        let small = Self { folder, broker, producer, runtime, dedup };
        let below = |name: &str| small.folder.path().join(name).display().to_string();
        let text = format!(
            r#"version = 1
name = "small"
memory = "256 MiB"
state_dir = {state:?}
[source.kafka]
topics = ["events"]
[source.kafka.properties]
"bootstrap.servers" = {bootstrap:?}
[decode.columns]
event_id = {{ type = "string", required = true }}
event_time = {{ type = "timestamptz", path = "$.ts", unit = "ms", required = true }}
[event_time]
column = "event_time"
watermark_delay = "0s"
[dedup]
key = ["event_id"]
{dedup}
[sink.iceberg]
table = "demo.small"
partition_by = ["hour(event_time)"]
catalog = {{ type = "sql", uri = {catalog:?}, warehouse = {warehouse:?} }}
"#,
            state = below("state"),
            bootstrap = small.broker.bootstrap(),
            dedup = small.dedup,
            catalog = format!("sqlite:{}", below("catalog.db")),
            warehouse = below("warehouse"),
        );
        fs::write(small.folder.path().join("job.toml"), text).unwrap();
        small
    }

    fn load(&self, sets: &[&str]) -> LoadedJob {
        let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
        file::read(&self.folder.path().join("job.toml"), &sets, &|_| None).unwrap()
    }

    /// Sends events (id, minutes after the begin).
    fn send(&self, events: &[(&str, i64)]) {
        for (id, minute) in events {
            let payload = format!(r#"{{"event_id":"{id}","ts":{}}}"#, BEGIN_MS + minute * MINUTE_MS);
            self.producer.send(BaseRecord::<(), _>::to("events").payload(&payload)).unwrap();
        }
        self.producer.flush(std::time::Duration::from_secs(30)).unwrap();
    }

    fn run_noting(&self, sets: &[&str]) -> (Result<Summary, Stop>, Vec<String>) {
        let mut notes = Notes::default();
        let options = RunOptions { job_shown: "job.toml".into(), ..RunOptions::default() };
        let loaded = self.load(sets);
        let result = self.runtime.block_on(pipeline::run(&loaded, &options, &mut notes));
        (result, notes.0)
    }

    /// Sends, runs, and gives how many were written and how many were repeats.
    fn take(&self, events: &[(&str, i64)], sets: &[&str]) -> (u64, u64, Summary) {
        self.send(events);
        let summary = self.run_noting(sets).0.unwrap();
        (summary.counts.written, summary.counts.duplicate, summary)
    }

    fn copies(&self, id: &str) -> u64 {
        let rows = self.runtime.block_on(history::count_by(&self.load(&[]), "event_id")).unwrap();
        rows.get(id).copied().unwrap_or(0)
    }

    fn record(&self) -> LedgerRecord {
        let job = self.load(&[]).job;
        let table = self.runtime.block_on(async {
            let catalog = catalog::connect(&job.sink.catalog).await.unwrap();
            let ident = schema::table_ident(&job.sink.table).unwrap();
            catalog::load(&*catalog, &ident).await.unwrap().unwrap()
        });
        match ledger::inspect(table.metadata()).unwrap() {
            Found::Record(record) => *record,
            other => panic!("no ledger record: {other:?}"),
        }
    }

    fn lose_state(&self) {
        fs::remove_dir_all(survey::state_folder(&self.load(&[]).job)).unwrap();
    }
}

fn minute(minutes: i64) -> Option<String> {
    Some(tidemill::event_time::EventTimeMs(BEGIN_MS + minutes * MINUTE_MS).to_string())
}

#[test]
fn old_buckets_expire_and_events_beyond_the_window_are_looked_up_in_the_table() {
    let job = Small::new("window = \"1 hour\"");
    let (written, duplicate, first) = job.take(&[("a", 0), ("b", 5), ("c", 15), ("a", 0)], &[]);
    assert_eq!((written, duplicate, first.complete_since), (3, 1, None));
    // The watermark is now at minute 180, so the window reaches back to minute 120.
    let (_, _, second) = job.take(&[("d", 180)], &[]);
    assert_eq!((second.state_keys, second.complete_since, second.watermark), (1, minute(20), minute(180)));
    assert_eq!(job.record().buckets.len(), 1, "the ledger counts live buckets only");

    // a stands in the table, e does not; c comes with another event time, and its first copy lies in another bucket, which
    // has expired and is not asked for.
    let (written, duplicate, third) = job.take(&[("a", 0), ("e", 1), ("e", 1), ("c", 181)], &[]);
    assert_eq!((written, duplicate, third.buckets_lent), (2, 2, 1));
    assert_eq!((job.copies("a"), job.copies("e"), job.copies("c")), (1, 1, 2));
    assert_eq!(third.state_keys, 2, "a bucket that was read from the table is not kept");
    let (written, duplicate, fourth) = job.take(&[("e", 1), ("c", 15), ("f", 182)], &[]);
    assert_eq!((written, duplicate, fourth.buckets_lent), (1, 2, 2));
}

#[test]
fn repeats_alone_move_the_offsets_and_claim_no_rows() {
    let job = Small::new("window = \"1 hour\"");
    job.take(&[("a", 0)], &[]);
    let (written, duplicate, summary) = job.take(&[("a", 0), ("a", 0)], &[]);
    assert_eq!((written, duplicate, summary.batches), (0, 2, 1));
    let record = job.record();
    assert_eq!((record.batch, record.last_batch_with_rows), (2, 1));
    assert_eq!(record.cursor("events", 0).unwrap().end.get(), 3);
    let (_, _, idle) = job.take(&[], &[]);
    assert_eq!((idle.batches, job.record()), (0, record));
}

#[test]
fn of_two_copies_in_one_probe_batch_the_one_at_the_lowest_place_is_written() {
    let job = Small::new("window = \"1 hour\"");
    let topics = ["first".to_owned(), "second".to_owned()];
    job.broker.create_topics(&topics, 1).unwrap();
    // More than a few responses of the broker, and in opposite orders: the last of one topic arrive after the first of the other.
    let keys = 8_000;
    let mut config = ClientConfig::new();
    // A record batch comes whole, however large.
    config.set("bootstrap.servers", job.broker.bootstrap()).set("batch.num.messages", "200");
    let producer: BaseProducer = config.create().unwrap();
    for number in 0..keys {
        for (topic, key) in [("first", number), ("second", keys - 1 - number)] {
            let payload = format!(r#"{{"event_id":"{key}","ts":{BEGIN_MS}}}"#);
            producer.send(BaseRecord::<(), _>::to(topic).payload(&payload)).unwrap();
        }
    }
    producer.flush(std::time::Duration::from_secs(30)).unwrap();
    let both = "source.kafka.topics=[\"first\", \"second\"]";
    let summary = job.run_noting(&[both]).0.unwrap();
    assert_eq!((summary.batches, summary.counts.written, summary.counts.duplicate), (1, keys, keys));
    let rows = job.runtime.block_on(history::count_by(&job.load(&[]), "_kafka_topic")).unwrap();
    assert_eq!(rows, BTreeMap::from([("first".to_owned(), keys)]));
}

#[test]
fn a_bucket_in_its_grace_is_asked_on_disk_and_not_in_the_table() {
    let job = Small::new("window = \"1 hour\"");
    job.take(&[("a", 5)], &[]);
    // The end of the first bucket, minute 10, has just left the window.
    let (_, _, expired) = job.take(&[("b", 72)], &[]);
    assert_eq!(expired.complete_since, minute(10));
    let (written, duplicate, later) = job.take(&[("a", 5), ("c", 6), ("c", 6)], &[]);
    assert_eq!((written, duplicate, later.buckets_lent), (1, 2, 0));
}

#[test]
fn a_state_that_is_lost_after_buckets_expired_is_rebuilt_with_the_live_ones() {
    let job = Small::new("window = \"1 hour\"\nrepeats = \"same_time\"");
    job.take(&[("a", 0), ("b", 5), ("c", 15)], &[]);
    job.take(&[("d", 180), ("e", 175)], &[]);
    let before = job.record();
    job.lose_state();
    job.send(&[("d", 180), ("e", 175), ("a", 0), ("g", 181)]);
    // A rebuild that made other buckets than the ledger counts would stop with MISSING_KEYS.
    let (result, notes) = job.run_noting(&[]);
    let summary = result.unwrap();
    assert_eq!((summary.counts.written, summary.counts.duplicate), (1, 3));
    assert!(
        notes.iter().any(|note| note.contains("rebuilt the dedup state: 2 keys from 2 rows")),
        "{notes:?}"
    );
    assert_eq!(job.record().dedup.complete_since, before.dedup.complete_since);
    assert_eq!(summary.state_keys, 3);
}

#[test]
fn a_widened_window_reads_its_keys_first_and_a_narrowed_one_forgets_them() {
    let job = Small::new("window = \"1 hour\"");
    job.take(&[("a", 0), ("b", 5), ("c", 95)], &[]);
    job.take(&[("d", 180)], &[]);
    assert_eq!(job.record().dedup.complete_since.map(|time| time.to_string()), minute(100));
    let wide = ["dedup.window=\"6 hours\""];
    // With any_time a repeat is found whatever event time it carries, as soon as its first copy is back in the window.
    job.send(&[("a", 181), ("b", 181), ("c", 182), ("d", 182), ("e", 183)]);
    let (result, notes) = job.run_noting(&wide);
    let summary = result.unwrap();
    assert_eq!((summary.counts.written, summary.counts.duplicate, summary.buckets_lent), (1, 4, 0));
    assert!(notes.iter().any(|note| note.contains("the window was widened")), "{notes:?}");
    assert!(notes.iter().any(|note| note.contains("3 keys from 3 rows")), "{notes:?}");
    assert_eq!(summary.state_keys, 5);
    assert!(!job.record().dedup.eras.is_empty(), "earlier buckets keep their width");

    job.lose_state();
    let (written, duplicate, _) = job.take(&[("a", 240), ("f", 260)], &wide);
    assert_eq!((written, duplicate), (1, 1), "the buckets of both widths were rebuilt");

    let (_, _, narrow) = job.take(&[("g", 261)], &[]);
    assert_eq!(narrow.complete_since, minute(190));
    let (written, duplicate, last) = job.take(&[("a", 0), ("e", 183), ("g", 261)], &[]);
    assert_eq!((written, duplicate, last.buckets_lent > 0), (0, 3, true));
}

fn uuid7(minute: i64, rest: u64) -> String {
    let ms = (BEGIN_MS + minute * MINUTE_MS) as u128;
    let id = ms << 80 | 0x7 << 76 | 0b10 << 62 | u128::from(rest);
    uuid::Uuid::from_u128(id).to_string()
}

#[test]
fn ids_that_tell_their_time_find_a_repeat_whatever_event_time_it_carries() {
    let job = Small::new("window = \"1 hour\"\nrepeats = \"same_time\"\nbucket_from = \"uuid7\"");
    let (old, late, new) = (uuid7(0, 1), uuid7(1, 2), uuid7(180, 3));
    let (written, duplicate, _) = job.take(&[(&old, 0), (&old, 30)], &[]);
    assert_eq!((written, duplicate), (1, 1), "the repeat lies in the bucket of its id");
    job.take(&[(&new, 180)], &[]);
    let (written, duplicate, summary) = job.take(&[(&old, 181), (&late, 181), (&new, 182)], &[]);
    assert_eq!((written, duplicate, summary.buckets_lent), (1, 2, 1));

    // No id of that kind, and one whose clock runs ahead: neither reaches the state.
    let ahead = uuid7(100 * 365 * 24 * 60, 4);
    let (written, _, summary) = job.take(&[("no-id", 183), (&ahead, 183), (&new, 184)], &[]);
    assert_eq!((written, summary.counts.dead_letter), (0, 2));
    assert_eq!(summary.watermark, minute(184));

    job.lose_state();
    let (written, duplicate, _) = job.take(&[(&old, 185), (&late, 185), (&new, 186)], &[]);
    assert_eq!((written, duplicate), (0, 3), "a rebuild takes the buckets from the ids too");
    let other = job.run_noting(&["dedup.bucket_from=event_time"]).0.unwrap_err();
    assert_eq!(other.reason, Reason::KeySpecChanged);
}
