//! What a user sees: for each class of mistake, what is said and where; and the commented example, held to the code.

use std::collections::BTreeSet;
use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

mod any_input;
mod examples;
mod overrides;
mod secrets;

use super::*;
use crate::job::{CatalogKind, ColumnSource, METADATA_COLUMNS, Setting, StartPosition, TimeUnit};

const EXAMPLE: &str = include_str!("../../../jobs/notifications.toml");

const SMALL: &str = r#"version = 1
name = "n"
[source.kafka]
topics = ["a", "b"]
[source.kafka.properties]
"bootstrap.servers" = "h:1"
[decode.columns]
id = { type = "string" }
ts = { type = "timestamptz", unit = "ms" }
amount = { type = "double" }
[event_time]
column = "ts"
[dedup]
key = ["id"]
[sink.iceberg]
table = "e.n"
"#;

/// Stands for every secret in these tests: no message may hold it.
const CANARY: &str = "hunter2";

fn environment(name: &str) -> Option<String> {
    match name {
        "KAFKA_BROKERS" => Some("broker:9092".to_owned()),
        "CATALOG_URI" => Some("https://catalog/api".to_owned()),
        "PASSWORD" => Some(CANARY.to_owned()),
        "TWELVE" => Some("12".to_owned()),
        _ => None,
    }
}

fn check(text: &str, sets: &[&str]) -> Result<LoadedJob, JobErrors> {
    let sets = sets.iter().map(|set| split_set(set).expect("key=value")).collect();
    JobSource { path: "jobs/x.toml".into(), text: text.to_owned(), sets }.check(&environment)
}

/// The small job with one piece of text replaced; an empty piece adds lines at its end.
fn edited(from: &str, to: &str) -> String {
    if from.is_empty() {
        return format!("{SMALL}{to}\n");
    }
    assert!(SMALL.contains(from), "{from} is not in the small job");
    SMALL.replacen(from, to, 1)
}

fn accepted(from: &str, to: &str) -> LoadedJob {
    check(&edited(from, to), &[]).unwrap_or_else(|errors| panic!("{errors}"))
}

fn refused(from: &str, to: &str) -> String {
    check(&edited(from, to), &[]).expect_err("a problem").to_string()
}

/// First and help lines of every problem: what is found and the way out, without excerpt and expectation.
fn short(errors: &JobErrors) -> String {
    let lines = errors.0.iter().flat_map(|problem| {
        let place = match problem.line {
            0 => problem.file.clone(),
            line => format!("{line}:{}", problem.column),
        };
        let hint = problem.hint.iter().map(|hint| format!("help: {hint}"));
        std::iter::once(format!("{place}: {}", problem.found)).chain(hint)
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn a_problem_shows_its_place_what_was_expected_and_the_way_out() {
    assert_eq!(
        refused("topics", "topcs"),
        r#"jobs/x.toml:3:1: missing field "topics" in [source.kafka]
  |
3 | [source.kafka]
  | ^^^^^^^^^^^^^^
expected: an array of topic names

jobs/x.toml:4:1: unknown field "topcs" in [source.kafka]
  |
4 | topcs = ["a", "b"]
  | ^^^^^
expected: topics, start, properties
help: did you mean "topics"?"#
    );
    assert_eq!(
        refused("[dedup]", "[dedup]\nwindow = 300"),
        r#"jobs/x.toml:14:10: window is the integer 300
   |
14 | window = 300
   |          ^^^
expected: a duration in words, as in "10 minutes", "7 days" or "5m"
help: a number has no unit: write "300 seconds""#
    );
}

#[test]
fn a_syntax_error_stands_alone_with_its_place() {
    assert_eq!(
        refused("name = \"n\"", "name = \"n\"\nmemory = 1 GiB\nmemry = 1"),
        r#"jobs/x.toml:3:10: not TOML: string values must be quoted, expected literal string
  |
3 | memory = 1 GiB
  |          ^^^^^
help: words, sizes and durations stand in double quotes: memory = "1 GiB""#
    );
    assert_eq!(
        refused("name = \"n\"", "name = \"n\"\nname = \"n\""),
        "jobs/x.toml:3:1: not TOML: duplicate key\n  |\n3 | name = \"n\"\n  | ^^^^"
    );
}

#[test]
fn an_almost_empty_file_says_what_is_missing_once_each() {
    let errors = check("version = 1", &[]).expect_err("a problem");
    assert_eq!(
        short(&errors),
        r#"1:1: missing field "name"
1:1: missing table [source.kafka]
1:1: missing table [decode]
1:1: missing table [dedup]
1:1: missing table [event_time]
1:1: missing table [sink.iceberg]"#
    );
}

#[test]
fn columns_count_characters_and_excerpts_survive_tabs_line_ends_and_long_lines() {
    let text = format!("version = 1\r\n\tname = {{ \"ä😀\" = 1, b = 2 }}\r\n{}", "# x".repeat(100));
    let errors = check(&text, &[]).expect_err("a problem");
    let name = errors.0.iter().find(|problem| problem.field == "name").expect("name is a table");
    assert_eq!(
        name.to_string(),
        "jobs/x.toml:2:9: name is a table\n  |\n2 | \tname = { \"ä😀\" = 1, b = 2 }\n  | \t       ^^^^^^^^^^^^^^^^^^^\nexpected: 1 to 64 of a-z, \
         0-9, _ and -, starting with a letter or digit"
    );
    let long =
        refused("[\"a\", \"b\"]", &format!("[{}\"b/\"]", "\"a\", ".to_owned() + &"         ".repeat(40)));
    let lines: Vec<&str> = long.lines().collect();
    assert_eq!(lines[0], "jobs/x.toml:4:376: \"b/\" can not be the name of a Kafka topic");
    assert!(lines[2].chars().count() < 200, "{}", lines[2]);
    let caret = lines[3].find('^').expect("a caret");
    assert_eq!(&lines[2][caret..], "\"b/\"]");
}

#[test]
fn every_class_of_mistake_is_named_with_its_way_out() {
    let cases: &[(&str, &str, &str)] = &[
        // names
        (
            "name = \"n\"",
            "name = \"n\"\nwindow = \"7 days\"\nmemry = \"1 GiB\"",
            "3:1: unknown field \"window\"\nhelp: \"window\" is a field of [dedup]\n\
          4:1: unknown field \"memry\"\nhelp: did you mean \"memory\"?",
        ),
        (
            "[dedup]",
            "[dedup]\nmemory = \"1 GiB\"",
            "14:1: unknown field \"memory\" in [dedup]\n\
          help: \"memory\" stands at the top of the file, before the first [table]",
        ),
        (
            "\"string\" }",
            "\"string\", frm = \"key\" }",
            "8:25: unknown field \"frm\" in [decode.columns.id]\nhelp: did you mean \"from\"?",
        ),
        // the head
        (
            "version = 1",
            "version = 2\nrubbish = 1",
            "1:11: job-file version 2\nhelp: the file is of a newer tidemill: update the program",
        ),
        ("version = 1", "version = 0", "1:11: job-file version 0"),
        ("version = 1", "", "1:1: missing field \"version\""),
        ("version = 1", "version = \"1\"", "1:11: version is the string \"1\""),
        ("name = \"n\"", "name = \"N x\"", "2:8: name is the string \"N x\""),
        (
            "name = \"n\"",
            "name = \"n\"\nmemory = 536870912",
            "3:10: memory is the integer 536870912\nhelp: a number has no unit: write \"512 MiB\"",
        ),
        (
            "name = \"n\"",
            "name = \"n\"\nmemory = \"lots\"",
            "3:10: memory is the string \"lots\"\n\
          help: units are B, KB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB, TiB",
        ),
        (
            "name = \"n\"",
            "name = \"n\"\nmemory = \"0 B\"",
            "3:10: memory is the string \"0 B\"\nhelp: at least 1 B",
        ),
        (
            "name = \"n\"",
            "name = \"n\"\nstate_dir = \"../s\"",
            "3:13: state_dir leaves its folder by \"..\"\nhelp: write the path without it, absolute if need be",
        ),
        (
            "name = \"n\"",
            "name = \"n\"\nstate_dir = \"~/s\"",
            "3:13: state_dir is the string \"~/s\"\nhelp: write ${HOME} for the home folder",
        ),
        (
            "name = \"n\"",
            "name = \"n\"\nstate_dir = \"s3://b/s\"",
            "3:13: state_dir is the string \"s3://b/s\"",
        ),
        // the source
        (
            "[\"a\", \"b\"]",
            "\"a\"",
            "4:10: topics is the string \"a\"\nhelp: one value is an array too: [\"a\"]",
        ),
        ("[\"a\", \"b\"]", "[]", "4:10: topics is empty"),
        (
            "[\"a\", \"b\"]",
            "[\"a\", \"a\", \"b/c\", \"^x\", 3, \"..\"]",
            "4:16: topic \"a\" stands twice\nhelp: name it once\n\
          4:21: \"b/c\" can not be the name of a Kafka topic\n\
          help: 1 to 249 letters, digits, dots, underscores and hyphens, and not \".\" or \"..\"\n\
          4:28: not built yet: topic patterns; \"^x\" starts with ^\n\
          help: list the topics by name, so that a new topic can not come in unseen\n\
          4:34: topics[4] is the integer 3\n\
          4:37: \"..\" can not be the name of a Kafka topic\n\
          help: 1 to 249 letters, digits, dots, underscores and hyphens, and not \".\" or \"..\"",
        ),
        (
            "[\"a\", \"b\"]",
            "[\"a\"]\nstart = \"ealiest\"",
            "5:9: start is the string \"ealiest\"\nhelp: did you mean \"earliest\"?",
        ),
        (
            "[\"a\", \"b\"]",
            "[\"a\"]\nstart = 2026-01-01T00:00:00",
            "5:9: start is the time 2026-01-01T00:00:00\n\
          help: a time needs date, time and offset from UTC: 2026-01-31T00:00:00Z",
        ),
        (
            "[\"a\", \"b\"]",
            "[\"a\"]\nstart = 1960-01-01T00:00:00Z",
            "5:9: start is the time 1960-01-01T00:00:00Z",
        ),
        (
            "[\"a\", \"b\"]",
            "[\"a\"]\nstart = {}",
            "5:9: start names no offset\nhelp: write \"earliest\", or { \"topic\" = { 0 = 42 } }",
        ),
        (
            "[\"a\", \"b\"]",
            "[\"a\"]\nstart = { c = { 0 = 1 }, a = { x = 1, 1 = -1, 2 = \"3\", 01 = 1 } }",
            "5:11: start names \"c\", which is not in topics\nhelp: did you mean \"a\"?\n\
          5:32: \"x\" is not the number of a topic partition\n\
          5:43: offset -1 is negative\n\
          5:51: 2 is the string \"3\"\n\
          5:56: \"01\" is not the number of a topic partition",
        ),
        (
            "\"bootstrap.servers\" = \"h:1\"",
            "",
            "5:1: missing field \"bootstrap.servers\" in [source.kafka.properties]",
        ),
        ("\"h:1\"", "\" \"", "6:23: bootstrap.servers is empty"),
        (
            "\"bootstrap.servers\"",
            "bootstrap.servers",
            "5:1: missing field \"bootstrap.servers\" in [source.kafka.properties]\n6:1: bootstrap is a table\n\
          help: quote a name with dots, else TOML makes tables of it: \"bootstrap.servers\" = ...",
        ),
        (
            "\"h:1\"",
            "\"h:1\"\n\"security.protocol\" = \"SSL_SASL\"\n\"Group.Id\" = \"g\"",
            "7:23: security.protocol is the string \"SSL_SASL\"\nhelp: did you mean \"SASL_SSL\"?\n\
          8:1: unknown property \"Group.Id\"\nhelp: librdkafka writes it \"group.id\"",
        ),
        (
            "\"h:1\"",
            "\"h:1\"\n\"sasl.oauthbearer.token.endpoint.url\" = \"file:///etc/passwd\"",
            "7:41: \"sasl.oauthbearer.token.endpoint.url\" refers to a file without a path",
        ),
        (
            "\"h:1\"",
            "\"h:1\"\n\"sasl.oauthbearer.token.endpoint.url\" = \"ftp://x\"",
            "7:41: sasl.oauthbearer.token.endpoint.url is the string \"ftp://x\"",
        ),
        // columns
        (
            "{ type = \"string\" }",
            "\"string\"",
            "8:6: id is the string \"string\"\nhelp: write { type = \"string\" }",
        ),
        (
            "{ type = \"string\" }",
            "{ path = \"$.id\" }",
            "8:6: missing field \"type\" in [decode.columns.id]",
        ),
        ("\"string\"", "\"bigint\"", "8:15: unknown type \"bigint\"\nhelp: did you mean \"long\"?"),
        (
            "\"string\"",
            "\"struct<a: int>\"",
            "8:15: unknown type \"struct<a: int>\"\nhelp: nested and version 3 types are not built yet",
        ),
        (
            "\"string\"",
            "\"list\"",
            "8:15: not built yet: type list; nested columns are read by path\n\
          help: one column for each value inside: path = \"$.delivery.provider\"",
        ),
        (
            "\"string\"",
            "\"timestamp_ns\"",
            "8:15: not built yet: type timestamp_ns needs Iceberg format version 3, and tables are version 2\n\
          help: take timestamp, which keeps microseconds",
        ),
        (
            "\"string\"",
            "\"decimal(39, 2)\"",
            "8:15: unknown type \"decimal(39, 2)\"\nhelp: a precision of 1 to 38 and a scale up to it: decimal(10, 2)",
        ),
        (
            "\"string\" }",
            "\"string\", path = \"$..x\" }",
            "8:32: \"$..x\" is not a path into the payload\n\
          help: \"..\" and empty names are not read; write every name on the way",
        ),
        (
            "\"string\" }",
            "\"string\", unit = \"ms\" }",
            "8:32: unit on a column of type string\nhelp: leave it out",
        ),
        (
            "\"ms\"",
            "\"ns\"",
            "9:37: not built yet: unit = \"ns\"; tables of format version 2 keep microseconds; send those, and write \"us\"",
        ),
        (
            "unit = \"ms\"",
            "unit = \"ms\", from = \"timestamp\"",
            "9:37: unit on a column that is not read from the payload\nhelp: leave it out",
        ),
        (
            "\"string\" }",
            "\"long\", from = \"key\" }",
            "8:30: a column from \"key\" can not be of type long\nhelp: other types are read from the payload",
        ),
        ("\"string\" }", "\"string\", from = \"header\" }", "8:32: from is the string \"header\""),
        ("\"string\" }", "\"string\", from = \"header:\" }", "8:32: from names no header"),
        (
            "\"string\" }",
            "\"string\", from = \"topic\", path = \"$.x\" }",
            "8:48: path goes into the payload, and this column comes from \"topic\"\nhelp: leave out path, or from",
        ),
        ("\"string\" }", "\"string\", required = \"yes\" }", "8:36: required is the string \"yes\""),
        (
            "id = {",
            "ID = { type = \"string\" }\nid = {",
            "9:1: columns \"ID\" and \"id\" differ only by case\nhelp: most SQL engines can not tell them apart: rename one",
        ),
        (
            "amount = {",
            "inner = { type = \"string\", path = \"$.amount.x\" }\namount = {",
            "11:1: columns \"inner\" and \"amount\" read $.amount and $.amount.x: no value is both an object and a column\n\
          help: read only the inner values",
        ),
        (
            "amount = {",
            "\"a-b\" = {",
            "10:1: \"a-b\" can not be the name of a column\nhelp: letters, digits and underscores, not starting with a digit: \
          other names are rewritten in Avro and need quotes in SQL; read the payload's own name with path = \"$.name\" or \
          path = \"$['any name']\"",
        ),
        (
            "[decode.columns]",
            "[decode]\nunknown_fields = \"keep\"\n[decode.columns]\nUnknown_Fields = { type = \"string\" }",
            "10:1: column \"Unknown_Fields\" is the one that unknown_fields = \"keep\" adds\n\
          help: take another name, and read the payload's own with path",
        ),
        (
            "[decode.columns]",
            "[decode]\nmax_record = \"2 GiB\"\n[decode.columns]",
            "8:14: max_record is the string \"2 GiB\"",
        ),
        // time and keys
        (
            "column = \"ts\"",
            "column = \"tz\"",
            "12:10: event_time.column names \"tz\", which is not in [decode.columns]\nhelp: did you mean \"ts\"?",
        ),
        (
            "column = \"ts\"",
            "column = \"id\"",
            "12:10: event-time column \"id\" is of type string\n\
          help: numbers become one with a unit: { type = \"timestamptz\", unit = \"ms\" }",
        ),
        (
            "[event_time]",
            "[event_time]\nallowed_lateness = \"8 days\"",
            "12:20: allowed_lateness 8days is longer than the dedup window 7days\nhelp: widen window in [dedup], or allow \
          less: an event older than the window can not be proven new",
        ),
        (
            "[event_time]",
            "[event_time]\nwatermark_delay = \"-5 minutes\"\nidle_after = \"5 ticks\"\nmax_ahead = \"1us\"",
            "12:19: watermark_delay is the string \"-5 minutes\"\nhelp: numbers with units: \"90s\", \"1h 30m\"\n\
          13:14: idle_after is the string \"5 ticks\"\nhelp: unknown time unit \"ticks\", supported units: ns, us/µs, ms, \
          sec, min, hours, days, weeks, months, years (and few variations)\n\
          14:13: max_ahead is the string \"1us\"\nhelp: nothing finer than a millisecond",
        ),
        ("key = [\"id\"]", "key = []", "14:7: key names no column"),
        (
            "key = [\"id\"]",
            "key = [\"idd\", \"amount\", \"amount\", \"_kafka_topic\"]",
            "14:8: key names \"idd\", which is not in [decode.columns]\nhelp: did you mean \"id\"?\n\
          14:15: key column \"amount\" is a floating-point number\nhelp: 0.0 and -0.0 are equal and not the same, and NaN \
          equals nothing: read it as decimal(P, S) or string\n\
          14:25: key column \"amount\" stands twice\nhelp: name it once\n\
          14:35: key names \"_kafka_topic\", which is not in [decode.columns]\n\
          help: read it into a column of the job: { type = \"string\", from = \"topic\" }",
        ),
        ("[dedup]", "[dedup]\nwindow = \"0s\"", "14:10: window is zero"),
        (
            "[dedup]",
            "[dedup]\nshards = 3\nrepeats = \"anytime\"",
            "14:10: shards is 3\n15:11: repeats is the string \"anytime\"\nhelp: did you mean \"any_time\"?",
        ),
        ("[dedup]", "[dedup]\nshards = 8192", "14:10: shards is 8192"),
        ("[dedup]", "[dedup]\nmax_probe_records = 0", "14:21: max_probe_records is 0"),
        (
            "",
            "[microbatch]\nmax_records = 0\nmax_bytes = \"1 MiB\"\nmax_interval = \"0s\"",
            "18:15: max_records is 0\n19:13: max_bytes 1 MiB is smaller than the largest record, 4 MiB\n\
          help: raise it, or lower max_record in [decode]\n20:16: max_interval is zero",
        ),
        ("", "[microbatch]\nmax_records = -1", "18:15: max_records is -1"),
        // the sink
        ("\"e.n\"", "\"n\"", "16:9: table \"n\" has no namespace\nhelp: write it as \"namespace.table\""),
        (
            "\"e.n\"",
            "\"e.../n\"",
            "16:9: \"e.../n\" can not be the name of a table\n\
          help: parts of letters, digits, underscores and hyphens, with one dot between two parts",
        ),
        (
            "\"e.n\"",
            "\"e.n\"\npartition_by = [\"days(ts)\", \"day(id)\", \"bucket(id, 4)\", \"x\", \"bucket(4, amount)\"]",
            "17:17: unknown partition transform \"days\"\nhelp: did you mean \"day\"?\n\
          17:29: day does not fit column \"id\" of type string\n\
          17:40: \"bucket(id, 4)\" is not a partition field\n\
          help: the number comes first and is at least 1: bucket(16, column)\n\
          17:57: partition_by names \"x\", which is not in [decode.columns]\n\
          17:62: bucket does not fit column \"amount\" of type double",
        ),
        (
            "\"e.n\"",
            "\"e.n\"\npartition_by = [\"day(ts)\", \"day(ts)\", \"hour(ts)\"]",
            "17:28: partition field \"ts_day\" stands twice\nhelp: name it once\n\
          17:39: column \"ts\" is cut by time twice\nhelp: keep the finer one: a table by hour is also one by day",
        ),
        (
            "\"e.n\"",
            "\"e.n\"\ndead_letters = { table = \"E.N\", max_ratio = 1.5 }",
            "17:26: dead letters would go to the main table\nhelp: leave it out\n17:45: max_ratio is 1.5",
        ),
        (
            "\"e.n\"",
            "\"e.n\"\nmaintenance = { every_commits = -1, max_snapshots = 0, orphans_older_than = \"1 minute\", compact = true }",
            "17:33: every_commits is -1\n17:53: max_snapshots is 0\n\
          17:77: orphans_older_than is the string \"1 minute\"\n\
          17:89: not built yet: compaction of data files; any engine that can may do it on the same table",
        ),
        (
            "\"e.n\"",
            "\"e.n\"\ntable_properties = { format-version = 3, \"tidemill.x\" = \"y\", \"a\" = \"env:B\", b = [] }",
            "17:39: format-version is \"3\"\nhelp: leave it out\n\
          17:42: table property \"tidemill.x\" can not be set\n\
          help: names that start with \"tidemill.\" are the ledger's\n\
          17:68: table property \"a\" looks like a secret\n\
          help: table properties stand in the open in the table's metadata; secrets go to `catalog`\n\
          17:81: b is an array",
        ),
        (
            "\"e.n\"",
            "\"e.n\"\ncatalog = { uri = \"x\" }",
            "17:11: missing field \"type\" in [sink.iceberg.catalog]",
        ),
        (
            "\"e.n\"",
            "\"e.n\"\ncatalog = { type = \"rest\" }",
            "17:11: missing field \"uri\" in [sink.iceberg.catalog]",
        ),
        (
            "\"e.n\"",
            "\"e.n\"\ncatalog = { type = \"rest\", uri = \"sqlite:x\", credental = \"env:X\" }",
            "17:34: uri is the string \"sqlite:x\"\nhelp: a SQLite file is of type = \"sql\"\n\
          17:46: unknown catalog property \"credental\"\nhelp: did you mean \"credential\"?",
        ),
        (
            "\"e.n\"",
            "\"e.n\"\ncatalog = { type = \"sql\", uri = \"http://x\", warehouse = \"gs://x\", credential = \"env:X\" }",
            "17:33: uri is the string \"http://x\"\nhelp: an http address is of type = \"rest\"\n\
          17:57: not built yet: a warehouse on gs://\n\
          17:67: unknown catalog property \"credential\"",
        ),
        (
            "\"e.n\"",
            "\"e.n\"\ncatalog = { type = \"sql\", uri = \"sqlite::memory:\", warehouse = \"s3:///x\" }",
            "17:33: uri is the string \"sqlite::memory:\"\n\
          help: the catalog must outlive the run: name a file, without ? and options\n\
          17:64: warehouse is the string \"s3:///x\"\nhelp: s3:// is followed by the name of a bucket",
        ),
        (
            "\"e.n\"",
            "\"e.n\"\ncatalog = { type = \"sql\", uri = \"sqlite:a/../b\", warehouse = \"s3://b/..\" }",
            "17:33: uri leaves its folder by \"..\"\nhelp: write the path without it, absolute if need be\n\
          17:62: warehouse leaves its folder by \"..\"\nhelp: write the path without it, absolute if need be",
        ),
        // variables
        (
            "\"h:1\"",
            "\"${NOT_SET}\"",
            "6:23: environment variable NOT_SET is not set\nhelp: set it, or give a default: ${NOT_SET:-value}",
        ),
        (
            "[\"a\", \"b\"]",
            "[\"a\", \"${NOT_SET}\"]",
            "4:16: environment variable NOT_SET is not set\nhelp: set it, or give a default: ${NOT_SET:-value}",
        ),
        (
            "\"string\" }",
            "\"${NOT_SET}\" }",
            "8:15: environment variable NOT_SET is not set\nhelp: set it, or give a default: ${NOT_SET:-value}",
        ),
    ];
    let mut wrong = Vec::new();
    for (from, to, expected) in cases {
        let said =
            check(&edited(from, to), &[]).map_or_else(|errors| short(&errors), |_| "accepted".to_owned());
        if said != *expected {
            wrong.push(format!("{from} -> {to}\nsays\n{said}\nnot\n{expected}\n"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn a_partition_field_can_not_take_the_name_of_a_column() {
    let text = edited("amount = {", "ts_day = { type = \"date\" }\namount = {");
    let text = text.replace("\"e.n\"", "\"e.n\"\npartition_by = [\"ts_day\", \"day(ts)\"]");
    let errors = check(&text, &[]).expect_err("a problem");
    assert_eq!(
        short(&errors),
        "18:27: partition field \"ts_day\" stands twice\nhelp: name it once",
        "the column itself and the day of another have one name"
    );
    let text = text.replace("\"ts_day\", ", "");
    let errors = check(&text, &[]).expect_err("a problem");
    assert_eq!(
        short(&errors),
        "18:17: partition field \"ts_day\" has the name of a column\nhelp: rename the column"
    );
}

#[test]
fn what_is_not_built_is_refused_by_name_with_what_to_do_instead() {
    let refusals = refused(
        "",
        "duplicates = \"x.y\"\n[rules]\nwhere = \"x\"\n[source.rabbitmq]\nx = 1\n[sink.kafka]\n[sink.postgres]\n\
         [enrich]\n[inputs.x]\n[microbatch]\nprobe_records = 3",
    );
    let first_lines: Vec<&str> = refusals.lines().filter(|line| line.starts_with("jobs/x.toml:")).collect();
    assert_eq!(
        first_lines,
        [
            "jobs/x.toml:17:1: not built yet: a table for duplicates; they are counted, and `audit` finds them again",
            "jobs/x.toml:18:2: not built yet: [rules] (where, checks, sql); filter when reading the table, or before Kafka",
            "jobs/x.toml:20:9: not built yet: [source.rabbitmq]; only [source.kafka] can be read",
            "jobs/x.toml:22:7: not built yet: [sink.kafka]; only [sink.iceberg] can be written",
            "jobs/x.toml:23:7: not built yet: [sink.postgres]; only [sink.iceberg] can be written",
            "jobs/x.toml:24:2: not built yet: [enrich]; join when reading the table",
            "jobs/x.toml:25:2: not built yet: [inputs]; a job reads the topics of [source.kafka] alone",
            "jobs/x.toml:27:1: not built yet: this size of probe batches; their records are bounded by dedup.max_probe_records, their \
             bytes by `memory`",
        ]
    );
    for (from, to, what) in [
        ("[decode.columns]", "[decode]\nformat = \"avro\"\n[decode.columns]", "format = \"avro\""),
        ("[decode.columns]", "[decode]\nformat = \"protobuf\"\n[decode.columns]", "format = \"protobuf\""),
        ("\"e.n\"", "\"e.n\"\ncatalog = { type = \"glue\" }", "type = \"glue\""),
        ("\"e.n\"", "\"e.n\"\ncatalog = { type = \"hms\" }", "type = \"hms\""),
        ("\"e.n\"", "\"e.n\"\ncatalog = { type = \"s3tables\" }", "type = \"s3tables\""),
        ("[\"a\", \"b\"]", "[\"a\"]\nsubscribe = \"a.*\"", "topic patterns"),
    ] {
        let said = refused(from, to);
        assert!(said.contains(&format!("not built yet: {what}; ")), "{said}");
        assert_eq!(said.matches("jobs/x.toml:").count(), 1, "{said}");
    }
}

#[test]
fn the_bucket_of_a_key_comes_from_event_time_or_from_an_id_of_the_key() {
    assert_eq!(accepted("topics", "topics").job.dedup.bucket_from, BucketFrom::EventTime);
    let same_time = "[dedup]\nrepeats = \"same_time\"\n";
    let loaded =
        accepted("[dedup]", &format!("{same_time}bucket_from = \"ulid\"\nbeyond_window = \"check\""));
    let id = |kind| BucketFrom::Id { kind, column: "id".to_owned() };
    assert_eq!(loaded.job.dedup.bucket_from, id(IdKind::Ulid));
    assert_eq!(loaded.job.bucket_source(), "ulid of id, event time ts");
    let both = format!("{same_time}bucket_from = \"uuid7\"\nid_column = \"id\"\nkey = [\"id\", \"ts\"]");
    assert_eq!(accepted("[dedup]\nkey = [\"id\"]", &both).job.dedup.bucket_from, id(IdKind::Uuid7));
    for (lines, found) in [
        ("bucket_from = \"uuid7\"", "bucket_from is \"uuid7\", and repeats is \"any_time\""),
        ("repeats = \"same_time\"\nbucket_from = \"uuid4\"", "bucket_from is the string \"uuid4\""),
        ("repeats = \"same_time\"\nid_column = \"id\"", "unknown field \"id_column\" in [dedup]"),
        (
            "repeats = \"same_time\"\nbucket_from = \"uuid7\"\nid_column = \"amount\"",
            "id_column \"amount\" is not in the key",
        ),
    ] {
        let said = refused("[dedup]", &format!("[dedup]\n{lines}"));
        assert!(said.contains(found), "{said}");
    }
    let two = format!("{same_time}bucket_from = \"uuid7\"\nkey = [\"id\", \"ts\"]");
    assert!(refused("[dedup]\nkey = [\"id\"]", &two).contains("the key has several columns"));
    let time = format!("{same_time}bucket_from = \"uuid7\"\nkey = [\"ts\"]");
    assert!(refused("[dedup]\nkey = [\"id\"]", &time).contains("id column \"ts\" is of type timestamptz"));
}

#[test]
fn properties_that_would_break_a_promise_or_run_code_are_refused_with_the_reason() {
    for name in [
        "plugin.library.paths",
        "ssl.engine.location",
        "ssl.providers",
        "sasl.kerberos.kinit.cmd",
        "enable.sasl.oauthbearer.unsecure.jwt",
        "debug",
        "enable.auto.commit",
        "auto.offset.reset",
        "isolation.level",
        "enable.auto.offset.store",
        "enable.partition.eof",
        "group.instance.id",
        "partition.assignment.strategy",
        "queued.max.messages.kbytes",
        "fetch.max.bytes",
        "message.max.bytes",
        "max.partition.fetch.bytes",
        "metadata.broker.list",
    ] {
        let said = refused("\"h:1\"", &format!("\"h:1\"\n\"{name}\" = \"x\""));
        assert!(
            said.starts_with(&format!("jobs/x.toml:7:1: property \"{name}\" can not be set: ")),
            "{said}"
        );
    }
    let job = accepted(
        "\"h:1\"",
        "\"h:1\"\n\"group.id\" = \"g\"\n\"session.timeout.ms\" = 6_000\n\"log.connection.close\" = true",
    )
    .job;
    let plain = |name: &str| job.source.properties.get(name).cloned();
    assert_eq!(plain("group.id"), Some(Setting::Plain("g".to_owned())));
    assert_eq!(plain("session.timeout.ms"), Some(Setting::Plain("6000".to_owned())));
    assert_eq!(plain("log.connection.close"), Some(Setting::Plain("true".to_owned())));
}

#[test]
fn names_that_tidemill_and_iceberg_add_are_refused_in_any_case() {
    let iceberg =
        ["_partition", "_file", "_pos", "_spec_id", "_deleted", "_row_id", "_last_updated_sequence_number"];
    let own = METADATA_COLUMNS.iter().map(|(name, ..)| *name).chain(["_kafka_x", "_tidemill_x"]);
    for name in own.chain(iceberg) {
        for name in [name.to_owned(), name.to_ascii_uppercase()] {
            let said = refused("amount = {", &format!("{name} = {{"));
            assert!(
                said.starts_with(&format!("jobs/x.toml:10:1: column name {name:?} is reserved")),
                "{said}"
            );
        }
    }
}

#[test]
fn a_small_job_gets_every_default() {
    let job = check(SMALL, &[]).expect("a good job").job;
    assert_eq!(job.memory_bytes, MEMORY_BYTES_DEFAULT);
    assert_eq!(job.state_dir, PathBuf::from("./state"));
    assert_eq!(job.source.start, StartPosition::Earliest);
    assert_eq!((job.dedup.window, job.dedup.shards), (Duration::from_secs(604_800), 256));
    assert_eq!(job.event_time.allowed_lateness, Duration::ZERO);
    assert_eq!(job.sink.table, ["e", "n"]);
    assert_eq!(job.sink.dead_letters.table, ["e", "n_dead_letters"]);
    assert_eq!(job.sink.catalog.kind, CatalogKind::Sql);
    assert_eq!(job.sink.catalog.uri, "sqlite:./warehouse/catalog.db");
    assert_eq!(job.sink.catalog.warehouse, "./warehouse");
    assert_eq!(job.decode.columns[0].from, ColumnSource::Value(vec!["id".to_owned()]));
    assert_eq!(job.decode.columns[1].unit, Some(TimeUnit::Millis));
}

#[test]
fn a_start_is_a_word_a_time_or_offsets() {
    let start = |value: &str| {
        accepted("[\"a\", \"b\"]", &format!("[\"a\", \"b\"]\nstart = {value}")).job.source.start
    };
    assert_eq!(start("\"earliest\""), StartPosition::Earliest);
    assert_eq!(start("\"latest\""), StartPosition::Latest);
    assert_eq!(start("2026-01-01T00:00:00Z"), StartPosition::Timestamp(1_767_225_600_000));
    assert_eq!(start("2026-01-01 01:00:00+01:00"), StartPosition::Timestamp(1_767_225_600_000));
    assert_eq!(start("\"2026-01-01T00:00:00.0001Z\""), StartPosition::Timestamp(1_767_225_600_001));
    let offsets = BTreeMap::from([("b".to_owned(), BTreeMap::from([(0, 42), (3, 0)]))]);
    assert_eq!(start("{ \"b\" = { 0 = 42, 3 = 0 } }"), StartPosition::Offsets(offsets));
}

#[test]
fn a_catalog_takes_local_and_remote_warehouses() {
    let catalog =
        |text: &str| accepted("\"e.n\"", &format!("\"e.n\"\ncatalog = {{ {text} }}")).job.sink.catalog;
    let sql = catalog("type = \"sql\"");
    assert_eq!((sql.uri.as_str(), sql.warehouse.as_str()), ("sqlite:./warehouse/catalog.db", "./warehouse"));
    for warehouse in ["/data/wh", "file:///data/wh", "s3://lake/wh"] {
        assert_eq!(catalog(&format!("type = \"sql\", warehouse = \"{warehouse}\"")).warehouse, warehouse);
    }
    let rest = catalog(
        "type = \"rest\", uri = \"https://c/api\", \"s3.region\" = \"eu\", \"s3.path-style-access\" = true",
    );
    assert_eq!((rest.kind, rest.warehouse.as_str()), (CatalogKind::Rest, ""));
    assert_eq!(rest.properties["s3.region"], Setting::Plain("eu".to_owned()));
    assert_eq!(rest.properties["s3.path-style-access"], Setting::Plain("true".to_owned()));
}

#[test]
fn a_file_full_of_mistakes_is_answered_soon_and_shortly() {
    let unknown: String = (0..100_000).map(|number| format!("x{number}=1\n")).collect();
    let text = edited("name = \"n\"", &format!("name = \"n\"\n{unknown}"));
    let errors = check(&text, &[]).expect_err("problems");
    assert_eq!(errors.0.len(), 101);
    assert_eq!(errors.0[0].found, "unknown field \"x0\"");
    assert_eq!(errors.0[100].found, "99900 more problems");
}
