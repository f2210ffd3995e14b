//! The kernel's iommufd and VFIO devices for unmodified programs.
