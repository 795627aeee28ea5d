//! Credentials that only a node of a cluster has: what kubelet pulls with ([`cri`]), the cluster's pull secrets ([`kube`]),
//! and kubelet's credential providers ([`provider`]). They are asked in this order, and before Docker's and Podman's files:
//! a pull's own credentials are what the client itself was let in with.
//!
//! What this module must not know: how registries are asked, snapshots.

use std::{path::Path, sync::Arc};

use loris_oci::auth::Keychain;

pub mod cri;
pub mod kube;
mod pattern;
pub mod provider;
mod yaml;

/// Which keychains there are. The default has none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// kubelet's pulls.
    pub cri: cri::Settings,
    /// The cluster's secrets.
    pub kubeconfig: kube::Settings,
    /// kubelet's credential providers.
    pub provider: provider::Settings,
}

/// Why keychains can't be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeychainError {
    /// kubelet can't be served.
    #[error("kubelet's credentials: {0}")]
    Cri(#[from] cri::KeptError),
    /// Providers can't be asked.
    #[error("credential providers: {0}")]
    Provider(#[from] provider::ProviderError),
}

/// Keychains, and what kubelet speaks to. The default has none.
#[derive(Debug, Default)]
pub struct Keychains {
    list: Vec<Arc<dyn Keychain>>,
    image_service: Option<cri::ImageService>,
}

impl Keychains {
    /// Sets up what is enabled, on the runtime of the caller. `state` is the directory in which kubelet's credentials are
    /// kept over a restart: the snapshotter's root.
    ///
    /// # Errors
    /// See [`KeychainError`].
    pub fn new(settings: &Settings, state: &Path) -> Result<Self, KeychainError> {
        let mut keychains = Self::default();
        if settings.cri.enable_keychain {
            let service = cri::ImageService::new(&settings.cri, state)?;
            keychains.list.push(cri::keychain(&service));
            keychains.image_service = Some(service);
        }
        if settings.kubeconfig.enable_keychain {
            keychains.list.push(Arc::new(kube::Secrets::watch(&settings.kubeconfig)));
        }
        if let Some(providers) = provider::Providers::read(&settings.provider)? {
            keychains.list.push(Arc::new(providers));
        }
        Ok(keychains)
    }

    /// Returns them in the order in which they are asked: for [`loris_oci::registry::Config::keychains`].
    #[must_use]
    pub fn list(&self) -> Vec<Arc<dyn Keychain>> {
        self.list.clone()
    }

    /// Returns what kubelet is served with: for [`crate::daemon::Settings::image_service`].
    #[must_use]
    pub fn image_service(&self) -> Option<cri::ImageService> {
        self.image_service.clone()
    }
}
