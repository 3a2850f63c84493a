//! `[sink.iceberg]`: tables, partition fields and the catalog.

use std::collections::{BTreeMap, BTreeSet};

use iceberg::spec::{PrimitiveType, Transform, Type};

use super::problem::quoted;
use super::reader::{Field, Section};
use super::settings::read_setting;
use super::tree::{Value, has_user_info, looks_secret};
use super::words;
use crate::job::{
    CATALOG_URI_DEFAULT, CatalogConfig, CatalogKind, DEAD_LETTER_RATIO_MAX_DEFAULT, DEAD_LETTERS_SUFFIX,
    DeadLetterSink, IcebergSink, LATE_SUFFIX, LateSink, MaintenanceRule, ORPHAN_AGE_MIN, OnRollback,
    PartitionField, WAREHOUSE_DEFAULT,
};

/// Properties of object stores, under the names that the iceberg crate and pyiceberg share.
const STORAGE_PROPERTIES: [&str; 14] = [
    "s3.endpoint",
    "s3.region",
    "s3.access-key-id",
    "s3.secret-access-key",
    "s3.session-token",
    "s3.path-style-access",
    "s3.sse.type",
    "s3.sse.key",
    "s3.sse.md5",
    "s3.allow-anonymous",
    "client.region",
    "client.assume-role.arn",
    "client.assume-role.external-id",
    "client.assume-role.session-name",
];
/// Properties of REST catalogs beside `header.*`.
const REST_PROPERTIES: [&str; 7] =
    ["credential", "token", "scope", "audience", "resource", "oauth2-server-uri", "prefix"];
/// Properties of the SQL catalog.
const SQL_PROPERTIES: [&str; 3] = ["pool.max-connections", "pool.idle-timeout", "pool.test-before-acquire"];

/// Reads `[sink.iceberg]`. `types` are the job's columns, with the type of those whose type is known.
pub(super) fn read_iceberg(
    section: Option<Section<'_, '_>>,
    types: &BTreeMap<String, Option<PrimitiveType>>,
) -> IcebergSink {
    let mut sink = IcebergSink {
        table: Vec::new(),
        partition_by: Vec::new(),
        catalog: CatalogConfig {
            kind: CatalogKind::Sql,
            uri: CATALOG_URI_DEFAULT.to_owned(),
            warehouse: WAREHOUSE_DEFAULT.to_owned(),
            properties: BTreeMap::new(),
        },
        table_properties: BTreeMap::new(),
        dead_letters: DeadLetterSink { table: Vec::new(), ratio_max: DEAD_LETTER_RATIO_MAX_DEFAULT },
        late: LateSink { table: Vec::new() },
        on_rollback: OnRollback::Stop,
        maintenance: MaintenanceRule::default(),
    };
    let Some(mut section) = section else { return sink };
    if let Some(field) = section.need("table", "\"namespace.table\"") {
        sink.table = read_table_name(&field).unwrap_or_default();
    }
    if let Some(field) = section.get("partition_by") {
        sink.partition_by = read_partition_by(&field, types);
    }
    if let Some(catalog) = section.get("catalog").and_then(|field| field.table()) {
        sink.catalog = read_catalog(catalog).unwrap_or(sink.catalog);
    }
    if let Some(properties) = section.get("table_properties").and_then(|field| field.table()) {
        sink.table_properties = read_table_properties(properties);
    }
    sink.dead_letters = read_dead_letters(section.table("dead_letters"), &sink.table);
    sink.late = read_late(section.table("late"), &sink.table, &sink.dead_letters.table);
    if let Some(field) = section.get("on_rollback") {
        let words = [("stop", OnRollback::Stop), ("replay", OnRollback::Replay)];
        sink.on_rollback = field.choice(&words, &[]).unwrap_or(OnRollback::Stop);
    }
    sink.maintenance = read_maintenance(section.table("maintenance"));
    section.not_built("duplicates", "a table for duplicates; they are counted, and `audit` finds them again");
    section.finish();
    sink
}

fn read_table_name(field: &Field<'_, '_>) -> Option<Vec<String>> {
    let text = field.text_expecting("\"namespace.table\"")?;
    match words::parse_table_name(text) {
        Ok(parts) => Some(parts),
        Err(problem) => {
            field.wrong(problem.found).expecting("\"namespace.table\"").hinting(problem.hint);
            None
        }
    }
}

fn read_dead_letters(mut section: Section<'_, '_>, main: &[String]) -> DeadLetterSink {
    let mut table = main.to_vec();
    if let Some(name) = table.last_mut() {
        name.push_str(DEAD_LETTERS_SUFFIX);
    }
    let mut sink = DeadLetterSink { table, ratio_max: DEAD_LETTER_RATIO_MAX_DEFAULT };
    if let Some(field) = section.get("table")
        && let Some(table) = read_table_name(&field)
    {
        if table.join(".").eq_ignore_ascii_case(&main.join(".")) {
            field
                .wrong("dead letters would go to the main table")
                .expecting("another table")
                .hinting("leave it out");
        }
        sink.table = table;
    }
    if let Some(field) = section.get("max_ratio") {
        sink.ratio_max = field.ratio().unwrap_or(DEAD_LETTER_RATIO_MAX_DEFAULT);
    }
    section.finish();
    sink
}

fn read_late(mut section: Section<'_, '_>, main: &[String], dead_letters: &[String]) -> LateSink {
    let mut table = main.to_vec();
    if let Some(name) = table.last_mut() {
        name.push_str(LATE_SUFFIX);
    }
    if let Some(field) = section.get("table")
        && let Some(named) = read_table_name(&field)
    {
        for (other, what) in [(main, "main table"), (dead_letters, "dead-letter table")] {
            if named.join(".").eq_ignore_ascii_case(&other.join(".")) {
                field
                    .wrong(format!("late rows would go to the {what}"))
                    .expecting("another table")
                    .hinting("leave it out");
            }
        }
        table = named;
    }
    section.finish();
    LateSink { table }
}

fn read_maintenance(mut section: Section<'_, '_>) -> MaintenanceRule {
    let mut rule = MaintenanceRule::default();
    if let Some(field) = section.get("every_commits")
        && let Some(commits) = read_count(&field, 0, "a number of commits, or 0 for none")
    {
        rule.every_commits = commits;
    }
    if let Some(field) = section.get("max_snapshots") {
        rule.snapshots_max = read_count(&field, 1, "a number of snapshots, at least 1");
    }
    if let Some(field) = section.get("orphans_older_than")
        && let Some(age) = field.duration()
    {
        rule.orphan_age = age;
        if age < ORPHAN_AGE_MIN {
            field
                .wrong(format!("orphans_older_than is {}", field.shown()))
                .expecting("at least \"1 hour\": a file may be in the making");
        }
    }
    section.not_built("compact", "compaction of data files; any engine that can may do it on the same table");
    section.finish();
    rule
}

fn read_count(field: &Field<'_, '_>, least: u32, expected: &str) -> Option<u32> {
    let number = field.integer()?;
    let count = u32::try_from(number).ok().filter(|count| *count >= least);
    if count.is_none() {
        field.wrong(format!("{} is {number}", field.name())).expecting(expected);
    }
    count
}

fn read_partition_by(
    field: &Field<'_, '_>,
    types: &BTreeMap<String, Option<PrimitiveType>>,
) -> Vec<PartitionField> {
    let mut fields = Vec::new();
    let mut names = BTreeSet::new();
    let mut time_columns = BTreeSet::new();
    let elements = field.texts("an array of partition fields: [\"day(event_time)\"]").unwrap_or_default();
    for (element, text) in elements {
        let (transform, column) = match words::parse_partition(text) {
            Ok(field) => field,
            Err(problem) => {
                element.wrong(problem.found).hinting(problem.hint);
                continue;
            }
        };
        let Some(column_type) = find_column(&element, "partition_by", &column, types) else { continue };
        if transform.result_type(&Type::Primitive(column_type.clone())).is_err() {
            let name = quoted(&column);
            element
                .wrong(format!(
                    "{} does not fit column {name} of type {column_type}",
                    transform_name(&transform)
                ))
                .expecting(fitting_types(&transform));
            continue;
        }
        // Iceberg names a partition field after its column and transform, next to the columns
        let field = PartitionField { column, transform };
        let (name, PartitionField { column, transform }) = (field.name(), &field);
        if !names.insert(name.clone()) {
            element.wrong(format!("partition field {} stands twice", quoted(&name))).hinting("name it once");
        } else if *transform != Transform::Identity
            && types.keys().any(|column| column.eq_ignore_ascii_case(&name))
        {
            element
                .wrong(format!("partition field {} has the name of a column", quoted(&name)))
                .hinting("rename the column");
        } else if is_time(transform) && !time_columns.insert(column.clone()) {
            element
                .wrong(format!("column {} is cut by time twice", quoted(column)))
                .hinting("keep the finer one: a table by hour is also one by day");
        } else {
            fields.push(field);
        }
    }
    fields
}

/// Type of a column that a field names; reports one that is not there. `None` also if its type is not known.
pub(super) fn find_column(
    field: &Field<'_, '_>,
    what: &str,
    column: &str,
    types: &BTreeMap<String, Option<PrimitiveType>>,
) -> Option<PrimitiveType> {
    if let Some(column_type) = types.get(column) {
        return column_type.clone();
    }
    // without any column the missing table is what to report
    if types.is_empty() {
        return None;
    }
    let pending = field
        .wrong(format!("{what} names {}, which is not in [decode.columns]", quoted(column)))
        .expecting("the name of a column of the job");
    if let Some(nearest) = words::nearest(column, types.keys().map(String::as_str)) {
        pending.hinting(format!("did you mean {nearest:?}?"));
    } else if crate::job::METADATA_COLUMNS.iter().any(|(name, ..)| *name == column) {
        pending.hinting("read it into a column of the job: { type = \"string\", from = \"topic\" }");
    }
    None
}

fn transform_name(transform: &Transform) -> &'static str {
    match transform {
        Transform::Year => "year",
        Transform::Month => "month",
        Transform::Day => "day",
        Transform::Hour => "hour",
        Transform::Bucket(_) => "bucket",
        Transform::Truncate(_) => "truncate",
        Transform::Identity | Transform::Void | Transform::Unknown => "identity",
    }
}

fn fitting_types(transform: &Transform) -> &'static str {
    match transform {
        Transform::Hour => "a column of type timestamp or timestamptz",
        Transform::Year | Transform::Month | Transform::Day => {
            "a column of type date, timestamp or timestamptz"
        }
        Transform::Truncate(_) => "a column of type int, long, decimal, string or binary",
        _ => "a column of any type but boolean, float and double",
    }
}

fn is_time(transform: &Transform) -> bool {
    matches!(transform, Transform::Year | Transform::Month | Transform::Day | Transform::Hour)
}

fn read_table_properties(section: Section<'_, '_>) -> BTreeMap<String, String> {
    let mut properties = BTreeMap::new();
    for (entry, field) in section.free_entries() {
        let name = entry.name.as_str();
        if name.is_empty() || name.starts_with("tidemill.") {
            let found = format!("table property {} can not be set", quoted(name));
            section.wrong_name(entry, found).hinting("names that start with \"tidemill.\" are the ledger's");
            continue;
        }
        let is_reference = |text: &str| text.starts_with("env:") || looks_secret(name);
        if field.text_node().is_some_and(|text| is_reference(&text.text)) {
            field.wrong(format!("table property {} looks like a secret", quoted(name))).hinting(
                "table properties stand in the open in the table's metadata; secrets go to `catalog`",
            );
            continue;
        }
        let Some(value) = read_setting(entry, &field, false).and_then(|setting| match setting {
            crate::job::Setting::Plain(value) => Some(value),
            _ => {
                field
                    .wrong(format!("table property {} is a reference", quoted(name)))
                    .expecting("a plain value");
                None
            }
        }) else {
            continue;
        };
        if name == "format-version" && value != "2" {
            field
                .wrong(format!("format-version is {}", quoted(&value)))
                .expecting("\"2\"")
                .hinting("leave it out");
            continue;
        }
        properties.insert(name.to_owned(), value);
    }
    section.finish_free();
    properties
}

fn read_catalog(mut section: Section<'_, '_>) -> Option<CatalogConfig> {
    let type_field = section.need("type", "\"sql\" or \"rest\"");
    let uri = section.get("uri");
    let warehouse = section.get("warehouse");
    const ONLY: &str = "sql (SQLite) and rest are, and most catalogs also speak Iceberg REST";
    let later =
        ["glue", "hms", "hive", "s3tables", "nessie", "unity", "polaris", "hadoop", "dynamodb", "jdbc"]
            .map(|name| (name, ONLY));
    let kind = type_field
        .and_then(|field| field.choice(&[("sql", CatalogKind::Sql), ("rest", CatalogKind::Rest)], &later));
    let Some(kind) = kind else {
        section.finish_free();
        return None;
    };
    let properties = read_catalog_properties(&section, kind);
    let (uri, warehouse) = match kind {
        CatalogKind::Sql => {
            let uri = uri
                .and_then(|field| read_sqlite_uri(&field))
                .unwrap_or_else(|| CATALOG_URI_DEFAULT.to_owned());
            let warehouse = warehouse
                .and_then(|field| read_warehouse(&field))
                .unwrap_or_else(|| WAREHOUSE_DEFAULT.to_owned());
            (uri, warehouse)
        }
        CatalogKind::Rest => {
            if uri.is_none() {
                section.missing("uri", "the address of the REST catalog: \"https://host/path\"");
            }
            let uri = uri.and_then(|field| read_rest_uri(&field, &properties)).unwrap_or_default();
            // a name or a location, as the catalog understands it; its own default if it is left out
            let warehouse = warehouse.and_then(|field| field.text().map(str::to_owned)).unwrap_or_default();
            (uri, warehouse)
        }
    };
    section.finish_free();
    Some(CatalogConfig { kind, uri, warehouse, properties })
}

fn read_catalog_properties(
    section: &Section<'_, '_>,
    kind: CatalogKind,
) -> BTreeMap<String, crate::job::Setting> {
    let own: &[&str] = match kind {
        CatalogKind::Sql => &SQL_PROPERTIES,
        CatalogKind::Rest => &REST_PROPERTIES,
    };
    let known = || own.iter().chain(&STORAGE_PROPERTIES).copied();
    let mut properties = BTreeMap::new();
    for (entry, field) in section.other_entries() {
        let name = entry.name.as_str();
        let is_header =
            kind == CatalogKind::Rest && name.strip_prefix("header.").is_some_and(|rest| !rest.is_empty());
        if !is_header && !known().any(|known| known == name) && !matches!(field.value(), Value::Table(_)) {
            let fields = section.taken().iter().copied();
            let pending = section.wrong_name(entry, format!("unknown catalog property {}", quoted(name)));
            match words::nearest(name, fields.chain(known())) {
                Some(nearest) => drop(pending.hinting(format!("did you mean {nearest:?}?"))),
                None => drop(pending.expecting(known().collect::<Vec<_>>().join(", "))),
            }
            continue;
        }
        let secret = looks_secret(name);
        if let Some(setting) = read_setting(entry, &field, secret) {
            properties.insert(name.to_owned(), setting);
        }
    }
    properties
}

fn read_sqlite_uri(field: &Field<'_, '_>) -> Option<String> {
    const EXPECTED: &str = "\"sqlite:PATH\", as in \"sqlite:./warehouse/catalog.db\"";
    let text = field.text_expecting(EXPECTED)?;
    let Some(path) = text.strip_prefix("sqlite:") else {
        let scheme = text.split_once(':').map_or("", |(scheme, _)| scheme);
        let pending = field.wrong(format!("uri is {}", field.shown())).expecting(EXPECTED);
        match scheme {
            "http" | "https" => drop(pending.hinting("an http address is of type = \"rest\"")),
            "postgres" | "postgresql" | "mysql" => {
                drop(pending.hinting(
                    "SQL catalogs other than SQLite are not built yet; put a REST catalog before it",
                ))
            }
            _ => {}
        }
        return None;
    };
    let path = path.strip_prefix("//").unwrap_or(path);
    if path.is_empty() || path.starts_with(":memory:") || path.contains(['?', '\0']) {
        let hint = "the catalog must outlive the run: name a file, without ? and options";
        field.wrong(format!("uri is {}", field.shown())).expecting(EXPECTED).hinting(hint);
        return None;
    }
    check_path(field, path).then(|| text.to_owned())
}

fn read_warehouse(field: &Field<'_, '_>) -> Option<String> {
    const EXPECTED: &str = "a folder, \"file:///path\" or \"s3://bucket/path\"";
    let text = field.text_expecting(EXPECTED)?;
    let wrong = |hint: &str| {
        let pending = field.wrong(format!("warehouse is {}", field.shown())).expecting(EXPECTED);
        if !hint.is_empty() {
            pending.hinting(hint);
        }
        None
    };
    let path = match text.split_once("://") {
        Some(("file", path)) if path.starts_with('/') => path,
        Some(("file", _)) => return wrong("file:// is followed by an absolute path: file:///data/warehouse"),
        Some(("s3" | "s3a" | "s3n", path)) if !path.is_empty() && !path.starts_with('/') => path,
        Some(("s3" | "s3a" | "s3n", _)) => return wrong("s3:// is followed by the name of a bucket"),
        Some((scheme, _)) => {
            field
                .wrong(format!("not built yet: a warehouse on {}://", scheme.escape_debug()))
                .expecting(EXPECTED);
            return None;
        }
        None => text,
    };
    if path.is_empty() || path.contains(['?', '#', '\0']) {
        return wrong("other programs read ? and # as parts of an address");
    }
    check_path(field, path).then(|| text.to_owned())
}

/// Refuses what a path does not mean the same everywhere: `..` depends on links and on where the program was started,
/// and would stand so in table metadata; `~` is a name like any other outside a shell.
pub(super) fn check_path(field: &Field<'_, '_>, path: &str) -> bool {
    if path.split('/').any(|part| part == "..") {
        let hint = "write the path without it, absolute if need be";
        field.wrong(format!("{} leaves its folder by \"..\"", field.name())).hinting(hint);
        return false;
    }
    if path.starts_with('~') {
        field
            .wrong(format!("{} is {}", field.name(), field.shown()))
            .hinting("write ${HOME} for the home folder");
        return false;
    }
    true
}

fn read_rest_uri(
    field: &Field<'_, '_>,
    properties: &BTreeMap<String, crate::job::Setting>,
) -> Option<String> {
    const EXPECTED: &str = "the address of the REST catalog: \"https://host/path\"";
    let text = field.text_expecting(EXPECTED)?;
    if has_user_info(text) {
        field
            .wrong("uri holds a name or password")
            .hinting("write credential = \"env:NAME\", and the address without it");
        return None;
    }
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let host = host.map(|rest| rest.split(['/', '?', '#']).next().unwrap_or_default());
    if host.is_none_or(str::is_empty) || text.contains(|c: char| c.is_whitespace() || c.is_control()) {
        let pending = field.wrong(format!("uri is {}", field.shown())).expecting(EXPECTED);
        if text.starts_with("sqlite:") {
            pending.hinting("a SQLite file is of type = \"sql\"");
        }
        return None;
    }
    let local = ["localhost", "127.0.0.1", "[::1]"];
    let is_local = host
        .is_some_and(|host| local.iter().any(|name| host == *name || host.starts_with(&format!("{name}:"))));
    let has_secret = properties.keys().any(|name| looks_secret(name) && !name.starts_with("s3."));
    if text.starts_with("http://") && has_secret && !is_local {
        field.warn("the catalog's credential crosses the network unencrypted".to_owned(), "use https://");
    }
    Some(text.to_owned())
}
