//! Two kinds of plots as SVG.

use std::fmt::Write as _;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 260.0;
/// Around the plot: titles above, labels below, numbers at the left.
const MARGIN: f64 = 44.0;
const COLOURS: [&str; 2] = ["#9aa5b1", "#2563eb"];

/// Groups of bars.
pub(super) struct Bars {
    title: &'static str,
    groups: Vec<(String, Vec<(String, f64)>)>,
}

impl Bars {
    pub(super) fn new(title: &'static str) -> Self {
        Self {
            title,
            groups: Vec::new(),
        }
    }

    pub(super) fn group(&mut self, label: &str, bars: &[(&str, f64)]) {
        let bars = bars
            .iter()
            .map(|(name, value)| ((*name).to_owned(), *value));
        self.groups.push((label.to_owned(), bars.collect()));
    }

    #[expect(clippy::cast_precision_loss, reason = "a few bars")]
    pub(super) fn svg(&self) -> String {
        let values = self.groups.iter().flat_map(|(_, bars)| bars);
        let most = values.map(|(_, value)| *value).fold(1e-9, f64::max);
        let mut svg = begin(self.title);
        let room = (WIDTH - 2.0 * MARGIN) / self.groups.len().max(1) as f64;
        for (index, (label, bars)) in self.groups.iter().enumerate() {
            let left = MARGIN + room * index as f64;
            let wide = room * 0.7 / bars.len().max(1) as f64;
            text(&mut svg, left + room / 2.0, HEIGHT - 12.0, "middle", label);
            for (number, (name, value)) in bars.iter().enumerate() {
                let high = (HEIGHT - 2.0 * MARGIN) * value / most;
                let x = left + room * 0.15 + wide * number as f64;
                let y = HEIGHT - MARGIN - high;
                let colour = COLOURS[number % COLOURS.len()];
                let _infallible = writeln!(
                    svg,
                    r#"<rect x="{x:.1}" y="{y:.1}" width="{:.1}" height="{high:.1}" fill="{colour}"/>"#,
                    wide * 0.9
                );
                let middle = x + wide * 0.45;
                text(&mut svg, middle, y - 5.0, "middle", &number_of(*value));
                text(&mut svg, middle, HEIGHT - 29.0, "middle", name);
            }
        }
        svg + "</svg>\n"
    }
}

/// A curve over time.
pub(super) struct Line {
    pub(super) title: &'static str,
    pub(super) points: Vec<(f64, f64)>,
}

impl Line {
    pub(super) fn svg(&self) -> String {
        let most = |of: fn(&(f64, f64)) -> f64| self.points.iter().map(of).fold(1e-9, f64::max);
        let (right, top) = (most(|point| point.0), most(|point| point.1) * 1.1);
        let mut svg = begin(self.title);
        let place = |&(x, y): &(f64, f64)| {
            let x = MARGIN + (WIDTH - 2.0 * MARGIN) * x / right;
            let y = HEIGHT - MARGIN - (HEIGHT - 2.0 * MARGIN) * y / top;
            format!("{x:.1},{y:.1}")
        };
        let points: Vec<String> = self.points.iter().map(place).collect();
        let _infallible = writeln!(
            svg,
            r#"<polyline fill="none" stroke="{}" stroke-width="1.5" points="{}"/>"#,
            COLOURS[1],
            points.join(" ")
        );
        text(&mut svg, MARGIN - 6.0, MARGIN + 4.0, "end", &number_of(top));
        text(&mut svg, MARGIN - 6.0, HEIGHT - MARGIN, "end", "0");
        text(
            &mut svg,
            WIDTH - MARGIN,
            HEIGHT - 26.0,
            "end",
            &number_of(right),
        );
        svg + "</svg>\n"
    }
}

fn begin(title: &str) -> String {
    let mut svg = format!(
        r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">
<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>
<line x1="{MARGIN}" y1="{0}" x2="{1}" y2="{0}" stroke="black"/>
"#,
        HEIGHT - MARGIN,
        WIDTH - MARGIN
    );
    text(&mut svg, MARGIN, 20.0, "start", title);
    svg
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, text: &str) {
    let _infallible = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#
    );
}

fn number_of(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_bar_reaches_the_top_and_the_others_are_in_proportion() {
        let mut bars = Bars::new("t");
        bars.group("g", &[("a", 50.0), ("b", 100.0)]);
        let svg = bars.svg();
        for height in ["height=\"86.0\"", "height=\"172.0\""] {
            assert!(svg.contains(height), "{height}: {svg}");
        }
    }

    #[test]
    fn a_curve_begins_at_the_left_and_ends_at_the_right() {
        let line = Line {
            title: "t",
            points: vec![(0.0, 0.0), (10.0, 5.0)],
        };
        assert!(line.svg().contains("44.0,216.0 596.0,"), "{}", line.svg());
    }
}
