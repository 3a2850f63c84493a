//! Copies of the dedup state: a start without its state folder takes the newest copy that leads to what the ledger counts.

use tidemill::pipeline::commands;

use super::*;

impl Bench {
    fn copies(&self) -> PathBuf {
        self.folder.path().join("copies")
    }

    fn copy_to(&self) -> String {
        format!("state.copy_to={}", self.copies().display())
    }

    /// Files of the copy that end so.
    fn copied(&self, ending: &str) -> Vec<PathBuf> {
        let Ok(folders) = fs::read_dir(self.copies()) else { return Vec::new() };
        let folder = folders.map(|entry| entry.unwrap().path()).next().unwrap();
        let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<PathBuf> =
            files.filter(|path| path.to_str().is_some_and(|path| path.ends_with(ending))).collect();
        files.sort();
        files
    }

    fn run_copying(&self) -> Vec<String> {
        let (result, notes) = self.run_noting(&[&self.copy_to()], RunOptions::default());
        result.unwrap();
        notes
    }

    fn lose_state(&self) {
        fs::remove_dir_all(self.state_folder()).unwrap();
    }
}

fn says(notes: &[String], words: &str) -> bool {
    notes.iter().any(|note| note.contains(words))
}

#[test]
fn a_start_without_its_state_folder_takes_the_copy_of_its_very_generation() {
    let mut bench = Bench::with_some_bad(81);
    for batch in 1..=4 {
        bench.send_wave();
        let notes = bench.run_copying();
        assert!(says(&notes, &format!("the newest is that of batch {batch}")), "{notes:?}");
        assert_eq!(
            says(&notes, &format!("took the dedup state of batch {}", batch - 1)),
            batch > 1,
            "{notes:?}"
        );
        assert!(!says(&notes, "rebuil"), "{notes:?}");
        bench.assert_exact();
        bench.lose_state();
    }
    let kept = bench.copied(".manifest").len();
    assert!(
        (1..=2).contains(&kept),
        "{kept} copies: the last one, and the one before if it was made in time"
    );
    let record = bench.record();
    assert_eq!(record.change, None, "what is taken whole needs no commit");
}

#[test]
fn a_copy_that_lags_catches_up_from_the_rows_of_later_batches_alone() {
    let mut bench = Bench::with_some_bad(82);
    bench.send_wave();
    bench.run_copying();
    let first = bench.rows_by("event_type").values().sum::<u64>();
    bench.send_wave();
    bench.run(&["microbatch.max_records=3000"]);
    let rows = bench.rows_by("event_type").values().sum::<u64>();
    bench.lose_state();
    bench.send_wave();
    let notes = bench.run_copying();
    assert!(says(&notes, "took the dedup state of batch 1"), "{notes:?}");
    assert!(says(&notes, &format!("with the keys of {} rows of later batches", rows - first)), "{notes:?}");
    assert!(!says(&notes, "rebuilding"), "{notes:?}");
    bench.assert_exact();
}

#[test]
fn a_damaged_copy_is_not_believed() {
    let mut bench = Bench::with_some_bad(83);
    bench.send_wave();
    bench.run_copying();
    let segment = bench.copied(".segment").pop().unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&segment, bytes).unwrap();
    bench.lose_state();
    bench.send_wave();
    let notes = bench.run_copying();
    assert!(
        says(&notes, "no copy of the dedup state") && says(&notes, "rebuilding it from table"),
        "{notes:?}"
    );
    bench.assert_exact();
    assert!(!bench.state_folder().join("arriving").exists());
}

#[test]
fn a_file_that_a_crash_cut_short_in_a_folder_is_copied_once_more() {
    let mut bench = Bench::with_some_bad(86);
    bench.send_wave();
    bench.run_copying();
    let segment = fs::OpenOptions::new().write(true).open(bench.copied(".segment").pop().unwrap()).unwrap();
    segment.set_len(segment.metadata().unwrap().len() / 2).unwrap();
    bench.copied(".manifest").iter().for_each(|manifest| fs::remove_file(manifest).unwrap());
    bench.send_wave();
    bench.run_copying();
    bench.lose_state();
    bench.send_wave();
    let notes = bench.run_copying();
    assert!(says(&notes, "took the dedup state of batch 2") && !says(&notes, "rebuil"), "{notes:?}");
    bench.assert_exact();
}

#[test]
fn the_copy_of_a_batch_that_was_gone_back_from_is_not_believed_and_that_of_a_savepoint_is_there() {
    let mut bench = Bench::with_some_bad(84);
    let options = RunOptions { job_shown: "job.toml".into(), ..RunOptions::default() };
    bench.send_wave();
    bench.run(&[]);
    let loaded = bench.load(&[]);
    let mut notes = Notes::default();
    bench.runtime.block_on(commands::create_savepoint(&loaded, &options, "then", &mut notes)).unwrap();
    for _ in 0..2 {
        bench.send_wave();
        bench.run_copying();
    }
    let go_back = |bench: &Bench| {
        let restored = commands::restore_savepoint(&loaded, &options, "then", &|_| Ok(()));
        bench.runtime.block_on(restored).unwrap();
        bench.lose_state();
    };
    // Cut otherwise the second time: the copy of the former batch 3 has keys of latter batches after 3.
    go_back(&bench);
    let (result, _) = bench.run_noting(&["microbatch.max_records=4000"], RunOptions::default());
    assert!(result.unwrap().batch > 3);
    bench.lose_state();
    bench.send(100);
    let notes = bench.run_copying();
    assert!(says(&notes, "took the dedup state of batch 3") && says(&notes, "not those"), "{notes:?}");
    assert!(says(&notes, "rebuilding it from table"), "{notes:?}");
    bench.assert_exact();
    go_back(&bench);
    let notes = bench.run_copying();
    assert!(says(&notes, "took the dedup state of batch 1") && !says(&notes, "rebuil"), "{notes:?}");
    bench.assert_exact();
}

#[test]
fn copies_that_nobody_needs_are_deleted_and_a_place_that_can_not_be_written_fails_no_run() {
    let mut bench = Bench::with_some_bad(85);
    for _ in 0..3 {
        bench.send_wave();
        let (result, _) =
            bench.run_noting(&[&bench.copy_to(), "microbatch.max_records=700"], RunOptions::default());
        result.unwrap();
        assert!(bench.copied(".manifest").len() <= 2, "{:?}", bench.copied(".manifest"));
    }
    let named = bench.record().dedup.generation.unwrap();
    assert!(bench.copied(".manifest").iter().any(|path| path.to_str().unwrap().contains(&named)));
    let file = bench.folder.path().join("job.toml");
    bench.send_wave();
    let nowhere = format!("state.copy_to={}/below", file.display());
    let (result, notes) = bench.run_noting(&[&nowhere], RunOptions::default());
    result.unwrap();
    assert!(says(&notes, "was not copied"), "{notes:?}");
    bench.assert_exact();
}

#[test]
fn a_copy_is_made_no_faster_than_the_job_allows_and_a_batch_does_not_wait_for_it() {
    let mut bench = Bench::with_some_bad(86);
    bench.send_wave();
    let begun = std::time::Instant::now();
    let rate = "state.copy_rate=\"60 KiB\"";
    bench.run_noting(&[&bench.copy_to(), rate], RunOptions::default()).0.unwrap();
    let bytes: u64 = bench.copied("").iter().map(|path| fs::metadata(path).unwrap().len()).sum();
    assert!(
        begun.elapsed().as_secs_f64() >= 0.9 * bytes as f64 / 61_440.0,
        "{bytes} bytes in {:?}",
        begun.elapsed()
    );
    bench.assert_exact();
}

#[cfg(feature = "faults")]
#[test]
fn a_kill_while_a_copy_is_made_or_taken_leaves_tables_and_copies_that_can_be_gone_on_with() {
    let mut bench = Bench::with_some_bad(87);
    let copying = bench.copy_to();
    for point in [
        "copy_segment_written:1",
        "copy_manifest_written:1",
        "copy_deleted:1",
        "copy_segment_arrived:1",
        "copy_arrived:1",
        "copy_rows_read:1",
    ] {
        bench.send(1_000);
        if point.contains("rows_read") {
            // The copy lags by a batch.
            bench.run(&[]);
            bench.send(1_000);
        }
        let is_taken = point.contains("arrived") || point.contains("rows_read");
        if is_taken {
            bench.lose_state();
        }
        bench.kill_at(point, &[&copying]);
        bench.send(1_000);
        let notes = bench.run_copying();
        assert!(!says(&notes, "rebuilding"), "after {point}: {notes:?}");
        bench.assert_exact();
    }
}
