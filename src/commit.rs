//! Commits: data files, offsets and dedup state switch together, or nothing does.
//!
//! Flow: files + next offsets + generation -> [`switch`] -> snapshot with a [`ledger`] record -> side tables.
//!
//! **Why the catalog is wrapped and not replaced (R5).** iceberg 0.10.1 offers two ways to a compare-and-swap on a
//! head that was inspected: wrap the catalog that `Transaction::commit` is given, or send updates and requirements
//! by own HTTP and SQL. The wrapper ([`switch`]) is one file, works with every catalog crate and its own
//! authentication, and what the protocol judged is the very metadata whose snapshot the transaction then asserts
//! (`assert-ref-snapshot-id`), so nothing slips between check and swap. It gives up what the crate's transaction can
//! not say: tags, and a snapshot that takes files away. Those belong to savepoints, whose commits are built by the
//! transaction too, behind the same guard, and sent with more updates by `catalog/updates.rs`; maintenance needs none
//! ([`upkeep`]).
//!
//! When a request is sent, and what an answer means, is decided in `protocol`; the order of the durable steps of a
//! microbatch stands in `protocol/life.rs`.

pub mod ledger;
pub mod lock;
pub mod request;
pub mod savepoint;
pub mod side;
pub mod switch;
pub mod upkeep;
