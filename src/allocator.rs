//! How the C library gives memory back.
//!
//! glibc serves large buffers by mappings of their own, which go back to the system when they are freed, but each that is
//! freed raises the bound above which it does so, up to 32 MiB. After a few chunks their buffers come from heaps,
//! one for each thread that ever allocated, and the holes between them stay: on two cores a drain under `memory = 256 MiB`
//! peaked at 195 to 223 MiB over two million events, with a fixed bound at 150, for 8 % more processor time (174 MiB over ten
//! million).
//!
//! Why the unsafe code is sound: `mallopt` changes two numbers inside the allocator, under its lock.

#![allow(unsafe_code)]

/// Buffers from this size on are mappings of their own, for good.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES_MIN: i32 = 1 << 20;

/// Fixes the bound above which freed memory goes back to the system. To be called before threads are started; a no-op where
/// the C library is not glibc.
pub fn give_back_large_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: see the module's head. A refusal changes nothing, and what it would have changed is no matter of exactness.
    let _accepted = unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES_MIN) };
}
