//! What the loopback bypass moves, beside the loopback itself: `cargo bench -p usernet --bench splice`.
//!
//! One stream from one thread to another, plain and by a splicer in turn, a few times each; then round trips of one byte,
//! and connections that ask one question. The median of each counts. `perf record` and the like find the splicer's own
//! thread by its name.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use usernet::config::Transport;
use usernet::splice::sockets::Here;
use usernet::splice::{Config, Forward, Side, Splicer};

const ROUNDS: usize = 5;
/// Of one measurement of throughput.
const LENGTH: Duration = Duration::from_millis(1500);
const BLOCK: usize = 128 << 10;
const QUESTIONS: u32 = 10_000;
const CONNECTIONS: u32 = 3_000;

/// Gbit/s of one stream.
fn throughput(listener: &TcpListener, to: SocketAddr) -> f64 {
    let mut client = TcpStream::connect(to).expect("a connection");
    let (mut server, _) = listener.accept().expect("a client");
    let reader = thread::spawn(move || {
        let mut buffer = vec![0; BLOCK];
        let mut bytes = 0;
        loop {
            match server.read(&mut buffer).expect("bytes") {
                0 => return bytes,
                n => bytes += n,
            }
        }
    });
    let start = Instant::now();
    let block = vec![0; BLOCK];
    while start.elapsed() < LENGTH {
        client.write_all(&block).expect("a reader");
    }
    client.shutdown(Shutdown::Write).expect("an end");
    let bytes = reader.join().expect("a reader");
    bytes as f64 * 8.0 / 1e9 / start.elapsed().as_secs_f64()
}

/// Microseconds of one round trip.
fn round_trip(listener: &TcpListener, to: SocketAddr) -> f64 {
    let mut client = TcpStream::connect(to).expect("a connection");
    client.set_nodelay(true).expect("an option");
    let (mut server, _) = listener.accept().expect("a client");
    server.set_nodelay(true).expect("an option");
    thread::spawn(move || {
        let mut byte = [0];
        while server.read_exact(&mut byte).is_ok() {
            server.write_all(&byte).expect("a reader");
        }
    });
    let start = Instant::now();
    let mut byte = [0];
    for _ in 0..QUESTIONS {
        client.write_all(&byte).expect("a reader");
        client.read_exact(&mut byte).expect("an answer");
    }
    start.elapsed().as_secs_f64() * 1e6 / f64::from(QUESTIONS)
}

/// Thousands of connections with a question and an answer in a second.
fn connections(listener: &TcpListener, to: SocketAddr) -> f64 {
    thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..CONNECTIONS {
                let (mut server, _) = listener.accept().expect("a client");
                let mut byte = [0];
                server.read_exact(&mut byte).expect("a question");
                server.write_all(&byte).expect("a reader");
            }
        });
        let start = Instant::now();
        for _ in 0..CONNECTIONS {
            let mut client = TcpStream::connect(to).expect("a connection");
            client.write_all(&[0]).expect("a reader");
            client.read_exact(&mut [0]).expect("an answer");
        }
        f64::from(CONNECTIONS) / 1e3 / start.elapsed().as_secs_f64()
    })
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn main() {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let listener = TcpListener::bind(any).expect("a port");
    let direct = listener.local_addr().expect("a port");
    let splicer = Splicer::new(Config::default(), Box::new(Here), Box::new(Here)).expect("a splicer");
    let handle = splicer.handle();
    let thread = thread::Builder::new().name("splicer".to_owned()).spawn(|| splicer.run()).expect("a thread");
    let forward = Forward::new(Side::Host, Transport::Tcp, any, direct.port());
    let spliced = handle.add_forward(forward).expect("a forward").listen;
    let congestion = std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control").unwrap_or_default();
    println!("congestion control: {}", congestion.trim());
    type Measure = fn(&TcpListener, SocketAddr) -> f64;
    let measures: [(&str, Measure); 3] = [
        ("one stream, Gbit/s", throughput),
        ("round trip, us", round_trip),
        ("connections, thousand/s", connections),
    ];
    let only = std::env::args().skip(1).find(|argument| !argument.starts_with('-'));
    println!("{:28} {:>9} {:>9} {:>7}", "", "loopback", "spliced", "ratio");
    for (name, measure) in measures {
        if only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        let (mut plain, mut bypass) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            plain.push(measure(&listener, direct));
            bypass.push(measure(&listener, spliced));
        }
        let (plain, bypass) = (median(plain), median(bypass));
        println!("{name:28} {plain:9.1} {bypass:9.1} {:6.0}%", bypass / plain * 100.0);
    }
    handle.stop();
    thread.join().expect("a thread").expect("a splicer");
}
