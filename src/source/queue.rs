//! The queue of all topic partitions of a client, read event by event with the offset of their end-of-partition events.
//!
//! The safe binding's queues drop that offset, and without it an end event can not be told from one at a high watermark
//! that stepped back after a change of leader (KIP-207): records up to the frozen end would be lost.
//!
//! Flow: librdkafka's fetcher -> [`EventQueue::next`] names the slot of the event at the head -> look at
//! [`EventQueue::head`], [`EventQueue::record`] -> [`EventQueue::take`] or [`EventQueue::drop_head`]; or
//! [`EventQueue::keep`], until [`EventQueue::put_back`]. What is not taken stays at the head.
//!
//! One queue, because librdkafka's limits are the queue's, and are looked at before each request of each topic partition:
//! with a queue for each, hundreds of them would each take a part of one more response. Events of one topic partition stand
//! in the order in which the fetcher made them, as they would in a queue of its own.
//!
//! Why the unsafe code is sound
//! 1. Each event pointer lies in exactly one [`Event`] guard, which destroys it once. A message pointer lies beside the
//!    event that owns it and is only reached through a borrow of that guard.
//! 2. Guards and queues are fields of [`EventQueue`], declared and so dropped before the `Arc` of the client.
//! 3. The wake-up callback's argument is the address of a [`Wake`] in an `Arc` that the queue holds; the callback is
//!    removed before that is dropped, under the same lock of librdkafka's queue that is held while it runs. It can
//!    not unwind: it locks ignoring poison and notifies.
//! 4. librdkafka's queues may be used from any thread, and one value is used by one thread at a time (`&mut self`).
#![allow(unsafe_code)]

use std::collections::{HashMap, VecDeque};
use std::ffi::{CStr, CString, c_void};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::bindings as native;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::RDKafkaErrorCode;

use crate::offset::TopicPartition;
use crate::source::error::SourceError;

/// Wakes the reader when an empty queue got its first event.
#[derive(Debug, Default)]
pub(super) struct Wake {
    woken: Mutex<bool>,
    condition: Condvar,
}

impl Wake {
    fn notify(&self) {
        *self.woken.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.condition.notify_one();
    }

    /// Waits until some queue got an event since the last wait, or `longest` has passed.
    pub fn wait(&self, longest: Duration) {
        let woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.condition.wait_timeout_while(woken, longest, |woken| !*woken);
        let (mut woken, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *woken = false;
    }
}

/// What stands at the head of the queue.
#[derive(Debug)]
pub(super) enum Head {
    /// A record; [`EventQueue::record`] shows it.
    Record { offset: i64 },
    /// The fetcher stands at the end of what it may see.
    End { offset: i64 },
    /// The fetcher failed.
    Failed { code: RDKafkaErrorCode, problem: String },
}

struct Event {
    event: NonNull<native::rd_kafka_event_t>,
    message: NonNull<native::rd_kafka_message_t>,
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: came from `rd_kafka_queue_poll`, owned by this guard (1).
        unsafe { native::rd_kafka_event_destroy(self.event.as_ptr()) }
    }
}

/// An event and the slot of its topic partition.
struct Arrival {
    slot: usize,
    head: Head,
    /// Of a record only.
    event: Option<Event>,
}

impl Arrival {
    fn bytes(&self) -> u64 {
        self.event.as_ref().map_or(0, |event| {
            // SAFETY: the message lives as long as its event, which is borrowed with `self` (1).
            let message = unsafe { event.message.as_ref() };
            (message.len + message.key_len) as u64
        })
    }
}

/// What [`EventQueue::keep`] has kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Kept {
    /// Number of events.
    pub events: u64,
    /// Bytes of their keys and payloads.
    pub bytes: u64,
}

/// The queue of one topic partition, whose events go to the queue of all.
struct Source(NonNull<native::rd_kafka_queue_t>);

impl Drop for Source {
    fn drop(&mut self) {
        // SAFETY: came from `rd_kafka_queue_get_partition`, owned by this guard.
        unsafe { native::rd_kafka_queue_destroy(self.0.as_ptr()) }
    }
}

/// The events of all topic partitions that a client reads. See the head of this file; the order of fields matters.
pub(super) struct EventQueue<C: ConsumerContext> {
    head: Option<Arrival>,
    /// Before the head, in order: what was kept.
    kept: VecDeque<Arrival>,
    kept_size: Kept,
    /// Behind the head and before what comes out of librdkafka, in order.
    put_back: VecDeque<Arrival>,
    /// The record taken last, by slot.
    taken: Vec<Option<Event>>,
    /// Slots by librdkafka's topic, which lives as long as the client reads it, and number of the topic partition.
    routes: HashMap<(usize, i32), usize>,
    /// The one of the last record: the next is most often of the same.
    last_route: ((usize, i32), usize),
    slots: HashMap<TopicPartition, usize>,
    _sources: Vec<Source>,
    queue: NonNull<native::rd_kafka_queue_t>,
    /// Kept alive for the callback.
    _wake: Arc<Wake>,
    /// Kept alive for queues and events.
    _client: Arc<BaseConsumer<C>>,
}

// SAFETY: see (4) of the head of this file.
unsafe impl<C: ConsumerContext> Send for EventQueue<C> {}

impl<C: ConsumerContext> EventQueue<C> {
    /// Takes the events of these topic partitions, by slot, out of the client's common queue. To be called before `assign`:
    /// librdkafka leaves queues alone that the application has redirected. `None` if one of them has no queue.
    pub fn open<'a>(
        client: &Arc<BaseConsumer<C>>,
        slots: impl Iterator<Item = (usize, &'a TopicPartition)>,
        wake: &Arc<Wake>,
    ) -> Option<Self> {
        // SAFETY: the client is alive; the queue is owned by the value made here, which also keeps the callback's argument
        // alive (3).
        let queue = unsafe {
            let queue = NonNull::new(native::rd_kafka_queue_new(client.client().native_ptr()))?;
            let argument = Arc::as_ptr(wake).cast_mut().cast::<c_void>();
            native::rd_kafka_queue_cb_event_enable(queue.as_ptr(), Some(on_event), argument);
            queue
        };
        let mut events = Self {
            head: None,
            kept: VecDeque::new(),
            kept_size: Kept::default(),
            put_back: VecDeque::new(),
            taken: Vec::new(),
            routes: HashMap::new(),
            last_route: ((0, -1), 0),
            slots: HashMap::new(),
            _sources: Vec::new(),
            queue,
            _wake: Arc::clone(wake),
            _client: Arc::clone(client),
        };
        for (slot, topic_partition) in slots {
            let topic = CString::new(topic_partition.topic.as_str()).ok()?;
            // SAFETY: the client is alive, the name is a C string, and both queues are; the one that is made is owned by its
            // guard.
            let source = unsafe {
                let (client, partition) = (client.client().native_ptr(), topic_partition.partition);
                let source = native::rd_kafka_queue_get_partition(client, topic.as_ptr(), partition);
                let source = Source(NonNull::new(source)?);
                native::rd_kafka_queue_forward(source.0.as_ptr(), queue.as_ptr());
                source
            };
            events._sources.push(source);
            events.slots.insert(topic_partition.clone(), slot);
            events.taken.resize_with(events.taken.len().max(slot + 1), || None);
        }
        Some(events)
    }

    /// The slot of the event at the head, without waiting; `None` = nothing has arrived.
    ///
    /// # Errors
    /// [`SourceError::Client`] for an event of a topic partition that is not read here: it would be a gap elsewhere.
    pub fn next(&mut self) -> Result<Option<usize>, SourceError> {
        if self.head.is_none() {
            self.head = self.put_back.pop_front();
        }
        while self.head.is_none() {
            // SAFETY: the queue is alive.
            let Some(event) = NonNull::new(unsafe { native::rd_kafka_queue_poll(self.queue.as_ptr(), 0) })
            else {
                return Ok(None);
            };
            // SAFETY: the event is alive and owned here until `arrived` hands it on or destroys it.
            self.head = unsafe { self.arrived(event)? };
        }
        Ok(self.head.as_ref().map(|arrival| arrival.slot))
    }

    /// # Safety
    /// `event` must be live and owned by the caller, who gives it up.
    unsafe fn arrived(
        &mut self,
        event: NonNull<native::rd_kafka_event_t>,
    ) -> Result<Option<Arrival>, SourceError> {
        // SAFETY: by this function's contract; what is not handed on is destroyed after everything read was copied.
        unsafe {
            let kind = native::rd_kafka_event_type(event.as_ptr());
            if kind == native::RD_KAFKA_EVENT_FETCH {
                let message = native::rd_kafka_event_message_next(event.as_ptr()).cast_mut();
                if let Some(message) = NonNull::new(message) {
                    let event = Event { event, message };
                    let slot = self.slot_of(message.as_ref())?;
                    let head = Head::Record { offset: message.as_ref().offset };
                    return Ok(Some(Arrival { slot, head, event: Some(event) }));
                }
            }
            let fault = (kind == native::RD_KAFKA_EVENT_ERROR).then(|| self.fault(event));
            native::rd_kafka_event_destroy(event.as_ptr());
            fault.transpose()
        }
    }

    /// The slot of a record. Its topic's name is looked at once for each topic partition.
    ///
    /// # Safety
    /// `message` must be that of a live event.
    unsafe fn slot_of(&mut self, message: &native::rd_kafka_message_t) -> Result<usize, SourceError> {
        let route = (message.rkt as usize, message.partition);
        if self.last_route.0 == route {
            return Ok(self.last_route.1);
        }
        let slot = match self.routes.get(&route) {
            Some(&slot) => slot,
            None => {
                // SAFETY: by this function's contract the topic is alive, and so is its name.
                let topic = unsafe { CStr::from_ptr(native::rd_kafka_topic_name(message.rkt)) };
                self.slot_named(topic, message.partition)?
            }
        };
        self.routes.insert(route, slot);
        self.last_route = (route, slot);
        Ok(slot)
    }

    fn slot_named(&self, topic: &CStr, partition: i32) -> Result<usize, SourceError> {
        let name = TopicPartition::new(topic.to_string_lossy(), partition);
        self.slots.get(&name).copied().ok_or_else(|| {
            let problem = format!("something of {name} came, which is not read");
            SourceError::Client { doing: "reading", problem }
        })
    }

    /// # Safety
    /// `event` must be a live event of type error.
    unsafe fn fault(&self, event: NonNull<native::rd_kafka_event_t>) -> Result<Arrival, SourceError> {
        // SAFETY: by this function's contract; the topic partition is a copy that is freed here.
        unsafe {
            let code = native::rd_kafka_event_error(event.as_ptr());
            let place = native::rd_kafka_event_topic_partition(event.as_ptr());
            if place.is_null() {
                let problem = format!("an error of no topic partition came: {}", error_text(event));
                return Err(SourceError::Client { doing: "reading", problem });
            }
            let offset = (*place).offset;
            let slot = self.slot_named(CStr::from_ptr((*place).topic), (*place).partition);
            native::rd_kafka_topic_partition_destroy(place);
            let head = if code == native::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR__PARTITION_EOF {
                Head::End { offset }
            } else {
                Head::Failed { code: code.into(), problem: error_text(event) }
            };
            Ok(Arrival { slot: slot?, head, event: None })
        }
    }

    /// What [`EventQueue::next`] found.
    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref().map(|arrival| &arrival.head)
    }

    /// The record at the head, if it is one.
    pub fn record(&self) -> Option<RecordView<'_>> {
        self.head.as_ref().and_then(|arrival| arrival.event.as_ref()).map(view)
    }

    /// Takes the record off the head and keeps it for [`EventQueue::taken`] until the next of its slot is taken.
    pub fn take(&mut self) {
        if let Some(arrival) = self.head.take() {
            self.taken[arrival.slot] = arrival.event;
        }
    }

    /// Drops what stands at the head, and gives it.
    pub fn drop_head(&mut self) -> Option<Head> {
        self.head.take().map(|arrival| arrival.head)
    }

    /// Lays what stands at the head aside, behind what was kept before.
    pub fn keep(&mut self) -> Kept {
        if let Some(arrival) = self.head.take() {
            self.kept_size.events += 1;
            self.kept_size.bytes += arrival.bytes();
            self.kept.push_back(arrival);
        }
        self.kept_size
    }

    /// Drops what was kept.
    pub fn drop_kept(&mut self) {
        self.kept.clear();
        self.kept_size = Kept::default();
    }

    /// Puts what was kept before everything else again.
    pub fn put_back(&mut self) {
        self.kept.extend(self.head.take());
        self.kept.append(&mut self.put_back);
        std::mem::swap(&mut self.kept, &mut self.put_back);
        self.kept_size = Kept::default();
    }

    /// The record of a slot that was taken last.
    pub fn taken(&self, slot: usize) -> Option<RecordView<'_>> {
        self.taken.get(slot)?.as_ref().map(view)
    }

    /// Forgets the record of a slot that was taken last: it would keep its whole record batch in memory.
    pub fn forget_taken(&mut self, slot: usize) {
        if let Some(taken) = self.taken.get_mut(slot) {
            *taken = None;
        }
    }
}

impl<C: ConsumerContext> Drop for EventQueue<C> {
    fn drop(&mut self) {
        self.head = None;
        self.kept.clear();
        self.put_back.clear();
        self.taken.clear();
        // SAFETY: the queue is alive, its callback is removed before it and `wake` are given up (2, 3).
        unsafe {
            native::rd_kafka_queue_cb_event_enable(self.queue.as_ptr(), None, ptr::null_mut());
            native::rd_kafka_queue_destroy(self.queue.as_ptr());
        }
    }
}

/// # Safety
/// `event` must be a live event of type error.
unsafe fn error_text(event: NonNull<native::rd_kafka_event_t>) -> String {
    // SAFETY: by this function's contract; the text is copied.
    unsafe {
        let text = native::rd_kafka_event_error_string(event.as_ptr());
        if text.is_null() { String::new() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    }
}

fn view(event: &Event) -> RecordView<'_> {
    // SAFETY: the message lives as long as its event, which is borrowed (1).
    RecordView { message: unsafe { event.message.as_ref() } }
}

unsafe extern "C" fn on_event(_client: *mut native::rd_kafka_t, argument: *mut c_void) {
    // SAFETY: the argument is the address of a `Wake` that outlives the callback (3).
    unsafe { (*argument.cast::<Wake>()).notify() }
}

/// A record in the client's memory.
#[derive(Clone, Copy)]
pub(super) struct RecordView<'a> {
    message: &'a native::rd_kafka_message_t,
}

impl<'a> RecordView<'a> {
    pub fn offset(self) -> i64 {
        self.message.offset
    }

    pub fn key(self) -> Option<&'a [u8]> {
        // SAFETY: librdkafka gives pointer and length of the key of a live message; null is Kafka's null.
        unsafe { bytes(self.message.key, self.message.key_len) }
    }

    pub fn payload(self) -> Option<&'a [u8]> {
        // SAFETY: as in `key`.
        unsafe { bytes(self.message.payload, self.message.len) }
    }

    /// Milliseconds since the epoch; `None` where the record carries none.
    pub fn timestamp_ms(self) -> Option<i64> {
        let mut kind = native::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE;
        // SAFETY: the message is alive and `kind` is written before it is read.
        let timestamp_ms = unsafe { native::rd_kafka_message_timestamp(self.message, &mut kind) };
        let absent = kind == native::rd_kafka_timestamp_type_t::RD_KAFKA_TIMESTAMP_NOT_AVAILABLE;
        (!absent && timestamp_ms >= 0).then_some(timestamp_ms)
    }

    /// Calls `each` with the name and value of every header, in order.
    pub fn for_each_header(self, mut each: impl FnMut(&str, Option<&[u8]>)) {
        let mut headers = ptr::null_mut();
        // SAFETY: the message is alive; the list belongs to it; name and value are used before the next call.
        unsafe {
            let none = native::rd_kafka_message_headers(self.message, &mut headers);
            if none != native::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR || headers.is_null() {
                return;
            }
            for index in 0.. {
                let (mut name, mut value, mut value_bytes) = (ptr::null(), ptr::null(), 0);
                let past =
                    native::rd_kafka_header_get_all(headers, index, &mut name, &mut value, &mut value_bytes);
                if past != native::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
                    return;
                }
                each(&CStr::from_ptr(name).to_string_lossy(), bytes(value.cast_mut(), value_bytes));
            }
        }
    }
}

/// # Safety
/// `start` must be null or the start of `length` readable bytes that live for `'a`.
unsafe fn bytes<'a>(start: *mut c_void, length: usize) -> Option<&'a [u8]> {
    // SAFETY: by this function's contract.
    NonNull::new(start.cast::<u8>())
        .map(|start| unsafe { std::slice::from_raw_parts(start.as_ptr(), length) })
}
