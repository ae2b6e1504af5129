//! Names in the environment that look like settings and are none.

use std::collections::BTreeSet;

use super::NAMES;

/// Sentences about names in `environment` that look like settings but are none, each naming the nearest real one.
#[must_use]
pub fn unknown_names(environment: impl Iterator<Item = (String, String)>) -> Vec<String> {
    let names: BTreeSet<String> = environment
        .filter(|(name, value)| {
            name.starts_with("DRAWBRIDGE_")
                && !NAMES.contains(&name.as_str())
                && !is_service_link(name, value)
        })
        .map(|(name, _)| name)
        .collect();
    let nearest = |name: &str| {
        NAMES
            .into_iter()
            .min_by_key(|known| distance(name, known))
            .unwrap_or_default()
    };
    names
        .iter()
        .map(|name| format!("{name} is not a setting; did you mean {}?", nearest(name)))
        .collect()
}

/// Whether Kubernetes injects such a name for a Service called `drawbridge` or `drawbridge-..`.
fn is_service_link(name: &str, value: &str) -> bool {
    let port = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let tcp = |suffix: &str| {
        name.rsplit_once("_PORT_")
            .is_some_and(|(_, rest)| rest.strip_suffix(suffix).is_some_and(port))
    };
    name.ends_with("_SERVICE_HOST")
        || name.contains("_SERVICE_PORT")
        || (name.ends_with("_PORT") && value.starts_with("tcp://"))
        || ["_TCP", "_TCP_ADDR", "_TCP_PORT", "_TCP_PROTO"]
            .into_iter()
            .any(tcp)
}

/// Levenshtein distance.
fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_name_is_warned_about_and_service_links_are_not() {
        let environment = [
            ("DRAWBRIDGE_LISTN", "x"),
            ("DRAWBRIDGE_SERVICE_HOST", "10.0.0.1"),
            ("DRAWBRIDGE_SERVICE_PORT_HTTP", "2455"),
            ("DRAWBRIDGE_PORT", "tcp://10.0.0.1:2455"),
            ("DRAWBRIDGE_PORT_2455_TCP_ADDR", "10.0.0.1"),
            ("DRAWBRIDGE_LOG", "info"),
        ];
        let warnings = unknown_names(
            environment
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.to_owned())),
        );
        assert_eq!(
            warnings,
            ["DRAWBRIDGE_LISTN is not a setting; did you mean DRAWBRIDGE_LISTEN?"]
        );
    }
}
