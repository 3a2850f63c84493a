//! Deliberate faults: named crash points, and mutants that prove the tests can see a bug.
//!
//! Both exist only with the cargo feature `faults`. Without it [`crash_point!`](crate::crash_point) is nothing and
//! [`mutant!`](crate::mutant) is the expression that ships, so a release has no trace of them.
//!
//! Environment of a program built with the feature
//! ```text
//! TIDEMILL_CRASH_AT=NAME[:N]   SIGKILL to itself at the Nth hit of the point (1 when not said)
//! TIDEMILL_STOP_AT=NAME[:N]    SIGSTOP to itself there; SIGCONT lets it go on
//! TIDEMILL_POINTS=FILE         the name of every point is appended to FILE as it is hit
//! TIDEMILL_MUTANT=NAME         the mutant of this name is alive
//! ```

#[cfg(feature = "faults")]
mod live;

#[cfg(feature = "faults")]
pub use live::{alive, reach};

/// A place in the program where a test may end or stop it.
#[macro_export]
macro_rules! crash_point {
    ($name:expr) => {
        #[cfg(feature = "faults")]
        $crate::faults::reach($name);
    };
}

/// `mutant!("name", bug => ships)`: what ships, unless the mutant of this name is alive.
#[macro_export]
macro_rules! mutant {
    ($name:literal, $bug:expr => $ships:expr) => {{
        #[cfg(feature = "faults")]
        let value = if $crate::faults::alive($name) { $bug } else { $ships };
        #[cfg(not(feature = "faults"))]
        let value = $ships;
        value
    }};
}

#[cfg(test)]
mod tests;
