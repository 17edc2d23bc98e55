# `make soak MINUTES=10`: load, faults, reloads and scrapes at once against the built daemon; a leak or a lost request fails it.
MINUTES ?= 10

.PHONY: soak
soak: $(B)/nexus | $(TEST_DEPS)
	@$(NODE) tests/soak/soak.mjs --nexus $(B)/nexus --minutes $(MINUTES)

HELP_MORE += 'make soak         load, faults, reloads and scrapes at once for MINUTES=10; a leak or a lost request fails it'
