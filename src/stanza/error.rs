//! Stanza errors (RFC 6120 §8.3) that we originate.
//!
//! An error is an answer to a client, or to a server that has asked something. It never goes where
//! a MUC might be: rooms take errors for the end of an occupant and expel it, which is what this
//! program exists to prevent.

use bytes::Bytes;

use super::{Kind, Stanza, escape_text, ns, resource_of};

/// The defined conditions that we send ourselves (RFC 6120 §8.3.3).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Condition {
    ResourceConstraint,
    RemoteServerTimeout,
    PolicyViolation,
    ServiceUnavailable,
    NotAcceptable,
    Forbidden,
    Conflict,
}

impl Condition {
    /// The element's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ResourceConstraint => "resource-constraint",
            Self::RemoteServerTimeout => "remote-server-timeout",
            Self::PolicyViolation => "policy-violation",
            Self::ServiceUnavailable => "service-unavailable",
            Self::NotAcceptable => "not-acceptable",
            Self::Forbidden => "forbidden",
            Self::Conflict => "conflict",
        }
    }

    /// Whether Prosody and ejabberd expel an occupant from whom a message error with this condition comes
    /// (measured; of other conditions they make a private message).
    fn expels(self) -> bool {
        match self {
            Self::RemoteServerTimeout | Self::ServiceUnavailable => true,
            Self::ResourceConstraint
            | Self::PolicyViolation
            | Self::NotAcceptable
            | Self::Forbidden
            | Self::Conflict => false,
        }
    }
}

/// RFC 6120 §8.3.2
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ErrorType {
    Cancel,
    Modify,
    Auth,
    Wait,
}

impl ErrorType {
    /// The value of the `type` attribute.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Modify => "modify",
            Self::Auth => "auth",
            Self::Wait => "wait",
        }
    }
}

/// The answer that returns `stanza` to its sender, or `None` where an answer is not allowed or would do harm:
/// to an error or result (RFC 6120 §8.3.1), to any presence but a user's wish to enter a room (a MUC expels on
/// `presence type='error'`, and never asks for that), and to a bare room or other address without a resource that may be a room (ejabberd expels on any `message type='error'` to the bare room).
pub fn bounce(stanza: &Stanza, error_type: ErrorType, condition: Condition, text: &str) -> Option<Bytes> {
    is_answerable(stanza, condition)
        .then(|| answer(stanza, error_type, condition, text))
        .flatten()
}

/// The same for whoever sent it, who must be known not to be a room. `None` if it lacks an address.
///
/// The payload is not returned (XEP-0205: an answer must not amplify what it answers).
pub fn answer(stanza: &Stanza, error_type: ErrorType, condition: Condition, text: &str) -> Option<Bytes> {
    let (from, to) = (stanza.raw_to()?, stanza.raw_from()?);
    Some(error(stanza, from, to, error_type, condition, text))
}

/// An error in the place of an IQ result, on the same way: whoever asked does not wait for what will not come.
pub fn refused_result(result: &Stanza, text: &str) -> Option<Stanza> {
    let (from, to) = (result.raw_from()?, result.raw_to()?);
    let error = error(result, from, to, ErrorType::Modify, Condition::PolicyViolation, text);
    Stanza::parse(error).ok()
}

/// The error in `stanza`'s place with these addresses, as written and quoted.
fn error(stanza: &Stanza, from: &[u8], to: &[u8], error_type: ErrorType, condition: Condition, text: &str) -> Bytes {
    let name = stanza.kind().as_str().as_bytes();
    let mut error = Vec::with_capacity(256 + from.len() + to.len() + text.len());
    // The values are copied as they were written, with their quotes, so they need no escapes of ours.
    error.extend_from_slice(&[b"<", name, b" type='error' from=", from, b" to=", to].concat());
    if let Some(id) = stanza.raw_id() {
        error.extend_from_slice(&[b" id=", id].concat());
    }
    error.push(b'>');
    if stanza.kind() == Kind::Presence {
        // By this clients know which of a room's errors are about their joining or their nick (XEP-0045, examples 21 to 27 and 54).
        error.extend_from_slice(format!("<x xmlns='{}'/>", ns::MUC).as_bytes());
    }
    let (error_type, condition, namespace) = (error_type.as_str(), condition.as_str(), ns::STANZA_ERRORS);
    error.extend_from_slice(format!("<error type='{error_type}'><{condition} xmlns='{namespace}'/>").as_bytes());
    if !text.is_empty() {
        let text = escape_text(text);
        error.extend_from_slice(format!("<text xmlns='{namespace}' xml:lang='en'>{text}</text>").as_bytes());
    }
    error.extend_from_slice(&[b"</error></", name, b">"].concat());
    error.into()
}

fn is_answerable(stanza: &Stanza, condition: Condition) -> bool {
    let stanza_type = stanza.stanza_type();
    match (stanza.kind(), stanza_type.as_deref()) {
        // XEP-0045 §7.2: who may not enter is told so by the room.
        (Kind::Presence, None) => is_from_client(stanza) && stanza.is_join(),
        (Kind::Presence, Some(_)) => false,
        // "An entity that receives an IQ request of type 'get' or 'set' MUST reply." Rooms do not expel on these.
        (Kind::Iq, Some("get" | "set")) => true,
        (Kind::Iq, _) => false,
        (Kind::Message, Some("error")) => false,
        // RFC 6121 §8.5: a headline that cannot be delivered is dropped in silence.
        (Kind::Message, Some("headline")) => false,
        (Kind::Message, Some("groupchat")) => is_from_client(stanza) && !is_for_client(stanza),
        // A private message of a room has the same form as one to a room.
        (Kind::Message, _) => is_from_client(stanza) && !(condition.expels() && stanza.has_muc_user()),
    }
}

/// Whether the sender's address has a resource: a client's, or an occupant's.
fn is_from_client(stanza: &Stanza) -> bool {
    stanza.from().is_some_and(|from| resource_of(&from).is_some())
}

/// A group message to a full address comes from a room, one to a bare address goes to a room (XEP-0045 §7.4).
fn is_for_client(stanza: &Stanza) -> bool {
    stanza.to().is_some_and(|to| resource_of(&to).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(text: &str, condition: Condition) -> Option<String> {
        let stanza = Stanza::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap();
        bounce(&stanza, ErrorType::Wait, condition, "").map(|bytes| String::from_utf8(bytes.to_vec()).unwrap())
    }

    /// Every case of who is answered: (stanza, by an error that expels from rooms, by one that does not).
    #[test]
    fn answers_clients_and_askers_but_never_rooms() {
        const USER: &str = "u@a.example/r";
        const BARE: &str = "u@a.example";
        const ROOM: &str = "room@conference.a.example";
        const NICK: &str = "room@conference.a.example/n";
        let far = "v@b.example/r";
        let plain = "<body>x</body>";
        let x = "<x xmlns='http://jabber.org/protocol/muc#user'/>";
        let muc = "<x xmlns='http://jabber.org/protocol/muc'><password>p</password></x>";
        let both = "<x xmlns='http://jabber.org/protocol/muc'/><x xmlns='http://jabber.org/protocol/muc#user'/>";
        let table = [
            // A client's messages, to a client, an account, a room.
            ("message", "chat", USER, far, plain, true, true),
            ("message", "chat", USER, "v@b.example", plain, true, true),
            ("message", "normal", USER, far, plain, true, true),
            ("message", "", USER, far, plain, true, true),
            ("message", "groupchat", USER, "room@b.example", plain, true, true),
            // A room's messages, and what cannot be told from them.
            ("message", "groupchat", NICK, far, plain, false, false),
            ("message", "groupchat", ROOM, far, plain, false, false),
            ("message", "groupchat", ROOM, "v@b.example", plain, false, false),
            ("message", "groupchat", BARE, "room@b.example", plain, false, false),
            ("message", "", ROOM, far, x, false, false),
            ("message", "chat", BARE, far, plain, false, false),
            ("message", "chat", "a.example", far, plain, false, false),
            ("message", "chat", NICK, far, x, false, true),
            ("message", "", NICK, far, x, false, true),
            // Never an error for an error, nor for what wants no answer.
            ("message", "error", USER, far, plain, false, false),
            ("message", "headline", USER, far, plain, false, false),
            ("iq", "error", USER, far, plain, false, false),
            ("iq", "result", USER, far, plain, false, false),
            ("iq", "", USER, far, plain, false, false),
            // A user's wish to enter a room; and presences that only look like one.
            ("presence", "", USER, "room@b.example/n", muc, true, true),
            ("presence", "", USER, "room@b.example/n", "", false, false),
            ("presence", "", USER, "room@b.example", muc, false, false),
            ("presence", "", USER, "b.example/n", muc, false, false),
            ("presence", "", BARE, "room@b.example/n", muc, false, false),
            ("presence", "", ROOM, far, muc, false, false),
            ("presence", "", NICK, far, x, false, false),
            ("presence", "", NICK, far, both, false, false),
            ("presence", "unavailable", USER, "room@b.example/n", muc, false, false),
            ("presence", "error", USER, "room@b.example/n", muc, false, false),
            ("presence", "unavailable", USER, far, "", false, false),
            ("presence", "subscribe", BARE, "v@b.example", "", false, false),
            ("presence", "probe", BARE, "v@b.example", "", false, false),
            ("presence", "error", NICK, far, "", false, false),
            // Whoever asks is told.
            ("iq", "get", USER, far, plain, true, true),
            ("iq", "set", BARE, far, plain, true, true),
            ("iq", "get", ROOM, far, plain, true, true),
            ("iq", "get", NICK, far, plain, true, true),
            ("iq", "get", "a.example", "b.example", plain, true, true),
        ];
        for (name, stanza_type, from, to, payload, by_expelling, by_other) in table {
            let stanza_type = match stanza_type {
                "" => String::new(),
                stanza_type => format!(" type='{stanza_type}'"),
            };
            let text = format!("<{name} from='{from}' to='{to}'{stanza_type} id='1'>{payload}</{name}>");
            for (condition, expected) in [
                (Condition::RemoteServerTimeout, by_expelling),
                (Condition::ServiceUnavailable, by_expelling),
                (Condition::ResourceConstraint, by_other),
                (Condition::PolicyViolation, by_other),
            ] {
                assert_eq!(answer(&text, condition).is_some(), expected, "{condition:?} for {text}");
            }
        }
    }

    /// Addresses are swapped, the id is kept, all exactly as they were written; the payload is left out.
    #[test]
    fn swaps_the_addresses_as_written() {
        let text =
            "<iq id=\"a'&quot;b\" to='b.example' type='get' from=\"o'neil@a.example/&gt;\"><query xmlns='q'/></iq>";
        let stanza = Stanza::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap();
        let error = bounce(&stanza, ErrorType::Wait, Condition::RemoteServerTimeout, "a < b").unwrap();
        assert_eq!(
            str::from_utf8(&error).unwrap(),
            "<iq type='error' from='b.example' to=\"o'neil@a.example/&gt;\" id=\"a'&quot;b\"><error type='wait'>\
             <remote-server-timeout xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/>\
             <text xmlns='urn:ietf:params:xml:ns:xmpp-stanzas' xml:lang='en'>a &lt; b</text></error></iq>"
        );
        let error = Stanza::parse(error).unwrap();
        assert!(error.is_error());
        assert_eq!(
            bounce(&error, ErrorType::Cancel, Condition::ServiceUnavailable, ""),
            None
        );
    }

    /// The room tells a user who may not enter, and says that it is about entering.
    #[test]
    fn a_refused_join_is_answered_by_the_room() {
        let join = "<presence from='u@a.example/r' to='room@b.example/n' id='j'><x xmlns='http://jabber.org/protocol/muc'/></presence>";
        assert_eq!(
            answer(join, Condition::ResourceConstraint).unwrap(),
            "<presence type='error' from='room@b.example/n' to='u@a.example/r' id='j'><x xmlns='http://jabber.org/protocol/muc'/>\
             <error type='wait'><resource-constraint xmlns='urn:ietf:params:xml:ns:xmpp-stanzas'/></error></presence>"
        );
    }

    /// Without both addresses there is nobody to answer; without an id the answer has none.
    #[test]
    fn needs_both_addresses() {
        assert_eq!(
            answer("<iq type='get' from='a.example'/>", Condition::ResourceConstraint),
            None
        );
        assert_eq!(
            answer("<iq type='get' to='a.example'/>", Condition::ResourceConstraint),
            None
        );
        let error = answer(
            "<iq type='get' from='a.example' to='b.example'/>",
            Condition::ResourceConstraint,
        )
        .unwrap();
        assert!(!error.contains(" id="));
    }
}
