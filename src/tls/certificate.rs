//! Just enough of X.509 for what rustls leaves to us: the hash for channel binding, the names in a certificate, and
//! certificates of version 1.
//!
//! Why by hand: webpki neither tells a signature's algorithm nor looks at a Common Name, and it reads no version 1, which
//! is what the recipe in Postgres' own manual makes. A DER reader that only walks forward is shorter than the glue to
//! one. The trap: every byte here is the peer's, so nothing is indexed and whatever does not fit is `None`.

use sha2::{Digest, Sha256, Sha384, Sha512};

const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
const OBJECT_IDENTIFIER: u8 = 0x06;
const BIT_STRING: u8 = 0x03;
const OCTET_STRING: u8 = 0x04;
const BOOLEAN: u8 = 0x01;

/// The parts of a certificate, as they stand in it.
pub(crate) struct Certificate<'a> {
    /// What the issuer signed.
    pub(crate) signed: &'a [u8],
    /// The signature's algorithm, without its outer header.
    pub(crate) algorithm: &'a [u8],
    pub(crate) signature: &'a [u8],
    pub(crate) is_version_1: bool,
    pub(crate) issuer: &'a [u8],
    pub(crate) subject: &'a [u8],
    validity: &'a [u8],
    /// The key with its algorithm, with its header.
    pub(crate) key: &'a [u8],
    extensions: Option<&'a [u8]>,
}

/// The next element: tag, content, and the whole with its header.
fn element<'a>(input: &mut &'a [u8]) -> Option<(u8, &'a [u8], &'a [u8])> {
    let all = *input;
    let (&tag, rest) = all.split_first()?;
    let (&first, rest) = rest.split_first()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81..=0x84 => {
            let (digits, rest) = rest.split_at_checked(usize::from(first & 0x7f))?;
            (digits.iter().fold(0, |length, digit| length << 8 | usize::from(*digit)), rest)
        }
        _ => return None,
    };
    let (content, after) = rest.split_at_checked(length)?;
    *input = after;
    Some((tag, content, all.get(..all.len() - after.len())?))
}

/// The content of the next element, which must have this tag.
fn expect<'a>(input: &mut &'a [u8], tag: u8) -> Option<&'a [u8]> {
    element(input).filter(|(found, ..)| *found == tag).map(|(_, content, _)| content)
}

impl<'a> Certificate<'a> {
    pub(crate) fn parse(der: &'a [u8]) -> Option<Self> {
        let mut outer = expect(&mut { der }, SEQUENCE)?;
        let (_, mut body, signed) = element(&mut outer)?;
        let algorithm = expect(&mut outer, SEQUENCE)?;
        let (_, signature) = expect(&mut outer, BIT_STRING)?.split_first()?;
        let (first, ..) = element(&mut body)?;
        let is_version_1 = first != 0xa0;
        if !is_version_1 {
            element(&mut body)?;
        }
        let _signature_again = expect(&mut body, SEQUENCE)?;
        let (_, _, issuer) = element(&mut body)?;
        let validity = expect(&mut body, SEQUENCE)?;
        let (_, _, subject) = element(&mut body)?;
        let (_, _, key) = element(&mut body)?;
        let mut extensions = None;
        while let Some((tag, content, _)) = element(&mut body) {
            if tag == 0xa3 {
                extensions = expect(&mut { content }, SEQUENCE);
            }
        }
        Some(Self { signed, algorithm, signature, is_version_1, issuer, subject, validity, key, extensions })
    }

    /// The key's algorithm and bits.
    pub(crate) fn key_parts(&self) -> Option<(&'a [u8], &'a [u8])> {
        let mut key = expect(&mut { self.key }, SEQUENCE)?;
        let algorithm = expect(&mut key, SEQUENCE)?;
        let (_, bits) = expect(&mut key, BIT_STRING)?.split_first()?;
        Some((algorithm, bits))
    }

    /// `tls-server-end-point` (RFC 5929): the certificate's hash, by the hash of its own signature, but never MD5 or SHA-1.
    /// `None` where the signature has no hash of its own, such as Ed25519: Postgres cannot bind to those either.
    pub(crate) fn end_point(&self, der: &[u8]) -> Option<Vec<u8>> {
        match hash(self.algorithm)? {
            Hash::Sha256 => Some(Sha256::digest(der).to_vec()),
            Hash::Sha384 => Some(Sha384::digest(der).to_vec()),
            Hash::Sha512 => Some(Sha512::digest(der).to_vec()),
        }
    }

    /// Whether `seconds` since 1970 lie between its two dates.
    pub(crate) fn is_valid_at(&self, seconds: u64) -> bool {
        let dates = || {
            let mut validity = self.validity;
            Some((date(&mut validity)?, date(&mut validity)?))
        };
        dates().is_some_and(|(from, to)| (from..=to).contains(&i64::try_from(seconds).unwrap_or(i64::MAX)))
    }

    /// Whether basicConstraints calls it a certification authority; so is every one of version 1, which cannot say.
    pub(crate) fn is_authority(&self) -> bool {
        const BASIC_CONSTRAINTS: &[u8] = &[0x55, 0x1d, 0x13];
        let says_so = || expect(&mut expect(&mut self.extension(BASIC_CONSTRAINTS)?, SEQUENCE)?, BOOLEAN);
        self.is_version_1 || says_so().is_some_and(|value| value != [0])
    }

    /// Its alternative names: the kind's tag, and the name or the address' octets.
    pub(super) fn alternative_names(&self) -> Vec<(u8, &'a [u8])> {
        let mut names = self.alternative_names_as_they_stand().unwrap_or_default();
        std::iter::from_fn(|| element(&mut names).map(|(tag, name, _)| (tag, name))).collect()
    }

    fn alternative_names_as_they_stand(&self) -> Option<&'a [u8]> {
        const SUBJECT_ALT_NAME: &[u8] = &[0x55, 0x1d, 0x11];
        expect(&mut self.extension(SUBJECT_ALT_NAME)?, SEQUENCE)
    }

    fn extension(&self, identifier: &[u8]) -> Option<&'a [u8]> {
        let mut extensions = self.extensions?;
        while let Some(mut extension) = expect(&mut extensions, SEQUENCE) {
            if expect(&mut extension, OBJECT_IDENTIFIER)? == identifier {
                let (tag, content, _) = element(&mut extension)?;
                return if tag == BOOLEAN { expect(&mut extension, OCTET_STRING) } else { Some(content) };
            }
        }
        None
    }

    /// Its Common Names, in their order.
    pub(super) fn common_names(&self) -> Vec<&'a [u8]> {
        let mut names = Vec::new();
        let Some(mut parts) = expect(&mut { self.subject }, SEQUENCE) else { return names };
        while let Some(mut set) = expect(&mut parts, SET) {
            while let Some(pair) = expect(&mut set, SEQUENCE) {
                names.extend(common_name(pair));
            }
        }
        names
    }
}

/// The text of an attribute that is a Common Name.
fn common_name(mut pair: &[u8]) -> Option<&[u8]> {
    const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
    let is_one = expect(&mut pair, OBJECT_IDENTIFIER)? == COMMON_NAME;
    element(&mut pair).filter(|_| is_one).map(|(_, text, _)| text)
}

enum Hash {
    Sha256,
    Sha384,
    Sha512,
}

fn hash(mut algorithm: &[u8]) -> Option<Hash> {
    match expect(&mut algorithm, OBJECT_IDENTIFIER)? {
        // RSA with MD5 and SHA-1, ECDSA with SHA-1: RFC 5929 says SHA-256.
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x04 | 0x05 | 0x0b] => Some(Hash::Sha256),
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x01] => Some(Hash::Sha256),
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0c] => Some(Hash::Sha384),
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0d] => Some(Hash::Sha512),
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02] => Some(Hash::Sha256),
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x03] => Some(Hash::Sha384),
        [0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x04] => Some(Hash::Sha512),
        // RSASSA-PSS names its hash in the parameters.
        [0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a] => pss_hash(algorithm),
        _ => None,
    }
}

fn pss_hash(mut parameters: &[u8]) -> Option<Hash> {
    let mut fields = expect(&mut parameters, SEQUENCE)?;
    let mut hash = expect(&mut expect(&mut fields, 0xa0)?, SEQUENCE)?;
    match expect(&mut hash, OBJECT_IDENTIFIER)? {
        [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x01] => Some(Hash::Sha256),
        [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x02] => Some(Hash::Sha384),
        [0x60, 0x86, 0x48, 0x01, 0x65, 0x03, 0x04, 0x02, 0x03] => Some(Hash::Sha512),
        _ => None,
    }
}

/// Seconds since 1970 of a UTCTime (two digits of the year) or a GeneralizedTime (four).
fn date(input: &mut &[u8]) -> Option<i64> {
    const UTC_TIME: u8 = 0x17;
    let (tag, text, _) = element(input)?;
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    let (year, rest) = text.split_at_checked(if tag == UTC_TIME { 2 } else { 4 })?;
    let year: i64 = year.parse().ok()?;
    let year = match year {
        _ if tag != UTC_TIME => year,
        0..50 => 2000 + year,
        _ => 1900 + year,
    };
    let two = |index: usize| rest.get(index..index + 2)?.parse::<i64>().ok();
    let (month, day) = (two(0)?, two(2)?);
    let seconds = two(4)? * 3600 + two(6)? * 60 + two(8)?;
    // Days since 1970 of the proleptic Gregorian calendar; a year begins in March, so that the leap day is its last.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days =
        year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400) + (month * 153 + 2) / 5 + day - 1;
    Some((days - 719_468) * 86_400 + seconds)
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, date_time_ymd};

    use super::*;

    fn certificate(names: &[&str], common_name: &str) -> Vec<u8> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.not_before = date_time_ymd(2000, 2, 29);
        params.not_after = date_time_ymd(2051, 12, 31);
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn dates_are_read_to_the_second() {
        let der = certificate(&["db"], "db");
        let certificate = Certificate::parse(&der).unwrap();
        let (from, to) = (951_782_400, 2_587_593_600);
        for (seconds, expected) in [(from - 1, false), (from, true), (to, true), (to + 1, false)] {
            assert_eq!(certificate.is_valid_at(seconds), expected, "{seconds}");
        }
    }

    #[test]
    fn the_hash_follows_the_signature() {
        let params = || CertificateParams::new(vec!["db".to_owned()]).unwrap();
        for (algorithm, bytes) in
            [(&rcgen::PKCS_ECDSA_P256_SHA256, Some(32)), (&PKCS_ECDSA_P384_SHA384, Some(48)), (&PKCS_ED25519, None)]
        {
            let der = params().self_signed(&KeyPair::generate_for(algorithm).unwrap()).unwrap().der().to_vec();
            let hash = Certificate::parse(&der).unwrap().end_point(&der);
            assert_eq!(hash.map(|hash| hash.len()), bytes);
        }
    }

    #[test]
    fn a_certificate_that_is_cut_or_bent_is_never_a_panic() {
        let der = certificate(&["db", "127.0.0.1"], "db");
        for index in 0..der.len() {
            let mut bent = der.clone();
            bent[index] = bent[index].wrapping_add(0x7f);
            for bytes in [&der[..index], &bent] {
                if let Some(certificate) = Certificate::parse(bytes) {
                    let _ = (certificate.alternative_names(), certificate.common_names());
                    let _ = (certificate.is_valid_at(0), certificate.end_point(bytes));
                    let _ = (certificate.key_parts(), certificate.is_authority());
                }
            }
        }
    }
}
