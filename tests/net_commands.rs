//! `pasta`, `passt` and `ring3 net` as commands: what they are called, what they answer, how they end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Command, Output};

use ring3::net::control::{ControlSocket, Controlled};
use ring3::net::options::ports::DEFAULT_EPHEMERAL;
use usernet::{Engine, testing};

fn output(program: &Path, words: &[&str]) -> Output {
    Command::new(program).args(words).env_remove("RING3_NET_SOCKET").output().unwrap()
}

fn ring3(words: &[&str]) -> Output {
    output(Path::new(env!("CARGO_BIN_EXE_ring3")), words)
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn a_link_is_the_front_end_that_it_is_named_after() {
    let directory = tempfile::tempdir().unwrap();
    for name in ["pasta", "passt", "passt.avx2"] {
        let link = directory.path().join(name);
        symlink(env!("CARGO_BIN_EXE_ring3"), &link).unwrap();
        let version = output(&link, &["--version"]);
        let expected = format!("{} {}\n", &name[..5], env!("CARGO_PKG_VERSION"));
        assert_eq!((version.status.code(), text(&version.stdout)), (Some(0), expected.as_str()));
    }
    let capabilities = output(&directory.path().join("passt"), &["--print-capabilities"]);
    assert_eq!(capabilities.status.code(), Some(0));
    let json: String = text(&capabilities.stdout).split_whitespace().collect();
    assert_eq!(json, r#"{"type":"net"}"#);
}

#[test]
fn mistakes_have_status_1_and_help_has_0() {
    for (words, message) in [
        (&["passt", "--config-net"][..], "passt: --config-net is an option of pasta"),
        (&["pasta", "--nonsense"], "pasta: unexpected argument '--nonsense'"),
        (&["pasta", "--host-lo-to-ns-lo", "--no-splice"], "pasta: --host-lo-to-ns-lo cannot be used with"),
        (&["passt", "-t", "22-80:32"], "59 ports"),
        (&["passt", "-f", "-l", "/nowhere/log"], "passt: cannot make the log file /nowhere/log"),
    ] {
        let ended = ring3(words);
        let said = text(&ended.stderr);
        assert!(ended.status.code() == Some(1) && said.contains(message), "{words:?}: {said}");
    }
    for words in [["pasta", "--help"], ["passt", "-h"], ["help", "pasta"], ["man", "passt"]] {
        let ended = ring3(&words);
        assert_eq!(ended.status.code(), Some(0), "{words:?}");
        assert!(text(&ended.stdout).contains("tcp"), "{words:?}");
    }
}

#[test]
fn ports_are_listed_added_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control");
    let socket = path.to_str().unwrap();
    let (tap, _guest) = testing::tap(testing::PLAIN, 16).unwrap();
    let engine = Engine::new(testing::config(), Box::new(tap)).unwrap();
    let handle = engine.handle();
    let controlled = Controlled { handle: handle.clone(), v6: true, ephemeral: DEFAULT_EPHEMERAL };
    let (listening, name) = ControlSocket::bind(&path).unwrap();
    let server = listening.serve(controlled).unwrap();
    let engine = std::thread::spawn(move || engine.run().unwrap());
    // An address of this process's own, so that no port is in use.
    let [low, high, ..] = std::process::id().to_le_bytes();
    let address = format!("127.80.{high}.{low}");

    let net = |words: &[&str]| {
        let ended = ring3(&[&["net"], words].concat());
        (ended.status.code(), text(&ended.stdout).to_owned(), text(&ended.stderr).to_owned())
    };
    let spec = format!("{address}/2000-2001:80-81");
    let done = (Some(0), String::new(), String::new());
    assert_eq!(net(&["add", "--socket", socket, &spec, &format!("{address}/2005")]), done);
    assert_eq!(net(&["add", "--socket", socket, "--udp", &format!("{address}/53")]), done);
    let listed = format!("tcp {spec}\ntcp {address}/2005\nudp {address}/53\n");
    assert_eq!(net(&["list", "--socket", socket]), (Some(0), listed, String::new()));
    assert_eq!(net(&["remove", "-c", socket, &format!("{address}/all")]), done);
    assert_eq!(net(&["list", "--socket", socket]).1, format!("udp {address}/53\n"));

    for (words, message) in [
        (&["remove", "--socket", socket, "1"][..], "nothing is forwarded by tcp 1"),
        (&["add", "--socket", socket, "auto"], "'auto' is for the command line"),
        (&["list"], "--socket PATH, or set RING3_NET_SOCKET"),
        (&["list", "--socket", "/nowhere"], "cannot talk to the network at /nowhere"),
        (&["add", "--socket", socket, "80-22"], "ends before it begins"),
    ] {
        let (status, _, said) = net(words);
        assert!(status == Some(125) && said.contains(message), "{words:?}: {said}");
    }
    handle.stop();
    engine.join().unwrap();
    drop((server, name));
    assert!(!path.exists());
}
