//! Rows laid aside on local disk, and taken back.
//!
//! Flow: rows -> one piece, a self-contained Arrow IPC stream, compressed with LZ4, at the end of a local file -> the rows
//!
//! Invariants
//! 1. The file has no name: the kernel frees it with the process, however that ends, and no other run can read it.
//! 2. A piece comes back as it was laid aside, or as an error: its bytes are hashed (XXH3), as LZ4 and Arrow check only its shape.
//!
//! Bounds: memory is one piece at a time; the disk takes the rows compressed until [`RowsAside::clear`].

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::buffer::Buffer;
use arrow::error::ArrowError;
use arrow_ipc::CompressionType;
use arrow_ipc::reader::StreamDecoder;
use arrow_ipc::writer::{IpcWriteOptions, StreamWriter};
use uuid::Uuid;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// A file of rows without a name.
#[derive(Debug)]
pub struct RowsAside {
    folder: PathBuf,
    /// Made when the first rows are laid aside.
    file: Option<File>,
    end: u64,
}

/// Where rows lie in the file.
#[derive(Debug, Clone, Copy)]
pub struct Piece {
    start: u64,
    bytes: u64,
    hash: u64,
}

impl RowsAside {
    /// Nothing is laid aside yet; rows will lie in this folder, which exists.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), file: None, end: 0 }
    }

    /// Lays rows aside.
    ///
    /// # Errors
    /// The disk's.
    pub fn push(&mut self, rows: &RecordBatch) -> Result<Piece, ArrowError> {
        let start = self.end;
        let options = IpcWriteOptions::default().try_with_compression(Some(CompressionType::LZ4_FRAME))?;
        let to = Hashed { file: self.file()?, position: start, hash: Xxh3::new() };
        let mut stream = StreamWriter::try_new_with_options(to, rows.schema_ref(), options)?;
        stream.write(rows)?;
        let written = stream.into_inner()?;
        let (end, hash) = (written.position, written.hash.digest());
        self.end = end;
        Ok(Piece { start, bytes: end - start, hash })
    }

    /// The rows of a piece that was laid aside here and not cleared.
    ///
    /// # Errors
    /// The disk's, or that they are not what was laid aside.
    pub fn read(&self, piece: Piece) -> Result<RecordBatch, ArrowError> {
        let file = self.file.as_ref().expect("a piece lies in the file");
        let mut bytes = vec![0; usize::try_from(piece.bytes).expect("a piece was in memory")];
        file.read_exact_at(&mut bytes, piece.start)?;
        if xxh3_64(&bytes) != piece.hash {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "rows came back as other bytes").into());
        }
        let rows = StreamDecoder::new().decode(&mut Buffer::from_vec(bytes))?;
        rows.ok_or_else(|| ArrowError::IpcError("a piece holds no rows".to_owned()))
    }

    /// Gives the disk back; the pieces are gone.
    ///
    /// # Errors
    /// The disk's.
    pub fn clear(&mut self) -> io::Result<()> {
        self.end = 0;
        self.file.as_ref().map_or(Ok(()), |file| file.set_len(0))
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

/// A place in the file, and what was written before it.
struct Hashed<'a> {
    file: &'a File,
    position: u64,
    hash: Xxh3,
}

impl Write for Hashed<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let bytes = self.file.write_at(from, self.position)?;
        self.hash.update(&from[..bytes]);
        self.position += bytes as u64;
        Ok(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, Int64Array, StringArray, StructArray};
    use arrow::datatypes::{DataType, Field};

    use super::*;

    fn rows(from: i64, count: i64) -> RecordBatch {
        let numbers: ArrayRef =
            Arc::new(Int64Array::from_iter((from..from + count).map(|n| (n % 7 != 0).then_some(n))));
        let texts: ArrayRef =
            Arc::new(StringArray::from_iter_values((from..from + count).map(|n| format!("text {n}"))));
        let field = Arc::new(Field::new("inner", DataType::Utf8, true));
        let nested: ArrayRef = Arc::new(StructArray::from(vec![(field, texts.clone())]));
        RecordBatch::try_from_iter([("n", numbers), ("t", texts), ("s", nested)]).unwrap()
    }

    #[test]
    fn pieces_come_back_as_they_were_in_any_order_and_the_folder_shows_no_file() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut aside = RowsAside::new(folder.path());
        for _ in 0..2 {
            // also a part of larger rows, of which only its own are written
            let all: Vec<RecordBatch> =
                vec![rows(0, 1_000), rows(1_000, 1), rows(0, 500).slice(100, 50), rows(5_000, 20_000)];
            let pieces: Vec<Piece> = all.iter().map(|rows| aside.push(rows).unwrap()).collect();
            assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
            for (rows, piece) in all.iter().zip(&pieces).rev() {
                assert_eq!(&aside.read(*piece).unwrap(), rows);
            }
            assert!(aside.end > 0);
            aside.clear().unwrap();
            assert_eq!(aside.file.as_ref().unwrap().metadata().unwrap().len(), 0);
        }
    }

    #[test]
    fn bytes_that_are_not_there_any_more_are_an_error() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut aside = RowsAside::new(folder.path());
        let piece = aside.push(&rows(0, 10_000)).unwrap();
        aside.file.as_ref().unwrap().set_len(piece.bytes / 2).unwrap();
        aside.read(piece).unwrap_err();
    }

    #[test]
    fn a_byte_that_changed_is_an_error_wherever_it_lies() {
        let folder = tempfile::TempDir::new().unwrap();
        let mut aside = RowsAside::new(folder.path());
        let piece = aside.push(&rows(0, 200)).unwrap();
        let file = aside.file.as_ref().unwrap();
        for at in (0..piece.bytes).step_by(7) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            assert!(matches!(aside.read(piece), Err(ArrowError::IoError(..))), "byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
        assert_eq!(aside.read(piece).unwrap(), rows(0, 200));
    }

    #[test]
    fn a_folder_that_is_not_there_is_an_error() {
        let folder = tempfile::TempDir::new().unwrap();
        RowsAside::new(&folder.path().join("none")).push(&rows(0, 1)).unwrap_err();
    }
}
