//! Curves as SVG, to stand in a page of HTML whose style sheet says their colours.
//!
//! ```text
//! up to 2 × BINS points   a line through all of them
//! more                    the mean of each bin as a line, from its smallest to its largest as a band
//! ```

use std::fmt::Write;

/// Bins of a curve with many points.
const BINS: usize = 240;

/// Up to so many points are shown one by one.
const DOTS_MAX: usize = 40;

/// Room for the labels of the axes, in the units of the picture.
const LEFT: f64 = 62.0;
const RIGHT: f64 = 22.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 40.0;

/// How values stand on the upright axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scale {
    /// From about the smallest to about the largest.
    Fitted,
    /// From zero.
    FromZero,
    /// By their logarithm. Values must be positive.
    Logarithmic,
}

/// A named curve.
pub(super) struct Curve {
    /// What it shows.
    pub(super) name: String,
    /// Steps, rising, with values.
    pub(super) points: Vec<(f64, f64)>,
}

/// Curves over the steps of a run.
pub(super) struct Plot {
    /// What is plotted.
    pub(super) title: &'static str,
    /// What it is measured in.
    pub(super) unit: &'static str,
    /// The curves.
    pub(super) curves: Vec<Curve>,
    /// How they are drawn.
    pub(super) scale: Scale,
    /// Width and height.
    pub(super) size: (f64, f64),
}

/// Neighbouring points as one: step, mean, smallest, largest.
struct Bin(f64, f64, f64, f64);

impl Curve {
    fn bins(&self) -> Vec<Bin> {
        let size = if self.points.len() > 2 * BINS { self.points.len().div_ceil(BINS) } else { 1 };
        let bin = |points: &[(f64, f64)]| {
            let mean = |of: fn(&(f64, f64)) -> f64| {
                points.iter().map(of).sum::<f64>() / points.len() as f64
            };
            let values = points.iter().map(|point| point.1);
            let (low, high) =
                (values.clone().fold(f64::MAX, f64::min), values.fold(f64::MIN, f64::max));
            Bin(mean(|point| point.0), mean(|point| point.1), low, high)
        };
        self.points.chunks(size).map(bin).collect()
    }
}

impl Plot {
    /// The picture; nothing if no curve has a value that can be shown.
    pub(super) fn svg(&self) -> Option<String> {
        let shown =
            |value: f64| value.is_finite() && (self.scale != Scale::Logarithmic || value > 0.0);
        let curves: Vec<Vec<Bin>> = self
            .curves
            .iter()
            .map(|curve| {
                let points = curve.points.iter().copied().filter(|point| shown(point.1)).collect();
                Curve { name: String::new(), points }.bins()
            })
            .collect();
        let frame = Frame::around(curves.iter().flatten(), self)?;
        let (width, height) = self.size;
        let mut svg = format!(
            "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{} over steps\">\n",
            escape(self.title)
        );
        frame.draw_axes(&mut svg, self.unit);
        for (index, bins) in curves.iter().enumerate() {
            frame.draw_curve(&mut svg, index, bins);
        }
        svg += "</svg>\n";
        Some(svg)
    }

    /// Values that cannot be shown: what is no number, infinite, or not positive on a logarithmic axis.
    pub(super) fn left_out(&self) -> usize {
        let is_shown =
            |value: f64| value.is_finite() && (self.scale != Scale::Logarithmic || value > 0.0);
        let points = self.curves.iter().flat_map(|curve| &curve.points);
        points.filter(|point| !is_shown(point.1)).count()
    }
}

/// Where steps and values are in a picture.
struct Frame {
    steps: (f64, f64),
    /// On the axis: logarithms, if it is logarithmic.
    values: (f64, f64),
    scale: Scale,
    size: (f64, f64),
}

impl Frame {
    fn around<'a>(bins: impl Iterator<Item = &'a Bin>, plot: &Plot) -> Option<Self> {
        let (mut steps, mut values) = ((f64::MAX, f64::MIN), (f64::MAX, f64::MIN));
        for Bin(step, _, low, high) in bins {
            steps = (steps.0.min(*step), steps.1.max(*step));
            values = (values.0.min(*low), values.1.max(*high));
        }
        if steps.0 > steps.1 {
            return None;
        }
        if steps.0 == steps.1 {
            steps = (steps.0 - 1.0, steps.1 + 1.0);
        }
        let (low, high) = match plot.scale {
            Scale::Fitted => values,
            Scale::FromZero => (values.0.min(0.0), values.1),
            Scale::Logarithmic => (values.0.log10(), values.1.log10()),
        };
        let margin = match high - low {
            0.0 => 0.1 * high.abs().max(1e-6),
            range => 0.04 * range,
        };
        let low = if plot.scale == Scale::FromZero && low == 0.0 { low } else { low - margin };
        Some(Frame { steps, values: (low, high + margin), scale: plot.scale, size: plot.size })
    }

    fn x(&self, step: f64) -> f64 {
        let (from, to) = self.steps;
        LEFT + (step - from) / (to - from) * (self.size.0 - LEFT - RIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        let value = if self.scale == Scale::Logarithmic { value.log10() } else { value };
        let (from, to) = self.values;
        TOP + (to - value) / (to - from) * (self.size.1 - TOP - BOTTOM)
    }

    fn draw_axes(&self, svg: &mut String, unit: &str) {
        let (width, height) = self.size;
        let (right, bottom) = (width - RIGHT, height - BOTTOM);
        for (value, label) in self.value_ticks() {
            let y = self.y(value);
            let _ = writeln!(
                svg,
                "<path class=\"grid\" d=\"M{LEFT} {y:.1}H{right}\"/><text class=\"end\" x=\"{:.1}\" \
                 y=\"{:.1}\">{label}</text>",
                LEFT - 7.0,
                y + 4.0
            );
        }
        let least = if self.steps.1 - self.steps.0 < 1.0 { 0.0 } else { 1.0 };
        for (step, label) in ticks(self.steps, width / 110.0, least) {
            let x = self.x(step);
            let _ = writeln!(
                svg,
                "<path class=\"axis\" d=\"M{x:.1} {bottom}v5\"/><text class=\"middle\" x=\"{x:.1}\" \
                 y=\"{:.1}\">{label}</text>",
                bottom + 18.0
            );
        }
        let middle = (TOP + bottom) / 2.0;
        let _ = writeln!(
            svg,
            "<path class=\"axis\" d=\"M{LEFT} {bottom}H{right}\"/><text class=\"middle\" x=\"{:.1}\" \
             y=\"{:.1}\">step</text><text class=\"middle\" transform=\"translate(13 {middle:.1}) \
             rotate(-90)\">{}</text>",
            (LEFT + right) / 2.0,
            height - 4.0,
            escape(unit)
        );
    }

    /// Ticks of the upright axis with their labels.
    fn value_ticks(&self) -> Vec<(f64, String)> {
        let (low, high) = self.values;
        if self.scale != Scale::Logarithmic || high - low < 0.5 {
            let range = match self.scale {
                Scale::Logarithmic => (10f64.powf(low), 10f64.powf(high)),
                _ => self.values,
            };
            return ticks(range, (self.size.1 - TOP - BOTTOM) / 34.0, 0.0);
        }
        let factors: &[f64] = if high - low > 2.5 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let mut found = Vec::new();
        for power in low.floor() as i32..=high.ceil() as i32 {
            for factor in factors {
                let value = factor * 10f64.powi(power);
                if (low..=high).contains(&value.log10()) {
                    found.push((value, label(value, value)));
                }
            }
        }
        found
    }

    fn draw_curve(&self, svg: &mut String, index: usize, bins: &[Bin]) {
        let class = format!("c{}{}", index % COLOURS, if index < COLOURS { "" } else { " dashed" });
        let point = |step: f64, value: f64| format!("{:.1},{:.1} ", self.x(step), self.y(value));
        if bins.iter().any(|Bin(_, _, low, high)| low < high) {
            let above = bins.iter().map(|&Bin(step, _, _, high)| point(step, high));
            let below = bins.iter().rev().map(|&Bin(step, _, low, _)| point(step, low));
            let edge: String = above.chain(below).collect();
            let _ =
                writeln!(svg, "<polygon class=\"band {class}\" points=\"{}\"/>", edge.trim_end());
        }
        let line: String = bins.iter().map(|&Bin(step, mean, ..)| point(step, mean)).collect();
        let _ = writeln!(svg, "<polyline class=\"{class}\" points=\"{}\"/>", line.trim_end());
        for &Bin(step, mean, ..) in bins.iter().filter(|_| bins.len() <= DOTS_MAX) {
            let (x, y) = (self.x(step), self.y(mean));
            let _ =
                writeln!(svg, "<circle class=\"{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\"/>");
        }
    }
}

/// Colours of the style sheet, `c0` onwards; further curves are dashed.
pub(super) const COLOURS: usize = 6;

/// About `count` round numbers in a range, `least` or more apart, with their labels.
fn ticks((low, high): (f64, f64), count: f64, least: f64) -> Vec<(f64, String)> {
    let rough = ((high - low) / count.max(2.0)).max(least);
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= rough * 0.999);
    let distance = factor.unwrap_or(10.0) * power;
    let numbers = (low / distance - 1e-9).ceil() as i64..=(high / distance + 1e-9).floor() as i64;
    numbers
        .map(|number| number as f64 * distance)
        .map(|value| (value, label(value, distance)))
        .collect()
}

/// A number as exact as `distance`, the one to its neighbours.
fn label(value: f64, distance: f64) -> String {
    let size = value.abs();
    let decimals = |distance: f64| (-distance.log10() - 1e-9).ceil().max(0.0) as usize;
    match size {
        0.0 => "0".into(),
        1e9.. => format!("{:.*}G", decimals(distance / 1e9), value / 1e9),
        1e6.. => format!("{:.*}M", decimals(distance / 1e6), value / 1e6),
        1e4.. => format!("{:.*}K", decimals(distance / 1e3), value / 1e3),
        _ if distance < 9e-4 && size < 1e-2 => {
            let power = 10f64.powf(size.log10().floor());
            format!("{:.*e}", decimals(distance / power), value).replace(".0e", "e")
        }
        _ => format!("{value:.*}", decimals(distance)),
    }
}

/// Text as it stands in HTML and SVG.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\'' => escaped += "&#39;",
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plot(values: impl IntoIterator<Item = f64>, scale: Scale) -> Plot {
        let points = (1..).map(f64::from).zip(values).collect();
        let curves = vec![Curve { name: "loss".into(), points }];
        Plot { title: "Loss", unit: "nats", curves, scale, size: (400.0, 200.0) }
    }

    fn check(range: (f64, f64), least: f64, expected: &[&str]) {
        let found: Vec<String> =
            ticks(range, 4.0, least).into_iter().map(|(_, text)| text).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn ticks_are_round_numbers() {
        check((2.9, 7.2), 0.0, &["4", "6"]);
        check((0.0, 1.04), 0.0, &["0", "0.5", "1.0"]);
        check((0.0, 0.00104), 0.0, &["0", "5e-4", "1e-3"]);
        check((0.0, 0.0031), 0.0, &["0", "0.001", "0.002", "0.003"]);
        check((1.0, 2010.0), 1.0, &["1000", "2000"]);
        check((1.0, 3.0), 1.0, &["1", "2", "3"]);
        check((0.0, 52_000.0), 0.0, &["0", "20K", "40K"]);
        check((5.14, 5.17), 0.0, &["5.14", "5.15", "5.16", "5.17"]);
    }

    #[test]
    fn points_stay_inside_the_axes() {
        for scale in [Scale::Fitted, Scale::FromZero, Scale::Logarithmic] {
            let plot = plot([9.0, 3.0, 0.02, 4.0], scale);
            let svg = plot.svg().unwrap();
            let line = svg.lines().find(|line| line.starts_with("<polyline")).unwrap();
            let points = line.split('"').nth(3).unwrap();
            for point in points.split(' ') {
                let (x, y) = point.split_once(',').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((LEFT..=400.0 - RIGHT).contains(&x), "{point}");
                assert!((TOP..=200.0 - BOTTOM).contains(&y), "{point}");
            }
        }
    }

    #[test]
    fn many_points_become_bins_with_a_band() {
        let few = plot((0..480).map(f64::from), Scale::Fitted).svg().unwrap();
        assert!(!few.contains("<polygon"));
        let many = plot((0..5000).map(f64::from), Scale::Fitted).svg().unwrap();
        assert!(many.contains("<polygon") && many.len() < 20_000);
    }

    #[test]
    fn what_is_no_number_is_counted_and_not_drawn() {
        let plot = plot([1.0, f64::NAN, f64::INFINITY, 2.0], Scale::Fitted);
        assert_eq!(plot.left_out(), 2);
        let svg = plot.svg().unwrap();
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
        assert_eq!(self::plot([f64::NAN], Scale::Fitted).svg(), None);
        assert_eq!(self::plot([], Scale::Logarithmic).svg(), None);
    }

    #[test]
    fn one_point_and_equal_points_can_be_drawn() {
        for values in [vec![2.0], vec![2.0, 2.0], vec![0.0, 0.0]] {
            let svg = plot(values, Scale::Fitted).svg().unwrap();
            assert!(!svg.contains("NaN"), "{svg}");
        }
    }

    #[test]
    fn markup_is_text() {
        assert_eq!(
            escape("<a href='x'>\"&\"</a>"),
            "&lt;a href=&#39;x&#39;&gt;&quot;&amp;&quot;&lt;/a&gt;"
        );
    }
}
