//! The generated modules are what the C compiler sees in the kernel's headers: every structure, every field, every
//! constant, and nothing of the headers is missing.
//!
//! What is compared is read from the generated files themselves. Only the layout of structures has to be known when this
//! test is compiled: it stands in `headers/layout.rs`, which has to name every structure and field, and is written anew
//! with `RING3_REGENERATE=1`.
//!
//! The headers are those that `tests/selftests/fetch-kernel.sh` makes (or has made in `RING3_TEST_SELFTESTS`). Where
//! they or a C compiler cannot be had, the test is skipped.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on is to fail")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A structure as Rust lays it out.
struct Layout {
    module: &'static str,
    name: &'static str,
    size: usize,
    fields: &'static [(&'static str, usize)],
}

macro_rules! layout {
    ($($module:ident :: $name:ident { $($field:ident)* })*) => {
        &[$(Layout {
            module: stringify!($module),
            name: stringify!($name),
            size: size_of::<uapi::$module::$name>(),
            fields: &[$((stringify!($field), core::mem::offset_of!(uapi::$module::$name, $field))),*],
        }),*]
    };
}

const LAYOUTS: &[Layout] = include!("headers/layout.rs");

/// The modules, their sources, and the headers that they are generated from.
const MODULES: [(&str, &str, &str); 3] = [
    ("iommufd", include_str!("../src/iommufd.rs"), "linux/iommufd.h"),
    ("vfio", include_str!("../src/vfio.rs"), "linux/vfio.h"),
    ("iommufd_test", include_str!("../src/iommufd_test.rs"), "iommufd_test.h"),
];

/// The members of the union in `struct iommu_test_cmd` have no type names in C; they are called after their place.
const TEST_COMMAND: &str = "iommu_test_cmd__bindgen_ty_1__bindgen_ty_";

/// The structures of a generated file with those fields that C has as well.
fn structures(source: &'static str) -> Vec<(&'static str, Vec<&'static str>)> {
    let mut all: Vec<(&str, Vec<&str>)> = Vec::new();
    for line in source.lines() {
        if let Some(name) = line.strip_prefix("pub struct ").and_then(|rest| rest.strip_suffix(" {")) {
            all.push((name, Vec::new()));
        } else if let Some((field, _)) = line.strip_prefix("    pub ").and_then(|rest| rest.split_once(": "))
            && !field.starts_with("__bindgen")
        {
            all.last_mut().unwrap().1.push(field);
        }
    }
    all
}

/// The constants of a generated file: names and values as they stand there.
fn constants(source: &str) -> BTreeMap<&str, &str> {
    let lines = source.lines().filter_map(|line| line.strip_prefix("pub const "));
    lines
        .map(|line| {
            (line.split_once(':').unwrap().0, line.split_once(" = ").unwrap().1.trim_end_matches(';'))
        })
        .collect()
}

/// The source that the modules are generated from.
const GENERATED_FROM: &str = "linux-source-7.3";

/// The headers' directory and that of the test header, or why there is none.
fn headers() -> Result<PathBuf, String> {
    Command::new("cc").arg("--version").output().map_err(|error| format!("no C compiler: {error}"))?;
    let dir = match std::env::var_os("RING3_TEST_SELFTESTS") {
        Some(dir) => PathBuf::from(dir),
        None => Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernel-selftests"),
    };
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/selftests/fetch-kernel.sh");
    let fetch = Command::new(script).arg(&dir).output().map_err(|error| error.to_string())?;
    if !fetch.status.success() {
        return Err(format!("no headers of the kernel: {}", String::from_utf8_lossy(&fetch.stderr).trim()));
    }
    let version = std::fs::read_to_string(dir.join("version")).unwrap_or_default();
    match version.split('\t').next() {
        Some(GENERATED_FROM) => Ok(dir),
        _ => Err(format!(
            "the modules are generated from {GENERATED_FROM}, the headers are {}'s",
            version.trim()
        )),
    }
}

/// Compiles and runs a C program that prints `KEY VALUE` lines.
fn ask_the_compiler(dir: &Path, statements: &str) -> BTreeMap<String, String> {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("uapi-headers-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).unwrap();
    let source = scratch.join("ask.c");
    let program = format!(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/iommufd.h>\n#include <linux/vfio.h>\n\
         #include <iommufd_test.h>\n\
         #define SIZE(key, what) printf(\"%s %zu\\n\", key, sizeof(what))\n\
         #define OFFSET(key, what, field) printf(\"%s %zu\\n\", key, offsetof(what, field))\n\
         #define VALUE(name) printf(\"%s %lld\\n\", #name, (long long)(name))\n\
         #define TEXT(name) printf(\"%s %s\\n\", #name, name)\n\
         int main(void)\n{{\n{statements}\treturn 0;\n}}\n"
    );
    std::fs::write(&source, program).unwrap();
    let mut compiler = Command::new("cc");
    compiler
        .arg("-I")
        .arg(dir.join("include"))
        .arg("-I")
        .arg(dir)
        .arg(&source)
        .arg("-o")
        .arg(scratch.join("ask"));
    let compiled = compiler.output().unwrap();
    assert!(compiled.status.success(), "{}", String::from_utf8_lossy(&compiled.stderr));
    let output = Command::new(scratch.join("ask")).output().unwrap();
    std::fs::remove_dir_all(&scratch).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .map(|line| line.split_once(' ').unwrap())
        .map(|(key, value)| (key.into(), value.into()))
        .collect()
}

#[test]
fn the_list_of_layouts_is_complete() {
    let mut list = String::from("layout! {\n");
    for (module, source, _) in MODULES {
        for (name, fields) in structures(source) {
            let _ = writeln!(list, "    {module}::{name} {{ {} }}", fields.join(" "));
        }
    }
    list.push_str("}\n");
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/headers/layout.rs");
    if std::env::var_os("RING3_REGENERATE").is_some() {
        std::fs::write(&path, &list).unwrap();
    }
    let written = std::fs::read_to_string(&path).unwrap();
    assert!(written == list, "tests/headers/layout.rs is out of date: run this test with RING3_REGENERATE=1");
}

#[test]
fn structures_and_constants_are_the_headers() {
    let dir = match headers() {
        Ok(dir) => dir,
        Err(why) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED structures_and_constants_are_the_headers: {why}");
            return;
        }
    };
    // The members of the test command's union, in the order of the header.
    let test_header = std::fs::read_to_string(dir.join("iommufd_test.h")).unwrap();
    let union = test_header.split_once("struct iommu_test_cmd {").unwrap().1;
    let members: Vec<&str> = union
        .lines()
        .take_while(|line| !line.starts_with('}'))
        .filter_map(|line| line.strip_prefix("\t\t} ")?.strip_suffix(';'))
        .collect();

    let mut statements = String::new();
    let mut expected: BTreeMap<String, String> = BTreeMap::new();
    for Layout { module, name, size, fields } in LAYOUTS {
        let key = format!("{module}::{name}");
        if let Some(number) = name.strip_prefix(TEST_COMMAND) {
            let member = members[number.parse::<usize>().unwrap() - 1];
            let union = "offsetof(struct iommu_test_cmd, add_reserved)";
            let _ = writeln!(statements, "SIZE(\"{key}\", ((struct iommu_test_cmd *)0)->{member});");
            for (field, _) in *fields {
                let offset = format!("offsetof(struct iommu_test_cmd, {member}.{field}) - {union}");
                let _ = writeln!(statements, "printf(\"{key}.{field} %zu\\n\", {offset});");
            }
        } else {
            let _ = writeln!(statements, "SIZE(\"{key}\", struct {name});");
            for (field, _) in *fields {
                let _ = writeln!(
                    statements,
                    "OFFSET(\"{key}.{field}\", struct {name}, {});",
                    field.trim_end_matches('_')
                );
            }
        }
        expected.insert(key.clone(), size.to_string());
        expected.extend(fields.iter().map(|(field, offset)| (format!("{key}.{field}"), offset.to_string())));
    }
    let mut wide = BTreeSet::new();
    for (_, source, _) in MODULES {
        for (name, value) in constants(source) {
            if let Some(text) = value.strip_prefix("b\"") {
                let _ = writeln!(statements, "TEXT({name});");
                expected.insert(name.into(), text.trim_end_matches("\\0\"").into());
            } else {
                let _ = writeln!(statements, "VALUE({name});");
                let digits = value.trim_end_matches("u8").trim_end_matches("u32").trim_end_matches("u64");
                expected.insert(name.into(), digits.into());
                wide.extend(value.ends_with("u64").then_some(name));
            }
        }
    }
    let answers = ask_the_compiler(&dir, &statements);
    assert_eq!(answers.len(), expected.len());
    let mut wrong = Vec::new();
    for (key, expected) in &expected {
        let answer = &answers[key];
        // An enumerator of C is signed or not as its value demands; an unsigned constant of Rust keeps the low half.
        let same = match (expected.parse::<i128>(), answer.parse::<i128>()) {
            (Ok(ours), Ok(theirs)) => {
                ours == theirs || (!wide.contains(key.as_str()) && ours == theirs & 0xffff_ffff)
            }
            _ => expected == answer,
        };
        if !same {
            wrong.push(format!("{key}: {expected} here, {answer} in the header"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What stands in a header, but is no part of the interface that the modules describe.
fn is_left_out(name: &str) -> bool {
    // Error handling of POWER machines.
    name.contains("EEH") || name.contains("eeh")
}

#[test]
fn nothing_of_the_headers_is_missing() {
    let dir = match headers() {
        Ok(dir) => dir,
        Err(why) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED nothing_of_the_headers_is_missing: {why}");
            return;
        }
    };
    let mut missing = Vec::new();
    for (module, source, header) in MODULES {
        let path = if header.contains('/') { dir.join("include").join(header) } else { dir.join(header) };
        let text = std::fs::read_to_string(path).unwrap();
        let structures: BTreeSet<&str> = structures(source).into_iter().map(|(name, _)| name).collect();
        let constants = constants(source);
        for line in text.lines() {
            let structure =
                line.strip_prefix("struct ").and_then(|rest| rest.split_once(" {")).map(|(name, _)| name);
            let is_name = |name: &&str| {
                (name.starts_with("VFIO") || name.starts_with("IOMMU") || name.starts_with("MOCK"))
                    && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
            };
            let mut words = line.split_whitespace();
            // A macro with a value, or an enumerator.
            let constant = match words.next() {
                Some("#define") => words.next().filter(|_| words.next().is_some()),
                Some(word)
                    if line.starts_with('\t') && (word.ends_with(',') || words.next() == Some("=")) =>
                {
                    Some(word.trim_end_matches(','))
                }
                _ => None,
            };
            let lost = structure
                .filter(|name| !structures.contains(name))
                .or_else(|| constant.filter(is_name).filter(|name| !constants.contains_key(name)));
            missing.extend(lost.filter(|name| !is_left_out(name)).map(|name| format!("{module}: {name}")));
        }
    }
    assert!(missing.is_empty(), "the headers have what the modules lack:\n{}", missing.join("\n"));
}
