//! Streams made from a tape of choices, so that a smaller tape makes a simpler stream.

use super::HEADER;

/// Choices, one byte each; zeros when it has run out.
pub struct Tape<'a>(pub &'a [u8]);

impl Tape<'_> {
    /// A number below `count`, which is 256 at most.
    fn below(&mut self, count: usize) -> usize {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        usize::from(*first) % count
    }

    fn pick<'b>(&mut self, choices: &[&'b str]) -> &'b str {
        choices[self.below(choices.len())]
    }
}

/// A stream that is well-formed, but for some changes that may spoil it.
pub fn stream(tape: &mut Tape<'_>) -> Vec<u8> {
    let changes = [0, 0, 1, 1, 2, 3][tape.below(6)];
    let mut stream = well_formed(tape).into_bytes();
    for _ in 0..changes {
        change(tape, &mut stream);
    }
    stream
}

/// A stream that the reader must accept.
pub fn well_formed(tape: &mut Tape<'_>) -> String {
    let mut text = String::from(HEADER);
    for _ in 0..tape.below(6) {
        text.push_str(tape.pick(&["", " ", "\r\n", "\t\n"]));
        element(tape, &mut text, 0);
    }
    text.push_str("</stream:stream>");
    text
}

fn element(tape: &mut Tape<'_>, text: &mut String, depth: usize) {
    let prefixes = ["", "", "", "db:", "p:", "xml:"];
    let prefix = match depth {
        0 => tape.pick(&["", "", "", "db:"]),
        _ => tape.pick(&prefixes),
    };
    let name = tape.pick(&["message", "iq", "presence", "x", "body", "_a-b.c1", "é", "名前"]);
    text.push_str(&format!("<{prefix}{name}"));
    // Bound on every element that may use it, to a namespace of its own.
    if prefix == "p:" || tape.below(3) == 0 {
        text.push_str(tape.pick(&[" xmlns:p='urn:p'", " xmlns:p=\"u&amp;p\"", " xmlns:p='\u{e9} '"]));
        if tape.below(2) == 0 {
            text.push_str(" p:a='1'");
        }
    }
    for name in ["to", "from", "id", "xml:lang", "db:y", "xmlns"]
        .into_iter()
        .skip(tape.below(7))
    {
        if name == "xmlns" && depth == 0 && prefix.is_empty() {
            continue;
        }
        let blank = tape.pick(&[" ", "  ", "\n", "\r", "\r\n\t"]);
        let equals = tape.pick(&["=", "=", " = ", "\r="]);
        let (quote, other) = [("'", "\""), ("\"", "'")][tape.below(2)];
        let values = [
            "",
            "a@b.example/c",
            "&lt;&gt;&amp;&quot;&apos;",
            "x\ry\r\nz\n",
            "é>",
            "]]>",
            "&#x41;&#10;",
        ];
        // No namespace holds a line feed.
        let value = tape.pick(&values[..values.len() - usize::from(name == "xmlns")]);
        text.push_str(&format!("{blank}{name}{equals}{quote}{value}{other}{quote}"));
    }
    text.push_str(tape.pick(&["", "", " ", "\r"]));
    if tape.below(3) == 0 {
        text.push_str("/>");
        return;
    }
    text.push('>');
    for _ in 0..tape.below(4) {
        match tape.below(4) {
            0 if depth < 4 => element(tape, text, depth + 1),
            1 => text.push_str(tape.pick(&[
                "<![CDATA[]]>",
                "<![CDATA[<&]] >]]>",
                "<![CDATA[]]]>",
                "<![CDATA[\r\n]]>",
            ])),
            _ => text.push_str(tape.pick(&[
                "text",
                " ",
                "&amp;",
                "&#x1F600;",
                "\r",
                "\r\n",
                "]",
                "]]",
                "] >",
                " >",
                "é\u{10ffff}",
                "\u{7f}\u{85}\u{2028}",
            ])),
        }
    }
    text.push_str(&format!("</{prefix}{name}{}>", tape.pick(&["", "", " ", "\r\n"])));
}

fn change(tape: &mut Tape<'_>, stream: &mut Vec<u8>) {
    const PIECES: &[&[u8]] = &[
        b"<",
        b">",
        b"&",
        b"'",
        b"\"",
        b"=",
        b"/",
        b":",
        b";",
        b"\0",
        b"\x01",
        b"\x7f",
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xef\xbf\xbf",
        b"\xef\xbb\xbf",
        b"\xf4\x90\x80\x80",
        b"\xe9",
        b"]]>",
        b"<!--x-->",
        b"<?xml version='1.0'?>",
        b"<?a b?>",
        b"<!DOCTYPE a>",
        b"<![CDATA[",
        b"&x;",
        b"&#0;",
        b"&#xD800;",
        b"&#xFFFF;",
        b"&#x00000041;",
        b"&#;",
        b"&#x;",
        b" xmlns=''",
        b" xmlns='urn:x'",
        b" xmlns:p=''",
        b" xmlns:p='urn:p'",
        b" xmlns:q='urn:p' q:a=''",
        b" xmlns:xml='x'",
        b" xmlns:xmlns='x'",
        b" xmlns:p='http://www.w3.org/2000/xmlns/'",
        b" xmlns='http://www.w3.org/XML/1998/namespace'",
        b" xmlns:xml='http://www.w3.org/XML/1998/namespace'",
        b" q:a=''",
        b" to=''",
        b" a:b:c=''",
        b"<:a/>",
        b"<a:/>",
        b"<1/>",
        b"<\xf0\x90\x80\x80/>",
        b"<a\xcd\xbe/>",
        b"<a",
        b"</a>",
        b"<a>",
        b"<a/>",
        b" ",
        b"\r",
        b"\n",
        b"x",
        b"xml:",
        b"xmlns:",
        b"p:",
    ];
    if stream.is_empty() {
        return;
    }
    let at = (tape.below(256) * 256 + tape.below(256)) % stream.len();
    let end = (at + tape.below(40)).min(stream.len());
    match tape.below(6) {
        0 => drop(stream.drain(at..end)),
        1 => {
            let again = stream[at..end].to_vec();
            stream.splice(at..at, again);
        }
        2 => stream[at] = tape.below(256) as u8,
        _ => {
            let piece = PIECES[tape.below(PIECES.len())];
            stream.splice(at..at, piece.iter().copied());
        }
    }
}
