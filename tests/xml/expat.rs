//! Prosody and ejabberd read XML with expat, so it is the judge.

use std::{io::Write, process::Command};

use narrows::codec::xml::XmlError;

use super::{
    generate::{self, Tape},
    read,
};

/// Reads documents, each after its length in four bytes, and prints for each whether expat accepts it.
const JUDGE: &str = "
import sys
from xml.parsers import expat
data = open(sys.argv[1], 'rb').read()
at, verdicts = 0, []
while at < len(data):
    end = at + 4 + int.from_bytes(data[at:at + 4], 'big')
    parser = expat.ParserCreate(namespace_separator='\\n')
    try:
        parser.Parse(data[at + 4:end], True)
        verdicts.append('+')
    except expat.ExpatError:
        verdicts.append('-')
    at = end
print(''.join(verdicts))
";

/// Whether expat accepts each of these documents.
fn judge(documents: &[Vec<u8>]) -> Vec<bool> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for document in documents {
        file.write_all(&u32::try_from(document.len()).unwrap().to_be_bytes())
            .unwrap();
        file.write_all(document).unwrap();
    }
    file.flush().unwrap();
    let output = Command::new("python3")
        .args(["-c", JUDGE])
        .arg(file.path())
        .output()
        .expect("python3, whose expat is the judge, must be installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let verdicts: Vec<_> = output
        .stdout
        .trim_ascii()
        .iter()
        .map(|verdict| *verdict == b'+')
        .collect();
    assert_eq!(verdicts.len(), documents.len());
    verdicts
}

/// xorshift64*: the same tapes in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// The reader accepts no stream that expat refuses, so nothing it lets through closes a server's stream; and it calls
/// no stream malformed that expat accepts, so it does not close one without need.
///
/// Streams that were spoilt in up to three places are read byte by byte, and expat is asked about each of them.
#[test]
fn agrees_with_expat_about_well_formedness() {
    let mut random = Random(0x6e61_7272_6f77_7301);
    let mut accepted = Vec::new();
    let mut refused = Vec::new();
    let mut others = 0;
    for _ in 0..streams_count() {
        let tape: Vec<u8> = (0..40).flat_map(|_| random.next().to_be_bytes()).collect();
        let stream = generate::stream(&mut Tape(&tape));
        let reading = read(&stream, &[1]);
        match reading.error {
            None if reading.is_closed() => accepted.push(stream[..reading.used].to_vec()),
            Some(XmlError::NotWellFormed) => refused.push(stream),
            // Cut short, or refused for a reason of XMPP.
            None | Some(_) => others += 1,
        }
    }
    // So that a generator gone wrong is noticed.
    let tenth = streams_count() / 10;
    assert!(
        accepted.len() > tenth && refused.len() > tenth,
        "{} accepted, {} refused, {others} others",
        accepted.len(),
        refused.len()
    );
    check(&accepted, true);
    check(&refused, false);
}

fn streams_count() -> usize {
    // More when asked to look longer.
    std::env::var("NARROWS_XML_STREAMS").map_or(10_000, |count| count.parse().expect("a number"))
}

fn check(documents: &[Vec<u8>], expected: bool) {
    let verdicts = judge(documents);
    let wrong: Vec<_> = documents
        .iter()
        .zip(&verdicts)
        .filter(|(_, verdict)| **verdict != expected)
        .map(|(document, _)| document.escape_ascii().to_string())
        .collect();
    let shown = wrong.iter().take(10).cloned().collect::<Vec<_>>().join("\n\n");
    assert!(
        wrong.is_empty(),
        "{} that expat {} not accept:\n{shown}",
        wrong.len(),
        if expected { "does" } else { "should" }
    );
}

/// Names hold the characters that expat allows in them, as the first and as a later one. Every character below U+20000 is tried.
#[test]
fn agrees_with_expat_about_names() {
    let mut documents = Vec::new();
    let mut ours = Vec::new();
    for character in (0x80..0x2_0000).filter_map(char::from_u32) {
        for name in [format!("{character}"), format!("a{character}")] {
            let header = "<s:s xmlns:s='http://etherx.jabber.org/streams' xmlns='jabber:server'>";
            let header = header.replacen("s:s ", "s:stream ", 1);
            let document = format!("{header}<x><{name}/></x></s:stream>");
            ours.push(read(document.as_bytes(), &[usize::MAX]).is_closed());
            documents.push(document.into_bytes());
        }
    }
    let verdicts = judge(&documents);
    for (document, (ours, verdict)) in documents.iter().zip(ours.iter().zip(&verdicts)) {
        assert_eq!(ours, verdict, "{}", document.escape_ascii());
    }
}
