//! The program, as the tests start it.

use std::process::ExitCode;

fn main() -> ExitCode {
    headwater_pipelines::program::run()
}
