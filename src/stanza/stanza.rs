//! One stanza: its exact bytes, and where in them the addressing is.

use std::{borrow::Cow, ops::Range, str};

use bytes::Bytes;
use memchr::memmem;
use quick_xml::{
    NsReader, Reader, XmlVersion,
    events::{BytesStart, Event, attributes::Attribute},
    name::{Namespace, PrefixDeclaration, QName, ResolveResult},
};

use super::{bare, escape_attribute, ns, resource_of};

/// RFC 6120 §8.2
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Kind {
    Message,
    Presence,
    Iq,
}

impl Kind {
    /// The element's name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Message => "message",
            Self::Presence => "presence",
            Self::Iq => "iq",
        }
    }
}

/// A stanza as it came: a single well-formed element in `jabber:server` without a prefix.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Stanza {
    bytes: Bytes,
    kind: Kind,
    places: Places,
}

/// Where the addressing is: the values as written, between their quotes.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Places {
    stanza_type: Option<Range<usize>>,
    id: Option<Range<usize>>,
    from: Option<Range<usize>>,
    to: Option<Range<usize>>,
    /// All of the `to` attribute, from the white space before it to the closing quote.
    to_attribute: Range<usize>,
}

impl Stanza {
    /// Finds the addressing in an element that [`crate::codec::xml`] has let through.
    pub fn parse(bytes: Bytes) -> Result<Self, StanzaError> {
        let text = str::from_utf8(&bytes).map_err(|_| StanzaError::Malformed)?;
        let tag = match Reader::from_str(text).read_event() {
            Ok(Event::Start(tag) | Event::Empty(tag)) => tag,
            _ => return Err(StanzaError::Malformed),
        };
        let kind = match tag.name().0 {
            "message" => Kind::Message,
            "presence" => Kind::Presence,
            "iq" => Kind::Iq,
            _ => return Err(StanzaError::NotAStanza),
        };
        let places = Places::find(text, &tag)?;
        Ok(Self { bytes, kind, places })
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The `type` attribute, unescaped.
    pub fn stanza_type(&self) -> Option<Cow<'_, str>> {
        self.value(&self.places.stanza_type)
    }

    pub fn id(&self) -> Option<Cow<'_, str>> {
        self.value(&self.places.id)
    }

    pub fn from(&self) -> Option<Cow<'_, str>> {
        self.value(&self.places.from)
    }

    pub fn to(&self) -> Option<Cow<'_, str>> {
        self.value(&self.places.to)
    }

    /// Whether it is of type `error` (RFC 6120 §8.3).
    pub fn is_error(&self) -> bool {
        self.stanza_type().is_some_and(|value| value == "error")
    }

    /// Cuts the `to` attribute out: the bytes without it (nor the white space before it), the offset where it stood, and the
    /// attribute exactly as written (white space, name, quotes and escapes), so that joining them again is byte-exact.
    pub fn split_to(&self) -> Option<(Bytes, usize, Bytes)> {
        self.places.to.as_ref()?;
        let Range { start, end } = self.places.to_attribute.clone();
        let template = [&self.bytes[..start], &self.bytes[end..]].concat();
        // A copy, so that the small attribute does not keep the whole stanza in memory.
        let attribute = Bytes::copy_from_slice(&self.bytes[start..end]);
        Some((template.into(), start, attribute))
    }

    /// The inverse of [`split_to`](Self::split_to). An offset beyond the template means its end.
    pub fn join(template: &[u8], to_at: usize, to_attribute: &[u8]) -> Bytes {
        let (before, after) = template.split_at(to_at.min(template.len()));
        [before, to_attribute, after].concat().into()
    }

    /// Whether a MUC's extended information (XEP-0045 §14.1 `muc#user`) holds the status `code`, such as `110` for self-presence.
    pub fn has_muc_status(&self, code: &str) -> bool {
        self.muc_user_children(|tag| {
            tag.local_name().into_inner() == "status"
                && tag
                    .try_get_attribute("code")
                    .ok()
                    .flatten()
                    .is_some_and(|attribute| &*attribute.value == code)
        })
        .is_some_and(|found| found)
    }

    /// Whether a room may say this to one session alone, when it enters: old messages (XEP-0045 §7.2.14, with a delay) and the
    /// subject (§7.2.16: a `subject`, and no `body`).
    pub fn is_for_newcomers(&self) -> bool {
        // As below: few have either, and a look through the bytes is cheaper than parsing.
        if memmem::find(&self.bytes, ns::DELAY.as_bytes()).is_none() && memmem::find(&self.bytes, b"subject").is_none()
        {
            return false;
        }
        self.children().is_some_and(|children| {
            let has = |namespace: &str, name: &str| children.iter().any(|child| child.is(namespace, name));
            has(ns::DELAY, "delay") || has(ns::SERVER, "subject") && !has(ns::SERVER, "body")
        })
    }

    /// The same stanza as another sender's. What stands in no attribute that is named here stays as it is, byte for byte; so it is with
    /// all that follow.
    pub fn with_from(&self, from: &str) -> Option<Self> {
        self.with_attribute("from", &self.places.from, from)
    }

    pub fn with_to(&self, to: &str) -> Option<Self> {
        self.with_attribute("to", &self.places.to, to)
    }

    pub fn with_id(&self, id: &str) -> Option<Self> {
        self.with_attribute("id", &self.places.id, id)
    }

    fn with_attribute(&self, name: &str, place: &Option<Range<usize>>, value: &str) -> Option<Self> {
        let value = escape_attribute(value);
        let (at, written) = match place {
            // With the quotes, which may be others than ours.
            Some(place) => (place.start - 1..place.end + 1, format!("'{value}'")),
            None => {
                let end = 1 + self.kind.as_str().len();
                (end..end, format!(" {name}='{value}'"))
            }
        };
        self.spliced(at, &written)
    }

    /// Without its first child of this name.
    pub fn without_child(&self, namespace: &str, name: &str) -> Option<Self> {
        match self.child_place(namespace, name)? {
            Some(place) => self.spliced(place, ""),
            None => Some(self.clone()),
        }
    }

    /// The first child of this name, as written.
    pub fn child_text(&self, namespace: &str, name: &str) -> Option<String> {
        let place = self.child_place(namespace, name)??;
        str::from_utf8(self.bytes.get(place)?).ok().map(str::to_owned)
    }

    /// With one more child, the last.
    pub fn with_child(&self, child: &str) -> Option<Self> {
        if self.bytes.ends_with(b"/>") {
            let end = self.bytes.len() - 2..self.bytes.len();
            self.spliced(end, &format!(">{child}</{}>", self.kind.as_str()))
        } else {
            let end = self.bytes.iter().rposition(|&byte| byte == b'<')?;
            self.spliced(end..end, child)
        }
    }

    /// Without any of its children for which `unwanted(namespace, name)` says so.
    pub fn without_children(&self, mut unwanted: impl FnMut(&str, &str) -> bool) -> Option<Self> {
        let mut kept = Vec::with_capacity(self.bytes.len());
        let mut from = 0;
        for child in self.children()? {
            if unwanted(&child.namespace, &child.name) {
                kept.extend_from_slice(self.bytes.get(from..child.place.start)?);
                from = child.place.end;
            }
        }
        if from == 0 {
            return Some(self.clone());
        }
        kept.extend_from_slice(self.bytes.get(from..)?);
        Self::parse(kept.into()).ok()
    }

    fn spliced(&self, place: Range<usize>, text: &str) -> Option<Self> {
        let (before, after) = (self.bytes.get(..place.start)?, self.bytes.get(place.end..)?);
        Self::parse([before, text.as_bytes(), after].concat().into()).ok()
    }

    /// Where the first child of this name stands, tags and all.
    fn child_place(&self, namespace: &str, name: &str) -> Option<Option<Range<usize>>> {
        let mut reader = self.reader()?;
        let mut depth = 0_usize;
        let mut found = None;
        loop {
            let start = usize::try_from(reader.buffer_position()).ok()?;
            let (resolved, event) = reader.read_resolved_event().ok()?;
            let is_it = |tag: &BytesStart<'_>| {
                depth == 1
                    && resolved == ResolveResult::Bound(Namespace(namespace))
                    && tag.local_name().into_inner() == name
            };
            match &event {
                Event::Start(tag) => {
                    if is_it(tag) {
                        found = Some(start);
                    }
                    depth += 1;
                }
                Event::Empty(tag) if is_it(tag) => {
                    let end = usize::try_from(reader.buffer_position()).ok()?;
                    return Some(Some(start..end));
                }
                Event::End(_) => {
                    depth = depth.saturating_sub(1);
                    if let (1, Some(start)) = (depth, found) {
                        let end = usize::try_from(reader.buffer_position()).ok()?;
                        return Some(Some(start..end));
                    }
                }
                Event::Eof => return Some(None),
                _ => {}
            }
        }
    }

    /// Whether a user asks a room to let it in (XEP-0045 §7.2.1). A room's own presences have an `x` in `muc#user`, whatever else its
    /// occupants put into them.
    pub fn is_join(&self) -> bool {
        let is_occupant_jid = |to: Cow<'_, str>| resource_of(&to).is_some() && bare(&to).contains('@');
        self.kind == Kind::Presence
            && self.stanza_type().is_none()
            && self.to().is_some_and(is_occupant_jid)
            && memmem::find(&self.bytes, ns::MUC.as_bytes()).is_some()
            && self.children().is_some_and(|children| {
                let has_x = |namespace: &str| children.iter().any(|child| child.is(namespace, "x"));
                has_x(ns::MUC) && !has_x(ns::MUC_USER)
            })
    }

    /// Its child elements, in order.
    pub fn children(&self) -> Option<Vec<Child>> {
        let mut reader = self.reader()?;
        let mut depth = 0_usize;
        let mut children = Vec::<Child>::new();
        loop {
            let start = usize::try_from(reader.buffer_position()).ok()?;
            let (resolved, event) = reader.read_resolved_event().ok()?;
            let (tag, opens) = match &event {
                Event::Start(tag) => (tag, true),
                Event::Empty(tag) => (tag, false),
                Event::End(_) => {
                    depth = depth.saturating_sub(1);
                    if let (1, Some(child)) = (depth, children.last_mut()) {
                        child.place.end = usize::try_from(reader.buffer_position()).ok()?;
                    }
                    continue;
                }
                Event::Eof => return Some(children),
                _ => continue,
            };
            if depth == 1 {
                let namespace = match resolved {
                    ResolveResult::Bound(Namespace(namespace)) => namespace,
                    ResolveResult::Unbound | ResolveResult::Unknown(_) => "",
                };
                let (namespace, name) = (namespace.to_owned(), tag.local_name().into_inner().to_owned());
                let node = node_of(tag);
                let end = usize::try_from(reader.buffer_position()).ok()?;
                let place = start..end;
                children.push(Child {
                    namespace,
                    name,
                    node,
                    place,
                });
            } else if depth == 2
                && let Some(child) = children.last_mut()
                && child.node.is_none()
            {
                child.node = node_of(tag);
            }
            depth += usize::from(opens);
        }
    }

    /// What it tells of a node of publish-subscribe (XEP-0060 §7.1.2.1, PEP among it). `None` if it tells of none, or says more than that.
    pub fn node_event(&self) -> Option<NodeEvent> {
        memmem::find(&self.bytes, ns::PUBSUB_EVENT.as_bytes())?;
        // How it is to be handled, and who has published it, is nothing of its own.
        const BESIDE: [&str; 4] = [ns::HINTS, ns::ADDRESS, ns::DELAY, ns::STANZA_ID];
        let children = self.children()?;
        let is_event = |child: &&Child| child.is(ns::PUBSUB_EVENT, "event");
        let node = children.iter().find(is_event)?.node.clone()?;
        let said = |child: &&Child| !BESIDE.contains(&child.namespace.as_str());
        let is_all = children.iter().filter(said).count() == 1;
        let item = if is_all { self.only_item() } else { None };
        Some(NodeEvent { node, item })
    }

    /// The id of the one item in an event, if there is nothing else in it.
    fn only_item(&self) -> Option<String> {
        let mut reader = self.reader()?;
        let mut path = Vec::new();
        let mut found = None;
        loop {
            let (namespace, event) = reader.read_resolved_event().ok()?;
            let in_event = namespace == ResolveResult::Bound(Namespace(ns::PUBSUB_EVENT));
            let (tag, opens) = match event {
                Event::Start(tag) => (tag, true),
                Event::Empty(tag) => (tag, false),
                Event::End(_) => {
                    path.pop();
                    continue;
                }
                Event::Eof => return found,
                _ => continue,
            };
            let name = tag.local_name().into_inner().to_owned();
            if path.len() > 1 && path[1] == "event" && path.len() < 4 {
                // A retraction, a second item, or what the specification may come to know.
                let expected = if path.len() == 2 { "items" } else { "item" };
                if !in_event || name != expected || found.is_some() {
                    return None;
                }
                if path.len() == 3 {
                    let id = tag.try_get_attribute("id").ok()??;
                    found = Some(id.normalized_value(XmlVersion::Implicit1_0).ok()?.into_owned());
                }
            }
            if opens {
                path.push(name);
            }
        }
    }

    /// A reader that resolves namespaces as on a stream between servers.
    fn reader(&self) -> Option<NsReader<&[u8]>> {
        let mut reader = NsReader::from_str(str::from_utf8(&self.bytes).ok()?);
        reader.resolver_mut().set_max_namespace_bindings(usize::MAX);
        let default = (PrefixDeclaration::Default, Namespace(ns::SERVER));
        reader.resolver_mut().add(default.0, default.1).ok()?;
        Some(reader)
    }

    /// Whether a presence says that somebody is there (RFC 6121 §4.7.1).
    pub fn is_available(&self) -> bool {
        self.kind == Kind::Presence && self.stanza_type().is_none()
    }

    /// Whether it has a child `x` in `muc#user`, as room traffic other than plain group messages has.
    pub fn has_muc_user(&self) -> bool {
        self.muc_user_children(|_| false).is_some()
    }

    /// Looks through the children of `x` in `muc#user`, if there is one, until one fits.
    fn muc_user_children(&self, fits: impl Fn(&BytesStart<'_>) -> bool) -> Option<bool> {
        // Most stanzas have none, and a look through the bytes is far cheaper than parsing them. A namespace
        // written with escapes would be missed; no server writes that.
        memmem::find(&self.bytes, ns::MUC_USER.as_bytes())?;
        let mut reader = self.reader()?;
        let mut depth = 0_usize;
        let mut inside = false;
        let mut seen = None;
        loop {
            let (namespace, event) = reader.read_resolved_event().ok()?;
            let in_muc_user = namespace == ResolveResult::Bound(Namespace(ns::MUC_USER));
            let (tag, opens) = match event {
                Event::Start(tag) => (tag, true),
                Event::Empty(tag) => (tag, false),
                Event::End(_) => {
                    depth = depth.saturating_sub(1);
                    inside &= depth > 1;
                    continue;
                }
                Event::Eof => return seen,
                _ => continue,
            };
            if depth == 1 && in_muc_user && tag.local_name().into_inner() == "x" {
                inside = opens;
                seen = Some(false);
            } else if depth == 2 && inside && in_muc_user && fits(&tag) {
                return Some(true);
            }
            if opens {
                depth += 1;
            }
        }
    }

    /// An attribute as written, between and with its quotes, for our own answers.
    pub(super) fn raw_id(&self) -> Option<&[u8]> {
        self.quoted(&self.places.id)
    }

    pub(super) fn raw_from(&self) -> Option<&[u8]> {
        self.quoted(&self.places.from)
    }

    pub(super) fn raw_to(&self) -> Option<&[u8]> {
        self.quoted(&self.places.to)
    }

    fn quoted(&self, place: &Option<Range<usize>>) -> Option<&[u8]> {
        let place = place.as_ref()?;
        // `Places::find` has seen the quotes on both sides.
        self.bytes.get(place.start - 1..place.end + 1)
    }

    fn value(&self, place: &Option<Range<usize>>) -> Option<Cow<'_, str>> {
        let written = str::from_utf8(&self.bytes[place.clone()?]).ok()?;
        let plain = !written.bytes().any(|byte| matches!(byte, b'&' | b'\t' | b'\n' | b'\r'));
        if plain {
            return Some(Cow::Borrowed(written));
        }
        let attribute = Attribute {
            key: QName(""),
            value: Cow::Borrowed(written),
        };
        // `parse` has tried it.
        attribute.normalized_value(XmlVersion::Implicit1_0).ok()
    }
}

/// What a stanza tells of a node of publish-subscribe.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct NodeEvent {
    pub node: String,
    /// The id of the item that it shows, if it shows one and says nothing else: no retraction, no purge, no words beside it.
    pub item: Option<String>,
}

/// A child element of a stanza.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Child {
    pub namespace: String,
    pub name: String,
    /// The node of publish-subscribe (XEP-0060) or discovery (XEP-0030) that it is about: its own attribute, or that of the first of its
    /// children that has one.
    pub node: Option<String>,
    /// Where it stands, tags and all.
    place: Range<usize>,
}

impl Child {
    pub fn is(&self, namespace: &str, name: &str) -> bool {
        self.namespace == namespace && self.name == name
    }
}

fn node_of(tag: &BytesStart<'_>) -> Option<String> {
    let attribute = tag.try_get_attribute("node").ok()??;
    let value = attribute.normalized_value(XmlVersion::Implicit1_0).ok()?;
    Some(value.into_owned())
}

impl Places {
    fn find(text: &str, tag: &BytesStart<'_>) -> Result<Self, StanzaError> {
        let mut places = Self::default();
        // The reader upstream has refused repeated attributes.
        for attribute in tag.attributes().with_checks(false) {
            let attribute = attribute.map_err(|_| StanzaError::Malformed)?;
            let value = place_in(text, &attribute.value).ok_or(StanzaError::Malformed)?;
            let place = match attribute.key.0 {
                "to" => {
                    let name = place_in(text, attribute.key.0).ok_or(StanzaError::Malformed)?;
                    let before = text[..name.start].trim_end_matches([' ', '\t', '\r', '\n']);
                    places.to_attribute = before.len()..value.end + 1;
                    &mut places.to
                }
                "from" => &mut places.from,
                "id" => &mut places.id,
                "type" => &mut places.stanza_type,
                "xmlns" if &*attribute.value != ns::SERVER => return Err(StanzaError::NotAStanza),
                _ => continue,
            };
            let readable = attribute.normalized_value(XmlVersion::Implicit1_0).is_ok();
            if !readable || !is_quoted(text.as_bytes(), &value) {
                return Err(StanzaError::Malformed);
            }
            *place = Some(value);
        }
        Ok(places)
    }
}

/// Where `part`, which the parser has cut out of `text`, stands in it.
fn place_in(text: &str, part: &str) -> Option<Range<usize>> {
    let start = (part.as_ptr() as usize).checked_sub(text.as_ptr() as usize)?;
    let end = start.checked_add(part.len())?;
    // So that the addresses of unrelated strings cannot mislead us.
    (text.get(start..end)? == part).then_some(start..end)
}

fn is_quoted(bytes: &[u8], value: &Range<usize>) -> bool {
    let before = value.start.checked_sub(1).and_then(|at| bytes.get(at));
    matches!(before, Some(b'\'' | b'"')) && before == bytes.get(value.end)
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum StanzaError {
    /// Neither `message` nor `presence` nor `iq`.
    #[error("not a stanza")]
    NotAStanza,
    #[error("the element cannot be read")]
    Malformed,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stanza(text: &str) -> Stanza {
        Stanza::parse(Bytes::copy_from_slice(text.as_bytes())).unwrap()
    }

    /// Attributes are found in any order, with either quote, white space and escapes, and `to` only without a prefix.
    #[test]
    fn finds_the_addressing() {
        let stanza = stanza(
            "<message xml:lang='en' xmlns:p='urn:p' p:to='x'\n\tto = \"o'neil@b.example/&lt;r&gt;\" \
             from='room@a.example/&apos;n&#x27;' type='groupchat' id='a\tb'><body to='y'/></message>",
        );
        assert_eq!(stanza.kind(), Kind::Message);
        assert_eq!(stanza.to().unwrap(), "o'neil@b.example/<r>");
        assert_eq!(stanza.from().unwrap(), "room@a.example/'n'");
        assert_eq!(stanza.stanza_type().unwrap(), "groupchat");
        assert_eq!(stanza.id().unwrap(), "a b");
        assert!(!stanza.is_error());
    }

    /// What is missing is missing; an empty value is a value.
    #[test]
    fn tells_missing_from_empty() {
        let stanza = stanza("<presence to=''/>");
        assert_eq!(stanza.kind(), Kind::Presence);
        assert_eq!(stanza.to().unwrap(), "");
        assert_eq!((stanza.from(), stanza.id(), stanza.stanza_type()), (None, None, None));
    }

    /// Other elements, and stanzas of another namespace, are no stanzas here.
    #[test]
    fn refuses_what_is_no_stanza() {
        let parse = |text: &'static str| Stanza::parse(Bytes::from_static(text.as_bytes()));
        assert_eq!(parse("<r xmlns='urn:xmpp:sm:3'/>"), Err(StanzaError::NotAStanza));
        assert_eq!(parse("<x:iq xmlns:x='jabber:server'/>"), Err(StanzaError::NotAStanza));
        assert_eq!(parse("<iq xmlns='jabber:client'/>"), Err(StanzaError::NotAStanza));
        assert!(parse("<iq xmlns='jabber:server'/>").is_ok());
        for malformed in [
            "",
            "iq",
            "<iq to=>",
            "<iq to='x",
            "<iq to=x/>",
            "<iq to='&x;'/>",
            "<!-- -->",
        ] {
            assert_eq!(parse(malformed), Err(StanzaError::Malformed), "{malformed}");
        }
        assert_eq!(
            Stanza::parse(Bytes::from_static(b"<iq to='\xff'/>")),
            Err(StanzaError::Malformed)
        );
    }

    /// Split and joined again, a stanza has the same bytes; what was cut out is the attribute and the white space before it.
    #[test]
    fn splits_and_joins() {
        let text = "<message from='a' \n to = \"b &amp; c\" id='1'><body>to='b'</body></message>";
        let (template, to_at, attribute) = stanza(text).split_to().unwrap();
        assert_eq!(template, "<message from='a' id='1'><body>to='b'</body></message>");
        assert_eq!(attribute, " \n to = \"b &amp; c\"");
        assert_eq!(Stanza::join(&template, to_at, &attribute), text);
        assert_eq!(stanza("<presence from='a'/>").split_to(), None);
        assert_eq!(Stanza::join(b"<iq/>", 99, b"!"), "<iq/>!");
    }

    /// Status codes count only where XEP-0045 has them, whatever the prefixes.
    #[test]
    fn finds_muc_status_codes() {
        let with = |x: &str| stanza(&format!("<presence>{x}</presence>"));
        let user = ns::MUC_USER;
        assert!(with(&format!("<c/><x xmlns='{user}'><item/><status code='110'/></x>")).has_muc_status("110"));
        assert!(
            with(&format!(
                "<p:x xmlns:p='{user}'><p:item><p:reason/></p:item><p:status code=\"110\"></p:status></p:x>"
            ))
            .has_muc_status("110")
        );
        for without in [
            format!("<x xmlns='{user}'><status code='100'/></x>"),
            format!("<x xmlns='{user}'/><x xmlns='urn:other'><status code='110'/></x>"),
            format!("<y><x xmlns='{user}'><status code='110'/></x></y>"),
            format!("<x xmlns='{user}'><item><status code='110'/></item></x>"),
            format!("<x xmlns='{user}'><status xmlns='urn:other' code='110'/></x>"),
            format!("<x xmlns='{user}'></x><status xmlns='{user}' code='110'/>"),
            "<status code='110'/>".into(),
        ] {
            assert!(!with(&without).has_muc_status("110"), "{without}");
        }
    }

    /// What is not asked for stays as it was, to the byte; values are escaped, and missing attributes added.
    #[test]
    fn readdresses_and_leaves_the_rest() {
        let before =
            stanza("<message  from=\"a@a.example\" to='b@b.example' type='chat'><body>a &amp; b</body></message>");
        let after = before.with_from("it's@a.example/<n>").unwrap().with_id("7").unwrap();
        assert_eq!(
            after.bytes(),
            "<message id='7'  from='it&apos;s@a.example/&lt;n&gt;' to='b@b.example' type='chat'><body>a &amp; b</body></message>"
        );
        assert_eq!(after.from().unwrap(), "it's@a.example/<n>");
        assert_eq!(before.with_to("c@c.example").unwrap().to().unwrap(), "c@c.example");
    }

    /// Only the stanza's own children are meant, whatever lies deeper or in another namespace.
    #[test]
    fn takes_out_and_adds_children() {
        let whole = "<presence from='a@a.example'><o xmlns='urn:o'><show/></o><show xmlns='urn:o'/><show>dnd<b/></show><show/></presence>";
        let without = stanza(whole).without_child(ns::SERVER, "show").unwrap();
        assert_eq!(
            without.bytes(),
            "<presence from='a@a.example'><o xmlns='urn:o'><show/></o><show xmlns='urn:o'/><show/></presence>"
        );
        assert_eq!(
            stanza(whole).child_text(ns::SERVER, "show").unwrap(),
            "<show>dnd<b/></show>"
        );
        assert_eq!(
            stanza(whole).child_text("urn:o", "show").unwrap(),
            "<show xmlns='urn:o'/>"
        );
        assert_eq!(stanza(whole).child_text(ns::SERVER, "status"), None);
        assert_eq!(
            stanza(whole).without_child(ns::SERVER, "status").unwrap().bytes(),
            whole
        );
        let added = stanza("<presence from='a@a.example'/>")
            .with_child("<show>xa</show>")
            .unwrap();
        assert_eq!(added.bytes(), "<presence from='a@a.example'><show>xa</show></presence>");
        let added = added.with_child("<status/>").unwrap();
        assert_eq!(
            added.bytes(),
            "<presence from='a@a.example'><show>xa</show><status/></presence>"
        );
    }

    /// An event that shows one item and nothing else is told from one that says more.
    #[test]
    fn one_item_is_told_from_more() {
        let event = |inside: &str| {
            let text = format!(
                "<message from='u@a.example' type='headline'><event xmlns='{}'>{inside}</event>\
                 <addresses xmlns='http://jabber.org/protocol/address'><address type='replyto' jid='u@a.example/r'/></addresses></message>",
                ns::PUBSUB_EVENT
            );
            stanza(&text).node_event().map(|event| (event.node, event.item))
        };
        let known = |item: Option<&str>| Some(("n".to_owned(), item.map(str::to_owned)));
        let one = "<items node='n'><item id='current'><item xmlns='urn:o'><items/></item></item></items>";
        assert_eq!(event(one), known(Some("current")));
        assert_eq!(event("<items node='n'><item id='a'/></items>"), known(Some("a")));
        for more in [
            "<items node='n'><item/></items>",
            "<items node='n'/>",
            "<items node='n'><item id='a'/><item id='b'/></items>",
            "<items node='n'><item id='a'/><retract id='b'/></items>",
            "<items node='n'><retract id='a'/></items>",
            "<items node='n'><item id='a'/></items><purge node='n'/>",
            "<purge node='n'/>",
            "<delete node='n'/>",
        ] {
            assert_eq!(event(more), known(None), "{more}");
        }
        assert_eq!(event("<collection/>"), None);
        let words = format!(
            "<message><event xmlns='{}'><items node='n'><item id='a'/></items></event><body>b</body></message>",
            ns::PUBSUB_EVENT
        );
        assert_eq!(stanza(&words).node_event().unwrap().item, None);
        assert_eq!(stanza("<message><body>b</body></message>").node_event(), None);
    }
}
