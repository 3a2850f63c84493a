//! The six metadata columns: where each row came from and which batch wrote it.
//!
//! Names, types and order are [`METADATA_COLUMNS`]; the arrays have the Arrow types that iceberg 0.10.1 gives those
//! Iceberg types, so a sink only puts field ids on. A Kafka timestamp is whatever a producer sent: one outside the
//! years 0001 to 9999, which readers in Python, Java and SQL can not hold, is null here (the column is optional).

use std::sync::Arc;

use arrow::array::{ArrayRef, Int32Array, Int64Array, StringBuilder, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, TimeUnit};
use iceberg::spec::PrimitiveType;

use super::time;
use crate::job::METADATA_COLUMNS;
use crate::offset::{Place, TopicPartition};

/// Time zone of Arrow timestamps that stand for Iceberg's timestamptz, as iceberg 0.10.1 writes it.
pub(super) const UTC: &str = "+00:00";

/// The Arrow fields of the metadata columns, without field ids, in the order of [`METADATA_COLUMNS`].
pub fn metadata_fields() -> Vec<Field> {
    METADATA_COLUMNS
        .iter()
        .map(|(name, column_type, required)| Field::new(*name, metadata_type(column_type), !required))
        .collect()
}

fn metadata_type(column_type: &PrimitiveType) -> DataType {
    match column_type {
        PrimitiveType::Int => DataType::Int32,
        PrimitiveType::Long => DataType::Int64,
        PrimitiveType::Timestamptz => DataType::Timestamp(TimeUnit::Microsecond, Some(UTC.into())),
        _ => DataType::Utf8,
    }
}

/// The metadata columns of some rows, in the order of [`METADATA_COLUMNS`].
///
/// `assignment` is indexed by [`Place::slot`]; `timestamps_ms` has one Kafka timestamp per place. Each array has as
/// many values as there are places.
pub fn metadata_columns(
    assignment: &[TopicPartition],
    places: &[Place],
    timestamps_ms: &[Option<i64>],
    batch: i64,
) -> Vec<ArrayRef> {
    assert_eq!(places.len(), timestamps_ms.len(), "one Kafka timestamp per row");
    let topic_bytes: usize = places.iter().map(|place| source(assignment, place).topic.len()).sum();
    let mut topics = StringBuilder::with_capacity(places.len(), topic_bytes);
    for place in places {
        topics.append_value(&source(assignment, place).topic);
    }
    let partitions =
        Int32Array::from_iter_values(places.iter().map(|place| source(assignment, place).partition));
    let offsets = Int64Array::from_iter_values(places.iter().map(|place| place.offset));
    let indexes = Int32Array::from_iter_values(places.iter().map(|place| place.row_index));
    let timestamps: TimestampMicrosecondArray = timestamps_ms.iter().map(|ms| ms.and_then(micros)).collect();
    vec![
        Arc::new(topics.finish()),
        Arc::new(partitions),
        Arc::new(offsets),
        Arc::new(indexes),
        Arc::new(timestamps.with_timezone(UTC)),
        Arc::new(Int64Array::from_value(batch, places.len())),
    ]
}

fn source<'t>(assignment: &'t [TopicPartition], place: &Place) -> &'t TopicPartition {
    assignment.get(place.slot as usize).expect("every slot is an index into the assignment")
}

fn micros(timestamp_ms: i64) -> Option<i64> {
    time::in_years(i128::from(timestamp_ms) * 1_000).ok()
}

#[cfg(test)]
mod tests {
    use arrow::array::{Array, AsArray, RecordBatch};
    use arrow::datatypes::{Int32Type, Int64Type, Schema, TimestampMicrosecondType};

    use super::*;

    #[test]
    fn metadata_columns_fit_their_fields_and_say_where_rows_came_from() {
        let assignment = [TopicPartition::new("clicked", 0), TopicPartition::new("sent", 3)];
        let places =
            [Place { slot: 1, offset: 9, row_index: 0 }, Place { slot: 0, offset: 1 << 40, row_index: 2 }];
        let columns = metadata_columns(&assignment, &places, &[Some(1_700_000_000_123), Some(i64::MAX)], 7);
        let schema = Arc::new(Schema::new(metadata_fields()));
        let batch = RecordBatch::try_new(schema, columns).unwrap();
        assert_eq!(batch.column(0).as_string::<i32>().value(0), "sent");
        assert_eq!(batch.column(0).as_string::<i32>().value(1), "clicked");
        assert_eq!(batch.column(1).as_primitive::<Int32Type>().values(), &[3, 0]);
        assert_eq!(batch.column(2).as_primitive::<Int64Type>().values(), &[9, 1 << 40]);
        assert_eq!(batch.column(3).as_primitive::<Int32Type>().values(), &[0, 2]);
        let timestamps = batch.column(4).as_primitive::<TimestampMicrosecondType>();
        assert_eq!(timestamps.value(0), 1_700_000_000_123_000);
        assert!(timestamps.is_null(1), "a time that no reader can hold is null");
        assert_eq!(batch.column(5).as_primitive::<Int64Type>().values(), &[7, 7]);
    }

    #[test]
    fn metadata_fields_have_the_types_that_iceberg_gives_them() {
        for (field, (name, column_type, required)) in metadata_fields().iter().zip(METADATA_COLUMNS) {
            let expected =
                iceberg::arrow::type_to_arrow_type(&iceberg::spec::Type::Primitive(column_type)).unwrap();
            assert_eq!(
                (field.name().as_str(), field.data_type(), field.is_nullable()),
                (name, &expected, !required)
            );
        }
    }

    #[test]
    fn no_rows_make_six_empty_columns() {
        let columns = metadata_columns(&[], &[], &[], 1);
        assert_eq!(columns.len(), 6);
        assert!(columns.iter().all(|column| column.is_empty()));
    }
}
