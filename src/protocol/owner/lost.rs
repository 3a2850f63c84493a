//! Files that main's record owes a side table and that are gone.
//!
//! Flow: record of microbatch n -> [`look`] at the files that it names -> landed, whole, or lost
//!
//! A start that finds some lost stops. Two commands go on from there, each with one commit of main that names another list
//! of files ([`Owner::owe_instead`]), and then side tables follow as ever: one that wrote the rows again names the new
//! files, one that accepts the loss what is left. So whatever crashes, the record says what a side table still gets, and the
//! mark lets it land once.
//!
//! An owner before may have found the files whole, and sleep over them: nothing of main keeps it from a side table. So before
//! main names another list the heads of those side tables are fenced too, where they still are as they were judged.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Owner, mark_of};
use crate::commit::ledger::{Change, Kind, LedgerRecord, SideRecord};
use crate::commit::side::{self as side_mark, Role, SideMark};
use crate::mutant;
use crate::protocol::stops;
use crate::protocol::world::{FileOf, TableOf, Tables, World};
use crate::stop::{Reason, Stop};

/// A side table that can not get what the last record owes it.
#[derive(Debug)]
pub(crate) struct LostSide {
    pub(crate) role: Role,
    /// What is whole of what the record names.
    pub(crate) whole: Vec<Value>,
    /// What is gone; `None` where the list itself is.
    pub(crate) gone: Option<Vec<Value>>,
    /// What happened, for a person.
    what: String,
    below: Option<String>,
}

impl LostSide {
    /// As a start ends with it.
    pub(crate) fn stop(&self, job_shown: &str) -> Stop {
        let again = format!(
            "write the rows again from the records that they came from:\n  tidemill side reread {job_shown}\n"
        );
        // Only letters are functions of their records alone, and only a list says how many they were.
        let again =
            if self.role.holds_keys() || self.gone.is_none() { String::new() } else { format!("{again}or ") };
        let stop = Stop::new(
            Reason::SideFilesLost,
            self.what.clone(),
            format!(
                "main is committed and whole; put the files back and run again, or {again}go on without them, with the loss \
                 written into the ledger:\n  tidemill accept-loss {job_shown}"
            ),
        );
        match &self.below {
            Some(below) => stop.because(below.clone()),
            None => stop,
        }
    }
}

/// How it stands with what a record owes one side table.
pub(super) enum Owed<File> {
    /// The table has it.
    Landed,
    /// Every file is there.
    Whole(Vec<File>),
    /// Some are not.
    Lost(Box<LostSide>),
}

/// Looks at what `owed` names. `mark` is the one that the table gets with it.
pub(super) async fn look<W: World>(
    world: &W,
    role: Role,
    table: &TableOf<W>,
    owed: &SideRecord,
    mark: &SideMark,
) -> Result<Owed<FileOf<W>>, Stop> {
    let found = side_mark::inspect(W::Tables::metadata(table)).ok().flatten();
    if found.is_some_and(|now| now.job_id == mark.job_id && now.batch >= mark.batch) {
        return Ok(Owed::Landed);
    }
    let name = &owed.table;
    let no_list = |what: String, below| {
        Owed::Lost(Box::new(LostSide { role, whole: Vec::new(), gone: None, what, below }))
    };
    let Some(values) = &owed.files else {
        return Ok(no_list(format!("the list of files that side table {name} is owed is gone"), None));
    };
    let files = match world.files_of_ledger(values, table) {
        Ok(files) => files,
        Err(error) => {
            let what = format!("the list of files that side table {name} is owed can not be read");
            return Ok(no_list(what, Some(error.to_string())));
        }
    };
    let damaged = world.damaged(table, &files).await?;
    crate::crash_point!("side_files_looked_up");
    let Some(path) = mutant!("lost-side-files-passed-over", None => damaged.first()) else {
        return Ok(Owed::Whole(files));
    };
    let count = damaged.len();
    let what = format!("{count} files that side table {name} is owed are gone, first {path}");
    let (mut whole, mut gone) = (Vec::new(), Vec::new());
    for value in values {
        let one = world.files_of_ledger(std::slice::from_ref(value), table);
        let is_damaged = match one {
            Ok(one) => !world.damaged(table, &one).await?.is_empty(),
            Err(_) => true,
        };
        if is_damaged { &mut gone } else { &mut whole }.push(value.clone());
    }
    Ok(Owed::Lost(Box::new(LostSide { role, whole, gone: Some(gone), what, below: None })))
}

/// Side tables that can not get what a record owes them: reads only.
pub(crate) async fn find<W: World>(
    world: &W,
    sides: &BTreeMap<Role, TableOf<W>>,
    record: &LedgerRecord,
) -> Result<Vec<LostSide>, Stop> {
    let mut all = Vec::new();
    for (role, table) in sides {
        let Some(owed) = record.sides.get(role.name()).filter(|side| side.owed) else { continue };
        let mark = mark_of(record, &world.terms().main, *role);
        if let Owed::Lost(lost) = look(world, *role, table, owed, &mark).await? {
            all.push(*lost);
        }
    }
    Ok(all)
}

impl<W: World> Owner<W> {
    /// Side tables that can not get what the last record owes them, with their heads fenced: what is gone can not come any
    /// more. `asked` are those of which a person was told before main was fenced; until then the owner before may have
    /// brought them their files. One whose files were put back is not among those given.
    ///
    /// # Errors
    /// `SIDE_FILES_LOST`: it has, and the files may be gone all the same. `TABLE_CHANGED`: it did after this owner loaded them.
    pub(crate) async fn fence_lost(&mut self, asked: &[&str]) -> Result<Vec<LostSide>, Stop> {
        let lost = find(&self.world, &self.sides, &self.record).await?;
        for table in asked {
            let is_lost = |lost: &LostSide| self.side_ident(lost.role).to_string() == *table;
            if !lost.iter().any(is_lost) && self.another_brought(table) {
                return Err(stops::came_meanwhile(table, self.record.batch));
            }
        }
        for lost in &lost {
            mutant!("lost-side-not-fenced", () => self.fence_side(lost.role).await?);
        }
        Ok(lost)
    }

    /// Whether a side table got the files of the last record, and not from this owner.
    fn another_brought(&self, table: &str) -> bool {
        let named = self.sides.iter().find(|(role, _)| self.side_ident(**role).to_string() == *table);
        let mark = named.and_then(|(_, side)| side_mark::inspect(W::Tables::metadata(side)).ok().flatten());
        let (job_id, batch, epoch) = (self.record.job_id, self.record.batch, self.record.epoch);
        mark.is_some_and(|mark| mark.job_id == job_id && mark.batch >= batch && mark.epoch != epoch)
    }

    /// Lets side tables that [`Owner::fence_lost`] gave be owed other files than the last record names, for a stated reason,
    /// and brings them forward.
    pub(crate) async fn owe_instead(
        &mut self,
        instead: Vec<(Role, SideRecord)>,
        change: Change,
    ) -> Result<(), Stop> {
        let before = self.record.clone();
        let mut next = LedgerRecord { kind: Kind::Change, released: false, jumps: Vec::new(), ..before };
        next.change = Some(change);
        for (role, side) in instead {
            next.sides.insert(role.name().to_owned(), side);
        }
        self.commit(next, Vec::new()).await?;
        self.world.reach("other_files_owed");
        self.forward_sides().await
    }
}
