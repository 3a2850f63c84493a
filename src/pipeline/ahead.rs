//! Reading ahead: while a chunk is looked up and written, or a microbatch committed, the next chunk is read and
//! decoded by a thread of its own.
//!
//! Flow: live reader -> that thread { chunk -> decoder } -> [`Ahead`] with the reader -> the next [`Session::next_chunk`]
//!
//! The thread reads until the chunk is full, or the run wants it and it is not full soon. That is read on by the run itself, under
//! the rules by which a microbatch closes, so that these know nothing of reading ahead. What was read and does not belong to
//! the open microbatch is the first of the next one.
//!
//! Nothing of it is judged, looked up or written, so nothing has to be undone: where a microbatch does not land the life
//! ends, and what was read ahead goes with it and is read again.
//!
//! Invariants
//! 1. At most one chunk is ahead, and the reader is with the thread or at home, never both.
//! 2. What a ledger record says of offsets comes from [`Reached`](super::lanes::Reached) of the lane, which moves only when a
//!    microbatch takes what was read.
//! 3. An error that the reader met is the run's, after what the reader gave before it: the next read of the lane gives it, without
//!    asking the broker again, and until then nothing is read ahead.
//!
//! Only the live lane is read ahead, and only while no backfill is active: whose turn is next is known then. Where each
//! lookup of a state that does not fit in memory has its price chunks are as large as memory allows, so that nothing is read
//! beside them (`gather`); a commit has room for it.
//!
//! Bounds: one chunk, so small that it fits into what the one in work, and rows that are with their writer, leave of
//! decode's share whatever its records are; its bytes lie in the buffer of the one before. It delays the run by a turn of the
//! reader, or by a few where that fills the chunk, and what is left of decoding.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use iceberg::spec::DataFile;

use super::microbatch::{Open, Run, undecodable};
use super::profile::{Profile, Stage};
use super::session::Session;
use crate::commit::ledger::LedgerRecord;
use crate::decode::{Decoded, Decoder};
use crate::memory::MemoryPlan;
use crate::offset::TopicPartition;
use crate::record::RecordChunk;
use crate::source::{ReadLimits, ReadStatus, Reader, SourceError};
use crate::stop::Stop;

/// Longest wait for records before it is looked whether the run wants what is there.
const READ_TURN: Duration = Duration::from_millis(10);
/// Where the run wants a chunk that is not full, it is filled on if it is full after so many turns like the last one.
const TURNS_TO_FILL: usize = 8;
/// Name of the thread, in lists of threads.
const THREAD_NAME: &str = "read-ahead";

/// A chunk that was read before it was asked for.
pub(super) struct Ahead {
    /// At least one record.
    pub(super) chunk: RecordChunk,
    /// When its first record was there.
    pub(super) since: Instant,
    /// What a chunk that was read to its bounds became, or why it can not be decoded; `None` = more may be read into it.
    pub(super) decoded: Option<Result<Decoded, Stop>>,
}

/// What the thread is to read.
struct Order {
    reader: Reader,
    slots: Arc<[TopicPartition]>,
    chunk: RecordChunk,
    limits: ReadLimits,
}

/// What came of it.
struct Done {
    reader: Reader,
    chunk: RecordChunk,
    since: Option<Instant>,
    decoded: Option<Result<Decoded, Stop>>,
    /// What ended it; what is in the chunk came before it.
    fault: Option<SourceError>,
}

/// The thread.
struct Helper {
    orders: Sender<Order>,
    done: Receiver<Done>,
    thread: JoinHandle<()>,
}

/// What is read ahead of a life.
pub(super) struct ReadingAhead {
    /// `None` of a life that has one thread only, or reads no topic.
    helper: Option<Helper>,
    is_wanted: Arc<AtomicBool>,
    is_under_way: bool,
    /// Read and not taken yet.
    ready: Option<Ahead>,
    /// An empty chunk whose allocation is used again.
    spare: RecordChunk,
}

impl ReadingAhead {
    /// Nothing is ever read ahead.
    pub(super) fn never() -> Self {
        let (is_wanted, spare) = (Arc::default(), RecordChunk::default());
        Self { helper: None, is_wanted, is_under_way: false, ready: None, spare }
    }

    /// Begins the thread. Without one everything works, one thing after another.
    pub(super) fn with(decoder: Decoder, profile: Arc<Profile>) -> Self {
        let mut reading = Self::never();
        let (orders, to_read) = mpsc::channel();
        let (finished, done) = mpsc::channel();
        let is_wanted = Arc::clone(&reading.is_wanted);
        let serve = move || serve(&to_read, &finished, decoder, &is_wanted, &profile);
        match thread::Builder::new().name(THREAD_NAME.to_owned()).spawn(serve) {
            Ok(thread) => reading.helper = Some(Helper { orders, done, thread }),
            Err(error) => tracing::warn!(%error, "no thread to read ahead"),
        }
        reading
    }

    /// An empty chunk.
    pub(super) fn take_spare(&mut self) -> RecordChunk {
        std::mem::take(&mut self.spare)
    }

    /// Takes a chunk back that is not needed any more.
    pub(super) fn keep_spare(&mut self, mut chunk: RecordChunk) {
        chunk.clear();
        self.spare = chunk;
    }

    /// Whether something was read and not taken yet.
    pub(super) fn is_ready(&self) -> bool {
        self.ready.is_some()
    }

    /// Whether something could be read ahead now.
    fn is_free(&self) -> bool {
        self.helper.is_some() && !self.is_under_way && self.ready.is_none()
    }

    fn begin(&mut self, reader: Reader, slots: Arc<[TopicPartition]>, limits: ReadLimits) {
        let chunk = self.take_spare();
        let Some(helper) = &self.helper else { unreachable!("only what is free begins") };
        self.is_wanted.store(false, Ordering::Relaxed);
        self.is_under_way = true;
        if helper.orders.send(Order { reader, slots, chunk, limits }).is_err() {
            self.fall();
        }
    }

    /// Has the thread come to an end; `None` if nothing is under way.
    fn end(&mut self) -> Option<Done> {
        if !std::mem::take(&mut self.is_under_way) {
            return None;
        }
        self.is_wanted.store(true, Ordering::Relaxed);
        let helper = self.helper.as_ref()?;
        match helper.done.recv() {
            Ok(done) => Some(done),
            Err(_) => self.fall(),
        }
    }

    /// The thread fell: so does the run.
    fn fall(&mut self) -> ! {
        let helper = self.helper.take().expect("a thread that fell was begun");
        let fell = helper.thread.join();
        std::panic::resume_unwind(fell.expect_err("a thread that serves ends by its panic alone"))
    }
}

impl Drop for ReadingAhead {
    /// Waits for the thread: it may hold a client.
    fn drop(&mut self) {
        self.is_wanted.store(true, Ordering::Relaxed);
        let Some(Helper { orders, done, thread }) = self.helper.take() else { return };
        drop((orders, done));
        // A panic was told already, or it comes of the one that drops this.
        let _ = thread.join();
    }
}

/// Reads what is ordered, until nobody orders any more.
fn serve(
    orders: &Receiver<Order>,
    finished: &Sender<Done>,
    mut decoder: Decoder,
    is_wanted: &AtomicBool,
    profile: &Profile,
) {
    while let Ok(order) = orders.recv() {
        let done = read(order, &mut decoder, is_wanted, profile);
        if finished.send(done).is_err() {
            return;
        }
    }
}

/// Reads until the chunk is at its bounds or wanted; decodes it if it is at its bounds.
fn read(order: Order, decoder: &mut Decoder, is_wanted: &AtomicBool, profile: &Profile) -> Done {
    let Order { mut reader, slots, mut chunk, limits } = order;
    let (mut since, mut fault) = (None, None);
    let is_whole = loop {
        let turn = ReadLimits { deadline: Instant::now() + READ_TURN, ..limits };
        let before = (chunk.len(), chunk.payload_bytes());
        let status = profile.beside(Stage::Fetch, || reader.read(&mut chunk, turn));
        if since.is_none() && !chunk.is_empty() {
            since = Some(Instant::now());
        }
        match status {
            Ok(ReadStatus::Full | ReadStatus::Exhausted) => break true,
            Ok(ReadStatus::DeadlinePassed)
                if !is_wanted.load(Ordering::Relaxed) || is_soon_full(&chunk, before, limits) => {}
            Ok(ReadStatus::DeadlinePassed) => break false,
            Err(error) => {
                fault = Some(error);
                break false;
            }
        }
    };
    let is_to_be_decoded = is_whole && !chunk.is_empty();
    let decode = || decoder.decode(&chunk, &slots).map_err(undecodable);
    let decoded = is_to_be_decoded.then(|| profile.beside(Stage::Decode, decode));
    Done { reader, chunk, since, decoded, fault }
}

/// Whether a chunk is full after a few turns more that give as much as the last one. `before` = its records and bytes before it.
fn is_soon_full(chunk: &RecordChunk, before: (usize, usize), limits: ReadLimits) -> bool {
    let is_soon = |is: usize, was: usize, most: usize| is + (is - was) * TURNS_TO_FILL >= most;
    is_soon(chunk.len(), before.0, limits.records_max)
        || is_soon(chunk.payload_bytes(), before.1, limits.bytes_max)
}

impl Session<'_> {
    /// Whether chunks are read beside the one in work.
    fn reads_beside_work(&self) -> bool {
        self.ahead.helper.is_some() && self.gathering.reads_beside_work()
    }

    /// Bounds of a chunk that the run reads itself, of a microbatch that may take so much more: it fits into what rows that
    /// are with their writer and keys that wait leave of decode's share, and leaves room for one to be read beside it.
    pub(super) fn limits_beside(&self, open: &Open, records_left: u64, bytes_left: u64) -> ReadLimits {
        let left = self.memory.payload_bytes_beside(open.main.held_bytes() + self.gathered_beyond(open));
        let bytes_max = if self.reads_beside_work() { left / 2 } else { left };
        let records_max = MemoryPlan::records_max(bytes_max);
        self.chunk_limits(records_left.min(records_max), bytes_left.min(bytes_max))
    }

    /// Begins to read the chunk after the one in work, whose rows hold so many bytes and whose records are not needed any
    /// more.
    pub(super) fn read_beside_work(&mut self, open: &Open, held_bytes: u64) {
        if !self.reads_beside_work() || open.is_cut_short() {
            return;
        }
        let held_bytes = held_bytes + open.main.held_bytes() + self.gathered_beyond(open);
        let Some(bytes_max) = self.memory.ahead_payload_bytes_max(held_bytes) else { return };
        let (records_left, bytes_left) = match self.room_left(open) {
            Some(left) => left,
            // It is full: what comes is of the next one.
            None if open.is_last => return,
            None => {
                let limits = &self.owner.world.loaded.job.microbatch;
                (limits.records_max, limits.payload_bytes_max)
            }
        };
        let records_max = MemoryPlan::records_max(bytes_max);
        let limits = self.chunk_limits(records_left.min(records_max), bytes_left.min(bytes_max));
        self.read_ahead(limits);
    }

    /// Begins to read ahead if that may be.
    fn read_ahead(&mut self, limits: ReadLimits) {
        // What comes after this one is known before it landed only where there is one lane.
        let takes_turns = self.owner.record.active_backfills().next().is_some();
        let is_served = self.lanes.served().is_live() && !takes_turns && !self.lanes.live().has_fault();
        if !self.ahead.is_free() || !is_served || self.exhausted() || self.options.is_ending() {
            return;
        }
        let live = self.lanes.live_mut();
        let slots = Arc::clone(&live.slots);
        self.ahead.begin(live.lend(), slots, limits);
    }

    /// Has the reader come home. What was read ahead is ready then.
    pub(super) fn recall(&mut self) {
        let Some(Done { reader, chunk, since, decoded, fault }) = self.ahead.end() else { return };
        let live = self.lanes.live_mut();
        live.take_back(reader, fault);
        match since {
            Some(since) => self.ahead.ready = Some(Ahead { chunk, since, decoded }),
            None => {
                // It may have passed control records, which nobody has to take.
                live.stand_at_reader();
                self.ahead.keep_spare(chunk);
            }
        }
    }

    /// Gives up what was read ahead: the lane is about to be read anew from where the ledger stands.
    pub(super) fn forget_ahead(&mut self) {
        self.recall();
        if let Some(Ahead { chunk, .. }) = self.ahead.ready.take() {
            self.ahead.keep_spare(chunk);
        }
    }

    /// What was read ahead, if anything. It is the open microbatch's now.
    pub(super) fn take_ahead(&mut self) -> Option<Ahead> {
        self.recall();
        let ahead = self.ahead.ready.take()?;
        assert!(
            self.lanes.served().is_live(),
            "what was read ahead is of the live lane, which is served first"
        );
        self.lanes.live_mut().stand_at_reader();
        Some(ahead)
    }
}

impl Run<'_, '_> {
    /// Commits, and reads ahead meanwhile. Gives the number of requests.
    pub(super) async fn commit_beside_reading(
        &mut self,
        next: LedgerRecord,
        files: Vec<DataFile>,
    ) -> Result<u32, Stop> {
        let is_cut_off = self.session.lanes.ends_with.is_some();
        let is_last = next.released || self.is_ending() || self.is_last_batch() || is_cut_off;
        if !is_last {
            let limits = self.session.first_chunk_limits();
            self.session.read_ahead(limits);
        }
        let sent = self.session.owner.commit(next, files).await;
        self.session.recall();
        sent
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::ClientConfig;
    use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

    use super::*;
    use crate::commit::ledger::LIVE_LANE;
    use crate::generate::{Broker, demo_job_toml};
    use crate::job::file;
    use crate::pipeline::lanes::LaneReader;
    use crate::pipeline::owner::new_decoder;
    use crate::source::{Connection, ReadPlan, ReaderOptions};

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn what_the_reader_met_ahead_is_given_to_the_next_read_although_the_broker_shows_it_no_more() {
        let broker = Broker::start().unwrap();
        let topics = ["events".to_owned()];
        broker.create_topics(&topics, 1).unwrap();
        let producer: BaseProducer =
            ClientConfig::new().set("bootstrap.servers", broker.bootstrap()).create().unwrap();
        producer.send(BaseRecord::<(), _>::to("events").payload("{}")).unwrap();
        producer.flush(PATIENCE).unwrap();
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("job.toml");
        std::fs::write(&path, demo_job_toml(broker.bootstrap(), folder.path(), &topics)).unwrap();
        let job = file::read(&path, &[], &|_| None).unwrap().job;
        let connection = Connection::open(&job.source, 16 << 20, "test").unwrap();
        let held = connection.offsets(&[TopicPartition::new("events", 0)]).unwrap();
        let plan = held.into_iter().map(|(topic_partition, range)| ReadPlan {
            topic_partition,
            start: range.low,
            end: range.end,
            low: range.low,
            tail: None,
        });
        let (plans, options) = (plan.collect(), ReaderOptions::default());
        broker.forbid_one_fetch();
        let mut lane =
            LaneReader::open(&connection, None, LIVE_LANE, plans, options, &job.event_time).unwrap();

        let limits = ReadLimits { records_max: 10, bytes_max: 1 << 20, deadline: Instant::now() };
        let (slots, chunk) = (Arc::clone(&lane.slots), RecordChunk::default());
        let order = Order { reader: lane.lend(), slots, chunk, limits };
        let mut decoder = new_decoder(&job).unwrap();
        let Done { reader, mut chunk, fault, .. } =
            read(order, &mut decoder, &AtomicBool::new(false), &Profile::default());
        assert!(matches!(fault, Some(SourceError::NotAuthorized { .. })), "{fault:?}");
        lane.take_back(reader, fault);
        assert!(lane.has_fault() && chunk.is_empty());

        let limits = ReadLimits { deadline: Instant::now() + PATIENCE, ..limits };
        let met = lane.read(&mut chunk, limits).unwrap_err();
        assert!(matches!(met, SourceError::NotAuthorized { .. }), "{met:?}");
        assert!(!lane.has_fault() && chunk.is_empty());
        assert_eq!(lane.read(&mut chunk, limits).unwrap(), ReadStatus::Exhausted);
        assert_eq!(chunk.len(), 1);
    }
}
