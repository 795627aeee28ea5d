//! The keys of stargz-snapshotter's configuration, and what they mean here.
//!
//! Source: its `cmd/containerd-stargz-grpc/main.go`, `fs/config/config.go`, `service/config.go` and
//! `service/resolver/registry.go`, version 0.18. What is named as with us (`metrics_address`, the keychains) is not here,
//! and `[resolver.host]` is read by [`super::mirrors`].

use super::value::{Kind, Value};

const WHOLE: Kind = Kind::Number(i64::MIN, i64::MAX);

/// A key of theirs.
pub(super) struct Foreign {
    pub(super) name: &'static str,
    pub(super) kind: Kind,
    pub(super) meaning: Meaning,
}

/// What it means here.
pub(super) enum Meaning {
    /// A key of ours: which, and what value it gets; `None` where it says nothing that is not so anyway.
    Is(&'static str, fn(&Value) -> Option<Value>),
    /// The same, and something has to be said of it where it says anything.
    Nearly(&'static str, fn(&Value) -> Option<Value>, &'static str),
    /// Nothing: why.
    Nothing(&'static str),
}

const fn is(name: &'static str, kind: Kind, key: &'static str, map: fn(&Value) -> Option<Value>) -> Foreign {
    Foreign { name, kind, meaning: Meaning::Is(key, map) }
}

const fn nothing(name: &'static str, kind: Kind, why: &'static str) -> Foreign {
    Foreign { name, kind, meaning: Meaning::Nothing(why) }
}

const KEPT_ONCE: &str = "content is kept once, on the disk; see [cache] and memory";
const NO_WAIT: &str = "nobody waits for prefetching here";
const SCHEDULED: &str = "what nobody waits for makes room for readers by itself; see complete and complete_rate";
const RANGES: &str = "how much is fetched at once follows from the link and from what is read";
const KERNEL: &str = "metadata and pages are kept by the kernel for as long as it likes";
const KEEPER: &str = "mounts always outlive this process: each has a keeper";
const PAGE_CACHE: &str = "what is on the disk is in the kernel's page cache and nowhere else";
const PASSTHROUGH: &str = "what is here is read without this process wherever the engine allows it; see engine";
const WAITS: &str = "waits between requests are 250 ms at first, doubled, up to a minute; see registries.retries";

/// All of them.
pub(super) const FOREIGN: &[Foreign] = &[
    is("noprefetch", Kind::Boolean, "prefetch", |value| Some(Value::Boolean(*value != Value::Boolean(true)))),
    is("no_background_fetch", Kind::Boolean, "complete", |value| {
        (*value == Value::Boolean(true)).then(|| Value::Text("never".to_owned()))
    }),
    is("allow_no_verification", Kind::Boolean, "allow_unverified", |value| Some(value.clone())),
    Foreign {
        name: "disable_verification",
        kind: Kind::Boolean,
        meaning: Meaning::Nearly(
            "allow_unverified",
            |value| (*value == Value::Boolean(true)).then(|| value.clone()),
            "read as allow_unverified: what has a digest is verified all the same",
        ),
    },
    is("no_prometheus", Kind::Boolean, "metrics_address", |value| {
        (*value == Value::Boolean(true)).then(|| Value::Text(String::new()))
    }),
    nothing("debug_address", Kind::Text, "there is no profiler in this program"),
    nothing("debug", Kind::Boolean, "requests of FUSE are not logged one by one; see [log]"),
    nothing("ipfs", Kind::Boolean, "content comes from registries only"),
    nothing("metadata_store", Kind::Choice(&["memory", "db"]), "tables of contents are kept on the disk, compactly"),
    nothing("http_cache_type", Kind::Text, KEPT_ONCE),
    nothing("filesystem_cache_type", Kind::Text, KEPT_ONCE),
    nothing("resolve_result_entry_ttl_sec", WHOLE, "a layer stays open while a snapshot needs it"),
    nothing("resolve_result_entry", WHOLE, "a layer stays open while a snapshot needs it"),
    nothing("prefetch_size", WHOLE, "what is fetched first is what the image marks, and not a number of bytes"),
    nothing("prefetch_timeout_sec", WHOLE, NO_WAIT),
    nothing("prefetch_async_size", WHOLE, NO_WAIT),
    nothing("max_concurrency", WHOLE, SCHEDULED),
    nothing(
        "log_file_access",
        Kind::Boolean,
        "the kernel does not say which files are opened where it reads by itself",
    ),
    nothing("blob.valid_interval", WHOLE, "nothing is served that was not verified, so that registries need no checks"),
    nothing(
        "blob.check_always",
        Kind::Boolean,
        "nothing is served that was not verified, so that registries need no checks",
    ),
    nothing("blob.chunk_size", WHOLE, RANGES),
    nothing("blob.prefetch_chunk_size", WHOLE, RANGES),
    nothing("blob.force_single_range_mode", Kind::Boolean, "each request has one range anyway"),
    is("blob.fetching_timeout_sec", WHOLE, "registries.read_deadline", positive),
    is("blob.max_retries", WHOLE, "registries.retries", |value| match value {
        Value::Number(number) => Some(Value::Number((*number).clamp(0, 100))),
        _ => None,
    }),
    nothing("blob.min_wait_msec", WHOLE, WAITS),
    nothing("blob.max_wait_msec", WHOLE, WAITS),
    nothing("directory_cache.max_lru_cache_entry", WHOLE, PAGE_CACHE),
    nothing("directory_cache.max_cache_fds", WHOLE, PAGE_CACHE),
    nothing("directory_cache.sync_add", Kind::Boolean, PAGE_CACHE),
    nothing("directory_cache.direct", Kind::Boolean, PAGE_CACHE),
    nothing("directory_cache.fadv_dontneed", Kind::Boolean, PAGE_CACHE),
    nothing("fuse.attr_timeout", WHOLE, KERNEL),
    nothing("fuse.entry_timeout", WHOLE, KERNEL),
    nothing("fuse.passthrough", Kind::Boolean, PASSTHROUGH),
    nothing("fuse.merge_buffer_size", WHOLE, PASSTHROUGH),
    nothing("fuse.merge_worker_count", WHOLE, PASSTHROUGH),
    is("resolver.request_timeout_sec", WHOLE, "registries.stall_timeout", positive),
    nothing(
        "snapshotter.allow_invalid_mounts_on_restart",
        Kind::Boolean,
        "what can't be opened after a restart keeps nobody from starting; it is opened when it is asked for",
    ),
    nothing("fuse_manager.enable", Kind::Boolean, KEEPER),
    nothing("fuse_manager.address", Kind::Text, KEEPER),
    nothing("fuse_manager.path", Kind::Text, KEEPER),
    nothing("fuse_manager.metrics_address", Kind::Text, KEEPER),
    // Of the plugin that is built into containerd, as k3s has it.
    nothing("root_path", Kind::Text, "that directory is stargz-snapshotter's; see root"),
    is("cri_keychain_image_service_path", Kind::Path, "cri_keychain.image_service_path", |value| Some(value.clone())),
    is("registry.config_path", Kind::Text, "registries.hosts_dirs", |value| match value {
        Value::Text(paths) if !paths.is_empty() => Some(Value::Texts(paths.split(':').map(str::to_owned).collect())),
        _ => None,
    }),
];

/// Zero and less is what is usual.
fn positive(value: &Value) -> Option<Value> {
    match value {
        Value::Number(number) if *number > 0 => Some(Value::Number((*number).min(86_400))),
        _ => None,
    }
}
