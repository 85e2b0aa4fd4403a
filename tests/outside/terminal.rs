//! Terminals that go away, readers that have seen enough, full disks behind a redirection, and signals.

use crate::program::{check, command, corpus, small_run};
use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// A small run with lines of progress.
fn talking(place: &Path) -> Vec<String> {
    let (documents, general) = corpus(place);
    let arguments = small_run(&documents, &general, &place.join("run"));
    arguments.iter().map(|word| word.replace("none", "plain")).collect()
}

fn program(arguments: &[String]) -> Command {
    command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Sends a signal to a program that has run for a while.
fn signal(child: &Child, signal: &str, after: Duration) {
    std::thread::sleep(after);
    let kill = Command::new("kill").args([signal, &child.id().to_string()]).status();
    assert!(kill.unwrap().success());
}

/// A program whose output goes to a disk that is full.
fn on_a_full_disk(mut program: Command) -> Output {
    let full = File::options().write(true).open("/dev/full").unwrap();
    program.stdout(full).output().unwrap()
}

#[test]
fn a_run_ends_well_when_nobody_reads_what_it_says() {
    let place = tempfile::tempdir().unwrap();
    let arguments = talking(place.path());
    let mut child =
        program(&arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop((child.stdout.take(), child.stderr.take()));
    assert!(child.wait().unwrap().success());
    check(&["inspect", place.path().join("run").to_str().unwrap()], 0, "unknown 0");
}

#[test]
fn results_that_cannot_be_written_are_an_error_and_no_panic() {
    let place = tempfile::tempdir().unwrap();
    let arguments = talking(place.path());
    let run = place.path().join("run");
    for program in [program(&arguments), command(&["inspect", run.to_str().unwrap()])] {
        let output = on_a_full_disk(program);
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains("error: could not write to standard output"), "{said}");
        assert!(!said.contains("panicked"), "{said}");
    }
    check(&["inspect", run.to_str().unwrap()], 0, "unknown 0");
}

#[test]
fn a_run_that_is_to_outlive_its_terminal_does() {
    let place = tempfile::tempdir().unwrap();
    let program = program(&talking(place.path()));
    let mut shell = Command::new("sh");
    shell.args(["-c", "trap '' HUP; exec \"$0\" \"$@\""]).arg(program.get_program());
    let mut child = shell.args(program.get_args()).stderr(Stdio::null()).spawn().unwrap();
    let listens = Duration::from_millis(300);
    signal(&child, "-HUP", listens);
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_benchmark_has_nothing_to_keep_and_ends_at_the_first_signal() {
    // Hours of work, of which nobody waits for the end.
    let line = "bench synth --model 10m --requests 20000 --prompt-tokens 512 --output-tokens 512";
    let arguments: Vec<&str> = line.split(' ').collect();
    let mut child = command(&arguments).stderr(Stdio::null()).spawn().unwrap();
    signal(&child, "-TERM", Duration::from_millis(500));
    assert_eq!(child.wait().unwrap().signal(), Some(15));
}
