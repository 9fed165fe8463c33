//! Whether a certificate is for a host, as libpq or as OpenSSL sees it.
//!
//! The trap: they agree on nearly everything. An address that stands in the Common Name counts for libpq and not for
//! OpenSSL, and a star below a top-level domain (`*.localhost`) likewise. Who expects the one and gets the other is locked
//! out, or lets somebody in.

use std::net::IpAddr;

use super::certificate::Certificate;

/// A name or an address to compare a certificate with, and whose rules.
#[derive(Clone, Debug)]
pub(crate) enum Name {
    Libpq(String),
    OpenSsl(String),
}

const DNS_NAME: u8 = 0x82;
const IP_ADDRESS: u8 = 0x87;

impl Name {
    /// To both a Common Name counts only where no alternative name is of the kind asked for.
    pub(super) fn is_in(&self, certificate: &Certificate<'_>) -> bool {
        let (Name::Libpq(host) | Name::OpenSsl(host)) = self;
        let address: Option<IpAddr> = host.parse().ok();
        let kind = if address.is_some() { IP_ADDRESS } else { DNS_NAME };
        let names = certificate.alternative_names();
        let fits = |(tag, name): &(u8, &[u8])| match (*tag, address, self) {
            // libpq compares an address as a text, too.
            (DNS_NAME, None, _) | (DNS_NAME, Some(_), Name::Libpq(_)) => self.fits(name, host),
            (IP_ADDRESS, Some(IpAddr::V4(address)), _) => *name == address.octets(),
            (IP_ADDRESS, Some(IpAddr::V6(address)), _) => *name == address.octets(),
            _ => false,
        };
        if names.iter().any(fits) {
            return true;
        }
        let common_names = certificate.common_names();
        let common_names = match self {
            _ if names.iter().any(|(tag, _)| *tag == kind) => &[][..],
            Name::Libpq(_) => common_names.get(..1).unwrap_or_default(),
            Name::OpenSsl(_) if address.is_some() => &[],
            Name::OpenSsl(_) => &common_names,
        };
        common_names.iter().any(|name| self.fits(name, host))
    }

    /// A star stands for one whole label at the front.
    fn fits(&self, name: &[u8], host: &str) -> bool {
        let Ok(name) = std::str::from_utf8(name) else { return false };
        if name.contains('\0') {
            return false;
        }
        let Some(parent) = name.strip_prefix("*.") else { return name.eq_ignore_ascii_case(host) };
        let Some((label, rest)) = host.split_once('.') else { return false };
        let covers = match self {
            Name::Libpq(_) => !label.is_empty(),
            Name::OpenSsl(_) => {
                parent.contains('.')
                    && !label.is_empty()
                    && label.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '-')
            }
        };
        covers && parent.eq_ignore_ascii_case(rest)
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    /// With these alternative names and Common Names.
    fn certificate(names: &[&str], common_names: &[&str]) -> Vec<u8> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for name in common_names {
            params.distinguished_name.push(DnType::CommonName, *name);
        }
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn names_are_compared_as_libpq_and_openssl_do() {
        for (names, common_name, host, by_libpq, by_openssl) in [
            (&["db.example.com"][..], "other", "DB.example.com", true, true),
            (&["db.example.com"], "other", "other", false, false),
            (&["*.example.com"], "x", "db.example.com", true, true),
            (&["*.example.com"], "x", "a.db.example.com", false, false),
            (&["*.example.com"], "x", "example.com", false, false),
            (&["*.example.com"], "x", ".example.com", false, false),
            (&["*.example.com"], "x", "d_b.example.com", true, false),
            (&["*.localhost"], "x", "db.localhost", true, false),
            (&["127.0.0.1"], "x", "127.0.0.1", true, true),
            (&["127.0.0.1"], "x", "127.0.0.2", false, false),
            (&["::1"], "x", "0:0:0:0:0:0:0:1", true, true),
            (&[], "db", "db", true, true),
            (&[], "*.example.com", "db.example.com", true, true),
            // Only an alternative name of the same kind keeps the Common Name from counting.
            (&["127.0.0.1"], "db", "db", true, true),
            (&["db"], "127.0.0.1", "127.0.0.1", true, false),
            (&[], "127.0.0.1", "127.0.0.1", true, false),
            (&["127.0.0.2"], "127.0.0.1", "127.0.0.1", false, false),
        ] {
            let der = certificate(names, &[common_name]);
            let parsed = Certificate::parse(&der).unwrap();
            for (name, expected) in
                [(Name::Libpq(host.to_owned()), by_libpq), (Name::OpenSsl(host.to_owned()), by_openssl)]
            {
                assert_eq!(name.is_in(&parsed), expected, "{names:?}, {common_name} for {name:?}");
            }
        }
    }
}
