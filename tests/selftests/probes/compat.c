/* /dev/iommu in the place of /dev/vfio/vfio: the container's calls in every order. */
#include "type1.h"
#include "world.h"

static int vfio_ioas(int fd, uint16_t op, uint32_t *id)
{
	struct iommu_vfio_ioas cmd = { .size = sizeof(cmd), .op = op, .ioas_id = *id };
	int result = ioctl(fd, IOMMU_VFIO_IOAS, &cmd);

	*id = cmd.ioas_id;
	return result;
}

/* A context with a compatibility address space and a mock device, of this type. */
static int ready(unsigned long type)
{
	int fd = open_iommu();
	uint32_t ioas;

	must(ioas_alloc(fd, &ioas));
	must(vfio_ioas(fd, IOMMU_VFIO_IOAS_SET, &ioas));
	must(mock_domain(fd, ioas, 0, NULL, NULL, NULL));
	must(ioctl(fd, VFIO_SET_IOMMU, type));
	return fd;
}

static void ask_ioas(void)
{
	int fd = open_iommu();
	uint32_t ioas, id = 0;

	answer(vfio_ioas(fd, IOMMU_VFIO_IOAS_GET, &id), "get without one");
	answer(vfio_ioas(fd, IOMMU_VFIO_IOAS_CLEAR, &id), "clear without one");
	id = 99;
	answer(vfio_ioas(fd, IOMMU_VFIO_IOAS_SET, &id), "set what is not there");
	must(ioas_alloc(fd, &ioas));
	id = ioas;
	answer(vfio_ioas(fd, IOMMU_VFIO_IOAS_SET, &id), "set");
	answer(vfio_ioas(fd, IOMMU_VFIO_IOAS_SET, &id), "set the same");
	id = 77;
	answer(vfio_ioas(fd, IOMMU_VFIO_IOAS_GET, &id), "get");
	value(id == ioas, "it is that");
	answer(destroy(fd, ioas), "destroy it");
	answer(vfio_ioas(fd, IOMMU_VFIO_IOAS_GET, &id), "get after it is destroyed");
	must(ioas_alloc(fd, &ioas));
	id = ioas;
	must(vfio_ioas(fd, IOMMU_VFIO_IOAS_SET, &id));
	id = 12345;
	answer(vfio_ioas(fd, IOMMU_VFIO_IOAS_CLEAR, &id), "clear with an id");
	answer(vfio_ioas(fd, IOMMU_VFIO_IOAS_CLEAR, &id), "clear again");
	answer(vfio_ioas(fd, IOMMU_VFIO_IOAS_GET, &id), "get after it is cleared");
	answer(destroy(fd, ioas), "destroy after it is cleared");
	answer(vfio_ioas(fd, 3, &id), "unknown operation");
	close(fd);
}

static void ask_before(int with_ioas, int with_device)
{
	int fd = open_iommu();
	uint32_t ioas;
	uint64_t size = PAGE;
	struct vfio_iommu_type1_info info = { .argsz = sizeof(info) };
	char *buffer = pages(PAGE);

	if (with_ioas) {
		must(ioas_alloc(fd, &ioas));
		must(vfio_ioas(fd, IOMMU_VFIO_IOAS_SET, &ioas));
		if (with_device)
			must(mock_domain(fd, ioas, 0, NULL, NULL, NULL));
	}
	answer(ioctl(fd, VFIO_GET_API_VERSION), "version");
	for (unsigned long extension = 0; extension < 16; extension++)
		answer(ioctl(fd, VFIO_CHECK_EXTENSION, extension), "extension %lu", extension);
	answer(ioctl(fd, VFIO_CHECK_EXTENSION, -1ul), "extension ffffffffffffffff");
	answer(ioctl(fd, VFIO_IOMMU_GET_INFO, &info), "info");
	answer(dma_map(fd, VFIO_DMA_MAP_FLAG_READ, buffer, BASE, PAGE), "map");
	answer(dma_unmap(fd, 0, BASE, &size), "unmap");
	for (unsigned long type = 0; type < 11; type++)
		answer(ioctl(fd, VFIO_SET_IOMMU, type), "set type %lu", type);
	answer(ioctl(fd, VFIO_SET_IOMMU, VFIO_TYPE1_IOMMU), "set type 1 again");
	answer(ioctl(fd, VFIO_IOMMU_GET_INFO, &info), "info after that");
	answer(ioctl(fd, VFIO_GROUP_GET_STATUS, &info), "a group's call");
	answer(ioctl(fd, VFIO_DEVICE_GET_INFO, &info), "a device's call");
	answer(ioctl(fd, VFIO_IOMMU_ENABLE), "ENABLE");
	answer(ioctl(fd, VFIO_IOMMU_DISABLE), "DISABLE");
	for (unsigned long type = 0; type < 11; type++)
		answer(ioctl(fd, VFIO_SET_IOMMU, type), "set type %lu after that", type);
	close(fd);
}

static void ask_empty(void)
{
	ask_before(0, 0);
}

static void ask_without_device(void)
{
	ask_before(1, 0);
}

static void ask_with_device(void)
{
	ask_before(1, 1);
}

static void close_it(int fd)
{
	close(fd);
}

static void ask_ready_info(void)
{
	ask_info(ready(VFIO_TYPE1v2_IOMMU));
}

static void ask_ready_map(void)
{
	ask_map(ready(VFIO_TYPE1v2_IOMMU));
}

static void ask_unmap_v1(void)
{
	ask_unmap(ready, close_it, VFIO_TYPE1_IOMMU);
}

static void ask_unmap_v2(void)
{
	ask_unmap(ready, close_it, VFIO_TYPE1v2_IOMMU);
}

/* Which calls answer at all, by number. */
static void ask_numbers(void)
{
	int fd = ready(VFIO_TYPE1v2_IOMMU);
	char area[512];

	for (unsigned int nr = 0; nr < 32; nr++) {
		memset(area, 0, sizeof(area));
		answer(ioctl(fd, _IO(VFIO_TYPE, VFIO_BASE + nr), area), "number %u", VFIO_BASE + nr);
	}
	close(fd);
}

int main(int argc, char **argv)
{
	static const struct section sections[] = {
		{ "vfio ioas", ask_ioas },  { "compat empty", ask_empty },
		{ "compat without device", ask_without_device },
		{ "compat with device", ask_with_device },
		{ "compat info", ask_ready_info }, { "compat map", ask_ready_map },
		{ "compat unmap v1", ask_unmap_v1 }, { "compat unmap v2", ask_unmap_v2 },
		{ "compat numbers", ask_numbers },   { 0 },
	};

	return run(sections, argc, argv);
}
