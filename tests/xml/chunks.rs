use narrows::{
    codec::xml::StreamItem,
    stanza::{Stanza, ns},
};
use proptest::{collection::vec, prelude::*};

use super::{
    HEADER,
    generate::{self, Tape},
    read,
};

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, failure_persistence: None, ..ProptestConfig::default() })]

    /// However a stream is cut, the same items come out of it, and the same error ends it.
    #[test]
    fn chunks_make_no_difference(tape in vec(any::<u8>(), 0..400), lengths in vec(1_usize..50, 1..20)) {
        let stream = generate::stream(&mut Tape(&tape));
        let (whole, cut) = (read(&stream, &[usize::MAX]), read(&stream, &lengths));
        prop_assert_eq!(&whole.items, &cut.items, "{}", String::from_utf8_lossy(&stream));
        prop_assert_eq!(&whole.error, &cut.error, "{}", String::from_utf8_lossy(&stream));
    }

    /// A stream that is well-formed is accepted, and its elements hold every byte that is not white space between them;
    /// read again in a stream that declares nothing else, they are the same elements.
    #[test]
    fn elements_are_exact_and_stand_alone(tape in vec(any::<u8>(), 0..400)) {
        let stream = generate::well_formed(&mut Tape(&tape));
        let reading = read(stream.as_bytes(), &[usize::MAX]);
        prop_assert_eq!(&reading.error, &None, "{}", stream);
        prop_assert!(reading.is_closed());
        let mut rest = stream.strip_prefix(HEADER).unwrap();
        for item in &reading.items {
            let StreamItem::Element(element) = item else { continue };
            let bytes = std::str::from_utf8(&element.bytes).unwrap();
            let written = bytes.replacen(" xmlns:db='jabber:server:dialback'", "", 1);
            rest = rest.trim_start_matches([' ', '\r', '\n', '\t']);
            prop_assert!(rest.starts_with(&written), "{} in {}", written, rest);
            rest = &rest[written.len()..];

            let alone = format!("<s:stream xmlns:s='{}' xmlns='jabber:server'>{bytes}</s:stream>", ns::STREAM);
            let again = read(alone.as_bytes(), &[usize::MAX]);
            prop_assert_eq!(again.items.get(1), Some(item), "{:?}", again.error);
            let node = element.node();
            prop_assert_eq!((&node.namespace, &node.name), (&element.namespace, &element.name));
        }
        prop_assert_eq!(rest.trim_start_matches([' ', '\r', '\n', '\t']), "</stream:stream>");
    }

    /// What the reader lets through as a stanza can be split and joined, and its addressing is what a tree of it says.
    #[test]
    fn stanzas_split_and_join(tape in vec(any::<u8>(), 0..400)) {
        let stream = generate::well_formed(&mut Tape(&tape));
        for item in read(stream.as_bytes(), &[usize::MAX]).items {
            let StreamItem::Element(element) = item else { continue };
            let named = matches!(element.name.as_str(), "message" | "presence" | "iq");
            if element.namespace != ns::SERVER || !named {
                prop_assert!(Stanza::parse(element.bytes).is_err());
                continue;
            }
            let stanza = Stanza::parse(element.bytes.clone()).unwrap();
            let node = element.node();
            for (name, value) in [
                ("to", stanza.to()),
                ("from", stanza.from()),
                ("id", stanza.id()),
                ("type", stanza.stanza_type()),
            ] {
                prop_assert_eq!(value.as_deref(), node.attribute(name), "{}", name);
            }
            match stanza.split_to() {
                None => prop_assert_eq!(stanza.to(), None),
                Some((template, to_at, attribute)) => {
                    prop_assert_eq!(Stanza::join(&template, to_at, &attribute), stanza.bytes());
                    prop_assert!(Stanza::parse(template).unwrap().to().is_none());
                }
            }
        }
    }

    /// Whatever bytes come, nothing panics.
    #[test]
    fn anything_may_come(bytes in vec(any::<u8>(), 0..200), length in 1_usize..10) {
        read(&bytes, &[length]);
        let _ = Stanza::parse(bytes.into());
    }
}
