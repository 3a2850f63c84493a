//! The plan: a job's columns, checked once, and the tree of members that their paths want.
//!
//! A node of the tree is one wanted member. It is either entered (its value must be an object) or read by one or
//! more columns, never both, because no column type holds an object.

use std::collections::{HashMap, HashSet};

use arrow::datatypes::{DataType, Field};
use iceberg::spec::{PrimitiveType, Type};

use super::DecodeSetupError;
use super::scan::Name;
use super::value::{DECIMAL_DIGITS_MAX, unit_micros};
use crate::job::{Column, ColumnSource, Decode, METADATA_COLUMNS, UNKNOWN_FIELDS_COLUMN, UnknownFields};

/// Longest path of a column, in members. Far below the depth at which serde_json stops (127), so that its own limit
/// is never what decides.
pub(super) const PATH_MEMBERS_MAX: usize = 32;
/// Longest value of a `fixed` column: a null costs as many bytes as a value.
pub(super) const FIXED_BYTES_MAX: u64 = 4096;
/// Objects with more known members than this are looked up by hash.
const MEMBERS_SCANNED_MAX: usize = 16;
/// Members that no column wants, of one object, whose names are remembered so that they are known when they come again.
const MEMBERS_UNKNOWN_MAX: usize = 64;
/// Longest name that is remembered so, in bytes.
const NAME_BYTES_KEPT_MAX: usize = 64;

/// What `decode` knows about one column beyond the job.
#[derive(Debug)]
pub(super) struct ColumnPlan {
    pub(super) column: Column,
    /// Where the value is looked for, for people: `$.delivery.provider`, `header traceparent`, `key`.
    pub(super) source: String,
}

/// Columns, keys and event time by position.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) columns: Vec<ColumnPlan>,
    pub(super) fields: Vec<Field>,
    /// Positions of columns whose value is not in the payload.
    pub(super) outside: Vec<usize>,
    /// Positions of the dedup key's columns, in the key's order.
    pub(super) keys: Vec<usize>,
    /// Positions of columns that read the payload.
    pub(super) inside: Vec<usize>,
    /// Positions of columns that need a value.
    pub(super) required: Vec<usize>,
    /// Position of the event-time column.
    pub(super) event_time: usize,
    pub(super) unknown_fields: UnknownFields,
}

/// The root of a [`Tree`].
pub(super) const ROOT: usize = 0;

/// Wanted members. Nodes remember the last reading that saw them, which is how repeats are found without clearing, and
/// which member follows which: producers write members in the same order each time.
#[derive(Debug)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
}

#[derive(Debug, Default)]
pub(super) struct Node {
    pub(super) path: String,
    /// Columns that read this member; empty = the member is entered.
    pub(super) columns: Vec<usize>,
    /// Number of the last reading that had this member.
    pub(super) seen_row: u64,
    /// Members of this object: the wanted ones, then others that stood in payloads.
    members: Vec<Member>,
    by_name: HashMap<Box<str>, usize>,
    /// Most members that are remembered.
    members_max: usize,
    /// The member that stood first in the object read last.
    first: usize,
    /// The member that stood before the next one; `None` = the next one is the first.
    previous: Option<usize>,
}

/// A member of an entered object.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: Name,
    pub(super) reader: Reader,
    /// The member that followed it last.
    pub(super) next: usize,
}

/// How a member is read. `child` is its node.
#[derive(Debug, Clone, Copy)]
pub(super) enum Reader {
    /// No column wants it.
    Skip,
    /// Its object is entered.
    Object { child: usize },
    /// One column of text.
    Text { child: usize, column: usize },
    /// One column of longs.
    Long { child: usize, column: usize },
    /// One column of timestamps; numbers are units of so many microseconds.
    Instant { child: usize, column: usize, micros: i64 },
    /// Columns as the node names them.
    Other { child: usize },
}

impl Reader {
    /// The member's node.
    #[inline(always)]
    pub(super) fn child(self) -> Option<usize> {
        match self {
            Self::Skip => None,
            Self::Object { child }
            | Self::Text { child, .. }
            | Self::Long { child, .. }
            | Self::Instant { child, .. }
            | Self::Other { child } => Some(child),
        }
    }

    fn of(child: usize, node: &Node, columns: &[ColumnPlan]) -> Self {
        let column = match *node.columns {
            [] => return Self::Object { child },
            [column] => column,
            _ => return Self::Other { child },
        };
        match (&columns[column].column.column_type, columns[column].column.unit) {
            (PrimitiveType::String, _) => Self::Text { child, column },
            (PrimitiveType::Long, _) => Self::Long { child, column },
            (PrimitiveType::Timestamp | PrimitiveType::Timestamptz, Some(unit)) => {
                Self::Instant { child, column, micros: unit_micros(unit) }
            }
            _ => Self::Other { child },
        }
    }
}

impl Node {
    /// Begins a new object.
    pub(super) fn rewind(&mut self) {
        self.previous = None;
    }

    /// Index of the member that is expected first.
    #[inline]
    pub(super) fn first(&self) -> usize {
        self.first
    }

    /// A member by its index.
    #[inline(always)]
    pub(super) fn member(&self, index: usize) -> Option<&Member> {
        self.members.get(index)
    }

    /// The node of the next member of this object; `None` = no column wants it.
    pub(super) fn find(&mut self, name: &str) -> Option<usize> {
        let found = self.follow(self.previous, name)?;
        self.previous = Some(found);
        self.members[found].reader.child()
    }

    /// Index of the member of this name, which stands after `previous` (`None` = it stands first) and is expected there
    /// from now on; `None` = no column wants it and there is no room to remember it.
    pub(super) fn follow(&mut self, previous: Option<usize>, name: &str) -> Option<usize> {
        let expected = previous.map_or(self.first, |previous| self.members[previous].next);
        if self.members.get(expected).is_some_and(|member| member.name.as_str() == name) {
            return Some(expected);
        }
        let found = match self.position(name) {
            Some(found) => found,
            None if self.members.len() < self.members_max && name.len() <= NAME_BYTES_KEPT_MAX => {
                self.push(name, Reader::Skip)
            }
            None => return None,
        };
        match previous {
            Some(previous) => self.members[previous].next = found,
            None => self.first = found,
        }
        Some(found)
    }

    fn position(&self, name: &str) -> Option<usize> {
        if self.members.len() > MEMBERS_SCANNED_MAX {
            self.by_name.get(name).copied()
        } else {
            self.members.iter().position(|member| member.name.as_str() == name)
        }
    }

    /// Adds a member, expected after the one added before it.
    fn push(&mut self, name: &str, reader: Reader) -> usize {
        let member = self.members.len();
        self.by_name.insert(name.into(), member);
        self.members.push(Member { name: Name::new(name), reader, next: member + 1 });
        member
    }
}

impl Plan {
    /// Checks a job's columns.
    pub(super) fn new(
        decode: &Decode,
        key_columns: &[String],
        event_time_column: &str,
    ) -> Result<Self, DecodeSetupError> {
        let mut names = reserved_names(decode.unknown_fields);
        let mut plan = Self {
            columns: Vec::new(),
            fields: Vec::new(),
            outside: Vec::new(),
            keys: Vec::new(),
            inside: Vec::new(),
            required: Vec::new(),
            event_time: 0,
            unknown_fields: decode.unknown_fields,
        };
        for (position, column) in decode.columns.iter().enumerate() {
            if !names.insert(column.name.clone()) {
                return Err(DecodeSetupError::NameTaken { column: column.name.clone() });
            }
            plan.fields.push(Field::new(&column.name, arrow_type(column)?, !column.required));
            check_unit(column)?;
            check_source(column)?;
            match column.from {
                ColumnSource::Value(_) => plan.inside.push(position),
                _ => plan.outside.push(position),
            }
            if column.required {
                plan.required.push(position);
            }
            plan.columns.push(ColumnPlan { column: column.clone(), source: source_text(&column.from) });
        }
        for key in key_columns {
            plan.keys.push(plan.position(key, "dedup.key")?);
        }
        plan.event_time = plan.position(event_time_column, "event_time.column")?;
        let event_time = &plan.columns[plan.event_time].column;
        if !matches!(event_time.column_type, PrimitiveType::Timestamp | PrimitiveType::Timestamptz) {
            return Err(DecodeSetupError::EventTimeType {
                column: event_time.name.clone(),
                column_type: event_time.column_type.to_string(),
            });
        }
        if plan.unknown_fields == UnknownFields::Keep {
            plan.fields.push(Field::new(UNKNOWN_FIELDS_COLUMN, DataType::Utf8, true));
        }
        Ok(plan)
    }

    fn position(&self, name: &str, option: &'static str) -> Result<usize, DecodeSetupError> {
        match self.columns.iter().position(|planned| planned.column.name == name) {
            Some(position) => Ok(position),
            None => Err(DecodeSetupError::NoSuchColumn { option, column: name.to_owned() }),
        }
    }
}

impl Tree {
    /// Gathers the paths of the columns that read the payload.
    pub(super) fn new(columns: &[ColumnPlan]) -> Result<Self, DecodeSetupError> {
        let mut tree = Self { nodes: vec![Node { path: "$".into(), ..Node::default() }] };
        for (position, planned) in columns.iter().enumerate() {
            if let ColumnSource::Value(path) = &planned.column.from {
                let node = tree.grow(path);
                tree.nodes[node].columns.push(position);
            }
        }
        for node in &tree.nodes {
            let inner = node.members.first().and_then(|member| member.reader.child());
            if let (Some(column), Some(inner)) = (node.columns.first(), inner) {
                return Err(DecodeSetupError::PathEntered {
                    column: columns[*column].column.name.clone(),
                    path: node.path.clone(),
                    inner: tree.nodes[inner].path.clone(),
                });
            }
        }
        tree.choose_readers(columns);
        Ok(tree)
    }

    /// Chooses how each member is read, now that all columns are known.
    fn choose_readers(&mut self, columns: &[ColumnPlan]) {
        for node in 0..self.nodes.len() {
            for member in 0..self.nodes[node].members.len() {
                let child = self.nodes[node].members[member].reader.child();
                let child = child.expect("every member of a job's path has a node");
                self.nodes[node].members[member].reader = Reader::of(child, &self.nodes[child], columns);
            }
            self.nodes[node].members_max = self.nodes[node].members.len() + MEMBERS_UNKNOWN_MAX;
        }
    }

    fn grow(&mut self, path: &[String]) -> usize {
        let mut node = ROOT;
        for name in path {
            let known = self.nodes[node].position(name);
            node = match known.and_then(|member| self.nodes[node].members[member].reader.child()) {
                Some(child) => child,
                None => self.add(node, name),
            };
        }
        node
    }

    fn add(&mut self, parent: usize, name: &str) -> usize {
        let child = self.nodes.len();
        let path = format!("{}.{name}", self.nodes[parent].path);
        self.nodes.push(Node { path, ..Node::default() });
        self.nodes[parent].push(name, Reader::Object { child });
        child
    }
}

fn reserved_names(unknown_fields: UnknownFields) -> HashSet<String> {
    let mut names: HashSet<String> = METADATA_COLUMNS.iter().map(|(name, ..)| (*name).to_owned()).collect();
    if unknown_fields == UnknownFields::Keep {
        names.insert(UNKNOWN_FIELDS_COLUMN.to_owned());
    }
    names
}

/// The Arrow type that iceberg 0.10.1 gives the column's type, for the types that rows can hold.
fn arrow_type(column: &Column) -> Result<DataType, DecodeSetupError> {
    let unsupported = |why: &'static str| DecodeSetupError::TypeUnsupported {
        column: column.name.clone(),
        column_type: column.column_type.to_string(),
        why,
    };
    match &column.column_type {
        PrimitiveType::TimestampNs | PrimitiveType::TimestamptzNs => {
            return Err(unsupported("nanoseconds need table format 3; use timestamp or timestamptz"));
        }
        PrimitiveType::Decimal { precision, scale }
            if !(1..=DECIMAL_DIGITS_MAX).contains(precision) || scale > precision =>
        {
            return Err(unsupported("a decimal has 1 to 38 digits and no more of them after the point"));
        }
        PrimitiveType::Fixed(length) if !(1..=FIXED_BYTES_MAX).contains(length) => {
            return Err(unsupported("a fixed has 1 to 4096 bytes; use binary for longer values"));
        }
        _ => {}
    }
    iceberg::arrow::type_to_arrow_type(&Type::Primitive(column.column_type.clone()))
        .map_err(|_| unsupported("iceberg has no Arrow type for it"))
}

fn check_unit(column: &Column) -> Result<(), DecodeSetupError> {
    let takes_numbers = matches!(
        column.column_type,
        PrimitiveType::Time | PrimitiveType::Timestamp | PrimitiveType::Timestamptz
    ) && matches!(column.from, ColumnSource::Value(_));
    if column.unit.is_some() && !takes_numbers {
        return Err(DecodeSetupError::UnitUnused { column: column.name.clone() });
    }
    Ok(())
}

fn check_source(column: &Column) -> Result<(), DecodeSetupError> {
    let allowed: &'static str = match (&column.from, &column.column_type) {
        (ColumnSource::Value(path), _) if path.is_empty() || path.len() > PATH_MEMBERS_MAX => {
            return Err(DecodeSetupError::PathLength { column: column.name.clone(), members: path.len() });
        }
        (ColumnSource::Value(_), _)
        | (ColumnSource::Key | ColumnSource::Header(_), PrimitiveType::String | PrimitiveType::Binary)
        | (ColumnSource::Timestamp, PrimitiveType::Timestamptz)
        | (ColumnSource::Topic, PrimitiveType::String) => return Ok(()),
        (ColumnSource::Key | ColumnSource::Header(_), _) => "string or binary",
        (ColumnSource::Timestamp, _) => "timestamptz",
        (ColumnSource::Topic, _) => "string",
    };
    Err(DecodeSetupError::SourceType {
        column: column.name.clone(),
        source_text: source_text(&column.from),
        allowed,
        column_type: column.column_type.to_string(),
    })
}

fn source_text(from: &ColumnSource) -> String {
    match from {
        ColumnSource::Value(path) => format!("$.{}", path.join(".")),
        ColumnSource::Key => "key".into(),
        ColumnSource::Header(name) => format!("header {name}"),
        ColumnSource::Timestamp => "Kafka timestamp".into(),
        ColumnSource::Topic => "topic".into(),
    }
}
