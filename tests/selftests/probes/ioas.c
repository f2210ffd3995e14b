/* Address spaces: what may be mapped where, unmapped, copied, allowed and reserved. */
#include "world.h"

/* An empty address space; with a mock device attached if `attach`. */
static int fresh(uint32_t *ioas, int attach)
{
	int fd = open_iommu();

	must(ioas_alloc(fd, ioas));
	if (attach)
		must(mock_domain(fd, *ioas, 0, NULL, NULL, NULL));
	return fd;
}

static int allow(int fd, uint32_t ioas, const struct iommu_iova_range *ranges, uint32_t count)
{
	struct iommu_ioas_allow_iovas cmd = { .size = sizeof(cmd), .ioas_id = ioas, .num_iovas = count,
					      .allowed_iovas = (uintptr_t)ranges };

	return ioctl(fd, IOMMU_IOAS_ALLOW_IOVAS, &cmd);
}

/* Prints the ranges in which something may be mapped. */
static void show_ranges(int fd, uint32_t ioas, const char *when)
{
	struct iommu_iova_range ranges[8] = {};
	struct iommu_ioas_iova_ranges cmd = { .size = sizeof(cmd), .ioas_id = ioas, .num_iovas = 8,
					      .allowed_iovas = (uintptr_t)ranges };

	answer(ioctl(fd, IOMMU_IOAS_IOVA_RANGES, &cmd), "ranges %s", when);
	value(cmd.num_iovas, "number of ranges %s", when);
	value(cmd.out_iova_alignment, "alignment %s", when);
	for (uint32_t i = 0; i < cmd.num_iovas && i < 8; i++) {
		value(ranges[i].start, "start of range %u %s", i, when);
		value(ranges[i].last, "last of range %u %s", i, when);
	}
}

static int reserve(int fd, uint32_t ioas, uint64_t start, uint64_t length)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_ADD_RESERVED, .id = ioas,
				      .add_reserved = { .start = start, .length = length } };

	return test(fd, &cmd);
}

static void ask_unmap_kind(int attach)
{
	static const struct {
		uint64_t iova, length;
	} cases[] = {
		/* Areas at pages 0 to 3, 4 to 7 and 16 to 19 from BASE. */
		{ BASE, 4 * PAGE }, { BASE, 8 * PAGE }, { BASE, 20 * PAGE }, { BASE, PAGE }, { BASE + PAGE, 3 * PAGE },
		{ BASE + PAGE, PAGE }, { BASE, 5 * PAGE }, { BASE + PAGE, 7 * PAGE }, { BASE, 9 * PAGE },
		{ BASE - PAGE, 5 * PAGE }, { BASE - PAGE, 9 * PAGE }, { BASE + 8 * PAGE, 8 * PAGE },
		{ BASE + 8 * PAGE, 12 * PAGE }, { BASE + 8 * PAGE, 10 * PAGE }, { BASE + 7 * PAGE, 13 * PAGE },
		{ BASE, 4 * PAGE - 1 }, { BASE, 4 * PAGE + 1 }, { BASE + 1, 4 * PAGE }, { BASE, 0 }, { 0, 0 }, { 0, 1 },
		{ 0, -1ull }, { 0, -2ull }, { 1, -1ull }, { BASE, -1ull }, { BASE, -BASE }, { BASE, -BASE - 1 },
		{ BASE + PAGE, -BASE }, { -1ull, 1 }, { -1ull, 2 }, { -1ull, -1ull }, { -PAGE, PAGE }, { -PAGE, PAGE - 1 },
		{ 0, BASE }, { 0, BASE + 4 * PAGE }, { 0, BASE + PAGE },
	};
	char *buffer = pages(12 * PAGE);

	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		uint32_t ioas;
		uint64_t done;
		int fd = fresh(&ioas, attach);

		must(map_at(fd, ioas, buffer, 4 * PAGE, BASE));
		must(map_at(fd, ioas, buffer + 4 * PAGE, 4 * PAGE, BASE + 4 * PAGE));
		must(map_at(fd, ioas, buffer + 8 * PAGE, 4 * PAGE, BASE + 16 * PAGE));
		long result = answer(ioas_unmap(fd, ioas, cases[i].iova, cases[i].length, &done), "%llx + %llx",
				     (unsigned long long)cases[i].iova, (unsigned long long)cases[i].length);
		if (!result)
			value(done, "%llx + %llx did", (unsigned long long)cases[i].iova,
			      (unsigned long long)cases[i].length);
		close(fd);
	}
}

static void ask_unmap(void)
{
	ask_unmap_kind(0);
}

static void ask_unmap_attached(void)
{
	ask_unmap_kind(1);
}

static void ask_unmap_empty(void)
{
	uint32_t ioas;
	int fd = fresh(&ioas, 0);

	answer(ioas_unmap(fd, ioas, 0, -1ull, NULL), "everything");
	answer(ioas_unmap(fd, ioas, BASE, PAGE, NULL), "a page");
	answer(ioas_unmap(fd, ioas, 0, 0, NULL), "nothing");
	answer(ioas_unmap(fd, ioas, -1ull, -1ull, NULL), "a range that wraps");
}

/* Memory of every kind, with each permission, with a device attached and without. */
static void ask_memory(void)
{
	struct {
		const char *name;
		char *memory;
	} kinds[10];
	size_t count = 0;
	int zero = (int)must(open("/dev/zero", O_RDONLY)), program = (int)must(open("/proc/self/exe", O_RDONLY));
	int file = (int)must(memfd_create("memory", 0));
	char *hole = pages(4 * PAGE);

	must(ftruncate(file, PAGE));
	must(munmap(hole + PAGE, PAGE));
#define KIND(label, map) (kinds[count].name = (label), kinds[count++].memory = (char *)(map))
	KIND("anonymous", pages(4 * PAGE));
	KIND("read-only", must(mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
	KIND("inaccessible", must(mmap(NULL, 4 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
	KIND("write-only", must(mmap(NULL, 4 * PAGE, PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)));
	KIND("shared", must(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0)));
	KIND("/dev/zero", must(mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE, zero, 0)));
	KIND("program", must(mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE, program, 0)));
	KIND("program shared", must(mmap(NULL, 4 * PAGE, PROT_READ, MAP_SHARED, program, 0)));
	KIND("with a hole", hole);
	KIND("past the end of its file", must(mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)));

	for (size_t i = 0; i < count; i++)
		for (int attach = 0; attach < 2; attach++)
			for (unsigned int flags = IOMMU_IOAS_MAP_WRITEABLE; flags <= RW; flags += 2) {
				uint32_t ioas;
				int fd = fresh(&ioas, attach);
				uint64_t iova = BASE;
				const char *mode = flags == RW ? "rw" : flags == IOMMU_IOAS_MAP_READABLE ? "r" : "w";
				const char *when = attach ? "attached" : "alone";
				long result = answer(ioas_map(fd, ioas, flags | IOMMU_IOAS_MAP_FIXED_IOVA, kinds[i].memory,
							      4 * PAGE, &iova), "%s %s %s", kinds[i].name, mode, when);

				if (result) {
					answer(ioas_unmap(fd, ioas, 0, -1ull, NULL), "%s %s %s: unmapped after that",
					       kinds[i].name, mode, when);
				} else if (!attach) {
					answer(mock_domain(fd, ioas, 0, NULL, NULL, NULL), "%s %s: attached afterwards",
					       kinds[i].name, mode);
					answer(ioas_unmap(fd, ioas, BASE, 4 * PAGE, NULL), "%s %s: unmapped after that",
					       kinds[i].name, mode);
				}
				close(fd);
			}
}

static void ask_map(void)
{
	char *buffer = pages(16 * PAGE);
	uint32_t ioas;
	uint64_t iova;
	int fd = fresh(&ioas, 0);

	answer(map_at(fd, ioas, buffer, PAGE, 0), "fixed at 0");
	answer(map_at(fd, ioas, buffer, PAGE, 0), "the same again");
	answer(map_at(fd, ioas, buffer, PAGE, PAGE), "right after it, the same memory");
	answer(map_at(fd, ioas, buffer, 3 * PAGE, PAGE), "over its neighbour");
	answer(map_at(fd, ioas, buffer, PAGE, -PAGE), "the last page");
	answer(map_at(fd, ioas, buffer, 2 * PAGE, -2 * PAGE), "the last two pages");
	answer(map_at(fd, ioas, buffer, 2 * PAGE, -PAGE), "past the last page");
	answer(map_at(fd, ioas, buffer, 1, 0x10000), "one byte");
	answer(map_at(fd, ioas, buffer + 1, 1, 0x10001), "one byte at 1");
	answer(map_at(fd, ioas, buffer + 1, 1, 0x10003), "one byte at 1 from 3");
	answer(map_at(fd, ioas, buffer + 0x10, 0x20, 0x20010), "32 bytes at 0x10");
	answer(map_at(fd, ioas, buffer + 0x800, 0x800, 0x30800), "half a page");
	answer(map_at(fd, ioas, buffer + 0x800, 0x800, 0x30000), "half a page from another half");
	answer(map_at(fd, ioas, buffer, 0, 0x40000), "nothing");
	iova = 0x123;
	answer(ioas_map(fd, ioas, RW, buffer, PAGE, &iova), "automatic");
	value(iova % PAGE, "automatic: offset in the page");
	answer(ioas_map(fd, ioas, RW, buffer + 0x10, 0x20, &iova), "automatic, 32 bytes at 0x10");
	value(iova % PAGE, "automatic, 32 bytes at 0x10: offset in the page");
	answer(ioas_map(fd, ioas, RW, buffer, 0, &iova), "automatic, nothing");
	answer(ioas_map(fd, ioas, RW, buffer, -1ull, &iova), "automatic, everything");
	answer(ioas_map(fd, ioas, RW, buffer, 1ull << 62, &iova), "automatic, 2^62");
	answer(ioas_map(fd, ioas, RW, (void *)-PAGE, PAGE, &iova), "automatic, the last page of memory");
	answer(ioas_map(fd, ioas, RW, (void *)-PAGE, 2 * PAGE, &iova), "automatic, past the end of memory");
	answer(ioas_map(fd, ioas, IOMMU_IOAS_MAP_FIXED_IOVA, buffer, PAGE, &iova), "no permission");
	answer(ioas_map(fd, ioas, FIXED | 8, buffer, PAGE, &iova), "an unknown flag");
	close(fd);

	fd = fresh(&ioas, 1);
	answer(map_at(fd, ioas, buffer, PAGE, BASE), "attached: first page of the aperture");
	answer(map_at(fd, ioas, buffer, PAGE, BASE - PAGE), "attached: before the aperture");
	answer(map_at(fd, ioas, buffer, 2 * PAGE, BASE - PAGE), "attached: across its beginning");
	answer(map_at(fd, ioas, buffer, PAGE, MOCK_APERTURE_LAST + 1ull - PAGE), "attached: its last page");
	answer(map_at(fd, ioas, buffer, 2 * PAGE, MOCK_APERTURE_LAST + 1ull - PAGE), "attached: across its end");
	answer(map_at(fd, ioas, buffer, PAGE, MOCK_APERTURE_LAST + 1ull), "attached: after it");
	answer(map_at(fd, ioas, buffer, 1, BASE + 0x10000), "attached: one byte");
	answer(map_at(fd, ioas, buffer, MOCK_PAGE_SIZE, BASE + 0x10000), "attached: a page of the mock");
	answer(map_at(fd, ioas, buffer + MOCK_PAGE_SIZE, MOCK_PAGE_SIZE, BASE + 0x20000), "attached: its second half");
	close(fd);
}

static void ask_attach_after_map(void)
{
	static const struct {
		const char *what;
		uint64_t iova, length;
	} cases[] = {
		{ "inside the aperture", BASE, PAGE },
		{ "before the aperture", 0, PAGE },
		{ "across its beginning", BASE - PAGE, 2 * PAGE },
		{ "after it", MOCK_APERTURE_LAST + 1ull, PAGE },
		{ "a byte", BASE, 1 },
		{ "half a page", BASE, 0x800 },
	};
	char *buffer = pages(2 * PAGE);

	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		uint32_t ioas, hwpt;
		int fd = fresh(&ioas, 0);

		must(map_at(fd, ioas, buffer, cases[i].length, cases[i].iova));
		answer(mock_domain(fd, ioas, 0, NULL, &hwpt, NULL), "device attached to a map %s", cases[i].what);
		answer(ioas_unmap(fd, ioas, 0, -1ull, NULL), "map %s unmapped", cases[i].what);
		answer(mock_domain(fd, ioas, 0, NULL, &hwpt, NULL), "device attached after map %s is gone", cases[i].what);
		close(fd);
	}
}

static void ask_allow(void)
{
	struct iommu_iova_range r[4];
	char *buffer = pages(4 * PAGE);
	uint32_t ioas;
	uint64_t iova;
	int fd = fresh(&ioas, 0);

#define R(i, a, b) (r[i].start = (a), r[i].last = (b))
	show_ranges(fd, ioas, "of a new one");
	answer(allow(fd, ioas, NULL, 0), "no list");
	R(0, 0, -1ull);
	answer(allow(fd, ioas, r, 1), "everything");
	R(0, 0x1000, 0xfff);
	answer(allow(fd, ioas, r, 1), "last before start");
	R(0, 0x1000, 0x1000);
	answer(allow(fd, ioas, r, 1), "one byte");
	R(0, 1, 0x1001);
	answer(allow(fd, ioas, r, 1), "odd bounds");
	R(0, 0x1000, 0x2fff), R(1, 0x2000, 0x3fff);
	answer(allow(fd, ioas, r, 2), "two that overlap");
	R(0, 0x1000, 0x1fff), R(1, 0x1000, 0x1fff);
	answer(allow(fd, ioas, r, 2), "the same twice");
	R(0, 0x1000, 0x1fff), R(1, 0x2000, 0x3fff);
	answer(allow(fd, ioas, r, 2), "two that touch");
	show_ranges(fd, ioas, "after two that touch");
	R(0, 0x8000, 0x9fff), R(1, 0x1000, 0x3fff);
	answer(allow(fd, ioas, r, 2), "two, not in order");
	iova = 0;
	answer(ioas_map(fd, ioas, RW, buffer, 3 * PAGE, &iova), "automatic map that fits in one");
	value(iova, "where");
	answer(ioas_map(fd, ioas, RW, buffer, 3 * PAGE, &iova), "automatic map that fits in none");
	answer(ioas_map(fd, ioas, RW, buffer, 2 * PAGE, &iova), "automatic map that fits in the other");
	value(iova, "where the second");
	answer(map_at(fd, ioas, buffer, PAGE, 0x100000), "fixed map outside");
	R(0, 0x8000, 0x9fff);
	answer(allow(fd, ioas, r, 1), "without what an automatic map uses");
	R(0, 0x1000, 0xffff);
	answer(allow(fd, ioas, r, 1), "with what the automatic maps use");
	answer(allow(fd, ioas, NULL, 0), "no list again");
	answer(ioas_map(fd, ioas, RW, buffer, 4 * PAGE, &iova), "automatic map after that");
	close(fd);

	fd = fresh(&ioas, 1);
	show_ranges(fd, ioas, "of one with a device");
	R(0, 0, 0xffff);
	answer(allow(fd, ioas, r, 1), "attached: only before the aperture");
	R(0, 0, -1ull);
	answer(allow(fd, ioas, r, 1), "attached: everything");
	R(0, BASE, BASE + 0xffff);
	answer(allow(fd, ioas, r, 1), "attached: in the aperture");
	show_ranges(fd, ioas, "attached and allowed");
	close(fd);

	fd = fresh(&ioas, 0);
	R(0, 0, 0xffff);
	must(allow(fd, ioas, r, 1));
	answer(mock_domain(fd, ioas, 0, NULL, NULL, NULL), "device whose aperture is not allowed");
	R(0, BASE - PAGE, BASE + 0xffff);
	answer(allow(fd, ioas, r, 1), "partly in the aperture, after that");
	answer(mock_domain(fd, ioas, 0, NULL, NULL, NULL), "device whose aperture is allowed in part");
	close(fd);
}

static void ask_reserved(void)
{
	char *buffer = pages(4 * PAGE);
	struct iommu_iova_range r[1];
	uint32_t ioas;
	int fd = fresh(&ioas, 0);

	answer(reserve(fd, ioas, BASE, 16 * PAGE), "reserve");
	answer(reserve(fd, ioas, BASE, 16 * PAGE), "reserve the same");
	answer(reserve(fd, ioas, BASE, 0), "reserve nothing");
	answer(reserve(fd, ioas, -PAGE, 2 * PAGE), "reserve past the end");
	show_ranges(fd, ioas, "with a reserved one");
	answer(map_at(fd, ioas, buffer, PAGE, BASE), "map in it");
	answer(map_at(fd, ioas, buffer, 2 * PAGE, BASE - PAGE), "map across its beginning");
	answer(map_at(fd, ioas, buffer, PAGE, BASE + 16 * PAGE), "map after it");
	answer(reserve(fd, ioas, BASE + 16 * PAGE, PAGE), "reserve what is mapped");
	R(0, BASE, BASE + PAGE - 1);
	answer(allow(fd, ioas, r, 1), "allow what is reserved");
	R(0, BASE + 14 * PAGE, BASE + 18 * PAGE - 1);
	answer(allow(fd, ioas, r, 1), "allow what is reserved in part");
	R(0, BASE + 100 * PAGE, BASE + 101 * PAGE - 1);
	must(ioas_unmap(fd, ioas, 0, -1ull, NULL));
	answer(allow(fd, ioas, r, 1), "allow something else");
	answer(reserve(fd, ioas, BASE + 100 * PAGE, PAGE), "reserve what is allowed");
	close(fd);
}

static void ask_copy(void)
{
	char *buffer = pages(8 * PAGE);
	uint32_t from, to;
	uint64_t iova = BASE;
	int fd = fresh(&from, 0);

	must(ioas_alloc(fd, &to));
	must(map_at(fd, from, buffer, 4 * PAGE, BASE));
	must(map_at(fd, from, buffer + 4 * PAGE, 2 * PAGE, BASE + 4 * PAGE));
	must(ioas_map(fd, from, IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE, buffer + 6 * PAGE, PAGE,
		      (iova = BASE + 16 * PAGE, &iova)));
	answer(ioas_copy(fd, FIXED, to, BASE, from, BASE, 4 * PAGE), "a whole area");
	answer(ioas_copy(fd, FIXED, to, BASE, from, BASE, 4 * PAGE), "the same again");
	answer(ioas_copy(fd, FIXED, to, 0x100000, from, BASE + PAGE, PAGE), "the middle of an area");
	answer(ioas_copy(fd, FIXED, to, 0x200000, from, BASE + 3 * PAGE, 2 * PAGE), "across two areas");
	answer(ioas_copy(fd, FIXED, to, 0x300000, from, BASE, 6 * PAGE), "two areas");
	answer(ioas_copy(fd, FIXED, to, 0x400000, from, BASE, 7 * PAGE), "two areas and a hole");
	answer(ioas_copy(fd, FIXED, to, 0x500000, from, BASE + 8 * PAGE, PAGE), "a hole");
	answer(ioas_copy(fd, FIXED, to, 0x600000, from, BASE + 16 * PAGE, PAGE), "read-only as read and write");
	answer(ioas_copy(fd, IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE, to, 0x700000, from, BASE + 16 * PAGE, PAGE),
	       "read-only as read-only");
	answer(ioas_copy(fd, IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_WRITEABLE, to, 0x800000, from, BASE + 16 * PAGE,
			 PAGE), "read-only as write-only");
	answer(ioas_copy(fd, IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE, to, 0x900000, from, BASE, PAGE),
	       "read and write as read-only");
	answer(ioas_copy(fd, IOMMU_IOAS_MAP_FIXED_IOVA, to, 0xa00000, from, BASE, PAGE), "without permission");
	answer(ioas_copy(fd, FIXED, from, BASE + 32 * PAGE, from, BASE, 4 * PAGE), "to itself");
	answer(ioas_copy(fd, FIXED, from, BASE, from, BASE, 4 * PAGE), "to itself in place");
	answer(ioas_copy(fd, FIXED, to, 0xb00001, from, BASE, PAGE), "to an odd address");
	answer(ioas_copy(fd, FIXED, to, 0xb00001, from, BASE + 1, PAGE), "from an odd address to an odd one");
	answer(ioas_copy(fd, FIXED, to, 0xc00001, from, BASE + 1, 1), "a byte");
	answer(ioas_copy(fd, RW, to, 0, from, BASE, 4 * PAGE), "automatic");
	answer(ioas_copy(fd, FIXED, to, -PAGE, from, BASE, 2 * PAGE), "past the end");
	answer(ioas_copy(fd, FIXED, to, 0, from, -PAGE, 2 * PAGE), "from past the end");
	answer(ioas_copy(fd, FIXED, to, 0, from, BASE, -1ull), "everything");
	must(ioas_unmap(fd, from, 0, -1ull, NULL));
	answer(ioas_copy(fd, FIXED, from, BASE, to, BASE, 4 * PAGE), "back after the source is unmapped");
	answer(destroy(fd, from), "destroy the source");
	answer(ioas_copy(fd, FIXED, from, BASE, to, BASE, 4 * PAGE), "back after it is destroyed");
	answer(destroy(fd, to), "destroy the copy");
	close(fd);

	fd = fresh(&from, 1);
	must(ioas_alloc(fd, &to));
	must(map_at(fd, from, buffer, 4 * PAGE, BASE));
	answer(ioas_copy(fd, FIXED, to, 0, from, BASE + 0x10, 0x20), "attached source: some bytes");
	answer(ioas_copy(fd, FIXED, to, 0x10, from, BASE + 0x10, 0x20), "attached source: some bytes at the same offset");
	must(ioas_map(fd, to, FIXED, buffer, PAGE, (iova = BASE, &iova)));
	answer(ioas_copy(fd, FIXED, from, BASE + 64 * PAGE, to, BASE, 0x800), "attached target: half a page");
	answer(ioas_copy(fd, FIXED, from, BASE + 128 * PAGE, to, BASE, 0x10), "attached target: some bytes");
	answer(ioas_copy(fd, FIXED, from, 0, to, BASE, PAGE), "attached target: outside the aperture");
	close(fd);
}

static void ask_file(void)
{
	uint32_t ioas, flags[] = { RW, IOMMU_IOAS_MAP_READABLE };
	int file = (int)must(memfd_create("file", 0)), sealed = (int)must(memfd_create("sealed", MFD_ALLOW_SEALING));
	int proc = (int)must(open("/proc/version", O_RDONLY)), zero = (int)must(open("/dev/zero", O_RDWR));
	char path[32];
	int read_only, fds[6];
	static const char *const names[] = { "memfd", "sealed memfd", "memfd opened for reading", "a file of /proc", "/dev/zero",
					     "write-only memfd" };

	must(ftruncate(file, 4 * PAGE));
	must(ftruncate(sealed, 4 * PAGE));
	must(fcntl(sealed, F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", file);
	read_only = (int)must(open(path, O_RDONLY));
	fds[0] = file, fds[1] = sealed, fds[2] = read_only, fds[3] = proc, fds[4] = zero;
	fds[5] = (int)must(open(path, O_WRONLY));

	for (int attach = 0; attach < 2; attach++)
		for (int i = 0; i < 6; i++)
			for (int j = 0; j < 2; j++) {
				int fd = fresh(&ioas, attach);
				struct iommu_ioas_map_file cmd = {
					.size = sizeof(cmd), .flags = flags[j] | IOMMU_IOAS_MAP_FIXED_IOVA,
					.ioas_id = ioas, .fd = fds[i], .length = 2 * PAGE, .iova = BASE,
				};

				answer(ioctl(fd, IOMMU_IOAS_MAP_FILE, &cmd), "%s %s %s", names[i], j ? "r" : "rw",
				       attach ? "attached" : "alone");
				close(fd);
			}
	/* A file that shrinks, or is closed. */
	int fd = fresh(&ioas, 0);
	struct iommu_ioas_map_file cmd = { .size = sizeof(cmd), .flags = FIXED, .ioas_id = ioas, .fd = file,
					   .start = 2 * PAGE, .length = 4 * PAGE, .iova = BASE };

	answer(ioctl(fd, IOMMU_IOAS_MAP_FILE, &cmd), "past the end of the file, alone");
	answer(mock_domain(fd, ioas, 0, NULL, NULL, NULL), "attached afterwards");
	must(ftruncate(file, 8 * PAGE));
	answer(mock_domain(fd, ioas, 0, NULL, NULL, NULL), "attached after the file has grown");
	must(ftruncate(file, PAGE));
	answer(ioas_unmap(fd, ioas, BASE, 4 * PAGE, NULL), "unmapped after the file has shrunk");
	close(fd);
}

static void ask_destroy(void)
{
	char *buffer = pages(PAGE);
	uint32_t ioas, other, third;
	int fd = fresh(&ioas, 0);

	must(map_at(fd, ioas, buffer, PAGE, BASE));
	answer(destroy(fd, ioas), "with a map");
	answer(destroy(fd, ioas), "again");
	answer(destroy(fd, 0), "0");
	must(ioas_alloc(fd, &ioas));
	must(ioas_alloc(fd, &other));
	must(ioas_alloc(fd, &third));
	value(ioas, "first new id");
	value(other, "second new id");
	value(third, "third new id");
	must(destroy(fd, other));
	must(ioas_alloc(fd, &other));
	value(other, "id after the second was destroyed");
	must(destroy(fd, ioas));
	must(destroy(fd, other));
	must(ioas_alloc(fd, &other));
	value(other, "id after the first and second were destroyed");
	close(fd);
}

int main(int argc, char **argv)
{
	static const struct section sections[] = {
		{ "unmap", ask_unmap },	      { "unmap attached", ask_unmap_attached },
		{ "unmap empty", ask_unmap_empty }, { "memory", ask_memory },
		{ "map", ask_map },	      { "attach after map", ask_attach_after_map },
		{ "allow", ask_allow },	      { "reserved", ask_reserved },
		{ "copy", ask_copy },	      { "file", ask_file },
		{ "destroy", ask_destroy },   { 0 },
	};

	return run(sections, argc, argv);
}
