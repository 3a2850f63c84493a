//! The rules of the module head, one sentence each.

use std::time::Instant;

use arrow::array::{Array, AsArray};
use arrow::datatypes::{
    Date32Type, Decimal128Type, Float32Type, Float64Type, Int32Type, Int64Type, Time64MicrosecondType,
    TimestampMicrosecondType,
};
use iceberg::spec::{PrimitiveType, Type};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::job::{Column, Decode, TimeUnit, UNKNOWN_FIELDS_COLUMN};
use crate::letter::ReasonCode::*;
use crate::record::RecordParts;

pub(super) fn column(name: &str, column_type: PrimitiveType) -> Column {
    let from = ColumnSource::Value(vec![name.to_owned()]);
    Column { name: name.to_owned(), column_type, from, unit: None, required: false }
}

pub(super) fn at(name: &str, path: &[&str], column_type: PrimitiveType) -> Column {
    let from = ColumnSource::Value(path.iter().map(|member| (*member).to_owned()).collect());
    Column { from, ..column(name, column_type) }
}

fn from(name: &str, from: ColumnSource, column_type: PrimitiveType) -> Column {
    Column { from, ..column(name, column_type) }
}

/// `id` is the key, `ts` (ms) the event time; then the columns given.
pub(super) fn job_of(columns: Vec<Column>) -> Decode {
    let id = column("id", PrimitiveType::String);
    let ts = Column { unit: Some(TimeUnit::Millis), ..column("ts", PrimitiveType::Timestamptz) };
    let columns = [id, ts].into_iter().chain(columns).collect();
    Decode { unknown_fields: UnknownFields::Ignore, arrays: Arrays::Split, columns }
}

pub(super) fn decoder_of(job: &Decode) -> Decoder {
    Decoder::new(job, &["id".to_owned()], "ts", 1 << 20).unwrap()
}

fn setup_error(job: &Decode) -> DecodeSetupError {
    Decoder::new(job, &["id".to_owned()], "ts", 1 << 20).unwrap_err()
}

pub(super) fn assignment() -> Vec<TopicPartition> {
    vec![TopicPartition::new("clicked", 0), TopicPartition::new("sent", 3)]
}

pub(super) fn chunk_of(payloads: &[&[u8]]) -> RecordChunk {
    let mut chunk = RecordChunk::default();
    for (offset, payload) in (0..).zip(payloads) {
        let parts =
            RecordParts { slot: 1, offset, timestamp_ms: Some(5), key: Some(b"k"), payload: Some(payload) };
        chunk.push(parts);
    }
    chunk
}

fn decode(job: &Decode, payload: &str) -> Decoded {
    decoder_of(job).decode(&chunk_of(&[payload.as_bytes()]), &assignment()).unwrap()
}

/// The only row of one payload.
fn row(job: &Decode, payload: &str) -> Decoded {
    let decoded = decode(job, payload);
    assert_eq!(decoded.letters, []);
    assert_eq!(decoded.rows.num_rows(), 1);
    decoded
}

/// The only letter of one payload, which makes no row.
fn refused_bytes(job: &Decode, payload: &[u8]) -> DeadLetter {
    let mut decoded = decoder_of(job).decode(&chunk_of(&[payload]), &assignment()).unwrap();
    assert_eq!((decoded.rows.num_rows(), decoded.letters.len(), decoded.consumed), (0, 1, 1));
    decoded.letters.pop().unwrap()
}

fn refused(job: &Decode, payload: &str) -> DeadLetter {
    refused_bytes(job, payload.as_bytes())
}

fn text_of(decoded: &Decoded, name: &str) -> Option<String> {
    let texts = decoded.rows.column_by_name(name).unwrap().as_string::<i32>();
    texts.is_valid(0).then(|| texts.value(0).to_owned())
}

const GOOD: &str = r#"{"id":"a","ts":1700000000123}"#;

#[test]
fn every_type_arrives_in_its_arrow_column() {
    let job = job_of(vec![
        column("boolean", PrimitiveType::Boolean),
        column("int", PrimitiveType::Int),
        column("long", PrimitiveType::Long),
        column("float", PrimitiveType::Float),
        column("double", PrimitiveType::Double),
        column("decimal", PrimitiveType::Decimal { precision: 20, scale: 3 }),
        column("date", PrimitiveType::Date),
        column("time", PrimitiveType::Time),
        column("timestamp", PrimitiveType::Timestamp),
        column("uuid", PrimitiveType::Uuid),
        column("fixed", PrimitiveType::Fixed(3)),
        column("binary", PrimitiveType::Binary),
    ]);
    let decoded = row(
        &job,
        r#" {"id":"a","ts":1700000000123,"boolean":true,"int":-7,"long":9007199254740993,"float":0.5,"double":1.5e300,
            "decimal":12345678901234567.891,"date":"1970-01-03","time":"00:00:01","timestamp":"1970-01-01T00:00:01.5",
            "uuid":"67e55044-10b1-426f-9247-bb680e5fe0c8","fixed":"Zm9v","binary":"Zm9vYmFy"} "#,
    );
    let rows = &decoded.rows;
    let column = |name: &str| rows.column_by_name(name).unwrap();
    assert!(column("boolean").as_boolean().value(0));
    assert_eq!(column("int").as_primitive::<Int32Type>().value(0), -7);
    assert_eq!(column("long").as_primitive::<Int64Type>().value(0), 9_007_199_254_740_993);
    assert_eq!(column("float").as_primitive::<Float32Type>().value(0), 0.5);
    assert_eq!(column("double").as_primitive::<Float64Type>().value(0), 1.5e300);
    assert_eq!(column("decimal").as_primitive::<Decimal128Type>().value(0), 12_345_678_901_234_567_891);
    assert_eq!(column("date").as_primitive::<Date32Type>().value(0), 2);
    assert_eq!(column("time").as_primitive::<Time64MicrosecondType>().value(0), 1_000_000);
    assert_eq!(column("timestamp").as_primitive::<TimestampMicrosecondType>().value(0), 1_500_000);
    assert_eq!(column("ts").as_primitive::<TimestampMicrosecondType>().value(0), 1_700_000_000_123_000);
    assert_eq!(
        column("uuid").as_fixed_size_binary().value(0),
        uuid::uuid!("67e55044-10b1-426f-9247-bb680e5fe0c8").as_bytes()
    );
    assert_eq!(column("fixed").as_fixed_size_binary().value(0), b"foo");
    assert_eq!(column("binary").as_binary::<i64>().value(0), b"foobar");
    assert_eq!(decoded.event_times, [EventTimeMs(1_700_000_000_123)]);
    assert_eq!(decoded.places, [Place { slot: 1, offset: 0, row_index: 0 }]);
    assert_eq!(decoded.timestamps_ms, [Some(5)]);
}

#[test]
fn the_schema_has_the_types_that_iceberg_gives_the_columns() {
    let types = [
        PrimitiveType::Boolean,
        PrimitiveType::Int,
        PrimitiveType::Long,
        PrimitiveType::Float,
        PrimitiveType::Double,
        PrimitiveType::Decimal { precision: 38, scale: 38 },
        PrimitiveType::Date,
        PrimitiveType::Time,
        PrimitiveType::Timestamp,
        PrimitiveType::Timestamptz,
        PrimitiveType::String,
        PrimitiveType::Uuid,
        PrimitiveType::Fixed(4096),
        PrimitiveType::Binary,
    ];
    let columns = types.iter().enumerate().map(|(n, kind)| column(&format!("c{n}"), kind.clone())).collect();
    let decoder = decoder_of(&Decode { unknown_fields: UnknownFields::Keep, ..job_of(columns) });
    let schema = decoder.schema();
    for (n, kind) in types.into_iter().enumerate() {
        let expected = iceberg::arrow::type_to_arrow_type(&Type::Primitive(kind)).unwrap();
        assert_eq!(schema.field_with_name(&format!("c{n}")).unwrap().data_type(), &expected);
    }
    assert_eq!(schema.fields().last().unwrap().name(), UNKNOWN_FIELDS_COLUMN);
}

#[test]
fn every_type_has_a_null() {
    let types = [
        PrimitiveType::Boolean,
        PrimitiveType::Int,
        PrimitiveType::Long,
        PrimitiveType::Float,
        PrimitiveType::Double,
        PrimitiveType::Decimal { precision: 38, scale: 0 },
        PrimitiveType::Date,
        PrimitiveType::Time,
        PrimitiveType::Timestamp,
        PrimitiveType::Timestamptz,
        PrimitiveType::String,
        PrimitiveType::Uuid,
        PrimitiveType::Fixed(7),
        PrimitiveType::Binary,
    ];
    let columns = types.iter().enumerate().map(|(n, kind)| column(&format!("c{n}"), kind.clone())).collect();
    let decoded = row(&job_of(columns), GOOD);
    assert!(decoded.rows.columns().iter().skip(2).all(|column| column.is_null(0)));
}

#[test]
fn a_required_column_is_not_nullable_in_the_schema() {
    let job = job_of(vec![Column { required: true, ..column("kind", PrimitiveType::Int) }]);
    let schema = decoder_of(&job).schema();
    assert!(!schema.field_with_name("kind").unwrap().is_nullable());
    assert!(schema.field_with_name("id").unwrap().is_nullable());
}

#[test]
fn nested_paths_are_read_and_several_columns_may_read_one_member() {
    let job = job_of(vec![
        at("provider", &["delivery", "route", "provider"], PrimitiveType::String),
        at("attempt", &["delivery", "attempt"], PrimitiveType::Int),
        at("attempt_long", &["delivery", "attempt"], PrimitiveType::Long),
        at("ts_raw", &["ts"], PrimitiveType::Long),
    ]);
    let decoded = row(
        &job,
        r#"{"x":{"delivery":1},"delivery":{"other":[{"attempt":9}],"attempt":3,"route":{"provider":"p"}},"ts":7,"id":"a"}"#,
    );
    assert_eq!(text_of(&decoded, "provider").as_deref(), Some("p"));
    assert_eq!(decoded.rows.column_by_name("attempt").unwrap().as_primitive::<Int32Type>().value(0), 3);
    assert_eq!(decoded.rows.column_by_name("attempt_long").unwrap().as_primitive::<Int64Type>().value(0), 3);
    assert_eq!(decoded.rows.column_by_name("ts_raw").unwrap().as_primitive::<Int64Type>().value(0), 7);
}

#[test]
fn a_null_or_a_missing_member_anywhere_on_the_way_is_null() {
    let job = job_of(vec![at("provider", &["delivery", "route", "provider"], PrimitiveType::String)]);
    for delivery in [
        "",
        r#","delivery":null"#,
        r#","delivery":{}"#,
        r#","delivery":{"route":null}"#,
        r#","delivery":{"route":{"provider":null}}"#,
    ] {
        let decoded = row(&job, &format!(r#"{{"id":"a","ts":1{delivery}}}"#));
        assert_eq!(text_of(&decoded, "provider"), None, "{delivery}");
    }
}

#[test]
fn anything_but_an_object_on_the_way_is_the_wrong_type() {
    let job = job_of(vec![at("provider", &["delivery", "provider"], PrimitiveType::String)]);
    for value in
        ["1", "-1", "1.5", "true", "\"x\"", "\"\\n\"", "[]", "[{\"provider\":\"p\"}]", "1e400", "-1e400"]
    {
        let letter = refused(&job, &format!(r#"{{"id":"a","delivery":{value},"ts":1}}"#));
        assert_eq!(letter.code, WrongType, "{value}: {}", letter.text);
        assert!(letter.text.starts_with("$.delivery: expected an object, found a"), "{}", letter.text);
    }
}

#[test]
fn a_refused_value_names_column_path_expectation_and_finding() {
    let job = job_of(vec![at("provider", &["delivery", "provider"], PrimitiveType::String)]);
    let letter = refused(&job, r#"{"id":"a","delivery":{"provider":12.50},"ts":1}"#);
    assert_eq!(letter.code, WrongType);
    assert_eq!(letter.text, "column provider ($.delivery.provider): expected a string; found number 12.50");
    assert_eq!(letter.place, Place { slot: 1, offset: 0, row_index: 0 });
    assert_eq!((letter.timestamp_ms, letter.key.as_deref()), (Some(5), Some(b"k".as_slice())));
    let letter =
        refused(&job_of(vec![column("n", PrimitiveType::Int)]), r#"{"id":"a","ts":1,"n":3000000000}"#);
    assert_eq!(
        (letter.code, letter.text.as_str()),
        (OutOfRange, "column n ($.n): an int has 32 bits; found number 3000000000")
    );
}

#[test]
fn a_text_is_short_and_escaped_whatever_the_payload_says() {
    let job = job_of(vec![column("n", PrimitiveType::Int)]);
    let letter = refused(
        &job,
        &format!(
            r#"{{"id":"a","ts":1,"n":"{}"}}"#,
            "secret\u{1b}\u{85}".replace('\u{1b}', "\u{7f}").repeat(5_000)
        ),
    );
    assert_eq!(letter.code, WrongType);
    assert!(letter.text.chars().count() <= 300, "{}", letter.text);
    assert!(!letter.text.chars().any(char::is_control), "{}", letter.text);
    let strict = Decode { unknown_fields: UnknownFields::DeadLetter, ..job_of(vec![]) };
    let letter = refused(&strict, &format!(r#"{{"{}":1}}"#, "\\u0000".repeat(10_000)));
    assert_eq!(letter.code, UnknownField);
    assert!(letter.text.chars().count() <= 300 && !letter.text.contains('\0'), "{}", letter.text);
}

#[test]
fn a_record_without_payload_is_a_tombstone() {
    let mut chunk = RecordChunk::default();
    chunk.push(RecordParts { slot: 0, offset: 8, timestamp_ms: None, key: None, payload: None });
    let decoded = decoder_of(&job_of(vec![])).decode(&chunk, &assignment()).unwrap();
    let letter = &decoded.letters[0];
    assert_eq!((letter.code, &letter.payload, letter.payload_bytes), (Tombstone, &None, 0));
    assert_eq!((letter.place.offset, letter.timestamp_ms, &letter.key), (8, None, &None));
}

#[test]
fn no_bytes_and_white_space_are_an_empty_payload() {
    for payload in ["", " ", "\r\n\t "] {
        let letter = refused(&job_of(vec![]), payload);
        assert_eq!((letter.code, letter.payload.as_deref()), (EmptyPayload, Some(payload.as_bytes())));
    }
}

#[test]
fn a_record_over_the_bound_keeps_only_its_length() {
    let mut decoder = Decoder::new(&job_of(vec![]), &["id".to_owned()], "ts", GOOD.len() as u64).unwrap();
    let longer = format!("{GOOD} ");
    let decoded = decoder.decode(&chunk_of(&[GOOD.as_bytes(), longer.as_bytes()]), &assignment()).unwrap();
    assert_eq!(decoded.rows.num_rows(), 1);
    let letter = &decoded.letters[0];
    assert_eq!((letter.code, &letter.payload), (RecordTooLarge, &None));
    assert_eq!(letter.payload_bytes, longer.len() as i64);
}

#[test]
fn bytes_that_are_not_utf8_are_refused_wherever_they_stand() {
    let letter = refused_bytes(&job_of(vec![]), b"{\"id\":\"a\",\"ts\":1,\"skipped\":\"\xff\"}");
    assert_eq!((letter.code, letter.text.as_str()), (InvalidUtf8, "the payload is not UTF-8 at byte 28"));
}

#[test]
fn a_payload_cut_anywhere_is_truncated() {
    let job = job_of(vec![at("provider", &["delivery", "provider"], PrimitiveType::String)]);
    let whole =
        r#"{"id":"a\n\ud83d\ude00","skipped":{"a":[true,1.5e-3]},"delivery":{"provider":"p"},"ts":-17.0e1}"#;
    for end in 1..whole.len() {
        let letter = refused(&job, &whole[..end]);
        assert_eq!(letter.code, TruncatedJson, "{}: {}", &whole[..end], letter.text);
    }
}

#[test]
fn what_is_not_json_is_invalid_even_after_a_value_that_is_the_wrong_type() {
    let job = job_of(vec![column("n", PrimitiveType::Int)]);
    for payload in [
        r#"{"id":"a","ts":NaN}"#,
        r#"{"id":"a","ts":Infinity}"#,
        r#"{"id":"a","ts":-Infinity}"#,
        r#"{"id":"a","ts":1} x"#,
        r#"{"id":"a","ts":1}{"id":"a","ts":1}"#,
        r#"{"id":"a","ts":1,}"#,
        r#"{"id":"a","ts":01}"#,
        r#"{"n":"no number","x":nul!}"#,
        r#"{'id':'a'}"#,
        "\u{feff}{}",
        "{\"id\":\"a\nb\",\"ts\":1}",
        "NaN",
        "hello",
    ] {
        assert_eq!(refused(&job, payload).code, InvalidJson, "{payload}");
    }
}

#[test]
fn half_of_a_surrogate_pair_is_invalid_in_read_and_in_skipped_parts() {
    let keep = Decode { unknown_fields: UnknownFields::Keep, ..job_of(vec![]) };
    for job in [job_of(vec![]), keep] {
        for payload in [
            r#"{"id":"\ud800","ts":1}"#,
            r#"{"id":"a","ts":1,"skipped":"\ud800"}"#,
            r#"{"id":"a","ts":1,"\udc00":1}"#,
            r#"[{"id":"a","ts":1},{"skipped":["\ud800x"]}]"#,
            r#""\ud800""#,
        ] {
            assert_eq!(refused(&job, payload).code, InvalidJson, "{payload}");
        }
    }
}

#[test]
fn a_scalar_is_not_an_object() {
    for payload in ["null", "true", "12", "1e400", "\"text\""] {
        assert_eq!(refused(&job_of(vec![]), payload).code, NotAnObject, "{payload}");
    }
}

#[test]
fn nesting_past_the_limit_is_too_deep_and_never_overflows_the_stack() {
    let job = job_of(vec![at("deep", &["a", "a", "a"], PrimitiveType::Int)]);
    for payload in [
        "[".repeat(100_000),
        "{\"a\":".repeat(100_000),
        format!(r#"{{"skipped":{}{}}}"#, "[".repeat(128), "]".repeat(128)),
    ] {
        assert_eq!(refused(&job, &payload).code, TooDeep);
    }
    row(&job, &format!(r#"{{"id":"a","ts":1,"skipped":{}{}}}"#, "[".repeat(127), "]".repeat(127)));
    row(&job, &format!(r#"{{"id":"a","ts":1,"skipped":"{}"}}"#, "[{".repeat(10_000)));
}

#[test]
fn a_member_that_is_read_twice_is_refused_and_one_that_is_skipped_twice_is_not() {
    let job = job_of(vec![at("provider", &["delivery", "provider"], PrimitiveType::String)]);
    for payload in [
        r#"{"id":"a","id":"a","ts":1}"#,
        r#"{"id":null,"id":"a","ts":1}"#,
        r#"{"id":"a","\u0069d":"b","ts":1}"#,
        r#"{"id":"a","ts":1,"delivery":{},"delivery":{"provider":"p"}}"#,
        r#"{"id":"a","ts":1,"delivery":{"provider":"p","provider":"q"}}"#,
    ] {
        assert_eq!(refused(&job, payload).code, DuplicateField, "{payload}");
    }
    row(&job, r#"{"x":1,"id":"a","x":2,"ts":1}"#);
}

#[test]
fn the_same_member_in_the_next_row_is_no_repeat() {
    let decoded = decode(&job_of(vec![]), &format!("[{GOOD},{GOOD}]"));
    assert_eq!((decoded.rows.num_rows(), decoded.letters.len()), (2, 0));
}

#[test]
fn unknown_members_are_kept_verbatim_in_their_order() {
    let job = Decode {
        unknown_fields: UnknownFields::Keep,
        ..job_of(vec![at("provider", &["delivery", "provider"], PrimitiveType::String)])
    };
    let decoded = row(
        &job,
        r#"{"b": 1.50 ,"id":"a","\"q\"":{"x": [1e400]},"ts":1,"b":null,"delivery":{"other":1},"é":"\u00e9"}"#,
    );
    assert_eq!(
        text_of(&decoded, UNKNOWN_FIELDS_COLUMN).as_deref(),
        Some(r#"{"b":1.50,"\"q\"":{"x": [1e400]},"b":null,"é":"\u00e9"}"#)
    );
    assert_eq!(text_of(&row(&job, GOOD), UNKNOWN_FIELDS_COLUMN), None);
}

#[test]
fn unknown_members_are_refused_at_the_top_and_on_the_way_where_the_job_says_so() {
    let job = Decode {
        unknown_fields: UnknownFields::DeadLetter,
        ..job_of(vec![at("provider", &["delivery", "provider"], PrimitiveType::String)])
    };
    let letter = refused(&job, r#"{"id":"a","ts":1,"x":2}"#);
    assert_eq!(
        (letter.code, letter.text.as_str()),
        (UnknownField, "no column reads $.x; add one or set `unknown_fields`")
    );
    let letter = refused(&job, r#"{"id":"a","ts":1,"delivery":{"x":1}}"#);
    assert_eq!((letter.code, letter.text.contains("$.delivery.x")), (UnknownField, true));
    row(&job, r#"{"id":"a","ts":1,"delivery":{"provider":"p"}}"#);
}

#[test]
fn an_array_is_split_and_a_bad_element_takes_no_other_with_it() {
    let decoded = decode(&job_of(vec![]), r#" [{"id":"a","ts":1}, {"id":7}, [1], {"id":"c","ts":2} , 3]"#);
    assert_eq!(decoded.consumed, 5);
    let indexes: Vec<_> = decoded.places.iter().map(|place| place.row_index).collect();
    assert_eq!(indexes, [0, 3]);
    let letters: Vec<_> = decoded
        .letters
        .iter()
        .map(|letter| {
            (letter.place.row_index, letter.code, letter.payload.as_deref().unwrap(), letter.payload_bytes)
        })
        .collect();
    assert_eq!(
        letters,
        [
            (1, WrongType, br#"{"id":7}"#.as_slice(), 8),
            (2, NotAnObject, b"[1]".as_slice(), 3),
            (4, NotAnObject, b"3".as_slice(), 1)
        ]
    );
    assert_eq!(decoded.letters[1].text, "element 2 of the array is an array, expected an object");
}

#[test]
fn a_broken_array_is_one_letter_with_the_whole_payload() {
    for (payload, code) in
        [(r#"[{"id":"a","ts":1},{"id""#, TruncatedJson), (r#"[{"id":"a","ts":1} {}]"#, InvalidJson)]
    {
        let letter = refused(&job_of(vec![]), payload);
        assert_eq!((letter.code, letter.payload.as_deref()), (code, Some(payload.as_bytes())));
        assert_eq!(letter.place.row_index, 0);
    }
}

#[test]
fn an_empty_array_is_a_letter() {
    assert_eq!(refused(&job_of(vec![]), " [ ] ").code, EmptyArray);
}

#[test]
fn arrays_are_refused_whole_where_the_job_says_so() {
    let job = Decode { arrays: Arrays::DeadLetter, ..job_of(vec![]) };
    let payload = format!("[{GOOD},{GOOD}]");
    let letter = refused(&job, &payload);
    assert_eq!((letter.code, letter.payload.as_deref()), (ArrayRefused, Some(payload.as_bytes())));
    assert_eq!(refused(&job, "[]").code, ArrayRefused);
    assert_eq!(refused(&job, "[1").code, TruncatedJson);
}

#[test]
fn a_record_never_makes_more_rows_or_repeats_more_bytes_than_its_bounds() {
    let job = job_of(vec![]);
    let longest = format!("[{}]", vec!["1"; ROWS_PER_RECORD_MAX].join(","));
    assert_eq!(decode(&job, &longest).letters.len(), ROWS_PER_RECORD_MAX);
    let letter = refused(&job, &longest.replacen('1', "1,1", 1));
    assert_eq!(letter.code, RecordTooLarge);
    assert!(letter.payload.is_some(), "the bytes are within the job's bound and stay");
    let mut chunk = RecordChunk::default();
    let key = vec![b'k'; REPEATED_BYTES_MAX / 1_000 + 1];
    let payload = format!("[{}]", vec!["1"; 1_000].join(","));
    chunk.push(RecordParts {
        slot: 0,
        offset: 0,
        timestamp_ms: None,
        key: Some(&key),
        payload: Some(payload.as_bytes()),
    });
    let decoded = decoder_of(&job).decode(&chunk, &assignment()).unwrap();
    assert_eq!((decoded.letters.len(), decoded.letters[0].code), (1, RecordTooLarge));
}

#[test]
fn columns_from_outside_of_the_payload_repeat_in_each_row() {
    let job = job_of(vec![
        from("record_key", ColumnSource::Key, PrimitiveType::String),
        from("raw_key", ColumnSource::Key, PrimitiveType::Binary),
        from("trace", ColumnSource::Header("traceparent".into()), PrimitiveType::String),
        from("absent", ColumnSource::Header("absent".into()), PrimitiveType::String),
        from("arrival", ColumnSource::Timestamp, PrimitiveType::Timestamptz),
        from("topic", ColumnSource::Topic, PrimitiveType::String),
    ]);
    let payload = format!("[{GOOD},{GOOD}]");
    let mut chunk = RecordChunk::default();
    chunk.push(RecordParts {
        slot: 1,
        offset: 0,
        timestamp_ms: Some(1_700_000_000_001),
        key: Some("ké".as_bytes()),
        payload: Some(payload.as_bytes()),
    });
    chunk.push_header("other", Some(b"x"));
    chunk.push_header("traceparent", Some(b"first"));
    chunk.push_header("traceparent", Some(b"second"));
    chunk.push(RecordParts {
        slot: 0,
        offset: 0,
        timestamp_ms: None,
        key: None,
        payload: Some(GOOD.as_bytes()),
    });
    chunk.push_header("traceparent", None);
    chunk.push_header("traceparent", Some(b"second"));
    let decoded = decoder_of(&job).decode(&chunk, &assignment()).unwrap();
    assert_eq!(decoded.letters, []);
    let texts = |name: &str| -> Vec<Option<String>> {
        let column = decoded.rows.column_by_name(name).unwrap().as_string::<i32>();
        column.iter().map(|text| text.map(str::to_owned)).collect()
    };
    let some = |text: &str| Some(text.to_owned());
    assert_eq!(texts("record_key"), [some("ké"), some("ké"), None]);
    assert_eq!(
        texts("trace"),
        [some("first"), some("first"), None],
        "the first header counts, also when null"
    );
    assert_eq!(texts("absent"), [None, None, None]);
    assert_eq!(texts("topic"), [some("sent"), some("sent"), some("clicked")]);
    let keys = decoded.rows.column_by_name("raw_key").unwrap().as_binary::<i64>();
    assert_eq!((keys.value(1), keys.is_null(2)), ("ké".as_bytes(), true));
    let arrivals = decoded.rows.column_by_name("arrival").unwrap().as_primitive::<TimestampMicrosecondType>();
    assert_eq!((arrivals.value(0), arrivals.is_null(2)), (1_700_000_000_001_000, true));
}

#[test]
fn a_key_that_is_not_utf8_is_refused_for_text_and_kept_for_bytes() {
    let mut chunk = RecordChunk::default();
    chunk.push(RecordParts {
        slot: 0,
        offset: 0,
        timestamp_ms: None,
        key: Some(b"\xff"),
        payload: Some(GOOD.as_bytes()),
    });
    let text = job_of(vec![from("record_key", ColumnSource::Key, PrimitiveType::String)]);
    let decoded = decoder_of(&text).decode(&chunk, &assignment()).unwrap();
    assert_eq!(
        (decoded.letters[0].code, decoded.letters[0].key.as_deref()),
        (InvalidUtf8, Some(b"\xff".as_slice()))
    );
    assert!(decoded.letters[0].text.starts_with("column record_key (key): expected UTF-8"));
    let bytes = job_of(vec![from("record_key", ColumnSource::Key, PrimitiveType::Binary)]);
    let decoded = decoder_of(&bytes).decode(&chunk, &assignment()).unwrap();
    assert_eq!(decoded.rows.column_by_name("record_key").unwrap().as_binary::<i64>().value(0), b"\xff");
}

#[test]
fn a_fault_outside_of_one_record_does_not_stick_to_the_next() {
    let job = job_of(vec![from("record_key", ColumnSource::Key, PrimitiveType::String)]);
    let mut chunk = RecordChunk::default();
    for key in [b"\xff".as_slice(), b"k"] {
        chunk.push(RecordParts {
            slot: 0,
            offset: 0,
            timestamp_ms: None,
            key: Some(key),
            payload: Some(GOOD.as_bytes()),
        });
    }
    let decoded = decoder_of(&job).decode(&chunk, &assignment()).unwrap();
    assert_eq!((decoded.letters.len(), text_of(&decoded, "record_key").as_deref()), (1, Some("k")));
}

#[test]
fn a_kafka_timestamp_that_no_reader_can_hold_is_out_of_range() {
    let job = job_of(vec![from("arrival", ColumnSource::Timestamp, PrimitiveType::Timestamptz)]);
    let mut chunk = RecordChunk::default();
    chunk.push(RecordParts {
        slot: 0,
        offset: 0,
        timestamp_ms: Some(i64::MAX),
        key: None,
        payload: Some(GOOD.as_bytes()),
    });
    let decoded = decoder_of(&job).decode(&chunk, &assignment()).unwrap();
    assert_eq!(decoded.letters[0].code, OutOfRange);
}

#[test]
fn verdicts_on_missing_values_come_in_their_order() {
    let mut job = job_of(vec![Column { required: true, ..column("kind", PrimitiveType::String) }]);
    job.columns[0].required = true;
    job.columns[1].required = true;
    assert_eq!(refused(&job, r#"{"kind":1}"#).code, WrongType);
    assert_eq!(refused(&job, "{}").code, NullKey);
    assert_eq!(refused(&job, r#"{"id":null,"ts":1,"kind":"k"}"#).code, NullKey);
    assert_eq!(refused(&job, r#"{"id":""}"#).code, EmptyKey);
    assert_eq!(refused(&job, r#"{"id":"a"}"#).code, MissingEventTime);
    let letter = refused(&job, r#"{"id":"a","ts":1}"#);
    assert_eq!(
        (letter.code, letter.text.as_str()),
        (MissingRequired, "column kind ($.kind): the column is required; found null or nothing")
    );
}

#[test]
fn a_refused_row_leaves_nothing_in_the_columns() {
    let job = job_of(vec![column("text", PrimitiveType::String), column("n", PrimitiveType::Int)]);
    let payloads: [&[u8]; 4] = [
        br#"{"id":"a","ts":1,"text":"kept","n":1}"#,
        br#"{"id":"b","ts":2,"text":"lost","n":"x"}"#,
        br#"{"id":"c","ts":3,"text":"lost","n":2,"#,
        br#"{"id":"d","ts":4}"#,
    ];
    let decoded = decoder_of(&job).decode(&chunk_of(&payloads), &assignment()).unwrap();
    let texts: Vec<_> = decoded.rows.column_by_name("text").unwrap().as_string::<i32>().iter().collect();
    assert_eq!(texts, [Some("kept"), None]);
    let offsets: Vec<_> = decoded.places.iter().map(|place| place.offset).collect();
    assert_eq!(offsets, [0, 3]);
    assert_eq!(decoded.event_times, [EventTimeMs(1), EventTimeMs(4)]);
}

#[test]
fn event_time_is_floored_also_before_the_epoch() {
    let mut job = job_of(vec![]);
    job.columns[1].unit = Some(TimeUnit::Micros);
    assert_eq!(row(&job, r#"{"id":"a","ts":1999}"#).event_times, [EventTimeMs(1)]);
    assert_eq!(row(&job, r#"{"id":"a","ts":-1}"#).event_times, [EventTimeMs(-1)]);
}

#[test]
fn a_good_row_that_is_refused_later_becomes_a_letter_with_its_own_bytes() {
    let second = r#"[ {"id":"b","ts":1} , {"id":"c","ts":2}]"#;
    let chunk = chunk_of(&[b"not json", format!(" {GOOD} ").as_bytes(), second.as_bytes()]);
    let mut decoded = decoder_of(&job_of(vec![])).decode(&chunk, &assignment()).unwrap();
    let letter = decoded.letter_for(&chunk, 2, EventTimeAhead, "too far\nahead");
    assert_eq!(letter.payload.as_deref(), Some(br#"{"id":"c","ts":2}"#.as_slice()));
    assert_eq!((letter.place, letter.payload_bytes), (Place { slot: 1, offset: 2, row_index: 1 }, 17));
    assert_eq!((letter.code, letter.text.as_str()), (EventTimeAhead, "too far\\nahead"));
    assert_eq!((letter.key.as_deref(), letter.timestamp_ms), (Some(b"k".as_slice()), Some(5)));
    assert_eq!(
        decoded.letter_for(&chunk, 0, EventTimeAhead, "").payload,
        Some(format!(" {GOOD} ").into_bytes())
    );

    decoded.retain(&BooleanArray::from(vec![true, false, true]));
    assert_eq!((decoded.rows.num_rows(), decoded.event_times.len(), decoded.timestamps_ms.len()), (2, 2, 2));
    let letter = decoded.letter_for(&chunk, 1, EventTimeAhead, "");
    assert_eq!(letter.payload.as_deref(), Some(br#"{"id":"c","ts":2}"#.as_slice()));
}

#[test]
fn a_chunk_without_records_makes_an_empty_batch_of_the_schema() {
    let mut decoder = decoder_of(&job_of(vec![]));
    let decoded = decoder.decode(&RecordChunk::default(), &assignment()).unwrap();
    assert_eq!((decoded.rows.num_rows(), decoded.consumed), (0, 0));
    assert_eq!(decoded.rows.schema(), decoder.schema());
}

#[test]
fn wide_objects_are_read_in_any_order() {
    let names: Vec<String> = (0..40).map(|n| format!("c{n}")).collect();
    let job = job_of(names.iter().map(|name| column(name, PrimitiveType::Int)).collect());
    let members: Vec<String> =
        names.iter().enumerate().rev().map(|(n, name)| format!("\"{name}\":{n}")).collect();
    let decoded = row(&job, &format!(r#"{{{},"id":"a","other":1,"ts":1}}"#, members.join(",")));
    for (n, name) in (0..).zip(&names) {
        assert_eq!(decoded.rows.column_by_name(name).unwrap().as_primitive::<Int32Type>().value(0), n);
    }
}

#[test]
fn a_job_that_can_not_be_decoded_is_refused_with_its_column() {
    let of = |column: Column| setup_error(&job_of(vec![column]));
    assert!(matches!(of(column("id", PrimitiveType::Int)), DecodeSetupError::NameTaken { .. }));
    assert!(matches!(of(column("_kafka_offset", PrimitiveType::Int)), DecodeSetupError::NameTaken { .. }));
    let keep = Decode {
        unknown_fields: UnknownFields::Keep,
        ..job_of(vec![column(UNKNOWN_FIELDS_COLUMN, PrimitiveType::String)])
    };
    assert!(matches!(setup_error(&keep), DecodeSetupError::NameTaken { .. }));
    for kind in [
        PrimitiveType::TimestampNs,
        PrimitiveType::TimestamptzNs,
        PrimitiveType::Decimal { precision: 39, scale: 0 },
        PrimitiveType::Decimal { precision: 3, scale: 4 },
        PrimitiveType::Decimal { precision: 0, scale: 0 },
        PrimitiveType::Fixed(0),
        PrimitiveType::Fixed(4097),
    ] {
        assert!(matches!(of(column("x", kind)), DecodeSetupError::TypeUnsupported { .. }));
    }
    let unit = Some(TimeUnit::Millis);
    assert!(matches!(
        of(Column { unit, ..column("x", PrimitiveType::Date) }),
        DecodeSetupError::UnitUnused { .. }
    ));
    assert!(matches!(of(at("x", &[], PrimitiveType::Int)), DecodeSetupError::PathLength { .. }));
    assert!(matches!(of(at("x", &["a"; 33], PrimitiveType::Int)), DecodeSetupError::PathLength { .. }));
    assert!(matches!(of(at("x", &["ts", "a"], PrimitiveType::Int)), DecodeSetupError::PathEntered { .. }));
    for (source, kind) in [
        (ColumnSource::Key, PrimitiveType::Int),
        (ColumnSource::Header("h".into()), PrimitiveType::Uuid),
        (ColumnSource::Timestamp, PrimitiveType::Timestamp),
        (ColumnSource::Topic, PrimitiveType::Binary),
    ] {
        assert!(matches!(of(from("x", source, kind)), DecodeSetupError::SourceType { .. }));
    }
    let job = job_of(vec![column("n", PrimitiveType::Int)]);
    let no_key = Decoder::new(&job, &["nope".to_owned()], "ts", 1).unwrap_err();
    assert_eq!(
        no_key.to_string(),
        "dedup.key names nope, which is no column of [decode.columns]; add it there or correct the name"
    );
    assert!(matches!(Decoder::new(&job, &[], "n", 1).unwrap_err(), DecodeSetupError::EventTimeType { .. }));
}

/// The columns of a notification event.
fn notification_job() -> Decode {
    job_of(vec![
        column("event_type", PrimitiveType::String),
        column("user_id", PrimitiveType::Long),
        column("channel", PrimitiveType::String),
        at("provider", &["delivery", "provider"], PrimitiveType::String),
        at("attempt", &["delivery", "attempt"], PrimitiveType::Int),
        column("cost", PrimitiveType::Decimal { precision: 18, scale: 6 }),
        column("sent_at", PrimitiveType::Timestamptz),
        column("campaign", PrimitiveType::String),
    ])
}

fn notification(number: usize) -> String {
    format!(
        r#"{{"id":"01890a5d-ac96-774b-bcce-{number:012x}","event_type":"notification.delivered","ts":{},"user_id":{},"channel":"push","delivery":{{"provider":"fcm","attempt":{},"region":"eu-west-1"}},"cost":0.000215,"sent_at":"2023-11-14T22:13:20.123456Z","campaign":"autumn-{}","device":{{"os":"android","version":"14"}}}}"#,
        1_700_000_000_000 + number,
        7_000_000_000 + number,
        number % 4,
        number % 100
    )
}

/// Prints how many events one core decodes in a second; a machine's speed is no verdict, so nothing asserts it.
#[test]
fn the_rate_of_decoding_is_printed() {
    const EVENTS: usize = 200_000;
    let mut chunk = RecordChunk::default();
    for number in 0..EVENTS {
        let payload = notification(number);
        let parts = RecordParts {
            slot: 0,
            offset: number as i64,
            timestamp_ms: Some(1),
            key: None,
            payload: Some(payload.as_bytes()),
        };
        chunk.push(parts);
    }
    let mut decoder = decoder_of(&notification_job());
    let start = Instant::now();
    let decoded = decoder.decode(&chunk, &assignment()).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    assert_eq!((decoded.rows.num_rows(), decoded.letters.len()), (EVENTS, 0));
    println!(
        "decode: {EVENTS} events of {} bytes, {} columns: {:.0} thousand events/s, {:.0} MB/s",
        chunk.payload_bytes() / EVENTS,
        decoder.schema().fields().len(),
        EVENTS as f64 / seconds / 1e3,
        chunk.payload_bytes() as f64 / seconds / 1e6
    );
}

/// Jobs that differ in what they do with unknown members and arrays.
fn every_policy() -> Vec<Decode> {
    let mut jobs = Vec::new();
    for unknown_fields in [UnknownFields::Ignore, UnknownFields::Keep, UnknownFields::DeadLetter] {
        for arrays in [Arrays::Split, Arrays::DeadLetter] {
            jobs.push(Decode { unknown_fields, arrays, ..notification_job() });
        }
    }
    jobs
}

fn check_conservation(payload: &[u8]) -> Result<(), TestCaseError> {
    for job in every_policy() {
        let decoded = decoder_of(&job).decode(&chunk_of(&[payload, GOOD.as_bytes()]), &assignment()).unwrap();
        let rows = decoded.rows.num_rows();
        prop_assert_eq!(decoded.consumed, (rows + decoded.letters.len()) as u64);
        let is_array = payload.trim_ascii_start().first() == Some(&b'[');
        prop_assert!(is_array || decoded.consumed == 2, "{} rows and letters", decoded.consumed);
        prop_assert!(decoded.consumed >= 2);
        let mut places = decoded.places.clone();
        places.extend(decoded.letters.iter().map(|letter| letter.place));
        places.sort();
        let mut indexes = 0..;
        for place in places.iter().filter(|place| place.offset == 0) {
            prop_assert_eq!(Some(place.row_index), indexes.next(), "each row of the record stands once");
        }
        let last = places.last().unwrap();
        prop_assert_eq!((last.offset, last.row_index), (1, 0), "the record after it is untouched");
        for letter in &decoded.letters {
            prop_assert!(letter.text.chars().count() <= 300 && !letter.text.chars().any(char::is_control));
        }
    }
    Ok(())
}

proptest! {
    /// Goal: no bytes make the decoder panic, and each record is a row or a letter, whatever the job's policy.
    #[test]
    fn random_bytes_are_one_row_or_one_letter(payload in vec(any::<u8>(), 0..200)) {
        check_conservation(&payload)?;
    }

    /// Goal: the same for text that is nearly JSON. Method: pieces of JSON in random order.
    #[test]
    fn random_pieces_of_json_are_rows_or_letters(pieces in vec(prop::sample::select(vec![
        "{", "}", "[", "]", ",", ":", "\"", "\\", "\"id\"", "\"ts\"", "\"delivery\"", "\"a\"", "1", "-", ".5", "e9", "null",
        "true", " ", "\n", "\\u0000", "\\ud800", "\\udc00", "é", "{\"id\":\"a\",\"ts\":1}", "{\"delivery\":", "1e400",
    ]), 0..40)) {
        check_conservation(pieces.concat().as_bytes())?;
    }

    /// Goal: the same for a good event with some bytes changed, and for arrays of them.
    #[test]
    fn changed_events_are_rows_or_letters(changes in vec((any::<prop::sample::Index>(), any::<u8>()), 0..4), array: bool) {
        let one = notification(7);
        let mut payload = if array { format!("[{one},{one},{GOOD}]") } else { one }.into_bytes();
        for (index, byte) in &changes {
            let position = index.index(payload.len());
            payload[position] = *byte;
        }
        check_conservation(&payload)?;
    }

    /// Goal: whatever serde_json writes for an event comes back unchanged, in any order of members.
    #[test]
    fn events_round_trip(id in "\\PC{1,20}", n: i64, provider: Option<String>, extra: String, micros in -62_135_596_800_000_000i64..=253_402_300_799_999_999, order in Just(vec![0, 1, 2, 3, 4]).prop_shuffle()) {
        let mut job = job_of(vec![column("n", PrimitiveType::Long), at("provider", &["delivery", "provider"], PrimitiveType::String)]);
        job.unknown_fields = UnknownFields::Keep;
        job.columns[1].unit = Some(TimeUnit::Micros);
        let extra = serde_json::to_string(&extra).unwrap();
        let members = [
            format!("\"id\":{}", serde_json::to_string(&id).unwrap()),
            format!("\"n\":{n}"),
            format!("\"delivery\":{{\"provider\":{}}}", serde_json::to_string(&provider).unwrap()),
            format!("\"extra\":{extra}"),
            format!("\"ts\":{micros}"),
        ];
        let ordered: Vec<_> = order.iter().map(|position| members[*position].as_str()).collect();
        let decoded = row(&job, &format!("{{{}}}", ordered.join(", ")));
        prop_assert_eq!(text_of(&decoded, "id"), Some(id));
        prop_assert_eq!(text_of(&decoded, "provider"), provider);
        prop_assert_eq!(text_of(&decoded, UNKNOWN_FIELDS_COLUMN), Some(format!("{{\"extra\":{extra}}}")));
        prop_assert_eq!(decoded.rows.column_by_name("n").unwrap().as_primitive::<Int64Type>().value(0), n);
        prop_assert_eq!(decoded.rows.column_by_name("ts").unwrap().as_primitive::<TimestampMicrosecondType>().value(0), micros);
        prop_assert_eq!(decoded.event_times, [EventTimeMs(micros.div_euclid(1_000))]);
    }
}
