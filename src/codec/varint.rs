//! Unsigned numbers in as few bytes as they need (LEB128), and a reader that cannot run off the end.
//!
//! Every length that a peer claims is compared with what is really there before memory is taken for it.

use bytes::Bytes;

/// 64 bits in groups of seven.
const VARINT_BYTES_MAX: usize = 10;

pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// A length in memory always fits 64 bits.
pub fn put_len(out: &mut Vec<u8>, len: usize) {
    put_varint(out, len as u64);
}

/// What [`put_len`] writes, in bytes.
pub fn len_bytes(len: usize) -> usize {
    let bits = (usize::BITS - len.leading_zeros()).max(1);
    bits.div_ceil(7) as usize
}

/// Small numbers of either sign as small unsigned ones: 0, −1, 1, −2, …
pub fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

pub fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

/// Tries to read a number at the start of `bytes`: the number and how many bytes it took, or `None` if it is cut off.
pub fn peek_varint(bytes: &[u8]) -> Result<Option<(u64, usize)>, ReadError> {
    let mut value = 0u64;
    for (index, byte) in bytes.iter().take(VARINT_BYTES_MAX).enumerate() {
        let bits = u64::from(byte & 0x7f);
        // The tenth byte has room for one bit. A last byte of zero would be a second way to write the same number.
        if (index == VARINT_BYTES_MAX - 1 && bits > 1) || (index > 0 && *byte == 0) {
            return Err(ReadError::BadNumber);
        }
        value |= bits << (7 * index);
        if byte & 0x80 == 0 {
            return Ok(Some((value, index + 1)));
        }
    }
    if bytes.len() >= VARINT_BYTES_MAX {
        Err(ReadError::BadNumber)
    } else {
        Ok(None)
    }
}

/// Reads from the front of a piece of bytes.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub fn byte(&mut self) -> Result<u8, ReadError> {
        let (first, rest) = self.rest.split_first().ok_or(ReadError::Truncated)?;
        self.rest = rest;
        Ok(*first)
    }

    pub fn varint(&mut self) -> Result<u64, ReadError> {
        let (value, taken) = peek_varint(self.rest)?.ok_or(ReadError::Truncated)?;
        self.rest = &self.rest[taken..];
        Ok(value)
    }

    /// A number that must not be over `max`.
    pub fn varint_upto(&mut self, max: u64) -> Result<u64, ReadError> {
        let value = self.varint()?;
        if value > max {
            Err(ReadError::OverLimit { value, max })
        } else {
            Ok(value)
        }
    }

    /// A length or a count, as a `usize`.
    pub fn len_upto(&mut self, max: usize) -> Result<usize, ReadError> {
        self.varint_upto(max as u64).map(|value| value as usize)
    }

    pub fn take(&mut self, len: usize) -> Result<&'a [u8], ReadError> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(ReadError::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// A length, then as many bytes.
    pub fn prefixed(&mut self, max: usize) -> Result<&'a [u8], ReadError> {
        let len = self.len_upto(max)?;
        self.take(len)
    }

    pub fn finish(self) -> Result<(), ReadError> {
        if self.rest.is_empty() {
            Ok(())
        } else {
            Err(ReadError::Trailing(self.rest.len()))
        }
    }
}

/// As [`Reader::prefixed`] writes it.
pub fn put_prefixed(out: &mut Vec<u8>, bytes: &[u8]) {
    put_len(out, bytes.len());
    out.extend_from_slice(bytes);
}

/// The part of `whole` that `part`, borrowed from it, points at: shares memory instead of copying.
pub fn slice_of(whole: &Bytes, part: &[u8]) -> Bytes {
    whole.slice_ref(part)
}

#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ReadError {
    #[error("the bytes end too early")]
    Truncated,
    #[error("a number of more than 64 bits, or with a needless byte")]
    BadNumber,
    #[error("{value} is over the limit of {max}")]
    OverLimit { value: u64, max: u64 },
    #[error("{0} bytes too many")]
    Trailing(usize),
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every number comes back, and takes no byte more than it must.
        #[test]
        fn numbers_round_trip(value: u64, signed: i64) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            prop_assert_eq!(out.len(), (64 - value.leading_zeros()).max(1).div_ceil(7) as usize);
            let mut reader = Reader::new(&out);
            prop_assert_eq!(reader.varint(), Ok(value));
            prop_assert_eq!(reader.finish(), Ok(()));
            prop_assert_eq!(unzigzag(zigzag(signed)), signed);
        }

        /// Whatever the bytes are, reading ends with a number or an error.
        #[test]
        fn any_bytes_are_safe(bytes in proptest::collection::vec(any::<u8>(), 0..24)) {
            let mut reader = Reader::new(&bytes);
            while reader.varint().is_ok() {}
            let _ = Reader::new(&bytes).prefixed(8);
        }
    }

    /// There is one way to write a number, and it ends at 64 bits.
    #[test]
    fn refuses_overlong_numbers() {
        assert_eq!(Reader::new(&[0x80, 0x00]).varint(), Err(ReadError::BadNumber));
        assert_eq!(Reader::new(&[0xff; 10]).varint(), Err(ReadError::BadNumber));
        assert_eq!(Reader::new(&[0xff; 9]).varint(), Err(ReadError::Truncated));
        assert_eq!(
            Reader::new(&[9, 1]).prefixed(8),
            Err(ReadError::OverLimit { value: 9, max: 8 })
        );
        assert_eq!(Reader::new(&[8, 1]).prefixed(8), Err(ReadError::Truncated));
    }
}
