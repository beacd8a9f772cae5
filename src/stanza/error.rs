//! Stanza errors (RFC 6120 §8.3) that we originate.

use bytes::Bytes;

use super::Stanza;

/// The defined conditions that we send ourselves (RFC 6120 §8.3.3).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Condition {
    ResourceConstraint,
    RemoteServerTimeout,
    PolicyViolation,
    ServiceUnavailable,
}

/// RFC 6120 §8.3.2
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ErrorType {
    Cancel,
    Modify,
    Wait,
}

/// The answer that returns `stanza` to its sender, or `None` where an answer is not allowed or would do harm:
/// to an error or result (RFC 6120 §8.3.1), to any presence (a MUC expels on `presence type='error'`), and to a bare room
/// or other address without a resource that may be a room (ejabberd expels on any `message type='error'` to the bare room).
pub fn bounce(stanza: &Stanza, error_type: ErrorType, condition: Condition, text: &str) -> Option<Bytes> {
    let _ = (stanza, error_type, condition, text);
    todo!()
}
