//! What tokens cost at list price: the value a pool delivers, not a bill of a subscription.
//!
//! The prices are data (`prices.json`, US dollars per million tokens, compiled in). A model is found by its exact name, or by its name and
//! one suffix of the list: there is no catch-all, so a model that is not in the table is unpriced, never priced wrongly. All arithmetic is
//! in integers.

use std::{collections::HashMap, sync::LazyLock};

use serde::{Deserialize, Deserializer, de::Error as _};

use crate::protocol::usage::Usage;

/// The service tier that upstream billed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tier {
    /// `default`, `auto`, or not named.
    #[default]
    Standard,
    /// `priority`, which clients call `fast`.
    Priority,
    /// `flex`.
    Flex,
    /// A tier whose prices are not known.
    Other,
}

impl Tier {
    /// Reads `service_tier`: upstream's answer where it has one, else the request's.
    #[must_use]
    pub fn parse(name: Option<&str>) -> Self {
        match name {
            None | Some("" | "auto" | "default") => Self::Standard,
            Some("priority" | "fast") => Self::Priority,
            Some("flex") => Self::Flex,
            Some(_) => Self::Other,
        }
    }
}

/// The price of one attempt in nano-dollars; `None` where the model or the tier has no known price.
#[must_use]
pub fn cost(model: &str, tier: Tier, usage: &Usage) -> Option<i64> {
    TABLE.cost(model, tier, usage)
}

/// Every model that is listed by name.
pub(super) fn models() -> impl Iterator<Item = &'static str> {
    TABLE.models.keys().map(String::as_str)
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    serde_json::from_str(include_str!("prices.json"))
        .expect("the table is part of the program and read by its tests")
});

#[derive(Deserialize)]
struct Table {
    long_context: LongContext,
    suffixes: Vec<String>,
    #[serde(deserialize_with = "by_name")]
    models: HashMap<String, Prices>,
}

/// Applies to a whole request as soon as its input is longer than the limit.
#[derive(Deserialize)]
struct LongContext {
    above_input_tokens: u64,
    input_percent: u128,
    output_percent: u128,
}

#[derive(Clone, Deserialize)]
struct Prices {
    standard: Rates,
    priority: Option<Rates>,
    flex: Option<Rates>,
    /// Whether a long context costs more, except at priority.
    #[serde(default)]
    long_context: bool,
}

#[derive(Clone, Copy, Deserialize)]
struct Rates {
    input: Rate,
    /// Of cached input; that of input where it is not named.
    cached: Option<Rate>,
    output: Rate,
}

/// Pico-dollars per token: a million of them is a dollar per million tokens, so listed prices are whole numbers.
#[derive(Clone, Copy)]
struct Rate(u128);

impl Table {
    fn cost(&self, model: &str, tier: Tier, usage: &Usage) -> Option<i64> {
        let prices = self.find(&model.to_ascii_lowercase())?;
        let rates = match tier {
            Tier::Standard => prices.standard,
            Tier::Priority => prices.priority.unwrap_or(prices.standard),
            Tier::Flex => prices.flex.unwrap_or(prices.standard),
            Tier::Other => return None,
        };
        let long = prices.long_context
            && tier != Tier::Priority
            && usage.input > self.long_context.above_input_tokens;
        let (input_percent, output_percent) = if long {
            (
                self.long_context.input_percent,
                self.long_context.output_percent,
            )
        } else {
            (100, 100)
        };
        let cached = usage.cached_input.min(usage.input);
        let input = u128::from(usage.input - cached) * rates.input.0
            + u128::from(cached) * rates.cached.unwrap_or(rates.input).0;
        let output = u128::from(usage.output) * rates.output.0;
        // Percent of pico-dollars to nano-dollars, rounded to the nearest.
        let nano = (input * input_percent + output * output_percent + 50_000) / 100_000;
        Some(i64::try_from(nano).unwrap_or(i64::MAX))
    }

    fn find(&self, model: &str) -> Option<&Prices> {
        self.models.get(model).or_else(|| {
            self.suffixes
                .iter()
                .find_map(|suffix| self.models.get(model.strip_suffix(suffix.as_str())?))
        })
    }
}

fn by_name<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<HashMap<String, Prices>, D::Error> {
    #[derive(Deserialize)]
    struct Entry {
        names: Vec<String>,
        #[serde(flatten)]
        prices: Prices,
    }
    let mut models = HashMap::new();
    for entry in Vec::<Entry>::deserialize(deserializer)? {
        for name in entry.names {
            if let Some(twice) = models
                .insert(name.clone(), entry.prices.clone())
                .and(Some(name))
            {
                return Err(D::Error::custom(format_args!("{twice} is listed twice")));
            }
        }
    }
    Ok(models)
}

impl<'de> Deserialize<'de> for Rate {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to be a small whole number"
    )]
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let pico = f64::deserialize(deserializer)? * 1e6;
        if (0.0..1e12).contains(&pico) && (pico - pico.round()).abs() < 1e-3 {
            Ok(Self(pico.round() as u128))
        } else {
            Err(D::Error::custom(
                "a price is 0 to 1,000,000 dollars with at most six decimals",
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(input: u64, cached_input: u64, output: u64) -> Usage {
        Usage {
            input,
            cached_input,
            output,
            ..Usage::default()
        }
    }

    #[test]
    fn an_attempt_costs_what_the_list_says() {
        use Tier::{Flex, Other, Priority, Standard};
        const M: u64 = 1_000_000;
        let cases = [
            // A million of each at the listed dollars; cached input is part of input.
            ("gpt-5.4-mini", Standard, usage(M, 0, 0), Some(750_000_000)),
            ("gpt-5.4-mini", Standard, usage(M, M, 0), Some(75_000_000)),
            ("gpt-5.4-mini", Flex, usage(M, M, 0), Some(37_500_000)),
            (
                "gpt-5.4-mini",
                Standard,
                usage(0, 0, M),
                Some(4_500_000_000),
            ),
            (
                "gpt-5.2",
                Standard,
                usage(1000, 400, 100),
                Some(1_050_000 + 70_000 + 1_400_000),
            ),
            // More cached than sent counts as all cached.
            ("gpt-5.2", Standard, usage(10, 11, 0), Some(1_750)),
            // No price of cached input: that of input.
            ("gpt-5.5-pro", Standard, usage(10, 10, 0), Some(300_000)),
            // The limit itself is not above the limit; beyond it the whole request costs more.
            (
                "gpt-5.6-sol",
                Standard,
                usage(272_000, 0, 10),
                Some(1_360_300_000),
            ),
            (
                "gpt-5.6-sol",
                Standard,
                usage(272_001, 0, 10),
                Some(2_720_010_000 + 450_000),
            ),
            (
                "gpt-5.6-sol",
                Flex,
                usage(272_001, 272_001, 10),
                Some(136_000_500 + 225_000),
            ),
            (
                "gpt-5.6-sol",
                Priority,
                usage(272_001, 0, 0),
                Some(2_720_010_000),
            ),
            (
                "gpt-5.5",
                Standard,
                usage(272_001, 0, 0),
                Some(1_360_005_000),
            ),
            // A tier that the model does not list costs the standard; a tier that nobody knows is unpriced.
            ("gpt-5.4-mini", Priority, usage(M, 0, 0), Some(750_000_000)),
            ("gpt-5.4-mini", Other, usage(M, 0, 0), None),
            // Names: any case, one listed suffix, listed aliases, nothing else.
            ("GPT-5.2-High", Standard, usage(1, 0, 0), Some(1_750)),
            ("gpt-5.6", Standard, usage(1, 0, 0), Some(5_000)),
            ("gpt-5.2-high-low", Standard, usage(1, 0, 0), None),
            ("gpt-5.7", Standard, usage(1, 0, 0), None),
            ("gpt-5.3-codex-spark", Standard, usage(1, 0, 0), None),
            ("", Standard, usage(1, 0, 0), None),
            // Half a nano-dollar rounds up; nothing overflows.
            ("gpt-5.4-mini", Flex, usage(1, 1, 0), Some(38)),
            (
                "gpt-5.5",
                Standard,
                usage(u64::MAX, 0, u64::MAX),
                Some(i64::MAX),
            ),
        ];
        for (model, tier, usage, expected) in cases {
            assert_eq!(
                cost(model, tier, &usage),
                expected,
                "{model} {tier:?} {usage:?}"
            );
        }
    }

    /// Dollars for a million tokens: of input, of cached input, of output.
    fn dollars(model: &str, tier: Tier, input: u64) -> [f64; 3] {
        const M: u64 = 1_000_000;
        let nano = |usage| cost(model, tier, &usage).unwrap_or(-1) as f64;
        let scale = M as f64 / input as f64 / 1e9;
        let beside = nano(usage(input, 0, 0));
        [
            beside * scale,
            nano(usage(input, input, 0)) * scale,
            (nano(usage(input, 0, M)) - beside) / 1e9,
        ]
    }

    #[test]
    fn the_table_rows_hold_at_standard_priority_flex_and_long_context() {
        use Tier::{Flex, Priority, Standard};
        let (short, long) = (272_000, 272_001);
        for (model, tier, input, listed) in [
            ("gpt-5.6-sol", Standard, short, [5.0, 0.5, 30.0]),
            ("gpt-5.6-sol", Priority, long, [10.0, 1.0, 60.0]),
            ("gpt-5.6-sol", Flex, short, [2.5, 0.25, 15.0]),
            ("gpt-5.6-sol", Standard, long, [10.0, 1.0, 45.0]),
            ("gpt-5.6-sol", Flex, long, [5.0, 0.5, 22.5]),
            ("gpt-5.6-terra", Standard, long, [4.0, 0.4, 18.0]),
            ("gpt-5.6-luna", Standard, long, [0.4, 0.04, 1.8]),
            ("gpt-5.5", Priority, short, [12.5, 1.25, 75.0]),
            ("gpt-5.5", Standard, long, [5.0, 0.5, 30.0]),
            ("gpt-5.5-pro", Flex, short, [15.0, 15.0, 90.0]),
            ("gpt-5.4", Standard, long, [5.0, 0.5, 22.5]),
            ("gpt-5.4", Priority, short, [5.0, 0.5, 30.0]),
            ("gpt-5.4-nano", Flex, short, [0.1, 0.01, 0.625]),
            ("gpt-5.4-pro", Standard, long, [60.0, 60.0, 270.0]),
            ("gpt-5.3-codex", Priority, short, [3.5, 0.35, 28.0]),
            ("gpt-5.2", Priority, short, [3.5, 0.35, 28.0]),
            ("gpt-5.2", Flex, short, [0.875, 0.0875, 7.0]),
            ("gpt-5.1", Priority, short, [2.5, 0.25, 20.0]),
            ("gpt-5-codex", Standard, short, [1.25, 0.125, 10.0]),
            ("gpt-5.1-codex-mini", Standard, short, [0.25, 0.025, 2.0]),
        ] {
            for (got, listed) in dollars(model, tier, input).into_iter().zip(listed) {
                let off = (got - listed).abs();
                assert!(
                    off < 1e-6,
                    "{model} {tier:?} {input}: {got} instead of {listed}"
                );
            }
        }
    }

    #[test]
    fn tiers_are_read_as_upstream_writes_them() {
        for (name, tier) in [
            (None, Tier::Standard),
            (Some("default"), Tier::Standard),
            (Some("fast"), Tier::Priority),
            (Some("priority"), Tier::Priority),
            (Some("flex"), Tier::Flex),
            (Some("scale"), Tier::Other),
        ] {
            assert_eq!(Tier::parse(name), tier, "{name:?}");
        }
    }
}
