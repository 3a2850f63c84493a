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
use super::universe::{Event, EventKind, File, Log, Place, Row, TOPIC, WORLD, tagged};
use super::world::SimWorld;
use crate::commit::ledger::{
    self, Backfill, Change, Cursor, Kind, LIVE_LANE, Lane, LaneState, LedgerRecord, Tail,
};
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
    let newest = ledger::ancestry(head).take(2).map(|snapshot| snapshot.snapshot_id());
    let kept: Vec<i64> = newest.chain(tagged(head)).collect();
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
        self.take_up_requests().await?;
        Ok(self.has_more() || self.owner.record.active_backfills().next().is_some())
    }

    async fn maintain(&mut self) -> Result<(), Stop> {
        let shared = Rc::clone(&self.state.tables.shared);
        let keeps_up = self.orders.keeps_up;
        if !keeps_up && !shared.borrow_mut().chance(100) {
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
        if !keeps_up {
            self.owner.keep_up_main(upkeep()).await?;
            shared.borrow_mut().hit("main maintained by its owner");
        }
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
        let lane = self.choose_lane();
        let spans = self.spans_of(&lane);
        for (partition, (first, start, last)) in spans {
            let most = 1 + shared.borrow_mut().choose(self.orders.batch_events as usize) as i64;
            let end = last.min(start + most);
            let universe = shared.borrow();
            // What retention took from a backfill is still there in this world: only the live lane is to stop for it.
            if lane == LIVE_LANE && start < end && start < universe.log.partitions[partition].low {
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
            if lane == LIVE_LANE {
                self.spans[partition].1 = end;
            }
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
            last: !self.orders.follows && !self.has_more() && self.is_only_work(&lane),
            lane,
            watermark: None,
            reached,
            requeue: None,
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

/// Lanes: the live one, and backfills that read again what it has read.
impl SimLife {
    /// A person asks for a backfill of what live has taken, or drops one.
    async fn take_up_requests(&mut self) -> Result<(), Stop> {
        let shared = Rc::clone(&self.state.tables.shared);
        let registers = shared.borrow_mut().chance(60);
        let drops = shared.borrow_mut().chance(10);
        let mut next = LedgerRecord { kind: Kind::Change, jumps: Vec::new(), ..self.owner.record.clone() };
        let open: Vec<String> = next.active_backfills().cloned().collect();
        let what = match open.last() {
            Some(lane) if drops => {
                next.lanes.remove(lane);
                "backfill dropped"
            }
            None if registers => {
                let number = shared.borrow_mut().next_number(WORLD);
                let lane = backfill(&shared.borrow().log, next.live());
                next.tidy_lanes();
                next.lanes.insert(format!("backfill-{number:012}"), lane);
                "backfill registered"
            }
            _ => return Ok(()),
        };
        next.change = Some(Change { by: "backfill".to_owned(), what: what.to_owned() });
        self.owner.commit(next, Vec::new()).await?;
        shared.borrow_mut().hit(what);
        Ok(())
    }

    /// The lane of the next microbatch.
    fn choose_lane(&self) -> String {
        let backfills = self.owner.record.active_backfills().cloned();
        let live = self.has_more().then(|| LIVE_LANE.to_owned());
        let lanes: Vec<String> = live.into_iter().chain(backfills).collect();
        let mut universe = self.state.tables.shared.borrow_mut();
        // A heartbeat may ask for a microbatch of nothing.
        match lanes.len() {
            0 => LIVE_LANE.to_owned(),
            count => lanes[universe.choose(count)].clone(),
        }
    }

    /// Where a lane began, is and ends, by topic partition.
    fn spans_of(&self, lane: &str) -> Vec<(usize, (i64, i64, i64))> {
        if lane == LIVE_LANE {
            return self.spans.iter().copied().enumerate().collect();
        }
        let lane = &self.owner.record.lanes[lane];
        let ends = lane.backfill.iter();
        let end =
            |name: &TopicPartition| ends.clone().find_map(|known| known.end(&name.topic, name.partition));
        let span = |(name, cursor): (TopicPartition, &Cursor)| {
            let (at, end) = (cursor.end.get(), end(&name).unwrap_or(cursor.end).get());
            (name.partition as usize, (at, at, end))
        };
        lane.cursors().map(span).collect()
    }

    /// Whether nothing but the live lane has work: that a backfill is done is known only once it is committed.
    fn is_only_work(&self, lane: &str) -> bool {
        lane == LIVE_LANE && self.owner.record.active_backfills().next().is_none()
    }
}

/// A backfill of everything that a lane has taken and retention has left.
fn backfill(log: &Log, live: &Lane) -> Lane {
    let (mut cursors, mut ends) = (BTreeMap::new(), BTreeMap::new());
    for (partition, cursor) in live.topics.get(TOPIC).into_iter().flatten() {
        let low = log.partitions.get(*partition as usize).map_or(0, |partition| partition.low);
        let start = NextOffset::at(low.min(cursor.end.get()));
        cursors.insert(*partition, Cursor { start, end: start, tail: None, max_event_time: None });
        ends.insert(*partition, cursor.end);
    }
    let of_topic = |cursors| BTreeMap::from([(TOPIC.to_owned(), cursors)]);
    let backfill = Backfill {
        from_ms: 0,
        to_ms: None,
        state: LaneState::Active,
        ends: BTreeMap::from([(TOPIC.to_owned(), ends)]),
        counts: Counts::default(),
        letters_ratio_max: None,
    };
    let mut lane = Lane { watermark: None, topics: of_topic(cursors), backfill: Some(backfill) };
    if lane.offsets_left() == 0 {
        lane.backfill.iter_mut().for_each(|backfill| backfill.state = LaneState::Done);
    }
    lane
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
            self.take_up_requests().await?;
            if self.has_more() || self.owner.record.active_backfills().next().is_some() {
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
