/* What sysfs says of a device that VFIO has, and what writing to it does: virtual functions, drivers. */
#include "card.h"
#include <sys/stat.h>

/* A path below the device's directory; its buffer is used again by the call after the next. */
static const char *of(const char *address, const char *name)
{
	static char paths[2][300];
	static int turn;

	snprintf(paths[turn ^= 1], sizeof(paths[0]), "/sys/bus/pci/devices/%s/%s", address, name);
	return paths[turn];
}

static long put(const char *path, const char *text, size_t length)
{
	int fd = open(path, O_WRONLY), error;
	long result;

	if (fd < 0)
		return -1;
	result = write(fd, text, length);
	error = errno;
	close(fd);
	errno = error;
	return result;
}

#define ask_put(path, text, ...) answer(put(path, text, strlen(text)), __VA_ARGS__)

/* The text of an attribute, without the line's end. */
static void show(const char *path, const char *question)
{
	char text[256] = "";
	int fd = open(path, O_RDONLY);
	ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);

	if (length < 0) {
		answer(-1, "%s", question);
	} else {
		text[length] = 0;
		printf("%s: %s: \"%.*s\"%s\n", section_name, question, (int)strcspn(text, "\n"), text,
		       strchr(text, '\n') ? "" : " without an end");
	}
	if (fd >= 0)
		close(fd);
}

/* The last part of what a link leads to; its buffer is used again by the next call. */
static const char *target(const char *path)
{
	static char text[256];
	ssize_t length = readlink(path, text, sizeof(text) - 1);

	if (length < 0)
		return NULL;
	text[length] = 0;
	return strrchr(text, '/') ? strrchr(text, '/') + 1 : text;
}

static void ask_there(const char *path, const char *question)
{
	struct stat about;

	answer(lstat(path, &about), "%s", question);
}

/* Whether a device has a node of its own and of its group, and who has it. */
static void ask_device_of(const char *address, const char *what)
{
	const char *name;
	char path[300];
	struct dirent *entry;
	int found = 0, group;
	DIR *dir;

	ask_there(of(address, ""), what);
	name = target(of(address, "driver"));
	printf("%s: %s: driver: %s\n", section_name, what, name ? name : name_of(errno));
	show(of(address, "driver_override"), "override");
	dir = opendir(of(address, "vfio-dev"));
	while (dir && (entry = readdir(dir))) {
		if (strncmp(entry->d_name, "vfio", 4))
			continue;
		found++;
		snprintf(path, sizeof(path), "/dev/vfio/devices/%s", entry->d_name);
		ask_there(path, "its node");
		snprintf(path, sizeof(path), "/sys/class/vfio-dev/%s", entry->d_name);
		ask_there(path, "its class's link");
	}
	if (dir)
		closedir(dir);
	value(found, "%s: nodes", what);
	name = target(of(address, "iommu_group"));
	answer(name ? 0 : -1, "%s: group", what);
	if (!name)
		return;
	group = atoi(name);
	snprintf(path, sizeof(path), "/dev/vfio/%d", group);
	ask_there(path, "its group's node");
	snprintf(path, sizeof(path), "/sys/kernel/iommu_groups/%d/devices/%s", group, address);
	ask_there(path, "in its group");
	snprintf(path, sizeof(path), "/sys/bus/pci/drivers/vfio-pci/%s", address);
	ask_there(path, "its driver's link");
}

static void ask_numbers(void)
{
	static const char *const texts[] = { "", "\n", "x", "-1", "70000", "65535", "1000", "1x", " 1", "1 ", "1 \n", "1\n\n", "0x1", "01",
					     "0b1", "+1", "1", "1\n", "2", "0", "0\n" };
	char path[300], vf[64];
	int fd;

	snprintf(path, sizeof(path), "%s", of(card_address, "sriov_numvfs"));
	show(path, "at first");
	for (size_t i = 0; i < sizeof(texts) / sizeof(*texts); i++) {
		char question[64], *to = question;

		for (const char *from = texts[i]; *from; from++)
			to += sprintf(to, *from == '\n' ? "\\n" : "%c", *from);
		*to = 0;
		ask_put(path, texts[i], "write \"%s\"", question);
		show(path, "after that");
		if (strcmp(texts[i], "2"))
			put(path, "0", 1);
	}
	fd = (int)must(open(path, O_RDWR));
	answer(write(fd, "1", 1), "write 1");
	answer(lseek(fd, 0, SEEK_CUR), "position after that");
	answer(write(fd, "0", 1), "write 0 after that");
	answer(pwrite(fd, "1", 1, 7), "write 1 at 7");
	answer(lseek(fd, 0, SEEK_SET), "back to the start");
	answer(read(fd, vf, 1), "read a byte");
	answer(read(fd, vf, sizeof(vf)), "read the rest");
	answer(read(fd, vf, sizeof(vf)), "read after the end");
	answer(pread(fd, vf, sizeof(vf), 0), "read at the start");
	answer(pwrite(fd, "0", 1, 0), "write 0");
	close(fd);
}

static void ask_functions(void)
{
	char numvfs[300], vf[64] = "none", path[300];
	const char *name;

	snprintf(numvfs, sizeof(numvfs), "%s", of(card_address, "sriov_numvfs"));
	ask_device_of(card_address, "physical function");
	ask_there(of(card_address, "physfn"), "physfn of the physical function");
	ask_there(of(card_address, "virtfn0"), "virtfn0 of none");
	ask_put(numvfs, "2", "make two");
	show(numvfs, "how many");
	name = target(of(card_address, "virtfn0"));
	answer(name ? 0 : -1, "virtfn0");
	if (name)
		snprintf(vf, sizeof(vf), "%s", name);
	answer(target(of(card_address, "virtfn1")) ? 0 : -1, "virtfn1");
	answer(target(of(card_address, "virtfn2")) ? 0 : -1, "virtfn2");
	ask_device_of(vf, "virtual function");
	name = target(of(vf, "physfn"));
	answer(name && !strcmp(name, card_address) ? 0 : -1, "physfn leads back");
	ask_there(of(vf, "sriov_numvfs"), "sriov_numvfs of a virtual function");
	ask_there(of(vf, "sriov_totalvfs"), "sriov_totalvfs of a virtual function");
	snprintf(path, sizeof(path), "%s", of(card_address, "virtfn0/physfn/sriov_numvfs"));
	show(path, "by the virtual function");
	ask_put(path, "0", "write 0 by the virtual function");
	ask_device_of(vf, "virtual function that was taken away");
	ask_there(of(card_address, "virtfn0"), "virtfn0 after that");

	ask_put(of(card_address, "sriov_drivers_autoprobe"), "0", "autoprobe: write 0");
	show(of(card_address, "sriov_drivers_autoprobe"), "autoprobe");
	ask_put(of(card_address, "sriov_drivers_autoprobe"), "x", "autoprobe: write x");
	ask_put(of(card_address, "sriov_drivers_autoprobe"), "2", "autoprobe: write 2");
	ask_put(numvfs, "1", "make one");
	ask_device_of(vf, "virtual function without a driver");
	ask_put("/sys/bus/pci/drivers/vfio-pci/bind", vf, "bind it");
	ask_device_of(vf, "virtual function that was bound");
	ask_put("/sys/bus/pci/drivers/vfio-pci/unbind", vf, "unbind it");
	ask_put("/sys/bus/pci/drivers_probe", vf, "probe it");
	ask_device_of(vf, "virtual function that was probed");
	ask_put(numvfs, "0", "take it away");
	ask_put(of(card_address, "sriov_drivers_autoprobe"), "Y", "autoprobe: write Y");
	show(of(card_address, "sriov_drivers_autoprobe"), "autoprobe");
}

static void ask_override(void)
{
	static const char *const texts[] = { "", "\n", "a", "a\n", "a b", "a\nb", "\na", " a", "vfio-pci\n" };
	char path[300], *large = malloc(5000);

	snprintf(path, sizeof(path), "%s", of(card_address, "driver_override"));
	show(path, "at first");
	for (size_t i = 0; i < sizeof(texts) / sizeof(*texts); i++) {
		answer(put(path, texts[i], strlen(texts[i])), "write text %zu", i);
		show(path, "after that");
	}
	memset(large, 'a', 5000);
	answer(put(path, large, 4094), "write 4094 bytes");
	answer(put(path, large, 4095), "write 4095 bytes");
	answer(put(path, large, 4096), "write 4096 bytes");
	answer(put(path, large, 5000), "write 5000 bytes");
	ask_put(path, "vfio-pci", "write vfio-pci");
	free(large);
}

static void ask_drivers(void)
{
	static const char bind[] = "/sys/bus/pci/drivers/vfio-pci/bind", unbind[] = "/sys/bus/pci/drivers/vfio-pci/unbind";
	char numvfs[300], line[64];
	const char *name;

	snprintf(numvfs, sizeof(numvfs), "%s", of(card_address, "sriov_numvfs"));
	ask_put(bind, "", "bind nothing");
	ask_put(bind, "x", "bind x");
	ask_put(bind, card_address, "bind what is bound");
	ask_put(unbind, "", "unbind nothing");
	ask_put(unbind, "0000:77:00.0", "unbind what is not there");
	snprintf(line, sizeof(line), "%s ", card_address);
	ask_put(unbind, line, "unbind with a blank after it");
	snprintf(line, sizeof(line), "%s\n", card_address);
	ask_put(unbind, line, "unbind a line");
	ask_device_of(card_address, "without a driver");
	answer_fd(open(card_cdev, O_RDWR), "open its node");
	answer_fd(open(card_group, O_RDWR), "open its group");
	ask_put(unbind, card_address, "unbind again");
	show(numvfs, "how many without a driver");
	ask_put(numvfs, "1", "make one without a driver");
	ask_put(numvfs, "0", "make none without a driver");
	ask_put(of(card_address, "driver_override"), "\n", "no override");
	ask_put(bind, card_address, "bind without an override");
	ask_put("/sys/bus/pci/drivers_probe", card_address, "probe without an override");
	ask_put("/sys/bus/pci/drivers_probe", "x", "probe x");
	ask_put(of(card_address, "driver_override"), "nobody", "another override");
	ask_put(bind, card_address, "bind with another override");
	ask_put("/sys/bus/pci/drivers_probe", card_address, "probe with another override");
	ask_put(of(card_address, "driver_override"), "vfio-pci", "override");
	name = target(of(card_address, "driver"));
	answer(name ? 0 : -1, "driver before it is bound");
	ask_put(bind, card_address, "bind");
	ask_device_of(card_address, "bound again");
	ask_put(bind, line, "bind again");
	ask_put("/sys/bus/pci/drivers_probe", card_address, "probe what is bound");
	ask_put(of(card_address, "driver_override"), "\n", "no override while it is bound");
	name = target(of(card_address, "driver"));
	answer(name ? 0 : -1, "driver after that");
	ask_put(of(card_address, "driver_override"), "vfio-pci", "override");
	ask_put(of(card_address, "driver/unbind"), card_address, "unbind by the device's link");
	ask_put("/sys/bus/pci/drivers_probe", card_address, "probe");
	ask_device_of(card_address, "probed");

	ask_put(numvfs, "1", "make one");
	ask_put(unbind, card_address, "unbind the physical function");
	show(numvfs, "how many after that");
	ask_there(of(card_address, "virtfn0"), "virtfn0 after that");
	ask_put(bind, card_address, "bind the physical function");
}

static void ask_files(void)
{
	static const char *const names[] = { "vendor", "sriov_totalvfs", "sriov_numvfs", "driver_override", "driver/bind", "driver/unbind",
					     "sriov_drivers_autoprobe", "config", "class", "modalias", "" };
	struct stat about;
	char buffer[16];
	int fd, directory;

	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++) {
		answer(stat(of(card_address, names[i]), &about), "%s: stat", names[i]);
		value(about.st_mode, "%s: mode", names[i]);
		answer_fd(open(of(card_address, names[i]), O_RDONLY), "%s: open to read", names[i]);
		answer_fd(open(of(card_address, names[i]), O_WRONLY), "%s: open to write", names[i]);
		answer_fd(open(of(card_address, names[i]), O_RDWR | O_TRUNC), "%s: open to truncate", names[i]);
	}
	answer_fd(open(of(card_address, "new"), O_WRONLY | O_CREAT, 0600), "make a file");
	fd = (int)must(open(of(card_address, "sriov_numvfs"), O_RDWR));
	answer(ioctl(fd, VFIO_GET_API_VERSION), "ioctl");
	answer_mmap(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0), "mmap");
	answer(write(fd, nowhere, 1), "write from a bad address");
	answer(ftruncate(fd, 0), "truncate");
	answer(fsync(fd), "fsync");
	close(fd);
	fd = (int)must(open(of(card_address, "sriov_numvfs"), O_RDONLY));
	answer(write(fd, "0", 1), "write what is open to read");
	close(fd);
	fd = (int)must(open(of(card_address, "sriov_numvfs"), O_WRONLY));
	answer(read(fd, buffer, 1), "read what is open to write");
	close(fd);

	directory = (int)must(open(of(card_address, ""), O_RDONLY | O_DIRECTORY));
	fd = answer_fd(openat(directory, "sriov_numvfs", O_RDWR), "open below the directory");
	answer(write(fd, "1", 1), "write there");
	close(fd);
	ask_there(of(card_address, "virtfn0"), "virtfn0 after that");
	fd = answer_fd(openat(directory, "virtfn0/physfn/sriov_numvfs", O_WRONLY), "open by links below the directory");
	answer(write(fd, "0", 1), "write there");
	close(fd);
	close(directory);
	answer(chdir(of(card_address, "")), "go there");
	ask_put("sriov_numvfs", "1", "write in the directory");
	ask_there(of(card_address, "virtfn0"), "virtfn0 after that");
	answer(chdir("virtfn0"), "go to the virtual function");
	ask_put("physfn/sriov_numvfs", "0", "write by a link");
	ask_there(of(card_address, "virtfn0"), "virtfn0 after that");
}

/* What one process writes is so for all. */
static void ask_processes(void)
{
	char numvfs[300], vf[64] = "none";
	const char *name;
	int status;
	pid_t child;

	snprintf(numvfs, sizeof(numvfs), "%s", of(card_address, "sriov_numvfs"));
	child = fork();
	if (child == 0)
		_exit(put(numvfs, "1", 1) == 1 ? 0 : 1);
	waitpid(child, &status, 0);
	value(status, "a child writes 1");
	show(numvfs, "how many");
	name = target(of(card_address, "virtfn0"));
	if (name)
		snprintf(vf, sizeof(vf), "%s", name);
	ask_device_of(vf, "virtual function of a child");
	child = fork();
	if (child == 0) {
		execl("/bin/sh", "sh", "-c", "echo 0 >\"$1\"", "sh", numvfs, NULL);
		_exit(127);
	}
	waitpid(child, &status, 0);
	value(status, "a program writes 0");
	show(numvfs, "how many");
	ask_device_of(vf, "virtual function after that");
}

int main(int argc, char **argv)
{
	static const struct section sections[] = {
		{ "numbers", ask_numbers },
		{ "functions", ask_functions },
		{ "override", ask_override },
		{ "drivers", ask_drivers },
		{ "files", ask_files },
		{ "processes", ask_processes },
		{ NULL, NULL },
	};

	return run_card(sections, argc, argv);
}
