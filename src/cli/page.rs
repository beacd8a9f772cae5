//! The page at the admin port's `/`: for sites that have no Grafana, and for browsers that can do little.
//!
//! Plain HTML with tables, drawn here, charts included; nothing is loaded from anywhere. It asks for itself again every half minute.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::{self, Display, Write as _},
    time::Duration,
};

use super::status::{PeerStatus, QueueStatus, Status, bytes, part, period};

/// What is drawn is an hour …
const HOUR: Duration = Duration::from_secs(3600);

/// … in so many steps: enough to see a gap of half a minute, and a few kilobytes of drawing.
const STEPS: usize = 180;

/// How often [`History::note`] wants to be called.
pub const STEP: Duration = Duration::from_secs(HOUR.as_secs() / STEPS as u64);

/// How one peer stood.
#[derive(Clone, Copy, Debug)]
struct Sample {
    up: bool,
    waiting: u64,
    ip_sent: u64,
    ip_received: u64,
}

/// The last hour, in memory.
#[derive(Clone, Debug, Default)]
pub struct History {
    peers: BTreeMap<String, VecDeque<Sample>>,
}

impl History {
    /// To be called every [`STEP`].
    pub fn note(&mut self, status: &Status) {
        for peer in &status.peers {
            let samples = self.peers.entry(peer.name.clone()).or_default();
            // One more than there are steps: a step has two ends.
            if samples.len() > STEPS {
                samples.pop_front();
            }
            samples.push_back(Sample {
                up: peer.up,
                waiting: peer.spool.entries,
                ip_sent: peer.sent.ip_bytes,
                ip_received: peer.received.ip_bytes,
            });
        }
    }
}

/// Text that came from elsewhere.
struct Escaped<'t>(&'t str);

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.chars().try_for_each(|c| match c {
            '&' => f.write_str("&amp;"),
            '<' => f.write_str("&lt;"),
            '>' => f.write_str("&gt;"),
            '"' => f.write_str("&quot;"),
            c => f.write_char(c),
        })
    }
}

const STYLE: &str = "\
body{font:15px/1.45 sans-serif;margin:1.2em auto;max-width:62em;padding:0 1em;color:#222;background:#fff}\
h1{font-size:1.4em;margin:0}h2{font-size:1.15em;margin:1.6em 0 .3em}p{margin:.2em 0}\
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.15em 1em .15em 0;text-align:left;vertical-align:top}th{font-weight:normal;color:#666}\
.up{color:#176f2c}.down,.bad{color:#b3261e}b.up,b.down{font-size:1.1em}svg{display:block;width:100%;height:auto}\
svg text{font:11px sans-serif;fill:#666}.lately td:first-child{color:#666;white-space:nowrap}\
@media(prefers-color-scheme:dark){body{background:#181a1b;color:#ddd}th,.lately td:first-child{color:#999}svg text{fill:#999}.up{color:#6fce85}.down,.bad{color:#ff8a80}}";

/// The whole page.
pub fn page(status: &Status, history: &History) -> String {
    let mut html = String::new();
    // Writing to a string does not fail.
    let _ = write_page(&mut html, status, history);
    html
}

fn write_page(html: &mut String, status: &Status, history: &History) -> fmt::Result {
    let site = Escaped(&status.site);
    write!(
        html,
        "<!DOCTYPE html><html lang=en><meta charset=utf-8><meta http-equiv=refresh content=30>\
         <meta name=viewport content='width=device-width'><title>narrows: {site}</title><style>{STYLE}</style>\n\
         <h1>{site}</h1><p>narrows {}, up for {}. Streams with the server here: {} in, {} out.\n",
        Escaped(&status.version),
        period(status.uptime_seconds),
        status.legs.receiving,
        status.legs.initiating
    )?;
    if let Some(why) = &status.not_ready {
        writeln!(html, "<p class=bad>Not ready: {}", Escaped(why))?;
    }
    for peer in &status.peers {
        write_peer(html, peer)?;
        if let Some(samples) = history.peers.get(&peer.name) {
            write_chart(html, samples)?;
        }
    }
    html.push_str("<h2>Lately</h2><table class=lately>\n");
    for (peer, event) in status.events().into_iter().take(EVENTS_SHOWN) {
        writeln!(
            html,
            "<tr><td>{}<td>{}: {}",
            event.clock(),
            Escaped(peer),
            Escaped(&event.what)
        )?;
    }
    html.push_str("</table><p><a href=/metrics>metrics</a> <a href=/status>status</a>\n");
    Ok(())
}

/// Of each peer.
const ROOMS_SHOWN: usize = 10;

/// A screen of them.
const EVENTS_SHOWN: usize = 15;

fn write_peer(html: &mut String, peer: &PeerStatus) -> fmt::Result {
    let (class, word) = match peer.up {
        true => ("up", "up"),
        false => ("down", "DOWN"),
    };
    write!(
        html,
        "<h2>{}: <b class={class}>{word}</b> for {}</h2>",
        Escaped(&peer.name),
        period(peer.since_seconds)
    )?;
    if let Some(why) = peer.last_error.as_ref().filter(|_| !peer.up) {
        write!(html, "<p>{}", Escaped(why))?;
    }
    html.push_str("<table>\n");
    let mut row = |name: &str, text: String| writeln!(html, "<tr><th>{name}<td>{text}");
    row("waits to cross", waiting(peer))?;
    row("waits for the server here", queue(&peer.inbox))?;
    let rtt = peer.rtt_seconds.map_or("not measured".to_owned(), period);
    let acked = peer
        .acked_seconds
        .map_or("nothing yet".to_owned(), |ago| format!("{} ago", period(ago)));
    row("round trip", format!("{rtt}; last acknowledgement: {acked}"))?;
    row(
        "crossed",
        format!(
            "{} in place of {} of plain S2S: {} saved; of what is sent, {} against a compressor",
            bytes(peer.ip_bytes()),
            bytes(peer.plain_bytes()),
            part(peer.saved()),
            part(peer.saved_of_compressed())
        ),
    )?;
    let saved = &peer.saved;
    row(
        "saved here by",
        format!(
            "one copy for many: {}; compression: {}; answers near by: {}; what gave way while it waited: {}",
            bytes(saved.collapse),
            bytes(saved.compression),
            bytes(saved.mirror),
            bytes(saved.compaction)
        ),
    )?;
    let rooms = &peer.rooms;
    row(
        "rooms",
        format!(
            "{} here in {} there, {} there in rooms here",
            count(rooms.sessions, "user", "users"),
            count(rooms.mirrored, "room", "rooms"),
            count(rooms.guests, "user", "users")
        ),
    )?;
    if !peer.room_costs.is_empty() {
        let costs = peer.room_costs.iter().take(ROOMS_SHOWN);
        let costs: Vec<String> = costs
            .map(|room| format!("{} {}", Escaped(&room.room), bytes(room.bytes())))
            .collect();
        row("dearest rooms, before compression", costs.join("; "))?;
    }
    if rooms.split > 0 {
        row(
            "split",
            format!(
                "<b class=bad>the users of {} were told that the link is gone</b>",
                count(rooms.split, "room", "rooms")
            ),
        )?;
    }
    if peer.in_doubt > 0 {
        row(
            "in doubt",
            format!("{} copies may not have reached the server here", peer.in_doubt),
        )?;
    }
    html.push_str("</table>\n");
    Ok(())
}

fn count(number: u64, one: &str, more: &str) -> String {
    let noun = if number == 1 { one } else { more };
    format!("{number} {noun}")
}

/// As in `12 message, 3 presence`.
pub fn by_class(classes: &BTreeMap<String, u64>) -> String {
    let each: Vec<String> = classes
        .iter()
        .map(|(class, entries)| format!("{entries} {class}"))
        .collect();
    each.join(", ")
}

fn queue(queue: &QueueStatus) -> String {
    match queue.entries {
        0 => "nothing".to_owned(),
        entries => format!("{}, {}", count(entries, "entry", "entries"), bytes(queue.bytes)),
    }
}

fn waiting(peer: &PeerStatus) -> String {
    let mut text = queue(&peer.spool);
    if peer.spool.classes.len() > 1 {
        text += &format!(" ({})", by_class(&peer.spool.classes));
    }
    if let Some(oldest) = peer.spool.oldest_seconds {
        text += &format!(", the oldest for {}", period(oldest));
        text += &match (peer.drain_seconds, peer.up) {
            (None, _) => String::new(),
            (Some(drain), true) => format!("; through in {}", period(drain)),
            (Some(drain), false) => format!("; through {} after the link is up", period(drain)),
        };
    }
    text
}

// The drawing: two charts above each other, in units of its own.
const LEFT: f64 = 70.0;
const WIDTH: f64 = 710.0;
const RATE_HEIGHT: f64 = 90.0;
const WAIT_TOP: f64 = 125.0;
const WAIT_HEIGHT: f64 = 45.0;
const BOTTOM: f64 = WAIT_TOP + WAIT_HEIGHT;

fn write_chart(html: &mut String, samples: &VecDeque<Sample>) -> fmt::Result {
    let steps: Vec<(Sample, Sample)> = samples.iter().copied().zip(samples.iter().skip(1).copied()).collect();
    let (Some(first), Some(last)) = (samples.front(), samples.back()) else {
        return Ok(());
    };
    let away = steps.iter().filter(|(_, end)| !end.up).count() as u64;
    let summary = format!(
        "In the last {}: sent {}, received {}, at most {} waiting, link {}.",
        period((STEP * steps.len() as u32).as_secs_f64()),
        bytes(last.ip_sent.saturating_sub(first.ip_sent)),
        bytes(last.ip_received.saturating_sub(first.ip_received)),
        count(
            samples.iter().map(|sample| sample.waiting).max().unwrap_or_default(),
            "entry",
            "entries"
        ),
        match away {
            0 => "never away".to_owned(),
            away => format!("away for {}", period(STEP.as_secs_f64() * away as f64)),
        },
    );
    write!(
        html,
        "<p>{summary}\n<svg viewBox='0 0 800 200' role=img aria-label='{summary}'>"
    )?;
    // The newest at the right edge, also while the hour is not full.
    let x = |step: usize| LEFT + WIDTH * (STEPS - steps.len() + step) as f64 / STEPS as f64;
    write_away(html, &steps, x)?;

    let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 * 8.0 / STEP.as_secs_f64();
    let sent: Vec<f64> = steps
        .iter()
        .map(|(start, end)| rate(end.ip_sent, start.ip_sent))
        .collect();
    let received: Vec<f64> = steps
        .iter()
        .map(|(start, end)| rate(end.ip_received, start.ip_received))
        .collect();
    let top = nice(sent.iter().chain(&received).copied().fold(1.0, f64::max));
    let y = |rate: f64| 5.0 + RATE_HEIGHT * (1.0 - rate / top);
    write_axis(html, 5.0, RATE_HEIGHT, &bits(top))?;
    write_line(html, &sent, x, y, "#1f77b4")?;
    write_line(html, &received, x, y, "#e08214")?;
    write!(
        html,
        "<text x=70 y=113><tspan fill=#1f77b4>&#9644; sent</tspan> <tspan fill=#e08214>&#9644; received</tspan> \
         <tspan fill=#d33>&#9632; link away</tspan></text>"
    )?;

    let waits: Vec<f64> = steps.iter().map(|(_, end)| end.waiting as f64).collect();
    let top = nice(waits.iter().copied().fold(1.0, f64::max));
    let y = |waiting: f64| WAIT_TOP + WAIT_HEIGHT * (1.0 - waiting / top);
    write_axis(html, WAIT_TOP, WAIT_HEIGHT, &format!("{top} waiting"))?;
    write_line(html, &waits, x, y, "#7b4fa3")?;

    for (minutes, name) in [(60, "an hour ago"), (45, "45"), (30, "30 min"), (15, "15"), (0, "now")] {
        let x = LEFT + WIDTH * (1.0 - f64::from(minutes) / 60.0);
        write!(
            html,
            "<text x={x:.0} y={:.0} text-anchor=middle>{name}</text>",
            BOTTOM + 16.0
        )?;
    }
    html.push_str("</svg>\n");
    Ok(())
}

/// Where the link was down, in red behind the lines.
fn write_away(html: &mut String, steps: &[(Sample, Sample)], x: impl Fn(usize) -> f64) -> fmt::Result {
    let mut since = None;
    for at in 0..=steps.len() {
        let down = steps.get(at).is_some_and(|(_, end)| !end.up);
        match (down, since) {
            (true, None) => since = Some(at),
            (false, Some(from)) => {
                let (left, right) = (x(from), x(at));
                let (width, height) = (right - left, BOTTOM - 5.0);
                write!(
                    html,
                    "<rect x={left:.1} y=5 width={width:.1} height={height:.0} fill=#d33 opacity=.18 />"
                )?;
                since = None;
            }
            (true, Some(_)) | (false, None) => {}
        }
    }
    Ok(())
}

fn write_axis(html: &mut String, top: f64, height: f64, name: &str) -> fmt::Result {
    let (bottom, right) = (top + height, LEFT + WIDTH);
    write!(
        html,
        "<path d='M{LEFT} {top}H{right}M{LEFT} {bottom}H{right}' stroke=#888 stroke-opacity=.4 />\
         <text x=65 y={:.0} text-anchor=end>{name}</text><text x=65 y={bottom} text-anchor=end>0</text>",
        top + 8.0
    )
}

/// A line of steps: what was so from one point to the next.
fn write_line(
    html: &mut String,
    values: &[f64],
    x: impl Fn(usize) -> f64,
    y: impl Fn(f64) -> f64,
    color: &str,
) -> fmt::Result {
    write!(html, "<path fill=none stroke={color} stroke-width=1.5 d='")?;
    for (step, value) in values.iter().enumerate() {
        let word = if step == 0 { 'M' } else { 'L' };
        write!(html, "{word}{:.1} {:.1}H{:.1}", x(step), y(*value), x(step + 1))?;
    }
    html.push_str("'/>");
    Ok(())
}

/// The next of 1, 2, 5, 10, 20 …
fn nice(value: f64) -> f64 {
    let magnitude = 10f64.powf(value.log10().floor());
    let digit = value / magnitude;
    magnitude
        * match digit {
            ..=1.0 => 1.0,
            ..=2.0 => 2.0,
            ..=5.0 => 5.0,
            _ => 10.0,
        }
}

fn bits(per_second: f64) -> String {
    match per_second {
        ..1e3 => format!("{per_second} bit/s"),
        ..1e6 => format!("{} kbit/s", per_second / 1e3),
        _ => format!("{} Mbit/s", per_second / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::status::{EventStatus, RoomsStatus, Traffic},
        *,
    };

    fn status(step: u64) -> Status {
        let up = !(100..130).contains(&step);
        Status {
            site: "ship & <crew>".into(),
            version: "0.1.0".into(),
            uptime_seconds: 90_061.0,
            peers: vec![PeerStatus {
                name: "shore".into(),
                up,
                since_seconds: 60.0,
                last_error: Some("<script>alert(1)</script>".into()),
                spool: QueueStatus {
                    entries: if up { 0 } else { step - 99 },
                    bytes: 300,
                    oldest_seconds: (!up).then_some(20.0),
                    ..QueueStatus::default()
                },
                drain_seconds: Some(3.0),
                sent: Traffic {
                    stanza_bytes: 100_000 * step,
                    ip_bytes: 1_000 * step.min(100) + 1_000 * step.saturating_sub(130),
                    ..Traffic::default()
                },
                rooms: RoomsStatus {
                    split: u64::from(!up),
                    ..RoomsStatus::default()
                },
                events: vec![EventStatus {
                    at: 1_700_000_000.0,
                    what: "the link is down: <b>".into(),
                }],
                ..PeerStatus::default()
            }],
            ..Status::default()
        }
    }

    /// What came from elsewhere is text, and nothing is loaded from anywhere.
    #[test]
    fn page_is_whole_and_safe() {
        let html = page(&status(110), &History::default());
        assert!(
            html.contains("ship &amp; &lt;crew&gt;") && !html.contains("<script"),
            "{html}"
        );
        assert!(
            html.contains("&lt;script&gt;") && html.contains("the link is down: &lt;b&gt;"),
            "{html}"
        );
        for from_elsewhere in ["src=", "url(", "http://", "https://", "@import"] {
            assert!(!html.contains(from_elsewhere), "{from_elsewhere}");
        }
        assert!(
            html.contains("11 entries, 300 B, the oldest for 20 s; through 3.0 s after the link is up"),
            "{html}"
        );
    }

    /// An hour with a gap of ten minutes: the gap is red, its queue is seen, and the page stays small.
    #[test]
    fn chart_shows_the_last_hour() {
        let mut history = History::default();
        for step in 0..1000 {
            history.note(&status(step.min(180)));
        }
        assert!(history.peers["shore"].len() == STEPS + 1);
        let mut history = History::default();
        for step in 0..=180 {
            history.note(&status(step));
        }
        let html = page(&status(180), &history);
        let summary =
            "In the last 1 h 0 min: sent 150.0 kB, received 0 B, at most 30 entries waiting, link away for 10 min 0 s.";
        assert!(html.contains(summary), "{html}");
        // From 99 of 180 steps on, for 30.
        assert!(html.contains("<rect x=460.5 y=5 width=118.3 "), "{html}");
        assert!(html.contains(">500 bit/s<") && html.contains(">50 waiting<"), "{html}");
        assert!(html.len() < 20_000, "{} bytes", html.len());
    }

    /// A process that has just started has nothing to draw yet.
    #[test]
    fn short_histories_are_drawn() {
        let mut history = History::default();
        for step in 0..3 {
            let html = page(&status(step), &history);
            assert_eq!(html.contains("<svg"), step > 0);
            history.note(&status(step));
        }
    }
}
