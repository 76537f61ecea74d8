# The engine's driver on this machine; included by firmware/Makefile.

check: check-engine

.PHONY: check-engine
check-engine: $(OUT)/engine-tests
	$(OUT)/engine-tests

ENGINE_TESTED := $(wildcard engine/*.c) tests/nvme_model.c tests/test_nvme.c \
	tests/test_nvme_proofs.c

$(OUT)/engine-tests: $(ENGINE_TESTED) $(wildcard engine/*.h) tests/nvme_model.h hal.h \
		engine/engine.mk Makefile
	@mkdir -p $(@D)
	$(HOST_CC) $(HOST_FLAGS) $(ENGINE_TESTED) -o $@
