//! Probes and metrics for machines, one page for people. Reads [`Metrics`] and nothing else; changes nothing.
//!
//! The trap: a probe that is answered by the loop under test says "fine" for as long as it loops. `/readyz` says what was
//! last heard from each peer.

mod ask;
mod clients;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::map_response;
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

pub use ask::ask;

use crate::metrics::Metrics;

/// Binds the address.
///
/// # Errors
/// Of the operating system.
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves as long as the process lives: a stop that takes its time is watched as well.
///
/// # Errors
/// Of the operating system.
pub async fn serve(listener: TcpListener, metrics: Arc<Metrics>) -> std::io::Result<()> {
    let router = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(render))
        .route("/", get(page))
        .layer(map_response(last))
        .with_state(metrics);
    axum::serve(clients::Few::new(listener), router).await
}

/// One answer a connection: a kept one would end by its deadline, perhaps in the middle of the client's next request.
async fn last(mut response: Response) -> Response {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

async fn ready(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    let reasons = metrics.reasons();
    let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({ "ready": reasons.is_empty(), "reasons": reasons });
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{body}\n"))
}

async fn render(State(metrics): State<Arc<Metrics>>) -> impl IntoResponse {
    let format = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, format)], metrics.render())
}

async fn page(State(metrics): State<Arc<Metrics>>) -> Html<String> {
    let reasons = metrics.reasons();
    let state = if reasons.is_empty() { "ready".to_owned() } else { reasons.join("; ") };
    let numbers: String =
        metrics.render().lines().filter(|line| !line.starts_with('#')).fold(String::new(), |mut numbers, line| {
            numbers.push_str(&escaped(line));
            numbers.push('\n');
            numbers
        });
    let version = env!("CARGO_PKG_VERSION");
    Html(format!(
        "<!doctype html><meta charset=utf-8><meta http-equiv=refresh content=5><title>pgoutbox</title>\
         <style>body{{font:16px/1.5 sans-serif;margin:2em}}</style>\
         <h1>pgoutbox {version}</h1><p>{}</p><pre>{numbers}</pre>\
         <p><a href=/readyz>readyz</a> <a href=/livez>livez</a> <a href=/metrics>metrics</a></p>\n",
        escaped(&state)
    ))
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
