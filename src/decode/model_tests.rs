//! The decoder against a plain model of it, and its fast read against the walk.

use std::collections::{BTreeMap, HashSet};

use arrow::array::{Array, ArrayRef, AsArray};
use arrow::datatypes::{
    DataType, Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type,
    Time64MicrosecondType, TimestampMicrosecondType,
};
use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime, Timelike};
use iceberg::spec::PrimitiveType;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use serde_json::value::RawValue;

use super::fast::FastRow;
use super::plan::{Plan, Tree};
use super::scan::{Scan, split};
use super::tests::{assignment, at, chunk_of, column, decoder_of, job_of};
use super::value::{Scratch, Value};
use super::walk::{self, Walk};
use super::*;
use crate::job::{Column, Decode, TimeUnit, UNKNOWN_FIELDS_COLUMN};

/// A column of every type, some of them inside of objects, two on one member, one of a name that needs escapes.
fn every_type() -> Vec<Column> {
    let timed = |unit, column: Column| Column { unit: Some(unit), ..column };
    vec![
        column("boolean", PrimitiveType::Boolean),
        column("int", PrimitiveType::Int),
        column("long", PrimitiveType::Long),
        at("long_again", &["long"], PrimitiveType::Decimal { precision: 38, scale: 0 }),
        column("float", PrimitiveType::Float),
        column("double", PrimitiveType::Double),
        column("decimal", PrimitiveType::Decimal { precision: 9, scale: 2 }),
        column("wide", PrimitiveType::Decimal { precision: 38, scale: 10 }),
        column("text", PrimitiveType::String),
        column("date", PrimitiveType::Date),
        column("time", PrimitiveType::Time),
        timed(TimeUnit::Seconds, column("time_s", PrimitiveType::Time)),
        column("local", PrimitiveType::Timestamp),
        at("zoned", &["nested", "zoned"], PrimitiveType::Timestamptz),
        timed(TimeUnit::Micros, at("zoned_us", &["nested", "deep", "us"], PrimitiveType::Timestamptz)),
        at("nested_text", &["nested", "deep", "é\"\\"], PrimitiveType::String),
        at("uuid", &["nested", "uuid"], PrimitiveType::Uuid),
        column("binary", PrimitiveType::Binary),
    ]
}

fn job(unknown_fields: UnknownFields) -> Decode {
    Decode { unknown_fields, ..job_of(every_type()) }
}

/// A JSON string, with every character as an escape or as few as JSON allows.
fn quoted(text: &str, escapes: bool) -> String {
    if !escapes {
        return serde_json::to_string(text).unwrap();
    }
    let units: Vec<String> = text.encode_utf16().map(|unit| format!("\\u{unit:04x}")).collect();
    format!("\"{}\"", units.concat())
}

/// Values of all kinds, right and wrong for a column, as JSON text.
fn any_value() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => any_scalar(),
        1 => vec(any_scalar(), 0..3).prop_map(|values| format!("[{}]", values.join(" , "))),
        1 => vec((any::<String>(), any_scalar()), 0..3).prop_map(|members| {
            let members: Vec<String> =
                members.iter().map(|(name, value)| format!("{}:{value}", quoted(name, false))).collect();
            format!("{{{}}}", members.join(","))
        }),
    ]
}

fn any_scalar() -> impl Strategy<Value = String> {
    prop_oneof![
        select(vec![
            "null",
            "true",
            "false",
            "0",
            "-0",
            "-0.0",
            "1e400",
            "1.0",
            "1E2",
            "0.1e-2",
            "9223372036854775807",
            "9223372036854775808",
            "-9223372036854775808",
            "9007199254740993",
            "123456789012345678",
            "16777217",
            "12345678",
            "1234567.89",
            "12345678.90",
            "0.005",
            "123456789012345678901234567890.0123456789",
            "5e-324",
            "1e-400",
            "\"2024-02-29\"",
            "\"23:59:59.123456\"",
            "\"2024-02-29T01:02:03.5\"",
            "\"1969-12-31 23:59:59\"",
            "\"2024-02-29T01:02:03+05:30\"",
            "\"2024-02-29T24:00:00Z\"",
            "\"2016-12-31T23:59:60Z\"",
            "\"12.50\"",
            "\"67e55044-10b1-426f-9247-bb680e5fe0c8\"",
            "\"Zm9vYmE=\"",
            "\"Zm9vYmF=\"",
            "\"\"",
            "\"\\u0000\\\"\\/\"",
            "\"\\ud83d\\ude00\"",
        ])
        .prop_map(str::to_owned),
        any::<i64>().prop_map(|number| number.to_string()),
        (any::<i32>(), 0u32..12).prop_map(|(digits, places)| {
            let text = format!("{:013}", i64::from(digits).abs());
            let (whole, fraction) = text.split_at(text.len() - places as usize);
            let whole = whole.trim_start_matches('0');
            let point = if fraction.is_empty() { "" } else { "." };
            let sign = if digits < 0 { "-" } else { "" };
            format!("{sign}{}{point}{fraction}", if whole.is_empty() { "0" } else { whole })
        }),
        any::<f64>()
            .prop_filter("JSON has finite numbers", |number| number.is_finite())
            .prop_map(|number| format!("{number:e}")),
        (any::<String>(), any::<bool>()).prop_map(|(text, escapes)| quoted(&text, escapes)),
        (-62_135_596_800_000i64..253_402_300_800_000).prop_map(|ms| {
            let instant = DateTime::from_timestamp_millis(ms).unwrap();
            quoted(&instant.to_rfc3339(), false)
        }),
    ]
}

/// Values that the column of a member takes.
fn good_values(name: &str) -> &'static [&'static str] {
    match name {
        "boolean" => &["true", "false", "null"],
        "int" => &["0", "-0", "2147483647", "-2147483648", "7", "123456789"],
        "long" => &["9223372036854775807", "-9223372036854775808", "9007199254740993", "12345678", "0"],
        "float" | "double" => &["0.1", "-1.5e3", "1E-7", "16777216", "3", "5e-30", "-0.0"],
        "decimal" => &["1234567.89", "-0.05", "1e2", "\"12.50\"", "0", "12.3400", "9999999"],
        "wide" => &["1234567890123456789012345678.0123456789", "1e27", "-5", "0.0000000001"],
        "text" | "id" => &["\"\\u0000\\\"\\/\"", "\"a\"", "\"\\ud83d\\ude00 é\"", "\"[{,:}]\""],
        "é\"\\" | "unknown" => &["\"nested\"", "null"],
        "date" => &["\"2024-02-29\"", "\"0001-01-01\"", "\"9999-12-31\""],
        "time" => &["\"23:59:59.123456\"", "\"00:00:00\""],
        "time_s" => &["86399.999999", "0", "1.5", "\"01:02:03\""],
        "local" => &["\"2024-02-29T01:02:03.5\"", "\"1969-12-31 23:59:59\""],
        "zoned" => &["\"2024-02-29T01:02:03+05:30\"", "\"1969-12-31T23:59:59.000001Z\""],
        "us" => &["1700000000123456", "-1", "1e6", "\"2024-02-29T01:02:03Z\""],
        "uuid" => &["\"67e55044-10b1-426f-9247-bb680e5fe0c8\"", "\"67E55044-10B1-426F-9247-BB680E5FE0C8\""],
        "binary" => &["\"Zm9vYmE=\"", "\"\"", "\"Zg==\""],
        "ts" => &["1700000000123", "0", "-1.5", "\"2024-02-29T01:02:03Z\""],
        _ => &["{\"a\":[1,{}]}", "[]"],
    }
}

/// A member of one of these names; most have a value that their column takes, one in sixteen has an escaped name.
fn any_member(names: &'static [&'static str]) -> impl Strategy<Value = (&'static str, String, bool)> {
    let parts = (select(names), any_value(), any::<Index>(), proptest::bool::weighted(0.95));
    (parts, proptest::bool::weighted(0.06)).prop_map(|((name, any, good, is_good), escaped)| {
        let value = if is_good { (*good.get(good_values(name))).to_owned() } else { any };
        (name, value, escaped)
    })
}

/// An event: members of the job and others in any order, white space, escapes, sometimes a member twice.
fn any_event() -> impl Strategy<Value = String> {
    const NAMES: [&str; 18] = [
        "id",
        "ts",
        "boolean",
        "int",
        "long",
        "float",
        "double",
        "decimal",
        "wide",
        "text",
        "date",
        "time",
        "time_s",
        "local",
        "binary",
        "unknown",
        "a longer name that no column reads",
        "é",
    ];
    (
        vec(any_member(&NAMES), 0..14),
        proptest::option::of(vec(any_member(&["zoned", "uuid", "other"]), 0..3)),
        proptest::option::of(vec(any_member(&["us", "é\"\\", "x"]), 0..3)),
        proptest::bool::weighted(0.9),
        select(vec!["", "", "", " ", "\n  ", "\t\r\n"]),
        any::<Index>(),
    )
        .prop_map(|(mut members, nested, deep, once, space, place)| {
            if once {
                keep_first(&mut members);
                members.retain(|(name, ..)| !matches!(*name, "id" | "ts"));
                members.push(("id", "\"an id\"".to_owned(), false));
                members.push(("ts", "1700000000123".to_owned(), false));
            }
            let mut texts: Vec<String> = members.iter().map(|member| member_text(member, space)).collect();
            if let Some(mut nested) = nested {
                keep_first(&mut nested);
                let mut inner: Vec<String> = nested.iter().map(|member| member_text(member, space)).collect();
                if let Some(mut deep) = deep {
                    keep_first(&mut deep);
                    let deep: Vec<String> = deep.iter().map(|member| member_text(member, space)).collect();
                    inner.push(format!("\"deep\":{{{space}{}}}", deep.join(",")));
                }
                let nested = format!("\"nested\"{space}:{{{}}}", inner.join(","));
                texts.insert(place.index(texts.len() + 1), nested);
            }
            format!("{{{space}{}{space}}}", texts.join(&format!("{space},{space}")))
        })
}

/// Leaves the first member of each name.
fn keep_first(members: &mut Vec<(&str, String, bool)>) {
    let mut seen = HashSet::new();
    members.retain(|(name, ..)| seen.insert(*name));
}

fn member_text((name, value, escaped): &(&str, String, bool), space: &str) -> String {
    format!("{}{space}:{space}{value}", quoted(name, *escaped))
}

/// A value as text that is the same for equal values and no others.
type Plain = Option<String>;

/// What the model reads from one JSON value for a column; `Err` = the value is refused.
fn model_value(raw: &str, column: &Column) -> Result<Plain, ()> {
    let value: serde_json::Value = match raw.as_bytes()[0] {
        b'"' | b't' | b'f' | b'n' => serde_json::from_str(raw).map_err(|_| ())?,
        _ => serde_json::Value::from(0),
    };
    if value.is_null() {
        return Ok(None);
    }
    let is_number = matches!(raw.as_bytes()[0], b'-' | b'0'..=b'9');
    let is_integer = is_number && raw.bytes().all(|byte| byte == b'-' || byte.is_ascii_digit());
    let plain = match (&column.column_type, value.as_str(), column.unit) {
        (PrimitiveType::Boolean, ..) => value.as_bool().map(|value| value.to_string()),
        (PrimitiveType::Int, ..) if is_integer => raw.parse::<i32>().ok().map(|value| value.to_string()),
        (PrimitiveType::Long, ..) if is_integer => raw.parse::<i64>().ok().map(|value| value.to_string()),
        (PrimitiveType::Float, ..) if is_number => {
            let value: f32 = raw.parse().unwrap();
            model_float(raw, f64::from(value)).map(|()| format!("{:08x}", value.to_bits()))
        }
        (PrimitiveType::Double, ..) if is_number => {
            let value: f64 = raw.parse().unwrap();
            model_float(raw, value).map(|()| format!("{:016x}", value.to_bits()))
        }
        (PrimitiveType::Decimal { precision, scale }, text, _) => {
            let text = if is_number { raw } else { text.filter(|text| is_json_number(text)).ok_or(())? };
            model_decimal(text, *precision, *scale).map(|value| value.to_string())
        }
        (PrimitiveType::String, Some(text), _) => Some(text.to_owned()),
        (PrimitiveType::Uuid, Some(text), _) if text.len() == 36 => {
            uuid::Uuid::try_parse(text).ok().map(|uuid| uuid.to_string())
        }
        (PrimitiveType::Binary, Some(text), _) => model_base64(text).map(|bytes| format!("{bytes:?}")),
        (PrimitiveType::Date, Some(text), _) => model_date(text).map(|days| days.to_string()),
        (PrimitiveType::Time, Some(text), _) => {
            let time =
                (text.len() >= 8).then(|| NaiveTime::parse_from_str(text, "%H:%M:%S%.f").ok()).flatten();
            time.map(|time| {
                let micros = i64::from(time.num_seconds_from_midnight()) * 1_000_000;
                (micros + i64::from(time.nanosecond()) / 1_000).to_string()
            })
        }
        (PrimitiveType::Timestamp, Some(text), _) => {
            let text = text.replacen('T', " ", 1);
            let local = NaiveDateTime::parse_from_str(&text, "%Y-%m-%d %H:%M:%S%.f").ok();
            local.map(|local| local.and_utc().timestamp_micros().to_string())
        }
        (PrimitiveType::Timestamptz, Some(text), _) => model_instant(text).map(|micros| micros.to_string()),
        (PrimitiveType::Time, None, Some(unit)) if is_number => {
            let micros = model_decimal(raw, 38, places(unit));
            micros.filter(|micros| (0..86_400_000_000).contains(micros)).map(|micros| micros.to_string())
        }
        (PrimitiveType::Timestamptz, None, Some(unit)) if is_number => {
            let micros = model_decimal(raw, 38, places(unit));
            let years = i128::from(time::MICROS_MIN)..=i128::from(time::MICROS_MAX);
            micros.filter(|micros| years.contains(micros)).map(|micros| micros.to_string())
        }
        _ => None,
    };
    plain.map(Some).ok_or(())
}

fn places(unit: TimeUnit) -> u32 {
    match unit {
        TimeUnit::Seconds => 6,
        TimeUnit::Millis => 3,
        TimeUnit::Micros => 0,
    }
}

fn is_json_number(text: &str) -> bool {
    matches!(text.as_bytes().first(), Some(b'-' | b'0'..=b'9'))
        && text.trim_end() == text
        && serde_json::from_str::<&RawValue>(text).is_ok()
}

/// Finite, not a zero made of something else, and an integer only if it is exactly this value.
fn model_float(raw: &str, value: f64) -> Option<()> {
    let mantissa = raw.split(['e', 'E']).next().unwrap();
    let is_zero = mantissa.bytes().all(|byte| matches!(byte, b'-' | b'0' | b'.'));
    let is_integer = raw.bytes().all(|byte| byte == b'-' || byte.is_ascii_digit());
    let exact = !is_integer
        || raw.parse::<i128>().is_ok_and(|whole| format!("{value:.0}") == whole.to_string() || whole == 0);
    (value.is_finite() && (value != 0.0 || is_zero) && exact).then_some(())
}

/// Digits are moved as text: the point to its place, zeros where none stood.
fn model_decimal(raw: &str, precision: u32, scale: u32) -> Option<i128> {
    let (mantissa, exponent) = raw.split_once(['e', 'E']).unwrap_or((raw, "0"));
    let exponent: i64 = exponent.parse().ok()?;
    let (sign, mantissa) = mantissa.strip_prefix('-').map_or(("", mantissa), |rest| ("-", rest));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{whole}{fraction}");
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        return Some(0);
    }
    let shift = exponent + i64::from(scale) - fraction.len() as i64;
    let unscaled = if shift >= 0 {
        if shift > 40 {
            return None;
        }
        format!("{digits}{}", "0".repeat(shift as usize))
    } else {
        let zeros = digits.len() - digits.trim_end_matches('0').len();
        if (zeros as i64) < -shift {
            return None;
        }
        digits[..digits.len() - (-shift) as usize].to_owned()
    };
    if unscaled.len() > precision as usize {
        return None;
    }
    format!("{sign}{unscaled}").parse().ok()
}

/// Bytes whose one base64 text this is.
fn model_base64(text: &str) -> Option<Vec<u8>> {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits = text.trim_end_matches('=');
    let padding = text.len() - digits.len();
    if !text.len().is_multiple_of(4) || padding > 2 {
        return None;
    }
    let mut bits = String::new();
    for digit in digits.bytes() {
        bits.push_str(&format!("{:06b}", DIGITS.iter().position(|known| *known == digit)?));
    }
    let bytes = bits.len() / 8;
    if bits[bytes * 8..].contains('1') || !(bytes + padding).is_multiple_of(3) {
        return None;
    }
    Some((0..bytes).map(|byte| u8::from_str_radix(&bits[byte * 8..byte * 8 + 8], 2).unwrap()).collect())
}

fn model_date(text: &str) -> Option<i64> {
    let date = (text.len() == 10).then(|| NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()).flatten()?;
    let epoch = NaiveDate::from_ymd_opt(1970, 1, 1).unwrap();
    Some((date - epoch).num_days())
}

fn model_instant(text: &str) -> Option<i64> {
    let micros = DateTime::parse_from_rfc3339(text).ok()?.timestamp_micros();
    // chrono takes second 60 as a leap second
    let leap = text.get(17..19) == Some("60");
    (!leap && (time::MICROS_MIN..=time::MICROS_MAX).contains(&micros)).then_some(micros)
}

/// The members of a JSON object as raw text, in their order.
struct Members<'a>(Vec<(String, &'a RawValue)>);

impl<'de> serde::Deserialize<'de> for Members<'de> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> serde::de::Visitor<'de> for InOrder {
            type Value = Members<'de>;
            fn expecting(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                out.write_str("an object")
            }
            fn visit_map<M: serde::de::MapAccess<'de>>(self, mut map: M) -> Result<Members<'de>, M::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry::<String, &'de RawValue>()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// The values that the model reads from an object, by column; `Err` = the row is refused.
fn model_row(text: &str, job: &Decode) -> Result<BTreeMap<String, Plain>, ()> {
    let mut row = BTreeMap::new();
    for column in &job.columns {
        let ColumnSource::Value(path) = &column.from else { unreachable!("all columns read the payload") };
        let raw = model_member(text, path)?;
        row.insert(column.name.clone(), raw.map_or(Ok(None), |raw| model_value(raw, column))?);
    }
    let key_is_there = row["id"].as_ref().is_some_and(|id| !id.is_empty());
    if key_is_there && row["ts"].is_some() { Ok(row) } else { Err(()) }
}

/// The raw text of the member at the end of a path; repeats of a wanted member and what is no object on the way refuse.
fn model_member<'a>(text: &'a str, path: &[String]) -> Result<Option<&'a str>, ()> {
    let Members(members) = serde_json::from_str(text).map_err(|_| ())?;
    let mut found = members.iter().filter(|(name, _)| *name == path[0]);
    let (Some((_, raw)), None) = (found.next(), found.next()) else {
        return if members.iter().any(|(name, _)| *name == path[0]) { Err(()) } else { Ok(None) };
    };
    match (&path[1..], raw.get()) {
        ([], raw) => Ok(Some(raw)),
        (_, "null") => Ok(None),
        (rest, raw) => model_member(raw, rest),
    }
}

/// A cell as the model writes it.
fn cell(array: &ArrayRef, row: usize) -> Plain {
    if array.is_null(row) {
        return None;
    }
    Some(match array.data_type() {
        DataType::Boolean => array.as_boolean().value(row).to_string(),
        DataType::Int32 => array.as_primitive::<Int32Type>().value(row).to_string(),
        DataType::Int64 => array.as_primitive::<Int64Type>().value(row).to_string(),
        DataType::Float32 => format!("{:08x}", array.as_primitive::<Float32Type>().value(row).to_bits()),
        DataType::Float64 => format!("{:016x}", array.as_primitive::<Float64Type>().value(row).to_bits()),
        DataType::Decimal128(..) => array.as_primitive::<Decimal128Type>().value(row).to_string(),
        DataType::Date32 => array.as_primitive::<Date32Type>().value(row).to_string(),
        DataType::Time64(_) => array.as_primitive::<Time64MicrosecondType>().value(row).to_string(),
        DataType::Timestamp(..) => array.as_primitive::<TimestampMicrosecondType>().value(row).to_string(),
        DataType::Utf8 => array.as_string::<i32>().value(row).to_owned(),
        DataType::FixedSizeBinary(_) => {
            uuid::Uuid::from_slice(array.as_fixed_size_binary().value(row)).unwrap().to_string()
        }
        DataType::LargeBinary => format!("{:?}", array.as_binary::<i64>().value(row)),
        other => unreachable!("no column has type {other}"),
    })
}

fn cells(decoded: &Decoded, row: usize) -> BTreeMap<String, Plain> {
    let schema = decoded.rows.schema();
    let named = schema.fields().iter().zip(decoded.rows.columns());
    named.map(|(field, array)| (field.name().clone(), cell(array, row))).collect()
}

/// What the walk alone makes of an object, and what the fast read does.
fn both_reads(job: &Decode, text: &str) -> (Result<Vec<Plain>, Fault>, Option<Vec<Plain>>) {
    let plan = Plan::new(job, &["id".to_owned()], "ts").unwrap();
    let mut tree = Tree::new(&plan.columns).unwrap();
    let mut fast = None;
    // the second time the tree knows the order of the members
    for row in 1..=2 {
        let (mut slots, mut scratch) = (vec![Value::Null; plan.columns.len()], Scratch::default());
        let mut unknown = String::new();
        let reader = FastRow {
            nodes: &mut tree.nodes,
            columns: &plan.columns,
            slots: &mut slots,
            scratch: &mut scratch,
            unknown_fields: job.unknown_fields,
            unknown: &mut unknown,
            row,
            scan: Scan::new(text),
        };
        let taken = reader.read().map(|()| plain_slots(&slots, &scratch, &unknown));
        assert!(row == 1 || taken == fast, "order does not matter: {taken:?} {fast:?}");
        fast = taken;
    }
    let (mut slots, mut scratch) = (vec![Value::Null; plan.columns.len()], Scratch::default());
    let mut unknown = String::new();
    let fields = job.unknown_fields;
    let verdict = Walk::new(&mut tree, &plan.columns, &mut slots, &mut scratch, fields, &mut unknown, 3)
        .object(text)
        .map(|()| plain_slots(&slots, &scratch, &unknown));
    (verdict, fast)
}

fn plain_slots(slots: &[Value<'_>], scratch: &Scratch, unknown: &str) -> Vec<Plain> {
    let mut plain: Vec<Plain> = slots
        .iter()
        .map(|value| match value {
            Value::Null => None,
            Value::Text(text) => Some(scratch.text(text).to_owned()),
            Value::Bytes(bytes) => Some(format!("{:?}", scratch.bytes(bytes))),
            Value::Double(double) => Some(format!("{:x}", double.to_bits())),
            Value::Float(float) => Some(format!("{:x}", float.to_bits())),
            other => Some(format!("{other:?}")),
        })
        .collect();
    plain.push(Some(unknown.to_owned()));
    plain
}

const POLICIES: [UnknownFields; 3] = [UnknownFields::Ignore, UnknownFields::Keep, UnknownFields::DeadLetter];

#[test]
fn a_good_event_is_read_fast_whatever_its_order_and_white_space() {
    for text in [
        r#"{"id":"a","ts":1700000000123,"nested":{"zoned":"2024-02-29T01:02:03Z","x":[{"y":null}]},"text":"\u00e9\ud83d\ude00"}"#,
        "{ \"ts\" : 17 ,\n\"unknown\" : { \"a\" : [ ] , \"b\" : { } , \"c\" : [ 1 , -2.5e+3 ] } , \"id\":\"a\", \"nested\":{} }",
        r#"{"nested":null,"decimal":"1.50","double":1e300,"ts":1,"id":"a","boolean":false}"#,
    ] {
        let (walked, fast) = both_reads(&job(UnknownFields::Keep), text);
        assert_eq!(fast, Some(walked.unwrap()), "{text}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    /// Goal: the decoder makes of an event what a plain reading with serde_json, chrono and text arithmetic makes of it.
    /// Method: members of the job and others with right and wrong values in any form; what the model refuses must be a
    /// letter and nothing else.
    #[test]
    fn the_decoder_agrees_with_a_plain_model(events in vec(any_event(), 1..4), array: bool) {
        let job = job(UnknownFields::Ignore);
        let payloads = if array { vec![format!("[{}]", events.join(" ,"))] } else { events.clone() };
        let bytes: Vec<&[u8]> = payloads.iter().map(|payload| payload.as_bytes()).collect();
        let decoded = decoder_of(&job).decode(&chunk_of(&bytes), &assignment()).unwrap();
        let expected: Vec<_> = events.iter().map(|event| model_row(event, &job)).collect();
        let good: Vec<_> = expected.iter().flatten().collect();
        prop_assert_eq!(decoded.consumed, events.len() as u64);
        prop_assert_eq!(decoded.rows.num_rows(), good.len(), "{:?}", decoded.letters);
        for (row, expected) in good.into_iter().enumerate() {
            prop_assert_eq!(&cells(&decoded, row), expected);
        }
    }

    /// Goal: what the fast read takes, the walk takes with the same values, whatever the job's policy.
    #[test]
    fn the_fast_read_takes_nothing_that_the_walk_refuses(event in any_event(), policy in 0usize..3) {
        let (walked, fast) = both_reads(&job(POLICIES[policy]), &event);
        if let Some(fast) = fast {
            prop_assert_eq!(walked, Ok(fast));
        }
    }

    /// Goal: the same where the text is nearly JSON. Method: some bytes of an event are replaced, taken out or doubled.
    #[test]
    fn the_fast_read_takes_no_text_that_is_nearly_json(
        event in any_event(),
        changes in vec((any::<Index>(), select(b"\"\\{}[]:,0129.eE+-tfnu \n\x1f\x7fa".to_vec()), 0u8..3), 1..4),
        policy in 0usize..3,
    ) {
        let mut bytes = event.into_bytes();
        for (index, byte, change) in changes {
            if bytes.is_empty() {
                break;
            }
            let position = index.index(bytes.len());
            match change {
                0 => bytes[position] = byte,
                1 => { bytes.remove(position); }
                _ => bytes.insert(position, byte),
            }
        }
        let Ok(text) = String::from_utf8(bytes) else { return Ok(()) };
        let (walked, fast) = both_reads(&job(POLICIES[policy]), &text);
        if let Some(fast) = fast {
            prop_assert_eq!(walked, Ok(fast));
        }
    }

    /// Goal: an array is split fast as serde_json splits it, and refused where it does.
    #[test]
    fn arrays_are_split_as_serde_json_splits_them(
        values in vec(any_value(), 0..5),
        change in proptest::option::of((any::<Index>(), select(b"\"\\{}[]:,0 \x1f".to_vec()))),
    ) {
        let mut bytes = format!("[ {}]", values.join(" ,\n")).into_bytes();
        if let Some((index, byte)) = change {
            let position = index.index(bytes.len());
            bytes[position] = byte;
        }
        let Ok(text) = String::from_utf8(bytes) else { return Ok(()) };
        let (mut fast, mut walked) = (Vec::new(), Vec::new());
        let expected = walk::split(&text, &mut walked, 3);
        match split(&text, &mut fast, 3) {
            Some(count) => prop_assert_eq!((Ok(count), fast), (expected, walked)),
            None => prop_assert!(change.is_some(), "{}", text),
        }
    }

    /// Goal: a good event without escapes in names is always read fast, else the fast read would be no use.
    #[test]
    fn events_of_one_shape_are_read_fast(id in "[a-z\\\\\"é]{1,40}", n: i64, micros in -62_135_596_800_000_000i64..=253_402_300_799_999_999, extra in any_value(), pretty: bool) {
        let members = [
            format!("\"id\":{}", quoted(&id, false)),
            format!("\"long\":{n}"),
            format!("\"unknown\": {extra}"),
            format!("\"ts\":{}", micros.div_euclid(1_000)),
            format!("\"nested\":{{\"deep\":{{\"us\":{micros}}}}}"),
        ];
        let text = format!("{{{}}}", members.join(if pretty { ",\n  " } else { "," }));
        let (walked, fast) = both_reads(&job(UnknownFields::Keep), &text);
        prop_assert_eq!(fast, walked.ok(), "{}", text);
    }
}

#[test]
fn kept_members_are_the_same_on_both_ways() {
    let keep = job(UnknownFields::Keep);
    let text = r#"{"id":"a","unknown": [1, 2] ,"ts":1,"é":"\u00e9"}"#;
    let decoded =
        decoder_of(&keep).decode(&chunk_of(&[text.as_bytes(), text.as_bytes()]), &assignment()).unwrap();
    for row in 0..2 {
        assert_eq!(
            cells(&decoded, row)[UNKNOWN_FIELDS_COLUMN].as_deref(),
            Some(r#"{"unknown":[1, 2],"é":"\u00e9"}"#)
        );
    }
}
