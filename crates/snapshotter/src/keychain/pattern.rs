//! Which images credentials are for, as kubelet decides it: `HOST[:PORT][/PATH]`, where the host may have wildcards within
//! its labels.
//!
//! Source: Kubernetes' documentation of image pull secrets ("Interpretation of config.json") and of `matchImages` in
//! CredentialProviderConfig. A path matches what begins with it; ports must be equal; a wildcard does not reach over a dot.

/// How Docker Hub is called here, whatever a key calls it.
const DOCKER_HUB: &str = "docker.io";

/// A key of `auths` or `matchImages`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pattern {
    labels: Vec<String>,
    port: String,
    path: String,
}

impl Pattern {
    /// Reads a pattern. An address of Docker's old API stands for its host.
    pub(super) fn new(text: &str) -> Self {
        let text = text.trim();
        let bare = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")).unwrap_or(text);
        let (authority, path) = bare.find('/').map_or((bare, ""), |at| bare.split_at(at));
        let path = ["/v1/", "/v2/"].iter().find(|version| path.starts_with(**version)).map_or(path, |_| &path[3..]);
        let path = if matches!(path, "/" | "/v1" | "/v2") { "" } else { path };
        let (host, port) = split(authority);
        let host = if matches!(host, "index.docker.io" | "registry-1.docker.io") { DOCKER_HUB } else { host };
        Self { labels: host.split('.').map(str::to_owned).collect(), port: port.to_owned(), path: path.to_owned() }
    }

    /// Says whether an image's repository is meant.
    pub(super) fn matches(&self, registry: &str, repository: &str) -> bool {
        let (host, port) = split(registry);
        let labels: Vec<&str> = host.split('.').collect();
        port == self.port
            && labels.len() == self.labels.len()
            && format!("/{repository}").starts_with(&self.path)
            && self.labels.iter().zip(labels).all(|(pattern, label)| {
                // As it stands, too: the brackets of an IPv6 address are no class.
                pattern == label || label_matches(pattern.as_bytes(), label.as_bytes())
            })
    }

    /// Returns a key to sort by: in descending order, what is said more exactly comes first.
    pub(super) fn exactness(&self) -> (usize, usize, usize) {
        let wild = |label: &&String| label.contains(['*', '?', '[']);
        (self.labels.len() - self.labels.iter().filter(wild).count(), self.path.len(), self.labels.len())
    }
}

fn split(authority: &str) -> (&str, &str) {
    match authority.rsplit_once(':') {
        // Not within an IPv6 address.
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (authority, ""),
    }
}

/// `*`, `?`, `[a-z]`, `[^a-z]` and `\` before any of them, as Go's `path.Match` has them. A malformed one matches nothing.
/// In linear space, and in time of the product of both lengths.
fn label_matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut at, mut position) = (0, 0);
    // Where the last `*` was, and what it has swallowed so far.
    let mut star: Option<(usize, usize)> = None;
    loop {
        if pattern.get(at) == Some(&b'*') {
            star = Some((at, position));
            at += 1;
            continue;
        }
        let step = match (pattern.get(at), text.get(position)) {
            (None, None) => return true,
            (Some(_), Some(byte)) => one(&pattern[at..], *byte),
            _ => None,
        };
        match (step, star) {
            (Some(length), _) => (at, position) = (at + length, position + 1),
            (None, Some((from, swallowed))) if swallowed < text.len() => {
                star = Some((from, swallowed + 1));
                (at, position) = (from + 1, swallowed + 1);
            }
            (None, _) => return false,
        }
    }
}

/// Returns the length of the pattern's first element, where it matches the byte.
fn one(pattern: &[u8], byte: u8) -> Option<usize> {
    match *pattern.first()? {
        b'?' => Some(1),
        b'[' => class(pattern, byte),
        b'\\' => (*pattern.get(1)? == byte).then_some(2),
        literal => (literal == byte).then_some(1),
    }
}

fn class(pattern: &[u8], byte: u8) -> Option<usize> {
    let is_negated = pattern.get(1) == Some(&b'^');
    let mut at = 1 + usize::from(is_negated);
    let (mut found, mut any) = (false, false);
    let character = |at: &mut usize| -> Option<u8> {
        match pattern.get(*at)? {
            b'\\' => *at += 1,
            b'-' | b']' => return None,
            _ => {}
        }
        *at += 1;
        pattern.get(*at - 1).copied()
    };
    while !any || *pattern.get(at)? != b']' {
        let low = character(&mut at)?;
        let mut high = low;
        if pattern.get(at) == Some(&b'-') {
            at += 1;
            high = character(&mut at)?;
        }
        found |= (low..=high).contains(&byte);
        any = true;
    }
    (found != is_negated).then_some(at + 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn images_are_matched_as_kubelet_does_it() {
        for (pattern, registry, repository, expected) in [
            ("registry.example", "registry.example", "a/b", true),
            ("registry.example", "other.example", "a/b", false),
            ("https://registry.example/v2/", "registry.example", "a/b", true),
            ("http://registry.example/v1/ns", "registry.example", "ns/b", true),
            ("registry.example/", "registry.example", "a", true),
            ("registry.example/ns", "registry.example", "ns/b", true),
            ("registry.example/ns", "registry.example", "ns-2/b", true),
            ("registry.example/ns/", "registry.example", "ns-2/b", false),
            ("registry.example/ns", "registry.example", "other", false),
            ("registry.example:5000", "registry.example:5000", "a", true),
            ("registry.example:5000", "registry.example", "a", false),
            ("registry.example", "registry.example:5000", "a", false),
            ("*.example", "registry.example", "a", true),
            ("*.example", "a.registry.example", "a", false),
            ("*.*.example", "a.registry.example", "a", true),
            ("*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com", "a", true),
            ("*.dkr.ecr.*.amazonaws.com", "1.dkr.ecr.eu-west-1.amazonaws.com.cn", "a", false),
            ("*-docker.pkg.dev/project", "europe-docker.pkg.dev", "project/x", true),
            ("app*.example/p/*", "app1.example", "p/x", false),
            ("https://index.docker.io/v1/", "docker.io", "library/alpine", true),
            ("registry-1.docker.io/me", "docker.io", "me/x", true),
            ("docker.io/me", "docker.io", "library/alpine", false),
            ("[::1]:5000", "[::1]:5000", "a", true),
            ("", "docker.io", "a", false),
        ] {
            assert_eq!(
                Pattern::new(pattern).matches(registry, repository),
                expected,
                "{pattern} {registry}/{repository}"
            );
        }
    }

    #[test]
    fn labels_have_wildcards() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("*", "abc", true),
            ("a*c", "abbc", true),
            ("a*c*", "abcd", true),
            ("a*c", "abcd", false),
            ("**a", "bba", true),
            ("?b", "ab", true),
            ("?b", "b", false),
            ("[a-c]x", "bx", true),
            ("[^a-c]x", "bx", false),
            ("[^a-c]x", "dx", true),
            ("[]a]", "]", false),
            ("[a-]", "a", false),
            ("[\\]]", "]", true),
            ("[", "[", false),
            ("[a", "a", false),
            ("[a-", "a", false),
            ("\\*", "*", true),
            ("\\*", "a", false),
            ("\\", "\\", false),
            ("x*[ab]", "xyzb", true),
        ] {
            assert_eq!(label_matches(pattern.as_bytes(), text.as_bytes()), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn the_more_exact_goes_first() {
        let exactness = |text: &str| Pattern::new(text).exactness();
        assert!(exactness("r.example/ns/repo") > exactness("r.example/ns"));
        assert!(exactness("r.example") > exactness("*.example/long/path"));
    }

    proptest! {
        #[test]
        fn nothing_panics_and_a_literal_is_itself(pattern in "[-a-c*?\\[\\]^\\\\]{0,12}", text in "[a-c]{0,8}") {
            label_matches(pattern.as_bytes(), text.as_bytes());
            prop_assert!(label_matches(text.as_bytes(), text.as_bytes()));
            Pattern::new(&pattern).matches(&text, &text);
        }
    }
}
