use anyhow::{Result, ensure};
use candle_core::{DType, Device};
use headwater::kernels::packed::WeightType;
use headwater::model::{Form, device};

/// The type of weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Precision {
    dtype: DType,
    int8: bool,
}

impl Precision {
    pub(super) fn named(name: &str, device: &Device) -> Result<Self> {
        if name == "int8" {
            ensure!(device.is_cpu(), "int8 cpu only");
            return Ok(Precision { dtype: DType::F32, int8: true });
        }
        Ok(Precision { dtype: device::dtype(name, device)?, int8: false })
    }

    pub(super) fn weight_type(self) -> WeightType {
        match (self.int8, self.dtype) {
            (true, _) => WeightType::Int8,
            (_, DType::BF16) => WeightType::Bf16,
            _ => WeightType::F32,
        }
    }

    pub(super) fn dtype(self) -> DType {
        self.dtype
    }

    pub(super) fn bytes_per_weight(self) -> f64 {
        match self.weight_type() {
            WeightType::F32 => 4.0,
            WeightType::Bf16 => 2.0,
            WeightType::Int8 => 1.0 + 4.0 / 128.0,
        }
    }

    pub(super) fn name(self) -> &'static str {
        if self.int8 { "int8" } else { self.dtype.as_str() }
    }

    pub(super) fn form(self, device: &Device) -> Form {
        if device.is_cpu() { Form::PackedAs(self.weight_type()) } else { Form::Plain }
    }
}
