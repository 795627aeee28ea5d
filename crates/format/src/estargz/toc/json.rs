//! As much of JSON (RFC 8259) as a table of contents needs, read in place.
//!
//! A layer of a million files has 400 MiB of JSON, and nothing of the layer can be used before it is read: text is not
//! copied unless it has escapes, and nothing is built that the caller does not want. Nesting costs no stack.
//!
//! Strings are bytes: what is not UTF-8 in them is the caller's. Where Go's `encoding/json` is stricter or laxer than
//! RFC 8259, this does the same (one half of a surrogate pair becomes U+FFFD), but for the depth of what is passed over.

use std::borrow::Cow;

/// Deepest nesting of what is passed over.
const DEPTH: usize = 128;

/// A place where the text is not what it should be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct JsonError {
    at: usize,
    problem: Cow<'static, str>,
}

impl JsonError {
    /// Returns the message, with line and column in `text`, from 1.
    pub(super) fn describe(&self, text: &[u8]) -> String {
        let before = &text[..self.at.min(text.len())];
        let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        format!("{} at line {line} column {}", self.problem, before.len() - line_start + 1)
    }
}

/// A text that is being read, from its beginning.
pub(super) struct Json<'a> {
    text: &'a [u8],
    at: usize,
}

impl<'a> Json<'a> {
    pub(super) fn new(text: &'a [u8]) -> Self {
        Self::starting_at(text, 0)
    }

    /// Begins in the midst of a text, at a [`Json::place`] of it.
    pub(super) fn starting_at(text: &'a [u8], at: usize) -> Self {
        Self { text, at }
    }

    /// Returns how many bytes have been read.
    pub(super) fn place(&self) -> usize {
        self.at
    }

    /// Makes an error about what was read last.
    pub(super) fn error(&self, problem: impl Into<Cow<'static, str>>) -> JsonError {
        JsonError { at: self.at, problem: problem.into() }
    }

    /// Reads an object and hands each member's name to `member`, which must read its value.
    pub(super) fn object<E: From<JsonError>>(
        &mut self,
        mut member: impl FnMut(&mut Self, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.require(b'{', "expected an object")?;
        if self.take(b'}') {
            return Ok(());
        }
        loop {
            let name = self.string()?;
            self.require(b':', "expected a colon")?;
            member(self, &name)?;
            if !self.take(b',') {
                return Ok(self.require(b'}', "expected a comma or the end of an object")?);
            }
        }
    }

    /// Reads a list and calls `element` before each element, which it must read.
    pub(super) fn list<E: From<JsonError>>(
        &mut self,
        mut element: impl FnMut(&mut Self) -> Result<(), E>,
    ) -> Result<(), E> {
        self.require(b'[', "expected a list")?;
        if self.take(b']') {
            return Ok(());
        }
        loop {
            element(self)?;
            if !self.take(b',') {
                return Ok(self.require(b']', "expected a comma or the end of a list")?);
            }
        }
    }

    /// Reads `null` as `None`, anything else with `read`.
    pub(super) fn nullable<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, JsonError>,
    ) -> Result<Option<T>, JsonError> {
        if self.peek() == Some(b'n') {
            self.word(b"null")?;
            return Ok(None);
        }
        read(self).map(Some)
    }

    /// Reads a string; its escapes are decoded.
    pub(super) fn string(&mut self) -> Result<Cow<'a, [u8]>, JsonError> {
        self.require(b'"', "expected a string")?;
        let text = self.text;
        let start = self.at;
        let plain = self.plain();
        if self.text.get(self.at) == Some(&b'"') {
            self.at += 1;
            return Ok(Cow::Borrowed(plain));
        }
        let mut decoded = text[start..self.at].to_vec();
        loop {
            match self.text.get(self.at) {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(Cow::Owned(decoded));
                }
                Some(b'\\') => {
                    self.at += 1;
                    self.escape(&mut decoded)?;
                }
                Some(_) => return Err(self.error("control character in a string")),
                None => return Err(self.error("the text ends in a string")),
            }
            decoded.extend_from_slice(self.plain());
        }
    }

    /// Reads a number that is a whole one and fits.
    pub(super) fn unsigned(&mut self) -> Result<u64, JsonError> {
        let (negative, value) = self.integer()?;
        if negative && value != 0 { Err(self.error("number is negative")) } else { Ok(value) }
    }

    /// Reads a number that is a whole one and fits.
    pub(super) fn signed(&mut self) -> Result<i64, JsonError> {
        let (negative, value) = self.integer()?;
        let signed = if negative { 0_i64.checked_sub_unsigned(value) } else { i64::try_from(value).ok() };
        signed.ok_or_else(|| self.error("number is too large"))
    }

    /// Passes over a value.
    pub(super) fn skip(&mut self) -> Result<(), JsonError> {
        // What ends the objects and lists that the next value is in.
        let mut ends = Vec::new();
        loop {
            match self.peek() {
                Some(b'{') => {
                    self.at += 1;
                    if !self.take(b'}') {
                        self.string()?;
                        self.require(b':', "expected a colon")?;
                        ends.push(b'}');
                        continue;
                    }
                }
                Some(b'[') => {
                    self.at += 1;
                    if !self.take(b']') {
                        ends.push(b']');
                        if ends.len() > DEPTH {
                            return Err(self.error("nested too deeply"));
                        }
                        continue;
                    }
                }
                Some(b'"') => drop(self.string()?),
                Some(b't') => self.word(b"true")?,
                Some(b'f') => self.word(b"false")?,
                Some(b'n') => self.word(b"null")?,
                _ => self.number()?,
            }
            loop {
                let Some(end) = ends.last().copied() else { return Ok(()) };
                if self.take(b',') {
                    if end == b'}' {
                        self.string()?;
                        self.require(b':', "expected a colon")?;
                    }
                    break;
                }
                self.require(end, "expected a comma or an end")?;
                ends.pop();
            }
            if ends.len() > DEPTH {
                return Err(self.error("nested too deeply"));
            }
        }
    }

    /// Returns the next byte that is no white space, and goes there.
    #[inline]
    fn peek(&mut self) -> Option<u8> {
        // How Go indents the members of an entry: a tenth of a table is this.
        if self.text[self.at..].first_chunk() == Some(b"\n\t\t\t") {
            self.at += 4;
        }
        loop {
            let byte = *self.text.get(self.at)?;
            if byte > b' ' || !matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
                return Some(byte);
            }
            self.at += 1;
        }
    }

    #[inline]
    fn take(&mut self, byte: u8) -> bool {
        let taken = self.peek() == Some(byte);
        self.at += usize::from(taken);
        taken
    }

    #[inline]
    fn require(&mut self, byte: u8, problem: &'static str) -> Result<(), JsonError> {
        match self.take(byte) {
            true => Ok(()),
            false if self.at == self.text.len() => Err(self.error("the text ends")),
            false => Err(self.error(problem)),
        }
    }

    fn word(&mut self, word: &[u8]) -> Result<(), JsonError> {
        if !self.text[self.at..].starts_with(word) {
            return Err(self.error("expected a value"));
        }
        self.at += word.len();
        Ok(())
    }

    /// Reads a part of a string up to its end, an escape, or what must not be there.
    fn plain(&mut self) -> &'a [u8] {
        let rest = &self.text[self.at..];
        let length = plain_length(rest);
        self.at += length;
        &rest[..length]
    }

    /// Reads what stands behind a backslash.
    fn escape(&mut self, decoded: &mut Vec<u8>) -> Result<(), JsonError> {
        let byte = self.text.get(self.at).copied();
        self.at += 1;
        decoded.push(match byte {
            Some(byte @ (b'"' | b'\\' | b'/')) => byte,
            Some(b'b') => 0x08,
            Some(b'f') => 0x0c,
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'u') => {
                let decoded_char = self.unicode()?;
                decoded.extend_from_slice(decoded_char.encode_utf8(&mut [0; 4]).as_bytes());
                return Ok(());
            }
            _ => return Err(self.error("escape is not known")),
        });
        Ok(())
    }

    /// Reads the digits of `\u`, and another such escape where the two make one character.
    fn unicode(&mut self) -> Result<char, JsonError> {
        let unit = self.hexadecimal()?;
        if let 0xd800..0xdc00 = unit
            && self.text[self.at..].starts_with(b"\\u")
        {
            let after_first = self.at;
            self.at += 2;
            let low = self.hexadecimal()?;
            if let 0xdc00..0xe000 = low {
                let code = 0x1_0000 + ((unit - 0xd800) << 10) + (low - 0xdc00);
                return Ok(char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
            }
            self.at = after_first;
        }
        Ok(char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER))
    }

    fn hexadecimal(&mut self) -> Result<u32, JsonError> {
        let digits = self.text.get(self.at..self.at + 4).unwrap_or_default();
        let value = digits.iter().try_fold(0, |value, digit| Some(value << 4 | char::from(*digit).to_digit(16)?));
        match value {
            Some(value) if digits.len() == 4 => {
                self.at += 4;
                Ok(value)
            }
            _ => Err(self.error("expected four hexadecimal digits")),
        }
    }

    /// Reads a whole number: whether it is negative, and its amount.
    fn integer(&mut self) -> Result<(bool, u64), JsonError> {
        let negative = self.take(b'-');
        let digits = &self.text[self.at..];
        let mut value = 0_u64;
        let mut length = 0;
        while let Some(digit @ b'0'..=b'9') = digits.get(length) {
            let next = value.checked_mul(10).and_then(|value| value.checked_add(u64::from(digit - b'0')));
            value = next.ok_or_else(|| self.error("number is too large"))?;
            length += 1;
        }
        if length == 0 || (length > 1 && digits[0] == b'0') {
            return Err(self.error("expected a number"));
        }
        self.at += length;
        match self.text.get(self.at) {
            Some(b'.' | b'e' | b'E') => Err(self.error("number is not a whole one")),
            _ => Ok((negative, value)),
        }
    }

    /// Passes over a number of any form.
    fn number(&mut self) -> Result<(), JsonError> {
        let start = self.at;
        self.at += usize::from(self.text.get(start) == Some(&b'-'));
        let digits = |json: &mut Self| {
            let rest = &json.text[json.at..];
            let length = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
            json.at += length;
            length
        };
        let first = self.at;
        let whole = digits(self);
        let mut valid = whole == 1 || (whole > 1 && self.text[first] != b'0');
        if self.text.get(self.at) == Some(&b'.') {
            self.at += 1;
            valid &= digits(self) > 0;
        }
        if let Some(b'e' | b'E') = self.text.get(self.at) {
            self.at += 1;
            self.at += usize::from(matches!(self.text.get(self.at), Some(b'+' | b'-')));
            valid &= digits(self) > 0;
        }
        if valid { Ok(()) } else { Err(JsonError { at: start, problem: "expected a value".into() }) }
    }
}

/// Returns how many bytes there are before the first quotation mark, backslash or control character. Most bytes of a
/// table are in strings, so eight are looked at at once.
fn plain_length(text: &[u8]) -> usize {
    const ONES: u64 = 0x0101_0101_0101_0101;
    const HIGH_BITS: u64 = ONES << 7;
    // A byte below `limit` (at most 128) borrows, which sets its high bit, and did not have it set. A byte above a found
    // one can be found wrongly, because of the borrow, but the lowest is always right.
    let below = |word: u64, limit: u64| word.wrapping_sub(ONES * limit) & !word & HIGH_BITS;
    let (words, rest) = text.as_chunks::<8>();
    let mut length = 0;
    for word in words {
        let word = u64::from_le_bytes(*word);
        let quotes = word ^ (ONES * u64::from(b'"'));
        let backslashes = word ^ (ONES * u64::from(b'\\'));
        let found = below(word, 0x20) | below(quotes, 1) | below(backslashes, 1);
        if found != 0 {
            return length + found.trailing_zeros() as usize / 8;
        }
        length += 8;
    }
    length + rest.iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..0x20)).unwrap_or(rest.len())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn strings_are_decoded() {
        let cases: &[(&[u8], &[u8])] = &[
            (br#""""#, b""),
            (br#"  "plain""#, b"plain"),
            (br#""a\"\\\/\b\f\n\r\tz""#, b"a\"\\/\x08\x0c\n\r\tz"),
            (br#""\u0041\u00e9\u20AC\ud83d\ude00""#, "A\u{e9}\u{20ac}\u{1f600}".as_bytes()),
            (br#""\ud83d""#, "\u{fffd}".as_bytes()),
            (br#""\ude00\ud83dx""#, "\u{fffd}\u{fffd}x".as_bytes()),
            (br#""\ud83d\u0041""#, "\u{fffd}A".as_bytes()),
            (br#""\ud83d\ud83d\ude00""#, "\u{fffd}\u{1f600}".as_bytes()),
            (b"\"\xff\xe9\"", b"\xff\xe9"),
        ];
        for (text, expected) in cases {
            let found = Json::new(text).string().unwrap();
            assert_eq!(found.escape_ascii().to_string(), expected.escape_ascii().to_string());
        }
        for text in
            [&b"x"[..], b"", b"\"", b"\"a", b"\"\\", b"\"\\x\"", b"\"\\u12\"", b"\"\\u12g4\"", b"\"a\nb\"", b"\"\0\""]
        {
            assert!(Json::new(text).string().is_err(), "{}", text.escape_ascii());
        }
    }

    #[test]
    fn numbers_are_whole_and_bounded() {
        for (text, expected) in
            [("0", 0), ("-0", 0), ("42 ", 42), ("-9223372036854775808", i64::MIN), ("9223372036854775807,", i64::MAX)]
        {
            assert_eq!(Json::new(text.as_bytes()).signed(), Ok(expected), "{text}");
        }
        assert_eq!(Json::new(b"18446744073709551615").unsigned(), Ok(u64::MAX));
        for text in ["", "-", "01", "1.0", "1e3", "+1", "x", "9223372036854775808", "-9223372036854775809"] {
            assert!(Json::new(text.as_bytes()).signed().is_err(), "{text}");
        }
        for text in ["-1", "18446744073709551616"] {
            assert!(Json::new(text.as_bytes()).unsigned().is_err(), "{text}");
        }
    }

    #[test]
    fn values_are_passed_over() {
        for text in [
            "null",
            "true",
            "false",
            "0",
            "-1.5e+10",
            "\"a\"",
            "[]",
            "{}",
            "[1, [2, []], {\"a\": {}}]",
            " { \"a\" : [ { } , null ] , \"b\" : -0.1E-2 } ",
        ] {
            let mut json = Json::new(text.as_bytes());
            json.skip().unwrap();
            assert_eq!(json.peek(), None, "{text}");
        }
        for text in [
            "",
            "nul",
            "[",
            "[1",
            "[1,",
            "[1,]",
            "{",
            "{1}",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "[}",
            "{]",
            "]",
            "01x",
            ".5",
            "1.",
            "1e",
            "-",
        ] {
            let mut json = Json::new(text.as_bytes());
            assert!(json.skip().is_err() || json.peek().is_some(), "{text}");
        }
        assert!(Json::new("[".repeat(1 << 20).as_bytes()).skip().is_err());
        assert!(Json::new("{\"a\":".repeat(1 << 20).as_bytes()).skip().is_err());
        let deep = format!("{}{}", "[".repeat(DEPTH), "]".repeat(DEPTH));
        assert!(Json::new(deep.as_bytes()).skip().is_ok());
    }

    #[test]
    fn errors_tell_their_place() {
        let text = b"{\n  \"a\": x}";
        let error = Json::new(text).object(|json, _| json.skip()).unwrap_err();
        assert_eq!(error.describe(text), "expected a value at line 2 column 8");
    }

    proptest! {
        #[test]
        fn plain_bytes_are_counted(any in any::<Vec<u8>>(), text in "[ -#\\[-^\u{1f}\u{7f}\u{e9}]{0,30}") {
            for bytes in [any, text.into_bytes()] {
                let naive = bytes.iter().take_while(|byte| !matches!(byte, b'"' | b'\\' | 0..0x20)).count();
                prop_assert_eq!(plain_length(&bytes), naive);
            }
        }

        #[test]
        fn agrees_with_serde_json(text in r#"[\[\]{},:" 0-9eE.+\-a\\u]{0,12}"#) {
            let mut json = Json::new(text.as_bytes());
            let ours = json.skip().is_ok() && json.peek().is_none();
            prop_assert_eq!(ours, serde_json::from_str::<serde::de::IgnoredAny>(&text).is_ok());
        }

        #[test]
        fn strings_that_serde_json_writes_are_read(text in any::<String>()) {
            let written = serde_json::to_string(&text).unwrap();
            prop_assert_eq!(Json::new(written.as_bytes()).string().unwrap(), text.as_bytes());
        }
    }
}
