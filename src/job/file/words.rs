//! Words of the job file and what they mean: durations, sizes, types, paths, transforms, names. Pure functions.

use std::time::Duration;

use iceberg::spec::{PrimitiveType, Transform};

/// Largest size that can be written: far above any machine, and safe to add up in 64 bits.
const SIZE_BYTES_MAX: u64 = 1 << 60;
/// Longest duration that can be written: far above any window, and safe to add to a time in 64-bit milliseconds.
const DURATION_MAX: Duration = Duration::from_secs(100 * 366 * 24 * 60 * 60);
/// Deepest path into a payload.
const PATH_DEPTH_MAX: usize = 32;
/// Longest name of a column or a part of a table's name, in characters.
const NAME_CHARS_MAX: usize = 128;
/// Longest `fixed`: a null costs as many bytes as a value.
const FIXED_BYTES_MAX: u64 = 4096;
/// Most buckets, and longest truncation, of a partition transform: Iceberg keeps both as a 32-bit signed integer.
const TRANSFORM_ARGUMENT_MAX: u32 = i32::MAX as u32;

/// Names that Iceberg's specification reserves for metadata columns and row lineage, and that readers act on.
const ICEBERG_RESERVED: [&str; 10] = [
    "_file",
    "_pos",
    "_deleted",
    "_spec_id",
    "_partition",
    "_change_type",
    "_change_ordinal",
    "_commit_snapshot_id",
    "_row_id",
    "_last_updated_sequence_number",
];

/// What is wrong with a word: what to say first, and the way out.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct WordProblem {
    pub found: String,
    pub hint: String,
}

impl WordProblem {
    fn new(found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { found: found.into(), hint: hint.into() }
    }
}

/// The nearest of some names, if it is near enough to be what was meant.
pub(super) fn nearest<'n>(name: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    // beyond this length nothing is a slip of the pen, and the distance costs the product of the lengths
    if name.len() > NAME_CHARS_MAX {
        return None;
    }
    let lower = name.to_ascii_lowercase().replace('-', "_");
    names
        .map(|known| (strsim::damerau_levenshtein(&lower, &known.to_ascii_lowercase()), known))
        .filter(|(distance, known)| *distance <= (known.len().max(name.len()) / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}

/// Reads a duration in words; whole milliseconds, since event time has no finer digit.
pub(super) fn parse_duration(text: &str) -> Result<Duration, String> {
    if !text.trim().is_empty() && text.trim().chars().all(|c| c.is_ascii_digit()) {
        return Err(format!("a number has no unit: write \"{} seconds\"", text.trim()));
    }
    let duration = humantime::parse_duration(text.trim()).map_err(|error| match error {
        humantime::DurationError::UnknownUnit { .. } => error.to_string(),
        _ => "numbers with units: \"90s\", \"1h 30m\"".to_owned(),
    })?;
    if duration.subsec_nanos() % 1_000_000 != 0 {
        return Err("nothing finer than a millisecond".to_owned());
    }
    if duration > DURATION_MAX {
        return Err("at most 100 years".to_owned());
    }
    Ok(duration)
}

/// Reads a size in words, in bytes.
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    if let Ok(bytes) = text.parse() {
        return Err(format!("a number has no unit: write \"{}\"", size_in_words(bytes)));
    }
    let size: bytesize::ByteSize = text
        .parse()
        .map_err(|_| "units are B, KB, MB, GB, TB (powers of 1000) and KiB, MiB, GiB, TiB".to_owned())?;
    match size.as_u64() {
        0 => Err("at least 1 B".to_owned()),
        bytes if bytes > SIZE_BYTES_MAX => Err("at most 1 EiB".to_owned()),
        bytes => Ok(bytes),
    }
}

/// Writes a size in the largest unit that keeps it whole.
pub(super) fn size_in_words(bytes: u64) -> String {
    for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes >= 1 << shift && bytes.trailing_zeros() >= shift {
            return format!("{} {unit}", bytes >> shift);
        }
    }
    format!("{bytes} B")
}

/// `[A-Za-z_][A-Za-z0-9_]*`.
pub(super) fn is_variable_name(name: &str) -> bool {
    let mut characters = name.chars();
    characters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && characters.all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// `[a-z0-9][a-z0-9_-]{0,63}`.
pub(super) fn is_job_name(name: &str) -> bool {
    let inner = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    name.len() <= 64 && name.starts_with(inner) && name.chars().all(|c| inner(c) || c == '_' || c == '-')
}

/// Names that Kafka takes for a topic.
pub(super) fn check_topic(topic: &str) -> Result<(), WordProblem> {
    let shown = super::problem::quoted(topic);
    if topic.starts_with('^') {
        return Err(WordProblem::new(
            format!("not built yet: topic patterns; {shown} starts with ^"),
            "list the topics by name, so that a new topic can not come in unseen",
        ));
    }
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if topic.is_empty() || topic.len() > 249 || topic == "." || topic == ".." || !topic.chars().all(legal) {
        return Err(WordProblem::new(
            format!("{shown} can not be the name of a Kafka topic"),
            "1 to 249 letters, digits, dots, underscores and hyphens, and not \".\" or \"..\"",
        ));
    }
    Ok(())
}

/// Names that a column may have: those that Spark, Avro and SQL readers take without quotes or renaming.
pub(super) fn check_column_name(name: &str) -> Result<(), WordProblem> {
    let shown = super::problem::quoted(name);
    if !is_variable_name(name) || name.len() > NAME_CHARS_MAX {
        return Err(WordProblem::new(
            format!("{shown} can not be the name of a column"),
            "letters, digits and underscores, not starting with a digit: other names are rewritten in Avro and need \
             quotes in SQL; read the payload's own name with path = \"$.name\" or path = \"$['any name']\"",
        ));
    }
    let lower = name.to_ascii_lowercase();
    if lower.starts_with("_kafka_") || lower.starts_with("_tidemill_") {
        return Err(WordProblem::new(
            format!("column name {shown} is reserved: tidemill adds columns _kafka_* and _tidemill_* itself"),
            "take another name; where a row came from is always in _kafka_topic, _kafka_partition, _kafka_offset",
        ));
    }
    if ICEBERG_RESERVED.contains(&lower.as_str()) {
        return Err(WordProblem::new(
            format!("column name {shown} is reserved by Iceberg for metadata columns"),
            "take another name, and read the payload's own with path = \"$.name\"",
        ));
    }
    Ok(())
}

/// Splits `namespace.table`, at least two parts that are safe in a path.
pub(super) fn parse_table_name(name: &str) -> Result<Vec<String>, WordProblem> {
    let parts: Vec<&str> = name.split('.').collect();
    let legal = |part: &&str| {
        part.len() <= NAME_CHARS_MAX
            && part.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
    };
    if parts.len() < 2 {
        return Err(WordProblem::new(
            format!("table {} has no namespace", super::problem::quoted(name)),
            "write it as \"namespace.table\"",
        ));
    }
    if !parts.iter().all(legal) {
        return Err(WordProblem::new(
            format!("{} can not be the name of a table", super::problem::quoted(name)),
            "parts of letters, digits, underscores and hyphens, with one dot between two parts",
        ));
    }
    Ok(parts.into_iter().map(str::to_owned).collect())
}

/// Reads the name of an Iceberg type of format version 2.
pub(super) fn parse_type(text: &str) -> Result<PrimitiveType, WordProblem> {
    let name = text.trim();
    let simple = match name {
        "boolean" => Some(PrimitiveType::Boolean),
        "int" => Some(PrimitiveType::Int),
        "long" => Some(PrimitiveType::Long),
        "float" => Some(PrimitiveType::Float),
        "double" => Some(PrimitiveType::Double),
        "date" => Some(PrimitiveType::Date),
        "time" => Some(PrimitiveType::Time),
        "timestamp" => Some(PrimitiveType::Timestamp),
        "timestamptz" => Some(PrimitiveType::Timestamptz),
        "string" => Some(PrimitiveType::String),
        "uuid" => Some(PrimitiveType::Uuid),
        "binary" => Some(PrimitiveType::Binary),
        _ => None,
    };
    if let Some(simple) = simple {
        return Ok(simple);
    }
    let (head, arguments) = split_call(name, ['(', '['], [')', ']']);
    match (head, arguments) {
        ("decimal", Some(arguments)) => parse_decimal(arguments),
        ("fixed", Some(length)) => match length.trim().parse() {
            Ok(length) if (1..=FIXED_BYTES_MAX).contains(&length) => Ok(PrimitiveType::Fixed(length)),
            _ => Err(unknown_type(text, "a length of 1 to 4096 bytes: fixed[16]; longer values are binary")),
        },
        _ => Err(type_problem(text, head)),
    }
}

fn parse_decimal(arguments: &str) -> Result<PrimitiveType, WordProblem> {
    let numbers = arguments.split_once(',').and_then(|(precision, scale)| {
        Some((precision.trim().parse::<u32>().ok()?, scale.trim().parse::<u32>().ok()?))
    });
    match numbers {
        Some((precision, scale)) if (1..=38).contains(&precision) && scale <= precision => {
            Ok(PrimitiveType::Decimal { precision, scale })
        }
        _ => Err(unknown_type(
            &format!("decimal({arguments})"),
            "a precision of 1 to 38 and a scale up to it: decimal(10, 2)",
        )),
    }
}

fn type_problem(text: &str, head: &str) -> WordProblem {
    let instead = match head.to_ascii_lowercase().as_str() {
        "timestamp_ns" | "timestamptz_ns" => {
            return WordProblem::new(
                format!(
                    "not built yet: type {head} needs Iceberg format version 3, and tables are version 2"
                ),
                format!("take {}, which keeps microseconds", head.trim_end_matches("_ns")),
            );
        }
        "variant" | "geometry" | "geography" | "unknown" => {
            return WordProblem::new(
                format!(
                    "not built yet: type {head} needs Iceberg format version 3, and tables are version 2"
                ),
                "take the parts you query by path, and the rest as unknown_fields = \"keep\"",
            );
        }
        "struct" | "list" | "map" | "array" | "record" | "object" | "json" => {
            return WordProblem::new(
                format!("not built yet: type {head}; nested columns are read by path"),
                "one column for each value inside: path = \"$.delivery.provider\"",
            );
        }
        "bool" => "boolean",
        "integer" | "int32" | "i32" | "smallint" | "tinyint" | "short" => "int",
        "bigint" | "int64" | "i64" => "long",
        "real" | "float32" | "f32" => "float",
        "float64" | "f64" | "number" => "double",
        "numeric" | "decimal" => "decimal(10, 2)",
        "text" | "varchar" | "char" | "utf8" | "str" => "string",
        "datetime" => "timestamp",
        "timestamp with time zone" | "timestamp_tz" | "instant" => "timestamptz",
        "bytes" | "bytea" | "blob" | "varbinary" => "binary",
        "fixed" => "fixed[16]",
        other => {
            let names =
                ["boolean", "int", "long", "float", "double", "date", "time", "timestamp", "timestamptz"];
            let names = names.into_iter().chain(["string", "uuid", "binary"]);
            match nearest(other, names) {
                Some(name) => name,
                None => return unknown_type(text, "nested and version 3 types are not built yet"),
            }
        }
    };
    unknown_type(text, &format!("did you mean \"{instead}\"?"))
}

fn unknown_type(text: &str, hint: &str) -> WordProblem {
    WordProblem::new(format!("unknown type {}", super::problem::quoted(text)), hint)
}

/// Splits `name(arguments)`; no arguments if the brackets are not there.
fn split_call<const N: usize>(text: &str, open: [char; N], close: [char; N]) -> (&str, Option<&str>) {
    match text.split_once(open) {
        Some((head, rest)) => (head.trim(), rest.strip_suffix(close)),
        None => (text, None),
    }
}

/// Reads a path of member names: `$.delivery.provider`, `$['any name'].x`.
pub(super) fn parse_path(text: &str) -> Result<Vec<String>, WordProblem> {
    let bad = |hint: &str| {
        WordProblem::new(format!("{} is not a path into the payload", super::problem::quoted(text)), hint)
    };
    let Some(mut rest) = text.strip_prefix('$') else {
        return Err(bad("paths start at the payload: \"$.delivery.provider\""));
    };
    let mut path = Vec::new();
    while !rest.is_empty() {
        if path.len() == PATH_DEPTH_MAX {
            return Err(bad("at most 32 names deep"));
        }
        let (name, after) = if let Some(bracket) = rest.strip_prefix('[') {
            let Some(quote) = bracket.chars().next().filter(|c| matches!(c, '\'' | '"')) else {
                return Err(bad(
                    "array elements and wildcards are not read; set [decode] arrays = \"split\" to make \
                                rows of a payload that is an array",
                ));
            };
            let Some((name, after)) = bracket[1..].split_once(quote) else {
                return Err(bad("close the quote: $['any name']"));
            };
            let Some(after) = after.strip_prefix(']') else {
                return Err(bad("close the bracket: $['any name']"));
            };
            (name, after)
        } else if let Some(member) = rest.strip_prefix('.') {
            let end = member.find(['.', '[']).unwrap_or(member.len());
            let (name, after) = member.split_at(end);
            if name.is_empty() {
                return Err(bad("\"..\" and empty names are not read; write every name on the way"));
            }
            if name == "*" || name.contains(|c: char| c.is_whitespace() || matches!(c, ']' | '\'' | '"')) {
                return Err(bad(
                    "wildcards are not read; names with other characters stand in brackets: $['any name']",
                ));
            }
            (name, after)
        } else {
            return Err(bad("a dot stands between two names: \"$.delivery.provider\""));
        };
        path.push(name.to_owned());
        rest = after;
    }
    if path.is_empty() {
        return Err(bad("name the member to read: \"$.delivery.provider\""));
    }
    Ok(path)
}

/// A partition field as it was written: its transform and the name of its column.
pub(super) fn parse_partition(text: &str) -> Result<(Transform, String), WordProblem> {
    let shown = super::problem::quoted(text);
    let text = text.trim();
    let (head, arguments) = split_call(text, ['(', '['], [')', ']']);
    let Some(arguments) = arguments else {
        if !is_variable_name(text) {
            let hint = "a column, or day(column), hour(column), month(column), year(column), bucket(16, column), \
                        truncate(4, column)";
            return Err(WordProblem::new(format!("{shown} is not a partition field"), hint));
        }
        return Ok((Transform::Identity, text.to_owned()));
    };
    let parts: Vec<&str> = arguments.split(',').map(str::trim).collect();
    let time = |transform| match parts.as_slice() {
        [column] if is_variable_name(column) => Ok((transform, (*column).to_owned())),
        _ => Err(WordProblem::new(
            format!("{shown} is not a partition field"),
            format!("write {head}(column)"),
        )),
    };
    match head {
        "year" => time(Transform::Year),
        "month" => time(Transform::Month),
        "day" => time(Transform::Day),
        "hour" => time(Transform::Hour),
        "identity" => time(Transform::Identity),
        "bucket" | "truncate" => {
            let example = if head == "bucket" { "bucket(16, column)" } else { "truncate(4, column)" };
            let [number, column] = parts.as_slice() else {
                let found = format!("{shown} is not a partition field");
                return Err(WordProblem::new(found, format!("write {example}")));
            };
            let number = number.parse::<u32>().ok().filter(|n| (1..=TRANSFORM_ARGUMENT_MAX).contains(n));
            match number {
                Some(number) if is_variable_name(column) => {
                    let transform = if head == "bucket" {
                        Transform::Bucket(number)
                    } else {
                        Transform::Truncate(number)
                    };
                    Ok((transform, (*column).to_owned()))
                }
                _ => Err(WordProblem::new(
                    format!("{shown} is not a partition field"),
                    format!("the number comes first and is at least 1: {example}"),
                )),
            }
        }
        other => {
            let known = ["year", "month", "day", "hour", "bucket", "truncate", "identity"];
            let hint = match nearest(other, known.into_iter()) {
                Some(name) => format!("did you mean \"{name}\"?"),
                None => format!("one of {}, or a plain column", known.join(", ")),
            };
            Err(WordProblem::new(
                format!("unknown partition transform {}", super::problem::quoted(other)),
                hint,
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_words_in_whole_milliseconds() {
        assert_eq!(parse_duration("10 minutes"), Ok(Duration::from_secs(600)));
        assert_eq!(parse_duration("5m"), Ok(Duration::from_secs(300)));
        assert_eq!(parse_duration("1h 30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(parse_duration("0s"), Ok(Duration::ZERO));
        assert_eq!(parse_duration("300"), Err("a number has no unit: write \"300 seconds\"".to_owned()));
        assert_eq!(parse_duration("1us"), Err("nothing finer than a millisecond".to_owned()));
        assert_eq!(parse_duration("1000 years"), Err("at most 100 years".to_owned()));
        for bad in ["", "-5 minutes", "ten minutes", "5 lightyears", "99999999999999999999 days"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_have_a_unit_and_never_wrap() {
        assert_eq!(parse_size("1 GiB"), Ok(1 << 30));
        assert_eq!(parse_size("512MiB"), Ok(512 << 20));
        assert_eq!(parse_size("1.5 GiB"), Ok(3 << 29));
        assert_eq!(parse_size("1 GB"), Ok(1_000_000_000));
        assert_eq!(parse_size("1 EiB"), Ok(1 << 60));
        assert_eq!(parse_size("536870912"), Err("a number has no unit: write \"512 MiB\"".to_owned()));
        for bad in ["", "0 B", "0.1 B", "-1 GiB", "2 EiB", "99999999999999999999 EiB", "1 GiBs", "é", "GiB"]
        {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn paths_name_members_and_nothing_else() {
        let path = |text: &str| parse_path(text).map_err(|problem| problem.hint);
        assert_eq!(path("$.a"), Ok(vec!["a".to_owned()]));
        assert_eq!(path("$.a.b-c.d e"), Err(path("$.a b").expect_err("a blank needs brackets")));
        assert_eq!(path("$['a.b'].c[\"d e\"]"), Ok(vec!["a.b".to_owned(), "c".to_owned(), "d e".to_owned()]));
        assert_eq!(path("$['']"), Ok(vec![String::new()]));
        for bad in
            ["", "$", "a.b", "$.", "$.a.", "$..a", "$.*", "$.a[0]", "$[*]", "$['a", "$['a'", "$a", "$.a]"]
        {
            assert!(path(bad).is_err(), "{bad}");
        }
        assert!(path(&format!("${}", ".a".repeat(PATH_DEPTH_MAX))).is_ok());
        assert!(path(&format!("${}", ".a".repeat(PATH_DEPTH_MAX + 1))).is_err());
    }

    #[test]
    fn types_are_those_of_iceberg_version_2() {
        assert_eq!(parse_type("decimal(10,2)"), Ok(PrimitiveType::Decimal { precision: 10, scale: 2 }));
        assert_eq!(parse_type("decimal( 38 , 38 )"), Ok(PrimitiveType::Decimal { precision: 38, scale: 38 }));
        assert_eq!(parse_type("fixed[16]"), Ok(PrimitiveType::Fixed(16)));
        assert_eq!(parse_type("fixed(16)"), Ok(PrimitiveType::Fixed(16)));
        for bad in ["decimal(39, 2)", "decimal(2, 3)", "decimal(0, 0)", "decimal(1)", "fixed[0]", "fixed[-1]"]
        {
            assert!(parse_type(bad).is_err(), "{bad}");
        }
        let hint = |text: &str| parse_type(text).expect_err("not a type").hint;
        assert_eq!(hint("bigint"), "did you mean \"long\"?");
        assert_eq!(hint("varchar(20)"), "did you mean \"string\"?");
        assert_eq!(hint("timestmp"), "did you mean \"timestamp\"?");
        assert_eq!(hint("timestamp_ns"), "take timestamp, which keeps microseconds");
    }

    #[test]
    fn partition_fields_read_as_iceberg_writes_them() {
        let read =
            |text: &str| parse_partition(text).map(|(transform, column)| (transform.to_string(), column));
        let field = |transform: &str, column: &str| Ok((transform.to_owned(), column.to_owned()));
        assert_eq!(read("day(event_time)"), field("day", "event_time"));
        assert_eq!(read("bucket(16, user_id)"), field("bucket[16]", "user_id"));
        assert_eq!(read("bucket[16,user_id]"), field("bucket[16]", "user_id"));
        assert_eq!(read("truncate(4, x)"), field("truncate[4]", "x"));
        assert_eq!(read("channel"), field("identity", "channel"));
        for bad in [
            "",
            "day()",
            "day(a, b)",
            "bucket(0, a)",
            "bucket(a, 16)",
            "bucket(-1, a)",
            "day(a",
            "a b",
            "a-b",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        let hint = parse_partition("days(x)").expect_err("not a transform").hint;
        assert_eq!(hint, "did you mean \"day\"?");
    }

    #[test]
    fn the_nearest_name_is_offered_only_when_it_is_near() {
        let names = ["topics", "start", "properties"];
        let nearest = |name| nearest(name, names.into_iter());
        assert_eq!(nearest("topcs"), Some("topics"));
        assert_eq!(nearest("Topics"), Some("topics"));
        assert_eq!(nearest("propertys"), Some("properties"));
        assert_eq!(nearest("brokers"), None);
        assert_eq!(nearest(&"x".repeat(100_000)), None);
    }

    #[test]
    fn names_of_tables_can_not_leave_their_folder() {
        assert!(parse_table_name("events.notifications").is_ok());
        assert!(parse_table_name("a.b.c-d").is_ok());
        for bad in ["", "a", ".a", "a.", "a..b", "../a.b", "a.b/c", "a.b c", "a.%2e", "a.-b", "a.é"] {
            assert!(parse_table_name(bad).is_err(), "{bad}");
        }
    }
}
