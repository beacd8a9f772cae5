//! How long the stages of one room message take: reading the copies off a stream, collapsing them, encoding the cast.
//!
//! Time and nothing else, with the best of several rounds: it shows a stage that got ten times slower, not one of a few percent.

use std::hint::black_box;
use std::time::{Duration, Instant};

use bytes::Bytes;
use narrows::codec::compress::{Coder, Compressor};
use narrows::codec::entry::{Cast, Entry};
use narrows::codec::frame::FrameWriter;
use narrows::codec::position::Seq;
use narrows::codec::xml::{Limits, StreamItem, StreamReader};
use narrows::queue::collapse::{Collapse, Output};
use narrows::queue::rules::Placement;
use narrows::stanza::Stanza;
use narrows::time::{Mono, Now};

const OCCUPANTS: usize = 50;
const MESSAGES: usize = 200;
const ROUNDS: usize = 7;

/// What a socket gives in one read.
const CHUNK_BYTES: usize = 16 * 1024;

/// A stream of a room's messages to all occupants, as Prosody writes it.
fn stream() -> Vec<u8> {
    let mut stream =
        b"<?xml version='1.0'?><stream:stream xmlns='jabber:server' xmlns:stream='http://etherx.jabber.org/streams' \
        xmlns:db='jabber:server:dialback' from='a.example' to='b.example' version='1.0'>"
            .to_vec();
    for message in 0..MESSAGES as u64 {
        // Spread like a random number, and the same in each run.
        let random =
            u128::from(message.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)) * 0x0123_4567_89ab_cdef_1357_9bdf;
        let digits = format!("{random:032x}");
        let id = format!(
            "{}-{}-4{}-8{}-{}",
            &digits[..8],
            &digits[8..12],
            &digits[13..16],
            &digits[17..20],
            &digits[20..32]
        );
        for occupant in 0..OCCUPANTS {
            let stanza = format!(
                "<message from='deck@conference.a.example/mate' id='{id}' type='groupchat' \
                 to='u{occupant}@b.example/phone'><body>line {message} about wind {digits:.8} and weather</body>\
                 <active xmlns='http://jabber.org/protocol/chatstates'/>\
                 <origin-id xmlns='urn:xmpp:sid:0' id='{id}'/></message>"
            );
            stream.extend_from_slice(stanza.as_bytes());
        }
    }
    stream
}

fn read(stream: &[u8]) -> Vec<Bytes> {
    let mut reader = StreamReader::new(Limits::AFTER_AUTHENTICATION);
    let mut stanzas = Vec::new();
    for chunk in stream.chunks(CHUNK_BYTES) {
        reader.push(chunk);
        while let Some(item) = reader.poll_item().expect("the stream is well-formed") {
            if let StreamItem::Element(element) = item {
                stanzas.push(element.bytes);
            }
        }
    }
    stanzas
}

fn collapse(stanzas: &[Stanza]) -> Vec<Cast> {
    let mut collapse = Collapse::new(Seq(0), Duration::from_millis(50));
    let mut casts = Vec::new();
    for (number, stanza) in stanzas.iter().enumerate() {
        let now = Now {
            mono: Mono::from_start(Duration::from_secs((number / OCCUPANTS) as u64)),
            ..Now::default()
        };
        collapse.handle_timeout(now);
        collapse
            .handle_stanza(stanza, Placement::default(), now)
            .expect("addressed and small");
        while let Some(output) = collapse.poll_output() {
            if let Output::Sealed { cast, .. } = output {
                casts.push(cast);
            }
        }
    }
    casts
}

/// Bytes that all casts take, each in a batch of its own.
fn encode(casts: &[Entry]) -> usize {
    let mut writer = FrameWriter::default();
    let mut compressor = Compressor::new(Coder::ZstdWithDictionary).expect("there is memory");
    let mut bytes = 0;
    for (number, entry) in casts.iter().enumerate() {
        writer.entry(Seq(number as u64 + 1), 0, entry, false);
        let batch = writer.take();
        let mut out = Vec::new();
        compressor.compress(&batch.text, &mut out).expect("there is memory");
        bytes += batch.ids.len() + out.len();
    }
    bytes
}

fn best<T>(mut stage: impl FnMut() -> T) -> (Duration, T) {
    let mut timed = || {
        let begin = Instant::now();
        let result = black_box(stage());
        (begin.elapsed(), result)
    };
    let mut best = timed();
    for _ in 1..ROUNDS {
        let next = timed();
        if next.0 < best.0 {
            best = next;
        }
    }
    best
}

fn main() {
    let stream = stream();
    let copies = MESSAGES * OCCUPANTS;
    let (reading, stanzas) = best(|| read(&stream));
    assert_eq!(stanzas.len(), copies, "every copy is read");
    let (parsing, stanzas) = best(|| {
        let parsed = stanzas.iter().cloned().map(Stanza::parse);
        parsed.collect::<Result<Vec<_>, _>>().expect("they are stanzas")
    });
    let (collapsing, casts) = best(|| collapse(&stanzas));
    // The last one waits for its window.
    assert!(casts.len() >= MESSAGES - 1, "one cast a message, not {}", casts.len());
    let entries: Vec<Entry> = casts.into_iter().map(Entry::Cast).collect();
    let (encoding, bytes) = best(|| encode(&entries));

    let per = |time: Duration, count: usize| time.as_secs_f64() * 1e6 / count as f64;
    let rate = stream.len() as f64 / 1e6 / reading.as_secs_f64();
    println!("\n### Time by stage, {OCCUPANTS} far occupants\n");
    println!("| stage | time |\n| --- | --- |");
    println!(
        "| read and validate XML | {rate:.0} MB/s, {:.1} µs a copy |",
        per(reading, copies)
    );
    println!("| find addresses | {:.2} µs a copy |", per(parsing, copies));
    println!("| collapse | {:.2} µs a copy |", per(collapsing, copies));
    println!(
        "| encode and compress | {:.0} µs a message, {} bytes |",
        per(encoding, entries.len()),
        bytes / entries.len()
    );
}
