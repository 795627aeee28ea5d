//! From what a user typed to places that hold images: names, credentials, certificates, platforms.

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result};
use clap::{ArgAction, Args, value_parser};
use loris_format::digest::Digest;
use loris_oci::{
    ImageSink, ImageSource, Platform, Platforms, Reference,
    auth::Credentials,
    name::{ImageName, OpenOptions, open_sink, open_source},
    registry::{Client, Config},
};
use loris_snapshotter::containerd::{self, ContainerdSink, ContainerdSource};
use serde::Serialize;

use crate::{Global, failure::Usage};

/// The variable that has what `--creds` gives.
pub(crate) const CREDS_VARIABLE: &str = "LORIS_CREDS";

/// How registries are reached. The same flags as skopeo's and Podman's.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Registries")]
pub(crate) struct Access {
    /// Speak plain HTTP to registries (loopback is tried without being asked)
    #[arg(long, global = true)]
    plain_http: bool,
    /// Verify registries' certificates
    #[arg(long, global = true, action = ArgAction::Set, default_value_t = true, num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_name = "BOOL")]
    tls_verify: bool,
    /// A certificate authority to trust, in a PEM file
    #[arg(long, global = true, value_name = "FILE")]
    ca: Vec<PathBuf>,
    /// A directory with certificates for registries: `*.crt`, `*.cert`, `*.key`
    #[arg(long, global = true, value_name = "DIR")]
    cert_dir: Option<PathBuf>,
    /// A directory that says which hosts serve a registry's images, as containerd's; /etc/containerd/certs.d where none is
    /// given
    #[arg(long, global = true, value_name = "DIR")]
    hosts_dir: Vec<PathBuf>,
    /// A stargz-snapshotter's config.toml, for the mirrors in it
    #[arg(long, global = true, value_name = "FILE")]
    stargz_config: Option<PathBuf>,
    /// The file with credentials; where it is not given, Podman's and Docker's
    #[arg(long, global = true, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// User name and password for registries
    #[arg(long, global = true, env = CREDS_VARIABLE, hide_env_values = true, value_name = "USER[:PASSWORD]")]
    creds: Option<Secret>,
    /// Give a registry that stands still up after so many seconds, and ask again
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 30, value_parser = value_parser!(u64).range(1..=86_400))]
    stall_timeout: u64,
    /// How often a request is repeated that a registry does not answer, or not rightly
    #[arg(long, global = true, value_name = "N", default_value_t = 5, value_parser = value_parser!(u32).range(..=100))]
    retries: u32,
    /// Give a document or a range up after so many seconds, whoever was asked for it and how often
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 300, value_parser = value_parser!(u64).range(1..=86_400))]
    read_deadline: u64,
}

/// What must not be seen in a log.
#[derive(Clone)]
struct Secret(String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

/// Which platforms a verb is about.
#[derive(Args, Clone, Debug)]
pub(crate) struct Selection {
    /// Only these platforms, such as `linux/amd64,linux/arm64`; all of them where it is not given
    #[arg(long, value_name = "PLATFORM", value_delimiter = ',')]
    platform: Vec<Platform>,
    /// All platforms: what is done anyway
    #[arg(long, conflicts_with = "platform")]
    all_platforms: bool,
}

impl Selection {
    pub(crate) fn platforms(&self) -> Platforms {
        if self.platform.is_empty() { Platforms::All } else { Platforms::Only(self.platform.clone()) }
    }
}

/// The one platform of an image that a verb is about.
#[derive(Args, Clone, Debug, Default)]
pub(crate) struct OnePlatform {
    /// The platform, such as `linux/arm64`; this machine's where it is not given
    #[arg(long, value_name = "PLATFORM")]
    platform: Option<Platform>,
}

impl OnePlatform {
    pub(crate) fn wanted(&self) -> Option<&Platform> {
        self.platform.as_ref()
    }
}

impl Access {
    /// Opens the place that holds an image.
    pub(crate) async fn source(&self, name: &str) -> Result<Arc<dyn ImageSource>> {
        let parsed = parse(name)?;
        let opening = || format!("opening {name}");
        if let ImageName::Containerd { namespace, reference } = &parsed {
            return Ok(Arc::new(self.containerd_source(namespace.as_deref(), reference).await.with_context(opening)?));
        }
        let options = OpenOptions::new(self.client()?);
        open_source(&parsed, &options).await.with_context(opening)
    }

    /// Opens the place that an image is written to.
    pub(crate) async fn sink(&self, name: &str) -> Result<Arc<dyn ImageSink>> {
        let parsed = parse(name)?;
        refuse_compressed(&parsed)?;
        let writing = || format!("writing {name}");
        if let ImageName::Containerd { namespace, reference } = &parsed {
            return Ok(Arc::new(containerd_sink(namespace.as_deref(), reference).await.with_context(writing)?));
        }
        let options = OpenOptions::new(self.client()?);
        open_sink(&parsed, &options).await.with_context(writing)
    }

    /// Opens an image in containerd's store.
    pub(crate) async fn containerd_source(
        &self,
        namespace: Option<&str>,
        reference: &Reference,
    ) -> Result<ContainerdSource> {
        Ok(containerd::open_source(&containerd_place(namespace), reference, self.client()?).await?)
    }

    /// Returns what asks registries.
    pub(crate) fn client(&self) -> Result<Client> {
        Ok(Client::new(self.config())?)
    }

    /// Returns how registries are reached.
    pub(crate) fn config(&self) -> Config {
        let mut config = Config {
            plain_http: self.plain_http,
            tls_verify: self.tls_verify,
            ca_files: self.ca.clone(),
            cert_dir: self.cert_dir.clone(),
            stall_timeout: Duration::from_secs(self.stall_timeout),
            retries: self.retries,
            stargz_config: self.stargz_config.clone(),
            deadline: Duration::from_secs(self.read_deadline),
            ..Config::default()
        };
        if !self.hosts_dir.is_empty() {
            config.hosts_dirs.clone_from(&self.hosts_dir);
        }
        if let Some(file) = &self.authfile {
            config.environment.auth_file = Some(file.clone());
        }
        if let Some(Secret(text)) = &self.creds {
            let (user, password) = text.split_once(':').unwrap_or((text, ""));
            config.credentials = Some(Credentials::Basic { username: user.to_owned(), password: password.to_owned() });
        }
        config
    }
}

pub(crate) fn parse(name: &str) -> Result<ImageName> {
    name.parse().map_err(|error: loris_oci::Error| Usage(error.to_string()).into())
}

/// Opens an image in containerd's store, to be written.
pub(crate) async fn containerd_sink(namespace: Option<&str>, reference: &Reference) -> Result<ContainerdSink> {
    Ok(containerd::open_sink(&containerd_place(namespace), reference).await?)
}

fn containerd_place(namespace: Option<&str>) -> containerd::Place {
    containerd::Place::from_environment(namespace, |name| std::env::var_os(name))
}

/// An archive is written as it is: its layers are compressed already.
fn refuse_compressed(name: &ImageName) -> Result<(), Usage> {
    let (ImageName::OciArchive { path, .. } | ImageName::DockerArchive { path, .. }) = name else { return Ok(()) };
    let text = path.to_string_lossy();
    let ending =
        [".tar.gz", ".tgz", ".tar.zst", ".tar.xz", ".tar.bz2"].into_iter().find(|ending| text.ends_with(ending));
    match ending {
        Some(ending) => Err(Usage(format!(
            "{text}: archives are written without compression around them; name it {}.tar",
            text.trim_end_matches(ending)
        ))),
        None => Ok(()),
    }
}

/// Says what is done with an image, for an error; and where its name is a file's too, how that is named.
pub(crate) fn doing(what: &str, name: &str) -> String {
    // What follows a colon is a tag, there as here.
    let local = name.split_once(':').map_or(name, |(path, _)| path);
    let path = Path::new(local);
    let kind = match path.metadata() {
        Ok(metadata) if metadata.is_dir() => "directory",
        Ok(_) => "file",
        Err(_) => return format!("{what} {name}"),
    };
    let transport = match kind {
        "directory" => "oci",
        _ if is_docker_archive(path) => "docker-archive",
        _ => "oci-archive",
    };
    format!("{what} {name} in a registry (there is a {kind} {local} here: {transport}:{name})")
}

/// Says whether a name begins with a transport, as `oci:` is.
pub(crate) fn has_transport(name: &str) -> bool {
    name.starts_with("docker://") || parse(name).is_ok_and(|name| !matches!(name, ImageName::Registry(_)))
}

/// Tells an archive of `docker save` by its first entries. Newer ones are OCI archives too, and are read as such.
pub(crate) fn is_docker_archive(path: &Path) -> bool {
    const SCANNED_BYTES: u64 = 1 << 20;
    let Ok(file) = std::fs::File::open(path) else { return false };
    let limits = loris_format::limits::Limits::default();
    let mut reader = loris_format::tar::Reader::new(file.take(SCANNED_BYTES), &limits);
    let mut docker = false;
    while let Ok(Some(entry)) = reader.next_entry() {
        match entry.path.as_slice() {
            b"oci-layout" => return false,
            b"manifest.json" => docker = true,
            _ => {}
        }
    }
    docker
}

/// Prints what a verb that writes an image prints: one line, or with `--json` the whole report.
pub(crate) fn print_written(global: &Global, name: &str, digest: &Digest, report: &impl Serialize) -> Result<()> {
    let written = match parse(name)? {
        // What is on standard output is the image itself.
        ImageName::Standard => {
            eprintln!("{digest}");
            return Ok(());
        }
        name => name.with_digest(*digest),
    };
    if global.json {
        let mut value = serde_json::to_value(report)?;
        if let Some(fields) = value.as_object_mut() {
            fields.insert("name".into(), written.to_string().into());
        }
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        println!("{written}");
    }
    Ok(())
}
