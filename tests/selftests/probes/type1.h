/*
 * What can be asked of a container of type 1, be it the native one or /dev/iommu in its place.
 */
#ifndef TYPE1_H
#define TYPE1_H

#include "probe.h"
#include <linux/vfio.h>

/* An address that every IOMMU translates, and the end of the mock's. */
#define BASE 0x1000000ull
#define APERTURE_END 0x80000000ull

static inline int dma_map(int fd, uint32_t flags, void *va, uint64_t iova, uint64_t size)
{
	struct vfio_iommu_type1_dma_map cmd = { .argsz = sizeof(cmd), .flags = flags, .vaddr = (uintptr_t)va, .iova = iova,
						.size = size };

	return ioctl(fd, VFIO_IOMMU_MAP_DMA, &cmd);
}

static inline int dma_unmap(int fd, uint32_t flags, uint64_t iova, uint64_t *size)
{
	struct vfio_iommu_type1_dma_unmap cmd = { .argsz = sizeof(cmd), .flags = flags, .iova = iova, .size = *size };
	int result = ioctl(fd, VFIO_IOMMU_UNMAP_DMA, &cmd);

	*size = cmd.size;
	return result;
}

static inline void ask_info(int fd)
{
	char area[512];
	struct vfio_iommu_type1_info *info = (void *)area;

	for (uint32_t argsz = 0; argsz <= 160; argsz += 4) {
		memset(area, 0, sizeof(area));
		info->argsz = argsz;
		answer(ioctl(fd, VFIO_IOMMU_GET_INFO, info), "argsz %u", argsz);
		value(info->argsz, "argsz %u: argsz", argsz);
		value(info->flags, "argsz %u: flags", argsz);
		value(info->iova_pgsizes, "argsz %u: page sizes", argsz);
		value(info->cap_offset, "argsz %u: capabilities at", argsz);
	}
	info->argsz = sizeof(area);
	info->flags = 0xff;
	answer(ioctl(fd, VFIO_IOMMU_GET_INFO, info), "flags ff");
	for (uint32_t at = info->cap_offset, i = 0; at && at < sizeof(area) - 8 && i < 8; i++) {
		struct vfio_info_cap_header *header = (void *)(area + at);

		value(header->id, "capability %u: id", i);
		value(header->version, "capability %u: version", i);
		value(header->next, "capability %u: next", i);
		if (header->id == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE) {
			struct vfio_iommu_type1_info_cap_iova_range *ranges = (void *)header;

			value(ranges->nr_iovas, "ranges");
			value(ranges->iova_ranges[0].start, "start of the first");
			value(ranges->iova_ranges[0].end, "end of the first");
		}
		if (header->id == VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL)
			value(((struct vfio_iommu_type1_info_dma_avail *)header)->avail, "maps that are available");
		at = header->next;
	}
	answer(ioctl(fd, VFIO_IOMMU_GET_INFO, NULL), "null pointer");
}

static inline void ask_map(int fd)
{
	char *buffer = pages(8 * PAGE);
	struct vfio_iommu_type1_dma_map cmd;
	const uint32_t rw = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;

	for (uint32_t flags = 0; flags < 16; flags++)
		answer(dma_map(fd, flags, buffer, BASE + 0x100000 * flags, PAGE), "flags %x", flags);
	answer(dma_map(fd, 1u << 31 | rw, buffer, BASE, PAGE), "flag 31");
	for (uint32_t argsz = 0; argsz <= sizeof(cmd) + 4; argsz += 4) {
		cmd = (struct vfio_iommu_type1_dma_map){ .argsz = argsz, .flags = rw, .vaddr = (uintptr_t)buffer,
							 .iova = BASE + 0x4000000 + argsz * PAGE, .size = PAGE };
		answer(ioctl(fd, VFIO_IOMMU_MAP_DMA, &cmd), "argsz %u", argsz);
	}
	answer(ioctl(fd, VFIO_IOMMU_MAP_DMA, NULL), "null pointer");
	answer(dma_map(fd, rw, buffer, BASE + 0x10000000, 0), "size 0");
	answer(dma_map(fd, rw, buffer, BASE + 0x10000000, 1), "size 1");
	answer(dma_map(fd, rw, buffer, BASE + 0x18000000, 0x800), "half a page");
	answer(dma_map(fd, rw, buffer + 1, BASE + 0x10000000, PAGE), "odd memory");
	answer(dma_map(fd, rw, buffer, BASE + 0x10000001, PAGE), "odd iova");
	answer(dma_map(fd, rw, buffer, BASE + 0x10000000, 8 * PAGE), "eight pages");
	answer(dma_map(fd, rw, buffer, BASE + 0x10000000, 8 * PAGE), "again");
	answer(dma_map(fd, rw, buffer, BASE + 0x10007000, 8 * PAGE), "over the last of them");
	answer(dma_map(fd, rw, buffer, BASE + 0x20000000, 9 * PAGE), "past the end of memory");
	answer(dma_map(fd, rw, NULL, BASE + 0x20000000, PAGE), "no memory");
	answer(dma_map(fd, rw, buffer, 0, PAGE), "before the aperture");
	answer(dma_map(fd, rw, buffer, APERTURE_END, PAGE), "after the aperture");
	answer(dma_map(fd, rw, buffer, -PAGE, PAGE), "the last page");
	answer(dma_map(fd, rw, buffer, -PAGE, 2 * PAGE), "past the last page");
	answer(dma_map(fd, rw, (void *)-PAGE, BASE + 0x20000000, 2 * PAGE), "memory that wraps");
}

static inline void ask_unmap(int (*ready)(unsigned long type), void (*end)(int fd), unsigned long type)
{
	static const struct {
		uint64_t iova, size;
		uint32_t flags;
	} cases[] = {
		/* Areas at pages 0 to 3, 4 to 7 and 16 to 19 from BASE. */
		{ BASE, 4 * PAGE, 0 }, { BASE, 8 * PAGE, 0 }, { BASE, 20 * PAGE, 0 }, { BASE, PAGE, 0 },
		{ BASE + PAGE, PAGE, 0 }, { BASE + 3 * PAGE, PAGE, 0 }, { BASE + PAGE, 3 * PAGE, 0 },
		{ BASE + 2 * PAGE, 4 * PAGE, 0 }, { BASE + 8 * PAGE, 8 * PAGE, 0 }, { BASE + 8 * PAGE, 10 * PAGE, 0 },
		{ BASE - PAGE, 6 * PAGE, 0 }, { BASE, 0, 0 }, { 0, 0, 0 }, { BASE, 1, 0 }, { BASE + 1, PAGE, 0 },
		{ BASE, 0x800, 0 }, { 0, -1ull, 0 }, { 0, -PAGE, 0 }, { BASE, -BASE, 0 }, { PAGE, -1ull, 0 }, { -PAGE, PAGE, 0 },
		{ -PAGE, 2 * PAGE, 0 }, { 0, 0, VFIO_DMA_UNMAP_FLAG_ALL }, { BASE, 0, VFIO_DMA_UNMAP_FLAG_ALL },
		{ 0, PAGE, VFIO_DMA_UNMAP_FLAG_ALL }, { 0, -1ull, VFIO_DMA_UNMAP_FLAG_ALL },
		{ BASE, 4 * PAGE, VFIO_DMA_UNMAP_FLAG_GET_DIRTY_BITMAP }, { BASE, 4 * PAGE, VFIO_DMA_UNMAP_FLAG_VADDR },
		{ BASE, 4 * PAGE, 8 },
		{ 0, 0, VFIO_DMA_UNMAP_FLAG_ALL | VFIO_DMA_UNMAP_FLAG_VADDR },
	};
	char *buffer = pages(12 * PAGE);
	const uint32_t rw = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;

	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		int fd = ready(type);
		uint64_t size = cases[i].size;

		must(dma_map(fd, rw, buffer, BASE, 4 * PAGE));
		must(dma_map(fd, rw, buffer + 4 * PAGE, BASE + 4 * PAGE, 4 * PAGE));
		must(dma_map(fd, rw, buffer + 8 * PAGE, BASE + 16 * PAGE, 4 * PAGE));
		answer(dma_unmap(fd, cases[i].flags, cases[i].iova, &size), "%llx + %llx, flags %x",
		       (unsigned long long)cases[i].iova, (unsigned long long)cases[i].size, cases[i].flags);
		value(size, "%llx + %llx, flags %x: did", (unsigned long long)cases[i].iova,
		      (unsigned long long)cases[i].size, cases[i].flags);
		end(fd);
	}
	int fd = ready(type);
	for (uint32_t argsz = 0; argsz <= 28; argsz += 4) {
		struct vfio_iommu_type1_dma_unmap cmd = { .argsz = argsz, .flags = VFIO_DMA_UNMAP_FLAG_ALL };

		answer(ioctl(fd, VFIO_IOMMU_UNMAP_DMA, &cmd), "argsz %u", argsz);
	}
	uint64_t size = 0;
	answer(dma_unmap(fd, VFIO_DMA_UNMAP_FLAG_ALL, 0, &size), "all of nothing");
	struct vfio_iommu_type1_dirty_bitmap dirty = { .argsz = sizeof(dirty), .flags = VFIO_IOMMU_DIRTY_PAGES_FLAG_START };
	answer(ioctl(fd, VFIO_IOMMU_DIRTY_PAGES, &dirty), "dirty pages, start");
	dirty.flags = 0;
	answer(ioctl(fd, VFIO_IOMMU_DIRTY_PAGES, &dirty), "dirty pages, no flag");
	end(fd);
}

#endif
