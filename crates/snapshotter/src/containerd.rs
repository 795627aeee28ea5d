//! Images in containerd's own store, as a client of containerd sees them: `containerd:[NAMESPACE/]REFERENCE`.
//!
//! A lazily pulled image is there by name and manifest only: its layers are missing, and whoever exports, pushes, converts
//! or builds on the image fails for want of them. So what reads from here takes a missing layer from the registry that it
//! came from, and [`whole::complete`] puts such layers into the store, where all other clients find them.
//!
//! ```text
//!  source ──┬─▶ store     the store's calls: content, images, leases        sink ──▶ store
//!           └─▶ origin    registries that a missing layer may come from
//!  whole ──▶ source ──▶ sink    an image's missing layers, one after the other
//! ```
//!
//! What this module must not know: snapshots that this process serves.

use std::{ffi::OsString, path::PathBuf};

use loris_oci::{Error, Reference, registry::Client};

mod origin;
mod sink;
mod source;
mod store;
pub mod whole;

pub use self::{origin::Origins, sink::ContainerdSink, source::ContainerdSource, store::Store};

/// Where containerd listens, unless something else is said.
pub const ADDRESS: &str = "/run/containerd/containerd.sock";
/// Its clients' namespace, unless something else is said.
const NAMESPACE: &str = "default";
/// What says something else, to all of containerd's clients.
const VARIABLES: [&str; 2] = ["CONTAINERD_ADDRESS", "CONTAINERD_NAMESPACE"];

/// Which containerd, and which of its namespaces.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Place {
    /// Its socket.
    pub address: PathBuf,
    /// Images, content and leases of one are not seen in another.
    pub namespace: String,
}

impl Place {
    /// Returns the place that the variables of containerd's clients name; `namespace` counts more.
    #[must_use]
    pub fn from_environment(namespace: Option<&str>, variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let said = |name| variable(name).filter(|value| !value.is_empty());
        let address = said(VARIABLES[0]).map_or_else(|| PathBuf::from(ADDRESS), PathBuf::from);
        let address =
            address.strip_prefix("unix://").map_or_else(|_| address.clone(), |path| PathBuf::from("/").join(path));
        let spoken = || said(VARIABLES[1]).and_then(|value| value.into_string().ok());
        let namespace = namespace.map(str::to_owned).or_else(spoken).unwrap_or_else(|| NAMESPACE.to_owned());
        Self { address, namespace }
    }
}

/// Opens an image of containerd's, to be read. Layers that are missing there come from the registry that they came from.
///
/// # Errors
/// Where containerd can't be reached.
pub async fn open_source(place: &Place, reference: &Reference, client: Client) -> Result<ContainerdSource, Error> {
    Ok(ContainerdSource::new(Store::connect(place).await?, reference.clone(), Origins::new(client)))
}

/// Opens an image of containerd's, to be written.
///
/// # Errors
/// Where containerd can't be reached.
pub async fn open_sink(place: &Place, reference: &Reference) -> Result<ContainerdSink, Error> {
    Ok(ContainerdSink::new(Store::connect(place).await?, reference.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_variables_of_containerds_clients_count() {
        let none = Place::from_environment(None, |_| None);
        assert_eq!(none, Place { address: ADDRESS.into(), namespace: "default".into() });
        let all = |name: &str| Some(if name.ends_with("ADDRESS") { "unix:///run/other.sock" } else { "moby" }.into());
        let place = Place::from_environment(None, all);
        assert_eq!(place, Place { address: "/run/other.sock".into(), namespace: "moby".into() });
        assert_eq!(Place::from_environment(Some("k8s.io"), all).namespace, "k8s.io");
        assert_eq!(Place::from_environment(None, |_| Some("".into())), none);
    }
}
