//! Rows of an open microbatch that wait for the verdict on their keys.
//!
//! Where the state is larger than memory a key costs least if very many are looked up together: filters that memory does not
//! hold are read once for all of them, and pages that lie near each other become one read. Their rows take ten times the
//! bytes of the keys, so they wait on local disk.
//!
//! Flow: judged chunk -> keys gathered, rows laid aside -> ... -> one lookup -> rows taken back in their order, and written
//!
//! How many are gathered is planned for each microbatch ([`Session::plan_gathering`]): what the job says, or as many as make a
//! key cheapest, the lookup and the way of its row over the disk together. Where memory holds the state that is one chunk, and
//! nothing is laid aside; where it holds the filters, mostly too: what is read then is a page for each repeat, wherever it is
//! looked up.
//!
//! Invariants
//! 1. Of equal keys that are looked up together the one at the lowest place wins (R2): a topic partition is the rank of a key,
//!    and within one the order of chunks is that of offsets.
//! 2. Nothing waits when a microbatch is finished, or when its time is up.
//!
//! Bounds: the keys of [`MemoryPlan::gathered_keys_max`](crate::memory::MemoryPlan::gathered_keys_max); one chunk of rows in
//! memory, one that is read ahead, and the others on disk, compressed, as much as one microbatch holds.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch};
use arrow::error::ArrowError;

use super::late::{Fate, Judged, rows_where, with_late_columns};
use super::microbatch::{Asked, Open, unexpected_arrow, unwritten};
use super::profile::Stage;
use super::session::Session;
use super::stops;
use crate::aside::{Piece, RowsAside};
use crate::commit::side::Role;
use crate::counts::Counts;
use crate::decode::{Decoded, metadata};
use crate::dedup::{ProbeBatch, Verdict};
use crate::mutant;
use crate::stop::{Reason, Stop};

/// Payload and columns of a row, in bytes, where there was none before: a notification event of some ten columns.
const ROW_BYTES_DEFAULT: f64 = 400.0;
/// Bytes of columns that a core compresses and restores in a second, LZ4 in Arrow IPC (`benches/run spill --profile`).
const ASIDE_BYTES_PER_SECOND: f64 = 500e6;
/// Share of their bytes that columns take on disk.
const ASIDE_COMPRESSED: f64 = 0.6;
/// Bytes of payload that a core takes over from the client and decodes in a second (`benches/run decode`, and the profile of
/// `benches/run end_to_end`).
const READ_BYTES_PER_SECOND: f64 = 500e6;

/// Rows that wait.
pub(super) struct Gathered {
    keys: ProbeBatch,
    parts: Vec<Part>,
    aside: RowsAside,
    /// What the parts take in memory.
    parts_bytes: u64,
    /// Bytes of columns of the largest piece.
    piece_bytes_max: u64,
}

/// Rows of one chunk.
struct Part {
    /// Where they lie; `None` = they are in hand.
    piece: Option<Piece>,
    judged: Judged,
    /// By key, its row.
    asked: Vec<u32>,
}

/// How the keys of a microbatch are looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lookups {
    /// Those of each chunk, half of the memory of chunks, while the next one is read.
    OfChunks,
    /// Those of each chunk, as large as memory allows: nothing is read meanwhile.
    OfLargestChunks,
    /// So many together, while their rows wait on local disk.
    Together(u64),
}

/// What a key costs beside its lookup, in seconds of a core or the device.
struct KeyCosts {
    /// The way of its row to the disk and back.
    aside: f64,
    /// Fetch and decode, where nothing is done beside it.
    read: f64,
}

impl Lookups {
    /// The plan of which a key costs least, where a largest chunk has `chunk` keys and up to `most` may be gathered.
    /// `lookup_seconds` of so many keys are those of one lookup.
    fn cheapest<E>(
        chunk: u64,
        most: u64,
        costs: &KeyCosts,
        mut lookup_seconds: impl FnMut(u64) -> Result<f64, E>,
    ) -> Result<Self, E> {
        let half = (chunk / 2).max(1);
        let doubled = std::iter::successors(chunk.checked_mul(2), |keys| keys.checked_mul(2));
        let gathered = doubled.take_while(|keys| *keys < most).chain((most > chunk).then_some(most));
        let together = gathered.map(|keys| (Self::Together(keys), keys, costs.aside));
        let of_chunks = [(Self::OfChunks, half, 0.0), (Self::OfLargestChunks, chunk, costs.read)];
        let mut best = (Self::OfChunks, f64::INFINITY);
        for (plan, keys, beside) in of_chunks.into_iter().chain(together) {
            let seconds = lookup_seconds(keys)? / keys as f64 + beside;
            if seconds < best.1 {
                best = (plan, seconds);
            }
        }
        Ok(best.0)
    }
}

/// What a session knows for its plan of the next lookup.
pub(super) struct Gathering {
    lookups: Lookups,
    /// Of the last chunk, per row: bytes of payload, and of columns.
    payload_bytes: f64,
    row_bytes: f64,
}

impl Default for Gathering {
    fn default() -> Self {
        let (payload_bytes, row_bytes) = (ROW_BYTES_DEFAULT, ROW_BYTES_DEFAULT);
        Self { lookups: Lookups::OfChunks, payload_bytes, row_bytes }
    }
}

impl Gathering {
    /// Whether rows are laid aside.
    pub(super) fn is_on(&self) -> bool {
        self.keys_max() > 0
    }

    /// Whether the plan leaves room for a chunk that is read beside the one in work.
    pub(super) fn reads_beside_work(&self) -> bool {
        self.lookups != Lookups::OfLargestChunks
    }

    /// Most keys that are gathered; 0 = those of each chunk are looked up.
    fn keys_max(&self) -> u64 {
        match self.lookups {
            Lookups::OfChunks | Lookups::OfLargestChunks => 0,
            Lookups::Together(keys) => keys,
        }
    }

    /// Notes how large rows are.
    pub(super) fn note(&mut self, decoded: &Decoded, payload_bytes: usize) {
        let rows = decoded.rows.num_rows();
        if rows > 0 {
            self.payload_bytes = payload_bytes as f64 / rows as f64;
            self.row_bytes = decoded.rows.get_array_memory_size() as f64 / rows as f64;
        }
    }

    /// What a key costs where the device moves so many bytes in a second.
    fn costs(&self, device_bytes_per_second: f64) -> KeyCosts {
        let moved = 2.0 * ASIDE_COMPRESSED * self.row_bytes / device_bytes_per_second;
        KeyCosts {
            aside: self.row_bytes / ASIDE_BYTES_PER_SECOND + moved,
            read: self.payload_bytes / READ_BYTES_PER_SECOND,
        }
    }
}

impl Gathered {
    /// Nothing waits; rows will lie in this folder.
    pub(super) fn new(folder: &Path) -> Self {
        let aside = RowsAside::new(folder);
        Self { keys: ProbeBatch::default(), parts: Vec::new(), aside, parts_bytes: 0, piece_bytes_max: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Bytes of memory that wait.
    pub(super) fn bytes(&self) -> u64 {
        self.keys.bytes() + self.parts_bytes
    }

    fn push(&mut self, piece: Option<Piece>, judged: Judged, asked: Vec<u32>) {
        self.parts_bytes += judged.bytes() + size_of_val(asked.as_slice()) as u64;
        self.parts.push(Part { piece, judged, asked });
    }
}

impl Session<'_> {
    /// Decides how many keys of the next microbatch are looked up together.
    pub(super) fn plan_gathering(&mut self) -> Result<(), Stop> {
        let most = self.memory.gathered_keys_max(self.state.store.pending_bytes());
        let most = most.min(self.owner.world.loaded.job.microbatch.records_max);
        let lookups = match self.owner.world.loaded.job.dedup.probe_records_max {
            Some(said) => Lookups::Together(said.get().min(most)),
            None if self.state.store.is_larger_than_memory() => self.cheapest_lookups(most)?,
            None => Lookups::OfChunks,
        };
        if lookups != self.gathering.lookups {
            tracing::debug!(?lookups, "keys are looked up in another way");
        }
        self.gathering.lookups = lookups;
        Ok(())
    }

    fn cheapest_lookups(&mut self, most: u64) -> Result<Lookups, Stop> {
        let chunk = self.memory.chunk_payload_bytes_max() as f64 / self.gathering.payload_bytes;
        let chunk = (chunk as u64).clamp(1, self.memory.chunk_records_max());
        let store = &mut self.state.store;
        // The device is measured by the first lookup that is reckoned.
        let measured = store.lookup_seconds(chunk).map(|_| store.device_bytes_per_second());
        let cheapest = measured.and_then(|device| {
            let costs = self.gathering.costs(device);
            Lookups::cheapest(chunk, most, &costs, |keys| store.lookup_seconds(keys))
        });
        cheapest.map_err(|error| self.state.failed(error))
    }

    /// Bytes of decode's share that keys which wait have taken.
    pub(super) fn gathered_beyond(&self, open: &Open) -> u64 {
        self.memory.gathered_beyond(self.state.store.pending_bytes() + open.gathered.bytes())
    }

    /// Takes a judged chunk in. It is looked up and written now, or laid aside for a lookup of more.
    pub(super) async fn gather(
        &mut self,
        open: &mut Open,
        decoded: &Decoded,
        judged: Judged,
        asked: Asked,
    ) -> Result<(), Stop> {
        let Asked { rows: asked_rows, keys } = asked;
        let slot_of = |row: &u32| decoded.places[*row as usize].slot;
        let mut begin = 0;
        for of_slot in asked_rows.chunk_by(|one, other| slot_of(one) == slot_of(other)) {
            let of_slot_keys = &keys[begin..begin + of_slot.len()];
            begin += of_slot.len();
            let rank = mutant!("winner-by-arrival", 0 => slot_of(&of_slot[0]));
            let gathered = self.state.store.gather(&mut open.gathered.keys, rank, of_slot_keys);
            gathered.map_err(|error| self.state.failed(error))?;
        }
        drop(keys);
        if judged.is_of_none() {
            return Ok(());
        }
        let rows = self.whole_rows(open, decoded)?;
        let chunk_keys = asked_rows.len() as u64;
        if !self.waits_for_more(open, chunk_keys) {
            open.gathered.push(None, judged, asked_rows);
            return self.settle(open, Some(rows)).await;
        }
        self.options.profile.turn_to(Stage::Aside);
        match open.gathered.aside.push(&rows) {
            Ok(piece) => {
                let piece_bytes = rows.get_array_memory_size() as u64;
                open.gathered.piece_bytes_max = open.gathered.piece_bytes_max.max(piece_bytes);
                open.gathered.push(Some(piece), judged, asked_rows);
                Ok(())
            }
            // A disk that is full of rows is free again when they are settled.
            Err(ArrowError::IoError(error, _)) => {
                tracing::warn!(
                    error,
                    "rows can not wait on local disk; fewer are looked up together, which is slower"
                );
                self.gathering.lookups = Lookups::OfChunks;
                open.gathered.push(None, judged, asked_rows);
                self.settle(open, Some(rows)).await
            }
            Err(error) => Err(unexpected_arrow(error)),
        }
    }

    /// What is held while a lookup is settled, of which the chunk in hand takes so much: also a piece and what is written of it,
    /// and all that the writer may have.
    pub(super) fn settling_bytes(&self, open: &Open, held_bytes: u64) -> u64 {
        if open.gathered.is_empty() {
            return held_bytes;
        }
        let beside = self.memory.rows_beside_bytes_max().saturating_sub(open.main.held_bytes());
        held_bytes.max(2 * open.gathered.piece_bytes_max) + beside
    }

    /// Whether a lookup waits for another chunk, about as large as one of so many keys.
    pub(super) fn waits_for_more(&self, open: &Open, chunk_keys: u64) -> bool {
        let keys = open.gathered.keys.len() as u64;
        keys + chunk_keys <= self.gathering.keys_max()
            && self.gathered_beyond(open) < self.memory.gathered_bytes_max()
            && self.next_chunk_limits(open).is_some()
    }

    /// Looks up all that waits, and writes the rows that are new. `in_hand` are the rows of the last part, unless those were
    /// laid aside too.
    pub(super) async fn settle(&mut self, open: &mut Open, in_hand: Option<RecordBatch>) -> Result<(), Stop> {
        if open.gathered.is_empty() {
            return Ok(());
        }
        self.options.profile.turn_to(Stage::Probe);
        (open.gathered.parts_bytes, open.gathered.piece_bytes_max) = (0, 0);
        let (keys, parts) =
            (std::mem::take(&mut open.gathered.keys), std::mem::take(&mut open.gathered.parts));
        let verdicts = self.state.store.settle(keys).map_err(|error| self.state.failed(error))?;
        crate::crash_point!("keys_probed");
        let mut verdicts = verdicts.as_slice();
        for Part { piece, mut judged, asked } in parts {
            let (of_part, others) = verdicts.split_at(asked.len());
            verdicts = others;
            drop_repeats(&mut open.counts, &asked, of_part, &mut judged);
            if judged.is_of_none() {
                continue;
            }
            match piece {
                Some(piece) => {
                    self.options.profile.turn_to(Stage::Aside);
                    let rows = open.gathered.aside.read(piece).map_err(|error| self.not_aside(error))?;
                    self.write_rows(open, &rows, &judged).await?;
                }
                None => {
                    let rows = in_hand.as_ref().expect("rows that were not laid aside are in hand");
                    self.write_rows(open, rows, &judged).await?;
                }
            }
        }
        assert!(verdicts.is_empty(), "each verdict is that of a row");
        open.gathered.aside.clear().map_err(|error| self.not_aside(error.into()))
    }

    /// Names the folder and the field, so that a disk that fails is found and can be done without.
    fn not_aside(&self, error: ArrowError) -> Stop {
        let ArrowError::IoError(..) = error else { return unexpected_arrow(error) };
        let folder = self.owner.world.loaded.job.state_dir.display();
        let what = format!(
            "rows that waited on local disk in {folder} can not be read; fewer wait with a smaller dedup.max_probe_records"
        );
        stops::data(what, Reason::StorageFailed, error)
    }

    /// The decoder's columns and then the metadata columns.
    pub(super) fn whole_rows(&self, open: &Open, decoded: &Decoded) -> Result<RecordBatch, Stop> {
        let batch = i64::try_from(open.number).expect("a batch number below 2^63");
        let columns: Vec<ArrayRef> = metadata::metadata_columns(
            &self.lanes.served().slots,
            &decoded.places,
            &decoded.timestamps_ms,
            batch,
        );
        with_metadata(&decoded.rows, columns)
    }

    /// Writes rows where they go; they have all columns of the main table.
    pub(super) async fn write_rows(
        &mut self,
        open: &mut Open,
        rows: &RecordBatch,
        judged: &Judged,
    ) -> Result<(), Stop> {
        self.options.profile.turn_to(Stage::Write);
        if judged.is_of_none() {
            return Ok(());
        }
        if !open.first_byte {
            open.first_byte = true;
            self.options.phases.reach("first_data_file_byte");
        }
        let first_seen = rows_where(rows, judged, |fate| fate == Fate::Main)?;
        if first_seen.num_rows() > 0 {
            open.main.write(&first_seen).await.map_err(|error| unwritten(&self.owner.main, error))?;
        }
        let is_late = |fate| matches!(fate, Fate::Late | Fate::Unproven);
        if judged.fates.iter().any(|fate| is_late(*fate)) {
            let late = rows_where(&with_late_columns(rows, judged)?, judged, is_late)?;
            let writer =
                open.sides.get_mut(&Role::Late).expect("a job that puts rows aside has a late table");
            let table = self.owner.side(Role::Late);
            writer.write(&late).await.map_err(|error| unwritten(table, error))?;
            crate::crash_point!("late_rows_written");
        }
        Ok(())
    }
}

/// Lets rows whose key was seen before go nowhere, and counts all.
pub(super) fn drop_repeats(counts: &mut Counts, asked: &[u32], verdicts: &[Verdict], judged: &mut Judged) {
    for (&row, verdict) in asked.iter().zip(verdicts) {
        let fate = &mut judged.fates[row as usize];
        match (*verdict == Verdict::New, *fate) {
            (true, Fate::Late) => counts.late_side += 1,
            (true, _) => counts.written += 1,
            (false, _) => {
                *fate = Fate::Nowhere;
                counts.duplicate += mutant!("repeats-not-counted", 0 => 1);
            }
        }
    }
}

fn with_metadata(rows: &RecordBatch, metadata: Vec<ArrayRef>) -> Result<RecordBatch, Stop> {
    let schema = rows.schema();
    let mut fields: Vec<arrow::datatypes::FieldRef> = schema.fields().iter().cloned().collect();
    fields.extend(metadata::metadata_fields().into_iter().map(Arc::new));
    let mut columns = rows.columns().to_vec();
    columns.extend(metadata);
    RecordBatch::try_new(Arc::new(arrow::datatypes::Schema::new(fields)), columns).map_err(unexpected_arrow)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 100_000;
    const COSTS: KeyCosts = KeyCosts { aside: 1e-6, read: 0.6e-6 };

    fn cheapest(most: u64, seconds: impl Fn(f64) -> f64) -> Lookups {
        let lookup = |keys: u64| Ok::<_, std::convert::Infallible>(seconds(keys as f64));
        Lookups::cheapest(CHUNK, most, &COSTS, lookup).unwrap()
    }

    #[test]
    fn where_a_key_costs_the_same_in_any_lookup_none_waits_and_the_next_chunk_is_read_meanwhile() {
        assert_eq!(cheapest(10_000_000, |keys| keys * 5e-6), Lookups::OfChunks);
    }

    #[test]
    fn where_each_lookup_reads_the_filters_keys_wait_for_as_many_others_as_may_be() {
        assert_eq!(cheapest(1_500_000, |keys| 0.5 + keys * 1e-6), Lookups::Together(1_500_000));
        assert_eq!(cheapest(CHUNK, |keys| 0.5 + keys * 1e-6), Lookups::OfLargestChunks);
    }

    #[test]
    fn where_larger_lookups_bring_less_than_the_way_over_the_disk_costs_chunks_are_as_large_as_may_be() {
        // of what a lookup costs a key of half a chunk has 1.4 microseconds, of a whole one 0.7, of all that may wait 0.35
        assert_eq!(cheapest(2 * CHUNK, |keys| 0.07 + keys * 1e-6), Lookups::OfLargestChunks);
    }

    #[test]
    fn the_cheapest_number_is_taken_not_the_largest() {
        let dearer_beyond = |keys: f64| if keys <= 400_000.0 { 1.0 } else { 1.0 + keys * 1e-3 };
        assert_eq!(cheapest(10_000_000, dearer_beyond), Lookups::Together(400_000));
    }
}
