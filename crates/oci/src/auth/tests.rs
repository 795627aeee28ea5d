//! The order of files, keys and helpers.

use std::{fs, os::unix::fs::PermissionsExt as _};

use base64::prelude::*;

use super::*;

fn basic(text: &str) -> Credentials {
    let (username, password) = text.split_once(':').unwrap();
    Credentials::Basic { username: username.to_owned(), password: password.to_owned() }
}

fn auths(entries: &[(&str, &str)]) -> String {
    let entries =
        entries.iter().map(|(key, text)| format!("\"{key}\":{{\"auth\":\"{}\"}}", BASE64_STANDARD.encode(text)));
    format!("{{\"auths\":{{{}}}}}", entries.collect::<Vec<_>>().join(","))
}

/// Makes a home with the given files, and an environment that looks only there.
fn home(files: &[(&str, &str)]) -> (tempfile::TempDir, Environment) {
    let directory = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let path = std::env::join_paths([directory.path().join("bin"), "/usr/bin".into(), "/bin".into()]).unwrap();
    let environment = Environment {
        runtime_dir: Some(directory.path().join("run")),
        home: Some(directory.path().to_owned()),
        path: Some(path),
        ..Environment::default()
    };
    (directory, environment)
}

#[tokio::test]
async fn files_are_asked_in_podmans_order() {
    let files = ["run/containers/auth.json", ".config/containers/auth.json", ".docker/config.json", ".dockercfg"];
    let contents: Vec<String> = files.iter().map(|file| auths(&[("r.example", &format!("u:{file}"))])).collect();
    for first in 0..files.len() {
        let mut present: Vec<(&str, &str)> = files.iter().copied().zip(contents.iter().map(String::as_str)).collect();
        // The legacy file is the map alone.
        let legacy = contents[3].strip_prefix("{\"auths\":").unwrap().strip_suffix('}').unwrap();
        present[3].1 = legacy;
        let (_home, environment) = home(&present[first..]);
        let found = lookup(&environment, "r.example", "a/b").await.unwrap();
        assert_eq!(found, Some(basic(&format!("u:{}", files[first]))));
    }
    let (_home, environment) = home(&[]);
    assert_eq!(lookup(&environment, "r.example", "a/b").await.unwrap(), None);
}

#[tokio::test]
async fn a_file_that_knows_nothing_passes_on_to_the_next() {
    let other = auths(&[("other.example", "u:1")]);
    let ours = auths(&[("r.example", "u:2")]);
    let (_home, environment) = home(&[("run/containers/auth.json", &other), (".docker/config.json", &ours)]);
    assert_eq!(lookup(&environment, "r.example", "a").await.unwrap(), Some(basic("u:2")));
}

#[tokio::test]
async fn a_named_file_is_the_only_one_and_must_exist() {
    let ours = auths(&[("r.example", "u:1")]);
    let (home, mut environment) = home(&[("run/containers/auth.json", &ours), ("mine.json", "{}")]);
    environment.auth_file = Some(home.path().join("mine.json"));
    assert_eq!(lookup(&environment, "r.example", "a").await.unwrap(), None);
    environment.auth_file = Some(home.path().join("none.json"));
    let error = lookup(&environment, "r.example", "a").await.unwrap_err();
    assert!(matches!(&error, Error::File { path, .. } if path.ends_with("none.json")), "{error}");
}

#[tokio::test]
async fn docker_config_and_config_home_move_files() {
    let (home, mut environment) = home(&[
        ("d/config.json", &auths(&[("d.example", "u:d")])),
        ("c/containers/auth.json", &auths(&[("c.example", "u:c")])),
    ]);
    environment.docker_config = Some(home.path().join("d"));
    environment.config_home = Some(home.path().join("c"));
    for host in ["d", "c"] {
        let found = lookup(&environment, &format!("{host}.example"), "a").await.unwrap();
        assert_eq!(found, Some(basic(&format!("u:{host}"))));
    }
}

#[tokio::test]
async fn the_nearest_parent_of_the_repository_decides() {
    let text = auths(&[
        ("r.example", "u:host"),
        ("r.example/ns", "u:ns"),
        ("r.example/ns/repo", "u:repo"),
        ("https://schemed.example/v2/", "u:schemed"),
        ("versioned.example/v1/", "u:versioned"),
        ("ported.example:5000", "u:port"),
        ("https://index.docker.io/v1/", "u:hub"),
        ("docker.io/me", "u:me"),
    ]);
    let (_home, environment) = home(&[(".docker/config.json", &text)]);
    for (registry, repository, expected) in [
        ("r.example", "ns/repo", Some("u:repo")),
        ("r.example", "ns/repo/deep", Some("u:repo")),
        ("r.example", "ns/other", Some("u:ns")),
        ("r.example", "ns-2/repo", Some("u:host")),
        ("r.example:443", "ns/repo", None),
        ("schemed.example", "a", Some("u:schemed")),
        ("versioned.example", "a", Some("u:versioned")),
        ("ported.example:5000", "a/b", Some("u:port")),
        ("ported.example", "a/b", None),
        ("docker.io", "library/alpine", Some("u:hub")),
        ("docker.io", "me/x", Some("u:me")),
        ("example", "r.example", None),
    ] {
        let found = lookup(&environment, registry, repository).await.unwrap();
        assert_eq!(found, expected.map(basic), "{registry}/{repository}");
    }
}

#[tokio::test]
async fn entries_of_all_kinds_are_understood() {
    let nul = BASE64_STANDARD.encode("u:p\0\0");
    let colons = BASE64_STANDARD.encode("u:p:q");
    let bare = BASE64_STANDARD_NO_PAD.encode("user:p");
    let text = format!(
        r#"{{"auths":{{
            "nul": {{"auth": "{nul}"}}, "colons": {{"auth": "{colons}"}}, "bare": {{"auth": "{bare}"}},
            "plain": {{"username": "u", "password": "p"}},
            "identity": {{"auth": "{nul}", "identitytoken": "secret"}},
            "bearer": {{"registrytoken": "secret"}},
            "empty": {{}}, "junk": {{"auth": "!!!"}}
        }}, "HttpHeaders": {{"x": "y"}}, "detachKeys": "ctrl-e"}}"#
    );
    let (_home, environment) = home(&[(".docker/config.json", &text)]);
    for (registry, expected) in [
        ("nul", Some(basic("u:p"))),
        ("colons", Some(basic("u:p:q"))),
        ("bare", Some(basic("user:p"))),
        ("plain", Some(basic("u:p"))),
        ("identity", Some(Credentials::Identity("secret".to_owned()))),
        ("bearer", Some(Credentials::Bearer("secret".to_owned()))),
        ("empty", None),
        ("junk", None),
    ] {
        assert_eq!(lookup(&environment, registry, "a").await.unwrap(), expected, "{registry}");
    }
}

/// A helper that knows two registries, and says its key back in the secret.
const HELPER: &str = r#"#!/bin/sh
read -r key
test "$1" = get || exit 2
case "$key" in
*hub*|*index.docker.io*) echo "{\"ServerURL\":\"$key\",\"Username\":\"u\",\"Secret\":\"for $key\"}" ;;
token.example) echo '{"Username":"<token>","Secret":"identity"}' ;;
odd.example) echo 'not json' ;;
*) echo 'credentials not found in native keychain'; exit 1 ;;
esac
"#;

#[tokio::test]
async fn helpers_come_before_the_file_and_may_know_nothing() {
    let stored = BASE64_STANDARD.encode("u:file");
    let text = format!(
        r#"{{"credsStore": "one", "credHelpers": {{"absent.example": "no-such-helper", "evil.example": "../../bin/sh"}},
            "auths": {{"hub.example": {{"auth": "{stored}"}}, "known.example": {{"auth": "{stored}"}},
                      "absent.example": {{"auth": "{stored}"}}, "evil.example": {{"auth": "{stored}"}},
                      "odd.example": {{}}}}}}"#
    );
    let (_home, environment) = home(&[(".docker/config.json", &text), ("bin/docker-credential-one", HELPER)]);
    for (registry, expected) in [
        ("hub.example", Some(basic("u:for hub.example"))),
        ("docker.io", Some(basic("u:for https://index.docker.io/v1/"))),
        ("token.example", Some(Credentials::Identity("identity".to_owned()))),
        ("known.example", Some(basic("u:file"))),
        ("unknown.example", None),
        ("absent.example", Some(basic("u:file"))),
        ("evil.example", Some(basic("u:file"))),
        ("odd.example", None),
    ] {
        assert_eq!(lookup(&environment, registry, "a").await.unwrap(), expected, "{registry}");
    }
}

#[tokio::test]
async fn no_error_and_no_debug_text_shows_a_secret() {
    let (_home, environment) =
        home(&[(".docker/config.json", r#"{"auths": {"a": {"auth": ["hunter2"]}, "b": "hunter2"}}"#)]);
    let error = lookup(&environment, "a", "b").await.unwrap_err().to_string();
    assert!(error.contains("config.json") && error.contains("line 1") && !error.contains("hunter2"), "{error}");
    for credentials in
        [basic("hunter2:hunter2"), Credentials::Identity("hunter2".into()), Credentials::Bearer("hunter2".into())]
    {
        assert!(!format!("{credentials:?}").contains("hunter2"));
    }
}

#[test]
fn podmans_own_runtime_directory_has_no_directory_inside() {
    assert_eq!(runtime_file(Path::new("/run/user/7")), Path::new("/run/user/7/containers/auth.json"));
    assert_eq!(runtime_file(Path::new("/run/containers/7")), Path::new("/run/containers/7/auth.json"));
}
