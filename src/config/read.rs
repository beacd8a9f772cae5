//! From YAML text to checked types, with every mistake found in one pass and shown where it is.
//!
//! Serde stops at the first mistake and a YAML value does not remember its line. So a mistake is noted, the value is
//! replaced by a harmless one and the reading is done again; and a place is found by walking the text once more along
//! the path and failing there on purpose, since the parser says where it failed. Both are slow and need not be fast.

use std::{fmt, io, path::Path, path::PathBuf};

use serde::de::{self, DeserializeOwned, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_path_to_error::Segment;
use serde_yaml::Value;

/// Mistakes that are reported at most. More say no more, and each costs a reading of the file.
const ERRORS_MAX: usize = 32;

/// A word is suggested when it is at least this much like what was written (Jaro-Winkler, 0 to 1).
const ALIKE_MIN: f64 = 0.75;

/// Something wrong with the configuration. `Display` shows the place, an excerpt and help.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ConfigError(Box<Message>);

/// Something odd that does not stop the start.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Warning(Box<Message>);

#[derive(Clone, Debug, Eq, PartialEq)]
struct Message {
    file: PathBuf,
    place: Option<Place>,
    path: String,
    text: String,
    help: Option<String>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct Place {
    line: usize,
    column: usize,
    excerpt: String,
}

/// One step from the top of the file to a value.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Step {
    Key(String),
    Index(usize),
}

impl From<&str> for Step {
    fn from(key: &str) -> Self {
        Self::Key(key.to_owned())
    }
}

impl From<usize> for Step {
    fn from(index: usize) -> Self {
        Self::Index(index)
    }
}

/// The path to a value: `at!["peers", 0, "name"]`.
macro_rules! at {
    ($($step:expr),* $(,)?) => { vec![$(crate::config::read::Step::from($step)),*] };
}
pub(super) use at;

/// What the checks across keys found.
#[derive(Debug, Default)]
pub(super) struct Report {
    errors: Vec<Finding>,
    warnings: Vec<Finding>,
}

#[derive(Debug)]
struct Finding {
    path: Vec<Step>,
    /// Other values that the finding rests on: if one of them is itself wrong, the finding is not made.
    rests_on: Vec<Vec<Step>>,
    text: String,
}

impl Report {
    pub(super) fn error(&mut self, path: Vec<Step>, rests_on: Vec<Vec<Step>>, text: impl Into<String>) {
        let text = text.into();
        self.errors.push(Finding { path, rests_on, text });
    }

    pub(super) fn warning(&mut self, path: Vec<Step>, text: impl Into<String>) {
        let (rests_on, text) = (Vec::new(), text.into());
        self.warnings.push(Finding { path, rests_on, text });
    }
}

/// Reads `text`, with the keys of the profile that it names where it has none of its own. `profile` knows profiles by name.
pub(super) fn read<T: DeserializeOwned>(
    file: &Path,
    text: &str,
    profile: impl FnOnce(&str) -> Option<(&'static str, &'static str)>,
    check: impl FnOnce(&T, &mut Report),
) -> Result<(T, Vec<Warning>), Vec<ConfigError>> {
    let mut source = Source {
        file,
        text,
        profile: None,
    };
    let mut value = source.parse().map_err(|error| vec![error])?;
    let named = value.get(PROFILE).and_then(Value::as_str);
    if let Some((name, text)) = named.and_then(profile) {
        // Ours is right; a test holds it to that.
        let under: Value = serde_yaml::from_str(text).unwrap_or_default();
        source.profile = Some((name, missing(&under, &value)));
        underlay(&mut value, under);
    }
    let mut errors = Vec::new();
    let mut wrong: Vec<Vec<Step>> = Vec::new();

    let parsed = loop {
        let mistake = match serde_path_to_error::deserialize::<_, T>(value.clone()) {
            Ok(parsed) => break Some(parsed),
            Err(error) => Mistake::new(&value, &error),
        };
        if let Some(mistake) = &mistake.report
            && !wrong.contains(&mistake.path)
        {
            errors.push(source.error(mistake));
            wrong.push(mistake.path.clone());
            // A misspelt key is one mistake: that the right one is missing is not a second.
            wrong.extend(mistake.meant.clone());
        }
        // A repair that changes nothing would be tried for ever.
        if errors.len() >= ERRORS_MAX || !mistake.repair(&mut value) {
            break None;
        }
    };

    let mut report = Report::default();
    if let Some(parsed) = &parsed {
        check(parsed, &mut report);
    }
    let rests_on_wrong = |finding: &Finding| {
        std::iter::once(&finding.path).chain(&finding.rests_on).any(|path| {
            wrong
                .iter()
                .any(|wrong| path.starts_with(wrong) || wrong.starts_with(path))
        })
    };
    let found = |finding: &Finding| Box::new(source.message(Target::Value, &finding.path, &finding.text, None));
    errors.extend(
        report
            .errors
            .iter()
            .filter(|finding| !rests_on_wrong(finding))
            .map(|finding| ConfigError(found(finding))),
    );
    let place = |error: &ConfigError| error.0.place.as_ref().map(|place| (place.line, place.column));
    errors.sort_by_key(place);
    match parsed {
        Some(parsed) if errors.is_empty() => Ok((
            parsed,
            report.warnings.iter().map(|finding| Warning(found(finding))).collect(),
        )),
        _ => Err(errors),
    }
}

/// Why a value could not be read, and how the reading can go on after it.
#[derive(Debug)]
struct Mistake {
    report: Option<Reported>,
    path: Vec<Step>,
    repair: Repair,
}

#[derive(Debug)]
struct Reported {
    target: Target,
    path: Vec<Step>,
    /// The key that was probably meant by an unknown one.
    meant: Option<Vec<Step>>,
    text: String,
    help: Option<String>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Repair {
    Remove,
    Replace,
}

impl Mistake {
    fn new(value: &Value, error: &serde_path_to_error::Error<serde_yaml::Error>) -> Self {
        let mut path: Vec<Step> = Vec::new();
        for segment in error.path() {
            match segment {
                Segment::Map { key } => path.push(Step::Key(key.clone())),
                Segment::Seq { index } => path.push(Step::Index(*index)),
                Segment::Enum { .. } | Segment::Unknown => break,
            }
        }
        let text = error.inner().to_string();
        let quoted: Vec<&str> = text.split('`').skip(1).step_by(2).collect();

        if let (true, Some((unknown, known))) = (text.starts_with("unknown field"), quoted.split_first()) {
            if path.last() != Some(&Step::from(*unknown)) {
                path.push(Step::from(*unknown));
            }
            let likely = likely(unknown, known);
            let help = match likely {
                Some(likely) => format!("did you mean `{likely}`?"),
                None => format!("possible here: {}", known.join(", ")),
            };
            let meant = likely.map(|likely| {
                let mut meant = path.clone();
                meant.pop();
                meant.push(Step::from(likely));
                meant
            });
            let report = Reported {
                target: Target::Key,
                path: path.clone(),
                meant,
                text: "there is no such key".to_owned(),
                help: Some(help),
            };
            return Self {
                report: Some(report),
                path,
                repair: Repair::Remove,
            };
        }
        if let (true, Some(missing)) = (text.starts_with("missing field"), quoted.first()) {
            let parent = path.clone();
            path.push(Step::from(*missing));
            let report = Reported {
                // Point at the name of the section that lacks the key, or at the top of the file.
                target: match parent.last() {
                    Some(Step::Key(_)) => Target::Key,
                    Some(Step::Index(_)) | None => Target::Value,
                },
                path: path.clone(),
                meant: None,
                text: "this key is needed".to_owned(),
                help: None,
            };
            return Self {
                report: Some(report),
                path,
                repair: Repair::Replace,
            };
        }
        // `link:` with nothing behind it is the same as no `link` at all.
        if lookup(value, &path).is_some_and(Value::is_null) && !path.is_empty() {
            return Self {
                report: None,
                path,
                repair: Repair::Remove,
            };
        }
        let (text, help) = match quoted.split_first() {
            Some((unknown, known)) if text.starts_with("unknown variant") => (
                format!("`{unknown}` is not possible here, only {}", known.join(", ")),
                likely(unknown, known).map(|likely| format!("did you mean `{likely}`?")),
            ),
            _ => (in_plain_words(&text), None),
        };
        let report = Reported {
            target: Target::Value,
            path: path.clone(),
            meant: None,
            text,
            help,
        };
        Self {
            report: Some(report),
            path,
            repair: Repair::Replace,
        }
    }

    /// Puts something readable in the wrong value's place. `false` if that cannot be done.
    fn repair(&self, value: &mut Value) -> bool {
        let harmless = serde_yaml::from_str::<Value>(HARMLESS)
            .ok()
            .and_then(|harmless| lookup(&harmless, &self.path).cloned())
            .filter(|_| self.repair == Repair::Replace);
        let Some((last, parent)) = self.path.split_last() else {
            return false;
        };
        let mut at = value;
        for step in parent {
            let next = match step {
                Step::Key(key) => at.get_mut(key.as_str()),
                Step::Index(index) => at.get_mut(*index),
            };
            match next {
                Some(next) => at = next,
                None => return false,
            }
        }
        match (at, last, harmless) {
            (Value::Mapping(mapping), Step::Key(key), Some(harmless)) => {
                mapping.insert(Value::from(key.as_str()), harmless.clone()) != Some(harmless)
            }
            (Value::Mapping(mapping), Step::Key(key), None) => mapping.shift_remove(key.as_str()).is_some(),
            (Value::Sequence(items), Step::Index(index), Some(harmless)) => match items.get_mut(*index) {
                Some(item) if *item != harmless => {
                    *item = harmless;
                    true
                }
                _ => false,
            },
            _ => false,
        }
    }
}

/// What stands in for a wrong value that cannot simply be left out. Never used: after a mistake nothing starts.
const HARMLESS: &str = "
site: x
data_dir: /x
local: {domains: [x.invalid]}
legs: {listen: ['127.0.0.1:1'], certificate: {chain: /x, key: /x}}
link: {private_key: /x}
queue: {rules: [{name: x, match: {type: [chat]}, strip: [x]}]}
mirror: {rooms: [{match: x@x.invalid, echo: auto}]}
peers:
- {name: x, domains: [x.invalid], public_key: AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=}
";

/// Follows `path`; of [`HARMLESS`] every item of a list is the first.
fn lookup<'v>(value: &'v Value, path: &[Step]) -> Option<&'v Value> {
    path.iter().try_fold(value, |value, step| match (step, value) {
        (Step::Key(key), value) => value.get(key.as_str()),
        (Step::Index(index), Value::Sequence(items)) => items.get(*index).or(items.first()),
        (Step::Index(_), _) => None,
    })
}

/// The known word that looks most like what was written.
fn likely<'k>(written: &str, known: &[&'k str]) -> Option<&'k str> {
    let likeness = |known: &&str| strsim::jaro_winkler(&written.to_lowercase(), known);
    let best = known
        .iter()
        .max_by(|one, other| likeness(one).total_cmp(&likeness(other)))?;
    (likeness(best) >= ALIKE_MIN).then_some(*best)
}

/// Serde's message in the words of someone who writes YAML and not Rust.
fn in_plain_words(text: &str) -> String {
    const WORDS: &[(&str, &str)] = &[
        ("invalid type: ", "this is "),
        ("invalid value: ", "this is "),
        ("is sequence", "is a list"),
        ("is map", "is a section"),
        ("is string", "is the text"),
        ("is integer", "is the number"),
        ("is floating point", "is the number"),
        ("is boolean", "is"),
        ("is unit value", "is nothing"),
        (", expected ", ", but it must be "),
        ("be struct ", "be a section with the keys of "),
        ("be a sequence", "be a list"),
        ("be a boolean", "be true or false"),
        ("be path string", "be a path"),
    ];
    let mut text = WORDS
        .iter()
        .fold(text.to_owned(), |text, (from, to)| text.replace(from, to));
    for integer in ["u8", "u16", "u32", "u64"] {
        if let Some(before) = text.strip_suffix(&format!("be {integer}")) {
            text = format!("{before}be a whole number, and not too large");
        }
    }
    text
}

struct Source<'s> {
    file: &'s Path,
    text: &'s str,
    /// The profile, and what it has that the file has not.
    profile: Option<(&'static str, Value)>,
}

/// The key that names the profile.
const PROFILE: &str = "profile";

/// Puts what is missing in its place. What stands there wins, but for `key:` with nothing behind it.
fn underlay(own: &mut Value, under: Value) {
    match (own, under) {
        (own @ Value::Null, under) => *own = under,
        (Value::Mapping(own), Value::Mapping(under)) => {
            for (key, under) in under {
                underlay(own.entry(key).or_insert(Value::Null), under);
            }
        }
        _ => {}
    }
}

/// What [`underlay`] would put in.
fn missing(under: &Value, own: &Value) -> Value {
    match (under, own) {
        (under, Value::Null) => under.clone(),
        (Value::Mapping(under), Value::Mapping(own)) => {
            let of = |key: &Value| own.get(key).unwrap_or(&Value::Null);
            let missing = under.iter().map(|(key, under)| (key.clone(), missing(under, of(key))));
            Value::Mapping(missing.filter(|(_, missing)| !missing.is_null()).collect())
        }
        _ => Value::Null,
    }
}

impl Source<'_> {
    fn parse(&self) -> Result<Value, ConfigError> {
        let value: Value = match serde_yaml::from_str(self.text) {
            Ok(value) => value,
            Err(error) => {
                let twice = Twice(Vec::new()).deserialize(serde_yaml::Deserializer::from_str(self.text));
                return Err(self.syntax_error(&twice.err().unwrap_or(error)));
            }
        };
        if !value.is_mapping() {
            return Err(ConfigError(Box::new(Message {
                file: self.file.to_owned(),
                place: None,
                path: String::new(),
                text: "this holds no configuration: it must begin with keys like `site:`".to_owned(),
                help: None,
            })));
        }
        Ok(value)
    }

    fn syntax_error(&self, error: &serde_yaml::Error) -> ConfigError {
        let text = error.to_string();
        let text = text.split(" at line ").next().unwrap_or(&text);
        ConfigError(Box::new(Message {
            file: self.file.to_owned(),
            place: error.location().map(|at| self.place(at.line(), at.column())),
            path: String::new(),
            text: text.to_owned(),
            help: self
                .text
                .lines()
                .any(|line| line.trim_start_matches(' ').starts_with('\t'))
                .then(|| "YAML is indented with spaces, not with tabs".to_owned()),
        }))
    }

    fn error(&self, mistake: &Reported) -> ConfigError {
        ConfigError(Box::new(self.message(
            mistake.target,
            &mistake.path,
            &mistake.text,
            mistake.help.clone(),
        )))
    }

    /// A message at the value (or its key), or at the nearest thing around it that the file has.
    fn message(&self, target: Target, path: &[Step], text: &str, help: Option<String>) -> Message {
        let place = (0..=path.len()).rev().find_map(|length| {
            // A section that lacks something is best shown by its name.
            let target = match path.get(length.wrapping_sub(1)) {
                Some(Step::Key(_)) if length < path.len() => Target::Key,
                _ => target,
            };
            self.locate(target, &path[..length])
        });
        let help = match &self.profile {
            // A scalar: of a section the file may have the rest.
            Some((name, value)) if lookup(value, path).is_some_and(|value| !value.is_mapping()) => Some(format!(
                "this value comes from `profile: {name}`; the key in this file would win"
            )),
            _ => help,
        };
        Message {
            file: self.file.to_owned(),
            place,
            path: show(path),
            text: text.to_owned(),
            help,
        }
    }

    fn locate(&self, target: Target, path: &[Step]) -> Option<Place> {
        let error = Locate { target, path }
            .deserialize(serde_yaml::Deserializer::from_str(self.text))
            .err()?;
        let at = error.location()?;
        Some(self.place(at.line(), at.column()))
    }

    fn place(&self, line: usize, column: usize) -> Place {
        Place {
            line,
            column,
            excerpt: self
                .text
                .lines()
                .nth(line.saturating_sub(1))
                .unwrap_or_default()
                .to_owned(),
        }
    }
}

fn show(path: &[Step]) -> String {
    let mut text = String::new();
    for step in path {
        match step {
            Step::Key(key) if text.is_empty() => text.push_str(key),
            Step::Key(key) => text.extend([".", key]),
            Step::Index(index) => text.push_str(&format!("[{index}]")),
        }
    }
    text
}

/// For a [`Visitor`] of what lies in sections and lists: a scalar is right wherever it stands.
macro_rules! pass_over_scalars {
    () => { pass_over_scalars! { visit_str: &str, visit_bool: bool, visit_u64: u64, visit_i64: i64, visit_f64: f64 } };
    ($($visit:ident: $scalar:ty),*) => {
        $(fn $visit<E: de::Error>(self, _: $scalar) -> Result<(), E> {
            Ok(())
        })*

        fn visit_unit<E: de::Error>(self) -> Result<(), E> {
            Ok(())
        }
    };
}

/// Whether the name or what it stands for is meant.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Target {
    Key,
    Value,
}

/// Walks along `path` and fails at its end; the error has the location. It succeeds if there is no such place.
#[derive(Clone, Copy)]
struct Locate<'p> {
    target: Target,
    path: &'p [Step],
}

/// Takes nothing, so every value is an error where it stands.
struct Fail;

impl Visitor<'_> for Fail {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nothing")
    }
}

impl<'de> DeserializeSeed<'de> for Locate<'_> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.path.is_empty() {
            deserializer.deserialize_any(Fail)
        } else {
            deserializer.deserialize_any(self)
        }
    }
}

impl<'de> Visitor<'de> for Locate<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a section")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((Step::Key(wanted), rest)) = self.path.split_first() else {
            while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            return Ok(());
        };
        let fail = rest.is_empty() && self.target == Target::Key;
        while let Some(found) = map.next_key_seed(LocateKey { wanted, fail })? {
            if found {
                map.next_value_seed(Self { path: rest, ..self })?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let (mut index, split) = (0, self.path.split_first());
        loop {
            let more = match split {
                Some((Step::Index(wanted), rest)) if *wanted == index => {
                    items.next_element_seed(Self { path: rest, ..self })?.is_some()
                }
                _ => items.next_element::<IgnoredAny>()?.is_some(),
            };
            if !more {
                return Ok(());
            }
            index += 1;
        }
    }

    // A scalar stands where the path goes on: not the place that was meant, but near enough to go back from.
    pass_over_scalars!();
}

#[derive(Clone, Copy)]
struct LocateKey<'p> {
    wanted: &'p str,
    fail: bool,
}

impl<'de> DeserializeSeed<'de> for LocateKey<'_> {
    type Value = bool;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for LocateKey<'_> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<bool, E> {
        match key == self.wanted {
            true if self.fail => Err(E::custom("here")),
            found => Ok(found),
        }
    }
}

/// Fails at the first key that stands twice in its section; the parser itself does not say where.
struct Twice(Vec<String>);

struct Unseen<'s>(&'s mut Vec<String>);

impl<'de> DeserializeSeed<'de> for Twice {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Twice {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while map.next_key_seed(Unseen(&mut self.0))?.is_some() {
            map.next_value_seed(Self(Vec::new()))?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Self(Vec::new()))?.is_some() {}
        Ok(())
    }

    pass_over_scalars!();
}

impl<'de> DeserializeSeed<'de> for Unseen<'_> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for Unseen<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, key: &str) -> Result<(), E> {
        if self.0.iter().any(|seen| seen == key) {
            return Err(E::custom(format!("`{key}` stands here twice")));
        }
        self.0.push(key.to_owned());
        Ok(())
    }
}

impl ConfigError {
    pub(super) fn unreadable(file: &Path, error: &io::Error) -> Self {
        Self(Box::new(Message {
            file: file.to_owned(),
            place: None,
            path: String::new(),
            text: format!("the file cannot be read: {error}"),
            help: None,
        }))
    }

    /// Line and column, from 1, if the mistake has a place.
    pub fn line_and_column(&self) -> Option<(usize, usize)> {
        self.0.place.as_ref().map(|place| (place.line, place.column))
    }
}

impl Message {
    fn write(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file.display())?;
        if let Some(place) = &self.place {
            write!(f, ":{}:{}", place.line, place.column)?;
        }
        if !self.path.is_empty() {
            write!(f, ": {}", self.path)?;
        }
        write!(f, ": {}", self.text)?;
        if let Some(place) = &self.place {
            let number = place.line.to_string();
            let margin = " ".repeat(number.len());
            let column = place.column.saturating_sub(1);
            // Tabs stay tabs, so that the caret stands where the eye expects it.
            let indent: String = place
                .excerpt
                .chars()
                .take(column)
                .map(|c| if c == '\t' { '\t' } else { ' ' })
                .collect();
            write!(f, "\n {number} | {}\n {margin} | {indent}^", place.excerpt)?;
        }
        if let Some(help) = &self.help {
            write!(f, "\n   help: {help}")?;
        }
        Ok(())
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f)
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.write(f)
    }
}

impl std::error::Error for ConfigError {}
