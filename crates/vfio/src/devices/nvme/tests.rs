//! A driver, in a few lines, against the controller.
