//! Data files as JSON: what the ledger names for a side table until its own commit has landed.
//!
//! Layout, one object per file: `path`, `bytes`, `rows`, `schema_id`, `spec_id`, `partition` (values in the order of
//! the spec, as Iceberg's JSON single values), `split_offsets`, and by field id `column_bytes`, `values`, `nulls`,
//! `nans`, `lower`, `upper` (bounds as Iceberg's binary single values in hexadecimal).
//!
//! The crate's own JSON of a data file is not used: it restores partition values by their order in the text, which
//! a JSON object does not keep, so a spec of two fields may come back with its values exchanged.

use std::collections::{BTreeMap, HashMap};

use futures::{StreamExt, TryStreamExt};
use iceberg::spec::{
    DataContentType, DataFile, DataFileBuilder, DataFileFormat, Datum, Literal, PartitionSpec, PrimitiveType,
    Schema, Struct, Type,
};
use iceberg::table::Table;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::catalog::reason_of;
use crate::stop::Reason;

/// Most requests to the storage at once when files are looked for.
const REQUESTS_MAX: usize = 8;

/// Why stored files can not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoredFilesError {
    /// The JSON is not what this program writes.
    #[error("stored data file {index} of table {table} can not be read: {what}")]
    Unreadable {
        /// Name of the table.
        table: String,
        /// Place in the list, from 0.
        index: usize,
        /// What is wrong.
        what: String,
    },
    /// A value can not be stored.
    #[error("data file {path} of table {table} can not be stored")]
    Unstorable {
        /// Name of the table.
        table: String,
        /// Path of the file.
        path: String,
        /// The error below.
        source: Box<iceberg::Error>,
    },
    /// The storage does not say whether a file is there.
    #[error("the storage does not say whether {path} of table {table} exists; try again later")]
    Storage {
        /// Name of the table.
        table: String,
        /// Path of the file.
        path: String,
        /// The error below.
        source: Box<iceberg::Error>,
    },
}

impl StoredFilesError {
    /// The named reason of a run that ends with this error.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Unreadable { .. } => Reason::LedgerCorrupt,
            Self::Unstorable { .. } => Reason::Unexpected,
            Self::Storage { source, .. } => reason_of(source),
        }
    }
}

/// A data file that is not there as it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostFile {
    /// Path of the file.
    pub path: String,
    /// Its size when it was written.
    pub bytes: u64,
    /// Its size now; `None` = it does not exist.
    pub bytes_found: Option<u64>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredFile {
    path: String,
    bytes: u64,
    rows: u64,
    schema_id: i32,
    spec_id: i32,
    partition: Vec<Value>,
    split_offsets: Option<Vec<i64>>,
    column_bytes: BTreeMap<i32, u64>,
    values: BTreeMap<i32, u64>,
    nulls: BTreeMap<i32, u64>,
    nans: BTreeMap<i32, u64>,
    lower: BTreeMap<i32, String>,
    upper: BTreeMap<i32, String>,
}

/// Data files as JSON. `table` is the one that the writer of the files was made of: its schema and spec are named.
///
/// # Errors
/// [`StoredFilesError::Unstorable`] names the file.
pub fn files_to_json(files: &[DataFile], table: &Table) -> Result<Vec<Value>, StoredFilesError> {
    files
        .iter()
        .map(|file| file_to_json(file, table).map_err(|error| unstorable(file, table, error)))
        .collect()
}

fn unstorable(file: &DataFile, table: &Table, error: iceberg::Error) -> StoredFilesError {
    StoredFilesError::Unstorable {
        table: table.identifier().to_string(),
        path: file.file_path().to_owned(),
        source: Box::new(error),
    }
}

fn file_to_json(file: &DataFile, table: &Table) -> Result<Value, iceberg::Error> {
    let metadata = table.metadata();
    let partition_type = metadata.default_partition_type();
    let values = file.partition().iter().zip(partition_type.fields()).map(|(value, field)| match value {
        None => Ok(Value::Null),
        Some(value) => value.clone().try_into_json(&field.field_type),
    });
    let stored = StoredFile {
        path: file.file_path().to_owned(),
        bytes: file.file_size_in_bytes(),
        rows: file.record_count(),
        schema_id: metadata.current_schema_id(),
        spec_id: metadata.default_partition_spec_id(),
        partition: values.collect::<Result<_, _>>()?,
        split_offsets: file.split_offsets().map(<[i64]>::to_vec),
        column_bytes: sorted(file.column_sizes()),
        values: sorted(file.value_counts()),
        nulls: sorted(file.null_value_counts()),
        nans: sorted(file.nan_value_counts()),
        lower: bounds_to_hex(file.lower_bounds())?,
        upper: bounds_to_hex(file.upper_bounds())?,
    };
    Ok(serde_json::to_value(stored)?)
}

fn sorted(counts: &HashMap<i32, u64>) -> BTreeMap<i32, u64> {
    counts.iter().map(|(id, count)| (*id, *count)).collect()
}

fn bounds_to_hex(bounds: &HashMap<i32, Datum>) -> Result<BTreeMap<i32, String>, iceberg::Error> {
    bounds.iter().map(|(id, bound)| Ok((*id, to_hex(&bound.to_bytes()?)))).collect()
}

/// Data files from JSON, under the schema and spec they were written with, which the table still has to know.
///
/// # Errors
/// [`StoredFilesError::Unreadable`] names the place in the list.
pub fn files_from_json(stored: &[Value], table: &Table) -> Result<Vec<DataFile>, StoredFilesError> {
    let files = stored.iter().enumerate().map(|(index, value)| {
        file_from_json(value, table).map_err(|what| StoredFilesError::Unreadable {
            table: table.identifier().to_string(),
            index,
            what,
        })
    });
    files.collect()
}

fn file_from_json(value: &Value, table: &Table) -> Result<DataFile, String> {
    let stored = StoredFile::deserialize(value).map_err(|error| error.to_string())?;
    let metadata = table.metadata();
    let schema = metadata
        .schema_by_id(stored.schema_id)
        .ok_or_else(|| format!("the table has no schema {}", stored.schema_id))?;
    let spec = metadata
        .partition_spec_by_id(stored.spec_id)
        .ok_or_else(|| format!("the table has no partition spec {}", stored.spec_id))?;
    let mut file = DataFileBuilder::default();
    file.content(DataContentType::Data)
        .file_format(DataFileFormat::Parquet)
        .file_path(stored.path)
        .file_size_in_bytes(stored.bytes)
        .record_count(stored.rows)
        .partition(partition_from_json(stored.partition, spec, schema)?)
        .partition_spec_id(stored.spec_id)
        .split_offsets(stored.split_offsets)
        .column_sizes(stored.column_bytes.into_iter().collect())
        .value_counts(stored.values.into_iter().collect())
        .null_value_counts(stored.nulls.into_iter().collect())
        .nan_value_counts(stored.nans.into_iter().collect())
        .lower_bounds(bounds_from_hex(stored.lower, schema)?)
        .upper_bounds(bounds_from_hex(stored.upper, schema)?);
    file.build().map_err(|error| error.to_string())
}

fn partition_from_json(values: Vec<Value>, spec: &PartitionSpec, schema: &Schema) -> Result<Struct, String> {
    let partition_type = spec.partition_type(schema).map_err(|error| error.to_string())?;
    let fields = partition_type.fields();
    if values.len() != fields.len() {
        return Err(format!("{} partition values for a spec of {} fields", values.len(), fields.len()));
    }
    let literals = values.into_iter().zip(fields).map(|(value, field)| {
        Literal::try_from_json(value, &field.field_type).map_err(|error| format!("{}: {error}", field.name))
    });
    Ok(Struct::from_iter(literals.collect::<Result<Vec<_>, _>>()?))
}

fn bounds_from_hex(bounds: BTreeMap<i32, String>, schema: &Schema) -> Result<HashMap<i32, Datum>, String> {
    let read = bounds.into_iter().map(|(id, hex)| {
        let bound_type =
            primitive_type(schema, id).ok_or_else(|| format!("no column has the field id {id}"))?;
        let bytes = from_hex(&hex).ok_or_else(|| format!("the bound of field id {id} is not hexadecimal"))?;
        let bound = Datum::try_from_bytes(&bytes, bound_type).map_err(|error| error.to_string())?;
        Ok((id, bound))
    });
    read.collect()
}

fn primitive_type(schema: &Schema, id: i32) -> Option<PrimitiveType> {
    match schema.field_by_id(id)?.field_type.as_ref() {
        Type::Primitive(primitive) => Some(primitive.clone()),
        _ => None,
    }
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(hex: &str) -> Option<Vec<u8>> {
    if !hex.len().is_multiple_of(2) || !hex.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).ok()).collect()
}

/// Those of the files that are gone or have another size than was written, in the order given. One request each.
///
/// # Errors
/// [`StoredFilesError::Storage`] where the storage gives no answer: that is not "gone".
pub async fn files_exist(table: &Table, files: &[DataFile]) -> Result<Vec<LostFile>, StoredFilesError> {
    let looks = files.iter().map(|file| look_for(table, file));
    let looked: Vec<Option<LostFile>> =
        futures::stream::iter(looks).buffered(REQUESTS_MAX).try_collect().await?;
    Ok(looked.into_iter().flatten().collect())
}

async fn look_for(table: &Table, file: &DataFile) -> Result<Option<LostFile>, StoredFilesError> {
    let path = file.file_path();
    let of_storage = |error| StoredFilesError::Storage {
        table: table.identifier().to_string(),
        path: path.to_owned(),
        source: Box::new(error),
    };
    let lost =
        |bytes_found| LostFile { path: path.to_owned(), bytes: file.file_size_in_bytes(), bytes_found };
    let input = table.file_io().new_input(path).map_err(of_storage)?;
    match input.metadata().await {
        Ok(found) if found.size == file.file_size_in_bytes() => Ok(None),
        Ok(found) => Ok(Some(lost(Some(found.size)))),
        // the error does not say "not found" in its kind, so ask again for just that
        Err(error) => match input.exists().await {
            Ok(false) => Ok(Some(lost(None))),
            _ => Err(of_storage(error)),
        },
    }
}
