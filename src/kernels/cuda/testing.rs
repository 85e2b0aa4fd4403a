//! What tests of kernels run on: the emulated machine in two orders of threads, and a GPU where there is one.

use super::emulator::{Emulator, Order};
use super::machine::Machine;
use std::sync::Arc;

/// A machine that is there.
#[derive(Clone, Debug)]
pub(crate) struct Tested {
    /// What messages call it.
    pub(crate) name: &'static str,
    /// Whether bits are the same in all batches: not where cuBLAS chooses kernels by their shape.
    pub(crate) is_invariant: bool,
    pub(crate) machine: Arc<dyn Machine>,
}

/// All machines that are there. Says which are not.
pub(crate) fn machines() -> Vec<Tested> {
    let orders = [("emulated", Order::Ascending), ("emulated backwards", Order::Descending)];
    let mut found = Vec::new();
    for (name, order) in orders {
        match Emulator::new(order) {
            Ok(machine) => {
                found.push(Tested { name, is_invariant: true, machine: Arc::new(machine) });
            }
            Err(reason) => skipped(name, &reason),
        }
    }
    match gpu() {
        Ok(machine) => found.push(Tested { name: "GPU", is_invariant: false, machine }),
        Err(reason) => skipped("GPU", &reason),
    }
    found
}

/// The GPU, which all tests share: kernels are compiled once.
fn gpu() -> Result<Arc<dyn Machine>, String> {
    static GPU: std::sync::OnceLock<Result<Arc<dyn Machine>, String>> = std::sync::OnceLock::new();
    let find = || {
        let device = crate::model::device::device("cuda:0").map_err(|error| error.to_string())?;
        super::machine::machine(&device).map_err(|error| error.to_string())
    };
    GPU.get_or_init(find).clone()
}

#[cfg(test)]
fn skipped(machine: &str, reason: &str) {
    println!("skipped on {machine}: {reason}");
}
