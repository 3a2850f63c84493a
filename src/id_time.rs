//! Ids that say when they were made: UUIDv7 (RFC 9562, section 5.7) and ULID (its specification, "Layout").
//!
//! Both begin with 48 bits of milliseconds since the epoch, big-endian. Text and bytes are read:
//! ```text
//! uuid7   36 characters 8-4-4-4-12, or 32 hexadecimal digits, either case | 16 bytes (uuid, fixed[16], binary)
//!         version 7 and variant 0b10, else it is no such id
//! ulid    26 characters of Crockford's base 32, either case, I and L as 1, O as 0, at most 2^128 - 1 | 16 bytes
//! ```
//! The time is a function of the id alone, so every copy of a key has the same one.

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::DataType;
use uuid::Uuid;

use crate::event_time::EventTimeMs;
use crate::job::IdKind;

/// The time in the id of every row of a column; `None` where a row has no such id.
///
/// # Errors
/// A sentence, if there is no such column or its type holds no ids.
pub fn times_of(rows: &RecordBatch, column: &str, kind: IdKind) -> Result<Vec<Option<EventTimeMs>>, String> {
    let ids = rows.column_by_name(column).ok_or_else(|| format!("there is no column {column}"))?;
    let of_text = |text: Option<&str>| time_in_text(text?, kind);
    let of_bytes = |bytes: Option<&[u8]>| time_in_bytes(bytes?, kind);
    Ok(match ids.data_type() {
        DataType::Utf8 => ids.as_string::<i32>().iter().map(of_text).collect(),
        DataType::LargeUtf8 => ids.as_string::<i64>().iter().map(of_text).collect(),
        DataType::Utf8View => ids.as_string_view().iter().map(of_text).collect(),
        DataType::FixedSizeBinary(_) => ids.as_fixed_size_binary().iter().map(of_bytes).collect(),
        DataType::Binary => ids.as_binary::<i32>().iter().map(of_bytes).collect(),
        DataType::LargeBinary => ids.as_binary::<i64>().iter().map(of_bytes).collect(),
        DataType::BinaryView => ids.as_binary_view().iter().map(of_bytes).collect(),
        other => return Err(format!("column {column} is of type {other}, which holds no ids")),
    })
}

/// The time in an id's text.
pub fn time_in_text(text: &str, kind: IdKind) -> Option<EventTimeMs> {
    match kind {
        IdKind::Uuid7 => {
            // Other forms that the parser takes (braces, urn) are nobody's keys.
            let plain = matches!(text.len(), 32 | 36);
            let id = plain.then(|| Uuid::try_parse(text).ok()).flatten()?;
            time_in_bytes(id.as_bytes(), kind)
        }
        IdKind::Ulid => time_in_bytes(&ulid(text)?.to_be_bytes(), kind),
    }
}

/// The time in an id's 16 bytes.
pub fn time_in_bytes(bytes: &[u8], kind: IdKind) -> Option<EventTimeMs> {
    let id: [u8; 16] = bytes.try_into().ok()?;
    if kind == IdKind::Uuid7 && (id[6] >> 4 != 7 || id[8] >> 6 != 0b10) {
        return None;
    }
    let ms = id[..6].iter().fold(0i64, |ms, byte| ms << 8 | i64::from(*byte));
    Some(EventTimeMs(ms))
}

/// The 128 bits of a ULID's text.
fn ulid(text: &str) -> Option<u128> {
    let digits = text.as_bytes();
    // 26 digits hold 130 bits: the first one has three.
    if digits.len() != 26 || digit(digits[0])? > 7 {
        return None;
    }
    digits.iter().try_fold(0u128, |value, character| Some(value << 5 | u128::from(digit(*character)?)))
}

fn digit(character: u8) -> Option<u8> {
    const DIGITS: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
    let upper = match character.to_ascii_uppercase() {
        b'I' | b'L' => b'1',
        b'O' => b'0',
        other => other,
    };
    DIGITS.iter().position(|digit| *digit == upper).map(|value| value as u8)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ArrayRef, BinaryArray, FixedSizeBinaryArray, Int64Array, StringArray};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_time_of_the_example_in_rfc_9562_is_read_from_text_and_bytes() {
        // RFC 9562, appendix A.6: 2022-02-22T19:22:22Z.
        let text = "017F22E2-79B0-7CC3-98C4-DC0C0C07398F";
        let time = Some(EventTimeMs(1_645_557_742_000));
        for form in [text.to_owned(), text.to_lowercase(), text.replace('-', "")] {
            assert_eq!(time_in_text(&form, IdKind::Uuid7), time, "{form}");
        }
        assert_eq!(time_in_bytes(Uuid::parse_str(text).unwrap().as_bytes(), IdKind::Uuid7), time);
    }

    #[test]
    fn the_time_of_the_example_in_the_specification_of_ulid_is_read() {
        let time = Some(EventTimeMs(1_469_918_176_385));
        for text in ["01ARYZ6S41TSV4RRFFQ69G5FAV", "01aryz6s41tsv4rrffq69g5fav", "OLARYZ6S4ITSV4RRFFQ69G5FAV"]
        {
            assert_eq!(time_in_text(text, IdKind::Ulid), time, "{text}");
        }
    }

    #[test]
    fn what_is_no_such_id_has_no_time() {
        for text in [
            "",
            "01890a5d-ac96-474b-bcce-b302099a8057",
            "01890a5d-ac96-774b-0cce-b302099a8057",
            "{01890a5d-ac96-774b-bcce-b302099a8057}",
            "01890a5dac96-774b-bcce-b302099a8057-",
            "01890a5d-ac96-774b-bcce-b302099a805g",
            "01ARYZ6S41TSV4RRFFQ69G5FAV",
        ] {
            assert_eq!(time_in_text(text, IdKind::Uuid7), None, "{text}");
        }
        for text in
            ["", "81ARYZ6S41TSV4RRFFQ69G5FAV", "01ARYZ6S41TSV4RRFFQ69G5FAU", "01ARYZ6S41TSV4RRFFQ69G5FA"]
        {
            assert_eq!(time_in_text(text, IdKind::Ulid), None, "{text}");
        }
        assert_eq!(time_in_bytes(&[7; 15], IdKind::Ulid), None);
    }

    #[test]
    fn columns_of_every_type_that_holds_ids_are_read_and_nulls_have_no_time() {
        let id = Uuid::parse_str("01890a5d-ac96-774b-bcce-b302099a8057").unwrap();
        let time = Some(EventTimeMs(0x0189_0a5d_ac96));
        let columns: [ArrayRef; 3] = [
            Arc::new(StringArray::from(vec![Some(id.to_string()), None])),
            Arc::new(BinaryArray::from(vec![Some(id.as_bytes().as_slice()), None])),
            Arc::new(
                FixedSizeBinaryArray::try_from_sparse_iter_with_size(
                    [Some(id.as_bytes().as_slice()), None].into_iter(),
                    16,
                )
                .unwrap(),
            ),
        ];
        for column in columns {
            let rows = RecordBatch::try_from_iter([("id", column)]).unwrap();
            assert_eq!(times_of(&rows, "id", IdKind::Uuid7).unwrap(), [time, None]);
        }
        let numbers: ArrayRef = Arc::new(Int64Array::from(vec![1]));
        let rows = RecordBatch::try_from_iter([("id", numbers)]).unwrap();
        assert!(times_of(&rows, "id", IdKind::Ulid).unwrap_err().contains("holds no ids"));
        assert!(times_of(&rows, "other", IdKind::Ulid).unwrap_err().contains("no column other"));
    }

    proptest! {
        /// Goal: whatever 16 bytes say, text and bytes of them agree.
        #[test]
        fn text_and_bytes_agree(id in any::<u128>()) {
            let digits = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
            let text: String = (0..26).rev().map(|at| char::from(digits[(id >> (5 * at)) as usize & 31])).collect();
            prop_assert_eq!(time_in_text(&text, IdKind::Ulid), time_in_bytes(&id.to_be_bytes(), IdKind::Ulid));
            let uuid = Uuid::from_u128(id);
            prop_assert_eq!(time_in_text(&uuid.to_string(), IdKind::Uuid7), time_in_bytes(uuid.as_bytes(), IdKind::Uuid7));
        }
    }
}
