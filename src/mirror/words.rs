//! Stanzas as a mirror writes them, and what it reads in those of others.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    time::{Duration, UNIX_EPOCH},
};

use bytes::Bytes;

use super::{muc::MucUser, room::Version};
use crate::{
    codec::{
        entry::Cast,
        xml::{Element, Node},
    },
    stanza::{Stanza, domain_of, escape_attribute, escape_text, ns},
    time::Now,
};

/// The stanza as a tree.
pub fn node_of(stanza: &Stanza) -> Node {
    Element {
        namespace: ns::SERVER.to_owned(),
        name: stanza.kind().as_str().to_owned(),
        bytes: stanza.bytes().clone(),
    }
    .node()
}

/// An unavailable presence such as the room would send if the link had made it lose this occupant, as a template: `to` goes to the
/// end of the tag's name.
pub fn lost_presence(occupant: &str, muc: &MucUser, codes: &[u16]) -> (Bytes, u32) {
    let mut text = format!(
        "<presence from='{}' type='unavailable'><x xmlns='{}'>",
        escape_attribute(occupant),
        ns::MUC_USER
    );
    for item in &muc.items {
        text.push_str(&format!(
            "<item affiliation='{}' role='none'",
            escape_attribute(&item.affiliation)
        ));
        if let Some(jid) = &item.jid {
            text.push_str(&format!(" jid='{}'", escape_attribute(jid)));
        }
        text.push_str("/>");
    }
    for code in codes {
        text.push_str(&format!("<status code='{code}'/>"));
    }
    text.push_str("</x></presence>");
    (text.into(), "<presence".len() as u32)
}

pub fn has_body(node: &Node) -> bool {
    node.child(ns::SERVER, "body").is_some()
}

/// What a message says, as a mark.
pub fn body_mark(node: &Node) -> u64 {
    let body = node.child(ns::SERVER, "body").map_or("", |body| &body.text);
    mark_of(&[body.as_bytes()])
}

/// FNV-1a, with the parts kept apart. It is the same in every process, and a mark stands for what one site's own users or server said: nobody gains by
/// making two alike.
pub fn mark_of(parts: &[&[u8]]) -> u64 {
    let fold = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
    let bytes = parts.iter().flat_map(|part| part.iter().copied().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, fold)
}

/// XEP-0203: the template of a message with the time at which its server said it, unless it tells one already.
pub fn stamped(stanza: &Stanza, held: Duration, now: Now) -> Option<Bytes> {
    let node = node_of(stanza);
    if !has_body(&node) || stanza.is_error() || node.child(ns::DELAY, "delay").is_some() {
        return None;
    }
    let said_ms = now.wall.0.saturating_sub(u64::try_from(held.as_millis()).ok()?);
    // Not in the name of a room: rooms strip what claims to be theirs.
    let from = escape_attribute(domain_of(&stanza.from()?)).into_owned();
    let delay = format!("<delay xmlns='{}' from='{from}' stamp='{}'/>", ns::DELAY, utc(said_ms));
    // The place of `to` lies before it.
    stanza.with_child(&delay)?.split_to().map(|(template, _, _)| template)
}

/// XEP-0082 §3.2, to the second.
pub fn utc(unix_ms: u64) -> String {
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_millis(unix_ms)).to_string()
}

/// Whether this is an id of ours, or of a process before this one.
pub fn is_ours(id: &str) -> bool {
    number_of(id).is_some_and(|number| number.starts_with(['p', 's']))
}

/// Whether under it we have asked that this guest be let in again: a room tells all sessions of a nick what one of them has asked.
pub fn is_wish_of(id: &str, guest: &str) -> bool {
    number_of(id).is_some_and(|number| number.ends_with(&wish_of(guest)))
}

/// How such an id ends.
pub fn wish_of(guest: &str) -> String {
    format!(".{:x}", mark_of(&[guest.as_bytes()]) as u32)
}

fn number_of(id: &str) -> Option<&str> {
    Some(id.strip_prefix("narrows-")?.split_once('-')?.1)
}

/// XEP-0359 §3: whether the room has stamped the message with an id of its own.
pub fn gives_id(stanza: &Stanza, room: &str) -> bool {
    let node = node_of(stanza);
    node.children_in(ns::STANZA_ID)
        .any(|child| child.name == "stanza-id" && child.attribute("by") == Some(room))
}

/// XEP-0421: as it stands in the occupant's presence, for his messages.
pub fn occupant_id(presence: &Node) -> Option<String> {
    let id = presence.child(ns::OCCUPANT_ID, "occupant-id")?.attribute("id")?;
    Some(format!(
        "<occupant-id xmlns='{}' id='{}'/>",
        ns::OCCUPANT_ID,
        escape_attribute(id)
    ))
}

/// What is read beside the name of somebody beyond a link that is down. It also tells us our own word when it comes back.
pub const AWAY: &str = "The link to this user's server is down.";

/// The same presence, away because of the link.
pub fn away_presence(version: &Version) -> Option<(Bytes, u32)> {
    let away = away(&version.stanza()?)?;
    // Nothing before the place of `to` has changed.
    Some((away.bytes().clone(), version.to_at))
}

/// A presence that says away because of the link, and otherwise what it said.
pub fn away(presence: &Stanza) -> Option<Stanza> {
    let bare = presence
        .without_child(ns::SERVER, "show")?
        .without_child(ns::SERVER, "status")?;
    bare.with_child("<show>away</show>")?
        .with_child(&format!("<status>{}</status>", escape_text(AWAY)))
}

/// The same from a room, as it would say it of one who is there and has said this.
pub fn undo_away(shown: &Stanza, presence: &Stanza) -> Option<Stanza> {
    let mut shown = shown
        .without_child(ns::SERVER, "show")?
        .without_child(ns::SERVER, "status")?;
    for name in ["show", "status"] {
        if let Some(said) = presence.child_text(ns::SERVER, name) {
            shown = shown.with_child(&said)?;
        }
    }
    Some(shown)
}

/// What a template says, as a mark. Prosody writes the attributes of one tag in any order.
pub fn form_of(template: &Bytes) -> u64 {
    fn write(node: &mut Node, out: &mut Vec<u8>) {
        node.attributes.sort();
        let attributes = node.attributes.iter().flat_map(|(name, value)| [name, value]);
        for part in [&node.namespace, &node.name, &node.text].into_iter().chain(attributes) {
            out.extend_from_slice(part.as_bytes());
            out.push(0);
        }
        out.push(1);
        for child in &mut node.children {
            write(child, out);
        }
        out.push(2);
    }
    let mut out = Vec::new();
    match Stanza::parse(template.clone()) {
        Ok(stanza) => write(&mut node_of(&stanza), &mut out),
        Err(_) => out.extend_from_slice(template),
    }
    mark_of(&[&out])
}

pub fn to_attribute(address: &str) -> Bytes {
    format!(" to='{}'", escape_attribute(address)).into()
}

/// The address in a `to` attribute as a server writes it.
pub fn address_in(attribute: &Bytes) -> Option<String> {
    let text = std::str::from_utf8(attribute).ok()?;
    let start = text.find(['\'', '"'])?;
    let value = text.get(start + 1..text.len().checked_sub(1)?)?;
    quick_xml::escape::unescape(value).ok().map(Cow::into_owned)
}

pub fn cast<'a>(template: Bytes, to_at: u32, recipients: impl Iterator<Item = &'a Bytes>) -> Cast {
    let sorted: BTreeSet<Bytes> = recipients.cloned().collect();
    Cast {
        template,
        to_at,
        recipients: sorted.into_iter().collect(),
    }
}

/// A cast of our own, to these addresses.
pub fn cast_to<'a>(template: Bytes, to_at: u32, addresses: impl Iterator<Item = &'a String>) -> Cast {
    let attributes: Vec<Bytes> = addresses.map(|address| to_attribute(address)).collect();
    cast(template, to_at, attributes.iter())
}

/// The cast for its other recipients, if there are any. An address that cannot be read is none of these.
pub fn without(mut cast: Cast, withheld: &BTreeSet<String>) -> Option<Cast> {
    if !withheld.is_empty() {
        cast.recipients
            .retain(|attribute| address_in(attribute).is_none_or(|address| !withheld.contains(&address)));
    }
    (!cast.recipients.is_empty()).then_some(cast)
}
