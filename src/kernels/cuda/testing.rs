//! What tests of kernels run on: the emulated machine in two orders of threads, and a GPU where there is one.

use super::emulator::{Emulator, Order};
use super::machine::Machine;
use candle_core::Device;
use std::cell::RefCell;
use std::sync::{Arc, OnceLock};

thread_local! {
    static STAND_IN: RefCell<Option<Arc<dyn Machine>>> = const { RefCell::new(None) };
}

/// A machine that is there.
#[derive(Clone, Debug)]
pub(crate) struct Tested {
    /// What messages call it.
    pub(crate) name: &'static str,
    /// Whether bits are the same in all batches: not where cuBLAS chooses kernels by their shape.
    pub(crate) is_invariant: bool,
    /// Where tensors are that its kernels take.
    pub(crate) device: Device,
    pub(crate) machine: Arc<dyn Machine>,
}

/// All machines that are there. Says which are not.
pub(crate) fn machines() -> Vec<Tested> {
    let orders = [("emulated", Order::Ascending), ("emulated backwards", Order::Descending)];
    let mut found = Vec::new();
    for (name, order) in orders {
        match Emulator::new(order) {
            Ok(machine) => {
                let (machine, device) = (Arc::new(machine), Device::Cpu);
                found.push(Tested { name, is_invariant: true, device, machine });
            }
            Err(reason) => skipped(name, &reason),
        }
    }
    match gpu() {
        Ok(gpu) => found.push(gpu),
        Err(reason) => skipped("GPU", &reason),
    }
    found
}

impl Tested {
    /// Calls `work`, during which training on tensors of this machine's device takes its kernels: those of the CPU
    /// are the emulation's then.
    pub(crate) fn trains<R>(&self, work: impl FnOnce() -> R) -> R {
        if self.device.is_cpu() {
            STAND_IN.set(Some(self.machine.clone()));
        }
        let result = work();
        STAND_IN.set(None);
        result
    }
}

/// The machine that training on tensors of the CPU takes, in this thread.
pub(crate) fn stand_in() -> Option<Arc<dyn Machine>> {
    STAND_IN.with_borrow(Clone::clone)
}

/// The GPU, which all tests share: kernels are compiled once.
fn gpu() -> Result<Tested, String> {
    static GPU: OnceLock<Result<Tested, String>> = OnceLock::new();
    let find = || {
        let device = crate::model::device::device("cuda:0").map_err(|error| error.to_string())?;
        let machine = super::machine::machine(&device).map_err(|error| error.to_string())?;
        Ok(Tested { name: "GPU", is_invariant: false, device, machine })
    };
    GPU.get_or_init(find).clone()
}

#[cfg(test)]
fn skipped(machine: &str, reason: &str) {
    println!("skipped on {machine}: {reason}");
}

/// Other tests pass where there is none.
#[test]
#[ignore = "there need not be a GPU"]
fn there_is_a_gpu() {
    gpu().unwrap();
}
