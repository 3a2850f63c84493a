//! The commit protocol, without input and output: what is asked of the world, in which order, and what each answer means.
//!
//! Flow of one life
//! ```text
//! lock -> heads -> admit (start table, lease) -> take (lock line, fence) -> sides -> state ->
//!     { cut -> data files -> generation -> main commit -> side tables -> publish -> sweep }* -> release
//! ```
//! Everything that touches the outside goes through [`Tables`], [`World`], [`StateHome`] and [`State`]: requests to the
//! catalog, looks at files, the lock file, generations of the dedup state, time and identities. What they return are the
//! inputs. The pipeline answers with a catalog, a folder and a clock; the simulator (tests) answers with fakes, so that
//! the code that ships is what it runs through every order of crashes, lost replies and foreign hands.
//!
//! Invariants
//! 1. Nothing here knows a catalog client, a file, a clock or a random number.
//! 2. A request is sent once, onto the very head that was judged: [`switch`].
//! 3. What is not known to have landed is looked up, never guessed, and nothing is deleted meanwhile (R7).
//! 4. Every await is a place where a process may die; what each leaves is said where it stands.

mod life;
mod owner;
mod side;
#[cfg(test)]
mod simulator;
pub mod start;
pub(crate) mod stops;
pub(crate) mod switch;
mod world;

pub(crate) use life::{
    Built, Cut, DedupFacts, Endless, GENERATIONS_KEPT, Life, Reached, State, StateHome, Turn, drain, follow,
    generation, name_generation, open_or_rebuild, open_state, reference,
};
pub(crate) use owner::{Fence, LostSide, Owner, admit, heads, lost_sides, side_record};
pub(crate) use world::{AllTables, Answer, Below, Heads, Request, Tables, Terms, World};
