/* Page tables of devices: which may be made of what, attached, replaced, destroyed, tracked, invalidated. */
#include "world.h"

struct bench {
	int fd;
	uint32_t ioas, stdev, hwpt, idev;
};

static struct bench bench(uint32_t device_flags)
{
	struct bench b = { .fd = open_iommu() };

	must(ioas_alloc(b.fd, &b.ioas));
	must(mock_domain(b.fd, b.ioas, device_flags, &b.stdev, &b.hwpt, &b.idev));
	return b;
}

static void ask_alloc_flags(void)
{
	/* Every combination of flags, for a device that can do everything and one that can do little. */
	for (uint32_t device = 0; device < 3; device++)
		for (uint32_t flags = 0; flags < 32; flags++) {
			static const uint32_t devices[] = { MOCK_FLAGS_DEVICE_PASID, 0, MOCK_FLAGS_DEVICE_NO_DIRTY };
			static const char *const names[] = { "pasid device", "plain device", "device without dirty bits" };
			struct bench b = bench(devices[device]);
			uint32_t fault, id;
			int fault_fd;

			must(fault_alloc(b.fd, &fault, &fault_fd));
			answer(hwpt_alloc(b.fd, b.idev, b.ioas, flags, flags & IOMMU_HWPT_FAULT_ID_VALID ? fault : 0, &id),
			       "%s, flags %x", names[device], flags);
			close(fault_fd);
			close(b.fd);
		}
}

static void ask_nested_flags(void)
{
	for (uint32_t flags = 0; flags < 32; flags++) {
		struct bench b = bench(MOCK_FLAGS_DEVICE_PASID);
		uint32_t fault, parent, id;
		int fault_fd;

		must(fault_alloc(b.fd, &fault, &fault_fd));
		must(hwpt_alloc(b.fd, b.idev, b.ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, 0, &parent));
		answer(nested_alloc(b.fd, b.idev, parent, flags, flags & IOMMU_HWPT_FAULT_ID_VALID ? fault : 0, &id),
		       "on a parent, flags %x", flags);
		close(fault_fd);
		close(b.fd);
	}
}

static void ask_nesting(void)
{
	struct bench b = bench(MOCK_FLAGS_DEVICE_PASID);
	uint32_t plain, parent, nested, nested2, fault, id, iopf, stdev, idev;
	int fault_fd;

	must(hwpt_alloc(b.fd, b.idev, b.ioas, 0, 0, &plain));
	must(hwpt_alloc(b.fd, b.idev, b.ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, 0, &parent));
	must(fault_alloc(b.fd, &fault, &fault_fd));
	answer(nested_alloc(b.fd, b.idev, plain, 0, 0, &id), "on a plain one");
	answer(nested_alloc(b.fd, b.idev, b.hwpt, 0, 0, &id), "on an automatic one");
	answer(nested_alloc(b.fd, b.idev, b.ioas, 0, 0, &id), "on an address space, with data");
	answer(nested_alloc(b.fd, b.idev, parent, 0, 0, &nested), "on a parent");
	answer(nested_alloc(b.fd, b.idev, parent, 0, 0, &nested2), "a second on the same parent");
	answer(nested_alloc(b.fd, b.idev, nested, 0, 0, &id), "on a nested one");
	answer(hwpt_alloc(b.fd, b.idev, parent, 0, 0, &id), "on a parent without data");
	answer(hwpt_alloc(b.fd, b.idev, nested, 0, 0, &id), "on a nested one without data");
	answer(nested_alloc(b.fd, b.idev, parent, IOMMU_HWPT_FAULT_ID_VALID, 0, &id), "fault 0");
	answer(nested_alloc(b.fd, b.idev, parent, IOMMU_HWPT_FAULT_ID_VALID, b.ioas, &id), "fault that is an address space");
	answer(nested_alloc(b.fd, b.idev, parent, 0, fault, &id), "fault without its flag");
	answer(nested_alloc(b.fd, b.idev, parent, IOMMU_HWPT_FAULT_ID_VALID, fault, &iopf), "fault");
	answer(destroy(b.fd, fault), "destroy the fault queue that is used");
	answer(destroy(b.fd, parent), "destroy the parent of nested ones");
	answer(replace(b.fd, b.stdev, nested), "attach a nested one");
	answer(destroy(b.fd, nested), "destroy the attached one");
	answer(destroy(b.fd, b.hwpt), "the automatic one after the device left it");
	answer(replace(b.fd, b.stdev, nested), "attach the same again");
	answer(replace(b.fd, b.stdev, nested2), "attach the other");
	answer(destroy(b.fd, nested), "destroy the first after the device left it");
	answer(replace(b.fd, b.stdev, nested), "attach what is destroyed");
	answer(replace(b.fd, b.stdev, iopf), "attach the one with faults");
	answer(destroy(b.fd, fault), "destroy the fault queue");
	answer(replace(b.fd, b.stdev, parent), "attach the parent");
	answer(destroy(b.fd, iopf), "destroy the one with faults");
	answer(destroy(b.fd, fault), "destroy the fault queue that is not used");
	answer(destroy(b.fd, parent), "destroy the attached parent");
	answer(replace(b.fd, b.stdev, b.ioas), "attach the address space");
	answer(destroy(b.fd, parent), "destroy the parent with a nested one");
	answer(destroy(b.fd, nested2), "destroy the nested one");
	answer(destroy(b.fd, parent), "destroy the parent");
	answer(destroy(b.fd, b.ioas), "destroy the address space with a plain one and a device");
	answer(destroy(b.fd, plain), "destroy the plain one");
	answer(destroy(b.fd, b.ioas), "destroy the address space with a device");
	answer(destroy(b.fd, b.idev), "destroy the device");
	answer(destroy(b.fd, b.stdev), "destroy the mock device");
	answer(destroy(b.fd, b.idev), "destroy the device after that");
	answer(destroy(b.fd, b.ioas), "destroy the address space");
	must(ioas_alloc(b.fd, &b.ioas));
	answer(mock_domain(b.fd, b.ioas, 0, &stdev, &id, &idev), "a new device");
	answer(hwpt_alloc(b.fd, idev, b.ioas, 0, 0, &plain), "a page table for it");
	answer(mock_domain(b.fd, plain, 0, NULL, &id, NULL), "a device attached to a page table");
	answer(id == plain ? 0 : 1, "that page table is its own");
	answer(mock_domain(b.fd, 0, 0, NULL, NULL, NULL), "a device attached to 0");
	answer(mock_domain(b.fd, idev, 0, NULL, NULL, NULL), "a device attached to a device");
	answer(mock_domain(b.fd, b.ioas, 2, NULL, NULL, NULL), "a device with an unknown flag");
	close(b.fd);
}

/* How two devices share automatic page tables. */
static void ask_sharing(void)
{
	struct bench b = bench(0);
	uint32_t stdev, hwpt, idev, none, other, manual;

	answer(mock_domain(b.fd, b.ioas, 0, &stdev, &hwpt, &idev), "a second device of the same kind");
	answer(hwpt == b.hwpt ? 0 : 1, "it has the same page table");
	answer(mock_domain(b.fd, b.ioas, MOCK_FLAGS_DEVICE_NO_DIRTY, NULL, &none, NULL), "a device without dirty bits");
	answer(none == b.hwpt ? 0 : 1, "it has the same page table too");
	must(ioas_alloc(b.fd, &other));
	answer(replace(b.fd, stdev, other), "the second moves to another address space");
	answer(destroy(b.fd, other), "destroy that");
	answer(destroy(b.fd, b.hwpt), "destroy the automatic page table");
	must(hwpt_alloc(b.fd, b.idev, other, 0, 0, &manual));
	answer(replace(b.fd, b.stdev, manual), "the first moves to a page table there");
	answer(destroy(b.fd, stdev), "the second goes");
	answer(destroy(b.fd, manual), "destroy the page table of the first");
	answer(replace(b.fd, b.stdev, other), "the first moves to the address space of its page table");
	answer(destroy(b.fd, manual), "destroy its page table then");
	answer(destroy(b.fd, b.stdev), "the first goes");
	answer(destroy(b.fd, manual), "destroy its page table after that");
	answer(destroy(b.fd, other), "destroy the address space");
	answer(destroy(b.fd, b.ioas), "destroy the first address space");
	close(b.fd);
}

static int invalidate(int fd, uint32_t id, void *data, uint32_t type, uint32_t length, uint32_t *count)
{
	struct iommu_hwpt_invalidate cmd = { .size = sizeof(cmd), .hwpt_id = id, .data_uptr = (uintptr_t)data,
					     .data_type = type, .entry_len = length, .entry_num = *count };
	int result = ioctl(fd, IOMMU_HWPT_INVALIDATE, &cmd);

	*count = cmd.entry_num;
	return result;
}

static void ask_iotlb(struct bench *b, uint32_t id, const char *when)
{
	for (uint32_t i = 0; i < 5; i++)
		for (uint32_t j = 0; j < 2; j++) {
			uint32_t expect = j ? 0 : IOMMU_TEST_IOTLB_DEFAULT;
			struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_MD_CHECK_IOTLB, .id = id,
						      .check_iotlb = { .id = i, .iotlb = expect } };

			answer(test(b->fd, &cmd), "entry %u is %s %s", i, j ? "invalid" : "valid", when);
		}
}

static void ask_invalidate(void)
{
	struct bench b = bench(0);
	struct iommu_hwpt_invalidate_selftest e[4] = {};
	uint32_t parent, nested, n;

	must(hwpt_alloc(b.fd, b.idev, b.ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, 0, &parent));
	must(nested_alloc(b.fd, b.idev, parent, 0, 0, &nested));
#define INVALIDATE(question, id, data, type, length, number)                                        \
	do {                                                                                        \
		n = (number);                                                                       \
		answer(invalidate(b.fd, id, data, type, length, &n), "%s", question);               \
		value(n, "%s: done", question);                                                     \
	} while (0)
	const uint32_t type = IOMMU_HWPT_INVALIDATE_DATA_SELFTEST;
	INVALIDATE("no entries", nested, e, type, sizeof(*e), 0);
	INVALIDATE("no entries, no data", nested, NULL, type, 0, 0);
	INVALIDATE("no entries, unknown type", nested, NULL, 77, 0, 0);
	INVALIDATE("no entries, a page table", parent, NULL, type, 0, 0);
	INVALIDATE("a page table", parent, e, type, sizeof(*e), 1);
	INVALIDATE("unknown type", nested, e, IOMMU_HWPT_INVALIDATE_DATA_SELFTEST_INVALID, sizeof(*e), 1);
	INVALIDATE("entries too short", nested, e, type, 4, 1);
	INVALIDATE("entries of length 0", nested, e, type, 0, 1);
	INVALIDATE("entries longer, zero", nested, e, type, 16, 1);
	e[1].flags = 1;
	INVALIDATE("entries longer, not zero", nested, e, type, 16, 1);
	ask_iotlb(&b, nested, "at first");
	e[0] = (struct iommu_hwpt_invalidate_selftest){ .iotlb_id = 1 };
	e[1] = (struct iommu_hwpt_invalidate_selftest){ .iotlb_id = MOCK_NESTED_DOMAIN_IOTLB_ID_MAX + 1 };
	e[2] = (struct iommu_hwpt_invalidate_selftest){ .iotlb_id = 2 };
	INVALIDATE("good, bad id, good", nested, e, type, sizeof(*e), 3);
	ask_iotlb(&b, nested, "after that");
	e[1] = (struct iommu_hwpt_invalidate_selftest){ .flags = 2, .iotlb_id = 0 };
	INVALIDATE("good, bad flag, good", nested, e, type, sizeof(*e), 3);
	e[0] = (struct iommu_hwpt_invalidate_selftest){ .flags = IOMMU_TEST_INVALIDATE_FLAG_ALL, .iotlb_id = 99 };
	INVALIDATE("all, bad id", nested, e, type, sizeof(*e), 1);
	e[0].iotlb_id = 0;
	INVALIDATE("all", nested, e, type, sizeof(*e), 1);
	ask_iotlb(&b, nested, "after all");
	close(b.fd);
}

static int get_dirty(int fd, uint32_t hwpt, uint32_t flags, uint64_t iova, uint64_t length, uint64_t page, void *bits)
{
	struct iommu_hwpt_get_dirty_bitmap cmd = { .size = sizeof(cmd), .hwpt_id = hwpt, .flags = flags, .iova = iova,
						   .length = length, .page_size = page, .data = (uintptr_t)bits };

	return ioctl(fd, IOMMU_HWPT_GET_DIRTY_BITMAP, &cmd);
}

static int set_dirty(int fd, uint32_t hwpt, uint32_t flags)
{
	struct iommu_hwpt_set_dirty_tracking cmd = { .size = sizeof(cmd), .flags = flags, .hwpt_id = hwpt };

	return ioctl(fd, IOMMU_HWPT_SET_DIRTY_TRACKING, &cmd);
}

/* Has the mock write to the pages of this bitmap. */
static int dirty(int fd, uint32_t hwpt, uint64_t iova, uint64_t length, uint64_t page, void *bits, uint64_t *count)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_DIRTY, .id = hwpt,
				      .dirty = { .iova = iova, .length = length, .page_size = page,
						 .uptr = (uintptr_t)bits } };
	int result = test(fd, &cmd);

	*count = cmd.dirty.out_nr_dirty;
	return result;
}

static void ask_dirty(void)
{
	struct bench b = bench(0);
	char *buffer = pages(64 * PAGE);
	uint64_t bits[8] = {}, some = 0x8000000000000105, count;
	uint32_t plain, tracked, parent, nested, stdev;

	/* Entries of the page table for more than a page would have one dirty bit for all: where there are some is chance. */
	must(set_option(b.fd, IOMMU_OPTION_HUGE_PAGES, b.ioas, 0));
	must(map_at(b.fd, b.ioas, buffer, 64 * PAGE, BASE));
	must(hwpt_alloc(b.fd, b.idev, b.ioas, 0, 0, &plain));
	must(hwpt_alloc(b.fd, b.idev, b.ioas, IOMMU_HWPT_ALLOC_DIRTY_TRACKING, 0, &tracked));
	must(hwpt_alloc(b.fd, b.idev, b.ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, 0, &parent));
	must(nested_alloc(b.fd, b.idev, parent, 0, 0, &nested));
	answer(set_dirty(b.fd, plain, 1), "enable on a plain one");
	answer(set_dirty(b.fd, plain, 0), "disable on a plain one");
	answer(set_dirty(b.fd, nested, 1), "enable on a nested one");
	answer(set_dirty(b.fd, b.hwpt, 1), "enable on an automatic one");
	answer(set_dirty(b.fd, tracked, 2), "unknown flag");
	answer(get_dirty(b.fd, plain, 0, BASE, 64 * PAGE, PAGE, bits), "read a plain one");
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, PAGE, bits), "read before it is enabled");
	answer(set_dirty(b.fd, tracked, 0), "disable before it is enabled");
	answer(set_dirty(b.fd, tracked, 1), "enable");
	answer(set_dirty(b.fd, tracked, 1), "enable again");
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, PAGE, bits), "read");
	value(bits[0], "bits");
	answer(dirty(b.fd, tracked, BASE, 64 * PAGE, PAGE, &some, &count), "write to four pages");
	value(count, "pages written to");
	answer(get_dirty(b.fd, tracked, IOMMU_HWPT_GET_DIRTY_BITMAP_NO_CLEAR, BASE, 64 * PAGE, PAGE, bits), "read, not clear");
	value(bits[0], "bits");
	bits[0] = 0x10;
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, PAGE, bits), "read and clear, into other bits");
	value(bits[0], "bits");
	bits[0] = 0;
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, PAGE, bits), "read what is clear");
	value(bits[0], "bits");
	/* Sizes of pages. */
	for (uint64_t page = 0x200; page < 1ull << 40; page <<= 3) {
		memset(bits, 0, sizeof(bits));
		must(dirty(b.fd, tracked, BASE, 64 * PAGE, PAGE, &some, &count));
		answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, page, bits), "page size %llx", (unsigned long long)page);
		value(bits[0], "page size %llx: bits", (unsigned long long)page);
	}
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, 0, bits), "page size 0");
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, 3 * PAGE, bits), "page size of three pages");
	answer(get_dirty(b.fd, tracked, 0, BASE + 1, 64 * PAGE, PAGE, bits), "odd iova");
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE - 1, PAGE, bits), "odd length");
	answer(get_dirty(b.fd, tracked, 0, BASE, 0, PAGE, bits), "length 0");
	answer(get_dirty(b.fd, tracked, 0, BASE, 65 * PAGE, PAGE, bits), "past the map");
	answer(get_dirty(b.fd, tracked, 0, BASE - 2 * PAGE, 66 * PAGE, PAGE, bits), "from before the map");
	answer(get_dirty(b.fd, tracked, 0, BASE + PAGE, 2 * PAGE, PAGE, bits), "part of the map");
	answer(get_dirty(b.fd, tracked, 0, BASE + 128 * PAGE, 2 * PAGE, PAGE, bits), "where nothing is mapped");
	answer(get_dirty(b.fd, tracked, 0, -PAGE, PAGE, PAGE, bits), "the last page");
	answer(get_dirty(b.fd, tracked, 0, -PAGE, 2 * PAGE, PAGE, bits), "past the last page");
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, PAGE, (void *)1), "bits at an odd address that is not mapped");
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, PAGE, NULL), "no bits");
	answer(get_dirty(b.fd, tracked, 2, BASE, 64 * PAGE, PAGE, bits), "unknown flag in a read");
	answer(dirty(b.fd, tracked, BASE, 64 * PAGE, PAGE, &some, &count), "write again");
	answer(set_dirty(b.fd, tracked, 0), "disable");
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, PAGE, bits), "read after it is disabled");
	answer(set_dirty(b.fd, tracked, 1), "enable once more");
	memset(bits, 0, sizeof(bits));
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, PAGE, bits), "read after that");
	value(bits[0], "bits after that");
	must(ioas_unmap(b.fd, b.ioas, 0, -1ull, NULL));
	answer(get_dirty(b.fd, tracked, 0, BASE, 64 * PAGE, PAGE, bits), "read after the map is gone");
	answer(mock_domain(b.fd, tracked, MOCK_FLAGS_DEVICE_NO_DIRTY, NULL, NULL, NULL),
	       "attach a device without dirty bits to it");
	answer(mock_domain(b.fd, b.ioas, MOCK_FLAGS_DEVICE_NO_DIRTY, &stdev, NULL, NULL), "attach that to the address space");
	answer(replace(b.fd, stdev, tracked), "move it");
	close(b.fd);
}

static int hw_info(int fd, uint32_t flags, uint32_t dev, uint32_t length, void *data, uint32_t type, uint32_t *has)
{
	struct iommu_hw_info cmd = { .size = sizeof(cmd), .flags = flags, .dev_id = dev, .data_len = length,
				     .data_uptr = (uintptr_t)data, .in_data_type = type };
	int result = ioctl(fd, IOMMU_GET_HW_INFO, &cmd);

	*has = cmd.data_len;
	return result;
}

static void ask_hw_info(void)
{
	struct bench b = bench(0);
	unsigned char data[32];
	uint32_t has;

	for (uint32_t length = 0; length <= 24; length += length < 10 ? 1 : 7) {
		memset(data, 0xa5, sizeof(data));
		answer(hw_info(b.fd, 0, b.idev, length, data, 0, &has), "room for %u", length);
		value(has, "room for %u: length", length);
		printf("%s: room for %u: data: ", section_name, length);
		for (int i = 0; i < 26; i++)
			printf("%02x", data[i]);
		printf("\n");
	}
	answer(hw_info(b.fd, 0, b.idev, 8, NULL, 0, &has), "no buffer");
	answer(hw_info(b.fd, 0, b.idev, 0, NULL, 0, &has), "no buffer, no length");
	answer(hw_info(b.fd, IOMMU_HW_INFO_FLAG_INPUT_TYPE, b.idev, 8, data, 0, &has), "asked for the default type");
	answer(hw_info(b.fd, IOMMU_HW_INFO_FLAG_INPUT_TYPE, b.idev, 8, data, IOMMU_HW_INFO_TYPE_SELFTEST, &has),
	       "asked for its type");
	answer(hw_info(b.fd, IOMMU_HW_INFO_FLAG_INPUT_TYPE, b.idev, 8, data, IOMMU_HW_INFO_TYPE_INTEL_VTD, &has),
	       "asked for VT-d");
	answer(hw_info(b.fd, 0, b.idev, 8, data, IOMMU_HW_INFO_TYPE_INTEL_VTD, &has), "a type without the flag");
	answer(hw_info(b.fd, 2, b.idev, 8, data, 0, &has), "an unknown flag");
	for (uint32_t flags = 0; flags < 8; flags++) {
		struct iommu_hw_info cmd = { .size = sizeof(cmd) };
		struct bench other = { .fd = open_iommu() };

		must(ioas_alloc(other.fd, &other.ioas));
		answer(mock_domain(other.fd, other.ioas, flags, NULL, NULL, &cmd.dev_id), "device flags %x", flags);
		if (cmd.dev_id) {
			answer(ioctl(other.fd, IOMMU_GET_HW_INFO, &cmd), "device flags %x: info", flags);
			value(cmd.out_capabilities, "device flags %x: capabilities", flags);
			value(cmd.out_max_pasid_log2, "device flags %x: pasid width", flags);
		}
		close(other.fd);
	}
	close(b.fd);
}

static int pasid(int fd, uint32_t op, uint32_t stdev, uint32_t number, uint32_t pt)
{
	struct iommu_test_cmd cmd = { .op = op, .id = stdev, .pasid_attach = { .pasid = number, .pt_id = pt } };

	return test(fd, &cmd);
}

static void ask_pasid(void)
{
	struct bench b = bench(MOCK_FLAGS_DEVICE_PASID), plain = bench(0);
	enum { ATTACH = IOMMU_TEST_OP_PASID_ATTACH, REPLACE = IOMMU_TEST_OP_PASID_REPLACE,
	       DETACH = IOMMU_TEST_OP_PASID_DETACH };
	uint32_t with, with2, without, parent, nested, nested_pasid;

	must(hwpt_alloc(b.fd, b.idev, b.ioas, IOMMU_HWPT_ALLOC_PASID, 0, &with));
	must(hwpt_alloc(b.fd, b.idev, b.ioas, IOMMU_HWPT_ALLOC_PASID, 0, &with2));
	must(hwpt_alloc(b.fd, b.idev, b.ioas, 0, 0, &without));
	must(hwpt_alloc(b.fd, b.idev, b.ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, 0, &parent));
	must(nested_alloc(b.fd, b.idev, parent, 0, 0, &nested));
	answer(nested_alloc(b.fd, b.idev, parent, IOMMU_HWPT_ALLOC_PASID, 0, &nested_pasid), "a nested page table for pasids");
	answer(pasid(plain.fd, ATTACH, plain.stdev, 100, plain.ioas), "a device without pasids");
	answer(pasid(b.fd, ATTACH, b.stdev, 100, with), "while its own page table is not for pasids");
	answer(replace(b.fd, b.stdev, with), "give it one that is");
	answer(pasid(b.fd, ATTACH, b.stdev, 0, with), "pasid 0");
	answer(pasid(b.fd, ATTACH, b.stdev, 1, with), "pasid 1");
	answer(pasid(b.fd, ATTACH, b.stdev, (1u << MOCK_PASID_WIDTH) - 1, with), "the last pasid");
	answer(pasid(b.fd, ATTACH, b.stdev, 1u << MOCK_PASID_WIDTH, with), "past the last pasid");
	answer(pasid(b.fd, ATTACH, b.stdev, 0xffffffff, with), "pasid ffffffff");
	answer(pasid(b.fd, ATTACH, b.stdev, 1, with), "pasid 1 again");
	answer(pasid(b.fd, ATTACH, b.stdev, 1, with2), "pasid 1, another page table");
	answer(pasid(b.fd, ATTACH, b.stdev, 2, without), "a page table that is not for pasids");
	answer(pasid(b.fd, ATTACH, b.stdev, 2, nested), "a nested one that is not for pasids");
	answer(pasid(b.fd, ATTACH, b.stdev, 2, nested_pasid), "a nested one that is");
	answer(pasid(b.fd, ATTACH, b.stdev, 3, b.ioas), "an address space");
	answer(pasid(b.fd, ATTACH, b.stdev, 4, 0), "page table 0");
	answer(pasid(b.fd, ATTACH, b.stdev, 4, b.idev), "a device as page table");
	answer(pasid(b.fd, ATTACH, with, 4, with), "a page table as device");
	answer(pasid(b.fd, REPLACE, b.stdev, 1, with2), "replace");
	answer(pasid(b.fd, REPLACE, b.stdev, 1, with2), "replace by the same");
	answer(pasid(b.fd, REPLACE, b.stdev, 1, without), "replace by one that is not for pasids");
	answer(pasid(b.fd, REPLACE, b.stdev, 5, with2), "replace what is not attached");
	answer(destroy(b.fd, with2), "destroy what a pasid uses");
	answer(replace(b.fd, b.stdev, without), "the device moves to one that is not for pasids");
	answer(pasid(b.fd, DETACH, b.stdev, 1, 0), "detach");
	answer(pasid(b.fd, DETACH, b.stdev, 1, 0), "detach again");
	answer(pasid(b.fd, DETACH, b.stdev, 77, 0), "detach what never was");
	answer(destroy(b.fd, with2), "destroy what a pasid used");
	answer(destroy(b.fd, b.stdev), "destroy the device with pasids");
	answer(destroy(b.fd, nested_pasid), "destroy the nested one after that");
	close(b.fd);
	close(plain.fd);
}

int main(int argc, char **argv)
{
	static const struct section sections[] = {
		{ "alloc flags", ask_alloc_flags }, { "nested flags", ask_nested_flags }, { "nesting", ask_nesting },
		{ "sharing", ask_sharing },	    { "invalidate", ask_invalidate },	  { "dirty", ask_dirty },
		{ "hw info", ask_hw_info },	    { "pasid", ask_pasid },		  { 0 },
	};

	return run(sections, argc, argv);
}
