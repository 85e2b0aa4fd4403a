//! The tensors of a GGUF file, row by row in f32, under the names of Hugging Face checkpoints.
//!
//! llama.cpp turns neighbouring elements of a head where Hugging Face turns halves, so its converter has
//! sorted the rows of the query and key projections: row `2 i + j` of a head was row `j * half + i`. They
//! are read in the old order.

use super::header::Place;
use crate::model::config::ModelConfig;
use candle_core::CpuStorage;
use candle_core::quantized::GgmlDType;
use pulp::bytemuck::cast_slice_mut;
use std::borrow::Cow;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};

/// The name in a GGUF file of a parameter of a checkpoint.
pub(super) fn name_of(parameter: &str) -> Option<String> {
    Some(match parameter.strip_suffix(".weight")? {
        "model.embed_tokens" => "token_embd.weight".into(),
        "model.norm" => "output_norm.weight".into(),
        "lm_head" => "output.weight".into(),
        block => {
            let (layer, part) = block.strip_prefix("model.layers.")?.split_once('.')?;
            let part = match part {
                "input_layernorm" => "attn_norm",
                "self_attn.q_proj" => "attn_q",
                "self_attn.k_proj" => "attn_k",
                "self_attn.v_proj" => "attn_v",
                "self_attn.o_proj" => "attn_output",
                "post_attention_layernorm" => "ffn_norm",
                "mlp.gate_proj" => "ffn_gate",
                "mlp.up_proj" => "ffn_up",
                "mlp.down_proj" => "ffn_down",
                _ => return None,
            };
            format!("blk.{layer}.{part}.weight")
        }
    })
}

/// The width of the heads whose rows were sorted in `parameter`; none if they were not.
pub(super) fn sorted_heads(parameter: &str, config: &ModelConfig) -> Option<usize> {
    let is_turned = parameter.ends_with("q_proj.weight") || parameter.ends_with("k_proj.weight");
    is_turned.then_some(config.head_dim)
}

/// A tensor in memory, as it is in its file.
pub(crate) struct Rows {
    kind: GgmlDType,
    /// Aligned for any type of elements.
    words: Vec<u32>,
    row_bytes: usize,
    width: usize,
    count: usize,
    sorted_heads: Option<usize>,
}

impl Rows {
    /// Reads a tensor; one of one dimension is one row.
    pub(super) fn read(
        mut file: &File,
        place: &Place,
        sorted_heads: Option<usize>,
    ) -> std::io::Result<Self> {
        let width = place.shape.last().copied().unwrap_or(1);
        let count = place.shape.iter().rev().skip(1).product();
        let mut words = vec![0u32; place.bytes.div_ceil(4)];
        file.seek(SeekFrom::Start(place.start))?;
        file.read_exact(&mut cast_slice_mut(&mut words)[..place.bytes])?;
        let row_bytes = width / place.kind.block_size() * place.kind.type_size();
        Ok(Rows { kind: place.kind, words, row_bytes, width, count, sorted_heads })
    }

    /// The number of rows.
    pub(crate) fn count(&self) -> usize {
        self.count
    }

    /// Elements of a row.
    pub(crate) fn width(&self) -> usize {
        self.width
    }

    /// Writes row `row` of the checkpoint into `out`.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) -> candle_core::Result<()> {
        let row = match self.sorted_heads {
            None => row,
            Some(width) => {
                let (head, place, half) = (row / width, row % width, width / 2);
                head * width + 2 * (place % half) + place / half
            }
        };
        let bytes =
            &pulp::bytemuck::cast_slice(&self.words)[row * self.row_bytes..][..self.row_bytes];
        match self.kind {
            GgmlDType::F32 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_le_bytes(*bytes);
                }
            }
            GgmlDType::BF16 => {
                for (out, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
                }
            }
            kind => match kind.from_data(Cow::Borrowed(bytes)).dequantize(self.width)? {
                CpuStorage::F32(values) => out.copy_from_slice(&values),
                _ => candle_core::bail!("{kind:?} does not become f32"),
            },
        }
        Ok(())
    }
}
