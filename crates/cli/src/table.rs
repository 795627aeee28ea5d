//! Tables and numbers for people.

use std::fmt::Write as _;

/// Lays out rows in columns, the first row as the head. Columns whose head begins with `>` are aligned to the right.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let head: Vec<bool> =
        rows.first().map(|row| row.iter().map(|cell| cell.starts_with('>')).collect()).unwrap_or_default();
    let text = |row: usize, column: usize| {
        let cell = rows[row].get(column).map_or("", String::as_str);
        if row == 0 { cell.trim_start_matches('>') } else { cell }
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| (0..rows.len()).map(|row| text(row, column).chars().count()).max().unwrap_or(0))
        .collect();
    let mut out = String::new();
    for row in 0..rows.len() {
        let mut line = String::new();
        for (column, width) in widths.iter().enumerate() {
            if column > 0 {
                line.push_str("  ");
            }
            let cell = text(row, column);
            let right = head.get(column).copied().unwrap_or(false);
            // Writing to a string does not fail.
            let _ = if right { write!(line, "{cell:>width$}") } else { write!(line, "{cell:<width$}") };
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

/// Shows a number of bytes as a person would say it: `4.0 KiB`, `291 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 100.0 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

/// Shortens `sha256:0123456789ab...` to twelve digits, as image lists do.
pub(crate) fn short_digest(digest: &str) -> String {
    digest.split_once(':').map_or(digest, |(_, hex)| hex).chars().take(12).collect()
}

/// Shows bytes of an image's name or link so that nothing in them steers a terminal: control characters and bytes that are
/// not UTF-8 as `\xNN`, as `ls` does in its escaped form.
pub(crate) fn printable(name: &[u8]) -> String {
    let mut out = String::new();
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\\' => out.push_str("\\\\"),
                c if c.is_control() => {
                    let mut buffer = [0; 4];
                    for byte in c.encode_utf8(&mut buffer).bytes() {
                        let _ = write!(out, "\\x{byte:02x}");
                    }
                }
                c => out.push(c),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |a: &str, b: &str| vec![a.to_owned(), b.to_owned()];
        assert_eq!(
            table(&[row("name", ">size"), row("a", "5"), row("long", "12")]),
            "name  size\na        5\nlong    12\n"
        );
    }

    #[test]
    fn sizes_and_names_are_readable() {
        let cases = [(0, "0 B"), (1023, "1023 B"), (4096, "4.0 KiB"), (305_135_616, "291 MiB")];
        for (count, shown) in cases {
            assert_eq!(bytes(count), shown);
        }
        assert_eq!(printable(b"a\nb\x1b[0m\xff\\"), "a\\x0ab\\x1b[0m\\xff\\\\");
        assert_eq!(printable("na\u{ef}ve".as_bytes()), "na\u{ef}ve");
    }
}
