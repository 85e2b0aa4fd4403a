//! A synthesizer that follows a script: its answer is a function of the prompt.

use headwater::record::Finish;
use headwater::seed::stream;
use headwater::synthesizer::Request;
use headwater::tokenizer::Tokenizer;
use xxhash_rust::xxh3::xxh3_64;

/// Answers as a good, a sloppy and a broken synthesizer would, depending on the prompt.
pub fn answer(request: &Request, tokenizer: &Tokenizer) -> (Vec<u32>, Finish) {
    let bytes: Vec<u8> = request.tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    let id = format!("{:016x}", xxh3_64(&bytes));
    let mut draw = stream(1, &id, "script");
    let pair = |number: u64| format!("<QUE> What is {id}-{number}? <ANS> It is {number}. </END>");
    let text = match draw.below(12) {
        0 => String::new(),
        1 => "no markers at all".to_owned(),
        2 => format!("{}\n\n<QUE> cut off <ANS> in the mid", pair(0)),
        3 => format!("{}\n\n{}", pair(0), pair(0)),
        4 => return (Vec::new(), Finish::Failed("the script says so".into())),
        5 => "<QUE> <CON> a <ANS> b </END>".to_owned(),
        _ => {
            let pairs: Vec<String> = (0..1 + draw.below(6)).map(pair).collect();
            pairs.join("\n\n")
        }
    };
    let mut tokens = tokenizer.encode(&text);
    match tokens.len() > request.new_tokens_max {
        true => {
            tokens.truncate(request.new_tokens_max);
            (tokens, Finish::Length)
        }
        false => (tokens, Finish::Stop),
    }
}
