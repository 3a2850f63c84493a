//! Which snapshots leave a table. A pure function of its metadata, the rules and the time.
//!
//! The rules of Iceberg's expiry hold: refs first (a ref whose own or table's `max-ref-age-ms` is over leaves, main
//! never), then along the ancestry of each branch that stays the newest `min-snapshots-to-keep` and all that are young,
//! then the heads of tags, then young snapshots that no ref reaches. Two things are added for the main branch.
//!
//! 1. The ancestry is kept down to the records of the newest dedup generations (see [`Keep`]), or to the newest
//!    marks of a side table (see [`Keep`]), however many snapshots others put on top.
//! 2. `snapshots_max` bounds what stays for its youth alone: each commit writes every snapshot again.
//!
//! What stays of the main branch is without gaps: everything from the current snapshot to the oldest that must stay.

use std::collections::{BTreeSet, HashMap};

use iceberg::spec::{MAIN_BRANCH, SnapshotReference, SnapshotRetention, TableMetadata};

use super::SNAPSHOTS_EXPIRED_MAX;
use super::rules::Rules;
use crate::commit::ledger;
use crate::commit::savepoint;
use crate::commit::side;
use crate::mutant;

/// What of us must stay on the ancestry, and the time by which snapshots are old.
#[derive(Debug, Clone, Copy)]
pub struct Keep {
    /// Now, ms since the epoch.
    pub now_ms: i64,
    /// Ours.
    pub ours: Ours,
}

/// What of us must stay on the ancestry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ours {
    /// A main table: the records of so many dedup generations, newest first, and in any case the newest record.
    Generations(usize),
    /// A side table: so many of its newest marks, those of one batch counted once.
    Marks(usize),
}

/// Snapshots that leave, the oldest first, none of them the head of a ref that stays. Empty where the metadata's refs
/// can not be read.
pub fn expiring(metadata: &TableMetadata, rules: &Rules, keep: &Keep) -> Vec<i64> {
    let Some(refs) = savepoint::refs(metadata) else { return Vec::new() };
    let cutoff_ms = keep.now_ms.saturating_sub(rules.age_ms_max);
    let staying_refs: Vec<(&String, &SnapshotReference)> =
        refs.iter().filter(|(name, at)| !has_aged_out(metadata, name, at, rules, keep.now_ms)).collect();
    let mut staying: BTreeSet<i64> = staying_refs.iter().map(|(_, at)| at.snapshot_id).collect();
    let mut referenced = staying.clone();
    let mut branches = vec![main_branch(metadata, &refs, rules, cutoff_ms, keep)];
    branches.extend(
        staying_refs
            .iter()
            .filter(|(name, at)| at.is_branch() && *name != MAIN_BRANCH)
            .map(|(_, at)| Branch::of(Some(at.snapshot_id), &at.retention, rules, cutoff_ms, keep.now_ms)),
    );
    for branch in branches {
        let ancestors = ancestors(metadata, branch.head);
        let kept = branch.kept(metadata, &ancestors);
        staying.extend(&ancestors[..kept]);
        referenced.extend(ancestors);
    }
    let mut leaving: Vec<_> = metadata
        .snapshots()
        .filter(|snapshot| {
            let id = snapshot.snapshot_id();
            let is_young_stray = !referenced.contains(&id) && snapshot.timestamp_ms() >= cutoff_ms;
            !staying.contains(&id) && !is_young_stray
        })
        .collect();
    leaving.sort_by_key(|snapshot| (snapshot.sequence_number(), snapshot.timestamp_ms()));
    leaving.iter().take(SNAPSHOTS_EXPIRED_MAX).map(|snapshot| snapshot.snapshot_id()).collect()
}

/// A branch and what stays of it.
struct Branch {
    head: Option<i64>,
    snapshots_min: usize,
    snapshots_max: usize,
    cutoff_ms: i64,
}

impl Branch {
    fn of(
        head: Option<i64>,
        retention: &SnapshotRetention,
        rules: &Rules,
        cutoff_ms: i64,
        now_ms: i64,
    ) -> Self {
        let (own_min, own_age_ms) = match retention {
            SnapshotRetention::Branch { min_snapshots_to_keep, max_snapshot_age_ms, .. } => {
                (*min_snapshots_to_keep, *max_snapshot_age_ms)
            }
            SnapshotRetention::Tag { .. } => (None, None),
        };
        Self {
            head,
            snapshots_min: own_min
                .and_then(|least| usize::try_from(least).ok())
                .unwrap_or(rules.snapshots_min),
            snapshots_max: usize::MAX,
            cutoff_ms: own_age_ms.map_or(cutoff_ms, |age_ms| now_ms.saturating_sub(age_ms)),
        }
    }

    /// Number of the newest ancestors that stay, without a gap.
    fn kept(&self, metadata: &TableMetadata, ancestors: &[i64]) -> usize {
        let is_young = |id: &i64| {
            metadata.snapshot_by_id(*id).is_some_and(|snapshot| snapshot.timestamp_ms() >= self.cutoff_ms)
        };
        let oldest_young = ancestors.iter().take(self.snapshots_max).rposition(is_young);
        let young = oldest_young.map_or(0, |index| index + 1);
        young.max(self.snapshots_min).min(ancestors.len())
    }
}

fn main_branch(
    metadata: &TableMetadata,
    refs: &HashMap<String, SnapshotReference>,
    rules: &Rules,
    cutoff_ms: i64,
    keep: &Keep,
) -> Branch {
    let head = metadata.current_snapshot_id();
    let unsaid = SnapshotRetention::branch(None, None, None);
    let retention = refs.get(MAIN_BRANCH).map_or(&unsaid, |main| &main.retention);
    let branch = Branch::of(head, retention, rules, cutoff_ms, keep.now_ms);
    let of_ours = mutant!("ledger-expires-by-age", 0 => ancestors_of_ours(metadata, keep.ours));
    Branch {
        snapshots_min: branch.snapshots_min.max(of_ours),
        snapshots_max: rules.snapshots_max.unwrap_or(usize::MAX),
        ..branch
    }
}

/// How many of the newest ancestors must stay for what we find on them.
fn ancestors_of_ours(metadata: &TableMetadata, ours: Ours) -> usize {
    let mut generations: BTreeSet<Option<String>> = BTreeSet::new();
    let mut marks: BTreeSet<Option<u64>> = BTreeSet::new();
    let mut needed = 0;
    for (index, snapshot) in ledger::ancestry(metadata).enumerate() {
        let summary = &snapshot.summary().additional_properties;
        match ours {
            Ours::Marks(most) => {
                let Some(text) = summary.get(side::MARK) else { continue };
                if marks.insert(side::batch_in(text)) {
                    needed = index + 1;
                }
                if marks.len() >= most {
                    break;
                }
            }
            Ours::Generations(most) => {
                let Some(text) = summary.get(ledger::SUMMARY_PACKED) else { continue };
                let record = ledger::LedgerRecord::from_packed(text, snapshot.snapshot_id()).ok();
                if generations.insert(record.and_then(|record| record.dedup.generation)) {
                    needed = index + 1;
                }
                if generations.len() >= most {
                    break;
                }
            }
        }
    }
    needed
}

fn ancestors(metadata: &TableMetadata, head: Option<i64>) -> Vec<i64> {
    let mut found = Vec::new();
    let mut next = head.and_then(|id| metadata.snapshot_by_id(id));
    while let Some(snapshot) = next {
        found.push(snapshot.snapshot_id());
        next = snapshot.parent_snapshot_id().and_then(|id| metadata.snapshot_by_id(id));
    }
    found
}

fn has_aged_out(
    metadata: &TableMetadata,
    name: &str,
    at: &SnapshotReference,
    rules: &Rules,
    now_ms: i64,
) -> bool {
    let own = match at.retention {
        SnapshotRetention::Branch { max_ref_age_ms, .. } | SnapshotRetention::Tag { max_ref_age_ms } => {
            max_ref_age_ms
        }
    };
    let age_ms_max = own.unwrap_or(rules.ref_age_ms_max);
    let made_ms = metadata.snapshot_by_id(at.snapshot_id).map(|snapshot| snapshot.timestamp_ms());
    name != MAIN_BRANCH && made_ms.is_some_and(|made_ms| now_ms.saturating_sub(made_ms) > age_ms_max)
}

#[cfg(test)]
mod tests;
