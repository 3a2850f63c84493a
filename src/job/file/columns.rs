//! `[decode]`: the columns of the table, in its order, and what happens to what does not fit them.

use std::collections::BTreeMap;

use iceberg::spec::PrimitiveType;

use super::problem::quoted;
use super::reader::{Field, Section};
use super::tree::{Entry, Value};
use super::words;
use crate::job::{
    Arrays, Column, ColumnSource, Decode, RECORD_BYTES_MAX_DEFAULT, TimeUnit, UNKNOWN_FIELDS_COLUMN,
    UnknownFields,
};

/// Longest record that can be decoded: Kafka and Arrow both count its bytes in 32-bit signed integers.
const RECORD_BYTES_LIMIT: u64 = i32::MAX as u64;
/// Most columns of a table.
const COLUMNS_MAX: usize = 1_000;

/// What `[decode]` says.
pub(super) struct DecodePart {
    pub decode: Decode,
    pub record_bytes_max: u64,
    /// Names of all columns, with the type of those whose type is known: a column with a mistake of its own still
    /// exists for those who refer to it.
    pub types: BTreeMap<String, Option<PrimitiveType>>,
}

/// Reads `[decode]`.
pub(super) fn read_decode(section: Option<Section<'_, '_>>) -> DecodePart {
    let mut part = DecodePart {
        decode: Decode {
            unknown_fields: UnknownFields::Ignore,
            arrays: Arrays::DeadLetter,
            columns: Vec::new(),
        },
        record_bytes_max: RECORD_BYTES_MAX_DEFAULT,
        types: BTreeMap::new(),
    };
    let Some(mut section) = section else { return part };
    if let Some(field) = section.get("format") {
        let later = [
            ("avro", "write the topic as JSON, or wait for a version that reads it"),
            ("protobuf", "write the topic as JSON, or wait for a version that reads it"),
        ];
        let _ = field.choice(&[("json", ())], &later);
    }
    if let Some(field) = section.get("unknown_fields") {
        let words = [
            ("ignore", UnknownFields::Ignore),
            ("keep", UnknownFields::Keep),
            ("dead_letter", UnknownFields::DeadLetter),
        ];
        part.decode.unknown_fields = field.choice(&words, &[]).unwrap_or(UnknownFields::Ignore);
    }
    if let Some(field) = section.get("arrays") {
        let words = [("split", Arrays::Split), ("dead_letter", Arrays::DeadLetter)];
        part.decode.arrays = field.choice(&words, &[]).unwrap_or(Arrays::DeadLetter);
    }
    if let Some(field) = section.get("max_record") {
        part.record_bytes_max = field.size().unwrap_or(RECORD_BYTES_MAX_DEFAULT);
        if part.record_bytes_max > RECORD_BYTES_LIMIT {
            field.wrong(format!("max_record is {}", field.shown())).expecting("less than \"2 GiB\"");
        }
    }
    if let Some(columns) =
        section.need_table("columns", "a table of columns: event_id = { type = \"string\" }")
    {
        read_columns(columns, &mut part);
    }
    section.finish();
    part
}

fn read_columns(section: Section<'_, '_>, part: &mut DecodePart) {
    let mut names: BTreeMap<String, String> = BTreeMap::new();
    let entries: Vec<_> = section.free_entries().collect();
    if entries.is_empty() {
        section.wrong("the table has no column".to_owned()).expecting("at least one column");
    }
    if entries.len() > COLUMNS_MAX {
        section
            .wrong(format!("the table has {} columns", entries.len()))
            .expecting(format!("at most {COLUMNS_MAX}"));
    }
    for (entry, field) in entries.iter().take(COLUMNS_MAX) {
        if check_name(&section, entry, part.decode.unknown_fields, &names) {
            names.insert(entry.name.to_ascii_lowercase(), entry.name.clone());
        }
        let column = read_column(entry, field);
        if let Some((other, inner, outer)) =
            column.as_ref().and_then(|column| entered(column, &part.decode.columns))
        {
            let found =
                format!("columns {} and {} read $.{outer} and $.{inner}", quoted(other), quoted(&entry.name));
            section
                .wrong_name(entry, format!("{found}: no value is both an object and a column"))
                .hinting("read only the inner values");
        }
        part.types.insert(entry.name.clone(), column.as_ref().map(|column| column.column_type.clone()));
        part.decode.columns.extend(column);
    }
    section.finish_free();
}

/// A column whose path runs through the value of the other: its name, and the longer and the shorter path.
fn entered<'c>(column: &Column, others: &'c [Column]) -> Option<(&'c str, String, String)> {
    let ColumnSource::Value(path) = &column.from else { return None };
    others.iter().find_map(|other| {
        let ColumnSource::Value(other_path) = &other.from else { return None };
        let (short, long) =
            if path.len() < other_path.len() { (path, other_path) } else { (other_path, path) };
        let runs_through = short.len() < long.len() && long.starts_with(short);
        runs_through.then(|| (other.name.as_str(), long.join("."), short.join(".")))
    })
}

fn check_name(
    section: &Section<'_, '_>,
    entry: &Entry,
    unknown_fields: UnknownFields,
    names: &BTreeMap<String, String>,
) -> bool {
    if let Err(problem) = words::check_column_name(&entry.name) {
        section.wrong_name(entry, problem.found).hinting(problem.hint);
        return false;
    }
    if let Some(other) = names.get(&entry.name.to_ascii_lowercase()) {
        let found = format!("columns {} and {} differ only by case", quoted(other), quoted(&entry.name));
        section.wrong_name(entry, found).hinting("most SQL engines can not tell them apart: rename one");
        return false;
    }
    if unknown_fields == UnknownFields::Keep && entry.name.eq_ignore_ascii_case(UNKNOWN_FIELDS_COLUMN) {
        let found = format!("column {} is the one that unknown_fields = \"keep\" adds", quoted(&entry.name));
        section.wrong_name(entry, found).hinting("take another name, and read the payload's own with path");
        return false;
    }
    true
}

fn read_column(entry: &Entry, field: &Field<'_, '_>) -> Option<Column> {
    const EXPECTED: &str = "a table: { type = \"string\" }";
    if let Value::Text(text) = field.value() {
        field.wrong_type(EXPECTED).hinting(format!("write {{ type = {} }}", quoted(&text.text)));
        return None;
    }
    let Value::Table(_) = field.value() else {
        field.wrong_type(EXPECTED);
        return None;
    };
    let mut section = field.table()?;
    let type_field = section.need("type", "an Iceberg type, as in \"string\", \"long\" or \"timestamptz\"");
    let column_type = type_field.as_ref().and_then(read_type);
    let from = read_from(&mut section, entry, column_type.as_ref());
    let unit_field = section.get("unit");
    let unit = unit_field.as_ref().and_then(|unit| read_unit(unit, column_type.as_ref(), from.as_ref()));
    let required = section.get("required").and_then(|field| field.boolean()).unwrap_or(false);
    section.finish();
    Some(Column { name: entry.name.clone(), column_type: column_type?, from: from?, unit, required })
}

fn read_type(field: &Field<'_, '_>) -> Option<PrimitiveType> {
    let text = field.text_expecting("the name of an Iceberg type")?;
    match words::parse_type(text) {
        Ok(column_type) => Some(column_type),
        Err(problem) => {
            field
                .wrong(problem.found)
                .expecting(
                    "boolean, int, long, float, double, decimal(P, S), date, time, timestamp, timestamptz, string, \
                     uuid, fixed[N] or binary",
                )
                .hinting(problem.hint);
            None
        }
    }
}

/// Reads `from` and `path` together: a path goes only into the payload.
fn read_from(
    section: &mut Section<'_, '_>,
    entry: &Entry,
    column_type: Option<&PrimitiveType>,
) -> Option<ColumnSource> {
    const EXPECTED: &str = "\"value\", \"key\", \"header:NAME\", \"timestamp\" or \"topic\"";
    let path = section.get("path");
    let from = section.get("from");
    let word = match &from {
        Some(field) => field.text_expecting(EXPECTED)?,
        None => "value",
    };
    if word == "value" {
        let Some(path) = path else { return Some(ColumnSource::Value(vec![entry.name.clone()])) };
        return match words::parse_path(path.text_expecting("a path as in \"$.delivery.provider\"")?) {
            Ok(names) => Some(ColumnSource::Value(names)),
            Err(problem) => {
                path.wrong(problem.found)
                    .expecting("a path as in \"$.delivery.provider\"")
                    .hinting(problem.hint);
                None
            }
        };
    }
    let from = from?;
    let (source, fitting) = match word {
        "key" => (ColumnSource::Key, "string or binary"),
        "timestamp" => (ColumnSource::Timestamp, "timestamptz"),
        "topic" => (ColumnSource::Topic, "string"),
        _ => match word.strip_prefix("header:") {
            Some("") => {
                from.wrong("from names no header").expecting("\"header:NAME\"");
                return None;
            }
            Some(name) => (ColumnSource::Header(name.to_owned()), "string or binary"),
            None => {
                let pending = from.wrong(format!("from is {}", from.shown())).expecting(EXPECTED);
                let names = ["value", "key", "timestamp", "topic", "header:NAME"];
                if let Some(nearest) = words::nearest(word, names.into_iter()) {
                    pending.hinting(format!("did you mean {nearest:?}?"));
                }
                return None;
            }
        },
    };
    if let Some(path) = path {
        let found = format!("path goes into the payload, and this column comes from {}", quoted(word));
        path.wrong(found).hinting("leave out path, or from");
        return None;
    }
    let column_type = column_type?;
    if !fitting.split(" or ").any(|name| name == column_type.to_string()) {
        let found = format!("a column from {} can not be of type {column_type}", quoted(word));
        from.wrong(found)
            .expecting(format!("type {fitting}"))
            .hinting("other types are read from the payload");
        return None;
    }
    Some(source)
}

fn read_unit(
    field: &Field<'_, '_>,
    column_type: Option<&PrimitiveType>,
    from: Option<&ColumnSource>,
) -> Option<TimeUnit> {
    let later = [("ns", "tables of format version 2 keep microseconds; send those, and write \"us\"")];
    let words = [("s", TimeUnit::Seconds), ("ms", TimeUnit::Millis), ("us", TimeUnit::Micros)];
    let unit = field.choice(&words, &later);
    let column_type = column_type?;
    if !matches!(column_type, PrimitiveType::Time | PrimitiveType::Timestamp | PrimitiveType::Timestamptz) {
        field
            .wrong(format!("unit on a column of type {column_type}"))
            .expecting("unit only with type time, timestamp or timestamptz")
            .hinting("leave it out");
        return None;
    }
    if from.is_some_and(|from| !matches!(from, ColumnSource::Value(_))) {
        field.wrong("unit on a column that is not read from the payload").hinting("leave it out");
        return None;
    }
    unit
}
