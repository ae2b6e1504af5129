//! What operators decide about the choice: the strategy, the weights of plans, the cap.

use std::{fmt, str::FromStr};

use serde::Serialize;

use super::limits::{PLANS, plan_weight};

/// Which of the accounts that could serve a turn does, where no conversation prefers one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Each in proportion to what is left of it.
    #[default]
    Capacity,
    /// The one whose quota would expire unused first.
    SoonestReset,
    /// The one that has waited longest.
    RoundRobin,
}

impl Strategy {
    /// Every strategy.
    pub const ALL: [Self; 3] = [Self::Capacity, Self::SoonestReset, Self::RoundRobin];

    /// The word in settings, in JSON and in texts.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Capacity => "capacity",
            Self::SoonestReset => "soonest-reset",
            Self::RoundRobin => "round-robin",
        }
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Strategy {
    type Err = UnknownStrategy;

    fn from_str(text: &str) -> Result<Self, UnknownStrategy> {
        let mut all = Self::ALL.into_iter();
        all.find(|strategy| strategy.as_str() == text)
            .ok_or(UnknownStrategy)
    }
}

/// A word that names no [`Strategy`].
#[derive(Debug, thiserror::Error)]
#[error("unknown routing strategy")]
pub struct UnknownStrategy;

/// How a replica chooses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Policy {
    /// The strategy.
    pub strategy: Strategy,
    /// Turns of one replica at one account at once; none = any number.
    pub turns_per_account: Option<u32>,
}

/// The sizes of the plans' windows relative to `plus`, where the operator knows better.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Weights(Vec<(String, f64)>);

impl Weights {
    /// The size of a plan.
    #[must_use]
    pub fn of(&self, plan: &str) -> f64 {
        let mut ours = self.0.iter();
        ours.find(|(name, _)| name == plan)
            .map_or_else(|| plan_weight(plan), |(_, weight)| *weight)
    }
}

impl FromStr for Weights {
    type Err = BadWeights;

    /// Reads `pro=6,free=0.2`; of nothing nothing.
    fn from_str(text: &str) -> Result<Self, BadWeights> {
        let pairs = text
            .split(',')
            .map(str::trim)
            .filter(|pair| !pair.is_empty());
        let weight = |pair: &str| {
            let (plan, weight) = pair.split_once('=').ok_or(BadWeights)?;
            let weight: f64 = weight.trim().parse().map_err(|_| BadWeights)?;
            let plan = plan.trim().to_ascii_lowercase();
            let known = PLANS.iter().any(|(name, _)| *name == plan);
            if known && (0.001..=1_000.0).contains(&weight) {
                Ok((plan, weight))
            } else {
                Err(BadWeights)
            }
        };
        pairs.map(weight).collect::<Result<_, _>>().map(Self)
    }
}

/// Text that is no list of plans and weights.
#[derive(Debug, thiserror::Error)]
#[error("no list of plans and weights")]
pub struct BadWeights;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_are_the_listed_ones_unless_the_operator_says_otherwise() {
        let weights: Weights = " Pro=10, free = 0.5 ,".parse().unwrap();
        for (plan, weight) in [("pro", 10.0), ("free", 0.5), ("plus", 1.0), ("gold", 1.0)] {
            assert_eq!(weights.of(plan), weight, "{plan}");
        }
        assert_eq!(Weights::default().of("pro"), plan_weight("pro"));
        for wrong in ["pro", "pro=", "pro=0", "pro=nan", "pro=1e9", "gold=2", "=2"] {
            assert!(wrong.parse::<Weights>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_strategy_reads_as_it_is_written() {
        for strategy in Strategy::ALL {
            assert_eq!(strategy.to_string().parse::<Strategy>().unwrap(), strategy);
        }
        assert!("best".parse::<Strategy>().is_err());
    }
}
