//! The smallest initramfs: `/init`, and the directories that it mounts on, as a "newc" cpio archive
//! (`Documentation/driver-api/early-userspace/buffer-format.rst` of the kernel).

use std::num::TryFromIntError;

/// The archive with `program` as `/init`.
///
/// # Errors
/// When the program is larger than the format can say.
pub(crate) fn with_init(program: &[u8]) -> Result<Vec<u8>, TryFromIntError> {
    const DIRECTORY: u32 = 0o040_755;
    let mut archive = Vec::new();
    entry(&mut archive, "dev", DIRECTORY, &[])?;
    entry(&mut archive, "proc", DIRECTORY, &[])?;
    entry(&mut archive, "init", 0o100_755, program)?;
    entry(&mut archive, "TRAILER!!!", 0, &[])?;
    Ok(archive)
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) -> Result<(), TryFromIntError> {
    let (size, name_size) = (u32::try_from(content.len())?, u32::try_from(name.len() + 1)?);
    let inode = u32::try_from(archive.len())?;
    // inode, mode, uid, gid, links, mtime, size, device, device of the node, name size, checksum
    archive.extend_from_slice(b"070701");
    for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        archive.extend_from_slice(format!("{field:08X}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
    Ok(())
}
