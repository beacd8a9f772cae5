//! However a stream is cut, the same items come out, or the same error; what comes out can be read on its own.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narrows::{
    codec::xml::{Limits, StreamItem, StreamReader, XmlError},
    stanza::Stanza,
};

const HEADER: &[u8] = b"<?xml version='1.0'?><stream:stream xmlns='jabber:server' xmlns:db='jabber:server:dialback' \
    xmlns:stream='http://etherx.jabber.org/streams' version='1.0'>";

fn read(stream: &[u8], length: usize) -> (Vec<StreamItem>, Option<XmlError>) {
    let mut reader = StreamReader::new(Limits::BEFORE_AUTHENTICATION);
    let mut items = Vec::new();
    for chunk in stream.chunks(length) {
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

fuzz_target!(|input: &[u8]| {
    // The first byte says how the stream is cut, and whether its header is ours.
    let Some((choice, input)) = input.split_first() else {
        return;
    };
    let stream = match choice & 1 {
        0 => [HEADER, input].concat(),
        _ => input.to_vec(),
    };
    let whole = read(&stream, stream.len().max(1));
    assert_eq!(whole, read(&stream, usize::from(choice >> 1) + 1));
    for item in whole.0 {
        if let StreamItem::Element(element) = item {
            let node = element.node();
            assert_eq!((&node.namespace, &node.name), (&element.namespace, &element.name));
            assert_ne!(Stanza::parse(element.bytes), Err(narrows::stanza::StanzaError::Malformed));
        }
    }
});
