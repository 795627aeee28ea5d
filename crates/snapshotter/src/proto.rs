//! containerd's protocol, generated from the files in `proto/` by `cargo xtask protos`.
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
        /// Snapshots.
        pub mod snapshots {
            /// Its only version.
            pub mod v1 {
                include!("proto/containerd.services.snapshots.v1.rs");
            }
        }
    }
}

pub use containerd::{services::snapshots::v1 as snapshots, types};
