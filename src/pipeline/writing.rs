//! Writing beside: while rows of the main table are encoded and handed to the storage by a thread of its own, the next probe
//! batch is judged and looked up, and the one after it read and decoded (`ahead`).
//!
//! Flow: first-seen rows -> [`Writing::write`] -> queue -> that thread { the table's writer } -> the writer comes home ->
//! [`Writing::finish`]
//!
//! Invariants
//! 1. The writer is with the thread or at home, never both. Only at home it is finished or aborted.
//! 2. Rows come to the writer in the order in which they were given. After an error of the writer none does, and that error is
//!    what the next write gives, or `finish`: a writer that failed is never finished.
//! 3. A panic of the thread is one of the run, at the same places.
//!
//! What one writer takes is encoded by one thread: neither columns of a file nor files of different table partitions are encoded
//! side by side, for the iceberg crate has no way in for the first, and a stream has mostly one table partition at a time. Side
//! tables have few rows and are written by the run itself. Files are closed by the run, which has nothing else to do then.
//!
//! Bounds: a write waits until what is with the thread, queued or in work, is no more than `bytes_max`, so that what the next
//! chunk may take is what that leaves of decode's share.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, SendError, Sender};
use std::thread::{self, JoinHandle};

use arrow::array::RecordBatch;
use iceberg::spec::DataFile;
use tokio::runtime::Handle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, oneshot};

use super::profile::{Profile, Stage};
use crate::sink::writer::{TableWriter, WriteError};

/// Name of the thread, in lists of threads.
pub(super) const THREAD_NAME: &str = "write-files";

/// Makes files of rows: a table's writer, or one of a test.
pub(super) trait RowWriter: Send + 'static {
    /// Takes rows. After an error it takes no more.
    fn write(&mut self, rows: &RecordBatch) -> impl Future<Output = Result<(), WriteError>>;
}

impl RowWriter for TableWriter {
    fn write(&mut self, rows: &RecordBatch) -> impl Future<Output = Result<(), WriteError>> {
        Self::write(self, rows)
    }
}

/// A writer, and how it ended: by itself or by a panic.
type Done<W> = thread::Result<(W, Result<(), WriteError>)>;

/// A writer for the thread, and where its rows come from.
struct Order<W> {
    writer: W,
    rows: UnboundedReceiver<Given>,
    is_given_up: Arc<AtomicBool>,
    done: oneshot::Sender<Done<W>>,
}

/// Rows on their way. They are dropped before they are counted out.
struct Given {
    rows: RecordBatch,
    _held: Held,
}

/// Bytes that are with the thread, and who waits for fewer.
#[derive(Default)]
struct Room {
    held_bytes: AtomicU64,
    freed: Notify,
}

/// Some of these bytes, as long as it lives.
struct Held {
    bytes: u64,
    room: Arc<Room>,
}

impl Room {
    fn hold(self: &Arc<Self>, bytes: u64) -> Held {
        self.held_bytes.fetch_add(bytes, Ordering::Relaxed);
        Held { bytes, room: Arc::clone(self) }
    }

    fn held_bytes(&self) -> u64 {
        self.held_bytes.load(Ordering::Relaxed)
    }

    /// Of one task at a time. A writer that failed frees no more: its queue is closed, and then what it had in work freed, which
    /// ends the wait.
    async fn until_at_most(&self, bytes: u64, queue: &UnboundedSender<Given>) {
        while self.held_bytes() > bytes && !queue.is_closed() {
            // What was freed since is remembered.
            self.freed.notified().await;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.room.held_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.room.freed.notify_one();
    }
}

/// The thread, over all microbatches of a life.
pub(super) struct WriterThread<W = TableWriter> {
    /// `None` of a life that has one thread only.
    running: Option<Running<W>>,
    bytes_max: u64,
}

struct Running<W> {
    orders: Sender<Order<W>>,
    thread: JoinHandle<()>,
}

impl<W: RowWriter> WriterThread<W> {
    /// Writers stay at home.
    pub(super) fn never() -> Self {
        Self { running: None, bytes_max: 0 }
    }

    /// Begins the thread, to hold no more rows than that when a write is done. To be called within a runtime, which does what
    /// writers wait for. Without a thread everything works, one thing after another.
    pub(super) fn with(bytes_max: u64, profile: Arc<Profile>) -> Self {
        let (orders, to_serve) = mpsc::channel();
        let runtime = Handle::current();
        let serve = move || serve(&to_serve, &runtime, &profile);
        match thread::Builder::new().name(THREAD_NAME.to_owned()).spawn(serve) {
            Ok(thread) => Self { running: Some(Running { orders, thread }), bytes_max },
            Err(error) => {
                tracing::warn!(%error, "no thread to write beside");
                Self::never()
            }
        }
    }

    /// Lets the thread have a writer, if there is one.
    pub(super) fn lend(&self, writer: W) -> Writing<W> {
        let Some(Running { orders, .. }) = &self.running else { return Writing::at_home(writer) };
        let (rows, to_write) = unbounded_channel();
        let (done, home) = oneshot::channel();
        let is_given_up = Arc::<AtomicBool>::default();
        let order = Order { writer, rows: to_write, is_given_up: Arc::clone(&is_given_up), done };
        let room = Arc::default();
        match orders.send(order) {
            Ok(()) => {
                let lent = Lent { rows, home, is_given_up, room, bytes_max: self.bytes_max };
                Writing { home: None, lent: Some(lent) }
            }
            Err(SendError(order)) => Writing::at_home(order.writer),
        }
    }
}

impl<W> Drop for WriterThread<W> {
    /// Waits for the thread: it may hold a client of the storage.
    fn drop(&mut self) {
        let Some(Running { orders, thread }) = self.running.take() else { return };
        drop(orders);
        // It answers panics, and has none of its own.
        let _ = thread.join();
    }
}

/// Writes for one writer after the other, until nobody lends any more.
fn serve<W: RowWriter>(orders: &Receiver<Order<W>>, runtime: &Handle, profile: &Profile) {
    while let Ok(Order { mut writer, rows, is_given_up, done }) = orders.recv() {
        let write = || {
            let written = write_all(&mut writer, rows, &is_given_up, runtime, profile);
            (writer, written)
        };
        // Nobody waits for a writer whose run is over.
        let _ = done.send(catch_unwind(AssertUnwindSafe(write)));
    }
}

/// Writes what comes, until no more will come or it is given up.
fn write_all<W: RowWriter>(
    writer: &mut W,
    queue: UnboundedReceiver<Given>,
    is_given_up: &AtomicBool,
    runtime: &Handle,
    profile: &Profile,
) -> Result<(), WriteError> {
    // Freed after the queue is closed: whoever waited for room finds out at the next write that the writer failed.
    let mut in_work: Option<Given>;
    let mut queue = queue;
    loop {
        in_work = queue.blocking_recv();
        let Some(given) = in_work.as_ref().filter(|_| !is_given_up.load(Ordering::Relaxed)) else {
            return Ok(());
        };
        profile.beside(Stage::Write, || runtime.block_on(writer.write(&given.rows)))?;
        drop(in_work.take());
    }
}

/// A writer of the open microbatch, wherever it is.
pub(super) struct Writing<W = TableWriter> {
    /// `None` while it is lent.
    home: Option<W>,
    lent: Option<Lent<W>>,
}

struct Lent<W> {
    rows: UnboundedSender<Given>,
    home: oneshot::Receiver<Done<W>>,
    is_given_up: Arc<AtomicBool>,
    room: Arc<Room>,
    bytes_max: u64,
}

impl<W: RowWriter> Writing<W> {
    fn at_home(writer: W) -> Self {
        Self { home: Some(writer), lent: None }
    }

    /// Bytes of rows that are with the thread. Only a write makes them more.
    pub(super) fn held_bytes(&self) -> u64 {
        self.lent.as_ref().map_or(0, |lent| lent.room.held_bytes())
    }

    /// Gives rows to the writer, and waits as long as too much is with it.
    ///
    /// # Errors
    /// Those of the writer, of these rows or of earlier ones: it can only be aborted then.
    pub(super) async fn write(&mut self, rows: &RecordBatch) -> Result<(), WriteError> {
        if let Some(Lent { rows: queue, room, bytes_max, .. }) = &self.lent {
            let held = room.hold(rows.get_array_memory_size() as u64);
            if queue.send(Given { rows: rows.clone(), _held: held }).is_ok() {
                room.until_at_most(*bytes_max, queue).await;
                return Ok(());
            }
        }
        self.come_home().await?.write(rows).await
    }

    /// Waits until no row is with the thread.
    pub(super) async fn settle(&self) {
        if let Some(lent) = &self.lent {
            lent.room.until_at_most(0, &lent.rows).await;
        }
    }

    /// Has the writer come home when it wrote all that it was given, or failed.
    async fn come_home(&mut self) -> Result<&mut W, WriteError> {
        let mut written = Ok(());
        if let Some(Lent { rows, home, .. }) = self.lent.take() {
            drop(rows);
            let done = home.await.expect("the thread answers every order");
            let (writer, outcome) = done.unwrap_or_else(|panic| resume_unwind(panic));
            (self.home, written) = (Some(writer), outcome);
        }
        written.map(|()| self.home.as_mut().expect("a writer that is not lent is at home"))
    }

    /// Has the writer come home, whatever is not written yet.
    async fn give_up(&mut self) -> Option<W> {
        if let Some(lent) = &self.lent {
            lent.is_given_up.store(true, Ordering::Relaxed);
        }
        if let Err(error) = self.come_home().await {
            // What it was to write is given up too, but the run may end for another reason, which would hide this one.
            tracing::warn!(%error, "rows of a dropped batch could not be written");
        }
        self.home.take()
    }
}

impl<W> Drop for Writing<W> {
    /// Nobody waits for what is not written yet.
    fn drop(&mut self) {
        if let Some(lent) = &self.lent {
            lent.is_given_up.store(true, Ordering::Relaxed);
        }
    }
}

impl Writing {
    /// See [`TableWriter::finish`].
    pub(super) async fn finish(&mut self) -> Result<Vec<DataFile>, WriteError> {
        self.come_home().await?.finish().await
    }

    /// See [`TableWriter::abort`].
    pub(super) async fn abort(mut self) -> Result<(), WriteError> {
        match self.give_up().await {
            Some(writer) => writer.abort().await,
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Mutex;

    use arrow::array::{AsArray, Int64Array};
    use arrow::datatypes::Int64Type;
    use futures::FutureExt;
    use tokio::sync::Semaphore;
    use uuid::Uuid;

    use super::*;
    use crate::sink::durable::local_path;
    use crate::sink::schema::create_main;
    use crate::sink::testing::{catalog, events, job};

    /// Keeps the number that stands in each batch, at its own pace.
    #[derive(Clone)]
    struct Keeper {
        kept: Arc<Mutex<Vec<i64>>>,
        /// One permit = one batch.
        pace: Arc<Semaphore>,
        fails_at: Option<i64>,
        panics_at: Option<i64>,
    }

    impl Keeper {
        fn new() -> Self {
            let pace = Arc::new(Semaphore::new(Semaphore::MAX_PERMITS));
            Self { kept: Arc::default(), pace, fails_at: None, panics_at: None }
        }

        fn waiting() -> Self {
            Self { pace: Arc::new(Semaphore::new(0)), ..Self::new() }
        }

        fn kept(&self) -> Vec<i64> {
            self.kept.lock().unwrap().clone()
        }
    }

    impl RowWriter for Keeper {
        async fn write(&mut self, rows: &RecordBatch) -> Result<(), WriteError> {
            self.pace.acquire().await.unwrap().forget();
            let number = rows.column(0).as_primitive::<Int64Type>().value(0);
            assert_ne!(Some(number), self.panics_at, "a writer fell");
            if Some(number) == self.fails_at {
                return Err(WriteError::Columns { table: "kept".into(), what: format!("number {number}") });
            }
            self.kept.lock().unwrap().push(number);
            Ok(())
        }
    }

    fn numbered(number: i64) -> RecordBatch {
        RecordBatch::try_from_iter([("number", Arc::new(Int64Array::from(vec![number; 100])) as _)]).unwrap()
    }

    fn thread_of<W: RowWriter>(bytes_max: u64) -> WriterThread<W> {
        WriterThread::with(bytes_max, Arc::default())
    }

    fn bytes(batches: u64) -> u64 {
        batches * numbered(0).get_array_memory_size() as u64
    }

    #[tokio::test]
    async fn rows_come_to_the_writer_once_and_in_order_with_a_thread_and_without() {
        for thread in [thread_of(bytes(3)), WriterThread::never()] {
            for _ in 0..2 {
                let keeper = Keeper::new();
                let mut writing = thread.lend(keeper.clone());
                for number in 0..200 {
                    writing.write(&numbered(number)).await.unwrap();
                }
                writing.come_home().await.unwrap();
                assert_eq!(keeper.kept(), (0..200).collect::<Vec<_>>());
                assert_eq!(writing.held_bytes(), 0);
            }
        }
    }

    #[tokio::test]
    async fn without_a_thread_a_write_is_done_when_the_rows_are_written() {
        let keeper = Keeper { fails_at: Some(1), ..Keeper::new() };
        let mut writing = WriterThread::never().lend(keeper.clone());
        writing.write(&numbered(0)).await.unwrap();
        assert_eq!((keeper.kept(), writing.held_bytes()), (vec![0], 0));
        let error = writing.write(&numbered(1)).await.unwrap_err();
        assert_eq!(error.to_string(), "rows do not fit table kept: number 1");
    }

    #[tokio::test]
    async fn a_write_waits_while_more_than_the_bound_is_with_a_slow_writer() {
        let keeper = Keeper::waiting();
        let thread = thread_of(bytes(2));
        let mut writing = thread.lend(keeper.clone());
        writing.write(&numbered(0)).await.unwrap();
        writing.write(&numbered(1)).await.unwrap();
        assert_eq!(writing.held_bytes(), bytes(2));
        let third = numbered(2);
        let mut write = Box::pin(writing.write(&third));
        assert!(write.as_mut().now_or_never().is_none(), "three batches are with the writer");
        assert!(keeper.kept().is_empty());
        keeper.pace.add_permits(1);
        write.await.unwrap();
        assert_eq!((keeper.kept(), writing.held_bytes()), (vec![0], bytes(2)));
        assert!(writing.settle().now_or_never().is_none());
        keeper.pace.add_permits(2);
        writing.settle().await;
        assert_eq!((keeper.kept(), writing.held_bytes()), (vec![0, 1, 2], 0));
    }

    #[tokio::test]
    async fn an_error_is_that_of_the_next_write_or_of_the_end_and_nothing_is_written_after_it() {
        for writes_on in [true, false] {
            let keeper = Keeper { fails_at: Some(1), ..Keeper::new() };
            let thread = thread_of(0);
            let mut writing = thread.lend(keeper.clone());
            writing.write(&numbered(0)).await.unwrap();
            writing.write(&numbered(1)).await.unwrap();
            let error = match writes_on {
                true => writing.write(&numbered(2)).await.unwrap_err(),
                false => writing.come_home().await.err().unwrap(),
            };
            assert_eq!(error.to_string(), "rows do not fit table kept: number 1");
            assert!(writing.give_up().await.is_some(), "the writer did not come home");
            assert_eq!(keeper.kept(), [0]);
        }
    }

    #[tokio::test]
    async fn a_panic_of_the_thread_is_one_of_the_run_and_the_thread_goes_on() {
        for writes_on in [true, false] {
            let thread = thread_of(0);
            let mut writing = thread.lend(Keeper { panics_at: Some(0), ..Keeper::new() });
            writing.write(&numbered(0)).await.unwrap();
            let one = numbered(1);
            let next = async {
                match writes_on {
                    true => writing.write(&one).await,
                    false => writing.come_home().await.map(|_| ()),
                }
            };
            let fell = AssertUnwindSafe(next).catch_unwind().await.unwrap_err();
            assert!(fell.downcast::<String>().unwrap().contains("a writer fell"));
            let keeper = Keeper::new();
            let mut writing = thread.lend(keeper.clone());
            writing.write(&numbered(7)).await.unwrap();
            writing.come_home().await.unwrap();
            assert_eq!(keeper.kept(), [7]);
        }
    }

    #[tokio::test]
    async fn what_is_given_up_is_not_written() {
        for is_dropped in [true, false] {
            let keeper = Keeper::waiting();
            let thread = thread_of(bytes(10));
            let mut writing = thread.lend(keeper.clone());
            for number in 0..5 {
                writing.write(&numbered(number)).await.unwrap();
            }
            if is_dropped {
                drop(writing);
                keeper.pace.add_permits(5);
                drop(thread);
            } else {
                let mut give_up = Box::pin(writing.give_up());
                let early = give_up.as_mut().now_or_never();
                keeper.pace.add_permits(5);
                let home = match early {
                    Some(home) => home,
                    None => give_up.await,
                };
                assert!(home.is_some(), "the writer did not come home");
            }
            // The first may have been in work.
            assert!(keeper.kept().len() <= 1, "{:?} were written", keeper.kept());
        }
    }

    fn files_in(folder: &Path) -> usize {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| if entry.path().is_dir() { files_in(&entry.path()) } else { 1 }).sum()
    }

    #[tokio::test]
    async fn a_table_reads_the_same_whether_it_was_written_beside_or_not() {
        let mut read_back = Vec::new();
        for thread in [thread_of(1 << 20), WriterThread::never()] {
            let folder = tempfile::tempdir().unwrap();
            let job = job(folder.path());
            let catalog = catalog(&job).await;
            let table = create_main(catalog.as_ref(), &job).await.unwrap();
            let writer = TableWriter::new(&table, Uuid::now_v7(), 64 << 20, &[]).unwrap();
            let mut writing = thread.lend(writer);
            for part in 0..8 {
                writing.write(&events(part * 10_000, 10_000, 3)).await.unwrap();
            }
            let files = writing.finish().await.unwrap();
            assert_eq!(files.len(), 3, "one file for each day");
            let mut days = Vec::new();
            for file in files {
                // Rows of a day stand in its file in the order in which they were given.
                let path = local_path(file.file_path()).unwrap();
                let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(
                    std::fs::File::open(path).unwrap(),
                );
                let batches: Vec<_> = reader.unwrap().build().unwrap().map(Result::unwrap).collect();
                let offsets = |batch: &RecordBatch| {
                    batch["_kafka_offset"].as_primitive::<Int64Type>().values().to_vec()
                };
                let offsets: Vec<i64> = batches.iter().flat_map(offsets).collect();
                assert!(offsets.is_sorted(), "rows changed places");
                days.push(offsets);
            }
            days.sort();
            read_back.push(days);
        }
        assert_eq!(read_back[0], read_back[1]);
        assert_eq!(read_back[0].iter().map(Vec::len).sum::<usize>(), 80_000);
    }

    #[tokio::test]
    async fn a_table_that_refuses_rows_says_so_later_and_its_files_are_deleted() {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        let catalog = catalog(&job).await;
        let table = create_main(catalog.as_ref(), &job).await.unwrap();
        let data = local_path(table.metadata().location()).unwrap().join("data");
        let thread = thread_of(1 << 20);
        let writer = TableWriter::new(&table, Uuid::now_v7(), 64 << 20, &[]).unwrap();
        let mut writing = thread.lend(writer);
        writing.write(&events(0, 1_000, 3)).await.unwrap();
        writing.write(&numbered(0)).await.unwrap();
        writing.settle().await;
        assert_eq!(files_in(&data), 3);
        let error = writing.finish().await.unwrap_err();
        assert!(error.to_string().contains("the table has no column number"), "{error}");
        writing.abort().await.unwrap();
        assert_eq!(files_in(&data), 0);
    }
}
