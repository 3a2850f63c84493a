//! One seed: processes, faults and foreign hands in a random order, a person who does what stops say, and calm at the end.

use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};

use super::oracles;
use super::process::{Command, Orders, live, main_ident, side_ident};
use super::universe::{Event, EventKind, File, NO_LEDGER, Named, Partition, Row, Shared, Universe, WORLD};
use crate::commit::ledger::{self, Found, LedgerRecord, PROPERTY};
use crate::commit::side::{Role, inspect, snapshot_of};
use crate::stop::{Reason, Stop};

/// Steps in which things go wrong.
const STEPS_FAULTY: usize = 400;
/// Most steps of one life once nothing goes wrong any more.
const STEPS_CALM_MAX: usize = 4_000;
/// Most starts until everything is drained once nothing goes wrong any more: one for each thing that a person has to mend.
const STARTS_CALM_MAX: usize = 12;
/// Longer than a lease and its grace.
const LEASE_OVER_MS: i64 = 700_000;

/// A process that runs.
struct Process {
    number: usize,
    orders: Orders,
    life: Pin<Box<dyn Future<Output = Result<(), Stop>>>>,
    /// Stopped by a signal, or by a host that sleeps.
    is_frozen: bool,
}

/// See the module.
pub(super) struct Chaos {
    pub(super) shared: Shared,
    processes: Vec<Process>,
    started: usize,
    /// What the next start is told.
    command: Command,
    ignore_rows: bool,
    replay: bool,
    /// Kinds of events that happen in this seed.
    kinds: Vec<Kind>,
    /// Copies of a state folder, as a backup has them.
    backups: Vec<(usize, super::universe::Folder)>,
}

/// What may happen between two steps of processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Kill,
    PowerLoss,
    Freeze,
    HeldArrives,
    HeldVanishes,
    Start,
    Produce,
    Wait,
    ClockStep,
    JobEdit,
    ForeignAppend,
    Compaction,
    ForeignColumn,
    Expiry,
    Rollback,
    Tag,
    MainReplaced,
    MainReplacedInPlace,
    SideReplaced,
    Retention,
    TopicRemade,
    LogTruncated,
    StateLost,
    StateDamaged,
    StateRestored,
    PropertyEdited,
}

/// Every kind, and how often.
const KINDS: [(Kind, usize); 26] = [
    (Kind::Kill, 6),
    (Kind::PowerLoss, 4),
    (Kind::Freeze, 6),
    (Kind::HeldArrives, 8),
    (Kind::HeldVanishes, 1),
    (Kind::Start, 8),
    (Kind::Produce, 10),
    (Kind::Wait, 6),
    (Kind::ClockStep, 3),
    (Kind::JobEdit, 3),
    (Kind::ForeignAppend, 4),
    (Kind::Compaction, 3),
    (Kind::ForeignColumn, 2),
    (Kind::Expiry, 3),
    (Kind::Rollback, 2),
    (Kind::Tag, 2),
    (Kind::MainReplaced, 1),
    (Kind::MainReplacedInPlace, 1),
    (Kind::SideReplaced, 1),
    (Kind::Retention, 1),
    (Kind::TopicRemade, 1),
    (Kind::LogTruncated, 1),
    (Kind::StateLost, 2),
    (Kind::StateDamaged, 2),
    (Kind::StateRestored, 1),
    (Kind::PropertyEdited, 1),
];

impl Chaos {
    pub(super) fn of_seed(seed: u64, traced: bool) -> Self {
        let mut universe = Universe::of_seed(seed);
        universe.trace = traced.then(Vec::new);
        for _ in 0..1 + universe.choose(2) {
            let is_lock_broken = universe.choose(8) == 0;
            universe.folders.push(super::universe::Folder { is_lock_broken, ..Default::default() });
        }
        if universe.choose(2) == 0 {
            universe.log.partitions.push(Partition::default());
        }
        // A seed with few kinds of events goes deeper into them than one with all.
        let weighted = KINDS.iter().filter(|_| universe.choose(2) == 0);
        let mut kinds: Vec<Kind> =
            weighted.flat_map(|(kind, weight)| std::iter::repeat_n(*kind, *weight)).collect();
        kinds.extend([Kind::Start, Kind::Produce, Kind::Kill]);
        Self {
            shared: Rc::new(std::cell::RefCell::new(universe)),
            processes: Vec::new(),
            started: 0,
            command: Command::Run,
            ignore_rows: false,
            replay: false,
            kinds,
            backups: Vec::new(),
        }
    }

    /// Runs the seed to its end.
    ///
    /// # Errors
    /// What was broken.
    pub(super) fn run(&mut self) -> Result<(), String> {
        self.produce();
        for _ in 0..STEPS_FAULTY {
            match self.choose(25) {
                0 => {
                    let kind = self.kinds[self.choose(self.kinds.len())];
                    self.happen(kind);
                }
                _ => self.step(),
            }
            self.judge()?;
        }
        self.calm()
    }

    fn choose(&self, count: usize) -> usize {
        self.shared.borrow_mut().choose(count)
    }

    fn hit(&self, what: &'static str) {
        self.shared.borrow_mut().hit(what);
    }

    fn judge(&self) -> Result<(), String> {
        self.shared.borrow_mut().violation.take().map_or(Ok(()), Err)
    }

    /// One process goes on by a step, or time passes, or a process starts.
    fn step(&mut self) {
        let awake = |process: &Process| {
            let universe = self.shared.borrow();
            let wake = universe.wakes.get(&process.number);
            !process.is_frozen && wake.is_none_or(|wake| *wake <= universe.elapsed_ms)
        };
        let ready: Vec<usize> = (0..self.processes.len()).filter(|at| awake(&self.processes[*at])).collect();
        let is_idle = self.shared.borrow().wakes.is_empty();
        match ready.len() {
            0 if is_idle && !self.processes.is_empty() && self.choose(2) == 0 => self.freeze(),
            0 if is_idle => self.start(),
            0 => self.pass_time(),
            count => {
                let at = ready[self.choose(count)];
                self.poll(at);
            }
        }
    }

    /// Until the next process wakes.
    fn pass_time(&mut self) {
        let universe = &mut *self.shared.borrow_mut();
        let next = universe.wakes.values().copied().filter(|wake| *wake > universe.elapsed_ms).min();
        universe.elapsed_ms = next.unwrap_or(universe.elapsed_ms + 1_000);
    }

    fn poll(&mut self, at: usize) {
        self.shared.borrow_mut().elapsed_ms += 1;
        let process = &mut self.processes[at];
        let polled = process.life.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        if let std::task::Poll::Ready(outcome) = polled {
            self.end(at);
            self.ended(outcome);
        }
    }

    /// Takes a process away, and what the kernel frees with it.
    fn end(&mut self, at: usize) -> Process {
        let process = self.processes.swap_remove(at);
        let universe = &mut *self.shared.borrow_mut();
        universe.wakes.remove(&process.number);
        universe.looked_at.retain(|(by, _)| *by != process.number);
        let folder = &mut universe.folders[process.orders.folder];
        if folder.locked_by == Some(process.number) {
            folder.locked_by = None;
        }
        process
    }

    fn start(&mut self) {
        let folders = self.shared.borrow().folders.len();
        let orders = Orders {
            command: self.command,
            folder: self.choose(folders),
            takeover: self.choose(10) == 0,
            ignore_rows: self.ignore_rows,
            replay: self.replay,
            skew_ms: [0, 0, -30_000, 30_000, 200_000][self.choose(5)],
            batch_events: 1 + self.choose(4) as i64,
            follows: self.choose(3) == 0,
            keeps_up: false,
        };
        if orders.takeover {
            self.hit("start with takeover");
        }
        self.start_with(orders);
    }

    fn start_with(&mut self, orders: Orders) {
        let number = self.started;
        self.started += 1;
        self.shared.borrow_mut().note(format!("process {number} starts: {orders:?}"));
        let life = Box::pin(live(Rc::clone(&self.shared), number, orders));
        self.processes.push(Process { number, orders, life, is_frozen: false });
    }

    /// A process ended by itself: a person reads why, and does what is said.
    fn ended(&mut self, outcome: Result<(), Stop>) {
        let Err(stop) = outcome else {
            self.hit("run done");
            (self.command, self.ignore_rows, self.replay) = (Command::Run, false, false);
            // Rests between runs are of no interest.
            if self.shared.borrow().is_faulty {
                self.produce();
            }
            return;
        };
        self.shared.borrow_mut().note(format!("stop {}: {}", stop.reason.name(), stop.what));
        self.hit(stop.reason.name());
        self.command = Command::Run;
        let universe = &mut *self.shared.borrow_mut();
        match stop.reason {
            // A scheduler starts it again, after a while.
            Reason::Busy => {
                let pause_ms = [1_000, 60_000, LEASE_OVER_MS][universe.choose(3)];
                universe.elapsed_ms += pause_ms;
            }
            Reason::CatalogAway
            | Reason::StorageFailed
            | Reason::OutcomeUnknown
            | Reason::TableChanged
            | Reason::Fenced
            | Reason::NotAuthorized
            | Reason::Interrupted => {}
            Reason::OffsetsLost => self.command = Command::AcceptLoss,
            Reason::TopicChanged | Reason::ClusterChanged => self.command = Command::Rebase,
            // Rows of ours in the late table are of a main table that is gone.
            Reason::TableNotEmpty if universe.content(&side_ident(Role::Late)).rows().next().is_some() => {
                put_back(universe);
            }
            Reason::TableNotEmpty => match universe.content(&main_ident()).record {
                None => self.ignore_rows = true,
                Some(_) => roll_forward(universe),
            },
            // Too much was expired for the tables to go back together.
            Reason::SideNotRestorable => {
                self.replay = false;
                roll_forward(universe);
            }
            Reason::OtherJob if stop.what.contains("claimed by another ledger") => {
                take_claim_back(universe, &stop)
            }
            Reason::KeySpecChanged => set_job_back(universe),
            Reason::OtherJob => {
                put_followed_back(universe);
                take_claim_back(universe, &stop);
                set_job_back(universe);
            }
            // It was meant, or it was not.
            Reason::TableRolledBack if !self.replay && universe.choose(2) == 0 => {
                self.replay = true;
                universe.hit("person lets a rollback be replayed");
            }
            Reason::TableRolledBack => {
                self.replay = false;
                roll_forward(universe);
                set_sides_to_main(universe);
            }
            Reason::TableReplaced | Reason::LedgerLost => put_back(universe),
            // Late rows that are given up leave keys without rows: no oracle here knows of those.
            Reason::SideFilesLost
                if stop.what.contains(&side_ident(Role::DeadLetters).to_string())
                    && universe.choose(2) == 0 =>
            {
                self.command = Command::AcceptLoss;
            }
            Reason::SideFilesLost => {
                for path in universe.sent_paths.clone() {
                    universe.stored.insert(path, true);
                }
                roll_forward(universe);
            }
            _ => universe.broken(format!("an unforeseen stop {}: {}", stop.reason.name(), stop.what)),
        }
    }

    fn happen(&mut self, kind: Kind) {
        match kind {
            Kind::Kill | Kind::PowerLoss => self.crash(kind == Kind::PowerLoss),
            Kind::Freeze => self.freeze(),
            Kind::HeldArrives => self.held_arrives(),
            Kind::HeldVanishes => _ = self.shared.borrow_mut().flights.pop(),
            Kind::Start if self.processes.len() < 3 => self.start(),
            Kind::Start => {}
            Kind::Produce => self.produce(),
            Kind::Wait => {
                let wait = [500, 5_000, 61_000, LEASE_OVER_MS][self.choose(4)];
                self.shared.borrow_mut().elapsed_ms += wait;
            }
            Kind::ClockStep => {
                let step = [-300_000, -90_000, -20_000, 45_000, 3_600_000][self.choose(5)];
                self.shared.borrow_mut().clock_step_ms += step;
                self.hit(if step < 0 { "clock set back" } else { "clock set ahead" });
            }
            Kind::JobEdit => self.edit_job(),
            Kind::TopicRemade | Kind::LogTruncated => self.remake_log(kind),
            Kind::StateLost | Kind::StateDamaged | Kind::StateRestored => self.harm_state(kind),
            Kind::Retention => self.retain(),
            _ => {
                let universe = &mut *self.shared.borrow_mut();
                foreign_hand(universe, kind);
            }
        }
    }

    /// Stops a process, or lets one that was stopped go on.
    fn freeze(&mut self) {
        let count = self.processes.len();
        if count > 0 {
            let at = self.choose(count);
            let process = &mut self.processes[at];
            process.is_frozen = !process.is_frozen;
            let what = if process.is_frozen { "process frozen" } else { "zombie released" };
            self.hit(what);
        }
    }

    /// A process dies; where the power goes, all that run there.
    fn crash(&mut self, loses_power: bool) {
        let count = self.processes.len();
        if count == 0 {
            return;
        }
        if loses_power {
            while self.processes.len() > 1 {
                self.end(0);
            }
        }
        let at = self.choose(self.processes.len());
        let process = self.end(at);
        let universe = &mut *self.shared.borrow_mut();
        universe.note(format!("process {} crashes", process.number));
        universe.hit("process killed");
        if universe.flights.iter().any(|flight| flight.sender == process.number) {
            universe.hit("crash with a request under way");
        }
        if loses_power {
            universe.hit("power lost");
            (0..universe.folders.len()).for_each(|folder| universe.lose_power(folder));
        }
    }

    fn held_arrives(&mut self) {
        let universe = &mut *self.shared.borrow_mut();
        if universe.flights.is_empty() {
            return;
        }
        let at = universe.choose(universe.flights.len());
        let flight = universe.flights.remove(at);
        match universe.apply(&flight) {
            Ok(()) => universe.hit("held request landed"),
            Err(error) => {
                universe.note(format!("held request {} is refused: {error}", flight.number));
                universe.hit("held request refused");
            }
        }
    }

    fn produce(&mut self) {
        let universe = &mut *self.shared.borrow_mut();
        if universe.log.partitions.len() < 3 && universe.choose(30) == 0 {
            universe.log.partitions.push(Partition::default());
            universe.hit("topic partition added");
        }
        for _ in 0..1 + universe.choose(8) {
            let partition = universe.choose(universe.log.partitions.len());
            let event = match universe.choose(20) {
                0 => None,
                1 | 2 => Some(Event { key: 0, kind: EventKind::Bad }),
                3..=9 if universe.next_key > 0 => {
                    let key = universe.choose(universe.next_key as usize) as u32;
                    Some(Event { key, kind: time_of(universe) })
                }
                _ => {
                    universe.next_key += 1;
                    let key = universe.next_key - 1;
                    Some(Event { key, kind: time_of(universe) })
                }
            };
            universe.log.partitions[partition].records.push(event);
        }
    }

    fn edit_job(&mut self) {
        let universe = &mut *self.shared.borrow_mut();
        match universe.choose(6) {
            0..=2 => {
                universe.job.settings += 1;
                universe.hit("job edited: settings");
            }
            3 if universe.job.columns < 3 => {
                universe.job.columns += 1;
                universe.hit("job edited: column added");
            }
            4 => {
                universe.job.key_columns = 1;
                universe.hit("job edited: key changed");
            }
            5 => {
                universe.job.name = "renamed".to_owned();
                universe.hit("job edited: renamed");
            }
            _ => {}
        }
    }

    /// What was read is gone: other logs stand under the name. Processes and requests of before end first, so that what
    /// they took stays what the oracles find.
    fn remake_log(&mut self, kind: Kind) {
        while !self.processes.is_empty() {
            self.end(0);
        }
        let universe = &mut *self.shared.borrow_mut();
        universe.flights.clear();
        if kind == Kind::TopicRemade {
            universe.log.incarnation += 1;
            let count = universe.log.partitions.len();
            universe.log.partitions = vec![Partition::default(); count];
            universe.hit("topic made again");
            if universe.choose(3) == 0 {
                universe.log.cluster += 1;
                universe.hit("cluster changed");
            }
            return;
        }
        let at = universe.choose(universe.log.partitions.len());
        let partition = &universe.log.partitions[at];
        let (low, end) = (partition.low as usize, partition.records.len());
        if end > low {
            let cut = low + universe.choose(end - low);
            universe.log.partitions[at].records.truncate(cut);
            universe.hit("log truncated");
        }
    }

    fn retain(&mut self) {
        let universe = &mut *self.shared.borrow_mut();
        let at = universe.choose(universe.log.partitions.len());
        let partition = &mut universe.log.partitions[at];
        partition.low = (partition.low + 4).min(partition.records.len() as i64);
        universe.hit("retention");
    }

    /// Harm to a folder whose process does not run; a copy is taken now and then, and put back later.
    fn harm_state(&mut self, kind: Kind) {
        let universe = &mut *self.shared.borrow_mut();
        let at = universe.choose(universe.folders.len());
        if universe.folders[at].locked_by.is_some() || universe.folders[at].is_lock_broken {
            return;
        }
        match kind {
            Kind::StateLost => {
                universe.folders[at] = Default::default();
                universe.hit("state folder lost");
            }
            Kind::StateDamaged => {
                let names: Vec<String> = universe.folders[at].files.keys().cloned().collect();
                if !names.is_empty() {
                    let name = &names[universe.choose(names.len())];
                    universe.folders[at].files.get_mut(name).expect("it was listed").is_damaged = true;
                    universe.hit("state file damaged");
                }
            }
            _ => match self.backups.iter().position(|(folder, _)| *folder == at) {
                Some(backup) => {
                    universe.folders[at] = self.backups.swap_remove(backup).1;
                    universe.hit("state folder restored from a copy");
                }
                None => self.backups.push((at, universe.folders[at].clone())),
            },
        }
        universe.folders[at].is_harmed = true;
    }

    /// Nothing goes wrong any more: what runs ends, what is under way arrives, and starts drain everything.
    fn calm(&mut self) -> Result<(), String> {
        self.shared.borrow_mut().note("calm".to_owned());
        self.shared.borrow_mut().is_faulty = false;
        self.processes.iter_mut().for_each(|process| process.is_frozen = false);
        for _ in 0..STEPS_CALM_MAX {
            if self.processes.is_empty() {
                break;
            }
            self.step();
            if self.choose(10) == 0 {
                self.held_arrives();
            }
            self.judge()?;
        }
        while !self.shared.borrow().flights.is_empty() {
            self.held_arrives();
            self.judge()?;
        }
        if !self.processes.is_empty() {
            return Err("a life does not end although nothing goes wrong".to_owned());
        }
        let mut done = 0;
        for _ in 0..STARTS_CALM_MAX {
            self.shared.borrow_mut().elapsed_ms += LEASE_OVER_MS;
            let before = self.shared.borrow().coverage.get("run done").copied();
            let command = self.command;
            let folders = self.shared.borrow().folders.len();
            let folder = self.choose(folders);
            let (ignore_rows, replay) = (self.ignore_rows, self.replay);
            let orders = Orders {
                command,
                folder,
                takeover: false,
                ignore_rows,
                replay,
                skew_ms: 0,
                batch_events: 4,
                follows: false,
                keeps_up: false,
            };
            self.start_with(orders);
            self.finish()?;
            let is_done = self.shared.borrow().coverage.get("run done").copied() != before;
            done = if is_done && command == Command::Run { done + 1 } else { 0 };
            if done == 2 {
                break;
            }
        }
        if done < 2 {
            return Err(format!("{STARTS_CALM_MAX} starts did not drain although nothing goes wrong"));
        }
        oracles::judge_end(&mut self.shared.borrow_mut());
        self.judge()
    }

    /// Runs the only process to its end.
    fn finish(&mut self) -> Result<(), String> {
        for _ in 0..STEPS_CALM_MAX {
            if self.processes.is_empty() {
                return Ok(());
            }
            self.step();
            self.judge()?;
        }
        Err("a life does not end although nothing goes wrong".to_owned())
    }
}

/// The record that a start judges by, on the ancestry or, where others expired that, in the property alone.
fn record_to_go_by(universe: &Universe) -> Option<LedgerRecord> {
    let main = universe.tables.get(&main_ident())?;
    match ledger::inspect(&main.metadata).expect("a ledger of ours") {
        Found::RolledBack { older: Some(older), .. } => Some(*older),
        found => found.record().cloned(),
    }
}

/// The job file is set back to what the ledger says; where there is none yet, to the job that the side tables follow.
fn set_job_back(universe: &mut Universe) {
    match record_to_go_by(universe) {
        Some(record) => {
            let columns = record.dedup.key_spec_hash.rsplit(' ').next();
            universe.job.key_columns = columns.and_then(|text| text.parse().ok()).unwrap_or(0);
            universe.job.name = record.job_name.clone();
        }
        None => {
            let sides = Role::ALL.into_iter().filter_map(|role| universe.tables.get(&side_ident(role)));
            let followed = sides.filter_map(|named| inspect(&named.metadata).expect("a mark of ours")).next();
            if let Some(mark) = followed {
                universe.job.name = mark.job_name;
            }
        }
    }
}

/// A person finds the dropped main table again that the late table under its name follows, where another stands in its
/// place.
fn put_followed_back(universe: &mut Universe) {
    let late = universe.tables.get(&side_ident(Role::Late));
    let Some(mark) = late.and_then(|late| inspect(&late.metadata).expect("a mark of ours")) else { return };
    if record_to_go_by(universe).is_some_and(|record| record.job_id == mark.job_id) {
        return;
    }
    let main = main_ident();
    let job_of = |named: &Named| Some(universe.content_of(&named.best).record?.job_id);
    let is_it =
        |(ident, named): &(iceberg::TableIdent, Named)| *ident == main && job_of(named) == Some(mark.job_id);
    let Some(at) = universe.dropped.iter().position(is_it) else { return };
    let (_, followed) = universe.dropped.swap_remove(at);
    let followed = Named { metadata: Arc::clone(&followed.best), ..followed };
    if let Some(other) = universe.tables.insert(main.clone(), followed) {
        universe.dropped.push((main, other));
    }
    universe.hit("person put the main table of a late one back");
}

/// Most events are on time.
fn time_of(universe: &mut Universe) -> EventKind {
    match universe.choose(8) {
        0 | 1 => EventKind::Late,
        2 => EventKind::Unproven,
        _ => EventKind::OnTime,
    }
}

/// Other engines, and people with them.
fn foreign_hand(universe: &mut Universe, kind: Kind) {
    let main = main_ident();
    let Some(named) = universe.tables.get(&main).cloned() else { return };
    let content = universe.content_of(&named.metadata);
    match kind {
        Kind::ForeignAppend => {
            let number = universe.next_number(WORLD);
            let row = Row { key: number as u32, place: (u32::MAX, 0, 0), batch: None, is_unproven: false };
            let mut files = (*content.files).clone();
            files.push(File { path: format!("foreign/{number}"), rows: Rc::new(vec![row]) });
            universe.foreign_commit(&main, files);
            universe.hit("foreign append");
        }
        Kind::Compaction if content.files.len() > 1 => {
            let rows = content.files.iter().flat_map(|file| file.rows.iter().copied()).collect();
            let path = format!("compacted/{}", universe.next_number(WORLD));
            universe.foreign_commit(&main, vec![File { path, rows: Rc::new(rows) }]);
            universe.hit("foreign compaction");
        }
        Kind::ForeignColumn => {
            let columns = named.metadata.current_schema().as_struct().fields().len();
            if columns < 6 {
                universe.add_column(&main);
                universe.hit("foreign column");
            }
        }
        Kind::Expiry if !is_edited(&named.metadata) => {
            let kept = 1 + universe.choose(3);
            universe.expire(&main, kept);
            for side in Role::ALL.map(side_ident) {
                if universe.tables.contains_key(&side) {
                    // Of the late table now and then enough stays for it to go back with main.
                    let kept = [1, 8][universe.choose(2)];
                    universe.expire(&side, kept);
                }
            }
            universe.hit("snapshots expired");
        }
        Kind::Rollback => {
            let ancestors = std::iter::successors(named.metadata.current_snapshot(), |snapshot| {
                named.metadata.snapshot_by_id(snapshot.parent_snapshot_id()?)
            });
            let ids: Vec<i64> = ancestors.map(|snapshot| snapshot.snapshot_id()).collect();
            let all = named.metadata.snapshots().map(|snapshot| snapshot.snapshot_id());
            let mut beside: Vec<i64> = all.filter(|id| !ids.contains(id)).collect();
            beside.sort_unstable();
            if !beside.is_empty() && universe.choose(3) == 0 {
                // Engines set a table to any snapshot that it has: what a replay left behind, or a tag kept.
                let chosen = beside[universe.choose(beside.len())];
                universe.set_current(&main, chosen);
                universe.hit("table set to a snapshot beside its history");
            } else if ids.len() > 1 {
                let back = 1 + universe.choose((ids.len() - 1).min(5));
                universe.set_current(&main, ids[back]);
                universe.hit("table rolled back");
            }
        }
        Kind::Tag => {
            let late = side_ident(Role::Late);
            let is_late = universe.choose(2) == 1 && universe.tables.contains_key(&late);
            universe.tag(if is_late { &late } else { &main });
        }
        Kind::MainReplacedInPlace if !content.files.is_empty() => universe.replace_in_place(&main),
        Kind::MainReplaced | Kind::SideReplaced => {
            let role = Role::ALL[universe.choose(2)];
            let ident = if kind == Kind::MainReplaced { main } else { side_ident(role) };
            let Some(old) = universe.tables.remove(&ident) else { return };
            universe.dropped.push((ident.clone(), old));
            if universe.choose(2) == 0 {
                universe.create_table(&ident, 1);
            }
            universe.hit("table replaced");
        }
        Kind::PropertyEdited if content.record.is_some() => {
            universe.remove_ledger_property(&main);
            universe.hit("ledger property removed");
        }
        _ => {}
    }
}

/// Whether the ledger stands in summaries alone.
fn is_edited(metadata: &iceberg::spec::TableMetadata) -> bool {
    !metadata.properties().contains_key(PROPERTY)
}

/// A person registers the metadata of the last commit again.
fn roll_forward(universe: &mut Universe) {
    universe.hit("person rolled forward");
    for named in universe.tables.values_mut() {
        named.metadata = Arc::clone(&named.best);
    }
}

/// A person registers a side table again as main's ledger left it, before another ledger claimed it.
fn take_claim_back(universe: &mut Universe, stop: &Stop) {
    let Some(record) = record_to_go_by(universe) else { return };
    for ident in Role::ALL.map(side_ident).into_iter().filter(|ident| stop.what.contains(&ident.to_string()))
    {
        let Some(named) = universe.tables.get_mut(&ident) else { continue };
        let earlier = named.of_ledgers.get(&record.job_id).or_else(|| named.of_ledgers.get(&NO_LEDGER));
        let Some(unclaimed) = earlier else { continue };
        (named.metadata, named.best) = (Arc::clone(unclaimed), Arc::clone(unclaimed));
        universe.hit("person took a claim back");
    }
}

/// A person rolls each side table that went on from another batch than main's back to its last snapshot that main can have
/// had. What main owes it comes again, and what it was given since is read again.
pub(super) fn set_sides_to_main(universe: &mut Universe) {
    // A replay does it itself.
    let Some(record) = record_to_go_by(universe).filter(|record| record.sides_back_to.is_none()) else {
        return;
    };
    let (batch, generation) = (record.batch, record.batch_generation());
    for ident in Role::ALL.map(side_ident) {
        let Some(metadata) = universe.tables.get(&ident).map(|named| Arc::clone(&named.metadata)) else {
            continue;
        };
        let mark = inspect(&metadata).expect("a mark of ours");
        let fits = mark.is_none_or(|mark| mark.job_id != record.job_id || mark.fits(batch, generation));
        let Some(back) = snapshot_of(&metadata, record.job_id, batch, generation).filter(|_| !fits) else {
            continue;
        };
        universe.set_current(&ident, back);
        let named = universe.tables.get_mut(&ident).expect("it was looked at");
        // Where a person left it: not to be rolled forward from.
        named.best = Arc::clone(&named.metadata);
        universe.hit("person set a side table to main's batch");
    }
}

/// A person finds dropped tables again: main with the longest ledger, and the side tables that this ledger names. What
/// was not dropped is registered with its last metadata.
fn put_back(universe: &mut Universe) {
    universe.hit("person put a table back");
    roll_forward(universe);
    let main = main_ident();
    let mut all = std::mem::take(&mut universe.dropped);
    all.extend(universe.tables.iter().map(|(ident, named)| (ident.clone(), named.clone())));
    let record = |named: &Named| universe.content_of(&named.best).record;
    // A late table with rows goes with the ledger that wrote them.
    let fits = |named: &Named| {
        let Some(record) = record(named) else { return true };
        let late = record.sides.get(Role::Late.name()).map(|side| side.uuid);
        let late = all.iter().find(|(_, other)| Some(other.metadata.uuid()) == late);
        late.is_none_or(|(_, late)| {
            let mark = inspect(&late.best).expect("a mark of ours");
            let is_empty = universe.content_of(&late.best).rows().next().is_none();
            is_empty || mark.is_some_and(|mark| mark.job_id == record.job_id)
        })
    };
    let of_main = all.iter().filter(|(ident, named)| *ident == main && fits(named));
    let longest = of_main.max_by_key(|(_, named)| record(named).map_or(0, |record| record.sequence));
    if let Some((_, longest)) = longest.cloned() {
        let ledger = record(&longest);
        for role in Role::ALL {
            let named = ledger.as_ref().and_then(|record| Some(record.sides.get(role.name())?.uuid));
            let is_it = |(ident, other): &&(iceberg::TableIdent, Named)| {
                *ident == side_ident(role) && Some(other.metadata.uuid()) == named
            };
            universe.tables.extend(all.iter().find(is_it).cloned());
        }
        universe.tables.insert(main, Named { metadata: Arc::clone(&longest.best), ..longest });
    }
    // The others are found another time, should the late table turn out to follow one of them.
    all.retain(|(ident, named)| {
        universe.tables.get(ident).is_none_or(|there| there.metadata.uuid() != named.metadata.uuid())
    });
    universe.dropped = all;
}
