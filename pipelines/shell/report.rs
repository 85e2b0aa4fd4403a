//! `report.html` in the run folder: what a training came to, on one page that needs nothing else.

use super::metrics::{self, Line, OfPart, Totals};
use super::plan::{bytes, count};
use super::plot::{COLOURS, Curve, Plot, Scale, escape};
use anyhow::Result;
use headwater::format::durable;
use headwater::train::held_out::Evaluation;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

/// Colours of both schemes, and how curves are drawn. Nothing is loaded from anywhere.
const STYLE: &str = include_str!("report.css");

/// Sizes of the pictures.
const WIDE: (f64, f64) = (940.0, 340.0);
const NARROW: (f64, f64) = (460.0, 210.0);

/// Writes the report of a run that trained; `figures` are its closing account. Does nothing for a run that did
/// not train.
///
/// # Errors
/// If the run folder cannot be read or written.
pub fn write(run: &Path, figures: &[(&str, String)]) -> Result<()> {
    let lines = metrics::lines(run)?;
    let Some(totals) = Totals::of(&lines) else { return Ok(()) };
    let evaluations = metrics::values(&run.join("eval.jsonl"))?;
    let evaluations: Vec<Evaluation> =
        evaluations.into_iter().map(serde_json::from_value).collect::<Result<_, _>>()?;
    let configuration = std::fs::read_to_string(run.join("run.json")).unwrap_or_default();
    let name = run.file_name().unwrap_or(run.as_os_str()).to_string_lossy();
    let page = Page {
        name: &name,
        figures: [training(&lines, &totals), figures.to_vec()].concat(),
        plots: plots(&lines, &evaluations),
        configuration: &configuration,
    };
    durable::write(&run.join("report.html"), page.html().as_bytes())?;
    Ok(())
}

/// The figures of the training.
fn training(lines: &[Line], totals: &Totals) -> Vec<(&'static str, String)> {
    let (first, last) = (&lines[0].report, &lines[lines.len() - 1].report);
    let mfu = match (totals.mfu, totals.peak_operations_per_s) {
        (Some(mfu), Some(peak)) => format!(
            "{:.1} % of {:.1} Gop/s, the peak of the device; operations by appendix B of Chowdhery et al., 2022",
            100.0 * mfu,
            peak / 1e9
        ),
        _ => "not known: the peak of the device is not".into(),
    };
    let memory = match totals.device_memory_bytes {
        Some(device) => {
            format!("{} of the GPUs, {} of the host", bytes(device), bytes(totals.memory_bytes))
        }
        None => bytes(totals.memory_bytes),
    };
    vec![
        (
            "loss",
            format!(
                "{:.4} nats at step {}, {:.4} at step {}",
                first.loss, first.step, last.loss, last.step
            ),
        ),
        (
            "learned from",
            format!("{} sequences, {} tokens", count(last.next_sequence), count(last.tokens_total)),
        ),
        ("speed", format!("{:.0} tokens/s", totals.tokens_per_s)),
        ("MFU", mfu),
        (
            "waiting",
            format!(
                "{:.1} % of the time for sequences, {:.1} % for evaluation and checkpoints",
                100.0 * totals.data_wait_share,
                100.0 * totals.overhead_share
            ),
        ),
        ("peak memory", memory),
    ]
}

fn plots(lines: &[Line], evaluations: &[Evaluation]) -> Vec<Plot> {
    let curve = |name: &str, of: fn(&Line) -> Option<f64>| {
        let point = |line: &Line| Some((line.report.step as f64, of(line)?));
        Curve { name: name.into(), points: lines.iter().filter_map(point).collect() }
    };
    let one = |title, unit, scale, of: fn(&Line) -> Option<f64>| Plot {
        title,
        unit,
        curves: vec![curve(title, of)],
        scale,
        size: NARROW,
    };
    let mut sources = Parts::new();
    for Evaluation { step, source, loss, .. } in evaluations {
        sources.entry(source.clone()).or_default().push((*step as f64, loss.unwrap_or(f64::NAN)));
    }
    let by_part = |title, parts: Parts| {
        let curve = |(name, points)| Curve { name, points };
        let curves = parts.into_iter().map(curve).collect();
        Plot { title, unit: "nats per token", curves, scale: Scale::Fitted, size: WIDE }
    };
    let round = |name: &str| format!("round {name}");
    let loss = one("Loss", "nats per token", Scale::Fitted, |line| Some(line.report.loss));
    vec![
        Plot { size: WIDE, ..loss },
        by_part("Loss by source", parts(lines, |line| &line.sources, str::to_owned)),
        by_part("Loss by round", parts(lines, |line| &line.rounds, round)),
        by_part("Held-out loss", sources),
        one("Learning rate", "rate", Scale::FromZero, |line| Some(line.report.lr)),
        one("Gradient norm", "norm before clipping", Scale::Logarithmic, |line| {
            Some(line.report.grad_norm)
        }),
        one("Speed", "tokens/s", Scale::FromZero, |line| Some(line.measured.tokens_per_s)),
        one("Waiting for sequences", "% of the time", Scale::FromZero, |line| {
            Some(100.0 * line.measured.data_wait_share)
        }),
    ]
}

/// The points of curves, by their names.
type Parts = BTreeMap<String, Vec<(f64, f64)>>;

/// The losses of parts of the tokens, each part under what `name` makes of its own.
fn parts(
    lines: &[Line],
    of: impl Fn(&Line) -> &BTreeMap<String, OfPart>,
    name: impl Fn(&str) -> String,
) -> Parts {
    let mut parts = Parts::new();
    for line in lines {
        for (own, OfPart { loss, .. }) in of(line) {
            let point = (line.report.step as f64, loss.unwrap_or(f64::NAN));
            parts.entry(name(own)).or_default().push(point);
        }
    }
    parts
}

struct Page<'a> {
    name: &'a str,
    figures: Vec<(&'a str, String)>,
    plots: Vec<Plot>,
    configuration: &'a str,
}

impl Page<'_> {
    fn html(&self) -> String {
        let mut rows = String::new();
        for (name, value) in &self.figures {
            let _ = writeln!(rows, "<tr><th>{}</th><td>{}</td></tr>", escape(name), escape(value));
        }
        let figures: String = self.plots.iter().filter_map(figure).collect();
        let name = escape(self.name);
        format!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src \
             'unsafe-inline'\">\n<meta name=\"viewport\" content=\"width=device-width\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>{name}: Headwater</title>\n\
             <style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{name}</h1>\n<div class=\"plots\">\n{figures}</div>\n\
             <table>\n{rows}</table>\n<details><summary>Configuration</summary><pre>{}</pre></details>\n\
             </body>\n</html>\n",
            escape(self.configuration)
        )
    }
}

/// A picture with its title and, if it has several curves, what they are.
fn figure(plot: &Plot) -> Option<String> {
    let svg = plot.svg()?;
    let class = if plot.size == WIDE { "wide" } else { "narrow" };
    let mut caption = escape(plot.title);
    for (index, curve) in
        plot.curves.iter().enumerate().filter(|(_, curve)| curve.name != plot.title)
    {
        let dashed = if index < COLOURS { "" } else { " dashed" };
        let last = curve.points.last().map_or(f64::NAN, |point| point.1);
        let _ = write!(
            caption,
            " <span class=\"key\"><svg viewBox=\"0 0 22 8\"><path class=\"c{}{dashed}\" d=\"M1 4H21\"/></svg>\
             {} {last:.4}</span>",
            index % COLOURS,
            escape(&curve.name)
        );
    }
    let left_out = match plot.left_out() {
        0 => String::new(),
        count => format!("<p>{count} values are no numbers that can be shown.</p>\n"),
    };
    Some(format!(
        "<figure class=\"{class}\">\n<figcaption>{caption}</figcaption>\n{svg}{left_out}</figure>\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn run(steps: u64, evaluations: &str) -> tempfile::TempDir {
        let run = tempfile::tempdir().unwrap();
        let mut lines = String::new();
        for step in 1..=steps {
            let line = json!({
                "step": step, "loss": 9.0 / step as f64, "grad_norm": 1.0, "lr": 1e-3, "tokens": 64,
                "learned": 60, "tokens_total": 64 * step, "next_sequence": step, "skipped_total": 0,
                "rounds": { "0": { "loss": 2.5, "learned": 9 }, "1": { "loss": 1.5, "learned": 9 } },
                "step_ms": 4.0, "tokens_per_s": 16000.0, "mfu": 0.25, "peak_operations_per_s": 2e11,
            });
            writeln!(lines, "{line}").unwrap();
        }
        std::fs::write(run.path().join("metrics.jsonl"), lines).unwrap();
        std::fs::write(run.path().join("run.json"), "{\"model\": \"<script>\"}").unwrap();
        if !evaluations.is_empty() {
            std::fs::write(run.path().join("eval.jsonl"), evaluations).unwrap();
        }
        run
    }

    fn report(run: &tempfile::TempDir) -> String {
        write(run.path(), &[("read", "5 records & <more>".into())]).unwrap();
        std::fs::read_to_string(run.path().join("report.html")).unwrap()
    }

    #[test]
    fn a_report_needs_nothing_else_and_text_in_it_is_text() {
        let line = json!({ "step": 2, "source": "<b>web</b>", "loss": 4.5, "perplexity": 90.0, "tokens": 9 });
        let page = report(&run(3, &format!("{line}\n")));
        for text in ["http://", "https://", "src=", "<script", "<b>", "& <more>"] {
            assert!(!page.contains(text), "{text}");
        }
        for text in [
            "Held-out loss",
            "Loss by round",
            "round 1 1.5000",
            "&lt;b&gt;web&lt;/b&gt; 4.5000",
            "&lt;script&gt;",
            "25.0 % of 200.0 Gop/s",
        ] {
            assert!(page.contains(text), "{text}");
        }
        assert_eq!(page.matches("<figure").count(), 7);
    }

    #[test]
    fn a_report_without_held_out_losses_has_no_picture_of_them() {
        assert!(!report(&run(3, "")).contains("Held-out"));
    }

    #[test]
    fn a_run_that_did_not_train_has_no_report() {
        let run = run(0, "");
        write(run.path(), &[]).unwrap();
        assert!(!run.path().join("report.html").exists());
    }
}
