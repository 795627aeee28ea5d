//! Redirects: followed with care, remembered, asked for again when they have expired.

use http::StatusCode;
use loris_oci::{Error, ImageSource as _, auth, registry::Config};
use loris_testkit::registry::{Access, Effect, Fault, FaultRegistry, Redirection, Site, Tokens};

use super::{config, content, descriptor, read, source};

#[tokio::test]
async fn credentials_stay_with_the_registry() {
    let basic = || Access::Basic { username: "u".into(), password: "hunter2".into() };
    let token = || Access::Token(Tokens { credentials: Some(("u".into(), "hunter2".into())), ..Tokens::default() });
    for access in [basic(), token()] {
        let registry = FaultRegistry::start().await;
        let blob = content(300_000);
        registry.add_blob(blob.clone());
        registry.access(access);
        registry.redirect_blobs(Redirection::default());
        let credentials = auth::Credentials::Basic { username: "u".into(), password: "hunter2".into() };
        let source = source(&registry, Config { credentials: Some(credentials), ..config() });
        assert_eq!(source.blob_range(&descriptor(&blob), 1000..2000).await.unwrap(), blob[1000..2000]);
        assert!(read(source.blob(&descriptor(&blob)).await.unwrap()).await.unwrap() == blob);
        let requests = registry.requests();
        let elsewhere: Vec<_> = requests.iter().filter(|request| request.site == Site::Elsewhere).collect();
        assert_eq!(elsewhere.len(), 2);
        assert!(elsewhere.iter().all(|request| request.header("authorization").is_none()));
        // The range goes along.
        assert_eq!(elsewhere[0].header("range"), Some("bytes=1000-1999"));
        let shown = requests.iter().filter(|request| request.path.contains("/blobs/"));
        assert!(shown.filter(|request| request.header("authorization").is_some()).count() >= 1);
    }
}

#[tokio::test]
async fn a_target_is_remembered_until_it_expires() {
    for expired in [StatusCode::FORBIDDEN, StatusCode::BAD_REQUEST, StatusCode::NOT_FOUND] {
        let registry = FaultRegistry::start().await;
        let blob = content(100_000);
        registry.add_blob(blob.clone());
        registry.redirect_blobs(Redirection { uses: 4, expired });
        let source = source(&registry, config());
        for n in 0..10 {
            let range = n * 1000..n * 1000 + 100;
            let read = source.blob_range(&descriptor(&blob), range.clone()).await.unwrap();
            assert_eq!(read, blob[range.start as usize..range.end as usize]);
        }
        let requests = registry.requests();
        let sites = |site| requests.iter().filter(|request| request.site == site).count();
        // Each address serves four; two expired ones were tried in vain.
        assert_eq!((sites(Site::Registry), sites(Site::Elsewhere)), (3, 12), "{expired}");
    }
}

#[tokio::test]
async fn a_target_in_trouble_is_asked_for_again_at_the_registry() {
    for effect in [Effect::Status(503), Effect::ResetAtOnce, Effect::Truncate(10)] {
        let registry = FaultRegistry::start().await;
        let blob = content(100_000);
        registry.add_blob(blob.clone());
        registry.redirect_blobs(Redirection::default());
        let source = source(&registry, config());
        assert_eq!(source.blob_range(&descriptor(&blob), 0..100).await.unwrap(), blob[..100]);
        registry.fault(Fault::new(effect).path("/cdn/"));
        assert_eq!(source.blob_range(&descriptor(&blob), 50..100).await.unwrap(), blob[50..100]);
        assert_eq!(registry.faults_left(), Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_new_target_that_refuses_is_an_error_and_no_reason_to_log_in() {
    let registry = FaultRegistry::start().await;
    let blob = content(1000);
    registry.add_blob(blob.clone());
    registry.redirect_blobs(Redirection { uses: 0, ..Redirection::default() });
    let error = source(&registry, config()).blob_range(&descriptor(&blob), 0..10).await.unwrap_err();
    assert!(matches!(error, Error::Registry { status: Some(403), transient: false, .. }), "{error}");
    // A challenge from elsewhere is not answered.
    registry.redirect_blobs(Redirection { uses: 0, expired: StatusCode::UNAUTHORIZED });
    let error = source(&registry, config()).blob_range(&descriptor(&blob), 0..10).await.unwrap_err();
    assert!(matches!(error, Error::Registry { status: Some(401), .. }), "{error}");
}

#[tokio::test]
async fn circles_and_odd_places_are_not_followed() {
    let blob = content(1000);
    for (location, message) in
        [("", "circle"), ("file:///etc/passwd", "leads to a \"file\""), ("http://", "not an address")]
    {
        let registry = FaultRegistry::start().await;
        registry.add_blob(blob.clone());
        registry.fault(Fault::new(Effect::RedirectTo(location.to_owned())).always());
        let error = source(&registry, config()).blob_range(&descriptor(&blob), 0..10).await.unwrap_err();
        assert!(error.to_string().contains(message) && !error.is_transient(), "{error}");
        assert_eq!(registry.requests().len(), 1, "{location}");
    }
    // A chain that never comes back to where it was has an end, too.
    let registry = FaultRegistry::start().await;
    registry.add_blob(blob.clone());
    for hop in 0..30 {
        registry.fault(Fault::new(Effect::RedirectTo(format!("/hop/{hop}"))));
    }
    let error = source(&registry, config()).blob_range(&descriptor(&blob), 0..10).await.unwrap_err();
    assert!(error.to_string().contains("circle"), "{error}");
    assert_eq!(registry.requests().len(), 11);
}

#[tokio::test]
async fn whoever_leaves_the_registry_is_a_stranger_when_led_back() {
    let registry = FaultRegistry::start().await;
    let blob = content(1000);
    registry.add_blob(blob.clone());
    registry.access(Access::Basic { username: "u".into(), password: "p".into() });
    let credentials = auth::Credentials::Basic { username: "u".into(), password: "p".into() };
    let source = source(&registry, Config { credentials: Some(credentials), ..config() });
    source.blob_range(&descriptor(&blob), 0..10).await.unwrap();
    registry.forget_requests();
    registry.fault(Fault::new(Effect::RedirectTo(format!("http://{}/cdn/x", registry.elsewhere()))).path("/v2/"));
    let back = format!("http://{}/v2/{}/blobs/x", registry.address(), FaultRegistry::REPOSITORY);
    registry.fault(Fault::new(Effect::RedirectTo(back)).path("/cdn/"));
    let error = source.blob_range(&descriptor(&blob), 0..10).await.unwrap_err();
    assert!(matches!(error, Error::Registry { status: Some(401), .. }), "{error}");
    let shown: Vec<bool> =
        registry.requests().iter().map(|request| request.header("authorization").is_some()).collect();
    assert_eq!(shown, [true, false, false]);
}
