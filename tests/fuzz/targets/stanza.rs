//! Whatever bytes are taken for a stanza, nothing panics, and splitting is undone by joining.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use narrows::stanza::{Condition, ErrorType, Stanza, bounce};

fuzz_target!(|input: &[u8]| {
    let Ok(stanza) = Stanza::parse(Bytes::copy_from_slice(input)) else {
        return;
    };
    if let Some((template, to_at, attribute)) = stanza.split_to() {
        assert_eq!(Stanza::join(&template, to_at, &attribute), input);
    }
    let _ = (stanza.from(), stanza.id(), stanza.stanza_type(), stanza.has_muc_status("110"));
    if let Some(error) = bounce(&stanza, ErrorType::Wait, Condition::ResourceConstraint, "busy") {
        let error = Stanza::parse(error).expect("our own stanza");
        assert!(error.is_error());
        assert_eq!((error.to(), error.from(), error.id()), (stanza.from(), stanza.to(), stanza.id()));
    }
});
