//! zstd streams with a shipped dictionary.
//!
//! One stream per direction for the life of a connection, flushed after each batch, so that what was said before is never
//! said again. Both streams start from the same dictionary: stanza shapes as Prosody and ejabberd write them, written for
//! this purpose. [`Compressor`] and [`Decompressor`] are the seam where a better model for small stanzas goes.

use std::{fmt, sync::LazyLock};

use zstd::zstd_safe::{
    CCtx, CParameter, DCtx, DParameter, DictAttachPref, FrameFormat, InBuffer, OutBuffer, Strategy,
    zstd_sys::ZSTD_EndDirective,
};

use crate::codec::frame;

/// Raw content: the likelier a string, the nearer to the end it stands. A line is an entry; `{to}`, `{id}` and others stand for
/// what [`frame`] puts there.
///
/// Lines of plain words are for what people say: of each of the first forty lines of a connection they save three to four bytes, of
/// each of the first four hundred one to two, in four recorded rooms that they were not taken from.
static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| frame::pack_dictionary(include_str!("dictionary.txt")));

/// What one connection remembers: larger windows gained 1–2 %.
const WINDOW_LOG: u32 = 20;
/// A decompressor takes no more memory than this, whatever the peer's stream asks for (about 2.2 MB).
const WINDOW_LOG_MAX: u32 = 21;

/// Which coder a stream uses. Both ends choose the same from their hellos.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Coder {
    /// Nothing is compressed: one of the two does not want it.
    Plain,
    /// Without a dictionary, if the two do not have the same.
    Zstd,
    ZstdWithDictionary,
}

impl Coder {
    /// The coder for two ends that name these dictionaries, or [`NO_COMPRESSION`].
    pub fn agreed(ours: u64, theirs: u64) -> Self {
        if ours == NO_COMPRESSION || theirs == NO_COMPRESSION {
            Self::Plain
        } else if ours == theirs {
            Self::ZstdWithDictionary
        } else {
            Self::Zstd
        }
    }

    fn dictionary(self) -> &'static [u8] {
        match self {
            Self::Plain | Self::Zstd => &[],
            Self::ZstdWithDictionary => &DICTIONARY,
        }
    }
}

/// Stands in a hello in place of a dictionary's name.
pub const NO_COMPRESSION: u64 = 0;

/// Names the dictionary in a hello. FNV-1a: it tells versions apart, nobody gains by a forged one.
pub fn dictionary_id() -> u64 {
    DICTIONARY.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

pub struct Compressor {
    /// None for [`Coder::Plain`].
    context: Option<CCtx<'static>>,
}

impl Compressor {
    pub fn new(coder: Coder) -> Result<Self, CompressError> {
        if coder == Coder::Plain {
            return Ok(Self { context: None });
        }
        let mut context = CCtx::try_create().ok_or(CompressError::Memory)?;
        let parameters = [
            // The magic number, content size and checksum are TLS's business or nobody's.
            CParameter::Format(FrameFormat::Magicless),
            CParameter::ContentSizeFlag(false),
            CParameter::ChecksumFlag(false),
            CParameter::DictIdFlag(false),
            CParameter::CompressionLevel(9),
            CParameter::WindowLog(WINDOW_LOG),
            // Of all that take less than 100 µs a stanza this gave the fewest bytes on chat lines in both servers' stanzas, with
            // ids cut out: 60 against 67 for `greedy` and 70 for `dfast`. The dictionary is loaded like earlier input:
            // attached, zstd searches it with parameters of its own, which costs 3 bytes a stanza.
            CParameter::Strategy(Strategy::ZSTD_btlazy2),
            CParameter::MinMatch(4),
            CParameter::ForceAttachDict(DictAttachPref::ForceLoad),
            // 4.7 MB a connection; level 9's own sizes take 14.6 MB and save half a byte a stanza.
            CParameter::HashLog(17),
            CParameter::ChainLog(19),
            CParameter::SearchLog(5),
        ];
        for parameter in parameters {
            context.set_parameter(parameter).map_err(CompressError::zstd)?;
        }
        context
            .load_dictionary(coder.dictionary())
            .map_err(CompressError::zstd)?;
        Ok(Self { context: Some(context) })
    }

    /// What a server's own stream compression (XEP-0138) would do, or a tunnel's: no dictionary, and a window of 128 KiB, which is four
    /// times zlib's. It takes under a megabyte.
    pub fn of_a_server() -> Result<Self, CompressError> {
        let mut context = CCtx::try_create().ok_or(CompressError::Memory)?;
        for parameter in [CParameter::CompressionLevel(3), CParameter::WindowLog(17)] {
            context.set_parameter(parameter).map_err(CompressError::zstd)?;
        }
        Ok(Self { context: Some(context) })
    }

    /// Appends what the other end needs to read `input`, all of it.
    pub fn compress(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<(), CompressError> {
        let Some(context) = &mut self.context else {
            out.extend_from_slice(input);
            return Ok(());
        };
        let mut input = InBuffer::around(input);
        loop {
            // One block's worst case is its length and a few bytes; a loop takes care of the rest.
            out.reserve(input.src.len() - input.pos + 256);
            let start = out.len();
            let mut output = OutBuffer::around_pos(out, start);
            let left = context
                .compress_stream2(&mut output, &mut input, ZSTD_EndDirective::ZSTD_e_flush)
                .map_err(CompressError::zstd)?;
            if left == 0 && input.pos == input.src.len() {
                return Ok(());
            }
        }
    }
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compressor").finish_non_exhaustive()
    }
}

pub struct Decompressor {
    /// None for [`Coder::Plain`].
    context: Option<DCtx<'static>>,
}

impl Decompressor {
    pub fn new(coder: Coder) -> Result<Self, CompressError> {
        if coder == Coder::Plain {
            return Ok(Self { context: None });
        }
        let mut context = DCtx::try_create().ok_or(CompressError::Memory)?;
        context
            .set_parameter(DParameter::Format(FrameFormat::Magicless))
            .map_err(CompressError::zstd)?;
        context
            .set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX))
            .map_err(CompressError::zstd)?;
        context
            .load_dictionary(coder.dictionary())
            .map_err(CompressError::zstd)?;
        Ok(Self { context: Some(context) })
    }

    /// The bytes of one batch, at most `bytes_max` of them. After an error the stream is lost.
    pub fn decompress(&mut self, input: &[u8], bytes_max: usize) -> Result<Vec<u8>, CompressError> {
        let Some(context) = &mut self.context else {
            return match input.len() {
                bytes if bytes > bytes_max => Err(CompressError::Bomb { bytes_max }),
                _ => Ok(input.to_vec()),
            };
        };
        let mut input = InBuffer::around(input);
        let mut out = Vec::new();
        loop {
            // One byte over the limit tells a bomb from a full batch.
            let room = (bytes_max + 1 - out.len()).min(INFLATE_STEP);
            out.reserve_exact(room);
            let start = out.len();
            let mut step = vec![0; room];
            let mut output = OutBuffer::around(step.as_mut_slice());
            let consumed = input.pos;
            context
                .decompress_stream(&mut output, &mut input)
                .map_err(CompressError::zstd)?;
            let produced = output.pos();
            out.extend_from_slice(&step[..produced]);
            if out.len() > bytes_max {
                return Err(CompressError::Bomb { bytes_max });
            }
            // All input is taken and the output did not fill: everything that was flushed is here.
            if input.pos == input.src.len() && produced < room {
                return Ok(out);
            }
            if out.len() == start && input.pos == consumed {
                return Err(CompressError::Stuck);
            }
        }
    }
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decompressor").finish_non_exhaustive()
    }
}

/// Memory is taken in steps of this, as the bytes appear.
const INFLATE_STEP: usize = 16 * 1024;

#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum CompressError {
    #[error("a batch inflates to more than {bytes_max} bytes")]
    Bomb { bytes_max: usize },
    #[error("a compressed stream that does not go on")]
    Stuck,
    #[error("no memory for compression")]
    Memory,
    #[error("zstd: {0}")]
    Zstd(&'static str),
}

impl CompressError {
    fn zstd(code: usize) -> Self {
        Self::Zstd(zstd::zstd_safe::get_error_name(code))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pair(coder: Coder) -> (Compressor, Decompressor) {
        (Compressor::new(coder).unwrap(), Decompressor::new(coder).unwrap())
    }

    proptest! {
        /// Every batch can be read as soon as it is there, with and without a dictionary.
        #[test]
        fn batches_round_trip(
            batches in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..3000), 1..10),
            coder in prop::sample::select(vec![Coder::Plain, Coder::Zstd, Coder::ZstdWithDictionary]),
        ) {
            let (mut compressor, mut decompressor) = pair(coder);
            for batch in batches {
                let mut wire = Vec::new();
                compressor.compress(&batch, &mut wire).unwrap();
                prop_assert_eq!(decompressor.decompress(&wire, 3000).unwrap(), batch);
            }
        }

        /// No bytes make the decompressor panic or give more than it may.
        #[test]
        fn any_bytes_are_safe(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let (_, mut decompressor) = pair(Coder::ZstdWithDictionary);
            if let Ok(out) = decompressor.decompress(&bytes, 1000) {
                prop_assert!(out.len() <= 1000);
            }
        }
    }

    /// A few bytes that would become megabytes are refused at the limit, and exactly there.
    #[test]
    fn bomb_is_refused() {
        let (mut compressor, mut decompressor) = pair(Coder::Zstd);
        let mut wire = Vec::new();
        compressor.compress(&vec![0; 100_000], &mut wire).unwrap();
        assert!(wire.len() < 200);
        assert_eq!(
            decompressor.decompress(&wire, 99_999),
            Err(CompressError::Bomb { bytes_max: 99_999 })
        );
        let (_, mut decompressor) = pair(Coder::Zstd);
        assert_eq!(decompressor.decompress(&wire, 100_000).unwrap().len(), 100_000);
        let (_, mut decompressor) = pair(Coder::Plain);
        assert!(decompressor.decompress(&[0; 100], 100).is_ok());
        assert_eq!(
            decompressor.decompress(&[0; 100], 99),
            Err(CompressError::Bomb { bytes_max: 99 })
        );
    }

    /// `compression: off` at either end is obeyed, also if it is said at both; different dictionaries are none.
    #[test]
    fn off_is_off() {
        assert_eq!(Coder::agreed(7, 7), Coder::ZstdWithDictionary);
        assert_eq!(Coder::agreed(7, 8), Coder::Zstd);
        for (ours, theirs) in [(0, 0), (0, 7), (7, 0)] {
            assert_eq!(Coder::agreed(ours, theirs), Coder::Plain);
        }
        assert_ne!(dictionary_id(), NO_COMPRESSION);
    }

    /// A connection's two contexts stay within what the documentation promises.
    #[test]
    fn memory_is_bounded() {
        let (mut compressor, mut decompressor) = pair(Coder::ZstdWithDictionary);
        let mut noise = 1u32;
        for _ in 0..40 {
            let mut next = || {
                noise = noise.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (noise >> 24) as u8
            };
            let batch: Vec<u8> = (0..100_000).map(|_| next()).collect();
            let mut wire = Vec::new();
            compressor.compress(&batch, &mut wire).unwrap();
            assert!(decompressor.decompress(&wire, batch.len()).unwrap() == batch);
        }
        let (compressor, decompressor) = (compressor.context.unwrap(), decompressor.context.unwrap());
        assert!(compressor.sizeof() <= 5 << 20, "{}", compressor.sizeof());
        assert!(decompressor.sizeof() <= 3 << 20, "{}", decompressor.sizeof());
    }

    /// A stream that asks for a larger window than agreed is refused before memory is taken.
    #[test]
    fn large_window_is_refused() {
        let (_, mut decompressor) = pair(Coder::Zstd);
        // RFC 8878 §3.1.1.1: no single segment, no sizes; then a window descriptor of 2^31.
        assert!(matches!(
            decompressor.decompress(&[0x00, 21 << 3, 1, 0, 0], 1000),
            Err(CompressError::Zstd(_))
        ));
    }

    /// What was said once costs little the second time, and the dictionary helps the first.
    #[test]
    fn dictionary_helps_the_first_stanza() {
        let stanza =
            b"<message xml:lang='en' type='groupchat' from='deck@conference.a.example/mate'><body>ok</body></message>";
        let size = |coder| {
            let mut out = Vec::new();
            Compressor::new(coder).unwrap().compress(stanza, &mut out).unwrap();
            out.len()
        };
        assert!(size(Coder::ZstdWithDictionary) < size(Coder::Zstd) * 2 / 3);
    }
}
