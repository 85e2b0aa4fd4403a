//! A step that a device has begun with.

use super::gpu::GpuLaunched;
use crate::kernels::cached::{Expected, StepRows};
use candle_core::{Result, bail};
use std::borrow::Cow;

/// A step whose tokens are there, or will be.
#[derive(Debug)]
pub struct Launched(Place);

#[derive(Debug)]
enum Place {
    Host(Vec<u32>),
    Gpu(Box<GpuLaunched>),
}

impl Launched {
    pub(super) fn on_host(tokens: Vec<u32>) -> Self {
        Launched(Place::Host(tokens))
    }

    pub(super) fn on_gpu(launched: GpuLaunched) -> Self {
        Launched(Place::Gpu(Box::new(launched)))
    }

    /// The most likely next token of each sample. Waits until they are there, and not for steps behind.
    ///
    /// # Errors
    /// If the device fails.
    pub fn tokens(&self) -> Result<Vec<u32>> {
        match &self.0 {
            Place::Host(tokens) => Ok(tokens.clone()),
            Place::Gpu(launched) => launched.tokens(),
        }
    }

    /// Where the tokens are on a GPU.
    pub(super) fn gpu(&self) -> Option<&GpuLaunched> {
        match &self.0 {
            Place::Host(_) => None,
            Place::Gpu(launched) => Some(launched),
        }
    }
}

/// The ids of a step, all known.
pub(super) fn known_ids<'a>(
    rows: &StepRows<'a>,
    before: Option<(&Launched, &[Expected])>,
) -> Result<Cow<'a, [u32]>> {
    let Some((before, expected)) = before.filter(|(_, expected)| !expected.is_empty()) else {
        return Ok(Cow::Borrowed(rows.ids));
    };
    let tokens = before.tokens()?;
    let mut ids = rows.ids.to_vec();
    for Expected { row, sample } in expected {
        match (ids.get_mut(*row as usize), tokens.get(*sample as usize)) {
            (Some(id), Some(&token)) => *id = token,
            _ => bail!("row {row} is to be token {sample} of {} of the step before", tokens.len()),
        }
    }
    Ok(Cow::Owned(ids))
}
