//! Savepoints: a job goes back to a moment of its own, in rows, letters, offsets and dedup state, and on from there.

use std::time::Duration;

use tidemill::commit::savepoint as tags;
use tidemill::commit::side;
use tidemill::pipeline::commands::{self, Listed, Restoration};
use tidemill::pipeline::maintain::{self, Asked};

use super::*;

fn options() -> RunOptions {
    RunOptions { job_shown: "job.toml".into(), ..RunOptions::default() }
}

/// All of a job that a savepoint brings back.
#[derive(Debug, PartialEq)]
struct Moment {
    rows: BTreeMap<String, u64>,
    letters: Vec<(String, i32, i64, i32)>,
    lanes: String,
    batch: u64,
    generation: Option<String>,
    keys: u64,
}

impl Bench {
    fn moment(&self) -> Moment {
        let record = self.record();
        // A cursor's start and tail tell of the last batch alone.
        let ends = |lane: &ledger::Lane| {
            let cursors = lane.topics.iter().flat_map(|(topic, partitions)| {
                partitions.iter().map(move |(partition, at)| (topic, partition, at.end, at.max_event_time))
            });
            format!("{:?} {:?}", lane.watermark, cursors.collect::<Vec<_>>())
        };
        Moment {
            rows: self.rows_by("event_id"),
            letters: self.letters(),
            lanes: ends(record.live()),
            batch: record.batch,
            keys: record.dedup.keys,
            generation: record.dedup.generation,
        }
    }

    pub(super) fn create(&self, name: &str) -> Result<Listed, Stop> {
        let loaded = self.load(&[]);
        self.runtime.block_on(commands::create_savepoint(&loaded, &options(), name, &mut Notes::default()))
    }

    pub(super) fn restore(&self, name: &str, sets: &[&str]) -> Result<Restoration, Stop> {
        let loaded = self.load(sets);
        self.runtime.block_on(commands::restore_savepoint(&loaded, &options(), name, &|_| Ok(())))
    }

    fn drop_named(&self, name: &str) -> Result<(), Stop> {
        let loaded = self.load(&[]);
        let (options, mut notes) = (options(), Notes::default());
        self.runtime.block_on(commands::drop_savepoint(&loaded, &options, name, &|_| Ok(()), &mut notes))
    }

    fn list(&self, sets: &[&str]) -> commands::Listing {
        self.runtime.block_on(commands::list_savepoints(&self.load(sets), &options())).unwrap()
    }

    fn expire_all_but_one(&self) {
        let second = Some(Duration::from_secs(0));
        let asked = Asked { older_than: second, retain_last: Some(1), orphans_older_than: second };
        let loaded = self.load(&[]);
        self.runtime.block_on(maintain::expire(&loaded, &options(), &asked, &|_| Ok(()))).unwrap();
    }

    fn dead_table(&self) -> iceberg::table::Table {
        let job = self.load(&[]).job;
        self.runtime.block_on(async {
            let catalog = catalog::connect(&job.sink.catalog).await.unwrap();
            let ident = schema::table_ident(&job.sink.dead_letters.table).unwrap();
            catalog::load(&*catalog, &ident).await.unwrap().unwrap()
        })
    }

    fn elsewhere(&self) -> String {
        format!("state_dir={}", self.folder.path().join("elsewhere").display())
    }
}

/// A job with a savepoint `then` after its first wave, and what it was.
fn with_savepoint(seed: u64) -> (Bench, Moment) {
    let mut bench = Bench::with_some_bad(seed);
    bench.send_wave();
    bench.run(&[]);
    let made = bench.create("then").unwrap();
    assert_eq!((made.batch, made.at_home, made.tables.len()), (1, true, 2));
    assert!(made.tables.values().all(Option::is_some), "{made:?}");
    let then = bench.moment();
    assert_eq!(made.generation, then.generation);
    (bench, then)
}

#[test]
fn a_job_goes_back_to_a_savepoint_in_rows_letters_offsets_and_state_and_on_to_the_same_tables() {
    let (mut bench, then) = with_savepoint(61);
    for _ in 0..2 {
        bench.send_wave();
        bench.run(&[]);
    }
    let end = bench.moment();
    bench.assert_exact();
    let before = bench.record();
    let restoration = bench.restore("then", &[]).unwrap();
    assert_eq!((restoration.batch_before, restoration.savepoint.batch), (3, 1));
    assert_eq!(restoration.jumps.len(), 4 * PARTITIONS as usize);
    assert_eq!(restoration.notes, Vec::<String>::new());
    assert_eq!(bench.moment(), then);
    let after = bench.record();
    assert!(after.epoch == before.epoch + 1 && after.sequence > before.sequence && after.released);
    assert_eq!((after.sides_back_to, &after.restored_from), (None, &None));
    // What was written since is read again, and nothing of it stands twice or is missing.
    let (result, notes) = bench.run_noting(&[], RunOptions::default());
    assert_eq!((result.unwrap().batch, notes), (2, Vec::new()), "the generation was at home");
    bench.assert_exact();
    let again = bench.moment();
    assert_eq!((again.rows, again.letters, again.lanes), (end.rows, end.letters, end.lanes));
    // The savepoint still stands, and can be gone back to once more.
    bench.restore("then", &[]).unwrap();
    assert_eq!(bench.moment(), then);
    bench.run(&["microbatch.max_records=3000"]);
    bench.assert_exact();
}

#[test]
fn a_snapshot_that_takes_rows_away_is_an_overwrite_on_top_of_the_head_with_the_totals_of_the_savepoint() {
    let (mut bench, then) = with_savepoint(62);
    bench.send_wave();
    bench.run(&[]);
    let head = bench.table().metadata().current_snapshot_id();
    bench.restore("then", &[]).unwrap();
    let metadata = bench.table().metadata().clone();
    let mut ancestry = std::iter::successors(metadata.current_snapshot(), |snapshot| {
        metadata.snapshot_by_id(snapshot.parent_snapshot_id()?)
    });
    let restored = ancestry
        .find(|snapshot| snapshot.summary().additional_properties.contains_key("tidemill.restored"))
        .unwrap();
    assert_eq!(restored.summary().operation, iceberg::spec::Operation::Overwrite);
    let totals = &restored.summary().additional_properties["total-records"];
    assert_eq!(totals.parse::<usize>().unwrap(), then.rows.len());
    // The head before stands below it, one fence away, so nothing of the table's history is lost.
    assert!(ancestry.any(|snapshot| Some(snapshot.snapshot_id()) == head));
}

#[test]
fn expiry_merges_and_sweeps_leave_what_a_savepoint_needs() {
    let (mut bench, then) = with_savepoint(63);
    for _ in 0..2 {
        bench.send_wave();
        bench.run(&[
            "microbatch.max_records=500",
            "sink.iceberg.maintenance={ every_commits = 3, max_snapshots = 2 }",
        ]);
        bench.expire_all_but_one();
    }
    let generation = then.generation.clone().unwrap();
    let kept = fs::read_dir(bench.state_folder()).unwrap().map(|entry| entry.unwrap().file_name());
    let mut manifests: Vec<String> = kept.map(|name| name.into_string().unwrap()).collect();
    manifests.retain(|name| name.ends_with(".manifest"));
    assert!(manifests.contains(&format!("{generation}.manifest")) && manifests.len() <= 5, "{manifests:?}");
    let listed = bench.list(&[]);
    assert!(listed.savepoints[0].at_home && listed.strays.is_empty(), "{listed:?}");
    bench.restore("then", &[]).unwrap();
    assert_eq!(bench.moment(), then);
    bench.expire_all_but_one();
    assert_eq!(bench.moment(), then);
    let (_, notes) = bench.run_noting(&[], RunOptions::default());
    assert!(!notes.iter().any(|note| note.contains("rebuilding")), "{notes:?}");
    bench.assert_exact_rows();
    // Once it is dropped, its generation and its snapshots go.
    bench.drop_named("then").unwrap();
    for table in [bench.table(), bench.dead_table()] {
        assert!(table.metadata().snapshot_for_ref(&tags::tag("then")).is_none());
    }
    bench.send_wave();
    bench.run(&["microbatch.max_records=500"]);
    assert!(!bench.state_folder().join(format!("{generation}.manifest")).exists());
    bench.expire_all_but_one();
    bench.assert_exact_rows();
}

impl Bench {
    /// As `assert_exact`, where the summaries of old batches have expired.
    fn assert_exact_rows(&self) {
        let truth = self.generator.truth();
        assert_eq!(self.rows_by("event_type"), truth.distinct_by_type);
        assert_eq!(self.rows_by("event_id").len() as u64, truth.distinct);
        let mut letters = self.letters();
        letters.dedup();
        assert_eq!(letters.len() as u64, truth.bad_total());
    }
}

#[test]
fn a_savepoint_works_from_another_state_folder_with_other_memory_and_batches() {
    let (mut bench, then) = with_savepoint(64);
    bench.send_wave();
    bench.run(&[]);
    let elsewhere = bench.elsewhere();
    let sets = [elsewhere.as_str(), "memory=\"512 MiB\"", "microbatch.max_records=2500"];
    assert!(!bench.list(&sets).savepoints[0].at_home);
    let restoration = bench.restore("then", &sets).unwrap();
    assert!(restoration.notes[0].contains("makes it again"), "{:?}", restoration.notes);
    assert_eq!(bench.moment(), then);
    let (result, notes) = bench.run_noting(&sets, RunOptions::default());
    result.unwrap();
    assert!(notes.iter().any(|note| note.contains("rebuilt the dedup state")), "{notes:?}");
    bench.assert_exact();
    // And back again at home, where the state is of a batch that is not there any more.
    bench.send_wave();
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn a_savepoint_before_the_first_microbatch_is_an_empty_table() {
    let mut bench = Bench::with_some_bad(65);
    bench.run(&[]);
    let made = bench.create("empty").unwrap();
    assert_eq!((made.batch, made.generation, made.at_home), (0, None, true));
    bench.send_wave();
    bench.run(&[]);
    bench.restore("empty", &[]).unwrap();
    assert_eq!((bench.rows_by("event_id").len(), bench.letters().len(), bench.record().batch), (0, 0, 0));
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn names_that_are_taken_unknown_or_no_names_are_refused_and_nothing_is_changed() {
    let (bench, _) = with_savepoint(66);
    let before = bench.table().metadata_location().unwrap().to_owned();
    for (stop, word) in [
        (bench.create("then").unwrap_err(), "tidemill savepoint drop job.toml then"),
        (bench.create("Then/1").unwrap_err(), "a-z, 0-9, _, - and ."),
        (bench.restore("never", &[]).unwrap_err(), "tidemill savepoint list job.toml"),
        (bench.drop_named("never").unwrap_err(), "tidemill savepoint list job.toml"),
    ] {
        assert!(stop.reason == Reason::Usage && stop.way_out.contains(word), "{stop:?}");
    }
    let lock = StateLock::acquire(&bench.state_folder()).unwrap();
    let stop = bench.restore("then", &[]).unwrap_err();
    assert!(
        stop.reason == Reason::Busy && stop.way_out.contains("savepoint restore job.toml then"),
        "{stop:?}"
    );
    drop(lock);
    let loaded = bench.load(&[]);
    let looked = bench.runtime.block_on(commands::look_at_restore(&loaded, &options(), "then")).unwrap();
    assert_eq!((looked.batch_before, looked.jumps.len()), (1, 0));
    assert_eq!(bench.table().metadata_location().unwrap(), before);
}

#[test]
fn a_savepoint_of_another_key_or_other_topics_is_not_gone_back_to() {
    let (bench, then) = with_savepoint(67);
    let key = "dedup.key=[\"event_id\", \"event_type\"]";
    let stop = bench.restore("then", &[key]).unwrap_err();
    assert_eq!(stop.reason, Reason::KeySpecChanged);
    assert!(stop.way_out.contains("tidemill savepoint restore job.toml then"), "{}", stop.way_out);
    let other = Bench::with_some_bad(67);
    let bootstrap = format!("source.kafka.properties.\"bootstrap.servers\"={}", other.broker.bootstrap());
    let stop = bench.restore("then", &[&bootstrap]).unwrap_err();
    assert!(matches!(stop.reason, Reason::ClusterChanged | Reason::TopicChanged), "{stop:?}");
    assert_eq!(bench.moment(), then);
}

#[cfg(feature = "faults")]
mod kills {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command, Stdio};
    use tidemill::commit::request::PREFIX;

    use super::*;
    use crate::{deaths, wait};

    impl Bench {
        /// Starts a command beside the test: its words before the job and those after it.
        fn start_beside(&self, words: &[&str], more: &[&str], environment: &[(&str, &str)]) -> Child {
            let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"));
            command.args(words).arg(self.job_path()).args(more).envs(environment.iter().copied());
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        }

        /// Waits until so many requests stand in the table.
        fn await_requests(&self, count: usize) {
            let stand = || {
                let table = self.table();
                table.metadata().properties().keys().filter(|name| name.starts_with(PREFIX)).count()
            };
            wait::until(|| stand() >= count, || format!("{} of {count} requests were made", stand()));
        }

        /// Runs `savepoint` until it kills itself at a point; gives whether it did.
        fn savepoint_dies_at(&self, words: &[&str], point: &str) -> bool {
            let mut command = Command::new(env!("CARGO_BIN_EXE_tidemill"));
            command.args(["savepoint", words[0]]).arg(self.job_path()).args(&words[1..]);
            command.env("TIDEMILL_CRASH_AT", point).stdout(Stdio::null()).stderr(Stdio::null());
            let status = command.status().unwrap();
            assert!(status.success() || status.signal() == Some(9), "{words:?} at {point}: {status}");
            status.signal() == Some(9)
        }
    }

    #[test]
    fn an_owner_at_work_makes_and_drops_savepoints_for_others_and_is_not_restored_under() {
        let (mut bench, _) = with_savepoint(70);
        bench.send_wave();
        // The owner sleeps in the first of several microbatches.
        let small = ["--set", "microbatch.max_records=600"];
        let owner = bench.start_beside(&["run"], &small, &[("TIDEMILL_STOP_AT", "state_prepared")]);
        deaths::stopped(&owner);
        let create = bench.start_beside(&["savepoint", "create"], &["during"], &[]);
        let dropped = bench.start_beside(&["savepoint", "drop"], &["then", "--yes"], &[]);
        bench.await_requests(2);
        assert_eq!(bench.restore("then", &[]).unwrap_err().reason, Reason::Busy);
        let names = |bench: &Bench| {
            bench.list(&[]).savepoints.into_iter().map(|found| found.name).collect::<Vec<_>>()
        };
        assert_eq!(names(&bench), ["then"], "who is no owner sets no tag");
        deaths::wake(&owner);
        for child in [create, dropped, owner] {
            assert!(deaths::ended(child).success());
        }
        assert_eq!(names(&bench), ["during"]);
        let (made, end) = (bench.list(&[]).savepoints.remove(0), bench.moment());
        assert!(
            made.batch == 2 && end.batch > 2,
            "of the batch that its owner was at: {made:?} {}",
            end.batch
        );
        assert!(
            made.at_home && made.tables.len() == 2 && made.tables.values().all(Option::is_some),
            "{made:?}"
        );
        assert!(!bench.table().metadata().properties().keys().any(|name| name.starts_with(PREFIX)));
        bench.assert_exact();
        bench.restore("during", &[]).unwrap();
        assert_eq!(bench.moment().batch, 2);
        bench.run(&[]);
        bench.assert_exact();
        assert_eq!((bench.moment().rows, bench.moment().letters), (end.rows, end.letters));
    }

    #[test]
    fn a_create_or_drop_that_dies_anywhere_leaves_a_savepoint_or_none_and_the_next_command_settles_it() {
        let mut bench = Bench::with_some_bad(68);
        bench.send_wave();
        bench.run(&[]);
        let (mut whole, mut strays) = (0, 0);
        for point in [
            "fenced:1",
            "request_to_send:2",
            "request_answered:2",
            "savepoint_side_tagged:1",
            "updates_written:2",
            "request_answered:3",
            "savepoint_main_tagged:1",
        ] {
            assert!(bench.savepoint_dies_at(&["create", "shot"], point), "{point} was not reached");
            let listed = bench.list(&[]);
            whole += listed.savepoints.len();
            strays += listed.strays.len();
            if listed.savepoints.is_empty() {
                bench.create("shot").unwrap();
            }
            let listed = bench.list(&[]);
            assert_eq!((listed.savepoints.len(), listed.strays.len()), (1, 0), "after {point}");
            assert!(listed.savepoints[0].tables.values().all(Option::is_some), "after {point}");
            for point in ["savepoint_main_untagged:1", "savepoint_side_untagged:1"] {
                let stood = !bench.list(&[]).savepoints.is_empty();
                if stood && bench.savepoint_dies_at(&["drop", "shot", "--yes"], point) {
                    assert!(bench.list(&[]).savepoints.is_empty());
                }
            }
            if !bench.list(&[]).strays.is_empty() {
                bench.drop_named("shot").unwrap();
            }
            let listed = bench.list(&[]);
            assert!(listed.savepoints.is_empty() && listed.strays.is_empty(), "{listed:?}");
        }
        assert!(whole >= 2 && strays >= 2, "{whole} {strays}");
        bench.send_wave();
        bench.run(&[]);
        bench.assert_exact();
    }

    #[test]
    fn a_restore_that_dies_anywhere_is_not_begun_or_is_finished_by_the_next_start() {
        let (mut bench, then) = with_savepoint(69);
        bench.send_wave();
        bench.run(&[]);
        let mut end = bench.moment();
        for point in [
            "fenced:1",
            "savepoint_to_restore:1",
            "updates_written:1",
            "request_answered:2",
            "savepoint_main_restored:1",
            "updates_written:2",
            "request_answered:3",
            "savepoint_sides_restored:1",
            "release_to_send:1",
        ] {
            assert!(bench.savepoint_dies_at(&["restore", "then", "--yes"], point), "{point} was not reached");
            let record = bench.record();
            if record.batch == then.batch {
                assert_eq!(bench.rows_by("event_id"), then.rows, "rows went back with the record");
            } else {
                assert_eq!(
                    (bench.rows_by("event_id"), bench.letters()),
                    (end.rows, end.letters),
                    "at {point}"
                );
            }
            bench.send(500);
            bench.run(&[]);
            bench.assert_exact();
            end = bench.moment();
            assert_eq!(bench.record().restored_from, None);
        }
    }
}

/// What a pass left behind whose commit nobody saw land.
pub(super) fn leave_intent(table: &iceberg::table::Table) -> PathBuf {
    let folder = PathBuf::from(table.metadata().location().trim_start_matches("file://")).join("metadata");
    let path = folder.join(format!("tidemill-expiry-{}.json", uuid::Uuid::now_v7()));
    let intent =
        serde_json::json!({"format": 1, "table": table.metadata().uuid(), "files": [], "data_files": []});
    fs::write(&path, intent.to_string()).unwrap();
    path
}

#[test]
fn what_a_pass_left_on_a_side_table_is_finished_only_after_its_head_moved() {
    let mut bench = Bench::with_some_bad(87);
    let maintained = ["sink.iceberg.maintenance.every_commits=1"];
    // Commits of the last epoch on the dead-letter table: one with letters, and what came before it.
    let mut commits = |intent: bool| {
        let left = intent.then(|| leave_intent(&bench.dead_table()));
        bench.send_wave();
        bench.run(&maintained);
        assert!(left.is_none_or(|path| !path.exists()));
        let epoch = bench.record().epoch;
        let table = bench.dead_table();
        let marks = table.metadata().snapshots().filter_map(|snapshot| {
            let text = snapshot.summary().additional_properties.get(side::MARK)?;
            serde_json::from_str::<serde_json::Value>(text).unwrap()["epoch"].as_u64()
        });
        marks.filter(|of| *of == epoch).count()
    };
    commits(false);
    let usual = commits(false);
    assert_eq!(commits(true), usual + 1, "a request that was sent before asserts a head that is gone");
    assert_eq!(commits(false), usual, "nothing was left behind, so nothing is fenced");
    bench.assert_exact();
}
