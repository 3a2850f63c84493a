//! Arguments in, exit code out, the error chain printed once.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidemill::allocator::give_back_large_buffers();
    tidemill::cli::main()
}
