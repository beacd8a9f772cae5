//! The admin port: metrics, health, status and a page over plain HTTP.
//!
//! It has no password, so by default it is only on the loopback address. What it says holds users' addresses only where the
//! configuration allows it (`admin.show`), and
//! nothing can be changed through it but that the configuration file is read again. A client that hangs holds one of a few places for a minute and no more.

use std::{
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    body::Body,
    extract::{ConnectInfo, RawQuery, State, connect_info::Connected},
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
    serve::IncomingStream,
};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    time::Sleep,
};

use super::trace::{Filter, Show, Taps};
use crate::{
    metrics::{ADMIN_REQUESTS, AdminPath, Rendered},
    queue::{class::Class, rules::Direction},
};

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
    /// `/trace`: where one may watch, and how much of users may be seen there.
    pub taps: Taps,
    pub show: Show,
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
        result = axum::serve(listener, router(admin).into_make_service_with_connect_info::<Patience>()) => result,
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
        .route("/trace", get(trace))
        .route("/reload", post(reload))
        .fallback(async || {
            ADMIN_REQUESTS.increment(AdminPath::Other);
            let paths = "there are /, /metrics, /healthz, /readyz, /status, /trace and, to be posted to, /reload\n";
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

/// What is asked of `/trace`, or what is wrong with the question.
fn read_question(query: &str) -> Result<(Filter, Show), String> {
    let (mut filter, mut show) = (Filter::default(), Show::Nothing);
    for (key, value) in query.split('&').filter_map(|part| part.split_once('=')) {
        let value = unescaped(value).ok_or_else(|| format!("{key} is not UTF-8"))?;
        match (key, value.as_str()) {
            ("peer", _) => filter.peer = Some(value),
            ("room", _) => filter.room = Some(value),
            ("class", word) => {
                let class = Class::ALL.into_iter().find(|class| class.as_label() == word);
                filter.class = Some(class.ok_or_else(|| format!("there is no class {word:?}"))?);
            }
            ("direction", "sent") => filter.direction = Some(Direction::Sent),
            ("direction", "received") => filter.direction = Some(Direction::Received),
            ("show", "addresses") => show = Show::Addresses,
            ("show", "bodies") => show = Show::Bodies,
            (key, value) => return Err(format!("{key}={value:?} is not known")),
        }
    }
    Ok((filter, show))
}

/// Takes `%40` for `@` ([RFC 3986 §2.1](https://www.rfc-editor.org/rfc/rfc3986#section-2.1)).
fn unescaped(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let escaped = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let escaped = escaped.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match escaped.filter(|_| first == b'%') {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

async fn trace(
    State(admin): State<Admin>,
    ConnectInfo(patience): ConnectInfo<Patience>,
    RawQuery(query): RawQuery,
) -> Response {
    ADMIN_REQUESTS.increment(AdminPath::Trace);
    let (filter, show) = match read_question(&query.unwrap_or_default()) {
        Ok(read) => read,
        Err(why) => return (StatusCode::BAD_REQUEST, format!("{why}\n")).into_response(),
    };
    if show > admin.show {
        let why = "the configuration does not allow to show this: see admin.show\n";
        return (StatusCode::FORBIDDEN, why).into_response();
    }
    let Some(lines) = admin.taps.tap(filter, show) else {
        return (StatusCode::SERVICE_UNAVAILABLE, "too many watch already\n").into_response();
    };
    // It lasts as long as somebody reads.
    patience.0.store(true, Ordering::Relaxed);
    let headers = [
        (header::CONTENT_TYPE, "application/x-ndjson"),
        (header::CACHE_CONTROL, "no-store"),
    ];
    (headers, Body::from_stream(lines)).into_response()
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
            patience: Patience::default(),
            _place: place,
        };
        (connection, peer)
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// Whether a connection may grow old.
#[derive(Clone, Debug, Default)]
struct Patience(Arc<AtomicBool>);

impl Connected<IncomingStream<'_, Few>> for Patience {
    fn connect_info(stream: IncomingStream<'_, Few>) -> Self {
        stream.io().patience.clone()
    }
}

struct Connection {
    stream: TcpStream,
    end: Pin<Box<Sleep>>,
    patience: Patience,
    /// Given back when the connection is dropped.
    _place: Option<OwnedSemaphorePermit>,
}

impl Connection {
    fn too_old(&mut self, cx: &mut Context<'_>) -> bool {
        !self.patience.0.load(Ordering::Relaxed) && self.end.as_mut().poll(cx).is_ready()
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
        let taps = Taps::default();
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
            taps: taps.clone(),
            show: Show::Addresses,
        };
        let server = tokio::spawn(serve_within(listener, admin, Duration::from_secs(5)));

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

        assert!(
            ask(address, "GET /trace?show=bodies")
                .await
                .starts_with("HTTP/1.1 403 ")
        );
        assert!(ask(address, "GET /trace?class=none").await.starts_with("HTTP/1.1 400 "));
        assert!(ask(address, "GET /trace?rooms=x").await.starts_with("HTTP/1.1 400 "));
        // One lasts as long as somebody reads, and goes with them.
        let watchers = taps.watchers();
        let mut watcher = TcpStream::connect(address).await.unwrap();
        let question = b"GET /trace?show=addresses&class=iq HTTP/1.0\r\n\r\n";
        watcher.write_all(question).await.unwrap();
        let mut begin = [0; 12];
        watcher.read_exact(&mut begin).await.unwrap();
        assert_eq!(&begin, b"HTTP/1.0 200");
        assert!(watchers.any());
        drop(watcher);
        while watchers.any() {
            tokio::task::yield_now().await;
        }
        assert!(ask(address, "GET /trace?room=%ff").await.starts_with("HTTP/1.1 400 "));
        assert_eq!(unescaped("a%40b%2").as_deref(), Some("a@b%2"));
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
            taps: Taps::default(),
            show: Show::Nothing,
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
