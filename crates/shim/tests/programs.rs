//! Large ordinary programs, which use none of what the library serves, do the same with it as without: what they print, how
//! they end, and the files that they leave.
//!
//! Each script runs twice in directories of the same name, once with `LD_PRELOAD` and every kind of device served. The
//! scripts are of what programs do at the functions that the library stands in front of: descriptors that are opened,
//! duplicated, closed in ranges and inherited, mappings of files, forks, threads, signals, pipes, sockets.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, Write as _},
    os::unix::{
        fs::{MetadataExt, PermissionsExt},
        process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

fn library() -> PathBuf {
    let file = env::current_exe().unwrap().parent().unwrap().join("libring3_shim.so");
    assert!(file.exists(), "{} has not been built", file.display());
    file
}

/// What a run did: what it printed, how it ended, and its files with their permissions and contents.
struct Done {
    stdout: String,
    stderr: String,
    code: Option<i32>,
    signal: Option<i32>,
    files: BTreeMap<PathBuf, (u32, Vec<u8>)>,
}

fn files(below: &Path, of: &Path, into: &mut BTreeMap<PathBuf, (u32, Vec<u8>)>) {
    for entry in fs::read_dir(below).unwrap().map(|entry| entry.unwrap().path()) {
        let about = fs::symlink_metadata(&entry).unwrap();
        let contents = if about.is_dir() {
            files(&entry, of, into);
            Vec::new()
        } else if about.is_symlink() {
            fs::read_link(&entry).unwrap().into_os_string().into_encoded_bytes()
        } else {
            fs::read(&entry).unwrap_or_default()
        };
        let name = entry.strip_prefix(of).unwrap().to_owned();
        into.insert(name, (about.permissions().mode(), contents));
        assert_eq!(about.uid(), own_user(), "{}", entry.display());
    }
}

fn own_user() -> u32 {
    fs::metadata("/proc/self").unwrap().uid()
}

fn run(shell: &str, script: &str, directory: &Path, with_library: bool) -> Done {
    let _ = fs::remove_dir_all(directory);
    fs::create_dir(directory).unwrap();
    let mut command = Command::new(shell);
    command.args(["-c", script]).current_dir(directory).stdin(Stdio::null());
    command.env_clear().env("PATH", env::var_os("PATH").unwrap());
    command.envs([("HOME", "/nonexistent"), ("LC_ALL", "C"), ("TZ", "UTC")]);
    if with_library {
        let items = "mock-iommu\ndevice=ioat,addr=0000:7f:05.0\ndevice=nvme,file=/dev/null,addr=0000:7f:06.0";
        command.env("LD_PRELOAD", library()).env("RING3_SHIM", items);
    }
    let output = command.output().unwrap();
    let mut all = BTreeMap::new();
    files(directory, directory, &mut all);
    Done {
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        code: output.status.code(),
        signal: output.status.signal(),
        files: all,
    }
}

/// Runs a script of a shell both ways, when the programs that it needs are there.
#[track_caller]
fn the_same(name: &str, needs: &[&str], script: &str) {
    let there = |program: &&&str| {
        env::split_paths(&env::var_os("PATH").unwrap()).any(|directory| directory.join(program).exists())
    };
    let missing: Vec<_> = needs.iter().filter(|program| !there(program)).collect();
    if !missing.is_empty() {
        // Past the test harness, which hides what passing tests print.
        let _ = writeln!(io::stderr(), "SKIPPED {name}: there is no {missing:?}");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let place = directory.path().join("work");
    let without = run(needs[0], script, &place, false);
    let with = run(needs[0], script, &place, true);
    for (file, contents) in &without.files {
        assert!(with.files.get(file) == Some(contents), "{name}: {} differs", file.display());
    }
    let names = |done: &Done| done.files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&with), names(&without), "{name}");
    let ended = |done: Done| (done.stdout, done.stderr, done.code, done.signal);
    let (with, without) = (ended(with), ended(without));
    assert_eq!(with, without, "{name}");
    assert!(!without.0.is_empty(), "{name} does nothing: {without:?}");
}

#[test]
fn a_compiler() {
    the_same(
        "a_compiler",
        &["sh", "gcc"],
        r##"
        set -e
        i=0
        while [ $i -lt 40 ]; do
            echo "#include <stdio.h>"
            echo "#include <stdlib.h>"
            echo "int f$i(int x) { int a[16] = { x }; for (int i = 1; i < 16; i++) a[i] = a[i - 1] * $i + i; return abs(a[15] % 1000); }"
            i=$((i + 1))
        done >f.c
        { i=0; while [ $i -lt 40 ]; do echo "int f$i(int);"; i=$((i + 1)); done
          echo "#include <stdio.h>"; echo "int main(int n, char **v) { int s = 0;"
          i=0; while [ $i -lt 40 ]; do echo "s += f$i(n);"; i=$((i + 1)); done
          printf '%s\n' 'printf("%d\n", s); return s % 100; }'; } >main.c
        gcc -O2 -pipe -frandom-seed=1 -c f.c
        gcc -O2 -flto -frandom-seed=1 -save-temps -c main.c
        gcc -O2 -flto -frandom-seed=1 main.o f.o -o program
        ./program && false || echo $?
        gcc -E f.c | wc -l
        gcc -c nothing.c || echo $?
        echo 'int x = ;' | gcc -x c -c - || echo $?
        "##,
    );
}

#[test]
fn version_control() {
    the_same(
        "version_control",
        &["sh", "git"],
        r#"
        set -e
        export GIT_CONFIG_NOSYSTEM=1 GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
        export GIT_AUTHOR_DATE='2001-02-03T04:05:06Z' GIT_COMMITTER_DATE='2001-02-03T04:05:06Z'
        git init -q -b main here
        cd here
        git config core.fsync none
        git config core.trustctime false
        i=0
        while [ $i -lt 12 ]; do
            seq 1 $((i * 50)) >numbers; seq $i 7 900 >file$i; mkdir -p d$i; echo $i >d$i/e
            git add -A; git commit -q -m "commit $i"
            i=$((i + 1))
        done
        git checkout -q -b other HEAD~4
        echo more >>file0; git commit -qam other
        git merge -q -m merged main 2>&1
        git gc -q
        git fsck --strict 2>&1
        git log --stat --format=%H | sha256sum
        git clone -q . ../there
        git -C ../there diff HEAD~1 --stat | tail -n 1
        git rev-parse HEAD
        git grep -c 77 | sort | tail -n 2
        git archive HEAD | sha256sum
        git show nothing 2>&1 || echo $?
        cd ..; rm -rf here there
        "#,
    );
}

#[test]
fn an_interpreter_with_processes_and_sockets() {
    the_same(
        "an_interpreter_with_processes_and_sockets",
        &["sh", "perl"],
        r##"
        cat >it.pl <<'END'
        use strict; use warnings; use Socket; use Fcntl; use POSIX (); use IO::Select;
        $| = 1;
        # Children, each with a pipe of its own; they answer in an order of ours.
        my @from = map {
            my $n = $_;
            pipe(my $r, my $w) or die;
            my $pid = fork() // die;
            if (!$pid) { close $r; my $s = 0; $s += $_ * $n for 1 .. 20000; syswrite $w, "$n $s\n"; POSIX::_exit($n) }
            close $w; [$pid, $r]
        } 1 .. 8;
        for my $c (@from) { my $r = $c->[1]; print scalar <$r>; waitpid $c->[0], 0; print $? >> 8, "\n" }
        # A socket pair, and a server of this machine.
        socketpair(my $a, my $b, AF_UNIX, SOCK_STREAM, 0) or die;
        syswrite $a, "hello\n"; sysread $b, my $got, 100; print $got;
        socket(my $l, PF_INET, SOCK_STREAM, 0) or die; bind($l, sockaddr_in(0, INADDR_LOOPBACK)) or die; listen($l, 5);
        my $to = getsockname $l;
        if (!fork) { socket(my $c, PF_INET, SOCK_STREAM, 0); connect($c, $to) or die; print {$c} "x" x 100000, "\n"; close $c; POSIX::_exit(3) }
        accept(my $s, $l) or die; my $line = <$s>; print length $line, "\n"; wait; print $? >> 8, "\n";
        # Descriptors: duplicates, close-on-exec, positions shared with a child.
        open my $f, '+>', 'file' or die; print {$f} "line $_\n" for 1 .. 1000; seek $f, 0, 0;
        open my $d, '<&', $f or die; sysseek $f, 7, 0; sysread $d, my $t, 6; print "$t|", sysseek($f, 0, 1), "\n";
        if (!fork) { sysseek $f, 100, 0; POSIX::_exit(0) } wait; print sysseek($f, 0, 1), "\n";
        fcntl($f, F_SETFD, 0); my $n = fileno $f; print `head -c 5 <&$n`, "\n";
        fcntl($f, F_SETFD, FD_CLOEXEC); print `(head -c 5 <&$n) 2>/dev/null || echo closed`;
        truncate 'file', 10; print -s 'file', "\n"; rename 'file', 'moved'; symlink 'moved', 'link'; print readlink('link'), -e 'file' ? 1 : 0, "\n";
        # Signals, and how children end.
        local $SIG{USR1} = sub { print "signal\n" }; kill USR1 => $$;
        local $SIG{ALRM} = sub { die "alarm\n" }; eval { alarm 1; select undef, undef, undef, 30; }; print $@; alarm 0;
        system 'kill -SEGV $$'; print $? & 127, "\n"; system 'exit 77'; print $? >> 8, "\n"; print system('/nonexistent/program'), "\n";
        opendir my $dir, '.'; print join(' ', sort grep !/^\./, readdir $dir), "\n";
        print join(' ', map { -e $_ ? 1 : 0 } '/dev/null', '/dev/nothing', '/proc/self/status', '/sys/nothing'), "\n";
        exit 42;
END
        perl it.pl; echo $?
        "##,
    );
}

#[test]
fn an_interpreter_with_threads_and_mappings() {
    the_same(
        "an_interpreter_with_threads_and_mappings",
        &["sh", "python3"],
        r##"
        python3 -c 'print("there is one")' || exit
        cat >it.py <<'END'
import concurrent.futures, errno, fcntl, hashlib, io, mmap, multiprocessing, os, select, signal, sqlite3, struct, subprocess, sys, tempfile, threading

with open("data", "w+b") as f:
    f.write(bytes(range(256)) * 4096)
    f.flush()
    with mmap.mmap(f.fileno(), 0) as m:
        m[1000:1004] = b"abcd"
        m.flush()
        print(hashlib.sha256(m).hexdigest(), m.find(b"abcd"))
    print(os.pread(f.fileno(), 4, 1000), os.preadv(f.fileno(), [bytearray(3), bytearray(5)], 1 << 20))
    print(os.pwritev(f.fileno(), [b"12", b"345"], 0), os.lseek(f.fileno(), 0, os.SEEK_END))

m = mmap.mmap(-1, 1 << 20)
if os.fork() == 0:
    m[:5] = b"child"
    os._exit(0)
os.wait()
print(m[:5])
m.close()

with concurrent.futures.ThreadPoolExecutor(8) as pool:
    def work(n):
        with tempfile.NamedTemporaryFile(dir=".") as t:
            t.write(b"x" * n)
            t.flush()
            return os.stat(t.name).st_size, os.fstat(t.fileno()).st_size
    print(list(pool.map(work, range(0, 4000, 100))))

def square(n):
    return n * n

with multiprocessing.get_context("fork").Pool(4) as pool:
    print(sum(pool.map(square, range(1000))))

r, w = os.pipe()
e = select.epoll()
e.register(r, select.EPOLLIN)
print(e.poll(0))
os.write(w, b"ready")
print(len(e.poll(5)), os.read(r, 10))
copy = fcntl.fcntl(r, fcntl.F_DUPFD_CLOEXEC, 200)
print(copy >= 200, os.get_inheritable(copy))
os.closerange(copy, copy + 10)
try:
    os.fstat(copy)
except OSError as error:
    print(errno.errorcode[error.errno])

print(subprocess.run(["sh", "-c", "ls -l /proc/self/fd | wc -l; echo err >&2; exit 9"], capture_output=True, close_fds=True))
print(subprocess.run(["cat"], input=b"through", capture_output=True, pass_fds=[w]).stdout)
print(subprocess.run(["sh", "-c", "kill -TERM $$"]).returncode)

db = sqlite3.connect("base")
db.execute("pragma journal_mode = wal")
db.execute("create table t (a, b)")
db.executemany("insert into t values (?, ?)", ((i, str(i) * 20) for i in range(5000)))
db.commit()
print(db.execute("select count(*), sum(a), max(b) from t where a % 7 = 3").fetchall())
db.close()
os.remove("base")
signal.signal(signal.SIGSEGV, lambda *_: print("caught"))
os.kill(os.getpid(), signal.SIGSEGV)
sys.exit(33)
END
        python3 it.py; echo $?
        "##,
    );
}

#[test]
fn archives_and_filters() {
    the_same(
        "archives_and_filters",
        &["bash", "tar", "gzip", "awk", "sed", "find", "sort"],
        r#"
        set -e -o pipefail
        mkdir -p tree/{a,b}/{c,d}
        for i in {1..60}; do seq $i $((i * 30)) >tree/a/c/$i; ln -s ../c/$i tree/a/d/$i; done
        ln tree/a/c/1 tree/b/hard; mkfifo tree/b/fifo
        find tree -exec touch -h -d 2001-02-03 {} +
        tar --sort=name --owner=0 --group=0 --numeric-owner -c tree | gzip -9n | tee one.tgz | sha256sum
        mkdir out; tar -xzf one.tgz -C out; diff -r --no-dereference tree out/tree 2>&1 || true
        find out -type f -size +1k | sort | awk '{ n++ } END { print n }'
        sort -R --random-source=tree/a/c/60 tree/a/c/60 | sort -n | tail -n 1
        sed -i 's/1/one/g' tree/a/c/20; head -n 3 tree/a/c/20
        exec 7<tree/a/c/30 8>written; read -u 7 line; echo "$line" >&8; exec 7<&- 8>&-; cat written
        { echo out; echo err >&2; } > >(cat) 2>both; wait; cat both
        dd if=/dev/zero bs=4096 count=100 status=none | split -b 100000 - part; ls part*
        coproc { while read x; do echo "got $x"; done; }; echo 1 >&"${COPROC[1]}"; read y <&"${COPROC[0]}"; echo "$y"
        (exit 3) || echo $?; { (kill -KILL $BASHPID) || echo $?; } 2>/dev/null
        trap 'echo ending' EXIT; rm tree/b/fifo out/tree/b/fifo
        cat /nonexistent
        "#,
    );
}
