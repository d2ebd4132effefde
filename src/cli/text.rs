//! Numbers and tables as people read them.

use std::fmt::Write;

/// Lines of cells with columns aligned, the first column left, the others right.
pub fn table<const N: usize>(lines: &[[String; N]]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let mut out = String::new();
    for line in lines {
        let _ = write!(out, "{:<1$}", line[0], widths[0]);
        for (cell, width) in line.iter().zip(&widths).skip(1) {
            let _ = write!(out, "  {cell:>width$}");
        }
        out.push('\n');
    }
    out
}

pub fn percent(fraction: f64) -> String {
    format!("{:.1} %", 100.0 * fraction).replace('-', "−")
}

/// Seconds as seconds, minutes or hours.
pub fn duration(seconds: f64) -> String {
    match seconds {
        s if s < 120.0 => format!("{s:.1} s"),
        s if s < 7200.0 => format!("{:.1} min", s / 60.0),
        s => format!("{:.2} h", s / 3600.0),
    }
}

/// Seconds as µs, ms or s, three significant digits.
pub fn seconds(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{} µs", significant(1e6 * s)),
        s if s < 1.0 => format!("{} ms", significant(1e3 * s)),
        s => format!("{} s", significant(s)),
    }
}

/// FLOPs in TFLOP, three significant digits from 0.1 on.
pub fn tera(flops: u128) -> String {
    significant(flops as f64 / 1e12)
}

/// Bytes in MiB or GiB.
pub fn bytes(count: u64) -> String {
    let mebi = count as f64 / (1u64 << 20) as f64;
    if mebi < 1024.0 { format!("{} MiB", significant(mebi)) } else { format!("{} GiB", significant(mebi / 1024.0)) }
}

/// A count of parameters in thousands, millions or billions.
pub fn count(parameters: u64) -> String {
    match parameters as f64 {
        n if n < 1e6 => format!("{} k", significant(n / 1e3)),
        n if n < 1e9 => format!("{} M", significant(n / 1e6)),
        n => format!("{} G", significant(n / 1e9)),
    }
}

fn significant(value: f64) -> String {
    let decimals = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 1.0 => 2,
        _ => 3,
    };
    format!("{value:.decimals$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let lines = [["a", "10"], ["long", "1 µs"]].map(|line| line.map(str::to_owned));
        assert_eq!(table(&lines), "a       10\nlong  1 µs\n");
    }

    #[test]
    fn units_follow_size() {
        assert_eq!([bytes(3 << 19), bytes(5 << 30)], ["1.50 MiB", "5.00 GiB"]);
        assert_eq!([count(12_345), count(124_000_000)], ["12.3 k", "124 M"]);
        assert_eq!([tera(27_500_000_000_000), tera(1_000_000_000)], ["27.5", "0.001"]);
        assert_eq!(percent(-0.015), "−1.5 %");
        assert_eq!([seconds(3e-6), seconds(0.0123), seconds(4.5)], ["3.00 µs", "12.3 ms", "4.50 s"]);
        assert_eq!([duration(9.0), duration(300.0), duration(36_000.0)], ["9.0 s", "5.0 min", "10.00 h"]);
    }
}
