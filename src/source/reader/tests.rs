use super::*;

fn tail(offset: i64, hash: u64) -> Tail {
    Tail { offset, hash }
}

#[test]
fn a_tail_that_was_compacted_away_is_no_difference_and_a_record_in_its_gap_is_one() {
    let start = NextOffset::at(20);
    assert!(!differs(tail(10, 7), tail(10, 7), start));
    assert!(differs(tail(10, 7), tail(10, 8), start));
    assert!(!differs(tail(10, 7), tail(20, 1), start));
    assert!(!differs(tail(10, 7), tail(35, 1), start));
    assert!(differs(tail(10, 7), tail(11, 7), start));
    assert!(differs(tail(10, 7), tail(19, 1), start));
}

#[test]
fn a_tail_hash_tells_null_from_empty_and_key_from_payload() {
    let hashes = [
        tail_hash(1, None, None, None),
        tail_hash(2, None, None, None),
        tail_hash(1, Some(0), None, None),
        tail_hash(1, None, Some(b""), None),
        tail_hash(1, None, None, Some(b"")),
        tail_hash(1, None, Some(b"a"), Some(b"b")),
        tail_hash(1, None, Some(b"ab"), Some(b"")),
        tail_hash(1, None, Some(b""), Some(b"ab")),
    ];
    let distinct: std::collections::BTreeSet<_> = hashes.iter().collect();
    assert_eq!(distinct.len(), hashes.len());
}

#[test]
fn the_tail_hash_never_changes_because_ledgers_hold_it() {
    assert_eq!(tail_hash(42, Some(1_700_000_000_000), Some(b"key"), Some(b"payload")), PINNED);
}

/// From the first release; a change here makes every ledger's tail differ.
const PINNED: u64 = 17_878_484_584_324_921_617;
