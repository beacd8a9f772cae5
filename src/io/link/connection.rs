//! An authenticated pipe of bytes to a peer, in two halves.
//!
//! The halves are made for one `select!` loop: [`LinkReader::read`] and [`LinkWriter::ready`] may be dropped at any await
//! and called again. A batch is asked for only when `ready` has returned, and `ready` returns only when the one before is
//! with the kernel and the kernel has sent nearly all it holds, and the path has room for it ([`Window`]): so what goes next is decided as
//! late as can be.

use std::{
    io,
    os::fd::AsFd,
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf, ReadHalf, WriteHalf},
    net::TcpStream,
    time,
};
use tokio_rustls::{TlsStream, rustls};

use crate::{
    io::{
        clock::Clock,
        keys::PublicKey,
        link::kernel::{self, TcpStats},
    },
    link::window::Window,
};

/// Between two looks at what is confirmed.
const ASK_MIN: Duration = Duration::from_millis(1);
const ASK_MAX: Duration = Duration::from_millis(40);
/// What one read takes at most: one TLS record.
const READ_BYTES_MAX: usize = 16 * 1024;

/// Who is at the other end, and how the connection came about.
#[derive(Clone, Debug)]
pub struct LinkInfo {
    pub peer: PublicKey,
    pub address: std::net::SocketAddr,
    /// Whether we dialled it.
    pub dialled: bool,
    /// Whether the end that dialled has the smaller key, which decides when both dial at once.
    pub dialled_by_smaller: bool,
    pub up_since: Instant,
}

#[derive(Debug)]
pub struct LinkConnection {
    pub info: LinkInfo,
    pub reader: LinkReader,
    pub writer: LinkWriter,
}

impl LinkConnection {
    pub(super) fn new(info: LinkInfo, stream: TlsStream<SharedTcp>) -> Self {
        let tcp = stream.get_ref().0.0.clone();
        let (read, write) = tokio::io::split(stream);
        let reader = LinkReader {
            half: read,
            tcp: tcp.clone(),
            buffer: BytesMut::new(),
            dialled: info.dialled,
            heard: false,
        };
        let writer = LinkWriter {
            half: write,
            tcp,
            pending: Bytes::new(),
            busy: false,
            closed: false,
            window: Window::default(),
            clock: Clock::start(),
        };
        Self { info, reader, writer }
    }
}

#[derive(Debug)]
pub struct LinkReader {
    half: ReadHalf<TlsStream<SharedTcp>>,
    tcp: Arc<TcpStream>,
    buffer: BytesMut,
    dialled: bool,
    heard: bool,
}

impl LinkReader {
    /// The next bytes, or `None` when the peer has closed in good order. Safe to cancel.
    ///
    /// In TLS 1.3 the listening end refuses a key only after the dialling end believes to be through: the refusal comes here, as
    /// `PermissionDenied` (RFC 8446 §4.4.2.4).
    pub async fn read(&mut self) -> io::Result<Option<Bytes>> {
        kernel::delay_acks(&self.tcp);
        self.buffer.reserve(READ_BYTES_MAX);
        let limit = READ_BYTES_MAX as u64;
        let count = (&mut self.half)
            .take(limit)
            .read_buf(&mut self.buffer)
            .await
            .map_err(|error| self.explain(error))?;
        self.heard |= count > 0;
        Ok((count > 0).then(|| self.buffer.split().freeze()))
    }

    fn explain(&self, error: io::Error) -> io::Error {
        let alert = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        match alert {
            Some(rustls::Error::AlertReceived(alert)) if self.dialled && !self.heard => io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("the peer refuses our key ({alert:?}): is it in the peer's configuration?"),
            ),
            Some(_) | None => error,
        }
    }
}

#[derive(Debug)]
pub struct LinkWriter {
    half: WriteHalf<TlsStream<SharedTcp>>,
    tcp: Arc<TcpStream>,
    pending: Bytes,
    /// Something may still be in TLS's buffer.
    busy: bool,
    closed: bool,
    window: Window,
    clock: Clock,
}

impl LinkWriter {
    /// Gives what was started to the kernel, then waits until the kernel wants more and the path has room: for so many bytes. Safe to cancel
    /// and to call again; while [`LinkWriter::is_busy`] it must be called, or what was started stays here.
    pub async fn ready(&mut self) -> io::Result<usize> {
        self.flush().await?;
        self.writable().await?;
        loop {
            let path = self.stats()?.path();
            if let Some(room) = self.window.room(path, self.clock.now()) {
                return Ok(usize::try_from(room).unwrap_or(usize::MAX));
            }
            // Nobody tells when something is confirmed.
            time::sleep((path.rtt / 16).clamp(ASK_MIN, ASK_MAX)).await;
        }
    }

    /// Waits until the kernel wants more.
    async fn writable(&self) -> io::Result<()> {
        loop {
            self.tcp.writable().await?;
            let asked = self
                .tcp
                .try_io(Interest::WRITABLE, || match kernel::is_writable(self.tcp.as_fd())? {
                    true => Ok(()),
                    // Makes tokio wait for the kernel's next word, which `is_writable` has asked for.
                    false => Err(io::ErrorKind::WouldBlock.into()),
                });
            match asked {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return result,
            }
        }
    }

    /// Starts to send a batch. To be called after [`LinkWriter::ready`] has returned, once each.
    pub fn start(&mut self, batch: Bytes) {
        assert!(
            !self.busy,
            "a batch was started before the last one was with the kernel"
        );
        self.busy = !batch.is_empty();
        self.pending = batch;
    }

    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Ends our side: what was started is sent, then TLS and TCP say that nothing follows. The caller bounds the time.
    pub async fn shutdown(&mut self) -> io::Result<()> {
        self.flush().await?;
        self.half.shutdown().await?;
        self.closed = true;
        Ok(())
    }

    pub fn stats(&self) -> io::Result<TcpStats> {
        kernel::tcp_stats(&self.tcp)
    }

    /// For who watches from elsewhere; it does not keep the connection open.
    pub fn stats_handle(&self) -> StatsHandle {
        StatsHandle(Arc::downgrade(&self.tcp))
    }

    async fn flush(&mut self) -> io::Result<()> {
        while self.pending.has_remaining() {
            let count = self.half.write(&self.pending).await?;
            if count == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            self.pending.advance(count);
        }
        if self.busy {
            self.half.flush().await?;
            self.busy = false;
        }
        Ok(())
    }
}

impl Drop for LinkWriter {
    fn drop(&mut self) {
        if !self.closed {
            kernel::forget_on_close(&self.tcp);
        }
    }
}

#[derive(Clone, Debug)]
pub struct StatsHandle(Weak<TcpStream>);

impl StatsHandle {
    /// `None` once the connection is gone.
    pub fn stats(&self) -> Option<TcpStats> {
        self.0.upgrade().and_then(|tcp| kernel::tcp_stats(&tcp).ok())
    }
}

/// A socket that TLS reads and writes while we ask the kernel about it.
#[derive(Clone, Debug)]
pub(super) struct SharedTcp(pub Arc<TcpStream>);

impl AsyncRead for SharedTcp {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buf.initialize_unfilled()) {
                Ok(count) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for SharedTcp {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(buf) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(socket2::SockRef::from(&*self.0).shutdown(std::net::Shutdown::Write))
    }
}
