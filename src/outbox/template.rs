//! `{aggregatetype}.{type}`: a text with column names in braces, filled in row by row.
//!
//! The trap: an exchange from a row would let a row choose any queue by name, so a template makes the routing key only.

use std::str::FromStr;

/// A parsed template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    pieces: Vec<Piece>,
}

/// A part of a template.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Stands as it is.
    Text(String),
    /// Replaced by the column's value.
    Column(String),
}

impl Template {
    /// Its parts, in order.
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }
}

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut pieces = Vec::new();
        let mut rest = text;
        while let Some(brace) = rest.find(['{', '}']) {
            let (before, from_brace) = rest.split_at(brace);
            let Some(after) = from_brace.strip_prefix('{') else {
                return Err(format!("`{text}` has a `}}` without a `{{`"));
            };
            let Some((column, tail)) = after.split_once('}') else {
                return Err(format!("`{text}` has a `{{` without a `}}`"));
            };
            if column.is_empty() || column.contains('{') {
                return Err(format!("`{text}` needs a column's name between `{{` and `}}`"));
            }
            if !before.is_empty() {
                pieces.push(Piece::Text(before.to_owned()));
            }
            pieces.push(Piece::Column(column.to_owned()));
            rest = tail;
        }
        if !rest.is_empty() {
            pieces.push(Piece::Text(rest.to_owned()));
        }
        Ok(Self { pieces })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_into_text_and_columns() {
        let template: Template = "shop.{aggregatetype}.{type}!".parse().unwrap();
        let text = |text: &str| Piece::Text(text.to_owned());
        let column = |name: &str| Piece::Column(name.to_owned());
        assert_eq!(template.pieces(), [text("shop."), column("aggregatetype"), text("."), column("type"), text("!")]);
        assert_eq!("".parse::<Template>().unwrap().pieces(), []);
    }

    #[test]
    fn refuses_braces_that_do_not_pair() {
        for text in ["{", "}", "a}", "{a", "{}", "{a{b}}", "{{a}}"] {
            assert!(text.parse::<Template>().is_err(), "{text}");
        }
    }
}
