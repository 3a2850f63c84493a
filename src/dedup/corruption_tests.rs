//! Damage of every kind to every file of a state: found before a wrong answer, and named.
//!
//! The rule that every case is held to: opening, probing and verifying give an error that names the damaged file, or
//! every answer is right. The second is allowed only for bytes that nobody reads.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::page::PAGE_BYTES;
use super::store_tests::NOTHING_PINNED;
use super::*;

const WIDTH_MS: i64 = 1_000;

fn spec(repeats: Repeats) -> StoreSpec {
    StoreSpec {
        job_id: Uuid::from_u128(9),
        key_spec_hash: "corrupt".into(),
        seed: 3,
        shards: 256,
        bucket_width_ms: WIDTH_MS,
        repeats,
    }
}

/// Which of four buckets a key belongs to.
type BucketOf = fn(u64) -> u64;

fn evenly(number: u64) -> u64 {
    number % 4
}

/// Nearly all keys in one bucket.
fn mostly_one(number: u64) -> u64 {
    (number % 64).min(3)
}

/// A folder where syncs cost nothing, if the system has one.
pub(super) fn folder_in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// A state made by batches of these sizes, its newest generation and the number of its keys.
struct State {
    folder: TempDir,
    generation: GenerationRef,
    keys: u64,
    repeats: Repeats,
    bucket_of: BucketOf,
}

impl State {
    /// Names do not depend on `salt`, keys do.
    fn grown(batches: &[u64], salt: u64, repeats: Repeats, bucket_of: BucketOf) -> Self {
        let folder = folder_in_memory();
        let mut store = Store::open(folder.path(), spec(repeats), None, 0).unwrap();
        let (mut begin, mut generation) = (salt, None);
        for (batch, size) in batches.iter().enumerate() {
            store.probe(&keys(begin, begin + size, bucket_of)).unwrap();
            begin += size;
            let name = GenerationName::new(1, batch as u64, Uuid::from_u128(batch as u128 + 1));
            generation = Some(store.prepare(name).unwrap());
            store.publish();
            // Which files there are must not depend on how fast merges are.
            store.finish_merges();
        }
        drop(store);
        let generation = generation.unwrap();
        let state = Self { folder, generation, keys: begin - salt, repeats, bucket_of };
        // Files of earlier generations are not the state.
        sweep(state.path(), std::slice::from_ref(&state.generation), 2).unwrap();
        state
    }

    /// As many keys as the state holds, from this number on; it holds those from 0 on.
    fn keys(&self, begin: u64) -> Vec<Key> {
        keys(begin, begin + self.keys, self.bucket_of)
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let read = |entry: std::io::Result<fs::DirEntry>| {
            let entry = entry.unwrap();
            (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())
        };
        fs::read_dir(self.path()).unwrap().map(read).collect()
    }

    fn segments(&self) -> Vec<String> {
        self.files().into_keys().filter(|file| file.ends_with(".segment")).collect()
    }

    /// What is wrong with the state, as whoever reads all of it finds out.
    fn verified(&self) -> Result<(), StoreError> {
        verify(self.path(), &self.generation).map(|report| assert_eq!(report.keys, self.keys))
    }

    /// Opens the state and asks for every key and as many that it does not hold.
    ///
    /// # Panics
    /// If an answer is wrong.
    fn asked(&self, limits: Limits, step: usize) -> Result<(), StoreError> {
        let mut store = Store::open_within(self.path(), spec(self.repeats), Some(&self.generation), limits)?;
        let held: Vec<Key> = self.keys(0).into_iter().step_by(step).collect();
        let verdicts = store.probe(&held)?;
        assert!(verdicts.iter().all(|verdict| *verdict == Verdict::Duplicate), "a seen key passed as new");
        let unseen: Vec<Key> = self.keys(1 << 40).into_iter().step_by(step).collect();
        let verdicts = store.probe(&unseen)?;
        assert!(verdicts.iter().all(|verdict| *verdict == Verdict::New), "a first key was dropped");
        Ok(())
    }

    /// Holds every reader to the rule; gives whether verification found the damage.
    fn judge(&self, damaged: &[&str], what: &str) -> bool {
        let named = |found: Result<(), StoreError>| match found {
            Ok(()) => false,
            Err(StoreError::Corrupt { file, .. } | StoreError::Missing { file }) => {
                assert!(damaged.contains(&file.as_str()), "{what}: {file} was blamed for {damaged:?}");
                true
            }
            Err(other) => panic!("{what}: {other}"),
        };
        named(self.asked(NOTHING_PINNED, 1));
        named(self.asked(Limits::of(1 << 20), 1));
        named(self.verified())
    }
}

/// Keys `[begin, end)`.
fn keys(begin: u64, end: u64, bucket_of: BucketOf) -> Vec<Key> {
    let key = |number: u64| Key {
        fingerprint: Fingerprint::from_value(xxh3_128(&number.to_le_bytes()) >> 40),
        event_time: EventTimeMs(bucket_of(number) as i64 * WIDTH_MS),
    };
    (begin..end).map(key).collect()
}

/// Segments of two tiers, each with several buckets.
fn tiny(repeats: Repeats) -> State {
    State::grown(&[9, 8, 7, 9, 9, 8, 8, 9, 5, 12], 0, repeats, evenly)
}

#[test]
fn every_byte_of_a_tiny_state_flipped_is_found_and_its_file_named() {
    let mut flips = 0;
    for repeats in [Repeats::AnyTime, Repeats::SameTime] {
        let state = tiny(repeats);
        state.verified().unwrap();
        state.asked(NOTHING_PINNED, 1).unwrap();
        for (file, good) in state.files() {
            let path = state.path().join(&file);
            for (at, byte) in good.iter().enumerate() {
                write_byte(&path, at, byte ^ 1 << (at % 8));
                let found = state.judge(&[&file], &format!("byte {at} of {file} flipped"));
                assert!(found, "byte {at} of {file}: every byte of a tiny state is read by verification");
                flips += 1;
                write_byte(&path, at, *byte);
            }
        }
        state.verified().unwrap();
    }
    crate::figures::leave("corruptions-of-every-byte", &serde_json::json!({"flips": flips, "found": flips}));
}

#[test]
fn a_file_cut_anywhere_emptied_longer_or_gone_is_named() {
    let state = tiny(Repeats::AnyTime);
    for (file, good) in state.files() {
        let path = state.path().join(&file);
        for length in (0..good.len()).step_by(5).chain([good.len() - 1]) {
            fs::write(&path, &good[..length]).unwrap();
            assert!(state.judge(&[&file], &format!("{file} cut to {length} bytes")));
            assert!(
                state.asked(NOTHING_PINNED, 1).is_err(),
                "a wrong length is found when the file is opened"
            );
        }
        for more in [&good[..], &[0; 4096], b"\n"] {
            fs::write(&path, [&good[..], more].concat()).unwrap();
            assert!(state.judge(&[&file], &format!("{file} with {} bytes more", more.len())));
        }
        for filler in [0, 0xff] {
            // What a disk may leave that lost a write: the right length and nothing in it.
            fs::write(&path, vec![filler; good.len()]).unwrap();
            assert!(state.judge(&[&file], &format!("{file} full of {filler}")));
        }
        fs::remove_file(&path).unwrap();
        assert!(state.judge(&[&file], &format!("{file} removed")));
        assert!(matches!(state.verified(), Err(StoreError::Missing { .. })));
        fs::write(&path, &good).unwrap();
    }
    state.verified().unwrap();
}

#[test]
fn an_older_file_of_the_same_name_is_found() {
    // Same names, same sizes, same job: what a backup from before a rebuild holds.
    let batches = [9, 8, 7, 9, 9, 8, 8, 9, 5, 12];
    let (state, older) = (tiny(Repeats::AnyTime), State::grown(&batches, 5_000, Repeats::AnyTime, evenly));
    let old = older.files();
    let files = state.files();
    assert_eq!(old.keys().collect::<Vec<_>>(), files.keys().collect::<Vec<_>>());
    for (file, good) in files {
        fs::write(state.path().join(&file), &old[&file]).unwrap();
        assert!(state.judge(&[&file], &format!("{file} from a backup")));
        assert!(state.asked(NOTHING_PINNED, 1).is_err(), "another file is found when it is opened");
        fs::write(state.path().join(&file), &good).unwrap();
    }
}

#[test]
fn segments_that_changed_places_are_found() {
    let state = tiny(Repeats::AnyTime);
    let files = state.files();
    let segments = state.segments();
    assert!(segments.len() >= 3, "{segments:?}");
    for one in &segments {
        for other in segments.iter().filter(|other| *other > one) {
            fs::write(state.path().join(one), &files[other]).unwrap();
            fs::write(state.path().join(other), &files[one]).unwrap();
            assert!(state.judge(&[one, other], &format!("{one} swapped with {other}")));
            assert!(state.asked(NOTHING_PINNED, 1).is_err());
            fs::write(state.path().join(one), &files[one]).unwrap();
            fs::write(state.path().join(other), &files[other]).unwrap();
        }
    }
}

/// Pieces of one segment moved within it or into another: each is intact, and in the wrong place.
#[test]
fn intact_pieces_in_a_wrong_place_are_found() {
    let state = State::grown(&[3_000, 3_000], 0, Repeats::AnyTime, evenly);
    let segments = state.segments();
    let (first, second) = (&segments[0], &segments[1]);
    let files = state.files();
    let Content::Segment(facts) = inspect(&state.path().join(first), false, &mut |_| {}).unwrap().content
    else {
        panic!("{first} is a segment")
    };
    let pages: Vec<u64> = facts.sections.iter().map(|section| section.pages_position).collect();
    let whole = |page: u64| page as usize..page as usize + PAGE_BYTES;
    for (from, to) in [(0, 1), (1, 0), (2, 3)] {
        let mut moved = files[first].clone();
        moved.copy_within(whole(pages[from]), pages[to] as usize);
        fs::write(state.path().join(first), &moved).unwrap();
        assert!(state.judge(&[first], "a page of another section"));
        assert!(state.asked(NOTHING_PINNED, 1).is_err());
        let mut crossed = files[first].clone();
        crossed[whole(pages[to])].copy_from_slice(&files[second][whole(pages[to])]);
        fs::write(state.path().join(first), &crossed).unwrap();
        assert!(state.judge(&[first], "a page of another segment"));
    }
}

/// Sections large enough to be aligned, whose gaps nobody reads.
#[test]
fn a_few_thousand_random_flips_of_a_larger_state_are_found_or_harmless() {
    const FLIPS: usize = 2_000;
    let state = State::grown(&[70_000, 3_000, 40], 0, Repeats::SameTime, mostly_one);
    let mut files = state.files();
    let lengths: Vec<(String, usize)> =
        files.iter().map(|(file, bytes)| (file.clone(), bytes.len())).collect();
    let all: usize = lengths.iter().map(|(_, length)| length).sum();
    let mut random = StdRng::seed_from_u64(3);
    let mut unseen = 0;
    for flip in 0..FLIPS {
        let mut at = random.random_range(0..all);
        let place = lengths.iter().position(|(_, length)| {
            let inside = at < *length;
            if !inside {
                at -= length;
            }
            inside
        });
        let file = &lengths[place.unwrap()].0;
        let bytes = files.get_mut(file).unwrap();
        let bit = 1 << random.random_range(0..8);
        bytes[at] ^= bit;
        write_byte(&state.path().join(file), at, bytes[at]);
        let looked = inspect(&state.path().join(file), true, &mut |_| {});
        let found = match looked {
            Ok(looked) => looked.damage().is_some(),
            Err(error) => matches!(error, StoreError::Corrupt { .. }),
        };
        // Reading everything for each flip would take minutes: one in fifty is asked as a store is.
        if flip % 50 == 0 {
            assert_eq!(state.judge(&[file], &format!("byte {at} of {file} flipped")), found);
        } else if !found {
            state.asked(Limits::of(0), 7).unwrap();
        }
        unseen += usize::from(!found);
        bytes[at] ^= bit;
        write_byte(&state.path().join(file), at, bytes[at]);
    }
    state.verified().unwrap();
    let facts = serde_json::json!({"flips": FLIPS, "found": FLIPS - unseen, "in gaps": unseen});
    crate::figures::leave("corruptions-at-random", &facts);
    assert!(
        unseen * 50 < FLIPS,
        "{unseen} of {FLIPS} flips fell into gaps, which are at most 1 % of the bytes"
    );
}

fn write_byte(path: &Path, at: usize, byte: u8) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[byte], at as u64).unwrap();
}
