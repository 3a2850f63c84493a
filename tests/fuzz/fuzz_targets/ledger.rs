#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    tidemill::fuzz::ledger(bytes);
});
