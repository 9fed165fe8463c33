//! Numbers as people read them.
//!
//! The trap: eight digits in a row are not read, they are skipped.

use std::time::{SystemTime, UNIX_EPOCH};

/// `12,345`.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// From microseconds; a digit behind the point only where it says something.
pub(super) fn milliseconds(us: u64) -> String {
    if us < 10_000 { format!("{}.{} ms", us / 1_000, us % 1_000 / 100) } else { format!("{} ms", grouped(us / 1_000)) }
}

/// Microseconds since 1970. The wall clock, because a row carries it from one service to another.
pub(super) fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn short_times_have_one_digit_behind_the_point() {
        assert_eq!(
            [0, 1_260, 9_999, 10_000, 1_500_000].map(milliseconds),
            ["0.0 ms", "1.2 ms", "9.9 ms", "10 ms", "1,500 ms"]
        );
    }
}
