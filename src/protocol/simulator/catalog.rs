//! The catalog as a process meets it: what it is shown, and every way in which a request or its answer goes wrong.
//!
//! Every call gives the scheduler a turn before it acts, and wherever a real call has a middle: between a request, its
//! application and its reply.

use std::collections::BTreeSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use iceberg::spec::TableMetadata;
use iceberg::{Error, ErrorKind, TableIdent};
use uuid::Uuid;

use super::universe::{File, Flight, Shared};
use crate::protocol::{Answer, Request, Tables};
use crate::stop::{Reason, Stop};

/// Gives the scheduler a turn.
struct Turn(bool);

impl Future for Turn {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<()> {
        match std::mem::replace(&mut self.0, true) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }
}

/// A place where only this process is concerned. In the exhaustive model, which interleaves what others can see, none.
pub(super) async fn turn(shared: &Shared) {
    if !shared.borrow().is_coarse {
        Turn(false).await;
    }
}

/// A place where others are concerned.
pub(super) async fn meet() {
    Turn(false).await;
}

/// A table as it was loaded.
#[derive(Debug, Clone)]
pub(super) struct Loaded(pub(super) Arc<TableMetadata>);

impl Loaded {
    fn snapshot(&self) -> i64 {
        self.0.current_snapshot_id().unwrap_or(0)
    }
}

#[derive(Clone)]
pub(super) struct SimTables {
    pub(super) shared: Shared,
    pub(super) process: usize,
    pub(super) folder: usize,
    pub(super) skew_ms: i64,
}

/// What a catalog says where it says something else than what it did.
fn answer_of(kind: usize) -> (&'static str, Error) {
    match kind {
        0 => (
            "answer: reply lost",
            Error::new(ErrorKind::Unexpected, "connection closed; the commit state is unknown"),
        ),
        1 => {
            ("answer: 409", Error::new(ErrorKind::CatalogCommitConflicts, "one or more requirements failed"))
        }
        2 => {
            ("answer: 5xx", Error::new(ErrorKind::Unexpected, "gateway timeout; the commit state is unknown"))
        }
        3 => ("answer: garbage", Error::new(ErrorKind::DataInvalid, "expected value at line 1 column 1")),
        _ => (
            "answer: throttle",
            Error::new(ErrorKind::Unexpected, "Received response with unexpected status code")
                .with_context("status", "429 Too Many Requests"),
        ),
    }
}

/// As the REST client words a refusal of the principal.
fn forbidden() -> Error {
    Error::new(ErrorKind::Unexpected, "Received response with unexpected status code")
        .with_context("status", "403 Forbidden")
}

impl SimTables {
    pub(super) fn current(&self, table: &TableIdent) -> Option<Loaded> {
        let universe = self.shared.borrow();
        universe.tables.get(table).map(|named| Loaded(Arc::clone(&named.metadata)))
    }

    fn launch(&self, head: &Loaded, request: &Request<File>) -> Flight {
        let now_ms = self.now_ms();
        self.shared.borrow_mut().launch(self.process, self.folder, &head.0, now_ms, request)
    }

    /// The catalog gets a request that is under way, if it still is.
    fn arrive(&self, flight: &Flight) -> Result<(), Error> {
        let mut universe = self.shared.borrow_mut();
        let under_way = universe.flights.iter().position(|other| other.number == flight.number);
        match under_way {
            Some(at) => _ = universe.flights.remove(at),
            None => universe.hit("held request arrived before its reply"),
        }
        match under_way {
            Some(_) => universe.apply(flight),
            None => Err(Error::new(ErrorKind::CatalogCommitConflicts, "it arrived before")),
        }
    }

    /// What this process has been told decides what it does: the exhaustive model knows its state by it.
    fn learn(&self, what: i64) {
        let mut universe = self.shared.borrow_mut();
        let known = universe.learnt.entry(self.process).or_default();
        *known = xxhash_rust::xxh3::xxh3_64_with_seed(&what.to_le_bytes(), *known);
    }

    /// In the exhaustive model a reply comes when the model says so, and says what the model says.
    async fn await_grant(&self, flight: &Flight) -> Answer {
        self.shared.borrow_mut().awaiting.insert(self.process, flight.number);
        let is_true = loop {
            meet().await;
            if let Some(is_true) = self.shared.borrow_mut().grants.remove(&self.process) {
                break is_true;
            }
        };
        self.shared.borrow_mut().awaiting.remove(&self.process);
        let has_landed = self.shared.borrow().served.get(&flight.number).copied();
        self.learn(if is_true { -2 } else { -3 });
        match (is_true, has_landed) {
            (true, Some(true)) => Answer::Done,
            (true, _) => Answer::Failed(answer_of(1).1),
            (false, _) => Answer::Failed(answer_of(0).1),
        }
    }

    fn forget(&self, flight: &Flight) {
        self.shared.borrow_mut().flights.retain(|other| other.number != flight.number);
    }
}

impl Tables for SimTables {
    type Table = Loaded;
    type File = File;

    fn metadata(table: &Loaded) -> &TableMetadata {
        &table.0
    }

    async fn find(&self, table: &TableIdent) -> Result<Option<Loaded>, Stop> {
        meet().await;
        if self.shared.borrow_mut().chance(3) {
            self.shared.borrow_mut().hit("catalog away at start");
            return Err(Stop::new(Reason::CatalogAway, "the catalog is away", "try again"));
        }
        let found = self.current(table);
        self.learn(found.as_ref().map_or(0, Loaded::snapshot));
        Ok(found)
    }

    async fn load(&self, table: &TableIdent) -> Result<Loaded, Box<Error>> {
        meet().await;
        if self.shared.borrow_mut().chance(4) {
            self.shared.borrow_mut().hit("catalog away at reload");
            return Err(Box::new(Error::new(ErrorKind::Unexpected, "Failed to execute http request")));
        }
        let gone = || Box::new(Error::new(ErrorKind::TableNotFound, "no such table"));
        let found = self.current(table);
        self.learn(found.as_ref().map_or(0, Loaded::snapshot));
        found.ok_or_else(gone)
    }

    async fn send(&self, head: &Loaded, request: &Request<File>) -> Answer {
        meet().await;
        match self.current(&request.table) {
            None => return Answer::NotSent(Error::new(ErrorKind::TableNotFound, "no such table")),
            Some(now) if !Arc::ptr_eq(&now.0, &head.0) => {
                self.shared.borrow_mut().hit("head moved before sending");
                self.learn(-1);
                return Answer::HeadMoved;
            }
            Some(_) => {}
        }
        let flight = self.launch(head, request);
        if self.shared.borrow().is_coarse {
            return self.await_grant(&flight).await;
        }
        // From here on the request may arrive whatever becomes of its process.
        turn(&self.shared).await;
        if self.shared.borrow_mut().chance(200) {
            return self.send_badly(&flight).await;
        }
        let outcome = self.arrive(&flight);
        turn(&self.shared).await;
        outcome.map_or_else(Answer::Failed, |()| Answer::Done)
    }

    async fn missing(&self, _: &Loaded, files: &[File]) -> Result<Vec<String>, Box<Error>> {
        turn(&self.shared).await;
        let universe = &mut *self.shared.borrow_mut();
        let (there, gone): (Vec<&File>, Vec<&File>) =
            files.iter().partition(|file| universe.stored.contains_key(&file.path));
        universe.looked_at.extend(there.into_iter().map(|file| (self.process, file.path.clone())));
        Ok(gone.into_iter().map(|file| file.path.clone()).collect())
    }

    fn now_ms(&self) -> i64 {
        self.shared.borrow().now_ms() + self.skew_ms
    }

    async fn wait(&self, time: Duration) {
        if self.shared.borrow().is_coarse {
            return;
        }
        let until = {
            let mut universe = self.shared.borrow_mut();
            let until = universe.elapsed_ms + time.as_millis() as i64;
            universe.wakes.insert(self.process, until);
            until
        };
        turn(&self.shared).await;
        while self.shared.borrow().elapsed_ms < until {
            turn(&self.shared).await;
        }
        self.shared.borrow_mut().wakes.remove(&self.process);
    }

    async fn back_off(&self, sends: u32) {
        let extra = self.shared.borrow_mut().choose(50) as u64;
        self.wait(Duration::from_millis(100 * u64::from(sends) + extra)).await;
    }

    fn new_id(&self) -> Uuid {
        Uuid::from_u128(u128::from(self.shared.borrow_mut().next_number(self.process)))
    }
}

impl SimTables {
    /// A request whose way, work or answer goes wrong.
    async fn send_badly(&self, flight: &Flight) -> Answer {
        let hit = |what| self.shared.borrow_mut().hit(what);
        let kind = self.shared.borrow_mut().choose(9);
        let (name, error) = answer_of(self.shared.borrow_mut().choose(5));
        match kind {
            // Done, and the answer says something else.
            0..=2 => {
                _ = self.arrive(flight);
                hit("request done, answer bad");
            }
            // Under way still: the scheduler lets it arrive later, or never.
            3 | 4 => hit("request held"),
            // Lost on its way.
            5 => {
                self.forget(flight);
                hit("request lost");
            }
            // Done now and once more later.
            6 => {
                _ = self.arrive(flight);
                self.shared.borrow_mut().flights.push(flight.clone());
                hit("request doubled");
            }
            7 => {
                self.forget(flight);
                hit("success without work");
                turn(&self.shared).await;
                return Answer::Done;
            }
            _ => {
                self.forget(flight);
                if self.shared.borrow_mut().choose(2) == 0 {
                    hit("request refused for good");
                    turn(&self.shared).await;
                    return Answer::Failed(forbidden());
                }
                // A clean-up takes files of a commit that is not there for orphans. While a request that names them is
                // under way, or was judged and is about to be, nobody can be saved from such a clean-up.
                let mut universe = self.shared.borrow_mut();
                let paths = |flight: &Flight| flight.files.iter().map(|file| file.path.clone()).collect();
                let ours: BTreeSet<String> = paths(flight);
                let mut under_way = universe.flights.iter().map(paths);
                let is_named = under_way.any(|theirs: BTreeSet<String>| !theirs.is_disjoint(&ours));
                let mut looked_at = universe.looked_at.iter();
                let is_looked_at = looked_at.any(|(by, path)| *by != self.process && ours.contains(path));
                for file in flight.files.iter().filter(|_| !is_named && !is_looked_at) {
                    universe.stored.remove(&file.path);
                }
                universe.hit("data files swept by others");
            }
        }
        hit(name);
        turn(&self.shared).await;
        Answer::Failed(error)
    }
}
