//! Which offsets are lost: the ledger's next offsets against what the broker holds.

use std::collections::BTreeMap;
use std::fmt;

use crate::mutant;
use crate::offset::{NextOffset, TopicPartition};

/// What the broker holds of one topic partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OffsetRange {
    /// Oldest offset.
    pub low: NextOffset,
    /// Last stable offset: one past the last record that a committed reader may see now.
    pub end: NextOffset,
}

/// Offsets of one topic partition that can not be read. Half-open, never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LostRange {
    /// The topic partition.
    pub topic_partition: TopicPartition,
    /// First lost offset.
    pub from: NextOffset,
    /// One past the last lost offset.
    pub to: NextOffset,
    /// How they were lost.
    pub loss: Loss,
}

/// How offsets were lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// Retention or a deletion removed records that were not yet read.
    Removed,
    /// The log ends before the next offset: records that were read are no longer in it, and their offsets will be
    /// given to other records.
    Truncated,
    /// The topic partition is no longer there.
    PartitionGone,
}

impl fmt::Display for LostRange {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { topic_partition, from, to, loss } = self;
        match loss {
            Loss::Removed => write!(out, "{topic_partition} [{from}, {to}) was removed before it was read"),
            Loss::Truncated => {
                write!(out, "{topic_partition} [{from}, {to}) was read and is cut off the log")
            }
            Loss::PartitionGone => {
                write!(out, "{topic_partition} [{from}, {to}): the topic partition is gone")
            }
        }
    }
}

/// Compares next offsets with what the broker holds and gives the exact lost ranges, in order; empty = all is there.
///
/// Topic partitions of the broker that have no next offset are not looked at.
pub fn check_ranges(
    next_offsets: &BTreeMap<TopicPartition, NextOffset>,
    held: &BTreeMap<TopicPartition, OffsetRange>,
) -> Vec<LostRange> {
    let mut lost = Vec::new();
    for (topic_partition, &next) in next_offsets {
        let range = |from, to, loss| LostRange { topic_partition: topic_partition.clone(), from, to, loss };
        match held.get(topic_partition) {
            // Nothing was ever consumed of it, so nothing is lost with it.
            None if next == NextOffset::at(0) => {}
            None => lost.push(range(NextOffset::at(0), next, Loss::PartitionGone)),
            Some(held) if mutant!("lost-range-skipped", false => next < held.low) => {
                lost.push(range(next, held.low, Loss::Removed))
            }
            Some(held) if next > held.end => lost.push(range(held.end, next, Loss::Truncated)),
            Some(_) => {}
        }
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(next: i64, low: i64, end: i64) -> Vec<LostRange> {
        let topic_partition = TopicPartition::new("t", 3);
        let held = OffsetRange { low: NextOffset::at(low), end: NextOffset::at(end) };
        check_ranges(
            &BTreeMap::from([(topic_partition.clone(), NextOffset::at(next))]),
            &BTreeMap::from([(topic_partition, held)]),
        )
    }

    fn lost(from: i64, to: i64, loss: Loss) -> LostRange {
        LostRange {
            topic_partition: TopicPartition::new("t", 3),
            from: NextOffset::at(from),
            to: NextOffset::at(to),
            loss,
        }
    }

    #[test]
    fn offsets_from_low_to_end_inclusive_are_no_loss() {
        for next in [5, 6, 9, 10] {
            assert_eq!(check(next, 5, 10), []);
        }
        assert_eq!(check(0, 0, 0), []);
    }

    #[test]
    fn a_next_offset_below_low_loses_exactly_up_to_low() {
        assert_eq!(check(4, 5, 10), [lost(4, 5, Loss::Removed)]);
        assert_eq!(check(0, 10, 10), [lost(0, 10, Loss::Removed)]);
    }

    #[test]
    fn a_next_offset_past_the_end_means_a_cut_log() {
        assert_eq!(check(11, 5, 10), [lost(10, 11, Loss::Truncated)]);
        assert_eq!(check(7, 0, 0), [lost(0, 7, Loss::Truncated)]);
    }

    #[test]
    fn a_topic_partition_that_is_gone_is_a_loss_only_if_something_was_read_of_it() {
        let gone = |next| {
            check_ranges(
                &BTreeMap::from([(TopicPartition::new("t", 3), NextOffset::at(next))]),
                &BTreeMap::new(),
            )
        };
        assert_eq!(gone(7), [lost(0, 7, Loss::PartitionGone)]);
        assert_eq!(gone(0), []);
    }
}
