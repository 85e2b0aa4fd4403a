//! Questions that a pattern can both ask and answer from the text itself.

use headwater::seed;
use regex::{Captures, Regex};
use std::collections::BTreeSet;
use std::sync::LazyLock;

/// A pattern over one sentence, the ways to ask, and the answer, both with `$group` references.
struct Rule {
    pattern: Regex,
    ask: &'static [&'static str],
    answer: &'static str,
}

const PEOPLE: &str = "patients|subjects|women|men|children|participants|adults|volunteers|infants|\
    people|individuals|adolescents|students|families|physicians|nurses|cases|controls|rats|mice|dogs";
const NUMBER: &str = r"\d[\d,]*|[Oo]ne hundred(?: and)?(?: [a-z]+(?:-[a-z]+)?)?|\
    (?:[Tt]wenty|[Tt]hirty|[Ff]orty|[Ff]ifty|[Ss]ixty|[Ss]eventy|[Ee]ighty|[Nn]inety)(?:-[a-z]+)?|\
    [Ff]ive|[Ss]ix|[Ss]even|[Ee]ight|[Nn]ine|[Tt]en|[Ee]leven|[Tt]welve";

static RULES: LazyLock<Vec<Rule>> = LazyLock::new(|| {
    let table: &[(&str, &'static [&'static str], &'static str)] = &[
        (
            r"(?i)\b(?:aim|aims|objective|objectives|purpose|goal) of (?:this|the|our|the present) (?P<what>study|trial|review|paper|report|analysis|investigation|work|research|article|project|meta-analysis|experiment) (?:was|is|were) (?P<a>to [^.;]{15,260})",
            &[
                "What was the aim of the $what?",
                "What was the purpose of the $what?",
                "What did the authors want to do in this $what?",
            ],
            "$a",
        ),
        (
            r"^(?:[A-Z][A-Z /&]+: |[A-Z][a-z]+: )?(?P<a>To (?:determine|evaluate|assess|compare|investigate|examine|study|test|describe|analyze|analyse|review|identify|explore|establish|estimate|measure|characterize|develop)\b[^.;]{15,260})",
            &[
                "What was the objective?",
                "What was the aim of the study?",
                "What did the researchers set out to do?",
            ],
            "$a",
        ),
        (
            r"\bwe (?P<verb>investigated|examined|evaluated|assessed|compared|studied|tested|analyzed|measured|determined|explored) (?P<a>[^.;]{20,240})",
            &[
                "What was $verb in this study?",
                "What did the authors examine?",
                "What was studied?",
            ],
            "$a",
        ),
        (
            r"(?i)^(?:[A-Z]+: )?(?:in conclusion|to conclude|in summary|overall|taken together), (?:we (?:conclude|found|suggest) that |it (?:is concluded|appears) that )?(?P<a>[a-z0-9][^.]{20,300})",
            &[
                "What was concluded?",
                "What did the authors conclude?",
                "What is the conclusion of the study?",
            ],
            "$a",
        ),
        (
            r"(?i)\b(?:these|our|the|the present|the current) (?P<what>results|findings|data|observations) (?P<verb>suggest|indicate|show|demonstrate|support|confirm|imply)(?:ed)? (?:that )?(?P<a>[^.;]{15,280})",
            &["What do the $what $verb?", "According to the text, what do the $what $verb?"],
            "$a",
        ),
        (
            r"\b[Ww]e (?:conclude|found|find|show|demonstrate|observed|report|hypothesized|suggest)(?:ed|d)? that (?P<a>[^.;]{15,260})",
            &["What did the authors find?", "What do the authors report?"],
            "$a",
        ),
        (
            r"\b(?P<a>(?:multicent(?:er|re),? |randomi[sz]ed,? |double-blind(?:ed)?,? |single-blind(?:ed)?,? |placebo-controlled,? |prospective,? |retrospective,? |controlled,? |open-label,? |parallel-group,? |crossover,? |cross-sectional,? |population-based,? |observational,? |case-control,? |longitudinal,? |pilot,? )+(?:clinical )?(?:trial|study|analysis|cohort study|survey|design))\b",
            &[
                "What was the design of the study?",
                "What kind of study was this?",
                "How was the study designed?",
            ],
            "$a",
        ),
        (
            r"(?i)\b(?P<a>NUMBER) (?:[a-z-]+ ){0,3}?(?P<who>PEOPLE) (?:with (?P<with>[a-z][a-z0-9 -]{3,50}?) )?(?:were|was|participated|received|completed|underwent|entered|took part)\b",
            &[
                "How many $who were studied?",
                "How many $who are mentioned?",
                "What number of $who took part?",
            ],
            "$a",
        ),
        (
            r"\b(?P<a>\d+(?:\.\d+)?%) of (?:the |all |these )?(?P<who>[a-z][a-z -]{2,40}?) (?P<what>(?:had|have|were|was|experienced|reported|received|showed|developed|achieved|said|are|died|completed|responded|used|met|required)\b[^.,;()]{3,80})",
            &["What percentage of $who $what?", "What share of $who $what?"],
            "$a",
        ),
        (
            r"(?:^|[a-z,] )(?P<who>[A-Za-z][A-Za-z0-9' -]{3,50}?) (?P<verb>increased|decreased|rose|fell|declined|grew|dropped|improved|was reduced|were reduced|climbed|gained|lost|jumped|slipped) (?:by |about |around )?(?P<a>\d+(?:\.\d+)?(?:%| percent| per cent| points))",
            &["By how much did it change: $who?", "How large was the change in $who?"],
            "$a",
        ),
        (
            r"(?i)\b(?:treated|treatment|therapy|followed(?: up)?|follow-up|administered|given|received|lasted|studied|monitored)\b[^.;]{0,70}? (?:for|of) (?P<a>(?:\d+|one|two|three|four|six|eight|twelve) (?:days|weeks|months|years|hours|minutes))\b",
            &["How long did it last?", "What was the duration?", "For how long was this done?"],
            "$a",
        ),
        (
            r"\b(?:between|from) (?P<a>(?:[A-Z][a-z]+ )?(?:19|20)\d\d (?:and|to|through|until) (?:[A-Z][a-z]+ )?(?:19|20)\d\d)",
            &["Which period does the text cover?", "During which years did this take place?"],
            "$a",
        ),
        (
            r"(?P<drug>[a-z][a-z-]{4,24}) \(?(?P<a>\d[\d.,-]* ?(?:mg|g|micrograms|mcg|mg/kg|mg/day|ml|IU)(?:/(?:kg|day|d|m2|h))?(?: (?:daily|twice daily|once daily|per day|a day|three times daily))?)\b",
            &["What dose of $drug was used?", "At what dose was $drug given?"],
            "$a",
        ),
        (
            r"(?i)(?:^|(?:efficacy|effect|effects|safety|use|comparison|trial|study) of )(?P<drug>[a-z][a-z0-9 -]{3,40}?) (?:was |were |is )?(?:compared (?:with|to)|versus|vs\.?) (?P<a>[a-z][a-z0-9 -]{3,50}?)(?: in | on | for | and |[.,;:)]|$)",
            &["What was $drug compared with?", "To what was $drug compared?"],
            "$a",
        ),
        (
            r"^(?P<x>[A-Z][A-Za-z0-9() -]{2,60}?) (?:is|are) (?P<a>(?:a|an|the|one of|among|characterized by|defined as|known as) [^.;]{12,200})",
            &["What is $x?", "How does the text describe $x?"],
            "$a",
        ),
        (
            r"^(?P<x>[A-Z][A-Za-z0-9 -]{2,70}?) (?:is|are|was|were) (?:significantly |strongly |independently |also |not |often )?associated with (?P<a>[^.;]{6,160})",
            &["What is $x associated with?", "With what is $x associated?"],
            "$a",
        ),
        (
            r"\b(?P<x>[A-Z][A-Za-z -]{3,50}?) (?:is|are|was|were) (?:caused by|due to|attributed to|the result of) (?P<a>[^.;]{5,140})",
            &["What causes $x?", "What is the reason for $x?"],
            "$a",
        ),
        (
            r"^(?:[A-Z][A-Z ]+: )?(?P<x>[A-Z][A-Za-z0-9 -]{2,60}?) (?:also |significantly |often |usually |generally )?(?P<v>reduce|increase|improve|prevent|cause|inhibit|affect|require|include|involve|provide|produce|predict|contain|offer|represent|remain|play|show|suggest)s (?P<a>[^.;]{8,180})",
            &["What does $x $v?", "According to the text, what does $x $v?"],
            "$a",
        ),
        (
            r"^(?:[A-Z][A-Z ]+: )?(?P<x>[A-Z][A-Za-z0-9 -]{2,60}?) (?:also |significantly |markedly |effectively )?(?P<v>reduce|increase|improve|decrease|produce|cause|induce|announce|release|promise)d (?P<a>[^.;]{8,180})",
            &["What did $x $v?", "According to the text, what did $x $v?"],
            "$a",
        ),
        (
            r"(?:^|, |and )(?P<x>[A-Za-z][A-Za-z0-9 -]{4,60}?) (?P<be>was|were) (?P<v>measured|assessed|evaluated|determined|performed|treated|randomized|randomly assigned|assigned|identified|recorded|calculated|analyzed|estimated|collected|obtained|used) (?P<a>(?:by|with|using|to|from|at|for) [^.;]{6,150})",
            &["How $be $x $v?", "In what way $be $x $v?"],
            "$a",
        ),
        (
            r"(?:^|, |that |and )(?P<x>[A-Za-z][A-Za-z0-9 -]{4,60}?) (?P<be>was|were) (?:significantly |slightly |markedly |also )?(?P<v>higher|lower|greater|better|worse|more common|more frequent|less common|less frequent|longer|shorter|similar|smaller|larger) (?P<a>(?:in|with|for|after|among|between|during) [^.;()]{6,120})",
            &["Where $be $x $v?", "In which case $be $x $v?"],
            "$a",
        ),
        (
            r"(?i)\b(?:no|any) (?:statistically |significant |statistically significant )*differences? (?:was |were )?(?:found |observed |seen |noted )?in (?P<a>[a-z][^.;()]{5,90}?) between (?P<b>[^.;()]{5,80})",
            &["What did not differ between $b?", "In what was there no difference between $b?"],
            "$a",
        ),
        (
            r#"["“](?P<quote>[A-Z][^"”]{20,160}?),?["”],? (?:said|says|explained|added|told reporters) (?P<a>[A-Z][A-Za-z.'-]+(?: [A-Z][A-Za-z.'-]+){0,3})"#,
            &["Who said \"$quote\"?", "Who is quoted with the words \"$quote\"?"],
            "$a",
        ),
        (
            r"\b(?P<a>[A-Z][a-z]+ [A-Z][a-z]+), (?:the |an? )?(?P<role>(?:chief executive|president|chairman|director|minister|spokesman|spokeswoman|analyst|economist|professor|head|governor|secretary|founder|CEO)[A-Za-z ]{0,50}?)(?: of| at| for|,)",
            &["Who is the $role in the text?", "Which person is named as $role?"],
            "$a",
        ),
        (
            r"\b(?P<what>cost|costs|worth|paid|price|sold|bought|fined|invested|raised|spent|losses|loss|profit|revenue|debt)\b[^.;]{0,50}?(?P<a>(?:US|USD|A|£|€)?[$£€]\s?\d[\d.,]*(?: (?:million|billion|trillion))?)",
            &["What amount of money is named?", "How much money is it about?"],
            "$a",
        ),
        (
            r"\b(?:located|based|headquartered|held|born|situated|founded) (?:in|at) (?P<a>[A-Z][A-Za-z]+(?:,? [A-Z][A-Za-z]+){0,3})",
            &["Which place is named?", "Where is that?"],
            "$a",
        ),
    ];
    let rule = |&(pattern, ask, answer): &(&str, &'static [&'static str], &'static str)| Rule {
        pattern: Regex::new(&pattern.replace("NUMBER", NUMBER).replace("PEOPLE", PEOPLE))
            .expect("the patterns above are regular expressions"),
        ask,
        answer,
    };
    table.iter().map(rule).collect()
});

static SECTION: LazyLock<Regex> =
    LazyLock::new(|| Regex::new(r"(?m)^(?P<label>[A-Z][A-Z /&-]{3,40}): ?").expect("static"));
static ABBREVIATION: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"(?P<long>(?:[A-Za-z0-9'-]+ ){1,7}[A-Za-z0-9'-]+) \((?P<short>[A-Z][A-Za-z0-9-]{1,7})\)",
    )
    .expect("static")
});

/// Up to `most` pairs about the text, in the order of the text.
pub(crate) fn ask(text: &str, kind: &str, id: &str, most: usize) -> Vec<(String, String)> {
    let mut stream = seed::stream(0, id, "questions");
    let mut found: Vec<(usize, String, String)> = Vec::new();
    let sentences = sentences(text);
    for &(at, sentence) in &sentences {
        for rule in RULES.iter() {
            if let Some(captures) = rule.pattern.captures(sentence) {
                let question = expand(rule.ask[stream.index(rule.ask.len())], &captures);
                let answer = expand(rule.answer, &captures);
                found.push((at, question, answer));
            }
        }
        found.extend(abbreviations(sentence, at, &sentences, &mut stream));
    }
    if kind == "abstract" {
        found.extend(sections(text, &mut stream));
        found.extend(title(text, &mut stream));
    }
    found.retain(|(_, question, answer)| is_sound(question, answer));
    stream.shuffle(&mut found);
    let mut seen = BTreeSet::new();
    found.retain(|(_, question, answer)| {
        seen.insert(question.to_lowercase()) && seen.insert(format!("={}", answer.to_lowercase()))
    });
    if found.len() < 2 {
        return Vec::new(); // a text with one pair teaches to stop early
    }
    found.truncate(3 + stream.index(most - 2));
    found.sort_by_key(|(at, ..)| *at);
    found.into_iter().map(|(_, question, answer)| (question, answer)).collect()
}

fn expand(pattern: &str, captures: &Captures<'_>) -> String {
    let mut text = String::new();
    captures.expand(pattern, &mut text);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.trim_end_matches([',', ':', ';']).to_owned()
}

fn is_sound(question: &str, answer: &str) -> bool {
    let open = |text: &str| text.matches('(').count() != text.matches(')').count();
    !open(answer)
        && !open(question)
        && question.len() < 260
        && (1..=60).contains(&answer.split_whitespace().count())
        && !answer.ends_with("vs")
        && !answer.ends_with(" the")
        && !VAGUE.iter().any(|word| question.contains(word))
}

/// Subjects that make no question.
const VAGUE: [&str; 22] = [
    " median ",
    " mean ",
    " hydrochloride ",
    " than ",
    " dose of dose ",
    " least ",
    " There",
    " It ",
    " This ",
    " They ",
    " We ",
    " that ",
    " which ",
    " who ",
    " Who",
    " Which",
    " and was ",
    " was announce",
    " has announce",
    " was release",
    " has release",
    " be ",
];

/// Sentences with the byte they start at.
fn sentences(text: &str) -> Vec<(usize, &str)> {
    static END: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"[.!?]['”)]*\s+(?:[A-Z0-9“])|\n+").expect("static"));
    let (mut found, mut start) = (Vec::new(), 0);
    for end in END.find_iter(text) {
        let cut = match text[end.start()..end.end()].find(char::is_whitespace) {
            Some(space) if !text[end.range()].starts_with('\n') => end.start() + space,
            _ => end.start(),
        };
        if cut > start {
            found.push((start, text[start..cut].trim()));
        }
        start = text.len() - text[cut..].trim_start().len();
    }
    found.push((start, text[start..].trim()));
    found.retain(|(_, sentence)| !sentence.is_empty());
    found
}

/// Short forms in brackets behind their long forms (Schwartz and Hearst, 2003), asked plainly, with
/// options, or with the step that leads to the answer.
fn abbreviations(
    sentence: &str,
    at: usize,
    sentences: &[(usize, &str)],
    stream: &mut seed::Stream,
) -> Vec<(usize, String, String)> {
    let mut found = Vec::new();
    for captures in ABBREVIATION.captures_iter(sentence) {
        let (short, long) = (&captures["short"], &captures["long"]);
        let Some(long) = long_form(short, long) else {
            continue;
        };
        let at = at + captures.get(0).map_or(0, |whole| whole.start());
        let pair = match stream.below(10) {
            0..6 => {
                let ways = [
                    "What does $ stand for?",
                    "What is $ short for?",
                    "What does the abbreviation $ mean?",
                ];
                (ways[stream.index(3)].replace('$', short), long.to_owned())
            }
            6..8 => {
                let others: Vec<String> = decoys(long, sentences, stream);
                if others.len() < 2 {
                    continue;
                }
                let mut options = others;
                options.push(long.to_owned());
                stream.shuffle(&mut options);
                (
                    format!("What does {short} stand for?\nOptions:\n- {}", options.join("\n- ")),
                    long.to_owned(),
                )
            }
            _ => (
                format!("What does {short} mean in this text?\nLet's think step by step."),
                format!(
                    "The text introduces {short} in brackets behind \"{long}\".\nTherefore, the answer is {long}"
                ),
            ),
        };
        found.push((at, pair.0, pair.1));
    }
    found
}

/// The shortest run of words before the bracket whose letters hold those of the short form in order.
fn long_form<'a>(short: &str, words: &'a str) -> Option<&'a str> {
    let short: Vec<char> = short.to_lowercase().chars().filter(|c| c.is_alphanumeric()).collect();
    let long: Vec<(usize, char)> = words.char_indices().collect();
    let (mut s, mut l) = (short.len(), long.len());
    while s > 0 {
        let wanted = short[s - 1];
        loop {
            l = l.checked_sub(1)?;
            let starts_word = l == 0 || !long[l - 1].1.is_alphanumeric();
            if long[l].1.to_lowercase().eq(std::iter::once(wanted)) && (s > 1 || starts_word) {
                break;
            }
        }
        s -= 1;
    }
    let form = &words[long[l].0..];
    let fits = form.len() > short.len() + 2 && form.split(' ').count() <= short.len() + 3;
    fits.then_some(form)
}

/// Other phrases of the text of about the same length.
fn decoys(answer: &str, sentences: &[(usize, &str)], stream: &mut seed::Stream) -> Vec<String> {
    let count = answer.split(' ').count();
    let mut found = Vec::new();
    for _ in 0..12 {
        let words: Vec<&str> = sentences[stream.index(sentences.len())].1.split(' ').collect();
        if words.len() < count + 4 || found.len() == 3 {
            continue;
        }
        let start = stream.index(words.len() - count);
        let phrase = words[start..start + count].join(" ");
        let clean = phrase.chars().all(|c| c.is_alphanumeric() || " -".contains(c));
        if clean && phrase.len() > 8 && !answer.contains(&phrase) {
            found.push(phrase);
        }
    }
    found
}

/// The first sentence of labelled sections.
fn sections(text: &str, stream: &mut seed::Stream) -> Vec<(usize, String, String)> {
    let mut found = Vec::new();
    for captures in SECTION.captures_iter(text) {
        let whole = captures.get(0).expect("the match");
        let ask: [&str; 3] = match &captures["label"] {
            label if label.contains("CONCLUSION") || label.contains("INTERPRETATION") => [
                "What did the authors conclude?",
                "What is the conclusion?",
                "What can be concluded from this study?",
            ],
            label if label.contains("RESULT") || label.contains("FINDING") => {
                ["What was found?", "What did the results show?", "What was the main result?"]
            }
            label if label.contains("METHOD") || label.contains("DESIGN") => [
                "What was done in the study?",
                "How was the study carried out?",
                "What methods were used?",
            ],
            label if label.contains("BACKGROUND") || label.contains("INTRODUCTION") => [
                "What is the background of the study?",
                "Why was the study done?",
                "What was known before?",
            ],
            label if label.contains("PARTICIPANT") || label.contains("PATIENT") => {
                ["Who took part in the study?", "Who was studied?", "Which patients were included?"]
            }
            label if label.contains("SETTING") => [
                "Where did the study take place?",
                "What was the setting of the study?",
                "Where was the study done?",
            ],
            label if label.contains("INTERVENTION") => [
                "What was the intervention?",
                "Which treatment was given?",
                "What did participants receive?",
            ],
            label if label.contains("OUTCOME") || label.contains("MEASURE") => [
                "What was measured?",
                "What were the outcome measures?",
                "Which outcomes were assessed?",
            ],
            _ => continue,
        };
        let rest = &text[whole.end()..];
        let first = sentences(rest).first().map_or("", |&(_, sentence)| sentence);
        let answer = first.trim_end_matches('.').to_owned();
        found.push((whole.end(), ask[stream.index(3)].to_owned(), answer));
    }
    found
}

/// What the text is about, answered by its title.
fn title(text: &str, stream: &mut seed::Stream) -> Option<(usize, String, String)> {
    let (title, _) = text.split_once("\n\n")?;
    let ways = [
        "What is this study about?",
        "What is the topic of the text?",
        "What does the abstract deal with?",
    ];
    (stream.below(3) == 0)
        .then(|| (0, ways[stream.index(3)].to_owned(), title.trim_end_matches('.').to_owned()))
}

/// A question of the task data in the form of the wire format: options as a list, the answer in full.
pub(crate) fn with_options(question: &str, answer: &str) -> Option<(String, String)> {
    static LETTERED: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"(?m)^\(?[A-Z]\) ?(?P<text>.*)$").expect("static"));
    let options: Vec<&str> = LETTERED
        .captures_iter(question)
        .map(|c| c.name("text").map_or("", |m| m.as_str()))
        .collect();
    if question.is_empty() || answer.is_empty() {
        return None;
    }
    if options.len() < 2 {
        return Some((question.to_owned(), answer.to_owned()));
    }
    let stem = question[..LETTERED.find(question)?.start()].trim();
    let answer = options.iter().find(|option| option.trim().eq_ignore_ascii_case(answer.trim()))?;
    let list: Vec<String> = options.iter().map(|option| format!("\n- {}", option.trim())).collect();
    Some((format!("{stem}\nOptions:{}", list.concat()), answer.trim().to_owned()))
}
