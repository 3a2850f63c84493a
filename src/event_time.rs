//! Event time: when something happened, as the payload says, in UTC milliseconds.

use serde::{Deserialize, Serialize};

/// Event time in milliseconds since 1970-01-01T00:00:00Z. Finer digits are floored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventTimeMs(pub i64);

impl EventTimeMs {
    /// Floors microseconds, the unit of Iceberg timestamps, to milliseconds.
    pub fn from_micros(micros: i64) -> Self {
        Self(micros.div_euclid(1_000))
    }

    /// This time less `ms`, without wrapping.
    pub fn minus_ms(self, ms: i64) -> Self {
        Self(self.0.saturating_sub(ms))
    }

    /// This time plus `ms`, without wrapping.
    pub fn plus_ms(self, ms: i64) -> Self {
        Self(self.0.saturating_add(ms))
    }
}

impl std::fmt::Display for EventTimeMs {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match chrono::DateTime::from_timestamp_millis(self.0) {
            Some(time) => write!(out, "{}", time.format("%Y-%m-%dT%H:%M:%S%.3fZ")),
            None => write!(out, "{} ms", self.0),
        }
    }
}
