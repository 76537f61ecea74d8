# The engine's driver on this machine; included by firmware/Makefile.

check: check-engine

.PHONY: check-engine
check-engine: $(OUT)/engine-tests
	$(OUT)/engine-tests

$(OUT)/engine-tests: engine/nvme.c tests/test_nvme.c engine/nvme.h hal.h engine/engine.mk Makefile
	@mkdir -p $(@D)
	$(HOST_CC) $(HOST_FLAGS) engine/nvme.c tests/test_nvme.c -o $@
