//! Plain S2S through a stateful zstd stream: what can be had with compression alone, without knowing what is compressed.
//!
//! Beside each server stands a relay without any state but its compressors': a zstd stream for each connection and direction, at the
//! level and with the window that the pair uses, flushed whenever there is nothing more to read. The servers speak without TLS.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;

use narrows::codec::compress::{Coder, Compressor, Decompressor};
use narrows_lab::{S2S_PORT, Site, World};

use crate::tunnel::{TUNNEL_PORT, redirect, without_tls};

/// Where the relay listens for the other one.
const RELAY_PORT: u16 = 5370;

/// What is compressed and flushed at once.
const CHUNK_BYTES: usize = 64 * 1024;

/// Sets up both relays, and makes the servers of a direct world use them. They end with their connections, and with this process.
pub fn squeeze(world: &World) -> io::Result<()> {
    for (here, there) in [(&world.a, &world.b), (&world.b, &world.a)] {
        let far_relay = SocketAddr::from((there.address(), RELAY_PORT));
        serve(here, TUNNEL_PORT, far_relay, true)?;
        serve(
            here,
            RELAY_PORT,
            SocketAddr::from((Ipv4Addr::LOCALHOST, S2S_PORT)),
            false,
        )?;
    }
    for (here, there) in [(&world.a, &world.b), (&world.b, &world.a)] {
        redirect(here, there)?;
        without_tls(here)?;
    }
    Ok(())
}

/// Passes on what comes in at a port; `outwards` says that the other side is the compressed one. Threads that are made inside a site stay there.
fn serve(site: &Site, port: u16, target: SocketAddr, outwards: bool) -> io::Result<()> {
    let listener = site.listen(port)?;
    site.enter(move || {
        thread::spawn(move || accept(&listener, target, outwards));
    })
}

fn accept(listener: &TcpListener, target: SocketAddr, outwards: bool) {
    for from in listener.incoming().flatten() {
        let Ok(to) = TcpStream::connect(target) else { continue };
        let (Ok(from_again), Ok(to_again)) = (from.try_clone(), to.try_clone()) else {
            continue;
        };
        for stream in [&from, &to] {
            // Nagle's algorithm would save packets that the others pay for.
            let _ = stream.set_nodelay(true);
        }
        let (plain, squeezed) = if outwards { (from, to) } else { (to, from) };
        let (plain_again, squeezed_again) = if outwards {
            (from_again, to_again)
        } else {
            (to_again, from_again)
        };
        thread::spawn(move || {
            let mut compressor = Compressor::new(Coder::Zstd).expect("there is memory");
            pass(plain, squeezed, |bytes, out| {
                compressor.compress(bytes, out).map_err(io::Error::other)
            })
        });
        thread::spawn(move || {
            let mut decompressor = Decompressor::new(Coder::Zstd).expect("there is memory");
            pass(squeezed_again, plain_again, |bytes, out| {
                let bytes = decompressor
                    .decompress(bytes, usize::MAX / 2)
                    .map_err(io::Error::other)?;
                out.extend_from_slice(&bytes);
                Ok(())
            })
        });
    }
}

fn pass(
    mut from: TcpStream,
    mut to: TcpStream,
    mut code: impl FnMut(&[u8], &mut Vec<u8>) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut out = Vec::new();
    let result = loop {
        match from.read(&mut buffer) {
            Ok(0) => break Ok(()),
            Ok(count) => {
                out.clear();
                if let Err(error) = code(&buffer[..count], &mut out).and_then(|()| to.write_all(&out)) {
                    break Err(error);
                }
            }
            Err(error) => break Err(error),
        }
    };
    let _ = to.shutdown(Shutdown::Write);
    result
}
