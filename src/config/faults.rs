//! Reads the text of settings and collects everything that is wrong with it.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use super::Internal;

/// Collects what is wrong.
#[derive(Default)]
pub(super) struct Faults(Vec<String>);

impl Faults {
    pub(super) fn add(&mut self, fault: &str) {
        self.0.push(fault.to_owned());
    }

    /// The value, or a fault and the default.
    pub(super) fn parse<T>(
        &mut self,
        name: &str,
        given: Option<String>,
        default: &str,
        wanted: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> T {
        self.given(name, given, wanted, &read)
            .unwrap_or_else(|| read(default).expect("defaults are valid"))
    }

    /// The value if one is given, or a fault.
    fn given<T>(
        &mut self,
        name: &str,
        given: Option<String>,
        wanted: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Option<T> {
        let text = given?;
        let value = read(text.trim());
        if value.is_none() {
            self.0.push(format!("{name}={text} is not {wanted}"));
        }
        value
    }

    /// The path, unless it is an empty text.
    pub(super) fn path(&mut self, name: &str, given: Option<PathBuf>) -> Option<PathBuf> {
        let path = given?;
        if path.as_os_str().is_empty() {
            self.0.push(format!("{name} is set but empty"));
            return None;
        }
        Some(path)
    }

    pub(super) fn internal(
        &mut self,
        listen: Option<String>,
        url: Option<String>,
    ) -> Option<Internal> {
        let (listens, told) = (listen.is_some(), url.is_some());
        let wanted = "an address such as 10.0.0.7:2456";
        let listen = self.given("DRAWBRIDGE_INTERNAL_LISTEN", listen, wanted, address);
        let url = self.given("DRAWBRIDGE_INTERNAL_URL", url, "an http(s) URL", self::url);
        if told && !listens {
            self.add("DRAWBRIDGE_INTERNAL_URL is set but DRAWBRIDGE_INTERNAL_LISTEN is not");
        }
        if !told && listen.is_some_and(|address| address.ip().is_unspecified()) {
            self.add(
                "DRAWBRIDGE_INTERNAL_LISTEN is no address that other replicas could use; set DRAWBRIDGE_INTERNAL_URL to how they reach it",
            );
        }
        Some(Internal {
            listen: listen?,
            url,
        })
    }

    pub(super) fn none(self) -> Result<(), Vec<String>> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(self.0)
        }
    }
}

pub(super) fn address(text: &str) -> Option<SocketAddr> {
    text.parse().ok()
}

pub(super) fn url(text: &str) -> Option<String> {
    let parsed: http::Uri = text.parse().ok()?;
    let known = matches!(parsed.scheme_str(), Some("http" | "https"));
    (known && parsed.authority().is_some() && parsed.query().is_none())
        .then(|| text.trim_end_matches('/').to_owned())
}

pub(super) fn duration(text: &str) -> Option<Duration> {
    text.parse::<jiff::SignedDuration>().ok()?.try_into().ok()
}
