//! Names of list items: bullets and enumerations without an end.

use serde::Deserialize;

/// How the items of a list are named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Style {
    /// The same mark for all.
    Bullet,
    /// A, B, …, Z, AA, AB, …
    Upper,
    /// a, b, …, z, aa, ab, …
    Lower,
    /// 1, 2, 3, …
    Digit,
    /// I, II, III, IV, …
    RomanUpper,
    /// i, ii, iii, iv, …
    RomanLower,
}

impl Style {
    /// The name of the item with the given index, from 0. Empty for bullets.
    pub fn name(self, index: usize) -> String {
        match self {
            Style::Bullet => String::new(),
            Style::Upper => letters(index),
            Style::Lower => letters(index).to_lowercase(),
            Style::Digit => (index + 1).to_string(),
            Style::RomanUpper => roman(index + 1),
            Style::RomanLower => roman(index + 1).to_lowercase(),
        }
    }
}

fn letters(index: usize) -> String {
    let (mut index, mut name) = (index, Vec::new());
    loop {
        name.push(b'A' + (index % 26) as u8);
        match index / 26 {
            0 => break,
            rest => index = rest - 1,
        }
    }
    name.iter().rev().map(|&letter| char::from(letter)).collect()
}

fn roman(mut number: usize) -> String {
    const DIGITS: [(usize, &str); 13] = [
        (1000, "M"),
        (900, "CM"),
        (500, "D"),
        (400, "CD"),
        (100, "C"),
        (90, "XC"),
        (50, "L"),
        (40, "XL"),
        (10, "X"),
        (9, "IX"),
        (5, "V"),
        (4, "IV"),
        (1, "I"),
    ];
    let mut name = String::new();
    for (value, digit) in DIGITS {
        while number >= value {
            name += digit;
            number -= value;
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(style: Style, expected: &[(usize, &str)]) {
        for &(index, name) in expected {
            assert_eq!(style.name(index), name, "{style:?} {index}");
        }
    }

    #[test]
    fn names_go_on_beyond_the_alphabet() {
        check(
            Style::Upper,
            &[(0, "A"), (25, "Z"), (26, "AA"), (27, "AB"), (701, "ZZ"), (702, "AAA")],
        );
        check(Style::Lower, &[(1, "b"), (52, "ba")]);
        check(Style::Digit, &[(0, "1"), (99, "100")]);
        check(Style::RomanUpper, &[(0, "I"), (3, "IV"), (48, "XLIX"), (1993, "MCMXCIV")]);
        check(Style::RomanLower, &[(8, "ix")]);
        check(Style::Bullet, &[(0, ""), (9, "")]);
    }
}
