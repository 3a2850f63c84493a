//! Reading ahead: while a microbatch is being committed, the first probe batch of the next one is read and decoded.
//!
//! Flow: commit on this thread, beside it reader -> chunk -> decoder -> [`Ahead`] -> the next [`Session::fill`]
//!
//! Nothing of it is judged, probed or written, so nothing has to be undone: where the microbatch does not land the life
//! ends, and what was read ahead goes with it and is read again.
//!
//! Bounds: one probe batch, in the shares of memory that rest during a commit. It delays the end of a commit by one
//! turn of the reader and what is left of decoding.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use iceberg::spec::DataFile;
use tokio::runtime::Handle;

use super::lanes::LaneReader;
use super::microbatch::{Run, undecodable};
use super::session::Session;
use crate::commit::ledger::LedgerRecord;
use crate::decode::{Decoded, Decoder};
use crate::offset::TopicPartition;
use crate::record::RecordChunk;
use crate::source::{ReadLimits, ReadStatus, Reader};
use crate::stop::Stop;

/// Longest wait for records before it is looked whether the commit has landed.
const READ_TURN: Duration = Duration::from_millis(20);

/// A probe batch that was read before its microbatch was begun.
pub(super) struct Ahead {
    pub(super) chunk: RecordChunk,
    pub(super) decoded: Decoded,
    /// When its first record was there.
    pub(super) since: Instant,
}

impl Run<'_, '_> {
    /// Commits, and reads ahead meanwhile. Gives the number of requests.
    pub(super) async fn commit_beside_reading(
        &mut self,
        next: LedgerRecord,
        files: Vec<DataFile>,
    ) -> Result<u32, Stop> {
        let is_last = next.released || self.is_ending() || self.is_last_batch();
        // What comes after this one is known before it landed only where there is one lane.
        let takes_turns = self.session.owner.record.active_backfills().next().is_some();
        if is_last || takes_turns || self.session.exhausted() {
            return self.session.owner.commit(next, files).await;
        }
        let limits = self.session.first_chunk_limits();
        let Session { owner, lanes, decoder, .. } = &mut *self.session;
        let LaneReader { reader, slots, .. } = lanes.live_mut();
        let (is_sent, runtime) = (AtomicBool::new(false), Handle::current());
        let (sent, ahead) = tokio::task::block_in_place(|| {
            thread::scope(|scope| {
                let reading = scope.spawn(|| read(reader, decoder, slots, limits, &is_sent));
                let answered = SetAtEnd(&is_sent);
                let sent = runtime.block_on(owner.commit(next, files));
                drop(answered);
                (sent, reading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            })
        });
        let sends = sent?;
        // This microbatch landed, so what can not be decoded is a matter of the next one.
        self.session.ahead = ahead.transpose();
        Ok(sends)
    }
}

/// Ends the reading beside a commit also where that panics: the scope waits for it.
struct SetAtEnd<'f>(&'f AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Reads until the chunk is full or the commit was answered. What a reader fails with it fails with again when the
/// microbatch is read (an invariant of [`Reader`]), where it is dealt with; what it gave before is good.
fn read(
    reader: &mut Reader,
    decoder: &mut Decoder,
    slots: &[TopicPartition],
    limits: ReadLimits,
    is_sent: &AtomicBool,
) -> Result<Option<Ahead>, Stop> {
    let (mut chunk, mut since) = (RecordChunk::default(), None);
    loop {
        let status = reader.read(&mut chunk, ReadLimits { deadline: Instant::now() + READ_TURN, ..limits });
        if since.is_none() && !chunk.is_empty() {
            since = Some(Instant::now());
        }
        if is_sent.load(Ordering::Relaxed) || !matches!(status, Ok(ReadStatus::DeadlinePassed)) {
            break;
        }
    }
    let Some(since) = since else { return Ok(None) };
    let decoded = decoder.decode(&chunk, slots).map_err(undecodable)?;
    Ok(Some(Ahead { chunk, decoded, since }))
}
