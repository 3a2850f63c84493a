//! What became of every row of a batch.

use serde::{Deserialize, Serialize};

use crate::mutant;

/// Outcomes of one batch, in rows after arrays were split.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Rows taken from the source.
    pub consumed: u64,
    /// Rows written to the main table.
    pub written: u64,
    /// Rows whose key was seen before.
    pub duplicate: u64,
    /// Late rows written to the late table.
    pub late_side: u64,
    /// Late rows dropped because the job says so.
    pub late_dropped: u64,
    /// Rows refused and written to the dead-letter table.
    pub dead_letter: u64,
    /// Rows refused whose place already stands in the dead-letter table.
    pub dead_letter_known: u64,
    /// Rows that the job's `where` filters out.
    pub filtered: u64,
    /// Rows outside a backfill's time range.
    pub outside_range: u64,
    /// Rows behind the watermark by more than the allowed lateness. A mark, not an outcome: with `late = "keep"`
    /// such a row is also written or a duplicate.
    #[serde(default)]
    pub late: u64,
}

impl Counts {
    /// Sum of all outcomes; equals `consumed` or a row was lost.
    pub fn outcomes(&self) -> u64 {
        self.written
            + self.duplicate
            + self.late_side
            + self.late_dropped
            + self.dead_letter
            + mutant!("known-letters-not-conserved", 0 => self.dead_letter_known)
            + self.filtered
            + self.outside_range
    }

    /// Whether every consumed row has exactly one outcome (promise "whole" of the design).
    pub fn conserved(&self) -> bool {
        self.consumed == self.outcomes()
    }

    /// Whether some table gets rows of it.
    pub fn gives_rows(&self) -> bool {
        self.written + self.late_side + self.dead_letter > 0
    }

    /// Adds another batch's counts.
    pub fn add(&mut self, other: &Counts) {
        self.consumed += other.consumed;
        self.written += other.written;
        self.duplicate += other.duplicate;
        self.late_side += other.late_side;
        self.late_dropped += other.late_dropped;
        self.dead_letter += other.dead_letter;
        self.dead_letter_known += other.dead_letter_known;
        self.filtered += other.filtered;
        self.outside_range += other.outside_range;
        self.late += other.late;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_counts_once_and_a_mark_is_none() {
        let each = Counts {
            consumed: 0,
            written: 1,
            duplicate: 10,
            late_side: 100,
            late_dropped: 1_000,
            dead_letter: 10_000,
            dead_letter_known: 100_000,
            filtered: 1_000_000,
            outside_range: 10_000_000,
            late: 100_000_000,
        };
        assert_eq!(each.outcomes(), 11_111_111);
        assert!(!each.conserved());
        assert!(Counts { consumed: 11_111_111, ..each }.conserved());
    }

    #[test]
    fn a_batch_gives_rows_to_main_to_the_late_table_or_to_dead_letters() {
        let none = Counts { consumed: 9, duplicate: 4, late_dropped: 3, filtered: 2, ..Counts::default() };
        assert!(!none.gives_rows());
        for some in [
            Counts { written: 1, ..none },
            Counts { late_side: 1, ..none },
            Counts { dead_letter: 1, ..none },
        ] {
            assert!(some.gives_rows(), "{some:?}");
        }
    }
}
