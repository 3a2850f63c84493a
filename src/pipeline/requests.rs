//! What others ask of the owner (R9), and what comes of it.
//!
//! Flow of an owner: properties of the head -> `take`, between two microbatches -> `grant`, a function of the record, or a
//! savepoint -> one commit of kind change that says what was asked and removes the property
//!
//! Flow of a command: `done_or_asked` does it as the owner if the table is free, else sets the property and looks at the
//! ledger until it is done, or until the owner has gone and it can be done here.
//!
//! A crash between request and commit leaves the request for the next owner.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::owner::{Owner, prepare};
use super::rebuild::commit_change;
use super::report::{Event, Report};
use super::start::{Allow, LeaseVerdict, lease};
use super::world::CatalogTables;
use super::{RunOptions, commands, stops};
use crate::catalog;
use crate::commit::ledger::{self, Backfill, Change, Cursor, Lane, LaneState, LedgerRecord};
use crate::commit::request::{self, Ask, NewLane, Read, Request, is_lane_name};
use crate::commit::switch::{self, SwitchError};
use crate::counts::Counts;
use crate::job::file::LoadedJob;
use crate::protocol::Tables;
use crate::sink::schema;
use crate::stop::{Reason, Stop};

/// Most backfills that are not done.
const BACKFILLS_MAX: usize = 8;
/// Pause between two looks at the ledger.
const LOOK_AFTER: Duration = Duration::from_secs(1);
/// Looks after which a command tries to own the table although its owner seems to live: it may have died here.
const LOOKS_PER_TRY: u32 = 15;

/// What a request makes of a record.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Granted {
    pub(super) next: LedgerRecord,
    pub(super) change: Change,
}

/// Judges a request about lanes on a record; `None` if it is done already. `topics` are those that the job reads.
///
/// # Errors
/// Why it can not be done, in words.
pub(super) fn grant(
    record: &LedgerRecord,
    ask: &Ask,
    topics: &BTreeSet<String>,
) -> Result<Option<Granted>, String> {
    let mut next = record.clone();
    let set = |next: &mut LedgerRecord, lane: &str, to: LaneState| -> Result<bool, String> {
        let backfill = next.lanes.get_mut(lane).and_then(|lane| lane.backfill.as_mut());
        let backfill = backfill.ok_or_else(|| format!("there is no backfill {lane}"))?;
        if backfill.state == LaneState::Done {
            return Err(format!("backfill {lane} is done"));
        }
        Ok(std::mem::replace(&mut backfill.state, to) != to)
    };
    let (changed, by, what) = match ask {
        Ask::Backfill(new) => {
            (register(&mut next, new, topics)?, "backfill", format!("backfill {} was registered", new.lane))
        }
        Ask::PauseLane { lane } => {
            (set(&mut next, lane, LaneState::Paused)?, "lane pause", format!("backfill {lane} is paused"))
        }
        Ask::ResumeLane { lane, letters_ratio_max } => {
            let mut changes = set(&mut next, lane, LaneState::Active)?;
            let backfill = next.lanes.get_mut(lane).and_then(|lane| lane.backfill.as_mut());
            if let Some(backfill) = backfill.filter(|_| letters_ratio_max.is_some()) {
                changes |= backfill.letters_ratio_max != *letters_ratio_max;
                backfill.letters_ratio_max = *letters_ratio_max;
            }
            (changes, "lane resume", format!("backfill {lane} goes on"))
        }
        Ask::DropLane { lane } => {
            let known = next.lanes.get(lane).is_some_and(|lane| lane.backfill.is_some());
            if known {
                next.lanes.remove(lane);
            }
            (known, "lane drop", format!("backfill {lane} is dropped; rows that it wrote stay"))
        }
        Ask::CreateSavepoint { .. } | Ask::DropSavepoint { .. } => {
            unreachable!("a savepoint is made of tags, not of a record")
        }
    };
    let change = Change { by: by.to_owned(), what };
    Ok(changed.then_some(Granted { next, change }))
}

/// Puts a backfill into a record; false if it is there already.
fn register(next: &mut LedgerRecord, new: &NewLane, topics: &BTreeSet<String>) -> Result<bool, String> {
    if !is_lane_name(&new.lane) {
        return Err(format!(
            "{:?} is no name of a backfill: up to 40 of a-z, 0-9, - and _, and not live",
            new.lane
        ));
    }
    if let Some(known) = next.lanes.get(&new.lane).and_then(|lane| lane.backfill.as_ref()) {
        return match (known.from_ms, known.to_ms) == (new.from_ms, new.to_ms) {
            true => Ok(false),
            false => Err(format!("there is a backfill {} of another range already", new.lane)),
        };
    }
    let open = next.backfills().filter(|(_, _, backfill)| backfill.state != LaneState::Done).count();
    if open >= BACKFILLS_MAX {
        return Err(format!("there are {open} backfills that are not done, {BACKFILLS_MAX} are possible"));
    }
    if let Some(topic) = new.spans.keys().find(|topic| !topics.contains(*topic)) {
        return Err(format!("the job does not read topic {topic}"));
    }
    if new.to_ms.is_some_and(|to_ms| to_ms <= new.from_ms) {
        return Err("its range is empty".to_owned());
    }
    let (mut cursors, mut ends) = (BTreeMap::new(), BTreeMap::new());
    for (topic, spans) in &new.spans {
        let cursor = |start| Cursor { start, end: start, tail: None, max_event_time: None };
        if spans.values().any(|span| span.start.get() < 0 || span.end < span.start) {
            return Err(format!("offsets of topic {topic} go back"));
        }
        let begin: BTreeMap<_, _> =
            spans.iter().map(|(number, span)| (*number, cursor(span.start))).collect();
        let end: BTreeMap<_, _> = spans.iter().map(|(number, span)| (*number, span.end)).collect();
        cursors.insert(topic.clone(), begin);
        ends.insert(topic.clone(), end);
    }
    let backfill = Backfill {
        from_ms: new.from_ms,
        to_ms: new.to_ms,
        state: if new.offsets() == 0 { LaneState::Done } else { LaneState::Active },
        ends,
        counts: Counts::default(),
        letters_ratio_max: None,
    };
    next.tidy_lanes();
    next.lanes.insert(new.lane.clone(), Lane { watermark: None, topics: cursors, backfill: Some(backfill) });
    Ok(true)
}

/// Topics that the job reads.
pub(super) fn topics_of(owner: &Owner<'_>) -> BTreeSet<String> {
    owner.world.loaded.job.source.topics.iter().cloned().collect()
}

/// Takes up what stands in the properties of the head, each request with a commit of its own. Called by the owner between two
/// microbatches. An owner that waits for records reloads the table first ([`Owner::reload`]).
pub(super) async fn take(owner: &mut Owner<'_>, report: &mut dyn Report) -> Result<(), Stop> {
    let found = request::read(owner.main.metadata().properties(), owner.record.job_id);
    for (property, read) in found {
        owner.answer(property.clone());
        let done = match read {
            Read::Garbage(why) => Err(why),
            Read::Request(request) => answer(owner, &request.ask).await?,
        };
        let text = match done {
            Ok(Some(text)) => text,
            Ok(None) => continue,
            Err(why) => format!("request {property} is refused: {why}"),
        };
        report.event(&Event::Notice { text });
    }
    // What changes nothing leaves with a renewal, so that who asked sees that it was looked at.
    if owner.has_answers() { owner.renew().await } else { Ok(()) }
}

/// Does what is asked and says what that was; nothing if it is so already. The inner error is why it is refused.
async fn answer(owner: &mut Owner<'_>, ask: &Ask) -> Result<Result<Option<String>, String>, Stop> {
    let granted = match ask {
        Ask::CreateSavepoint { savepoint } => return commands::create_asked(owner, savepoint).await,
        Ask::DropSavepoint { savepoint } => return commands::drop_asked(owner, savepoint).await.map(Ok),
        of_lanes => grant(&owner.record, of_lanes, &topics_of(owner)),
    };
    match granted {
        Ok(Some(Granted { next, change })) => {
            let text = change.what.clone();
            crate::crash_point!("request_to_grant");
            commit_change(owner, next, change, false).await?;
            crate::crash_point!("request_granted");
            Ok(Ok(Some(text)))
        }
        Ok(None) => Ok(Ok(None)),
        Err(why) => Ok(Err(why)),
    }
}

/// What a command sees of the ledger while another owner works.
pub(super) struct Look {
    pub(super) record: Option<LedgerRecord>,
    /// Whether the request still stands there.
    pub(super) is_pending: bool,
    /// Whether the table may be free to be taken.
    pub(super) may_be_free: bool,
}

/// A request under way, and the table that it stands in.
pub(super) struct Posted {
    tables: CatalogTables,
    table: iceberg::TableIdent,
    property: (String, String),
    looks: u32,
}

/// Connects to the table of a job that has a ledger.
async fn table_of(loaded: &LoadedJob) -> Result<(CatalogTables, iceberg::table::Table, LedgerRecord), Stop> {
    let job = &loaded.job;
    let tables =
        CatalogTables { catalog: catalog::connect(&job.sink.catalog).await.map_err(stops::catalog)? };
    let ident = schema::table_ident(&job.sink.table).map_err(stops::schema)?;
    let table = tables.find(&ident).await?;
    let found = match &table {
        Some(table) => ledger::inspect(table.metadata()).map_err(|error| stops::ledger(&ident, error))?,
        None => ledger::Found::Nothing,
    };
    match (table, found.record()) {
        (Some(table), Some(record)) => Ok((tables, table, record.clone())),
        _ => Err(Stop::new(
            Reason::Busy,
            format!("table {ident} has no ledger yet, and its first run is in progress"),
            "nothing was changed; try again when it has begun",
        )),
    }
}

/// The ledger's record as it is now, without owning the table.
///
/// # Errors
/// The catalog does not answer, or the table has no ledger.
pub(super) async fn record_of(loaded: &LoadedJob) -> Result<LedgerRecord, Stop> {
    table_of(loaded).await.map(|(_, _, record)| record)
}

impl Posted {
    /// Sets the property.
    pub(super) async fn post(loaded: &LoadedJob, ask: Ask) -> Result<Self, Stop> {
        let (tables, table, record) = table_of(loaded).await?;
        let request = Request { format: request::FORMAT_VERSION, job_id: record.job_id, ask };
        let property = request.to_property(uuid::Uuid::now_v7());
        let ident = table.identifier().clone();
        let set = switch::set_property(&tables.catalog, &ident, table.metadata().uuid(), &property).await;
        set.map_err(|error| not_posted(&ident, error))?;
        Ok(Self { tables, table: ident, property, looks: 0 })
    }

    /// Waits a little and looks.
    pub(super) async fn look(&mut self, options: &RunOptions) -> Result<Look, Stop> {
        if options.interrupted() {
            return Err(stops::interrupted());
        }
        self.tables.wait(LOOK_AFTER).await;
        self.looks += 1;
        let loaded = self.tables.load(&self.table).await;
        let table = loaded.map_err(|error| crate::protocol::stops::unreadable(&self.table, *error))?;
        let found = ledger::inspect(table.metadata()).map_err(|error| stops::ledger(&self.table, error))?;
        let record = found.record().cloned();
        let is_free = |record: &LedgerRecord| {
            !matches!(lease(record, false, self.tables.now_ms()), LeaseVerdict::Busy { .. })
        };
        Ok(Look {
            is_pending: table.metadata().properties().contains_key(&self.property.0),
            may_be_free: record.as_ref().is_none_or(is_free) || self.looks.is_multiple_of(LOOKS_PER_TRY),
            record,
        })
    }
}

fn not_posted(table: &iceberg::TableIdent, error: SwitchError) -> Stop {
    let reason = match &error {
        SwitchError::Replaced { .. } => Reason::TableReplaced,
        _ => Reason::CatalogAway,
    };
    let what = format!("a request to the owner of table {table} could not be left there");
    Stop::new(reason, what, "nothing was changed; give the command again").because(error)
}

/// Has a backfill paused, resumed or dropped, by this process or by the owner. Gives what was done, in words.
///
/// # Errors
/// `USAGE`: it can not be done. The stops of the start table; the catalog is away.
pub async fn ask(
    loaded: &LoadedJob,
    options: &RunOptions,
    ask: &Ask,
    report: &mut dyn Report,
) -> Result<String, Stop> {
    let judge = async || {
        let topics = loaded.job.source.topics.iter().cloned().collect();
        let record = record_of(loaded).await?;
        refuse_unknown(&record, ask)?;
        grant(&record, ask, &topics).map(|_| ()).map_err(refused)
    };
    let as_owner = async |_| do_it(loaded, options, ask).await;
    if let Some(done) = done_or_asked(loaded, options, ask, report, judge, as_owner).await? {
        return Ok(done);
    }
    // The owner takes the request away with the commit that grants it, and also when it refuses it.
    let topics = loaded.job.source.topics.iter().cloned().collect();
    match grant(&record_of(loaded).await?, ask, &topics).map_err(refused)? {
        None => Ok("the owner of the table took the request up".to_owned()),
        Some(_) => Err(refused("the owner of the table did not take it up; its log says why".to_owned())),
    }
}

/// Has something done: by this process if the table is free, and gives what came of it, else by its owner, which is asked to.
/// `judge` says no before the owner is asked, who can say no to its own log alone. `as_owner` is told whether an owner was
/// asked before, and may have done it.
pub(super) async fn done_or_asked<T>(
    loaded: &LoadedJob,
    options: &RunOptions,
    ask: &Ask,
    report: &mut dyn Report,
    judge: impl AsyncFn() -> Result<(), Stop>,
    as_owner: impl AsyncFn(bool) -> Result<T, Stop>,
) -> Result<Option<T>, Stop> {
    let mut posted: Option<Posted> = None;
    loop {
        let busy = match as_owner(posted.is_some()).await {
            Err(stop) if stop.reason == Reason::Busy => stop,
            done => return done.map(Some),
        };
        let under_way = match &mut posted {
            Some(under_way) => under_way,
            None => {
                judge().await?;
                report.event(&Event::Notice { text: format!("{}; it is asked to do it", busy.what) });
                posted.insert(Posted::post(loaded, ask.clone()).await?)
            }
        };
        loop {
            let look = under_way.look(options).await.map_err(left_standing)?;
            if !look.is_pending {
                return Ok(None);
            }
            if look.may_be_free {
                break;
            }
        }
    }
}

/// Who stops waiting takes nothing back.
fn left_standing(stop: Stop) -> Stop {
    if stop.reason != Reason::Interrupted {
        return stop;
    }
    let way_out = "the request stands in the table, and its owner still does it; see what came of it:\n  \
                   tidemill lane list JOB\n  tidemill savepoint list JOB";
    Stop { way_out: way_out.to_owned(), ..stop }
}

/// A second drop of a backfill is no harm to an owner, but a person who names one that is not there has mistyped it.
fn refuse_unknown(record: &LedgerRecord, ask: &Ask) -> Result<(), Stop> {
    match ask {
        Ask::DropLane { lane } if record.lanes.get(lane).is_none_or(|lane| lane.backfill.is_none()) => {
            Err(refused(format!("there is no backfill {lane}")))
        }
        _ => Ok(()),
    }
}

fn refused(why: String) -> Stop {
    Stop::new(Reason::Usage, why, "nothing was changed; see what there is:\n  tidemill lane list JOB")
}

/// As the owner: fence, one commit, given back.
async fn do_it(loaded: &LoadedJob, options: &RunOptions, ask: &Ask) -> Result<String, Stop> {
    let prepared = prepare(loaded, options, Allow::default()).await?;
    let topics = loaded.job.source.topics.iter().cloned().collect();
    let record = commands::need_record(&prepared, options)?;
    refuse_unknown(&record, ask)?;
    if grant(&record, ask, &topics).map_err(refused)?.is_none() && !prepared.survey.has_requests() {
        return Ok("nothing to change: it is so already".to_owned());
    }
    let (mut owner, _, _) = prepared.take(&BTreeMap::new()).await?;
    let done = grant_own(&mut owner, ask, &topics).await;
    owner.end(done).await
}

async fn grant_own(owner: &mut Owner<'_>, ask: &Ask, topics: &BTreeSet<String>) -> Result<String, Stop> {
    take(owner, &mut super::report::Unheard).await?;
    match grant(&owner.record, ask, topics).map_err(refused)? {
        None => Ok("it is so already".to_owned()),
        Some(Granted { next, change }) => {
            let what = change.what.clone();
            commit_change(owner, next, change, true).await?;
            Ok(what)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commit::ledger::tests::record;
    use crate::commit::request::Span;
    use crate::offset::NextOffset;

    fn topics() -> BTreeSet<String> {
        BTreeSet::from(["sent".to_owned()])
    }

    fn new_lane(name: &str) -> NewLane {
        let span = Span { start: NextOffset::at(5), end: NextOffset::at(9) };
        let spans = BTreeMap::from([("sent".to_owned(), BTreeMap::from([(0, span)]))]);
        NewLane { lane: name.into(), from_ms: 10, to_ms: Some(20), spans }
    }

    fn granted(record: &LedgerRecord, ask: Ask) -> LedgerRecord {
        grant(record, &ask, &topics()).unwrap().expect("it changes the record").next
    }

    #[test]
    fn a_backfill_is_registered_beside_the_live_lane_and_moves_nothing_of_it() {
        let next = granted(&record(), Ask::Backfill(new_lane("june")));
        assert_eq!((next.live(), next.batch), (record().live(), record().batch));
        let lane = &next.lanes["june"];
        assert_eq!((lane.offsets_left(), lane.watermark), (4, None));
        assert_eq!(next.active_backfills().collect::<Vec<_>>(), ["june"]);
    }

    #[test]
    fn a_request_that_arrives_twice_changes_nothing_the_second_time() {
        let lane = || "june".to_owned();
        let mut record = granted(&record(), Ask::Backfill(new_lane("june")));
        for ask in [
            Ask::Backfill(new_lane("june")),
            Ask::PauseLane { lane: lane() },
            Ask::ResumeLane { lane: lane(), letters_ratio_max: Some(1.0) },
            Ask::DropLane { lane: lane() },
        ] {
            if !matches!(ask, Ask::Backfill(_)) {
                record = granted(&record, ask.clone());
            }
            assert_eq!(grant(&record, &ask, &topics()), Ok(None), "{ask:?}");
        }
        assert_eq!(record, self::record());
    }

    #[test]
    fn a_brake_that_is_let_go_for_a_backfill_at_work_is_heard_and_stays_as_it_is_where_nothing_is_said() {
        let resume = |letters_ratio_max| Ask::ResumeLane { lane: "june".into(), letters_ratio_max };
        let at_work = granted(&record(), Ask::Backfill(new_lane("june")));
        let let_go = granted(&at_work, resume(Some(1.0)));
        let said = |record: &LedgerRecord| record.lanes["june"].backfill.as_ref().unwrap().letters_ratio_max;
        assert_eq!((said(&at_work), said(&let_go)), (None, Some(1.0)));
        for ask in [resume(Some(1.0)), resume(None)] {
            assert_eq!(grant(&let_go, &ask, &topics()), Ok(None), "{ask:?}");
        }
        assert_eq!(said(&granted(&let_go, resume(Some(0.1)))), Some(0.1));
    }

    #[test]
    fn what_can_not_be_done_is_refused_in_words() {
        let one = granted(&record(), Ask::Backfill(new_lane("june")));
        let mut eight = one.clone();
        for number in 2..=8 {
            eight = granted(&eight, Ask::Backfill(new_lane(&format!("june-{number}"))));
        }
        let other_range = NewLane { from_ms: 11, ..new_lane("june") };
        let empty = NewLane { to_ms: Some(10), ..new_lane("may") };
        let mut other_topic = new_lane("may");
        other_topic.spans.insert("bounced".into(), BTreeMap::new());
        let unknown = || "may".to_owned();
        for (record, ask, why) in [
            (&one, Ask::Backfill(new_lane("live")), "is no name of a backfill"),
            (&one, Ask::Backfill(other_range), "of another range already"),
            (&one, Ask::Backfill(empty), "its range is empty"),
            (&one, Ask::Backfill(other_topic), "does not read topic bounced"),
            (&eight, Ask::Backfill(new_lane("may")), "8 are possible"),
            (&one, Ask::PauseLane { lane: unknown() }, "there is no backfill may"),
            (
                &one,
                Ask::ResumeLane { lane: "live".into(), letters_ratio_max: None },
                "there is no backfill live",
            ),
        ] {
            let refused = grant(record, &ask, &topics()).unwrap_err();
            assert!(refused.contains(why), "{refused}");
        }
        let live = Ask::DropLane { lane: "live".into() };
        assert_eq!(grant(&one, &live, &topics()), Ok(None), "the live lane is no backfill");
    }

    #[test]
    fn a_backfill_with_nothing_to_read_is_done_at_once() {
        let mut new = new_lane("june");
        new.spans.values_mut().flat_map(BTreeMap::values_mut).for_each(|span| span.end = span.start);
        let next = granted(&record(), Ask::Backfill(new));
        assert_eq!(next.lanes["june"].backfill.as_ref().unwrap().state, LaneState::Done);
        let pause = Ask::PauseLane { lane: "june".into() };
        assert_eq!(grant(&next, &pause, &topics()), Err("backfill june is done".to_owned()));
    }
}
