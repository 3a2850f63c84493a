//! Files that a side table is owed are gone: the rows are written again, or given up, and the next run goes on.

use std::process::{Child, ExitStatus};

use arrow::util::display::{ArrayFormatter, FormatOptions};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;
use tidemill::pipeline::Moved;
use tidemill::pipeline::commands;
use tidemill::pipeline::report::Unheard;
use tidemill::pipeline::sides::{self, Reread, SideLoss};

use super::deaths::{ended, start, stopped, wake};
use super::start_table::{options, yes};
use super::*;

/// Fields of a job that puts what comes out of order aside.
const LATE: [&str; 3] =
    ["event_time.late=side", "event_time.watermark_delay=0s", "event_time.allowed_lateness=0s"];

impl Bench {
    /// A wave that was taken, and one whose rows have landed in main and not in the side tables.
    fn in_debt(seed: u64, sets: &[&str]) -> Self {
        let mut bench = Self::with_some_bad(seed);
        bench.send_wave();
        bench.run(sets);
        bench.send_wave();
        bench.kill_at("main_landed:2", sets);
        assert!(bench.record().owes_side_files());
        bench
    }

    /// As [`Bench::in_debt`], with a savepoint between the two.
    fn in_debt_since_a_savepoint(seed: u64) -> Self {
        let mut bench = Self::with_some_bad(seed);
        bench.send_wave();
        bench.run(&[]);
        bench.create("then").unwrap();
        bench.send_wave();
        bench.kill_at("main_landed:2", &[]);
        assert!(bench.record().owes_side_files());
        bench
    }

    fn side_folder(&self, table: &str) -> PathBuf {
        self.folder.path().join("warehouse/demo").join(table).join("data")
    }

    /// Rows of data files in a folder of the warehouse, as text, sorted.
    fn rows_of(&self, files: &[PathBuf]) -> Vec<String> {
        let mut rows = Vec::new();
        for file in files {
            let reader = ParquetRecordBatchReaderBuilder::try_new(fs::File::open(file).unwrap()).unwrap();
            for batch in reader.build().unwrap() {
                let batch = batch.unwrap();
                let shown = FormatOptions::default();
                let cells =
                    batch.columns().iter().map(|column| ArrayFormatter::try_new(column, &shown).unwrap());
                let cells: Vec<_> = cells.collect();
                let text =
                    |row| cells.iter().map(|cell| cell.value(row).to_string()).collect::<Vec<_>>().join("|");
                rows.extend((0..batch.num_rows()).map(text));
            }
        }
        rows.sort();
        rows
    }

    /// Data files that the last microbatch owes a side table.
    fn owed(&self, role: &str) -> Vec<PathBuf> {
        let named = self.record().sides[role].files.clone().unwrap();
        let named = serde_json::to_string(&named).unwrap();
        let folder = self.side_folder(match role {
            "late" => "notifications_late",
            _ => "notifications_dead_letters",
        });
        let is_named = |path: &PathBuf| named.contains(path.file_name().unwrap().to_str().unwrap());
        let files: Vec<PathBuf> = files_below(&folder).into_iter().filter(is_named).collect();
        assert!(!files.is_empty());
        files
    }

    fn reread(&self, sets: &[&str]) -> Result<Reread, Stop> {
        self.runtime.block_on(sides::reread(&self.load(sets), &options(), &yes))
    }

    fn move_offsets(&self, command: OffsetCommand, sets: &[&str]) -> Result<Moved, Stop> {
        let (loaded, options) = (self.load(sets), options());
        self.runtime.block_on(pipeline::move_offsets(&loaded, &options, command, &yes))
    }

    fn accept_loss(&self, sets: &[&str]) -> Moved {
        self.move_offsets(OffsetCommand::AcceptLoss, sets).unwrap()
    }

    /// What commits of kind change say of themselves, oldest first.
    fn changes(&self) -> Vec<(String, String)> {
        let table = self.table();
        let mut snapshots: Vec<_> = table.metadata().snapshots().collect();
        snapshots.sort_by_key(|snapshot| snapshot.sequence_number());
        let said = snapshots.iter().filter_map(|snapshot| {
            let text = snapshot.summary().additional_properties.get("tidemill.change")?;
            let change: ledger::Change = serde_json::from_str(text).unwrap();
            Some((change.by, change.what))
        });
        said.collect()
    }

    /// Lets another hand write into the ledger's property.
    fn tamper(&self, change: impl FnOnce(&mut Value)) {
        let mut record = serde_json::to_value(self.record()).unwrap();
        change(&mut record);
        self.edit_property(Some(record.to_string()));
    }
}

/// An owner that sleeps over letters which it found whole, and a command of another machine that stands at a point after
/// they were deleted; the owner goes on from there, then the command. Gives how the command ended.
fn sleeps_over(bench: &Bench, command: &[&str], point: &str) -> ExitStatus {
    let owed = bench.owed("dead_letters");
    let sleeper = bench.start("TIDEMILL_STOP_AT", "side_files_looked_up:1", &[]);
    stopped(&sleeper);
    delete(&owed);
    let (job, elsewhere) = (bench.job_path(), bench.other_state());
    let more = [job.to_str().unwrap(), "--yes", "--takeover", "--set", &elsewhere];
    let command: Child = start("TIDEMILL_STOP_AT", point, &[command, &more].concat());
    stopped(&command);
    wake(&sleeper);
    assert_eq!(ended(sleeper).code(), Some(i32::from(Reason::Fenced.exit_code())));
    wake(&command);
    ended(command)
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}

fn delete(files: &[PathBuf]) {
    files.iter().for_each(|file| fs::remove_file(file).unwrap());
}

#[test]
fn letters_that_are_gone_are_written_again_as_they_were() {
    let mut bench = Bench::in_debt(31, &[]);
    let letters_before = bench.letters().len() as u64;
    let owed = bench.owed("dead_letters");
    let rows = bench.rows_of(&owed);
    delete(&owed);
    let stop = bench.stop(&[]);
    assert_eq!(stop.reason, Reason::SideFilesLost);
    assert!(stop.way_out.contains("tidemill side reread job.toml"), "{}", stop.way_out);
    let done = bench.reread(&[]).unwrap();
    assert_eq!((done.batch, done.rows), (2, rows.len() as u64));
    let folder = bench.side_folder("notifications_dead_letters");
    let (again, other): (Vec<_>, Vec<_>) = files_below(&folder)
        .into_iter()
        .partition(|file| bench.rows_of(std::slice::from_ref(file))[0].ends_with("|2"));
    assert_eq!(bench.rows_of(&again), rows, "batch, places, reasons and bytes are those that were lost");
    assert_eq!(bench.rows_of(&other).len() as u64, letters_before);
    assert!(bench.record().released && !bench.record().owes_side_files());
    bench.assert_exact();
    bench.send_wave();
    bench.run(&[]);
    bench.assert_exact();
    assert_eq!(bench.reread(&[]).unwrap(), Reread { table: None, batch: 3, rows: 0 }, "nothing is owed");
}

#[test]
fn a_kill_while_letters_are_written_again_leaves_the_debt_or_pays_it() {
    for point in ["main_sent:2", "other_files_owed:1"] {
        let bench = Bench::in_debt(32, &[]);
        delete(&bench.owed("dead_letters"));
        let job = bench.job_path();
        bench.kill_command_at(point, &["side", "reread", job.to_str().unwrap(), "--yes"]);
        if point == "main_sent:2" {
            assert_eq!(bench.stop(&[]).reason, Reason::SideFilesLost, "nothing names the new files");
            bench.reread(&[]).unwrap();
        }
        bench.run(&[]);
        bench.assert_exact();
    }
}

#[test]
fn an_owner_that_wakes_brings_no_files_that_were_written_again_or_given_up() {
    for (seed, command) in [(37, &["side", "reread"][..]), (38, &["accept-loss"][..])] {
        let bench = Bench::in_debt(seed, &[]);
        let before = bench.letters();
        // Main names other files, and the side table has none yet.
        assert!(sleeps_over(&bench, command, "other_files_owed:1").success());
        let record = bench.record();
        assert!(record.released && !record.owes_side_files());
        // That they can be read is what is asked: a file that is named and gone fails every look from then on.
        let letters = bench.letters();
        match command {
            ["accept-loss"] => assert_eq!(letters, before),
            _ => bench.assert_exact(),
        }
    }
}

#[test]
fn letters_that_came_before_their_table_was_fenced_are_not_written_again_beside_them() {
    let bench = Bench::in_debt(39, &[]);
    let ended = sleeps_over(&bench, &["side", "reread"], "fenced:1");
    assert_eq!(ended.code(), Some(i32::from(Reason::SideFilesLost.exit_code())));
    let record = bench.record();
    assert!(record.released && bench.changes().is_empty(), "no other files were named: {record:?}");
}

#[test]
fn letters_that_are_gone_are_given_up_by_name_and_the_job_goes_on() {
    let mut bench = Bench::in_debt(33, &[]);
    let letters = bench.letters();
    let owed = bench.owed("dead_letters");
    let rows = bench.rows_of(&owed).len() as u64;
    delete(&owed);
    assert_eq!(bench.stop(&[]).reason, Reason::SideFilesLost);
    let moved = bench.accept_loss(&[]);
    let table = "demo.notifications_dead_letters".to_owned();
    let loss = SideLoss { table, batch: 2, rows: Some(rows), keys_stay_seen: false };
    assert_eq!((moved.jumps.len(), &moved.side_losses), (0, &vec![loss.clone()]));
    let stated = bench.changes();
    assert_eq!(stated, [("accept-loss".to_owned(), loss.to_string())], "the ledger says what was given up");
    assert_eq!(bench.letters(), letters);
    assert!(bench.record().released && !bench.record().owes_side_files());
    bench.send_wave();
    let counts = bench.run(&[]).counts;
    assert_eq!(bench.letters().len() as u64, letters.len() as u64 + counts.dead_letter);
    assert_eq!(bench.rows_by("event_type"), bench.generator.truth().distinct_by_type, "main lost nothing");
}

#[test]
fn letters_that_are_gone_with_their_cluster_are_given_up_before_offsets_are_rebased() {
    let bench = Bench::in_debt(40, &[]);
    delete(&bench.owed("dead_letters"));
    let rows = bench.rows_by("event_type");
    let mut again = Bench::with_some_bad(40);
    again.send_wave();
    let other = [format!("source.kafka.properties.\"bootstrap.servers\"={}", again.broker.bootstrap())];
    let other: Vec<&str> = other.iter().map(String::as_str).collect();
    let is_another_log = |stop: Stop| {
        assert!(matches!(stop.reason, Reason::ClusterChanged | Reason::TopicChanged), "{stop:?}");
        assert!(stop.way_out.contains("tidemill rebase-offsets job.toml"), "{}", stop.way_out);
    };
    is_another_log(bench.stop(&other));
    let refused = bench.move_offsets(OffsetCommand::Rebase, &other).unwrap_err();
    assert_eq!(refused.reason, Reason::SideFilesLost);
    assert!(refused.way_out.contains("tidemill accept-loss job.toml"), "{}", refused.way_out);
    let cursors = bench.record().live().clone();
    let moved = bench.accept_loss(&other);
    assert_eq!((moved.jumps.len(), moved.side_losses.len()), (0, 1));
    assert_eq!(bench.record().live(), &cursors, "no offset moved");
    is_another_log(bench.stop(&other));
    is_another_log(bench.move_offsets(OffsetCommand::AcceptLoss, &other).unwrap_err());
    bench.move_offsets(OffsetCommand::Rebase, &other).unwrap();
    let counts = bench.run(&other).counts;
    assert_eq!((counts.written, bench.rows_by("event_type")), (0, rows), "every event was seen before");
}

#[test]
fn a_list_of_side_files_that_is_gone_with_its_property_is_given_up_by_name() {
    let bench = Bench::in_debt(34, &[]);
    bench.edit_property(None);
    let stop = bench.stop(&[]);
    assert_eq!(stop.reason, Reason::SideFilesLost);
    assert!(stop.way_out.contains("tidemill accept-loss job.toml"), "{}", stop.way_out);
    assert!(
        bench.reread(&[]).unwrap_err().what.contains("the list that says how many rows they held is gone")
    );
    assert_eq!(bench.accept_loss(&[]).side_losses[0].rows, None);
    bench.run(&[]);
    assert!(bench.record().released);
}

#[test]
fn a_restore_leaves_the_list_of_side_files_to_who_puts_its_property_back() {
    let bench = Bench::in_debt_since_a_savepoint(40);
    let property = bench.table().metadata().properties()[ledger::PROPERTY].clone();
    bench.edit_property(None);
    let stop = bench.restore("then", &[]).unwrap_err();
    assert_eq!(stop.reason, Reason::SideFilesLost, "{stop:?}");
    bench.edit_property(Some(property));
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn files_that_are_gone_concern_nobody_who_goes_back_to_before_their_batch() {
    let bench = Bench::in_debt_since_a_savepoint(42);
    delete(&bench.owed("dead_letters"));
    bench.restore("then", &[]).unwrap();
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn files_that_are_put_back_while_a_command_asks_are_brought_by_it() {
    for (seed, command) in [(43, "side reread"), (44, "accept-loss")] {
        let bench = Bench::in_debt(seed, &[]);
        let owed: Vec<_> =
            bench.owed("dead_letters").into_iter().map(|path| (fs::read(&path).unwrap(), path)).collect();
        owed.iter().for_each(|(_, path)| fs::remove_file(path).unwrap());
        let put_back = |_: &str| {
            owed.iter().for_each(|(content, path)| fs::write(path, content).unwrap());
            Ok(())
        };
        let (loaded, options) = (bench.load(&[]), options());
        if command == "side reread" {
            let done = bench.runtime.block_on(sides::reread(&loaded, &options, &put_back)).unwrap();
            assert_eq!(done, Reread { table: None, batch: 2, rows: 0 });
        } else {
            let moving = pipeline::move_offsets(&loaded, &options, OffsetCommand::AcceptLoss, &put_back);
            assert!(bench.runtime.block_on(moving).unwrap().is_nothing());
        }
        assert!(bench.changes().is_empty() && bench.record().released, "{command}");
        bench.run(&[]);
        bench.assert_exact();
    }
}

#[test]
fn letters_are_written_again_although_a_topic_had_left_the_job_before_them() {
    let mut bench = Bench::with_some_bad(41);
    bench.send_wave();
    bench.run(&[]);
    let fewer = ["source.kafka.topics=[\"n.generated\", \"n.sent\", \"n.delivered\"]"];
    bench.send_wave();
    bench.kill_at("main_landed:2", &fewer);
    let of_its_own = |cursor: &ledger::Cursor| cursor.start != cursor.end;
    assert!(bench.record().cursor("n.clicked", 0).is_some_and(of_its_own));
    delete(&bench.owed("dead_letters"));
    bench.reread(&fewer).unwrap();
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn letters_are_not_written_again_where_they_might_be_others() {
    let bench = Bench::in_debt(35, &[]);
    let (letters, record) = (bench.letters(), bench.record());
    let owed = bench.owed("dead_letters");
    let rows = bench.rows_of(&owed).len();
    delete(&owed);
    let refused = |sets: &[&str], why: &str| {
        let files = files_below(&bench.side_folder("notifications_dead_letters"));
        let stop = bench.reread(sets).unwrap_err();
        assert_eq!(stop.reason, Reason::SideFilesLost);
        assert!(stop.what.contains(why), "{}", stop.what);
        assert!(stop.way_out.contains("tidemill accept-loss job.toml"), "{}", stop.way_out);
        assert_eq!(
            files_below(&bench.side_folder("notifications_dead_letters")),
            files,
            "nothing is left behind"
        );
    };
    refused(&["decode.unknown_fields=dead_letter"], "the job was changed since");
    let taken = record.counts.consumed;
    bench.tamper(|record| record["counts"]["consumed"] = (taken + 1).into());
    refused(&[], &format!("it took {} rows, and there are {taken} now", taken + 1));
    let mut cut_short = (String::new(), 0);
    bench.tamper(|now| {
        now["counts"]["consumed"] = taken.into();
        let partitions = now["lanes"]["live"]["topics"].as_object_mut().unwrap().iter_mut();
        for (topic, partitions) in partitions {
            let Some(cursor) = partitions.get_mut("0").filter(|cursor| cursor["start"] != cursor["end"])
            else {
                continue;
            };
            let hash = cursor["tail"]["hash"].as_u64().unwrap();
            cursor["tail"]["hash"] = (hash ^ 1).into();
            cut_short = (topic.clone(), hash);
            return;
        }
    });
    let (topic, hash) = cut_short;
    refused(&[], &format!("the last record of {topic}[0] is not the one that it read"));
    bench.tamper(|now| now["lanes"]["live"]["topics"][&topic]["0"]["tail"]["hash"] = hash.into());
    bench.tamper(|now| {
        let named = &mut now["sides"]["dead_letters"]["files"][0]["rows"];
        *named = (named.as_u64().unwrap() + 1).into();
    });
    refused(&[], &format!("it owed {} rows, and {rows} come of its records now", rows + 1));
    assert_eq!(bench.letters(), letters);
}

#[test]
fn late_rows_that_are_gone_are_not_guessed_and_are_given_up_with_their_keys() {
    let bench = Bench::in_debt(36, &LATE);
    delete(&bench.owed("late"));
    let stop = bench.stop(&LATE);
    assert_eq!(stop.reason, Reason::SideFilesLost);
    assert!(!stop.way_out.contains("side reread"), "{}", stop.way_out);
    let stop = bench.reread(&LATE).unwrap_err();
    assert!(stop.what.contains("depends on the state before its batch, which is not kept"), "{}", stop.what);
    let late = bench.record().counts.late_side;
    let moved = bench.accept_loss(&LATE);
    assert_eq!(moved.side_losses.len(), 1);
    assert_eq!((moved.side_losses[0].rows, moved.side_losses[0].keys_stay_seen), (Some(late), true));
    assert_eq!(bench.run(&LATE).batches, 0);
    assert_eq!(
        bench.letters().len() as u64,
        bench.generator.truth().bad_total(),
        "letters came in all the same"
    );
    let keys = bench.record().dedup.keys;
    let accepting: Vec<&str> = LATE.into_iter().chain(["dedup.on_missing_keys=accept"]).collect();
    let (loaded, options) = (bench.load(&accepting), options());
    let mut heard = Unheard;
    let rebuilding = commands::rebuild_state(&loaded, &options, true, &mut heard);
    let rebuilt = bench.runtime.block_on(rebuilding).unwrap();
    assert_eq!(rebuilt.state.keys, keys - late, "from then on their events come in again");
}
