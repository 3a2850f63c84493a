//! One number for the process, divided before anything is allocated.
//!
//! The shares are fixed fractions of what is left after [`PROGRAM_BYTES`]. They are first estimates that
//! measurements refine; what does not change is that every buffer of the program is sized by one of them.

use std::fmt;

use bytesize::ByteSize;

/// Code, allocator, catalogs, thread stacks and the client library's own structures: resident size of `tidemill run`
/// with an empty topic, rounded up.
pub const PROGRAM_BYTES: u64 = 96 << 20;
/// The smallest `memory` that a job may name. Below it the shares no longer hold one record of the default largest size.
pub const MEMORY_BYTES_MIN: u64 = 256 << 20;

/// Bytes beside its payload that a record of a chunk takes: head in the chunk, place, times, fingerprint, order,
/// verdict, rounded up.
const PROBE_RECORD_BYTES: u64 = 256;
/// Most bytes of columns and letters that a byte of payload becomes.
const DECODED_BYTES_PER_PAYLOAD_BYTE: u64 = 4;
/// Such a part of decode's share is the most that rows take which the writer has and the run is done with.
const ROWS_BESIDE_PART: u64 = 3;
/// Bytes that a row takes while it waits on local disk for its verdict: probe 16, bucket 4, place in the order 4, fate and
/// verdict a byte each, rounded up.
const GATHERED_ROW_BYTES: u64 = 28;
/// Most bytes that a key of a microbatch takes, gathered or pending: a pending one 16, and as much again while lists of them are
/// merged as they come.
const MICROBATCH_KEY_BYTES: u64 = 32;
/// Most keys of one lookup, whatever the memory: a place among them takes 32 bits.
const GATHERED_KEYS_MAX: u64 = 1 << 31;
/// A chunk of less than such a part of the largest one is not read ahead: each has its cost.
const AHEAD_PART_MIN: u64 = 4;

/// What reading one data file's key columns takes: a row group of a million ids of 36 characters, and its batches.
const SCAN_READER_BYTES: u64 = 48 << 20;

/// Who may hold how much, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct MemoryPlan {
    /// The job's number.
    pub total: u64,
    /// Set aside for the program itself.
    pub program: u64,
    /// Records that the Kafka client has fetched and the reader has not taken.
    pub client_queue: u64,
    /// Raw bytes of one chunk: of the one in work until it is judged, then of the one that is read meanwhile.
    pub records: u64,
    /// Arrow columns and dead letters of a chunk: of one in work, one that is read meanwhile, and those before it whose rows
    /// are still with their writer.
    pub decode: u64,
    /// Pinned filters, pages, and keys of the open microbatch.
    pub dedup: u64,
    /// Of dedup's share, those keys, pending or gathered: half of it, or what a microbatch can have.
    pub keys: u64,
    /// Open data files.
    pub writer: u64,
}

/// The number is too small.
#[derive(Debug, thiserror::Error)]
#[error("memory = {} is below the minimum of {}", ByteSize(*asked), ByteSize(MEMORY_BYTES_MIN))]
pub struct TooLittleMemory {
    /// What the job names.
    pub asked: u64,
}

impl MemoryPlan {
    /// Divides `total` bytes.
    ///
    /// # Errors
    /// [`TooLittleMemory`] below [`MEMORY_BYTES_MIN`].
    pub fn divide(total: u64) -> Result<Self, TooLittleMemory> {
        if total < MEMORY_BYTES_MIN {
            return Err(TooLittleMemory { asked: total });
        }
        let rest = total - PROGRAM_BYTES;
        let (client_queue, records, decode, dedup) = (rest / 6, rest / 16, rest / 4, rest * 3 / 10);
        let writer = rest - client_queue - records - decode - dedup;
        let keys = dedup / 2;
        Ok(Self { total, program: PROGRAM_BYTES, client_queue, records, decode, dedup, keys, writer })
    }

    /// The same where no microbatch has more records: what their keys never take is left to lookups.
    pub fn for_microbatches_of(self, records_max: u64) -> Self {
        Self { keys: (self.dedup / 2).min(records_max.saturating_mul(MICROBATCH_KEY_BYTES)), ..self }
    }

    /// The same for keys that come from a table, as many at once as there is room for.
    pub fn for_keys_of_tables(self) -> Self {
        self.for_microbatches_of(u64::MAX)
    }

    /// Most payload of one chunk: decoded columns and letters take up to four times the bytes they came from.
    pub fn chunk_payload_bytes_max(&self) -> u64 {
        self.records.min(self.decode / DECODED_BYTES_PER_PAYLOAD_BYTE)
    }

    /// Most records of one chunk.
    pub fn chunk_records_max(&self) -> u64 {
        Self::records_max(self.chunk_payload_bytes_max())
    }

    /// Most keys that are gathered for one lookup, their rows waiting on local disk, while keys of so many bytes are pending. A
    /// probe becomes a pending key where it lies, so they share the room of those; up to half of decode's share is theirs too,
    /// and the chunks that are decoded meanwhile have the rest.
    pub fn gathered_keys_max(&self, pending_bytes: u64) -> u64 {
        let room = self.pending_bytes_max().saturating_sub(pending_bytes) + self.gathered_bytes_max();
        (room / GATHERED_ROW_BYTES).min(GATHERED_KEYS_MAX)
    }

    /// Most bytes of decode's share that keys take which are gathered.
    pub fn gathered_bytes_max(&self) -> u64 {
        self.decode / 2
    }

    /// How much of decode's share is taken where so many bytes of keys are pending or gathered.
    pub fn gathered_beyond(&self, key_bytes: u64) -> u64 {
        key_bytes.saturating_sub(self.pending_bytes_max())
    }

    /// What a chunk holds while it is looked up and written: columns and letters of so many bytes, those that are written
    /// once more, and what stands beside each row.
    pub fn held_bytes(&self, bytes: u64, rows: usize) -> u64 {
        2 * bytes + rows as u64 * PROBE_RECORD_BYTES
    }

    /// Most payload of a chunk that is read and decoded while another one holds so much: its columns and letters fit into
    /// what that leaves of decode's share, whatever the records are. `None` where that is not worth it. The records lie
    /// where those of the other one lay.
    pub fn ahead_payload_bytes_max(&self, held_bytes: u64) -> Option<u64> {
        let bytes = self.payload_bytes_beside(held_bytes);
        (bytes >= self.chunk_payload_bytes_max() / AHEAD_PART_MIN).then_some(bytes)
    }

    /// Most payload of a chunk that finds so much of decode's share taken.
    pub fn payload_bytes_beside(&self, held_bytes: u64) -> u64 {
        let left = self.decode.saturating_sub(held_bytes) / DECODED_BYTES_PER_PAYLOAD_BYTE;
        left.min(self.chunk_payload_bytes_max())
    }

    /// Most bytes of rows that are with their writer while the run goes on, so that much is left for the next chunk.
    pub fn rows_beside_bytes_max(&self) -> u64 {
        self.decode / ROWS_BESIDE_PART
    }

    /// Most records of so much payload: each costs a head, a place and a verdict beside its bytes.
    pub fn records_max(payload_bytes: u64) -> u64 {
        payload_bytes / PROBE_RECORD_BYTES
    }

    /// Most bytes of keys that the open microbatch has accepted; it closes when they are reached. When they are written they
    /// take as much again, in the share of the writer, whose files are closed then, and that of rows that wait, of which there
    /// are none.
    pub fn pending_bytes_max(&self) -> u64 {
        self.keys
    }

    /// Dedup's share without the open microbatch's keys and without loans.
    pub fn dedup_lookup_bytes(&self) -> u64 {
        self.dedup - self.keys - self.loan_bytes()
    }

    /// Keys that are sorted while the state is made from the table: no record, no letter and no data file is held then,
    /// so that those shares serve too. Decode's is left to the readers.
    pub fn rebuild_bytes(&self) -> u64 {
        self.dedup + self.records + self.writer
    }

    /// Keys that are sorted while a bucket beyond the window is read from the table.
    pub fn loan_bytes(&self) -> u64 {
        self.dedup / 16
    }

    /// Data files that are read at once when keys are read from the table: as many as half of decode's share and the
    /// processors allow. A reader holds one row group of the key columns, compressed, and batches of it.
    pub fn scan_readers(&self) -> usize {
        let by_memory = (self.decode / 2 / SCAN_READER_BYTES).max(1);
        let by_processors = std::thread::available_parallelism().map_or(1, usize::from);
        by_processors.min(usize::try_from(by_memory).unwrap_or(usize::MAX))
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{} = program {} + client queue {} + records {} + decode {} + dedup {} + writer {}",
            ByteSize(self.total),
            ByteSize(self.program),
            ByteSize(self.client_queue),
            ByteSize(self.records),
            ByteSize(self.decode),
            ByteSize(self.dedup),
            ByteSize(self.writer)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shares_add_up_to_the_number() {
        for total in [MEMORY_BYTES_MIN, 1 << 30, (64 << 30) + 7] {
            let plan = MemoryPlan::divide(total).unwrap();
            let sum =
                plan.program + plan.client_queue + plan.records + plan.decode + plan.dedup + plan.writer;
            assert_eq!(sum, total);
        }
    }

    #[test]
    fn what_the_keys_of_small_microbatches_do_not_take_is_of_lookups() {
        let plan = MemoryPlan::divide(1 << 30).unwrap();
        let small = plan.for_microbatches_of(1_000_000);
        assert_eq!(small.pending_bytes_max(), 1_000_000 * MICROBATCH_KEY_BYTES);
        assert_eq!(small.pending_bytes_max() + small.dedup_lookup_bytes() + small.loan_bytes(), small.dedup);
        const { assert!(MICROBATCH_KEY_BYTES >= GATHERED_ROW_BYTES) };
        const { assert!(MICROBATCH_KEY_BYTES >= 2 * crate::dedup::PENDING_KEY_BYTES) };
        assert!(small.gathered_keys_max(0) >= 1_000_000);
        assert_eq!(plan.for_microbatches_of(u64::MAX), plan);
        assert_eq!(small.for_keys_of_tables(), plan);
    }

    #[test]
    fn two_probe_batches_side_by_side_fit_into_the_share_of_one() {
        let plan = MemoryPlan::divide(MEMORY_BYTES_MIN).unwrap();
        let largest = plan.chunk_payload_bytes_max();
        assert_eq!(plan.ahead_payload_bytes_max(0), Some(largest));
        for held in (0..plan.decode + (8 << 20)).step_by(1 << 20) {
            let Some(ahead) = plan.ahead_payload_bytes_max(held) else {
                assert!(held > plan.decode / 2, "{held} bytes leave room");
                continue;
            };
            assert!(held + ahead * DECODED_BYTES_PER_PAYLOAD_BYTE <= plan.decode);
            assert!(ahead <= largest && ahead >= largest / AHEAD_PART_MIN);
        }
        // Events of 300 bytes whose columns take as much: what is read ahead settles at more than half of the largest.
        let mut payload = largest;
        for _ in 0..20 {
            let rows = payload / 300;
            let held = plan.held_bytes(rows * 300, usize::try_from(rows).unwrap());
            payload = plan.ahead_payload_bytes_max(held).unwrap();
        }
        assert!(payload > largest / 2, "{payload} of {largest}");
    }

    #[test]
    fn rows_with_their_writer_leave_room_for_a_probe_batch_and_one_that_is_read_beside_it() {
        let plan = MemoryPlan::divide(MEMORY_BYTES_MIN).unwrap();
        let largest = plan.chunk_payload_bytes_max();
        assert_eq!(plan.payload_bytes_beside(0), largest);
        let beside = plan.rows_beside_bytes_max();
        let inline = plan.payload_bytes_beside(beside);
        assert!(beside + inline * DECODED_BYTES_PER_PAYLOAD_BYTE <= plan.decode);
        // Events of 300 bytes whose columns take as much: two chunks of them may be with the writer.
        let mut payload = inline / 2;
        for _ in 0..20 {
            let rows = payload / 300;
            let held = plan.held_bytes(rows * 300, usize::try_from(rows).unwrap());
            assert!(rows * 300 * 2 <= beside, "{rows} rows");
            payload = plan.ahead_payload_bytes_max(held + beside).unwrap();
        }
        assert!(payload > largest / 3, "{payload} of {largest}");
    }

    #[test]
    fn keys_that_are_gathered_fit_while_they_wait_and_while_they_are_written() {
        for total in [MEMORY_BYTES_MIN, 512 << 20, 1 << 30, 64 << 30] {
            let plan = MemoryPlan::divide(total).unwrap();
            for pending_bytes in [0, plan.pending_bytes_max() / 2, plan.pending_bytes_max()] {
                let keys = plan.gathered_keys_max(pending_bytes);
                let waiting = pending_bytes + keys * GATHERED_ROW_BYTES;
                assert!(waiting <= plan.pending_bytes_max() + plan.gathered_bytes_max());
                // 16 bytes of each stay and are copied once, when no row waits and no file is open
                let pending = pending_bytes + keys * 16;
                let room = plan.pending_bytes_max() + plan.gathered_bytes_max() + plan.writer;
                assert!(2 * pending <= room, "{plan}: {pending}");
            }
            let most = plan.gathered_keys_max(0) * GATHERED_ROW_BYTES;
            let beyond = plan.gathered_beyond(most);
            assert!(
                beyond <= plan.gathered_bytes_max() && plan.gathered_beyond(plan.pending_bytes_max()) == 0
            );
            let payload = plan.payload_bytes_beside(beyond);
            assert!(payload * DECODED_BYTES_PER_PAYLOAD_BYTE + beyond <= plan.decode);
        }
        let keys = MemoryPlan::divide(512 << 20).unwrap().gathered_keys_max(0);
        assert!(keys >= 4_000_000, "{keys} in 512 MiB");
    }

    #[test]
    fn a_number_below_the_minimum_is_refused_with_both_numbers() {
        let error = MemoryPlan::divide(64 << 20).unwrap_err().to_string();
        assert_eq!(error, "memory = 64.0 MiB is below the minimum of 256.0 MiB");
    }
}
