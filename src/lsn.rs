//! A position in the write-ahead log: parse, print, order.
//!
//! The trap: only two kinds of LSN may ever be told to Postgres, a commit's `end_lsn` and a keepalive's `wal_end`, each
//! exactly as received. "One more byte" (`+ 1`) skips a whole transaction whose commit record starts there, so this type
//! has no arithmetic but the distance between two positions.

use std::fmt;
use std::str::FromStr;

/// A byte position in the write-ahead log, printed as Postgres prints it: `16/B374D848`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(u64);

/// A text that is not two hexadecimal numbers of at most 32 bits with a slash between.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a WAL position such as 16/B374D848")]
pub struct ParseLsnError(String);

impl Lsn {
    /// `0/0`: Postgres reads it as "no position".
    pub const ZERO: Lsn = Lsn(0);

    /// The position at this byte.
    pub const fn new(position: u64) -> Self {
        Lsn(position)
    }

    /// The position in bytes.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// Bytes from `earlier` to here; 0 when `earlier` is not earlier.
    pub const fn bytes_since(self, earlier: Lsn) -> u64 {
        self.0.saturating_sub(earlier.0)
    }
}

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xFFFF_FFFF)
    }
}

impl FromStr for Lsn {
    type Err = ParseLsnError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || ParseLsnError(text.to_owned());
        let half = |digits: &str| {
            let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
            if !plain {
                return Err(wrong());
            }
            u32::from_str_radix(digits, 16).map_err(|_| wrong())
        };
        let (high, low) = text.split_once('/').ok_or_else(wrong)?;
        Ok(Lsn(u64::from(half(high)?) << 32 | u64::from(half(low)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_and_parses_as_postgres_does() {
        for text in ["0/0", "16/B374D848", "0/1A", "FFFFFFFF/FFFFFFFF"] {
            assert_eq!(text.parse::<Lsn>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn orders_by_position_and_not_by_text() {
        let lsn = |text: &str| text.parse::<Lsn>().unwrap();
        assert!(lsn("0/FFFFFFFF") < lsn("1/0"));
        assert!(lsn("9/0") < lsn("10/0"));
        assert_eq!(lsn("1/10").bytes_since(lsn("1/8")), 8);
        assert_eq!(lsn("1/8").bytes_since(lsn("1/10")), 0);
    }

    #[test]
    fn refuses_what_is_not_a_position() {
        for text in ["", "/", "0", "0/", "/0", "0/G", "0/0/0", "100000000/0", "+1/0", "0/-1"] {
            assert!(text.parse::<Lsn>().is_err(), "{text}");
        }
    }
}
