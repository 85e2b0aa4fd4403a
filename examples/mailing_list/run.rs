//! The pipeline runs through, and its own source and operator are seen in what it writes.

use serde_json::Value;
use std::path::Path;
use std::process::Command;

const MESSAGES: &str = "\
From ann@example.org Tue Mar  3 10:00:00 2026
Message-ID: <1@example.org>
Subject: The pump in cellar two

The pump in cellar two stopped on Monday night. Write to ann@example.org before you start it again.

From bob@example.org Tue Mar  3 11:00:00 2026
Subject: a message without an id

Nobody can find this one again.

From bob@example.org Tue Mar  3 12:00:00 2026
Message-ID: <2@example.org>
Subject: Re: The pump in cellar two

It was the valve. Bob replaced it on Tuesday, and the pump has run without a pause since then.
";

fn run(input: &Path, out: &Path) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_mailing-list"))
        .args(["--no-train", "--model", "2m", "--length", "256", "--new-tokens", "60", "--json"])
        .args(["--progress", "none", "--workers", "2", "--input"])
        .args([input, Path::new("--out"), out])
        .output()
        .expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("mailing list"), "not in the plan");
    serde_json::from_slice(&output.stdout).expect("a summary")
}

#[test]
fn an_own_source_and_an_own_operator_do_their_work() {
    let place = tempfile::tempdir().unwrap();
    let (input, out) = (place.path().join("list.mbox"), place.path().join("run"));
    std::fs::write(&input, MESSAGES).unwrap();
    let summary = run(&input, &out);
    assert_eq!(summary["ledger"]["unknown"], 0);
    assert_eq!(summary["ledger"]["counts"]["read/records"], 3);
    assert_eq!(summary["ledger"]["counts"]["read/rejected/no_message_id"], 1);
    let file = std::fs::File::open(out.join("augmented/epoch-000000.jsonl.zst")).unwrap();
    let documents = String::from_utf8(zstd::decode_all(file).unwrap()).unwrap();
    assert!(documents.contains("Write to [address] before you start it again."), "{documents}");
    assert!(documents.contains("It was the valve.") && !documents.contains("ann@"), "{documents}");
}
