//! Strict framing of XML streams: bytes in any chunks in, whole elements out, exactly as they were written.
//!
//! A [`StreamReader`] lets through what every XMPP server's parser accepts, and nothing else: one
//! malformed stanza closes the far server's stream for everybody, and a durable queue would offer
//! it again for ever. What it lets through is forwarded byte for byte, so it is checked here, once.
//!
//! - Syntax is checked by `rxml`, which refuses DTDs, processing instructions, comments and
//!   entities ([RFC 6120 §11.1](https://www.rfc-editor.org/rfc/rfc6120#section-11.1)). Namespaces
//!   (unbound prefixes, repeated attributes) are checked here, because we must also know which of
//!   them an element borrows from the stream header.
//! - An element that comes out stands alone: a prefix that is bound only on the stream header is
//!   declared on it, which is the one change ever made to its bytes.
//! - Memory stays within one element's limit and what was pushed last; a limit is refused at the
//!   first byte beyond it, whatever the chunks.
//!
//! A stream that restarts (after STARTTLS or SASL) needs a new reader.

mod names;

use std::{borrow::Cow, mem};

use bytes::Bytes;
use quick_xml::{
    NsReader, XmlVersion,
    events::{BytesStart, Event},
    name::{Namespace, PrefixDeclaration, ResolveResult},
};
use rxml::{NcName, Parse, RawEvent, RawParser, WithOptions, XMLNS_XMLNS, error::EndOrError};

use crate::stanza::ns;
use names::is_name_everywhere;

pub use crate::stanza::{escape_attribute, escape_text};

/// What one stream may cost us. Two sets are in use: before and after authentication.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Bytes of one top-level element, and of the stream header.
    pub stanza_bytes_max: usize,
    /// Open elements below the stream root.
    pub depth_max: usize,
    /// Attributes and namespace declarations of one element.
    pub attributes_max: usize,
    /// Elements in one top-level element.
    pub elements_max: usize,
}

impl Limits {
    /// For anybody who can open a connection.
    pub const BEFORE_AUTHENTICATION: Self = Self {
        // Prosody's own value; stream features and SASL take some 1,000 bytes.
        stanza_bytes_max: 10_000,
        // Features nest three deep (`mechanisms` in `features`, a `mechanism` in it); the rest is room.
        depth_max: 16,
        // A stream header has eight or nine.
        attributes_max: 32,
        // Twenty mechanisms and as many other features.
        elements_max: 64,
    };

    /// For a server whose domain has been proven. What both servers let through must get through
    /// here: a refusal closes the stream for everybody on it.
    pub const AFTER_AUTHENTICATION: Self = Self {
        // Prosody's and Debian's ejabberd's limit for what comes in over S2S.
        stanza_bytes_max: 524_288,
        // Forwarded archive results with rich text reach about fifteen.
        depth_max: 64,
        // The most that a real element has is about fifteen.
        attributes_max: 512,
        // Prosody's limit for the children of one stanza.
        elements_max: 25_000,
    };
}

/// What comes off a stream, in order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum StreamItem {
    Header(StreamHeader),
    Element(Element),
    /// `</stream:stream>`
    Close,
}

/// RFC 6120 §4.7
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct StreamHeader {
    pub from: Option<String>,
    pub to: Option<String>,
    pub id: Option<String>,
    pub version: Option<String>,
    /// Whether the `db` dialback namespace was declared (XEP-0220 §2.1.1).
    pub dialback: bool,
}

/// One complete top-level element, self-contained: prefixes bound only on the stream header are declared on it.
///
/// An unprefixed name without a declaration is in `jabber:server`, as on every S2S stream.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Element {
    pub namespace: String,
    pub name: String,
    pub bytes: Bytes,
}

/// A parsed element, for negotiation: small things that are looked into, never forwarded.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Node {
    pub namespace: String,
    pub name: String,
    /// By their written names (`xml:lang`), without namespace declarations.
    pub attributes: Vec<(String, String)>,
    /// The element's own text, without that of its children.
    pub text: String,
    pub children: Vec<Node>,
}

/// Takes a stream's bytes in any chunks and gives its elements.
#[derive(Debug)]
pub struct StreamReader {
    parser: RawParser,
    buffer: Buffer,
    place: Place,
    scope: Scope,
    tag: OpenTag,
    /// In force for the item that is being read.
    limits: Limits,
    /// In force from the next item on.
    next_limits: Limits,
    /// Open elements below the stream root.
    depth: usize,
    /// Elements begun in the current top-level element.
    elements: usize,
    /// The current top-level element's namespace and name.
    top: (String, String),
    /// The length of its written name, prefix included.
    top_name_len: usize,
}

/// Where in the stream the next byte is.
#[derive(Clone, Debug)]
enum Place {
    /// Nothing has come but perhaps white space.
    Start {
        blank: bool,
    },
    /// In the XML declaration or the root's start tag.
    Header,
    /// Between top-level elements.
    Between,
    /// In a top-level element, or in the root's end tag.
    Inside,
    Closed,
    Failed(XmlError),
}

impl StreamReader {
    pub fn new(limits: Limits) -> Self {
        Self {
            parser: RawParser::with_options(rxml::Options {
                max_token_length: TOKEN_BYTES_MAX,
                ..rxml::Options::default()
            }),
            buffer: Buffer::default(),
            place: Place::Start { blank: false },
            scope: Scope::default(),
            tag: OpenTag::default(),
            limits,
            next_limits: limits,
            depth: 0,
            elements: 0,
            top: (String::new(), String::new()),
            top_name_len: 0,
        }
    }

    /// From the next top-level element on.
    pub fn set_limits(&mut self, limits: Limits) {
        self.next_limits = limits;
    }

    /// Adds what has been received. Call [`poll_item`](Self::poll_item) until it gives `None` before pushing
    /// more: only then does what is held stay within one element and one chunk.
    pub fn push(&mut self, bytes: &[u8]) {
        match self.place {
            // Nothing more will be read, so nothing more is kept.
            Place::Closed | Place::Failed(_) => {}
            Place::Start { .. } | Place::Header | Place::Between | Place::Inside => self.buffer.push(bytes),
        }
    }

    /// The next item, or `None` until more bytes are pushed. After an error the reader stays failed.
    pub fn poll_item(&mut self) -> Result<Option<StreamItem>, XmlError> {
        match &self.place {
            Place::Closed => return Ok(None),
            Place::Failed(error) => return Err(error.clone()),
            Place::Start { .. } | Place::Header | Place::Between | Place::Inside => {}
        }
        let result = self.read_item();
        match &result {
            Err(error) => {
                self.place = Place::Failed(error.clone());
                self.buffer = Buffer::default();
            }
            Ok(Some(StreamItem::Close)) => {
                self.place = Place::Closed;
                self.buffer = Buffer::default();
            }
            Ok(_) => {}
        }
        result
    }

    /// Takes what was pushed and not read: after an item that restarts the stream, what came too early
    /// (RFC 6120 §5.4.3.3 and §6.3.2 forbid to read it as part of the new stream over TLS).
    pub fn take_unread(&mut self) -> Bytes {
        self.buffer.take_unread()
    }

    fn read_item(&mut self) -> Result<Option<StreamItem>, XmlError> {
        loop {
            let begun = match self.place {
                Place::Start { blank } => self.begin_header(blank)?,
                Place::Between => self.begin_element()?,
                Place::Header | Place::Inside | Place::Closed | Place::Failed(_) => true,
            };
            if !begun {
                return Ok(None);
            }
            let Some(event) = self.next_event()? else {
                return Ok(None);
            };
            if let Some(item) = self.handle_event(event)? {
                self.limits = self.next_limits;
                return Ok(Some(item));
            }
        }
    }

    /// An XML declaration stands at the very start or nowhere (XML 1.0 §2.8); white space alone may precede the root.
    fn begin_header(&mut self, blank: bool) -> Result<bool, XmlError> {
        let blank = self.buffer.skip_white_space() || blank;
        self.place = Place::Start { blank };
        match self.buffer.unread() {
            [] => return Ok(false),
            [b'<', b'?', ..] if blank => return Err(XmlError::NotWellFormed),
            [b'<'] if blank => return Ok(false),
            [b'<', ..] => {}
            _ => return Err(XmlError::NotWellFormed),
        }
        self.place = Place::Header;
        Ok(true)
    }

    /// Only white space stands between top-level elements (RFC 6120 §4.6.1, §11.7). It never reaches the
    /// parser, so that an element begins at the first byte that does.
    fn begin_element(&mut self) -> Result<bool, XmlError> {
        self.buffer.skip_white_space();
        match self.buffer.unread() {
            [] | [b'<'] | [b'<', b'!'] => return Ok(false),
            [b'<', b'?', ..] => return Err(XmlError::Restricted),
            // A CDATA section is text; the rest are comments and declarations.
            [b'<', b'!', b'[', ..] => return Err(XmlError::BadFormat),
            [b'<', b'!', ..] => return Err(XmlError::Restricted),
            [b'<', ..] => {}
            _ => return Err(XmlError::BadFormat),
        }
        self.limits = self.next_limits;
        self.elements = 0;
        self.place = Place::Inside;
        Ok(true)
    }

    /// Feeds the parser until it has something to say, or there is nothing to feed.
    fn next_event(&mut self) -> Result<Option<RawEvent>, XmlError> {
        loop {
            let room = self.limits.stanza_bytes_max.saturating_sub(self.buffer.item_len());
            let mut rest = self.buffer.next_chunk(room);
            let len = rest.len();
            let result = self.parser.parse(&mut rest, false);
            let used = len - rest.len();
            self.buffer.advance(used);
            match result {
                Ok(Some(event)) => return Ok(Some(event)),
                Err(EndOrError::NeedMoreData) | Ok(None) => {
                    if self.buffer.item_len() >= self.limits.stanza_bytes_max {
                        return Err(XmlError::OverLimit("element size"));
                    }
                    if self.buffer.unread().is_empty() {
                        return Ok(None);
                    }
                }
                Err(EndOrError::Error(error)) => return Err(self.refuse(error)),
            }
        }
    }

    fn refuse(&self, error: rxml::Error) -> XmlError {
        match error {
            rxml::Error::RestrictedXml(what) if what.contains("encoding") => XmlError::UnsupportedEncoding,
            rxml::Error::RestrictedXml(what) if what.contains("long name") => XmlError::OverLimit("token size"),
            rxml::Error::RestrictedXml(_) | rxml::Error::UndeclaredEntity => XmlError::Restricted,
            // "or has otherwise improperly encoded the stream (e.g., by violating the rules of the UTF-8 encoding)"
            rxml::Error::InvalidUtf8Byte(_) => XmlError::UnsupportedEncoding,
            // The parser does not know `<!DOCTYPE` from a misspelt CDATA section. It stops at the first letter.
            rxml::Error::InvalidSyntax(_) if is_declaration(self.buffer.item()) => XmlError::Restricted,
            _ => XmlError::NotWellFormed,
        }
    }

    fn handle_event(&mut self, event: RawEvent) -> Result<Option<StreamItem>, XmlError> {
        match event {
            // Only at the very start; anywhere else the parser refuses it.
            RawEvent::XmlDeclaration(..) => Ok(None),
            RawEvent::ElementHeadOpen(_, name) => self.open_tag(name),
            RawEvent::Attribute(_, name, value) => self.attribute(name, value),
            RawEvent::ElementHeadClose(_) => match self.place {
                Place::Header => self.finish_header().map(Some),
                _ => self.finish_tag(),
            },
            RawEvent::Text(..) => Ok(None),
            RawEvent::ElementFoot(_) => self.close_element(),
        }
    }

    fn open_tag(&mut self, (prefix, name): (Option<NcName>, NcName)) -> Result<Option<StreamItem>, XmlError> {
        if !matches!(self.place, Place::Header) {
            self.depth += 1;
            self.elements += 1;
            if self.depth > self.limits.depth_max {
                return Err(XmlError::OverLimit("depth"));
            }
            if self.elements > self.limits.elements_max {
                return Err(XmlError::OverLimit("number of elements"));
            }
        }
        check_names(prefix.as_ref(), &name)?;
        self.tag.begin(prefix, name);
        Ok(None)
    }

    fn attribute(
        &mut self,
        (prefix, name): (Option<NcName>, NcName),
        value: String,
    ) -> Result<Option<StreamItem>, XmlError> {
        self.tag.count += 1;
        if self.tag.count > self.limits.attributes_max {
            return Err(XmlError::OverLimit("number of attributes"));
        }
        check_names(prefix.as_ref(), &name)?;
        let depth = self.depth;
        match prefix {
            None if name == "xmlns" => self.scope.bind_default(value, depth)?,
            Some(prefix) if prefix == "xmlns" => self.scope.bind(name, value, depth)?,
            prefix => {
                let value = if matches!(self.place, Place::Header) {
                    value
                } else {
                    String::new()
                };
                self.tag.attributes.push(Attribute { prefix, name, value });
            }
        }
        Ok(None)
    }

    fn finish_header(&mut self) -> Result<StreamItem, XmlError> {
        let namespace = self.scope.resolve_tag(&self.tag)?;
        // RFC 6120 §4.8.1 and §4.8.2: the stream's own namespace has a prefix, the content's is the default.
        if namespace != ns::STREAM {
            return Err(XmlError::InvalidNamespace);
        }
        if self.tag.prefix.is_none() {
            return Err(XmlError::BadNamespacePrefix);
        }
        // An empty root element has ended before it could carry anything.
        if self.tag.name() != "stream" || self.buffer.item().ends_with(b"/>") {
            return Err(XmlError::BadHeader);
        }
        if self.scope.default_namespace() != ns::SERVER {
            return Err(XmlError::InvalidNamespace);
        }
        let header = StreamHeader {
            from: self.tag.take("from"),
            to: self.tag.take("to"),
            id: self.tag.take("id"),
            version: self.tag.take("version"),
            dialback: self.scope.binds(ns::DIALBACK),
        };
        self.scope.borrowed.clear();
        self.buffer.end_item();
        self.place = Place::Between;
        Ok(StreamItem::Header(header))
    }

    fn finish_tag(&mut self) -> Result<Option<StreamItem>, XmlError> {
        let namespace = self.scope.resolve_tag(&self.tag)?;
        if self.depth == 1 {
            // RFC 6120 §4.8.5: "bad-namespace-prefix" is for a prefix on an element that must have none.
            if self.tag.prefix.is_some() && namespace == ns::SERVER {
                return Err(XmlError::BadNamespacePrefix);
            }
            self.top = (namespace.to_owned(), self.tag.name().to_owned());
            self.top_name_len = self.tag.written_len();
        }
        Ok(None)
    }

    fn close_element(&mut self) -> Result<Option<StreamItem>, XmlError> {
        if self.depth == 0 {
            return Ok(Some(StreamItem::Close));
        }
        self.scope.leave(self.depth);
        self.depth -= 1;
        if self.depth > 0 {
            return Ok(None);
        }
        let (namespace, name) = mem::take(&mut self.top);
        let bytes = self.self_contained()?;
        self.buffer.end_item();
        self.place = Place::Between;
        Ok(Some(StreamItem::Element(Element { namespace, name, bytes })))
    }

    /// The element's bytes, with the declarations that it borrows from the stream header behind its name.
    fn self_contained(&mut self) -> Result<Bytes, XmlError> {
        // A copy, because a slice of the buffer would hold all of it in memory for as long as the element waits.
        let item = self.buffer.item();
        if self.scope.borrowed.is_empty() {
            return Ok(Bytes::copy_from_slice(item));
        }
        let declarations = self.scope.take_borrowed();
        if item.len() + declarations.len() > self.limits.stanza_bytes_max {
            return Err(XmlError::OverLimit("element size"));
        }
        let (before, after) = item.split_at(1 + self.top_name_len);
        Ok([before, declarations.as_bytes(), after].concat().into())
    }
}

fn check_names(prefix: Option<&NcName>, name: &NcName) -> Result<(), XmlError> {
    let fits = prefix.is_none_or(|prefix| is_name_everywhere(prefix)) && is_name_everywhere(name);
    if fits { Ok(()) } else { Err(XmlError::NotWellFormed) }
}

/// Whether the last thing read is `<!` and something that begins neither a comment nor a CDATA section.
fn is_declaration(read: &[u8]) -> bool {
    matches!(read, [.., b'<', b'!', last] if !matches!(last, b'-' | b'['))
}

/// What has been received and not given out yet.
#[derive(Debug, Default)]
struct Buffer {
    bytes: Vec<u8>,
    /// The first byte of the current item.
    start: usize,
    /// The first byte that the parser has not seen.
    read: usize,
    /// No carriage return stands between `read` and here.
    clear_to: usize,
    /// The parser has been given a line feed for a carriage return, so a line feed that follows is left out.
    after_return: bool,
    /// The last chunk given out stands for a carriage return.
    at_return: bool,
}

impl Buffer {
    fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.read -= self.start;
            self.clear_to = self.clear_to.saturating_sub(self.start);
            self.start = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    fn unread(&self) -> &[u8] {
        &self.bytes[self.read..]
    }

    /// The current item, as far as it has been read.
    fn item(&self) -> &[u8] {
        &self.bytes[self.start..self.read]
    }

    fn item_len(&self) -> usize {
        self.read - self.start
    }

    fn end_item(&mut self) {
        self.start = self.read;
    }

    /// Whether there was any.
    fn skip_white_space(&mut self) -> bool {
        let blank = self.unread().iter().take_while(|byte| is_white_space(**byte)).count();
        self.read += blank;
        self.start = self.read;
        blank > 0
    }

    /// At most `room` bytes for the parser, with line ends made line feeds (XML 1.0 §2.11).
    ///
    /// We do that ourselves because rxml 0.14 refuses a lone carriage return in an attribute value,
    /// which is well-formed, and which Prosody writes if a client sends it as `&#13;`.
    fn next_chunk(&mut self, room: usize) -> &[u8] {
        if self.after_return && self.read < self.bytes.len() {
            self.after_return = false;
            if self.bytes[self.read] == b'\n' {
                self.read += 1;
            }
        }
        self.at_return = false;
        if self.clear_to <= self.read {
            let end = self.bytes.len().min(self.read + CHUNK_BYTES_MAX);
            let upcoming = &self.bytes[self.read..end];
            self.clear_to = match upcoming.iter().position(|byte| *byte == b'\r') {
                Some(0) if room > 0 => {
                    self.at_return = true;
                    return b"\n";
                }
                Some(at) => self.read + at,
                None => end,
            };
        }
        let end = self.clear_to.min(self.read.saturating_add(room));
        &self.bytes[self.read..end]
    }

    /// The parser has taken `used` bytes of the last chunk.
    fn advance(&mut self, used: usize) {
        self.read += used;
        self.after_return |= self.at_return && used > 0;
    }

    fn take_unread(&mut self) -> Bytes {
        let unread = Bytes::copy_from_slice(self.unread());
        self.bytes.truncate(self.read);
        self.clear_to = self.read;
        unread
    }
}

/// The start tag that is being read.
#[derive(Debug, Default)]
struct OpenTag {
    prefix: Option<NcName>,
    name: Option<NcName>,
    /// Without namespace declarations.
    attributes: Vec<Attribute>,
    /// With namespace declarations.
    count: usize,
}

#[derive(Debug)]
struct Attribute {
    prefix: Option<NcName>,
    name: NcName,
    value: String,
}

impl OpenTag {
    fn begin(&mut self, prefix: Option<NcName>, name: NcName) {
        self.prefix = prefix;
        self.name = Some(name);
        self.attributes.clear();
        self.count = 0;
    }

    fn name(&self) -> &str {
        self.name.as_ref().map_or("", |name| name.as_str())
    }

    /// Bytes of the name as written.
    fn written_len(&self) -> usize {
        let prefix = self.prefix.as_ref().map_or(0, |prefix| prefix.len() + 1);
        prefix + self.name().len()
    }

    fn take(&mut self, name: &str) -> Option<String> {
        self.attributes
            .iter_mut()
            .find(|attribute| attribute.prefix.is_none() && attribute.name == *name)
            .map(|attribute| mem::take(&mut attribute.value))
    }
}

/// The namespaces in scope.
#[derive(Debug, Default)]
struct Scope {
    /// Declared prefixes, innermost last.
    bindings: Vec<Binding>,
    /// Declared default namespaces and the depth where they were, innermost last.
    defaults: Vec<(usize, String)>,
    /// Which of the header's bindings (they are the first) the current top-level element uses, in order of use.
    borrowed: Vec<usize>,
}

#[derive(Debug)]
struct Binding {
    prefix: NcName,
    namespace: String,
    /// Where it was declared; 0 is the stream header.
    depth: usize,
}

impl Scope {
    fn bind_default(&mut self, namespace: String, depth: usize) -> Result<(), XmlError> {
        let repeated = self.defaults.last().is_some_and(|(declared, _)| *declared == depth);
        if repeated || !is_bindable(&namespace) {
            return Err(XmlError::NotWellFormed);
        }
        self.defaults.push((depth, namespace));
        Ok(())
    }

    fn bind(&mut self, prefix: NcName, namespace: String, depth: usize) -> Result<(), XmlError> {
        let here = self.bindings.iter().rev().take_while(|binding| binding.depth == depth);
        if here.into_iter().any(|binding| binding.prefix == prefix) || !is_bindable(&namespace) {
            return Err(XmlError::NotWellFormed);
        }
        if self.bindings.len() >= PREFIXES_MAX {
            return Err(XmlError::OverLimit("number of namespace prefixes"));
        }
        self.bindings.push(Binding {
            prefix,
            namespace,
            depth,
        });
        Ok(())
    }

    fn leave(&mut self, depth: usize) {
        while self.bindings.last().is_some_and(|binding| binding.depth >= depth) {
            self.bindings.pop();
        }
        while self.defaults.last().is_some_and(|(declared, _)| *declared >= depth) {
            self.defaults.pop();
        }
    }

    fn default_namespace(&self) -> &str {
        self.defaults.last().map_or("", |(_, namespace)| namespace)
    }

    fn binds(&self, namespace: &str) -> bool {
        self.bindings.iter().any(|binding| binding.namespace == namespace)
    }

    /// Checks a start tag whose declarations are in scope, and gives its namespace.
    fn resolve_tag(&mut self, tag: &OpenTag) -> Result<&str, XmlError> {
        let element = match &tag.prefix {
            None => None,
            Some(prefix) => Some(self.find(prefix)?),
        };
        let mut names = Vec::with_capacity(tag.attributes.len());
        for attribute in &tag.attributes {
            let place = match &attribute.prefix {
                None => None,
                Some(prefix) => Some(self.find(prefix)?),
            };
            names.push((place, attribute.name.as_str()));
        }
        if self.has_repeated(&mut names) {
            return Err(XmlError::NotWellFormed);
        }
        Ok(element.map_or_else(|| self.default_namespace(), |place| self.namespace(place)))
    }

    /// Namespaces in XML 1.0 §6.3: no two attributes of one element have the same expanded name.
    fn has_repeated<'a>(&'a self, names: &mut [(Option<Found>, &'a str)]) -> bool {
        if names.len() < 2 {
            return false;
        }
        let mut names: Vec<_> = names
            .iter()
            .map(|(place, name)| (*name, place.map_or("", |place| self.namespace(place))))
            .collect();
        names.sort_unstable();
        names.windows(2).any(|pair| pair[0] == pair[1])
    }

    fn find(&mut self, prefix: &NcName) -> Result<Found, XmlError> {
        if prefix == "xml" {
            return Ok(Found::Xml);
        }
        let place = self
            .bindings
            .iter()
            .rposition(|binding| binding.prefix == *prefix)
            .ok_or(XmlError::NotWellFormed)?;
        if self.bindings[place].depth == 0 && !self.borrowed.contains(&place) {
            self.borrowed.push(place);
        }
        Ok(Found::Bound(place))
    }

    fn namespace(&self, found: Found) -> &str {
        match found {
            Found::Xml => rxml::XMLNS_XML,
            Found::Bound(place) => &self.bindings[place].namespace,
        }
    }

    /// The declarations for what the current top-level element uses of the header's.
    fn take_borrowed(&mut self) -> String {
        let mut text = String::new();
        for place in self.borrowed.drain(..) {
            let Binding { prefix, namespace, .. } = &self.bindings[place];
            text.push_str(" xmlns:");
            text.push_str(prefix);
            text.push_str("='");
            text.push_str(&escape_attribute(namespace));
            text.push('\'');
        }
        text
    }
}

/// Namespaces in XML 1.0 §3 reserves one name, and rxml does not know it. A line feed, written as a reference, is
/// well-formed, but ejabberd parts namespace and name by one in what expat tells it, and expat refuses what would break that.
fn is_bindable(namespace: &str) -> bool {
    namespace != XMLNS_XMLNS && !namespace.contains('\n')
}

/// What a prefix stands for.
#[derive(Clone, Copy, Debug)]
enum Found {
    Xml,
    /// An index into the bindings.
    Bound(usize),
}

impl Element {
    /// Its tree. What the reader has let through can be read; of anything else, what could be read is given.
    pub fn node(&self) -> Node {
        let text = String::from_utf8_lossy(&self.bytes);
        let mut reader = NsReader::from_str(&text);
        let resolver = reader.resolver_mut();
        resolver.set_max_namespace_bindings(usize::MAX);
        resolver
            .add(PrefixDeclaration::Default, Namespace(ns::SERVER))
            .expect("the default namespace may always be bound");
        let mut open: Vec<Node> = Vec::new();
        let mut done = Node::default();
        while let Ok((namespace, event)) = reader.read_resolved_event() {
            let namespace = resolved(&namespace);
            let (node, ends) = match event {
                Event::Start(tag) => (Node::from_tag(namespace, &tag), false),
                Event::Empty(tag) => (Node::from_tag(namespace, &tag), true),
                Event::End(_) => match open.pop() {
                    Some(node) => (node, true),
                    None => break,
                },
                Event::Eof => break,
                other => {
                    if let Some(node) = open.last_mut() {
                        push_text(&mut node.text, &other);
                    }
                    continue;
                }
            };
            if !ends {
                open.push(node);
            } else if let Some(parent) = open.last_mut() {
                parent.children.push(node);
            } else {
                done = node;
                break;
            }
        }
        done
    }
}

fn resolved(namespace: &ResolveResult<'_>) -> String {
    match namespace {
        ResolveResult::Bound(Namespace(namespace)) => unescaped(namespace),
        ResolveResult::Unbound | ResolveResult::Unknown(_) => String::new(),
    }
}

fn unescaped(text: &str) -> String {
    quick_xml::escape::unescape(text).map_or_else(|_| text.to_owned(), Cow::into_owned)
}

fn push_text(text: &mut String, event: &Event<'_>) {
    match event {
        Event::Text(piece) => text.push_str(&piece.xml10_content()),
        Event::CData(piece) => text.push_str(&piece.xml10_content()),
        Event::GeneralRef(reference) => match reference.resolve_char_ref() {
            Ok(Some(character)) => text.push(character),
            _ => text.push_str(quick_xml::escape::resolve_xml_entity(reference).unwrap_or_default()),
        },
        _ => {}
    }
}

impl Node {
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes
            .iter()
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }

    pub fn child(&self, namespace: &str, name: &str) -> Option<&Node> {
        self.children
            .iter()
            .find(|child| child.namespace == namespace && child.name == name)
    }

    pub fn children_in<'a, 'n>(&'a self, namespace: &'n str) -> impl Iterator<Item = &'a Node> + use<'a, 'n> {
        self.children.iter().filter(move |child| child.namespace == namespace)
    }

    fn from_tag(namespace: String, tag: &BytesStart<'_>) -> Self {
        let attributes = tag
            .attributes()
            .with_checks(false)
            .flatten()
            .filter(|attribute| attribute.key.as_namespace_binding().is_none())
            .map(|attribute| {
                let value = attribute.normalized_value(XmlVersion::Implicit1_0).unwrap_or_default();
                (attribute.key.0.to_owned(), value.into_owned())
            })
            .collect();
        Self {
            namespace,
            name: tag.local_name().into_inner().to_owned(),
            attributes,
            ..Self::default()
        }
    }
}

/// Why a stream cannot go on, by its stream error (RFC 6120 §4.9.3).
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum XmlError {
    #[error("not well-formed XML")]
    NotWellFormed,
    #[error("a comment, processing instruction, DTD or entity reference")]
    Restricted,
    #[error("{0} over its limit")]
    OverLimit(&'static str),
    #[error("not a stream header")]
    BadHeader,
    #[error("text between stanzas")]
    BadFormat,
    #[error("not the namespace of a stream between servers")]
    InvalidNamespace,
    #[error("a prefix where none may be, or none where one must be")]
    BadNamespacePrefix,
    #[error("not UTF-8")]
    UnsupportedEncoding,
}

impl XmlError {
    /// The defined condition: `not-well-formed`, `restricted-xml`, `policy-violation`, `invalid-namespace`, `bad-format`,
    /// `bad-namespace-prefix`, `unsupported-encoding`, …
    pub fn condition(&self) -> &'static str {
        match self {
            Self::NotWellFormed => "not-well-formed",
            Self::Restricted => "restricted-xml",
            Self::OverLimit(_) => "policy-violation",
            Self::BadHeader | Self::BadFormat => "bad-format",
            Self::InvalidNamespace => "invalid-namespace",
            Self::BadNamespacePrefix => "bad-namespace-prefix",
            Self::UnsupportedEncoding => "unsupported-encoding",
        }
    }
}

fn is_white_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
}

/// rxml looks through all it is given for each text event, so long texts must come in pieces.
const CHUNK_BYTES_MAX: usize = 16 * 1024;

/// rxml's limit for one name or attribute value, which it keeps in memory: no less than an element's, because the
/// servers let long ones through (a thumbnail in a `data:` address), and one refusal closes the stream for everybody.
const TOKEN_BYTES_MAX: usize = Limits::AFTER_AUTHENTICATION.stanza_bytes_max;

/// Prefixes in scope at once, those of the stream header included. Each use of a prefix looks through them;
/// 128 is also where quick-xml stops by default.
const PREFIXES_MAX: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: &str = "<?xml version='1.0'?><stream:stream xmlns='jabber:server' xmlns:db='jabber:server:dialback' \
        xmlns:stream='http://etherx.jabber.org/streams' from='a.example' to='b.example' id='' version='1.0' xml:lang='en'>";

    /// All items that `text` gives in chunks of `size`, and how it ended.
    fn read(text: &[u8], size: usize, limits: Limits) -> (Vec<StreamItem>, Option<XmlError>) {
        let mut reader = StreamReader::new(limits);
        let mut items = Vec::new();
        for chunk in text.chunks(size) {
            reader.push(chunk);
            loop {
                match reader.poll_item() {
                    Ok(Some(item)) => items.push(item),
                    Ok(None) => break,
                    Err(error) => return (items, Some(error)),
                }
            }
        }
        (items, None)
    }

    /// The elements of a stream with these contents.
    fn elements(content: &str) -> Vec<Element> {
        let (items, error) = read(
            format!("{HEADER}{content}").as_bytes(),
            usize::MAX,
            Limits::AFTER_AUTHENTICATION,
        );
        assert_eq!(error, None, "{content}");
        items
            .into_iter()
            .filter_map(|item| match item {
                StreamItem::Element(element) => Some(element),
                StreamItem::Header(_) | StreamItem::Close => None,
            })
            .collect()
    }

    fn condition(text: &str) -> &'static str {
        let (_, error) = read(text.as_bytes(), usize::MAX, Limits::AFTER_AUTHENTICATION);
        error.map_or("accepted", |error| error.condition())
    }

    fn condition_in_stream(content: &str) -> &'static str {
        condition(&format!("{HEADER}{content}"))
    }

    /// A whole stream, byte by byte: header, elements as written without the white space between them, close.
    #[test]
    fn gives_exact_elements() {
        let stream = format!(
            "{HEADER} \n<message to='b'\r\n><body>a &amp; <![CDATA[<b>]]>\r</body></message>\n\t<iq  id=\"1\" /><x xmlns='urn:x'\n/> </stream:stream>\n"
        );
        let (items, error) = read(stream.as_bytes(), 1, Limits::AFTER_AUTHENTICATION);
        assert_eq!(error, None);
        let header = StreamHeader {
            from: Some("a.example".into()),
            to: Some("b.example".into()),
            id: Some(String::new()),
            version: Some("1.0".into()),
            dialback: true,
        };
        let element = |namespace: &str, name: &str, bytes: &'static str| {
            StreamItem::Element(Element {
                namespace: namespace.into(),
                name: name.into(),
                bytes: Bytes::from_static(bytes.as_bytes()),
            })
        };
        let expected = [
            StreamItem::Header(header),
            element(
                ns::SERVER,
                "message",
                "<message to='b'\r\n><body>a &amp; <![CDATA[<b>]]>\r</body></message>",
            ),
            element(ns::SERVER, "iq", "<iq  id=\"1\" />"),
            element("urn:x", "x", "<x xmlns='urn:x'\n/>"),
            StreamItem::Close,
        ];
        assert_eq!(items, expected);
    }

    /// A prefix that only the stream header binds is declared on the element that uses it, at any depth; nothing else changes.
    #[test]
    fn makes_elements_self_contained() {
        let given = elements(
            "<db:verify from='a' to='b' id='1'>k</db:verify><message><x db:y='1'/><stream:z/></message>\
             <message><x xmlns:db='urn:own' db:y='1'/></message><db:r xmlns:db='urn:own'/>",
        );
        let bytes: Vec<_> = given
            .iter()
            .map(|element| str::from_utf8(&element.bytes).unwrap())
            .collect();
        assert_eq!(
            bytes,
            [
                "<db:verify xmlns:db='jabber:server:dialback' from='a' to='b' id='1'>k</db:verify>",
                "<message xmlns:db='jabber:server:dialback' xmlns:stream='http://etherx.jabber.org/streams'>\
                 <x db:y='1'/><stream:z/></message>",
                "<message><x xmlns:db='urn:own' db:y='1'/></message>",
                "<db:r xmlns:db='urn:own'/>",
            ]
        );
        assert_eq!(
            (given[0].namespace.as_str(), given[0].name.as_str()),
            (ns::DIALBACK, "verify")
        );
        assert_eq!(given[3].namespace, "urn:own");
    }

    /// Only a stream between servers is one (RFC 6120 §4.8).
    #[test]
    fn refuses_other_stream_headers() {
        let header = |name: &str, attributes: &str| condition(&format!("<{name} {attributes}>"));
        let stream = "xmlns:s='http://etherx.jabber.org/streams'";
        assert_eq!(
            header("s:stream", &format!("xmlns='jabber:server' {stream}")),
            "accepted"
        );
        assert_eq!(
            header("s:stream", &format!("xmlns='jabber:client' {stream}")),
            "invalid-namespace"
        );
        assert_eq!(header("s:stream", stream), "invalid-namespace");
        assert_eq!(
            header("s:stream", "xmlns='jabber:server' xmlns:s='urn:x'"),
            "invalid-namespace"
        );
        assert_eq!(
            header("stream", "xmlns='http://etherx.jabber.org/streams'"),
            "bad-namespace-prefix"
        );
        assert_eq!(
            header("s:flow", &format!("xmlns='jabber:server' {stream}")),
            "bad-format"
        );
        assert_eq!(header("s:stream", "xmlns='jabber:server'"), "not-well-formed");
        assert_eq!(condition("GET / HTTP/1.1\r\n"), "not-well-formed");
        assert_eq!(condition(&format!("\n{HEADER}")), "not-well-formed");
        assert_eq!(condition(&format!("\r\n{}", &HEADER[21..])), "accepted");
    }

    /// Bytes that came after an item that restarts the stream can be taken back.
    #[test]
    fn returns_what_was_not_read() {
        let mut reader = StreamReader::new(Limits::BEFORE_AUTHENTICATION);
        reader.push(HEADER.as_bytes());
        reader.push(b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>\n\x16\x03\x01");
        assert!(matches!(reader.poll_item(), Ok(Some(StreamItem::Header(_)))));
        assert!(matches!(reader.poll_item(), Ok(Some(StreamItem::Element(_)))));
        assert_eq!(reader.take_unread(), &b"\n\x16\x03\x01"[..]);
        assert_eq!(reader.poll_item(), Ok(None));
    }

    /// A tree for looking into: namespaces resolved, references replaced, text of its own.
    #[test]
    fn reads_an_element_into_a_tree() {
        let given = elements(
            "<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'><required/></starttls>\
             <p:a xmlns:p='urn:&quot;&amp;' x='1&#10;&lt;' xml:lang='en' p:x='2'>&#x41;&amp;<b xmlns=''/><![CDATA[&]]>\r\n</p:a></stream:features>",
        );
        let node = given[0].node();
        assert_eq!((node.namespace.as_str(), node.name.as_str()), (ns::STREAM, "features"));
        assert!(
            node.child(ns::TLS, "starttls")
                .unwrap()
                .child(ns::TLS, "required")
                .is_some()
        );
        assert!(node.child(ns::SASL, "starttls").is_none());
        let a = node.children_in("urn:\"&").next().unwrap();
        assert_eq!(a.attribute("x"), Some("1\n<"));
        assert_eq!(a.attribute("xml:lang"), Some("en"));
        assert_eq!(a.attribute("p:x"), Some("2"));
        assert_eq!(a.attributes.len(), 3);
        assert_eq!(a.text, "A&&\n");
        assert_eq!(a.children[0].namespace, "");
        assert_eq!(elements("<iq/>")[0].node().namespace, ns::SERVER);
    }

    /// At each limit an element passes, and one step beyond it does not, whatever the chunks; the size is refused before the end has come.
    #[test]
    fn keeps_the_limits() {
        let limits = Limits {
            stanza_bytes_max: 400,
            depth_max: 3,
            attributes_max: 10,
            elements_max: 5,
        };
        let attributes = |count: usize| (0..count).map(|n| format!(" a{n}=''")).collect::<String>();
        let cases = [
            (
                format!("<iq>{}</iq>", "x".repeat(391)),
                format!("<iq>{}", "x".repeat(396)),
            ),
            ("<a><b><c/></b></a>".into(), "<a><b><c><d/></c></b></a>".into()),
            (format!("<a{}/>", attributes(10)), format!("<a{}/>", attributes(11))),
            ("<a><b/><b/><b/><b/></a>".into(), "<a><b/><b/><b/><b/><b/></a>".into()),
        ];
        for (fits, exceeds) in cases {
            for size in [1, 7, usize::MAX] {
                let (items, error) = read(format!("{HEADER}{fits}{fits}").as_bytes(), size, limits);
                assert_eq!((items.len(), error), (3, None), "{fits}");
                let (items, error) = read(format!("{HEADER}{fits}{exceeds}").as_bytes(), size, limits);
                assert_eq!(items.len(), 2, "{exceeds}");
                assert_eq!(
                    error.map(|error| error.condition()),
                    Some("policy-violation"),
                    "{exceeds}"
                );
            }
        }
    }

    /// New limits hold from the next element on.
    #[test]
    fn changes_limits_between_elements() {
        let mut reader = StreamReader::new(Limits::BEFORE_AUTHENTICATION);
        let long = format!("<iq>{}</iq>", "x".repeat(20_000));
        reader.push(HEADER.as_bytes());
        assert!(reader.poll_item().unwrap().is_some());
        reader.set_limits(Limits::AFTER_AUTHENTICATION);
        reader.push(long.as_bytes());
        assert!(reader.poll_item().unwrap().is_some());
        reader.push(b"<iq>");
        assert_eq!(reader.poll_item(), Ok(None));
        reader.set_limits(Limits::BEFORE_AUTHENTICATION);
        reader.push(&long.as_bytes()[4..]);
        assert!(reader.poll_item().unwrap().is_some());
        reader.push(long.as_bytes());
        assert_eq!(reader.poll_item(), Err(XmlError::OverLimit("element size")));
        reader.push(long.as_bytes());
        assert_eq!(reader.poll_item(), Err(XmlError::OverLimit("element size")));
    }

    /// Prefixed stanzas and anything but elements and white space between elements.
    #[test]
    fn refuses_what_may_not_stand_in_a_stream() {
        assert_eq!(
            condition_in_stream("<s:iq xmlns:s='jabber:server'/>"),
            "bad-namespace-prefix"
        );
        assert_eq!(condition_in_stream("x"), "bad-format");
        assert_eq!(condition_in_stream("&amp;"), "bad-format");
        assert_eq!(condition_in_stream("<![CDATA[]]><iq/>"), "bad-format");
        assert_eq!(condition_in_stream("<iq/></stream:stream><iq/>"), "accepted");
    }
}
