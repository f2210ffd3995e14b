//! Devices given to user space, with the semantics and the interface of Linux's VFIO.
