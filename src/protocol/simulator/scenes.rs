//! Orders of events that were found once and must stay mended: nothing goes wrong in them but what they say.
//!
//! A scene steps one process at a time to a place that it names, and lets a person or another engine act in between. The
//! oracles judge every request, as in a seed.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use super::chaos::set_sides_to_main;
use super::oracles;
use super::process::{Command, Orders, live, main_ident, side_ident};
use super::universe::{Choices, Event, EventKind, File, Folder, Row, Shared, Universe};
use crate::commit::ledger::{self, Found, Kind, PROPERTY};
use crate::commit::side::Role;
use crate::stop::{Reason, Stop};

/// Most steps of a process to the place that a scene waits for.
const STEPS_MAX: usize = 2_000;
/// Longer than a lease and its grace.
const LEASE_OVER_MS: i64 = 700_000;

/// How a process ended.
type Ended = Result<(), Stop>;

struct Process(Pin<Box<dyn Future<Output = Ended>>>);

struct Scene {
    shared: Shared,
    started: usize,
}

impl Scene {
    fn new() -> Self {
        let mut universe = Universe::new(Choices::First);
        universe.folders.extend([Folder::default(), Folder::default()]);
        Self { shared: Rc::new(std::cell::RefCell::new(universe)), started: 0 }
    }

    /// Starts a process in a state folder, after every lease is over.
    fn start(&mut self, folder: usize, orders: Orders) -> Process {
        let number = self.started;
        self.started += 1;
        self.shared.borrow_mut().elapsed_ms += LEASE_OVER_MS;
        Process(Box::pin(live(Rc::clone(&self.shared), number, Orders { folder, ..orders })))
    }

    /// One step; what the oracles say against it ends the scene.
    fn step(&self, process: &mut Process) -> Option<Ended> {
        let polled = process.0.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        let mut universe = self.shared.borrow_mut();
        assert_eq!(universe.violation.take(), None);
        // Whoever waits, waits for time.
        universe.elapsed_ms += 10;
        match polled {
            Poll::Ready(ended) => {
                // What the kernel frees with a process.
                universe.folders.iter_mut().for_each(|folder| folder.locked_by = None);
                Some(ended)
            }
            Poll::Pending => None,
        }
    }

    /// Lets a process go on until something has happened once more.
    fn until(&self, process: &mut Process, what: &'static str) {
        let count = |shared: &Shared| shared.borrow().coverage.get(what).copied().unwrap_or(0);
        let before = count(&self.shared);
        for _ in 0..STEPS_MAX {
            assert!(self.step(process).is_none(), "the process ended before {what}");
            if count(&self.shared) > before {
                return;
            }
        }
        panic!("{what} never came");
    }

    fn end(&self, mut process: Process) -> Ended {
        (0..STEPS_MAX).find_map(|_| self.step(&mut process)).expect("a life ends")
    }

    /// A start that ends.
    fn run(&mut self, folder: usize, orders: Orders) -> Ended {
        let process = self.start(folder, orders);
        self.end(process)
    }

    /// A world in which such a start of folder 0 has read these events, and stands where something happened first.
    fn with_one_at(what: &'static str, orders: Orders, events: &[(u32, EventKind)]) -> (Self, Process) {
        let mut scene = Self::new();
        scene.produce(events);
        let mut process = scene.start(0, orders);
        scene.until(&mut process, what);
        (scene, process)
    }

    /// A process dies.
    fn kill(&self, process: Process) {
        drop(process);
        let mut universe = self.shared.borrow_mut();
        universe.wakes.clear();
        universe.folders.iter_mut().for_each(|folder| folder.locked_by = None);
    }

    fn produce(&self, events: &[(u32, EventKind)]) {
        let records = &mut self.shared.borrow_mut().log.partitions[0].records;
        records.extend(events.iter().map(|&(key, kind)| Some(Event { key, kind })));
    }

    /// Another main table under the name, empty; gives the one that was there.
    fn replace_main(&self) -> super::universe::Named {
        let mut universe = self.shared.borrow_mut();
        let old = universe.tables.remove(&main_ident()).expect("main is there");
        universe.create_table(&main_ident(), 1);
        old
    }

    fn late_rows(&self) -> Vec<Row> {
        self.shared.borrow().content(&side_ident(Role::Late)).rows().copied().collect()
    }

    fn batch(&self) -> u64 {
        self.shared.borrow().content(&main_ident()).record.expect("a ledger").batch
    }

    fn sequence(&self) -> u64 {
        self.shared.borrow().content(&main_ident()).record.expect("a ledger").sequence
    }

    /// The snapshot of main that carries a microbatch.
    fn snapshot_of_batch(&self, batch: u64) -> i64 {
        let universe = self.shared.borrow();
        let has = |id: &i64| {
            let record = &universe.contents[id].record;
            record.as_ref().is_some_and(|record| record.kind == Kind::Data && record.batch == batch)
        };
        let metadata = &universe.tables[&main_ident()].metadata;
        metadata.snapshots().map(|snapshot| snapshot.snapshot_id()).find(has).expect("it was committed")
    }

    /// Everything is read, and stands where it belongs.
    fn is_whole(&self) {
        let mut universe = self.shared.borrow_mut();
        oracles::judge_end(&mut universe);
        assert_eq!(universe.violation.take(), None);
    }
}

fn orders() -> Orders {
    Orders {
        command: Command::Run,
        folder: 0,
        takeover: false,
        ignore_rows: false,
        replay: false,
        skew_ms: 0,
        batch_events: 4,
        follows: false,
        keeps_up: false,
    }
}

fn ignoring() -> Orders {
    Orders { ignore_rows: true, ..orders() }
}

fn reason(ended: Ended) -> Reason {
    ended.expect_err("it stops").reason
}

const LATE: (u32, EventKind) = (1, EventKind::Late);
const ON_TIME: (u32, EventKind) = (2, EventKind::OnTime);
const BAD: (u32, EventKind) = (0, EventKind::Bad);

#[test]
fn a_ledger_begun_beside_late_rows_of_an_earlier_one_counts_above_them_and_rebuilds_without_them() {
    let mut scene = Scene::new();
    scene.produce(&[LATE, ON_TIME]);
    scene.run(0, orders()).unwrap();
    let earlier = scene.batch();
    scene.replace_main();
    assert_eq!(reason(scene.run(1, orders())), Reason::TableNotEmpty);
    scene.run(1, ignoring()).unwrap();
    assert!(scene.batch() > earlier);
    // Both ledgers took the event: the rows of the first do not count as seen.
    assert_eq!(scene.late_rows().len(), 2);
    scene.shared.borrow_mut().folders[1] = Folder::default();
    scene.produce(&[LATE, (3, EventKind::Late)]);
    scene.run(1, orders()).unwrap();
    assert_eq!(scene.shared.borrow().coverage["state rebuilt"], 1);
    assert_eq!(scene.late_rows().len(), 3);
    scene.is_whole();
}

#[test]
fn late_rows_that_come_after_the_start_table_has_looked_are_not_taken_over_with_their_table() {
    let (mut scene, zombie) = Scene::with_one_at("sides_sent", orders(), &[LATE]);
    scene.replace_main();
    let mut next = scene.start(1, orders());
    scene.until(&mut next, "main_sent");
    assert!(scene.late_rows().is_empty());
    assert_eq!(reason(scene.end(zombie)), Reason::TableReplaced);
    assert_eq!(scene.late_rows().len(), 1);
    assert_eq!(reason(scene.end(next)), Reason::TableChanged);
    // Its ledger has begun, and those rows are not its own.
    assert_eq!(reason(scene.run(1, ignoring())), Reason::TableNotEmpty);
}

#[test]
fn a_zombie_brings_nothing_to_a_late_table_that_another_ledger_has_claimed() {
    let (mut scene, zombie) = Scene::with_one_at("sides_sent", orders(), &[LATE]);
    scene.replace_main();
    let mut next = scene.start(1, orders());
    scene.until(&mut next, "data_files_closed");
    assert_eq!(reason(scene.end(zombie)), Reason::TableReplaced);
    assert!(scene.late_rows().is_empty());
    scene.end(next).unwrap();
    assert_eq!(scene.late_rows().len(), 1);
    scene.is_whole();
}

/// A ledger that owes its late table a row, put back after another one of the job has marked both side tables and written
/// nothing.
fn put_back_with_a_debt() -> Scene {
    let (mut scene, killed) = Scene::with_one_at("sides_sent", orders(), &[LATE]);
    scene.kill(killed);
    let first = scene.replace_main();
    let mut second = scene.start(1, orders());
    scene.until(&mut second, "data_files_closed");
    scene.kill(second);
    scene.shared.borrow_mut().tables.insert(main_ident(), first);
    scene
}

#[test]
fn a_debt_is_paid_although_another_ledger_has_marked_the_late_table_meanwhile() {
    let mut scene = put_back_with_a_debt();
    scene.run(0, orders()).unwrap();
    assert_eq!(scene.late_rows().len(), 1);
    scene.is_whole();
}

#[test]
fn a_debt_is_paid_although_the_mark_that_another_ledger_followed_was_expired() {
    let mut scene = put_back_with_a_debt();
    scene.shared.borrow_mut().expire(&side_ident(Role::Late), 1);
    // It is empty, so it has not got them.
    scene.run(0, orders()).unwrap();
    assert_eq!(scene.late_rows().len(), 1);
    scene.is_whole();
}

#[test]
fn letters_are_not_brought_to_a_table_that_may_have_them_of_another_ledger() {
    let (mut scene, killed) = Scene::with_one_at("sides_sent", orders(), &[BAD, ON_TIME]);
    scene.kill(killed);
    let letters = side_ident(Role::DeadLetters);
    let unclaimed = scene.shared.borrow().tables[&letters].clone();
    let first = scene.replace_main();
    scene.run(1, orders()).unwrap();
    scene.shared.borrow_mut().tables.insert(main_ident(), first);
    let before = scene.sequence();
    let stop = scene.run(0, orders()).unwrap_err();
    assert_eq!((stop.reason, scene.sequence()), (Reason::OtherJob, before), "{stop:?}");
    scene.shared.borrow_mut().tables.insert(letters, unclaimed);
    scene.run(0, orders()).unwrap();
    scene.is_whole();
}

#[test]
fn a_start_that_slept_reads_nothing_where_a_side_table_has_gone_on_from_what_it_fences() {
    let mut scene = Scene::new();
    scene.produce(&[ON_TIME]);
    scene.run(0, orders()).unwrap();
    let head = scene.shared.borrow().tables[&main_ident()].metadata.current_snapshot_id().unwrap();
    scene.produce(&[(3, EventKind::OnTime), LATE]);
    let mut slept = scene.start(1, Orders { batch_events: 1, ..orders() });
    scene.until(&mut slept, "main_sent");
    scene.run(0, orders()).unwrap();
    // Main is rolled back to what it judged, and expired: nothing on main tells.
    {
        let (mut universe, main) = (scene.shared.borrow_mut(), main_ident());
        universe.set_current(&main, head);
        universe.expire(&main, 1);
        universe.remove_ledger_property(&main);
    }
    assert_eq!(reason(scene.end(slept)), Reason::TableRolledBack);
    assert_eq!(scene.batch(), 1);
    set_sides_to_main(&mut scene.shared.borrow_mut());
    scene.run(0, orders()).unwrap();
    scene.is_whole();
}

#[test]
fn a_zombie_of_a_replay_takes_no_late_rows_back_that_its_successor_wrote() {
    let mut scene = Scene::new();
    let one_by_one = Orders { batch_events: 1, ..orders() };
    scene.produce(&[LATE, (3, EventKind::Late)]);
    scene.run(0, one_by_one).unwrap();
    let first = scene.snapshot_of_batch(1);
    scene.shared.borrow_mut().set_current(&main_ident(), first);
    let replaying = Orders { replay: true, ..orders() };
    let mut zombie = scene.start(0, replaying);
    scene.until(&mut zombie, "fenced");
    scene.run(1, replaying).unwrap();
    assert_eq!(scene.late_rows().len(), 2);
    assert_eq!(reason(scene.end(zombie)), Reason::Fenced);
    assert_eq!(scene.late_rows().len(), 2);
    scene.is_whole();
}

#[test]
fn a_living_owner_does_not_go_on_from_a_table_that_was_rolled_back_and_whose_history_was_expired() {
    // Before its next microbatch it loads its tables again, and has judged none of what it finds.
    let (scene, owner) =
        Scene::with_one_at("batch landed", Orders { follows: true, keeps_up: true, ..orders() }, &[ON_TIME]);
    let main = main_ident();
    let parent = {
        let universe = scene.shared.borrow();
        universe.tables[&main].metadata.current_snapshot().unwrap().parent_snapshot_id().unwrap()
    };
    append_and_expire(&scene, Some(parent));
    scene.produce(&[(3, EventKind::OnTime)]);
    assert_eq!(reason(scene.end(owner)), Reason::TableRolledBack);
}

/// Two microbatches, of which the second was rolled back.
fn rolled_back_by_one() -> Scene {
    let mut scene = Scene::new();
    scene.produce(&[ON_TIME]);
    scene.run(0, orders()).unwrap();
    let first = scene.snapshot_of_batch(1);
    scene.produce(&[(3, EventKind::OnTime)]);
    scene.run(0, orders()).unwrap();
    scene.shared.borrow_mut().set_current(&main_ident(), first);
    scene
}

#[test]
fn a_rollback_is_found_where_the_property_is_gone_too() {
    let mut scene = rolled_back_by_one();
    scene.shared.borrow_mut().remove_ledger_property(&main_ident());
    assert_eq!(reason(scene.run(0, orders())), Reason::TableRolledBack);
    scene.run(0, Orders { replay: true, ..orders() }).unwrap();
    assert_eq!(scene.batch(), 2);
    scene.is_whole();
}

#[test]
fn a_rollback_is_found_where_its_snapshots_are_gone_too() {
    let mut scene = rolled_back_by_one();
    scene.shared.borrow_mut().expire(&main_ident(), 1);
    assert_eq!(reason(scene.run(0, orders())), Reason::TableRolledBack);
}

#[test]
fn what_is_older_than_all_that_is_kept_of_the_ancestry_was_expired_and_not_rolled_back() {
    let (mut scene, main) = (Scene::new(), main_ident());
    scene.produce(&[ON_TIME]);
    scene.run(0, orders()).unwrap();
    let mut universe = scene.shared.borrow_mut();
    let files = (*universe.content_of(&universe.tables[&main].metadata).files).clone();
    universe.foreign_commit(&main, files);
    let metadata = universe.edited(&universe.tables[&main].metadata, |text| {
        // A tag keeps the snapshots of ours; what led to them was expired.
        let current = text["current-snapshot-id"].clone();
        let mut snapshots = text["snapshots"].as_array_mut().unwrap().iter_mut();
        let head = snapshots.find(|snapshot| snapshot["snapshot-id"] == current).unwrap();
        head.as_object_mut().unwrap().remove("parent-snapshot-id");
        text["properties"].as_object_mut().unwrap().remove(PROPERTY);
    });
    assert!(matches!(ledger::inspect(&metadata), Ok(Found::Nothing)));
}

#[test]
fn no_ledger_begins_on_a_table_that_was_rolled_back_to_before_its_first() {
    let (mut scene, main) = (Scene::new(), main_ident());
    let ignoring = Orders { ignore_rows: true, ..orders() };
    let before = {
        let mut universe = scene.shared.borrow_mut();
        universe.create_table(&main, 1);
        universe.foreign_commit(&main, Vec::new());
        universe.tables[&main].metadata.current_snapshot_id().unwrap()
    };
    scene.produce(&[ON_TIME]);
    scene.run(0, ignoring).unwrap();
    {
        let mut universe = scene.shared.borrow_mut();
        universe.set_current(&main, before);
        universe.remove_ledger_property(&main);
    }
    // Of a machine without a generation, which would tell too.
    assert_eq!(reason(scene.run(1, ignoring)), Reason::TableRolledBack);
}

#[test]
fn a_zombie_keeps_no_side_table_small_that_its_successor_has_marked() {
    let (mut scene, zombie) =
        Scene::with_one_at("batch landed", Orders { follows: true, keeps_up: true, ..orders() }, &[LATE]);
    scene.produce(&[(3, EventKind::Late)]);
    scene.run(1, orders()).unwrap();
    let head = || {
        let universe = scene.shared.borrow();
        universe.tables[&side_ident(Role::Late)].metadata.current_snapshot_id()
    };
    let marked = head();
    scene.produce(&[(4, EventKind::Late)]);
    assert_eq!(reason(scene.end(zombie)), Reason::Fenced);
    assert_eq!(head(), marked);
}

#[test]
fn a_living_owner_goes_on_where_others_expired_its_record_and_its_rows_are_there() {
    let (scene, mut owner) =
        Scene::with_one_at("batch landed", Orders { follows: true, ..orders() }, &[ON_TIME]);
    // Two commits of others, the first of them expired too: no parent leads to what the owner saw.
    append_and_expire(&scene, None);
    append_and_expire(&scene, None);
    scene.produce(&[(3, EventKind::OnTime)]);
    scene.until(&mut owner, "rows_looked_up");
    scene.until(&mut owner, "batch landed");
    assert_eq!(scene.batch(), 2);
}

/// Another engine appends, to an earlier snapshot if it rolled the table back before, and keeps its own snapshot alone.
fn append_and_expire(scene: &Scene, back_to: Option<i64>) {
    let (mut universe, main) = (scene.shared.borrow_mut(), main_ident());
    if let Some(snapshot) = back_to {
        universe.set_current(&main, snapshot);
    }
    let metadata = Arc::clone(&universe.tables[&main].metadata);
    let mut files = (*universe.content_of(&metadata).files).clone();
    let row = Row { key: 9, place: (u32::MAX, 0, 0), batch: None, is_unproven: false };
    files.push(File { path: format!("foreign/{}", files.len()), rows: Rc::new(vec![row]) });
    universe.foreign_commit(&main, files);
    universe.expire(&main, 1);
}

#[test]
fn files_of_a_batch_that_was_rolled_back_may_land_until_their_table_is_set_back() {
    // So many steps after the fence: around the load, the set-back and its answer, of either table.
    for (kind, steps) in (0..20).flat_map(|steps| [(EventKind::Bad, steps), (EventKind::Late, steps)]) {
        let mut scene = Scene::new();
        scene.produce(&[ON_TIME]);
        scene.run(0, orders()).unwrap();
        let first = scene.snapshot_of_batch(1);
        scene.produce(&[(3, kind)]);
        let mut killed = scene.start(0, orders());
        scene.until(&mut killed, "sides_sent");
        while scene.shared.borrow().flights.is_empty() {
            assert!(scene.step(&mut killed).is_none());
        }
        scene.kill(killed);
        scene.shared.borrow_mut().set_current(&main_ident(), first);
        let replaying = Orders { replay: true, ..orders() };
        let mut next = scene.start(0, replaying);
        scene.until(&mut next, "fenced");
        for _ in 0..steps {
            assert!(scene.step(&mut next).is_none());
        }
        {
            let mut universe = scene.shared.borrow_mut();
            // The eldest; refused once the table was marked.
            let held = universe.flights.remove(0);
            _ = universe.apply(&held);
        }
        // TABLE_CHANGED where the head was loaded before the request landed.
        _ = scene.end(next);
        scene.run(0, replaying).unwrap();
        scene.is_whole();
    }
}
