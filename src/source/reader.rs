//! Reading: records of all assigned topic partitions, in the order in which they arrive, up to limits and frozen ends.
//!
//! Flow: queue -> the slot of the event at its head ([`Slot::look`]) -> limits -> copy into the chunk
//!
//! A record that does not fit into a chunk stays at the head of the queue, so cuts may fall anywhere. What arrives of a topic
//! partition that is finished is let go, and librdkafka is told to fetch no more of it; is its end moved, a new client
//! reads on. librdkafka asks for the topic partitions in a circle, which begins anew each time
//! that the queue was full: where reading is slower than the broker, those that come first are read further ahead.
//!
//! librdkafka does not stop at a record batch that fails its checksum: it reports it and goes on behind it, and where it
//! then misreads a length it even jumps to an offset that never was (2.12.1, `rdkafka_msgset_reader.c`, "Propagate CRC
//! error to application and continue"; seen with one flipped byte in a segment of Kafka 4.3.1). The report stands in
//! the queue before anything that follows the gap, so nothing of that is taken: the client is thrown away and a new
//! one reads from the next offset again, at most [`REREADS_MAX`] times without progress.
//!
//! Invariant: a fault that was reported has left its queue, so no queue outlives it. Whoever reads on after an error reads
//! with a new client from the same positions, and meets the same fault again if it lasts, never what stands behind it. A log
//! that was cut and has grown again refuses nothing any more: so every new client compares the last record taken first, and
//! where there is none an error must not be dropped.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdkafka::ClientConfig;
use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::mutant;
use crate::offset::{NextOffset, TopicPartition};
use crate::record::RecordChunk;
use crate::source::client::KafkaClient;
use crate::source::config::{QueueSizes, wait_at_the_end};
use crate::source::connection::{Connection, client_error, code_of, is_unknown_topic, not_authorized};
use crate::source::error::SourceError;
use crate::source::queue::{Kept, Wake};
use crate::source::ranges::{Loss, LostRange};

mod slot;

use slot::{Fault, Next, Queue, Slot};
pub use slot::{ReadPlan, Tail, tail_hash};

/// How long a topic partition may give neither a record nor its end.
pub const STALL_AFTER_DEFAULT: Duration = Duration::from_secs(60);
/// So much longer for each other one: a response may hold one topic partition alone, librdkafka begins each request with the
/// next one in a circle, and a request that names a thousand takes a loaded broker 60 to 90 ms.
const PATIENCE_PER_OTHER: Duration = Duration::from_millis(250);
/// Most events between two looks at the clock.
const ROUND_EVENTS_MAX: usize = 4096;
/// Longest wait before the queues are looked at again, whether woken or not.
const WAIT_MAX: Duration = Duration::from_millis(50);
/// The same where every topic partition stands at the end of a log that is followed for ever: a topic at rest costs
/// next to nothing, and what arrives wakes the reader.
const WAIT_AT_REST_MAX: Duration = Duration::from_millis(500);
/// Most new clients for one damaged record batch or range error before it is believed.
const REREADS_MAX: u32 = 3;
/// Pause before a damaged record batch is read again.
const REREAD_AFTER: Duration = Duration::from_millis(200);
/// Longest question for the range of a topic partition whose offset was refused.
const RANGE_TIME_MAX: Duration = Duration::from_secs(10);

/// How a reader reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReaderOptions {
    /// Whether headers are copied. Parsing them costs allocations per record.
    pub headers: bool,
    /// How long a topic partition may be silent, counted while [`Reader::read`] waits for records of any: one that is read
    /// slower than the broker sends does not count. A quarter of a second longer for each other one of the plan that is not silent.
    pub stall_after: Duration,
    /// Into how many equal parts the memory of the client's queues is divided; this reader takes one. At least 1.
    pub queue_parts: u32,
}

impl Default for ReaderOptions {
    fn default() -> Self {
        Self { headers: true, stall_after: STALL_AFTER_DEFAULT, queue_parts: 1 }
    }
}

/// When a call of [`Reader::read`] returns at the latest. The first two bound the whole chunk, not the call.
#[derive(Debug, Clone, Copy)]
pub struct ReadLimits {
    /// Most records in the chunk.
    pub records_max: usize,
    /// Most bytes of keys, payloads and headers in the chunk. A single record may be larger than this.
    pub bytes_max: usize,
    /// When to return with what is there.
    pub deadline: Instant,
}

/// Why a call of [`Reader::read`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadStatus {
    /// Every topic partition reached its frozen end; there will be no more records.
    Exhausted,
    /// The chunk is at one of its limits.
    Full,
    /// The deadline passed.
    DeadlinePassed,
}

/// Reads the topic partitions of a plan. One thread at a time; may be moved between threads.
pub struct Reader {
    slots: Vec<Slot>,
    // Before the client: dropped first.
    queue: Option<Queue>,
    client: Option<KafkaClient>,
    /// Whether a client is to be started before anything is read: there was a fault, or none could be started.
    needs_client: bool,
    wake: Arc<Wake>,
    config: ClientConfig,
    queue_bytes: u64,
    record_bytes_max: u64,
    options: ReaderOptions,
    brokers: String,
    /// What is kept while tails are compared, at most.
    kept_max: Kept,
    /// Time spent in this reader so far, against which silence is measured.
    time_read: Duration,
}

impl std::fmt::Debug for Reader {
    /// Shows no configuration: it may hold secrets.
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Reader").field("slots", &self.slots.len()).field("lag", &self.lag_left()).finish()
    }
}

impl Reader {
    /// Assigns the topic partitions of a plan. Slots are indices into the plan sorted by topic and partition.
    ///
    /// Starts a client of its own with queues sized for the plan; where nothing is to be read or compared, none. The
    /// caller has checked the starts with [`crate::source::check_ranges`].
    ///
    /// # Errors
    /// [`SourceError::Client`] if the client refuses the assignment.
    ///
    /// # Panics
    /// If a topic partition stands twice in the plan.
    pub fn assign(
        connection: &Connection,
        mut plan: Vec<ReadPlan>,
        options: ReaderOptions,
    ) -> Result<Self, SourceError> {
        plan.sort_by(|one, other| one.topic_partition.cmp(&other.topic_partition));
        assert!(
            plan.windows(2).all(|pair| pair[0].topic_partition != pair[1].topic_partition),
            "a topic partition stands once in a plan"
        );
        let slots: Vec<_> = plan.into_iter().map(Slot::new).collect();
        let mut config = connection.config.clone();
        if slots.iter().any(|slot| slot.end == ReadPlan::no_end()) {
            wait_at_the_end(&mut config);
        }
        let mut reader = Self {
            slots,
            queue: None,
            client: None,
            needs_client: true,
            wake: Arc::new(Wake::default()),
            config,
            queue_bytes: connection.queue_bytes,
            record_bytes_max: connection.record_bytes_max,
            options,
            brokers: connection.brokers.clone(),
            kept_max: Kept::default(),
            time_read: Duration::ZERO,
        };
        reader.start_client()?;
        Ok(reader)
    }

    /// Reads another plan in place of this one. What was fetched and not delivered is fetched again.
    ///
    /// # Errors
    /// As [`Reader::assign`]; the reader then has no topic partition.
    ///
    /// # Panics
    /// As [`Reader::assign`].
    pub fn reassign(&mut self, connection: &Connection, plan: Vec<ReadPlan>) -> Result<(), SourceError> {
        // First, so that two clients never hold full queues.
        self.slots.clear();
        self.queue = None;
        self.client = None;
        *self = Self::assign(connection, plan, self.options)?;
        Ok(())
    }

    /// Starts a client at the slots' positions, in place of the one before, of which no event is ever seen again.
    fn start_client(&mut self) -> Result<(), SourceError> {
        self.let_client_go();
        for slot in &mut self.slots {
            slot.at_end = false;
            slot.moved_at = self.time_read;
        }
        let needed = self.slots.iter().filter(|slot| slot.is_needed()).count();
        if needed == 0 {
            self.needs_client = false;
            return Ok(());
        }
        let queue_bytes = self.queue_bytes / u64::from(self.options.queue_parts.max(1));
        let sizes = QueueSizes::plan(queue_bytes, needed, self.record_bytes_max);
        sizes.apply(&mut self.config);
        self.kept_max = Kept { events: sizes.queued_records, bytes: sizes.queued_kib * 1024 };
        let client = KafkaClient::start(&self.config)?;
        let mut assignment = TopicPartitionList::new();
        for slot in self.slots.iter_mut().filter(|slot| slot.is_needed()) {
            let TopicPartition { topic, partition } = &slot.topic_partition;
            assignment
                .add_partition_offset(topic, *partition, Offset::Offset(slot.fetch_from()))
                .map_err(|error| client_error("assigning", &error))?;
            (slot.is_fed, slot.is_fetched) = (true, true);
        }
        let needed = self.slots.iter().enumerate().filter(|(_, slot)| slot.is_needed());
        let named = needed.map(|(index, slot)| (index, &slot.topic_partition));
        // Before `assign`, so that no event comes by the common queue.
        self.queue = Queue::open(client.consumer(), named, &self.wake);
        if self.queue.is_none() {
            let problem = "a topic partition has no queue".to_owned();
            return Err(SourceError::Client { doing: "assigning", problem });
        }
        client.consumer().assign(&assignment).map_err(|error| client_error("assigning", &error))?;
        self.client = Some(client);
        self.needs_client = false;
        Ok(())
    }

    /// Lets client and queue go, with every event in it. The next read starts a client.
    fn let_client_go(&mut self) {
        self.keep_tails();
        for slot in &mut self.slots {
            (slot.is_fed, slot.is_fetched) = (false, false);
            mutant!("new-client-compares-nothing", () => slot.begin_anew());
        }
        self.queue = None;
        self.client = None;
        self.needs_client = true;
    }

    fn ensure_client(&mut self) -> Result<(), SourceError> {
        if self.needs_client { self.start_client() } else { Ok(()) }
    }

    /// Waits until the last consumed record of every topic partition was compared or found to be gone, and nothing else
    /// stands before its start. Records that arrive meanwhile are kept for [`Reader::read`]; where they are too many for their
    /// share of memory they are fetched again.
    ///
    /// # Errors
    /// [`SourceError::TailDiffers`] lists every topic partition whose record differs; [`SourceError::Stalled`] if `timeout`
    /// passes in which none moved; otherwise as [`Reader::read`].
    pub fn verify_tails(&mut self, timeout: Duration) -> Result<(), SourceError> {
        self.ensure_client()?;
        let compared = self.compare_tails(timeout);
        if let Some(queue) = &mut self.queue {
            queue.put_back();
        }
        if self.slots.iter().any(|slot| slot.is_needed() && !slot.is_fed) {
            // Compared once more as they are read, like the tails of every new client.
            self.let_client_go();
        }
        compared?;
        self.ensure_client()
    }

    fn compare_tails(&mut self, timeout: Duration) -> Result<(), SourceError> {
        let begun = self.time_read;
        let mut keeps = true;
        // By name: who meets a new client on the way is compared twice.
        let mut differing = BTreeMap::new();
        while let Some(index) = self.slots.iter().position(|slot| slot.unchecked.is_some()) {
            let round_begun = Instant::now();
            let mut moved = false;
            for _ in 0..ROUND_EVENTS_MAX {
                let Some(index) = self.arrived()? else { break };
                self.compare_or_keep(index, &mut differing, &mut keeps)?;
                moved = true;
            }
            self.time_read += round_begun.elapsed();
            if !keeps {
                self.stop_fetching(|slot| slot.unchecked.is_none());
            }
            // Since any of them moved: where they are many, they stand in a line.
            let moved_at = self.slots.iter().map(|slot| slot.moved_at).fold(begun, Duration::max);
            let silent = self.time_read.saturating_sub(moved_at);
            if silent >= timeout {
                return Err(self.stalled(index, silent));
            }
            if moved {
                self.serve()?;
            } else {
                self.wait(timeout.saturating_sub(silent))?;
            }
        }
        if differing.is_empty() {
            return Ok(());
        }
        self.let_client_go();
        Err(SourceError::TailDiffers { places: differing.into_iter().collect() })
    }

    /// Compares what arrived with its slot's tail, or keeps it for later.
    fn compare_or_keep(
        &mut self,
        index: usize,
        differing: &mut BTreeMap<TopicPartition, i64>,
        keeps: &mut bool,
    ) -> Result<(), SourceError> {
        let (slot, Some(queue)) = (&mut self.slots[index], &mut self.queue) else { return Ok(()) };
        if slot.unchecked.is_some() {
            match slot.look(queue, self.time_read) {
                Ok(Next::Record | Next::Finished) => {}
                Ok(Next::Passed) => return Ok(()),
                Err(Fault::TailDiffers { offset }) => {
                    slot.unchecked = None;
                    differing.insert(slot.topic_partition.clone(), offset);
                }
                Err(fault) => return self.resolve(index, fault),
            }
        }
        // Everything behind it is kept as it is, so that it is looked at in order.
        if *keeps && slot.is_needed() && slot.is_fed {
            let kept = queue.keep();
            if kept.events <= self.kept_max.events && kept.bytes <= self.kept_max.bytes {
                return Ok(());
            }
            *keeps = false;
            queue.drop_kept();
            for slot in self.slots.iter_mut().filter(|slot| slot.unchecked.is_none()) {
                slot.is_fed = false;
            }
            return Ok(());
        }
        queue.drop_head();
        slot.is_fed = false;
        Ok(())
    }

    /// Moves frozen ends forward, so that a reader that was exhausted reads on. An end that is not beyond the one that it has
    /// changes nothing.
    ///
    /// # Errors
    /// [`SourceError::Client`] if a topic partition that was never read needs a client and it refuses.
    pub fn extend(&mut self, ends: &BTreeMap<TopicPartition, NextOffset>) -> Result<(), SourceError> {
        let mut is_fed = true;
        for slot in &mut self.slots {
            let Some(&end) = ends.get(&slot.topic_partition).filter(|end| **end > slot.end) else { continue };
            slot.end = end;
            (slot.finished, slot.at_end) = (false, false);
            slot.moved(self.time_read);
            is_fed &= slot.is_fed;
        }
        if is_fed { Ok(()) } else { self.start_client() }
    }

    /// Divides the queues' memory with other readers from now on. What was fetched and not read is fetched again.
    ///
    /// # Errors
    /// [`SourceError::Client`] if the client refuses the assignment.
    pub fn divide_queue(&mut self, parts: u32) -> Result<(), SourceError> {
        if self.options.queue_parts == parts {
            return Ok(());
        }
        self.options.queue_parts = parts;
        self.start_client()
    }

    /// Appends records to the chunk until a limit, the deadline, or the frozen end of every topic partition.
    ///
    /// Tails that were not compared by [`Reader::verify_tails`] are compared here.
    ///
    /// # Errors
    /// Nothing at or after [`Reader::positions`] was delivered, so a new reader from there goes on.
    /// [`SourceError::OffsetsLost`], [`SourceError::UnknownTopic`], [`SourceError::NotAuthorized`],
    /// [`SourceError::Damaged`], [`SourceError::TailDiffers`]: a person decides. [`SourceError::Stalled`],
    /// [`SourceError::Away`]: try again later. Whatever it is, the next call meets it again if it lasts.
    pub fn read(&mut self, chunk: &mut RecordChunk, limits: ReadLimits) -> Result<ReadStatus, SourceError> {
        self.ensure_client()?;
        let status = self.read_arriving(chunk, limits);
        self.keep_tails();
        status
    }

    fn keep_tails(&mut self) {
        let Some(queue) = &mut self.queue else { return };
        for (index, slot) in self.slots.iter_mut().enumerate() {
            slot.keep_tail(index, queue);
        }
    }

    /// Waits until a record stands at the head of the queue, and leaves it there; `false` if the deadline passed first.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub fn await_record(&mut self, deadline: Instant) -> Result<bool, SourceError> {
        self.ensure_client()?;
        loop {
            let mut moved = false;
            for _ in 0..ROUND_EVENTS_MAX {
                let Some(index) = self.arrived()? else { break };
                moved = true;
                match self.look(index) {
                    Ok(Next::Record) => {
                        self.slots[index].moved(self.time_read);
                        return Ok(true);
                    }
                    Ok(Next::Passed | Next::Finished) => {}
                    Err(fault) => self.resolve(index, fault)?,
                }
            }
            let now = Instant::now();
            if now >= deadline {
                return Ok(false);
            }
            if moved {
                self.stop_fetching(|slot| !slot.is_needed());
                self.serve()?;
            } else {
                self.wait(deadline - now)?;
            }
            self.check_stall()?;
        }
    }

    /// Begins to measure silence anew, after [`SourceError::Stalled`] or [`SourceError::Away`] that is to be sat out.
    /// `renewed` = with a new client at the same positions, where the broker answers and the one before got nothing.
    ///
    /// # Errors
    /// As [`Reader::assign`].
    pub fn be_patient(&mut self, renewed: bool) -> Result<(), SourceError> {
        for slot in &mut self.slots {
            slot.moved_at = self.time_read;
        }
        if renewed { self.start_client() } else { Ok(()) }
    }

    fn read_arriving(
        &mut self,
        chunk: &mut RecordChunk,
        limits: ReadLimits,
    ) -> Result<ReadStatus, SourceError> {
        loop {
            if !self.is_anything_needed() {
                return Ok(ReadStatus::Exhausted);
            }
            let mut moved = false;
            for _ in 0..ROUND_EVENTS_MAX {
                let Some(index) = self.arrived()? else { break };
                moved = true;
                let has_room = match self.take_next(index, chunk, limits) {
                    Ok(has_room) => has_room,
                    Err(fault) => self.resolve(index, fault).map(|()| true)?,
                };
                // At once: what arrives next may stand behind an end, and it stays in the queue.
                if !self.slots[index].is_needed() && !self.is_anything_needed() {
                    return Ok(ReadStatus::Exhausted);
                }
                if !has_room {
                    return Ok(ReadStatus::Full);
                }
            }
            // Silence is counted only while nothing arrives of any of them: a topic partition that waits behind the others is
            // asked for no earlier.
            let now = Instant::now();
            if now >= limits.deadline {
                return Ok(ReadStatus::DeadlinePassed);
            }
            if moved {
                self.stop_fetching(|slot| !slot.is_needed());
                self.serve()?;
            } else {
                self.wait(limits.deadline - now)?;
            }
            self.check_stall()?;
        }
    }

    fn is_anything_needed(&self) -> bool {
        self.slots.iter().any(Slot::is_needed)
    }

    /// The slot of what arrived next. After an error nothing is read on with this client.
    fn arrived(&mut self) -> Result<Option<usize>, SourceError> {
        let arrived = self.queue.as_mut().map_or(Ok(None), Queue::next);
        if arrived.is_err() {
            self.let_client_go();
        }
        arrived
    }

    /// Looks at what arrived of a slot; lets it go where nothing is to be read of it.
    fn look(&mut self, index: usize) -> Result<Next, Fault> {
        let (slot, Some(queue)) = (&mut self.slots[index], &mut self.queue) else { return Ok(Next::Passed) };
        if slot.is_needed() && slot.is_fed {
            return slot.look(queue, self.time_read);
        }
        queue.drop_head();
        slot.is_fed = false;
        Ok(Next::Passed)
    }

    /// Takes what arrived of a slot. False if the chunk is full, with it or without.
    fn take_next(
        &mut self,
        index: usize,
        chunk: &mut RecordChunk,
        limits: ReadLimits,
    ) -> Result<bool, Fault> {
        let number = u32::try_from(index).expect("a plan has fewer than 2^32 topic partitions");
        let next = self.look(index)?;
        let (slot, Some(queue)) = (&mut self.slots[index], &mut self.queue) else { return Ok(true) };
        match next {
            Next::Passed | Next::Finished => Ok(true),
            Next::Record if is_full(chunk, queue, limits) => Ok(false),
            Next::Record => {
                slot.deliver(number, queue, chunk, self.options.headers);
                slot.moved(self.time_read);
                if slot.next >= slot.end {
                    slot.finish();
                }
                // At once, not when the next record shows: it may be long in coming.
                Ok(!is_at_limit(chunk, limits))
            }
        }
    }

    /// Has librdkafka fetch no more of the slots that are assigned and of which this is so. What it has fetched is let go.
    fn stop_fetching(&mut self, is_enough: impl Fn(&Slot) -> bool) {
        let Some(client) = &self.client else { return };
        let mut enough = TopicPartitionList::new();
        for slot in self.slots.iter_mut().filter(|slot| slot.is_fetched && is_enough(slot)) {
            enough.add_partition(&slot.topic_partition.topic, slot.topic_partition.partition);
            (slot.is_fetched, slot.is_fed) = (false, false);
        }
        if enough.count() == 0 {
            return;
        }
        // Only to spare the work: whatever arrives of them is let go.
        if let Err(error) = client.consumer().pause(&enough) {
            tracing::debug!(%error, "topic partitions that are read to their ends are fetched on");
        }
    }

    /// Decides on a fault: an error, or a note and another try. After an error nothing is read on with this client.
    fn resolve(&mut self, index: usize, fault: Fault) -> Result<(), SourceError> {
        let decided = self.decide(index, fault);
        if decided.is_err() {
            mutant!("reads-on-after-a-fault", () => self.let_client_go());
        }
        decided
    }

    /// All branching on what a fault means.
    fn decide(&mut self, index: usize, fault: Fault) -> Result<(), SourceError> {
        let slot = &mut self.slots[index];
        let topic_partition = slot.topic_partition.clone();
        let (code, problem) = match fault {
            Fault::TailDiffers { offset } => {
                return Err(SourceError::TailDiffers { places: vec![(topic_partition, offset)] });
            }
            Fault::WentBack { found } => {
                return Err(SourceError::WentBack { topic_partition, expected: slot.next, found });
            }
            Fault::Failed { code, problem } => (code, problem),
        };
        match code {
            RDKafkaErrorCode::AutoOffsetReset | RDKafkaErrorCode::OffsetOutOfRange => {
                self.out_of_range(index, problem)
            }
            RDKafkaErrorCode::BadMessage
            | RDKafkaErrorCode::BadCompression
            | RDKafkaErrorCode::InvalidMessage
            | RDKafkaErrorCode::NotImplemented => self.read_again(index, problem),
            RDKafkaErrorCode::TopicAuthorizationFailed => Err(not_authorized(&topic_partition.topic, code)),
            code if is_unknown_topic(code) => {
                Err(SourceError::UnknownTopic { topic: topic_partition.topic, nearest: Vec::new() })
            }
            _ => {
                tracing::debug!(%topic_partition, ?code, "{problem}");
                slot.last_problem = Some(problem);
                Ok(())
            }
        }
    }

    /// An offset was refused: says exactly what is lost, or tries again where nothing is.
    fn out_of_range(&mut self, index: usize, problem: String) -> Result<(), SourceError> {
        let Some(client) = self.client.as_ref() else { return Ok(()) };
        let TopicPartition { topic, partition } = &self.slots[index].topic_partition;
        let begun = Instant::now();
        let asked = client.consumer().fetch_watermarks(topic, *partition, RANGE_TIME_MAX);
        let (low, end) = asked.map_err(|error| self.range_unknown(topic, begun.elapsed(), &error))?;
        let slot = &mut self.slots[index];
        let next = slot.next.get();
        let lost = |from, to, loss| {
            let (from, to) = (NextOffset::at(from), NextOffset::at(to));
            let range = LostRange { topic_partition: slot.topic_partition.clone(), from, to, loss };
            Err(SourceError::OffsetsLost { ranges: vec![range] })
        };
        if next < low {
            return lost(next, low, Loss::Removed);
        }
        if next > end {
            return lost(end, next, Loss::Truncated);
        }
        // Only the tail was removed, since the question for `low` or since it was taken: no difference.
        if slot.unchecked.is_some_and(|tail| tail.offset < low) {
            slot.removed_below(low);
            self.let_removed_tails_go();
        }
        self.read_again(index, problem)
    }

    /// What retention removed of one topic partition it has removed of others: asked at once, not by a client for each.
    fn let_removed_tails_go(&mut self) {
        let Some(client) = self.client.as_ref() else { return };
        for slot in self.slots.iter_mut().filter(|slot| slot.unchecked.is_some()) {
            let TopicPartition { topic, partition } = &slot.topic_partition;
            let held = client.consumer().fetch_watermarks(topic, *partition, RANGE_TIME_MAX);
            // Its own refusal tells; each unanswered question may take as long as this one did.
            let Ok((low, _)) = held else { return };
            slot.removed_below(low);
        }
    }

    /// No answer to the question for a range: whatever the client calls it, it says nothing about what is lost.
    fn range_unknown(&self, topic: &str, waited: Duration, error: &KafkaError) -> SourceError {
        match code_of(error) {
            code @ RDKafkaErrorCode::TopicAuthorizationFailed => not_authorized(topic, code),
            code if is_unknown_topic(code) => {
                SourceError::UnknownTopic { topic: topic.to_owned(), nearest: Vec::new() }
            }
            _ => SourceError::Away {
                brokers: self.brokers.clone(),
                doing: "asking for the range of a log",
                waited,
                last: error.to_string(),
            },
        }
    }

    /// Reads again from the next offsets, with a new client, a bounded number of times.
    fn read_again(&mut self, index: usize, problem: String) -> Result<(), SourceError> {
        let slot = &mut self.slots[index];
        slot.rereads += 1;
        if slot.rereads > REREADS_MAX {
            return Err(SourceError::Damaged {
                topic_partition: slot.topic_partition.clone(),
                from: slot.unseen_from(),
                reads: slot.rereads,
                problem,
            });
        }
        tracing::warn!(topic_partition = %slot.topic_partition, next = %slot.next, "{problem}; reading again");
        slot.last_problem = Some(problem);
        // Nothing to wait for: whether the broker mended the batch shows only by reading it again.
        std::thread::sleep(REREAD_AFTER);
        self.start_client()
    }

    /// Waits for an event, at most `longest` and never long.
    fn wait(&mut self, longest: Duration) -> Result<(), SourceError> {
        let begun = Instant::now();
        let is_at_rest = !self.slots.iter().any(Slot::is_owed);
        self.wake.wait(longest.min(if is_at_rest { WAIT_AT_REST_MAX } else { WAIT_MAX }));
        self.time_read += begun.elapsed();
        self.serve()
    }

    fn serve(&self) -> Result<(), SourceError> {
        self.client.as_ref().map_or(Ok(()), KafkaClient::serve)
    }

    fn check_stall(&self) -> Result<(), SourceError> {
        let silent = |slot: &Slot| self.time_read.saturating_sub(slot.moved_at);
        // While the line moves.
        let stall_after = self.options.stall_after;
        let moves = self.slots.iter().any(|slot| silent(slot) < stall_after);
        let others = u32::try_from(self.slots.len().saturating_sub(1)).unwrap_or(u32::MAX);
        let in_line = PATIENCE_PER_OTHER.saturating_mul(if moves { others } else { 0 });
        let patience = stall_after.saturating_add(in_line);
        let longest = (0..self.slots.len())
            .filter(|&index| self.slots[index].is_owed())
            .max_by_key(|&index| silent(&self.slots[index]));
        match longest {
            Some(index) if silent(&self.slots[index]) >= patience => {
                Err(self.stalled(index, silent(&self.slots[index])))
            }
            _ => Ok(()),
        }
    }

    /// Names the cause of silence: no broker at all, or this topic partition.
    fn stalled(&self, index: usize, waited: Duration) -> SourceError {
        let slot = &self.slots[index];
        let said = self.client.as_ref().map(|client| client.context().last_error());
        let last = slot.last_problem.clone().or(said).unwrap_or_default();
        let reachable = self.client.as_ref().is_some_and(|client| {
            client.consumer().fetch_metadata(Some(&slot.topic_partition.topic), RANGE_TIME_MAX / 5).is_ok()
        });
        if reachable {
            SourceError::Stalled {
                topic_partition: slot.topic_partition.clone(),
                next: slot.next,
                end: slot.end,
                waited,
                last,
            }
        } else {
            SourceError::Away { brokers: self.brokers.clone(), doing: "reading", waited, last }
        }
    }

    /// The topic partition of each slot.
    pub fn topic_partitions(&self) -> impl ExactSizeIterator<Item = &TopicPartition> {
        self.slots.iter().map(|slot| &slot.topic_partition)
    }

    /// The next offset of each slot: after the last delivered record, past control records and gaps that were seen to
    /// be empty, and the frozen end once it is reached.
    pub fn positions(&self) -> Vec<NextOffset> {
        self.slots.iter().map(|slot| slot.next).collect()
    }

    /// The last record consumed of each slot; the plan's own tail where no record came.
    pub fn tails(&self) -> Vec<Option<Tail>> {
        self.slots.iter().map(|slot| slot.tail).collect()
    }

    /// Whether each slot stands at the end of what a committed reader may see, as far as is known.
    pub fn at_end(&self) -> Vec<bool> {
        self.slots
            .iter()
            .map(|slot| slot.at_end || (slot.finished && slot.end != ReadPlan::no_end()))
            .collect()
    }

    /// Offsets between the positions and the frozen ends, as far as these are finite.
    pub fn lag_left(&self) -> u64 {
        let left = |slot: &Slot| {
            if slot.end == ReadPlan::no_end() {
                0
            } else {
                u64::try_from(slot.end.get() - slot.next.get()).unwrap_or(0)
            }
        };
        self.slots.iter().map(left).sum()
    }
}

fn is_at_limit(chunk: &RecordChunk, limits: ReadLimits) -> bool {
    chunk.len() >= limits.records_max || chunk.payload_bytes() >= limits.bytes_max
}

/// Whether the record at the head is to wait for the next chunk.
fn is_full(chunk: &RecordChunk, queue: &Queue, limits: ReadLimits) -> bool {
    if is_at_limit(chunk, limits) {
        return true;
    }
    let Some(record) = queue.record() else { return false };
    let bytes = record.key().map_or(0, <[u8]>::len) + record.payload().map_or(0, <[u8]>::len);
    !chunk.is_empty() && chunk.payload_bytes() + bytes > limits.bytes_max
}

#[cfg(test)]
mod tests;
