//! The real program dies or stops at a named point, and another start goes on.
//!
//! The program is a process of its own beside the in-process broker, so that what it held in memory is truly gone.

use std::process::{Child, Command, ExitStatus, Stdio};

use tidemill::commit::ledger::Kind;

use super::*;
use crate::wait;

impl Bench {
    /// Starts the program with one variable of `src/faults.rs` set.
    pub(super) fn start(&self, variable: &str, point: &str, sets: &[&str]) -> Child {
        let job = self.job_path();
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let words: Vec<&str> = ["run", job.to_str().unwrap()].into_iter().chain(sets).collect();
        start(variable, point, &words)
    }

    /// Runs a command of the program until it kills itself at a point.
    pub(super) fn kill_command_at(&self, point: &str, words: &[&str]) {
        killed_at(point, start("TIDEMILL_CRASH_AT", point, words));
    }

    /// Runs the program until it kills itself at a point.
    pub(super) fn kill_at(&self, point: &str, sets: &[&str]) {
        killed_at(point, self.start("TIDEMILL_CRASH_AT", point, sets));
    }

    pub(super) fn other_state(&self) -> String {
        format!("state_dir={}", self.folder.path().join("other").display())
    }
}

/// Starts a command of the program with one variable of `src/faults.rs` set.
pub(crate) fn start(variable: &str, point: &str, words: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_tidemill"))
        .args(words)
        .env(variable, point)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn killed_at(point: &str, child: Child) {
    use std::os::unix::process::ExitStatusExt;
    let status = ended(child);
    assert_eq!(status.signal(), Some(9), "the command ended with {status} and not at {point}");
}

/// Waits for the end of a process.
pub(crate) fn ended(mut child: Child) -> ExitStatus {
    wait::within(|| child.try_wait().unwrap()).unwrap_or_else(|| {
        child.kill().unwrap();
        panic!("the program did not end")
    })
}

/// Waits until a process has stopped itself.
pub(crate) fn stopped(child: &Child) {
    let is_stopped = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        let state = stat.rsplit_once(") ").unwrap().1.chars().next();
        assert_ne!(state, Some('Z'), "the program ended before its point");
        state == Some('T')
    };
    wait::until(is_stopped, || "the program did not reach its point".to_owned());
}

fn signal(child: &Child, name: &str) {
    let sent = Command::new("kill").arg(name).arg(child.id().to_string()).status().unwrap();
    assert!(sent.success());
}

pub(crate) fn wake(child: &Child) {
    signal(child, "-CONT");
}

pub(crate) fn terminate(child: &Child) {
    signal(child, "-TERM");
}

#[test]
fn a_kill_between_main_and_side_table_leaves_a_debt_that_the_next_start_pays() {
    let mut bench = Bench::with_some_bad(21);
    bench.send_wave();
    // The first commit that lands is the fence.
    bench.kill_at("main_landed:2", &[]);
    let record = bench.record();
    assert_eq!((record.batch, record.released, record.owes_side_files()), (1, false, true));
    assert_eq!(bench.letters(), []);
    // Nothing is left to read, and the lock that is free again says that the owner is dead.
    let summary = bench.run(&[]);
    assert_eq!((summary.batches, summary.batch), (0, 1));
    bench.assert_exact();
    bench.send_wave();
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn a_kill_after_the_side_table_followed_adds_no_letter_a_second_time() {
    let mut bench = Bench::with_some_bad(22);
    bench.send_wave();
    bench.kill_at("sides_landed:1", &[]);
    let letters = bench.letters();
    assert_eq!(letters.len() as u64, bench.generator.truth().bad_total());
    bench.run(&[]);
    assert_eq!(bench.letters(), letters);
    bench.assert_exact();
}

#[test]
fn a_kill_before_the_commit_is_sent_leaves_nothing_seen() {
    let mut bench = Bench::with_some_bad(23);
    bench.send_wave();
    bench.kill_at("main_sent:2", &[]);
    assert_eq!((bench.record().batch, bench.letters()), (0, Vec::new()), "main goes first");
    assert_eq!(bench.run(&[]).batch, 1);
    bench.assert_exact();
}

#[test]
fn letters_that_are_owed_and_gone_stop_the_start_by_name() {
    let mut bench = Bench::with_some_bad(24);
    bench.send_wave();
    bench.kill_at("main_landed:2", &[]);
    let Some(owed) = bench.record().sides.values().find_map(|side| side.files.clone()) else {
        panic!("the ledger names no file")
    };
    let named = serde_json::to_string(&owed).unwrap();
    let dead_letters = bench.folder.path().join("warehouse/demo/notifications_dead_letters/data");
    let files: Vec<PathBuf> =
        fs::read_dir(dead_letters).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(!files.is_empty());
    for file in files {
        assert!(named.contains(file.file_name().unwrap().to_str().unwrap()));
        fs::remove_file(file).unwrap();
    }
    assert_eq!(bench.stop(&[]).reason, Reason::SideFilesLost);
}

#[test]
fn a_fence_copies_the_record_but_for_who_may_commit_and_keeps_others_out() {
    let mut bench = Bench::with_some_bad(25);
    bench.send_wave();
    bench.run(&[]);
    let before = bench.record();
    bench.send_wave();
    let elsewhere = bench.other_state();
    bench.kill_at("fenced:1", &[&elsewhere]);
    let after = bench.record();
    let expected = LedgerRecord {
        kind: Kind::Fence,
        epoch: before.epoch + 1,
        sequence: before.sequence + 1,
        released: false,
        owner: after.owner,
        lease_until_ms: after.lease_until_ms,
        attempt: after.attempt,
        ..before.clone()
    };
    assert_eq!(after, expected);
    assert_ne!((after.owner, after.attempt), (before.owner, before.attempt));
    // From this state folder nothing tells that the owner is dead; from its own the free lock does.
    assert_eq!(bench.stop(&[]).reason, Reason::Busy);
    bench.run(&[&elsewhere]);
    bench.assert_exact();
    // An epoch that nothing but the ledger tells: no side table, and no folder of who comes next.
    bench.send_wave();
    bench.kill_at("fenced:1", &[&elsewhere]);
    let fenced = bench.record().epoch;
    let third = format!("state_dir={}", bench.folder.path().join("third").display());
    let takeover = RunOptions { takeover: true, ..RunOptions::default() };
    bench.run_noting(&[&third], takeover).0.unwrap();
    assert_eq!(bench.record().epoch, fenced + 1);
    bench.assert_exact();
}

#[test]
fn an_owner_that_wakes_after_a_takeover_commits_nothing_and_says_that_it_is_fenced() {
    let mut bench = Bench::with_some_bad(26);
    bench.send_wave();
    let sleeper = bench.start("TIDEMILL_STOP_AT", "main_sent:2", &[]);
    stopped(&sleeper);
    let elsewhere = bench.other_state();
    let options = || RunOptions { takeover: true, ..RunOptions::default() };
    bench.run_noting(&[&elsewhere], options()).0.unwrap();
    bench.send_wave();
    bench.run_noting(&[&elsewhere], options()).0.unwrap();
    bench.assert_exact();
    let taken = bench.record();
    assert_eq!((taken.epoch, taken.batch), (3, 2));
    wake(&sleeper);
    assert_eq!(ended(sleeper).code(), Some(i32::from(Reason::Fenced.exit_code())));
    assert_eq!(bench.record(), taken);
    bench.assert_exact();
}

#[test]
fn an_owner_that_wakes_after_a_takeover_does_not_finish_what_its_successor_has_begun() {
    let mut bench = Bench::with_some_bad(28);
    let maintained = ["sink.iceberg.maintenance.every_commits=1", "microbatch.max_records=4000"];
    bench.send_wave();
    // Between two microbatches: what comes next is a look at the tables.
    let sleeper = bench.start("TIDEMILL_STOP_AT", "published:1", &maintained);
    stopped(&sleeper);
    let elsewhere = bench.other_state();
    let options = RunOptions { takeover: true, ..RunOptions::default() };
    bench.run_noting(&[&elsewhere], options).0.unwrap();
    let of_successor = savepoints::leave_intent(&bench.table());
    wake(&sleeper);
    assert_eq!(ended(sleeper).code(), Some(i32::from(Reason::Fenced.exit_code())));
    assert!(of_successor.exists(), "its files may be those of a commit that is on its way");
    bench.assert_exact();
}

#[test]
fn a_column_that_somebody_adds_under_an_open_batch_lets_no_file_of_the_old_schema_in() {
    let mut bench = Bench::with_some_bad(27);
    bench.send_wave();
    let sleeper = bench.start("TIDEMILL_STOP_AT", "main_sent:2", &[]);
    stopped(&sleeper);
    let column = "decode.columns.attribute_app={ type = \"string\", path = \"$.attributes.app\" }";
    let job = bench.load(&[column]).job;
    bench.runtime.block_on(async {
        let catalog = catalog::connect(&job.sink.catalog).await.unwrap();
        let table = bench.table_in(&*catalog).await;
        let additions = schema::compare(&table, &job).unwrap().additions;
        assert_eq!(additions.len(), 1);
        schema::add_columns(&*catalog, &table, &additions).await.unwrap();
    });
    let stood = bench.record();
    wake(&sleeper);
    assert_eq!(ended(sleeper).code(), Some(i32::from(Reason::TableChanged.exit_code())));
    assert_eq!(bench.record().batch, stood.batch, "nothing of the batch is visible");
    bench.run(&[]);
    bench.assert_exact();
}

#[test]
fn letters_that_were_about_to_be_sent_when_another_start_paid_the_debt_stand_once() {
    let mut bench = Bench::with_some_bad(28);
    bench.send_wave();
    // Fence, main, and then the side table: its head is judged, and its request is not sent yet.
    let sleeper = bench.start("TIDEMILL_STOP_AT", "request_to_send:4", &[]);
    stopped(&sleeper);
    assert!(bench.record().owes_side_files());
    let options = RunOptions { takeover: true, ..RunOptions::default() };
    bench.run_noting(&[&bench.other_state()], options).0.unwrap();
    bench.assert_exact();
    wake(&sleeper);
    assert_eq!(ended(sleeper).code(), Some(i32::from(Reason::Fenced.exit_code())));
    bench.assert_exact();
}
