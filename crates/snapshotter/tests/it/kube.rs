//! The cluster's pull secrets.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use loris_oci::auth::{Credentials, Keychain as _};
use loris_snapshotter::keychain::kube::{Secrets, Settings};
use loris_testkit::registry::make_certificates;

use crate::{Log, api_server::ApiServer, until};

const CONFIG: &str = "kubernetes.io/dockerconfigjson";
const LEGACY: &str = "kubernetes.io/dockercfg";

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new(test: &str) -> Option<Self> {
        loris_testkit::require_peer(test, "openssl")?;
        let directory = tempfile::tempdir().unwrap();
        make_certificates(directory.path()).unwrap();
        Some(Self { directory })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Writes a kubeconfig with a user.
    fn kubeconfig(&self, server: &ApiServer, user: &str) -> PathBuf {
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: here\npreferences: {{}}\n\
             contexts:\n- name: here\n  context:\n    cluster: tests\n    user: loris\n\
             clusters:\n- name: tests\n  cluster:\n    server: {}\n    certificate-authority: ca.crt\n\
             users:\n- name: loris\n  user: {user}\n",
            server.url()
        );
        let file = self.path().join("kubeconfig");
        std::fs::write(&file, text).unwrap();
        file
    }
}

fn watch(kubeconfig: PathBuf) -> Secrets {
    Secrets::watch(&Settings { enable_keychain: true, kubeconfig_path: Some(kubeconfig) })
}

fn put(server: &ApiServer, name: &str, host: &str, password: &str) {
    let auth = BASE64_STANDARD.encode(format!("u:{password}"));
    server.put(name, CONFIG, ".dockerconfigjson", &format!(r#"{{"auths":{{"{host}":{{"auth":"{auth}"}}}}}}"#));
}

/// Waits until a registry has exactly these passwords.
async fn until_has(secrets: &Secrets, registry: &str, passwords: &[&str]) {
    let credentials = |password: &&str| Credentials::Basic { username: "u".into(), password: (*password).into() };
    let expected: Vec<Credentials> = passwords.iter().map(credentials).collect();
    let what = format!("{registry} with {passwords:?}");
    until(&what, || async { secrets.credentials(registry, "team/app").await == expected }).await;
}

fn count(server: &ApiServer, part: &str) -> usize {
    server.requests().iter().filter(|request| request.contains(part)).count()
}

#[tokio::test]
async fn secrets_are_listed_watched_and_listed_again() {
    let Some(place) = Place::new("secrets_are_listed_watched_and_listed_again") else { return };
    let server = ApiServer::start(place.path(), Some("hunter2")).await;
    for n in 0..5 {
        put(&server, &format!("ns/s{n}"), &format!("r{n}.example"), &format!("p{n}"));
    }
    server.put("ns/legacy", LEGACY, ".dockercfg", r#"{"https://r9.example/v1/":{"username":"u","password":"old"}}"#);
    server.put("ns/opaque", "Opaque", ".dockerconfigjson", r#"{"auths":{"r0.example":{"auth":"dTpubw=="}}}"#);
    server.put("ns/broken", CONFIG, ".dockerconfigjson", "not JSON");
    // The second page is not known any more when it is asked for: all is listed anew.
    server.forget_pages();
    let secrets = watch(place.kubeconfig(&server, "{token: hunter2}"));
    // Who asks at once waits for the first list.
    until_has(&secrets, "r4.example", &["p4"]).await;
    for n in 0..4 {
        until_has(&secrets, &format!("r{n}.example"), &[&format!("p{n}")]).await;
    }
    until_has(&secrets, "r9.example", &["old"]).await;
    until_has(&secrets, "r8.example", &[]).await;
    assert_eq!(secrets.names().len(), 6, "{:?}", secrets.names());
    assert_eq!(count(&server, "410 "), 1);

    // Changes come by themselves.
    until("a watch", || async { count(&server, "watch=1") == 2 }).await;
    put(&server, "ns/new", "r8.example", "new");
    until_has(&secrets, "r8.example", &["new"]).await;
    put(&server, "ns/s0", "r0.example", "changed");
    put(&server, "other/s0", "r0.example", "second");
    until_has(&secrets, "r0.example", &["changed", "second"]).await;
    server.delete("ns/s1");
    until_has(&secrets, "r1.example", &[]).await;

    // A watch that ends goes on where it was, as far as a bookmark has said.
    server.bookmark(CONFIG);
    let lists = count(&server, "limit=");
    put(&server, "ns/mark", "mark.example", "seen");
    until_has(&secrets, "mark.example", &["seen"]).await;
    server.end_watches();
    put(&server, "ns/s2", "r2.example", "meanwhile");
    until_has(&secrets, "r2.example", &["meanwhile"]).await;
    assert_eq!(count(&server, "limit="), lists);

    // One that is too old is followed by a list, and what went in between is gone.
    server.delete("ns/s3");
    server.compact();
    until_has(&secrets, "r3.example", &[]).await;
    until_has(&secrets, "r2.example", &["meanwhile"]).await;
    until("a list", || async { count(&server, "limit=") > lists }).await;
    // Nothing goes to the server any more when the value is gone.
    drop(secrets);
    server.end_watches();
}

#[tokio::test]
async fn servers_are_shown_what_the_kubeconfig_says() {
    let Some(place) = Place::new("servers_are_shown_what_the_kubeconfig_says") else { return };
    let pem = |name: &str| BASE64_STANDARD.encode(std::fs::read(place.path().join(name)).unwrap());
    let data = format!("{{client-certificate-data: {}, client-key-data: {}}}", pem("client.cert"), pem("client.key"));
    std::fs::write(place.path().join("token"), "from a file\n").unwrap();
    for (token, user) in [
        (Some("hunter2"), "{token: hunter2}"),
        (Some("from a file"), "{tokenFile: token}"),
        (None, "{client-certificate: client.cert, client-key: client.key}"),
        (None, &data),
    ] {
        let server = ApiServer::start(place.path(), token).await;
        put(&server, "ns/s", "r.example", "p");
        let kubeconfig = place.kubeconfig(&server, user);
        let secrets = watch(kubeconfig.clone());
        until_has(&secrets, "r.example", &["p"]).await;
        assert_eq!(count(&server, "401 "), 0, "{user}");
        drop(secrets);
        // The same file serves who knows the protocol best.
        let Some(kubectl) = loris_testkit::require_peer("servers_are_shown_what_the_kubeconfig_says", "kubectl") else {
            continue;
        };
        let mut command = Command::new(kubectl);
        command.args(["get", "--raw", "/api/v1/secrets?limit=1"]).arg("--kubeconfig").arg(kubeconfig);
        command.env("HOME", place.path());
        let answer = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let text = String::from_utf8_lossy(&answer.stdout).into_owned();
        assert!(answer.status.success() && text.contains("SecretList"), "{answer:?}");
    }
}

#[tokio::test]
async fn what_fails_is_tried_again_and_no_secret_is_logged() {
    let Some(place) = Place::new("what_fails_is_tried_again_and_no_secret_is_logged") else { return };
    let log = Log::default();
    // For this thread, which is all that the runtime has.
    let logging = tracing::subscriber::set_default(log.subscriber());
    {
        let server = ApiServer::start(place.path(), Some("hunter2-token")).await;
        put(&server, "ns/s", "r.example", "hunter2-password");
        server.put("ns/broken", CONFIG, ".dockerconfigjson", r#"{"auths":{"a":"hunter2-broken"}}"#);
        // The file comes later than we do, then with a token that is good no more, then with a wrong authority.
        let file = place.path().join("kubeconfig");
        let secrets = watch(file.clone());
        until("a warning", || async { log.text().contains("can't be read") }).await;
        place.kubeconfig(&server, "{token: hunter2-old}");
        until("a refusal", || async { count(&server, "401 ") > 0 }).await;
        let good = std::fs::read(place.path().join("ca.crt")).unwrap();
        std::fs::copy(place.path().join("client.cert"), place.path().join("ca.crt")).unwrap();
        until("an unknown authority", || async { log.text().contains("can't be reached") }).await;
        std::fs::write(place.path().join("ca.crt"), good).unwrap();
        place.kubeconfig(&server, "{tokenFile: token}");
        std::fs::write(place.path().join("token"), "hunter2-token").unwrap();
        until_has(&secrets, "r.example", &["hunter2-password"]).await;
        // A token that was replaced is read anew.
        server.set_token("hunter2-new");
        std::fs::write(place.path().join("token"), "hunter2-new").unwrap();
        server.end_watches();
        put(&server, "ns/t", "t.example", "hunter2-later");
        until_has(&secrets, "t.example", &["hunter2-later"]).await;
        assert!(!format!("{secrets:?}").contains("hunter2"));
    }
    drop(logging);
    let text = log.text();
    assert!(text.contains("ns/broken"), "{text}");
    let shown = text.lines().find(|line| line.contains("hunter2"));
    assert_eq!(shown, None);
}
