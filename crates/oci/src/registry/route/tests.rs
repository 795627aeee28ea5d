use super::*;

fn failure(error: Error) -> Failure {
    Failure { error, wait: None }
}

fn broken() -> Error {
    crate::registry::error::broken(&http::Method::GET, &"http://h.example/".parse().unwrap(), "broken")
}

fn not_found() -> Error {
    Error::NotFound { what: "it".into(), place: "there".into() }
}

fn denied() -> Error {
    Error::Denied { place: "there".into(), detail: "no".into(), remedy: "none" }
}

fn config() -> Config {
    let put_back = Duration::from_secs(3600);
    Config { hosts_dirs: Vec::new(), retries: 1, retry_delay: Duration::ZERO, put_back, ..Config::default() }
}

/// A route over so many hosts.
fn route(hosts: usize) -> Arc<Route> {
    let route = Route::new(&"r.example/a/b".parse().unwrap());
    let member = |_| Member {
        host: Arc::new(Host::new("r.example", "r.example", &Endpoint::registry())),
        endpoint: Endpoint::registry(),
        health: Mutex::default(),
    };
    assert!(route.members.set((0..hosts).map(member).collect()).is_ok());
    Arc::new(route)
}

fn trip(route: &Arc<Route>, content: Content<'_>) -> Trip {
    Trip::new(route, "a/b", content, Capabilities::PULL, &config()).unwrap()
}

#[tokio::test]
async fn each_host_is_asked_once_before_a_wait() {
    let route = route(3);
    let mut trip = trip(&route, Content::Tag);
    let mut asked = Vec::new();
    let error = loop {
        asked.push(trip.number());
        if let Err(error) = trip.failed(failure(broken()), true).await {
            break error;
        }
    };
    assert!(error.is_transient());
    assert_eq!(asked, [0, 1, 2, 0, 1, 2]);
}

#[tokio::test]
async fn the_last_host_has_the_last_word() {
    // What each of three hosts says, whether it is asked again, and which error comes in the end.
    type Say = fn() -> Error;
    let cases: [([Say; 3], usize, &str); 5] = [
        ([not_found, not_found, not_found], 3, "NotFound"),
        ([broken, broken, not_found], 3, "NotFound"),
        ([not_found, not_found, broken], 6, "Registry"),
        ([broken, not_found, denied], 6, "Denied"),
        ([denied, denied, denied], 3, "Denied"),
    ];
    for (says, expected, name) in cases {
        let route = route(3);
        let mut trip = trip(&route, Content::Tag);
        let mut asked = 0;
        let error = loop {
            asked += 1;
            let error = says[trip.number()]();
            let again = error.is_transient();
            if let Err(error) = trip.failed(failure(error), again).await {
                break error;
            }
        };
        assert_eq!(asked, expected, "{name}");
        assert!(format!("{error:?}").starts_with(name), "{error:?}");
    }
}

#[tokio::test]
async fn what_fails_is_remembered_for_what_it_concerns() {
    let digest = Digest::sha256_of(b"x");
    let other = Digest::sha256_of(b"y");
    let (whole, another) = (Content::Whole(&digest), Content::Whole(&other));
    for (error, same_content, other_content, other_repository) in
        [(broken as fn() -> Error, 1, 1, 1), (denied, 1, 1, 0), (not_found, 1, 0, 0)]
    {
        let route = route(2);
        trip(&route, whole).failed(failure(error()), false).await.unwrap();
        let elsewhere = Trip::new(&route, "c", whole, Capabilities::PULL, &config()).unwrap();
        let found = (trip(&route, whole).number(), trip(&route, another).number(), elsewhere.number());
        assert_eq!(found, (same_content, other_content, other_repository), "{}", error());
    }
}

#[tokio::test]
async fn one_operation_at_a_time_tries_a_host_again() {
    let route = route(2);
    trip(&route, Content::Tag).failed(failure(broken()), true).await.unwrap();
    assert_eq!(trip(&route, Content::Tag).number(), 1);
    let member = &route.members.get().unwrap()[0];
    member.health().until = Some(Instant::now());
    let tries = trip(&route, Content::Tag);
    assert_eq!((tries.number(), trip(&route, Content::Tag).number()), (0, 1));
    tries.succeeded();
    assert_eq!(trip(&route, Content::Tag).number(), 0);
}

#[test]
fn the_time_doubles_up_to_a_bound_and_failures_side_by_side_are_one() {
    let mut health = Health::default();
    let second = Duration::from_secs(1);
    let began = Instant::now();
    health.put_back(second, began, None);
    health.put_back(second, began, None);
    assert_eq!(health.failures, 1);
    for (failures, most) in [(2, 2), (3, 4), (4, 8), (5, 16), (6, 32), (7, 64), (8, 64), (9, 64)] {
        health.until = None;
        health.put_back(second, Instant::now(), None);
        let left = health.until.unwrap() - Instant::now();
        assert_eq!(health.failures, failures);
        assert!(left <= most * second && left >= most * second / 2 - second, "{failures}: {left:?}");
    }
    // What the host asks for is kept, within the same bound.
    for (asked, least, most) in [(10, 9, 10), (86_400, 63, 64)] {
        let mut health = Health::default();
        health.put_back(second, began, Some(asked * second));
        let left = health.until.unwrap() - Instant::now();
        assert!(left <= most * second && left >= least * second, "{left:?}");
    }
}

#[test]
fn no_memory_grows_without_bound() {
    let mut health = Health::default();
    for n in 0..MAX_SUBJECTS * 2 {
        health.pass_over(&n.to_string());
    }
    assert!(health.passed_over.len() <= MAX_SUBJECTS);
    let route = route(2);
    let digest = Digest::sha256_of(b"x");
    let trip = trip(&route, Content::Tag);
    for n in 0..MAX_RANGES as u64 * 2 {
        route.served(&digest, n, n..n + 1, &trip);
        route.distrust(&digest, &(n..n + 1), &config());
        route.served(&digest, n, n..n + 1, &trip);
    }
    let ranges = route.ranges();
    assert!(ranges.served.len() <= MAX_RANGES && ranges.distrusted.len() <= MAX_RANGES);
}
