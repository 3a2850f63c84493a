//! Lanes of one life: what the next microbatch reads, and the readers behind it.
//!
//! Flow: ledger's lanes -> [`Standing`] -> [`Standing::choose`] -> the reader of that lane is served
//!
//! **Live first, and nobody starves.** Live is served while it has something to read, but after
//! [`LIVE_STREAK_MAX`] of its microbatches in a row the backfill that was served least gets one. A drain ends when live is
//! drained and each active backfill got at least one. A life that was begun for a backfill goes on until that is done, and
//! reads on what live gets meanwhile, no more often than live's own microbatches would close.
//!
//! Invariants
//! 1. A lane's reader begins at the ledger's cursor of that lane, and its tail is compared first, as the live lane's.
//! 2. Serving a backfill moves no other lane's cursor.
//!
//! What becomes of a lane that gives nothing, or can not be read on, stands in `trouble`.
//!
//! Bounds: two readers, the live one and one more. They halve the client's share of the memory from the moment that the
//! second one is opened.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::commit::ledger::{Backfill, LIVE_LANE, Lane, LaneState, LedgerRecord};
use crate::event_time::EventTimeMs;
use crate::job::EventTimeRule;
use crate::lateness::Lateness;
use crate::offset::{NextOffset, TopicPartition};
use crate::record::RecordChunk;
use crate::source::{
    Connection, Loss, LostRange, OffsetRange, ReadLimits, ReadPlan, ReadStatus, Reader, ReaderOptions,
    SourceError, Tail, check_ranges,
};
use crate::stop::{Reason, Stop};

/// Live microbatches in a row after which a backfill gets its turn.
const LIVE_STREAK_MAX: u32 = 4;
/// The same where a run has no end: its live microbatches are mostly waiting, so every other one is a backfill's.
const ENDLESS_STREAK_MAX: u32 = 1;
/// Where a reader must be when it is asked something.
const AT_HOME: &str = "what is read ahead is recalled before the reader is asked anything";
/// Readers that may be open at once.
pub(super) const READERS_MAX: u32 = 2;

/// What is read of one lane.
pub(super) struct LaneReader {
    /// Name of the lane.
    pub(super) lane: String,
    /// Topic partitions by slot.
    pub(super) slots: Arc<[TopicPartition]>,
    /// First offsets of this life, by slot.
    pub(super) starts: Vec<NextOffset>,
    /// `None` while something is read ahead with it.
    reader: Option<Reader>,
    /// What was met while it was read ahead. The broker may not show it a second time, so it is kept.
    fault: Option<SourceError>,
    reached: Reached,
    pub(super) lateness: Lateness,
    /// The Kafka timestamps that count; `None` for all.
    range: Option<Backfill>,
}

/// How far microbatches have taken a lane. A reader that reads ahead is further.
#[derive(Debug)]
pub(super) struct Reached {
    /// Next offsets, by slot.
    pub(super) positions: Vec<NextOffset>,
    /// The last records taken, by slot.
    pub(super) tails: Vec<Option<Tail>>,
    /// Whether each slot stands at the end of what may be seen.
    pub(super) at_end: Vec<bool>,
    /// Offsets left to the frozen ends.
    left: u64,
}

impl Reached {
    fn of(reader: &Reader) -> Self {
        Self {
            positions: reader.positions(),
            tails: reader.tails(),
            at_end: reader.at_end(),
            left: reader.lag_left(),
        }
    }
}

impl LaneReader {
    /// Assigns a lane's topic partitions and compares their tails.
    pub(super) fn open(
        connection: &Connection,
        record: Option<&LedgerRecord>,
        lane: &str,
        plans: Vec<ReadPlan>,
        options: ReaderOptions,
        rule: &EventTimeRule,
    ) -> Result<Self, SourceError> {
        let slots: Arc<[TopicPartition]> = plans.iter().map(|plan| plan.topic_partition.clone()).collect();
        let starts = plans.iter().map(|plan| plan.start).collect();
        let patience = options.stall_after;
        let mut reader = Reader::assign(connection, plans, options)?;
        reader.verify_tails(patience)?;
        let known = record.and_then(|record| record.lanes.get(lane));
        Ok(Self {
            lane: lane.to_owned(),
            lateness: lateness(rule, known, &slots),
            slots,
            starts,
            reached: Reached::of(&reader),
            reader: Some(reader),
            fault: None,
            range: known.and_then(|lane| lane.backfill.clone()),
        })
    }

    pub(super) fn is_live(&self) -> bool {
        self.lane == LIVE_LANE
    }

    /// Offsets left to the frozen ends.
    pub(super) fn lag(&self) -> u64 {
        self.reached.left
    }

    /// Whether every topic partition was read to its frozen end.
    pub(super) fn exhausted(&self) -> bool {
        self.lag() == 0
    }

    /// Whether the ledger still trails the frozen ends.
    pub(super) fn has_more(&self, record: &LedgerRecord) -> bool {
        !self.exhausted() || self.trails(record)
    }

    /// Whether positions moved past the ledger, by control records or gaps alone.
    pub(super) fn trails(&self, record: &LedgerRecord) -> bool {
        let positions = &self.reached.positions;
        let known = record.lanes.get(&self.lane);
        self.slots.iter().enumerate().any(|(slot, name)| {
            let cursor = known.and_then(|lane| lane.topics.get(&name.topic)?.get(&name.partition));
            cursor.is_none_or(|cursor| cursor.end != positions[slot])
        })
    }

    /// Whether it reads the backfill of its name as the ledger has it: the same range, from the same cursors. One that was
    /// dropped and registered anew is another.
    fn is_of(&self, record: &LedgerRecord) -> bool {
        let known = record.lanes.get(&self.lane).and_then(|lane| lane.backfill.as_ref());
        let span = |range: &Backfill| (range.from_ms, range.to_ms, range.ends.clone());
        known.map(span) == self.range.as_ref().map(span) && !self.trails(record)
    }

    /// Reads other topic partitions from now on, or more.
    pub(super) fn reassign(
        &mut self,
        connection: &Connection,
        record: &LedgerRecord,
        plans: Vec<ReadPlan>,
        rule: &EventTimeRule,
    ) -> Result<(), SourceError> {
        self.slots = plans.iter().map(|plan| plan.topic_partition.clone()).collect();
        self.starts = plans.iter().map(|plan| plan.start).collect();
        self.lateness = lateness(rule, record.lanes.get(&self.lane), &self.slots);
        assert!(self.fault.is_none(), "what the reader met is given before its lane is read anew");
        self.moves(|reader| reader.reassign(connection, plans))
    }

    /// How far microbatches have taken it.
    pub(super) fn reached(&self) -> &Reached {
        &self.reached
    }

    /// Everything that was read was taken.
    pub(super) fn stand_at_reader(&mut self) {
        let reader = self.reader.as_ref().expect(AT_HOME);
        self.reached = Reached::of(reader);
    }

    /// What the reader is asked to do is done for the open microbatch, or between two.
    fn moves<T>(&mut self, work: impl FnOnce(&mut Reader) -> T) -> T {
        let done = work(self.reader.as_mut().expect(AT_HOME));
        self.stand_at_reader();
        done
    }

    /// The reader, to read ahead with. Until it is taken back nothing else may be asked of it.
    pub(super) fn lend(&mut self) -> Reader {
        self.reader.take().expect(AT_HOME)
    }

    /// What was read ahead is not taken yet. `fault` is what ended it.
    pub(super) fn take_back(&mut self, reader: Reader, fault: Option<SourceError>) {
        (self.reader, self.fault) = (Some(reader), fault);
    }

    /// Whether the next read gives an error that is known already.
    pub(super) fn has_fault(&self) -> bool {
        self.fault.is_some()
    }

    /// See [`Reader::read`]. Gives first what was met while it was read ahead.
    pub(super) fn read(
        &mut self,
        chunk: &mut RecordChunk,
        limits: ReadLimits,
    ) -> Result<ReadStatus, SourceError> {
        self.meet_fault()?;
        self.moves(|reader| reader.read(chunk, limits))
    }

    /// See [`Reader::await_record`]. Gives first what was met while it was read ahead.
    pub(super) fn await_record(&mut self, deadline: Instant) -> Result<bool, SourceError> {
        self.meet_fault()?;
        self.moves(|reader| reader.await_record(deadline))
    }

    fn meet_fault(&mut self) -> Result<(), SourceError> {
        self.fault.take().map_or(Ok(()), Err)
    }

    /// See [`Reader::be_patient`].
    pub(super) fn be_patient(&mut self, renewed: bool) -> Result<(), SourceError> {
        self.moves(|reader| reader.be_patient(renewed))
    }

    /// Next offsets by topic partition.
    pub(super) fn positions(&self) -> BTreeMap<TopicPartition, NextOffset> {
        self.slots.iter().cloned().zip(self.reached.positions.iter().copied()).collect()
    }

    /// Forgets the records outside the lane's range and gives their number. They are not decoded: what they hold is no
    /// business of this lane, so a damaged one among them is no dead letter, and each counts as one row.
    pub(super) fn drop_outside(&self, chunk: &mut RecordChunk) -> u64 {
        match &self.range {
            None => 0,
            Some(range) => chunk.retain(|record| range.holds(record.timestamp_ms())) as u64,
        }
    }
}

/// Begins with the ledger's largest event times, by slot.
fn lateness(rule: &EventTimeRule, lane: Option<&Lane>, slots: &[TopicPartition]) -> Lateness {
    let cursor = |name: &TopicPartition| lane?.topics.get(&name.topic)?.get(&name.partition);
    Lateness::new(rule, slots.iter().map(|name| cursor(name)?.max_event_time).collect())
}

/// Why a backfill can not be read now. The live lane goes on.
#[derive(Debug)]
pub(super) enum Blocked {
    /// The broker no longer holds what was to be read.
    Lost(Vec<LostRange>),
    /// The job does not read this topic any more.
    NoTopic(String),
    /// It can not be read on, and how it would.
    Stopped(Stop),
    /// It gives nothing now.
    Rests,
}

impl Blocked {
    /// The named reason of a run that was to end with this backfill; lost ranges as the start table judges those of live.
    pub(super) fn reason(&self) -> Reason {
        match self {
            Self::Lost(ranges) if ranges.iter().all(|range| range.loss == Loss::Removed) => {
                Reason::OffsetsLost
            }
            Self::Lost(_) => Reason::TopicChanged,
            Self::Stopped(stop) => stop.reason,
            Self::NoTopic(_) | Self::Rests => Reason::Usage,
        }
    }
}

/// What is read of a backfill: from the ledger's cursors to its frozen ends.
pub(super) fn backfill_plans(
    record: &LedgerRecord,
    lane: &str,
    held: &BTreeMap<TopicPartition, OffsetRange>,
) -> Result<Vec<ReadPlan>, Blocked> {
    let Some((cursors, backfill)) =
        record.lanes.get(lane).and_then(|lane| Some((lane, lane.backfill.as_ref()?)))
    else {
        return Ok(Vec::new());
    };
    let (mut plans, mut next_offsets) = (Vec::new(), BTreeMap::new());
    for (name, cursor) in cursors.cursors() {
        let end = backfill.end(&name.topic, name.partition).unwrap_or(cursor.end);
        if cursor.end >= end {
            // Read to its end, so whether the broker still holds it is of no interest. Its event times still count.
            let (start, end, low) = (cursor.end, cursor.end, cursor.end);
            plans.push(ReadPlan { topic_partition: name, start, end, low, tail: None });
            continue;
        }
        let Some(range) = held.get(&name) else { return Err(Blocked::NoTopic(name.to_string())) };
        next_offsets.insert(name.clone(), cursor.end);
        let tail = cursor.tail.map(|tail| Tail { offset: tail.offset, hash: tail.hash });
        plans.push(ReadPlan { topic_partition: name, start: cursor.end, end, low: range.low, tail });
    }
    let lost = check_ranges(&next_offsets, held);
    if lost.is_empty() { Ok(plans) } else { Err(Blocked::Lost(lost)) }
}

/// The lane that the next microbatch reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Turn {
    Live,
    Backfill(String),
}

/// What a turn is decided by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Standing<'a> {
    /// Whether live has something to read.
    pub(super) live_has_more: bool,
    /// Live microbatches since the last one of a backfill.
    pub(super) live_streak: u32,
    /// Active backfills, by name, and how many microbatches each got in this life.
    pub(super) backfills: Vec<(&'a str, u64)>,
    /// Whether this life goes on for backfills when live is read: for the one that it was begun for, or for ever.
    pub(super) goes_on: bool,
    /// Live microbatches in a row after which a backfill gets its turn.
    pub(super) live_streak_max: u32,
}

impl Standing<'_> {
    /// The next turn; `None` ends the life.
    pub(super) fn choose(&self) -> Option<Turn> {
        let due = |(_, served): &&(&str, u64)| self.live_has_more || self.goes_on || *served == 0;
        let next = self.backfills.iter().filter(due).min_by_key(|(name, served)| (*served, *name));
        match next {
            Some((name, _)) if !self.live_has_more || self.live_streak >= self.live_streak_max => {
                Some(Turn::Backfill((*name).to_owned()))
            }
            _ => self.live_has_more.then_some(Turn::Live),
        }
    }
}

/// The readers of a life, and which is served.
pub(super) struct Lanes {
    live: LaneReader,
    backfill: Option<LaneReader>,
    serves_backfill: bool,
    live_streak: u32,
    /// Microbatches by backfill.
    served: BTreeMap<String, u64>,
    /// The backfill that this life was begun for.
    pub(super) goal: Option<String>,
    /// Backfills that gave nothing, and since when they are left alone.
    pub(super) resting: BTreeMap<String, Instant>,
    /// The backfill that can not be read on, and why; it is paused before the next turn.
    pub(super) to_pause: Option<(String, Stop)>,
    /// What the run ends with now that everything it could read is committed.
    pub(super) ends_with: Option<Stop>,
    /// When live's ends were asked for last.
    live_asked_at: Instant,
    /// Whether this life has no end.
    pub(super) is_endless: bool,
}

impl Lanes {
    pub(super) fn new(live: LaneReader, is_endless: bool) -> Self {
        Self {
            live,
            backfill: None,
            serves_backfill: false,
            live_streak: 0,
            served: BTreeMap::new(),
            goal: None,
            resting: BTreeMap::new(),
            to_pause: None,
            ends_with: None,
            live_asked_at: Instant::now(),
            is_endless,
        }
    }

    pub(super) fn live(&self) -> &LaneReader {
        &self.live
    }

    /// See [`Lanes::live`].
    pub(super) fn live_mut(&mut self) -> &mut LaneReader {
        &mut self.live
    }

    /// The lane of the open microbatch.
    pub(super) fn served(&self) -> &LaneReader {
        match &self.backfill {
            Some(backfill) if self.serves_backfill => backfill,
            _ => &self.live,
        }
    }

    /// See [`Lanes::served`].
    pub(super) fn served_mut(&mut self) -> &mut LaneReader {
        match &mut self.backfill {
            Some(backfill) if self.serves_backfill => backfill,
            _ => &mut self.live,
        }
    }

    pub(super) fn serve_live(&mut self) {
        self.serves_backfill = false;
    }

    /// Serves a backfill if the reader that is open is its own and stands where the ledger does.
    pub(super) fn serve_open(&mut self, lane: &str, record: &LedgerRecord) -> bool {
        let is_it = |reader: &LaneReader| reader.lane == lane && reader.is_of(record);
        self.serves_backfill = self.backfill.as_ref().is_some_and(is_it);
        self.serves_backfill
    }

    pub(super) fn close_backfill(&mut self) {
        self.backfill = None;
        self.serves_backfill = false;
    }

    /// Makes room for another reader: lets the open backfill go, and the live one give up half of its queue.
    pub(super) fn make_room(&mut self) -> Result<(), SourceError> {
        self.close_backfill();
        self.live.moves(|reader| reader.divide_queue(READERS_MAX))
    }

    pub(super) fn serve(&mut self, backfill: LaneReader) {
        self.backfill = Some(backfill);
        self.serves_backfill = true;
    }

    /// A microbatch of the served lane landed. The reader of a backfill that is not active any more is let go.
    pub(super) fn landed(&mut self, record: &LedgerRecord) {
        if !self.serves_backfill {
            self.live_streak += 1;
            return;
        }
        self.live_streak = 0;
        let lane = self.served().lane.clone();
        if !self.is_resting(&lane) {
            self.resting.remove(&lane);
        }
        *self.served.entry(lane).or_default() += 1;
        self.close_idle(record);
    }

    /// Lets the reader of a backfill go that is not to be served any more.
    pub(super) fn close_idle(&mut self, record: &LedgerRecord) {
        let is_active = |reader: &LaneReader| record.active_backfills().any(|name| *name == reader.lane);
        // One that rests in a drain is not served again.
        let is_done_with = |reader: &LaneReader| !self.is_endless && self.is_resting(&reader.lane);
        if self.backfill.as_ref().is_some_and(|reader| !is_active(reader) || is_done_with(reader)) {
            self.close_backfill();
        }
    }

    /// Whether some backfill is to be served.
    pub(super) fn has_backfills(&self, record: &LedgerRecord) -> bool {
        record.active_backfills().any(|name| !self.is_resting(name))
    }

    /// Whether the backfill that this life was begun for still is to be served.
    pub(super) fn has_goal(&self, record: &LedgerRecord) -> bool {
        let state = |name: &String| record.lanes.get(name)?.backfill.as_ref().map(|backfill| backfill.state);
        self.goal.as_ref().is_some_and(|goal| state(goal) == Some(LaneState::Active))
    }

    pub(super) fn standing<'a>(&self, record: &'a LedgerRecord, live_has_more: bool) -> Standing<'a> {
        let served = |name: &'a String| (name.as_str(), self.served.get(name).copied().unwrap_or(0));
        Standing {
            live_has_more,
            live_streak: self.live_streak,
            backfills: record.active_backfills().filter(|name| !self.is_resting(name)).map(served).collect(),
            goes_on: self.is_endless || self.has_goal(record),
            live_streak_max: if self.is_endless { ENDLESS_STREAK_MAX } else { LIVE_STREAK_MAX },
        }
    }

    /// Buckets beyond the window that end after this are still of use to a backfill: none of them has passed it. `now` is the
    /// served lane's watermark at the end of this microbatch. The live lane has no use for them beyond its microbatch.
    pub(super) fn loans_kept_after(
        &self,
        record: &LedgerRecord,
        now: Option<EventTimeMs>,
    ) -> Option<EventTimeMs> {
        let served = self.served();
        let watermark = |name: &String| match *name == served.lane {
            // The last microbatch of a backfill has no next.
            true if served.exhausted() => None,
            true => Some(now),
            false => Some(record.lanes[name].watermark),
        };
        let watermarks = record.active_backfills().filter_map(watermark);
        watermarks.map(|watermark| watermark.unwrap_or(EventTimeMs(i64::MIN))).min()
    }

    /// Whether live's ends were asked for so long ago that another look is due.
    pub(super) fn live_is_due(&self, interval: Duration) -> bool {
        self.live_asked_at.elapsed() >= interval
    }

    /// Lets live read on to new ends.
    pub(super) fn extend_live(
        &mut self,
        held: &BTreeMap<TopicPartition, OffsetRange>,
    ) -> Result<(), SourceError> {
        self.live_asked_at = Instant::now();
        let ends = held.iter().map(|(name, range)| (name.clone(), range.end)).collect();
        self.live.moves(|reader| reader.extend(&ends))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::ledger::Cursor;
    use crate::commit::ledger::tests::record;

    /// Takes turns until the life ends or `most` were taken. Live has so many microbatches to read, backfills without end.
    fn turns(mut live: u32, backfills: &[&str], goal: Option<u64>, most: usize) -> String {
        let mut served: Vec<(&str, u64)> = backfills.iter().map(|name| (*name, 0)).collect();
        let (mut streak, mut text) = (0, String::new());
        for _ in 0..most {
            let goes_on = goal.is_some_and(|batches| served[0].1 < batches);
            let standing = Standing {
                live_has_more: live > 0,
                live_streak: streak,
                backfills: served.clone(),
                goes_on,
                live_streak_max: LIVE_STREAK_MAX,
            };
            match standing.choose() {
                None => break,
                Some(Turn::Live) => {
                    (live, streak) = (live - 1, streak + 1);
                    text.push('l');
                }
                Some(Turn::Backfill(name)) => {
                    streak = 0;
                    text.push_str(&name);
                    served.iter_mut().filter(|(known, _)| *known == name).for_each(|(_, count)| *count += 1);
                }
            }
        }
        text
    }

    #[test]
    fn a_drain_without_backfills_is_what_it_was() {
        assert_eq!(turns(6, &[], None, 99), "llllll");
        assert_eq!(turns(0, &[], None, 99), "");
    }

    #[test]
    fn a_drain_serves_live_first_gives_each_backfill_a_turn_and_ends_with_live() {
        assert_eq!(turns(2, &["a", "b"], None, 99), "llab");
        assert_eq!(turns(0, &["a"], None, 99), "a");
        assert_eq!(turns(9, &["a", "b"], None, 99), "llllallllbl");
    }

    #[test]
    fn a_long_live_backlog_starves_no_backfill_and_a_backfill_takes_at_most_a_fifth_of_it() {
        let text = turns(1_000, &["a", "b"], None, 500);
        let count = |lane: char| text.chars().filter(|turn| *turn == lane).count();
        assert_eq!((count('l'), count('a'), count('b')), (400, 50, 50));
    }

    #[test]
    fn a_life_for_a_backfill_goes_on_until_that_is_done_and_serves_the_others_on_the_way() {
        assert_eq!(turns(1, &["a"], Some(3), 99), "laaa");
        assert_eq!(turns(0, &["a", "b"], Some(2), 99), "aba");
    }

    fn held(low: i64, end: i64) -> BTreeMap<TopicPartition, OffsetRange> {
        let range = OffsetRange { low: NextOffset::at(low), end: NextOffset::at(end) };
        BTreeMap::from([(TopicPartition::new("sent", 0), range), (TopicPartition::new("sent", 1), range)])
    }

    /// A backfill at offset 10 of one topic partition, and at its end in another.
    fn backfilling() -> LedgerRecord {
        let cursor = |end| Cursor {
            start: NextOffset::at(0),
            end: NextOffset::at(end),
            tail: None,
            max_event_time: None,
        };
        let ends = BTreeMap::from([(0, NextOffset::at(20)), (1, NextOffset::at(7))]);
        let backfill = Backfill {
            from_ms: 0,
            to_ms: None,
            state: LaneState::Active,
            ends: BTreeMap::from([("sent".to_owned(), ends)]),
            counts: Default::default(),
            letters_ratio_max: None,
        };
        let topics = BTreeMap::from([("sent".to_owned(), BTreeMap::from([(0, cursor(10)), (1, cursor(7))]))]);
        let mut record = record();
        record.lanes.insert("june".into(), Lane { watermark: None, topics, backfill: Some(backfill) });
        record
    }

    #[test]
    fn a_backfill_goes_on_at_its_own_cursor_and_ends_at_its_frozen_end() {
        let plans = backfill_plans(&backfilling(), "june", &held(5, 100)).unwrap();
        let spans: Vec<_> = plans.iter().map(|plan| (plan.start.get(), plan.end.get())).collect();
        assert_eq!(spans, [(10, 20), (7, 7)]);
    }

    #[test]
    fn what_a_backfill_lost_is_named_exactly_and_what_it_has_read_can_not_be_lost() {
        let Err(Blocked::Lost(lost)) = backfill_plans(&backfilling(), "june", &held(12, 100)) else {
            panic!("offsets 10 and 11 are gone");
        };
        let (from, to) = (NextOffset::at(10), NextOffset::at(12));
        let topic_partition = TopicPartition::new("sent", 0);
        assert_eq!(lost, [LostRange { topic_partition, from, to, loss: Loss::Removed }]);
        assert_eq!(Blocked::Lost(lost).reason(), Reason::OffsetsLost);
        let cut_off = backfill_plans(&backfilling(), "june", &held(5, 8)).unwrap_err();
        assert_eq!(cut_off.reason(), Reason::TopicChanged, "{cut_off:?}");
        let none = backfill_plans(&backfilling(), "june", &BTreeMap::new());
        assert!(matches!(none, Err(Blocked::NoTopic(name)) if name == "sent[0]"));
    }
}
