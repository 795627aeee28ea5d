//! Configurations, and real programs that are asked.

use std::{fs, os::unix::fs::PermissionsExt as _};

use super::*;

/// Writes down how it was asked, and answers what it is told to.
const PLUGIN: &str = r#"#!/bin/sh
cat > "$DIRECTORY/asked.$1"
echo "$1 $SAID" >> "$DIRECTORY/runs"
echo "hunter2 on standard error" >&2
cat "$DIRECTORY/answer"
"#;

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new(program: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("plugin");
        fs::write(&path, program).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self { directory }
    }

    fn answer(&self, rest: &str) {
        let text = format!(
            r#"{{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1",{rest}}}"#
        );
        fs::write(self.directory.path().join("answer"), text).unwrap();
    }

    fn read(&self, config: &str) -> Result<Providers, ProviderError> {
        let file = self.directory.path().join("config.yaml");
        fs::write(&file, config.replace("DIRECTORY_HERE", self.directory.path().to_str().unwrap())).unwrap();
        let settings = Settings { config_path: Some(file), bin_dir: Some(self.directory.path().to_owned()) };
        Ok(Providers::read(&settings)?.unwrap())
    }

    fn providers(&self) -> Providers {
        self.read(
            "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: plugin\n  \
             matchImages:\n  - \"*.registry.example\"\n  - r.example/ns\n  defaultCacheDuration: \"1h\"\n  \
             apiVersion: credentialprovider.kubelet.k8s.io/v1\n  args: [one]\n  env:\n  - name: DIRECTORY\n    \
             value: DIRECTORY_HERE\n  - {name: SAID, value: something}\n",
        )
        .unwrap()
    }

    fn runs(&self) -> usize {
        fs::read_to_string(self.directory.path().join("runs")).unwrap_or_default().lines().count()
    }
}

fn basic(password: &str) -> Credentials {
    Credentials::Basic { username: "u".into(), password: password.into() }
}

#[tokio::test]
async fn a_plugin_is_asked_as_kubelet_asks_it() {
    let place = Place::new(PLUGIN);
    place.answer(
        r#""cacheKeyType":"Image","auth":{"*.registry.example":{"username":"u","password":"wild"},
           "eu.registry.example":{"username":"u","password":"exact"},"other.example":{"username":"u","password":"no"}}"#,
    );
    let providers = place.providers();
    let found = providers.credentials("eu.registry.example", "a/b").await;
    assert_eq!(found, [basic("exact"), basic("wild")]);
    let asked: serde_json::Value =
        serde_json::from_slice(&fs::read(place.directory.path().join("asked.one")).unwrap()).unwrap();
    let expected = serde_json::json!({
        "kind": "CredentialProviderRequest",
        "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
        "image": "eu.registry.example/a/b",
    });
    assert_eq!(asked, expected);
    let runs = fs::read_to_string(place.directory.path().join("runs")).unwrap();
    assert_eq!(runs, "one something\n");
    // Whom it is not for, it is not asked for.
    for (registry, repository) in [("r.example", "other"), ("registry.example", "a"), ("docker.io", "library/x")] {
        assert_eq!(providers.credentials(registry, repository).await, []);
    }
    assert_eq!(place.runs(), 1);
    assert!(!format!("{providers:?}").contains("something"));
}

#[tokio::test]
async fn answers_are_kept_as_they_say() {
    for (key, duration, expected) in [
        ("Image", None, [1, 1, 2, 3]),
        ("Registry", Some("6h0m0s"), [1, 1, 1, 2]),
        ("Global", Some("10m"), [1, 1, 1, 1]),
        ("Global", Some("0s"), [1, 2, 3, 4]),
        ("Image", Some("soon"), [1, 2, 3, 4]),
    ] {
        let place = Place::new(PLUGIN);
        let life = duration.map(|duration| format!(r#","cacheDuration":"{duration}""#)).unwrap_or_default();
        let auth = r#""auth":{"*.registry.example":{"username":"u","password":"p"}}"#;
        place.answer(&format!(r#""cacheKeyType":"{key}"{life},{auth}"#));
        let providers = place.providers();
        let images = [("a", "x"), ("a", "x"), ("a", "y"), ("b", "x")];
        let mut runs = Vec::new();
        for (host, repository) in images {
            let found = providers.credentials(&format!("{host}.registry.example"), repository).await;
            assert_eq!(found, [basic("p")], "{key} {duration:?}");
            runs.push(place.runs());
        }
        assert_eq!(runs, expected, "{key} {duration:?}");
    }
}

#[tokio::test]
async fn what_waits_for_the_same_answer_asks_once() {
    let place = Place::new(PLUGIN);
    place.answer(r#""cacheKeyType":"Global","auth":{"*.registry.example":{"username":"u","password":"p"}}"#);
    let providers = place.providers();
    let asked = (0..8).map(|_| providers.credentials("a.registry.example", "x"));
    let found = futures_util::future::join_all(asked).await;
    assert!(found.iter().all(|found| *found == [basic("p")]));
    assert_eq!(place.runs(), 1);
}

#[tokio::test]
async fn a_plugin_that_fails_has_nothing() {
    for (program, answer) in [
        ("#!/bin/sh\nexit 1\n", ""),
        ("#!/bin/sh\necho hunter2\n", ""),
        ("#!/bin/sh\nexec cat /dev/zero\n", ""),
        ("#!/no/such/interpreter\n", ""),
        (PLUGIN, r#""cacheKeyType":"Other","auth":{}"#),
        (PLUGIN, r#""auth":{}"#),
        (PLUGIN, r#""cacheKeyType":"Image","apiVersion":"twice""#),
        (PLUGIN, r#""cacheKeyType":"Image","auth":null"#),
    ] {
        let place = Place::new(program);
        place.answer(answer);
        assert_eq!(place.providers().credentials("a.registry.example", "x").await, [], "{program} {answer}");
    }
    // One that never answers is given up, and ended.
    let place = Place::new("#!/bin/sh\necho $$ > \"$DIRECTORY/pid\"\nexec sleep 1000\n");
    let mut providers = place.providers();
    providers.0[0].patience = Duration::from_millis(500);
    assert_eq!(providers.credentials("a.registry.example", "x").await, []);
    let pid = fs::read_to_string(place.directory.path().join("pid")).unwrap();
    let process = PathBuf::from(format!("/proc/{}", pid.trim()));
    // It is dead, and waited for by the runtime before long.
    let is_gone = || fs::read_to_string(process.join("cmdline")).unwrap_or_default().is_empty();
    while !is_gone() {
        tokio::task::yield_now().await;
    }
}

#[test]
fn configurations_are_checked() {
    let place = Place::new(PLUGIN);
    let entry = "{name: plugin, matchImages: [a], apiVersion: credentialprovider.kubelet.k8s.io/v1, \
                 defaultCacheDuration: 1m}";
    let config = |version: &str, entry: &str| {
        format!("apiVersion: kubelet.config.k8s.io/{version}\nkind: CredentialProviderConfig\nproviders: [{entry}]\n")
    };
    assert_eq!(place.read(&config("v1", entry)).unwrap().0.len(), 1);
    assert_eq!(place.read(&config("v1beta1", &entry.replace("/v1", "/v1beta1"))).unwrap().0.len(), 1);
    assert_eq!(place.read(&config("v1", "")).unwrap().0.len(), 0);
    for (text, expected) in [
        (config("v2", entry), "kubelet.config.k8s.io/v2"),
        (config("v1", &format!("{entry}, {entry}")), "twice"),
        (config("v1", &entry.replace("plugin", "../plugin")), "without a path"),
        (config("v1", &entry.replace("[a]", "[]")), "matchImages"),
        (config("v1", &entry.replace("1m", "soon")), "defaultCacheDuration"),
        (config("v1", &entry.replace("provider.kubelet", "p")), "apiVersion"),
        (config("v1", &entry.replace("1m", "1m, tokenAttributes: {}")), "tokenAttributes"),
        ("kind: [".to_owned(), "not a CredentialProviderConfig"),
        ("kind: x".to_owned(), "a field is missing"),
    ] {
        let error = place.read(&text).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("config.yaml"), "{expected}: {error}");
    }
    assert!(Providers::read(&Settings::default()).unwrap().is_none());
    let half = Settings { config_path: Some("x".into()), bin_dir: None };
    assert!(matches!(Providers::read(&half), Err(ProviderError::Half { missing: "directory" })));
    let missing = Settings { config_path: Some("/no/such".into()), bin_dir: Some("/bin".into()) };
    assert!(Providers::read(&missing).unwrap_err().to_string().starts_with("/no/such can't be read"));
}

#[test]
fn durations_are_gos() {
    for (text, expected) in [
        ("12h", Some(43_200.0)),
        ("1h30m0s", Some(5400.0)),
        ("1.5h", Some(5400.0)),
        ("300ms", Some(0.3)),
        ("0", Some(0.0)),
        ("0s", Some(0.0)),
        ("", None),
        ("12", None),
        ("h", None),
        ("-1h", None),
        ("1d", None),
        ("99999999999999999999999h", None),
    ] {
        assert_eq!(duration(text).map(|duration| duration.as_secs_f64()), expected, "{text}");
    }
}
