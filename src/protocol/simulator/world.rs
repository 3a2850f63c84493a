//! A process's view of everything but its tables and its dedup state.

use iceberg::TableIdent;
use serde_json::Value;
use uuid::Uuid;

use super::catalog::{Loaded, SimTables, turn};
use super::process::{main_ident, side_ident};
use super::universe::{File, Shared};
use crate::commit::ledger::{LedgerRecord, Others};
use crate::commit::side::Role;
use crate::protocol::{AllTables, Below, Heads, Tables, Terms, World, stops};
use crate::stop::{Reason, Stop};

/// A process's view of everything but its tables.
pub(super) struct SimWorld {
    pub(super) tables: SimTables,
    pub(super) terms: Terms,
    /// Columns of its job.
    pub(super) columns: i32,
    pub(super) key_columns: u32,
    /// What a first ledger says of rows that stand in its tables already.
    pub(super) others: Option<Others>,
}

impl SimWorld {
    pub(super) fn shared(&self) -> &Shared {
        &self.tables.shared
    }

    /// A table as it was found, or as it is made.
    async fn ensure(&self, found: Option<Loaded>, ident: &TableIdent, columns: i32) -> Result<Loaded, Stop> {
        if found.is_none() {
            self.shared().borrow_mut().create_table(ident, columns);
            turn(self.shared()).await;
        }
        let away = || Stop::new(Reason::CatalogAway, "a table vanished", "try again");
        found.or_else(|| self.tables.current(ident)).ok_or_else(away)
    }
}

pub(super) fn key_spec_hash(key_columns: u32) -> String {
    format!("key of {key_columns}")
}

impl World for SimWorld {
    type Tables = SimTables;

    fn tables(&self) -> &SimTables {
        &self.tables
    }

    fn terms(&self) -> &Terms {
        &self.terms
    }

    fn reach(&self, phase: &'static str) {
        self.shared().borrow_mut().hit(phase);
    }

    fn knows_as_dead(&self, owner: Uuid) -> bool {
        self.shared().borrow().folders[self.tables.folder].owners.iter().any(|&(known, _)| known == owner)
    }

    fn epoch_max(&self) -> u64 {
        let universe = self.shared().borrow();
        universe.folders[self.tables.folder].owners.iter().map(|&(_, epoch)| epoch).max().unwrap_or(0)
    }

    async fn record_owner(&mut self, owner: Uuid, epoch: u64) -> Result<(), Stop> {
        turn(self.shared()).await;
        self.shared().borrow_mut().folders[self.tables.folder].owners.push((owner, epoch));
        turn(self.shared()).await;
        Ok(())
    }

    async fn has_rows_of(&self, table: &Loaded, batch: u64) -> Result<bool, Stop> {
        turn(self.shared()).await;
        let universe = self.shared().borrow();
        let content = universe.content_of(&table.0);
        Ok(content.files.iter().any(|file| file.rows.iter().any(|row| row.batch == Some(batch))))
    }

    async fn ensure_tables(&self, (main, mut sides): Heads<Loaded>) -> Result<AllTables<Self>, Stop> {
        turn(self.shared()).await;
        let main = self.ensure(main, &self.terms.main, self.columns).await?;
        for (&role, ident) in &self.terms.sides {
            let columns = if role == Role::Late { self.columns } else { 1 };
            let table = self.ensure(sides.remove(&role), ident, columns).await?;
            sides.insert(role, table);
        }
        Ok((main, sides))
    }

    async fn add_columns(&self, role: Option<Role>, table: &Loaded) -> Result<Option<Loaded>, Stop> {
        turn(self.shared()).await;
        let has = |table: &Loaded| table.0.current_schema().as_struct().fields().len() as i32;
        if has(table) >= self.columns || role == Some(Role::DeadLetters) {
            return Ok(None);
        }
        let ident = role.map_or_else(main_ident, side_ident);
        {
            let mut universe = self.shared().borrow_mut();
            let uuid = universe.tables.get(&ident).map(|named| named.metadata.uuid());
            if uuid != Some(table.0.uuid()) {
                return Err(Stop::new(Reason::CatalogAway, "no such table", "try again"));
            }
            universe.add_column(&ident);
            universe.hit("column added by its owner");
        }
        turn(self.shared()).await;
        self.tables.load(&ident).await.map(Some).map_err(|error| stops::unreadable(&ident, *error))
    }

    fn draw_seed(&self) -> Result<(u64, String), Stop> {
        Ok((7, key_spec_hash(self.key_columns)))
    }

    fn inherit(&self, first: &mut LedgerRecord) {
        if let Some(others) = &self.others {
            first.batch = others.batch_max;
            first.others = Some(others.clone());
            self.shared().borrow_mut().hit("ledger begun beside rows of others");
        }
    }

    fn files_of_ledger(&self, stored: &[Value], _: &Loaded) -> Result<Vec<File>, Below> {
        let universe = self.shared().borrow();
        let file = |value: &Value| universe.files.get(value["path"].as_str()?).cloned();
        stored.iter().map(|value| file(value).ok_or_else(|| "no such file".into())).collect()
    }

    async fn damaged(&self, table: &Loaded, files: &[File]) -> Result<Vec<String>, Stop> {
        let missing = self.tables.missing(table, files).await;
        missing.map_err(|error| stops::unreadable(&self.terms.main, *error))
    }
}
