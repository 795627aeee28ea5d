//! What is counted, for Prometheus. No metric has a label whose values a user or an image chooses.
//!
//! | metric | of |
//! |---|---|
//! | `loris_requests_total{call,result}`, `loris_request_seconds{call}` | containerd's calls |
//! | `loris_layers_prepared_total{outcome}` | layers that clients asked for: `lazy`, or why not |
//! | `loris_fetched_bytes_total{why}` | compressed bytes: `demand`, `prefetch`, `read-ahead`, `completion`, `other` |
//! | `loris_reads_waited_total`, `loris_read_wait_seconds_total` | reads that had to wait for a fetch |
//! | `loris_copied_bytes_total` | content that another layer had: nobody fetched it |
//! | `loris_registry_requests_total`, `loris_fetch_errors_total` | requests, and what failed |
//! | `loris_layers{state}`, `loris_lower_directories` | what is open (`complete` or `partial`) and mounted |
//!
//! What this module must not know: HTTP.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak, atomic::AtomicU64},
    time::Duration,
};

use loris_lazy::{LayerStatistics, LazyLayer};
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use crate::{ahead::Ahead, lowers::Lowers, remote::FallbackKind};

/// Upper ends of the intervals in which calls are counted, in seconds.
const INTERVALS: [f64; 10] = [0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 30.0];

#[derive(Clone, Hash, PartialEq, Eq, Debug, EncodeLabelSet)]
struct Call {
    call: &'static str,
}

#[derive(Clone, Hash, PartialEq, Eq, Debug, EncodeLabelSet)]
struct Called {
    call: &'static str,
    result: &'static str,
}

#[derive(Clone, Hash, PartialEq, Eq, Debug, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Clone, Hash, PartialEq, Eq, Debug, EncodeLabelSet)]
struct Why {
    why: &'static str,
}

#[derive(Clone, Hash, PartialEq, Eq, Debug, EncodeLabelSet)]
struct State {
    state: &'static str,
}

/// All counters.
pub struct Metrics {
    registry: Registry,
    requests: Family<Called, Counter>,
    seconds: Family<Call, Histogram, fn() -> Histogram>,
    prepared: Family<Outcome, Counter>,
    fetched: Family<Why, Counter>,
    waits: Counter,
    waited: Counter<f64, AtomicU64>,
    copied: Counter,
    registry_requests: Counter,
    errors: Counter,
    layers: Family<State, Gauge>,
    lowers: Gauge,
    ahead: Ahead,
    mounted: Arc<Lowers>,
    /// What was added of each layer so far.
    counted: Mutex<HashMap<usize, (Weak<LazyLayer>, LayerStatistics)>>,
}

fn histogram() -> Histogram {
    Histogram::new(INTERVALS)
}

impl Metrics {
    pub(crate) fn new(ahead: &Ahead, lowers: &Arc<Lowers>) -> Self {
        let mut metrics = Self {
            registry: Registry::with_prefix("loris"),
            requests: Family::default(),
            seconds: Family::new_with_constructor(histogram),
            prepared: Family::default(),
            fetched: Family::default(),
            waits: Counter::default(),
            waited: Counter::default(),
            copied: Counter::default(),
            registry_requests: Counter::default(),
            errors: Counter::default(),
            layers: Family::default(),
            lowers: Gauge::default(),
            ahead: ahead.clone(),
            mounted: Arc::clone(lowers),
            counted: Mutex::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        // What has not happened yet is 0, and not missing.
        for outcome in FallbackKind::ALL.map(FallbackKind::name).into_iter().chain(["lazy"]) {
            drop(self.prepared.get_or_create(&Outcome { outcome }));
        }
        for why in WHY {
            drop(self.fetched.get_or_create(&Why { why }));
        }
        let to = &mut self.registry;
        to.register("requests", "Calls of containerd", self.requests.clone());
        to.register_with_unit("request", "How long they took", Unit::Seconds, self.seconds.clone());
        to.register("layers_prepared", "Layers that clients asked for", self.prepared.clone());
        to.register("fetched_bytes", "Compressed bytes that were fetched", self.fetched.clone());
        to.register("reads_waited", "Reads that waited for a fetch", self.waits.clone());
        to.register("read_wait_seconds", "How long they waited", self.waited.clone());
        to.register("copied_bytes", "Content that another layer had", self.copied.clone());
        to.register("registry_requests", "Requests to registries", self.registry_requests.clone());
        to.register("fetch_errors", "Requests, frames and extents that failed", self.errors.clone());
        to.register("layers", "Lazy layers that are open", self.layers.clone());
        to.register("lower_directories", "Lower directories that are mounted", self.lowers.clone());
    }

    /// A layer was asked for; where it is not lazy, for this kind of reason.
    pub(crate) fn prepared(&self, fallback: Option<FallbackKind>) {
        let outcome = fallback.map_or("lazy", FallbackKind::name);
        self.prepared.get_or_create(&Outcome { outcome }).inc();
    }

    /// A call was answered.
    pub(crate) fn called(&self, call: &'static str, took: Duration, result: &'static str) {
        self.requests.get_or_create(&Called { call, result }).inc();
        self.seconds.get_or_create(&Call { call }).observe(took.as_secs_f64());
    }

    /// Returns all of them, as Prometheus reads them (OpenMetrics 1.0).
    #[must_use]
    pub fn text(&self) -> String {
        self.count_layers();
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    /// Adds what happened to layers since the last time. Often enough, so that what happened to one that is gone is not lost.
    pub fn count_layers(&self) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        counted.retain(|_, (layer, _)| layer.strong_count() > 0);
        let (mut complete, mut partial) = (0, 0);
        for (_, layer) in self.ahead.layers() {
            if layer.is_complete() {
                complete += 1;
            } else {
                partial += 1;
            }
            let now = layer.statistics();
            let key = Arc::as_ptr(&layer) as usize;
            let before =
                counted.insert(key, (Arc::downgrade(&layer), now)).map(|(_, before)| before).unwrap_or_default();
            self.add(&before, &now);
        }
        self.layers.get_or_create(&State { state: "complete" }).set(complete);
        self.layers.get_or_create(&State { state: "partial" }).set(partial);
        self.lowers.set(i64::try_from(self.mounted.count()).unwrap_or(i64::MAX));
    }

    fn add(&self, before: &LayerStatistics, now: &LayerStatistics) {
        let by_why = |of: &LayerStatistics| {
            let known = [of.demand_bytes, of.prefetch_bytes, of.read_ahead_bytes, of.completion_bytes];
            let other = of.fetched_bytes.saturating_sub(known.iter().sum());
            [known[0], known[1], known[2], known[3], other]
        };
        for ((why, before), now) in WHY.into_iter().zip(by_why(before)).zip(by_why(now)) {
            self.fetched.get_or_create(&Why { why }).inc_by(now.saturating_sub(before));
        }
        self.waits.inc_by(now.waits.saturating_sub(before.waits));
        self.waited.inc_by(now.waited.saturating_sub(before.waited).as_secs_f64());
        self.copied.inc_by(now.copied_bytes.saturating_sub(before.copied_bytes));
        self.registry_requests.inc_by(now.requests.saturating_sub(before.requests));
        self.errors.inc_by(now.errors.saturating_sub(before.errors));
    }
}

const WHY: [&str; 5] = ["demand", "prefetch", "read-ahead", "completion", "other"];
