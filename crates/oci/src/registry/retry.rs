//! When a request is repeated, and how long to wait before.

use std::{
    hash::{BuildHasher as _, RandomState},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use http::{HeaderMap, StatusCode, header};

use super::Config;
use crate::place::Error;

/// How many repetitions are left of one operation.
#[derive(Debug)]
pub(super) struct Attempts {
    left: u32,
    failed: u32,
    retries: u32,
    delay: Duration,
    delay_max: Duration,
    /// No attempt begins after it.
    deadline: Option<Instant>,
}

impl Attempts {
    pub(super) fn new(config: &Config) -> Self {
        Self {
            left: config.retries,
            failed: 0,
            retries: config.retries,
            delay: config.retry_delay,
            delay_max: config.retry_delay_max,
            deadline: None,
        }
    }

    /// Bounds the whole.
    pub(super) fn until(self, deadline: Instant) -> Self {
        Self { deadline: Some(deadline), ..self }
    }

    /// Waits before the next attempt; `false`, at once, where there is none left.
    pub(super) async fn pause(&mut self, retry_after: Option<Duration>) -> bool {
        let Some(left) = self.left.checked_sub(1) else { return false };
        self.left = left;
        let wait = self.next_delay(retry_after);
        if self.deadline.is_some_and(|deadline| deadline.saturating_duration_since(Instant::now()) <= wait) {
            return false;
        }
        self.failed += 1;
        if let Some(asked) = retry_after.filter(|asked| !asked.is_zero()) {
            tracing::info!(asked_seconds = asked.as_secs(), seconds = wait.as_secs_f32(), "the registry asks to wait");
        }
        tokio::time::sleep(wait).await;
        true
    }

    /// Says whether there were failures since the last progress.
    pub(super) fn has_failed(&self) -> bool {
        self.failed > 0
    }

    /// Takes note that something was achieved: failures from here on are new ones.
    pub(super) fn progress(&mut self) {
        self.left = self.retries;
        self.failed = 0;
    }

    fn next_delay(&self, retry_after: Option<Duration>) -> Duration {
        let doubled = self.delay.saturating_mul(1_u32.checked_shl(self.failed).unwrap_or(u32::MAX));
        let ours = jittered(doubled.min(self.delay_max));
        // The server's wish is kept also where many clients heard the same: the jitter comes on top.
        retry_after.map_or(ours, |theirs| theirs.saturating_add(ours).min(self.delay_max))
    }
}

/// Does something that must not take longer than [`Config::deadline`], repetitions and all. `work` is told when that is.
///
/// # Errors
/// [`Error::Registry`], transient, where it would.
pub(super) async fn within<T>(
    config: &Config,
    work: impl AsyncFnOnce(Instant) -> Result<T, Error>,
) -> Result<T, Error> {
    let deadline = Instant::now() + config.deadline;
    match tokio::time::timeout_at(deadline.into(), work(deadline)).await {
        Ok(outcome) => outcome,
        Err(_) => Err(Error::Registry {
            method: "GET".to_owned(),
            url: "the registry and its mirrors".to_owned(),
            status: None,
            detail: format!("no whole answer within {} seconds", config.deadline.as_secs_f32()),
            transient: true,
        }),
    }
}

/// Shortens a time by up to a half, so that clients that failed together don't come back together.
pub(super) fn jittered(time: Duration) -> Duration {
    // A hasher with fresh random keys: no crate of random numbers is needed for this.
    let random = RandomState::new().hash_one(0) % 1024;
    time / 2 + time / 2 * u32::try_from(random).unwrap_or(0) / 1024
}

/// Says whether the same request may be answered otherwise later.
pub(super) fn is_transient(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::REQUEST_TIMEOUT
            | StatusCode::TOO_MANY_REQUESTS
            | StatusCode::INTERNAL_SERVER_ERROR
            | StatusCode::BAD_GATEWAY
            | StatusCode::SERVICE_UNAVAILABLE
            | StatusCode::GATEWAY_TIMEOUT
    )
}

/// Says whether a status means that the request was not acted upon, so that one that is not idempotent may be repeated.
pub(super) fn is_refusal(status: u16) -> bool {
    matches!(status, 408 | 429 | 503)
}

/// Reads `Retry-After`: seconds, or a date.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse::<u64>() {
        return Some(Duration::from_secs(seconds));
    }
    let date = UNIX_EPOCH.checked_add(Duration::from_secs(http_date(text)?))?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

/// Reads `Sun, 06 Nov 1994 08:49:37 GMT` as seconds since 1970. Of the forms of RFC 9110, section 5.6.7, only this one may
/// be sent.
fn http_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (_, date) = text.split_once(", ")?;
    let [day, month, year, time, "GMT"] = date.split(' ').collect::<Vec<_>>()[..] else { return None };
    let [hour, minute, second] = time.split(':').map(|part| part.parse().ok()).collect::<Option<Vec<u64>>>()?[..]
    else {
        return None;
    };
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let (day, year): (u64, u64) = (day.parse().ok()?, year.parse().ok()?);
    if !(1970..=9999).contains(&year) || !(1..=31).contains(&day) || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    // Days before the date, with years that begin in March so that the leap day is the last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day - 1;
    // 719,468 days lie between 0000-03-01 and 1970-01-01.
    Some((days - 719_468) * 86_400 + hour * 3600 + minute * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attempts(retries: u32) -> Attempts {
        let delay = Duration::from_millis(100);
        Attempts { left: retries, failed: 0, retries, delay, delay_max: Duration::from_secs(1), deadline: None }
    }

    #[test]
    fn waits_double_up_to_a_bound_and_vary() {
        let mut attempts = attempts(10);
        for (failed, longest) in [(0, 100), (1, 200), (2, 400), (3, 800), (4, 1000), (5, 1000), (40, 1000)] {
            attempts.failed = failed;
            for _ in 0..20 {
                let wait = attempts.next_delay(None);
                assert!(wait >= Duration::from_millis(longest / 2), "{failed}: {wait:?}");
                assert!(wait <= Duration::from_millis(longest), "{failed}: {wait:?}");
            }
        }
    }

    #[test]
    fn a_server_may_ask_for_more_but_not_for_ever() {
        let attempts = attempts(10);
        let wait = attempts.next_delay(Some(Duration::from_millis(500)));
        assert!(wait >= Duration::from_millis(550) && wait <= Duration::from_millis(600), "{wait:?}");
        assert_eq!(attempts.next_delay(Some(Duration::from_secs(86_400))), Duration::from_secs(1));
    }

    #[tokio::test]
    async fn attempts_end_and_progress_renews_them() {
        let mut attempts = Attempts { delay: Duration::ZERO, ..attempts(2) };
        assert!(attempts.pause(None).await && attempts.pause(None).await);
        assert!(!attempts.pause(None).await);
        attempts.progress();
        assert!(attempts.pause(None).await);
    }

    #[tokio::test]
    async fn no_attempt_begins_after_the_deadline() {
        let soon = Instant::now() + Duration::from_secs(5);
        let mut attempts =
            Attempts { delay: Duration::ZERO, delay_max: Duration::from_secs(60), ..attempts(2) }.until(soon);
        assert!(!attempts.pause(Some(Duration::from_secs(30))).await);
        assert!(attempts.pause(None).await);
    }

    #[test]
    fn dates_are_read() {
        for (text, seconds) in [
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(784_111_777)),
            ("Thu, 01 Jan 1970 00:00:00 GMT", Some(0)),
            ("Thu, 29 Feb 2024 23:59:59 GMT", Some(1_709_251_199)),
            ("Fri, 01 Mar 2024 00:00:00 GMT", Some(1_709_251_200)),
            ("Sat, 28 Nov 2026 18:52:00 GMT", Some(1_795_891_920)),
            ("Sunday, 06-Nov-94 08:49:37 GMT", None),
            ("Sun, 06 Nov 1994 08:49:37 CET", None),
            ("Sun, 06 Nov 1969 08:49:37 GMT", None),
            ("Sun, 06 Xyz 1994 08:49:37 GMT", None),
            ("later", None),
            ("", None),
        ] {
            assert_eq!(http_date(text), seconds, "{text}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let read = |text: &str| retry_after(&HeaderMap::from_iter([(header::RETRY_AFTER, text.parse().unwrap())]));
        assert_eq!(read("7"), Some(Duration::from_secs(7)));
        assert_eq!(read("-7"), None);
        assert_eq!(read("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        assert!(read("Fri, 01 Jan 2100 00:00:00 GMT").is_some_and(|wait| wait > Duration::from_secs(86_400)));
        assert_eq!(retry_after(&HeaderMap::new()), None);
    }
}
