//! What somebody may have meant who has misspelt a name.

/// Returns the nearest of some names, where one is near.
pub(super) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    const LONGEST: usize = 64;
    if name.len() > LONGEST {
        return None;
    }
    let (away, found) = known.map(|other| (distance(name, other), other)).min_by_key(|(away, _)| *away)?;
    // A third of the letters at most: more is another word.
    (away <= (name.chars().count() / 3).max(1)).then_some(found)
}

/// How many letters must be changed, left out or put in, or neighbours exchanged.
fn distance(one: &str, other: &str) -> usize {
    let (one, other): (Vec<char>, Vec<char>) = (one.chars().collect(), other.chars().collect());
    let mut before_last = vec![0; other.len() + 1];
    let mut last: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in other.iter().enumerate() {
            let mut least = (last[j] + usize::from(a != b)).min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *a == other[j - 1] && one[i - 1] == *b {
                least = least.min(before_last[j - 1] + 1);
            }
            row.push(least);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn misspelt_names_are_recognised() {
        let known = ["open_timeout", "read_timeout", "root", "cache.quota"];
        let cases = [
            ("open_timout", Some("open_timeout")),
            ("opentimeout", Some("open_timeout")),
            ("raed_timeout", Some("read_timeout")),
            ("rot", Some("root")),
            ("cache.qouta", Some("cache.quota")),
            ("banana", None),
            ("", None),
        ];
        for (name, expected) in cases {
            assert_eq!(nearest(name, known.into_iter()), expected, "{name}");
        }
    }
}
