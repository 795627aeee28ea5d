//! RFC 3339 times, as `modtime` has them.
//!
//! Go writes UTC and, for years beyond 9999 or before 0, more digits or a sign than RFC 3339 has; such times are read
//! back here, so that no time that a tar can hold is lost.

use std::io::Write as _;

use crate::index::Timestamp;

const SECONDS_PER_DAY: i64 = 86_400;

/// Reads a time: any offset from UTC, up to nine digits of fraction, any year of four to twelve digits.
#[must_use]
pub fn parse(text: &[u8]) -> Option<Timestamp> {
    let mut rest = Rest(text);
    let negative = rest.take(b"-");
    let year_digits = rest.0.iter().take_while(|byte| byte.is_ascii_digit()).count();
    if !(4..=12).contains(&year_digits) {
        return None;
    }
    let year = rest.number(year_digits)?;
    let year = if negative { -year } else { year };
    rest.require(b"-")?;
    let month = rest.number(2)?;
    rest.require(b"-")?;
    let day = rest.number(2)?;
    rest.require(b"Tt")?;
    let hour = rest.number(2)?;
    rest.require(b":")?;
    let minute = rest.number(2)?;
    rest.require(b":")?;
    let second = rest.number(2)?;
    let mut nanoseconds = 0;
    if rest.take(b".,") {
        let digits = rest.0.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if !(1..=9).contains(&digits) {
            return None;
        }
        let scale = 10_u32.pow(9 - u32::try_from(digits).ok()?);
        nanoseconds = u32::try_from(rest.number(digits)?).ok()? * scale;
    }
    let mut east = 0;
    if !rest.take(b"Zz") {
        let west = rest.0.first() == Some(&b'-');
        rest.require(b"+-")?;
        let hours = rest.number(2)?;
        rest.require(b":")?;
        let minutes = rest.number(2)?;
        if hours > 23 || minutes > 59 {
            return None;
        }
        east = (hours * 60 + minutes) * if west { -60 } else { 60 };
    }
    let in_range = (1..=12).contains(&month)
        && (1..=days_of_month(year, month)).contains(&day)
        && hour <= 23
        && minute <= 59
        // 60 is a leap second; it is the same instant as 0 of the next minute.
        && second <= 60
        && rest.0.is_empty();
    if !in_range {
        return None;
    }
    let seconds = days_since_1970(year, month, day)
        .checked_mul(SECONDS_PER_DAY)?
        .checked_add(hour * 3600 + minute * 60 + second - east)?;
    Some(Timestamp { seconds, nanoseconds })
}

/// Appends a time in UTC, with a fraction where there is one, without zeros behind its last digit.
pub fn write(time: Timestamp, text: &mut Vec<u8>) {
    let (year, month, day) = date(time.seconds.div_euclid(SECONDS_PER_DAY));
    let second = time.seconds.rem_euclid(SECONDS_PER_DAY);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let sign = if year < 0 { "-" } else { "" };
    let year = year.unsigned_abs();
    // Writing to a vector does not fail.
    let _ = write!(text, "{sign}{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if time.nanoseconds != 0 {
        let _ = write!(text, ".{:09}", time.nanoseconds);
        while text.last() == Some(&b'0') {
            text.pop();
        }
    }
    text.push(b'Z');
}

/// What is left of a text.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take(&mut self, any_of: &[u8]) -> bool {
        match self.0.split_first() {
            Some((first, rest)) if any_of.contains(first) => {
                self.0 = rest;
                true
            }
            _ => false,
        }
    }

    fn require(&mut self, any_of: &[u8]) -> Option<()> {
        self.take(any_of).then_some(())
    }

    /// Takes exactly `digits` digits, at most 18.
    fn number(&mut self, digits: usize) -> Option<i64> {
        let (number, rest) = self.0.split_at_checked(digits)?;
        self.0 = rest;
        number.iter().try_fold(0, |value, byte| byte.is_ascii_digit().then(|| value * 10 + i64::from(byte - b'0')))
    }
}

fn is_leap(year: i64) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

fn days_of_month(year: i64, month: i64) -> i64 {
    match month {
        2 if is_leap(year) => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

// The Gregorian calendar repeats after 400 years, which are 146,097 days. Years are counted from 1 March here, so that
// the leap day is a year's last; 719,468 days lie between 0000-03-01 and 1970-01-01.
const DAYS_OF_ERA: i64 = 146_097;
const DAYS_TO_1970: i64 = 719_468;

fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * DAYS_OF_ERA + day_of_era - DAYS_TO_1970
}

fn date(days_since_1970: i64) -> (i64, i64, i64) {
    let days = days_since_1970 + DAYS_TO_1970;
    let (era, day_of_era) = (days.div_euclid(DAYS_OF_ERA), days.rem_euclid(DAYS_OF_ERA));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(seconds: i64, nanoseconds: u32) -> String {
        let mut text = Vec::new();
        write(Timestamp { seconds, nanoseconds }, &mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn known_times_are_read_and_written() {
        for (text, seconds, nanoseconds) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("1969-12-31T23:59:59.999999999Z", -1, 999_999_999),
            ("2000-02-29T12:34:56Z", 951_827_696, 0),
            ("2026-08-01T00:00:00.5Z", 1_785_542_400, 500_000_000),
            ("0000-01-01T00:00:00Z", -62_167_219_200, 0),
            ("0001-01-01T00:00:00Z", -62_135_596_800, 0),
            ("9999-12-31T23:59:59Z", 253_402_300_799, 0),
            ("10000-01-01T00:00:00Z", 253_402_300_800, 0),
            ("-0001-12-31T00:00:00Z", -62_167_305_600, 0),
        ] {
            assert_eq!(parse(text.as_bytes()), Some(Timestamp { seconds, nanoseconds }), "{text}");
            assert_eq!(written(seconds, nanoseconds), text);
        }
    }

    #[test]
    fn offsets_and_fractions_are_read() {
        for (text, seconds, nanoseconds) in [
            ("1970-01-01T01:00:00+01:00", 0, 0),
            ("1969-12-31T18:30:00-05:30", 0, 0),
            ("1970-01-01t00:00:01z", 1, 0),
            ("1970-01-01T00:00:00.000000001Z", 0, 1),
            ("1970-01-01T00:00:00,25Z", 0, 250_000_000),
            ("2016-12-31T23:59:60Z", 1_483_228_800, 0),
        ] {
            assert_eq!(parse(text.as_bytes()), Some(Timestamp { seconds, nanoseconds }), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for text in [
            "",
            "1970",
            "1970-01-01",
            "1970-01-01T00:00:00",
            "1970-01-01 00:00:00Z",
            "1970-01-01T00:00Z",
            "1970-13-01T00:00:00Z",
            "1970-00-01T00:00:00Z",
            "1970-02-29T00:00:00Z",
            "1900-02-29T00:00:00Z",
            "1970-01-00T00:00:00Z",
            "1970-01-01T24:00:00Z",
            "1970-01-01T00:60:00Z",
            "1970-01-01T00:00:61Z",
            "1970-01-01T00:00:00.Z",
            "1970-01-01T00:00:00.1234567890Z",
            "1970-01-01T00:00:00+24:00",
            "1970-01-01T00:00:00+0100",
            "1970-01-01T00:00:00Zx",
            "+1970-01-01T00:00:00Z",
            "70-01-01T00:00:00Z",
            "999999999999-01-01T00:00:00Z",
            "9999999999999-01-01T00:00:00Z",
        ] {
            assert_eq!(parse(text.as_bytes()), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn every_time_round_trips(seconds in any::<i64>(), nanoseconds in 0..1_000_000_000_u32) {
            let text = written(seconds, nanoseconds);
            prop_assert_eq!(parse(text.as_bytes()), Some(Timestamp { seconds, nanoseconds }), "{}", text);
        }

        #[test]
        fn no_text_panics(text in proptest::collection::vec(any::<u8>(), 0..40)) {
            let _ = parse(&text);
        }
    }
}
