//! Random bytes as ioctls of an open VFIO device.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vfio::doors::testing::fuzz_ioctl(data));
