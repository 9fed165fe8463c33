//! Line charts as SVG.

use std::fmt::Write;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 190.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 56.0;

/// Told apart also by those who see no red or no green (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"];

/// A line.
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) points: Vec<(f64, f64)>,
}

/// A chart; both axes are logarithmic, the vertical one if asked.
pub(crate) struct Chart {
    pub(crate) title: &'static str,
    pub(crate) across: &'static str,
    pub(crate) up: &'static str,
    pub(crate) is_log_up: bool,
    pub(crate) series: Vec<Series>,
}

/// One axis: values to a place between two pixels.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
    is_log: bool,
}

impl Axis {
    fn place(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.is_log { value.max(f64::MIN_POSITIVE).log10() } else { value };
        let (low, high) = (scale(self.low), scale(self.high));
        let share = if high > low { (scale(value) - low) / (high - low) } else { 0.5 };
        self.from + share * (self.to - self.from)
    }

    /// Where lines are drawn: powers of ten, or fifths.
    fn ticks(&self) -> Vec<f64> {
        if !self.is_log {
            return (0..=5).map(|fifth| self.low + (self.high - self.low) * f64::from(fifth) / 5.0).collect();
        }
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let all = (first..=last).flat_map(|power| [1.0, 3.0].map(|step| step * 10_f64.powi(power)));
        all.filter(|tick| (self.low * 0.99..=self.high * 1.01).contains(tick)).collect()
    }
}

impl Chart {
    /// `None` when there is nothing to draw.
    pub(crate) fn svg(&self) -> Option<String> {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let bounds = |values: Vec<f64>| {
            let low = values.iter().copied().fold(f64::INFINITY, f64::min);
            (low, values.iter().copied().fold(f64::NEG_INFINITY, f64::max))
        };
        points().next()?;
        let (left, right) = bounds(points().map(|point| point.0).collect());
        let (low, high) = bounds(points().map(|point| point.1).collect());
        let across = Axis { low: left, high: right, from: LEFT, to: WIDTH - RIGHT, is_log: true };
        let low = if self.is_log_up { low } else { 0.0 };
        let up = Axis { low, high, from: HEIGHT - BOTTOM, to: TOP, is_log: self.is_log_up };
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
             <text x=\"{LEFT}\" y=\"22\" font-size=\"15\" font-weight=\"bold\">{}</text>\n",
            self.title
        );
        self.frame(&mut svg, &across, &up);
        for (index, series) in self.series.iter().enumerate() {
            line(&mut svg, index, series, &across, &up);
        }
        svg.push_str("</svg>\n");
        Some(svg)
    }

    fn frame(&self, svg: &mut String, across: &Axis, up: &Axis) {
        let (bottom, end) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
        let mut put = |text: String| svg.push_str(&text);
        for tick in up.ticks() {
            let y = up.place(tick);
            put(format!("<path d=\"M{LEFT} {y:.1}H{end}\" stroke=\"#ddd\"/>\n"));
            put(format!(
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>\n",
                LEFT - 6.0,
                y + 4.0,
                short(tick)
            ));
        }
        for tick in across.ticks() {
            let x = across.place(tick);
            put(format!("<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#ddd\"/>\n"));
            put(format!(
                "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\n",
                bottom + 16.0,
                short(tick)
            ));
        }
        let (middle, below) = (f64::midpoint(LEFT, end), HEIGHT - 14.0);
        put(format!("<text x=\"{middle}\" y=\"{below}\" text-anchor=\"middle\">{}</text>\n", self.across));
        let half = f64::midpoint(TOP, bottom);
        put(format!(
            "<text transform=\"translate(18 {half}) rotate(-90)\" text-anchor=\"middle\">{}</text>\n",
            self.up
        ));
    }
}

fn line(svg: &mut String, index: usize, series: &Series, across: &Axis, up: &Axis) {
    let colour = COLOURS[index % COLOURS.len()];
    let mut path = String::new();
    for (x, y) in &series.points {
        let (x, y) = (across.place(*x), up.place(*y));
        let _ = write!(path, "{}{x:.1} {y:.1}", if path.is_empty() { 'M' } else { 'L' });
        let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" fill=\"{colour}\"/>");
    }
    let _ = writeln!(svg, "<path d=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>");
    let (x, y) = (WIDTH - RIGHT + 14.0, TOP + 18.0 * (index as f64 + 0.5));
    let _ = writeln!(svg, "<path d=\"M{x} {y}h18\" stroke=\"{colour}\" stroke-width=\"3\"/>");
    let _ = writeln!(svg, "<text x=\"{}\" y=\"{}\">{}</text>", x + 24.0, y + 4.0, series.name);
}

fn short(value: f64) -> String {
    match value {
        value if value >= 10_000.0 => format!("{:.0} k", value / 1000.0),
        value if value >= 1000.0 => format!("{:.1} k", value / 1000.0),
        value if value >= 10.0 || value == 0.0 => format!("{value:.0}"),
        value => format!("{value:.1}"),
    }
}
