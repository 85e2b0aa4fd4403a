//! Held-out texts in words.

use super::plan::count;
use headwater::ledger::Ledger;
use headwater::train::held_out::{Evaluation, HeldOut};

/// What is measured, and how often.
pub(crate) fn describe(held_out: &HeldOut, every: u64) -> String {
    if held_out.is_empty() {
        return "nothing".into();
    }
    let ledger = held_out.ledger();
    let source = |(name, documents): (&str, u64)| {
        let tokens = count(ledger.get(&format!("held_out/tokens/{name}")));
        format!("{name}: {} documents, {tokens} tokens", count(documents))
    };
    let sources: Vec<String> = ledger.under("held_out/documents/").map(source).collect();
    format!("{}; every {every} steps{}", sources.join("; "), describe_rejected(&ledger))
}

/// What was read to be held out and cannot be used; nothing if all can.
pub(crate) fn describe_rejected(ledger: &Ledger) -> String {
    let reason = |(reason, amount): (&str, u64)| format!("{reason} {amount}");
    let reasons: Vec<String> = ledger.under("held_out/rejected/").map(reason).collect();
    match ledger.sum("held_out/rejected/") {
        0 => String::new(),
        all => format!("; {all} records rejected ({})", reasons.join(", ")),
    }
}

/// What was measured last.
pub(crate) fn describe_evaluations(evaluations: &[Evaluation]) -> String {
    let number =
        |value: Option<f64>| value.map_or("not finite".into(), |value| format!("{value:.3}"));
    let source = |found: &Evaluation| {
        let (loss, perplexity) = (number(found.loss), number(found.perplexity));
        format!("{} loss {loss}, perplexity {perplexity}", found.source)
    };
    let sources: Vec<String> = evaluations.iter().map(source).collect();
    sources.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_reads_well() {
        let found = |source: &str, loss| Evaluation {
            step: 7,
            source: source.into(),
            loss,
            perplexity: loss.map(f64::exp),
            tokens: 1,
        };
        let said = describe_evaluations(&[found("web", Some(2.0)), found("books", None)]);
        assert_eq!(
            said,
            "web loss 2.000, perplexity 7.389; books loss not finite, perplexity not finite"
        );
        let mut ledger = Ledger::default();
        assert_eq!(describe_rejected(&ledger), "");
        ledger.add("held_out/rejected/no_text", 2);
        ledger.add("held_out/rejected/malformed_json", 1);
        let expected = "; 3 records rejected (malformed_json 1, no_text 2)";
        assert_eq!(describe_rejected(&ledger), expected);
    }
}
