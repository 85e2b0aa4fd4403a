//! Steps of a packed model: all rows through all blocks, in parts that run beside each other (`kernels/cached/parts.rs`).

use super::Inputs;
use super::cache::Cache;
use super::packed::PackedLayers;
use crate::kernels::cached::{CachePart, StepPart, StepRows, share};
use crate::kernels::embedding::embed;
use crate::threads;
use candle_core::{D, DType, Device, Result, Tensor};
use rayon::prelude::*;

/// Computes a step: the rows whose next token is wanted, `(samples, hidden)`.
pub(super) fn step(
    model: (&Inputs, &PackedLayers),
    cache: &mut Cache,
    rows: &StepRows<'_>,
) -> Result<Tensor> {
    let done = in_parts(model, cache, rows, Ok)?;
    let hidden = model.0.embed_tokens.dim(D::Minus1)?;
    Tensor::from_vec(done, (rows.samples.len(), hidden), &Device::Cpu)
}

/// Computes a step: the most likely next token of each sample, the first of several.
pub(super) fn next_tokens(
    model: (&Inputs, &PackedLayers),
    cache: &mut Cache,
    rows: &StepRows<'_>,
) -> Result<Vec<u32>> {
    in_parts(model, cache, rows, |x| Ok(model.1.most_likely(&x)))
}

/// What `finish` makes of the samples' rows of each part of a step, one behind another.
fn in_parts<T: Clone + Send>(
    model: (&Inputs, &PackedLayers),
    cache: &mut Cache,
    rows: &StepRows<'_>,
    finish: impl Fn(Vec<f32>) -> Result<Vec<T>> + Send + Sync,
) -> Result<Vec<T>> {
    let layers = cache.layers()?;
    threads::run(|| {
        let parts = rows.parts(model.1.cut(threads::all(), layers[0].heads()))?;
        let caches = share(layers, &parts)?;
        let mut work: Vec<_> = parts.iter().zip(caches).collect();
        let run =
            |(part, cache): (&StepPart<'_>, CachePart<'_>)| finish(run_part(model, part, cache)?);
        if work.len() == 1 {
            return run(work.remove(0));
        }
        let done: Result<Vec<_>> = work.into_par_iter().with_max_len(1).map(run).collect();
        Ok(done?.concat())
    })
}

/// Computes a part of a step: the rows of its samples, one behind another.
fn run_part(
    model: (&Inputs, &PackedLayers),
    part: &StepPart<'_>,
    mut cache: CachePart<'_>,
) -> Result<Vec<f32>> {
    let attend = |layer, qkv: [&[f32]; 3], out: &mut [f32]| cache.step(layer, qkv, out);
    let wanted = &part.wanted;
    let x = run(model, (part.ids, part.positions), Some(&wanted.rows), attend)?;
    let hidden = model.0.embed_tokens.dim(D::Minus1)?;
    let row = |&sample: &u32| &x[sample as usize * hidden..][..hidden];
    Ok(wanted.samples.iter().flat_map(row).copied().collect())
}

/// Runs all blocks over rows of tokens, the last one over those of them that are `wanted`: `(rows, hidden)`.
pub(super) fn run(
    (inputs, layers): (&Inputs, &PackedLayers),
    (ids, positions): (&[u32], &[u32]),
    wanted: Option<&[u32]>,
    attend: impl FnMut(usize, [&[f32]; 3], &mut [f32]) -> Result<()> + Send,
) -> Result<Vec<f32>> {
    let x = embed(&inputs.embed_tokens, ids)?;
    let mut x = x.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?;
    layers.forward(&mut x, &inputs.table, positions, wanted, attend)?;
    Ok(x)
}

#[cfg(test)]
mod tests {
    use super::super::config::ModelConfig;
    use super::super::shape::Shape;
    use super::super::{Form, Llama};
    use super::*;
    use crate::kernels::cached::{BLOCK, Expected, Run};
    use crate::kernels::first_of_largest;
    use crate::kernels::packed::WeightType;
    use crate::seed;

    /// Enough rows for several parts on any CPU.
    const LENGTHS: [usize; 5] = [130, 150, 64, 200, 1];

    fn model(kind: WeightType) -> Llama {
        let shape = Shape::named("2m").unwrap();
        let config = ModelConfig { vocab_size: 90, num_hidden_layers: 2, ..shape.config() };
        Llama::build(&config, Form::PackedAs(kind), &Device::Cpu, |name, shape| {
            let mut stream = seed::stream(5, name, "steps");
            let values: Vec<f32> =
                (0..shape.iter().product()).map(|_| stream.normal() as f32).collect();
            Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
        })
        .unwrap()
    }

    /// Logits of a step of prompts and of one behind each of them.
    fn logits(model: &Llama) -> Vec<Vec<Vec<f32>>> {
        let tables = LENGTHS.iter().scan(0, |next, length| {
            let first = *next;
            *next += (length / BLOCK + 1) as u32;
            Some((first..*next).collect::<Vec<u32>>())
        });
        let tables: Vec<Vec<u32>> = tables.collect();
        let mut cache = model.cache(tables.iter().map(Vec::len).sum()).unwrap();
        let mut step = |rows_of: &dyn Fn(usize) -> (usize, usize)| {
            let (mut ids, mut positions, mut runs) = (vec![], vec![], vec![]);
            for (index, table) in tables.iter().enumerate() {
                let (rows, position) = rows_of(index);
                runs.push(Run { first_row: ids.len(), rows, position, table: table.clone() });
                ids.extend((0..rows).map(|row| ((row * 37 + index) % 90) as u32));
                positions.extend((position..position + rows).map(|position| position as u32));
            }
            let samples: Vec<u32> =
                runs.iter().map(|run| (run.first_row + run.rows - 1) as u32).collect();
            let rows =
                StepRows { ids: &ids, positions: &positions, runs: &runs, samples: &samples };
            let logits: Vec<Vec<f32>> =
                model.step(&mut cache, &rows).unwrap().logits().unwrap().to_vec2().unwrap();
            let tokens = model.next_tokens(&mut cache, &rows).unwrap();
            assert_eq!(tokens.len(), logits.len());
            for (logits, token) in logits.iter().zip(tokens) {
                assert_eq!(first_of_largest(logits), token as usize);
            }
            logits
        };
        vec![step(&|index| (LENGTHS[index], 0)), step(&|index| (1, LENGTHS[index]))]
    }

    #[test]
    fn a_step_in_parts_computes_the_same_bits() {
        for kind in [WeightType::F32, WeightType::Bf16, WeightType::BlockFloat, WeightType::Int8] {
            let model = model(kind);
            let on = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| (model.parts_of_step(LENGTHS.iter().sum()), logits(&model)))
            };
            let (one, whole) = on(1);
            assert_eq!(one, 1);
            for threads in [2, 3] {
                let (parts, found) = on(threads);
                assert_eq!(parts, threads, "rows for as many parts");
                assert_eq!(found, whole, "{kind:?} on {threads} threads");
            }
        }
    }

    #[test]
    fn ids_that_are_expected_are_tokens_of_the_step_before() {
        let model = model(WeightType::F32);
        let mut cache = model.cache(1).unwrap();
        let run = |rows, position| [Run { first_row: 0, rows, position, table: vec![0] }];
        let (prompt, next) = (run(3, 0), run(1, 3));
        let (ids, positions) = ([5, 6, 7], [0, 1, 2]);
        let rows = StepRows { ids: &ids, positions: &positions, runs: &prompt, samples: &[2] };
        let before = model.launch(&mut cache, &rows, None).unwrap();
        let token = before.tokens().unwrap()[0];
        let mut step = |id: u32, expected: &[Expected]| {
            let rows = StepRows { ids: &[id], positions: &[3], runs: &next, samples: &[0] };
            let launched = model.launch(&mut cache, &rows, Some((&before, expected)));
            launched.and_then(|launched| launched.tokens())
        };
        let known = step(token, &[]).unwrap();
        let other = (0..90).find(|&id| step(id, &[]).unwrap() != known).expect("ids matter");
        assert_eq!(step(other, &[Expected { row: 0, sample: 0 }]).unwrap(), known);
        for beyond in [Expected { row: 1, sample: 0 }, Expected { row: 0, sample: 1 }] {
            assert!(step(0, &[beyond]).is_err(), "{beyond:?}");
        }
    }
}
