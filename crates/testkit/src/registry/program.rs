//! Debian's `docker-registry` (CNCF distribution 2.8) as a child process: the peer that most registries descend from.

use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError, mpsc},
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};

/// How long the program may take until it listens.
const START: Duration = Duration::from_secs(30);

/// A running `docker-registry` with its storage in a temporary directory. Ends, and is waited for, with the value.
pub struct DockerRegistry {
    child: Child,
    address: String,
    directory: tempfile::TempDir,
    requests: Requests,
}

/// `METHOD URI` of what was answered, as the program has logged it.
type Requests = Arc<Mutex<Vec<String>>>;

/// How the registry is set up.
#[derive(Clone, Debug, Default)]
pub struct DockerRegistryOptions {
    /// Serve TLS, with a certificate for 127.0.0.1 and localhost that [`DockerRegistry::ca`] has signed.
    pub tls: bool,
    /// Serve TLS with the authority's own certificate, which is for 127.0.0.1 alone.
    pub self_signed: bool,
    /// Ask for a client certificate of the same authority.
    pub client_certificate: bool,
    /// Ask for this user name and password (Basic).
    pub credentials: Option<(String, String)>,
    /// Be a pull-through proxy of the registry at this address.
    pub proxy_of: Option<String>,
}

impl DockerRegistry {
    /// Starts the registry on a free port of 127.0.0.1; `None` where a program that it needs is missing, which has then
    /// been said in the name of `test`.
    ///
    /// # Errors
    ///
    /// Fails when the program does not come up.
    pub fn start(test: &str, options: &DockerRegistryOptions) -> anyhow::Result<Option<Self>> {
        let mut programs = vec!["docker-registry"];
        programs.extend(options.tls.then_some("openssl"));
        programs.extend(options.credentials.is_some().then_some("htpasswd"));
        for program in programs {
            if crate::require_peer(test, program).is_none() {
                return Ok(None);
            }
        }
        let directory = tempfile::Builder::new().prefix("docker-registry-").tempdir()?;
        let config = configuration(directory.path(), options)?;
        let config_file = directory.path().join("config.yml");
        std::fs::write(&config_file, config)?;
        let program = crate::peer("docker-registry").context("docker-registry was there a moment ago")?;
        let mut child = Command::new(program)
            .arg("serve")
            .arg(&config_file)
            // Variables of this prefix would override the file.
            .env_clear()
            .env("HOME", directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let requests = Requests::default();
        match listening_address(&mut child, requests.clone()) {
            Ok(address) => Ok(Some(Self { child, address, directory, requests })),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Returns `HOST:PORT`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Returns `METHOD URI` of the requests that were answered so far, in the order in which the program logged them,
    /// which it does a moment after the answer.
    #[must_use]
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Returns the certificate authority's file, where TLS is served.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.directory.path().join("ca.crt")
    }

    /// Returns a client's certificate and key, where TLS is served.
    #[must_use]
    pub fn client_certificate(&self) -> (PathBuf, PathBuf) {
        (self.directory.path().join("client.cert"), self.directory.path().join("client.key"))
    }
}

impl Drop for DockerRegistry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn configuration(directory: &Path, options: &DockerRegistryOptions) -> anyhow::Result<String> {
    let root = directory.display();
    let mut config = format!(
        "version: 0.1\nlog: {{accesslog: {{disabled: true}}, level: info}}\n\
         storage: {{filesystem: {{rootdirectory: {root}/data}}, delete: {{enabled: true}}}}\n"
    );
    if let Some((username, password)) = &options.credentials {
        // The password of a test, on a command line of a test.
        let line = run(Command::new("htpasswd").args(["-Bbn", username, password]))?;
        std::fs::write(directory.join("htpasswd"), line)?;
        writeln!(config, "auth: {{htpasswd: {{realm: tests, path: {root}/htpasswd}}}}")?;
    }
    if let Some(upstream) = &options.proxy_of {
        writeln!(config, "proxy: {{remoteurl: \"{upstream}\"}}")?;
    }
    config.push_str("http:\n  addr: 127.0.0.1:0\n");
    if options.tls {
        make_certificates(directory)?;
        let (certificate, key) = if options.self_signed { ("ca.crt", "ca.key") } else { ("server.cert", "server.key") };
        write!(config, "  tls:\n    certificate: {root}/{certificate}\n    key: {root}/{key}\n")?;
        if options.client_certificate {
            writeln!(config, "    clientcas: [{root}/ca.crt]")?;
        }
    }
    Ok(config)
}

/// Makes an authority (`ca.crt`, `ca.key`) and, signed by it, `server.cert`, for 127.0.0.1 and localhost, and `client.cert`,
/// with their keys, in a directory. Needs `openssl`.
///
/// # Errors
///
/// Fails where the program does.
pub fn make_certificates(directory: &Path) -> anyhow::Result<()> {
    let openssl = |arguments: &[&str]| run(Command::new("openssl").args(arguments).current_dir(directory));
    let curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    let authority = [
        "req",
        "-x509",
        "-subj",
        "/CN=tests",
        "-days",
        "2",
        "-keyout",
        "ca.key",
        "-out",
        "ca.crt",
        "-addext",
        "subjectAltName=IP:127.0.0.1",
    ];
    openssl(&[&authority[..], &curve].concat())?;
    let names = "subjectAltName=IP:127.0.0.1,DNS:localhost";
    for (who, extension) in [("server", names), ("client", "extendedKeyUsage=clientAuth")] {
        let (key, certificate) = (format!("{who}.key"), format!("{who}.cert"));
        let subject = format!("/CN={who}");
        let signed = [
            "req",
            "-x509",
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-days",
            "2",
            "-subj",
            &subject,
            "-addext",
            "basicConstraints=critical,CA:false",
            "-addext",
            extension,
            "-keyout",
            &key,
            "-out",
            &certificate,
        ];
        openssl(&[&signed[..], &curve].concat())?;
    }
    Ok(())
}

fn run(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(output.stdout)
}

/// Reads the log until it says where the program listens, and goes on reading so that the pipe never fills.
fn listening_address(child: &mut Child, requests: Requests) -> anyhow::Result<String> {
    let log = child.stderr.take().context("standard error is a pipe")?;
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut seen = String::new();
        for line in BufReader::new(log).lines().map_while(Result::ok) {
            if let Some((_, rest)) = line.split_once("listening on ") {
                let address: String = rest.chars().take_while(|c| c.is_ascii_digit() || ".:".contains(*c)).collect();
                let _ = sender.send(Ok(address));
            } else if line.contains("\"response completed\"") {
                let value = |key: &str| {
                    let (_, rest) = line.split_once(key)?;
                    rest.trim_start_matches('"').split(['"', ' ']).next()
                };
                if let (Some(method), Some(uri)) = (value("http.request.method="), value("http.request.uri=")) {
                    requests.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{method} {uri}"));
                }
            } else if seen.len() < 10_000 {
                seen.push_str(&line);
                seen.push('\n');
            }
        }
        let _ = sender.send(Err(seen));
    });
    match receiver.recv_timeout(START) {
        Ok(Ok(address)) => Ok(address),
        Ok(Err(log)) => bail!("docker-registry has ended: {log}"),
        Err(error) => bail!("docker-registry does not listen: {error}"),
    }
}
