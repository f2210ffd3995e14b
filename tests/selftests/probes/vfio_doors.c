/* The doors to a device, group, container and character device: what each call answers in which state. */
#include "card.h"
#include "type1.h"

/* Every call of a container, a group and a device, to see which a file answers at all. */
static void ask_numbers(int fd, const char *what)
{
	static const char *const names[] = {
		"GET_API_VERSION", "CHECK_EXTENSION", "SET_IOMMU", "GROUP_GET_STATUS", "GROUP_SET_CONTAINER",
		"GROUP_UNSET_CONTAINER", "GROUP_GET_DEVICE_FD", "DEVICE_GET_INFO", "DEVICE_GET_REGION_INFO",
		"DEVICE_GET_IRQ_INFO", "DEVICE_SET_IRQS", "DEVICE_RESET", "GET_PCI_HOT_RESET_INFO or IOMMU_GET_INFO",
		"PCI_HOT_RESET or MAP_DMA", "QUERY_GFX_PLANE or UNMAP_DMA", "GET_GFX_DMABUF or IOMMU_ENABLE",
		"IOEVENTFD or IOMMU_DISABLE", "DEVICE_FEATURE or DIRTY_PAGES", "BIND_IOMMUFD", "ATTACH_IOMMUFD_PT",
		"DETACH_IOMMUFD_PT", "MIG_GET_PRECOPY_INFO",
	};

	for (unsigned int nr = 0; nr < sizeof(names) / sizeof(*names); nr++)
		answer(ioctl(fd, _IO(VFIO_TYPE, VFIO_BASE + nr), NULL), "%s: %s with nothing", what, names[nr]);
	answer(ioctl(fd, _IO(VFIO_TYPE, VFIO_BASE + 60), NULL), "%s: an unknown call", what);
}

static void ask_file_calls(int fd, const char *what)
{
	char buffer[8];
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN | POLLOUT };

	answer(read(fd, buffer, 8), "%s: read", what);
	answer(write(fd, buffer, 8), "%s: write", what);
	answer(pread(fd, buffer, 8, 0), "%s: pread", what);
	answer(lseek(fd, 0, SEEK_SET), "%s: lseek", what);
	answer_mmap(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0), "%s: mmap", what);
	answer(poll(&poll_fd, 1, 0), "%s: poll", what);
}

static void ask_container(void)
{
	int container = answer_fd(open("/dev/vfio/vfio", O_RDWR), "open");
	int second = answer_fd(open("/dev/vfio/vfio", O_RDWR), "open a second");

	close(second);
	ask_file_calls(container, "container");
	answer(ioctl(container, VFIO_GET_API_VERSION), "version");
	for (unsigned long extension = 0; extension < 12; extension++)
		answer(ioctl(container, VFIO_CHECK_EXTENSION, extension), "extension %lu", extension);
	for (unsigned long type = 0; type < 9; type++)
		answer(ioctl(container, VFIO_SET_IOMMU, type), "set type %lu without a group", type);
	ask_numbers(container, "without a group");
}

static void ask_group(void)
{
	int group = answer_fd(open(card_group, O_RDWR), "open"), iommufd = (int)must(open("/dev/iommu", O_RDWR));
	int container = (int)must(open("/dev/vfio/vfio", O_RDWR)), null = (int)must(open("/dev/null", O_RDWR)), bad;
	uint32_t flags;
	char name[96];

	answer_fd(open(card_group, O_RDWR), "open again");
	answer_fd(open(card_group, O_RDONLY), "open again to read");
	ask_file_calls(group, "group");
	for (uint32_t argsz = 0; argsz < 16; argsz += 4)
		answer(group_status(group, argsz, &flags), "status, argsz %u", argsz);
	must(group_status(group, 8, &flags));
	value(flags, "status");
	ask_numbers(group, "without a container");
	ask_device(group, card_address, "device without a container");
	answer(ioctl(group, VFIO_GROUP_UNSET_CONTAINER), "leave no container");
	bad = -1;
	answer(ioctl(group, VFIO_GROUP_SET_CONTAINER, &bad), "container -1");
	bad = 1000;
	answer(ioctl(group, VFIO_GROUP_SET_CONTAINER, &bad), "container that is closed");
	answer(ioctl(group, VFIO_GROUP_SET_CONTAINER, &null), "/dev/null as container");
	answer(ioctl(group, VFIO_GROUP_SET_CONTAINER, &group), "itself as container");
	answer(ioctl(group, VFIO_GROUP_SET_CONTAINER, NULL), "container at no address");
	answer(ioctl(group, VFIO_GROUP_SET_CONTAINER, &iommufd), "an empty iommufd as container");
	answer(ioctl(group, VFIO_GROUP_UNSET_CONTAINER), "leave it");
	answer(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "container");
	answer(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "container again");
	answer(ioctl(group, VFIO_GROUP_SET_CONTAINER, &iommufd), "iommufd then");
	must(group_status(group, 8, &flags));
	value(flags, "status with a container");
	ask_device(group, card_address, "device before the container has a type");
	answer(ioctl(container, VFIO_CHECK_EXTENSION, VFIO_DMA_CC_IOMMU), "coherent, before it has a type");
	for (unsigned long type = 0; type < 9; type++)
		if (type != VFIO_TYPE1_IOMMU && type != VFIO_TYPE1v2_IOMMU)
			answer(ioctl(container, VFIO_SET_IOMMU, type), "set type %lu", type);
	answer(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "set type 3");
	answer(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "set type 3 again");
	answer(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1_IOMMU), "set type 1 then");
	for (unsigned long extension = 0; extension < 12; extension++)
		answer(ioctl(container, VFIO_CHECK_EXTENSION, extension), "extension %lu of type 3", extension);
	ask_numbers(container, "container of type 3");
	ask_device(group, "0000:00:00.0", "a device of another group");
	ask_device(group, "", "a device without a name");
	ask_device(group, NULL, "a name at no address");
	snprintf(name, sizeof(name), "%s x=y", card_address);
	ask_device(group, name, "a device with an unknown option");
	snprintf(name, sizeof(name), "%s ", card_address);
	ask_device(group, name, "a device with a blank");
	snprintf(name, sizeof(name), "%s vf_token=83d9f6e4-0f2a-4c7e-9a4e-0123456789ab", card_address);
	ask_device(group, name, "a device with a token");
	int device = answer_fd(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, card_address), "device");
	int other = answer_fd(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, card_address), "device a second time");
	value((uint64_t)fcntl(device, F_GETFL) & O_ACCMODE, "mode of the device");
	value((uint64_t)fcntl(device, F_GETFD), "descriptor flags of the device");
	uint32_t id;
	answer(bind_iommufd(device, 0, iommufd, &id), "bind a device of a group");
	id = 1;
	answer(attach(device, 0, 0, &id), "attach a device of a group");
	answer(detach(device, 0, 0), "detach a device of a group");
	answer(ioctl(group, VFIO_GROUP_UNSET_CONTAINER), "leave the container with devices");
	close(other);
	answer(ioctl(group, VFIO_GROUP_UNSET_CONTAINER), "leave the container with one device");
	close(container);
	struct vfio_device_info info = { .argsz = sizeof(info) };
	answer(ioctl(device, VFIO_DEVICE_GET_INFO, &info), "the device lives without the container's descriptor");
	close(group);
	answer(ioctl(device, VFIO_DEVICE_GET_INFO, &info), "the device lives without the group's descriptor");
	group = answer_fd(open(card_group, O_RDWR), "open the group while the device is open");
	int cdev = answer_fd(open(card_cdev, O_RDWR), "open the character device then");
	answer(bind_iommufd(cdev, 0, iommufd, &id), "bind it");
	close(cdev);
	close(device);
	if (group < 0)
		group = answer_fd(open(card_group, O_RDWR), "open the group after the device is closed");
	must(group_status(group, 8, &flags));
	value(flags, "status after the device is closed");
	answer(ioctl(group, VFIO_GROUP_UNSET_CONTAINER), "leave the container after that");
	must(group_status(group, 8, &flags));
	value(flags, "status after that");
}

/* A group in a container, and what can go first. */
static void ask_group_end(void)
{
	int group = (int)must(open(card_group, O_RDWR)), container = (int)must(open("/dev/vfio/vfio", O_RDWR));

	must(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container));
	must(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU));
	answer(ioctl(group, VFIO_GROUP_UNSET_CONTAINER), "leave a container with a type");
	answer(ioctl(container, VFIO_IOMMU_UNMAP_DMA, NULL), "unmap in a container without groups");
	answer(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "type of a container without groups");
	answer(ioctl(group, VFIO_GROUP_SET_CONTAINER, &container), "come back");
	answer(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1_IOMMU), "another type");
	close(group);
	answer(ioctl(container, VFIO_SET_IOMMU, VFIO_TYPE1_IOMMU), "type after the group is closed");
	group = answer_fd(open(card_group, O_RDWR), "open the group again");
	close(container);
	answer(ioctl(group, VFIO_GROUP_UNSET_CONTAINER), "leave a container that is closed");
}

/* A group on an iommufd in the place of a container. */
static void ask_group_iommufd(void)
{
	int group = (int)must(open(card_group, O_RDWR)), iommufd = (int)must(open("/dev/iommu", O_RDWR)), device;
	uint32_t flags, ioas = new_ioas(iommufd);
	struct iommu_vfio_ioas set = { .size = sizeof(set), .op = IOMMU_VFIO_IOAS_SET, .ioas_id = ioas };

	answer(ioctl(group, VFIO_GROUP_SET_CONTAINER, &iommufd), "iommufd");
	must(group_status(group, 8, &flags));
	value(flags, "status");
	ask_device(group, card_address, "device before it has an address space");
	must(ioctl(iommufd, IOMMU_VFIO_IOAS, &set));
	ask_device(group, card_address, "device without a type");
	answer(ioctl(iommufd, VFIO_SET_IOMMU, VFIO_TYPE1v2_IOMMU), "type");
	device = answer_fd(ioctl(group, VFIO_GROUP_GET_DEVICE_FD, card_address), "device");
	answer(destroy(iommufd, ioas), "destroy its address space");
	answer(ioctl(group, VFIO_GROUP_UNSET_CONTAINER), "leave with a device");
	flags = ioas;
	answer(attach(device, 0, 0, &flags), "attach");
	close(iommufd);
	answer(ioctl(group, VFIO_GROUP_UNSET_CONTAINER), "leave with a device after the iommufd is closed");
	close(device);
	answer(ioctl(group, VFIO_GROUP_UNSET_CONTAINER), "leave");
	answer(ioctl(group, VFIO_GROUP_UNSET_CONTAINER), "leave again");
}

static void ask_cdev(void)
{
	int cdev = answer_fd(open(card_cdev, O_RDWR), "open"), second = answer_fd(open(card_cdev, O_RDWR), "open a second");
	int iommufd = (int)must(open("/dev/iommu", O_RDWR)), null = (int)must(open("/dev/null", O_RDWR));
	uint32_t id, other, ioas = new_ioas(iommufd), ioas2 = new_ioas(iommufd), pt;

	ask_file_calls(cdev, "before it is bound");
	ask_numbers(cdev, "before it is bound");
	pt = ioas;
	answer(attach(cdev, 0, 0, &pt), "attach before it is bound");
	answer(detach(cdev, 0, 0), "detach before it is bound");
	answer(bind_iommufd(cdev, 0, -1, &id), "bind to -1");
	answer(bind_iommufd(cdev, 0, 1000, &id), "bind to what is closed");
	answer(bind_iommufd(cdev, 0, null, &id), "bind to /dev/null");
	answer(bind_iommufd(cdev, 0, cdev, &id), "bind to itself");
	answer(bind_iommufd(cdev, 2, iommufd, &id), "bind with an unknown flag");
	for (uint32_t argsz = 0; argsz <= 24; argsz += 4) {
		struct vfio_device_bind_iommufd cmd = { .argsz = argsz, .iommufd = -1 };

		answer(ioctl(cdev, VFIO_DEVICE_BIND_IOMMUFD, &cmd), "bind to -1, argsz %u", argsz);
	}
	answer(bind_iommufd(cdev, 0, iommufd, &id), "bind");
	answer(bind_iommufd(cdev, 0, iommufd, &other), "bind again");
	answer(bind_iommufd(second, 0, iommufd, &other), "bind the second");
	answer_fd(open(card_group, O_RDWR), "open the group of a bound device");
	ask_numbers(cdev, "bound");
	answer(detach(cdev, 0, 0), "detach before it is attached");
	pt = 0;
	answer(attach(cdev, 0, 0, &pt), "attach to 0");
	pt = 9999;
	answer(attach(cdev, 0, 0, &pt), "attach to what is not there");
	pt = id;
	answer(attach(cdev, 0, 0, &pt), "attach to itself");
	pt = ioas;
	answer(attach(cdev, 2, 0, &pt), "attach with an unknown flag");
	for (uint32_t argsz = 0; argsz <= 20; argsz += 4) {
		struct vfio_device_attach_iommufd_pt cmd = { .argsz = argsz };

		answer(ioctl(cdev, VFIO_DEVICE_ATTACH_IOMMUFD_PT, &cmd), "attach to 0, argsz %u", argsz);
	}
	answer(attach(cdev, 0, 0, &pt), "attach");
	value(pt != ioas, "it is told its page table");
	answer(destroy(iommufd, ioas), "destroy its address space");
	answer(destroy(iommufd, pt), "destroy its page table");
	answer(destroy(iommufd, id), "destroy its object");
	pt = ioas;
	answer(attach(cdev, 0, 0, &pt), "attach to the same");
	pt = ioas2;
	answer(attach(cdev, 0, 0, &pt), "attach to another");
	answer(destroy(iommufd, ioas), "destroy the first address space");
	pt = ioas2;
	answer(attach(cdev, VFIO_DEVICE_ATTACH_PASID, 5, &pt), "attach a pasid");
	answer(detach(cdev, VFIO_DEVICE_DETACH_PASID, 5), "detach a pasid");
	answer(detach(cdev, 2, 0), "detach with an unknown flag");
	for (uint32_t argsz = 0; argsz < 8; argsz += 4) {
		struct vfio_device_detach_iommufd_pt cmd = { .argsz = argsz };

		answer(ioctl(cdev, VFIO_DEVICE_DETACH_IOMMUFD_PT, &cmd), "detach, argsz %u", argsz);
	}
	answer(detach(cdev, 0, 0), "detach");
	answer(detach(cdev, 0, 0), "detach again");
	answer(destroy(iommufd, ioas2), "destroy the second address space");
	ioas = new_ioas(iommufd);
	pt = ioas;
	must(attach(cdev, 0, 0, &pt));
	close(cdev);
	answer(destroy(iommufd, ioas), "destroy the address space after the device is closed");
	answer(destroy(iommufd, id), "destroy the device's object after it is closed");
	answer(bind_iommufd(second, 0, iommufd, &other), "bind the second after the first is closed");
	close(iommufd);
	struct vfio_device_info info = { .argsz = sizeof(info) };
	answer(ioctl(second, VFIO_DEVICE_GET_INFO, &info), "info after the iommufd is closed");
	close(second);
	int group = answer_fd(open(card_group, O_RDWR), "open the group");
	cdev = answer_fd(open(card_cdev, O_RDWR), "open the character device while the group is open");
	iommufd = (int)must(open("/dev/iommu", O_RDWR));
	answer(bind_iommufd(cdev, 0, iommufd, &id), "bind while the group is open");
	close(group);
	answer(bind_iommufd(cdev, 0, iommufd, &id), "bind after the group is closed");
}

static void ask_cdev_token(void)
{
	int cdev = (int)must(open(card_cdev, O_RDWR)), iommufd = (int)must(open("/dev/iommu", O_RDWR));
	unsigned char token[16] = { 1, 2, 3 };
	struct vfio_device_bind_iommufd cmd = { .argsz = sizeof(cmd), .flags = VFIO_DEVICE_BIND_FLAG_TOKEN, .iommufd = iommufd,
						.token_uuid_ptr = (uintptr_t)token };

	cmd.argsz = 16;
	answer(ioctl(cdev, VFIO_DEVICE_BIND_IOMMUFD, &cmd), "token that does not fit");
	cmd.argsz = sizeof(cmd);
	cmd.token_uuid_ptr = 1;
	answer(ioctl(cdev, VFIO_DEVICE_BIND_IOMMUFD, &cmd), "token at a bad address");
	cmd.token_uuid_ptr = (uintptr_t)token;
	answer(ioctl(cdev, VFIO_DEVICE_BIND_IOMMUFD, &cmd), "token");
}

/* The native container's memory. */
static int open_group = -1;

static int ready(unsigned long type)
{
	int container = (int)must(open("/dev/vfio/vfio", O_RDWR));

	open_group = (int)must(open(card_group, O_RDWR));
	must(ioctl(open_group, VFIO_GROUP_SET_CONTAINER, &container));
	must(ioctl(container, VFIO_SET_IOMMU, type));
	return container;
}

static void end(int container)
{
	close(open_group);
	close(container);
}

static void ask_container_info(void)
{
	ask_info(ready(VFIO_TYPE1v2_IOMMU));
}

static void ask_container_map(void)
{
	ask_map(ready(VFIO_TYPE1v2_IOMMU));
}

static void ask_unmap_v1(void)
{
	ask_unmap(ready, end, VFIO_TYPE1_IOMMU);
}

static void ask_unmap_v2(void)
{
	ask_unmap(ready, end, VFIO_TYPE1v2_IOMMU);
}

int main(int argc, char **argv)
{
	static const struct section sections[] = {
		{ "container", ask_container },	    { "group", ask_group },	     { "group end", ask_group_end },
		{ "group on iommufd", ask_group_iommufd }, { "cdev", ask_cdev },     { "cdev token", ask_cdev_token },
		{ "native info", ask_container_info }, { "native map", ask_container_map },
		{ "native unmap v1", ask_unmap_v1 }, { "native unmap v2", ask_unmap_v2 }, { 0 },
	};

	return run_card(sections, argc, argv);
}
