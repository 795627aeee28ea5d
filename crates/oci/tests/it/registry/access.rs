//! Who is asking: passwords, tokens, and what happens when they end.

use std::time::Duration;

use loris_oci::{
    Error, ImageSink as _, ImageSource as _,
    auth::Credentials,
    registry::{Client, Config},
};
use loris_testkit::registry::{Access, Effect, Fault, FaultRegistry, Site, Tokens};

use super::{config, content, descriptor, manifest, read, reference, sink, source, stream};

fn credentials(username: &str, password: &str) -> Credentials {
    Credentials::Basic { username: username.into(), password: password.into() }
}

fn with(credentials: Credentials) -> Config {
    Config { credentials: Some(credentials), ..config() }
}

fn tokens() -> Tokens {
    Tokens { credentials: Some(("u".into(), "p".into())), ..Tokens::default() }
}

#[tokio::test]
async fn a_password_is_shown_once_it_is_asked_for() {
    let registry = FaultRegistry::start().await;
    let document = manifest("x");
    registry.add_manifest("latest", &document.media_type, document.bytes.clone());
    registry.access(Access::Basic { username: "u".into(), password: "p:q \u{e4}".into() });
    let source = source(&registry, with(credentials("u", "p:q \u{e4}")));
    assert_eq!(source.root().await.unwrap(), document);
    assert_eq!(source.root().await.unwrap(), document);
    let statuses: Vec<u16> = registry.requests().iter().map(|request| request.status.unwrap().as_u16()).collect();
    assert_eq!(statuses, [401, 200, 200]);
    assert_eq!(registry.requests()[0].header("authorization"), None);
}

#[tokio::test]
async fn who_may_not_is_told_so_without_insisting() {
    let basic = Access::Basic { username: "u".into(), password: "p".into() };
    for (access, given, requests) in [
        (basic.clone(), None, 1),
        (basic, Some(credentials("u", "wrong")), 2),
        (Access::Token(tokens()), None, 2),
        (Access::Token(tokens()), Some(credentials("u", "wrong")), 2),
        (Access::Token(tokens()), Some(Credentials::Identity("wrong".into())), 2),
    ] {
        let registry = FaultRegistry::start().await;
        registry.access(access.clone());
        let error = source(&registry, Config { credentials: given.clone(), ..config() }).root().await.unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{access:?} {given:?}: {error}");
        assert!(error.to_string().contains("401") && error.to_string().contains(&registry.address()), "{error}");
        assert_eq!(registry.requests().len(), requests, "{access:?} {given:?}");
    }
}

#[tokio::test]
async fn a_challenge_that_is_none_is_a_refusal() {
    let registry = FaultRegistry::start().await;
    registry.fault(Fault::new(Effect::Status(401)).always());
    let error = source(&registry, config()).root().await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    assert_eq!(registry.requests().len(), 1);
}

#[tokio::test]
async fn one_token_serves_many_requests() {
    for (elsewhere, access_token_field, expires_in_seconds) in
        [(false, false, Some(300)), (true, true, None), (true, false, Some(u64::MAX))]
    {
        let registry = FaultRegistry::start().await;
        let blob = content(100_000);
        registry.add_blob(blob.clone());
        registry.access(Access::Token(Tokens { elsewhere, access_token_field, expires_in_seconds, ..tokens() }));
        // Many at once, before anybody knows what is wanted.
        let source = source(&registry, with(credentials("u", "p")));
        let tasks: Vec<_> = (0..20_u64)
            .map(|n| {
                let (source, blob) = (source.clone(), descriptor(&blob));
                tokio::spawn(async move { source.blob_range(&blob, n..n + 100).await.unwrap() })
            })
            .collect();
        for (n, task) in tasks.into_iter().enumerate() {
            assert_eq!(task.await.unwrap(), blob[n..n + 100]);
        }
        assert_eq!(registry.tokens_issued(), 1);
        assert_eq!(source.in_repository().client().statistics().tokens, 1);
        // The token server sees the password, nothing else at that host does.
        for request in registry.requests().iter().filter(|request| request.site == Site::Elsewhere) {
            assert_eq!(request.path, "/token");
            assert!(request.header("authorization").unwrap().starts_with("Basic "));
            let query = request.query.as_deref().unwrap();
            for part in ["service=fault-registry", "scope=repository%3Atest%2Fimage%3Apull", "account=u"] {
                assert!(query.contains(part), "{query}");
            }
        }
    }
}

#[tokio::test]
async fn a_password_that_has_changed_is_looked_up_again() {
    use base64::Engine as _;
    let registry = FaultRegistry::start().await;
    let blob = content(1000);
    registry.add_blob(blob.clone());
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("auth.json");
    let change = |password: &str| {
        let auth = base64::prelude::BASE64_STANDARD.encode(format!("u:{password}"));
        std::fs::write(&file, format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, registry.address())).unwrap();
    };
    let environment = loris_oci::auth::Environment { auth_file: Some(file.clone()), ..Default::default() };
    let source = source(&registry, Config { environment, ..config() });
    for access in [
        (|password: &str| Access::Basic { username: "u".into(), password: password.into() }) as fn(&str) -> Access,
        |password| Access::Token(Tokens { credentials: Some(("u".into(), password.into())), ..Tokens::default() }),
    ] {
        for password in ["one", "two", "three"] {
            change(password);
            registry.access(access(password));
            registry.expire_tokens();
            assert_eq!(source.blob_range(&descriptor(&blob), 0..10).await.unwrap(), blob[..10], "{password}");
        }
    }
}

#[tokio::test]
async fn a_refusal_is_heard_by_all_who_wait_for_it() {
    let registry = FaultRegistry::start().await;
    let blob = content(1000);
    registry.add_blob(blob.clone());
    registry.access(Access::Token(tokens()));
    registry.fault(Fault::new(Effect::Delay(Duration::from_millis(300))).path("/token").always());
    let source = source(&registry, with(credentials("u", "wrong")));
    let tasks: Vec<_> = (0..6)
        .map(|_| {
            let (source, blob) = (source.clone(), descriptor(&blob));
            tokio::spawn(async move { source.blob_range(&blob, 0..10).await.unwrap_err() })
        })
        .collect();
    for task in tasks {
        assert!(matches!(task.await.unwrap(), Error::Denied { .. }));
    }
    let asked = registry.requests().iter().filter(|request| request.path == "/token").count();
    assert!(asked <= 2, "the token server was asked {asked} times");
}

#[tokio::test]
async fn a_token_is_renewed_before_it_expires_and_when_it_is_refused() {
    let registry = FaultRegistry::start().await;
    let blob = content(100_000);
    registry.add_blob(blob.clone());
    let read_five = async |source: &loris_oci::registry::RegistrySource| {
        for n in 0..5_u64 {
            let bytes = source.blob_range(&descriptor(&blob), n..n + 10).await.unwrap();
            assert_eq!(bytes, blob[n as usize..n as usize + 10]);
        }
    };
    // One that has expired when it comes is good for the one request that it was asked for.
    registry.access(Access::Token(Tokens { expires_in_seconds: Some(0), ..tokens() }));
    read_five(&source(&registry, with(credentials("u", "p")))).await;
    assert_eq!(registry.tokens_issued(), 5);
    assert_eq!(registry.requests().iter().filter(|request| request.status.unwrap() == 401).count(), 1);

    // One that says nothing and is good for two requests is renewed by need.
    let registry = FaultRegistry::start().await;
    registry.add_blob(blob.clone());
    registry.access(Access::Token(Tokens { uses: 2, expires_in_seconds: None, ..tokens() }));
    read_five(&source(&registry, with(credentials("u", "p")))).await;
    assert_eq!(registry.tokens_issued(), 3);

    // All at once, while many read.
    let registry = FaultRegistry::start().await;
    registry.add_blob(blob.clone());
    registry.access(Access::Token(tokens()));
    let source = source(&registry, with(credentials("u", "p")));
    read_five(&source).await;
    registry.expire_tokens();
    let tasks: Vec<_> = (0..20_u64)
        .map(|n| {
            let (source, blob) = (source.clone(), descriptor(&blob));
            tokio::spawn(async move { source.blob_range(&blob, n..n + 10).await.unwrap() })
        })
        .collect();
    for (n, task) in tasks.into_iter().enumerate() {
        assert_eq!(task.await.unwrap(), blob[n..n + 10]);
    }
    assert_eq!(registry.tokens_issued(), 2);
}

#[tokio::test]
async fn a_download_goes_on_when_the_token_ends_in_its_middle() {
    let registry = FaultRegistry::start().await;
    let blob = content(2 << 20);
    registry.add_blob(blob.clone());
    registry.access(Access::Token(Tokens { uses: 1, ..tokens() }));
    // The first request is refused for want of a token, every other one since the token is used up.
    registry.fault(Fault::new(Effect::Truncate(500_000)).path("/blobs/").skip(1));
    registry.fault(Fault::new(Effect::Truncate(500_000)).path("/blobs/").skip(2));
    let source = source(&registry, with(credentials("u", "p")));
    assert!(read(source.blob(&descriptor(&blob)).await.unwrap()).await.unwrap() == blob);
    assert_eq!(registry.tokens_issued(), 3);
    assert_eq!(registry.faults_left(), Vec::<String>::new());
}

#[tokio::test]
async fn an_identity_token_is_exchanged() {
    let registry = FaultRegistry::start().await;
    let document = manifest("x");
    registry.add_manifest("latest", &document.media_type, document.bytes.clone());
    registry.access(Access::Token(Tokens { refresh_token: Some("identity +&=".into()), elsewhere: true, ..tokens() }));
    let source = source(&registry, with(Credentials::Identity("identity +&=".into())));
    assert_eq!(source.root().await.unwrap(), document);
    let requests = registry.requests();
    let token = requests.iter().find(|request| request.path == "/token").unwrap();
    assert_eq!((token.method.as_str(), token.header("authorization")), ("POST", None));
    assert_eq!(token.header("content-type"), Some("application/x-www-form-urlencoded"));
}

#[tokio::test]
async fn a_token_is_asked_for_again_where_its_server_has_trouble() {
    let registry = FaultRegistry::start().await;
    let document = manifest("x");
    registry.add_manifest("latest", &document.media_type, document.bytes.clone());
    registry.access(Access::Token(tokens()));
    for effect in [Effect::Status(503), Effect::RetryAfter(429, "0".into()), Effect::ResetAtOnce] {
        registry.fault(Fault::new(effect).path("/token"));
    }
    assert_eq!(source(&registry, with(credentials("u", "p"))).root().await.unwrap(), document);
    assert_eq!(registry.faults_left(), Vec::<String>::new());
}

#[tokio::test]
async fn a_redirected_token_request_leaves_the_password_behind() {
    let registry = FaultRegistry::start().await;
    registry.access(Access::Token(tokens()));
    registry.fault(Fault::new(Effect::RedirectTo(format!("http://{}/token", registry.elsewhere()))).path("/token"));
    let error = source(&registry, with(credentials("u", "p"))).root().await.unwrap_err();
    assert!(matches!(error, Error::Denied { .. }), "{error}");
    let requests = registry.requests();
    let elsewhere = requests.iter().find(|request| request.site == Site::Elsewhere).unwrap();
    assert_eq!(elsewhere.header("authorization"), None);
}

#[tokio::test]
async fn reading_writing_and_deleting_need_tokens_of_their_own() {
    let registry = FaultRegistry::start().await;
    registry.access(Access::Token(tokens()));
    let client = Client::new(with(credentials("u", "p"))).unwrap();
    let (blob, document) = (content(1000), manifest("x"));
    let place = client.sink(&reference(&registry));
    assert!(!place.has_blob(&descriptor(&blob)).await.unwrap());
    place.put_blob(&descriptor(&blob), stream(&blob)).await.unwrap();
    place.put_blob(&descriptor(b"{}"), stream(b"{}")).await.unwrap();
    place.commit(&document, &Default::default()).await.unwrap();
    assert_eq!(client.source(&reference(&registry)).root().await.unwrap(), document);
    client.repository(&reference(&registry)).delete_blob(&descriptor(&blob).digest).await.unwrap();
    assert!(!place.has_blob(&descriptor(&blob)).await.unwrap());
    // One to read, one to write, one to delete; after the first, none was asked for by a refusal.
    assert_eq!(registry.tokens_issued(), 3);
    assert_eq!(registry.requests().iter().filter(|request| request.status.unwrap() == 401).count(), 1);
}

#[tokio::test]
async fn an_upload_from_a_file_survives_a_token_that_ends() {
    let registry = FaultRegistry::start().await;
    registry.access(Access::Token(tokens()));
    let blob = content(6 << 20);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &blob).unwrap();
    registry.fault(Fault::new(Effect::Unauthorized).method("PUT"));
    sink(&registry, with(credentials("u", "p"))).put_blob_file(&descriptor(&blob), file.path()).await.unwrap();
    assert_eq!(registry.blob(FaultRegistry::REPOSITORY, &descriptor(&blob).digest.to_string()).unwrap(), blob);
}
