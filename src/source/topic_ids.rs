//! Topic ids (KIP-516), which the safe binding does not offer: one call of librdkafka's `DescribeTopics`.
//!
//! It sends a Metadata request, so permission to describe the topics is enough.
//!
//! Why the unsafe code is sound: every pointer from librdkafka is owned by exactly one of the guards below, which
//! frees it once, on every path; pointers read out of a result (names, ids, errors) are copied before the guard of
//! the event that owns them is dropped; the client outlives the call, because it is borrowed. The request copies
//! the names it is given (`rd_strdup` in `rd_kafka_DescribeTopics`), so they need to live only for the call. If the
//! wait ends before the answer, the queue guard frees the queue and librdkafka drops the late answer itself.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char};
use std::ptr::{self, NonNull};
use std::time::Duration;

use rdkafka::bindings as native;
use rdkafka::client::{Client, ClientContext};
use rdkafka::error::RDKafkaErrorCode;

use crate::offset::TopicId;

/// What a broker says about one topic.
#[derive(Debug)]
pub(super) struct TopicAnswer {
    /// The topic's name.
    pub topic: String,
    /// Its id (`None` where the broker has none) and number of partitions, or why there is no answer.
    pub facts: Result<(Option<TopicId>, i32), RDKafkaErrorCode>,
}

struct Queue(NonNull<native::rd_kafka_queue_t>);
struct Topics(NonNull<native::rd_kafka_TopicCollection_t>);
struct Options(NonNull<native::rd_kafka_AdminOptions_t>);
struct Event(NonNull<native::rd_kafka_event_t>);

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: created by `rd_kafka_queue_new`, owned by this guard.
        unsafe { native::rd_kafka_queue_destroy(self.0.as_ptr()) }
    }
}

impl Drop for Topics {
    fn drop(&mut self) {
        // SAFETY: created by `rd_kafka_TopicCollection_of_topic_names`, owned by this guard.
        unsafe { native::rd_kafka_TopicCollection_destroy(self.0.as_ptr()) }
    }
}

impl Drop for Options {
    fn drop(&mut self) {
        // SAFETY: created by `rd_kafka_AdminOptions_new`, owned by this guard.
        unsafe { native::rd_kafka_AdminOptions_destroy(self.0.as_ptr()) }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: came from `rd_kafka_queue_poll`, owned by this guard.
        unsafe { native::rd_kafka_event_destroy(self.0.as_ptr()) }
    }
}

/// Asks the broker `broker_id` for ids and partition counts. Blocks for at most `timeout`.
///
/// Any broker answers a Metadata request. Left alone, librdkafka would wait for the controller, which may be hidden
/// behind a proxy and which its own broker for tests does not have.
///
/// # Errors
/// The code with which the request as a whole failed; a topic's own failure stands in its answer.
pub(super) fn describe_topics<C: ClientContext>(
    client: &Client<C>,
    broker_id: i32,
    topics: &[String],
    timeout: Duration,
) -> Result<Vec<TopicAnswer>, RDKafkaErrorCode> {
    let names = topics
        .iter()
        .map(|topic| CString::new(topic.as_str()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| RDKafkaErrorCode::InvalidTopic)?;
    let mut pointers: Vec<*const c_char> = names.iter().map(|name| name.as_ptr()).collect();
    let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: the client is alive, `pointers` holds as many valid C strings as is said, and the guards own what is
    // created. See the head of this file.
    let event = unsafe {
        let owned = |problem| move || problem;
        let queue = NonNull::new(native::rd_kafka_queue_new(client.native_ptr())).map(Queue);
        let queue = queue.ok_or_else(owned(RDKafkaErrorCode::CriticalSystemResource))?;
        let collection =
            native::rd_kafka_TopicCollection_of_topic_names(pointers.as_mut_ptr(), pointers.len());
        let collection = NonNull::new(collection).map(Topics);
        let collection = collection.ok_or_else(owned(RDKafkaErrorCode::CriticalSystemResource))?;
        let api = native::rd_kafka_admin_op_t::RD_KAFKA_ADMIN_OP_DESCRIBETOPICS;
        let options = NonNull::new(native::rd_kafka_AdminOptions_new(client.native_ptr(), api)).map(Options);
        let options = options.ok_or_else(owned(RDKafkaErrorCode::CriticalSystemResource))?;
        let refused = native::rd_kafka_AdminOptions_set_request_timeout(
            options.0.as_ptr(),
            timeout_ms,
            ptr::null_mut(),
            0,
        );
        if refused != native::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Err(refused.into());
        }
        let refused =
            native::rd_kafka_AdminOptions_set_broker(options.0.as_ptr(), broker_id, ptr::null_mut(), 0);
        if refused != native::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Err(refused.into());
        }
        native::rd_kafka_DescribeTopics(
            client.native_ptr(),
            collection.0.as_ptr(),
            options.0.as_ptr(),
            queue.0.as_ptr(),
        );
        NonNull::new(native::rd_kafka_queue_poll(queue.0.as_ptr(), timeout_ms)).map(Event)
    };
    match event {
        Some(event) => answers(&event),
        None => Err(RDKafkaErrorCode::OperationTimedOut),
    }
}

fn answers(event: &Event) -> Result<Vec<TopicAnswer>, RDKafkaErrorCode> {
    // SAFETY: the event is alive for the whole function; all that is read from it is copied.
    unsafe {
        let failed = native::rd_kafka_event_error(event.0.as_ptr());
        if failed != native::rd_kafka_resp_err_t::RD_KAFKA_RESP_ERR_NO_ERROR {
            return Err(failed.into());
        }
        let result = native::rd_kafka_event_DescribeTopics_result(event.0.as_ptr());
        if result.is_null() {
            return Err(RDKafkaErrorCode::InvalidType);
        }
        let mut count = 0;
        let descriptions = native::rd_kafka_DescribeTopics_result_topics(result, &mut count);
        (0..count).map(|index| answer(*descriptions.add(index))).collect()
    }
}

/// # Safety
/// `description` must come from a live result of `DescribeTopics`.
unsafe fn answer(
    description: *const native::rd_kafka_TopicDescription_t,
) -> Result<TopicAnswer, RDKafkaErrorCode> {
    if description.is_null() {
        return Err(RDKafkaErrorCode::InvalidType);
    }
    // SAFETY: the pointer is valid by this function's contract; name and id are not null in a description.
    unsafe {
        let topic = CStr::from_ptr(native::rd_kafka_TopicDescription_name(description))
            .to_string_lossy()
            .into_owned();
        let error = native::rd_kafka_TopicDescription_error(description);
        if !error.is_null() {
            return Ok(TopicAnswer { topic, facts: Err(native::rd_kafka_error_code(error).into()) });
        }
        let mut partitions = 0;
        native::rd_kafka_TopicDescription_partitions(description, &mut partitions);
        let partitions = i32::try_from(partitions).map_err(|_| RDKafkaErrorCode::InvalidPartitions)?;
        let id = native::rd_kafka_TopicDescription_topic_id(description);
        let (high, low) = (
            native::rd_kafka_Uuid_most_significant_bits(id),
            native::rd_kafka_Uuid_least_significant_bits(id),
        );
        let id = uuid::Uuid::from_u64_pair(high.cast_unsigned(), low.cast_unsigned());
        Ok(TopicAnswer { topic, facts: Ok(((!id.is_nil()).then_some(TopicId(id)), partitions)) })
    }
}
