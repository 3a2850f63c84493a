//! Which snapshots leave, against a second reading of the rules and by hand.

use std::collections::HashSet;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::commit::ledger::LedgerRecord;

const NOW_MS: i64 = 2_000_000;

/// A snapshot of the model: its parent by place, its age, and the number of the generation that its record names.
#[derive(Debug, Clone)]
struct Made {
    parent: Option<usize>,
    age_ms: i64,
    generation: Option<u8>,
}

fn id(place: usize) -> i64 {
    place as i64 + 1
}

fn record(generation: u8) -> String {
    let mut record = crate::commit::ledger::tests::record();
    record.dedup.generation = Some(format!("g{generation}"));
    record.to_summary()[ledger::SUMMARY_PACKED].clone()
}

fn metadata(made: &[Made], current: usize, refs: &Value) -> TableMetadata {
    let snapshots: Vec<Value> = made
        .iter()
        .enumerate()
        .map(|(place, made)| {
            let mut summary = json!({ "operation": "append" });
            if let Some(generation) = made.generation {
                summary[ledger::SUMMARY_PACKED] = Value::String(record(generation));
            }
            json!({
                "snapshot-id": id(place), "parent-snapshot-id": made.parent.map(id),
                "sequence-number": place + 1, "timestamp-ms": NOW_MS - made.age_ms,
                "manifest-list": format!("l{place}"), "summary": summary, "schema-id": 0,
            })
        })
        .collect();
    let mut all_refs = json!({ "main": { "snapshot-id": id(current), "type": "branch" } });
    all_refs.as_object_mut().unwrap().extend(refs.as_object().unwrap().clone());
    serde_json::from_value(json!({
        "format-version": 2, "table-uuid": "9c12d441-03fe-4693-9a96-a0705ddf69c1", "location": "file:///t",
        "last-sequence-number": made.len(), "last-updated-ms": NOW_MS, "last-column-id": 1,
        "schemas": [{ "type": "struct", "schema-id": 0,
            "fields": [{ "id": 1, "name": "a", "required": true, "type": "long" }] }],
        "current-schema-id": 0, "partition-specs": [{ "spec-id": 0, "fields": [] }], "default-spec-id": 0,
        "last-partition-id": 999, "sort-orders": [{ "order-id": 0, "fields": [] }], "default-sort-order-id": 0,
        "properties": {}, "current-snapshot-id": id(current), "snapshots": snapshots, "snapshot-log": [],
        "metadata-log": [], "refs": all_refs,
    }))
    .unwrap()
}

fn rules(age_ms_max: i64, snapshots_min: usize, snapshots_max: Option<usize>) -> Rules {
    Rules {
        age_ms_max,
        snapshots_min,
        snapshots_max,
        ref_age_ms_max: i64::MAX,
        collects: true,
        merge: None,
        deletes_metadata_files: true,
    }
}

fn keep(generations: usize) -> Keep {
    Keep { now_ms: NOW_MS, ours: Ours::Generations(generations) }
}

/// A straight line of snapshots, one a ms, the newest the current one.
fn line(count: usize, generation: impl Fn(usize) -> Option<u8>) -> Vec<Made> {
    let made = |place: usize| Made {
        parent: place.checked_sub(1),
        age_ms: (count - 1 - place) as i64,
        generation: generation(place),
    };
    (0..count).map(made).collect()
}

#[test]
fn the_oldest_leave_first_and_the_newest_by_number_stay() {
    let metadata = metadata(&line(10, |_| Some(1)), 9, &json!({}));
    assert_eq!(expiring(&metadata, &rules(0, 3, None), &keep(1)), (1..=7).collect::<Vec<i64>>());
    assert_eq!(expiring(&metadata, &rules(4, 1, None), &keep(1)), (1..=5).collect::<Vec<i64>>());
    assert_eq!(expiring(&metadata, &rules(1_000, 1, Some(4)), &keep(1)), (1..=6).collect::<Vec<i64>>());
    assert_eq!(expiring(&metadata, &rules(1_000, 6, Some(4)), &keep(1)), (1..=4).collect::<Vec<i64>>());
    assert!(expiring(&metadata, &rules(1_000, 1, None), &keep(1)).is_empty());
}

#[test]
fn the_records_of_the_generations_that_are_kept_stay_below_any_number_of_foreign_snapshots() {
    // Generations 1, 2 and 3, then twenty snapshots of others.
    let made = line(23, |place| (place < 3).then(|| place as u8 + 1));
    let metadata = metadata(&made, 22, &json!({}));
    assert_eq!(expiring(&metadata, &rules(0, 1, Some(5)), &keep(2)), [1]);
    assert!(expiring(&metadata, &rules(0, 1, Some(5)), &keep(3)).is_empty());
}

#[test]
fn a_tag_keeps_its_snapshot_alone_and_a_ref_whose_time_is_over_keeps_nothing() {
    let made = line(10, |_| None);
    let tags = json!({
        "kept": { "snapshot-id": 3, "type": "tag" },
        "over": { "snapshot-id": 5, "type": "tag", "max-ref-age-ms": 1 },
    });
    let metadata = metadata(&made, 9, &tags);
    assert_eq!(expiring(&metadata, &rules(0, 1, None), &keep(1)), [1, 2, 4, 5, 6, 7, 8, 9]);
}

#[test]
fn a_branch_keeps_what_its_own_rule_says_and_what_it_shares_with_main() {
    let mut made = line(6, |_| None);
    // A branch of two snapshots off the third.
    made.push(Made { parent: Some(2), age_ms: 1, generation: None });
    made.push(Made { parent: Some(6), age_ms: 0, generation: None });
    let branch = json!({ "audit": { "snapshot-id": 8, "type": "branch", "min-snapshots-to-keep": 3 } });
    let metadata = metadata(&made, 5, &branch);
    assert_eq!(expiring(&metadata, &rules(0, 1, None), &keep(1)), [1, 2, 4, 5]);
}

#[test]
fn a_snapshot_that_no_ref_reaches_stays_while_it_is_young() {
    let mut made = line(4, |_| None);
    made.push(Made { parent: Some(1), age_ms: 50, generation: None });
    let metadata = metadata(&made, 3, &json!({}));
    assert!(expiring(&metadata, &rules(100, 1, Some(9)), &keep(1)).is_empty());
    assert_eq!(expiring(&metadata, &rules(10, 1, Some(9)), &keep(1)), [5]);
}

#[test]
fn a_pass_has_a_bound_and_takes_the_oldest() {
    let metadata = metadata(&line(1_500, |_| None), 1_499, &json!({}));
    let leaving = expiring(&metadata, &rules(0, 1, None), &keep(1));
    assert_eq!((leaving.len(), leaving[0], leaving[999]), (SNAPSHOTS_EXPIRED_MAX, 1, 1_000));
}

fn made() -> impl Strategy<Value = Vec<Made>> {
    prop::collection::vec((any::<prop::sample::Index>(), 0u8..5, 0i64..40, prop::option::of(1u8..4)), 1..30)
        .prop_map(|drawn| {
            let mut made: Vec<Made> = Vec::new();
            for (parent, strays, age_ms, generation) in drawn {
                let place = made.len();
                let parent = match strays {
                    _ if place == 0 => None,
                    0 => Some(parent.index(place)),
                    _ => Some(place - 1),
                };
                made.push(Made { parent, age_ms: 40 + age_ms - place as i64, generation });
            }
            made
        })
}

proptest! {
    /// Goal: what stays is what the rules say, and nothing else leaves.
    /// Method: any tree of snapshots with tags and branches; each snapshot is judged by itself, from the rules read a
    /// second time.
    #[test]
    fn what_leaves_is_what_no_rule_keeps(
        made in made(), current in any::<prop::sample::Index>(), tag in any::<prop::sample::Index>(),
        branch in any::<prop::sample::Index>(), age_ms_max in 0i64..60, snapshots_min in 1usize..6,
        snapshots_max in prop::option::of(1usize..8), generations in 1usize..4,
    ) {
        let (current, tag, branch) = (current.index(made.len()), tag.index(made.len()), branch.index(made.len()));
        let refs = json!({
            "t": { "snapshot-id": id(tag), "type": "tag" }, "b": { "snapshot-id": id(branch), "type": "branch" },
        });
        let metadata = metadata(&made, current, &refs);
        let rules = rules(age_ms_max, snapshots_min, snapshots_max);
        let left: HashSet<i64> = expiring(&metadata, &rules, &keep(generations)).into_iter().collect();
        let chain = |head: usize| std::iter::successors(Some(head), |place| made[*place].parent).collect::<Vec<_>>();
        let (main, other) = (chain(current), chain(branch));
        let is_young = |place: usize| made[place].age_ms <= age_ms_max;
        // Index below which everything of a chain stays.
        let by_age = |chain: &[usize], most: usize| {
            chain.iter().take(most).enumerate().filter(|(_, place)| is_young(**place)).map(|(index, _)| index + 1).max()
        };
        let mut names = HashSet::new();
        let firsts: Vec<usize> = main
            .iter()
            .enumerate()
            .filter(|(_, place)| made[**place].generation.is_some_and(|name| names.insert(name)))
            .map(|(index, _)| index + 1)
            .collect();
        let for_ours = firsts.iter().take(generations).max().copied().unwrap_or(0);
        let of_main = by_age(&main, snapshots_max.unwrap_or(usize::MAX)).unwrap_or(0).max(snapshots_min).max(for_ours);
        let of_other = by_age(&other, usize::MAX).unwrap_or(0).max(snapshots_min);
        for place in 0..made.len() {
            let on = |chain: &[usize]| chain.iter().position(|other| *other == place);
            let stays = on(&main).is_some_and(|index| index < of_main)
                || on(&other).is_some_and(|index| index < of_other)
                || place == tag
                || (on(&main).is_none() && on(&other).is_none() && is_young(place));
            prop_assert_eq!(!left.contains(&id(place)), stays, "snapshot {}", id(place));
        }
        let record = ledger::ancestry(&metadata).find_map(|snapshot| {
            let text = snapshot.summary().additional_properties.get(ledger::SUMMARY_PACKED)?;
            LedgerRecord::from_packed(text, snapshot.snapshot_id()).ok().map(|_| snapshot.snapshot_id())
        });
        prop_assert!(record.is_none_or(|record| !left.contains(&record)), "the newest record stays");
    }
}
