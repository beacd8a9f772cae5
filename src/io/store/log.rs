//! Tells a torn write-ahead log from a damaged one.
//!
//! After a crash SQLite takes the log up to the last whole transaction before the first frame that does not match its checksum, and
//! forgets the rest without a word. That is right for the transaction that the power cut met. But if a later transaction
//! was begun behind the bad frame, the one with the bad frame had been flushed, and answered: then it is damage, and answered batches
//! are about to vanish.
//!
//! It holds because a log never continues behind an earlier life's torn end (it is emptied at every opening), and because
//! a store stops at the first failed commit. Damage to the very last transaction cannot be told from a torn one.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

// https://www.sqlite.org/fileformat2.html#the_write_ahead_log
const HEADER_SIZE: u64 = 32;
const FRAME_HEADER_SIZE: u64 = 24;

/// What is wrong with a log of which SQLite took `taken` frames, if anything is.
pub(super) fn damage(log: &Path, taken: u64) -> io::Result<Option<String>> {
    let file = match File::open(log) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let length = file.metadata()?.len();
    let mut header = [0; HEADER_SIZE as usize];
    if length < HEADER_SIZE {
        return Ok(None);
    }
    file.read_exact_at(&mut header, 0)?;
    let page_size = u64::from(number(&header, 8));
    // The header is flushed before the first frame is written.
    if !header_is_whole(&header) {
        let frames_follow = length > HEADER_SIZE + FRAME_HEADER_SIZE;
        return Ok(frames_follow.then(|| "the header of the log does not match its checksum".to_owned()));
    }
    let frame_size = FRAME_HEADER_SIZE + page_size;
    let frames = (length - HEADER_SIZE) / frame_size;
    let mut after_commit = None;
    for frame in taken..frames {
        let mut head = [0; FRAME_HEADER_SIZE as usize];
        file.read_exact_at(&mut head, HEADER_SIZE + frame * frame_size)?;
        // Other salts: of an earlier run through the file.
        if head[8..16] != header[16..24] {
            continue;
        }
        if let Some(commit) = after_commit {
            let lost = taken + 1;
            return Ok(Some(format!(
                "the log is damaged at or after frame {lost}, and goes on after the commit in frame {commit}"
            )));
        }
        // The size of the database after a commit; 0 in all other frames.
        if number(&head, 4) != 0 {
            after_commit = Some(frame + 1);
        }
    }
    Ok(None)
}

fn header_is_whole(header: &[u8; HEADER_SIZE as usize]) -> bool {
    // The magic number says in which byte order the sums were made: that of the machine that made them.
    let read = match number(header, 0) {
        0x377f_0682 => u32::from_le_bytes,
        0x377f_0683 => u32::from_be_bytes,
        _ => return false,
    };
    let mut sums = (0_u32, 0_u32);
    for pair in header[..24].as_chunks::<4>().0.as_chunks::<2>().0 {
        sums.0 = sums.0.wrapping_add(read(pair[0])).wrapping_add(sums.1);
        sums.1 = sums.1.wrapping_add(read(pair[1])).wrapping_add(sums.0);
    }
    sums == (number(header, 24), number(header, 28))
}

/// Big-endian, whatever the machine. The arrays above are long enough for every `at` here.
fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}
