//! Whatever bytes a peer sends as frames, nothing panics, and what comes out may be sent on: a fresh pair carries it unchanged.
#![no_main]

use libfuzzer_sys::fuzz_target;
use narrows::codec::{
    frame::{Frame, FrameReader, FrameWriter, RawBatch},
    position::Seq,
    varint::Reader,
};

fn read_all(reader: &mut FrameReader, batch: &RawBatch, mut each: impl FnMut(Frame)) {
    let (mut text, mut ids) = (Reader::new(&batch.text), Reader::new(&batch.ids));
    // A peer may let few bytes stand for many entries, which are taken out one by one.
    for _ in 0..10_000 {
        match reader.read(&mut text, &mut ids) {
            Ok(Some(frame)) => each(frame),
            Ok(None) | Err(_) => return,
        }
    }
}

fuzz_target!(|input: (&[u8], &[u8])| {
    let (text, ids) = input;
    let batch = RawBatch { text: text.to_vec(), ids: ids.to_vec(), compressible: true };
    let (mut writer, mut reader) = (FrameWriter::default(), FrameReader::default());
    let mut last = 0;
    read_all(&mut FrameReader::default(), &batch, |frame| {
        let Frame::Entry { entry, .. } = frame else { return };
        last += 1;
        if !writer.fits_whole(&entry, usize::MAX) {
            return;
        }
        writer.entry(Seq(last), 0, &entry, false);
        let mut came = Vec::new();
        read_all(&mut reader, &writer.take(), |frame| came.push(frame));
        assert_eq!(came, [Frame::Entry { seq: Seq(last), held_ms: 0, entry, kept: false }]);
    });
});
