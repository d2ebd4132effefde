//! Mean and standard deviation over runs.

use serde::Serialize;

/// Of a sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Statistic {
    pub mean: f64,
    /// Standard deviation of the sample, √(Σ (x − mean)² / (n − 1)); null for one value.
    pub sd: Option<f64>,
}

impl Statistic {
    /// `None` for no values.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Statistic> {
        let values: Vec<f64> = values.into_iter().collect();
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|x| (x - mean).powi(2)).sum();
        let sd = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
        (!values.is_empty()).then_some(Statistic { mean, sd })
    }

    /// `1.6432 ± 0.0031`
    pub fn text(&self) -> String {
        self.rounded(4)
    }

    /// As [`Statistic::text`], to `decimals` digits after the point.
    pub fn rounded(&self, decimals: usize) -> String {
        let sd = self.sd.map_or(String::new(), |sd| format!(" ± {sd:.decimals$}"));
        format!("{:.decimals$}{sd}", self.mean).replace('-', "−")
    }

    /// Of the values times `factor`.
    pub fn scaled(&self, factor: f64) -> Statistic {
        Statistic { mean: factor * self.mean, sd: self.sd.map(|sd| factor.abs() * sd) }
    }

    /// A fraction as `52.1 ± 1.2 %`.
    pub fn percent(&self) -> String {
        let sd = self.sd.map_or(String::new(), |sd| format!(" ± {:.1}", 100.0 * sd));
        format!("{:.1}{sd} %", 100.0 * self.mean).replace('-', "−")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deviation_is_the_samples() {
        assert_eq!(Statistic::of([1.0, 2.0, 4.0, 5.0]), Some(Statistic { mean: 3.0, sd: Some((10f64 / 3.0).sqrt()) }));
        assert_eq!(Statistic::of([2.0]), Some(Statistic { mean: 2.0, sd: None }));
        assert_eq!(Statistic::of([]), None);
    }

    #[test]
    fn figures_are_shown_with_their_deviation_where_there_is_one() {
        let two = Statistic { mean: -0.5, sd: Some(0.0123) };
        assert_eq!((two.text(), two.percent()), ("−0.5000 ± 0.0123".to_owned(), "−50.0 ± 1.2 %".to_owned()));
        assert_eq!(Statistic { mean: 1.5, sd: None }.text(), "1.5000");
        assert_eq!(two.scaled(-1e3).rounded(0), "500 ± 12");
    }
}
