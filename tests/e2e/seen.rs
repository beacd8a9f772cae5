//! What a client was told and shown, as the tests of rooms ask for it.

use std::{
    collections::BTreeSet,
    thread::sleep,
    time::{Duration, Instant},
};

use narrows_lab::client::{Client, Failure, Outcome, Stanza};

/// For anything that is to come: a process that was killed, a server that restarts, on two loaded cores.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The presence of an occupant, of this type.
pub fn presence_of(client: &Client, what: &str, occupant: &str, kind: &str, patience: Duration) -> Outcome<Stanza> {
    client.expect(&format!("{what}, for {}", client.user()), patience, |stanza| {
        stanza.is_presence() && stanza.from() == occupant && stanza.kind() == kind
    })
}

pub fn hears(client: &Client, body: &str) -> Outcome {
    let wanted = |stanza: &Stanza| stanza.is_message() && stanza.body().as_deref() == Some(body);
    client
        .expect(&format!("{body:?}, for {}", client.user()), PATIENCE, wanted)
        .map(drop)
}

/// What a client heard in a room, in its order.
pub fn heard(client: &Client) -> Vec<String> {
    let transcript = client.transcript().into_iter();
    transcript
        .filter(|stanza| stanza.kind() == "groupchat")
        .filter_map(|stanza| stanza.body())
        .collect()
}

/// How often a body was heard.
pub fn heard_times(client: &Client, body: &str) -> usize {
    let transcript = client.transcript();
    transcript
        .iter()
        .filter(|stanza| stanza.is_message() && stanza.kind() != "error" && stanza.body().as_deref() == Some(body))
        .count()
}

/// Who a client thinks is in the room, after all it was told.
pub fn roster(client: &Client, room: &str) -> BTreeSet<String> {
    let mut here = BTreeSet::new();
    for stanza in client.transcript() {
        if let Some(nick) = stanza.from().strip_prefix(&format!("{room}/"))
            && stanza.is_presence()
        {
            match stanza.kind() {
                "" => here.insert(nick.to_owned()),
                "unavailable" => here.remove(nick),
                _ => false,
            };
        }
    }
    here
}

/// Waits until a client thinks that these are in the room.
pub fn sees(client: &Client, room: &str, everybody: &BTreeSet<String>) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let here = roster(client, room);
        if here == *everybody {
            return Ok(());
        }
        if Instant::now() > deadline {
            return Err(Failure(format!("{} sees {here:?}", client.user())));
        }
        sleep(Duration::from_millis(50));
    }
}

/// Whether a client was ever told that it is out itself.
pub fn was_put_out(client: &Client) -> bool {
    let transcript = client.transcript();
    transcript
        .iter()
        .any(|stanza| stanza.is_presence() && stanza.kind() == "unavailable" && stanza.has_status("110"))
}
