//! Waiting for what another process or thread does: a condition is asked again and again, within a bound that only a test
//! that hangs reaches.

use std::thread;
use std::time::{Duration, Instant};

/// No condition of these tests takes so long.
pub(crate) const WAIT_MAX: Duration = Duration::from_secs(300);
/// Between two questions: nothing tells a test that a table, a process or a file changed.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// What the condition gives once it holds; `None` if it never did.
pub(crate) fn within<T>(mut condition: impl FnMut() -> Option<T>) -> Option<T> {
    let begun = Instant::now();
    loop {
        let held = condition();
        if held.is_some() || begun.elapsed() > WAIT_MAX {
            return held;
        }
        // The condition is asked again: nothing wakes who waits for it.
        thread::sleep(ASK_EVERY);
    }
}

/// Waits until the condition holds; panics with what stands instead if it never does.
#[track_caller]
pub(crate) fn until(mut holds: impl FnMut() -> bool, stands: impl FnOnce() -> String) {
    let held = within(|| holds().then_some(()));
    assert!(held.is_some(), "waited in vain: {}", stands());
}
