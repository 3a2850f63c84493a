//! Reads a job file: TOML in, a checked [`Job`] out, or every mistake in it with its place and the way out.
//!
//! Flow: [`JobSource`] -> `tree` (TOML, `--set` laid over it, `${NAME}` filled in) -> `reader` (strict tables) ->
//! one reading function per table (`kafka`, `columns`, `iceberg`, and the small ones here) -> [`LoadedJob`].
//!
//! Rules
//! 1. Strict: a name that nobody reads is a problem, with the nearest known name. So is every value that could not
//!    work; nothing is rounded, clamped or ignored.
//! 2. Complete: all problems are reported at once. A TOML syntax error and another `version` stand alone, since
//!    nothing behind them can be trusted.
//! 3. What is planned and not built is refused by name and says what to do instead.
//! 4. Secrets are references (`env:NAME`, `file:PATH`); their values are never read here and no message shows a
//!    literal that stands where a reference should.
//! 5. Pure but for [`JobSource::load`]: the environment is passed in, no clock, no network.
//!
//! `${NAME}` and `${NAME:-default}` work in every string, `$$` is `$`; names of fields are never filled in. A number or
//! boolean may come from the environment: `max_records = "${MAX_RECORDS:-1000}"`.
//!
//! Relative paths (`state_dir`, the SQLite file, a warehouse folder, `file:` secrets) start at the current working
//! directory of the process, not at the job file.
//!
//! Bounds: a file of 1 MiB, values nested 80 deep, 1000 columns, paths 32 names deep, 100 problems told.

mod columns;
mod hash;
mod iceberg;
mod kafka;
mod problem;
mod reader;
mod settings;
mod syntax;
#[cfg(test)]
mod tests;
mod tree;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::{Path, PathBuf};

use ::iceberg::spec::PrimitiveType;

use self::problem::PROBLEMS_MAX;
pub use self::problem::{JobErrors, Problem};
use self::reader::{Desk, Section};
use self::tree::{Environment, JOB_FILE_BYTES_MAX, has_user_info};
use super::{
    AHEAD_MAX_DEFAULT, ALLOWED_LATENESS_DEFAULT, BeyondWindow, BucketFrom, COPY_RATE_DEFAULT, Dedup,
    EventTimeRule, IDLE_AFTER_DEFAULT, IdKind, JOB_FORMAT_VERSION, Job, LatePolicy, MEMORY_BYTES_DEFAULT,
    MicrobatchLimits, OPEN_TIME_MAX_DEFAULT, OnMissingKeys, PAYLOAD_BYTES_MAX_DEFAULT, RECORDS_MAX_DEFAULT,
    Repeats, SHARDS_DEFAULT, SHARDS_MAX, STATE_DIR_DEFAULT, StateCopies, THREADS_MAX,
    WATERMARK_DELAY_DEFAULT, WINDOW_DEFAULT,
};

/// A job file's text and what the command line lays over it.
#[derive(Debug, Clone)]
pub struct JobSource {
    /// The file, as messages show it.
    pub path: PathBuf,
    /// Its text.
    pub text: String,
    /// From `--set key=value`, in the order given; a later one wins.
    pub sets: Vec<(String, String)>,
}

/// A job that was read and checked.
#[derive(Debug, Clone)]
pub struct LoadedJob {
    /// The job.
    pub job: Job,
    /// XXH3-128 of what the job asks for, 32 hex digits: stands in the ledger. Unchanged by comments, format, memory,
    /// state folder, microbatch limits, and by how Kafka and the catalog are reached, secrets included.
    pub resolved_hash: String,
    /// What is not wrong but should be known, in no particular order.
    pub warnings: Vec<Problem>,
    /// Keys of `--set`.
    sets: Vec<String>,
}

impl LoadedJob {
    /// Whether `--set` gave this field, by its dotted name, or a table that it is in.
    pub fn is_set(&self, field: &str) -> bool {
        let is_in = |table: &String| field.strip_prefix(table).is_some_and(|rest| rest.starts_with('.'));
        self.sets.iter().any(|key| key == field || is_in(key))
    }
}

/// Reads and checks a job file. `sets` are the values of `--set`, each `key=value`.
///
/// # Errors
/// All problems of the file, or the one that keeps it from being read.
pub fn read(
    path: &Path,
    sets: &[String],
    env: &dyn Fn(&str) -> Option<String>,
) -> Result<LoadedJob, JobErrors> {
    JobSource::load(path, sets)?.check(env)
}

impl JobSource {
    /// Reads the file and splits `--set key=value`.
    ///
    /// # Errors
    /// A file that is missing, too large or not UTF-8, and a `--set` without `=`.
    pub fn load(path: &Path, sets: &[String]) -> Result<Self, JobErrors> {
        let mut bytes = Vec::new();
        std::fs::File::open(path)
            .and_then(|file| file.take(JOB_FILE_BYTES_MAX + 1).read_to_end(&mut bytes))
            .map_err(|error| {
                let label = path.display().to_string();
                let found = format!("job file can not be read: {error}");
                JobErrors(vec![Problem::of_file(&label, found, "")])
            })?;
        Self::of_bytes(path, bytes, sets)
    }

    /// [`JobSource::load`] of a file that was read.
    pub(crate) fn of_bytes(path: &Path, bytes: Vec<u8>, sets: &[String]) -> Result<Self, JobErrors> {
        let label = path.display().to_string();
        let alone = |found: String, hint: &str| JobErrors(vec![Problem::of_file(&label, found, hint)]);
        if bytes.len() as u64 > JOB_FILE_BYTES_MAX {
            return Err(alone(
                format!("job file is larger than {JOB_FILE_BYTES_MAX} bytes"),
                "is it a job file?",
            ));
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let at = error.utf8_error().valid_up_to();
            alone(format!("job file is not UTF-8: byte {at} is no part of a character"), "save it as UTF-8")
        })?;
        let mut split = Vec::with_capacity(sets.len());
        let mut problems = Vec::new();
        for set in sets {
            match split_set(set) {
                Some(pair) => split.push(pair),
                None => problems.push(
                    // the argument is not repeated: it may be a secret with its key forgotten
                    Problem::of_file("--set", "no = after the key".to_owned(), "write --set key=value"),
                ),
            }
        }
        if !problems.is_empty() {
            return Err(JobErrors(problems));
        }
        Ok(Self { path: path.to_owned(), text, sets: split })
    }

    /// Checks the text. Reads nothing but `env`.
    ///
    /// # Errors
    /// All problems, in the order of the text; those of `--set` come last.
    pub fn check(&self, env: &dyn Fn(&str) -> Option<String>) -> Result<LoadedJob, JobErrors> {
        self.check_with(env, &mut |_| {})
    }

    /// [`JobSource::check`], which also shows the fields that were asked for.
    fn check_with(
        &self,
        env: Environment<'_>,
        see_known: &mut dyn FnMut(BTreeSet<(String, &'static str)>),
    ) -> Result<LoadedJob, JobErrors> {
        let mut problems = Vec::new();
        let label = self.path.display().to_string();
        let text = self.text.strip_prefix('\u{feff}').unwrap_or(&self.text);
        let Some(tree) = tree::plant(&label, text, &self.sets, env, &mut problems) else {
            return Err(JobErrors(problems));
        };
        let desk = Desk::new(&tree.sources);
        let mut root = desk.root(&tree.root);
        if !read_version(&mut root) {
            return Err(JobErrors(desk.close().0));
        }
        let job = read_job(root);
        see_known(desk.known());
        let (read_problems, warnings) = desk.close();
        problems.extend(read_problems);
        if !problems.is_empty() {
            // a stable sort by place: problems of filling in were found before those of reading
            problems.sort_by_key(|problem| (problem.line == 0, problem.line, problem.column));
            if problems.len() > PROBLEMS_MAX {
                let more = format!("{} more problems", problems.len() - PROBLEMS_MAX);
                problems.truncate(PROBLEMS_MAX);
                problems.push(Problem::of_file(&label, more, "mend those above first"));
            }
            return Err(JobErrors(problems));
        }
        let resolved_hash = hash::hash(&job);
        let sets = self.sets.iter().map(|(key, _)| key.clone()).collect();
        Ok(LoadedJob { job, resolved_hash, warnings, sets })
    }
}

/// Splits at the first `=` outside quotes: names may be quoted because they hold dots, and may then hold `=` too.
fn split_set(set: &str) -> Option<(String, String)> {
    let mut quote = None;
    for (at, character) in set.char_indices() {
        match (quote, character) {
            (None, '=') => return Some((set[..at].trim().to_owned(), set[at + 1..].to_owned())),
            (None, '"' | '\'') => quote = Some(character),
            (Some(open), _) if open == character => quote = None,
            _ => {}
        }
    }
    None
}

/// Whether the file is of the version that this program reads. If not, nothing else is worth a message.
fn read_version(root: &mut Section<'_, '_>) -> bool {
    let expected = format!("version = {JOB_FORMAT_VERSION}");
    let Some(field) = root.need("version", &expected) else { return true };
    match field.integer() {
        None => true,
        Some(JOB_FORMAT_VERSION) => true,
        Some(version) => {
            let hint = if version > JOB_FORMAT_VERSION {
                "the file is of a newer tidemill: update the program"
            } else {
                ""
            };
            let pending = field.wrong(format!("job-file version {version}")).expecting(expected);
            if !hint.is_empty() {
                pending.hinting(hint);
            }
            false
        }
    }
}

/// The whole file, table by table. Answers a job even if there were problems: it is good only if there were none.
fn read_job(mut root: Section<'_, '_>) -> Job {
    let name = read_name(&mut root);
    let memory_bytes = root.get("memory").and_then(|field| field.size()).unwrap_or(MEMORY_BYTES_DEFAULT);
    let threads = read_threads(&mut root);
    let state_dir = read_state_dir(&mut root);
    let state_copies = read_state_copies(root.table("state"));

    let mut source_section = root.table("source");
    source_section.not_built("rabbitmq", "[source.rabbitmq]; only [source.kafka] can be read");
    source_section.not_built("file", "[source.file]; only [source.kafka] can be read");
    let mut source = kafka::read_kafka(source_section.need_table("kafka", "topics and properties"));
    source_section.finish();

    let decoded = columns::read_decode(root.need_table("decode", "columns, in [decode.columns]"));
    source.record_bytes_max = decoded.record_bytes_max;
    let dedup = read_dedup(root.need_table("dedup", "at least key = [\"event_id\"]"), &decoded.types);
    let event_time = read_event_time(
        root.need_table("event_time", "at least column = \"event_time\""),
        &dedup,
        &decoded.types,
    );
    let microbatch = read_microbatch(root.table("microbatch"), decoded.record_bytes_max);

    let mut sink_section = root.table("sink");
    sink_section.not_built("kafka", "[sink.kafka]; only [sink.iceberg] can be written");
    sink_section.not_built("postgres", "[sink.postgres]; only [sink.iceberg] can be written");
    let sink = iceberg::read_iceberg(
        sink_section.need_table("iceberg", "at least table = \"namespace.table\""),
        &decoded.types,
    );
    sink_section.finish();

    root.not_built("rules", "[rules] (where, checks, sql); filter when reading the table, or before Kafka");
    root.not_built("enrich", "[enrich]; join when reading the table");
    root.not_built("inputs", "[inputs]; a job reads the topics of [source.kafka] alone");
    root.finish();
    Job {
        name,
        memory_bytes,
        threads,
        state_dir,
        state_copies,
        source,
        decode: decoded.decode,
        event_time,
        dedup,
        microbatch,
        sink,
    }
}

fn read_name(root: &mut Section<'_, '_>) -> String {
    const EXPECTED: &str = "1 to 64 of a-z, 0-9, _ and -, starting with a letter or digit";
    let Some(field) = root.need("name", EXPECTED) else { return String::new() };
    let Some(name) = field.text_expecting(EXPECTED) else { return String::new() };
    if !words::is_job_name(name) {
        field.wrong(format!("name is {}", field.shown())).expecting(EXPECTED);
    }
    name.to_owned()
}

/// As many as there are processors, unless the job says how many.
fn read_threads(root: &mut Section<'_, '_>) -> NonZeroUsize {
    const EXPECTED: &str = "1 to 1024";
    let default = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    let Some(field) = root.get("threads") else { return default };
    let Some(number) = field.integer() else { return default };
    let threads = usize::try_from(number).ok().filter(|threads| *threads <= THREADS_MAX);
    threads.and_then(NonZeroUsize::new).unwrap_or_else(|| {
        field.wrong(format!("threads is {number}")).expecting(EXPECTED);
        default
    })
}

fn read_state_dir(root: &mut Section<'_, '_>) -> PathBuf {
    let default = || PathBuf::from(STATE_DIR_DEFAULT);
    let Some(field) = root.get("state_dir") else { return default() };
    let Some(path) = field.text_expecting("a folder, as in \"./state\"") else { return default() };
    if path.is_empty() || path.contains('\0') {
        field.wrong("state_dir names no folder").expecting("a folder, as in \"./state\"");
    } else if path.contains("://") {
        field.wrong(format!("state_dir is {}", field.shown())).expecting("a folder of this machine");
    } else {
        iceberg::check_path(&field, path);
    }
    PathBuf::from(path)
}

/// `[state]`: where copies of the state go, and how fast.
fn read_state_copies(mut section: Section<'_, '_>) -> Option<StateCopies> {
    const EXPECTED: &str = "a folder, file:///path or s3://bucket/path";
    let mut bytes_per_second = COPY_RATE_DEFAULT;
    if let Some(field) = section.get("copy_rate") {
        bytes_per_second = field.size().unwrap_or(COPY_RATE_DEFAULT);
        if bytes_per_second == 0 {
            field
                .wrong("copy_rate is 0: nothing would ever be copied")
                .expecting("bytes in a second, as in \"32 MiB\"");
        }
    }
    let copies = section.get("copy_to").and_then(|field| {
        // Nowhere, as a variable without a value says it.
        let text = field.text_expecting(EXPECTED).filter(|text| !text.is_empty())?;
        let (scheme, path) = text.split_once("://").unwrap_or(("file", text));
        if path.trim_matches('/').is_empty() || text.contains('\0') {
            field.wrong("copy_to names no folder").expecting(EXPECTED);
        } else if has_user_info(text) {
            field.wrong("copy_to holds a name or password").hinting(
                "the credentials of the warehouse are used: s3.access-key-id and the like in sink.iceberg.catalog",
            );
        } else if !matches!(scheme, "file" | "s3" | "s3a" | "s3n") {
            field.wrong(format!("copy_to is {}", field.shown())).expecting(EXPECTED);
        } else {
            iceberg::check_path(&field, path);
        }
        let to = text.trim_end_matches('/').to_owned();
        Some(StateCopies { to, bytes_per_second })
    });
    section.finish();
    copies
}

fn read_dedup(section: Option<Section<'_, '_>>, types: &BTreeMap<String, Option<PrimitiveType>>) -> Dedup {
    let mut dedup = Dedup {
        key: Vec::new(),
        window: WINDOW_DEFAULT,
        repeats: Repeats::AnyTime,
        shards: SHARDS_DEFAULT,
        bucket_from: BucketFrom::EventTime,
        beyond_window: BeyondWindow::Check,
        on_missing_keys: OnMissingKeys::Stop,
        probe_records_max: None,
    };
    let Some(mut section) = section else { return dedup };
    if let Some(field) = section.need("key", "an array of columns: [\"event_id\"]") {
        let elements = field.texts("an array of columns: [\"event_id\"]");
        if elements.as_ref().is_some_and(Vec::is_empty) {
            field.wrong("key names no column").expecting("at least one column");
        }
        let mut seen = BTreeSet::new();
        for (element, column) in elements.unwrap_or_default() {
            if !seen.insert(column) {
                element.wrong(format!("key column {column:?} stands twice")).hinting("name it once");
                continue;
            }
            let column_type = iceberg::find_column(&element, "key", column, types);
            if matches!(column_type, Some(PrimitiveType::Float | PrimitiveType::Double)) {
                element
                    .wrong(format!("key column {column:?} is a floating-point number"))
                    .expecting("a column of any other type")
                    .hinting("0.0 and -0.0 are equal and not the same, and NaN equals nothing: read it as decimal(P, S) \
                              or string");
            }
            dedup.key.push(column.to_owned());
        }
    }
    if let Some(field) = section.get("window") {
        dedup.window = field.positive_duration().unwrap_or(WINDOW_DEFAULT);
    }
    if let Some(field) = section.get("repeats") {
        let words = [("any_time", Repeats::AnyTime), ("same_time", Repeats::SameTime)];
        dedup.repeats = field.choice(&words, &[]).unwrap_or(Repeats::AnyTime);
    }
    if let Some(field) = section.get("shards")
        && let Some(number) = field.integer()
    {
        match u32::try_from(number) {
            Ok(shards) if shards.is_power_of_two() && shards <= SHARDS_MAX => dedup.shards = shards,
            _ => drop(
                field
                    .wrong(format!("shards is {number}"))
                    .expecting(format!("a power of two from 1 to {SHARDS_MAX}")),
            ),
        }
    }
    if let Some(field) = section.get("beyond_window") {
        let words = [("check", BeyondWindow::Check), ("side", BeyondWindow::Side)];
        dedup.beyond_window = field.choice(&words, &[]).unwrap_or(BeyondWindow::Check);
    }
    if let Some(field) = section.get("on_missing_keys") {
        let words = [("stop", OnMissingKeys::Stop), ("accept", OnMissingKeys::Accept)];
        dedup.on_missing_keys = field.choice(&words, &[]).unwrap_or(OnMissingKeys::Stop);
    }
    if let Some(field) = section.get("max_probe_records")
        && let Some(number) = field.integer()
    {
        dedup.probe_records_max = u64::try_from(number).ok().and_then(NonZeroU64::new);
        if dedup.probe_records_max.is_none() {
            field.wrong(format!("max_probe_records is {number}")).expecting("at least 1");
        }
    }
    dedup.bucket_from = read_bucket_from(&mut section, &dedup, types);
    section.finish();
    dedup
}

/// `bucket_from` and `id_column`. The id is a column of the key: then every copy of a key falls into one bucket.
fn read_bucket_from(
    section: &mut Section<'_, '_>,
    dedup: &Dedup,
    types: &BTreeMap<String, Option<PrimitiveType>>,
) -> BucketFrom {
    let words = [("event_time", None), ("uuid7", Some(IdKind::Uuid7)), ("ulid", Some(IdKind::Ulid))];
    let Some(source) = section.get("bucket_from") else { return BucketFrom::EventTime };
    let Some(kind) = source.choice(&words, &[]).flatten() else { return BucketFrom::EventTime };
    let named = section.get("id_column");
    if dedup.repeats == Repeats::AnyTime {
        source
            .wrong(format!("bucket_from is {:?}, and repeats is \"any_time\"", kind.name()))
            .expecting("repeats = \"same_time\"")
            .hinting(
                "with any_time every bucket is probed, so it does not matter where a key's bucket comes from",
            );
    }
    let (field, column) = match &named {
        Some(field) => (field, field.text().unwrap_or_default().to_owned()),
        None if dedup.key.len() > 1 => {
            source
                .wrong("bucket_from reads the time of an id, and the key has several columns")
                .expecting("id_column = the column of the key that holds the id");
            return BucketFrom::EventTime;
        }
        None => (&source, dedup.key.first().cloned().unwrap_or_default()),
    };
    if !dedup.key.is_empty() && !dedup.key.contains(&column) {
        field
            .wrong(format!("id_column {column:?} is not in the key"))
            .expecting("a column of dedup.key")
            .hinting(
                "the bucket of a key must follow from the key, or its copies could lie in different buckets",
            );
    }
    if let Some(Some(column_type)) = types.get(&column)
        && !matches!(
            column_type,
            PrimitiveType::String | PrimitiveType::Uuid | PrimitiveType::Fixed(16) | PrimitiveType::Binary
        )
    {
        field
            .wrong(format!("id column {column:?} is of type {column_type}"))
            .expecting("string, uuid, fixed[16] or binary");
    }
    BucketFrom::Id { kind, column }
}

fn read_event_time(
    section: Option<Section<'_, '_>>,
    dedup: &Dedup,
    types: &BTreeMap<String, Option<PrimitiveType>>,
) -> EventTimeRule {
    let mut rule = EventTimeRule {
        column: String::new(),
        watermark_delay: WATERMARK_DELAY_DEFAULT,
        allowed_lateness: ALLOWED_LATENESS_DEFAULT,
        late: LatePolicy::Keep,
        ahead_max: AHEAD_MAX_DEFAULT,
        idle_after: IDLE_AFTER_DEFAULT,
    };
    let Some(mut section) = section else { return rule };
    if let Some(field) = section.need("column", "the column that says when an event happened")
        && let Some(column) = field.text()
    {
        let column_type = iceberg::find_column(&field, "event_time.column", column, types);
        if let Some(column_type) = column_type
            && !matches!(column_type, PrimitiveType::Timestamp | PrimitiveType::Timestamptz)
        {
            field
                .wrong(format!("event-time column {column:?} is of type {column_type}"))
                .expecting("a column of type timestamptz or timestamp")
                .hinting("numbers become one with a unit: { type = \"timestamptz\", unit = \"ms\" }");
        }
        rule.column = column.to_owned();
    }
    if let Some(field) = section.get("watermark_delay") {
        rule.watermark_delay = field.duration().unwrap_or(WATERMARK_DELAY_DEFAULT);
    }
    if let Some(field) = section.get("allowed_lateness") {
        rule.allowed_lateness = field.duration().unwrap_or(ALLOWED_LATENESS_DEFAULT);
        if rule.allowed_lateness > dedup.window {
            let lateness = humantime::format_duration(rule.allowed_lateness);
            let window = humantime::format_duration(dedup.window);
            field
                .wrong(format!("allowed_lateness {lateness} is longer than the dedup window {window}"))
                .expecting("at most the window")
                .hinting("widen window in [dedup], or allow less: an event older than the window can not be proven new");
        }
    }
    if let Some(field) = section.get("late") {
        let words = [("keep", LatePolicy::Keep), ("side", LatePolicy::Side), ("drop", LatePolicy::Drop)];
        rule.late = field.choice(&words, &[]).unwrap_or(LatePolicy::Keep);
    }
    if let Some(field) = section.get("max_ahead") {
        rule.ahead_max = field.duration().unwrap_or(AHEAD_MAX_DEFAULT);
    }
    if let Some(field) = section.get("idle_after") {
        rule.idle_after = field.duration().unwrap_or(IDLE_AFTER_DEFAULT);
    }
    section.finish();
    rule
}

fn read_microbatch(mut section: Section<'_, '_>, record_bytes_max: u64) -> MicrobatchLimits {
    let mut limits = MicrobatchLimits {
        records_max: RECORDS_MAX_DEFAULT,
        payload_bytes_max: PAYLOAD_BYTES_MAX_DEFAULT,
        open_time_max: OPEN_TIME_MAX_DEFAULT,
    };
    if let Some(field) = section.get("max_records")
        && let Some(number) = field.integer()
    {
        match u64::try_from(number) {
            Ok(records) if records > 0 => limits.records_max = records,
            _ => drop(field.wrong(format!("max_records is {number}")).expecting("at least 1")),
        }
    }
    if let Some(field) = section.get("max_bytes") {
        limits.payload_bytes_max = field.size().unwrap_or(PAYLOAD_BYTES_MAX_DEFAULT);
        if limits.payload_bytes_max < record_bytes_max {
            let (bytes, record) =
                (words::size_in_words(limits.payload_bytes_max), words::size_in_words(record_bytes_max));
            field
                .wrong(format!("max_bytes {bytes} is smaller than the largest record, {record}"))
                .hinting("raise it, or lower max_record in [decode]");
        }
    }
    if let Some(field) = section.get("max_interval") {
        limits.open_time_max = field.positive_duration().unwrap_or(OPEN_TIME_MAX_DEFAULT);
    }
    for name in ["probe", "probe_records", "probe_batch", "probe_bytes"] {
        section.not_built(name, "this size of probe batches; their records are bounded by dedup.max_probe_records, their bytes by `memory`");
    }
    section.finish();
    limits
}
