// SPDX-License-Identifier: GPL-2.0
/*
 * Laboratory module: the legal ways in which a running kernel patches its own text.
 *
 *   insmod probes.ko; cd /sys/module/probes/parameters
 *   echo jump > add      set one probe: int3, jump, ftrace or return
 *   echo all > remove    take all probes away
 *   cat hits             how often a probe was hit
 *   echo 1 > key         flip the module's static keys
 *   echo 1 > call        point its static call elsewhere
 *   cat answer           run the sites: 0, or 0x1f with both flipped
 *
 * A probe with a post handler stays a breakpoint; without, the kernel replaces it by a jump
 * when the code allows (arch/x86/kernel/kprobes/opt.c); at a function's entry it becomes an
 * ftrace call. /sys/kernel/debug/kprobes/list says which form each one has.
 */
#include <linux/atomic.h>
#include <linux/jump_label.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/string.h>
#include <linux/static_call.h>

/* Behind the 5 bytes of the ftrace site at a function's entry: an instruction boundary. */
#define BEHIND_ENTRY 5

static atomic_t count = ATOMIC_INIT(0);

static int before(struct kprobe *probe, struct pt_regs *regs)
{
	atomic_inc(&count);
	return 0;
}
NOKPROBE_SYMBOL(before);

static void after(struct kprobe *probe, struct pt_regs *regs, unsigned long flags)
{
}
NOKPROBE_SYMBOL(after);

static int returned(struct kretprobe_instance *instance, struct pt_regs *regs)
{
	atomic_inc(&count);
	return 0;
}
NOKPROBE_SYMBOL(returned);

static struct kprobe int3_probe, jump_probe, ftrace_probe;
static struct kretprobe return_probe;

static const struct {
	const char *kind;
	const char *symbol;
	unsigned int offset;
	kprobe_post_handler_t after;
	struct kprobe *probe;
} kinds[] = {
	{ "int3", "vfs_getattr", BEHIND_ENTRY, after, &int3_probe },
	{ "jump", "vfs_statx", BEHIND_ENTRY, NULL, &jump_probe },
	{ "ftrace", "vfs_open", 0, NULL, &ftrace_probe },
	{ "return", "vfs_read", 0, NULL, &return_probe.kp },
};

static bool present[ARRAY_SIZE(kinds)];
static DEFINE_MUTEX(change);

static int add_probe(unsigned int i)
{
	struct kprobe *probe = kinds[i].probe;

	if (present[i])
		return -EEXIST;
	/* What an earlier registration left behind must not be there. */
	if (probe == &return_probe.kp) {
		return_probe = (struct kretprobe){ .handler = returned };
		probe->symbol_name = kinds[i].symbol;
		return register_kretprobe(&return_probe);
	}
	*probe = (struct kprobe){
		.symbol_name = kinds[i].symbol,
		.offset = kinds[i].offset,
		.pre_handler = before,
		.post_handler = kinds[i].after,
	};
	return register_kprobe(probe);
}

static void remove_probes(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(kinds); i++) {
		if (!present[i])
			continue;
		if (kinds[i].probe == &return_probe.kp)
			unregister_kretprobe(&return_probe);
		else
			unregister_kprobe(kinds[i].probe);
		present[i] = false;
	}
}

static int add_set(const char *text, const struct kernel_param *param)
{
	unsigned int i;
	int error = -EINVAL;

	mutex_lock(&change);
	for (i = 0; i < ARRAY_SIZE(kinds); i++) {
		if (!sysfs_streq(text, kinds[i].kind))
			continue;
		error = add_probe(i);
		present[i] |= !error;
	}
	mutex_unlock(&change);
	return error;
}

static const struct kernel_param_ops add_ops = { .set = add_set };
module_param_cb(add, &add_ops, NULL, 0200);
MODULE_PARM_DESC(add, "sets a probe: int3, jump, ftrace or return");

static int remove_set(const char *text, const struct kernel_param *param)
{
	mutex_lock(&change);
	remove_probes();
	mutex_unlock(&change);
	return 0;
}

static const struct kernel_param_ops remove_ops = { .set = remove_set };
module_param_cb(remove, &remove_ops, NULL, 0200);
MODULE_PARM_DESC(remove, "takes all probes away");

static int hits_get(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%d\n", atomic_read(&count));
}

static const struct kernel_param_ops hits_ops = { .get = hits_get };
module_param_cb(hits, &hits_ops, NULL, 0400);
MODULE_PARM_DESC(hits, "result: how often a probe was hit");

/* Sites of both kinds and both polarities, and a static call with a call and a tail call. */
static DEFINE_STATIC_KEY_FALSE(key_off);
static DEFINE_STATIC_KEY_TRUE(key_on);

static noinline unsigned int first(void)
{
	return 0;
}

static noinline unsigned int second(void)
{
	return 0x10;
}

DEFINE_STATIC_CALL(probes_call, first);

static noinline unsigned int sites(void)
{
	unsigned int answer = 0;

	if (static_branch_unlikely(&key_off))
		answer |= 1;
	if (static_branch_likely(&key_off))
		answer |= 2;
	if (!static_branch_unlikely(&key_on))
		answer |= 4;
	if (!static_branch_likely(&key_on))
		answer |= 8;
	return answer | static_call(probes_call)();
}

static noinline unsigned int tail(void)
{
	return static_call(probes_call)();
}

static int answer_get(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%#x\n", sites() | tail());
}

static const struct kernel_param_ops answer_ops = { .get = answer_get };
module_param_cb(answer, &answer_ops, NULL, 0400);
MODULE_PARM_DESC(answer, "result: what the sites compute");

static int key_set(const char *text, const struct kernel_param *param)
{
	bool flip;
	int error = kstrtobool(text, &flip);

	if (error)
		return error;
	if (flip) {
		static_branch_enable(&key_off);
		static_branch_disable(&key_on);
	} else {
		static_branch_disable(&key_off);
		static_branch_enable(&key_on);
	}
	return 0;
}

static const struct kernel_param_ops key_ops = { .set = key_set };
module_param_cb(key, &key_ops, NULL, 0200);
MODULE_PARM_DESC(key, "1 flips the static keys, 0 puts them back");

static int call_set(const char *text, const struct kernel_param *param)
{
	bool flip;
	int error = kstrtobool(text, &flip);

	if (error)
		return error;
	if (flip)
		static_call_update(probes_call, second);
	else
		static_call_update(probes_call, first);
	return 0;
}

static const struct kernel_param_ops call_ops = { .set = call_set };
module_param_cb(call, &call_ops, NULL, 0200);
MODULE_PARM_DESC(call, "1 points the static call elsewhere, 0 points it back");

static int __init probes_init(void)
{
	return 0;
}

static void __exit probes_exit(void)
{
	remove_probes();
}

module_init(probes_init);
module_exit(probes_exit);
MODULE_DESCRIPTION("pyscan laboratory: kprobes of every kind, static keys and a static call");
MODULE_LICENSE("GPL");
