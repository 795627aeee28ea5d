//! Credentials that are in no file.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicUsize, Ordering},
};

use async_trait::async_trait;
use loris_oci::{
    Error, ImageSource as _,
    auth::{Credentials, Environment, Keychain},
    registry::Config,
};
use loris_testkit::registry::{Access, FaultRegistry, Tokens};

use super::{config, content, descriptor, source};

/// Has passwords of the user `u`.
#[derive(Default)]
struct Passwords {
    passwords: Mutex<Vec<&'static str>>,
    asked: AtomicUsize,
}

impl std::fmt::Debug for Passwords {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Passwords(..)")
    }
}

#[async_trait]
impl Keychain for Passwords {
    fn name(&self) -> &str {
        "the test's"
    }

    async fn credentials(&self, registry: &str, repository: &str) -> Vec<Credentials> {
        assert!(registry.starts_with("127.0.0.1:") && repository == "test/image", "{registry} {repository}");
        self.asked.fetch_add(1, Ordering::Relaxed);
        let passwords = self.passwords.lock().unwrap();
        passwords.iter().map(|text| Credentials::Basic { username: "u".into(), password: (*text).into() }).collect()
    }
}

fn keychain(passwords: &[&'static str]) -> Arc<Passwords> {
    Arc::new(Passwords { passwords: Mutex::new(passwords.to_vec()), asked: AtomicUsize::new(0) })
}

const ACCESS: [fn(&str) -> Access; 2] = [
    |password| Access::Basic { username: "u".into(), password: password.into() },
    |password| Access::Token(Tokens { credentials: Some(("u".into(), password.into())), ..Tokens::default() }),
];

#[tokio::test]
async fn keychains_are_asked_in_order_and_before_files_until_one_is_let_in() {
    use base64::Engine as _;
    for access in ACCESS {
        for right in ["first", "second", "third", "fourth", "file"] {
            let registry = FaultRegistry::start().await;
            let blob = content(1000);
            registry.add_blob(blob.clone());
            registry.access(access(right));
            let directory = tempfile::tempdir().unwrap();
            let file = directory.path().join("auth.json");
            let auth = base64::prelude::BASE64_STANDARD.encode("u:file");
            std::fs::write(&file, format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, registry.address())).unwrap();
            let chains = [keychain(&["first", "second"]), keychain(&[]), keychain(&["first", "third", "fourth"])];
            let source = source(
                &registry,
                Config {
                    keychains: chains.iter().map(|chain| Arc::clone(chain) as Arc<dyn Keychain>).collect(),
                    environment: Environment { auth_file: Some(file), ..Environment::default() },
                    ..config()
                },
            );
            for n in 0..3 {
                let bytes = source.blob_range(&descriptor(&blob), n..n + 10).await;
                assert_eq!(bytes.unwrap(), blob[n as usize..n as usize + 10], "{right}");
            }
            let later = chains[2].asked.load(Ordering::Relaxed);
            assert_eq!(later > 0, !matches!(right, "first" | "second"), "{right}: asked {later} times");
            // Once it is known which one is let in, the others are shown no more.
            let refusals = registry.requests().iter().filter(|request| request.status.unwrap() == 401).count();
            registry.expire_tokens();
            source.blob_range(&descriptor(&blob), 5..10).await.unwrap();
            let after = registry.requests().iter().filter(|request| request.status.unwrap() == 401).count();
            assert!(after <= refusals + 1, "{right}: {refusals} refusals, then {after}");
        }
    }
}

#[tokio::test]
async fn a_keychain_is_asked_again_when_the_registry_refuses() {
    for access in ACCESS {
        let registry = FaultRegistry::start().await;
        let blob = content(1000);
        registry.add_blob(blob.clone());
        let chain = keychain(&[]);
        registry.access(access("one"));
        let source = source(&registry, Config { keychains: vec![chain.clone()], ..config() });
        let error = source.blob_range(&descriptor(&blob), 0..10).await.unwrap_err();
        assert!(matches!(error, Error::Denied { .. }), "{error}");
        for password in ["one", "two", "three"] {
            *chain.passwords.lock().unwrap() = vec![password];
            registry.access(access(password));
            registry.expire_tokens();
            assert_eq!(source.blob_range(&descriptor(&blob), 0..10).await.unwrap(), blob[..10], "{password}");
        }
        *chain.passwords.lock().unwrap() = vec!["wrong", "wronger", "wrongest"];
        registry.access(access("four"));
        registry.expire_tokens();
        for _ in 0..2 {
            let error = source.blob_range(&descriptor(&blob), 0..10).await.unwrap_err();
            assert!(matches!(error, Error::Denied { .. }) && !error.to_string().contains("wrong"), "{error}");
        }
    }
}
