//! Where the rows of a chunk go: what time says of them, why it refuses some, and what that makes of late rows.
//!
//! Flow: time verdicts -> [`Judged`] -> rows that nothing can prove new are set aside -> probe -> main and late table
//!
//! Invariants
//! 1. A row that is dropped for being late, or set aside as unproven, is not probed: its key does not come to count as seen
//!    by it (R1).
//! 2. Every other late row passes the probe like one that is on time, so that main and late table together hold each key
//!    once.

use std::sync::Arc;

use arrow::array::{ArrayRef, BooleanArray, RecordBatch, TimestampMicrosecondArray};
use arrow::compute::filter_record_batch;
use arrow::datatypes::{Field, Schema};

use super::microbatch::unexpected_arrow;
use crate::event_time::EventTimeMs;
use crate::job::{BucketFrom, LATE_COLUMNS, LatePolicy};
use crate::letter::ReasonCode;
use crate::mutant;
use crate::stop::Stop;

/// Where one decoded row goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fate {
    /// Refused, dropped, or a repeat.
    Nowhere,
    /// To the main table, if its key was not seen.
    Main,
    /// To the late table, if its key was not seen.
    Late,
    /// To the late table, marked as unproven, whatever its key.
    Unproven,
}

/// Rows of a chunk, as far as they were judged.
#[derive(Debug)]
pub(super) struct Judged {
    pub(super) fates: Vec<Fate>,
    /// Rows that the job drops because they are late.
    pub(super) dropped: Vec<usize>,
    /// Rows that are late, ascending, and the watermark behind which each is.
    watermarks: Vec<(u32, EventTimeMs)>,
    /// By row, the time that tells the bucket of its key; `None` = its event time.
    pub(super) times_of_ids: Option<Vec<EventTimeMs>>,
}

impl Judged {
    /// So many rows, none of which goes anywhere yet.
    pub(super) fn of_none(rows: usize) -> Self {
        Self {
            fates: vec![Fate::Nowhere; rows],
            dropped: Vec::new(),
            watermarks: Vec::new(),
            times_of_ids: None,
        }
    }

    /// Bytes that it takes.
    pub(super) fn bytes(&self) -> u64 {
        let times = self.times_of_ids.as_ref().map_or(0, |times| size_of_val(times.as_slice()));
        (size_of_val(self.fates.as_slice()) + size_of_val(self.watermarks.as_slice()) + times) as u64
            + size_of_val(self.dropped.as_slice()) as u64
    }

    /// Whether no row of it goes anywhere.
    pub(super) fn is_of_none(&self) -> bool {
        self.fates.iter().all(|fate| *fate == Fate::Nowhere)
    }

    /// A row is late behind this watermark. Rows come in ascending order.
    pub(super) fn late(&mut self, row: usize, watermark: EventTimeMs, policy: LatePolicy) {
        self.watermarks.push((u32::try_from(row).expect("a chunk holds fewer than 2^32 rows"), watermark));
        if policy == LatePolicy::Drop {
            self.dropped.push(row);
        }
        self.fates[row] = match policy {
            LatePolicy::Keep => Fate::Main,
            LatePolicy::Side => mutant!("late-rows-to-main", Fate::Main => Fate::Late),
            LatePolicy::Drop => mutant!("late-rows-kept", Fate::Main => Fate::Nowhere),
        };
    }

    /// Takes the rows that are `gone` beyond what the state knows out of those to be probed. Gives their number.
    pub(super) fn set_aside(&mut self, order: &mut Vec<u32>, gone: &[bool]) -> u64 {
        let before = order.len();
        let mut gone = gone.iter();
        order.retain(|&row| {
            let is_gone = *gone.next().expect("one answer for each row to be probed");
            if is_gone {
                self.fates[row as usize] = Fate::Unproven;
            }
            !is_gone
        });
        (before - order.len()) as u64
    }
}

/// What a letter says of a row whose event time is after `limit`.
pub(super) fn ahead(time: EventTimeMs, limit: EventTimeMs) -> (ReasonCode, String) {
    let text = format!(
        "event time {time} is ahead of {limit}, the latest that event_time.max_ahead believes of this record"
    );
    (ReasonCode::EventTimeAhead, text)
}

/// Why a row is refused for the time in its id, if it is; `time` is what its id tells, and `limit` the latest that is believed
/// of its record. Nothing where ids do not tell the bucket.
pub(super) fn judge_id(
    bucket_from: &BucketFrom,
    time: Option<EventTimeMs>,
    limit: EventTimeMs,
) -> Option<(ReasonCode, String)> {
    let BucketFrom::Id { kind, column } = bucket_from else { return None };
    let Some(time) = time else {
        let text = format!("column {column}: no {} that tells its time", kind.name());
        return Some((ReasonCode::IdWithoutTime, text));
    };
    (time > limit).then(|| {
        let text = format!(
            "column {column}: the id was made at {time}, ahead of {limit}, the latest that event_time.max_ahead \
             believes of this record"
        );
        (ReasonCode::EventTimeAhead, text)
    })
}

/// The rows whose fate is one of those asked for.
pub(super) fn rows_where(
    rows: &RecordBatch,
    judged: &Judged,
    is_asked: impl Fn(Fate) -> bool,
) -> Result<RecordBatch, Stop> {
    let mask: BooleanArray = judged.fates.iter().map(|fate| Some(is_asked(*fate))).collect();
    filter_record_batch(rows, &mask).map_err(unexpected_arrow)
}

/// Rows of main with the columns that the late table has beside.
pub(super) fn with_late_columns(rows: &RecordBatch, judged: &Judged) -> Result<RecordBatch, Stop> {
    let mut micros = vec![None; judged.fates.len()];
    for (row, watermark) in &judged.watermarks {
        micros[*row as usize] = Some(watermark.0.saturating_mul(1_000));
    }
    let watermarks = TimestampMicrosecondArray::from(micros);
    let watermarks: ArrayRef = Arc::new(watermarks.with_timezone("+00:00"));
    let unproven: BooleanArray = judged.fates.iter().map(|fate| Some(*fate == Fate::Unproven)).collect();
    let unproven: ArrayRef = Arc::new(unproven);
    let mut fields: Vec<Arc<Field>> = rows.schema().fields().iter().cloned().collect();
    let mut columns = rows.columns().to_vec();
    for ((name, _, required), column) in LATE_COLUMNS.iter().zip([watermarks, unproven]) {
        fields.push(Arc::new(Field::new(*name, column.data_type().clone(), !required)));
        columns.push(column);
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields)), columns).map_err(unexpected_arrow)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_set_aside_are_not_probed_and_the_others_keep_their_order() {
        let mut judged = Judged::of_none(5);
        (1..5).for_each(|row| judged.fates[row] = Fate::Main);
        judged.late(3, EventTimeMs(7), LatePolicy::Side);
        let mut order = vec![4, 1, 3, 2];
        assert_eq!(judged.set_aside(&mut order, &[false, true, true, false]), 2);
        assert_eq!(order, [4, 2]);
        assert_eq!(judged.fates, [Fate::Nowhere, Fate::Unproven, Fate::Main, Fate::Unproven, Fate::Main]);
        let rows = RecordBatch::try_from_iter([(
            "n",
            Arc::new(arrow::array::Int32Array::from_iter_values(0..5)) as ArrayRef,
        )])
        .unwrap();
        let late =
            rows_where(&with_late_columns(&rows, &judged).unwrap(), &judged, |fate| fate == Fate::Unproven)
                .unwrap();
        assert_eq!(late.num_rows(), 2);
        let watermarks = late.column(1).as_any().downcast_ref::<TimestampMicrosecondArray>().unwrap();
        assert_eq!(watermarks.iter().collect::<Vec<_>>(), [None, Some(7_000)]);
    }

    #[test]
    fn a_late_row_goes_where_the_job_says() {
        for (policy, fate) in [
            (LatePolicy::Keep, Fate::Main),
            (LatePolicy::Side, Fate::Late),
            (LatePolicy::Drop, Fate::Nowhere),
        ] {
            let mut judged = Judged::of_none(1);
            judged.late(0, EventTimeMs(7), policy);
            assert_eq!(judged.fates, [fate]);
            assert_eq!(judged.dropped.is_empty(), policy != LatePolicy::Drop);
        }
    }
}
