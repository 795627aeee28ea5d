//! The binary against real parts: images made by others' tools, registries, container engines, mounts and containers.
//!
//! What a machine lacks (root, FUSE, a peer program) makes a test say so and return. Every program that a test starts
//! has a time by which it ends or is killed, and nothing is left behind: no process, no mount, no temporary file. Only
//! images that take long to make are kept, in Cargo's own directory for tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod away;
mod bad_input;
mod cache;
mod containerd;
mod containerd_store;
mod content;
mod crash;
mod daemon_config;
mod debian;
mod engines;
mod harness;
mod image;
mod layout;
mod newcomer;
mod offline;
mod ours_to_peers;
mod peers_to_ours;
mod podman;
mod prefetch;
mod rootfs;
mod snapshotter;
mod snapshotter_faults;
mod snapshotter_loops;
mod soci;
mod stopped;
