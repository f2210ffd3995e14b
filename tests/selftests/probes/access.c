/*
 * Accesses: what pins, unpins, reads and writes the memory of an address space from inside the kernel. The rules of
 * pins, which hardware queues share, are asked here through the mock's operations.
 */
#include "world.h"

enum { PINS = MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES };

static int make(int fd, uint32_t ioas, uint32_t flags, uint32_t *access)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_CREATE_ACCESS, .id = ioas, .create_access = { .flags = flags } };
	int result = test(fd, &cmd);

	*access = cmd.create_access.out_access_fd;
	return result;
}

static int pin(int fd, uint32_t access, uint32_t flags, uint64_t iova, uint64_t length, const void *expected, uint32_t *id)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_ACCESS_PAGES, .id = access,
				      .access_pages = { .flags = flags, .iova = iova, .length = length,
							.uptr = (uintptr_t)expected } };
	int result = test(fd, &cmd);

	*id = cmd.access_pages.out_access_pages_id;
	return result;
}

static int unpin(int fd, uint32_t access, uint32_t id)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_DESTROY_ACCESS_PAGES, .id = access,
				      .destroy_access_pages = { .access_pages_id = id } };

	return test(fd, &cmd);
}

static int transfer(int fd, uint32_t access, uint32_t flags, uint64_t iova, uint64_t length, void *buffer)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_ACCESS_RW, .id = access,
				      .access_rw = { .flags = flags, .iova = iova, .length = length,
						     .uptr = (uintptr_t)buffer } };

	return test(fd, &cmd);
}

static int move(int fd, uint32_t access, uint32_t ioas)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_ACCESS_REPLACE_IOAS, .id = access,
				      .access_replace_ioas = { .ioas_id = ioas } };

	return test(fd, &cmd);
}

static int references(int fd, void *va, uint64_t length, uint32_t count)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_MD_CHECK_REFS,
				      .check_refs = { .length = length, .uptr = (uintptr_t)va, .refs = count } };

	return test(fd, &cmd);
}

/* Areas at pages 0 to 3 (writable), 4 to 7 (read-only) and 16 to 19 (writable) from BASE; an access to them. */
struct bench {
	int fd;
	uint32_t ioas, access;
	char *buffer;
};

static struct bench bench(uint32_t flags)
{
	struct bench b = { .fd = open_iommu(), .buffer = pages(12 * PAGE) };
	uint64_t iova = BASE + 4 * PAGE;

	must(ioas_alloc(b.fd, &b.ioas));
	must(map_at(b.fd, b.ioas, b.buffer, 4 * PAGE, BASE));
	must(ioas_map(b.fd, b.ioas, IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE, b.buffer + 4 * PAGE, 4 * PAGE,
		      &iova));
	must(map_at(b.fd, b.ioas, b.buffer + 8 * PAGE, 4 * PAGE, BASE + 16 * PAGE));
	must(make(b.fd, b.ioas, flags, &b.access));
	return b;
}

static const struct {
	uint64_t iova, length;
} ranges[] = {
	{ BASE, PAGE }, { BASE, 4 * PAGE }, { BASE, 5 * PAGE }, { BASE, 8 * PAGE }, { BASE, 9 * PAGE },
	{ BASE + 3 * PAGE, 2 * PAGE }, { BASE + 4 * PAGE, PAGE }, { BASE + 8 * PAGE, PAGE }, { BASE + 8 * PAGE, 9 * PAGE },
	{ BASE - PAGE, 2 * PAGE }, { BASE, 0 }, { BASE, 1 }, { BASE + 1, 1 }, { BASE + 0xfff, 2 }, { BASE + 1, PAGE },
	{ BASE, -1ull }, { -1ull, 1 }, { -1ull, 2 }, { 0, -1ull }, { -PAGE, PAGE }, { -PAGE, 2 * PAGE }, { 0, 1 },
	{ BASE + 8 * PAGE, 0 }, { BASE + 16 * PAGE, 4 * PAGE }, { BASE + 16 * PAGE, 5 * PAGE },
};

static void ask_pin(void)
{
	for (uint32_t flags = 0; flags < 3; flags++)
		for (size_t i = 0; i < sizeof(ranges) / sizeof(*ranges); i++) {
			struct bench b = bench(PINS);
			uint32_t id;
			/* The mock compares the pages with these, which are not in the order of the areas after page 8. */
			char *expected = b.buffer + (ranges[i].iova >= BASE + 16 * PAGE ? ranges[i].iova - BASE - 8 * PAGE :
									 ranges[i].iova - BASE);
			long result = answer(pin(b.fd, b.access, flags, ranges[i].iova, ranges[i].length, expected, &id),
					     "flags %x, %llx + %llx", flags, (unsigned long long)ranges[i].iova,
					     (unsigned long long)ranges[i].length);

			if (result)
				answer(references(b.fd, b.buffer, 12 * PAGE, 0), "flags %x, %llx + %llx: all unpinned", flags,
				       (unsigned long long)ranges[i].iova, (unsigned long long)ranges[i].length);
			close(b.fd);
		}
}

static void ask_pin_flags(void)
{
	struct bench b = bench(PINS);
	uint32_t id, other;

	for (int bit = 2; bit < 20; bit++)
		answer(pin(b.fd, b.access, 1u << bit, BASE, PAGE, b.buffer, &id), "flag %x", 1u << bit);
	answer(pin(b.fd, b.access, 0, BASE, PAGE, b.buffer + PAGE, &id), "pages that are not the expected ones");
	answer(pin(b.fd, 9999, 0, BASE, PAGE, b.buffer, &id), "an access that is not there");
	answer(pin(b.fd, (uint32_t)b.fd, 0, BASE, PAGE, b.buffer, &id), "a context in its place");
	answer(unpin(b.fd, b.access, 0), "unpin 0");
	answer(unpin(b.fd, b.access, 99), "unpin what is not pinned");
	must(pin(b.fd, b.access, 0, BASE, 2 * PAGE, b.buffer, &id));
	answer(pin(b.fd, b.access, 0, BASE + PAGE, 2 * PAGE, b.buffer + PAGE, &other), "pin over a pin");
	answer(unpin(b.fd, b.access, id), "unpin the first");
	answer(unpin(b.fd, b.access, id), "unpin it again");
	answer(unpin(b.fd, b.access, other), "unpin the second");
	answer(references(b.fd, b.buffer, 12 * PAGE, 0), "all unpinned");
	close(b.fd);
}

static void ask_unmap(void)
{
	struct bench b = bench(PINS);
	uint32_t id, second;
	uint64_t done;

	must(pin(b.fd, b.access, 0, BASE, PAGE, b.buffer, &id));
	must(pin(b.fd, b.access, 0, BASE + PAGE, PAGE, b.buffer + PAGE, &second));
	/* The mock unpins when it is told to. */
	answer(ioas_unmap(b.fd, b.ioas, BASE, 4 * PAGE, &done), "unmap what is pinned");
	answer(unpin(b.fd, b.access, id), "unpin what was pinned");
	answer(references(b.fd, b.buffer, 12 * PAGE, 0), "all unpinned");
	must(map_at(b.fd, b.ioas, b.buffer, 4 * PAGE, BASE));
	must(pin(b.fd, b.access, 0, BASE, PAGE, b.buffer, &id));
	answer(ioas_unmap(b.fd, b.ioas, 0, -1ull, &done), "unmap everything");
	value(done, "unmapped");
	answer(destroy(b.fd, b.ioas), "destroy an address space with an access");
	answer(close((int)b.access), "close the access");
	answer(destroy(b.fd, b.ioas), "destroy it then");
	close(b.fd);

	b = bench(0);
	answer(pin(b.fd, b.access, 0, BASE, PAGE, b.buffer, &id), "pin by an access that does not pin");
	answer(ioas_unmap(b.fd, b.ioas, BASE, 4 * PAGE, &done), "unmap what it pinned");
	close(b.fd);
}

static void ask_move(void)
{
	struct bench b = bench(PINS);
	uint32_t other, id, access;

	must(ioas_alloc(b.fd, &other));
	answer(move(b.fd, b.access, b.ioas), "move to where it is");
	must(pin(b.fd, b.access, 0, BASE, PAGE, b.buffer, &id));
	answer(move(b.fd, b.access, other), "move with a pin");
	answer(references(b.fd, b.buffer, PAGE, 0), "nothing is pinned");
	answer(destroy(b.fd, other), "destroy where it is");
	answer(destroy(b.fd, b.ioas), "destroy where it was");
	answer(pin(b.fd, b.access, 0, BASE, PAGE, b.buffer, &id), "pin there");
	answer(move(b.fd, b.access, 99), "move to what is not there");
	answer(move(b.fd, b.access, 0), "move to 0");
	answer(move(b.fd, 9999, other), "move what is not there");
	answer(make(b.fd, 99, 0, &access), "an access to what is not there");
	answer(make(b.fd, other, 8, &access), "an access with an unknown flag");
	answer(make(b.fd, other, 0, &access), "an access");
	answer(move(b.fd, access, other), "move one that does not pin");
	close((int)access);
	close(b.fd);
}

static void ask_transfer(void)
{
	char *own = pages(16 * PAGE);

	for (uint32_t flags = 0; flags < 6; flags++)
		for (size_t i = 0; i < sizeof(ranges) / sizeof(*ranges); i++) {
			struct bench b = bench(0);

			answer(transfer(b.fd, b.access, flags, ranges[i].iova, ranges[i].length, own), "flags %x, %llx + %llx",
			       flags, (unsigned long long)ranges[i].iova, (unsigned long long)ranges[i].length);
			close(b.fd);
		}
	struct bench b = bench(0);
	answer(transfer(b.fd, b.access, 0, BASE, 8, NULL), "to no memory");
	answer(transfer(b.fd, b.access, MOCK_ACCESS_RW_WRITE, BASE, 8, NULL), "from no memory");
	answer(transfer(b.fd, 9999, 0, BASE, 8, own), "an access that is not there");
	munmap(b.buffer + PAGE, PAGE);
	answer(transfer(b.fd, b.access, 0, BASE, 8, own), "of memory that is there");
	answer(transfer(b.fd, b.access, 0, BASE + PAGE, 8, own), "of memory that is gone");
	answer(transfer(b.fd, b.access, 0, BASE + PAGE - 4, 8, own), "across its beginning");
	close(b.fd);
}

/* The mock's other operations. */
static void ask_operations(void)
{
	struct bench b = bench(0);
	struct iommu_test_cmd cmd;
	uint32_t stdev, hwpt, idev;

	must(mock_domain(b.fd, b.ioas, 0, &stdev, &hwpt, &idev));
	for (uint32_t op = 0; op < 32; op++) {
		/* These allocate, or would wait. */
		if (op == IOMMU_TEST_OP_SET_TEMP_MEMORY_LIMIT || op == IOMMU_TEST_OP_DMABUF_GET)
			continue;
		cmd = (struct iommu_test_cmd){ .op = op, .id = 0xffff };
		answer(test(b.fd, &cmd), "operation %u on nothing", op);
	}
	cmd = (struct iommu_test_cmd){ .op = IOMMU_TEST_OP_MD_CHECK_MAP, .id = hwpt,
				       .check_map = { .iova = BASE, .length = PAGE, .uptr = (uintptr_t)b.buffer } };
	answer(test(b.fd, &cmd), "check what is mapped");
	cmd.check_map.uptr += PAGE;
	answer(test(b.fd, &cmd), "check what is mapped elsewhere");
	cmd.check_map.uptr -= PAGE;
	cmd.check_map.length = 9 * PAGE;
	answer(test(b.fd, &cmd), "check what is mapped in part");
	cmd.check_map.length = 0x800;
	answer(test(b.fd, &cmd), "check half a page");
	cmd.check_map.length = 0x400;
	answer(test(b.fd, &cmd), "check a quarter of a page");
	cmd.check_map.length = PAGE;
	cmd.check_map.iova = BASE + 8 * PAGE;
	answer(test(b.fd, &cmd), "check a hole");
	cmd.id = b.ioas;
	answer(test(b.fd, &cmd), "check an address space");
	answer(references(b.fd, b.buffer, PAGE, 0), "references: mapped pages are not counted as 0");
	answer(references(b.fd, b.buffer, PAGE, 1), "references: as 1");
	answer(references(b.fd, b.buffer, PAGE, 2), "references: as 2");
	answer(references(b.fd, b.buffer + 1, PAGE, 1), "references of an odd address");
	answer(references(b.fd, b.buffer, PAGE + 1, 1), "references of an odd length");
	answer(references(b.fd, NULL, PAGE, 0), "references of no memory");
	close(b.fd);
}

int main(int argc, char **argv)
{
	static const struct section sections[] = {
		{ "pin", ask_pin },   { "pin flags", ask_pin_flags }, { "pin and unmap", ask_unmap },
		{ "access move", ask_move }, { "transfer", ask_transfer },   { "operations", ask_operations }, { 0 },
	};

	return run(sections, argc, argv);
}
