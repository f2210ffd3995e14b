/*
 * Every command of /dev/iommu, alone, in a context that has one object of every kind: each size of its argument, and
 * each of its fields with values that a caller can get wrong. Each question is asked in a context of its own.
 */
#include "world.h"

enum kind { ID, FLAGS, NUMBER, RESERVED, POINTER, LENGTH, IOVA, FILE_FD, OUT };

struct field {
	const char *name;
	enum kind kind;
	size_t offset, size;
};

#define F(type, member, kind) { #member, kind, offsetof(struct type, member), sizeof(((struct type *)0)->member) }

struct command {
	const char *name;
	unsigned int number;
	size_t size;
	unsigned int without;
	void (*fill)(struct world *w, void *cmd);
	struct field fields[12];
};

static void fill_destroy(struct world *w, void *p)
{
	struct iommu_destroy *cmd = p;

	cmd->id = w->ioas2;
}

static void fill_nothing(struct world *w, void *p)
{
	(void)w;
	(void)p;
}

static void fill_allow(struct world *w, void *p)
{
	struct iommu_ioas_allow_iovas *cmd = p;
	struct iommu_iova_range *range = (void *)(w->buffer + PAGES * PAGE - sizeof(*range));

	range->start = BASE;
	range->last = MOCK_APERTURE_LAST;
	cmd->ioas_id = w->ioas;
	cmd->num_iovas = 1;
	cmd->allowed_iovas = (uintptr_t)range;
}

static void fill_ranges(struct world *w, void *p)
{
	struct iommu_ioas_iova_ranges *cmd = p;

	cmd->ioas_id = w->ioas;
	cmd->num_iovas = 1;
	cmd->allowed_iovas = (uintptr_t)(w->buffer + PAGES * PAGE - sizeof(struct iommu_iova_range));
}

static void fill_map(struct world *w, void *p)
{
	struct iommu_ioas_map *cmd = p;

	cmd->flags = FIXED;
	cmd->ioas_id = w->ioas;
	cmd->user_va = (uintptr_t)w->buffer;
	cmd->length = PAGE;
	cmd->iova = BASE + 1024 * PAGE;
}

static void fill_map_file(struct world *w, void *p)
{
	struct iommu_ioas_map_file *cmd = p;

	cmd->flags = FIXED;
	cmd->ioas_id = w->ioas;
	cmd->fd = w->file;
	cmd->start = PAGE;
	cmd->length = PAGE;
	cmd->iova = BASE + 1024 * PAGE;
}

static void fill_copy(struct world *w, void *p)
{
	struct iommu_ioas_copy *cmd = p;

	cmd->flags = FIXED;
	cmd->dst_ioas_id = w->ioas2;
	cmd->src_ioas_id = w->ioas;
	cmd->length = PAGE;
	cmd->dst_iova = BASE;
	cmd->src_iova = BASE + PAGE;
}

static void fill_unmap(struct world *w, void *p)
{
	struct iommu_ioas_unmap *cmd = p;

	cmd->ioas_id = w->ioas;
	cmd->iova = BASE;
	cmd->length = PAGES * PAGE;
}

static void fill_option(struct world *w, void *p)
{
	struct iommu_option *cmd = p;

	cmd->option_id = IOMMU_OPTION_HUGE_PAGES;
	cmd->op = IOMMU_OPTION_OP_GET;
	cmd->object_id = w->ioas;
}

static void fill_vfio_ioas(struct world *w, void *p)
{
	struct iommu_vfio_ioas *cmd = p;

	cmd->ioas_id = w->ioas;
	cmd->op = IOMMU_VFIO_IOAS_SET;
}

static void fill_hwpt_alloc(struct world *w, void *p)
{
	struct iommu_hwpt_alloc *cmd = p;

	cmd->dev_id = w->idev;
	cmd->pt_id = w->ioas;
}

static void fill_nested_alloc(struct world *w, void *p)
{
	struct iommu_hwpt_alloc *cmd = p;
	struct iommu_hwpt_selftest *data = (void *)(w->buffer + PAGES * PAGE - sizeof(*data));

	data->iotlb = 7;
	cmd->dev_id = w->idev;
	cmd->pt_id = w->parent;
	cmd->data_type = IOMMU_HWPT_DATA_SELFTEST;
	cmd->data_len = sizeof(*data);
	cmd->data_uptr = (uintptr_t)data;
}

static void fill_hw_info(struct world *w, void *p)
{
	struct iommu_hw_info *cmd = p;

	cmd->dev_id = w->idev;
	cmd->data_len = sizeof(struct iommu_test_hw_info);
	cmd->data_uptr = (uintptr_t)(w->buffer + PAGES * PAGE - sizeof(struct iommu_test_hw_info));
}

static void fill_set_dirty(struct world *w, void *p)
{
	struct iommu_hwpt_set_dirty_tracking *cmd = p;

	cmd->flags = IOMMU_HWPT_DIRTY_TRACKING_ENABLE;
	cmd->hwpt_id = w->dirty;
}

static void fill_get_dirty(struct world *w, void *p)
{
	struct iommu_hwpt_get_dirty_bitmap *cmd = p;
	struct iommu_hwpt_set_dirty_tracking enable = { .size = sizeof(enable), .hwpt_id = w->dirty,
							.flags = IOMMU_HWPT_DIRTY_TRACKING_ENABLE };

	must(ioctl(w->fd, IOMMU_HWPT_SET_DIRTY_TRACKING, &enable));
	cmd->hwpt_id = w->dirty;
	cmd->iova = BASE;
	cmd->length = PAGES * PAGE;
	cmd->page_size = PAGE;
	cmd->data = (uintptr_t)(w->buffer + PAGES * PAGE - PAGES / 8);
}

static void fill_invalidate(struct world *w, void *p)
{
	struct iommu_hwpt_invalidate *cmd = p;
	struct iommu_hwpt_invalidate_selftest *entries = (void *)(w->buffer + PAGES * PAGE - 2 * sizeof(*entries));

	cmd->hwpt_id = w->nested;
	cmd->data_uptr = (uintptr_t)entries;
	cmd->data_type = IOMMU_HWPT_INVALIDATE_DATA_SELFTEST;
	cmd->entry_len = sizeof(*entries);
	cmd->entry_num = 2;
}

static void fill_viommu(struct world *w, void *p)
{
	struct iommu_viommu_alloc *cmd = p;
	struct iommu_viommu_selftest *data = (void *)(w->buffer + PAGES * PAGE - sizeof(*data));

	cmd->type = IOMMU_VIOMMU_TYPE_SELFTEST;
	cmd->dev_id = w->idev;
	cmd->hwpt_id = w->parent;
	cmd->data_len = sizeof(*data);
	cmd->data_uptr = (uintptr_t)data;
}

static void fill_vdevice(struct world *w, void *p)
{
	struct iommu_vdevice_alloc *cmd = p;

	cmd->viommu_id = w->viommu;
	cmd->dev_id = w->idev2;
	cmd->virt_id = 0x88;
}

static void fill_veventq(struct world *w, void *p)
{
	struct iommu_veventq_alloc *cmd = p;

	cmd->viommu_id = w->viommu;
	cmd->type = IOMMU_VEVENTQ_TYPE_SELFTEST;
	cmd->veventq_depth = 2;
}

static void fill_queue(struct world *w, void *p)
{
	struct iommu_hw_queue_alloc *cmd = p;

	cmd->viommu_id = w->viommu;
	cmd->type = IOMMU_HW_QUEUE_TYPE_SELFTEST;
	cmd->index = 1;
	cmd->nesting_parent_iova = BASE + 2 * PAGE;
	cmd->length = PAGE;
}

static void fill_get_pa(struct world *w, void *p)
{
	struct iommu_ioas_noiommu_get_pa *cmd = p;

	cmd->ioas_id = w->ioas;
	cmd->iova = BASE;
}

static const struct command commands[] = {
	{ "DESTROY", IOMMU_DESTROY, sizeof(struct iommu_destroy), 0, fill_destroy, { F(iommu_destroy, id, ID) } },
	{ "IOAS_ALLOC", IOMMU_IOAS_ALLOC, sizeof(struct iommu_ioas_alloc), 0, fill_nothing,
	  { F(iommu_ioas_alloc, flags, FLAGS), F(iommu_ioas_alloc, out_ioas_id, OUT) } },
	{ "IOAS_ALLOW_IOVAS", IOMMU_IOAS_ALLOW_IOVAS, sizeof(struct iommu_ioas_allow_iovas), 0, fill_allow,
	  { F(iommu_ioas_allow_iovas, ioas_id, ID), F(iommu_ioas_allow_iovas, num_iovas, NUMBER),
	    F(iommu_ioas_allow_iovas, __reserved, RESERVED), F(iommu_ioas_allow_iovas, allowed_iovas, POINTER) } },
	{ "IOAS_IOVA_RANGES", IOMMU_IOAS_IOVA_RANGES, sizeof(struct iommu_ioas_iova_ranges), 0, fill_ranges,
	  { F(iommu_ioas_iova_ranges, ioas_id, ID), F(iommu_ioas_iova_ranges, num_iovas, NUMBER),
	    F(iommu_ioas_iova_ranges, __reserved, RESERVED), F(iommu_ioas_iova_ranges, allowed_iovas, POINTER),
	    F(iommu_ioas_iova_ranges, out_iova_alignment, OUT) } },
	{ "IOAS_MAP", IOMMU_IOAS_MAP, sizeof(struct iommu_ioas_map), 0, fill_map,
	  { F(iommu_ioas_map, flags, FLAGS), F(iommu_ioas_map, ioas_id, ID), F(iommu_ioas_map, __reserved, RESERVED),
	    F(iommu_ioas_map, user_va, POINTER), F(iommu_ioas_map, length, LENGTH), F(iommu_ioas_map, iova, IOVA) } },
	{ "IOAS_MAP_FILE", IOMMU_IOAS_MAP_FILE, sizeof(struct iommu_ioas_map_file), 0, fill_map_file,
	  { F(iommu_ioas_map_file, flags, FLAGS), F(iommu_ioas_map_file, ioas_id, ID),
	    F(iommu_ioas_map_file, fd, FILE_FD), F(iommu_ioas_map_file, start, LENGTH),
	    F(iommu_ioas_map_file, length, LENGTH), F(iommu_ioas_map_file, iova, IOVA) } },
	{ "IOAS_COPY", IOMMU_IOAS_COPY, sizeof(struct iommu_ioas_copy), 0, fill_copy,
	  { F(iommu_ioas_copy, flags, FLAGS), F(iommu_ioas_copy, dst_ioas_id, ID), F(iommu_ioas_copy, src_ioas_id, ID),
	    F(iommu_ioas_copy, length, LENGTH), F(iommu_ioas_copy, dst_iova, IOVA), F(iommu_ioas_copy, src_iova, IOVA) } },
	{ "IOAS_UNMAP", IOMMU_IOAS_UNMAP, sizeof(struct iommu_ioas_unmap), WITHOUT_QUEUE, fill_unmap,
	  { F(iommu_ioas_unmap, ioas_id, ID), F(iommu_ioas_unmap, iova, IOVA), F(iommu_ioas_unmap, length, LENGTH) } },
	{ "OPTION", IOMMU_OPTION, sizeof(struct iommu_option), 0, fill_option,
	  { F(iommu_option, option_id, NUMBER), F(iommu_option, op, NUMBER), F(iommu_option, __reserved, RESERVED),
	    F(iommu_option, object_id, ID), F(iommu_option, val64, OUT) } },
	{ "VFIO_IOAS", IOMMU_VFIO_IOAS, sizeof(struct iommu_vfio_ioas), 0, fill_vfio_ioas,
	  { F(iommu_vfio_ioas, ioas_id, ID), F(iommu_vfio_ioas, op, NUMBER), F(iommu_vfio_ioas, __reserved, RESERVED) } },
	{ "HWPT_ALLOC", IOMMU_HWPT_ALLOC, sizeof(struct iommu_hwpt_alloc), 0, fill_hwpt_alloc,
	  { F(iommu_hwpt_alloc, flags, FLAGS), F(iommu_hwpt_alloc, dev_id, ID), F(iommu_hwpt_alloc, pt_id, ID),
	    F(iommu_hwpt_alloc, out_hwpt_id, OUT), F(iommu_hwpt_alloc, __reserved, RESERVED),
	    F(iommu_hwpt_alloc, data_type, NUMBER), F(iommu_hwpt_alloc, data_len, NUMBER),
	    F(iommu_hwpt_alloc, data_uptr, POINTER), F(iommu_hwpt_alloc, fault_id, ID),
	    F(iommu_hwpt_alloc, __reserved2, RESERVED) } },
	{ "HWPT_ALLOC nested", IOMMU_HWPT_ALLOC, sizeof(struct iommu_hwpt_alloc), 0, fill_nested_alloc,
	  { F(iommu_hwpt_alloc, flags, FLAGS), F(iommu_hwpt_alloc, dev_id, ID), F(iommu_hwpt_alloc, pt_id, ID),
	    F(iommu_hwpt_alloc, out_hwpt_id, OUT), F(iommu_hwpt_alloc, data_type, NUMBER),
	    F(iommu_hwpt_alloc, data_len, NUMBER), F(iommu_hwpt_alloc, data_uptr, POINTER),
	    F(iommu_hwpt_alloc, fault_id, ID) } },
	{ "GET_HW_INFO", IOMMU_GET_HW_INFO, sizeof(struct iommu_hw_info), 0, fill_hw_info,
	  { F(iommu_hw_info, flags, FLAGS), F(iommu_hw_info, dev_id, ID), F(iommu_hw_info, data_len, NUMBER),
	    F(iommu_hw_info, data_uptr, POINTER), F(iommu_hw_info, out_data_type, NUMBER),
	    F(iommu_hw_info, out_max_pasid_log2, NUMBER), F(iommu_hw_info, __reserved, RESERVED),
	    F(iommu_hw_info, out_capabilities, OUT) } },
	{ "HWPT_SET_DIRTY_TRACKING", IOMMU_HWPT_SET_DIRTY_TRACKING, sizeof(struct iommu_hwpt_set_dirty_tracking), 0,
	  fill_set_dirty,
	  { F(iommu_hwpt_set_dirty_tracking, flags, FLAGS), F(iommu_hwpt_set_dirty_tracking, hwpt_id, ID),
	    F(iommu_hwpt_set_dirty_tracking, __reserved, RESERVED) } },
	{ "HWPT_GET_DIRTY_BITMAP", IOMMU_HWPT_GET_DIRTY_BITMAP, sizeof(struct iommu_hwpt_get_dirty_bitmap), 0,
	  fill_get_dirty,
	  { F(iommu_hwpt_get_dirty_bitmap, hwpt_id, ID), F(iommu_hwpt_get_dirty_bitmap, flags, FLAGS),
	    F(iommu_hwpt_get_dirty_bitmap, __reserved, RESERVED), F(iommu_hwpt_get_dirty_bitmap, iova, IOVA),
	    F(iommu_hwpt_get_dirty_bitmap, length, LENGTH), F(iommu_hwpt_get_dirty_bitmap, page_size, LENGTH),
	    F(iommu_hwpt_get_dirty_bitmap, data, POINTER) } },
	{ "HWPT_INVALIDATE", IOMMU_HWPT_INVALIDATE, sizeof(struct iommu_hwpt_invalidate), 0, fill_invalidate,
	  { F(iommu_hwpt_invalidate, hwpt_id, ID), F(iommu_hwpt_invalidate, data_uptr, POINTER),
	    F(iommu_hwpt_invalidate, data_type, NUMBER), F(iommu_hwpt_invalidate, entry_len, NUMBER),
	    F(iommu_hwpt_invalidate, entry_num, NUMBER), F(iommu_hwpt_invalidate, __reserved, RESERVED) } },
	{ "FAULT_QUEUE_ALLOC", IOMMU_FAULT_QUEUE_ALLOC, sizeof(struct iommu_fault_alloc), 0, fill_nothing,
	  { F(iommu_fault_alloc, flags, FLAGS), F(iommu_fault_alloc, out_fault_id, OUT) } },
	{ "VIOMMU_ALLOC", IOMMU_VIOMMU_ALLOC, sizeof(struct iommu_viommu_alloc), 0, fill_viommu,
	  { F(iommu_viommu_alloc, flags, FLAGS), F(iommu_viommu_alloc, type, NUMBER), F(iommu_viommu_alloc, dev_id, ID),
	    F(iommu_viommu_alloc, hwpt_id, ID), F(iommu_viommu_alloc, out_viommu_id, OUT),
	    F(iommu_viommu_alloc, data_len, NUMBER), F(iommu_viommu_alloc, __reserved, RESERVED),
	    F(iommu_viommu_alloc, data_uptr, POINTER) } },
	{ "VDEVICE_ALLOC", IOMMU_VDEVICE_ALLOC, sizeof(struct iommu_vdevice_alloc), 0, fill_vdevice,
	  { F(iommu_vdevice_alloc, viommu_id, ID), F(iommu_vdevice_alloc, dev_id, ID),
	    F(iommu_vdevice_alloc, out_vdevice_id, OUT), F(iommu_vdevice_alloc, virt_id, NUMBER) } },
	{ "IOAS_CHANGE_PROCESS", IOMMU_IOAS_CHANGE_PROCESS, sizeof(struct iommu_ioas_change_process), 0, fill_nothing,
	  { F(iommu_ioas_change_process, __reserved, RESERVED) } },
	{ "VEVENTQ_ALLOC", IOMMU_VEVENTQ_ALLOC, sizeof(struct iommu_veventq_alloc), WITHOUT_VEVENTQ, fill_veventq,
	  { F(iommu_veventq_alloc, flags, FLAGS), F(iommu_veventq_alloc, viommu_id, ID), F(iommu_veventq_alloc, type, NUMBER),
	    F(iommu_veventq_alloc, veventq_depth, NUMBER), F(iommu_veventq_alloc, out_veventq_id, OUT),
	    F(iommu_veventq_alloc, __reserved, RESERVED) } },
	{ "HW_QUEUE_ALLOC", IOMMU_HW_QUEUE_ALLOC, sizeof(struct iommu_hw_queue_alloc), 0, fill_queue,
	  { F(iommu_hw_queue_alloc, flags, FLAGS), F(iommu_hw_queue_alloc, viommu_id, ID), F(iommu_hw_queue_alloc, type, NUMBER),
	    F(iommu_hw_queue_alloc, index, NUMBER), F(iommu_hw_queue_alloc, out_hw_queue_id, OUT),
	    F(iommu_hw_queue_alloc, nesting_parent_iova, IOVA), F(iommu_hw_queue_alloc, length, LENGTH) } },
	{ "IOAS_NOIOMMU_GET_PA", IOMMU_IOAS_NOIOMMU_GET_PA, sizeof(struct iommu_ioas_noiommu_get_pa), 0, fill_get_pa,
	  { F(iommu_ioas_noiommu_get_pa, flags, FLAGS), F(iommu_ioas_noiommu_get_pa, ioas_id, ID),
	    F(iommu_ioas_noiommu_get_pa, __reserved, RESERVED), F(iommu_ioas_noiommu_get_pa, iova, IOVA),
	    F(iommu_ioas_noiommu_get_pa, length, OUT), F(iommu_ioas_noiommu_get_pa, out_phys, OUT) } },
	{ 0 },
};

static const struct command *command;

static uint64_t get(const char *cmd, const struct field *field)
{
	uint64_t number = 0;

	memcpy(&number, cmd + field->offset, field->size);
	return number;
}

/* A command in a context of its own, ready to be spoilt. */
struct attempt {
	struct world w;
	/* The argument ends where a page ends that nothing follows, unless it has a tail. */
	char *area, *cmd;
	size_t room;
};

static void begin(struct attempt *a, size_t tail)
{
	world_make(&a->w, command->without);
	a->room = 3 * PAGE;
	a->area = pages(a->room);
	a->cmd = a->area + a->room - command->size - tail;
	*(uint32_t *)a->cmd = (uint32_t)(command->size + tail);
	command->fill(&a->w, a->cmd);
}

static void end(struct attempt *a)
{
	world_end(&a->w);
	munmap(a->area, a->room);
}

/*
 * Makes the call, and prints the answer and the numbers that it changed in the argument; new identifiers and chosen
 * addresses are only said to be there.
 */
static void ask(struct attempt *a, unsigned int number, const char *question)
{
	char before[128];
	int result;

	memcpy(before, a->cmd, command->size);
	result = ioctl(a->w.fd, number, a->cmd);
	printf("%s: %s: %s", section_name, question, result == -1 ? name_of(errno) : result ? "not zero" : "OK");
	for (const struct field *field = command->fields; field->name; field++) {
		uint64_t old = get(before, field), new = get(a->cmd, field);

		if (old == new)
			continue;
		if (field->kind == IOVA || (field->kind == OUT && strstr(field->name, "_id")))
			printf(" %s", field->name);
		else
			printf(" %s=0x%llx", field->name, (unsigned long long)new);
	}
	printf("\n");
}

static void ask_sizes(void)
{
	struct attempt a;
	char question[80];

	for (size_t size = 0; size <= command->size; size += 4) {
		begin(&a, 0);
		*(uint32_t *)a.cmd = (uint32_t)size;
		snprintf(question, sizeof(question), "size %zu%s", size, size == command->size ? " (all)" : "");
		ask(&a, command->number, question);
		end(&a);
	}
	begin(&a, 0);
	*(uint32_t *)a.cmd = (uint32_t)command->size + 1;
	ask(&a, command->number, "size with a tail that is not mapped");
	end(&a);
	static const size_t tails[] = { 1, 8, PAGE, PAGE + 8 };
	for (size_t i = 0; i < sizeof(tails) / sizeof(*tails); i++) {
		begin(&a, tails[i]);
		snprintf(question, sizeof(question), "size with a tail of %zu zero bytes", tails[i]);
		ask(&a, command->number, question);
		end(&a);
	}
	begin(&a, 8);
	a.cmd[command->size + 7] = 1;
	ask(&a, command->number, "size with a tail that is not zero");
	end(&a);
	begin(&a, 0);
	*(uint32_t *)a.cmd = 0xffffffff;
	ask(&a, command->number, "size ffffffff");
	end(&a);
	begin(&a, 0);
	answer(ioctl(a.w.fd, command->number, NULL), "null pointer");
	answer(ioctl(a.w.fd, command->number, (void *)(a.area + a.room - 2)), "pointer to half a size");
	ask(&a, command->number | (command->size << 16), "number with a size");
	ask(&a, command->number | (3u << 30), "number with a direction");
	end(&a);
}

static void ask_field(const struct field *field, const char *what, uint64_t number)
{
	struct attempt a;
	char question[80];

	begin(&a, 0);
	memcpy(a.cmd + field->offset, &number, field->size);
	snprintf(question, sizeof(question), "%s %s", field->name, what);
	ask(&a, command->number, question);
	end(&a);
}

static void ask_id(const struct field *field)
{
	static const struct {
		const char *name;
		size_t offset;
	} objects[] = {
		{ "0", 0 },
		{ "ioas", offsetof(struct world, ioas) },
		{ "stdev", offsetof(struct world, stdev) },
		{ "device", offsetof(struct world, idev) },
		{ "second device", offsetof(struct world, idev2) },
		{ "automatic hwpt", offsetof(struct world, hwpt) },
		{ "parent hwpt", offsetof(struct world, parent) },
		{ "dirty hwpt", offsetof(struct world, dirty) },
		{ "nested hwpt", offsetof(struct world, nested) },
		{ "fault", offsetof(struct world, fault) },
		{ "viommu", offsetof(struct world, viommu) },
		{ "vdevice", offsetof(struct world, vdevice) },
		{ "veventq", offsetof(struct world, veventq) },
		{ "hw_queue", offsetof(struct world, queue) },
		{ "destroyed", offsetof(struct world, destroyed) },
	};

	for (size_t i = 0; i < sizeof(objects) / sizeof(*objects); i++) {
		struct attempt a;
		char question[80];
		uint32_t id;

		begin(&a, 0);
		id = objects[i].offset ? *(uint32_t *)((char *)&a.w + objects[i].offset) : 0;
		if (id || !objects[i].offset) {
			memcpy(a.cmd + field->offset, &id, 4);
			snprintf(question, sizeof(question), "%s: %s", field->name, objects[i].name);
			ask(&a, command->number, question);
		}
		end(&a);
	}
	ask_field(field, "ffffffff", 0xffffffff);
	ask_field(field, "80000000", 0x80000000);
}

static void ask_file(const struct field *field)
{
	static const char *const names[] = { "closed", "the context itself", "/dev/null", "a file of /proc", "pipe" };

	for (int i = 0; i < 5; i++) {
		struct attempt a;
		char question[80];
		int file[2];

		begin(&a, 0);
		must(pipe(file));
		if (i == 1)
			file[0] = a.w.fd;
		else if (i == 2)
			file[0] = (int)must(open("/dev/null", O_RDWR));
		else if (i == 3)
			file[0] = (int)must(open("/proc/version", O_RDONLY));
		else if (i == 0)
			must(close(file[0]));
		memcpy(a.cmd + field->offset, file, 4);
		snprintf(question, sizeof(question), "%s: %s", field->name, names[i]);
		ask(&a, command->number, question);
		close(file[1]);
		if (i > 1)
			close(file[0]);
		end(&a);
	}
}

static void ask_all(void)
{
	static const uint64_t numbers[] = { 0, 1, 2, 3, 4, 7, 8, 9, 16, 0x1000, 0xffff, 0x7fffffff, 0xffffffff };
	static const uint64_t lengths[] = { 0, 1, 0x7ff, 0x800, 0xfff, 0x1000, 0x1001, 0x2000, 0x40000, 0x41000, 1ull << 32,
					    1ull << 63, -0x1000ull, -1ull };
	static const uint64_t pointers[] = { 0, 1, 0x1000, 0x7ffffffff000, 0x8000000000000000, -0x1000ull, -1ull };
	static const uint64_t iovas[] = { 0, 1, 0x1000, BASE - PAGE, BASE, BASE + 1, BASE + 0x800, BASE + PAGE,
					  BASE + (PAGES - 1) * PAGE, BASE + PAGES * PAGE, MOCK_APERTURE_LAST + 1ull - PAGE,
					  MOCK_APERTURE_LAST + 1ull, 1ull << 63, -0x1000ull, -1ull };
	char what[32];

	ask_sizes();
	for (const struct field *field = command->fields; field->name; field++) {
		const uint64_t *list = NULL;
		size_t count = 0;

		switch (field->kind) {
		case ID:
			ask_id(field);
			break;
		case FLAGS:
			ask_field(field, "0", 0);
			for (int bit = 0; bit < 6; bit++) {
				snprintf(what, sizeof(what), "bit %d", bit);
				ask_field(field, what, 1u << bit);
			}
			ask_field(field, "bit 31", 1u << 31);
			ask_field(field, "all", 0xffffffff);
			break;
		case RESERVED:
			ask_field(field, "1", 1);
			ask_field(field, "ffffffff", 0xffffffff);
			break;
		case FILE_FD:
			ask_field(field, "-1", -1ull);
			ask_file(field);
			break;
		case NUMBER:
			list = numbers, count = sizeof(numbers) / sizeof(*numbers);
			break;
		case LENGTH:
			list = lengths, count = sizeof(lengths) / sizeof(*lengths);
			break;
		case POINTER:
			list = pointers, count = sizeof(pointers) / sizeof(*pointers);
			break;
		case IOVA:
			list = iovas, count = sizeof(iovas) / sizeof(*iovas);
			break;
		case OUT:
			break;
		}
		for (size_t i = 0; i < count; i++) {
			if (field->size < 8 && list[i] >> (8 * field->size))
				continue;
			/* Whether several pages lie one after another in physical memory is chance. */
			if (command->number == IOMMU_HW_QUEUE_ALLOC &&
			    (list[i] == 0x1001 || list[i] == 0x2000 || list[i] == BASE + 1 || list[i] == BASE + 0x800))
				continue;
			snprintf(what, sizeof(what), "%llx", (unsigned long long)list[i]);
			ask_field(field, what, list[i]);
		}
	}
}

/* Which numbers exist at all. */
static void ask_numbers(void)
{
	int fd = open_iommu();

	for (unsigned int nr = 0; nr < 256; nr++) {
		int result = ioctl(fd, _IO(IOMMUFD_TYPE, nr), NULL);

		if (result != -1 || errno != ENOTTY)
			answer(result, "number %02x", nr);
	}
	answer(ioctl(fd, _IO('<', 0x81), NULL), "number 81 of another type");
	answer(ioctl(fd, 0, NULL), "number 0");
	answer(ioctl(fd, FIONREAD, NULL), "FIONREAD");
	answer(ioctl(fd, FIOCLEX, NULL), "FIOCLEX");
	answer(ioctl(fd, TIOCGWINSZ, NULL), "TIOCGWINSZ");
}

static void ask_command(void)
{
	for (command = commands; strcmp(command->name, section_name); command++)
		;
	ask_all();
}

int main(int argc, char **argv)
{
	struct section sections[sizeof(commands) / sizeof(*commands) + 1] = { { "numbers", ask_numbers } };

	for (size_t i = 0; commands[i].name; i++)
		sections[i + 1] = (struct section){ commands[i].name, ask_command };
	return run(sections, argc, argv);
}
