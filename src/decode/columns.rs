//! Builders: good rows become Arrow columns.
//!
//! A row is appended only after its verdict, so a builder never holds part of a refused row.

use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanBuilder, Date32Builder, Decimal128Builder, FixedSizeBinaryBuilder, Float32Builder,
    Float64Builder, Int32Builder, Int64Builder, LargeBinaryBuilder, StringBuilder, Time64MicrosecondBuilder,
    TimestampMicrosecondBuilder,
};
use arrow::datatypes::{DataType, Field};

use super::DecodeError;
use super::value::{Scratch, Value};

/// Most bytes of text in one column of one chunk: Arrow's Utf8 counts them in 32 bits.
pub(super) const TEXT_BYTES_MAX: usize = i32::MAX as usize;

/// One builder per column, in the order of the schema.
pub(super) struct Columns<'f> {
    columns: Vec<(&'f Field, ColumnBuilder)>,
}

enum ColumnBuilder {
    Boolean(BooleanBuilder),
    Int(Int32Builder),
    Long(Int64Builder),
    Float(Float32Builder),
    Double(Float64Builder),
    Decimal(Decimal128Builder),
    Date(Date32Builder),
    Time(Time64MicrosecondBuilder),
    Timestamp(TimestampMicrosecondBuilder),
    Fixed(FixedSizeBinaryBuilder),
    Text(StringBuilder),
    Binary(LargeBinaryBuilder),
}

impl<'f> Columns<'f> {
    /// Builders with room for `rows` rows.
    pub(super) fn new(fields: &'f [Field], rows: usize) -> Self {
        Self {
            columns: fields
                .iter()
                .map(|field| (field, ColumnBuilder::new(field.data_type(), rows)))
                .collect(),
        }
    }

    /// Appends one row: a value per column.
    pub(super) fn append<'v>(
        &mut self,
        values: impl Iterator<Item = &'v Value<'v>>,
        scratch: &Scratch,
    ) -> Result<(), DecodeError> {
        for ((field, builder), value) in self.columns.iter_mut().zip(values) {
            builder.append(value, scratch).map_err(|ColumnFull| DecodeError::ChunkTooLarge {
                column: field.name().clone(),
                text_bytes_max: TEXT_BYTES_MAX,
            })?;
        }
        Ok(())
    }

    /// The columns, all of the same length.
    pub(super) fn finish(self) -> Vec<ArrayRef> {
        self.columns.into_iter().map(|(field, builder)| builder.finish(field.data_type())).collect()
    }
}

struct ColumnFull;

impl ColumnBuilder {
    fn new(data_type: &DataType, rows: usize) -> Self {
        match data_type {
            DataType::Boolean => Self::Boolean(BooleanBuilder::with_capacity(rows)),
            DataType::Int32 => Self::Int(Int32Builder::with_capacity(rows)),
            DataType::Int64 => Self::Long(Int64Builder::with_capacity(rows)),
            DataType::Float32 => Self::Float(Float32Builder::with_capacity(rows)),
            DataType::Float64 => Self::Double(Float64Builder::with_capacity(rows)),
            DataType::Decimal128(..) => {
                Self::Decimal(Decimal128Builder::with_capacity(rows).with_data_type(data_type.clone()))
            }
            DataType::Date32 => Self::Date(Date32Builder::with_capacity(rows)),
            DataType::Time64(_) => Self::Time(Time64MicrosecondBuilder::with_capacity(rows)),
            DataType::Timestamp(..) => Self::Timestamp(
                TimestampMicrosecondBuilder::with_capacity(rows).with_data_type(data_type.clone()),
            ),
            DataType::FixedSizeBinary(length) => {
                Self::Fixed(FixedSizeBinaryBuilder::with_capacity(rows, *length))
            }
            DataType::Utf8 => Self::Text(StringBuilder::with_capacity(rows, 0)),
            DataType::LargeBinary => Self::Binary(LargeBinaryBuilder::with_capacity(rows, 0)),
            other => unreachable!("the plan makes no column of type {other}"),
        }
    }

    fn append(&mut self, value: &Value<'_>, scratch: &Scratch) -> Result<(), ColumnFull> {
        match (self, value) {
            (Self::Boolean(builder), Value::Boolean(value)) => builder.append_value(*value),
            (Self::Int(builder), Value::Int(value)) => builder.append_value(*value),
            (Self::Long(builder), Value::Long(value)) => builder.append_value(*value),
            (Self::Float(builder), Value::Float(value)) => builder.append_value(*value),
            (Self::Double(builder), Value::Double(value)) => builder.append_value(*value),
            (Self::Decimal(builder), Value::Decimal(value)) => builder.append_value(*value),
            (Self::Date(builder), Value::Int(value)) => builder.append_value(*value),
            (Self::Time(builder), Value::Long(value)) => builder.append_value(*value),
            (Self::Timestamp(builder), Value::Long(value)) => builder.append_value(*value),
            (Self::Fixed(builder), Value::Uuid(value)) => append_fixed(builder, value),
            (Self::Fixed(builder), Value::Bytes(value)) => append_fixed(builder, scratch.bytes(value)),
            (Self::Text(builder), Value::Text(value)) => {
                let text = scratch.text(value);
                if builder.values_slice().len() + text.len() > TEXT_BYTES_MAX {
                    return Err(ColumnFull);
                }
                builder.append_value(text);
            }
            (Self::Binary(builder), Value::Bytes(value)) => builder.append_value(scratch.bytes(value)),
            (builder, Value::Null) => builder.append_null(),
            (_, value) => unreachable!("the reader of a column's type made {value:?}"),
        }
        Ok(())
    }

    fn append_null(&mut self) {
        match self {
            Self::Boolean(builder) => builder.append_null(),
            Self::Int(builder) => builder.append_null(),
            Self::Long(builder) => builder.append_null(),
            Self::Float(builder) => builder.append_null(),
            Self::Double(builder) => builder.append_null(),
            Self::Decimal(builder) => builder.append_null(),
            Self::Date(builder) => builder.append_null(),
            Self::Time(builder) => builder.append_null(),
            Self::Timestamp(builder) => builder.append_null(),
            Self::Fixed(builder) => builder.append_null(),
            Self::Text(builder) => builder.append_null(),
            Self::Binary(builder) => builder.append_null(),
        }
    }

    fn finish(self, data_type: &DataType) -> ArrayRef {
        let array: ArrayRef = match self {
            Self::Boolean(mut builder) => Arc::new(builder.finish()),
            Self::Int(mut builder) => Arc::new(builder.finish()),
            Self::Long(mut builder) => Arc::new(builder.finish()),
            Self::Float(mut builder) => Arc::new(builder.finish()),
            Self::Double(mut builder) => Arc::new(builder.finish()),
            Self::Decimal(mut builder) => Arc::new(builder.finish()),
            Self::Date(mut builder) => Arc::new(builder.finish()),
            Self::Time(mut builder) => Arc::new(builder.finish()),
            Self::Timestamp(mut builder) => Arc::new(builder.finish()),
            Self::Fixed(mut builder) => Arc::new(builder.finish()),
            Self::Text(mut builder) => Arc::new(builder.finish()),
            Self::Binary(mut builder) => Arc::new(builder.finish()),
        };
        assert_eq!(array.data_type(), data_type, "a builder makes the type of its field");
        array
    }
}

fn append_fixed(builder: &mut FixedSizeBinaryBuilder, bytes: &[u8]) {
    builder.append_value(bytes).expect("the reader of a fixed column checked its length");
}
