//! Reads at queue depth through io_uring: the one file of the dedup state with unsafe code.
//!
//! Why it is sound
//! 1. The kernel writes into a slot's buffer only between the submission of its read and its completion. In that time
//!    the slot is neither free nor done, so no reference to its buffer exists: [`Ring::bytes`] asserts "done", and
//!    [`Ring::start`] takes free slots only.
//! 2. A buffer is a heap allocation that is never resized, so its address holds while the ring lives. The length given to
//!    the kernel is at most the buffer's.
//! 3. A slot keeps its file open until the completion came.
//! 4. Drop waits for every completion before buffers are freed; should the kernel refuse to wait, they are leaked.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, opcode, types};

use super::reads::Buffer;

#[derive(Debug)]
enum State {
    Free,
    /// The file stays open until the read ends.
    InFlight {
        _file: Arc<File>,
    },
    Done,
}

#[derive(Debug)]
struct Slot {
    buffer: Buffer,
    state: State,
}

/// A submission queue with a buffer for each read in flight.
pub(super) struct Ring {
    ring: IoUring,
    slots: Vec<Slot>,
    in_flight: usize,
}

/// A read that ended: how many bytes came, or the error of the system.
pub(super) struct Ended {
    pub(super) slot: usize,
    pub(super) result: io::Result<usize>,
}

impl Ring {
    /// A ring of `depth` slots of `buffer_bytes` each.
    ///
    /// # Errors
    /// The kernel has no io_uring, or does not grant it.
    pub(super) fn new(depth: usize, buffer_bytes: usize) -> io::Result<Self> {
        let ring = IoUring::new(u32::try_from(depth).unwrap_or(u32::MAX).next_power_of_two())?;
        let slots =
            (0..depth).map(|_| Slot { buffer: Buffer::new(buffer_bytes), state: State::Free }).collect();
        Ok(Self { ring, slots, in_flight: 0 })
    }

    /// Begins to read `bytes` bytes from `position` on into a free slot.
    ///
    /// # Panics
    /// If the slot is not free or its buffer is smaller.
    pub(super) fn start(
        &mut self,
        slot: usize,
        file: &Arc<File>,
        position: u64,
        bytes: usize,
    ) -> io::Result<()> {
        let of_slot = &mut self.slots[slot];
        assert!(matches!(of_slot.state, State::Free), "a read begins in a free slot");
        let buffer = of_slot.buffer.bytes_mut();
        assert!(bytes <= buffer.len(), "a read is no larger than its buffer");
        let length = u32::try_from(bytes).expect("a buffer is smaller than 4 GiB");
        let read = opcode::Read::new(types::Fd(file.as_raw_fd()), buffer.as_mut_ptr(), length)
            .offset(position)
            .build()
            .user_data(slot as u64);
        // SAFETY: points 1 to 4 of the module head: buffer and file outlive the read, and nobody looks at the buffer.
        let pushed = unsafe { self.ring.submission().push(&read) };
        pushed.map_err(|_| io::Error::other("the submission queue is full"))?;
        of_slot.state = State::InFlight { _file: file.clone() };
        self.in_flight += 1;
        Ok(())
    }

    /// Waits until a read ends.
    ///
    /// # Panics
    /// If none is in flight.
    pub(super) fn wait(&mut self) -> io::Result<Ended> {
        assert!(self.in_flight > 0, "a read is in flight when one is waited for");
        loop {
            // What was queued meanwhile is submitted even if an earlier read ended already, to keep the device busy.
            if !self.ring.submission().is_empty() {
                uninterrupted(self.ring.submit())?;
            }
            if let Some(entry) = self.ring.completion().next() {
                let slot = entry.user_data() as usize;
                self.slots[slot].state = State::Done;
                self.in_flight -= 1;
                let result = usize::try_from(entry.result())
                    .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
                return Ok(Ended { slot, result });
            }
            uninterrupted(self.ring.submit_and_wait(1))?;
        }
    }

    /// The buffer of a read that ended.
    ///
    /// # Panics
    /// If the slot's read did not end.
    pub(super) fn bytes_mut(&mut self, slot: usize) -> &mut [u8] {
        assert!(matches!(self.slots[slot].state, State::Done), "a buffer is looked at after its read ended");
        self.slots[slot].buffer.bytes_mut()
    }

    /// As [`Ring::bytes_mut`], to look at.
    pub(super) fn bytes(&self, slot: usize) -> &[u8] {
        assert!(matches!(self.slots[slot].state, State::Done), "a buffer is looked at after its read ended");
        self.slots[slot].buffer.bytes()
    }

    /// Gives a slot back.
    pub(super) fn release(&mut self, slot: usize) {
        assert!(
            !matches!(self.slots[slot].state, State::InFlight { .. }),
            "a slot in flight is not given back"
        );
        self.slots[slot].state = State::Free;
    }
}

/// A signal that came in between is no error: the caller asks again.
fn uninterrupted(result: io::Result<usize>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            if self.wait().is_err() {
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.debug_struct("Ring")
            .field("slots", &self.slots.len())
            .field("in_flight", &self.in_flight)
            .finish()
    }
}
