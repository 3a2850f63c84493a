//! The fast read of a row: one pass over a good object, values straight into their slots.
//!
//! Nearly every payload is good JSON whose members stand in the order of the payload before. The fast read takes those,
//! and at the first thing that is not as it should be (a refusal, a repeated member, an escape in a name) it says
//! `None`, whereupon [`walk`](super::walk) reads the row from its start and gives the verdict. So each refusal and its
//! text is made in one place.
//!
//! Invariant: what the fast read takes, the walk takes with the same values (property test in `model_tests`).

use iceberg::spec::PrimitiveType;

use super::plan::{ColumnPlan, Node, ROOT, Reader};
use super::scan::{Number, Scan, StringEnd};
use super::time;
use super::value::{self, Scratch, Text, Value};
use crate::job::UnknownFields;

/// A member that a column reads or lies behind: its index, the one expected after it and how it is read.
type Known = (usize, usize, Reader);

/// What the fast read of one row works on.
pub(super) struct FastRow<'w, 'a> {
    pub(super) nodes: &'w mut [Node],
    pub(super) columns: &'w [ColumnPlan],
    /// One value per column, null where no member stood.
    pub(super) slots: &'w mut [Value<'a>],
    pub(super) scratch: &'w mut Scratch,
    pub(super) unknown_fields: UnknownFields,
    /// Kept unknown members, `"name":value` with commas between, without the braces.
    pub(super) unknown: &'w mut String,
    /// Number of this reading; no earlier one of the same tree had it.
    pub(super) row: u64,
    pub(super) scan: Scan<'a>,
}

impl<'a> FastRow<'_, 'a> {
    /// Reads the object that is all of the text. After `None` slots, scratch and kept members hold anything.
    pub(super) fn read(mut self) -> Option<()> {
        (self.object(ROOT, 0, 1)? == self.scan.len()).then_some(())
    }

    /// Reads the object of one node at `at` and gives the position after it. `depth` counts it and those around it.
    fn object(&mut self, node: usize, at: usize, depth: usize) -> Option<usize> {
        if self.scan.byte(at)? != b'{' {
            return None;
        }
        let mut at = self.scan.skip_blank(at + 1)?;
        if self.scan.byte(at)? == b'}' {
            return Some(at + 1);
        }
        let mut previous = None;
        let mut expected = self.nodes[node].first();
        loop {
            let name = at;
            let (member, after) = self.member(node, at, previous, expected)?;
            at = after;
            match member {
                Some((index, next, reader)) => {
                    (previous, expected) = (Some(index), next);
                    at = self.wanted(node, name, at, depth, reader)?;
                }
                None => at = self.unknown(node, name, at, depth)?,
            }
            at = self.scan.skip_blank(at)?;
            match self.scan.byte(at)? {
                b',' => at = self.scan.skip_blank(at + 1)?,
                b'}' => return Some(at + 1),
                _ => return None,
            }
        }
    }

    /// The member whose name stands at `at` (its index, the one expected after it and how it is read; `None` = it is
    /// not known), and the position of its value.
    #[inline(always)]
    fn member(
        &mut self,
        node: usize,
        at: usize,
        previous: Option<usize>,
        expected: usize,
    ) -> Option<(Option<Known>, usize)> {
        if let Some(member) = self.nodes[node].member(expected)
            && let Some(end) = self.scan.name(at, &member.name)
        {
            return Some((Some((expected, member.next, member.reader)), self.scan.skip_blank(end)?));
        }
        self.other_member(node, at, previous)
    }

    /// The same for a member that was not expected, or is not written in the most compact way.
    fn other_member(
        &mut self,
        node: usize,
        at: usize,
        previous: Option<usize>,
    ) -> Option<(Option<Known>, usize)> {
        if self.scan.byte(at)? != b'"' {
            return None;
        }
        let StringEnd { end, escaped } = self.scan.string(at)?;
        if escaped {
            return None;
        }
        let node = &mut self.nodes[node];
        let found = node.follow(previous, self.scan.text(at + 1, end - 1));
        let member = found.and_then(|index| Some((index, node.member(index)?)));
        let member = member.map(|(index, member)| (index, member.next, member.reader));
        Some((member, self.scan.colon(end)?))
    }

    #[cold]
    fn unknown(&mut self, node: usize, name: usize, at: usize, depth: usize) -> Option<usize> {
        if self.unknown_fields == UnknownFields::DeadLetter {
            return None;
        }
        let end = self.scan.value(at, depth)?;
        if self.unknown_fields == UnknownFields::Keep && node == ROOT {
            if !self.unknown.is_empty() {
                self.unknown.push(',');
            }
            let name = self.scan.text(name, self.scan.string(name)?.end);
            self.unknown.extend([name, ":", self.scan.text(at, end)]);
        }
        Some(end)
    }

    /// Reads the value at `at` as its member is read; no column takes arrays or objects.
    #[inline(always)]
    fn wanted(&mut self, node: usize, name: usize, at: usize, depth: usize, reader: Reader) -> Option<usize> {
        let Some(child) = reader.child() else {
            return match self.unknown_fields {
                UnknownFields::Ignore => self.scan.value(at, depth),
                _ => self.unknown(node, name, at, depth),
            };
        };
        let seen_row = &mut self.nodes[child].seen_row;
        if std::mem::replace(seen_row, self.row) == self.row {
            return None;
        }
        match (self.scan.byte(at)?, reader) {
            (b'n', _) => self.scan.literal(at, "null"),
            (b'"', Reader::Text { column, .. }) => {
                let StringEnd { end, escaped } = self.scan.string(at)?;
                if escaped {
                    return self.text(child, at, end, true);
                }
                self.slots[column] = Value::Text(Text::Chunk(self.scan.text(at + 1, end - 1)));
                Some(end)
            }
            (b'-' | b'0'..=b'9', Reader::Long { column, .. }) => {
                let number = self.scan.number(at)?;
                let Some(integer) = number.integer() else { return self.number(child, at, number) };
                self.slots[column] = Value::Long(integer);
                Some(number.end)
            }
            (b'-' | b'0'..=b'9', Reader::Instant { column, micros, .. }) => {
                let number = self.scan.number(at)?;
                match number.integer().and_then(|integer| integer.checked_mul(micros)) {
                    Some(instant) if (time::MICROS_MIN..=time::MICROS_MAX).contains(&instant) => {
                        self.slots[column] = Value::Long(instant);
                        Some(number.end)
                    }
                    _ => self.number(child, at, number),
                }
            }
            (b'"', Reader::Other { .. } | Reader::Instant { .. }) => {
                let StringEnd { end, escaped } = self.scan.string(at)?;
                self.text(child, at, end, escaped)
            }
            (b'-' | b'0'..=b'9', Reader::Other { .. }) => {
                let number = self.scan.number(at)?;
                self.number(child, at, number)
            }
            (b't', Reader::Other { .. }) => self.boolean(child, at, true),
            (b'f', Reader::Other { .. }) => self.boolean(child, at, false),
            (b'{', Reader::Object { .. }) => self.object(child, at, depth + 1),
            _ => None,
        }
    }

    /// The string at `at` into every column that reads it.
    #[inline]
    fn text(&mut self, child: usize, at: usize, end: usize, escaped: bool) -> Option<usize> {
        for position in &self.nodes[child].columns {
            let column = &self.columns[*position].column;
            let (kind, unit) = (&column.column_type, column.unit);
            self.slots[*position] = if escaped {
                value::from_json(self.scan.text(at, end), kind, unit, self.scratch).ok()?
            } else {
                value::from_plain_string(self.scan.text(at + 1, end - 1), kind, unit, self.scratch).ok()?
            };
        }
        Some(end)
    }

    /// The number at `at` into every column that reads it.
    #[inline]
    fn number(&mut self, child: usize, at: usize, number: Number) -> Option<usize> {
        for position in &self.nodes[child].columns {
            let column = &self.columns[*position].column;
            let (kind, unit) = (&column.column_type, column.unit);
            let value = match (kind, unit, number.integer()) {
                (PrimitiveType::Long, _, Some(integer)) => Some(Value::Long(integer)),
                (PrimitiveType::Int, _, Some(integer)) => i32::try_from(integer).ok().map(Value::Int),
                (PrimitiveType::Timestamp | PrimitiveType::Timestamptz, Some(unit), Some(integer)) => {
                    time::in_years(value::micros_of(integer, unit)).ok().map(Value::Long)
                }
                (PrimitiveType::Decimal { precision, scale }, _, _) => {
                    value::decimal_of(&number, *precision, *scale).map(Value::Decimal)
                }
                _ => None,
            };
            self.slots[*position] = match value {
                Some(value) => value,
                None => {
                    let raw = self.scan.text(at, number.end);
                    value::from_json(raw, kind, unit, self.scratch).ok()?
                }
            };
        }
        Some(number.end)
    }

    /// The literal at `at` into every column that reads it.
    fn boolean(&mut self, child: usize, at: usize, is_true: bool) -> Option<usize> {
        for position in &self.nodes[child].columns {
            if self.columns[*position].column.column_type != PrimitiveType::Boolean {
                return None;
            }
            self.slots[*position] = Value::Boolean(is_true);
        }
        self.scan.literal(at, if is_true { "true" } else { "false" })
    }
}
