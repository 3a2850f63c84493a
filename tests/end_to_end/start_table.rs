//! Rows of the start table and the commands that resolve them: each stop names a command, the command is run, and the next run
//! goes on without a repeat and without a loss. Rows that need another engine's hands stand in `tests/acceptance`.

use std::time::Instant;

use arrow::array::{
    ArrayRef, Int32Array, Int64Array, StringArray, TimestampMicrosecondArray, new_null_array,
};
use arrow::datatypes::{DataType, Field};
use iceberg::arrow::schema_to_arrow_schema;
use iceberg::spec::DataFile;
use iceberg::{Catalog, TableCreation, TableIdent};
use tidemill::commit::ledger::Kind;
use tidemill::dedup;
use tidemill::pipeline::commands::{self, Adopting, Done};
use tidemill::pipeline::report::Unheard;
use tidemill::sink::writer::TableWriter;

use super::*;

/// Where [`Small::without_ledger`] stands.
const MOVED: [&str; 1] = ["sink.iceberg.table=demo.copy"];

pub(super) fn yes(_question: &str) -> Result<(), Stop> {
    Ok(())
}

pub(super) fn options() -> RunOptions {
    RunOptions { job_shown: "job.toml".into(), ..RunOptions::default() }
}

impl Small {
    fn stop_of(&self, sets: &[&str]) -> Stop {
        self.run_noting(sets).0.unwrap_err()
    }

    /// Runs the command that a stop names; `name` is what the test expects it to be.
    fn follow(&self, stop: &Stop, name: &str, sets: &[&str]) -> Done {
        let command = stop.way_out.split("tidemill ").nth(1).unwrap_or_default();
        assert!(command.starts_with(&format!("{name} job.toml")), "{}", stop.way_out);
        self.command(name, sets).unwrap()
    }

    fn command(&self, name: &str, sets: &[&str]) -> Result<Done, Stop> {
        let (loaded, options) = (self.load(sets), options());
        let begun = Instant::now();
        let done = self.runtime.block_on(async {
            match name {
                "state rebuild" => commands::rebuild_state(&loaded, &options, false, &mut Unheard).await,
                "state adopt-rows" => commands::adopt_rows(&loaded, &options, &yes, &mut Unheard).await,
                name if name.starts_with("state adopt") => {
                    let others = |said: &str| name.ends_with(said).then_some(said == " seen");
                    let adopting = Adopting {
                        after_last_row: name.contains("--after-last-row"),
                        others_seen: others(" seen").or(others(" unseen")),
                    };
                    commands::adopt_ledger(&loaded, &options, adopting, &yes, &mut Unheard).await
                }
                "state rekey" => commands::rekey_state(&loaded, &options, &yes, &mut Unheard).await,
                other => panic!("no such command: {other}"),
            }
        });
        println!("time to resume by {name}: {:.2} s", begun.elapsed().as_secs_f64());
        done
    }

    fn set_watermark(&self, minute: i64) -> Done {
        let to = tidemill::event_time::EventTimeMs(BEGIN_MS + minute * MINUTE_MS);
        let (loaded, options) = (self.load(&[]), options());
        self.runtime.block_on(commands::set_watermark(&loaded, &options, to, &yes, &mut Unheard)).unwrap()
    }

    fn forget(&self, lines: &str) -> Result<Done, Stop> {
        let (loaded, options) = (self.load(&[]), options());
        self.runtime.block_on(commands::forget_keys(&loaded, &options, lines, &yes, &mut Unheard))
    }

    async fn catalog(&self) -> std::sync::Arc<dyn Catalog> {
        catalog::connect(&self.load(&[]).job.sink.catalog).await.unwrap()
    }

    /// Three rows and a repeat of two microbatches, in a table that was copied without its properties: [`MOVED`].
    fn without_ledger() -> Self {
        let job = Self::new("window = \"1 hour\"");
        job.counts(&[("a", 0), ("b", 5)], &[]);
        job.counts(&[("c", 9), ("a", 0)], &[]);
        job.copy_table("demo.small", "demo.copy");
        job
    }

    /// A table with the rows of another one and nothing else of it, as a copy into another catalog leaves it.
    fn copy_table(&self, from: &str, to: &str) {
        let ident = |name: &str| {
            schema::table_ident(&name.split('.').map(str::to_owned).collect::<Vec<_>>()).unwrap()
        };
        self.runtime.block_on(async {
            let catalog = self.catalog().await;
            let source = catalog::load(&*catalog, &ident(from)).await.unwrap().unwrap();
            let mut files: Vec<DataFile> = Vec::new();
            let snapshot = source.metadata().current_snapshot().unwrap();
            let list = source.manifest_list_reader(snapshot).load().await.unwrap();
            for manifest in list.entries() {
                let manifest = manifest.load_manifest(source.file_io()).await.unwrap();
                files.extend(manifest.entries().iter().map(|entry| entry.data_file().clone()));
            }
            let creation = TableCreation::builder()
                .name(ident(to).name().to_owned())
                .schema((**source.metadata().current_schema()).clone())
                .partition_spec((**source.metadata().default_partition_spec()).clone())
                .build();
            let copy = catalog.create_table(ident(to).namespace(), creation).await.unwrap();
            let transaction = Transaction::new(&copy);
            let append = transaction.fast_append().add_data_files(files);
            append.apply(transaction).unwrap().commit(&*catalog).await.unwrap();
        });
    }

    /// The main table is as it is under its name, but for its ledger.
    fn lose_ledger(&self) {
        for (from, to) in [("small", "aside"), ("aside", "small")] {
            self.copy_table(&format!("demo.{from}"), &format!("demo.{to}"));
            let ident = TableIdent::from_strs(["demo", from]).unwrap();
            self.runtime.block_on(async { self.catalog().await.drop_table(&ident).await.unwrap() });
        }
    }

    /// `state adopt` of [`MOVED`] is interrupted while it reads keys: the ledger is begun, and given back.
    fn begin_to_adopt(&self, adopting: Adopting) {
        let options = RunOptions { interrupt: Arc::new(AtomicBool::new(true)), ..options() };
        let (loaded, mut heard) = (self.load(&MOVED), Unheard);
        let adopted = commands::adopt_ledger(&loaded, &options, adopting, &yes, &mut heard);
        assert_eq!(self.runtime.block_on(adopted).unwrap_err().reason, Reason::Interrupted);
        let begun = self.record_of(&MOVED);
        assert!(begun.lacks_generation() && begun.released, "{begun:?}");
    }

    /// Rows that another program writes into the main table, which it makes first where there is none.
    fn rows_by_another(&self, events: &[(&str, i64)]) {
        let job = self.load(&[]).job;
        self.runtime.block_on(async {
            let catalog = self.catalog().await;
            let ident = schema::table_ident(&job.sink.table).unwrap();
            let table = match catalog::load(&*catalog, &ident).await.unwrap() {
                Some(table) => table,
                None => schema::create_main(&*catalog, &job).await.unwrap(),
            };
            let names = Arc::new(schema_to_arrow_schema(table.metadata().current_schema()).unwrap());
            let column = |field: &Arc<Field>| -> ArrayRef {
                match field.name().as_str() {
                    "event_id" => Arc::new(StringArray::from_iter_values(events.iter().map(|(id, _)| id))),
                    "event_time" => {
                        let micros = events.iter().map(|(_, minute)| (BEGIN_MS + minute * MINUTE_MS) * 1_000);
                        Arc::new(TimestampMicrosecondArray::from_iter_values(micros).with_timezone("+00:00"))
                    }
                    // A batch that no ledger counts.
                    _ if *field.data_type() == DataType::Int64 => {
                        Arc::new(Int64Array::from(vec![0; events.len()]))
                    }
                    _ if *field.data_type() == DataType::Int32 => {
                        Arc::new(Int32Array::from(vec![0; events.len()]))
                    }
                    "_kafka_topic" => Arc::new(StringArray::from(vec!["elsewhere"; events.len()])),
                    _ => new_null_array(field.data_type(), events.len()),
                }
            };
            let rows = RecordBatch::try_new(names.clone(), names.fields().iter().map(column).collect());
            let mut writer = TableWriter::new(&table, uuid::Uuid::now_v7(), 64 << 20, &[]).unwrap();
            writer.write(&rows.unwrap()).await.unwrap();
            let files = writer.finish().await.unwrap();
            let transaction = Transaction::new(&table);
            let append = transaction.fast_append().add_data_files(files);
            append.apply(transaction).unwrap().commit(&*catalog).await.unwrap();
        });
    }

    fn record_of(&self, sets: &[&str]) -> LedgerRecord {
        let job = self.load(sets).job;
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

    /// Sends, runs with these fields, and gives how many were written and how many were repeats.
    fn counts(&self, events: &[(&str, i64)], sets: &[&str]) -> (u64, u64) {
        let (written, duplicate, _) = self.take(events, sets);
        (written, duplicate)
    }
}

#[test]
fn rows_without_a_ledger_come_to_count_as_seen_and_every_rebuild_remembers_them() {
    let job = Small::new("window = \"1 hour\"");
    job.counts(&[("a", 0), ("b", 5)], &[]);
    job.counts(&[("c", 9)], &[]);
    job.copy_table("demo.small", "demo.copy");
    let state = format!("state_dir={}", job.folder.path().join("second").display());
    let second = ["name=second", "sink.iceberg.table=demo.copy", &state];

    let stop = job.stop_of(&second);
    assert_eq!(stop.reason, Reason::TableNotEmpty);
    let done = job.follow(&stop, "state adopt-rows", &second);
    assert_eq!((done.state.keys, done.state.keys_of_others), (3, 3), "{done:?}");
    let record = job.record_of(&second);
    assert!(record.released && record.kind == Kind::Change, "{record:?}");
    assert_eq!(record.change.as_ref().map(|change| change.by.as_str()), Some("state adopt-rows"));
    assert_eq!(record.batch, 2, "its own batches have numbers above those of the rows that were there");

    assert_eq!(job.counts(&[("b", 5), ("d", 11)], &second), (1, 4), "the topic is read from its begin");
    assert_eq!(job.record_of(&second).batch, 3);
    std::fs::remove_dir_all(job.folder.path().join("second")).unwrap();
    job.send(&[("a", 0), ("d", 11), ("e", 12)]);
    let (result, notes) = job.run_noting(&second);
    assert_eq!((result.as_ref().unwrap().counts.written, result.unwrap().counts.duplicate), (1, 2));
    assert!(notes.iter().any(|note| note.contains("3 keys of rows by others")), "{notes:?}");

    // Far beyond the window the rows of others are asked for too.
    job.counts(&[("f", 300)], &second);
    assert_eq!(job.counts(&[("a", 0), ("b", 5), ("g", 1)], &second), (1, 2));
}

#[test]
fn rows_that_were_passed_over_do_not_count_as_seen_after_a_rebuild_either() {
    let job = Small::new("window = \"1 hour\"");
    job.counts(&[("a", 0), ("b", 5)], &[]);
    job.copy_table("demo.small", "demo.copy");
    let state = format!("state_dir={}", job.folder.path().join("second").display());
    let second = ["name=second", "sink.iceberg.table=demo.copy", &state];
    let ignoring = RunOptions { ignore_rows: true, ..options() };
    let (loaded, mut notes) = (job.load(&second), Notes::default());
    let run = pipeline::run(&loaded, &ignoring, &mut notes);
    assert_eq!(job.runtime.block_on(run).unwrap().counts.written, 2);
    std::fs::remove_dir_all(job.folder.path().join("second")).unwrap();
    job.send(&[("a", 0), ("c", 6)]);
    let (result, notes) = job.run_noting(&second);
    assert_eq!((result.as_ref().unwrap().counts.written, result.unwrap().counts.duplicate), (1, 1));
    assert!(notes.iter().any(|note| note.contains("2 keys from 2 rows")), "{notes:?}");
}

#[test]
fn a_lost_ledger_is_made_again_from_the_rows_and_the_state_folder() {
    let job = Small::without_ledger();
    let lost = job.record();

    let stop = job.stop_of(&MOVED);
    assert_eq!(stop.reason, Reason::LedgerLost);
    let done = job.follow(&stop, "state adopt", &MOVED);
    assert_eq!((done.state.keys, done.state.rows_read), (3, 3), "{done:?}");
    let record = job.record_of(&MOVED);
    assert_eq!((record.job_id, record.batch), (lost.job_id, 2));
    assert_eq!((record.dedup.keys, &record.dedup.digest), (lost.dedup.keys, &lost.dedup.digest));
    assert_eq!(
        record.cursor("events", 0).unwrap().end.get(),
        0,
        "rows do not say how far the topic was read"
    );
    assert_eq!(job.counts(&[("c", 9), ("d", 10)], &MOVED), (1, 5), "what has a row is a repeat");
    assert_eq!(job.record_of(&MOVED).cursor("events", 0).unwrap().end.get(), 6);
}

#[test]
fn a_resend_that_is_read_again_for_a_lost_ledger_finds_its_first_copy_in_a_bucket_that_had_expired() {
    let job = Small::new("window = \"1 hour\"");
    job.counts(&[("a", 0), ("a", 30)], &[]);
    job.counts(&[("z", 600)], &[]);
    assert_eq!(job.counts(&[("y", 601)], &[]), (1, 0));
    job.copy_table("demo.small", "demo.copy");
    let moved = ["sink.iceberg.table=demo.copy", "microbatch.max_records=1"];
    assert_ne!(job.record().dedup.complete_since, None, "the buckets have expired");
    job.command("state adopt", &moved).unwrap();
    assert_eq!(job.counts(&[], &moved), (0, 4));
}

#[test]
fn rows_of_others_that_counted_as_seen_do_so_under_a_ledger_that_is_made_again() {
    let job = Small::new("window = \"1 hour\"");
    job.rows_by_another(&[("a", 0), ("b", 5)]);
    job.follow(&job.stop_of(&[]), "state adopt-rows", &[]);
    assert_eq!(job.counts(&[("a", 0), ("b", 5), ("c", 9)], &[]), (1, 2));
    job.copy_table("demo.small", "demo.copy");
    let unsaid = job.command("state adopt", &MOVED).unwrap_err();
    assert_eq!(unsaid.reason, Reason::Usage);
    assert!(unsaid.what.contains("has 2 rows that this job did not write"), "{}", unsaid.what);
    let done = job.command("state adopt --rows-of-others seen", &MOVED).unwrap();
    assert_eq!((done.state.keys, done.state.keys_of_others, done.notes.len()), (3, 2, 1), "{done:?}");
    assert_eq!(job.counts(&[("d", 10)], &MOVED), (1, 3), "a and b are in the topic too");
}

#[test]
fn rows_of_others_that_were_passed_over_are_so_under_a_ledger_that_is_made_again() {
    let job = Small::new("window = \"1 hour\"");
    job.counts(&[("c", 9)], &[]);
    job.rows_by_another(&[("a", 0)]);
    job.copy_table("demo.small", "demo.copy");
    assert_eq!(job.command("state adopt", &MOVED).unwrap_err().reason, Reason::Usage);
    job.command("state adopt --rows-of-others unseen", &MOVED).unwrap();
    assert_eq!(job.counts(&[("a", 0)], &MOVED), (1, 1));
}

#[test]
fn a_ledger_that_is_made_again_begins_no_later_than_its_first_row_whatever_a_start_by_time_means_now() {
    let job = Small::new("window = \"1 hour\"");
    // The in-process broker has no record that is as late, now and later.
    let by_time = "source.kafka.start=\"2020-01-01T00:00:00Z\"";
    job.run_noting(&[by_time]).0.unwrap();
    assert_eq!(job.counts(&[("a", 0), ("b", 5)], &[by_time]), (2, 0));
    job.copy_table("demo.small", "demo.copy");
    let moved = ["sink.iceberg.table=demo.copy", by_time];
    job.send(&[("c", 9)]);
    job.command("state adopt", &moved).unwrap();
    assert_eq!(job.counts(&[], &moved), (1, 2), "c came before the ledger was made again");
}

#[cfg(feature = "faults")]
#[test]
fn a_ledger_whose_state_could_not_be_made_again_is_made_again_in_another_way() {
    let job = Small::without_ledger();
    let mut adopt = std::process::Command::new(env!("CARGO_BIN_EXE_tidemill"));
    adopt.args(["state", "adopt", "--yes", "--set", MOVED[0]]).arg(job.folder.path().join("job.toml"));
    adopt.env("TIDEMILL_CRASH_AT", "rebuild_keys_read").stderr(std::process::Stdio::null());
    assert!(!deaths::ended(adopt.spawn().unwrap()).success());
    let begun = job.record_of(&MOVED);
    assert!(begun.lacks_generation() && begun.cursor("events", 0).unwrap().end.get() == 0);
    job.command("state adopt --after-last-row", &MOVED).unwrap();
    assert_eq!(job.record_of(&MOVED).cursor("events", 0).unwrap().end.get(), 3);
    assert_eq!(job.command("state adopt", &MOVED).unwrap_err().reason, Reason::Usage);
    assert_eq!(job.counts(&[("c", 9), ("d", 10)], &MOVED), (1, 2), "the repeat after it is read again");
}

#[test]
fn a_ledger_that_was_begun_to_be_made_again_is_finished_by_a_run_with_another_state_folder() {
    let job = Small::without_ledger();
    job.begin_to_adopt(Adopting::default());
    let elsewhere = format!("state_dir={}", job.folder.path().join("elsewhere").display());
    let moved = [MOVED[0], &elsewhere];
    let stop = job.command("state adopt", &moved).unwrap_err();
    assert_eq!(stop.reason, Reason::Usage);
    assert!(stop.way_out.contains("tidemill run job.toml"), "{}", stop.way_out);
    assert!(!stop.way_out.contains("adopt-rows"), "they would count as seen for good: {}", stop.way_out);
    assert_eq!(job.counts(&[("d", 10)], &moved), (1, 4), "as it was begun: from the start");
}

#[test]
fn a_ledger_that_is_begun_again_from_the_start_keeps_no_place_in_a_topic_that_has_left_the_job() {
    let job = Small::new("window = \"1 hour\"");
    job.broker.create_topics(&["left".to_owned()], 1).unwrap();
    let both = "source.kafka.topics=[\"events\", \"left\"]";
    let payload = format!(r#"{{"event_id":"z","ts":{BEGIN_MS}}}"#);
    job.producer.send(BaseRecord::<(), _>::to("left").payload(&payload)).unwrap();
    assert_eq!(job.counts(&[("a", 0)], &[both]), (2, 0));
    job.copy_table("demo.small", "demo.copy");
    job.begin_to_adopt(Adopting { after_last_row: true, ..Adopting::default() });
    assert!(job.record_of(&MOVED).cursor("left", 0).is_some(), "its row says how far it was read");
    job.command("state adopt", &MOVED).unwrap();
    assert!(job.record_of(&MOVED).cursor("left", 0).is_none());
    assert_eq!(job.counts(&[], &[MOVED[0], both]), (0, 2), "it is read from its begin when it joins again");
}

#[test]
fn a_ledger_that_is_made_again_knows_the_late_rows_of_a_job_that_puts_none_aside_any_more() {
    let job = Small::new("window = \"1 hour\"");
    let aside = "event_time.late=side";
    assert_eq!(job.counts(&[("a", 10), ("b", 5)], &[aside]), (1, 0), "b is late");
    assert_eq!(job.counts(&[("c", 11)], &[]), (1, 0));
    job.lose_ledger();
    let stop = job.stop_of(&[]);
    assert_eq!(stop.reason, Reason::LedgerLost);
    assert!(stop.way_out.contains("from the 3 rows"), "{}", stop.way_out);
    job.follow(&stop, "state adopt", &[]);
    assert_eq!(job.counts(&[("b", 12)], &[]), (0, 4));
    assert_eq!(job.main_keys(), ["a", "c"].map(|key| (key.to_owned(), 1)).into());
    // Nor is it a stranger to who lost the state too.
    job.lose_ledger();
    job.lose_state();
    let stop = job.stop_of(&[]);
    assert_eq!(stop.reason, Reason::TableNotEmpty);
    assert!(stop.what.contains("there are 3 rows, 1 of them in its late table"), "{}", stop.what);
}

#[test]
fn a_ledger_that_is_made_again_goes_on_after_the_last_row_if_the_user_says_so() {
    let job = Small::without_ledger();
    job.command("state adopt --after-last-row", &MOVED).unwrap();
    let cursor = *job.record_of(&MOVED).cursor("events", 0).unwrap();
    assert_eq!(cursor.end.get(), 3, "one past the last record that left a row");
    assert_eq!(job.counts(&[("c", 9), ("d", 10)], &MOVED), (1, 2), "the repeat after it is read again");
}

#[test]
fn a_ledger_that_is_not_lost_and_rows_that_are_not_there_are_not_adopted() {
    let job = Small::new("window = \"1 hour\"");
    assert_eq!(job.command("state adopt-rows", &[]).unwrap_err().reason, Reason::Usage);
    assert_eq!(job.command("state rebuild", &[]).unwrap_err().reason, Reason::Usage);
    job.counts(&[("a", 0)], &[]);
    assert_eq!(job.command("state adopt", &[]).unwrap_err().reason, Reason::Usage);
    assert_eq!(job.command("state rekey", &[]).unwrap_err().reason, Reason::Usage);
    let before = job.record();
    let done = job.command("state rebuild", &[]).unwrap();
    assert!(!done.changed && done.notes[0].contains("the state is whole: 1 keys"), "{done:?}");
    assert_eq!(job.record(), before, "nothing was committed");
}

#[test]
fn only_the_damaged_bucket_is_read_from_the_table() {
    let job = Small::new("window = \"1 hour\"");
    let ids: Vec<String> = (0..600).map(|number| format!("event-{number}")).collect();
    let events: Vec<(&str, i64)> =
        ids.iter().zip(0..).map(|(id, number)| (id.as_str(), number % 60)).collect();
    job.counts(&events, &[]);
    let before = job.record();
    assert!(before.buckets.len() >= 5, "{:?}", before.buckets);
    let segment = segments_in(&survey::state_folder(&job.load(&[]).job)).pop().unwrap();
    let inspection = dedup::inspect(&segment, true, &mut |_| {}).unwrap();
    let dedup::Content::Segment(facts) = inspection.content else { panic!("{inspection:?}") };
    let mut bytes = fs::read(&segment).unwrap();
    // A byte of the second section's pages.
    let place = usize::try_from(facts.sections[2].filter_position).unwrap() - 40;
    bytes[place] ^= 0x10;
    fs::write(&segment, bytes).unwrap();

    let done = job.command("state rebuild", &[]).unwrap();
    assert!(done.changed, "{done:?}");
    assert_eq!((done.state.keys, done.state.buckets_read), (600, 1), "{done:?}");
    assert!(done.state.keys_kept >= 500 && done.state.rows_read <= 120, "{done:?}");
    let after = job.record();
    assert_eq!(after.buckets, before.buckets);
    assert_ne!(after.dedup.generation, before.dedup.generation);
    assert_eq!(after.batch_generation(), before.dedup.generation.as_deref());
    assert_eq!(job.counts(&events, &[]), (0, 600));
    assert_eq!(job.counts(&[("new", 59)], &[]), (1, 0));
}

#[test]
fn an_older_generation_gives_the_buckets_that_have_not_changed_since() {
    let job = Small::new("window = \"1 hour\"");
    job.counts(&[("a", 0), ("b", 12)], &[]);
    let folder = survey::state_folder(&job.load(&[]).job);
    let older: Vec<(PathBuf, Vec<u8>)> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect();
    job.counts(&[("c", 25)], &[]);
    fs::remove_dir_all(&folder).unwrap();
    fs::create_dir_all(&folder).unwrap();
    older.iter().for_each(|(path, bytes)| fs::write(path, bytes).unwrap());
    job.send(&[("a", 0), ("b", 12), ("c", 25), ("d", 26)]);
    let (result, notes) = job.run_noting(&[]);
    assert_eq!((result.as_ref().unwrap().counts.written, result.unwrap().counts.duplicate), (1, 3));
    assert!(
        notes.iter().any(|note| note
            .contains("2 were still whole in the state folder; the other 1 of 3 buckets from 1 rows")),
        "{notes:?}"
    );
}

#[test]
fn a_key_that_was_changed_on_purpose_is_rebuilt_from_the_rows() {
    let job = Small::new("window = \"1 hour\"");
    job.counts(&[("a", 0), ("a", 1), ("b", 5)], &[]);
    let both = ["dedup.key=[\"event_id\", \"event_time\"]"];
    let stop = job.stop_of(&both);
    assert_eq!(stop.reason, Reason::KeySpecChanged);
    let done = job.follow(&stop, "state rekey", &both);
    assert_eq!((done.state.keys, done.state.repeats), (2, 0), "{done:?}");
    assert_eq!(job.counts(&[("a", 0), ("a", 1), ("a", 2), ("b", 5)], &both), (2, 2));
    job.lose_state();
    assert_eq!(job.counts(&[("a", 0), ("a", 1), ("a", 2), ("b", 5)], &both), (0, 4));

    // And back: two rows share a key now, and stay.
    let stop = job.stop_of(&[]);
    let done = job.follow(&stop, "state rekey", &[]);
    assert_eq!((done.state.keys, done.state.repeats), (2, 2), "{done:?}");
    assert_eq!(job.counts(&[("a", 7), ("b", 7), ("c", 7)], &[]), (1, 2));
    assert_eq!(job.copies("a"), 3);
}

#[test]
fn a_rekey_keeps_the_window_and_what_lies_beyond_it_is_still_found() {
    let job = Small::new("window = \"1 hour\"");
    job.counts(&[("a", 0), ("b", 130)], &[]);
    job.counts(&[("c", 200)], &[]);
    let same_time = ["dedup.repeats=same_time"];
    let stop = job.stop_of(&same_time);
    let done = job.follow(&stop, "state rekey", &same_time);
    assert_eq!(done.state.keys, 1, "a and b have left the window: {done:?}");
    assert_eq!(job.counts(&[("a", 0), ("b", 130), ("c", 200), ("d", 201)], &same_time), (1, 3));
}

#[test]
fn a_watermark_that_ran_ahead_is_set_back_and_the_buckets_live_again() {
    let job = Small::new("window = \"1 hour\"");
    job.counts(&[("a", 0), ("b", 15), ("c", 40)], &[]);
    // A clock three days ahead.
    job.counts(&[("wild", 4_320)], &[]);
    assert!(job.record().dedup.complete_since.is_some());
    let done = job.set_watermark(40);
    let record = job.record();
    assert_eq!(record.live().watermark.map(|time| time.to_string()), minute(40));
    assert_eq!(record.cursor("events", 0).unwrap().max_event_time.map(|time| time.to_string()), minute(40));
    assert_eq!(done.state.keys, 4, "{done:?}");
    let (written, duplicate, summary) = job.take(&[("a", 41), ("b", 41), ("c", 41), ("d", 42)], &[]);
    assert_eq!((written, duplicate, summary.buckets_lent), (1, 3, 0));
    assert_eq!(summary.watermark, minute(42));
    job.lose_state();
    assert_eq!(job.counts(&[("a", 43), ("wild", 43), ("e", 44)], &[]), (1, 2));
}

#[test]
fn erased_keys_stay_seen_through_every_rebuild_and_beyond_the_window() {
    let job = Small::new("window = \"1 hour\"");
    job.counts(&[("a", 0), ("b", 5)], &[]);
    let before = job.record();
    let done = job.forget("{\"event_id\": \"a\"}\n").unwrap();
    assert!(
        done.notes[0].contains("1 keys stay seen") && done.notes[0].contains("0 of them were not"),
        "{done:?}"
    );
    assert_eq!(job.record().buckets, before.buckets, "what the ledger counts is what it was");
    // One that no row has: it says its time.
    let early = minute(7).unwrap();
    job.forget(&format!("{{\"event_id\": \"z\", \"event_time\": \"{early}\"}}\n")).unwrap();
    assert_eq!(job.record().suppressed.map(|suppressed| suppressed.rows), Some(2));
    assert_eq!(job.counts(&[("a", 0), ("z", 7), ("c", 8)], &[]), (1, 2));
    job.lose_state();
    assert_eq!(job.counts(&[("a", 0), ("z", 7), ("c", 8)], &[]), (0, 3));
    job.counts(&[("d", 300)], &[]);
    assert_eq!(
        job.counts(&[("z", 7), ("a", 0), ("e", 7)], &[]),
        (1, 2),
        "the bucket is lent with its erased keys"
    );
}

#[test]
fn keys_that_can_not_be_erased_are_named_by_their_lines_and_nothing_is_changed() {
    let job = Small::new("window = \"1 hour\"");
    job.counts(&[("a", 0)], &[]);
    for (lines, said) in [
        ("", "0 keys were named"),
        ("a\n", "lines 1"),
        ("{\"event_id\": \"a\"}\n{\"id\": \"b\"}\n", "lines 2"),
        ("{\"event_id\": \"a\", \"event_time\": \"yesterday\"}\n", "no Timestamp"),
        ("{\"event_id\": \"a\"}\n{\"event_id\": \"never seen\"}\n", "do not say their event time: lines 2"),
    ] {
        let stop = job.forget(lines).unwrap_err();
        assert_eq!(stop.reason, Reason::Usage);
        assert!(stop.what.contains(said) && !stop.what.contains("never seen"), "{}", stop.what);
    }
    assert!(job.record().suppressed.is_none() && job.record().released);
}
