/*
 * One object of every kind in an iommufd context, on the mock IOMMU, and short forms of the calls that make them.
 */
#ifndef WORLD_H
#define WORLD_H

#include "probe.h"
#include <iommufd_test.h>

/* Where the world maps 64 pages, each a quarter of which is free behind them. */
#ifndef BASE
#define BASE ((uint64_t)MOCK_APERTURE_START)
#endif
#define PAGES 64UL

struct world {
	int fd;
	uint32_t ioas, ioas2, stdev, stdev2, idev, idev2, hwpt, parent, dirty, nested, fault, viommu, vdevice, veventq, queue;
	uint32_t destroyed;
	int fault_fd, veventq_fd;
	char *buffer;
	int file;
};

enum { WITHOUT_VEVENTQ = 1, WITHOUT_QUEUE = 2, WITHOUT_OBJECTS = 4 };

static inline int test(int fd, struct iommu_test_cmd *cmd)
{
	cmd->size = sizeof(*cmd);
	return ioctl(fd, IOMMU_TEST_CMD, cmd);
}

static inline int destroy(int fd, uint32_t id)
{
	struct iommu_destroy cmd = { .size = sizeof(cmd), .id = id };

	return ioctl(fd, IOMMU_DESTROY, &cmd);
}

static inline int ioas_alloc(int fd, uint32_t *id)
{
	struct iommu_ioas_alloc cmd = { .size = sizeof(cmd) };
	int result = ioctl(fd, IOMMU_IOAS_ALLOC, &cmd);

	*id = cmd.out_ioas_id;
	return result;
}

#define RW (IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE)
#define FIXED (IOMMU_IOAS_MAP_FIXED_IOVA | RW)

static inline int ioas_map(int fd, uint32_t ioas, uint32_t flags, void *va, uint64_t length, uint64_t *iova)
{
	struct iommu_ioas_map cmd = { .size = sizeof(cmd), .flags = flags, .ioas_id = ioas,
				      .user_va = (uintptr_t)va, .length = length, .iova = *iova };
	int result = ioctl(fd, IOMMU_IOAS_MAP, &cmd);

	*iova = cmd.iova;
	return result;
}

static inline int map_at(int fd, uint32_t ioas, void *va, uint64_t length, uint64_t iova)
{
	return ioas_map(fd, ioas, FIXED, va, length, &iova);
}

/* `done` is what the call says it unmapped. */
static inline int ioas_unmap(int fd, uint32_t ioas, uint64_t iova, uint64_t length, uint64_t *done)
{
	struct iommu_ioas_unmap cmd = { .size = sizeof(cmd), .ioas_id = ioas, .iova = iova, .length = length };
	int result = ioctl(fd, IOMMU_IOAS_UNMAP, &cmd);

	if (done)
		*done = cmd.length;
	return result;
}

static inline int ioas_copy(int fd, uint32_t flags, uint32_t dst, uint64_t dst_iova, uint32_t src, uint64_t src_iova,
			    uint64_t length)
{
	struct iommu_ioas_copy cmd = { .size = sizeof(cmd), .flags = flags, .dst_ioas_id = dst, .src_ioas_id = src,
				       .length = length, .dst_iova = dst_iova, .src_iova = src_iova };

	return ioctl(fd, IOMMU_IOAS_COPY, &cmd);
}

static inline int mock_domain(int fd, uint32_t pt, uint32_t flags, uint32_t *stdev, uint32_t *hwpt, uint32_t *idev)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_MOCK_DOMAIN_FLAGS, .id = pt,
				      .mock_domain_flags = { .dev_flags = flags } };
	int result = test(fd, &cmd);

	if (stdev)
		*stdev = cmd.mock_domain_flags.out_stdev_id;
	if (hwpt)
		*hwpt = cmd.mock_domain_flags.out_hwpt_id;
	if (idev)
		*idev = cmd.mock_domain_flags.out_idev_id;
	return result;
}

/* Attaches a mock device to something else. */
static inline int replace(int fd, uint32_t stdev, uint32_t pt)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_MOCK_DOMAIN_REPLACE, .id = stdev,
				      .mock_domain_replace = { .pt_id = pt } };

	return test(fd, &cmd);
}

static inline int hwpt_alloc(int fd, uint32_t dev, uint32_t pt, uint32_t flags, uint32_t fault, uint32_t *id)
{
	struct iommu_hwpt_alloc cmd = { .size = sizeof(cmd), .flags = flags, .dev_id = dev, .pt_id = pt, .fault_id = fault };
	int result = ioctl(fd, IOMMU_HWPT_ALLOC, &cmd);

	*id = cmd.out_hwpt_id;
	return result;
}

static inline int nested_alloc(int fd, uint32_t dev, uint32_t pt, uint32_t flags, uint32_t fault, uint32_t *id)
{
	struct iommu_hwpt_selftest data = { .iotlb = IOMMU_TEST_IOTLB_DEFAULT };
	struct iommu_hwpt_alloc cmd = { .size = sizeof(cmd), .flags = flags, .dev_id = dev, .pt_id = pt,
					.data_type = IOMMU_HWPT_DATA_SELFTEST, .data_len = sizeof(data),
					.data_uptr = (uintptr_t)&data, .fault_id = fault };
	int result = ioctl(fd, IOMMU_HWPT_ALLOC, &cmd);

	*id = cmd.out_hwpt_id;
	return result;
}

static inline int fault_alloc(int fd, uint32_t *id, int *fault_fd)
{
	struct iommu_fault_alloc cmd = { .size = sizeof(cmd) };
	int result = ioctl(fd, IOMMU_FAULT_QUEUE_ALLOC, &cmd);

	*id = cmd.out_fault_id;
	*fault_fd = result ? -1 : (int)cmd.out_fault_fd;
	return result;
}

static inline int viommu_alloc(int fd, uint32_t dev, uint32_t hwpt, uint32_t type, struct iommu_viommu_selftest *data,
			       uint32_t *id)
{
	struct iommu_viommu_alloc cmd = { .size = sizeof(cmd), .type = type, .dev_id = dev, .hwpt_id = hwpt,
					  .data_len = data ? sizeof(*data) : 0, .data_uptr = (uintptr_t)data };
	int result = ioctl(fd, IOMMU_VIOMMU_ALLOC, &cmd);

	*id = cmd.out_viommu_id;
	return result;
}

static inline int vdevice_alloc(int fd, uint32_t viommu, uint32_t dev, uint64_t virt_id, uint32_t *id)
{
	struct iommu_vdevice_alloc cmd = { .size = sizeof(cmd), .viommu_id = viommu, .dev_id = dev, .virt_id = virt_id };
	int result = ioctl(fd, IOMMU_VDEVICE_ALLOC, &cmd);

	*id = cmd.out_vdevice_id;
	return result;
}

static inline int veventq_alloc(int fd, uint32_t viommu, uint32_t type, uint32_t depth, uint32_t *id, int *event_fd)
{
	struct iommu_veventq_alloc cmd = { .size = sizeof(cmd), .viommu_id = viommu, .type = type, .veventq_depth = depth };
	int result = ioctl(fd, IOMMU_VEVENTQ_ALLOC, &cmd);

	*id = cmd.out_veventq_id;
	*event_fd = result ? -1 : (int)cmd.out_veventq_fd;
	return result;
}

static inline int queue_alloc(int fd, uint32_t viommu, uint32_t type, uint32_t index, uint64_t iova, uint64_t length,
			      uint32_t *id)
{
	struct iommu_hw_queue_alloc cmd = { .size = sizeof(cmd), .viommu_id = viommu, .type = type, .index = index,
					    .nesting_parent_iova = iova, .length = length };
	int result = ioctl(fd, IOMMU_HW_QUEUE_ALLOC, &cmd);

	*id = cmd.out_hw_queue_id;
	return result;
}

static inline int option(int fd, uint32_t which, uint16_t op, uint32_t object, uint64_t *number)
{
	struct iommu_option cmd = { .size = sizeof(cmd), .option_id = which, .op = op, .object_id = object, .val64 = *number };
	int result = ioctl(fd, IOMMU_OPTION, &cmd);

	*number = cmd.val64;
	return result;
}

static inline int set_option(int fd, uint32_t which, uint32_t object, uint64_t number)
{
	return option(fd, which, IOMMU_OPTION_OP_SET, object, &number);
}

static inline int open_iommu(void)
{
	return (int)must(open("/dev/iommu", O_RDWR));
}

static inline void world_make(struct world *w, unsigned int without)
{
	memset(w, 0, sizeof(*w));
	w->fault_fd = w->veventq_fd = -1;
	w->fd = open_iommu();
	w->buffer = pages(PAGES * PAGE);
	w->file = (int)must(memfd_create("probe", 0));
	must(ftruncate(w->file, PAGES * PAGE));
	if (without & WITHOUT_OBJECTS)
		return;
	must(ioas_alloc(w->fd, &w->ioas));
	must(ioas_alloc(w->fd, &w->ioas2));
	must(map_at(w->fd, w->ioas, w->buffer, PAGES * PAGE, BASE));
	must(mock_domain(w->fd, w->ioas, MOCK_FLAGS_DEVICE_PASID, &w->stdev, &w->hwpt, &w->idev));
	must(mock_domain(w->fd, w->ioas, 0, &w->stdev2, NULL, &w->idev2));
	must(hwpt_alloc(w->fd, w->idev, w->ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, 0, &w->parent));
	must(hwpt_alloc(w->fd, w->idev, w->ioas, IOMMU_HWPT_ALLOC_DIRTY_TRACKING, 0, &w->dirty));
	must(nested_alloc(w->fd, w->idev, w->parent, 0, 0, &w->nested));
	must(fault_alloc(w->fd, &w->fault, &w->fault_fd));
	must(viommu_alloc(w->fd, w->idev, w->parent, IOMMU_VIOMMU_TYPE_SELFTEST, NULL, &w->viommu));
	must(vdevice_alloc(w->fd, w->viommu, w->idev, 0x99, &w->vdevice));
	if (!(without & WITHOUT_VEVENTQ))
		must(veventq_alloc(w->fd, w->viommu, IOMMU_VEVENTQ_TYPE_SELFTEST, 2, &w->veventq, &w->veventq_fd));
	if (!(without & WITHOUT_QUEUE))
		must(queue_alloc(w->fd, w->viommu, IOMMU_HW_QUEUE_TYPE_SELFTEST, 0, BASE + PAGE, PAGE, &w->queue));
	must(ioas_alloc(w->fd, &w->destroyed));
	must(destroy(w->fd, w->destroyed));
}

static inline void world_end(struct world *w)
{
	close(w->fd);
	if (w->fault_fd >= 0)
		close(w->fault_fd);
	if (w->veventq_fd >= 0)
		close(w->veventq_fd);
	close(w->file);
	munmap(w->buffer, PAGES * PAGE);
}

#endif
