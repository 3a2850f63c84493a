//! What a continuous run watches beside its records: whether the world answers, and which topic partitions there are.
//!
//! Flow: [`Watch::look`] (a thread asks the broker, a later turn takes the answer) -> new topic partitions, or other ones
//!       what failed -> [`Outage::begins`] -> one line -> tries again -> [`Outage::is_over`] -> one line
//!
//! A topic partition that gives nothing although it should is named by [`Session::sit_out`]; one whose records wait behind
//! an open transaction, which no error tells of, by the look.
//!
//! Bounds: one question in flight; one line when an outage begins, when its cause changes, and when it is over.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::thread;
use std::time::{Duration, Instant};

use super::report::{Event, Report};
use super::session::Session;
use crate::commit::ledger::LedgerRecord;
use crate::offset::{NextOffset, TopicPartition};
use crate::source::{ClusterFacts, Connection, OffsetRange, SourceError};
use crate::stop::{Reason, Stop};

/// Something that a run waits for to come back.
#[derive(Debug, Default)]
pub(super) struct Outage {
    now: Option<Away>,
}

#[derive(Debug)]
struct Away {
    reason: Reason,
    /// By which one cause is told from another of the same reason.
    cause: String,
    since: Instant,
}

impl Outage {
    /// Says so, unless it was said already.
    pub(super) fn begins(&mut self, reason: Reason, cause: &str, what: String, report: &mut dyn Report) {
        let is_known = |away: &Away| away.reason == reason && away.cause == cause;
        if self.now.as_ref().is_some_and(is_known) {
            tracing::debug!(reason = reason.name(), "still: {what}");
            return;
        }
        let since = self.now.take().map_or_else(Instant::now, |away| away.since);
        self.now = Some(Away { reason, cause: cause.to_owned(), since });
        report.event(&Event::Away { reason: reason.name(), what });
    }

    /// Says that it is over, if it is one of those that the last news ends.
    pub(super) fn is_over(&mut self, ends: impl Fn(Reason) -> bool, report: &mut dyn Report) {
        if let Some(away) = self.now.take_if(|away| ends(away.reason)) {
            let seconds = away.since.elapsed().as_secs_f64();
            report.event(&Event::Back { reason: away.reason.name(), seconds });
        }
    }
}

/// What the broker holds.
struct Look {
    cluster: ClusterFacts,
    offsets: BTreeMap<TopicPartition, OffsetRange>,
    /// Ends with the records of open transactions, of those topic partitions that stood still.
    written: BTreeMap<TopicPartition, NextOffset>,
}

/// What a look came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// Nothing that matters, or no answer yet.
    Same,
    /// Topics or cluster are others: for the start table to judge.
    Others,
}

/// See the module.
pub(super) struct Watch {
    pub(super) outage: Outage,
    interval: Option<Duration>,
    next: Instant,
    asked: Option<Receiver<Result<Look, SourceError>>>,
    /// Ends of the logs when they were looked at last.
    ends: BTreeMap<TopicPartition, NextOffset>,
    /// Topic partitions that were said to be held back by an open transaction, and where.
    held_back: BTreeMap<TopicPartition, NextOffset>,
}

impl Watch {
    /// Looks every `interval`. `ends` are those that the start found.
    pub(super) fn new(interval: Option<Duration>, ends: BTreeMap<TopicPartition, NextOffset>) -> Self {
        let next = Instant::now() + interval.unwrap_or_default();
        Self { outage: Outage::default(), interval, next, asked: None, ends, held_back: BTreeMap::new() }
    }

    /// Offsets from the next one to the end of its log as it was looked at last.
    pub(super) fn left(&self, name: &TopicPartition, next: NextOffset) -> u64 {
        let left = self.ends.get(name).map_or(0, |end| end.get() - next.get());
        u64::try_from(left).unwrap_or(0)
    }

    /// A microbatch landed: catalog, warehouse and disk do their work.
    pub(super) fn landed(&mut self, report: &mut dyn Report) {
        self.outage.is_over(|reason| reason != Reason::SourceAway, report);
    }

    /// Records came, or the broker answered.
    pub(super) fn source_answers(&mut self, report: &mut dyn Report) {
        self.outage.is_over(|reason| reason == Reason::SourceAway, report);
    }

    /// The answer to a look, once it is there; asks when it is time.
    fn take_look(
        &mut self,
        connection: &Arc<Connection>,
        positions: impl Fn() -> Vec<(TopicPartition, NextOffset)>,
    ) -> Option<Result<Look, SourceError>> {
        if let Some(asked) = &self.asked {
            let answer = match asked.try_recv() {
                Ok(answer) => Some(answer),
                Err(TryRecvError::Empty) => return None,
                // The thread could not be started or fell: the next look is another one.
                Err(TryRecvError::Disconnected) => None,
            };
            self.asked = None;
            self.next = Instant::now() + self.interval.unwrap_or_default();
            return answer;
        }
        if self.interval.is_some() && Instant::now() >= self.next {
            let stands = |(name, next): &(TopicPartition, NextOffset)| self.ends.get(name) == Some(next);
            let still = positions().into_iter().filter(stands).map(|(name, _)| name).collect();
            self.asked = Some(ask(Arc::clone(connection), still));
        }
        None
    }

    /// Says which topic partitions have records that nobody gets to see: nothing moves there, and no error tells why.
    fn say_held_back(&mut self, look: &Look, report: &mut dyn Report) {
        for (name, written) in &look.written {
            let end = look.offsets.get(name).map(|range| range.end);
            let Some(end) = end.filter(|end| end < written && self.ends.get(name) == Some(end)) else {
                self.held_back.remove(name);
                continue;
            };
            if self.held_back.insert(name.clone(), end) != Some(end) {
                let text = format!(
                    "{name} gives nothing beyond offset {end}: {} offsets wait behind an open transaction, until its producer \
                     commits or aborts it, or kafka-transactions.sh does",
                    written.get() - end.get()
                );
                report.event(&Event::Notice { text });
            }
        }
    }
}

/// Asks in a thread of its own: an answer may take as long as a broker is away, and a signal is to be heard meanwhile.
/// `still` are those that gave nothing since the last look.
fn ask(connection: Arc<Connection>, still: Vec<TopicPartition>) -> Receiver<Result<Look, SourceError>> {
    let (answer, asked) = mpsc::channel();
    let look = move || {
        let look = connection.describe().and_then(|cluster| {
            let offsets = connection.offsets(&cluster.topic_partitions())?;
            // It serves a line of the log alone, and no start asks it: whether it is answered ends nothing.
            let written = connection.ends_with_open_transactions(&still).unwrap_or_else(|error| {
                tracing::debug!(%error, "it is not known whether an open transaction holds records back");
                BTreeMap::new()
            });
            Ok(Look { cluster, offsets, written })
        });
        // The run may have ended meanwhile.
        let _ = answer.send(look);
    };
    if let Err(error) = thread::Builder::new().name("kafka-look".to_owned()).spawn(look) {
        tracing::warn!(%error, "no thread to look for new topic partitions");
    }
    asked
}

impl Look {
    /// Whether it shows another cluster, another topic under a name, or fewer topic partitions.
    fn differs(&self, record: &LedgerRecord, slots: &[TopicPartition]) -> bool {
        let other_cluster = matches!(
            (&record.cluster_id, &self.cluster.cluster_id), (Some(known), Some(found)) if known != found
        );
        let other_topic = self.cluster.topics.iter().any(|facts| {
            let known = record.topics.get(&facts.topic).copied().flatten();
            matches!((known, facts.id), (Some(known), Some(found)) if known != found)
        });
        other_cluster || other_topic || slots.iter().any(|name| !self.offsets.contains_key(name))
    }
}

impl Session<'_> {
    /// Between two microbatches: reads new topic partitions from their earliest offset on.
    pub(super) fn look(&mut self, report: &mut dyn Report) -> Result<Seen, Stop> {
        let live = self.lanes.live();
        // What the reader met is given first: a lane that is read anew forgets it, and so does the next life.
        if live.has_fault() {
            return Ok(Seen::Same);
        }
        let positions = || live.positions().into_iter().collect();
        let look = match self.watch.take_look(&self.connection, positions) {
            None => return Ok(Seen::Same),
            Some(Ok(look)) => look,
            Some(Err(error)) if error.reason() == Reason::SourceAway => {
                self.watch.outage.begins(Reason::SourceAway, "broker", error.to_string(), report);
                return Ok(Seen::Same);
            }
            // What a person has to decide is said by the start table, with the way out.
            Some(Err(error)) => {
                tracing::warn!(%error, "a look at the topics failed; the run begins again with the whole start");
                return Ok(Seen::Others);
            }
        };
        self.watch.source_answers(report);
        if look.differs(&self.owner.record, &self.lanes.live().slots) {
            return Ok(Seen::Others);
        }
        self.watch.say_held_back(&look, report);
        self.watch.ends = look.offsets.iter().map(|(name, range)| (name.clone(), range.end)).collect();
        let slots = &self.lanes.live().slots;
        let new: Vec<String> =
            look.offsets.keys().filter(|name| !slots.contains(name)).map(ToString::to_string).collect();
        if !new.is_empty() {
            let text = format!("new topic partitions, read from their earliest offset: {}", new.join(", "));
            report.event(&Event::Notice { text });
            self.follow_partitions(&look.offsets)?;
        }
        Ok(Seen::Same)
    }

    /// The broker gives nothing although it should: says which topic partition waits and why, and goes on waiting. The
    /// client connects again by itself, with pauses that grow; one that a broker answers and that gets nothing all the
    /// same is replaced.
    pub(super) fn sit_out(&mut self, error: &SourceError, report: &mut dyn Report) -> Result<(), Stop> {
        let cause = match error {
            SourceError::Stalled { topic_partition, .. } => topic_partition.to_string(),
            _ => "broker".to_owned(),
        };
        self.watch.outage.begins(Reason::SourceAway, &cause, error.to_string(), report);
        self.be_patient(error)
    }
}
