/* How long an ioctl takes, in nanoseconds: of /dev/iommu where there is one, and of a pipe. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>
#include <stdint.h>

/* include/uapi/linux/iommufd.h, which Debian 12's headers do not have. */
#define IOMMU_DESTROY _IO(';', 0x80)
#define IOMMU_IOAS_ALLOC _IO(';', 0x81)
#define IOMMU_OPTION _IO(';', 0x87)
struct iommu_destroy { uint32_t size, id; };
struct iommu_ioas_alloc { uint32_t size, flags, out_ioas_id; };
struct iommu_option { uint32_t size, option_id; uint16_t op, reserved; uint32_t object_id; uint64_t val64; };
enum { IOMMU_OPTION_OP_GET = 1, IOMMU_OPTION_HUGE_PAGES = 1 };

#define CALLS 2000000

static double now(void)
{
	struct timespec at;

	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec * 1e9 + at.tv_nsec;
}

int main(void)
{
	struct iommu_ioas_alloc alloc = { .size = sizeof(alloc) };
	struct iommu_destroy missing = { .size = sizeof(missing), .id = 12345 };
	struct iommu_option option = { .size = sizeof(option), .option_id = IOMMU_OPTION_HUGE_PAGES, .op = IOMMU_OPTION_OP_GET };
	int fd = open("/dev/iommu", O_RDWR), ends[2], bytes;
	double start;

	if (fd >= 0) {
		if (ioctl(fd, IOMMU_IOAS_ALLOC, &alloc))
			return 1;
		option.object_id = alloc.out_ioas_id;
		start = now();
		for (int i = 0; i < CALLS; i++)
			if (ioctl(fd, IOMMU_OPTION, &option))
				return 2;
		printf("option %.1f\n", (now() - start) / CALLS);
		start = now();
		for (int i = 0; i < CALLS; i++)
			if (!ioctl(fd, IOMMU_DESTROY, &missing) || errno != ENOENT)
				return 3;
		printf("missing %.1f\n", (now() - start) / CALLS);
	}
	if (pipe(ends))
		return 4;
	start = now();
	for (int i = 0; i < CALLS; i++)
		if (ioctl(ends[0], FIONREAD, &bytes))
			return 5;
	printf("pipe %.1f\n", (now() - start) / CALLS);
	return 0;
}
