//! What a running sidecar says of itself, and `narrows status`, which asks for it.

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The body of `/status`. Keys are only added, so that a newer `narrows status` can ask an older process.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Status {
    pub site: String,
    pub version: String,
    pub uptime_seconds: f64,
    /// Empty if all is well; else what `/readyz` says.
    pub not_ready: Option<String>,
    pub peers: Vec<PeerStatus>,
    pub legs: Legs,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct PeerStatus {
    pub name: String,
    pub domains: Vec<String>,
    pub up: bool,
    /// How long the link has been up or down.
    pub since_seconds: f64,
    pub rtt_seconds: Option<f64>,
    /// Since the peer last acknowledged something new.
    pub acked_seconds: Option<f64>,
    /// How long what waits will take once the link is up, if that can be told.
    pub drain_seconds: Option<f64>,
    /// Why the link is down, as far as it is known.
    pub last_error: Option<String>,
    pub spool: QueueStatus,
    pub inbox: QueueStatus,
    pub sent: Traffic,
    pub received: Traffic,
    /// Copies of which nobody can tell whether the server got them.
    pub in_doubt: u64,
    pub rooms: RoomsStatus,
    /// The rooms that cost most, the dearest first.
    pub room_costs: Vec<RoomStatus>,
    pub saved: Saved,
    /// The last that is worth telling, the newest last.
    pub events: Vec<EventStatus>,
}

/// What a room has cost since the process started.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct RoomStatus {
    /// Its address, or a number where addresses are not to be seen (`admin.show`).
    pub room: String,
    /// Bytes of queue entries, before compression.
    pub sent_bytes: u64,
    pub received_bytes: u64,
    /// What plain S2S would have carried, in stanzas.
    pub copies: u64,
}

impl RoomStatus {
    pub fn bytes(&self) -> u64 {
        self.sent_bytes + self.received_bytes
    }
}

/// Bytes of plain S2S that this side did not send, by what saved them.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Saved {
    /// Answered near by.
    pub mirror: u64,
    /// Answered or dropped by configured rules.
    pub rules: u64,
    /// Copies that became one.
    pub collapse: u64,
    /// What gave way to something later while it waited, as it was stored.
    pub compaction: u64,
    pub compression: u64,
    /// A sample of plain S2S, and what a compressor with a memory makes of it.
    pub sampled: u64,
    pub sampled_compressed: u64,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct EventStatus {
    /// Seconds since 1970.
    pub at: f64,
    pub what: String,
}

#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct RoomsStatus {
    /// The peer's rooms that local users are in, and with how many sessions.
    pub mirrored: u64,
    pub sessions: u64,
    /// Of those rooms, the ones whose local users were told that the link is gone.
    pub split: u64,
    /// The peer's sessions in local rooms.
    pub guests: u64,
}

#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct QueueStatus {
    pub entries: u64,
    pub bytes: u64,
    /// Of the spool: entries by class; a class of which none waits is not here.
    pub classes: BTreeMap<String, u64>,
    /// Of the spool: about what plain S2S would send for them.
    pub stanza_bytes: u64,
    pub oldest_seconds: Option<f64>,
}

/// Since the process started.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Traffic {
    pub entries: u64,
    pub copies: u64,
    /// What plain S2S would have carried.
    pub stanza_bytes: u64,
    /// What TLS was given.
    pub payload_bytes: u64,
    /// What TCP carried.
    pub link_bytes: u64,
    /// What IP carried.
    pub ip_bytes: u64,
}

/// Streams with the local server that are open.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Serialize)]
#[serde(default)]
pub struct Legs {
    pub receiving: u64,
    pub initiating: u64,
}

/// An answer this long after the question is none.
const PATIENCE: Duration = Duration::from_secs(5);

/// A thousand peers fit.
const ANSWER_BYTES_MAX: u64 = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    #[error("nobody answers at {address}: {error}")]
    Unreachable { address: SocketAddr, error: io::Error },
    #[error("{address} is not the admin port of narrows: {why}")]
    Answer { address: SocketAddr, why: String },
}

/// Asks the sidecar at this admin port.
pub fn fetch(address: SocketAddr) -> Result<Value, StatusError> {
    ask(address, "GET", "/status")
}

/// The JSON that the sidecar at this admin port answers with.
pub(super) fn ask(address: SocketAddr, method: &str, path: &str) -> Result<Value, StatusError> {
    let unreachable = |error| StatusError::Unreachable { address, error };
    let answer = exchange(address, method, path).map_err(unreachable)?;
    let not_ours = |why: String| StatusError::Answer { address, why };
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| not_ours("it does not speak HTTP".to_owned()))?;
    let status_line = head.lines().next().unwrap_or_default();
    // 422: it was understood and refused, and the body says why.
    if !matches!(status_line.split(' ').nth(1), Some("200" | "422")) {
        return Err(not_ours(format!("it said {status_line:?}")));
    }
    serde_json::from_str(body).map_err(|error| not_ours(error.to_string()))
}

/// Understands an answer.
pub fn read(address: SocketAddr, answer: Value) -> Result<Status, StatusError> {
    serde_json::from_value(answer).map_err(|error| StatusError::Answer {
        address,
        why: error.to_string(),
    })
}

fn exchange(address: SocketAddr, method: &str, path: &str) -> io::Result<String> {
    let end = Instant::now() + PATIENCE;
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    // HTTP/1.0 is answered in one piece, up to the end of the connection.
    stream.write_all(format!("{method} {path} HTTP/1.0\r\nHost: {address}\r\nContent-Length: 0\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    let mut limited = stream.try_clone()?.take(ANSWER_BYTES_MAX);
    let mut piece = [0; 8192];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match limited.read(&mut piece) {
            Ok(0) => break,
            Ok(length) => answer.extend_from_slice(&piece[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    String::from_utf8(answer).map_err(|_| io::ErrorKind::InvalidData.into())
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "site {}, narrows {}, up for {}, streams with the server: {} in, {} out",
            self.site,
            self.version,
            period(self.uptime_seconds),
            self.legs.receiving,
            self.legs.initiating,
        )?;
        if let Some(why) = &self.not_ready {
            writeln!(f, "not ready: {why}")?;
        }
        let mut rows = vec![
            [
                "peer",
                "link",
                "for",
                "round trip",
                "to cross",
                "oldest",
                "to deliver",
                "through in",
                "sent",
                "received",
                "saved",
            ]
            .map(str::to_owned)
            .to_vec(),
        ];
        rows.extend(self.peers.iter().map(PeerStatus::row));
        f.write_str(&table(&rows))?;
        for peer in &self.peers {
            if let Some(error) = &peer.last_error {
                writeln!(f, "{}: {error}", peer.name)?;
            }
            if peer.rooms.split > 0 {
                let (split, all) = (peer.rooms.split, peer.rooms.mirrored);
                writeln!(
                    f,
                    "{}: the users of {split} of {all} rooms were told that the link is gone",
                    peer.name
                )?;
            }
            if peer.in_doubt > 0 {
                writeln!(f, "{}: {} copies in doubt", peer.name, peer.in_doubt)?;
            }
        }
        Ok(())
    }
}

impl Status {
    /// What happened, the newest first, with the peer's name.
    pub fn events(&self) -> Vec<(&str, &EventStatus)> {
        let mut all: Vec<(&str, &EventStatus)> = Vec::new();
        for peer in &self.peers {
            all.extend(peer.events.iter().rev().map(|event| (peer.name.as_str(), event)));
        }
        // Stable: what happened at the same moment stays in its order.
        all.sort_by(|(_, one), (_, other)| other.at.total_cmp(&one.at));
        all
    }
}

impl EventStatus {
    /// Day and minute, in UTC as in the log.
    pub fn clock(&self) -> String {
        match time::OffsetDateTime::from_unix_timestamp(self.at as i64) {
            Ok(at) => format!(
                "{:02}-{:02} {:02}:{:02}Z",
                u8::from(at.month()),
                at.day(),
                at.hour(),
                at.minute()
            ),
            Err(_) => "-".to_owned(),
        }
    }
}

impl PeerStatus {
    /// What plain S2S would have carried, both ways. What still waits is not saved yet, so it does not count.
    pub fn plain_bytes(&self) -> u64 {
        let sent = self.sent.stanza_bytes.saturating_sub(self.spool.stanza_bytes);
        sent.saturating_add(self.received.stanza_bytes)
    }

    /// What the link carried, both ways.
    pub fn ip_bytes(&self) -> u64 {
        self.sent.ip_bytes.saturating_add(self.received.ip_bytes)
    }

    /// The part of plain S2S's bytes that did not cross.
    pub fn saved(&self) -> Option<f64> {
        let plain = self.plain_bytes() as f64;
        (plain > 0.0).then(|| 1.0 - self.ip_bytes() as f64 / plain)
    }

    /// Of what this side sends, the same against plain S2S behind a compressor with a memory, as the sample has it. Both without what TLS,
    /// TCP and IP add: what a stream of many small segments would cost there is not measured.
    pub fn saved_of_compressed(&self) -> Option<f64> {
        let ratio = self.saved.sampled_compressed as f64 / self.saved.sampled as f64;
        let plain = self.sent.stanza_bytes.saturating_sub(self.spool.stanza_bytes);
        let compressed = plain as f64 * ratio;
        (compressed > 0.0).then(|| 1.0 - self.sent.payload_bytes as f64 / compressed)
    }

    fn row(&self) -> Vec<String> {
        let queue = |queue: &QueueStatus| match queue.entries {
            0 => "-".to_owned(),
            entries => format!("{entries} ({})", bytes(queue.bytes)),
        };
        vec![
            self.name.clone(),
            if self.up { "up" } else { "DOWN" }.to_owned(),
            period(self.since_seconds),
            self.rtt_seconds.map_or("-".to_owned(), period),
            queue(&self.spool),
            self.spool.oldest_seconds.map_or("-".to_owned(), period),
            queue(&self.inbox),
            self.drain_seconds
                .filter(|_| self.spool.entries > 0)
                .map_or("-".to_owned(), period),
            bytes(self.sent.ip_bytes),
            bytes(self.received.ip_bytes),
            part(self.saved()),
        ]
    }
}

/// In percent.
pub(super) fn part(part: Option<f64>) -> String {
    part.map_or("-".to_owned(), |part| format!("{:.1} %", 100.0 * part))
}

fn table(rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = Vec::new();
    for row in rows {
        widths.resize(widths.len().max(row.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// The two largest units: enough to judge by.
pub(super) fn period(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "-".to_owned();
    }
    let whole = seconds as u64;
    match whole {
        0 => format!("{:.0} ms", seconds * 1000.0),
        1..=9 => format!("{seconds:.1} s"),
        10..=59 => format!("{whole} s"),
        60..=3599 => format!("{} min {} s", whole / 60, whole % 60),
        3600..=86_399 => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
        86_400.. => format!("{} d {} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

pub(super) fn bytes(bytes: u64) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} B"),
        10_000..=9_999_999 => format!("{:.1} kB", bytes as f64 / 1e3),
        10_000_000..=9_999_999_999 => format!("{:.1} MB", bytes as f64 / 1e6),
        10_000_000_000.. => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    /// Answers one connection with `answer`.
    fn server(answer: &'static str) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let _ = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        address
    }

    /// An answer is read whole; what is not an answer is told from nobody being there.
    #[test]
    fn answers_are_told_from_other_things() {
        let ours = fetch(server(
            "HTTP/1.0 200 OK\r\ncontent-length: 15\r\n\r\n{\"site\":\"ship\"}",
        ))
        .unwrap();
        assert_eq!(ours["site"], "ship");
        for other in [
            "SSH-2.0-x\r\n",
            "HTTP/1.1 404 Not Found\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n<html>",
            "",
        ] {
            assert!(
                matches!(fetch(server(other)), Err(StatusError::Answer { .. })),
                "{other}"
            );
        }
        let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        assert!(matches!(fetch(closed), Err(StatusError::Unreachable { .. })));
    }

    /// The table says what an admin asks first: up or down, what waits, what was saved.
    #[test]
    fn table_is_for_people() {
        let status = Status {
            site: "ship".into(),
            version: "0.1.0".into(),
            uptime_seconds: 90_061.0,
            not_ready: None,
            legs: Legs {
                receiving: 4,
                initiating: 2,
            },
            peers: vec![
                PeerStatus {
                    name: "shore".into(),
                    up: true,
                    since_seconds: 75.0,
                    rtt_seconds: Some(0.612),
                    sent: Traffic {
                        ip_bytes: 12_000,
                        stanza_bytes: 900_000,
                        ..Traffic::default()
                    },
                    ..PeerStatus::default()
                },
                PeerStatus {
                    name: "island".into(),
                    since_seconds: 7_260.0,
                    last_error: Some("connection refused".into()),
                    spool: QueueStatus {
                        entries: 41,
                        bytes: 20_480,
                        stanza_bytes: 100_000,
                        oldest_seconds: Some(7_250.0),
                        ..QueueStatus::default()
                    },
                    in_doubt: 2,
                    sent: Traffic {
                        stanza_bytes: 100_000,
                        ..Traffic::default()
                    },
                    ..PeerStatus::default()
                },
            ],
        };
        let shown = status.to_string();
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(
            lines[0],
            "site ship, narrows 0.1.0, up for 1 d 1 h, streams with the server: 4 in, 2 out"
        );
        let words = |line: &str| {
            line.split("  ")
                .filter(|cell| !cell.is_empty())
                .map(|cell| cell.trim().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            words(lines[2]),
            [
                "shore",
                "up",
                "1 min 15 s",
                "612 ms",
                "-",
                "-",
                "-",
                "-",
                "12.0 kB",
                "0 B",
                "98.7 %"
            ]
        );
        assert_eq!(
            words(lines[3])[1..6],
            ["DOWN", "2 h 1 min", "-", "41 (20.5 kB)", "2 h 0 min"]
        );
        assert_eq!(lines[4..], ["island: connection refused", "island: 2 copies in doubt"]);
    }

    /// A status of another version is still understood.
    #[test]
    fn unknown_and_missing_keys_are_no_trouble() {
        let status: Status = serde_json::from_str("{\"site\":\"ship\",\"new\":1}").unwrap();
        assert_eq!(status.site, "ship");
    }
}
