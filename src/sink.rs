//! The Iceberg side of a job without its commit protocol: tables, data files, scans.
//!
//! Flow: job -> [`schema`] creates or checks the tables; rows -> [`writer`] -> data files (durable, not yet part
//! of a table); refused rows -> [`dead_letters`] -> rows of the dead-letter table; [`scan`] reads keys back when
//! the dedup state is rebuilt.
//!
//! Nothing here moves a table's current snapshot: data files count only once a commit names them. The two
//! exceptions change no row: creating a table, and adding optional columns to it.

pub mod dead_letters;
pub mod durable;
pub mod scan;
pub mod schema;
pub mod stored_letters;
pub mod suppressed;
pub mod writer;

#[cfg(test)]
pub(crate) mod testing;
