//! The program, as the tests start it.

use std::process::ExitCode;

// The program's own, so that the memory it is measured to take is what users see.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    headwater_pipelines::program::run()
}
