//! Text made safe to stand in XML that we write.

use std::borrow::Cow;

/// For a value between quotes of either kind. White space other than blanks is kept from normalisation (XML 1.0 §3.3.3).
pub fn escape_attribute(text: &str) -> Cow<'_, str> {
    escape(text, |character| match character {
        '&' => Some("&amp;"),
        '<' => Some("&lt;"),
        '>' => Some("&gt;"),
        '\'' => Some("&apos;"),
        '"' => Some("&quot;"),
        '\t' => Some("&#9;"),
        '\n' => Some("&#10;"),
        '\r' => Some("&#13;"),
        other => replacement(other),
    })
}

/// For the text of an element.
pub fn escape_text(text: &str) -> Cow<'_, str> {
    escape(text, |character| match character {
        '&' => Some("&amp;"),
        '<' => Some("&lt;"),
        // Only `]]>` needs it, but that is where the servers would close the stream.
        '>' => Some("&gt;"),
        '\r' => Some("&#13;"),
        '\t' | '\n' => None,
        other => replacement(other),
    })
}

/// XML 1.0 §2.2: some characters cannot be written, not even by reference.
fn replacement(character: char) -> Option<&'static str> {
    match character {
        '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => Some("\u{fffd}"),
        _ => None,
    }
}

fn escape(text: &str, replace: impl Fn(char) -> Option<&'static str>) -> Cow<'_, str> {
    let Some((first, _)) = text.char_indices().find(|(_, character)| replace(*character).is_some()) else {
        return Cow::Borrowed(text);
    };
    let mut escaped = String::with_capacity(text.len() + 16);
    escaped.push_str(&text[..first]);
    for character in text[first..].chars() {
        match replace(character) {
            Some(written) => escaped.push_str(written),
            None => escaped.push(character),
        }
    }
    Cow::Owned(escaped)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Plain text is not copied; what has a meaning in XML, or cannot stand in it, is replaced.
    #[test]
    fn escapes_only_what_must_be() {
        assert!(matches!(escape_text("plain 'text'"), Cow::Borrowed(_)));
        assert_eq!(escape_text("a<b>&c\r]]>"), "a&lt;b&gt;&amp;c&#13;]]&gt;");
        assert_eq!(
            escape_attribute("it's \"x\"\t<&>"),
            "it&apos;s &quot;x&quot;&#9;&lt;&amp;&gt;"
        );
        assert_eq!(escape_text("\0\u{ffff}\u{1f600}"), "\u{fffd}\u{fffd}\u{1f600}");
    }
}
