//! Fingerprints: the 88 bits by which a dedup key is remembered.
//!
//! Flow: key columns of a record batch -> [`KeyEncoder`] -> canonical bytes -> XXH3-128 with the job's seed ->
//! [`Fingerprint`]
//!
//! Canonical bytes, version [`ENCODING_VERSION`]: for each key column, in the order of the key, one tag byte and
//! the value, little-endian.
//! ```text
//! boolean      1 | 0 or 1
//! integer      2 | i64                   int and long: a column widened from int to long keeps its keys
//! float        3 | f64 bits              float and double; -0.0 is written as 0.0, every NaN as one NaN
//! decimal      4 | scale i8, i128        the precision may widen, the scale can not change
//! date         5 | i32 days
//! time         6 | i64 microseconds
//! timestamp    7 | i64 microseconds
//! timestamptz  8 | i64 microseconds, UTC
//! string       9 | length u64, bytes     UTF-8 as it came: no case folding, no Unicode normalisation
//! fixed       10 | length u64, bytes     uuid too
//! binary      11 | length u64, bytes
//! ```
//!
//! Invariants
//! 1. Injective: for one list of key columns two rows have the same bytes only if they have the same key. Hence
//!    `("a|b", "c")` and `("a", "b|c")` differ, and so do `1` and `"1"`.
//! 2. A function of what the table stores, not of how Arrow lays it out: Utf8, LargeUtf8 and Utf8View agree, so
//!    keys read back from data files have the fingerprints that they had when they were written.
//! 3. The bytes of a version never change. Another encoding is another version, and so another key spec.
//!
//! The seed is drawn at random per job: who can not read it can not craft keys that collide.
//!
//! Bounds: one row's bytes, reused for all rows; no allocation per row.

use std::fmt;

use arrow::array::{
    Array, AsArray, BinaryArray, BinaryViewArray, BooleanArray, Date32Array, Decimal128Array,
    FixedSizeBinaryArray, Float32Array, Float64Array, Int32Array, Int64Array, LargeBinaryArray,
    LargeStringArray, RecordBatch, StringArray, StringViewArray, Time64MicrosecondArray,
    TimestampMicrosecondArray,
};
use arrow::datatypes::{
    DataType, Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type, Schema,
    Time64MicrosecondType, TimeUnit, TimestampMicrosecondType,
};
use xxhash_rust::xxh3::{xxh3_128, xxh3_128_with_seed};

use crate::job::Repeats;

/// Version of the canonical bytes of a key. Part of the key spec.
pub const ENCODING_VERSION: u32 = 1;
/// Bits that are kept of XXH3-128: the highest ones.
pub const FINGERPRINT_BITS: u32 = 88;
/// Bytes of a fingerprint.
pub const FINGERPRINT_BYTES: usize = 11;

/// The highest 88 bits of XXH3-128 over the canonical bytes of a key. Ordered as a big-endian number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; FINGERPRINT_BYTES]);

impl Fingerprint {
    /// The fingerprint of canonical key bytes.
    pub fn of(key_bytes: &[u8], seed: u64) -> Self {
        Self::from_value(xxh3_128_with_seed(key_bytes, seed) >> (u128::BITS - FINGERPRINT_BITS))
    }

    /// From its big-endian bytes.
    pub fn from_bytes(bytes: [u8; FINGERPRINT_BYTES]) -> Self {
        Self(bytes)
    }

    /// Its big-endian bytes.
    pub fn as_bytes(&self) -> &[u8; FINGERPRINT_BYTES] {
        &self.0
    }

    /// From its number.
    ///
    /// # Panics
    /// If the number has more than 88 bits.
    pub fn from_value(value: u128) -> Self {
        assert!(value >> FINGERPRINT_BITS == 0, "a fingerprint has 88 bits");
        let wide = value.to_be_bytes();
        let mut bytes = [0; FINGERPRINT_BYTES];
        bytes.copy_from_slice(&wide[wide.len() - FINGERPRINT_BYTES..]);
        Self(bytes)
    }

    /// Its number: below 2^88, in the same order.
    pub fn value(self) -> u128 {
        let mut wide = [0; 16];
        wide[16 - FINGERPRINT_BYTES..].copy_from_slice(&self.0);
        u128::from_be_bytes(wide)
    }

    /// Which of `shards` (a power of two) it belongs to: its highest bits. Independent of topic partitions.
    pub fn shard(self, shards: u32) -> u32 {
        let top = u32::from_be_bytes([self.0[0], self.0[1], self.0[2], self.0[3]]);
        ((u64::from(top) * u64::from(shards)) >> 32) as u32
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Fingerprint({:022x})", self.value())
    }
}

/// Why the keys of a batch could not be encoded.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyError {
    /// The key has no column.
    #[error("the dedup key has no column; name at least one in [dedup] key")]
    NoColumns,
    /// A key column is named twice.
    #[error("column {column} stands twice in the dedup key; name it once")]
    ColumnTwice {
        /// Name of the column.
        column: String,
    },
    /// A key column does not exist.
    #[error("key column {column} is not among the columns {found}; correct [dedup] key or the schema")]
    ColumnMissing {
        /// Name of the column.
        column: String,
        /// Columns that are there.
        found: String,
    },
    /// Values of this type can not be a key.
    #[error("key column {column} has the type {data_type}, which has no key encoding; choose another column")]
    TypeNotSupported {
        /// Name of the column.
        column: String,
        /// Arrow type found.
        data_type: String,
    },
    /// A batch has another type than the schema that the encoder was made for.
    #[error(
        "key column {column} is {found} in this batch and {expected} in the key spec; read it by the table's schema"
    )]
    TypeDiffers {
        /// Name of the column.
        column: String,
        /// Encoding of the key spec.
        expected: String,
        /// Arrow type found.
        found: String,
    },
    /// A key value is null. Rows without a key are refused before dedup; a table may still hold one.
    #[error("key column {column} is null in row {row}; a row without its whole key can not be deduplicated")]
    Null {
        /// Name of the column.
        column: String,
        /// Index of the row in its batch.
        row: usize,
    },
}

/// How the values of a column are written. One variant per tag of the module head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KeyType {
    Boolean,
    Integer,
    Float,
    Decimal { scale: i8 },
    Date,
    Time,
    Timestamp,
    Timestamptz,
    String,
    Fixed { bytes: i32 },
    Binary,
}

impl KeyType {
    fn of(data_type: &DataType) -> Option<Self> {
        Some(match data_type {
            DataType::Boolean => Self::Boolean,
            DataType::Int32 | DataType::Int64 => Self::Integer,
            DataType::Float32 | DataType::Float64 => Self::Float,
            DataType::Decimal128(_, scale) => Self::Decimal { scale: *scale },
            DataType::Date32 => Self::Date,
            DataType::Time64(TimeUnit::Microsecond) => Self::Time,
            DataType::Timestamp(TimeUnit::Microsecond, None) => Self::Timestamp,
            DataType::Timestamp(TimeUnit::Microsecond, Some(_)) => Self::Timestamptz,
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Self::String,
            DataType::FixedSizeBinary(bytes) => Self::Fixed { bytes: *bytes },
            DataType::Binary | DataType::LargeBinary | DataType::BinaryView => Self::Binary,
            _ => return None,
        })
    }

    fn tag(self) -> u8 {
        match self {
            Self::Boolean => 1,
            Self::Integer => 2,
            Self::Float => 3,
            Self::Decimal { .. } => 4,
            Self::Date => 5,
            Self::Time => 6,
            Self::Timestamp => 7,
            Self::Timestamptz => 8,
            Self::String => 9,
            Self::Fixed { .. } => 10,
            Self::Binary => 11,
        }
    }
}

impl fmt::Display for KeyType {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Boolean => write!(out, "boolean"),
            Self::Integer => write!(out, "integer"),
            Self::Float => write!(out, "float"),
            Self::Decimal { scale } => write!(out, "decimal(scale {scale})"),
            Self::Date => write!(out, "date"),
            Self::Time => write!(out, "time"),
            Self::Timestamp => write!(out, "timestamp"),
            Self::Timestamptz => write!(out, "timestamptz"),
            Self::String => write!(out, "string"),
            Self::Fixed { bytes } => write!(out, "fixed[{bytes}]"),
            Self::Binary => write!(out, "binary"),
        }
    }
}

/// Turns key columns into fingerprints. One per job; cheap to clone and free of state between batches.
#[derive(Debug, Clone)]
pub struct KeyEncoder {
    columns: Vec<(String, KeyType)>,
    seed: u64,
}

impl KeyEncoder {
    /// Finds the key columns, in the order of the key, in the table's Arrow schema.
    ///
    /// # Errors
    /// [`KeyError`] if there is no key column, one is named twice or missing, or its type has no encoding.
    pub fn new(schema: &Schema, key_columns: &[String], seed: u64) -> Result<Self, KeyError> {
        if key_columns.is_empty() {
            return Err(KeyError::NoColumns);
        }
        let mut columns: Vec<(String, KeyType)> = Vec::with_capacity(key_columns.len());
        for column in key_columns {
            if columns.iter().any(|(earlier, _)| earlier == column) {
                return Err(KeyError::ColumnTwice { column: column.clone() });
            }
            let field = schema.field_with_name(column).map_err(|_| missing(column, schema))?;
            let key_type = KeyType::of(field.data_type()).ok_or_else(|| KeyError::TypeNotSupported {
                column: column.clone(),
                data_type: field.data_type().to_string(),
            })?;
            columns.push((column.clone(), key_type));
        }
        Ok(Self { columns, seed })
    }

    /// One fingerprint per row, in the order of the rows. The batch may hold other columns too, in any order.
    ///
    /// Costs 11 bytes per row and one buffer for the longest key.
    ///
    /// # Errors
    /// [`KeyError`] if a key column is missing, has another type or holds a null; nothing is half done.
    pub fn encode(&self, batch: &RecordBatch) -> Result<Vec<Fingerprint>, KeyError> {
        let mut fingerprints = Vec::with_capacity(batch.num_rows());
        self.for_each_key(batch, |key_bytes| fingerprints.push(Fingerprint::of(key_bytes, self.seed)))?;
        Ok(fingerprints)
    }

    /// Names everything that decides which keys are equal and where they are looked for, as 32 hex digits. Two
    /// states with different hashes can not be used for one another. `bucket_source` says where the time of a key's bucket
    /// comes from: [`Job::bucket_source`](crate::job::Job::bucket_source).
    pub fn key_spec_hash(&self, shards: u32, bucket_source: &str, repeats: Repeats) -> String {
        let mut text = Vec::new();
        let mut part = |bytes: &[u8]| {
            text.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            text.extend_from_slice(bytes);
        };
        part(b"tidemill key spec");
        part(&ENCODING_VERSION.to_le_bytes());
        part(&FINGERPRINT_BITS.to_le_bytes());
        part(&self.seed.to_le_bytes());
        part(&shards.to_le_bytes());
        part(bucket_source.as_bytes());
        part(match repeats {
            Repeats::AnyTime => b"any_time",
            Repeats::SameTime => b"same_time",
        });
        for (column, key_type) in &self.columns {
            part(column.as_bytes());
            part(key_type.to_string().as_bytes());
        }
        format!("{:032x}", xxh3_128(&text))
    }

    /// Calls `take` with the canonical bytes of every row's key.
    fn for_each_key(&self, batch: &RecordBatch, mut take: impl FnMut(&[u8])) -> Result<(), KeyError> {
        let columns = self
            .columns
            .iter()
            .map(|(column, key_type)| KeyColumn::find(batch, column, *key_type))
            .collect::<Result<Vec<_>, _>>()?;
        let mut key_bytes = Vec::new();
        for row in 0..batch.num_rows() {
            key_bytes.clear();
            for column in &columns {
                column.write(row, &mut key_bytes);
            }
            take(&key_bytes);
        }
        Ok(())
    }
}

fn missing(column: &str, schema: &Schema) -> KeyError {
    let names: Vec<&str> = schema.fields().iter().map(|field| field.name().as_str()).collect();
    KeyError::ColumnMissing { column: column.to_owned(), found: names.join(", ") }
}

/// A column of a batch whose type was checked and that holds no null.
struct KeyColumn<'a> {
    tag: u8,
    values: KeyValues<'a>,
}

enum KeyValues<'a> {
    Boolean(&'a BooleanArray),
    Int32(&'a Int32Array),
    Int64(&'a Int64Array),
    Float32(&'a Float32Array),
    Float64(&'a Float64Array),
    Decimal(&'a Decimal128Array, i8),
    Date(&'a Date32Array),
    Time(&'a Time64MicrosecondArray),
    Timestamp(&'a TimestampMicrosecondArray),
    Utf8(&'a StringArray),
    LargeUtf8(&'a LargeStringArray),
    Utf8View(&'a StringViewArray),
    Fixed(&'a FixedSizeBinaryArray),
    Binary(&'a BinaryArray),
    LargeBinary(&'a LargeBinaryArray),
    BinaryView(&'a BinaryViewArray),
}

impl<'a> KeyColumn<'a> {
    fn find(batch: &'a RecordBatch, column: &str, key_type: KeyType) -> Result<Self, KeyError> {
        let array = batch.column_by_name(column).ok_or_else(|| missing(column, &batch.schema()))?;
        let differs = || KeyError::TypeDiffers {
            column: column.to_owned(),
            expected: key_type.to_string(),
            found: array.data_type().to_string(),
        };
        if KeyType::of(array.data_type()) != Some(key_type) {
            return Err(differs());
        }
        if array.null_count() > 0 {
            let row = (0..array.len()).find(|row| array.is_null(*row)).unwrap_or(0);
            return Err(KeyError::Null { column: column.to_owned(), row });
        }
        let values = match array.data_type() {
            DataType::Boolean => KeyValues::Boolean(array.as_boolean()),
            DataType::Int32 => KeyValues::Int32(array.as_primitive::<Int32Type>()),
            DataType::Int64 => KeyValues::Int64(array.as_primitive::<Int64Type>()),
            DataType::Float32 => KeyValues::Float32(array.as_primitive::<Float32Type>()),
            DataType::Float64 => KeyValues::Float64(array.as_primitive::<Float64Type>()),
            DataType::Decimal128(_, scale) => {
                KeyValues::Decimal(array.as_primitive::<Decimal128Type>(), *scale)
            }
            DataType::Date32 => KeyValues::Date(array.as_primitive::<Date32Type>()),
            DataType::Time64(_) => KeyValues::Time(array.as_primitive::<Time64MicrosecondType>()),
            DataType::Timestamp(..) => KeyValues::Timestamp(array.as_primitive::<TimestampMicrosecondType>()),
            DataType::Utf8 => KeyValues::Utf8(array.as_string()),
            DataType::LargeUtf8 => KeyValues::LargeUtf8(array.as_string()),
            DataType::Utf8View => KeyValues::Utf8View(array.as_string_view()),
            DataType::FixedSizeBinary(_) => KeyValues::Fixed(array.as_fixed_size_binary()),
            DataType::Binary => KeyValues::Binary(array.as_binary()),
            DataType::LargeBinary => KeyValues::LargeBinary(array.as_binary()),
            DataType::BinaryView => KeyValues::BinaryView(array.as_binary_view()),
            _ => return Err(differs()),
        };
        Ok(Self { tag: key_type.tag(), values })
    }

    fn write(&self, row: usize, out: &mut Vec<u8>) {
        out.push(self.tag);
        match &self.values {
            KeyValues::Boolean(array) => out.push(u8::from(array.value(row))),
            KeyValues::Int32(array) => out.extend_from_slice(&i64::from(array.value(row)).to_le_bytes()),
            KeyValues::Int64(array) => out.extend_from_slice(&array.value(row).to_le_bytes()),
            KeyValues::Float32(array) => write_float(f64::from(array.value(row)), out),
            KeyValues::Float64(array) => write_float(array.value(row), out),
            KeyValues::Decimal(array, scale) => {
                out.extend_from_slice(&scale.to_le_bytes());
                out.extend_from_slice(&array.value(row).to_le_bytes());
            }
            KeyValues::Date(array) => out.extend_from_slice(&array.value(row).to_le_bytes()),
            KeyValues::Time(array) => out.extend_from_slice(&array.value(row).to_le_bytes()),
            KeyValues::Timestamp(array) => out.extend_from_slice(&array.value(row).to_le_bytes()),
            KeyValues::Utf8(array) => write_bytes(array.value(row).as_bytes(), out),
            KeyValues::LargeUtf8(array) => write_bytes(array.value(row).as_bytes(), out),
            KeyValues::Utf8View(array) => write_bytes(array.value(row).as_bytes(), out),
            KeyValues::Fixed(array) => write_bytes(array.value(row), out),
            KeyValues::Binary(array) => write_bytes(array.value(row), out),
            KeyValues::LargeBinary(array) => write_bytes(array.value(row), out),
            KeyValues::BinaryView(array) => write_bytes(array.value(row), out),
        }
    }
}

/// Equal numbers have equal bytes: both zeros are one key, and so is every NaN.
fn write_float(value: f64, out: &mut Vec<u8>) {
    let canonical = if value.is_nan() {
        f64::NAN
    } else if value == 0.0 {
        0.0
    } else {
        value
    };
    out.extend_from_slice(&canonical.to_bits().to_le_bytes());
}

fn write_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
    out.extend_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, StringArray};
    use proptest::prelude::*;

    use super::*;

    const SEED: u64 = 0x7469_6465_6d69_6c6c;

    fn batch(columns: Vec<ArrayRef>) -> RecordBatch {
        let names = ["a", "b", "c", "d"];
        RecordBatch::try_from_iter(names.into_iter().zip(columns)).unwrap()
    }

    fn fingerprints(columns: Vec<ArrayRef>) -> Vec<Fingerprint> {
        let batch = batch(columns);
        encoder(&batch).encode(&batch).unwrap()
    }

    fn encoder(batch: &RecordBatch) -> KeyEncoder {
        let names: Vec<String> = batch.schema().fields().iter().map(|field| field.name().clone()).collect();
        KeyEncoder::new(&batch.schema(), &names, SEED).unwrap()
    }

    fn key_bytes(columns: Vec<ArrayRef>) -> Vec<Vec<u8>> {
        let batch = batch(columns);
        let mut all = Vec::new();
        encoder(&batch).for_each_key(&batch, |bytes| all.push(bytes.to_vec())).unwrap();
        all
    }

    fn strings(values: &[&str]) -> ArrayRef {
        Arc::new(StringArray::from(values.to_vec()))
    }

    #[test]
    fn a_separator_inside_a_value_does_not_move_the_border_between_columns() {
        let both = fingerprints(vec![strings(&["a|b", "a"]), strings(&["c", "b|c"])]);
        assert_ne!(both[0], both[1]);
        let empty = fingerprints(vec![strings(&["", "x"]), strings(&["x", ""])]);
        assert_ne!(empty[0], empty[1]);
    }

    #[test]
    fn a_number_and_its_text_are_different_keys() {
        let number = fingerprints(vec![Arc::new(Int64Array::from(vec![1]))]);
        assert_ne!(number, fingerprints(vec![strings(&["1"])]));
        assert_ne!(number, fingerprints(vec![Arc::new(Float64Array::from(vec![1.0]))]));
        assert_ne!(number, fingerprints(vec![Arc::new(BooleanArray::from(vec![true]))]));
    }

    #[test]
    fn arrow_layouts_of_one_iceberg_type_agree() {
        let texts = ["", "click", "a text that is longer than twelve bytes"];
        let utf8 = fingerprints(vec![strings(&texts)]);
        assert_eq!(utf8, fingerprints(vec![Arc::new(LargeStringArray::from(texts.to_vec()))]));
        assert_eq!(utf8, fingerprints(vec![Arc::new(StringViewArray::from(texts.to_vec()))]));

        let bytes: Vec<&[u8]> = texts.iter().map(|text| text.as_bytes()).collect();
        let binary = fingerprints(vec![Arc::new(BinaryArray::from(bytes.clone()))]);
        assert_eq!(binary, fingerprints(vec![Arc::new(LargeBinaryArray::from(bytes.clone()))]));
        assert_eq!(binary, fingerprints(vec![Arc::new(BinaryViewArray::from(bytes))]));
        assert_ne!(binary, utf8);
    }

    #[test]
    fn widening_a_key_column_keeps_its_keys() {
        let narrow = vec![i32::MIN, -1, 0, i32::MAX];
        let wide: Vec<i64> = narrow.iter().copied().map(i64::from).collect();
        assert_eq!(
            fingerprints(vec![Arc::new(Int32Array::from(narrow))]),
            fingerprints(vec![Arc::new(Int64Array::from(wide))])
        );
        let narrow = vec![0.1f32, -1.5, f32::INFINITY];
        let wide: Vec<f64> = narrow.iter().copied().map(f64::from).collect();
        assert_eq!(
            fingerprints(vec![Arc::new(Float32Array::from(narrow))]),
            fingerprints(vec![Arc::new(Float64Array::from(wide))])
        );
        let decimal = |precision| -> ArrayRef {
            let array = Decimal128Array::from(vec![12_345]).with_precision_and_scale(precision, 2).unwrap();
            Arc::new(array)
        };
        assert_eq!(fingerprints(vec![decimal(9)]), fingerprints(vec![decimal(30)]));
    }

    #[test]
    fn both_zeros_are_one_key_and_so_is_every_nan() {
        let other_nan = f64::from_bits(f64::NAN.to_bits() ^ (1 << 63) ^ 7);
        assert!(other_nan.is_nan());
        let keys = fingerprints(vec![Arc::new(Float64Array::from(vec![0.0, -0.0, f64::NAN, other_nan]))]);
        assert_eq!(keys[0], keys[1]);
        assert_eq!(keys[2], keys[3]);
        assert_ne!(keys[0], keys[2]);
    }

    #[test]
    fn every_type_of_the_key_has_its_own_bytes() {
        let utc = TimestampMicrosecondArray::from(vec![7]).with_timezone("+00:00");
        let fixed = FixedSizeBinaryArray::try_from_iter([[7u8, 0, 0, 0]].iter()).unwrap();
        let decimal = |scale| Decimal128Array::from(vec![7]).with_precision_and_scale(9, scale).unwrap();
        let columns: Vec<ArrayRef> = vec![
            Arc::new(Int64Array::from(vec![7])),
            Arc::new(Date32Array::from(vec![7])),
            Arc::new(Time64MicrosecondArray::from(vec![7])),
            Arc::new(TimestampMicrosecondArray::from(vec![7])),
            Arc::new(utc),
            Arc::new(decimal(0)),
            Arc::new(decimal(1)),
            Arc::new(BinaryArray::from(vec![[7u8, 0, 0, 0].as_slice()])),
            Arc::new(fixed),
            strings(&["\u{7}\0\0\0"]),
        ];
        let mut all: Vec<Vec<u8>> =
            columns.into_iter().map(|column| key_bytes(vec![column]).remove(0)).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!(all.len(), count);
    }

    #[test]
    fn a_null_key_is_an_error_that_names_column_and_row() {
        let column: ArrayRef = Arc::new(StringArray::from(vec![Some("x"), None]));
        let batch = batch(vec![column]);
        let error = encoder(&batch).encode(&batch).unwrap_err();
        assert_eq!(error, KeyError::Null { column: "a".into(), row: 1 });
    }

    #[test]
    fn a_key_that_can_not_be_encoded_is_refused_when_the_encoder_is_made() {
        let batch = batch(vec![strings(&["x"])]);
        let schema = batch.schema();
        let make = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            KeyEncoder::new(&schema, &names, SEED).unwrap_err()
        };
        assert_eq!(make(&[]), KeyError::NoColumns);
        assert_eq!(make(&["a", "a"]), KeyError::ColumnTwice { column: "a".into() });
        assert!(matches!(make(&["z"]), KeyError::ColumnMissing { .. }));
        let list = Schema::new(vec![arrow::datatypes::Field::new("a", DataType::Null, true)]);
        let error = KeyEncoder::new(&list, &["a".to_owned()], SEED).unwrap_err();
        assert!(matches!(error, KeyError::TypeNotSupported { .. }));
    }

    #[test]
    fn a_batch_of_another_type_is_refused() {
        let texts = batch(vec![strings(&["1"])]);
        let numbers = batch(vec![Arc::new(Int64Array::from(vec![1]))]);
        assert!(matches!(encoder(&texts).encode(&numbers).unwrap_err(), KeyError::TypeDiffers { .. }));
    }

    #[test]
    fn fingerprints_of_version_1_never_change() {
        let mixed = fingerprints(vec![
            strings(&["01890a5d-ac96-774b-bcce-b302099a8057", ""]),
            Arc::new(Int32Array::from(vec![42, -1])),
        ]);
        assert_eq!(format!("{:?}", mixed[0]), "Fingerprint(9c07dc0aaac7a980b2024b)");
        assert_eq!(format!("{:?}", mixed[1]), "Fingerprint(6dbbbf43f5dcb23161579e)");
    }

    #[test]
    fn the_key_spec_hash_changes_with_everything_that_changes_verdicts() {
        let rows = batch(vec![strings(&["x"]), strings(&["y"]), Arc::new(Int32Array::from(vec![1]))]);
        let hash = |names: &[&str], seed, shards, time, repeats| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            let encoder = KeyEncoder::new(&rows.schema(), &names, seed).unwrap();
            encoder.key_spec_hash(shards, time, repeats)
        };
        let all = [
            hash(&["a"], 1, 256, "t", Repeats::AnyTime),
            hash(&["b"], 1, 256, "t", Repeats::AnyTime),
            hash(&["c"], 1, 256, "t", Repeats::AnyTime),
            hash(&["a", "b"], 1, 256, "t", Repeats::AnyTime),
            hash(&["b", "a"], 1, 256, "t", Repeats::AnyTime),
            hash(&["a"], 2, 256, "t", Repeats::AnyTime),
            hash(&["a"], 1, 128, "t", Repeats::AnyTime),
            hash(&["a"], 1, 256, "u", Repeats::AnyTime),
            hash(&["a"], 1, 256, "t", Repeats::SameTime),
        ];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        assert!(all.iter().all(|hash| hash.len() == 32));
        assert_eq!(all[0], hash(&["a"], 1, 256, "t", Repeats::AnyTime));
    }

    #[test]
    fn shards_are_the_highest_bits() {
        let top = Fingerprint::from_value((1 << FINGERPRINT_BITS) - 1);
        let second_half = Fingerprint::from_value(1 << (FINGERPRINT_BITS - 1));
        assert_eq!((top.shard(256), top.shard(1), second_half.shard(256)), (255, 0, 128));
    }

    proptest! {
        /// Goal: two rows have the same canonical bytes exactly when they have the same key.
        /// Method: short values over a tiny alphabet that holds the bytes of tags and lengths.
        #[test]
        fn canonical_bytes_are_injective(rows in prop::collection::vec(
            ("[a|\u{0}\u{1}\u{9}]{0,4}", "[a|\u{0}\u{1}\u{9}]{0,4}", -2i64..3), 2..20)
        ) {
            let first: Vec<&str> = rows.iter().map(|row| row.0.as_str()).collect();
            let second: Vec<&str> = rows.iter().map(|row| row.1.as_str()).collect();
            let third: Vec<i64> = rows.iter().map(|row| row.2).collect();
            let bytes = key_bytes(vec![strings(&first), strings(&second), Arc::new(Int64Array::from(third))]);
            for (one, one_bytes) in rows.iter().zip(&bytes) {
                for (other, other_bytes) in rows.iter().zip(&bytes) {
                    prop_assert_eq!(one == other, one_bytes == other_bytes);
                    // No key is the beginning of another one's bytes, so columns can not run into each other.
                    prop_assert!(one == other || !other_bytes.starts_with(one_bytes));
                }
            }
        }

        /// Goal: the number of a fingerprint and its bytes are the same thing in the same order.
        #[test]
        fn order_of_bytes_is_order_of_values(one in 0u128..1 << 88, other in 0u128..1 << 88) {
            let (left, right) = (Fingerprint::from_value(one), Fingerprint::from_value(other));
            prop_assert_eq!(left.value(), one);
            prop_assert_eq!(left.cmp(&right), one.cmp(&other));
            prop_assert_eq!(Fingerprint::from_bytes(*left.as_bytes()), left);
        }
    }
}
