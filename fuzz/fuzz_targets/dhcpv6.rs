//! Random bytes as requests of DHCPv6, and as options of right ones.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| usernet::testing::any_dhcpv6(data));
