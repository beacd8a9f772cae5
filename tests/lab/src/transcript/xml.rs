//! The XML that a scripted client needs: cut a stream into stanzas, read a stanza into a tree, write a tree canonically.
//!
//! [`Framer`] takes bytes in any chunks and gives out the stream header, whole top-level elements as they came, and the
//! end of the stream. [`Element`] has its namespaces resolved, so that two spellings of one stanza are equal trees, and
//! [`Element::canonical`] writes equal trees as equal text. Text keeps its white space.
//!
//! The servers are trusted here to send well-formed XML: whatever is not is an error, never a guess.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use quick_xml::Reader;
use quick_xml::escape::{escape, unescape};
use quick_xml::events::{BytesStart, Event};

pub const CLIENT: &str = "jabber:client";
const STREAM: &str = "http://etherx.jabber.org/streams";
const XML: &str = "http://www.w3.org/XML/1998/namespace";

/// Twice the largest stanza that either server accepts (512 KiB): past this, framing has gone wrong.
const STANZA_BYTES_MAX: usize = 1 << 20;
/// Deeper than anything that XMPP sends; bounds the recursion that writes a tree.
const DEPTH_MAX: usize = 64;

/// A piece of a stream.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Piece {
    /// `<stream:stream …>`.
    Header(String),
    /// One whole element of depth one, as it came.
    Stanza(String),
    /// `</stream:stream>`.
    End,
}

/// Cuts a stream of bytes into [`Piece`]s.
#[derive(Debug, Default)]
pub struct Framer {
    buffer: Vec<u8>,
    /// Where the next token starts; everything before it belongs to the stanza that is being collected.
    token: usize,
    /// How far the search for the end of that token has come: a large text in small chunks is searched once.
    searched: usize,
    depth: usize,
    quote: Option<u8>,
}

impl Framer {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn push(&mut self, bytes: &[u8]) -> Result<(), String> {
        if self.buffer.len() + bytes.len() > STANZA_BYTES_MAX {
            return Err(format!("a stanza of more than {STANZA_BYTES_MAX} bytes"));
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The next piece that is there whole.
    pub fn next_piece(&mut self) -> Result<Option<Piece>, String> {
        loop {
            if !self.skip_text() {
                return Ok(None);
            }
            let Some(end) = self.token_end() else {
                return Ok(None);
            };
            let token = &self.buffer[self.token..end];
            let closes = token.starts_with(b"</");
            let opens = !closes && !token.starts_with(b"<?") && !token.starts_with(b"<!") && !token.ends_with(b"/>");
            let markup = token.starts_with(b"<?") || token.starts_with(b"<!");
            self.token = end;
            self.searched = end;
            if opens {
                self.depth += 1;
                if self.depth == 1 {
                    return self.take().map(|text| Some(Piece::Header(text)));
                }
            } else if closes {
                self.depth = self.depth.checked_sub(1).ok_or("an end tag without a start tag")?;
                if self.depth == 0 {
                    self.take()?;
                    return Ok(Some(Piece::End));
                }
            }
            if self.depth == 0 && markup {
                self.take()?;
            }
            if self.depth == 1 && !opens {
                return self.take().map(|text| Some(Piece::Stanza(text)));
            }
        }
    }

    /// Moves to the next `<`; false if there is none yet.
    fn skip_text(&mut self) -> bool {
        if self.token < self.searched {
            return true; // in the middle of a token
        }
        match self.buffer[self.token..].iter().position(|&byte| byte == b'<') {
            Some(at) if self.depth <= 1 => {
                // White space between stanzas is a keepalive.
                self.buffer.drain(..self.token + at);
                self.token = 0;
                self.searched = 0;
                true
            }
            Some(at) => {
                self.token += at;
                self.searched = self.token;
                true
            }
            None => {
                self.token = self.buffer.len();
                self.searched = self.token;
                false
            }
        }
    }

    fn token_end(&mut self) -> Option<usize> {
        let token = &self.buffer[self.token..];
        for (open, close) in [("<!--", "-->"), ("<![CDATA[", "]]>"), ("<?", "?>")] {
            if token.starts_with(open.as_bytes()) {
                let found = token.windows(close.len()).position(|window| window == close.as_bytes());
                return found.map(|at| self.token + at + close.len());
            }
            if open.as_bytes().starts_with(token) {
                return None; // it may become one of these
            }
        }
        for at in self.searched..self.buffer.len() {
            let byte = self.buffer[at];
            match self.quote {
                Some(quote) if byte == quote => self.quote = None,
                Some(_) => {}
                None if byte == b'"' || byte == b'\'' => self.quote = Some(byte),
                None if byte == b'>' => return Some(at + 1),
                None => {}
            }
        }
        self.searched = self.buffer.len();
        None
    }

    fn take(&mut self) -> Result<String, String> {
        let bytes = self.buffer.drain(..self.token).collect();
        self.token = 0;
        self.searched = 0;
        String::from_utf8(bytes).map_err(|error| format!("not UTF-8: {error}"))
    }
}

/// An element with its namespaces resolved.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Element {
    pub ns: String,
    pub name: String,
    /// By local name; an attribute of a namespace is `{namespace}name`, except `xml:lang` and its like.
    pub attrs: BTreeMap<String, String>,
    pub children: Vec<Node>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Node {
    Element(Element),
    Text(String),
}

impl Element {
    /// Reads one whole stanza of a client's stream.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut reader = Reader::from_str(text);
        let outer = BTreeMap::from([
            (String::new(), CLIENT.to_owned()),
            ("stream".to_owned(), STREAM.to_owned()),
            ("xml".to_owned(), XML.to_owned()),
        ]);
        let mut open: Vec<(Element, BTreeMap<String, String>)> = Vec::new();
        loop {
            let scope = open.last().map_or(&outer, |(_, scope)| scope);
            let done = match reader.read_event().map_err(|error| error.to_string())? {
                Event::Start(tag) => {
                    if open.len() == DEPTH_MAX {
                        return Err(format!("deeper than {DEPTH_MAX}"));
                    }
                    let opened = read_tag(&tag, scope)?;
                    open.push(opened);
                    None
                }
                Event::Empty(tag) => Some(read_tag(&tag, scope)?.0),
                Event::End(_) => open.pop().map(|(element, _)| element),
                Event::Text(text) => {
                    append(&mut open, &text.xml10_content());
                    None
                }
                Event::CData(text) => {
                    append(&mut open, &text.xml10_content());
                    None
                }
                Event::GeneralRef(reference) => {
                    let reference = format!("&{};", reference.into_inner());
                    append(&mut open, &unescape(&reference).map_err(|error| error.to_string())?);
                    None
                }
                Event::Eof => return Err("it ends too early".to_owned()),
                other @ (Event::Comment(_) | Event::Decl(_) | Event::PI(_) | Event::DocType(_)) => {
                    return Err(format!("restricted XML: {other:?}"));
                }
            };
            if let Some(element) = done {
                match open.last_mut() {
                    Some((parent, _)) => parent.children.push(Node::Element(element)),
                    None => return Ok(element),
                }
            }
        }
    }

    pub fn attr(&self, name: &str) -> Option<&str> {
        self.attrs.get(name).map(String::as_str)
    }

    pub fn is(&self, ns: &str, name: &str) -> bool {
        self.ns == ns && self.name == name
    }

    pub fn elements(&self) -> impl Iterator<Item = &Element> {
        self.children.iter().filter_map(|node| match node {
            Node::Element(element) => Some(element),
            Node::Text(_) => None,
        })
    }

    /// The first child of that namespace and name.
    pub fn child(&self, ns: &str, name: &str) -> Option<&Element> {
        self.elements().find(|element| element.is(ns, name))
    }

    /// The first element of that namespace and name anywhere below.
    pub fn find(&self, ns: &str, name: &str) -> Option<&Element> {
        self.elements().find_map(|element| {
            if element.is(ns, name) {
                Some(element)
            } else {
                element.find(ns, name)
            }
        })
    }

    /// Its own text, without that of its children.
    pub fn text(&self) -> String {
        let own = self.children.iter().filter_map(|node| match node {
            Node::Element(_) => None,
            Node::Text(text) => Some(text.as_str()),
        });
        own.collect()
    }

    /// The text of the first child of that namespace and name.
    pub fn child_text(&self, ns: &str, name: &str) -> Option<String> {
        self.child(ns, name).map(Element::text)
    }

    /// Equal trees give equal text: attributes sorted, namespaces written where they change, one way to quote.
    pub fn canonical(&self) -> String {
        let mut out = String::new();
        self.write(&mut out, CLIENT);
        out
    }

    fn write(&self, out: &mut String, outer_ns: &str) {
        let _ = write!(out, "<{}", self.name); // writing to a String cannot fail
        if self.ns != outer_ns {
            let _ = write!(out, " xmlns='{}'", escape(self.ns.as_str()));
        }
        for (name, value) in &self.attrs {
            let _ = write!(out, " {name}='{}'", escape(value.as_str()));
        }
        if self.children.is_empty() {
            out.push_str("/>");
            return;
        }
        out.push('>');
        for node in &self.children {
            match node {
                Node::Element(element) => element.write(out, &self.ns),
                Node::Text(text) => out.push_str(&escape(text.as_str())),
            }
        }
        let _ = write!(out, "</{}>", self.name);
    }
}

/// Escapes text for an element's content or an attribute.
pub fn escaped(text: &str) -> String {
    escape(text).into_owned()
}

/// Adjacent pieces of text (an entity, a CDATA section) are one text.
fn append(open: &mut [(Element, BTreeMap<String, String>)], more: &str) {
    let Some((parent, _)) = open.last_mut() else {
        return; // white space outside of the stanza
    };
    match parent.children.last_mut() {
        Some(Node::Text(text)) => text.push_str(more),
        Some(Node::Element(_)) | None if more.is_empty() => {}
        Some(Node::Element(_)) | None => parent.children.push(Node::Text(more.to_owned())),
    }
}

fn read_tag(
    tag: &BytesStart<'_>,
    outer: &BTreeMap<String, String>,
) -> Result<(Element, BTreeMap<String, String>), String> {
    let mut scope = outer.clone();
    let mut plain = Vec::new();
    for attribute in tag.attributes() {
        let attribute = attribute.map_err(|error| error.to_string())?;
        let key = attribute.key.as_ref();
        let value = unescape(&attribute.value)
            .map_err(|error| error.to_string())?
            .into_owned();
        match key.strip_prefix("xmlns") {
            Some("") => scope.insert(String::new(), value),
            Some(prefix) if prefix.starts_with(':') => scope.insert(prefix[1..].to_owned(), value),
            Some(_) | None => {
                plain.push((key.to_owned(), value));
                None
            }
        };
    }
    let mut attrs = BTreeMap::new();
    for (key, value) in plain {
        let key = match key.split_once(':') {
            None | Some(("xml", _)) => key,
            Some((prefix, local)) => {
                let ns = scope
                    .get(prefix)
                    .ok_or_else(|| format!("no namespace for the prefix of {key}"))?;
                format!("{{{ns}}}{local}")
            }
        };
        if attrs.insert(key.clone(), value).is_some() {
            return Err(format!("attribute {key} twice"));
        }
    }
    let qualified = tag.name();
    let qualified: &str = qualified.as_ref();
    let (prefix, name) = qualified.split_once(':').unwrap_or(("", qualified));
    let ns = scope
        .get(prefix)
        .ok_or_else(|| format!("no namespace for {qualified}"))?
        .clone();
    let element = Element {
        ns,
        name: name.to_owned(),
        attrs,
        children: Vec::new(),
    };
    Ok((element, scope))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM_TEXT: &str = "<?xml version='1.0'?><stream:stream xmlns='jabber:client' \
        xmlns:stream='http://etherx.jabber.org/streams' id='a>b' version=\"1.0\"> \n<presence/><message to='x'><body>a\
        <![CDATA[</message> > ]]> 'quoted' ü</body><e a='/>'/><e></e></message>  <iq type='result' id=\"'\"/>\
        <message><body>💧</body></message></stream:stream>";

    fn cut(chunks: &[&[u8]]) -> Vec<Piece> {
        let mut framer = Framer::new();
        let mut pieces = Vec::new();
        for chunk in chunks {
            framer.push(chunk).unwrap();
            while let Some(piece) = framer.next_piece().unwrap() {
                pieces.push(piece);
            }
        }
        pieces
    }

    /// A stream is cut the same way however TCP has cut it.
    ///
    /// Whole, byte by byte, and split once at every place.
    #[test]
    fn framing_does_not_depend_on_chunks() {
        let bytes = STREAM_TEXT.as_bytes();
        let whole = cut(&[bytes]);
        assert_eq!(whole.len(), 6, "{whole:?}");
        assert!(matches!(&whole[0], Piece::Header(header) if header.starts_with("<stream:stream")));
        assert_eq!(whole[1], Piece::Stanza("<presence/>".to_owned()));
        assert_eq!(whole[5], Piece::End);
        assert_eq!(cut(&bytes.chunks(1).collect::<Vec<_>>()), whole);
        for at in 0..bytes.len() {
            assert_eq!(cut(&[&bytes[..at], &bytes[at..]]), whole, "cut at {at}");
        }
    }

    /// A tree does not depend on quotes, prefixes, attribute order, CDATA or entities, but on every character of text.
    #[test]
    fn canonical_form_keeps_meaning_only() {
        let one =
            "<message b='2' a=\"1\"><x:y xmlns:x='urn:y' x:k='v'>&lt; a &#x26; b</x:y> <body xml:lang='en'/></message>";
        let two = "<message a='1' b='2'><y xmlns='urn:y' xmlns:z='urn:y' z:k='v'><![CDATA[< a & b]]></y> \
                   <body xml:lang='en'></body></message>";
        let canonical = Element::parse(one).unwrap().canonical();
        assert_eq!(canonical, Element::parse(two).unwrap().canonical());
        for (from, to) in [
            ("a &#x26;", "a  &#x26;"),
            ("urn:y", "urn:z"),
            ("'2'", "'3'"),
            ("body", "bodi"),
            ("> <", "><"),
        ] {
            let other = Element::parse(&one.replace(from, to)).unwrap().canonical();
            assert_ne!(canonical, other, "{from} became {to}");
        }
    }

    /// What is not a stanza of XMPP is refused, not repaired.
    #[test]
    fn broken_xml_is_an_error() {
        for text in [
            "<a><b></a>",
            "<a",
            "<x:a/>",
            "<a><!-- c --></a>",
            "<a b='1' b='2'/>",
            "<a>&auml;</a>",
            "",
        ] {
            assert!(Element::parse(text).is_err(), "{text}");
        }
        assert!(Element::parse(&"<a>".repeat(DEPTH_MAX + 1)).is_err());
        let mut framer = Framer::new();
        assert!(framer.push(&vec![b' '; STANZA_BYTES_MAX + 1]).is_err());
    }
}
