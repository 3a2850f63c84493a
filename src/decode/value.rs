//! One value: the raw text of a JSON value, or bytes of a key or header, becomes a value of the column's type.
//!
//! Numbers are read from their own digits and never pass through an f64 on the way to an integer, a decimal or a
//! time. The module head of `decode` lists the rules; each function here is one row of it.

use std::fmt;
use std::ops::Range;

use iceberg::spec::PrimitiveType;
use serde::Deserializer as _;
use serde::de::{Error, Visitor};
use serde_json::value::RawValue;

use super::scan::Number;
use super::time;
use super::verdict::Refusal;
use crate::job::TimeUnit;
use crate::letter::ReasonCode;

/// A value on its way into a column. Text and bytes point into the chunk, or into [`Scratch`] where they had to be
/// made (escapes, base64).
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'a> {
    Null,
    Boolean(bool),
    /// Integers and days.
    Int(i32),
    /// Integers and microseconds.
    Long(i64),
    Float(f32),
    Double(f64),
    /// The unscaled value.
    Decimal(i128),
    Uuid([u8; 16]),
    Text(Text<'a>),
    Bytes(Bytes<'a>),
}

/// Text in the chunk or in the scratch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Text<'a> {
    Chunk(&'a str),
    Scratch(Range<usize>),
}

/// Bytes in the chunk or in the scratch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Bytes<'a> {
    Chunk(&'a [u8]),
    Scratch(Range<usize>),
}

/// Room for values that are not verbatim in the chunk. Cleared for each row; keeps its allocation.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    text: String,
    bytes: Vec<u8>,
}

impl Scratch {
    pub(super) fn clear(&mut self) {
        self.text.clear();
        self.bytes.clear();
    }

    /// The kept members as one JSON object, null if there are none.
    pub(super) fn keep_object<'a>(&mut self, members: &str) -> Value<'a> {
        if members.is_empty() {
            return Value::Null;
        }
        let start = self.text.len();
        self.text.extend(["{", members, "}"]);
        Value::Text(Text::Scratch(start..self.text.len()))
    }

    pub(super) fn text<'t>(&'t self, text: &Text<'t>) -> &'t str {
        match text {
            Text::Chunk(text) => text,
            Text::Scratch(range) => &self.text[range.clone()],
        }
    }

    pub(super) fn bytes<'t>(&'t self, bytes: &Bytes<'t>) -> &'t [u8] {
        match bytes {
            Bytes::Chunk(bytes) => bytes,
            Bytes::Scratch(range) => &self.bytes[range.clone()],
        }
    }
}

/// What a JSON value is, by its first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum JsonType {
    Null,
    Boolean,
    Number,
    String,
    Array,
    Object,
}

impl JsonType {
    /// The type of a value whose grammar was checked and whose white space was cut.
    pub(super) fn of(raw: &str) -> Self {
        match raw.as_bytes().first() {
            Some(b'n') | None => Self::Null,
            Some(b't' | b'f') => Self::Boolean,
            Some(b'"') => Self::String,
            Some(b'[') => Self::Array,
            Some(b'{') => Self::Object,
            Some(_) => Self::Number,
        }
    }

    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Boolean => "boolean",
            Self::Number => "number",
            Self::String => "string",
            Self::Array => "array",
            Self::Object => "object",
        }
    }
}

/// Reads one JSON value for a column of type `kind`. `unit` says what numbers mean for a time.
pub(super) fn from_json<'a>(
    raw: &'a str,
    kind: &PrimitiveType,
    unit: Option<TimeUnit>,
    scratch: &mut Scratch,
) -> Result<Value<'a>, Refusal> {
    match (JsonType::of(raw), kind) {
        (JsonType::Null, _) => Ok(Value::Null),
        (JsonType::Boolean, PrimitiveType::Boolean) => Ok(Value::Boolean(raw == "true")),
        (JsonType::Number, _) => from_number(raw, kind, unit),
        (JsonType::String, PrimitiveType::String) => Ok(Value::Text(unescape(raw, scratch)?)),
        (JsonType::String, _) => from_string(raw, kind, unit, scratch),
        _ => Err(Refusal::wrong_type(expected(kind, unit))),
    }
}

fn from_number<'a>(raw: &str, kind: &PrimitiveType, unit: Option<TimeUnit>) -> Result<Value<'a>, Refusal> {
    match (kind, unit) {
        (PrimitiveType::Int, _) => {
            let value = integer(raw)?;
            i32::try_from(value).map(Value::Int).map_err(|_| Refusal::out_of_range("an int has 32 bits"))
        }
        (PrimitiveType::Long, _) => Ok(Value::Long(integer(raw)?)),
        (PrimitiveType::Float, _) => Ok(Value::Float(float(raw)?)),
        (PrimitiveType::Double, _) => Ok(Value::Double(double(raw)?)),
        (PrimitiveType::Decimal { precision, scale }, _) => {
            Ok(Value::Decimal(decimal(raw, *precision, *scale)?))
        }
        (PrimitiveType::Time, Some(unit)) => Ok(Value::Long(time::in_day(micros(raw, unit)?)?)),
        (PrimitiveType::Timestamp | PrimitiveType::Timestamptz, Some(unit)) => {
            Ok(Value::Long(time::in_years(micros(raw, unit)?)?))
        }
        _ => Err(Refusal::wrong_type(expected(kind, unit))),
    }
}

fn from_string<'a>(
    raw: &'a str,
    kind: &PrimitiveType,
    unit: Option<TimeUnit>,
    scratch: &mut Scratch,
) -> Result<Value<'a>, Refusal> {
    match unescape(raw, scratch)? {
        Text::Chunk(text) => from_text(text, kind, unit, &mut scratch.bytes),
        Text::Scratch(range) => from_text(&scratch.text[range], kind, unit, &mut scratch.bytes),
    }
}

/// Reads a JSON string without escapes, given without its quotes, for a column of any type but string.
pub(super) fn from_plain_string<'a>(
    text: &str,
    kind: &PrimitiveType,
    unit: Option<TimeUnit>,
    scratch: &mut Scratch,
) -> Result<Value<'a>, Refusal> {
    from_text(text, kind, unit, &mut scratch.bytes)
}

fn from_text<'a>(
    text: &str,
    kind: &PrimitiveType,
    unit: Option<TimeUnit>,
    bytes: &mut Vec<u8>,
) -> Result<Value<'a>, Refusal> {
    match kind {
        PrimitiveType::Decimal { precision, scale } if is_json_number(text) => {
            Ok(Value::Decimal(decimal(text, *precision, *scale)?))
        }
        PrimitiveType::Date => Ok(Value::Int(time::date(text)?)),
        PrimitiveType::Time => Ok(Value::Long(time::time_of_day(text)?)),
        PrimitiveType::Timestamp => Ok(Value::Long(time::timestamp(text)?)),
        PrimitiveType::Timestamptz => Ok(Value::Long(time::timestamptz(text)?)),
        PrimitiveType::Uuid => Ok(Value::Uuid(uuid(text)?)),
        PrimitiveType::Binary => Ok(Value::Bytes(Bytes::Scratch(base64(text, bytes)?))),
        PrimitiveType::Fixed(length) => {
            let range = base64(text, bytes)?;
            if range.len() as u64 != *length {
                return Err(Refusal::out_of_range("the number of bytes is not the column's"));
            }
            Ok(Value::Bytes(Bytes::Scratch(range)))
        }
        _ => Err(Refusal::wrong_type(expected(kind, unit))),
    }
}

/// Bytes of a key or header: UTF-8 text for a string column, as they are for a binary one.
pub(super) fn from_bytes<'a>(bytes: &'a [u8], kind: &PrimitiveType) -> Result<Value<'a>, Refusal> {
    if *kind == PrimitiveType::Binary {
        return Ok(Value::Bytes(Bytes::Chunk(bytes)));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(Value::Text(Text::Chunk(text))),
        Err(_) => Err(Refusal {
            code: ReasonCode::InvalidUtf8,
            why: "expected UTF-8 text; use type binary to keep the bytes as they are",
        }),
    }
}

/// What a column takes, for people.
fn expected(kind: &PrimitiveType, unit: Option<TimeUnit>) -> &'static str {
    match (kind, unit) {
        (PrimitiveType::Boolean, _) => "expected true or false",
        (PrimitiveType::Int | PrimitiveType::Long, _) => "expected an integer number",
        (PrimitiveType::Float | PrimitiveType::Double, _) => "expected a number",
        (PrimitiveType::Decimal { .. }, _) => "expected a number, or a string that holds one",
        (PrimitiveType::Date, _) => "expected a string of the form YYYY-MM-DD",
        (PrimitiveType::Time, None) => "expected a string of the form HH:MM:SS (for numbers set `unit`)",
        (PrimitiveType::Timestamp | PrimitiveType::Timestamptz, None) => {
            "expected a string that holds a timestamp (for numbers set `unit`)"
        }
        (PrimitiveType::Time | PrimitiveType::Timestamp | PrimitiveType::Timestamptz, Some(_)) => {
            "expected a number of the column's `unit`, or a string"
        }
        (PrimitiveType::Uuid, _) => "expected a string that holds a UUID",
        (PrimitiveType::Binary | PrimitiveType::Fixed(_), _) => "expected a string that holds base64",
        _ => "expected a string",
    }
}

/// Whether digits stand without fraction and exponent. `1.0` and `1e3` are no integers: what a producer writes as a
/// float today it writes as `1.5` tomorrow.
fn is_integer(raw: &str) -> bool {
    !raw.bytes().any(|byte| matches!(byte, b'.' | b'e' | b'E'))
}

fn integer(raw: &str) -> Result<i64, Refusal> {
    match raw.parse() {
        Ok(value) => Ok(value),
        Err(_) if is_integer(raw) => Err(Refusal::out_of_range("a long has 64 bits")),
        Err(_) => Err(Refusal::wrong_type("expected an integer number, without fraction and exponent")),
    }
}

const TOO_LARGE: &str = "the number is too large for a floating-point column";
const TOO_SMALL: &str = "the number is not zero but would become zero";
const NOT_EXACT: &str = "the integer has no exact floating-point value; use type long or decimal";
/// Every integer of this many digits is an exact f64 (below 2^53).
const DOUBLE_DIGITS_EXACT: usize = 15;
/// Every integer of this many digits is an exact f32 (below 2^24).
const FLOAT_DIGITS_EXACT: usize = 7;

/// The nearest f64, ties to even. The standard library rounds correctly; serde_json without its feature
/// `float_roundtrip` does not, which is why it is not asked.
fn double(raw: &str) -> Result<f64, Refusal> {
    let value: f64 = raw.parse().map_err(|_| Refusal::wrong_type("expected a number"))?;
    if value.is_infinite() {
        return Err(Refusal::out_of_range(TOO_LARGE));
    }
    if value == 0.0 && !is_zero(raw) {
        return Err(Refusal::out_of_range(TOO_SMALL));
    }
    if raw.len() > DOUBLE_DIGITS_EXACT && is_integer(raw) && format!("{value:.0}") != raw {
        return Err(Refusal::out_of_range(NOT_EXACT));
    }
    Ok(value)
}

/// The nearest f32, straight from the digits: rounding twice, through an f64, could miss it.
fn float(raw: &str) -> Result<f32, Refusal> {
    let value: f32 = raw.parse().map_err(|_| Refusal::wrong_type("expected a number"))?;
    if value.is_infinite() {
        return Err(Refusal::out_of_range(TOO_LARGE));
    }
    if value == 0.0 && !is_zero(raw) {
        return Err(Refusal::out_of_range(TOO_SMALL));
    }
    if raw.len() > FLOAT_DIGITS_EXACT && is_integer(raw) && format!("{value:.0}") != raw {
        return Err(Refusal::out_of_range(NOT_EXACT));
    }
    Ok(value)
}

/// Whether all digits before the exponent are zero.
fn is_zero(raw: &str) -> bool {
    raw.bytes().take_while(|byte| !matches!(byte, b'e' | b'E')).all(|byte| !matches!(byte, b'1'..=b'9'))
}

/// Most digits of a decimal: Iceberg's bound, and what an i128 holds.
pub(super) const DECIMAL_DIGITS_MAX: u32 = 38;
/// 10^0 to 10^38.
const POWERS_OF_TEN: [i128; DECIMAL_DIGITS_MAX as usize + 1] = {
    let mut powers = [1; DECIMAL_DIGITS_MAX as usize + 1];
    let mut exponent = 1;
    while exponent < powers.len() {
        powers[exponent] = powers[exponent - 1] * 10;
        exponent += 1;
    }
    powers
};
/// An exponent further from zero than this is as good as infinite: no payload has that many digits to balance it.
const EXPONENT_MAX: i64 = 1 << 40;

const TOO_MANY_DIGITS: &str = "the number has more digits before the point than the column";
const TOO_FINE: &str = "the number has more digits after the point than the column";

/// Microseconds of a number of `unit`s, exact: `1.5` seconds is taken, `1.5` microseconds is out of range.
fn micros(raw: &str, unit: TimeUnit) -> Result<i128, Refusal> {
    match raw.parse::<i64>() {
        Ok(whole) => Ok(micros_of(whole, unit)),
        Err(_) => decimal(raw, DECIMAL_DIGITS_MAX, places_to_micros(unit)),
    }
}

/// Microseconds of a whole number of `unit`s.
pub(super) fn micros_of(whole: i64, unit: TimeUnit) -> i128 {
    i128::from(whole) * i128::from(unit_micros(unit))
}

/// Microseconds of one `unit`.
pub(super) fn unit_micros(unit: TimeUnit) -> i64 {
    10i64.pow(places_to_micros(unit))
}

/// Decimal places between a unit and a microsecond.
fn places_to_micros(unit: TimeUnit) -> u32 {
    match unit {
        TimeUnit::Seconds => 6,
        TimeUnit::Millis => 3,
        TimeUnit::Micros => 0,
    }
}

/// The unscaled value of a decimal with `precision` digits, `scale` of them after the point. `None` = [`decimal`] has to
/// look closer: there is an exponent, or some digits may have no place.
pub(super) fn decimal_of(number: &Number, precision: u32, scale: u32) -> Option<i128> {
    let unscaled = number.unscaled()?;
    let shift = (scale as usize).checked_sub(number.fraction_digits)?;
    if number.digit_count + shift > precision as usize {
        return None;
    }
    Some(i128::from(unscaled) * POWERS_OF_TEN[shift])
}

/// The unscaled value of a decimal with `precision` digits, `scale` of them after the point, from a JSON number's text.
/// Exact: trailing zeros are dropped, any other digit that has no place is out of range.
fn decimal(raw: &str, precision: u32, scale: u32) -> Result<i128, Refusal> {
    let (negative, unsigned) = match raw.strip_prefix('-') {
        Some(unsigned) => (true, unsigned),
        None => (false, raw),
    };
    let (digits, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((digits, exponent)) => (digits, bounded_exponent(exponent)),
        None => (unsigned, 0),
    };
    let fraction_digits = digits.split_once('.').map_or(0, |(_, fraction)| fraction.len());
    let significant = digits.bytes().filter(|byte| *byte != b'.').skip_while(|byte| *byte == b'0');
    let trailing_zeros =
        digits.bytes().rev().filter(|byte| *byte != b'.').take_while(|byte| *byte == b'0').count();
    let count = significant.clone().count().saturating_sub(trailing_zeros);
    if count == 0 {
        return Ok(0);
    }
    // value = digits x 10^shift, in units of the column's last place
    let shift = i64::from(scale) + exponent + trailing_zeros as i64 - fraction_digits as i64;
    if shift < 0 {
        return Err(Refusal::out_of_range(TOO_FINE));
    }
    if count as i64 + shift > i64::from(precision) {
        return Err(Refusal::out_of_range(TOO_MANY_DIGITS));
    }
    let unscaled = significant.take(count).fold(0i128, |value, digit| value * 10 + i128::from(digit - b'0'));
    let unscaled = unscaled * 10i128.pow(shift as u32);
    Ok(if negative { -unscaled } else { unscaled })
}

fn bounded_exponent(text: &str) -> i64 {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let size = digits
        .bytes()
        .fold(0i64, |value, digit| (value * 10 + i64::from(digit.saturating_sub(b'0'))).min(EXPONENT_MAX));
    if negative { -size } else { size }
}

/// Whether a text is one JSON number and nothing else.
fn is_json_number(text: &str) -> bool {
    match serde_json::from_str::<&RawValue>(text) {
        Ok(raw) => raw.get().len() == text.len() && JsonType::of(text) == JsonType::Number,
        Err(_) => false,
    }
}

/// 8-4-4-4-12 hexadecimal digits, either case.
fn uuid(text: &str) -> Result<[u8; 16], Refusal> {
    const HYPHENATED_BYTES: usize = 36;
    match uuid::Uuid::try_parse(text) {
        Ok(uuid) if text.len() == HYPHENATED_BYTES => Ok(uuid.into_bytes()),
        _ => Err(Refusal::wrong_type("expected a UUID of the form xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx")),
    }
}

/// The text of a JSON string, in place where it has no escapes.
fn unescape<'a>(raw: &'a str, scratch: &mut Scratch) -> Result<Text<'a>, Refusal> {
    let inside = &raw[1..raw.len() - 1];
    if !inside.as_bytes().contains(&b'\\') {
        return Ok(Text::Chunk(inside));
    }
    let start = scratch.text.len();
    match serde_json::Deserializer::from_str(raw).deserialize_str(Append(&mut scratch.text)) {
        Ok(()) => Ok(Text::Scratch(start..scratch.text.len())),
        Err(_) => {
            Err(Refusal { code: ReasonCode::InvalidJson, why: "a \\u escape is half of a surrogate pair" })
        }
    }
}

struct Append<'s>(&'s mut String);

impl Visitor<'_> for Append<'_> {
    type Value = ();

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("a string")
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<(), E> {
        self.0.push_str(text);
        Ok(())
    }
}

const BASE64: &str =
    "expected base64 of RFC 4648, section 4: A-Z a-z 0-9 + / in groups of four, padded with =";

/// Appends the bytes of strict base64 (RFC 4648, section 4): padded, no white space, unused bits zero, so each byte
/// string has exactly one text.
fn base64(text: &str, out: &mut Vec<u8>) -> Result<Range<usize>, Refusal> {
    let start = out.len();
    let text = text.as_bytes();
    if !text.len().is_multiple_of(4) {
        return Err(Refusal::wrong_type(BASE64));
    }
    let padding = text.iter().rev().take(2).take_while(|byte| **byte == b'=').count();
    let (digits, _) = text.split_at(text.len() - padding);
    for group in digits.chunks(4) {
        let mut bits = 0u32;
        for digit in group {
            bits = bits << 6 | base64_digit(*digit).ok_or(Refusal::wrong_type(BASE64))?;
        }
        bits <<= 6 * (4 - group.len());
        let [_, bytes @ ..] = bits.to_be_bytes();
        let (kept, unused) = bytes.split_at(group.len() - 1);
        if unused.iter().any(|byte| *byte != 0) {
            return Err(Refusal::wrong_type(BASE64));
        }
        out.extend_from_slice(kept);
    }
    Ok(start..out.len())
}

fn base64_digit(byte: u8) -> Option<u32> {
    let digit = match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        b'/' => 63,
        _ => return None,
    };
    Some(u32::from(digit))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::letter::ReasonCode::{OutOfRange, WrongType};

    fn read(raw: &str, kind: PrimitiveType) -> Result<Value<'_>, ReasonCode> {
        from_json(raw, &kind, None, &mut Scratch::default()).map_err(|refusal| refusal.code)
    }

    fn read_unit(raw: &str, kind: PrimitiveType, unit: TimeUnit) -> Result<Value<'_>, ReasonCode> {
        from_json(raw, &kind, Some(unit), &mut Scratch::default()).map_err(|refusal| refusal.code)
    }

    fn read_text(raw: &str) -> Result<String, ReasonCode> {
        let mut scratch = Scratch::default();
        match from_json(raw, &PrimitiveType::String, None, &mut scratch).map_err(|refusal| refusal.code)? {
            Value::Text(text) => Ok(scratch.text(&text).to_owned()),
            other => panic!("text became {other:?}"),
        }
    }

    fn read_bytes(raw: &str, kind: PrimitiveType) -> Result<Vec<u8>, ReasonCode> {
        let mut scratch = Scratch::default();
        match from_json(raw, &kind, None, &mut scratch).map_err(|refusal| refusal.code)? {
            Value::Bytes(bytes) => Ok(scratch.bytes(&bytes).to_vec()),
            other => panic!("bytes became {other:?}"),
        }
    }

    const DECIMAL_9_2: PrimitiveType = PrimitiveType::Decimal { precision: 9, scale: 2 };

    #[test]
    fn integers_are_exact_to_the_last_bit_and_refused_past_it() {
        use PrimitiveType::{Int, Long};
        assert_eq!(read("2147483647", Int), Ok(Value::Int(i32::MAX)));
        assert_eq!(read("-2147483648", Int), Ok(Value::Int(i32::MIN)));
        assert_eq!(read("2147483648", Int), Err(OutOfRange));
        assert_eq!(read("9007199254740993", Long), Ok(Value::Long(9_007_199_254_740_993)));
        assert_eq!(read("9223372036854775807", Long), Ok(Value::Long(i64::MAX)));
        assert_eq!(read("-9223372036854775808", Long), Ok(Value::Long(i64::MIN)));
        assert_eq!(read("9223372036854775808", Long), Err(OutOfRange));
        assert_eq!(read("99999999999999999999999999999999999999999", Int), Err(OutOfRange));
        assert_eq!(read("-0", Long), Ok(Value::Long(0)));
    }

    #[test]
    fn a_number_with_fraction_or_exponent_is_no_integer_and_a_numeric_string_is_no_number() {
        for raw in ["1.0", "1e3", "1E3", "\"1\"", "true", "[1]", "{}"] {
            assert_eq!(read(raw, PrimitiveType::Int), Err(WrongType), "{raw}");
            assert_eq!(read(raw, PrimitiveType::Long), Err(WrongType), "{raw}");
        }
        assert_eq!(read("\"1.5\"", PrimitiveType::Double), Err(WrongType));
        assert_eq!(read("\"NaN\"", PrimitiveType::Double), Err(WrongType));
    }

    #[test]
    fn a_double_is_the_nearest_one_and_a_large_integer_must_be_exact() {
        use PrimitiveType::Double;
        assert_eq!(read("0.1", Double), Ok(Value::Double(0.1)));
        assert_eq!(read("1e308", Double), Ok(Value::Double(1e308)));
        // serde_json's own reader gives a neighbour of this one
        assert_eq!(read("1.2345678901234567e22", Double), Ok(Value::Double(1.2345678901234567e22)));
        assert_eq!(read("9007199254740992", Double), Ok(Value::Double(9_007_199_254_740_992.0)));
        assert_eq!(read("9007199254740993", Double), Err(OutOfRange));
        assert_eq!(read("-18014398509481984", Double), Ok(Value::Double(-18_014_398_509_481_984.0)));
        assert_eq!(read("1e400", Double), Err(OutOfRange));
        assert_eq!(read("-1e400", Double), Err(OutOfRange));
        assert_eq!(read("1e-400", Double), Err(OutOfRange));
        assert_eq!(read("0e-400", Double), Ok(Value::Double(0.0)));
        assert_eq!(read("0.0", Double), Ok(Value::Double(0.0)));
    }

    #[test]
    fn a_float_is_the_nearest_one_by_the_same_rules() {
        use PrimitiveType::Float;
        assert_eq!(read("0.1", Float), Ok(Value::Float(0.1)));
        assert_eq!(read("16777216", Float), Ok(Value::Float(16_777_216.0)));
        assert_eq!(read("16777217", Float), Err(OutOfRange));
        assert_eq!(read("3.5e38", Float), Err(OutOfRange));
        assert_eq!(read("1e-60", Float), Err(OutOfRange));
        // through an f64 this would round twice, to 1.0
        assert_eq!(read("1.000000059604644775390626", Float), Ok(Value::Float(1.000_000_1)));
    }

    #[test]
    fn a_decimal_keeps_every_digit_or_is_refused() {
        assert_eq!(read("1234567.89", DECIMAL_9_2), Ok(Value::Decimal(123_456_789)));
        assert_eq!(read("-0.010", DECIMAL_9_2), Ok(Value::Decimal(-1)));
        assert_eq!(read("\"12.5\"", DECIMAL_9_2), Ok(Value::Decimal(1_250)));
        assert_eq!(read("1.5e3", DECIMAL_9_2), Ok(Value::Decimal(150_000)));
        assert_eq!(read("1500e-2", DECIMAL_9_2), Ok(Value::Decimal(1_500)));
        assert_eq!(read("0e999999999999999999999", DECIMAL_9_2), Ok(Value::Decimal(0)));
        assert_eq!(read("0.001", DECIMAL_9_2), Err(OutOfRange));
        assert_eq!(read("10000000", DECIMAL_9_2), Err(OutOfRange));
        assert_eq!(read("1e999999999999999999999", DECIMAL_9_2), Err(OutOfRange));
        assert_eq!(read("1e-999999999999999999999", DECIMAL_9_2), Err(OutOfRange));
        let widest = PrimitiveType::Decimal { precision: 38, scale: 0 };
        let nines = "9".repeat(38);
        assert_eq!(read(&nines, widest.clone()), Ok(Value::Decimal(10i128.pow(38) - 1)));
        assert_eq!(read(&format!("{nines}0"), widest), Err(OutOfRange));
        for raw in ["\"\"", "\" 1\"", "\"1,5\"", "\"+1\"", "\"0x1\"", "\"NaN\"", "\"1\\n\"", "true"] {
            assert_eq!(read(raw, DECIMAL_9_2), Err(WrongType), "{raw}");
        }
    }

    #[test]
    fn a_boolean_is_true_or_false_and_nothing_else() {
        assert_eq!(read("true", PrimitiveType::Boolean), Ok(Value::Boolean(true)));
        assert_eq!(read("false", PrimitiveType::Boolean), Ok(Value::Boolean(false)));
        for raw in ["0", "1", "\"true\"", "[]"] {
            assert_eq!(read(raw, PrimitiveType::Boolean), Err(WrongType), "{raw}");
        }
    }

    #[test]
    fn text_is_a_json_string_with_its_escapes_resolved_and_nul_kept() {
        assert_eq!(read_text("\"\""), Ok(String::new()));
        assert_eq!(read_text("\"plain é\""), Ok("plain é".into()));
        assert_eq!(read_text(r#""a\u0000b\n\ud83d\ude00""#), Ok("a\0b\n😀".into()));
        assert_eq!(read_text(r#""\ud83d""#), Err(ReasonCode::InvalidJson));
        assert_eq!(read("12", PrimitiveType::String), Err(WrongType));
        assert_eq!(read("{}", PrimitiveType::String), Err(WrongType));
    }

    #[test]
    fn text_without_escapes_is_not_copied() {
        let mut scratch = Scratch::default();
        let value = from_json("\"plain\"", &PrimitiveType::String, None, &mut scratch).unwrap();
        assert_eq!(value, Value::Text(Text::Chunk("plain")));
        assert!(scratch.text.is_empty());
    }

    #[test]
    fn a_uuid_has_one_shape_in_either_case() {
        let bytes = uuid::uuid!("67e55044-10b1-426f-9247-bb680e5fe0c8").into_bytes();
        for raw in ["\"67e55044-10b1-426f-9247-bb680e5fe0c8\"", "\"67E55044-10B1-426F-9247-BB680E5FE0C8\""] {
            assert_eq!(read(raw, PrimitiveType::Uuid), Ok(Value::Uuid(bytes)));
        }
        for raw in [
            "\"67e5504410b1426f9247bb680e5fe0c8\"",
            "\"{67e55044-10b1-426f-9247-bb680e5fe0c8}\"",
            "\"urn:uuid:67e55044-10b1-426f-9247-bb680e5fe0c8\"",
            "\"67e55044-10b1-426f-9247-bb680e5fe0cg\"",
            "7",
        ] {
            assert_eq!(read(raw, PrimitiveType::Uuid), Err(WrongType), "{raw}");
        }
    }

    #[test]
    fn base64_is_strict_so_that_bytes_have_one_text() {
        // RFC 4648, section 10
        for (text, bytes) in
            [("", ""), ("Zg==", "f"), ("Zm8=", "fo"), ("Zm9v", "foo"), ("Zm9vYmFy", "foobar")]
        {
            assert_eq!(
                read_bytes(&format!("\"{text}\""), PrimitiveType::Binary),
                Ok(bytes.as_bytes().to_vec())
            );
        }
        for text in ["Zg", "Zg=", "Zh==", "Zm9=", "====", "=g==", "Z===", "Zm9v\\n", "Zm-_", "Zg==Zg=="] {
            assert_eq!(read_bytes(&format!("\"{text}\""), PrimitiveType::Binary), Err(WrongType), "{text}");
        }
        assert_eq!(read_bytes("\"Zm9v\"", PrimitiveType::Fixed(3)), Ok(b"foo".to_vec()));
        assert_eq!(read_bytes("\"Zm8=\"", PrimitiveType::Fixed(3)), Err(OutOfRange));
    }

    #[test]
    fn a_number_is_a_time_only_with_a_unit_and_then_exactly() {
        use PrimitiveType::{Date, Time, Timestamp, Timestamptz};
        use TimeUnit::{Micros, Millis, Seconds};
        assert_eq!(read("1700000000", Timestamptz), Err(WrongType));
        assert_eq!(read("19000", Date), Err(WrongType));
        assert_eq!(read_unit("1700000000123", Timestamptz, Millis), Ok(Value::Long(1_700_000_000_123_000)));
        assert_eq!(
            read_unit("1700000000.000001", Timestamptz, Seconds),
            Ok(Value::Long(1_700_000_000_000_001))
        );
        assert_eq!(read_unit("1.7e12", Timestamp, Millis), Ok(Value::Long(1_700_000_000_000_000)));
        assert_eq!(read_unit("-1", Timestamptz, Micros), Ok(Value::Long(-1)));
        assert_eq!(read_unit("0.1", Timestamptz, Micros), Err(OutOfRange));
        assert_eq!(read_unit("1.0001", Timestamptz, Millis), Err(OutOfRange));
        assert_eq!(read_unit("9223372036854775807", Timestamptz, Seconds), Err(OutOfRange));
        assert_eq!(read_unit("1700000000123", Timestamptz, Seconds), Err(OutOfRange));
        assert_eq!(read_unit("1e400", Timestamptz, Millis), Err(OutOfRange));
        assert_eq!(read_unit("86399.999999", Time, Seconds), Ok(Value::Long(time::DAY_MICROS - 1)));
        assert_eq!(read_unit("86400", Time, Seconds), Err(OutOfRange));
        assert_eq!(read_unit("-1", Time, Seconds), Err(OutOfRange));
        assert_eq!(read_unit("\"1700000000123\"", Timestamptz, Millis), Err(WrongType));
        assert_eq!(read_unit("\"1970-01-01T00:00:01Z\"", Timestamptz, Millis), Ok(Value::Long(1_000_000)));
    }

    proptest! {
        /// Goal: no integer changes its value on the way, whatever its size.
        #[test]
        fn integers_round_trip(value: i64) {
            let raw = value.to_string();
            prop_assert_eq!(read(&raw, PrimitiveType::Long), Ok(Value::Long(value)));
            let narrow = i32::try_from(value).map(Value::Int).map_err(|_| OutOfRange);
            prop_assert_eq!(read(&raw, PrimitiveType::Int), narrow);
            let exact = (value as f64) as i128 == i128::from(value);
            let double = if exact { Ok(Value::Double(value as f64)) } else { Err(OutOfRange) };
            prop_assert_eq!(read(&raw, PrimitiveType::Double), double);
        }

        /// Goal: every finite double and float comes back bit for bit from its shortest text.
        #[test]
        fn floating_point_round_trips(double in prop::num::f64::NORMAL | prop::num::f64::SUBNORMAL, float in prop::num::f32::NORMAL) {
            let (double_raw, float_raw) = (format!("{double:e}"), format!("{float:e}"));
            prop_assert_eq!(read(&double_raw, PrimitiveType::Double), Ok(Value::Double(double)));
            prop_assert_eq!(read(&float_raw, PrimitiveType::Float), Ok(Value::Float(float)));
        }

        /// Goal: a decimal is what moving the point in its text gives. Method: the model pads and cuts strings, never
        /// calculates; the exponent is written back into the text so that both say the same number.
        #[test]
        fn decimals_agree_with_string_arithmetic(negative: bool, whole in "0|[1-9][0-9]{0,12}", fraction in "[0-9]{0,8}", exponent in -6i32..=6) {
            let sign = if negative { "-" } else { "" };
            let point = if fraction.is_empty() { String::new() } else { format!(".{fraction}") };
            let raw = format!("{sign}{whole}{point}e{exponent}");
            let zeros = "0".repeat(8);
            let digits = format!("{zeros}{whole}{fraction}{zeros}");
            let places = (8 + whole.len()) as i32 + exponent;
            let (before, after) = digits.split_at(places as usize);
            let kept: i128 = format!("{before}{}", &format!("{after}0000")[..4]).parse().unwrap();
            let lost = format!("{after}0000")[4..].bytes().any(|digit| digit != b'0');
            let expected = if lost || kept >= 10i128.pow(12) { Err(OutOfRange) } else { Ok(Value::Decimal(if negative { -kept } else { kept })) };
            prop_assert_eq!(read(&raw, PrimitiveType::Decimal { precision: 12, scale: 4 }), expected.clone());
            let quoted = format!("\"{raw}\"");
            prop_assert_eq!(read(&quoted, PrimitiveType::Decimal { precision: 12, scale: 4 }), expected);
        }

        /// Goal: strings come back as serde_json writes them.
        #[test]
        fn strings_round_trip(text: String) {
            prop_assert_eq!(read_text(&serde_json::to_string(&text).unwrap()), Ok(text));
        }
    }
}
