/*
 * The device that the probes of VFIO ask about: its address is in VFIO_SELFTESTS_BDF, or is the program's first
 * argument; its group and its character device are looked up in sysfs.
 */
#ifndef CARD_H
#define CARD_H

#include "probe.h"
#include <dirent.h>
#include <linux/iommufd.h>
#include <linux/vfio.h>
#include <sys/eventfd.h>

static char card_address[32], card_group[64], card_cdev[320];

static inline void card_find(const char *address)
{
	char path[300], target[256];
	ssize_t length;
	DIR *dir;
	struct dirent *entry;

	snprintf(card_address, sizeof(card_address), "%s", address);
	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/iommu_group", address);
	length = readlink(path, target, sizeof(target) - 1);
	if (length > 0) {
		target[length] = 0;
		snprintf(card_group, sizeof(card_group), "/dev/vfio/%.32s", strrchr(target, '/') + 1);
	}
	snprintf(path, sizeof(path), "/sys/bus/pci/devices/%s/vfio-dev", address);
	dir = opendir(path);
	while (dir && (entry = readdir(dir)))
		if (!strncmp(entry->d_name, "vfio", 4))
			snprintf(card_cdev, sizeof(card_cdev), "/dev/vfio/devices/%s", entry->d_name);
	if (dir)
		closedir(dir);
}

/* Runs the sections for the device that is named. */
static inline int run_card(const struct section *sections, int argc, char **argv)
{
	const char *address = getenv("VFIO_SELFTESTS_BDF");

	if (argc > 1 && strchr(argv[1], ':')) {
		address = argv[1];
		argc--, argv++;
	}
	if (!address) {
		fprintf(stderr, "no device: give its address, or set VFIO_SELFTESTS_BDF\n");
		return 2;
	}
	card_find(address);
	return run(sections, argc, argv);
}

/* Asks for the device by a name, and closes it again. */
static inline void ask_device(int group, const char *name, const char *question)
{
	int device = ioctl(group, VFIO_GROUP_GET_DEVICE_FD, name);

	answer(device < 0 ? -1 : 0, "%s", question);
	if (device >= 0)
		close(device);
}

static inline int group_status(int group, uint32_t argsz, uint32_t *flags)
{
	struct vfio_group_status cmd = { .argsz = argsz, .flags = 0xffff };
	int result = ioctl(group, VFIO_GROUP_GET_STATUS, &cmd);

	*flags = cmd.flags;
	return result;
}

static inline int bind_iommufd(int cdev, uint32_t flags, int iommufd, uint32_t *id)
{
	struct vfio_device_bind_iommufd cmd = { .argsz = sizeof(cmd), .flags = flags, .iommufd = iommufd };
	int result = ioctl(cdev, VFIO_DEVICE_BIND_IOMMUFD, &cmd);

	*id = cmd.out_devid;
	return result;
}

static inline int attach(int device, uint32_t flags, uint32_t pasid, uint32_t *pt)
{
	struct vfio_device_attach_iommufd_pt cmd = { .argsz = sizeof(cmd), .flags = flags, .pt_id = *pt, .pasid = pasid };
	int result = ioctl(device, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &cmd);

	*pt = cmd.pt_id;
	return result;
}

static inline int detach(int device, uint32_t flags, uint32_t pasid)
{
	struct vfio_device_detach_iommufd_pt cmd = { .argsz = sizeof(cmd), .flags = flags, .pasid = pasid };

	return ioctl(device, VFIO_DEVICE_DETACH_IOMMUFD_PT, &cmd);
}

static inline uint32_t new_ioas(int iommufd)
{
	struct iommu_ioas_alloc cmd = { .size = sizeof(cmd) };

	must(ioctl(iommufd, IOMMU_IOAS_ALLOC, &cmd));
	return cmd.out_ioas_id;
}

static inline int destroy(int iommufd, uint32_t id)
{
	struct iommu_destroy cmd = { .size = sizeof(cmd), .id = id };

	return ioctl(iommufd, IOMMU_DESTROY, &cmd);
}

#endif
