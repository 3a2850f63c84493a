//! A small world explored completely: two writers, three microbatches, and every order in which requests are sent and
//! applied, replies come, lie or stay away, and writers crash and start again.
//!
//! A path is a list of moves; it is run again from the start for each branch, because a life can not be copied. Worlds
//! that were met before are not gone into again: what a life will do is decided by what it has been told.
//!
//! Bounds: a number of crashes, and of replies that say "connection closed" whatever was done; a request may arrive at any
//! time after it was sent, or never. `TIDEMILL_MODEL_FULL=1` takes more of both, and hours.

use std::cell::RefCell;
use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use super::oracles;
use super::process::{Command, Orders, live, main_ident, side_ident};
use super::universe::{Choices, Event, EventKind, Folder, Shared, Universe};
use crate::commit::side::Role;
use crate::stop::Stop;

const WRITERS: usize = 2;
const BATCHES: usize = 3;

/// How often a writer crashes, and how often one is told that a connection closed.
#[derive(Debug, Clone, Copy)]
struct Limits {
    crashes: u32,
    lies: u32,
}

/// What may happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    /// A writer goes on to the next place where others are concerned.
    Step(usize),
    /// The catalog serves the request of this number.
    Serve(u64),
    /// A writer gets its reply: what became of the request, or "connection closed".
    Reply(usize, bool),
    /// A writer dies, and its successor starts.
    Crash(usize),
    /// Both writers have ended, and what is under way never arrives.
    End,
}

/// A life on its way.
type Running = Pin<Box<dyn Future<Output = Result<(), Stop>>>>;

/// A writer: its process, and what may still happen to it.
struct Writer {
    process: usize,
    life: Option<Running>,
    /// How often it went on.
    steps: u64,
}

struct Model {
    shared: Shared,
    writers: Vec<Writer>,
    /// What may still go wrong.
    left: Limits,
    is_over: bool,
}

fn orders() -> Orders {
    // Who may start is politeness and would only hide orders; the fence is what is explored.
    Orders {
        command: Command::Run,
        folder: 0,
        takeover: true,
        ignore_rows: false,
        replay: false,
        skew_ms: 0,
        batch_events: 1,
        follows: false,
        keeps_up: false,
    }
}

/// Runs a life alone to its end.
fn run_alone(shared: &Shared, process: usize) -> Result<(), Stop> {
    let mut life = Box::pin(live(Rc::clone(shared), process, orders()));
    loop {
        if let Poll::Ready(outcome) = life.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return outcome;
        }
    }
}

/// A table that has its ledger and nothing read yet, and a log of three microbatches, one a dead letter.
fn beginning() -> Universe {
    let mut universe = Universe::new(Choices::First);
    universe.folders.push(Folder { is_lock_broken: true, ..Folder::default() });
    universe.log.partitions[0].records.push(None);
    let shared = Rc::new(RefCell::new(universe));
    run_alone(&shared, 100).expect("an empty log is read");
    let mut universe = Rc::into_inner(shared).expect("the life has ended").into_inner();
    for key in 0..BATCHES as u32 {
        universe.log.partitions[0].records.push(Some(Event { key, kind: EventKind::OnTime }));
    }
    universe.is_coarse = true;
    universe
}

impl Model {
    fn new(beginning: &Universe, limits: Limits) -> Self {
        let shared = Rc::new(RefCell::new(beginning.clone()));
        let writer = |process| Writer {
            process,
            life: Some(Box::pin(live(Rc::clone(&shared), process, orders()))),
            steps: 0,
        };
        let writers = (0..WRITERS).map(writer).collect();
        Self { shared, writers, left: limits, is_over: false }
    }

    fn moves(&self) -> Vec<Move> {
        let universe = self.shared.borrow();
        let mut moves = Vec::new();
        if self.is_over {
            return moves;
        }
        for (at, writer) in self.writers.iter().enumerate().filter(|(_, writer)| writer.life.is_some()) {
            match universe.awaiting.get(&writer.process) {
                None => moves.push(Move::Step(at)),
                Some(request) => {
                    if universe.served.contains_key(request) {
                        moves.push(Move::Reply(at, true));
                    }
                    if self.left.lies > 0 {
                        moves.push(Move::Reply(at, false));
                    }
                    // At any other place a crash leaves what it leaves here before the reply, or after the request before.
                    if self.left.crashes > 0 {
                        moves.push(Move::Crash(at));
                    }
                }
            }
        }
        if moves.is_empty() {
            moves.push(Move::End);
        }
        moves.extend(universe.flights.iter().map(|flight| Move::Serve(flight.number)));
        moves
    }

    fn perform(&mut self, next: Move) {
        match next {
            Move::Step(at) => self.poll(at),
            Move::Serve(number) => {
                let universe = &mut *self.shared.borrow_mut();
                let at = universe.flights.iter().position(|flight| flight.number == number);
                let flight = universe.flights.remove(at.expect("it is under way"));
                let has_landed = universe.apply(&flight).is_ok();
                universe.served.insert(number, has_landed);
            }
            Move::Reply(at, is_true) => {
                let process = self.writers[at].process;
                self.left.lies -= u32::from(!is_true);
                self.shared.borrow_mut().grants.insert(process, is_true);
                self.poll(at);
            }
            Move::Crash(at) => {
                let writer = &mut self.writers[at];
                self.shared.borrow_mut().awaiting.remove(&writer.process);
                writer.process += WRITERS;
                writer.steps = 0;
                self.left.crashes -= 1;
                writer.life = Some(Box::pin(live(Rc::clone(&self.shared), writer.process, orders())));
            }
            Move::End => self.finish(),
        }
    }

    fn poll(&mut self, at: usize) {
        let writer = &mut self.writers[at];
        let Some(life) = &mut writer.life else { return };
        writer.steps += 1;
        if life.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_ready() {
            writer.life = None;
        }
    }

    /// Once everybody is gone a fresh start reads what is left.
    fn finish(&mut self) {
        self.is_over = true;
        {
            let mut universe = self.shared.borrow_mut();
            universe.flights.clear();
            universe.is_coarse = false;
        }
        for process in [200, 201] {
            if let Err(stop) = run_alone(&self.shared, process) {
                self.shared.borrow_mut().broken(format!("a fresh start stops: {}", stop.what));
            }
        }
        oracles::judge_end(&mut self.shared.borrow_mut());
    }

    /// What decides everything that may still happen.
    fn fingerprint(&self) -> u128 {
        let universe = self.shared.borrow();
        let mut words: Vec<u64> = Vec::new();
        let sides = Role::ALL.map(side_ident);
        for ident in std::iter::once(main_ident()).chain(sides) {
            words.push(universe.tables[&ident].metadata.current_snapshot_id().unwrap_or(0) as u64);
        }
        words.push(universe.folders[0].owners.iter().map(|(_, epoch)| *epoch).max().unwrap_or(0));
        for writer in &self.writers {
            let process = writer.process;
            words.extend([process as u64, u64::from(writer.life.is_some()), writer.steps]);
            words.push(universe.learnt.get(&process).copied().unwrap_or(0));
            let awaited = universe.awaiting.get(&process).copied();
            words.push(awaited.unwrap_or(0));
            words.push(
                awaited.and_then(|request| universe.served.get(&request)).map_or(2, |landed| *landed as u64),
            );
        }
        let mut under_way: Vec<u64> = universe.flights.iter().map(|flight| flight.number).collect();
        under_way.sort_unstable();
        words.extend(under_way);
        words.extend([u64::from(self.left.crashes), u64::from(self.left.lies), u64::from(self.is_over)]);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        xxhash_rust::xxh3::xxh3_128(&bytes)
    }
}

/// What an exploration met.
#[derive(Debug, Default, Clone, Copy)]
struct Explored {
    worlds: usize,
    moves: u64,
    ends: u64,
}

fn explore(beginning: &Universe, limits: Limits) -> Explored {
    let mut explored = Explored::default();
    let mut met = HashSet::new();
    // For each move of the path: which of how many.
    let mut path: Vec<(usize, usize)> = Vec::new();
    loop {
        let mut model = Model::new(beginning, limits);
        let mut told = Vec::new();
        for (choice, _) in &path {
            let next = model.moves()[*choice];
            told.push(next);
            model.perform(next);
        }
        loop {
            if let Some(violation) = model.shared.borrow_mut().violation.take() {
                panic!("{violation}\nby the moves {told:?}");
            }
            let moves = model.moves();
            if !met.insert(model.fingerprint()) || moves.is_empty() {
                break;
            }
            path.push((0, moves.len()));
            explored.moves += moves.len() as u64;
            explored.ends += u64::from(moves[0] == Move::End);
            told.push(moves[0]);
            model.perform(moves[0]);
        }
        loop {
            match path.pop() {
                None => {
                    explored.worlds = met.len();
                    return explored;
                }
                Some((choice, width)) if choice + 1 < width => {
                    path.push((choice + 1, width));
                    break;
                }
                Some(_) => {}
            }
        }
    }
}

fn explored(crashes: u32, lies: u32) {
    let begun = std::time::Instant::now();
    let explored = explore(&beginning(), Limits { crashes, lies });
    let Explored { worlds, moves, ends } = explored;
    println!(
        "{crashes} crashes, {lies} lies: {worlds} worlds, {moves} moves, {ends} ends in {:.1} s",
        begun.elapsed().as_secs_f64()
    );
    crate::figures::leave(
        &format!("model-{crashes}-{lies}"),
        &serde_json::json!({"crashes": crashes, "lies": lies, "worlds": worlds, "moves": moves, "ends": ends}),
    );
    assert!(ends > 100, "too few orders to prove anything: {explored:?}");
}

#[test]
fn two_writers_and_three_batches_in_every_order_leave_each_key_once() {
    explored(0, 0);
    if std::env::var_os("TIDEMILL_MODEL_FULL").is_some() {
        for (crashes, lies) in [(1, 1), (2, 0), (0, 2), (2, 1)] {
            explored(crashes, lies);
        }
    }
}

#[test]
fn two_writers_of_whom_one_crashes_anywhere_leave_each_key_once() {
    explored(1, 0);
}

#[test]
fn two_writers_of_whom_one_is_lied_to_anywhere_leave_each_key_once() {
    explored(0, 1);
}
