//! Rows that wait on local disk for a file of their own.
//!
//! A microbatch of many days can not have a file open for each of them, and a file that is finished early because another
//! day came leaves thousands of small ones behind. So the rows of days beyond the open files are laid aside here and
//! written when the microbatch is finished, one day after the other.
//!
//! Flow: rows of a table partition -> one piece, a self-contained Arrow IPC stream, at the end of the local file -> the
//! pieces of a table partition in their order
//!
//! Invariants
//! 1. The file has no name: the kernel frees it with the process, however that ends, and no other run can read it.
//! 2. A piece comes back as it was laid aside, or as an error.
//!
//! Bounds: memory is one piece at a time and 16 bytes per piece; the disk takes the rows uncompressed.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Cursor;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::error::ArrowError;
use arrow_ipc::reader::StreamReader;
use arrow_ipc::writer::StreamWriter;
use iceberg::spec::Struct;
use uuid::Uuid;

use super::PartitionBytes;

/// Rows laid aside, by table partition.
#[derive(Debug)]
pub(super) struct Waiting {
    folder: PathBuf,
    /// Made when the first rows are laid aside.
    file: Option<File>,
    end: u64,
    partitions: BTreeMap<PartitionBytes, WaitingPartition>,
}

/// The rows of one table partition.
#[derive(Debug)]
pub(super) struct WaitingPartition {
    pub(super) values: Struct,
    pub(super) pieces: Vec<Piece>,
}

/// Where rows lie in the file.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    start: u64,
    bytes: u64,
}

impl Waiting {
    /// Nothing waits yet; rows will lie in this folder.
    pub(super) fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), file: None, end: 0, partitions: BTreeMap::new() }
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
        let mut stream = StreamWriter::try_new(Vec::new(), rows.schema_ref())?;
        stream.write(rows)?;
        let bytes = stream.into_inner()?;
        let piece = Piece { start: self.end, bytes: bytes.len() as u64 };
        self.file()?.write_all_at(&bytes, piece.start)?;
        self.end += piece.bytes;
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
    pub(super) fn read(&self, piece: Piece) -> Result<Vec<RecordBatch>, ArrowError> {
        let file = self.file.as_ref().expect("a piece lies in the file");
        let mut bytes = vec![0; usize::try_from(piece.bytes).expect("a piece was in memory once")];
        file.read_exact_at(&mut bytes, piece.start)?;
        StreamReader::try_new(Cursor::new(bytes), None)?.collect()
    }

    fn file(&mut self) -> Result<&File, ArrowError> {
        if self.file.is_none() {
            let path = self.folder.join(format!("rows-{}.waiting", Uuid::new_v4().simple()));
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).mode(0o600).open(&path)?;
            std::fs::remove_file(&path)?;
            self.file = Some(file);
        }
        Ok(self.file.as_ref().expect("it was made above"))
    }
}
