//! `WWW-Authenticate`: what a registry wants to be shown.
//!
//! Source: RFC 9110, sections 5.6 and 11. One header may carry several challenges, which are separated by the same commas
//! as the parameters of one; a challenge begins where a word is followed by a space and not by `=`.

/// One challenge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User name and password in each request.
    Basic,
    /// A token from `realm`.
    Bearer {
        /// The token server's address.
        realm: String,
        /// What to call the registry there.
        service: Option<String>,
        /// What the token must allow, as the registry sees it.
        scope: Option<String>,
    },
}

impl Challenge {
    /// Returns the best challenge of all `WWW-Authenticate` headers: a token rather than a password.
    pub(super) fn best<'a>(headers: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let mut best = None;
        for challenge in headers.into_iter().flat_map(parse) {
            match challenge {
                bearer @ Self::Bearer { .. } => return Some(bearer),
                basic @ Self::Basic => best = Some(basic),
            }
        }
        best
    }
}

fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges = Vec::new();
    let mut current: Option<(String, Vec<(String, String)>)> = None;
    let mut rest = Text(header);
    loop {
        rest.skip_separators();
        let word = rest.token();
        if word.is_empty() {
            // The end, or a character that has no place here: what was understood so far counts.
            break;
        }
        if rest.skip_equals() {
            let value = rest.value();
            if let Some((_, parameters)) = &mut current {
                parameters.push((word.to_ascii_lowercase(), value));
            }
        } else {
            challenges.extend(current.take().and_then(known));
            current = Some((word.to_ascii_lowercase(), Vec::new()));
            rest.skip_token68();
        }
    }
    challenges.extend(current.and_then(known));
    challenges
}

fn known((scheme, parameters): (String, Vec<(String, String)>)) -> Option<Challenge> {
    let parameter = |name: &str| parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone());
    match scheme.as_str() {
        "basic" => Some(Challenge::Basic),
        "bearer" => {
            let filled = |name: &str| parameter(name).filter(|text| !text.is_empty());
            Some(Challenge::Bearer { realm: filled("realm")?, service: filled("service"), scope: filled("scope") })
        }
        _ => None,
    }
}

struct Text<'a>(&'a str);

impl Text<'_> {
    fn take(&mut self, length: usize) -> String {
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken.to_owned()
    }

    fn skip_separators(&mut self) {
        self.0 = self.0.trim_start_matches([' ', '\t', ',']);
    }

    fn token(&mut self) -> String {
        let is_token = |c: char| c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c);
        self.take(self.0.find(|c| !is_token(c)).unwrap_or(self.0.len()))
    }

    fn skip_equals(&mut self) -> bool {
        match self.0.trim_start_matches([' ', '\t']).strip_prefix('=') {
            // `==` is the padding of a token68, not a parameter.
            Some(rest) if !rest.starts_with('=') => {
                self.0 = rest.trim_start_matches([' ', '\t']);
                true
            }
            _ => false,
        }
    }

    fn value(&mut self) -> String {
        let Some(quoted) = self.0.strip_prefix('"') else { return self.token() };
        let mut value = String::new();
        let mut characters = quoted.char_indices();
        while let Some((at, character)) = characters.next() {
            match character {
                '"' => {
                    self.0 = &quoted[at + 1..];
                    return value;
                }
                '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
                other => value.push(other),
            }
        }
        self.0 = "";
        value
    }

    /// Skips the one opaque value that a scheme may have instead of parameters, as in `Negotiate YWJj==`.
    fn skip_token68(&mut self) {
        let after_space = self.0.trim_start_matches(' ');
        let is_token68 = |c: char| c.is_ascii_alphanumeric() || "-._~+/".contains(c);
        let end = after_space.find(|c| !is_token68(c)).unwrap_or(after_space.len());
        let rest = after_space[end..].trim_start_matches('=');
        if after_space.len() < self.0.len() && end > 0 && (rest.is_empty() || rest.trim_start().starts_with(',')) {
            // `Negotiate, Basic`: what follows a comma is the next challenge.
            self.0 = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.to_owned(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        }
    }

    #[test]
    fn challenges_in_all_spellings() {
        let both = bearer("https://a.example/token", Some("r"), Some("repository:a/b:pull,push repository:c:pull"));
        for (header, expected) in [
            (
                r#"Bearer realm="https://a.example/token",service="r",scope="repository:a/b:pull,push repository:c:pull""#,
                vec![both],
            ),
            (
                r#"bearer  Realm = "https://a.example/token" , SERVICE=r"#,
                vec![bearer("https://a.example/token", Some("r"), None)],
            ),
            (r#"Basic realm="a, b=\"c\", Bearer realm=x""#, vec![Challenge::Basic]),
            ("Basic", vec![Challenge::Basic]),
            (r#"Negotiate, Basic realm="x""#, vec![Challenge::Basic]),
            (r#"Negotiate YWJjZA==, Basic realm="x""#, vec![Challenge::Basic]),
            (r#"Digest realm="x", nonce="y", Bearer realm="z""#, vec![bearer("z", None, None)]),
            (
                r#"Basic realm="x", Bearer realm="z",service="",error="invalid_token""#,
                vec![Challenge::Basic, bearer("z", None, None)],
            ),
            (r#"Bearer service="x""#, vec![]),
            (r#"Bearer realm="unterminated"#, vec![bearer("unterminated", None, None)]),
            (r#"Bearer realm="trailing\"#, vec![bearer("trailing", None, None)]),
            ("", vec![]),
            ("=,=", vec![]),
        ] {
            assert_eq!(parse(header), expected, "{header}");
        }
        let best = Challenge::best([r#"Basic realm="x""#, r#"Bearer realm="z""#]);
        assert_eq!(best, Some(bearer("z", None, None)));
        assert_eq!(Challenge::best([r#"Basic realm="x""#]), Some(Challenge::Basic));
        assert_eq!(Challenge::best(["Negotiate"]), None);
    }

    proptest! {
        #[test]
        fn no_header_panics(header in "[ -~\u{e9}]{0,60}") {
            parse(&header);
        }

        #[test]
        fn quoted_values_round_trip(realm in "[ -~]{1,40}") {
            let quoted = realm.replace('\\', "\\\\").replace('"', "\\\"");
            let header = format!("Bearer realm=\"{quoted}\",service=\"s\"");
            prop_assert_eq!(parse(&header), vec![bearer(&realm, Some("s"), None)]);
        }
    }
}
