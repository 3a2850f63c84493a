//! The queue of one topic partition, read event by event with the offset of its end-of-partition events.
//!
//! The safe binding's `PartitionQueue` drops that offset, and without it an end event can not be told from one at a
//! high watermark that stepped back after a change of leader (KIP-207): records up to the frozen end would be lost.
//!
//! Flow: librdkafka's fetcher -> [`PartitionQueue::peek`] -> look at [`PartitionQueue::record`] -> [`PartitionQueue::take`]
//! or [`PartitionQueue::drop_head`]. A record that is peeked and not taken stays at the head.
//!
//! Why the unsafe code is sound
//! 1. Each event pointer lies in exactly one [`Event`] guard, which destroys it once. A message pointer lies beside the
//!    event that owns it and is only reached through a borrow of that guard.
//! 2. Guards and queue are fields of [`PartitionQueue`], declared and so dropped before the `Arc` of the client.
//! 3. The wake-up callback's argument is the address of a [`Wake`] in an `Arc` that the queue holds; the callback is
//!    removed before that is dropped, under the same lock of librdkafka's queue that is held while it runs. It can
//!    not unwind: it locks ignoring poison and notifies.
//! 4. librdkafka's queues may be used from any thread, and one value is used by one thread at a time (`&mut self`).
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_void};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::bindings as native;
use rdkafka::consumer::{BaseConsumer, Consumer, ConsumerContext};
use rdkafka::error::RDKafkaErrorCode;

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

/// What stands at the head of a queue.
#[derive(Debug)]
pub(super) enum Head {
    /// Nothing yet.
    Empty,
    /// A record; [`PartitionQueue::record`] shows it.
    Record { offset: i64 },
    /// The fetcher stands at the end of what it may see. Already removed.
    End { offset: i64 },
    /// The fetcher failed. Already removed.
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

/// The events of one topic partition. See the head of this file; the order of fields matters.
pub(super) struct PartitionQueue<C: ConsumerContext> {
    head: Option<Event>,
    taken: Option<Event>,
    queue: NonNull<native::rd_kafka_queue_t>,
    /// Kept alive for the callback.
    _wake: Arc<Wake>,
    /// Kept alive for queue and events.
    _client: Arc<BaseConsumer<C>>,
}

// SAFETY: see (4) of the head of this file.
unsafe impl<C: ConsumerContext> Send for PartitionQueue<C> {}

impl<C: ConsumerContext> PartitionQueue<C> {
    /// Takes the topic partition's events out of the client's common queue. To be called before `assign`: librdkafka
    /// leaves a queue alone that the application has redirected.
    pub fn open(
        client: &Arc<BaseConsumer<C>>,
        topic: &str,
        partition: i32,
        wake: &Arc<Wake>,
    ) -> Option<Self> {
        let topic = CString::new(topic).ok()?;
        // SAFETY: the client is alive, the name is a C string; the queue is owned by the value that is returned,
        // which also keeps the callback's argument alive (3).
        let queue = unsafe {
            let native_client = client.client().native_ptr();
            let queue =
                NonNull::new(native::rd_kafka_queue_get_partition(native_client, topic.as_ptr(), partition))?;
            native::rd_kafka_queue_forward(queue.as_ptr(), ptr::null_mut());
            let argument = Arc::as_ptr(wake).cast_mut().cast::<c_void>();
            native::rd_kafka_queue_cb_event_enable(queue.as_ptr(), Some(on_event), argument);
            queue
        };
        Some(Self { head: None, taken: None, queue, _wake: Arc::clone(wake), _client: Arc::clone(client) })
    }

    /// Looks at the head of the queue without waiting.
    pub fn peek(&mut self) -> Head {
        if let Some(view) = self.record() {
            return Head::Record { offset: view.offset() };
        }
        loop {
            // SAFETY: the queue is alive.
            let Some(event) = NonNull::new(unsafe { native::rd_kafka_queue_poll(self.queue.as_ptr(), 0) })
            else {
                return Head::Empty;
            };
            // SAFETY: the event is alive and owned here until `take_event` hands it on or destroys it.
            match unsafe { self.take_event(event) } {
                Head::Empty => {}
                head => return head,
            }
        }
    }

    /// # Safety
    /// `event` must be live and owned by the caller, who gives it up.
    unsafe fn take_event(&mut self, event: NonNull<native::rd_kafka_event_t>) -> Head {
        // SAFETY: by this function's contract; everything read is copied before the event is destroyed.
        unsafe {
            match native::rd_kafka_event_type(event.as_ptr()) {
                native::RD_KAFKA_EVENT_FETCH => {
                    let message = native::rd_kafka_event_message_next(event.as_ptr()).cast_mut();
                    if let Some(message) = NonNull::new(message) {
                        let offset = message.as_ref().offset;
                        self.head = Some(Event { event, message });
                        return Head::Record { offset };
                    }
                    native::rd_kafka_event_destroy(event.as_ptr());
                    Head::Empty
                }
                native::RD_KAFKA_EVENT_ERROR => {
                    let head = error_head(event);
                    native::rd_kafka_event_destroy(event.as_ptr());
                    head
                }
                _ => {
                    native::rd_kafka_event_destroy(event.as_ptr());
                    Head::Empty
                }
            }
        }
    }

    /// The record at the head, if [`PartitionQueue::peek`] found one.
    pub fn record(&self) -> Option<RecordView<'_>> {
        // SAFETY: the message lives as long as its event, which is borrowed with `self` (1).
        self.head.as_ref().map(|event| RecordView { message: unsafe { event.message.as_ref() } })
    }

    /// Takes the record off the head and keeps it for [`PartitionQueue::taken`] until the next is taken.
    pub fn take(&mut self) {
        self.taken = self.head.take();
    }

    /// Drops the record at the head.
    pub fn drop_head(&mut self) {
        self.head = None;
    }

    /// The record taken last.
    pub fn taken(&self) -> Option<RecordView<'_>> {
        // SAFETY: as in `record`.
        self.taken.as_ref().map(|event| RecordView { message: unsafe { event.message.as_ref() } })
    }

    /// Forgets the record taken last: it would keep the whole fetched response in memory.
    pub fn forget_taken(&mut self) {
        self.taken = None;
    }
}

impl<C: ConsumerContext> Drop for PartitionQueue<C> {
    fn drop(&mut self) {
        self.head = None;
        self.taken = None;
        // SAFETY: the queue is alive, its callback is removed before it and `wake` are given up (2, 3).
        unsafe {
            native::rd_kafka_queue_cb_event_enable(self.queue.as_ptr(), None, ptr::null_mut());
            native::rd_kafka_queue_destroy(self.queue.as_ptr());
        }
    }
}

/// # Safety
/// `event` must be a live event of type error.
unsafe fn error_head(event: NonNull<native::rd_kafka_event_t>) -> Head {
    // SAFETY: by this function's contract; the topic partition is a copy that is freed here.
    unsafe {
        let code = native::rd_kafka_event_error(event.as_ptr());
        if code == native::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR__PARTITION_EOF {
            let place = native::rd_kafka_event_topic_partition(event.as_ptr());
            if place.is_null() {
                return Head::Empty;
            }
            let offset = (*place).offset;
            native::rd_kafka_topic_partition_destroy(place);
            return Head::End { offset };
        }
        let problem = native::rd_kafka_event_error_string(event.as_ptr());
        let problem = if problem.is_null() {
            String::new()
        } else {
            CStr::from_ptr(problem).to_string_lossy().into_owned()
        };
        Head::Failed { code: code.into(), problem }
    }
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
