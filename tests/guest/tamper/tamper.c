// SPDX-License-Identifier: GPL-2.0
/*
 * Laboratory attacker: changes one byte, or one 8-byte word, of the running kernel.
 *
 * The kernel's own mapping of its text and rodata is read-only, so the module makes a
 * second, writable mapping of the same physical page (vmap) and stores through that, as
 * kernel rootkits do. Loading it stores nothing: only `fire` does. It sets no probe and
 * patches no code of its own.
 *
 *   insmod tamper.ko address=0xffffffff81234567 size=1
 *   cat   /sys/module/tamper/parameters/physical   where the target lies in memory
 *   cat   /sys/module/tamper/parameters/old        what is there before the first shot
 *   echo V > /sys/module/tamper/parameters/value   what shall be there
 *   echo 1 > /sys/module/tamper/parameters/fire    change it
 *   echo 0 > /sys/module/tamper/parameters/fire    put the old content back
 */
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/vmalloc.h>

static unsigned long address;
module_param(address, ulong, 0400);
MODULE_PARM_DESC(address, "kernel virtual address of the target");

static unsigned int size = 1;
module_param(size, uint, 0400);
MODULE_PARM_DESC(size, "bytes to change: 1 or 8");

static unsigned long value;
module_param(value, ulong, 0600);
MODULE_PARM_DESC(value, "content to store when fired");

static unsigned long physical;
module_param(physical, ulong, 0400);
MODULE_PARM_DESC(physical, "result: physical address of the target");

static unsigned long old;
module_param(old, ulong, 0400);
MODULE_PARM_DESC(old, "result: content found when the module was loaded");

static void *alias; /* writable mapping of the target's page */

static unsigned long target_load(void)
{
	void *target = alias + offset_in_page(address);

	return size == 1 ? READ_ONCE(*(u8 *)target) : READ_ONCE(*(u64 *)target);
}

static void target_store(unsigned long content)
{
	void *target = alias + offset_in_page(address);

	if (size == 1)
		WRITE_ONCE(*(u8 *)target, content);
	else
		WRITE_ONCE(*(u64 *)target, content);
}

static int fire_set(const char *text, const struct kernel_param *param)
{
	bool fire;
	int error = kstrtobool(text, &fire);

	if (error)
		return error;
	if (!alias) /* given on the insmod line, before there is an alias */
		return -EINVAL;
	target_store(fire ? value : old);
	return 0;
}

static int fire_get(char *buffer, const struct kernel_param *param)
{
	return sysfs_emit(buffer, "%d\n", target_load() != old);
}

static const struct kernel_param_ops fire_ops = {
	.set = fire_set,
	.get = fire_get,
};
module_param_cb(fire, &fire_ops, NULL, 0600);
MODULE_PARM_DESC(fire, "1 stores value, 0 restores the old content");

static int __init tamper_init(void)
{
	struct page *page;

	if ((size != 1 && size != 8) || address % size)
		return -EINVAL;
	/* Only the kernel image: __pa_symbol() means nothing for other addresses. */
	if (address < __START_KERNEL_map || address - __START_KERNEL_map >= KERNEL_IMAGE_SIZE)
		return -ERANGE;
	physical = __pa_symbol(address);
	if (!pfn_valid(PHYS_PFN(physical)))
		return -ENXIO;
	page = pfn_to_page(PHYS_PFN(physical));
	alias = vmap(&page, 1, VM_MAP, PAGE_KERNEL);
	if (!alias)
		return -ENOMEM;
	old = target_load();
	pr_info("tamper: virtual %#lx physical %#lx size %u old %#lx\n", address, physical, size,
		old);
	return 0;
}

static void __exit tamper_exit(void)
{
	vunmap(alias);
}

module_init(tamper_init);
module_exit(tamper_exit);
MODULE_DESCRIPTION("pyscan laboratory: change one place of the kernel through a writable alias");
MODULE_LICENSE("GPL");
