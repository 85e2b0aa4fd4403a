//! A pipeline of a third party: mailing lists, without the addresses of those who wrote.
//!
//! ```text
//! .mbox ─▶ read (own source) ─▶ redact (own operator) ─▶ rounds ─▶ templify ─▶ mix ─▶ pack ─▶ commit ─▶ train
//! ```
//!
//! Everything else is Headwater's: flags, gates, rounds, mixing, packing, crash safety and the account.

use anyhow::Result;
use clap::Parser;
use headwater::block::Converted;
use headwater::chain::Chain;
use headwater::format::documents::{Format, Found, Records};
use headwater::format::input::{Counter, open_counted};
use headwater::record::{Document, Place, Rejected};
use headwater_operators::commit::Commit;
use headwater_operators::credit::ReturnCredit;
use headwater_operators::mix::Mix;
use headwater_operators::pack::Pack;
use headwater_operators::read::read;
use headwater_operators::templify::Templify;
use headwater_operators::train::Train;
use headwater_pipelines::instruct::{chains_and_accounts, synthesized};
use headwater_pipelines::shell::args::RunArgs;
use headwater_pipelines::shell::parts::Parts;
use headwater_pipelines::shell::running::run;
use headwater_pipelines::shell::settings::{Preset, Settings};
use headwater_pipelines::shell::{finish, report, wrong_use};
use std::io::BufRead;
use std::path::Path;
use std::process::ExitCode;
use timely::dataflow::StreamVec;
use timely::dataflow::operators::vec::Map;
use timely::worker::Worker;

/// Augment the messages of mailing lists (.mbox)
#[derive(Parser)]
#[command(name = "mailing-list", arg_required_else_help = true)]
struct Args {
    #[command(flatten)]
    run: RunArgs,
}

const PRESET: Preset = Preset {
    command: "mailing-list",
    corpus: "mail",
    rounds: 2,
    converted: Converted::ALL,
    task_passes: None,
    epoch_documents: 60,
    words_min: 5,
    unique: true,
    published: &[],
};

static MBOX: Format = Format { extension: "mbox", name: "mailing list", read: read_mbox };

fn main() -> ExitCode {
    MBOX.register();
    let pipeline = || -> Result<ExitCode> {
        let args = Args::parse().run;
        let json = args.machine.json;
        let settings = Settings::new(PRESET, args).map_err(wrong_use)?;
        finish(&run(&settings, dataflow)?, json, false)
    };
    pipeline().unwrap_or_else(|error| report(&error))
}

fn dataflow(worker: &mut Worker, parts: &Parts) {
    let index = worker.index();
    worker.dataflow::<u64, _, _>(|scope| {
        let credit = parts.credit();
        let blocks = if index == 0 { parts.blocks() } else { None };
        let admitted = read(scope, blocks, credit.clone(), parts.reading());
        let (chains, accounts) = chains_and_accounts(admitted);
        synthesized(redact(chains), parts)
            .templify(parts.augmenter.clone())
            .mix(parts.mixing.clone())
            .pack(parts.packing)
            .commit(accounts, parts.committing(), parts.committer())
            .train(parts.feed(index))
            .return_credit(credit);
    });
}

/// An operator: puts `[address]` in place of every word with an `@` in it.
fn redact(chains: StreamVec<'_, u64, Chain>) -> StreamVec<'_, u64, Chain> {
    chains.map(|mut chain| {
        for document in &mut chain.waiting {
            let word = |word: &str| {
                let end = word.len() - word.trim_end().len();
                match word.contains('@') {
                    true => format!("[address]{}", &word[word.len() - end..]),
                    false => word.to_owned(),
                }
            };
            let words = document.text.split_inclusive(char::is_whitespace);
            document.text = words.map(word).collect();
        }
        chain
    })
}

/// A source: the messages of an mbox file (RFC 4155), by their ids.
fn read_mbox(path: &Path, source: &str, counter: Counter) -> headwater::error::Result<Records> {
    let mut lines = open_counted(path, counter)?.split(b'\n');
    let (file, source) = (path.display().to_string(), source.to_owned());
    let (mut record, mut byte, mut ended) = (0, 0, false);
    let mut message = Vec::new();
    Ok(Box::new(std::iter::from_fn(move || {
        while !ended {
            let place = Place { file: file.clone(), record, byte };
            let line = match lines.next().transpose() {
                Ok(line) => line,
                Err(error) => {
                    ended = true;
                    let rejected = Rejected::unread("unreadable_input", error, place, "");
                    return Some(Found::Rejected(Box::new(rejected)));
                }
            };
            ended = line.is_none();
            byte += line.as_ref().map_or(0, |line| line.len() as u64 + 1);
            if line.as_ref().is_none_or(|line| line.starts_with(b"From ")) {
                let whole = std::mem::take(&mut message);
                if !whole.is_empty() {
                    record += 1;
                    return Some(found(&whole, &source, place));
                }
            } else if let Some(line) = line {
                message.extend_from_slice(&line);
                message.push(b'\n');
            }
        }
        None
    })))
}

fn found(message: &[u8], source: &str, place: Place) -> Found {
    let reject = |reason: &str, place| {
        let text = String::from_utf8_lossy(&message[..message.len().min(1000)]);
        Found::Rejected(Box::new(Rejected::unread(reason, "", place, &text)))
    };
    let Ok(text) = std::str::from_utf8(message) else {
        return reject("not_utf8", place);
    };
    let Some(body) = memchr::memmem::find(message, b"\n\n") else {
        return reject("no_body", place);
    };
    let header = |name: &str| {
        let own = |line: &str| line.strip_prefix(name).map(|value| value.trim().to_owned());
        text[..body].lines().find_map(own)
    };
    let Some(id) = header("Message-ID:") else {
        return reject("no_message_id", place);
    };
    let text =
        [header("Subject:").unwrap_or_default(), text[body..].trim().to_owned()].join("\n\n");
    let source = source.to_owned();
    Found::Document(Box::new(Document { id, source, text, place, ..Document::default() }))
}
