#![no_main]

use tidemill_fuzz as _;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    tidemill::fuzz::table_metadata(bytes);
});
