//! The `headers` column: a JSON object whose fields become typed message headers.
//!
//! The trap: some names make the broker do things. `CC` and `BCC` route copies to other queues, and satisfy `mandatory`
//! although the routing key leads nowhere; a row must not be able to say that.

use bytestring::ByteString;
use serde_json::Value as Json;

use super::message::HeaderValue;

/// AMQP's limit for a header's name, in bytes.
pub const NAME_BYTES_MAX: usize = 255;

/// Deeper nesting is a mistake, and a stack to be kept small.
const DEPTH_MAX: usize = 16;

/// Two to the 63rd: where AMQP's whole numbers end.
const BEYOND_I64: f64 = 9_223_372_036_854_775_808.0;

/// Names that mean something to the broker or to this relay. Compared without regard to case.
const RESERVED: [&str; 11] = [
    "cc",
    "bcc",
    "aggregatetype",
    "aggregateid",
    "x-death",
    "x-delay",
    "x-deduplication-header",
    "x-stream-filter-value",
    "x-stream-offset",
    "x-message-ttl",
    // Federation forwards nothing that has come its way already.
    "x-received-from",
];

/// Of the column. Parsed, each byte can take sixteen of memory; a broker takes a frame of them at most, which is 128 KiB by
/// default.
const TEXT_BYTES_MAX: usize = 1024 * 1024;

/// Beginnings of such names.
const RESERVED_PREFIXES: [&str; 3] = ["x-outbox-", "x-first-death-", "x-last-death-"];

/// Reads the column's text into `headers`.
///
/// # Errors
/// What is wrong, naming the field and never its value.
pub fn read(text: &[u8], headers: &mut Vec<(ByteString, HeaderValue)>) -> Result<(), String> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(format!("column headers has {} bytes; {TEXT_BYTES_MAX} are possible", text.len()));
    }
    // Postgres takes numbers, depths and surrogates that we do not: not called invalid. The reason repeats no text.
    let json: Json = serde_json::from_slice(text).map_err(|why| format!("column headers cannot be read: {why}"))?;
    let fields = match json {
        Json::Null => return Ok(()),
        Json::Object(fields) => fields,
        _ => return Err("column headers is not a JSON object".to_owned()),
    };
    // Those of one object differ already; to compare them all takes minutes where there are a hundred thousand.
    let own = headers.len();
    for (name, value) in fields {
        refuse_name(&name)?;
        if headers.iter().take(own).any(|(present, _)| **present == *name) {
            return Err(format!("header {name:?} is set by a column of its own already"));
        }
        let value = value_of(value, 0).map_err(|problem| format!("header {name:?}: {problem}"))?;
        headers.push((name.into(), value));
    }
    Ok(())
}

fn refuse_name(name: &str) -> Result<(), String> {
    let lower = name.to_ascii_lowercase();
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return Err(format!("a header's name has {} bytes; 1 to {NAME_BYTES_MAX} are possible", name.len()));
    }
    if RESERVED.contains(&lower.as_str()) || RESERVED_PREFIXES.iter().any(|prefix| lower.starts_with(prefix)) {
        return Err(format!("header {name:?} is reserved: it means something to the broker or to pgoutbox"));
    }
    Ok(())
}

fn value_of(json: Json, depth: usize) -> Result<HeaderValue, String> {
    if depth > DEPTH_MAX {
        return Err(format!("nested deeper than {DEPTH_MAX} levels"));
    }
    Ok(match json {
        Json::Null => HeaderValue::Null,
        Json::Bool(value) => HeaderValue::Bool(value),
        Json::String(text) => HeaderValue::Text(text.into()),
        Json::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(whole), _) => HeaderValue::Int(whole),
            // A float would not be the same number. From there on serde_json makes floats of whole numbers.
            (None, Some(float)) if float.abs() >= BEYOND_I64 => {
                return Err("a whole number beyond 64 bits with sign, or as large".to_owned());
            }
            (None, Some(float)) => HeaderValue::Float(float),
            (None, None) => return Err("a number out of range".to_owned()),
        },
        Json::Array(values) => {
            HeaderValue::List(values.into_iter().map(|value| value_of(value, depth + 1)).collect::<Result<_, _>>()?)
        }
        Json::Object(fields) => {
            let field = |(name, value): (String, Json)| {
                if name.len() > NAME_BYTES_MAX {
                    return Err(format!("a nested name has {} bytes; {NAME_BYTES_MAX} are possible", name.len()));
                }
                Ok((name.into(), value_of(value, depth + 1)?))
            };
            HeaderValue::Map(fields.into_iter().map(field).collect::<Result<_, _>>()?)
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(text: &str) -> Result<Vec<(ByteString, HeaderValue)>, String> {
        let mut headers = vec![("traceparent".into(), HeaderValue::from("00-1"))];
        read(text.as_bytes(), &mut headers)?;
        Ok(headers.split_off(1))
    }

    #[test]
    fn fields_keep_their_types() {
        let headers = read_all(r#"{"a":"x","b":7,"c":1.5,"d":true,"e":null,"f":[1,{"g":"h"}]}"#).unwrap();
        let nested = HeaderValue::Map(vec![("g".into(), HeaderValue::from("h"))]);
        let expected = [
            ("a", HeaderValue::from("x")),
            ("b", HeaderValue::Int(7)),
            ("c", HeaderValue::Float(1.5)),
            ("d", HeaderValue::Bool(true)),
            ("e", HeaderValue::Null),
            ("f", HeaderValue::List(vec![HeaderValue::Int(1), nested])),
        ];
        assert_eq!(headers, expected.map(|(name, value)| (name.into(), value)));
        assert_eq!(read_all("null").unwrap(), []);
    }

    #[test]
    fn names_that_steer_the_broker_are_refused() {
        for name in [
            "CC",
            "BCC",
            "cc",
            "x-death",
            "x-delay",
            "x-first-death-queue",
            "x-received-from",
            "x-outbox-lsn",
            "X-Outbox-Seq",
            "",
        ] {
            assert!(read_all(&format!("{{\"{name}\":[\"secret\"]}}")).is_err(), "{name}");
        }
        assert!(read_all(&format!("{{\"{}\":1}}", "n".repeat(256))).is_err());
        assert!(read_all(r#"{"traceparent":"00-2"}"#).is_err(), "a name twice");
    }

    #[test]
    fn what_cannot_be_carried_is_refused_without_telling_the_value() {
        for text in ["[1]", "7", "{", "\"s3cret\""] {
            let error = read_all(text).unwrap_err();
            assert!(!error.contains("s3cret"), "{error}");
        }
        // Up to 2^64-1 and beyond it, and down from -2^63: each would come out as another number.
        for number in ["9223372036854775808", "18446744073709551616", "98765432109876543210", "-9223372036854775809"] {
            let error = read_all(&format!("{{\"a\":{number}}}")).unwrap_err();
            assert!(error.contains("64 bits") && !error.contains(number), "{error}");
        }
        let least = read_all("{\"a\":-9223372036854775808}").unwrap();
        assert_eq!(least, [("a".into(), HeaderValue::Int(i64::MIN))]);
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(40), "]".repeat(40));
        assert!(read_all(&deep).is_err());
    }

    /// Postgres takes all of these, and an operator who looks at the column sees nothing wrong with its JSON.
    #[test]
    fn json_that_only_we_cannot_read_is_not_called_invalid() {
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(200), "]".repeat(200));
        for (text, problem) in [
            ("{\"a\":1e400}", "number out of range"),
            ("{\"s3cret\":\"s3cret\\ud800\"}", "hex escape"),
            (&deep, "recursion limit"),
            ("{\"s3cret\":s3cret}", "expected value"),
        ] {
            let error = read_all(text).unwrap_err();
            assert!(!error.contains("valid JSON") && error.contains(problem), "{error}");
            assert!(!error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn a_text_beyond_its_limit_is_not_even_parsed() {
        let of = |bytes: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(bytes - 8));
        assert!(read_all(&of(TEXT_BYTES_MAX)).is_ok());
        assert!(read_all(&of(TEXT_BYTES_MAX + 1)).unwrap_err().contains("1048577 bytes"));
    }

    #[test]
    fn names_and_nesting_pass_up_to_their_limits_and_no_further() {
        let named = |bytes: usize| format!("{{\"{}\":1}}", "n".repeat(bytes));
        let below = |text: &str| format!("{{\"a\":{text}}}");
        let lists = |depth: usize| below(&format!("{}1{}", "[".repeat(depth), "]".repeat(depth)));
        let objects = |depth: usize| below(&format!("{}1{}", "{\"b\":".repeat(depth), "}".repeat(depth)));
        let last = NAME_BYTES_MAX;
        for fits in [named(last), below(&named(last)), lists(DEPTH_MAX), objects(DEPTH_MAX)] {
            assert!(read_all(&fits).is_ok(), "{fits}");
        }
        for exceeds in [named(last + 1), below(&named(last + 1)), lists(DEPTH_MAX + 1), objects(DEPTH_MAX + 1)] {
            assert!(read_all(&exceeds).is_err(), "{exceeds}");
        }
    }
}
