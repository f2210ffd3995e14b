/* A device of VFIO on PCI: its regions, its configuration space, its interrupts, reset and features. */
#include "card.h"

static int device_of_cdev(int *iommufd)
{
	int device = (int)must(open(card_cdev, O_RDWR));
	uint32_t id;

	*iommufd = (int)must(open("/dev/iommu", O_RDWR));
	must(bind_iommufd(device, 0, *iommufd, &id));
	return device;
}

static int device(void)
{
	int iommufd;

	return device_of_cdev(&iommufd);
}

static void ask_info(void)
{
	int fd = device();
	unsigned char area[256];
	struct vfio_device_info *info = (void *)area;

	for (uint32_t argsz = 0; argsz <= 40; argsz += 4) {
		memset(area, 0xa5, sizeof(area));
		info->argsz = argsz;
		answer(ioctl(fd, VFIO_DEVICE_GET_INFO, info), "argsz %u", argsz);
		value(info->argsz, "argsz %u: argsz", argsz);
	}
	memset(area, 0, sizeof(area));
	info->argsz = sizeof(area);
	must(ioctl(fd, VFIO_DEVICE_GET_INFO, info));
	value(info->flags, "flags");
	value(info->num_regions, "regions");
	value(info->num_irqs, "interrupts");
	for (uint32_t at = info->cap_offset, i = 0; at && at < sizeof(area) - 8 && i < 8; i++) {
		struct vfio_info_cap_header *header = (void *)(area + at);

		value(header->id, "capability %u: id", i);
		value(header->version, "capability %u: version", i);
		at = header->next;
	}
}

static int region(int fd, uint32_t index, struct vfio_region_info *info, uint32_t argsz)
{
	memset(info, 0, argsz);
	info->argsz = argsz;
	info->index = index;
	return ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, info);
}

static void ask_regions(void)
{
	int fd = device();
	unsigned char area[512];
	struct vfio_region_info *info = (void *)area;

	for (uint32_t argsz = 0; argsz <= 40; argsz += 4) {
		memset(area, 0, sizeof(area));
		info->argsz = argsz;
		answer(ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, info), "argsz %u", argsz);
	}
	for (uint32_t index = 0; index < 12; index++) {
		answer(region(fd, index, info, sizeof(*info)), "region %u", index);
		value(info->argsz, "region %u: argsz", index);
		value(info->flags, "region %u: flags", index);
		value(info->size, "region %u: size", index);
		value(info->offset, "region %u: offset", index);
		value(info->cap_offset, "region %u: capabilities at", index);
		if (region(fd, index, info, sizeof(area)) || !info->cap_offset)
			continue;
		for (uint32_t at = info->cap_offset, i = 0; at && at < sizeof(area) - 8 && i < 8; i++) {
			struct vfio_info_cap_header *header = (void *)(area + at);

			value(header->id, "region %u: capability %u: id", index, i);
			value(header->version, "region %u: capability %u: version", index, i);
			if (header->id == VFIO_REGION_INFO_CAP_SPARSE_MMAP) {
				struct vfio_region_info_cap_sparse_mmap *sparse = (void *)header;

				for (uint32_t j = 0; j < sparse->nr_areas && j < 8; j++) {
					value(sparse->areas[j].offset, "region %u: area %u", index, j);
					value(sparse->areas[j].size, "region %u: area %u: size", index, j);
				}
			}
			at = header->next;
		}
	}
	answer(region(fd, 0xffffffff, info, sizeof(*info)), "region ffffffff");
	answer(ioctl(fd, VFIO_DEVICE_GET_REGION_INFO, NULL), "null pointer");
}

static uint64_t at(uint32_t index)
{
	return (uint64_t)index << 40;
}

/* Reading and writing of regions: lengths, bounds, regions that are not there. */
static void ask_access(void)
{
	int fd = device();
	unsigned char buffer[PAGE];
	struct vfio_region_info info;

	for (uint32_t index = 0; index < 11; index++) {
		uint64_t size = region(fd, index, &info, sizeof(info)) ? 0 : info.size;

		/* In VGA's range, or a ROM, what is there is not the device's alone. */
		if (index == VFIO_PCI_VGA_REGION_INDEX || index == VFIO_PCI_ROM_REGION_INDEX)
			continue;
		answer(pread(fd, buffer, 4, (off_t)at(index)), "region %u: read 4", index);
		answer(pread(fd, buffer, 0, (off_t)at(index)), "region %u: read 0", index);
		answer(pread(fd, buffer, 4, (off_t)(at(index) + size)), "region %u: read at its end", index);
		answer(pread(fd, buffer, 4, (off_t)(at(index) + size - 2)), "region %u: read across its end", index);
		answer(pread(fd, buffer, 4, (off_t)(at(index) + size + 0x100000)), "region %u: read far behind", index);
		answer(pread(fd, nowhere, 4, (off_t)at(index)), "region %u: read to a bad address", index);
		answer(pwrite(fd, buffer, 0, (off_t)at(index)), "region %u: write 0", index);
		answer(pwrite(fd, buffer, 4, (off_t)(at(index) + size)), "region %u: write at its end", index);
		answer(pwrite(fd, nowhere, 4, (off_t)at(index)), "region %u: write from a bad address", index);
	}
	answer(pread(fd, buffer, 4, (off_t)at(200)), "a region that is not there");
	answer(read(fd, buffer, 4), "read without an offset");
	answer(lseek(fd, 0, SEEK_SET), "lseek");
	answer(lseek(fd, (off_t)at(7), SEEK_SET), "lseek to the configuration space");
	answer(lseek(fd, 0, SEEK_END), "lseek to the end");
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN | POLLOUT };
	answer(poll(&poll_fd, 1, 0), "poll");
}

static void ask_mmap(void)
{
	int fd = device();
	struct vfio_region_info info;
	const int rw = PROT_READ | PROT_WRITE;

	for (uint32_t index = 0; index < VFIO_PCI_VGA_REGION_INDEX; index++) {
		must(region(fd, index, &info, sizeof(info)));
		size_t size = info.size ? (size_t)info.size : PAGE;
		off_t offset = (off_t)at(index);

		answer_mmap(mmap(NULL, size, rw, MAP_SHARED, fd, offset), "region %u", index);
		answer_mmap(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, offset), "region %u: a page to read", index);
		answer_mmap(mmap(NULL, PAGE, rw, MAP_PRIVATE, fd, offset), "region %u: private", index);
		answer_mmap(mmap(NULL, size + PAGE, rw, MAP_SHARED, fd, offset), "region %u: a page too much", index);
		answer_mmap(mmap(NULL, PAGE, rw, MAP_SHARED, fd, offset + (off_t)size), "region %u: behind it", index);
		answer_mmap(mmap(NULL, PAGE, rw | PROT_EXEC, MAP_SHARED, fd, offset), "region %u: to execute", index);
	}
	answer_mmap(mmap(NULL, PAGE, rw, MAP_SHARED, fd, (off_t)at(77)), "a region that is not there");
}

static uint32_t config_read(int fd, uint32_t offset, size_t size)
{
	uint32_t number = 0;

	must(pread(fd, &number, size, (off_t)(at(VFIO_PCI_CONFIG_REGION_INDEX) + offset)));
	return number;
}

static void config_write(int fd, uint32_t offset, size_t size, uint32_t number)
{
	must(pwrite(fd, &number, size, (off_t)(at(VFIO_PCI_CONFIG_REGION_INDEX) + offset)));
}

static void ask_config(void)
{
	int fd = device();

	for (uint32_t offset = 0; offset < 0x40; offset += 4) {
		/* Where a BAR lies and which line an interrupt has is the machine's business. */
		uint32_t fixed = offset >= 0x10 && offset < 0x28 ? 0xf : offset == 0x3c ? 0xffffff00 : 0xffffffff;

		value(config_read(fd, offset, 4) & fixed, "read %02x", offset);
	}
	for (uint32_t size = 1; size < 9; size++) {
		unsigned char buffer[8] = {};

		for (uint32_t offset = 0; offset < 4; offset++)
			answer(pread(fd, buffer, size, (off_t)(at(VFIO_PCI_CONFIG_REGION_INDEX) + offset)), "read %u bytes at %u",
			       size, offset);
	}
	/* The list of capabilities. */
	for (uint32_t offset = config_read(fd, 0x34, 1), i = 0; offset && i < 16; i++) {
		uint32_t header = config_read(fd, offset, 2);

		value(offset, "capability %u at", i);
		value(header & 0xff, "capability %u: id", i);
		offset = header >> 8;
	}
	struct vfio_region_info info;
	if (!region(fd, VFIO_PCI_CONFIG_REGION_INDEX, &info, sizeof(info)) && info.size > 0x100)
		value(config_read(fd, 0x100, 4), "first extended capability");
	/* What is left of a register after all ones and after zero are written to it. */
	for (uint32_t offset = 0; offset < 0x40; offset += 4) {
		uint32_t before = config_read(fd, offset, 4);

		config_write(fd, offset, 4, 0xffffffff);
		value(config_read(fd, offset, 4), "%02x after ones", offset);
		config_write(fd, offset, 4, 0);
		value(config_read(fd, offset, 4), "%02x after zeros", offset);
		config_write(fd, offset, 4, before);
	}
	for (uint32_t offset = config_read(fd, 0x34, 1), i = 0; offset && i < 16; i++) {
		uint32_t header = config_read(fd, offset, 2);

		for (uint32_t word = 2; word < 12; word += 2) {
			uint32_t before = config_read(fd, offset + word, 2);

			/* Not the Enable bits, nor a change of power or reset. */
			if (word == 2 || ((header & 0xff) == 1 && word == 4) || ((header & 0xff) == 0x10 && word == 8))
				continue;
			config_write(fd, offset + word, 2, 0xffff);
			value(config_read(fd, offset + word, 2), "capability %u (%x), word %u after ones", i, header & 0xff, word);
			config_write(fd, offset + word, 2, before);
		}
		offset = header >> 8;
	}
}

static void ask_irq_info(void)
{
	int fd = device();

	for (uint32_t argsz = 0; argsz <= 20; argsz += 4) {
		struct vfio_irq_info info[2] = { { .argsz = argsz } };

		answer(ioctl(fd, VFIO_DEVICE_GET_IRQ_INFO, info), "argsz %u", argsz);
	}
	for (uint32_t index = 0; index < 8; index++) {
		struct vfio_irq_info info = { .argsz = sizeof(info), .index = index };

		if (answer(ioctl(fd, VFIO_DEVICE_GET_IRQ_INFO, &info), "index %u", index))
			continue;
		value(info.flags, "index %u: flags", index);
		value(info.count, "index %u: count", index);
	}
	answer(ioctl(fd, VFIO_DEVICE_GET_IRQ_INFO, NULL), "null pointer");
}

/* SET_IRQS with data that has its own length. */
static int set_irqs(int fd, uint32_t flags, uint32_t index, uint32_t start, uint32_t count, const void *data, size_t length)
{
	unsigned char area[sizeof(struct vfio_irq_set) + 256] = {};
	struct vfio_irq_set *cmd = (void *)area;

	*cmd = (struct vfio_irq_set){ .argsz = (uint32_t)(sizeof(*cmd) + length), .flags = flags, .index = index,
				      .start = start, .count = count };
	if (length)
		memcpy(cmd->data, data, length);
	return ioctl(fd, VFIO_DEVICE_SET_IRQS, cmd);
}

enum {
	NONE = VFIO_IRQ_SET_DATA_NONE,
	BOOL = VFIO_IRQ_SET_DATA_BOOL,
	EVENTFD = VFIO_IRQ_SET_DATA_EVENTFD,
	MASK = VFIO_IRQ_SET_ACTION_MASK,
	UNMASK = VFIO_IRQ_SET_ACTION_UNMASK,
	TRIGGER = VFIO_IRQ_SET_ACTION_TRIGGER,
};

static uint64_t drain(int event)
{
	uint64_t count = 0;

	return read(event, &count, sizeof(count)) == sizeof(count) ? count : 0;
}

static void ask_set_irqs(void)
{
	int fd = device();
	int event = (int)must(eventfd(0, EFD_NONBLOCK)), null = (int)must(open("/dev/null", O_RDWR)), none = -1;
	unsigned char yes = 1;

	for (uint32_t argsz = 0; argsz <= 24; argsz += 4) {
		struct vfio_irq_set cmd = { .argsz = argsz, .flags = NONE | TRIGGER };

		answer(ioctl(fd, VFIO_DEVICE_SET_IRQS, &cmd), "argsz %u", argsz);
	}
	answer(ioctl(fd, VFIO_DEVICE_SET_IRQS, NULL), "null pointer");
	/* Each combination of data and action, on each kind of interrupt while it is not enabled. */
	for (uint32_t index = 0; index < 6; index++)
		for (uint32_t flags = 0; flags < 0x40; flags++) {
			/* Enabling is asked below. */
			if (flags == (EVENTFD | TRIGGER))
				continue;
			answer(set_irqs(fd, flags, index, 0, 1, flags & EVENTFD ? (void *)&event : (void *)&yes,
					flags & EVENTFD ? 4 : flags & BOOL ? 1 : 0), "index %u, flags %x", index, flags);
		}
	answer(set_irqs(fd, 0x40 | NONE | TRIGGER, 0, 0, 1, NULL, 0), "an unknown flag");
	for (uint32_t index = 0; index < 6; index++) {
		struct vfio_irq_info info = { .argsz = sizeof(info), .index = index };

		if (ioctl(fd, VFIO_DEVICE_GET_IRQ_INFO, &info))
			continue;
		uint32_t n = info.count;

		answer(set_irqs(fd, NONE | TRIGGER, index, 0, 0, NULL, 0), "index %u: none of them", index);
		answer(set_irqs(fd, NONE | TRIGGER, index, n, 1, NULL, 0), "index %u: one after the last", index);
		answer(set_irqs(fd, NONE | TRIGGER, index, 0, n + 1, NULL, 0), "index %u: one too many", index);
		answer(set_irqs(fd, NONE | TRIGGER, index, 0xffffffff, 2, NULL, 0), "index %u: a range that wraps", index);
		answer(set_irqs(fd, EVENTFD | TRIGGER, index, 0, 1, NULL, 0), "index %u: no data", index);
		answer(set_irqs(fd, EVENTFD | TRIGGER, index, 0, 1, &null, 4), "index %u: no eventfd", index);
		int closed = 1000;
		answer(set_irqs(fd, EVENTFD | TRIGGER, index, 0, 1, &closed, 4), "index %u: a closed one", index);
		answer(set_irqs(fd, EVENTFD | TRIGGER, index, 0, 1, &none, 4), "index %u: -1 while it is off", index);
		if (answer(set_irqs(fd, EVENTFD | TRIGGER, index, 0, 1, &event, 4), "index %u: enable", index))
			continue;
		answer(set_irqs(fd, EVENTFD | TRIGGER, index, 0, 1, &event, 4), "index %u: enable again", index);
		answer(set_irqs(fd, NONE | TRIGGER, index, 0, 1, NULL, 0), "index %u: trigger", index);
		value(drain(event), "index %u: signals", index);
		answer(set_irqs(fd, BOOL | TRIGGER, index, 0, 1, &yes, 1), "index %u: trigger by a flag", index);
		value(drain(event), "index %u: signals by a flag", index);
		yes = 0;
		answer(set_irqs(fd, BOOL | TRIGGER, index, 0, 1, &yes, 1), "index %u: do not trigger by a flag", index);
		value(drain(event), "index %u: signals by no flag", index);
		yes = 1;
		answer(set_irqs(fd, NONE | MASK, index, 0, 1, NULL, 0), "index %u: mask", index);
		answer(set_irqs(fd, NONE | TRIGGER, index, 0, 1, NULL, 0), "index %u: trigger while masked", index);
		value(drain(event), "index %u: signals while masked", index);
		answer(set_irqs(fd, NONE | UNMASK, index, 0, 1, NULL, 0), "index %u: unmask", index);
		value(drain(event), "index %u: signals after that", index);
		answer(set_irqs(fd, BOOL | MASK, index, 0, 1, &yes, 1), "index %u: mask by a flag", index);
		answer(set_irqs(fd, BOOL | UNMASK, index, 0, 1, &yes, 1), "index %u: unmask by a flag", index);
		int unmask = (int)must(eventfd(0, EFD_NONBLOCK));
		answer(set_irqs(fd, EVENTFD | UNMASK, index, 0, 1, &unmask, 4), "index %u: unmask by an eventfd", index);
		answer(set_irqs(fd, EVENTFD | UNMASK, index, 0, 1, &none, 4), "index %u: not by an eventfd", index);
		answer(set_irqs(fd, EVENTFD | MASK, index, 0, 1, &event, 4), "index %u: mask by an eventfd", index);
		for (uint32_t other = 0; other < 3; other++)
			if (other != index && index < 3)
				answer(set_irqs(fd, EVENTFD | TRIGGER, other, 0, 1, &event, 4), "index %u: enable %u too", index,
				       other);
		if (n > 2) {
			int events[3] = { event, -1, event };

			answer(set_irqs(fd, EVENTFD | TRIGGER, index, 0, 3, events, 12), "index %u: three", index);
			answer(set_irqs(fd, NONE | TRIGGER, index, 0, 3, NULL, 0), "index %u: trigger three", index);
			value(drain(event), "index %u: signals of three", index);
			answer(set_irqs(fd, NONE | TRIGGER, index, 3, 1, NULL, 0), "index %u: trigger one that is off", index);
		}
		answer(set_irqs(fd, EVENTFD | TRIGGER, index, 0, 1, &none, 4), "index %u: take the eventfd away", index);
		answer(set_irqs(fd, NONE | TRIGGER, index, 0, 1, NULL, 0), "index %u: trigger without it", index);
		answer(set_irqs(fd, NONE | TRIGGER, index, 0, 0, NULL, 0), "index %u: disable", index);
		answer(set_irqs(fd, NONE | TRIGGER, index, 0, 0, NULL, 0), "index %u: disable again", index);
	}
}

static void ask_reset(void)
{
	int iommufd, fd = device_of_cdev(&iommufd);
	unsigned char area[256] = {};
	struct vfio_pci_hot_reset_info *info = (void *)area;
	struct {
		struct vfio_pci_hot_reset head;
		int32_t fds[4];
	} reset;

	answer(ioctl(fd, VFIO_DEVICE_RESET), "reset");
	for (uint32_t argsz = 0; argsz <= 16; argsz += 4) {
		memset(area, 0, sizeof(area));
		info->argsz = argsz;
		answer(ioctl(fd, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, info), "hot reset info, argsz %u", argsz);
		value(info->count, "hot reset info, argsz %u: count", argsz);
	}
	memset(area, 0, sizeof(area));
	info->argsz = sizeof(area);
	if (!answer(ioctl(fd, VFIO_DEVICE_GET_PCI_HOT_RESET_INFO, info), "hot reset info")) {
		value(info->flags, "hot reset info: flags");
		value(info->count, "hot reset info: devices");
	}
	for (uint32_t argsz = 0; argsz <= 16; argsz += 4) {
		memset(&reset, 0, sizeof(reset));
		reset.head.argsz = argsz;
		answer(ioctl(fd, VFIO_DEVICE_PCI_HOT_RESET, &reset), "hot reset of a bus, argsz %u", argsz);
	}
	reset.head.argsz = sizeof(reset);
	reset.head.count = 1;
	reset.fds[0] = -1;
	answer(ioctl(fd, VFIO_DEVICE_PCI_HOT_RESET, &reset), "hot reset with group -1");
	reset.fds[0] = iommufd;
	answer(ioctl(fd, VFIO_DEVICE_PCI_HOT_RESET, &reset), "hot reset with an iommufd as group");
	reset.head.count = 1000;
	answer(ioctl(fd, VFIO_DEVICE_PCI_HOT_RESET, &reset), "hot reset with 1000 groups");
	reset.head.count = 0;
	reset.head.flags = 1;
	answer(ioctl(fd, VFIO_DEVICE_PCI_HOT_RESET, &reset), "hot reset with a flag");
}

static int feature(int fd, uint32_t flags, void *data, size_t length)
{
	unsigned char area[sizeof(struct vfio_device_feature) + 128] = {};
	struct vfio_device_feature *cmd = (void *)area;
	int result;

	cmd->argsz = (uint32_t)(sizeof(*cmd) + length);
	cmd->flags = flags;
	if (length)
		memcpy(cmd->data, data, length);
	result = ioctl(fd, VFIO_DEVICE_FEATURE, cmd);
	if (length)
		memcpy(data, cmd->data, length);
	return result;
}

static void ask_feature(void)
{
	int fd = device();
	unsigned char data[64];

	for (uint32_t argsz = 0; argsz <= 8; argsz += 4) {
		struct vfio_device_feature cmd = { .argsz = argsz, .flags = VFIO_DEVICE_FEATURE_PROBE };

		answer(ioctl(fd, VFIO_DEVICE_FEATURE, &cmd), "argsz %u", argsz);
	}
	answer(ioctl(fd, VFIO_DEVICE_FEATURE, NULL), "null pointer");
	for (uint32_t index = 0; index < 16; index++)
		for (uint32_t flags = 0; flags < 8; flags++) {
			/* Not into low power, from which only an access wakes. */
			if (index >= 3 && index <= 5 && (flags == 2 || flags == 4))
				continue;
			memset(data, 0, sizeof(data));
			answer(feature(fd, index | flags << 16, data, sizeof(data)), "feature %u, %s%s%s", index,
			       flags & 1 ? "get " : "", flags & 2 ? "set " : "", flags & 4 ? "probe" : "");
			answer(feature(fd, index | flags << 16, NULL, 0), "feature %u, %s%s%s, no data", index,
			       flags & 1 ? "get " : "", flags & 2 ? "set " : "", flags & 4 ? "probe" : "");
		}
	answer(feature(fd, 0xffff | VFIO_DEVICE_FEATURE_PROBE, NULL, 0), "feature ffff, probe");
	answer(feature(fd, 1u << 31 | VFIO_DEVICE_FEATURE_PROBE, NULL, 0), "an unknown flag");
}

static void ask_ioeventfd(void)
{
	int fd = device(), event = (int)must(eventfd(0, EFD_NONBLOCK)), null = (int)must(open("/dev/null", O_RDWR));
	struct vfio_device_ioeventfd cmd;

#define IOEVENTFD(question, flags_, offset_, data_, fd_)                                             \
	do {                                                                                         \
		cmd = (struct vfio_device_ioeventfd){ .argsz = sizeof(cmd), .flags = (flags_),       \
						      .offset = (offset_), .data = (data_), .fd = (fd_) }; \
		answer(ioctl(fd, VFIO_DEVICE_IOEVENTFD, &cmd), "%s", question);                      \
	} while (0)
	for (uint32_t argsz = 0; argsz <= 40; argsz += 8) {
		cmd = (struct vfio_device_ioeventfd){ .argsz = argsz, .flags = 4, .fd = -1 };
		answer(ioctl(fd, VFIO_DEVICE_IOEVENTFD, &cmd), "argsz %u", argsz);
	}
	IOEVENTFD("no size", 0, 0, 0, event);
	IOEVENTFD("two sizes", 3, 0, 0, event);
	IOEVENTFD("an unknown flag", 0x14, 0, 0, event);
	IOEVENTFD("fd -2", 4, 0, 0, -2);
	IOEVENTFD("remove what is not there", 4, 0, 0, -1);
	IOEVENTFD("no eventfd", 4, 0, 0, null);
	IOEVENTFD("configuration space", 4, at(VFIO_PCI_CONFIG_REGION_INDEX), 0, event);
	IOEVENTFD("a region that is not there", 4, at(100), 0, event);
	IOEVENTFD("past the end of a region", 4, at(0) + 0x10000000, 0, event);
	IOEVENTFD("not aligned", 4, at(0) + 2, 0, event);
	IOEVENTFD("1 byte", 1, at(0) + 0x10, 0, event);
	IOEVENTFD("2 bytes", 2, at(0) + 0x10, 0, event);
	IOEVENTFD("4 bytes", 4, at(0) + 0x10, 0, event);
	IOEVENTFD("the same again", 4, at(0) + 0x10, 0, event);
	IOEVENTFD("the same with other data", 4, at(0) + 0x10, 1, event);
	IOEVENTFD("8 bytes", 8, at(0) + 0x18, 0, event);
	IOEVENTFD("remove it", 4, at(0) + 0x10, 0, -1);
	IOEVENTFD("remove it again", 4, at(0) + 0x10, 0, -1);
}

int main(int argc, char **argv)
{
	static const struct section sections[] = {
		{ "info", ask_info },	  { "regions", ask_regions },   { "access", ask_access },     { "mmap", ask_mmap },
		{ "config", ask_config }, { "irq info", ask_irq_info }, { "set irqs", ask_set_irqs }, { "reset", ask_reset },
		{ "feature", ask_feature }, { "ioeventfd", ask_ioeventfd }, { 0 },
	};

	return run_card(sections, argc, argv);
}
