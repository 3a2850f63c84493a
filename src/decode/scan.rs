//! The scan: JSON text read forwards, once, without building anything.
//!
//! Every function takes what is certainly RFC 8259 and gives `None` for anything else, also for what it merely does not
//! care to judge. `None` is no verdict: whoever scans falls back to [`walk`](super::walk), which judges from the start.
//! What is taken is taken whole: strings with their escapes and pairs of surrogates, numbers with every digit, nesting
//! up to [`DEPTH_MAX`].
//!
//! Positions are bytes of the text; functions take the position where something begins and give the one after it.
//!
//! Bounds: one look at each byte, but for the bytes of an escape; no recursion, no allocation.

use super::walk::DEPTH_MAX;

/// Every byte 1; times a byte, that byte eight times.
const ONES: u64 = u64::from_le_bytes([1; 8]);
/// The highest bit of every byte.
const HIGHS: u64 = u64::from_le_bytes([0x80; 8]);
/// Every byte the digit 0.
const ZEROS: u64 = ONES * b'0' as u64;
/// 10^0 to 10^8.
const POWERS_OF_TEN: [u64; 9] = [1, 10, 100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000];
/// Digits whose number fits 64 bits whatever they are.
const DIGITS_EXACT: usize = 18;

/// The name of a member, made ready to be compared with a payload in a few steps.
#[derive(Debug)]
pub(super) struct Name {
    text: Box<str>,
    /// How it stands in a compact payload, with quotes and colon.
    quoted: Box<[u8]>,
    /// The first bytes of `quoted`, at most eight, as a little-endian word.
    head: u64,
    /// Which bytes of `head` count.
    head_mask: u64,
    /// The last eight bytes of `quoted` where it has so many.
    tail: u64,
}

impl Name {
    pub(super) fn new(text: &str) -> Self {
        let quoted = [b"\"", text.as_bytes(), b"\":"].concat();
        let (mut head, mut mask) = ([0; 8], [0; 8]);
        for (place, byte) in quoted.iter().take(8).enumerate() {
            (head[place], mask[place]) = (*byte, 0xFF);
        }
        let (mut head, mut head_mask) = (u64::from_le_bytes(head), u64::from_le_bytes(mask));
        if text.bytes().any(|byte| matches!(byte, b'"' | b'\\' | 0..0x20)) {
            // JSON can only write it with escapes, so it equals no bytes of a payload.
            (head, head_mask) = (1, 0);
        }
        let tail = quoted.last_chunk::<8>().map_or(0, |last| u64::from_le_bytes(*last));
        Self { text: text.into(), quoted: quoted.into(), head, head_mask, tail }
    }

    pub(super) fn as_str(&self) -> &str {
        &self.text
    }
}

/// A JSON text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Scan<'a> {
    text: &'a str,
}

/// Where a string ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StringEnd {
    /// Position after the closing quote.
    pub(super) end: usize,
    /// Whether an escape stands inside: then what stands between the quotes is not yet the string's value.
    pub(super) escaped: bool,
}

/// A number of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number {
    /// Position after it.
    pub(super) end: usize,
    negative: bool,
    /// All digits before an exponent as one integer; it may have overflowed where they are more than 18.
    digits: u64,
    /// Digits before and after the point.
    pub(super) digit_count: usize,
    /// Digits after the point.
    pub(super) fraction_digits: usize,
    has_exponent: bool,
}

impl Number {
    /// The digits with their sign, the point left out; `None` for an exponent or so many digits that 64 bits may be
    /// too few.
    #[inline]
    pub(super) fn unscaled(&self) -> Option<i64> {
        if self.has_exponent || self.digit_count > DIGITS_EXACT {
            return None;
        }
        let digits = self.digits.cast_signed();
        Some(if self.negative { -digits } else { digits })
    }

    /// The number where neither fraction nor exponent stands, with the same exception.
    #[inline]
    pub(super) fn integer(&self) -> Option<i64> {
        if self.fraction_digits > 0 { None } else { self.unscaled() }
    }
}

impl<'a> Scan<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text }
    }

    /// Bytes of the text.
    pub(super) fn len(self) -> usize {
        self.text.len()
    }

    /// A part of the text. Both ends must stand between characters, as they do beside quotes, brackets and digits.
    #[inline]
    pub(super) fn text(self, start: usize, end: usize) -> &'a str {
        &self.text[start..end]
    }

    /// The byte at `at`.
    #[inline(always)]
    pub(super) fn byte(self, at: usize) -> Option<u8> {
        self.text.as_bytes().get(at).copied()
    }

    #[inline(always)]
    fn word(self, at: usize) -> Option<u64> {
        Some(u64::from_le_bytes(*self.text.as_bytes().get(at..)?.first_chunk()?))
    }

    /// Position of the first byte from `at` on that is no white space.
    #[inline(always)]
    pub(super) fn skip_blank(self, at: usize) -> Option<usize> {
        if self.byte(at)? > b' ' { Some(at) } else { self.skip_blanks(at) }
    }

    #[cold]
    fn skip_blanks(self, at: usize) -> Option<usize> {
        let rest = self.text.as_bytes().get(at..)?;
        let blanks = rest.iter().position(|byte| !matches!(byte, b' ' | b'\t' | b'\n' | b'\r'))?;
        Some(at + blanks)
    }

    /// Position after this name and its colon if they stand at `at` without white space between. May say no within
    /// eight bytes of the text's end.
    #[inline(always)]
    pub(super) fn name(self, at: usize, name: &Name) -> Option<usize> {
        if self.word(at)? & name.head_mask != name.head {
            return None;
        }
        let end = at + name.quoted.len();
        match name.quoted.len() {
            ..=8 => Some(end),
            9..=16 => (self.word(end - 8)? == name.tail).then_some(end),
            _ => (*self.text.as_bytes().get(at..end)? == *name.quoted).then_some(end),
        }
    }

    /// Position after one of `true`, `false` and `null`.
    #[inline]
    pub(super) fn literal(self, at: usize, literal: &str) -> Option<usize> {
        let end = at + literal.len();
        (self.text.as_bytes().get(at..end)? == literal.as_bytes()).then_some(end)
    }

    /// The end of the string whose opening quote stands at `open`.
    #[inline(always)]
    pub(super) fn string(self, open: usize) -> Option<StringEnd> {
        let special = self.next_special(open + 1)?;
        if self.byte(special)? == b'"' {
            return Some(StringEnd { end: special + 1, escaped: false });
        }
        self.escaped_string(special)
    }

    /// The end of a string from its first special byte on.
    #[cold]
    fn escaped_string(self, mut at: usize) -> Option<StringEnd> {
        loop {
            match self.byte(at)? {
                b'"' => return Some(StringEnd { end: at + 1, escaped: true }),
                b'\\' => at = self.next_special(self.after_escape(at)?)?,
                _ => return None,
            }
        }
    }

    /// Position of the first quote, backslash or control character from `at` on.
    #[inline(always)]
    fn next_special(self, mut at: usize) -> Option<usize> {
        while let Some(word) = self.word(at) {
            let marks = specials(word);
            if marks != 0 {
                return Some(at + marks.trailing_zeros() as usize / 8);
            }
            at += 8;
        }
        self.last_special(at)
    }

    /// The same within the last eight bytes of the text.
    fn last_special(self, at: usize) -> Option<usize> {
        let rest = self.text.as_bytes().get(at..)?;
        Some(at + rest.iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20))?)
    }

    /// Position after the escape at `at`; `None` also for half of a pair of surrogates.
    fn after_escape(self, at: usize) -> Option<usize> {
        match self.byte(at + 1)? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Some(at + 2),
            b'u' => match self.code_unit(at)? {
                0xD800..=0xDBFF => match self.code_unit(at + 6)? {
                    0xDC00..=0xDFFF => Some(at + 12),
                    _ => None,
                },
                0xDC00..=0xDFFF => None,
                _ => Some(at + 6),
            },
            _ => None,
        }
    }

    /// The UTF-16 code unit of the `\uXXXX` at `at`.
    fn code_unit(self, at: usize) -> Option<u32> {
        let digits = self.text.as_bytes().get(at..at + 6)?.strip_prefix(b"\\u")?;
        digits.iter().try_fold(0, |unit, digit| Some(unit << 4 | char::from(*digit).to_digit(16)?))
    }

    /// The number at `at`.
    #[inline]
    pub(super) fn number(self, at: usize) -> Option<Number> {
        let negative = self.byte(at)? == b'-';
        let first = at + usize::from(negative);
        let (mut end, mut digits) = self.digits(first, 0);
        let mut digit_count = end - first;
        // at least one digit, and more only where the first is no zero
        if digit_count != 1 && (digit_count == 0 || self.byte(first)? == b'0') {
            return None;
        }
        let mut fraction_digits = 0;
        if self.byte(end) == Some(b'.') {
            let first = end + 1;
            (end, digits) = self.digits(first, digits);
            fraction_digits = end - first;
            digit_count += fraction_digits;
            if fraction_digits == 0 {
                return None;
            }
        }
        let has_exponent = matches!(self.byte(end), Some(b'e' | b'E'));
        if has_exponent {
            end = self.exponent(end)?;
        }
        Some(Number { end, negative, digits, digit_count, fraction_digits, has_exponent })
    }

    /// Position after the digits at `at`, none or more, and their number behind that of `value`; what 64 bits can not
    /// hold is cut off above.
    #[inline(always)]
    fn digits(self, mut at: usize, mut value: u64) -> (usize, u64) {
        while let Some(word) = self.word(at) {
            let (count, digits) = leading_digits(word);
            value = value.wrapping_mul(POWERS_OF_TEN[count]).wrapping_add(digits);
            at += count;
            if count < 8 {
                return (at, value);
            }
        }
        while let Some(digit @ b'0'..=b'9') = self.byte(at) {
            value = value.wrapping_mul(10).wrapping_add(u64::from(digit - b'0'));
            at += 1;
        }
        (at, value)
    }

    #[cold]
    fn exponent(self, at: usize) -> Option<usize> {
        let signed = matches!(self.byte(at + 1), Some(b'+' | b'-'));
        let first = at + 1 + usize::from(signed);
        let (end, _) = self.digits(first, 0);
        (end > first).then_some(end)
    }

    /// Position after the value at `at`, whatever it is. Around it `depth` arrays and objects are open.
    #[inline(always)]
    pub(super) fn value(self, at: usize, depth: usize) -> Option<usize> {
        match self.byte(at)? {
            b'"' => Some(self.string(at)?.end),
            b'{' | b'[' => self.container(at, depth),
            first => self.scalar(at, first),
        }
    }

    #[inline]
    fn scalar(self, at: usize, first: u8) -> Option<usize> {
        match first {
            b'"' => Some(self.string(at)?.end),
            b't' => self.literal(at, "true"),
            b'f' => self.literal(at, "false"),
            b'n' => self.literal(at, "null"),
            b'-' | b'0'..=b'9' => Some(self.number(at)?.end),
            _ => None,
        }
    }

    /// Position after the array or object whose opening bracket stands at `at`.
    fn container(self, mut at: usize, depth: usize) -> Option<usize> {
        // One bit per open bracket, the innermost lowest: 1 = object. 128 of them fit.
        const { assert!(DEPTH_MAX <= u128::BITS as usize) };
        let (mut objects, mut open) = (0u128, 0);
        loop {
            // A value begins at `at`.
            match self.byte(at)? {
                bracket @ (b'{' | b'[') => {
                    let is_object = bracket == b'{';
                    objects = objects << 1 | u128::from(is_object);
                    open += 1;
                    if depth + open > DEPTH_MAX {
                        return None;
                    }
                    at = self.skip_blank(at + 1)?;
                    match (self.byte(at)?, is_object) {
                        (b'}', true) | (b']', false) => {}
                        (_, true) => {
                            at = self.any_name(at)?;
                            continue;
                        }
                        (_, false) => continue,
                    }
                }
                first => at = self.skip_blank(self.scalar(at, first)?)?,
            }
            // A value has ended: close what ends with it, up to the next value.
            loop {
                match (self.byte(at)?, objects & 1 == 1) {
                    (b',', true) => {
                        at = self.any_name(self.skip_blank(at + 1)?)?;
                        break;
                    }
                    (b',', false) => {
                        at = self.skip_blank(at + 1)?;
                        break;
                    }
                    (b'}', true) | (b']', false) => {
                        objects >>= 1;
                        open -= 1;
                        at += 1;
                        if open == 0 {
                            return Some(at);
                        }
                        at = self.skip_blank(at)?;
                    }
                    _ => return None,
                }
            }
        }
    }

    /// Position of the value of the member whose name begins at `at`.
    #[inline]
    fn any_name(self, at: usize) -> Option<usize> {
        if self.byte(at)? != b'"' {
            return None;
        }
        self.colon(self.string(at)?.end)
    }

    /// Position of the value after the colon that comes next from `at` on.
    #[inline]
    pub(super) fn colon(self, at: usize) -> Option<usize> {
        let at = self.skip_blank(at)?;
        if self.byte(at)? != b':' {
            return None;
        }
        self.skip_blank(at + 1)
    }
}

/// Marks the highest bit of the first byte that is a quote, a backslash or a control character; bytes above it may be
/// marked too.
#[inline(always)]
fn specials(word: u64) -> u64 {
    // a byte is zero: taking 1 off borrows into its highest bit, which was not set before
    let zeros = |word: u64| word.wrapping_sub(ONES) & !word;
    let quotes = zeros(word ^ (ONES * b'"' as u64));
    let backslashes = zeros(word ^ (ONES * b'\\' as u64));
    let controls = word.wrapping_sub(ONES * 0x20) & !word;
    (quotes | backslashes | controls) & HIGHS
}

/// How many of eight bytes are digits before the first that is none, and their number; the first byte is the lowest.
#[inline(always)]
fn leading_digits(word: u64) -> (usize, u64) {
    // bytes below `0`, above `9` and above 0x7F; what is borrowed or carried only touches bytes behind the first of them
    let others = (word | word.wrapping_sub(ZEROS) | word.wrapping_add(ONES * (0x7F - b'9') as u64)) & HIGHS;
    let count = others.trailing_zeros() as usize / 8;
    // the digits at the end of eight, zeros before them
    let digits = (word ^ ZEROS).checked_shl(64 - 8 * count as u32).unwrap_or(0);
    (count, eight_digits(digits))
}

/// The number that eight bytes from 0 to 9 make, the first in the lowest byte.
#[inline(always)]
fn eight_digits(digits: u64) -> u64 {
    // neighbours make pairs, those make fours, those make eight; no lane overflows into the next
    let pairs = digits.wrapping_mul(10).wrapping_add(digits >> 8) & 0x00FF_00FF_00FF_00FF;
    let fours = pairs.wrapping_mul(100).wrapping_add(pairs >> 16) & 0x0000_FFFF_0000_FFFF;
    fours.wrapping_mul(10_000).wrapping_add(fours >> 32) & 0xFFFF_FFFF
}

/// Splits a JSON array into the texts of its elements, at most `elements_max` of them; gives the number of all.
pub(super) fn split<'a>(text: &'a str, elements: &mut Vec<&'a str>, elements_max: usize) -> Option<usize> {
    elements.clear();
    let scan = Scan::new(text);
    if scan.byte(0)? != b'[' {
        return None;
    }
    let mut at = scan.skip_blank(1)?;
    let mut count = 0;
    if scan.byte(at)? == b']' {
        return (at + 1 == scan.len()).then_some(0);
    }
    loop {
        let end = scan.value(at, 1)?;
        count += 1;
        if count <= elements_max {
            elements.push(scan.text(at, end));
        }
        at = scan.skip_blank(end)?;
        match scan.byte(at)? {
            b',' => at = scan.skip_blank(at + 1)?,
            b']' => return (at + 1 == scan.len()).then_some(count),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_special_byte_of_eight_is_found_whatever_stands_behind_it() {
        for byte in 0..=u8::MAX {
            for behind in [0, b'a', b'"', 0x80, 0xFF] {
                for place in 0..8 {
                    let mut word = [b'z'; 8];
                    word[place] = byte;
                    word[place + 1..].fill(behind);
                    let is_special = |byte: &u8| matches!(byte, b'"' | b'\\' | 0..0x20);
                    let marks = specials(u64::from_le_bytes(word));
                    let found = (marks != 0).then(|| marks.trailing_zeros() as usize / 8);
                    assert_eq!(found, word.iter().position(is_special), "{word:?}");
                }
            }
        }
    }

    #[test]
    fn leading_digits_are_counted_and_read_whatever_stands_behind_them() {
        for count in 0..=8 {
            for byte in (0..=u8::MAX).filter(|byte| !byte.is_ascii_digit()) {
                let mut word = *b"90817263";
                word[count..].fill(byte);
                let text = std::str::from_utf8(&word[..count]).unwrap();
                assert_eq!(leading_digits(u64::from_le_bytes(word)), (count, text.parse().unwrap_or(0)));
            }
        }
    }

    #[test]
    fn a_name_is_taken_only_whole_and_only_where_json_can_write_it_so() {
        for name in
            ["", "a", "abcde", "abcdef", "abcdefghijklm", "abcdefghijklmn", "a name of many bytes", "é"]
        {
            let text = format!("\"{name}\":12345678");
            let scan = Scan::new(&text);
            assert_eq!(scan.name(0, &Name::new(name)), Some(name.len() + 3), "{name}");
            for other in [format!("{name}x"), format!("x{name}"), name.replace('a', "b") + "b"] {
                assert_eq!(scan.name(0, &Name::new(&other)), None, "{other} is not {name}");
            }
        }
        assert_eq!(Scan::new(r#""a"b":1234567"#).name(0, &Name::new("a\"b")), None);
    }
}
