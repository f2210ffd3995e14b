//! An x86-64 processor in software.
