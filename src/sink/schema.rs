//! Tables from a job: their schema, partition spec and properties; and what an existing table has otherwise.
//!
//! A table that is missing is created. A new optional column of the job is added to the table, and so are
//! [`METADATA_COLUMNS`] to a table of another tool, whose rows have no value for them. Any other difference is refused by
//! name: [`compare`] lists them all, one sentence each, before anything is read.
//!
//! Invariants
//! 1. Columns stand in the job's order, then [`UNKNOWN_FIELDS_COLUMN`] if the job keeps it, then
//!    [`METADATA_COLUMNS`]. Field ids count from 1 in a table that is created here.
//! 2. Format version 2: the crate does not read deletion vectors of version 3, and version 1 has no sequence
//!    numbers.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use iceberg::spec::{
    FormatVersion, NestedField, NestedFieldRef, PrimitiveType, Schema, Transform, Type,
    UnboundPartitionField, UnboundPartitionSpec,
};
use iceberg::table::Table;
use iceberg::transaction::{AddColumn, ApplyTransactionAction, Transaction};
use iceberg::{Catalog, TableCreation, TableIdent};

use crate::catalog::{self, CatalogError};
use crate::job::{Job, LATE_COLUMNS, METADATA_COLUMNS, PartitionField, UNKNOWN_FIELDS_COLUMN, UnknownFields};
use crate::sink::durable::{FolderSyncError, sync_folders};
use crate::sink::{dead_letters, suppressed};
use crate::stop::Reason;

/// Properties of a table that is created here, unless the job sets them.
///
/// Every commit rewrites the metadata file, so it is compressed and its history of files is bounded. Ten
/// snapshots are kept by any program that expires them, so a rollback has somewhere to go.
pub const TABLE_PROPERTIES_DEFAULT: [(&str, &str); 6] = [
    ("write.parquet.compression-codec", "zstd"),
    ("write.parquet.compression-level", "1"),
    ("write.metadata.compression-codec", "gzip"),
    ("write.metadata.previous-versions-max", "100"),
    ("write.metadata.delete-after-commit.enabled", "true"),
    ("history.expire.min-snapshots-to-keep", "10"),
];

/// Ids of partition fields count from here, Iceberg specification, "Partitioning".
const PARTITION_FIELD_ID_FIRST: i32 = 1000;

/// Why a table can not be made or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SchemaError {
    /// The catalog failed; nothing or everything of the one change is done.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The job's columns or partition fields do not make an Iceberg table.
    #[error("{what}")]
    Invalid {
        /// What is wrong, with the name of the column.
        what: String,
        /// The error below.
        source: Box<iceberg::Error>,
    },
    /// The table stands, and its folders may vanish with a power cut.
    #[error("table {table} is created and not durable")]
    FolderSync {
        /// Name of the table.
        table: String,
        /// The folder.
        source: FolderSyncError,
    },
}

impl SchemaError {
    /// The named reason of a run that ends with this error.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Catalog(error) => error.reason(),
            Self::Invalid { .. } => Reason::Usage,
            Self::FolderSync { .. } => Reason::StorageFailed,
        }
    }
}

/// What an existing table has otherwise than a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Optional columns of the job that the table does not have yet, in the job's order.
    pub additions: Vec<Addition>,
    /// Differences that only a person can resolve. Not empty = do not run.
    pub refusals: Vec<Difference>,
}

/// An optional column that is added to a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addition {
    /// Name of the column.
    pub column: String,
    /// Its type.
    pub column_type: PrimitiveType,
}

/// One difference between a table and a job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Which rule it breaks.
    pub kind: DifferenceKind,
    /// The column, where the difference is one column's.
    pub column: Option<String>,
    /// One sentence: both sides and the way out.
    pub sentence: String,
}

/// Rules that a table of a job keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DifferenceKind {
    /// The table's format version is not 2.
    FormatVersion,
    /// The table is encrypted.
    Encrypted,
    /// A column has another type.
    ColumnType,
    /// A column is required on one side only.
    ColumnRequired,
    /// A required column of the job is not in the table.
    RequiredColumnMissing,
    /// A column of the job differs from one of the table only in upper and lower case.
    ColumnCase,
    /// A required column of the table is not in the job.
    UnknownRequiredColumn,
    /// The partition fields differ.
    PartitionSpec,
    /// The table has a sort order.
    SortOrder,
}

impl fmt::Display for Difference {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(&self.sentence)
    }
}

impl fmt::Display for Addition {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "add optional column {} {}", self.column, self.column_type)
    }
}

/// Schema of the main table of a job, with field ids from 1.
///
/// Key columns are the identifier fields if all of them are required and of a type that Iceberg takes for one.
///
/// # Errors
/// [`SchemaError::Invalid`] when two columns share a name.
pub fn table_schema(job: &Job) -> Result<Schema, SchemaError> {
    schema_of(job, true)
}

fn schema_of(job: &Job, metadata_required: bool) -> Result<Schema, SchemaError> {
    let columns = main_columns(job, metadata_required);
    let key_ids = identifier_field_ids(job, &columns);
    build_schema(columns, key_ids)
}

/// Schema of the late table of a job: main's columns, then [`LATE_COLUMNS`]. It has no identifier fields: a row that is
/// marked unproven may repeat one.
///
/// # Errors
/// [`SchemaError::Invalid`] when two columns share a name.
pub fn late_schema(job: &Job) -> Result<Schema, SchemaError> {
    let mut columns = main_columns(job, true);
    columns.extend(LATE_COLUMNS.map(|(name, of, required)| (name.to_owned(), of, required)));
    build_schema(columns, Vec::new())
}

fn main_columns(job: &Job, metadata_required: bool) -> Vec<(String, PrimitiveType, bool)> {
    let mut columns: Vec<(String, PrimitiveType, bool)> = Vec::new();
    for column in &job.decode.columns {
        columns.push((column.name.clone(), column.column_type.clone(), column.required));
    }
    if job.decode.unknown_fields == UnknownFields::Keep {
        columns.push((UNKNOWN_FIELDS_COLUMN.to_owned(), PrimitiveType::String, false));
    }
    for (name, column_type, required) in METADATA_COLUMNS {
        columns.push((name.to_owned(), column_type, required && metadata_required));
    }
    columns
}

fn identifier_field_ids(job: &Job, columns: &[(String, PrimitiveType, bool)]) -> Vec<i32> {
    let ids = job.dedup.key.iter().map(|key| {
        let index = columns.iter().position(|(name, _, _)| name == key)?;
        let (_, column_type, required) = &columns[index];
        let is_float = matches!(column_type, PrimitiveType::Float | PrimitiveType::Double);
        (*required && !is_float).then(|| field_id_at(index))
    });
    ids.collect::<Option<Vec<i32>>>().unwrap_or_default()
}

fn field_id_at(index: usize) -> i32 {
    i32::try_from(index).expect("a table has fewer than 2^31 columns") + 1
}

/// Builds a schema of primitive columns (name, type, required) with field ids from 1.
pub(super) fn build_schema(
    columns: Vec<(String, PrimitiveType, bool)>,
    identifier_field_ids: Vec<i32>,
) -> Result<Schema, SchemaError> {
    let fields = columns.into_iter().enumerate().map(|(index, (name, column_type, required))| {
        let field = NestedField::new(field_id_at(index), name, Type::Primitive(column_type), required);
        NestedFieldRef::from(field)
    });
    Schema::builder()
        .with_fields(fields.collect::<Vec<_>>())
        .with_identifier_field_ids(identifier_field_ids)
        .build()
        .map_err(|error| invalid("the job's columns do not make a schema", error))
}

fn invalid(what: impl Into<String>, error: iceberg::Error) -> SchemaError {
    SchemaError::Invalid { what: what.into(), source: Box::new(error) }
}

/// Partition spec of a job over its schema. Fields are named as Java and Spark name them: `event_time_day`.
///
/// # Errors
/// [`SchemaError::Invalid`] when a column is missing or a transform does not take its type.
pub fn partition_spec(
    partition_by: &[PartitionField],
    schema: &Schema,
) -> Result<UnboundPartitionSpec, SchemaError> {
    // Java's REST server takes no specification without an id, although the REST specification leaves it out
    let mut spec = UnboundPartitionSpec::builder().with_spec_id(0);
    for (field_id, field) in (PARTITION_FIELD_ID_FIRST..).zip(partition_by) {
        let what = || format!("partition field {}", in_words(&field.column, &field.transform));
        let source_id = schema.field_id_by_name(&field.column).ok_or_else(|| {
            let error = iceberg::Error::new(iceberg::ErrorKind::DataInvalid, "no such column");
            invalid(what(), error)
        })?;
        let added = spec.add_partition_fields([UnboundPartitionField {
            source_id,
            field_id: Some(field_id),
            name: field.name(),
            transform: field.transform,
        }]);
        spec = added.map_err(|error| invalid(what(), error))?;
    }
    let spec = spec.build();
    refuse_unwritable_values(partition_by, schema)?;
    // binding checks what the unbound builder can not: types, names that collide with columns
    spec.clone()
        .bind(schema.clone())
        .map_err(|error| invalid("the job's partition fields do not fit", error))?;
    Ok(spec)
}

/// The crate can not put a UUID into a manifest (0.10.1: "could not find matching type in UnionSchema"): better said
/// here than by the first commit.
fn refuse_unwritable_values(partition_by: &[PartitionField], schema: &Schema) -> Result<(), SchemaError> {
    for field in partition_by {
        let is_uuid = schema
            .field_by_name(&field.column)
            .is_some_and(|source| *source.field_type == Type::Primitive(PrimitiveType::Uuid));
        if is_uuid && field.transform == Transform::Identity {
            let what = format!(
                "table partitions by the values of {} {} can not be committed; use bucket(N, {})",
                PrimitiveType::Uuid,
                field.column,
                field.column
            );
            let error =
                iceberg::Error::new(iceberg::ErrorKind::FeatureUnsupported, "uuid as a partition value");
            return Err(invalid(what, error));
        }
    }
    Ok(())
}

/// A partition field as the job file writes it.
fn in_words(column: &str, transform: &Transform) -> String {
    match transform {
        Transform::Identity => column.to_owned(),
        Transform::Bucket(count) => format!("bucket({count}, {column})"),
        Transform::Truncate(width) => format!("truncate({width}, {column})"),
        other => format!("{other}({column})"),
    }
}

/// Identifier of a table from the parts of its name.
///
/// # Errors
/// [`SchemaError::Invalid`] when a part is missing or empty.
pub fn table_ident(parts: &[String]) -> Result<TableIdent, SchemaError> {
    let what =
        || format!("table name {:?} needs a namespace and a name: events.notifications", parts.join("."));
    if parts.len() < 2 || parts.iter().any(String::is_empty) {
        let error = iceberg::Error::new(iceberg::ErrorKind::DataInvalid, "a part is missing");
        return Err(invalid(what(), error));
    }
    TableIdent::from_strs(parts).map_err(|error| invalid(what(), error))
}

/// Creates the main table of a job with its namespace, or loads it where another program was faster.
///
/// The table that is given back is not compared with the job: call [`compare`] where it may be another's.
///
/// # Errors
/// As [`SchemaError`] says.
pub async fn create_main(catalog: &dyn Catalog, job: &Job) -> Result<Table, SchemaError> {
    let schema = table_schema(job)?;
    let spec = partition_spec(&job.sink.partition_by, &schema)?;
    create(catalog, &table_ident(&job.sink.table)?, schema, spec, &job.sink.table_properties).await
}

/// Creates the dead-letter table of a job with its namespace, or loads it where another program was faster.
///
/// It takes none of the job's table properties: `write.data.path` would mix its files with the main table's.
///
/// # Errors
/// As [`SchemaError`] says.
pub async fn create_dead_letters(catalog: &dyn Catalog, job: &Job) -> Result<Table, SchemaError> {
    let schema = dead_letters::table_schema()?;
    let spec = partition_spec(&[], &schema)?;
    create(catalog, &table_ident(&job.sink.dead_letters.table)?, schema, spec, &BTreeMap::new()).await
}

/// Creates the late table of a job with its namespace, or loads it where another program was faster.
///
/// It is not partitioned: the late rows of one batch are few and of many days, and would be as many files. Of the job's
/// table properties it takes none, as the dead-letter table.
///
/// # Errors
/// As [`SchemaError`] says.
pub async fn create_late(catalog: &dyn Catalog, job: &Job) -> Result<Table, SchemaError> {
    let schema = late_schema(job)?;
    let spec = partition_spec(&[], &schema)?;
    create(catalog, &table_ident(&job.sink.late.table)?, schema, spec, &BTreeMap::new()).await
}

/// Creates the table of erased keys, or loads it where it stands.
///
/// # Errors
/// As [`SchemaError`] says.
pub async fn create_suppressed(catalog: &dyn Catalog, ident: &TableIdent) -> Result<Table, SchemaError> {
    let schema = suppressed::table_schema()?;
    let spec = partition_spec(&[], &schema)?;
    create(catalog, ident, schema, spec, &BTreeMap::new()).await
}

async fn create(
    catalog: &dyn Catalog,
    ident: &TableIdent,
    schema: Schema,
    spec: UnboundPartitionSpec,
    job_properties: &BTreeMap<String, String>,
) -> Result<Table, SchemaError> {
    let mut properties: HashMap<String, String> =
        TABLE_PROPERTIES_DEFAULT.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    properties.extend(job_properties.clone());
    let creation = TableCreation::builder()
        .name(ident.name().to_owned())
        .schema(schema)
        .partition_spec(spec)
        .properties(properties)
        .format_version(FormatVersion::V2)
        .build();
    catalog::ensure_namespace(catalog, ident.namespace()).await?;
    let made = catalog.create_table(ident.namespace(), creation).await;
    crate::crash_point!("table_made");
    // a lost race and a lost answer look alike, and a success may be none: the table that stands there counts
    let table = match (made, catalog::load(catalog, ident).await) {
        (_, Ok(Some(table))) => table,
        (Err(error), _) => {
            return Err(CatalogError::classify(format!("creating table {ident}"), error).into());
        }
        (Ok(_), Err(error)) => return Err(error.into()),
        (Ok(_), Ok(None)) => return Err(CatalogError::made_in_vain(format!("creating table {ident}")).into()),
    };
    sync_table_folders(&table).await?;
    crate::crash_point!("table_folders_synced");
    Ok(table)
}

/// Makes the names of a new table's folders durable, from the namespace's folder down.
async fn sync_table_folders(table: &Table) -> Result<(), SchemaError> {
    let location = table.metadata().location();
    let namespace_folder = location.rsplit_once('/').map_or(location, |(above, _)| above);
    let files: Vec<&str> = table.metadata_location().into_iter().collect();
    sync_folders(&files, namespace_folder)
        .await
        .map_err(|source| SchemaError::FolderSync { table: table.identifier().to_string(), source })
}

/// Compares the main table with the job. Columns that tidemill fills in every row may be optional there: rows that another
/// tool wrote have no value for them.
///
/// # Errors
/// [`SchemaError::Invalid`] when the job itself makes no schema.
pub fn compare(table: &Table, job: &Job) -> Result<Comparison, SchemaError> {
    Ok(compare_with(table, &schema_of(job, false)?, &job.sink.partition_by))
}

/// Compares the dead-letter table with what this program writes to it.
///
/// # Errors
/// [`SchemaError::Invalid`] never in practice: the schema is fixed.
pub fn compare_dead_letters(table: &Table) -> Result<Comparison, SchemaError> {
    Ok(compare_with(table, &dead_letters::table_schema()?, &[]))
}

/// Compares the late table with the job.
///
/// # Errors
/// [`SchemaError::Invalid`] when the job itself makes no schema.
pub fn compare_late(table: &Table, job: &Job) -> Result<Comparison, SchemaError> {
    Ok(compare_with(table, &late_schema(job)?, &[]))
}

/// Compares the table of erased keys with what this program writes to it.
///
/// # Errors
/// [`SchemaError::Invalid`] never in practice: the schema is fixed.
pub fn compare_suppressed(table: &Table) -> Result<Comparison, SchemaError> {
    Ok(compare_with(table, &suppressed::table_schema()?, &[]))
}

fn compare_with(table: &Table, wanted: &Schema, partition_by: &[PartitionField]) -> Comparison {
    let mut comparison = Comparison::default();
    comparison.refusals.extend(compare_table_features(table));
    for field in wanted.as_struct().fields() {
        match compare_column(table, field) {
            ColumnVerdict::Same => {}
            ColumnVerdict::Add(addition) => comparison.additions.push(addition),
            ColumnVerdict::Refuse(differences) => comparison.refusals.extend(differences),
        }
    }
    comparison.refusals.extend(unknown_required_columns(table, wanted));
    comparison.refusals.extend(compare_partition_spec(table, partition_by));
    comparison.refusals.extend(compare_sort_order(table));
    comparison
}

fn compare_table_features(table: &Table) -> Vec<Difference> {
    let ident = table.identifier();
    let mut differences = Vec::new();
    let version = table.metadata().format_version();
    if version != FormatVersion::V2 {
        let way_out = match version {
            FormatVersion::V1 => "upgrade it with ALTER TABLE ... SET TBLPROPERTIES ('format-version' = '2')",
            _ => "a format version is never lowered, so name another table",
        };
        differences.push(Difference {
            kind: DifferenceKind::FormatVersion,
            column: None,
            sentence: format!("table {ident} has format {version}, and only v2 is written; {way_out}"),
        });
    }
    if table.metadata().properties().contains_key("encryption.key-id") {
        differences.push(Difference {
            kind: DifferenceKind::Encrypted,
            column: None,
            sentence: format!("table {ident} is encrypted, which is not built; name another table"),
        });
    }
    differences
}

enum ColumnVerdict {
    Same,
    Add(Addition),
    Refuse(Vec<Difference>),
}

fn compare_column(table: &Table, wanted: &NestedField) -> ColumnVerdict {
    let schema = table.metadata().current_schema();
    let Some(found) = schema.as_struct().fields().iter().find(|field| field.name == wanted.name) else {
        return judge_missing_column(table, wanted);
    };
    let mut differences = Vec::new();
    if found.field_type != wanted.field_type {
        differences.push(of_column(
            DifferenceKind::ColumnType,
            wanted,
            format!(
                "column {} has type {} in table {} and {} in the job; give the job's column the table's type, or \
                 another name",
                wanted.name,
                found.field_type,
                table.identifier(),
                wanted.field_type
            ),
        ));
    }
    let filled_in_every_row = METADATA_COLUMNS.iter().any(|(name, ..)| *name == wanted.name);
    if found.required != wanted.required && !(found.required && filled_in_every_row) {
        differences.push(of_column(
            DifferenceKind::ColumnRequired,
            wanted,
            format!(
                "column {} is {} in table {} and {} in the job; write required = {} in the job",
                wanted.name,
                requiredness(found.required),
                table.identifier(),
                requiredness(wanted.required),
                found.required
            ),
        ));
    }
    if differences.is_empty() { ColumnVerdict::Same } else { ColumnVerdict::Refuse(differences) }
}

fn requiredness(required: bool) -> &'static str {
    if required { "required" } else { "optional" }
}

fn of_column(kind: DifferenceKind, field: &NestedField, sentence: String) -> Difference {
    Difference { kind, column: Some(field.name.clone()), sentence }
}

fn judge_missing_column(table: &Table, wanted: &NestedField) -> ColumnVerdict {
    let ident = table.identifier();
    let fields = table.metadata().current_schema().as_struct().fields();
    if let Some(twin) = fields.iter().find(|field| field.name.to_lowercase() == wanted.name.to_lowercase()) {
        return ColumnVerdict::Refuse(vec![of_column(
            DifferenceKind::ColumnCase,
            wanted,
            format!(
                "column {} of the job stands as {} in table {ident}, and many engines do not tell upper from lower \
                 case; use the table's name",
                wanted.name, twin.name
            ),
        )]);
    }
    if wanted.required {
        return ColumnVerdict::Refuse(vec![of_column(
            DifferenceKind::RequiredColumnMissing,
            wanted,
            format!(
                "column {} {} is required in the job and missing in table {ident}, whose rows would have no value for it; \
                 make it optional in the job, or name another table",
                wanted.name, wanted.field_type
            ),
        )]);
    }
    let Type::Primitive(column_type) = wanted.field_type.as_ref() else {
        unreachable!("columns of a job are primitive");
    };
    ColumnVerdict::Add(Addition { column: wanted.name.clone(), column_type: column_type.clone() })
}

/// Required columns of the table that no row of the job would fill. Optional ones are written as null.
fn unknown_required_columns(table: &Table, wanted: &Schema) -> Vec<Difference> {
    let fields = table.metadata().current_schema().as_struct().fields();
    let unknown = fields.iter().filter(|field| field.required && wanted.field_by_name(&field.name).is_none());
    unknown
        .map(|field| {
            of_column(
                DifferenceKind::UnknownRequiredColumn,
                field,
                format!(
                    "column {} {} is required in table {} and not in the job; add it to the job's columns, or make it \
                     optional in the table",
                    field.name,
                    field.field_type,
                    table.identifier()
                ),
            )
        })
        .collect()
}

/// Names and ids of partition fields do not matter, nor do fields that were dropped (`void`).
fn compare_partition_spec(table: &Table, partition_by: &[PartitionField]) -> Option<Difference> {
    let metadata = table.metadata();
    let schema = metadata.current_schema();
    let live =
        metadata.default_partition_spec().fields().iter().filter(|field| field.transform != Transform::Void);
    let found: Vec<String> = live
        .map(|field| in_words(schema.name_by_field_id(field.source_id).unwrap_or("?"), &field.transform))
        .collect();
    let wanted: Vec<String> =
        partition_by.iter().map(|field| in_words(&field.column, &field.transform)).collect();
    (found != wanted).then(|| Difference {
        kind: DifferenceKind::PartitionSpec,
        column: None,
        sentence: format!(
            "table {} is partitioned by {} and the job by {}; write partition_by = {found:?} in the job",
            table.identifier(),
            listed(&found),
            listed(&wanted)
        ),
    })
}

fn listed(fields: &[String]) -> String {
    if fields.is_empty() { "nothing".to_owned() } else { fields.join(", ") }
}

fn compare_sort_order(table: &Table) -> Option<Difference> {
    let metadata = table.metadata();
    let order = metadata.default_sort_order();
    (!order.is_unsorted()).then(|| {
        let schema = metadata.current_schema();
        let fields = order.fields.iter().map(|field| {
            let column = schema.name_by_field_id(field.source_id).unwrap_or("?");
            format!("{} {}", in_words(column, &field.transform), field.direction)
        });
        Difference {
            kind: DifferenceKind::SortOrder,
            column: None,
            sentence: format!(
                "table {} is sorted by {} and the job writes rows in no order; remove it with ALTER TABLE ... WRITE \
                 UNORDERED",
                table.identifier(),
                fields.collect::<Vec<_>>().join(", ")
            ),
        }
    })
}

/// Adds optional columns to a table, in one commit without rows. Call it as the owner of the table.
///
/// # Errors
/// [`SchemaError::Catalog`]; after [`CatalogError::Away`] the columns may have been added: load and compare again.
pub async fn add_columns(
    catalog: &dyn Catalog,
    table: &Table,
    additions: &[Addition],
) -> Result<Table, SchemaError> {
    let what = || format!("adding columns to table {}", table.identifier());
    let of_catalog = |error| CatalogError::classify(what(), error);
    let transaction = Transaction::new(table);
    let mut change = transaction.update_schema();
    for addition in additions {
        let column_type = Type::Primitive(addition.column_type.clone());
        change = change.add_column(AddColumn::optional(&addition.column, column_type));
    }
    let transaction = change.apply(transaction).map_err(of_catalog)?;
    crate::crash_point!("columns_to_add");
    let table = transaction.commit(catalog).await.map_err(of_catalog)?;
    crate::crash_point!("columns_added");
    Ok(table)
}

#[cfg(test)]
mod tests;
