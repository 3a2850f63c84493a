//! What becomes of a run when a lane gives nothing although it should, or can not be read on.
//!
//! | the lane | gives nothing | can not be read on, or trips the brake |
//! |---|---|---|
//! | live of a run without end | is waited for (`watch`) | the run stops |
//! | live of a drain, or the backfill that it was begun for | what was read is committed, then the run stops | the run stops, the backfill is paused |
//! | another backfill | what was read is committed, then it rests | it is paused |
//!
//! Where the next records are gone or damaged, those before them are not in doubt and may be had only once: they are
//! committed first. Otherwise the open batch of a lane that can not be read on is dropped.
//!
//! So no trouble of a backfill ends or starves the live lane. One that rests is tried again after [`REST`] where the run has
//! no end, else by the next run.
//!
//! Bounds: live waits for a silent backfill no longer than [`BACKFILL_STALL_AFTER`] in each [`REST`]; where a broker of its
//! topic partitions is away, as long as the question for their offsets may take. One that trickles is not silent: while it is
//! opened, live waits so long again for each of its topic partitions whose last record comes, ten seconds after the one
//! before at the latest.

use std::time::{Duration, Instant};

use super::backfill::resume_command;
use super::lanes::Lanes;
use super::microbatch::Open;
use super::report::{Event, Report};
use super::session::Session;
use super::stops;
use crate::source::SourceError;
use crate::stop::{Reason, Stop};

/// How long a backfill may give nothing before the others are served, where live waits for it.
pub(super) const BACKFILL_STALL_AFTER: Duration = Duration::from_secs(10);
/// How long a backfill that gave nothing is left alone.
pub(super) const REST: Duration = Duration::from_secs(60);

/// What is done about a lane that gives nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Patience {
    /// It is waited for.
    SitOut,
    /// The microbatch is closed with what it has, and the run stops after it.
    Stop,
    /// The microbatch is closed with what it has, and other lanes are served.
    Rest,
}

impl Patience {
    fn with(is_live: bool, is_goal: bool, is_endless: bool) -> Self {
        match (is_live, is_endless) {
            (true, true) => Self::SitOut,
            (true, false) => Self::Stop,
            (false, _) if is_goal => Self::Stop,
            (false, _) => Self::Rest,
        }
    }
}

impl Session<'_> {
    /// The served lane gives nothing. Whether its microbatch is to be closed; `waits` = something was read for it that was not
    /// taken yet.
    pub(super) fn gives_nothing(
        &mut self,
        open: &Open,
        waits: bool,
        error: SourceError,
        report: &mut dyn Report,
    ) -> Result<bool, Stop> {
        let served = self.lanes.served();
        let lane = served.lane.clone();
        let is_goal = self.lanes.goal.as_ref() == Some(&lane);
        match Patience::with(served.is_live(), is_goal, self.options.continuous) {
            Patience::SitOut => {
                self.sit_out(&error, report)?;
                return Ok(false);
            }
            Patience::Stop if open.counts.consumed == 0 && !waits => return Err(self.unread(error)),
            Patience::Stop => self.lanes.ends_with = Some(stops::source(error)),
            Patience::Rest => {
                self.rest(&lane, &error, report);
                // A drain lets the reader go after this microbatch.
                if self.options.continuous {
                    self.be_patient(&error)?;
                }
            }
        }
        Ok(true)
    }

    /// The served lane can not be read on. True where its microbatch is to be closed with what was read before: the broker may
    /// not give that a second time. `waits` = something was read for it that was not taken yet.
    pub(super) fn is_cut_off(&mut self, open: &Open, waits: bool, error: SourceError) -> Result<bool, Stop> {
        if !error.spares_what_was_read() || (open.counts.consumed == 0 && !waits) {
            return Err(self.unread(error));
        }
        let served = self.lanes.served();
        if served.is_live() {
            self.lanes.ends_with = Some(stops::after_reading(error));
        } else {
            self.lanes.to_pause = Some((served.lane.clone(), self.backfill_unread(&served.lane, error)));
        }
        Ok(true)
    }

    /// Begins to measure silence anew. A client that a broker answers and that gets nothing all the same is replaced.
    pub(super) fn be_patient(&mut self, error: &SourceError) -> Result<(), Stop> {
        let is_stalled = matches!(error, SourceError::Stalled { .. });
        self.lanes.served_mut().be_patient(is_stalled).map_err(stops::source)
    }

    /// Leaves a backfill alone for a while, and says so when that begins.
    pub(super) fn rest(&mut self, lane: &str, error: &SourceError, report: &mut dyn Report) {
        if self.lanes.rest(lane) {
            let text = format!("backfill {lane} has to wait, the other lanes go on: {error}");
            report.event(&Event::Notice { text });
        } else {
            tracing::debug!(lane, %error, "the backfill still has to wait");
        }
    }

    /// The served lane can not be read on. A backfill is named, and how it goes on: what differs in its log may have been read
    /// since its last commit, so only a new begin says whether it is to be dropped.
    pub(super) fn unread(&self, error: SourceError) -> Stop {
        let served = self.lanes.served();
        if served.is_live() {
            return stops::reading(error);
        }
        if error.reason() != Reason::TopicChanged {
            return self.backfill_unread(&served.lane, error);
        }
        let way_out = format!(
            "its open batch was dropped, live is not touched; going on compares what is committed with the log:\n  {}",
            resume_command(&self.options.job_shown, &served.lane)
        );
        Stop::new(error.reason(), format!("backfill {}: {error}", served.lane), way_out)
    }

    /// A backfill can not be read, or not read on.
    pub(super) fn backfill_unread(&self, lane: &str, error: SourceError) -> Stop {
        let (job, resume) = (&self.options.job_shown, resume_command(&self.options.job_shown, lane));
        let kept = "what it wrote stays, and live is not touched";
        let way_out = match &error {
            SourceError::Damaged { .. } => {
                format!("{kept}; repair or delete the damaged records on the broker, then:\n  {resume}")
            }
            SourceError::OffsetsLost { .. } | SourceError::TailDiffers { .. } => format!(
                "{kept}; drop it, and begin another one over what is left:\n  tidemill lane drop {job} {lane}"
            ),
            _ => format!("{kept}; to go on:\n  {resume}"),
        };
        Stop::new(error.reason(), format!("backfill {lane}: {error}"), way_out)
    }
}

impl Lanes {
    /// A microbatch of the served lane ended before its commit was sent. Where that is the trouble of a backfill alone, this is
    /// to be paused and the run goes on; the stop comes back where it is not.
    pub(super) fn put_off(&mut self, stop: Stop) -> Result<(), Stop> {
        let served = self.served();
        if served.is_live() || !is_of_lane(stop.reason) {
            return Err(stop);
        }
        self.to_pause = Some((served.lane.clone(), stop));
        self.close_backfill();
        Ok(())
    }

    /// Serves others for a while. Whether it was not resting before.
    fn rest(&mut self, lane: &str) -> bool {
        self.resting.insert(lane.to_owned(), Instant::now()).is_none()
    }

    /// Whether a backfill is left alone. In a drain that is for the rest of it.
    pub(super) fn is_resting(&self, lane: &str) -> bool {
        self.resting.get(lane).is_some_and(|since| !self.is_endless || since.elapsed() < REST)
    }
}

/// Whether a stop says something about the lane that was read, and nothing about tables, state or disks.
pub(super) fn is_of_lane(reason: Reason) -> bool {
    matches!(reason, Reason::Brake | Reason::OffsetsLost | Reason::TopicChanged | Reason::UnknownTopic)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_live_of_a_run_without_end_is_waited_for_and_only_other_backfills_rest() {
        assert_eq!(Patience::with(true, false, true), Patience::SitOut);
        assert_eq!(Patience::with(true, false, false), Patience::Stop);
        assert_eq!(Patience::with(false, true, false), Patience::Stop);
        for is_endless in [false, true] {
            assert_eq!(Patience::with(false, false, is_endless), Patience::Rest);
        }
    }

    #[test]
    fn what_tables_state_and_disks_say_is_no_trouble_of_a_lane() {
        for reason in [Reason::CatalogAway, Reason::StorageFailed, Reason::Fenced, Reason::Unexpected] {
            assert!(!is_of_lane(reason), "{reason:?}");
        }
        for reason in [Reason::Brake, Reason::OffsetsLost, Reason::TopicChanged, Reason::UnknownTopic] {
            assert!(is_of_lane(reason), "{reason:?}");
        }
    }
}
