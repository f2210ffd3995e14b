/* Virtual IOMMUs and what hangs on them: virtual devices, event queues, hardware queues; and fault queues. */
#include "world.h"

/* A device with a nested page table under a virtual IOMMU. */
struct bench {
	int fd;
	uint32_t ioas, stdev, idev, stdev2, idev2, parent, viommu;
	char *buffer;
	struct iommu_viommu_selftest data;
};

static struct bench bench(void)
{
	struct bench b = { .fd = open_iommu(), .data = { .in_data = 0xbadbeef } };

	must(ioas_alloc(b.fd, &b.ioas));
	must(mock_domain(b.fd, b.ioas, MOCK_FLAGS_DEVICE_PASID, &b.stdev, NULL, &b.idev));
	must(mock_domain(b.fd, b.ioas, 0, &b.stdev2, NULL, &b.idev2));
	must(hwpt_alloc(b.fd, b.idev, b.ioas, IOMMU_HWPT_ALLOC_NEST_PARENT, 0, &b.parent));
	must(viommu_alloc(b.fd, b.idev, b.parent, IOMMU_VIOMMU_TYPE_SELFTEST, &b.data, &b.viommu));
	b.buffer = pages(16 * PAGE);
	must(map_at(b.fd, b.ioas, b.buffer, 16 * PAGE, BASE));
	return b;
}

static void ask_viommu(void)
{
	struct bench b = bench();
	struct iommu_viommu_selftest data = { .in_data = 5 };
	uint32_t second, plain, nested, on_viommu, id;

	value(b.data.out_data, "data out");
	value(b.data.out_mmap_length, "length to map");
	value(b.data.out_mmap_offset % PAGE, "offset to map, in the page");
	must(hwpt_alloc(b.fd, b.idev, b.ioas, 0, 0, &plain));
	must(nested_alloc(b.fd, b.idev, b.parent, 0, 0, &nested));
	answer(viommu_alloc(b.fd, b.idev, b.parent, IOMMU_VIOMMU_TYPE_SELFTEST, &data, &second), "a second on the same parent");
	answer(viommu_alloc(b.fd, b.idev, plain, IOMMU_VIOMMU_TYPE_SELFTEST, NULL, &id), "on a plain page table");
	answer(viommu_alloc(b.fd, b.idev, nested, IOMMU_VIOMMU_TYPE_SELFTEST, NULL, &id), "on a nested page table");
	answer(viommu_alloc(b.fd, b.idev2, b.parent, IOMMU_VIOMMU_TYPE_SELFTEST, NULL, &id), "for another device");
	answer(viommu_alloc(b.fd, b.idev, b.parent, IOMMU_VIOMMU_TYPE_DEFAULT, NULL, &id), "type 0");
	answer(viommu_alloc(b.fd, b.idev, b.parent, IOMMU_VIOMMU_TYPE_ARM_SMMUV3, NULL, &id), "type SMMUv3");
	answer(nested_alloc(b.fd, b.idev, b.viommu, 0, 0, &on_viommu), "a nested page table on it");
	answer(nested_alloc(b.fd, b.idev2, b.viommu, 0, 0, &id), "one for another device");
	answer(nested_alloc(b.fd, b.idev, b.viommu, IOMMU_HWPT_ALLOC_NEST_PARENT, 0, &id), "a parent on it");
	answer(nested_alloc(b.fd, b.idev, b.viommu, IOMMU_HWPT_ALLOC_DIRTY_TRACKING, 0, &id), "one with dirty bits on it");
	answer(nested_alloc(b.fd, b.idev, b.viommu, IOMMU_HWPT_ALLOC_PASID, 0, &id), "one for pasids on it");
	answer(hwpt_alloc(b.fd, b.idev, b.viommu, 0, 0, &id), "one without data on it");
	answer(replace(b.fd, b.stdev, on_viommu), "attach without a virtual device");
	answer(replace(b.fd, b.stdev, b.viommu), "attach the virtual IOMMU itself");
	answer(destroy(b.fd, b.viommu), "destroy with a nested page table");
	answer(destroy(b.fd, b.parent), "destroy the parent");
	answer(replace(b.fd, b.stdev, b.ioas), "attach the address space");
	answer(destroy(b.fd, on_viommu), "destroy the nested page table");
	answer(destroy(b.fd, b.viommu), "destroy it then");
	answer(destroy(b.fd, b.parent), "destroy the parent of the second");
	close(b.fd);
}

static void ask_vdevice(void)
{
	struct bench b = bench();
	uint32_t vdevice, other, second, nested, id;

	answer(vdevice_alloc(b.fd, b.viommu, b.idev, 0x99, &vdevice), "make one");
	answer(vdevice_alloc(b.fd, b.viommu, b.idev, 0x99, &id), "the same again");
	answer(vdevice_alloc(b.fd, b.viommu, b.idev, 0x98, &id), "the same device with another number");
	answer(vdevice_alloc(b.fd, b.viommu, b.idev2, 0x99, &id), "another device with the same number");
	answer(vdevice_alloc(b.fd, b.viommu, b.idev2, 0xffffffffffffffff, &other), "number ffffffffffffffff");
	answer(vdevice_alloc(b.fd, b.viommu, b.idev2, 0x100000000, &other), "number 100000000");
	answer(vdevice_alloc(b.fd, b.viommu, b.idev2, 0, &id), "another device with number 0");
	answer(viommu_alloc(b.fd, b.idev, b.parent, IOMMU_VIOMMU_TYPE_SELFTEST, NULL, &second), "a second virtual IOMMU");
	answer(vdevice_alloc(b.fd, second, b.idev, 0x99, &id), "the device there too");
	answer(destroy(b.fd, b.viommu), "destroy the virtual IOMMU");
	answer(nested_alloc(b.fd, b.idev, b.viommu, 0, 0, &nested), "a nested page table");
	answer(replace(b.fd, b.stdev, nested), "attach it");
	answer(destroy(b.fd, vdevice), "destroy while the device is attached");
	answer(vdevice_alloc(b.fd, b.viommu, b.idev, 0x99, &vdevice), "make it again");
	answer(destroy(b.fd, b.stdev), "the device goes first");
	answer(vdevice_alloc(b.fd, b.viommu, b.idev, 0x99, &id), "for the device that is gone");
	answer(destroy(b.fd, b.viommu), "destroy the virtual IOMMU");
	answer(destroy(b.fd, vdevice), "destroy what is left of it");
	answer(destroy(b.fd, vdevice), "again");
	answer(destroy(b.fd, nested), "destroy the nested page table");
	answer(destroy(b.fd, b.viommu), "destroy the virtual IOMMU after that");
	answer(destroy(b.fd, b.stdev2), "the other device goes");
	answer(destroy(b.fd, b.idev2), "destroy the other device");
	answer(destroy(b.fd, b.viommu), "destroy the virtual IOMMU at last");
	close(b.fd);
}

static int trigger(int fd, uint32_t device)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_TRIGGER_VEVENT, .trigger_vevent = { .dev_id = device } };

	return test(fd, &cmd);
}

struct event {
	struct iommufd_vevent_header header;
	struct iommu_viommu_event_selftest data;
};

static int ready(int fd)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN | POLLOUT };

	must(poll(&poll_fd, 1, 0));
	return poll_fd.revents;
}

/* Reads events and prints them. */
static void show_events(int fd, size_t room, const char *when)
{
	struct event events[4];
	unsigned char *bytes = (unsigned char *)events;
	ssize_t count;

	memset(events, 0xa5, sizeof(events));
	count = read(fd, events, room);
	answer(count, "read %zu bytes %s", room, when);
	if (count <= 0)
		return;
	printf("%s: bytes %s: ", section_name, when);
	for (ssize_t i = 0; i < count; i++)
		printf("%02x", bytes[i]);
	printf("\n");
}

static void ask_veventq(void)
{
	struct bench b = bench();
	uint32_t queue, vdevice, nested, id;
	int events, other;
	struct event event;

	answer(veventq_alloc(b.fd, b.viommu, IOMMU_VEVENTQ_TYPE_SELFTEST, 0, &id, &other), "depth 0");
	answer(veventq_alloc(b.fd, b.viommu, IOMMU_VEVENTQ_TYPE_DEFAULT, 2, &id, &other), "type 0");
	answer(veventq_alloc(b.fd, b.viommu, IOMMU_VEVENTQ_TYPE_SELFTEST, 2, &queue, &events), "make one");
	answer(veventq_alloc(b.fd, b.viommu, IOMMU_VEVENTQ_TYPE_SELFTEST, 2, &id, &other), "another of the type");
	value((uint64_t)fcntl(events, F_GETFL) & (O_ACCMODE | O_NONBLOCK), "mode of the descriptor");
	value((uint64_t)fcntl(events, F_GETFD), "descriptor flags");
	answer(trigger(b.fd, b.idev), "event of a device without a virtual one");
	must(vdevice_alloc(b.fd, b.viommu, b.idev, 0x99, &vdevice));
	answer(trigger(b.fd, b.idev), "event of a device that is not attached to the virtual IOMMU");
	must(nested_alloc(b.fd, b.idev, b.viommu, 0, 0, &nested));
	must(replace(b.fd, b.stdev, nested));
	value((uint64_t)ready(events), "poll an empty queue");
	must(fcntl(events, F_SETFL, O_NONBLOCK));
	show_events(events, sizeof(event), "of an empty queue");
	show_events(events, 0, "of an empty queue");
	show_events(events, 1, "of an empty queue");
	answer(write(events, &event, sizeof(event)), "write");
	answer(lseek(events, 0, SEEK_SET), "lseek");
	answer(lseek(events, 0, SEEK_CUR), "lseek, current");
	answer(pread(events, &event, sizeof(event), 0), "pread at 0");
	answer(pread(events, &event, sizeof(event), 8), "pread at 8");
	answer(ioctl(events, FIONREAD, &id), "FIONREAD");
	answer_mmap(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, events, 0), "mmap");
	answer(trigger(b.fd, b.idev), "event");
	value((uint64_t)ready(events), "poll a queue with an event");
	show_events(events, sizeof(event) - 1, "of a queue with an event");
	show_events(events, sizeof(struct iommufd_vevent_header), "of a queue with an event");
	show_events(events, 0, "of a queue with an event");
	show_events(events, sizeof(event), "of a queue with an event");
	for (int i = 0; i < 5; i++)
		answer(trigger(b.fd, b.idev), "event %d of 5", i);
	value((uint64_t)ready(events), "poll a queue that overflowed");
	show_events(events, sizeof(event), "first");
	show_events(events, sizeof(event), "second");
	show_events(events, 4, "third");
	show_events(events, sizeof(struct iommufd_vevent_header), "third");
	show_events(events, sizeof(event), "fourth");
	answer(trigger(b.fd, b.idev), "event after that");
	show_events(events, sizeof(event), "after that");
	answer(trigger(b.fd, b.idev), "event");
	answer(trigger(b.fd, b.idev), "event");
	answer(trigger(b.fd, b.idev), "event that is lost");
	show_events(events, 4 * sizeof(event), "all at once");
	must(trigger(b.fd, b.idev));
	answer(read(events, nowhere, sizeof(event)), "read to a bad address");
	show_events(events, sizeof(event), "after a bad address");
	answer(destroy(b.fd, queue), "destroy with its descriptor open");
	answer(destroy(b.fd, b.viommu), "destroy the virtual IOMMU");
	must(close(events));
	answer(destroy(b.fd, queue), "destroy with its descriptor closed");
	must(veventq_alloc(b.fd, b.viommu, IOMMU_VEVENTQ_TYPE_SELFTEST, 2, &queue, &events));
	must(trigger(b.fd, b.idev));
	close(b.fd);
	value((uint64_t)ready(events), "poll after the context is closed");
	must(fcntl(events, F_SETFL, O_NONBLOCK));
	show_events(events, sizeof(event), "after the context is closed");
	show_events(events, sizeof(event), "again");
}

static void ask_hw_queue(void)
{
	struct bench b = bench();
	uint32_t first, second, other, id;
	const uint32_t type = IOMMU_HW_QUEUE_TYPE_SELFTEST;

	answer(queue_alloc(b.fd, b.viommu, type, 1, BASE, PAGE, &id), "index 1 first");
	answer(queue_alloc(b.fd, b.viommu, type, 0, BASE, PAGE, &first), "index 0");
	answer(queue_alloc(b.fd, b.viommu, type, 0, BASE, PAGE, &id), "index 0 again");
	answer(queue_alloc(b.fd, b.viommu, type, IOMMU_TEST_HW_QUEUE_MAX, BASE, PAGE, &id), "an index too high");
	answer(queue_alloc(b.fd, b.viommu, IOMMU_HW_QUEUE_TYPE_DEFAULT, 1, BASE, PAGE, &id), "type 0");
	answer(queue_alloc(b.fd, b.viommu, type, 1, BASE, PAGE, &second), "index 1, the same memory");
	answer(ioas_unmap(b.fd, b.ioas, BASE, 16 * PAGE, NULL), "unmap its memory");
	answer(ioas_unmap(b.fd, b.ioas, 0, -1ull, NULL), "unmap everything");
	answer(destroy(b.fd, first), "destroy the lower");
	answer(destroy(b.fd, b.viommu), "destroy the virtual IOMMU");
	answer(destroy(b.fd, second), "destroy the upper");
	answer(destroy(b.fd, first), "destroy the lower then");
	answer(ioas_unmap(b.fd, b.ioas, BASE, 16 * PAGE, NULL), "unmap the memory then");
	answer(queue_alloc(b.fd, b.viommu, type, 0, BASE, PAGE, &id), "on memory that is not mapped");
	must(map_at(b.fd, b.ioas, b.buffer, PAGE, BASE));
	answer(queue_alloc(b.fd, b.viommu, type, 0, BASE, 2 * PAGE, &id), "on memory that is mapped in part");
	answer(queue_alloc(b.fd, b.viommu, type, 0, BASE, 0, &id), "of length 0");
	answer(queue_alloc(b.fd, b.viommu, type, 0, BASE, -1ull, &id), "of all lengths");
	answer(queue_alloc(b.fd, b.viommu, type, 0, BASE + 16, 16, &other), "on some bytes");
	answer(ioas_unmap(b.fd, b.ioas, BASE, PAGE, NULL), "unmap their page");
	must(destroy(b.fd, other));
	must(ioas_unmap(b.fd, b.ioas, 0, -1ull, NULL));
	uint64_t iova = BASE;
	must(ioas_map(b.fd, b.ioas, IOMMU_IOAS_MAP_FIXED_IOVA | IOMMU_IOAS_MAP_READABLE, b.buffer, PAGE, &iova));
	answer(queue_alloc(b.fd, b.viommu, type, 0, BASE, PAGE, &other), "on read-only memory");
	close(b.fd);
}

static void ask_viommu_map(void)
{
	struct bench b = bench();
	uint64_t offset = b.data.out_mmap_offset, length = b.data.out_mmap_length;
	const int rw = PROT_READ | PROT_WRITE;
	struct bench other = bench();
	char *map;

	answer_mmap(mmap(NULL, length, rw, MAP_SHARED, b.fd, 0), "offset 0");
	answer_mmap(mmap(NULL, length, rw, MAP_SHARED, b.fd, (off_t)(offset + PAGE)), "the next page");
	answer_mmap(mmap(NULL, length, rw, MAP_SHARED, b.fd, (off_t)(offset - PAGE)), "the page before");
	answer_mmap(mmap(NULL, length + PAGE, rw, MAP_SHARED, b.fd, (off_t)offset), "a page too much");
	answer_mmap(mmap(NULL, 1, rw, MAP_SHARED, b.fd, (off_t)offset), "one byte");
	answer_mmap(mmap(NULL, length, rw, MAP_PRIVATE, b.fd, (off_t)offset), "private");
	answer_mmap(mmap(NULL, length, PROT_READ, MAP_PRIVATE, b.fd, (off_t)offset), "private, to read");
	answer_mmap(mmap(NULL, length, rw | PROT_EXEC, MAP_SHARED, b.fd, (off_t)offset), "to execute");
	answer_mmap(mmap(NULL, length, PROT_NONE, MAP_SHARED, b.fd, (off_t)offset), "without access");
	answer(destroy(b.fd, b.viommu), "destroy with maps");
	close(b.fd);
	b = bench();
	offset = b.data.out_mmap_offset;
	map = answer_mmap(mmap(NULL, length, rw, MAP_SHARED, b.fd, (off_t)offset), "as it says");
	if (map != MAP_FAILED) {
		answer(mprotect(map, length, rw | PROT_EXEC), "let it be executed");
		answer(mprotect(map, length, PROT_READ), "let it be read only");
		answer(madvise(map, length, MADV_DONTFORK), "keep it from children");
		answer(madvise(map, length, MADV_DONTNEED), "drop its pages");
		answer(destroy(b.fd, b.viommu), "destroy while it is mapped");
		must(munmap(map, length));
		answer(destroy(b.fd, b.viommu), "destroy after it is unmapped");
	}
	answer_mmap(mmap(NULL, length, rw, MAP_SHARED, b.fd, (off_t)offset), "after it is destroyed");
	answer_mmap(mmap(NULL, length, rw, MAP_SHARED, other.fd, (off_t)other.data.out_mmap_offset), "of another context");
	map = answer_mmap(mmap(NULL, length, rw, MAP_SHARED, other.fd, (off_t)other.data.out_mmap_offset), "of it again");
	if (map != MAP_FAILED)
		answer(mremap(map, length, 2 * length, MREMAP_MAYMOVE) == MAP_FAILED ? -1 : 0, "grow it");
	close(b.fd);
}

static int iopf(int fd, uint32_t device, uint32_t pasid, uint32_t group)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_TRIGGER_IOPF,
				      .trigger_iopf = { .dev_id = device, .pasid = pasid, .grpid = group,
							.perm = IOMMU_PGFAULT_PERM_READ, .addr = 0xdeadbeaf } };

	return test(fd, &cmd);
}

static void ask_fault(void)
{
	struct bench b = bench();
	struct iommu_hwpt_pgfault faults[4];
	struct iommu_hwpt_page_response response[2] = {};
	uint32_t fault, nested, id;
	int fd;

	answer(fault_alloc(b.fd, &fault, &fd), "make a queue");
	value((uint64_t)fcntl(fd, F_GETFL) & (O_ACCMODE | O_NONBLOCK), "mode of the descriptor");
	value((uint64_t)fcntl(fd, F_GETFD), "descriptor flags");
	must(fcntl(fd, F_SETFL, O_NONBLOCK));
	value((uint64_t)ready(fd), "poll an empty queue");
	answer(read(fd, faults, sizeof(*faults)), "read an empty queue");
	answer(read(fd, faults, 0), "read nothing");
	answer(read(fd, faults, 1), "read a byte");
	answer(lseek(fd, 0, SEEK_SET), "lseek");
	answer(pread(fd, faults, sizeof(*faults), 0), "pread");
	answer(pread(fd, faults, sizeof(*faults), 64), "pread at 64");
	answer(write(fd, response, 0), "answer nothing");
	answer(write(fd, response, 1), "answer with a byte");
	answer(write(fd, response, sizeof(*response)), "answer what was not asked");
	answer_mmap(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0), "mmap");
	answer(ioctl(fd, FIONREAD, &id), "FIONREAD");
	answer(destroy(b.fd, fault), "destroy with its descriptor open");

	answer(iopf(b.fd, b.idev, 0xffffffff, 1), "a fault of a device that has no queue");
	must(nested_alloc(b.fd, b.idev, b.parent, IOMMU_HWPT_FAULT_ID_VALID, fault, &nested));
	must(replace(b.fd, b.stdev, nested));
	answer(iopf(b.fd, b.idev, 0xffffffff, 1), "a fault");
	answer(iopf(b.fd, b.idev, 0xffffffff, 2), "another");
	answer(iopf(b.fd, b.idev, 7, 3), "one of a pasid that is not attached");
	value((uint64_t)ready(fd), "poll");
	answer(read(fd, faults, sizeof(*faults) - 1), "read less than one");
	answer(read(fd, faults, sizeof(*faults) + 1), "read a little more than one");
	answer(read(fd, nowhere, sizeof(*faults)), "read to a bad address");
	memset(faults, 0xa5, sizeof(faults));
	answer(read(fd, faults, sizeof(*faults)), "read one");
	value(faults->flags, "flags");
	value(faults->dev_id == b.idev, "its device");
	value(faults->pasid, "pasid");
	value(faults->grpid, "group");
	value(faults->perm, "permissions");
	value(faults->addr, "address");
	value(faults->length, "length");
	value(faults->cookie, "cookie");
	uint32_t first = faults->cookie;
	answer(read(fd, faults, sizeof(faults)), "read the rest");
	value(faults->cookie, "cookie of the next");
	value((uint64_t)ready(fd), "poll after that");
	response[0] = (struct iommu_hwpt_page_response){ .cookie = first, .code = 2 };
	answer(write(fd, response, sizeof(*response)), "answer with a bad code");
	response[0].code = IOMMUFD_PAGE_RESP_INVALID;
	response[1] = (struct iommu_hwpt_page_response){ .cookie = 99, .code = 0 };
	answer(write(fd, response, 2 * sizeof(*response)), "one good answer, and one to nothing");
	answer(write(fd, response, sizeof(*response)), "the good answer again");
	answer(write(fd, nowhere, sizeof(*response)), "answer from a bad address");
	answer(destroy(b.fd, nested), "destroy the attached page table");
	answer(replace(b.fd, b.stdev, b.ioas), "detach with a fault that is not answered");
	response[0] = (struct iommu_hwpt_page_response){ .cookie = faults->cookie };
	answer(write(fd, response, sizeof(*response)), "answer it after that");
	must(replace(b.fd, b.stdev, nested));
	must(iopf(b.fd, b.idev, 0xffffffff, 4));
	must(replace(b.fd, b.stdev, b.ioas));
	answer(read(fd, faults, sizeof(faults)), "read a fault of a device that has left");
	answer(destroy(b.fd, nested), "destroy the page table");
	must(close(fd));
	answer(destroy(b.fd, fault), "destroy with its descriptor closed");
	/* Descriptors that outlive the context. */
	must(fault_alloc(b.fd, &fault, &fd));
	must(nested_alloc(b.fd, b.idev, b.parent, IOMMU_HWPT_FAULT_ID_VALID, fault, &nested));
	must(replace(b.fd, b.stdev, nested));
	must(iopf(b.fd, b.idev, 0xffffffff, 5));
	close(b.fd);
	must(fcntl(fd, F_SETFL, O_NONBLOCK));
	value((uint64_t)ready(fd), "poll after the context is closed");
	answer(read(fd, faults, sizeof(faults)), "read after the context is closed");
}

/* A full context, taken apart in many orders: each object in turn, as often as something goes. */
static void ask_take_apart(void)
{
	struct world w;

	world_make(&w, 0);
	struct {
		const char *name;
		uint32_t id;
	} all[] = {
		{ "ioas", w.ioas },   { "automatic hwpt", w.hwpt }, { "device", w.idev },   { "mock device", w.stdev },
		{ "parent", w.parent }, { "dirty", w.dirty },	      { "nested", w.nested }, { "fault", w.fault },
		{ "viommu", w.viommu }, { "vdevice", w.vdevice },   { "veventq", w.veventq }, { "queue", w.queue },
		{ "second mock device", w.stdev2 },
	};
	for (int round = 0; round < 4; round++) {
		if (round == 1) {
			close(w.fault_fd);
			close(w.veventq_fd);
		}
		for (size_t i = 0; i < sizeof(all) / sizeof(*all); i++)
			answer(destroy(w.fd, all[i].id), "round %d: %s", round, all[i].name);
	}
	close(w.fd);
}

int main(int argc, char **argv)
{
	static const struct section sections[] = {
		{ "viommu", ask_viommu },	  { "vdevice", ask_vdevice }, { "veventq", ask_veventq },
		{ "hw queue", ask_hw_queue },	  { "viommu map", ask_viommu_map }, { "fault", ask_fault },
		{ "take apart", ask_take_apart }, { 0 },
	};

	return run(sections, argc, argv);
}
