//! `narrows trace`: what a running sidecar does with each stanza, as it does it.

use std::{
    io::{self, BufRead, BufReader, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use clap::Args;
use serde::Deserialize;

/// Which stanzas, and how much of them.
#[derive(Debug, Args)]
pub struct Wanted {
    /// Only of this peer
    #[arg(long, value_name = "NAME")]
    peer: Option<String>,
    /// Only to and from this room, or whoever else has this bare address
    #[arg(long, value_name = "ADDRESS")]
    room: Option<String>,
    /// Only of this class: urgent, message, iq, presence, state or bulk
    #[arg(long, value_name = "CLASS")]
    class: Option<String>,
    /// Only what is sent to the peer, or received from it: sent or received
    #[arg(long, value_name = "DIRECTION")]
    direction: Option<String>,
    /// Show addresses, where `admin.show` allows it
    #[arg(long)]
    addresses: bool,
    /// Show stanzas whole, where `admin.show` allows it
    #[arg(long)]
    bodies: bool,
    /// A JSON object a line, for machines
    #[arg(long)]
    json: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    #[error("nobody answers: {0}")]
    Unreachable(io::Error),
    /// What the sidecar says.
    #[error("{0}")]
    Refused(String),
    #[error("the connection to the sidecar broke: {0}")]
    Broke(io::Error),
    #[error("standard output: {0}")]
    Output(io::Error),
}

/// An answer this long after the question is none. Afterwards nothing need happen for hours.
const PATIENCE: Duration = Duration::from_secs(5);

/// Head and pieces of the answer: lines of HTTP are short, and a stanza is shown up to 4 KiB.
const LINE_BYTES_MAX: u64 = 1 << 20;

impl Wanted {
    fn query(&self) -> String {
        let mut parts = Vec::new();
        for (key, value) in [
            ("peer", &self.peer),
            ("room", &self.room),
            ("class", &self.class),
            ("direction", &self.direction),
        ] {
            parts.extend(value.as_ref().map(|value| format!("{key}={}", escaped(value))));
        }
        match (self.addresses, self.bodies) {
            (_, true) => parts.push("show=bodies".to_owned()),
            (true, false) => parts.push("show=addresses".to_owned()),
            (false, false) => {}
        }
        parts.join("&")
    }
}

fn escaped(text: &str) -> String {
    let escape = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' => char::from(byte).to_string(),
        _ => format!("%{byte:02x}"),
    };
    text.bytes().map(escape).collect()
}

/// Prints until the sidecar ends, or whoever reads has gone.
pub fn run(address: SocketAddr, wanted: &Wanted) -> Result<(), TraceError> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE).map_err(TraceError::Unreachable)?;
    let ask = |stream: &mut TcpStream| {
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        // HTTP/1.0: the answer comes as it is, and lasts until the connection ends.
        write!(
            stream,
            "GET /trace?{} HTTP/1.0\r\nHost: {address}\r\n\r\n",
            wanted.query()
        )
    };
    ask(&mut stream).map_err(TraceError::Unreachable)?;
    let mut answer = BufReader::new(stream);
    let mut head = Vec::new();
    loop {
        let line = read_line(&mut answer).map_err(TraceError::Unreachable)?;
        if line.trim().is_empty() {
            break;
        }
        head.push(line);
    }
    let status = head.first().map_or("", |line| line.trim());
    if status.split(' ').nth(1) != Some("200") {
        let why = read_line(&mut answer).unwrap_or_default();
        return Err(TraceError::Refused(format!("{status}: {}", why.trim())));
    }
    answer.get_ref().set_read_timeout(None).map_err(TraceError::Broke)?;
    let mut out = io::stdout().lock();
    loop {
        let line = read_line(&mut answer).map_err(TraceError::Broke)?;
        if line.is_empty() {
            return Ok(());
        }
        let text = if wanted.json { line } else { readable(&line) };
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(TraceError::Output(error)),
        }
    }
}

fn read_line(from: &mut impl BufRead) -> io::Result<String> {
    let mut line = String::new();
    io::Read::take(from, LINE_BYTES_MAX).read_line(&mut line)?;
    Ok(line)
}

/// What the sidecar says of one decision.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Line {
    at: f64,
    peer: String,
    direction: String,
    decision: String,
    why: String,
    entry: Option<String>,
    class: Option<String>,
    kind: Option<String>,
    r#type: Option<String>,
    bytes: Option<u64>,
    from: Option<String>,
    to: Option<String>,
    stanza: Option<String>,
    missed: Option<u64>,
}

/// For people: when, which way, what, and why.
fn readable(json: &str) -> String {
    let Ok(line) = serde_json::from_str::<Line>(json) else {
        return format!("{}\n", safe(json.trim_end()));
    };
    if let Some(missed) = line.missed {
        return format!("-- {missed} missed: this reads too slowly --\n");
    }
    let arrow = match line.direction.as_str() {
        "sent" => format!("to {}", line.peer),
        _ => format!("from {}", line.peer),
    };
    let what = match (&line.kind, &line.r#type) {
        (Some(kind), Some(stanza_type)) => format!("{kind}/{stanza_type}"),
        (Some(kind), None) => kind.clone(),
        (None, _) => "stanza".to_owned(),
    };
    let mut text = format!(
        "{} {arrow:<12} {:<9} {what:<20} {}",
        clock(line.at),
        line.decision,
        line.entry.as_deref().unwrap_or("-")
    );
    text += &format!("  {}", line.why);
    if let Some(class) = &line.class {
        text += &format!("; class {class}");
    }
    if let Some(bytes) = line.bytes {
        text += &format!("; {bytes} B");
    }
    if let (Some(from), Some(to)) = (&line.from, &line.to) {
        text += &format!("; {from} > {to}");
    }
    if let Some(stanza) = &line.stanza {
        text += &format!("; {stanza}");
    }
    format!("{}\n", safe(&text))
}

/// Hours to milliseconds, in UTC as in the log.
fn clock(at: f64) -> String {
    let millis = (at * 1000.0).round() as u64 % 86_400_000;
    let (seconds, millis) = (millis / 1000, millis % 1000);
    format!(
        "{:02}:{:02}:{:02}.{millis:03}Z",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60
    )
}

/// Control characters could drive a terminal.
fn safe(text: &str) -> String {
    let safe = |c: char| if c.is_control() { '\u{fffd}' } else { c };
    text.chars().map(safe).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One line a decision, with what there is of it; nothing in it drives a terminal.
    #[test]
    fn lines_are_for_people() {
        let json = r#"{"at":1700000000.25,"peer":"shore","direction":"sent","decision":"collapsed","why":"copy 3 of the entry",
            "entry":"ship-1a2b/7","class":"message","kind":"message","type":"groupchat","bytes":312,"from":"a\u001b[2J","to":"<9 bytes hidden>"}"#;
        assert_eq!(
            readable(json),
            "22:13:20.250Z to shore     collapsed message/groupchat    ship-1a2b/7  copy 3 of the entry; class message; 312 B; \
             a\u{fffd}[2J > <9 bytes hidden>\n"
        );
        assert_eq!(readable("{\"missed\":7}\n"), "-- 7 missed: this reads too slowly --\n");
    }

    /// Whatever an address holds, it is one value of the question.
    #[test]
    fn questions_are_escaped() {
        let wanted = Wanted {
            peer: None,
            room: Some("a&b=%@c".to_owned()),
            class: Some("iq".to_owned()),
            direction: None,
            addresses: true,
            bodies: false,
            json: false,
        };
        assert_eq!(wanted.query(), "room=a%26b%3d%25%40c&class=iq&show=addresses");
    }
}
