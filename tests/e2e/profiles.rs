//! What the settings for a kind of link do on such a link.

use std::{
    fmt,
    thread::sleep,
    time::{Duration, Instant},
};

use narrows_lab::{
    Capture, Ejabberd, Layout, Profile, Prosody, SidecarSpec, Way,
    client::{Client, Failure, Outcome},
    load::numbered,
};

use crate::{cast::Cast, stage::stand};

/// Fifteen round trips on the worst of these links, and what waits for its turn.
const PATIENCE: Duration = Duration::from_secs(180);

/// Between two messages: a talk, not a flood.
const SAID_EVERY: Duration = Duration::from_secs(4);

/// Short wave: 2400 bit/s, 3 s one way.
fn hf() -> Profile {
    Profile::both(Way {
        rate_bps: Some(2_400),
        // About 27 s at this rate.
        buffer_bytes: Some(8_192),
        delay: Duration::from_secs(3),
        ..Way::default()
    })
}

#[derive(Debug)]
struct Figures {
    /// Bytes at IP level: entering, talking, being silent.
    joins: u64,
    talk: u64,
    idle: u64,
    /// From the near speaker to the far listener: the median and the longest.
    median: Duration,
    longest: Duration,
    /// Times that a link came up, at both ends.
    connects: f64,
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "bytes to enter {}, to talk {}, in silence {}; a word takes {:.2} s, at most {:.2} s; links came up {} times",
            self.joins,
            self.talk,
            self.idle,
            self.median.as_secs_f64(),
            self.longest.as_secs_f64(),
            self.connects
        )
    }
}

/// Seven people in a room, five of them behind the link; one types before each of so many words. Then nobody says anything for a while.
fn talk(name: &str, link: Profile, profile: Option<&str>, words: usize, silence: Duration) -> Outcome<Figures> {
    let spec = SidecarSpec::new(env!("CARGO_BIN_EXE_narrows"));
    let spec = profile
        .into_iter()
        .fold(spec, |spec, profile| spec.key("profile", profile));
    let stand = stand(
        name,
        link,
        Prosody::stock(),
        Ejabberd::stock(),
        0,
        Layout::Sidecar(spec),
    );
    let world = &stand.world;
    let capture = Capture::begin(&world.link);
    let mut cast = Cast::gather(world, "talk")?;
    cast.settle(PATIENCE)?;
    let joins = capture.bytes();

    let capture = Capture::begin(&world.link);
    for n in 0..words {
        cast.alice.message(
            &cast.room,
            "groupchat",
            "<composing xmlns='http://jabber.org/protocol/chatstates'/>",
        )?;
        sleep(SAID_EVERY / 2);
        cast.say(n % 2, "and so on")?;
        sleep(SAID_EVERY / 2);
    }
    cast.settle(PATIENCE)?;
    let talk = capture.bytes();

    let capture = Capture::begin(&world.link);
    sleep(silence);
    let idle = capture.bytes();

    let outcomes = cast.outcomes();
    // Near copies of what is said here are shown at once on the slowest, before the room has put it in order: that is no fault.
    if outcomes.lost() + outcomes.returned + outcomes.room.doubled + outcomes.talk_doubled > 0
        || !outcomes.expelled.is_empty()
    {
        return Err(Failure(outcomes.to_string()));
    }
    let mut took = waits(&cast, &cast.far[4]);
    took.sort_unstable();
    let mut connects = 0.0;
    for site in [&world.a, &world.b] {
        connects += site.sidecar().metrics()?.sum("narrows_link_connects_total", &[]);
    }
    Ok(Figures {
        joins,
        talk,
        idle,
        median: took[took.len() / 2],
        longest: took[took.len() - 1],
        connects,
    })
}

/// How long each word of alice took to a listener.
fn waits(cast: &Cast<'_>, listener: &Client) -> Vec<Duration> {
    let heard = listener.transcript();
    let marks = heard.iter().filter(|stanza| stanza.kind() == "groupchat");
    marks
        .filter_map(|stanza| {
            let mark = numbered(stanza)?;
            let said: Instant = *cast.said_at.get(&mark).filter(|_| mark.0 == "alice")?;
            Some((listener.connected_at() + stanza.at).saturating_duration_since(said))
        })
        .collect()
}

/// On short wave people talk, nothing is lost, nobody falls out, and one connection does for all of it: no silence there is taken for an
/// outage.
#[test]
fn short_wave_carries_a_talk_on_one_connection() {
    let figures =
        talk("hf", hf(), Some("hf"), 8, Duration::from_secs(10)).unwrap_or_else(|failure| panic!("{failure}"));
    println!("{figures}");
    assert_eq!(figures.connects, 2.0, "{figures}");
}

/// Prints what each profile does on a link of its kind, beside the defaults. For the README; takes half an hour.
#[test]
#[ignore = "measures"]
fn profiles_beside_the_defaults() {
    for (name, link) in [
        ("lan", Profile::lan()),
        ("vsat", Profile::vsat128k()),
        ("satcom", Profile::sat9600()),
        ("hf", hf()),
    ] {
        for profile in [None, Some(name)] {
            match talk(name, link, profile, 20, Duration::from_secs(60)) {
                Ok(figures) => println!("{name}, {}: {figures}", profile.unwrap_or("defaults")),
                Err(failure) => println!("{name}, {}: {failure}", profile.unwrap_or("defaults")),
            }
        }
    }
}
