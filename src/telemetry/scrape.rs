//! Writes the Prometheus text format: families of the table with their help and type, each once and whole.

use std::fmt::Write as _;

use super::families::family;

/// A page under construction.
#[derive(Debug)]
pub struct Scrape(String);

impl Scrape {
    /// Goes on after what was written elsewhere.
    pub(super) fn new(text: String) -> Self {
        Self(text)
    }

    /// Begins a family of the table; its samples follow.
    pub fn family(&mut self, name: &'static str) -> Samples<'_> {
        if let Some(family) = family(name) {
            let (help, kind) = (family.help, family.kind.word());
            put(
                &mut self.0,
                format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"),
            );
        } else {
            debug_assert!(false, "{name} is not in the table");
        }
        Samples {
            text: &mut self.0,
            name,
        }
    }

    /// A family of one sample without labels.
    pub fn value(&mut self, name: &'static str, value: impl Into<f64>) {
        self.family(name).put(&[], value);
    }

    /// As [`Scrape::value`], for what is counted.
    #[expect(clippy::cast_precision_loss, reason = "as Prometheus counts")]
    pub fn count(&mut self, name: &'static str, count: usize) {
        self.value(name, count as f64);
    }

    /// A histogram: upper bounds, and what fell below each, then what is above all of them.
    pub(super) fn histogram(
        &mut self,
        name: &'static str,
        bounds: impl Iterator<Item = f64>,
        counts: &[u64],
        sum: f64,
    ) {
        let samples = self.family(name);
        let mut total = 0;
        for (bound, count) in bounds.chain([f64::INFINITY]).zip(counts) {
            total += count;
            let bound = if bound.is_finite() {
                bound.to_string()
            } else {
                "+Inf".to_owned()
            };
            put(
                samples.text,
                format_args!("{name}_bucket{{le=\"{bound}\"}} {total}\n"),
            );
        }
        put(
            samples.text,
            format_args!("{name}_sum {sum}\n{name}_count {total}\n"),
        );
    }

    /// The page.
    #[must_use]
    pub fn end(self) -> String {
        self.0
    }
}

/// The samples of one family.
#[derive(Debug)]
pub struct Samples<'a> {
    text: &'a mut String,
    name: &'static str,
}

impl Samples<'_> {
    /// Adds one.
    pub fn put(&mut self, labels: &[(&str, &str)], value: impl Into<f64>) -> &mut Self {
        self.text.push_str(self.name);
        for (number, (name, value)) in labels.iter().enumerate() {
            let open = if number == 0 { '{' } else { ',' };
            let value = value
                .replace('\\', "\\\\")
                .replace('"', "\\\"")
                .replace('\n', "\\n");
            put(self.text, format_args!("{open}{name}=\"{value}\""));
        }
        if !labels.is_empty() {
            self.text.push('}');
        }
        put(self.text, format_args!(" {}\n", value.into()));
        self
    }
}

fn put(text: &mut String, what: std::fmt::Arguments<'_>) {
    text.write_fmt(what).expect("a string takes everything");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_the_text_format() {
        let mut scrape = Scrape::new(String::new());
        scrape
            .family("drawbridge_accounts")
            .put(&[("status", "a\"b\\c\nd")], 1);
        scrape.value("drawbridge_ready", true);
        let text = scrape.end();
        let (accounts, ready) = text.split_once("# HELP drawbridge_ready ").unwrap();
        assert!(
            accounts.starts_with("# HELP drawbridge_accounts "),
            "{text}"
        );
        assert!(
            accounts.contains("\n# TYPE drawbridge_accounts gauge\n"),
            "{text}"
        );
        assert!(
            accounts.ends_with("\ndrawbridge_accounts{status=\"a\\\"b\\\\c\\nd\"} 1\n"),
            "{text}"
        );
        assert!(ready.ends_with("\ndrawbridge_ready 1\n"), "{text}");
    }
}
