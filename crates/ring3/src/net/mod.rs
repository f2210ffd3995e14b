//! User-mode networking at the command line: `ring3 pasta`, `ring3 passt` and `ring3 net`.

pub mod options;
