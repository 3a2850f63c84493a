//! The table of erased keys: fingerprints that stay seen although their rows are gone.
//!
//! A row is a fingerprint under the seed of the job, and the bucket of event time that it stands in: nothing else of the
//! event. It is read by every rebuild, beside the rows of the main table. A fingerprint that stands twice counts once, so
//! an append that is repeated after a lost reply does no harm.
//!
//! Columns: `fingerprint` (22 hex digits), `bucket_from` and `bucket_to` (ms since the epoch, half-open), `key_spec` (what
//! the fingerprint was made under; rows of another key are passed over).

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Int64Type, Schema as ArrowSchema};
use arrow::error::ArrowError;
use futures::StreamExt;
use futures::stream::BoxStream;
use iceberg::spec::{PrimitiveType, Schema};
use iceberg::table::Table;

use crate::event_time::EventTimeMs;
use crate::fingerprint::{FINGERPRINT_BITS, Fingerprint};
use crate::sink::scan::{self, ScanError};
use crate::sink::schema::{SchemaError, build_schema};

const FINGERPRINT: &str = "fingerprint";
const BUCKET_FROM: &str = "bucket_from";
const BUCKET_TO: &str = "bucket_to";
const KEY_SPEC: &str = "key_spec";

/// A key whose rows were erased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ErasedKey {
    /// The key.
    pub fingerprint: Fingerprint,
    /// Begin of its bucket of event time, inclusive.
    pub bucket_from: EventTimeMs,
    /// End of it, exclusive.
    pub bucket_to: EventTimeMs,
}

/// Schema of the table, with field ids from 1.
///
/// # Errors
/// Never in practice: the columns are fixed.
pub fn table_schema() -> Result<Schema, SchemaError> {
    let columns = [
        (FINGERPRINT, PrimitiveType::String),
        (BUCKET_FROM, PrimitiveType::Long),
        (BUCKET_TO, PrimitiveType::Long),
        (KEY_SPEC, PrimitiveType::String),
    ];
    build_schema(columns.map(|(name, of)| (name.to_owned(), of, true)).to_vec(), Vec::new())
}

/// Keys as rows.
///
/// # Errors
/// [`ArrowError`] when they are too many for Arrow.
pub fn rows(keys: &[ErasedKey], key_spec_hash: &str) -> Result<RecordBatch, ArrowError> {
    let fingerprints = keys.iter().map(|key| format!("{:022x}", key.fingerprint.value()));
    let columns: [ArrayRef; 4] = [
        Arc::new(StringArray::from_iter_values(fingerprints)),
        Arc::new(Int64Array::from_iter_values(keys.iter().map(|key| key.bucket_from.0))),
        Arc::new(Int64Array::from_iter_values(keys.iter().map(|key| key.bucket_to.0))),
        Arc::new(StringArray::from_iter_values(keys.iter().map(|_| key_spec_hash))),
    ];
    let field = |name: &str, of: DataType| Field::new(name, of, false);
    let schema = ArrowSchema::new(vec![
        field(FINGERPRINT, DataType::Utf8),
        field(BUCKET_FROM, DataType::Int64),
        field(BUCKET_TO, DataType::Int64),
        field(KEY_SPEC, DataType::Utf8),
    ]);
    RecordBatch::try_new(Arc::new(schema), columns.to_vec())
}

/// Reads the keys of one key spec, in batches.
///
/// # Errors
/// [`ScanError`] when the table can not be read, or a row is none of ours.
pub async fn read(
    table: &Table,
    key_spec_hash: &str,
) -> Result<BoxStream<'static, Result<Vec<ErasedKey>, ScanError>>, ScanError> {
    let columns = [FINGERPRINT, BUCKET_FROM, BUCKET_TO, KEY_SPEC].map(str::to_owned);
    let rows = scan::scan(table, None, &columns, None).await?;
    let (table, key_spec_hash) = (table.clone(), key_spec_hash.to_owned());
    let keys = rows.map(move |batch| {
        keys_of(&batch?, &key_spec_hash).ok_or_else(|| {
            let what = "a row is not one that tidemill wrote";
            ScanError::of(&table, iceberg::Error::new(iceberg::ErrorKind::DataInvalid, what))
        })
    });
    Ok(keys.boxed())
}

fn keys_of(batch: &RecordBatch, key_spec_hash: &str) -> Option<Vec<ErasedKey>> {
    let fingerprints = batch.column(0).as_string_opt::<i32>()?;
    let begins = batch.column(1).as_primitive_opt::<Int64Type>()?;
    let ends = batch.column(2).as_primitive_opt::<Int64Type>()?;
    let specs = batch.column(3).as_string_opt::<i32>()?;
    let mut keys = Vec::with_capacity(batch.num_rows());
    for row in (0..batch.num_rows()).filter(|&row| specs.is_valid(row) && specs.value(row) == key_spec_hash) {
        let value = u128::from_str_radix(fingerprints.value(row), 16).ok()?;
        let (from, to) = (begins.value(row), ends.value(row));
        if value >> FINGERPRINT_BITS != 0 || from >= to {
            return None;
        }
        keys.push(ErasedKey {
            fingerprint: Fingerprint::from_value(value),
            bucket_from: EventTimeMs(from),
            bucket_to: EventTimeMs(to),
        });
    }
    Some(keys)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_come_back_in_their_bucket_and_those_of_another_key_do_not() {
        let key = |value: u128| ErasedKey {
            fingerprint: Fingerprint::from_value(value),
            bucket_from: EventTimeMs(i64::MIN),
            bucket_to: EventTimeMs(10),
        };
        let keys = [key(7), key(1 << 87)];
        let rows = rows(&keys, "spec").unwrap();
        assert_eq!(keys_of(&rows, "spec").unwrap(), keys);
        assert_eq!(keys_of(&rows, "other").unwrap(), []);
    }
}
