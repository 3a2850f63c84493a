//! Files of every format version, kept small in `fixtures/dedup`: they are read for ever, and the current version is
//! written as it always was. A manifest with all of its parts stands in `window_tests.rs`.

use std::fs;
use std::path::{Path, PathBuf};

use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::*;

const KEYS: u64 = 600;

fn fixture(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/dedup").join(version)
}

fn spec() -> StoreSpec {
    StoreSpec {
        job_id: Uuid::from_u128(0x0189_0a5d_ac96_774b_bcce_b302_099a_8057),
        key_spec_hash: "00112233445566778899aabbccddeeff".into(),
        seed: 1_234_567_890_123_456_789,
        shards: 256,
        bucket_width_ms: 3_600_000,
        repeats: Repeats::AnyTime,
    }
}

fn keys() -> Vec<Key> {
    let key = |number: u64| Key {
        fingerprint: Fingerprint::from_value(xxh3_128(&number.to_le_bytes()) >> 40),
        event_time: EventTimeMs(
            1_700_000_000_000 + (number % 7) as i64 * 3_000_000 - (number / 599) as i64 * (1 << 40),
        ),
    };
    (0..KEYS).map(key).collect()
}

/// Two commits, keys up to 500, then the others; and the same state rebuilt, whose filters are those of lasting segments.
fn write_to(folder: &Path) -> [GenerationRef; 2] {
    let mut store = Store::open(folder, spec(), None, 0).unwrap();
    let (first, second) = (keys()[..500].to_vec(), keys()[500..].to_vec());
    for (batch, keys) in [(1, first), (2, second)] {
        store.probe(&keys).unwrap();
        store.prepare(generation_name(batch)).unwrap();
        store.publish();
    }
    drop(store);
    let mut builder = Builder::create(folder, spec(), 0, None).unwrap();
    builder.add(&keys()).unwrap();
    let (rebuilt, _) = builder.finish(generation_name(3)).unwrap();
    let found = list_generations(folder, Some(spec().job_id)).unwrap();
    let committed = found.into_iter().find(|found| found.reference.name == generation_name(2)).unwrap();
    [committed.reference, rebuilt]
}

fn generation_name(batch: u64) -> GenerationName {
    let attempt = Uuid::from_u128(0x018b_cfe5_6800_7000_8000_0000_0000_0000 + u128::from(batch));
    GenerationName::new(3, batch, attempt)
}

/// A generation of a fixture, as the ledger that wrote it would name it.
fn reference(batch: u64, checksum: &str) -> GenerationRef {
    GenerationRef { name: generation_name(batch), checksum: checksum.into() }
}

const CHECKSUM_V1: &str = "842a4f5dda7dd651086a469e644100d0";
const CHECKSUM_V2: &str = "fa8e7c6cd9559d5152a1c5d4514ec034";
const CHECKSUM_V3: &str = "be447818d8eacab965d27ace6010b673";
const CHECKSUM_V3_REBUILT: &str = "be10acbb39aa90c6777305182b7cab83";

#[test]
fn files_of_every_version_are_read() {
    let named = [
        ("v1", reference(2, CHECKSUM_V1)),
        ("v2", reference(2, CHECKSUM_V2)),
        ("v3", reference(2, CHECKSUM_V3)),
        ("v3", reference(3, CHECKSUM_V3_REBUILT)),
    ];
    for (version, reference) in named {
        let folder = fixture(version);
        // Opening makes the folder if it is not there; a fixture that is gone must not look like an empty state.
        let mut store = Store::open(&folder, spec(), Some(&reference), 0).unwrap();
        assert_eq!(verify(&folder, &reference).unwrap().keys, KEYS);
        assert_eq!(store.stats().keys, KEYS);
        assert!(store.probe(&keys()).unwrap().iter().all(|verdict| *verdict == Verdict::Duplicate));
        let unseen: Vec<Key> = keys()
            .iter()
            .map(|key| Key { fingerprint: Fingerprint::from_value(key.fingerprint.value() ^ 1), ..*key })
            .collect();
        assert!(store.probe(&unseen).unwrap().iter().all(|verdict| *verdict == Verdict::New));
    }
}

#[test]
fn version_3_is_written_as_it_always_was() {
    let folder = tempfile::tempdir().unwrap();
    let made = write_to(folder.path());
    let mut compared = 0;
    for entry in fs::read_dir(fixture("v3")).unwrap() {
        let entry = entry.unwrap();
        let written = fs::read(folder.path().join(entry.file_name())).unwrap();
        assert!(written == fs::read(entry.path()).unwrap(), "{:?} differs", entry.file_name());
        compared += 1;
    }
    assert_eq!((compared, made), (6, [reference(2, CHECKSUM_V3), reference(3, CHECKSUM_V3_REBUILT)]));
}
