//! One mirror by itself: what it gives its server and its peer, stanza by stanza.

use std::borrow::Cow;

use super::{words::to_attribute, *};
use crate::{stanza::ns, time::Wall};

const ROOM: &str = "deck@conference.a.example";

fn at(seconds: u64) -> Now {
    Now {
        mono: Mono::from_start(Duration::from_secs(seconds)),
        wall: Wall::default(),
    }
}

fn stanza(text: &str) -> Stanza {
    Stanza::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
}

fn domain(name: &str) -> Domain {
    Domain::new(name).unwrap()
}

/// A mirror beside users at B, of rooms at A; and rows as a store would hold them.
struct Site {
    mirror: Mirror,
    settings: MirrorSettings,
    rows: BTreeMap<Bytes, Bytes>,
    now: Now,
    /// How long what crosses has waited.
    held: Duration,
    /// The id under which a room was last asked to repeat its words.
    wish: String,
}

/// What a site's server was given, copy by copy, and what crossed.
#[derive(Debug, Default, Eq, PartialEq)]
struct Seen {
    delivered: Vec<String>,
    asked: Vec<String>,
    crossed: Vec<String>,
}

impl Site {
    fn new(settings: MirrorSettings) -> Self {
        let now = at(0);
        let mirror = Self::mirror(&settings, &BTreeMap::new(), now);
        Self {
            mirror,
            settings,
            rows: BTreeMap::new(),
            now,
            held: Duration::ZERO,
            wish: String::new(),
        }
    }

    fn mirror(settings: &MirrorSettings, rows: &BTreeMap<Bytes, Bytes>, now: Now) -> Mirror {
        let local = vec![domain("b.example"), domain("conference.b.example")];
        let far = vec![domain("a.example"), domain("conference.a.example")];
        Mirror::new(settings.clone(), local, far, Epoch(0xab), rows, now)
    }

    fn drain(&mut self) -> Seen {
        let mut seen = Seen::default();
        self.mirror.flush(self.now);
        while let Some(output) = self.mirror.poll_output() {
            match output {
                Output::Deliver(cast) => {
                    cast.check().unwrap();
                    seen.delivered
                        .extend((0..cast.recipients.len()).map(|k| text(&cast.copy(k).unwrap())));
                }
                Output::Ask(stanza) => seen.asked.push(text(stanza.bytes())),
                Output::Cross(stanza) => seen.crossed.push(text(stanza.bytes())),
                Output::PutRow { key, value } => {
                    self.rows.insert(key, value);
                }
                Output::DropRow { key } => {
                    self.rows.remove(&key);
                }
            }
        }
        self.assert_rows_tell_all();
        seen
    }

    /// A process that starts from the rows knows what this one knows.
    fn assert_rows_tell_all(&self) {
        let again = Self::mirror(&self.settings, &self.rows, self.now);
        assert_eq!(again.rooms, self.mirror.rooms);
        assert_eq!(again.levels(), self.mirror.levels());
    }

    /// Our server sends this.
    fn local(&mut self, text_: &str) -> Seen {
        let crosses = self.mirror.handle_local(stanza(text_), self.now);
        let mut seen = self.drain();
        seen.crossed.extend(crosses.map(|stanza| text(stanza.bytes())));
        seen
    }

    /// This crosses, for these sessions of ours.
    fn far(&mut self, text_: &str, to: &[&str]) -> Seen {
        let (template, to_at, _) = stanza(&text_.replacen('>', " to='x'>", 1)).split_to().unwrap();
        let attributes: Vec<Bytes> = to.iter().map(|to| to_attribute(to)).collect();
        let kept = self
            .mirror
            .handle_far(cast(template, to_at as u32, attributes.iter()), self.held, self.now);
        let mut delivered: Vec<String> = kept
            .iter()
            .flat_map(|cast| (0..cast.recipients.len()).map(|k| text(&cast.copy(k).unwrap())))
            .collect();
        let mut seen = self.drain();
        delivered.append(&mut seen.delivered);
        Seen { delivered, ..seen }
    }

    fn presence(&mut self, nick: &str, rest: &str, to: &[&str]) -> Seen {
        let text = format!(
            "<presence from='{ROOM}/{nick}'>{rest}<x xmlns='{}'><item affiliation='member' role='participant'/></x></presence>",
            ns::MUC_USER
        );
        self.far(&text, to)
    }

    fn self_presence(&mut self, nick: &str, to: &str) -> Seen {
        let text = format!(
            "<presence from='{ROOM}/{nick}'><x xmlns='{}'><item affiliation='member' role='participant'/><status code='110'/></x></presence>",
            ns::MUC_USER
        );
        self.far(&text, &[to])
    }

    fn join(&mut self, user: &str) -> Seen {
        self.local(&format!(
            "<presence from='{user}@b.example/r' to='{ROOM}/{user}'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
        ))
    }

    /// `b1` and `b2` are in the room with `alice`, and the link is up.
    fn populated(settings: MirrorSettings) -> Self {
        Self::new(settings).with_people()
    }

    fn with_people(self) -> Self {
        let mut site = self;
        site.up();
        for user in ["b1", "b2"] {
            site.join(user);
            let address = format!("{user}@b.example/r");
            site.presence("alice", "", &[&address]);
            if user == "b2" {
                site.presence("b1", "", &[&address]);
                site.presence("b2", "", &["b1@b.example/r"]);
            }
            site.self_presence(user, &address);
        }
        site
    }

    fn up(&mut self) -> Seen {
        self.mirror.handle_link_up(self.now);
        let mut seen = self.drain();
        self.mirror.handle_caught_up(self.now);
        seen.delivered.extend(self.drain().delivered);
        seen
    }

    fn down(&mut self) {
        self.mirror.handle_link_down(self.now);
    }

    fn pass(&mut self, seconds: u64) -> Seen {
        self.now = at(self.now.mono.since_start().as_secs() + seconds);
        self.mirror.handle_timeout(self.now);
        self.drain()
    }

    fn split(&mut self) -> Seen {
        self.down();
        self.pass(300)
    }

    /// From here on no row is taken.
    fn fill_rows(&mut self) {
        let all = vec![0; rows::BYTES_MAX as usize];
        self.mirror.rows.note(&Bytes::from_static(b"full"), &all);
    }
}

fn text(bytes: &Bytes) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn has(list: &[String], parts: &[&str]) -> bool {
    list.iter().any(|text| parts.iter().all(|part| text.contains(part)))
}

fn say(user: &str, id: &str) -> String {
    format!("<message from='{user}@b.example/r' to='{ROOM}' type='groupchat' id='{id}'><body>hello</body></message>")
}

fn ping(user: &str, nick: &str) -> String {
    format!("<iq type='get' from='{user}@b.example/r' to='{ROOM}/{nick}' id='p1'><ping xmlns='urn:xmpp:ping'/></iq>")
}

/// While the link is up, what a room and its occupants say passes as it is.
#[test]
fn a_live_room_passes_everything() {
    let mut site = Site::populated(MirrorSettings::default());
    let seen = site.local(&say("b1", "m1"));
    assert_eq!((seen.crossed, seen.delivered.len()), (vec![say("b1", "m1")], 0));
    let reflection = format!("<message from='{ROOM}/b1' type='groupchat' id='m1'><body>hello</body></message>");
    let both = ["b1@b.example/r", "b2@b.example/r"];
    assert_eq!(site.far(&reflection, &both).delivered.len(), 2);
    assert_eq!(site.presence("alice", "<show>dnd</show>", &both).delivered.len(), 2);
    assert_eq!(site.mirror.levels().sessions, 2);
}

/// XEP-0410: an occupant's question about itself is answered near by; a stranger's, or one about another, crosses.
#[test]
fn answers_self_pings_of_occupants_only() {
    let mut site = Site::populated(MirrorSettings::default());
    let seen = site.local(&ping("b1", "b1"));
    assert!(has(
        &seen.delivered,
        &[
            "type='result'",
            "to='b1@b.example/r'",
            &format!("from='{ROOM}/b1'"),
            "id='p1'"
        ]
    ));
    assert!(seen.crossed.is_empty());
    for (user, nick) in [("b1", "b2"), ("b3", "b3"), ("b1", "alice")] {
        let seen = site.local(&ping(user, nick));
        assert_eq!((seen.crossed.len(), seen.delivered.len()), (1, 0), "{user} {nick}");
    }
}

/// XEP-0199: a far service that has just said something is there; one that was silent, or has only failed to be reached, is asked; and
/// while the link is gone the answer decides nothing.
#[test]
fn answers_pings_of_services_that_were_heard() {
    let ping =
        |to: &str| format!("<iq type='get' from='b9@b.example/r' to='{to}' id='p1'><ping xmlns='urn:xmpp:ping'/></iq>");
    let mut site = Site::populated(MirrorSettings::default());
    let near = |site: &mut Site, to: &str| {
        let seen = site.local(&ping(to));
        assert_eq!(seen.crossed.len() + seen.delivered.len(), 1, "{to}: {seen:?}");
        seen.delivered.first().cloned()
    };
    site.pass(THERE_FOR_SECONDS);
    assert_eq!(near(&mut site, "conference.a.example"), None);
    site.presence("alice", "<show>dnd</show>", &["b1@b.example/r"]);
    let pong = near(&mut site, "conference.a.example").unwrap();
    for part in [
        "type='result'",
        "from='conference.a.example'",
        "to='b9@b.example/r'",
        "id='p1'",
    ] {
        assert!(pong.contains(part), "{pong}");
    }
    // Another service of the same site, a user there, and what is said to have waited for long, or is an error, prove nothing.
    for to in ["a.example", "alice@a.example", "alice@a.example/r"] {
        assert_eq!(near(&mut site, to), None);
    }
    site.far(
        "<message from='a.example' type='error' id='m'><error type='wait'/></message>",
        &["b1@b.example/r"],
    );
    assert_eq!(near(&mut site, "a.example"), None);
    site.held = Duration::from_secs(THERE_FOR_SECONDS);
    site.far(
        "<message from='alice@a.example' id='m'><body>late</body></message>",
        &["b1@b.example/r"],
    );
    assert_eq!(near(&mut site, "a.example"), None);
    site.held = Duration::ZERO;
    site.far(
        "<message from='alice@a.example' id='m'><body>now</body></message>",
        &["b1@b.example/r"],
    );
    assert!(near(&mut site, "a.example").is_some());
    site.down();
    assert_eq!(near(&mut site, "a.example"), None);
    site.pass(300);
    let undecided = near(&mut site, "a.example").unwrap();
    assert!(
        undecided.contains("remote-server-timeout") && undecided.contains("type='wait'"),
        "{undecided}"
    );
}

/// Openfire's rooms put out who does not answer them: they are answered for who is inside, also while the link is gone, and for nobody else.
#[test]
fn rooms_that_ask_after_guests_are_answered() {
    let mut site = hosting_two();
    let ask = |from: &str, to: &str| {
        format!("<iq type='get' from='{from}' to='{to}' id='g1'><ping xmlns='urn:xmpp:ping'/></iq>")
    };
    for down in [false, true] {
        if down {
            site.down();
        }
        let seen = site.local(&ask(MESS, "a1@a.example/r"));
        let pong = [
            "type='result'",
            "from='a1@a.example/r'",
            &format!("to='{MESS}'"),
            "id='g1'",
        ];
        assert!(has(&seen.asked, &pong) && seen.crossed.is_empty(), "{seen:?}");
        // A stranger, and another occupant, who asks the guest's client.
        for (from, to) in [(MESS, "a9@a.example/r"), (&format!("{MESS}/bob"), "a1@a.example/r")] {
            let seen = site.local(&ask(from, to));
            assert_eq!((seen.asked.len(), seen.crossed.len()), (0, 1), "{from} {to}: {seen:?}");
        }
    }
    assert_eq!(site.mirror.stats().pings_answered, 2);
    site.far(
        "<presence from='a1@a.example/r' type='unavailable'></presence>",
        &[&format!("{MESS}/a1")],
    );
    assert_eq!(site.local(&ask(MESS, "a1@a.example/r")).crossed.len(), 1);
}

/// As in `near.rs`.
const THERE_FOR_SECONDS: u64 = 60;

/// Nobody is told anything until the link has been down for `split_hold`; then far occupants leave, those beside stay, and a ping gets
/// an answer that decides nothing. When all has come, who is there then is shown.
#[test]
fn a_split_is_shown_late_and_healed_with_the_truth() {
    let mut site = Site::populated(MirrorSettings::default());
    site.presence("adam", "", &["b1@b.example/r", "b2@b.example/r"]);
    let stands = |site: &Site, state: RoomState| {
        let all = site.mirror.rooms_by_state();
        assert_eq!(all.map(|(_, count)| count).iter().sum::<usize>(), 1);
        assert!(all.contains(&(state, 1)), "{all:?}");
    };
    stands(&site, RoomState::Live);
    site.down();
    assert_eq!(site.pass(299), Seen::default());
    stands(&site, RoomState::Live);
    let seen = site.pass(1);
    stands(&site, RoomState::Detached);
    for (nick, user) in [("alice", "b1"), ("alice", "b2"), ("adam", "b1"), ("adam", "b2")] {
        let parts = [
            &format!("from='{ROOM}/{nick}'"),
            "type='unavailable'",
            "code='333'",
            &format!("to='{user}@"),
        ];
        assert!(has(&seen.delivered, &parts), "{nick} {user}: {seen:?}");
    }
    assert_eq!(seen.delivered.len(), 4);
    let seen = site.local(&ping("b1", "b1"));
    assert!(has(
        &seen.delivered,
        &["type='error'", "remote-server-timeout", "type='wait'"]
    ));

    site.mirror.handle_link_up(site.now);
    let both = ["b1@b.example/r", "b2@b.example/r"];
    // `adam` has gone meanwhile, `eve` has come, `alice` has changed: nothing of it is shown one by one.
    let gone = format!(
        "<presence from='{ROOM}/adam' type='unavailable'><x xmlns='{}'><item affiliation='none' role='none'/></x></presence>",
        ns::MUC_USER
    );
    assert_eq!(site.far(&gone, &both).delivered.len(), 0);
    assert_eq!(site.presence("eve", "", &both).delivered.len(), 0);
    assert_eq!(site.presence("alice", "<show>xa</show>", &both).delivered.len(), 0);
    // What concerns those beside us is.
    assert_eq!(
        site.presence("b2", "<show>xa</show>", &["b1@b.example/r"])
            .delivered
            .len(),
        1
    );
    let said = format!("<message from='{ROOM}/alice' type='groupchat' id='a9'><body>x</body></message>");
    assert_eq!(site.far(&said, &both).delivered.len(), 2);
    stands(&site, RoomState::Resyncing);
    site.mirror.handle_caught_up(site.now);
    stands(&site, RoomState::Live);
    let seen = site.drain();
    assert_eq!(seen.delivered.len(), 4);
    assert!(has(&seen.delivered, &["/alice'", "<show>xa</show>", "to='b1@"]));
    assert!(has(&seen.delivered, &["/eve'", "to='b2@"]));
}

/// A link that comes back before the hold is over, and goes again, shows nothing however long that goes on.
#[test]
fn flaps_show_nothing() {
    let mut site = Site::populated(MirrorSettings::default());
    for _ in 0..120 {
        site.down();
        assert_eq!(site.pass(20).delivered.len(), 0);
        assert_eq!(site.up().delivered.len(), 0);
        site.now = at(site.now.mono.since_start().as_secs() + 10);
    }
    assert_eq!(site.mirror.stats().splits, 0);
}

/// `echo: auto`: with the link down, those beside the speaker hear him at once, and the room's reflection goes only to who has not heard.
#[test]
fn an_echo_is_heard_once() {
    let mut site = Site::populated(MirrorSettings::default());
    site.down();
    let seen = site.local(&say("b1", "m1"));
    assert_eq!(seen.crossed, [say("b1", "m1")]);
    assert_eq!(seen.delivered.len(), 2);
    assert!(has(
        &seen.delivered,
        &[&format!("from='{ROOM}/b1'"), "to='b2@b.example/r'", "id='m1'", "hello"]
    ));
    site.up();
    site.join("b3");
    site.self_presence("b3", "b3@b.example/r");
    let reflection = format!("<message from='{ROOM}/b1' type='groupchat' id='m1'><body>hello</body></message>");
    let all = ["b1@b.example/r", "b2@b.example/r", "b3@b.example/r"];
    let seen = site.far(&reflection, &all);
    assert_eq!(seen.delivered.len(), 1);
    assert!(has(&seen.delivered, &["to='b3@b.example/r'"]));
    // The same id again is another message.
    assert_eq!(site.far(&reflection, &all).delivered.len(), 3);
}

/// A message that has no id crosses as it is while the room is heard; if the link goes meanwhile it is shown near by in its turn, and the room's
/// reflection, which may have an id of the room's making, is known by its words. What is shown at once gets an id before it crosses.
#[test]
fn what_has_no_id_is_heard_in_its_turn() {
    let mut site = Site::populated(MirrorSettings::default());
    let nameless = |body: &str| say("b1", "m1").replace(" id='m1'", "").replace("hello", body);
    let seen = site.local(&nameless("first"));
    assert_eq!((seen.crossed, seen.delivered.len()), (vec![nameless("first")], 0));
    site.local(&nameless("second"));
    let reflection =
        |body: &str, id: &str| format!("<message from='{ROOM}/b1' type='groupchat'{id}><body>{body}</body></message>");
    let both = ["b1@b.example/r", "b2@b.example/r"];
    assert_eq!(site.far(&reflection("first", ""), &both).delivered.len(), 2);
    site.down();
    let seen = site.drain();
    assert!(has(&seen.delivered, &["second"]) && !has(&seen.delivered, &["first"]));
    let seen = site.local(&nameless("third"));
    assert!(has(&seen.crossed, &[" id='narrows-ab-"]));
    assert!(has(&seen.delivered, &[" id='narrows-ab-"]));
    site.mirror.handle_link_up(site.now);
    assert_eq!(
        site.far(&reflection("second", " id='made-up'"), &both).delivered.len(),
        0
    );
    assert_eq!(
        site.far(&reflection("second", " id='made-up'"), &both).delivered.len(),
        2
    );
}

/// Not echoed: when the policy says no, what is no plain message, and where the room gives ids that an echo would lack.
#[test]
fn echoes_only_where_it_is_safe() {
    let quiet = |settings: MirrorSettings, message: &str, ids: bool| {
        let mut site = Site::populated(settings);
        if ids {
            let text = format!(
                "<message from='{ROOM}/alice' type='groupchat'><body>x</body><stanza-id xmlns='urn:xmpp:sid:0' by='{ROOM}' id='1'/></message>"
            );
            site.far(&text, &["b1@b.example/r"]);
        }
        site.down();
        let seen = site.local(message);
        seen.crossed.len() == 1 && seen.delivered.is_empty()
    };
    let settings = MirrorSettings::default;
    let reflect = MirrorSettings {
        echo: Echo::Reflect,
        ..settings()
    };
    assert!(quiet(reflect, &say("b1", "m"), false));
    assert!(quiet(
        settings(),
        &say("b1", "m").replace("<body>hello</body>", "<subject>s</subject><body>t</body>"),
        false
    ));
    assert!(quiet(
        settings(),
        &say("b1", "m").replace("<body>hello</body>", "<composing/>"),
        false
    ));
    assert!(quiet(settings(), &say("b9", "m"), false));
    assert!(quiet(settings(), &say("b1", "m"), true));
    assert!(!quiet(settings(), &say("b1", "m"), false));
}

/// A message that the room does not take after all: its author has the room's error, the others who saw it are told.
#[test]
fn a_refused_echo_is_taken_back() {
    let mut site = Site::populated(MirrorSettings::default());
    site.down();
    site.local(&say("b1", "m1"));
    site.up();
    let error = format!(
        "<message from='{ROOM}' type='error' id='m1'><error type='auth'><forbidden xmlns='{}'/></error></message>",
        ns::STANZA_ERRORS
    );
    let seen = site.far(&error, &["b1@b.example/r"]);
    assert_eq!(seen.delivered.len(), 2);
    assert!(has(&seen.delivered, &["type='error'", "to='b1@"]));
    assert!(has(
        &seen.delivered,
        &["not accepted", "to='b2@", &format!("from='{ROOM}'")]
    ));
    assert_eq!(site.mirror.levels().echoes_pending, 0);
}

/// Who leaves during a split has left for those beside him at once; the room's word for it comes later, and is not repeated.
#[test]
fn a_leave_during_a_split_is_told_once() {
    let mut site = Site::populated(MirrorSettings::default());
    site.split();
    let leave = format!("<presence from='b2@b.example/r' to='{ROOM}/b2' type='unavailable'/>");
    let seen = site.local(&leave);
    assert_eq!(seen.crossed, [leave]);
    assert!(has(
        &seen.delivered,
        &["/b2'", "unavailable", "to='b1@b.example/r'", "role='none'"]
    ));
    site.mirror.handle_link_up(site.now);
    let gone = format!(
        "<presence from='{ROOM}/b2' type='unavailable'><x xmlns='{}'><item affiliation='member' role='none'/></x></presence>",
        ns::MUC_USER
    );
    assert_eq!(site.far(&gone, &["b1@b.example/r"]).delivered.len(), 0);
    site.mirror.handle_caught_up(site.now);
    let seen = site.drain();
    assert!(!has(&seen.delivered, &["/b2'"]), "{seen:?}");
}

/// What needs the room is refused during a split, by an error that expels nobody and goes to the client alone.
#[test]
fn what_needs_the_room_is_refused() {
    let mut site = Site::populated(MirrorSettings::default());
    site.split();
    let seen = site.join("b3");
    assert!(seen.crossed.is_empty());
    assert!(has(
        &seen.delivered,
        &["<presence type='error'", "to='b3@b.example/r'", "remote-server-timeout"]
    ));
    let seen = site.local(&format!("<presence from='b1@b.example/r' to='{ROOM}/other'/>"));
    assert!(seen.crossed.is_empty() && has(&seen.delivered, &["not-acceptable"]));
    let kick = format!(
        "<iq type='set' id='k' from='b1@b.example/r' to='{ROOM}'><query xmlns='{}'/></iq>",
        ns::MUC_ADMIN
    );
    let seen = site.local(&kick);
    assert!(seen.crossed.is_empty() && has(&seen.delivered, &["<iq type='error'", "remote-server-timeout"]));
    // A status is only late.
    let seen = site.local(&format!(
        "<presence from='b1@b.example/r' to='{ROOM}/b1'><show>dnd</show></presence>"
    ));
    assert_eq!((seen.crossed.len(), seen.delivered.len()), (1, 0));
}

/// Users beside each other can whisper during a split; it does not cross, as the one it is for has it.
#[test]
fn whispers_stay_near_during_a_split() {
    let mut site = Site::populated(MirrorSettings::default());
    site.split();
    let whisper =
        |nick: &str| format!("<message from='b1@b.example/r' to='{ROOM}/{nick}' type='chat'><body>x</body></message>");
    let seen = site.local(&whisper("b2"));
    assert!(seen.crossed.is_empty());
    assert!(has(
        &seen.delivered,
        &[&format!("from='{ROOM}/b1'"), "to='b2@b.example/r'", "muc#user"]
    ));
    assert_eq!(site.local(&whisper("alice")).crossed.len(), 1);
}

/// A moderator sees real addresses, others do not: in a split and after it each sees what the room had shown to him.
#[test]
fn versions_do_not_mix() {
    let mut site = Site::populated(MirrorSettings::default());
    let full = format!(
        "<presence from='{ROOM}/carol'><x xmlns='{0}'><item affiliation='none' role='participant' jid='carol@a.example/home'/></x></presence>",
        ns::MUC_USER
    );
    site.far(&full, &["b1@b.example/r"]);
    site.presence("carol", "", &["b2@b.example/r"]);
    for seen in [site.split(), site.up()] {
        let for_b2 = seen
            .delivered
            .iter()
            .filter(|text| text.contains("to='b2@") && text.contains("/carol'"));
        assert!(
            for_b2.clone().count() == 1 && for_b2.clone().all(|text| !text.contains("carol@a.example")),
            "{seen:?}"
        );
        assert!(has(&seen.delivered, &["to='b1@", "/carol'", "carol@a.example/home"]));
    }
}

/// A room that our users have left is forgotten, with its rows.
#[test]
fn an_empty_room_leaves_nothing_behind() {
    let mut site = Site::populated(MirrorSettings::default());
    for user in ["b1", "b2"] {
        let gone = format!(
            "<presence from='{ROOM}/{user}' type='unavailable'><x xmlns='{}'><item affiliation='none' role='none'/><status code='110'/></x></presence>",
            ns::MUC_USER
        );
        site.far(&gone, &[&format!("{user}@b.example/r")]);
    }
    assert_eq!((site.mirror.levels(), site.rows.len()), (Levels::default(), 0));
}

/// XEP-0045 §7.6: a new nick is taken from the room's own word for it.
#[test]
fn a_nick_change_is_followed() {
    let mut site = Site::populated(MirrorSettings::default());
    let away = format!(
        "<presence from='{ROOM}/b1' type='unavailable'><x xmlns='{}'><item affiliation='member' role='participant' nick='bee'/>\
         <status code='303'/><status code='110'/></x></presence>",
        ns::MUC_USER
    );
    site.far(&away, &["b1@b.example/r"]);
    site.self_presence("bee", "b1@b.example/r");
    assert_eq!(site.local(&ping("b1", "bee")).delivered.len(), 1);
    assert_eq!(site.local(&ping("b1", "b1")).crossed.len(), 1);
}

/// Discovery: a service's answer is for all, a room's for its occupants, a list for who asked; each as long as it lives.
#[test]
fn repeats_answers_to_whom_they_concern() {
    let mut site = Site::populated(MirrorSettings::default());
    let question = |user: &str, to: &str, what: &str| {
        format!(
            "<iq type='get' id='d' from='{user}@b.example/r' to='{to}'><query xmlns='http://jabber.org/protocol/disco#{what}'/></iq>"
        )
    };
    let service = "conference.a.example";
    for (to, what, stranger_too, other_too) in [
        (service, "info", true, true),
        (ROOM, "info", false, true),
        (service, "items", false, false),
    ] {
        assert_eq!(site.local(&question("b1", to, what)).crossed.len(), 1);
        let answer = format!(
            "<iq type='result' id='d' from='{to}'><query xmlns='http://jabber.org/protocol/disco#{what}'><feature var='x'/></query></iq>"
        );
        assert_eq!(site.far(&answer, &["b1@b.example/r"]).delivered.len(), 1);
        assert!(has(
            &site.local(&question("b1", to, what)).delivered,
            &["var='x'", "type='result'", "to='b1@"]
        ));
        assert_eq!(
            site.local(&question("b2", to, what)).delivered.len(),
            usize::from(other_too),
            "{to} {what}"
        );
        assert_eq!(
            site.local(&question("b9", to, what)).delivered.len(),
            usize::from(stranger_too),
            "{to} {what}"
        );
    }
    site.now = at(10_000);
    assert_eq!(site.local(&question("b1", service, "info")).crossed.len(), 1);
}

/// A room of ours at B, and `a1` from the peer in it.
fn hosting() -> Site {
    hosting_with(Site::new(MirrorSettings::default()))
}

fn hosting_with(mut site: Site) -> Site {
    site.up();
    let join =
        "<presence from='a1@a.example/r'><show>chat</show><x xmlns='http://jabber.org/protocol/muc'/></presence>";
    site.far(join, &["mess@conference.b.example/a1"]);
    site.local(&format!(
        "<presence from='mess@conference.b.example/a1' to='a1@a.example/r'><x xmlns='{}'><item affiliation='none' role='participant'/>\
         <status code='110'/></x></presence>",
        ns::MUC_USER
    ));
    site
}

/// While the link is down a far occupant is away for those beside the room, and is itself again afterwards; the peer hears nothing of it.
#[test]
fn far_occupants_are_away_during_a_split() {
    let mut site = hosting();
    let seen = site.split();
    assert_eq!(seen.delivered.len(), 1);
    assert!(has(
        &seen.delivered,
        &[
            "from='a1@a.example/r'",
            "to='mess@conference.b.example/a1'",
            "<show>away</show>"
        ]
    ));
    assert!(!has(&seen.delivered, &["<show>chat</show>"]) && !has(&seen.delivered, &["protocol/muc'"]));
    let reflected = format!(
        "<presence from='mess@conference.b.example/a1' to='a1@a.example/r'><show>away</show><status>The link to this user&apos;s server is \
         down.</status><x xmlns='{}'><item affiliation='none' role='participant'/><status code='110'/></x></presence>",
        ns::MUC_USER
    );
    assert_eq!(site.local(&reflected), Seen::default());
    let seen = site.up();
    assert_eq!(seen.delivered.len(), 1);
    assert!(has(
        &seen.delivered,
        &["<show>chat</show>", "to='mess@conference.b.example/a1'"]
    ));
    assert!(!has(&seen.delivered, &["protocol/muc'"]));
    // Who watches sees both, and what the room only said because of us.
    let stats = site.mirror.stats();
    assert_eq!(
        (stats.splits, stats.heals, stats.caused_bytes),
        (1, 1, reflected.len() as u64)
    );
}

/// A room that has forgotten an occupant says so when asked, and the peer hears it as the room would have said it.
#[test]
fn a_forgotten_occupant_is_told() {
    let mut site = hosting();
    let seen = site.pass(301);
    assert_eq!(seen.asked.len(), 1);
    let id = stanza(&seen.asked[0]).id().unwrap().into_owned();
    let answer = |error: &str| {
        format!(
            "<iq type='error' id='{id}' from='mess@conference.b.example/a1' to='a1@a.example/r'><error type='cancel'><{error} xmlns='{}'/></error></iq>",
            ns::STANZA_ERRORS
        )
    };
    let seen = site.local(&answer("not-acceptable"));
    assert_eq!(seen.crossed.len(), 1);
    assert!(has(
        &seen.crossed,
        &[
            "unavailable",
            "to='a1@a.example/r'",
            "code='110'",
            "code='333'",
            "mess@conference.b.example/a1"
        ]
    ));
    // The same answer again is nobody's.
    assert_eq!(site.local(&answer("not-acceptable")), Seen::default());
    assert_eq!(
        (site.mirror.stats().ghosts, site.mirror.stats().ghosts_returned),
        (1, 0)
    );
    // It comes back, once.
    for _ in 0..2 {
        site.far(
            "<presence from='a1@a.example/r'><x xmlns='http://jabber.org/protocol/muc'/></presence>",
            &["mess@conference.b.example/a1"],
        );
        site.local(&format!(
            "<presence from='mess@conference.b.example/a1' to='a1@a.example/r'><x xmlns='{}'><item affiliation='none' role='participant'/>\
             <status code='110'/></x></presence>",
            ns::MUC_USER
        ));
        assert_eq!(
            (site.mirror.stats().ghosts, site.mirror.stats().ghosts_returned),
            (1, 1)
        );
    }
}

/// An answer that decides nothing (XEP-0410 §3.3) changes nothing.
#[test]
fn an_occupant_is_not_given_up_for_a_doubt() {
    let mut site = hosting();
    let seen = site.pass(301);
    let id = stanza(&seen.asked[0]).id().unwrap().into_owned();
    let answer = format!(
        "<iq type='error' id='{id}' from='mess@conference.b.example/a1' to='a1@a.example/r'><error type='wait'><remote-server-timeout xmlns='{}'/></error></iq>",
        ns::STANZA_ERRORS
    );
    assert_eq!(site.local(&answer), Seen::default());
    assert_eq!(site.mirror.levels().guests, 1);
}

/// The room says that nobody has the nick: it may be that the change to another was lost with a process, or that the room is gone, and
/// only then its guests are out. A change of which half was lost is followed.
#[test]
fn a_guest_under_another_nick_is_not_given_up() {
    let error = |question: &Stanza, condition: &str| {
        format!(
            "<iq type='error' id='{}' from='{}' to='a1@a.example/r'><error type='cancel'><{condition} xmlns='{}'/></error></iq>",
            question.id().unwrap(),
            question.to().unwrap(),
            ns::STANZA_ERRORS
        )
    };
    for (condition, is_lost) in [("forbidden", false), ("item-not-found", true)] {
        let mut site = hosting();
        let changed = format!(
            "<presence from='{MESS}/a1' to='a1@a.example/r' type='unavailable'><x xmlns='{}'><item role='participant' nick='a9'/>\
             <status code='303'/><status code='110'/></x></presence>",
            ns::MUC_USER
        );
        assert_eq!(site.local(&changed).crossed.len(), 1);
        let asked = site.pass(301).asked;
        let is_inside = stanza(&asked[0]);
        assert_eq!(is_inside.to().as_deref(), Some(&*format!("{MESS}/a9")));
        let asked = site.local(&error(&is_inside, "item-not-found")).asked;
        assert!(has(&asked, &["disco#info", &format!("to='{MESS}'")]), "{asked:?}");
        let seen = site.local(&error(&stanza(&asked[0]), condition));
        assert_eq!(seen.crossed.len(), usize::from(is_lost));
        assert_eq!(site.mirror.levels().guests, usize::from(!is_lost));
    }
}

/// A row that cannot be read is dropped, and its room passes as it is.
#[test]
fn an_unreadable_row_is_dropped() {
    let mut site = Site::populated(MirrorSettings::default());
    let key = rows::Kind::Room.key(ROOM, b"");
    site.rows.insert(key, Bytes::from_static(b"\xff"));
    site.mirror = Site::mirror(&site.settings, &site.rows, site.now);
    site.drain();
    assert_eq!(site.rows.len(), 0);
    assert_eq!(site.local(&ping("b1", "b1")).crossed.len(), 1);
}

/// XEP-0203: what waited longer than `delay_stamp_after` tells when it was said; what tells already, or came at once, stays as it is.
#[test]
fn stamps_what_waited() {
    let mut site = Site::populated(MirrorSettings::default());
    site.now.wall = Wall(1_795_167_641_000);
    let said = format!("<message from='{ROOM}/alice' type='groupchat' id='a'><body>x</body></message>");
    let to = ["b1@b.example/r"];
    assert!(!has(&site.far(&said, &to).delivered, &["delay"]));
    site.held = Duration::from_secs(600);
    let seen = site.far(&said, &to);
    assert!(
        has(
            &seen.delivered,
            &["<delay xmlns='urn:xmpp:delay' from='conference.a.example' stamp='2026-11-20T09:30:41Z'/></message>"]
        ),
        "{seen:?}"
    );
    let old = said.replace(
        "</message>",
        "<delay xmlns='urn:xmpp:delay' stamp='2002-09-10T23:08:25Z'/></message>",
    );
    assert_eq!(site.far(&old, &to).delivered[0].matches("<delay").count(), 1);
    assert!(!has(&site.presence("alice", "", &to).delivered, &["delay"]));
}

/// What was said just before the link was found to be down is shown near by then, and not again when the room reflects it.
#[test]
fn what_the_link_took_along_is_shown() {
    let mut site = Site::populated(MirrorSettings::default());
    for id in ["m1", "m2"] {
        assert_eq!(site.local(&say("b1", id)).delivered.len(), 0);
    }
    let reflection =
        |id: &str| format!("<message from='{ROOM}/b1' type='groupchat' id='{id}'><body>hello</body></message>");
    let both = ["b1@b.example/r", "b2@b.example/r"];
    site.far(&reflection("m1"), &both);
    site.down();
    let seen = site.drain();
    assert_eq!(seen.delivered.len(), 2);
    assert!(has(&seen.delivered, &["id='m2'", "to='b2@"]));
    site.mirror.handle_link_up(site.now);
    assert_eq!(site.far(&reflection("m2"), &both).delivered.len(), 0);
}

/// A process that starts during a split goes on with it: nobody is told twice, and joins stay refused.
#[test]
fn a_restart_keeps_the_split() {
    let mut site = Site::populated(MirrorSettings::default());
    site.split();
    site.mirror = Site::mirror(&site.settings, &site.rows, site.now);
    assert_eq!(site.pass(300).delivered.len(), 0);
    assert!(site.join("b3").crossed.is_empty());
    assert!(has(&site.up().delivered, &["/alice'", "to='b1@"]));
}

/// One sender is heard in his order: what he says at once does not overtake what the room has not reflected, also not after a restart.
#[test]
fn echoes_do_not_overtake() {
    for restarts in [false, true] {
        let mut site = Site::populated(MirrorSettings::default());
        assert_eq!(site.local(&say("b1", "m1")).delivered.len(), 0);
        if restarts {
            site.mirror = Site::mirror(&site.settings, &site.rows, site.now);
        } else {
            site.mirror.note_rtt(Some(Duration::from_secs(3)));
        }
        let heard: Vec<String> = site.local(&say("b1", "m2")).delivered;
        let order: Vec<bool> = heard
            .iter()
            .filter(|text| text.contains("to='b2@"))
            .map(|text| text.contains("m1"))
            .collect();
        assert_eq!(order, [true, false], "{restarts}");
    }
}

/// A reflection that comes in two goes (the room took longer than the collapse waits) is swallowed in both.
#[test]
fn a_reflection_in_two_goes_is_heard_once() {
    let mut site = Site::populated(MirrorSettings::default());
    site.down();
    site.local(&say("b1", "m1"));
    site.up();
    let reflection = format!("<message from='{ROOM}/b1' type='groupchat' id='m1'><body>hello</body></message>");
    for to in ["b1@b.example/r", "b2@b.example/r"] {
        assert_eq!(site.far(&reflection, &[to]).delivered.len(), 0);
    }
    assert_eq!(site.far(&reflection, &["b1@b.example/r"]).delivered.len(), 1);
}

/// Who enters just before the link goes is known to those beside him before he is known to be in: he is hidden with the others, and
/// shown with them.
#[test]
fn who_was_entering_is_shown_again() {
    let mut site = Site::populated(MirrorSettings::default());
    site.join("b3");
    site.presence("b3", "", &["b1@b.example/r"]);
    let seen = site.split();
    assert!(has(&seen.delivered, &["/b3'", "unavailable", "to='b1@"]));
    site.mirror.handle_link_up(site.now);
    site.self_presence("b3", "b3@b.example/r");
    // And one who enters while what waited comes.
    site.join("b4");
    assert_eq!(site.presence("b4", "", &["b1@b.example/r"]).delivered.len(), 0);
    site.self_presence("b4", "b4@b.example/r");
    site.mirror.handle_caught_up(site.now);
    let seen = site.drain();
    for nick in ["/alice'", "/b3'", "/b4'"] {
        assert!(has(&seen.delivered, &[nick, "to='b1@"]), "{nick}: {seen:?}");
    }
}

/// Who has asked for another nick before the link went has it when the room reflects what he said since.
#[test]
fn an_echo_follows_its_author_to_another_nick() {
    let mut site = Site::populated(MirrorSettings::default());
    site.local(&format!("<presence from='b1@b.example/r' to='{ROOM}/bee'/>"));
    site.split();
    site.local(&say("b1", "m1"));
    site.mirror.handle_link_up(site.now);
    let away = format!(
        "<presence from='{ROOM}/b1' type='unavailable'><x xmlns='{}'><item affiliation='member' role='participant' nick='bee'/>\
         <status code='303'/></x></presence>",
        ns::MUC_USER
    );
    site.far(&away, &["b2@b.example/r"]);
    site.presence("bee", "", &["b2@b.example/r"]);
    let reflection = format!("<message from='{ROOM}/bee' type='groupchat' id='m1'><body>hello</body></message>");
    assert_eq!(site.far(&reflection, &["b2@b.example/r"]).delivered.len(), 0);
}

/// A change of nick that was lost with a process: its author's words are known all the same, and others' with the same id are not taken
/// for them.
#[test]
fn an_echo_is_known_under_a_nick_that_nobody_was_told() {
    let mut site = Site::populated(MirrorSettings::default());
    site.down();
    site.local(&say("b1", "m1"));
    site.up();
    let both = ["b1@b.example/r", "b2@b.example/r"];
    let said =
        |nick, body| format!("<message from='{ROOM}/{nick}' type='groupchat' id='m1'><body>{body}</body></message>");
    assert_eq!(site.far(&said("alice", "hello"), &both).delivered.len(), 2);
    assert_eq!(site.far(&said("bee", "hello, all"), &both).delivered.len(), 2);
    assert_eq!(site.far(&said("bee", "hello"), &both).delivered.len(), 0);
}

/// ejabberd's presence for a room that is destroyed has no 110.
#[test]
fn a_destroyed_room_is_forgotten() {
    let mut site = Site::populated(MirrorSettings::default());
    for user in ["b1", "b2"] {
        let gone = format!(
            "<presence from='{ROOM}/{user}' type='unavailable'><x xmlns='{}'><destroy/><item affiliation='none' role='none'/></x></presence>",
            ns::MUC_USER
        );
        assert_eq!(site.far(&gone, &[&format!("{user}@b.example/r")]).delivered.len(), 1);
    }
    assert_eq!((site.mirror.levels(), site.rows.len()), (Levels::default(), 0));
}

/// A room that all have left during a split still knows what they were shown, until the room has caught up with it.
#[test]
fn what_was_shown_outlasts_those_who_saw_it() {
    let mut site = Site::populated(MirrorSettings::default());
    site.split();
    site.local(&say("b1", "m1"));
    for user in ["b1", "b2"] {
        site.local(&format!(
            "<presence from='{user}@b.example/r' to='{ROOM}/{user}' type='unavailable'/>"
        ));
    }
    assert_eq!((site.mirror.levels().rooms, site.mirror.levels().sessions), (0, 0));
    site.mirror.handle_link_up(site.now);
    let both = ["b1@b.example/r", "b2@b.example/r"];
    let reflection = format!("<message from='{ROOM}/b1' type='groupchat' id='m1'><body>hello</body></message>");
    assert_eq!(site.far(&reflection, &both).delivered.len(), 0);
    // Of `b2`, who left last, `b1` was not told: nobody hears what the room says to him.
    for (user, codes, to) in [
        ("b1", "<status code='110'/>", 0),
        ("b1", "", 1),
        ("b2", "<status code='110'/>", 1),
    ] {
        let gone = format!(
            "<presence from='{ROOM}/{user}' type='unavailable'><x xmlns='{}'><item affiliation='member' role='none'/>{codes}</x></presence>",
            ns::MUC_USER
        );
        assert_eq!(site.far(&gone, &both[to..][..1]).delivered.len(), 0, "{user} {codes}");
    }
    assert_eq!(site.rows.len(), 0);
}

/// A room of which no more can be written is not mirrored any longer. What tells of it still passes, as it came.
#[test]
fn what_cannot_be_written_passes() {
    let both = ["b1@b.example/r", "b2@b.example/r"];
    let renamed = format!(
        "<presence from='{ROOM}/b1' type='unavailable'><x xmlns='{}'><item affiliation='member' role='participant' nick='bee'/>\
         <status code='303'/></x></presence>",
        ns::MUC_USER
    );
    let left = format!(
        "<presence from='{ROOM}/b1' type='unavailable'><x xmlns='{}'><item affiliation='member' role='none'/><status code='110'/></x></presence>",
        ns::MUC_USER
    );
    let stamped = format!(
        "<message from='{ROOM}/alice' type='groupchat' id='a'><body>x</body><stanza-id xmlns='urn:xmpp:sid:0' by='{ROOM}' id='1'/></message>"
    );
    let came = format!(
        "<presence from='{ROOM}/eve'><x xmlns='{}'><item affiliation='member' role='participant'/></x></presence>",
        ns::MUC_USER
    );
    for (told, to, splits) in [
        (&renamed, &both[..], false),
        (&left, &both[..1], true),
        (&stamped, &both[..], false),
        (&came, &both[..], true),
    ] {
        let mut site = Site::populated(MirrorSettings::default());
        if splits {
            site.split();
        }
        site.local(&say("b1", "m1"));
        site.mirror.handle_link_up(site.now);
        site.drain();
        site.fill_rows();
        assert_eq!(site.far(told, to).delivered.len(), to.len(), "{told}");
        assert_eq!(
            (site.mirror.levels().rooms, site.mirror.stats().overflows),
            (0, 1),
            "{told}"
        );
    }
}

/// What is shown near by before the room has it is written down first: what cannot be is heard once, from the room.
#[test]
fn an_echo_that_cannot_be_written_is_not_shown() {
    let mut site = Site::populated(MirrorSettings::default());
    assert_eq!(site.local(&say("b1", "m1")).delivered.len(), 0);
    site.fill_rows();
    site.down();
    assert_eq!(site.drain().delivered.len(), 0);
    let seen = site.local(&say("b1", "m2"));
    assert_eq!((seen.crossed.len(), seen.delivered.len()), (1, 0));
    site.mirror.handle_link_up(site.now);
    let both = ["b1@b.example/r", "b2@b.example/r"];
    for id in ["m1", "m2"] {
        let reflection = format!("<message from='{ROOM}/b1' type='groupchat' id='{id}'><body>hello</body></message>");
        assert_eq!(site.far(&reflection, &both).delivered.len(), 2);
    }
}

/// Whom a cast is for may be written in a way that is not understood here: then nothing is known of him, and he gets it.
#[test]
fn unreadable_recipients_get_everything() {
    let mut site = Site::populated(MirrorSettings::default());
    site.down();
    site.local(&say("b1", "m1"));
    site.up();
    let (template, to_at, _) = stanza(&format!(
        "<message to='x' from='{ROOM}/b1' type='groupchat' id='m1'><body>hello</body></message>"
    ))
    .split_to()
    .unwrap();
    let attributes = [to_attribute("b1@b.example/r"), Bytes::from_static(b" to='c&who;'")];
    let reflection = cast(template, to_at as u32, attributes.iter());
    let kept = site.mirror.handle_far(reflection, Duration::ZERO, site.now).unwrap();
    assert_eq!(kept.recipients, attributes[1..]);
}

/// A guest of a room of ours that a peer's users are in, too.
fn with_guest(mut site: Site) -> Site {
    site.far(
        "<presence from='a1@a.example/r'><x xmlns='http://jabber.org/protocol/muc'/></presence>",
        &["mess@conference.b.example/a1"],
    );
    site.local(&format!(
        "<presence from='mess@conference.b.example/a1' to='a1@a.example/r'><x xmlns='{}'><item affiliation='none' role='participant'/>\
         <status code='110'/></x></presence>",
        ns::MUC_USER
    ));
    site
}

/// The link comes back for a moment and goes again before all has come, with or without a kill. After the hold those are told who do not
/// know: guests, who were put back, and who has entered since, or a room entered since. Nobody is told twice.
#[test]
fn a_split_that_comes_back_is_told_to_the_rest() {
    for restarts in [false, true] {
        let mut site = with_guest(Site::populated(MirrorSettings::default()));
        assert_eq!(site.split().delivered.len(), 3);
        site.mirror.handle_link_up(site.now);
        site.drain();
        site.join("b3");
        site.presence("alice", "", &["b3@b.example/r"]);
        site.self_presence("b3", "b3@b.example/r");
        let other = "bridge@conference.a.example";
        site.local(&format!(
            "<presence from='b1@b.example/r' to='{other}/b1'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
        ));
        for (nick, codes) in [("carol", ""), ("b1", "<status code='110'/>")] {
            let told = format!(
                "<presence from='{other}/{nick}'><x xmlns='{}'><item affiliation='none' role='participant'/>{codes}</x></presence>",
                ns::MUC_USER
            );
            site.far(&told, &["b1@b.example/r"]);
        }
        site.down();
        site.drain();
        if restarts {
            site.mirror = Site::mirror(&site.settings, &site.rows, site.now);
        }
        assert!(site.pass(299).delivered.is_empty());
        let seen = site.pass(1);
        assert_eq!(seen.delivered.len(), 3, "{seen:?}");
        assert!(has(
            &seen.delivered,
            &["/alice'", "unavailable", "to='b3@", "code='333'"]
        ));
        assert!(has(&seen.delivered, &["/carol'", "unavailable", "to='b1@"]));
        assert!(has(&seen.delivered, &["from='a1@", "<show>away</show>"]));
        assert_eq!(
            site.mirror.poll_timeout().map(|deadline| deadline.why),
            Some("rooms are asked")
        );
        // All of it is put right in the end.
        let seen = site.up();
        for (nick, user) in [
            ("/alice'", "b1"),
            ("/alice'", "b2"),
            ("/alice'", "b3"),
            ("/carol'", "b1"),
        ] {
            assert!(has(&seen.delivered, &[nick, &format!("to='{user}@")]), "{nick} {user}");
        }
        assert!(has(&seen.delivered, &["from='a1@"]));
    }
}

/// Users may say of themselves what we say of them when the link is down: it crosses, except while it is our own word.
#[test]
fn only_our_own_word_is_swallowed() {
    let mut site = hosting();
    let away = format!(
        "<presence from='mess@conference.b.example/a1' to='a1@a.example/r'><show>away</show><status>The link to this user&apos;s server is \
         down.</status><x xmlns='{}'><item affiliation='none' role='participant'/><status code='110'/></x></presence>",
        ns::MUC_USER
    );
    assert_eq!(site.local(&away).crossed.len(), 1);
    site.split();
    assert_eq!(site.local(&away).crossed.len(), 0);
}

/// A room's own presence to an occupant is no wish to enter, whatever else it holds (XEP-0045 §7.2.1).
#[test]
fn only_a_wish_to_enter_makes_a_session() {
    let mut site = Site::new(MirrorSettings::default());
    site.up();
    let of_a_room = format!(
        "<presence from='mess@conference.b.example/x' to='a1@a.example/r'><x xmlns='http://jabber.org/protocol/muc'/><x xmlns='{}'>\
         <item affiliation='none' role='participant'/></x></presence>",
        ns::MUC_USER
    );
    site.local(&of_a_room);
    assert_eq!(site.mirror.levels().sessions, 0);
    assert!(site.mirror.rooms.is_empty());
    let of_a_far_room = of_a_room
        .replace("to='a1@a.example/r'", "")
        .replace("mess@conference.b", "deck@conference.a");
    site.far(&of_a_far_room, &["b1@b.example/r"]);
    assert_eq!(site.mirror.levels().guests, 0);
}

/// A room is asked when its first occupant is due, and nobody is asked when all have left.
#[test]
fn rooms_are_asked_when_the_first_is_due() {
    let mut site = hosting();
    let due = |site: &Site| {
        site.mirror
            .poll_timeout()
            .map(|deadline| deadline.at.since_start().as_secs())
    };
    assert_eq!(due(&site), Some(300));
    site.mirror.handle_leg_up(&domain("conference.b.example"), site.now);
    assert_eq!(due(&site), Some(5));
    assert_eq!(site.pass(5).asked.len(), 1);
    assert_eq!(due(&site), Some(305));
    site.far(
        "<presence from='a1@a.example/r' type='unavailable'></presence>",
        &["mess@conference.b.example/a1"],
    );
    assert_eq!(site.pass(300).asked.len(), 0);
    assert_eq!(due(&site), None);
}

/// Questions that nobody answers do not keep later answers from being remembered: the oldest is forgotten.
#[test]
fn unanswered_questions_are_forgotten() {
    let mut site = Site::populated(MirrorSettings::default());
    let question = |to: &str| {
        format!(
            "<iq type='get' id='d' from='b1@b.example/r' to='{to}'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>"
        )
    };
    for number in 0..2_000 {
        site.local(&question(&format!("r{number}@conference.a.example")).replace("'d'", &format!("'{number}'")));
    }
    assert_eq!(site.local(&question(ROOM)).crossed.len(), 1);
    let answer =
        format!("<iq type='result' id='d' from='{ROOM}'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>");
    site.far(&answer, &["b1@b.example/r"]);
    assert_eq!(site.local(&question(ROOM)).crossed.len(), 0);
}

/// What is set is what happens, whether it is so from the beginning or has been changed since. One setting after the other, each with a value
/// that is not the default's.
#[test]
fn every_setting_is_obeyed() {
    type Change = fn(&mut MirrorSettings);
    let new = |change: Change| {
        let mut settings = MirrorSettings::default();
        change(&mut settings);
        let mut later = Site::new(MirrorSettings::default());
        later.mirror.reconfigure(settings.clone());
        [Site::new(settings), later]
    };
    let populated = |change: Change| new(change).map(Site::with_people);
    let says = |site: &mut Site| site.local(&say("b1", "m1")).delivered.len();

    for mut site in populated(|settings| settings.echo = Echo::Local) {
        assert_eq!(says(&mut site), 2, "at once, although the link is up");
    }
    for (max, echoed) in [(2, 2), (4, 0)] {
        for mut site in populated(if max == 2 {
            |_| {}
        } else {
            |settings| settings.echo_rtt_max = Duration::from_secs(4)
        }) {
            site.mirror.note_rtt(Some(Duration::from_secs(3)));
            assert_eq!(says(&mut site), echoed, "{max}");
        }
    }
    for mut site in populated(|settings| {
        settings.rooms = vec![RoomRule {
            pattern: ROOM.to_owned(),
            echo: Echo::Reflect,
        }];
    }) {
        site.down();
        assert_eq!(says(&mut site), 0, "in this room never");
    }
    for mut site in populated(|settings| settings.split_hold = Duration::from_secs(77)) {
        site.down();
        assert_eq!(site.pass(76), Seen::default());
        assert_eq!(site.pass(1).delivered.len(), 2);
    }
    for mut site in populated(|settings| settings.split_near = SplitNear::Away) {
        let seen = site.split().delivered;
        assert!(seen.len() == 2 && has(&seen, &["<show>away</show>"]), "{seen:?}");
    }
    for site in new(|settings| settings.split_far = SplitFar::Leave) {
        // Of others it is not known who is there.
        let mut site = hosting_with(site);
        site.room_shows("bob", "a1");
        let seen = site.split().delivered;
        assert!(has(&seen, &["unavailable", "from='a1@a.example/r'"]), "{seen:?}");
    }
    for mut site in populated(|settings| settings.split_near = SplitNear::Hold) {
        assert_eq!(site.split(), Seen::default());
    }
    for site in new(|settings| settings.split_far = SplitFar::Hold) {
        assert_eq!(hosting_with(site).split().delivered.len(), 0);
    }
    for (mut site, joined) in populated(|settings| settings.split_join = SplitJoin::Provisional)
        .into_iter()
        .map(|site| (site, true))
        .chain([(Site::populated(MirrorSettings::default()), false)])
    {
        site.is_open();
        site.split();
        assert_eq!(site.join("b3").crossed.len() == 1, joined);
    }
    for mut site in populated(|settings| settings.disco_lifetime = Duration::from_secs(77)) {
        let question = "<iq type='get' id='d' from='b1@b.example/r' to='conference.a.example'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>";
        let answer = "<iq type='result' id='d' from='conference.a.example'><query xmlns='http://jabber.org/protocol/disco#info'/></iq>";
        assert_eq!(site.local(question).crossed.len(), 1);
        site.far(answer, &["b1@b.example/r"]);
        site.now = at(76);
        assert_eq!(site.local(question).crossed.len(), 0);
        site.now = at(78);
        assert_eq!(site.local(question).crossed.len(), 1);
    }
    for mut site in populated(|settings| settings.delay_stamp_after = Duration::from_secs(77)) {
        let said = format!("<message from='{ROOM}/alice' type='groupchat' id='a'><body>x</body></message>");
        for (held, stamped) in [(76, false), (78, true)] {
            site.held = Duration::from_secs(held);
            assert_eq!(
                has(&site.far(&said, &["b1@b.example/r"]).delivered, &["<delay"]),
                stamped,
                "{held}"
            );
        }
    }
    // Only from the beginning.
    let mut site = Site::populated(MirrorSettings {
        enabled: false,
        ..MirrorSettings::default()
    });
    assert_eq!(site.local(&ping("b1", "b1")).crossed.len(), 1);
    assert_eq!((site.split(), says(&mut site)), (Seen::default(), 0));
    site.mirror.reconfigure(MirrorSettings::default());
    assert_eq!(site.local(&ping("b1", "b1")).crossed.len(), 1);
}

const MESS: &str = "mess@conference.b.example";

/// A room of ours with `a1` and `a2` of the peer's users in it, whom it lets in without history.
fn hosting_two() -> Site {
    let mut site = Site::new(MirrorSettings::default());
    site.up();
    for user in ["a1", "a2"] {
        site.asks_to_enter(user);
        site.room_says_in(user);
        site.room_ends(user);
    }
    site
}

impl Site {
    /// Our room lets a guest in.
    fn room_says_in(&mut self, user: &str) -> Seen {
        self.room_lets_in(user, "")
    }

    /// It does so because we have asked for it.
    fn room_repeats(&mut self, user: &str) -> Seen {
        let id = format!(" id='{}'", self.wish);
        self.room_lets_in(user, &id)
    }

    fn room_lets_in(&mut self, user: &str, id: &str) -> Seen {
        self.local(&format!(
            "<presence from='{MESS}/{user}' to='{user}@a.example/r'{id}><x xmlns='{}'><item affiliation='none' role='participant'/>\
             <status code='110'/></x></presence>",
            ns::MUC_USER
        ))
    }

    /// Our room says this to a guest: the ids of what crosses, with whom it is for.
    fn room_says(&mut self, body: &str, to: &str) -> Vec<String> {
        words(&self.local(&room_line(body, to, "")))
    }

    fn room_remembers(&mut self, body: &str, to: &str) -> Vec<String> {
        let delay = format!("<delay xmlns='urn:xmpp:delay' from='{MESS}' stamp='2026-11-20T09:30:41Z'/>");
        words(&self.local(&room_line(body, to, &delay)))
    }

    /// A guest asks to enter, or, if it is inside, to be told all again.
    fn asks_to_enter(&mut self, user: &str) -> Seen {
        let join =
            format!("<presence from='{user}@a.example/r'><x xmlns='http://jabber.org/protocol/muc'/></presence>");
        self.far(&join, &[&format!("{MESS}/{user}")])
    }

    fn room_ends(&mut self, to: &str) -> Vec<String> {
        let subject = format!("<message from='{MESS}' to='{to}@a.example/r' type='groupchat'><subject/></message>");
        words(&self.local(&subject))
    }

    /// Killed and started again. Gives whom the room is asked about.
    fn killed(&mut self) -> Vec<String> {
        self.mirror = Self::mirror(&self.settings, &self.rows, self.now);
        let mut seen = self.drain();
        seen.asked.extend(self.pass(0).asked);
        seen.asked
    }

    /// The room says of a guest that it is in: gives what it is asked then.
    fn is_inside(&mut self, ping: &str) -> Vec<String> {
        let ping = stanza(ping);
        let (from, to, id) = (ping.to().unwrap(), ping.from().unwrap(), ping.id().unwrap());
        let asked = self
            .local(&format!("<iq type='result' from='{from}' to='{to}' id='{id}'/>"))
            .asked;
        let wish = asked.first().and_then(|join| stanza(join).id().map(Cow::into_owned));
        self.wish = wish.unwrap_or_default();
        asked
    }
}

fn room_line(body: &str, to: &str, more: &str) -> String {
    format!("<message from='{MESS}/bob' to='{to}@a.example/r' type='groupchat'><body>{body}</body>{more}</message>")
}

/// What crossed: body, whom for, and whether it tells when it was said.
fn words(seen: &Seen) -> Vec<String> {
    let word = |text: &String| {
        let said = stanza(text);
        let to = said.to().unwrap().split('@').next().unwrap().to_owned();
        let body = text.split("<body>").nth(1).and_then(|rest| rest.split('<').next());
        format!(
            "{}>{to}{}",
            body.unwrap_or("-"),
            if text.contains("<delay") { " late" } else { "" }
        )
    };
    seen.crossed.iter().map(word).collect()
}

/// What a room said when we were killed is found in its history and sent to those who had not got it: in order, once, before what it says
/// next. One of them enters again for it, who was inside.
#[test]
fn lost_words_are_found() {
    let mut site = hosting_two();
    for to in ["a1", "a2"] {
        assert_eq!(site.room_says("one", to), [format!("one>{to}")]);
    }
    site.room_says("two", "a1");
    let asked = site.killed();
    assert_eq!(asked.len(), 1);
    let join = site.is_inside(&asked[0]);
    assert!(
        has(
            &join,
            &[
                "from='a1@a.example/r'",
                &format!("to='{MESS}/a1'"),
                "<history maxstanzas="
            ]
        ),
        "{join:?}"
    );
    // It speaks on before it answers.
    for to in ["a1", "a2"] {
        assert_eq!(site.room_says("four", to), Vec::<String>::new());
    }
    assert_eq!(site.room_repeats("a1").crossed.len(), 1);
    for line in ["zero", "one", "two", "three", "four"] {
        assert_eq!(site.room_remembers(line, "a1"), Vec::<String>::new());
    }
    assert_eq!(
        site.room_ends("a1"),
        [
            "two>a2 late",
            "three>a1 late",
            "three>a2 late",
            "four>a1",
            "four>a2",
            "->a1"
        ]
    );
    assert_eq!(site.mirror.stats().found, 2);
    // And all goes on as before, also through the next kill.
    site.room_says("five", "a1");
    site.room_says("five", "a2");
    let asked = site.killed();
    site.is_inside(&asked[0]);
    site.room_repeats("a1");
    for line in ["three", "four", "five"] {
        site.room_remembers(line, "a1");
    }
    assert_eq!(site.room_ends("a1"), ["->a1"]);
    site.asks_to_enter("a1");
    assert_eq!(site.room_remembers("five", "a1"), ["five>a1 late"]);
}

/// Of a guest that has another nick than we know its room cannot be asked anything: another one is asked about.
#[test]
fn another_asks_for_who_has_another_nick() {
    let mut site = hosting_two();
    site.room_says("one", "a1");
    let asked = stanza(&site.killed()[0]);
    let error = format!(
        "<iq type='error' id='{}' from='{MESS}/a1' to='a1@a.example/r'><error type='cancel'><item-not-found xmlns='{}'/></error></iq>",
        asked.id().unwrap(),
        ns::STANZA_ERRORS
    );
    site.local(&error);
    let asked = site.pass(0).asked;
    assert!(has(&asked, &["from='a2@a.example/r'", "urn:xmpp:ping"]), "{asked:?}");
}

/// A server may write a message copy by copy, and to the next process what the one that was killed had not to be sent: those between get
/// the message from the history.
#[test]
fn a_message_goes_on_where_it_was_cut() {
    let mut site = hosting_two();
    site.far(
        "<presence from='a3@a.example/r'><x xmlns='http://jabber.org/protocol/muc'/></presence>",
        &[&format!("{MESS}/a3")],
    );
    site.room_says_in("a3");
    site.room_says("one", "a1");
    let asked = site.killed();
    assert!(site.room_says("one", "a3").is_empty());
    site.is_inside(&asked[0]);
    site.room_repeats("a1");
    site.room_remembers("one", "a1");
    assert_eq!(site.room_ends("a1"), ["one>a2 late", "one>a3", "->a1"]);
}

/// What a room said to a guest and waits crosses before the guest's leave, whoever tells of that, and not again.
#[test]
fn what_waits_for_who_leaves_comes_first() {
    for by_room in [true, false] {
        let mut site = hosting_two();
        for to in ["a1", "a2"] {
            site.room_says("one", to);
        }
        let asked = site.killed();
        site.is_inside(&asked[0]);
        assert!(site.room_says("two", "a2").is_empty());
        let came = match by_room {
            true => site.local(&format!(
                "<presence from='{MESS}/a2' to='a2@a.example/r' type='unavailable'><x xmlns='{}'><item role='none'/><status code='110'/></x></presence>",
                ns::MUC_USER
            )),
            false => site.far(
                "<presence from='a2@a.example/r' type='unavailable'></presence>",
                &[&format!("{MESS}/a2")],
            ),
        };
        let expected: &[&str] = if by_room { &["two>a2", "->a2"] } else { &["two>a2"] };
        assert_eq!(words(&came), expected);
        site.room_repeats("a1");
        for line in ["one", "two"] {
            site.room_remembers(line, "a1");
        }
        // The copy that came before it may have been lost.
        assert_eq!(site.room_ends("a1"), ["two>a1 late", "->a1"]);
        assert_eq!(site.room_says("three", "a1"), ["three>a1"]);
    }
}

/// Who enters while a room is in doubt has what was lost from the history that it gets; also if the process is killed before that is over.
#[test]
fn who_enters_late_has_the_history() {
    let mut site = hosting_two();
    site.room_says("one", "a1");
    site.room_says("one", "a2");
    site.killed();
    site.far(
        "<presence from='a3@a.example/r'><x xmlns='http://jabber.org/protocol/muc'/></presence>",
        &[&format!("{MESS}/a3")],
    );
    site.room_says_in("a3");
    assert_eq!(site.room_remembers("two", "a3"), ["two>a3 late"]);
    let asked = site.killed();
    site.is_inside(&asked[0]);
    site.room_repeats("a1");
    site.room_remembers("one", "a1");
    site.room_remembers("two", "a1");
    assert_eq!(site.room_ends("a1"), ["two>a1 late", "two>a2 late", "->a1"]);
}

/// The same where the message had come to others live, and waited when it entered.
#[test]
fn who_enters_while_words_wait_has_them() {
    let mut site = hosting_two();
    site.room_says("one", "a1");
    site.room_says("one", "a2");
    let asked = site.killed();
    site.room_says("two", "a1");
    site.room_says("two", "a2");
    assert!(site.mirror.awaits_rooms());
    site.far(
        "<presence from='a3@a.example/r'><x xmlns='http://jabber.org/protocol/muc'/></presence>",
        &[&format!("{MESS}/a3")],
    );
    site.room_says_in("a3");
    assert_eq!(site.room_remembers("two", "a3"), ["two>a3 late"]);
    for asked in [asked, site.killed()] {
        site.is_inside(&asked[0]);
        site.room_repeats("a1");
        site.room_remembers("one", "a1");
        site.room_remembers("two", "a1");
        assert!(!site.room_ends("a1").contains(&"two>a3 late".to_owned()));
        assert!(!site.mirror.awaits_rooms());
        site.killed();
    }
}

/// A process that is killed while words wait keeps them: the next one goes on where it was, and finds what was lost in between, too.
#[test]
fn words_that_wait_outlive_the_process() {
    for (enabled, expected) in [
        (
            true,
            &[
                "two>a1 late",
                "two>a2 late",
                "three>a1",
                "three>a2 late",
                "four>a1 late",
                "four>a2 late",
                "five>a1",
                "five>a2",
                "->a1",
            ][..],
        ),
        (false, &[][..]),
    ] {
        let mut site = hosting_two();
        site.room_says("one", "a1");
        site.room_says("one", "a2");
        site.killed();
        assert!(site.room_says("three", "a1").is_empty());
        site.settings.enabled = enabled;
        site.mirror = Site::mirror(&site.settings, &site.rows, site.now);
        if !enabled {
            assert_eq!(words(&site.drain()), ["three>a1"]);
            assert!(site.rows.is_empty());
            continue;
        }
        let asked = site.pass(0).asked;
        site.is_inside(&asked[0]);
        for to in ["a1", "a2"] {
            assert!(site.room_says("five", to).is_empty());
        }
        site.room_repeats("a1");
        for line in ["one", "two", "three", "four", "five"] {
            site.room_remembers(line, "a1");
        }
        assert_eq!(site.room_ends("a1"), expected);
        assert!(!site.rows.keys().any(|key| key[0] == rows::Kind::Held as u8));
    }
}

/// Where words repeat, as many are missing as there are more of them; and where the last that was sent on is not in the history, nothing
/// is certain, and nothing is sent.
#[test]
fn no_word_is_said_twice() {
    for (history, found) in [
        (&["a", "b", "b"][..], &[][..]),
        (&["a", "b", "b", "b"], &["b>a1 late", "b>a2 late"]),
        (&["b", "b"], &[]),
        (&["c", "d", "e"], &[]),
        (&[], &[]),
    ] {
        let mut site = hosting_two();
        for line in ["a", "b", "b"] {
            for to in ["a1", "a2"] {
                site.room_says(line, to);
            }
        }
        let asked = site.killed();
        site.is_inside(&asked[0]);
        site.room_repeats("a1");
        for line in history {
            site.room_remembers(line, "a1");
        }
        assert_eq!(site.room_ends("a1"), [found, &["->a1"]].concat(), "{history:?}");
    }
}

/// In a room where nothing was said to them yet, all is missing that was said since they are there.
#[test]
fn the_first_words_are_found() {
    let mut site = Site::new(MirrorSettings::default());
    site.up();
    site.now.wall = Wall(1_795_167_000_000);
    site.far(
        "<presence from='a1@a.example/r'><x xmlns='http://jabber.org/protocol/muc'/></presence>",
        &[&format!("{MESS}/a1")],
    );
    site.room_says_in("a1");
    site.room_ends("a1");
    let asked = site.killed();
    site.is_inside(&asked[0]);
    site.room_repeats("a1");
    let old = format!("<delay xmlns='urn:xmpp:delay' from='{MESS}' stamp='2026-11-20T09:00:00.5Z'/>");
    site.local(&room_line("before", "a1", &old));
    site.room_remembers("after", "a1");
    assert_eq!(site.room_ends("a1"), ["after>a1 late", "->a1"]);
}

/// A room that does not answer is not waited for longer than ten seconds, and its answer is then for nobody; nor does it hold back more than
/// there is room for, nor when the guest who was to enter leaves.
#[test]
fn words_do_not_wait_for_ever() {
    let asked_again = || {
        let mut site = hosting_two();
        site.room_says("one", "a1");
        site.room_says("one", "a2");
        let asked = site.killed();
        site.is_inside(&asked[0]);
        assert_eq!(site.room_says("two", "a2"), Vec::<String>::new());
        site
    };
    let mut site = asked_again();
    assert!(site.pass(9).crossed.is_empty());
    assert_eq!(words(&site.pass(1)), ["two>a2"]);
    assert_eq!(site.room_says("three", "a2"), ["three>a2"]);
    site.room_repeats("a1");
    assert_eq!(site.room_remembers("two", "a1"), Vec::<String>::new());
    assert_eq!(site.room_ends("a1"), ["->a1"]);
    site.asks_to_enter("a1");
    assert_eq!(site.room_remembers("two", "a1"), ["two>a1 late"]);

    let mut site = asked_again();
    let large = "x".repeat(100_000);
    let crossed = (0..50).map(|_| site.room_says(&large, "a2").len()).max();
    assert!(crossed > Some(40), "{crossed:?}");

    let mut site = asked_again();
    let left = site.far(
        "<presence from='a1@a.example/r' type='unavailable'></presence>",
        &[&format!("{MESS}/a1")],
    );
    assert_eq!(words(&left), ["two>a2"]);
    assert_eq!(site.mirror.stats().found, 0);
}

/// A guest that is marked as away enters again as that; and a process that is killed before the room has answered is given an answer that the
/// next one has not asked for. In neither case the guest hears again what it has heard.
#[test]
fn what_is_repeated_is_not_for_the_guest() {
    let mut site = hosting_two();
    site.room_says("one", "a1");
    site.room_says("one", "a2");
    site.split();
    let asked = site.killed();
    let join = site.is_inside(&asked[0]);
    assert!(has(&join, &["<show>away</show>", "<history"]), "{join:?}");
    let reflected = |id: &str| {
        format!(
            "<presence from='{MESS}/a1' to='a1@a.example/r' id='{id}'><show>away</show><status>The link to this user&apos;s server is \
         down.</status><x xmlns='{}'><item affiliation='none' role='participant'/><status code='110'/></x></presence>",
            ns::MUC_USER
        )
    };
    assert_eq!(site.local(&reflected(&site.wish.clone())), Seen::default());
    site.killed();
    assert!(site.room_remembers("one", "a1").is_empty());
    let asked = site.killed();
    site.is_inside(&asked[0]);
    site.local(&reflected(&site.wish.clone()));
    assert!(site.room_remembers("one", "a1").is_empty());
    assert_eq!(site.room_ends("a1"), ["->a1"]);
}

/// A room that does not let a guest enter again, who is inside, has refused us and not the guest.
#[test]
fn a_refusal_to_repeat_is_not_the_guests() {
    let mut site = hosting_two();
    site.room_says("one", "a1");
    let asked = site.killed();
    site.is_inside(&asked[0]);
    assert!(site.room_says("two", "a1").is_empty());
    let refusal = |id: &str| {
        format!(
            "<presence type='error' from='{MESS}/a1' to='a1@a.example/r' id='{id}'><error type='auth'><not-authorized xmlns='{}'/></error></presence>",
            ns::STANZA_ERRORS
        )
    };
    assert_eq!(words(&site.local(&refusal(&site.wish.clone()))), ["two>a1"]);
    assert_eq!(site.local(&refusal("own")).crossed.len(), 1);
    assert_eq!(site.mirror.levels().guests, 2);
}

/// A guest that the room has forgotten does not enter again in this way: it is told, and another is asked about.
#[test]
fn who_is_out_does_not_enter_again() {
    let mut site = hosting_two();
    site.room_says("one", "a1");
    let asked = site.killed();
    let ping = stanza(&asked[0]);
    let (from, to, id) = (ping.to().unwrap(), ping.from().unwrap(), ping.id().unwrap());
    let seen = site.local(&format!(
        "<iq type='error' from='{from}' to='{to}' id='{id}'><error type='cancel'><not-acceptable xmlns='{}'/></error></iq>",
        ns::STANZA_ERRORS
    ));
    assert!(has(&seen.crossed, &["unavailable", "to='a1@a.example/r'"]));
    assert!(seen.asked.is_empty());
    let asked = site.pass(0).asked;
    assert!(asked.len() == 1 && has(&asked, &["from='a2@", "<ping"]), "{asked:?}");
    assert!(has(&site.is_inside(&asked[0]), &["from='a2@", "<history"]));
}

/// A room repeats our own word about a guest also when it tells everybody another role: that is news beyond the link, and goes on as the guest
/// itself would have it said.
#[test]
fn a_new_role_of_who_is_away_is_told() {
    let mut site = hosting_two();
    let told = |role: &str, status: &str, to: &str| {
        let item = format!("<item affiliation='none' role='{role}'/>");
        room_presence("a1", to, "", &item).replacen('>', &format!(">{status}"), 1)
    };
    let away = "<show>away</show><status>The link to this user&apos;s server is down.</status>";
    assert!(has(&site.split().delivered, &["<show>away</show>"]));
    assert_eq!(site.local(&told("participant", away, "a2")), Seen::default());
    // And everything that it says of this one then, also if it is the first role again.
    for role in ["visitor", "participant"] {
        let crossed = site.local(&told(role, away, "a2")).crossed;
        assert_eq!(crossed, [told(role, "", "a2")]);
        site.mirror = Site::mirror(&site.settings, &site.rows, site.now);
    }
    assert!(has(&site.up().delivered, &["to='mess@conference.b.example/a1'"]));
    assert_eq!(site.local(&told("visitor", "", "a2")).crossed.len(), 1);
    assert!(!site.split().delivered.is_empty());
    assert_eq!(site.local(&told("participant", away, "a2")), Seen::default());
}

/// What we say in a guest's name has ids of ours; that a room refuses it, since the guest is out, is no news for the guest.
#[test]
fn refusals_of_what_we_have_said_stay_here() {
    let mut site = hosting_two();
    let said = stanza(&site.split().delivered[0]);
    let refusal = |id: &str| {
        room_presence("a1", "a1", &format!(" type='error' id='{id}'"), "")
            .replace("</presence>", "<error type='cancel'/></presence>")
    };
    assert_eq!(site.local(&refusal(&said.id().unwrap())), Seen::default());
    assert_eq!(site.local(&refusal("own")).crossed.len(), 1);
}

/// A guest that the room puts out while we ask for it is let in by what we have asked: it leaves, and hears of neither.
#[test]
fn who_is_let_in_for_nobody_leaves() {
    let mut site = hosting_two();
    site.room_says("one", "a1");
    let asked = site.killed();
    site.is_inside(&asked[0]);
    let kick = "<item affiliation='none' role='none'/><status code='110'/><status code='307'/>";
    let out = |item: &str| room_presence("a1", "a1", " type='unavailable'", item);
    assert_eq!(site.local(&out(kick)).crossed.len(), 1);
    let seen = site.room_repeats("a1");
    assert!(has(
        &seen.asked,
        &[
            "type='unavailable'",
            "from='a1@a.example/r'",
            "mess@conference.b.example/a1"
        ]
    ));
    assert!(seen.crossed.is_empty());
    assert!(site.room_remembers("one", "a1").is_empty());
    assert!(site.room_ends("a1").is_empty());
    let left = "<item affiliation='none' role='none'/><status code='110'/>";
    assert_eq!(site.local(&out(left)).crossed.len(), 1);
    // From then on all is its own again.
    site.asks_to_enter("a1");
    assert_eq!(site.room_says_in("a1").crossed.len(), 1);
    assert_eq!(site.room_remembers("one", "a1"), ["one>a1 late"]);
}

/// One that has left by itself while we ask for it has the answers to what it has said, and not ours.
#[test]
fn who_leaves_while_we_ask_hears_its_own_answers() {
    let mut site = hosting_two();
    site.room_says("one", "a1");
    let asked = site.killed();
    site.is_inside(&asked[0]);
    let leave = "<presence from='a1@a.example/r' type='unavailable'></presence>";
    site.far(leave, &[&format!("{MESS}/a1")]);
    assert!(site.room_repeats("a1").asked.is_empty());
    assert!(site.room_remembers("one", "a1").is_empty());
    assert!(site.room_ends("a1").is_empty());
    assert_eq!(site.room_says("two", "a1"), ["two>a1"]);
    let left = "<item affiliation='none' role='none'/><status code='110'/>";
    let left = room_presence("a1", "a1", " type='unavailable'", left);
    assert_eq!(site.local(&left).crossed.len(), 1);
}

/// A guest that the room puts out before it hears that it wants to enter once more, still wants that: what it is told then is watched.
#[test]
fn who_asks_while_it_is_put_out_still_asks() {
    let mut site = hosting_two();
    site.asks_to_enter("a1");
    let kick = "<item affiliation='none' role='none'/><status code='110'/><status code='307'/>";
    site.local(&room_presence("a1", "a1", " type='unavailable'", kick));
    assert_eq!(site.mirror.levels().guests, 2);
    site.room_says_in("a1");
    site.room_ends("a1");
    assert!(has(
        &site.split().delivered,
        &["from='a1@a.example/r'", "<show>away</show>"]
    ));
}

/// Who enters while nothing is in doubt has from the history what others, as it turns out after a kill, have not: up to its last line, or, if
/// it asked for none, up to its coming.
#[test]
fn what_was_told_on_entering_is_not_found_again() {
    for with_history in [true, false] {
        let mut site = hosting_two();
        site.now.wall = Wall(1_795_167_041_000);
        for to in ["a1", "a2"] {
            site.room_says("one", to);
        }
        site.far(
            "<presence from='a3@a.example/r'><x xmlns='http://jabber.org/protocol/muc'/></presence>",
            &[&format!("{MESS}/a3")],
        );
        site.room_says_in("a3");
        if with_history {
            for line in ["one", "two"] {
                assert_eq!(site.room_remembers(line, "a3"), [format!("{line}>a3 late")]);
            }
        }
        site.room_ends("a3");
        let asked = site.killed();
        site.is_inside(&asked[0]);
        site.room_repeats("a1");
        for line in ["one", "two"] {
            site.room_remembers(line, "a1");
        }
        assert_eq!(site.room_ends("a1"), ["two>a1 late", "two>a2 late", "->a1"]);
    }
}

/// A session that has left and wants to enter again is not forgotten when the room refuses what it had said in between.
#[test]
fn a_refusal_of_something_else_is_not_of_the_wish_to_enter() {
    let mut site = Site::populated(MirrorSettings::default());
    let leave = format!("<presence from='b1@b.example/r' to='{ROOM}/b1' type='unavailable'/>");
    site.local(&leave);
    site.local(&format!(
        "<presence from='b1@b.example/r' to='{ROOM}/b1' id='again'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
    ));
    let out = format!(
        "<presence from='{ROOM}/b1' type='unavailable'><x xmlns='{}'><item role='none'/><status code='110'/></x></presence>",
        ns::MUC_USER
    );
    site.far(&out, &["b1@b.example/r"]);
    let refused = |id: &str| {
        format!(
            "<presence from='{ROOM}/b1' type='error'{id}><error type='cancel'><item-not-found xmlns='{}'/></error></presence>",
            ns::STANZA_ERRORS
        )
    };
    site.far(&refused(""), &["b1@b.example/r"]);
    assert!(site.mirror.rooms[ROOM].sessions.contains_key("b1@b.example/r"));
    site.far(&refused(" id='again'"), &["b1@b.example/r"]);
    assert!(!site.mirror.rooms[ROOM].sessions.contains_key("b1@b.example/r"));
}

/// A room's word reaches its hearers in two goes, and the link is lost between: who has not heard it is shown it before what its author said
/// later, and who has, is not.
#[test]
fn a_word_that_the_link_has_cut_is_shown_to_the_rest() {
    let mut site = Site::populated(MirrorSettings::default());
    for id in ["one", "two"] {
        site.local(&say("b1", id));
    }
    let reflected = format!("<message from='{ROOM}/b1' type='groupchat' id='one'><body>one</body></message>");
    assert_eq!(site.far(&reflected, &["b2@b.example/r"]).delivered.len(), 1);
    let seen = site.split();
    let shown = |id: &str, to: &str| {
        let of =
            |text: &&String| text.contains(&format!("id='{id}'")) && text.contains(&format!("to='{to}@b.example/r'"));
        seen.delivered.iter().position(|text| of(&text))
    };
    assert!(
        shown("one", "b1").is_some() && shown("one", "b1") < shown("two", "b1"),
        "{seen:?}"
    );
    assert!(shown("one", "b2").is_none() && shown("two", "b2").is_some(), "{seen:?}");
    site.up();
    assert!(site.far(&reflected, &["b1@b.example/r"]).delivered.is_empty());
}

/// A process goes on with its numbers where the last one was, as far as somebody compares with them: an echo is not taken for one that came
/// before a wish to enter again.
#[test]
fn numbers_of_echoes_are_not_given_again() {
    let mut site = Site::populated(MirrorSettings::default());
    site.local(&say("b1", "one"));
    site.local(&format!(
        "<presence from='b1@b.example/r' to='{ROOM}/b1' id='again'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
    ));
    let reflected =
        |id: &str| format!("<message from='{ROOM}/b1' type='groupchat' id='{id}'><body>{id}</body></message>");
    site.far(&reflected("one"), &["b1@b.example/r", "b2@b.example/r"]);
    site.mirror = Site::mirror(&site.settings, &site.rows, site.now);
    site.local(&say("b1", "two"));
    site.split();
    site.up();
    let again = format!(
        "<presence from='{ROOM}/b1' id='again'><x xmlns='{}'><item affiliation='member' role='participant'/><status code='110'/></x></presence>",
        ns::MUC_USER
    );
    site.far(&again, &["b1@b.example/r"]);
    assert!(
        site.far(&reflected("two"), &["b1@b.example/r", "b2@b.example/r"])
            .delivered
            .is_empty()
    );
}

impl Site {
    /// Somebody has asked what the room is: open to all.
    fn is_open(&mut self) {
        self.local(&format!(
            "<iq type='get' id='i' from='b1@b.example/r' to='{ROOM}'><query xmlns='{}'/></iq>",
            ns::DISCO_INFO
        ));
        let features = ["muc_open", "muc_unsecured", "muc_unmoderated"].map(|var| format!("<feature var='{var}'/>"));
        self.far(
            &format!(
                "<iq type='result' id='i' from='{ROOM}'><query xmlns='{}'>{}</query></iq>",
                ns::DISCO_INFO,
                features.concat()
            ),
            &["b1@b.example/r"],
        );
    }

    /// `b3` has entered an open room during a split, as those beside it see it.
    fn with_a_provisional_guest() -> (Self, Seen) {
        let mut site = Self::populated(MirrorSettings {
            split_join: SplitJoin::Provisional,
            ..MirrorSettings::default()
        });
        site.is_open();
        let nobody = format!(
            "<presence from='{ROOM}/b2'><x xmlns='{}'><item affiliation='none' role='participant'/></x></presence>",
            ns::MUC_USER
        );
        site.far(&nobody, &["b1@b.example/r"]);
        site.split();
        let seen = site.join("b3");
        (site, seen)
    }

    fn refuses(&mut self, user: &str, condition: &str) -> Seen {
        self.far(
            &format!(
                "<presence from='{ROOM}/{user}' type='error'><error type='cancel'><{condition} xmlns='{}'/></error></presence>",
                ns::STANZA_ERRORS
            ),
            &[&format!("{user}@b.example/r")],
        )
    }
}

/// `split.join: provisional`: who enters an open room during a split is let in by those beside it, in XEP-0045's order, and talks with them.
/// The room is asked, and tells it the rest.
#[test]
fn who_enters_during_a_split_is_let_in_near_by() {
    let (mut site, seen) = Site::with_a_provisional_guest();
    assert_eq!(seen.crossed.len(), 1);
    let own: Vec<&String> = seen.delivered.iter().filter(|text| text.contains("to='b3@")).collect();
    let order = ["/b1'", "/b2'", "code='110'", "<subject/>"];
    assert_eq!(own.len(), order.len(), "{own:?}");
    for (text, part) in own.iter().zip(order) {
        assert!(text.contains(part), "{text}");
    }
    for user in ["b1", "b2"] {
        assert!(has(
            &seen.delivered,
            &["/b3'", &format!("to='{user}@"), "role='participant'"]
        ));
    }
    assert!(!has(&seen.delivered, &["alice"]));
    assert_eq!(site.local(&say("b3", "m1")).delivered.len(), 3);
    assert!(has(
        &site.local(&ping("b3", "b3")).delivered,
        &["remote-server-timeout"]
    ));
    // A process that is killed knows it.
    site.mirror = Site::mirror(&site.settings, &site.rows, site.now);

    site.up();
    assert_eq!(site.local(&ping("b3", "b3")).crossed.len(), 1);
    assert_eq!(site.presence("alice", "", &["b3@b.example/r"]).delivered.len(), 1);
    let both = ["b1@b.example/r", "b2@b.example/r"];
    assert_eq!(site.presence("b3", "", &both).delivered.len(), 2);
    assert_eq!(site.self_presence("b3", "b3@b.example/r").delivered.len(), 1);
    assert_eq!(site.local(&ping("b3", "b3")).delivered.len(), 1);
    let reflection = format!("<message from='{ROOM}/b3' type='groupchat' id='m1'><body>hello</body></message>");
    assert_eq!(
        site.far(&reflection, &["b1@b.example/r", "b3@b.example/r"])
            .delivered
            .len(),
        0
    );
}

/// The room refuses it when the link is back: it is told that it is out, those beside it see it go, and who heard it is told that the room
/// has not. Whoever has taken the nick meanwhile has it.
#[test]
fn who_is_refused_after_all_is_out() {
    for taken in [false, true] {
        let (mut site, _) = Site::with_a_provisional_guest();
        site.local(&say("b3", "m1"));
        site.mirror.handle_link_up(site.now);
        site.drain();
        let both = ["b1@b.example/r", "b2@b.example/r"];
        if taken {
            assert_eq!(site.presence("b3", "<show>xa</show>", &both).delivered.len(), 2);
        }
        let seen = site.refuses("b3", "conflict");
        assert!(has(&seen.delivered, &["conflict", "to='b3@"]));
        assert!(has(
            &seen.delivered,
            &["to='b3@", "unavailable", "code='110'", "code='333'"]
        ));
        for user in ["b1", "b2"] {
            let gone = ["/b3'", "unavailable", &format!("to='{user}@")];
            assert_eq!(has(&seen.delivered, &gone), !taken);
        }
        let error = format!(
            "<message from='{ROOM}' type='error' id='m1'><error type='modify'><not-acceptable xmlns='{}'/></error></message>",
            ns::STANZA_ERRORS
        );
        assert!(has(
            &site.far(&error, &["b3@b.example/r"]).delivered,
            &["not accepted", "to='b1@"]
        ));
        site.mirror.handle_caught_up(site.now);
        site.drain();
        assert_eq!(site.mirror.levels().sessions, 2);
        assert_eq!(site.mirror.rooms[ROOM].occupants.contains_key("b3"), taken);
    }
}

/// Nobody is let in near by under a nick that another has, nor where it is not known that the room is open.
#[test]
fn nobody_is_let_in_near_by_in_doubt() {
    let (mut site, _) = Site::with_a_provisional_guest();
    for nick in ["alice", "b1", "b3"] {
        let seen = site.local(&format!(
            "<presence from='b4@b.example/r' to='{ROOM}/{nick}'><x xmlns='http://jabber.org/protocol/muc'/></presence>"
        ));
        assert!(
            seen.crossed.is_empty() && has(&seen.delivered, &["<conflict ", "to='b4@"]),
            "{nick}"
        );
    }
    // Nor does anybody have a voice there whom the room may not give one.
    let mut moderated = Site::populated(MirrorSettings {
        split_join: SplitJoin::Provisional,
        ..MirrorSettings::default()
    });
    moderated.is_open();
    moderated.split();
    assert!(has(&moderated.join("b3").delivered, &["/b3'", "role='visitor'"]));
    let seen = moderated.local(&say("b3", "m1"));
    assert!(seen.crossed.is_empty() && has(&seen.delivered, &["<forbidden ", "to='b3@"]));
    let mut closed = Site::populated(MirrorSettings {
        split_join: SplitJoin::Provisional,
        ..MirrorSettings::default()
    });
    closed.split();
    assert!(has(&closed.join("b3").delivered, &["remote-server-timeout", "to='b3@"]));
    // It leaves as it came: those beside it see it, and the room hears both.
    let seen = site.local(&format!(
        "<presence from='b3@b.example/r' to='{ROOM}/b3' type='unavailable'/>"
    ));
    assert_eq!(seen.crossed.len(), 1);
    assert!(has(&seen.delivered, &["/b3'", "unavailable", "to='b1@"]));
    assert!(has(&seen.delivered, &["unavailable", "to='b3@", "code='110'"]) && !has(&seen.delivered, &["333"]));
    assert_eq!(site.mirror.levels().sessions, 2);
}

/// A room of ours with `bob` of our own users, and `a1` and `a2` of the peer's, who are taken out of it while the link is down.
fn hosting_leavers() -> Site {
    let mut site = Site::new(MirrorSettings {
        split_far: SplitFar::Leave,
        ..MirrorSettings::default()
    });
    site.up();
    for user in ["a1", "a2"] {
        site.enters(user);
    }
    site
}

impl Site {
    fn enters(&mut self, user: &str) {
        let join = format!(
            "<presence from='{user}@a.example/r'><x xmlns='http://jabber.org/protocol/muc'><password>se&amp;same</password></x></presence>"
        );
        self.far(&join, &[&format!("{MESS}/{user}")]);
        self.room_shows("bob", user);
        for other in ["a1", "a2"].iter().filter(|other| **other != user) {
            let address = format!("{other}@a.example/r");
            if self.mirror.primary.is_tracked(MESS, &address) {
                self.room_shows(other, user);
                self.room_shows(user, other);
            }
        }
        self.room_says_in(user);
        self.room_ends(user);
    }

    /// Our room shows an occupant to a guest.
    fn room_shows(&mut self, nick: &str, to: &str) -> Seen {
        self.local(&room_presence(
            nick,
            to,
            "",
            "<item affiliation='none' role='participant'/>",
        ))
    }

    /// Our room tells a guest that somebody has left.
    fn room_hides(&mut self, nick: &str, to: &str, more: &str) -> Seen {
        let item = format!("<item affiliation='none' role='none'/>{more}");
        let status = "<status>The link to this user&apos;s server is down.</status>";
        let text = room_presence(nick, to, " type='unavailable'", &item);
        self.local(&text.replacen('>', &format!(">{status}"), 1))
    }

    /// The guests are out, and the room has said so to them.
    fn all_out(&mut self) {
        let seen = self.split();
        assert_eq!(seen.delivered.len(), 2, "{seen:?}");
        assert!(has(
            &seen.delivered,
            &["unavailable", "from='a1@a.example/r'", "<status>"]
        ));
        for (nick, to, own) in [
            ("a1", "a2", ""),
            ("a1", "a1", "<status code='110'/>"),
            ("a2", "a2", "<status code='110'/>"),
        ] {
            assert_eq!(self.room_hides(nick, to, own), Seen::default());
        }
    }

    /// The room lets a guest in again, and tells it of these.
    fn lets_back(&mut self, user: &str, others: &[&str]) -> Vec<String> {
        let mut crossed: Vec<String> = others
            .iter()
            .flat_map(|nick| self.room_shows(nick, user).crossed)
            .collect();
        crossed.extend(self.room_says_in(user).crossed);
        crossed
    }
}

fn room_presence(nick: &str, to: &str, more: &str, item: &str) -> String {
    format!(
        "<presence from='{MESS}/{nick}' to='{to}@a.example/r'{more}><x xmlns='{}'>{item}</x></presence>",
        ns::MUC_USER
    )
}

/// Guests leave, and are in again when the link is back, with their password; what the room says of both stays here. What was said
/// meanwhile comes out of the history, after what they had heard; who is gone is gone; nothing else crosses.
#[test]
fn guests_that_were_out_are_told_what_is_new() {
    let mut site = hosting_leavers();
    for user in ["a1", "a2"] {
        assert_eq!(site.room_says("one", user), [format!("one>{user}")]);
    }
    site.all_out();
    let seen = site.up();
    assert_eq!(seen.delivered.len(), 2, "{seen:?}");
    assert!(has(
        &seen.delivered,
        &["from='a1@a.example/r'", "<password>se&amp;same</password>", "<history "]
    ));
    // `bob` has left, and `eve` has come.
    let crossed = site.lets_back("a1", &["eve"]);
    assert_eq!(crossed.len(), 2, "{crossed:?}");
    assert!(has(&crossed, &["mess@conference.b.example/eve", "to='a1@a.example/r'"]));
    assert!(has(&crossed, &["mess@conference.b.example/bob", "unavailable"]));
    for line in ["zero", "one", "two", "three"] {
        assert_eq!(site.room_remembers(line, "a1"), [""; 0]);
    }
    assert_eq!(site.room_ends("a1"), ["two>a1 late", "three>a1 late"]);
    // Those who are in see the other come, and had never seen it go.
    assert_eq!(site.room_shows("a2", "a1"), Seen::default());
    assert_eq!(site.room_says("four", "a1"), ["four>a1"]);
    let stats = site.mirror.stats();
    assert_eq!((stats.splits, stats.heals, stats.found), (1, 1, 2));
}

/// What a guest has said meanwhile is said when it is in again; one that has left meanwhile does not come back, and those who were shown it
/// are told.
#[test]
fn a_guest_comes_back_before_its_words() {
    let mut site = hosting_leavers();
    site.all_out();
    site.mirror.handle_link_up(site.now);
    let said = "<message from='a1@a.example/r' type='groupchat'><body>hello</body></message>";
    let seen = site.far(said, &[MESS]);
    assert_eq!(seen.delivered.len(), 2);
    assert!(seen.delivered[0].contains("protocol/muc'") && seen.delivered[1].contains("hello"));
    let seen = site.far(
        "<presence from='a2@a.example/r' type='unavailable'></presence>",
        &[&format!("{MESS}/a2")],
    );
    assert_eq!(seen.crossed.len(), 2, "{seen:?}");
    assert!(has(&seen.crossed, &["to='a2@a.example/r'", "code='110'"]));
    assert!(has(
        &seen.crossed,
        &["to='a1@a.example/r'", "mess@conference.b.example/a2"]
    ));
    site.mirror.handle_caught_up(site.now);
    assert_eq!(site.drain().delivered, [""; 0]);
}

/// Where the history does not reach back to what was heard, that is said; what is in it comes.
#[test]
fn a_gap_is_announced() {
    let mut site = hosting_leavers();
    for user in ["a1", "a2"] {
        site.room_says("one", user);
    }
    site.all_out();
    site.up();
    site.lets_back("a1", &["bob"]);
    site.room_remembers("eight", "a1");
    site.room_remembers("nine", "a1");
    let words = site.room_ends("a1");
    assert_eq!(words.len(), 3, "{words:?}");
    assert!(words[0].contains("may be missing"));
    assert_eq!(words[1..], ["eight>a1 late", "nine>a1 late"]);
    // A subject that is new crosses.
    site.lets_back("a2", &["bob"]);
    let subject =
        format!("<message from='{MESS}/bob' to='a2@a.example/r' type='groupchat'><subject>new</subject></message>");
    let seen = site.local(&subject);
    assert!(has(&seen.crossed, &["<subject>new"]), "{seen:?}");
}

/// A room that does not let a guest in again: its client is told that it is out and why, and the others that it is gone. With a nick that
/// was taken it goes on under another.
#[test]
fn who_is_not_let_back_is_told() {
    let refuse = |condition: &str| {
        format!(
            "<presence from='{MESS}/a1' to='a1@a.example/r' type='error'><error type='auth'><{condition} xmlns='{}'/></error></presence>",
            ns::STANZA_ERRORS
        )
    };
    for (condition, code) in [
        ("forbidden", "301"),
        ("registration-required", "322"),
        ("not-authorized", "333"),
    ] {
        let mut site = hosting_leavers();
        site.all_out();
        site.up();
        let seen = site.local(&refuse(condition));
        assert_eq!(seen.crossed.len(), 2, "{seen:?}");
        assert!(has(
            &seen.crossed,
            &["to='a1@a.example/r'", "code='110'", &format!("code='{code}'")]
        ));
        assert!(has(
            &seen.crossed,
            &["to='a2@a.example/r'", "mess@conference.b.example/a1"]
        ));
        assert_eq!(site.mirror.levels().guests, 1);
    }
    let mut site = hosting_leavers();
    site.all_out();
    site.up();
    let seen = site.local(&refuse("conflict"));
    assert!(has(&seen.crossed, &["code='303'", "code='110'", "nick='a1_'"]));
    assert!(has(
        &seen.delivered,
        &["to='mess@conference.b.example/a1_'", "protocol/muc'"]
    ));
    let renamed = room_presence(
        "a1_",
        "a1",
        "",
        "<item affiliation='none' role='participant'/><status code='110'/>",
    );
    assert!(has(&site.local(&renamed).crossed, &["mess@conference.b.example/a1_"]));
}

/// A room that is made anew by who comes back is not the one that it was in.
#[test]
fn nobody_makes_a_room_anew() {
    let mut site = hosting_leavers();
    site.all_out();
    site.up();
    let made = room_presence(
        "a1",
        "a1",
        "",
        "<item affiliation='owner' role='moderator'/><status code='110'/><status code='201'/>",
    );
    let seen = site.local(&made);
    assert_eq!(seen.delivered.len(), 2);
    assert!(has(&seen.delivered, &["unavailable", "from='a1@a.example/r'"]));
    for user in ["a1", "a2"] {
        assert!(has(
            &seen.crossed,
            &[&format!("to='{user}@a.example/r'"), "code='110'", "code='333'"]
        ));
    }
    assert_eq!(site.mirror.levels().guests, 0);
}

/// Killed in any state of it, a process goes on where it was; a room that had answered a part is asked again, and nothing is said twice.
#[test]
fn a_kill_does_not_lose_who_is_out() {
    let mut site = hosting_leavers();
    for user in ["a1", "a2"] {
        site.room_says("one", user);
    }
    site.split();
    site.killed();
    for (nick, own) in [("a1", "<status code='110'/>"), ("a2", "<status code='110'/>")] {
        assert_eq!(site.room_hides(nick, nick, own), Seen::default());
    }
    site.killed();
    assert_eq!(site.up().delivered.len(), 2);
    site.lets_back("a1", &["bob"]);
    site.room_remembers("one", "a1");
    site.room_remembers("two", "a1");
    assert_eq!(site.killed(), [""; 0]);
    assert_eq!(site.up().delivered.len(), 2);
    assert_eq!(site.lets_back("a1", &["bob"]), [""; 0]);
    for line in ["one", "two"] {
        assert_eq!(site.room_remembers(line, "a1"), [""; 0]);
    }
    assert_eq!(site.room_ends("a1"), ["two>a1 late"]);
    // The first answer, which comes late, is for nobody.
    assert_eq!(site.room_remembers("two", "a1"), [""; 0]);
}

/// A room in which nobody is but guests might not outlive their leave, and nobody there sees whether they hear.
#[test]
fn guests_among_themselves_stay() {
    let mut site = hosting_leavers();
    for user in ["a1", "a2"] {
        let bob = room_presence(
            "bob",
            user,
            " type='unavailable'",
            "<item affiliation='none' role='none'/>",
        );
        assert_eq!(site.local(&bob).crossed.len(), 1);
    }
    assert_eq!(site.split().delivered, [""; 0]);
}

/// Of a room whose last guest has left nothing remains, not even what only that one was shown: numbers of sessions are given again in the next.
#[test]
fn what_guests_were_shown_goes_with_them() {
    let mut site = hosting_leavers();
    for user in ["a1", "a2"] {
        let item = "<item affiliation='none' role='none'/><status code='110'/><status code='307'/>";
        site.local(&room_presence(user, user, " type='unavailable'", item));
    }
    let kinds = [rows::Kind::Seen, rows::Kind::SeenOccupant].map(|kind| kind as u8);
    let left = site.rows.keys().filter(|key| kinds.contains(&key[0])).count();
    assert_eq!(left, 0);
}

/// While a guest is out another takes its nick, and then it leaves for good: those who see the other are told that the one has gone, and
/// then of the other again.
#[test]
fn another_with_the_nick_of_who_left_is_shown_again() {
    let mut site = hosting_leavers();
    site.all_out();
    site.up();
    site.lets_back("a2", &["bob", "a1"]);
    site.room_ends("a2");
    let other = room_presence("a1", "a2", "", "<item affiliation='member' role='participant'/>");
    site.local(&other);
    let leave = "<presence from='a1@a.example/r' type='unavailable'></presence>";
    site.far(leave, &[&format!("{MESS}/a1")]);
    let refused =
        room_presence("a1", "a1", " type='error'", "").replace("</presence>", "<error type='cancel'/></presence>");
    let told = site.local(&refused).crossed;
    let of_a2: Vec<&String> = told
        .iter()
        .filter(|text| text.contains("to='a2@a.example/r'"))
        .collect();
    assert_eq!(of_a2.len(), 2, "{told:?}");
    assert!(
        of_a2[0].contains("unavailable") && of_a2[1].contains("affiliation='member'"),
        "{told:?}"
    );
}

/// A guest that is in and asks to enter again is shown those who are out because of the link, whom the room does not know; and hears of it if
/// one of them does not come back.
#[test]
fn who_enters_again_sees_who_is_out() {
    let mut site = hosting_leavers();
    site.all_out();
    site.up();
    site.lets_back("a2", &["bob"]);
    site.room_ends("a2");
    site.asks_to_enter("a2");
    site.room_shows("bob", "a2");
    let told = site.room_says_in("a2").crossed;
    assert!(
        told.len() == 2 && told[0].contains("mess@conference.b.example/a1"),
        "{told:?}"
    );
    let leave = "<presence from='a1@a.example/r' type='unavailable'></presence>";
    site.far(leave, &[&format!("{MESS}/a1")]);
    let refused =
        room_presence("a1", "a1", " type='error'", "").replace("</presence>", "<error type='cancel'/></presence>");
    let told = site.local(&refused).crossed;
    assert!(
        has(
            &told,
            &["unavailable", "mess@conference.b.example/a1", "to='a2@a.example/r'"]
        ),
        "{told:?}"
    );
}

/// That one has left crosses, also if another session of its nick is out because of the link.
#[test]
fn a_leave_of_another_session_is_one() {
    let mut site = hosting_leavers();
    site.all_out();
    site.up();
    site.lets_back("a2", &["bob"]);
    site.room_ends("a2");
    let gone = room_presence(
        "a1",
        "a2",
        " type='unavailable'",
        "<item affiliation='none' role='none'/>",
    );
    assert_eq!(site.local(&gone).crossed.len(), 1);
    assert_eq!(site.room_hides("a1", "a2", ""), Seen::default());
}
