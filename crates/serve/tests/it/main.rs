//! The registry over real HTTP: by raw requests, and by skopeo.
#![allow(clippy::unwrap_used)]

mod peers;
mod registry;
mod tls;

use std::net::TcpListener;

use loris_serve::{
    registry::Registry,
    server::{ServerHandle, ServerOptions},
};
use tempfile::TempDir;

/// A registry in a temporary directory, and a client.
struct Served {
    registry: Registry,
    server: ServerHandle,
    directory: TempDir,
    client: reqwest::Client,
}

impl Served {
    fn start() -> Self {
        // The client wants one, also for plain HTTP. A second test in the process finds it installed.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let directory = tempfile::tempdir().unwrap();
        let registry = Registry::open(directory.path()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = registry.serve(listener, ServerOptions::default()).unwrap();
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { registry, server, directory, client }
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.server.address())
    }
}
