//! What must not reach a log by accident: addresses and message bodies.

use std::fmt;

/// Wraps personal data. `Display` and `Debug` show only its length, unless the alternate form
/// (`{:#}`) is asked for, which is how an operator's explicit wish to see it is carried out.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Pii<T>(pub T);

impl<T: AsRef<str>> fmt::Display for Pii<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.0.as_ref();
        if f.alternate() {
            f.write_str(text)
        } else {
            write!(f, "<{} bytes hidden>", text.len())
        }
    }
}

impl<T: AsRef<str>> fmt::Debug for Pii<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only the alternate form shows what is wrapped.
    #[test]
    fn hides_unless_asked() {
        let jid = Pii("nurse@ship.example");
        assert_eq!(format!("{jid} {jid:?}"), "<18 bytes hidden> <18 bytes hidden>");
        assert_eq!(format!("{jid:#}"), "nurse@ship.example");
    }
}
