//! Sizes and times as people type them, on command lines and in configuration: `20G`, `7d`.

use std::time::Duration;

/// Reads a number of bytes: `512`, `64K`, `1.5GiB`. Units are powers of 1024.
///
/// # Errors
/// A sentence that says what is expected.
pub fn size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text);
    let unit = unit.trim().to_ascii_lowercase();
    let unit = unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')).unwrap_or(&unit);
    let shift = match unit {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return Err(format!("{text:?} is no size such as 500M or 20G")),
    };
    scaled(number, 1 << shift).ok_or_else(|| format!("{text:?} is no size such as 500M or 20G"))
}

/// Reads a time: `90s`, `30m`, `12h`, `7d`, `2w`.
///
/// # Errors
/// A sentence that says what is expected.
pub fn duration(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text);
    let seconds = match unit.trim() {
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 604_800,
        _ => return Err(format!("{text:?} is no time such as 12h or 7d")),
    };
    scaled(number, seconds).map(Duration::from_secs).ok_or_else(|| format!("{text:?} is no time such as 12h or 7d"))
}

fn split(text: &str) -> (&str, &str) {
    let text = text.trim();
    text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len()))
}

/// Multiplies a decimal number of at most three digits behind the point.
fn scaled(number: &str, unit: u64) -> Option<u64> {
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    let thousandths = match part.len() {
        _ if number.ends_with('.') => return None,
        0..=3 => format!("{part:0<3}").parse::<u64>().ok()?,
        _ => return None,
    };
    whole.parse::<u64>().ok()?.checked_mul(unit)?.checked_add(unit.checked_mul(thousandths)? / 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_read() {
        let sizes = [("0", 0), ("512", 512), ("1K", 1024), ("1.5g", 3 << 29), ("2MiB", 2 << 20), ("3 TB", 3 << 40)];
        for (text, expected) in sizes {
            assert_eq!(size(text), Ok(expected), "{text}");
        }
        for (text, expected) in [("90s", 90), ("1.5h", 5400), ("7d", 604_800), ("2w", 1_209_600)] {
            assert_eq!(duration(text), Ok(Duration::from_secs(expected)), "{text}");
        }
        for bad in ["", "G", "-1", "1.", ".5G", "1.2345G", "1X", "20000000T", "1e3", "1..2"] {
            assert!(size(bad).is_err(), "{bad}");
        }
        for bad in ["", "7", "d", "7 days", "-1d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
