//! The strict XML edge: what it lets through is what every server's parser lets through, however it is cut up.

mod chunks;
mod expat;
mod generate;
mod hostile;

use narrows::codec::xml::{Limits, StreamItem, StreamReader, XmlError};

/// The header that Prosody and ejabberd send.
const HEADER: &str = "<?xml version='1.0'?><stream:stream xmlns='jabber:server' xmlns:db='jabber:server:dialback' \
    xmlns:stream='http://etherx.jabber.org/streams' from='a.example' to='b.example' version='1.0'>";

/// How a reader took a stream.
#[derive(Debug, Eq, PartialEq)]
struct Reading {
    items: Vec<StreamItem>,
    error: Option<XmlError>,
    /// Bytes pushed when the last item or the error came.
    used: usize,
}

impl Reading {
    fn is_closed(&self) -> bool {
        matches!(self.items.last(), Some(StreamItem::Close))
    }
}

/// Reads a stream in pieces of these lengths, over and over.
fn read(stream: &[u8], lengths: &[usize]) -> Reading {
    let mut reader = StreamReader::new(Limits::AFTER_AUTHENTICATION);
    let mut reading = Reading {
        items: Vec::new(),
        error: None,
        used: 0,
    };
    let mut at = 0_usize;
    for length in lengths.iter().cycle() {
        let chunk = &stream[at..stream.len().min(at.saturating_add(*length))];
        if chunk.is_empty() {
            break;
        }
        at += chunk.len();
        reader.push(chunk);
        loop {
            match reader.poll_item() {
                Ok(Some(item)) => {
                    reading.items.push(item);
                    reading.used = at;
                }
                Ok(None) => break,
                Err(error) => {
                    reading.error = Some(error);
                    reading.used = at;
                    return reading;
                }
            }
        }
    }
    reading
}
