//! The corpus of the fuzzers and seeded mutations of it, in every test run: whatever stands in a file, its reader ends
//! with an answer or an error.
//!
//! `tests/fuzz` runs the same functions under a coverage-guided fuzzer; what it finds becomes a file of
//! `fixtures/fuzz`, which is read here for ever.

use std::fs;
use std::path::{Path, PathBuf};

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_128;

use super::segment::alone;
use super::*;

/// Mutations of its seeds that each replay reads.
pub(crate) const MUTATIONS: usize = 20_000;
/// Most bytes of a state that is written anew to be mutated: small files are mutated more densely.
const SEED_BYTES_MAX: u64 = 16 << 10;

pub(crate) fn fixtures(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(folder)
}

pub(crate) fn files_in(folder: &Path) -> Vec<Vec<u8>> {
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// A small state as this program writes it now: some keys close together, some far apart, in several buckets.
fn fresh_state() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let spec = StoreSpec {
        job_id: Uuid::from_u128(7),
        key_spec_hash: "0123456789abcdef".into(),
        seed: 1,
        shards: 256,
        bucket_width_ms: 1_000,
        repeats: Repeats::AnyTime,
    };
    let mut store = Store::open(folder.path(), spec, None, 0).unwrap();
    for (batch, (begin, end)) in [(0, 3), (3, 150), (150, 700)].into_iter().enumerate() {
        let keys: Vec<Key> = (begin..end)
            .map(|number: u64| {
                let spread = if number.is_multiple_of(3) {
                    u128::from(number)
                } else {
                    xxh3_128(&number.to_le_bytes()) >> 40
                };
                Key {
                    fingerprint: Fingerprint::from_value(spread),
                    event_time: EventTimeMs((number % 3) as i64 * 1_000),
                }
            })
            .collect();
        store.probe(&keys).unwrap();
        store.prepare(GenerationName::new(1, batch as u64, Uuid::new_v4())).unwrap();
        store.publish();
    }
    folder
}

/// What inputs are made of.
pub(crate) struct Seeds {
    /// What fuzzers found: mostly broken, each in a way of its own.
    pub(crate) kept: Vec<Vec<u8>>,
    /// Whole files of released versions and of this one: what is made of them gets furthest.
    pub(crate) whole: Vec<Vec<u8>>,
}

impl Seeds {
    fn pick(&self, random: &mut StdRng) -> &[u8] {
        let seeds = if random.random_ratio(3, 4) { &self.whole } else { &self.kept };
        &seeds[random.random_range(0..seeds.len())]
    }
}

fn seeds(target: &str) -> Seeds {
    let kept = files_in(&fixtures("fuzz").join(target));
    let mut whole = Vec::new();
    let fresh = fresh_state();
    let released: Vec<PathBuf> =
        fs::read_dir(fixtures("dedup")).unwrap().map(|entry| entry.unwrap().path()).collect();
    for folder in released.iter().map(PathBuf::as_path).chain([fresh.path()]) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let small = fs::metadata(&path).unwrap().len() <= SEED_BYTES_MAX;
            match target {
                "page" if path.extension().is_some_and(|end| end == "segment") => {
                    whole.extend(pages_of(&path))
                }
                _ if small && path.extension().is_some_and(|end| end == target) => {
                    whole.push(fs::read(&path).unwrap());
                }
                _ => {}
            }
        }
    }
    assert!(whole.len() > 3 && kept.len() > 3, "{target} has seeds");
    Seeds { kept, whole }
}

fn pages_of(path: &Path) -> Vec<Vec<u8>> {
    let (segment, _) = alone::open(fs::File::open(path).unwrap(), "seed.segment").unwrap();
    let read = |(position, bytes)| {
        let mut page = vec![0; bytes];
        segment.read(&mut page, position).unwrap();
        page
    };
    let places = segment.sections.iter().flat_map(|section| {
        (0..section.pages).map(|page| (section.page_position(page), section.page_bytes(page)))
    });
    places.map(read).collect()
}

/// Numbers at which readers go wrong.
fn edge(random: &mut StdRng, length: usize) -> u64 {
    let length = length as u64;
    let edges = [
        0,
        1,
        u64::MAX,
        u64::MAX - 4_096,
        1 << 63,
        1 << 32,
        u64::MAX >> 12,
        length,
        length + 1,
        length.saturating_sub(56),
        4_096,
        255,
        256,
        257,
        1_024,
        random.random(),
    ];
    edges[random.random_range(0..edges.len())]
}

/// A place in the file: anywhere, or near one of its ends, where headers, directories and footers stand.
fn place(random: &mut StdRng, length: usize) -> usize {
    let near = length.min(400);
    match random.random_range(0..3) {
        0 => random.random_range(0..length),
        1 => random.random_range(0..near),
        _ => length - 1 - random.random_range(0..near),
    }
}

/// Puts another number in the place of the digits that follow `at`: text stays text.
fn replace_number(random: &mut StdRng, bytes: &mut Vec<u8>, at: usize) {
    let Some(begin) = bytes[at..].iter().position(u8::is_ascii_digit).map(|offset| at + offset) else {
        return;
    };
    let digits = bytes[begin..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let number = edge(random, bytes.len());
    let text = if random.random() { number.to_string() } else { (number as i64).to_string() };
    bytes.splice(begin..begin + digits, text.into_bytes());
}

fn mutate(random: &mut StdRng, seeds: &Seeds) -> Vec<u8> {
    let mut bytes = seeds.pick(random).to_vec();
    for _ in 0..random.random_range(1..=3) {
        if bytes.is_empty() {
            break;
        }
        let at = place(random, bytes.len());
        match random.random_range(0..11) {
            10 => replace_number(random, &mut bytes, at),
            0..3 => bytes[at] ^= 1 << random.random_range(0..8),
            3 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][random.random_range(0..5)],
            4..7 => {
                // A whole field: numbers of the frame end where the file ends, at multiples of 8.
                let number = edge(random, bytes.len()).to_le_bytes();
                let at = bytes.len() - ((bytes.len() - at).next_multiple_of(8)).min(bytes.len());
                let end = bytes.len().min(at + 8);
                bytes[at..end].copy_from_slice(&number[..end - at]);
            }
            7 => bytes.truncate(at),
            8 => {
                let other = seeds.pick(random);
                let begin = random.random_range(0..=other.len());
                let end = random.random_range(begin..=other.len());
                let upto = bytes.len().min(at + random.random_range(0..200));
                bytes.splice(at..upto, other[begin..end].iter().copied());
            }
            _ => {
                let end = bytes.len().min(at + random.random_range(0..120));
                let copied = bytes[at..end].to_vec();
                let to = place(random, bytes.len());
                bytes.splice(to..to, copied);
            }
        }
    }
    bytes
}

/// Feeds the corpus of a target and its mutations to its reader; gives how many of the mutations it took.
pub(crate) fn feed(target: &str, seeds: &Seeds, read: impl Fn(&[u8]) -> bool) -> usize {
    for seed in seeds.kept.iter().chain(&seeds.whole) {
        read(seed);
    }
    let mut random = StdRng::seed_from_u64(20_000);
    let taken = (0..MUTATIONS).filter(|_| read(&mutate(&mut random, seeds))).count();
    let corpus = seeds.kept.len() + seeds.whole.len();
    let facts =
        serde_json::json!({"target": target, "corpus": corpus, "mutations": MUTATIONS, "taken": taken});
    crate::figures::leave(&format!("replay-{target}"), &facts);
    taken
}

#[test]
fn no_segment_file_makes_its_reader_panic_or_hang() {
    let taken = feed("segment", &seeds("segment"), fuzz::segment);
    assert!(taken > MUTATIONS / 5, "{taken} passed the frame: mutations are to reach what stands behind it");
}

#[test]
fn no_manifest_makes_its_reader_panic_or_hang() {
    let taken = feed("manifest", &seeds("manifest"), fuzz::manifest);
    assert!(taken > MUTATIONS / 50, "{taken} were taken");
}

#[test]
fn no_page_makes_its_reader_panic_or_hang() {
    let taken = feed("page", &seeds("page"), fuzz::page);
    assert!(taken > MUTATIONS / 20, "{taken} were taken");
}

#[test]
fn whole_files_are_taken_and_repair_changes_nothing_of_them() {
    for folder in [fixtures("dedup/v1").as_path(), fresh_state().path()] {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            if path.extension().is_some_and(|end| end == "segment") {
                assert!(fuzz::segment(&bytes));
                let mut repaired = bytes.clone();
                alone::repair(&mut repaired);
                assert!(repaired == bytes, "{path:?}");
            } else {
                assert!(fuzz::manifest(&bytes));
            }
        }
    }
}
