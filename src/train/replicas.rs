//! One model on several devices: each has all of it, and learns from a part of every step.
//!
//! ```text
//! micro-batches 0, 2, … ─▶ replica 0: gradients ─┐       ┌─▶ norm, clip, AdamW
//!                                                  ├─ sum ─┤
//! micro-batches 1, 3, … ─▶ replica 1: gradients ─┘       └─▶ norm, clip, AdamW
//! ```
//!
//! Each replica has a thread of its own while it computes. Sums begin once all threads are back, and are asked for
//! by one thread for all devices: a replica that fails leaves no other one waiting.

use super::buckets::{self, Buckets};
use super::learner::Learner;
use super::optimizer::{AdamW, Parameters};
use crate::error::{Context, Error, Result};
use crate::kernels::all_reduce::{AllReduce, HostSum, nccl};
use crate::kernels::matmul::Into;
use crate::model::backward::{Batch, Gradients, Learning};
use crate::model::config::ModelConfig;
use candle_core::{DType, Device, Tensor};
use std::iter::{once, repeat};

/// Devices that train one model, and what adds up over them.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) devices: Vec<Device>,
    pub(super) sums: Box<dyn AllReduce>,
}

impl Group {
    /// One device of any kind, or several GPUs.
    ///
    /// # Errors
    /// If there is none, or NCCL cannot be used for several.
    pub(super) fn new(devices: &[Device]) -> Result<Self> {
        let sums: Box<dyn AllReduce> = match devices {
            [] => return Err(Error::Setting("a model is trained on one device at least".into())),
            [_] => Box::new(HostSum), // there is nothing to add up
            several => nccl(several).context("several GPUs")?,
        };
        Ok(Group { devices: devices.to_vec(), sums })
    }
}

/// A model in training on one device.
#[derive(Debug)]
pub(super) struct Replica {
    pub(super) parameters: Parameters,
    learner: Learner,
    gradients: Gradients,
}

impl Replica {
    fn new(
        config: &ModelConfig,
        values: Vec<(String, Tensor)>,
        compute: DType,
        device: &Device,
    ) -> Result<Self> {
        let mut parameters = Parameters::new(values)?;
        let learner = Learner::new(config, &mut parameters, compute, device)?;
        let gradients = learner.gradients(config)?;
        Ok(Replica { parameters, learner, gradients })
    }
}

/// The same model in training on each device of a group.
#[derive(Debug)]
pub(super) struct Replicas {
    /// By rank.
    pub(super) all: Vec<Replica>,
    group: Group,
    /// Names and shapes of the parameters, in the order of names.
    layout: Vec<(String, Vec<usize>)>,
    /// None where there is one replica.
    buckets: Option<Buckets>,
}

/// Whatever has the losses of a micro-batch computed, the first one of a replica to be set and the others to be added.
type Work<'a> = dyn Fn(&mut Replica, &Batch, Into) -> candle_core::Result<Vec<f64>> + Sync + 'a;

impl Replicas {
    /// Replicas with given parameters, that compute in `compute`.
    ///
    /// # Errors
    /// If `values` lacks a parameter of `config`, or a device fails or does not compute in that type.
    pub(super) fn new(
        config: &ModelConfig,
        values: Vec<(String, Tensor)>,
        compute: DType,
        group: Group,
    ) -> Result<Self> {
        let copied = |device: &Device| -> Result<Replica> {
            let copy = |(name, value): &(String, Tensor)| Ok((name.clone(), on(value, device)?));
            let values = values.iter().map(copy).collect::<Result<Vec<_>>>()?;
            Replica::new(config, values, compute, device)
        };
        let others = group.devices[1..].iter().map(copied).collect::<Result<Vec<_>>>()?;
        let mut all = vec![Replica::new(config, values, compute, &group.devices[0])?];
        all.extend(others);
        let mut layout = config.parameters();
        layout.sort();
        let lengths: Vec<usize> = layout.iter().map(|(_, shape)| shape.iter().product()).collect();
        let buckets = match all.len() {
            1 => None,
            _ => Some(Buckets::new(&lengths, buckets::BYTES, &group.devices)?),
        };
        Ok(Replicas { all, group, layout, buckets })
    }

    /// The first of them, which all others are equal to.
    pub(super) fn first(&self) -> &Replica {
        &self.all[0]
    }

    /// Where they are, by rank.
    pub(super) fn devices(&self) -> &[Device] {
        &self.group.devices
    }

    /// The losses of each of `batches`; the gradient of the objective over all of them is then in every
    /// replica.
    ///
    /// # Errors
    /// If a device fails.
    pub(super) fn learn(&mut self, batches: &[Batch], learning: Learning) -> Result<Vec<Vec<f64>>> {
        for idle in self.all.iter_mut().skip(batches.len()) {
            idle.learner.clear(&mut idle.gradients)?;
        }
        let losses = self.deal(batches, "training step", &|replica, batch, sums| {
            replica.learner.learn(batch, learning, (&mut replica.gradients, sums))
        })?;
        let Some(buckets) = &self.buckets else { return Ok(losses) };
        let flat = |(replica, device): (&mut Replica, &Device)| {
            replica.gradients.flat(&self.layout, device)
        };
        let gradients = self.all.iter_mut().zip(&self.group.devices).map(flat);
        let gradients = gradients.collect::<candle_core::Result<Vec<_>>>()?;
        buckets.sum(&gradients, &*self.group.sums).context("the sum of gradients over devices")?;
        Ok(losses)
    }

    /// The losses of each of `batches`, without learning from them.
    ///
    /// # Errors
    /// If a device fails.
    pub(super) fn losses(&mut self, batches: &[Batch]) -> Result<Vec<Vec<f64>>> {
        self.deal(batches, "evaluation", &|replica, batch, _| replica.learner.losses(batch))
    }

    /// The norm of the gradients, as every replica finds it.
    ///
    /// # Errors
    /// If a device fails, or one has found another norm: then it has other gradients.
    pub(super) fn norm(&mut self) -> Result<f64> {
        let norms = self.on_each(|_, Replica { learner, gradients, .. }| {
            let gradients = &*gradients;
            Ok(learner.run(|| gradients.norm())?)
        })?;
        let is_first = |norm: &f64| norm.to_bits() == norms[0].to_bits() || norms[0].is_nan();
        if norms.iter().all(is_first) {
            return Ok(norms[0]);
        }
        Err(Error::Stopped(format!(
            "the devices have other gradients than each other, though all have the sum: norms {norms:?}; go on \
             from the last checkpoint, and leave out the device that differs"
        )))
    }

    /// Moves the parameters of all, and what is computed with; `updates` counts those done, this one included.
    ///
    /// # Errors
    /// If a device fails. Replicas may then differ: the run is to be continued from a checkpoint.
    pub(super) fn update(
        &mut self,
        norm: f64,
        settings: &AdamW,
        rate: f64,
        updates: u64,
    ) -> Result<()> {
        let update = |_, replica: &mut Replica| {
            let Replica { parameters, learner, gradients } = replica;
            let (parameters, gradients) = (&*parameters, &*gradients);
            learner.run(|| parameters.update(gradients, norm, settings, rate, updates))?;
            Ok(learner.follow()?)
        };
        self.on_each(update).map(drop)
    }

    /// Sets the moments of a parameter, in all of them.
    ///
    /// # Errors
    /// If the moments have another shape, or a device fails.
    pub(super) fn set_moments(&self, name: &str, mean: &Tensor, square: &Tensor) -> Result<()> {
        for (replica, device) in self.all.iter().zip(&self.group.devices) {
            let missing = || Error::Setting(format!("the model has no parameter {name:?}"));
            let parameter = replica.parameters.get(name).ok_or_else(missing)?;
            parameter.set_moments(&on(mean, device)?, &on(square, device)?)?;
        }
        Ok(())
    }

    /// Deals batches out, `i` to replica `i` modulo their number, and collects losses in the order of batches.
    fn deal(&mut self, batches: &[Batch], what: &str, work: &Work<'_>) -> Result<Vec<Vec<f64>>> {
        let count = self.all.len();
        let losses = self.on_each(|rank, replica| {
            let own = batches.iter().skip(rank).step_by(count);
            let sums = once(Into::Set).chain(repeat(Into::Add));
            let losses = own.zip(sums).map(|(batch, sums)| work(replica, batch, sums));
            let losses = losses.collect::<candle_core::Result<Vec<_>>>();
            match count {
                1 => losses.context(what),
                _ => losses.context(&format!("{what}, on device {rank} of {count}")),
            }
        })?;
        let mut losses: Vec<_> = losses.into_iter().map(Vec::into_iter).collect();
        let next = |index: usize| losses[index % count].next().expect("one for each batch");
        Ok((0..batches.len()).map(next).collect())
    }

    /// What each replica answers, by rank, once all are back.
    ///
    /// # Errors
    /// That of the first which has one, or whose thread panicked.
    pub(super) fn on_each<T: Send>(
        &mut self,
        work: impl Fn(usize, &mut Replica) -> Result<T> + Sync,
    ) -> Result<Vec<T>> {
        if let [only] = &mut self.all[..] {
            return Ok(vec![work(0, only)?]);
        }
        let work = &work;
        std::thread::scope(|scope| {
            let start = |(rank, replica)| scope.spawn(move || work(rank, replica));
            let threads: Vec<_> = self.all.iter_mut().enumerate().map(start).collect();
            let answers: Vec<_> =
                threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            let answer = |(rank, answer): (usize, std::thread::Result<Result<T>>)| {
                let panicked = |_| Error::Stopped(format!("the thread of device {rank} panicked"));
                answer.map_err(panicked)?
            };
            answers.into_iter().enumerate().map(answer).collect()
        })
    }
}

/// A tensor on a device. From one GPU to another it goes by the host, which waits for the first.
fn on(tensor: &Tensor, device: &Device) -> Result<Tensor> {
    if tensor.device().same_device(device) {
        return Ok(tensor.clone());
    }
    Ok(tensor.to_device(&Device::Cpu)?.to_device(device)?)
}

/// Micro-batches of a step of full sequences: whole ones go into each, one at least.
pub fn micro_batch_count(sequences: usize, length: usize, tokens_max: usize) -> usize {
    sequences.div_ceil((tokens_max / length.max(1)).max(1))
}

/// That a step has work for all of some devices: sequences of `length` tokens, dealt out in micro-batches.
///
/// # Errors
/// If some would never have anything to do.
pub fn check_dealing(
    sequences: usize,
    length: usize,
    micro_batch_tokens: usize,
    devices: usize,
) -> Result<()> {
    let micro_batches = micro_batch_count(sequences, length, micro_batch_tokens);
    if micro_batches >= devices || devices == 1 {
        return Ok(());
    }
    Err(Error::Setting(format!(
        "a step of {sequences} sequences of {length} tokens makes {micro_batches} micro-batches, too few for \
         {devices} devices: raise --batch or --batch-tokens, or lower --micro-batch-tokens"
    )))
}
