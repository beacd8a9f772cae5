//! One TCP connection with our server, with or without TLS: bytes in, bytes out, at the same time.
//!
//! [`Wire::next`] writes what waits and reads what came, fairly, and can be dropped at any point without losing a byte.
//! [`Wire::accepted`] counts what the kernel has taken, not what TLS has buffered: a stanza that has no acknowledgement of
//! its own (XEP-0198) counts as delivered from there on, so the two must not be mixed up.

use std::{
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf},
    net::{TcpSocket, TcpStream},
    time::timeout,
};
use tokio_rustls::TlsStream;

/// Bytes of one read: the largest TLS record holds as many (RFC 8446 §5.1).
const READ_BYTES: usize = 16 * 1024;

/// Bytes written before they are flushed to the kernel: one TLS record.
const WRITE_BYTES: usize = 16 * 1024;

/// The kernel's send buffer towards our server. What is in it when a server dies is lost in silence, so it is
/// small; on a LAN with 1 ms round trip it still carries 64 MB/s.
const SEND_BUFFER_BYTES: usize = 64 * 1024;

/// How much of the send buffer may be unsent before a write has to wait.
const UNSENT_BYTES: u32 = 16 * 1024;

/// A server that takes nothing for so long is held to be gone. Prosody, reading at its own 30 kB/s, opens its window many
/// times a minute.
const USER_TIMEOUT: Duration = Duration::from_secs(120);

/// An idle connection is probed, so that a server whose machine vanished is noticed without traffic.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(20);

/// How long a closing connection may take to get its last bytes out and to see the other side's end.
const CLOSE_MAX: Duration = Duration::from_secs(5);

/// What a closing connection still reads and throws away, at most: closing a socket with unread bytes resets the
/// connection, and the reset can overtake the stream error that we sent (RFC 1122 §4.2.2.13).
const LINGER_BYTES_MAX: usize = 1024 * 1024;

#[derive(Debug)]
pub struct Wire {
    transport: Transport,
    outgoing: BytesMut,
    /// Given to the transport, but not flushed yet.
    unflushed: usize,
    accepted: u64,
    incoming: BytesMut,
    /// Reading has its turn first. Alternates, so that neither direction starves the other.
    read_first: bool,
    /// Writing is over, but what the server sent before it went (acknowledgements, a stream error) is read first. A write
    /// fails only on a connection that is over in both directions, so reading comes to an end as well.
    write_error: Option<io::Error>,
}

#[derive(Debug)]
enum Transport {
    Plain(TcpStream),
    Secured(Box<TlsStream<TcpStream>>),
    /// While a handshake has it, or after one failed.
    Away,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum WireEvent {
    Bytes(Bytes),
    /// The other side has closed its direction.
    Eof,
    /// [`Wire::accepted`] has grown, or will not grow any more.
    Flushed,
}

/// Makes a TCP connection to a server, with the options that all our connections have.
pub async fn connect(address: SocketAddr, timeout_after: Duration) -> io::Result<TcpStream> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    let tcp = timeout(timeout_after, socket.connect(address))
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    configure(&tcp)?;
    Ok(tcp)
}

/// Sets the socket options that all our connections with servers have.
pub fn configure(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let socket = SockRef::from(tcp);
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.set_tcp_notsent_lowat(UNSENT_BYTES)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_AFTER)
            .with_interval(KEEPALIVE_EVERY),
    )
}

impl Wire {
    pub fn plain(tcp: TcpStream) -> Self {
        Self::over(Transport::Plain(tcp))
    }

    pub fn secured(tls: TlsStream<TcpStream>) -> Self {
        Self::over(Transport::Secured(Box::new(tls)))
    }

    fn over(transport: Transport) -> Self {
        Self {
            transport,
            outgoing: BytesMut::new(),
            unflushed: 0,
            accepted: 0,
            incoming: BytesMut::new(),
            read_first: true,
            write_error: None,
        }
    }

    /// Puts bytes behind those that wait already. [`next`](Self::next) writes them.
    pub fn send(&mut self, bytes: &[u8]) {
        if self.write_error.is_none() {
            // A copy, so that the copies of a broadcast fill TLS records instead of having one each.
            self.outgoing.extend_from_slice(bytes);
        }
    }

    /// Bytes that the kernel has not taken yet.
    pub fn waiting(&self) -> usize {
        self.outgoing.len() + self.unflushed
    }

    /// Bytes that the kernel has taken, since the beginning, before and under TLS.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Waits until something has happened. With `read` false the other side has to wait, too: nothing is read.
    pub async fn next(&mut self, read: bool) -> io::Result<WireEvent> {
        std::future::poll_fn(|cx| self.poll_next(cx, read)).await
    }

    /// Writes all that waits. Reads nothing meanwhile: only for the moment before TLS begins, when the other side is silent.
    pub async fn flush(&mut self) -> io::Result<()> {
        std::future::poll_fn(|cx| self.poll_flush_all(cx)).await
    }

    /// Takes the TCP connection out, so that a handshake can be made on it; [`put_back`](Self::put_back) ends that.
    pub fn take_plain(&mut self) -> io::Result<TcpStream> {
        match std::mem::replace(&mut self.transport, Transport::Away) {
            Transport::Plain(tcp) => Ok(tcp),
            transport @ (Transport::Secured(_) | Transport::Away) => {
                self.transport = transport;
                Err(io::Error::other("TLS within TLS"))
            }
        }
    }

    pub fn put_back(&mut self, tls: TlsStream<TcpStream>) {
        self.transport = Transport::Secured(Box::new(tls));
    }

    /// Sends the last bytes and ends the connection, within [`CLOSE_MAX`].
    pub async fn close(mut self) {
        let ended = timeout(CLOSE_MAX, async {
            self.flush().await?;
            match &mut self.transport {
                Transport::Plain(tcp) => tcp.shutdown().await?,
                Transport::Secured(tls) => tls.shutdown().await?,
                Transport::Away => return Ok(()),
            }
            let mut thrown_away = 0;
            while thrown_away < LINGER_BYTES_MAX {
                match self.next(true).await? {
                    WireEvent::Bytes(bytes) => thrown_away += bytes.len(),
                    WireEvent::Eof => break,
                    WireEvent::Flushed => (),
                }
            }
            io::Result::Ok(())
        });
        // The stream was over before: whatever goes wrong now changes nothing.
        let _ = ended.await;
    }

    fn poll_next(&mut self, cx: &mut Context<'_>, read: bool) -> Poll<io::Result<WireEvent>> {
        if read
            && self.read_first
            && let Poll::Ready(event) = self.poll_read(cx)
        {
            self.read_first = false;
            return Poll::Ready(event);
        }
        if self.poll_written(cx) {
            self.read_first = true;
            return Poll::Ready(Ok(WireEvent::Flushed));
        }
        if read && !self.read_first {
            if let Poll::Ready(event) = self.poll_read(cx) {
                return Poll::Ready(event);
            }
            self.read_first = true;
        }
        Poll::Pending
    }

    /// Whether there is news: the kernel took something, or takes nothing any more.
    fn poll_written(&mut self, cx: &mut Context<'_>) -> bool {
        if self.write_error.is_some() {
            return false;
        }
        let accepted = self.accepted;
        match self.poll_flush_all(cx) {
            Poll::Ready(Err(error)) => {
                self.outgoing.clear();
                self.unflushed = 0;
                self.write_error = Some(error);
                true
            }
            Poll::Ready(Ok(())) | Poll::Pending => self.accepted > accepted,
        }
    }

    fn poll_flush_all(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.unflushed > 0 {
                ready!(Pin::new(&mut self.transport).poll_flush(cx))?;
                self.accepted += self.unflushed as u64;
                self.unflushed = 0;
            }
            if self.outgoing.is_empty() {
                // TLS may have something of its own to say.
                return Pin::new(&mut self.transport).poll_flush(cx);
            }
            let piece = self.outgoing.len().min(WRITE_BYTES);
            let taken = ready!(Pin::new(&mut self.transport).poll_write(cx, &self.outgoing[..piece]))?;
            if taken == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.outgoing.advance(taken);
            self.unflushed = taken;
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<WireEvent>> {
        self.incoming.reserve(READ_BYTES);
        let mut space = [const { std::mem::MaybeUninit::uninit() }; READ_BYTES];
        let mut buffer = ReadBuf::uninit(&mut space);
        let read = ready!(Pin::new(&mut self.transport).poll_read(cx, &mut buffer));
        if buffer.filled().is_empty()
            && let Some(error) = self.write_error.take()
        {
            return Poll::Ready(Err(error));
        }
        match read {
            Ok(()) if buffer.filled().is_empty() => Poll::Ready(Ok(WireEvent::Eof)),
            Ok(()) => {
                self.incoming.extend_from_slice(buffer.filled());
                Poll::Ready(Ok(WireEvent::Bytes(self.incoming.split().freeze())))
            }
            // Both servers close without TLS's close_notify. The stream's own end is `</stream:stream>`, so nothing can be cut
            // off unnoticed.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Poll::Ready(Ok(WireEvent::Eof)),
            Err(error) => Poll::Ready(Err(error)),
        }
    }
}

impl AsyncRead for Transport {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, buf),
            Self::Secured(tls) => Pin::new(tls).poll_read(cx, buf),
            Self::Away => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

impl AsyncWrite for Transport {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Self::Secured(tls) => Pin::new(tls).poll_write(cx, bytes),
            Self::Away => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_flush(cx),
            Self::Secured(tls) => Pin::new(tls).poll_flush(cx),
            Self::Away => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Self::Secured(tls) => Pin::new(tls).poll_shutdown(cx),
            Self::Away => Poll::Ready(Ok(())),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    use super::*;

    async fn pair() -> (Wire, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(connect(address, CLOSE_MAX), listener.accept());
        (Wire::plain(near.unwrap()), far.unwrap().0)
    }

    /// Only what the kernel took counts as accepted: with a server that does not read, the count stays behind.
    #[tokio::test]
    async fn counts_what_the_kernel_took() {
        let (mut wire, mut far) = pair().await;
        let all = 64 * 1024 * 1024;
        wire.send(&vec![b'x'; all]);
        let mut taken = 0;
        loop {
            match timeout(Duration::from_millis(300), wire.next(true)).await {
                Ok(event) => assert_eq!(event.unwrap(), WireEvent::Flushed),
                Err(_) => break,
            }
            taken = wire.accepted();
        }
        assert!(taken > 0 && taken < all as u64, "{taken}");
        assert_eq!(taken + wire.waiting() as u64, all as u64);

        let reader = tokio::spawn(async move {
            let mut rest = Vec::new();
            far.read_to_end(&mut rest).await.unwrap();
            rest.len()
        });
        wire.flush().await.unwrap();
        assert_eq!((wire.accepted(), wire.waiting()), (all as u64, 0));
        wire.close().await;
        assert_eq!(reader.await.unwrap(), all);
    }

    /// What a server said before it reset the connection is read, although writing fails already.
    #[tokio::test]
    async fn hears_the_last_words_of_a_broken_connection() {
        let (mut wire, mut far) = pair().await;
        far.write_all(b"last words").await.unwrap();
        wire.send(b"unread, so that the close is a reset");
        wire.flush().await.unwrap();
        SockRef::from(&far).set_linger(Some(Duration::ZERO)).unwrap();
        drop(far);
        // Until the reset is here, writes succeed.
        let mut heard = Vec::new();
        loop {
            wire.send(b"more");
            match wire.next(true).await {
                Ok(WireEvent::Bytes(bytes)) => heard.extend_from_slice(&bytes),
                Ok(WireEvent::Flushed) => (),
                Ok(WireEvent::Eof) | Err(_) => break,
            }
        }
        assert_eq!(heard, b"last words");
    }

    /// With reading held back nothing is read, and nothing of it is lost.
    #[tokio::test]
    async fn reads_only_when_asked() {
        let (mut wire, mut far) = pair().await;
        far.write_all(b"later").await.unwrap();
        assert!(timeout(Duration::from_millis(50), wire.next(false)).await.is_err());
        assert_eq!(
            wire.next(true).await.unwrap(),
            WireEvent::Bytes(Bytes::from_static(b"later"))
        );
        drop(far);
        assert_eq!(wire.next(true).await.unwrap(), WireEvent::Eof);
    }
}
