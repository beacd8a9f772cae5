//! The log: one line an event, on stderr, where every supervisor reads it.
//!
//! Under systemd the journal has the time already and takes the level from a `<3>` in front (sd-daemon(3)), so that
//! `journalctl -p warning` works. Line breaks inside a value are escaped: nothing that a stranger sends makes a line of its own.

use std::{
    fmt::{self, Write as _},
    os::unix::fs::MetadataExt,
    time::SystemTime,
};

use serde_json::Value;
use tracing::{
    Event, Level, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter,
    fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, format::Writer},
    registry::LookupSpan,
};

use crate::config;

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error("RUST_LOG: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    #[error("the log was started before")]
    Started,
}

/// Changes the level of a log that has begun.
pub struct Leveller(Box<dyn Fn(EnvFilter) -> bool + Send>);

impl std::fmt::Debug for Leveller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Leveller(..)")
    }
}

impl Leveller {
    /// `false` if the level is not this one's to change, because of `RUST_LOG`.
    pub fn set(&self, level: config::Level) -> bool {
        overriding().is_none() && EnvFilter::try_new(directives(level)).is_ok_and(|filter| (self.0)(filter))
    }
}

fn overriding() -> Option<String> {
    std::env::var("RUST_LOG")
        .ok()
        .filter(|directives| !directives.is_empty())
}

/// From here on, events are written. `RUST_LOG` overrides the level.
pub fn start(log: &config::Log) -> Result<Leveller, LogError> {
    let filter = EnvFilter::try_new(overriding().unwrap_or_else(|| directives(log.level)))?;
    let form = match log.format {
        config::Format::Json => Form::Json,
        config::Format::Text if stderr_is_the_journal() => Form::Journal,
        config::Format::Text => Form::Text,
    };
    let lines = Lines {
        form,
        show_addresses: log.show_addresses,
    };
    let log = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .fmt_fields(lines)
        .event_format(lines)
        .with_env_filter(filter)
        .with_filter_reloading();
    let handle = log.reload_handle();
    log.try_init().map_err(|_| LogError::Started)?;
    Ok(Leveller(Box::new(move |filter| handle.reload(filter).is_ok())))
}

/// What the libraries say is only of interest when it is a warning.
fn directives(level: config::Level) -> String {
    let level = match level {
        config::Level::Error => return "error".to_owned(),
        config::Level::Warn => "warn",
        config::Level::Info => "info",
        config::Level::Debug => "debug",
        config::Level::Trace => "trace",
    };
    format!("warn,narrows={level}")
}

/// `JOURNAL_STREAM` names the journal's socket by device and inode (systemd.exec(5)). A child with its stderr elsewhere has
/// inherited the variable as well, so both are compared.
fn stderr_is_the_journal() -> bool {
    let Ok(named) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    std::fs::metadata("/proc/self/fd/2").is_ok_and(|stderr| named == format!("{}:{}", stderr.dev(), stderr.ino()))
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Form {
    Text,
    Journal,
    Json,
}

#[derive(Clone, Copy, Debug)]
struct Lines {
    form: Form,
    show_addresses: bool,
}

/// What an event or a span carries.
struct Fields {
    message: String,
    named: Vec<(&'static str, Value)>,
    show_addresses: bool,
}

impl Fields {
    fn new(show_addresses: bool) -> Self {
        Self {
            message: String::new(),
            named: Vec::new(),
            show_addresses,
        }
    }

    fn put(&mut self, field: &Field, value: Value) {
        self.named.push((field.name(), value));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // `Pii` shows itself in the alternate form only; see there.
        let text = if self.show_addresses {
            format!("{value:#?}")
        } else {
            format!("{value:?}")
        };
        if field.name() == "message" {
            self.message = text;
        } else {
            self.put(field, Value::String(text));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else {
            self.put(field, value.into());
        }
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, value.to_string().into());
    }
}

/// Spans: as `name=value` pairs.
impl<'w> FormatFields<'w> for Lines {
    fn format_fields<R: tracing_subscriber::field::RecordFields>(
        &self,
        mut writer: Writer<'w>,
        record: R,
    ) -> fmt::Result {
        let mut fields = Fields::new(self.show_addresses);
        record.record(&mut fields);
        write_pairs(&mut writer, &fields.named)
    }
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::new(self.show_addresses);
        event.record(&mut fields);
        let mut spans = String::new();
        for span in context.event_scope().into_iter().flat_map(|scope| scope.from_root()) {
            let extensions = span.extensions();
            let pairs = extensions
                .get::<FormattedFields<N>>()
                .map_or("", |pairs| pairs.as_str());
            write!(spans, "{}{{{}}}: ", span.name(), pairs.trim_start())?;
        }
        let metadata = event.metadata();
        let line = Line {
            level: *metadata.level(),
            target: metadata.target(),
            spans: &spans,
            fields: &fields,
        };
        match self.form {
            Form::Text => {
                let time = humantime::format_rfc3339_millis(SystemTime::now());
                write!(writer, "{time} {:5} ", line.level)?;
                line.write_text(&mut writer)
            }
            Form::Journal => {
                write!(writer, "<{}>", priority(line.level))?;
                line.write_text(&mut writer)
            }
            Form::Json => {
                let time = humantime::format_rfc3339_millis(SystemTime::now()).to_string();
                line.write_json(&mut writer, &time)
            }
        }
    }
}

struct Line<'l> {
    level: Level,
    target: &'l str,
    spans: &'l str,
    fields: &'l Fields,
}

impl Line<'_> {
    fn write_text(&self, writer: &mut impl fmt::Write) -> fmt::Result {
        // Our own modules are one program to its admin; a library's name is worth a word.
        if !self.target.starts_with("narrows") {
            write!(writer, "{}: ", self.target)?;
        }
        write_escaped(writer, self.spans)?;
        write_escaped(writer, &self.fields.message)?;
        write_pairs(writer, &self.fields.named)?;
        writer.write_char('\n')
    }

    fn write_json(&self, writer: &mut impl fmt::Write, time: &str) -> fmt::Result {
        let mut object = serde_json::Map::new();
        object.insert("time".to_owned(), time.into());
        object.insert("level".to_owned(), self.level.as_str().to_ascii_lowercase().into());
        object.insert("message".to_owned(), self.fields.message.as_str().into());
        for (name, value) in &self.fields.named {
            object.insert((*name).to_owned(), value.clone());
        }
        if !self.spans.is_empty() {
            object.insert("in".to_owned(), self.spans.trim_end_matches([':', ' ']).into());
        }
        object.insert("target".to_owned(), self.target.into());
        writeln!(writer, "{}", Value::Object(object))
    }
}

/// syslog(3): 3 error, 4 warning, 6 informational, 7 debug.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

fn write_pairs(writer: &mut impl fmt::Write, pairs: &[(&'static str, Value)]) -> fmt::Result {
    for (name, value) in pairs {
        write!(writer, " {name}=")?;
        match value {
            // With quotes only where the end would not be seen.
            Value::String(text) if text.is_empty() || text.contains([' ', '"', '=']) => {
                writer.write_char('"')?;
                write_escaped(writer, &text.replace('"', "\\\""))?;
                writer.write_char('"')?;
            }
            Value::String(text) => write_escaped(writer, text)?,
            other => write!(writer, "{other}")?,
        }
    }
    Ok(())
}

/// Control characters could forge lines or drive a terminal.
fn write_escaped(writer: &mut impl fmt::Write, text: &str) -> fmt::Result {
    for c in text.chars() {
        if c.is_control() {
            write!(writer, "{}", c.escape_default())?;
        } else {
            writer.write_char(c)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use super::*;
    use crate::pii::Pii;

    #[derive(Clone, Default)]
    struct Captured(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Captured {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(form: Form, show_addresses: bool, events: impl FnOnce()) -> String {
        let captured = Captured::default();
        let writer = captured.clone();
        let lines = Lines { form, show_addresses };
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(EnvFilter::new(directives(config::Level::Info)))
            .with_writer(move || writer.clone())
            .fmt_fields(lines)
            .event_format(lines)
            .finish();
        tracing::subscriber::with_default(subscriber, events);
        let bytes = captured.0.lock().unwrap().clone();
        String::from_utf8(bytes).unwrap()
    }

    fn events() {
        let _span = tracing::info_span!("link", peer = "shore").entered();
        tracing::warn!(from = %Pii("nurse@ship.example"), n = 3, why = "a \"b\"\nc", "Stanza\nrefused.");
        tracing::debug!("Not shown at this level.");
        tracing::info!(target: "library", "Not shown: not ours.");
    }

    /// The journal gets a priority and no time; a value cannot begin a new line; addresses are hidden.
    #[test]
    fn journal_lines_have_a_priority() {
        assert_eq!(
            logged(Form::Journal, false, events),
            "<4>link{peer=shore}: Stanza\\nrefused. from=\"<18 bytes hidden>\" n=3 why=\"a \\\"b\\\"\\nc\"\n"
        );
    }

    /// Addresses are shown when that is asked for.
    #[test]
    fn addresses_are_shown_on_request() {
        assert!(logged(Form::Journal, true, events).contains(" from=nurse@ship.example n=3 "));
    }

    /// Text has the time and the level in front.
    #[test]
    fn text_lines_have_time_and_level() {
        let text = logged(Form::Text, false, events);
        let (time, rest) = text.split_at("2026-11-20T12:00:00.000Z".len());
        assert!(humantime::parse_rfc3339(time).is_ok(), "{text}");
        assert!(rest.starts_with(" WARN  link{peer=shore}: Stanza"), "{text}");
        assert_eq!(text.lines().count(), 1);
    }

    /// JSON is one object a line, with the fields as they are.
    #[test]
    fn json_lines_are_objects() {
        let text = logged(Form::Json, false, events);
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["level"], "warn");
        assert_eq!(value["message"], "Stanza\nrefused.");
        assert_eq!(value["n"], 3);
        assert_eq!(value["in"], "link{peer=shore}");
        assert_eq!(text.lines().count(), 1);
    }
}
