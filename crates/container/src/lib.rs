//! From an image's configuration and a root file system to a running process.
//!
//! - [`spec`]: the configuration and a user's wishes become a [`Container`](spec::Container): an OCI runtime
//!   specification and the few files that are mounted into it, as `docker run` would make them.
//! - [`runtime`]: a container runs in the foreground, by the embedded OCI runtime or an installed one; its streams,
//!   terminal, signals and exit status are passed on, and nothing of it outlives us.
//! - [`embedded`]: the embedded runtime (libcontainer, of youki). It has to fork, which a process with threads must not,
//!   so the program executes itself again: `/proc/self/exe oci-runtime run ...`. Whoever runs containers with
//!   [`Runtime::Embedded`](runtime::Runtime::Embedded) must hand the arguments behind `oci-runtime` to
//!   [`embedded::main`], before it starts any thread.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use loris_container::{runtime::{Runner, Runtime, Streams, forwarded_signals}, spec::{Container, Wishes}};
//! use loris_oci::document::ProcessConfig;
//!
//! let image = ProcessConfig { cmd: vec!["sh".to_owned()], ..ProcessConfig::default() };
//! let wishes = Wishes { tty: true, interactive: true, ..Wishes::default() };
//! let runner = Runner::new(Runtime::Embedded);
//! let container = Container::new(&image, &wishes, "/mnt/root".as_ref(), &|name| std::env::var(name).ok())?;
//! let status = runner.run(container, Streams::inherited()?, forwarded_signals()?).await?;
//! # Ok(())
//! # }
//! ```
//!
//! What this crate must not know: where the root file system comes from, registries, the bytes of layers.
#![forbid(unsafe_code)]

pub mod embedded;
pub mod root;
pub mod runtime;
pub mod spec;
mod state;
mod terminal;
pub mod user;
