//! containerd's protocols, generated from the files in `proto/` by `cargo xtask protos`.
//!
//! The modules have the shape that the generated code expects of its packages.

/// All packages are below this one.
pub mod containerd {
    /// Common types.
    pub mod types {
        include!("proto/containerd.types.rs");
    }
    /// Services.
    pub mod services {
        /// Blobs.
        pub mod content {
            /// Its only version.
            pub mod v1 {
                include!("proto/containerd.services.content.v1.rs");
            }
        }
        /// Images.
        pub mod images {
            /// Its only version.
            pub mod v1 {
                include!("proto/containerd.services.images.v1.rs");
            }
        }
        /// Leases.
        pub mod leases {
            /// Its only version.
            pub mod v1 {
                include!("proto/containerd.services.leases.v1.rs");
            }
        }
        /// Snapshots.
        pub mod snapshots {
            /// Its only version.
            pub mod v1 {
                include!("proto/containerd.services.snapshots.v1.rs");
            }
        }
    }
}

/// Kubernetes' interface to container runtimes.
pub mod runtime {
    /// Its first version.
    pub mod v1 {
        include!("proto/runtime.v1.rs");

        /// Whether there is something: secrets stay out of logs.
        impl std::fmt::Debug for AuthConfig {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.debug_struct("AuthConfig").field("server_address", &self.server_address).finish_non_exhaustive()
            }
        }
    }
}

pub use runtime::v1 as cri;

pub use containerd::{
    services::{content::v1 as content, images::v1 as images, leases::v1 as leases, snapshots::v1 as snapshots},
    types,
};
