use std::collections::HashMap;

use iceberg::spec::{NullOrder, SortDirection, SortField, SortOrder};

use super::*;
use crate::sink::scan;
use crate::sink::testing::{catalog, column, job};

fn kinds(comparison: &Comparison) -> Vec<DifferenceKind> {
    comparison.refusals.iter().map(|difference| difference.kind).collect()
}

/// A table with the job's name and these properties instead of the job's.
async fn table_with(
    job: &Job,
    columns: Vec<(String, PrimitiveType, bool)>,
    partition_by: &[PartitionField],
    sort_order: Option<SortOrder>,
    version: FormatVersion,
) -> Table {
    let catalog = catalog(job).await;
    let ident = table_ident(&job.sink.table).unwrap();
    let schema = build_schema(columns, Vec::new()).unwrap();
    let spec = partition_spec(partition_by, &schema).unwrap();
    let creation = TableCreation::builder()
        .name(ident.name().to_owned())
        .schema(schema)
        .partition_spec(spec)
        .sort_order_opt(sort_order)
        .properties(HashMap::new())
        .format_version(version)
        .build();
    catalog::ensure_namespace(catalog.as_ref(), ident.namespace()).await.unwrap();
    catalog.create_table(ident.namespace(), creation).await.unwrap()
}

fn job_columns(job: &Job) -> Vec<(String, PrimitiveType, bool)> {
    let schema = table_schema(job).unwrap();
    let fields = schema.as_struct().fields().iter();
    fields
        .map(|field| match field.field_type.as_ref() {
            Type::Primitive(primitive) => (field.name.clone(), primitive.clone(), field.required),
            _ => unreachable!(),
        })
        .collect()
}

#[tokio::test]
async fn a_missing_table_is_created_with_its_namespace_and_then_differs_in_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    job.sink.table = ["a", "b", "notifications"].map(str::to_owned).to_vec();
    job.decode.unknown_fields = UnknownFields::Keep;
    job.sink.table_properties.insert("write.parquet.compression-codec".to_owned(), "snappy".to_owned());
    let catalog = catalog(&job).await;

    let created = create_main(catalog.as_ref(), &job).await.unwrap();

    let ident = table_ident(&job.sink.table).unwrap();
    let loaded = catalog::load(catalog.as_ref(), &ident).await.unwrap().unwrap();
    assert_eq!(loaded.metadata().uuid(), created.metadata().uuid());
    assert_eq!(compare(&loaded, &job).unwrap(), Comparison::default());
    let schema = loaded.metadata().current_schema();
    let names: Vec<&str> = schema.as_struct().fields().iter().map(|field| field.name.as_str()).collect();
    assert_eq!(
        names[5..],
        [
            "unknown_fields",
            "_kafka_topic",
            "_kafka_partition",
            "_kafka_offset",
            "_kafka_index",
            "_kafka_timestamp",
            "_tidemill_batch"
        ]
    );
    assert_eq!(schema.identifier_field_ids().collect::<Vec<_>>(), [1]);
    assert_eq!(loaded.metadata().default_partition_spec().fields()[0].name, "event_time_day");
    assert_eq!(loaded.metadata().format_version(), FormatVersion::V2);
    let properties = loaded.metadata().properties();
    assert_eq!(properties["write.parquet.compression-codec"], "snappy");
    assert_eq!(properties["write.parquet.compression-level"], "1");
}

#[tokio::test]
async fn creating_a_table_that_stands_gives_the_one_that_stands() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let catalog = catalog(&job).await;
    let first = create_main(catalog.as_ref(), &job).await.unwrap();
    let second = create_main(catalog.as_ref(), &job).await.unwrap();
    assert_eq!(first.metadata().uuid(), second.metadata().uuid());
}

#[tokio::test]
async fn the_dead_letter_table_differs_in_nothing_from_what_is_written_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_dead_letters(catalog.as_ref(), &job).await.unwrap();
    assert_eq!(compare_dead_letters(&table).unwrap(), Comparison::default());
}

#[tokio::test]
async fn new_optional_columns_are_added_in_the_order_of_the_job() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    job.decode.columns.push(column("campaign", PrimitiveType::String, false));
    job.decode.columns.push(column("attempts", PrimitiveType::Int, false));

    let comparison = compare(&table, &job).unwrap();
    assert_eq!(kinds(&comparison), []);
    let planned: Vec<String> = comparison.additions.iter().map(ToString::to_string).collect();
    assert_eq!(planned, ["add optional column campaign string", "add optional column attempts int"]);
    let table = add_columns(catalog.as_ref(), &table, &comparison.additions).await.unwrap();

    assert_eq!(compare(&table, &job).unwrap(), Comparison::default());
    let field = table.metadata().current_schema().field_by_name("attempts").unwrap();
    assert_eq!((field.id, field.required), (13, false));
}

#[tokio::test]
async fn a_table_of_another_tool_gets_the_columns_that_every_row_of_ours_fills() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let catalog = catalog(&job).await;
    let of_job = job
        .decode
        .columns
        .iter()
        .map(|column| (column.name.clone(), column.column_type.clone(), column.required));
    let schema = build_schema(of_job.collect(), Vec::new()).unwrap();
    let spec = partition_spec(&job.sink.partition_by, &schema).unwrap();
    let ident = table_ident(&job.sink.table).unwrap();
    let table = create(catalog.as_ref(), &ident, schema, spec, &BTreeMap::new()).await.unwrap();

    let comparison = compare(&table, &job).unwrap();
    assert_eq!(kinds(&comparison), []);
    let added: Vec<&str> = comparison.additions.iter().map(|addition| addition.column.as_str()).collect();
    assert_eq!(added, METADATA_COLUMNS.map(|(name, ..)| name));
    assert_eq!(scan::batch_max(&table).await.unwrap(), 0);
    assert!(!scan::has_batch(&table, 1).await.unwrap());
    let table = add_columns(catalog.as_ref(), &table, &comparison.additions).await.unwrap();

    assert_eq!(compare(&table, &job).unwrap(), Comparison::default());
}

#[tokio::test]
async fn a_column_that_left_the_job_is_fine_where_it_is_optional_and_refused_where_it_is_required() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    job.decode.columns.retain(|column| column.name != "provider");
    assert_eq!(compare(&table, &job).unwrap(), Comparison::default());

    job.decode.columns.retain(|column| column.name != "event_id");
    let comparison = compare(&table, &job).unwrap();
    assert_eq!(kinds(&comparison), [DifferenceKind::UnknownRequiredColumn]);
    assert_eq!(comparison.refusals[0].column.as_deref(), Some("event_id"));
}

#[tokio::test]
async fn types_and_required_flags_that_differ_are_refused_with_both_sides_and_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    job.decode.columns[2].column_type = PrimitiveType::Decimal { precision: 18, scale: 2 };
    job.decode.columns[4].required = true;

    let comparison = compare(&table, &job).unwrap();

    assert_eq!(kinds(&comparison), [DifferenceKind::ColumnType, DifferenceKind::ColumnRequired]);
    assert_eq!(
        comparison.refusals[0].to_string(),
        "column amount has type decimal(12, 2) in table events.notifications and decimal(18, 2) in the job; give the \
         job's column the table's type, or another name"
    );
    assert_eq!(
        comparison.refusals[1].to_string(),
        "column provider is optional in table events.notifications and required in the job; write required = false \
         in the job"
    );
}

#[tokio::test]
async fn a_required_column_that_the_table_lacks_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    job.decode.columns.push(column("campaign", PrimitiveType::String, true));
    let comparison = compare(&table, &job).unwrap();
    assert_eq!(kinds(&comparison), [DifferenceKind::RequiredColumnMissing]);
    assert_eq!(comparison.additions, []);
}

#[tokio::test]
async fn a_column_that_differs_only_in_case_is_not_added_a_second_time() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    job.decode.columns[4].name = "Provider".to_owned();
    let comparison = compare(&table, &job).unwrap();
    assert_eq!(kinds(&comparison), [DifferenceKind::ColumnCase]);
    assert!(
        comparison.refusals[0].sentence.contains("Provider")
            && comparison.refusals[0].sentence.contains("provider")
    );
}

#[tokio::test]
async fn another_partition_spec_is_refused_with_the_line_for_the_job_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    job.sink.partition_by =
        vec![PartitionField { column: "event_id".to_owned(), transform: Transform::Bucket(16) }];
    let comparison = compare(&table, &job).unwrap();
    assert_eq!(kinds(&comparison), [DifferenceKind::PartitionSpec]);
    assert_eq!(
        comparison.refusals[0].to_string(),
        "table events.notifications is partitioned by day(event_time) and the job by bucket(16, event_id); write \
         partition_by = [\"day(event_time)\"] in the job"
    );
    job.sink.partition_by.clear();
    assert!(compare(&table, &job).unwrap().refusals[0].sentence.contains("the job by nothing"));
}

#[tokio::test]
async fn a_sort_order_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let by_time = SortField::builder()
        .source_id(2)
        .transform(Transform::Identity)
        .direction(SortDirection::Descending)
        .null_order(NullOrder::Last)
        .build();
    let columns = job_columns(&job);
    let schema = build_schema(columns.clone(), Vec::new()).unwrap();
    let order = SortOrder::builder().with_order_id(1).with_sort_field(by_time).build(&schema).unwrap();
    let table = table_with(&job, columns, &job.sink.partition_by, Some(order), FormatVersion::V2).await;
    let comparison = compare(&table, &job).unwrap();
    assert_eq!(kinds(&comparison), [DifferenceKind::SortOrder]);
    assert!(comparison.refusals[0].sentence.contains("sorted by event_time desc"));
}

#[tokio::test]
async fn other_format_versions_are_refused() {
    for (version, word) in [(FormatVersion::V1, "v1"), (FormatVersion::V3, "v3")] {
        let folder = tempfile::tempdir().unwrap();
        let job = job(folder.path());
        let table = table_with(&job, job_columns(&job), &job.sink.partition_by, None, version).await;
        let comparison = compare(&table, &job).unwrap();
        assert_eq!(kinds(&comparison), [DifferenceKind::FormatVersion]);
        assert!(comparison.refusals[0].sentence.contains(&format!("has format {word}")));
    }
}

#[test]
fn keys_that_may_be_null_or_are_floats_are_no_identifier() {
    let mut job = job(std::path::Path::new("/unused"));
    job.dedup.key = vec!["event_id".to_owned(), "provider".to_owned()];
    assert_eq!(table_schema(&job).unwrap().identifier_field_ids().len(), 0);
    job.decode.columns.push(column("score", PrimitiveType::Double, true));
    job.dedup.key = vec!["score".to_owned()];
    assert_eq!(table_schema(&job).unwrap().identifier_field_ids().len(), 0);
}

#[test]
fn a_partition_field_that_does_not_take_its_column_is_named() {
    let job = job(std::path::Path::new("/unused"));
    let schema = table_schema(&job).unwrap();
    let by = |column: &str, transform| vec![PartitionField { column: column.to_owned(), transform }];
    let error = partition_spec(&by("nowhere", Transform::Day), &schema).unwrap_err();
    assert_eq!(error.to_string(), "partition field day(nowhere)");
    assert!(partition_spec(&by("provider", Transform::Hour), &schema).is_err());
    assert!(partition_spec(&by("provider", Transform::Truncate(4)), &schema).is_ok());
}

#[test]
fn a_table_name_needs_a_namespace() {
    assert!(table_ident(&["notifications".to_owned()]).is_err());
    assert!(table_ident(&["events".to_owned(), String::new()]).is_err());
    assert_eq!(table_ident(&["events".to_owned(), "n".to_owned()]).unwrap().to_string(), "events.n");
}

/// Java's REST server answers 500 "Cannot parse missing int: spec-id" to a specification without ids.
#[test]
fn a_partition_spec_carries_its_ids() {
    let job = job(std::path::Path::new("/unused"));
    let spec = partition_spec(&job.sink.partition_by, &table_schema(&job).unwrap()).unwrap();
    assert_eq!(spec.spec_id(), Some(0));
    assert_eq!(spec.fields()[0].field_id, Some(1000));
    assert_eq!(partition_spec(&[], &table_schema(&job).unwrap()).unwrap().spec_id(), Some(0));
}
