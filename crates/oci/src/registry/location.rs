//! Addresses: what may be followed, what may be shown.

use http::{HeaderMap, header};
use reqwest::Url;

/// Most redirects of one request.
pub(super) const MAX_HOPS: usize = 10;

/// Scheme, host and port: what credentials are bound to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    scheme: String,
    host: String,
    port: Option<u16>,
}

impl Origin {
    pub(super) fn of(url: &Url) -> Self {
        Self {
            scheme: url.scheme().to_owned(),
            host: url.host_str().unwrap_or_default().to_owned(),
            port: url.port_or_known_default(),
        }
    }

    /// Says whether the host is the machine itself.
    pub(super) fn is_loopback(&self) -> bool {
        is_loopback(&self.host)
    }

    pub(super) fn is_plain(&self) -> bool {
        self.scheme == "http"
    }

    /// Returns `HOST` or `HOST:PORT`, as the directories of certificates are called.
    pub(super) fn authority(&self) -> String {
        match self.port {
            Some(port) if Some(port) != default_port(&self.scheme) => format!("{}:{port}", self.host),
            _ => self.host.clone(),
        }
    }
}

fn default_port(scheme: &str) -> Option<u16> {
    match scheme {
        "https" => Some(443),
        "http" => Some(80),
        _ => None,
    }
}

/// Says whether a host without its port is `localhost` or an address of the loopback network.
pub(super) fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let address = bare.parse::<std::net::IpAddr>();
    address.is_ok_and(|address| address.is_loopback()) || bare.eq_ignore_ascii_case("localhost")
}

/// Splits `HOST[:PORT]`, with brackets around an IPv6 address, which stay.
pub(super) fn split_port(host: &str) -> (&str, Option<u16>) {
    match host.rsplit_once(':') {
        Some((name, port)) if !port.ends_with(']') => (name, port.parse().ok()),
        _ => (host, None),
    }
}

/// Returns an address without what may be secret in it: user, password, query, fragment.
pub(super) fn redacted(url: &Url) -> String {
    let origin = Origin::of(url);
    let path: String = url.path().chars().take(400).collect();
    format!("{}://{}{path}", origin.scheme, origin.authority())
}

/// Why an address is not followed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Missing,
    Invalid,
    Scheme(String),
    Downgrade,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing => f.write_str("it names no location"),
            Self::Invalid => f.write_str("the location that it names is not an address"),
            Self::Scheme(scheme) => write!(f, "it leads to a {scheme:?} address"),
            Self::Downgrade => f.write_str("it leads from https to http"),
        }
    }
}

/// Returns where `Location` leads, seen from the address that was asked.
///
/// A user name in it is dropped: it would be sent as credentials.
pub(super) fn location(headers: &HeaderMap, asked: &Url) -> Result<Url, Refused> {
    let text = headers.get(header::LOCATION).ok_or(Refused::Missing)?;
    resolve(text.to_str().map_err(|_| Refused::Invalid)?, asked)
}

fn resolve(text: &str, asked: &Url) -> Result<Url, Refused> {
    let mut url = asked.join(text).map_err(|_| Refused::Invalid)?;
    match url.scheme() {
        "https" => {}
        "http" if asked.scheme() == "http" => {}
        "http" => return Err(Refused::Downgrade),
        other => return Err(Refused::Scheme(other.chars().take(20).collect())),
    }
    url.set_fragment(None);
    let cleared = url.set_username("").and_then(|()| url.set_password(None));
    if cleared.is_err() || url.host_str().is_none_or(str::is_empty) {
        return Err(Refused::Invalid);
    }
    Ok(url)
}

/// Returns the next page's address from `Link` headers (RFC 8288): `<...>; rel="next"`.
pub(super) fn next_page(headers: &HeaderMap, asked: &Url) -> Option<Result<Url, Refused>> {
    let links = headers.get_all(header::LINK).into_iter().filter_map(|value| value.to_str().ok());
    for link in links.flat_map(|value| value.split(',')) {
        let Some((target, parameters)) = link.trim().strip_prefix('<').and_then(|link| link.split_once('>')) else {
            continue;
        };
        let is_next = parameters.split(';').any(|parameter| {
            let parameter: String = parameter.chars().filter(|c| !c.is_whitespace() && *c != '"').collect();
            parameter.eq_ignore_ascii_case("rel=next")
        });
        if is_next {
            return Some(resolve(target, asked));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn only_safe_locations_are_followed() {
        let secure = "https://r.example/v2/a/blobs/x?y=z";
        for (asked, location, expected) in [
            (secure, "https://cdn.example/b?sig=1", Ok("https://cdn.example/b?sig=1")),
            (secure, "/other?sig=1", Ok("https://r.example/other?sig=1")),
            (secure, "next", Ok("https://r.example/v2/a/blobs/next")),
            (secure, "//cdn.example/b", Ok("https://cdn.example/b")),
            (secure, "https://user:pass@cdn.example/b#f", Ok("https://cdn.example/b")),
            (secure, "http://cdn.example/b", Err(Refused::Downgrade)),
            (secure, "file:///etc/passwd", Err(Refused::Scheme("file".to_owned()))),
            (secure, "https://", Err(Refused::Invalid)),
            (secure, "https://[::1", Err(Refused::Invalid)),
            ("http://r.example/x", "http://cdn.example/b", Ok("http://cdn.example/b")),
            ("http://r.example/x", "https://cdn.example/b", Ok("https://cdn.example/b")),
        ] {
            assert_eq!(resolve(location, &url(asked)), expected.map(url), "{location}");
        }
    }

    #[test]
    fn origins_differ_by_scheme_host_and_port() {
        let origin = |text: &str| Origin::of(&url(text));
        assert_eq!(origin("https://a.example/x"), origin("https://A.example:443/y?z"));
        for other in ["http://a.example/x", "https://a.example:444/x", "https://b.example/x", "https://a.example.b/x"] {
            assert_ne!(origin("https://a.example/x"), origin(other));
        }
        assert_eq!(origin("https://a.example:5000/").authority(), "a.example:5000");
        assert_eq!(origin("https://a.example/").authority(), "a.example");
        assert_eq!(origin("http://[::1]:80/").authority(), "[::1]");
    }

    #[test]
    fn secrets_in_addresses_are_not_shown() {
        let shown = redacted(&url("https://user:hunter2@r.example:5000/v2/a/blobs/x?X-Amz-Signature=hunter2#hunter2"));
        assert_eq!(shown, "https://r.example:5000/v2/a/blobs/x");
    }

    #[test]
    fn loopback_hosts_are_known() {
        for host in ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.1", "[::1]", "::1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example", "128.0.0.1", "[::2]", "127.0.0.1.example", "example"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn ports_are_split_off() {
        assert_eq!(split_port("a.example"), ("a.example", None));
        assert_eq!(split_port("a.example:5000"), ("a.example", Some(5000)));
        assert_eq!(split_port("[::1]"), ("[::1]", None));
        assert_eq!(split_port("[::1]:5000"), ("[::1]", Some(5000)));
    }

    #[test]
    fn the_next_page_is_found_among_links() {
        let asked = url("https://r.example/v2/a/tags/list?n=2");
        for (link, expected) in [
            (r#"</v2/a/tags/list?last=b&n=2>; rel="next""#, Some("https://r.example/v2/a/tags/list?last=b&n=2")),
            (
                r#"<https://x.example/p>; rel="prev", <?last=c>; rel=next"#,
                Some("https://r.example/v2/a/tags/list?last=c"),
            ),
            (r#"<x>; title="next""#, None),
            ("nonsense", None),
        ] {
            let headers = HeaderMap::from_iter([(header::LINK, link.parse().unwrap())]);
            assert_eq!(next_page(&headers, &asked), expected.map(|text| Ok(url(text))), "{link}");
        }
    }
}
