//! Records as they came from Kafka, copied out of the client into one buffer.
//!
//! A chunk is what is read, decoded and judged at once. Bytes of keys, payloads and headers lie one after another in a
//! single allocation, so a chunk costs its bytes plus a fixed head per record and is freed at once.

use std::ops::Range;

/// Some records of the assigned topic partitions, each partition's in offset order.
#[derive(Debug, Default)]
pub struct RecordChunk {
    bytes: Vec<u8>,
    heads: Vec<RecordHead>,
    headers: Vec<HeaderHead>,
}

#[derive(Debug, Clone)]
struct RecordHead {
    slot: u32,
    offset: i64,
    timestamp_ms: Option<i64>,
    key: Option<Range<usize>>,
    payload: Option<Range<usize>>,
    headers: Range<usize>,
}

#[derive(Debug, Clone)]
struct HeaderHead {
    name: Range<usize>,
    value: Option<Range<usize>>,
}

/// One record, borrowed from its chunk.
#[derive(Debug, Clone, Copy)]
pub struct Record<'a> {
    chunk: &'a RecordChunk,
    head: &'a RecordHead,
}

/// What [`RecordChunk::push`] copies.
#[derive(Debug, Clone, Copy)]
pub struct RecordParts<'a> {
    /// Index of the topic partition in the run's assignment.
    pub slot: u32,
    /// Kafka offset.
    pub offset: i64,
    /// Kafka timestamp in ms since the epoch; `None` when the record carries none.
    pub timestamp_ms: Option<i64>,
    /// Message key; `None` is Kafka's null.
    pub key: Option<&'a [u8]>,
    /// Payload; `None` is a tombstone.
    pub payload: Option<&'a [u8]>,
}

impl RecordChunk {
    /// Copies one record in. Headers follow by [`RecordChunk::push_header`].
    pub fn push(&mut self, parts: RecordParts<'_>) {
        let key = parts.key.map(|bytes| self.copy(bytes));
        let payload = parts.payload.map(|bytes| self.copy(bytes));
        self.heads.push(RecordHead {
            slot: parts.slot,
            offset: parts.offset,
            timestamp_ms: parts.timestamp_ms,
            key,
            payload,
            headers: self.headers.len()..self.headers.len(),
        });
    }

    /// Adds a header to the record pushed last.
    pub fn push_header(&mut self, name: &str, value: Option<&[u8]>) {
        let name = self.copy(name.as_bytes());
        let value = value.map(|bytes| self.copy(bytes));
        self.headers.push(HeaderHead { name, value });
        let end = self.headers.len();
        self.heads.last_mut().expect("a header follows its record").headers.end = end;
    }

    fn copy(&mut self, bytes: &[u8]) -> Range<usize> {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        start..self.bytes.len()
    }

    /// Number of records.
    pub fn len(&self) -> usize {
        self.heads.len()
    }

    /// Whether there is no record.
    pub fn is_empty(&self) -> bool {
        self.heads.is_empty()
    }

    /// Bytes of keys, payloads and headers.
    pub fn payload_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Forgets the records and keeps the allocation.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.heads.clear();
        self.headers.clear();
    }

    /// Forgets the records that are not to be kept; gives their number. Their bytes are freed with the chunk.
    pub fn retain(&mut self, keep: impl FnMut(Record<'_>) -> bool) -> usize {
        let before = self.heads.len();
        let kept: Vec<bool> = self.iter().map(keep).collect();
        let mut kept = kept.iter();
        self.heads.retain(|_| *kept.next().expect("one answer for each record"));
        before - self.heads.len()
    }

    /// The record at `index` in the order they were pushed. `index` is less than [`RecordChunk::len`].
    pub fn get(&self, index: usize) -> Record<'_> {
        Record { chunk: self, head: &self.heads[index] }
    }

    /// The records in the order they were pushed.
    pub fn iter(&self) -> impl Iterator<Item = Record<'_>> {
        self.heads.iter().map(move |head| Record { chunk: self, head })
    }
}

impl<'a> Record<'a> {
    /// Index of the topic partition in the run's assignment.
    pub fn slot(&self) -> u32 {
        self.head.slot
    }

    /// Kafka offset.
    pub fn offset(&self) -> i64 {
        self.head.offset
    }

    /// Kafka timestamp in ms since the epoch.
    pub fn timestamp_ms(&self) -> Option<i64> {
        self.head.timestamp_ms
    }

    /// Message key.
    pub fn key(&self) -> Option<&'a [u8]> {
        self.head.key.clone().map(|range| &self.chunk.bytes[range])
    }

    /// Payload; `None` is a tombstone.
    pub fn payload(&self) -> Option<&'a [u8]> {
        self.head.payload.clone().map(|range| &self.chunk.bytes[range])
    }

    /// Headers in their order; a name may stand more than once.
    pub fn headers(&self) -> impl Iterator<Item = (&'a [u8], Option<&'a [u8]>)> {
        let chunk = self.chunk;
        chunk.headers[self.head.headers.clone()].iter().map(move |header| {
            (&chunk.bytes[header.name.clone()], header.value.clone().map(|range| &chunk.bytes[range]))
        })
    }
}
