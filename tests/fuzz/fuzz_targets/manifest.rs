#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    tidemill::dedup::fuzz::manifest(bytes);
});
