//! What stands between the pipelines and the person at the terminal.

pub mod stop;
pub mod training;
