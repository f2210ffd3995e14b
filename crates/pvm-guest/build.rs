//! Links the kernel: no start files, no libraries, and the layout of `kernel.ld`.

use std::env;

fn main() {
    let script = format!("{}/kernel.ld", env::var("CARGO_MANIFEST_DIR").unwrap_or_default());
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernel.ld");
    // Position-independent, with its relocations left for the kernel itself to apply.
    let arguments =
        ["-nostartfiles", "-nostdlib", "-static-pie", "-Wl,--no-dynamic-linker", "-Wl,-z,norelro"];
    let layout = ["-Wl,-z,max-page-size=4096", "-Wl,--build-id=none", "-Wl,-z,noexecstack"];
    for argument in arguments.iter().chain(&layout) {
        println!("cargo::rustc-link-arg-bin=pvm-guest={argument}");
    }
    println!("cargo::rustc-link-arg-bin=pvm-guest=-Wl,-T,{script}");
}
