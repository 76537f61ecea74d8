"""What the kernel itself writes in its read-only-after-init data, series 6.1 on x86-64.

`__ro_after_init` variables are set while the kernel boots, from the processor, the machine and
the command line, and are read-only from then on. The lists name those that were seen to
differ from the package in two dozen boots (processors of several makes, 1 to 8 CPUs, 256 MiB
to 6 GiB, two machine types, command lines), and those that other machines set by the kernel's
source: hypervisors, firmware, performance counters, other security modules. What is on no
list is as it is in the package. Encrypted guests, which cannot be read, are left out.

A variable's length in bytes is its own, so that the gap behind it stays exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pyscan.kernel.after_init import AfterInit, Part

#: Numbers and flags: bytes. Some are structures of them.
_VALUES: Final = {
    "__ia32_enabled": 1,
    "__pgtable_l5_enabled": 4,
    "__printk_percpu_data_ready": 1,
    "apic_extnmi": 4,
    "apic_intr_mode": 4,
    "apic_ipi_shorthand_off": 4,
    "apic_phys": 8,
    "apic_verbosity": 4,
    "apparmor_blob_sizes": 32,
    "apparmor_enabled": 4,
    "bhi_mitigation": 4,
    "blob_sizes": 32,
    "boot_cpu_apic_version": 1,
    "boot_cpu_physical_apicid": 4,
    "bpf_lsm_blob_sizes": 32,
    "bpf_lsm_initialized": 4,
    "build_ima_appraise": 4,
    "cc_mask": 8,
    "cc_vendor": 4,
    "cgroup_memory_nokmem": 1,
    "cgroup_memory_nosocket": 1,
    "constraints_initialized": 4,
    "cpu_mitigations": 4,
    "cpu_model_supports_sld": 1,
    "cr4_pinned_bits": 8,
    "debug_boot_weak_hash": 1,
    "debugfs_allow": 4,
    "default_noexec": 4,
    "disable_apic": 4,
    "disabled_cpu_apicid": 4,
    "efi_mem_attr_table": 8,
    "efi_memreserve_root": 8,
    "efi_rng_seed": 8,
    "evm_fixmode": 4,
    "fpu_default_state_size": 4,
    "fpu_kernel_cfg": 32,
    "fpu_user_cfg": 32,
    "gds_mitigation": 4,
    "hugetlb_sysfs_initialized": 1,
    "idt_descr": 10,
    "ima_extra_slots": 4,
    "ima_fail_unverifiable_sigs": 1,
    "ima_hash_algo": 4,
    "ima_hash_algo_idx": 4,
    "ima_sha1_idx": 4,
    "init_fpstate": 640,
    "intel_graphics_stolen_res": 64,
    "ioremap_max_page_shift": 4,
    "its_cmd": 4,
    "its_mitigation": 4,
    "kvm_sched_clock_offset": 8,
    "l1tf_mitigation": 4,
    "landlock_blob_sizes": 32,
    "landlock_errata": 4,
    "landlock_initialized": 1,
    "local_apic_timer_c2_ok": 4,
    "lookup_num_blocks": 4,
    "max_frame_size": 8,
    "mds_mitigation": 4,
    "mds_nosmt": 1,
    "memmap_on_memory": 1,
    "mmio_mitigation": 4,
    "mmio_nosmt": 1,
    "mmu_cr4_features": 8,
    "mp_lapic_addr": 8,
    "msr_kvm_system_time": 4,
    "msr_kvm_wall_clock": 4,
    "msr_test_ctrl_cache": 8,
    "mxcsr_feature_mask": 4,
    "nlink_tgid": 1,
    "nlink_tid": 1,
    "no_hash_pointers": 1,
    "orc_init": 1,
    "orig_umwait_control_cached": 4,
    "page_offset_base": 8,
    "pcat_compat": 1,
    "pcpu_atom_size": 4,
    "pcpu_chunk_struct_size": 8,
    "pcpu_free_slot": 4,
    "pcpu_high_unit_cpu": 4,
    "pcpu_low_unit_cpu": 4,
    "pcpu_nr_groups": 4,
    "pcpu_nr_slots": 4,
    "pcpu_nr_units": 4,
    "pcpu_sidelined_slot": 4,
    "pcpu_to_depopulate_slot": 4,
    "pcpu_unit_pages": 4,
    "pcpu_unit_size": 4,
    "pgdir_shift": 4,
    "physical_mask": 8,
    "physmem_end": 8,
    "pic_mode": 4,
    "poking_addr": 8,
    "proc_mem_force_override": 4,
    "ptrs_per_p4d": 4,
    "retbleed_cmd": 4,
    "retbleed_mitigation": 4,
    "retbleed_nosmt": 1,
    "rfds_mitigation": 4,
    "rodata_enabled": 1,
    "rrsba_disabled": 1,
    "secretmem_enable": 4,
    "self_inum": 4,
    "selinux_blob_sizes": 32,
    "sld_state": 4,
    "smp_found_config": 4,
    "spectre_v1_mitigation": 4,
    "spectre_v2_cmd": 4,
    "spectre_v2_enabled": 4,
    "spectre_v2_user_ibpb": 4,
    "spectre_v2_user_stibp": 4,
    "srbds_mitigation": 4,
    "srso_cmd": 4,
    "srso_mitigation": 4,
    "ssb_mode": 4,
    "strict_sigaltstack_size": 1,
    "taa_mitigation": 4,
    "taa_nosmt": 1,
    "thread_self_inum": 4,
    "tomoyo_blob_sizes": 32,
    "tomoyo_enabled": 4,
    "tsa_mitigation": 4,
    "tsx_ctrl_state": 4,
    "virt_ext_dest_id": 1,
    "vmalloc_base": 8,
    "vmap_allow_huge": 1,
    "vmemmap_base": 8,
    "vmlinux_build_id": 20,
    "vmscape_mitigation": 4,
    "vmware_cyc2ns": 16,
    "vmware_hypercall_mode": 1,
    "vmware_tsc_khz": 8,
    "vsyscall_mode": 4,
    "x2apic_max_apicid": 4,
    "x86_amd_ls_cfg_base": 8,
    "x86_amd_ls_cfg_ssbd_mask": 8,
    "x86_arch_cap_msr": 8,
    "x86_pred_cmd": 4,
    "xen_domain_type": 4,
    "xen_percpu_upcall": 1,
    "xen_pvh": 1,
    "xen_start_flags": 4,
    "xstate_flags": 96,
    "xstate_offsets": 96,
    "xstate_sizes": 96,
    "zone_dma_bits": 4,
}

#: Addresses of memory that is allocated while booting: bytes, 8 for each.
_POINTERS: Final = {
    "arch_policy_entry": 8,
    "atomic_pool_dma": 8,
    "atomic_pool_dma32": 8,
    "atomic_pool_kernel": 8,
    "avc_callbacks": 8,
    "avc_node_cachep": 8,
    "avc_xperms_cachep": 8,
    "avc_xperms_data_cachep": 8,
    "avc_xperms_decision_cachep": 8,
    "avtab_node_cachep": 8,
    "avtab_xperms_cachep": 8,
    "ebitmap_node_cachep": 8,
    "fn_alias_kmem": 8,
    "hashtab_node_cachep": 8,
    "kmalloc_caches": 448,
    "mrt_cachep": 8,
    "net_cachep": 8,
    "pcpu_base_addr": 8,
    "pcpu_chunk_lists": 8,
    "pcpu_first_chunk": 8,
    "pcpu_group_offsets": 8,
    "pcpu_group_sizes": 8,
    "pcpu_reserved_chunk": 8,
    "pcpu_unit_map": 8,
    "pcpu_unit_offsets": 8,
    "pde_opener_cache": 8,
    "peer_cachep": 8,
    "poking_mm": 8,
    "proc_dir_entry_cache": 8,
    "proc_inode_cachep": 8,
    "selinux_null": 16,
    "selnl": 8,
    "seq_file_cache": 8,
    "skbuff_ext_cache": 8,
    "skbuff_fclone_cache": 8,
    "skbuff_head_cache": 8,
    "sock_inode_cachep": 8,
    "trie_leaf_kmem": 8,
    "uts_ns_cache": 8,
    "x86_pci_msi_default_domain": 8,
    "xfrm_dst_cache": 8,
    "xfrm_state_cache": 8,
    "zbackend": 8,
}

#: Tables of functions that are completed, copied from others, or chosen by the platform: bytes.
_FUNCTIONS: Final = {
    "apic_flat": 280,
    "apic_noop": 280,
    "apic_physflat": 280,
    "apic_x2apic_cluster": 280,
    "apic_x2apic_phys": 280,
    "delay_fn": 8,
    "delay_halt_fn": 8,
    "machine_ops": 48,
    "mptcp_subflow_v4_request_sock_ops": 64,
    "mptcp_subflow_v6_request_sock_ops": 64,
    "ptmx_fops": 288,
    "subflow_request_sock_ipv4_ops": 64,
    "subflow_request_sock_ipv6_ops": 64,
    "subflow_specific": 96,
    "subflow_v6_specific": 96,
    "subflow_v6m_specific": 96,
    "tcp_prot_override": 480,
    "tcpv6_prot_override": 480,
    "tracefs_ops": 16,
    "x86_apic_ops": 16,
    "x86_platform": 184,
    "x86_return_thunk": 8,
    "xen_msi_ops": 16,
}

#: struct static_key, 16 bytes (include/linux/jump_label.h).
_STATIC_KEYS: Final = (
    "blake2s_use_avx512",
    "blake2s_use_ssse3",
    "bypass_usercopy_checks",
    "cr_pinning",
    "randomize_kstack_offset",
)

#: Lists of security hooks, and the arrays whose entries they link.
_HOOKS: Final = (
    "apparmor_hooks",
    "bpf_lsm_hooks",
    "capability_hooks",
    "landlock_hooks",
    "lockdown_hooks",
    "security_hook_heads",
    "selinux_hooks",
    "tomoyo_hooks",
    "yama_hooks",
)

#: struct genl_family (include/net/genetlink.h): `id` at 0, `mcgrp_offset` at 0x20.
_NETLINK_FAMILIES: Final = (
    "acpi_event_genl_family",
    "devlink_nl_family",
    "ethtool_genl_family",
    "family",
    "genl_ctrl",
    "ioam6_genl_family",
    "mptcp_genl_family",
    "netlbl_calipso_gnl_family",
    "netlbl_cipsov4_gnl_family",
    "netlbl_mgmt_gnl_family",
    "netlbl_unlabel_gnl_family",
    "quota_genl_family",
    "seg6_genl_family",
    "tcp_metrics_nl_family",
    "thermal_gnl_family",
)

#: struct bin_attribute (include/linux/sysfs.h): `size` at 0x10.
_ATTRIBUTES: Final = ("bin_attr_btf_vmlinux", "data_attr", "notes_attr")

#: Arrays of struct ima_rule_entry, 0x120 bytes each (security/integrity/ima/ima_policy.c): the
#: list's links, the first 16 bytes of each, are set.
_IMA_RULES: Final = {
    "build_appraise_rules": 15,
    "critical_data_rules": 1,
    "default_measurement_rules": 7,
    "dont_measure_rules": 13,
    "original_measurement_rules": 5,
    "secure_boot_rules": 4,
}

#: Structures of which single members are set.
_MEMBERS: Final = {
    "apic": (Part(AfterInit.OBJECT, 0, 8),),  # of several drivers in the image
    "gate_vma": (Part(AfterInit.VALUE, 0x20, 8),),  # vm_flags
    "hpet_msi_controller": (Part(AfterInit.OBJECT, 0, 8),),  # name
    "net_class": (Part(AfterInit.POINTER, 0x20, 8), Part(AfterInit.POINTER, 0x70, 8)),
    "pt_cap_group": (Part(AfterInit.POINTER, 0x18, 8),),  # attrs
    "x86_32_regsets": (Part(AfterInit.VALUE, 0xC8, 4),),  # n of REGSET_XSTATE
    "x86_64_regsets": (Part(AfterInit.VALUE, 0xC8, 4),),
    "x86_pmu_events_group": (Part(AfterInit.OBJECT, 0x18, 8),),  # attrs
    "x86_pmu_format_group": (Part(AfterInit.OBJECT, 0x18, 8),),
    # They begin as an address of the image (arch/x86/kernel/setup_percpu.c).
    "__per_cpu_offset": (Part(AfterInit.PER_CPU, 0, 65536),),
    # Images of the vDSO: they are patched as text is.
    "raw_data": (Part(AfterInit.VDSO, 0, 0),),
}

AFTER_INIT: Final[Mapping[str, tuple[Part, ...]]] = {
    **{name: (Part(AfterInit.VALUE, 0, size),) for name, size in _VALUES.items()},
    **{name: (Part(AfterInit.POINTER, 0, size),) for name, size in _POINTERS.items()},
    **{name: (Part(AfterInit.FUNCTIONS, 0, size),) for name, size in _FUNCTIONS.items()},
    **{name: (Part(AfterInit.STATIC_KEY, 0, 16),) for name in _STATIC_KEYS},
    **{name: (Part(AfterInit.HOOKS, 0, 0),) for name in _HOOKS},
    **{
        name: (Part(AfterInit.VALUE, 0, 4), Part(AfterInit.VALUE, 0x20, 4))
        for name in _NETLINK_FAMILIES
    },
    **{name: (Part(AfterInit.VALUE, 0x10, 8),) for name in _ATTRIBUTES},
    **{
        name: tuple(Part(AfterInit.POINTER, 0x120 * index, 16) for index in range(count))
        for name, count in _IMA_RULES.items()
    },
    **_MEMBERS,
}
