//! The loads that iperf3 does not have, each a program in one namespace: a server that echoes, and clients that
//! measure round trips, connections, and what many connections cost.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use rustix::event::epoll;

use crate::Failure;

/// What a held connection sends and gets back.
const HELD_BYTES: usize = 16384;
/// A load that takes longer has stalled.
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs the load named on the command line: `serve PORT`, `ping ADDRESS SECONDS`, `connect ADDRESS SECONDS`,
/// `hold ADDRESS COUNT`. The clients print one number.
pub(crate) fn main(kind: &str, args: impl Iterator<Item = String>) -> Result<(), Failure> {
    let args: Vec<String> = args.collect();
    match (kind, &*args) {
        ("serve", [port]) => serve(port.parse()?),
        ("ping", [to, seconds]) => Ok(println!("{}", ping(to.parse()?, seconds.parse()?)?)),
        ("connect", [to, seconds]) => Ok(println!("{}", connect_often(to.parse()?, seconds.parse()?)?)),
        ("hold", [to, count]) => hold(to.parse()?, count.parse()?),
        _ => Err(crate::USAGE.into()),
    }
}

/// Sends back what it gets, for any number of connections, in one thread.
fn serve(port: u16) -> Result<(), Failure> {
    // IPv4 comes to this one too.
    let listener = TcpListener::bind(("::", port))?;
    let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    // No socket has the descriptor of the listener.
    let listening = listener.as_raw_fd() as u64;
    epoll::add(&poll, &listener, epoll::EventData::new_u64(listening), epoll::EventFlags::IN)?;
    let mut streams = HashMap::new();
    let mut events = Vec::with_capacity(256);
    let mut buffer = vec![0; 1 << 16];
    loop {
        events.clear();
        match epoll::wait(&poll, rustix::buffer::spare_capacity(&mut events), None) {
            Err(rustix::io::Errno::INTR) => continue,
            other => other?,
        };
        for event in &events {
            let token = event.data.u64();
            if token == listening {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                let token = stream.as_raw_fd() as u64;
                epoll::add(&poll, stream.as_fd(), epoll::EventData::new_u64(token), epoll::EventFlags::IN)?;
                streams.insert(token, stream);
            } else if let Some(stream) = streams.get_mut(&token) {
                // There is something to read, so this does not block; a client that does not read is not ours.
                let going_on = match stream.read(&mut buffer) {
                    Ok(0) | Err(_) => false,
                    Ok(length) => buffer.get(..length).is_some_and(|bytes| stream.write_all(bytes).is_ok()),
                };
                if !going_on {
                    streams.remove(&token);
                }
            }
        }
    }
}

fn connect(to: SocketAddr) -> Result<TcpStream, Failure> {
    let stream =
        TcpStream::connect_timeout(&to, PATIENCE).map_err(|e| format!("cannot connect to {to}: {e}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

fn round_trip(stream: &mut TcpStream) -> Result<(), Failure> {
    let mut byte = [1];
    stream.write_all(&byte)?;
    Ok(stream.read_exact(&mut byte)?)
}

/// The mean of a round trip of one byte on one connection, µs.
fn ping(to: SocketAddr, seconds: u64) -> Result<f64, Failure> {
    let mut stream = connect(to)?;
    // Paths and caches are as they will be.
    for _ in 0..100 {
        round_trip(&mut stream)?;
    }
    let (began, length) = (Instant::now(), Duration::from_secs(seconds));
    let mut trips = 0_u32;
    while began.elapsed() < length {
        round_trip(&mut stream)?;
        trips += 1;
    }
    Ok(began.elapsed().as_secs_f64() * 1e6 / f64::from(trips))
}

/// Connections made, used for one byte each way, and closed, one after the other, per second.
fn connect_often(to: SocketAddr, seconds: u64) -> Result<f64, Failure> {
    let (began, length) = (Instant::now(), Duration::from_secs(seconds));
    let mut connections = 0_u32;
    while began.elapsed() < length {
        round_trip(&mut connect(to)?)?;
        connections += 1;
    }
    Ok(f64::from(connections) / began.elapsed().as_secs_f64())
}

/// Opens connections, uses each, says so, and keeps them until its input ends.
fn hold(to: SocketAddr, count: usize) -> Result<(), Failure> {
    let mut bytes = vec![7; HELD_BYTES];
    let mut streams = Vec::with_capacity(count);
    for _ in 0..count {
        let mut stream = connect(to)?;
        stream.write_all(&bytes)?;
        stream.read_exact(&mut bytes)?;
        streams.push(stream);
    }
    println!("{}", streams.len());
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}
