use std::path::Path;
use std::time::{Duration, Instant};

use linux_loader::bootparam::boot_params;
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::testing::{COMPRESSIONS, KERNEL_AT, PVH_AT, Part, RELEASE, bzimage, elf, payload, vmlinux};
use super::*;
use crate::layout::{ACPI_TABLES, memory_map, ram_regions};

const RAM: u64 = 32 << 20;

/// Held by the test that measures memory, and by the one that takes much of it.
static MEMORY_WATCHED: std::sync::Mutex<()> = std::sync::Mutex::new(());

fn memory(bytes: u64) -> GuestMemoryMmap<()> {
    let regions: Vec<_> =
        ram_regions(bytes).into_iter().map(|(at, size)| (GuestAddress(at.0), size as usize)).collect();
    GuestMemoryMmap::from_ranges(&regions).unwrap()
}

fn request<'a>(
    map: &'a [MemoryRange],
    protocol: BootProtocol,
    initramfs: Option<&'a [u8]>,
) -> BootRequest<'a> {
    BootRequest { protocol, initramfs, cmdline: "console=ttyS0 quiet", memory_map: map, rsdp: ACPI_TABLES }
}

fn read(memory: &GuestMemoryMmap<()>, at: u64, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

fn text(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", text(source)),
        None => error.to_string(),
    }
}

fn refusal(bytes: &[u8]) -> String {
    text(&KernelImage::from_bytes(bytes.to_vec()).expect_err("must be refused"))
}

#[test]
fn every_compressor_gives_the_same_kernel() {
    let plain = vmlinux();
    for compression in COMPRESSIONS {
        let image = KernelImage::from_bytes(bzimage(&payload(compression, &plain)))
            .unwrap_or_else(|e| panic!("{compression}: {}", text(&e)));
        assert_eq!(image.compression(), compression);
        assert!(image.vmlinux == plain, "{compression}");
        assert_eq!(image.version(), Some(RELEASE));
        assert!(image.has_pvh_entry());
        assert!(image.contains(b"somebody@somewhere"));
        assert!(!image.contains(b"somebody@elsewhere"));
    }
    let image = KernelImage::from_bytes(plain).unwrap();
    assert_eq!(image.version(), Some(RELEASE), "from the banner, not from its format string");
}

#[test]
fn a_pvm_guest_shows_once_it_is_decompressed() {
    // In the first segment, after what the kernel has there anyway.
    let mut guest = vmlinux();
    let at = 64 + 3 * 56 + 50_000;
    guest[at..at + 10].copy_from_slice(&pvm::abi::cpuid::SYNTHETIC);
    for compression in COMPRESSIONS {
        let knows = |kernel: &[u8]| {
            KernelImage::from_bytes(bzimage(&payload(compression, kernel))).unwrap().is_pvm_guest()
        };
        assert!(knows(&guest) && !knows(&vmlinux()), "{compression}");
    }
    assert!(KernelImage::from_bytes(guest.clone()).unwrap().is_pvm_guest());
    // What is behind the last segment is never loaded.
    guest[at] = 0;
    guest.extend(pvm::abi::cpuid::SYNTHETIC);
    assert!(!KernelImage::from_bytes(guest).unwrap().is_pvm_guest());
}

#[test]
fn boots_by_the_linux_protocol() {
    let memory = memory(RAM);
    let map = memory_map(RAM);
    let image = KernelImage::from_bytes(bzimage(&payload(Compression::Gzip, &vmlinux()))).unwrap();
    let initramfs = vec![0x5a; 0x12_345];
    let state = load(&memory, &image, &request(&map, BootProtocol::Linux64, Some(&initramfs))).unwrap();
    let BootState::Long64(state) = state else { panic!("{state:?}") };
    assert_eq!((state.rip, state.rsi), (KERNEL_AT, layout::BOOT_PARAMS.0));
    assert_eq!(read(&memory, KERNEL_AT, 40_000), vmlinux()[64 + 3 * 56..][..40_000]);
    assert_eq!(read(&memory, 0x40_0000, 8), b"data\0\0\0\0");

    let params: boot_params = memory.read_obj(GuestAddress(state.rsi)).unwrap();
    let header = params.hdr;
    let (magic, version, loader) = (header.header, header.version, header.type_of_loader);
    assert_eq!((magic, version, loader), (u32::from_le_bytes(*b"HdrS"), 0x20f, 0xff));
    let (cmdline, rsdp) = (header.cmd_line_ptr, params.acpi_rsdp_addr);
    assert_eq!(read(&memory, cmdline.into(), 20), b"console=ttyS0 quiet\0");
    assert_eq!(rsdp, ACPI_TABLES.0);
    let (at, size) = (header.ramdisk_image, header.ramdisk_size);
    assert_eq!(u64::from(at), (RAM - size as u64) & !0xfff);
    assert_eq!(read(&memory, at.into(), size as usize), initramfs);
    let table = params.e820_table;
    assert_eq!(usize::from(params.e820_entries), map.len());
    for (entry, range) in table.iter().zip(&map) {
        let (addr, size, kind) = (entry.addr, entry.size, entry.type_);
        assert_eq!((addr, size, kind), (range.start.0, range.size, range.kind as u32));
    }

    // The identity map, walked by hand at a few addresses.
    for address in [0u64, 0x20_1234, 0x4000_0000, 0xffff_ffff] {
        let entry = |table: u64, shift: u32| -> u64 {
            memory.read_obj(GuestAddress((table & !0xfff) + (address >> shift & 511) * 8)).unwrap()
        };
        let leaf = entry(entry(entry(state.cr3, 39), 30), 21);
        assert_eq!(leaf & 0x83, 0x83, "present, writable, large");
        assert_eq!((leaf & !0x1f_ffff) | (address & 0x1f_ffff), address);
    }
    // The segments are what the GDT says.
    for segment in [state.cs, state.data, state.tr] {
        assert!(segment.selector < state.gdt.limit);
        let descriptor: u64 =
            memory.read_obj(GuestAddress(state.gdt.base + u64::from(segment.selector))).unwrap();
        assert_eq!(descriptor, segment.descriptor);
    }
}

#[test]
fn boots_by_pvh() {
    let memory = memory(RAM);
    let map = memory_map(RAM);
    let image = KernelImage::from_bytes(vmlinux()).unwrap();
    let state = load(&memory, &image, &request(&map, BootProtocol::Pvh, Some(b"initramfs"))).unwrap();
    let BootState::Pvh(state) = state else { panic!("{state:?}") };
    assert_eq!(state.eip, PVH_AT);
    let info: hvm_start_info = memory.read_obj(GuestAddress(state.ebx.into())).unwrap();
    assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
    assert_eq!(read(&memory, info.cmdline_paddr, 20), b"console=ttyS0 quiet\0");
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!(read(&memory, module.paddr, module.size as usize), b"initramfs");
    let ranges: Vec<hvm_memmap_table_entry> = (0..info.memmap_entries)
        .map(|i| memory.read_obj(GuestAddress(info.memmap_paddr + u64::from(i) * 24)).unwrap())
        .collect();
    assert_eq!(ranges.len(), map.len());
    assert_eq!((ranges[3].addr, ranges[3].type_), (0x10_0000, 1));
}

#[test]
fn says_what_a_file_is_instead() {
    let mut arm64 = vec![0; 4096];
    arm64[0x38..0x3c].copy_from_slice(b"ARM\x64");
    arm64[..2].copy_from_slice(b"MZ");
    let change = |at: usize, bytes: &[u8]| {
        let mut file = vmlinux();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let code = Part { kind: 1, address: KERNEL_AT, memory_size: 4, content: vec![0x90; 4] };
    let mut program = elf(KERNEL_AT, &[code]);
    program[16] = 3;
    let cases: [(Vec<u8>, &str); 14] = [
        (vec![], "empty"),
        (arm64, "aarch64 (an arm64 Image)"),
        (change(18, &[183, 0]), "aarch64"),
        (change(18, &[3, 0]), "i386"),
        (change(4, &[1]), "x32"),
        (change(5, &[2]), "ELF machine 15872"),
        (change(16, &[1, 0]), "module"),
        (program, "shared object"),
        (change(24, &5u64.to_le_bytes()), "no 64-bit entry"),
        (b"#!/bin/sh\n".to_vec(), "a script"),
        (b"\x1f\x8b\x08xxxxxxxxxx".to_vec(), "decompress it first"),
        (b"hello, world".to_vec(), "[68, 65, 6c, 6c, 6f, 2c, 20, 77]"),
        (vec![0; 4096], "zeros"),
        (vmlinux()[..40].to_vec(), "truncated"),
    ];
    for (file, words) in cases {
        let message = refusal(&file);
        assert!(message.contains(words), "{words:?} not in {message:?}");
    }
    let path = Path::new("/nonexistent/vmlinuz");
    assert!(text(&KernelImage::open(path).unwrap_err()).contains("/nonexistent/vmlinuz: No such file"));
}

/// A kernel that can move itself is linked like a shared object; its PVH note tells that it is none.
#[test]
fn a_position_independent_kernel_with_a_pvh_note_is_one() {
    let mut file = vmlinux();
    file[16] = 3;
    let image = KernelImage::from_bytes(file).unwrap();
    assert_eq!((image.elf.entry, image.elf.pvh_entry), (Gpa(KERNEL_AT), Some(PVH_AT)));
}

/// Half a GiB is read to find out; not while another test watches the memory of this process.
#[test]
fn a_file_without_end_is_too_big() {
    let _alone = MEMORY_WATCHED.lock();
    assert!(text(&KernelImage::open(Path::new("/dev/zero")).unwrap_err()).contains("larger than 536870912"));
}

#[test]
fn says_what_is_wrong_with_a_bzimage() {
    let good = bzimage(&payload(Compression::Gzip, &vmlinux()));
    let change = |at: usize, bytes: &[u8]| {
        let mut file = good.clone();
        file[at..at + bytes.len()].copy_from_slice(bytes);
        refusal(&file)
    };
    assert!(change(0x206, &[0x07, 0x02]).contains("protocol 2.07"));
    assert!(change(0x236, &[0, 0]).contains("i386"));
    assert!(change(0x24c, &[0xff; 4]).contains("the compressed kernel ends at byte 4294968"));
    assert!(change(0x24c, &[3, 0, 0, 0]).contains("3 bytes long"));
    assert!(change(0x440, b"\x89LZO").contains("lzo"));
    assert!(change(0x440, b"abcd").contains("[61, 62, 63, 64"));
    assert!(change(0x201, &[0x10]).contains("the header ends at byte"));
    assert!(change(good.len() - 308, &[0; 4]).contains("gzip stream is corrupt"), "its CRC");
    assert!(refusal(&good[..0x1000]).contains("truncated"));
}

#[test]
fn declared_sizes_are_claims() {
    for compression in COMPRESSIONS {
        if compression == Compression::None {
            continue;
        }
        let good = payload(compression, &vmlinux());
        let claim = |size: u32| {
            let mut payload = good.clone();
            let at = payload.len() - 4;
            payload[at..].copy_from_slice(&size.to_le_bytes());
            refusal(&bzimage(&payload))
        };
        assert!(claim(u32::MAX).contains("more than the limit"), "{compression}");
        let message = claim(100);
        assert!(message.contains("more than 100"), "{message}");
        // For gzip it is part of the stream, and checked there.
        let message = claim(MAX_KERNEL as u32);
        assert!(message.contains("holds") || message.contains("corrupt"), "{message}");
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let map = memory_map(RAM);
    let image = KernelImage::from_bytes(vmlinux()).unwrap();
    let memory = memory(RAM);
    let plain = request(&map, BootProtocol::Linux64, None);
    let attempt =
        |image: &KernelImage, request: BootRequest<'_>| text(&load(&memory, image, &request).unwrap_err());
    let big = vec![0; RAM as usize];
    let message =
        attempt(&image, BootRequest { initramfs: Some(&big[..(RAM - 0x50_0000 + 1) as usize]), ..plain });
    assert!(message.contains("between the kernel's end at 0x500000 and 0x2000000"), "{message}");
    assert!(attempt(&image, BootRequest { initramfs: Some(&[]), ..plain }).contains("empty"));
    let long = "x".repeat(2048);
    assert!(
        attempt(&image, BootRequest { cmdline: &long, ..plain })
            .contains("2048 bytes long, the kernel takes 2047")
    );
    assert!(attempt(&image, BootRequest { cmdline: "a\0b", ..plain }).contains("position 1"));

    let at = |address, memory_size| {
        let part = Part { kind: 1, address, content: vec![0x90; 16], memory_size };
        KernelImage::from_bytes(elf(address, &[part])).unwrap()
    };
    let message = attempt(&at(0x1f0_0000, 0x20_0000), plain);
    assert!(message.contains("0x1f00000..0x2100000") && message.contains("33 MiB"), "{message}");
    let mut hungry = bzimage(&payload(Compression::None, &vmlinux()));
    hungry[0x260..0x264].copy_from_slice(&0x300_0000u32.to_le_bytes());
    let message = attempt(&KernelImage::from_bytes(hungry).unwrap(), plain);
    assert!(message.contains("0x200000..0x3200000") && message.contains("50 MiB"), "{message}");
    assert!(attempt(&at(0x8000, 16), plain).contains("0x8000, below 1 MiB"));
    assert!(attempt(&at(0xfee0_0000, 16), plain).contains("has none there"));
    let message = attempt(&at(0x20_0000, 16), BootRequest { protocol: BootProtocol::Pvh, ..plain });
    assert!(message.contains("no PVH entry"), "{message}");
    let many = vec![map[0]; 200];
    for protocol in [BootProtocol::Linux64, BootProtocol::Pvh] {
        let mut request = request(&many, protocol, None);
        request.cmdline = "";
        let error = load(&memory, &KernelImage::from_bytes(vmlinux()).unwrap(), &request).unwrap_err();
        assert!(matches!(error, LoadError::KernelOutsideRam { .. }), "{error}");
    }
    let mut many = vec![map[3]; 200];
    many[0] = map[0];
    for protocol in [BootProtocol::Linux64, BootProtocol::Pvh] {
        let error = load(&memory, &image, &request(&many, protocol, None)).unwrap_err();
        assert!(matches!(error, LoadError::TooManyRanges { count: 200, .. }), "{error}");
    }
}

/// Debian's kernels as they are, where somebody has put them: one is lz4, one zstd.
#[test]
fn distribution_kernels() {
    let Some(files) = std::env::var_os("RING3_TEST_KERNELS").and_then(|d| std::fs::read_dir(d).ok()) else {
        eprintln!("skipped: RING3_TEST_KERNELS names no directory with vmlinuz files");
        return;
    };
    for path in files.filter_map(|f| Some(f.ok()?.path())) {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let Some(release) = name.strip_prefix("vmlinuz-") else { continue };
        let start = Instant::now();
        let image = KernelImage::open(&path).unwrap_or_else(|e| panic!("{name}: {}", text(&e)));
        let elapsed = start.elapsed();
        eprintln!("{name}: {} to {} bytes in {elapsed:?}: {image:x?}", image.compression(), image.size());
        assert_eq!(image.version(), Some(release));
        assert_eq!(find_release(&image).as_deref(), Some(release), "the header and the banner agree");
        assert!(image.has_pvh_entry());
        assert!(image.contains(b"virtio"));
        let ram = 256 << 20;
        let (memory, map) = (memory(ram), memory_map(ram));
        for protocol in [BootProtocol::Linux64, BootProtocol::Pvh] {
            load(&memory, &image, &request(&map, protocol, Some(b"cpio"))).unwrap();
        }
        // Not always its start: 6.12 is entered a little further on.
        assert_eq!(image.elf.segments[0].address, Gpa(0x100_0000));
        assert!((0x100_0000..0x100_1000).contains(&image.elf.entry.0), "{}", image.elf.entry);
    }
}

fn find_release(image: &KernelImage) -> Option<String> {
    KernelImage::from_bytes(image.vmlinux.clone()).ok()?.version().map(str::to_owned)
}

/// A xorshift generator: the same cases on every run.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }
}

/// Peak resident memory of this process in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// One second (or `RING3_FUZZ_SECONDS`) of broken kernels: flipped bits, cut-off files, lengths that lie, in every format. Each gets an
/// answer, none a panic, and none takes memory that it has no content for.
#[test]
fn broken_kernels_are_refused_or_loaded() {
    let plain = vmlinux();
    let mut bases: Vec<Vec<u8>> = COMPRESSIONS.iter().map(|&c| bzimage(&payload(c, &plain))).collect();
    bases.push(plain);
    let _alone = MEMORY_WATCHED.lock();
    let memory = memory(RAM);
    let before = peak_kib();
    let mut rng = Rng(0x5eed_0fa1_1ce5);
    let (mut cases, mut refused) = (0, 0);
    let seconds = std::env::var("RING3_FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        let mut file = bases[rng.below(bases.len())].clone();
        for _ in 0..=rng.below(4) {
            // Half of the damage goes where headers are.
            let at = if rng.below(2) == 0 { rng.below(0x500.min(file.len())) } else { rng.below(file.len()) };
            match rng.below(5) {
                0 => file[at] ^= 1 << rng.below(8),
                1 => file[at] = rng.next() as u8,
                2 => file.truncate(at.max(1)),
                3 => {
                    let lie = [0, 1, 0xffff, u32::MAX, 1 << 31, rng.next() as u32][rng.below(6)];
                    let end = (at + 4).min(file.len());
                    file[at..end].copy_from_slice(&lie.to_le_bytes()[..end - at]);
                }
                _ => {
                    let size = rng.below(64);
                    let end = (at + size).min(file.len());
                    file[at..end].fill(rng.next() as u8);
                }
            }
        }
        cases += 1;
        if let Err(error) = load_anything(file, &memory, RAM) {
            refused += 1;
            assert!(!text(&error).is_empty());
        }
    }
    let grown = peak_kib().saturating_sub(before);
    eprintln!("{cases} cases, {refused} refused, {grown} KiB more at the peak");
    assert!(cases > 50 && refused > cases / 4, "{cases} cases, {refused} refused");
    assert!(grown < 512 << 10, "{grown} KiB");
}
