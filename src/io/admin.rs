//! The admin port: metrics, health, status and a page over plain HTTP.
//!
//! It has no password, so by default it is only on the loopback address. Nothing that it says holds users' addresses, and
//! nothing can be changed through it but that the configuration file is read again. A client that hangs holds one of a few places for a minute and no more.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::Sleep,
};

use crate::metrics::{ADMIN_REQUESTS, AdminPath, Rendered};

/// One Prometheus or two, a health check, a person: far fewer than this at a time.
const CONNECTIONS_MAX: usize = 32;

/// Scrapers keep their connection open; a new one a minute costs nothing.
const CONNECTION_AGE_MAX: Duration = Duration::from_secs(60);

/// How often samples are sorted into the histograms if nobody scrapes.
const TIDY_EVERY: Duration = Duration::from_secs(5);

/// `Err` says in a sentence what is wrong.
pub type Probe = Arc<dyn Fn() -> Result<(), String> + Send + Sync>;

/// The wish that the configuration be read again. `Err` says why it was not taken.
pub type Reload = oneshot::Sender<Result<Value, Value>>;

/// What the admin port answers from. The functions are called on every request, so they must be quick and never wait.
#[derive(Clone)]
pub struct Admin {
    pub metrics: Rendered,
    /// `/healthz`: the process lives and can write its store. If not, a restart may help.
    pub healthy: Probe,
    /// `/readyz`: the configuration is loaded, the store open, the legs listen.
    pub ready: Probe,
    /// `/`, for browsers.
    pub page: Arc<dyn Fn() -> String + Send + Sync>,
    /// `/status`
    pub status: Arc<dyn Fn() -> Value + Send + Sync>,
    /// `POST /reload`: who reads the configuration again.
    pub reload: mpsc::Sender<Reload>,
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Admin(..)")
    }
}

/// Serves until it is dropped.
pub async fn serve(listener: TcpListener, admin: Admin) -> io::Result<()> {
    serve_within(listener, admin, CONNECTION_AGE_MAX).await
}

async fn serve_within(listener: TcpListener, admin: Admin, age_max: Duration) -> io::Result<()> {
    let metrics = admin.metrics.clone();
    let tidy = async {
        let mut interval = tokio::time::interval(TIDY_EVERY);
        loop {
            interval.tick().await;
            metrics.tidy();
        }
    };
    let listener = Few {
        listener,
        places: Arc::new(Semaphore::new(CONNECTIONS_MAX)),
        age_max,
    };
    tokio::select! {
        result = axum::serve(listener, router(admin)) => result,
        never = tidy => never,
    }
}

fn router(admin: Admin) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/metrics", get(metrics))
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/status", get(status))
        .route("/reload", post(reload))
        .fallback(async || {
            ADMIN_REQUESTS.increment(AdminPath::Other);
            let paths = "there are /, /metrics, /healthz, /readyz, /status and, to be posted to, /reload\n";
            (StatusCode::NOT_FOUND, paths)
        })
        .with_state(admin)
}

async fn page(State(admin): State<Admin>) -> Response {
    ADMIN_REQUESTS.increment(AdminPath::Page);
    let headers = [
        (header::CONTENT_TYPE, "text/html; charset=utf-8"),
        // It loads nothing and runs nothing, whatever a name in it says.
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; style-src 'unsafe-inline'",
        ),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, (admin.page)()).into_response()
}

async fn metrics(State(admin): State<Admin>) -> Response {
    ADMIN_REQUESTS.increment(AdminPath::Metrics);
    // The version of the text format that Prometheus has read since 2014.
    let content_type = [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")];
    (content_type, admin.metrics.text()).into_response()
}

async fn healthz(State(admin): State<Admin>) -> Response {
    ADMIN_REQUESTS.increment(AdminPath::Healthz);
    probe(&admin.healthy)
}

async fn readyz(State(admin): State<Admin>) -> Response {
    ADMIN_REQUESTS.increment(AdminPath::Readyz);
    probe(&admin.ready)
}

async fn status(State(admin): State<Admin>) -> Response {
    ADMIN_REQUESTS.increment(AdminPath::Status);
    axum::Json((admin.status)()).into_response()
}

async fn reload(State(admin): State<Admin>) -> Response {
    ADMIN_REQUESTS.increment(AdminPath::Reload);
    let (wish, answer) = oneshot::channel();
    if admin.reload.try_send(wish).is_err() {
        return (StatusCode::SERVICE_UNAVAILABLE, "busy\n").into_response();
    }
    match answer.await {
        Ok(Ok(taken)) => axum::Json(taken).into_response(),
        Ok(Err(refused)) => (StatusCode::UNPROCESSABLE_ENTITY, axum::Json(refused)).into_response(),
        Err(_) => (StatusCode::SERVICE_UNAVAILABLE, "stopping\n").into_response(),
    }
}

fn probe(probe: &Probe) -> Response {
    match probe() {
        Ok(()) => "ok\n".into_response(),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")).into_response(),
    }
}

/// A listener with a limited number of connections that each live for a limited time.
struct Few {
    listener: TcpListener,
    places: Arc<Semaphore>,
    age_max: Duration,
}

impl axum::serve::Listener for Few {
    type Io = Connection;
    type Addr = std::net::SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (stream, peer) = axum::serve::Listener::accept(&mut self.listener).await;
        let connection = Connection {
            stream,
            end: Box::pin(tokio::time::sleep(self.age_max)),
            _place: place,
        };
        (connection, peer)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

struct Connection {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    /// Given back when the connection is dropped.
    _place: Option<OwnedSemaphorePermit>,
}

impl Connection {
    fn too_old(&mut self, cx: &mut Context<'_>) -> bool {
        self.end.as_mut().poll(cx).is_ready()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            Poll::Pending if self.too_old(cx) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            polled => polled,
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match Pin::new(&mut self.stream).poll_write(cx, buf) {
            Poll::Pending if self.too_old(cx) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            polled => polled,
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use serde_json::json;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn ask(address: std::net::SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// Each path answers over a real socket, the probes follow what they are told, and nothing can be written.
    #[tokio::test]
    async fn answers_over_a_socket() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let trouble: Arc<Mutex<Option<String>>> = Arc::default();
        let seen = Arc::clone(&trouble);
        let (reload, mut wishes) = mpsc::channel::<Reload>(1);
        tokio::spawn(async move {
            for answer in [Ok(json!({"applied": []})), Err(json!({"errors": ["x"]}))] {
                wishes.recv().await.unwrap().send(answer).unwrap();
            }
        });
        let admin = Admin {
            metrics: crate::metrics::install(["admin"]).unwrap(),
            healthy: Arc::new(|| Ok(())),
            ready: Arc::new(move || seen.lock().unwrap().clone().map_or(Ok(()), Err)),
            page: Arc::new(|| "<p>ship".to_owned()),
            status: Arc::new(|| json!({"site": "ship"})),
            reload,
        };
        let server = tokio::spawn(serve(listener, admin));

        let metrics = ask(address, "GET /metrics").await;
        assert!(metrics.starts_with("HTTP/1.1 200 OK\r\n"), "{metrics}");
        assert!(metrics.contains("content-type: text/plain; version=0.0.4"), "{metrics}");
        assert!(metrics.contains("narrows_link_up{peer=\"admin\"} 0"), "{metrics}");
        assert!(ask(address, "GET /healthz").await.ends_with("\r\n\r\nok\n"));
        let page = ask(address, "GET /").await;
        assert!(page.contains("content-security-policy: default-src 'none'"), "{page}");
        assert!(page.ends_with("\r\n\r\n<p>ship"), "{page}");
        assert!(ask(address, "GET /readyz").await.starts_with("HTTP/1.1 200 "));
        assert!(ask(address, "GET /status").await.ends_with("{\"site\":\"ship\"}"));

        *trouble.lock().unwrap() = Some("the legs do not listen yet".to_owned());
        let refused = ask(address, "GET /readyz").await;
        assert!(
            refused.starts_with("HTTP/1.1 503 ") && refused.ends_with("the legs do not listen yet\n"),
            "{refused}"
        );
        assert!(ask(address, "GET /healthz").await.starts_with("HTTP/1.1 200 "));

        assert!(ask(address, "GET /reload").await.starts_with("HTTP/1.1 405 "));
        assert!(ask(address, "POST /reload").await.ends_with("{\"applied\":[]}"));
        let refused = ask(address, "POST /reload").await;
        assert!(
            refused.starts_with("HTTP/1.1 422 ") && refused.ends_with("{\"errors\":[\"x\"]}"),
            "{refused}"
        );
        assert!(ask(address, "POST /reload").await.starts_with("HTTP/1.1 503 "));

        assert!(ask(address, "GET /other").await.starts_with("HTTP/1.1 404 "));
        assert!(ask(address, "POST /status").await.starts_with("HTTP/1.1 405 "));
        server.abort();
    }

    /// Clients that hang hold their places for a limited time: with all places taken, a later client is served after it.
    #[tokio::test]
    async fn hanging_clients_are_let_go() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let admin = Admin {
            metrics: crate::metrics::install(["admin"]).unwrap(),
            healthy: Arc::new(|| Ok(())),
            ready: Arc::new(|| Ok(())),
            page: Arc::new(|| "<p>ship".to_owned()),
            status: Arc::new(|| Value::Null),
            reload: mpsc::channel(1).0,
        };
        let server = tokio::spawn(serve_within(listener, admin, Duration::from_millis(200)));
        let mut hanging = Vec::new();
        for _ in 0..CONNECTIONS_MAX {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /status HT").await.unwrap();
            hanging.push(stream);
        }
        // Were they not let go, this would wait for ever.
        assert!(ask(address, "GET /healthz").await.ends_with("ok\n"));
        server.abort();
    }
}
