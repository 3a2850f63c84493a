//! Commits: data files, offsets and dedup state switch together, or nothing does.
//!
//! Flow: files + next offsets + generation -> [`switch`] -> snapshot with a [`ledger`] record -> side tables.
//!
//! **Why the catalog is wrapped and not replaced (R5).** iceberg 0.10.1 offers two ways to a compare-and-swap on a
//! head that was inspected: wrap the catalog that `Transaction::commit` is given, or send updates and requirements
//! by own HTTP and SQL. The wrapper ([`switch`]) is one file, works with every catalog crate and its own
//! authentication, and its check runs on the very metadata whose snapshot the transaction then asserts
//! (`assert-ref-snapshot-id`), so nothing slips between check and swap. It gives up what the crate's transaction can
//! not say: tags, moved refs, a clamped timestamp. Those belong to savepoints, restore and maintenance, which
//! will send raw updates where they need them.
//!
//! Order of durable steps of microbatch n, and what a crash after each leaves
//! 1. data files of all tables, closed and synced: files that no table names, swept as orphans.
//! 2. generation n of the dedup state, files and folder synced: files that no ledger names; the sweep takes them.
//! 3. main commit: the switch. Before it nothing of n is visible, after it all of it is.
//! 4. read-back: the catalog's word alone is not believed (its SQL form can report a failed COMMIT as success).
//! 5. side tables: owed by the record of step 3, brought forward by the next start if missing.

pub mod ledger;
pub mod lock;
pub mod side;
pub mod switch;
