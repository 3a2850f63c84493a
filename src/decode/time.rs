//! Dates and times as text, exact to the microsecond.
//!
//! | type | text | becomes |
//! |---|---|---|
//! | date | `YYYY-MM-DD` | days since 1970-01-01 |
//! | time | `HH:MM:SS[.f]` | microseconds since midnight |
//! | timestamp | date, `T` or space, time; no offset | microseconds since 1970-01-01T00:00:00, same clock |
//! | timestamptz | the same, then `Z` or `+HH:MM` / `-HH:MM` (RFC 3339) | microseconds since the epoch, UTC |
//!
//! Rules: a fraction has one or more digits, all after the sixth zero, else the value is out of range: nothing is
//! cut off. Second 60 is out of range: neither Arrow nor Iceberg can hold a leap second. Years run from 0001 to
//! 9999, also after the offset is taken off, because that is what readers in Python, Java and SQL can hold. An
//! offset where the column has no zone, or no offset where it has one, is the wrong type: no zone is invented or
//! lost. Text of another shape is the wrong type too; the right shape with an impossible value (month 13, 30
//! February, hour 24) is out of range.
//!
//! Days are counted in the proleptic Gregorian calendar, the only one that ISO 8601 and Iceberg know.

use super::verdict::Refusal;

/// 0001-01-01T00:00:00, in microseconds.
pub(super) const MICROS_MIN: i64 = -62_135_596_800_000_000;
/// 9999-12-31T23:59:59.999999, in microseconds.
pub(super) const MICROS_MAX: i64 = 253_402_300_799_999_999;
/// Length of a day, in microseconds.
pub(super) const DAY_MICROS: i64 = 86_400_000_000;

const DATE_SHAPE: &str = "expected a date of the form YYYY-MM-DD";
const TIME_SHAPE: &str = "expected a time of the form HH:MM:SS[.ffffff]";
const LOCAL_SHAPE: &str = "expected a timestamp without offset, YYYY-MM-DDTHH:MM:SS[.ffffff]";
const ZONED_SHAPE: &str = "expected an RFC 3339 timestamp with offset or Z, YYYY-MM-DDTHH:MM:SS[.ffffff]Z";
const OFFSET_UNEXPECTED: &str =
    "expected a timestamp without offset; use type timestamptz to keep the instant";
const OFFSET_MISSING: &str = "expected an offset or Z after the time; use type timestamp for local times";
const YEAR_RANGE: &str = "the year must lie in 0001..9999";
const NO_SUCH_DATE: &str = "there is no such date";
const NO_SUCH_TIME: &str = "there is no such time of day (seconds run to 59, hours to 23)";
const NO_SUCH_OFFSET: &str = "there is no such offset (hours run to 23, minutes to 59)";
const TOO_FINE: &str = "digits finer than a microsecond would be lost";

/// Days since 1970-01-01.
pub(super) fn date(text: &str) -> Result<i32, Refusal> {
    let (days, rest) = split_date(text.as_bytes(), DATE_SHAPE)?;
    if !rest.is_empty() {
        return Err(Refusal::wrong_type(DATE_SHAPE));
    }
    Ok(i32::try_from(days).expect("days of the years 1 to 9999 fit 32 bits"))
}

/// Microseconds since midnight.
pub(super) fn time_of_day(text: &str) -> Result<i64, Refusal> {
    let (micros, rest) = split_time(text.as_bytes(), TIME_SHAPE)?;
    if !rest.is_empty() {
        return Err(Refusal::wrong_type(TIME_SHAPE));
    }
    Ok(micros)
}

/// Microseconds since 1970-01-01T00:00:00 on the same clock.
pub(super) fn timestamp(text: &str) -> Result<i64, Refusal> {
    let (micros, rest) = split_date_time(text.as_bytes(), LOCAL_SHAPE)?;
    match split_offset(rest) {
        _ if rest.is_empty() => Ok(micros),
        Some(_) => Err(Refusal::wrong_type(OFFSET_UNEXPECTED)),
        None => Err(Refusal::wrong_type(LOCAL_SHAPE)),
    }
}

/// Microseconds since 1970-01-01T00:00:00Z.
pub(super) fn timestamptz(text: &str) -> Result<i64, Refusal> {
    let (micros, rest) = split_date_time(text.as_bytes(), ZONED_SHAPE)?;
    if rest.is_empty() {
        return Err(Refusal::wrong_type(OFFSET_MISSING));
    }
    let Some((sign, hours, minutes)) = split_offset(rest) else {
        return Err(Refusal::wrong_type(ZONED_SHAPE));
    };
    if hours > 23 || minutes > 59 {
        return Err(Refusal::out_of_range(NO_SUCH_OFFSET));
    }
    in_years(i128::from(micros - sign * (hours * 60 + minutes) * 60_000_000))
}

/// Passes microseconds since the epoch that lie in the years 0001 to 9999.
pub(super) fn in_years(micros: i128) -> Result<i64, Refusal> {
    match i64::try_from(micros) {
        Ok(micros) if (MICROS_MIN..=MICROS_MAX).contains(&micros) => Ok(micros),
        _ => Err(Refusal::out_of_range(YEAR_RANGE)),
    }
}

/// Passes microseconds since midnight that lie in one day.
pub(super) fn in_day(micros: i128) -> Result<i64, Refusal> {
    match i64::try_from(micros) {
        Ok(micros) if (0..DAY_MICROS).contains(&micros) => Ok(micros),
        _ => Err(Refusal::out_of_range("a time of day lies from 0 to less than 24 hours")),
    }
}

fn split_date_time<'t>(text: &'t [u8], shape: &'static str) -> Result<(i64, &'t [u8]), Refusal> {
    let (days, rest) = split_date(text, shape)?;
    let Some((b'T' | b't' | b' ', rest)) = rest.split_first() else {
        return Err(Refusal::wrong_type(shape));
    };
    let (micros, rest) = split_time(rest, shape)?;
    Ok((days * DAY_MICROS + micros, rest))
}

fn split_date<'t>(text: &'t [u8], shape: &'static str) -> Result<(i64, &'t [u8]), Refusal> {
    let &[y0, y1, y2, y3, b'-', m0, m1, b'-', d0, d1, ref rest @ ..] = text else {
        return Err(not_a_date(text, shape));
    };
    let (Some(century), Some(year), Some(month), Some(day)) =
        (two_digits(y0, y1), two_digits(y2, y3), two_digits(m0, m1), two_digits(d0, d1))
    else {
        return Err(not_a_date(text, shape));
    };
    let year = century * 100 + year;
    if year == 0 {
        return Err(Refusal::out_of_range(YEAR_RANGE));
    }
    if !(1..=12).contains(&month) || day < 1 || day > days_of_month(year, month) {
        return Err(Refusal::out_of_range(NO_SUCH_DATE));
    }
    Ok((days_from_civil(year, month, day), rest))
}

/// A year with a sign or with more than four digits is a date of ISO 8601 that we can not hold; all else is none.
fn not_a_date(text: &[u8], shape: &'static str) -> Refusal {
    let unsigned = text.strip_prefix(b"+").or_else(|| text.strip_prefix(b"-")).unwrap_or(text);
    let digits = unsigned.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let wide = digits > 4 || (digits == 4 && unsigned.len() < text.len());
    if wide && unsigned.get(digits) == Some(&b'-') {
        return Refusal::out_of_range(YEAR_RANGE);
    }
    Refusal::wrong_type(shape)
}

fn split_time<'t>(text: &'t [u8], shape: &'static str) -> Result<(i64, &'t [u8]), Refusal> {
    let &[h0, h1, b':', m0, m1, b':', s0, s1, ref rest @ ..] = text else {
        return Err(Refusal::wrong_type(shape));
    };
    let (Some(hour), Some(minute), Some(second)) =
        (two_digits(h0, h1), two_digits(m0, m1), two_digits(s0, s1))
    else {
        return Err(Refusal::wrong_type(shape));
    };
    if hour > 23 || minute > 59 || second > 59 {
        return Err(Refusal::out_of_range(NO_SUCH_TIME));
    }
    let (micros, rest) = split_fraction(rest, shape)?;
    Ok((((hour * 60 + minute) * 60 + second) * 1_000_000 + micros, rest))
}

/// Microseconds of `.f`, or 0 where no fraction stands.
fn split_fraction<'t>(text: &'t [u8], shape: &'static str) -> Result<(i64, &'t [u8]), Refusal> {
    let Some(fraction) = text.strip_prefix(b".") else {
        return Ok((0, text));
    };
    let digits = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if digits == 0 {
        return Err(Refusal::wrong_type(shape));
    }
    let (fraction, rest) = fraction.split_at(digits);
    let mut micros = 0;
    for place in 0..6 {
        micros = micros * 10 + fraction.get(place).map_or(0, |digit| i64::from(digit - b'0'));
    }
    if fraction.iter().skip(6).any(|digit| *digit != b'0') {
        return Err(Refusal::out_of_range(TOO_FINE));
    }
    Ok((micros, rest))
}

/// Sign, hours and minutes of a whole offset; bounds are the caller's.
fn split_offset(text: &[u8]) -> Option<(i64, i64, i64)> {
    match *text {
        [b'Z' | b'z'] => Some((1, 0, 0)),
        [sign @ (b'+' | b'-'), h0, h1, b':', m0, m1] => {
            Some((if sign == b'-' { -1 } else { 1 }, two_digits(h0, h1)?, two_digits(m0, m1)?))
        }
        _ => None,
    }
}

fn two_digits(tens: u8, ones: u8) -> Option<i64> {
    (tens.is_ascii_digit() && ones.is_ascii_digit())
        .then(|| i64::from(tens - b'0') * 10 + i64::from(ones - b'0'))
}

fn days_of_month(year: i64, month: i64) -> i64 {
    match month {
        2 if year % 4 == 0 && (year % 100 != 0 || year % 400 == 0) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// Days since 1970-01-01. Years are counted from 1 March, so that a leap day is a year's last: H. Hinnant,
/// "chrono-compatible low-level date algorithms", `days_from_civil`, for years from 1.
fn days_from_civil(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year / 400;
    let year_of_era = year % 400;
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

#[cfg(test)]
mod tests {
    use chrono::{DateTime, Datelike, FixedOffset, NaiveDate, SecondsFormat, TimeZone};
    use proptest::prelude::*;

    use super::*;
    use crate::letter::ReasonCode::{OutOfRange, WrongType};

    #[test]
    fn every_day_of_the_years_1_to_9999_is_the_day_that_chrono_counts() {
        let epoch = NaiveDate::from_ymd_opt(1970, 1, 1).unwrap();
        let mut day = NaiveDate::from_ymd_opt(1, 1, 1).unwrap();
        loop {
            let counted =
                days_from_civil(i64::from(day.year()), i64::from(day.month()), i64::from(day.day()));
            assert_eq!(counted, (day - epoch).num_days(), "{day}");
            if day.year() == 9999 && day.ordinal() == 365 {
                break;
            }
            day = day.succ_opt().unwrap();
        }
        assert_eq!(MICROS_MIN, i64::from(date("0001-01-01").unwrap()) * DAY_MICROS);
        assert_eq!(MICROS_MAX, (i64::from(date("9999-12-31").unwrap()) + 1) * DAY_MICROS - 1);
    }

    #[test]
    fn shapes_that_are_taken() {
        assert_eq!(date("1970-01-02"), Ok(1));
        assert_eq!(date("2000-02-29"), Ok(11_016));
        assert_eq!(time_of_day("23:59:59.999999"), Ok(DAY_MICROS - 1));
        assert_eq!(time_of_day("00:00:01.5"), Ok(1_500_000));
        assert_eq!(timestamp("1970-01-01T00:00:00.000001"), Ok(1));
        assert_eq!(timestamp("1969-12-31 23:59:59.999999"), Ok(-1));
        assert_eq!(timestamptz("1970-01-01T02:00:00+02:00"), Ok(0));
        assert_eq!(timestamptz("1969-12-31t19:00:00.25-05:00"), Ok(250_000));
        assert_eq!(timestamptz("1970-01-01 00:00:00z"), Ok(0));
        assert_eq!(timestamptz("1970-01-01T00:00:00-00:00"), Ok(0));
    }

    #[test]
    fn digits_finer_than_a_microsecond_are_taken_only_when_they_are_zero() {
        assert_eq!(timestamptz("1970-01-01T00:00:00.123456000Z"), Ok(123_456));
        assert_eq!(timestamptz("1970-01-01T00:00:00.1234560001Z").unwrap_err().code, OutOfRange);
        assert_eq!(time_of_day("00:00:00.0000001").unwrap_err().code, OutOfRange);
    }

    #[test]
    fn no_zone_is_invented_and_none_is_lost() {
        assert_eq!(timestamp("2024-01-01T00:00:00Z").unwrap_err(), Refusal::wrong_type(OFFSET_UNEXPECTED));
        assert_eq!(
            timestamp("2024-01-01T00:00:00+01:00").unwrap_err(),
            Refusal::wrong_type(OFFSET_UNEXPECTED)
        );
        assert_eq!(timestamptz("2024-01-01T00:00:00").unwrap_err(), Refusal::wrong_type(OFFSET_MISSING));
    }

    #[test]
    fn the_right_shape_with_an_impossible_value_is_out_of_range() {
        for text in
            ["2024-13-01", "2024-00-01", "2023-02-29", "1900-02-29", "2024-04-31", "2024-01-00", "0000-01-01"]
        {
            assert_eq!(date(text).unwrap_err().code, OutOfRange, "{text}");
        }
        for text in ["+10000-01-01", "-0001-01-01", "12345-01-01"] {
            assert_eq!(date(text).unwrap_err().code, OutOfRange, "{text}");
        }
        for text in ["24:00:00", "23:60:00", "23:59:60"] {
            assert_eq!(time_of_day(text).unwrap_err().code, OutOfRange, "{text}");
        }
        assert_eq!(timestamptz("2016-12-31T23:59:60Z").unwrap_err().code, OutOfRange);
        assert_eq!(timestamptz("2016-12-31T23:59:59+24:00").unwrap_err().code, OutOfRange);
        assert_eq!(timestamptz("2016-12-31T23:59:59+00:60").unwrap_err().code, OutOfRange);
        assert_eq!(timestamptz("0001-01-01T00:00:00+00:01").unwrap_err().code, OutOfRange);
        assert_eq!(timestamptz("9999-12-31T23:59:59-00:01").unwrap_err().code, OutOfRange);
    }

    #[test]
    fn another_shape_is_the_wrong_type() {
        for text in
            ["", "2024", "2024-1-1", "20240101", "2024-01-01T", "2024-01-01 ", " 2024-01-01", "२०२४-01-01"]
        {
            assert_eq!(date(text).unwrap_err().code, WrongType, "{text}");
        }
        for text in ["12:00", "1:00:00", "12:00:00.", "12:00:00,5", "12:00:00Z"] {
            assert_eq!(time_of_day(text).unwrap_err().code, WrongType, "{text}");
        }
        for text in [
            "2024-01-01T12:00Z",
            "2024-01-01T12:00:00+0100",
            "2024-01-01T12:00:00+01",
            "1700000000000",
            "now",
        ] {
            assert_eq!(timestamptz(text).unwrap_err().code, WrongType, "{text}");
        }
    }

    proptest! {
        /// Goal: the hand-written reader agrees with chrono on every instant it can print, whatever the offset.
        #[test]
        fn timestamps_agree_with_chrono(micros in MICROS_MIN + DAY_MICROS..=MICROS_MAX - DAY_MICROS, offset_minutes in -1439i32..=1439) {
            let zone = FixedOffset::east_opt(offset_minutes * 60).unwrap();
            let instant = zone.timestamp_micros(micros).unwrap();
            let text = instant.to_rfc3339_opts(SecondsFormat::Micros, true);
            prop_assert_eq!(timestamptz(&text), Ok(micros));
            let local = instant.naive_local().format("%Y-%m-%dT%H:%M:%S%.6f").to_string();
            prop_assert_eq!(timestamp(&local), Ok(instant.naive_local().and_utc().timestamp_micros()));
        }

        /// Goal: what chrono refuses as RFC 3339 is refused here too, and what both take is the same instant.
        /// Method: one byte of a good text is replaced, so that most texts are nearly right.
        #[test]
        fn what_is_taken_is_what_chrono_takes(position in 0usize..27, byte in prop::sample::select(b"0123456789-+:.TZ ".to_vec())) {
            let mut text = b"2024-02-29T23:59:58.123456Z".to_vec();
            text[position] = byte;
            let text = String::from_utf8(text).unwrap();
            if let Ok(micros) = timestamptz(&text) {
                let reference = DateTime::parse_from_rfc3339(&text);
                prop_assert!(reference.is_ok(), "{} is not RFC 3339", text);
                prop_assert_eq!(micros, reference.unwrap().timestamp_micros());
            }
        }
    }
}
