//! tidemill: Kafka topics full of repeats become Iceberg tables where each event stands once.
//!
//! Flow: [`source`] -> [`decode`] -> [`dedup`] -> [`sink`] -> [`commit`], driven by the one loop in [`pipeline`].
//! Shared words ([`offset`], [`event_time`], [`fingerprint`], [`record`], [`letter`], [`counts`], [`aside`], [`stop`],
//! [`job`]) import no stage, and no stage imports another.

#![deny(unsafe_code)]
#![warn(missing_docs)]

pub mod allocator;
pub mod aside;
pub mod catalog;
pub mod cli;
pub mod commit;
pub mod counts;
pub mod decode;
pub mod dedup;
pub mod event_time;
pub mod faults;
#[cfg(test)]
mod figures;
pub mod fingerprint;
pub mod fuzz;
pub mod generate;
pub mod id_time;
pub mod job;
pub mod lateness;
pub mod letter;
pub mod maintenance;
pub mod memory;
pub mod offset;
pub mod pipeline;
mod protocol;
pub mod record;
pub mod sink;
pub mod source;
pub mod stop;
