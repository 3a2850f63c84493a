//! A job: plain data, checked, with its defaults as named constants.
//!
//! [`mod@file`] reads it from TOML. Nothing here touches the network, a clock or the environment.

pub mod file;

use std::collections::BTreeMap;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use iceberg::spec::{PrimitiveType, Transform};

/// Version of the job-file format that this program reads and that `version` must name.
pub const JOB_FORMAT_VERSION: i64 = 1;
/// Hard limit of the process unless the job says otherwise.
pub const MEMORY_BYTES_DEFAULT: u64 = 1 << 30;
/// Most threads that a job may name.
pub const THREADS_MAX: usize = 1024;
/// Largest record that is decoded; Kafka's own default for `message.max.bytes` is 1 MiB.
pub const RECORD_BYTES_MAX_DEFAULT: u64 = 4 << 20;
/// How far the watermark trails the largest event time.
pub const WATERMARK_DELAY_DEFAULT: Duration = Duration::from_secs(10 * 60);
/// How far event time may run ahead of the record's Kafka timestamp or the batch's cut time.
pub const AHEAD_MAX_DEFAULT: Duration = Duration::from_secs(60 * 60);
/// A topic partition this far behind the leader in event time, read to its end, no longer holds the watermark.
pub const IDLE_AFTER_DEFAULT: Duration = Duration::from_secs(10 * 60);
/// How far behind its watermark a row is not yet late. With `late = "keep"` lateness is only counted, so none is allowed
/// unless the job says so.
pub const ALLOWED_LATENESS_DEFAULT: Duration = Duration::ZERO;
/// How long a key is remembered.
pub const WINDOW_DEFAULT: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Number of shards: enough for every core of a large machine, and few enough that each is worth a read.
pub const SHARDS_DEFAULT: u32 = 256;
/// Most shards: the directory of a segment lists each of them.
pub const SHARDS_MAX: u32 = 4096;
/// Most records of a microbatch.
pub const RECORDS_MAX_DEFAULT: u64 = 4_000_000;
/// Most payload of a microbatch.
pub const PAYLOAD_BYTES_MAX_DEFAULT: u64 = 2 << 30;
/// Longest time a microbatch stays open.
pub const OPEN_TIME_MAX_DEFAULT: Duration = Duration::from_secs(5 * 60);
/// Share of dead letters above which nothing is committed.
pub const DEAD_LETTER_RATIO_MAX_DEFAULT: f64 = 0.05;
/// Default of `maintenance.every_commits`: one more commit in twenty.
pub const MAINTENANCE_COMMITS_DEFAULT: u32 = 20;
/// Default of `maintenance.max_snapshots` on a table that does not say how old a snapshot may become.
pub const SNAPSHOTS_MAX_DEFAULT: u32 = 40;
/// Default of `maintenance.orphans_older_than`, as Iceberg's own removal of orphan files has it.
pub const ORPHAN_AGE_DEFAULT: Duration = Duration::from_secs(3 * 24 * 60 * 60);
/// Smallest `maintenance.orphans_older_than`: well above the longest answer of a storage.
pub const ORPHAN_AGE_MIN: Duration = Duration::from_secs(60 * 60);
/// A batch smaller than this never trips the brake: one bad record of ten says little.
pub const BRAKE_RECORDS_MIN: u64 = 1_000;

/// Default of `state.copy_rate`: little enough to leave a network of 1 Gbit/s to the data files.
pub const COPY_RATE_DEFAULT: u64 = 32 << 20;
/// Folder of lock and dedup state unless the job says otherwise.
pub const STATE_DIR_DEFAULT: &str = "./state";
/// Catalog of a job that names none: a SQLite file next to its tables.
pub const CATALOG_URI_DEFAULT: &str = "sqlite:./warehouse/catalog.db";
/// Warehouse of a SQL catalog that names none.
pub const WAREHOUSE_DEFAULT: &str = "./warehouse";
/// What the dead-letter table adds to the main table's name unless it is named.
pub const DEAD_LETTERS_SUFFIX: &str = "_dead_letters";
/// What the late table adds to the main table's name unless it is named.
pub const LATE_SUFFIX: &str = "_late";
/// What the name of the table of erased keys adds to the main table's.
pub const SUPPRESSED_SUFFIX: &str = "_suppressed";

/// Everything a run is asked to do.
#[derive(Debug, Clone)]
pub struct Job {
    /// Name of the job; stands in the ledger and in file names. `[a-z0-9_-]`, 1 to 64 characters.
    pub name: String,
    /// Hard limit of the process, in bytes.
    pub memory_bytes: u64,
    /// Threads that work on records side by side. With one nothing is read ahead and nothing written beside.
    pub threads: NonZeroUsize,
    /// Folder of lock and dedup state. Disposable: rebuilt from the tables. A relative path starts at the current
    /// working directory of the process, not at the job file.
    pub state_dir: PathBuf,
    /// Where copies of the dedup state go; `None` = nowhere.
    pub state_copies: Option<StateCopies>,
    /// Where records come from.
    pub source: KafkaSource,
    /// How payloads become rows.
    pub decode: Decode,
    /// What time means.
    pub event_time: EventTimeRule,
    /// What a repeat is.
    pub dedup: Dedup,
    /// When a microbatch closes.
    pub microbatch: MicrobatchLimits,
    /// Where rows go.
    pub sink: IcebergSink,
}

/// `[state]`: copies of the dedup state, for machines whose disk does not outlive a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateCopies {
    /// A folder, as a path or `file://`, or a place of S3 (`s3://bucket/path`), without a slash at its end.
    pub to: String,
    /// Most bytes that are copied in a second.
    pub bytes_per_second: u64,
}

/// `[source.kafka]`.
#[derive(Debug, Clone)]
pub struct KafkaSource {
    /// Topics, at least one, without repeats.
    pub topics: Vec<String>,
    /// Where topic partitions that the ledger does not know begin, on the first run only.
    pub start: StartPosition,
    /// librdkafka's own properties, minus the deny list and the ones tidemill sets itself.
    pub properties: BTreeMap<String, Setting>,
    /// Largest payload that is decoded, in bytes; longer ones are dead letters by reference.
    pub record_bytes_max: u64,
}

/// Where the first run begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartPosition {
    /// The oldest record that the broker holds.
    Earliest,
    /// Only records that arrive after the first run's start.
    Latest,
    /// The first record with this Kafka timestamp or a later one, in ms since the epoch.
    Timestamp(i64),
    /// Offsets by topic and partition; partitions not named begin at earliest.
    Offsets(BTreeMap<String, BTreeMap<i32, i64>>),
}

/// A configuration value: in the open, or named and read only when it is used.
#[derive(Clone, PartialEq, Eq)]
pub enum Setting {
    /// Written in the job file.
    Plain(String),
    /// `env:NAME`.
    Env(String),
    /// `file:PATH`; a trailing newline is cut. A relative path starts at the current working directory.
    File(PathBuf),
}

/// `[decode]`.
#[derive(Debug, Clone)]
pub struct Decode {
    /// What happens to members that no column reads.
    pub unknown_fields: UnknownFields,
    /// What happens to a record whose payload is a JSON array.
    pub arrays: Arrays,
    /// Columns in the order of the table.
    pub columns: Vec<Column>,
}

/// `unknown_fields`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownFields {
    /// Skipped.
    Ignore,
    /// Gathered as one JSON object in the column [`UNKNOWN_FIELDS_COLUMN`].
    Keep,
    /// The row is a dead letter.
    DeadLetter,
}

/// Column that holds unknown top-level members as JSON text when the job keeps them.
pub const UNKNOWN_FIELDS_COLUMN: &str = "unknown_fields";

/// `arrays`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrays {
    /// Each element is a row with its index.
    Split,
    /// The record is a dead letter.
    DeadLetter,
}

/// One column of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    /// Name in the table.
    pub name: String,
    /// Iceberg type, format version 2.
    pub column_type: PrimitiveType,
    /// Where the value comes from.
    pub from: ColumnSource,
    /// Unit of numbers that become a timestamp or time; `None` = only text is taken.
    pub unit: Option<TimeUnit>,
    /// Whether a row without a value is a dead letter (and the table's column `required`).
    pub required: bool,
}

/// Where a column's value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ColumnSource {
    /// A path of member names into the payload, at least one: `$.delivery.provider`.
    Value(Vec<String>),
    /// The message key, as UTF-8 text or bytes.
    Key,
    /// The first header of this name, as UTF-8 text or bytes.
    Header(String),
    /// The record's Kafka timestamp.
    Timestamp,
    /// The topic's name.
    Topic,
}

/// Unit of a number that stands for a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeUnit {
    /// Seconds.
    Seconds,
    /// Milliseconds.
    Millis,
    /// Microseconds.
    Micros,
}

/// `[event_time]`.
#[derive(Debug, Clone)]
pub struct EventTimeRule {
    /// Column of type timestamp or timestamptz.
    pub column: String,
    /// How far the watermark trails the largest event time.
    pub watermark_delay: Duration,
    /// How far behind its watermark a row is not yet late. At most the window.
    pub allowed_lateness: Duration,
    /// What happens to late rows.
    pub late: LatePolicy,
    /// Rows further ahead than this are dead letters.
    pub ahead_max: Duration,
    /// Topic partitions this far behind the leader do not hold the watermark once read to their end.
    pub idle_after: Duration,
}

/// `late`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LatePolicy {
    /// Late rows are marked in the counts and written like others.
    Keep,
    /// Late rows that were not seen before go to the late table.
    Side,
    /// Late rows are counted and go nowhere; their keys do not count as seen.
    Drop,
}

/// `[dedup]`.
#[derive(Debug, Clone)]
pub struct Dedup {
    /// Columns that name an event, in order; at least one.
    pub key: Vec<String>,
    /// How long a key is remembered at least.
    pub window: Duration,
    /// What the producer promises about repeats.
    pub repeats: Repeats,
    /// Number of shards: a power of two, 1 to 4096.
    pub shards: u32,
    /// Where the time of a key's bucket comes from.
    pub bucket_from: BucketFrom,
    /// What happens to an event whose bucket has left the state.
    pub beyond_window: BeyondWindow,
    /// What a rebuild does that misses keys which the ledger counts.
    pub on_missing_keys: OnMissingKeys,
    /// Most rows that are looked up together; `None` = as the size of the state and the memory make it cheapest.
    pub probe_records_max: Option<NonZeroU64>,
}

/// `on_missing_keys`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnMissingKeys {
    /// Stop: a person decides whether the rows come back.
    Stop,
    /// Go on without them: their events would be written again.
    Accept,
}

/// `bucket_from` and `id_column`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BucketFrom {
    /// The event time of the row.
    EventTime,
    /// The time that an id of the key tells, so that it is the same for every copy.
    Id {
        /// Which kind of id.
        kind: IdKind,
        /// A column of the key.
        column: String,
    },
}

/// Kinds of ids that tell when they were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdKind {
    /// UUID version 7, RFC 9562.
    Uuid7,
    /// ULID.
    Ulid,
}

impl IdKind {
    /// As the job file names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uuid7 => "uuid7",
            Self::Ulid => "ulid",
        }
    }
}

/// `beyond_window`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BeyondWindow {
    /// Its bucket is read from the table, and the event looked up in it.
    Check,
    /// It goes to the late table, marked as unproven; its key does not count as seen.
    Side,
}

/// `repeats`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Repeats {
    /// A repeat may carry any event time: every live bucket is probed.
    AnyTime,
    /// A repeat carries the event time of its first copy: one bucket is probed.
    SameTime,
}

/// When a microbatch closes: at the first of these bounds to be reached.
#[derive(Debug, Clone)]
pub struct MicrobatchLimits {
    /// Most records in one microbatch. At least 1.
    pub records_max: u64,
    /// Most undecoded payload in one microbatch, in bytes.
    pub payload_bytes_max: u64,
    /// Longest time from the first record to the close.
    pub open_time_max: Duration,
}

/// `[sink.iceberg]`.
#[derive(Debug, Clone)]
pub struct IcebergSink {
    /// Namespace and name, at least two parts.
    pub table: Vec<String>,
    /// Partition fields, as Iceberg writes them: `day(event_time)`, `bucket(16, user_id)`, `channel`.
    pub partition_by: Vec<PartitionField>,
    /// The catalog.
    pub catalog: CatalogConfig,
    /// Table properties set when the table is created.
    pub table_properties: BTreeMap<String, String>,
    /// Where refused rows go.
    pub dead_letters: DeadLetterSink,
    /// Where late rows go; the table is made only if the job uses it.
    pub late: LateSink,
    /// What a start does on a table that was rolled back.
    pub on_rollback: OnRollback,
    /// What keeps the tables small.
    pub maintenance: MaintenanceRule,
}

impl IcebergSink {
    /// Whether a table that was rolled back is gone on with from its older batch.
    pub fn replays(&self) -> bool {
        self.on_rollback == OnRollback::Replay
    }
}

/// `maintenance = { ... }`: what a run does by itself so that a table costs the same after months. The rules of age and
/// size are the table's own properties, under Iceberg's names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MaintenanceRule {
    /// Commits of a table from one maintenance to the next; 0 = none by itself.
    pub every_commits: u32,
    /// Most snapshots of the main branch that stay, whatever their age, because every commit writes all of them again.
    /// `None` = [`SNAPSHOTS_MAX_DEFAULT`], unless the table itself says how old a snapshot may become.
    pub snapshots_max: Option<u32>,
    /// A file that no snapshot names is deleted when it is older than this.
    pub orphan_age: Duration,
}

impl Default for MaintenanceRule {
    fn default() -> Self {
        Self {
            every_commits: MAINTENANCE_COMMITS_DEFAULT,
            snapshots_max: None,
            orphan_age: ORPHAN_AGE_DEFAULT,
        }
    }
}

/// One partition field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PartitionField {
    /// Source column.
    pub column: String,
    /// Iceberg transform: identity, year, month, day, hour, `bucket[N]`, `truncate[N]`.
    pub transform: Transform,
}

impl PartitionField {
    /// Its name in the table: Iceberg puts the transform after the column.
    pub fn name(&self) -> String {
        let suffix = match self.transform {
            Transform::Year => "_year",
            Transform::Month => "_month",
            Transform::Day => "_day",
            Transform::Hour => "_hour",
            Transform::Bucket(_) => "_bucket",
            Transform::Truncate(_) => "_trunc",
            Transform::Void => "_null",
            Transform::Identity | Transform::Unknown => "",
        };
        format!("{}{suffix}", self.column)
    }
}

/// `catalog = { ... }`.
#[derive(Debug, Clone)]
pub struct CatalogConfig {
    /// Kind of catalog.
    pub kind: CatalogKind,
    /// Address: `sqlite:PATH` for sql, `http(s)://` for rest. A relative path starts at the current working directory.
    pub uri: String,
    /// Where tables live. sql: a folder (a relative one starts at the current working directory), `file://` or
    /// `s3://`. rest: a name or location as the catalog understands it; empty = the catalog's own default.
    pub warehouse: String,
    /// Other properties, under the names of the Iceberg REST specification and pyiceberg (`credential`, `token`,
    /// `scope`, `s3.endpoint`, `s3.region`, ...).
    pub properties: BTreeMap<String, Setting>,
}

/// Kind of catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CatalogKind {
    /// SQLite through the SQL catalog.
    Sql,
    /// Iceberg REST.
    Rest,
}

/// `on_rollback`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnRollback {
    /// Stop: a person decides.
    Stop,
    /// Go on from the older batch and read again what came after it.
    Replay,
}

/// `dead_letters = { ... }`.
#[derive(Debug, Clone)]
pub struct DeadLetterSink {
    /// Namespace and name; by default the main table's name with `_dead_letters`.
    pub table: Vec<String>,
    /// Share of refused rows above which a batch of at least [`BRAKE_RECORDS_MIN`] rows is not committed. 0 to 1.
    pub ratio_max: f64,
}

/// `late = { ... }` of the sink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LateSink {
    /// Namespace and name; by default the main table's name with `_late`.
    pub table: Vec<String>,
}

impl Job {
    /// Whether rows may go to the late table.
    pub fn uses_late_table(&self) -> bool {
        self.event_time.late == LatePolicy::Side || self.dedup.beyond_window == BeyondWindow::Side
    }

    /// Where the time of a key's bucket comes from, as the key spec states it: the event-time column, and before it kind
    /// and column of the id, if an id says it.
    pub fn bucket_source(&self) -> String {
        match &self.dedup.bucket_from {
            BucketFrom::EventTime => self.event_time.column.clone(),
            BucketFrom::Id { kind, column } => {
                format!("{} of {column}, event time {}", kind.name(), self.event_time.column)
            }
        }
    }
}

impl Setting {
    /// Reads the value: from the environment or the file if it is a reference.
    ///
    /// # Errors
    /// A sentence that names the variable or file and never the value.
    pub fn resolve(&self) -> Result<String, String> {
        match self {
            Setting::Plain(text) => Ok(text.clone()),
            Setting::Env(name) => std::env::var(name)
                .map_err(|_| format!("environment variable {name} is not set or not UTF-8")),
            Setting::File(path) => std::fs::read_to_string(path)
                .map(|text| text.strip_suffix('\n').unwrap_or(&text).to_owned())
                .map_err(|error| format!("secret file {} can not be read: {error}", path.display())),
        }
    }

    /// Whether the value is a reference, and so never to be printed.
    pub fn is_secret(&self) -> bool {
        !matches!(self, Setting::Plain(_))
    }
}

/// Shows a plain value and the name of a reference; a resolved secret never reaches this type.
impl std::fmt::Debug for Setting {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Setting::Plain(text) => write!(out, "{text:?}"),
            Setting::Env(name) => write!(out, "env:{name}"),
            Setting::File(path) => write!(out, "file:{}", path.display()),
        }
    }
}

/// Columns that every table of a job carries after the job's own: audit, rebuild and recovery need them.
/// Name, type, whether required.
pub const METADATA_COLUMNS: [(&str, PrimitiveType, bool); 6] = [
    ("_kafka_topic", PrimitiveType::String, true),
    ("_kafka_partition", PrimitiveType::Int, true),
    ("_kafka_offset", PrimitiveType::Long, true),
    ("_kafka_index", PrimitiveType::Int, true),
    ("_kafka_timestamp", PrimitiveType::Timestamptz, false),
    ("_tidemill_batch", PrimitiveType::Long, true),
];

/// Columns that the late table carries after [`METADATA_COLUMNS`]: the watermark of its topic partition behind which a row
/// was late (null for one that was not late), and whether nothing proves that the row is no repeat.
pub const LATE_COLUMNS: [(&str, PrimitiveType, bool); 2] = [
    ("_tidemill_watermark", PrimitiveType::Timestamptz, false),
    ("_tidemill_unproven", PrimitiveType::Boolean, true),
];
