//! Tries the lab by hand: `narrows-lab demo` shows what narrows does, `narrows-lab up` makes a world to look around in,
//! `narrows-lab link` measures the emulated link against its own settings in real time.
//!
//! The link's logic is tested exactly, without a clock, in `emulator.rs`. What only real time shows
//! (timers, devices, throughput) is printed here rather than asserted in a test on a busy machine.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

mod demo;

use narrows_lab::{Direction, Ejabberd, Layout, Profile, Prosody, ServerSpec, SidecarSpec, Way, World};

const USAGE: &str = "\
usage: narrows-lab up [a=prosody|ejabberd|none] [b=...] [link=lan|sat9600|vsat128k|rtt600] [sidecar=BINARY]
       narrows-lab link
       narrows-lab demo [people=20] [talk=30] [cut=25]";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let done = match args.first().map(String::as_str) {
        Some("up") => up(&args[1..]),
        Some("link") => measure_link(),
        Some("demo") => demo::run(&args[1..]),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("narrows-lab: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A world that stays until Enter is pressed or the input ends.
fn up(args: &[String]) -> io::Result<bool> {
    let mut builder = World::builder("up")
        .users_a(["alice", "adam"])
        .users_b(["b1", "b2", "b3"]);
    for arg in args {
        let odd = || io::Error::new(io::ErrorKind::InvalidInput, format!("{arg}: not understood\n{USAGE}"));
        let (key, value) = arg.split_once('=').ok_or_else(odd)?;
        builder = match key {
            "a" | "b" if value == "none" => builder,
            "a" => builder.site_a(server(value).ok_or_else(odd)?),
            "b" => builder.site_b(server(value).ok_or_else(odd)?),
            "link" => builder.link(Profile::named(value).ok_or_else(odd)?),
            "sidecar" => builder.layout(Layout::Sidecar(SidecarSpec::new(value))),
            _ => return Err(odd()),
        };
    }
    let world = builder.start()?;
    println!("files: {}", world.dir().display());
    for site in [&world.a, &world.b] {
        println!(
            "{}: ip netns exec {} …; accounts {}, password {}",
            site.domain(),
            site.namespace().name(),
            site.users().join(" "),
            narrows_lab::PASSWORD
        );
    }
    println!("Enter ends it.");
    io::stdin().read_line(&mut String::new())?;
    let stats = world.link.stats();
    println!(
        "link: {} bytes A to B, {} bytes B to A",
        stats.a_to_b.sent.bytes, stats.b_to_a.sent.bytes
    );
    Ok(true)
}

fn server(name: &str) -> Option<ServerSpec> {
    match name {
        "prosody" => Some(Prosody::stock()),
        "ejabberd" => Some(Ejabberd::stock()),
        _ => None,
    }
}

/// Prints one figure and whether it is what the settings say.
fn check(all_good: &mut bool, what: &str, is: f64, low: f64, high: f64) {
    let good = (low..=high).contains(&is);
    *all_good &= good;
    println!(
        "{} {what}: {is:.3} (want {low} to {high})",
        if good { "ok  " } else { "FAIL" }
    );
}

fn measure_link() -> io::Result<bool> {
    let world = World::new("link", Profile::rtt600())?;
    let mut good = true;

    let burst = Burst::new(20, 100, Duration::from_millis(10)).send(&world)?;
    let delays = burst
        .arrivals
        .iter()
        .map(|(i, at)| (*at - burst.sent[*i]).as_secs_f64());
    check(
        &mut good,
        "one-way delay, ms",
        1000.0 * delays.sum::<f64>() / burst.arrivals.len() as f64,
        299.0,
        306.0,
    );

    world.link.set(Profile::both(Way {
        rate_bps: Some(128_000),
        ..Way::default()
    }));
    world.link.reset();
    let burst = Burst::new(60, 972, Duration::ZERO).send(&world)?;
    let took = burst.arrivals[59].1 - burst.arrivals[0].1;
    check(
        &mut good,
        "rate, bit/s",
        59.0 * 8000.0 / took.as_secs_f64(),
        126_000.0,
        130_000.0,
    );
    check(
        &mut good,
        "IP bytes counted",
        world.link.stats().a_to_b.sent.bytes as f64,
        60_000.0,
        60_000.0,
    );

    let narrow = Way {
        rate_bps: Some(64_000),
        buffer_bytes: Some(10_000),
        ..Way::default()
    };
    world.link.set_way(Direction::AToB, narrow);
    let burst = Burst::new(100, 972, Duration::ZERO).send(&world)?;
    check(
        &mut good,
        "packets of 100 through a 10 kB buffer",
        burst.arrivals.len() as f64,
        9.0,
        13.0,
    );

    world.link.set(Profile::both(Way {
        loss_percent: 3.0,
        ..Way::default()
    }));
    let burst = Burst::new(4000, 100, Duration::from_micros(200)).send(&world)?;
    check(
        &mut good,
        "loss, %",
        100.0 * (1.0 - burst.arrivals.len() as f64 / 4000.0),
        2.2,
        3.9,
    );

    world.link.set(Profile::lan());
    world.link.down();
    let burst = Burst::new(10, 100, Duration::from_millis(50)).send(&world)?;
    check(
        &mut good,
        "packets through while down",
        burst.arrivals.len() as f64,
        0.0,
        0.0,
    );
    world.link.up();
    let burst = Burst::new(10, 100, Duration::from_millis(10)).send(&world)?;
    check(
        &mut good,
        "packets through once up again",
        burst.arrivals.len() as f64,
        10.0,
        10.0,
    );

    check(
        &mut good,
        "TCP without limits, Mbit/s",
        tcp_mbit_per_second(&world)?,
        200.0,
        1e6,
    );
    Ok(good)
}

/// Numbered datagrams from A to B.
struct Burst {
    packets: usize,
    /// UDP payload; the IP packet is 28 bytes longer.
    size: usize,
    gap: Duration,
    sent: Vec<Instant>,
    arrivals: Vec<(usize, Instant)>,
}

impl Burst {
    fn new(packets: usize, size: usize, gap: Duration) -> Self {
        Self {
            packets,
            size,
            gap,
            sent: Vec::new(),
            arrivals: Vec::new(),
        }
    }

    /// Sends, and collects until nothing has come for two seconds.
    fn send(mut self, world: &World) -> io::Result<Self> {
        let to = SocketAddr::from((world.b.address(), 7777));
        let receiver = world.b.enter(|| UdpSocket::bind(to))??;
        receiver.set_read_timeout(Some(Duration::from_secs(2)))?;
        let sender = world.a.enter(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)))??;
        std::thread::scope(|scope| {
            let collect = scope.spawn(|| {
                let (mut arrivals, mut buffer) = (Vec::new(), [0; 2048]);
                while let Ok(length) = receiver.recv(&mut buffer) {
                    let number = buffer[..length].first_chunk().map(|bytes| u32::from_be_bytes(*bytes));
                    arrivals.extend(number.map(|number| (number as usize, Instant::now())));
                }
                arrivals
            });
            let mut payload = vec![b'x'; self.size];
            for number in 0..self.packets as u32 {
                payload[..4].copy_from_slice(&number.to_be_bytes());
                self.sent.push(Instant::now());
                sender.send_to(&payload, to)?;
                std::thread::sleep(self.gap);
            }
            self.arrivals = collect.join().map_err(|_| io::Error::other("the receiver panicked"))?;
            Ok(self)
        })
    }
}

fn tcp_mbit_per_second(world: &World) -> io::Result<f64> {
    const BYTES: usize = 200 << 20;
    let listener: TcpListener = world.b.listen(7001)?;
    let mut sender = world.a.connect(SocketAddr::from((world.b.address(), 7001)))?;
    let (mut receiver, _) = listener.accept()?;
    let began = Instant::now();
    let sending = std::thread::spawn(move || {
        let block = vec![b'z'; 1 << 20];
        (0..BYTES >> 20).try_for_each(|_| sender.write_all(&block))
    });
    let (mut received, mut buffer) = (0usize, vec![0; 1 << 20]);
    loop {
        match receiver.read(&mut buffer)? {
            0 => break,
            length => received += length,
        }
    }
    let took = began.elapsed();
    sending.join().map_err(|_| io::Error::other("the sender panicked"))??;
    Ok(received as f64 * 8.0 / 1e6 / took.as_secs_f64())
}
