//! Packed sequences as Parquet, one row a sequence.
//!
//! ```text
//! input_ids      list<int32>     token ids of all segments, without padding
//! position_ids   list<int32>     position of each token in its segment: attention stays within segments
//! loss_mask      list<boolean>   whether the token is to be learned from those before it
//! segments       list<struct<item: string, source: int32, offset: int32, length: int32>>
//! shots          list<struct<round: int32, offset: int32, length: int32>>   files written before have none
//! ```
//!
//! Written and read column by column: the Arrow half of the format library is not needed for this, and is
//! most of its weight. The three columns of tokens are encoded by `pages.rs`.

use super::pages::{Levels, differences, truths};
use crate::error::{Error, Result};
use crate::record::{Segment, Sequence, Shot};
use bytes::Bytes;
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::column::reader::ColumnReaderImpl;
use parquet::column::writer::ColumnWriterImpl;
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DataType, Int32Type};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::ColumnDescPtr;
use std::path::Path;
use std::sync::Arc;

const SCHEMA: &str = "
message sequence {
  REQUIRED GROUP input_ids (LIST) { REPEATED GROUP list { REQUIRED INT32 element; } }
  REQUIRED GROUP position_ids (LIST) { REPEATED GROUP list { REQUIRED INT32 element; } }
  REQUIRED GROUP loss_mask (LIST) { REPEATED GROUP list { REQUIRED BOOLEAN element; } }
  REQUIRED GROUP segments (LIST) { REPEATED GROUP list { REQUIRED GROUP element {
    REQUIRED BYTE_ARRAY item (UTF8);
    REQUIRED INT32 source;
    REQUIRED INT32 offset;
    REQUIRED INT32 length;
  } } }
  REQUIRED GROUP shots (LIST) { REPEATED GROUP list { REQUIRED GROUP element {
    REQUIRED INT32 round;
    REQUIRED INT32 offset;
    REQUIRED INT32 length;
  } } }
}";

/// Columns of a file that was written without shots.
const COLUMNS_BEFORE_SHOTS: usize = 7;

/// Sequences of one row group.
const ROWS_PER_GROUP: usize = 256;

/// The bytes of a file that holds `sequences`. The same sequences give the same bytes.
///
/// # Errors
/// If the format library refuses.
pub fn write(sequences: &[Sequence]) -> Result<Vec<u8>> {
    encode(sequences).map_err(|error| Error::Stopped(format!("could not write sequences: {error}")))
}

/// The sequences in the bytes of the file `path`.
///
/// # Errors
/// If they do not hold sequences.
pub fn read(path: &Path, bytes: Vec<u8>) -> Result<Vec<Sequence>> {
    decode(bytes.into()).map_err(|error| Error::malformed(path, error))
}

fn encode(sequences: &[Sequence]) -> std::result::Result<Vec<u8>, ParquetError> {
    file(SCHEMA, sequences, |rows, group, columns| {
        write_tokens(rows, group, columns)?;
        write_segments(rows, group)?;
        write_shots(rows, group)
    })
}

type Rows<'a> = SerializedRowGroupWriter<'a, Vec<u8>>;

/// A file whose row groups `write` writes.
fn file(
    schema: &str,
    sequences: &[Sequence],
    write: impl Fn(
        &mut Rows<'_>,
        &[Sequence],
        &[ColumnDescPtr],
    ) -> std::result::Result<(), ParquetError>,
) -> std::result::Result<Vec<u8>, ParquetError> {
    let schema = Arc::new(parse_message_type(schema)?);
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
        .set_statistics_enabled(EnabledStatistics::None)
        .set_created_by(concat!("headwater ", env!("CARGO_PKG_VERSION")).into())
        .build();
    let tokens = sequences.iter().map(|sequence| sequence.tokens.len()).sum::<usize>();
    let sink = Vec::with_capacity(3 * tokens); // fewer than three bytes a token
    let mut file = SerializedFileWriter::new(sink, schema, Arc::new(properties))?;
    let columns = file.schema_descr().columns().to_vec();
    for group in sequences.chunks(ROWS_PER_GROUP) {
        let mut rows = file.next_row_group()?;
        write(&mut rows, group, &columns)?;
        rows.close()?;
    }
    file.into_inner()
}

/// The columns of tokens.
fn write_tokens(
    rows: &mut Rows<'_>,
    group: &[Sequence],
    columns: &[ColumnDescPtr],
) -> std::result::Result<(), ParquetError> {
    let levels = Levels::of_tokens(group);
    let count = group.iter().map(|sequence| sequence.tokens.len()).sum();
    let mut numbers: Vec<i32> = Vec::with_capacity(count);
    for sequence in group {
        numbers.extend(sequence.tokens.iter().map(|&id| id as i32));
    }
    // Packed to the bits they need, ids are hardly compressed any further.
    let page = levels.page(3 * count, |page| differences(&numbers, page));
    let packed = Encoding::DELTA_BINARY_PACKED;
    levels.append(rows, columns[0].clone(), packed, false, page)?;
    numbers.clear();
    for sequence in group {
        for segment in &sequence.segments {
            numbers.extend(0..segment.length as i32);
        }
    }
    // Positions rise by one: as differences they are nothing.
    let page = levels.page(count / 8, |page| differences(&numbers, page));
    levels.append(rows, columns[1].clone(), packed, true, page)?;
    let mut learned = Vec::with_capacity(count);
    group.iter().for_each(|sequence| learned.extend_from_slice(&sequence.learned));
    let page = levels.page(count / 8 + 1, |page| truths(&learned, page));
    levels.append(rows, columns[2].clone(), Encoding::PLAIN, true, page)?;
    Ok(())
}

/// The columns of segments.
fn write_segments(
    rows: &mut Rows<'_>,
    group: &[Sequence],
) -> std::result::Result<(), ParquetError> {
    let segments = Lists::of(group, |sequence| sequence.segments.len());
    segments.write::<ByteArrayType>(rows, group, |sequence, values| {
        values.extend(sequence.segments.iter().map(|segment| segment.item.as_str().into()));
    })?;
    for field in [
        |segment: &Segment| segment.source,
        |segment: &Segment| segment.offset,
        |segment: &Segment| segment.length,
    ] {
        segments.write::<Int32Type>(rows, group, |sequence, values| {
            values.extend(sequence.segments.iter().map(|segment| field(segment) as i32));
        })?;
    }
    Ok(())
}

/// The columns of shots.
fn write_shots(rows: &mut Rows<'_>, group: &[Sequence]) -> std::result::Result<(), ParquetError> {
    let shots = Lists::of(group, |sequence| sequence.shots.len());
    for field in [|shot: &Shot| shot.round, |shot: &Shot| shot.offset, |shot: &Shot| shot.length] {
        shots.write::<Int32Type>(rows, group, |sequence, values| {
            values.extend(sequence.shots.iter().map(|shot| field(shot) as i32));
        })?;
    }
    Ok(())
}

/// Where the lists of a column start and which are empty: the levels of Parquet.
struct Lists {
    values: usize,
    defined: Vec<i16>,
    repeated: Vec<i16>,
}

impl Lists {
    /// Lists of such lengths, one for each sequence.
    fn of(sequences: &[Sequence], length: impl Fn(&Sequence) -> usize) -> Self {
        let values = sequences.iter().map(&length).sum();
        let (mut defined, mut repeated) = (Vec::with_capacity(values), Vec::with_capacity(values));
        for length in sequences.iter().map(length) {
            let entries = length.max(1); // an empty list is one undefined entry
            defined.resize(defined.len() + entries, i16::from(length > 0));
            repeated.push(0);
            repeated.resize(repeated.len() + entries - 1, 1);
        }
        Lists { values, defined, repeated }
    }

    /// Writes the next column.
    fn write<T: DataType>(
        &self,
        rows: &mut SerializedRowGroupWriter<'_, Vec<u8>>,
        sequences: &[Sequence],
        list: impl Fn(&Sequence, &mut Vec<T::T>),
    ) -> std::result::Result<(), ParquetError> {
        let mut values = Vec::with_capacity(self.values);
        sequences.iter().for_each(|sequence| list(sequence, &mut values));
        let mut column =
            rows.next_column()?.ok_or_else(|| ParquetError::EOF("no column".into()))?;
        let writer: &mut ColumnWriterImpl<'_, T> = column.typed();
        writer.write_batch(&values, Some(&self.defined), Some(&self.repeated))?;
        column.close()
    }
}

fn decode(bytes: Bytes) -> std::result::Result<Vec<Sequence>, ParquetError> {
    let file = SerializedFileReader::new(bytes)?;
    let mut sequences = Vec::new();
    for index in 0..file.num_row_groups() {
        let rows = file.get_row_group(index)?;
        let ids = get::<Int32Type>(&*rows, 0)?;
        let learned = get::<BoolType>(&*rows, 2)?;
        let items = get::<ByteArrayType>(&*rows, 3)?;
        let [sources, offsets, lengths] = [4, 5, 6].map(|column| get::<Int32Type>(&*rows, column));
        let (sources, offsets, lengths) = (sources?, offsets?, lengths?);
        let mut shots = shots(&*rows, ids.len())?;
        for row in 0..ids.len() {
            let segment = |i: usize| -> std::result::Result<Segment, ParquetError> {
                let item: &ByteArray = &items[row][i];
                Ok(Segment {
                    item: item.as_utf8()?.to_owned(),
                    source: sources[row][i] as u32,
                    offset: offsets[row][i] as u32,
                    length: lengths[row][i] as u32,
                })
            };
            sequences.push(Sequence {
                tokens: ids[row].iter().map(|&id| id as u32).collect(),
                learned: learned[row].clone(),
                segments: (0..items[row].len())
                    .map(segment)
                    .collect::<std::result::Result<_, _>>()?,
                shots: std::mem::take(&mut shots[row]),
            });
        }
    }
    Ok(sequences)
}

/// The shots of each sequence of a row group; none where they were not written down.
fn shots(
    rows: &dyn RowGroupReader,
    count: usize,
) -> std::result::Result<Vec<Vec<Shot>>, ParquetError> {
    if rows.metadata().num_columns() == COLUMNS_BEFORE_SHOTS {
        return Ok(vec![Vec::new(); count]);
    }
    let [rounds, offsets, lengths] = [7, 8, 9].map(|column| get::<Int32Type>(rows, column));
    let columns = rounds?.into_iter().zip(offsets?).zip(lengths?);
    let shot = |((&round, &offset), &length): ((&i32, &i32), &i32)| Shot {
        round: round as u32,
        offset: offset as u32,
        length: length as u32,
    };
    let of_row = |((rounds, offsets), lengths): ((Vec<i32>, Vec<i32>), Vec<i32>)| {
        rounds.iter().zip(&offsets).zip(&lengths).map(shot).collect()
    };
    Ok(columns.map(of_row).collect())
}

/// Reads a column of a row group: a list of values for each sequence.
fn get<T: DataType>(
    rows: &dyn RowGroupReader,
    column: usize,
) -> std::result::Result<Vec<Vec<T::T>>, ParquetError> {
    let count = rows.metadata().num_rows() as usize;
    let reader = rows.get_column_reader(column)?;
    let mut reader: ColumnReaderImpl<T> = parquet::column::reader::get_typed_column_reader(reader);
    let (mut values, mut defined, mut repeated) = (Vec::new(), Vec::new(), Vec::new());
    let mut read = 0;
    while read < count {
        let (records, _, _) = reader.read_records(
            count - read,
            Some(&mut defined),
            Some(&mut repeated),
            &mut values,
        )?;
        if records == 0 {
            return Err(ParquetError::EOF(format!("column {column} ends after {read} rows")));
        }
        read += records;
    }
    let mut values = values.into_iter();
    let mut lists: Vec<Vec<T::T>> = Vec::with_capacity(count);
    for (defined, repeated) in defined.into_iter().zip(repeated) {
        if repeated == 0 {
            lists.push(Vec::new());
        }
        if defined > 0 {
            let list = lists.last_mut().expect("the first entry of a column starts a list");
            list.extend(values.next());
        }
    }
    Ok(lists)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(sequences: &[Sequence]) {
        let bytes = write(sequences).unwrap();
        assert_eq!(bytes, write(sequences).unwrap());
        assert_eq!(decode(bytes.into()).unwrap(), sequences);
    }

    fn sequence(segments: &[u32]) -> Sequence {
        let mut sequence = Sequence::default();
        for (index, &length) in segments.iter().enumerate() {
            let tokens = (0..length).map(|token| token * 7 + index as u32);
            sequence.tokens.extend(tokens);
            sequence.learned.extend((0..length).map(|token| token % 2 == 0));
            let item = format!("item ä {index}");
            sequence.segments.push(Segment { item, source: 1, offset: 5, length });
            if index % 2 == 0 {
                sequence.shots.push(Shot { round: index as u32, offset: 9, length });
            }
        }
        sequence
    }

    #[test]
    fn what_is_written_is_read_back() {
        check(&[]);
        check(&[sequence(&[3, 1, 200]), sequence(&[]), sequence(&[1])]);
        check(&vec![sequence(&[10, 20]); 2500]);
        for length in [1, 2, 32, 33, 127, 128, 129, 130, 161, 257] {
            check(&[sequence(&[length])]);
        }
    }

    #[test]
    fn ids_of_any_size_are_read_back() {
        let mut stream = crate::seed::stream(1, "packed", "test");
        for bits in 0..=32 {
            let id = |_| (stream.index(1 << 32) >> (32 - bits)) as u32;
            let tokens: Vec<u32> = (0..500).map(id).collect();
            let learned = tokens.iter().map(|id| id % 3 > 0).collect();
            let item = String::from("item");
            let segments = vec![Segment { item, source: 0, offset: 0, length: 500 }];
            check(&[Sequence { tokens, learned, segments, ..Sequence::default() }]);
        }
    }

    #[test]
    fn a_file_without_shots_is_read_as_if_there_were_none() {
        let (before, _) = SCHEMA.split_once("  REQUIRED GROUP shots").unwrap();
        let mut all = vec![sequence(&[3, 1, 200]), sequence(&[]), sequence(&[1])];
        let bytes = file(&format!("{before}}}"), &all, |rows, group, columns| {
            write_tokens(rows, group, columns)?;
            write_segments(rows, group)
        });
        all.iter_mut().for_each(|sequence| sequence.shots.clear());
        assert_eq!(decode(bytes.unwrap().into()).unwrap(), all);
    }
}
