//! What a room message costs on the link, and how long it takes: the pair, plain S2S, and plain S2S through `ssh -C`, in one run.
//!
//! Real servers in the lab's worlds, on a link without limits; bytes are the emulator's, at IP level and of both directions.
//! `cargo bench --bench link` runs everything, `-- --quick` a little of everything; `-- --joins` measures instead what it costs that
//! users behind the link enter a room, and beside it the same through a zstd stream; `-- --waits`, how long a line takes on 9600 bit/s while
//! other things cross. Needs root and the packages of `tests/setup`,
//! for the tunnel also openssh-server.

mod join;
mod lines;
mod squeeze;
mod talk;
mod tunnel;
mod waits;

use std::process::ExitCode;
use std::time::Duration;

use narrows_lab::client::{Failure, Outcome};
use narrows_lab::scenario::accounts;
use narrows_lab::{Ejabberd, Kind, Layout, Limits, Profile, Prosody, ServerSpec, SidecarSpec, World};

use join::Join;
use lines::{Line, Lines, Shape};
use talk::{Figures, Speaks, Talk, percentile};

/// The conversation runs faster than life by this, and with it the delay of acknowledgements: what is on the link for a line is
/// the same, in a quarter of the time.
const FASTER: u32 = 4;

/// A busy room: a line every second.
const BUSY: Duration = Duration::from_secs(1);

/// A quiet one, in which every line is acknowledged by itself.
const QUIET: Duration = Duration::from_secs(10);

/// The default of `link.ack_delay`.
const ACK_DELAY: Duration = Duration::from_secs(5);

struct Plan {
    occupants: Vec<usize>,
    lines: usize,
    hosts: Vec<Kind>,
    joins: bool,
    waits: bool,
    ways: Vec<Way>,
    link: Profile,
}

/// How the far server is reached.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Way {
    Pair,
    Plain,
    Tunnel,
    /// Only for joins: it differs from the tunnel in the compressor alone.
    Squeezed,
}

impl Way {
    const ALL: [Self; 3] = [Self::Pair, Self::Plain, Self::Tunnel];

    fn name(self) -> &'static str {
        match self {
            Self::Pair => "narrows",
            Self::Plain => "plain S2S",
            Self::Tunnel => "plain S2S through `ssh -C`",
            Self::Squeezed => "plain S2S through zstd -9",
        }
    }
}

/// One row's circumstances.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Case {
    host: Kind,
    occupants: usize,
    speaks: Speaks,
    shape: Shape,
    quiet: bool,
}

impl Case {
    fn pace(self) -> Duration {
        if self.quiet { QUIET } else { BUSY }
    }
}

type Measured = Vec<(Way, Case, Figures)>;

fn main() -> ExitCode {
    let measured = plan().and_then(|plan| {
        let lines = Lines::find()?;
        println!("{}; {} lines a measurement.", lines.source, plan.lines);
        if plan.waits {
            waits::measure(&lines)?;
            return Ok(Measured::new());
        }
        if let Some(why) = tunnel::missing() {
            println!("No tunnel: {why}.");
        }
        if plan.joins {
            print_joins(&enter_rooms(&plan, &lines)?);
            return Ok(Measured::new());
        }
        let mut measured = Measured::new();
        for host in &plan.hosts {
            for way in plan.ways.iter().copied() {
                if way == Way::Squeezed || way == Way::Tunnel && tunnel::missing().is_some() {
                    continue;
                }
                let failed = |Failure(why)| Failure(format!("room on {}, {}: {why}", host.name(), way.name()));
                match converse(&plan, *host, way, &lines, &mut measured).map_err(failed) {
                    // What others do is only for comparison: what was measured is shown.
                    Err(Failure(why)) if way != Way::Pair => eprintln!("{why}"),
                    result => result?,
                }
            }
        }
        Ok(measured)
    });
    match measured {
        Ok(measured) if measured.is_empty() => ExitCode::SUCCESS,
        Ok(measured) => {
            print_bytes(&measured);
            print_latency(&measured);
            ExitCode::SUCCESS
        }
        Err(failure) => {
            eprintln!("link: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn plan() -> Outcome<Plan> {
    let mut plan = Plan {
        occupants: vec![1, 10, 50, 100],
        lines: 40,
        hosts: vec![Kind::Prosody, Kind::Ejabberd],
        joins: false,
        waits: false,
        ways: vec![Way::Pair, Way::Plain, Way::Tunnel, Way::Squeezed],
        link: Profile::lan(),
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--quick" => {
                plan.occupants = vec![1, 10];
                plan.lines = 8;
                plan.hosts = vec![Kind::Prosody];
            }
            "--joins" => plan.joins = true,
            "--waits" => plan.waits = true,
            "--pair" => plan.ways = vec![Way::Pair],
            "--prosody" => plan.hosts = vec![Kind::Prosody],
            "--ejabberd" => plan.hosts = vec![Kind::Ejabberd],
            "--link" => {
                let name = words.next().unwrap_or_default();
                plan.link = Profile::named(&name).ok_or_else(|| Failure(format!("--link {name}: no such link")))?;
            }
            "--occupants" => {
                let list = words.next().unwrap_or_default();
                let numbers = list.split(',').map(str::parse).collect::<Result<Vec<usize>, _>>();
                plan.occupants = numbers.map_err(|error| Failure(format!("--occupants {list}: {error}")))?;
            }
            other => {
                return Err(Failure(format!(
                    "{other}: known are --quick, --joins, --waits, --pair, --prosody, --ejabberd, --occupants 1,50, --link sat9600"
                )));
            }
        }
    }
    Ok(plan)
}

fn server(kind: Kind) -> ServerSpec {
    let spec = match kind {
        Kind::Prosody => Prosody::stock(),
        Kind::Ejabberd => Ejabberd::stock(),
    };
    // Prosody's shipped 30 kB/s for what other servers send would make plain S2S take minutes.
    spec.limits(Limits::Off)
}

/// A world in which the far server is reached in this way.
fn world(plan: &Plan, host: Kind, way: Way, users: usize) -> Outcome<World> {
    let layout = match way {
        Way::Pair => {
            let delay = format!("ack_delay: {}ms", (ACK_DELAY / FASTER).as_millis());
            Layout::Sidecar(SidecarSpec::new(env!("CARGO_BIN_EXE_narrows")).yaml("link", &delay))
        }
        Way::Plain | Way::Tunnel | Way::Squeezed => Layout::Direct,
    };
    let far = match host {
        Kind::Prosody => Kind::Ejabberd,
        Kind::Ejabberd => Kind::Prosody,
    };
    let world = World::builder("bench")
        .link(plan.link)
        .site_a(server(host).insecure_domains(["b.example", "conference.b.example"]))
        .site_b(server(far).insecure_domains(["a.example", "conference.a.example"]))
        .users_a(accounts(users))
        .users_b(accounts(users))
        .layout(layout)
        .start()?;
    Ok(world)
}

type Joins = Vec<(Kind, Way, Vec<Join>)>;

fn enter_rooms(plan: &Plan, lines: &Lines) -> Outcome<Joins> {
    let mut joins = Joins::new();
    for host in plan.hosts.iter().copied() {
        for way in plan.ways.iter().copied() {
            if way == Way::Tunnel && tunnel::missing().is_some() {
                continue;
            }
            eprintln!("room on {}, {} …", host.name(), way.name());
            let world = world(plan, host, way, join::OCCUPANTS)?;
            let mut tunnel = None;
            match way {
                Way::Pair | Way::Plain => {}
                Way::Tunnel => tunnel = Some(tunnel::Tunnel::lay(&world)?),
                Way::Squeezed => squeeze::squeeze(&world)?,
            }
            let quiet = Duration::from_millis(600);
            let rest = match way {
                Way::Pair => ACK_DELAY / FASTER + quiet,
                Way::Plain | Way::Tunnel | Way::Squeezed => quiet,
            };
            let history = lines.slice(0, join::HISTORY);
            joins.push((host, way, join::measure(&world, way == Way::Pair, &history, rest)?));
            drop(tunnel);
        }
    }
    Ok(joins)
}

fn print_joins(joins: &Joins) {
    println!("\n### Bytes of a join\n");
    println!(
        "{0} occupants near the room and {1} lines of history, then {0} users join from behind the link, one by one. Bytes to the users + \
         to the room.\n",
        join::OCCUPANTS,
        join::HISTORY
    );
    println!("| room on | | join 1 | join 2 | join 25 | join 50 | each of 2 to 50 |");
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: |");
    let row = |host: Kind, what: &str, bytes: Vec<join::Bytes>| {
        let further = join::Bytes::mean(bytes[1..].iter().copied());
        let cells = [bytes[0], bytes[1], bytes[24], bytes[49], further];
        let cells = cells.map(|bytes| format!("{} + {}", bytes.to_users, bytes.to_room));
        println!("| {} | {what} | {} |", host.name(), cells.join(" | "));
    };
    for (host, way, joins) in joins {
        if let Some(frames) = joins.iter().map(|join| join.frames).collect() {
            row(*host, &format!("**{}**, frames", way.name()), frames);
        }
        let at_ip = joins.iter().map(|join| join.ip).collect();
        row(*host, &format!("{}, IP", way.name()), at_ip);
    }
}

/// All cases of one host and one way, in one world.
fn converse(plan: &Plan, host: Kind, way: Way, lines: &Lines, measured: &mut Measured) -> Outcome {
    let most = plan.occupants.iter().copied().max().unwrap_or_default();
    let (pace, ack_delay) = (BUSY / FASTER, ACK_DELAY / FASTER);
    eprintln!("room on {}, {} …", host.name(), way.name());
    let world = world(plan, host, way, most)?;
    let _tunnel = if way == Way::Tunnel {
        Some(tunnel::Tunnel::lay(&world)?)
    } else {
        None
    };
    let mut talk = Talk::begin(&world, way == Way::Pair, pace, ack_delay + Duration::from_millis(600))?;
    // What is said must be the same for all ways, and new in each case.
    let mut from = 0;
    let mut next = |count: usize| -> Vec<Line> {
        let slice = lines.slice(from, count);
        from += count;
        slice
    };
    let usual = |occupants, speaks| Case {
        host,
        occupants,
        speaks,
        shape: Shape::Usual,
        quiet: false,
    };
    talk.grow(plan.occupants.first().copied().unwrap_or(1))?;
    // The compressors have seen something, as after a quarter of an hour of life.
    talk.say(&next(2 * plan.lines), Speaks::Near, Shape::Usual)?;
    for occupants in plan.occupants.iter().copied() {
        talk.grow(occupants)?;
        let mut cases = vec![usual(occupants, Speaks::Near), usual(occupants, Speaks::Far)];
        if occupants == 50 {
            let near = usual(occupants, Speaks::Near);
            cases.push(Case {
                shape: Shape::Lean,
                ..near
            });
            cases.push(Case { quiet: true, ..near });
        }
        for case in cases {
            let lines = next(if case.quiet { plan.lines / 3 } else { plan.lines });
            talk.set_pace(case.pace() / FASTER);
            let figures = talk.say(&lines, case.speaks, case.shape)?;
            eprintln!("  {case:?}: {:.0} bytes, {:.1} packets", figures.bytes, figures.packets);
            measured.push((way, case, figures));
        }
    }
    Ok(())
}

/// The cases in order, with the figures of each way.
fn by_case(measured: &Measured) -> Vec<(Case, [Option<&Figures>; 3])> {
    let mut cases: Vec<Case> = Vec::new();
    for (_, case, _) in measured {
        if !cases.contains(case) {
            cases.push(*case);
        }
    }
    let figures = |case: Case, way: Way| {
        let found = measured.iter().find(|(of, other, _)| *of == way && *other == case);
        found.map(|(_, _, figures)| figures)
    };
    cases
        .into_iter()
        .map(|case| (case, Way::ALL.map(|way| figures(case, way))))
        .collect()
}

fn print_bytes(measured: &Measured) {
    println!("\n### Bytes a room message\n");
    println!(
        "At IP level, both directions together. A line every {} s ({} s: quiet), acknowledgements after {} s at most.\n",
        BUSY.as_secs(),
        QUIET.as_secs(),
        ACK_DELAY.as_secs()
    );
    println!(
        "| room on | far occupants | who speaks | message | body | ids | narrows | entries | plain S2S | `ssh -C` |"
    );
    println!("| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (case, [pair, plain, tunnel]) in by_case(measured) {
        let bytes = |figures: Option<&Figures>| match (figures, pair) {
            (Some(figures), Some(pair)) => format!("{:.0} (×{:.0})", figures.bytes, figures.bytes / pair.bytes),
            (Some(figures), None) => format!("{:.0}", figures.bytes),
            (None, _) => "–".to_owned(),
        };
        let of_pair = |figure: fn(&Figures) -> String| pair.map_or("–".to_owned(), figure);
        println!(
            "| {} | {} | {} | {}{} | {} | {} | **{}** | {} | {} | {} |",
            case.host.name(),
            case.occupants,
            match case.speaks {
                Speaks::Near => "beside the room",
                Speaks::Far => "behind the link",
            },
            match case.shape {
                Shape::Usual => "usual",
                Shape::Lean => "lean",
            },
            if case.quiet { ", quiet room" } else { "" },
            of_pair(|figures| format!("{:.0}", figures.body_bytes)),
            case.shape.id_bytes(),
            of_pair(|figures| format!("{:.0}", figures.bytes)),
            of_pair(|figures| figures
                .entries
                .map_or("–".to_owned(), |entries| format!("{entries:.2}"))),
            bytes(plain),
            bytes(tunnel),
        );
    }
}

fn print_latency(measured: &Measured) {
    println!("\n### Milliseconds on a LAN\n");
    println!("From sending to reception, p50 / p95: by a far occupant, and by the last of all.\n");
    println!(
        "| room on | far occupants | who speaks | narrows, one | plain, one | ratio | narrows, all | plain, all | ratio |"
    );
    println!("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for (case, [pair, plain, _]) in by_case(measured) {
        let (Some(pair), Some(plain)) = (pair, plain) else {
            continue;
        };
        if case.quiet || case.shape != Shape::Usual {
            continue;
        }
        let both = |times: &[Duration]| format!("{:.1} / {:.1}", percentile(times, 50), percentile(times, 95));
        let ratio = |pair: &[Duration], plain: &[Duration]| {
            let of = |percent| percentile(pair, percent) / percentile(plain, percent);
            format!("{:.1} / {:.1}", of(50), of(95))
        };
        println!(
            "| {} | {} | {} | {} | {} | {} | {} | {} | {} |",
            case.host.name(),
            case.occupants,
            match case.speaks {
                Speaks::Near => "beside the room",
                Speaks::Far => "behind the link",
            },
            both(&pair.copies),
            both(&plain.copies),
            ratio(&pair.copies, &plain.copies),
            both(&pair.all),
            both(&plain.all),
            ratio(&pair.all, &plain.all),
        );
    }
}
