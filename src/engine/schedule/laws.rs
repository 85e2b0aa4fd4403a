//! Laws of the schedule, with a model that is a function of what its cache holds.

use super::*;
use proptest::prelude::*;

const END: u32 = 0;

/// A model whose next token depends on all tokens before, as its cache shows them. Blocks that were given
/// to the wrong sequence, or rows that were left out, change what it says.
struct Fake {
    cache: Vec<[u64; BLOCK]>,
}

fn fold(before: u64, token: u32) -> u64 {
    let mixed = (before ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    mixed ^ (mixed >> 29)
}

/// Mostly counts up, so that there is something to guess; sometimes jumps, seldom ends.
fn next(state: u64, token: u32) -> u32 {
    match state % 64 {
        0 => END,
        1..8 => 1 + (state >> 8) as u32 % 5,
        _ => 1 + token % 5,
    }
}

/// What the model says behind a prompt, and whether it closes.
fn alone(prompt: &[u32], limit: usize) -> (Vec<u32>, bool) {
    let mut state = prompt.iter().fold(1, |state, &token| fold(state, token));
    let mut token = *prompt.last().unwrap();
    let mut generated = Vec::new();
    while generated.len() < limit {
        token = next(state, token);
        if token == END {
            return (generated, true);
        }
        generated.push(token);
        state = fold(state, token);
    }
    (generated, false)
}

impl Fake {
    /// The tokens of a step; ids that it expects are among those of the step `before`.
    fn compute(&mut self, step: &Step, before: &[u32]) -> Vec<u32> {
        let mut states = Vec::new();
        let mut ids = step.ids.clone();
        for Expected { row, sample } in &step.expected {
            ids[*row as usize] = before[*sample as usize];
        }
        for run in &step.runs {
            for row in 0..run.rows {
                let at = |position: usize| (run.table[position / BLOCK] as usize, position % BLOCK);
                let position = run.position + row;
                assert_eq!(step.positions[run.first_row + row] as usize, position);
                let before = match position.checked_sub(1).map(at) {
                    Some((block, lane)) => self.cache[block][lane],
                    None => 1,
                };
                let (block, lane) = at(position);
                if lane == 0 {
                    self.cache[block].fill(0);
                }
                self.cache[block][lane] = fold(before, ids[run.first_row + row]);
                states.push(self.cache[block][lane]);
            }
        }
        step.samples.iter().map(|&row| next(states[row as usize], ids[row as usize])).collect()
    }
}

/// What became of a run.
#[derive(Default)]
struct Outcome {
    /// For each prompt, what was generated and whether it was closed; none if it was handed back.
    answers: Vec<Option<(Vec<u32>, bool)>>,
    total: StepMetrics,
    steps: usize,
    /// Steps that were laid out before the tokens of the step before were known.
    steps_ahead: usize,
}

/// Prompts and how they come.
#[derive(Clone, Copy)]
struct Coming<'a> {
    prompts: &'a [Vec<u32>],
    limit: usize,
    /// So many before each step.
    at_a_time: usize,
}

/// Generates from prompts, and checks each step. A device of its own begins with a step before the tokens of the
/// one before are known, where that can be.
fn run(coming: Coming, bounds: Bounds, means: Means, has_own_device: bool) -> Outcome {
    let Coming { prompts, limit, at_a_time } = coming;
    let mut schedule = Schedule::new(bounds, means);
    let mut fake = Fake { cache: vec![[0; BLOCK]; bounds.blocks] };
    let mut outcome = Outcome { answers: vec![None; prompts.len()], ..Outcome::default() };
    let mut coming = prompts.iter().enumerate();
    let work: usize = prompts.iter().map(|prompt| prompt.len() + limit).sum();
    let mut launched: Option<(Step, Vec<u32>)> = None;
    loop {
        for (owner, prompt) in coming.by_ref().take(at_a_time) {
            let _ = schedule.push(prompt.clone(), limit, owner);
        }
        let (mut step, tokens) = match launched.take() {
            Some(launched) => launched,
            None if schedule.is_empty() && coming.len() == 0 => break,
            None => {
                let step = schedule.plan();
                check_step(&schedule, &step, bounds);
                let tokens = fake.compute(&step, &[]);
                (step, tokens)
            }
        };
        if let Some(next) = has_own_device.then(|| schedule.plan_ahead(&step)).flatten() {
            check_step(&schedule, &next, bounds);
            assert!(
                step.samples.is_empty() || next.metrics.preemptions == 0,
                "a token is not known"
            );
            assert!(next.metrics.is_ahead);
            outcome.steps_ahead += 1;
            let tokens = fake.compute(&next, &tokens);
            launched = Some((next, tokens));
        }
        outcome.steps += 1;
        assert!(outcome.steps <= work + 2 * prompts.len() + 1, "somebody starves");
        for (sequence, closed) in schedule.take(&mut step, &tokens, &[END]) {
            let answer = (sequence.generated().to_vec(), closed);
            assert!(outcome.answers[sequence.owner].replace(answer).is_none(), "answered once");
        }
        let tables: Vec<&[u32]> = schedule.running.iter().map(|one| &one.table[..]).collect();
        schedule.blocks.check(&tables);
        add(&mut outcome.total, &step.metrics);
    }
    assert_eq!(schedule.blocks.held(), 0, "blocks were lost");
    outcome
}

fn add(total: &mut StepMetrics, step: &StepMetrics) {
    total.admitted_tokens += step.admitted_tokens;
    total.cached_tokens += step.cached_tokens;
    total.prompt_tokens += step.prompt_tokens;
    total.drafted_tokens += step.drafted_tokens;
    total.accepted_tokens += step.accepted_tokens;
    total.generated_tokens += step.generated_tokens;
    total.preemptions += step.preemptions;
}

fn check_step(schedule: &Schedule<usize>, step: &Step, bounds: Bounds) {
    assert!(step.ids.len() <= bounds.step_tokens_max);
    assert!(step.runs.len() <= bounds.sequences_max);
    let owners = schedule.running.iter().chain(&schedule.waiting).map(|one| one.owner);
    assert!(owners.is_sorted(), "sequences run and wait in the order they came in");
    let Some(oldest) = schedule.running.iter().find(|one| !one.is_over()) else {
        return assert!(
            step.runs.is_empty() || schedule.waiting.is_empty(),
            "whoever is first is never kept waiting"
        );
    };
    let run = &step.runs[0];
    assert!(run.rows > 0 && run.table == oldest.table, "the oldest always goes on");
    let mut written = std::collections::BTreeSet::new();
    for run in &step.runs {
        let last = run.position + run.rows - 1;
        assert!(last / BLOCK < run.table.len());
        for block in &run.table[run.position / BLOCK..=last / BLOCK] {
            assert!(written.insert(block), "two sequences write to block {block}");
        }
    }
    for run in &step.runs {
        let read = &run.table[..run.position / BLOCK];
        assert!(read.iter().all(|block| !written.contains(block)), "a shared block is written to");
    }
}

const BOUNDS: Bounds =
    Bounds { sequences_max: 3, step_tokens_max: 50, blocks: 12, prompts_at_once: 1 };
const PLAIN: Means = Means { prefix_reuse: PrefixReuse::Off, speculation: Speculation::Off };
const ALL: Means = Means { prefix_reuse: PrefixReuse::On, speculation: Speculation::Always };

/// Tokens that count up from `first`.
fn prompt(first: u32, length: usize) -> Vec<u32> {
    (0..length as u32).map(|place| 1 + (first + place + place / 7) % 5).collect()
}

/// Each prompt goes on from the one before it and its answer, as chains do.
fn chain(rounds: usize, length: usize, limit: usize) -> Vec<Vec<u32>> {
    let mut prompts = vec![prompt(0, length)];
    for round in 1..rounds {
        let last = prompts.last().unwrap();
        let answer = alone(last, limit).0;
        prompts.push([last.clone(), answer, prompt(round as u32, length)].concat());
    }
    prompts
}

/// All answers are those of the model alone; what happened on the way.
fn check(prompts: &[Vec<u32>], limit: usize, bounds: Bounds, means: Means) -> StepMetrics {
    let coming = Coming { prompts, limit, at_a_time: 1 };
    let outcomes = [false, true].map(|own_device| run(coming, bounds, means, own_device));
    for outcome in &outcomes {
        for (prompt, answer) in prompts.iter().zip(&outcome.answers) {
            assert_eq!(answer.as_ref(), Some(&alone(prompt, limit)));
        }
    }
    let [plain, _] = outcomes;
    plain.total
}

#[test]
fn a_sequence_ends_where_the_model_closes_it_or_at_its_limit() {
    let prompts: Vec<_> = (1..20).map(|length| prompt(length, length as usize)).collect();
    check(&prompts, 40, BOUNDS, PLAIN);
    let closed = prompts.iter().filter(|prompt| alone(prompt, 40).1).count();
    assert!((1..prompts.len()).contains(&closed), "{closed}");
}

#[test]
fn a_prompt_that_can_never_fit_is_handed_back() {
    let prompts = [prompt(0, 12 * BLOCK), prompt(0, 5), Vec::new()];
    let coming = Coming { prompts: &prompts, limit: 8, at_a_time: 3 };
    let found = run(coming, BOUNDS, PLAIN, false).answers;
    assert_eq!(found, [None, Some(alone(&prompts[1], 8)), None]);
}

/// Rows and position of each run of the first steps of prompts of such lengths.
fn first_steps(bounds: Bounds, lengths: &[usize], steps: usize) -> Vec<Vec<(usize, usize)>> {
    let mut schedule = Schedule::new(bounds, PLAIN);
    for (owner, &length) in lengths.iter().enumerate() {
        schedule.push(vec![1; length], 4, owner).unwrap();
    }
    let step = |_| {
        let mut step = schedule.plan();
        let sampled = vec![7; step.samples.len()];
        schedule.take(&mut step, &sampled, &[END]);
        step.runs.iter().map(|run| (run.rows, run.position)).collect()
    };
    (0..steps).map(step).collect()
}

#[test]
fn prompts_leave_room_for_whoever_is_generating() {
    let steps = first_steps(BOUNDS, &[90, 3], 3);
    assert_eq!(steps, [vec![(50, 0)], vec![(40, 50), (3, 0)], vec![(1, 90), (1, 3)]]);
}

#[test]
fn prompts_that_come_at_once_have_equal_shares_of_a_step() {
    let bounds = Bounds { prompts_at_once: 2, ..BOUNDS };
    let steps = first_steps(bounds, &[3, 90, 90], 3);
    let shares = [vec![(3, 0), (25, 0), (22, 0)], vec![(1, 3), (25, 25), (24, 22)]];
    assert_eq!(steps[..2], shares);
    assert_eq!(steps[2], [(1, 4), (25, 50), (24, 46)]);
}

#[test]
fn a_prompt_takes_what_no_other_wants() {
    let bounds = Bounds { prompts_at_once: 3, ..BOUNDS };
    assert_eq!(first_steps(bounds, &[90], 1), [vec![(50, 0)]]);
    assert_eq!(first_steps(bounds, &[90, 5], 1), [vec![(45, 0), (5, 0)]]);
}

#[test]
fn as_many_prompts_are_taken_in_as_may_run_and_all_of_them_at_once() {
    let bounds = Bounds { sequences_max: 5, ..BOUNDS };
    let mut schedule = Schedule::new(bounds, PLAIN);
    let push_all = |schedule: &mut Schedule<usize>| {
        let mut taken = 0;
        while !schedule.is_full() {
            schedule.push(vec![1; 4], 2, taken).unwrap();
            taken += 1;
        }
        taken
    };
    assert_eq!(push_all(&mut schedule), 5);
    let mut step = schedule.plan();
    assert_eq!((step.runs.len(), push_all(&mut schedule)), (5, 0));
    schedule.take(&mut step, &[7; 5], &[END]);
    let mut step = schedule.plan();
    assert!(schedule.take(&mut step, &[7, 7, END, 7, 7], &[END]).len() == 5 && !schedule.is_full());
    assert_eq!(push_all(&mut schedule), 5);
}

#[test]
fn what_begins_alike_is_computed_once_though_it_comes_at_once() {
    let beginning = prompt(0, 3 * BLOCK + 5);
    let other = prompt(1, 20);
    let prompts = [0, 1, 2].map(|end| [beginning.clone(), prompt(end, 30)].concat());
    let prompts = [&prompts[..], &[other]].concat();
    let bounds = Bounds { sequences_max: 4, step_tokens_max: 500, blocks: 40, ..BOUNDS };
    let means = Means { prefix_reuse: PrefixReuse::On, ..PLAIN };
    for has_own_device in [false, true] {
        let coming = Coming { prompts: &prompts, limit: 30, at_a_time: 4 };
        let outcome = run(coming, bounds, means, has_own_device);
        assert_eq!(outcome.total.cached_tokens, 2 * 3 * BLOCK as u64);
    }
}

#[test]
fn a_round_computes_only_what_the_round_before_did_not() {
    let prompts = chain(4, 100, 40);
    let bounds = Bounds { sequences_max: 1, step_tokens_max: 300, blocks: 20, ..BOUNDS };
    let means = Means { prefix_reuse: PrefixReuse::On, ..PLAIN };
    let total = check(&prompts, 40, bounds, means);
    // All full blocks of the prompt before and its answer, whose last token was never a row.
    let reused =
        |pair: &[Vec<u32>]| (pair[0].len() + alone(&pair[0], 40).0.len() - 1) / BLOCK * BLOCK;
    let expected: usize = prompts.windows(2).map(reused).sum();
    assert_eq!(total.cached_tokens, expected as u64);
    assert!(expected > 2 * BLOCK);
}

#[test]
fn a_prompt_that_is_all_there_still_has_a_row() {
    let prompts = [prompt(0, 2 * BLOCK), prompt(0, 2 * BLOCK)];
    let bounds = Bounds { sequences_max: 1, step_tokens_max: 300, blocks: 5, ..BOUNDS };
    let total = check(&prompts, 8, bounds, Means { prefix_reuse: PrefixReuse::On, ..PLAIN });
    assert_eq!(total.cached_tokens, BLOCK as u64);
}

#[test]
fn guesses_that_hold_save_steps() {
    let total = check(&[prompt(0, 60)], 60, BOUNDS, ALL);
    assert!(total.accepted_tokens > 0 && total.accepted_tokens < total.drafted_tokens);
}

#[test]
fn the_youngest_goes_back_when_blocks_run_out() {
    // Three prompts of one block each fit with one block to spare; grown, they need twice as many.
    let prompts = [1, 2, 3].map(|first| prompt(first, BLOCK - 4));
    let bounds = Bounds { sequences_max: 3, step_tokens_max: 200, blocks: 5, ..BOUNDS };
    let total = check(&prompts, 100, bounds, PLAIN);
    assert!(total.preemptions > 0);
}

#[test]
fn what_a_sequence_finds_of_itself_is_no_hit() {
    // As above, but that full blocks of what went back are found again.
    let prompts = [1, 2, 3].map(|first| prompt(first, 2 * BLOCK - 4));
    let bounds = Bounds { sequences_max: 3, step_tokens_max: 400, blocks: 8, ..BOUNDS };
    let total = check(&prompts, 100, bounds, Means { prefix_reuse: PrefixReuse::On, ..PLAIN });
    assert!(total.preemptions > 0);
    let admitted: usize = prompts.iter().map(Vec::len).sum();
    assert_eq!((total.admitted_tokens, total.cached_tokens), (admitted as u64, 0));
}

/// Steps, and those of them that were laid out ahead.
fn ahead(prompts: &[Vec<u32>], limit: usize, bounds: Bounds, means: Means) -> (usize, usize) {
    let coming = Coming { prompts, limit, at_a_time: prompts.len() };
    let outcome = run(coming, bounds, means, true);
    (outcome.steps, outcome.steps_ahead)
}

#[test]
fn a_device_of_its_own_always_has_the_next_step() {
    let prompts: Vec<_> = (1..9).map(|length| prompt(length, 20 * length as usize)).collect();
    let bounds = Bounds { blocks: 40, ..BOUNDS };
    let (steps, steps_ahead) = ahead(&prompts, 40, bounds, PLAIN);
    assert_eq!(steps_ahead, steps - 1, "all but the first");
    // Behind the last token of whoever is closed there is a row that nobody looks at, and no more.
    let coming = Coming { prompts: &prompts, limit: 40, at_a_time: prompts.len() };
    let [one, other] = [false, true].map(|own_device| run(coming, bounds, PLAIN, own_device));
    assert_eq!(other.total.generated_tokens, one.total.generated_tokens);
    assert!(other.steps <= one.steps + prompts.len(), "{} and {}", other.steps, one.steps);
}

#[test]
fn what_depends_on_tokens_waits_for_them() {
    // Guesses, and whoever might lose its blocks; a step of prompts alone is foreseen all the same.
    let (steps, steps_ahead) = ahead(&[prompt(1, 120)], 10, BOUNDS, ALL);
    assert!(steps_ahead == 2 && steps > 4, "{steps_ahead} of {steps}");
    let prompts = [1, 2, 3].map(|first| prompt(first, BLOCK - 4));
    let bounds = Bounds { sequences_max: 3, step_tokens_max: 200, blocks: 5, ..BOUNDS };
    let (steps, steps_ahead) = ahead(&prompts, 100, bounds, PLAIN);
    assert!(steps_ahead > 0 && steps_ahead < steps - 1, "{steps_ahead} of {steps}");
}

proptest! {
    #[test]
    fn every_answer_is_that_of_the_model_alone(
        seeds in prop::collection::vec((0u32..4, 1usize..200, 1usize..4), 1..10),
        shape in (1usize..6, 1usize..200, 1usize..20, 1usize..4),
        limit in 1usize..90,
        at_a_time in 1usize..5,
        (reuse, own_device) in any::<(bool, bool)>(),
        speculation in prop::sample::select(
            vec![Speculation::Off, Speculation::Auto, Speculation::Always]
        ),
    ) {
        let (sequences_max, step_tokens_max, blocks, prompts_at_once) = shape;
        let bounds = Bounds { sequences_max, step_tokens_max, blocks, prompts_at_once };
        let prefix_reuse = if reuse { PrefixReuse::On } else { PrefixReuse::Off };
        let mut prompts = Vec::new();
        for (first, length, rounds) in seeds {
            prompts.extend(chain(rounds, length, limit));
            prompts.push(prompt(first, length));
        }
        let coming = Coming { prompts: &prompts, limit, at_a_time };
        let found = run(coming, bounds, Means { prefix_reuse, speculation }, own_device);
        for (prompt, answer) in prompts.iter().zip(found.answers) {
            let fits = (prompt.len() + limit).div_ceil(BLOCK) <= blocks;
            prop_assert_eq!(answer, fits.then(|| alone(prompt, limit)));
        }
    }
}
