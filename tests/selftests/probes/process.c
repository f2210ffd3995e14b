/*
 * What is not a command: how /dev/iommu is opened, read, mapped, shared between processes and closed; which options
 * need privileges; and what is counted against the limit of locked memory.
 */
#include "world.h"
#include <linux/capability.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>

static void ask_file(void)
{
	int fd, other;
	char buffer[16];
	struct stat st;
	struct iovec vector = { buffer, sizeof(buffer) };
	static const struct {
		const char *name;
		int flags;
	} modes[] = { { "read only", O_RDONLY },	   { "write only", O_WRONLY },	      { "both", O_RDWR },
		      { "not to block", O_RDWR | O_NONBLOCK }, { "to append", O_RDWR | O_APPEND },
		      { "to truncate", O_RDWR | O_TRUNC },   { "to create", O_RDWR | O_CREAT },
		      { "exclusively", O_RDWR | O_CREAT | O_EXCL }, { "as a directory", O_RDONLY | O_DIRECTORY },
		      { "as a path", O_PATH } };

	for (size_t i = 0; i < sizeof(modes) / sizeof(*modes); i++) {
		uint32_t id;

		fd = answer_fd(open("/dev/iommu", modes[i].flags, 0600), "open %s", modes[i].name);
		if (fd >= 0) {
			answer(ioas_alloc(fd, &id), "opened %s: command", modes[i].name);
			close(fd);
		}
	}
	fd = open_iommu();
	must(fstat(fd, &st));
	value(st.st_mode & S_IFMT, "kind of file");
	value(major(st.st_rdev), "major number");
	answer(read(fd, buffer, 16), "read");
	answer(read(fd, buffer, 0), "read nothing");
	answer(write(fd, buffer, 16), "write");
	answer(readv(fd, &vector, 1), "readv");
	answer(writev(fd, &vector, 1), "writev");
	answer(pread(fd, buffer, 16, 0), "pread");
	answer(pwrite(fd, buffer, 16, 0), "pwrite");
	answer(lseek(fd, 0, SEEK_SET), "lseek");
	answer(lseek(fd, 100, SEEK_SET), "lseek forward");
	answer(lseek(fd, 0, SEEK_CUR), "lseek, where");
	answer(lseek(fd, 0, SEEK_END), "lseek to the end");
	answer(ftruncate(fd, 0), "ftruncate");
	answer(fsync(fd), "fsync");
	answer(fallocate(fd, 0, 0, 4096), "fallocate");
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN | POLLOUT | POLLPRI };
	answer(poll(&poll_fd, 1, 0), "poll");
	value((uint64_t)poll_fd.revents, "poll: events");
	answer(fcntl(fd, F_GETFL) & O_ACCMODE, "mode");
	answer(fcntl(fd, F_SETFL, O_NONBLOCK), "set not to block");
	value((uint64_t)fcntl(fd, F_GETFL) & (O_ACCMODE | O_NONBLOCK), "flags after that");
	answer_mmap(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0), "mmap");
	answer_mmap(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), "mmap to write");
	answer_mmap(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0), "mmap private");
	answer_mmap(mmap(NULL, PAGE, PROT_READ | PROT_EXEC, MAP_SHARED, fd, 0), "mmap to execute");
	answer_mmap(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0x7fffffff000), "mmap far out");
	answer_mmap(mmap(NULL, 0, PROT_READ, MAP_SHARED, fd, 0), "mmap nothing");
	answer_mmap(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 1), "mmap at 1");
	other = answer_fd(dup(fd), "dup");
	close(other);
	answer(close(fd), "close");
	answer(close(fd), "close again");
	answer(ioctl(fd, IOMMU_IOAS_ALLOC, buffer), "command after that");
	answer(access("/dev/iommu", F_OK), "access: exists");
	answer(access("/dev/iommu", R_OK | W_OK), "access: read and write");
	answer(access("/dev/iommu", X_OK), "access: execute");
	answer_fd(open("/dev/iommu/x", O_RDWR), "open something below it");
	answer(stat("/dev/iommu", &st), "stat");
	value(st.st_mode & S_IFMT, "stat: kind");
}

static void ask_descriptors(void)
{
	int fd = open_iommu(), copy = dup(fd), second = open_iommu();
	uint32_t ioas, id;
	char *buffer = pages(PAGE);

	must(ioas_alloc(fd, &ioas));
	answer(map_at(copy, ioas, buffer, PAGE, 0), "map through a duplicate");
	answer(map_at(second, ioas, buffer, PAGE, PAGE), "the id in another context");
	must(close(fd));
	answer(ioas_unmap(copy, ioas, 0, PAGE, NULL), "unmap through the duplicate after the first is closed");
	must(ioas_alloc(second, &id));
	value(id, "first id of the other context");
	answer(destroy(copy, ioas), "destroy through the duplicate");
	int moved = dup2(copy, 200);
	answer(ioas_alloc(moved, &id), "command through dup2");
	close(copy);
	moved = fcntl(moved, F_DUPFD_CLOEXEC, 100);
	answer(ioas_alloc(moved, &id), "command through F_DUPFD_CLOEXEC");
	char path[32];
	snprintf(path, sizeof(path), "/proc/self/fd/%d", moved);
	int again = answer_fd(open(path, O_RDWR), "open through /proc/self/fd");
	if (again >= 0) {
		answer(destroy(again, id), "that is another context: destroy");
		answer(ioas_alloc(again, &id), "that is another context: new address space");
		value(id, "that is another context: its id");
	}
	answer(fcntl(moved, F_GETFD), "descriptor flags");
}

/* Has a child ask, in order. */
#define IN_CHILD(...)                          \
	do {                                   \
		fflush(stdout);                \
		pid_t child_ = fork();         \
		if (child_ == 0) {             \
			__VA_ARGS__;           \
			fflush(stdout);        \
			_exit(0);              \
		}                              \
		must(waitpid(child_, NULL, 0)); \
	} while (0)

static void ask_fork(void)
{
	int fd = open_iommu();
	uint32_t ioas, id, stdev;
	char *buffer = pages(4 * PAGE);

	must(ioas_alloc(fd, &ioas));
	must(map_at(fd, ioas, buffer, PAGE, BASE));
	IN_CHILD({
		answer(ioas_unmap(fd, ioas, BASE, PAGE, NULL), "a child unmaps what its parent mapped");
		answer(map_at(fd, ioas, buffer + PAGE, PAGE, BASE + PAGE), "a child maps");
		answer(ioas_alloc(fd, &id), "a child makes an object");
		value(id, "its id");
	});
	answer(ioas_unmap(fd, ioas, BASE, PAGE, NULL), "the parent unmaps it again");
	answer(destroy(fd, 2), "the parent destroys the object");
	answer(mock_domain(fd, ioas, 0, &stdev, NULL, NULL), "a device is attached to what a dead child mapped");
	answer(ioas_unmap(fd, ioas, 0, -1ull, NULL), "the parent unmaps that");
	answer(mock_domain(fd, ioas, 0, &stdev, NULL, NULL), "a device is attached then");
	IN_CHILD({
		answer(map_at(fd, ioas, buffer, PAGE, BASE), "a child maps for a device");
		answer(close(fd), "a child closes its descriptor");
	});
	answer(ioas_unmap(fd, ioas, BASE, PAGE, NULL), "the parent unmaps that too");
	IN_CHILD(answer(destroy(fd, stdev), "a child destroys the device"));
	answer(destroy(fd, stdev), "the parent destroys it again");
	close(fd);
}

/* Gives up all privileges, but not the user. */
static void be_ordinary(void)
{
	struct __user_cap_header_struct header = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct none[2] = {};

	must(syscall(SYS_capset, &header, none));
}

static void ask_option(void)
{
	int fd = open_iommu();
	uint32_t ioas;
	uint64_t number = 77;
	char *buffer = pages(4 * PAGE);

	answer(option(fd, IOMMU_OPTION_RLIMIT_MODE, IOMMU_OPTION_OP_GET, 0, &number), "read the limit's mode");
	value(number, "the limit's mode");
	answer(set_option(fd, IOMMU_OPTION_RLIMIT_MODE, 0, 1), "limit of the process");
	number = 77;
	answer(option(fd, IOMMU_OPTION_RLIMIT_MODE, IOMMU_OPTION_OP_GET, 0, &number), "read it");
	value(number, "its mode");
	answer(set_option(fd, IOMMU_OPTION_RLIMIT_MODE, 0, 2), "limit 2");
	answer(set_option(fd, IOMMU_OPTION_RLIMIT_MODE, 0, -1ull), "limit ffffffffffffffff");
	answer(set_option(fd, IOMMU_OPTION_RLIMIT_MODE, 1, 0), "limit of an object");
	answer(option(fd, IOMMU_OPTION_RLIMIT_MODE, 2, 0, &number), "unknown operation");
	answer(option(fd, 2, IOMMU_OPTION_OP_GET, 0, &number), "unknown option");
	answer(set_option(fd, IOMMU_OPTION_RLIMIT_MODE, 0, 0), "limit of the user");
	must(ioas_alloc(fd, &ioas));
	answer(set_option(fd, IOMMU_OPTION_RLIMIT_MODE, 0, 0), "the same with an object");
	answer(set_option(fd, IOMMU_OPTION_RLIMIT_MODE, 0, 1), "another with an object");
	must(destroy(fd, ioas));
	answer(set_option(fd, IOMMU_OPTION_RLIMIT_MODE, 0, 1), "another after the object is gone");
	must(ioas_alloc(fd, &ioas));
	number = 77;
	answer(option(fd, IOMMU_OPTION_HUGE_PAGES, IOMMU_OPTION_OP_GET, ioas, &number), "read huge pages");
	value(number, "huge pages");
	answer(set_option(fd, IOMMU_OPTION_HUGE_PAGES, ioas, 2), "huge pages 2");
	answer(set_option(fd, IOMMU_OPTION_HUGE_PAGES, ioas, 0), "huge pages 0");
	answer(set_option(fd, IOMMU_OPTION_HUGE_PAGES, ioas, 0), "huge pages 0 again");
	answer(option(fd, IOMMU_OPTION_HUGE_PAGES, IOMMU_OPTION_OP_GET, ioas, &number), "read huge pages");
	value(number, "huge pages");
	answer(set_option(fd, IOMMU_OPTION_HUGE_PAGES, 0, 0), "huge pages of object 0");
	answer(set_option(fd, IOMMU_OPTION_HUGE_PAGES, 99, 0), "huge pages of an object that is not there");
	must(map_at(fd, ioas, buffer, PAGE, BASE));
	answer(set_option(fd, IOMMU_OPTION_HUGE_PAGES, ioas, 1), "huge pages 1 with a map");
	must(set_option(fd, IOMMU_OPTION_HUGE_PAGES, ioas, 1));
	answer(set_option(fd, IOMMU_OPTION_HUGE_PAGES, ioas, 0), "huge pages 0 with a map");
	must(mock_domain(fd, ioas, 0, NULL, NULL, NULL));
	answer(set_option(fd, IOMMU_OPTION_HUGE_PAGES, ioas, 0), "huge pages 0 with a device");
	answer(set_option(fd, IOMMU_OPTION_HUGE_PAGES, ioas, 1), "huge pages 1 with a device");
	close(fd);

	fd = open_iommu();
	IN_CHILD({
		be_ordinary();
		number = 77;
		answer(option(fd, IOMMU_OPTION_RLIMIT_MODE, IOMMU_OPTION_OP_GET, 0, &number), "without privileges: read the limit's mode");
		answer(set_option(fd, IOMMU_OPTION_RLIMIT_MODE, 0, 1), "without privileges: set it");
		answer(set_option(fd, IOMMU_OPTION_RLIMIT_MODE, 0, 0), "without privileges: set it to what it is");
		must(ioas_alloc(fd, &ioas));
		answer(set_option(fd, IOMMU_OPTION_HUGE_PAGES, ioas, 0), "without privileges: set huge pages");
	});
	close(fd);
}

/* VmLck and VmPin of this process in pages. */
static void show_counts(const char *when)
{
	char line[128];
	FILE *status = fopen("/proc/self/status", "r");
	unsigned long size;

	while (fgets(line, sizeof(line), status)) {
		if (sscanf(line, "VmLck: %lu", &size) == 1)
			value(size / 4, "VmLck in pages %s", when);
		if (sscanf(line, "VmPin: %lu", &size) == 1)
			value(size / 4, "VmPin in pages %s", when);
	}
	fclose(status);
}

static int access_make(int fd, uint32_t ioas, uint32_t flags, uint32_t *id)
{
	struct iommu_test_cmd cmd = { .op = IOMMU_TEST_OP_CREATE_ACCESS, .id = ioas, .create_access = { .flags = flags } };
	int result = test(fd, &cmd);

	*id = cmd.create_access.out_access_fd;
	return result;
}

/* Takes privileges and all but 16 pages of locked memory away from this section, whose accounting is in this mode. */
static int limited(uint64_t mode)
{
	struct rlimit limit = { 16 * PAGE, 16 * PAGE };
	int fd = open_iommu();

	must(set_option(fd, IOMMU_OPTION_RLIMIT_MODE, 0, mode));
	must(setrlimit(RLIMIT_MEMLOCK, &limit));
	be_ordinary();
	return fd;
}

static void ask_limit(uint64_t mode)
{
	int fd = limited(mode);
	char *buffer = pages(64 * PAGE);
	uint32_t ioas, second;

	must(ioas_alloc(fd, &ioas));
	answer(map_at(fd, ioas, buffer, 64 * PAGE, BASE), "map 64 pages where 16 are allowed");
	show_counts("with a map");
	answer(mock_domain(fd, ioas, 0, NULL, NULL, NULL), "attach a device");
	must(ioas_unmap(fd, ioas, 0, -1ull, NULL));
	answer(mock_domain(fd, ioas, 0, NULL, NULL, NULL), "attach a device to nothing");
	answer(map_at(fd, ioas, buffer, 16 * PAGE, BASE), "map 16 pages");
	show_counts("with 16 pages");
	answer(map_at(fd, ioas, buffer + 16 * PAGE, PAGE, BASE + 16 * PAGE), "map one more");
	answer(map_at(fd, ioas, buffer, PAGE, BASE + 16 * PAGE), "map one of them a second time");
	must(ioas_alloc(fd, &second));
	answer(ioas_copy(fd, FIXED, second, BASE, ioas, BASE, 16 * PAGE), "copy them");
	answer(mock_domain(fd, second, 0, NULL, NULL, NULL), "attach a device to the copy");
	answer(ioas_unmap(fd, ioas, BASE, 16 * PAGE, NULL), "unmap");
	show_counts("after the original is unmapped");
	answer(map_at(fd, ioas, buffer + 16 * PAGE, PAGE, BASE), "map another while the copy is there");
	answer(ioas_unmap(fd, second, BASE, 16 * PAGE, NULL), "unmap the copy");
	answer(map_at(fd, ioas, buffer + 16 * PAGE, PAGE, BASE), "map another after that");
	show_counts("at the end");
}

static void ask_limit_of_user(void)
{
	ask_limit(0);
}

static void ask_limit_of_process(void)
{
	ask_limit(1);
}

static void ask_limit_of_file(void)
{
	int fd = limited(0), file = (int)must(memfd_create("limit", 0));
	uint32_t ioas;
	struct iommu_ioas_map_file cmd = { .size = sizeof(cmd), .flags = FIXED, .fd = file, .length = 17 * PAGE,
					   .iova = BASE };

	must(ftruncate(file, 64 * PAGE));
	must(ioas_alloc(fd, &ioas));
	must(mock_domain(fd, ioas, 0, NULL, NULL, NULL));
	cmd.ioas_id = ioas;
	answer(ioctl(fd, IOMMU_IOAS_MAP_FILE, &cmd), "17 pages");
	cmd.length = 16 * PAGE;
	answer(ioctl(fd, IOMMU_IOAS_MAP_FILE, &cmd), "16 pages");
	show_counts("with a file");
	must(ioas_unmap(fd, ioas, 0, -1ull, NULL));
	show_counts("after that");
}

static void ask_limit_of_pins(void)
{
	int fd = limited(0);
	char *buffer = pages(64 * PAGE);
	uint32_t ioas, id;

	must(ioas_alloc(fd, &ioas));
	must(map_at(fd, ioas, buffer, 64 * PAGE, BASE));
	must(access_make(fd, ioas, MOCK_FLAGS_ACCESS_CREATE_NEEDS_PIN_PAGES, &id));
	for (uint64_t count = 16; count < 18; count++) {
		uint64_t offset = (17 - count) * 32 * PAGE;
		struct iommu_test_cmd pin = { .op = IOMMU_TEST_OP_ACCESS_PAGES, .id = id,
					      .access_pages = { .iova = BASE + offset, .length = count * PAGE,
								.uptr = (uintptr_t)buffer + offset } };

		answer(test(fd, &pin), "%d pages pinned by an access", (int)count);
		show_counts("with pins");
	}
}

static int change_process(int fd)
{
	struct iommu_ioas_change_process cmd = { .size = sizeof(cmd) };

	return ioctl(fd, IOMMU_IOAS_CHANGE_PROCESS, &cmd);
}

static void ask_change_process(void)
{
	int fd = open_iommu();
	int file = (int)must(memfd_create("change", 0));
	char *buffer = pages(PAGE);
	uint32_t ioas;
	struct iommu_ioas_map_file cmd = { .size = sizeof(cmd), .flags = FIXED, .fd = file, .length = 4 * PAGE, .iova = BASE };

	must(ftruncate(file, 4 * PAGE));
	answer(change_process(fd), "without objects");
	must(ioas_alloc(fd, &ioas));
	answer(change_process(fd), "with an empty address space");
	cmd.ioas_id = ioas;
	must(ioctl(fd, IOMMU_IOAS_MAP_FILE, &cmd));
	must(mock_domain(fd, ioas, 0, NULL, NULL, NULL));
	answer(change_process(fd), "with a file");
	show_counts("before");
	IN_CHILD({
		show_counts("of the child before");
		answer(change_process(fd), "by a child");
		show_counts("of the child");
	});
	show_counts("of the parent after that");
	answer(change_process(fd), "back");
	must(map_at(fd, ioas, buffer, PAGE, BASE + 16 * PAGE));
	answer(change_process(fd), "with memory");
	IN_CHILD(answer(change_process(fd), "with memory, by a child"));
	must(ioas_unmap(fd, ioas, BASE + 16 * PAGE, PAGE, NULL));
	answer(change_process(fd), "after the memory is unmapped");
	close(fd);
}

int main(int argc, char **argv)
{
	static const struct section sections[] = {
		{ "file", ask_file },	  { "descriptors", ask_descriptors }, { "fork", ask_fork }, { "option", ask_option },
		{ "limit of a user", ask_limit_of_user },
		{ "limit of a process", ask_limit_of_process }, { "limit of a file", ask_limit_of_file },
		{ "limit of pins", ask_limit_of_pins }, { "change process", ask_change_process }, { 0 },
	};

	return run(sections, argc, argv);
}
