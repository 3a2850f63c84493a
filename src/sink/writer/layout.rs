//! How a Parquet file is laid out: from the table's properties, inside a share of memory.
//!
//! The iceberg crate reads none of these properties itself (`write.parquet.*`, `write.target-file-size-bytes`).

use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::str::FromStr;

use arrow::array::{Array, RecordBatch};
use iceberg::spec::{PrimitiveType, Schema, Type};
use parquet::basic::{BrotliLevel, Compression, GzipLevel, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterPropertiesBuilder};
use parquet::schema::types::ColumnPath;

use crate::job::UNKNOWN_FIELDS_COLUMN;

/// Iceberg's default for `write.parquet.row-group-size-bytes`.
const ROW_GROUP_BYTES_DEFAULT: usize = 128 << 20;
/// Iceberg's default for `write.parquet.page-size-bytes`.
const PAGE_BYTES_DEFAULT: usize = 1 << 20;
/// Iceberg's default for `write.parquet.page-row-limit`.
const PAGE_ROWS_DEFAULT: usize = 20_000;
/// Iceberg's default for `write.parquet.dict-size-bytes`.
const DICTIONARY_BYTES_DEFAULT: usize = 2 << 20;
/// Iceberg's default for `write.target-file-size-bytes`.
const FILE_BYTES_TARGET_DEFAULT: usize = 512 << 20;
/// Iceberg's default for `write.parquet.bloom-filter-max-bytes`.
const BLOOM_FILTER_BYTES_DEFAULT: usize = 1 << 20;
/// Iceberg's default for `write.parquet.bloom-filter-fpp.column.*`.
const BLOOM_FILTER_FALSE_POSITIVES_DEFAULT: f64 = 0.01;
/// Level of zstd unless the table says otherwise: measured as small as level 3 on events, a third faster.
const ZSTD_LEVEL_DEFAULT: i32 = 1;
/// Level of gzip without `write.parquet.compression-level`, as zlib has it.
const GZIP_LEVEL_DEFAULT: u32 = 6;
/// Level of brotli without `write.parquet.compression-level`, as the parquet crate has it.
const BROTLI_LEVEL_DEFAULT: u32 = 1;
/// Smallest row group: below it a file is mostly headers.
const ROW_GROUP_BYTES_MIN: usize = 512 << 10;
/// Smallest page and dictionary.
const PAGE_BYTES_MIN: usize = 16 << 10;
/// What an open file holds per column whatever it wrote: encoders and their first buffers.
const COLUMN_BYTES: usize = 8 << 10;

/// A table property that can not be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("table property {property} is {value:?}, which is not {expected}")]
pub struct LayoutError {
    /// Name of the property.
    pub property: String,
    /// Its value.
    pub value: String,
    /// What is taken.
    pub expected: String,
}

/// Writer properties and the bounds that go with them.
#[derive(Debug, Clone)]
pub struct FileLayout {
    writer_properties: WriterProperties,
    file_bytes_target: usize,
    row_group_bytes_max: usize,
    open_bytes_max: usize,
    fixed_bytes: usize,
}

impl FileLayout {
    /// Reads the properties of a table and bounds them by the share of memory.
    ///
    /// # Errors
    /// [`LayoutError`] names the first property that can not be followed.
    pub fn of(
        properties: &HashMap<String, String>,
        schema: &Schema,
        memory_bytes: u64,
        key_columns: &[String],
    ) -> Result<Self, LayoutError> {
        let properties = Properties(properties);
        let memory_bytes = usize::try_from(memory_bytes).unwrap_or(usize::MAX);
        let share = (memory_bytes / 8).max(ROW_GROUP_BYTES_MIN);
        let row_group_bytes_max =
            properties.size("write.parquet.row-group-size-bytes", ROW_GROUP_BYTES_DEFAULT)?.min(share);
        let page_bytes_max = (row_group_bytes_max / 8).max(PAGE_BYTES_MIN);
        let page_bytes = properties.size("write.parquet.page-size-bytes", PAGE_BYTES_DEFAULT)?;
        let dictionary_bytes = properties.size("write.parquet.dict-size-bytes", DICTIONARY_BYTES_DEFAULT)?;
        let mut builder = WriterProperties::builder()
            .set_compression(properties.compression()?)
            .set_max_row_group_bytes(Some(row_group_bytes_max))
            .set_data_page_size_limit(page_bytes.min(page_bytes_max))
            .set_data_page_row_count_limit(
                properties.size("write.parquet.page-row-limit", PAGE_ROWS_DEFAULT)?,
            )
            .set_dictionary_page_size_limit(dictionary_bytes.min(page_bytes_max));
        builder = without_dictionaries(builder, schema, key_columns);
        let blooms = properties.bloom_filters(schema, row_group_bytes_max)?;
        let bloom_bytes: usize = blooms.iter().map(|bloom| bloom.bytes).sum();
        for bloom in blooms {
            builder = bloom.set(builder);
        }
        Ok(Self {
            writer_properties: builder.build(),
            file_bytes_target: properties.size("write.target-file-size-bytes", FILE_BYTES_TARGET_DEFAULT)?,
            row_group_bytes_max,
            open_bytes_max: memory_bytes.saturating_sub(2 * row_group_bytes_max),
            fixed_bytes: schema.as_struct().fields().len() * COLUMN_BYTES + bloom_bytes,
        })
    }

    /// Properties for the Parquet writer.
    pub fn writer_properties(&self) -> &WriterProperties {
        &self.writer_properties
    }

    /// A file that is longer than this, in bytes, is followed by a new one.
    pub fn file_bytes_target(&self) -> usize {
        self.file_bytes_target
    }

    /// Most bytes that open files may hold together.
    pub fn open_bytes_max(&self) -> usize {
        self.open_bytes_max
    }

    /// Upper bound of what a file that wrote so many bytes holds: what is more than a row group is with the storage.
    pub fn held_bytes(&self, written_bytes: usize) -> usize {
        written_bytes.min(self.row_group_bytes_max) + self.fixed_bytes
    }

    /// A file that is finished early below this many bytes was one of too many side by side.
    pub fn small_file_bytes(&self) -> usize {
        self.row_group_bytes_max / 4
    }

    /// Rows of this batch that are handed to a file at once: a quarter of a row group, so that the row group's bound
    /// is overrun by no more.
    pub fn rows_per_piece(&self, batch: &RecordBatch) -> usize {
        let bytes: usize = batch
            .columns()
            .iter()
            .map(|column| column.to_data().get_slice_memory_size().unwrap_or(column.get_array_memory_size()))
            .sum();
        let bytes_per_row = (bytes / batch.num_rows().max(1)).max(1);
        (self.row_group_bytes_max / 4 / bytes_per_row).max(1)
    }
}

/// Switches dictionaries off where nearly every value is new, so that none is built only to be given up. Long bytes
/// also get no page statistics: nobody prunes by them.
fn without_dictionaries(
    mut builder: WriterPropertiesBuilder,
    schema: &Schema,
    key_columns: &[String],
) -> WriterPropertiesBuilder {
    let key_columns: HashSet<&str> = key_columns.iter().map(String::as_str).collect();
    for field in schema.as_struct().fields() {
        let is_key = key_columns.contains(field.name.as_str());
        let is_long = field.name == UNKNOWN_FIELDS_COLUMN
            || *field.field_type == Type::Primitive(PrimitiveType::Binary);
        let is_offset = matches!(field.name.as_str(), "_kafka_offset" | "offset");
        let path = || ColumnPath::from(field.name.clone());
        if is_key || is_long || is_offset {
            builder = builder.set_column_dictionary_enabled(path(), false);
        }
        if is_long {
            builder = builder.set_column_statistics_enabled(path(), EnabledStatistics::Chunk);
        }
    }
    builder
}

/// A Bloom filter that the table asks for.
struct BloomFilter {
    column: String,
    false_positives: f64,
    distinct_values: u64,
    bytes: usize,
}

impl BloomFilter {
    fn set(self, builder: WriterPropertiesBuilder) -> WriterPropertiesBuilder {
        let path = ColumnPath::from(self.column);
        builder
            .set_column_bloom_filter_enabled(path.clone(), true)
            .set_column_bloom_filter_fpp(path.clone(), self.false_positives)
            .set_column_bloom_filter_ndv(path, self.distinct_values)
    }
}

struct Properties<'a>(&'a HashMap<String, String>);

impl Properties<'_> {
    fn parse<T: FromStr>(&self, property: &str, default: T, expected: &str) -> Result<T, LayoutError> {
        match self.0.get(property) {
            None => Ok(default),
            Some(text) => text.trim().parse().map_err(|_| refused(property, text, expected)),
        }
    }

    fn size(&self, property: &str, default: usize) -> Result<usize, LayoutError> {
        let expected = "a whole number above 0";
        match self.parse(property, default, expected)? {
            0 => Err(refused(property, "0", expected)),
            size => Ok(size),
        }
    }

    fn compression(&self) -> Result<Compression, LayoutError> {
        let property = "write.parquet.compression-codec";
        let codec = self.0.get(property).map_or("zstd", String::as_str);
        match codec.to_ascii_lowercase().as_str() {
            "zstd" => self
                .level(ZSTD_LEVEL_DEFAULT, "a level of zstd, 1 to 22", ZstdLevel::try_new)
                .map(Compression::ZSTD),
            "gzip" => self
                .level(GZIP_LEVEL_DEFAULT, "a level of gzip, 0 to 9", GzipLevel::try_new)
                .map(Compression::GZIP),
            "brotli" => self
                .level(BROTLI_LEVEL_DEFAULT, "a level of brotli, 0 to 11", BrotliLevel::try_new)
                .map(Compression::BROTLI),
            "snappy" => Ok(Compression::SNAPPY),
            "lz4" => Ok(Compression::LZ4_RAW),
            "uncompressed" | "none" => Ok(Compression::UNCOMPRESSED),
            _ => Err(refused(property, codec, "one of zstd, gzip, brotli, snappy, lz4, uncompressed")),
        }
    }

    fn level<N: FromStr + Display + Copy, L>(
        &self,
        default: N,
        expected: &str,
        level: impl Fn(N) -> parquet::errors::Result<L>,
    ) -> Result<L, LayoutError> {
        let property = "write.parquet.compression-level";
        let number = self.parse(property, default, expected)?;
        level(number).map_err(|_| refused(property, &number.to_string(), expected))
    }

    fn bloom_filters(
        &self,
        schema: &Schema,
        row_group_bytes: usize,
    ) -> Result<Vec<BloomFilter>, LayoutError> {
        let bytes_max = self.size("write.parquet.bloom-filter-max-bytes", BLOOM_FILTER_BYTES_DEFAULT)?;
        let bytes_max = bytes_max.min(row_group_bytes / 4);
        let mut blooms = Vec::new();
        for field in schema.as_struct().fields() {
            let enabled = format!("write.parquet.bloom-filter-enabled.column.{}", field.name);
            if !self.parse(&enabled, false, "true or false")? {
                continue;
            }
            let property = format!("write.parquet.bloom-filter-fpp.column.{}", field.name);
            let expected = "a number between 0 and 1";
            let false_positives: f64 =
                self.parse(&property, BLOOM_FILTER_FALSE_POSITIVES_DEFAULT, expected)?;
            if !(false_positives > 0.0 && false_positives < 1.0) {
                return Err(refused(&property, &false_positives.to_string(), expected));
            }
            // split-block Bloom filter: bits per value = -8 / ln(1 - fpp^(1/8)), Parquet format, BloomFilter.md
            let bits_per_value = -8.0 / (1.0 - false_positives.powf(1.0 / 8.0)).ln();
            let distinct_values = (bytes_max as f64 * 8.0 / bits_per_value) as u64;
            blooms.push(BloomFilter {
                column: field.name.clone(),
                false_positives,
                distinct_values: distinct_values.max(1),
                bytes: bytes_max,
            });
        }
        Ok(blooms)
    }
}

fn refused(property: &str, value: &str, expected: &str) -> LayoutError {
    LayoutError { property: property.to_owned(), value: value.to_owned(), expected: expected.to_owned() }
}
