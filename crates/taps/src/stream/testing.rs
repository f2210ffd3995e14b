//! The body of this module's fuzz target.

use std::io::Write;
use std::os::unix::net::UnixStream;

use usernet::tap::{LONGEST_FRAME, Offload, Tap};

use super::Stream;

/// Any bytes from a client, in pieces whose lengths they say themselves; what comes out goes back.
///
/// # Panics
/// Never: that is what the target is for. Unless there are no descriptors.
pub fn any_client(mut data: &[u8]) {
    let (ours, mut theirs) = UnixStream::pair().expect("descriptors");
    theirs.set_nonblocking(true).expect("a socket");
    let mut stream = Stream::connected(ours.into(), 1500).expect("descriptors");
    let mut buffer = vec![0; LONGEST_FRAME];
    while let Some((&length, rest)) = data.split_first() {
        let (now, rest) = rest.split_at(rest.len().min(usize::from(length) * 16));
        data = rest;
        // What does not fit is lost: it is any bytes all the same.
        let _ = theirs.write(now);
        stream.acknowledge();
        loop {
            match stream.receive(&mut buffer) {
                Ok(Some((length, _))) => {
                    let _ = stream.send(&buffer[..length], &[], Offload::default());
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
        if stream.flush().is_err() {
            return;
        }
    }
}
