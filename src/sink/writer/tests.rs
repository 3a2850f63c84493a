use std::collections::{BTreeMap, HashSet};

use arrow::array::{Int64Array, StringArray};
use arrow::datatypes::{Decimal128Type, Int64Type};
use iceberg::spec::{Datum, PrimitiveType, Transform};
use parquet::basic::Compression;
use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::json;

use super::*;
use crate::job::{Job, PartitionField};
use crate::sink::durable::local_path;
use crate::sink::schema::{add_columns, compare, create_main};
use crate::sink::testing::{
    DAY_MICROS, DAY_ZERO_MICROS, append, catalog, column, event_id, events, job, read,
};

const MEMORY_BYTES: u64 = 64 << 20;

fn writer(table: &Table, memory_bytes: u64) -> TableWriter {
    TableWriter::new(table, Uuid::now_v7(), memory_bytes, &["event_id".to_owned()]).unwrap()
}

async fn table_of(job: &Job) -> Table {
    create_main(catalog(job).await.as_ref(), job).await.unwrap()
}

async fn write_all(table: &Table, memory_bytes: u64, batches: &[RecordBatch]) -> Vec<DataFile> {
    let mut writer = writer(table, memory_bytes);
    for batch in batches {
        writer.write(batch).await.unwrap();
    }
    writer.finish().await.unwrap()
}

/// Event ids and amounts of the current snapshot, sorted.
async fn ids_and_amounts(table: &Table) -> Vec<(String, Option<i128>)> {
    let mut found = Vec::new();
    for batch in read(table, &["event_id", "amount"]).await {
        let ids = batch.column(0).as_string::<i32>();
        let amounts = batch.column(1).as_primitive::<Decimal128Type>();
        for row in 0..batch.num_rows() {
            let amount = amounts.is_valid(row).then(|| amounts.value(row));
            found.push((ids.value(row).to_owned(), amount));
        }
    }
    found.sort();
    found
}

fn expected(numbers: std::ops::Range<i64>) -> Vec<(String, Option<i128>)> {
    let amount = |number: i64| (number % 3 != 0).then_some(i128::from(number) * 101 - 5_000);
    let mut rows: Vec<_> = numbers.map(|number| (event_id(number), amount(number))).collect();
    rows.sort();
    rows
}

fn open_parquet(file: &DataFile) -> SerializedFileReader<std::fs::File> {
    let path = local_path(file.file_path()).unwrap();
    SerializedFileReader::new(std::fs::File::open(path).unwrap()).unwrap()
}

#[tokio::test]
async fn rows_of_three_days_stand_in_three_files_and_read_back_whole() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();

    let files = write_all(&table, MEMORY_BYTES, &[events(0, 1_000, 3), events(1_000, 500, 3)]).await;

    let mut days: Vec<(String, u64)> = files
        .iter()
        .map(|file| (format!("{:?}", file.partition().iter().next().unwrap()), file.record_count()))
        .collect();
    days.sort();
    assert_eq!(days.len(), 3);
    assert!(days.iter().all(|(_, rows)| *rows == 500));
    for file in &files {
        assert!(file.file_path().starts_with("file:///"), "{}", file.file_path());
        assert!(file.file_path().contains("/data/event_time_day=2026-03-0"), "{}", file.file_path());
    }
    let table = append(catalog.as_ref(), &table, files).await;
    assert_eq!(ids_and_amounts(&table).await, expected(0..1_500));
    // the column that no batch carried
    let providers = read(&table, &["provider"]).await;
    assert!(providers.iter().all(|batch| batch.column(0).null_count() == batch.num_rows()));
}

#[tokio::test]
async fn a_batch_within_one_day_is_one_file_with_bounds_of_its_columns() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let files = write_all(&table, MEMORY_BYTES, &[events(0, 100, 1)]).await;
    assert_eq!(files.len(), 1);
    let offset_id = table.metadata().current_schema().field_id_by_name("_kafka_offset").unwrap();
    assert_eq!(files[0].lower_bounds()[&offset_id], Datum::long(0));
    assert_eq!(files[0].upper_bounds()[&offset_id], Datum::long(99));
    let provider_id = table.metadata().current_schema().field_id_by_name("provider").unwrap();
    assert_eq!(files[0].null_value_counts()[&provider_id], 100);
}

#[tokio::test]
async fn a_small_share_of_memory_makes_more_files_of_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    let batches: Vec<RecordBatch> = (0..8).map(|part| events(part * 10_000, 10_000, 20)).collect();

    let ample = write_all(&table, MEMORY_BYTES, &batches).await;
    assert_eq!(ample.len(), 20);
    let tiny = write_all(&table, 1 << 20, &batches).await;

    assert!(tiny.len() > 20, "{} files", tiny.len());
    let paths: HashSet<&str> = tiny.iter().map(DataFile::file_path).collect();
    assert_eq!(paths.len(), tiny.len());
    let table = append(catalog.as_ref(), &table, tiny).await;
    assert_eq!(ids_and_amounts(&table).await, expected(0..80_000));
}

#[tokio::test]
async fn days_beyond_the_open_files_wait_and_make_one_file_each() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    let aside = tempfile::tempdir().unwrap();
    let days = 2 * OPEN_FILES_MAX as i64 + 5;
    let mut writer = writer(&table, 1 << 30).waiting_in(aside.path());
    for part in 0..4 {
        writer.write(&events(part * 1_000, 1_000, days)).await.unwrap();
        assert_eq!(writer.open.len(), OPEN_FILES_MAX);
    }
    assert_eq!(std::fs::read_dir(aside.path()).unwrap().count(), 0, "what waits has no name");

    let files = writer.finish().await.unwrap();

    assert_eq!(files.len() as i64, days);
    let table = append(catalog.as_ref(), &table, files).await;
    assert_eq!(ids_and_amounts(&table).await, expected(0..4_000));
}

#[tokio::test]
async fn a_small_share_of_memory_makes_two_files_of_a_day_at_most_where_rows_can_wait() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    let mut writer = writer(&table, 1 << 20).waiting_in(folder.path());
    for part in 0..8 {
        writer.write(&events(part * 10_000, 10_000, 20)).await.unwrap();
        assert!(writer.open.len() == 1 || writer.held_bytes() <= writer.layout.open_bytes_max());
    }
    let files = writer.finish().await.unwrap();
    assert!(files.len() <= 40, "{} files", files.len());
    let table = append(catalog.as_ref(), &table, files).await;
    assert_eq!(ids_and_amounts(&table).await, expected(0..80_000));
}

#[tokio::test]
async fn days_that_come_one_after_the_other_never_wait() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    let mut writer = writer(&table, 1 << 30).waiting_in(Path::new("/nowhere"));
    let days = OPEN_FILES_MAX as i64 + 40;
    let all = events(0, days * 10, days);
    for day in 0..days {
        let rows: Vec<u32> = (0..10).map(|row| (row * days + day) as u32).collect();
        let rows = take_record_batch(&all, &UInt32Array::from(rows)).unwrap();
        writer.write(&rows).await.unwrap();
    }
    let files = writer.finish().await.unwrap();
    assert_eq!(files.len() as i64, days);
    let table = append(catalog.as_ref(), &table, files).await;
    assert_eq!(ids_and_amounts(&table).await, expected(0..days * 10));
}

#[tokio::test]
async fn rows_that_can_not_wait_end_the_write_and_leave_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let mut writer = writer(&table, 1 << 30).waiting_in(Path::new("/nowhere"));
    let error = writer.write(&events(0, 1_000, 2 * OPEN_FILES_MAX as i64)).await.unwrap_err();
    assert!(matches!(error, WriteError::Waiting { .. }), "{error}");
    assert_eq!(error.reason(), Reason::StorageFailed);
    let begun = writer.locations.given();
    assert!(!begun.is_empty());
    writer.abort().await.unwrap();
    assert!(begun.iter().all(|location| !local_path(location).unwrap().exists()));
}

#[tokio::test]
async fn open_files_hold_no_more_than_their_share() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let mut writer = writer(&table, 8 << 20);
    for part in 0..20 {
        writer.write(&events(part * 10_000, 10_000, 40)).await.unwrap();
        assert!(writer.held_bytes() <= writer.layout.open_bytes_max());
    }
    writer.abort().await.unwrap();
}

#[tokio::test]
async fn never_more_files_are_open_than_the_bound() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    let mut writer = writer(&table, 1 << 30);
    for _ in 0..2 {
        writer.write(&events(0, 300, 100)).await.unwrap();
        assert!(writer.open.len() <= OPEN_FILES_MAX);
    }
    let files = writer.finish().await.unwrap();
    assert_eq!(files.iter().map(DataFile::record_count).sum::<u64>(), 600);
}

#[tokio::test]
async fn a_row_group_never_outgrows_its_part_of_the_share() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let files = write_all(&table, 8 << 20, &[events(0, 100_000, 1)]).await;
    assert_eq!(files.len(), 1);
    let parquet = open_parquet(&files[0]);
    let groups = parquet.metadata().row_groups();
    assert!(groups.len() > 1);
    // an eighth of the share, overrun by at most the quarter that one piece is
    assert!(groups.iter().all(|group| group.compressed_size() <= (1 << 20) * 5 / 4));
}

#[tokio::test]
async fn properties_of_the_table_lay_out_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    let elsewhere = format!("file://{}", folder.path().join("elsewhere").display());
    let properties = [
        ("write.parquet.compression-codec", "snappy"),
        ("write.parquet.bloom-filter-enabled.column.event_id", "true"),
        ("write.target-file-size-bytes", "100000"),
        ("write.data.path", elsewhere.as_str()),
    ];
    job.sink.table_properties =
        properties.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
    let table = table_of(&job).await;
    let batches: Vec<RecordBatch> = (0..10).map(|part| events(part * 1_000, 1_000, 1)).collect();
    let files = write_all(&table, MEMORY_BYTES, &batches).await;

    assert!(files.len() > 1, "the target size was ignored");
    for file in &files {
        assert!(file.file_path().starts_with(&format!("{elsewhere}/event_time_day=2026-03-01/")));
        let parquet = open_parquet(file);
        let event_id = parquet.metadata().row_group(0).column(0);
        assert_eq!(event_id.compression(), Compression::SNAPPY);
        assert!(event_id.bloom_filter_offset().is_some());
    }
}

#[tokio::test]
async fn every_codec_of_an_iceberg_table_is_written_and_read_again() {
    let folder = tempfile::tempdir().unwrap();
    for codec in ["zstd", "gzip", "brotli", "snappy", "lz4", "uncompressed"] {
        let mut job = job(folder.path());
        job.sink.table[1] = format!("table_{codec}");
        job.sink.table_properties.insert("write.parquet.compression-codec".to_owned(), codec.to_owned());
        let files = write_all(&table_of(&job).await, MEMORY_BYTES, &[events(0, 1_000, 1)]).await;
        let parquet = open_parquet(&files[0]);
        let written = parquet.metadata().row_group(0).column(0).compression().to_string();
        assert!(written.to_ascii_lowercase().starts_with(codec), "{codec} became {written}");
        let rows = parquet.get_row_iter(None).unwrap();
        assert_eq!(rows.filter(Result::is_ok).count(), 1_000, "{codec}");
    }
}

#[tokio::test]
async fn files_are_zstd_and_keys_have_no_dictionary_unless_the_table_says_otherwise() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let files = write_all(&table, MEMORY_BYTES, &[events(0, 1_000, 1)]).await;
    let parquet = open_parquet(&files[0]);
    let columns: BTreeMap<String, _> = parquet
        .metadata()
        .row_group(0)
        .columns()
        .iter()
        .map(|of| (of.column_path().string(), of.clone()))
        .collect();
    assert!(columns.values().all(|of| matches!(of.compression(), Compression::ZSTD(_))));
    assert!(columns["event_id"].dictionary_page_offset().is_none());
    assert!(columns["_kafka_offset"].dictionary_page_offset().is_none());
    assert!(columns["_kafka_topic"].dictionary_page_offset().is_some());
}

#[tokio::test]
async fn a_property_that_can_not_be_followed_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let cases = [
        ("write.parquet.compression-codec", "lzo"),
        ("write.parquet.compression-level", "99"),
        ("write.parquet.row-group-size-bytes", "128 MB"),
        ("write.target-file-size-bytes", "0"),
        ("write.parquet.bloom-filter-fpp.column.event_id", "2"),
    ];
    for (index, (name, value)) in cases.into_iter().enumerate() {
        let mut job = job(folder.path());
        job.sink.table[1] = format!("table_{index}");
        job.sink.table_properties.insert(name.to_owned(), value.to_owned());
        job.sink
            .table_properties
            .insert("write.parquet.bloom-filter-enabled.column.event_id".to_owned(), "true".to_owned());
        let table = table_of(&job).await;
        let Err(WriteError::Layout { source, .. }) =
            TableWriter::new(&table, Uuid::now_v7(), MEMORY_BYTES, &[])
        else {
            panic!("{name} = {value} was taken");
        };
        assert_eq!((source.property.as_str(), source.value.as_str()), (name, value));
    }
}

#[tokio::test]
async fn rows_written_before_and_after_a_column_was_added_read_alike() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    let before = write_all(&table, MEMORY_BYTES, &[events(0, 10, 1)]).await;
    let table = append(catalog.as_ref(), &table, before).await;
    job.decode.columns.push(column("campaign", PrimitiveType::String, false));
    let additions = compare(&table, &job).unwrap().additions;
    let table = add_columns(catalog.as_ref(), &table, &additions).await.unwrap();
    let mut batch = events(10, 10, 1);
    let mut fields: Vec<_> = batch.schema().fields().iter().cloned().collect();
    fields.push(Arc::new(Field::new("campaign", DataType::Utf8View, true)));
    let mut columns = batch.columns().to_vec();
    columns.push(Arc::new(arrow::array::StringViewArray::from_iter((0..10).map(|_| Some("spring")))));
    batch = RecordBatch::try_new(Arc::new(ArrowSchema::new(fields)), columns).unwrap();

    let after = write_all(&table, MEMORY_BYTES, &[batch]).await;
    let table = append(catalog.as_ref(), &table, after).await;

    assert_eq!(ids_and_amounts(&table).await, expected(0..20));
    let mut campaigns = Vec::new();
    for batch in read(&table, &["_kafka_offset", "campaign"]).await {
        let offsets = batch.column(0).as_primitive::<Int64Type>().values().to_vec();
        let names = batch.column(1).as_string::<i32>();
        campaigns.extend(offsets.into_iter().zip(names.iter().map(|name| name.map(str::to_owned))));
    }
    campaigns.sort();
    let spring = |number| (number, (number >= 10).then(|| "spring".to_owned()));
    assert_eq!(campaigns, (0..20).map(spring).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_batch_that_does_not_fit_is_refused_by_column() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let good = events(0, 3, 1);
    let with = |name: &str, array: ArrayRef, nullable: bool| {
        let schema = good.schema();
        let kept = schema.fields().iter().cloned().zip(good.columns().iter().cloned());
        let mut columns: Vec<_> = kept.filter(|(field, _)| field.name() != name).collect();
        columns.push((Arc::new(Field::new(name, array.data_type().clone(), nullable)), array));
        let (fields, arrays): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
        RecordBatch::try_new(Arc::new(ArrowSchema::new(fields)), arrays).unwrap()
    };
    let without_id = good.project(&[0, 1, 2, 3, 4, 5, 7, 8, 9]).unwrap();
    let cases = [
        (
            with("surprise", Arc::new(Int64Array::from(vec![1, 2, 3])), true),
            "the table has no column surprise",
        ),
        (without_id, "required column event_id has no value in a row"),
        (
            with("event_id", Arc::new(StringArray::from(vec![Some("a"), None, Some("c")])), true),
            "required column event_id has no value in a row",
        ),
        (
            with("event_id", Arc::new(Int64Array::from(vec![1, 2, 3])), false),
            "column event_id takes Utf8 and was given Int64",
        ),
        (
            with("event_time", Arc::new(Int64Array::from(vec![1, 2, 3])), false),
            "column event_time takes Timestamp(µs, \"+00:00\") and was given Int64",
        ),
    ];
    for (batch, reason) in cases {
        let mut writer = writer(&table, MEMORY_BYTES);
        let Err(WriteError::Columns { what, .. }) = writer.write(&batch).await else {
            panic!("taken: {reason}");
        };
        assert_eq!(what, reason);
        writer.abort().await.unwrap();
    }
}

#[tokio::test]
async fn an_abort_leaves_no_file_behind() {
    let folder = tempfile::tempdir().unwrap();
    let job = job(folder.path());
    let table = table_of(&job).await;
    let mut writer = writer(&table, 1 << 20);
    for part in 0..4 {
        writer.write(&events(part * 10_000, 10_000, 10)).await.unwrap();
    }
    let begun = writer.locations.given();
    assert!(begun.iter().any(|location| local_path(location).unwrap().exists()));
    writer.abort().await.unwrap();
    assert!(begun.iter().all(|location| !local_path(location).unwrap().exists()));
}

#[tokio::test]
async fn files_that_were_finished_and_never_sent_can_be_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let mut writer = writer(&table, MEMORY_BYTES);
    writer.write(&events(0, 10, 2)).await.unwrap();
    let files = writer.finish().await.unwrap();
    assert_eq!(files_exist(&table, &files).await.unwrap(), []);
    writer.abort().await.unwrap();
    assert_eq!(files_exist(&table, &files).await.unwrap().len(), 2);
}

#[tokio::test]
async fn a_writer_that_took_nothing_makes_no_file() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let files = write_all(&table, MEMORY_BYTES, &[events(0, 0, 1)]).await;
    assert_eq!(files, []);
}

#[tokio::test]
async fn two_writers_of_one_attempt_never_share_a_name() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let attempt = Uuid::now_v7();
    let mut paths = HashSet::new();
    for _ in 0..2 {
        let mut writer = TableWriter::new(&table, attempt, MEMORY_BYTES, &[]).unwrap();
        writer.write(&events(0, 10, 2)).await.unwrap();
        for file in writer.finish().await.unwrap() {
            assert!(file.file_path().contains(&attempt.to_string()));
            assert!(paths.insert(file.file_path().to_owned()));
        }
    }
    assert_eq!(paths.len(), 4);
}

#[tokio::test]
async fn a_table_without_partitions_is_written_and_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    job.sink.partition_by.clear();
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    let files = write_all(&table, MEMORY_BYTES, &[events(0, 100, 5)]).await;
    assert_eq!(files.len(), 1);
    let stored = files_to_json(&files, &table).unwrap();
    assert_eq!(files_from_json(&stored, &table).unwrap(), files);
    let table = append(catalog.as_ref(), &table, files).await;
    assert_eq!(ids_and_amounts(&table).await, expected(0..100));
}

/// Partition values that would leave the folder, and values too long for a file name.
#[tokio::test]
async fn a_partition_value_never_leads_out_of_the_table() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    job.sink.partition_by =
        vec![PartitionField { column: "provider".to_owned(), transform: Transform::Identity }];
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    let long = "x".repeat(1_000);
    let providers = ["../../../../escape", "a/b", "..", "", "%2e%2e", "zürich ?#", long.as_str()];
    let batch = events(0, providers.len() as i64, 1);
    let mut columns: Vec<(String, ArrayRef)> = batch
        .schema()
        .fields()
        .iter()
        .map(|field| field.name().clone())
        .zip(batch.columns().to_vec())
        .collect();
    columns.push(("provider".to_owned(), Arc::new(StringArray::from(providers.to_vec()))));
    let batch = RecordBatch::try_from_iter(columns).unwrap();

    let files = write_all(&table, MEMORY_BYTES, &[batch]).await;

    assert_eq!(files.len(), providers.len());
    let data = folder.path().join("warehouse/events/notifications/data");
    for file in &files {
        let path = local_path(file.file_path()).unwrap();
        assert_eq!(path.parent().unwrap().parent().unwrap(), data, "{}", path.display());
        assert!(path.exists());
    }
    let table = append(catalog.as_ref(), &table, files).await;
    let mut found = Vec::new();
    for batch in read(&table, &["provider"]).await {
        found.extend(batch.column(0).as_string::<i32>().iter().map(|name| name.unwrap().to_owned()));
    }
    found.sort();
    let mut expected: Vec<String> = providers.iter().map(|name| (*name).to_owned()).collect();
    expected.sort();
    assert_eq!(found, expected);
}

/// Two fields whose names are not in alphabetical order: the crate's own JSON exchanges their values.
#[tokio::test]
async fn data_files_survive_json_with_their_partition_values_in_place() {
    let folder = tempfile::tempdir().unwrap();
    let mut job = job(folder.path());
    let by = |column: &str, transform| PartitionField { column: column.to_owned(), transform };
    job.sink.partition_by = vec![
        by("provider", Transform::Identity),
        by("event_time", Transform::Day),
        by("event_id", Transform::Bucket(4)),
        by("amount", Transform::Identity),
    ];
    let catalog = catalog(&job).await;
    let table = create_main(catalog.as_ref(), &job).await.unwrap();
    let files = write_all(&table, MEMORY_BYTES, &[events(0, 12, 2)]).await;

    let stored = files_to_json(&files, &table).unwrap();
    let text = serde_json::to_string(&stored).unwrap();
    let read_back: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();

    assert_eq!(files_from_json(&read_back, &table).unwrap(), files);
    let table = append(catalog.as_ref(), &table, files_from_json(&read_back, &table).unwrap()).await;
    assert_eq!(ids_and_amounts(&table).await, expected(0..12));
}

#[tokio::test]
async fn stored_files_that_are_not_ours_are_refused_with_their_place() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let files = write_all(&table, MEMORY_BYTES, &[events(0, 4, 1)]).await;
    let good = files_to_json(&files, &table).unwrap().remove(0);
    let changed = |field: &str, value: serde_json::Value| {
        let mut file = good.clone();
        file[field] = value;
        file
    };
    for (bad, reason) in [
        (json!({"path": "x"}), "missing field"),
        (changed("spec_id", json!(7)), "the table has no partition spec 7"),
        (changed("schema_id", json!(9)), "the table has no schema 9"),
        (changed("partition", json!([])), "0 partition values for a spec of 1 fields"),
        (changed("lower", json!({"1": "zz"})), "the bound of field id 1 is not hexadecimal"),
        (changed("lower", json!({"99": "00"})), "no column has the field id 99"),
        (changed("later", json!(1)), "unknown field"),
    ] {
        let Err(StoredFilesError::Unreadable { index, what, .. }) =
            files_from_json(&[good.clone(), bad], &table)
        else {
            panic!("taken: {reason}");
        };
        assert_eq!(index, 1);
        assert!(what.contains(reason), "{what}");
    }
}

#[tokio::test]
async fn files_that_are_gone_or_cut_short_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let files = write_all(&table, MEMORY_BYTES, &[events(0, 30, 3)]).await;
    assert_eq!(files_exist(&table, &files).await.unwrap(), []);
    std::fs::remove_file(local_path(files[0].file_path()).unwrap()).unwrap();
    std::fs::write(local_path(files[2].file_path()).unwrap(), b"cut").unwrap();
    let lost = files_exist(&table, &files).await.unwrap();
    let found: Vec<(&str, Option<u64>)> =
        lost.iter().map(|file| (file.path.as_str(), file.bytes_found)).collect();
    assert_eq!(found, [(files[0].file_path(), None), (files[2].file_path(), Some(3))]);
}

#[tokio::test]
async fn rows_in_any_order_of_days_are_split_as_a_plain_loop_would() {
    let folder = tempfile::tempdir().unwrap();
    let table = table_of(&job(folder.path())).await;
    let batch = events(0, 997, 7);
    let mut expected: BTreeMap<i64, u64> = BTreeMap::new();
    for number in 0..997 {
        *expected.entry((DAY_ZERO_MICROS + (number % 7) * DAY_MICROS) / DAY_MICROS).or_default() += 1;
    }
    let files = write_all(&table, MEMORY_BYTES, &[batch]).await;
    let mut found = BTreeMap::new();
    for file in &files {
        let Some(Some(day)) =
            file.partition().iter().next().map(|value| value.and_then(|of| of.as_primitive_literal()))
        else {
            panic!("a file without a day");
        };
        let iceberg::spec::PrimitiveLiteral::Int(day) = day else { panic!("a day is an int") };
        found.insert(i64::from(day), file.record_count());
    }
    assert_eq!(found, expected);
}

/// The crate cannot put every type into a manifest: what it cannot is refused when the table is made, not when the
/// first batch is committed.
#[tokio::test]
async fn every_partition_value_that_is_not_refused_can_be_committed_and_stored() {
    use PrimitiveType as Of;
    let values: [(PrimitiveType, ArrayRef); 14] = [
        (Of::Boolean, Arc::new(arrow::array::BooleanArray::from(vec![true]))),
        (Of::Int, Arc::new(arrow::array::Int32Array::from(vec![-7]))),
        (Of::Long, Arc::new(Int64Array::from(vec![-7]))),
        (Of::Float, Arc::new(arrow::array::Float32Array::from(vec![0.5]))),
        (Of::Double, Arc::new(arrow::array::Float64Array::from(vec![0.1]))),
        (
            Of::Decimal { precision: 9, scale: 2 },
            Arc::new(
                arrow::array::Decimal128Array::from(vec![-12_345]).with_precision_and_scale(9, 2).unwrap(),
            ),
        ),
        (Of::Date, Arc::new(arrow::array::Date32Array::from(vec![20_000]))),
        (Of::Time, Arc::new(arrow::array::Time64MicrosecondArray::from(vec![1_234_567]))),
        (Of::Timestamp, Arc::new(arrow::array::TimestampMicrosecondArray::from(vec![DAY_ZERO_MICROS + 1]))),
        (
            Of::Timestamptz,
            Arc::new(
                arrow::array::TimestampMicrosecondArray::from(vec![DAY_ZERO_MICROS + 1])
                    .with_timezone("+00:00"),
            ),
        ),
        (Of::String, Arc::new(StringArray::from(vec!["e-mail"]))),
        (Of::Uuid, Arc::new(arrow::array::FixedSizeBinaryArray::from(vec![&[7_u8; 16]]))),
        (Of::Fixed(4), Arc::new(arrow::array::FixedSizeBinaryArray::from(vec![&[7_u8; 4]]))),
        (Of::Binary, Arc::new(arrow::array::LargeBinaryArray::from(vec![b"\x00\xff".as_slice()]))),
    ];
    let mut refused = Vec::new();
    for (index, (of, value)) in values.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let mut job = job(folder.path());
        job.decode.columns.push(column("part", of.clone(), false));
        job.sink.partition_by =
            vec![PartitionField { column: "part".to_owned(), transform: Transform::Identity }];
        let catalog = catalog(&job).await;
        let table = match create_main(catalog.as_ref(), &job).await {
            Ok(table) => table,
            Err(error) => {
                assert!(error.to_string().contains("part"), "{error}");
                refused.push(of.to_string());
                continue;
            }
        };
        let first = events(index as i64, 1, 1);
        let mut columns: Vec<(String, ArrayRef)> = first
            .schema()
            .fields()
            .iter()
            .map(|field| field.name().clone())
            .zip(first.columns().to_vec())
            .collect();
        columns.push(("part".to_owned(), value));
        let with_value = RecordBatch::try_from_iter(columns).unwrap();
        let files = write_all(&table, MEMORY_BYTES, &[with_value, events(100, 1, 1)]).await;
        assert_eq!(files.len(), 2, "a value and its absence are two table partitions");
        let stored = files_to_json(&files, &table).unwrap();
        assert_eq!(files_from_json(&stored, &table).unwrap(), files, "{of}");
        let table = append(catalog.as_ref(), &table, files).await;
        assert_eq!(ids_and_amounts(&table).await.len(), 2, "{of}");
    }
    assert_eq!(refused, ["uuid"]);
}
