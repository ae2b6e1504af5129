//! The tokens of one attempt, as upstream reported them.
//!
//! Reasoning tokens are inside `output`, cached tokens inside `input`: nothing is ever added twice. The attempts of a turn
//! are summed, because upstream charges each of them.

use std::iter::Sum;
use std::ops::{Add, AddAssign};

use serde_json::Value;

use super::lenient::whole;

/// Token counts. `cached_input <= input` and `reasoning <= output`; each is at most `i64::MAX`, so that it fits a column.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Input tokens, cached ones included.
    pub input: u64,
    /// Input tokens that were served from the prompt cache.
    pub cached_input: u64,
    /// Output tokens, reasoning included.
    pub output: u64,
    /// Output tokens that were spent on reasoning.
    pub reasoning: u64,
    /// What upstream calls the total; at least `input + output`.
    pub total: u64,
}

impl Usage {
    /// Reads a `usage` object of the Responses API, or of chat completions. Counts that are absent or no numbers read as 0;
    /// `None` where it is no object.
    pub fn parse(usage: &Value) -> Option<Self> {
        usage.as_object()?;
        let count = |pointers: &[&str]| {
            let found = pointers
                .iter()
                .find_map(|pointer| whole(usage.pointer(pointer)?));
            found.map(|count| count.max(0).unsigned_abs())
        };
        let input = count(&["/input_tokens", "/prompt_tokens"]).unwrap_or(0);
        let cached = count(&[
            "/input_tokens_details/cached_tokens",
            "/prompt_tokens_details/cached_tokens",
        ]);
        let reasoning = count(&[
            "/output_tokens_details/reasoning_tokens",
            "/completion_tokens_details/reasoning_tokens",
        ]);
        let output = count(&["/output_tokens", "/completion_tokens"])
            .or(reasoning)
            .unwrap_or(0);
        Some(Self {
            input,
            cached_input: cached.unwrap_or(0).min(input),
            output,
            reasoning: reasoning.unwrap_or(0).min(output),
            total: count(&["/total_tokens"])
                .unwrap_or(0)
                .max(cap(input.saturating_add(output))),
        })
    }
}

/// The largest count that a signed 64-bit column holds.
fn cap(count: u64) -> u64 {
    count.min(i64::MAX.unsigned_abs())
}

impl Add for Usage {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        let sum = |a: u64, b: u64| cap(a.saturating_add(b));
        Self {
            input: sum(self.input, other.input),
            cached_input: sum(self.cached_input, other.cached_input),
            output: sum(self.output, other.output),
            reasoning: sum(self.reasoning, other.reasoning),
            total: sum(self.total, other.total),
        }
    }
}

impl AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(attempts: I) -> Self {
        attempts.fold(Self::default(), Self::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn usage(input: u64, cached_input: u64, output: u64, reasoning: u64, total: u64) -> Usage {
        Usage {
            input,
            cached_input,
            output,
            reasoning,
            total,
        }
    }

    #[test]
    fn every_spelling_is_clamped_to_something_billable() {
        let cases = [
            (
                json!({"input_tokens": 100, "input_tokens_details": {"cached_tokens": 40}, "output_tokens": 20,
                       "output_tokens_details": {"reasoning_tokens": 5}, "total_tokens": 120}),
                Some(usage(100, 40, 20, 5, 120)),
            ),
            (
                json!({"prompt_tokens": 7, "completion_tokens": 3}),
                Some(usage(7, 0, 3, 0, 10)),
            ),
            (
                json!({"input_tokens": 10, "input_tokens_details": {"cached_tokens": 11}}),
                Some(usage(10, 10, 0, 0, 10)),
            ),
            (
                json!({"output_tokens_details": {"reasoning_tokens": 9}}),
                Some(usage(0, 0, 9, 9, 9)),
            ),
            (
                json!({"output_tokens": 4, "output_tokens_details": {"reasoning_tokens": 9}}),
                Some(usage(0, 0, 4, 4, 4)),
            ),
            (
                json!({"input_tokens": "12", "output_tokens": true}),
                Some(usage(12, 0, 0, 0, 12)),
            ),
            (
                json!({"input_tokens": -5, "output_tokens": 1, "total_tokens": 900}),
                Some(usage(0, 0, 1, 0, 900)),
            ),
            (
                json!({"input_tokens": null, "input_tokens_details": null}),
                Some(Usage::default()),
            ),
            (json!({}), Some(Usage::default())),
            (json!(null), None),
            (json!([1]), None),
        ];
        for (json, expected) in cases {
            assert_eq!(Usage::parse(&json), expected, "{json}");
        }
    }

    #[test]
    fn attempts_add_up_and_never_overflow() {
        let attempts = [usage(1, 2, 3, 4, 5), usage(10, 20, 30, 40, 50)];
        assert_eq!(
            attempts.into_iter().sum::<Usage>(),
            usage(11, 22, 33, 44, 55)
        );
        let most = i64::MAX.unsigned_abs();
        let mut sum = usage(most, 0, u64::MAX, 0, 1);
        sum += usage(1, 0, 1, 0, 0);
        assert_eq!(sum, usage(most, 0, most, 0, 1));
    }
}
