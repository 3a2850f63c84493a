//! Rows that wait on local disk for a file of their own.
//!
//! A microbatch of many days can not have a file open for each of them, and a file that is finished early because another
//! day came leaves thousands of small ones behind. So the rows of days beyond the open files are laid aside here and
//! written when the microbatch is finished, one day after the other.
//!
//! Flow: rows of a table partition -> one piece ([`RowsAside`]) -> the pieces of a table partition in their order
//!
//! Bounds: memory is one piece at a time and 16 bytes per piece; the disk takes the rows compressed.

use std::collections::BTreeMap;
use std::path::Path;

use arrow::array::RecordBatch;
use arrow::error::ArrowError;
use iceberg::spec::Struct;

use super::PartitionBytes;
use crate::aside::{Piece, RowsAside};

/// Rows laid aside, by table partition.
#[derive(Debug)]
pub(super) struct Waiting {
    aside: RowsAside,
    partitions: BTreeMap<PartitionBytes, WaitingPartition>,
}

/// The rows of one table partition.
#[derive(Debug)]
pub(super) struct WaitingPartition {
    pub(super) values: Struct,
    pub(super) pieces: Vec<Piece>,
}

impl Waiting {
    /// Nothing waits yet; rows will lie in this folder.
    pub(super) fn new(folder: &Path) -> Self {
        Self { aside: RowsAside::new(folder), partitions: BTreeMap::new() }
    }

    /// Whether rows of this table partition go here and not into a file.
    pub(super) fn contains(&self, key: &PartitionBytes) -> bool {
        self.partitions.contains_key(key)
    }

    /// Sends the rows of a table partition here from now on.
    pub(super) fn begin(&mut self, key: &PartitionBytes, values: &Struct) {
        let begun = WaitingPartition { values: values.clone(), pieces: Vec::new() };
        self.partitions.entry(key.clone()).or_insert(begun);
    }

    /// Lays rows of a table partition aside that was begun.
    pub(super) fn push(&mut self, key: &PartitionBytes, rows: &RecordBatch) -> Result<(), ArrowError> {
        let piece = self.aside.push(rows)?;
        let partition = self.partitions.get_mut(key).expect("the table partition was begun");
        partition.pieces.push(piece);
        Ok(())
    }

    /// All that waits, in the order of the partition values; nothing waits after it.
    pub(super) fn take(&mut self) -> Vec<WaitingPartition> {
        let partitions = std::mem::take(&mut self.partitions).into_values();
        partitions.filter(|partition| !partition.pieces.is_empty()).collect()
    }

    /// The rows of a piece.
    pub(super) fn read(&self, piece: Piece) -> Result<RecordBatch, ArrowError> {
        self.aside.read(piece)
    }
}
