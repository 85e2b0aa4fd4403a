//! What tuning came to, in files and in words.

use super::{Class, Tune};
use crate::shell::plan::{count, seconds};
use crate::shell::report;
use crate::shell::terminal::show;
use anyhow::Result;
use headwater::eval::Scores;
use headwater::format::durable;
use headwater::train::StepReport;
use serde_json::json;

/// What tuning came to.
pub(super) struct Report {
    pub(super) first: StepReport,
    pub(super) last: StepReport,
    pub(super) held_out_loss: Option<f64>,
    pub(super) scores: Scores,
    pub(super) spent: f64,
}

impl Report {
    /// Writes `ledger.json` and `evaluation.json`, and prints.
    pub(super) fn close(&self, args: &Tune, class: &Class) -> Result<()> {
        let Report { first, last, held_out_loss, scores, spent } = self;
        let ledger = class.ledger();
        let counted = ledger.get("tune/used") + ledger.sum("tune/rejected/");
        let unknown = ledger.get("tune/rows").abs_diff(counted);
        let account = json!({ "unknown": unknown, "counts": ledger });
        let evaluation = json!({
            "held_out_loss": held_out_loss,
            "scores": scores,
            "loss_first": first.loss,
            "loss_last": last.loss,
            "steps": last.step,
        });
        durable::write(&args.out.join("ledger.json"), format!("{account:#}\n").as_bytes())?;
        durable::write(&args.out.join("evaluation.json"), format!("{evaluation:#}\n").as_bytes())?;
        let loss = held_out_loss.map_or("not asked for".into(), |loss| format!("{loss:.4}"));
        report::write(&args.out, &[("held-out loss", loss)])?;
        if args.machine.json {
            show!(
                "{:#}",
                json!({ "ledger": account, "evaluation": evaluation, "seconds": spent })
            )?;
            return Ok(());
        }
        show!(
            "tuned in {} steps, {} tokens and {}; loss {:.3} at the start, {:.3} at the end",
            last.step,
            count(last.tokens_total),
            seconds(*spent),
            first.loss,
            last.loss,
        )?;
        for (name, amount) in ledger.iter() {
            show!("  {amount:>9} {name}")?;
        }
        show!("  {unknown:>9} unknown")?;
        if let Some(loss) = held_out_loss {
            show!("held-out loss {loss:.4}")?;
        }
        if scores.texts > 0 {
            show!(
                "of {} held-out texts, {:.1} % got a pair, {:.2} on average; pairs F1 {:.3}, answer F1 {:.3}",
                scores.texts,
                100.0 * scores.texts_with_pairs as f64 / scores.texts as f64,
                scores.pairs as f64 / scores.texts as f64,
                scores.pairs_f1,
                scores.answer_f1,
            )?;
        }
        show!("the tuned model is in {}", args.out.join("model").display())?;
        Ok(())
    }
}
