//! The command line.
//!
//! Standard output is for what was asked for (a key, a status), standard error for everything else. The exit code says
//! who must act:
//!
//! | code | [`Exit`] | meaning |
//! | --- | --- | --- |
//! | 0 | `Ok` | done; of `run`: stopped in order, as asked |
//! | 1 | `Failed` | it was tried and failed; the message says what |
//! | 2 | `Usage` | wrong arguments |
//! | 3 | `Config` | the configuration is wrong, or a file that it names cannot be used; of `reload`: then nothing has changed |
//! | 4 | `Bind` | an address cannot be listened on: taken, or not permitted |
//! | 5 | `Store` | the store cannot be opened or written: disk, permission, damage |
//! | 6 | `Unreachable` | of `status`, `top`, `trace` and `reload`: nobody answers at the admin port |
//!
//! A supervisor need not try again after 2 and 3 (systemd: `RestartPreventExitStatus=2 3`).

use std::{
    io::{self, Read as _, Write as _},
    net::SocketAddr,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{self, ExitCode},
};

use clap::{Parser, Subcommand};

use crate::config::{Admin, Config, ConfigError, Warning};

mod explain;
mod keys;
pub mod log;
pub mod page;
pub mod reload;
pub mod run;
mod sockets;
pub mod status;
mod top;
mod trace;

/// How the process ended. The table above is for people, and is in `--help` too.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
#[repr(u8)]
pub enum Exit {
    Ok = 0,
    Failed = 1,
    Usage = 2,
    Config = 3,
    Bind = 4,
    Store = 5,
    Unreachable = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

const EXIT_CODES: &str = "\
Exit codes:
  0  done; of run: stopped in order, as asked
  1  it was tried and failed; the message says what
  2  wrong arguments
  3  the configuration is wrong, or a file that it names cannot be used
  4  an address cannot be listened on: taken, or not permitted
  5  the store cannot be opened or written: disk, permission, damage
  6  of status, top, trace and reload: nobody answers at the admin port";

/// Carries XMPP group chat over links that are thin, slow and often gone.
#[derive(Debug, Parser)]
#[command(name = "narrows", version, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the sidecar until SIGTERM
    #[command(after_help = EXIT_CODES)]
    Run {
        #[arg(short, long, value_name = "FILE", default_value = CONFIG_FILE)]
        config: PathBuf,
    },
    /// Say what is wrong with a configuration, without starting anything
    Check {
        #[arg(value_name = "FILE", default_value = CONFIG_FILE)]
        file: PathBuf,
    },
    /// Say what becomes of a stanza that is read from standard input: which rule takes it, its class, when it expires
    Explain {
        #[arg(value_name = "FILE", default_value = CONFIG_FILE)]
        file: PathBuf,
    },
    /// Make a private key, readable by its owner only, and print the public key that the peers need
    Keygen {
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// Print the public key that belongs to a private key
    Pubkey {
        #[arg(value_name = "FILE")]
        file: PathBuf,
    },
    /// The certificate authority that vouches for the far domains towards the local server
    #[command(subcommand)]
    Ca(Ca),
    /// Show a running sidecar's links and queues
    Status {
        /// The admin port, if not the one in the configuration
        #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
        admin: Option<SocketAddr>,
        #[arg(short, long, value_name = "FILE")]
        config: Option<PathBuf>,
        /// Print the answer as it came
        #[arg(long)]
        json: bool,
    },
    /// Watch a running sidecar's links and queues, live
    Top {
        /// The admin port, if not the one in the configuration
        #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
        admin: Option<SocketAddr>,
        #[arg(short, long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Show what a running sidecar does with each stanza, and why, until Ctrl-C
    ///
    /// Users' addresses and what they write are hidden. A watcher that is slow misses something and is told so; it never slows the sidecar.
    Trace {
        /// The admin port, if not the one in the configuration
        #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
        admin: Option<SocketAddr>,
        #[arg(short, long, value_name = "FILE")]
        config: Option<PathBuf>,
        #[command(flatten)]
        wanted: trace::Wanted,
    },
    /// Have a running sidecar read its configuration again; no connection is closed. SIGHUP does the same
    Reload {
        /// The admin port, if not the one in the configuration
        #[arg(long, value_name = "ADDRESS", conflicts_with = "config")]
        admin: Option<SocketAddr>,
        #[arg(short, long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Two sites, a satellite link and an outage on this machine (needs the source checkout, and root)
    Demo {
        /// people=20: how many enter the room over the link. talk=30: seconds of talk, before the cut and after it.
        /// cut=25: seconds without the link
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "KEY=NUMBER")]
        arguments: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
enum Ca {
    /// Make an authority in a new directory
    Init {
        #[arg(value_name = "DIR")]
        directory: PathBuf,
        /// Limits what the authority can vouch for to the far domains in this configuration
        #[arg(short, long, value_name = "FILE")]
        config: Option<PathBuf>,
    },
    /// Print the authority's certificate, for the local server's trust store
    Show {
        #[arg(value_name = "DIR")]
        directory: PathBuf,
    },
}

/// Where a package puts the configuration.
const CONFIG_FILE: &str = "/etc/narrows/narrows.yaml";

/// The whole program.
pub fn main() -> ExitCode {
    let exit = match Arguments::try_parse() {
        Ok(arguments) => execute(arguments.command),
        Err(error) => {
            let exit = if error.use_stderr() { Exit::Usage } else { Exit::Ok };
            // Nobody is left to be told if this fails.
            let _ = error.print();
            exit
        }
    };
    exit.into()
}

fn execute(command: Command) -> Exit {
    match command {
        Command::Run { config } => run(&config),
        Command::Check { file } => check(&file),
        Command::Explain { file } => explain(&file),
        Command::Keygen { file } => said(keys::generate(&file)),
        Command::Pubkey { file } => said(keys::public(&file)),
        Command::Ca(Ca::Init { directory, config }) => ca_init(&directory, config.as_deref()),
        Command::Ca(Ca::Show { directory }) => said(keys::ca_show(&directory)),
        Command::Status { admin, config, json } => status(admin, config.as_deref(), json),
        Command::Reload { admin, config } => reload(admin, config.as_deref()),
        Command::Top { admin, config } => top(admin, config.as_deref()),
        Command::Trace { admin, config, wanted } => trace(admin, config.as_deref(), &wanted),
        Command::Demo { arguments } => demo(&arguments),
    }
}

fn run(file: &Path) -> Exit {
    let (config, warnings) = match load(file) {
        Ok(loaded) => loaded,
        Err(errors) => return complain(&errors),
    };
    let leveller = match log::start(&config.log) {
        Ok(leveller) => leveller,
        Err(error) => {
            eprintln!("narrows: {error}");
            return Exit::Usage;
        }
    };
    for warning in warnings {
        // The excerpt is for a terminal; a log wants one line.
        let text = warning.to_string();
        tracing::warn!("{}", text.lines().next().unwrap_or_default());
    }
    run::run(file.to_owned(), config, leveller)
}

fn check(file: &Path) -> Exit {
    match load(file) {
        Ok((_, warnings)) => {
            for warning in &warnings {
                eprintln!("warning: {warning}\n");
            }
            say(&format!("{}: good\n", file.display()))
        }
        Err(errors) => complain(&errors),
    }
}

/// A stanza is no larger than the largest that a server may be allowed to send.
const STANZA_BYTES_MAX: u64 = 16 << 20;

fn explain(file: &Path) -> Exit {
    let config = match load(file) {
        Ok((config, _)) => config,
        Err(errors) => return complain(&errors),
    };
    let mut text = Vec::new();
    if let Err(error) = io::stdin().take(STANZA_BYTES_MAX).read_to_end(&mut text) {
        eprintln!("narrows: standard input: {error}");
        return Exit::Failed;
    }
    match explain::explain(&config, &text) {
        Ok(explained) => say(&explained),
        Err(error) => {
            eprintln!("narrows: {error}");
            Exit::Failed
        }
    }
}

fn load(file: &Path) -> Result<(Config, Vec<Warning>), Vec<ConfigError>> {
    Config::load_with(file, keys::own_key)
}

fn complain(errors: &[ConfigError]) -> Exit {
    for error in errors {
        eprintln!("error: {error}\n");
    }
    match errors.len() {
        1 => eprintln!("narrows: one error in the configuration"),
        count => eprintln!("narrows: {count} errors in the configuration"),
    }
    Exit::Config
}

fn ca_init(directory: &Path, config: Option<&Path>) -> Exit {
    let config = match config.map(load).transpose() {
        Ok(config) => config,
        Err(errors) => return complain(&errors),
    };
    said(keys::ca_init(directory, config.as_ref().map(|(config, _)| config)))
}

/// The admin port that is meant: as said, or as configured, or where it is by default.
fn admin_port(admin: Option<SocketAddr>, config: Option<&Path>) -> Result<SocketAddr, Exit> {
    match (admin, config.map(load).transpose()) {
        (_, Err(errors)) => Err(complain(&errors)),
        (Some(address), Ok(_)) => Ok(address),
        (None, Ok(Some((config, _)))) => Ok(config.admin.listen.0),
        (None, Ok(None)) => Ok(Admin::default().listen.0),
    }
}

fn top(admin: Option<SocketAddr>, config: Option<&Path>) -> Exit {
    let address = match admin_port(admin, config) {
        Ok(address) => address,
        Err(exit) => return exit,
    };
    // Told here, because the screen is cleared at the end.
    if let Err(error) = status::fetch(address) {
        eprintln!("narrows: {error}");
        return Exit::Unreachable;
    }
    match top::run(address) {
        Ok(()) => Exit::Ok,
        Err(error) => {
            eprintln!("narrows: the terminal: {error}");
            Exit::Failed
        }
    }
}

fn trace(admin: Option<SocketAddr>, config: Option<&Path>, wanted: &trace::Wanted) -> Exit {
    let address = match admin_port(admin, config) {
        Ok(address) => address,
        Err(exit) => return exit,
    };
    match trace::run(address, wanted) {
        Ok(()) => Exit::Ok,
        Err(trace::TraceError::Unreachable(error)) => {
            eprintln!("narrows: nobody answers at {address}: {error}");
            Exit::Unreachable
        }
        Err(error) => {
            eprintln!("narrows: {error}");
            Exit::Failed
        }
    }
}

fn reload(admin: Option<SocketAddr>, config: Option<&Path>) -> Exit {
    let address = match admin_port(admin, config) {
        Ok(address) => address,
        Err(exit) => return exit,
    };
    let outcome = match reload::ask(address) {
        Ok(outcome) => outcome,
        Err(error) => {
            eprintln!("narrows: {error}");
            return Exit::Unreachable;
        }
    };
    for warning in &outcome.warnings {
        eprintln!("warning: {warning}\n");
    }
    if outcome.errors.is_empty() {
        return say(&outcome.to_string());
    }
    for error in &outcome.errors {
        eprintln!("error: {error}\n");
    }
    eprintln!("narrows: the configuration was not taken, and nothing has changed");
    Exit::Config
}

fn status(admin: Option<SocketAddr>, config: Option<&Path>, json: bool) -> Exit {
    let address = match admin_port(admin, config) {
        Ok(address) => address,
        Err(exit) => return exit,
    };
    let value = match status::fetch(address) {
        Ok(value) => value,
        Err(error) => {
            eprintln!("narrows: {error}");
            return Exit::Unreachable;
        }
    };
    if json {
        return say(&format!("{value:#}\n"));
    }
    match serde_json::from_value::<status::Status>(value) {
        Ok(status) => say(&status.to_string()),
        Err(error) => {
            eprintln!("narrows: the answer of {address} is not understood ({error}); --json shows it");
            Exit::Failed
        }
    }
}

/// The demo needs real servers and network namespaces, so it is part of the tests and not of this binary.
fn demo(arguments: &[String]) -> Exit {
    let lab = std::env::current_exe().map(|narrows| narrows.with_file_name("narrows-lab"));
    match lab {
        Ok(lab) if lab.is_file() => {
            // Returns only if it fails.
            let error = process::Command::new(&lab).arg("demo").args(arguments).exec();
            eprintln!("narrows: {}: {error}", lab.display());
            Exit::Failed
        }
        Ok(_) | Err(_) => {
            eprintln!(
                "narrows: the demo is in the source checkout, not in this binary: run `sh tests/demo` there, as root.\n\
                 It installs and builds what it needs."
            );
            Exit::Failed
        }
    }
}

fn said(result: Result<String, keys::Failure>) -> Exit {
    match result {
        Ok(text) => say(&text),
        Err(failure) => {
            eprintln!("narrows: {failure}");
            Exit::Failed
        }
    }
}

/// Prints what was asked for. A reader that has gone (`| head`) is no failure of ours.
fn say(text: &str) -> Exit {
    match io::stdout().write_all(text.as_bytes()) {
        Ok(()) => Exit::Ok,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Exit::Ok,
        Err(error) => {
            eprintln!("narrows: standard output: {error}");
            Exit::Failed
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// The definition holds together (clap checks it only when it is used).
    #[test]
    fn arguments_are_well_defined() {
        Arguments::command().debug_assert();
    }
}
