/*
 * What the probes share: a probe asks an implementation of /dev/iommu or /dev/vfio many small questions and prints one
 * line for each answer, `SECTION: QUESTION: ANSWER`. The same program is run on the real kernel, whose answers are
 * kept in ../answers, and under `ring3 shim`, whose answers have to be the same.
 *
 * A section is a process of its own with ten minutes of time, so that one that dies takes no other answer with it.
 * An answer is the name of an errno, or `OK`, or `= N` for a call that returned something else than 0. Numbers that an
 * implementation may choose freely (descriptors, addresses) are not printed.
 */
#ifndef PROBE_H
#define PROBE_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096UL

struct section {
	const char *name;
	void (*ask)(void);
};

static const char *section_name;

__attribute__((unused)) static const char *name_of(int error)
{
	const char *name = strerrorname_np(error);

	/* errno values inside the kernel that leak have no name. */
	static char number[16];
	if (!name)
		snprintf(number, sizeof(number), "errno %d", error);
	return name ? name : number;
}

/* Prints the answer to a question: what a system call returned. Returns the same. */
__attribute__((format(printf, 2, 3), unused)) static long answer(long result, const char *question, ...)
{
	int error = errno;
	va_list args;

	printf("%s: ", section_name);
	va_start(args, question);
	vprintf(question, args);
	va_end(args);
	if (result == -1)
		printf(": %s\n", name_of(error));
	else if (result == 0)
		printf(": OK\n");
	else
		printf(": = %ld\n", result);
	errno = error;
	return result;
}

/* Prints a value as the answer. */
__attribute__((format(printf, 2, 3), unused)) static void value(uint64_t number, const char *question, ...)
{
	va_list args;

	printf("%s: ", section_name);
	va_start(args, question);
	vprintf(question, args);
	va_end(args);
	printf(": 0x%llx\n", (unsigned long long)number);
}

/* Prints whether a call that returns a descriptor succeeded, but not which descriptor. */
#define answer_fd(result, ...)                                        \
	({                                                            \
		long fd_ = (result);                                  \
		answer(fd_ >= 0 ? 0 : -1, __VA_ARGS__);               \
		(int)fd_;                                             \
	})

/* The same for mmap. */
#define answer_mmap(result, ...)                                      \
	({                                                            \
		void *map_ = (result);                                \
		answer(map_ == MAP_FAILED ? -1 : 0, __VA_ARGS__);     \
		map_;                                                 \
	})

/* What has to work for the questions to make sense. */
#define must(call)                                                                                    \
	({                                                                                            \
		long result_ = (long)(call);                                                          \
		if (result_ == -1) {                                                                  \
			printf("%s: (line %d) %s: %s\n", section_name, __LINE__, #call, name_of(errno)); \
			fflush(stdout);                                                               \
			_exit(1);                                                                     \
		}                                                                                     \
		result_;                                                                              \
	})

/* An address at which nothing is, of which the compiler does not know. */
static void *volatile nowhere = (void *)1;

/* Anonymous memory; what comes after it is not mapped. */
static inline void *pages(size_t length)
{
	char *map = (char *)must(mmap(NULL, length + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));

	must(munmap(map + length, PAGE));
	return map;
}

/* Runs the sections, or those whose names are given. */
static inline int run(const struct section *sections, int argc, char **argv)
{
	for (; sections->name; sections++) {
		int wanted = argc < 2, status;
		pid_t child;

		for (int i = 1; i < argc; i++)
			wanted |= !strcmp(argv[i], sections->name);
		if (!wanted)
			continue;
		section_name = sections->name;
		fflush(stdout);
		child = fork();
		if (child == 0) {
			alarm(600);
			sections->ask();
			fflush(stdout);
			_exit(0);
		}
		waitpid(child, &status, 0);
		if (WIFSIGNALED(status))
			printf("%s: ended by signal %d\n", section_name, WTERMSIG(status));
	}
	return 0;
}

#endif
