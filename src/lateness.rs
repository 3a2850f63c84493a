//! Event time against watermarks: which rows are late, which run too far ahead, and how far the lane's watermark is.
//!
//! Flow: rows in offset order of their topic partition -> [`Lateness::judge`] -> on time, late, or too far ahead
//!
//! Invariants
//! 1. A row is judged against earlier offsets of its own topic partition only, so the verdict does not depend on where
//!    batches are cut (R2). Only the far-ahead rule uses the cut time, which enters as a value.
//! 2. A row that is too far ahead moves no watermark.
//! 3. The lane's watermark never moves back.

use crate::event_time::EventTimeMs;
use crate::job::EventTimeRule;
use crate::mutant;

/// What time says about a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TimeVerdict {
    /// Within the allowed lateness.
    OnTime,
    /// Behind its topic partition's watermark by more than the allowed lateness.
    Late {
        /// That watermark.
        watermark: EventTimeMs,
    },
    /// Ahead of `limit`, the latest event time that is believed.
    Ahead {
        /// That time.
        limit: EventTimeMs,
    },
}

/// Largest event times by slot, and the rule.
#[derive(Debug, Clone)]
pub struct Lateness {
    watermark_delay_ms: i64,
    allowed_lateness_ms: i64,
    ahead_max_ms: i64,
    idle_after_ms: i64,
    max_event_times: Vec<Option<EventTimeMs>>,
}

fn millis(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

impl Lateness {
    /// Begins with the ledger's largest event times, one for each slot.
    pub fn new(rule: &EventTimeRule, max_event_times: Vec<Option<EventTimeMs>>) -> Self {
        Self {
            watermark_delay_ms: millis(rule.watermark_delay),
            allowed_lateness_ms: millis(rule.allowed_lateness),
            ahead_max_ms: millis(rule.ahead_max),
            idle_after_ms: millis(rule.idle_after),
            max_event_times,
        }
    }

    /// The latest time that is believed of a record. One without Kafka timestamp is held against the cut time.
    pub fn limit(&self, timestamp_ms: Option<i64>, cut_time_ms: i64) -> EventTimeMs {
        let believed = timestamp_ms.unwrap_or(cut_time_ms);
        let believed = mutant!("producers-clock-believed", believed => believed.min(cut_time_ms));
        EventTimeMs(believed).plus_ms(self.ahead_max_ms)
    }

    /// Judges the next row of a slot. A record without Kafka timestamp is held against the cut time.
    pub fn judge(
        &mut self,
        slot: u32,
        event_time: EventTimeMs,
        timestamp_ms: Option<i64>,
        cut_time_ms: i64,
    ) -> TimeVerdict {
        let limit = self.limit(timestamp_ms, cut_time_ms);
        if mutant!("far-future-believed", false => event_time > limit) {
            return TimeVerdict::Ahead { limit };
        }
        let max = &mut self.max_event_times[mutant!("late-by-another-partition", 0 => slot as usize)];
        let watermark = max.map(|max| max.minus_ms(self.watermark_delay_ms));
        let late = watermark
            .filter(|watermark| event_time < watermark.minus_ms(self.allowed_lateness_ms))
            .map(|watermark| TimeVerdict::Late { watermark });
        *max = Some(max.map_or(event_time, |max| max.max(event_time)));
        late.unwrap_or(TimeVerdict::OnTime)
    }

    /// Largest event time of each slot.
    pub fn max_event_times(&self) -> &[Option<EventTimeMs>] {
        &self.max_event_times
    }

    /// The lane's watermark at a cut: the minimum over slots that are not idle, never below `before`; `before` itself while
    /// a slot with backlog had no event yet. A slot is idle if it is read to its end (`at_end`) and never had an event, or
    /// trails the leader by more than `idle_after`.
    pub fn watermark(&self, before: Option<EventTimeMs>, at_end: &[bool]) -> Option<EventTimeMs> {
        let Some(leader) = self.max_event_times.iter().flatten().max() else { return before };
        // A slot with backlog and no event yet may hold the oldest of all: nothing is known of its time.
        if self.max_event_times.iter().zip(at_end).any(|(max, at_end)| max.is_none() && !at_end) {
            return before;
        }
        let holding = self.max_event_times.iter().zip(at_end).filter_map(|(max, &at_end)| {
            let max = (*max)?;
            let idle =
                mutant!("backlog-counted-idle", true => at_end) && max < leader.minus_ms(self.idle_after_ms);
            (!idle).then_some(max)
        });
        let now = holding.min().map(|max| max.minus_ms(self.watermark_delay_ms));
        mutant!("watermark-moves-back", now => before.max(now))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;
    use crate::job::LatePolicy;

    fn rule() -> EventTimeRule {
        EventTimeRule {
            column: "event_time".into(),
            watermark_delay: Duration::from_millis(100),
            allowed_lateness: Duration::from_millis(50),
            late: LatePolicy::Keep,
            ahead_max: Duration::from_millis(1_000),
            idle_after: Duration::from_millis(500),
        }
    }

    const FAR: i64 = 1_000_000;

    #[test]
    fn a_row_is_late_only_behind_the_watermark_and_the_allowed_lateness() {
        let mut lateness = Lateness::new(&rule(), vec![None]);
        let mut judge = |time| lateness.judge(0, EventTimeMs(time), None, FAR);
        assert_eq!(judge(10_000), TimeVerdict::OnTime);
        assert_eq!(judge(9_850), TimeVerdict::OnTime);
        assert_eq!(judge(9_849), TimeVerdict::Late { watermark: EventTimeMs(9_900) });
    }

    #[test]
    fn one_topic_partition_does_not_make_rows_of_another_late() {
        let mut lateness = Lateness::new(&rule(), vec![None, None]);
        lateness.judge(0, EventTimeMs(500_000), None, FAR);
        assert_eq!(lateness.judge(1, EventTimeMs(1), None, FAR), TimeVerdict::OnTime);
    }

    #[test]
    fn a_row_too_far_ahead_moves_no_watermark() {
        let mut lateness = Lateness::new(&rule(), vec![None]);
        lateness.judge(0, EventTimeMs(5_000), Some(5_000), FAR);
        let verdict = lateness.judge(0, EventTimeMs(9_001), Some(8_000), FAR);
        assert_eq!(verdict, TimeVerdict::Ahead { limit: EventTimeMs(9_000) });
        assert_eq!(lateness.max_event_times(), [Some(EventTimeMs(5_000))]);
    }

    #[test]
    fn the_smaller_of_timestamp_and_cut_time_bounds_event_time() {
        let mut lateness = Lateness::new(&rule(), vec![None]);
        let mut judge = |timestamp| lateness.judge(0, EventTimeMs(2_500), timestamp, 1_000);
        assert_eq!(judge(Some(9_999)), TimeVerdict::Ahead { limit: EventTimeMs(2_000) });
        assert_eq!(judge(None), TimeVerdict::Ahead { limit: EventTimeMs(2_000) });
    }

    #[test]
    fn an_idle_slot_read_to_its_end_does_not_hold_the_watermark_but_one_with_backlog_does() {
        let times = vec![Some(EventTimeMs(10_000)), Some(EventTimeMs(1_000)), None];
        let lateness = Lateness::new(&rule(), times);
        assert_eq!(lateness.watermark(None, &[true, true, true]), Some(EventTimeMs(9_900)));
        assert_eq!(lateness.watermark(None, &[true, false, true]), Some(EventTimeMs(900)));
    }

    #[test]
    fn a_slot_with_backlog_and_no_event_yet_holds_the_watermark_where_it_is() {
        let mut lateness = Lateness::new(&rule(), vec![None, None]);
        lateness.judge(0, EventTimeMs(10_000), None, FAR);
        assert_eq!(lateness.watermark(None, &[true, false]), None);
        assert_eq!(lateness.watermark(Some(EventTimeMs(7)), &[true, false]), Some(EventTimeMs(7)));
        assert_eq!(lateness.watermark(None, &[true, true]), Some(EventTimeMs(9_900)));
    }

    #[test]
    fn the_watermark_never_moves_back() {
        let lateness = Lateness::new(&rule(), vec![Some(EventTimeMs(1_000))]);
        assert_eq!(lateness.watermark(Some(EventTimeMs(5_000)), &[false]), Some(EventTimeMs(5_000)));
        let nothing = Lateness::new(&rule(), vec![None]);
        assert_eq!(nothing.watermark(Some(EventTimeMs(5_000)), &[true]), Some(EventTimeMs(5_000)));
        assert_eq!(nothing.watermark(None, &[true]), None);
    }

    /// A row: slot, event time, Kafka timestamp.
    type Row = (u32, i64, Option<i64>);

    const SLOTS: u32 = 3;

    /// What the rule says, told from the rows before alone.
    fn told(before: &[Row], (slot, time, timestamp): Row, cut_ms: i64) -> TimeVerdict {
        let limit = |timestamp: Option<i64>| timestamp.map_or(cut_ms, |own| own.min(cut_ms)) + 1_000;
        if time > limit(timestamp) {
            return TimeVerdict::Ahead { limit: EventTimeMs(limit(timestamp)) };
        }
        let believed =
            before.iter().filter(|(of, time, timestamp)| *of == slot && *time <= limit(*timestamp));
        let watermark = believed.map(|(_, time, _)| time - 100).max();
        match watermark.filter(|watermark| time < watermark - 50) {
            Some(watermark) => TimeVerdict::Late { watermark: EventTimeMs(watermark) },
            None => TimeVerdict::OnTime,
        }
    }

    /// The least largest event time of what is not idle, less the delay.
    fn held(before: Option<i64>, largest: &[Option<i64>], at_end: &[bool]) -> Option<i64> {
        let leader = *largest.iter().flatten().max()?;
        let mut least = i64::MAX;
        for (largest, at_end) in largest.iter().zip(at_end) {
            match largest {
                None if *at_end => {}
                None => return before,
                Some(largest) if *at_end && *largest < leader - 500 => {}
                Some(largest) => least = least.min(*largest),
            }
        }
        before.max(Some(least - 100))
    }

    proptest! {
        /// Goal: verdicts are what the rule says of the rows before, wherever batches are cut; watermarks too.
        /// Method: rows of three slots in a span of a few lateness bounds, some from clocks that are ahead; a new
        /// `Lateness` from the largest event times at each cut, as a run begins with those of the ledger.
        #[test]
        fn verdicts_and_watermarks_agree_with_a_straightforward_model_wherever_batches_are_cut(
            rows in vec((0..SLOTS, 9_000i64..11_500, proptest::option::of(9_000i64..11_000)), 0..60),
            cuts in vec(0usize..60, 0..6),
            at_end in vec(any::<bool>(), SLOTS as usize),
        ) {
            let cut_ms = 10_200;
            let mut lateness = Lateness::new(&rule(), vec![None; SLOTS as usize]);
            let mut watermark = None;
            for (index, &(slot, time, timestamp)) in rows.iter().enumerate() {
                if cuts.contains(&index) {
                    let largest = lateness.max_event_times().to_vec();
                    let plain: Vec<Option<i64>> = largest.iter().map(|time| time.map(|time| time.0)).collect();
                    let expected = held(watermark, &plain, &at_end);
                    let found = lateness.watermark(watermark.map(EventTimeMs), &at_end).map(|time| time.0);
                    prop_assert_eq!(found, expected);
                    prop_assert!(found >= watermark, "a watermark never moves back");
                    watermark = found;
                    lateness = Lateness::new(&rule(), largest);
                }
                let verdict = lateness.judge(slot, EventTimeMs(time), timestamp, cut_ms);
                prop_assert_eq!(verdict, told(&rows[..index], rows[index], cut_ms));
            }
        }

        /// Goal: a clock that runs ahead on one producer makes nothing of the others late and moves no watermark.
        #[test]
        fn rows_too_far_ahead_change_no_other_verdict(
            rows in vec((0..SLOTS, 9_000i64..10_000), 1..40),
            ahead in vec((0usize..40, 0..SLOTS, 12_000i64..1_000_000), 0..10),
        ) {
            let judge = |with_ahead: bool| {
                let mut lateness = Lateness::new(&rule(), vec![None; SLOTS as usize]);
                let mut verdicts = Vec::new();
                for (index, &(slot, time)) in rows.iter().enumerate() {
                    for &(_, slot, time) in ahead.iter().filter(|(at, ..)| with_ahead && *at == index) {
                        let verdict = lateness.judge(slot, EventTimeMs(time), Some(10_000), 10_000);
                        assert_eq!(verdict, TimeVerdict::Ahead { limit: EventTimeMs(11_000) });
                    }
                    verdicts.push(lateness.judge(slot, EventTimeMs(time), Some(10_000), 10_000));
                }
                (verdicts, lateness.max_event_times().to_vec())
            };
            prop_assert_eq!(judge(true), judge(false));
        }
    }
}
