//! Servers: what Loris offers to others over the network.
//!
//! - [`registry`]: an OCI registry (distribution specification 1.1, server side) over a directory.
//! - [`server`]: listening, TLS, connections and stopping, the same for every server of this crate.
//! - [`link`]: an everyday network link in front of a server on loopback: a rate, a delay, and what else goes wrong.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use loris_serve::{link::{Link, LinkOptions}, registry::Registry, server::ServerOptions};
//!
//! let registry = Registry::open("/var/lib/images")?;
//! let server = registry.serve(std::net::TcpListener::bind("127.0.0.1:0")?, ServerOptions::default())?;
//! let link = Link::start(LinkOptions::symmetric(100_000_000, std::time::Duration::from_millis(10)), server.address())?;
//! println!("docker pull {}/library/alpine", link.address());
//! link.stop();
//! server.stop().await;
//! # Ok(())
//! # }
//! ```
//!
//! What this crate must not know: what the bytes of a layer mean, mounts, terminals.
#![forbid(unsafe_code)]

pub mod link;
pub mod registry;
pub mod server;
