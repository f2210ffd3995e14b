//! iperf3: one test at a time, and the figures of its report.

use std::net::IpAddr;
use std::process::Command;

use crate::Failure;
use crate::process::{Guarded, output};

/// What a test moved.
#[derive(Debug, PartialEq)]
pub(crate) struct Report {
    /// Received, bit/s.
    pub(crate) rate: f64,
    /// Received, bytes.
    pub(crate) bytes: f64,
    /// Datagrams that did not arrive, in percent; nothing for TCP.
    pub(crate) lost: Option<f64>,
}

/// A server for one test. The caller waits until it listens.
pub(crate) fn server(command: &mut Command, port: u16) -> Result<Guarded, Failure> {
    Guarded::quiet(command.args(["--server", "--one-off", "--port", &port.to_string()]))
}

/// Runs the client.
pub(crate) fn client(
    command: &mut Command,
    (address, port): (IpAddr, u16),
    seconds: u32,
    options: &[&str],
) -> Result<Report, Failure> {
    command.args(["--json", "--connect-timeout", "5000", "--client", &address.to_string()]);
    command.args(["--port", &port.to_string(), "--time", &seconds.to_string()]).args(options);
    parse(&output(command)?).ok_or_else(|| "iperf3's report is not as expected".into())
}

/// The totals at the end of a report in JSON: its objects of that name have no objects inside.
fn parse(report: &str) -> Option<Report> {
    let (_, end) = report.split_once("\"end\"")?;
    let (_, rest) = end.split_once("\"sum_received\"")?;
    let (sum, _) = rest.split_once('}')?;
    let number = |name: &str| {
        let (_, rest) = sum.split_once(&format!("\"{name}\":"))?;
        rest.split([',', '\n', '}']).next()?.trim().parse().ok()
    };
    Some(Report { rate: number("bits_per_second")?, bytes: number("bytes")?, lost: number("lost_percent") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_totals_of_a_report_are_found() {
        let report = "{\"intervals\":[{\"sum\":{\"bytes\":1}}],\n\"end\":\t{\"streams\":[{\"bytes\":2}],\n\
                      \"sum_sent\":{\"bytes\":3},\n\"sum_received\":\t{\n\t\"seconds\":\t1.0,\n\t\"bytes\":\t4e6,\n\
                      \t\"bits_per_second\":\t3.2e7,\n\t\"lost_percent\":\t0.5\n}}}";
        assert_eq!(parse(report), Some(Report { rate: 3.2e7, bytes: 4e6, lost: Some(0.5) }));
        assert_eq!(parse("{\"error\":\"unable to connect\"}"), None);
    }
}
