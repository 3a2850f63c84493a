//! Dead letters: rows that a stage refused, with the reason and the bytes to try again.

use std::fmt;

/// Why a row was refused. The code is stable: it stands in tables and in users' queries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum ReasonCode {
    /// The payload is null.
    Tombstone,
    /// The payload has no bytes.
    EmptyPayload,
    /// The payload is longer than the job's `max_record`; its bytes are not kept, only their number.
    RecordTooLarge,
    /// The payload is not UTF-8.
    InvalidUtf8,
    /// The payload ends inside a value.
    TruncatedJson,
    /// The payload is not JSON (includes NaN, lone surrogates, bytes after the value).
    InvalidJson,
    /// Nested deeper than the decoder goes.
    TooDeep,
    /// JSON, but neither an object nor (where the job splits) an array of objects.
    NotAnObject,
    /// A JSON array where the job says `arrays = "dead_letter"`.
    ArrayRefused,
    /// A JSON array without elements: nothing to write, so nothing to lose silently.
    EmptyArray,
    /// A member that a column reads stands twice in its object.
    DuplicateField,
    /// A member that no column reads, where the job says `unknown_fields = "dead_letter"`.
    UnknownField,
    /// A value of another JSON type than the column's.
    WrongType,
    /// A number, date or text that the column's type can not hold exactly.
    OutOfRange,
    /// A required column has no value.
    MissingRequired,
    /// A key column is missing or null.
    NullKey,
    /// A key column is an empty string.
    EmptyKey,
    /// The event-time column has no value.
    MissingEventTime,
    /// The event time lies too far ahead of the record's Kafka timestamp or the batch's cut time.
    EventTimeAhead,
    /// The id that should tell the bucket is no such id.
    IdWithoutTime,
}

impl ReasonCode {
    /// All codes, in the order of the enumeration.
    pub const ALL: [ReasonCode; 20] = [
        Self::Tombstone,
        Self::EmptyPayload,
        Self::RecordTooLarge,
        Self::InvalidUtf8,
        Self::TruncatedJson,
        Self::InvalidJson,
        Self::TooDeep,
        Self::NotAnObject,
        Self::ArrayRefused,
        Self::EmptyArray,
        Self::DuplicateField,
        Self::UnknownField,
        Self::WrongType,
        Self::OutOfRange,
        Self::MissingRequired,
        Self::NullKey,
        Self::EmptyKey,
        Self::MissingEventTime,
        Self::EventTimeAhead,
        Self::IdWithoutTime,
    ];

    /// The name that stands in the dead-letter table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tombstone => "tombstone",
            Self::EmptyPayload => "empty_payload",
            Self::RecordTooLarge => "record_too_large",
            Self::InvalidUtf8 => "invalid_utf8",
            Self::TruncatedJson => "truncated_json",
            Self::InvalidJson => "invalid_json",
            Self::TooDeep => "too_deep",
            Self::NotAnObject => "not_an_object",
            Self::ArrayRefused => "array_refused",
            Self::EmptyArray => "empty_array",
            Self::DuplicateField => "duplicate_field",
            Self::UnknownField => "unknown_field",
            Self::WrongType => "wrong_type",
            Self::OutOfRange => "out_of_range",
            Self::MissingRequired => "missing_required",
            Self::NullKey => "null_key",
            Self::EmptyKey => "empty_key",
            Self::MissingEventTime => "missing_event_time",
            Self::EventTimeAhead => "event_time_ahead",
            Self::IdWithoutTime => "id_without_time",
        }
    }
}

impl fmt::Display for ReasonCode {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(self.as_str())
    }
}

/// A refused row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Where the row stands in Kafka.
    pub place: crate::offset::Place,
    /// Kafka timestamp in ms since the epoch.
    pub timestamp_ms: Option<i64>,
    /// Message key.
    pub key: Option<Vec<u8>>,
    /// The row's own bytes: the payload, or the element of a split array. `None` for a tombstone and for a
    /// record that is too large.
    pub payload: Option<Vec<u8>>,
    /// Length of the payload in bytes, also where the bytes are not kept.
    pub payload_bytes: i64,
    /// The reason, for machines.
    pub code: ReasonCode,
    /// The reason, for people: names the field and both values. At most 300 characters, control characters escaped.
    pub text: String,
}

impl DeadLetter {
    /// Bytes of the record that it keeps.
    pub fn kept_bytes(&self) -> u64 {
        let bytes = |kept: &Option<Vec<u8>>| kept.as_ref().map_or(0, Vec::len) as u64;
        bytes(&self.key) + bytes(&self.payload)
    }
}
