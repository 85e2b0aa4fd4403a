//! Documents as JSON Lines: `{"id": …, "text": …, …}`.

use super::documents::Found;
use super::input::Counter;
use super::lines::Lines;
use crate::error::Result;
use crate::record::{Document, Place, Rejected};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::path::Path;

/// Which fields hold what.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fields {
    /// The id. Without such a field, file and line are the id.
    pub id: String,
    /// The text: the fields that are there and not blank, with a blank line between them. If none is
    /// named: `text`, else `title` and `abstract`, else `content`.
    pub text: Vec<String>,
}

impl Fields {
    /// The id in `id`, the text wherever it is found.
    pub fn detected() -> Self {
        Fields { id: "id".into(), text: Vec::new() }
    }
}

/// The documents of a file.
///
/// # Errors
/// If the file cannot be opened.
pub fn read(
    path: &Path,
    source: String,
    fields: Fields,
    counter: Counter,
) -> Result<impl Iterator<Item = Found> + use<>> {
    Ok(Lines::open_counted(path, counter)?.map(move |line| match line {
        Err(rejected) => Found::Rejected(rejected),
        Ok((line, place)) => match parse(&line, &source, &fields, &place) {
            Ok(document) => Found::Document(Box::new(document)),
            Err((reason, detail)) => {
                Found::Rejected(Box::new(Rejected::unread(reason, detail, place, &line)))
            }
        },
    }))
}

fn parse(
    line: &str,
    source: &str,
    fields: &Fields,
    place: &Place,
) -> std::result::Result<Document, (&'static str, String)> {
    let value: Value =
        serde_json::from_str(line).map_err(|error| ("malformed_json", error.to_string()))?;
    match value {
        Value::Object(object) => document(object, source, fields, place),
        other => Err(("not_an_object", format!("a JSON {}", name(&other)))),
    }
}

/// The document in a record with named fields.
///
/// # Errors
/// The reason for which there is none, and what exactly is wrong.
pub(super) fn document(
    mut object: Map<String, Value>,
    source: &str,
    fields: &Fields,
    place: &Place,
) -> std::result::Result<Document, (&'static str, String)> {
    let id = match object.remove(&fields.id) {
        None | Some(Value::Null) => format!("{}:{}", place.file, place.record),
        Some(Value::String(id)) => id,
        Some(Value::Number(id)) => id.to_string(),
        Some(other) => return Err(wrong_type(&fields.id, &other)),
    };
    let text = take_text(&mut object, &fields.text)?;
    let metadata = object.into_iter().map(|(key, value)| match value {
        Value::String(value) => (key, value),
        other => (key, other.to_string()),
    });
    Ok(Document {
        id,
        source: source.to_owned(),
        text,
        metadata: metadata.collect(),
        place: place.clone(),
        ..Document::default()
    })
}

fn take_text(
    object: &mut Map<String, Value>,
    named: &[String],
) -> std::result::Result<String, (&'static str, String)> {
    const KNOWN: [&[&str]; 3] = [&["text"], &["title", "abstract"], &["content"]];
    let names: Vec<&str> = match named {
        [] => {
            let known = KNOWN.iter().find(|names| object.contains_key(names[names.len() - 1]));
            known.map_or_else(|| KNOWN[0].to_vec(), |names| names.to_vec())
        }
        named => named.iter().map(String::as_str).collect(),
    };
    if !names.iter().any(|name| object.contains_key(*name)) {
        return Err(("no_text", format!("no field {:?}", names.join(", "))));
    }
    let mut parts = Vec::new();
    for name in names {
        match object.remove(name) {
            None | Some(Value::Null) => {}
            Some(Value::String(part)) if part.trim().is_empty() => {}
            Some(Value::String(part)) => parts.push(part),
            Some(other) => return Err(wrong_type(name, &other)),
        }
    }
    match parts.as_mut_slice() {
        [only] => Ok(std::mem::take(only)),
        parts => Ok(parts.join("\n\n")),
    }
}

fn wrong_type(field: &str, value: &Value) -> (&'static str, String) {
    ("wrong_type", format!("field {field:?} is a JSON {}", name(value)))
}

fn name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(line: &str, fields: &Fields, expected: std::result::Result<(&str, &str), &str>) {
        let place = Place { file: "f".into(), record: 7, byte: 9 };
        let found = parse(line, "s", fields, &place);
        let found = found.as_ref().map(|document| (document.id.as_str(), document.text.as_str()));
        assert_eq!(found.map_err(|(reason, _)| *reason), expected, "{line}");
    }

    #[test]
    fn the_text_is_found_where_it_usually_is() {
        let fields = Fields::detected();
        check(r#"{"id":"a","text":"t","title":"x"}"#, &fields, Ok(("a", "t")));
        check(r#"{"id":5,"title":"x","abstract":"y"}"#, &fields, Ok(("5", "x\n\ny")));
        check(r#"{"id":null,"title":" ","abstract":"y"}"#, &fields, Ok(("f:7", "y")));
        check(r#"{"content":"c"}"#, &fields, Ok(("f:7", "c")));
        check(r#"{"text":""}"#, &fields, Ok(("f:7", "")));
    }

    #[test]
    fn or_where_the_user_says() {
        let fields = Fields { id: "url".into(), text: vec!["h".into(), "b".into()] };
        check(r#"{"url":"u","b":"two","h":"one","text":"no"}"#, &fields, Ok(("u", "one\n\ntwo")));
    }

    #[test]
    fn wrong_types_are_named() {
        let fields = Fields::detected();
        check(r#"{"id":"a","text":5}"#, &fields, Err("wrong_type"));
        check(r#"{"id":["a"],"text":"t"}"#, &fields, Err("wrong_type"));
        check(r#"{"id":"a"}"#, &fields, Err("no_text"));
        check(r#"["a"]"#, &fields, Err("not_an_object"));
        check(r#"{"id":"a","text":"t""#, &fields, Err("malformed_json"));
    }

    #[test]
    fn other_fields_are_kept_by_name() {
        let place = Place::default();
        let line = r#"{"id":"a","text":"t","year":1999,"tags":["x"],"lang":"en"}"#;
        let document = parse(line, "s", &Fields::detected(), &place).unwrap();
        let metadata: Vec<_> =
            document.metadata.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        assert_eq!(metadata, [("lang", "en"), ("tags", "[\"x\"]"), ("year", "1999")]);
    }
}
