//! What only the kernel knows about a connection, and the switches that make it fit a thin link.
//!
//! The only unsafe code of the crate: two calls that no library here wraps. Each hands the kernel a buffer of ours, of a
//! size that we state, for a descriptor that is borrowed and so open.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
    time::Duration,
};

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::link::window::Path;

/// Unsent bytes that the kernel may hold: below half of this it asks for more. One small segment and the record after it, so that
/// what is decided is decided late; the window of a fast link is filled by what is in flight, which this does not limit.
const NOTSENT_LOWAT: u32 = 2048;

/// A backstop: the session notices a dead peer long before.
const USER_TIMEOUT: Duration = Duration::from_secs(180);

pub fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_notsent_lowat(NOTSENT_LOWAT)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    // With little in flight retransmissions come at an even pace for a while before they back off: losses are the link's here,
    // not a queue's.
    socket.set_tcp_thin_linear_timeouts(true)
}

/// Asks the kernel to keep its own acknowledgements back for a moment, 40 ms or more: what we say meanwhile takes them along, and saves
/// 52 bytes. Left alone, it acknowledges at once what we have read. It forgets when a packet was lost, and when we said nothing in that
/// moment, so it is asked before every read.
pub fn delay_acks(stream: &TcpStream) {
    // Without it all works, and costs more.
    let _ = SockRef::from(stream).set_tcp_quickack(false);
}

/// From now on closing throws away what the kernel still holds, and resets: an old connection must not go on
/// retransmitting over the link what the new one carries.
pub fn forget_on_close(stream: &TcpStream) {
    // If it fails the connection is gone already.
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Whether little enough is unsent. Asking arms the kernel to tell when it is so; tokio's own note of the last event does not.
pub fn is_writable(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one valid pollfd, and the count says one.
    match unsafe { libc::poll(&raw mut poll, 1, 0) } {
        -1 => Err(io::Error::last_os_error()),
        // An error or a hang-up counts as writable: the write will say what it is.
        _ => Ok(poll.revents != 0),
    }
}

/// What the kernel measured on one connection (`TCP_INFO`). Bytes are TCP payload: records with TLS's share, without headers.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct TcpStats {
    pub rtt: Duration,
    /// The shortest of the last five minutes.
    pub rtt_min: Duration,
    pub retransmits: u32,
    /// First transmissions and repeats.
    pub bytes_sent: u64,
    pub bytes_retransmitted: u64,
    /// What the far kernel has confirmed: when it grows, the path works.
    pub bytes_acked: u64,
    pub bytes_received: u64,
    pub segments_sent: u32,
    pub segments_received: u32,
    /// Written, but not yet sent for the first time.
    pub unsent_bytes: u32,
    /// Sent, not confirmed.
    pub unacked_segments: u32,
    /// Bytes a second, as last measured. A time in which there was nothing to send counts only if it was better.
    pub delivered_per_second: u64,
}

/// TCP's header with time stamps, as Linux has them.
const TCP_HEADER: u64 = 32;

impl TcpStats {
    /// For who decides how much may follow.
    pub fn path(&self) -> Path {
        let sent = self.bytes_sent.saturating_sub(self.bytes_retransmitted);
        // The kernel counts the SYN, too.
        let acked = self.bytes_acked.saturating_sub(1);
        Path {
            rtt: self.rtt,
            rtt_min: self.rtt_min,
            on_its_way: sent.saturating_sub(acked) + u64::from(self.unsent_bytes),
        }
    }

    /// At IP level: sent, with repeats, and received. What is not TCP's (a SYN without an answer, a segment that came twice) is not seen.
    pub fn ip_bytes(&self, ip_header: u64) -> (u64, u64) {
        let headers = |segments: u32| (ip_header + TCP_HEADER) * u64::from(segments);
        (
            self.bytes_sent + headers(self.segments_sent),
            self.bytes_received + headers(self.segments_received),
        )
    }
}

/// The layout is the kernel's (`struct tcp_info`, only ever extended at its end). An older kernel fills less, the rest stays 0.
pub fn tcp_stats(stream: &TcpStream) -> io::Result<TcpStats> {
    let mut info = [0u8; 232];
    let mut len = info.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which is what `info` has.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    let small = |at: usize| u32::from_ne_bytes(std::array::from_fn(|byte| info[at + byte]));
    let large = |at: usize| u64::from_ne_bytes(std::array::from_fn(|byte| info[at + byte]));
    // The kernel counts segments here and takes all for full ones; ours are small, so it is put right by their size on average.
    let full = u64::from(small(156)) * u64::from(small(16));
    let delivered = u128::from(large(160)) * u128::from(large(200)) / u128::from(full.max(1));
    let delivered = u64::try_from(delivered).unwrap_or(u64::MAX);
    Ok(TcpStats {
        unacked_segments: small(24),
        rtt: Duration::from_micros(small(68).into()),
        rtt_min: Duration::from_micros(small(148).into()),
        retransmits: small(100),
        bytes_acked: large(120),
        bytes_received: large(128),
        segments_sent: small(136),
        segments_received: small(140),
        unsent_bytes: small(144),
        delivered_per_second: delivered,
        bytes_sent: large(200),
        bytes_retransmitted: large(208),
    })
}
