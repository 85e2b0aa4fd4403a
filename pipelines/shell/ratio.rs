//! Shares of a mix as they are written on the command line.

use anyhow::{Result, bail, ensure};

/// Shares by tokens, from the epoch they come into force with.
pub type Shares = Vec<(u64, Vec<u64>)>;

/// Reads `1:1`, or `1:1,10=1:2` for other shares from epoch 10 on; one whole number for each of `sources`.
///
/// # Errors
/// If it is no such ratio.
pub fn ratio(text: &str, sources: &[String]) -> Result<Shares> {
    let mut shares: Shares = Vec::new();
    for part in text.split(',') {
        let (from, part) = match part.split_once('=') {
            None if shares.is_empty() => (0, part),
            None => bail!("--ratio {text:?}: {part:?} lacks the epoch it is for, as in 10={part}"),
            Some((epoch, part)) => match epoch.trim().parse::<u64>() {
                Ok(epoch) => (epoch, part),
                Err(_) => bail!("--ratio {text:?}: {epoch:?} is no epoch"),
            },
        };
        let numbers: Vec<_> = part.split(':').map(|number| number.trim().parse::<u64>()).collect();
        let Ok(numbers) = numbers.into_iter().collect::<Result<Vec<u64>, _>>() else {
            bail!("--ratio takes whole numbers such as 1:1, not {text:?}");
        };
        ensure!(
            numbers.len() == sources.len(),
            "--ratio {text:?} has {} parts, where the sources are {}",
            numbers.len(),
            sources.join(", ")
        );
        ensure!(numbers[0] > 0, "--ratio {text:?}: the first part must be above 0");
        ensure!(
            numbers.iter().all(|&number| number <= u64::from(u32::MAX)),
            "--ratio {text:?}: parts are below 2^32"
        );
        ensure!(
            shares.last().map_or(from == 0, |(before, _)| *before < from),
            "--ratio {text:?}: shares start with epoch 0, and later ones follow in order"
        );
        shares.push((from, numbers));
    }
    Ok(shares)
}

/// A part of a whole, such as `1/5`.
///
/// # Errors
/// If it is none.
pub fn part(flag: &str, text: &str) -> Result<(u64, u64)> {
    let numbers = text.split_once('/').map(|(part, of)| (part.trim().parse(), of.trim().parse()));
    match numbers {
        Some((Ok(part), Ok(of))) if of > 0 && part <= of => Ok((part, of)),
        _ => bail!("{flag} takes a part of a whole such as 1/5, not {text:?}"),
    }
}

/// Two bounds, such as `3:60`.
///
/// # Errors
/// If they are none.
pub fn bounds(flag: &str, text: &str) -> Result<(usize, usize)> {
    let numbers = text.split_once(':').map(|(min, max)| (min.trim().parse(), max.trim().parse()));
    match numbers {
        Some((Ok(min), Ok(max))) if min <= max => Ok((min, max)),
        _ => bail!("{flag} takes the least and the most such as 3:60, not {text:?}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, sources: usize, expected: &[(u64, &[u64])]) {
        let sources: Vec<String> = (0..sources).map(|source| source.to_string()).collect();
        let expected: Shares = expected.iter().map(|(from, all)| (*from, all.to_vec())).collect();
        match ratio(text, &sources) {
            Ok(found) => assert_eq!(found, expected, "{text}"),
            Err(error) => assert!(expected.is_empty(), "{text}: {error}"),
        }
    }

    #[test]
    fn ratios_are_whole_numbers_for_each_source() {
        check("1:1", 2, &[(0, &[1, 1])]);
        check("1 : 4:0", 3, &[(0, &[1, 4, 0])]);
        check("1:1,10=1:2, 20=2:1", 2, &[(0, &[1, 1]), (10, &[1, 2]), (20, &[2, 1])]);
        for wrong in
            ["1", "0:1", "1:1:1", "a:b", "0.5:1", "", "1:1,2:1", "1:1,5=1:2,5=2:1", "3=1:1"]
        {
            check(wrong, 2, &[]);
        }
    }

    #[test]
    fn parts_and_bounds_make_sense() {
        assert_eq!(part("--convert", "1/5").unwrap(), (1, 5));
        assert_eq!(bounds("--question-words", "3:60").unwrap(), (3, 60));
        assert!(["", "5", "6/5", "1/0", "a/b"].iter().all(|text| part("", text).is_err()));
        assert!(["", "5", "6:5", "a:b"].iter().all(|text| bounds("", text).is_err()));
    }
}
