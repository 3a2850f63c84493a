//! What a start believes of a lease that is over and of a record whose snapshot is gone, in a world of two heads of one
//! table.

use super::super::world::{AllTables, Answer, Below};
use super::*;
use crate::commit::ledger::DedupRecord;

/// A table with one batch, and the same one commit later.
const HEAD: &str = include_str!("../../../fixtures/fuzz/table_metadata/main-2.json");
const NEXT_HEAD: &str = include_str!("../../../fixtures/fuzz/table_metadata/main-3.json");

fn metadata(text: &str) -> TableMetadata {
    serde_json::from_str(text).unwrap()
}

/// The record of a head, whose owner has not given the table back.
fn held(head: &str) -> LedgerRecord {
    match ledger::inspect(&metadata(head)).unwrap() {
        Found::Record(record) => LedgerRecord { released: false, ..*record },
        other => panic!("no record: {other:?}"),
    }
}

/// A catalog that shows one head, and a clock.
struct Shown {
    head: TableMetadata,
    now_ms: i64,
}

impl Tables for Shown {
    type Table = TableMetadata;
    type File = ();

    fn metadata(table: &TableMetadata) -> &TableMetadata {
        table
    }

    async fn find(&self, _: &TableIdent) -> Result<Option<TableMetadata>, Stop> {
        Ok(Some(self.head.clone()))
    }

    async fn load(&self, _: &TableIdent) -> Result<TableMetadata, Box<iceberg::Error>> {
        Ok(self.head.clone())
    }

    async fn send(&self, _: &TableMetadata, _: &Request<()>) -> Answer {
        unreachable!("a start that only looks sends nothing")
    }

    async fn missing(&self, _: &TableMetadata, _: &[()]) -> Result<Vec<String>, Box<iceberg::Error>> {
        Ok(Vec::new())
    }

    fn now_ms(&self) -> i64 {
        self.now_ms
    }

    async fn wait(&self, _: Duration) {}

    async fn back_off(&self, _: u32) {}

    fn new_id(&self) -> Uuid {
        Uuid::from_u128(1)
    }
}

/// A start on another machine: nothing local tells of the owner.
struct Elsewhere {
    shown: Shown,
    terms: Terms,
    has_rows: bool,
}

impl Elsewhere {
    fn new(head: &str, now_ms: i64) -> Self {
        let dedup: DedupRecord = held(HEAD).dedup;
        let ident = |name: &str| TableIdent::from_strs(["events", name]).unwrap();
        let terms = Terms {
            job_name: "n".into(),
            job_shown: "n.toml".into(),
            job_hash: String::new(),
            main: ident("main"),
            sides: BTreeMap::from([(Role::DeadLetters, ident("dead"))]),
            lease: Duration::from_secs(600),
            takeover: false,
            dedup,
        };
        Self { shown: Shown { head: metadata(head), now_ms }, terms, has_rows: false }
    }
}

impl World for Elsewhere {
    type Tables = Shown;

    fn tables(&self) -> &Shown {
        &self.shown
    }

    fn terms(&self) -> &Terms {
        &self.terms
    }

    fn reach(&self, _: &'static str) {}

    fn knows_as_dead(&self, _: Uuid) -> bool {
        false
    }

    fn epoch_max(&self) -> u64 {
        0
    }

    async fn record_owner(&mut self, _: Uuid, _: u64) -> Result<(), Stop> {
        unreachable!("a start that only looks owns nothing")
    }

    async fn has_rows_of(&self, _: &TableMetadata, _: u64) -> Result<bool, Stop> {
        Ok(self.has_rows)
    }

    async fn ensure_tables(&self, _: Heads<TableMetadata>) -> Result<AllTables<Self>, Stop> {
        unreachable!("a start that only looks makes no table")
    }

    async fn add_columns(&self, _: Option<Role>, _: &TableMetadata) -> Result<Option<TableMetadata>, Stop> {
        unreachable!("a start that only looks adds no column")
    }

    fn draw_seed(&self) -> Result<(u64, String), Stop> {
        unreachable!("a start that only looks draws no seed")
    }

    fn files_of_ledger(&self, _: &[Value], _: &TableMetadata) -> Result<Vec<()>, Below> {
        Ok(Vec::new())
    }

    async fn damaged(&self, _: &TableMetadata, _: &[()]) -> Result<Vec<String>, Stop> {
        Ok(Vec::new())
    }
}

/// Outcome of a start that found this record of [`HEAD`], and sees `shown` after its wait.
async fn lease_of(record: &LedgerRecord, shown: &str, now_ms: i64) -> Option<Reason> {
    let found = Found::Record(Box::new(record.clone()));
    await_lease(&Elsewhere::new(shown, now_ms), record, &found).await.err().map(|stop| stop.reason)
}

#[tokio::test]
async fn a_lease_that_is_over_is_believed_only_while_the_head_stands_still() {
    let record = held(HEAD);
    let over_ms = record.lease_until_ms + start::LEASE_GRACE_MS + 1;
    assert_eq!(lease_of(&record, HEAD, over_ms).await, None);
    assert_eq!(lease_of(&record, NEXT_HEAD, over_ms).await, Some(Reason::Busy));
    assert_eq!(lease_of(&record, HEAD, over_ms - 1).await, Some(Reason::Busy));
    let given_back = LedgerRecord { released: true, ..record };
    assert_eq!(lease_of(&given_back, NEXT_HEAD, 0).await, None);
}

#[tokio::test]
async fn a_record_whose_snapshot_is_gone_holds_only_with_the_rows_of_its_last_batch() {
    let head = metadata(HEAD);
    let mut world = Elsewhere::new(HEAD, 0);
    let found = Found::CutOff(Box::new(held(HEAD)));
    let stop = refuse_cut_off(&world, &found, Some(&head)).await.unwrap_err();
    assert_eq!(stop.reason, Reason::TableRolledBack);
    world.has_rows = true;
    assert!(refuse_cut_off(&world, &found, Some(&head)).await.is_ok());
    let rowless = LedgerRecord { last_batch_with_rows: 0, ..held(HEAD) };
    world.has_rows = false;
    assert!(refuse_cut_off(&world, &Found::CutOff(Box::new(rowless)), Some(&head)).await.is_ok());
}
