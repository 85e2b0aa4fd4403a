//! Columns of lists, encoded for Parquet a whole page at a time.
//!
//! ```text
//! page = repetition levels (runs) + definition levels (runs) + values
//! ```
//!
//! The format library encodes a value at a time, which for token ids takes as long as tokenising them. Here
//! levels are written as the runs they are, and numbers as differences, packed 32 at a time (encodings `RLE`
//! and `DELTA_BINARY_PACKED` of the Parquet format, Encodings.md). Headers and footers are left to the library.

use crate::record::Sequence;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::column::page::{CompressedPage, Page, PageWriter};
use parquet::column::writer::ColumnCloseResult;
use parquet::errors::{ParquetError, Result};
use parquet::file::metadata::ColumnChunkMetaData;
use parquet::file::writer::{SerializedPageWriter, SerializedRowGroupWriter, TrackedWrite};
use parquet::schema::types::ColumnDescPtr;

/// Numbers of a block that has its own smallest difference.
const BLOCK: usize = 128;

/// Numbers that are packed with the same width.
const MINIBLOCK: usize = 32;

/// zstd level of compressed pages: what is compressed here is nearly nothing already.
const LEVEL: i32 = 1;

/// Lists of so many values each, as levels.
pub(super) struct Levels {
    rows: usize,
    /// Values, and one for each empty list.
    entries: usize,
    bytes: Vec<u8>,
}

impl Levels {
    /// One list of tokens for each sequence.
    pub(super) fn of_tokens(sequences: &[Sequence]) -> Self {
        let (mut repeated, mut defined) = (Vec::new(), Vec::new());
        let mut entries = 0;
        for sequence in sequences {
            let count = sequence.tokens.len();
            run(&mut repeated, 0, 1);
            run(&mut repeated, 1, count.saturating_sub(1));
            run(&mut defined, u8::from(count > 0), count.max(1));
            entries += count.max(1);
        }
        let mut bytes = Vec::with_capacity(repeated.len() + defined.len() + 8);
        for levels in [repeated, defined] {
            bytes.extend((levels.len() as u32).to_le_bytes());
            bytes.extend(levels);
        }
        Levels { rows: sequences.len(), entries, bytes }
    }

    /// A page that starts with these levels; `values` appends the rest.
    pub(super) fn page(&self, room: usize, values: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
        let mut page = Vec::with_capacity(self.bytes.len() + room);
        page.extend_from_slice(&self.bytes);
        values(&mut page);
        page
    }

    /// Adds a column of one page to a row group: `next` is its description.
    pub(super) fn append(
        &self,
        rows: &mut SerializedRowGroupWriter<'_, Vec<u8>>,
        next: ColumnDescPtr,
        encoding: Encoding,
        is_compressed: bool,
        page: Vec<u8>,
    ) -> Result<()> {
        let whole = page.len();
        let (compression, page) = match is_compressed {
            true => {
                let small = zstd::bulk::compress(&page, LEVEL)
                    .map_err(|error| ParquetError::External(Box::new(error)))?;
                (Compression::ZSTD(ZstdLevel::try_new(LEVEL)?), small)
            }
            false => (Compression::UNCOMPRESSED, page),
        };
        let page = Page::DataPage {
            buf: page.into(),
            num_values: self.entries as u32,
            encoding,
            def_level_encoding: Encoding::RLE,
            rep_level_encoding: Encoding::RLE,
            statistics: None,
        };
        let mut sink = TrackedWrite::new(Vec::new());
        let written =
            SerializedPageWriter::new(&mut sink).write_page(CompressedPage::new(page, whole))?;
        let metadata = ColumnChunkMetaData::builder(next)
            .set_encodings(vec![Encoding::RLE, encoding])
            .set_compression(compression)
            .set_num_values(self.entries as i64)
            .set_total_compressed_size(written.compressed_size as i64)
            .set_total_uncompressed_size(written.uncompressed_size as i64)
            .set_data_page_offset(0)
            .build()?;
        let close = ColumnCloseResult {
            bytes_written: written.bytes_written,
            rows_written: self.rows as u64,
            metadata,
            bloom_filter: None,
            column_index: None,
            offset_index: None,
        };
        rows.append_column(&bytes::Bytes::from(sink.into_inner()?), close)
    }
}

/// Appends a run of equal levels of one bit.
fn run(levels: &mut Vec<u8>, level: u8, count: usize) {
    if count > 0 {
        variable(levels, (count as u64) << 1);
        levels.push(level);
    }
}

/// Appends a number in as many bytes as it needs, seven bits each.
fn variable(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// A signed number as an unsigned one that is small if it is.
fn zigzag(number: i32) -> u64 {
    u64::from(((number << 1) ^ (number >> 31)).cast_unsigned())
}

/// Appends numbers as their differences.
pub(super) fn differences(numbers: &[i32], bytes: &mut Vec<u8>) {
    for head in [BLOCK, BLOCK / MINIBLOCK, numbers.len()] {
        variable(bytes, head as u64);
    }
    let Some((&first, rest)) = numbers.split_first() else {
        return variable(bytes, 0);
    };
    variable(bytes, zigzag(first));
    for (block, before) in rest.chunks(BLOCK).zip(numbers.chunks(BLOCK)) {
        let mut steps = [i32::MAX; BLOCK];
        for ((step, number), before) in steps.iter_mut().zip(block).zip(before) {
            *step = number.wrapping_sub(*before);
        }
        let least = steps.iter().fold(i32::MAX, |least, &step| least.min(step));
        let mut above = steps.map(|step| step.wrapping_sub(least).cast_unsigned());
        above[block.len()..].fill(0); // behind the last
        variable(bytes, zigzag(least));
        let miniblocks = above.as_chunks::<MINIBLOCK>().0;
        let widths = miniblocks.iter().map(|numbers| {
            let all = numbers.iter().fold(0, |all, number| all | number);
            (u32::BITS - all.leading_zeros()) as u8
        });
        bytes.extend(widths.clone());
        let used = block.len().div_ceil(MINIBLOCK);
        for (numbers, width) in miniblocks.iter().zip(widths).take(used) {
            pack(numbers, width.into(), bytes);
        }
    }
}

/// Appends the lowest `width` bits of each number.
fn pack(numbers: &[u32; MINIBLOCK], width: usize, bytes: &mut Vec<u8>) {
    let mut packed = [0; MINIBLOCK];
    PACKERS[width](numbers, &mut packed);
    packed[..width].iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
}

type Packer = fn(&[u32; MINIBLOCK], &mut [u32; MINIBLOCK]);

/// One for each width, so that every number has a known place.
#[rustfmt::skip]
const PACKERS: [Packer; 33] = [
    |_, _| (), packed::<1>, packed::<2>, packed::<3>, packed::<4>, packed::<5>, packed::<6>, packed::<7>,
    packed::<8>, packed::<9>, packed::<10>, packed::<11>, packed::<12>, packed::<13>, packed::<14>,
    packed::<15>, packed::<16>, packed::<17>, packed::<18>, packed::<19>, packed::<20>, packed::<21>,
    packed::<22>, packed::<23>, packed::<24>, packed::<25>, packed::<26>, packed::<27>, packed::<28>,
    packed::<29>, packed::<30>, packed::<31>, packed::<32>,
];

/// Packs numbers of `WIDTH` bits into words of 32.
fn packed<const WIDTH: usize>(numbers: &[u32; MINIBLOCK], words: &mut [u32; MINIBLOCK]) {
    for index in 0..MINIBLOCK {
        let (word, bit) = (index * WIDTH / 32, index * WIDTH % 32);
        words[word] |= numbers[index] << bit;
        if bit + WIDTH > 32 {
            words[word + 1] |= numbers[index] >> (32 - bit);
        }
    }
}

/// Appends truth values, a bit each, the first one lowest.
pub(super) fn truths(values: &[bool], bytes: &mut Vec<u8>) {
    let (eights, rest) = values.as_chunks::<8>();
    let byte = |values: &[bool]| {
        let bits = values.iter().enumerate().map(|(index, &value)| u8::from(value) << index);
        bits.fold(0, |byte, bit| byte | bit)
    };
    bytes.extend(eights.iter().map(|eight| {
        // Value i becomes bit 56 + i: no two of these products meet.
        let marks = u64::from_le_bytes(eight.map(u8::from));
        (marks.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8
    }));
    if !rest.is_empty() {
        bytes.push(byte(rest));
    }
}
