/// `total` split in proportion to `weights` (not negative, not all zero) into whole numbers that add up to it.
///
/// The partial sums are rounded, not the parts: each part is within 1 of its exact share, and a zero weight gets nothing.
pub fn split(total: u64, weights: &[f64]) -> Vec<u64> {
    let sum: f64 = weights.iter().sum();
    let (mut partial, mut given) = (0.0, 0);
    weights
        .iter()
        .map(|weight| {
            partial += weight;
            let upto = (total as f64 * (partial / sum)).round() as u64;
            let part = upto.min(total) - given;
            given += part;
            part
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::split;
    use proptest::prelude::*;

    #[test]
    fn examples() {
        assert_eq!(split(10, &[0.5, 0.5]), [5, 5]);
        assert_eq!(split(10, &[1.0, 1.0, 1.0]), [3, 4, 3]);
        assert_eq!(split(3, &[0.0, 1.0, 0.0]), [0, 3, 0]);
    }

    proptest! {
        #[test]
        fn parts_add_up_and_are_near_their_share(
            total in 0..1_000_000u64,
            mut weights in prop::collection::vec(prop_oneof![Just(0.0), 0.0..1.0f64], 1..20),
        ) {
            weights.push(0.1);
            let (parts, sum) = (split(total, &weights), weights.iter().sum::<f64>());
            prop_assert_eq!(parts.iter().sum::<u64>(), total);
            for (&part, &weight) in parts.iter().zip(&weights) {
                prop_assert!((part as f64 - total as f64 * weight / sum).abs() <= 1.0 + 1e-6);
                prop_assert!(weight > 0.0 || part == 0);
            }
        }
    }
}
