//! The header of a GGUF file: settings by key, and where its tensors lie.
//!
//! ```text
//! "GGUF" version │ tensors │ settings │ key type value … │ name dimensions type offset … │ data
//! ```
//!
//! A file is not believed. Nothing is allocated because a number in it says so: strings and arrays are
//! checked against the bytes that are left, entries are read one by one, and every tensor lies in the file.

use candle_core::quantized::GgmlDType;
use std::collections::BTreeMap;
use std::io::Read;

/// The first bytes of a GGUF file.
pub(super) const MAGIC: [u8; 4] = *b"GGUF";

/// Bytes of a header at most: many times those of the largest vocabularies there are.
const HEADER_MAX: u64 = 64 << 20;

/// Dimensions of a tensor at most, as in ggml.
const DIMENSIONS_MAX: u32 = 4;

/// Where tensors start if the file does not say otherwise: at a multiple of so many bytes.
const ALIGNMENT: i128 = 32;

/// Arrays in arrays at most.
const DEPTH_MAX: usize = 4;

type Result<T> = std::result::Result<T, String>;

/// What a key stands for.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    /// A number without a fraction.
    Integer(i128),
    /// A number.
    Real(f64),
    /// A truth value.
    Truth(bool),
    /// A text.
    Text(String),
    /// Several texts.
    Texts(Vec<String>),
    /// Several numbers of 32 bits.
    Numbers(Vec<f64>),
    /// Something that no setting of a model is.
    Other,
}

/// Where a tensor lies.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Place {
    /// Rows first, as in `(out, in)`.
    pub(super) shape: Vec<usize>,
    pub(super) kind: GgmlDType,
    /// Its first byte in the file.
    pub(super) start: u64,
    /// Its bytes.
    pub(super) bytes: usize,
}

/// All that stands before the data.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Header {
    pub(super) values: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, Place>,
}

impl Header {
    /// Reads the header of a file of `length` bytes.
    ///
    /// # Errors
    /// Says what is malformed, or not supported.
    pub(super) fn read(file: impl Read, length: u64) -> Result<Self> {
        let mut reader = Reader { file, read: 0, end: length.min(HEADER_MAX) };
        if reader.bytes::<4>().ok() != Some(MAGIC) {
            return Err("is not a GGUF file".into());
        }
        let version = reader.u32()?;
        if version & 0xffff == 0 {
            return Err("is a GGUF file for big-endian machines, which is not supported".into());
        }
        if !matches!(version, 2 | 3) {
            return Err(format!("is GGUF of version {version}; versions 2 and 3 are supported"));
        }
        let (tensor_count, value_count) = (reader.u64()?, reader.u64()?);
        let mut values = BTreeMap::new();
        for _ in 0..value_count {
            let key = reader.text().map_err(|reason| format!("the name of a key: {reason}"))?;
            let value = reader.u32().and_then(|kind| reader.value(kind, 0));
            let value = value.map_err(|reason| format!("{key:?}: {reason}"))?;
            if values.insert(key.clone(), value).is_some() {
                return Err(format!("the key {key:?} is there twice"));
            }
        }
        let mut raw = Vec::new();
        for _ in 0..tensor_count {
            let name = reader.text().map_err(|reason| format!("the name of a tensor: {reason}"))?;
            let tensor = reader.tensor();
            raw.push((
                name.clone(),
                tensor.map_err(|reason| format!("tensor {name:?}: {reason}"))?,
            ));
        }
        let alignment = match values.get("general.alignment") {
            None => ALIGNMENT,
            Some(Value::Integer(bytes @ 1..=0x10_0000)) => *bytes,
            Some(other) => return Err(format!("\"general.alignment\" cannot be {other:?}")),
        };
        let data = reader.read.next_multiple_of(alignment as u64);
        let mut tensors = BTreeMap::new();
        for (name, tensor) in raw {
            let place = tensor.place(data, length);
            let place = place.map_err(|reason| format!("tensor {name:?} {reason}"))?;
            if tensors.insert(name.clone(), place).is_some() {
                return Err(format!("the tensor {name:?} is there twice"));
            }
        }
        Ok(Header { values, tensors })
    }
}

/// The number that was meant by its nearest f32: 1e-5 and not 9.999999747e-6, as in `config.json`.
fn decimal(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

/// A tensor as it is listed.
struct Listed {
    /// Elements of a row first.
    dimensions: Vec<u64>,
    kind: u32,
    /// From the start of the data.
    offset: u64,
}

impl Listed {
    fn place(self, data: u64, length: u64) -> Result<Place> {
        let kind = kind(self.kind)?;
        let inner = self.dimensions.first().copied().unwrap_or(1);
        let block = kind.block_size() as u64;
        if !inner.is_multiple_of(block) {
            return Err(format!(
                "has rows of {inner} elements; {kind:?} comes in blocks of {block}"
            ));
        }
        let elements = self.dimensions.iter().try_fold(1u64, |all, &next| all.checked_mul(next));
        let bytes =
            elements.and_then(|elements| (elements / block).checked_mul(kind.type_size() as u64));
        let start = data.checked_add(self.offset);
        let end = start.zip(bytes).and_then(|(start, bytes)| start.checked_add(bytes));
        let (Some(start), Some(bytes), Some(end)) = (start, bytes, end) else {
            return Err(format!(
                "cannot have the shape {:?} and lie at {}",
                self.dimensions, self.offset
            ));
        };
        if end > length {
            return Err(format!("ends at byte {end} of a file of {length} bytes: it was cut"));
        }
        let shape = self.dimensions.iter().rev().map(|&n| usize::try_from(n));
        let shape =
            shape.collect::<std::result::Result<_, _>>().map_err(|error| error.to_string())?;
        Ok(Place { shape, kind, start, bytes: usize::try_from(bytes).map_err(|e| e.to_string())? })
    }
}

/// The type of the elements of a tensor.
fn kind(number: u32) -> Result<GgmlDType> {
    Ok(match number {
        0 => GgmlDType::F32,
        1 => GgmlDType::F16,
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        30 => GgmlDType::BF16,
        _ => {
            let name = match number {
                16..=23 | 29 => "one of the IQ types",
                34 | 35 => "one of the TQ types",
                39 => "MXFP4",
                _ => "unknown",
            };
            return Err(format!(
                "is of type {number} ({name}), which is not supported; F32, F16, BF16, Q8_0, Q4_0, Q4_1, \
                 Q5_0, Q5_1 and Q2_K to Q6_K are"
            ));
        }
    })
}

struct Reader<R> {
    file: R,
    read: u64,
    end: u64,
}

impl<R: Read> Reader<R> {
    /// Fails unless so many elements of so many bytes can follow.
    fn expect(&self, count: u64, bytes: u64) -> Result<()> {
        match count.checked_mul(bytes).is_some_and(|bytes| bytes <= self.end - self.read) {
            true => Ok(()),
            false if self.end == HEADER_MAX => {
                Err(format!("the header is longer than {} MiB", HEADER_MAX >> 20))
            }
            false => Err("the file ends inside its header: it was cut".into()),
        }
    }

    fn bytes<const COUNT: usize>(&mut self) -> Result<[u8; COUNT]> {
        self.expect(COUNT as u64, 1)?;
        let mut bytes = [0; COUNT];
        self.file.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        self.read += COUNT as u64;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn raw_text(&mut self) -> Result<Vec<u8>> {
        let length = self.u64()?;
        self.expect(length, 1)?;
        let mut bytes = vec![0; length as usize];
        self.file.read_exact(&mut bytes).map_err(|error| error.to_string())?;
        self.read += length;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<String> {
        String::from_utf8(self.raw_text()?).map_err(|_| "is not UTF-8".into())
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::Integer(self.bytes::<1>()?[0].into()),
            1 => Value::Integer(i8::from_le_bytes(self.bytes()?).into()),
            2 => Value::Integer(u16::from_le_bytes(self.bytes()?).into()),
            3 => Value::Integer(i16::from_le_bytes(self.bytes()?).into()),
            4 => Value::Integer(self.u32()?.into()),
            5 => Value::Integer(i32::from_le_bytes(self.bytes()?).into()),
            6 => Value::Real(decimal(f32::from_le_bytes(self.bytes()?))),
            7 => match self.bytes()? {
                [byte @ (0 | 1)] => Value::Truth(byte == 1),
                [byte] => return Err(format!("{byte} is no truth value")),
            },
            // Names and chat templates in the wild are not always UTF-8, and nothing depends on them.
            8 => Value::Text(String::from_utf8_lossy(&self.raw_text()?).into_owned()),
            9 => self.array(depth)?,
            10 => Value::Integer(self.u64()?.into()),
            11 => Value::Integer(i64::from_le_bytes(self.bytes()?).into()),
            12 => Value::Real(f64::from_le_bytes(self.bytes()?)),
            _ => return Err(format!("there is no type {kind} of values")),
        })
    }

    fn array(&mut self, depth: usize) -> Result<Value> {
        let (kind, count) = (self.u32()?, self.u64()?);
        let bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            9 if depth < DEPTH_MAX => 12,
            _ => return Err(format!("there is no type {kind} of elements")),
        };
        self.expect(count, bytes)?;
        Ok(match kind {
            4 => self.numbers(count, |bytes| u32::from_le_bytes(bytes).into())?,
            5 => self.numbers(count, |bytes| i32::from_le_bytes(bytes).into())?,
            6 => self.numbers(count, |bytes| f32::from_le_bytes(bytes).into())?,
            8 => Value::Texts((0..count).map(|_| self.text()).collect::<Result<_>>()?),
            _ => {
                for _ in 0..count {
                    self.value(kind, depth + 1)?;
                }
                Value::Other
            }
        })
    }

    fn numbers(&mut self, count: u64, number: impl Fn([u8; 4]) -> f64) -> Result<Value> {
        Ok(Value::Numbers((0..count).map(|_| self.bytes().map(&number)).collect::<Result<_>>()?))
    }

    fn tensor(&mut self) -> Result<Listed> {
        let count = self.u32()?;
        if count > DIMENSIONS_MAX {
            return Err(format!("{count} dimensions are more than {DIMENSIONS_MAX}"));
        }
        let dimensions = (0..count).map(|_| self.u64()).collect::<Result<_>>()?;
        Ok(Listed { dimensions, kind: self.u32()?, offset: self.u64()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(bytes: &mut Vec<u8>, text: &str) {
        bytes.extend((text.len() as u64).to_le_bytes());
        bytes.extend(text.as_bytes());
    }

    /// A file with settings of every type and two tensors.
    fn file() -> Vec<u8> {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend(2u64.to_le_bytes());
        let values: [(u32, Vec<u8>); 13] = [
            (0, vec![200]),
            (1, vec![200]),
            (2, vec![1, 2]),
            (3, vec![255, 255]),
            (4, vec![4, 0, 0, 0]),
            (5, vec![255; 4]),
            (6, 1e-5f32.to_le_bytes().into()),
            (7, vec![1]),
            (8, [&2u64.to_le_bytes()[..], b"hi"].concat()),
            (9, [&[5, 0, 0, 0, 2][..], &[0; 7], &[1, 0, 0, 0], &[255; 4]].concat()),
            (10, vec![255; 8]),
            (11, vec![255; 8]),
            (12, 0.25f64.to_le_bytes().into()),
        ];
        bytes.extend((values.len() as u64).to_le_bytes());
        for (kind, value) in values {
            text(&mut bytes, &format!("key {kind}"));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(value);
        }
        for (name, dimensions, kind, offset) in
            [("a", vec![32u64, 2], 8u32, 0u64), ("b", vec![3], 0, 96)]
        {
            text(&mut bytes, name);
            bytes.extend((dimensions.len() as u32).to_le_bytes());
            bytes.extend(dimensions.iter().flat_map(|n| n.to_le_bytes()));
            bytes.extend(kind.to_le_bytes());
            bytes.extend(offset.to_le_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(32) + 96 + 12, 0);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Header> {
        Header::read(bytes, bytes.len() as u64)
    }

    #[test]
    fn settings_of_every_type_and_places_of_tensors_are_read() {
        let header = read(&file()).unwrap();
        let values: Vec<Value> =
            (0..13).map(|kind| header.values[&format!("key {kind}")].clone()).collect();
        let expected = [
            Value::Integer(200),
            Value::Integer(-56),
            Value::Integer(513),
            Value::Integer(-1),
            Value::Integer(4),
            Value::Integer(-1),
            Value::Real(1e-5),
            Value::Truth(true),
            Value::Text("hi".into()),
            Value::Numbers(vec![1.0, -1.0]),
            Value::Integer(u64::MAX.into()),
            Value::Integer(-1),
            Value::Real(0.25),
        ];
        assert_eq!(values, expected);
        let (a, b) = (&header.tensors["a"], &header.tensors["b"]);
        assert_eq!((a.shape.as_slice(), a.kind, a.bytes), (&[2, 32][..], GgmlDType::Q8_0, 68));
        assert_eq!((b.shape.as_slice(), b.kind, b.bytes), (&[3][..], GgmlDType::F32, 12));
        assert_eq!(b.start, a.start + 96);
    }

    fn check(change: impl FnOnce(&mut Vec<u8>), reason: &str) {
        let mut bytes = file();
        change(&mut bytes);
        let error = read(&bytes).unwrap_err();
        assert!(error.contains(reason), "{error}");
    }

    #[test]
    fn what_a_file_promises_is_checked_against_its_length() {
        check(|bytes| bytes[0] = b'g', "is not a GGUF file");
        check(|bytes| bytes[4] = 1, "is GGUF of version 1");
        check(|bytes| bytes[4..8].reverse(), "big-endian");
        check(|bytes| bytes.truncate(100), "the file ends inside its header");
        check(|bytes| bytes.truncate(bytes.len() - 1), "tensor \"b\" ends at byte");
        check(|bytes| bytes[8..16].fill(255), "the file ends inside its header");
        check(|bytes| bytes[16..24].fill(255), "the file ends inside its header");
        check(|bytes| bytes[24..32].fill(127), "the file ends inside its header");
    }

    proptest! {
        #[test]
        fn damaged_headers_are_read_or_refused(
            damage in prop::collection::vec((8usize..500, any::<u8>()), 1..6),
            cut in 0usize..600,
        ) {
            let mut bytes = file();
            for (at, byte) in damage {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            bytes.truncate(bytes.len().max(cut) - cut.min(bytes.len()) / 2);
            if let Ok(header) = read(&bytes) {
                for place in header.tensors.values() {
                    prop_assert!(place.start + place.bytes as u64 <= bytes.len() as u64);
                }
            }
        }
    }
}
