//! One topic partition as it is read: where it stands, and whether its log is still the one that was read before.
//!
//! Flow: its event at the head of the queue -> [`Slot::look`] (tail, gaps, ends, order) -> a record, its end, or a [`Fault`]
//!
//! The tail is the last record consumed, of this run or an earlier one. Every client compares it first, so a log that was cut and
//! has grown again is found, unless the broker holds that record no more.

use std::time::Duration;

use rdkafka::error::RDKafkaErrorCode;
use xxhash_rust::xxh3::Xxh3;

use crate::mutant;
use crate::offset::{NextOffset, TopicPartition};
use crate::record::{RecordChunk, RecordParts};
use crate::source::client::Context;
use crate::source::queue::{EventQueue, Head, RecordView};

pub(super) type Queue = EventQueue<Context>;

/// The last record consumed from a topic partition: what a later start compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tail {
    /// Its offset.
    pub offset: i64,
    /// [`tail_hash`] of it.
    pub hash: u64,
}

/// XXH3-64 of a record: offset, timestamp, key and payload, each with its presence and length, little-endian.
pub fn tail_hash(offset: i64, timestamp_ms: Option<i64>, key: Option<&[u8]>, payload: Option<&[u8]>) -> u64 {
    let mut hash = Xxh3::new();
    hash.update(&offset.to_le_bytes());
    hash.update(&[u8::from(timestamp_ms.is_some())]);
    hash.update(&timestamp_ms.unwrap_or(0).to_le_bytes());
    for bytes in [key, payload] {
        hash.update(&[u8::from(bytes.is_some())]);
        hash.update(&(bytes.map_or(0, <[u8]>::len) as u64).to_le_bytes());
        hash.update(bytes.unwrap_or_default());
    }
    hash.digest()
}

fn tail_of(record: RecordView<'_>) -> Tail {
    let hash = tail_hash(record.offset(), record.timestamp_ms(), record.key(), record.payload());
    Tail { offset: record.offset(), hash }
}

/// What is read of one topic partition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadPlan {
    /// The topic partition.
    pub topic_partition: TopicPartition,
    /// First offset to read.
    pub start: NextOffset,
    /// Frozen end, exclusive; [`ReadPlan::no_end`] reads on for ever.
    pub end: NextOffset,
    /// Oldest offset that the broker holds: an older tail is not looked for.
    pub low: NextOffset,
    /// The last record consumed before `start`, to be compared. Must be `None` after the ledger jumped over offsets.
    pub tail: Option<Tail>,
}

impl ReadPlan {
    /// An `end` that is never reached: the topic partition is followed for ever.
    pub fn no_end() -> NextOffset {
        NextOffset::at(i64::MAX)
    }
}

/// One topic partition of the plan.
pub(super) struct Slot {
    pub(super) topic_partition: TopicPartition,
    pub(super) start: NextOffset,
    pub(super) end: NextOffset,
    pub(super) next: NextOffset,
    /// The last record consumed, of this run or an earlier one.
    pub(super) tail: Option<Tail>,
    /// Oldest offset that the broker holds, as far as is known: an older tail can not be compared.
    pub(super) low: i64,
    /// The tail that is still to be compared: until a record at or after the start, or the end of the log, was met, since
    /// nothing else may stand between the two.
    pub(super) unchecked: Option<Tail>,
    /// This client has met the tail, and it is the same.
    pub(super) is_same: bool,
    /// Nothing more is to be read of it.
    pub(super) finished: bool,
    /// The fetcher stands at the end of what it may see.
    pub(super) at_end: bool,
    /// Reader's time of the last progress.
    pub(super) moved_at: Duration,
    /// Times it was read again since the last progress.
    pub(super) rereads: u32,
    /// Last passing error since the last progress.
    pub(super) last_problem: Option<String>,
    /// Everything from `next` on arrives in the queue. Not of one that was never assigned, or of which something was let go.
    pub(super) is_fed: bool,
    /// The client fetches it.
    pub(super) is_fetched: bool,
}

/// What an event of a slot came to.
pub(super) enum Next {
    /// It was no record to be delivered, and is gone.
    Passed,
    /// A record that is to be delivered stands at the head.
    Record,
    /// What stands at the head is behind the frozen end.
    Finished,
}

/// Why a slot can not go on by itself.
pub(super) enum Fault {
    TailDiffers { offset: i64 },
    WentBack { found: i64 },
    Failed { code: RDKafkaErrorCode, problem: String },
}

impl Slot {
    pub(super) fn new(plan: ReadPlan) -> Self {
        let ReadPlan { topic_partition, start, end, low, tail } = plan;
        let tail = tail.filter(|tail| tail.offset < start.get());
        Self {
            topic_partition,
            start,
            end: mutant!("frozen-end-overrun", NextOffset::at(end.get().saturating_add(1)) => end),
            next: start,
            tail,
            low: low.get(),
            unchecked: tail.filter(|tail| tail.offset >= low.get()),
            is_same: false,
            finished: start >= end,
            at_end: false,
            moved_at: Duration::ZERO,
            rereads: 0,
            last_problem: None,
            is_fed: false,
            is_fetched: false,
        }
    }

    /// Whether it needs a queue: something is to be read or compared.
    pub(super) fn is_needed(&self) -> bool {
        !self.finished || self.unchecked.is_some()
    }

    /// Whether silence is a fault: at the end of a log that is followed for ever it is not.
    pub(super) fn is_owed(&self) -> bool {
        self.is_needed() && !(self.at_end && self.end == ReadPlan::no_end())
    }

    /// Where the fetcher begins: at the tail while that is to be compared.
    pub(super) fn fetch_from(&self) -> i64 {
        self.unchecked.map_or(self.next.get(), |tail| tail.offset)
    }

    /// First offset that this client has not seen whole.
    pub(super) fn unseen_from(&self) -> NextOffset {
        match self.unchecked {
            Some(tail) if self.is_same => NextOffset::after(tail.offset),
            Some(tail) => NextOffset::at(tail.offset),
            None => self.next,
        }
    }

    pub(super) fn moved(&mut self, now: Duration) {
        self.moved_at = now;
        self.rereads = 0;
        self.last_problem = None;
    }

    pub(super) fn finish(&mut self) {
        self.next = self.next.max(self.end);
        self.finished = true;
    }

    /// Looks at the event of this slot at the head of the queue. All branching on what Kafka may deliver is here.
    pub(super) fn look(&mut self, queue: &mut Queue, now: Duration) -> Result<Next, Fault> {
        let offset = match queue.head() {
            None => return Ok(Next::Passed),
            Some(&Head::Record { offset }) => offset,
            Some(Head::End { .. } | Head::Failed { .. }) => return self.pass(queue, now),
        };
        self.at_end = false;
        if let Some(tail) = self.unchecked {
            self.compare(tail, queue, offset)?;
            // An answer, but no progress: what is read again without any is believed at last.
            self.moved_at = now;
        }
        if offset >= self.end.get() {
            self.finish();
            return Ok(Next::Finished);
        }
        if offset >= self.next.get() {
            return Ok(Next::Record);
        }
        if self.next > self.start {
            return Err(Fault::WentBack { found: offset });
        }
        // The tail itself, or what stands before the start in the first record batch.
        queue.drop_head();
        Ok(Next::Passed)
    }

    /// Removes an event that is no record.
    fn pass(&mut self, queue: &mut Queue, now: Duration) -> Result<Next, Fault> {
        match queue.drop_head() {
            Some(Head::Failed { code, problem }) => return Err(Fault::Failed { code, problem }),
            // Everything visible below this offset was delivered before this event. It may lie below `next` (the
            // tail was compacted away and the log ends there) and below `end` (a new leader's high watermark
            // lags): then more is to come.
            Some(Head::End { offset }) => {
                self.moved(now);
                self.at_end = true;
                self.next = self.next.max(NextOffset::at(offset.min(self.end.get())));
                if offset > self.end.get() {
                    // What it says of the log behind the end is let go, and said once: is the end moved, a new client asks.
                    self.is_fed = false;
                }
                if offset >= self.start.get() {
                    self.unchecked = None;
                }
                if self.next >= self.end && self.unchecked.is_none() {
                    self.finish();
                }
            }
            Some(Head::Record { .. }) | None => {}
        }
        Ok(Next::Passed)
    }

    /// Compares the record at the head, which stands at `offset`, with the tail.
    fn compare(&mut self, tail: Tail, queue: &Queue, offset: i64) -> Result<(), Fault> {
        if offset >= self.start.get() {
            self.unchecked = None;
            return Ok(());
        }
        let found = queue.record().map(tail_of);
        if found.is_some_and(|found| differs(tail, found, self.start)) {
            return Err(Fault::TailDiffers { offset: tail.offset });
        }
        self.is_same = true;
        self.unchecked = mutant!("records-before-the-start-pass", None => self.unchecked);
        Ok(())
    }

    /// Copies the record at the head into the chunk.
    pub(super) fn deliver(&mut self, slot: u32, queue: &mut Queue, chunk: &mut RecordChunk, headers: bool) {
        let Some(record) = queue.record() else { return };
        chunk.push(RecordParts {
            slot,
            offset: record.offset(),
            timestamp_ms: record.timestamp_ms(),
            key: record.key(),
            payload: record.payload(),
        });
        if headers {
            record.for_each_header(|name, value| chunk.push_header(name, value));
        }
        self.next = NextOffset::after(record.offset());
        queue.take();
    }

    /// The next client compares the last record taken before it gives another, as the first one does after a start: what was
    /// refused to this one (an offset past the end of a log that was cut) may be there again, of a log that has grown since.
    pub(super) fn begin_anew(&mut self) {
        self.is_same = false;
        if !self.finished {
            self.start = self.next;
            self.unchecked = self.tail.filter(|tail| tail.offset >= self.low);
        }
    }

    /// The broker holds nothing before `low`.
    pub(super) fn removed_below(&mut self, low: i64) {
        self.low = low;
        self.unchecked = self.unchecked.filter(|tail| tail.offset >= low);
    }

    /// Hashes the record taken last, if any was, and lets its memory go.
    pub(super) fn keep_tail(&mut self, slot: usize, queue: &mut Queue) {
        if let Some(record) = queue.taken(slot) {
            self.tail = Some(tail_of(record));
        }
        queue.forget_taken(slot);
    }
}

/// Whether a record found from the tail's offset on proves that the log is another one.
///
/// One at or after the start proves nothing: the tail itself may have been compacted away. One between the two was not
/// there when the tail was consumed, so the log was written again.
pub(super) fn differs(tail: Tail, found: Tail, start: NextOffset) -> bool {
    found.offset < start.get() && mutant!("tail-not-compared", false => found != tail)
}
