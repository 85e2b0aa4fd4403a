//! What the weights of a model are made of, and thus how it computes.

use crate::error::{Error, Result};
use crate::kernels::packed::WeightType;
use candle_core::DType;

/// The type of a model's weights when it generates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// 32 bits.
    F32,
    /// 16 bits with the exponents of 32. Where a CPU multiplies integers faster than these, it computes with integers of
    /// 13 bits that share exponents ([`WeightType::for_bf16`]).
    Bf16,
    /// 16 bits with 11 of them for the value. A CPU computes with these values in 32 bits.
    F16,
    /// 8 bits with a scale for each output and 128 inputs. On CPUs only.
    Int8,
}

impl Precision {
    /// The type that `--dtype` calls `name`; none for `auto`.
    ///
    /// # Errors
    /// If the name is unknown.
    pub fn named(name: &str) -> Result<Option<Self>> {
        Ok(Some(match name {
            "auto" => return Ok(None),
            "f32" => Precision::F32,
            "bf16" => Precision::Bf16,
            "f16" => Precision::F16,
            "int8" => Precision::Int8,
            _ => {
                let reason = format!("unknown type {name:?}; use auto, f32, bf16, f16 or int8");
                return Err(Error::Setting(reason));
            }
        }))
    }

    /// The type that `--dtype` calls `name` on a CPU or elsewhere; `auto` is `own` on a CPU, the type that
    /// suits the file of the model, and bf16 elsewhere.
    ///
    /// # Errors
    /// If the name is unknown, or the device cannot compute in this type.
    pub fn choose(name: &str, own: Precision, on_cpu: bool) -> Result<Self> {
        let chosen = match Self::named(name)? {
            Some(chosen) => chosen,
            None if on_cpu => own,
            None => Precision::Bf16,
        };
        match chosen {
            Precision::Int8 if !on_cpu => Err(no_int8()),
            chosen => Ok(chosen),
        }
    }

    /// What `--dtype` and `run.json` call it.
    pub fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
            Precision::F16 => "f16",
            Precision::Int8 => "int8",
        }
    }

    /// The type of tensors of such weights.
    ///
    /// # Errors
    /// For 8 bits, which are not kept in tensors.
    pub fn tensors(self) -> Result<DType> {
        match self {
            Precision::F32 => Ok(DType::F32),
            Precision::Bf16 => Ok(DType::BF16),
            Precision::F16 => Ok(DType::F16),
            Precision::Int8 => Err(no_int8()),
        }
    }

    /// What a CPU packs them into.
    pub fn packed(self) -> WeightType {
        match self {
            Precision::F32 | Precision::F16 => WeightType::F32,
            Precision::Bf16 => WeightType::for_bf16(),
            Precision::Int8 => WeightType::Int8,
        }
    }

    /// About how many bytes so many parameters take.
    pub fn bytes(self, parameters: u64, on_cpu: bool) -> u64 {
        let scales = parameters / 32; // one of 4 bytes for 128 parameters
        let own = match self {
            Precision::F32 => 4 * parameters,
            Precision::F16 if on_cpu => 4 * parameters,
            Precision::Bf16 | Precision::F16 => 2 * parameters,
            Precision::Int8 => parameters,
        };
        match self.packed() {
            WeightType::BlockFloat | WeightType::Int8 if on_cpu => own + scales,
            _ => own,
        }
    }
}

fn no_int8() -> Error {
    let reason = "weights in int8 are for generation on a CPU; use f32, bf16 or f16 here";
    Error::Setting(reason.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, own: Precision, on_cpu: bool, expected: std::result::Result<&str, &str>) {
        let found = Precision::choose(name, own, on_cpu).map(Precision::name);
        let found = found.map_err(|error| error.to_string());
        assert_eq!(found, expected.map_err(str::to_owned), "{name}");
    }

    #[test]
    fn types_are_chosen_by_name_file_and_device() {
        check("auto", Precision::F32, true, Ok("f32"));
        check("auto", Precision::Int8, true, Ok("int8"));
        check("auto", Precision::Int8, false, Ok("bf16"));
        check("bf16", Precision::Int8, true, Ok("bf16"));
        check("f16", Precision::F32, false, Ok("f16"));
        check("int8", Precision::F32, true, Ok("int8"));
    }

    #[test]
    fn what_a_device_cannot_compute_in_is_refused() {
        let reason = "weights in int8 are for generation on a CPU; use f32, bf16 or f16 here";
        check("int8", Precision::F32, false, Err(reason));
        let reason = "unknown type \"int4\"; use auto, f32, bf16, f16 or int8";
        check("int4", Precision::F32, true, Err(reason));
    }
}
