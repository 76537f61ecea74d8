# The card's firmware for QEMU's riscv64 machine "virt"; included by firmware/Makefile.

RISCV := riscv64-unknown-elf-
# What is fast under TCG: Zba and Zbb, which QEMU's default CPU has (target/riscv/cpu.c); loads that
# need not be aligned, which GCC takes only when it also tunes for a CPU where they are not slow; no
# scheduling, whose spilled registers cost more than it gains.
RISCV_FLAGS := -std=c11 -O2 -g -march=rv64imac_zicsr_zba_zbb -mabi=lp64 -mcmodel=medany \
	-mno-strict-align -mtune=thead-c906 -fno-schedule-insns -fno-schedule-insns2 \
	-ffreestanding -nostdlib -ffunction-sections -fdata-sections \
	-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror \
	-I. -I../native -Iboard/riscv-virt/include
RISCV_DIR := $(OUT)/riscv-virt

RISCV_NATIVE := ps_shake ps_aes_portable ps_key_expand ps_keyed ps_digest_sha256_portable \
	ps_digest_nh4aes_portable
RISCV_SOURCES := board/riscv-virt/start.S $(wildcard board/riscv-virt/*.c) \
	$(wildcard engine/*.c core/*.c) $(RISCV_NATIVE:%=../native/%.c)
RISCV_OBJECTS := $(addprefix $(RISCV_DIR)/,$(addsuffix .o,$(notdir $(RISCV_SOURCES))))
RISCV_HEADERS := $(wildcard *.h core/*.h engine/*.h board/riscv-virt/*.h \
	board/riscv-virt/include/*.h ../native/*.h)

vpath %.c board/riscv-virt engine core ../native
vpath %.S board/riscv-virt

.PHONY: firmware.elf
firmware.elf: $(OUT)/firmware.elf

# A loop that copies must not become a call of the function that it is in.
$(RISCV_DIR)/memory.c.o: RISCV_FLAGS += -fno-tree-loop-distribute-patterns

$(RISCV_DIR)/%.o: % $(RISCV_HEADERS) board/riscv-virt/board.mk
	@mkdir -p $(@D)
	$(RISCV)gcc $(RISCV_FLAGS) -c $< -o $@

$(OUT)/firmware.elf: $(RISCV_OBJECTS) board/riscv-virt/link.ld
	$(RISCV)gcc $(RISCV_FLAGS) -Wl,--gc-sections -Wl,--build-id=none \
		-T board/riscv-virt/link.ld $(RISCV_OBJECTS) -o $@
	$(RISCV)size $@

# What of it runs on this machine.
BOARD_TESTED := board/riscv-virt/fdt.c board/riscv-virt/entropy.c ../native/ps_shake.c

.PHONY: check-board
check: check-board
check-board: $(OUT)/board-tests
	$(OUT)/board-tests

$(OUT)/board-tests: $(BOARD_TESTED) tests/test_board.c $(RISCV_HEADERS) Makefile
	@mkdir -p $(@D)
	$(HOST_CC) $(HOST_FLAGS) $(BOARD_TESTED) tests/test_board.c -o $@
