//! Texts become values, or a sentence about what is needed instead.
//!
//! The trap: a number without a unit means something else to everyone, so durations and sizes name theirs.

use std::time::Duration;

/// Postgres' own rule for slot names.
pub(super) fn slot(text: &str) -> Result<String, String> {
    let legal = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_';
    match text {
        text if (1..=63).contains(&text.len()) && text.chars().all(legal) => Ok(text.to_owned()),
        _ => Err("a slot's name has 1 to 63 of the characters a-z, 0-9 and _".to_owned()),
    }
}

pub(super) fn name(text: &str) -> Result<String, String> {
    match text {
        text if (1..=63).contains(&text.len()) && !text.contains('\0') => Ok(text.to_owned()),
        _ => Err("a name has 1 to 63 bytes".to_owned()),
    }
}

/// An exchange that a row's routing key could turn into any queue's name is refused.
pub(super) fn exchange(text: &str) -> Result<String, String> {
    match text {
        "" => Err("the default exchange would let a row choose any queue by name; name an exchange".to_owned()),
        text if text.len() > 255 => Err("an exchange's name has at most 255 bytes".to_owned()),
        text => Ok(text.to_owned()),
    }
}

/// Names with commas between; a name that holds one cannot be told.
pub(super) fn queues(text: &str) -> Result<Vec<String>, String> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let queue = |name: &str| match name.trim() {
        "" => Err("there is a comma without a name beside it".to_owned()),
        name if name.len() > 255 => Err("a queue's name has at most 255 bytes".to_owned()),
        name => Ok(name.to_owned()),
    };
    text.split(',').map(queue).collect()
}

/// `schema.table`, as SQL reads it: folded to lower case unless quoted.
pub(super) fn qualified(text: &str) -> Result<(String, String), String> {
    let wrong =
        || "a table such as public.outbox is needed; quote what is not lower case: \"Shop\".\"Outbox\"".to_owned();
    let mut parts = Vec::new();
    let mut rest = text;
    loop {
        let (part, tail) = match rest.strip_prefix('"') {
            Some(text) => quoted(text).ok_or_else(wrong)?,
            None => {
                let end = rest.find('.').unwrap_or(rest.len());
                let (part, tail) = rest.split_at(end);
                (part.to_ascii_lowercase(), tail)
            }
        };
        name(&part).map_err(|_| wrong())?;
        parts.push(part);
        match tail.strip_prefix('.') {
            Some(tail) => rest = tail,
            None if tail.is_empty() => break,
            None => return Err(wrong()),
        }
    }
    match <[String; 2]>::try_from(parts) {
        Ok([schema, table]) => Ok((schema, table)),
        Err(parts) if parts.len() == 1 => Ok(("public".to_owned(), parts.into_iter().next().unwrap_or_default())),
        Err(_) => Err(wrong()),
    }
}

/// A name up to its closing quotation mark, and what follows; two of them are one that is a part of the name.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut name = String::new();
    let mut rest = text;
    loop {
        let (part, tail) = rest.split_once('"')?;
        name.push_str(part);
        let Some(tail) = tail.strip_prefix('"') else { return Some((name, tail)) };
        name.push('"');
        rest = tail;
    }
}

pub(super) fn duration(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| "a duration such as 30s, 500ms or 2min is needed".to_owned())
}

pub(super) fn bytes(text: &str, max: u64) -> Result<u64, String> {
    let wrong = || format!("a size such as 8MiB, from 1 byte to {}, is needed", bytesize::ByteSize(max));
    let size = text.parse::<bytesize::ByteSize>().map_err(|_| wrong())?.as_u64();
    if (1..=max).contains(&size) { Ok(size) } else { Err(wrong()) }
}

/// Edit distance, for "did you mean".
pub(super) fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.chars().count()).collect();
    for (i, left) in a.chars().enumerate() {
        let mut previous = i;
        let mut next = vec![i + 1];
        for (right, above) in b.chars().zip(row.iter().skip(1)) {
            let cost = previous + usize::from(left != right);
            let beside = next.last().copied().unwrap_or_default() + 1;
            next.push(cost.min(above + 1).min(beside));
            previous = *above;
        }
        row = next;
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_are_names_with_commas_between() {
        assert_eq!(queues(" "), Ok(Vec::new()));
        assert_eq!(queues("orders, an audit"), Ok(vec!["orders".to_owned(), "an audit".to_owned()]));
        for wrong in [",", "a,", "a,,b", &"x".repeat(256)] {
            assert!(queues(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn tables_are_read_as_sql_reads_them() {
        let pair = |schema: &str, table: &str| Ok((schema.to_owned(), table.to_owned()));
        assert_eq!(qualified("Outbox"), pair("public", "outbox"));
        assert_eq!(qualified("shop.Outbox"), pair("shop", "outbox"));
        assert_eq!(qualified("\"Shop.1\".\"Out\""), pair("Shop.1", "Out"));
        assert_eq!(qualified(r#""a""."."the ""out""""#), pair("a\".", "the \"out\""));
        for wrong in ["", ".", "a.", ".b", "a.b.c", "\"a", "\"a\"b"] {
            assert!(qualified(wrong).is_err(), "{wrong}");
        }
    }
}
