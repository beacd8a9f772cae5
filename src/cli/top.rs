//! `narrows top`: a running sidecar's links and queues, live in a terminal.
//!
//! It asks the admin port every two seconds and draws only what has changed, so that it can be used over a session of 9600 bit/s: ages are
//! rounded, and nothing moves by itself.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    time::{Duration, Instant},
};

use ratatui::{
    DefaultTerminal, Frame,
    crossterm::event::{self, Event, KeyCode, KeyModifiers},
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style, Stylize as _},
    text::{Line, Span},
    widgets::{Block, Borders, Cell, Row, Table},
};

use super::{
    page::by_class,
    status::{self, PeerStatus, QueueStatus, RoomStatus, Status, bytes, part, period},
};

/// The sidecar looks at itself once a second.
pub const EVERY: Duration = Duration::from_secs(2);

/// What is shown.
#[derive(Debug, Default)]
struct View {
    /// The last answer, and the one before it with the time between them.
    now: Status,
    before: Option<(Status, Duration)>,
    /// Why there is no newer one.
    trouble: Option<String>,
}

/// Shows until `q` or Ctrl-C.
pub fn run(address: SocketAddr) -> io::Result<()> {
    let mut terminal = ratatui::try_init()?;
    let result = show(&mut terminal, address);
    ratatui::try_restore()?;
    result
}

fn show(terminal: &mut DefaultTerminal, address: SocketAddr) -> io::Result<()> {
    let mut view = View::default();
    let mut asked = None;
    loop {
        let at = Instant::now();
        view.take(
            status::fetch(address).and_then(|value| status::read(address, value)),
            asked.map(|asked| at - asked),
        );
        if view.trouble.is_none() {
            asked = Some(at);
        }
        terminal.draw(|frame| draw(frame, &view))?;
        while let Some(left) = EVERY.checked_sub(at.elapsed()) {
            if !event::poll(left)? {
                break;
            }
            match event::read()? {
                Event::Key(key) if ends(key.code, key.modifiers) => return Ok(()),
                // A smaller terminal is drawn anew at once.
                Event::Resize(..) => terminal.draw(|frame| draw(frame, &view)).map(drop)?,
                _ => {}
            }
        }
    }
}

fn ends(code: KeyCode, modifiers: KeyModifiers) -> bool {
    match code {
        KeyCode::Char('q') | KeyCode::Esc => true,
        KeyCode::Char('c') => modifiers.contains(KeyModifiers::CONTROL),
        _ => false,
    }
}

impl View {
    fn take(&mut self, answer: Result<Status, status::StatusError>, since: Option<Duration>) {
        match answer {
            Ok(status) => {
                let before = std::mem::replace(&mut self.now, status);
                // After a restart its counts begin anew.
                let same = before.uptime_seconds <= self.now.uptime_seconds;
                self.before = since.filter(|_| same).map(|since| (before, since));
                self.trouble = None;
            }
            Err(error) => {
                self.before = None;
                self.trouble = Some(error.to_string());
            }
        }
    }

    /// Bits a second at IP level, sent and received.
    fn rates(&self, peer: &PeerStatus) -> Option<[f64; 2]> {
        let (before, since) = self.before.as_ref()?;
        let before = before.peers.iter().find(|before| before.name == peer.name)?;
        let rate = |now: u64, before: u64| now.saturating_sub(before) as f64 * 8.0 / since.as_secs_f64();
        Some([
            rate(peer.sent.ip_bytes, before.sent.ip_bytes),
            rate(peer.received.ip_bytes, before.received.ip_bytes),
        ])
    }
}

fn draw(frame: &mut Frame<'_>, view: &View) {
    let peers = u16::try_from(view.now.peers.len()).unwrap_or(u16::MAX);
    let table = peers.saturating_add(2);
    let [head, middle, foot] =
        Layout::vertical([Constraint::Length(1), Constraint::Fill(1), Constraint::Length(1)]).areas(frame.area());
    frame.render_widget(headline(&view.now), head);
    if table.saturating_mul(3) + EVENTS_MIN <= middle.height {
        let rooms = dearest(&view.now);
        // What is left when the rest has its room: a head, the rooms, and a line that parts them from what follows.
        let left = middle.height - table.saturating_mul(3) - EVENTS_MIN;
        let lines = u16::try_from(rooms.len())
            .unwrap_or(u16::MAX)
            .min(left.saturating_sub(2));
        let room_table = Constraint::Length(if lines == 0 { 0 } else { lines + 2 });
        let table = Constraint::Length(table);
        let areas = Layout::vertical([table, table, table, room_table, Constraint::Fill(1)]);
        let [links, queues, savings, room_area, events] = areas.areas(middle);
        draw_links(frame, view, links);
        draw_queues(frame, view, queues);
        draw_savings(frame, view, savings);
        draw_rooms(frame, &rooms[..usize::from(lines)], room_area);
        draw_events(frame, view, events);
    } else {
        let areas = Layout::vertical([Constraint::Fill(1), Constraint::Length(EVENTS_MIN)]);
        let [all, events] = areas.areas(middle);
        draw_worst(frame, view, all);
        draw_events(frame, view, events);
    }
    let line = match (&view.trouble, &view.now.not_ready) {
        (Some(trouble), _) => Line::from(trouble.as_str()).red(),
        (None, Some(why)) => Line::from(format!("not ready: {why}")).red(),
        (None, None) => Line::from("q ends").dim(),
    };
    frame.render_widget(line, foot);
}

/// Lines for what happened lately, with the one above them.
const EVENTS_MIN: u16 = 5;

fn headline(status: &Status) -> Line<'_> {
    Line::from(format!(
        "{}: narrows {}, up for {}, streams with the server: {} in, {} out",
        status.site,
        status.version,
        coarse(status.uptime_seconds),
        status.legs.receiving,
        status.legs.initiating
    ))
    .bold()
}

/// A table with a title for its first column.
fn draw_table<const N: usize>(
    frame: &mut Frame<'_>,
    area: Rect,
    heads: [&'static str; N],
    widths: [u16; N],
    rows: Vec<Row<'_>>,
) {
    let table = Table::new(rows, widths.map(Constraint::Length))
        .header(Row::new(heads).style(Style::new().add_modifier(Modifier::UNDERLINED)))
        .column_spacing(1);
    frame.render_widget(table, area);
}

fn link(peer: &PeerStatus) -> Cell<'static> {
    match peer.up {
        true => Cell::from("up").style(Color::Green),
        false => Cell::from("DOWN").style(Style::new().fg(Color::Red).bold()),
    }
}

fn draw_links(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let rows = view.now.peers.iter().map(|peer| {
        let [out, back] = match view.rates(peer) {
            Some(rates) => rates.map(rate),
            None => ["-".to_owned(), "-".to_owned()],
        };
        Row::new([
            Cell::from(peer.name.clone()),
            link(peer),
            Cell::from(coarse(peer.since_seconds)),
            Cell::from(peer.rtt_seconds.map_or("-".to_owned(), period)),
            Cell::from(out),
            Cell::from(back),
            Cell::from(peer.acked_seconds.map_or("-".to_owned(), coarse)),
        ])
    });
    draw_table(
        frame,
        area,
        ["LINK", "is", "for", "round trip", "sends", "receives", "last ack"],
        [10, 5, 11, 10, 11, 11, 12],
        rows.collect(),
    );
}

/// What waits, and when it will be through.
fn queue(queue: &QueueStatus) -> String {
    match queue.entries {
        0 => "-".to_owned(),
        entries => format!("{entries} ({})", bytes(queue.bytes)),
    }
}

fn through(peer: &PeerStatus) -> String {
    match (peer.spool.entries, peer.drain_seconds) {
        (0, _) => "-".to_owned(),
        (_, None) => "not known".to_owned(),
        (_, Some(seconds)) if peer.up => coarse(seconds),
        (_, Some(seconds)) => format!("once up {}", coarse(seconds)),
    }
}

/// A line for each of many peers, those first that are down, then those with the oldest entries; as many as there is room for.
fn draw_worst(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let mut peers: Vec<&PeerStatus> = view.now.peers.iter().collect();
    let age = |peer: &PeerStatus| peer.spool.oldest_seconds.unwrap_or_default();
    peers.sort_by(|one, other| one.up.cmp(&other.up).then(age(other).total_cmp(&age(one))));
    let down = peers.iter().filter(|peer| !peer.up).count();
    let rows = peers.iter().map(|peer| {
        // Both ways together: there is a line's room.
        let both: f64 = view.rates(peer).unwrap_or_default().iter().sum();
        Row::new([
            Cell::from(peer.name.clone()),
            link(peer),
            Cell::from(coarse(peer.since_seconds)),
            Cell::from(queue(&peer.spool)),
            Cell::from(peer.spool.oldest_seconds.map_or("-".to_owned(), coarse)),
            Cell::from(through(peer)),
            Cell::from(rate(both)),
        ])
    });
    let title = format!("{down} of {} down", peers.len());
    let [line, table] = Layout::vertical([Constraint::Length(1), Constraint::Fill(1)]).areas(area);
    frame.render_widget(Line::from(title), line);
    draw_table(
        frame,
        table,
        ["PEER", "is", "for", "to cross", "oldest", "through in", "both ways"],
        [10, 4, 10, 13, 9, 14, 11],
        rows.collect(),
    );
}

fn draw_queues(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let mut classes = BTreeMap::new();
    for (class, entries) in view.now.peers.iter().flat_map(|peer| &peer.spool.classes) {
        *classes.entry(class.clone()).or_default() += entries;
    }
    let rows = view.now.peers.iter().map(|peer| {
        Row::new([
            peer.name.clone(),
            queue(&peer.spool),
            peer.spool.oldest_seconds.map_or("-".to_owned(), coarse),
            through(peer),
            queue(&peer.inbox),
            format!("{} + {}", peer.rooms.sessions, peer.rooms.guests),
            match peer.rooms.split {
                0 => "no".to_owned(),
                split => format!("{split} of {}", peer.rooms.mirrored),
            },
        ])
    });
    draw_table(
        frame,
        area,
        [
            "QUEUE",
            "to cross",
            "oldest",
            "through in",
            "to deliver",
            "in rooms",
            "split",
        ],
        [10, 13, 9, 14, 12, 8, 7],
        rows.collect(),
    );
    // The line that parts it from the next table.
    let last = Rect {
        y: area.bottom().saturating_sub(1),
        height: area.height.min(1),
        ..area
    };
    if classes.len() > 1 {
        frame.render_widget(Line::from(format!("           that is {}", by_class(&classes))), last);
    }
}

fn draw_savings(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let rows = view.now.peers.iter().map(|peer| {
        Row::new([
            peer.name.clone(),
            bytes(peer.plain_bytes()),
            bytes(peer.ip_bytes()),
            part(peer.saved()),
            part(peer.saved_of_compressed()),
            bytes(peer.saved.collapse),
            bytes(peer.saved.compression),
            bytes(peer.saved.mirror),
        ])
    });
    draw_table(
        frame,
        area,
        [
            "SAVED",
            "plain S2S",
            "crossed",
            "saved",
            "vs zip",
            "one copy",
            "packing",
            "near by",
        ],
        [10, 10, 10, 7, 9, 9, 9, 9],
        rows.collect(),
    );
}

/// The rooms of all peers, the dearest first.
fn dearest(status: &Status) -> Vec<(&PeerStatus, &RoomStatus)> {
    let mut rooms: Vec<_> = status
        .peers
        .iter()
        .flat_map(|peer| peer.room_costs.iter().map(move |room| (peer, room)))
        .collect();
    rooms.sort_by_key(|(_, room)| std::cmp::Reverse(room.bytes()));
    rooms
}

fn draw_rooms(frame: &mut Frame<'_>, rooms: &[(&PeerStatus, &RoomStatus)], area: Rect) {
    if rooms.is_empty() {
        return;
    }
    let rows = rooms.iter().map(|(peer, room)| {
        Row::new([
            room.room.clone(),
            peer.name.clone(),
            bytes(room.sent_bytes),
            bytes(room.received_bytes),
            room.copies.to_string(),
        ])
    });
    draw_table(
        frame,
        area,
        ["ROOM, by bytes", "peer", "out", "in", "stanzas"],
        [32, 10, 10, 10, 9],
        rows.collect(),
    );
}

fn draw_events(frame: &mut Frame<'_>, view: &View, area: Rect) {
    let block = Block::new().borders(Borders::TOP).title("lately");
    let inside = block.inner(area);
    frame.render_widget(block, area);
    let several = view.now.peers.len() > 1;
    let newest = view.now.events().into_iter().take(usize::from(inside.height));
    let lines: Vec<Line<'_>> = newest
        .map(|(peer, event)| {
            let who = if several { format!("{peer}: ") } else { String::new() };
            Line::from(vec![
                Span::from(event.clock()).dim(),
                Span::from(format!(" {who}{}", event.what)),
            ])
        })
        .collect();
    frame.render_widget(ratatui::text::Text::from(lines), inside);
}

/// A time that need not be drawn anew every two seconds.
fn coarse(seconds: f64) -> String {
    match seconds {
        0.0..10.0 => "<10 s".to_owned(),
        10.0..60.0 => format!("{} s", (seconds / 10.0).floor() * 10.0),
        60.0..3600.0 => format!("{} min", (seconds / 60.0).floor()),
        _ => period(seconds),
    }
}

/// To two digits: the third moves all the time and says nothing.
fn rate(bits_per_second: f64) -> String {
    match bits_per_second {
        0.0..1.0 => "-".to_owned(),
        1.0..1000.0 => format!("{} bit/s", (bits_per_second / 10.0).ceil() * 10.0),
        1000.0..10_000.0 => format!("{:.1} kbit/s", bits_per_second / 1e3),
        10_000.0..1_000_000.0 => format!("{:.0} kbit/s", bits_per_second / 1e3),
        _ => format!("{:.1} Mbit/s", bits_per_second / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, rc::Rc};

    use ratatui::{
        Terminal, TerminalOptions, Viewport,
        backend::{CrosstermBackend, TestBackend},
    };

    use super::{
        super::status::{EventStatus, Legs, RoomsStatus, Saved, Traffic},
        *,
    };

    fn status(second: u64) -> Status {
        let traffic = |stanza_bytes: u64, ip_bytes: u64| Traffic {
            stanza_bytes,
            ip_bytes,
            ..Traffic::default()
        };
        Status {
            site: "ship".into(),
            version: "0.1.0".into(),
            uptime_seconds: 90_061.0 + second as f64,
            not_ready: None,
            legs: Legs {
                receiving: 4,
                initiating: 2,
            },
            peers: vec![
                PeerStatus {
                    name: "shore".into(),
                    up: true,
                    since_seconds: 7_260.0 + second as f64,
                    rtt_seconds: Some(0.612),
                    acked_seconds: Some(3.0),
                    drain_seconds: Some(12.4),
                    spool: QueueStatus {
                        entries: 3,
                        bytes: 1_120,
                        oldest_seconds: Some(2.0),
                        ..QueueStatus::default()
                    },
                    sent: traffic(900_000, 20_000 + 300 * second),
                    received: traffic(300_000, 10_000),
                    saved: Saved {
                        mirror: 2_000,
                        collapse: 850_000,
                        compression: 30_000,
                        ..Saved::default()
                    },
                    rooms: RoomsStatus {
                        mirrored: 3,
                        sessions: 20,
                        split: 0,
                        guests: 4,
                    },
                    events: vec![
                        EventStatus {
                            at: 1_700_000_000.0,
                            what: "the link is down: the peer was silent for 15000 ms".into(),
                        },
                        EventStatus {
                            at: 1_700_003_600.0,
                            what: "the link is up, 41 entries wait".into(),
                        },
                    ],
                    ..PeerStatus::default()
                },
                PeerStatus {
                    name: "island".into(),
                    since_seconds: 61.0,
                    spool: QueueStatus {
                        entries: 41,
                        bytes: 20_480,
                        classes: [("message".to_owned(), 38), ("presence".to_owned(), 3)].into(),
                        oldest_seconds: Some(59.0),
                        ..QueueStatus::default()
                    },
                    rooms: RoomsStatus {
                        mirrored: 2,
                        split: 2,
                        ..RoomsStatus::default()
                    },
                    events: vec![EventStatus {
                        at: 1_700_003_599.0,
                        what: "users were told that the link is gone".into(),
                    }],
                    ..PeerStatus::default()
                },
            ],
        }
    }

    fn view(second: u64) -> View {
        let mut view = View::default();
        view.take(Ok(status(second)), None);
        view.take(Ok(status(second + 2)), Some(EVERY));
        view
    }

    /// On the smallest terminal everything that an admin asks first is there, in one screen.
    #[test]
    fn one_screen_says_it() {
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|frame| draw(frame, &view(0))).unwrap();
        let expected = [
            "ship: narrows 0.1.0, up for 1 d 1 h, streams with the server: 4 in, 2 out",
            "LINK       is    for         round trip sends       receives    last ack",
            "shore      up    2 h 1 min   612 ms     2.4 kbit/s  -           <10 s",
            "island     DOWN  1 min       -          -           -           -",
            "",
            "QUEUE      to cross      oldest    through in     to deliver   in rooms split",
            "shore      3 (1120 B)    <10 s     10 s           -            20 + 4   no",
            "island     41 (20.5 kB)  50 s      not known      -            0 + 0    2 of 2",
            "           that is 38 message, 3 presence",
            "SAVED      plain S2S  crossed    saved   vs zip    one copy  packing   near by",
            "shore      1200.0 kB  30.6 kB    97.5 %  -         850.0 kB  30.0 kB   2000 B",
            "island     0 B        0 B        -       -         0 B       0 B       0 B",
        ];
        let buffer = terminal.backend().buffer();
        let line = |y: u16| {
            (0..80)
                .map(|x| buffer[(x, y)].symbol())
                .collect::<String>()
                .trim_end()
                .to_owned()
        };
        let shown: Vec<String> = (0..24).map(line).collect();
        assert_eq!(shown[..expected.len()], expected, "{}", shown.join("\n"));
        assert!(
            shown
                .iter()
                .any(|line| line.ends_with("shore: the link is up, 41 entries wait")),
            "{}",
            shown.join("\n")
        );
        assert_eq!(shown[23], "q ends");
    }

    /// Nobody answers any more: what was last known stays, and the reason stands below it.
    #[test]
    fn trouble_is_told() {
        let mut view = view(0);
        let address = "127.0.0.1:9275".parse().unwrap();
        let error = io::ErrorKind::ConnectionRefused.into();
        view.take(Err(status::StatusError::Unreachable { address, error }), Some(EVERY));
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|frame| draw(frame, &view)).unwrap();
        let shown = terminal.backend().to_string();
        assert!(
            shown.contains("nobody answers at 127.0.0.1:9275") && shown.contains("shore"),
            "{shown}"
        );
    }

    /// Of many peers those are shown that somebody should look at.
    #[test]
    fn many_peers_are_a_line_each() {
        let mut status = status(0);
        let (up, down) = (status.peers[0].clone(), status.peers[1].clone());
        status.peers = (0..30)
            .map(|n| PeerStatus {
                name: format!("up{n}"),
                ..up.clone()
            })
            .chain([down])
            .collect();
        let mut view = View::default();
        view.take(Ok(status), None);
        let mut terminal = Terminal::new(TestBackend::new(80, 24)).unwrap();
        terminal.draw(|frame| draw(frame, &view)).unwrap();
        let shown = terminal.backend().to_string();
        let lines: Vec<&str> = shown.lines().map(|line| line.trim_matches('"').trim_end()).collect();
        assert_eq!(
            lines[1..5],
            [
                "1 of 31 down",
                "PEER       is   for        to cross      oldest    through in     both ways",
                "island     DOWN 1 min      41 (20.5 kB)  50 s      not known      -",
                "up0        up   2 h 1 min  3 (1120 B)    <10 s     10 s           -",
            ],
            "{shown}"
        );
        assert!(lines[18].starts_with("lately") && lines[23] == "q ends", "{shown}");
    }

    /// A terminal that is too small shows less, and does not fail.
    #[test]
    fn small_terminals_are_survived() {
        for (width, height) in [(1, 1), (20, 5), (79, 3), (500, 200)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| draw(frame, &view(0))).unwrap();
        }
    }

    /// Counts what a terminal is sent.
    struct Counting(Rc<Cell<usize>>);

    impl io::Write for Counting {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.set(self.0.get() + bytes.len());
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// A line of 9600 bit/s carries 1,920 bytes in two seconds. While little happens a redraw takes a small part of that.
    #[test]
    fn redraws_are_cheap() {
        let viewport = Viewport::Fixed(Rect::new(0, 0, 80, 24));
        let written = Rc::new(Cell::new(0));
        let backend = CrosstermBackend::new(Counting(Rc::clone(&written)));
        let mut terminal = Terminal::with_options(backend, TerminalOptions { viewport }).unwrap();
        let sizes: Vec<usize> = (0..60)
            .map(|turn| {
                terminal.draw(|frame| draw(frame, &view(2 * turn))).unwrap();
                written.take()
            })
            .collect();
        println!(
            "first {} bytes, then at most {}",
            sizes[0],
            sizes[1..].iter().max().unwrap()
        );
        assert!(sizes[0] < 4_000, "{sizes:?}");
        assert!(sizes[1..].iter().all(|size| *size < 400), "{sizes:?}");
    }
}
