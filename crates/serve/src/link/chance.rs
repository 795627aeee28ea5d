//! Chance that comes again: numbers that depend on a seed and nothing else.

/// A sequence of numbers (`SplitMix64`; Steele, Lea and Flood, 2014).
pub struct Chance(u64);

impl Chance {
    /// Returns the sequence of one connection.
    pub fn new(seed: u64, connection: u64) -> Self {
        let mut seeds = Self(seed);
        let start = seeds.next();
        Self(start ^ connection.wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    /// Returns another sequence, for what runs beside.
    pub fn part(&mut self) -> Self {
        Self(self.next())
    }

    /// Returns a number of `0..=most`, all of them about equally likely.
    pub fn up_to(&mut self, most: u64) -> u64 {
        let scaled = u128::from(self.next()) * (u128::from(most) + 1);
        u64::try_from(scaled >> 64).unwrap_or(most)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_again_and_reaches_everything() {
        let numbers = |seed, connection| {
            let mut chance = Chance::new(seed, connection);
            std::iter::repeat_with(|| chance.up_to(9)).take(200).collect::<Vec<_>>()
        };
        assert_eq!(numbers(1, 2), numbers(1, 2));
        assert_ne!(numbers(1, 2), numbers(1, 3));
        assert_ne!(numbers(1, 2), numbers(2, 2));
        for number in 0..=9 {
            assert!(numbers(0, 0).contains(&number), "{number}");
        }
        assert!(numbers(0, 0).iter().all(|&number| number <= 9));
        assert_eq!(Chance::new(0, 0).up_to(0), 0);
        assert!(Chance::new(0, 0).up_to(u64::MAX) > 9);
    }
}
