//! Products with a weight that was laid out once for the CPU.
//!
//! ```text
//! weight (out, in)   ─▶  panels of 32 outputs:  [panel][word][32]
//! word               =   1 input in f32, 2 in bf16 and block floating point, 4 in 8 bits
//! ```
//!
//! Rows are brought to the type of the weight when they come. Each output is one chain over its inputs in
//! their order. It depends on its own row and nothing else: not on how many rows there are, how they are
//! cut into tiles, or how many threads share the work. This is what makes generation independent of its
//! batch.

use super::aligned::Aligned;
use super::layout::Words;
use super::matmul::View;
use super::quads;
use super::real::simd;
use super::rows::Rows;
use super::storage::{elements, tensor};
use super::tiles::{Ahead, PANEL, PanelTile, whole_tile};
use super::{ROWS_PER_TASK, bf16x3, block_float, columns, groups, layout, pairs, product};
use candle_core::{DType, Result, Tensor, bail};
use rayon::prelude::*;
use std::iter::repeat_n;
use std::ops::Range;
use std::sync::Arc;

/// What a packed weight is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightType {
    /// As it is; products in f32.
    #[default]
    F32,
    /// bf16, and rows are rounded to bf16; sums in f32.
    Bf16,
    /// Three of bf16 that add up to each number, and rows likewise: as exact as f32, and faster where a matrix unit
    /// multiplies bf16 (Henry, Tang and Heinecke, 2019; arXiv 1904.06376).
    Bf16x3,
    /// Integers of 13 bits with a scale for each output and 128 inputs, and rows likewise: what bf16 becomes where
    /// [`WeightType::for_bf16`] says so, at least as exact; sums within a group are exact, between groups in f32.
    BlockFloat,
    /// 8 bits with a scale for each output and 128 inputs, and rows likewise; sums within a group are
    /// exact, between groups in f32.
    Int8,
}

impl WeightType {
    /// What weights in bf16 are packed into for products on this CPU.
    pub fn for_bf16() -> Self {
        if block_float::pays() { WeightType::BlockFloat } else { WeightType::Bf16 }
    }

    /// The type that keys and values are kept in beside such weights.
    pub fn cache_type(self) -> DType {
        match self {
            WeightType::F32 | WeightType::Bf16x3 => DType::F32,
            WeightType::Bf16 | WeightType::BlockFloat | WeightType::Int8 => DType::BF16,
        }
    }

    /// Words of `inputs` elements in a panel.
    pub(crate) fn words(self, inputs: usize) -> usize {
        match self {
            WeightType::Int8 => quads::words(inputs),
            WeightType::BlockFloat => block_float::words(inputs),
            kind => kind.in_panels().count(inputs),
        }
    }

    /// Words of a row of `inputs` elements that meets such a weight.
    pub(crate) fn row_words(self, inputs: usize) -> usize {
        match self {
            WeightType::Int8 => quads::words(inputs),
            WeightType::BlockFloat => block_float::words(inputs),
            kind => kind.in_rows().count(inputs),
        }
    }

    /// Groups of `inputs` elements, where integers have scales.
    pub(crate) fn groups(self, inputs: usize) -> usize {
        match self {
            WeightType::BlockFloat | WeightType::Int8 => inputs.div_ceil(groups::INPUTS),
            WeightType::F32 | WeightType::Bf16 | WeightType::Bf16x3 => 0,
        }
    }

    /// How numbers stand in panels.
    ///
    /// # Panics
    /// With integers, which have scales.
    #[inline(always)]
    pub(crate) fn in_panels(self) -> Words {
        match self {
            WeightType::F32 => Words::F32,
            WeightType::Bf16 => Words::Pairs,
            WeightType::Bf16x3 => Words::Parts,
            WeightType::BlockFloat | WeightType::Int8 => unreachable!("integers have scales"),
        }
    }

    /// How numbers stand in rows: in bf16 already widened, where the CPU does not multiply bf16.
    ///
    /// # Panics
    /// With integers, which have scales.
    #[inline(always)]
    pub(crate) fn in_rows(self) -> Words {
        match self {
            WeightType::Bf16 if pairs::are_widened() => Words::Rounded,
            kind => kind.in_panels(),
        }
    }

    /// `out[row]` = the 32 outputs of `panel` for each row; rows are `stride` words apart.
    ///
    /// # Panics
    /// With integers, which need scales.
    #[inline]
    pub(crate) fn tile(
        self,
        rows: &[u32],
        stride: usize,
        panel: &[u32],
        ahead: Ahead<'_>,
        out: &mut [[f32; PANEL]],
    ) {
        match self {
            WeightType::F32 => {
                let ahead = ahead.beside(panel.len() / PANEL);
                whole_tile::<1>(PanelTile { rows, stride, panel, ahead, goes_on: false, out });
            }
            WeightType::Bf16 => pairs::tile(rows, stride, panel, ahead, out),
            WeightType::Bf16x3 => bf16x3::tile(rows, stride, panel, out),
            WeightType::BlockFloat | WeightType::Int8 => unreachable!("integers have scales"),
        }
    }
}

/// A weight `(out, in)` in panels.
#[derive(Clone, Debug, Default)]
pub struct PackedWeight {
    kind: WeightType,
    /// Those of another weight may be behind them: memory is used again.
    words: Arc<Aligned<u32>>,
    /// `[panel][group][32]`, where integers have scales.
    scales: Arc<[f32]>,
    outputs: usize,
    inputs: usize,
}

impl PackedWeight {
    /// Lays out `weight (out, in)`, a CPU tensor: bf16 is kept, all else becomes f32.
    pub fn new(weight: &Tensor) -> Result<Self> {
        match weight.dtype() {
            DType::BF16 => Self::of_type(weight, WeightType::Bf16),
            _ => Self::of_type(weight, WeightType::F32),
        }
    }

    /// Lays out `weight (out, in)`, a CPU tensor, in the given type.
    pub fn of_type(weight: &Tensor, kind: WeightType) -> Result<Self> {
        let (outputs, inputs) = weight.dims2()?;
        if !weight.device().is_cpu() {
            bail!("weights are packed on the CPU")
        }
        let weight = weight.to_dtype(DType::F32)?.contiguous()?;
        let weight = elements::<f32>(&weight)?;
        let weight = &*weight;
        Self::from_rows(outputs, inputs, kind, |output, row| {
            row.copy_from_slice(&weight[output * inputs..][..inputs]);
            Ok(())
        })
    }

    /// Lays out a weight `(out, in)` whose rows `read(output, row)` writes, in the given type. Of what it
    /// reads, one row a thread is in memory at a time.
    ///
    /// # Errors
    /// What `read` returns.
    pub fn from_rows<E: Send>(
        outputs: usize,
        inputs: usize,
        kind: WeightType,
        read: impl Fn(usize, &mut [f32]) -> std::result::Result<(), E> + Send + Sync,
    ) -> std::result::Result<Self, E> {
        let (panels, depth) = (outputs.div_ceil(PANEL), kind.words(inputs));
        let groups = kind.groups(inputs);
        let mut all_words = Aligned::zeros(panels * depth * PANEL);
        let mut scales: Arc<[f32]> = repeat_n(0.0, panels * groups * PANEL).collect();
        let all_scales = Arc::get_mut(&mut scales).expect("it was just made");
        let own_scales = all_scales.chunks_mut((groups * PANEL).max(1)).map(Some);
        let own_scales = own_scales.chain(std::iter::repeat_with(|| None));
        let panels: Vec<_> =
            all_words.chunks_mut((depth * PANEL).max(1)).zip(own_scales).enumerate().collect();
        panels.into_par_iter().try_for_each(|(panel, (words, scales))| {
            let (first, scales) = (panel * PANEL, scales.unwrap_or_default());
            let outputs = first..outputs.min(first + PANEL);
            lay_out(kind, outputs, inputs, &read, words, scales)
        })?;
        Ok(PackedWeight { kind, words: Arc::new(all_words), scales, outputs, inputs })
    }

    /// Lays out the rows of `x` anew as outputs, in the memory that is there already.
    pub(crate) fn set_rows(&mut self, kind: WeightType, x: View<'_, f32>) {
        let length = (kind.words(x.columns) * PANEL).max(1);
        let words = self.reshape(kind, x.rows, x.columns);
        words.par_chunks_mut(length).enumerate().for_each(|(panel, words)| {
            simd(
                #[inline(always)]
                || layout::panel_of_rows(kind.in_panels(), x, panel * PANEL, words),
            );
        });
    }

    /// The same for its columns: rows are the inputs, with zeros behind them up to whole steps.
    pub(crate) fn set_columns(&mut self, kind: WeightType, x: View<'_, f32>) {
        columns::set(
            self,
            kind,
            x,
            std::iter::repeat(()),
            #[inline(always)]
            |_, ()| (),
        );
    }

    /// Lays out the rows of `x` in this weight and its columns in `back`, in one pass over it.
    pub(crate) fn set_both(&mut self, back: &mut PackedWeight, kind: WeightType, x: View<'_, f32>) {
        let length = kind.words(x.columns) * PANEL;
        let words = self.reshape(kind, x.rows, x.columns);
        columns::set(
            back,
            kind,
            x,
            words.chunks_mut((length * ROWS_PER_TASK / PANEL).max(1)),
            #[inline(always)]
            |x, words| {
                for (panel, words) in words.chunks_mut(length).enumerate() {
                    layout::panel_of_rows(kind.in_panels(), x, panel * PANEL, words);
                }
            },
        );
    }

    /// The words of a weight of another shape: all of them are to be written.
    pub(crate) fn reshape(
        &mut self,
        kind: WeightType,
        outputs: usize,
        inputs: usize,
    ) -> &mut [u32] {
        (self.kind, self.outputs, self.inputs) = (kind, outputs, inputs);
        let words = Arc::make_mut(&mut self.words);
        let wanted = self.outputs.div_ceil(PANEL) * kind.words(inputs) * PANEL;
        words.make_room(wanted);
        &mut words[..wanted]
    }

    /// What the weight is made of.
    pub fn kind(&self) -> WeightType {
        self.kind
    }

    /// `x (rows, in)` in f32 to `(rows, out)` in f32.
    pub fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        let (count, inputs) = x.dims2()?;
        if inputs != self.inputs {
            bail!("rows of {inputs} elements cannot meet a weight of {} inputs", self.inputs)
        }
        let mut rows = Rows::default();
        rows.set(self.kind, &elements::<f32>(x)?, count, inputs);
        let mut out = vec![0.0; count * self.outputs];
        product::set([(self, &mut out)], &rows);
        tensor(out, (count, self.outputs))
    }

    /// Number of inputs.
    pub(crate) fn inputs(&self) -> usize {
        self.inputs
    }

    /// Number of outputs.
    pub(crate) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Number of panels.
    pub(crate) fn panels(&self) -> usize {
        self.outputs.div_ceil(PANEL)
    }

    /// Outputs of a panel.
    pub(crate) fn width(&self, panel: usize) -> usize {
        (self.outputs - panel * PANEL).min(PANEL)
    }

    /// Words of a panel for one output.
    pub(crate) fn depth(&self) -> usize {
        self.kind.words(self.inputs)
    }

    /// The words of a panel.
    pub(crate) fn panel(&self, panel: usize) -> &[u32] {
        let length = self.depth() * PANEL;
        &self.words[panel * length..][..length]
    }

    /// The words of all panels.
    pub(crate) fn all_panels(&self) -> &[u32] {
        &self.words[..self.panels() * self.depth() * PANEL]
    }

    /// The scales of a panel, where integers have them.
    pub(crate) fn scales(&self, panel: usize) -> &[f32] {
        let length = self.kind.groups(self.inputs) * PANEL;
        &self.scales[panel * length..][..length]
    }
}

/// Lays out the `outputs` of one panel, which are no more than it holds.
fn lay_out<E>(
    kind: WeightType,
    outputs: Range<usize>,
    inputs: usize,
    read: impl Fn(usize, &mut [f32]) -> std::result::Result<(), E>,
    words: &mut [u32],
    scales: &mut [f32],
) -> std::result::Result<(), E> {
    let mut weight = vec![0.0; inputs];
    let mut own = vec![0; words.len() / PANEL];
    let mut own_scales = vec![0.0; scales.len() / PANEL];
    for (lane, output) in outputs.enumerate() {
        read(output, &mut weight)?;
        match kind {
            WeightType::F32 | WeightType::Bf16 | WeightType::Bf16x3 => {
                layout::row(kind.in_panels(), &weight, &mut own);
            }
            WeightType::Int8 => {
                let put = |word: usize, bytes| own[word] = bytes;
                quads::quantise_weight(&weight, put, &mut own_scales);
            }
            WeightType::BlockFloat => {
                block_float::quantise_weight(&weight, &mut own, &mut own_scales);
            }
        }
        for (word, &own) in own.iter().enumerate() {
            words[word * PANEL + lane] = own;
        }
        for (group, &own) in own_scales.iter().enumerate() {
            scales[group * PANEL + lane] = own;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::twin::{close, random};
    use super::*;
    use proptest::prelude::*;

    const KINDS: [WeightType; 5] = [
        WeightType::F32,
        WeightType::Bf16,
        WeightType::Bf16x3,
        WeightType::BlockFloat,
        WeightType::Int8,
    ];

    fn check(rows: usize, outputs: usize, inputs: usize) {
        let (x, weight) =
            (random(&[rows, inputs], DType::F32), random(&[outputs, inputs], DType::F32));
        let ours = PackedWeight::new(&weight).unwrap().multiply(&x).unwrap();
        close(&ours, &x.matmul(&weight.t().unwrap()).unwrap(), "product");

        let split = PackedWeight::of_type(&weight, WeightType::Bf16x3).unwrap();
        close(&split.multiply(&x).unwrap(), &ours, "product of three parts");

        let weight = weight.to_dtype(DType::BF16).unwrap();
        let ours = PackedWeight::new(&weight).unwrap().multiply(&x).unwrap();
        let wide = |t: &Tensor| t.to_dtype(DType::BF16).unwrap().to_dtype(DType::F32).unwrap();
        close(&ours, &wide(&x).matmul(&wide(&weight).t().unwrap()).unwrap(), "product in bf16");
    }

    #[test]
    fn the_kernel_equals_a_plain_product() {
        for (rows, outputs, inputs) in
            [(1, 1, 1), (2, 33, 5), (5, 64, 40), (31, 100, 64), (64, 31, 7), (201, 96, 50)]
        {
            check(rows, outputs, inputs);
        }
    }

    #[test]
    fn no_rows_have_no_outputs() {
        for kind in KINDS {
            let weight = PackedWeight::of_type(&random(&[40, 50], DType::F32), kind).unwrap();
            let none = random(&[0, 50], DType::F32);
            assert_eq!(weight.multiply(&none).unwrap().dims(), [0, 40]);
        }
    }

    #[test]
    fn a_row_has_the_same_bits_in_every_batch() {
        let (x, weight) = (random(&[150, 270], DType::F32), random(&[90, 270], DType::F32));
        for kind in KINDS {
            let weight = PackedWeight::of_type(&weight, kind).unwrap();
            let all: Vec<Vec<f32>> = weight.multiply(&x).unwrap().to_vec2().unwrap();
            for (first, rows) in [(0, 1), (3, 2), (10, 13), (40, 63), (1, 64), (50, 100)] {
                let part = x.narrow(0, first, rows).unwrap();
                let part: Vec<Vec<f32>> = weight.multiply(&part).unwrap().to_vec2().unwrap();
                let what = format!("{kind:?}, rows {first}..{}", first + rows);
                assert_eq!(part, all[first..first + rows], "{what}");
            }
        }
    }

    #[test]
    fn eight_bits_are_near_a_plain_product() {
        let (x, weight) = (random(&[40, 768], DType::F32), random(&[96, 768], DType::F32));
        let ours = PackedWeight::of_type(&weight, WeightType::Int8).unwrap().multiply(&x).unwrap();
        let exact = x.matmul(&weight.t().unwrap()).unwrap();
        let mean = |t: Tensor| t.sqr().unwrap().mean_all().unwrap().to_scalar::<f32>().unwrap();
        let noise = mean((ours - &exact).unwrap()) / mean(exact);
        assert!(noise < 2e-4, "noise is {noise} of the signal");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn any_kernel_equals_a_plain_product(
            rows in 1usize..200, outputs in 1usize..150, inputs in 1usize..1500,
        ) {
            check(rows, outputs, inputs);
        }

        #[test]
        fn any_row_has_the_same_bits_in_every_batch(
            rows in 1usize..150, outputs in 1usize..100, inputs in 1usize..600, cut in 0usize..150,
        ) {
            let (x, weight) = (random(&[rows, inputs], DType::F32), random(&[outputs, inputs], DType::F32));
            let cut = cut % rows;
            for kind in KINDS {
                let weight = PackedWeight::of_type(&weight, kind).unwrap();
                let bits = |x: &Tensor| weight.multiply(x).unwrap().to_vec2::<f32>().unwrap();
                let part = |first, rows| bits(&x.narrow(0, first, rows).unwrap());
                let parts = [part(0, cut), part(cut, rows - cut)].concat();
                assert_eq!(parts, bits(&x), "{kind:?}, cut at {cut}");
            }
        }
    }
}
