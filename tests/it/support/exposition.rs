//! A strict reader of the Prometheus text format: what it takes, Prometheus takes, and no family lacks what it needs.

use std::collections::{BTreeMap, BTreeSet};

/// Labels by name.
pub(crate) type Labels = BTreeMap<String, String>;

/// A page of metrics.
#[derive(Debug, Default)]
pub(crate) struct Page(pub(crate) BTreeMap<String, Family>);

/// A metric with everything that was said of it.
#[derive(Debug)]
pub(crate) struct Family {
    pub(crate) kind: String,
    pub(crate) help: String,
    /// The name of the sample (that of the family, or with a histogram's suffix), its labels and its value.
    pub(crate) samples: Vec<(String, Labels, f64)>,
}

impl Page {
    /// Scrapes an admin listener.
    pub(crate) async fn of(http: &reqwest::Client, admin: &str) -> Self {
        let answer = http.get(format!("http://{admin}/metrics")).send().await;
        let answer = answer.unwrap();
        assert_eq!(
            answer.headers()["content-type"],
            "text/plain; version=0.0.4"
        );
        Self::read(&answer.text().await.unwrap())
    }

    /// Reads a page, or says which line is wrong.
    pub(crate) fn read(text: &str) -> Self {
        let mut page = Self::default();
        let mut current: Option<String> = None;
        let mut help: Option<(String, String)> = None;
        let mut seen = BTreeSet::new();
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, text) = rest.split_once(' ').expect(line);
                assert!(!text.trim().is_empty(), "{line}");
                help = Some((name.to_owned(), text.to_owned()));
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').expect(line);
                let (of, help) = help
                    .take()
                    .unwrap_or_else(|| panic!("no help before: {line}"));
                assert_eq!(of, name, "{line}");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                let family = Family {
                    kind: kind.to_owned(),
                    help,
                    samples: Vec::new(),
                };
                assert!(
                    page.0.insert(name.to_owned(), family).is_none(),
                    "twice: {line}"
                );
                current = Some(name.to_owned());
            } else {
                assert!(help.is_none(), "no type before: {line}");
                let name = current
                    .as_ref()
                    .unwrap_or_else(|| panic!("of nothing: {line}"));
                let sample = sample(line);
                assert!(
                    seen.insert((sample.0.clone(), sample.1.clone())),
                    "twice: {line}"
                );
                let family = page.0.get_mut(name).expect("it is the current one");
                let suffix = sample.0.strip_prefix(name.as_str()).expect(line);
                let suffixes: &[&str] = match family.kind.as_str() {
                    "histogram" => &["_bucket", "_sum", "_count"],
                    _ => &[""],
                };
                assert!(suffixes.contains(&suffix), "{line}");
                family.samples.push(sample);
            }
        }
        page
    }

    /// The sum of a metric's samples that have these labels.
    pub(crate) fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let family = self.0.get(name).unwrap_or_else(|| panic!("no {name}"));
        let samples = family.samples.iter();
        let matching = samples.filter(|(_, given, _)| {
            let mut labels = labels.iter();
            labels.all(|(name, value)| given.get(*name).is_some_and(|given| given == value))
        });
        matching.map(|(.., value)| value).sum()
    }

    /// How many observations a histogram has.
    pub(crate) fn observed(&self, name: &str) -> f64 {
        let count = format!("{name}_count");
        let samples = self.0[name].samples.iter();
        let counts = samples.filter(|(sample, ..)| *sample == count);
        counts.map(|(.., value)| value).sum()
    }

    /// Every name that a query may use.
    pub(crate) fn names(&self) -> BTreeSet<String> {
        let each = self.0.iter().flat_map(|(name, family)| {
            let suffixes: &[&str] = match family.kind.as_str() {
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => &[""],
            };
            suffixes.iter().map(move |suffix| format!("{name}{suffix}"))
        });
        each.collect()
    }
}

fn sample(line: &str) -> (String, Labels, f64) {
    let (series, value) = line.rsplit_once(' ').expect(line);
    let value = match value {
        "+Inf" => f64::INFINITY,
        value => value.parse().expect(line),
    };
    let Some((name, rest)) = series.split_once('{') else {
        return (series.to_owned(), Labels::new(), value);
    };
    let mut rest = rest.strip_suffix('}').expect(line);
    let mut labels = Labels::new();
    while !rest.is_empty() {
        let (label, quoted) = rest.split_once("=\"").expect(line);
        let end = quoted.find('"').expect(line);
        assert!(
            !quoted[..end].contains('\\'),
            "nothing here needs escapes: {line}"
        );
        let twice = labels.insert(label.to_owned(), quoted[..end].to_owned());
        assert!(twice.is_none(), "{line}");
        rest = &quoted[end + 1..];
        rest = rest.strip_prefix(',').unwrap_or(rest);
    }
    (name.to_owned(), labels, value)
}
