//! Programs give the same results in the guest as on the host: the host's own tools, and this one, with threads
//! and vector instructions.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

mod support;

use std::fmt::Write as _;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, Mutex, mpsc};

use support::Noise;
use support::kernels::kernels;
use support::process::{boot, run, run_the_guests_side};

/// Tools on the host that a fresh Debian has; the ones behind `has` may be missing.
const TOOLS: &str = r#"
export LC_ALL=C
has() { command -v "$1" >/dev/null; }
sha256sum /bin/sh /bin/ls
gzip -9c /bin/ls | gunzip -c | sha256sum
tar -C /etc -cf - passwd group 2>/dev/null | tar -tf -
seq 20000 | sort -R --random-source=/bin/ls | sort -n | md5sum
seq 20000 | sed 's/3/three/g' | grep -c three
seq 3000 | awk '{ s += sqrt($1) * log($1) / sin($1) } END { printf "%.10f\n", s }'
i=0; while [ $i -lt 200 ]; do /bin/true || echo failed; i=$((i + 1)); done; echo $i
echo a b c | xargs -n1 -P3 echo | sort
if has perl; then perl -MPOSIX -e '
    my %h; $h{$_ % 97} .= sprintf("%x", $_ ** 1.5) for 1 .. 5000;
    print join(",", map { length $h{$_} } sort { $a <=> $b } keys %h), "\n";
    printf "%.15g %.15g %s\n", atan2(1, 1) * 4, exp(1), join ":", map { floor($_ / 3) } -5 .. 5;
    $_ = "the quick brown fox " x 200; s/(\w+) (\w+)/$2 $1/g; print length, " ", unpack("%32C*", $_), "\n"'; fi
if has openssl; then
    for hash in md5 sha1 sha512 sha3-256 blake2b512; do openssl dgst -$hash /bin/ls; done
    for cipher in aes-256-cbc aes-128-ctr chacha20; do
        seq 5000 | openssl enc -$cipher -K 000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f \
            -iv 000102030405060708090a0b0c0d0e0f 2>/dev/null | sha256sum; done; fi
if has xz; then xz -1c /bin/ls | xz -dc | sha256sum; fi
if has bzip2; then bzip2 -c /bin/ls | bzip2 -dc | sha256sum; fi
if has bc; then echo 'scale=50; 4*a(1)' | bc -l; fi
"#;

#[test]
fn the_hosts_tools_say_the_same_in_the_guest() {
    let Some(kernels) = kernels() else { return };
    let host = Command::new("sh")
        .args(["-c", TOOLS])
        .current_dir("/")
        .env("PATH", "/usr/bin:/bin")
        .output()
        .unwrap();
    let guest =
        boot(run(kernels.newer(), &["--cpus", "2", "--env", "PATH=/usr/bin:/bin"], &["sh", "-c", TOOLS]));
    guest.expect(0);
    assert_eq!(guest.text(), String::from_utf8(host.stdout).unwrap());
}

#[test]
fn threads_and_vector_code_compute_the_same_in_the_guest() {
    let Some(kernels) = kernels() else { return };
    for (kernel, cpus) in [(kernels.older(), "1"), (kernels.newer(), "2")] {
        let guest = boot(run_the_guests_side(kernel, &["--cpus", cpus]));
        guest.expect(0);
        let report = report();
        assert!(guest.text().contains(&report), "expected:\n{report}\ngot:\n{}", guest.text());
    }
}

#[test]
#[ignore = "runs in the guest of another test"]
fn the_guests_side() {
    print!("{}", report());
}

/// Results that depend on nothing but the processor's correctness.
fn report() -> String {
    let mut text = String::from("report:\n");
    let data: Vec<u64> = {
        let mut noise = Noise(42);
        (0..4096).map(|_| noise.next()).collect()
    };
    writeln!(text, "threads {}", threads()).unwrap();
    writeln!(text, "scalar {:x} {:x}", mix(&data), waves(&data).to_bits()).unwrap();
    // What the guest lacks is told apart from what it computes: the engine offers what the host has.
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("bmi2")
    {
        // SAFETY: the features that the functions are compiled for were just detected.
        let (mix, waves) = unsafe { (mix_v3(&data), waves_v3(&data)) };
        writeln!(text, "x86-64-v3 {mix:x} {:x}", waves.to_bits()).unwrap();
    }
    text
}

/// Locks, channels, a barrier and locked instructions on four threads.
fn threads() -> u64 {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 3000;
    let (atomic, locked, barrier) = (AtomicU64::new(0), Mutex::new(0), Barrier::new(THREADS as usize));
    let (sender, receiver) = mpsc::channel();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (sender, atomic, locked, barrier) = (sender.clone(), &atomic, &locked, &barrier);
            scope.spawn(move || {
                barrier.wait();
                for round in 0..ROUNDS {
                    atomic.fetch_add(thread ^ round, Ordering::Relaxed);
                    *locked.lock().unwrap() += round;
                    if round % 100 == 0 {
                        sender.send(thread * round).unwrap();
                        std::thread::yield_now();
                    }
                }
            });
        }
        drop(sender);
        let sent: u64 = receiver.iter().sum();
        atomic.fetch_add(sent, Ordering::Relaxed);
    });
    atomic.into_inner() ^ locked.into_inner().unwrap() << 20
}

/// Integer work that a compiler makes vectors and bit-manipulation instructions of.
#[inline(always)]
fn mix_body(data: &[u64]) -> u64 {
    let mut lanes = [0x9e37_79b9_7f4a_7c15_u64; 8];
    for round in 0..64_u64 {
        for chunk in data.chunks_exact(8) {
            for (lane, word) in lanes.iter_mut().zip(chunk) {
                *lane = (*lane ^ word).wrapping_add(round << 7) ^ (*lane >> 13);
                *lane = (*lane & 0xffff_ffff).wrapping_mul(*word >> 32) ^ !*lane & *word;
            }
        }
    }
    lanes.iter().fold(0, |sum, lane| {
        sum.rotate_left(9)
            ^ u64::from(lane.count_ones() + lane.trailing_zeros() + lane.leading_zeros())
            ^ lane
    })
}

/// Floating-point work of fixed order and rounding.
#[inline(always)]
fn waves_body(data: &[u64]) -> f64 {
    let mut lanes = [1.0_f64; 8];
    for chunk in data.chunks_exact(8) {
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            let x = (*word >> 12) as f64 / (1_u64 << 52) as f64;
            *lane = (*lane * 0.75 + x).sqrt() + x / (*lane + 2.0);
        }
    }
    lanes.iter().sum()
}

fn mix(data: &[u64]) -> u64 {
    mix_body(data)
}

fn waves(data: &[u64]) -> f64 {
    waves_body(data)
}

#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt,movbe")]
fn mix_v3(data: &[u64]) -> u64 {
    mix_body(data)
}

#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt,movbe")]
fn waves_v3(data: &[u64]) -> f64 {
    waves_body(data)
}
