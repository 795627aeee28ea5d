//! Listening, connections and stopping, the same for every server of this crate.

use std::{
    io,
    net::{SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};

use axum::Router;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Semaphore, watch},
    task::{JoinHandle, JoinSet},
};

/// How a server treats its connections.
#[derive(Clone)]
pub struct ServerOptions {
    /// TLS, or plain HTTP where `None`. The configuration should offer `h2` and `http/1.1` by ALPN.
    pub tls: Option<Arc<rustls::ServerConfig>>,
    /// Most connections at a time. Further ones wait in the kernel's backlog.
    pub connections: usize,
    /// How long [`ServerHandle::stop`] waits for answers that are under way.
    pub grace: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { tls: None, connections: 1024, grace: Duration::from_secs(5) }
    }
}

/// How long a client may take to send a request's head, or to greet in TLS.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// A server that runs. Dropping it ends it at once, [`stop`](Self::stop) ends it gracefully.
pub struct ServerHandle {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

impl ServerHandle {
    /// Returns the address that the server listens on.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts no further connection, waits for answers under way as long as the options allow, and closes the rest.
    pub async fn stop(mut self) {
        // No receiver is left only if the accepting task has ended, and then there is nothing to stop.
        let _ = self.stop.send(true);
        if let Err(error) = (&mut self.accepting).await {
            tracing::error!(%error, address = %self.address, "the server ended badly");
        }
    }
}

impl Drop for ServerHandle {
    fn drop(&mut self) {
        // The connections live in a set which that task owns; they end with it.
        self.accepting.abort();
    }
}

/// Serves `router` on `listener`, in tasks of the current runtime.
///
/// # Errors
/// The listener can't be used.
///
/// # Panics
/// Outside a Tokio runtime.
pub fn serve(listener: TcpListener, router: Router, options: ServerOptions) -> io::Result<ServerHandle> {
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let (stop, stopped) = watch::channel(false);
    let accepting = tokio::spawn(accept(listener, router, options, stopped));
    Ok(ServerHandle { address, stop, accepting })
}

async fn accept(
    listener: tokio::net::TcpListener,
    router: Router,
    options: ServerOptions,
    mut stopped: watch::Receiver<bool>,
) {
    let places = Arc::new(Semaphore::new(options.connections.max(1)));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            _ = stopped.changed() => break,
            Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            accepted = async {
                // The semaphore is never closed.
                let place = Arc::clone(&places).acquire_owned().await.ok();
                (listener.accept().await, place)
            } => accepted,
        };
        let (stream, place) = match accepted {
            (Ok((stream, _)), place) => (stream, place),
            (Err(error), _) => {
                // Out of descriptors, mostly. Waiting lets connections end; a tight loop would not.
                tracing::warn!(%error, "failed to accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // Answers are written in large pieces: waiting to fill a packet only delays the last one.
        let _ = stream.set_nodelay(true);
        let (router, tls, stopped) = (router.clone(), options.tls.clone(), stopped.clone());
        connections.spawn(async move {
            let _place = place;
            match tls {
                None => connection(stream, router, stopped).await,
                Some(config) => {
                    let greeting = tokio_rustls::TlsAcceptor::from(config).accept(stream);
                    match tokio::time::timeout(HEAD_TIMEOUT, greeting).await {
                        Ok(Ok(stream)) => connection(stream, router, stopped).await,
                        Ok(Err(error)) => tracing::debug!(%error, "a client failed to greet in TLS"),
                        Err(_) => tracing::debug!("a client took too long to greet in TLS"),
                    }
                }
            }
        });
    }
    drop(listener);
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(options.grace, all).await.is_err() {
        connections.shutdown().await;
    }
}

async fn connection<S>(stream: S, router: Router, mut stopped: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(HEAD_TIMEOUT);
    let connection = builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = stopped.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(error, "a connection ended badly");
    }
}
