//! The page that says which test shows which rule is true of the tests.

use std::path::Path;

fn read(path: &str) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    std::fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The rows of all tables of the page: the name of the rule, and the cell that names tests.
fn rows(page: &str) -> Vec<(&str, &str)> {
    let cells = page.lines().filter_map(|line| line.strip_prefix("| ")?.strip_suffix(" |"));
    let split = cells.map(|cells| cells.split(" | ").collect::<Vec<_>>());
    let three = split.map(|cells| match cells.as_slice() {
        &[rule, _, tests] => (rule, tests),
        other => panic!("{other:?} are not three cells"),
    });
    three.filter(|(_, tests)| *tests != "shown by").collect()
}

/// What stands in code marks.
fn marked(cell: &str) -> impl Iterator<Item = &str> {
    cell.split('`').skip(1).step_by(2)
}

#[test]
fn every_test_that_is_named_exists() {
    let page = read("docs/rules.md");
    for (rule, tests) in rows(&page) {
        let (mut file, mut found) = (None, 0);
        for name in marked(tests) {
            if name.contains('/') {
                file = Some((name, read(name)));
                continue;
            }
            let (path, text) = file.as_ref().unwrap_or_else(|| panic!("{rule} names no file"));
            let line = format!("fn {name}(");
            let lines: Vec<&str> = text.lines().map(str::trim_start).collect();
            let at = lines.iter().position(|own| own.starts_with(&line));
            let at = at.unwrap_or_else(|| panic!("{rule}: {path} has no {name}"));
            let marks = lines[..at].iter().rev().take_while(|line| line.starts_with("#["));
            let is_test = marks.clone().any(|mark| *mark == "#[test]");
            assert!(is_test, "{rule}: {name} in {path} is no test");
            found += 1;
        }
        assert!(found > 0, "{rule} is shown by nothing");
    }
}

#[test]
fn every_rule_is_on_the_page_once() {
    let page = read("docs/rules.md");
    let found: Vec<&str> = rows(&page).iter().map(|(rule, _)| *rule).collect();
    let of = |kind: &str, count: usize| (1..=count).map(move |n| format!("{kind} {n}")).collect();
    let counts = [
        ("b", 8),
        ("c", 4),
        ("row", 20),
        ("defect", 22),
        ("d", 11),
        ("e", 15),
        ("f", 3),
        ("g", 7),
        ("h", 4),
        ("l", 7),
    ];
    let expected: Vec<String> =
        counts.iter().flat_map(|&(kind, count)| -> Vec<String> { of(kind, count) }).collect();
    assert_eq!(found, expected);
}
