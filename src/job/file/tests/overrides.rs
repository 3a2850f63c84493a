//! Values from outside the file, and the hash that tells whether a job's meaning changed.

use super::*;

#[test]
fn a_set_overrides_the_file_and_is_checked_like_it() {
    let job = check(
        SMALL,
        &[
            "memory=512 MiB",
            "source.kafka.topics=[\"x\"]",
            "source.kafka.properties.\"bootstrap.servers\"=h=2:9092",
            "microbatch.max_records=1_000",
            "sink.iceberg.catalog={ type = \"rest\", uri = \"${CATALOG_URI}\" }",
            "decode.columns.id.required=true",
            "name=a",
            "name=b",
        ],
    );
    let job = job.unwrap_or_else(|errors| panic!("{errors}")).job;
    assert_eq!(job.memory_bytes, 512 << 20);
    assert_eq!(job.source.topics, ["x"]);
    assert_eq!(job.source.properties["bootstrap.servers"], Setting::Plain("h=2:9092".to_owned()));
    assert_eq!(job.microbatch.records_max, 1_000);
    assert_eq!(job.sink.catalog.uri, "https://catalog/api");
    assert!(job.decode.columns[0].required);
    assert_eq!(job.name, "b", "a later one wins");

    let errors = check(SMALL, &["source.kafka.topcs=[\"a\"]", "memory=1", "x y=1", "version.x=1"])
        .expect_err("problems");
    assert_eq!(
        short(&errors),
        "--set x y: not a name that can be set\n\
         help: quote the parts that hold dots: --set 'source.kafka.properties.\"bootstrap.servers\"=host:9092'\n\
         --set source.kafka.topcs: unknown field \"topcs\" in [source.kafka]\nhelp: did you mean \"topics\"?\n\
         --set memory: memory is the integer 1\nhelp: a number has no unit: write \"1 B\"\n\
         --set version.x: version is a table"
    );
    // a variable of a value that is set from outside need not be set
    let text = edited("\"h:1\"", "\"${NOT_SET}\"");
    assert!(check(&text, &["source.kafka.properties.\"bootstrap.servers\"=h:1"]).is_ok());
}

#[test]
fn a_set_splits_at_the_first_equals_sign_outside_quotes() {
    let split = |set: &str| split_set(set).map(|(key, value)| format!("{key} | {value}"));
    assert_eq!(split("a.b=c=d"), Some("a.b | c=d".to_owned()));
    assert_eq!(split("a.\"x=y\" = 1"), Some("a.\"x=y\" |  1".to_owned()));
    assert_eq!(split("a="), Some("a | ".to_owned()));
    assert_eq!(split("a"), None);
    assert_eq!(split("\"a=b"), None);
}

#[test]
fn numbers_may_come_from_the_environment() {
    let job = accepted("", "[microbatch]\nmax_records = \"${TWELVE}\"\nmax_interval = \"${TWELVE}s\"").job;
    assert_eq!((job.microbatch.records_max, job.microbatch.open_time_max), (12, Duration::from_secs(12)));
    let said = refused("", "[microbatch]\nmax_records = \"12\"");
    assert!(said.contains("max_records is the string \"12\""), "{said}");
    let said = refused("", "[microbatch]\nmax_records = \"${PASSWORD}\"");
    assert!(said.contains("max_records is a string") && !said.contains(CANARY), "{said}");
}

#[test]
fn files_that_can_not_be_read_are_problems_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("job.toml");
    let read = |sets: &[String]| super::read(&path, sets, &environment);
    let first = |result: Result<LoadedJob, JobErrors>| result.expect_err("a problem").0[0].found.clone();
    assert!(first(read(&[])).starts_with("job file can not be read: "));
    std::fs::write(&path, b"name = \"\xff\"").expect("written");
    assert_eq!(first(read(&[])), "job file is not UTF-8: byte 8 is no part of a character");
    std::fs::write(&path, vec![b'#'; JOB_FILE_BYTES_MAX as usize + 1]).expect("written");
    assert_eq!(first(read(&[])), "job file is larger than 1048576 bytes");
    std::fs::write(&path, SMALL).expect("written");
    assert_eq!(read(&["name=m".to_owned()]).expect("a good job").job.name, "m");
    assert_eq!(first(read(&[CANARY.to_owned()])), "no = after the key");
    std::fs::write(&path, format!("\u{feff}{SMALL}")).expect("written");
    assert!(read(&[]).is_ok(), "a byte order mark is skipped");
}

#[test]
fn the_hash_stays_over_comments_order_secrets_and_knobs_and_changes_with_the_meaning() {
    let hash = |from: &str, to: &str| accepted(from, to).resolved_hash;
    let base = check(SMALL, &[]).expect("a good job").resolved_hash;
    assert_eq!(
        base, "bbbdf3672b381320d3a83de009081954",
        "the canonical form changed: ledgers of older versions hold this hash"
    );
    for (from, to) in [
        ("version = 1", "# a comment\nversion  =  0x1"),
        ("[\"a\", \"b\"]", "[ 'b',\n  'a', ]"),
        ("name = \"n\"", "name = \"n\"\nmemory = \"2 GiB\"\nstate_dir = \"/x\""),
        ("[dedup]", "[dedup]\nwindow = \"168h\""),
        ("", "[microbatch]\nmax_records = 1\nmax_interval = \"1s\""),
        ("\"h:1\"", "\"other:1\"\n\"sasl.password\" = \"env:OTHER\""),
        ("\"e.n\"", "\"e.n\"\ncatalog = { type = \"rest\", uri = \"https://c\", token = \"env:T\" }"),
        ("\"e.n\"", "\"e.n\"\ndead_letters = { table = \"e.n_dead_letters\" }"),
        ("\"e.n\"", "\"e.n\"\nmaintenance = { every_commits = 0, max_snapshots = 9 }"),
        (
            "id = { type = \"string\" }",
            "id = { path = \"$['id']\", type = \"string\", from = \"value\", required = false }",
        ),
    ] {
        assert_eq!(hash(from, to), base, "{to}");
    }
    let mut hashes = BTreeSet::from([base]);
    for (from, to) in [
        ("name = \"n\"", "name = \"m\""),
        ("[\"a\", \"b\"]", "[\"a\"]"),
        ("[\"a\", \"b\"]", "[\"a\", \"b\"]\nstart = \"latest\""),
        ("[\"a\", \"b\"]", "[\"a\", \"b\"]\nstart = 2026-01-01T00:00:00Z"),
        ("[\"a\", \"b\"]", "[\"a\", \"b\"]\nstart = { a = { 0 = 1 } }"),
        ("[\"a\", \"b\"]", "[\"a\", \"b\"]\nstart = { b = { 0 = 1 } }"),
        ("[decode.columns]", "[decode]\nunknown_fields = \"keep\"\n[decode.columns]"),
        ("[decode.columns]", "[decode]\narrays = \"split\"\n[decode.columns]"),
        ("[decode.columns]", "[decode]\nmax_record = \"1 MiB\"\n[decode.columns]"),
        ("id = { type = \"string\" }", "id = { type = \"binary\" }"),
        ("id = { type = \"string\" }", "id = { type = \"string\", required = true }"),
        ("id = { type = \"string\" }", "id = { type = \"string\", path = \"$.a.b\" }"),
        ("id = { type = \"string\" }", "id = { type = \"string\", path = \"$['a.b']\" }"),
        ("id = { type = \"string\" }", "id = { type = \"string\", from = \"key\" }"),
        ("id = { type = \"string\" }", "id = { type = \"string\", from = \"header:key\" }"),
        ("amount = { type = \"double\" }", ""),
        ("unit = \"ms\"", "unit = \"s\""),
        ("[event_time]", "[event_time]\nwatermark_delay = \"11 minutes\""),
        ("[event_time]", "[event_time]\nallowed_lateness = \"11 minutes\""),
        ("[event_time]", "[event_time]\nlate = \"side\""),
        ("[event_time]", "[event_time]\nlate = \"drop\""),
        ("[dedup]", "[dedup]\nbeyond_window = \"side\""),
        ("[event_time]", "[event_time]\nmax_ahead = \"11 minutes\""),
        ("[event_time]", "[event_time]\nidle_after = \"11 minutes\""),
        ("[\"id\"]", "[\"id\", \"ts\"]"),
        ("[\"id\"]", "[\"ts\", \"id\"]"),
        ("[dedup]", "[dedup]\nwindow = \"8 days\""),
        ("[dedup]", "[dedup]\nrepeats = \"same_time\""),
        ("[dedup]", "[dedup]\nshards = 512"),
        ("[dedup]", "[dedup]\nrepeats = \"same_time\"\nbucket_from = \"uuid7\""),
        ("[dedup]", "[dedup]\nrepeats = \"same_time\"\nbucket_from = \"ulid\""),
        ("\"e.n\"", "\"e.m\""),
        ("\"e.n\"", "\"e.n\"\npartition_by = [\"day(ts)\"]"),
        ("\"e.n\"", "\"e.n\"\npartition_by = [\"hour(ts)\"]"),
        ("\"e.n\"", "\"e.n\"\ntable_properties = { a = \"b\" }"),
        ("\"e.n\"", "\"e.n\"\ndead_letters = { table = \"e.x\" }"),
        ("\"e.n\"", "\"e.n\"\ndead_letters = { max_ratio = 0.1 }"),
    ] {
        assert!(hashes.insert(hash(from, to)), "{to}");
    }
}
