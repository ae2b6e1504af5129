//! Accepts and serves HTTP/1.1 connections, with the limits that a public listener needs.

use std::{sync::Arc, time::Duration};

use axum::{Router, body::Body};
use http::{HeaderValue, Request, header};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::sockopt;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tower::ServiceExt as _;

use super::{
    Phase,
    stream::{Guarded, Load},
};
use crate::{
    ingress::{Peer, Place},
    task::Tasks,
};

/// Connections at once; further ones wait in the kernel's queue.
const CONNECTIONS: usize = 16_384;
/// For the head of a request, from the first byte of the connection or the end of the request before.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);
/// For the head of a request.
const HEAD_BYTES: usize = 64 << 10;

/// Serves connections until the phase is closing.
pub(super) async fn accept(listener: TcpListener, router: Router, phase: Phase, tasks: Tasks) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    let mut pause = Duration::from_millis(5);
    loop {
        let place = Arc::clone(&places).acquire_owned();
        let next = async { (place.await, listener.accept().await) };
        let (place, accepted) = tokio::select! {
            () = phase.closing.cancelled() => break,
            next = next => next,
        };
        match (place, accepted) {
            (Ok(place), Ok((stream, peer))) => {
                pause = Duration::from_millis(5);
                let place = Place::new(place);
                let serving = serve(stream, Peer(peer), router.clone(), phase.clone(), place);
                drop(tasks.spawn("connection", serving));
            }
            (_, accepted) => {
                // Out of file descriptors, most likely: connections that end give some back.
                if let Err(error) = accepted {
                    tracing::warn!(%error, "cannot accept");
                }
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
        }
    }
    drop(listener);
    // Essential tasks last as long as the process.
    tasks.stopping().cancelled().await;
}

async fn serve(stream: TcpStream, peer: Peer, router: Router, phase: Phase, place: Place) {
    if let Err(error) = prepare(&stream) {
        tracing::debug!(%error, "a connection was lost at once");
        return;
    }
    let draining = phase.draining.clone();
    let held = place.clone();
    let load = Load::default();
    let stream = Guarded::new(stream, load.clone());
    let service = service_fn(move |request: Request<Incoming>| {
        let router = router.clone();
        let draining = draining.clone();
        let place = held.clone();
        let load = load.clone();
        async move {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer);
            request.extensions_mut().insert(place);
            let mut response = router.oneshot(request).await?;
            load.carries(&mut response);
            if draining.is_cancelled() && response.status() != http::StatusCode::SWITCHING_PROTOCOLS
            {
                response
                    .headers_mut()
                    .insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = phase.closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a connection ended early");
    }
    drop(place);
}

/// Events are small and must not wait for each other; a peer that vanished without a word is noticed within three minutes.
fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, Duration::from_secs(60))?;
    sockopt::set_tcp_keepintvl(stream, Duration::from_secs(20))?;
    sockopt::set_tcp_keepcnt(stream, 6)?;
    sockopt::set_tcp_user_timeout(stream, 180_000)?;
    Ok(())
}
