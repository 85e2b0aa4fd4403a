//! Scalars as TensorBoard reads them: records of TensorFlow, each with an event.
//!
//! ```text
//! record   length (u64), checksum of it (u32), event, checksum of it (u32); little-endian
//! event    wall_time = 1: double, step = 2: int64, and one of
//!          file_version = 3: string, summary = 5: { value = 1: { tag = 1: string, simple_value = 2: float } },
//!          session_log = 7: { status = 1: START }
//! ```
//!
//! The framing is that of `tensorflow/core/lib/io/record_writer.cc`, the messages are those of
//! `tensorflow/core/util/event.proto` and `tensorflow/core/framework/summary.proto`. Readers look for files
//! whose names hold `tfevents`.

/// What TensorBoard takes for the current version of the format.
const VERSION: &str = "brain.Event:2";

/// Added to a rotated checksum, so that the checksum of data that holds checksums is no weak one.
const MASK: u32 = 0xa282_ead8;

// Keys of fields: number * 8 + type (0: varint, 1: eight bytes, 2: bytes with their length, 5: four bytes).
const WALL_TIME: u8 = 0x09;
const STEP: u8 = 0x10;
const FILE_VERSION: u8 = 0x1a;
const SUMMARY: u8 = 0x2a;
const VALUE: u8 = 0x0a;
const TAG: u8 = 0x0a;
const SIMPLE_VALUE: u8 = 0x15;
const SESSION_LOG: u8 = 0x3a;
const STATUS_START: [u8; 2] = [0x08, 0x01];

/// The first two records of a file: its version, and that whatever a reader saw of earlier files is void.
/// `wall_time` is in seconds since 1970.
pub fn start(wall_time: f64) -> Vec<u8> {
    let mut version = event(wall_time, 0);
    field(&mut version, FILE_VERSION, VERSION.as_bytes());
    let mut session = event(wall_time, 0);
    field(&mut session, SESSION_LOG, &STATUS_START);
    [record(&version), record(&session)].concat()
}

/// A record of the scalars of one step, each with its tag. `wall_time` is in seconds since 1970.
pub fn scalars<'a>(
    wall_time: f64,
    step: u64,
    values: impl IntoIterator<Item = (&'a str, f32)>,
) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, value) in values {
        let mut message = Vec::new();
        field(&mut message, TAG, tag.as_bytes());
        message.push(SIMPLE_VALUE);
        message.extend(value.to_le_bytes());
        field(&mut summary, VALUE, &message);
    }
    let mut event = event(wall_time, step);
    field(&mut event, SUMMARY, &summary);
    record(&event)
}

fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut event = vec![WALL_TIME];
    event.extend(wall_time.to_le_bytes());
    if step > 0 {
        event.push(STEP);
        varint(&mut event, step);
    }
    event
}

fn field(message: &mut Vec<u8>, key: u8, bytes: &[u8]) {
    message.push(key);
    varint(message, bytes.len() as u64);
    message.extend(bytes);
}

/// Seven bits a byte, the lowest first.
fn varint(message: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        message.push(number as u8 | 0x80);
        number >>= 7;
    }
    message.push(number as u8);
}

fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    let parts = [&length[..], &checksum(&length), event, &checksum(event)];
    parts.concat()
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(MASK).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(found: &[u8], expected: &str) {
        let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, expected);
    }

    /// The bytes are those of `tensorboard.summary.writer.record_writer` (TensorBoard 2.21).
    #[test]
    fn records_are_those_that_tensorboard_writes() {
        check(
            &start(1.5),
            "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c\
             0d000000000000003c37b83409000000000000f83f3a020801b718825c",
        );
        check(
            &scalars(2.25, 300, [("train/loss", 0.5), ("train/lr", 0.0)]),
            "3200000000000000241956ec09000000000000024010ac022a240a110a0a747261696e2f6c6f7373\
             150000003f0a0f0a08747261696e2f6c721500000000bc005b4e",
        );
    }
}
