//! What is said: lines of a recorded conversation if there is one, else lines made up here.

use std::fmt::Write;
use std::io;
use std::process::Command;

use narrows_lab::scenario::Dice;

/// Names a file of JSON lines, plain or gzip, each with `room`, `nick`, `offset_s` and `body`.
pub const CORPUS: &str = "NARROWS_CORPUS";

/// A line of a conversation.
#[derive(Clone, Debug)]
pub struct Line {
    pub nick: String,
    pub body: String,
}

/// Lines in the order in which they were said, and where they are from.
pub struct Lines {
    pub lines: Vec<Line>,
    pub source: String,
}

impl Lines {
    /// The corpus if the environment names one, else lines made up here.
    pub fn find() -> io::Result<Self> {
        match std::env::var(CORPUS) {
            Ok(path) if !path.is_empty() => Self::read(&path),
            Ok(_) | Err(_) => Ok(Self {
                lines: made_up(20_000),
                source: format!("lines made up by the benchmark (real ones are read from `{CORPUS}`)"),
            }),
        }
    }

    fn read(path: &str) -> io::Result<Self> {
        // `gzip -f` passes on what is not compressed.
        let output = Command::new("gzip").args(["-dcf", "--", path]).output()?;
        if !output.status.success() {
            return Err(io::Error::other(format!(
                "{path}: {}",
                String::from_utf8_lossy(&output.stderr)
            )));
        }
        let mut lines = Vec::new();
        let mut room = None;
        for text in output
            .stdout
            .split(|byte| *byte == b'\n')
            .filter(|text| !text.is_empty())
        {
            let value: serde_json::Value = serde_json::from_slice(text)?;
            let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
            // One conversation: that of the first room.
            let of = room.get_or_insert_with(|| text("room"));
            if *of == text("room") {
                lines.push(Line {
                    nick: text("nick"),
                    body: text("body"),
                });
            }
        }
        if lines.is_empty() {
            return Err(io::Error::other(format!("{path} has no lines")));
        }
        let bytes: usize = lines.iter().map(|line| line.body.len()).sum();
        let source = format!(
            "{} lines of one recorded room, {} bytes each on average",
            lines.len(),
            bytes / lines.len()
        );
        Ok(Self { lines, source })
    }

    /// `count` lines from the `from`th on, beginning anew at the end.
    pub fn slice(&self, from: usize, count: usize) -> Vec<Line> {
        self.lines
            .iter()
            .cycle()
            .skip(from % self.lines.len())
            .take(count)
            .cloned()
            .collect()
    }
}

/// Lines of 1 to 24 words, short words and short lines more often, by eight people.
fn made_up(count: usize) -> Vec<Line> {
    const SYLLABLES: [&str; 32] = [
        "a", "be", "con", "de", "en", "for", "ga", "he", "in", "ja", "ker", "lo", "man", "ne", "or", "pa", "qui", "ra",
        "so", "ta", "un", "ver", "wa", "xi", "yo", "zu", "ing", "ly", "tion", "ed", "th", "st",
    ];
    let mut dice = Dice::new(7);
    let words: Vec<String> = (0..4000)
        .map(|_| {
            let syllables = 1 + dice.below(2) + dice.below(2);
            (0..syllables).map(|_| *dice.pick(&SYLLABLES)).collect()
        })
        .collect();
    (0..count)
        .map(|_| {
            let length = 1 + dice.below(12) + dice.below(13);
            // The square makes the first words common and the last ones rare.
            let mut word = || {
                let place = dice.below(4000) * dice.below(4000) / 4000;
                words[place].as_str()
            };
            let body: Vec<&str> = (0..length).map(|_| word()).collect();
            Line {
                nick: format!("nick{}", dice.below(8)),
                body: body.join(" "),
            }
        })
        .collect()
}

/// How clients write a line.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Shape {
    /// As most clients do: a UUID as id and again as origin-id (XEP-0359), and a chat state (XEP-0085).
    Usual,
    /// As little as there can be: a short id and a body.
    Lean,
}

impl Shape {
    /// The random bytes of a message, which no compression can save.
    pub fn id_bytes(self) -> usize {
        match self {
            Self::Usual => 16,
            Self::Lean => 4,
        }
    }

    /// The stanza, and its id.
    pub fn stanza(self, room: &str, body: &str, dice: &mut Dice) -> (String, String) {
        let body = escaped(body);
        match self {
            Self::Usual => {
                let id = uuid(dice);
                let stanza = format!(
                    "<message to='{room}' type='groupchat' id='{id}'><body>{body}</body>\
                     <active xmlns='http://jabber.org/protocol/chatstates'/>\
                     <origin-id xmlns='urn:xmpp:sid:0' id='{id}'/></message>"
                );
                (stanza, id)
            }
            Self::Lean => {
                let id = format!("{:08x}", dice.roll() & 0xffff_ffff);
                let stanza = format!("<message to='{room}' type='groupchat' id='{id}'><body>{body}</body></message>");
                (stanza, id)
            }
        }
    }
}

/// Version 4 of RFC 9562.
fn uuid(dice: &mut Dice) -> String {
    let bits = (u128::from(dice.roll()) << 64) | u128::from(dice.roll());
    let bits = bits & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let digits = format!("{bits:032x}");
    let mut id = String::new();
    for part in [0..8, 8..12, 12..16, 16..20, 20..32] {
        let dash = if id.is_empty() { "" } else { "-" };
        let _ = write!(id, "{dash}{}", &digits[part]);
    }
    id
}

fn escaped(text: &str) -> String {
    text.chars()
        // What XML cannot hold is not worth measuring.
        .filter(|char| !char.is_control() && !matches!(char, '\u{fffe}' | '\u{ffff}'))
        .map(|char| match char {
            '&' => "&amp;".to_owned(),
            '<' => "&lt;".to_owned(),
            '>' => "&gt;".to_owned(),
            char => char.to_string(),
        })
        .collect()
}
