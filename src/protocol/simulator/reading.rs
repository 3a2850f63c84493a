//! A life that reads: microbatches of the log, judged event by event, and maintenance between them.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use iceberg::spec::TableMetadata;
use serde_json::json;

use super::catalog::turn;
use super::process::{Orders, side_ident};
use super::state::SimState;
use super::universe::{Event, EventKind, File, Place, Row, TOPIC};
use super::world::SimWorld;
use crate::commit::ledger::{self, LIVE_LANE, Tail};
use crate::commit::side::{self, Role};
use crate::commit::upkeep::Upkeep;
use crate::counts::Counts;
use crate::offset::{NextOffset, TopicPartition};
use crate::protocol::{Built, Cut, Endless, Life, Owner, Reached, Tables, Turn as Next, stops};
use crate::stop::{Reason, Stop};

/// A life that reads.
pub(super) struct SimLife {
    pub(super) owner: Owner<SimWorld>,
    pub(super) state: SimState,
    pub(super) orders: Orders,
    /// By topic partition: where this life began, where it is, where it ends.
    pub(super) spans: Vec<(i64, i64, i64)>,
    /// Paths of the open microbatch.
    pub(super) open: Vec<String>,
}

/// Snapshots that maintenance lets go: all but the current one and its parent.
fn all_but_newest(head: &TableMetadata) -> Vec<i64> {
    let kept: Vec<i64> = ledger::ancestry(head).take(2).map(|snapshot| snapshot.snapshot_id()).collect();
    head.snapshots().map(|snapshot| snapshot.snapshot_id()).filter(|id| !kept.contains(id)).collect()
}

pub(super) fn tail_hash(place: Place, event: Option<Event>) -> u64 {
    let event = event.map_or(0, |event| u64::from(event.key) + 1);
    (u64::from(place.0) << 48) ^ ((place.2 as u64) << 24) ^ event
}

impl SimLife {
    async fn write(&mut self, path: String, rows: Vec<Row>) -> Result<Option<File>, Stop> {
        if rows.is_empty() {
            return Ok(None);
        }
        let file = File { path: path.clone(), rows: Rc::new(rows) };
        let shared = Rc::clone(&self.state.tables.shared);
        turn(&shared).await;
        self.open.push(path.clone());
        shared.borrow_mut().stored.insert(path.clone(), false);
        shared.borrow_mut().files.insert(path.clone(), file.clone());
        turn(&shared).await;
        if shared.borrow_mut().chance(5) {
            shared.borrow_mut().hit("disk of the warehouse full");
            return Err(Stop::new(Reason::StorageFailed, "no space left", "free space"));
        }
        shared.borrow_mut().stored.insert(path, true);
        turn(&shared).await;
        Ok(Some(file))
    }
}

impl SimLife {
    fn has_more(&self) -> bool {
        self.spans.iter().any(|(_, at, end)| at < end)
    }
}

impl Life for SimLife {
    type World = SimWorld;
    type State = SimState;

    fn owner(&mut self) -> &mut Owner<SimWorld> {
        &mut self.owner
    }

    fn state(&mut self) -> &mut SimState {
        &mut self.state
    }

    async fn turn(&mut self) -> Result<bool, Stop> {
        Ok(self.has_more())
    }

    async fn maintain(&mut self) -> Result<(), Stop> {
        let shared = Rc::clone(&self.state.tables.shared);
        if !shared.borrow_mut().chance(100) {
            return Ok(());
        }
        let upkeep = || Upkeep {
            expiring: Arc::new(all_but_newest),
            merged: None,
            summary: BTreeMap::new(),
            properties: BTreeMap::new(),
            beyond: None,
        };
        self.owner.reload().await?;
        self.owner.keep_up_main(upkeep()).await?;
        shared.borrow_mut().hit("main maintained by its owner");
        for role in Role::ALL {
            let mark = side::inspect(&self.owner.side(role).0);
            if let Some(mark) = mark.map_err(|error| stops::ledger(&side_ident(role), error))? {
                self.owner.keep_up_side(role, &mark, upkeep()).await?;
                shared.borrow_mut().hit(match role {
                    Role::DeadLetters => "dead letters maintained by their owner",
                    Role::Late => "late table maintained by its owner",
                });
            }
        }
        Ok(())
    }

    async fn build(&mut self) -> Result<Option<Built<File>>, Stop> {
        let shared = Rc::clone(&self.state.tables.shared);
        turn(&shared).await;
        let attempt = self.state.tables.new_id();
        let batch = Some(self.owner.record.batch + 1);
        let mut counts = Counts::default();
        let (mut rows, mut late, mut letters) = (Vec::new(), Vec::new(), Vec::new());
        let mut reached = Vec::new();
        let known: BTreeSet<Place> = {
            let universe = shared.borrow();
            let content = universe.content_of(&self.owner.side(Role::DeadLetters).0);
            content.files.iter().flat_map(|file| file.rows.iter().map(|row| row.place)).collect()
        };
        for partition in 0..self.spans.len() {
            let (first, start, last) = self.spans[partition];
            let most = 1 + shared.borrow_mut().choose(self.orders.batch_events as usize) as i64;
            let end = last.min(start + most);
            let universe = shared.borrow();
            if start < end && start < universe.log.partitions[partition].low {
                return Err(Stop::new(Reason::OffsetsLost, "records were removed", "accept-loss"));
            }
            let events: Vec<_> = universe.log.events(partition as i32, start, end).collect();
            for (place, event) in &events {
                counts.consumed += 1;
                let is_unproven = event.kind == EventKind::Unproven;
                let row = Row { key: event.key, place: *place, batch, is_unproven };
                match event.kind {
                    EventKind::Bad if known.contains(place) => counts.dead_letter_known += 1,
                    EventKind::Bad => {
                        counts.dead_letter += 1;
                        letters.push(row);
                    }
                    EventKind::OnTime if self.state.is_new(event.key) => {
                        counts.written += 1;
                        rows.push(row);
                    }
                    EventKind::Late if self.state.is_new(event.key) => {
                        counts.late_side += 1;
                        late.push(row);
                    }
                    EventKind::Unproven => {
                        counts.late_side += 1;
                        late.push(row);
                    }
                    EventKind::OnTime | EventKind::Late => counts.duplicate += 1,
                }
            }
            let tail = events
                .last()
                .map(|(place, event)| Tail { offset: place.2, hash: tail_hash(*place, Some(*event)) });
            self.spans[partition].1 = end;
            reached.push(Reached {
                name: TopicPartition::new(TOPIC, partition as i32),
                first: NextOffset::at(first),
                end: NextOffset::at(end),
                tail,
                max_event_time: None,
            });
        }
        if shared.borrow_mut().chance(8) {
            shared.borrow_mut().hit("interrupted by a signal");
            return Err(Stop::new(Reason::Interrupted, "interrupted", "run again"));
        }
        let main = self.write(format!("main/{attempt}"), rows).await?;
        let mut owed = BTreeMap::new();
        for (role, rows) in [(Role::DeadLetters, letters), (Role::Late, late)] {
            if let Some(file) = self.write(format!("{}/{attempt}", role.name()), rows).await? {
                owed.insert(role, vec![json!({ "path": file.path })]);
            }
        }
        let cut = Cut {
            number: self.owner.record.batch + 1,
            attempt,
            cut_time_ms: self.state.tables.now_ms(),
            counts,
            lane: LIVE_LANE.to_owned(),
            watermark: None,
            reached,
            requeue: None,
            last: !self.orders.follows && !self.has_more(),
        };
        Ok(Some(Built { cut, files: main.into_iter().collect(), owed }))
    }

    async fn discard(&mut self) {
        for path in std::mem::take(&mut self.open) {
            turn(&self.state.tables.shared).await;
            let universe = &mut *self.state.tables.shared.borrow_mut();
            let was_sent = universe.sent_paths.contains(&path);
            universe
                .require(!was_sent, || format!("{path} was deleted, and a commit that was sent names it"));
            universe.stored.remove(&path);
            universe.hit("data file of a dropped batch deleted");
        }
    }

    fn landed(&mut self, _: Cut, sends: u32) {
        self.open.clear();
        let mut universe = self.state.tables.shared.borrow_mut();
        universe.hit("batch landed");
        if sends > 1 {
            universe.hit("batch landed after it was sent again");
        }
    }
}

/// Most topic partitions of a log that grows.
const PARTITIONS_MAX: usize = 3;

impl SimLife {
    /// What the log has now; it may have grown by a topic partition.
    fn look(&mut self) {
        let universe = &mut *self.state.tables.shared.borrow_mut();
        if universe.log.partitions.len() < PARTITIONS_MAX && universe.chance(20) {
            universe.log.partitions.push(Default::default());
            universe.hit("topic partition added");
        }
        for (partition, log) in universe.log.partitions.iter().enumerate() {
            let end = log.records.len() as i64;
            match self.spans.get_mut(partition) {
                Some(span) => span.2 = span.2.max(end),
                None => self.spans.push((log.low, log.low, end)),
            }
        }
    }
}

impl Endless for SimLife {
    async fn await_turn(&mut self, heartbeat_ms: i64) -> Result<Next, Stop> {
        let shared = Rc::clone(&self.state.tables.shared);
        loop {
            turn(&shared).await;
            self.look();
            if self.has_more() {
                return Ok(Next::Microbatch);
            }
            let is_calm = !shared.borrow().is_faulty;
            if is_calm || shared.borrow_mut().choose(4) == 0 {
                shared.borrow_mut().hit("continuous life asked to end");
                return Ok(Next::End);
            }
            let left_ms = heartbeat_ms - self.state.tables.now_ms();
            if left_ms <= 0 {
                return Ok(Next::Heartbeat);
            }
            let rest_ms = left_ms.min(60_000).unsigned_abs();
            self.state.tables.wait(Duration::from_millis(rest_ms)).await;
        }
    }
}
