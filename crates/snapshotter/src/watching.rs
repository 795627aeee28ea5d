//! What those who watch the process ask over HTTP: `/metrics`, `/healthz`, `/readyz`.
//!
//! What this module must not know: what is counted.

use std::{io, sync::Arc};

use axum::{Router, http::header, routing::get};
use tokio::net::TcpListener;

use crate::{Snapshots, metrics::Metrics};

/// How often what happens to layers is counted, asked or not.
const INTERVAL: std::time::Duration = std::time::Duration::from_secs(5);
/// What `/metrics` is (OpenMetrics).
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Answers on an address, such as `127.0.0.1:9100`, until the process ends.
///
/// # Errors
/// Where it can't be listened on.
pub async fn watch(address: &str, snapshots: Snapshots) -> io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router(&snapshots)).await {
            tracing::error!(%error, "metrics are not served any more");
        }
    });
    Ok(())
}

/// Counts, whether somebody asks or not.
pub async fn count(metrics: Arc<Metrics>) {
    loop {
        tokio::time::sleep(INTERVAL).await;
        metrics.count_layers();
    }
}

fn router(snapshots: &Snapshots) -> Router {
    let (metrics, ready) = (Arc::clone(snapshots.metrics()), snapshots.clone());
    Router::new()
        .route("/metrics", get(async move || ([(header::CONTENT_TYPE, METRICS_TYPE)], metrics.text())))
        // Alive is who answers.
        .route("/healthz", get(async || "ok\n"))
        .route(
            "/readyz",
            get(async move || match ready.list(|_| false).await {
                Ok(_) => Ok("ok\n"),
                Err(error) => Err((axum::http::StatusCode::SERVICE_UNAVAILABLE, format!("{error}\n"))),
            }),
        )
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_dashboard_asks_for_metrics_that_there_are() {
        let dashboard = include_str!("../../../docs/grafana/snapshotter.json");
        let parsed: serde_json::Value = serde_json::from_str(dashboard).unwrap_or_default();
        assert!(parsed["panels"].as_array().is_some_and(|panels| panels.len() >= 6), "a dashboard without panels");
        let table = include_str!("metrics.rs");
        let names = dashboard
            .split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .filter(|word| word.starts_with("loris_") && *word != "loris_snapshotter");
        for name in names {
            let name = name.strip_suffix("_bucket").unwrap_or(name);
            assert!(table.contains(&format!("`{name}")), "{name} is not counted");
        }
    }
}
