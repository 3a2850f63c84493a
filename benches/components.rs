//! Component figures: one stage at a time, each beside a floor measured in the same run.
//!
//! `benches/run [decode | write | store] [--json]`. Ratios are the point: the stage and its floor are measured in turn, in
//! processor time, so that a shared machine slows both. None of these is a figure of the whole program.

#[path = "components/decode.rs"]
mod decode;
#[path = "components/events.rs"]
mod events;
#[path = "components/figure.rs"]
mod figure;
#[path = "components/store.rs"]
mod store;
#[path = "components/write.rs"]
mod write;

use figure::Figure;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let as_json = words.iter().any(|word| word == "--json");
    let name = words.iter().find(|word| !word.starts_with("--"));
    type Measure = fn() -> Vec<Figure>;
    let known: [(&str, Measure); 3] =
        [("decode", decode::decode), ("write", write::write), ("store", store::store)];
    if words.iter().any(|word| word == "--list") {
        known.iter().for_each(|(name, _)| println!("{name}"));
        return;
    }
    let chosen: Vec<_> = known.iter().filter(|(known, _)| name.is_none_or(|name| name == known)).collect();
    if chosen.is_empty() {
        eprintln!("no figure of this name; see benches/run --list");
        std::process::exit(2);
    }
    for (_, measure) in chosen {
        for figure in measure() {
            figure.print(as_json);
        }
    }
}
